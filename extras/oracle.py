"""Whose fault is a poor mask: the segmenter's, the prompt's, or the CRM's that wrote it?

    python -m extras.oracle --out eval/oracle             # true prompts to masks, without a CRM
    python -m extras.oracle eval/demo --out eval/whose    # and the predictions in eval/demo

Each example is prompted with the truth in every geometry of `true_prompts`. D*(g) is the Dice of
the mask from geometry g. D is the Dice from the box and two points that the CRM wrote:

    1 - D = (1 - D*(best)) + (D*(best) - D*(box and 2 points)) + (D*(box and 2 points) - D)
             segmenter        geometry of the prompt              CRM

"best" is one geometry for a row of the table. It is chosen by its mean over other questions of the
same group, or over all others if the group has fewer than 10 there. The others are as many as are
asked about, of the split "train", drawn by --seed. (Where "train" is asked about, they are of
"test".) Without such a split there are no parts. A part may be negative. "Filled" is the box itself
taken as the mask. If the model was asked for boxes alone, "box" stands for "box, 2 points". If it
was asked for points alone, "2 points" does.

Writes table.md, summary.json and config.json into --out.
"""

import argparse
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt
from tqdm import tqdm

from asm import load_asm
from data import EMBEDDED, Example, Examples, box_from_mask, clip_to, load_samples
from evaluate import check_folder, claim_folder, fingerprint
from extras.boxes import pieces
from metrics import (
    METRICS,
    image_digest,
    interval,
    mask_dice,
    paired_interval,
    percent,
    read_predictions,
    regions_of,
    shown,
)
from rewards import Box, Point
from runtime.cli import Parser, exit_on, print0, show_every_character, use_embedded
from runtime.files import write_whole
from runtime.parallel import Ranks
from runtime.readers import read_rows

COUNTS = (1, 2, 4, 8)  # of points, and of pieces that get a box
WRITTEN = "box, 2 points"  # what a CRM writes
EACH = "a box and a point each, all"  # stands for it where a CRM writes several boxes
BOX_ALONE = "box"
POINTS_ALONE = "2 points"
MOST_PIECES = {  # name of a group: the most pieces that a mask of it has
    "1 piece": 1,
    "2-3 pieces": 3,
    "4-8 pieces": 8,
    "9-16 pieces": 16,
    "17 pieces or more": np.inf,
}
PARTS = {"loss": "1 - Dice", "segmenter": "segmenter", "geometry": "geometry", "crm": "CRM"}
GROUPS = ("supercategory", "category", "pieces")  # of rows in a table
AT_ONCE = 64  # masks of one forward pass
ENOUGH = 10  # other questions that may choose a group's best geometry


@dataclass(frozen=True)
class MaskPrompt:
    """What one mask is made from, image frame."""

    box: Box | None
    points: tuple[Point, ...] = ()  # on the target
    points_off: tuple[Point, ...] = ()  # off the target


# ---------------------------------------------------------------- true prompts


def depth_in(region: np.ndarray) -> np.ndarray:
    """Returns (H, W) distances to what is outside a region. What lies beyond the border is
    outside."""
    return distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]


def deepest(region: np.ndarray) -> Point:
    """Returns the pixel of an (H, W) region that is farthest from what is outside."""
    y, x = np.unravel_index(depth_in(region).argmax(), region.shape)
    return float(x), float(y)


def spread_points(mask: np.ndarray, parts: Sequence[np.ndarray], count: int) -> tuple[Point, ...]:
    """Returns `count` pixels of a mask, deep inside it and apart.

    The first are the deepest of each part. Then follow those where the smaller one of depth and of
    distance to the points so far is largest. The first k are the choice for k."""
    points = [deepest(part) for part in parts[:count]]
    ys, xs = np.nonzero(mask)
    depth = depth_in(mask)[ys, xs]
    distance = np.min([np.hypot(xs - x, ys - y) for x, y in points], axis=0)
    while len(points) < count:
        best = np.minimum(depth, distance).argmax()
        points.append((float(xs[best]), float(ys[best])))
        distance = np.minimum(distance, np.hypot(xs - xs[best], ys - ys[best]))
    return tuple(points)


