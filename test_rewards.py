"""rewards.py against hand numbers, the released code's numbers, and everything a model may write.

.venv/bin/python -m pytest -q test_rewards.py
"""

import json
import math
import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    ANSWER_FORMAT,
    MODES,
    box_iou,
    parse_answer,
    point_dice,
    reward_formula,
    reward_terms,
    smooth_exp,
    smooth_log,
    total_reward,
    write_answer,
)

GT_BOX = (100, 100, 200, 200)  # 100 px square, diagonal 141.42
GT_POINTS = ((120, 150), (180, 150))  # 60 px apart
BOX_TERMS = ("box_iou", "box_align", "box_scale")
POINT_TERMS = ("point_dice", "point_align", "point_angle")
BASE_TERMS = ("base_think", "base_answer", "base_iou", "base_box_l1", "base_points")
ALL_TERMS = {"think_format", "answer_format", *BOX_TERMS, *POINT_TERMS, *BASE_TERMS}
GOLDEN = [
    json.loads(line)
    for line in (Path(__file__).parent / "tests/golden/golden_rewards.jsonl").open()
]
GOLDEN_TERMS = {
    "format_think": "think_format",
    "format_seg": "answer_format",
    "bbox_iou": "box_iou",
    "bbox_align": "box_align",
    "bbox_scale": "box_scale",
    "points_dice": "point_dice",
    "points_align": "point_align",
    "points_angle": "point_angle",
}
GOLDEN_BASE = dict(zip(("thinking", "segment", "iou", "bbox_l1", "points_l1"), BASE_TERMS))


def completion(box=GT_BOX, points=GT_POINTS, think="round, dark", between="\n"):
    fields = {"bbox": list(box), "points_1": list(points[0]), "points_2": list(points[1])}
    return f"<think>{think}</think>{between}<answer>{json.dumps(fields)}</answer>"


def score(box=GT_BOX, points=GT_POINTS, official=False):
    return reward_terms(completion(box, points), GT_BOX, GT_POINTS, official)


def answer(body, official=False):
    return parse_answer(f"<think>t</think><answer>{body}</answer>", official)


# ---- hand numbers ----


def test_smoothing_by_hand():
    assert smooth_log(0) == pytest.approx(0.1)
    assert smooth_log(0.5) == pytest.approx(0.694868, abs=1e-6)  # 0.9 · ln 2.5 / ln 4 + 0.1
    assert smooth_log(1) == 1
    # σ(0) = 0.952574, σ(0.5) = 0.817574, σ(2) = 0.047426; (0.770149 / 0.905148) · 0.9 + 0.1
    assert smooth_exp(0.5, k=3, c=1, v_max=2) == pytest.approx(0.865769, abs=1e-6)
    assert smooth_exp(0, k=3, c=1, v_max=2) == 1
    assert smooth_exp(2, k=3, c=1, v_max=2) == pytest.approx(0.1)


def test_metrics_by_hand():
    assert box_iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert box_iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0  # they touch
    assert box_iou((0, 0, 10, 10), (2, 2, 7, 6)) == pytest.approx(20 / 100)
    # unit circles, centres 1 apart: I = 2π/3 - √3/2 = 1.228370
    p, g = ((-1, 0), (1, 0)), ((0, 0), (2, 0))
    assert point_dice(p, g) == pytest.approx(1.228370 / math.pi, abs=1e-6)
    assert point_dice(p, g, official=True) == pytest.approx(
        2 * 1.228370 / (2 * math.pi - 1.228370), abs=1e-5
    )
    # radius 1 within radius 3: I = π, A + A* = 10π, U = 9π
    p, g = ((0, 0), (2, 0)), ((-2, 0), (4, 0))
    assert point_dice(p, g) == pytest.approx(2 / 10)
    assert point_dice(p, g, official=True) == pytest.approx(2 / 9, abs=1e-6)
    assert point_dice(p, ((9, 0), (11, 0))) == 0
    # different radii, 3 and 4 at 5: a right angle at the crossing, kite 12, α = atan(4/3), β = atan(3/4)
    lens = 9 * math.atan2(4, 3) + 16 * math.atan2(3, 4) - 12
    assert point_dice(((-3, 0), (3, 0)), ((1, 0), (9, 0))) == pytest.approx(
        2 * lens / (25 * math.pi)
    )


def test_box_terms_of_a_box_slid_by_ten_pixels_by_hand():
    terms = score(box=(110, 100, 210, 200))  # both true points inside, same area: gate 1
    assert terms["box_iou"] == pytest.approx(
        0.9 * math.log(3 * 9 / 11 + 1) / math.log(4) + 0.1
    )  # 9000/11000
    assert terms["box_align"] == pytest.approx(
        smooth_exp(5 / 141.421356, 3, 1, 2)
    )  # (10 + 0 + 10 + 0) / 4
    assert terms["box_scale"] == 1


