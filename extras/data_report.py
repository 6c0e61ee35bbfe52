"""python data.py PATH: what is in a data set, every bad row with its reason, and a contact sheet."""

import argparse
from collections import Counter
from pathlib import Path
from textwrap import wrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from data import Sample, number_repeated_ids, usable_rows
from runtime.readers import read_rows

ON_SHEET = 12  # samples per split on a contact sheet
SIDE, TEXT = 224, 58  # of a picture there, and the height of what stands below it
IDS = {
    ".jsonl": "the row's id, else the folder's name and the line",
    ".json": "the annotation's id, else its number",
    ".parquet": "extra_info's id, else its index, else the row's number",
}


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
    if split != "train" and not split.startswith(("test", "val")) and path.suffix != ".parquet":
        print(
            '  nothing reads a split of this name unless told to: "train" trains, "test" or "val" is held out'
        )
    print("  sizes:", ", ".join(f"{size} ({count})" for size, count in sizes.most_common(8)))
    how = IDS.get(Path(rows[0]["where"].rpartition(", ")[0]).suffix)
    example = next((row for row in rows if not row["problem"]), rows[0])
    print(f"  ids look like {example['id']}" + (f" ({how})" if how else ""))
    unnamed = (
        "; (none): not in the row, so not in a table of evaluate.py"
        if "(none)" in str(categories)
        else ""
    )
    print(f"  rows, supercategory / category{unnamed}:")
    new = [
        problem for problem in problems if problem not in all_problems
    ]  # a broken line is one of every split
    print("\n".join([f"{count:8} {name}" for name, count in sorted(categories.items())] + new))
    all_problems += new


def picture(sample: Sample) -> Image.Image:
    """A sample with mask (red), box (green) and points (yellow), its id and question below it."""
    drawn, line = sample.image.copy(), max(1, max(sample.image.size) // 150)
    if sample.mask is not None:
        drawn.paste((255, 0, 0), mask=Image.fromarray(np.uint8(sample.mask) * 90))
    draw = ImageDraw.Draw(drawn)
    draw.rectangle(sample.bbox, outline=(0, 255, 0), width=line)
    for x, y in sample.points:
        draw.ellipse((x - 2 * line, y - 2 * line, x + 2 * line, y + 2 * line), fill=(255, 255, 0))
    tile, font = Image.new("RGB", (SIDE, SIDE + TEXT)), ImageFont.load_default(11)
    tile.paste(ImageOps.pad(drawn, (SIDE, SIDE)))
    lines = [sample.id[:36], *wrap(sample.query, 38, max_lines=3, placeholder=" …")]
    ImageDraw.Draw(tile).text((4, SIDE + 2), "\n".join(lines), font=font, spacing=2)
    return tile


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="What is in a data set, and what is wrong with it."
    )
    parser.add_argument("path", type=Path, help="a data set, as for --data")
    parser.add_argument("--split", help="only this one")
    parser.add_argument("--sheet", type=Path, help="write a picture of a few samples here")
    args = parser.parse_args(argv)
    splits = [args.split] if args.split else read_rows(args.path, None)[1] or ["train"]
    problems, pictures = [], []
    for split in splits:
        report(args.path, split, problems, pictures)
    if args.sheet and pictures:
        columns, (width, height) = 6, pictures[0].size
        sheet = Image.new("RGB", (columns * width, -(-len(pictures) // columns) * height))
        for i, tile in enumerate(pictures):
            sheet.paste(tile, (i % columns * width, i // columns * height))
        sheet.save(args.sheet)
    return 2 if problems else 0
