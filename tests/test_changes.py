"""The usual changes: each is made in a copy of the project, and its numbers are checked by hand.

A check runs in a process of its own, in the copy, where every other file is the project's own.
"""

import inspect
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
from conftest import Script

import train_grpo
from learn import changes
from learn.changes import FLAGS, PATCHES, Patch
from rewards import parse_coefficients, reward_formula
from runtime.cli import ROOT, parse_args

MOST = 10  # lines of a patch
# What is tested of a changed file, without tests that start a script: conftest.py forks these off
# a process that has imported the unchanged files.
TESTS = {
    "rewards.py": "test_rewards.py",
    "train_grpo.py": "tests/test_grpo.py",
    "data.py": "tests/test_data.py",
    "runtime/readers.py": "tests/test_readers.py",
    "metrics.py": "tests/test_metrics.py",
    "asm.py": "tests/test_asm.py",
}


# ---------------------------------------------------------------- a copy of the project


def copied_with(patches: Iterable[Patch], folder: Path) -> Path:
    """Returns a folder with the project and some changes. What no patch touches is a link."""
    for entry in ROOT.iterdir():
        if entry.suffix == ".py":
            shutil.copy(entry, folder)
        elif entry.name == "runtime":
            shutil.copytree(entry, folder / "runtime")
        elif entry.name not in (".git", "runs", "out", "build", "eval"):
            (folder / entry.name).symlink_to(entry)
    for patch in patches:
        changes.apply(patch, folder)
    return folder


def import_from(copy: Path) -> None:
    """Forgets what was imported of the project, so that it is imported from a copy."""
    elsewhere = []
    for path in sys.path:
        if Path(path or ".").resolve() not in (ROOT, ROOT / "tests"):
            elsewhere.append(path)
    sys.path = [str(copy), *elsewhere]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and Path(file).is_relative_to(ROOT) and "site-packages" not in file:
            del sys.modules[name]
    os.chdir(copy)
    sys.dont_write_bytecode = True


def run_in(copy: Path, *command: str | Path) -> str:
    """Returns what a script prints that runs in a copy. It must end with status 0."""
    script = Script(*command, before=partial(import_from, copy))
    said, errors = script.communicate(timeout=400)
    if script.returncode != 0:
        pytest.fail(f"status {script.returncode}\n{said[-4000:]}\n{errors[-4000:]}", pytrace=False)
    return said


# ---------------------------------------------------------------- checks of one change each
# Their source is run in a copy, so each of them imports what it needs.


