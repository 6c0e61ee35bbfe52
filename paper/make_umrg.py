"""Builds a U-MRG data set out of anybody's images and masks, in the stages of arXiv 2508.08177.

    python -m paper.make_umrg --images scans --masks masks --out mine       # words from templates
    python -m paper.make_umrg --images scans --masks masks --table meta.csv --out mine \\
        --base-url http://localhost:8000/v1 --model qwen3 --review review.html   # from a model
    python -m paper.make_umrg … --out mine --decisions decisions.json   # without what you rejected

  1  Images and masks are checked. What is dropped is counted, with the reason, in report.json.
  2  For each category and modality: a description, and formats for questions.
  3  For each row: an implicit question that never names the target, and a reasoning trace.
  4  --review writes one HTML file to accept or reject rows, and --decisions reads what it saves.
  5  train.parquet and test.parquet in the U-MRG schema (data.py). A patient or an image is in only
     one of them.

Without --table, a mask belongs to the image whose file name (without its ending) it has, or begins
with: x.png and x_left_kidney.png. What follows is the category; a count of three or more digits at
its end is left out. With a table, a CSV, the columns are image, mask, category, and if known
supercategory, modality, patient. Words come from any OpenAI-compatible endpoint (pip install
openai; the key is OPENAI_API_KEY). Every reply is kept in --cache, so an interrupted run asks
nothing twice.
"""

import argparse
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import ndimage

from data import box_from_mask, keypoints_from_mask, load_image, load_mask
from paper.umrg_review import decided, review_page
from paper.umrg_words import Chat, Facts, Item, write_words
from runtime.cli import exit_on

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
NEEDED = ("image", "mask", "category")  # columns of a table
OPTIONAL = ("supercategory", "modality", "patient")
CONTRAST = 12  # grey levels, of 255, from which on a target is brighter or darker than around it


# ---------------------------------------------------------------- 1: images and masks


def find(images: Path, masks: Path, table: Path | None) -> list[Item]:
    """Returns all pairs of an image and a mask. ValueError names what is missing."""
    for flag, folder in (("--images", images), ("--masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{flag} {folder}: no such folder")
    if table is not None:
        return items_in_table(images, masks, table)
    return items_by_name(images, masks)


def items_in_table(images: Path, masks: Path, table: Path) -> list[Item]:
    """Returns the pairs that a CSV lists."""
    with open(table, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = set(NEEDED) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"--table {table}: column {', '.join(sorted(missing))} is missing")
        lines = list(reader)
    items = []
    for number, line in enumerate(lines, 2):
        row = {key: (line.get(key) or "").strip() for key in (*NEEDED, *OPTIONAL)}
        for key in NEEDED:
            if not row[key]:
                raise ValueError(f"--table {table}, line {number}: no {key}")
        known = {key: row[key] for key in OPTIONAL if row[key]}
        item = Item(images / row["image"], masks / row["mask"], row["category"], **known)
        items.append(item)
    return items


def items_by_name(images: Path, masks: Path) -> list[Item]:
    """Returns the masks that have the name of an image or begin with it."""
    image_of = {path.stem: path for path in pictures_in(images)}
    items = []
    for mask in pictures_in(masks):
        fitting = [
            stem for stem in image_of if mask.stem == stem or mask.stem.startswith(f"{stem}_")
        ]
        if fitting:
            stem = max(fitting, key=len)
            rest = mask.stem[len(stem) + 1 :]
            category = re.sub(r"_\d{3,}$", "", rest).replace("_", " ")  # x_liver_000: a count
            items.append(Item(image_of[stem], mask, category or "target"))
    if not items:
        raise ValueError(
            f"--masks {masks}: no mask there has the name of an image in {images}; name it so, "
            "or give --table"
        )
    return items


def pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def check_ids(items: list[Item], masks: Path) -> None:
    """ValueError where two items have one id."""
    counts = Counter(item.id for item in items)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"--masks {masks}: {len(repeated)} names come twice, the first: {repeated[0]}"
        )


