"""Readers, frames, masks and images: hand numbers, and bad input that must be named."""

import io
import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data
from data import (
    PROMPTS,
    BadRow,
    Frame,
    box_from_mask,
    fill_prompt,
    keypoints_from_mask,
    load_image,
    load_mask,
    load_prompt,
    load_samples,
    model_size,
    target_text,
    to_image,
    to_model,
)
from rewards import parse_answer, reward_terms, total_reward, write_answer

# ---------------------------------------------------------------- frames


@given(st.integers(14, 3000), st.integers(14, 3000))
@settings(max_examples=300, deadline=None)
def test_aspect_gives_multiples_of_28_within_the_pixel_limits_and_nearly_the_ratio(width, height):
    if max(width, height) > 200 * min(width, height):
        return
    w, h = model_size((width, height), min_pixels=56 * 56, max_pixels=840 * 840)
    assert w % 28 == h % 28 == 0
    assert 56 * 56 <= w * h and (w * h <= 840 * 840 or min(w, h) == 28)
    if min(w, h) >= 280:
        assert abs(math.log(w / h * height / width)) < 0.15


def test_sizes_by_hand():
    assert model_size((512, 512)) == (504, 504)  # 18.3 -> 18 tokens of 28 pixels
    assert model_size((112, 112)) == (112, 112)
    assert model_size((1680, 1680)) == (
        840,
        840,
    )  # too many pixels: floor(60 / 2) = 30 tokens a side
    assert model_size((30, 30)) == (56, 56)  # too few: at least 56 x 56
    assert model_size((300, 500), "square:840") == (840, 840)


@pytest.mark.parametrize("resize", ["square", "square:0", "square:100", "square:-28", "fit", ""])
def test_an_unknown_resize_is_refused(resize):
    with pytest.raises(ValueError, match="--resize"):
        model_size((100, 100), resize)


def test_an_absurdly_thin_image_is_refused():
    with pytest.raises(ValueError, match="aspect ratio"):
        model_size((5000, 14))


def test_to_model_scales_x_and_y_by_their_own_factors_and_to_image_undoes_it():
    frame = Frame(image=(100, 50), model=(200, 200))
    assert to_model((10, 10, 20, 30), frame) == (20, 40, 40, 120)
    assert to_model(((1, 2), (3, 4)), frame) == ((2.5, 9.5), (6.5, 17.5))  # (1 + 0.5) * 2 - 0.5
    assert to_image(to_model((7, 9, 31, 44), frame), frame) == pytest.approx((7, 9, 31, 44))


# ---------------------------------------------------------------- masks


def test_box_of_a_mask_is_tight_to_the_far_edges():
    mask = np.zeros((20, 30), bool)
    mask[5:10, 8:25] = True
    assert box_from_mask(mask) == (8, 5, 25, 10)
    mask[:] = False
    mask[3, 4] = True
    assert box_from_mask(mask) == (4, 3, 5, 4)  # one pixel still has an area


def slow_keypoints(mask):
    """The definition, pixel by pixel."""
    H, W = mask.shape
    inside = [(x, y) for y in range(H) for x in range(W) if mask[y, x]]
    outside = [
        (x, y)
        for y in range(-1, H + 1)
        for x in range(-1, W + 1)
        if not (0 <= x < W and 0 <= y < H and mask[y, x])
    ]
    depth = {p: min(math.dist(p, q) for q in outside) for p in inside}
    first = max(inside, key=lambda p: (depth[p], -p[1], -p[0]))
    away = {p: math.dist(p, first) for p in inside}
    far = [p for p in inside if away[p] > np.median(list(away.values()))]
    return first, max(far, key=lambda p: (depth[p], -p[1], -p[0])) if far else first


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_keypoints_are_the_deepest_pixel_and_the_deepest_far_one(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 11)) < rng.uniform(0.1, 1)
    mask[rng.integers(9), rng.integers(11)] = True
    assert keypoints_from_mask(mask) == slow_keypoints(mask)


def test_keypoints_of_one_pixel_coincide_and_of_nothing_are_an_error():
    mask = np.zeros((5, 5), bool)
    for function in (box_from_mask, keypoints_from_mask):
        with pytest.raises(ValueError, match="empty"):
            function(mask)
    mask[2, 3] = True
    assert keypoints_from_mask(mask) == ((3, 2), (3, 2))


