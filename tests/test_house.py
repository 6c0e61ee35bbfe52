"""The house: who imports whom, how long a file and a function may be, and the names that outside code may call."""

import ast
import inspect
import sys

import pytest

import asm
import crm
import data
import rewards
import sampling
import scoring
import train_grpo
from runtime.cli import ROOT

TOP = sorted(path for path in ROOT.glob("*.py") if not path.name.startswith("test_"))
RUNTIME = sorted((ROOT / "runtime").glob("*.py"))
OURS = {path.stem for path in TOP} | {"runtime", "extras", "tests", "bench", "paper", "demo"}
READING_PATH = ("rewards.py", "crm.py", "sampling.py", "scoring.py", "train_grpo.py")
SCRIPTS = {"train_grpo", "train_sft", "infer", "evaluate"}


def imports(path, inside_functions=True) -> set[str]:
    """The first parts of the names that a file imports."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def test_rewards_need_nothing_but_the_standard_library():
    assert imports(ROOT / "rewards.py") <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "file, allowed",
    [
        ("data.py", {"rewards", "runtime", "extras"}),
        ("crm.py", {"data", "runtime"}),
        ("sampling.py", {"crm"}),
        ("scoring.py", {"crm"}),
        ("asm.py", {"runtime", "extras"}),
    ],
)
def test_arrows_point_one_way(file, allowed):
    assert imports(ROOT / file) & OURS <= allowed
    assert "extras" not in imports(ROOT / file, inside_functions=False) or file == "data.py"


def test_nothing_at_the_top_or_in_runtime_imports_a_script_or_what_stands_beside_the_house():
    for path in [*TOP, *RUNTIME]:
        assert not imports(path) & (SCRIPTS | {"tests", "bench", "paper", "demo"}), path.name
    for path in RUNTIME:
        assert "extras" not in imports(path, inside_functions=False), path.name


def test_the_core_runs_without_the_packages_of_the_tools():
    lines = (ROOT / "requirements-extras.txt").read_text().splitlines()
    packages = {line.split("==")[0].split("[")[0] for line in lines}
    assert {"pydicom", "nibabel", "highdicom"} < packages and all(
        "  # " in line for line in lines
    )  # a reason each
    for path in [*TOP, *RUNTIME]:
        assert not imports(path) & packages, path.name
    for path in (ROOT / "extras").glob("*.py"):  # there, where they are used
        assert not imports(path, inside_functions=False) & packages, path.name


def test_files_and_functions_can_be_read_in_one_sitting():
    for path in [*TOP, *RUNTIME]:
        source = path.read_text()
        assert source.count("\n") <= 350, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (path.name, node.name) != (
                "train_grpo.py",
                "main",
            ):
                assert node.end_lineno - node.lineno < 70, (path.name, node.name)


def test_the_algorithm_and_the_house_can_be_read_in_an_afternoon():
    lines = {path: path.read_text().count("\n") for path in [*TOP, *RUNTIME]}
    assert sum(lines[ROOT / name] for name in READING_PATH) <= 1250
    assert sum(lines.values()) <= 3790


def test_the_loop_of_grpo_has_at_most_90_lines():
    (main,) = (
        node
        for node in ast.parse((ROOT / "train_grpo.py").read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    (loop,) = (node for node in main.body if isinstance(node, ast.For))
    assert loop.end_lineno - loop.lineno < 90


@pytest.mark.parametrize(
    "function, names",
    [
        (rewards.parse_answer, "text official"),
        (rewards.reward_terms, "text gt_box gt_points official"),
        (rewards.total_reward, "terms mode weights"),
        (rewards.box_iou, "a b"),
        (rewards.point_dice, "p g official"),
        (data.load_samples, "path split"),
        (data.fill_prompt, "template query"),
        (data.model_size, "size resize min_pixels max_pixels"),
        (crm.load_crm, "path device dtype"),
        (crm.CRM.encode, "self image prompt_text"),
        (sampling.sample, "crm prompts G max_new_tokens temperature seed"),
        (scoring.logp, "crm group rows temperature"),
        (asm.load_asm, "spec device"),
        (asm.ASM.segment, "self image boxes points"),
        (asm.overlay, "image mask bbox points"),
        (train_grpo.group_advantages, "rewards norm eps"),
        (train_grpo.token_weights, "mask agg max_tokens"),
        (
            train_grpo.grpo_loss,
            "logp old_logp ref_logp advantages weights clip_low clip_high dual_clip kl_coef kl",
        ),
    ],
)
def test_names_that_outside_code_calls(function, names):
    assert list(inspect.signature(function).parameters)[: len(names.split())] == names.split()
