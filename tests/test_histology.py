"""demo/histology: one of many alike, and all of several; masks have the pieces that rows say."""

import io
from collections import defaultdict

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import Examples, load_samples
from demo.make.histology import WORDS, draw, make_rows, make_split
from demo.make.wordings import check
from extras.boxes import pieces
from runtime.cli import ROOT

DATA = ROOT / "demo/histology"


@pytest.fixture(scope="module", params=["train", "test"])
def examples(request: pytest.FixtureRequest) -> Examples:
    return load_samples(DATA, request.param)


def pixels_of(row: dict, column: str) -> np.ndarray:
    """The pixels of a parquet row's image or mask, as numbers that can be subtracted."""
    blob = row[column][0]["bytes"]
    return np.asarray(Image.open(io.BytesIO(blob))).astype(int)


def test_both_splits_have_all_their_rows():
    counts = {split: len(load_samples(DATA, split)) for split in ("train", "test")}
    assert counts == {"train": 120, "test": 90}


def test_every_mask_has_the_pieces_that_its_row_says(examples):
    alike_in = defaultdict(list)
    for example in examples:
        kind = example.extra["kind"]
        alike = example.extra["alike"]
        assert len(pieces(example.mask)) == (1 if kind == "one" else alike), example.id
        assert (kind == "one") == (example.category == "nucleus")
        alike_in[example.category].append(alike)
    assert set(alike_in) == set(WORDS)
    assert min(len(counts) for counts in alike_in.values()) >= 20
    assert max(alike_in["all nuclei"]) >= 8
    assert min(alike_in["all glands"]) == 2


def test_every_nucleus_of_a_picture_has_a_row_of_its_own(examples):
    numbers_in = defaultdict(list)
    for row in examples.rows:
        if row["category"] == "nucleus":
            picture, _, number = row["id"].rpartition("_")
            numbers_in[picture, row["extra"]["alike"]].append(int(number))
    assert numbers_in
    for (picture, alike), numbers in numbers_in.items():
        assert numbers == list(range(alike)), picture


def test_questions_keep_their_secret_and_traces_name_the_target(examples):
    check(WORDS)
    for row in examples.rows:
        query = row["query"].lower()
        for stem in WORDS[row["category"]].forbidden.split():
            assert stem not in query
        assert any(name in row["think"].lower() for name in row["extra"]["names"])


def test_unseen_wordings_are_in_the_test_split_only():
    train = [row["extra"]["unseen_wording"] for row in load_samples(DATA, "train").rows]
    test = [row["extra"]["unseen_wording"] for row in load_samples(DATA, "test").rows]
    assert not any(train)
    assert 0.3 < np.mean(test) < 0.7


def test_the_same_seed_draws_the_same_rows():
    kept = {
        row["extra_info"]["id"]: row for row in pq.read_table(DATA / "test.parquet").to_pylist()
    }
    made = [row for index in range(4) for row in make_rows(seed=0, part=1, index=index)]
    assert len({row["extra_info"]["category"] for row in made}) == 4
    for number, row in enumerate(made):
        old = kept[row["extra_info"]["id"]]
        assert row["extra_info"] | {"index": number} == old["extra_info"]
        for key in ("prompt", "reward_model", "data_source"):
            assert row[key] == old[key]
        assert np.array_equal(pixels_of(row, "masks"), pixels_of(old, "masks"))
        # another version of Pillow may code the JPEG otherwise
        difference = np.abs(pixels_of(row, "images") - pixels_of(old, "images"))
        assert difference.max() <= 8


def test_a_split_shares_its_rows_out_to_the_categories():
    rows = make_split(seed=3, part=0, count=8)
    categories = [row["extra_info"]["category"] for row in rows]
    assert [row["extra_info"]["index"] for row in rows] == list(range(len(rows)))
    assert set(categories) == set(WORDS)
    for category in ("all nuclei", "gland pieces", "all glands"):
        assert categories.count(category) <= 2


@pytest.mark.parametrize("category", WORDS)
def test_pieces_do_not_touch(category):
    _, masks = draw(np.random.default_rng(5), (112, 120), category)
    assert len(masks) >= 2
    assert np.sum(masks, axis=0).max() == 1
    assert len(pieces(np.any(masks, axis=0))) == len(masks)
