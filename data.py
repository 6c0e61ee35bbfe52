"""Examples, prompts and coordinate frames.

    examples = load_samples("demo/data", split="test")   # U-MRG parquet, or a folder of images
    example = examples[0]                                # the image is decoded here, not before

    python data.py PATH [--split test] [--sheet sheet.png]   # what is in a data set, every bad row

There are two coordinate frames. Both are in pixels with the origin at the top left, x to the right
and y down. (A model frame may be in thousandths of width and height instead, see COORDINATES.)

    image frame   the image, upright: what people, masks and the segmenter use
    model frame   the image after our one resize: what the language model reads and writes

`to_model` and `to_image` convert between them, and nothing else does. (The segmenter squashes its
image into a square of its own; asm.py keeps that to itself.) A box (x1, y1, x2, y2) is made of
edges: x2 and y2 lie on the far edge of the last pixel, so a mask of one pixel has a 1 x 1 box.
A point (x, y) is the index of a pixel.

Differences from the paper (arXiv 2508.08177):
  1. Its release sits on a square canvas of 840 x 840 pixels. Here an image keeps its aspect ratio
     unless `--resize square:840` is given.
  2. The prompts say the same in our own words.
  3. The paper does not publish how its key points were made. `keypoints_from_mask` agrees best
     with its data.

Read next: crm.py, which encodes an image and a question for the language model.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import rewards
from rewards import Answer, Box, Points, Terms, parse_answer, write_answer
from runtime.cli import ROOT, exit_on, print0, show_every_character
from runtime.files import read_text
from runtime.images import headers_fit, load_image, load_mask
from runtime.pictures import contact_sheet, overlay
from runtime.readers import (
    BadRow,
    check_row,
    decode_row,
    number_repeated_ids,
    read_rows,
    tight_box,
    usable_rows,
)
from runtime.registry import find

__all__ = ["BadRow", "load_image", "load_mask"]  # re-exported

STRIDE = 28  # one visual token of Qwen2.5-VL covers 2 x 2 patches of 14 pixels
MIN_PIXELS, MAX_PIXELS = 56 * 56, 840 * 840
COORDINATES = {  # what the numbers of a model are, and how its prompt says so
    "pixels": "in pixels of this image",
    "norm1000": "in thousandths of the width and height of this image",
}
# used where none is given: training starts from EMBEDDED, questions are put to TAUGHT
EMBEDDED = {name: ROOT / "demo" / name for name in ("crm", "asm", "data")}
TAUGHT = EMBEDDED | {"crm": ROOT / "demo/crm_grpo"}


# ---------------------------------------------------------------- prompts

EXAMPLE_ANSWER = write_answer(("x1", "y1", "x2", "y2"), (("x", "y"), ("x", "y")))
ADVICE = "The box is tight; both points lie well inside the region, apart from each other."
PROMPTS = {  # --prompt takes one of these, or a text file with {query} in it
    "reasoning": "{query}\n"
    "Reason first, then point to the region that is meant, {coordinates}:\n"
    f"<think>what you see, what it is, where it lies</think>{EXAMPLE_ANSWER}\n"
    f"{ADVICE}",
    "direct": "{query}\n"
    "Point to the region that is meant, {coordinates}, and write nothing else:\n"
    f"{EXAMPLE_ANSWER}\n"
    f"{ADVICE}",
}


def load_prompt(name: str) -> str:
    """Returns a template with {query} in it.

    name: a key of PROMPTS, a key of ANSWER_FORMATS (whose own prompt is meant), a text file, or the
    template itself. ValueError for anything else, and where {query} is missing."""
    if name in PROMPTS:
        return PROMPTS[name]
    if name in ANSWER_FORMATS:
        return find(ANSWER_FORMATS[name]).prompt
    if "{query}" in name:
        return name
    known = ", ".join([*PROMPTS, *ANSWER_FORMATS])
    if not Path(name).is_file():
        raise ValueError(f"--prompt {name}: neither one of {known} nor a text file")
    text = read_text(name).strip()
    if "{query}" not in text:
        raise ValueError(
            f"--prompt {name}: the file has no {{query}} in it, so the question is lost"
        )
    return text


def fill_prompt(template: str, query: str, coordinates: str = "pixels") -> str:
    """Returns what the language model is asked. The template's JSON has braces of its own."""
    return template.replace("{coordinates}", COORDINATES[coordinates]).replace("{query}", query)


# ---------------------------------------------------------------- one question about one image


