"""Reader of COCO data sets: json files with images, annotations and categories, one per split, beside their images.

    data/annotations/instances_train2017.json, data/train2017/…      COCO's own folders
    data/train/_annotations.coco.json, data/train/…                  Roboflow's
    data/test.json, data/images/…

A split is the json files in whose name, or whose folder's name, it occurs; a lone file of neither is "train". One row per
annotation; its question is its own "query" or "caption" if it has one, else "Where is the CATEGORY?". Masks are polygons,
uncompressed RLE or, with pycocotools installed, compressed RLE. Without one there are no key points, so the row is refused.
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
    """path: a folder or one json file -> (rows of a split, names of all splits), see runtime/readers.py. ValueError
    where no file is COCO's; beside one that is, captions and key points of people are left out."""
    root = (
        path
        if path.is_dir()
        else path.parent.parent
        if path.parent.name == "annotations"
        else path.parent
    )
    rows, splits, other = [], set(), ""
    for file in sorted(path.glob("**/*.json")) if path.is_dir() else [path]:
        coco = parse_object(read_text(file), file)
        lacking = [
            key
            for key in ("images", "annotations", "categories")
            if not isinstance(coco.get(key), list)
        ]
        if lacking or file.name.startswith("person_keypoints"):
            other = other or f"{file}: {', '.join(lacking)}: missing, or no list"
            continue
        own = split_of(file, root)
        splits.add(own)
        if own == split:
            rows += rows_of(coco, file, root, split)
    if not splits:
        raise ValueError(
            f"{other}; a COCO file has them (nor is there a samples.jsonl or a .parquet file)"
        )
    return rows, sorted(splits)


def split_of(file: Path, root: Path) -> str:
    folders = (*file.relative_to(root).parts[-2::-1], root.name if root.name in SPLITS else "")
    for name in (file.stem, *folders):
        for split in SPLITS:
            if re.search(rf"(^|[^a-z]){split}([^a-z]|$)", name.lower()):
                return split
    return "train"


def by_id(items: list) -> dict:
    return {
        item["id"]: item
        for item in items
        if isinstance(item, dict) and isinstance(item.get("id"), (int, str))
    }


def rows_of(coco: dict, file: Path, root: Path, split: str) -> list[dict]:
    images, categories, rows = by_id(coco["images"]), by_id(coco["categories"]), []
    for number, a in enumerate(coco["annotations"]):
        row = {
            "where": f"{file}, annotation {number}",
            "id": str(number),
            "problem": "",
            "image": None,
            "mask": None,
            "bbox": None,
            "points": None,
            "think": "",
            "query": "",
            "category": "",
            "supercategory": "",
            "extra": {},
        }
        rows.append(row)
        try:
            name = a.get("id", number)
            row |= {"where": f"{file}, annotation {name}", "id": str(name)}
            image, category = (
                images.get(a["image_id"], {}),
                categories.get(a.get("category_id"), {}),
            )
            row |= {
                key: str(category.get(old, ""))
                for key, old in (("category", "name"), ("supercategory",) * 2)
            }
            row["query"] = a.get("query") or a.get("caption") or f"Where is the {row['category']}?"
            row["image"] = find_image(str(image.get("file_name", "")), file, root, split)
            if a.get("segmentation"):  # its tight box and its key points are taken
                row["mask"] = partial(
                    png, a["segmentation"], (int(image["height"]), int(image["width"]))
                )
            else:
                x, y, w, h = a["bbox"]
                row["bbox"] = [x, y, x + w, y + h]
        except (AttributeError, TypeError, KeyError, ValueError, OverflowError, OSError) as error:
            known = isinstance(error, ValueError) and str(error).startswith("image: ")
            row["problem"] = (
                str(error) if known else f"annotation: not as COCO writes it ({error!r:.200})"
            )
    return rows


def find_image(name: str, file: Path, root: Path, split: str) -> Path:
    """The image of that name in one of the folders where COCO data sets have them; ValueError if there is none."""
    folders = [
        file.parent,
        root,
        root / "images",
        root / file.stem.rpartition("_")[2],
        root / split,
        root / "images" / split,
    ]
    found = next((folder / name for folder in folders if name and (folder / name).is_file()), None)
    if not found:
        raise ValueError(
            f"image: no file {name[:200]!r} in {', '.join(dict.fromkeys(map(str, folders)))}"
        )
    if not found.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"image: {name} is outside {root}; put the file there")
    return found


def png(segmentation, size: tuple[int, int]) -> bytes:
    """A segmentation of COCO as a 0/255 PNG of (height, width) pixels. ValueError for a broken one."""
    if not 0 < size[0] * size[1] <= Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"of {size[1]}x{size[0]} pixels, as the file says of its image, is none or too many"
        )
    try:
        mask = (
            polygons(segmentation, size)
            if isinstance(segmentation, list)
            else run_lengths(segmentation, size)
        )
    except (TypeError, LookupError, OverflowError) as error:
        raise ValueError(f"is neither polygons nor RLE ({error!r:.200})") from None
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def polygons(rings: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """[[x1, y1, x2, y2, …], …] in image coordinates, edges at whole numbers -> (H, W) bool: pixels whose centre is
    inside. ValueError for coordinates far from the image."""
    finer = 4 if size[0] * size[1] <= 2**22 else 1
    drawn = Image.new("L", (finer * size[1], finer * size[0]))
    for ring in rings:
        if not all(abs(v) <= 10 * max(size) for v in ring):  # nan, too
            raise ValueError("has coordinates far outside its image")
        ImageDraw.Draw(drawn).polygon([finer * v - 0.5 for v in ring], fill=255)
    return np.asarray(drawn)[finer // 2 :: finer, finer // 2 :: finer] > 0


def run_lengths(rle: dict, size: tuple[int, int]) -> np.ndarray:
    """{"counts", "size"} -> (H, W) bool; columns first, background first."""
    counts = rle["counts"]
    if not isinstance(counts, list):
        try:
            from pycocotools.mask import decode
        except ImportError:
            raise ValueError(
                "is a compressed RLE: pip install -r requirements-extras.txt"
            ) from None
        return (
            decode(
                {
                    "size": rle["size"],
                    "counts": counts.encode() if isinstance(counts, str) else counts,
                }
            )
            > 0
        )
    if min(counts, default=0) < 0 or sum(counts) != size[0] * size[1]:
        raise ValueError(f"RLE of {sum(counts)} pixels, but the image has {size[1]}x{size[0]}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(size[1], size[0]).T
