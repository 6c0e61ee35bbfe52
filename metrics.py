"""What is measured of completions: scores of one question, their means and intervals, the tables.

A question's score is the mean over its completions. A table's number is the mean over questions
with its 95 % bootstrap interval. Training's held-out evaluation and evaluate.py score alike:
`prediction` takes a completion's box and points to the image frame as they are, never clipped. A
completion with a problem (see rewards.parse_answer) is a refusal. What can still be read of it
counts, as a good box beside malformed points; what cannot be read scores 0.

To add a metric, add a line to METRICS; `evaluate.py --rescore` computes it for old evaluations.

    p           a prediction: one question with its completions, a line of predictions.jsonl
    completion  one of p["completions"]: text, bbox, points, problem; image frame
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit  # quantiles of Student's t

from data import ANSWER_FORMATS, ONE_BOX, AnswerFormat, Example, Sizes, to_image
from rewards import Answer, box_iou, parse_answer, point_dice, point_dice_published
from runtime.files import parse_object, read_text, write_whole
from runtime.registry import find

Metric = tuple[str, Callable[[dict], float | None]]  # title, function of a prediction

# ---------------------------------------------------------------- one question


def prediction(
    example: Example,
    index: int,
    texts: Sequence[str],
    sizes: Sizes,
    answer_format: AnswerFormat = ONE_BOX,
) -> dict[str, Any]:
    """Returns one question with its completions, as JSON can hold it. Image frame.

    kept    index of the completion to show, see `medoid`
    names   what a trace must say to name the target, from the example's extra "names"
    wording "seen" or "unseen" from its extra "unseen_wording", else its extra "kind"
    image   a digest of the pixels, which tells the questions about one image
    """
    answers = [answer_format.parse(text) for text in texts]
    completions = []
    for text, answer in zip(texts, answers):
        completion = {"text": text, **placed(answer.bbox, answer.points, sizes)}
        completion["problem"] = answer.problem
        if answer_format.several:
            completion["regions"] = [placed(*region, sizes) for region in answer.regions]
        completions.append(completion)
    return {
        "id": example.id,
        "index": index,
        "size": example.image.size,
        "query": example.query,
        "image": image_digest(example),
        "supercategory": example.supercategory,
        "category": example.category,
        "names": names_of(example),
        "wording": wording_of(example),
        "truth": answer_format.truth(example),
        "format": answer_format.key,
        "asked": ["bbox"] if answer_format.several else ["bbox", "points"],
        "completions": completions,
        "kept": medoid(answers)[0],
    }


def placed(bbox: Any, points: Any, sizes: Sizes) -> dict[str, Any]:
    """Returns a box and points of the model frame in the image frame. None stays None."""
    return {
        "bbox": None if bbox is None else to_image(bbox, sizes),
        "points": None if points is None else to_image(points, sizes),
    }


def image_digest(example: Example) -> str:
    """Returns a digest of the pixels: questions about one image have the same."""
    return hashlib.blake2b(example.image.tobytes(), digest_size=8).hexdigest()


def names_of(example: Example) -> list[str]:
    names = example.extra.get("names")
    if not isinstance(names, list):
        return []
    lower = [str(name).strip().lower() for name in names]
    return [name for name in lower if name]  # every text has an empty name


def wording_of(example: Example) -> str | None:
    unseen = example.extra.get("unseen_wording")
    if isinstance(unseen, bool):
        return "unseen" if unseen else "seen"
    kind = str(example.extra.get("kind") or "")
    return kind or None


def medoid(answers: Sequence[Answer]) -> tuple[int | None, float | None]:
    """Returns the index of the answer to keep, and the mean IoU of its box with the other boxes.

    It is the box that agrees most with the others. Any box beats points alone. The index is None
    where nothing can be used; there is no agreement of fewer than two boxes."""
    boxed = [i for i, answer in enumerate(answers) if answer.bbox is not None]
    if not boxed:
        for i, answer in enumerate(answers):
            if answer.points is not None:
                return i, None
        return None, None
    if len(boxed) == 1:
        return boxed[0], None
    agreement = {}
    for i in boxed:
        others = [box_iou(answers[i].bbox, answers[j].bbox) for j in boxed if j != i]
        agreement[i] = float(np.mean(others))
    best = max(boxed, key=agreement.get)
    return best, agreement[best]


def shown(p: dict) -> dict:
    """Returns the kept completion, or the first one where none can be used."""
    return p["completions"][p["kept"] or 0]


def regions_of(completion: dict) -> list[tuple[Any, Any]]:
    """Returns (bbox, points) of everything that a completion points to, image frame."""
    if "regions" in completion:
        return [(region["bbox"], region["points"]) for region in completion["regions"]]
    return [(completion["bbox"], completion["points"])]


# ---------------------------------------------------------------- scores of a completion


def iou(p: dict, completion: dict) -> float | None:
    """Box IoU. 0 without a readable box, None where no box was asked for."""
    if "bbox" not in p["asked"]:
        return None
    if completion["bbox"] is None:
        return 0.0
    return box_iou(completion["bbox"], p["truth"]["bbox"])


def pdice(p: dict, completion: dict) -> float | None:
    """Dice of the points' circles, 2I / (A + A*). 0 without readable points, None where no points
    were asked for."""
    if "points" not in p["asked"]:
        return None
    if completion["points"] is None:
        return 0.0
    return point_dice(completion["points"], p["truth"]["points"])


def published_pdice(p: dict, completion: dict) -> float | None:
    """pDice as the paper's tables have it, 2I / U, in [0, 2]; otherwise as `pdice`."""
    if "points" not in p["asked"]:
        return None
    if completion["points"] is None:
        return 0.0
    return point_dice_published(completion["points"], p["truth"]["points"])


