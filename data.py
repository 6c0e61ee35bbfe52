"""Samples, prompts and coordinate frames.

    samples = load_samples("demo/data", split="test")        # U-MRG parquet, or a folder with samples.jsonl
    sample = samples[0]                                      # decoded here, not before
    python data.py PATH [--split test] [--sheet sheet.png]   # what is in it, every bad row, a contact sheet

Two frames, both in pixels with the origin at the top left, x to the right, y down:
  image frame   the image, upright: what people, masks and the segmenter use
  model frame   the image after our one resize: what the language model reads and writes
`to_model` and `to_image` are the only conversions. A box (x1, y1, x2, y2) is made of edges, x2 and y2 on the
far edge of the last pixel (a one-pixel mask has a 1 x 1 box); a point (x, y) is the index of a pixel.

Differences from the paper (arXiv 2508.08177):
  1. Its release sits on a square 840 x 840 canvas; ours keeps the aspect ratio unless `--resize square:840`.
  2. The prompts say the same in our own words.
  3. It does not publish how its key points were made; `keypoints_from_mask` agrees best with its data.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import distance_transform_edt
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from rewards import KEY_POINTS, Box, Points, Terms, parse_answer, reward_terms, write_answer
from runtime.cli import exit_on, matcher, print0
from runtime.files import read_text
from runtime.images import MAX_RATIO, headers_fit, load_image, load_mask
from runtime.readers import read_rows

STRIDE = 28  # one visual token of Qwen2.5-VL: 2 x 2 patches of 14 pixels
MIN_PIXELS, MAX_PIXELS = 56 * 56, 840 * 840
NO_TARGET = "bbox: is missing, or points are, and so is a mask to take them from"
OR_SKIP = "; fix the row or use --skip-bad-rows"

EXAMPLE = write_answer(("x1", "y1", "x2", "y2"), [("x", "y")] * KEY_POINTS)
BOXES_EXAMPLE = (
    '<answer>{"boxes": [[x1, y1, x2, y2], ...], "points": [['
    + ", ".join(["x, y"] * KEY_POINTS)
    + "], ...]}</answer>"
)
ALL = "both" if KEY_POINTS == 2 else "all"
ADVICE = f"The box is tight; {ALL} points lie well inside the region, apart from each other."
PROMPTS = {  # the only copies; --prompt takes a text file with {query} instead
    "reasoning": "{query}\nReason first, then point to the region that is meant, in pixels of this image:\n"
    f"<think>what you see, what it is, where it lies</think>{EXAMPLE}\n{ADVICE}",
    "direct": "{query}\nPoint to the region that is meant, in pixels of this image, and write nothing else:\n"
    f"{EXAMPLE}\n{ADVICE}",
    # several boxes, see extras/boxes.py
    "multi": "{query}\nReason first, then point to every region that is meant, in pixels of this image:\n"
    f"<think>what you see, what it is, where it lies</think>{BOXES_EXAMPLE}\n"
    f"A tight box for each region; points i, {KEY_POINTS} of them, lie well inside the region of box i.",
}


class BadRow(ValueError):
    """A row that cannot be used; the message names the file, the row, the key and the fix."""


@dataclass
class Sample:
    """One question about one image. bbox, points and mask are in the image frame."""

    id: str
    image: Image.Image  # RGB, upright
    query: str
    bbox: Box
    points: Points  # KEY_POINTS of them
    mask: np.ndarray | None = None  # (H, W) bool
    supercategory: str = ""
    category: str = ""
    think: str = ""  # a reasoning trace, where the data has one (supervised warm start only)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """The sizes (width, height) of one image in both frames."""

    image: tuple[int, int]
    model: tuple[int, int]


def to_model(xy, frame: Frame):
    """Image frame -> model frame. xy: a box, a point, or any nesting of them; tuples of floats come back."""
    return _scale(xy, frame.model[0] / frame.image[0], frame.model[1] / frame.image[1])


def to_image(xy, frame: Frame):
    """Model frame -> image frame. xy: a box, a point, or any nesting of them; tuples of floats come back."""
    return _scale(xy, frame.image[0] / frame.model[0], frame.image[1] / frame.model[1])


def _scale(xy, sx: float, sy: float):
    if not isinstance(xy[0], (int, float)):
        return tuple(_scale(item, sx, sy) for item in xy)
    if len(xy) == 4:
        return xy[0] * sx, xy[1] * sy, xy[2] * sx, xy[3] * sy
    return (xy[0] + 0.5) * sx - 0.5, (xy[1] + 0.5) * sy - 0.5  # pixel 0 has its centre at 0.5


def clip_to(size: tuple[int, int], xy):
    """Coordinates of a model, image frame, kept within one image size (width, height) around the image."""
    if isinstance(xy[0], (int, float)):
        return tuple(min(max(v, -size[i % 2]), 2.0 * size[i % 2]) for i, v in enumerate(xy))
    return tuple(clip_to(size, item) for item in xy)


def model_size(
    size: tuple[int, int],
    resize: str = "aspect",
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """(width, height) in the model frame: multiples of 28.

    resize: "aspect" is Qwen's own smart_resize, which keeps the ratio as well as multiples of 28 can, with
    min_pixels <= w*h <= max_pixels; "square:SIDE" gives SIDE x SIDE, ratio not kept, as the released data.
    ValueError for any other resize, a square beyond max_pixels, and an image thinner than 1:200."""
    if resize == "aspect":
        h, w = smart_resize(size[1], size[0], STRIDE, min_pixels, max_pixels)
        return w, h
    side = int(resize[7:]) if re.fullmatch(r"square:[0-9]{1,6}", resize) else 0
    if side == 0 or side % STRIDE:
        raise ValueError(
            f'--resize {resize}: give "aspect", or "square:SIDE", SIDE a multiple of {STRIDE}'
        )
    if side * side > max_pixels:
        raise ValueError(
            f"--resize {resize}: {side * side:,} pixels are over {max_pixels:,}, the limit of "
            "--max-pixels and the checkpoint; take a smaller SIDE or raise both"
        )
    return side, side


def box_from_mask(mask: np.ndarray) -> Box:
    """The tight box of a non-empty (H, W) mask. ValueError when it is empty."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        raise ValueError("the mask is empty")
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def keypoints_from_mask(mask: np.ndarray) -> Points:
    """KEY_POINTS pixels deep inside a non-empty (H, W) mask, apart from each other. ValueError when empty.
    The first has the largest Euclidean distance transform d. Each further one has the largest d among the
    pixels that are farther from those before than the median pixel is (the first again if there is none)."""
    box_from_mask(mask)  # refuses an empty one
    ys, xs = np.nonzero(mask)
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][
        ys, xs
    ]  # beyond the border is outside
    chosen = [depth.argmax()]
    while len(chosen) < KEY_POINTS:
        away = np.min([np.hypot(xs - xs[i], ys - ys[i]) for i in chosen], axis=0)
        far = away > np.median(away)
        chosen.append(np.where(far, depth, -1).argmax() if far.any() else chosen[0])
    return tuple((float(xs[i]), float(ys[i])) for i in chosen)


