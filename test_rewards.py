"""The specification of rewards.py: hand numbers, released numbers, invariants, hostile completions.

    .venv/bin/python -m pytest -q test_rewards.py

What the released code does differently is in tests/test_official_rewards.py.
"""

import json
import math
import random
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    ANSWER_FORMAT_SCORES,
    KEYS,
    MODES,
    PIXEL_TERMS,
    Answer,
    answer_fields,
    box_iou,
    circle,
    lens_area,
    line_cosine,
    parse_answer,
    parse_coefficients,
    point_dice,
    point_dice_published,
    reward_formula,
    reward_terms,
    scale_error,
    smooth_exp,
    smooth_log,
    term_names,
    total_reward,
    write_answer,
)

GT_BOX = (100, 100, 200, 200)  # 100 px square, diagonal 141.42
GT_POINTS = ((120, 150), (180, 150))  # 60 px apart
BOX_TERMS = ("box_iou", "box_align", "box_scale")
POINT_TERMS = ("point_dice", "point_align", "point_angle")
BASE_TERMS = ("base_think", "base_answer", "base_iou", "base_box_l1", "base_points")
ALL_TERMS = {"think_format", "answer_format", *BOX_TERMS, *POINT_TERMS, *BASE_TERMS}
GOLDEN_FILE = Path(__file__).parent / "tests/golden/golden_rewards.jsonl"
GOLDEN = [json.loads(line) for line in GOLDEN_FILE.read_text().splitlines()]
GOLDEN_NAMES = {  # ours: theirs
    "think_format": "format_think",
    "answer_format": "format_seg",
    "box_iou": "bbox_iou",
    "box_align": "bbox_align",
    "box_scale": "bbox_scale",
    "point_dice": "points_dice",
    "point_align": "points_align",
    "point_angle": "points_angle",
}
GOLDEN_BASE_NAMES = {
    "base_think": "thinking",
    "base_answer": "segment",
    "base_iou": "iou",
    "base_box_l1": "bbox_l1",
    "base_points": "points_l1",
}


def completion(box=GT_BOX, points=GT_POINTS, think="round, dark", between="\n"):
    fields = {"bbox": list(box), "points_1": list(points[0]), "points_2": list(points[1])}
    return f"<think>{think}</think>{between}<answer>{json.dumps(fields)}</answer>"


def score(box=GT_BOX, points=GT_POINTS, size=None):
    return reward_terms(completion(box, points), GT_BOX, GT_POINTS, size)


def answer(body):
    return parse_answer(f"<think>t</think><answer>{body}</answer>")


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
    over_union = 2 * 1.228370 / (2 * math.pi - 1.228370)
    assert point_dice_published(p, g) == pytest.approx(over_union, abs=1e-5)
    # radius 1 within radius 3: I = π, A + A* = 10π, U = 9π
    p, g = ((0, 0), (2, 0)), ((-2, 0), (4, 0))
    assert point_dice(p, g) == pytest.approx(2 / 10)
    assert point_dice_published(p, g) == pytest.approx(2 / 9, abs=1e-6)
    apart = ((9, 0), (11, 0))
    assert point_dice(p, apart) == 0 == point_dice_published(p, apart)
    # radii 3 and 4 at 5: a right angle at the crossing, kite 12, α = atan(4/3), β = atan(3/4)
    lens = 9 * math.atan2(4, 3) + 16 * math.atan2(3, 4) - 12
    dice = point_dice(((-3, 0), (3, 0)), ((1, 0), (9, 0)))
    assert dice == pytest.approx(2 * lens / (25 * math.pi))


def test_circles_and_lenses_by_hand():
    assert circle(((0, 0), (6, 8))) == ((3, 4), 5)
    assert circle(((1, 2), (1, 2))) == ((1, 2), 0)
    assert lens_area(1, 1, 2) == 0  # they touch
    assert lens_area(1, 3, 2) == pytest.approx(math.pi)  # the smaller touches from inside
    assert lens_area(3, 1, 0.5) == pytest.approx(math.pi)
    assert lens_area(2, 2, 0) == pytest.approx(4 * math.pi)
    assert lens_area(0, 2, 1) == 0  # a point has no area
    right_angle = 9 * math.atan2(4, 3) + 16 * math.atan2(3, 4) - 12
    assert lens_area(3, 4, 5) == pytest.approx(right_angle)
    assert lens_area(4, 3, 5) == pytest.approx(right_angle)


