"""python data.py PATH: what is in a data set, every bad row with its reason, and a contact sheet."""
import argparse
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data import Sample, number_repeated_ids, usable_rows
from runtime.readers import read_rows

ON_SHEET = 12                   # samples per split on a contact sheet


def report(path: Path, split: str, all_problems: list[str], pictures: list[Image.Image]) -> None:
    """Print what is in a split; add what is wrong with it and pictures of a few samples to the lists."""
    rows, _ = read_rows(path, split)
    problems, sizes, categories = number_repeated_ids(rows), Counter(), Counter()
    for i, (_, sample) in enumerate(usable_rows(rows, problems)):
        sizes["{}x{}".format(*sample.image.size)] += 1
        categories[f"{sample.supercategory or '(none)'} / {sample.category or '(none)'}"] += 1
        if i % max(1, len(rows) // ON_SHEET) == 0:
            pictures.append(picture(sample))
    print(f"{split}: {sizes.total()} of {len(rows)} rows can be used")
    print("  sizes:", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(8)))
    print("\n".join([f"{count:8} {name}" for name, count in sorted(categories.items())] + problems))
    all_problems += problems


def picture(sample: Sample, side: int = 224) -> Image.Image:
    """(side x side) a sample with mask (red), box (green) and points (yellow)."""
    drawn, line = sample.image.copy(), max(1, max(sample.image.size) // 150)
    if sample.mask is not None:
        drawn.paste((255, 0, 0), mask=Image.fromarray(np.uint8(sample.mask) * 90))
    draw = ImageDraw.Draw(drawn)
    draw.rectangle(sample.bbox, outline=(0, 255, 0), width=line)
    for x, y in sample.points:
        draw.ellipse((x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line), fill=(255, 255, 0))
    return ImageOps.pad(drawn, (side, side))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What is in a data set, and what is wrong with it.")
    parser.add_argument("path", type=Path, help="a data set, as for --data")
    parser.add_argument("--split", help="only this one")
    parser.add_argument("--sheet", type=Path, help="write a picture of a few samples here")
    args = parser.parse_args(argv)
    splits = [args.split] if args.split else read_rows(args.path, None)[1]
    problems, pictures = [], []
    for split in splits:
        report(args.path, split, problems, pictures)
    if args.sheet and pictures:
        columns, side = 6, pictures[0].width
        sheet = Image.new("RGB", (columns * side, -(-len(pictures) // columns) * side))
        for i, tile in enumerate(pictures):
            sheet.paste(tile, (i % columns * side, i // columns * side))
        sheet.save(args.sheet)
    return 2 if problems else 0