def load_prompt(name: str) -> str:
    """A template with {query} in it: a key of PROMPTS, a text file, or the text itself. ValueError without {query}."""
    if name in PROMPTS or "{query}" in name:
        return PROMPTS.get(name, name)
    if not Path(name).is_file():
        raise ValueError(f"--prompt {name}: neither one of {', '.join(PROMPTS)} nor a text file")
    text = read_text(name).strip()
    if "{query}" not in text:
        raise ValueError(
            f"--prompt {name}: the file has no {{query}} in it, so the question would be lost"
        )
    return text


def fill_prompt(template: str, query: str) -> str:
    return template.replace(
        "{query}", query
    )  # not str.format: the template's JSON has braces of its own


def target_text(sample: Sample, frame: Frame, with_think: bool = True) -> str:
    """The completion of a perfect model, in the model frame: what supervised training imitates."""
    think = f"<think>{sample.think}</think>" if with_think and sample.think else ""
    return think + write_answer(*as_written(sample.bbox, sample.points, frame))


def as_written(bbox: Box, points: Points, frame: Frame) -> tuple[Box, Points]:
    """A box and points of the image frame in whole pixels of the model frame, within the image."""
    w, h = frame.model
    x1, y1, x2, y2 = (round(v) for v in to_model(bbox, frame))
    x1, y1 = min(max(x1, 0), w - 1), min(max(y1, 0), h - 1)
    box = (
        x1,
        y1,
        min(max(x2, x1 + 1), w),
        min(max(y2, y1 + 1), h),
    )  # even the thinnest target has an area
    return box, tuple(
        (min(max(round(x), 0), w - 1), min(max(round(y), 0), h - 1))
        for x, y in to_model(points, frame)
    )


