"""A second look without training: ask again about a crop around the first box, and map back.

    python infer.py --image x.png --query "…" --zoom 2
    python -m extras.zoom --crm runs/demo/step_000080 --zoom 2 --out eval/zoom

The window is 1 / zoom of the image in each direction, around the first box, larger where the box
with MARGIN on each side needs it, and inside the image. The crop is enlarged by --zoom, so that the
model sees the target with more visual tokens, and it is asked the same question. Box and points of
the second look are mapped back to the image frame. The second look is kept where its box has an IoU
of AGREE or more with the first one: then it is a finer view of the same place. Otherwise, and where
the window is the whole image or nothing was pointed to, the first look stays.

The command asks every question of a split in three ways, and compares them with paired intervals,
also by the true target's share of the image and by super-category, and in seconds:

    one look    --completions completions, the one that agrees most is kept
    twice       one look with twice as many completions, which costs about what two looks cost
    zoom        two looks with --completions each

Writes table.md and rows.jsonl into --out.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from crm import CRM, load_crm
from data import TAUGHT, Example, Sizes, load_samples
from infer import answer
from metrics import FEW, image_digest, interval, paired_interval
from rewards import Box, box_iou
from runtime.cli import exit_on, flag, parse_args, use_embedded
from runtime.files import write_whole
from runtime.parallel import Ranks
from sampling import default_temperature

MARGIN = 0.25  # of the first box's width and height, on each side
AGREE = 0.3  # IoU of both looks' boxes from which the second is kept
AREAS = {  # group: the largest share of the image that its targets have
    "target below 2 %": 0.02,
    "target 2 to 10 %": 0.10,
    "target above 10 %": 1.0,
}
WAYS = ("one look", "twice", "zoom")


@dataclass
class Config:
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    split: str = flag("test", "split of --data")
    limit: int = flag(0, "questions, the first ones (0: all)", low=0)
    dtype: str = flag(
        "auto", "compute type; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    zoom: float = flag(2.0, "how much closer the second look is", above=1)
    completions: int = flag(4, "completions of one look", low=1)
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    seed: int = flag(0, "seed of every random choice", low=0)
    out: str = flag("eval/zoom", "folder for table.md and rows.jsonl")


# ---------------------------------------------------------------- the window


def window_around(box: Box, size: tuple[int, int], zoom: float) -> tuple[int, int, int, int] | None:
    """Returns the window (x1, y1, x2, y2) of the second look, in whole pixels of the image frame;
    None where it would be the whole image.

    size: (width, height) of the image."""
    x1, y1, x2, y2 = box
    left, right = side_around(x1, x2, size[0], zoom)
    top, bottom = side_around(y1, y2, size[1], zoom)
    if (right - left, bottom - top) == size:
        return None
    return left, top, right, bottom


def side_around(low: float, high: float, side: int, zoom: float) -> tuple[int, int]:
    """Returns where the window begins and ends along a side of the image. low and high: of the
    box."""
    low = min(max(low, 0), side)
    high = min(max(high, 0), side)
    length = max(side / zoom, (1 + 2 * MARGIN) * (high - low))
    length = min(side, max(2, round(length)))
    start = round((low + high - length) / 2)
    start = min(max(start, 0), side - length)
    return start, start + length


def moved(xy: Any, dx: int, dy: int) -> Any:
    """Returns a box, or points, shifted from the window to the image."""
    if xy is None:
        return None
    if isinstance(xy[0], int | float):
        return tuple(value + (dx, dy)[i % 2] for i, value in enumerate(xy))
    return tuple(moved(point, dx, dy) for point in xy)


# ---------------------------------------------------------------- two looks


@dataclass
class Look:
    """The second look: what was asked and what was answered, image frame."""

    window: tuple[int, int, int, int]
    found: dict[str, Any]
    completions: list[dict]
    kept: int | None  # of its own completions


def second_look(
    crm: CRM,
    image: Image.Image,
    query: str,
    first: Box,
    zoom: float,
    completions: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> Look | None:
    """Asks again about a crop around the first box. None where that would be the whole image.

    A Prompt takes the model frame back to the crop's own pixels, whatever it was enlarged to."""
    window = window_around(first, image.size, zoom)
    if window is None:
        return None
    left, top = window[:2]
    crop = image.crop(window)
    larger = (round(crop.width * zoom), round(crop.height * zoom))
    prompt = crm.encode_question(crop.resize(larger, Image.Resampling.BICUBIC), query)
    prompt = replace(prompt, sizes=Sizes(crop.size, prompt.sizes.model))
    found, answers, kept = answer(crm, prompt, completions, max_new_tokens, temperature, seed)
    for completion in answers:
        for region in [completion, *completion.get("regions", [])]:
            region["bbox"] = moved(region["bbox"], left, top)
            region["points"] = moved(region["points"], left, top)
    return Look(window, found, answers, kept)


