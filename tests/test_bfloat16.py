"""Training in bfloat16: the embedded recipe's first steps, in one process and in two, and how far
what samples and what scores may be apart.

Two products that are equal on paper differ in bfloat16 wherever they are added up in another order.
A CPU hardly does that, and a GPU does it for every number of rows: `split_products` plays the GPU.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ranks
from safetensors.torch import load_file
from torch.nn.functional import linear

import train_grpo
from crm import CRM, Group, load_crm
from data import load_samples
from runtime.cli import ROOT, parse_args
from runtime.files import read_jsonl
from runtime.run import Run
from runtime.stats import ROUNDED, check_first_step
from sampling import sample
from scoring import all_logp

# the embedded recipe, with fewer and shorter completions: some end, so rewards differ
SMALL = (
    f"@{ROOT}/recipes/demo.args --crm demo/crm --data demo/data --dtype bfloat16 --prompts 2 "
    "--group 2 --max-new-tokens 100 --eval-every -1 --steps 2 --save-every 1 --seed 3 "
    "--warmup 0 --pack-tokens 600 "
)
SEVERAL_UPDATES = "--prompts 4 --minibatches 2 --inner-epochs 2 "
LORA = "--lora-rank 4 "

# Nats by which the sampler's log-probability of a token may differ from the scorer's, in the mean
# over all tokens. check_first_step allows ROUNDED.logp_gap_mean, with room for larger models.
MEAN_GAP = 0.005


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """curves.png takes as long as all the rest of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "curves", lambda *_: None)
        yield


def train(flags: str, out: Path) -> Path:
    """Runs train_grpo.py in this process. Returns its folder."""
    argv = [*flags.split(), "--out", str(out)]
    train_grpo.main(parse_args(train_grpo.Config, "", argv=argv))
    return out


def train_on_two_ranks(flags: str, out: Path) -> Path:
    """Runs train_grpo.py as torchrun would. Returns its folder."""
    scripts = ranks(2, "train_grpo.py", flags, "--out", out)
    said = [script.communicate(timeout=300) for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0], said
    return out


def rows_of(run: Path) -> list[dict]:
    """Returns the rows of metrics.jsonl, without what a clock or the machine says."""
    of_machine = ("seconds", "peak_memory", "tokens_per_second")
    rows = []
    for row in read_jsonl(run / "metrics.jsonl"):
        rows.append({name: row[name] for name in row if not name.startswith(of_machine)})
    return rows


def check_run(run: Path) -> None:
    """What holds for any first steps in bfloat16."""
    first, second = rows_of(run)
    for row in (first, second):
        assert row["logp_gap_mean"] < MEAN_GAP
        assert math.isfinite(row["loss"])
        assert row["grad_norm"] > 0
        assert row["skipped"] == 0
    assert 0.98 < first["sampler_is_mean"] < 1.02  # what is sampled is what is scored
    assert first["sampler_is_capped"] < 0.01
    assert first["logp_gap"] > 0  # bfloat16 has computed, not float32

    # AdamW moves float32 weights, and the model's are their rounding
    folder = run / "step_000002"
    saved = load_file(folder / "model.safetensors")
    start = load_file(ROOT / "demo/crm/model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    moved = [name for name in saved if not torch.equal(saved[name], start[name].bfloat16())]
    assert len(moved) > 20
    for part in (folder / "optimizer").glob("masters.*"):
        masters = load_file(part)
        assert {tensor.dtype for tensor in masters.values()} == {torch.float32}


# ---------------------------------------------------------------- first steps


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    return train(SMALL, tmp_path_factory.mktemp("alone") / "run")


def test_one_process_makes_its_first_steps(alone):
    check_run(alone)
    first, _ = rows_of(alone)
    # with one update per rollout pi_old is pi itself, in every type
    assert first["ratio_max"] == 1
    assert first["ratio_min"] == 1
    assert abs(first["kl"]) < 1e-3


@pytest.mark.parametrize("flags", [SEVERAL_UPDATES, LORA], ids=["several", "lora"])
def test_one_process_makes_its_first_steps_with_several_updates_and_with_lora(flags, tmp_path):
    check_run(train(SMALL + flags, tmp_path / "run"))


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    return train_on_two_ranks(SMALL, tmp_path_factory.mktemp("ddp") / "run")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Path:
    return train_on_two_ranks(SMALL + "--parallel fsdp", tmp_path_factory.mktemp("fsdp") / "run")


def test_two_ranks_make_their_first_steps_and_sharding_changes_no_sampled_token(ddp, fsdp):
    for run in (ddp, fsdp):
        check_run(run)
    of_ddp, _ = rows_of(ddp)
    of_fsdp, _ = rows_of(fsdp)
    for name in ("reward", "length", "finished", "identical"):
        assert of_fsdp[name] == of_ddp[name], name
    for name in ("loss", "entropy", "grad_norm"):
        assert of_fsdp[name] == pytest.approx(of_ddp[name], rel=0.02, abs=1e-4), name


@pytest.mark.parametrize("flags", ["--parallel fsdp ", LORA], ids=["fsdp", "lora"])
def test_two_ranks_make_their_first_steps_with_several_updates(flags, tmp_path):
    check_run(train_on_two_ranks(SMALL + SEVERAL_UPDATES + flags, tmp_path / "run"))


# ---------------------------------------------------------------- resume


def check_resume(run: Path, again: Path, resume) -> None:
    """Runs the second step of a run once more, from the checkpoint of the first one: it must be the
    same step. resume(folder): the same command with --resume."""
    shutil.copytree(run, again)
    shutil.rmtree(again / "step_000002")
    config = json.loads((again / "config.json").read_text())
    config["out"] = str(again)
    (again / "config.json").write_text(json.dumps(config))
    resume(again)
    assert rows_of(again) == rows_of(run)
    for file in (run / "step_000002").rglob("*.safetensors"):
        ours = load_file(again / file.relative_to(run))
        for name, tensor in load_file(file).items():
            assert torch.equal(ours[name], tensor), (file.name, name)


def test_a_resumed_run_makes_the_same_step(alone, tmp_path):
    check_resume(alone, tmp_path / "run", lambda out: train(SMALL + "--resume yes", out))


def test_resumed_shards_make_the_same_step(fsdp, tmp_path):
    flags = SMALL + "--parallel fsdp --resume yes"
    check_resume(fsdp, tmp_path / "run", lambda out: train_on_two_ranks(flags, out))


def test_a_resumed_bfloat16_model_has_the_weights_that_were_saved(alone):
    """Weights that bfloat16 cannot hold are not lost: they are the optimizer's."""
    model = load_crm(alone / "step_000001", dtype=torch.bfloat16).model
    (file,) = (alone / "step_000001/optimizer").glob("masters.*")
    masters = load_file(file)
    finer = 0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters[name].bfloat16()), name
        finer += int((masters[name] != parameter.float()).sum())
    assert finer > 100_000