class OneBox:
    """What the prompts "reasoning" and "direct" ask for. extras/boxes.py has the same four names for several boxes."""

    read, target_text = staticmethod(parse_answer), staticmethod(target_text)

    @staticmethod
    def truth(sample: Sample) -> dict:
        """What an answer is compared with, image frame, for predictions.jsonl."""
        return {"bbox": sample.bbox, "points": sample.points}

    @staticmethod
    def reward_terms(
        texts: Sequence[str], sample: Sample, frame: Frame, official: bool = False
    ) -> list[Terms]:
        """rewards.reward_terms of some completions of a sample, in the model frame."""
        truth = to_model(sample.bbox, frame), to_model(sample.points, frame)
        return [reward_terms(text, *truth, official, frame.model) for text in texts]


def answers_of(template: str):
    """What a prompt asks for: OneBox, or extras.boxes where it has "boxes" in quotes, a user's own prompt, too."""
    if '"boxes"' not in template:
        return OneBox
    from extras import boxes

    return boxes


def load_samples(path: str | Path, split: str = "train", skip_bad_rows: bool = False) -> "Samples":
    """The samples of one split, lazily: an image is decoded when its sample is asked for.

    path: what a reader in runtime/readers.py reads. A row that cannot be used raises BadRow when asked for; with
    skip_bad_rows all are tried now, bad ones left out and counted, their messages in `.skipped`. Repeated ids get a number. ValueError: nothing there, an unreadable file or column, no row left."""
    rows, _ = read_rows(Path(path), split)
    for message in number_repeated_ids(rows)[:1]:
        print0(message)
    samples = Samples(rows)
    if skip_bad_rows:
        samples.rows = [row for row, _ in usable_rows(rows, samples.skipped)]
    if not samples.rows:
        raise ValueError(
            f"{path}: no usable sample in split {split!r}; the first bad row: {samples.skipped[0]}"
        )
    if samples.skipped:
        print0(
            f"{path}, {split}: {len(samples.skipped)} bad rows skipped; first: {samples.skipped[0]}"
        )
    return samples


class Samples(Sequence):
    """Rows (see runtime/readers.py) that become a Sample whenever one is asked for; a slice is lazy, too."""

    def __init__(self, rows: list[dict], skipped: Sequence[str] = ()):
        self.rows, self.skipped = rows, list(skipped)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return (
            Samples(self.rows[i], self.skipped) if isinstance(i, slice) else _sample(self.rows[i])
        )

    def ids(self) -> list[str]:
        """All ids, in order, without decoding an image."""
        return [row["id"] for row in self.rows]

    def only(self, pattern: str) -> "Samples":
        """A view of those whose super-category has a match of a regular expression; ValueError if none."""
        matches = matcher("only", pattern)
        rows = [row for row in self.rows if matches(row["supercategory"])]
        if not rows:
            raise ValueError(f"--only {pattern}: no sample has such a super-category")
        return Samples(rows, self.skipped)

    def check(self) -> None:
        """BadRow for the first row with a fault that shows in its values or in the headers of its image and mask; only
        where these do not fit together are they decoded."""
        for row in self.rows:
            _check(row)
            if not headers_fit(row):
                _sample(row)