def agrees(first: dict, look: Look | None) -> float | None:
    """Returns the IoU of both looks' kept boxes; None where one of them has none."""
    if look is None or look.kept is None:
        return None
    second = look.completions[look.kept]["bbox"]
    if first["bbox"] is None or second is None:
        return None
    return box_iou(first["bbox"], second)


def look_again(
    cfg: Any,
    crm: CRM,
    asm: Any,
    image: Image.Image,
    found: dict[str, Any],
    completions: list[dict],
    kept: int | None,
) -> tuple[dict[str, Any], list[dict], int | None]:
    """What infer.py --zoom does after an answer: the arguments and results of infer.answer. The
    second look's completions come after the first ones. result.json says what happened."""
    found["zoom"] = {"window": None, "iou": None, "kept": "first"}
    if kept is None or completions[kept]["bbox"] is None:
        return found, completions, kept
    first = completions[kept]
    temperature = default_temperature(cfg.temperature, cfg.completions)
    options = (cfg.completions, cfg.max_new_tokens, temperature, cfg.seed)
    look = second_look(crm, image, cfg.query, first["bbox"], cfg.zoom, *options)
    if look is None:
        print("zoom       the first box fills the image, so there is no second look")
        return found, completions, kept
    iou = agrees(first, look)
    is_kept = iou is not None and iou >= AGREE
    found["zoom"] = {"window": look.window, "iou": iou, "kept": "second" if is_kept else "first"}
    said = "no box" if iou is None else f"IoU {iou:.2f} with the first box"
    print(f"zoom       {list(look.window)}: {said}, the {found['zoom']['kept']} look is kept")
    found["texts"] = found["texts"] + look.found["texts"]
    if is_kept:
        found["agreement"] = look.found["agreement"]
        found["problem"] = look.found["problem"]
        kept = len(completions) + look.kept
    return found, completions + look.completions, kept


# ---------------------------------------------------------------- the table


def box_of(completions: Sequence[dict], kept: int | None) -> Box | None:
    return None if kept is None else completions[kept]["bbox"]


def iou_with(box: Box | None, truth: Box) -> float:
    return 0.0 if box is None else box_iou(box, truth)


