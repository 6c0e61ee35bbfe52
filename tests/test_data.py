"""data.py: frames, key points, prompts, targets, and data sets as examples. Bad input is named.

Rarer rows and rarer images are in test_readers.py and test_images.py.
"""

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

import data
from data import (
    ANSWER_FORMATS,
    ONE_BOX,
    PROMPTS,
    BadRow,
    Example,
    Examples,
    Sizes,
    answer_format_of,
    box_from_mask,
    clip_to,
    evenly_spread,
    fill_prompt,
    keypoints_from_mask,
    load_image,
    load_mask,
    load_prompt,
    load_samples,
    load_splits,
    model_size,
    target_text,
    to_image,
    to_model,
)
from rewards import parse_answer, reward_terms, total_reward, write_answer
from runtime import readers
from runtime.cli import ROOT
from runtime.registry import find

DEMO = str(ROOT / "demo/data")

# ---------------------------------------------------------------- sizes

SIDES = st.integers(14, 3000)


@given(SIDES, SIDES)
@settings(max_examples=300, deadline=None)
def test_aspect_gives_multiples_of_28_within_the_pixel_limits_and_nearly_the_ratio(
    width: int, height: int
) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    w, h = model_size((width, height), min_pixels=56 * 56, max_pixels=840 * 840)
    assert w % 28 == 0
    assert h % 28 == 0
    assert w * h >= 56 * 56
    assert w * h <= 840 * 840 or min(w, h) == 28
    if min(w, h) >= 280:
        assert abs(math.log(w / h * height / width)) < 0.15


@given(SIDES, SIDES)
@settings(max_examples=200, deadline=None)
def test_sizes_are_those_of_qwens_own_resize(width: int, height: int) -> None:
    if max(width, height) <= 200 * min(width, height):
        h, w = smart_resize(height, width, 28, 56 * 56, 840 * 840)
        assert model_size((width, height)) == (w, h)


@pytest.mark.parametrize(
    "size, resize, expected",
    [
        ((512, 512), "aspect", (504, 504)),  # 18.3 -> 18 tokens of 28 pixels
        ((112, 112), "aspect", (112, 112)),
        ((1680, 1680), "aspect", (840, 840)),  # too many pixels: floor(60 / 2) = 30 tokens a side
        ((30, 30), "aspect", (56, 56)),  # too few: at least 56 x 56
        ((300, 500), "square:840", (840, 840)),
        ((512, 512), "aspect:50176", (224, 224)),  # 50176 = 224 * 224
        ((1024, 256), "aspect:50176", (448, 112)),
        ((30, 30), "aspect:1000", (28, 28)),  # below the usual least, which gives way
        # where rounding decides
        ((1024, 1024), "aspect", (812, 812)),
        ((1080, 1080), "aspect", (812, 812)),
        ((2048, 2048), "aspect", (812, 812)),
        ((1500, 1500), "aspect", (840, 840)),
        ((14, 884), "aspect", (28, 448)),
    ],
)
def test_sizes_by_hand(size: tuple[int, int], resize: str, expected: tuple[int, int]) -> None:
    assert model_size(size, resize) == expected


@given(SIDES, SIDES, st.integers(28 * 28, 840 * 840))
@settings(max_examples=300, deadline=None)
def test_a_limit_of_pixels_holds_however_small_it_is(width: int, height: int, most: int) -> None:
    if max(width, height) > 200 * min(width, height):
        return
    w, h = model_size((width, height), f"aspect:{most}")
    assert w * h <= most or min(w, h) == 28


@pytest.mark.parametrize(
    "resize",
    ["square", "square:0", "square:100", "square:-28", "fit", "", "aspect:", "aspect:x"],
)
def test_an_unknown_resize_is_an_error_that_names_the_flag(resize: str) -> None:
    with pytest.raises(ValueError, match=f'--resize {resize}: give "aspect", "aspect:PIXELS"'):
        model_size((100, 100), resize)


def test_too_few_pixels_for_one_token_are_an_error() -> None:
    with pytest.raises(ValueError, match="--resize aspect:783: give at least 784 pixels"):
        model_size((100, 100), "aspect:783")


def test_a_square_beyond_the_limit_is_an_error_with_both_numbers() -> None:
    limit = 224 * 224
    assert model_size((300, 500), "square:224", max_pixels=limit) == (224, 224)
    with pytest.raises(ValueError, match="square:840: 705,600 pixels are more than 50,176"):
        model_size((300, 500), "square:840", max_pixels=limit)


def test_an_absurdly_thin_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        model_size((5000, 14))


# ---------------------------------------------------------------- frames


def test_to_model_scales_x_and_y_by_their_own_factors_and_to_image_undoes_it() -> None:
    sizes = Sizes(image=(100, 50), model=(200, 200))
    assert to_model((10, 10, 20, 30), sizes) == (20, 40, 40, 120)
    # (1 + 0.5) * 2 - 0.5, because the centre of pixel 0 is at 0.5
    assert to_model(((1, 2), (3, 4)), sizes) == ((2.5, 9.5), (6.5, 17.5))
    for xy in ((7, 9, 31, 44), (7, 9)):
        assert to_image(to_model(xy, sizes), sizes) == pytest.approx(xy)


