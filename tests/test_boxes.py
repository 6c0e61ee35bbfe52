"""extras/boxes.py: several boxes per answer. A disc, a ring, two discs and nine nuclei."""

import json
import math
import random
import re
from itertools import pairwise

import numpy as np
import pytest
from conftest import noise_image
from hypothesis import given
from hypothesis import strategies as st
from test_scripts import run

import rewards
from asm import segment_regions
from data import (
    ANSWER_FORMATS,
    ONE_BOX,
    PROMPTS,
    Example,
    Sizes,
    answer_format_of,
    box_from_mask,
    keypoints_from_mask,
    load_prompt,
    load_samples,
)
from extras.boxes import (
    ANSWER_EXAMPLE,
    METRICS,
    SEVERAL_BOXES,
    SeveralAnswer,
    parse_boxes,
    pieces,
    regions,
    reward_terms,
    score,
    soft_f1,
    target_text,
    truth,
    write_boxes,
)
from metrics import prediction
from rewards import MODES, total_reward, write_answer
from runtime.cli import ROOT
from runtime.files import read_jsonl

SIDE = 120
SIZES = Sizes((SIDE, SIDE), (SIDE, SIDE))
Y, X = np.mgrid[:SIDE, :SIDE]
THINK = "<think>It is there.</think>"
BOX = (10.0, 20.0, 50.0, 60.0)
POINTS = ((20.0, 30.0), (40.0, 50.0))
FAR = ((90.0, 90.0, 110.0, 110.0), ((95.0, 95.0), (105.0, 105.0)))  # off BOX


def disc(x, y, radius, hole=0):
    distance = np.hypot(X - x, Y - y)
    return (distance <= radius) & (distance >= hole)


TWO = disc(30, 60, 20) | disc(90, 60, 20)  # of the same area
NINE = np.any([disc(20 + 40 * i, 20 + 40 * j, 9) for i in range(3) for j in range(3)], axis=0)
MASKS = {"disc": disc(60, 60, 30), "ring": disc(60, 60, 30, hole=15), "two": TWO, "nine": NINE}


def example_of(mask, think=""):
    box = box_from_mask(mask)
    points = keypoints_from_mask(mask)
    return Example("a", noise_image(SIDE, SIDE), "?", box, points, mask, think=think)


def terms(parts, mask):
    return reward_terms(THINK + write_boxes(parts), example_of(mask), SIZES)


def soft_reward(parts, mask):
    return total_reward(terms(parts, mask), "soft")


# ---------------------------------------------------------------- the registry


def test_a_prompt_with_boxes_in_quotes_asks_for_several(tmp_path):
    prompt = tmp_path / "my.txt"
    prompt.write_text('{query} Write {"boxes": …}')
    assert answer_format_of(load_prompt(str(prompt))) is SEVERAL_BOXES
    assert ANSWER_FORMATS["boxes"] == "extras.boxes.SEVERAL_BOXES"
    for name in PROMPTS:
        assert answer_format_of(load_prompt(name)) is ONE_BOX


# ---------------------------------------------------------------- one box, one region

SINGLE = [
    THINK + write_answer([11, 18, 52, 61], [(22, 30), (38, 51)]),
    write_answer(BOX, POINTS),
    THINK + write_answer([90, 90, 99, 99], [(1, 1), (1, 1)]),
    "<think></think>" + write_answer(BOX, POINTS) + " there",
    THINK + write_answer([50, 60, 10, 20], POINTS),
    THINK + write_answer(BOX, [(1, 2), ("NaN", 3)]),
    THINK + write_answer([1, 2, 3], POINTS),
    "Well. <think>a</think>\n" + write_answer(BOX, POINTS),
]


