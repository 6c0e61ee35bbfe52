"""demo/histology: one of many alike, and all of several; masks have the pieces that rows say."""

import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import evaluate
import train_grpo
import train_sft
from data import ONE_BOX, AnswerFormat, Examples, Sizes, load_samples
from demo.make.histology import WORDS, draw, make_rows, make_split
from demo.make.several_boxes import EVALUATE, GRPO, WARM, filled, table
from demo.make.wordings import check
from extras.boxes import SEVERAL_BOXES, pieces
from metrics import prediction
from runtime.cli import ROOT, parse_args

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


# ---------------------------------------------------------------- one box against several


def write_perfect_predictions(folder: Path, answer_format: AnswerFormat, dice: float) -> None:
    """Writes an evaluation in which every completion is the truth as that format writes it."""
    lines = []
    for i, example in enumerate(load_samples(DATA, "test")):
        sizes = Sizes(example.image.size, example.image.size)
        text = answer_format.target_text(example, sizes, True)
        p = prediction(example, i, [text], sizes, answer_format)
        p["dice"] = {"both": dice}
        lines.append(json.dumps(p) + "\n")
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text("".join(lines))


def line_of(lines: list[str], start: str) -> str:
    """The one line that begins so."""
    found = [line for line in lines if line.startswith(start)]
    assert len(found) == 1, (start, lines)
    return found[0]


def test_a_box_for_each_piece_beats_one_box_where_there_are_several(tmp_path):
    for at in ("warm", "0"):
        write_perfect_predictions(tmp_path / f"eval-reasoning-{at}", ONE_BOX, 0.5)
        write_perfect_predictions(tmp_path / f"eval-boxes-{at}", SEVERAL_BOXES, 0.75)
    lines = table(tmp_path, [0]).splitlines()
    nucleus = line_of(lines, "| warm start | nucleus |")
    assert nucleus.startswith("| warm start | nucleus | 1.000 | 1.000 | +0.000")
    several = line_of(lines, "| warm start | all nuclei |")
    cells = several.split(" | ")
    assert float(cells[2]) < 0.2  # one box
    assert float(cells[3]) == 1  # a box each
    assert "| 0.500 | 0.750 | +0.250 [+0.250, +0.250] |" in several
    trained = line_of(lines, "| GRPO, seed 0 | boxes |")
    assert trained.startswith("| GRPO, seed 0 | boxes | 1.000 | 1.000 | +0.000 [+0.000, +0.000]")


@pytest.mark.parametrize("command", [WARM, GRPO, EVALUATE])
def test_the_commands_of_that_comparison_parse(command):
    script, *words = command.split()
    scripts = {"train_sft.py": train_sft, "train_grpo.py": train_grpo, "evaluate.py": evaluate}
    cfg = parse_args(scripts[script].Config, "", argv=words)
    assert cfg.max_new_tokens == 320


def test_boxes_are_filled_where_the_pixels_have_their_centres():
    mask = filled((4, 6), [(0, 0, 2, 1), (3.4, 1.6, 6, 4)])
    assert mask[0].tolist() == [True, True, False, False, False, False]
    assert not mask[1].any()
    assert mask[2].tolist() == [False, False, False, True, True, True]
