"""The run folder: what is kept, what is touched, what a resumed run remembers, how a run stops. The
model is a stub that saves a word, the optimizer is the real one with three weights."""

import errno
import json
import os
import pickle
import shutil
import signal
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from conftest import Script
from PIL import Image
from safetensors.torch import load_file

import train_grpo
import train_sft
from runtime import checkpoint, files
from runtime import run as module
from runtime.cli import ROOT
from runtime.files import read_jsonl, read_torch, write_whole
from runtime.optim import Optimizer
from runtime.parallel import Ranks
from runtime.readers import BadRow
from runtime.run import MAX_SKIPPED, MAY_CHANGE, Run, learning_rate, step_indices

CALM = {
    "seconds": 1.0,
    "peak_memory_gb": 1.0,
    "skipped": 0,
    "parse_ok": 1.0,
    "finished": 1.0,
    "zero_std": 0.0,
    "length": 9,
}


@dataclass
class Config:
    """The flags that Run uses, and a few that decide what is learned."""

    out: str
    crm: str = "base"
    data: str = "somewhere"
    resume: str = "no"
    track: str | None = None
    steps: int = 12
    save_every: int = 100
    keep: int = 0
    eval_every: int = 50
    lr: float = 1e-6
    seed: int = 0
    lora_rank: int = 0
    parallel: str = "ddp"
    offload: bool = False


class StubCRM:
    """Saves a word. It counts how often its weights were gathered."""

    gatherings = 0

    @contextmanager
    def gathered(self):
        self.gatherings += 1
        yield

    def save(self, folder):
        (folder / "model.txt").write_text("weights")


def an_optimizer(value=0.0):
    return Optimizer({"w": torch.nn.Parameter(torch.full((3,), value))})


class OfTwo(Ranks):
    """Rank 0 of two. The other one gives the answers in `others`, one for each gather, then what
    rank 0 gives."""

    def __init__(self, *others):
        super().__init__(rank=0, world=2)
        self.others = list(others)

    def gather(self, items):
        other = self.others.pop(0) if self.others else items[0]
        return [*items, other]


@pytest.fixture(autouse=True)
def signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cfg(tmp_path):
    return Config(out=str(tmp_path / "run"))


def begun(cfg, steps=12, ranks=None, **changes):
    run = Run(replace(cfg, steps=steps, **changes), ranks or Ranks())
    run.begin(an_optimizer(), steps)
    return run


def train(run, last, iou=(), save=(), **numbers):
    """Pretend to train up to step `last`: {step: IoU} of the evaluations, the steps that are
    saved."""
    for step in range(run.start_step + 1, last + 1):
        row = {"step": step, **CALM, **numbers}
        run.warn(row)
        if step in iou:
            row["sampled/iou"] = iou[step]
        run.log("metrics", row)
        if step in save:
            run.save(step, StubCRM(), an_optimizer())
        with run.checkpoint_on_bad_row(step, StubCRM(), an_optimizer()):
            pass  # the next step samples with these weights
    return run


def names(run):
    return [folder.name for folder in checkpoint.checkpoints(run.folder).values()]


def rejected(cfg, **changes):
    with pytest.raises(ValueError) as error:
        Run(replace(cfg, **changes), Ranks())
    assert "\n" not in str(error.value)
    return str(error.value)


def torn(folder, name="optimizer/exp_avg.00001-of-00001.safetensors"):
    """Cut the end of a checkpoint's file off."""
    file = folder / name
    file.write_bytes(file.read_bytes()[:-4])


# ---------------------------------------------------------------- which checkpoints stay


def test_keep_leaves_the_newest_and_the_best_evaluated_that_exists(cfg):
    # the best, step 150, is never saved
    iou = {50: 0.20, 100: 0.35, 150: 0.36, 200: 0.30, 250: 0.28, 300: 0.25}
    run = train(begun(cfg, steps=300, keep=1), 300, iou, save=(100, 200, 300))
    assert names(run) == ["step_000100", "step_000300"]


@pytest.mark.parametrize("keep, stay", [(0, [2, 4, 6, 8]), (2, [6, 8]), (3, [4, 6, 8])])
def test_keep_counts_the_newest(cfg, keep, stay):
    run = train(begun(cfg, keep=keep), 8, save=(2, 4, 6, 8))
    assert names(run) == [f"step_{step:06d}" for step in stay]