# ---------------------------------------------------------------- images


def test_grey_rgba_palette_16_bit_and_rotated_images_come_out_right(tmp_path):
    ramp = np.arange(40 * 60).reshape(40, 60)
    grey = np.uint8(ramp * 255 / ramp.max())

    def loaded(image, name, **options):
        image.save(tmp_path / name, **options)
        return np.asarray(load_image(tmp_path / name)).astype(int)

    three = np.repeat(grey[..., None], 3, 2).astype(int)
    assert np.array_equal(loaded(Image.fromarray(grey), "grey.png"), three)
    deep = loaded(
        Image.fromarray(np.uint16(1000 + ramp * 20)), "deep.png"
    )  # 16 bits: stretched, not clipped
    assert abs(deep - three).max() <= 1
    assert abs(loaded(Image.fromarray(np.float32(ramp) - 900), "float.tiff") - three).max() <= 1
    colour = Image.fromarray(np.uint8(np.stack([grey, grey[::-1], grey[:, ::-1]], 2)))
    palette = colour.quantize(64)
    assert np.array_equal(
        loaded(palette, "palette.png"), np.asarray(palette.convert("RGB")).astype(int)
    )
    rgba = colour.convert("RGBA")
    rgba.putalpha(Image.fromarray(np.uint8(np.where(ramp % 60 < 30, 255, 0))))
    seen = loaded(rgba, "rgba.png")
    assert np.array_equal(seen[:, :30], np.asarray(colour)[:, :30]) and not seen[:, 30:].any()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    turned = loaded(colour, "turned.png", exif=exif)
    assert np.array_equal(turned, np.asarray(colour.rotate(-90, expand=True)).astype(int))


@pytest.mark.parametrize(
    "content, says",
    [
        (b"hello", "not an image"),
        (b"", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "image"),
    ],
)
def test_what_is_no_image_is_one_clear_line(tmp_path, content, says):
    (tmp_path / "x.png").write_bytes(content)
    for source in (tmp_path / "x.png", content):
        with pytest.raises(ValueError, match=says) as error:
            load_image(source)
        assert "\n" not in str(error.value)


def test_missing_directory_tiny_truncated_and_enormous_images_are_refused(tmp_path):
    for path, says in ((tmp_path / "no.png", "does not exist"), (tmp_path, "directory")):
        with pytest.raises(ValueError, match=says):
            load_image(path)
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "png")
    with pytest.raises(ValueError, match="1x1"):
        load_image(buffer.getvalue())
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(buffer, "png")
    with pytest.raises(ValueError, match="broken"):
        load_image(buffer.getvalue()[:5000])
    buffer = io.BytesIO()
    Image.new("1", (12_000, 9_000)).save(buffer, "png")
    with pytest.raises(ValueError, match="pixels"):
        load_image(buffer.getvalue())


# ---------------------------------------------------------------- prompts and targets


def test_prompt_files_need_a_place_for_the_question_and_braces_are_safe(tmp_path):
    (tmp_path / "good.txt").write_text('Say {"a": 1}: {query}')
    (tmp_path / "bad.txt").write_text("Say it")
    assert (
        fill_prompt(load_prompt(str(tmp_path / "good.txt")), "what {x}?")
        == 'Say {"a": 1}: what {x}?'
    )
    with pytest.raises(ValueError, match="bad.txt.*query"):
        load_prompt(str(tmp_path / "bad.txt"))
    with pytest.raises(ValueError, match="neither"):
        load_prompt("nonsense")
    assert load_prompt("direct") == PROMPTS["direct"]


def test_the_supervised_target_earns_nearly_everything():
    for split in ("train", "test"):
        samples = load_samples("demo/data", split)
        for i in range(0, len(samples), 60):
            sample = samples[i]
            frame = Frame(sample.image.size, model_size(sample.image.size))
            text = target_text(sample, frame)
            assert parse_answer(text).problem == "" and sample.think in text
            terms = reward_terms(text, to_model(sample.bbox, frame), to_model(sample.points, frame))
            assert (
                total_reward(terms, "soft") > 3.5
            )  # whole pixels cost a little on the smallest targets
            assert "<think>" not in target_text(sample, frame, with_think=False)


# ---------------------------------------------------------------- readers


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(np.uint8(array)).save(buffer, "png")
    return buffer.getvalue()