def test_a_lens_has_the_area_that_random_points_find():
    rng = random.Random(0)
    r, s, d = 2.0, 1.5, 1.8
    inside = 0
    for _ in range(40_000):
        x = rng.uniform(-2, 2)
        y = rng.uniform(-2, 2)
        inside += math.hypot(x, y) <= r and math.hypot(x - d, y) <= s
    assert lens_area(r, s, d) == pytest.approx(16 * inside / 40_000, rel=0.03)


def test_angles_and_scales_by_hand():
    along = ((0, 0), (10, 0))
    assert line_cosine(along, ((3, 3), (4, 4))) == pytest.approx(math.sqrt(0.5))
    assert line_cosine(along, ((9, 5), (2, 5))) == pytest.approx(1)  # a line has no sense
    assert line_cosine(along, ((1, 0), (1, 7))) == pytest.approx(0)
    assert line_cosine(along, ((1, 1), (1, 1))) == 0 == line_cosine(((1, 1), (1, 1)), along)
    # A = 8, A* = 2, r = 2, r* = 2: only the areas differ
    assert scale_error((0, 0, 4, 2), (5, 5, 7, 6)) == pytest.approx(math.log(4))
    # A = A* = 4, r = 4, r* = 1: only the shapes differ
    assert scale_error((0, 0, 4, 1), (0, 0, 2, 2)) == pytest.approx(math.log(4))


def test_box_terms_of_a_box_slid_by_ten_pixels_by_hand():
    terms = score(box=(110, 100, 210, 200))  # both true points inside, same area: gate 1
    # I = 9,000 and U = 11,000
    iou_term = 0.9 * math.log(3 * 9 / 11 + 1) / math.log(4) + 0.1
    assert terms["box_iou"] == pytest.approx(iou_term)
    # edges off by (10 + 0 + 10 + 0) / 4
    assert terms["box_align"] == pytest.approx(smooth_exp(5 / 141.421356, 3, 1, 2))
    assert terms["box_scale"] == 1


def test_box_terms_of_a_half_wide_box_by_hand():
    # it misses one true point, and its area is exactly half: V1 = V2 = 0.5
    terms = score(box=(100, 100, 150, 200))
    gate = 0.85
    assert terms["box_iou"] == pytest.approx(gate * smooth_log(0.5))
    assert terms["box_align"] == pytest.approx(gate * smooth_exp(12.5 / 141.421356, 3, 1, 2))
    # A and r both halve: d = √2 ln 2 = 0.980
    scale = math.sqrt(2) * math.log(2)
    assert terms["box_scale"] == pytest.approx(gate * smooth_exp(scale, 3, 0.5, 1))


def test_point_terms_of_a_turned_pair_by_hand():
    # same centre, turned by 90°, inside, 60 px apart: gate 1
    terms = score(points=((150, 120), (150, 180)))
    assert terms["point_dice"] == 1
    # (30 + 30) / 2 for each point
    assert terms["point_align"] == pytest.approx(smooth_exp(30 / 141.421356, 3, 1, 2))
    assert terms["point_angle"] == pytest.approx(0.1)


def test_point_terms_of_a_pair_across_the_edge_by_hand():
    # one point outside, 10 px apart: V1 = V2 = 0.5
    terms = score(points=((195, 150), (205, 150)))
    gate = 0.85
    assert terms["point_angle"] == pytest.approx(gate)
    # circles of radius 30 at 150 and of radius 5 at 200 are apart
    assert terms["point_dice"] == pytest.approx(0.1 * gate)
    # 195 from 120 and 205 from 180: (75/2 + 25/2) / 2 = 25
    assert terms["point_align"] == pytest.approx(gate * smooth_exp(25 / 141.421356, 3, 1, 2))


def test_base_terms_by_hand():
    def base(box, points=GT_POINTS):
        terms = score(box, points)
        return tuple(terms[name] for name in BASE_TERMS)

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


# ---- the released numbers, where ours have to agree ----


