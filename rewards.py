"""From a completion and the truth to a reward: read the answer, score its terms, add them up.

    terms = reward_terms(text, gt_box, gt_points)      # every term, each in [0, 1]
    reward = total_reward(terms, "soft")               # the sum of the mode's terms

To add a term, add one line to a dict in `box_terms`, `point_terms` or `reward_terms`. The flag
`--coefficients name=0.5` uses it at once, and an entry in MODES makes it a part of a mode.
The caller adds terms that need the segmenter's mask. Their names are in PIXEL_TERMS.
To change the answer format, change `write_answer` and `parse_answer`. Prompts and SFT targets
follow them.

Boxes (x1, y1, x2, y2) and points (x, y) are pixels of one common frame. In training that is the
model frame. The formulas are MedReasoner's (arXiv 2508.08177). In the docstrings B is the predicted
box, A its area, P1 and P2 are the predicted points. B*, A*, G1 and G2 are the true ones.
The code that the paper released differs in ten places. extras/official_rewards.py lists them and
reproduces its numbers.

Read next: data.py, where questions, prompts and coordinate frames come from.
"""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

Point = tuple[float, float]
Points = tuple[Point, Point]  # their order never matters
Box = tuple[float, float, float, float]
Terms = dict[str, float]  # name: value

KEYS = ("bbox", "points_1", "points_2")  # of the answer's JSON object
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
PIXEL_TERMS = ("mask_dice",)  # smooth_log of the mask's Dice, which only the caller can compute
ANSWER_FORMAT_SCORES = {  # everything that can be wrong with an answer, and what it still earns
    "no answer block": 0.0,
    "answer is not a JSON object": 0.2,
    "a key is missing": 0.4,
    "box and points malformed": 0.4,
    "box malformed": 0.6,
    "points malformed": 0.6,
    "": 1.0,
}
CANVAS = 840  # side of the square images of the paper's data: lengths in pixels are meant for it
EPS = 1e-5  # keeps empty boxes and coinciding points out of denominators and logarithms


# ---------------------------------------------------------------- the answer, written and read


@dataclass(frozen=True)
class Answer:
    """What could be read from a completion. Bad output is a value here, never an error."""

    think: str | None  # "" if the block is empty, None if there is none
    bbox: Box | None  # box and points fail separately
    points: Points | None
    problem: str  # "" or one short reason, a key of ANSWER_FORMAT_SCORES

    @property
    def regions(self) -> tuple[tuple[Box | None, Points | None], ...]:
        """The (bbox, points) of each region that the segmenter draws."""
        return ((self.bbox, self.points),)


def write_answer(bbox: Box | tuple[str, ...], points: Points | tuple[tuple[str, ...], ...]) -> str:
    """The answer block that `parse_answer` reads.

    It is made of numbers or, as the example in a prompt, of their names ("x1", "y1", …).
    ValueError unless there are two points."""
    fields = []
    for key, values in zip(KEYS, (bbox, *points), strict=True):
        numbers = ", ".join(str(value) for value in values)
        fields.append(f'"{key}": [{numbers}]')
    return "<answer>{" + ", ".join(fields) + "}</answer>"


def parse_answer(text: str) -> Answer:
    """Read <think>…</think> <answer>{"bbox": [4], "points_1": [2], "points_2": [2]}</answer>.

    Single quotes and a ```json fence around the object are also accepted. No text raises an error,
    and the time is linear in its length."""
    think, body, fields = answer_fields(text)
    if body is None:
        return Answer(think, None, None, "no answer block")
    if fields is None:
        return Answer(think, None, None, "answer is not a JSON object")
    box = read_box(fields)
    points = read_points(fields)
    return Answer(think, box, points, problem_of(fields, box, points))


def answer_fields(text: str) -> tuple[str | None, str | None, dict | None]:
    """What is inside the think block, inside the answer block, and the JSON object there.

    Each is None where there is none. The answer is looked for after </think>, so that a draft of an
    answer in the thoughts does not count."""
    _, think, rest = split_block(text, "<think>", "</think>")
    _, body, _ = split_block(rest, "<answer>", "</answer>")
    if body is None:
        return think, None, None
    unfenced = body.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    return think, body, load_object(unfenced)


def split_block(text: str, opening: str, closing: str) -> tuple[str, str | None, str]:
    """The text before, inside and after the first block. Without a block: (text, None, text)."""
    before, opened, rest = text.partition(opening)
    inside, closed, after = rest.partition(closing)
    if not opened or not closed:
        return text, None, text
    return before, inside, after


