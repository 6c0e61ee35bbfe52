"""The factory of the demo: what its pictures, words, lessons and checks are made of."""

import json
import random
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import random_crm

from data import Example, Sizes, in_whole_pixels, load_samples, target_text, to_image
from demo.make import check_crm, patients, wordings
from demo.make import crm as make_crm
from demo.make import data as make_data
from paper import careless
from rewards import parse_answer, write_answer
from runtime.cli import ROOT
from runtime.parallel import Ranks

SIZES = Sizes(image=(140, 112), model=(140, 112))
PHANTOMS = [
    (category, number)
    for number, category in enumerate(make_data.SOURCES)
    if make_data.SOURCES[category][0][0] is not None
]


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """A few examples of the embedded data, of different categories."""
    found = load_samples(ROOT / "demo/data", "train")
    return [found[i] for i in range(6)]


# ---------------------------------------------------------------- pictures and rows


@pytest.mark.parametrize("category, number", PHANTOMS)
def test_a_drawn_target_is_in_the_picture_and_its_row_is_that_of_the_embedded_data(
    category, number
):
    row, pixels, mask = make_data.make_example(0, 0, number, brain=None, clinic={})
    assert pixels.shape[:2] == mask.shape
    assert make_data.is_large_enough(mask)
    assert row["extra_info"]["category"] == category
    kept = pq.read_table(ROOT / "demo/data/train.parquet", columns=["extra_info", "reward_model"])
    old = kept.slice(number, 1).to_pylist()[0]
    assert row["extra_info"] == old["extra_info"]
    assert row["reward_model"] == old["reward_model"]


def test_a_row_is_read_as_it_was_made(tmp_path):
    number = list(make_data.SOURCES).index("polyp")
    row, pixels, mask = make_data.make_example(5, 1, number, brain=None, clinic={})
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "test.parquet")
    example = load_samples(tmp_path, "test")[0]
    assert np.array_equal(example.mask, mask)
    assert np.abs(np.asarray(example.image).astype(int) - pixels).mean() < 12  # JPEG
    assert example.query == row["prompt"][0]["content"]


def test_slices_for_training_and_for_the_test_are_apart():
    for plane in ("axial", "coronal", "sagittal"):
        parts = {0: [], 1: [], None: []}
        for index in range(98, 190):
            parts[make_data.part_of(plane, index)].append(index)
        gaps = [abs(a - b) for a in parts[0] for b in parts[1]]
        assert min(gaps) >= make_data.GAP
    thick = 5.0  # mm, of the chests
    train = [z for z in range(60) if patients.part_of(z, thick) == 0]
    test = [z for z in range(60) if patients.part_of(z, thick) == 1]
    assert min(abs(a - b) for a in train for b in test) * thick >= patients.GAP


def test_two_lungs_are_found_by_their_air_and_one_is_none():
    picture = np.full((200, 240), -1000.0, np.float32)
    picture[20:180, 20:220] = 40  # a body
    picture[50:150, 40:100] = -800
    one_lung = picture.copy()
    picture[50:150, 140:200] = -800
    found = patients.find_lungs(picture, spacing=1.0)
    assert sorted(found) == ["left", "right"]
    assert found["left"][100, 70]
    assert found["right"][100, 170]
    assert not found["left"][100, 170]
    assert patients.find_lungs(one_lung, spacing=1.0) == {}


@pytest.mark.parametrize("what", ["wheel", "patients"])
def test_a_missing_package_is_one_line_that_says_how_to_get_it(tmp_path, what):
    load = {"wheel": make_data.load_brain, "patients": patients.load_patients}[what]
    with pytest.raises(ValueError, match=f"--{what} .*make embedded fetches it"):
        load(tmp_path / "nothing")


# ---------------------------------------------------------------- words


def test_no_wording_gives_its_target_away():
    wordings.check()


