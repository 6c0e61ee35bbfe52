"""Pictures of runs and evaluations, drawn with matplotlib, which is imported only here."""

import math
from pathlib import Path
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from asm import overlay
from data import clip_to
from extras.predictions import decode_mask, shown
from metrics import iou
from runtime.pictures import BOX_COLOUR, MASK_COLOUR, POINT_COLOURS

WHITE = (255, 255, 255)
LEGEND = 5.2  # inches that the legend of examples.png needs


def curves(path: Path, rows: list[dict], panels: dict[str, list[str]]) -> None:
    """curves.png from the rows of metrics.jsonl. panels: {title: keys}; each key thin, its running mean thick."""
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(4.2 * columns, 6), layout="constrained")
    for place, (title, keys) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(2, columns, place, title=title, xlabel="step")
        for key in keys:
            logged = [row for row in rows if row.get(key) is not None]
            if not logged:
                continue
            steps, values = [row["step"] for row in logged], [row[key] for row in logged]
            width = max(1, len(values) // 10)
            means = [np.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]
            (line,) = axis.plot(steps, values, linewidth=1, alpha=0.25)
            axis.plot(
                steps, means, "o-" if len(values) < 20 else "-", color=line.get_color(), label=key
            )
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def examples(rows: list[dict], samples, path: Path, most: int = 12) -> None:
    """Up to `most` different questions from the worst to the best IoU, one picture each below the question: box, points
    and mask of the kept completion, the true box and the true mask. rows: lines of predictions.jsonl."""
    order = sorted(rows, key=lambda row: (iou(row, shown(row)) or 0, row["index"]))
    picks = np.unique(np.linspace(0, len(order) - 1, most).round().astype(int))
    columns = min(4, len(picks))
    lines = math.ceil(len(picks) / columns)
    figure = Figure(figsize=(max(3.2 * columns, LEGEND), 3.9 * lines + 0.8), layout="constrained")
    for place, pick in enumerate(picks, 1):
        axis = figure.add_subplot(lines, columns, place)
        axis.axis("off")
        draw_example(axis, order[pick], samples[order[pick]["index"]])
    legend = {
        "box": ("-", "", BOX_COLOUR),
        "mask": ("", "s", MASK_COLOUR),
        "true box": ("--", "", WHITE),
        "true mask": (":", "", WHITE),
        **{f"point {n}": ("", "o", colour) for n, colour in enumerate(POINT_COLOURS, 1)},
    }
    handles = [
        Line2D([], [], linestyle=line, marker=marker, color=np.divide(colour, 255))
        for line, marker, colour in legend.values()
    ]
    figure.legend(
        handles,
        legend,
        loc="outside lower center",
        ncols=3,
        facecolor="dimgrey",
        labelcolor="white",
    )
    figure.savefig(path, dpi=80)


def draw_example(axis, p: dict, sample) -> None:
    completion, (W, H) = shown(p), sample.image.size
    bbox, points = (xy and clip_to((W, H), xy) for xy in (completion["bbox"], completion["points"]))
    picture = overlay(sample.image, p["mask"] and decode_mask(p["mask"]), bbox, points)
    axis.imshow(picture, extent=(0, W, H, 0))
    (x1, y1, x2, y2), white = p["truth"]["bbox"], np.divide(WHITE, 255)
    axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], "--", lw=1.5, color=white)
    if sample.mask is not None:
        axis.contour(
            np.arange(W) + 0.5,
            np.arange(H) + 0.5,
            sample.mask,
            [0.5],
            colors=[white],
            linestyles="dotted",
            linewidths=1.2,
        )
    said = completion["problem"] or (
        f"IoU {iou(p, completion):.2f}" if "bbox" in p["asked"] else ""
    )
    about = ", ".join(filter(None, (p["category"] or p["id"], said)))
    axis.set_title(
        "\n".join([*wrap(p["query"], 46, max_lines=3, placeholder=" …"), about]),
        fontsize=8,
        parse_math=False,
    )
