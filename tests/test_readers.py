"""From a path to rows, and which can be used: lines, links, null, parquet, boxes, traces."""

import errno
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_image
from PIL import Image

from runtime import files, readers, registry
from runtime.files import read_jsonl, read_text, to_disk
from runtime.images import SCAN_READERS
from runtime.readers import (
    READERS,
    BadRow,
    check_row,
    decode_row,
    number_repeated_ids,
    read_rows,
    usable_rows,
)

MASK = np.zeros((40, 60), np.uint8)
MASK[10:20, 15:40] = 255


def encoded(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A function that writes rows or a text as samples.jsonl, beside an image and a mask a.png."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    noise_image(60, 40).save(tmp_path / "images/a.png")
    Image.fromarray(MASK).save(tmp_path / "masks/a.png")

    def fill(*rows, text=None):
        rows = [{"image": "a.png", "query": "what?", "mask": "a.png"} | row for row in rows]
        if text is None:
            text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (tmp_path / "samples.jsonl").write_bytes(text.encode("utf-8", "surrogatepass"))
        return tmp_path

    return fill


def rows_of(path, split="train"):
    return read_rows(path, split)[0]


def problem(row):
    """What is wrong with a row, "" if nothing is."""
    try:
        decode_row(row)
    except BadRow as error:
        assert str(error).startswith(row["where"]) and len(str(error).splitlines()) == 1
        return str(error)
    return ""


# ---------------------------------------------------------------- registries


def test_a_registry_names_functions_that_are_there():
    for entry in [*READERS.values(), *SCAN_READERS.values()]:
        assert callable(registry.find(entry)), entry
    assert readers.SCAN_READERS is SCAN_READERS


@pytest.mark.parametrize(
    "entry, says",
    [
        ("extras.nothing.read", "extras.nothing.read: there is no module extras.nothing here"),
        ("nowhere.at.all.read", "there is no module nowhere"),
        ("extras.coco.nothing", "the module extras.coco has no nothing"),
    ],
)
def test_what_a_registry_cannot_find_is_one_line(entry, says):
    with pytest.raises(ValueError, match=says):
        registry.find(entry)


def test_a_package_that_a_module_of_a_registry_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "a_reader.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="needs the package a_package_that_is_not_there"):
        registry.find("a_reader.read")


def test_a_deleted_reader_costs_its_own_files_only(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "extras.coco", None)
    assert len(rows_of(folder({}))) == 1
    with pytest.raises(ValueError, match="extras.coco.read: there is no module extras.coco here"):
        (folder({}) / "train.json").write_text("{}")
        rows_of(folder({}) / "train.json")


# ---------------------------------------------------------------- samples.jsonl: lines, null, marks


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_line_ends_at_a_newline_and_nowhere_else(folder, inside):
    lines = ['{"image": "a.png", "mask": "a.png", "query": "one?two?", "id": "1"}']
    lines = [lines[0].replace("?", inside, 1)]
    if (
        inside < " "
    ):  # JSON has these as escapes only, and as white space between rows they are an error
        lines = [lines[0].replace(inside, f"\\u{ord(inside):04x}")]
    lines.append('{"image": "a.png", "mask": "a.png", "query": "three?", "id": "2"}')
    rows = rows_of(folder(text="\n".join(lines) + "\n"))
    assert [(row["id"], row["query"]) for row in rows] == [
        ("1", f"one{inside}two?"),
        ("2", "three?"),
    ]
    assert rows[1]["where"].endswith("line 2")


def test_a_byte_order_mark_is_no_text(folder, tmp_path):
    path = folder(text='\ufeff{"image": "a.png", "mask": "a.png", "query": "what?"}\r\n')
    assert [row["problem"] for row in rows_of(path)] == [""]
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_text(tmp_path / "x.txt") == "one\ntwo"


def test_logs_are_cut_into_lines_as_they_were_written(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"text": "a\u2028b"}\n{"text": "c\x85"}\n{"text": "torn', encoding="utf-8")
    assert read_jsonl(log) == [{"text": "a\u2028b"}, {"text": "c\x85"}]
    log.write_text("", encoding="utf-8")
    assert read_jsonl(log) == [] == read_jsonl(tmp_path / "none.jsonl")
    log.write_text('{"a": 1}\n\n', encoding="utf-8")
    with pytest.raises(ValueError, match="log.jsonl, line 2: not JSON"):
        read_jsonl(log)


def test_null_is_missing(folder):
    nothing = dict.fromkeys(
        ("split", "id", "bbox", "points", "supercategory", "category", "think", "scan")
    )
    row = rows_of(folder(nothing, {"id": 0}))[0]
    assert (
        row["id"] == f"{Path(row['where']).parent.name}-1" and row["category"] == row["think"] == ""
    )
    assert problem(row) == ""
    assert rows_of(folder(nothing, {"id": 0}))[1]["id"] == "0"
    assert "query: is empty" in problem(rows_of(folder({"query": None}))[0])
    assert "image: is missing" in problem(rows_of(folder({"image": None}))[0])


@pytest.mark.parametrize("name", [".", "./", "images/.."])
def test_the_folder_itself_is_no_image(folder, name):
    assert "image: " in problem(rows_of(folder({"image": name}))[0])


@pytest.mark.parametrize("mark", ["<image>", "<image>\n", " <image> ", "<image><image>\n"])
def test_a_mark_for_the_image_comes_off_the_question(folder, mark):
    rows = rows_of(
        folder({"query": f"{mark}Where is it?"}, {"query": "Where is <image>?"}, {"query": mark})
    )
    assert [row["query"] for row in rows] == ["Where is it?", "Where is <image>?", ""]
    assert "query: is empty" in problem(rows[2])


@pytest.mark.parametrize("key", ["query", "id", "category", "supercategory", "think"])
def test_half_of_a_character_is_a_bad_row_before_a_run(folder, key):
    (row,) = rows_of(
        folder(
            text=json.dumps(
                {"image": "a.png", "query": "what?", "mask": "a.png"} | {key: "a\ud800"}
            )
        )
    )
    with pytest.raises(BadRow, match=f"{key}: has half of a character"):
        check_row(row)


def test_messages_with_half_of_a_character_can_be_printed(folder):
    row = json.dumps({"image": "\ud800.png", "query": "what?", "id": "\ud800"})
    rows = rows_of(folder(text=f"{row}\n{row}"))
    assert "\\ud800.png" in problem(rows[0])
    for message in [problem(rows[0]), *number_repeated_ids(rows)]:
        message.encode()


# ---------------------------------------------------------------- traces


@pytest.mark.parametrize(
    "think",
    [
        "A square.",
        "<think>A square.</think>",
        " <think>\nA square.</think>\n",
        "<Think>A square.</Think>",
    ],
)
def test_one_pair_of_tags_comes_off_a_trace(folder, think):
    (row,) = rows_of(folder({"think": think}))
    assert row["think"] == "A square." and problem(row) == ""


@pytest.mark.parametrize(
    "think",
    [
        '<think>A.</think><answer>{"bbox": [1, 2, 3, 4]}</answer>',
        "A.</think>",
        "<think>A.",
        "<think><think>A.</think></think>",
        "<think>A.</think> and <think>B.</think>",
        "A. <answer>",
        "A. <ANSWER>B</ANSWER>",
    ],
)
def test_a_trace_with_tags_left_is_a_bad_row(folder, think):
    (row,) = rows_of(folder({"think": think}))
    with pytest.raises(BadRow, match="(?i)think: has the tag </?(think|answer)> in it"):
        check_row(row)


# ---------------------------------------------------------------- links


def test_a_data_set_of_links_as_the_cache_of_a_hub_is_read(folder, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    path = folder({})
    for number, file in enumerate(
        [path / "images/a.png", path / "masks/a.png", path / "samples.jsonl"]
    ):
        file.rename(blobs / str(number))
        file.symlink_to(blobs / str(number))
    assert problem(rows_of(path)[0]) == ""
    assert problem(rows_of(path / "samples.jsonl")[0]) == ""
    other = path / "masks_elsewhere"
    (path / "masks").rename(other)
    (path / "masks").symlink_to(other)
    assert problem(rows_of(path)[0]) == ""


def test_a_parquet_file_that_is_a_link_is_one_by_either_name(tmp_path):
    blob = write(tmp_path / "0123abcd", [umrg_row(0)])
    (tmp_path / "hub/data").mkdir(parents=True)
    link = tmp_path / "hub/data/train-00000-of-00001.parquet"
    link.symlink_to(blob)
    assert len(rows_of(link)) == len(rows_of(tmp_path / "hub")) == 1
    named = write(tmp_path / "train.parquet", [umrg_row(0)])
    (tmp_path / "mine").symlink_to(named)
    assert len(rows_of(tmp_path / "mine")) == 1
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/data").symlink_to(tmp_path / "hub/data")
    (tmp_path / "linked/circle").symlink_to(tmp_path / "linked")
    assert len(rows_of(tmp_path / "linked")) == 1


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "link/../../secret.png", "b/../../secret.png"]
)
def test_a_name_does_not_lead_out(folder, name):
    path = folder({"image": name})
    noise_image(60, 40).save(path / "secret.png")
    (path / "elsewhere/deep").mkdir(parents=True)
    (path / "images/link").symlink_to(path / "elsewhere/deep")
    assert "image: " in problem(rows_of(path)[0]) and "is outside" in problem(rows_of(path)[0])


# ---------------------------------------------------------------- parquet


def umrg_row(i=0, **changes):
    truth = {"bbox_2d": [15, 10, 40, 20], "point_2d": [[20, 15], [34, 15]]}
    return {
        "prompt": [{"role": "user", "content": f"question {i}"}],
        "images": [{"bytes": encoded(Image.new("RGB", (60, 40), (i, i, i))), "path": "x.png"}],
        "masks": [{"bytes": encoded(Image.fromarray(MASK)), "path": "x.png"}],
        "reward_model": {"ground_truth": json.dumps(truth)},
        "extra_info": {"id": f"s{i}", "index": i},
    } | changes


def write(path, rows, **options):
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


@pytest.mark.parametrize(
    "prompt, query",
    [
        (
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}],
            "Where?",
        ),
        (
            [
                {"role": "user", "content": "Hello"},
                {"role": "assistant", "content": "Yes?"},
                {"role": "user", "content": "Where?"},
            ],
            "Where?",
        ),
        ("Where?", "Where?"),
        ({"role": "user", "content": "Where?"}, "Where?"),
        ([{"role": "user", "content": "<image>\nWhere?"}], "Where?"),
        (
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]}],
            "Where?",
        ),
        ([{"role": "system", "content": "a"}, {"role": "tool", "content": "b"}], None),
        ([], None),
        (None, None),
    ],
)
def test_the_question_is_the_last_of_the_user(tmp_path, prompt, query):
    (row,) = rows_of(write(tmp_path / "train.parquet", [umrg_row(prompt=prompt)]))
    assert row["query"] == query
    assert problem(row) == "" if query else "query: is empty" in problem(row)