@pytest.mark.parametrize(
    "box, says",
    [
        ((0, 0, 20, 20), "upper left"),
        ((40, 40, 60, 60), "centre"),
        ((80, 40, 100, 60), "right half"),
        ((40, 80, 60, 100), "lower middle"),
    ],
)
def test_places_by_hand(box, says):
    assert wordings.where(box, (100, 100)) == says


def test_a_name_keeps_its_article_where_the_bare_word_is_said_of_others():
    assert wordings.names("liver", "") == ["the liver"]
    assert wordings.names("polyp", "") == ["polyp"]
    assert wordings.names("kidney", "left") == ["kidney on the left"]


# ---------------------------------------------------------------- lessons


@pytest.mark.parametrize("kind", ["name", "question"])
def test_a_box_and_points_that_are_shown_are_the_true_ones(kind, examples):
    crm = random_crm()
    for example in examples:
        lesson = make_crm.Lesson(crm, example, kind, random.Random(0))
        (text,) = lesson.group.texts
        sizes = lesson.prompt.sizes
        box, points = in_whole_pixels(example.bbox, example.points, sizes)
        answer = parse_answer(text)
        assert answer.bbox == box
        assert answer.points == points
        assert text == target_text(example, sizes, with_think=kind == "question")


def test_no_question_by_clue_is_ever_answered_with_a_box(examples):
    """Whatever a lesson asks that does not say the target's name is answered without a number."""
    crm = random_crm()
    rng = random.Random(0)
    pool = [*examples, *load_samples(ROOT / "demo/data", "train").spread(40)]
    asked_by_clue = 0
    for kind in make_crm.LESSONS:
        for example in pool:
            lesson = make_crm.Lesson(crm, example, kind, rng)
            prompt = crm.tokenizer.decode(lesson.prompt.ids).lower()
            (text,) = lesson.group.texts
            if make_crm.target_name(example).lower() in prompt:
                continue
            asked_by_clue += 1
            assert text == f"<think>{example.think}</think>"
            assert not re.search("[0-9{}]", text)
    assert asked_by_clue == len(pool)  # those of one kind


def test_what_only_the_test_split_asks_is_never_shown(examples):
    rng = random.Random(0)
    unseen = [clue for words in wordings.WORDS.values() for clue in words.clues[wordings.SEEN :]]
    unseen += [opener.split("{")[0] for opener in wordings.OPENERS[wordings.SEEN :]]
    for _ in range(50):
        for example in examples:
            for kind in make_crm.LESSONS.values():
                question = kind.question(example, rng)
                assert not any(clue.format(side="left") in question for clue in unseen)


def test_the_stages_draw_known_kinds_and_only_the_last_asks_by_clue():
    kinds = [set(stage.lessons) for stage in make_crm.STAGES]
    assert kinds == [{"name"}, {"name"}, {"name", "question", "clue"}]
    assert set(make_crm.LESSONS) == kinds[-1]


def test_pictures_held_back_are_never_drawn(examples, monkeypatch):
    monkeypatch.setattr(make_crm, "HELD_BACK", 4)
    drawer = make_crm.Drawer(random_crm(), examples, random.Random(0))
    drawer.draw("name", 40)
    assert set(drawer.kept) == {0, 1}


def test_broken_completions_lose_their_format():
    text = "<think>a</think>" + write_answer((1, 2, 3, 4), ((1, 2), (3, 4)))
    for seed in range(20):
        answer = parse_answer(careless.broken(text, random.Random(seed)))
        assert answer.problem or answer.think is None


def test_dense_targets_by_hand():
    mask = np.zeros((56, 84), bool)
    mask[:, :28] = True
    share = make_crm.covered_shares(mask, (84, 56), 28)
    assert share.shape == (6, 16)
    assert share[0].mean() > 0.99
    assert share[2].max() < 0.01
    places = make_crm.token_places((84, 56), 28)
    assert places[0].tolist() == pytest.approx([14 / 224, 14 / 224])
    assert places[5].tolist() == pytest.approx([70 / 224, 42 / 224])


