"""Whose fault is a poor mask: the segmenter's, the prompt's, or the CRM's that wrote it?

    python evaluate.py --oracle --out eval/oracle               # true prompts to masks, without a CRM
    python evaluate.py --oracle eval/demo --out eval/whose      # beside the predictions that are in eval/demo

Writes table.md, summary.json and config.json. Each sample is prompted with the truth in every geometry of
`true_prompts`, and D*(g) is the Dice of the mask; D is the Dice from the box and two points that the CRM wrote:

    1 - D = (1 - D*(best)) + (D*(best) - D*(box and 2 points)) + (D*(box and 2 points) - D)
             segmenter        geometry of the prompt              CRM

"best" is one geometry for a row of the table, chosen by its mean over other questions of the same group, or over all
if the group has fewer than 10 there: as many as are asked about, of the split "train" (where that is asked about, of
"test"), drawn by --seed. Without such a split there are no parts. A part may be negative. "Filled" is the box itself
taken as the mask. Beside a model that was asked for boxes alone, "box" stands for "box and 2 points"; so "2 points".
"""

import inspect
import json
from dataclasses import asdict
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

from data import Samples, box_from_mask, clip_to, load_samples
from extras.boxes import pieces
from extras.intervals import interval, paired_bootstrap, percent
from extras.predictions import read_predictions, shown
from metrics import QUESTION_METRICS, mask_dice
from rewards import Box, Points
from runtime.cli import print0
from runtime.files import write_whole
from runtime.readers import read_rows

COUNTS = (1, 2, 4, 8)  # of points, and of pieces that get a box
WRITTEN = "box, 2 points"  # what a CRM writes
EACH = "a box and a point each, all"  # stands for it where a CRM writes several boxes
PIECES = {
    "1 piece": 1,
    "2-3 pieces": 3,
    "4-8 pieces": 8,
    "9-16 pieces": 16,
    "17 pieces or more": np.inf,
}
PARTS = {"loss": "1 - Dice", "segmenter": "segmenter", "geometry": "geometry", "crm": "CRM"}
GROUPS = ("supercategory", "category", "pieces")  # of rows in a table
IOUS = ("iou", "iou_several", "iou_any", "iou_luck")
AT_ONCE = 64  # masks of one forward pass
ENOUGH = 10  # other questions that may choose a group's best geometry


class Prompt(NamedTuple):
    """What one mask is made from, image frame. negative: how many of the points, the last ones, are off the target."""

    box: Box | None
    points: Points = ()
    negative: int = 0


# ---------------------------------------------------------------- true prompts


def deepest(region: np.ndarray) -> tuple[float, float]:
    """The pixel of an (H, W) region with the largest distance to what is outside, beyond the border included."""
    y, x = np.unravel_index(
        distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1].argmax(), region.shape
    )
    return float(x), float(y)


def spread_points(mask: np.ndarray, parts: list[np.ndarray], count: int) -> Points:
    """`count` pixels of a mask, inside it and apart: first the deepest of each part, then where the smaller of depth
    and distance to the points so far is largest. The first k are the choice for k."""
    points = [deepest(part) for part in parts[:count]]
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    ys, xs = np.nonzero(mask)
    apart = np.min([np.hypot(xs - x, ys - y) for x, y in points], axis=0)
    while len(points) < count:
        best = np.minimum(depth[ys, xs], apart).argmax()
        points.append((float(xs[best]), float(ys[best])))
        apart = np.minimum(apart, np.hypot(xs - xs[best], ys - ys[best]))
    return tuple(points)