def check_rloo() -> None:
    import torch

    from train_grpo import group_advantages

    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 3.0], [0.1, 0.1, 0.1]])
    # 1 - (2 + 3) / 2, 2 - (1 + 3) / 2, 3 - (1 + 2) / 2
    expected = torch.tensor([[-1.5, 0.0, 1.5], [-1.5, -1.5, 3.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(group_advantages(rewards, "loo"), expected)


def check_maxrl() -> None:
    import torch

    from train_grpo import group_advantages

    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    # one success in four counts (1 - 1/4) / (1/4) = 3, three count (1 - 3/4) / (3/4) = 1/3 each
    third = 1 / 3
    expected = [[3.0, -1.0, -1.0, -1.0], [third, third, third, -1.0], [0.0, 0.0, 0.0, 0.0]]
    torch.testing.assert_close(
        group_advantages(rewards, "mean"), torch.tensor(expected), atol=1e-4, rtol=0
    )


def check_gdpo() -> None:
    import torch

    from train_grpo import gdpo_advantages, group_advantages

    # two questions, two completions each; the second one of each is better by one or by two terms
    first_term = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    second_term = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    # the sums are 0, 1 and 0, 2: GRPO cannot tell one term from two
    grpo = group_advantages(first_term + second_term)
    torch.testing.assert_close(grpo[0], grpo[1])
    # with a = 1 / sqrt(2) for each term the sums are -a, a and -2a, 2a, of variance 10 a² / 3
    A = gdpo_advantages(torch.stack([first_term, second_term]), [1.0, 1.0])
    scale = 0.5**0.5 / (10 * 0.5 / 3) ** 0.5
    expected = torch.tensor([[-scale, scale], [-2 * scale, 2 * scale]])
    torch.testing.assert_close(A, expected, atol=1e-5, rtol=0)
    # a coefficient weighs a term's advantage: -a, a and -4a, 4a
    weighed = gdpo_advantages(torch.stack([first_term, second_term]), [1.0, 3.0])
    torch.testing.assert_close(weighed[1] / weighed[0], torch.tensor([4.0, 4.0]))


def check_cispo() -> None:
    import math

    import torch

    from train_grpo import grpo_loss

    old_logp = torch.tensor([[0.1, 0.5]]).log()
    A = torch.ones(1)
    weights = torch.full((1, 2), 0.5)
    bounds = {"clip_low": 1.0, "clip_high": 4.0, "kl_coef": 0.0}

    def loss_and_gradient(cispo: bool) -> tuple[float, torch.Tensor]:
        logp = torch.tensor([[0.8, 0.5]]).log().requires_grad_()
        loss, _ = grpo_loss(logp, old_logp, None, A, weights, **bounds, cispo=cispo)
        loss.backward()
        return loss.item(), logp.grad

    # the first ratio is 8: PPO's clip at 5 has no gradient there, and CISPO has 5 times that of 1
    _, gradient = loss_and_gradient(cispo=False)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, -0.5]]))
    loss, gradient = loss_and_gradient(cispo=True)
    torch.testing.assert_close(gradient, torch.tensor([[-2.5, -0.5]]))
    assert abs(loss + 0.5 * (5 * math.log(0.8) + math.log(0.5))) < 1e-6


def check_sapo() -> None:
    import math

    import torch

    from train_grpo import grpo_loss

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    logp = torch.tensor([[1.0, 2.0], [1.0, 2.0]]).log().requires_grad_()  # ratios 1 and 2
    A = torch.tensor([1.0, -1.0])
    old_logp = torch.zeros(2, 2)
    loss, _ = grpo_loss(logp, old_logp, None, A, torch.ones(2, 2), kl_coef=0.0, sapo=True)
    loss.backward()
    gains = [4 * sigmoid(0), 4 * sigmoid(1), -4 / 1.05 * sigmoid(0), -4 / 1.05 * sigmoid(1.05)]
    assert abs(loss.item() + sum(gains)) < 1e-5
    # 4 s (1 - s) rho A, with s the sigmoid: at rho = 1 it is A, as without any clip
    above = 4 * sigmoid(1) * (1 - sigmoid(1)) * 2
    below = 4 * sigmoid(1.05) * (1 - sigmoid(1.05)) * 2
    torch.testing.assert_close(logp.grad, torch.tensor([[-1.0, -above], [1.0, below]]))


def check_kl_times_ratio() -> None:
    import math

    import torch

    from train_grpo import grpo_loss

    # ratio 2, and x = log(pi_ref/pi) = -log 2
    logp = torch.tensor([[0.5]]).log()
    quarter = torch.tensor([[0.25]]).log()
    one = torch.ones(1, 1)
    _, stats = grpo_loss(logp, quarter, quarter, torch.zeros(1), one, kl_times_ratio=True)
    assert abs(stats["kl"] - 2 * (0.5 + math.log(2) - 1)) < 1e-6

    # in expectation over pi_old it is the KL, and so is its gradient, which k3's alone is not
    torch.manual_seed(0)
    logits = torch.randn(1, 6, requires_grad=True)
    old_logp, ref_logp = torch.randn(2, 1, 6).log_softmax(-1)
    logp = logits.log_softmax(-1)
    kl = (logp.exp() * (logp - ref_logp)).sum()
    expected = torch.autograd.grad(kl, logits, retain_graph=True)[0]
    far = {}
    for kl_times_ratio in (True, False):
        loss, stats = grpo_loss(
            logp,
            old_logp,
            ref_logp,
            torch.zeros(1),
            old_logp.exp(),
            kl_coef=1.0,
            kl_times_ratio=kl_times_ratio,
        )
        gradient = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        far[kl_times_ratio] = (gradient - expected).abs().max()
        if kl_times_ratio:
            assert abs(stats["kl"] - kl) < 1e-5
    assert far[True] < 1e-5
    assert far[False] > 0.01


