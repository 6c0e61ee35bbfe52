"""Several boxes per answer, each with its key points: one for every region that is meant.

    python train_sft.py --prompt boxes --data demo/histology …   # a checkpoint remembers its prompt

    <answer>{"boxes": [[x1, y1, x2, y2], …], "points": [[x, y, x, y], …]}</answer>

Regions are the connected pieces of the mask. Without a mask, or with one piece, the example's own
box and points are the region. Box i and points i of an answer are its part i, and a part is scored
as an answer of its own would be: C_ij is a reward term of part i for the true region j. With n
parts and m regions, the term of the completion is a soft F1:

    term = 2 sum C_ij / (m + n)

The sum is over the one-to-one assignment with the largest sum of box_iou + point_dice. So parts too
many and parts too few both cost, their order does not matter, and one box for one region earns
exactly what rewards.py gives.

rewards.py gives even a miss a little, as an attempt beats no answer. Here that is given once: among
parts that hit nothing, or hardly anything, only the best counts, and only where no part hits.
The terms of the format are no sums. think_format is that of the text. answer_format is the lowest
of any part's, and 0 without a part.
"""

import json
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
from scipy.ndimage import label
from scipy.optimize import linear_sum_assignment

import rewards
from data import (
    ONE_BOX,
    AnswerFormat,
    Example,
    Sizes,
    box_from_mask,
    in_whole_pixels,
    keypoints_from_mask,
    to_model,
)
from metrics import mean
from rewards import (
    ANSWER_FORMAT_SCORES,
    Answer,
    Box,
    Points,
    Terms,
    answer_fields,
    box_iou,
    split_block,
)

ANSWER_EXAMPLE = (
    '<answer>{"boxes": [[x1, y1, x2, y2], ...], "points": [[x, y, x, y], ...]}</answer>'
)
PROMPT = (
    "{query}\n"
    "Reason first, then point to every region that is meant, {coordinates}:\n"
    f"<think>what you see, what it is, where it lies</think>{ANSWER_EXAMPLE}\n"
    "A tight box for each region; points i, 2 of them, lie well inside the region of box i."
)
ABSENT = object()  # instead of the box of a part that has points alone, and the other way round
MISS = 0.1  # what overlaps nothing has at most this much box_iou and point_dice


# ---------------------------------------------------------------- the truth


