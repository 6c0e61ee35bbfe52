"""The driver of the experiments: its commands are commands, its tables are right."""

import json
from argparse import Namespace

import numpy as np
from PIL import Image
from test_scripts import run

import evaluate
import train_grpo
import train_sft
from paper.__main__ import well_formed
from paper.experiments import RUNS, TABLES, commands
from paper.report import CURVES, read_results, report
from rewards import parse_answer
from runtime.cli import parse_args


def result(folder, name, seed, iou, wording="seen", supercategory="Brain", **more):
    fixed = {
        "pdice": 0.5,
        "refused": 0.0,
        "dice_points": 0.1,
        "dice_box": 0.2,
        "dice_one": 0.3,
        "dice_both": 0.4,
    }
    questions = [
        {
            "id": f"q{i}",
            "supercategory": supercategory if i else "Eye",
            "wording": wording if i else "unseen",
            "iou": v,
            **fixed,
            **more,
        }
        for i, v in enumerate(iou)
    ]
    (folder / f"{name}-{seed}.json").write_text(
        json.dumps(
            {
                "name": name,
                "seed": seed,
                "date": "2026-01-01",
                "seconds": [30.0, 30.0],
                "commands": ["a", "b"],
                "curves": {key: [0.1, 0.2, 0.3] for key in CURVES},
                "questions": questions,
            }
        )
    )


def test_tables_average_answers_and_seeds_and_pair_the_questions(tmp_path):
    for seed, gain in ((0, 0.1), (1, 0.3)):
        result(tmp_path, "start", seed, [0.1, 0.2, 0.3])
        result(tmp_path, "soft", seed, [0.1 + gain, 0.2 + gain, 0.3 + gain])
    text = report(read_results(tmp_path))
    assert "| start | 2 | 20.0 | 50.0 | 10.0 | 20.0 | 40.0 | 0.0 |  | 20.0, 20.0 |" in text
    assert (
        "| soft | 2 | 40.0 | 50.0 | 10.0 | 20.0 | 40.0 | 0.0 | +20.0 [+20.0, +20.0] | 30.0, 50.0 |"
        in text
    )
    assert (
        f"2 of {len(RUNS)} runs, 4 with all seeds, 4 minutes" in text
        and "3 held-out questions" in text
    )
    # Brain was trained on, Eye not
    assert "| soft | +20.0 [+20.0, +20.0] | +20.0 [+20.0, +20.0] |" in text
    assert (
        "| start | 25.0 | 10.0 |  |  |" in text
        and "| soft | 45.0 | 30.0 | +20.0 [+20.0, +20.0]" in text
    )
    assert (
        "| soft | 10.0 | 20.0 | 30.0 | 40.0 | +10.0 [+10.0, +10.0] | +20.0 [+20.0, +20.0] |" in text
    )
    assert "improve on its start? **Yes**: +20.0 [+20.0, +20.0]; by seed +10.0, +30.0." in text
    assert "the first adds +10.0 [+10.0, +10.0]" in text
    assert "named right" not in text  # results without that score have no column for it


def test_runs_are_compared_over_the_seeds_that_both_have(tmp_path):
    result(tmp_path, "start", 0, [0.1, 0.2, 0.3])
    for seed, gain in ((0, 0.1), (1, 0.3)):
        result(
            tmp_path,
            "soft",
            seed,
            [0.1 + gain, 0.2 + gain, 0.3 + gain],
            iou_named=0.5 if seed else None,
        )
    text = report(read_results(tmp_path))
    assert "improve on its start? **One seed only**: +10.0 [+10.0, +10.0]; by seed +10.0." in text
    # named by the second seed only: its IoU there
    assert "| soft | 2 | 40.0 | 50.0 | 50.0 | 10.0 |" in text


