"""extras/official_rewards.py against the released code's own numbers, and each of its quirks."""

import json
import runpy
import sys
from dataclasses import fields

import pytest
from hypothesis import given, settings

import data
from extras.official_rewards import AS_RELEASED, parse_answer, reward_terms
from rewards import (
    ANSWER_FORMAT_SCORES,
    MODES,
    box_iou,
    point_dice,
    point_dice_published,
    total_reward,
)
from rewards import parse_answer as parse_answer_by_formula
from rewards import reward_terms as reward_terms_by_formula
from test_rewards import (
    ALL_TERMS,
    ANY_TEXT,
    AROUND,
    BASE_TERMS,
    BOX_TERMS,
    DEGENERATE_BOXES,
    DEGENERATE_POINTS,
    EXTREME_BOXES,
    EXTREME_POINTS,
    GOLDEN,
    GOLDEN_BASE_NAMES,
    GOLDEN_NAMES,
    GT_BOX,
    GT_POINTS,
    UNITS,
    completion,
    hostile_texts,
)


def score(box=GT_BOX, points=GT_POINTS):
    return reward_terms(completion(box, points), GT_BOX, GT_POINTS)


def score_by_formula(box=GT_BOX, points=GT_POINTS):
    return reward_terms_by_formula(completion(box, points), GT_BOX, GT_POINTS)


# ---- the released numbers ----


def test_every_released_number_is_reproduced():
    assert len(GOLDEN) == 300
    for case in GOLDEN:
        terms = reward_terms(case["completion"], case["bbox"], case["points"])
        for name, released in GOLDEN_NAMES.items():
            assert terms[name] == pytest.approx(case["hard"][released], abs=1e-6), (name, case)
            if name in MODES["soft"]:
                assert terms[name] == pytest.approx(case["soft"][released], abs=1e-6), (name, case)
        for name, released in GOLDEN_BASE_NAMES.items():
            assert terms[name] == case["base"][released], (name, case)
        for mode in ("soft", "hard", "base"):
            total = total_reward(terms, mode)
            assert total == pytest.approx(case[mode]["score"], abs=1e-6), (mode, case)


def test_the_released_evaluation_is_reproduced():
    evaluated = [case for case in GOLDEN if case["eval"] is not None]
    assert len(evaluated) == 232
    for case in evaluated:
        read = parse_answer(case["completion"])
        assert box_iou(read.bbox, case["bbox"]) == pytest.approx(case["eval"]["iou"], abs=1e-6)
        published = point_dice_published(read.points, case["points"])
        assert published == pytest.approx(case["eval"]["pdice"], abs=1e-12)


# ---- the differences, by their numbers in the docstring ----


def test_1_pdice_is_over_the_union():
    slid = (130, 150), (190, 150)
    assert point_dice(slid, GT_POINTS) < 1 < point_dice_published(slid, GT_POINTS)
    assert score_by_formula(points=slid)["point_dice"] < 1
    assert score(points=slid)["point_dice"] == 1  # clipped


def test_2_box_scale_never_falls_below_0_291():
    tiny = (149, 149, 151, 151)
    gate = 0.8125  # no true point inside, too small: 0.7 + 0.3 (0.25 + 0.5) / 2
    assert score_by_formula(tiny)["box_scale"] == pytest.approx(0.1 * gate)
    assert score(tiny)["box_scale"] == pytest.approx(0.2913 * gate, abs=1e-4)


@pytest.mark.parametrize("quote, expected", [('"', (1, 1, 0, 0, 1)), ("'", (1, 0, 0, 0, 0))])
def test_3_base_has_dead_terms_and_wants_double_quotes(quote, expected):
    text = completion().replace('"', quote)
    terms = reward_terms(text, GT_BOX, GT_POINTS)
    assert tuple(terms[name] for name in BASE_TERMS) == expected
    by_formula = reward_terms_by_formula(text, GT_BOX, GT_POINTS)
    assert all(by_formula[name] == 1 for name in BASE_TERMS)


def test_3_base_takes_any_first_braces_for_the_answer():
    unclosed = completion().removesuffix("</answer>")
    assert reward_terms(unclosed, GT_BOX, GT_POINTS)["base_answer"] == 1
    assert reward_terms_by_formula(unclosed, GT_BOX, GT_POINTS)["base_answer"] == 0


@pytest.mark.parametrize(
    "inverted", [(200, 100, 100, 200), (100, 200, 200, 100), (100, 100, 100, 200)]
)
def test_4_inverted_boxes_pass(inverted):
    terms = score(inverted)
    assert terms["answer_format"] == 1
    assert all(0 < terms[name] < 1 for name in BOX_TERMS)
    assert score_by_formula(inverted)["answer_format"] == 0.6


def test_5_an_answer_in_the_thoughts_counts():
    draft = (0, 0, 50, 50)
    _, draft_block = completion(draft).split("\n")
    text = completion(GT_BOX, think=draft_block)
    assert parse_answer(text).bbox == draft
    assert parse_answer_by_formula(text).bbox == GT_BOX
    only_drafted, _ = text.split("\n")
    assert parse_answer(only_drafted).problem == ""
    assert parse_answer_by_formula(only_drafted).problem == "no answer block"


def test_6_terms_have_four_decimals():
    shifted = (103, 107, 211, 199)
    for name in ("box_iou", "box_align"):
        released = score(shifted)[name]
        by_formula = score_by_formula(shifted)[name]
        assert released == round(by_formula, 4)
        assert released != by_formula


