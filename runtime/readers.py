"""Readers: how a path becomes rows, and what makes a row usable.

reader(path, split) -> (rows of that split, names of all splits). No image is decoded. A row is a
dict; coordinates are pixels of the upright image:
  query                                the question
  image, mask                          a path, bytes, or a function that returns bytes; or no mask
  bbox, points                         [x1, y1, x2, y2] and [[x, y], [x, y]], or None: from the mask
and where there is more to say than DEFAULTS does:
  where                                "file, line 3": how messages call it
  id, supercategory, category, think   strings
  extra                                a dict of whatever else the data has
  problem                              "" or what could not be read, as in "image: is missing"
To add a reader, write the function and name it in READERS, by the pattern of a path or of what a
folder has in it. `check_row` and `decode_row` are the only places that decide whether a row can be
used.
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow.parquet import ParquetFile

from runtime.files import parse_object, read_text
from runtime.images import (
    MAX_RATIO,
    SCAN_READERS,  # noqa: F401  the other registry of what can be read, defined where it is used
    Source,
    load_image,
    load_mask,
    read_scan,
)
from runtime.registry import find

READERS = {  # pattern of a file: its reader
    "samples.jsonl": "runtime.readers.read_folder",
    "**/*.parquet": "runtime.readers.read_parquet",
    "**/*.json": "extras.coco.read",
}

DEFAULTS = {
    "mask": None,
    "bbox": None,
    "points": None,
    "supercategory": "",
    "category": "",
    "think": "",
    "extra": {},
    "problem": "",
}

Row = dict[str, Any]
Box = tuple[float, float, float, float]
Points = tuple[tuple[float, float], ...]
Decoded = tuple[Image.Image, np.ndarray | None, Box | None, Points | None]

OR_SKIP = "; fix the row or use --skip-bad-rows"
NO_TARGET = "bbox: is missing, or points are, and so is a mask to take them from"
MIN_BOX_IOU = 0.5  # of a row's box and the tight box of its mask: below, they are two objects
CACHED_BYTES = 2**30  # of decoded row groups of a parquet file with their images


class BadRow(ValueError):
    """A row that cannot be used. The message names the file, the row, the key and the fix."""


# ---------------------------------------------------------------- from a path to rows


def read_rows(path: Path, split: str | None) -> tuple[list[Row], list[str]]:
    """(complete rows of a split, names of all splits), by the first reader that fits the path.

    split None: no rows, only the names of the splits. Raises ValueError where no reader fits, a
    file cannot be read, or the split has no row.
    """
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    rows, splits = _reader_of(path)(path, split or "")
    if split is not None and not rows:
        there = ", ".join(splits) or "none"
        raise ValueError(
            f"{path}: no sample in split {split!r}; the splits there: {there} "
            "(training wants train and test; evaluate.py has --split)"
        )
    return [_complete(row, path, number) for number, row in enumerate(rows, 1)], splits


def _reader_of(path: Path) -> Any:
    """The function in READERS for a folder, or for a file by its name or that of a link's end."""
    for pattern, entry in READERS.items():
        if path.is_file():
            fits = path.absolute().match(pattern) or path.resolve().match(pattern)
        else:
            fits = len(files_in(path, pattern)) > 0
        if fits:
            return find(entry)
    names = " nor ".join(pattern.removeprefix("**/") for pattern in READERS)
    in_it = " in it" if path.is_dir() else ""
    raise ValueError(f"{path}: neither {names}{in_it}; see runtime/readers.py")


def _complete(row: Row, path: Path, number: int) -> Row:
    """A row with all keys, its question without "<image>", its trace without its tags."""
    row = DEFAULTS | {"where": f"{path}, row {number}", "id": f"{path.stem}-{number}"} | row
    if isinstance(row["query"], str):
        row["query"] = re.sub(r"^(\s*<image>)+\s*", "", row["query"])  # as chat data marks it
    for key in ("id", "supercategory", "category", "think"):
        row[key] = "" if row[key] is None else str(row[key])
    row["think"] = _without_its_tags(row["think"])
    return row


def _without_its_tags(trace: str) -> str:
    """A reasoning trace without one pair of <think> tags around all of it, which a prompt adds."""
    inside = re.fullmatch(r"\s*<think>(.*)</think>\s*", trace, re.DOTALL | re.IGNORECASE)
    if inside is None:
        return trace
    return inside[1].strip()


