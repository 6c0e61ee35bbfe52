"""Files from elsewhere, changed at random. Each is read, or rejected with one ValueError that says
why. Nothing else happens."""

import io
import json
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import noise_image
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

import train_grpo
from asm import load_asm
from crm import load_crm
from data import BadRow, Examples, load_image, load_mask, load_prompt, load_samples
from extras.predictions import Resize, check_ids, parse, predictions_from, read_given
from runtime.cli import ROOT, parse_args
from runtime.files import read_torch

MANY = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(MANY, max_examples=20)
SEEDS = st.integers(0, 2**32)

# four bytes that mean something to many formats
NUMBERS = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"-1e9")


def changed(data: bytes, seed: int) -> bytes:
    """Returns the data, changed one to five times: cut, overwritten, repeated, filled up."""
    rng = random.Random(seed)
    result = bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(result) + 1)
        size = rng.choice((1, 2, 4, 64))
        kind = rng.choice(("cut", "overwrite", "repeat", "insert", "number"))
        if kind == "cut":
            del result[at : at + rng.choice((size, len(result)))]
        elif kind == "overwrite":
            result[at : at + size] = rng.randbytes(len(result[at : at + size]))
        elif kind == "repeat":
            result[at:at] = result[at : at + size] * rng.randint(1, 50)
        elif kind == "insert":
            result[at:at] = rng.randbytes(size)
        else:
            result[at : at + 4] = rng.choice(NUMBERS)
    return bytes(result)


def assert_one_line(error: ValueError, names: Path | str = "") -> None:
    """An error is one line, which names the file."""
    assert len(str(error).splitlines()) == 1
    assert str(names) in str(error)


@pytest.fixture
def folder(tmp_path_factory):
    """Makes new folders: each example of a test has its own."""
    return partial(tmp_path_factory.mktemp, "hostile")


# ---------------------------------------------------------------- images and masks

WITH_EXIF = ("PNG", "JPEG", "TIFF", "WEBP")


def encoded(kind: str) -> bytes:
    """Returns a small picture as a file of a format, turned by its EXIF where that has one."""
    image = noise_image(40, 31)
    if kind == "GIF":
        image = image.convert("P")
    if kind == "TIFF":
        image = image.convert("I;16")
    options = {}
    if kind in WITH_EXIF:
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM"])
@given(seed=SEEDS)
@MANY
def test_images_and_masks(kind, seed):
    data = changed(encoded(kind), seed)
    try:
        image = np.asarray(load_image(data))
    except ValueError as error:
        assert_one_line(error)
    else:
        assert image.size > 0
        assert image.shape[2] == 3
    for load in (load_mask, partial(load_mask, of=data)):
        try:
            mask = load(data)
        except ValueError as error:
            assert_one_line(error)
        else:
            assert mask.size > 0
            assert mask.dtype == bool


# ---------------------------------------------------------------- data sets


def read_all(examples: Examples) -> None:
    """Every example can be used, or is a BadRow."""
    for i in range(len(examples)):
        try:
            one = examples[i]
        except BadRow as error:
            assert_one_line(error)
            continue
        assert one.query
        assert one.image.width > 0
        assert len(one.points) == 2


ROW = {
    "image": "a.png",
    "query": "what?",
    "bbox": [1, 2, 20, 30],
    "points": [[3, 4], [5, 6]],
    "split": "train",
}


def write_folder(folder: Path, lines: bytes) -> None:
    (folder / "images").mkdir()
    noise_image(40, 31).save(folder / "images/a.png")
    (folder / "samples.jsonl").write_bytes(lines)


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@given(seed=SEEDS)
@MANY
def test_a_folder_of_examples(seed, folder):
    path = folder()
    rows = [ROW | {"id": str(i), "think": "hm"} for i in range(3)]
    write_folder(path, changed(as_lines(rows), seed))
    try:
        read_all(load_samples(path))
    except ValueError as error:
        assert_one_line(error, path)
    shutil.rmtree(path)


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)


SINGLE = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers()
ANY_JSON = st.recursive(SINGLE, nested)
KEYS = ["image", "mask", "query", "bbox", "points", "id", "split", "category", "think"]