def test_a_torn_checkpoint_neither_counts_nor_costs_the_one_that_was_just_saved(cfg):
    run = train(begun(cfg), 8, save=(4, 6, 8))
    torn(run.folder / "step_000006")
    torn(run.folder / "step_000008")
    again = train(begun(cfg, resume="yes", keep=1), 5, save=(5,))
    assert names(again) == ["step_000005", "step_000006", "step_000008"]
    assert begun(cfg, resume="auto", keep=1).start_step == 5
    further = train(begun(cfg, resume="auto", keep=2), 9, save=(6, 8, 9))
    assert names(further) == ["step_000008", "step_000009"]


def test_a_folder_of_another_name_is_no_checkpoint_and_is_left_alone(cfg):
    run = begun(cfg, keep=1)
    others = ["step_best1", "step_2024-11-01", "step_12x3", "step_"]
    for name in others:
        (run.folder / name).mkdir()
    (run.folder / "step_99").write_text("a file")
    train(run, 4, save=(2, 4))
    assert names(run) == ["step_000004"]
    assert Run(replace(cfg, resume="yes"), Ranks()).checkpoint.name == "step_000004"
    assert all((run.folder / name).exists() for name in [*others, "step_99"])


def test_no_checkpoint_where_none_is_wanted(cfg, capsys):
    run = train(begun(cfg, save_every=-1), 12, save=(12,))
    run.finish(12)
    assert names(run) == []
    assert "weights not saved" in capsys.readouterr().out


def test_a_checkpoint_is_due_at_intervals_at_the_end_and_when_stopped(cfg):
    run = begun(cfg, save_every=5)
    assert [step for step in range(1, 13) if run.is_due(step, stopped=False)] == [5, 10, 12]
    assert run.is_due(3, stopped=True)
    assert not begun(cfg, save_every=0).is_due(5, stopped=False)


def test_an_evaluation_is_due_at_intervals_and_at_the_end(cfg):
    run = begun(cfg, eval_every=5)
    assert [step for step in range(1, 13) if run.evaluation_is_due(step)] == [5, 10, 12]
    assert not begun(cfg, eval_every=0).evaluation_is_due(5)


# ---------------------------------------------------------------- writing one


def test_weights_are_gathered_once_to_be_saved(cfg):
    crm = StubCRM()
    begun(cfg).save(2, crm, an_optimizer())
    assert crm.gatherings == 1


