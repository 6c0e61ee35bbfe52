"""The README's picture: one question, answered before GRPO and after it, with the truth.

for crm in demo/crm runs/demo/step_000080; do
    python infer.py --image demo/images/chest_ct_patient.png --query "..." --crm $crm --out
    out/$(basename $crm); done
python -m demo.make.example out/crm out/step_000080         # -> demo/pictures/example.png; the
                                                            truth is read from demo/data"""

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
    return next(
        s
        for s in (samples[i] for i in range(len(samples)))
        if s.query == query and list(s.image.size) == size
    )


def draw(results: list[dict], masks, image, sample, path) -> None:
    """Two columns of words and pictures: before and after."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    words, *axes = figure.subplots(1, 3, width_ratios=(1.15, 1, 1))
    words.axis("off")
    words.text(0, 1, "question", color="grey", fontsize=10, va="top")
    words.text(
        0,
        0.95,
        "\n".join(textwrap.wrap(results[0]["query"], 40)),
        fontsize=12,
        va="top",
        weight="bold",
    )
    (W, H), (x1, y1, x2, y2) = image.size, sample.bbox
    for title, y, result, mask, axis in zip(
        ("before GRPO", "after GRPO"), (0.72, 0.34), results, masks, axes
    ):
        words.text(0, y, title, color="grey", fontsize=10, va="top")
        words.text(
            0,
            y - 0.05,
            "\n".join(textwrap.wrap(result["reasoning"].strip(), 44)),
            fontsize=11,
            va="top",
        )
        axis.imshow(overlay(image, mask, result["bbox"], result["points"]), extent=(0, W, H, 0))
        axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], "--", color="white", linewidth=1.5)
        axis.set_title(
            f"{title}: IoU {box_iou(tuple(result['bbox']), sample.bbox):.2f}", fontsize=12
        )
        axis.axis("off")
    words.text(
        0,
        0,
        "yellow: its box; dots: its points; teal: the mask\ndashed: the true box",
        color="grey",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folders", type=Path, nargs=2, help="two of infer.py's --out: before and after"
    )
    folders = parser.parse_args().folders
    written = [json.loads((folder / "result.json").read_text()) for folder in folders]
    picture = Image.open(written[0]["image"]).convert("RGB")
    draw(
        written,
        [np.asarray(Image.open(folder / "mask.png")) > 127 for folder in folders],
        picture,
        true_sample(written[0]["query"], written[0]["size"]),
        "demo/pictures/example.png",
    )
