"""What a training run does besides training: its folder, resume, warnings, stopping, checkpoints.

`Run(config, ranks)` rejects what cannot run and writes nothing. `begin` makes or resumes the
folder. The loop then calls `log`, `warn` and `save`. Around whatever reads examples stands
`checkpoint_on_bad_row`, and between the phases of a step `leave_if_stopped`.

How a run stops. Ctrl-C and SIGTERM ask it to. It ends after the step, or before: as long as nothing
of a step has reached the weights, that step is given up, and the checkpoint is that of the step
before. So sampling, the longest phase, is broken off at once. The exit status is 0, and
`--resume auto` goes on from there. A second Ctrl-C ends the process on the spot.

torchrun passes either signal on to its ranks, kills what is left of them 30 seconds later, and
itself always ends with status 1. A large model needs longer to finish an update and to write its
weights: TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600, set for torchrun, gives it ten minutes. Under srun,
which starts the ranks itself, there is no such limit and the status is 0: recipes/slurm.sh.
"""

import importlib.util
import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from safetensors import SafetensorError

from runtime import checkpoint
from runtime.cli import ROOT, dashed, print0
from runtime.files import parse_object, read_jsonl, read_text, write_whole
from runtime.optim import Optimizer
from runtime.parallel import Ranks
from runtime.pictures import curves
from runtime.readers import BadRow
from runtime.registry import find
from runtime.stats import Row, warnings_of

# NAME.jsonl in the run folder, one object per line, each with its step
LOGS = ("metrics", "best_and_worst", "held_out", "rollouts")

# --track NAME: the package NAME must be installed
TRACKERS = {
    "tensorboard": "extras.track.Tensorboard",
    "wandb": "extras.track.Wandb",
    "trackio": "extras.track.Trackio",
    "swanlab": "extras.track.Swanlab",
}

# What may change on --resume; every other flag decides what is learned.
MAY_CHANGE = {
    "resume",
    "out",
    "steps",
    "epochs",
    "parallel",
    "offload",
    "checkpointing",
    "pack_tokens",
    "micro_batch",
    "eval_every",
    "eval_limit",
    "save_every",
    "keep",
    "track",
}

# A step without a finite gradient moves nothing, and the next may be fine. After so many in a row
# the weights are past help.
MAX_SKIPPED = 3

TORCHRUN_LIMIT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


# ---------------------------------------------------------------- schedules and data


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up over `warmup` steps, then constant, or a linear or cosine decay to 0.
    step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "linear":
        return peak * (1 - done)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


def step_indices(count: int, n: int, seed: int, step: int) -> list[int]:
    """The n examples of a step, a pure function of (seed, step). Each epoch is a permutation of
    range(count), and the steps read the epochs in order."""
    orders = {}
    indices = []
    for position in range(step * n, (step + 1) * n):
        epoch = position // count
        if epoch not in orders:
            orders[epoch] = np.random.default_rng([seed, epoch]).permutation(count)
        indices.append(int(orders[epoch][position % count]))
    return indices


# ---------------------------------------------------------------- the run folder


class StopNow(BaseException):
    """Raised by a signal inside Run.interruptible(). Like KeyboardInterrupt it is no Exception."""