def test_a_kill_while_saving_leaves_the_checkpoint_before(cfg):
    class Killed(StubCRM):
        def save(self, folder):
            super().save(folder)
            raise KeyboardInterrupt

    run = train(begun(cfg), 4, save=(2,))
    with pytest.raises(KeyboardInterrupt):
        run.save(4, Killed(), an_optimizer())
    assert names(run) == ["step_000002"]
    assert (run.folder / "step_000004.tmp").exists()
    (run.folder / "step_000001.old").mkdir()
    again = begun(cfg, resume="yes")
    assert again.start_step == 2
    assert not [*run.folder.glob("*.tmp"), *run.folder.glob("*.old")]
    # steps 3 and 4 will be done again
    assert [row["step"] for row in again.read("metrics")] == [1, 2]


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_half_of_one(cfg, monkeypatch):
    def killed(folder, **options):
        if folder.exists():
            (folder / "trainer.json").unlink()
            raise KeyboardInterrupt

    run = train(begun(cfg), 4, save=(2, 4))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.remove(run.folder / "step_000002")
    assert names(run) == ["step_000004"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(cfg, monkeypatch):
    run = begun(cfg)
    on_disk = set()
    fsync = os.fsync
    rename = Path.rename

    def noted(handle):
        fsync(handle)
        on_disk.add(os.fstat(handle).st_ino)

    def renamed(path, target):
        written = {part.stat().st_ino for part in [*path.rglob("*"), path]}
        assert written <= on_disk
        assert target.name == "step_000002"
        on_disk.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    run.save(2, StubCRM(), an_optimizer())
    assert on_disk == {run.folder.stat().st_ino}  # its name comes last


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_cannot_flush_a_folder_is_good_enough(cfg, monkeypatch, number):
    fsync = os.fsync

    def files_only(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    run = train(begun(cfg), 2, save=(2,))
    assert names(run) == ["step_000002"]
    assert begun(cfg, resume="yes").start_step == 2


def test_a_disk_that_fails_at_the_flush_of_a_file_is_said(cfg, monkeypatch, capsys):
    def failing(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run = begun(cfg)
    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(SystemExit, match="1"):
        run.save(2, StubCRM(), an_optimizer())
    assert "Input/output error" in capsys.readouterr().err
    assert names(run) == []


class Failing(StubCRM):
    def __init__(self, error):
        self.error = error

    def save(self, folder):
        raise self.error


def test_a_full_disk_is_one_line(cfg, capsys):
    run = train(begun(cfg), 2, save=(2,))
    with pytest.raises(SystemExit, match="1"):
        run.save(4, Failing(OSError(28, "No space left on device")), an_optimizer())
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "No space left" in said
    assert "step_000002 is intact" in said
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("a bug of ours")]
)
def test_what_is_no_disks_fault_is_not_taken_for_it(cfg, capsys, error):
    run = begun(cfg)
    with pytest.raises(type(error)):
        run.save(4, Failing(error), an_optimizer())
    assert "cannot be written" not in capsys.readouterr().err


def test_a_rank_that_waits_in_vain_while_saving_says_so(cfg, capsys):
    class TimedOut(Ranks):
        def gather(self, items):
            if self.world == 2:
                raise RuntimeError("Timed out waiting 1800000ms for recv operation to complete")
            return items

    ranks = TimedOut()
    run = begun(cfg, ranks=ranks)
    ranks.world = 2
    with pytest.raises(RuntimeError, match="Timed out"):
        run.save(2, StubCRM(), an_optimizer())
    assert "cannot be written" not in capsys.readouterr().err


def test_a_disk_that_is_full_for_another_rank_ends_this_one_as_well(cfg, capsys):
    run = begun(cfg)
    run.ranks = OfTwo(None, None, "No space left on device")  # folder, weights, optimizer
    with pytest.raises(SystemExit, match="1"):
        run.save(2, StubCRM(), an_optimizer())
    assert "No space left" in capsys.readouterr().err
    assert names(run) == []


# ---------------------------------------------------------------- reading one


@pytest.mark.parametrize(
    "file", ["trainer.json", "optimizer/masters.00001-of-00001.safetensors", "model.safetensors"]
)
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(cfg, capsys, file):
    run = begun(cfg)
    for step in (2, 4, 6):
        run.save(step, StubCRM(), an_optimizer())
        saved = run.folder / f"step_{step:06d}"
        weights = saved / "optimizer/exp_avg.00001-of-00001.safetensors"
        shutil.copy(weights, saved / "model.safetensors")
    torn(run.folder / "step_000004", file)
    torn(run.folder / "step_000006", file)
    again = Run(replace(cfg, resume="yes"), Ranks())
    assert again.checkpoint.name == "step_000002"
    assert "step_000006: cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["trainer.json", "optimizer/masters.00001-of-00001.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_not_read(cfg, file):
    run = train(begun(cfg), 4, save=(2, 4))
    (run.folder / "step_000004" / file).unlink()
    assert Run(replace(cfg, resume="yes"), Ranks()).checkpoint.name == "step_000002"


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def test_nothing_in_a_checkpoint_is_unpickled(cfg, tmp_path):
    """Whatever a checkpoint of earlier versions, or of torch.distributed.checkpoint, would have
    unpickled."""
    run = train(begun(cfg), 2, save=(2,))
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    folder = run.folder / "step_000002"
    for name in ("trainer.pt", "optimizer/.metadata", "optimizer/__0_0.distcp", "optimizer.pt"):
        (folder / name).write_bytes(trap)
    assert begun(cfg, resume="yes").start_step == 2
    for file in [*folder.rglob("*.safetensors"), folder / "trainer.json"]:
        file.write_bytes(trap)
    assert begun(cfg, resume="auto").start_step == 0
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # the trap works


# ---------------------------------------------------------------- resume


def test_a_resumed_run_starts_from_the_newest_checkpoint_with_its_state(cfg, capsys):
    run = begun(cfg)
    run.log("metrics", *({"step": step} for step in range(1, 6)))
    run.save(2, StubCRM(), an_optimizer(2.0))
    run.save(4, StubCRM(), an_optimizer(4.0))
    again = Run(replace(cfg, resume="auto"), Ranks())
    optimizer = an_optimizer()
    assert again.begin(optimizer, 12) == 4
    assert optimizer.parameters[0].tolist() == [4, 4, 4]
    assert f"resuming from {again.checkpoint}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has 4 steps already"):
        Run(replace(cfg, resume="auto"), Ranks()).begin(optimizer, 4)


def test_the_optimizer_of_other_parameters_is_one_line(cfg):
    train(begun(cfg), 2, save=(2,))
    for parameters in (
        {"v": torch.nn.Parameter(torch.zeros(3))},
        {"w": torch.nn.Parameter(torch.zeros(4))},
        {"w": torch.nn.Parameter(torch.zeros(3, 2))},
        {"w": torch.nn.Parameter(torch.zeros(3)), "v": torch.nn.Parameter(torch.zeros(3))},
    ):
        with pytest.raises(ValueError, match="--resume: .*trained other parameters"):
            Run(replace(cfg, resume="yes"), Ranks()).begin(Optimizer(parameters), 12)