def test_learning_rates_warm_up_and_fall():
    stage = make_crm.Stage("c", 100, 1.0, {})
    rates = [make_crm.learning_rate(stage, step) for step in (0, 29, 99)]
    assert rates[0] == pytest.approx(1.02 / 30)
    assert rates[1] > 0.8
    assert rates[2] < 0.03


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_stage_moves_what_it_trains(name, examples, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_crm, "HELD_BACK", 2)
    monkeypatch.setattr(make_crm, "report", lambda *_, **__: None)
    monkeypatch.setattr(make_crm, "report_dense", lambda *_: None)
    crm = random_crm()
    before = {key: value.clone() for key, value in crm.model.state_dict().items()}
    heads = make_crm.Heads(64)
    lessons = {"name": 3} if name != "c" else {"name": 1, "question": 1, "clue": 1}
    stage = make_crm.Stage(name, steps=1, lr=1e-3, lessons=lessons, dense_weight=name != "c")
    make_crm.run_stage(stage, crm, heads, examples, 0, tmp_path, Ranks.start())
    assert f"stage {name} step     0" in capsys.readouterr().out
    moved = {key for key, value in crm.model.state_dict().items() if not before[key].equal(value)}
    assert any("visual" in key for key in moved)
    assert any("language_model" in key for key in moved) == (name != "a")


def test_a_lesson_that_is_drawn_twice_counts_twice(examples):
    crm = random_crm()
    one = make_crm.Lesson(crm, examples[0], "question", random.Random(0))
    other = make_crm.Lesson(crm, examples[1], "question", random.Random(0))
    with torch.no_grad():
        twice = make_crm.answer_loss(crm, [one, one, other], 3.0)
        first = make_crm.answer_loss(crm, [one], 3.0)
        both = make_crm.answer_loss(crm, [one, other], 3.0)
    assert min(first, both) < twice < max(first, both)


# ---------------------------------------------------------------- checks


def test_the_scores_of_a_check_by_hand(examples):
    example = examples[0]
    name = example.extra["names"][0]
    answer = write_answer(example.bbox, example.points)
    sizes = Sizes(example.image.size, example.image.size)
    good = check_crm.score(f"<think>It is {name}.</think>{answer}", example, sizes)
    assert good == pytest.approx((1, 1, 1, 1, 1))
    unnamed = check_crm.score(f"<think>It is there.</think>{answer}", example, sizes)
    assert unnamed == pytest.approx((1, 1, 1, 0, 0))
    assert check_crm.score("no answer", example, sizes) == (0, 0, 0, 0, 0)


def test_scores_of_a_check_are_in_the_image_frame(examples):
    example = examples[0]
    width, height = example.image.size
    sizes = Sizes((width, height), (2 * width, 2 * height))
    doubled = tuple(2 * value for value in example.bbox)
    points = tuple((2 * x + 0.5, 2 * y + 0.5) for x, y in example.points)
    for found, true in zip(to_image(points, sizes), example.points):
        assert found == pytest.approx(true)
    iou, pdice, *_ = check_crm.score(write_answer(doubled, points), example, sizes)
    assert iou == pytest.approx(1)
    assert pdice == pytest.approx(1)


def test_how_much_of_a_gap_was_closed():
    rows = {}
    for name, iou in (("named", 0.6), ("before", 0.2), ("after", 0.5)):
        rows[name] = [{"iou": iou}] * 10
    text = check_crm.gap_closed(rows["named"], rows["before"], rows["after"])
    assert text.startswith("gap of 0.400 IoU")
    assert text.endswith("closed 75% [75%, 75%]")


def test_the_tokenizer_learns_from_prompts_questions_traces_and_answers():
    found = load_samples(ROOT / "demo/data", "test")[:3]
    texts = make_crm.corpus(found)
    assert found.rows[2]["think"] in texts
    answer = {"bbox": [0] * 4, "points_1": [0, 0], "points_2": [0, 0]}
    assert texts.count(json.dumps(answer)) == 500