def files_in(folder: Path, pattern: str) -> list[Path]:
    """The sorted files of a pattern in a folder; "**/*.ending" is any depth.

    Links to folders are followed, but no folder is visited twice.
    """
    if not pattern.startswith("**/"):
        return sorted(file for file in folder.glob(pattern) if file.is_file())
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        folders[:] = [name for name in folders if os.path.realpath(Path(place, name)) not in seen]
        found += [Path(place, name) for name in names]
    ending = pattern.removeprefix("**/")
    return sorted(file for file in found if file.match(ending) and file.is_file())


def leads_out(name: str, folder: Path, root: Path) -> bool:
    """Whether the name of a file, as data gives it, leads from a folder out of root.

    A link in the folder is the user's own work, and where it points is the user's business: the
    cache of a hub consists of links. Only the name itself is looked at: it may be absolute or have
    ".." in it.
    """
    if not Path(name).is_absolute() and ".." not in Path(name).parts:
        return False
    return not (folder / name).resolve().is_relative_to(root.resolve())


def given(*values: Any) -> Any:
    """The first of some values that is neither None (null in JSON) nor an empty text."""
    return next((value for value in values if value is not None and value != ""), None)


def names_in(fields: dict) -> dict[str, str]:
    return {key: str(fields.get(key) or "") for key in ("supercategory", "category", "think")}


# ---------------------------------------------------------------- a folder with samples.jsonl


def read_folder(path: Path, split: str) -> tuple[list[Row], list[str]]:
    """samples.jsonl beside images/ and masks/: one JSON object per line, which ends at "\\n" only.

    Keys: image, query, and mask or bbox + points; optional id, split ("train" if missing or null),
    supercategory, category, think. A mask has one target and its image's size (see
    runtime/images.py). File names are relative to images/ and masks/. For DICOM and NIfTI, "scan":
    {"slice": 45} has keys of extras.scans.ScanConfig, and the mask may be NIfTI on the same grid.
    """
    file = path / "samples.jsonl" if path.is_dir() else path
    text = read_text(file)
    if text.lstrip().startswith("["):
        raise ValueError(f"{file}: is a JSON array; one object per line is needed")
    rows, splits = [], set()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields, problem = parse_object(line, "text"), ""
        except ValueError as error:  # of no known split: a bad row of every one
            fields, problem = {"split": split}, str(error)
        own_split = str(given(fields.get("split"), "train"))
        if not problem:
            splits.add(own_split)
        if own_split == split:
            rows.append(_folder_row(file, number, fields, problem))
    return rows, sorted(splits)


def _folder_row(file: Path, number: int, fields: dict, problem: str) -> Row:
    row = {
        "where": f"{file}, line {number}",
        "problem": problem,
        "image": None,
        "mask": None,
        "id": str(given(fields.get("id"), f"{file.parent.name}-{number}")),
        "query": fields.get("query"),
        "bbox": fields.get("bbox"),
        "points": fields.get("points"),
        "extra": fields,
        **names_in(fields),
    }
    missing = [key for key in ("image", "query") if key not in fields]
    if missing and not problem:
        keys = ", ".join(fields) or "none"
        row["problem"] = f"{missing[0]}: is missing (keys here: {keys})"
    key = "image"
    try:
        row["image"] = file_in(file.parent / "images", fields.get("image"))
        key = "mask"
        if fields.get("mask"):
            row["mask"] = file_in(file.parent / "masks", fields["mask"])
    except (ValueError, OSError) as error:
        row["problem"] = row["problem"] or f"{key}: {error}"
        return row
    if fields.get("scan") is not None:
        image, mask, choice = row["image"], row["mask"], fields["scan"]
        row["image"] = partial(read_scan, image, choice)
        if mask is not None:
            row["mask"] = partial(read_scan, mask, choice, is_mask=True, image=image)
    return row