def load_object(body: str) -> dict | None:
    """The object in a text, with double quotes or, as in the released prompt, single ones."""
    fields = load_json_object(body)
    if fields is None:
        fields = load_json_object(body.replace("'", '"'))
    return fields


def load_json_object(body: str) -> dict | None:
    """The JSON object in a text, or None. Each of its numbers is a float."""
    try:
        # int() raises an error for 5,000 digits; float() makes them inf
        value = json.loads(body, parse_int=float)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_box(fields: dict) -> Box | None:
    """The box in an answer's object: four finite numbers, x1 < x2 and y1 < y2. Otherwise None."""
    box = read_numbers(fields, "bbox", 4)
    if box is None:
        return None
    x1, y1, x2, y2 = box
    return box if x1 < x2 and y1 < y2 else None


def read_points(fields: dict) -> Points | None:
    """The key points in an answer's object: two finite numbers each. Otherwise None."""
    points = tuple(read_numbers(fields, key, 2) for key in KEYS[1:])
    return None if None in points else points


def read_numbers(fields: dict, key: str, count: int) -> tuple[float, ...] | None:
    """The list of `count` finite numbers under a key, as a tuple. Otherwise None.

    NaN, Infinity, 1e999, true, text and nested lists are not finite numbers."""
    values = fields.get(key)
    if not isinstance(values, list) or len(values) != count:
        return None
    for value in values:
        # every JSON number was read as a float, and true is no float
        if not isinstance(value, float) or not math.isfinite(value):
            return None
    return tuple(values)


def problem_of(fields: dict, box: Box | None, points: Points | None) -> str:
    """What is wrong with an answer's object, given what could be read from it; "" if nothing is."""
    if any(key not in fields for key in KEYS):
        return "a key is missing"
    if box is None and points is None:
        return "box and points malformed"
    if box is None:
        return "box malformed"
    if points is None:
        return "points malformed"
    return ""


# ---------------------------------------------------------------- the terms


def reward_terms(
    text: str, gt_box: Box, gt_points: Points, size: tuple[int, int] | None = None
) -> Terms:
    """Every term of one completion, each in [0, 1]. What could not be read earns 0, and only that.

    size: (width, height) of the image in the frame of the coordinates. The paper's lengths (10 px,
    100 px, "+1") are meant for a canvas of 840 x 840, and with a size they are scaled to the image.
    Points as far apart as the true ones are far enough then. Without a size nothing is scaled."""
    answer = parse_answer(text)

    # Without a box its terms are 0, and the true box stands in to give their names.
    box = answer.bbox or gt_box
    of_box = gated(box_terms(box, gt_box), box_gates(box, gt_box, gt_points))
    if answer.bbox is None:
        of_box = dict.fromkeys(of_box, 0.0)

    points = answer.points or gt_points
    gates = point_gates(points, gt_box, gt_points, size)
    of_points = gated(point_terms(points, gt_box, gt_points), gates)
    if answer.points is None:
        of_points = dict.fromkeys(of_points, 0.0)

    return {
        "think_format": think_format(answer.think),
        "answer_format": ANSWER_FORMAT_SCORES[answer.problem],
        **of_box,
        **of_points,
        **base_terms(text, answer, gt_box, gt_points, size),
    }


def think_format(think: str | None) -> float:
    """0 without a think block, 0.2 for a blank one, otherwise 1."""
    if think is None:
        return 0.0
    if not think.strip():
        return 0.2
    return 1.0


def box_terms(box: Box, gt_box: Box) -> Terms:
    """The terms of a box, before the gates. Edges are off by so many diagonals of B* on average."""
    offset = mean_l1(box, gt_box) / box_diagonal(gt_box)
    scale = scale_error(box, gt_box)
    return {
        "box_iou": smooth_log(box_iou(box, gt_box)),
        "box_align": smooth_exp(min(offset, 2.0), k=3, c=1, v_max=2),
        "box_scale": smooth_exp(min(scale, 1.0), k=3, c=0.5, v_max=1),
    }