def umrg_row(i=0, **changes):
    mask = np.zeros((40, 60))
    mask[10:20, 15:40] = 255
    truth = {"bbox_2d": [15, 10, 40, 20], "point_2d": [[20, 15], [34, 15]]}
    row = {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "images": [{"bytes": png(np.full((40, 60, 3), i)), "path": f"{i}.png"}],
        "masks": [{"bytes": png(mask), "path": f"{i}_mask.png"}],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": {"id": f"s{i}", "supercategory": "Brain", "category": "x", "index": i},
    }
    return row | changes


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_parquet_rows_come_out_in_order_across_files_and_row_groups(tmp_path):
    write(
        tmp_path / "train-00000-of-00002.parquet", [umrg_row(i) for i in range(7)], row_group_size=3
    )
    write(tmp_path / "train-00001-of-00002.parquet", [umrg_row(i) for i in range(7, 9)])
    write(tmp_path / "test.parquet", [umrg_row(99)])
    samples = load_samples(tmp_path, "train")
    assert [s.id for s in samples] == [f"s{i}" for i in range(9)]
    assert [s.image.getpixel((0, 0))[0] for s in samples] == list(range(9))
    s = samples[4]
    assert (s.query, s.bbox, s.points, s.supercategory) == (
        "question 4",
        (15, 10, 40, 20),
        ((20, 15), (34, 15)),
        "Brain",
    )
    assert s.mask.shape == (40, 60) and s.mask.sum() == 250
    assert [s.id for s in samples[2:4]] == ["s2", "s3"]
    assert load_samples(tmp_path, "test")[0].id == "s99"
    assert load_samples(tmp_path / "test.parquet")[0].id == "s99"


def truth(**changes):
    return {
        "reward_model": {
            "ground_truth": json.dumps(
                {"bbox_2d": [15, 10, 40, 20], "point_2d": [[20, 15], [34, 15]]} | changes
            )
        }
    }


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"images": [{"bytes": b"junk", "path": "x"}]}, "image"),
        ({"images": [{"bytes": None, "path": "x"}]}, "image: has no bytes"),
        ({"images": []}, "image: has no bytes"),
        ({"prompt": [{"role": "user", "content": "  "}]}, "query"),
        ({"masks": [{"bytes": png(np.zeros((40, 60))), "path": "x"}]}, "mask: is empty"),
        ({"masks": [{"bytes": png(np.full((40, 50), 255)), "path": "x"}]}, "mask: is 50x40"),
        ({"masks": [{"bytes": b"junk", "path": "x"}]}, "mask"),
        ({"reward_model": {"ground_truth": "{"}}, "reward_model.ground_truth"),
        (truth(bbox_2d=[15, 10, 90, 20]), "bbox.*outside the 60x40 image"),
        (truth(bbox_2d=[40, 10, 15, 20]), "bbox.*x1 < x2"),
        (truth(bbox_2d=[1, 2, 3]), "bbox.*four finite numbers"),
        (truth(point_2d=[[20, 15], [99, 15]]), "points.*outside"),
        (truth(point_2d=[[20, 15]]), "points: .* is not 2 pairs.*KEY_POINTS in rewards.py"),
    ],
)
def test_a_bad_row_is_named_with_file_row_and_key_or_skipped_and_counted(tmp_path, changes, key):
    rows = [umrg_row(0), umrg_row(1), umrg_row(2)]
    rows[1] |= changes
    path = write(tmp_path / "train.parquet", rows)
    samples = load_samples(path)
    assert samples[0].id == "s0" and samples[2].id == "s2"
    with pytest.raises(BadRow, match=rf"train\.parquet, row 1, {key}"):
        samples[1]
    good = load_samples(path, skip_bad_rows=True)
    assert [s.id for s in good] == ["s0", "s2"] and len(good.skipped) == 1