def clean(items: list[Item], args: argparse.Namespace) -> tuple[list[Item], list[dict]]:
    """Returns the usable items with their facts, and what was dropped: [{mask, reason}]."""
    kept = []
    dropped = []
    digests = set()
    for item in items:
        try:
            item.facts = derive(item, args)
            if item.facts.digest in digests:
                raise ValueError("the same image and mask were there before")
        except ValueError as error:
            dropped.append({"mask": item.mask.name, "reason": str(error)})
            continue
        digests.add(item.facts.digest)
        kept.append(item)
    return kept, dropped


def derive(item: Item, args: argparse.Namespace) -> Facts:
    """Returns size, box, points, place and look of the target. ValueError says why it cannot be
    used."""
    image, mask = read_pair(item)
    if args.largest:
        mask = largest_piece(mask)
    area = mask.mean()
    if area == 0:
        raise ValueError("the mask is empty")
    if not args.min_area <= area <= args.max_area:
        raise ValueError(
            f"the mask covers {100 * area:.2f} % of the image, outside --min-area and --max-area"
        )
    width, height = image.size
    box = box_from_mask(mask)
    x1, y1, x2, y2 = box
    across = (x1 + x2) / 2 / (width + 1)
    down = (y1 + y2) / 2 / (height + 1)
    return Facts(
        size=(width, height),
        box=box,
        points=keypoints_from_mask(mask),
        area=round(float(area), 5),
        horizontal=("left", "centre", "right")[int(3 * across)],
        vertical=("upper", "middle", "lower")[int(3 * down)],
        tone=tone_of(image, mask),
        shape=shape_of(x2 - x1, y2 - y1),
        digest=hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest(),
        mask=png(mask.astype(np.uint8) * 255),
    )


def read_pair(item: Item) -> tuple[Image.Image, np.ndarray]:
    """Returns an item's image and mask, upright. ValueError where they cannot be read or do not
    fit."""
    if not item.mask.is_file():
        raise ValueError("no such mask")
    try:
        image = load_image(item.image)
    except ValueError as error:
        raise ValueError(f"the image {error}") from None
    mask = load_mask(item.mask, of=item.image)
    if mask.shape != image.size[::-1]:
        raise ValueError(
            f"the mask is {mask.shape[1]}x{mask.shape[0]}, the image {image.width}x{image.height}"
        )
    return image, mask


def largest_piece(mask: np.ndarray) -> np.ndarray:
    pieces, count = ndimage.label(mask)
    if count < 2:
        return mask
    areas = np.bincount(pieces.ravel())[1:]
    return pieces == areas.argmax() + 1


