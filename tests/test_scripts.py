"""The scripts as a newcomer runs them: the README's commands, training, stopping, resuming."""

import contextlib
import functools
import io
import itertools
import json
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Script
from PIL import Image
from safetensors.torch import load_file

import evaluate
import infer
import train_grpo
import train_sft
from bench.random_model import config_of
from crm import load_crm
from data import load_samples
from runtime import run as run_module
from runtime.cli import ROOT, dashed, parse_args
from runtime.files import read_jsonl
from runtime.parallel import Ranks

README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = {
    "train_grpo.py": train_grpo,
    "train_sft.py": train_sft,
    "infer.py": infer,
    "evaluate.py": evaluate,
}
FROZEN_VISION = '--trainable "language_model|lm_head"'
SMALL = (
    "--prompts 4 --group 4 --minibatches 2 --max-new-tokens 110 --eval-every -1 "
    "--lr 1e-4 --schedule constant"
)


def run(*command: str | Path, check: int = 0, **options: Any) -> tuple[str, str]:
    """Runs a script in a process of its own. Returns its stdout and stderr. check: its status."""
    script = Script(*command, **options)
    out, error = script.communicate(timeout=400)
    assert script.returncode == check, (command, script.returncode, out[-2000:], error[-3000:])
    return out, error


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def without_times(row: dict) -> dict:
    timed = ("seconds", "peak", "tokens_per")
    return {key: value for key, value in row.items() if not key.startswith(timed)}


# ---------------------------------------------------------------- the README's commands


def readme_commands() -> list[list[str]]:
    """Returns the words of each command in the README's shell blocks."""
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                commands.append(words)
    return commands


def target_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """Returns what a command runs, "train_grpo.py" or "extras.serve", and what it gives it."""
    if "-m" in words:
        at = words.index("-m") + 1
        return words[at], words[at + 1 :]
    for at, word in enumerate(words):
        if word.endswith(".py"):
            return word, words[at + 1 :]
    raise ValueError(f"no Python in {words}")


COMMANDS = readme_commands()
PYTHON_COMMANDS = [words for words in COMMANDS if words[0] in ("python", "torchrun")]


@functools.cache
def help_of(target: str) -> str:
    """Returns what `python TARGET --help` prints."""
    out = io.StringIO()
    argv = sys.argv
    sys.argv = [target, "--help"]
    try:
        with (
            contextlib.redirect_stdout(out),
            warnings.catch_warnings(),
            pytest.raises(SystemExit) as exit_info,
        ):
            warnings.simplefilter("ignore")  # that a module is imported already
            if target.endswith(".py"):
                runpy.run_path(str(ROOT / target), run_name="__main__")
            else:
                runpy.run_module(target, run_name="__main__")
    finally:
        sys.argv = argv
    assert exit_info.value.code == 0
    return out.getvalue()


def test_the_readme_has_commands_of_every_kind() -> None:
    targets = {target_and_flags(words)[0] for words in PYTHON_COMMANDS}
    assert set(SCRIPTS) <= targets
    assert "data.py" in targets
    assert "torchrun" in {words[0] for words in COMMANDS}