def test_the_point_of_a_one_pixel_mask_stays_in_the_middle_of_its_box() -> None:
    mask = np.zeros((256, 256), bool)
    mask[100, 30] = True
    for side in (56, 252, 840):
        sizes = Sizes(image=(256, 256), model=(side, side))
        x1, y1, x2, y2 = to_model(box_from_mask(mask), sizes)
        (x, y), _ = to_model(keypoints_from_mask(mask), sizes)
        assert x + 0.5 == pytest.approx((x1 + x2) / 2)
        assert y + 0.5 == pytest.approx((y1 + y2) / 2)
        assert to_image((x, y), sizes) == pytest.approx((30, 100))


def test_coordinates_are_clipped_to_one_image_size_around_the_image() -> None:
    assert clip_to((60, 40), (-1e9, 5, 1e9, 39)) == (-60, 5, 120, 39)
    assert clip_to((60, 40), ((3, -41), (61, 81))) == ((3, -40), (61, 80))


# ---------------------------------------------------------------- masks


def test_box_of_a_mask_is_tight_to_the_far_edges() -> None:
    mask = np.zeros((20, 30), bool)
    mask[5:10, 8:25] = True
    assert box_from_mask(mask) == (8, 5, 25, 10)
    one_pixel = np.zeros((20, 30), bool)
    one_pixel[3, 4] = True
    assert box_from_mask(one_pixel) == (4, 3, 5, 4)  # it has an area


def slow_keypoints(mask: np.ndarray) -> tuple:
    """The definition, pixel by pixel."""
    H, W = mask.shape
    inside = []
    outside = []
    for y in range(-1, H + 1):
        for x in range(-1, W + 1):
            is_inside = 0 <= x < W and 0 <= y < H and mask[y, x]
            (inside if is_inside else outside).append((x, y))
    depth = {p: min(math.dist(p, q) for q in outside) for p in inside}

    def rank(p: tuple[int, int]) -> tuple:
        return depth[p], -p[1], -p[0]  # of equally deep ones the first in reading order

    first = max(inside, key=rank)
    away = {p: math.dist(p, first) for p in inside}
    far = [p for p in inside if away[p] > np.median(list(away.values()))]
    second = max(far, key=rank) if far else first
    return first, second


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_keypoints_are_the_deepest_pixel_and_the_deepest_far_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 11)) < rng.uniform(0.1, 1)
    mask[rng.integers(9), rng.integers(11)] = True
    assert keypoints_from_mask(mask) == slow_keypoints(mask)


def test_keypoints_of_one_pixel_coincide_and_of_nothing_are_an_error() -> None:
    mask = np.zeros((5, 5), bool)
    for function in (box_from_mask, keypoints_from_mask):
        with pytest.raises(ValueError, match="empty"):
            function(mask)
    mask[2, 3] = True
    assert keypoints_from_mask(mask) == ((3, 2), (3, 2))


# ---------------------------------------------------------------- images and masks

RAMP = np.arange(40 * 60).reshape(40, 60)
GREY = np.uint8(RAMP * 255 / RAMP.max())
COLOUR = np.stack([GREY, GREY[::-1], GREY[:, ::-1]], axis=2)


def saved_and_loaded(image: Image.Image, path: Path, **options: Any) -> np.ndarray:
    image.save(path, **options)
    return np.asarray(load_image(path)).astype(int)


def test_a_grey_image_has_three_equal_channels(tmp_path: Path) -> None:
    loaded = saved_and_loaded(Image.fromarray(GREY), tmp_path / "grey.png")
    assert np.array_equal(loaded, np.repeat(GREY[..., None], 3, 2))


@pytest.mark.parametrize(
    "name, pixels",
    [("deep.png", np.uint16(1000 + RAMP * 20)), ("float.tiff", np.float32(RAMP) - 900)],
)
def test_deep_greys_are_stretched_and_not_clipped(
    tmp_path: Path, name: str, pixels: np.ndarray
) -> None:
    loaded = saved_and_loaded(Image.fromarray(pixels), tmp_path / name)
    assert abs(loaded - GREY[..., None]).max() <= 1


def test_a_palette_has_its_colours(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOUR).quantize(64)
    loaded = saved_and_loaded(palette, tmp_path / "palette.png")
    assert np.array_equal(loaded, np.asarray(palette.convert("RGB")))


def test_transparent_pixels_are_black(tmp_path: Path) -> None:
    rgba = Image.fromarray(COLOUR).convert("RGBA")
    rgba.putalpha(Image.fromarray(np.uint8(np.where(RAMP % 60 < 30, 255, 0))))
    loaded = saved_and_loaded(rgba, tmp_path / "rgba.png")
    assert np.array_equal(loaded[:, :30], COLOUR[:, :30])
    assert not loaded[:, 30:].any()