def test_box_terms_of_a_half_wide_box_by_hand():
    terms = score(
        box=(100, 100, 150, 200)
    )  # misses one true point, area exactly half: V1 = V2 = 0.5
    gate = 0.85
    assert terms["box_iou"] == pytest.approx(gate * smooth_log(0.5))
    assert terms["box_align"] == pytest.approx(gate * smooth_exp(12.5 / 141.421356, 3, 1, 2))
    # A and r both halve: d = √2 ln 2 = 0.980
    assert terms["box_scale"] == pytest.approx(
        gate * smooth_exp(math.sqrt(2) * math.log(2), 3, 0.5, 1)
    )


def test_point_terms_by_hand():
    terms = score(
        points=((150, 120), (150, 180))
    )  # same centre, turned by 90°; inside, 60 px apart: gate 1
    assert terms["point_dice"] == 1
    assert terms["point_align"] == pytest.approx(
        smooth_exp(30 / 141.421356, 3, 1, 2)
    )  # (30 + 30) / 2 each
    assert terms["point_angle"] == pytest.approx(0.1)
    terms = score(points=((195, 150), (205, 150)))  # one outside, 10 px apart: V1 = V2 = 0.5
    assert terms["point_angle"] == pytest.approx(0.85)
    assert terms["point_dice"] == pytest.approx(
        0.085
    )  # circles of radius 30 at 150 and 5 at 200: apart
    # 195 from 120 and 205 from 180: (75/2 + 25/2) / 2 = 25
    assert terms["point_align"] == pytest.approx(0.85 * smooth_exp(25 / 141.421356, 3, 1, 2))


def test_base_terms_by_hand():
    def base(box, points=GT_POINTS):
        return tuple(score(box, points)[name] for name in BASE_TERMS)

    assert base(GT_BOX) == (1, 1, 1, 1, 1)
    # "+1" widths: 101² each. 34 px: I = 67 · 101, U = 135 · 101, 0.496; 33 px: 68/134 = 0.507
    assert base((133, 100, 233, 200), ((150, 150), (210, 150))) == (1, 1, 1, 0, 1)
    assert base((134, 100, 234, 200), ((150, 150), (210, 150))) == (1, 1, 0, 0, 1)
    assert base((120, 100, 219, 200))[3] == 1  # edges off by (20 + 0 + 19 + 0) / 4 = 9.75
    assert base((120, 100, 220, 200))[3] == 0  # and by 10
    assert base(GT_BOX, ((120, 150), (201, 150)))[4] == 0  # a point outside the predicted box
    far = (0, 0, 500, 500)
    assert base(far, ((120, 249), (180, 249)))[4] == 1  # both 99 px away
    assert base(far, ((120, 250), (180, 250)))[4] == 0
    assert base(far, ((180, 249), (120, 249)))[4] == 1  # the better pairing


# ---- the released code ----


def test_official_reproduces_every_released_number():
    assert len(GOLDEN) == 300
    for case in GOLDEN:
        terms = reward_terms(case["completion"], case["bbox"], case["points"], official=True)
        for theirs, ours in GOLDEN_TERMS.items():
            assert terms[ours] == pytest.approx(case["hard"][theirs], abs=1e-6), (theirs, case)
            if ours in MODES["soft"]:
                assert terms[ours] == pytest.approx(case["soft"][theirs], abs=1e-6), (theirs, case)
        for theirs, ours in GOLDEN_BASE.items():
            assert terms[ours] == case["base"][theirs], (theirs, case)
        for mode in ("soft", "hard", "base"):
            assert total_reward(terms, mode) == pytest.approx(case[mode]["score"], abs=1e-6), (
                mode,
                case,
            )


def test_plain_metrics_equal_the_released_evaluation():
    evaluated = [case for case in GOLDEN if case["eval"]]
    assert len(evaluated) == 232
    for case in evaluated:
        read = parse_answer(case["completion"], official=True)
        assert box_iou(read.bbox, case["bbox"]) == pytest.approx(case["eval"]["iou"], abs=1e-6)
        published = point_dice(read.points, case["points"], official=True)
        assert published == pytest.approx(case["eval"]["pdice"], abs=1e-12)
        dice = point_dice(read.points, case["points"])  # 2I/U = 2D / (2 - D)
        assert published == pytest.approx(2 * dice / (2 - dice), abs=1e-4)


def test_ours_and_released_agree_to_rounding_where_no_quirk_applies():
    exact = ("think_format", "box_iou", "box_align", "point_align", "point_angle", "base_think")
    for case in GOLDEN:
        text, truth = case["completion"], (case["bbox"], case["points"])
        ours, theirs = reward_terms(text, *truth), reward_terms(text, *truth, official=True)
        if "```" not in text:
            assert {n: ours[n] for n in exact} == pytest.approx(
                {n: theirs[n] for n in exact}, abs=6e-5
            )


