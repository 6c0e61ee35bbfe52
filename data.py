"""Samples, prompts and coordinate frames.

    samples = load_samples("demo/data", split="test")        # U-MRG parquet, or a folder with samples.jsonl
    sample = samples[0]                                      # decoded here, not before

Two frames, both in pixels with the origin at the top left, x to the right, y down:
  image frame   the image as stored: what people, masks and the segmenter use
  model frame   the image after our one resize: what the language model reads and writes
`to_model` and `to_image` are the only conversions. A box is (x1, y1, x2, y2) with x2, y2 on the far edge of
the last pixel (a one-pixel mask has a 1 x 1 box); a point is (x, y), a pixel's index.

Differences from the paper (arXiv 2508.08177):
  1. Its release sits on a square 840 x 840 canvas; ours keeps the aspect ratio unless told
     `--resize square:840`.
  2. The prompts say the same in our own words.
  3. It does not publish how its key points were made; `keypoints_from_mask` is the best reading of the data.
"""
import io
import json
import math
import re
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy.ndimage import distance_transform_edt

from runtime.files import read_text

Box = tuple[float, float, float, float]
Point = tuple[float, float]

STRIDE = 28                     # one visual token of Qwen2.5-VL: 2 x 2 patches of 14 pixels
MIN_SIDE = 14                   # an image smaller than one patch holds nothing to ground
MIN_PIXELS, MAX_PIXELS = 56 * 56, 840 * 840

ANSWER = '<answer>{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}</answer>'
PROMPTS = {                     # the only copies; --prompt takes a text file with {query} instead
    "reasoning": "{query}\nReason first, then point to the region that is meant, in pixels of this image:\n"
                 "<think>what you see, what it is, where it lies</think>" + ANSWER +
                 "\nThe box is tight; both points lie well inside the region, apart from each other.",
    "direct": "{query}\nPoint to the region that is meant, in pixels of this image, and write nothing else:\n"
              + ANSWER + "\nThe box is tight; both points lie well inside the region, apart from each other.",
}


class BadRow(ValueError):
    """A row that cannot be used; the message names the file, the row, the key and the fix."""


@dataclass
class Sample:
    """One question about one image. bbox, points and mask are in the image frame."""
    id: str
    image: Image.Image              # RGB
    query: str
    bbox: Box
    points: tuple[Point, Point]
    mask: np.ndarray | None = None  # (H, W) bool
    supercategory: str = ""
    category: str = ""
    think: str = ""                 # a reasoning trace, where the data has one (supervised warm start only)
    extra: dict[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------- frames

@dataclass(frozen=True)
class Frame:
    """The sizes (width, height) of one image in both frames."""
    image: tuple[int, int]
    model: tuple[int, int]


def to_model(xy, frame: Frame):
    """Coordinates, image frame -> model frame.
    xy: a box, a point, or any nesting of them; floats come back."""
    return _scale(xy, frame.model[0] / frame.image[0], frame.model[1] / frame.image[1])


def to_image(xy, frame: Frame):
    """Coordinates, model frame -> image frame.
    xy: a box, a point, or any nesting of them; floats come back."""
    return _scale(xy, frame.image[0] / frame.model[0], frame.image[1] / frame.model[1])


def clip_to(size: tuple[int, int], xy):
    """A model's coordinates, image frame, kept within one image size (width, height) around the image."""
    if isinstance(xy[0], (int, float)):
        return tuple(min(max(v, -size[i % 2]), 2.0 * size[i % 2]) for i, v in enumerate(xy))
    return tuple(clip_to(size, item) for item in xy)


def _scale(xy, sx: float, sy: float):
    if isinstance(xy[0], (int, float)):
        return tuple(v * (sy if i % 2 else sx) for i, v in enumerate(xy))   # x and y alternate in boxes, too
    return tuple(_scale(item, sx, sy) for item in xy)


def model_size(size: tuple[int, int], resize: str = "aspect", min_pixels: int = MIN_PIXELS,
               max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) in the model frame: multiples of 28.

    resize: "aspect" keeps the ratio as well as multiples of 28 can, with min_pixels <= w*h <= max_pixels;
    "square:SIDE" gives SIDE x SIDE, the ratio not kept, as the released data. ValueError on anything else."""
    if resize.startswith("square:") and resize[7:].isdigit() \
            and int(resize[7:]) % STRIDE == 0 and int(resize[7:]):
        return (int(resize[7:]),) * 2
    if resize != "aspect":
        raise ValueError(f'--resize {resize}: give "aspect", or "square:SIDE" '
                         f'with SIDE a multiple of {STRIDE}')
    width, height = size
    if max(size) > 100 * min(size):
        raise ValueError(f"an image of {width}x{height} is too long and thin; crop it")
    w, h = (max(STRIDE, round(v / STRIDE) * STRIDE) for v in size)
    scale, snap = (math.sqrt(max_pixels / (width * height)), math.floor) if w * h > max_pixels else \
                  (math.sqrt(min_pixels / (width * height)), math.ceil)
    if not min_pixels <= w * h <= max_pixels:
        w, h = (max(STRIDE, snap(v * scale / STRIDE) * STRIDE) for v in size)
    return w, h


# ---------------------------------------------------------------- ground truth from a mask
# (FACTS of the release, by evidence)

def box_from_mask(mask: np.ndarray) -> Box:
    """The tight box of a non-empty (H, W) mask. ValueError when it is empty."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        raise ValueError("the mask is empty")
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def keypoints_from_mask(mask: np.ndarray) -> tuple[Point, Point]:
    """Two pixels deep inside a non-empty (H, W) mask and apart from each other. ValueError when it is empty.

    P1 has the largest Euclidean distance transform d; P2 has the largest d among the mask's pixels that are
    farther from P1 than the median such distance (P1 itself when no pixel is)."""
    ys, xs = np.nonzero(mask)
    if not len(xs):
        raise ValueError("the mask is empty")
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][ys, xs]        # beyond the border is outside
    first = depth.argmax()
    away = np.hypot(xs - xs[first], ys - ys[first])
    far = away > np.median(away)
    second = np.where(far, depth, -1).argmax() if far.any() else first
    return (float(xs[first]), float(ys[first])), (float(xs[second]), float(ys[second]))


