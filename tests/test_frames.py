"""`python data.py PATH` says what the numbers of boxes mean where they are no pixels."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import Sizes, box_from_mask, model_size, to_model

WIDTH, HEIGHT = 300, 200


def thousandths(box):
    x1, y1, x2, y2 = box
    return [
        1000 * x1 / WIDTH,
        1000 * y1 / HEIGHT,
        1000 * x2 / WIDTH,
        1000 * y2 / HEIGHT,
    ]


WRITTEN = {  # a reading: how a box of the image would be written in it
    "pixels": list,
    "0 to 1000": thousandths,
    "0 to 1": lambda box: [value / 1000 for value in thousandths(box)],
    "pixels of the model frame": lambda box: list(
        to_model(box, Sizes((WIDTH, HEIGHT), model_size((WIDTH, HEIGHT), "square:560")))
    ),
    "x, y, width, height": lambda box: [box[0], box[1], box[2] - box[0], box[3] - box[1]],
}


def write_data(folder: Path, write, with_masks: bool) -> None:
    """Eight pictures with a rectangle each, whose box is written by a function."""
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    random = np.random.default_rng(0)
    lines = []
    for i in range(8):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        x = int(random.integers(100, 180))
        y = int(random.integers(60, 120))
        mask[y : y + 60, x : x + 90] = 255
        Image.fromarray(mask).convert("RGB").save(folder / f"images/{i}.png")
        Image.fromarray(mask).save(folder / f"masks/{i}.png")
        row = {"image": f"{i}.png", "query": "Where?", "bbox": write(box_from_mask(mask > 0))}
        if with_masks:
            row["mask"] = f"{i}.png"
        else:
            row["points"] = [[x + 20, y + 20], [x + 60, y + 40]]
        lines.append(json.dumps(row) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))


@pytest.mark.parametrize("reading", WRITTEN)
def test_boxes_are_compared_with_their_masks(tmp_path, capsys, monkeypatch, reading):
    default = data.model_size
    monkeypatch.setattr(data, "model_size", lambda size: default(size, "square:560"))
    write_data(tmp_path, WRITTEN[reading], with_masks=True)
    data.main([str(tmp_path)])
    out = capsys.readouterr().out
    if reading == "pixels":
        assert "the boxes look like" not in out
    else:
        assert f"the boxes look like {reading} (fit " in out


@pytest.mark.parametrize("reading", ["pixels", "0 to 1000", "0 to 1"])
def test_without_masks_boxes_are_compared_with_the_bounds_of_their_images(
    tmp_path, capsys, reading
):
    write_data(tmp_path, WRITTEN[reading], with_masks=False)
    data.main([str(tmp_path)])
    out = capsys.readouterr().out
    if reading == "pixels":
        assert "the boxes look like" not in out
    else:
        assert f"the boxes look like {reading} (fit " in out
