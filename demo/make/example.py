"""The README's picture: one question, answered before GRPO and after it, with the truth.

    python infer.py --image demo/images/chest_ct_patient_2.png --query "..." --crm demo/crm \\
        --out out/before
    python infer.py --image demo/images/chest_ct_patient_2.png --query "..." --out out/after
    python -m demo.make.example out/before out/after     # -> demo/pictures/example.png

The truth is read from demo/data.
"""

import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from asm import overlay
from data import Example, load_samples
from rewards import box_iou
from runtime.cli import exit_on

PICTURE = "demo/pictures/example.png"
TITLES = {"before GRPO": 0.72, "after GRPO": 0.34}  # of a column, and how high its words stand


def true_example(query: str, size: list[int]) -> Example:
    """Returns the held-out example that was asked: the one with this question and image size.
    ValueError where there is none."""
    examples = load_samples("demo/data", "test")
    for i, row in enumerate(examples.rows):
        if row["query"] == query and list(examples[i].image.size) == size:
            return examples[i]
    raise ValueError(f"demo/data: no test row asks {query!r} about an image of {size}")


def write(axis: Axes, y: float, text: str, width: int = 100, **style: object) -> None:
    """Writes words below the height y of a column, in lines of at most `width` letters."""
    lines = "\n".join(textwrap.wrap(text, width))
    axis.text(0, y, lines, va="top", **style)


def draw(folders: list[Path], example: Example) -> Figure:
    """Returns a column of words and two of pictures: before and after."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    words, *axes = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    words.axis("off")
    write(words, 1, "question", color="grey", fontsize=10)
    write(words, 0.95, example.query, 40, fontsize=12, weight="bold")
    for folder, axis, (title, y) in zip(folders, axes, TITLES.items()):
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        write(words, y, title, color="grey", fontsize=10)
        write(words, y - 0.05, result["reasoning"].strip(), 44, fontsize=11)
        draw_answer(axis, title, result, folder / "mask.png", example)
    legend = "yellow: its box; dots: its points; teal: the mask\ndashed: the true box"
    words.text(0, 0, legend, color="grey", fontsize=10)
    return figure


def draw_answer(axis: Axes, title: str, result: dict, mask_file: Path, example: Example) -> None:
    """Draws the answer of one result.json, its mask and the true box."""
    mask = np.asarray(Image.open(mask_file)) > 127
    width, height = example.image.size
    x1, y1, x2, y2 = example.bbox
    picture = overlay(
        Image.open(result["image"]).convert("RGB"), mask, result["bbox"], result["points"]
    )
    axis.imshow(picture, extent=(0, width, height, 0))
    axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], "--", color="white", linewidth=1.5)
    iou = box_iou(tuple(result["bbox"]), example.bbox)
    axis.set_title(f"{title}: IoU {iou:.2f}", fontsize=12)
    axis.axis("off")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", type=Path, nargs=2, help="two of infer.py's --out: before and after"
    )
    args = parser.parse_args()
    with exit_on(ValueError, OSError):
        result = json.loads((args.folders[0] / "result.json").read_text(encoding="utf-8"))
        example = true_example(result["query"], result["size"])
        draw(args.folders, example).savefig(PICTURE, dpi=110)
    print(f"-> {PICTURE}")


if __name__ == "__main__":
    main()