def number_repeated_ids(rows: list[dict]) -> list[str]:
    """Makes ids unique: a, a#2, a#3; one message per repetition."""
    seen, messages = Counter(), []
    for row in rows:
        name = row["id"]
        seen[name] += 1
        if seen[name] > 1:
            row["id"] = f"{name}#{seen[name]}"
            messages.append(
                f"{row['where']}, id: {name!r} is there already; called {row['id']} from here on"
            )
    return messages


def usable_rows(rows: list[dict], problems: list[str]):
    """Yield each row that can be used with its sample; the messages of the others are added to problems."""
    for row in rows:
        try:
            yield row, _sample(row)
        except BadRow as error:
            problems.append(str(error).removesuffix(OR_SKIP))


def _need(ok, row: dict, problem: str) -> None:
    if not ok:
        raise BadRow(f"{row['where']}, {problem}{OR_SKIP}")


def _are_numbers(values, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count
        and all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in values
        )
    )


def _check(row: dict) -> None:
    """BadRow for what shows without decoding an image."""
    bbox, points = row["bbox"], row["points"]
    _need(not row["problem"], row, row["problem"])
    _need(isinstance(row["query"], str) and row["query"].strip(), row, "query: is empty")
    _need(
        bbox or "box" not in row["extra"],
        row,
        'bbox: is missing, but there is "box"; rename that key',
    )
    _need(row["mask"] or (bbox and points), row, NO_TARGET)
    if bbox:
        ordered = _are_numbers(bbox, 4) and bbox[0] < bbox[2] and bbox[1] < bbox[3]
        _need(ordered, row, f"bbox: {bbox!r} is not four finite numbers with x1 < x2 and y1 < y2")
    if points:
        pairs = (
            isinstance(points, list)
            and len(points) == KEY_POINTS
            and all(_are_numbers(p, 2) for p in points)
        )
        _need(
            pairs,
            row,
            f"points: {points!r} is not {KEY_POINTS} pairs [x, y], as KEY_POINTS in rewards.py says; "
            "without any, they are taken from the mask",
        )


def _sample(row: dict) -> Sample:
    """A row, decoded and checked."""
    _check(row)
    image = mask = None
    try:
        source = row["image"]() if callable(row["image"]) else row["image"]
        if source is None:
            raise ValueError("has no bytes")
        image = load_image(source)
        mask_source = row["mask"]() if callable(row["mask"]) else row["mask"]
        mask = load_mask(mask_source, of=source) if mask_source is not None else None
    except (ValueError, OSError) as error:
        _need(False, row, f"{'mask' if image else 'image'}: {str(error).splitlines()[0]}")
    W, H = image.size
    _need(
        max(W, H) <= MAX_RATIO * min(W, H), row, f"image: of {W}x{H} is too long and thin; crop it"
    )
    _need(mask is not None or (row["bbox"] and row["points"]), row, NO_TARGET)
    if mask is not None:
        _need(
            mask.shape == (H, W),
            row,
            f"mask: is {mask.shape[1]}x{mask.shape[0]}, its image {W}x{H}",
        )
        _need(mask.any(), row, "mask: is empty")
    bbox = tuple(map(float, row["bbox"] or box_from_mask(mask)))
    points = tuple((float(x), float(y)) for x, y in row["points"] or keypoints_from_mask(mask))
    in_pixels = max(bbox) > 1 or (mask is not None and bbox == box_from_mask(mask))
    _need(
        in_pixels, row, f"bbox: {list(bbox)} looks like fractions of the {W}x{H} image; give pixels"
    )
    for key, corners in (("bbox", (bbox[:2], bbox[2:])), ("points", points)):
        inside = all(-1 <= x <= W + 1 and -1 <= y <= H + 1 for x, y in corners)
        _need(inside, row, f"{key}: {row[key]} is outside the {W}x{H} image")
    return Sample(
        row["id"],
        image,
        row["query"],
        bbox,
        points,
        mask,
        row["supercategory"],
        row["category"],
        row["think"],
        row["extra"],
    )


if __name__ == "__main__":
    from extras.data_report import main

    with exit_on(ValueError, OSError):
        raise SystemExit(main())
