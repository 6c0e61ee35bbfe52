"""Pictures: an overlay of mask, box and points, curves of a run, a grid of examples, a contact
sheet."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

OVERLAY_SIDE = 448  # pictures with a shorter long side are enlarged to it
MASK_COLOUR = (20, 220, 190)
BOX_COLOUR = (255, 196, 61)
POINT_COLOURS = ((255, 82, 119), (176, 116, 255))
HALO = "#141414"  # a dark edge keeps lines readable on bright tissue
WHITE = (255, 255, 255)

# ---------------------------------------------------------------- one picture


def overlay(
    image: Image.Image | np.ndarray,
    mask: np.ndarray | None = None,
    bbox: Any = None,
    points: Any = None,
) -> Image.Image:
    """The picture with mask (tint and outline), box and points drawn in. Each may be None.

    image   PIL image or (H, W, 3) uint8 array
    mask    (H, W) bool, else ValueError
    bbox    (x1, y1, x2, y2), edges, in pixels of the image
    points  any number of (x, y), indices of pixels
    ->      PIL RGB image, enlarged to a long side of 448 px if it is smaller, so that lines are
            crisp
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    picture = image.convert("RGB")
    enlargement = max(1.0, OVERLAY_SIDE / max(picture.size))
    width = max(1, round(picture.width * enlargement))
    height = max(1, round(picture.height * enlargement))
    # PIL draws hard edges: draw at twice the size, then shrink
    finer = 2 if max(width, height) <= 1024 else 1
    canvas = picture.resize((finer * width, finer * height), Image.Resampling.BICUBIC)
    line = finer * max(2, round(max(width, height) / 280))
    scale = np.array(canvas.size) / picture.size
    if mask is not None:
        if np.shape(mask) != picture.size[::-1]:
            raise ValueError(
                f"mask: {np.shape(mask)} is not the image's size, {picture.size[::-1]}"
            )
        _draw_mask(canvas, np.asarray(mask, dtype=bool), line)
    if bbox is not None:
        _draw_box(canvas, bbox, scale, line)
    if points is not None:
        _draw_points(canvas, points, scale, line)
    return canvas.resize((width, height), Image.Resampling.LANCZOS)


