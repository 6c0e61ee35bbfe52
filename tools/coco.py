"""Reader of COCO data sets: json files with images, annotations and categories, one per split, beside their images.

    data/annotations/instances_train2017.json, data/train2017/…      COCO's own folders
    data/train/_annotations.coco.json, data/train/…                  Roboflow's
    data/test.json, data/images/…

A split is the json files in whose name, or whose folder's name, it occurs; a lone file of neither is "train". One row per
annotation; its question is its own "query" or "caption" if it has one, else "Where is the CATEGORY?". Masks are polygons,
uncompressed RLE or, with pycocotools installed, compressed RLE; without any the box is used and key points are missing.
"""
import io
import re
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from runtime.files import parse_object, read_text

SPLITS = ("train", "test", "val", "valid")


def read(path: Path, split: str) -> tuple[list[dict], list[str]]:
    """path: a folder or one json file -> (rows of a split, names of all splits), see runtime/readers.py. ValueError names
    a file that is not COCO's."""
    root, rows, splits = path if path.is_dir() else path.parent, [], set()
    for file in sorted(path.glob("**/*.json")) if path.is_dir() else [path]:
        own = split_of(file, root)
        coco = parse_object(read_text(file), file)
        if missing := {"images", "annotations", "categories"} - coco.keys():
            raise ValueError(f"{file}: {', '.join(sorted(missing))}: missing; a COCO file has them (nor is there a "
                             "samples.jsonl or a .parquet file)")
        splits.add(own)
        if own == split:
            rows += rows_of(coco, file, root, split)
    return rows, sorted(splits)


def split_of(file: Path, root: Path) -> str:
    for name in (file.stem, *file.relative_to(root).parts[-2::-1]):
        for split in SPLITS:
            if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", name.lower()):
                return split
    return "train"


def rows_of(coco: dict, file: Path, root: Path, split: str) -> list[dict]:
    images = {image.get("id"): image for image in coco["images"]}
    categories = {category.get("id"): category for category in coco["categories"]}
    rows = []
    for number, a in enumerate(coco["annotations"]):
        problem, image = "", images.get(a.get("image_id"), {})
        category = categories.get(a.get("category_id"), {})
        name = str(image.get("file_name", ""))
        folders = [file.parent, root, root / "images", root / file.stem.rpartition("_")[2], root / split,
                   root / "images" / split]
        found = next((folder / name for folder in folders if name and (folder / name).is_file()), None)
        if not found:
            problem = f"image: no file {name!r} in {', '.join(dict.fromkeys(map(str, folders)))}"
        elif not found.resolve().is_relative_to(root.resolve()):
            problem = f"image: {name} is outside {root}; put the file there"
        drawn = a.get("segmentation")
        try:
            size = int(image["height"]), int(image["width"])
            mask = partial(png, drawn, size) if drawn else None
            x, y, w, h = a["bbox"] if not drawn else (0, 0, 1, 1)
            bbox = None if drawn else [x, y, x + w, y + h]      # of a mask: the tight box, and key points
        except (KeyError, TypeError, ValueError) as error:
            problem, mask, bbox = problem or f"annotation: no size of its image, or no bbox ({error!r})", None, None
        label = str(category.get("name", ""))
        rows.append({"where": f"{file}, annotation {a.get('id', number)}", "id": str(a.get("id", number)),
                     "problem": problem, "image": found, "mask": mask, "bbox": bbox, "points": None, "think": "",
                     "query": a.get("query") or a.get("caption") or f"Where is the {label}?", "category": label,
                     "supercategory": str(category.get("supercategory", "")), "extra": {}})
    return rows


def png(segmentation, size: tuple[int, int]) -> bytes:
    """A segmentation of COCO as a 0/255 PNG of (height, width) pixels. ValueError for a broken one."""
    try:
        mask = polygons(segmentation, size) if isinstance(segmentation, list) else run_lengths(segmentation, size)
    except (TypeError, KeyError, LookupError) as error:
        raise ValueError(f"is neither polygons nor RLE ({error!r})") from None
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def polygons(rings: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """[[x1, y1, x2, y2, …], …] in image coordinates, edges at whole numbers -> (H, W) bool: pixels with their centre inside."""
    drawn = Image.new("L", (4 * size[1], 4 * size[0]))
    for ring in rings:
        ImageDraw.Draw(drawn).polygon([4 * v - 0.5 for v in ring], fill=255)
    return np.asarray(drawn)[2::4, 2::4] > 0


def run_lengths(rle: dict, size: tuple[int, int]) -> np.ndarray:
    """{"counts", "size"} -> (H, W) bool; columns first, background first."""
    if not isinstance(rle["counts"], list):
        try:
            from pycocotools.mask import decode
        except ImportError:
            raise ValueError("is a compressed RLE: python -m pip install pycocotools") from None
        counts = rle["counts"]
        return decode({"size": rle["size"], "counts": counts.encode() if isinstance(counts, str) else counts}) > 0
    values = np.repeat(np.arange(len(rle["counts"])) % 2 == 1, rle["counts"])
    if len(values) != size[0] * size[1]:
        raise ValueError(f"RLE of {len(values)} pixels, but the image has {size[1]}x{size[0]}")
    return values.reshape(size[1], size[0]).T
