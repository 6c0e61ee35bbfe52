"""What a completion earns: read the answer, score it term by term, add the terms up.

    terms = reward_terms(text, gt_box, gt_points)      # every term, each in [0, 1]
    reward = total_reward(terms, "soft")               # the sum of the mode's terms

To add a term: write its formula in `_box_terms` or `_point_terms`, name it in BOX_TERMS or POINT_TERMS, and
put it into a mode; a term in no mode counts once it has a weight. A term that needs more than text and truth
is added by the caller: terms["mask_dice"] = smooth_log(dice).

Boxes (x1, y1, x2, y2) and points (x, y) are pixels of one common frame, the model frame when training.
Formulas: MedReasoner, arXiv 2508.08177. `official=True` reproduces its released code, which differs so:
 1. pDice is a true Dice, 2I/(A+A*), at most 1. Released: 2I/U, at most 2, so twice the Jaccard index.
 2. box_scale falls to 0.1 at its clip. Released: normalised as if clipped at 2, so never below 0.291.
 3. All of `base` works. Released: IoU and L1 are always 0, the answer is any first {...}, in double quotes.
 4. A box needs x1 < x2 and y1 < y2. Released: inverted boxes pass.
 5. The answer is looked for after </think>. Released: anywhere, so a draft in the thoughts counts.
 6. Nothing is rounded. Released: box and point terms have four decimals, and unions are 1e-5 px² too big.
 7. A ```json fence around the object is taken off. Released: it makes the answer no JSON.
"""

import json
import math
from dataclasses import dataclass

Point = tuple[float, float]
Pair = tuple[Point, Point]  # which of the two comes first never matters
Box = tuple[float, float, float, float]

FORMATS = ("think_format", "answer_format")
BOX_TERMS = ("box_iou", "box_align", "box_scale")
POINT_TERMS = ("point_dice", "point_align", "point_angle")
BASE_TERMS = ("base_think", "base_answer", "base_iou", "base_box_l1", "base_points")
MODES = {
    "soft": (*FORMATS, "box_iou", "point_dice"),
    "hard": (*FORMATS, *BOX_TERMS, *POINT_TERMS),
    "base": BASE_TERMS,
    "iou": (*FORMATS, "box_iou"),
    "pdice": (*FORMATS, "point_dice"),
}
ANSWER_FORMAT = {  # everything that can be wrong with an answer, and the answer_format it still earns
    "no answer block": 0.0, "answer is not a JSON object": 0.2, "a key is missing": 0.4,
    "box and points malformed": 0.4, "box malformed": 0.6, "points malformed": 0.6, "": 1.0,
}
MAX_BRACKETS = 64  # an answer needs four; a thousand nested ones would overflow the JSON decoder's stack
EPS = 1e-5  # keeps empty boxes and coinciding points out of denominators and logarithms


# ---- reading the answer: bad output is a value here, so nothing below raises on any text ----
@dataclass(frozen=True)
class Answer:
    """What could be read of a completion, in the model's frame; box and points fail separately."""
    think: str | None  # "" if the block is empty, None if there is none
    bbox: Box | None
    points: Pair | None
    problem: str  # "" or one short reason, a key of ANSWER_FORMAT


def parse_answer(text: str, official: bool = False) -> Answer:
    """Read <think>…</think> <answer>{"bbox": [4], "points_1": [2], "points_2": [2]}</answer> in linear time.

    Single quotes do as well, and so does a ```json fence.
    official: takes an answer inside the thoughts and inverted boxes, but no fence.
    """
    _, think, rest = _split(text, "<think>", "</think>")
    _, body, _ = _split(text if official else rest, "<answer>", "</answer>")
    if body is None:
        return Answer(think, None, None, "no answer block")
    if not official:
        body = body.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    fields = _load_object(body) or _load_object(body.replace("'", '"'))  # the released prompt has '
    return _read_fields(think, fields, official)


def _split(text: str, opening: str, closing: str) -> tuple[str, str | None, str]:
    """(before, inside, after) the first opening…closing, or (text, None, text) if there is no such block."""
    before, opened, rest = text.partition(opening)
    inside, closed, after = rest.partition(closing)
    return (before, inside, after) if opened and closed else (text, None, text)


def _load_object(body: str) -> dict | None:
    if body.count("[") + body.count("{") > MAX_BRACKETS:
        return None
    try:
        value = json.loads(body, parse_int=float)  # int() refuses 10,000 digits, float() makes them inf
    except json.JSONDecodeError:
        return None
    return value if isinstance(value, dict) else None


def _read_fields(think: str | None, fields: dict | None, official: bool) -> Answer:
    if fields is None:
        return Answer(think, None, None, "answer is not a JSON object")
    box = _numbers(fields.get("bbox"), 4)
    if box and not official and not (box[0] < box[2] and box[1] < box[3]):
        box = None
    pair = _numbers(fields.get("points_1"), 2), _numbers(fields.get("points_2"), 2)
    points = pair if all(pair) else None
    if not {"bbox", "points_1", "points_2"} <= fields.keys():
        return Answer(think, box, points, "a key is missing")
    bad = [name for name, value in (("box", box), ("points", points)) if value is None]
    return Answer(think, box, points, " and ".join(bad) + " malformed" if bad else "")