# ---------------------------------------------------------------- what samples and what scores


@pytest.fixture(scope="module")
def sampled() -> tuple[CRM, list[Group]]:
    """The embedded model in bfloat16, and completions that it wrote."""
    crm = load_crm("demo/crm", dtype=torch.bfloat16)
    examples = load_samples("demo/data")
    prompts = [crm.prompt_of(examples[i]) for i in range(3)]
    return crm, sample(crm, prompts, 6, 100, seed=1)


def mean_gap(crm: CRM, groups: list[Group], most_tokens: int, temperature: float = 1.0) -> float:
    """Returns the mean of |sampled - scored| log-probability over all tokens, in nats."""
    total = 0.0
    tokens = 0
    for group, scored in zip(groups, all_logp(crm, groups, most_tokens, temperature)):
        total += (scored - group.logp).abs().sum().item()  # past a length both are 0
        tokens += int(group.lengths.sum())
    return total / tokens


@pytest.mark.parametrize("most_tokens", [10_000, 600, 1])  # one pack, several, a row each
def test_sampler_and_scorer_agree_in_bfloat16(sampled, most_tokens):
    crm, groups = sampled
    assert 0 < mean_gap(crm, groups, most_tokens) < MEAN_GAP


def test_the_bound_on_their_agreement_sees_a_distribution_that_is_a_little_off(sampled):
    crm, groups = sampled
    assert mean_gap(crm, groups, 10_000, temperature=1.1) > 2 * MEAN_GAP
    right = [group.prompt.positions for group in groups]
    for group in groups:
        group.prompt.positions = 2 * group.prompt.positions
    try:
        assert mean_gap(crm, groups, 10_000) > ROUNDED.logp_gap_mean > MEAN_GAP
    finally:
        for group, positions in zip(groups, right):
            group.prompt.positions = positions


# ---------------------------------------------------------------- kernels that depend on the shape


def split_products(x: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
    """torch.nn.functional.linear as a GPU computes it: the inner dimension is cut into parts, whose
    number depends on the number of rows, and partial sums are rounded."""
    rows = x.numel() // x.shape[-1]
    parts = 1 + rows % 4
    size = math.ceil(x.shape[-1] / parts)
    total = None
    for part, columns in zip(x.split(size, dim=-1), weight.split(size, dim=1)):
        partial_sum = linear(part, columns)
        total = partial_sum if total is None else total + partial_sum
    return total if bias is None else total + bias


def test_split_products_are_products(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(96, 64)
    different = 0
    for rows in (1, 6, 7, 8):
        x = torch.randn(rows, 96, generator=generator)
        expected = layer(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", split_products)
            found = layer(x)
            different += not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert different > 0


@pytest.mark.parametrize("lora", ["", LORA], ids=["all", "lora"])
def test_split_products_with_several_minibatches_pass_the_check_of_the_first_step(
    lora, tmp_path, monkeypatch
):
    """The packs of pi_old and those of the updates differ, and so do their kernels."""
    monkeypatch.setattr(torch.nn.functional, "linear", split_products)
    # the learning rate is too small for bfloat16: nothing moves, and all that differs is rounding
    flags = f"{SMALL} {lora} {SEVERAL_UPDATES} --lr 1e-12 --pack-tokens 1500 --steps 1"
    (row,) = rows_of(train(flags, tmp_path / "run"))
    assert row["ratio_max"] > 1 + 1e-3  # far more than the bound of float32 on a CPU
    assert row["ratio_min"] < 1 - 1e-3
    assert row["logp_gap_mean"] < 2 * MEAN_GAP
    assert 0.98 < row["sampler_is_mean"] < 1.02
    ratios = {"ratio_max": row["ratio_max"], "ratio_min": row["ratio_min"]}
    check_first_step(ratios, [1], torch.bfloat16, updates=4)
    with pytest.raises(RuntimeError, match="ratio is not 1"):
        check_first_step(ratios, [1], torch.float32, updates=4)
