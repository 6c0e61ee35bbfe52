"""The three rings: who imports whom, what may be deleted, and the names that outside code calls."""

import ast
import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import asm
import crm
import data
import infer
import metrics
import rewards
import sampling
import scoring
import train_grpo
import train_sft
from extras import official_rewards
from runtime import images, readers, run
from runtime.cli import ROOT
from runtime.registry import find

PAPER = ("rewards", "data", "crm", "sampling", "scoring", "train_grpo", "train_sft")
PAPER += ("asm", "metrics", "evaluate", "infer")
OUTER = ("extras", "paper", "bench", "demo", "learn", "tests", "tools")
REGISTRIES = {
    "readers": [readers.READERS, images.SCAN_READERS],
    "segmenters": [asm.SEGMENTERS],
    "answer formats": [data.ANSWER_FORMATS],
    "trackers": [run.TRACKERS],
    "what infer.py does afterwards": [infer.AFTERWARDS],
}


def files_of(*names: str) -> list[Path]:
    """Returns the Python files of some root modules and folders."""
    files = []
    for name in names:
        if (ROOT / f"{name}.py").is_file():
            files.append(ROOT / f"{name}.py")
        files += sorted((ROOT / name).rglob("*.py"))
    return files


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_by(file: Path, inside_functions: bool = True) -> set[str]:
    """Returns the modules that a file imports: "runtime.cli" for `from runtime.cli import flag`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree)) if inside_functions else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def first_parts(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def test_the_root_holds_the_paper_and_nothing_else():
    root = {file.stem for file in ROOT.glob("*.py")}
    assert root == {*PAPER, "test_rewards"}


@pytest.mark.parametrize("file", files_of(*PAPER), ids=lambda file: file.name)
def test_the_paper_imports_nothing_of_the_outer_ring(file):
    assert not first_parts(imported_by(file)) & set(OUTER)


@pytest.mark.parametrize("file", files_of("runtime"), ids=lambda file: file.name)
def test_plumbing_knows_nothing_of_the_paper(file):
    assert not first_parts(imported_by(file)) & {*PAPER, *OUTER}


def test_rewards_need_nothing_but_the_standard_library():
    assert first_parts(imported_by(ROOT / "rewards.py")) <= sys.stdlib_module_names


def test_there_are_no_import_circles():
    files = files_of(*PAPER, "runtime", "extras", "paper", "bench", "demo", "learn")
    modules = {module_of(file): file for file in files}
    arrows = {name: imported_by(file) & modules.keys() for name, file in modules.items()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in finished:
            return
        for target in sorted(arrows[name] - {name}):
            visit(target, (*path, name))
        finished.add(name)

    for name in sorted(arrows):
        visit(name, ())


def test_the_outer_ring_is_reached_through_five_registries_only():
    """No other string in rings 1 and 2 names a function of the outer ring."""
    known = {
        entry for tables in REGISTRIES.values() for table in tables for entry in table.values()
    }
    pattern = re.compile(r"(extras|paper|bench|learn|demo)(\.\w+)+")
    for file in files_of(*PAPER, "runtime"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                is_name = pattern.fullmatch(node.value) is not None
                assert not is_name or node.value in known, (file.name, node.value)


@pytest.mark.parametrize("name", REGISTRIES)
def test_what_a_registry_names_is_there(name):
    for table in REGISTRIES[name]:
        assert table
        for entry in table.values():
            assert find(entry) is not None


def test_an_entry_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match="there is no module extras.nothing here"):
        find("extras.nothing.read")
    with pytest.raises(ValueError, match="extras.coco has no nothing"):
        find("extras.coco.nothing")


def test_the_core_runs_without_the_packages_of_the_extras():
    lines = (ROOT / "requirements-extras.txt").read_text(encoding="utf-8").splitlines()
    packages = {line.split("==")[0].split("[")[0] for line in lines}
    assert {"pydicom", "nibabel", "highdicom"} < packages
    assert all("  # " in line for line in lines)  # a reason for each
    for file in files_of(*PAPER, "runtime"):
        assert not first_parts(imported_by(file)) & packages, file.name
    for file in files_of("extras"):  # imported there where they are used
        assert not first_parts(imported_by(file, inside_functions=False)) & packages, file.name


# ---------------------------------------------------------------- a copy without the outer ring


@pytest.fixture(scope="module")
def core_only(tmp_path_factory) -> Path:
    """A copy of the project without extras, paper, bench, learn and tests."""
    copy = tmp_path_factory.mktemp("core")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, copy)
    for folder in ("runtime", "recipes"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "demo").mkdir()
    for name in ("crm", "crm_grpo", "asm", "data", "images"):
        (copy / "demo" / name).symlink_to(ROOT / "demo" / name)
    return copy


@pytest.mark.parametrize(
    "command, result",
    [
        (
            "infer.py --image demo/images/fundus.png --query Where? --max-new-tokens 4 --out out",
            "out/result.json",
        ),
        (
            "train_grpo.py --steps 1 --prompts 2 --group 2 --max-new-tokens 4 --eval-every -1 "
            "--out run",
            "run/step_000001/model.safetensors",
        ),
        ("evaluate.py --limit 2 --max-new-tokens 4 --out eval", "eval/table.md"),
    ],
    ids=["infer", "train_grpo", "evaluate"],
)
def test_the_three_commands_run_without_the_outer_ring(core_only, command, result):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=core_only,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 3), done.stderr[-2000:]  # 3: four tokens are no answer
    assert (core_only / result).is_file()


def test_a_reader_that_was_deleted_is_one_line(core_only):
    (core_only / "coco.json").write_text("{}")
    done = subprocess.run(
        [sys.executable, "data.py", "coco.json"], cwd=core_only, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "error: extras.coco.read: there is no module extras here"


# ---------------------------------------------------------------- flags and names


def test_every_knob_of_training_stands_in_its_script():
    assert len(dataclasses.fields(train_grpo.Config)) <= 45
    for script in (train_grpo, train_sft):
        assert script.Config.__bases__ == (object,)


def test_lines_of_the_inner_rings_have_at_most_100_columns():
    for file in files_of(*PAPER, "runtime"):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            assert len(line) <= 100, f"{file.name}:{number}"


@pytest.mark.parametrize(
    "function, names",
    [
        (rewards.parse_answer, "text"),
        (rewards.reward_terms, "text gt_box gt_points"),
        (rewards.total_reward, "terms mode"),
        (rewards.box_iou, "a b"),
        (rewards.point_dice, "p g"),
        (official_rewards.reward_terms, "text gt_box gt_points"),
        (data.load_samples, "path split"),
        (data.load_image, "source"),
        (data.box_from_mask, "mask"),
        (data.keypoints_from_mask, "mask"),
        (data.fill_prompt, "template query"),
        (data.model_size, "size resize min_pixels max_pixels"),
        (crm.load_crm, "path device dtype"),
        (crm.CRM.encode, "self image prompt_text"),
        (crm.CRM.reference, "self"),
        (crm.CRM.save, "self path"),
        (sampling.sample, "crm prompts G max_new_tokens temperature seed"),
        (scoring.logp, "crm group rows temperature"),
        (asm.load_asm, "spec device"),
        (asm.ASM.segment, "self image boxes points"),
        (asm.overlay, "image mask bbox points"),
        (metrics.iou, "p completion"),
        (train_grpo.group_advantages, "rewards norm eps"),
        (train_grpo.token_weights, "mask agg max_tokens"),
        (
            train_grpo.grpo_loss,
            "logp old_logp ref_logp advantages weights clip_low clip_high dual_clip kl_coef kl",
        ),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_names_that_outside_code_calls(function, names):
    parameters = list(inspect.signature(function).parameters)
    assert parameters[: len(names.split())] == names.split()