def _numbers(value: object, count: int) -> tuple[float, ...] | None:
    """A list of `count` finite numbers as a tuple; None for NaN, Infinity, 1e999, true, text, nesting."""
    good = isinstance(value, list) and len(value) == count
    return tuple(value) if good and all(isinstance(v, float) and math.isfinite(v) for v in value) else None


# ---- smoothing: perfect gives exactly 1, useless gives 0.1, so that an attempt beats no answer ----
def smooth_log(v: float, k: float = 3) -> float:
    """S_log = 0.9 ln(kv + 1) / ln(k + 1) + 0.1, rising from S(0) = 0.1 to S(1) = 1, steepest near 0."""
    return 0.9 * (math.log(k * v + 1) / math.log(k + 1)) + 0.1


def smooth_exp(v: float, k: float, c: float, v_max: float) -> float:
    """S_exp = 0.9 (σ(v) - σ(v_max)) / (σ(0) - σ(v_max)) + 0.1 with σ(t) = 1 / (1 + e^{k(t - c)}), falling."""
    start, here, end = (1 / (1 + math.exp(k * (t - c))) for t in (0, v, v_max))  # σ(0), σ(v), σ(v_max)
    return 0.9 * ((here - end) / (start - end)) + 0.1


# ---- plain metrics ----
def box_iou(a: Box, b: Box) -> float:
    """Intersection over union I / U, in [0, 1]; an area is (x2 - x1)(y2 - y1), without any "+1"."""
    overlap_x = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    overlap_y = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = overlap_x * overlap_y
    union = math.prod(_size(a)) + math.prod(_size(b)) - intersection
    return min(1.0, intersection / max(union, EPS)) if intersection else 0.0


def point_dice(p: Pair, g: Pair, official: bool = False, pad: float = 0.0) -> float:
    """Dice 2I / (A + A*) of the circles with the pairs as diameters, in [0, 1]; official: 2I / U, in [0, 2].

    `pad` (px) widens both radii: the reward uses a little, so that coinciding points still have a circle.
    """
    r, s = math.dist(*p) / 2 + pad, math.dist(*g) / 2 + pad
    d = math.dist(*(((a[0] + b[0]) / 2, (a[1] + b[1]) / 2) for a, b in (p, g)))  # between the centres
    area_p, area_g = math.pi * r * r, math.pi * s * s
    intersection = 0.0
    if d <= abs(r - s):
        intersection = min(area_p, area_g)
    elif d < r + s:  # a lens: a sector of either circle, less the kite of the centres and the two crossings
        kite = math.sqrt((r + s - d) * (d + (r - s)) * (d - (r - s)) * (d + r + s)) / 2  # its area, by Heron
        alpha, beta = math.atan2(2 * kite, d * d + r * r - s * s), math.atan2(2 * kite, d * d + s * s - r * r)
        intersection = max(0.0, min(area_p, area_g, r * r * alpha + s * s * beta - kite))
    if not intersection:
        return 0.0
    return 2 * intersection / (area_p + area_g - intersection + EPS if official else area_p + area_g)


def _size(box: Box) -> tuple[float, float]:
    return box[2] - box[0], box[3] - box[1]


def _inside(point: Point, box: Box) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _edge_error(a: Box, b: Box) -> float:
    return sum(abs(p - q) for p, q in zip(a, b)) / 4


def _pair_error(p: Pair, g: Pair, distance) -> float:
    """Mean distance of the two points from their true ones, in the better of the two pairings."""
    (p1, p2), (g1, g2) = p, g
    return min(distance(p1, g1) + distance(p2, g2), distance(p1, g2) + distance(p2, g1)) / 2


# ---- the terms: arXiv 2508.08177, accuracy rewards; B, A, P are predicted and B*, A*, G true ----
def reward_terms(text: str, gt_box: Box, gt_points: Pair, official: bool = False) -> dict[str, float]:
    """Every reward term of one completion, each in [0, 1]. What could not be read earns 0, and only that."""
    answer = parse_answer(text, official)
    terms = dict.fromkeys(FORMATS + BOX_TERMS + POINT_TERMS, 0.0)
    terms["think_format"] = 0.0 if answer.think is None else 1.0 if answer.think.strip() else 0.2
    terms["answer_format"] = ANSWER_FORMAT[answer.problem]
    if answer.bbox:
        terms |= _box_terms(answer.bbox, gt_box, gt_points, official)
    if answer.points:
        terms |= _point_terms(answer.points, gt_box, gt_points, official)
    return terms | _base_terms(text, answer, gt_box, gt_points, official)


