"""From a completion and the truth to a reward: read the answer, score it term by term, add the terms up.

    terms = reward_terms(text, gt_box, gt_points)      # every term, each in [0, 1]
    reward = total_reward(terms, "soft")               # the weighted sum of the mode's terms

To add a term, add one line to a dict in `_box_terms`, `_point_terms` or `reward_terms`; `--weights name=0.5` uses it,
and MODES puts it into a mode. The caller adds what needs more than these: terms["mask_dice"] = smooth_log(dice).
To change the answer format, change `write_answer` and `parse_answer`; prompts and SFT targets follow.
Boxes (x1, y1, x2, y2) and points (x, y) are pixels of one common frame, the model frame in training.

Formulas: MedReasoner, arXiv 2508.08177; there B and A are the predicted box and its area, P the points, B*, A*, G the
true ones. `official=True` reproduces its released code, which differs so:
 1. pDice is a true Dice, 2I/(A+A*), at most 1. Released: 2I/U, at most 2, so twice the Jaccard index.
 2. box_scale falls to 0.1 at its clip. Released: normalised as if clipped at 2, so never below 0.291.
 3. All of `base` works. Released: IoU and L1 are always 0, the answer is any first {...}, in double quotes.
 4. A box needs x1 < x2 and y1 < y2. Released: inverted boxes pass.
 5. The answer is looked for after </think>. Released: anywhere, so a draft in the thoughts counts.
 6. Nothing is rounded. Released: box and point terms have four decimals, and unions are 1e-5 px² too big.
 7. base_points tests the points as written. Released: cuts them to whole pixels before the inside test.
 8. A ```json fence around the object is taken off. Released: it makes the answer no JSON.
 9. Given `frame`, lengths (10 px, 100 px, "+1") scale by sqrt(width * height) / 840. Released: an 840 x 840 canvas.
10. Given `frame`, points as far apart as the true ones are far enough. Released: more than 10 px.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, permutations

Point = tuple[float, float]
Points = tuple[Point, ...]  # KEY_POINTS of them; their order never matters
Box = tuple[float, float, float, float]
Terms = dict[str, float]  # name: value

KEY_POINTS = (
    2  # per answer, at least 2: prompts, SFT targets, parser, ground truth and rewards follow
)
KEYS = ("bbox", *(f"points_{k}" for k in range(1, KEY_POINTS + 1)))  # of the answer's JSON object
MODES = {
    "soft": ("think_format", "answer_format", "box_iou", "point_dice"),
    "hard": (
        "think_format",
        "answer_format",
        "box_iou",
        "box_align",
        "box_scale",
        "point_dice",
        "point_align",
        "point_angle",
    ),
    "base": ("base_think", "base_answer", "base_iou", "base_box_l1", "base_points"),
    "iou": ("think_format", "answer_format", "box_iou"),
    "pdice": ("think_format", "answer_format", "point_dice"),
}
ANSWER_FORMAT = {  # everything that can be wrong with an answer, and the answer_format it still earns
    "no answer block": 0.0,
    "answer is not a JSON object": 0.2,
    "a key is missing": 0.4,
    "box and points malformed": 0.4,
    "box malformed": 0.6,
    "points malformed": 0.6,
    "": 1.0,
}
EPS = 1e-5  # keeps empty boxes and coinciding points out of denominators and logarithms


@dataclass(frozen=True)
class Answer:
    """What could be read of a completion: bad output is a value, never an error. Box and points fail separately."""

    think: str | None  # "" if the block is empty, None if there is none
    bbox: Box | None
    points: Points | None
    problem: str  # "" or one short reason, a key of ANSWER_FORMAT
    parts: tuple[
        "Answer", ...
    ] = ()  # where several boxes were asked for (extras/boxes.py): each with its points


def write_answer(bbox, points) -> str:
    """The answer block that `parse_answer` reads, of numbers or, as a prompt's example, of their names."""
    lists = [", ".join(map(str, values)) for values in (bbox, *points)]
    fields = ", ".join(f'"{key}": [{values}]' for key, values in zip(KEYS, lists, strict=True))
    return f"<answer>{{{fields}}}</answer>"