def filled(shape: tuple[int, int], boxes: list[Box]) -> np.ndarray:
    """(H, W) bool: the pixels whose centre is in one of the boxes."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, bool)
    for x1, y1, x2, y2 in boxes:
        mask |= (x1 <= x + 0.5) & (x + 0.5 < x2) & (y1 <= y + 0.5) & (y + 0.5 < y2)
    return mask


def true_prompts(sample, points_off: bool = True) -> dict[str, list[Prompt]]:
    """{geometry: the prompts whose masks are united}, of a sample with a mask. The box and its two points are the
    sample's own; everything else is taken from the mask. points_off: the segmenter takes points off the target, too."""
    box, points, parts = sample.bbox, sample.points[:2], pieces(sample.mask)
    apart = spread_points(sample.mask, parts, max(COUNTS))
    boxes = [box_from_mask(part) for part in parts]
    beside = filled(sample.mask.shape, [box]) & ~sample.mask
    off = (deepest(beside),) if beside.any() else ()  # nothing in the box is off the target: none
    return {
        "box": [Prompt(box)],
        "box, 1 point": [Prompt(box, points[:1])],
        WRITTEN: [Prompt(box, points)],
        **({"box, 2 points, 1 off": [Prompt(box, points + off, len(off))]} if points_off else {}),
        **{f"{k} point{'s' * (k > 1)}": [Prompt(None, apart[:k])] for k in COUNTS},
        **{f"a box each, {k} piece{'s' * (k > 1)}": [Prompt(b) for b in boxes[:k]] for k in COUNTS},
        "a box each, all": [Prompt(b) for b in boxes],
        EACH: [Prompt(b, (deepest(part),)) for b, part in zip(boxes, parts)],
    }


# ---------------------------------------------------------------- one sample


def segment_all(asm, image: np.ndarray, prompts) -> dict[Prompt, np.ndarray]:
    """{prompt: its (H, W) mask}: prompts with the same parts are one batch, and the image is encoded once."""
    groups, masks = {}, {}
    for prompt in dict.fromkeys(prompts):
        groups.setdefault((prompt.box is None, len(prompt.points), prompt.negative), []).append(
            prompt
        )
    for (boxless, count, negative), group in groups.items():
        for part in (group[i : i + AT_ONCE] for i in range(0, len(group), AT_ONCE)):
            given = [
                None if boxless else [p.box for p in part],
                [p.points for p in part] if count else None,
            ]
            found, _ = asm.segment(image, *given, **({"negative": negative} if negative else {}))
            masks |= zip(part, found)
    return masks


def written(p: dict, size: tuple[int, int]) -> list[Prompt]:
    """The prompts that a line of predictions.jsonl gives the segmenter: one, of several boxes one for each; [] if
    nothing in it can be used."""
    prompts = []
    for part in shown(p).get("regions", [shown(p)]):
        bbox, points = (xy and clip_to(size, xy) for xy in (part["bbox"], part["points"]))
        if bbox or points:
            prompts.append(Prompt(bbox and tuple(bbox), tuple(map(tuple, (points or ())[:2]))))
    return prompts


def measure(asm, sample, p: dict | None = None) -> dict:
    """One sample with a mask -> id, supercategory, category, pieces, fill (share of its box that the mask fills), area
    (share of the image), dice {geometry: Dice}, filled {geometry of boxes alone: Dice}, written (the geometry of a CRM),
    and of a prediction p: crm, its Dice, and QUESTION_METRICS of its IoU. ValueError if p is of another target."""
    mask, prompts = (
        sample.mask,
        true_prompts(sample, "negative" in inspect.signature(asm.segment).parameters),
    )
    answer = written(p, sample.image.size) if p else []
    everything = [prompt for several in prompts.values() for prompt in several] + answer
    masks = segment_all(asm, np.asarray(sample.image), everything)
    x1, y1, x2, y2 = box_from_mask(mask)
    row = {
        "id": sample.id,
        "supercategory": sample.supercategory,
        "category": sample.category,
        "pieces": len(pieces(mask)),
        "fill": float(mask.sum() / ((x2 - x1) * (y2 - y1))),
        "area": float(mask.mean()),
        "dice": {
            name: mask_dice(np.any([masks[prompt] for prompt in several], axis=0), mask)
            for name, several in prompts.items()
        },
        "filled": {
            name: mask_dice(filled(mask.shape, [prompt.box for prompt in several]), mask)
            for name, several in prompts.items()
            if not any(p.points for p in several)
        },
    }
    row["written"] = (
        {"bbox": "box", "points": "2 points"}[p["asked"][0]]
        if p and len(p["asked"]) == 1
        else WRITTEN
    )
    if p:
        row["written"] = EACH if "regions" in p["truth"] else row["written"]
        if tuple(p["truth"]["bbox"]) != tuple(sample.bbox):
            raise ValueError(
                f"sample {sample.id}: the predictions are of a target in {p['truth']['bbox']}, not in "
                f"{list(sample.bbox)}; give the --data they were made with"
            )
        row["crm"] = (
            mask_dice(np.any([masks[prompt] for prompt in answer], axis=0), mask) if answer else 0.0
        )
        row |= {key: QUESTION_METRICS[key][1](p) for key in IOUS}
    return row


