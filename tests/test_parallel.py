"""Many processes do the work of one: DDP, FSDP2 and hybrid sharding over gloo, on the CPU."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ranks
from safetensors.torch import load_file
from test_scripts import ROOT, rows, run
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from runtime import optim
from runtime.parallel import Ranks, equal_passes

# four prompts, of which a rank of four has one; completions and prompts of different lengths; every step is saved
WORK = (
    "train_grpo.py --crm demo/crm --data demo/data --prompts 4 --group 3 --minibatches 1 --max-new-tokens 100 "
    "--pack-tokens 600 --eval-every -1 --lr 1e-4 --steps 2 --save-every 1 --seed 3"
)
SAME = (
    "reward",
    "length",
    "finished",
    "parse_ok",
    "zero_std",
    "entropy",
    "loss",
    "kl",
    "grad_norm",
)


def torchrun(processes, *command, check=0, node=None):
    """Rank 0's (stdout, stderr)."""
    scripts = ranks(processes, *command, node=node)
    said = [script.communicate(timeout=300) for script in scripts]
    assert {script.returncode for script in scripts} == {check}, said
    return said[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(WORK, "--out", folder)
    return folder


def first_moments(folder):
    """AdamW's exp_avg after step 1: a tenth of the clipped gradient."""
    saved = folder / "step_000001"
    if (saved / "optimizer").exists():
        dcp_to_torch_save(saved / "optimizer", saved / "whole.pt")
        return torch.load(saved / "whole.pt", weights_only=True)["exp_avg"]
    return torch.load(saved / "trainer.pt", weights_only=True)["optimizer"]["exp_avg"]


def same_run(folder, alone, gradients=True):
    """Samples, metrics, gradient of the first step and final weights."""
    for name in ("best", "worst"):
        assert [row[name]["text"] for row in rows(folder / "samples.jsonl")] == [
            row[name]["text"] for row in rows(alone / "samples.jsonl")
        ]
    for one, many in zip(
        *(rows(place / "metrics.jsonl") for place in (alone, folder)), strict=True
    ):
        for key in SAME:
            assert many[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    if gradients:
        one, many = first_moments(alone), first_moments(folder)
        assert one.keys() == many.keys()
        for name in one:
            torch.testing.assert_close(many[name], one[name], atol=1e-6, rtol=1e-3, msg=name)
    one, many = (load_file(place / "step_000002/model.safetensors") for place in (alone, folder))
    assert one.keys() == many.keys() and all(one[name].dtype == many[name].dtype for name in one)
    far = max(float((one[name] - many[name]).abs().max()) for name in one)
    assert far < 2.1e-4  # Adam moves a weight by at most lr a step, whatever its sign


def resumed(source, folder, processes, *flags):
    """The run of `source` from its first step on, elsewhere."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "step_000002")
    torchrun(processes, WORK, "--resume", *flags, "--out", folder) if processes > 1 else run(
        WORK, "--resume", *flags, "--out", folder
    )
    return folder


def test_gradients_summed_in_buckets_are_those_summed_at_once(monkeypatch):
    """all_reduce doubles: the sum over two ranks that hold the same."""
    monkeypatch.setattr(optim.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(
        optim.dist, "all_reduce", lambda flat: seen.append(len(flat)) or flat.mul_(2)
    )
    for bucket, calls in ((1000, [18]), (7, [6, 4, 8]), (1, [1, 2, 3, 4, 8])):
        monkeypatch.setattr(optim, "BUCKET", bucket)
        seen, parameters = [], {str(n): torch.nn.Parameter(torch.ones(n)) for n in (1, 2, 3, 4, 8)}
        optimizer = optim.Optimizer(parameters)
        sum(
            (i + 1) * p.sum() for i, p in enumerate(list(parameters.values())[:4])
        ).backward()  # the last gets none
        norm = optimizer.step(0.1, 1e9)
        assert seen == calls and norm == pytest.approx(2 * (1 + 2 * 4 + 3 * 9 + 4 * 16) ** 0.5)


def test_a_sharded_rank_with_fewer_passes_makes_the_missing_ones_without_effect():
    ranks = Ranks(0, 2)
    ranks.gather = lambda counts: [*counts, 3]  # the other rank has three
    assert list(equal_passes(SimpleNamespace(root=True), ranks, ["a"])) == [
        ("a", 1.0),
        ("a", 0.0),
        ("a", 0.0),
    ]
    assert list(equal_passes(SimpleNamespace(root=None), ranks, ["a"])) == [("a", 1.0)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_and_four_processes_do_the_work_of_one_and_resume_on_another_number(
    kind, alone, tmp_path
):
    flags = f"--parallel {kind} --out"
    torchrun(2, WORK, flags, tmp_path / "two")
    same_run(tmp_path / "two", alone)
    torchrun(4, WORK, flags, tmp_path / "four")
    same_run(tmp_path / "four", alone)
    same_run(resumed(tmp_path / "two", tmp_path / "on-four", 4, f"--parallel {kind}"), alone)
    if kind == "fsdp":  # what DDP saves is what one process saves
        same_run(resumed(tmp_path / "two", tmp_path / "on-one", 1), alone)


def test_a_checkpoint_of_one_process_is_resumed_sharded(alone, tmp_path):
    same_run(resumed(alone, tmp_path / "sharded", 2, "--parallel fsdp"), alone)


def test_shards_within_a_node_and_copies_across_nodes(alone, tmp_path):
    torchrun(4, WORK, "--parallel fsdp --out", tmp_path / "run", node=2)
    same_run(tmp_path / "run", alone)


@pytest.mark.parametrize(
    "flags",
    [
        "--parallel ddp",
        "--parallel fsdp",
        "--parallel ddp --offload",
        "--parallel ddp --dtype bfloat16",
        "--parallel ddp --dtype bfloat16 --lora-rank 4",
    ],
)
def test_sft_over_two_processes_is_that_of_one(flags, tmp_path):
    work = (
        "train_sft.py --crm demo/crm --data demo/data --eval-every -1 --batch 8 --micro-batch 2 --lr 1e-4 --steps 2 "
        "--save-every -1 --out"
    )
    run(work, tmp_path / "one", flags)
    torchrun(2, work, tmp_path / "two", flags)
    for one, two in zip(
        *(rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two")), strict=True
    ):
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-2 if "bfloat16" in flags else 1e-4), (
                key
            )
    assert not list(tmp_path.glob("*/step_*"))


def test_lora_over_two_processes_is_that_of_one_and_is_not_sharded(tmp_path):
    run(WORK, "--lora-rank 4 --out", tmp_path / "one")
    torchrun(2, WORK, "--lora-rank 4 --out", tmp_path / "two")
    same_run(tmp_path / "two", tmp_path / "one")
    _, error = torchrun(2, WORK, "--lora-rank 4 --parallel fsdp --out", tmp_path / "no", check=2)
    assert "error: --parallel fsdp shards whole models" in error and not (tmp_path / "no").exists()


def a_rank_is_killed(folder, after=0.0):
    """Kill rank 1 of 2 in its second step or later -> (seconds until torchrun ended, what it said)."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        *WORK.replace("--steps 2", "--steps 500").replace("--save-every 1", "").split(),
        "--out",
        str(folder),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(after)
    children = subprocess.check_output(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True
    ).split()
    second = [
        int(pid)
        for pid in children
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    assert len(second) == 1
    os.kill(second[0], signal.SIGKILL)
    start = time.time()
    words, _ = process.communicate(timeout=90)
    assert process.returncode == 1
    return time.time() - start, words


def test_a_killed_rank_ends_the_others_within_a_minute_and_is_named(tmp_path):
    seconds, said = a_rank_is_killed(tmp_path / "run")
    assert (
        seconds < 60
        and "rank 0 of 2" in said
        and "another rank is gone" in said
        and "rank      : 1" in said
        and "SIGKILL" in said
    ), said