def as_boxes(text):
    """A completion of one box in the other form, the rest as it is."""
    before, body = text.split("<answer>")
    body, after = body.split("</answer>")
    fields = json.loads(body)
    xy = [v for key in ("points_1", "points_2") for v in fields[key]]
    several = json.dumps({"boxes": [fields["bbox"]], "points": [xy]})
    return f"{before}<answer>{several}</answer>{after}"


@pytest.mark.parametrize("text", SINGLE)
def test_one_box_for_one_region_earns_exactly_what_rewards_py_gives(text):
    size = (SIDE, SIDE)
    expected = rewards.reward_terms(text, BOX, POINTS, size)
    found = score(as_boxes(text), [(BOX, POINTS)], size)
    assert found == expected
    for mode in MODES:
        assert total_reward(found, mode) == total_reward(expected, mode)


def test_a_missing_key_earns_what_it_does_in_one_answer():
    for mine, theirs in (
        ('{"boxes": [[10, 20, 50, 60]]}', '{"bbox": [10, 20, 50, 60]}'),
        ('{"points": [[20, 30, 40, 50]]}', '{"points_1": [20, 30], "points_2": [40, 50]}'),
    ):
        found = score(f"{THINK}<answer>{mine}</answer>", [(BOX, POINTS)])
        assert found == rewards.reward_terms(f"{THINK}<answer>{theirs}</answer>", BOX, POINTS)


@pytest.mark.parametrize("name", ["disc", "ring"])
def test_a_disc_and_a_ring_are_one_region_and_a_perfect_answer_earns_all(name):
    example = example_of(MASKS[name])
    assert regions(example) == [(example.bbox, example.points)]
    found = terms(regions(example), MASKS[name])
    assert total_reward(found, "soft") == 4
    assert total_reward(found, "hard") == pytest.approx(8)


# ---------------------------------------------------------------- several


@pytest.mark.parametrize("name, count", [("disc", 1), ("ring", 1), ("two", 2), ("nine", 9)])
def test_pieces_are_counted_and_make_up_the_mask(name, count):
    found = pieces(MASKS[name])
    assert len(found) == count
    assert (np.any(found, axis=0) == MASKS[name]).all()


def test_specks_are_no_pieces_but_a_mask_of_specks_keeps_one():
    mask = MASKS["disc"].copy()
    mask[0, :15] = True
    assert len(pieces(mask)) == 1
    mask[0, 15] = True  # 16 pixels, but less than 1 % of the mask
    assert len(pieces(mask)) == 1
    mask[0:3, :16] = True
    assert len(pieces(mask)) == 2
    specks = np.zeros((SIDE, SIDE), bool)
    specks[0, 0:2] = True
    specks[9, 0:3] = True
    (kept,) = pieces(specks)
    assert kept.sum() == 3


@pytest.mark.parametrize("name, count", [("two", 2), ("nine", 9)])
def test_a_perfect_answer_earns_all_and_order_does_not_matter(name, count):
    parts = regions(example_of(MASKS[name]))
    assert len(parts) == count
    tops = [box[1] for box, _ in parts]
    assert tops == sorted(tops)
    for seed in range(4):
        random.Random(seed).shuffle(parts)
        found = terms(parts, MASKS[name])
        assert total_reward(found, "soft") == pytest.approx(4)
        assert total_reward(found, "hard") == pytest.approx(8)


@pytest.mark.parametrize("named", range(1, 10))
def test_naming_some_of_nine_earns_twice_their_number_over_both_counts(named):
    parts = regions(example_of(NINE))[:named]
    found = terms(parts, NINE)
    assert found["box_iou"] == pytest.approx(2 * named / (9 + named))
    assert found["point_dice"] == pytest.approx(2 * named / (9 + named))
    assert found["think_format"] == found["answer_format"] == 1