def filled(shape: tuple[int, int], boxes: Iterable[Box]) -> np.ndarray:
    """Returns (H, W) bool: the pixels whose centre is in one of the boxes."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, bool)
    for x1, y1, x2, y2 in boxes:
        in_columns = (x1 <= x + 0.5) & (x + 0.5 < x2)
        in_rows = (y1 <= y + 0.5) & (y + 0.5 < y2)
        mask |= in_columns & in_rows
    return mask


def true_prompts(example: Example, with_points_off: bool = True) -> dict[str, list[MaskPrompt]]:
    """Returns {geometry: the prompts whose masks are united} of an example with a mask.

    The box and its two points are the example's own. Everything else is taken from the mask.
    with_points_off: whether the segmenter takes points off the target."""
    box = example.bbox
    points = example.points[:2]
    parts = pieces(example.mask)
    apart = spread_points(example.mask, parts, max(COUNTS))
    boxes = [box_from_mask(part) for part in parts]

    prompts = {
        BOX_ALONE: [MaskPrompt(box)],
        "box, 1 point": [MaskPrompt(box, points[:1])],
        WRITTEN: [MaskPrompt(box, points)],
    }
    if with_points_off:
        points_off = ()
        beside = filled(example.mask.shape, [box]) & ~example.mask
        if beside.any():
            points_off = (deepest(beside),)
        prompts["box, 2 points, 1 off"] = [MaskPrompt(box, points, points_off)]
    for count in COUNTS:
        prompts[counted(count, "point")] = [MaskPrompt(None, apart[:count])]
    for count in COUNTS:
        name = f"a box each, {counted(count, 'piece')}"
        prompts[name] = [MaskPrompt(part_box) for part_box in boxes[:count]]
    prompts["a box each, all"] = [MaskPrompt(part_box) for part_box in boxes]
    prompts[EACH] = [MaskPrompt(part_box, (deepest(part),)) for part_box, part in zip(boxes, parts)]
    return prompts


def counted(count: int, what: str) -> str:
    """Returns "1 point" or "2 points"."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


# ---------------------------------------------------------------- one example


def segment_all(
    asm: Any, image: np.ndarray, prompts: Iterable[MaskPrompt]
) -> dict[MaskPrompt, np.ndarray]:
    """Returns {prompt: its (H, W) mask}. Prompts with the same parts are one batch, and the image
    is encoded once."""
    batches: dict[tuple[bool, int, int], list[MaskPrompt]] = {}
    for prompt in dict.fromkeys(prompts):  # each once
        parts = prompt.box is None, len(prompt.points), len(prompt.points_off)
        batches.setdefault(parts, []).append(prompt)
    masks = {}
    for batch in batches.values():
        for start in range(0, len(batch), AT_ONCE):
            some = batch[start : start + AT_ONCE]
            masks |= zip(some, segment(asm, image, some))
    return masks


def segment(asm: Any, image: np.ndarray, prompts: Sequence[MaskPrompt]) -> np.ndarray:
    """Returns the masks (n, H, W) of prompts that have the same parts."""
    first = prompts[0]
    boxes = None
    if first.box is not None:
        boxes = [prompt.box for prompt in prompts]
    points = None
    if first.points or first.points_off:
        points = [prompt.points + prompt.points_off for prompt in prompts]
    if not first.points_off:  # a segmenter may know no labels
        return asm.segment(image, boxes, points)[0]
    labels = [1] * len(first.points) + [0] * len(first.points_off)
    return asm.segment(image, boxes, points, labels=[labels] * len(prompts))[0]