def test_quirk_1_released_pdice_is_over_the_union():
    slid = (130, 150), (190, 150)
    assert point_dice(slid, GT_POINTS) < 1 < point_dice(slid, GT_POINTS, official=True)
    assert (
        score(points=slid)["point_dice"] < 1 == score(points=slid, official=True)["point_dice"]
    )  # clipped


def test_quirk_2_released_box_scale_never_falls_below_0_291():
    tiny = (149, 149, 151, 151)
    gate = 0.8125  # no true point inside, too small: 0.7 + 0.3 (0.25 + 0.5) / 2
    assert score(tiny)["box_scale"] == pytest.approx(0.1 * gate)
    assert score(tiny, official=True)["box_scale"] == pytest.approx(0.2913 * gate, abs=1e-4)


def test_quirk_3_released_base_has_dead_terms_and_wants_double_quotes():
    text = completion()
    for official, quote, expected in (
        (False, '"', (1, 1, 1, 1, 1)),
        (True, '"', (1, 1, 0, 0, 1)),
        (False, "'", (1, 1, 1, 1, 1)),
        (True, "'", (1, 0, 0, 0, 0)),
    ):
        terms = reward_terms(text.replace('"', quote), GT_BOX, GT_POINTS, official)
        assert tuple(terms[name] for name in BASE_TERMS) == expected
    unclosed = text.removesuffix("</answer>")
    assert reward_terms(unclosed, GT_BOX, GT_POINTS, official=True)["base_answer"] == 1
    assert reward_terms(unclosed, GT_BOX, GT_POINTS)["base_answer"] == 0


def test_quirk_4_released_accepts_inverted_boxes():
    for inverted in ((200, 100, 100, 200), (100, 200, 200, 100), (100, 100, 100, 200)):
        ours, theirs = score(inverted), score(inverted, official=True)
        assert ours["answer_format"] == 0.6 and theirs["answer_format"] == 1
        assert not any(ours[name] for name in BOX_TERMS) and ours["point_dice"] == 1
        assert all(0 < theirs[name] < 1 for name in BOX_TERMS)


def test_quirk_5_released_takes_an_answer_out_of_the_thoughts():
    draft, final = (0, 0, 50, 50), GT_BOX
    text = completion(
        final, think=completion(draft).split("\n")[1]
    )  # the second line of completion() is its answer block
    assert parse_answer(text).bbox == final
    assert parse_answer(text, official=True).bbox == draft
    only_drafted = text.split("\n")[0]
    assert parse_answer(only_drafted).problem == "no answer block"
    assert parse_answer(only_drafted, official=True).problem == ""


def test_quirk_6_released_terms_have_four_decimals():
    shifted = (103, 107, 211, 199)
    ours, theirs = score(shifted), score(shifted, official=True)
    for name in ("box_iou", "box_align"):
        assert theirs[name] == round(ours[name], 4) != ours[name]


def test_quirk_7_released_base_cuts_the_points_to_whole_pixels_before_it_tests_whether_they_are_inside():
    right_of_the_box = ((120, 150), (200.9, 150))  # 200 when cut, and 200 is inside
    assert score(points=right_of_the_box)["base_points"] == 0
    assert score(points=right_of_the_box, official=True)["base_points"] == 1
    box = (100.5, 100, 200, 200)
    left_when_cut = ((100.7, 150), (180, 150))  # 100.7 is inside, 100 is not
    assert score(box, left_when_cut)["base_points"] == 1
    assert score(box, left_when_cut, official=True)["base_points"] == 0


def test_quirk_8_released_takes_no_fence():
    fenced = f"```json\n{json.dumps({'bbox': GT_BOX, 'points_1': [1, 2], 'points_2': [3, 4]})}\n```"
    assert answer(fenced).problem == ""
    assert answer(fenced, official=True).problem == "answer is not a JSON object"


# ---- invariants ----


@pytest.mark.parametrize(
    "mode, most", [("soft", 4), ("hard", 8), ("base", 5), ("iou", 3), ("pdice", 3)]
)
def test_a_perfect_answer_scores_exactly_the_most(mode, most):
    rng = random.Random(0)
    for _ in range(500):  # odd sizes and fractions, so that exactness is no accident
        x, y, w, h = (
            rng.uniform(0, 500),
            rng.uniform(0, 500),
            rng.uniform(20, 400),
            rng.uniform(20, 400),
        )
        box = (x, y, x + w, y + h)
        points = ((x + w / 7, y + h / 3), (x + w / 7 + 0.6 * w, y + h / 2))
        for pair in (points, points[::-1]):
            assert total_reward(reward_terms(completion(box, pair), box, points), mode) == most


def test_every_term_is_always_there():
    for text in ("", completion(), "<answer>{}</answer>", "<think>"):
        for official in (False, True):
            assert reward_terms(text, GT_BOX, GT_POINTS, official).keys() >= ALL_TERMS
    assert {name for mode in MODES.values() for name in mode} <= ALL_TERMS


