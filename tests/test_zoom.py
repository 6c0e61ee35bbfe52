"""extras/zoom.py: the window, the way back to the image, which look is kept, and the table."""

import json

import numpy as np
import pytest
from PIL import Image
from test_infer import SIDE, Asker, H, W, X, Y, ask, completion, in_image  # noqa: F401
from test_scripts import run

from crm import load_crm
from data import EMBEDDED, Sizes
from extras import zoom
from extras.zoom import AREAS, Look, agrees, groups_of, moved, table, window_around
from runtime.files import read_jsonl

SIZE = (300, 200)


# ---------------------------------------------------------------- the window


@pytest.mark.parametrize(
    "box, window",
    [
        ((140, 90, 160, 110), (75, 50, 225, 150)),  # centred on a small box
        ((0, 0, 20, 20), (0, 0, 150, 100)),  # moved inside the image
        ((290, 190, 310, 205), (150, 100, 300, 200)),  # the box leaves the image
        ((50, 20, 250, 40), (0, 0, 300, 100)),  # 200 wide, 300 with its margins
        ((100, 80, 220, 120), (70, 50, 250, 150)),  # 120 wide, 180 with its margins
    ],
)
def test_the_window_is_a_part_of_the_image_around_the_box(box, window):
    assert window_around(box, SIZE, 2) == window


def test_a_box_that_fills_the_image_has_no_window():
    assert window_around((0, 0, 300, 200), SIZE, 2) is None
    assert window_around((-900, -900, 900, 900), SIZE, 8) is None


def test_a_wider_zoom_has_a_smaller_window():
    left, top, right, bottom = window_around((140, 90, 160, 110), SIZE, 5)
    assert (right - left, bottom - top) == (60, 40)


@pytest.mark.parametrize("size", [(40, 40), (61, 203), (1000, 30)])
def test_every_window_lies_in_its_image_and_holds_what_is_inside_of_the_box(size):
    rng = np.random.default_rng(0)
    for _ in range(200):
        x = np.sort(rng.uniform(-0.2, 1.2, 2) * size[0])
        y = np.sort(rng.uniform(-0.2, 1.2, 2) * size[1])
        window = window_around((x[0], y[0], x[1], y[1]), size, rng.uniform(1.1, 6))
        if window is None:
            continue
        left, top, right, bottom = window
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        assert left <= max(x[0], 0) + 1 or x[0] > size[0]
        assert right >= min(x[1], size[0]) - 1 or x[1] < 0


def test_boxes_and_points_move_together():
    assert moved((1, 2, 3, 4), 10, 20) == (11, 22, 13, 24)
    assert moved(((1, 2), (3, 4)), 10, 20) == ((11, 22), (13, 24))
    assert moved(None, 10, 20) is None


# ---------------------------------------------------------------- the second look


def test_what_is_seen_in_the_crop_is_mapped_back_to_the_image(monkeypatch):
    """A model that sees the bright rectangle exactly, in whatever image it is given."""
    pixels = np.full((200, 300, 3), 20, np.uint8)
    pixels[90:110, 140:170] = 220
    image = Image.fromarray(pixels)
    seen = []

    def sees(crm, prompt, completions, max_new_tokens, temperature, seed):
        left, top, right, bottom = (140 - 80, 90 - 50, 170 - 80, 110 - 50)  # in the crop
        seen.append(prompt.sizes)
        bbox = (left, top, right, bottom)
        points = ((left + 5, top + 5), (right - 5, bottom - 5))
        return {"texts": ["t"], "agreement": None}, [{"bbox": bbox, "points": points}], 0

    monkeypatch.setattr(zoom, "answer", sees)
    crm = load_crm(EMBEDDED["crm"])
    look = zoom.second_look(crm, image, "?", (145, 90, 165, 110), 2, 1, 8, 0.0, 0)
    assert look.window == (80, 50, 230, 150)
    assert look.completions[0]["bbox"] == (140, 90, 170, 110)
    assert look.completions[0]["points"] == ((145, 95), (165, 105))
    whole = crm.encode_question(image, "?")
    assert seen[0] == Sizes((150, 100), whole.sizes.model)  # as many tokens as the whole image


def look_with(box) -> Look:
    return Look((0, 0, 9, 9), {}, [{"bbox": box, "points": None}], 0)