def takes_labels(asm: Any) -> bool:
    """Whether a segmenter takes points off the target."""
    return "labels" in inspect.signature(asm.segment).parameters


def written_prompts(p: dict, size: tuple[int, int]) -> list[MaskPrompt]:
    """Returns the prompts that a prediction gives the segmenter, one for each of its regions; none
    where nothing in it can be used. size: (width, height) of the image."""
    prompts = []
    for bbox, points in regions_of(shown(p)):
        box = None
        if bbox is not None:
            box = tuple(clip_to(size, bbox))
        used = ()
        if points is not None:
            used = tuple(tuple(point) for point in clip_to(size, points[:2]))
        if box is not None or used:
            prompts.append(MaskPrompt(box, used))
    return prompts


def written_geometry(p: dict | None) -> str:
    """Returns the geometry that a CRM was asked for; the usual one without a prediction."""
    if p is None:
        return WRITTEN
    if "regions" in shown(p):
        return EACH
    if p["asked"] == ["bbox"]:
        return BOX_ALONE
    if p["asked"] == ["points"]:
        return POINTS_ALONE
    return WRITTEN


def measure(asm: Any, example: Example, p: dict | None = None) -> dict[str, Any]:
    """Returns what is measured of one example with a mask.

    id, image, supercategory, category
    pieces   of the mask
    fill     the share of its box that the mask fills
    area     the share of the image that the mask fills
    dice     {geometry: Dice of the segmenter's mask}
    filled   {geometry of boxes alone: Dice of the boxes themselves}
    written  the geometry that a CRM was asked for
    crm      Dice of the mask from a prediction p, and
    iou      its IoU; both only with p

    ValueError where p is about another target."""
    if p is not None and tuple(p["truth"]["bbox"]) != tuple(example.bbox):
        raise ValueError(
            f"example {example.id}: the predictions are of a target in {p['truth']['bbox']}, not "
            f"in {list(example.bbox)}; give the --data they were made with"
        )
    truth = example.mask
    prompts = true_prompts(example, takes_labels(asm))
    answer = []
    if p is not None:
        answer = written_prompts(p, example.image.size)
    everything = [prompt for some in prompts.values() for prompt in some] + answer
    masks = segment_all(asm, np.asarray(example.image), everything)

    def dice_of(some: list[MaskPrompt]) -> float:
        return mask_dice(np.any([masks[prompt] for prompt in some], axis=0), truth)

    of_boxes = {}
    for geometry, some in prompts.items():
        if not any(prompt.points for prompt in some):
            of_boxes[geometry] = mask_dice(
                filled(truth.shape, [prompt.box for prompt in some]), truth
            )
    x1, y1, x2, y2 = box_from_mask(truth)
    row = {
        "id": example.id,
        "image": image_digest(example),
        "supercategory": example.supercategory,
        "category": example.category,
        "pieces": len(pieces(truth)),
        "fill": float(truth.sum() / ((x2 - x1) * (y2 - y1))),
        "area": float(truth.mean()),
        "dice": {geometry: dice_of(some) for geometry, some in prompts.items()},
        "filled": of_boxes,
        "written": written_geometry(p),
    }
    if p is not None:
        row["crm"] = dice_of(answer) if answer else 0.0
        _, iou = METRICS["iou"]
        row["iou"] = iou(p)
    return row


def measure_all(
    asm: Any,
    examples: Sequence[Example],
    ranks: Ranks,
    predictions: Mapping[str, dict] | None = None,
) -> list[dict[str, Any]]:
    """Returns a row of `measure` for each example that has a mask, in order, shared among the
    ranks. predictions: {id: prediction}."""
    own = range(len(examples))[ranks.rank :: ranks.world]
    found = []
    for i in tqdm(own, disable=not ranks.is_main or len(examples) == 0, ncols=100):
        example = examples[i]
        if example.mask is None:
            continue
        p = None
        if predictions is not None:
            p = predictions[example.id]
        found.append((i, measure(asm, example, p)))
    in_order = sorted(ranks.gather(found), key=lambda item: item[0])
    return [row for _, row in in_order]


