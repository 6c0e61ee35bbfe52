"""--track: what a tracker is sent, and that none can end a run. The trackers are files of a few
lines."""

import json
import sys
from dataclasses import replace

import pytest
from test_run import (
    CALM,
    Config,
    begun,
    names,
    rejected,
    signals,  # noqa: F401 (a fixture of every test here)
    train,
)

from extras import track
from runtime import run as run_module
from runtime.parallel import Ranks
from runtime.run import Run

FAKE = """
calls = []
class Error(Exception): pass
class OtherError(Exception): pass
def init(**options): calls.append(("init", options))
def log(numbers, step): calls.append(("log", step, numbers))
def finish(): calls.append(("finish",))
"""
APIS = ("wandb", "trackio", "swanlab")
FAILS = {"init": "init(**options)", "log": "log(numbers, step)", "finish": "finish()"}


class Second(Ranks):
    """Rank 1 of two. Rank 0 has the same to say."""

    def __init__(self):
        super().__init__(rank=1, world=2)

    def gather(self, items):
        return [*items, *items]


@pytest.fixture
def cfg(tmp_path):
    return Config(out=str(tmp_path / "run"))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """fake("wandb", "def log(...): raise ...") -> the calls that a module of that name has got."""

    def make(name, more=""):
        (tmp_path / f"{name}.py").write_text(FAKE + more)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        made.append(name)
        return lambda: sys.modules[name].calls if name in sys.modules else []

    made = []
    yield make
    for name in made:
        sys.modules.pop(name, None)


def replay(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["track.py", *map(str, argv)])
    track.main()


@pytest.mark.parametrize("name", APIS)
def test_configuration_once_then_every_row_then_the_end(cfg, fake, name):
    calls = fake(name)
    run = train(begun(cfg, track=name), last=3, iou={2: 0.25})
    run.log("best_and_worst", {"step": 3, "best": {"reward": 4.0}})
    run.log(
        "metrics", {"step": 4, "reward": 1, "sampled/iou": None, "warnings": ["x"], "skipped": True}
    )
    run.finish(12)
    first, *rows, last = calls()
    assert first[1].pop("config")["lr"] == cfg.lr and last == ("finish",)
    assert first == ("init", {"project": "medreasoner", "name": "run"})
    assert (
        [row[1] for row in rows] == [1, 2, 3, 4]
        and rows[0][2] == CALM
        and rows[3][2] == {"reward": 1}
    )
    assert rows[1][2] == CALM | {"sampled/iou": 0.25}


def test_a_resumed_run_sends_what_is_kept_of_it_again(cfg, fake):
    calls = fake("wandb")
    train(begun(cfg), last=6, save=(4,))  # without a tracker; two rows are lost
    train(begun(cfg, resume="yes", track="wandb"), last=7)
    assert [call[1] for call in calls()[1:]] == [1, 2, 3, 4, 5, 6, 7]


def test_only_the_first_rank_tracks(cfg, fake):
    calls = fake("wandb")
    run = begun(cfg, track="wandb", ranks=Second())
    run.log("metrics", {"step": 1})
    run.finish(12)
    assert calls() == [] and "wandb" not in sys.modules


@pytest.mark.parametrize(
    "error",
    [
        "Error('no network')",
        "OSError('no network')",
        "KeyError('no network')",
        "OtherError('no\\nnetwork')",
        "ConnectionError('no network')",
    ],
)
@pytest.mark.parametrize("when", FAILS)
def test_a_tracker_that_raises_is_one_line_and_dropped(cfg, fake, capsys, when, error):
    calls = fake("wandb", f"def {FAILS[when]}: raise {error}\n")
    run = train(begun(cfg, track="wandb"), last=3, save=(3,))
    run.finish(12)
    out = capsys.readouterr().out
    assert (
        out.count("--track wandb") == 1
        and out.count("no network") == 1
        and error.split("(")[0] in out
    )
    assert [row["step"] for row in run.read("metrics")] == [1, 2, 3] and names(run) == [
        "step_000003"
    ]
    assert [call[0] for call in calls()] == {
        "init": [],
        "log": ["init"],
        "finish": ["init", "log", "log", "log"],
    }[when]


