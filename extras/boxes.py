"""Several boxes per answer, each with its key points: one for every region that is meant.

    python train_sft.py --prompt multi --data demo/histology …      # the prompt decides; checkpoints remember it

    <answer>{"boxes": [[x1, y1, x2, y2], …], "points": [[x, y, x, y], …]}</answer>

Regions are the connected pieces of the mask; without a mask, or with one piece, the sample's own box and points. Box i
with points i is scored as an answer of its own would be: C_ij is a reward term of part i beside true region j. Of n
parts and m regions, the term of the whole completion is a soft F1:

    term = 2 sum C_ij / (m + n)      over the one-to-one assignment with the largest sum of box_iou + point_dice

So parts too many and too few both cost, their order does not matter, and one box for one region earns exactly what
rewards.py gives. Of parts that hit nothing, or hardly, only the best counts, and only where no part hits: rewards.py
gives a miss a little, as an attempt beats no answer, and that is given once. Only the formats' terms are not sums:
think_format is that of the text, answer_format the lowest of its parts', and 0 without any.
"""

import json
from itertools import zip_longest

import numpy as np
from scipy.ndimage import label
from scipy.optimize import linear_sum_assignment

import rewards
from data import Frame, OneBox, as_written, box_from_mask, keypoints_from_mask, to_model
from rewards import (
    ANSWER_FORMAT,
    KEY_POINTS,
    KEYS,
    Answer,
    Box,
    Points,
    Terms,
    answer_fields,
    parse_answer,
)

MISSING = object()  # a box without points, or points without a box
MISS = 0.1  # the most that box_iou and point_dice are of what does not overlap


# ---------------------------------------------------------------- the truth


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces (8 neighbours) of a non-empty (H, W) mask, the largest first, each (H, W) bool. Specks are
    left out: less than 16 pixels or 1 % of the mask; a mask of specks keeps its largest."""
    labels, count = label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-areas, kind="stable")
    kept = [i for i in order if areas[i] >= max(16, 0.01 * areas.sum())] or order[:1]
    return [labels == i + 1 for i in kept]


def regions(sample) -> list[tuple[Box, Points]]:
    """Box and key points of every region of a sample, image frame, from top to bottom."""
    parts = [] if sample.mask is None else pieces(sample.mask)
    if len(parts) < 2:
        return [(sample.bbox, sample.points)]
    found = [(box_from_mask(part), keypoints_from_mask(part)) for part in parts]
    return sorted(found, key=lambda region: region[0][1::-1])


def truth(sample) -> dict:
    """data.OneBox.truth, and the box of every region."""
    return OneBox.truth(sample) | {"regions": [box for box, _ in regions(sample)]}


def target_text(sample, frame: Frame, with_think: bool = True) -> str:
    """data.target_text with all regions."""
    think = f"<think>{sample.think}</think>" if with_think and sample.think else ""
    return think + write_boxes([as_written(*region, frame) for region in regions(sample)])


# ---------------------------------------------------------------- the answer


def write_boxes(parts) -> str:
    """The answer block of [(box, points), …]."""
    boxes, points = (
        [list(box) for box, _ in parts],
        [[v for point in points for v in point] for _, points in parts],
    )
    return f"<answer>{json.dumps({'boxes': boxes, 'points': points})}</answer>"


def parts_of(text: str, official: bool = False) -> tuple[list[str], str]:
    """The completion as one text per part, each with an answer that rewards.parse_answer reads; and what is wrong, if
    there is no part."""
    think, body, fields = answer_fields(text, official)
    if fields is None:
        return [], "no answer block" if body is None else "answer is not a JSON object"
    boxes, points = (
        value if isinstance(value := fields.get(key), list) else [] for key in ("boxes", "points")
    )
    start = 0 if official or think is None else text.index("</think>", text.index("<think>"))
    before, _, after = text[start:].partition(f"<answer>{body}</answer>")
    texts = []
    for box, xy in zip_longest(boxes, points, fillvalue=MISSING):
        part = {} if box is MISSING else {"bbox": box}
        if xy is not MISSING:
            split = [xy[i : i + 2] for i in range(0, len(xy), 2)] if isinstance(xy, list) else []
            part |= dict(zip(KEYS[1:], split if len(split) == KEY_POINTS else [None] * KEY_POINTS))
        texts.append(f"{text[:start]}{before}<answer>{json.dumps(part)}</answer>{after}")
    if texts:
        return texts, ""
    return [], "box and points malformed" if {
        "boxes",
        "points",
    } <= fields.keys() else "a key is missing"


def read(text: str, official: bool = False) -> Answer:
    """What could be read: its parts, and the box around them; the problem is the worst of any part. Never raises."""
    texts, problem = parts_of(text, official)
    parts = tuple(parse_answer(part, official) for part in texts)
    found = [part.bbox for part in parts if part.bbox]
    around = (
        (*np.min(found, axis=0)[:2].tolist(), *np.max(found, axis=0)[2:].tolist())
        if found
        else None
    )
    worst = min((part.problem for part in parts), key=ANSWER_FORMAT.get, default=problem)
    return Answer(answer_fields(text, official)[0], around, None, worst, parts)


# ---------------------------------------------------------------- the score


def soft_f1(scores, regions: int) -> float:
    """2 sum / (m + n) of the best one-to-one assignment; scores: n rows of m, one for each region."""
    return 2 * _best(np.reshape(scores, (len(scores), regions)))[1] / (len(scores) + regions)


def _best(scores: np.ndarray):
    """(the pairs of the best assignment, their sum) of scores (n, m)."""
    pairs = linear_sum_assignment(scores, maximize=True)
    return pairs, float(scores[pairs].sum())


def reward_terms(texts: list[str], sample, frame: Frame, official: bool = False) -> list[Terms]:
    """rewards.reward_terms of completions with several boxes, in the model frame."""
    truth = [(to_model(box, frame), to_model(points, frame)) for box, points in regions(sample)]
    return [score(text, truth, official, frame.model) for text in texts]


def score(
    text: str, truth: list[tuple[Box, Points]], official=False, frame: tuple[int, int] | None = None
) -> Terms:
    """Every term of one completion, see above; truth: box and points of every region. frame: as in rewards.py."""
    answer, (texts, _) = read(text, official), parts_of(text, official)
    terms = [
        [rewards.reward_terms(part, *region, official, frame) for region in truth] for part in texts
    ]
    single = rewards.reward_terms(text, *truth[0], official, frame)
    total = dict.fromkeys(single, 0.0)
    if texts:
        worth = np.array([[term["box_iou"] + term["point_dice"] for term in row] for row in terms])
        hit = np.array(
            [[max(term["box_iou"], term["point_dice"]) > MISS for term in row] for row in terms]
        )
        pairs = [pair for pair in zip(*_best(worth * hit)[0]) if hit[pair]]
        counted = [terms[i][j] for i, j in pairs or [np.unravel_index(worth.argmax(), worth.shape)]]
        total = {
            name: 2 * sum(term[name] for term in counted) / (len(texts) + len(truth))
            for name in single
        }
    return total | {
        "think_format": single["think_format"],
        "answer_format": ANSWER_FORMAT[answer.problem] if texts else 0.0,
    }