# ---------------------------------------------------------------- means and intervals


def split_loss(row: dict[str, Any], best: str) -> dict[str, float]:
    """Returns 1 - Dice and its parts, whose sum it is; of the true box and points where no CRM was
    asked."""
    best_dice = row["dice"][best]
    true_dice = row["dice"][row["written"]]
    dice = row.get("crm", true_dice)
    parts = {"loss": 1 - dice, "segmenter": 1 - best_dice, "geometry": best_dice - true_dice}
    if "crm" in row:
        parts["crm"] = true_dice - dice
    return parts


def best_geometry(others: Sequence[dict]) -> str | None:
    """Returns the geometry with the highest mean Dice of some rows; None without a row."""
    if not others:
        return None
    means = {}
    for geometry in others[0]["dice"]:
        means[geometry] = np.mean([row["dice"][geometry] for row in others])
    return max(means, key=means.get)


def pieces_group(row: dict[str, Any]) -> str:
    """Returns the name in MOST_PIECES for a row."""
    for name, most in MOST_PIECES.items():
        if row["pieces"] <= most:
            return name
    raise ValueError(f"{row['pieces']} pieces belong to no group")


def summarise(rows: Sequence[dict], others: Sequence[dict]) -> dict[str, Any]:
    """Returns {"all": part, "supercategory": {name: part}, "category": {…}, "pieces": {…}}, see
    `part_of`. others: the rows that choose the best geometry."""
    group_of: dict[str, Callable[[dict], str]] = {
        "supercategory": lambda row: row["supercategory"],
        "category": lambda row: row["category"],
        "pieces": pieces_group,
    }
    summary: dict[str, Any] = {"all": part_of(rows, others)}
    for key in GROUPS:
        of_row = group_of[key]
        names = sorted({of_row(row) for row in rows} - {""})
        if key == "pieces":
            names = [name for name in MOST_PIECES if name in names]
        summary[key] = {}
        for name in names:
            members = [row for row in rows if of_row(row) == name]
            like_these = [row for row in others if of_row(row) == name]
            if len(like_these) < ENOUGH:
                like_these = others
            summary[key][name] = part_of(members, like_these)
    return summary


def part_of(rows: Sequence[dict], others: Sequence[dict]) -> dict[str, Any]:
    """Returns the numbers of some rows, as JSON can hold them.

    n, and the means of pieces, fill and area
    dice, filled  {geometry: interval}
    against       {geometry: interval of the paired difference to the box and 2 points}
    best          the best geometry of the others, or None; chosen_on: how many they are
    split         {part of PARTS: interval}, {} without a best geometry
    iou           interval, where there are predictions"""
    images = [row["image"] for row in rows]

    def ends(values: Sequence[float | None]) -> dict[str, Any] | None:
        found = interval(values, images)
        return None if found is None else asdict(found)

    part: dict[str, Any] = {"n": len(rows)}
    for key in ("pieces", "fill", "area"):
        part[key] = float(np.mean([row[key] for row in rows]))
    for key in ("dice", "filled"):
        part[key] = {}
        for geometry in rows[0][key]:
            part[key][geometry] = ends([row[key][geometry] for row in rows])
    usual = [row["dice"][WRITTEN] for row in rows]
    part["against"] = {}
    for geometry in rows[0]["dice"]:
        values = [row["dice"][geometry] for row in rows]
        part["against"][geometry] = asdict(paired_interval(usual, values, images))

    best = best_geometry(others)
    part["best"] = best
    part["chosen_on"] = len(others)
    part["split"] = {}
    if best is not None:
        losses = [split_loss(row, best) for row in rows]
        for name in losses[0]:
            part["split"][name] = ends([loss[name] for loss in losses])
    if "iou" in rows[0]:
        part["iou"] = ends([row["iou"] for row in rows])
    return part