@pytest.mark.parametrize("words", PYTHON_COMMANDS, ids=lambda words: " ".join(words)[:60])
def test_a_command_of_the_readme_is_one_that_its_script_takes(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    target, flags = target_and_flags(words)
    if target in SCRIPTS:
        parse_args(SCRIPTS[target].Config, "", argv=flags)
    else:
        for word in flags:
            if word.startswith("--"):
                assert f"{word} " in f"{help_of(target)} "
    for word in words:
        if word.startswith(("demo/", "recipes/")):
            assert (ROOT / word).exists()


@pytest.mark.skipif(not shutil.which("make"), reason="make is needed")
def test_each_make_target_of_the_readme_is_there_and_each_target_is_explained() -> None:
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    explained = {}
    for line in done.stdout.splitlines():
        _, target, *words = line.split()
        explained[target] = words
    makefile = (ROOT / "Makefile").read_text()
    assert list(explained) == re.findall(r"^\.PHONY: (\S+)$", makefile, re.MULTILINE)
    assert all(len(words) > 1 for words in explained.values())
    named = set(re.findall(r"\bmake ([a-z-]+)(?=`| )", README))
    assert {"setup", "demo", "test"} <= named
    assert {words[1] for words in COMMANDS if words[0] == "make"} <= set(explained)
    in_backticks = set(re.findall(r"`make ([a-z-]+)`", README))
    assert in_backticks <= set(explained)


def test_the_commands_of_the_makefile_are_ones_that_the_scripts_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    taken = []
    started = r"^\t\$\((?:RUN\)|VENV\)/bin/torchrun).*? (\w+\.py.*)$"
    for line in re.findall(started, makefile, re.MULTILINE):
        script, *flags = shlex.split(line)
        parse_args(SCRIPTS[script].Config, "", argv=flags)
        taken.append(script)
    assert taken[:2] == ["train_grpo.py", "infer.py"]  # make demo


def test_what_the_readme_installs_is_in_the_requirements() -> None:
    requirements = (ROOT / "requirements.txt").read_text()
    installs = [words for words in COMMANDS if "pip" in words]
    assert installs
    for words in installs:
        for before, word in itertools.pairwise(words):
            if before == "-r":
                assert (ROOT / word).is_file()
            elif "==" in word:
                assert word in requirements


def test_every_file_that_the_readme_names_is_there() -> None:
    linked = re.findall(r"\]\(([^)#]+)\)", README)
    in_backticks = re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|args|md|sh))`", README)
    local = [name for name in linked + in_backticks if not name.startswith(("http", "my."))]
    assert len(local) > 20
    for name in local:
        assert (ROOT / name).exists(), name


def test_every_command_of_extras_is_named_by_the_readmes_and_shows_its_help() -> None:
    table = (ROOT / "extras/README.md").read_text(encoding="utf-8")
    names = []
    for line in table.splitlines():
        if line.startswith("| `"):
            names += re.findall(r"`(\w+)`", line.split("|")[1])
    assert {"scans", "serve", "rollouts", "predictions", "oracle", "convert"} <= set(names)
    assert all(f"`{name}`" in README for name in names)
    for name in names:
        assert "usage:" in help_of(f"extras.{name}"), name


def test_every_flag_that_the_readme_names_is_one_of_ours() -> None:
    of_torchrun_and_pip = {"--nproc-per-node", "--no-deps", "--no-build-isolation"}
    known = set(of_torchrun_and_pip) | {"--help"}
    for script in SCRIPTS.values():
        known |= {dashed(name) for name in script.Config.__dataclass_fields__}
    targets = {target_and_flags(words)[0] for words in PYTHON_COMMANDS}
    for target in targets | {"bench"}:
        known |= set(re.findall(r"--[a-z][a-z-]+", help_of(target)))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README))
    assert len(named) > 20
    assert named <= known, named - known


# ---------------------------------------------------------------- its commands, run