@dataclass
class Example:
    """One question about one image. Box, points and mask are in the image frame."""

    id: str
    image: Image.Image  # RGB, upright
    query: str
    bbox: Box
    points: Points  # the two key points
    mask: np.ndarray | None = None  # (H, W) bool
    supercategory: str = ""
    category: str = ""
    think: str = ""  # a reasoning trace, where the data has one; only supervised training reads it
    extra: dict[str, Any] = field(default_factory=dict)  # whatever else the data says


@dataclass(frozen=True)
class Sizes:
    """The size (width, height) of one image in both frames."""

    image: tuple[int, int]
    model: tuple[int, int]


def to_model(xy: Any, sizes: Sizes) -> Any:
    """Image frame -> model frame. xy is a box, a point or a nesting of them, which is returned."""
    return _scale(xy, sizes.model[0] / sizes.image[0], sizes.model[1] / sizes.image[1])


def to_image(xy: Any, sizes: Sizes) -> Any:
    """Model frame -> image frame. xy is a box, a point or a nesting of them, which is returned."""
    return _scale(xy, sizes.image[0] / sizes.model[0], sizes.image[1] / sizes.model[1])


def _scale(xy: Any, sx: float, sy: float) -> Any:
    if not isinstance(xy[0], int | float):
        return tuple(_scale(item, sx, sy) for item in xy)
    if len(xy) == 4:
        x1, y1, x2, y2 = xy
        return x1 * sx, y1 * sy, x2 * sx, y2 * sy
    x, y = xy
    return (x + 0.5) * sx - 0.5, (y + 0.5) * sy - 0.5  # the centre of pixel 0 is at 0.5


def clip_to(size: tuple[int, int], xy: Any) -> Any:
    """Clamps x to [-width, 2 width] and y to [-height, 2 height], image frame. A wild number of a
    model must not break the segmenter, and a box that leaves its image a little may be right.

    size: (width, height) of the image; xy as in `to_image`."""
    if not isinstance(xy[0], int | float):
        return tuple(clip_to(size, item) for item in xy)
    clipped = []
    for i, value in enumerate(xy):
        side = size[i % 2]  # x, y, x, y
        clipped.append(min(max(value, -side), 2.0 * side))
    return tuple(clipped)


def model_size(
    size: tuple[int, int],
    resize: str = "aspect",
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
    stride: int = STRIDE,
) -> tuple[int, int]:
    """Returns the size (width, height) to which an image is resized, multiples of the stride.

    resize  "aspect" is Qwen's own smart_resize: it keeps the ratio as well as such multiples can,
            with min_pixels <= width * height <= max_pixels
            "aspect:MAX" is the same with its own max_pixels
            "square:SIDE" is SIDE x SIDE: the ratio is not kept, as in the released data
    ValueError for any other resize, a square of more than max_pixels, and an image that is longer
    than 200 times its width."""
    kind, _, number = resize.partition(":")
    has_number = re.fullmatch(r"[0-9]{1,8}", number) is not None
    if kind == "aspect" and (has_number or resize == "aspect"):
        most = int(number) if has_number else max_pixels
        if most < stride * stride:
            raise ValueError(f"--resize {resize}: give at least {stride * stride} pixels")
        width, height = size
        # rounding up to the least may quadruple an area, and then the most must still hold
        least = min(min_pixels, most // 4)
        height, width = smart_resize(height, width, stride, least, most)
        return width, height
    side = int(number) if kind == "square" and has_number else 0
    if side == 0 or side % stride:
        raise ValueError(
            f'--resize {resize}: give "aspect", "aspect:PIXELS", or "square:SIDE", where SIDE is a '
            f"multiple of {stride}"
        )
    if side * side > max_pixels:
        raise ValueError(
            f"--resize {resize}: {side * side:,} pixels are more than {max_pixels:,}, the limit of "
            "the checkpoint; take a smaller SIDE"
        )
    return side, side


# ---------------------------------------------------------------- box and key points of a mask


def box_from_mask(mask: np.ndarray) -> Box:
    """Returns the tight box of a (H, W) mask. ValueError where it is empty."""
    if not mask.any():
        raise ValueError("the mask is empty")
    return tight_box(mask)


def keypoints_from_mask(mask: np.ndarray) -> Points:
    """Returns two pixels deep inside a (H, W) mask and apart from each other.

    The depth of a pixel is its Euclidean distance to the nearest pixel outside; what lies beyond
    the border is outside. The first point is the deepest pixel. The second is the deepest among the
    pixels that are farther from the first than the median pixel is, or the first again where there
    is none. ValueError where the mask is empty."""
    ys, xs = np.nonzero(mask)
    if len(xs) == 0:
        raise ValueError("the mask is empty")
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][ys, xs]
    first = depth.argmax()
    distance = np.hypot(xs - xs[first], ys - ys[first])
    far = distance > np.median(distance)
    second = np.where(far, depth, -1).argmax() if far.any() else first
    return (float(xs[first]), float(ys[first])), (float(xs[second]), float(ys[second]))


