"""The rewards of the paper's released code (PRIS-CV/MedReasoner), quirk for quirk.

    python -m extras.official_rewards FLAGS      # train_grpo.py with these rewards: takes its flags

Ten things differ from the formulas in rewards.py:
 1. pDice is 2I/U there, at most 2, so twice the Jaccard index. In rewards.py it is a true Dice,
    2I/(A+A*), at most 1.
 2. box_scale is normalised as if it were clipped at 2, although it is clipped at 1. So it never
    falls below 0.291. In rewards.py it falls to 0.1.
 3. Two terms of the mode "base", IoU and L1, are always 0. The answer there is any first {...},
    in double quotes only. In rewards.py all of "base" works.
 4. Inverted boxes pass. In rewards.py a box needs x1 < x2 and y1 < y2.
 5. The answer is looked for anywhere, so that a draft in the thoughts counts. In rewards.py it is
    looked for after </think>.
 6. Box and point terms are rounded to four decimals, and unions are 1e-5 px² too big. In rewards.py
    nothing is rounded.
 7. base_points cuts the points to whole pixels before it tests whether they are inside the box.
    In rewards.py they are tested as they were written.
 8. A ```json fence around the object makes the answer no JSON. In rewards.py it is taken off.
 9. Lengths (10 px, 100 px, "+1") are pixels of an 840 x 840 canvas, whatever the image. In
    rewards.py they are scaled by sqrt(width * height) / 840 to the `size` of the image.
10. Points need to be more than 10 px apart. In rewards.py, given `size`, points as far apart as the
    true ones are far enough.

A run that was started with this command is resumed with it: train_grpo.py would go on with the
formulas of rewards.py.
"""

import dataclasses
import math
import runpy

import data
import rewards
from rewards import (
    ANSWER_FORMAT_SCORES,
    EPS,
    Answer,
    Box,
    Points,
    Terms,
    box_gates,
    count_outside,
    gated,
    is_think_then_answer,
    load_json_object,
    load_object,
    matched_error,
    point_dice_published,
    point_gates,
    problem_of,
    read_numbers,
    read_points,
    scale_error,
    smooth_exp,
    smooth_log,
    split_block,
    think_format,
)


def parse_answer(text: str) -> Answer:
    """rewards.parse_answer as released: with differences 4, 5 and 8."""
    _, think, _ = split_block(text, "<think>", "</think>")
    _, body, _ = split_block(text, "<answer>", "</answer>")
    if body is None:
        return Answer(think, None, None, "no answer block")
    return read_answer(think, load_object(body))


def read_answer(think: str | None, fields: dict | None) -> Answer:
    """The answer in a JSON object, whose box may be inverted (difference 4)."""
    if fields is None:
        return Answer(think, None, None, "answer is not a JSON object")
    box = read_numbers(fields, "bbox", 4)
    points = read_points(fields)
    return Answer(think, box, points, problem_of(fields, box, points))


def reward_terms(text: str, gt_box: Box, gt_points: Points) -> Terms:
    """rewards.reward_terms as released. All coordinates are pixels of one frame, never scaled."""
    answer = parse_answer(text)

    # Without a box its terms are 0, and the true box stands in to give their names.
    box = answer.bbox or gt_box
    of_box = rounded(gated(box_terms(box, gt_box), box_gates(box, gt_box, gt_points)))
    if answer.bbox is None:
        of_box = dict.fromkeys(of_box, 0.0)

    points = answer.points or gt_points
    gates = point_gates(points, gt_box, gt_points, size=None)
    of_points = rounded(gated(point_terms(points, gt_box, gt_points), gates))
    if answer.points is None:
        of_points = dict.fromkeys(of_points, 0.0)

    return {
        "think_format": think_format(answer.think),
        "answer_format": ANSWER_FORMAT_SCORES[answer.problem],
        **of_box,
        **of_points,
        **base_terms(text, gt_points),
    }


def box_terms(box: Box, gt_box: Box) -> Terms:
    """The terms of a box before the gates, with difference 2."""
    terms = rewards.box_terms(box, gt_box)
    scale = scale_error(box, gt_box)
    terms["box_scale"] = smooth_exp(min(scale, 1.0), k=3, c=0.5, v_max=2)
    return terms


def point_terms(points: Points, gt_box: Box, gt_points: Points) -> Terms:
    """The terms of the key points before the gates, with difference 1."""
    terms = rewards.point_terms(points, gt_box, gt_points)
    terms["point_dice"] = smooth_log(point_dice_published(points, gt_points, pad=EPS))
    return terms


def rounded(terms: Terms) -> Terms:
    """Difference 6."""
    return {name: round(value, 4) for name, value in terms.items()}


def base_terms(text: str, gt_points: Points) -> Terms:
    """The terms of the mode "base", with differences 3 and 7."""
    _, inside, _ = split_block(text, "{", "}")
    fields = load_json_object("{" + (inside or "") + "}")
    answer = read_answer(None, fields)
    points_are_near = False
    if answer.bbox is not None and answer.points is not None:
        in_whole_pixels = [(int(x), int(y)) for x, y in answer.points]
        if count_outside(in_whole_pixels, answer.bbox) == 0:
            points_are_near = matched_error(answer.points, gt_points, math.dist) < 100
    return {
        "base_think": float(is_think_then_answer(text)),
        "base_answer": float(answer.problem == ""),
        "base_iou": 0.0,
        "base_box_l1": 0.0,
        "base_points": float(points_are_near),
    }


def example_terms(text: str, example: data.Example, sizes: data.Sizes) -> Terms:
    """The terms of a completion about an example, in the model frame."""
    gt_box = data.to_model(example.bbox, sizes)
    gt_points = data.to_model(example.points, sizes)
    return reward_terms(text, gt_box, gt_points)


AS_RELEASED = dataclasses.replace(data.ONE_BOX, parse=parse_answer, reward_terms=example_terms)


if __name__ == "__main__":
    data.ANSWER_FORMATS["bbox"] = "extras.official_rewards.AS_RELEASED"
    runpy.run_module("train_grpo", run_name="__main__", alter_sys=True)