def file_in(folder: Path, name: Any) -> Path:
    """The file of that name in the folder.

    Raises ValueError if there is none or the name leads out of it.
    """
    if name is None or name == "":
        raise ValueError("is missing")
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is not a file name")
    if leads_out(name, folder, folder):
        raise ValueError(f"{name} is outside {folder}; put the file there")
    file = folder / name
    if file == folder:
        raise ValueError(f"{name!r} is not a file name")
    if not file.exists():
        doubled = name.startswith(f"{folder.name}/")
        advice = f'; leave out "{folder.name}/"' if doubled else ""
        raise ValueError(f"no such file: {file}{advice}")
    return file


# ---------------------------------------------------------------- parquet in the schema of U-MRG


def read_parquet(path: Path, split: str) -> tuple[list[Row], list[str]]:
    """The U-MRG schema, the paper's own, in {split}*.parquet, or in one file of any name.

    Columns: prompt [{role, content: question}], images and masks [{bytes, path}] (one image, one
    mask as in runtime/images.py; masks may be missing), extra_info {id, supercategory, category},
    reward_model {ground_truth: JSON {"bbox_2d": [4], "point_2d": [[2], [2]]}}. A list of one may be
    the thing itself.
    """
    files = [path] if path.is_file() else files_in(path, "**/*.parquet")
    groups = _RowGroups()
    rows = []
    for file in files:
        wanted = path.is_file() or (split != "" and file.name.startswith(split))
        if wanted:
            rows += _parquet_rows(file, groups, len(rows))
    return rows, sorted({re.match("[A-Za-z0-9]*", file.name)[0] for file in files})


def _parquet_rows(file: Path, groups: "_RowGroups", rows_before: int) -> list[Row]:
    try:
        opened = ParquetFile(file)
        columns = set(opened.schema_arrow.names)
        missing = {"prompt", "images", "reward_model"} - columns
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"{file}: column {names} is missing (U-MRG schema)")
        texts = sorted(columns & {"prompt", "reward_model", "extra_info"})
        records = opened.read(columns=texts).to_pylist()
        lengths = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = _first_line(error)
        raise ValueError(f"{file}: not a readable parquet file ({reason})") from None
    places = [(group, offset) for group, length in enumerate(lengths) for offset in range(length)]
    rows = []
    for number, (record, place) in enumerate(zip(records, places)):
        row = _parquet_row(record, f"{file}, row {number}", rows_before + number)
        row["image"] = partial(groups.read, "images", file, *place)
        if "masks" in columns:
            row["mask"] = partial(groups.read, "masks", file, *place)
        rows.append(row)
    return rows


def _parquet_row(record: dict, where: str, number: int) -> Row:
    """A record without its images. number counts rows of all files: the id where there is none."""
    truth, problem = {}, ""
    try:
        truth = parse_object(record["reward_model"]["ground_truth"], "reward_model.ground_truth")
    except ValueError as error:
        problem = str(error)
    except (TypeError, KeyError):
        problem = "reward_model: has no ground_truth string"
    extra = record.get("extra_info")
    if not isinstance(extra, dict):
        extra = {}
    return {
        "where": where,
        "id": str(given(extra.get("id"), extra.get("index"), number)),
        "problem": problem,
        "query": question_in(record["prompt"]),
        "extra": extra,
        "bbox": truth.get("bbox_2d"),
        "points": truth.get("point_2d"),
        **names_in(extra),
    }


def question_in(prompt: Any) -> str | None:
    """The text of the user's last message, or of a lone message of any role; or a text itself."""
    if isinstance(prompt, str):
        return prompt
    messages = prompt if isinstance(prompt, list) else [prompt]
    messages = [message for message in messages if isinstance(message, dict)]
    if len(messages) > 1:
        messages = [message for message in messages if message.get("role") == "user"]
    if not messages:
        return None
    content = messages[-1].get("content")
    if isinstance(content, list):  # parts, as {"type": "text", "text": …} beside {"type": "image"}
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content


def bytes_in(cell: Any) -> bytes | None:
    """The bytes of a cell of images or masks: {bytes, path}, bytes alone, or a list of one of them.

    None where there are none. A text is never taken for a path: a data set names no file of this
    machine. Raises ValueError for several.
    """
    if isinstance(cell, list):
        if len(cell) > 1:
            raise ValueError(f"is a list of {len(cell)}; one per row is needed")
        cell = cell[0] if cell else None
    if isinstance(cell, dict):
        cell = cell.get("bytes")
    return cell if isinstance(cell, bytes) else None