def test_ours_and_released_agree_to_rounding_where_no_difference_applies():
    agreeing = ("think_format", "box_iou", "box_align", "point_align", "point_angle")
    compared = 0
    for case in GOLDEN:
        if "```" in case["completion"]:
            continue
        terms = reward_terms(case["completion"], case["bbox"], case["points"])
        for name in agreeing:
            released = case["hard"][GOLDEN_NAMES[name]]
            assert terms[name] == pytest.approx(released, abs=6e-5), (name, case)
        assert terms["base_think"] == case["base"]["thinking"]
        compared += 1
    assert compared > 250


def test_plain_metrics_equal_the_released_evaluation():
    compared = 0
    for case in GOLDEN:
        read = parse_answer(case["completion"])
        if case["eval"] is None or read.problem:
            continue
        assert box_iou(read.bbox, case["bbox"]) == pytest.approx(case["eval"]["iou"], abs=1e-6)
        published = point_dice_published(read.points, case["points"])
        assert published == pytest.approx(case["eval"]["pdice"], abs=1e-12)
        dice = point_dice(read.points, case["points"])  # 2I/U = 2D / (2 - D)
        assert published == pytest.approx(2 * dice / (2 - dice), abs=1e-4)
        compared += 1
    assert compared > 200


# ---- invariants ----


@pytest.mark.parametrize(
    "mode, most", [("soft", 4), ("hard", 8), ("base", 5), ("iou", 3), ("pdice", 3)]
)
def test_a_perfect_answer_scores_exactly_the_most(mode, most):
    rng = random.Random(0)
    for _ in range(500):  # odd sizes and fractions, so that exactness is no accident
        x = rng.uniform(0, 500)
        y = rng.uniform(0, 500)
        w = rng.uniform(20, 400)
        h = rng.uniform(20, 400)
        box = (x, y, x + w, y + h)
        points = ((x + w / 7, y + h / 3), (x + w / 7 + 0.6 * w, y + h / 2))
        for pair in (points, points[::-1]):
            assert total_reward(reward_terms(completion(box, pair), box, points), mode) == most


def test_every_term_is_always_there():
    for text in ("", completion(), "<answer>{}</answer>", "<think>"):
        terms = reward_terms(text, GT_BOX, GT_POINTS)
        assert terms.keys() >= ALL_TERMS
        assert (*terms, *PIXEL_TERMS) == term_names()
    for names in MODES.values():
        assert set(names) <= ALL_TERMS


def assert_falls(values):
    assert all(later < earlier for earlier, later in pairwise(values)), values


DIRECTIONS = [(math.cos(a), math.sin(a)) for a in (0.0, 0.3, math.pi / 2, 2.0, math.pi, 4.0, 5.5)]


def slid_box(dx, dy, t):
    x1, y1, x2, y2 = GT_BOX
    return score(box=(x1 + t * dx, y1 + t * dy, x2 + t * dx, y2 + t * dy))


@pytest.mark.parametrize("dx, dy", DIRECTIONS)
def test_box_iou_and_box_align_fall_strictly_as_a_box_slides_away(dx, dy):
    # until nothing overlaps
    assert_falls([slid_box(dx, dy, t)["box_iou"] for t in range(99)])
    # until two diagonals
    assert_falls([slid_box(dx, dy, t)["box_align"] for t in range(0, 380, 2)])


@pytest.mark.parametrize("grow_x, grow_y", [(1, 1), (1, 0), (0, 1), (-1, -1), (-1, 0), (1, -1)])
def test_box_scale_falls_strictly_as_a_box_changes_size(grow_x, grow_y):
    ratios = [1 + t / 200 for t in range(80)]
    values = []
    for ratio in ratios:
        w = 50 * ratio**grow_x
        h = 50 * ratio**grow_y
        values.append(score((150 - w, 150 - h, 150 + w, 150 + h))["box_scale"])
    assert_falls(values)


@pytest.mark.parametrize("dx, dy", DIRECTIONS)
def test_point_dice_and_point_align_fall_strictly_as_a_pair_slides_away(dx, dy):
    def slid(t):
        return score(points=tuple((x + t * dx, y + t * dy) for x, y in GT_POINTS))

    # until the circles, 60 px wide, part
    assert_falls([slid(t / 2)["point_dice"] for t in range(119)])
    # until two diagonals
    assert_falls([slid(t)["point_align"] for t in range(0, 380, 2)])


def test_point_angle_falls_strictly_as_a_pair_turns():
    def turned(a):
        dx = 30 * math.cos(a)
        dy = 30 * math.sin(a)
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


