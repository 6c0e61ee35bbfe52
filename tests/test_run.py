"""The run folder: what is kept, what is touched, what a resumed run remembers. The model is a stub that saves a word."""

import json
import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data import BadRow
from metrics import QUESTION_METRICS
from runtime import files
from runtime import run as module
from runtime.cli import RunConfig, flag
from runtime.files import read_jsonl, read_torch, write_whole
from runtime.parallel import Ranks
from runtime.run import MAY_CHANGE, Run, learning_rate, sample_indices
from train_grpo import Config

CALM = {
    "seconds": 1.0,
    "peak_memory_gb": 1.0,
    "skipped": 0,
    "parse_ok": 1.0,
    "finished": 1.0,
    "zero_std": 0.0,
    "length": 9,
}


class StubCRM:
    root = None

    def save(self, folder):
        (folder / "model.txt").write_text("weights")


class StubOptimizer:
    loaded = None

    def save(self, folder, step, rank):
        torch.save({"step": step, "optimizer": torch.zeros(3)}, folder / "trainer.pt")

    def load(self, folder, state):
        self.loaded = folder.name, state["step"]


@pytest.fixture(autouse=True)
def signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cfg(tmp_path):
    return RunConfig(crm="base", data="somewhere", out=str(tmp_path / "run"), steps=12, keep=0)


def begun(cfg, steps=12, ranks=Ranks(), **changes):
    run = Run(replace(cfg, steps=steps, **changes), ranks)
    run.begin(None, StubOptimizer(), steps)
    return run


def train(run, last, iou=(), save=(), **numbers):
    """Pretend to train up to step `last`: {step: IoU} of the evaluations, the steps that are saved."""
    for step in range(run.start + 1, last + 1):
        row = {"step": step, **CALM, **numbers}
        run.warn(row)
        run.log("metrics", row | ({"sampled/iou": iou[step]} if step in iou else {}))
        if step in save:
            run.save(step, StubCRM(), StubOptimizer())
    return run


def names(run):
    return [folder.name for folder in run.checkpoints().values()]


def refused(cfg, **changes):
    with pytest.raises(ValueError) as error:
        Run(replace(cfg, **changes), Ranks())
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------- which checkpoints stay


def test_keep_leaves_the_newest_and_the_best_evaluated_that_exists(cfg):
    iou = dict(
        zip(range(50, 301, 50), (0.20, 0.35, 0.36, 0.30, 0.28, 0.25))
    )  # the best, step 150, is never saved
    run = train(begun(cfg, steps=300, keep=1), 300, iou, save=(100, 200, 300))
    assert names(run) == ["step_000100", "step_000300"]


@pytest.mark.parametrize("keep, stay", [(0, [2, 4, 6, 8]), (2, [6, 8]), (3, [4, 6, 8])])
def test_keep_counts_the_newest(cfg, keep, stay):
    run = train(begun(cfg, keep=keep), 8, save=(2, 4, 6, 8))
    assert names(run) == [f"step_{step:06d}" for step in stay]


def test_no_checkpoint_where_none_is_wanted(cfg):
    run = train(begun(cfg, save_every=-1), 12, save=(12,))
    assert names(run) == [] and run.saved == "not saved"


def test_a_checkpoint_is_due_at_intervals_at_the_end_and_when_stopped(cfg):
    run = begun(cfg, save_every=5)
    assert [step for step in range(1, 13) if run.due(step, stopped=False)] == [
        5,
        10,
        12,
    ] and run.due(3, stopped=True)
    assert not begun(cfg, save_every=0).due(5, stopped=False)


def test_a_kill_while_saving_leaves_the_checkpoint_before(cfg):
    class Killed(StubCRM):
        def save(self, folder):
            super().save(folder)
            raise KeyboardInterrupt

    run = train(begun(cfg), 4, save=(2,))
    with pytest.raises(KeyboardInterrupt):
        run.save(4, Killed(), StubOptimizer())
    assert names(run) == ["step_000002"] and (run.folder / "step_000004.tmp").exists()
    (run.folder / "step_000001.old").mkdir()
    again = begun(cfg, resume="yes")
    assert again.start == 2 and not [*run.folder.glob("*.tmp"), *run.folder.glob("*.old")]
    assert [row["step"] for row in again.read("metrics")] == [
        1,
        2,
    ]  # steps 3 and 4 will be done again