def test_resume_needs_a_checkpoint_unless_it_is_auto(cfg):
    assert "--resume: no checkpoint" in rejected(cfg, resume="yes")
    assert begun(cfg, resume="auto").start_step == 0


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lr": 1e-3}, "--lr was 1e-06, is 0.001"),
        ({"data": "elsewhere"}, "--data was 'somewhere', is 'elsewhere'"),
        ({"crm": "run/step_000002"}, "--crm was 'base', is 'run/step_000002'"),
        ({"seed": 1, "lora_rank": 4}, "--seed was 0, is 1; --lora-rank was 0, is 4"),
    ],
)
def test_resume_rejects_flags_that_change_what_is_learned(cfg, change, says):
    run = train(begun(cfg), 2, save=(2,))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    said = rejected(cfg, resume="yes", **change)
    assert all(text in said for text in says.split("; ")), said
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_no_flag_that_decides_what_is_learned_may_change_on_resume():
    model = "crm prompt resize coordinates dtype seed lora_rank trainable"
    data = "data skip_bad_rows prompts batch max_new_tokens temperature think"
    reward = "mode coefficients asm group resample"
    loss = "norm agg ratio clip_low clip_high dual_clip kl kl_coef entropy_coef sampler_is"
    updates = "lr schedule weight_decay warmup warmup_ratio minibatches inner_epochs"
    decides = set(" ".join([model, data, reward, loss, updates]).split())
    flags = {field.name for field in [*fields(train_grpo.Config), *fields(train_sft.Config)]}
    assert not MAY_CHANGE & decides
    assert MAY_CHANGE | decides == flags  # each flag is in one of the two lists


def test_resume_takes_other_steps_intervals_and_ways_to_compute_the_same(cfg):
    train(begun(cfg), 2, save=(2,))
    changes = dict(parallel="fsdp", offload=True, eval_every=7, save_every=3, keep=2)
    run = begun(cfg, steps=20, resume="auto", **changes)
    assert run.start_step == 2
    assert json.loads((run.folder / "config.json").read_text())["keep"] == 2


def test_a_flag_that_did_not_exist_then_does_not_stop_a_resume(cfg):
    train(begun(cfg), 2, save=(2,))

    @dataclass
    class Newer(Config):
        fresh: int = 3

    assert Run(Newer(**asdict(replace(cfg, resume="yes"))), Ranks()).checkpoint is not None


def test_a_checkout_that_has_moved_can_resume(cfg, monkeypatch):
    """The embedded model and data are named by where they are, which is inside the checkout."""
    embedded = dict(crm=str(ROOT / "demo/crm"), data=str(ROOT / "demo/data"))
    run = train(begun(cfg, **embedded), 2, save=(2,))
    assert json.loads((run.folder / "config.json").read_text())["crm"] == "demo/crm"
    monkeypatch.setattr(module, "ROOT", Path("/elsewhere/checkout"))
    moved = dict(crm="/elsewhere/checkout/demo/crm", data="/elsewhere/checkout/demo/data")
    assert begun(cfg, resume="yes", **moved).start_step == 2
    other = dict(crm="/elsewhere/checkout2/demo/crm", data=moved["data"])
    assert "--crm was 'demo/crm', is '/elsewhere/checkout2/demo/crm'" in rejected(
        cfg, resume="yes", **other
    )


def test_a_run_of_before_which_kept_absolute_paths_can_resume(cfg):
    embedded = dict(crm=str(ROOT / "demo/crm"))
    run = train(begun(cfg, **embedded), 2, save=(2,))
    config = json.loads((run.folder / "config.json").read_text())
    (run.folder / "config.json").write_text(json.dumps(config | embedded))
    assert begun(cfg, resume="yes", **embedded).start_step == 2


def test_warnings_first_values_and_skipped_steps_survive_a_resume(cfg, capsys):
    run = begun(cfg)
    for step, entropy in enumerate((2.0, 1.0, 0.1), 1):  # collapsed by step 3
        row = {"step": step, **CALM, "entropy": entropy, "skipped": step > 1}
        run.warn(row)
        run.log("metrics", row)
    run.save(3, StubCRM(), an_optimizer())
    assert capsys.readouterr().out.count("entropy has collapsed") == 1

    again = begun(cfg, resume="yes")
    assert again.first_values["entropy"] == 2.0
    assert again.skipped == 2
    again.warn({"step": 4, **CALM, "entropy": 0.1, "skipped": 0})
    assert "entropy has collapsed" not in capsys.readouterr().out  # said before
    assert again.skipped == 0

    fresh = begun(cfg, resume="yes")
    fresh.warned.clear()
    fresh.warn({"step": 4, **CALM, "entropy": 0.1})  # against step 1, not against step 4
    assert "entropy has collapsed" in capsys.readouterr().out


