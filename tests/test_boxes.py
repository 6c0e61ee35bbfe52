"""extras/boxes.py: several boxes per answer. A disc, a ring, two discs, nine nuclei; every sum known."""

import json
import math
import random
import re

import numpy as np
import pytest
from conftest import noise_image
from hypothesis import given
from hypothesis import strategies as st
from test_oracle import MASKS, NINE, SIDE, TWO, Filler, Perfect, sample
from test_scripts import rows, run

import rewards
from data import (
    BOXES_EXAMPLE,
    PROMPTS,
    Frame,
    OneBox,
    Sample,
    answers_of,
    load_prompt,
    load_samples,
)
from evaluate import METRICS, add_masks, scores
from extras import boxes
from extras.boxes import read, regions, reward_terms, score, soft_f1, target_text, write_boxes
from extras.mask_reward import mask_rewards
from extras.oracle import EACH, measure, split_loss
from extras.several import add_siblings
from metrics import prediction
from rewards import MODES, total_reward, write_answer
from runtime.cli import ROOT, ModelConfig, parse_args

FRAME = Frame((SIDE, SIDE), (SIDE, SIDE))
THINK = "<think>It is there.</think>"
BOX, POINTS = (10.0, 20.0, 50.0, 60.0), ((20.0, 30.0), (40.0, 50.0))
FAR = (90.0, 90.0, 110.0, 110.0), ((95.0, 95.0), (105.0, 105.0))  # touches nothing


def terms(parts, mask):
    (found,) = reward_terms([THINK + write_boxes(parts)], sample(mask), FRAME)
    return found


def test_a_users_prompt_with_boxes_in_quotes_asks_for_several_and_the_help_says_so(
    tmp_path, capsys
):
    for text, wanted in (
        ('{query} Write {"boxes": …}', boxes),
        ("{query} Write the boxes.", OneBox),
    ):
        (tmp_path / "my.txt").write_text(text)
        assert answers_of(load_prompt(str(tmp_path / "my.txt"))) is wanted
    with pytest.raises(SystemExit):
        parse_args(ModelConfig, "", argv=["--help"])
    assert 'one with "boxes" in quotes asks for several' in " ".join(
        capsys.readouterr().out.split()
    )


# ---------------------------------------------------------------- one box for one region: today's reward

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


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("text", SINGLE)
def test_one_box_for_one_region_earns_exactly_what_rewards_py_gives(text, official):
    frame = (SIDE, SIDE)
    expected = rewards.reward_terms(text, BOX, POINTS, official, frame)
    found = score(as_boxes(text), [(BOX, POINTS)], official, frame)
    if official:  # what it reads is the first {...}, which differs by design
        expected, found = (
            {k: v for k, v in t.items() if "base" not in k} for t in (expected, found)
        )
    assert found == expected
    for mode in MODES.keys() - {"base"}:
        assert total_reward(found, mode) == total_reward(expected, mode)


def test_a_missing_key_earns_what_it_does_in_one_answer():
    for mine, theirs in (
        ('{"boxes": [[10, 20, 50, 60]]}', '{"bbox": [10, 20, 50, 60]}'),
        ('{"points": [[20, 30, 40, 50]]}', '{"points_1": [20, 30], "points_2": [40, 50]}'),
    ):
        found = score(f"{THINK}<answer>{mine}</answer>", [(BOX, POINTS)], frame=(SIDE, SIDE))
        assert found == rewards.reward_terms(
            f"{THINK}<answer>{theirs}</answer>", BOX, POINTS, frame=(SIDE, SIDE)
        )


@pytest.mark.parametrize("name", ["disc", "ring"])
def test_a_disc_and_a_ring_are_one_region_and_a_perfect_answer_earns_all(name):
    shown = sample(MASKS[name])
    assert regions(shown) == [(shown.bbox, shown.points)]
    found = terms(regions(shown), MASKS[name])
    assert total_reward(found, "soft") == 4 and total_reward(found, "hard") == pytest.approx(8)


# ---------------------------------------------------------------- several


@pytest.mark.parametrize("name, count", [("two", 2), ("nine", 9)])
def test_a_perfect_answer_earns_all_and_order_does_not_matter(name, count):
    parts = regions(sample(MASKS[name]))
    assert len(parts) == count and [box[1] for box, _ in parts] == sorted(
        box[1] for box, _ in parts
    )
    for seed in range(4):
        random.Random(seed).shuffle(parts)
        found = terms(parts, MASKS[name])
        assert total_reward(found, "soft") == pytest.approx(4) and total_reward(
            found, "hard"
        ) == pytest.approx(8)


@pytest.mark.parametrize("named", range(1, 10))
def test_naming_some_of_nine_earns_twice_their_number_over_both_counts(named):
    parts = regions(sample(NINE))[:named]
    found = terms(parts, NINE)
    assert found["box_iou"] == pytest.approx(2 * named / (9 + named)) == found["point_dice"]
    assert found["think_format"] == found["answer_format"] == 1


