"""Pictures and coloured text of learn/one_step.py. Nothing is computed here, only drawn.

A picture is a PIL image, and coloured text is an Html: notebooks show both by themselves.
"""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from data import STRIDE, Example, Sizes, to_image, to_model
from rewards import Answer
from runtime.pictures import overlay

GREEN = (0, 135, 70)
RED = (200, 40, 40)
GREY = (0.72, 0.45, 0.2)  # how bright start, image and question are in the attention mask
TRUE, WRITTEN = "#3b75af", "#d98b2b"
SHOWN = 1.0  # a change of so many nats has the full colour


@dataclass(frozen=True)
class Html:
    """A text that a notebook shows as HTML."""

    source: str

    def _repr_html_(self) -> str:
        return self.source


def picture_of(figure: Figure) -> Image.Image:
    file = io.BytesIO()
    figure.savefig(file, dpi=80)
    return Image.open(file).convert("RGB")


# ---------------------------------------------------------------- image, boxes, points


def image_tokens(example: Example, sizes: Sizes) -> Image.Image:
    """Draws the image in the model frame with the squares that become one token each."""
    width, height = sizes.model
    figure = Figure(figsize=(4.2, 4.2 * height / width + 0.3), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(example.image.resize(sizes.model), extent=(0, width, height, 0))
    axis.set_xticks(range(0, width + 1, STRIDE))
    axis.set_yticks(range(0, height + 1, STRIDE))
    axis.grid(color="white", linewidth=1)
    number = 0
    for y in range(0, height, STRIDE):
        for x in range(0, width, STRIDE):
            number += 1
            axis.text(x + 2, y + 2, str(number), color="#ffc43d", fontsize=9, va="top")
    return picture_of(figure)


def completions(
    example: Example, answers: Sequence[Answer], sizes: Sizes, titles: Sequence[str]
) -> Image.Image:
    """Draws each completion's box and points, and the true box, dashed."""
    figure = Figure(figsize=(2.6 * len(answers), 3.0), layout="constrained")
    width, height = example.image.size
    for place, (answer, title) in enumerate(zip(answers, titles), 1):
        box = None if answer.bbox is None else to_image(answer.bbox, sizes)
        points = None if answer.points is None else to_image(answer.points, sizes)
        axis = figure.add_subplot(1, len(answers), place)
        picture = overlay(example.image, None, box, points)
        axis.imshow(picture, extent=(0, width, height, 0))
        draw_box(axis, example.bbox)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    return picture_of(figure)


def draw_box(axis: Axes, box: Sequence[float]) -> None:
    x1, y1, x2, y2 = box
    axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], "--", color="white", linewidth=1.5)


def overlap(answer: Answer, example: Example, sizes: Sizes) -> Image.Image:
    """Draws a completion's box and the true one in the model frame."""
    figure = Figure(figsize=(4.6, 4.0), layout="constrained")
    axis = figure.add_subplot()
    width, height = sizes.model
    axis.imshow(example.image.resize(sizes.model), extent=(0, width, height, 0), alpha=0.5)
    true_box = to_model(example.bbox, sizes)
    for box, colour, name in ((true_box, TRUE, "true"), (answer.bbox, WRITTEN, "written")):
        x1, y1, x2, y2 = box
        axis.fill([x1, x2, x2, x1], [y1, y1, y2, y2], color=colour, alpha=0.5, label=name)
    edges = np.array([true_box, answer.bbox])
    axis.set_xlim(edges[:, 0].min() - 10, edges[:, 2].max() + 10)
    axis.set_ylim(edges[:, 3].max() + 10, edges[:, 1].min() - 10)
    axis.legend(fontsize=8)
    return picture_of(figure)


# ---------------------------------------------------------------- the packed sequence


def attention_mask(allowed: torch.Tensor, parts: Sequence[tuple[str, int]]) -> Image.Image:
    """Draws who may look at whom. allowed: (S, S), row looks at column. parts: (name, number of
    tokens) of the pieces of the sequence, in order: three of the prompt, then the completions."""
    size = len(allowed)
    part_of = np.repeat(np.arange(len(parts)), [count for _, count in parts])
    shown = np.ones((size, size, 3))
    for place in range(len(parts)):
        seen_here = allowed.numpy() & (part_of == place)
        is_prompt = place < len(GREY)
        colour = [GREY[place]] * 3 if is_prompt else to_rgb(f"C{place - len(GREY)}")
        shown[seen_here] = colour
    figure = Figure(figsize=(6.4, 6.2), layout="constrained")
    axis = figure.add_subplot()
    axis.imshow(shown, interpolation="nearest", extent=(0, size, size, 0))
    ends = np.cumsum([count for _, count in parts])
    middles = ends - np.array([count for _, count in parts]) / 2
    names = [name for name, _ in parts]
    axis.set_xticks(middles, names, rotation=30, fontsize=8)
    axis.set_yticks(middles, names, fontsize=8)
    for end in ends[:-1]:
        axis.axhline(end, color="black", linewidth=0.4)
        axis.axvline(end, color="black", linewidth=0.4)
    axis.set_xlabel("... may look at this token")
    axis.set_ylabel("this token ...")
    return picture_of(figure)


# ---------------------------------------------------------------- what became likelier


def coloured(titles: Sequence[str], tokens: Sequence[list[str]], changes: torch.Tensor) -> Html:
    """Colours each token of some completions by how its log-probability changed: green is likelier,
    red less likely. changes: (G, T). A tooltip has the number."""
    blocks = []
    for title, of_one, change in zip(titles, tokens, changes.tolist()):
        spans = [span_of(token, value) for token, value in zip(of_one, change)]
        blocks.append(f"<p><b>{html.escape(title)}</b><br>{''.join(spans)}</p>")
    style = "font-family: monospace; line-height: 1.7; color: black; background: white"
    return Html(f'<div style="{style}">{"".join(blocks)}</div>')


def span_of(token: str, change: float) -> str:
    red, green, blue = GREEN if change > 0 else RED
    strength = min(1.0, abs(change) / SHOWN)
    colour = f"rgba({red}, {green}, {blue}, {0.75 * strength:.2f})"
    text = html.escape(token)
    return f'<span style="background: {colour}" title="{change:+.3f}">{text}</span>'


def changes_and_advantages(advantages: torch.Tensor, changes: torch.Tensor) -> Image.Image:
    """Draws each completion's advantage beside the mean change of its tokens. Both: (G,)."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    for place, (title, values) in enumerate(
        (("advantage", advantages), ("mean change of a token's log-probability", changes)), 1
    ):
        axis = figure.add_subplot(1, 2, place)
        colours = ["#00873f" if value > 0 else "#c82828" for value in values.tolist()]
        axis.bar(range(len(values)), values.tolist(), color=colours)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(values)))
        axis.set_xlabel("completion")
        axis.set_title(title, fontsize=10)
    return picture_of(figure)


def gains(
    ratios: torch.Tensor,
    advantages: torch.Tensor,
    gained: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> Image.Image:
    """Draws what each token gains over its ratio, and the edges of the clip range. All: (n,)."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for place, (title, chosen) in enumerate(
        (("tokens with A > 0", advantages > 0), ("tokens with A < 0", advantages < 0)), 1
    ):
        axis = figure.add_subplot(1, 2, place)
        axis.plot(ratios[chosen], gained[chosen], ".", markersize=7, alpha=0.5)
        axis.axvspan(1 - clip_low, 1 + clip_high, color="#519e3e", alpha=0.12)
        axis.set_xlabel("ratio")
        axis.set_ylabel("gain")
        axis.set_title(title, fontsize=10)
    return picture_of(figure)