def test_a_fall_of_the_held_out_parse_rate_is_warned_of_also_after_a_resume(cfg, capsys):
    run = begun(cfg)
    run.remember({"sampled/parse_ok": 0.9})
    run.log("metrics", {"step": 0, "sampled/parse_ok": 0.9})
    train(run, 3, save=(3,))
    again = begun(cfg, resume="yes")
    again.warn({"step": 4, "sampled/parse_ok": 0.75})
    assert "held-out" not in capsys.readouterr().out
    row = {"step": 5, "sampled/parse_ok": 0.5}
    again.warn(row)
    again.warn({"step": 6, "sampled/parse_ok": 0.4})
    said = capsys.readouterr().out
    assert said.count("step 5: far fewer held-out completions can be parsed than at first") == 1
    assert said.count("held-out") == len(row["warnings"]) == 1


def test_skipped_steps_in_a_row_end_the_run_and_others_do_not(cfg):
    run = begun(cfg)
    run.give_up_on_skipped()
    last = (1,) * MAX_SKIPPED
    for step, skipped in enumerate((1, 1, 0, *last), 1):
        run.give_up_on_skipped()
        run.warn({"step": step, **CALM, "skipped": skipped})
    with pytest.raises(RuntimeError, match="3 steps in a row without a finite gradient"):
        run.give_up_on_skipped()


# ---------------------------------------------------------------- several ranks resume


def test_a_rank_that_cannot_read_what_rank_0_chose_ends_all(cfg):
    """A disk of its own, or a part that has not arrived there."""
    train(begun(cfg), 2, save=(2,))
    problem = "rank 1 of 2 cannot read it: step_000002/trainer.json: No such file"
    ranks = OfTwo(None, None, ({}, problem))
    with pytest.raises(ValueError, match="rank 1 of 2 cannot read it.*on a disk that all share"):
        Run(replace(cfg, resume="auto"), ranks)


def test_ranks_that_see_different_checkpoints_of_one_name_end(cfg):
    train(begun(cfg), 2, save=(2,))
    ranks = OfTwo(None, None, ({"step": 3, "parts": 1}, None))
    with pytest.raises(ValueError, match="the ranks see different ones"):
        Run(replace(cfg, resume="auto"), ranks)


def test_rank_0_decides_whether_there_is_a_checkpoint(cfg, monkeypatch):
    """Another rank with an old view of a shared disk sees none, or fewer, and is told."""

    class Second(Ranks):
        def gather(self, items):
            return [self.answers.pop(0), *items]

    run = train(begun(cfg), 4, save=(2, 4))
    ranks = Second(rank=1, world=2)
    good = ({"step": 4, "parts": 1}, None)
    ranks.answers = [None, "step_000004", good, None]
    monkeypatch.setattr(checkpoint, "checkpoints", lambda folder: {})
    second = Run(replace(cfg, resume="auto"), ranks)
    assert second.checkpoint == run.folder / "step_000004"
    ranks.answers = [None, [{"step": 1, "entropy": 5.0}]]
    assert second.begin(an_optimizer(), 12) == 4
    assert second.first_values["entropy"] == 5.0


def test_what_rank_0_rejects_all_reject(cfg):
    class Second(Ranks):
        def gather(self, items):
            return ["--out somewhere: there is a run", *items]

    with pytest.raises(ValueError, match="there is a run"):
        Run(cfg, Second(rank=1, world=2))


# ---------------------------------------------------------------- only a run's own files


def test_a_new_run_is_not_written_over_one_that_is_there(cfg):
    run = train(begun(cfg), 2)
    before = run.read("metrics")
    assert "--resume continues it, another --out starts a new one" in rejected(cfg)
    assert run.read("metrics") == before