def measure_all(asm, samples, ranks, predictions: dict[str, dict] | None = None) -> list[dict]:
    """A row of `measure` for each sample that has a mask, shared among the ranks."""
    rows = []
    for i in tqdm(
        range(len(samples))[ranks.rank :: ranks.world],
        disable=ranks.rank > 0 or not len(samples),
        ncols=100,
    ):
        sample = samples[i]
        if sample.mask is not None:
            rows.append((i, measure(asm, sample, predictions and predictions[sample.id])))
    return [row for _, row in sorted(ranks.gather(rows), key=lambda item: item[0])]


# ---------------------------------------------------------------- tables


def split_loss(row: dict, best: str) -> dict[str, float]:
    """The parts of 1 - Dice, whose sum it is; of the true box and points where no CRM was asked."""
    top, true = row["dice"][best], row["dice"][row["written"]]
    dice = row.get("crm", true)
    parts = {"loss": 1 - dice, "segmenter": 1 - top, "geometry": top - true}
    return parts | ({"crm": true - dice} if "crm" in row else {})


def summarise(rows: list[dict], others: list[dict]) -> dict:
    """{"all": part, "supercategory": {name: part}, "category": …, "pieces": …}, part: {"n", "pieces", "fill", "area",
    "dice": {geometry: interval}, "filled", "against": paired difference to the box and 2 points, "best": geometry or
    None, "chosen_on": questions, "split": {part of PARTS: interval}, "iou": …}. others: rows that choose the best."""

    def ends(values) -> dict | None:
        found = interval(values)
        return found and found._asdict() | {"n": sum(value is not None for value in values)}

    def part(belongs) -> dict:
        chosen, like = ([row for row in several if belongs(row)] for several in (rows, others))
        like = like if len(like) >= ENOUGH else others
        best = (
            max(like[0]["dice"], key=lambda g: np.mean([row["dice"][g] for row in like]))
            if like
            else None
        )
        columns = {
            key: {g: [row[key][g] for row in chosen] for g in rows[0][key]}
            for key in ("dice", "filled")
        }
        losses = [split_loss(row, best) for row in chosen] if best else [{}]
        return {
            "n": len(chosen),
            "best": best,
            "chosen_on": len(like),
            **{
                key: float(np.mean([row[key] for row in chosen]))
                for key in ("pieces", "fill", "area")
            },
            **{key: {g: ends(values) for g, values in columns[key].items()} for key in columns},
            "against": {
                g: paired_bootstrap(columns["dice"][WRITTEN], values)._asdict() | {"n": len(chosen)}
                for g, values in columns["dice"].items()
            },
            "split": {key: ends([loss[key] for loss in losses]) for key in losses[0]},
            **{key: ends([row[key] for row in chosen]) for key in IOUS if key in rows[0]},
        }

    def parts(kind) -> dict:
        return {
            name: part(lambda row: kind(row) == name)
            for name in sorted({kind(row) for row in rows} - {""})
        }

    return {
        "all": part(lambda row: True),
        **{key: parts(itemgetter(key)) for key in ("supercategory", "category")},
        "pieces": dict(
            sorted(parts(some_pieces).items(), key=lambda item: list(PIECES).index(item[0]))
        ),
    }


def some_pieces(row: dict) -> str:
    """A key of PIECES."""
    return next(name for name, most in PIECES.items() if row["pieces"] <= most)


def markdown(head: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *lines)] + [""]


