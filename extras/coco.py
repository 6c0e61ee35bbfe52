"""Reader of COCO data sets: json files with images, annotations and categories, beside their
images.

    data/annotations/instances_train2017.json, data/train2017/…      COCO's own folders
    data/train/_annotations.coco.json, data/train/…                  Roboflow's
    data/test.json, data/images/…

A split is the json files in whose name, or whose folder's name, it occurs. A lone file of neither
is "train". There is one row per annotation. Its question is its own "query" or "caption" if it has
one, else "Where is the CATEGORY?". Masks are polygons, uncompressed RLE or, with pycocotools
installed, compressed RLE. Without a mask there are no key points, so the row is bad.
"""

import io
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from runtime.files import parse_object, read_text
from runtime.readers import Row, files_in, leads_out

SPLITS = ("train", "test", "val", "valid")
TABLES = ("images", "annotations", "categories")  # of a COCO file
FINE_PIXELS = 2**22  # polygons on images up to this size are drawn at four times the resolution


def read(path: Path, split: str) -> tuple[list[Row], list[str]]:
    """(rows of a split, names of all splits) of a folder or one json file, see runtime/readers.py.

    Beside a COCO file others are left out, as captions and key points of people. Raises ValueError
    where no file is COCO's.
    """
    root = _root_of(path)
    files = files_in(path, "**/*.json") if path.is_dir() else [path]
    rows, splits, problem = [], set(), ""
    for file in files:
        coco = parse_object(read_text(file), file)
        lacking = [table for table in TABLES if not isinstance(coco.get(table), list)]
        if lacking or file.name.startswith("person_keypoints"):
            if not problem:
                problem = f"{file}: {', '.join(lacking)}: missing, or no list"
            continue
        own_split = split_of(file, root)
        splits.add(own_split)
        if own_split == split:
            rows += _rows_of(coco, file, root, split)
    if not splits:
        raise ValueError(
            f"{problem}; a COCO file has them (nor is there a samples.jsonl or a .parquet file)"
        )
    return rows, sorted(splits)


def _root_of(path: Path) -> Path:
    """The folder of the whole data set."""
    if path.is_dir():
        return path
    if path.parent.name == "annotations":
        return path.parent.parent
    return path.parent


def split_of(file: Path, root: Path) -> str:
    """The split in the name of a file or of the nearest of its folders; "train" where there is
    none.
    """
    folders = file.relative_to(root).parts[-2::-1]
    names = [file.stem, *folders]
    if root.name in SPLITS:
        names.append(root.name)
    for name in names:
        for split in SPLITS:
            if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", name.lower()):
                return split
    return "train"


def _rows_of(coco: dict, file: Path, root: Path, split: str) -> list[Row]:
    images, categories = _by_id(coco["images"]), _by_id(coco["categories"])
    rows = []
    for number, annotation in enumerate(coco["annotations"]):
        row = {"where": f"{file}, annotation {number}", "id": str(number)}
        row |= {"image": None, "query": ""}
        rows.append(row)
        try:
            name = annotation.get("id", number)
            row |= {"where": f"{file}, annotation {name}", "id": str(name)}
            image = images.get(annotation["image_id"], {})
            row |= _names_and_question(annotation, categories)
            row["image"] = find_image(str(image.get("file_name", "")), file, root, split)
            row |= _target(annotation, image)
        except _Wrong as error:
            row["problem"] = str(error)
        except (AttributeError, TypeError, KeyError, ValueError, OverflowError, OSError) as error:
            row["problem"] = f"annotation: not as COCO writes it ({error!r:.200})"
    return rows


class _Wrong(ValueError):
    """What is wrong with an annotation, with the key in front."""


def _by_id(items: list) -> dict[int | str, dict]:
    """{id: item}, without what has no usable id."""
    found = {}
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("id"), (int, str)):
            found[item["id"]] = item
    return found


