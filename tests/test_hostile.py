"""Files from strangers, bent at random: each is read, or refused with one ValueError that says why. Nothing else."""

import io
import json
import random
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import noise_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import evaluate
import train_grpo
from asm import load_asm
from crm import load_crm
from data import BadRow, load_image, load_mask, load_prompt, load_samples
from runtime.cli import ROOT, parse_args
from runtime.files import read_torch

FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(FUZZ, max_examples=20)
SEEDS = st.integers(0, 2**32)


def bent(data: bytes, seed: int) -> bytes:
    """Cut, flip, repeat, insert: one to five times."""
    rng, data = random.Random(seed), bytearray(data)
    for _ in range(rng.randint(1, 5)):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 64))
        kind = rng.randrange(5)
        if kind == 0:
            del data[at : at + rng.choice((n, len(data)))]
        elif kind == 1:
            data[at : at + n] = rng.randbytes(len(data[at : at + n]))
        elif kind == 2:
            data[at:at] = data[at : at + n] * rng.randint(1, 50)
        elif kind == 3:
            data[at:at] = rng.randbytes(n)
        else:
            data[at : at + 4] = rng.choice(
                (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"-1e9")
            )
    return bytes(data)


def encoded(kind: str) -> bytes:
    image = noise_image(40, 31)
    image = {"GIF": image.convert("P"), "TIFF": image.convert("I;16"), "PPM": image}.get(
        kind, image
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(
        buffer := io.BytesIO(),
        format=kind,
        **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {}),
    )
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP", "PPM"])
@given(seed=SEEDS)
@FUZZ
def test_images_and_masks(kind, seed):
    data = bent(encoded(kind), seed)
    for load in (load_image, load_mask, partial(load_mask, of=data)):
        try:
            loaded = np.asarray(load(data))
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
        else:
            assert loaded.size and (load is not load_image or loaded.shape[2] == 3)


def all_of(samples):
    for i in range(len(samples)):
        try:
            sample = samples[i]
        except BadRow:
            continue
        assert sample.query and sample.image.width and len(sample.points) == 2


@given(seed=SEEDS)
@FUZZ
def test_a_folder_of_samples(seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    (folder / "images").mkdir()
    noise_image(40, 31).save(folder / "images/a.png")
    rows = [
        {
            "image": "a.png",
            "query": "what?",
            "bbox": [1, 2, 20, 30],
            "points": [[3, 4], [5, 6]],
            "id": str(i),
            "split": "train",
            "think": "hm",
        }
        for i in range(3)
    ]
    (folder / "samples.jsonl").write_bytes(
        bent("".join(json.dumps(r) + "\n" for r in rows).encode(), seed)
    )
    try:
        all_of(load_samples(folder))
    except ValueError as error:
        assert str(folder) in str(error)
    shutil.rmtree(folder)


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
        lambda inner: (
            st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
        ),
    ),
    key=st.sampled_from(
        ["image", "mask", "query", "bbox", "points", "id", "split", "category", "think"]
    ),
)
@FUZZ
def test_any_json_in_any_column(value, key, tmp_path_factory):
    folder = tmp_path_factory.mktemp("columns")
    (folder / "images").mkdir()
    noise_image(40, 31).save(folder / "images/a.png")
    row = {
        "image": "a.png",
        "query": "what?",
        "bbox": [1, 2, 20, 30],
        "points": [[3, 4], [5, 6]],
        "split": "train",
    }
    (folder / "samples.jsonl").write_text(
        json.dumps(row | {key: value}) + "\n" + json.dumps(row) + "\n"
    )
    all_of(load_samples(folder))
    shutil.rmtree(folder)


@given(seed=SEEDS)
@FEW
def test_a_parquet_file(seed, tmp_path_factory, small_parquet):
    file = tmp_path_factory.mktemp("parquet") / "train.parquet"
    file.write_bytes(bent(small_parquet, seed))
    try:
        all_of(load_samples(file))
    except ValueError as error:
        assert str(file) in str(error)
    file.unlink()


@pytest.fixture(scope="module")
def small_parquet(tmp_path_factory):
    import pyarrow.parquet as pq

    file = tmp_path_factory.mktemp("small") / "train.parquet"
    pq.write_table(pq.read_table(ROOT / "demo/data/test.parquet")[:3], file)
    return file.read_bytes()