def parse_answer(text: str, official: bool = False) -> Answer:
    """Read <think>…</think> <answer>{"bbox": [4], "points_1": [2], "points_2": [2]}</answer> in linear time;
    single quotes and a ```json fence do, too. official: as released, see 4, 5 and 8 above."""
    think, body, fields = answer_fields(text, official)
    return (
        Answer(think, None, None, "no answer block")
        if body is None
        else _read_fields(think, fields, official)
    )


def answer_fields(text: str, official: bool = False) -> tuple[str | None, str | None, dict | None]:
    """(inside the think block, inside the answer block, the JSON object there), None where there is none."""
    _, think, rest = _split(text, "<think>", "</think>")
    _, inside, _ = _split(text if official else rest, "<answer>", "</answer>")
    if inside is None:
        return think, None, None
    body = (
        inside
        if official
        else inside.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    )
    fields = _load_object(body) or _load_object(body.replace("'", '"'))  # the released prompt has '
    return think, inside, fields


def _split(text: str, opening: str, closing: str) -> tuple[str, str | None, str]:
    """(before, inside, after) the first opening…closing, or (text, None, text) if there is no such block."""
    before, opened, rest = text.partition(opening)
    inside, closed, after = rest.partition(closing)
    return (before, inside, after) if opened and closed else (text, None, text)


def _load_object(body: str) -> dict | None:
    try:
        value = json.loads(
            body, parse_int=float
        )  # int() refuses 10,000 digits, float() makes them inf
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_fields(think: str | None, fields: dict | None, official: bool) -> Answer:
    if fields is None:
        return Answer(think, None, None, "answer is not a JSON object")
    box = _finite_list(fields.get("bbox"), 4)
    if box and not official and not (box[0] < box[2] and box[1] < box[3]):
        box = None
    points = tuple(_finite_list(fields.get(key), 2) for key in KEYS[1:])
    points = None if None in points else points
    malformed = " and ".join(
        name for name, value in (("box", box), ("points", points)) if value is None
    )
    problem = (
        "a key is missing"
        if not fields.keys() >= set(KEYS)
        else malformed and f"{malformed} malformed"
    )
    return Answer(think, box, points, problem)


def _finite_list(value: object, count: int) -> tuple[float, ...] | None:
    """A list of `count` finite numbers as a tuple; None for NaN, Infinity, 1e999, true, text, nesting."""
    is_list = isinstance(value, list) and len(value) == count
    return (
        tuple(value)
        if is_list and all(isinstance(v, float) and math.isfinite(v) for v in value)
        else None
    )


def smooth_log(v: float, k: float = 3) -> float:
    """S_log = 0.9 ln(kv + 1) / ln(k + 1) + 0.1, from S(0) = 0.1, as an attempt beats no answer, to S(1) = 1 exactly."""
    return 0.9 * (math.log(k * v + 1) / math.log(k + 1)) + 0.1