def test_sums_by_hand():
    """Two discs, one box right and one that misses: (1 + C) 2 / (2 + 2), C of a miss with both true points outside."""
    (box, points), other = regions(sample(TWO))
    miss = (other[0][0], 0.0, other[0][2], 30.0), other[1]  # 40 x 30 over 40 x 40: cut at y = 40
    C = rewards.reward_terms(write_answer(*miss), *other, frame=FRAME.model)["box_iou"]
    assert 0 < C < 0.1
    assert terms([miss, (box, points)], TWO)["box_iou"] == pytest.approx((1 + C) / 2)
    assert terms([(box, points)], TWO)["box_iou"] == pytest.approx(2 / 3)


def test_extra_boxes_cost():
    for name in MASKS:
        right = regions(sample(MASKS[name]))
        earned = [
            total_reward(terms(right + extra, MASKS[name]), "soft")
            for extra in ([], [FAR], [FAR] * 2, [FAR] * 20, right[:1], right)
        ]
        assert all(more < earned[0] for more in earned[1:]) and earned[1] > earned[2] > earned[3]
        m = len(right)
        assert earned[5] == pytest.approx(2 + 2 * 2 * m / (3 * m))  # every box twice: two thirds


@pytest.mark.parametrize("shift", [0, 6, 12, 200])
def test_a_box_that_hits_nothing_costs_even_where_hardly_anything_is_earned(shift):
    """One of nine nuclei, boxed worse and worse: the little that rewards.py gives a miss is given once."""
    (box, points), *_ = regions(sample(NINE))
    moved = tuple(v + shift for v in box), tuple((x + shift, y + shift) for x, y in points)
    far = [
        ((900.0 + i, 900.0, 910.0 + i, 910.0), ((901.0 + i, 901.0), (909.0 + i, 909.0)))
        for i in range(9)
    ]
    for mode in ("soft", "hard", "base"):
        earned = [total_reward(terms([moved, *far[:n]], NINE), mode) for n in range(10)]
        assert all(fewer > more for fewer, more in zip(earned, earned[1:])), (mode, earned)


def test_one_box_said_for_every_region_is_no_better_than_once():
    first = regions(sample(NINE))[:1]
    once, nine = (total_reward(terms(first * n, NINE), "soft") for n in (1, 9))
    assert nine < once


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
    assert read(text).problem == problem and read(text).parts == ()
    assert set(found.values()) == {0.0}
    assert set(score(text, [(BOX, POINTS)])) == set(rewards.reward_terms("", BOX, POINTS))


def test_a_bad_part_counts_as_a_part_and_keeps_the_others():
    good = [*BOX], [20, 30, 40, 50]
    text = (
        f'<answer>{{"boxes": {[good[0], [5, 5, 1, 1]]}, "points": {[good[1], [1, 2, 3]]}}}</answer>'
    )
    found = read(text)
    assert [part.bbox for part in found.parts] == [BOX, None] and found.parts[0].points == POINTS
    assert found.problem == "box and points malformed" and found.bbox == BOX
    assert score(text, [(BOX, POINTS)])["box_iou"] == pytest.approx(2 / 3)
    assert score(text, [(BOX, POINTS)])["answer_format"] == 0.4
    longer = f'<answer>{{"boxes": {[good[0]]}, "points": {[good[1]] * 3}}}</answer>'
    assert len(read(longer).parts) == 3


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=5),
        max_leaves=12,
    ),
    st.text(max_size=20),
)
def test_no_completion_raises_and_every_term_is_a_share(value, noise):
    for text in (noise, json.dumps({"boxes": value, "points": value}), json.dumps(value)):
        text = f"{noise}<think>{noise}</think><answer>{text}</answer>"
        for term in score(text, [(BOX, POINTS), FAR]).values():
            assert 0 <= term <= 1 and math.isfinite(term)


def test_soft_f1_takes_the_best_assignment():
    assert soft_f1([[0.6, 0.5], [0.5, 0.0]], 2) == pytest.approx(0.5)  # greedy would get 0.3
    assert soft_f1([], 3) == 0 and soft_f1([[1.0]], 1) == 1 and soft_f1([[1, 0, 0]], 3) == 0.5


# ---------------------------------------------------------------- prompt and target


def test_the_prompt_says_the_form_and_only_it_asks_for_boxes():
    assert [name for name, template in PROMPTS.items() if answers_of(template) is boxes] == [
        "multi"
    ]
    values = {"x1": "10", "y1": "20", "x2": "50", "y2": "60", "x": "30", "y": "40"}
    numbers = re.sub(
        r"\b[xy][12]?\b", lambda name: values[name[0]], BOXES_EXAMPLE.replace(", ...", "")
    )
    (part,), problem = read(numbers).parts, read(numbers).problem
    assert not problem and part.bbox == BOX and part.points == ((30, 40), (30, 40))