def test_sums_by_hand():
    """Two discs, one box right and one that misses: (1 + C) 2 / (2 + 2), C of the miss."""
    (box, points), other = regions(example_of(TWO))
    other_box, other_points = other
    # 40 x 30 over 40 x 40, cut at y = 40, so that both true points are outside
    miss = ((other_box[0], 0.0, other_box[2], 30.0), other_points)
    C = rewards.reward_terms(write_answer(*miss), *other, size=SIZES.model)["box_iou"]
    assert 0 < C < 0.1
    assert terms([miss, (box, points)], TWO)["box_iou"] == pytest.approx((1 + C) / 2)
    assert terms([(box, points)], TWO)["box_iou"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("name", MASKS)
def test_extra_boxes_cost(name):
    mask = MASKS[name]
    right = regions(example_of(mask))
    best = soft_reward(right, mask)
    one_more = soft_reward([*right, FAR], mask)
    two_more = soft_reward([*right, FAR, FAR], mask)
    assert best > one_more > two_more > soft_reward(right + [FAR] * 20, mask)
    assert best > soft_reward([*right, right[0]], mask)
    # every box twice: two thirds of box_iou and of point_dice
    assert soft_reward(right + right, mask) == pytest.approx(2 + 2 * 2 / 3)


@pytest.mark.parametrize("mode", ["soft", "hard", "base"])
@pytest.mark.parametrize("shift", [0, 6, 12, 200])
def test_a_box_that_hits_nothing_costs_even_where_hardly_anything_is_earned(shift, mode):
    """One of nine nuclei, boxed worse and worse: the little that a miss earns is given once."""
    box, points = regions(example_of(NINE))[0]
    moved_box = tuple(value + shift for value in box)
    moved_points = tuple((x + shift, y + shift) for x, y in points)
    far = []
    for i in range(9):
        far_box = (900.0 + i, 900.0, 910.0 + i, 910.0)
        far.append((far_box, ((901.0 + i, 901.0), (909.0 + i, 909.0))))
    earned = []
    for extra in range(10):
        parts = [(moved_box, moved_points), *far[:extra]]
        earned.append(total_reward(terms(parts, NINE), mode))
    assert all(fewer > more for fewer, more in pairwise(earned)), earned


def test_one_box_said_for_every_region_is_no_better_than_once():
    first = regions(example_of(NINE))[:1]
    assert soft_reward(first * 9, NINE) < soft_reward(first, NINE)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "no answer block"),
        ("<answer></answer>", "answer is not a JSON object"),
        ("<answer>{}</answer>", "a key is missing"),
        ('<answer>{"boxes": [], "points": []}</answer>', "box and points malformed"),
        ('<answer>{"boxes": 3, "points": {}}</answer>', "box and points malformed"),
        (write_answer(BOX, POINTS), "a key is missing"),
    ],
)
def test_a_completion_without_a_box_earns_nothing(text, problem):
    found = score(text, [(BOX, POINTS)] * 3)
    assert parse_boxes(text) == SeveralAnswer(None, None, None, problem, ())
    assert parse_boxes(text).regions == ()
    assert set(found.values()) == {0.0}
    assert list(found) == list(rewards.reward_terms("", BOX, POINTS))


def test_a_bad_part_counts_as_a_part_and_keeps_the_others():
    good_box = [*BOX]
    good_points = [20, 30, 40, 50]
    body = {"boxes": [good_box, [5, 5, 1, 1]], "points": [good_points, [1, 2, 3]]}
    text = f"<answer>{json.dumps(body)}</answer>"
    found = parse_boxes(text)
    assert found.regions == ((BOX, POINTS), (None, None))
    assert found.problem == "box and points malformed"
    assert found.bbox == BOX
    assert score(text, [(BOX, POINTS)])["box_iou"] == pytest.approx(2 / 3)
    assert score(text, [(BOX, POINTS)])["answer_format"] == 0.4


def test_parts_are_as_many_as_the_longer_list_has():
    body = {"boxes": [[*BOX]], "points": [[20, 30, 40, 50]] * 3}
    found = parse_boxes(f"<answer>{json.dumps(body)}</answer>")
    assert found.regions == ((BOX, POINTS), (None, POINTS), (None, POINTS))
    assert found.problem == "a key is missing"