def parsed(p: dict, completion: dict) -> bool:
    return not completion["problem"]


def named(p: dict, completion: dict) -> bool | None:
    """Whether the trace names the target: one of its names occurs there as a word. None where the
    data has no names."""
    if not p["names"]:
        return None
    trace = (parse_answer(completion["text"]).think or "").lower()
    return any(has_word(trace, name) for name in p["names"])


def has_word(text: str, word: str) -> bool:
    """Whether a text has a word, or words, with no letter or digit beside it: "ear" is not in
    "clear", and "t1" is not in "t12". Chinese and the like have no spaces, so there any place
    counts."""
    at = text.find(word)
    while at >= 0:
        end = at + len(word)
        before = text[at - 1 : at]
        after = text[end : end + 1]
        if after == "s":  # a plural
            after = text[end + 1 : end + 2]
        if not goes_on(before, word[:1]) and not goes_on(word[-1:], after):
            return True
        at = text.find(word, at + 1)
    return False


def goes_on(left: str, right: str) -> bool:
    """Whether two neighbouring characters, or the ends of a text (""), are of one word."""
    if not left.isalnum() or not right.isalnum():
        return False
    return left < "\u2e80" and right < "\u2e80"  # from there on: Chinese, Japanese, Korean


def mask_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice 2|M T| / (|M| + |T|) of two (H, W) bool masks, in [0, 1]; 0 when both are empty."""
    total = mask.sum() + truth.sum()
    return float(2 * (mask & truth).sum() / max(1, total))


def mean(p: dict, score: Callable, where: Callable | None = None) -> float | None:
    """Returns the mean of score(p, completion) over the completions for which where(p, completion)
    is true. None where it is undefined for one of them, or where there is none."""
    values = [score(p, c) for c in p["completions"] if where is None or where(p, c)]
    if not values or None in values:
        return None
    return sum(values) / len(values)


# ---------------------------------------------------------------- the metrics


def over_ious(p: dict, function: Callable, at_least: int = 1) -> float | None:
    """Returns a function of the completions' IoUs. None where no box was asked for, and of fewer
    than at_least completions."""
    ious = [iou(p, completion) for completion in p["completions"]]
    if None in ious or len(ious) < at_least:
        return None
    return float(function(ious))


def voted_iou(p: dict) -> float | None:
    """IoU of the kept completion, of two or more."""
    kept = p["kept"]
    return over_ious(p, lambda ious: 0 if kept is None else ious[kept], at_least=2)


def mask_dice_of(p: dict, given: str) -> float | None:
    """Dice of the segmenter's mask, drawn from a part of the kept completion. None without it."""
    if not p.get("dice"):
        return None
    return p["dice"][given]