def assert_falls(values):
    assert all(later < earlier for earlier, later in zip(values, values[1:])), values


DIRECTIONS = [(math.cos(a), math.sin(a)) for a in (0.0, 0.3, math.pi / 2, 2.0, math.pi, 4.0, 5.5)]


@pytest.mark.parametrize("dx, dy", DIRECTIONS)
def test_box_iou_and_box_align_fall_strictly_as_a_box_slides_away(dx, dy):
    slides = [score(tuple(v + t * d for v, d in zip(GT_BOX, (dx, dy, dx, dy)))) for t in range(99)]
    assert_falls([terms["box_iou"] for terms in slides])  # until nothing overlaps
    far = [
        score(tuple(v + t * d for v, d in zip(GT_BOX, (dx, dy, dx, dy)))) for t in range(0, 380, 2)
    ]
    assert_falls([terms["box_align"] for terms in far])  # until two diagonals


@pytest.mark.parametrize("grow_x, grow_y", [(1, 1), (1, 0), (0, 1), (-1, -1), (-1, 0), (1, -1)])
def test_box_scale_falls_strictly_as_a_box_changes_size(grow_x, grow_y):
    ratios = [1 + t / 200 for t in range(80)]
    values = []
    for ratio in ratios:
        w, h = 50 * ratio**grow_x, 50 * ratio**grow_y
        values.append(score((150 - w, 150 - h, 150 + w, 150 + h))["box_scale"])
    assert_falls(values)


@pytest.mark.parametrize("dx, dy", DIRECTIONS)
def test_point_dice_and_point_align_fall_strictly_as_a_pair_slides_away(dx, dy):
    def slid(t):
        return score(points=tuple((x + t * dx, y + t * dy) for x, y in GT_POINTS))

    assert_falls(
        [slid(t / 2)["point_dice"] for t in range(119)]
    )  # until the circles, 60 px wide, part
    assert_falls([slid(t)["point_align"] for t in range(0, 380, 2)])  # until two diagonals


def test_point_angle_falls_strictly_as_a_pair_turns():
    def turned(a):
        dx, dy = 30 * math.cos(a), 30 * math.sin(a)
        return score(points=((150 - dx, 150 - dy), (150 + dx, 150 + dy)))["point_angle"]

    assert_falls([turned(math.radians(a)) for a in range(0, 91)])
    assert_falls([turned(math.radians(a)) for a in range(180, 89, -1)])


def test_the_order_of_the_points_never_matters():
    rng = random.Random(1)
    for _ in range(300):
        points = tuple((rng.uniform(50, 250), rng.uniform(50, 250)) for _ in range(2))
        assert score(points=points) == pytest.approx(score(points=points[::-1]), abs=1e-12)


def test_a_gate_lowers_only_its_own_terms():
    outside = score(points=((20, 20), (30, 80)))
    assert all(outside[name] == 1 for name in BOX_TERMS)
    tiny = score(box=(140, 140, 160, 160))
    assert all(tiny[name] == 1 for name in POINT_TERMS)


@pytest.mark.parametrize(
    "gt_box", [(100, 100, 100, 100), (100, 100, 100, 200), (0, 0, 0, 0), GT_BOX]
)
@pytest.mark.parametrize("gt_points", [((150, 150), (150, 150)), ((0, 0), (0, 0)), GT_POINTS])
@pytest.mark.parametrize("official", [False, True])
def test_degenerate_truth_gives_finite_rewards(gt_box, gt_points, official):
    boxes = [
        GT_BOX,
        gt_box,
        (0, 0, 1e-300, 1e-300),
        (-1e308, -1e308, 1e308, 1e308),
        (1, 1, 1e300, 2),
    ]
    pairs = [
        GT_POINTS,
        gt_points,
        ((0, 0), (1e-300, 0)),
        ((-1e308, 0), (1e308, 0)),
        ((1e200, 1), (1, 1e200)),
    ]
    for box in boxes:
        for points in pairs:
            terms = reward_terms(completion(box, points), gt_box, gt_points, official)
            assert all(0 <= value <= 1 for value in terms.values()), terms
    assert 0 <= point_dice(pairs[2], ((0, 0), (0, 0)), official) <= 2


def test_true_points_that_coincide_can_still_be_hit():
    twice = ((150, 150), (150, 150))
    terms = reward_terms(completion(points=twice), GT_BOX, twice)
    gate = 0.925  # inside, but 0 px apart: 0.7 + 0.3 (1 + 0.5) / 2
    assert (terms["point_dice"], terms["point_align"]) == pytest.approx((gate, gate))
    assert terms["point_angle"] == pytest.approx(0.1 * gate)  # no direction to get right


# ---- the frame: pixel thresholds are meant for 840 x 840 ----


