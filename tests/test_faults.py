"""What happens to runs: kills, signals, full disks, torn files. Nothing may be lost or silently
wrong.

python -m pytest -q tests/test_faults.py        # the short form, part of make test python
tests/test_faults.py                     # the campaign, make faults: hundreds of faults, a table
"""

import os
import random
import re
import resource
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Script
from safetensors.torch import load_file
from test_parallel import Torchrun, a_rank_is_killed, many, slow_work
from test_scripts import ROOT, run, without_times

from runtime import checkpoint
from runtime.files import read_jsonl
from runtime.run import Run

SMALL = (
    "train_grpo.py --crm demo/crm --data demo/data --steps 12 --save-every 2 --keep 2 --prompts 2 "
    "--group 2 --minibatches 1 --max-new-tokens 6 --eval-every -1 --lr 1e-4 --resume auto"
)
LAST = "step_000012"


def start(folder, flags="", **options):
    """The run in one process."""
    return Script(SMALL, flags, "--out", folder, **options)


def said(process):
    return "".join(process.communicate(300))


class Launched:
    """The run over two processes, started by torchrun. As Script: poll(), send_signal(),
    returncode, communicate(). A signal goes to the launcher; SIGKILL goes to both ranks, as a
    machine that fails."""

    def __init__(self, folder, flags=""):
        self.launcher = Torchrun(SMALL, flags, "--out", folder)

    @property
    def returncode(self):
        return self.launcher.process.returncode

    def poll(self):
        return self.launcher.process.poll()

    def send_signal(self, number):
        if number != signal.SIGKILL:
            self.launcher.process.send_signal(number)
            return
        for pid in self.launcher.ranks().values():
            os.kill(pid, number)

    def communicate(self, timeout):
        status, words = self.launcher.end(timeout)
        assert status != "it did not end", words
        return words, ""


def disturbed(folder, faults, hit, start=start):
    """Start the run, hit(process) at a random moment of its work, and again `faults` times; then
    let it end. Returns how often it was hit. Whatever is there in between can be read."""
    random.seed(0)
    hits = 0
    while True:
        process = start(folder)
        if hits < faults:
            before = rows_so_far(folder)
            deadline = time.time() + 60
            while rows_so_far(folder) <= before and process.poll() is None:
                assert time.time() < deadline
                time.sleep(0.01)  # past the imports: the moment lies in the work itself
            time.sleep(random.uniform(0, 0.6))
            hits += process.poll() is None
            hit(process)
        words = said(process)
        for folder_of_step in checkpoint.checkpoints(folder).values():
            assert checkpoint.problem_of(folder_of_step) == ""
            load_file(folder_of_step / "model.safetensors")
        if (folder / LAST).exists():
            return hits
        # 1: torchrun, after any signal
        assert process.returncode in (0, 1, -signal.SIGKILL), words
        assert "Traceback" not in words or process.returncode == 1, words


def rows_so_far(folder):
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def numbers(folder):
    return [without_times(row) for row in read_jsonl(folder / "metrics.jsonl")]


def same_weights(a, b):
    one = load_file(a / LAST / "model.safetensors")
    two = load_file(b / LAST / "model.safetensors")
    return all(torch.equal(one[name], two[name]) for name in one)


def equal(a, b):
    return same_weights(a, b) and numbers(a) == numbers(b)


def run_undisturbed(folder, start=start):
    words = said(start(folder))
    assert (folder / LAST).exists(), words
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return run_undisturbed(tmp_path_factory.mktemp("runs") / "undisturbed")


def die_after_saving():
    """The process is killed as soon as its first checkpoint is there."""
    save = Run.save

    def save_and_die(*given):
        save(*given)
        os.kill(os.getpid(), signal.SIGKILL)

    Run.save = save_and_die


def test_a_kill_right_after_a_checkpoint_loses_no_row(undisturbed, tmp_path):
    said(start(tmp_path, before=die_after_saving))
    assert rows_so_far(tmp_path) == 2
    said(start(tmp_path))
    assert equal(tmp_path, undisturbed)


def test_only_the_newest_checkpoints_are_kept(undisturbed):
    assert sorted(p.name for p in undisturbed.glob("step_*")) == ["step_000010", LAST]


@pytest.mark.parametrize("number, faults", [(signal.SIGKILL, 3), (signal.SIGTERM, 2)])
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    tmp_path, undisturbed, number, faults
):
    hits = disturbed(tmp_path / "run", faults, lambda process: process.send_signal(number))
    assert hits >= 1
    assert equal(tmp_path / "run", undisturbed)


SHARDED = "--parallel fsdp --dtype bfloat16"


@pytest.fixture(scope="module")
def undisturbed_sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sharded"
    many(2, SMALL, SHARDED, "--out", folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_so_does_a_sharded_run_of_two_processes_in_bfloat16(tmp_path, undisturbed_sharded, number):
    folder = tmp_path / "run"
    launched = Launched(folder, SHARDED)
    while rows_so_far(folder) < 3:
        assert launched.poll() is None, launched.launcher.said()
        time.sleep(0.01)
    launched.send_signal(number)
    words = said(launched)
    assert not (folder / LAST).exists()
    done = rows_so_far(folder)
    if number == signal.SIGTERM:  # nothing is lost
        assert checkpoint.newest(folder) == checkpoint.path_of(folder, done), words
    many(2, SMALL, SHARDED, "--out", folder)
    assert equal(folder, undisturbed_sharded)


def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, undisturbed):
    folder = tmp_path / "run"
    said(start(folder, "--steps 4"))
    state = folder / "step_000004/optimizer/exp_avg.00001-of-00001.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    for half in ("step_000006.tmp", "step_000001.old"):  # what a kill leaves
        (folder / half).mkdir()
    words = said(start(folder))
    assert "step_000004: cannot be read" in words
    assert equal(folder, undisturbed)
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_000010", LAST]