def test_an_image_that_is_stored_on_its_side_stands_up(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    colour = Image.fromarray(COLOUR)
    loaded = saved_and_loaded(colour, tmp_path / "turned.png", exif=exif)
    assert np.array_equal(loaded, np.asarray(colour.rotate(-90, expand=True)))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"hello", "not an image"),
        (b"", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "image"),
    ],
)
def test_what_is_no_image_is_one_clear_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ValueError, match=says) as error:
            load_image(source)
        assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        load_image(tmp_path / "no.png")
    with pytest.raises(ValueError, match="directory|folder"):
        load_image(tmp_path)


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content, says",
    [
        (png_of(Image.new("L", (1, 1))), "1x1"),
        (png_of(Image.effect_noise((200, 200), 50))[:5000], "broken"),
        (png_of(Image.new("1", (12_000, 9_000))), "pixels"),
    ],
    ids=["tiny", "truncated", "enormous"],
)
def test_tiny_truncated_and_enormous_images_are_errors(content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load_image(content)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_image_with_nan_or_infinity_is_an_error(tmp_path: Path, bad: float) -> None:
    values = np.random.default_rng(0).random((20, 20), np.float32)
    values[3, 4] = bad
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_image(tmp_path / "x.tiff")


def test_an_eps_named_png_never_starts_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
    path = tmp_path / "x.png"
    path.write_bytes(eps)
    for load in (load_image, load_mask):
        for source in (path, eps):
            with pytest.raises(ValueError, match="formats PNG, JPEG"):
                load(source)
    assert not (tmp_path / "started").exists()


MASK = np.zeros((40, 60))
MASK[10:20, 15:40] = 255
BOX_OF_MASK = (15, 10, 40, 20)


def test_a_mask_is_whatever_is_not_0_of_one_number(tmp_path: Path) -> None:
    for high in (1, 7, 255):
        Image.fromarray(np.uint8(MASK / 255 * high)).save(tmp_path / "m.png")
        assert np.array_equal(load_mask(tmp_path / "m.png"), MASK > 0)
    Image.fromarray(MASK > 0).save(tmp_path / "m.png")  # one bit per pixel
    assert load_mask(tmp_path / "m.png").sum() == 250


def test_a_smoothed_edge_is_cut_at_half_and_is_no_label(tmp_path: Path) -> None:
    soft = np.uint8(np.clip(MASK, 0, 250))
    for edge, area in ((100, 225), (127, 225), (128, 250)):
        soft[10, 15:40] = edge
        Image.fromarray(soft).save(tmp_path / "m.png")
        assert load_mask(tmp_path / "m.png").sum() == area


def test_a_label_map_is_named(tmp_path: Path) -> None:
    labels = np.uint8(MASK > 0)
    labels[12, 20] = 2
    Image.fromarray(labels).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="labels 1, 2: one mask per row is needed"):
        load_mask(tmp_path / "m.png")


# ---------------------------------------------------------------- prompts


def test_a_prompt_file_needs_a_place_for_the_question_and_its_braces_are_safe(
    tmp_path: Path,
) -> None:
    good = tmp_path / "good.txt"
    good.write_text('Say {"a": 1}: {query}\n')
    assert fill_prompt(load_prompt(str(good)), "what {x}?") == 'Say {"a": 1}: what {x}?'
    bad = tmp_path / "bad.txt"
    bad.write_text("Say it")
    with pytest.raises(ValueError, match="bad.txt.*query"):
        load_prompt(str(bad))


def test_a_prompt_is_a_name_an_answer_formats_own_or_the_template_itself() -> None:
    assert load_prompt("direct") == PROMPTS["direct"]
    for name, entry in ANSWER_FORMATS.items():
        assert load_prompt(name) == find(entry).prompt
    assert load_prompt("{query} Answer.") == "{query} Answer."
    with pytest.raises(ValueError, match="nonsense: neither one of reasoning, direct, .*boxes"):
        load_prompt("nonsense")


def test_the_prompts_show_the_answer_that_the_parser_reads() -> None:
    shown = '{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}'
    for template in PROMPTS.values():
        assert f"<answer>{shown}</answer>" in template
        filled = template.replace("x1, y1, x2, y2", "1, 2, 3, 4").replace("x, y", "5, 6")
        assert parse_answer(filled).problem == ""
    assert "<think>" in PROMPTS["reasoning"]
    assert "<think>" not in PROMPTS["direct"]


def test_the_key_in_a_prompt_says_in_which_format_answers_are() -> None:
    for entry in ANSWER_FORMATS.values():
        assert answer_format_of(find(entry).prompt) is find(entry)
    for template in (*PROMPTS.values(), "{query} in your own words"):
        assert answer_format_of(template) is ONE_BOX


# ---------------------------------------------------------------- targets of supervised training


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_supervised_target_earns_nearly_everything(split: str) -> None:
    examples = load_samples(DEMO, split)
    for i in range(0, len(examples), 60):
        example = examples[i]
        sizes = Sizes(example.image.size, model_size(example.image.size))
        text = target_text(example, sizes)
        assert parse_answer(text).problem == ""
        assert example.think in text
        terms = ONE_BOX.reward_terms(text, example, sizes)
        # whole pixels cost a little on the smallest targets
        assert total_reward(terms, "soft") > 3.5
        assert "<think>" not in target_text(example, sizes, with_think=False)


@pytest.mark.parametrize(
    "bbox, points",
    [
        ((-1, -1, 1001, 1001), ((0, 0), (1001, 1001))),
        ((999.5, 999.5, 1000, 1000), ((999, 999), (999, 999))),
        ((0, 0, 0.2, 1000), ((0, 0), (0, 999))),
    ],
)
def test_targets_stay_inside_the_image_and_keep_an_area(bbox: tuple, points: tuple) -> None:
    example = Example("a", Image.new("RGB", (1000, 1000)), "?", bbox, points)
    text = target_text(example, Sizes(image=(1000, 1000), model=(56, 56)))
    answer = parse_answer(text)
    x1, y1, x2, y2 = answer.bbox
    assert 0 <= x1 < x2 <= 56
    assert 0 <= y1 < y2 <= 56
    for x, y in answer.points:
        assert 0 <= x <= 55
        assert 0 <= y <= 55