@pytest.fixture(scope="module")
def readme_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with what the README's section on own data makes, a step of each training.

    Its row of samples.jsonl is repeated, with a picture, for both splits."""
    folder = tmp_path_factory.mktemp("readme")
    row = json.loads(re.search(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1])
    for name in ("images", "masks"):
        (folder / "mine" / name).mkdir(parents=True)
    mask = Image.new("L", (60, 60))
    mask.paste(255, (15, 20, 45, 40))
    mask.save(folder / "mine/masks" / row["mask"])
    Image.effect_noise((60, 60), 99).save(folder / "mine/images" / row["image"])
    splits = ["train"] * 4 + ["test"] * 2
    lines = [json.dumps(row | {"split": split}) for split in splits]
    (folder / "mine/samples.jsonl").write_text("\n".join(lines))

    smaller = {
        "train_sft.py": "--batch 2 --max-new-tokens 60",
        "train_grpo.py": "--prompts 2 --group 2 --minibatches 2 --max-new-tokens 60",
        "evaluate.py": "--max-new-tokens 60",
        "data.py": "",
    }
    section = [words for words in COMMANDS if "mine" in words]
    assert [target_and_flags(words)[0] for words in section] == [
        "data.py",
        "train_sft.py",
        "train_grpo.py",
        "evaluate.py",
    ]
    for words in section:
        target, flags = target_and_flags(words)
        placed = []
        for word in flags:
            word = word.replace("step_000100", "step_000001")
            if word == "100":
                word = "1"
            if word.startswith(("mine", "runs/", "eval/", "sheet.png")):
                word = str(folder / word)
            placed.append(word)
        run(target, shlex.join(placed), smaller[target])
    return folder


def test_the_readmes_way_from_own_data_to_a_table_works(readme_run: Path) -> None:
    assert Image.open(readme_run / "sheet.png").width > 0
    for name in ("warm", "own"):
        assert weights_of(readme_run / f"runs/{name}/step_000001")
    table = (readme_run / "eval/own/table.md").read_text()
    assert "IoU" in table
    assert len(read_jsonl(readme_run / "eval/own/predictions.jsonl")) == 2


def test_the_page_of_rollouts_is_made_of_a_run(readme_run: Path) -> None:
    run("-m extras.rollouts", readme_run / "runs/own")
    page = (readme_run / "runs/own/rollouts.html").read_text(encoding="utf-8")
    assert "What could the bright oval be?" in page


def test_the_readmes_question_about_a_picture_is_answered_with_box_points_and_mask(
    tmp_path: Path,
) -> None:
    (words,) = [words for words in COMMANDS if words[1] == "infer.py" and "demo/" in str(words)]
    image = words[words.index("--image") + 1]
    query = words[words.index("--query") + 1]
    out = tmp_path / "out"
    flags = shlex.join(["--image", image, "--query", query, "--completions", "4"])
    said, _ = run("infer.py", flags, "--out", out)
    result = json.loads((out / "result.json").read_text())
    W, H = Image.open(ROOT / image).size
    mask = np.asarray(Image.open(out / "mask.png"))
    assert mask.shape == (H, W)
    assert set(np.unique(mask)) <= {0, 255}
    assert result["mask_pixels"] == (mask == 255).sum()
    x1, y1, x2, y2 = result["bbox"]
    assert -W < x1 < x2 < 2 * W
    assert -H < y1 < y2 < 2 * H
    assert len(result["points"]) == 2
    assert result["reasoning"].strip()
    assert result["reasoning"].strip() in said
    assert result["problem"] == ""
    assert len(result["texts"]) == 4
    assert 0 <= result["agreement"] <= 1
    assert Image.open(out / "overlay.png").width >= W
    assert str(out / "overlay.png") in said


def test_the_exit_status_of_the_program_itself_is_2_and_the_flag_is_named_once(
    tmp_path: Path,
) -> None:
    image = tmp_path / "none.png"
    _, error = run("infer.py --query x --image", image, "--out", tmp_path / "out", check=2)
    assert error == f"error: --image {image} does not exist\n"
    assert not (tmp_path / "out").exists()


def test_the_exit_status_without_a_usable_completion_is_3(tmp_path: Path) -> None:
    image = "demo/images/brain_mr_axial.png"
    _, error = run(
        "infer.py --max-new-tokens 3 --query x --image", image, "--out", tmp_path, check=3
    )
    assert "no answer block" in error
    assert not (tmp_path / "mask.png").exists()


# ---------------------------------------------------------------- bad flags


def rejection(capfd: pytest.CaptureFixture, module: ModuleType, flags: str) -> str:
    """Returns the one line that a script says on its way out with status 2."""
    recipe = "recipes/demo.args" if module is train_grpo else None
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        argv = shlex.split(flags)
        module.main(parse_args(module.Config, "", argv, recipe=recipe, moved=module.MOVED))
    assert exit_info.value.code == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--group 1", "--group 1: must be at least 2"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--prompts 0", "--prompts 0: must be at least 1"),
        ("--minibatches 0", "--minibatches 0: must be at least 1"),
        ("--save-every -2", "--save-every -2: must be at least -1"),
        ("--seed -1", "--seed -1: must be at least 0"),
        ("--kl-coef -0.1", "--kl-coef -0.1: must be at least 0"),
        ("--max-new-tokens 0", "--max-new-tokens 0: must be at least 1"),
        ("--temperature 0", "--temperature 0.0: must be greater than 0"),
        (
            "--prompts 6 --minibatches 4",
            "--prompts 6: must be a multiple of ranks x --minibatches, 1 x 4, as an update takes "
            "whole groups; give --prompts 8 or another number of --minibatches",
        ),
        ("--coefficients box_iou", "--coefficients box_iou: give term=number"),
        ("--coefficients nonsense=1", "unknown reward term nonsense"),
        ("--coefficients mask_dice=1 --asm nowhere", "nowhere"),
        ("--resize 840", "--resize 840"),
        ("--prompt nowhere", "--prompt nowhere"),
        ("--trainable '*'", "--trainable *: not a regular expression"),
        ("--trainable nothing", "--trainable nothing: no parameter"),
        ("--data nowhere", "nowhere: no such file or folder"),
        ("--resume", "--resume: no checkpoint step_* in"),
        ("--crm ./nowhere", "nowhere"),
        ("--weights box_iou=2", "--weights has moved: it is called --coefficients"),
        ("--mask-truncated", "--mask-truncated has moved: a change of three lines"),
        ("--official", "python -m extras.official_rewards"),
    ],
)
def test_train_grpo_rejects_bad_flags_with_one_line_before_it_writes_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture, flags: str, says: str
) -> None:
    assert says in rejection(capfd, train_grpo, f"--out {tmp_path}/run {flags}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--epochs 0", "--epochs 0.0: must be greater than 0"),
        ("--warmup-ratio 2", "--warmup-ratio 2.0: must be at most 1"),
        ("--data nowhere", "nowhere: no such file or folder"),
        ("--weights box_iou=2", "--weights has moved: SFT has no reward"),
        ("--resume", "--resume: no checkpoint step_* in"),
    ],
)
def test_train_sft_rejects_bad_flags_with_one_line_before_it_writes_anything(
    tmp_path: Path, capfd: pytest.CaptureFixture, flags: str, says: str
) -> None:
    assert says in rejection(capfd, train_sft, f"--out {tmp_path}/run {flags}")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- recipes of the real model


@pytest.fixture(scope="module")
def config_of_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the real sizes' config.json and the embedded tokenizer: all of a base
    model but the weights. It remembers no settings of an earlier training."""
    folder = tmp_path_factory.mktemp("7b")
    config_of("7b").save_pretrained(folder)
    for file in (ROOT / "demo/crm").iterdir():
        if file.name not in ("config.json", "model.safetensors", "settings.json"):
            shutil.copy(file, folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}  # Qwen2.5-VL's own
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    "recipe, low, high", [("lora_7b", 20, 45), ("soft_7b", 30, 80), ("sft_7b", 30, 80)]
)
def test_every_training_recipe_of_7b_fits_its_gpu(
    recipe: str, low: float, high: float, config_of_7b: Path
) -> None:
    script = "train_sft" if recipe.startswith("sft") else "train_grpo"
    said, _ = run(
        f"-m bench.memory {script} @recipes/{recipe}.args --data demo/data --gpus 8 --crm",
        config_of_7b,
    )
    assert "8.29 billion parameters" in said
    assert "PFLOP per step" in said
    gigabytes = float(re.search(r"most at once \| (\S+)", said)[1])
    assert low < gigabytes < high