class _RowGroups:
    """Row groups of parquet files with their images, as bytes, decoded once and kept while
    CACHED_BYTES last.

    Parquet has no way to a single row: images of a row group are compressed together. So a data set
    beyond CACHED_BYTES wants small row groups (100 rows, as the datasets library writes them).
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[Path, int], pyarrow.Table] = {}  # the one used last is last

    def read(self, column: str, file: Path, group: int, offset: int) -> bytes | None:
        key = file, group
        table = self.tables.pop(key, None)
        if table is None:
            table = self._decode(file, group)
        self.tables[key] = table
        while sum(kept.nbytes for kept in self.tables.values()) > CACHED_BYTES:
            if len(self.tables) == 1:
                break
            del self.tables[next(iter(self.tables))]
        return bytes_in(table[column][offset].as_py())

    def _decode(self, file: Path, group: int) -> pyarrow.Table:
        try:
            return ParquetFile(file).read_row_group(group, columns=["images", "masks"])
        except pyarrow.ArrowException as error:
            reason = _first_line(error)
            raise ValueError(f"row group {group} cannot be read ({reason})") from None


# ---------------------------------------------------------------- what makes a row usable


def check_row(row: Row) -> None:
    """Raises BadRow for what shows without decoding an image."""
    problem = _problem_of(row)
    if problem:
        raise _bad(row, problem)


def _problem_of(row: Row) -> str:
    """The first thing that is wrong with a row, or ""."""
    bbox, points = row["bbox"], row["points"]
    if row["problem"]:
        return row["problem"]
    if not isinstance(row["query"], str) or not row["query"].strip():
        return "query: is empty"
    for key in ("query", "id", "supercategory", "category", "think"):
        if not _is_text(row[key]):
            return f"{key}: has half of a character (a lone surrogate); write the whole one"
    tag = re.search(r"</?(think|answer)>", row["think"], re.IGNORECASE)
    if tag:
        return f"think: has the tag {tag[0]} in it; give the reasoning alone"
    if not bbox and "box" in row["extra"]:
        return 'bbox: is missing, but there is "box"; rename that key'
    if not row["mask"] and not (bbox and points):
        return NO_TARGET
    if bbox and not (_are_numbers(bbox, 4) and bbox[0] < bbox[2] and bbox[1] < bbox[3]):
        return f"bbox: {bbox!r} is not four finite numbers with x1 < x2 and y1 < y2"
    if points and not _are_two_points(points):
        return (
            f"points: {points!r} is not 2 pairs [x, y]; without any, they are taken from the mask"
        )
    return ""


def _is_text(value: Any) -> bool:
    """Whether a string can be written as UTF-8: JSON may have half of a character in it, as
    "\\ud800".
    """
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _are_numbers(values: Any, count: int) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return False
        if not abs(value) < 1e9:  # nor is NaN
            return False
    return True


def _are_two_points(points: Any) -> bool:
    if not isinstance(points, list) or len(points) != 2:
        return False
    return all(_are_numbers(point, 2) for point in points)


def decode_row(row: Row) -> Decoded:
    """(image, mask, bbox, points) of a row, in pixels of the upright image: RGB, (H, W) bool,
    floats.

    mask is None where the row has none; bbox and points are None where they are to be taken from
    the mask. Raises BadRow for what cannot be used, also for what `check_row` sees.
    """
    check_row(row)
    image, image_source = _decoded_image(row)
    width, height = image.size
    if max(width, height) > MAX_RATIO * min(width, height):
        raise _bad(row, f"image: of {width}x{height} is too long and thin; crop it")
    mask = _decoded_mask(row, image_source)
    if mask is None and not (row["bbox"] and row["points"]):
        raise _bad(row, NO_TARGET)
    if mask is not None and mask.shape != (height, width):
        size = f"{mask.shape[1]}x{mask.shape[0]}"
        raise _bad(row, f"mask: is {size}, its image {width}x{height}")
    if mask is not None and not mask.any():
        raise _bad(row, "mask: is empty")
    bbox = points = None
    if row["bbox"]:
        bbox = tuple(float(value) for value in row["bbox"])
        _check_pixels(row, bbox, mask, image.size)
        _check_inside(row, "bbox", (bbox[:2], bbox[2:]), image.size)
    if row["points"]:
        points = tuple((float(x), float(y)) for x, y in row["points"])
        _check_inside(row, "points", points, image.size)
    if bbox is not None and mask is not None:
        _check_same_object(row, bbox, tight_box(mask))
    return image, mask, bbox, points


def _decoded_image(row: Row) -> tuple[Image.Image, Source]:
    """(the image, what it was decoded from)."""
    try:
        source = _source(row["image"])
        if source is None:
            raise ValueError("has no bytes")
        return load_image(source), source
    except (ValueError, OSError) as error:
        raise _bad(row, f"image: {_first_line(error)}") from None


def _decoded_mask(row: Row, image_source: Source) -> np.ndarray | None:
    try:
        source = _source(row["mask"])
        if source is None:
            return None
        return load_mask(source, of=image_source)
    except (ValueError, OSError) as error:
        raise _bad(row, f"mask: {_first_line(error)}") from None


def _source(value: Any) -> Any:
    """A path or bytes; a row may have a function that returns them."""
    return value() if callable(value) else value


def _check_pixels(row: Row, bbox: Box, mask: np.ndarray | None, size: tuple[int, int]) -> None:
    """BadRow for fractions of the image; the first pixel alone is a box of its own."""
    if max(bbox) > 1 or (mask is not None and bbox == tight_box(mask)):
        return
    of = f"{size[0]}x{size[1]}"
    raise _bad(row, f"bbox: {list(bbox)} looks like fractions of the {of} image; give pixels")


def _check_same_object(row: Row, bbox: Box, tight: Box) -> None:
    """BadRow for a box of another object than the mask's, or in other units."""
    if max(abs(a - b) for a, b in zip(bbox, tight)) <= 1:
        return  # one pixel off is rounding, however small the target is
    iou = _iou(bbox, tight)
    if iou >= MIN_BOX_IOU:
        return
    true_box = [int(value) for value in tight]
    raise _bad(
        row,
        f"bbox: {row['bbox']} has an IoU of {iou:.2f} with {true_box}, the box of its mask; "
        "give [x1, y1, x2, y2] in pixels of the image, or no box",
    )


