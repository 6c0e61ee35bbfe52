"""demo/histology: one of many alike and all of several, with masks that the pieces of
extras/oracle.py agree with."""

import json
from collections import defaultdict

import numpy as np
import pytest
from PIL import Image

from data import load_samples
from demo.make.histology import WORDS, draw, make_rows
from demo.make.wordings import check
from extras.oracle import pieces
from extras.several import add_siblings
from metrics import prediction
from runtime.cli import ROOT

DATA = ROOT / "demo/histology"


def test_every_mask_has_the_pieces_that_its_row_says():
    for split, at_least in (("train", 100), ("test", 80)):
        samples = load_samples(DATA, split)
        assert len(samples) >= at_least
        counts = defaultdict(list)
        for sample in samples:
            expected = 1 if sample.extra["kind"] == "one" else sample.extra["alike"]
            assert len(pieces(sample.mask)) == expected, sample.id
            assert (sample.extra["kind"] == "one") == (sample.category == "nucleus")
            counts[sample.category].append(sample.extra["alike"])
        assert set(counts) == set(WORDS) and min(map(len, counts.values())) >= 20
        assert max(counts["all nuclei"]) >= 8 and min(counts["all glands"]) == 2


def test_a_nucleus_has_all_that_look_alike_as_siblings_and_a_union_none():
    samples = load_samples(DATA, "test")
    found = add_siblings([prediction(s, i, [""], None) for i, s in enumerate(samples)])
    for sample, p in zip(samples, found):
        alike = sample.extra["alike"] if sample.category == "nucleus" else 1
        assert 1 + len(p["truth"]["siblings"]) == alike


def test_questions_keep_their_secret_and_unseen_wordings_are_in_the_test_split_only():
    check(WORDS)
    rows = [json.loads(line) for line in (DATA / "samples.jsonl").read_text().splitlines()]
    assert not any(row["unseen_wording"] for row in rows if row["split"] == "train")
    assert 0.3 < np.mean([row["unseen_wording"] for row in rows if row["split"] == "test"]) < 0.7
    for row in rows:
        assert not any(
            stem in row["query"].lower() for stem in WORDS[row["category"]].forbidden.split()
        )
        assert any(name in row["think"].lower() for name in row["names"])


def test_the_same_seed_draws_the_same_picture(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    rows = [row for index in range(4) for row in make_rows(0, 1, index, tmp_path)]
    kept = {
        row["id"]: row for row in map(json.loads, (DATA / "samples.jsonl").read_text().splitlines())
    }
    for row in rows:
        assert row == kept[row["id"]]
        for kind, key in (("images", "image"), ("masks", "mask")):
            new, old = (
                np.asarray(Image.open(folder / kind / row[key])).astype(int)
                for folder in (tmp_path, DATA)
            )
            assert new.shape == old.shape and np.abs(new - old).max() <= (
                8 if kind == "images" else 0
            )


@pytest.mark.parametrize("category", WORDS)
def test_pieces_do_not_touch(category):
    _, masks = draw(np.random.default_rng(5), (112, 120), category)
    assert len(masks) >= 2 and np.sum(masks, axis=0).max() == 1
    assert len(pieces(np.any(masks, axis=0))) == len(masks)