def _box_terms(box: Box, gt_box: Box, gt_points: Pair, official: bool) -> dict[str, float]:
    (w, h), (gt_w, gt_h) = _size(box), _size(gt_box)
    edges = _edge_error(box, gt_box) / max(math.hypot(gt_w, gt_h), EPS)  # d = mean |edge - edge*| / diag*
    # d = sqrt(ln(A/A*)² + ln(r/r*)²) with r = w/h. with a = ln(w/w*) and b = ln(h/h*) these logarithms are
    # a + b and a - b, and d = sqrt(2) sqrt(a² + b²), where no huge side turns into inf - inf
    a, b = (math.log(max(side, EPS)) - math.log(max(true, EPS)) for side, true in ((w, gt_w), (h, gt_h)))
    scale = math.sqrt(2) * math.hypot(a, b)
    v1 = math.prod(1.0 if _inside(point, box) else 0.5 for point in gt_points)  # the true points are in B
    v2 = 1.0 if 0.5 * gt_w * gt_h < w * h < 2 * gt_w * gt_h else 0.5  # A*/2 < A < 2A*
    return _gated({
        "box_iou": smooth_log(box_iou(box, gt_box)),
        "box_align": smooth_exp(min(edges, 2.0), k=3, c=1, v_max=2),
        "box_scale": smooth_exp(min(scale, 1.0), k=3, c=0.5, v_max=2 if official else 1),
    }, v1, v2, official)


def _point_terms(points: Pair, gt_box: Box, gt_points: Pair, official: bool) -> dict[str, float]:
    # d = mean over the pair of (|dx| + |dy|)/2, over diag*
    error = _pair_error(points, gt_points, lambda p, g: (abs(p[0] - g[0]) + abs(p[1] - g[1])) / 2)
    offset = error / max(math.hypot(*_size(gt_box)), EPS)
    # |cos| of the angle between the lines P1P2 and G1G2; a pair that coincides has no direction
    (ux, uy), (vx, vy) = ((b[0] - a[0], b[1] - a[1]) for a, b in (points, gt_points))
    directed = (ux or uy) and (vx or vy)
    cosine = abs(math.cos(math.atan2(uy, ux) - math.atan2(vy, vx))) if directed else 0.0
    v1 = math.prod(1.0 if _inside(point, gt_box) else 0.5 for point in points)  # P1 and P2 are in B*
    v2 = 1.0 if math.dist(*points) > 10 else 0.5  # px: two points, not one said twice
    return _gated({
        "point_dice": smooth_log(point_dice(points, gt_points, official, pad=EPS)),
        "point_align": smooth_exp(min(offset, 2.0), k=3, c=1, v_max=2),
        "point_angle": smooth_log(cosine),
    }, v1, v2, official)


def _gated(terms: dict[str, float], v1: float, v2: float, official: bool) -> dict[str, float]:
    """R' = R (0.7 + 0.3 (V1 + V2)/2), clipped to [0, 1]: implausible answers keep at least 0.81."""
    # multiplied out, because released 0.1 · 0.8125 rounds down to 0.0812
    gated = {name: min(1.0, max(0.0, 0.7 * r + 0.3 * r * (v1 + v2) / 2)) for name, r in terms.items()}
    return {name: round(r, 4) for name, r in gated.items()} if official else gated


def _base_terms(text: str, answer: Answer, gt_box: Box, gt_points: Pair, official: bool) -> dict[str, float]:
    """Seg-Zero's five binary terms (arXiv 2503.06520), which the paper compares with."""
    before, think, rest = _split(text, "<think>", "</think>")
    between, body, after = _split(rest, "<answer>", "</answer>")
    nothing_else = think is not None and body is not None and not (before + between + after).strip()
    if official:
        answer = _read_fields(think, _load_object("{" + (_split(text, "{", "}")[1] or "") + "}"), official)
    box, points = answer.bbox, answer.points
    iou = l1 = near = False
    if box and not official:
        pixels, gt_pixels = ((*b[:2], b[2] + 1, b[3] + 1) for b in (box, gt_box))  # 0..9 is ten pixels wide
        iou, l1 = box_iou(pixels, gt_pixels) > 0.5, _edge_error(box, gt_box) < 10
    if box and points:
        near = all(_inside(p, box) for p in points) and _pair_error(points, gt_points, math.dist) < 100
    return dict(zip(BASE_TERMS, map(float, (nothing_else, answer.problem == "", iou, l1, near))))


def total_reward(terms: dict[str, float], mode: str, weights: dict[str, float] | None = None) -> float:
    """The sum of a mode's terms. A weight multiplies its term, and switches it on if the mode lacks it."""
    if mode not in MODES:
        raise ValueError(f"unknown reward mode {mode!r}; known: {', '.join(MODES)}")
    factors = dict.fromkeys(MODES[mode], 1.0) | (weights or {})
    if unknown := sorted(factors.keys() - terms.keys()):
        raise ValueError(f"unknown reward term {', '.join(unknown)}; known: {', '.join(terms)}")
    return sum(factor * terms[name] for name, factor in factors.items())