def test_the_box_of_an_answer_is_around_those_of_its_parts():
    found = parse_boxes(THINK + write_boxes([(BOX, POINTS), FAR]))
    assert found.bbox == (10, 20, 110, 110)
    assert found.points is None
    assert found.think == "It is there."


def test_what_stands_around_the_answer_is_scored_too_and_a_draft_in_the_thoughts_is_not():
    answer = write_boxes([(BOX, POINTS)])
    truth_of_one = [(BOX, POINTS)]
    assert score(THINK + answer, truth_of_one)["base_think"] == 1
    assert score(THINK + answer + " there", truth_of_one)["base_think"] == 0
    draft = write_boxes([FAR])
    text = f"<think>{draft}</think>{answer}"
    assert parse_boxes(text).regions == ((BOX, POINTS),)
    assert score(text, truth_of_one) == score(THINK + answer, truth_of_one)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5),
    max_leaves=12,
)


@given(JSON_VALUES, st.text(max_size=20))
def test_no_completion_raises_and_every_term_is_a_share(value, noise):
    for body in (noise, json.dumps({"boxes": value, "points": value}), json.dumps(value)):
        text = f"{noise}<think>{noise}</think><answer>{body}</answer>"
        for term in score(text, [(BOX, POINTS), FAR]).values():
            assert math.isfinite(term)
            assert 0 <= term <= 1


@pytest.mark.parametrize("depth", [1, 10, 100, *range(900, 1000, 7), 10_000])
def test_deeply_nested_lists_do_not_raise(depth):
    nested = "[" * depth + "]" * depth
    text = f'<answer>{{"boxes": {nested}, "points": {nested}}}</answer>'
    assert parse_boxes(text).problem in rewards.ANSWER_FORMAT_SCORES
    assert score(text, [(BOX, POINTS)])["box_iou"] == 0


def test_soft_f1_takes_the_best_assignment():
    assert soft_f1([[0.6, 0.5], [0.5, 0.0]], 2) == pytest.approx(0.5)  # greedy would get 0.3
    assert soft_f1([], 3) == 0
    assert soft_f1([[1.0]], 1) == 1
    assert soft_f1([[1, 0, 0]], 3) == 0.5


# ---------------------------------------------------------------- prompt and target


def test_the_prompt_shows_an_answer_that_can_be_read():
    assert load_prompt("boxes") == SEVERAL_BOXES.prompt
    assert answer_format_of(SEVERAL_BOXES.prompt) is SEVERAL_BOXES
    assert ANSWER_EXAMPLE in SEVERAL_BOXES.prompt
    values = {"x1": "10", "y1": "20", "x2": "50", "y2": "60", "x": "30", "y": "40"}
    without_dots = ANSWER_EXAMPLE.replace(", ...", "")
    numbers = re.sub(r"\b[xy][12]?\b", lambda name: values[name[0]], without_dots)
    found = parse_boxes(numbers)
    assert found.problem == ""
    assert found.regions == ((BOX, ((30, 40), (30, 40))),)


def test_the_target_is_read_and_nearly_perfect():
    for example in load_samples(ROOT / "demo/histology", "test")[::7]:
        sizes = Sizes(example.image.size, (112, 112))
        text = target_text(example, sizes)
        found = parse_boxes(text)
        assert found.problem == ""
        assert len(found.parts) == len(regions(example))
        terms_of_target = reward_terms(text, example, sizes)
        assert terms_of_target["think_format"] == terms_of_target["answer_format"] == 1
        assert terms_of_target["box_iou"] > 0.85