def test_the_second_look_agrees_by_iou():
    first = {"bbox": (0, 0, 10, 10)}
    assert agrees(first, look_with((0, 0, 10, 5))) == 0.5
    assert agrees(first, look_with((50, 50, 60, 60))) == 0
    assert agrees(first, look_with(None)) is None
    assert agrees(first, None) is None
    assert agrees({"bbox": None}, look_with((0, 0, 1, 1))) is None


def test_infer_keeps_a_second_look_that_agrees(ask: Asker):  # noqa: F811
    # both looks write the same numbers: the whole window of the second is the box of the first
    box = (28, 28, 84, 84)
    got = ask([completion(box)], "--zoom 2")
    assert got.status == 0
    first = in_image(box)
    left, top, right, bottom = got.result["zoom"]["window"]
    middle = (left + right) / 2, (top + bottom) / 2
    assert middle == pytest.approx(((first[0] + first[2]) / 2, (first[1] + first[3]) / 2), abs=1)
    sx = (right - left) / SIDE
    sy = (bottom - top) / SIDE
    second = [left + 28 * sx, top + 28 * sy, left + 84 * sx, top + 84 * sy]
    iou = (sx / X) * (sy / Y)  # one box inside the other
    assert got.result["zoom"]["iou"] == pytest.approx(iou, abs=0.01)
    assert got.result["zoom"]["kept"] == "second"
    assert got.result["bbox"] == pytest.approx(second)
    assert len(got.result["texts"]) == 2
    assert "the second look is kept" in got.out
    assert got.asked[-1][0].shape == (H, W, 3)  # the segmenter draws on the whole image


def test_infer_keeps_the_first_look_where_the_second_disagrees(ask: Asker):  # noqa: F811
    box = (2, 2, 12, 12)  # in the crop it is somewhere else, and smaller
    got = ask([completion(box)], "--zoom 4")
    assert got.result["zoom"]["kept"] == "first"
    assert got.result["bbox"] == pytest.approx(in_image(box))


def test_infer_has_no_second_look_without_a_first_one(ask: Asker):  # noqa: F811
    assert ask(["no answer"], "--zoom 2").status == 3
    whole = ask([completion((0, 0, SIDE, SIDE))], "--zoom 2")
    assert whole.result["zoom"]["window"] is None
    assert "there is no second look" in whole.out
    assert "must be greater than 1" in ask_error(ask)


def ask_error(ask: Asker) -> str:  # noqa: F811
    return ask.rejected([completion((1, 1, 9, 9))], "--zoom 1")


# ---------------------------------------------------------------- the table


def row(i: int, area: float, one: float, two: float, group: str = "A") -> dict:
    return {
        "id": str(i),
        "image": f"image {i}",
        "supercategory": group,
        "area": area,
        "iou": {"one look": one, "twice": one, "zoom": two},
        "seconds": {"one look": 1.0, "twice": 2.0, "zoom": 3.0},
        "looked": True,
        "kept": two != one,
    }


def test_rows_are_grouped_by_area_and_super_category():
    rows = [row(0, 0.01, 0.1, 0.3), row(1, 0.02, 0.2, 0.2, "B"), row(2, 1.0, 0.5, 0.5, "B")]
    groups = groups_of(rows)
    sizes = {name: len(some) for name, some in groups.items()}
    assert sizes == {**dict.fromkeys(AREAS, 1), "all": 3, "A": 1, "B": 2}


def test_the_table_has_the_paired_difference_and_the_seconds():
    rows = [row(i, 0.01, 0.2, 0.2 + 0.1 * (i % 2)) for i in range(20)]
    text = table(rows, "note")
    assert "| all | 20 | 0.200 [0.200, 0.200] | 0.200 [0.200, 0.200] | 0.250 [" in text
    assert "| +0.050 [+0.0" in text
    assert text.count("50 %") == 3  # all, small targets, A
    few = table(rows[:3], "note")
    assert "| all | 3 | 0.200 [–] |" in few
    assert "- zoom: 3.00 s per question (median)" in text


def test_the_command_runs(tmp_path):
    out, _ = run("-m extras.zoom --limit 2 --completions 2 --max-new-tokens 96 --out", tmp_path)
    assert "zoom - one look" in out
    assert (tmp_path / "table.md").read_text().strip() in out
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert len(rows) == 2
    for found in rows:
        assert set(found["iou"]) == {"one look", "twice", "zoom"}
        assert found["seconds"]["zoom"] >= found["seconds"]["one look"]
    json.dumps(rows)