HELD_OUT: dict[str, Metric] = {  # what training logs of held-out questions
    "iou": ("IoU", lambda p: mean(p, iou)),
    "pdice": ("pDice", lambda p: mean(p, pdice)),
    "parse_ok": ("parse rate", lambda p: mean(p, parsed)),
    "iou_parsed": ("IoU, parsed", lambda p: mean(p, iou, where=parsed)),
    "named": ("named right", lambda p: mean(p, named)),
    "iou_named": ("IoU, named right", lambda p: mean(p, iou, where=named)),
}
METRICS: dict[str, Metric] = {  # name: (title, function of a prediction; None where undefined)
    **HELD_OUT,
    "iou50": ("IoU ≥ 0.5", lambda p: over_ious(p, lambda ious: np.mean(np.array(ious) >= 0.5))),
    "pdice_2iu": ("pDice (2I/U)", lambda p: mean(p, published_pdice)),
    "dice_points": ("Dice, points", lambda p: mask_dice_of(p, "points")),
    "dice_box": ("Dice, box", lambda p: mask_dice_of(p, "box")),
    "dice_one": ("Dice, box and 1 point", lambda p: mask_dice_of(p, "one")),
    "dice_both": ("Dice, box and points", lambda p: mask_dice_of(p, "both")),
    "refused": ("refusals", lambda p: 1 - mean(p, parsed)),
    "voted": ("IoU, voted", voted_iou),
    "best": ("IoU, best of N", lambda p: over_ious(p, max, at_least=2)),
    "pass": ("pass@N", lambda p: over_ious(p, lambda ious: max(ious) >= 0.5, at_least=2)),
    "agreement": ("agreement", lambda p: p.get("agreement")),  # see extras/confidence.py
    "confidence": ("confidence", lambda p: p.get("confidence")),
}


def metrics_of(rows: Sequence[dict]) -> dict[str, Metric]:
    """Returns METRICS and those of the answer format of some predictions."""
    key = rows[0].get("format", "bbox") if rows else "bbox"
    return METRICS | find(ANSWER_FORMATS[key]).metrics


def scores(p: dict, metrics: Mapping[str, Metric] = METRICS) -> dict[str, float | None]:
    """Returns every metric of a prediction."""
    return {name: function(p) for name, (_, function) in metrics.items()}


# ---------------------------------------------------------------- intervals


@dataclass(frozen=True)
class Interval:
    """A mean over questions, its 95 % interval, and what it was computed from."""

    mean: float
    low: float
    high: float
    n: int  # questions
    images: int  # that the questions are about


FEW = 5  # of fewer images an interval says nothing, so a dash is shown