def test_an_example_without_a_mask_has_one_region_and_no_trace_makes_no_think_block():
    plain = Example("a", noise_image(50, 50), "?", BOX, POINTS)
    assert regions(plain) == [(BOX, POINTS)]
    assert truth(plain) == {"bbox": BOX, "points": POINTS, "regions": [BOX]}
    assert not target_text(plain, SIZES).startswith("<think>")
    traced = example_of(TWO, think="Two discs.")
    assert target_text(traced, SIZES).startswith("<think>Two discs.</think><answer>")
    assert target_text(traced, SIZES, with_think=False).startswith("<answer>")


# ---------------------------------------------------------------- evaluation


def test_metrics_by_hand():
    example = example_of(NINE)
    eight = regions(example)[:8]
    texts = [write_boxes([*eight, FAR]), write_boxes(eight), "?"]
    p = prediction(example, 0, texts, SIZES, answer_format=SEVERAL_BOXES)
    p = json.loads(json.dumps(p))  # as predictions.jsonl has it
    found = {name: metric(p) for name, (_, metric) in METRICS.items()}
    # FAR has 20 x 20 pixels, the ninth nucleus 18 x 18, and they overlap
    ninth_box, _ = regions(example)[8]
    overlap = rewards.box_iou(FAR[0], ninth_box)
    hit = overlap >= 0.5
    assert found["soft_f1"] == pytest.approx(np.mean([(8 + overlap) * 2 / 18, 16 / 17, 0]))
    assert found["f1_50"] == pytest.approx(np.mean([(8 + hit) * 2 / 18, 16 / 17, 0]))
    assert found["count_error"] == pytest.approx((0 + 1 / 9 + 1) / 3)
    assert p["asked"] == ["bbox"]
    assert len(p["truth"]["regions"]) == 9
    assert [len(completion["regions"]) for completion in p["completions"]] == [9, 8, 0]


class Filler:
    """A segmenter that fills a box."""

    def segment(self, image, boxes=None, points=None):
        masks = []
        for x1, y1, x2, y2 in boxes:
            masks.append((x1 <= X) & (x2 > X) & (y1 <= Y) & (y2 > Y))
        return np.array(masks), np.ones(len(masks))


def test_the_masks_of_several_boxes_are_united():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    parts = regions(example_of(TWO))
    areas = []
    for count in (0, 1, 2):
        answer = parse_boxes(write_boxes(parts[:count]))
        mask, scores = segment_regions(Filler(), image, answer.regions)
        assert len(scores) == count
        areas.append(mask.sum())
    assert areas == [0, 41 * 41, 2 * 41 * 41]


# ---------------------------------------------------------------- scripts

SMALL = (
    "--data demo/histology --steps 1 --max-new-tokens 40 --eval-limit 2 --crm {crm} --out {out} "
)


def test_both_trainers_train_on_several_boxes_and_the_checkpoint_remembers_it(tmp_path):
    sft = tmp_path / "sft"
    flags = SMALL.format(crm="demo/crm", out=sft)
    run("train_sft.py", flags + "--prompt boxes --batch 2 --lr 1e-4")
    before, after = read_jsonl(sft / "metrics.jsonl")
    assert {"greedy/soft_f1", "greedy/count_error"} <= before.keys()
    assert "greedy/pdice" not in after

    grpo = tmp_path / "grpo"
    flags = SMALL.format(crm=sft / "step_000001", out=grpo)
    run("train_grpo.py", flags + "--prompts 2 --group 2 --minibatches 1")
    assert "greedy/soft_f1" in read_jsonl(grpo / "metrics.jsonl")[-1]
    assert read_jsonl(grpo / "rollouts.jsonl")[0]["truth"]["regions"]


def test_what_shows_or_exports_one_box_rejects_the_prompt(tmp_path):
    table = tmp_path / "x.parquet"
    for script in ("extras.serve", f"extras.engines --data demo/histology --out {table}"):
        _, said = run("-m", script, "--prompt boxes", check=2)
        assert "one box" in said
        assert len(said.strip().splitlines()) == 1
    assert not table.exists()