def test_a_kill_while_a_checkpoint_is_deleted_leaves_no_half_of_one(cfg, monkeypatch):
    def killed(folder):
        (folder / "trainer.pt").unlink()
        raise KeyboardInterrupt

    run = train(begun(cfg), 4, save=(2, 4))
    monkeypatch.setattr(module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        module.remove(run.folder / "step_000002")
    assert names(run) == ["step_000004"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(cfg, monkeypatch):
    run, on_disk, fsync, rename = begun(cfg), set(), os.fsync, Path.rename

    def noted(handle):
        fsync(handle)
        on_disk.add(os.fstat(handle).st_ino)

    def renamed(path, target):
        assert {
            part.stat().st_ino for part in [*path.rglob("*"), path]
        } <= on_disk and target.name == "step_000002"
        on_disk.clear()
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    run.save(2, StubCRM(), StubOptimizer())
    assert on_disk == {run.folder.stat().st_ino}  # then its name, too


def test_a_full_disk_is_one_line_and_memory_is_not_taken_for_a_disk(cfg, capsys):
    def failing(error):
        class Failing(StubCRM):
            def save(self, folder):
                raise error

        return Failing()

    run = train(begun(cfg), 2, save=(2,))
    with pytest.raises(SystemExit, match="1"):
        run.save(4, failing(OSError(28, "No space left on device")), StubOptimizer())
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "No space left" in said and "step_000002 is whole" in said
    assert not list(run.folder.glob("*.tmp"))
    with pytest.raises(torch.OutOfMemoryError):
        run.save(4, failing(torch.OutOfMemoryError("CUDA out of memory")), StubOptimizer())


def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(cfg, capsys):
    run = train(begun(cfg), 6, save=(2, 4, 6))
    for folder in ("step_000004", "step_000006"):
        file = run.folder / folder / "trainer.pt"
        file.write_bytes(file.read_bytes()[:-100])
    again = Run(replace(cfg, resume="yes"), Ranks())
    assert (
        again.checkpoint.name == "step_000002"
        and "step_000006: cannot be read" in capsys.readouterr().out
    )


# ---------------------------------------------------------------- resume


def test_a_resumed_run_starts_from_the_newest_checkpoint_with_its_state(cfg, capsys):
    train(begun(cfg), 5, save=(2, 4))
    run, optimizer = Run(replace(cfg, resume="auto"), Ranks()), StubOptimizer()
    assert (
        run.begin(None, optimizer, 12) == 4
        and optimizer.loaded == ("step_000004", 4)
        and run.state is None
    )
    assert f"resuming from {run.checkpoint}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match="has 4 steps already"):
        Run(replace(cfg, resume="auto"), Ranks()).begin(None, optimizer, 4)


def test_resume_refuses_another_prompt_behind_the_same_flag(cfg):
    train(begun(cfg), 4, save=(4,))
    (Path(cfg.out) / "step_000004/frame.json").write_text(
        json.dumps({"resize": "aspect", "prompt": "Old: {query}"})
    )
    crm = SimpleNamespace(
        frame=lambda: {"resize": "aspect", "prompt": "New: {query}", "max_pixels": 784}
    )
    with pytest.raises(
        ValueError, match="--resume: prompt was 'Old: {query}', is 'New: {query}': restore"
    ):
        Run(replace(cfg, resume="yes"), Ranks()).begin(crm, StubOptimizer(), 12)


def test_resume_needs_a_checkpoint_unless_it_is_auto(cfg):
    assert "--resume: no checkpoint" in refused(cfg, resume="yes")
    assert begun(cfg, resume="auto").start == 0


@pytest.mark.parametrize(
    "change, says",
    [
        ({"lr": 1e-3}, "--lr was 1e-06, is 0.001"),
        ({"data": "elsewhere"}, "--data was 'somewhere', is 'elsewhere'"),
        ({"crm": "run/step_000002"}, "--crm was 'base', is 'run/step_000002'"),
        ({"seed": 1}, "--seed was 0, is 1"),
        ({"mode": "hard"}, "--mode was 'soft', is 'hard'"),
        ({"lora_rank": 4}, "--lora-rank was 0, is 4"),
        ({"trainable": "norm"}, "--trainable was '', is 'norm'"),
        ({"max_pixels": 99}, "--max-pixels was None, is 99"),
        (
            {"freeze_vision": True, "temperature": 0.5},
            "--freeze-vision was False, is True; --temperature was 1.0, is 0.5",
        ),
    ],
)
def test_resume_refuses_flags_that_change_what_is_learned(cfg, change, says):
    run = train(begun(cfg), 2, save=(2,))
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    said = refused(cfg, resume="yes", **change)
    assert all(text in said for text in says.split("; ")), said
    assert before == {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}


def test_no_flag_that_decides_what_is_learned_may_change_on_resume():
    decides = """crm prompt resize min_pixels max_pixels dtype seed data only skip_bad_rows lr schedule weight_decay max_grad_norm
        lora_rank freeze_vision trainable mode weights official max_new_tokens temperature asm prompts group resample norm agg
        ratio clip_low clip_high dual_clip kl kl_coef entropy_coef mask_truncated minibatches inner_epochs warmup""".split()
    assert set(decides) <= set(Config.__dataclass_fields__) and not MAY_CHANGE & set(decides)


def test_resume_takes_other_steps_intervals_and_ways_to_compute_the_same(cfg):
    train(begun(cfg), 2, save=(2,))
    changes = dict(
        timeout=5.0,
        parallel="fsdp",
        offload=True,
        checkpointing=True,
        eval_every=7,
        eval_answers=2,
        eval_limit=9,
        save_every=3,
        keep=2,
    )
    run = begun(cfg, steps=20, resume="auto", **changes)
    assert run.start == 2 and json.loads((run.folder / "config.json").read_text())["keep"] == 2


def test_a_flag_that_did_not_exist_then_does_not_stop_a_resume(cfg):
    train(begun(cfg), 2, save=(2,))

    @dataclass
    class Newer(RunConfig):
        fresh: int = flag(3, "a flag of a later version")

    assert Run(
        Newer(crm="base", data="somewhere", out=cfg.out, steps=12, resume="yes"), Ranks()
    ).checkpoint


def test_warnings_the_first_row_and_skipped_steps_survive_a_resume(cfg, capsys):
    run = begun(cfg)
    for step, entropy in enumerate((2.0, 1.0, 0.1), 1):  # collapsed by step 3
        row = {"step": step, **CALM, "entropy": entropy, "skipped": step > 1}
        run.warn(row)
        run.log("metrics", row)
    run.save(3, StubCRM(), StubOptimizer())
    assert capsys.readouterr().out.count("entropy has collapsed") == 1

    again = begun(cfg, resume="yes")
    assert again.first["entropy"] == 2.0 and again.skipped == 2
    again.warn({"step": 4, **CALM, "entropy": 0.1, "skipped": 0})
    assert "entropy has collapsed" not in capsys.readouterr().out  # said before
    assert again.skipped == 0

    fresh = begun(cfg, resume="yes")
    fresh.warned.clear()
    fresh.warn({"step": 4, **CALM, "entropy": 0.1})  # against step 1, not against step 4
    assert "entropy has collapsed" in capsys.readouterr().out


def test_a_fall_of_the_held_out_parse_rate_is_warned_of_against_the_first_evaluation_also_after_a_resume(
    cfg, capsys
):
    run = begun(cfg)
    run.log("metrics", {"step": 0, "sampled/parse_ok": 0.9})
    train(run, 3, save=(3,))
    again = begun(cfg, resume="yes")
    again.warn({"step": 4, "sampled/parse_ok": 0.75})
    assert "held-out" not in capsys.readouterr().out
    again.warn(row := {"step": 5, "sampled/parse_ok": 0.5})
    again.warn({"step": 6, "sampled/parse_ok": 0.4})
    said = capsys.readouterr().out
    assert (
        said.count("step 5: far fewer held-out completions can be parsed than at first: lower --lr")
        == 1
    )
    assert said.count("held-out") == len(row["warnings"]) == 1


def test_skipped_steps_in_a_row_end_the_run_and_others_do_not(cfg):
    run = begun(cfg)
    run.give_up_after(3)
    for step, skipped in enumerate((1, 1, 0, 1, 1), 1):
        run.warn({"step": step, **CALM, "skipped": skipped})
        run.give_up_after(3)
    with pytest.raises(RuntimeError, match="2 steps in a row without a finite gradient"):
        run.give_up_after(2)


# ---------------------------------------------------------------- only a run's own files


def test_a_new_run_is_not_written_over_one_that_is_there(cfg):
    run = train(begun(cfg), 2)
    before = run.read("metrics")
    assert "--resume continues it, another --out starts a new one" in refused(cfg)
    assert run.read("metrics") == before


@pytest.mark.parametrize("resume", ["no", "auto"])
@pytest.mark.parametrize(
    "file, text",
    [
        ("samples.jsonl", '{"image": "a.png", "query": "?"}\n'),
        ("held_out.jsonl", '{"step": 3, "of": "another program"}\n'),
        ("metrics.jsonl", "[1, 2]\n"),
        ("metrics.jsonl", "no JSON\n"),
        ("config.json", '{"model_type": "qwen2_5_vl"}'),
    ],
)
def test_a_folder_with_files_of_others_under_our_names_is_refused_untouched(
    cfg, tmp_path, resume, file, text
):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / file).write_text(text)
    assert file in refused(cfg, resume=resume)
    assert (tmp_path / "run" / file).read_text() == text and len(
        list((tmp_path / "run").iterdir())
    ) == 1


def test_other_files_in_the_folder_are_left_alone(cfg):
    run = train(begun(cfg), 4, save=(2,))
    others = {
        "predictions.jsonl": '{"id": 1}\n',
        "log.jsonl": '{"step": 99}\n',
        "notes.txt": "mine",
    }
    for name, text in others.items():
        (run.folder / name).write_text(text)
    run = train(begun(cfg, resume="yes"), 6, save=(6,))
    assert {name: (run.folder / name).read_text() for name in others} == others


def test_rows_after_the_checkpoint_and_a_torn_last_line_are_dropped(cfg):
    run = train(begun(cfg), 5, save=(4,))
    run.log("samples", *({"step": step} for step in (3, 4, 5)))
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "rew')
    again = begun(cfg, resume="yes")
    assert [row["step"] for row in again.read("metrics")] == [1, 2, 3, 4]
    assert [row["step"] for row in again.read("samples")] == [3, 4]


# ---------------------------------------------------------------- a bad row, a signal


def test_a_bad_row_hours_into_a_run_saves_what_is_done_and_is_named(cfg):
    run = train(begun(cfg), 7)
    with pytest.raises(BadRow, match="row 9: broken image"):
        with run.checkpoint_on_bad_row(7, StubCRM(), StubOptimizer()):
            raise BadRow("row 9: broken image")
    assert names(run) == ["step_000007"] and begun(cfg, resume="yes").start == 7


def test_before_the_first_step_a_bad_row_saves_nothing_and_no_bad_row_nothing_ever(cfg):
    run = begun(cfg)
    with pytest.raises(BadRow), run.checkpoint_on_bad_row(0, StubCRM(), StubOptimizer()):
        raise BadRow("row 9")
    with run.checkpoint_on_bad_row(3, StubCRM(), StubOptimizer()):
        pass
    assert names(run) == []
    with pytest.raises(KeyError), run.checkpoint_on_bad_row(3, StubCRM(), StubOptimizer()):
        raise KeyError("a bug of ours")


def test_a_bad_row_on_another_rank_ends_this_one_too_after_the_same_checkpoint(cfg):
    class OfTwo(Ranks):
        def gather(self, items):
            return [*items, "row 3 of the other rank"]

    run = begun(cfg, ranks=OfTwo())
    with pytest.raises(BadRow, match="row 3 of the other rank"):
        with run.checkpoint_on_bad_row(2, StubCRM(), StubOptimizer()):
            pass
    assert names(run) == ["step_000002"]


def test_a_signal_lets_the_step_finish(cfg, capsys):
    run = begun(cfg)
    assert not run.stopped()
    signal.raise_signal(signal.SIGTERM)
    assert run.stopped() and "stopping after this step" in capsys.readouterr().out


@pytest.mark.parametrize(
    "save_every, says",
    [
        (0, "stopped at 7 of 12 steps; the same command with --resume continues\n"),
        (-1, "stopped at 7 of 12 steps\n"),
    ],
)
def test_a_run_that_was_stopped_says_where_and_how_to_go_on(cfg, capsys, save_every, says):
    run = train(begun(cfg, save_every=save_every), 7, save=(7,))
    run.finish(7, compare=True)
    assert says in capsys.readouterr().out


# ---------------------------------------------------------------- evaluation, report, curves


def held_out_rows(count, iou):
    scores = dict.fromkeys(QUESTION_METRICS) | {
        "iou": iou,
        "pdice": iou,
        "parse_ok": 1.0,
        "iou_parsed": iou,
    }
    return [
        {"kind": kind, "index": i, "id": str(i), "wording": None, **scores, "reward": 4 * iou}
        for kind in ("sampled", "greedy")
        for i in range(count)
    ]


def test_the_held_out_split_is_sampled_at_the_temperature_of_training(cfg, monkeypatch):
    asked = []

    def held_out(crm, tests, kinds, mode, weights, ranks, max_new_tokens, official):
        asked.append((kinds, mode, weights, max_new_tokens, official))
        return held_out_rows(3, 0.5)

    @contextmanager
    def unsharded(crm):
        yield

    monkeypatch.setattr(module, "held_out", held_out)
    monkeypatch.setattr(module, "unsharded", unsharded)
    run = begun(cfg, temperature=0.7, eval_answers=3, official=True, mode="hard")
    means = run.evaluate(None, [], {"box_iou": 2.0}, step=0, greedy=True)
    run.evaluate(None, [], {}, step=5, greedy=False)
    assert asked[0] == (
        {"sampled": (3, 0.7), "greedy": (1, 0.0)},
        "hard",
        {"box_iou": 2.0},
        128,
        True,
    )
    assert asked[1][0] == {"sampled": (3, 0.7)} and means["sampled/iou"] == 0.5
    assert [row["step"] for row in run.read("held_out")] == [0] * 6 + [5] * 6


def test_the_report_compares_the_questions_that_both_evaluations_have(cfg, capsys):
    run = train(begun(cfg, steps=3), 3)
    run.log("held_out", *({"step": 0, **row} for row in held_out_rows(4, 0.25)))
    run.log(
        "held_out", *({"step": 3, **row} for row in held_out_rows(6, 0.5))
    )  # a larger --eval-limit
    run.finish(3, compare=True)
    said = capsys.readouterr().out
    assert (
        "step 0 -> 3" in said
        and "0.250 -> 0.500" in said
        and "1.00 s per step" in said
        and "metrics.jsonl" in said
    )
    run.finish(3, compare=False)
    assert "0.250" not in capsys.readouterr().out


def test_curves_are_drawn_of_long_short_and_missing_keys(cfg):
    run = train(begun(cfg, steps=40), 40, iou={20: 0.1, 40: 0.2}, reward=1.0)
    run.curves({"reward": ["reward"], "held out": ["sampled/iou", "greedy/iou"], "KL": ["kl"]})
    assert min(Image.open(run.folder / "curves.png").size) > 400


# ---------------------------------------------------------------- pure functions and files


def test_samples_of_steps_read_permutations_in_order():
    read = [i for step in range(6) for i in sample_indices(10, 5, seed=3, step=step)]
    assert [sorted(read[at : at + 10]) for at in (0, 10, 20)] == [list(range(10))] * 3 and read[
        :10
    ] != read[10:20]
    assert sample_indices(4, 10, seed=3, step=1) == [
        i for step in range(10, 20) for i in sample_indices(4, 1, 3, step)
    ]


def test_the_learning_rate_by_hand():
    assert [learning_rate(step, 10, 1.0, 4, "constant") for step in (0, 3, 4, 9)] == [0.25, 1, 1, 1]
    assert learning_rate(7, 10, 1.0, 4, "linear") == 0.5 and learning_rate(
        7, 10, 1.0, 4, "cosine"
    ) == pytest.approx(0.5)


def test_files_are_replaced_whole_and_torch_files_are_read_lazily(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.jsonl", '{"step": 1}\n')
    write_whole(tmp_path / "a.jsonl", '{"step": 2}\n{"step": 3')
    assert read_jsonl(tmp_path / "a.jsonl") == [{"step": 2}] and len(list(tmp_path.iterdir())) == 1
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