def smooth_exp(v: float, k: float, c: float, v_max: float) -> float:
    """S_exp = 0.9 (σ(v) - σ(v_max)) / (σ(0) - σ(v_max)) + 0.1 with σ(t) = 1 / (1 + e^{k(t - c)}), falling."""
    start, here, end = (
        1 / (1 + math.exp(k * (t - c))) for t in (0, v, v_max)
    )  # σ(0), σ(v), σ(v_max)
    return 0.9 * ((here - end) / (start - end)) + 0.1


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union I / U, in [0, 1]; an area is (x2 - x1)(y2 - y1), without any "+1"."""
    overlap_x = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    overlap_y = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = overlap_x * overlap_y
    union = math.prod(_size(a)) + math.prod(_size(b)) - intersection
    return min(1.0, intersection / max(union, EPS)) if intersection else 0.0


def point_dice(p: Points, g: Points, official: bool = False, pad: float = 0.0) -> float:
    """Dice 2I / (A + A*), in [0, 1], of the circles that have the two points farthest apart as diameters;
    official: 2I / U, in [0, 2]. `pad` (px) widens both radii: coinciding points have a circle, too."""
    p, g = _pairs(p)[-1], _pairs(g)[-1]
    r, s = math.dist(*p) / 2 + pad, math.dist(*g) / 2 + pad
    d = math.dist(
        *(((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in (p, g))
    )  # between the centres
    area_p, area_g = math.pi * r * r, math.pi * s * s
    intersection = min(area_p, area_g)
    if d >= r + s or not intersection:
        return 0.0
    if d > abs(
        r - s
    ):  # a lens: a sector of either circle, less the kite of the centres and the two crossings
        kite = (
            math.sqrt((r + s - d) * (d + (r - s)) * (d - (r - s)) * (d + r + s)) / 2
        )  # its area, by Heron
        alpha, beta = (
            math.atan2(2 * kite, d * d + r * r - s * s),
            math.atan2(2 * kite, d * d + s * s - r * r),
        )
        intersection = max(0.0, min(intersection, r * r * alpha + s * s * beta - kite))
    return (
        2 * intersection / (area_p + area_g - intersection + EPS if official else area_p + area_g)
    )


def _size(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def _count_outside(points: Points, box: Box) -> int:
    return sum(not (box[0] <= x <= box[2] and box[1] <= y <= box[3]) for x, y in points)


def _pairs(points: Points) -> list[tuple[Point, Point]]:
    """Every two of the points, from the closest pair to the farthest."""
    return sorted(combinations(points, 2), key=lambda pair: math.dist(*pair))


def _mean_l1(a: Box | Point, b: Box | Point) -> float:
    return sum(abs(p - q) for p, q in zip(a, b)) / len(a)


def _matched_error(p: Points, g: Points, distance: Callable[[Point, Point], float]) -> float:
    """Mean distance of the points from their true ones, in the best of all pairings."""
    return min(sum(map(distance, order, g)) for order in permutations(p)) / len(p)


def reward_terms(
    text: str,
    gt_box: Box,
    gt_points: Points,
    official: bool = False,
    frame: tuple[int, int] | None = None,
) -> Terms:
    """Every term of one completion, each in [0, 1]; what could not be read earns 0, and only that.
    frame: (width, height) of the frame of the coordinates, see 9 and 10 above; None: the 840 canvas."""
    answer, frame = parse_answer(text, official), None if official else frame
    pixel = math.sqrt(math.prod(frame)) / 840 if frame else 1.0  # one pixel of the canvas, in ours
    enough = math.dist(*_pairs(gt_points)[0]) if frame else math.inf
    box_terms = _box_terms(answer.bbox or gt_box, gt_box, gt_points, official)
    point_terms = _point_terms(
        answer.points or gt_points, gt_box, gt_points, official, pixel, enough
    )
    return {
        "think_format": 0.0 if answer.think is None else 1.0 if answer.think.strip() else 0.2,
        "answer_format": ANSWER_FORMAT[answer.problem],
        **(box_terms if answer.bbox else dict.fromkeys(box_terms, 0.0)),
        **(point_terms if answer.points else dict.fromkeys(point_terms, 0.0)),
        **_base_terms(text, answer, gt_box, gt_points, official, pixel),
    }


def _box_terms(box: Box, gt_box: Box, gt_points: Points, official: bool) -> Terms:
    (w, h), (gt_w, gt_h) = _size(box), _size(gt_box)
    offset = _mean_l1(box, gt_box) / max(
        math.hypot(gt_w, gt_h), EPS
    )  # d = mean |edge - edge*| / diag*
    # d = sqrt(ln(A/A*)² + ln(r/r*)²) with r = w/h is sqrt(2) sqrt(a² + b²) with a = ln(w/w*) and b = ln(h/h*)
    a, b = (
        math.log(max(side, EPS)) - math.log(max(true, EPS)) for side, true in ((w, gt_w), (h, gt_h))
    )
    scale = math.sqrt(2) * math.hypot(a, b)
    v1 = 0.5 ** _count_outside(gt_points, box)  # the true points are in B
    v2 = 1.0 if 0.5 * gt_w * gt_h < w * h < 2 * gt_w * gt_h else 0.5  # A*/2 < A < 2A*
    return _gated(
        {
            "box_iou": smooth_log(box_iou(box, gt_box)),
            "box_align": smooth_exp(min(offset, 2.0), k=3, c=1, v_max=2),
            "box_scale": smooth_exp(min(scale, 1.0), k=3, c=0.5, v_max=2 if official else 1),
        },
        v1,
        v2,
        official,
    )


def _point_terms(
    points: Points, gt_box: Box, gt_points: Points, official: bool, pixel: float, enough: float
) -> Terms:
    offset = _matched_error(points, gt_points, _mean_l1) / max(math.hypot(*_size(gt_box)), EPS)
    # |cos| of the angle between the lines P1P2 and G1G2; points that coincide have no direction
    (ux, uy), (vx, vy) = (
        (b[0] - a[0], b[1] - a[1]) for a, b in (_pairs(points)[-1], _pairs(gt_points)[-1])
    )
    directed = (ux or uy) and (vx or vy)
    cosine = abs(math.cos(math.atan2(uy, ux) - math.atan2(vy, vx))) if directed else 0.0
    v1 = 0.5 ** _count_outside(points, gt_box)  # P1 and P2 are in B*
    apart = math.dist(*_pairs(points)[0])
    v2 = 1.0 if apart > 10 * pixel or apart >= enough else 0.5  # two points, not one said twice
    return _gated(
        {
            "point_dice": smooth_log(point_dice(points, gt_points, official, pad=EPS)),
            "point_align": smooth_exp(min(offset, 2.0), k=3, c=1, v_max=2),
            "point_angle": smooth_log(cosine),
        },
        v1,
        v2,
        official,
    )


def _gated(terms: Terms, v1: float, v2: float, official: bool) -> Terms:
    """R' = R (0.7 + 0.3 (V1 + V2)/2), in [0, 1] (multiplied out: released 0.1 · 0.8125 rounds down to 0.0812)."""
    gated = {
        name: min(1.0, max(0.0, 0.7 * r + 0.3 * r * (v1 + v2) / 2)) for name, r in terms.items()
    }
    return {name: round(r, 4) for name, r in gated.items()} if official else gated