def check_kl_abs() -> None:
    import torch

    from train_grpo import grpo_loss

    logp = torch.tensor([[-1.0, -2.0]])
    ref_logp = torch.tensor([[-1.5, -1.0]])
    weights = torch.full((1, 2), 0.5)
    _, stats = grpo_loss(logp, logp, ref_logp, torch.zeros(1), weights, kl="abs")
    assert abs(stats["kl"] - (0.5 + 1.0) / 2) < 1e-6


def check_top_entropy() -> None:
    from types import SimpleNamespace

    import torch

    import train_grpo
    from runtime.parallel import Ranks
    from runtime.stats import StepStats
    from scoring import Pack

    # one group of two completions, with 6 tokens and with 4: entropies 1 to 10
    entropy = torch.tensor([[1.0, 2, 3, 4, 5, 6], [7, 8, 9, 10, 0, 0]])
    logp = torch.zeros(2, 6, requires_grad=True)
    group = SimpleNamespace(
        prompt=SimpleNamespace(ids=[0]),
        tokens=torch.zeros(2, 6),
        lengths=torch.tensor([6, 4]),
        logp=torch.zeros(2, 6),
        old_logp=None,
        ref_logp=None,
        advantages=torch.tensor([1.0, -1.0]),
    )
    train_grpo.make_packs = lambda groups, most: [Pack([group], [[0, 1]])]
    train_grpo.score = lambda crm, pack, temperature, entropy_gradient: [(logp, entropy)]
    cfg = train_grpo.Config(group=2, max_new_tokens=6, agg="token", top_entropy=0.2, kl_coef=0)
    crm = SimpleNamespace(is_sharded=False)
    optimizer = SimpleNamespace(step=lambda lr: 0.0)
    train_grpo.update_policy(crm, optimizer, [group], cfg, Ranks(), 1e-3, 0.0, StepStats())
    # a fifth of ten tokens trains, each with the weight 1/10 that it has among all of them
    expected = torch.zeros(2, 6)
    expected[1, 2:4] = 0.1
    torch.testing.assert_close(logp.grad, expected)


def check_mask_truncated() -> None:
    from types import SimpleNamespace

    import torch

    from runtime.parallel import Ranks
    from train_grpo import Config, weigh_tokens

    def weights_of(mask_truncated: bool) -> torch.Tensor:
        group = SimpleNamespace(
            tokens=torch.zeros(3, 4),
            lengths=torch.tensor([2, 4, 1]),
            finished=torch.tensor([True, False, True]),
        )
        cfg = Config(group=3, max_new_tokens=4, mask_truncated=mask_truncated)
        weigh_tokens([group], cfg, Ranks())
        return group.token_weights

    sixth, twelfth, third = 1 / 6, 1 / 12, 1 / 3
    all_train = [[sixth, sixth, 0, 0], [twelfth] * 4, [third, 0, 0, 0]]
    torch.testing.assert_close(weights_of(mask_truncated=False), torch.tensor(all_train))
    # the mean is over the two completions that have an end
    ended_train = [[0.25, 0.25, 0, 0], [0.0] * 4, [0.5, 0, 0, 0]]
    torch.testing.assert_close(weights_of(mask_truncated=True), torch.tensor(ended_train))


