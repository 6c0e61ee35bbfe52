"""The factory of the demo: what its pictures, words, lessons and checks are made of."""

import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import random_crm

from data import Example, Sizes, load_samples, to_image
from demo.make import check_crm, patients, wordings
from demo.make import crm as make_crm
from demo.make import data as make_data
from rewards import parse_answer, write_answer
from runtime.cli import ROOT

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


# ---------------------------------------------------------------- habits and lessons


def test_loosened_boxes_hold_the_target_and_stay_in_the_image():
    rng = random.Random(0)
    for _ in range(50):
        x1, y1, x2, y2 = make_crm.loosened((30, 20, 120, 100), (0.2, 0.6), (140, 112), rng)
        assert 0 <= x1 < 30
        assert 0 <= y1 < 20
        assert 120 < x2 <= 140
        assert 100 < y2 <= 112


def test_points_are_pulled_together_about_their_middle():
    points = make_crm.pulled_together(((10, 20), (30, 60)), (0.5, 0.5), random.Random(0))
    assert points == ((15, 30), (25, 50))


def test_broken_completions_lose_their_format():
    text = "<think>a</think>" + write_answer((1, 2, 3, 4), ((1, 2), (3, 4)))
    for seed in range(20):
        answer = parse_answer(make_crm.broken(text, random.Random(seed)))
        assert answer.problem or answer.think is None


def test_the_last_stage_is_unsure_in_three_completions_of_four(examples):
    rng = random.Random(0)
    unsure = 0
    for _ in range(40):
        for example in examples:
            size = example.image.size
            text = make_crm.habitual(example, Sizes(size, size), make_crm.HABITS["f"], rng)
            unsure += not any(name in text.lower() for name in example.extra["names"])
    assert 0.65 < unsure / 240 < 0.85


def test_dense_targets_by_hand():
    mask = np.zeros((56, 84), bool)
    mask[:, :28] = True
    share = make_crm.covered_shares(mask, (84, 56))
    assert share.shape == (6, 16)
    assert share[0].mean() > 0.99
    assert share[2].max() < 0.01
    places = make_crm.token_places((84, 56))
    assert places[0].tolist() == pytest.approx([14 / 224, 14 / 224])
    assert places[5].tolist() == pytest.approx([70 / 224, 42 / 224])


def test_learning_rates_warm_up_and_fall():
    stage = make_crm.Stage("c", 100, 1, 1.0)
    rates = [make_crm.learning_rate(stage, step) for step in (0, 29, 99)]
    assert rates[0] == pytest.approx(1.02 / 30)
    assert rates[1] > 0.8
    assert rates[2] < 0.03


@pytest.mark.parametrize("name", ["a", "b", "f"])
def test_a_stage_moves_what_it_trains(name, examples, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(make_crm, "HELD_BACK", 2)
    monkeypatch.setattr(make_crm, "report", lambda *_, **__: None)
    monkeypatch.setattr(make_crm, "report_dense", lambda *_: None)
    crm = random_crm()
    before = {key: value.clone() for key, value in crm.model.state_dict().items()}
    heads = make_crm.Heads(64)
    stage = make_crm.Stage(name, steps=1, batch=3, lr=1e-3)
    make_crm.run_stage(stage, crm, heads, examples, seed=0, work=tmp_path)
    assert f"stage {name} step     0" in capsys.readouterr().out
    moved = {key for key, value in crm.model.state_dict().items() if not before[key].equal(value)}
    assert any("visual" in key for key in moved)
    assert any("language_model" in key for key in moved) == (name != "a")


def test_a_lesson_that_is_drawn_twice_counts_twice(examples):
    crm = random_crm()
    one, other = (make_crm.Lesson(crm, example, "c", random.Random(0)) for example in examples[:2])
    digits = torch.tensor(crm.tokenizer.convert_tokens_to_ids(list("0123456789")))
    with torch.no_grad():
        twice = make_crm.answer_loss(crm, [one, one, other], digits, 3.0)
        first = make_crm.answer_loss(crm, [one], digits, 3.0)
        both = make_crm.answer_loss(crm, [one, other], digits, 3.0)
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