DEGENERATE_BOXES = ((100, 100, 100, 100), (100, 100, 100, 200), (0, 0, 0, 0), GT_BOX)
DEGENERATE_POINTS = (((150, 150), (150, 150)), ((0, 0), (0, 0)), GT_POINTS)
EXTREME_BOXES = (
    GT_BOX,
    (0, 0, 1e-300, 1e-300),
    (-1e308, -1e308, 1e308, 1e308),
    (1, 1, 1e300, 2),
)
EXTREME_POINTS = (
    GT_POINTS,
    ((0, 0), (1e-300, 0)),
    ((-1e308, 0), (1e308, 0)),
    ((1e200, 1), (1, 1e200)),
)


@pytest.mark.parametrize("gt_box", DEGENERATE_BOXES)
@pytest.mark.parametrize("gt_points", DEGENERATE_POINTS)
def test_degenerate_truth_gives_finite_rewards(gt_box, gt_points):
    for box in (*EXTREME_BOXES, gt_box):
        for points in (*EXTREME_POINTS, gt_points):
            terms = reward_terms(completion(box, points), gt_box, gt_points)
            assert all(0 <= value <= 1 for value in terms.values()), terms
    tiny = ((0, 0), (1e-300, 0))
    assert 0 <= point_dice(tiny, ((0, 0), (0, 0))) <= 1
    assert 0 <= point_dice_published(tiny, ((0, 0), (0, 0))) <= 2


def test_true_points_that_coincide_can_still_be_hit():
    twice = ((150, 150), (150, 150))
    terms = reward_terms(completion(points=twice), GT_BOX, twice)
    gate = 0.925  # inside, but 0 px apart: 0.7 + 0.3 (1 + 0.5) / 2
    assert (terms["point_dice"], terms["point_align"]) == pytest.approx((gate, gate))
    assert terms["point_angle"] == pytest.approx(0.1 * gate)  # no direction to get right


# ---- the size of the image: pixel thresholds are meant for 840 x 840 ----


def test_thresholds_scale_with_the_image_so_that_a_scaled_picture_scores_the_same():
    rng = random.Random(2)
    for _ in range(300):
        x1 = rng.uniform(0, 300)
        y1 = rng.uniform(0, 300)
        box = (x1, y1, rng.uniform(310, 600), rng.uniform(310, 600))
        points = tuple((rng.uniform(90, 210), rng.uniform(90, 210)) for _ in range(2))
        at_840 = score(box, points, size=(840, 840))

        def eighth(values):
            return tuple(value / 8 for value in values)

        at_105 = reward_terms(
            completion(eighth(box), [eighth(point) for point in points]),
            eighth(GT_BOX),
            tuple(eighth(point) for point in GT_POINTS),
            size=(105, 105),
        )
        assert at_105 == pytest.approx(at_840, abs=1e-4)
        assert at_840 == score(box, points)  # without a size, pixels are those of the canvas


def test_the_side_of_an_image_is_the_geometric_mean_of_width_and_height():
    size = (210, 840)  # sqrt(210 * 840) = 420: lengths are half of those of the canvas
    # 10 px are 5 px
    close = score(points=((120, 150), (124.9, 150)), size=size)
    assert close["point_angle"] == pytest.approx(0.925)
    apart = score(points=((120, 150), (125.1, 150)), size=size)
    assert apart["point_angle"] == pytest.approx(1)
    assert score((105, 100, 205, 200), size=size)["base_box_l1"] == 1
    assert score((110.1, 100, 210.1, 200), size=size)["base_box_l1"] == 0
    # 100 px are 50 px: one point 50.1 px off is 25.05 px on average, and two are 50.1 px
    large = (0, 0, 300, 300)
    assert score(large, ((120, 150), (180, 200.1)), size=size)["base_points"] == 1
    assert score(large, ((120, 200.1), (180, 200.1)), size=size)["base_points"] == 0


