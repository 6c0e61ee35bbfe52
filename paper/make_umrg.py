"""Build a U-MRG data set out of anybody's images and masks, in the stages of arXiv 2508.08177.

    python -m paper.make_umrg --images scans --masks masks --out mine              # words from
                                                                                   templates python
                                                                                   -m
                                                                                   paper.make_umrg
                                                                                   --images scans
                                                                                   --masks masks
                                                                                   --table meta.csv
                                                                                   --out mine \\
        --base-url http://localhost:8000/v1 --model qwen3 --review review.html     # from a language
                                                                                   model
    python -m paper.make_umrg … --out mine --decisions decisions.json              # without what
                                                                                   you rejected

  1  images and masks are checked; what is dropped is counted, with the reason, in report.json
  2  for each category and modality: a description, and formats for questions
  3  for each sample: an implicit question that never names the target, and a reasoning trace
  4  --review writes one HTML file to accept or reject samples; --decisions reads back what it saves
  5  train.parquet and test.parquet in the U-MRG schema (data.py); a patient or an image is in only
  one

Without --table, a mask belongs to the image whose file name (without its ending) it has, or begins
with: x.png and x_left_kidney.png; what follows is the category (a count of three or more digits at
its end is left out). With it, a CSV: image, mask, category, and if known supercategory, modality,
patient. Words come from any OpenAI-compatible endpoint (pip install openai; the key is
OPENAI_API_KEY); every reply is kept in --cache, so an interrupted run asks nothing twice. """

import argparse
import csv
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import ndimage

from data import box_from_mask, keypoints_from_mask, load_image, load_mask
from paper.umrg_review import decided, review_page
from paper.umrg_words import Chat, Item, write_words
from runtime.cli import exit_on

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
COLUMNS = ("image", "mask", "category", "supercategory", "modality", "patient")


# ---------------------------------------------------------------- 1: which images and masks can be used