def pieces(mask: np.ndarray) -> list[np.ndarray]:
    """The connected pieces (8 neighbours) of a non-empty (H, W) mask, the largest first.

    Each is (H, W) bool. Specks are left out: less than 16 pixels, or less than 1 % of the mask.
    A mask of nothing but specks keeps its largest."""
    labels, count = label(mask, np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    smallest = max(16, 0.01 * areas.sum())
    order = np.argsort(-areas, kind="stable")
    kept = [index for index in order if areas[index] >= smallest]
    if not kept:
        kept = [order[0]]
    return [labels == index + 1 for index in kept]


def regions(example: Example) -> list[tuple[Box, Points]]:
    """Box and key points of every region of an example, image frame, from top to bottom."""
    found = []
    if example.mask is not None:
        for piece in pieces(example.mask):
            found.append((box_from_mask(piece), keypoints_from_mask(piece)))
    if len(found) < 2:
        return [(example.bbox, example.points)]
    return sorted(found, key=top_left)


def top_left(region: tuple[Box, Points]) -> tuple[float, float]:
    """(y1, x1) of a region's box. It sorts regions from top to bottom, then from left to right."""
    box, _ = region
    return box[1], box[0]


def truth(example: Example) -> dict:
    """What an answer is compared with, image frame: as for one box, and the box of every region."""
    boxes = [box for box, _ in regions(example)]
    return ONE_BOX.truth(example) | {"regions": boxes}


def target_text(example: Example, sizes: Sizes, with_think: bool = True) -> str:
    """The completion of a perfect model, in the model frame, with all regions."""
    parts = [in_whole_pixels(box, points, sizes) for box, points in regions(example)]
    answer = write_boxes(parts)
    if not with_think or not example.think:
        return answer
    return f"<think>{example.think}</think>{answer}"


# ---------------------------------------------------------------- the answer


@dataclass(frozen=True)
class SeveralAnswer(Answer):
    """An answer of several parts. Its bbox is the box around theirs, and it has no points."""

    parts: tuple[Answer, ...] = ()

    @property
    def regions(self) -> tuple[tuple[Box | None, Points | None], ...]:
        """The (bbox, points) of each part."""
        return tuple((part.bbox, part.points) for part in self.parts)


def write_boxes(parts: list[tuple[Box, Points]]) -> str:
    """The answer block of [(box, points), …]."""
    boxes = [list(box) for box, _ in parts]
    points = [[x1, y1, x2, y2] for _, ((x1, y1), (x2, y2)) in parts]
    return f"<answer>{json.dumps({'boxes': boxes, 'points': points})}</answer>"


def parse_boxes(text: str) -> SeveralAnswer:
    """What could be read from a completion. No text raises an error.

    The problem is the worst of any part's."""
    think, _, _ = answer_fields(text)
    texts, problem = split_parts(text)
    if not texts:
        return SeveralAnswer(think, None, None, problem)
    parts = tuple(rewards.parse_answer(part) for part in texts)
    worst = min((part.problem for part in parts), key=ANSWER_FORMAT_SCORES.__getitem__)
    return SeveralAnswer(think, box_around(parts), None, worst, parts)


def box_around(parts: tuple[Answer, ...]) -> Box | None:
    """The smallest box that holds the boxes of all parts. None if no part has a box."""
    boxes = [part.bbox for part in parts if part.bbox is not None]
    if not boxes:
        return None
    lefts, tops, rights, bottoms = zip(*boxes)
    return min(lefts), min(tops), max(rights), max(bottoms)


def split_parts(text: str) -> tuple[list[str], str]:
    """A completion as one text for each part, and what is wrong if there is no part.

    Each text has an answer that rewards.parse_answer reads. Around it everything is as it was."""
    _, body, fields = answer_fields(text)
    if body is None:
        return [], "no answer block"
    if fields is None:
        return [], "answer is not a JSON object"
    boxes = list_in(fields, "boxes")
    points = list_in(fields, "points")
    if not boxes and not points:
        if "boxes" in fields and "points" in fields:
            return [], "box and points malformed"
        return [], "a key is missing"
    before, after = around_the_answer(text)
    texts = []
    for box, numbers in zip_longest(boxes, points, fillvalue=ABSENT):
        part = {}
        if box is not ABSENT:
            part["bbox"] = box
        if numbers is not ABSENT:
            part["points_1"], part["points_2"] = two_halves(numbers)
        texts.append(f"{before}<answer>{json.dumps(part)}</answer>{after}")
    return texts, ""


def list_in(fields: dict, key: str) -> list:
    """The list under a key of an answer's object. It is empty if there is none."""
    value = fields.get(key)
    return value if isinstance(value, list) else []


def two_halves(numbers: object) -> tuple[list | None, list | None]:
    """[x, y, x, y] as [x, y] and [x, y]. Anything else gives (None, None), which is malformed."""
    if not isinstance(numbers, list) or len(numbers) != 4:
        return None, None
    return numbers[:2], numbers[2:]


def around_the_answer(text: str) -> tuple[str, str]:
    """What is written before and after the answer block that rewards.answer_fields finds."""
    _, _, rest = split_block(text, "<think>", "</think>")
    between, _, after = split_block(rest, "<answer>", "</answer>")
    thoughts = text.removesuffix(rest)
    return thoughts + between, after


# ---------------------------------------------------------------- the score


def soft_f1(scores: list[list[float]], count: int) -> float:
    """2 sum / (m + n) over the one-to-one assignment with the largest sum.

    scores: n rows of m = count numbers, row i for part i and column j for the true region j."""
    table = np.reshape(scores, (len(scores), count))
    pairs = best_assignment(table)
    return 2 * sum(float(table[pair]) for pair in pairs) / (len(scores) + count)


def best_assignment(table: np.ndarray) -> list[tuple[int, int]]:
    """The (row, column) pairs of the one-to-one assignment with the largest sum in (n, m)."""
    rows, columns = linear_sum_assignment(table, maximize=True)
    return list(zip(rows.tolist(), columns.tolist()))


def reward_terms(text: str, example: Example, sizes: Sizes) -> Terms:
    """rewards.reward_terms of a completion with several boxes, in the model frame."""
    in_model = [(to_model(box, sizes), to_model(points, sizes)) for box, points in regions(example)]
    return score(text, in_model, sizes.model)


def score(
    text: str, true_regions: list[tuple[Box, Points]], size: tuple[int, int] | None = None
) -> Terms:
    """Every term of one completion, as the top of this file says.

    true_regions: their boxes and points. size: as in rewards.reward_terms."""
    box, points = true_regions[0]
    of_text = rewards.reward_terms(text, box, points, size)
    total = dict.fromkeys(of_text, 0.0)
    total["think_format"] = of_text["think_format"]
    texts, _ = split_parts(text)
    if not texts:
        return total

    terms = []  # of part i for region j
    for part in texts:
        row = [rewards.reward_terms(part, box, points, size) for box, points in true_regions]
        terms.append(row)
    pairs = counted_pairs(terms)
    for name in total.keys() - {"think_format", "answer_format"}:
        earned = sum(terms[i][j][name] for i, j in pairs)
        total[name] = 2 * earned / (len(texts) + len(true_regions))
    total["answer_format"] = ANSWER_FORMAT_SCORES[parse_boxes(text).problem]
    return total


def counted_pairs(terms: list[list[Terms]]) -> list[tuple[int, int]]:
    """Which part i counts for which region j, given the terms of each i and j.

    These are the pairs of the best assignment that hit, or the best pair if none hits."""
    ious = np.array([[term["box_iou"] for term in row] for row in terms])
    dices = np.array([[term["point_dice"] for term in row] for row in terms])
    worth = ious + dices
    hits = np.maximum(ious, dices) > MISS
    pairs = [pair for pair in best_assignment(worth * hits) if hits[pair]]
    if pairs:
        return pairs
    i, j = np.unravel_index(worth.argmax(), worth.shape)
    return [(int(i), int(j))]


# ---------------------------------------------------------------- the metrics
# They take a prediction p of metrics.py, and score one of its completions.


def region_f1(p: dict, completion: dict, least: float | None = None) -> float:
    """Soft F1 of the boxes' IoUs, or, given `least`, F1 where a box is right from that IoU on."""
    true_boxes = p["truth"]["regions"]
    table = []
    for part in completion["regions"]:
        row = [box_iou(part["bbox"], box) if part["bbox"] else 0.0 for box in true_boxes]
        if least is not None:
            row = [float(iou >= least) for iou in row]
        table.append(row)
    return soft_f1(table, len(true_boxes))


def region_f1_50(p: dict, completion: dict) -> float:
    """F1 of the boxes whose IoU is at least 0.5."""
    return region_f1(p, completion, least=0.5)


def count_error(p: dict, completion: dict) -> float:
    """|n - m| / m of n boxes for m regions."""
    return abs(len(completion["regions"]) / len(p["truth"]["regions"]) - 1)


METRICS = {  # name: (title, function of a prediction)
    "soft_f1": ("soft F1", lambda p: mean(p, region_f1)),
    "f1_50": ("F1, IoU ≥ 0.5", lambda p: mean(p, region_f1_50)),
    "count_error": ("count error", lambda p: mean(p, count_error)),
}

SEVERAL_BOXES = AnswerFormat(
    prompt=PROMPT,
    parse=parse_boxes,
    reward_terms=reward_terms,
    target_text=target_text,
    truth=truth,
    key="boxes",
    several=True,
    metrics=METRICS,
)