def test_thresholds_scale_with_the_frame_so_that_a_scaled_picture_scores_the_same():
    rng = random.Random(2)
    for _ in range(300):
        box = tuple(rng.uniform(0, 300) for _ in range(2)) + tuple(
            rng.uniform(310, 600) for _ in range(2)
        )
        points = tuple((rng.uniform(90, 210), rng.uniform(90, 210)) for _ in range(2))
        at_840 = reward_terms(completion(box, points), GT_BOX, GT_POINTS, frame=(840, 840))
        small = [tuple(v / 8 for v in xy) for xy in (box, *points, GT_BOX, *GT_POINTS)]
        at_105 = reward_terms(
            completion(small[0], small[1:3]), small[3], small[4:], frame=(105, 105)
        )
        assert at_105 == pytest.approx(at_840, abs=1e-4)
        assert at_840 == score(box, points)  # without a frame, pixels are those of the 840 canvas


def test_the_side_of_a_frame_is_the_geometric_mean_of_width_and_height():
    for points, gate in (
        (((120, 150), (124.9, 150)), 0.925),
        (((120, 150), (125.1, 150)), 1),
    ):  # 10 px are 5 px
        terms = reward_terms(completion(points=points), GT_BOX, GT_POINTS, frame=(210, 840))
        assert terms["point_angle"] == pytest.approx(gate)
    terms = reward_terms(completion((105, 100, 205, 200)), GT_BOX, GT_POINTS, frame=(210, 840))
    assert terms["base_box_l1"] == 1
    assert (
        reward_terms(completion((110.1, 100, 210.1, 200)), GT_BOX, GT_POINTS, frame=(210, 840))[
            "base_box_l1"
        ]
        == 0
    )
    far = ((120, 150), (180, 200.1))  # 25.05 px off on average, where 100 px are 50
    assert (
        reward_terms(completion((0, 0, 300, 300), far), GT_BOX, GT_POINTS, frame=(210, 840))[
            "base_points"
        ]
        == 1
    )
    far = ((120, 200.1), (180, 200.1))
    assert (
        reward_terms(completion((0, 0, 300, 300), far), GT_BOX, GT_POINTS, frame=(210, 840))[
            "base_points"
        ]
        == 0
    )


def test_official_pixels_are_never_scaled():
    close = completion(points=((120, 150), (125, 150)))
    assert reward_terms(close, GT_BOX, GT_POINTS, True, (84, 84)) == reward_terms(
        close, GT_BOX, GT_POINTS, True
    )


@pytest.mark.parametrize("apart", [0, 0.3, 1, 2, 5, 9, 30])
@pytest.mark.parametrize("side", [56, 112, 252, 840])
def test_in_its_frame_the_truth_is_never_beaten_by_pushing_points_apart(apart, side):
    box, truth = (10, 10, 50, 40), ((20, 25), (20 + apart, 25))
    for mode in ("soft", "hard", "pdice", "base"):

        def earned(points):
            return total_reward(
                reward_terms(completion(box, points), box, truth, frame=(side, side)), mode
            )

        best = earned(truth)
        assert best == reward_formula(mode)[1] or (
            apart == 0 and mode == "hard"
        )  # one point has no direction
        for push in (0.01, 0.1, 0.5, 1, 1.34, 2, 4, 6, 9, 10.01):
            assert earned(((20 - push / 2, 25), (20 + apart + push / 2, 25))) <= best
            assert earned(((20, 25), (20 + apart + push, 25))) <= best
            assert earned(((20, 25 - push), (20 + apart, 25 + push))) <= best


# ---- any number of key points ----


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(rewards, "KEY_POINTS", 3)
    monkeypatch.setattr(rewards, "KEYS", ("bbox", "points_1", "points_2", "points_3"))
    return (120, 150), (180, 150), (150, 130)


def test_three_points_are_written_read_and_scored_in_any_order(three):
    text = "<think>t</think>" + write_answer(GT_BOX, three)
    assert parse_answer(text).points == three
    assert reward_terms(text, GT_BOX, three)["point_dice"] == 1
    assert reward_formula("hard")[1] == 8 == total_reward(reward_terms(text, GT_BOX, three), "hard")
    moved = (150, 160), (125, 150), (180, 155)
    first = reward_terms("<think>t</think>" + write_answer(GT_BOX, moved), GT_BOX, three)
    for order in ((0, 2, 1), (1, 0, 2), (2, 1, 0)):
        other = reward_terms(
            "<think>t</think>" + write_answer(GT_BOX, [moved[i] for i in order]), GT_BOX, three
        )
        assert other == pytest.approx(first, abs=1e-12)
    # (150, 160) from (150, 130), (125, 150) from (120, 150), (180, 155) from (180, 150): (30 + 5 + 5) / 2 / 3
    assert first["point_align"] == pytest.approx(smooth_exp(20 / 3 / 141.421356, 3, 1, 2))