@pytest.mark.parametrize("apart", [0, 0.3, 1, 2, 5, 9, 30])
@pytest.mark.parametrize("side", [56, 112, 252, 840])
def test_in_its_image_the_truth_is_never_beaten_by_pushing_points_apart(apart, side):
    box = (10, 10, 50, 40)
    truth = ((20, 25), (20 + apart, 25))
    for mode in ("soft", "hard", "pdice", "base"):

        def earned(points, mode=mode):
            terms = reward_terms(completion(box, points), box, truth, size=(side, side))
            return total_reward(terms, mode)

        best = earned(truth)
        if apart == 0 and mode == "hard":
            assert best < reward_formula(mode)[1]  # one point has no direction
        else:
            assert best == reward_formula(mode)[1]
        for push in (0.01, 0.1, 0.5, 1, 1.34, 2, 4, 6, 9, 10.01):
            assert earned(((20 - push / 2, 25), (20 + apart + push / 2, 25))) <= best
            assert earned(((20, 25), (20 + apart + push, 25))) <= best
            assert earned(((20, 25 - push), (20 + apart, 25 + push))) <= best


# ---- the parser ----

GOOD = "{'bbox': [1, 2, 30, 40], 'points_1': [5, 6], 'points_2': [7.5, -8]}"
GOOD_IN_DOUBLE_QUOTES = GOOD.replace("'", '"')


ACCEPTED = [
    GOOD,
    GOOD_IN_DOUBLE_QUOTES,
    f"\n\t {GOOD} \r\n",
    f"```json\n{GOOD}\n```",
    f" ```\n{GOOD}``` ",
    GOOD.removesuffix("}") + ", 'note': 'extra key'}",
    GOOD_IN_DOUBLE_QUOTES.removesuffix("}") + ', "note": "the patient\'s left"}',
    GOOD.replace("30", "3e1"),
]


@pytest.mark.parametrize("body", ACCEPTED)
def test_accepted_answers(body):
    read = answer(body)
    assert read.problem == ""
    assert read.bbox == (1, 2, 30, 40) and read.points == ((5, 6), (7.5, -8))


BAD_NUMBERS = [
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
]


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_a_bad_number_makes_the_box_or_the_points_malformed_but_not_both(bad):
    read = answer(GOOD.replace("30", bad))
    assert read.bbox is None
    assert read.points == ((5, 6), (7.5, -8))
    assert read.problem == "box malformed"
    read = answer(GOOD.replace("7.5", bad))
    assert read.bbox == (1, 2, 30, 40)
    assert read.points is None
    assert read.problem == "points malformed"


def test_an_inverted_or_empty_box_is_malformed():
    for box in ((200, 100, 100, 200), (100, 200, 200, 100), (100, 100, 100, 200)):
        terms = score(box)
        assert terms["answer_format"] == 0.6
        assert not any(terms[name] for name in BOX_TERMS)
        assert terms["point_dice"] == 1


def test_the_answer_is_looked_for_after_the_thoughts():
    draft = write_answer((0, 0, 50, 50), GT_POINTS)
    assert parse_answer(completion(think=draft)).bbox == GT_BOX
    assert parse_answer(f"<think>{draft}</think>").problem == "no answer block"


def test_doubled_think_tags_lose_no_answer_and_are_not_two_clean_blocks():
    doubled = completion(think="<think>round</think>")
    terms = reward_terms(doubled, GT_BOX, GT_POINTS)
    assert parse_answer(doubled).bbox == GT_BOX
    assert terms["think_format"] == terms["answer_format"] == 1
    assert terms["base_think"] == 0
    assert reward_terms(completion(think="round"), GT_BOX, GT_POINTS)["base_think"] == 1


def test_a_whole_completion_in_the_thoughts_answers_with_its_own_box():
    """Why a trace with tags must never become a target: the first </think> ends the thoughts."""
    draft = (0, 0, 50, 50)
    trace = completion(draft, between="")
    assert parse_answer(completion(think=trace)).bbox == draft
    assert total_reward(reward_terms(completion(think=trace), GT_BOX, GT_POINTS), "soft") < 4


def test_the_fields_of_an_answer_are_there_for_other_formats():
    assert answer_fields("no") == (None, None, None)
    assert answer_fields("<think>a</think><answer>b</answer>") == ("a", "b", None)
    body = "{'boxes': [1]}"
    assert answer_fields(f"<answer>{body}</answer>") == (None, body, {"boxes": [1.0]})


def test_the_segmenter_draws_one_region():
    assert answer(GOOD).regions == (((1, 2, 30, 40), ((5, 6), (7.5, -8))),)
    assert Answer(None, None, None, "no answer block").regions == ((None, None),)