def box_gates(box: Box, gt_box: Box, gt_points: Points) -> tuple[float, float]:
    """V1, halved for each true point outside B, and V2, halved unless A*/2 < A < 2A*."""
    area = math.prod(box_size(box))
    gt_area = math.prod(box_size(gt_box))
    v1 = 0.5 ** count_outside(gt_points, box)
    v2 = 1.0 if 0.5 * gt_area < area < 2 * gt_area else 0.5
    return v1, v2


def point_terms(points: Points, gt_box: Box, gt_points: Points) -> Terms:
    """The terms of the key points, before the gates. They are off by so many diagonals of B*."""
    offset = matched_error(points, gt_points, mean_l1) / box_diagonal(gt_box)
    cosine = line_cosine(points, gt_points)
    return {
        "point_dice": smooth_log(point_dice(points, gt_points, pad=EPS)),
        "point_align": smooth_exp(min(offset, 2.0), k=3, c=1, v_max=2),
        "point_angle": smooth_log(cosine),
    }


def point_gates(
    points: Points, gt_box: Box, gt_points: Points, size: tuple[int, int] | None
) -> tuple[float, float]:
    """V1, halved for each predicted point outside B*, and V2, halved unless they are far apart.

    More than 10 px is far: the answer has two points, not one point twice. Given the image's size,
    the 10 px are scaled to it, and as far apart as the true points are is also far enough."""
    v1 = 0.5 ** count_outside(points, gt_box)
    apart = math.dist(*points)
    far_apart = apart > 10 * canvas_pixel(size)
    if size is not None and apart >= math.dist(*gt_points):
        far_apart = True
    v2 = 1.0 if far_apart else 0.5
    return v1, v2


def gated(terms: Terms, gates: tuple[float, float]) -> Terms:
    """R' = R (0.7 + 0.3 (V1 + V2) / 2) of every term, kept in [0, 1]."""
    v1, v2 = gates
    found = {}
    for name, r in terms.items():
        value = 0.7 * r + 0.3 * r * (v1 + v2) / 2
        found[name] = min(1.0, max(0.0, value))
    return found


def base_terms(
    text: str, answer: Answer, gt_box: Box, gt_points: Points, size: tuple[int, int] | None
) -> Terms:
    """Seg-Zero's five binary terms (arXiv 2503.06520), which the paper compares with."""
    pixel = canvas_pixel(size)
    box = answer.bbox
    points = answer.points
    overlaps = False
    edges_are_near = False
    points_are_near = False
    if box is not None:
        # here x2 and y2 are the last pixels inside: from 0 to 9 are ten pixels
        overlaps = box_iou(widened(box, pixel), widened(gt_box, pixel)) > 0.5
        edges_are_near = mean_l1(box, gt_box) < 10 * pixel
    if box is not None and points is not None and count_outside(points, box) == 0:
        points_are_near = matched_error(points, gt_points, math.dist) < 100 * pixel
    return {
        "base_think": float(is_think_then_answer(text)),
        "base_answer": float(answer.problem == ""),
        "base_iou": float(overlaps),
        "base_box_l1": float(edges_are_near),
        "base_points": float(points_are_near),
    }


def is_think_then_answer(text: str) -> bool:
    """Whether a completion is a think block and then an answer block, and nothing else."""
    before, think, rest = split_block(text, "<think>", "</think>")
    between, body, after = split_block(rest, "<answer>", "</answer>")
    if think is None or body is None:
        return False
    outside = before + between + after
    return not outside.strip()


def widened(box: Box, pixel: float) -> Box:
    """A box with its right and lower edges one pixel further out."""
    x1, y1, x2, y2 = box
    return x1, y1, x2 + pixel, y2 + pixel


# ---------------------------------------------------------------- the reward


def total_reward(terms: Terms, mode: str, coefficients: Terms | None = None) -> float:
    """The sum of a mode's terms.

    A coefficient multiplies its term, and adds the term if the mode lacks it.
    ValueError for an unknown mode or term, and for a coefficient that is not finite."""
    factors = mode_coefficients(mode, coefficients, known=terms)
    return sum(factor * terms[name] for name, factor in factors.items())


def reward_formula(mode: str, coefficients: Terms | None = None) -> tuple[str, float]:
    """What is summed, and the most that it can be.

    For example ("think_format + answer_format + 3 box_iou + point_dice", 6.0).
    ValueError as in total_reward."""
    factors = mode_coefficients(mode, coefficients, known=term_names())
    summands = []
    for name, factor in factors.items():
        if factor == 1:
            summands.append(name)
        elif factor != 0:
            summands.append(f"{factor:g} {name}")
    text = " + ".join(summands).replace("+ -", "- ")
    maximum = sum(max(0.0, factor) for factor in factors.values())
    return text or "0", float(maximum)