# ---------------------------------------------------------------- GRPO


def test_four_steps_equal_two_and_two_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    cut = tmp_path / "cut"
    flags = f"{SMALL} --coefficients mask_dice=1"
    run("train_grpo.py", flags, "--steps 4 --save-every 2 --out", whole)
    run("train_grpo.py", flags, "--steps 2 --out", cut)
    run("train_grpo.py", flags, "--steps 4 --resume --out", cut, curves=True)

    start = weights_of(ROOT / "demo/crm")
    of_whole = weights_of(whole / "step_000004")
    of_cut = weights_of(cut / "step_000004")
    assert of_whole.keys() == of_cut.keys()
    for name, weight in of_whole.items():
        assert torch.equal(weight, of_cut[name]), name
    moved = [
        name for name, value in start.items() if not torch.equal(of_whole[name], value.float())
    ]
    assert moved

    rows = read_jsonl(whole / "metrics.jsonl")
    resumed_rows = read_jsonl(cut / "metrics.jsonl")
    assert [without_times(row) for row in rows] == [without_times(row) for row in resumed_rows]
    assert rows[0]["logp_gap"] < 1e-4
    assert 0 <= rows[0]["mask_dice"] <= 1
    assert rows[0]["seconds"] > 0
    assert rows[0]["entropy"] > 0
    for name in ("config.json", "curves.png", "step_000004/trainer.json"):
        assert (cut / name).stat().st_size > 0
    shown = read_jsonl(whole / "best_and_worst.jsonl")[0]
    assert shown["best"]["reward"] >= shown["worst"]["reward"]
    assert "text" in shown["best"]

    _, error = run("train_grpo.py", SMALL, "--out", whole, check=2)  # never written over
    assert "--resume" in error