def tone_of(image: Image.Image, mask: np.ndarray) -> str:
    """Returns whether a target is bright, dark or grey against what is around it."""
    grey = np.asarray(image.convert("L"), dtype=float)
    wide = max(2, min(image.size) // 40)
    around = ndimage.binary_dilation(mask, iterations=wide) & ~mask
    if not around.any():
        return "grey"
    difference = grey[mask].mean() - grey[around].mean()
    if difference > CONTRAST:
        return "bright"
    if difference < -CONTRAST:
        return "dark"
    return "grey"


def shape_of(width: float, height: float) -> str:
    if max(width, height) > 2 * min(width, height):
        return "elongated"
    return "rounded"


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


# ---------------------------------------------------------------- 5: the data set


def split_of(item: Item, test_share: float) -> str:
    """Returns the split of an item, by its patient or its image. It is a function of the name, so
    it stays the same when data are added."""
    key = item.patient or item.image.name
    number = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10_000
    return "test" if number < 10_000 * test_share else "train"


def umrg_row(item: Item, index: int) -> dict:
    """Returns an item as a row in the U-MRG schema."""
    facts = item.facts
    truth = {"bbox_2d": facts.box, "point_2d": facts.points}
    image = np.asarray(load_image(item.image))
    return {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": item.query}],
        "images": [{"bytes": png(image), "path": item.image.name}],
        "masks": [{"bytes": facts.mask, "path": item.mask.name}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": {
            "id": item.id,
            "supercategory": item.supercategory,
            "category": item.category,
            "index": index,
            "modality": item.modality,
            "patient": item.patient,
            "think": item.think,
        },
    }


def write_splits(items: list[Item], out: Path, test_share: float) -> Counter[str]:
    """Writes train.parquet and test.parquet, both under temporary names first. Returns how many
    rows each has."""
    out.mkdir(parents=True, exist_ok=True)
    counts: Counter[str] = Counter()
    written = []
    for split in ("train", "test"):
        rows = []
        for index, item in enumerate(items):
            if split_of(item, test_share) == split:
                rows.append(umrg_row(item, index))
        counts[split] = len(rows)
        if rows:
            temporary = out / f"{split}.parquet.tmp"
            table = pa.Table.from_pylist(rows)
            pq.write_table(table, temporary, compression="zstd", row_group_size=64)
            written.append(temporary)
    for temporary in written:
        temporary.replace(temporary.with_suffix(""))
    return counts


# ---------------------------------------------------------------- the command


def main(args: argparse.Namespace) -> None:
    found = find(args.images, args.masks, args.table)
    check_ids(found, args.masks)
    chat = None
    if args.base_url:
        prices = args.price_in, args.price_out
        chat = Chat(args.base_url, args.model, args.timeout, args.retries, args.cache, prices)
    items, dropped = clean(found, args)
    for reason, count in Counter(row["reason"] for row in dropped).most_common(10):
        print(f"dropped {count}: {reason}")
    if not items:
        raise ValueError(f"--masks {args.masks}: nothing usable among {len(dropped)}")
    by = write_words(items, chat, args.tries)
    if args.decisions is not None:
        count = len(items)
        items = decided(items, args.decisions)
        print(f"{count - len(items)} of {count} rejected by {args.decisions}")
    counts = write_splits(items, args.out, args.test_share)
    report = {
        "found": len(found),
        "dropped": dropped,
        "words": dict(by),
        **counts,
        "categories": dict(Counter(item.category for item in items)),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.review is not None:
        args.review.write_text(review_page(items), encoding="utf-8")
        print(f"to look through: {args.review}")
    whose = ", ".join(f"{who} {count}" for who, count in by.items())
    print(
        f"{counts['train']} train and {counts['test']} test rows in {args.out}, words by {whose}; "
        f"{len(dropped)} dropped, see {args.out / 'report.json'}"
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m paper.make_umrg",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    columns = ", ".join((*NEEDED, *OPTIONAL))
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--table", type=Path, help=f"CSV with {columns}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--min-area", type=float, default=0.0005, help="smallest share of the image"
    )
    parser.add_argument("--max-area", type=float, default=0.9, help="largest share of the image")
    parser.add_argument(
        "--largest", action="store_true", help="of a mask in pieces, keep the largest only"
    )
    parser.add_argument("--test-share", type=float, default=0.2)
    parser.add_argument(
        "--base-url", help="an OpenAI-compatible endpoint; none: words from templates"
    )
    parser.add_argument("--model", help="the endpoint's model")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one reply")
    parser.add_argument(
        "--retries", type=int, default=5, help="of a request that fails (429, 5xx, time-out)"
    )
    parser.add_argument("--tries", type=int, default=3, help="for a reply that can be used")
    parser.add_argument("--cache", type=Path, default=Path("build/umrg_cache"))
    parser.add_argument("--price-in", type=float, default=0.0, help="money for a million tokens in")
    parser.add_argument("--price-out", type=float, default=0.0, help="and out")
    parser.add_argument("--review", type=Path, help="write this HTML file")
    parser.add_argument("--decisions", type=Path, help="the file that the review page saved")
    args = parser.parse_args(argv)
    if args.base_url and not args.model:
        parser.error("--base-url needs --model")
    return args


if __name__ == "__main__":
    with exit_on(ValueError, OSError):
        main(parse())
