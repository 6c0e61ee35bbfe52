"""The driver of the experiments: its commands are commands, and its tables are right."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import Script
from PIL import Image

import evaluate
import train_grpo
import train_sft
from data import load_samples
from paper.__main__ import question_row, shown, well_formed
from paper.experiments import RUNS, SEEN, TABLES, commands
from paper.report import CURVES, read_results, report
from paper.sft_rate import hold_out
from rewards import parse_answer, write_answer
from runtime.cli import ROOT, parse_args

SCRIPTS = {"train_grpo.py": train_grpo, "train_sft.py": train_sft, "evaluate.py": evaluate}
FIXED = {
    "pdice": 0.5,
    "refused": 0.0,
    "dice_points": 0.1,
    "dice_box": 0.2,
    "dice_one": 0.3,
    "dice_both": 0.4,
}


def run(*command: str | Path, check: int = 0) -> tuple[str, str]:
    """What a command prints to stdout and to stderr. Its exit status must be `check`."""
    script = Script(*command)
    out, error = script.communicate()
    assert script.returncode == check, (command, script.returncode, out[-2000:], error[-2000:])
    return out, error


def result(folder: Path, name: str, seed: int, iou: list[float], **more: Any) -> None:
    """Writes a result of some questions: the first about an eye in words that are not seen in
    training, the others about a brain."""
    questions = []
    for i, value in enumerate(iou):
        question = {
            "id": f"q{i}",
            "supercategory": "Brain" if i else "Eye",
            "wording": "seen" if i else "unseen",
            "iou": value,
        }
        questions.append({**question, **FIXED, **more})
    written = {
        "name": name,
        "seed": seed,
        "date": "2026-01-01",
        "seconds": [30.0, 30.0],
        "commands": ["a", "b"],
        "curves": {key: [0.1, 0.2, 0.3] for key in CURVES},
        "questions": questions,
    }
    (folder / f"{name}-{seed}.json").write_text(json.dumps(written))


# ---------------------------------------------------------------- the report


@pytest.fixture
def two_seeds(tmp_path: Path) -> str:
    """The report on a start and a run that adds 0.1 with one seed and 0.3 with the other."""
    for seed, gain in ((0, 0.1), (1, 0.3)):
        result(tmp_path, "start", seed, [0.1, 0.2, 0.3])
        result(tmp_path, "soft", seed, [0.1 + gain, 0.2 + gain, 0.3 + gain])
    return report(read_results(tmp_path))


def test_tables_average_seeds_and_pair_the_questions(two_seeds):
    start = "| start | 2 | 20.0 | 50.0 | 10.0 | 20.0 | 40.0 | 0.0 |  | 20.0, 20.0 |"
    assert start in two_seeds
    soft = "| soft | 2 | 40.0 | 50.0 | 10.0 | 20.0 | 40.0 | 0.0 | +20.0 [+20.0, +20.0] | 30.0, 50.0"
    assert soft in two_seeds
    assert f"2 of {len(RUNS)} runs, 4 with all seeds, 4 minutes" in two_seeds
    assert "3 held-out questions" in two_seeds
    assert "named right" not in two_seeds  # results without that score have no column for it


def test_super_categories_that_were_trained_on_are_told_from_the_others(two_seeds):
    assert "| soft | +20.0 [+20.0, +20.0] | +20.0 [+20.0, +20.0] |" in two_seeds


def test_unseen_wordings_have_a_column_of_their_own(two_seeds):
    assert "| start | 25.0 | 10.0 |  |  |" in two_seeds
    assert "| soft | 45.0 | 30.0 | +20.0 [+20.0, +20.0]" in two_seeds


def test_what_the_segmenter_is_given_is_compared_within_a_run(two_seeds):
    means = "| soft | 10.0 | 20.0 | 30.0 | 40.0 | "
    assert means + "+10.0 [+10.0, +10.0] | +20.0 [+20.0, +20.0] |" in two_seeds
    assert "the first adds +10.0 [+10.0, +10.0]" in two_seeds


def test_a_question_is_answered_with_its_interval_and_its_seeds(two_seeds):
    answer = "improve on its start? **Yes**: +20.0 [+20.0, +20.0]; by seed +10.0, +30.0."
    assert answer in two_seeds


def test_runs_are_compared_over_the_seeds_that_both_have(tmp_path):
    result(tmp_path, "start", 0, [0.1, 0.2, 0.3])
    result(tmp_path, "soft", 0, [0.2, 0.3, 0.4], iou_named=None)
    result(tmp_path, "soft", 1, [0.4, 0.5, 0.6], iou_named=0.5)
    text = report(read_results(tmp_path))
    answer = "improve on its start? **One seed only**: +10.0 [+10.0, +10.0]; by seed +10.0."
    assert answer in text
    # named by the second seed only, so its IoU is there
    assert "| soft | 2 | 40.0 | 50.0 | 50.0 | 10.0 |" in text


def test_what_was_named_right_is_reported_where_it_was_scored(tmp_path):
    """The IoU of completions that name the target is undefined where none does."""
    result(tmp_path, "start", 0, [0.1, 0.2], named=0.25, iou_named=None)
    result(tmp_path, "soft", 0, [0.1, 0.4], named=0.75, iou_named=0.5)
    text = report(read_results(tmp_path))
    assert "| run | seeds | IoU | pDice | named right | IoU, named right |" in text
    assert "| start | 1 | 15.0 | 50.0 | 25.0 | – |" in text
    assert "| soft | 1 | 25.0 | 50.0 | 75.0 | 50.0 |" in text
    assert "name the target more often? **One seed only**: +50.0 [+50.0, +50.0]" in text
    assert "Refusals (completions with a problem): start 0.0 %, soft 0.0 %" in text


def verdict(folder: Path) -> str:
    """The word on whether "soft" improves on its start."""
    return report(read_results(folder)).split("improve on its start? **")[1].split("**")[0]


def test_a_verdict_needs_several_seeds(tmp_path):
    result(tmp_path, "start", 0, [0.2, 0.2, 0.2])
    result(tmp_path, "soft", 0, [0.4, 0.4, 0.4])
    assert verdict(tmp_path) == "One seed only"


@pytest.mark.parametrize(
    "second, word",
    [
        ([0.3, 0.3, 0.3], "Yes"),
        ([0.1, 0.1, 0.1], "Not shown"),  # better on average, and worse by itself
        ([0.25, 0.3, 0.35], "Yes"),
        ([0.1, 0.1, 0.6], "Not shown"),  # three questions that differ say little
    ],
)
def test_a_verdict_needs_an_interval_without_0_and_seeds_that_agree(tmp_path, second, word):
    for seed, iou in ((0, [0.4, 0.4, 0.4]), (1, second)):
        result(tmp_path, "start", seed, [0.2, 0.2, 0.2])
        result(tmp_path, "soft", seed, iou)
    assert verdict(tmp_path) == word


def test_a_run_that_is_worse_is_called_so(tmp_path):
    for seed in (0, 1):
        result(tmp_path, "start", seed, [0.2, 0.2, 0.2])
        result(tmp_path, "soft", seed, [0.1, 0.1, 0.1])
    assert verdict(tmp_path) == "No, it is worse"


def test_questions_about_one_image_widen_the_interval(tmp_path):
    start = [0.2] * 8
    soft = [0.1, 0.1, 0.1, 0.1, 0.9, 0.9, 0.9, 0.9]
    for folder, images in (("many", [f"image {i}" for i in range(8)]), ("two", ["a", "b"] * 4)):
        (tmp_path / folder).mkdir()
        for name, iou in (("start", start), ("soft", soft)):
            result(tmp_path / folder, name, 0, iou)
            file = tmp_path / folder / f"{name}-0.json"
            written = json.loads(file.read_text())
            for question, image in zip(written["questions"], sorted(images)):
                question["image"] = image
            file.write_text(json.dumps(written))

    def width(folder: str) -> float:
        text = report(read_results(tmp_path / folder))
        low, high = text.split("improve on its start? **One seed only**: +30.0 [")[1].split(", ")[
            :2
        ]
        return float(high.split("]")[0]) - float(low)

    assert width("two") > 1.5 * width("many")


def test_a_command_that_was_not_repeated_has_no_seconds(tmp_path):
    result(tmp_path, "start", 0, [0.1, 0.2])
    file = tmp_path / "start-0.json"
    file.write_text(file.read_text().replace("[30.0, 30.0]", "[null, 60.0]"))
    text = report(read_results(tmp_path))
    assert "1 minutes in all" in text
    assert "a    # made before\nb    # 60 s\n" in text
    assert "Since then" not in text


def test_flags_of_older_commands_are_explained(tmp_path):
    result(tmp_path, "start", 0, [0.1, 0.2])
    file = tmp_path / "start-0.json"
    file.write_text(file.read_text().replace('"b"', '"python evaluate.py --samples 4"'))
    assert "Since then `--samples` is `--completions`." in report(read_results(tmp_path))


def test_the_report_on_the_projects_own_results_is_the_one_in_the_repository():
    text = report(read_results(ROOT / "paper/results"))
    assert text == (ROOT / "paper/RESULTS.md").read_text(encoding="utf-8")
    for picture in ("curves.png",):
        assert f"]({picture})" in text
        assert (ROOT / "paper" / picture).is_file()


def test_results_without_a_start_are_one_line(tmp_path):
    _, error = run("-m paper --report --results", tmp_path, check=2)
    assert error == f"error: --results {tmp_path}: no start-0.json yet; python -m paper makes it\n"


def test_curves_are_drawn_of_what_trained_with_grpo(tmp_path):
    for name in ("start", "sft", "soft"):
        result(tmp_path, name, 0, [0.1, 0.2])
    run("-m paper --report --results", tmp_path)
    assert "![curves](curves.png)" in (tmp_path / "RESULTS.md").read_text()
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 400
        assert len(np.unique(np.asarray(picture))) > 50


# ---------------------------------------------------------------- the commands


ARGS = Namespace(
    work="w",
    torchrun="",
    crm="demo/crm",
    early="build/early",
    data="demo/data",
    asm="demo/asm",
    limit=0,
    steps=3,
    flags="@recipes/demo.args",
    sft_flags="--batch 8",
    max_new_tokens=64,
)


@pytest.mark.parametrize("name", RUNS)
def test_every_command_of_every_run_parses(name):
    experiment = RUNS[name]
    crm = "build/early" if experiment.early else "demo/crm"
    data = "demo/data"
    for command in commands(name, 1, ARGS):
        words = command.words
        if words[1] == "-m":
            made = words[words.index("--out") + 1]
            if words[2] == "paper.careless":
                crm = made
            else:
                assert words[2] == "paper.subset"
                data = made
            continue
        script = words[1]
        config = parse_args(SCRIPTS[script].Config, "", argv=words[2:])
        assert config.seed == 1
        assert config.crm == crm
        if script == "evaluate.py":
            assert config.data == "demo/data"
            assert config.completions == 4
        else:
            assert config.data == data
            crm = f"w/{name}-1/step_{3 * experiment.longer:06d}"
    assert (crm == "w/careless") == (name == "careless")
    assert (data == "w/seen") == experiment.seen_only


def test_every_table_is_of_runs_that_are_there():
    assert {name for names in TABLES.values() for name in names} <= set(RUNS)


def test_the_listed_commands_are_those_that_run():
    out, _ = run("-m paper --list --seeds 1 --only soft,sft-ood")
    lines = out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("python train_grpo.py @recipes/demo.args --crm demo/crm")
    assert lines[0].endswith("--mode soft")
    assert f"python -m paper.subset --data demo/data --supercategories '{SEEN}'" in lines[2]
    args = Namespace(**vars(ARGS) | {"work": "runs/paper", "steps": 80, "max_new_tokens": 128})
    args.sft_flags = "--batch 12 --lr 1e-4"
    assert lines[2:] == [shown(command) for command in commands("sft-ood", 0, args)]


def test_an_unknown_run_is_one_line():
    _, error = run("-m paper --only nonsense", check=2)
    assert "--only nonsense: not one of start" in error


def test_a_command_is_done_once_its_last_file_is_there(tmp_path):
    args = Namespace(**vars(ARGS) | {"work": str(tmp_path)})
    training, scoring = commands("sft", 0, args)
    assert not training.is_done
    (tmp_path / "sft-0/step_000003").mkdir(parents=True)
    assert training.is_done
    assert not scoring.is_done  # evaluate.py finds out by itself


# ---------------------------------------------------------------- what a result keeps


@pytest.mark.parametrize(
    "think, answer, expected",
    [
        ("<think>a</think>", "{answer}", True),
        ("", "{answer}", False),
        ("<think>a", "{answer}", False),
        ("<think>a</think>", "", False),
        ("<think>a</think>", "{torn}", False),
    ],
)
def test_a_completion_is_well_formed_with_both_blocks(think, answer, expected):
    whole = write_answer((1, 2, 3, 4), ((1, 2), (3, 4)))
    text = think + answer.replace("{answer}", whole).replace("{torn}", whole.replace("}", ""))
    completion = {"text": text, "problem": parse_answer(text).problem}
    assert well_formed({}, completion) == expected


def test_a_result_keeps_a_questions_scores():
    text = "<think>a</think>" + write_answer((0, 0, 10, 10), ((2, 2), (7, 7)))
    completion = {
        "text": text,
        "bbox": (0, 0, 10, 10),
        "points": ((2, 2), (7, 7)),
        "problem": "",
    }
    p = {
        "id": "q",
        "image": "digest",
        "supercategory": "Eye",
        "wording": "seen",
        "names": [],
        "asked": ["bbox", "points"],
        "truth": {"bbox": (0, 0, 10, 30), "points": ((2, 2), (7, 7))},
        "completions": [completion],
        "kept": 0,
    }
    row = question_row(p)
    assert row["id"] == "q"
    assert row["image"] == "digest"
    assert row["formed"] == 1
    assert row["iou"] == pytest.approx(1 / 3, abs=1e-4)
    assert row["pdice"] == 1
    assert row["named"] is None


# ---------------------------------------------------------------- data sets of some rows


def test_a_subset_has_the_rows_of_the_super_categories_as_they_are(tmp_path):
    run("-m paper.subset --data demo/data --supercategories 'Brain|Eye' --out", tmp_path)
    found = load_samples(tmp_path, "train")
    expected = []
    for row in load_samples(ROOT / "demo/data", "train").rows:
        if row["supercategory"] in ("Brain", "Eye"):
            expected.append(row["id"])
    assert found.ids() == expected
    assert found[0].image.size[0] >= 112
    assert [file.name for file in tmp_path.iterdir()] == ["train.parquet"]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--data nowhere --supercategories Brain", "--data nowhere: no train*.parquet in there"),
        ("--data demo/data --supercategories X", "--supercategories X: no row has such"),
    ],
)
def test_a_subset_of_nothing_is_one_line(tmp_path, flags, says):
    _, error = run("-m paper.subset", flags, "--out", tmp_path / "out", check=2)
    assert error.startswith(f"error: {says}")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_sixth_training_row_is_held_out_for_the_rate(tmp_path):
    hold_out(ROOT / "demo/data", tmp_path)
    ids = load_samples(ROOT / "demo/data", "train").ids()
    assert load_samples(tmp_path, "test").ids() == ids[::6]
    assert len(load_samples(tmp_path, "train")) == len(ids) - len(ids[::6])
    assert pq.read_schema(tmp_path / "test.parquet").names[0] == "data_source"