def _draw_mask(canvas: Image.Image, mask: np.ndarray, line: int) -> None:
    small = Image.fromarray(mask.astype(np.uint8) * 255)
    grey = small.resize(canvas.size, Image.Resampling.BILINEAR)
    inside = grey.point(lambda value: 255 * (value > 127))
    eroded = inside.filter(ImageFilter.MinFilter(line // 2 * 2 + 1))
    contour = ImageChops.subtract(inside, eroded)
    tint = inside.point(lambda value: value * 36 // 100)
    canvas.paste(MASK_COLOUR, mask=ImageChops.lighter(tint, contour))


def _draw_box(canvas: Image.Image, bbox: Any, scale: np.ndarray, line: int) -> None:
    corners = np.sort(np.reshape(bbox, (2, 2)), axis=0) * scale
    (x1, y1), (x2, y2) = corners
    pen = ImageDraw.Draw(canvas)
    for grow, width, colour in ((line, 2 * line, HALO), (line / 2, line, BOX_COLOUR)):
        edges = (x1 - grow, y1 - grow, x2 + grow, y2 + grow)
        pen.rectangle(edges, outline=colour, width=width)


def _draw_points(canvas: Image.Image, points: Any, scale: np.ndarray, line: int) -> None:
    pen = ImageDraw.Draw(canvas)
    for point, colour in zip(points, cycle(POINT_COLOURS)):
        x, y = (np.array(point, dtype=float) + 0.5) * scale  # the centre of the pixel
        for radius, fill in ((3.2 * line, HALO), (2.7 * line, "white"), (1.9 * line, colour)):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


# ---------------------------------------------------------------- several


def curves(path: Path, rows: Sequence[dict], panels: Mapping[str, Sequence[str]]) -> None:
    """Draws the rows of a log over their "step". panels: {title: keys of a row}. Each key is a thin
    line, its running mean a thick one."""
    from matplotlib.figure import Figure  # 50 MB, and only drawing needs them

    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(4.2 * columns, 6), layout="constrained")
    for place, (title, keys) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(2, columns, place, title=title, xlabel="step")
        for key in keys:
            logged = [row for row in rows if row.get(key) is not None]
            if not logged:
                continue
            steps = [row["step"] for row in logged]
            values = [row[key] for row in logged]
            style = "o-" if len(values) < 20 else "-"
            (line,) = axis.plot(steps, values, linewidth=1, alpha=0.25)
            axis.plot(steps, running_mean(values), style, color=line.get_color(), label=key)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)


def running_mean(values: Sequence[float]) -> list[float]:
    """Returns at each place the mean of the values up to there, of the last tenth of them."""
    width = max(1, len(values) // 10)
    means = []
    for end in range(1, len(values) + 1):
        means.append(float(np.mean(values[max(0, end - width) : end])))
    return means


@dataclass
class Picture:
    """One picture of a grid. Box and mask are the true ones, in pixels of size (width, height)."""

    image: Image.Image  # of any size: it is drawn over `size`
    size: tuple[int, int]
    title: str
    caption: str
    true_box: Any
    true_mask: np.ndarray | None


def grid(path: Path, pictures: Sequence[Picture]) -> None:
    """Draws pictures side by side, each with its title, caption, true box and true mask."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(4, len(pictures))
    lines = math.ceil(len(pictures) / columns)
    legend_width = 5.2  # inches
    figure_size = (max(3.2 * columns, legend_width), 3.9 * lines + 0.8)
    figure = Figure(figsize=figure_size, layout="constrained")
    for place, picture in enumerate(pictures, 1):
        axis = figure.add_subplot(lines, columns, place)
        axis.axis("off")
        _draw_in_grid(axis, picture)
    handles = []
    labels = []
    for label, style, marker, colour in (
        ("box", "-", "", BOX_COLOUR),
        ("mask", "", "s", MASK_COLOUR),
        ("true box", "--", "", WHITE),
        ("true mask", ":", "", WHITE),
        ("point 1", "", "o", POINT_COLOURS[0]),
        ("point 2", "", "o", POINT_COLOURS[1]),
    ):
        colour = np.divide(colour, 255)
        handles.append(Line2D([], [], linestyle=style, marker=marker, color=colour))
        labels.append(label)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        facecolor="dimgrey",
        labelcolor="white",
    )
    figure.savefig(path, dpi=80)


def _draw_in_grid(axis: Any, picture: Picture) -> None:
    width, height = picture.size
    white = np.divide(WHITE, 255)
    axis.imshow(picture.image, extent=(0, width, height, 0))
    x1, y1, x2, y2 = picture.true_box
    axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], "--", lw=1.5, color=white)
    if picture.true_mask is not None:
        xs = np.arange(width) + 0.5
        ys = np.arange(height) + 0.5
        style = {"linestyles": "dotted", "linewidths": 1.2}
        axis.contour(xs, ys, picture.true_mask, [0.5], colors=[white], **style)
    lines = wrap(picture.title, 46, max_lines=3, placeholder=" …")
    axis.set_title("\n".join([*lines, picture.caption]), fontsize=8, parse_math=False)


def contact_sheet(
    shown: Sequence[tuple[Image.Image, str]], side: int = 224, text_height: int = 58
) -> Image.Image:
    """Returns pictures as tiles of a sheet, each with its text below. side: of a tile (px)."""
    columns = 6
    rows = math.ceil(len(shown) / columns)
    height = side + text_height
    sheet = Image.new("RGB", (columns * side, rows * height))
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)
    for i, (picture, text) in enumerate(shown):
        x = i % columns * side
        y = i // columns * height
        sheet.paste(ImageOps.pad(picture.convert("RGB"), (side, side)), (x, y))
        pen.text((x + 4, y + side + 2), text, font=font, spacing=2)
    return sheet
