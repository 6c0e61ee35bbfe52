"""The README's picture: a question, what the model wrote, its box, points and mask, and the truth.

    python infer.py --image demo/images/fundus.png --query "..." --crm runs/demo/step_000100 --out out/example
    python -m demo.make_example out/example         # -> demo/example.png; the truth is read from demo/data
"""
import argparse
import json
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from asm import overlay
from data import load_samples
from rewards import box_iou


def true_sample(query: str, size):
    """The held-out sample that was asked: the one with this question and image size."""
    samples = load_samples("demo/data", "test")
    return next(s for s in (samples[i] for i in range(len(samples))) if s.query == query and list(s.image.size) == size)


def draw(result: dict, image, mask, sample, path) -> None:
    iou = box_iou(tuple(result["bbox"]), sample.bbox)
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    words, before, after = figure.subplots(1, 3, width_ratios=(1.25, 1, 1))
    words.axis("off")
    for y, title, text in ((0.97, "question", result["query"]), (0.66, "reasoning", result["reasoning"].strip()),
                           (0.18, "answer", f"box {[round(v) for v in result['bbox']]}, points "
                                            f"{[[round(v) for v in p] for p in result['points']]}")):
        words.text(0, y, title, color="grey", fontsize=10, va="top")
        words.text(0, y - 0.07, "\n".join(textwrap.wrap(text, 40)), fontsize=11, va="top")
    (W, H), (x1, y1, x2, y2) = image.size, sample.bbox
    before.imshow(image, extent=(0, W, H, 0))
    before.set_title("image", fontsize=11)
    after.imshow(overlay(image, mask, result["bbox"], result["points"]), extent=(0, W, H, 0))
    after.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], "--", color="white", linewidth=1.5)
    after.set_title(f"answer; dashed: true box, IoU {iou:.2f}", fontsize=11)
    for axis in (before, after):
        axis.axis("off")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="infer.py's --out")
    folder = parser.parse_args().folder
    written = json.loads((folder / "result.json").read_text())
    picture = Image.open(written["image"]).convert("RGB")
    draw(written, picture, np.asarray(Image.open(folder / "mask.png")) > 127, true_sample(written["query"], written["size"]),
         "demo/example.png")