def test_7_base_cuts_the_points_to_whole_pixels():
    right_of_the_box = ((120, 150), (200.9, 150))  # 200 when cut, and 200 is inside
    assert score(points=right_of_the_box)["base_points"] == 1
    assert score_by_formula(points=right_of_the_box)["base_points"] == 0
    box = (100.5, 100, 200, 200)
    left_when_cut = ((100.7, 150), (180, 150))  # 100.7 is inside, 100 is not
    assert score(box, left_when_cut)["base_points"] == 0
    assert score_by_formula(box, left_when_cut)["base_points"] == 1


def test_8_a_fence_makes_the_answer_no_json():
    body = json.dumps({"bbox": GT_BOX, "points_1": [1, 2], "points_2": [3, 4]})
    fenced = f"<answer>```json\n{body}\n```</answer>"
    assert parse_answer(fenced).problem == "answer is not a JSON object"
    assert parse_answer_by_formula(fenced).problem == ""


def test_9_and_10_pixels_are_never_scaled():
    twelve_apart = ((120, 150), (132, 150))  # more than 10 px of the 840 canvas
    eight_apart = ((120, 150), (128, 150))
    assert score(points=twelve_apart)["point_angle"] == 1
    assert score(points=eight_apart)["point_angle"] == 0.925
    sizes = data.Sizes((84, 84), (84, 84))
    example = data.Example("a", None, "?", GT_BOX, eight_apart)
    text = completion(points=eight_apart)
    assert AS_RELEASED.reward_terms(text, example, sizes)["point_angle"] == 0.925
    assert data.ONE_BOX.reward_terms(text, example, sizes)["point_angle"] == 1


# ---- any text ----


def test_every_term_is_always_there():
    for text in ("", completion(), "<answer>{}</answer>", "<think>"):
        assert reward_terms(text, GT_BOX, GT_POINTS).keys() == ALL_TERMS


@pytest.mark.parametrize("gt_box", DEGENERATE_BOXES)
@pytest.mark.parametrize("gt_points", DEGENERATE_POINTS)
def test_degenerate_truth_gives_finite_rewards(gt_box, gt_points):
    for box in (*EXTREME_BOXES, gt_box):
        for points in (*EXTREME_POINTS, gt_points):
            terms = reward_terms(completion(box, points), gt_box, gt_points)
            assert all(0 <= value <= 1 for value in terms.values()), terms


def test_thousands_of_hostile_texts_never_raise_and_stay_within_0_and_1():
    well_formed = 0
    for text in hostile_texts(8_000, seed=1):
        terms = reward_terms(text, GT_BOX, GT_POINTS)
        assert terms.keys() == ALL_TERMS
        assert all(0 <= value <= 1 for value in terms.values()), (text, terms)
        well_formed += terms["answer_format"] == 1
    assert well_formed > 400


@pytest.mark.parametrize("around", AROUND)
def test_megabytes_are_read(around):
    for unit in UNITS:
        text = around.replace("%s", unit * (1_000_000 // len(unit)))
        assert reward_terms(text, GT_BOX, GT_POINTS)["box_iou"] == 0


@given(ANY_TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_without_raising(text):
    assert parse_answer(text).problem in ANSWER_FORMAT_SCORES
    terms = reward_terms(text, GT_BOX, GT_POINTS)
    assert all(0 <= value <= 1 for value in terms.values())


# ---- the answer format, and the command ----


def test_as_released_reads_and_scores_in_another_way_and_is_otherwise_one_box():
    changed = {"parse", "reward_terms"}
    for field in fields(data.AnswerFormat):
        mine = getattr(AS_RELEASED, field.name)
        theirs = getattr(data.ONE_BOX, field.name)
        assert (mine != theirs) == (field.name in changed)


def test_a_completion_is_scored_in_the_model_frame():
    sizes = data.Sizes((400, 400), (840, 840))
    in_image = (50.0, 50.0, 100.0, 100.0)
    example = data.Example("a", None, "?", in_image, ((60, 75), (90, 75)))
    perfect = completion(data.to_model(in_image, sizes), data.to_model(example.points, sizes))
    assert total_reward(AS_RELEASED.reward_terms(perfect, example, sizes), "hard") == 8


@pytest.mark.filterwarnings("ignore:'extras.official_rewards' found in sys.modules")
def test_the_command_trains_with_the_released_rewards(monkeypatch, capsys):
    monkeypatch.setitem(data.ANSWER_FORMATS, "bbox", data.ANSWER_FORMATS["bbox"])
    monkeypatch.setattr(sys, "argv", ["official_rewards", "--help"])
    assert data.answer_format_of(data.PROMPTS["reasoning"]) is data.ONE_BOX
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("extras.official_rewards", run_name="__main__")
    assert ended.value.code == 0
    assert "--kl-coef" in capsys.readouterr().out  # train_grpo.py's own help
    assert data.answer_format_of(data.PROMPTS["reasoning"]) is AS_RELEASED
    assert data.answer_format_of(data.PROMPTS["direct"]) is AS_RELEASED


def test_a_resume_with_other_rewards_is_an_error(crm, tmp_path, monkeypatch):
    monkeypatch.setitem(data.ANSWER_FORMATS, "bbox", "extras.official_rewards.AS_RELEASED")
    crm.save(tmp_path)
    crm.check_settings(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="answers was 'extras.official_rewards.AS_RELEASED'"):
        crm.check_settings(tmp_path)