# ---------------------------------------------------------------- what a prompt asks for


@dataclass(frozen=True)
class AnswerFormat:
    """How the completions of a prompt are read, rewarded, compared with the truth and imitated."""

    prompt: str  # a template that asks for such answers
    parse: Callable[[str], Answer]
    reward_terms: Callable[[str, Example, Sizes], Terms]  # of one completion
    target_text: Callable[[Example, Sizes, bool], str]  # what supervised training imitates
    truth: Callable[[Example], dict[str, Any]]  # of a line of predictions.jsonl, image frame
    key: str = "bbox"  # of ANSWER_FORMATS
    several: bool = False  # True where an answer may have several regions
    metrics: dict[str, tuple[str, Callable]] = field(default_factory=dict)  # beside metrics.METRICS


def box_and_points_terms(text: str, example: Example, sizes: Sizes) -> Terms:
    """Returns rewards.reward_terms of one completion, in the model frame."""
    gt_box = to_model(example.bbox, sizes)
    gt_points = to_model(example.points, sizes)
    return rewards.reward_terms(text, gt_box, gt_points, sizes.model)


def box_and_points(example: Example) -> dict[str, Any]:
    """Returns the true box and key points, image frame."""
    return {"bbox": example.bbox, "points": example.points}


def target_text(example: Example, sizes: Sizes, with_think: bool = True) -> str:
    """Returns the completion of a perfect model, in whole pixels of the model frame."""
    bbox, points = in_whole_pixels(example.bbox, example.points, sizes)
    answer = write_answer(bbox, points)
    if with_think and example.think:
        return f"<think>{example.think}</think>{answer}"
    return answer


def in_whole_pixels(bbox: Box, points: Points, sizes: Sizes) -> tuple[Box, Points]:
    """Returns a box and points of the image frame in whole pixels of the model frame, clipped to
    the image. Even the thinnest target keeps an area."""
    width, height = sizes.model
    x1, y1, x2, y2 = (round(v) for v in to_model(bbox, sizes))
    x1 = min(max(x1, 0), width - 1)
    y1 = min(max(y1, 0), height - 1)
    x2 = min(max(x2, x1 + 1), width)
    y2 = min(max(y2, y1 + 1), height)
    inside = []
    for x, y in to_model(points, sizes):
        inside.append((min(max(round(x), 0), width - 1), min(max(round(y), 0), height - 1)))
    return (x1, y1, x2, y2), tuple(inside)


ONE_BOX = AnswerFormat(
    prompt=PROMPTS["reasoning"],
    parse=parse_answer,
    reward_terms=box_and_points_terms,
    target_text=target_text,
    truth=box_and_points,
)
# the key of the answer's JSON object that a prompt shows -> how such answers are treated
ANSWER_FORMATS = {
    "nothing": "extras.silence.MAY_BE_SILENT",  # before "bbox", which its prompt shows as well
    "bbox": "data.ONE_BOX",
    "boxes": "extras.boxes.SEVERAL_BOXES",
}


def answer_format_of(template: str) -> AnswerFormat:
    """Returns the format that a prompt asks for: the one whose key stands in quotes in it."""
    for key, entry in ANSWER_FORMATS.items():
        if f'"{key}"' in template:
            return find(entry)
    return find(ANSWER_FORMATS["bbox"])


# ---------------------------------------------------------------- data sets


def load_samples(path: str | Path, split: str = "train", skip_bad_rows: bool = False) -> "Examples":
    """Returns the examples of one split. An image is decoded when its example is asked for.

    path: what a reader in runtime/readers.py reads. A row that cannot be used raises BadRow when it
    is asked for. With skip_bad_rows all rows are tried now, and bad ones are left out and counted;
    `.skipped` has their messages. Repeated ids get a number. ValueError where nothing is there, a
    file or column cannot be read, or no row is left."""
    rows, _ = read_rows(Path(path), split)
    repeated = number_repeated_ids(rows)
    if repeated:
        print0(repeated[0])
    examples = Examples(rows)
    if skip_bad_rows:
        examples.rows = [row for row, _ in usable_rows(rows, examples.skipped)]
    if not examples.rows:
        problem = examples.skipped[0]
        raise ValueError(f"{path}: no usable row in split {split!r}; the first bad row: {problem}")
    if examples.skipped:
        count = len(examples.skipped)
        print0(f"{path}, {split}: {count} bad rows skipped; first: {examples.skipped[0]}")
    return examples