def mode_coefficients(mode: str, coefficients: Terms | None, known: Collection[str]) -> Terms:
    """The coefficient of every term that is summed. It is 1 where none is given.

    known: the names of all terms that exist.
    ValueError for an unknown mode or term, and for a coefficient that is not finite."""
    if mode not in MODES:
        raise ValueError(f"unknown reward mode {mode!r}; known: {', '.join(MODES)}")
    factors = dict.fromkeys(MODES[mode], 1.0)
    factors.update(coefficients or {})
    unknown = sorted(name for name in factors if name not in known)
    if unknown:
        raise ValueError(f"unknown reward term {', '.join(unknown)}; known: {', '.join(known)}")
    for name, factor in factors.items():
        if not math.isfinite(factor):
            raise ValueError(f"reward term {name}: its coefficient {factor} is not a finite number")
    return factors


def term_names() -> tuple[str, ...]:
    """The names of all terms. Even an empty completion has all of them but PIXEL_TERMS."""
    terms = reward_terms("", gt_box=(0, 0, 1, 1), gt_points=((0, 0), (1, 1)))
    return (*terms, *PIXEL_TERMS)


def parse_coefficients(text: str) -> Terms:
    """The flag --coefficients: "box_iou=2,mask_dice=1" gives {"box_iou": 2.0, "mask_dice": 1.0}.

    ValueError for what is not term=number, and as in total_reward."""
    coefficients = {}
    for item in text.split(","):
        if not item:
            continue
        name, _, number = item.partition("=")
        try:
            coefficients[name.strip()] = float(number)
        except ValueError:
            raise ValueError(
                f"--coefficients {text}: give term=number, separated by commas"
            ) from None
    try:
        mode_coefficients("soft", coefficients, known=term_names())
    except ValueError as error:
        raise ValueError(f"--coefficients {text}: {error}") from None
    return coefficients


# ---------------------------------------------------------------- smoothing and geometry


def smooth_log(v: float, k: float = 3) -> float:
    """S_log = 0.9 ln(kv + 1) / ln(k + 1) + 0.1, rising from S(0) = 0.1 to S(1) = 1 exactly.

    It starts above 0, as an attempt beats no answer."""
    return 0.9 * (math.log(k * v + 1) / math.log(k + 1)) + 0.1


def smooth_exp(v: float, k: float, c: float, v_max: float) -> float:
    """S_exp = 0.9 (σ(v) - σ(v_max)) / (σ(0) - σ(v_max)) + 0.1, falling from 1 to S(v_max) = 0.1.

    Here σ(t) = 1 / (1 + e^{k(t - c)})."""
    at_zero = 1 / (1 + math.exp(k * (0 - c)))
    at_v = 1 / (1 + math.exp(k * (v - c)))
    at_end = 1 / (1 + math.exp(k * (v_max - c)))
    return 0.9 * ((at_v - at_end) / (at_zero - at_end)) + 0.1


def box_size(box: Box) -> tuple[float, float]:
    """Width and height of a box."""
    x1, y1, x2, y2 = box
    return x2 - x1, y2 - y1