def check_overlong() -> None:
    from types import SimpleNamespace

    import torch

    import train_grpo
    from crm import Group

    assert train_grpo.overlong_penalty(80, limit=100, buffer=20) == 0
    assert train_grpo.overlong_penalty(85, limit=100, buffer=20) == -0.25
    assert train_grpo.overlong_penalty(100, limit=100, buffer=20) == -1
    group = Group(
        prompt=None,
        tokens=torch.zeros(3, 100),
        lengths=torch.tensor([10, 90, 100]),
        logp=torch.zeros(3, 100),
        finished=torch.tensor([True, True, False]),
        texts=["", "", ""],
    )
    full = {"think_format": 1.0, "answer_format": 1.0, "box_iou": 1.0}
    train_grpo.sample = lambda *arguments: [group]
    train_grpo.reward_group = lambda *arguments: [dict(full), dict(full), dict(full)]
    cfg = train_grpo.Config(mode="iou", group=3, max_new_tokens=100, overlong=20)
    crm = SimpleNamespace(prompt_of=lambda question: None)
    setup = train_grpo.Setup(cfg, crm, None, {})
    (rollout,) = train_grpo.roll_out(setup, ["a question"], [0], [0], step=0)
    assert rollout.rewards.tolist() == [3.0, 2.5, 2.0]
    assert [terms["overlong"] for terms in rollout.terms] == [0.0, -0.5, -1.0]


def check_reward_term() -> None:
    from rewards import parse_coefficients, reward_terms, total_reward

    gt_box = (0, 0, 30, 40)
    gt_points = ((5, 5), (20, 20))
    answer = '{"bbox": [30, 0, 60, 40], "points_1": [5, 5], "points_2": [20, 20]}'
    text = f"<think>x</think><answer>{answer}</answer>"
    terms = reward_terms(text, gt_box, gt_points)
    # the centres are 30 px apart, and the true diagonal is 50 px long
    assert abs(terms["centre_distance"] - 0.4) < 1e-9
    assert reward_terms("", gt_box, gt_points)["centre_distance"] == 0
    coefficients = parse_coefficients("centre_distance=0.5")
    more = total_reward(terms, "soft", coefficients) - total_reward(terms, "soft")
    assert abs(more - 0.2) < 1e-9


def check_reward_mode() -> None:
    from rewards import reward_formula, total_reward

    assert reward_formula("fast") == ("answer_format + box_iou", 2.0)
    assert total_reward({"answer_format": 1.0, "box_iou": 0.25, "point_dice": 1.0}, "fast") == 1.25


def check_answer_format() -> None:
    from crm import load_crm
    from data import load_samples

    crm = load_crm("demo/crm", prompt="bbox_2d")
    assert '"bbox_2d": [x1, y1, x2, y2]' in crm.template
    answer_format = crm.answer_format
    example = load_samples("demo/data")[0]
    sizes = crm.prompt_of(example).sizes
    text = answer_format.target_text(example, sizes, True)
    assert '"bbox_2d": [' in text
    assert '"bbox":' not in text
    answer = answer_format.parse(text)
    assert answer.problem == ""
    assert answer.bbox is not None
    assert answer_format.reward_terms(text, example, sizes)["box_iou"] > 0.9
    # a checkpoint remembers the prompt, and with it the format
    again = load_crm("demo/crm", prompt=crm.settings()["prompt"])
    assert again.answer_format is answer_format


def check_data_format() -> None:
    import tempfile
    from pathlib import Path

    from PIL import Image

    from data import load_samples

    folder = Path(tempfile.mkdtemp())
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 30, 25))
    mask.save(folder / "liver_mask.png")
    Image.new("RGB", (60, 40), "grey").save(folder / "liver.png")
    examples = load_samples(folder)
    assert len(examples) == 1
    assert examples[0].query == "Where is the liver?"
    assert examples[0].bbox == (10, 5, 30, 25)
    assert len(load_samples("demo/data")) > 1000  # the others are read as before