def _names_and_question(annotation: dict, categories: dict) -> dict[str, str]:
    """The category of an annotation, its super-category and its question."""
    own_question = annotation.get("query") or annotation.get("caption")
    number = annotation.get("category_id")
    category = categories.get(number, {})
    name = str(category.get("name") or "")
    if not own_question and not name.strip():
        raise _Wrong(
            f'category_id: {number!r} has no name in "categories", so there is no question; '
            'add it there, or a "query" to the annotation'
        )
    return {
        "category": name,
        "supercategory": str(category.get("supercategory") or ""),
        "query": own_question or f"Where is the {name}?",
    }


def _target(annotation: dict, image: dict) -> dict[str, Any]:
    """The mask of an annotation, whose box and key points are then taken, or else its box."""
    if annotation.get("segmentation"):
        size = int(image["height"]), int(image["width"])
        return {"mask": partial(png, annotation["segmentation"], size)}
    x, y, width, height = annotation["bbox"]
    return {"bbox": [x, y, x + width, y + height]}


def find_image(name: str, file: Path, root: Path, split: str) -> Path:
    """The image of that name in one of the folders where COCO data sets have them.

    Raises ValueError, which begins with "image: ", if there is none or the name leads out of the
    data set.
    """
    folders = [
        file.parent,
        root,
        root / "images",
        root / file.stem.rpartition("_")[2],
        root / split,
        root / "images" / split,
    ]
    for folder in folders:
        if name == "" or not (folder / name).is_file():
            continue
        if leads_out(name, folder, root):
            raise _Wrong(f"image: {name} is outside {root}; put the file there")
        return folder / name
    places = ", ".join(dict.fromkeys(map(str, folders)))
    raise _Wrong(f"image: no file {name[:200]!r} in {places}")


def png(segmentation: list | dict, size: tuple[int, int]) -> bytes:
    """A segmentation of COCO as a 0/255 PNG of (height, width) pixels.

    ValueError for a broken one.
    """
    height, width = size
    if not 0 < height * width <= Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"of {width}x{height} pixels, as the file says of its image, is none or too many"
        )
    try:
        if isinstance(segmentation, list):
            mask = polygons(segmentation, size)
        else:
            mask = run_lengths(segmentation, size)
    except (TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"is neither polygons nor RLE ({error!r:.200})") from None
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, "PNG")
    return buffer.getvalue()


def polygons(rings: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """[[x1, y1, x2, y2, …], …] in image coordinates, edges at whole numbers -> (H, W) bool.

    A pixel counts if its centre is inside. Raises ValueError for coordinates far from the image.
    """
    height, width = size
    finer = 4 if height * width <= FINE_PIXELS else 1
    drawn = Image.new("L", (finer * width, finer * height))
    for ring in rings:
        if not all(abs(v) <= 10 * max(size) for v in ring):  # also of NaN
            raise ValueError("has coordinates far outside its image")
        ImageDraw.Draw(drawn).polygon([finer * v - 0.5 for v in ring], fill=255)
    centre = finer // 2
    return np.asarray(drawn)[centre::finer, centre::finer] > 0


def run_lengths(rle: dict, size: tuple[int, int]) -> np.ndarray:
    """{"counts", "size": [height, width]} -> (H, W) bool; columns first, background first.

    Raises ValueError for another size than the image's, which is (height, width), and other counts.
    """
    height, width = size
    counts, own_size = rle["counts"], rle.get("size")
    if own_size is not None and list(own_size) != [height, width]:
        raise ValueError(
            f"RLE has the size {own_size!r:.100}, but its image has {[height, width]} "
            "(height first)"
        )
    if not isinstance(counts, list):
        return _compressed(counts, rle["size"])
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"RLE of {sum(counts)} pixels, but the image has {width}x{height}")
    is_target = np.arange(len(counts)) % 2 == 1
    return np.repeat(is_target, counts).reshape(width, height).T


def _compressed(counts: str | bytes, size: list[int]) -> np.ndarray:
    try:
        from pycocotools.mask import decode
    except ImportError:
        raise ValueError("is a compressed RLE: pip install -r requirements-extras.txt") from None
    if isinstance(counts, str):
        counts = counts.encode()
    return decode({"size": size, "counts": counts}) > 0