def table(summary: dict, left_out: int) -> str:
    """The summary as Markdown, in percent."""
    whole = summary["all"]
    parts = [("all", whole), *(item for key in GROUPS for item in summary[key].items())]
    described = [
        (
            [
                name,
                str(g["n"]),
                f"{g['pieces']:.1f}",
                f"{100 * g['fill']:.0f}",
                f"{100 * g['area']:.1f}",
            ],
            g,
        )
        for name, g in parts
    ]
    about = ["", "n", "pieces", "fill", "area share"]
    lines = [
        "Percent, mean over questions [95 % bootstrap interval].",
        "",
        "## True prompts, no CRM",
        "",
        f"{whole['n']} questions; {left_out} without a mask are left out.",
        "",
        *markdown(
            ["prompt", "Dice of the mask", f"against {WRITTEN} (paired)", "merely filled"],
            [
                [
                    name,
                    percent(found),
                    percent(whole["against"][name], "+") if name != WRITTEN else "",
                    percent(whole["filled"].get(name)),
                ]
                for name, found in whole["dice"].items()
            ],
        ),
        "## Whose loss it is",
        "",
    ]
    if whole["best"]:
        keys = [key for key in PARTS if key in whole["split"]]
        ious = [key for key in IOUS if whole.get(key)]
        of = (
            "the CRM's mask"
            if "crm" in keys
            else f"the mask from the true {WRITTEN}; no CRM was asked"
        )
        head = [
            *about,
            *(PARTS[key] for key in keys),
            "best prompt",
            *(QUESTION_METRICS[key][0] for key in ious),
        ]
        lines += [
            f"1 - Dice of {of}, split. The best prompt was chosen on other questions; in brackets, how many.",
            "",
            *markdown(
                head,
                [
                    [
                        *start,
                        *(percent(g["split"][key]) for key in keys),
                        f"{g['best']} ({g['chosen_on']})",
                        *(percent(g[key]) for key in ious),
                    ]
                    for start, g in described
                ],
            ),
        ]
    else:
        lines += ["Not split: the data have no other split to choose the best geometry on.", ""]
    means = [
        [*start, *(f"{100 * found['mean']:.1f}" for found in g["dice"].values())]
        for start, g in described
    ]
    lines += ["## True prompts by group", "", *markdown([*about, *whole["dice"]], means)]
    return "\n".join(lines)


# ---------------------------------------------------------------- evaluate.py --oracle


def choosers(cfg, count: int) -> Samples | list:
    """Up to `count` questions, drawn by --seed, that choose the best geometry: of train, or of test where --split is
    train; [] where the data have no such split."""
    other = "test" if cfg.split == "train" else "train"
    if other not in read_rows(Path(cfg.data), None)[1]:
        return []
    samples = load_samples(cfg.data, other, cfg.skip_bad_rows)
    picks = np.random.default_rng(cfg.seed).choice(
        len(samples), min(count, len(samples)), replace=False
    )
    return Samples([samples.rows[i] for i in sorted(picks)])


def predictions_for(cfg, samples) -> dict[str, dict] | None:
    """{id: line of predictions.jsonl} of the folder that --oracle names, if it does."""
    if cfg.oracle == "alone":
        return None
    found = {p["id"]: p for p in read_predictions(cfg.oracle)}
    if missing := [name for name in samples.ids() if name not in found]:
        raise ValueError(
            f"--oracle {cfg.oracle}: {len(missing)} of {len(samples)} questions of --data {cfg.data}, "
            f"split {cfg.split}, are not in there, the first: {missing[0]!r}; --limit takes first ones"
        )
    return found


def oracle(cfg, samples, asm, ranks) -> None:
    """Measure, and write into cfg.out. ValueError, one line, for flags and data that do not fit."""
    for name in ("crm", "predictions"):
        if getattr(cfg, name):
            raise ValueError(
                f"--oracle with --{name}: it asks no model; evaluate first, then --oracle THAT_OUT_FOLDER"
            )
    if asm is None:
        raise ValueError("--oracle with --asm none: it is the segmenter that is measured")
    unmasked = ValueError(
        f"--data {cfg.data}, split {cfg.split}: no sample has a mask to compare with"
    )
    if not any(row["mask"] for row in samples.rows):
        raise unmasked
    predictions = predictions_for(cfg, samples)
    others = measure_all(asm, choosers(cfg, len(samples)), ranks)
    rows = measure_all(asm, samples, ranks, predictions)
    if not rows:  # a parquet file tells only now
        raise unmasked
    if ranks.rank == 0:
        summary, out = summarise(rows, others), Path(cfg.out)
        text = table(summary, len(samples) - len(rows))
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("config.json", json.dumps(asdict(cfg), indent=2)),
            ("table.md", text),
            ("summary.json", json.dumps(summary | {"questions": rows}, indent=1)),
        ):
            write_whole(out / name, content.rstrip() + "\n")
        print0(text.split("## True prompts by group")[0].rstrip())
        print0(f"tables {out / 'table.md'}, numbers {out / 'summary.json'}")
    ranks.stop()