def _check_inside(row: Row, key: str, corners: Points, size: tuple[int, int]) -> None:
    width, height = size
    for x, y in corners:
        if not (-1 <= x <= width + 1 and -1 <= y <= height + 1):
            raise _bad(row, f"{key}: {row[key]} is outside the {width}x{height} image")


def tight_box(mask: np.ndarray) -> Box:
    """The box of a non-empty (H, W) mask, x2 and y2 on the far edge of its last pixel."""
    ys, xs = np.nonzero(mask)
    return float(xs.min()), float(ys.min()), float(xs.max() + 1), float(ys.max() + 1)


def _iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return shared / (areas - shared)


def _bad(row: Row, problem: str) -> BadRow:
    return BadRow(_printable(f"{row['where']}, {problem}{OR_SKIP}"))


def _printable(text: str) -> str:
    """A text that may hold half of a character, so that it can be printed and written."""
    return text.encode("utf-8", "backslashreplace").decode()


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------- all rows of a split


def number_repeated_ids(rows: list[Row]) -> list[str]:
    """Makes the ids of rows unique: a, a#2, a#3. Returns one message per repetition."""
    taken = {row["id"] for row in rows}
    occurrences, messages = Counter(), []
    for row in rows:
        name = row["id"]
        occurrences[name] += 1
        if occurrences[name] == 1:
            continue
        while f"{name}#{occurrences[name]}" in taken:
            occurrences[name] += 1
        row["id"] = f"{name}#{occurrences[name]}"
        taken.add(row["id"])
        message = f"{row['where']}, id: {name!r} is there already; called {row['id']} from here on"
        messages.append(_printable(message))
    return messages


def usable_rows(rows: list[Row], problems: list[str]) -> Iterator[tuple[Row, Decoded]]:
    """Yields each row that can be used, with `decode_row` of it.

    Adds the messages of the others to problems.
    """
    for row in rows:
        try:
            decoded = decode_row(row)
        except BadRow as error:
            problems.append(str(error).removesuffix(OR_SKIP))
        else:
            yield row, decoded