def test_one_image_is_a_list_of_one(tmp_path):
    row = umrg_row(7)
    (image,), (mask,) = row["images"], row["masks"]
    forms = [{"images": image, "masks": mask}, {"images": image["bytes"], "masks": mask["bytes"]}]
    for changes in [*forms, {"images": [image["bytes"]]}]:
        (read,) = rows_of(write(tmp_path / "train.parquet", [row | changes]))
        image_read, mask_read, bbox, points = decode_row(read)
        assert image_read.getpixel((0, 0)) == (7, 7, 7) and np.array_equal(mask_read, MASK > 0)
        assert (bbox, points) == ((15, 10, 40, 20), ((20, 15), (34, 15)))
    (read,) = rows_of(write(tmp_path / "train.parquet", [row | {"images": [image, image]}]))
    assert "image: is a list of 2; one per row is needed" in problem(read)


def test_a_text_in_place_of_bytes_is_never_a_path(tmp_path):
    noise_image(60, 40).save(tmp_path / "secret.png")
    text = [{"bytes": str(tmp_path / "secret.png"), "path": "x"}]
    (row,) = rows_of(write(tmp_path / "train.parquet", [umrg_row(images=text)]))
    assert "image: has no bytes" in problem(row)


def test_ids_of_0_and_null(tmp_path):
    extras = [
        {"id": "0", "index": 5},
        {"id": None, "index": 0},
        {"id": "", "index": 7},
        {"id": None, "index": None},
    ]
    rows = rows_of(
        write(tmp_path / "train.parquet", [umrg_row(extra_info=extra) for extra in extras])
    )
    assert [row["id"] for row in rows] == ["0", "0", "7", "3"]
    assert len(number_repeated_ids(rows)) == 1 and [row["id"] for row in rows] == [
        "0",
        "0#2",
        "7",
        "3",
    ]