@pytest.mark.parametrize("resume", ["no", "auto"])
@pytest.mark.parametrize(
    "file, text",
    [
        ("best_and_worst.jsonl", '{"image": "a.png", "query": "?"}\n'),
        ("held_out.jsonl", '{"step": 3, "of": "another program"}\n'),
        ("metrics.jsonl", "[1, 2]\n"),
        ("metrics.jsonl", "no JSON\n"),
        ("config.json", '{"model_type": "qwen2_5_vl"}'),
    ],
)
def test_a_folder_with_files_of_others_under_our_names_is_left_untouched(
    cfg, tmp_path, resume, file, text
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text(text)
    assert file in rejected(cfg, resume=resume)
    assert (tmp_path / "run" / file).read_text() == text
    assert len(list((tmp_path / "run").iterdir())) == 1


def test_other_files_in_the_folder_are_left_alone(cfg):
    run = train(begun(cfg), 4, save=(2,))
    others = {
        "predictions.jsonl": '{"id": 1}\n',
        "samples.jsonl": '{"image": "a.png", "query": "?"}\n',
        "log.jsonl": '{"step": 99}\n',
        "notes.txt": "mine",
    }
    for name, text in others.items():
        (run.folder / name).write_text(text)
    run = train(begun(cfg, resume="yes"), 6, save=(6,))
    assert {name: (run.folder / name).read_text() for name in others} == others


def test_rows_after_the_checkpoint_and_a_torn_last_line_are_dropped(cfg):
    run = train(begun(cfg), 5, save=(4,))
    run.log("best_and_worst", *({"step": step} for step in (3, 4, 5)))
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')
    again = begun(cfg, resume="yes")
    assert [row["step"] for row in again.read("metrics")] == [1, 2, 3, 4]
    assert [row["step"] for row in again.read("best_and_worst")] == [3, 4]


# ---------------------------------------------------------------- a bad row


def test_a_bad_row_hours_into_a_run_saves_what_is_done_and_is_named(cfg):
    run = train(begun(cfg), 7)
    with (
        pytest.raises(BadRow, match="row 9: broken image"),
        run.checkpoint_on_bad_row(7, StubCRM(), an_optimizer()),
    ):
        raise BadRow("row 9: broken image")
    assert names(run) == ["step_000007"]
    assert begun(cfg, resume="yes").start_step == 7


def test_before_the_first_step_a_bad_row_saves_nothing_and_no_bad_row_nothing_ever(cfg):
    run = begun(cfg)
    with pytest.raises(BadRow), run.checkpoint_on_bad_row(0, StubCRM(), an_optimizer()):
        raise BadRow("row 9")
    with run.checkpoint_on_bad_row(3, StubCRM(), an_optimizer()):
        pass
    assert names(run) == []
    with pytest.raises(KeyError), run.checkpoint_on_bad_row(3, StubCRM(), an_optimizer()):
        raise KeyError("a bug of ours")


def test_a_bad_row_on_another_rank_ends_this_one_after_the_same_checkpoint(cfg):
    run = begun(cfg)
    run.ranks = OfTwo(("row 3 of the other rank", None, False))
    with (
        pytest.raises(BadRow, match="row 3 of the other rank"),
        run.checkpoint_on_bad_row(2, StubCRM(), an_optimizer()),
    ):
        pass
    assert names(run) == ["step_000002"]


@pytest.mark.parametrize("of_another_rank", [False, True])
def test_weights_that_have_diverged_are_not_saved_and_cost_no_good_ones(
    cfg, capsys, of_another_rank
):
    run = train(begun(cfg, keep=1), 5, save=(4,))
    here = FloatingPointError("logits are not finite")
    if of_another_rank:
        run.ranks = OfTwo((None, "logits are not finite", False))
        here = None
    with (
        pytest.raises(SystemExit, match="1"),
        run.checkpoint_on_bad_row(5, StubCRM(), an_optimizer()),
    ):
        if here is not None:
            raise here
    assert names(run) == ["step_000004"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "step 6: logits are not finite; these weights are not saved" in said
    assert "step_000004 is as it was" in said


def test_weights_that_are_broken_before_the_first_step_are_bad_input(cfg):
    with (
        pytest.raises(BadRow, match="logits are not finite"),
        begun(cfg).checkpoint_on_bad_row(0, StubCRM(), an_optimizer()),
    ):
        raise FloatingPointError("logits are not finite")


# ---------------------------------------------------------------- a signal


def test_a_signal_outside_the_sampling_lets_the_step_finish(cfg, capfd):
    run = begun(cfg)
    assert not run.stopped()
    signal.raise_signal(signal.SIGTERM)
    assert run.stopped()
    assert "stopping" in capfd.readouterr().out


def test_a_signal_while_sampling_gives_this_step_up_and_saves_those_before_it(cfg, capfd):
    run = train(begun(cfg), 7)
    crm = StubCRM()
    reached = []
    with (
        pytest.raises(SystemExit) as left,
        run.checkpoint_on_bad_row(7, crm, an_optimizer()),
        run.interruptible(),
    ):
        reached.append("before")
        signal.raise_signal(signal.SIGTERM)
        reached.append("after")
    assert left.value.code == 0
    assert reached == ["before"]
    assert names(run) == ["step_000007"]
    assert "stopped at 7 of 12 steps; the same command with --resume" in capfd.readouterr().out


def test_a_signal_just_before_the_sampling_does_not_wait_for_it(cfg):
    run = train(begun(cfg), 7)
    signal.raise_signal(signal.SIGINT)
    with (
        pytest.raises(SystemExit, match="0"),
        run.checkpoint_on_bad_row(7, StubCRM(), an_optimizer()),
        run.interruptible(),
    ):
        raise AssertionError("it is not entered")
    assert names(run) == ["step_000007"]


def test_a_signal_to_another_rank_ends_this_one_after_the_same_step(cfg):
    run = train(begun(cfg), 7)
    run.ranks = OfTwo((None, None, True))
    with (
        pytest.raises(SystemExit, match="0"),
        run.checkpoint_on_bad_row(7, StubCRM(), an_optimizer()),
        run.interruptible(),
    ):
        pass
    assert names(run) == ["step_000007"]


def test_between_phases_a_run_leaves_only_if_it_was_asked_to(cfg):
    run = train(begun(cfg), 7)
    run.leave_if_stopped(7, StubCRM(), an_optimizer())
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="0"):
        run.leave_if_stopped(7, StubCRM(), an_optimizer())
    assert names(run) == ["step_000007"]


def test_what_is_saved_already_is_not_saved_again_when_a_run_leaves(cfg):
    train(begun(cfg), 7, save=(7,))
    run = begun(cfg, resume="yes")
    crm = StubCRM()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="0"):
        run.leave_if_stopped(7, crm, an_optimizer())
    assert crm.gatherings == 0
    assert names(run) == ["step_000007"]