# ---------------------------------------------------------------- tables


def table(summary: dict[str, Any], left_out: int) -> str:
    """Returns a summary as Markdown, in percent. left_out: how many examples have no mask."""
    parts = {"all": summary["all"]}
    for key in GROUPS:
        parts |= summary[key]
    lines = [
        "Percent, mean over questions [95 % bootstrap interval over images].",
        "",
        "## True prompts, no CRM",
        "",
        f"{summary['all']['n']} questions; {left_out} without a mask are left out.",
        "",
        *prompt_table(summary["all"]),
        "## Whose loss it is",
        "",
        *loss_table(parts),
        "## True prompts by group",
        "",
        *group_table(parts),
    ]
    return "\n".join(lines)


def prompt_table(part: dict[str, Any]) -> list[str]:
    """Returns the lines of a table with a row for each geometry."""
    cells = []
    for geometry, found in part["dice"].items():
        difference = ""
        if geometry != WRITTEN:
            difference = percent(part["against"][geometry], "+")
        cells.append([geometry, percent(found), difference, percent(part["filled"].get(geometry))])
    head = ["prompt", "Dice of the mask", f"against {WRITTEN} (paired)", "merely filled"]
    return markdown(head, cells)


def loss_table(parts: dict[str, dict]) -> list[str]:
    """Returns the lines of a table with a row for each group: 1 - Dice and its parts."""
    whole = parts["all"]
    if whole["best"] is None:
        return ["Not split: the data have no other split to choose the best geometry on.", ""]
    names = [name for name in PARTS if name in whole["split"]]
    of_what = f"the mask from the true {WRITTEN}; no CRM was asked"
    if "crm" in names:
        of_what = "the CRM's mask"
    head = [*DESCRIBED, *(PARTS[name] for name in names), "best prompt"]
    has_iou = whole.get("iou") is not None
    if has_iou:
        head.append(METRICS["iou"][0])
    cells = []
    for group, part in parts.items():
        line = described(group, part)
        line += [percent(part["split"][name]) for name in names]
        line.append(f"{part['best']} ({part['chosen_on']})")
        if has_iou:
            line.append(percent(part["iou"]))
        cells.append(line)
    note = "The best prompt was chosen on other questions; in brackets, how many."
    return [f"1 - Dice of {of_what}, split. {note}", "", *markdown(head, cells)]


def group_table(parts: dict[str, dict]) -> list[str]:
    """Returns the lines of a table with a row for each group and a column for each geometry."""
    cells = []
    for group, part in parts.items():
        means = [f"{100 * found['mean']:.1f}" for found in part["dice"].values()]
        cells.append(described(group, part) + means)
    return markdown([*DESCRIBED, *parts["all"]["dice"]], cells)


DESCRIBED = ["", "n", "pieces", "fill", "area share"]  # the first columns of a group's row


def described(group: str, part: dict[str, Any]) -> list[str]:
    """Returns the cells of a group's row below DESCRIBED."""
    return [
        group,
        str(part["n"]),
        f"{part['pieces']:.1f}",
        f"{100 * part['fill']:.0f}",
        f"{100 * part['area']:.1f}",
    ]


def markdown(head: list[str], cells: list[list[str]]) -> list[str]:
    """Returns the lines of a Markdown table, and an empty one after it."""
    rule = ["---"] * len(head)
    lines = ["| " + " | ".join(line) + " |" for line in (head, rule, *cells)]
    return [*lines, ""]