@pytest.mark.parametrize("flags", ["", "--lora-rank 4", "--offload --checkpointing"])
def test_the_other_family_resumes_bit_for_bit(flags: str, qwen3: Path, tmp_path: Path) -> None:
    """A random tiny Qwen3-VL, to which the entropy bonus gives a gradient."""
    flags = f"{SMALL} --crm {qwen3} --max-new-tokens 12 --entropy-coef 0.1 {flags}"
    run("train_grpo.py", flags, "--steps 2 --save-every 1 --out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/step_000002")
    run("train_grpo.py", flags, "--steps 2 --save-every 1 --resume --out", tmp_path / "cut")
    of_whole = weights_of(tmp_path / "whole/step_000002")
    of_cut = weights_of(tmp_path / "cut/step_000002")
    start = weights_of(qwen3)
    assert of_whole.keys() == of_cut.keys() == start.keys()
    assert all(torch.equal(weight, of_cut[name]) for name, weight in of_whole.items())
    assert any(not torch.equal(weight, start[name]) for name, weight in of_whole.items())
    settings = json.loads((tmp_path / "cut/step_000002/settings.json").read_text())
    assert settings["coordinates"] == "norm1000"
    run(
        "evaluate.py --limit 2 --max-new-tokens 8 --asm none --crm",
        tmp_path / "cut/step_000002",
        "--data demo/data --out",
        tmp_path / "eval",
    )


def test_every_switch_of_a_study_changes_the_run_and_none_breaks_it(tmp_path: Path) -> None:
    run(
        "train_grpo.py",
        SMALL,
        "--mode hard --norm none --agg constant --kl k2 --clip-high 0.28 --dual-clip 0",
        "--resample 1 --checkpointing --inner-epochs 2 --schedule cosine --warmup 1",
        "--pack-tokens 400 --prompt direct --temperature 0.8 --resize square:112",
        FROZEN_VISION,
        "--steps 2 --out",
        tmp_path / "a",
    )
    run(
        "train_grpo.py",
        SMALL,
        "--kl-coef 0 --norm batch --agg token --ratio sequence --lora-rank 4 --eval-every 0",
        "--eval-limit 2 --coefficients mask_dice=1 --steps 1 --out",
        tmp_path / "b",
    )
    a = read_jsonl(tmp_path / "a/metrics.jsonl")[-1]
    b = read_jsonl(tmp_path / "b/metrics.jsonl")[-1]
    assert a["reward"] != b["reward"]
    assert "kl" in a
    assert "kl" not in b
    assert a["grad_norm"] > 0
    assert b["grad_norm"] > 0
    end = weights_of(tmp_path / "a/step_000002")
    moved = set()
    for name, weight in weights_of(ROOT / "demo/crm").items():
        if not torch.equal(weight.float(), end[name]):
            moved.add(name)
    assert moved
    assert not [name for name in moved if "visual" in name]