def _base_terms(
    text: str, answer: Answer, gt_box: Box, gt_points: Points, official: bool, pixel: float
) -> Terms:
    """Seg-Zero's five binary terms (arXiv 2503.06520), which the paper compares with."""
    before, think, rest = _split(text, "<think>", "</think>")
    between, body, after = _split(rest, "<answer>", "</answer>")
    nothing_else = think is not None and body is not None and not (before + between + after).strip()
    if official:
        answer = _read_fields(
            think, _load_object("{" + (_split(text, "{", "}")[1] or "") + "}"), official
        )
    box, points, iou, l1, near = answer.bbox, answer.points, False, False, False
    if box and not official:
        wide, gt_wide = (
            (*b[:2], b[2] + pixel, b[3] + pixel) for b in (box, gt_box)
        )  # 0..9: ten pixels
        iou, l1 = box_iou(wide, gt_wide) > 0.5, _mean_l1(box, gt_box) < 10 * pixel
    if box and points and _matched_error(points, gt_points, math.dist) < 100 * pixel:
        near = not _count_outside(
            [(int(x), int(y)) for x, y in points] if official else points, box
        )
    return dict(zip(MODES["base"], map(float, (nothing_else, answer.problem == "", iou, l1, near))))


def total_reward(terms: Terms, mode: str, weights: Terms | None = None) -> float:
    """The sum of a mode's terms. A weight multiplies its term, and switches it on if the mode lacks it.
    ValueError for an unknown mode or term, and for a weight that is not finite."""
    if mode not in MODES:
        raise ValueError(f"unknown reward mode {mode!r}; known: {', '.join(MODES)}")
    factors = dict.fromkeys(MODES[mode], 1.0) | (weights or {})
    if wrong := sorted(
        name for name, w in factors.items() if name not in terms or not math.isfinite(w)
    ):
        raise ValueError(
            f"reward term {', '.join(wrong)}: not known or no finite weight; known: {', '.join(terms)}"
        )
    return sum(factor * terms[name] for name, factor in factors.items())


def reward_formula(mode: str, weights: Terms | None = None) -> tuple[str, float]:
    """What is summed and the most it can be: ("think_format + answer_format + 3 box_iou + point_dice", 6.0).
    ValueError as in total_reward."""
    total_reward(
        reward_terms("", (0, 0, 1, 1), ((0, 0),) * KEY_POINTS) | {"mask_dice": 0.0}, mode, weights
    )
    used = {name: w for name, w in (dict.fromkeys(MODES[mode], 1.0) | (weights or {})).items() if w}
    text = " + ".join(name if w == 1 else f"{w:g} {name}" for name, w in used.items())
    return text.replace("+ -", "- ") or "0", float(sum(max(0.0, w) for w in used.values()))