def test_a_reward_is_counted_in_the_model_frame() -> None:
    """The truth is in the image frame, and what the model writes is in its own."""
    bbox = (10, 5, 30, 25)
    points = ((15, 10), (25, 20))
    example = Example("a", Image.new("RGB", (60, 40)), "?", bbox, points)
    sizes = Sizes(image=(60, 40), model=(120, 40))
    in_model = write_answer(to_model(bbox, sizes), to_model(points, sizes))
    assert ONE_BOX.reward_terms(in_model, example, sizes)["box_iou"] == pytest.approx(1)
    in_image = write_answer(bbox, points)
    assert ONE_BOX.reward_terms(in_image, example, sizes)["box_iou"] < 0.6


def test_no_held_out_question_pays_for_pushing_its_points_apart() -> None:
    for example in load_samples(DEMO, "test")[::4]:
        sizes = Sizes(example.image.size, model_size(example.image.size))
        bbox = to_model(example.bbox, sizes)
        points = to_model(example.points, sizes)

        def earned(pair: tuple) -> float:
            text = "<think>t</think>" + write_answer(bbox, pair)  # noqa: B023  called at once
            terms = reward_terms(text, bbox, points, sizes.model)  # noqa: B023
            return total_reward(terms, "soft")

        (x1, y1), (x2, y2) = points
        distance = math.dist(*points)
        assert earned(points) == pytest.approx(4)
        for push in (0.2, 1, 10.01 - distance):
            dx = (x2 - x1) / distance * push / 2
            dy = (y2 - y1) / distance * push / 2
            assert earned(((x1 - dx, y1 - dy), (x2 + dx, y2 + dy))) <= earned(points)


# ---------------------------------------------------------------- data sets


def png(array: np.ndarray) -> bytes:
    return png_of(Image.fromarray(np.uint8(array)))