def test_random_rows_decode_each_row_group_once_within_the_memory_that_is_allowed(
    tmp_path, monkeypatch
):
    path = write(tmp_path / "train.parquet", [umrg_row(i) for i in range(40)], row_group_size=5)
    decoded = []
    read = readers._RowGroups._decode
    monkeypatch.setattr(
        readers._RowGroups,
        "_decode",
        lambda self, *place: decoded.append(place) or read(self, *place),
    )

    def read_at_random():
        decoded.clear()
        rows = rows_of(path)
        order = np.random.default_rng(0).permutation(40).tolist() * 2
        for i in order:
            assert decode_row(rows[i])[0].getpixel((0, 0)) == (i, i, i)
        return rows[0]["image"].func.__self__.tables

    assert len(read_at_random()) == 8 == len(decoded)
    size = next(iter(read_at_random().values())).nbytes
    monkeypatch.setattr(readers, "CACHED_BYTES", 2.5 * size)
    assert len(read_at_random()) == 2 and len(decoded) > 8
    monkeypatch.setattr(readers, "CACHED_BYTES", 1)
    assert len(read_at_random()) == 1


# ---------------------------------------------------------------- a box and its mask


@pytest.mark.parametrize(
    "bbox, fits",
    [
        ([15, 10, 40, 20], True),
        ([14.6, 10.3, 40.2, 19.8], True),
        ([15, 10, 39, 19], True),  # the last pixel in place of the far edge
        ([10, 8, 44, 22], True),  # a loose box, IoU 0.53
        ([15, 10, 25, 10.5], False),
        ([15, 10, 25, 10 + 10], False),  # x, y, width, height; IoU 0.4
        ([25, 25, 50, 35], False),  # another object
        ([2.5, 2.5, 6.7, 5.0], False),  # thousandths
        ([10, 15, 20, 40], False),  # rows and columns exchanged
    ],
)
def test_a_box_is_that_of_its_mask_or_a_bad_row(folder, bbox, fits):
    (row,) = rows_of(folder({"bbox": bbox}))
    if fits:
        assert decode_row(row)[2] == tuple(bbox)
    else:
        assert "of its mask" in problem(row) and "bbox: " in problem(row)