def load_splits(
    path: str | Path, skip_bad_rows: bool = False, eval_limit: int = 0
) -> tuple["Examples", "Examples"]:
    """Returns the training examples and the held-out ones, each row checked as far as that goes
    without decoding its image.

    Held out is the split "test", else "val". eval_limit: at most so many of it, evenly spread; 0:
    all. Nothing is held out where the data has no such split."""
    train = load_samples(path, "train", skip_bad_rows)
    train.check()
    names = read_rows(Path(path), None)[1]
    candidates = [name for kind in ("test", "val") for name in names if name.startswith(kind)]
    if not candidates or Path(path).suffix == ".parquet":
        print0(f'{path}: no split "test" or "val" there, so nothing is held out')
        return train, Examples([])
    held_out = candidates[0]
    tests = load_samples(path, held_out, skip_bad_rows)
    tests.check()
    return train, tests.spread(eval_limit or len(tests))


def evenly_spread(count: int, most: int) -> list[int]:
    """Returns at most `most` of the numbers below count, evenly spread, the first among them."""
    n = min(most, count)
    return [count * k // n for k in range(n)]


class Examples(Sequence):
    """Rows of a reader. Each becomes an Example whenever it is asked for. A slice is lazy."""

    def __init__(self, rows: list[dict], skipped: Sequence[str] = ()):
        self.rows = rows
        self.skipped = list(skipped)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int | slice) -> Any:
        if isinstance(i, slice):
            return Examples(self.rows[i], self.skipped)
        row = self.rows[i]
        return example_of(row, decode_row(row))

    def spread(self, most: int) -> "Examples":
        """Returns at most `most` of these, evenly spread: a file may be sorted by category."""
        return Examples([self.rows[i] for i in evenly_spread(len(self), most)], self.skipped)

    def ids(self) -> list[str]:
        """Returns all ids, in order, without decoding an image."""
        return [row["id"] for row in self.rows]

    def check(self) -> None:
        """BadRow for the first row with a fault in its values or in the headers of its files. An
        image is only decoded where headers do not fit together."""
        for row in self.rows:
            check_row(row)
            if not headers_fit(row):
                decode_row(row)


def example_of(row: dict, decoded: tuple) -> Example:
    """Returns a row as an example. decoded: image, mask, box and points (runtime/readers.py); box
    and points that are None are taken from the mask."""
    image, mask, bbox, points = decoded
    return Example(
        id=row["id"],
        image=image,
        query=row["query"],
        bbox=box_from_mask(mask) if bbox is None else bbox,
        points=keypoints_from_mask(mask) if points is None else points,
        mask=mask,
        supercategory=row["supercategory"],
        category=row["category"],
        think=row["think"],
        extra=row["extra"],
    )


# ---------------------------------------------------------------- python data.py PATH

SHOWN_PER_SPLIT = 12  # examples of a split on a contact sheet
ROWS_TRIED = 60  # of a split, to see what the numbers of its boxes mean
WHERE_IDS_COME_FROM = {
    ".jsonl": "the row's id, else the folder's name and the line",
    ".json": "the annotation's id, else its number",
    ".parquet": "extra_info's id, else its index, else the row's number",
}


def readings_of(box: Box, size: tuple[int, int]) -> dict[str, Box]:
    """Returns what a box would be in pixels of an image of this (width, height), by what its four
    numbers may mean. Each reading is named as a user would call it."""
    width, height = size
    x1, y1, x2, y2 = box
    in_fractions = (x1 * width, y1 * height, x2 * width, y2 * height)
    return {
        "pixels": box,
        "pixels of the model frame": to_image(box, Sizes(size, model_size(size))),
        "0 to 1": in_fractions,
        "0 to 1000": tuple(value / 1000 for value in in_fractions),
        "x, y, width, height": (x1, y1, x1 + x2, y1 + y2),
    }