NOT_AN_OBJECT = "answer is not a JSON object"
GRADED = [  # text, think, think_format, problem
    ("", None, 0, "no answer block"),
    ("I cannot tell.", None, 0, "no answer block"),
    ("<think>a</think>", "a", 1, "no answer block"),
    ("<think></think><answer></answer>", "", 0.2, NOT_AN_OBJECT),
    ("<think> \n\t</think><answer>not json</answer>", " \n\t", 0.2, NOT_AN_OBJECT),
    ("<think>a</think><answer>[1, 2, 3]</answer>", "a", 1, NOT_AN_OBJECT),
    ("<think>a</think><answer>3</answer>", "a", 1, NOT_AN_OBJECT),
    ("<think>a</think><answer>{'bbox': [1, 2, 3, 4]</answer>", "a", 1, NOT_AN_OBJECT),
    ("<think>a</think><answer>" + "[" * 100_000 + "</answer>", "a", 1, NOT_AN_OBJECT),
    ("<think>a</think><answer>" + '{"a":' * 100_000 + "</answer>", "a", 1, NOT_AN_OBJECT),
    ("<think>a</think><answer>{}</answer>", "a", 1, "a key is missing"),
    ("<think>a</think><answer>{'bbox': [1, 2, 3, 4]}</answer>", "a", 1, "a key is missing"),
    (
        "<think>a</think><answer>{'bbox': 'x', 'points_1': 'y', 'points_2': 3}</answer>",
        "a",
        1,
        "box and points malformed",
    ),
    (
        "<think>a</think>"
        "<answer>{'bbox': [1, 2, 3], 'points_1': [1, 2], 'points_2': [3, 4]}</answer>",
        "a",
        1,
        "box malformed",
    ),
    (
        "<think>a</think>"
        "<answer>{'bbox': [1, 2, 3, 4], 'points_1': [1, 2], 'points_2': [3]}</answer>",
        "a",
        1,
        "points malformed",
    ),
    (f"<think>unclosed <answer>{GOOD}</answer>", None, 0, ""),
    (f"<answer>{GOOD}</answer>", None, 0, ""),
    (f"<answer>{GOOD}</answer><think>too late</think>", "too late", 1, "no answer block"),
    (f"x <think>a</think> y <answer>{GOOD}</answer> z", "a", 1, ""),
    (f"<think>a</think><answer>{GOOD}", "a", 1, "no answer block"),
]


@pytest.mark.parametrize("text, think, think_format, problem", GRADED)
def test_graded_formats(text, think, think_format, problem):
    read = parse_answer(text)
    terms = reward_terms(text, GT_BOX, GT_POINTS)
    assert (read.think, read.problem) == (think, problem)
    assert terms["think_format"] == think_format
    assert terms["answer_format"] == ANSWER_FORMAT_SCORES[problem]
    assert all((terms[name] > 0) == (read.bbox is not None) for name in BOX_TERMS)
    assert all((terms[name] > 0) == (read.points is not None) for name in POINT_TERMS)


def test_base_think_wants_the_two_blocks_and_nothing_else():
    think, tail = completion().split("\n")
    clean = [
        completion(),
        completion(between=""),
        completion(between=" \n "),
        completion(think=""),
    ]
    for text in clean:
        assert reward_terms(text, GT_BOX, GT_POINTS)["base_think"] == 1
    unclean = [
        "x" + completion(),
        completion() + "x",
        completion(between="so:"),
        think,
        tail,
        tail + think,
    ]
    for text in unclean:
        assert reward_terms(text, GT_BOX, GT_POINTS)["base_think"] == 0


def test_what_is_written_is_what_is_read_and_a_prompt_can_show_it():
    box = (1, 2, 30, 40)
    points = ((5, 6), (7.5, 8))
    written = '<answer>{"bbox": [1, 2, 30, 40], "points_1": [5, 6], "points_2": [7.5, 8]}</answer>'
    assert write_answer(box, points) == written
    assert parse_answer(written).bbox == box
    assert parse_answer(written).points == points
    example = write_answer(("x1", "y1", "x2", "y2"), [("x", "y"), ("x", "y")])
    assert '"points_2": [x, y]}' in example
    for count in (0, 1, 3):
        with pytest.raises(ValueError):
            write_answer(box, ((1, 2),) * count)