def test_the_target_is_read_back_and_nearly_perfect():
    for shown in load_samples(ROOT / "demo/histology", "test")[::7]:
        frame = Frame(shown.image.size, (112, 112))
        text = target_text(shown, frame)
        assert not read(text).problem and len(read(text).parts) == len(regions(shown))
        (found,) = reward_terms([text], shown, frame)
        assert found["think_format"] == found["answer_format"] == 1 and found["box_iou"] > 0.85
    plain = Sample("a", noise_image(50, 50), "?", BOX, POINTS)
    assert regions(plain) == [(BOX, POINTS)] and not target_text(plain, FRAME).startswith("<think>")


# ---------------------------------------------------------------- evaluation


def test_evaluation_by_hand():
    shown = sample(NINE)
    eight = regions(shown)[:8]
    p = prediction(
        shown, 0, [write_boxes(eight + [FAR]), write_boxes(eight), "?"], FRAME, answers=boxes
    )
    p = json.loads(json.dumps(add_masks(p, shown, Filler())))
    found = scores(p)
    # FAR holds the middle of the ninth, so of 20 x 20 and 18 x 18 pixels the smaller is inside the larger or overlaps
    overlap = rewards.box_iou(FAR[0], regions(shown)[8][0])
    assert found["soft_f1"] == pytest.approx(np.mean([(8 + overlap) * 2 / 18, 16 / 17, 0]))
    assert found["f1_50"] == pytest.approx(np.mean([(8 + (overlap >= 0.5)) * 2 / 18, 16 / 17, 0]))
    assert found["count_error"] == pytest.approx((0 + 1 / 9 + 1) / 3)
    assert found["pdice"] is None and found["parse_ok"] == pytest.approx(2 / 3)
    assert 0.7 < found["dice_box"] < 0.9  # boxes filled, for circles
    assert {"soft_f1", "f1_50", "count_error"} <= METRICS.keys()
    single = prediction(shown, 0, [write_answer(BOX, POINTS)], FRAME)
    assert scores(single | {"dice": None})["soft_f1"] is None and "regions" not in single["truth"]


def test_masks_of_several_boxes_are_united_for_the_reward():
    shown = sample(TWO)
    parts = regions(shown)
    both, one, none = mask_rewards(
        Filler(), shown, [write_boxes(parts), write_boxes(parts[:1]), ""], FRAME, answers=boxes
    )
    whole = rewards.smooth_log(2 * TWO.sum() / (TWO.sum() + 2 * 1600))  # two boxes of about 40 x 40
    assert both == pytest.approx(whole, abs=0.03) and one < both - 0.1 and none == 0


def test_the_loss_of_several_boxes_is_the_crms_where_a_true_box_each_would_do():
    shown = sample(NINE)
    p = prediction(shown, 0, [write_boxes(regions(shown)[:6])], FRAME, answers=boxes)
    row = measure(Perfect(NINE), shown, add_siblings([p])[0])
    assert row["written"] == EACH and row["crm"] == pytest.approx(2 * 6 / 15, abs=0.01)
    assert split_loss(row, "a box each, all") == pytest.approx(
        {"loss": 1 - row["crm"], "segmenter": 0, "geometry": 0, "crm": 1 - row["crm"]}
    )


# ---------------------------------------------------------------- scripts

SMALL = "--crm demo/crm --data demo/histology --prompt multi --steps 1 --max-new-tokens 40 --eval-limit 2 --out "


def test_both_trainers_train_on_several_boxes_and_the_checkpoint_remembers_it(tmp_path):
    run("train_sft.py", SMALL, tmp_path / "sft", "--batch 2 --lr 1e-4")
    first, last = rows(tmp_path / "sft/metrics.jsonl")
    assert {"greedy/soft_f1", "greedy/count_error"} <= first.keys() and "greedy/pdice" not in last
    run(
        "train_grpo.py",
        SMALL.replace("demo/crm", str(tmp_path / "sft/step_000001")).replace("--prompt multi", ""),
        tmp_path / "grpo",
        "--prompts 2 --group 2 --minibatches 1",
    )
    assert "greedy/soft_f1" in rows(tmp_path / "grpo/metrics.jsonl")[-1]
    assert rows(tmp_path / "grpo/rollouts.jsonl")[0]["truth"]["regions"]


def test_what_shows_or_exports_one_box_refuses_the_prompt(tmp_path):
    for script in (
        "extras.serve",
        f"extras.engines --data demo/histology --out {tmp_path / 'x.parquet'}",
    ):
        _, said = run("-m", script, "--prompt multi", check=2)
        assert "--prompt multi" in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "x.parquet").exists()