def test_a_package_that_does_not_import_is_dropped_too(cfg, fake, capsys):
    fake("trackio", "import a_package_that_is_not_there\n")
    train(begun(cfg, track="trackio"), last=2).finish(12)
    assert (
        capsys.readouterr().out.count("--track trackio: ModuleNotFoundError: No module named") == 1
    )


def test_stopping_is_ours_even_if_a_tracker_has_a_handler(cfg, fake):
    import signal

    fake("swanlab", "import signal\ndef init(**o): signal.signal(signal.SIGINT, signal.SIG_IGN)\n")
    run = begun(cfg, track="swanlab")
    assert signal.getsignal(signal.SIGINT) == run._on_signal == signal.getsignal(signal.SIGTERM)


@pytest.mark.parametrize("name", ["tensorboard", *APIS])
def test_a_missing_package_is_named_before_anything_is_written(cfg, monkeypatch, capsys, name):
    monkeypatch.setattr(run_module.importlib.util, "find_spec", lambda name: None)
    assert rejected(cfg, track=name) == f"--track {name}: is not installed; pip install {name}"
    assert not (Run(cfg, Ranks()).folder).exists()
    with pytest.raises(SystemExit) as stopped:
        replay(monkeypatch, "--track", name, cfg.out)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_tracker_may_change_on_resume(cfg, fake):
    fake("wandb")
    train(begun(cfg, track="wandb"), last=2, save=(2,))
    Run(replace(cfg, resume="yes", track=None), Ranks())


# ---------------------------------------------------------------- a run that has ended


def test_a_finished_run_is_replayed_whole(cfg, fake, monkeypatch, capsys):
    train(begun(cfg), last=3)
    calls = fake("swanlab")
    replay(monkeypatch, "--track", "swanlab", cfg.out)
    assert [call[0] for call in calls()] == ["init", "log", "log", "log", "finish"]
    assert "3 rows of" in capsys.readouterr().out


def test_a_replay_that_fails_says_so(cfg, fake, monkeypatch, capsys):
    train(begun(cfg), last=3)
    fake("wandb", "def finish(): raise Error('gone')\n")
    with pytest.raises(SystemExit) as stopped:
        replay(monkeypatch, "--track", "wandb", cfg.out)
    assert stopped.value.code == 1 and "rows of" not in capsys.readouterr().out


def test_what_is_no_run_is_one_line(tmp_path, fake, monkeypatch, capsys):
    calls = fake("wandb")
    for name, text in (
        ("empty", ""),
        ("foreign", '{"step": 1}\n{"epoch": 2}\n'),
        ("words", '{"step": "last"}\n'),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "metrics.jsonl").write_text(text)
    for argv, problem in (
        (["--track", "wandb", tmp_path / "none"], "config.json"),
        (["x"], "--track"),
        (["--track", "mlflow", tmp_path], "mlflow"),
        (
            ["--track", "wandb", tmp_path / "foreign"],
            "metrics.jsonl, line 2: step is no whole number",
        ),
        (
            ["--track", "wandb", tmp_path / "words"],
            "metrics.jsonl, line 1: step is no whole number",
        ),
        (["--track", "wandb", tmp_path / "empty"], "no row there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            replay(monkeypatch, *argv)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and problem in err and err.count("\n") == 1
    assert calls() == []


# ---------------------------------------------------------------- the real one


def test_tensorboard_reads_back_every_number(cfg):
    pytest.importorskip("tensorboard", reason="pip install -r requirements-extras.txt")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(begun(cfg, track="tensorboard"), last=6, save=(4,), loss=0.5).finish(12)
    run = train(begun(cfg, resume="yes", track="tensorboard", steps=20), last=8, loss=0.25)
    run.finish(12)
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    read = [(scalar.step, scalar.value) for scalar in events.Scalars("loss")]
    assert read == [
        (row["step"], row["loss"]) for row in run.read("metrics")
    ]  # none lost, none twice
    assert set(events.Tags()["scalars"]) == {*CALM, "loss"}
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert json.loads(text)["out"] == cfg.out