SLEEPER = """
import sys, time, torch
from runtime.optim import Optimizer
from runtime.parallel import Ranks
from runtime.run import Run
from train_grpo import Config
optimizer = Optimizer({"w": torch.nn.Parameter(torch.zeros(3))})
Run(Config(out=sys.argv[1]), Ranks()).begin(optimizer, 12)
print("begun", flush=True)
while True:
    time.sleep(0.01)
"""


class Sleeper(Script):
    """A process whose run has begun, and that does not notice that it was asked to stop."""

    def __init__(self, folder):
        folder.mkdir()
        (folder / "sleeper.py").write_text(SLEEPER)
        super().__init__(folder / "sleeper.py", folder / "run")
        self.wait_for("begun")

    def wait_for(self, words):
        deadline = time.time() + 60
        while words not in self.files[0].read_text():
            assert time.time() < deadline and self.poll() is None
            time.sleep(0.01)

    def ended_by(self):
        """The signal that ended it, None if it still runs after a second."""
        self.process.join(1)
        if self.returncode is None:
            return None
        self.communicate()
        return -self.returncode


def test_a_second_ctrl_c_ends_the_process_at_once_and_a_second_sigterm_does_not(tmp_path):
    first = Sleeper(tmp_path / "first")
    first.send_signal(signal.SIGINT)
    first.wait_for("a second Ctrl-C ends at once")
    assert first.ended_by() is None
    first.send_signal(signal.SIGINT)
    assert first.ended_by() == signal.SIGINT

    second = Sleeper(tmp_path / "second")
    second.send_signal(signal.SIGTERM)
    second.wait_for("a second Ctrl-C ends at once")
    second.send_signal(signal.SIGTERM)  # a cluster repeats itself
    assert second.ended_by() is None
    second.send_signal(signal.SIGINT)
    assert second.ended_by() == signal.SIGINT

    # torchrun passes the first Ctrl-C on as SIGINT and the second as SIGTERM
    third = Sleeper(tmp_path / "third")
    third.send_signal(signal.SIGINT)
    third.wait_for("a second Ctrl-C ends at once")
    third.send_signal(signal.SIGTERM)
    assert third.ended_by() == signal.SIGTERM


@pytest.mark.parametrize(
    "save_every, says",
    [
        (0, "stopped at 7 of 12 steps; the same command with --resume continues\n"),
        (-1, "stopped at 7 of 12 steps; nothing is saved, the same command with --resume auto"),
    ],
)
def test_a_run_that_was_stopped_says_where_and_how_to_go_on(cfg, capsys, save_every, says):
    run = train(begun(cfg, save_every=save_every), 7, save=(7,))
    run.finish(7)
    assert says in capsys.readouterr().out