def check_segmenter() -> None:
    import numpy as np

    from asm import load_asm, segment_regions

    image = np.full((40, 50, 3), 30, np.uint8)
    image[10:20, 15:35] = 200
    asm = load_asm("brighter", "cpu")
    points = [[20, 15], [30, 15]]
    masks, scores = asm.segment(image, points=[points])
    assert masks.shape == (1, 40, 50)
    assert len(scores) == 1
    assert masks.sum() == 10 * 20
    mask, _ = segment_regions(asm, image, [((15, 10, 35, 20), points)])
    assert (mask == masks[0]).all()


def check_metric() -> None:
    import numpy as np

    from metrics import METRICS, encode_mask

    title, function = METRICS["mask_iou"]
    assert title == "IoU, mask"
    drawn = np.zeros((40, 50), bool)
    drawn[10:20, 10:30] = True
    true = np.zeros((40, 50), bool)
    true[10:20, 20:40] = True
    p = {"mask": encode_mask(drawn), "truth": {"mask": encode_mask(true)}}
    assert abs(function(p) - 100 / 300) < 1e-12
    assert function(p | {"mask": None}) == 0
    assert function(p | {"truth": {"mask": None}}) is None


CHECKS: dict[str, Callable[[], None]] = {
    "rloo": check_rloo,
    "maxrl": check_maxrl,
    "gdpo": check_gdpo,
    "cispo": check_cispo,
    "sapo": check_sapo,
    "kl-times-ratio": check_kl_times_ratio,
    "kl-abs": check_kl_abs,
    "top-entropy": check_top_entropy,
    "mask-truncated": check_mask_truncated,
    "overlong": check_overlong,
    "reward-term": check_reward_term,
    "reward-mode": check_reward_mode,
    "answer-format": check_answer_format,
    "data-format": check_data_format,
    "segmenter": check_segmenter,
    "metric": check_metric,
}


# ---------------------------------------------------------------- each change by itself


@pytest.mark.parametrize("patch", PATCHES.values(), ids=PATCHES)
def test_a_usual_change_is_small_and_works(tmp_path: Path, patch: Patch) -> None:
    lines = changes.inserted_lines(patch)
    print(f"{patch.name}: {len(lines)} lines in {patch.file}")
    assert len(lines) <= MOST
    assert all(len(line) <= 100 for line in lines)
    check = CHECKS[patch.name]
    copied_with([patch], tmp_path)
    code = f"{inspect.getsource(check)}\n\n{check.__name__}()\n"
    if patch.use.startswith("--"):
        flags = [*shlex.split(patch.use), "--crm", "x"]
        code += "from runtime.cli import parse_args\nfrom train_grpo import Config\n"
        code += f'parse_args(Config, "", argv={flags})\n'
    (tmp_path / "check.py").write_text(code)
    run_in(tmp_path, tmp_path / "check.py")


def test_a_check_of_a_change_fails_where_the_change_is_wrong(tmp_path: Path) -> None:
    """The copy is what runs, and not the project."""
    copied_with([PATCHES["rloo"]], tmp_path)
    file = tmp_path / "train_grpo.py"
    right = file.read_text()
    file.write_text(right.replace("return centred * G / (G - 1)", "return centred"))
    assert file.read_text() != right
    (tmp_path / "check.py").write_text(f"{inspect.getsource(check_rloo)}\n\ncheck_rloo()\n")
    script = Script(tmp_path / "check.py", before=partial(import_from, tmp_path))
    _, errors = script.communicate()
    assert script.returncode == 1
    assert "not close" in errors


# ---------------------------------------------------------------- all changes at once


@pytest.mark.parametrize("file", TESTS)
def test_with_all_changes_at_once_a_files_other_tests_stay_green(tmp_path: Path, file: str) -> None:
    copied_with(PATCHES.values(), tmp_path)
    assert (tmp_path / file).read_text() != (ROOT / file).read_text()
    said = run_in(tmp_path, "-m pytest -q -x -p no:cacheprovider", TESTS[file])
    assert " passed" in said