class Run:
    """runs/NAME: config.json, metrics.jsonl, held_out.jsonl, …, curves.png, step_000100/

    Text first: everything that a picture shows can be read from metrics.jsonl. Only rank 0 reads
    and writes the logs, and tells the others what it found; parts of the optimizer belong to their
    ranks.

    folder: the run folder. checkpoint: the one that --resume continues from, or None."""

    def __init__(self, config: Any, ranks: Ranks):
        """config: the dataclass of all flags. Of these out, resume, save_every, keep, track,
        eval_every and steps are used here. ValueError where --out holds files that this run must
        not touch, or cannot resume."""
        self.config = config
        self.ranks = ranks
        self.folder = Path(config.out)
        self.start_step = 0
        self.steps = config.steps
        self.saved_step = None  # the step of the newest checkpoint
        self.first_values: Row = {}  # what was logged first of each name
        self.warned: set[str] = set()
        self.skipped = 0  # steps in a row without a finite gradient
        self.tracker = None
        self.first_signal = None  # SIGINT or SIGTERM, once one has come
        self.is_interruptible = False

        self.tracker_class = None
        if config.track:
            self.tracker_class = find_tracker(config.track)
        with self._main_speaks_for_all():
            if ranks.is_main:
                self._check_folder()
        self.checkpoint, self.record = self._checkpoint_to_resume()
        if self.checkpoint is not None:
            with self._main_speaks_for_all():
                if ranks.is_main:
                    self._check_flags()

    # ------------------------------------------------------------ what may be touched and resumed

    @contextmanager
    def _main_speaks_for_all(self) -> Iterator[None]:
        """What rank 0 raises inside, for bad input or a file, is a ValueError on all ranks."""
        problem = None
        try:
            yield
        except (ValueError, OSError) as error:
            problem = str(error)
        problem = self.ranks.gather([problem])[0]
        if problem is not None:
            raise ValueError(problem)

    def _check_folder(self) -> None:
        """Only what a training run wrote is touched: not, for example, a model's config.json."""
        config = self.folder / "config.json"
        rows = [row for name in LOGS for row in self.read(name)]
        files = [config, *(self.folder / f"{name}.jsonl" for name in LOGS)]
        there = [path.name for path in files if path.exists()]
        is_ours = config.exists() and "save_every" in parse_object(read_text(config), config)
        is_ours = is_ours and all("step" in row for row in rows)
        if (rows or config.exists()) and not is_ours:
            raise ValueError(
                f"--out {self.folder}: {', '.join(there)}: not a training run's; give another --out"
            )
        if self.config.resume == "no" and rows:
            raise ValueError(
                f"--out {self.folder}: there is a run; --resume continues it, another --out starts "
                "a new one"
            )

    def _checkpoint_to_resume(self) -> tuple[Path | None, dict]:
        """(the checkpoint, its trainer.json) that all ranks continue from; (None, {}) for a new
        run.

        Rank 0 chooses. Every other rank must find the same: one with a disk of its own, or an old
        view of a shared disk, would train from another step."""
        if self.config.resume == "no":
            return None, {}
        found = None
        if self.ranks.is_main:
            found = checkpoint.newest(self.folder)
        name = self.ranks.gather([None if found is None else found.name])[0]
        if name is None and self.config.resume == "yes":
            raise ValueError(
                f"--resume: no checkpoint step_* in {self.folder}; --resume auto starts there"
            )
        if name is None:
            return None, {}

        folder = self.folder / name
        record = {}
        problem = None
        try:
            record = checkpoint.read_record(folder)
        except (OSError, ValueError) as error:
            problem = f"rank {self.ranks.rank} of {self.ranks.world} cannot read it: {error}"
        outcomes = self.ranks.gather([(record, problem)])
        problems = [problem for _, problem in outcomes if problem is not None]
        records = [record for record, _ in outcomes]
        if not problems and any(record != records[0] for record in records):
            problems.append(f"the ranks see different ones: {records}")
        if problems:
            raise ValueError(
                f"--resume: {folder}: {problems[0]}; --out must be on a disk that all share"
            )
        return folder, record

    def _check_flags(self) -> None:
        """--resume trains as before. ValueError names each flag that would change that."""
        path = self.folder / "config.json"
        before = parse_object(read_text(path), path)
        changed = []
        for name, value in self._flags().items():
            if name not in before or name in MAY_CHANGE:
                continue
            old_value = inside_checkout(before[name])
            if old_value != value:
                changed.append(f"{dashed(name)} was {old_value!r}, is {value!r}")
        if changed:
            raise ValueError(
                f"--resume: {'; '.join(changed)}: give what {path} says, or another --out"
            )

    def _flags(self) -> dict[str, Any]:
        """The flags as config.json keeps them."""
        flags = json.loads(json.dumps(asdict(self.config)))  # a tuple becomes a list
        return {name: inside_checkout(value) for name, value in flags.items()}

    # ------------------------------------------------------------ begin, log, warn

    def begin(self, optimizer: Optimizer, steps: int) -> int:
        """Makes or resumes the folder, and returns the number of steps already done.

        Rows that were logged after the checkpoint are dropped. From here on SIGINT and SIGTERM let
        what is done be saved. ValueError where all `steps` are done."""
        self.steps = steps
        if self.checkpoint is not None:
            self.start_step = self.record["step"]
            if self.start_step >= steps:
                raise ValueError(
                    f"--steps {steps}: {self.folder} has {self.start_step} steps already; give more"
                )
            optimizer.load(self.checkpoint, self.record)
            self.saved_step = self.start_step
            print0(f"resuming from {self.checkpoint}")

        with self._main_speaks_for_all():
            if self.ranks.is_main:
                self._write_folder()
        logged = self.read("metrics") if self.ranks.is_main else []
        logged = self.ranks.gather([logged])[0]
        for row in logged:
            self._remember_row(row)

        if self.ranks.is_main and self.tracker_class is not None:
            self.tracker = self.tracker_class(self.folder, asdict(self.config))
            self.tracker.log(*logged)
        self._explain_torchrun()
        for number in (signal.SIGINT, signal.SIGTERM):  # last: a tracker may have set its own
            signal.signal(number, self._on_signal)
        return self.start_step

    def _write_folder(self) -> None:
        """Makes the folder. Of the logs only rows up to the checkpoint stay."""
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_leftovers(self.folder)
        for name in LOGS:
            path = self.folder / f"{name}.jsonl"
            if path.exists():
                rows = self.read(name) if self.checkpoint is not None else []
                kept = [row for row in rows if row["step"] <= self.start_step]
                write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        write_whole(self.folder / "config.json", json.dumps(self._flags(), indent=2) + "\n")

    def log(self, name: str, *rows: dict) -> None:
        """Appends rows to NAME.jsonl; those of "metrics" go to the tracker as well."""
        if not self.ranks.is_main:
            return
        path = self.folder / f"{name}.jsonl"
        try:
            with open(path, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            self._cannot_write(path, str(error))
        if self.tracker is not None and name == "metrics":
            self.tracker.log(*rows)

    def read(self, name: str) -> list[dict]:
        """The rows of NAME.jsonl, [] where there is none."""
        return read_jsonl(self.folder / f"{name}.jsonl")

    def warn(self, row: Row) -> None:
        """Prints what a step's row points to, each sentence once per run. The sentences are added
        to the row as "warnings", so that a resumed run knows them. Call it on all ranks, before
        `log`."""
        found = warnings_of(row, self.first_values)
        row["warnings"] = [sentence for sentence in found if sentence not in self.warned]
        for sentence in row["warnings"]:
            print0(f"\nstep {row['step']}: {sentence}")
        self._remember_row(row)

    def remember(self, means: Row) -> None:
        """Keeps what was logged first of each name: later warnings compare with it."""
        self.first_values = means | self.first_values

    def _remember_row(self, row: Row) -> None:
        self.remember(row)
        self.warned |= set(row.get("warnings", []))
        if row.get("skipped"):
            self.skipped += 1
        else:
            self.skipped = 0

    def give_up_on_skipped(self) -> None:
        """RuntimeError after MAX_SKIPPED steps in a row with a skipped update."""
        if self.skipped >= MAX_SKIPPED:
            raise RuntimeError(
                f"{self.skipped} steps in a row without a finite gradient: start one with a lower "
                f"--lr, perhaps with a checkpoint of {self.folder} as --crm"
            )

    # ------------------------------------------------------------ stopping

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.first_signal is None:
            self.first_signal = number
            if self.ranks.is_main:  # print must not be called while print is at work
                os.write(sys.stdout.fileno(), b"\nstopping; a second Ctrl-C ends at once\n")
            if self.is_interruptible:
                self.is_interruptible = False
                raise StopNow
        elif signal.SIGINT in (number, self.first_signal):
            # a second Ctrl-C, which torchrun passes on as SIGTERM
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        # a second SIGTERM is a cluster that repeats itself

    def _explain_torchrun(self) -> None:
        """Says what a signal to torchrun loses, unless its user has seen to it."""
        if "TORCHELASTIC_RUN_ID" in os.environ and TORCHRUN_LIMIT not in os.environ:
            print0(
                "torchrun kills its ranks 30 s after Ctrl-C or SIGTERM; if an update or a "
                f"checkpoint takes longer, start it with {TORCHRUN_LIMIT}=600"
            )

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a signal raises StopNow at once, which checkpoint_on_bad_row catches. For work of
        this rank alone, whose results may be lost: inside, a rank must not wait for others."""
        if self.first_signal is not None:
            raise StopNow
        self.is_interruptible = True
        try:
            yield
        finally:
            self.is_interruptible = False

    def stopped(self) -> bool:
        """Whether any rank was asked to stop: all must leave after the same step."""
        return any(self.ranks.gather([self.first_signal is not None]))

    def leave_if_stopped(self, step: int, crm: Any, optimizer: Optimizer) -> None:
        """Between the phases of a step, as long as nothing of it has reached the weights. If any
        rank was asked to stop, saves the `step` steps that are done and ends the process with
        status 0."""
        if self.stopped():
            self._leave(step, crm, optimizer)

    def _leave(self, step: int, crm: Any, optimizer: Optimizer) -> None:
        self._save_if_new(step, crm, optimizer)
        self.finish(step)
        self.ranks.stop()
        raise SystemExit(0)

    @contextmanager
    def checkpoint_on_bad_row(self, step: int, crm: Any, optimizer: Optimizer) -> Iterator[None]:
        """Around whatever reads examples, on all ranks. Inside, a rank must not wait for others.

        After a bad row on any rank, all save the `step` steps that are done and raise BadRow. After
        a signal they save these steps and end with status 0. After a FloatingPointError, logits
        that are not finite, nothing is saved, because the weights are broken: status 1."""
        bad_row = None
        broken = None
        try:
            yield
        except StopNow:
            pass  # self.first_signal says so
        except BadRow as error:
            bad_row = str(error)
        except FloatingPointError as error:
            broken = str(error)
        outcomes = self.ranks.gather([(bad_row, broken, self.first_signal is not None)])
        bad_rows = [outcome[0] for outcome in outcomes if outcome[0] is not None]
        broken_weights = [outcome[1] for outcome in outcomes if outcome[1] is not None]
        was_asked_to_stop = any(outcome[2] for outcome in outcomes)
        if broken_weights:
            self._give_up_on_broken_weights(step, broken_weights[0])
        if bad_rows:
            self._save_if_new(step, crm, optimizer)
            raise BadRow(bad_rows[0])
        if was_asked_to_stop:
            self._leave(step, crm, optimizer)
        self._delete_old()  # the newest weights have just shown that they work

    def _give_up_on_broken_weights(self, step: int, problem: str) -> None:
        if step == 0:
            raise BadRow(problem)  # these weights are not ours
        last = f"and {self._newest_words()} is as it was"
        if step == self.saved_step:
            last = f"but {self._newest_words()} has them: delete it, and the one before is used"
        self._end_with_error(
            f"step {step + 1}: {problem}; these weights are not saved any more, {last}. A lower "
            "--lr helps, in a run that starts from good weights or anew"
        )

    # ------------------------------------------------------------ checkpoints and evaluations

    def is_due(self, step: int, stopped: bool) -> bool:
        """Whether to save and draw: every --save-every steps, after the last, and when stopped."""
        every = self.config.save_every
        return stopped or step == self.steps or (every > 0 and step % every == 0)

    def evaluation_is_due(self, step: int) -> bool:
        """Whether to evaluate on held-out questions: every --eval-every steps, and after the
        last."""
        every = self.config.eval_every
        return step == self.steps or (every > 0 and step % every == 0)

    def _save_if_new(self, step: int, crm: Any, optimizer: Optimizer) -> None:
        """Saves the `step` steps that are done, unless they are saved already or none is."""
        if step > self.start_step and step != self.saved_step:
            self.save(step, crm, optimizer)

    def save(self, step: int, crm: Any, optimizer: Optimizer) -> None:
        """Writes the checkpoint of `step` steps. Older ones that --keep does not ask for are
        deleted once these weights have worked for another step.

        crm: has gathered(), a context manager inside which crm.save(folder) writes all weights. A
        kill at any moment leaves the checkpoint before it. Where any rank cannot write, all end
        with status 1."""
        if self.config.save_every < 0:
            return
        folder = checkpoint.path_of(self.folder, step)
        temporary = checkpoint.temporary_of(folder)
        with self._all_write(folder):
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                (temporary / "optimizer").mkdir(parents=True)
        with crm.gathered(), self._all_write(folder):
            if self.ranks.is_main:
                crm.save(temporary)
        with self._all_write(folder):
            optimizer.save(temporary, step, self.ranks.rank)
        with self._all_write(folder):
            if self.ranks.is_main:
                checkpoint.publish(folder)
        self.saved_step = step

    def _delete_old(self) -> None:
        """--keep: the newest stay, and the best of those that were evaluated."""
        if self.config.keep == 0 or self.saved_step is None or not self.ranks.is_main:
            return
        saved = checkpoint.path_of(self.folder, self.saved_step)
        scores = {}
        for row in self.read("metrics"):
            if row.get("sampled/iou") is not None:
                scores[row["step"]] = row["sampled/iou"]
        checkpoint.keep_newest(self.folder, self.config.keep, saved, scores)

    @contextmanager
    def _all_write(self, folder: Path) -> Iterator[None]:
        """Around a piece of writing `folder` that all ranks enter. None goes on before all are
        done, and if one cannot write, all end. Inside, a rank must not wait for others: what it
        then reports is no disk's fault."""
        problem = None
        try:
            yield
        except (OSError, SafetensorError) as error:
            problem = str(error)
        problems = [text for text in self.ranks.gather([problem]) if text is not None]
        if problems:
            if self.ranks.is_main:
                shutil.rmtree(checkpoint.temporary_of(folder), ignore_errors=True)
            self._cannot_write(folder, problems[0])

    def _cannot_write(self, path: Path, problem: str) -> None:
        reason = problem.splitlines()[0]
        self._end_with_error(
            f"{path} cannot be written ({reason}); {self._newest_words()} is intact, and --resume "
            "auto continues from there"
        )

    def _end_with_error(self, message: str) -> None:
        if self.ranks.is_main:
            print(f"error: {message}", file=sys.stderr, flush=True)
        raise SystemExit(1)

    def _newest_words(self) -> str:
        if self.saved_step is None:
            return "no checkpoint"
        return str(checkpoint.path_of(self.folder, self.saved_step))

    # ------------------------------------------------------------ the end

    def curves(self, panels: dict[str, list[str]]) -> None:
        """Draws curves.png. panels: {title: names in metrics.jsonl}."""
        if self.ranks.is_main:
            curves(self.folder / "curves.png", self.read("metrics"), panels)

    def finish(self, done: int) -> None:
        """Prints where everything is after `done` steps, and closes the tracker."""
        if done < self.steps:
            resume = "; the same command with --resume continues"
            if self.saved_step is None:
                resume = "; nothing is saved, the same command with --resume auto begins again"
            print0(f"\nstopped at {done} of {self.steps} steps{resume}")
        else:
            self._delete_old()
        if self.tracker is not None:
            self.tracker.finish()
        weights = "not saved" if self.saved_step is None else self._newest_words()
        picture = self.folder / "curves.png"
        shown = f", picture {picture}" if picture.exists() else ""
        print0(f"weights {weights}, numbers {self.folder / 'metrics.jsonl'}{shown}")


def find_tracker(name: str) -> type:
    """The class of TRACKERS. ValueError where the tracker's package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"--track {name}: is not installed; pip install {name}")
    return find(TRACKERS[name])


def inside_checkout(value: Any) -> Any:
    """A path inside this checkout is written relative to it, so that a checkout that has moved can
    resume."""
    prefix = f"{ROOT}{os.sep}"
    if isinstance(value, str) and value.startswith(prefix):
        return value.removeprefix(prefix)
    return value