def full_disk(megabytes):
    """No file of the process may grow beyond this: what a full disk or a quota does to a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 2**20),) * 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_is_reported_in_one_line_and_loses_nothing(tmp_path, undisturbed):
    folder = tmp_path / "run"
    said(start(folder, "--steps 4"))
    process = start(folder, before=partial(full_disk, 6))  # weights do not fit
    words = said(process)
    assert process.returncode == 1
    assert "cannot be written" in words
    assert "step_000004 is intact" in words, words
    assert "Traceback" not in words
    assert not list(folder.glob("*.tmp"))
    said(start(folder))
    assert equal(folder, undisturbed)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    _, error = run(SMALL, "--out", tmp_path / "file/run", check=2)
    assert error.count("\n") == 1
    assert "file/run" in error


# ---------------------------------------------------------------- recipes/slurm.sh

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    echo $! >> PLACE/pids
done
status=0
for pid in $(cat PLACE/pids); do wait $pid || status=$?; done
rm PLACE/pids
exit $status
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; else echo "$@" >> PLACE/requeued; fi
"""


def slurm(place, *command):
    """recipes/slurm.sh on a cluster of one machine with two tasks; stand-ins for srun and
    scontrol."""
    (place / "bin").mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (place / "bin" / name).write_text(text.replace("PLACE", str(place)))
        (place / "bin" / name).chmod(0o755)
    env = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    words = [word for part in command for word in str(part).split()]
    return subprocess.Popen(
        ["bash", "recipes/slurm.sh", *words], cwd=ROOT, env=os.environ | env, stdout=subprocess.PIPE
    )


def test_a_slurm_job_saves_queues_itself_again_and_goes_on(tmp_path):
    folder = tmp_path / "run"
    job = slurm(tmp_path, slow_work(tmp_path, "sampling.sample", 100), "--out", folder)
    for line in job.stdout:
        if b"asleep" in line:
            break
    for pid in (tmp_path / "pids").read_text().split():  # Slurm signals the tasks
        os.kill(int(pid), signal.SIGTERM)
    words, _ = job.communicate(timeout=60)
    assert job.returncode == 0, words
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert checkpoint.newest(folder) == folder / "step_000001"

    work = slow_work(tmp_path, "sampling.sample", 0).replace("--steps 500", "--steps 2")
    job = slurm(tmp_path, work, "--out", folder)
    words, _ = job.communicate(timeout=120)
    assert job.returncode == 0, words
    assert b"resuming from" in words
    assert [row["step"] for row in read_jsonl(folder / "metrics.jsonl")] == [1, 2]
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1  # it is done

    job = slurm(tmp_path, work, "--lr 1 --out", folder)
    words, _ = job.communicate(timeout=120)
    assert job.returncode == 2, words  # an error is not queued again
    assert len((tmp_path / "requeued").read_text().splitlines()) == 1


# ---------------------------------------------------------------- the campaign


def report(name, tries, hits, losses):
    print(f"{name:34} {tries:5} {hits:4} {losses:7}", flush=True)


def disturb_runs(place, name, number, tries, each, start=start):
    """Runs that are hit `each` times, until `tries` hits were tried; a line of the table."""
    kind = re.sub("[^A-Za-z0-9]+", "_", name)  # of its folders: a command line has no spaces in it
    whole = run_undisturbed(place / f"{kind}-undisturbed", start)
    hits = 0
    losses = 0
    for i in range(tries // each):
        folder = place / f"{kind}-{i}"
        hits += disturbed(folder, each, lambda process: process.send_signal(number), start)
        losses += not equal(folder, whole)
    report(name, tries, hits, losses)


def fill_disks(place, tries):
    whole = run_undisturbed(place / "disk-undisturbed")
    losses = 0
    for i in range(tries):
        folder = place / f"disk-{i}"
        said(start(folder, f"--steps {2 + i}"))
        said(start(folder, before=partial(full_disk, 0.5 + 2 * i)))
        said(start(folder))
        losses += not equal(folder, whole)
    report("disk full", tries, tries, losses)


def kill_ranks(place, tries):
    losses = 0
    for i in range(tries):
        seconds, words = a_rank_is_killed(place / f"rank-{i}", after=random.uniform(0, 3))
        losses += seconds >= 60 or "another rank is gone" not in words or "SIGKILL" not in words
    report("one rank of two killed", tries, tries, losses)


def campaign(place):
    sharded = partial(Launched, flags=SHARDED)
    rounded = partial(start, flags="--dtype bfloat16")
    print(f"{'fault':34} tried  hit  losses")
    disturb_runs(place, "kill -9", signal.SIGKILL, 100, 5)
    disturb_runs(place, "kill -9, bfloat16", signal.SIGKILL, 20, 5, rounded)
    disturb_runs(place, "SIGTERM", signal.SIGTERM, 20, 4)
    disturb_runs(place, "Ctrl-C", signal.SIGINT, 20, 4)
    disturb_runs(place, "SIGTERM, torchrun, fsdp, bfloat16", signal.SIGTERM, 8, 2, sharded)
    disturb_runs(place, "Ctrl-C, torchrun, fsdp, bfloat16", signal.SIGINT, 8, 2, sharded)
    disturb_runs(place, "kill -9, torchrun, fsdp, bfloat16", signal.SIGKILL, 8, 2, sharded)
    fill_disks(place, 10)
    kill_ranks(place, 10)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        campaign(Path(folder))