def test_what_was_named_right_is_reported_where_it_was_scored(tmp_path):
    """IoU of completions that name the target is undefined where none does: those questions are
    left out."""
    result(tmp_path, "start", 0, [0.1, 0.2], named=0.25, iou_named=None)
    result(tmp_path, "soft", 0, [0.1, 0.4], named=0.75, iou_named=0.5)
    text = report(read_results(tmp_path))
    assert "| run | seeds | IoU | pDice | named right | IoU, named right |" in text
    assert "| start | 1 | 15.0 | 50.0 | 25.0 | – |" in text
    assert "| soft | 1 | 25.0 | 50.0 | 75.0 | 50.0 |" in text
    assert "name the target more often? **One seed only**: +50.0 [+50.0, +50.0]" in text
    assert "Refusals (completions with a problem): start 0.0, soft 0.0" in text.replace(" %", "")


def test_a_verdict_needs_an_interval_without_0_and_seeds_that_agree(tmp_path):
    def verdict():
        return report(read_results(tmp_path)).split("improve on its start? **")[1].split("**")[0]

    result(tmp_path, "start", 0, [0.2, 0.2, 0.2])
    result(tmp_path, "soft", 0, [0.4, 0.4, 0.4])
    assert verdict() == "One seed only"
    result(tmp_path, "start", 1, [0.2, 0.2, 0.2])
    for iou, word in (
        ([0.3, 0.3, 0.3], "Yes"),
        ([0.1, 0.1, 0.1], "Not shown"),
        ([0.1, 0.1, 0.6], "Yes"),
    ):
        result(tmp_path, "soft", 1, iou)  # the second is better on average, and worse by itself
        assert verdict() == word
    for seed in (0, 1):
        result(tmp_path, "soft", seed, [0.1, 0.1, 0.1])
    assert verdict() == "No, it is worse"


def test_every_command_of_every_run_parses():
    args = Namespace(
        work="w",
        torchrun="",
        crm="demo/crm",
        data="demo/data",
        asm="demo/asm",
        limit=0,
        steps=3,
        flags="@recipes/demo.args",
        sft_flags="--batch 8",
        max_new_tokens=64,
    )
    scripts = {"train_grpo.py": train_grpo, "train_sft.py": train_sft, "evaluate.py": evaluate}
    for name, experiment in RUNS.items():
        *training, scoring = commands(name, 1, args)
        start = "w/careless" if experiment.careless else "demo/crm"
        if experiment.careless:
            made, *training = training
            assert made[1:3] == ["-m", "paper.careless"] and made[-1] == start
        for command in (*training, scoring):
            config = parse_args(scripts[command[1]].Config, "", argv=command[2:])
            assert config.seed == 1 and (command is scoring or config.crm == start)
        assert parse_args(evaluate.Config, "", argv=scoring[2:]).crm == (
            f"w/{name}-1/step_{3 * experiment.longer:06d}" if training else start
        )
    assert {name for names in TABLES.values() for name in names} <= set(RUNS)


def test_an_unknown_run_is_refused():
    _, error = run("-m paper --only nonsense", check=2)
    assert "--only nonsense: not one of start" in error


def test_curves_are_drawn_of_what_trained_with_grpo(tmp_path):
    for name in ("start", "sft", "soft"):
        result(tmp_path, name, 0, [0.1, 0.2])
    run("-m paper --report --results", tmp_path)
    assert "![curves](pictures/curves.png)" in (tmp_path / "RESULTS.md").read_text()
    with Image.open(tmp_path / "curves.png") as picture:
        assert min(picture.size) > 400 and len(np.unique(np.asarray(picture), axis=None)) > 50


def test_a_completion_is_well_formed_with_both_blocks():
    think, answer = (
        "<think>a</think>",
        '<answer>{"bbox": [1, 2, 3, 4], "points_1": [1, 2], "points_2": [3, 4]}</answer>',
    )
    for text, expected in (
        (think + answer, True),
        (answer, False),
        ("<think>a" + answer, False),
        (think, False),
        (think + answer.replace("}", ""), False),
    ):
        completion = {"text": text, "problem": parse_answer(text).problem}
        assert well_formed({}, completion) == expected


def test_a_command_that_was_not_repeated_has_no_seconds(tmp_path):
    result(tmp_path, "start", 0, [0.1, 0.2])
    file = tmp_path / "start-0.json"
    file.write_text(file.read_text().replace("[30.0, 30.0]", "[null, 60.0]"))
    text = report(read_results(tmp_path))
    assert "1 minutes in all" in text and "a    # made before\nb    # 60 s\n" in text