def measure(cfg: Config, crm: CRM, example: Example, index: int) -> dict[str, Any]:
    """Returns a row: id, image, supercategory, area (the target's share of the image), iou and
    seconds of each of the WAYS, and "looked" and "kept" of the second look.

    A question whose box, or mask, fills the image has no second look and counts with the first."""
    seed = cfg.seed + 1_000_003 * index  # a prime, so that questions of nearby seeds differ
    iou = {}
    seconds = {}
    first_box = None
    for way, count in (("one look", cfg.completions), ("twice", 2 * cfg.completions)):
        start = perf_counter()
        prompt = crm.prompt_of(example)
        temperature = default_temperature(None, count)
        _, completions, kept = answer(crm, prompt, count, cfg.max_new_tokens, temperature, seed)
        seconds[way] = perf_counter() - start
        box = box_of(completions, kept)
        iou[way] = iou_with(box, example.bbox)
        if way == "one look":
            first_box = box

    start = perf_counter()
    look = None
    if first_box is not None:
        temperature = default_temperature(None, cfg.completions)
        options = (cfg.completions, cfg.max_new_tokens, temperature, seed)
        look = second_look(crm, example.image, example.query, first_box, cfg.zoom, *options)
    overlap = agrees({"bbox": first_box}, look)
    is_kept = overlap is not None and overlap >= AGREE
    final = box_of(look.completions, look.kept) if is_kept else first_box
    iou["zoom"] = iou_with(final, example.bbox)
    seconds["zoom"] = seconds["one look"] + perf_counter() - start
    x1, y1, x2, y2 = example.bbox
    area = (x2 - x1) * (y2 - y1) / (example.image.width * example.image.height)
    return {
        "id": example.id,
        "image": image_digest(example),
        "supercategory": example.supercategory,
        "area": area if example.mask is None else float(example.mask.mean()),
        "iou": iou,
        "seconds": seconds,
        "looked": look is not None,
        "kept": is_kept,
    }


def groups_of(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Returns the rows of each line of the table: all, by area, by super-category."""
    found = {"all": list(rows)}
    low = 0.0
    for name, high in AREAS.items():
        found[name] = [row for row in rows if low <= row["area"] < high or row["area"] == high == 1]
        low = high
    for name in sorted({row["supercategory"] for row in rows} - {""}):
        found[name] = [row for row in rows if row["supercategory"] == name]
    return {name: some for name, some in found.items() if some}


def table(rows: Sequence[dict], note: str) -> str:
    """Returns Markdown: IoU of each way, and paired differences to the second look."""
    lines = [
        note,
        "",
        "| | n | one look | twice | zoom | zoom - one look | zoom - twice | second look kept |",
        "|---" * 8 + "|",
    ]
    for name, some in groups_of(rows).items():
        images = [row["image"] for row in some]
        ious = {way: [row["iou"][way] for row in some] for way in WAYS}
        cells = [shown(interval(ious[way], images)) for way in WAYS]
        for way in WAYS[:2]:
            cells.append(shown(paired_interval(ious[way], ious["zoom"], images), "+"))
        share = np.mean([row["kept"] for row in some])
        cells.append(f"{100 * share:.0f} %")
        lines.append(f"| {name} | {len(some)} | {' | '.join(cells)} |")
    lines.append("")
    for way in WAYS:
        seconds = np.median([row["seconds"][way] for row in rows])
        lines.append(f"- {way}: {seconds:.2f} s per question (median)")
    return "\n".join(lines) + "\n"


def shown(found: Any, sign: str = "") -> str:
    """Returns "0.375 [0.300, 0.450]" of an interval; no ends where it is of few images."""
    if found.images < FEW:
        return f"{found.mean:{sign}.3f} [–]"
    return f"{found.mean:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def run(cfg: Config) -> None:
    """Asks every question in the three ways, and writes the table."""
    ranks = Ranks.start()
    use_embedded(cfg, {"crm": TAUGHT["crm"], "data": TAUGHT["data"]})
    examples = load_samples(cfg.data, cfg.split)
    if cfg.limit:
        examples = examples[: cfg.limit]
    examples.check()
    crm = load_crm(cfg.crm, ranks.device, ranks.dtype(cfg.dtype))
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in tqdm(range(len(examples)), ncols=100):
        rows.append(measure(cfg, crm, examples[index], index))
    write_whole(out / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    looked = sum(row["looked"] for row in rows)
    note = (
        f"IoU of {len(rows)} questions of {cfg.split}, {cfg.completions} completions a look, zoom "
        f"{cfg.zoom:g}, seed {cfg.seed}; {looked} had a second look. [95 % interval over images]"
    )
    write_whole(out / "table.md", table(rows, note))
    print(table(rows, note).rstrip())
    print(f"table {out / 'table.md'}")


def main(cfg: Config) -> None:
    with exit_on(ValueError, OSError, FloatingPointError):
        run(cfg)


if __name__ == "__main__":
    main(parse_args(Config, __doc__))