def test_a_missing_third_point_is_a_missing_key(three):
    assert parse_answer("<think>t</think>" + completion()).problem == "a key is missing"


# ---- the parser ----

GOOD = "'bbox': [1, 2, 30, 40], 'points_1': [5, 6], 'points_2': [7.5, -8]"


@pytest.mark.parametrize(
    "body",
    [
        "{%s}" % GOOD,
        "{%s}" % GOOD.replace("'", '"'),
        "\n\t {%s} \r\n" % GOOD,
        "```json\n{%s}\n```" % GOOD,
        " ```\n{%s}``` " % GOOD,
        "{%s, 'note': 'extra key'}" % GOOD,
        '{%s, "note": "the patient\'s left"}' % GOOD.replace("'", '"'),
        "{%s}" % GOOD.replace("30", "3e1"),
    ],
)
def test_accepted_answers(body):
    read = answer(body)
    assert read.problem == ""
    assert read.bbox == (1, 2, 30, 40) and read.points == ((5, 6), (7.5, -8))


@pytest.mark.parametrize(
    "bad",
    [
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        "null",
        "'3'",
        "[3]",
        "{}",
        "1e999",
        "-1e999",
        "9" * 10_000,
        "-" + "9" * 5_000,
    ],
)
def test_a_bad_number_makes_the_box_or_the_points_malformed_but_not_both(bad):
    read = answer("{'bbox': [1, 2, %s, 40], 'points_1': [5, 6], 'points_2': [7, 8]}" % bad)
    assert read.bbox is None and read.points == ((5, 6), (7, 8)) and read.problem == "box malformed"
    read = answer("{'bbox': [1, 2, 30, 40], 'points_1': [5, 6], 'points_2': [7, %s]}" % bad)
    assert (
        read.bbox == (1, 2, 30, 40) and read.points is None and read.problem == "points malformed"
    )


@pytest.mark.parametrize(
    "text, think, think_format, problem",
    [
        ("", None, 0, "no answer block"),
        ("I cannot tell.", None, 0, "no answer block"),
        ("<think>a</think>", "a", 1, "no answer block"),
        ("<think></think><answer></answer>", "", 0.2, "answer is not a JSON object"),
        (
            "<think> \n\t</think><answer>not json</answer>",
            " \n\t",
            0.2,
            "answer is not a JSON object",
        ),
        ("<think>a</think><answer>[1, 2, 3]</answer>", "a", 1, "answer is not a JSON object"),
        ("<think>a</think><answer>3</answer>", "a", 1, "answer is not a JSON object"),
        (
            "<think>a</think><answer>{'bbox': [1, 2, 3, 4]</answer>",
            "a",
            1,
            "answer is not a JSON object",
        ),
        (
            "<think>a</think><answer>" + "[" * 100_000 + "</answer>",
            "a",
            1,
            "answer is not a JSON object",
        ),
        (
            "<think>a</think><answer>" + '{"a":' * 100_000 + "</answer>",
            "a",
            1,
            "answer is not a JSON object",
        ),
        ("<think>a</think><answer>{}</answer>", "a", 1, "a key is missing"),
        ("<think>a</think><answer>{'bbox': [1, 2, 3, 4]}</answer>", "a", 1, "a key is missing"),
        (
            "<think>a</think><answer>{'bbox': 'x', 'points_1': 'y', 'points_2': 3}</answer>",
            "a",
            1,
            "box and points malformed",
        ),
        (
            "<think>a</think><answer>{'bbox': [1, 2, 3], 'points_1': [1, 2], 'points_2': [3, 4]}</answer>",
            "a",
            1,
            "box malformed",
        ),
        (
            "<think>a</think><answer>{'bbox': [1, 2, 3, 4], 'points_1': [1, 2], 'points_2': [3]}</answer>",
            "a",
            1,
            "points malformed",
        ),
        ("<think>unclosed <answer>{%s}</answer>" % GOOD, None, 0, ""),
        ("<answer>{%s}</answer>" % GOOD, None, 0, ""),
        ("<answer>{%s}</answer><think>too late</think>" % GOOD, "too late", 1, "no answer block"),
        ("x <think>a</think> y <answer>{%s}</answer> z" % GOOD, "a", 1, ""),
        ("<think>a</think><answer>{%s}" % GOOD, "a", 1, "no answer block"),
    ],
)
def test_graded_formats(text, think, think_format, problem):
    read = parse_answer(text)
    terms = reward_terms(text, GT_BOX, GT_POINTS)
    assert (read.think, read.problem) == (think, problem)
    assert terms["think_format"] == think_format
    assert terms["answer_format"] == ANSWER_FORMAT[problem]
    assert all((terms[name] > 0) == (read.bbox is not None) for name in BOX_TERMS)
    assert all((terms[name] > 0) == (read.points is not None) for name in POINT_TERMS)