# ---------------------------------------------------------------- prompts and targets

def load_prompt(name: str) -> str:
    """A template with {query} in it: a key of PROMPTS, or a text file.
    ValueError when there is no {query}."""
    if name in PROMPTS:
        return PROMPTS[name]
    if not Path(name).is_file():
        raise ValueError(f"--prompt {name}: neither one of {', '.join(PROMPTS)} nor a text file")
    text = read_text(name).strip()
    if "{query}" not in text:
        raise ValueError(f"--prompt {name}: the file has no {{query}} in it, so the question would be lost")
    return text


def fill_prompt(template: str, query: str) -> str:
    return template.replace("{query}", query)   # not str.format: the template's JSON has braces of its own


def target_text(sample: Sample, frame: Frame, with_think: bool = True) -> str:
    """The answer a perfect model writes, in the model frame: what supervised training imitates."""
    whole = lambda xy: [round(v) for v in to_model(xy, frame)]
    x1, y1, x2, y2 = whole(sample.bbox)
    box = [x1, y1, max(x2, x1 + 1), max(y2, y1 + 1)]        # a target thinner than a pixel still has an area
    answer = json.dumps({"bbox": box, "points_1": whole(sample.points[0]),
                         "points_2": whole(sample.points[1])})
    think = f"<think>{sample.think}</think>" if with_think and sample.think else ""
    return f"{think}<answer>{answer}</answer>"


# ---------------------------------------------------------------- images

def load_image(source: str | Path | bytes) -> Image.Image:
    """An upright RGB image from a file or its bytes:
    grey, palette, 16-bit and rotated (EXIF) images come out right.

    Depths beyond 8 bits are stretched from their own minimum and maximum; transparent pixels become black, as
    the background of medical images is. ValueError, one line, when it is unreadable, under 14 pixels a side,
    or so large that Pillow takes it for a decompression bomb (over 89 million pixels)."""
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError("is a directory, not an image" if Path(source).is_dir() else "no such file")
    with _pillow("image"):
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        if min(image.size) < MIN_SIDE:
            raise ValueError(f"is {image.width}x{image.height}: a side must have {MIN_SIDE} pixels at least")
        image = ImageOps.exif_transpose(image)
        image.load()
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = np.nanmin(values), np.nanmax(values)
        image = Image.fromarray(np.uint8(np.nan_to_num((values - low) / max(high - low, 1e-12)) * 255))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.composite(rgba, Image.new("RGBA", rgba.size), rgba.getchannel("A"))
    return image.convert("RGB")


def load_mask(source: str | Path | bytes) -> np.ndarray:
    """(H, W) bool: where a grey image is brighter than 127. ValueError as load_image."""
    with _pillow("mask"):
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
        return np.asarray(image.convert("L")) > 127