def test_neither_the_size_of_packs_nor_offloading_changes_a_number(tmp_path: Path) -> None:
    """Of two steps with four updates each, the first to rounding. The second samples from weights
    that differ in their last digits, and one draw at the edge of a token's probability makes
    another completion."""
    flags = f"{SMALL} {FROZEN_VISION} --inner-epochs 2 --steps 2 --save-every 1 --norm none --out"
    run("train_grpo.py", flags, tmp_path / "fast")
    run("train_grpo.py --pack-tokens 1 --offload", flags, tmp_path / "slow")
    of_fast = read_jsonl(tmp_path / "fast/metrics.jsonl")
    of_slow = read_jsonl(tmp_path / "slow/metrics.jsonl")
    for fast, slow, bound in zip(of_fast, of_slow, (1e-4, 0.1), strict=True):
        for key in ("reward", "length", "entropy", "kl", "loss", "grad_norm"):
            assert fast[key] == pytest.approx(slow[key], rel=bound, abs=1e-3 * bound), key
    start = weights_of(ROOT / "demo/crm")
    fast = weights_of(tmp_path / "fast/step_000001")
    slow = weights_of(tmp_path / "slow/step_000001")
    moved = max((fast[name] - start[name].float()).abs().max() for name in fast)
    apart = max((fast[name] - slow[name]).abs().max() for name in fast)
    assert moved > 5e-5
    assert apart < 0.05 * moved


def test_bad_gradients_are_skipped_and_a_run_of_them_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    loss = train_grpo.grpo_loss
    calls = []

    def broken(*args: Any, **options: Any) -> tuple:
        """Not finite from the third step on: a step has four groups."""
        calls.append(1)
        value, stats = loss(*args, **options)
        factor = float("nan") if len(calls) > 8 else 1.0
        return value * factor, stats

    monkeypatch.setattr(train_grpo, "grpo_loss", broken)
    monkeypatch.setattr(run_module, "MAX_SKIPPED", 2)
    argv = shlex.split(f"{SMALL} --steps 9 --save-every 2 --out {tmp_path}/run")
    config = parse_args(train_grpo.Config, "", argv, recipe="recipes/demo.args")
    with pytest.raises(RuntimeError, match="2 steps in a row without a finite gradient"):
        train_grpo.main(config)
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in rows] == [0, 0, 2, 2]
    good = weights_of(tmp_path / "run/step_000002")
    last = weights_of(tmp_path / "run/step_000004")
    for name, weight in good.items():
        assert torch.equal(weight, last[name])
    assert capfd.readouterr().out.count("update was skipped: lower --lr") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_what_is_done_be_saved_and_the_status_is_0(
    tmp_path: Path, number: int
) -> None:
    metrics = tmp_path / "run/metrics.jsonl"
    process = Script("train_grpo.py", SMALL, "--steps 500 --out", tmp_path / "run")
    deadline = time.time() + 120
    while not metrics.exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    said, error = process.communicate(60)
    assert process.returncode == 0, error
    last = read_jsonl(metrics)[-1]["step"]
    assert last < 500
    assert f"stopped at {last} of 500 steps; the same command with --resume continues" in said
    assert weights_of(tmp_path / f"run/step_{last:06d}")