def test_every_patched_file_has_tests() -> None:
    assert {patch.file for patch in PATCHES.values()} == set(TESTS)
    assert all((ROOT / tests).is_file() for tests in TESTS.values())


def test_a_step_runs_with_every_change_of_the_loop_switched_on(tmp_path: Path) -> None:
    patches = [patch for patch in PATCHES.values() if patch.file == "train_grpo.py"]
    copied_with(patches, tmp_path)
    run_in(
        tmp_path,
        "train_grpo.py --steps 1 --prompts 4 --group 2 --minibatches 2 --max-new-tokens 40",
        "--norm terms --cispo --sapo --kl abs --kl-times-ratio --kl-coef 0.1 --top-entropy 0.5",
        "--mask-truncated --overlong 10 --eval-every -1 --save-every -1 --out",
        tmp_path / "run",
    )
    row = (tmp_path / "run/metrics.jsonl").read_text()
    assert '"overlong": ' in row
    assert '"skipped": 0' in row


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("change", FLAGS, ids=lambda change: change.title)
def test_a_change_by_flags_is_taken(change: changes.Flags) -> None:
    words = shlex.split(change.flags)
    config = parse_args(train_grpo.Config, "", argv=[*words, "--crm", "x"])
    for flag, value in zip(words[::2], words[1::2]):
        name = flag.removeprefix("--").replace("-", "_")
        taken = getattr(config, name)
        assert taken == type(taken)(value)


def test_the_algorithms_that_are_flags_are_the_same_in_the_scripts_help() -> None:
    for change in FLAGS:
        if change.title in ("Dr. GRPO", "DAPO", "GSPO"):
            assert f"{change.title} " in train_grpo.__doc__
            assert f" {change.flags} " in train_grpo.__doc__
            assert change.paper in train_grpo.__doc__


def test_coefficients_weigh_terms_and_add_them() -> None:
    (change,) = [change for change in FLAGS if "point_align" in change.flags]
    coefficients = parse_coefficients(change.flags.removeprefix("--coefficients "))
    text, maximum = reward_formula("soft", coefficients)
    assert text == "think_format + answer_format + 2 box_iou + point_dice + 0.5 point_align"
    assert maximum == 5.5


# ---------------------------------------------------------------- the command and the page


def test_the_page_shows_the_patches_as_they_are() -> None:
    told = "python -m learn.changes --write makes it anew"
    assert changes.PAGE.read_text(encoding="utf-8") == changes.page(), told


def test_the_command_makes_changes_once_and_names_what_there_is(tmp_path: Path) -> None:
    copied_with([], tmp_path)
    said = run_in(tmp_path, "-m learn.changes")
    assert all(f"{patch.name} " in said for patch in PATCHES.values())
    said = run_in(tmp_path, "-m learn.changes rloo data-format")
    assert "train_grpo.py is changed: --norm loo" in said
    for name in ("rloo", "data-format"):
        patch = PATCHES[name]
        original = (ROOT / patch.file).read_text()
        changed = (tmp_path / patch.file).read_text()
        assert changed == changes.patched(original, patch)
        with pytest.raises(ValueError, match=f"{patch.file}: {name} has been made in it already"):
            changes.apply(patch, tmp_path)
    script = Script("-m learn.changes nonsense", before=partial(import_from, tmp_path))
    _, errors = script.communicate()
    assert script.returncode == 2
    assert errors.startswith("error: nonsense: no such change; known: rloo, ")


def test_a_file_that_has_changed_where_a_patch_belongs_is_named() -> None:
    text = (ROOT / "train_grpo.py").read_text().replace('"group", "none"', '"group", "other"')
    with pytest.raises(ValueError, match="train_grpo.py: has changed where rloo belongs, at"):
        changes.patched(text, PATCHES["rloo"])