def test_a_missing_column_and_a_broken_file_and_nothing_at_all_are_named(tmp_path):
    row = umrg_row()
    del row["images"]
    with pytest.raises(ValueError, match="train.parquet: column images is missing"):
        load_samples(write(tmp_path / "train.parquet", [row]))
    (tmp_path / "test.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match="test.parquet: not a readable parquet"):
        load_samples(tmp_path, "test")
    with pytest.raises(ValueError, match="split 'other'; the splits there: test, train "):
        load_samples(tmp_path, "other")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither samples.jsonl nor .*parquet nor .*json in it"):
        load_samples(tmp_path / "empty")
    for name in ("data.csv", "data.jsonl"):
        (tmp_path / name).write_text("x")
        with pytest.raises(ValueError, match=f"{name}: neither samples.jsonl nor .*parquet"):
            load_samples(tmp_path / name)
    with pytest.raises(ValueError, match="no such"):
        load_samples(tmp_path / "nowhere")
    bad = write(tmp_path / "all_bad.parquet", [umrg_row(images=[])])
    with pytest.raises(ValueError, match="no usable sample"):
        load_samples(bad, skip_bad_rows=True)


def test_a_folder_takes_box_and_points_from_the_mask_where_they_are_not_given(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    mask = np.zeros((40, 60))
    mask[10:20, 15:40] = 255
    (tmp_path / "images/a.png").write_bytes(png(np.zeros((40, 60, 3))))
    (tmp_path / "masks/a.png").write_bytes(png(mask))
    rows = [
        {"image": "a.png", "query": "what?", "mask": "a.png"},
        {
            "image": "a.png",
            "query": "where?",
            "bbox": [1, 2, 30, 20],
            "points": [[5, 5], [9, 9]],
            "split": "test",
        },
        {"image": "a.png", "query": "which?"},
        {"image": "b.png", "query": "who?", "mask": "a.png"},
        {"query": "x"},
        {},
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    samples = load_samples(tmp_path)
    assert samples[0].bbox == (15, 10, 40, 20) and samples[0].points == keypoints_from_mask(
        mask > 0
    )
    assert load_samples(tmp_path, "test")[0].bbox == (1, 2, 30, 20)
    for i, says in (
        (1, "line 3, bbox: is missing"),
        (2, "line 4, image: no such file"),
        (3, r"line 5, image: is missing \(keys here: query\)"),
        (4, "line 6, image: is missing"),
    ):
        with pytest.raises(BadRow, match=says):
            samples[i]
    (tmp_path / "samples.jsonl").write_text('{"image": "a.png"}\n{half\n[1]')
    for i, says in ((1, "line 2, text: not JSON"), (2, "line 3, text: not a JSON object")):
        with pytest.raises(BadRow, match=says):
            load_samples(tmp_path)[i]


def test_the_embedded_data_is_what_the_readme_says():
    train, test = load_samples("demo/data", "train"), load_samples("demo/data", "test")
    assert len(train) >= 1500 and len(test) >= 300
    rows = {
        split: [s.extra | {"query": s.query} for s in samples]
        for split, samples in (("train", train), ("test", test))
    }
    assert len({row["modality"] for row in rows["train"]}) >= 6
    assert len({row["supercategory"] for row in rows["train"]}) >= 7
    assert not any(row["unseen_wording"] for row in rows["train"])
    assert 0.3 < np.mean([row["unseen_wording"] for row in rows["test"]]) < 0.7
    for category in {row["category"] for row in rows["train"]}:
        wordings = {
            (row["wording"])
            for split in rows.values()
            for row in split
            if row["category"] == category
        }
        unseen = {
            row["wording"]
            for row in rows["test"]
            if row["category"] == category and row["unseen_wording"]
        }
        assert len(wordings) >= 8 and len(unseen) >= 2, category
    for row in rows["train"] + rows["test"]:
        assert row["category"].lower() not in row["query"].lower()


def test_only_keeps_the_super_categories_asked_for_and_refuses_what_matches_none():
    samples = load_samples("demo/data", "test")
    some = samples.only("Brain|Lung")
    assert {s.supercategory for s in some} == {"Brain", "Lung"}
    assert len(some) + len(samples.only("^(?!Brain|Lung)")) == len(samples)
    for pattern in ("Nowhere", "*"):
        with pytest.raises(ValueError, match="--only"):
            samples.only(pattern)


# ---------------------------------------------------------------- frames, on real sizes


@given(st.integers(14, 3000), st.integers(14, 3000))
@settings(max_examples=200, deadline=None)
def test_sizes_are_those_of_qwens_own_resize(width, height):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    if max(width, height) <= 200 * min(width, height):
        h, w = smart_resize(height, width, 28, 56 * 56, 840 * 840)
        assert model_size((width, height)) == (w, h)


@pytest.mark.parametrize(
    "size, expected",
    [
        ((1024, 1024), (812, 812)),
        ((1080, 1080), (812, 812)),
        ((2048, 2048), (812, 812)),
        ((1500, 1500), (840, 840)),
        ((14, 884), (28, 448)),
    ],
)
def test_sizes_at_the_boundary_where_rounding_decides(size, expected):
    assert model_size(size) == expected


def test_a_square_beyond_the_limit_is_refused_with_both_numbers():
    assert model_size((300, 500), "square:224", max_pixels=224 * 224) == (224, 224)
    with pytest.raises(ValueError, match="square:840: 705,600 pixels are over 50,176"):
        model_size((300, 500), "square:840", max_pixels=224 * 224)


def test_the_point_of_a_one_pixel_mask_stays_in_the_middle_of_its_box():
    mask = np.zeros((256, 256), bool)
    mask[100, 30] = True
    for side in (56, 252, 840):
        frame = Frame((256, 256), (side, side))
        x1, y1, x2, y2 = to_model(box_from_mask(mask), frame)
        (x, y), _ = to_model(keypoints_from_mask(mask), frame)
        assert (x + 0.5, y + 0.5) == pytest.approx(
            ((x1 + x2) / 2, (y1 + y2) / 2)
        )  # the pixel's centre
        assert to_image(to_model((30.0, 100.0), frame), frame) == pytest.approx((30, 100))


def test_targets_stay_inside_the_frame():
    image = Image.new("RGB", (1000, 1000))
    frame = Frame((1000, 1000), (56, 56))
    for bbox, points in (
        ((-1, -1, 1001, 1001), ((0, 0), (1001, 1001))),
        ((999.5, 999.5, 1000, 1000), ((999, 999),) * 2),
    ):
        answer = parse_answer(target_text(data.Sample("a", image, "?", bbox, points), frame))
        assert (
            0 <= answer.bbox[0] < answer.bbox[2] <= 56
            and 0 <= answer.bbox[1] < answer.bbox[3] <= 56
        )
        assert all(0 <= v <= 55 for point in answer.points for v in point)


def test_three_key_points_come_from_the_mask_and_stored_pairs_are_refused(monkeypatch, tmp_path):
    import rewards

    monkeypatch.setattr(data, "KEY_POINTS", 3)
    monkeypatch.setattr(rewards, "KEYS", ("bbox", "points_1", "points_2", "points_3"))
    mask = np.zeros((9, 30), bool)
    mask[2:7, 2:28] = True
    points = keypoints_from_mask(mask)
    assert len(set(points)) == 3 and all(mask[int(y), int(x)] for x, y in points)
    path = write(tmp_path / "train.parquet", [umrg_row(), umrg_row(1, **truth(point_2d=None))])
    with pytest.raises(BadRow, match="points: .* is not 3 pairs.*KEY_POINTS in rewards.py"):
        load_samples(path)[0]
    sample = load_samples(path)[1]
    answer = parse_answer(target_text(sample, Frame(sample.image.size, sample.image.size)))
    assert answer.points == sample.points and len(answer.points) == 3


def test_the_prompts_show_the_answer_that_the_parser_reads():
    for template in (PROMPTS["reasoning"], PROMPTS["direct"]):
        assert (
            '<answer>{"bbox": [x1, y1, x2, y2], "points_1": [x, y], "points_2": [x, y]}</answer>'
            in template
        )
        filled = template.replace("x1, y1, x2, y2", "1, 2, 3, 4").replace("x, y", "5, 6")
        assert parse_answer(filled).problem == ""


# ---------------------------------------------------------------- strangers' files


def test_an_eps_named_png_never_starts_ghostscript(tmp_path, monkeypatch):
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\nshowpage\n%%EOF\n"
    (tmp_path / "x.png").write_bytes(eps)
    for load in (load_image, load_mask):
        for source in (tmp_path / "x.png", eps):
            with pytest.raises(ValueError, match="formats PNG, JPEG"):
                load(source)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_image_with_nan_or_infinity_is_an_error(tmp_path, bad):
    values = np.random.default_rng(0).random((20, 20), np.float32)
    values[3, 4] = bad
    Image.fromarray(values).save(tmp_path / "x.tiff")
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_image(tmp_path / "x.tiff")


@pytest.fixture
def folder(tmp_path):
    """A function that writes rows as a data folder with an image a.png and a mask a.png."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    noise_image(60, 40).save(tmp_path / "images/a.png")
    Image.fromarray(np.uint8(MASK)).save(tmp_path / "masks/a.png")

    def fill(*rows):
        rows = [{"image": "a.png", "query": "what?", "mask": "a.png"} | row for row in rows]
        (tmp_path / "samples.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
        return tmp_path

    return fill


MASK = np.zeros((40, 60))
MASK[10:20, 15:40] = 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_of_the_stored_size_turns_with_its_image(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(
        np.repeat(np.uint8(MASK)[..., None], 3, 2)
    )  # the mask itself as the image
    path = folder({"image": "b.png"}, {"image": "b.png", "mask": "upright.png"})
    picture.save(path / "images/b.png", exif=exif)
    sample = load_samples(path)[0]
    assert np.array_equal(sample.mask, np.asarray(sample.image)[..., 0] > 127)
    assert sample.bbox == box_from_mask(np.asarray(sample.image)[..., 0] > 127)
    if orientation > 4:  # sizes tell: already upright
        Image.fromarray(np.uint8(sample.mask) * 255).save(path / "masks/upright.png")
        assert np.array_equal(load_samples(path)[1].mask, sample.mask)


def test_masks_of_0_and_1_are_masks_and_label_maps_are_named(tmp_path):
    for high in (1, 7, 255):
        Image.fromarray(np.uint8(MASK / 255 * high)).save(tmp_path / "m.png")
        assert np.array_equal(load_mask(tmp_path / "m.png"), MASK > 0)
    Image.fromarray(MASK > 0).save(tmp_path / "m.png")  # one bit per pixel
    assert load_mask(tmp_path / "m.png").sum() == 250
    labels = np.uint8(MASK > 0)
    labels[12, 20] = 2
    Image.fromarray(labels).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match="labels 1, 2: one mask per row is needed"):
        load_mask(tmp_path / "m.png")
    soft = np.uint8(np.clip(MASK, 0, 250))
    for edge, area in ((100, 225), (127, 225), (128, 250)):  # a smoothed edge is no label
        soft[10, 15:40] = edge
        Image.fromarray(soft).save(tmp_path / "m.png")
        assert load_mask(tmp_path / "m.png").sum() == area


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
        ({"box": [1, 2, 3, 4]}, 'bbox: is missing, but there is "box"; rename'),
        (
            {"bbox": [0.2, 0.2, 0.6, 0.5], "points": [[20, 15], [34, 15]]},
            "bbox: .* looks like fractions of the 60x40 image",
        ),
        ({"query": " "}, "query: is empty"),
        ({"query": None}, "query: is empty"),
        (
            {"bbox": [1, 2, 61.5, 30], "points": [[20, 15], [34, 15]]},
            "bbox: .* is outside the 60x40 image",
        ),
        (
            {"bbox": [1, 2, 30, 30], "points": [[20, 15], [34, 45]]},
            "points: .* is outside the 60x40 image",
        ),
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
def test_each_usual_mistake_is_named_with_its_fix(folder, row, says):
    path = folder({}, row)
    noise_image(60, 40).save(path / "secret.png")
    Image.new("L", (50, 40), 255).save(path / "masks/narrow.png")
    (path / "images/text.png").write_text("no picture")
    for name, size in (("small", (20, 13)), ("long", (3000, 14))):
        noise_image(*size).save(path / f"images/{name}.png")
        Image.new("L", size, 255).save(path / f"masks/{name}.png")
    samples = load_samples(path)
    with pytest.raises(BadRow, match=f"samples.jsonl, line 2, {says}"):
        samples[1]
    with pytest.raises(BadRow, match=f"line 2, {says}"):
        samples.check()
    assert samples[0].bbox == (15, 10, 40, 20)


def test_a_missing_key_is_named_with_those_that_are_there(folder):
    path = folder({})
    (path / "samples.jsonl").write_text('{"image": "a.png", "question": "what?", "mask": "a.png"}')
    with pytest.raises(BadRow, match=r"query: is missing \(keys here: image, question, mask\)"):
        load_samples(path)[0]


def test_the_check_before_a_run_decodes_nothing_where_headers_and_box_fit_and_is_no_stricter(
    folder, monkeypatch
):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder(
        {},
        {"bbox": [1, 2, 60, 40]},
        {"image": "turned.png", "mask": "turned.png", "bbox": [0, 0, 40, 60]},
    )
    noise_image(60, 40).save(path / "images/turned.png", exif=exif)
    Image.new("L", (40, 60), 255).save(path / "masks/turned.png")  # already upright
    load_samples(path).check()
    monkeypatch.setattr(data, "load_image", lambda source: pytest.fail("decoded"))
    load_samples(path)[:2].check()


def test_a_corner_pixel_is_no_fraction(folder):
    path = folder({"mask": "corner.png"})
    corner = np.zeros((40, 60))
    corner[0, 0] = 255
    Image.fromarray(np.uint8(corner)).save(path / "masks/corner.png")
    assert load_samples(path)[0].bbox == (0, 0, 1, 1)


def test_a_missing_split_names_those_that_are_there(folder):
    path = folder({"split": "training"}, {"split": "test"})
    with pytest.raises(
        ValueError, match="split 'train'; the splits there: test, training .*train and test"
    ):
        load_samples(path)
    assert len(load_samples(path, "test")) == 1


def test_samples_jsonl_itself_may_be_given(folder):
    assert load_samples(folder({}, {}) / "samples.jsonl")[0].mask.any()


def test_repeated_ids_are_made_unique_and_named(folder, capsys):
    samples = load_samples(folder({"id": "x"}, {"id": "y"}, {"id": "x"}, {"id": "x"}))
    assert [s.id for s in samples] == ["x", "y", "x#2", "x#3"]
    assert "line 3, id: 'x' is there already; called x#2" in capsys.readouterr().out


def test_images_are_read_only_when_a_sample_is_asked_for(tmp_path, monkeypatch):
    path = write(tmp_path / "train.parquet", [umrg_row(i) for i in range(4)], row_group_size=2)
    monkeypatch.setattr(data, "load_image", lambda source: pytest.fail("decoded"))
    samples = load_samples(path)
    samples.check()
    assert len(samples.only("Brain")) == 4 and len(samples[1:3]) == 2


def test_python_data_py_prints_what_is_there_and_every_bad_row(folder, capsys):
    from extras.data_report import main

    path = folder(
        {"supercategory": "Brain", "category": "tumour"},
        {"mask": "no.png"},
        {"split": "test"},
        {"box": [1, 2, 3, 4]},
        {"id": "a"},
        {"id": "a"},
    )
    assert main([str(path), "--sheet", str(path / "sheet.png")]) == 2
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
    sheet = np.asarray(Image.open(path / "sheet.png"))
    assert (
        sheet.shape[:2] == (224 + 58, 6 * 224)
        and sheet[224:, :224].any()
        and not sheet[224:, -224:].any()
    )  # id, query
    assert main([str(path), "--split", "test"]) == 0
    with pytest.raises(
        ValueError, match="no sample in split 'nope'; the splits there: test, train"
    ):
        main([str(path), "--split", "nope"])


def test_a_split_that_nothing_reads_by_itself_is_named(folder, capsys):
    from extras.data_report import main

    assert (
        main([str(folder({}, {"split": "test"}, {"split": "Train"}, {"split": "validation"}))]) == 0
    )
    out = capsys.readouterr().out
    assert "Train: 1 of 1 rows can be used\n  nothing reads a split of this name" in out
    assert out.count("nothing reads a split") == 1


def test_a_json_array_is_one_error_and_not_one_per_line(folder):
    path = folder({})
    (path / "samples.jsonl").write_text(f"[\n{(path / 'samples.jsonl').read_text()}]")
    with pytest.raises(
        ValueError, match="samples.jsonl: is a JSON array; one object per line is needed"
    ):
        load_samples(path)


def test_a_broken_line_is_a_bad_row_of_data_py_once_and_skipping_is_advised_only_where_it_helps(
    folder, capsys
):
    from extras.data_report import main

    path = folder({}, {"split": "test"})
    (path / "samples.jsonl").write_text(
        (path / "samples.jsonl").read_text() + '\n{"image": "a.png", "query'
    )
    assert main([str(path)]) == 2
    out = capsys.readouterr().out
    assert out.count(f"ids look like {path.name}-2 ") == 1  # not the broken line's
    assert (
        out.count("line 3, text: not JSON") == 1
        and "train: 1 of 2 rows" in out
        and "--skip-bad-rows" not in out
    )
    with pytest.raises(BadRow, match="line 3, text: not JSON.*fix the row or use --skip-bad-rows"):
        load_samples(path).check()
    samples = load_samples(path, "test", skip_bad_rows=True)
    assert len(samples) == 1 and "--skip-bad-rows" not in samples.skipped[0]
    (path / "samples.jsonl").write_text("{half")
    assert main([str(path)]) == 2
    with pytest.raises(ValueError, match="no usable sample .* line 1, text: not JSON") as error:
        load_samples(path, skip_bad_rows=True)
    assert "--skip-bad-rows" not in str(error.value)


def test_in_the_model_frame_no_held_out_question_pays_for_pushing_its_points_apart():
    for sample in load_samples("demo/data", "test")[::4]:
        frame = Frame(sample.image.size, model_size(sample.image.size))
        bbox, points = to_model(sample.bbox, frame), to_model(sample.points, frame)

        def earned(pair):
            text = "<think>t</think>" + write_answer(bbox, pair)
            return total_reward(reward_terms(text, bbox, points, frame=frame.model), "soft")

        (x1, y1), (x2, y2) = points
        distance = math.dist(*points)
        assert earned(points) == pytest.approx(4)
        for push in (0.2, 1, 10.01 - distance):
            dx, dy = (x2 - x1) / distance * push / 2, (y2 - y1) / distance * push / 2
            assert earned(((x1 - dx, y1 - dy), (x2 + dx, y2 + dy))) <= earned(points)


def test_training_names_a_bad_row_before_it_starts(folder):
    from types import SimpleNamespace

    from runtime.run import load_splits

    path = folder({}, {"mask": "no.png"}, {"split": "test"})
    flags = SimpleNamespace(
        data=str(path), test_data=None, only="", skip_bad_rows=False, eval_every=1, eval_limit=0
    )
    with pytest.raises(BadRow, match="line 2, mask: no such file"):
        load_splits(flags)
    flags.skip_bad_rows = True
    train, test = load_splits(flags)
    assert (len(train), len(test)) == (1, 1)


@pytest.mark.parametrize("data", ["folder", "demo/data/train.parquet"])
def test_without_a_test_split_training_starts_and_says_that_nothing_is_held_out(
    folder, capsys, data
):
    from types import SimpleNamespace

    from runtime.run import load_splits

    path = str(folder({}, {})) if data == "folder" else data
    flags = SimpleNamespace(
        data=path, test_data=None, only="", skip_bad_rows=False, eval_every=1, eval_limit=0
    )
    train, test = load_splits(flags)
    assert len(train) and not test
    assert (
        f'{path}: no split "test" there, so nothing is held out; --test-data PATH'
        in capsys.readouterr().out
    )


def read_names(path, split):
    """A reader as a user would write it: the file's name is the answer, the mask lies beside the image."""
    files = sorted(path.glob("*_mask.png")) if split == "train" else []
    return [
        {
            "query": f"Where is the {file.stem.removesuffix('_mask')}?",
            "image": path / "images/a.png",
            "mask": file,
        }
        for file in files
    ], ["train"]


def test_a_new_reader_is_a_function_and_its_name(folder, monkeypatch):
    from runtime import readers

    path = folder({})
    (path / "samples.jsonl").unlink()
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 30, 25))
    mask.save(path / "liver_mask.png")
    monkeypatch.setitem(readers.READERS, "*_mask.png", read_names)
    sample = load_samples(path)[0]
    assert sample.bbox == (10, 5, 30, 25) and sample.query == "Where is the liver?"
    assert (
        sample.id == f"{path.name}-1" and sample.think == sample.category == ""
    )  # what it does not say
    with pytest.raises(ValueError, match="splits there: train"):
        load_samples(path, "test")


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_info": "x"},
        {"extra_info": None},
        {"prompt": "text"},
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
        truth(bbox_2d="x"),
        truth(bbox_2d={"a": 1}),
        truth(point_2d=[1, 2]),
    ],
)
def test_columns_of_other_types_are_bad_rows_or_do_not_matter(tmp_path, changes):
    samples = load_samples(write(tmp_path / "train.parquet", [umrg_row() | changes]))
    try:
        assert samples[0].query == "question 0"
    except BadRow as error:
        assert "train.parquet, row 0" in str(error) and len(str(error).splitlines()) == 1