def test_the_keys_are_named_once():
    assert KEYS == ("bbox", "points_1", "points_2")
    for key in KEYS:
        assert f'"{key}"' in write_answer(GT_BOX, GT_POINTS)
        shorter = json.loads(answer_fields(completion())[1])
        del shorter[key]
        assert answer(json.dumps(shorter)).problem == "a key is missing"


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
    GOOD,
    f"<answer>{GOOD}</answer>",
]


def nearly_right(rng):
    """Numbers of every size in the right places, so that the formulas are reached."""
    odd = ["0", "2.5", "-7", "1e17", "1e200", "1e308", "-1e308", "5e-324", "NaN", "1e999", "true"]
    numbers = []
    for _ in range(8):
        numbers.append(rng.choice(odd) if rng.random() < 0.3 else str(rng.randrange(300)))
    points = (numbers[4:6], numbers[6:8])
    return f"<think>{rng.choice(FRAGMENTS)}</think>" + write_answer(numbers[:4], points)


def with_a_fault(text, rng):
    """The text with a fragment put in somewhere, over at most two characters."""
    cut = rng.randrange(len(text))
    return text[:cut] + rng.choice(FRAGMENTS) + text[cut + rng.randrange(3) :]


def hostile_texts(count, seed=0):
    rng = random.Random(seed)
    for index in range(count):
        if index % 2 == 1:
            yield "".join(rng.choices(FRAGMENTS, k=rng.randrange(14)))
        elif index % 4 == 2:
            yield nearly_right(rng)
        else:
            yield with_a_fault(nearly_right(rng), rng)


def test_thousands_of_hostile_texts_never_raise_and_stay_within_0_and_1():
    well_formed = 0
    for text in hostile_texts(25_000):
        terms = reward_terms(text, GT_BOX, GT_POINTS)
        assert terms.keys() >= ALL_TERMS
        assert all(0 <= value <= 1 for value in terms.values()), (text, terms)
        well_formed += terms["answer_format"] == 1
    assert well_formed > 1_250  # many of them got as far as the formulas