def box_diagonal(box: Box) -> float:
    """The length of a box's diagonal. It is at least EPS, because offsets are divided by it."""
    width, height = box_size(box)
    return max(math.hypot(width, height), EPS)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union I / U, in [0, 1]. An area is (x2 - x1)(y2 - y1), without any "+1"."""
    overlap_x = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    overlap_y = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = overlap_x * overlap_y
    if intersection == 0:
        return 0.0
    union = math.prod(box_size(a)) + math.prod(box_size(b)) - intersection
    return min(1.0, intersection / max(union, EPS))


def point_dice(p: Points, g: Points, pad: float = 0.0) -> float:
    """pDice: Dice 2I / (A + A*), in [0, 1], of the circles that have P1P2 and G1G2 as diameters.

    `pad` widens both radii by as many pixels, so that points that coincide also have a circle."""
    area_p, area_g, intersection = circle_areas(p, g, pad)
    if intersection == 0:
        return 0.0
    return 2 * intersection / (area_p + area_g)


def point_dice_published(p: Points, g: Points, pad: float = 0.0) -> float:
    """pDice as in the paper's tables: 2I / U, in [0, 2], twice the circles' Jaccard index."""
    area_p, area_g, intersection = circle_areas(p, g, pad)
    if intersection == 0:
        return 0.0
    return 2 * intersection / (area_p + area_g - intersection + EPS)


def circle_areas(p: Points, g: Points, pad: float) -> tuple[float, float, float]:
    """The areas of the circles of two pairs of points, and the area that both circles share."""
    centre_p, radius_p = circle(p)
    centre_g, radius_g = circle(g)
    r = radius_p + pad
    s = radius_g + pad
    d = math.dist(centre_p, centre_g)
    return disc_area(r), disc_area(s), lens_area(r, s, d)


def circle(points: Points) -> tuple[Point, float]:
    """Centre and radius of the circle that has the line between two points as its diameter."""
    (x1, y1), (x2, y2) = points
    centre = ((x1 + x2) / 2, (y1 + y2) / 2)
    return centre, math.dist(*points) / 2


def disc_area(radius: float) -> float:
    """The area inside a circle."""
    return math.pi * radius * radius


def lens_area(r: float, s: float, d: float) -> float:
    """The area that two circles share. Their radii are r and s, and their centres are d apart."""
    smaller_disc = min(disc_area(r), disc_area(s))
    if d >= r + s:  # they are apart
        return 0.0
    if d <= abs(r - s):  # one lies inside the other
        return smaller_disc
    # The circles cross in two points. The lens is a sector of either circle, less the kite of the
    # two centres and the two crossings. The kite is twice a triangle of the sides r, s, d (Heron).
    kite = math.sqrt((r + s - d) * (d + (r - s)) * (d - (r - s)) * (d + r + s)) / 2
    half_angle_r = math.atan2(2 * kite, d * d + r * r - s * s)
    half_angle_s = math.atan2(2 * kite, d * d + s * s - r * r)
    lens = r * r * half_angle_r + s * s * half_angle_s - kite
    return max(0.0, min(smaller_disc, lens))


def line_cosine(p: Points, g: Points) -> float:
    """|cos| of the angle between the lines P1P2 and G1G2.

    Points that coincide have no direction, and the result is 0."""
    if p[0] == p[1] or g[0] == g[1]:
        return 0.0
    return abs(math.cos(direction(p) - direction(g)))


def direction(points: Points) -> float:
    """The angle of the line from the first point to the second, in radians."""
    (x1, y1), (x2, y2) = points
    return math.atan2(y2 - y1, x2 - x1)


def count_outside(points: Points, box: Box) -> int:
    """How many of the points lie outside a box. The edges belong to the box."""
    x1, y1, x2, y2 = box
    inside = [x1 <= x <= x2 and y1 <= y <= y2 for x, y in points]
    return inside.count(False)


def mean_l1(a: Box | Point, b: Box | Point) -> float:
    """The mean absolute difference of the coordinates of two boxes or of two points."""
    return sum(abs(p - q) for p, q in zip(a, b)) / len(a)


def matched_error(p: Points, g: Points, distance: Callable[[Point, Point], float]) -> float:
    """The mean distance of the points from their true ones, in the better of the two pairings."""
    straight = distance(p[0], g[0]) + distance(p[1], g[1])
    crossed = distance(p[1], g[0]) + distance(p[0], g[1])
    return min(straight, crossed) / 2


def scale_error(box: Box, gt_box: Box) -> float:
    """sqrt(ln(A/A*)² + ln(r/r*)²), where r = w/h: how far a box is from the true area and shape.

    With a = ln(w/w*) and b = ln(h/h*), ln(A/A*) is a + b and ln(r/r*) is a - b, so the root is
    sqrt(2) sqrt(a² + b²). Written so, no product of sides can overflow."""
    width, height = box_size(box)
    gt_width, gt_height = box_size(gt_box)
    a = math.log(max(width, EPS)) - math.log(max(gt_width, EPS))
    b = math.log(max(height, EPS)) - math.log(max(gt_height, EPS))
    return math.sqrt(2) * math.hypot(a, b)


def canvas_pixel(size: tuple[int, int] | None) -> float:
    """The length that one pixel of the 840 x 840 canvas has in an image of this (width, height).

    It is 1 without a size: the image is the canvas."""
    if size is None:
        return 1.0
    return math.sqrt(math.prod(size)) / CANVAS