def umrg_row(i: int = 0, **changes: Any) -> dict:
    """A row in the schema of U-MRG, of a grey image whose value is i."""
    truth = {"bbox_2d": [15, 10, 40, 20], "point_2d": [[20, 15], [34, 15]]}
    row = {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "images": [{"bytes": png(np.full((40, 60, 3), i)), "path": f"{i}.png"}],
        "masks": [{"bytes": png(MASK), "path": f"{i}_mask.png"}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": {"id": f"s{i}", "supercategory": "Brain", "category": "x", "index": i},
    }
    return row | changes


def parquet(path: Path, rows: list[dict], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


Fill = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Fill:
    """A function that writes rows as a data folder with an image a.png and a mask a.png."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    noise_image(60, 40).save(tmp_path / "images/a.png")
    Image.fromarray(np.uint8(MASK)).save(tmp_path / "masks/a.png")

    def fill(*changes: dict) -> Path:
        usual = {"image": "a.png", "query": "what?", "mask": "a.png"}
        lines = [json.dumps(usual | change) for change in changes]
        (tmp_path / "samples.jsonl").write_text("\n".join(lines))
        return tmp_path

    return fill


def test_an_example_has_what_its_row_says(tmp_path: Path) -> None:
    examples = load_samples(parquet(tmp_path / "train.parquet", [umrg_row(4)]))
    example = examples[0]
    assert example.id == "s4"
    assert example.query == "question 4"
    assert example.bbox == BOX_OF_MASK
    assert example.points == ((20, 15), (34, 15))
    assert (example.supercategory, example.category) == ("Brain", "x")
    assert example.think == ""
    assert example.extra["index"] == 4
    assert example.image.getpixel((0, 0)) == (4, 4, 4)
    assert np.array_equal(example.mask, MASK > 0)


def test_box_and_points_come_from_the_mask_where_they_are_not_given(folder: Fill) -> None:
    given_points = [[20, 15], [34, 15]]
    path = folder(
        {},
        {"bbox": [14, 9, 41, 21]},
        {"points": given_points},
        {"mask": None, "bbox": [1, 2, 30, 20], "points": given_points, "think": "It is …"},
    )
    examples = load_samples(path)
    of_mask = keypoints_from_mask(MASK > 0)
    assert (examples[0].bbox, examples[0].points) == (BOX_OF_MASK, of_mask)
    assert (examples[1].bbox, examples[1].points) == ((14, 9, 41, 21), of_mask)
    assert (examples[2].bbox, examples[2].points) == (BOX_OF_MASK, ((20, 15), (34, 15)))
    assert examples[3].bbox == (1, 2, 30, 20)
    assert examples[3].mask is None
    assert examples[3].think == "It is …"


def test_examples_are_a_lazy_sequence_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [umrg_row(i) for i in range(9)]
    path = parquet(tmp_path / "train.parquet", rows, row_group_size=4)
    assert [example.id for example in load_samples(path)] == [f"s{i}" for i in range(9)]
    monkeypatch.setattr(readers, "load_image", lambda source: pytest.fail("decoded"))
    examples = load_samples(path)
    examples.check()
    assert len(examples) == 9
    assert examples.ids() == [f"s{i}" for i in range(9)]
    assert examples[2:4].ids() == ["s2", "s3"]
    assert examples[::4].ids() == ["s0", "s4", "s8"]
    assert examples.spread(3).ids() == ["s0", "s3", "s6"]
    assert examples.spread(100).ids() == examples.ids()


def test_evenly_spread_numbers_begin_with_the_first_and_are_all_where_they_fit() -> None:
    assert evenly_spread(10, 4) == [0, 2, 5, 7]
    assert evenly_spread(3, 4) == [0, 1, 2]
    assert evenly_spread(0, 4) == []


def test_a_bad_row_is_named_when_it_is_asked_for_or_skipped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [umrg_row(0), umrg_row(1, images=[]), umrg_row(2)]
    path = parquet(tmp_path / "train.parquet", rows)
    examples = load_samples(path)
    assert examples[0].id == "s0"
    assert examples[2].id == "s2"
    with pytest.raises(BadRow, match=r"train\.parquet, row 1, image: has no bytes"):
        examples[1]
    good = load_samples(path, skip_bad_rows=True)
    assert good.ids() == ["s0", "s2"]
    assert len(good.skipped) == 1
    assert "train.parquet, row 1, image: has no bytes" in good.skipped[0]
    assert "train: 1 bad rows skipped; first: " in capsys.readouterr().out
    assert good[:1].skipped == good.spread(1).skipped == good.skipped


def test_where_no_row_is_left_the_first_problem_is_told(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", [umrg_row(images=[])])
    with pytest.raises(ValueError, match="no usable row in split 'train'.* has no bytes") as error:
        load_samples(path, skip_bad_rows=True)
    assert "--skip-bad-rows" not in str(error.value)


def test_a_split_that_is_not_there_is_an_error_with_those_that_are(folder: Fill) -> None:
    path = folder({"split": "training"}, {"split": "test"})
    with pytest.raises(ValueError, match="split 'train'; the splits there: test, training"):
        load_samples(path)
    assert len(load_samples(path, "test")) == 1


def test_repeated_ids_are_made_unique_and_told(folder: Fill, capsys: pytest.CaptureFixture) -> None:
    examples = load_samples(folder({"id": "x"}, {"id": "y"}, {"id": "x"}, {"id": "x"}))
    assert examples.ids() == ["x", "y", "x#2", "x#3"]
    out = capsys.readouterr().out
    assert "line 3, id: 'x' is there already; called x#2" in out
    assert out.count("is there already") == 1  # one line is enough


def test_the_check_before_a_run_decodes_nothing_where_headers_and_box_fit(
    folder: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder({}, {"bbox": [14, 9, 41, 21]})
    monkeypatch.setattr(readers, "load_image", lambda source: pytest.fail("decoded"))
    load_samples(path).check()


def test_the_check_before_a_run_is_no_stricter_than_the_run(folder: Fill) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the image is stored lying on its side, the mask is upright
    path = folder({"image": "turned.png", "mask": "turned.png", "bbox": [0, 0, 40, 60]})
    noise_image(60, 40).save(path / "images/turned.png", exif=exif)
    Image.new("L", (40, 60), 255).save(path / "masks/turned.png")
    examples = load_samples(path)
    examples.check()
    assert examples[0].image.size == (40, 60)


# ---------------------------------------------------------------- what is wrong is named


def umrg_truth(**changes: Any) -> dict:
    """Returns the column of a row in the schema of U-MRG that has box and points."""
    truth = {"bbox_2d": [15, 10, 40, 20], "point_2d": [[20, 15], [34, 15]]}
    return {"reward_model": {"ground_truth": json.dumps(truth | changes)}}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"images": [{"bytes": b"junk", "path": "x"}]}, "image: is not an image"),
        ({"images": [{"bytes": None, "path": "x"}]}, "image: has no bytes"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "query: is empty"),
        ({"masks": [{"bytes": png(np.zeros((40, 60))), "path": "x"}]}, "mask: is empty"),
        ({"masks": [{"bytes": png(np.full((40, 50), 255)), "path": "x"}]}, "mask: is 50x40"),
        ({"masks": [{"bytes": b"junk", "path": "x"}]}, "mask: is not an image"),
        ({"reward_model": {"ground_truth": "{"}}, "reward_model.ground_truth: not JSON"),
        (umrg_truth(bbox_2d=[15, 10, 90, 20]), "bbox: .*outside the 60x40 image"),
        (umrg_truth(bbox_2d=[40, 10, 15, 20]), "bbox: .*x1 < x2"),
        (umrg_truth(bbox_2d=[1, 2, 3]), "bbox: .*four finite numbers"),
        (umrg_truth(point_2d=[[20, 15], [99, 15]]), "points: .*outside the 60x40 image"),
        (umrg_truth(point_2d=[[20, 15]]), "points: .* is not 2 pairs"),
    ],
)
def test_a_bad_row_of_parquet_is_named_with_file_row_and_key(
    tmp_path: Path, changes: dict, says: str
) -> None:
    path = parquet(tmp_path / "train.parquet", [umrg_row(0), umrg_row(1, **changes)])
    with pytest.raises(BadRow, match=rf"train\.parquet, row 1, {says}"):
        load_samples(path)[1]
    assert load_samples(path, skip_bad_rows=True).ids() == ["s0"]


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_info": "x"},
        {"extra_info": None},
        {"prompt": "question 0"},
        {"prompt": None},
        {"masks": None},
        {"masks": "x"},
        {"images": "x"},
        {"images": [1]},
        {"reward_model": None},
        {"reward_model": "x"},
        {"reward_model": {"a": 1}},
        {"reward_model": {"ground_truth": 3}},
        {"reward_model": {"ground_truth": "[1]"}},
        umrg_truth(bbox_2d="x"),
        umrg_truth(bbox_2d={"a": 1}),
        umrg_truth(point_2d=[1, 2]),
    ],
)
def test_columns_of_other_types_are_bad_rows_or_do_not_matter(
    tmp_path: Path, changes: dict
) -> None:
    examples = load_samples(parquet(tmp_path / "train.parquet", [umrg_row(**changes)]))
    problem = ""
    try:
        assert examples[0].query == "question 0"
    except BadRow as error:
        problem = str(error)
    harmless = "extra_info" in changes or "masks" in changes or changes.get("prompt") is not None
    assert (problem == "") == harmless
    if problem:
        assert "train.parquet, row 0" in problem
        assert len(problem.splitlines()) == 1


def test_files_that_are_no_data_set_are_named(tmp_path: Path) -> None:
    row = umrg_row()
    del row["images"]
    with pytest.raises(ValueError, match="train.parquet: column images is missing"):
        load_samples(parquet(tmp_path / "train.parquet", [row]))
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="test.parquet: not a readable parquet"):
        load_samples(tmp_path, "test")
    with pytest.raises(ValueError, match="split 'other'; the splits there: test, train "):
        load_samples(tmp_path, "other")
    with pytest.raises(ValueError, match="no such"):
        load_samples(tmp_path / "nowhere")


def test_a_path_that_no_reader_reads_is_named_with_what_is_read(tmp_path: Path) -> None:
    says = "neither .*samples.jsonl nor .*parquet nor .*json.* in it"
    with pytest.raises(ValueError, match=says):
        load_samples(tmp_path)
    for name in ("data.csv", "data.jsonl"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=f"{name}: neither .*samples.jsonl nor .*parquet"):
            load_samples(tmp_path / name)


POINTS = [[20, 15], [34, 15]]


@pytest.mark.parametrize(
    "row, says",
    [
        (
            {"image": "images/a.png"},
            'image: no such file: .*images/images/a.png; leave out "images/"',
        ),
        ({"mask": "masks/a.png"}, 'mask: no such file: .*; leave out "masks/"'),
        ({"image": "../secret.png"}, "image: ../secret.png is outside .*images"),
        ({"mask": "/etc/passwd"}, "mask: /etc/passwd is outside"),
        ({"image": 3}, "image: 3 is not a file name"),
        ({"image": "a\0.png"}, "image: "),
        ({"image": None}, "image: is missing"),
        ({"box": [1, 2, 3, 4]}, 'bbox: is missing, but there is "box"; rename'),
        ({"bbox": [0.2, 0.2, 0.6, 0.5]}, "bbox: .* looks like fractions of the 60x40 image"),
        ({"query": " "}, "query: is empty"),
        ({"query": None}, "query: is empty"),
        ({"bbox": [1, 2, 61.5, 30]}, "bbox: .* is outside the 60x40 image"),
        ({"points": [[20, 15], [34, 45]]}, "points: .* is outside the 60x40 image"),
        ({"mask": "narrow.png"}, "mask: is 50x40, its image 60x40"),
        ({"image": "text.png"}, "image: is not an image"),
        ({"bbox": [1, 2, 3, 4], "mask": None}, "bbox: is missing, or points are, and so is a mask"),
        (
            {"image": "small.png", "mask": "small.png"},
            "image: is 20x13: a side must have 14 pixels",
        ),
        ({"image": "long.png", "mask": "long.png"}, "image: of 3000x14 is too long and thin"),
    ],
)
def test_each_usual_mistake_is_named_with_its_fix(folder: Fill, row: dict, says: str) -> None:
    path = folder({}, row)
    noise_image(60, 40).save(path / "secret.png")
    Image.new("L", (50, 40), 255).save(path / "masks/narrow.png")
    (path / "images/text.png").write_text("no picture")
    for name, size in (("small", (20, 13)), ("long", (3000, 14))):
        noise_image(*size).save(path / f"images/{name}.png")
        Image.new("L", size, 255).save(path / f"masks/{name}.png")
    examples = load_samples(path)
    with pytest.raises(BadRow, match=f"samples.jsonl, line 2, {says}"):
        examples[1]
    with pytest.raises(BadRow, match=f"line 2, {says}"):
        examples.check()
    assert examples[0].bbox == BOX_OF_MASK


def test_a_missing_key_is_named_with_those_that_are_there(folder: Fill) -> None:
    path = folder({})
    (path / "samples.jsonl").write_text(
        '{"image": "a.png", "question": "what?", "mask": "a.png"}\n{"query": "what?"}\n{}'
    )
    examples = load_samples(path)
    with pytest.raises(BadRow, match=r"query: is missing \(keys here: image, question, mask\)"):
        examples[0]
    with pytest.raises(BadRow, match=r"line 2, image: is missing \(keys here: query\)"):
        examples[1]
    with pytest.raises(BadRow, match=r"line 3, image: is missing \(keys here: none\)"):
        examples[2]


def test_lines_that_are_no_objects_are_named(folder: Fill) -> None:
    path = folder({})
    (path / "samples.jsonl").write_text('{"image": "a.png"}\n{half\n[1]')
    examples = load_samples(path)
    with pytest.raises(BadRow, match="line 2, text: not JSON"):
        examples[1]
    with pytest.raises(BadRow, match="line 3, text: not a JSON object"):
        examples[2]


def test_a_json_array_is_one_error_and_not_one_per_line(folder: Fill) -> None:
    file = folder({}) / "samples.jsonl"
    file.write_text(f"[\n{file.read_text()}]")
    with pytest.raises(ValueError, match="is a JSON array; one object per line is needed"):
        load_samples(file.parent)


def test_samples_jsonl_itself_may_be_given(folder: Fill) -> None:
    assert load_samples(folder({}, {}) / "samples.jsonl")[0].mask.any()


def test_the_box_of_a_corner_pixel_is_no_fraction(folder: Fill) -> None:
    path = folder({"mask": "corner.png"}, {"mask": "corner.png", "bbox": [0, 0, 1, 1]})
    corner = np.zeros((40, 60))
    corner[0, 0] = 255
    Image.fromarray(np.uint8(corner)).save(path / "masks/corner.png")
    examples = load_samples(path)
    assert examples[0].bbox == (0, 0, 1, 1)
    assert examples[1].bbox == (0, 0, 1, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_of_the_stored_size_turns_with_its_image(folder: Fill, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder({"image": "b.png"}, {"image": "b.png", "mask": "upright.png"})
    # the picture shows its own mask
    picture = Image.fromarray(np.repeat(np.uint8(MASK)[..., None], 3, 2))
    picture.save(path / "images/b.png", exif=exif)
    example = load_samples(path)[0]
    shown = np.asarray(example.image)[..., 0] > 127
    assert np.array_equal(example.mask, shown)
    assert example.bbox == box_from_mask(shown)
    if orientation > 4:  # the sizes tell that a mask is upright already
        Image.fromarray(np.uint8(shown) * 255).save(path / "masks/upright.png")
        assert np.array_equal(load_samples(path)[1].mask, shown)


def read_names(path: Path, split: str) -> tuple[list[dict], list[str]]:
    """A reader as a user would write it: the file's name is the answer."""
    files = sorted(path.glob("*_mask.png")) if split == "train" else []
    rows = []
    for file in files:
        name = file.stem.removesuffix("_mask")
        image = path / "images/a.png"
        rows.append({"query": f"Where is the {name}?", "image": image, "mask": file})
    return rows, ["train"]


def test_a_new_reader_is_a_function_and_its_name(
    folder: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder({})
    (path / "samples.jsonl").unlink()
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 30, 25))
    mask.save(path / "liver_mask.png")
    monkeypatch.setattr(data, "read_names", read_names, raising=False)
    monkeypatch.setitem(readers.READERS, "*_mask.png", "data.read_names")
    example = load_samples(path)[0]
    assert example.bbox == (10, 5, 30, 25)
    assert example.query == "Where is the liver?"
    assert example.id == f"{path.name}-1"  # what the reader does not say
    assert example.think == ""
    assert example.category == ""
    with pytest.raises(ValueError, match="splits there: train"):
        load_samples(path, "test")


# ---------------------------------------------------------------- what trains and what is held out


def test_training_names_a_bad_row_before_it_starts(folder: Fill) -> None:
    path = folder({}, {"mask": "no.png"}, {"split": "test"})
    with pytest.raises(BadRow, match="line 2, mask: no such file"):
        load_splits(path)
    train, tests = load_splits(path, skip_bad_rows=True)
    assert len(train) == 1
    assert len(tests) == 1


def test_a_bad_row_of_the_held_out_split_is_named_before_a_run_starts(folder: Fill) -> None:
    path = folder({}, {"split": "test", "mask": "no.png"}, {"split": "test"})
    with pytest.raises(BadRow, match="line 2, mask: no such file"):
        load_splits(path)


@pytest.mark.parametrize(
    "splits, held_out",
    [
        (["test"], "test"),
        (["val"], "val"),
        (["validation"], "validation"),
        (["val", "test"], "test"),
        (["test", "val"], "test"),
    ],
)
def test_the_test_split_is_held_out_or_else_the_validation_split(
    folder: Fill, splits: list[str], held_out: str
) -> None:
    path = folder({"split": "train"}, *({"split": name, "id": name} for name in splits))
    train, tests = load_splits(path)
    assert len(train) == 1
    assert tests.ids() == [held_out]


@pytest.mark.parametrize("path", ["folder", f"{DEMO}/train.parquet"])
def test_without_a_held_out_split_training_starts_and_says_so(
    folder: Fill, capsys: pytest.CaptureFixture, path: str
) -> None:
    if path == "folder":
        path = str(folder({}, {}))
    train, tests = load_splits(path)
    assert len(train) > 0
    assert isinstance(tests, Examples)
    assert len(tests) == 0
    says = f'{path}: no split "test" or "val" there, so nothing is held out'
    assert says in capsys.readouterr().out


def test_a_limit_takes_held_out_questions_from_all_over_a_sorted_file(folder: Fill) -> None:
    rows = [{"split": "test", "id": str(i), "supercategory": "ABCD"[i // 3]} for i in range(12)]
    path = folder({}, *rows)
    _, tests = load_splits(path, eval_limit=4)
    assert tests.ids() == ["0", "3", "6", "9"]
    assert {example.supercategory for example in tests} == set("ABCD")
    _, tests = load_splits(path, eval_limit=0)
    assert len(tests) == 12


# ---------------------------------------------------------------- the embedded data


def test_the_embedded_data_has_many_kinds_and_wordings_that_training_never_sees() -> None:
    train = load_samples(DEMO, "train")
    test = load_samples(DEMO, "test")
    assert len(train) >= 1000
    assert len(test) >= 300
    training_rows = [row["extra"] | {"query": row["query"]} for row in train.rows]
    held_out_rows = [row["extra"] | {"query": row["query"]} for row in test.rows]
    assert len({row["modality"] for row in training_rows}) >= 6
    assert len({row["supercategory"] for row in training_rows}) >= 7
    assert not any(row["unseen_wording"] for row in training_rows)
    assert 0.3 < np.mean([row["unseen_wording"] for row in held_out_rows]) < 0.7
    for category in {row["category"] for row in training_rows}:
        wordings = set()
        unseen = set()
        for row in training_rows + held_out_rows:
            if row["category"] == category:
                wordings.add(row["wording"])
                if row["unseen_wording"]:
                    unseen.add(row["wording"])
        assert len(wordings) >= 8, category
        assert len(unseen) >= 2, category
    for row in training_rows + held_out_rows:
        assert row["category"].lower() not in row["query"].lower()  # no question names its target


# ---------------------------------------------------------------- python data.py PATH


def test_python_data_py_prints_what_is_there_and_every_bad_row(
    folder: Fill, capsys: pytest.CaptureFixture
) -> None:
    path = folder(
        {"supercategory": "Brain", "category": "tumour"},
        {"mask": "no.png"},
        {"split": "test"},
        {"mask": None, "box": [1, 2, 3, 4]},
        {"id": "a"},
        {"id": "a"},
    )
    assert data.main([str(path)]) == 2
    out = capsys.readouterr().out
    for line in (
        "test: 1 of 1 rows",
        "train: 3 of 5 rows",
        "1 Brain / tumour",
        "60x40 (3)",
        "line 2, mask: no such file",
        'line 4, bbox: is missing, but there is "box"',
        "line 6, id: 'a' is there already",
        f"ids look like {path.name}-1 (the row's id, else the folder's name and the line)",
        "(none): not in the row",
    ):
        assert line in out
    assert data.main([str(path), "--split", "test"]) == 0
    with pytest.raises(ValueError, match="'nope'; the splits there: test, train"):
        data.main([str(path), "--split", "nope"])


def test_a_sheet_shows_pictures_with_their_ids_and_questions(folder: Fill) -> None:
    path = folder({}, {}, {}, {}, {"split": "test"})
    assert data.main([str(path), "--sheet", str(path / "sheet.png")]) == 0
    sheet = np.asarray(Image.open(path / "sheet.png"))
    assert sheet.shape[:2] == (224 + 58, 6 * 224)  # one row of six cells, words below each picture
    for i in range(6):
        picture = sheet[:224, i * 224 : (i + 1) * 224]
        words = sheet[224:, i * 224 : (i + 1) * 224]
        assert picture.any() == (i < 5)
        assert words.any() == (i < 5)


def test_a_split_that_nothing_reads_by_itself_is_named(
    folder: Fill, capsys: pytest.CaptureFixture
) -> None:
    names = ["train", "test", "Train", "validation"]
    path = folder(*({"split": name} for name in names))
    assert data.main([str(path)]) == 0
    out = capsys.readouterr().out
    told = "  a split of this name is only read where it is asked for"
    assert f"Train: 1 of 1 rows can be used\n{told}" in out
    assert out.count(told) == 1


def test_a_broken_line_is_told_once_and_skipping_is_advised_only_where_it_helps(
    folder: Fill, capsys: pytest.CaptureFixture
) -> None:
    path = folder({}, {"split": "test"})
    file = path / "samples.jsonl"
    file.write_text(file.read_text() + '\n{"image": "a.png", "query')
    assert data.main([str(path)]) == 2
    out = capsys.readouterr().out
    assert out.count("line 3, text: not JSON") == 1  # though it may belong to either split
    assert "train: 1 of 2 rows" in out
    assert f"ids look like {path.name}-2 " in out
    assert f"ids look like {path.name}-3 " not in out
    assert "--skip-bad-rows" not in out
    with pytest.raises(BadRow, match="line 3, text: not JSON.*fix the row or use --skip-bad-rows"):
        load_samples(path).check()
    examples = load_samples(path, "test", skip_bad_rows=True)
    assert len(examples) == 1
    assert "--skip-bad-rows" not in examples.skipped[0]


def test_where_every_line_is_broken_the_report_still_comes(
    folder: Fill, capsys: pytest.CaptureFixture
) -> None:
    path = folder({})
    (path / "samples.jsonl").write_text("{half")
    assert data.main([str(path)]) == 2
    assert "train: 0 of 1 rows can be used" in capsys.readouterr().out


def test_an_answer_format_of_ones_own_is_used_by_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(ONE_BOX, prompt='{query} {"place": …}')
    monkeypatch.setattr(data, "MINE", mine, raising=False)
    monkeypatch.setitem(ANSWER_FORMATS, "place", "data.MINE")
    assert load_prompt("place") == mine.prompt
    assert answer_format_of(mine.prompt) is mine