def interval(
    values: Sequence[float | None],
    images: Sequence[Any] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval | None:
    """Returns the mean and its 95 % bootstrap interval over the values that are not None.

    images: what image each value is about. Several questions about one image are not independent,
    so images are drawn, each with all of its questions (None: every value has its own). Deviations
    from the mean are widened by Student's t for the number of images, as the percentiles of a
    bootstrap are too narrow where there are few. None where there is no value."""
    if images is None:
        images = range(len(values))
    of_image: dict[Any, list[float]] = {}
    for value, image in zip(values, images, strict=True):
        if value is not None:
            of_image.setdefault(image, []).append(float(value))
    if not of_image:
        return None
    sums = np.array([sum(found) for found in of_image.values()])
    counts = np.array([len(found) for found in of_image.values()])
    average = sums.sum() / counts.sum()
    count = len(of_image)
    if count == 1:
        return Interval(float(average), float(average), float(average), int(counts.sum()), 1)
    picks = np.random.default_rng(seed).integers(0, count, (draws, count))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    low, high = np.percentile(means, [2.5, 97.5])
    wider = stdtrit(count - 1, 0.975) / 1.96 * np.sqrt(count / (count - 1))
    return Interval(
        mean=float(average),
        low=float(average + wider * (low - average)),
        high=float(average + wider * (high - average)),
        n=int(counts.sum()),
        images=count,
    )


def paired_interval(
    before: Sequence[float | None],
    after: Sequence[float | None],
    images: Sequence[Any] | None = None,
) -> Interval | None:
    """Returns `interval` of after - before over the same questions. A question with None on either
    side is left out."""
    differences = []
    for b, a in zip(before, after, strict=True):
        differences.append(None if b is None or a is None else a - b)
    return interval(differences, images)


def percent(found: Mapping[str, Any] | Interval | None, sign: str = "") -> str:
    """Returns "37.5 [30.0, 45.0]" of an Interval, or of one as a dict; "–" where there is none."""
    if not found:
        return "–"
    if isinstance(found, Interval):
        found = asdict(found)
    average = f"{100 * found['mean']:{sign}.1f}"
    if found.get("images", found["n"]) < FEW:
        return f"{average} [–]"
    low = f"{100 * found['low']:{sign}.1f}"
    high = f"{100 * found['high']:{sign}.1f}"
    return f"{average} [{low}, {high}]"


# ---------------------------------------------------------------- tables


def summarise(rows: Sequence[dict], metrics: Mapping[str, Metric] = METRICS) -> dict[str, Any]:
    """Returns {"all": {"n", metric: {mean, low, high, n, images} or None, …}, "supercategory":
    {name: the same}, "category": {…}, "wording": {…}, "refusals": {reason: count}}.

    rows: predictions."""
    values = [scores(row, metrics) for row in rows]

    def part(chosen: list[int]) -> dict[str, Any]:
        result: dict[str, Any] = {"n": len(chosen)}
        images = [rows[i].get("image") or rows[i]["id"] for i in chosen]
        for name in metrics:
            found = interval([values[i][name] for i in chosen], images)
            result[name] = None if found is None else asdict(found)
        return result

    summary: dict[str, Any] = {"all": part(list(range(len(rows))))}
    for key in ("supercategory", "category", "wording"):
        of_name: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            if row[key]:
                of_name.setdefault(row[key], []).append(i)
        summary[key] = {name: part(of_name[name]) for name in sorted(of_name)}
    problems = Counter(c["problem"] for row in rows for c in row["completions"] if c["problem"])
    summary["refusals"] = dict(problems.most_common())
    return summary


def table(
    summary: dict[str, Any],
    metrics: Mapping[str, Metric] = METRICS,
    parts: Sequence[str] = ("supercategory", "wording", "category"),
) -> str:
    """Returns a summary as Markdown, in percent. parts: by what it is broken down."""
    names = [name for name in metrics if summary["all"].get(name)]

    def line(title: str, part: dict[str, Any]) -> str:
        cells = " | ".join(percent(part[name]) for name in names)
        return f"| {title} | {part['n']} | {cells} |"

    images = max((summary["all"][name]["images"] for name in names), default=0)
    titles = " | ".join(metrics[name][0] for name in names)
    lines = [
        f"Percent, mean over questions about {images} images [95 % bootstrap interval over images; "
        f"– for fewer than {FEW}].",
        "",
        f"| | n | {titles} |",
        "|---" * (len(names) + 2) + "|",
        line("all", summary["all"]),
    ]
    for key in parts:
        if summary[key]:
            title = "super-category" if key == "supercategory" else key
            lines.append(f"| *by {title}* |" + " |" * (len(names) + 1))
            lines += [line(name, part) for name, part in summary[key].items()]
    lines.append("")
    if summary["refusals"]:
        lines.append("Refusals:")
        lines += [f"- {count} × {reason}" for reason, count in summary["refusals"].items()]
    else:
        lines.append("Refusals: none.")
    return "\n".join(lines) + "\n"


def report(rows: Sequence[dict], folder: Path) -> dict[str, Any]:
    """Writes summary.json and table.md of some predictions into a folder, and prints the table.
    Returns the summary."""
    metrics = metrics_of(rows)
    summary = summarise(rows, metrics)
    write_whole(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_whole(folder / "table.md", table(summary, metrics))
    print(table(summary, metrics, parts=("supercategory", "wording")).rstrip())
    print(f"tables {folder / 'table.md'}, numbers {folder / 'summary.json'}")
    return summary


# ---------------------------------------------------------------- two runs on the same questions


def compare(before: Sequence[dict], after: Sequence[dict]) -> list[str]:
    """Returns lines with the paired differences of two lists of predictions, in percent.

    ValueError where they are not about the same questions with the same truth."""
    old = {p["id"]: p for p in before}
    new = {p["id"]: p for p in after}
    unmatched = sorted(old.keys() ^ new.keys())
    if unmatched:
        raise ValueError(f"{len(unmatched)} questions are in only one, the first is {unmatched[0]}")
    for name in old:
        for key in ("truth", "query", "image"):
            if _without_mask(old[name].get(key)) != _without_mask(new[name].get(key)):
                raise ValueError(f"question {name}: its {key} differs between the two")
    images = [old[name].get("image") or name for name in old]
    lines = []
    for title, metric in metrics_of(before).values():
        values = [metric(old[name]) for name in old]
        new_values = [metric(new[name]) for name in old]
        text = change_text(values, new_values, images, in_percent=True)
        if text:
            lines.append(f"  {title:21} {text}")
    return lines


def _without_mask(value: Any) -> Any:
    """Returns a truth without its mask, which an evaluation with --asm none does not keep; numbers
    as JSON gives them back."""
    if isinstance(value, dict):
        value = {key: part for key, part in value.items() if key not in ("mask", "siblings")}
    return json.loads(json.dumps(value))


def changes(held_out: Sequence[dict], metric_rows: Sequence[dict]) -> str:
    """Returns what a training run changed on the held-out split, from its first evaluation to its
    last, and how long it took. The arguments are the rows of held_out.jsonl and metrics.jsonl."""
    steps = sorted({row["step"] for row in held_out})
    # by id: another --eval-limit on --resume gives a question another index
    before = {(row["kind"], row["id"]): row for row in held_out if row["step"] == steps[0]}
    after = {(row["kind"], row["id"]): row for row in held_out if row["step"] == steps[-1]}
    both = [key for key in before if key in after]
    lines = [
        f"\nheld-out split, step {steps[0]} -> {steps[-1]}, mean over questions "
        "[95 % paired bootstrap interval]"
    ]
    lines += change_lines([before[key] for key in both], [after[key] for key in both])
    timed = [row for row in metric_rows if "seconds" in row]
    seconds = [row["seconds"] for row in timed]
    memory = max(row["peak_memory_gb"] for row in timed)
    lines.append(
        f"{np.median(seconds):.2f} s per step (median), {sum(seconds) / 60:.1f} min for all "
        f"{len(seconds)}, peak memory {memory:.2f} GB"
    )
    return "\n".join(lines)


def change_lines(before: Sequence[dict], after: Sequence[dict]) -> list[str]:
    """Returns one line per kind of completion and score, over all questions. IoU and the share that
    is named right have lines for wordings seen in training and for unseen ones as well."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in before):
        for wording in (None, "seen", "unseen"):
            pairs = []
            for old, new in zip(before, after, strict=True):
                if old["kind"] == kind and wording in (None, old["wording"]):
                    pairs.append((old, new))
            title = kind if wording is None else f"{kind}, {wording}"
            names = ["iou", "named"] if wording is not None else score_names(before)
            images = [old.get("image") or old["id"] for old, _ in pairs]
            for name in names:
                values = [old[name] for old, _ in pairs]
                text = change_text(values, [new[name] for _, new in pairs], images)
                if text:
                    lines.append(f"  {title:15} {name:10} {text}")
    return lines


def score_names(rows: Sequence[dict]) -> list[str]:
    """Returns the names of the scores in rows of held_out.jsonl."""
    not_scores = {"step", "kind", "index", "id", "image", "wording"}
    return [name for name in rows[0] if name not in not_scores] if rows else []


def change_text(
    before: Sequence[float | None],
    after: Sequence[float | None],
    images: Sequence[Any],
    in_percent: bool = False,
) -> str:
    """Returns "0.250 -> 0.300   +0.050 [+0.010, +0.090]" over the questions where both are defined,
    and "" where there is none."""
    found = paired_interval(before, after, images)
    if found is None:
        return ""
    defined = [pair for pair in zip(before, after) if None not in pair]
    old, new = np.mean(defined, axis=0)
    scale = 100 if in_percent else 1
    digits = 1 if in_percent else 3
    text = f"{scale * old:.{digits}f} -> {scale * new:.{digits}f}"
    text += f"   {scale * found.mean:+.{digits}f}"
    if found.images < FEW:
        text += " [–]"
    else:
        text += f" [{scale * found.low:+.{digits}f}, {scale * found.high:+.{digits}f}]"
    if found.n < len(before):
        text += f"   {found.n} of {len(before)} questions"
    return text


# ---------------------------------------------------------------- predictions.jsonl


def read_predictions(folder: str | Path) -> list[dict]:
    """Returns the predictions of an evaluation. ValueError where there are none."""
    path = Path(folder) / "predictions.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder}: no predictions.jsonl in there; evaluate.py --out {folder} makes it"
        )
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line:
            rows.append(parse_object(line, f"{path}, line {number}"))
    if not rows or any("completions" not in row for row in rows):
        raise ValueError(f"{path}: empty, or of an older version; run the evaluation again")
    return rows


def encode_mask(mask: np.ndarray) -> dict[str, list[int]]:
    """(H, W) bool -> COCO's run lengths by column, {"size": [H, W], "counts": [outside, …]}."""
    flat = mask.flatten(order="F")
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    if flat[0]:
        counts = [0, *counts]
    return {"size": list(mask.shape), "counts": counts}


def decode_mask(run_lengths: dict[str, list[int]]) -> np.ndarray:
    """The inverse of encode_mask."""
    counts = run_lengths["counts"]
    is_inside = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_inside, counts).reshape(run_lengths["size"], order="F")
