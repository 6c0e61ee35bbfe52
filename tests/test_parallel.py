"""Many processes do the work of one: DDP, FSDP2 and hybrid sharding over gloo, on the CPU."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ranks
from safetensors.torch import load_file
from test_run import Trap
from test_scripts import ROOT, run

from runtime import checkpoint, optim
from runtime.files import read_jsonl
from runtime.parallel import Ranks, equal_passes

# four prompts, of which a rank of four has one; completions and prompts of different lengths; every
# step is saved
WORK = (
    "train_grpo.py --crm demo/crm --data demo/data --prompts 4 --group 3 --minibatches 1 "
    "--max-new-tokens 100 --pack-tokens 600 --eval-every -1 --lr 1e-4 --steps 2 --save-every 1 "
    "--seed 3"
)
SFT = (
    "train_sft.py --crm demo/crm --data demo/data --batch 8 --micro-batch 2 --lr 1e-4 --steps 2 "
    "--save-every -1"
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


def many(processes, *command, check=0, node=None, timeout=300):
    """Rank 0's (stdout, stderr), of ranks started as torchrun starts them."""
    scripts = ranks(processes, *command, node=node)
    said = [script.communicate(timeout=timeout) for script in scripts]
    assert {script.returncode for script in scripts} == {check}, said
    return said[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(WORK, "--out", folder)
    return folder


def optimizer_tensors(saved, quantity):
    """{name: whole tensor} of a checkpoint's optimizer/, put together from its parts."""
    pieces = {}
    for file in sorted((saved / "optimizer").glob(f"{quantity}.*.safetensors")):
        for name, tensor in load_file(file).items():
            pieces.setdefault(name, []).append(tensor)
    return {name: torch.cat(tensors) for name, tensors in pieces.items()}


def first_moments(folder):
    """AdamW's exp_avg after step 1: a tenth of the clipped gradient."""
    return optimizer_tensors(folder / "step_000001", "exp_avg")


def same_run(folder, alone, gradients=True):
    """Completions, metrics, gradient of the first step and final weights."""
    for name in ("best", "worst"):
        texts = [row[name]["text"] for row in read_jsonl(folder / "best_and_worst.jsonl")]
        assert texts == [row[name]["text"] for row in read_jsonl(alone / "best_and_worst.jsonl")]
    logs = [read_jsonl(place / "metrics.jsonl") for place in (alone, folder)]
    for one, many in zip(*logs, strict=True):
        for key in SAME:
            assert many[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    if gradients:
        one = first_moments(alone)
        many = first_moments(folder)
        assert one.keys() == many.keys()
        for name in one:
            torch.testing.assert_close(many[name], one[name], atol=1e-6, rtol=1e-3, msg=name)
    one = load_file(alone / "step_000002/model.safetensors")
    many = load_file(folder / "step_000002/model.safetensors")
    assert one.keys() == many.keys()
    assert all(one[name].dtype == many[name].dtype for name in one)
    far = max(float((one[name] - many[name]).abs().max()) for name in one)
    assert far < 2.1e-4  # Adam moves a weight by at most lr a step, whatever its sign


def resumed(source, folder, processes, *flags):
    """The run of `source` from its first step on, elsewhere."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "step_000002")
    command = [WORK, "--resume", *flags, "--out", folder]
    if processes > 1:
        many(processes, *command)
    else:
        run(*command)
    return folder


# ---------------------------------------------------------------- in one process


def test_gradients_summed_in_buckets_are_those_summed_at_once(monkeypatch):
    """all_reduce doubles: the sum over two ranks that hold the same."""
    seen = []

    def all_reduce(flat):
        seen.append(len(flat))
        flat.mul_(2)

    monkeypatch.setattr(optim.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(optim.dist, "all_reduce", all_reduce)
    for bucket, calls in ((1000, [18]), (7, [6, 4, 8]), (1, [1, 2, 3, 4, 8])):
        monkeypatch.setattr(optim, "BUCKET", bucket)
        seen.clear()
        parameters = {str(n): torch.nn.Parameter(torch.ones(n)) for n in (1, 2, 3, 4, 8)}
        optimizer = optim.Optimizer(parameters)
        with_gradient = list(parameters.values())[:4]  # the last gets none
        sum((i + 1) * p.sum() for i, p in enumerate(with_gradient)).backward()
        norm = optimizer.step(0.1, 1e9)
        assert seen == calls
        assert norm == pytest.approx(2 * (1 + 2 * 4 + 3 * 9 + 4 * 16) ** 0.5)


def test_a_sharded_rank_with_fewer_passes_makes_the_missing_ones_without_effect():
    class OfTwo(Ranks):
        def gather(self, counts):
            return [*counts, 3]  # the other rank has three

    passes = equal_passes(OfTwo(), ["a"], sharded=True)
    assert passes == [("a", 1.0), ("a", 0.0), ("a", 0.0)]
    assert equal_passes(OfTwo(), ["a"], sharded=False) == [("a", 1.0)]


# ---------------------------------------------------------------- several do the work of one


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_and_four_processes_do_the_work_of_one_and_resume_on_another_number(
    kind, alone, tmp_path
):
    flags = f"--parallel {kind} --out"
    many(2, WORK, flags, tmp_path / "two")
    same_run(tmp_path / "two", alone)
    many(4, WORK, flags, tmp_path / "four")
    same_run(tmp_path / "four", alone)
    same_run(resumed(tmp_path / "two", tmp_path / "on-four", 4, f"--parallel {kind}"), alone)
    if kind == "fsdp":  # what DDP saves is what one process saves
        same_run(resumed(tmp_path / "four", tmp_path / "on-one", 1), alone)


def test_a_checkpoint_of_one_process_is_resumed_sharded(alone, tmp_path):
    same_run(resumed(alone, tmp_path / "sharded", 2, "--parallel fsdp"), alone)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_do_the_work_of_one_with_the_other_family(kind, qwen3, tmp_path):
    """Its random weights earn nothing, so it is the entropy bonus that has a gradient."""
    flags = f"--crm {qwen3} --entropy-coef 0.1 --max-new-tokens 12"
    run(WORK, flags, "--out", tmp_path / "one")
    many(2, WORK, flags, f"--parallel {kind} --out", tmp_path / "two")
    same_run(tmp_path / "two", tmp_path / "one")
    if kind == "fsdp":
        again = resumed(tmp_path / "two", tmp_path / "again", 1, flags)
        same_run(again, tmp_path / "one")


def test_shards_within_a_node_and_copies_across_nodes(alone, tmp_path):
    folder = tmp_path / "run"
    many(4, WORK, "--parallel fsdp --out", folder, node=2)
    same_run(folder, alone)
    assert json.loads((folder / "step_000001/trainer.json").read_text()) == {"step": 1, "parts": 2}


def test_a_sharded_checkpoint_holds_each_row_once_and_nothing_that_is_unpickled(alone, tmp_path):
    folder = tmp_path / "run"
    many(2, WORK, "--parallel fsdp --out", folder)
    saved = folder / "step_000001"
    one = optimizer_tensors(alone / "step_000001", "masters")
    two = optimizer_tensors(saved, "masters")
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: tensor.shape for name, tensor in two.items()
    }
    suffixes = {path.suffix for path in saved.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".jinja", ".txt"}

    # a trap wherever torch.distributed.checkpoint, or an earlier version, would have unpickled
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (saved / "optimizer" / name).write_bytes(trap)
    (saved / "trainer.pt").write_bytes(trap)
    same_run(resumed(folder, tmp_path / "again", 2, "--parallel fsdp"), alone)
    assert not (tmp_path / "sprung").exists()


def test_a_torn_part_of_a_sharded_optimizer_is_one_line(tmp_path):
    folder = tmp_path / "run"
    many(2, WORK, "--parallel fsdp --out", folder)
    part = folder / "step_000002/optimizer/exp_avg_sq.00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1000])
    (folder / "step_000001/optimizer/masters.00001-of-00002.safetensors").unlink()
    said, _ = many(2, WORK, "--parallel fsdp --resume auto --out", folder)
    assert "step_000002: cannot be read" in said
    assert "exp_avg_sq.00002-of-00002.safetensors: not a complete safetensors file" in said
    assert "step_000001: cannot be read" in said
    assert "1 of 2 parts" in said
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "flags",
    [
        "--parallel ddp",
        "--parallel fsdp",
        "--parallel fsdp --dtype bfloat16",
        "--parallel ddp --offload",
        "--parallel ddp --dtype bfloat16",
        "--parallel ddp --dtype bfloat16 --lora-rank 4",
    ],
)
def test_sft_over_two_processes_is_that_of_one(flags, tmp_path):
    run(SFT, "--eval-every -1 --out", tmp_path / "one", flags)
    many(2, SFT, "--eval-every -1 --out", tmp_path / "two", flags)
    near = 1e-2 if "bfloat16" in flags else 1e-4
    logs = [read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for one, two in zip(*logs, strict=True):
        for key in ("loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=near), key
    assert not list(tmp_path.glob("*/step_*"))


def test_lora_over_two_processes_is_that_of_one_and_is_not_sharded(tmp_path):
    run(WORK, "--lora-rank 4 --out", tmp_path / "one")
    many(2, WORK, "--lora-rank 4 --out", tmp_path / "two")
    same_run(tmp_path / "two", tmp_path / "one")
    _, error = many(2, WORK, "--lora-rank 4 --parallel fsdp --out", tmp_path / "no", check=2)
    assert "error: --parallel fsdp shards whole models" in error
    assert not (tmp_path / "no").exists()


# ---------------------------------------------------------------- started by torchrun itself


class Torchrun:
    """`torchrun --nproc-per-node 2 COMMAND`, the real one."""

    def __init__(self, *command):
        words = [word for part in command for word in str(part).split()]
        launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        self.file = Path(tempfile.mkstemp()[1])
        with open(self.file, "w") as output:
            self.process = subprocess.Popen(
                [*launcher, "--nproc-per-node", "2", "--standalone", *words],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for_words(self, words, timeout=120):
        """Until a rank has said them."""
        deadline = time.time() + timeout
        while words not in self.said():
            assert time.time() < deadline and self.process.poll() is None, self.said()
            time.sleep(0.02)

    def said(self):
        """What all ranks and the launcher have said so far."""
        return self.file.read_text()

    def ranks(self):
        """{rank: process id}."""
        command = ["ps", "-o", "pid=", "--ppid", str(self.process.pid)]
        found = {}
        for pid in subprocess.check_output(command, text=True).split():
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                if entry.startswith(b"RANK="):
                    found[int(entry[5:])] = int(pid)
        return found

    def end(self, timeout=120):
        """(exit status, what all ranks said)."""
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for pid in self.ranks().values():
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()
            return "it did not end", self.said()
        return self.process.returncode, self.said()


def test_the_papers_recipe_passes_its_first_step(tmp_path):
    """Sharded, in bfloat16: the shards are float32, but the model computes in bfloat16."""
    flags = "--dtype bfloat16 --parallel fsdp --minibatches 2 --save-every -1 --out"
    status, said = Torchrun(WORK, flags, tmp_path / "run").end(300)
    assert status == 0, said
    assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == [1, 2]


def test_ranks_with_different_numbers_of_held_out_questions_do_not_wait_for_each_other(tmp_path):
    """One question: rank 1 makes no forward pass while the weights are gathered, rank 0 makes
    one."""
    flags = "--parallel fsdp --eval-limit 1 --eval-every 1 --out"
    status, said = Torchrun(SFT, flags, tmp_path / "run").end(300)
    assert status == 0, said
    assert [row["step"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]


# A step of a 7B takes minutes: here one phase of every step but the first sleeps.
SLOW = """
import runpy, sys, time
import {module}
real = {module}.{name}
calls = 0
def slow(*args, **options):
    global calls
    calls += 1
    if calls > 1:
        print("asleep", flush=True)
        time.sleep({seconds})
    return real(*args, **options)
{module}.{name} = slow
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def slow_work(folder, phase, seconds):
    """WORK, with a phase that takes so long, and stops after 500 steps. phase: "sampling.sample",
    say."""
    module, name = phase.split(".")
    script = folder / "slow.py"
    script.write_text(SLOW.format(module=module, name=name, seconds=seconds))
    return f"{script} {WORK} --steps 500 --save-every 0"


@pytest.mark.parametrize(
    "kind, number, phase, seconds",
    [
        # broken off at once, as it is this rank's own
        ("ddp", signal.SIGTERM, "sampling.sample", 100),
        ("fsdp", signal.SIGINT, "sampling.sample", 100),
        # waited for, but not for what would follow
        ("fsdp", signal.SIGTERM, "scoring.all_logp", 8),
    ],
)
def test_what_is_done_is_saved_although_a_step_takes_longer_than_torchrun_waits(
    tmp_path, kind, number, phase, seconds
):
    folder = tmp_path / "run"
    launcher = Torchrun(slow_work(tmp_path, phase, seconds), f"--parallel {kind} --out", folder)
    launcher.wait_for_words("asleep")
    launcher.process.send_signal(number)
    start = time.time()
    _, said = launcher.end()
    assert time.time() - start < 25
    assert "stopped at 1 of 500 steps" in said
    assert "SIGKILL" not in said
    assert checkpoint.newest(folder) == folder / "step_000001"
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1]


def test_a_run_that_was_stopped_under_torchrun_goes_on_as_if_it_had_not_been(alone, tmp_path):
    folder = tmp_path / "run"
    launcher = Torchrun(
        slow_work(tmp_path, "sampling.sample", 100), "--parallel fsdp --out", folder
    )
    launcher.wait_for_words("asleep")
    launcher.process.send_signal(signal.SIGTERM)
    launcher.end()
    status, said = Torchrun(WORK, "--parallel fsdp --resume auto --out", folder).end()
    assert status == 0, said
    same_run(folder, alone)


def test_the_ranks_themselves_end_with_status_0_after_a_signal(tmp_path):
    """As srun starts and signals them, one by one and without a launcher of PyTorch's."""
    folder = tmp_path / "run"
    scripts = ranks(2, slow_work(tmp_path, "sampling.sample", 100), "--out", folder)
    while "asleep" not in scripts[0].files[0].read_text():
        assert scripts[0].poll() is None
        time.sleep(0.02)
    scripts[1].send_signal(signal.SIGTERM)
    scripts[0].send_signal(signal.SIGTERM)
    said = [script.communicate(60) for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0], said
    assert checkpoint.newest(folder) == folder / "step_000001"


def test_a_second_ctrl_c_ends_torchruns_ranks_at_once(tmp_path):
    work = slow_work(tmp_path, "scoring.all_logp", 100)
    launcher = Torchrun(work, "--out", tmp_path / "run")
    launcher.wait_for_words("asleep")
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait_for_words("a second Ctrl-C ends at once")
    pids = launcher.ranks()
    assert len(pids) == 2
    start = time.time()
    launcher.process.send_signal(signal.SIGINT)
    launcher.end()
    assert time.time() - start < 15
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


def a_rank_is_killed(folder, after=0.0):
    """Kill rank 1 of 2 in its second step or later -> (seconds until torchrun ended, what it
    said)."""
    launcher = Torchrun(WORK, "--steps 500 --save-every 0 --out", folder)
    while not (folder / "metrics.jsonl").exists():
        assert launcher.process.poll() is None, launcher.said()
        time.sleep(0.02)
    time.sleep(after)
    os.kill(launcher.ranks()[1], signal.SIGKILL)
    start = time.time()
    status, words = launcher.end(90)
    assert status == 1
    return time.time() - start, words


def test_a_killed_rank_ends_the_others_within_a_minute_and_is_named(tmp_path):
    seconds, said = a_rank_is_killed(tmp_path / "run")
    assert seconds < 60
    for words in ("rank 0 of 2", "another rank is gone", "rank      : 1", "SIGKILL"):
        assert words in said, said


# ---------------------------------------------------------------- disks


def stale_listing(name):
    """Rank 1 does not yet see a folder that another machine has written."""
    if os.environ["RANK"] != "1":
        return
    glob = Path.glob
    Path.glob = lambda path, pattern: (found for found in glob(path, pattern) if found.name != name)


def test_ranks_resume_from_what_rank_0_sees(alone, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(alone, folder)
    command = [WORK, "--steps 3 --resume auto --out", folder]
    scripts = ranks(2, *command, before=partial(stale_listing, "step_000002"))
    said = [script.communicate() for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0], said
    assert "resuming from" in said[0][0]
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2, 3]
    elsewhere = tmp_path / "undisturbed"
    shutil.copytree(alone, elsewhere)
    many(2, WORK, "--steps 3 --resume auto --out", elsewhere)
    assert checkpoint.problem_of(folder / "step_000003") == ""
    one = load_file(folder / "step_000003/model.safetensors")
    two = load_file(elsewhere / "step_000003/model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_rank_on_a_disk_of_its_own_is_said_before_anything_is_computed(alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run")
    link = tmp_path / "out"  # /data/run, which on the other machine is another disk
    link.symlink_to(tmp_path / "run")
    elsewhere = partial(another_disk, link, tmp_path / "disk of the other machine")
    scripts = ranks(2, WORK, "--steps 3 --resume auto --out", link, before=elsewhere)
    said = [script.communicate() for script in scripts]
    assert [script.returncode for script in scripts] == [2, 2], said
    for _, error in said:
        assert "rank 1 of 2 cannot read it" in error
        assert "--out must be on a disk that all share" in error
        assert error.count("\n") == 1


def another_disk(folder, elsewhere):
    """For rank 1 a path leads somewhere else."""
    if os.environ["RANK"] != "1":
        return
    from runtime import run

    def path(text):
        return Path(elsewhere if text == str(folder) else text)

    run.Path = path