def test_a_box_of_a_tiny_target_may_be_a_pixel_off(folder):
    path = folder(
        {"mask": "dot.png", "bbox": [20, 20, 22, 21]}, {"mask": "dot.png", "bbox": [22, 20, 25, 22]}
    )
    dot = np.zeros((40, 60), np.uint8)
    dot[20:22, 20:23] = 255
    Image.fromarray(dot).save(path / "masks/dot.png")
    rounded, other = rows_of(path)
    assert problem(rounded) == "" and "IoU of 0.20 with [20, 20, 23, 22]" in problem(other)


def test_decoding_leaves_to_the_caller_what_the_mask_says(folder):
    image, mask, bbox, points = decode_row(rows_of(folder({}))[0])
    assert image.size == (60, 40) and np.array_equal(mask, MASK > 0) and bbox is points is None
    own = {"mask": None, "bbox": [1, 2, 30, 20], "points": [[5, 5], [9, 9]]}
    assert decode_row(rows_of(folder(own))[0])[1:] == (None, (1, 2, 30, 20), ((5, 5), (9, 9)))


@pytest.mark.parametrize(
    "points", [[[1, 2]], [[1, 2]] * 3, [[1, 2], [3]], [1, 2], "x", [[1, 2], [3, None]]]
)
def test_there_are_two_points(folder, points):
    (row,) = rows_of(folder({"points": points}))
    with pytest.raises(BadRow, match=r"points: .* is not 2 pairs \[x, y\]"):
        check_row(row)