def coordinates_that_fit(rows: list[dict]) -> str:
    """Returns one line where the boxes of some rows fit their masks, or where there are none their
    images, better when they are read in another way than as pixels; "" where pixels fit."""
    scores: dict[str, list[float]] = {}
    with_box = [row for row in rows if is_a_box(row["bbox"])]
    for i in evenly_spread(len(with_box), ROWS_TRIED):
        row = with_box[i] | {"bbox": None, "points": None}
        has_mask = row["mask"] is not None
        if not has_mask:
            row |= {"bbox": [0, 0, 1.5, 1.5], "points": [[0, 0], [1, 1]]}  # any that is allowed
        try:
            image, mask, _, _ = decode_row(row)
        except BadRow:
            continue  # it is reported as a bad row
        for name, box in readings_of(with_box[i]["bbox"], image.size).items():
            if has_mask:
                score = rewards.box_iou(box, box_from_mask(mask))
            else:
                score = float(lies_inside(box, image.size))
            scores.setdefault(name, []).append(score)
    if not scores:
        return ""
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    best = max(means, key=means.get)
    if means[best] < 0.5 or means[best] < means["pixels"] + 0.1:
        return ""
    return (
        f"the boxes look like {best} (fit {means[best]:.2f}), not like pixels of the image as "
        f"x1, y1, x2, y2 (fit {means['pixels']:.2f}); convert them"
    )


def is_a_box(value: Any) -> bool:
    """Whether a row's bbox is a list of four numbers."""
    if not isinstance(value, list) or len(value) != 4:
        return False
    return all(isinstance(number, int | float) for number in value)


def lies_inside(box: Box, size: tuple[int, int]) -> bool:
    """Whether a box is one, covers a pixel at least, and lies in an image of (width, height)."""
    x1, y1, x2, y2 = box
    return x1 >= 0 and y1 >= 0 and x2 >= x1 + 1 and y2 >= y1 + 1 and x2 <= size[0] and y2 <= size[1]


def report_split(path: Path, split: str, known_problems: list[str]) -> list[tuple[Any, str]]:
    """Prints what is in a split and what is wrong with it, and adds the latter to known_problems.

    Returns (picture, text) of a few examples for a contact sheet."""
    rows, _ = read_rows(path, split)
    problems = number_repeated_ids(rows)
    sizes: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    shown = []
    for i, (row, decoded) in enumerate(usable_rows(rows, problems)):
        example = example_of(row, decoded)
        sizes[f"{example.image.width}x{example.image.height}"] += 1
        supercategory = example.supercategory or "(none)"
        category = example.category or "(none)"
        categories[f"{supercategory} / {category}"] += 1
        if i % max(1, len(rows) // SHOWN_PER_SPLIT) == 0:
            picture = overlay(example.image, example.mask, example.bbox, example.points)
            lines = wrap(example.query, 38, max_lines=3, placeholder=" …")
            shown.append((picture, "\n".join([example.id[:36], *lines])))
    print(f"{split}: {sizes.total()} of {len(rows)} rows can be used")
    if split != "train" and not split.startswith(("test", "val")) and path.suffix != ".parquet":
        print('  a split of this name is only read where it is asked for: "train" trains, and')
        print('  "test" or "val" is held out')
    hint = coordinates_that_fit(rows)
    if hint:
        print(f"  {hint}")
    print("  sizes:", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(8)))
    good = [row for row in rows if not row["problem"]]
    example_row = good[0] if good else rows[0]
    source = WHERE_IDS_COME_FROM.get(Path(example_row["where"].rpartition(", ")[0]).suffix, "")
    print(f"  ids look like {example_row['id']}" + (f" ({source})" if source else ""))
    print("  rows, supercategory / category:")
    for name, count in sorted(categories.items()):
        print(f"{count:8} {name}")
    if any("(none)" in name for name in categories):
        print("  (none): not in the row, so the tables of evaluate.py have no line for it")
    for problem in problems:
        if problem not in known_problems:  # a broken line is a bad row of every split
            print(problem)
            known_problems.append(problem)
    return shown


def main(argv: list[str] | None = None) -> int:
    """Prints what is in a data set. Returns the exit status: 2 where a row cannot be used."""
    show_every_character()
    parser = argparse.ArgumentParser(
        description="What is in a data set, and what is wrong with it."
    )
    parser.add_argument("path", type=Path, help="a data set, as for --data")
    parser.add_argument("--split", help="only this one")
    parser.add_argument("--sheet", type=Path, help="write a picture of a few examples here")
    args = parser.parse_args(argv)
    splits = [args.split]
    if args.split is None:
        splits = read_rows(args.path, None)[1] or ["train"]
    problems: list[str] = []
    shown: list[tuple[Any, str]] = []
    for split in splits:
        shown += report_split(args.path, split, problems)
    if args.sheet and shown:
        contact_sheet(shown).save(args.sheet)
    return 2 if problems else 0


if __name__ == "__main__":
    with exit_on(ValueError, OSError):
        raise SystemExit(main())