# ---------------------------------------------------------------- the command


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    show_every_character()
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
        allow_abbrev=False,
    )
    parser.add_argument(
        "predictions", nargs="?", help="an --out folder of evaluate.py or extras.predictions"
    )
    parser.add_argument("--data", help="folder or .parquet file, see data.py")
    parser.add_argument("--split", default="test", help="split of --data (test)")
    parser.add_argument("--limit", type=int, default=0, help="questions, the first ones (0: all)")
    parser.add_argument(
        "--skip-bad-rows", action="store_true", help="leave out rows that cannot be used"
    )
    parser.add_argument("--asm", help="the segmenter that is measured")
    parser.add_argument("--seed", type=int, default=0, help="seed of the other questions (0)")
    parser.add_argument("--out", default="eval/oracle", help="folder for the tables (eval/oracle)")
    args = parser.parse_args(argv)
    for name in ("limit", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 0")
    if args.asm == "none":
        parser.error("--asm none: it is the segmenter that is measured")
    return args


def choosers(args: argparse.Namespace, count: int) -> Examples:
    """Returns up to `count` questions, drawn by --seed, that choose the best geometry: of the split
    "train", or of "test" where --split is train. None where the data have no such split."""
    other = "test" if args.split == "train" else "train"
    if other not in read_rows(Path(args.data), None)[1]:
        return Examples([])
    examples = load_samples(args.data, other, args.skip_bad_rows)
    drawn = np.random.default_rng(args.seed).choice(
        len(examples), min(count, len(examples)), replace=False
    )
    return Examples([examples.rows[i] for i in sorted(drawn)])


def predictions_for(args: argparse.Namespace, ids: Sequence[str]) -> dict[str, dict] | None:
    """Returns {id: prediction} of the folder that is given; None where none is. ValueError where it
    lacks a question."""
    if args.predictions is None:
        return None
    found = {p["id"]: p for p in read_predictions(args.predictions)}
    missing = [name for name in ids if name not in found]
    if missing:
        raise ValueError(
            f"{args.predictions}: {len(missing)} of {len(ids)} questions of --data {args.data}, "
            f"split {args.split}, are not in there, the first: {missing[0]!r}; --limit takes first "
            "ones"
        )
    return found


def run_oracle(args: argparse.Namespace) -> None:
    """Measures, and writes into --out. ValueError for flags and data that do not fit; nothing is
    written then."""
    ranks = Ranks.start()
    use_embedded(args, {"data": EMBEDDED["data"], "asm": EMBEDDED["asm"]})
    examples = load_samples(args.data, args.split, args.skip_bad_rows)
    if args.limit > 0:
        examples = examples[: args.limit]
    examples.check()
    no_mask = f"--data {args.data}, split {args.split}: no example has a mask to compare with"
    if all(row["mask"] is None for row in examples.rows):
        raise ValueError(no_mask)
    predictions = predictions_for(args, examples.ids())
    asm = load_asm(args.asm, ranks.device)
    config = vars(args).copy()
    if ranks.is_main:
        files = []
        if args.predictions is not None:
            files = [Path(args.predictions) / "predictions.jsonl"]
        config["fingerprint"] = fingerprint(files, examples)
    check_folder(Path(args.out), config, ranks)

    others = measure_all(asm, choosers(args, len(examples)), ranks)
    rows = measure_all(asm, examples, ranks, predictions)
    if not rows:  # a parquet file tells only now
        raise ValueError(no_mask)
    claim_folder(Path(args.out), config, ranks)
    if ranks.is_main:
        write_tables(summarise(rows, others), rows, len(examples) - len(rows), Path(args.out))
    ranks.stop()


def write_tables(summary: dict[str, Any], rows: list[dict], left_out: int, out: Path) -> None:
    """Writes table.md and summary.json, and prints the first tables."""
    text = table(summary, left_out)
    write_whole(out / "table.md", text.rstrip() + "\n")
    content = json.dumps(summary | {"questions": rows}, indent=1)
    write_whole(out / "summary.json", content + "\n")
    print0(text.split("## True prompts by group")[0].rstrip())
    print0(f"tables {out / 'table.md'}, numbers {out / 'summary.json'}")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    with exit_on(ValueError, OSError):
        run_oracle(args)


if __name__ == "__main__":
    main()
