"""What happens to runs: kills, signals, full disks, torn files. Nothing may be lost or silently wrong.

python -m pytest -q test_faults.py              # the short form, part of make test
python test_faults.py                           # the whole campaign: 100 kills, 20 signals, 10 full disks,
                                                # 10 ranks of two, a table
"""

import random
import resource
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Script
from safetensors.torch import load_file
from test_parallel import a_rank_is_killed
from test_scripts import rows, run, without_times

SMALL = (
    "train_grpo.py --crm demo/crm --data demo/data --steps 12 --save-every 2 --keep 2 --prompts 2 --group 2 "
    "--minibatches 1 --max-new-tokens 6 --eval-every -1 --lr 1e-4 --resume auto --out"
)


def start(folder, flags="", **options):
    return Script(SMALL, folder, flags, **options)


def said(process):
    return "".join(process.communicate(300))


def disturbed(folder, faults, hit):
    """Run, hit(process, moment) it `faults` times at random moments of its work, let it end; how often it was hit."""
    random.seed(0)
    hits = 0
    while True:
        process = start(folder)
        if hits < faults:
            before = len(rows_so_far(folder))
            deadline = time.time() + 60
            while (
                len(rows_so_far(folder)) <= before
                and process.poll() is None
                and time.time() < deadline
            ):
                time.sleep(0.01)  # past the imports: the moment lies in the work itself
            time.sleep(random.uniform(0, 0.6))
            hits += process.poll() is None
            hit(process)
        out = said(process)
        for checkpoint in folder.glob(
            "step_*[0-9]"
        ):  # whatever there is can be read, at any moment
            load_file(checkpoint / "model.safetensors")
            torch.load(checkpoint / "trainer.pt", weights_only=True)
        if (folder / "step_000012").exists():
            return hits
        assert process.returncode in (0, -signal.SIGKILL), out


def rows_so_far(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def equal(a, b):
    one, two = (load_file(folder / "step_000012/model.safetensors") for folder in (a, b))
    return all(torch.equal(one[name], two[name]) for name in one) and [
        without_times(row) for row in rows(a / "metrics.jsonl")
    ] == [without_times(row) for row in rows(b / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    out = said(start(folder))
    assert (folder / "step_000012").exists(), out
    return folder


def test_only_the_newest_checkpoints_are_kept(undisturbed):
    assert sorted(p.name for p in undisturbed.glob("step_*")) == ["step_000010", "step_000012"]


@pytest.mark.parametrize("number, faults", [(signal.SIGKILL, 3), (signal.SIGTERM, 2)])
def test_a_run_that_is_killed_again_and_again_ends_as_an_undisturbed_one(
    tmp_path, undisturbed, number, faults
):
    hits = disturbed(tmp_path / "run", faults, lambda process: process.send_signal(number))
    assert hits >= 1 and equal(tmp_path / "run", undisturbed)


def test_a_torn_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, undisturbed):
    said(start(tmp_path / "run", "--steps 4"))
    state = tmp_path / "run/step_000004/trainer.pt"
    state.write_bytes(state.read_bytes()[:1000])
    for half in (
        "step_000006.tmp",
        "step_000001.old",
    ):  # what a kill while saving or deleting leaves
        (tmp_path / "run" / half).mkdir()
    out = said(start(tmp_path / "run"))
    assert "step_000004: cannot be read" in out and equal(tmp_path / "run", undisturbed)
    assert sorted(p.name for p in (tmp_path / "run").glob("step_*")) == [
        "step_000010",
        "step_000012",
    ]


def full_disk(megabytes):
    """No file of the process may grow beyond this: what a full disk or a quota does to a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 2**20),) * 2)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_a_full_disk_is_reported_in_one_line_and_loses_nothing(tmp_path, undisturbed):
    said(start(tmp_path / "run", "--steps 4"))
    process = start(tmp_path / "run", before=partial(full_disk, 6))  # weights fit not
    out = said(process)
    assert (
        process.returncode == 1 and "cannot be written" in out and "step_000004 is whole" in out
    ), out
    assert "Traceback" not in out and not list((tmp_path / "run").glob("*.tmp"))
    said(start(tmp_path / "run"))
    assert equal(tmp_path / "run", undisturbed)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path):
    (tmp_path / "file").write_text("")
    _, error = run(SMALL, tmp_path / "file/run", check=2)
    assert error.count("\n") == 1 and "file/run" in error


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "undisturbed"
        said(start(whole))
        print(f"{'fault':12} tried  hit  losses")
        for name, number, tries, each in (
            ("kill -9", signal.SIGKILL, 100, 5),
            ("SIGTERM", signal.SIGTERM, 20, 4),
        ):
            hits = losses = 0
            for i in range(tries // each):
                folder = Path(place) / f"{name}-{i}"
                hits += disturbed(folder, each, lambda process: process.send_signal(number))
                losses += not equal(folder, whole)
            print(f"{name:12} {tries:5} {hits:4} {losses:7}", flush=True)
        losses = 0
        for i in range(10):
            folder = Path(place) / f"full-{i}"
            said(start(folder, f"--steps {2 + i}"))
            said(start(folder, before=partial(full_disk, 0.5 + 2 * i)))
            said(start(folder))
            losses += not equal(folder, whole)
        print(f"{'disk full':12} {10:5} {10:4} {losses:7}", flush=True)
        losses = 0
        for i in range(10):
            seconds, words = a_rank_is_killed(Path(place) / f"rank-{i}", after=random.uniform(0, 3))
            losses += not (seconds < 60 and "another rank is gone" in words and "SIGKILL" in words)
        print(f"{'rank killed':12} {10:5} {10:4} {losses:7}")