def test_a_minute_of_grpo_learns_its_questions_by_more_than_chance(tmp_path: Path) -> None:
    """Four training questions, again and again: rewards alone teach where their targets are."""
    rows = pq.read_table(ROOT / "demo/data/train.parquet").slice(0, 4)
    (tmp_path / "data").mkdir()
    pq.write_table(rows, tmp_path / "data/train.parquet")
    run(
        "train_grpo.py @recipes/demo.args --crm demo/crm --steps 16 --prompts 4 --group 16",
        "--schedule constant --eval-every -1 --data",
        tmp_path / "data",
        "--out",
        tmp_path / "run",
    )
    examples = load_samples(tmp_path / "data", "train")
    found = {}
    for name, folder in (("before", "demo/crm"), ("after", tmp_path / "run/step_000016")):
        kinds = {"sampled": (32, 1.0)}
        scored = evaluate.held_out(load_crm(folder), examples, kinds, "soft", {}, Ranks(), 128)
        found[name] = {key: np.mean([row[key] for row in scored]) for key in ("reward", "iou")}
    # means of 128 completions: a difference of two rewards has a standard deviation of about 0.06
    assert found["after"]["reward"] - found["before"]["reward"] > 0.15
    assert found["after"]["iou"] > found["before"]["iou"]


# ---------------------------------------------------------------- supervised training


def test_sft_has_a_plausible_loss_and_resumes_exactly(tmp_path: Path) -> None:
    flags = (
        "--crm demo/crm --data demo/data --eval-every -1 --batch 8 --micro-batch 4 --lr 3e-4 "
        "--schedule constant"
    )
    run("train_sft.py", flags, "--steps 6 --out", tmp_path / "whole")
    run("train_sft.py", flags, "--steps 3 --out", tmp_path / "cut")
    run("train_sft.py", flags, "--steps 6 --resume --out", tmp_path / "cut", curves=True)
    assert (tmp_path / "cut/curves.png").exists()
    of_whole = weights_of(tmp_path / "whole/step_000006")
    of_cut = weights_of(tmp_path / "cut/step_000006")
    for name, weight in of_whole.items():
        assert torch.equal(weight, of_cut[name])
    losses = [row["loss"] for row in read_jsonl(tmp_path / "whole/metrics.jsonl")]
    assert len(losses) == 6
    assert all(0 < loss < 3 for loss in losses)


@pytest.mark.parametrize(
    "flags, is_learned", [("", True), ("--no-think", False), ("--prompt direct", False)]
)
def test_sft_learns_the_trace_where_it_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, is_learned: bool
) -> None:
    class Seen(Exception):
        pass

    def group_of(crm: Any, prompt: Any, texts: list[str]) -> None:
        raise Seen(texts[0])

    monkeypatch.setattr(train_sft, "group_of", group_of)
    usual = "--crm demo/crm --data demo/data --eval-every -1 --batch 1 --steps 1"
    argv = shlex.split(f"{usual} {flags} --out {tmp_path}")
    with pytest.raises(Seen) as seen:
        train_sft.main(parse_args(train_sft.Config, "", argv=argv))
    text = str(seen.value)
    assert text.startswith("<think>") == is_learned
    assert "<answer>" in text


@pytest.mark.parametrize(
    "flags, traces, warned",
    [("", 0, 1), ("", 1, 0), ("--prompt direct", 0, 0), ("--no-think", 0, 0)],
)
def test_sft_warns_once_where_the_prompt_asks_for_traces_and_no_row_has_one(
    tmp_path: Path, capfd: pytest.CaptureFixture, flags: str, traces: int, warned: int
) -> None:
    folder = tmp_path / "mine"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
        Image.effect_noise((60, 60), 99).save(folder / name / "a.png")
    lines = []
    for i in range(4):
        row = {"image": "a.png", "mask": "a.png", "query": "?"}
        if i < traces:
            row["think"] = "a disc"
        lines.append(json.dumps(row))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    argv = shlex.split(
        f"--crm demo/crm --batch 2 --steps 2 --save-every -1 {flags} --data {folder} "
        f"--out {tmp_path}/run"
    )
    train_sft.main(parse_args(train_sft.Config, "", argv=argv))
    assert capfd.readouterr().out.count("no training row has one") == warned