@given(value=ANY_JSON, key=st.sampled_from(KEYS))
@MANY
def test_any_json_in_any_column(value, key, folder):
    path = folder()
    write_folder(path, as_lines([ROW | {key: value}, ROW]))
    read_all(load_samples(path))
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def small_parquet(tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("small") / "train.parquet"
    pq.write_table(pq.read_table(ROOT / "demo/data/test.parquet")[:3], file)
    return file.read_bytes()


@given(seed=SEEDS)
@FEW
def test_a_parquet_file(seed, folder, small_parquet):
    file = folder() / "train.parquet"
    file.write_bytes(changed(small_parquet, seed))
    try:
        read_all(load_samples(file))
    except ValueError as error:
        assert_one_line(error, file)
    file.unlink()


# ---------------------------------------------------------------- flags, prompts, torch files

FLAG_PARTS = ["--lr", "--lr=", "1e-3", "\n", "'", '"', "@x", "#", "--group", "-1", "nan"]
FLAG_PARTS += ["--data", "\\", "--resume", "\0"]


@example(text="@\0")
@given(text=st.text() | st.lists(st.sampled_from(FLAG_PARTS)).map("".join))
@MANY
def test_a_file_of_flags(text, folder):
    file = folder() / "x.args"
    file.write_text(text, errors="surrogatepass")
    try:
        parse_args(train_grpo.Config, "", argv=["--crm", "x", f"@{file}"])
    except SystemExit as error:
        assert error.code == 2


def with_query(text: str) -> bytes:
    return f"{text}{{query}}".encode(errors="surrogatepass")


@given(data=st.binary() | st.text().map(with_query))
@MANY
def test_a_prompt_file(data, folder):
    file = folder() / "x.txt"
    file.write_bytes(data)
    try:
        assert "{query}" in load_prompt(str(file))
    except ValueError as error:
        assert str(file) in str(error)


@given(seed=SEEDS)
@MANY
def test_a_torch_file(seed, folder):
    file = folder() / "x.pt"
    torch.save({"step": 3, "optimizer": {"masters": {"a": torch.randn(3)}}}, file)
    file.write_bytes(changed(file.read_bytes(), seed))
    try:
        read_torch(file)
    except ValueError as error:
        assert str(file) in str(error)


# ---------------------------------------------------------------- models

# The tokenizer's package raises a bare Exception for merges outside its vocabulary. So a tokenizer
# that somebody has changed may end in its words; one that is cut ends in ours.
CUT_ONLY = "tokenizer.json"
CRM_FILES = [
    "config.json",
    "model.safetensors",
    CUT_ONLY,
    "tokenizer_config.json",
    "preprocessor_config.json",
    "settings.json",
]


@pytest.mark.parametrize("name", CRM_FILES)
@given(seed=SEEDS)
@settings(MANY, max_examples=5)
def test_a_model_folder(name, seed, folder):
    path = folder()
    shutil.copytree(ROOT / "demo/crm", path, dirs_exist_ok=True)
    data = (path / name).read_bytes()
    if name == CUT_ONLY:
        (path / name).write_bytes(data[: seed % len(data)])
    else:
        (path / name).write_bytes(changed(data, seed))
    try:
        load_crm(path)
    except ValueError as error:
        assert_one_line(error, path)
    shutil.rmtree(path)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
@given(seed=SEEDS)
@settings(MANY, max_examples=10)
def test_a_segmenter_folder(name, seed, folder):
    path = folder()
    shutil.copytree(ROOT / "demo/asm", path, dirs_exist_ok=True)
    (path / name).write_bytes(changed((path / name).read_bytes(), seed))
    try:
        load_asm(path, "cpu")
    except ValueError as error:
        assert_one_line(error, path)
    shutil.rmtree(path)


def test_no_code_is_taken_from_a_model_folder(tmp_path, capsys):
    path = tmp_path / "crm"
    shutil.copytree(ROOT / "demo/crm", path)
    (path / "evil.py").write_text("print('ran')\nclass Evil: pass\n")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
    }
    (path / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    with pytest.raises(ValueError, match=str(path)):
        load_crm(path)
    (path / "config.json").write_text(json.dumps(config))
    load_crm(path)
    assert "ran" not in capsys.readouterr().out


# ---------------------------------------------------------------- predictions of another model


@pytest.fixture(scope="module")
def three_examples() -> Examples:
    return load_samples(ROOT / "demo/data", "test")[:3]


@given(seed=SEEDS)
@MANY
def test_predictions(seed, folder, three_examples):
    file = folder() / "p.jsonl"
    rows = []
    for one in three_examples:
        points = [list(point) for point in one.points]
        rows.append({"id": one.id, "bbox": list(one.bbox), "points": points})
    file.write_bytes(changed(as_lines(rows), seed))
    args = parse([str(file), "--data", "demo/data"])
    try:
        answers, asked = read_given(file)
        check_ids(answers, three_examples.ids(), args)
        rows, check = predictions_from(answers, asked, three_examples, "pixels", Resize())
        check.reject_impossible(str(file))
    except ValueError as error:
        assert_one_line(error, file)
    else:
        assert len(rows) == 3