@pytest.mark.parametrize("limit, is_said", [(None, True), ("600", False)])
def test_what_torchrun_does_after_a_signal_is_said_unless_it_is_seen_to(
    cfg, capsys, monkeypatch, limit, is_said
):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.delenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", raising=False)
    if limit is not None:
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", limit)
    begun(cfg)
    assert (
        "start it with TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in capsys.readouterr().out
    ) == is_said


# ---------------------------------------------------------------- curves, pure functions, files


def test_curves_are_drawn_of_long_short_and_missing_keys(cfg):
    run = train(begun(cfg, steps=40), 40, iou={20: 0.1, 40: 0.2}, reward=1.0)
    run.curves({"reward": ["reward"], "held out": ["sampled/iou", "greedy/iou"], "KL": ["kl"]})
    assert min(Image.open(run.folder / "curves.png").size) > 400


def test_examples_of_steps_read_permutations_in_order():
    read = [i for step in range(6) for i in step_indices(10, 5, seed=3, step=step)]
    epochs = [read[at : at + 10] for at in (0, 10, 20)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert epochs[0] != epochs[1]
    one_by_one = [i for step in range(10, 20) for i in step_indices(4, 1, 3, step)]
    assert step_indices(4, 10, seed=3, step=1) == one_by_one


def test_the_learning_rate_by_hand():
    constant = [learning_rate(step, 10, 1.0, 4, "constant") for step in (0, 3, 4, 9)]
    assert constant == [0.25, 1, 1, 1]
    assert learning_rate(7, 10, 1.0, 4, "linear") == 0.5
    assert learning_rate(7, 10, 1.0, 4, "cosine") == pytest.approx(0.5)


def test_files_are_replaced_as_one_and_torch_files_are_read_lazily(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.jsonl", '{"step": 1}\n')
    write_whole(tmp_path / "a.jsonl", '{"step": 2}\n{"step": 3')
    assert read_jsonl(tmp_path / "a.jsonl") == [{"step": 2}]
    assert len(list(tmp_path.iterdir())) == 1
    assert read_jsonl(tmp_path / "none.jsonl") == []

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "to_disk", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.jsonl", "new")
    assert read_jsonl(tmp_path / "a.jsonl") == [{"step": 2}]
    torch.save({"step": 1, "w": torch.arange(4.0)}, tmp_path / "x.pt")
    state = read_torch(tmp_path / "x.pt", mmap=True)
    (tmp_path / "x.pt").unlink()  # a pruned checkpoint can still be read
    assert state["w"].tolist() == [0, 1, 2, 3]


def test_what_an_optimizer_saves_are_plain_safetensors(tmp_path):
    optimizer = an_optimizer(2.0)
    optimizer.parameters[0].sum().backward()
    optimizer.step(0.1)
    optimizer.save(tmp_path, 1, rank=0)
    saved = sorted(path.name for path in (tmp_path / "optimizer").iterdir())
    assert saved == [
        f"{name}.00001-of-00001.safetensors"
        for name in ("exp_avg", "exp_avg_sq", "masters", "step")
    ]
    masters = load_file(tmp_path / "optimizer/masters.00001-of-00001.safetensors")
    assert masters["w"].tolist() == optimizer.parameters[0].tolist()
    assert json.loads((tmp_path / "trainer.json").read_text()) == {"step": 1, "parts": 1}
    again = an_optimizer()
    again.load(tmp_path, {"step": 1, "parts": 1})
    for one in (optimizer, again):
        one.parameters[0].sum().backward()
        one.step(0.1)
    assert torch.equal(again.parameters[0], optimizer.parameters[0])


def test_an_old_checkpoint_stays_until_the_newest_weights_have_worked(cfg, capsys):
    """Diverged weights are only noticed when they sample: the good ones must be there then."""
    run = begun(cfg, keep=1)
    train(run, 2, save=(2,))
    run.save(4, StubCRM(), an_optimizer())
    assert names(run) == ["step_000002", "step_000004"]
    with pytest.raises(SystemExit), run.checkpoint_on_bad_row(4, StubCRM(), an_optimizer()):
        raise FloatingPointError("logits are not finite")
    assert names(run) == ["step_000002", "step_000004"]
    assert "step_000004 has them: delete it, and the one before is used" in capsys.readouterr().err


def test_the_folder_of_an_evaluation_is_not_touched(cfg, tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval/config.json").write_text('{"out": "eval", "fingerprint": "x"}')
    assert "not a training run's" in rejected(cfg, out=str(tmp_path / "eval"))