def test_base_think_wants_the_two_blocks_and_nothing_else():
    think, tail = completion().split("\n")
    for text in (
        completion(),
        completion(between=""),
        completion(between=" \n "),
        completion(think=""),
    ):
        assert reward_terms(text, GT_BOX, GT_POINTS)["base_think"] == 1
    for text in (
        "x" + completion(),
        completion() + "x",
        completion(between="so:"),
        think,
        tail,
        tail + think,
    ):
        assert reward_terms(text, GT_BOX, GT_POINTS)["base_think"] == 0


def test_what_is_written_is_what_is_read_and_a_prompt_can_show_it():
    assert (
        write_answer((1, 2, 30, 40), ((5, 6), (7.5, 8)))
        == '<answer>{"bbox": [1, 2, 30, 40], "points_1": [5, 6], "points_2": [7.5, 8]}</answer>'
    )
    assert parse_answer(write_answer((1, 2, 30, 40), ((5, 6), (7.5, 8)))).points == (
        (5, 6),
        (7.5, 8),
    )
    assert '"points_2": [x, y]}' in write_answer(("x1", "y1", "x2", "y2"), [("x", "y")] * 2)
    with pytest.raises(ValueError):
        write_answer((1, 2, 3, 4), ((1, 2),))


FRAGMENTS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<answer",
    "think>",
    "<think>a</think>",
    "<|image_pad|>",
    "{",
    "}",
    "[",
    "]",
    "'",
    '"',
    ":",
    ",",
    "#",
    "\\",
    "\n",
    " ",
    "```json",
    "```",
    "'bbox': ",
    '"bbox": ',
    "'points_1': ",
    '"points_1": ',
    "'points_2': ",
    '"points_2": ',
    "[1, 2]",
    "[100, 100, 200, 200]",
    "[120, 150]",
    "[180, 150]",
    "[4, 3, 2, 1]",
    "[[1, 2]]",
    "[1e308, 5]",
    "[-1e308, -1e308, 1e308, 1e308]",
    "[0, 0, 1e-320, 1e-320]",
    '{"bbox": {"bbox": []}}',
    "[" * 70,
    "NaN",
    "Infinity",
    "-Infinity",
    "true",
    "null",
    "1e999",
    "9" * 400,
    "9" * 10_000,
    "-0.0",
    "5e-324",
    "{'a':" * 70,
    "1_0",
    "0x10",
    "\\u0000",
    "\x00",
    "\ud800",
    "é",
    "象",
    "\u2028",
    "\ufeff",
    "{%s}" % GOOD,
    "<answer>{%s}</answer>" % GOOD,
]


def hostile_texts(count, seed=0):
    rng = random.Random(seed)
    odd = ["0", "2.5", "-7", "1e17", "1e200", "1e308", "-1e308", "5e-324", "NaN", "1e999", "true"]
    for index in range(count):
        if index % 2:
            yield "".join(rng.choices(FRAGMENTS, k=rng.randrange(14)))
            continue
        # nearly right, so that the formulas are reached with numbers of every size
        numbers = [
            rng.choice(odd) if rng.random() < 0.3 else str(rng.randrange(300)) for _ in range(8)
        ]
        body = '{"bbox": [%s, %s, %s, %s], "points_1": [%s, %s], "points_2": [%s, %s]}' % tuple(
            numbers
        )
        text = f"<think>{rng.choice(FRAGMENTS)}</think><answer>{body}</answer>"
        cut = rng.randrange(len(text))
        yield (
            text
            if index % 4
            else text[:cut] + rng.choice(FRAGMENTS) + text[cut + rng.randrange(3) :]
        )


def test_thousands_of_hostile_texts_never_raise_and_stay_within_0_and_1():
    read = 0
    for index, text in enumerate(hostile_texts(25_000)):
        terms = reward_terms(text, GT_BOX, GT_POINTS, official=index % 3 == 0)
        read += terms["answer_format"] == 1
        assert terms.keys() >= ALL_TERMS
        assert all(0 <= value <= 1 for value in terms.values()), (text, terms)
    assert read > 1_250  # many of them got as far as the formulas