@contextmanager
def _pillow(kind: str):
    """Whatever Pillow raises for broken, hostile or absurdly large files, as a ValueError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale or tile it first") from None
    except Image.UnidentifiedImageError:
        raise ValueError(f"is not an {kind} that Pillow can read".replace("an m", "a m")) from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"is a broken {kind} ({error})") from None


# ---------------------------------------------------------------- readers

def load_samples(path: str | Path, split: str = "train", skip_bad_rows: bool = False) -> Sequence[Sample]:
    """A lazy sequence of samples; an image is decoded when its sample is asked for.

    path: a folder with samples.jsonl (see FolderRows), a folder with {split}*.parquet files, or one .parquet
    file (U-MRG schema, see ParquetRows). A row that cannot be used raises BadRow when it is asked for; with
    skip_bad_rows every row is tried now, the bad ones are left out and counted in `.skipped` (a list of
    messages). ValueError when nothing is there, a column is missing, or no row is left."""
    path = Path(path)
    if (path / "samples.jsonl").is_file():
        rows = FolderRows(path, split)
    else:
        files = [path] if path.is_file() else sorted(path.glob(f"**/{split}*.parquet"))
        if not files:
            raise ValueError(f"{path}: neither samples.jsonl nor {split}*.parquet in it" if path.is_dir()
                             else f"{path}: no such file or folder")
        rows = ParquetRows(files)
    samples = Samples(rows, skip_bad_rows)
    if not len(samples):
        raise ValueError(f"{path}: no usable sample in split {split!r} ({len(samples.skipped)} bad rows)")
    return samples


class Samples(Sequence):
    def __init__(self, rows, skip_bad_rows: bool = False):
        self.rows, self.keep, self.skipped = rows, range(len(rows)), []
        if skip_bad_rows:
            self.keep = [i for i in range(len(rows)) if self._usable(i)]

    def _usable(self, i: int) -> bool:
        try:
            _sample(self.rows, i)
        except BadRow as error:
            self.skipped.append(str(error))
            return False
        return True

    def __len__(self):
        return len(self.keep)

    def __getitem__(self, i):
        if isinstance(i, slice):                        # a view, still lazy
            view = copy(self)
            view.keep = self.keep[i]
            return view
        return _sample(self.rows, self.keep[i])

    def ids(self) -> list[str]:
        """All ids, in order, without decoding an image; BadRow for a row that cannot be read."""
        return [self.rows.row(i, partial(_need, self.rows, i))["id"] for i in self.keep]

    def only(self, pattern: str) -> "Samples":
        """A view of those whose super-category has a match of a regular expression; ValueError if none."""
        try:
            matches, view = re.compile(pattern).search, copy(self)
        except re.error as error:
            raise ValueError(f"--only {pattern}: not a regular expression ({error})") from None
        view.keep = [i for i in self.keep if matches(self.rows.row(i, lambda *_: None)["supercategory"])]
        if not view.keep:
            raise ValueError(f"--only {pattern}: no sample has such a super-category")
        return view


def _need(rows, i: int, ok, key: str, problem: str) -> None:
    if not ok:
        raise BadRow(f"{rows.where(i)}, {key}: {problem}; fix the row or use --skip-bad-rows")


def _sample(rows, i: int) -> Sample:
    """Row i, decoded and checked."""
    need = partial(_need, rows, i)

    def decode(key, loader):
        try:
            return loader(row[key])
        except ValueError as error:
            need(False, key, str(error))

    row = rows.row(i, need)
    image = decode("image", load_image)
    (W, H), mask = image.size, None
    if row["mask"] is not None:
        mask = decode("mask", load_mask)
        need(mask.shape == (H, W), "mask", f"is {mask.shape[1]}x{mask.shape[0]}, its image {W}x{H}")
        need(mask.any(), "mask", "is empty")
    need(isinstance(row["query"], str) and row["query"].strip(), "query", "is empty")
    need(max(W, H) <= 100 * min(W, H), "image", f"of {W}x{H} is too long and thin; crop it")
    need(mask is not None or (row["bbox"] and row["points"]), "bbox",
         "is missing, and so is a mask to take it from")
    bbox = row["bbox"] or box_from_mask(mask)
    points = row["points"] or keypoints_from_mask(mask)
    need(_numbers(bbox, 4), "bbox", f"{bbox!r} is not four finite numbers")
    need(isinstance(points, (list, tuple)) and len(points) == 2 and all(_numbers(p, 2) for p in points),
         "points", f"{points!r} is not two [x, y] pairs")
    x1, y1, x2, y2 = bbox = tuple(float(v) for v in bbox)
    points = tuple((float(x), float(y)) for x, y in points)
    need(x1 < x2 and y1 < y2, "bbox", f"{list(bbox)} is empty or inverted")
    need(-1 <= x1 and -1 <= y1 and x2 <= W + 1 and y2 <= H + 1, "bbox",
         f"{list(bbox)} is outside the {W}x{H} image")
    need(all(-1 <= x <= W + 1 and -1 <= y <= H + 1 for x, y in points), "points",
         f"{points} are outside the {W}x{H} image")
    return Sample(image=image, mask=mask, bbox=bbox, points=points,
                  **{k: v for k, v in row.items() if k not in ("image", "mask", "bbox", "points")})


def _numbers(values, n: int) -> bool:
    return isinstance(values, (list, tuple)) and len(values) == n and \
        all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 1e9 for v in values)


class FolderRows:
    """A plain folder: images/, optional masks/ (0/255, an image's size), and samples.jsonl with one object a
    line: image, query, and bbox + points (pixels of the stored image) or mask; optional id, split ("train"
    when missing), supercategory, category, think. Files are named relative to images/ and masks/."""

    def __init__(self, folder: Path, split: str):
        self.folder, self.file, self.lines = folder, folder / "samples.jsonl", []
        for number, line in enumerate(read_text(self.file).splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{self.file}, line {number}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{self.file}, line {number}: not a JSON object")
                if row.get("split", "train") == split:
                    self.lines.append((number, row))

    def __len__(self):
        return len(self.lines)

    def where(self, i):
        return f"{self.file}, line {self.lines[i][0]}"

    def row(self, i, need) -> dict:
        number, row = self.lines[i]
        for key in ("image", "query"):
            need(isinstance(row.get(key), str), key, "is missing")
        need(not row.get("mask") or isinstance(row["mask"], str), "mask", "is not a file name")
        return {"id": str(row.get("id", f"{self.folder.name}-{number}")),
                "image": self.folder / "images" / row["image"],
                "mask": self.folder / "masks" / row["mask"] if row.get("mask") else None,
                "query": row["query"], "bbox": row.get("bbox"), "points": row.get("points"), "extra": row,
                **{key: str(row.get(key) or "") for key in ("supercategory", "category", "think")}}


class ParquetRows:
    """The U-MRG schema: prompt [{role, content: the bare question}], images [{bytes, path}],
    masks [{bytes, path}] (one 0/255 L image, may be missing),
    reward_model {ground_truth: JSON {"bbox_2d": [4], "point_2d": [[2], [2]]}},
    extra_info {id, supercategory, category, index, and what else there is}.
    One row group is in memory at a time."""

    def __init__(self, files: list[Path]):
        import pyarrow
        import pyarrow.parquet as parquet
        self.groups, self.starts, total = [], [], 0     # (file, path, row group, first row of it in its file)
        for path in files:
            try:
                file = parquet.ParquetFile(path)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{path}: not a readable parquet file "
                                 f"({str(error).splitlines()[0]})") from None
            if missing := {"prompt", "images", "reward_model"} - set(file.schema_arrow.names):
                raise ValueError(f"{path}: column {', '.join(sorted(missing))} is missing "
                                 "(U-MRG schema, see data.py)")
            first = 0
            for group in range(file.num_row_groups):
                self.groups.append((file, path, group, first))
                self.starts.append(total + first)
                first += file.metadata.row_group(group).num_rows
            total += first
        self.total = total
        self.table = lru_cache(maxsize=2)(
            lambda group: self.groups[group][0].read_row_group(self.groups[group][2]))

    def __len__(self):
        return self.total

    def _find(self, i):
        group = bisect_right(self.starts, i) - 1
        return group, i - self.starts[group]

    def where(self, i):
        group, offset = self._find(i)
        return f"{self.groups[group][1]}, row {self.groups[group][3] + offset}"

    def row(self, i, need) -> dict:
        group, offset = self._find(i)
        try:
            row = self.table(group).slice(offset, 1).to_pylist()[0]
        except (ValueError, OSError) as error:              # pyarrow's own are of these kinds
            need(False, "row group", f"cannot be read ({str(error).splitlines()[0]})")
        truth = row["reward_model"]
        need(isinstance(truth, dict) and isinstance(truth.get("ground_truth"), str), "reward_model",
             "has no ground_truth string")
        try:
            truth = json.loads(truth["ground_truth"])
        except (ValueError, RecursionError) as error:
            need(False, "reward_model.ground_truth", f"is not JSON ({error})")
        need(isinstance(truth, dict), "reward_model.ground_truth", "is not a JSON object")
        for key in ("prompt", "images"):
            need(isinstance(row[key], list) and len(row[key]) == 1 and isinstance(row[key][0], dict), key,
                 "is not a list of one")
        extra, mask = row.get("extra_info") or {}, (row.get("masks") or [None])[0]
        need(row["images"][0].get("bytes"), "images", "has no bytes")
        return {"id": str(extra.get("id") or extra.get("index") or i), "image": row["images"][0]["bytes"],
                "mask": mask and mask.get("bytes"), "query": row["prompt"][0].get("content"),
                "bbox": truth.get("bbox_2d"), "points": truth.get("point_2d"),
                "supercategory": extra.get("supercategory") or "", "category": extra.get("category") or "",
                "think": extra.get("think") or "", "extra": extra}