def test_usable_rows_come_with_what_was_decoded_and_the_others_with_a_reason(folder):
    rows, problems = rows_of(folder({"id": "a"}, {"mask": "no.png"}, {"id": "c"})), []
    found = [(row["id"], decoded[0].size) for row, decoded in usable_rows(rows, problems)]
    assert found == [("a", (60, 40)), ("c", (60, 40))]
    assert len(problems) == 1 and "line 2, mask: no such file" in problems[0]
    assert "--skip-bad-rows" not in problems[0]


def test_repeated_ids_get_a_number_that_nobody_has():
    rows = [{"id": name, "where": "x"} for name in ("a", "a#2", "a", "b", "a")]
    assert len(number_repeated_ids(rows)) == 2
    assert [row["id"] for row in rows] == ["a", "a#2", "a#3", "b", "a#4"]


# ---------------------------------------------------------------- scans


def test_scans_are_known_by_their_ending_their_first_bytes_or_as_a_folder(folder, monkeypatch):
    path, calls = folder({}), []

    def read_png(file, choice, is_mask, image):
        calls.append((file.name, choice, is_mask, image and image.name))
        return encoded(Image.fromarray(MASK) if is_mask else noise_image(60, 40))

    monkeypatch.setattr("extras.scans.read_png", read_png)
    (path / "images/A.DCM").write_bytes(b"x")
    (path / "images/ct.nii.gz").write_bytes(b"x")
    (path / "masks/ct.nii.gz").write_bytes(b"x")
    (path / "images/no_ending").write_bytes(bytes(128) + b"DICM")
    (path / "images/series").mkdir()
    choice = {"slice": 3}
    path = folder(
        {"image": "A.DCM"},
        {"image": "ct.nii.gz", "mask": "ct.nii.gz"},
        {"image": "no_ending"},
        {"image": "series", "scan": choice},
        {"image": "ct.nii.gz", "mask": "ct.nii.gz", "scan": choice},
        {"scan": choice},
    )
    rows = rows_of(path)
    assert [problem(row) for row in rows[:5]] == [""] * 5
    assert calls == [
        ("A.DCM", {}, False, None),
        ("ct.nii.gz", {}, False, None),
        ("ct.nii.gz", {}, True, "ct.nii.gz"),
        ("no_ending", {}, False, None),
        ("series", choice, False, None),
        ("ct.nii.gz", choice, False, None),
        ("ct.nii.gz", choice, True, "ct.nii.gz"),
    ]
    assert 'image: is neither DICOM nor NIfTI; leave out "scan"' in problem(rows[5])


# ---------------------------------------------------------------- to disk


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
def test_a_file_system_that_cannot_fsync_a_folder_ends_no_run(tmp_path, monkeypatch, number):
    def refuse(handle):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, "fsync", refuse)
    to_disk(tmp_path)
    (tmp_path / "x").write_text("x")
    with pytest.raises(OSError):
        to_disk(tmp_path / "x")


def test_a_disk_that_fails_is_an_error_for_a_folder_as_well(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError):
        to_disk(tmp_path)