@pytest.mark.parametrize(
    "unit",
    [
        "<think>",
        "<think></think>",
        "</think><think>",
        "<answer>",
        "<think><answer>",
        "</answer>",
        "<",
        "```",
        " ",
        "\n",
        "{",
        "{}",
        "[",
        "[]",
        "'",
        '"',
        "\\",
        "9",
        "0.5",
        "1e9",
        ",",
        "{'bbox': ",
    ],
)
@pytest.mark.parametrize(
    "frame",
    [
        "%s",
        "<think>a</think><answer>%s</answer>",
        '<answer>{"bbox": [%s, 1, 2, 3], "points_1": "%s"}</answer>',
    ],
)
def test_megabytes_are_read_in_linear_time(unit, frame):
    text = frame.replace("%s", unit * (1_000_000 // len(unit)))
    start = time.perf_counter()
    for official in (False, True):
        reward_terms(text, GT_BOX, GT_POINTS, official)
    assert time.perf_counter() - start < 2  # some 0.05 s; anything quadratic would take hours


@given(st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join))
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_without_raising(text):
    for official in (False, True):
        read = parse_answer(text, official)
        assert read.problem in ANSWER_FORMAT
        assert all(0 <= v <= 1 for v in reward_terms(text, GT_BOX, GT_POINTS, official).values())


FINITE = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.tuples(FINITE, FINITE)


@given(st.tuples(FINITE, FINITE, FINITE, FINITE), st.tuples(POINTS, POINTS))
@settings(max_examples=300, deadline=None)
def test_what_is_said_is_what_is_read(box, points):
    read = parse_answer(completion(box, points).replace('"', "'"))
    assert read.points == points
    assert read.bbox == (box if box[0] < box[2] and box[1] < box[3] else None)
    for official in (False, True):
        assert all(0 <= v <= 1 for v in score(box, points, official).values())


# ---- totals ----


def test_a_weight_multiplies_its_term_and_switches_on_one_outside_the_mode():
    terms = {name: 0.5 for name in ALL_TERMS} | {"mask_dice": 0.25}
    assert total_reward(terms, "soft") == 2
    assert total_reward(terms, "soft", {"box_iou": 3}) == 3
    assert total_reward(terms, "soft", {"box_iou": 0}) == 1.5
    assert total_reward(terms, "soft", {"mask_dice": 2}) == 2.5
    assert total_reward(terms, "iou", {"box_align": 1, "mask_dice": 1}) == 2.25


def test_an_unknown_term_or_mode_is_refused_by_name():
    terms = score()
    with pytest.raises(ValueError, match="mask_dice.*known: think_format, .*base_points"):
        total_reward(terms, "soft", {"mask_dice": 1})
    with pytest.raises(ValueError, match="box_iuo"):
        total_reward(terms, "soft", {"box_iuo": 1})
    with pytest.raises(ValueError, match="sfot.*known: soft, hard"):
        total_reward(terms, "sfot")


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(ValueError, match="box_iou.*finite"):
        total_reward(score(), "soft", {"box_iou": weight})
    with pytest.raises(ValueError, match="box_iou.*finite"):
        reward_formula("soft", {"box_iou": weight})


def test_the_formula_says_what_is_summed_and_its_maximum():
    assert reward_formula("soft") == ("think_format + answer_format + box_iou + point_dice", 4)
    assert reward_formula("soft", {"box_iou": 3}) == (
        "think_format + answer_format + 3 box_iou + point_dice",
        6,
    )
    assert reward_formula("iou", {"think_format": 0, "mask_dice": 0.5}) == (
        "answer_format + box_iou + 0.5 mask_dice",
        2.5,
    )
    assert reward_formula("iou", {"point_dice": -0.5}) == (
        "think_format + answer_format + box_iou - 0.5 point_dice",
        3,
    )
    for mode, most in (("soft", 4), ("hard", 8), ("base", 5), ("iou", 3), ("pdice", 3)):
        assert reward_formula(mode)[1] == most
    with pytest.raises(ValueError, match="box_iuo"):
        reward_formula("soft", {"box_iuo": 1})


@pytest.mark.parametrize(
    "after, line, without",
    [
        (
            '"answer_format": ANSWER_FORMAT',
            '"mine": float("round" in (answer.think or "")),',
            "<think>flat</think>",
        ),
        (
            '"box_iou": smooth_log',
            '"mine": smooth_exp(math.dist(box[:2], gt_box[:2]) / 99, k=3, c=1, v_max=2),',
            "",
        ),
        (
            '"point_dice": smooth_log',
            '"mine": smooth_log(cosine),',
            completion(points=((1, 2), (3, "4"))),
        ),
    ],
)
def test_a_new_term_is_one_line(monkeypatch, after, line, without):
    before, source = score(), Path(rewards.__file__).read_text().splitlines()
    (at,) = [number for number, text in enumerate(source) if text.strip().startswith(after)]
    source.insert(at + 1, line)  # the one line
    exec("\n".join(source), changed := {"__name__": "changed"})
    for name in ("reward_terms", "total_reward", "reward_formula", "MODES"):
        monkeypatch.setitem(globals(), name, changed[name])
    assert score() == before | {"mine": 1}
    assert reward_terms(without, GT_BOX, GT_POINTS)["mine"] == 0  # where there is nothing to read
    assert total_reward(score(), "hard") == 8
    assert total_reward(score(), "soft", {"mine": 0.5}) == 4.5
    assert reward_formula("soft", {"mine": 0.5})[1] == 4.5
    monkeypatch.setitem(MODES, "new", (*MODES["iou"], "mine"))
    assert total_reward(score(), "new") == 4
    test_official_reproduces_every_released_number()