@given(
    text=st.text()
    | st.lists(
        st.sampled_from(
            [
                "--lr",
                "--lr=",
                "1e-3",
                "\n",
                "'",
                '"',
                "@x",
                "#",
                "--group",
                "-1",
                "nan",
                "--data",
                "\\",
                "--resume",
                "\0",
            ]
        )
    ).map("".join)
)
@FUZZ
def test_a_file_of_flags(text, tmp_path_factory):
    file = tmp_path_factory.mktemp("flags") / "x.args"
    file.write_text(text, errors="surrogatepass")
    try:
        parse_args(train_grpo.Config, "", argv=["--crm", "x", f"@{file}"])
    except SystemExit as error:
        assert error.code == 2


@given(
    data=st.binary() | st.text().map(lambda text: (text + "{query}").encode(errors="surrogatepass"))
)
@FUZZ
def test_a_prompt_file(data, tmp_path_factory):
    file = tmp_path_factory.mktemp("prompt") / "x.txt"
    file.write_bytes(data)
    try:
        assert "{query}" in load_prompt(str(file))
    except ValueError as error:
        assert str(file) in str(error)


@given(seed=SEEDS)
@FUZZ
def test_a_torch_file(seed, tmp_path_factory):
    file = tmp_path_factory.mktemp("torch") / "x.pt"
    torch.save({"step": 3, "optimizer": {"masters": {"a": torch.randn(3)}}}, file)
    file.write_bytes(bent(file.read_bytes(), seed))
    try:
        read_torch(file)
    except ValueError as error:
        assert str(file) in str(error)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ],
)
@given(seed=SEEDS)
@settings(FUZZ, max_examples=5)
def test_a_model_folder(name, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("crm")
    shutil.copytree(ROOT / "demo/crm", folder, dirs_exist_ok=True)
    data = (
        folder / name
    ).read_bytes()  # tokenizers raises a bare Exception of merges outside its vocabulary,
    torn = name == "tokenizer.json"  # so a tampered tokenizer ends in its words; a torn one in ours
    (folder / name).write_bytes(data[: seed % len(data)] if torn else bent(data, seed))
    try:
        load_crm(folder)
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors"])
@given(seed=SEEDS)
@settings(FUZZ, max_examples=10)
def test_a_segmenter_folder(name, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("asm")
    shutil.copytree(ROOT / "demo/asm", folder, dirs_exist_ok=True)
    (folder / name).write_bytes(bent((folder / name).read_bytes(), seed))
    try:
        load_asm(folder, "cpu")
    except ValueError as error:
        assert str(folder) in str(error) and len(str(error).splitlines()) == 1
    shutil.rmtree(folder)


@given(seed=SEEDS)
@FUZZ
def test_predictions(seed, tmp_path_factory):
    file = tmp_path_factory.mktemp("predictions") / "p.jsonl"
    samples = load_samples("demo/data", "test")[:3]
    rows = [
        {"id": s.id, "bbox": list(s.bbox), "points": [list(p) for p in s.points]} for s in samples
    ]
    file.write_bytes(bent("".join(json.dumps(r) + "\n" for r in rows).encode(), seed))
    config = evaluate.Config(
        predictions=str(file), data="demo/data", asm="none", out="x", frame="pixels"
    )
    try:
        assert len(evaluate.from_file(config, samples)) == 3
    except ValueError as error:
        assert str(file) in str(error)


def test_no_code_is_taken_from_a_model_folder(tmp_path, capsys):
    shutil.copytree(ROOT / "demo/crm", tmp_path / "crm")
    config = json.loads((tmp_path / "crm/config.json").read_text())
    evil = {
        "AutoConfig": "evil.Evil",
        "AutoModel": "evil.Evil",
        "AutoTokenizer": ["evil.Evil", None],
    }
    (tmp_path / "crm/config.json").write_text(
        json.dumps(config | {"auto_map": evil, "model_type": "evil"})
    )
    (tmp_path / "crm/evil.py").write_text("print('ran')\nclass Evil: pass\n")
    with pytest.raises(ValueError):
        load_crm(tmp_path / "crm")
    (tmp_path / "crm/config.json").write_text(json.dumps(config | {"auto_map": evil}))
    load_crm(tmp_path / "crm")
    assert "ran" not in capsys.readouterr().out