UNITS = [
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
]
AROUND = [
    "%s",
    "<think>a</think><answer>%s</answer>",
    '<answer>{"bbox": [%s, 1, 2, 3], "points_1": "%s"}</answer>',
]


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("around", AROUND)
def test_megabytes_are_read_in_linear_time(unit, around):
    text = around.replace("%s", unit * (1_000_000 // len(unit)))
    start = time.perf_counter()
    reward_terms(text, GT_BOX, GT_POINTS)
    assert time.perf_counter() - start < 2  # some 0.03 s; anything quadratic would take hours


ANY_TEXT = st.text() | st.lists(st.sampled_from(FRAGMENTS)).map("".join)


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_without_raising(text):
    assert parse_answer(text).problem in ANSWER_FORMAT_SCORES
    terms = reward_terms(text, GT_BOX, GT_POINTS)
    assert all(0 <= value <= 1 for value in terms.values())


FINITE = st.floats(allow_nan=False, allow_infinity=False)
POINTS = st.tuples(FINITE, FINITE)


@given(st.tuples(FINITE, FINITE, FINITE, FINITE), st.tuples(POINTS, POINTS))
@settings(max_examples=300, deadline=None)
def test_what_is_said_is_what_is_read(box, points):
    read = parse_answer(completion(box, points).replace('"', "'"))
    assert read.points == points
    if box[0] < box[2] and box[1] < box[3]:
        assert read.bbox == box
    else:
        assert read.bbox is None
    assert all(0 <= value <= 1 for value in score(box, points).values())


# ---- totals ----


def test_a_coefficient_multiplies_its_term_and_switches_on_one_outside_the_mode():
    terms = dict.fromkeys(ALL_TERMS, 0.5) | {"mask_dice": 0.25}
    assert total_reward(terms, "soft") == 2
    assert total_reward(terms, "soft", {"box_iou": 3}) == 3
    assert total_reward(terms, "soft", {"box_iou": 0}) == 1.5
    assert total_reward(terms, "soft", {"mask_dice": 2}) == 2.5
    assert total_reward(terms, "iou", {"box_align": 1, "mask_dice": 1}) == 2.25


def test_an_unknown_term_or_mode_is_rejected_by_name():
    terms = score()
    with pytest.raises(ValueError, match=r"mask_dice.*known: think_format, .*base_points"):
        total_reward(terms, "soft", {"mask_dice": 1})  # the caller has not added it
    with pytest.raises(ValueError, match="box_iuo"):
        total_reward(terms, "soft", {"box_iuo": 1})
    with pytest.raises(ValueError, match=r"sfot.*known: soft, hard"):
        total_reward(terms, "sfot")
    with pytest.raises(ValueError, match=r"box_iuo.*known: think_format, .*mask_dice"):
        reward_formula("soft", {"box_iuo": 1})
    with pytest.raises(ValueError, match=r"sfot.*known: soft, hard"):
        reward_formula("sfot")


@pytest.mark.parametrize("coefficient", [math.nan, math.inf, -math.inf])
def test_a_coefficient_that_is_not_finite_is_rejected(coefficient):
    with pytest.raises(ValueError, match=r"box_iou.*finite"):
        total_reward(score(), "soft", {"box_iou": coefficient})
    with pytest.raises(ValueError, match=r"box_iou.*finite"):
        reward_formula("soft", {"box_iou": coefficient})


def test_the_formula_says_what_is_summed_and_its_maximum():
    soft = "think_format + answer_format + box_iou + point_dice"
    assert reward_formula("soft") == (soft, 4)
    tripled = "think_format + answer_format + 3 box_iou + point_dice"
    assert reward_formula("soft", {"box_iou": 3}) == (tripled, 6)
    with_mask = "answer_format + box_iou + 0.5 mask_dice"
    assert reward_formula("iou", {"think_format": 0, "mask_dice": 0.5}) == (with_mask, 2.5)
    negative = "think_format + answer_format + box_iou - 0.5 point_dice"
    assert reward_formula("iou", {"point_dice": -0.5}) == (negative, 3)
    nothing = dict.fromkeys(MODES["iou"], 0)
    assert reward_formula("iou", nothing) == ("0", 0)
    for mode, most in (("soft", 4), ("hard", 8), ("base", 5), ("iou", 3), ("pdice", 3)):
        assert reward_formula(mode)[1] == most


def test_coefficients_are_read_from_the_command_line():
    assert parse_coefficients("") == {}
    assert parse_coefficients("box_iou=2, mask_dice=.5,") == {"box_iou": 2, "mask_dice": 0.5}
    assert parse_coefficients("point_align=-1e-1") == {"point_align": -0.1}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("box_iou", "give term=number, separated by commas"),
        ("box_iou=", "give term=number, separated by commas"),
        ("box_iou=two", "give term=number, separated by commas"),
        ("box_iou=1=2", "give term=number, separated by commas"),
        ("box_iuo=1", "unknown reward term box_iuo; known: think_format, .*mask_dice"),
        ("=1", "unknown reward term ; known: think_format, "),
        ("box_iou=nan", "box_iou.*finite"),
        ("box_iou=inf", "box_iou.*finite"),
    ],
)
def test_bad_coefficients_are_rejected_in_one_line_that_names_the_flag(text, reason):
    with pytest.raises(ValueError, match=f"^--coefficients {text}: .*{reason}") as error:
        parse_coefficients(text)
    assert "\n" not in str(error.value)


# where the line goes, the line, and a completion that has nothing that the term could score
NEW_TERMS = [
    (
        '"answer_format": ANSWER_FORMAT_SCORES',
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
]


@pytest.mark.parametrize("after, line, without", NEW_TERMS)
def test_a_new_term_is_one_line(after, line, without):
    source = Path(rewards.__file__).read_text().splitlines()
    places = [number for number, text in enumerate(source) if text.strip().startswith(after)]
    assert len(places) == 1
    source.insert(places[0] + 1, line)  # the one line
    changed = {"__name__": "changed"}
    exec("\n".join(source), changed)

    def terms_of(text):
        return changed["reward_terms"](text, GT_BOX, GT_POINTS)

    terms = terms_of(completion())
    assert terms == score() | {"mine": 1}
    assert terms_of(without)["mine"] == 0
    assert changed["total_reward"](terms, "hard") == 8  # no mode has it yet
    coefficients = changed["parse_coefficients"]("mine=0.5")
    assert changed["total_reward"](terms, "soft", coefficients) == 4.5
    assert changed["reward_formula"]("soft", coefficients)[1] == 4.5
    changed["MODES"]["new"] = (*MODES["iou"], "mine")
    assert changed["total_reward"](terms, "new") == 4