def find(images: Path, masks: Path, table: Path | None) -> list[Item]:
    """All pairs. ValueError names what is missing."""
    for flag, folder in (("--images", images), ("--masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{flag} {folder}: no such folder")
    if table:
        with open(table, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if missing := {"image", "mask", "category"} - set(rows.fieldnames or ()):
                raise ValueError(f"--table {table}: column {', '.join(sorted(missing))} is missing")
            rows = [{key: (row.get(key) or "").strip() for key in COLUMNS} for row in rows]
        for number, row in enumerate(rows, 2):
            if gap := [key for key in ("image", "mask", "category") if not row[key]]:
                raise ValueError(f"--table {table}, line {number}: no {gap[0]}")
        return [
            Item(
                images / row["image"],
                masks / row["mask"],
                **{key: row[key] for key in COLUMNS[2:] if row[key]},
            )
            for row in rows
        ]
    stems = {p.stem: p for p in sorted(images.iterdir()) if p.suffix.lower() in PICTURES}
    items = []
    for mask in sorted(p for p in masks.iterdir() if p.suffix.lower() in PICTURES):
        names = [stem for stem in stems if mask.stem == stem or mask.stem.startswith(stem + "_")]
        if names:
            stem = max(names, key=len)
            # x_liver_000.png: a count, not a name
            category = re.sub(r"_\d{3,}$", "", mask.stem[len(stem) + 1 :])
            items.append(Item(stems[stem], mask, category.replace("_", " ") or "target"))
    if not items:
        raise ValueError(
            f"--masks {masks}: no mask there has the name of an image in {images}; name it so, "
            "or give --table"
        )
    return items


def clean(items: list[Item], args) -> tuple[list[Item], list[dict]]:
    """The usable ones with their facts, and what was dropped: [{mask, reason}]."""
    kept = []
    dropped = []
    seen = set()
    for item in items:
        try:
            item.facts = derive(item, args)
            if item.facts["hash"] in seen:
                raise ValueError("the same image and mask were there before")
        except ValueError as error:
            dropped.append({"mask": item.mask.name, "reason": str(error)})
            continue
        seen.add(item.facts["hash"])
        kept.append(item)
    return kept, dropped


def derive(item: Item, args) -> dict:
    """Size, box, points, place and look of the target, image frame. ValueError says why it cannot
    be used."""
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
    if args.largest:
        pieces, count = ndimage.label(mask)
        if count > 1:
            mask = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    share = mask.mean()
    if not args.min_area <= share <= args.max_area:
        raise ValueError(
            f"the mask covers {100 * share:.2f} % of the image, outside --min-area and --max-area"
            if share
            else "the mask is empty"
        )
    grey, (W, H) = np.asarray(image.convert("L"), dtype=float), image.size
    around = ndimage.binary_dilation(mask, iterations=max(2, min(W, H) // 40)) & ~mask
    x1, y1, x2, y2 = box = box_from_mask(mask)
    difference = grey[mask].mean() - grey[around].mean() if around.any() else 0.0
    return {
        "size": [W, H],
        "box": box,
        "points": keypoints_from_mask(mask),
        "area": round(float(share), 5),
        "horizontal": ("left", "centre", "right")[int(3 * (x1 + x2) / 2 / (W + 1))],
        "vertical": ("upper", "middle", "lower")[int(3 * (y1 + y2) / 2 / (H + 1))],
        "tone": "bright" if difference > 12 else "dark" if difference < -12 else "grey",
        "shape": "elongated" if max(x2 - x1, y2 - y1) > 2 * min(x2 - x1, y2 - y1) else "rounded",
        "hash": hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest(),
        "mask": png(mask),
    }


def png(pixels) -> bytes:
    Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels).save(
        buffer := io.BytesIO(), format="PNG", optimize=True
    )
    return buffer.getvalue()


# ---------------------------------------------------------------- 5: the data set


def split_of(item: Item, test_share: float) -> str:
    """By patient, or by image: a function of the name, so that it stays the same when data are
    added."""
    key = item.patient or item.image.name
    number = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10_000
    return "test" if number < 10_000 * test_share else "train"


def row(item: Item, index: int) -> dict:
    f = item.facts
    extra = {
        "id": item.id,
        "supercategory": item.supercategory,
        "category": item.category,
        "index": index,
        "modality": item.modality,
        "patient": item.patient,
        "think": item.think,
    }
    truth = json.dumps({"bbox_2d": f["box"], "point_2d": f["points"]})
    return {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": item.query}],
        "images": [{"bytes": png(np.asarray(load_image(item.image))), "path": item.image.name}],
        "masks": [{"bytes": f["mask"], "path": item.mask.name}],
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": extra,
    }


def write_splits(items: list[Item], out: Path, test_share: float) -> Counter:
    """train.parquet and test.parquet, both under temporary names first."""
    out.mkdir(parents=True, exist_ok=True)
    counts = Counter()
    written = []
    for split in ("train", "test"):
        rows = [row(item, i) for i, item in enumerate(items) if split_of(item, test_share) == split]
        counts[split] = len(rows)
        if rows:
            aside = out / f"{split}.parquet.tmp"
            pq.write_table(pa.Table.from_pylist(rows), aside, compression="zstd", row_group_size=64)
            written.append(aside)
    for aside in written:
        aside.replace(aside.with_suffix(""))
    return counts


def main(args) -> None:
    found = find(args.images, args.masks, args.table)
    if repeated := [name for name, n in Counter(item.id for item in found).items() if n > 1]:
        raise ValueError(
            f"--masks {args.masks}: {len(repeated)} names come twice, the first: {repeated[0]}"
        )
    chat = Chat(args) if args.base_url else None
    items, dropped = clean(found, args)
    for reason, count in Counter(d["reason"] for d in dropped).most_common(10):
        print(f"dropped {count}: {reason}")
    if not items:
        raise ValueError(f"--masks {args.masks}: nothing usable among {len(dropped)}")
    by = write_words(items, chat, args.tries)
    if args.decisions:
        before = len(items)
        items = decided(items, args.decisions)
        print(f"{before - len(items)} of {before} rejected by {args.decisions}")
    counts = write_splits(items, args.out, args.test_share)
    report = {
        "found": len(found),
        "dropped": dropped,
        "words": dict(by),
        **counts,
        "categories": dict(Counter(item.category for item in items)),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if args.review:
        args.review.write_text(review_page(items), encoding="utf-8")
        print(f"to look through: {args.review}")
    print(
        f"{counts['train']} train and {counts['test']} test samples in {args.out}, words by "
        + ", ".join(f"{who} {n}" for who, n in by.items())
        + f"; {len(dropped)} dropped, see {args.out / 'report.json'}"
    )


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m paper.make_umrg",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--table", type=Path, help=f"CSV with {', '.join(COLUMNS)}")
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
