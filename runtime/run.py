"""What a training run does besides training: data order, run folder, resume, evaluation, curves.

`Run(cfg, ranks)` refuses what cannot run and writes nothing; `begin` makes or resumes the folder; the loop
then calls `log`, `evaluate`, `save` and, around whatever reads samples, `checkpoint_on_bad_row`."""
import json
import math
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from data import BadRow, load_samples
from runtime.checkpoints import (checkpoints, newest_checkpoint, put_in_place, remove_all_but,
                                 remove_leftovers, temporary_name)
from runtime.cli import RunConfig, dashed, print0
from runtime.files import parse_object, read_jsonl, read_text, write_whole
from runtime.metrics import held_out, held_out_means, summary_lines
from runtime.optim import Optimizer
from runtime.parallel import Ranks, unsharded
from runtime.step import warnings_of

LOGS = ("metrics", "samples", "held_out", "rollouts")   # NAME.jsonl, one object per line, each with its step
MAY_CHANGE = {          # on --resume; everything else decides what is learned
    "resume", "out", "steps", "epochs", "timeout", "parallel", "offload", "checkpointing", "pack_tokens",
    "micro_batch", "cuda_graphs", "max_skipped", "eval_every", "eval_answers", "eval_limit", "save_every",
    "keep"}


# ---------------------------------------------------------------- schedules and data

def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up over `warmup` steps, then constant, linear or cosine decay to 0. step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return peak * shape[schedule]


def sample_indices(count: int, n: int, seed: int, step: int) -> list[int]:
    """The n samples of a step, a pure function of (seed, step): each epoch is a permutation of range(count),
    and the steps read the epochs in order."""
    places = range(step * n, (step + 1) * n)
    epochs = {place // count for place in places}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [int(orders[place // count][place % count]) for place in places]


def load_splits(cfg: RunConfig):
    """(training samples, held-out samples); prints what --skip-bad-rows left out."""
    def load(path, split):
        samples = load_samples(path, split, cfg.skip_bad_rows)
        if samples.skipped:
            print0(f"{path}, {split}: {len(samples.skipped)} bad rows skipped; first: {samples.skipped[0]}")
        samples.check()                                 # what shows without images, now and not in hours
        return samples

    train = load(cfg.data, "train")
    if cfg.only:
        train = train.only(cfg.only)
    if cfg.eval_every < 0:
        return train, []
    if not cfg.test_data and Path(cfg.data).is_file():
        raise ValueError(f"--data {cfg.data}: one file has no held-out split; give a folder, --test-data, or "
                         "--eval-every -1")
    return train, load(cfg.test_data or cfg.data, "test")[:cfg.eval_limit or None]


# ---------------------------------------------------------------- the run folder

class Run:
    """runs/NAME: config.json, metrics.jsonl, samples.jsonl, held_out.jsonl, curves.png, step_000100/ …

    Text first: everything that a picture shows can be read from metrics.jsonl. Only rank 0 writes."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        """ValueError where --out holds files that this run must not touch, or cannot resume."""
        self.config, self.ranks, self.folder = config, ranks, Path(config.out)
        self.is_first = ranks.rank == 0
        self.stop, self.saved = False, "not saved"
        self.first_row, self.warned, self.skipped = None, set(), 0
        self._check_folder()
        self.checkpoint, self.state = None, None            # to resume from
        if config.resume != "no":
            self.checkpoint, self.state = newest_checkpoint(self.folder)
        if self.state:
            self._check_flags()
        elif config.resume == "yes":
            raise ValueError(f"--resume: no checkpoint step_* in {self.folder}; --resume auto starts there")

    def _check_folder(self) -> None:
        """Only what a training run wrote is touched: not a data set's samples.jsonl or a model's config.json."""
        config, logs = self.folder / "config.json", {name: self.read(name) for name in LOGS}
        foreign = [f"{name}.jsonl" for name, rows in logs.items()
                   if rows and not (config.exists() and all("step" in row for row in rows))]
        if config.exists() and "out" not in parse_object(read_text(config), config):
            foreign.append(config.name)
        if foreign:
            raise ValueError(f"--out {self.folder}: {foreign[0]} is no training run's; give another --out")
        if self.config.resume == "no" and any(logs.values()):
            raise ValueError(f"--out {self.folder}: there is a run; --resume continues it, another --out "
                             "starts a new one")

    def _check_flags(self) -> None:
        """--resume trains as before: ValueError names each flag that would change that."""
        path = self.folder / "config.json"
        before, now = parse_object(read_text(path), path), json.loads(json.dumps(asdict(self.config)))
        changed = [f"{dashed(name)} was {before[name]!r}, is {value!r}" for name, value in now.items()
                   if name in before and name not in MAY_CHANGE and before[name] != value]
        if changed:
            raise ValueError(f"--resume: {'; '.join(changed)}: give what {path} says, or another --out")

    def begin(self, optimizer: Optimizer, steps: int) -> int:
        """Make or resume the folder -> the number of steps already done. Rows logged after the checkpoint are
        dropped. From here on SIGINT and SIGTERM let a step finish, save and leave."""
        state, self.state = self.state, None
        self.start, self.steps = state["step"] if state else 0, steps
        if self.start >= steps:
            raise ValueError(f"--steps {steps}: {self.folder} has {self.start} steps already; give more")
        if state:
            optimizer.load(self.checkpoint, state)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)
        logs = {name: self.read(name) if state else [] for name in LOGS}
        logs = {name: [row for row in rows if row["step"] <= self.start] for name, rows in logs.items()}
        for row in logs["metrics"]:
            if row["step"]:
                self._remember(row)
        if self.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.folder)
            for name, rows in logs.items():
                path = self.folder / f"{name}.jsonl"
                if path.exists():
                    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
            write_whole(self.folder / "config.json", json.dumps(asdict(self.config), indent=2) + "\n")
        return self.start

    # ------------------------------------------------------------ logs and warnings

    def log(self, name: str, *rows: dict) -> None:
        if self.is_first:
            try:
                with open(self.folder / f"{name}.jsonl", "a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as error:
                self._cannot_write(self.folder / f"{name}.jsonl", error)

    def read(self, name: str) -> list[dict]:
        return read_jsonl(self.folder / f"{name}.jsonl")

    def warn(self, row: dict) -> None:
        """Print each warning about a step once per run. The row keeps it, for when the run is resumed."""
        warnings = warnings_of(row, self.first_row or row)
        row["warnings"] = [text for text in warnings if text not in self.warned]
        for text in row["warnings"]:
            print0(f"\nstep {row['step']}: {text}")
        self._remember(row)

    def _remember(self, row: dict) -> None:
        self.first_row = self.first_row or row
        self.warned |= set(row.get("warnings", []))
        self.skipped = self.skipped + 1 if row.get("skipped") else 0

    # ------------------------------------------------------------ stopping

    def stopped(self) -> bool:
        """Whether any rank was asked to stop: all must leave after the same step."""
        return any(self.ranks.gather([self.stop]))

    def _stop(self, *_):
        self.stop = True
        print0("\nstopping after this step")

    def give_up_after(self, steps: int) -> None:
        """RuntimeError after so many steps in a row with a skipped update."""
        if self.skipped >= steps:
            raise RuntimeError(f"{self.skipped} steps in a row without a finite gradient: start a run with a "
                               f"lower --lr, perhaps with a checkpoint of {self.folder} as --crm")

    @contextmanager
    def checkpoint_on_bad_row(self, step: int, crm, optimizer: Optimizer):
        """Around whatever reads samples, on all ranks: after a bad row on any, all save the `step` steps that
        are done and raise BadRow. Inside, a rank must not wait for others after its first sample."""
        problem = None
        try:
            yield
        except BadRow as error:
            problem = str(error)
        problems = [text for text in self.ranks.gather([problem]) if text]
        if problems:
            if step > self.start:
                self.save(step, crm, optimizer)
            raise BadRow(problems[0])

    # ------------------------------------------------------------ checkpoints

    def due(self, step: int, stopped: bool) -> bool:
        """Whether to save and draw: after every --save-every steps, after the last, and when stopped."""
        every = self.config.save_every
        return stopped or step == self.steps or (every > 0 and step % every == 0)

    def save(self, step: int, crm, optimizer: Optimizer) -> None:
        """step_000100/: what from_pretrained loads, and trainer.pt to resume from. Written under a temporary
        name, then renamed: a kill at any moment leaves the checkpoint before whole."""
        if self.config.save_every < 0:
            return
        self.saved = self.folder / f"step_{step:06d}"
        folder = temporary_name(self.saved)
        try:
            if self.is_first:
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
            self.ranks.wait()
            with unsharded(crm):
                if self.is_first:
                    crm.save(folder)
            optimizer.save(folder, step, self.ranks.rank)
            self.ranks.wait()
            if self.is_first:
                put_in_place(self.saved)
        except torch.OutOfMemoryError:                      # a RuntimeError, but not the disk's
            raise
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if self.is_first:                               # torch: RuntimeError on a full disk
                shutil.rmtree(folder, ignore_errors=True)
            self._cannot_write(self.saved, error)
        if self.is_first and self.config.keep:
            iou = {row["step"]: row["sampled/iou"] for row in self.read("metrics") if "sampled/iou" in row}
            remove_all_but(self.folder, self.config.keep, iou)

    def _cannot_write(self, path: Path, error: Exception):
        last = list(checkpoints(self.folder).values())[-1:] or ["no checkpoint"]
        print(f"error: {path} cannot be written ({str(error).splitlines()[0]}); {last[0]} is whole, and "
              "--resume auto continues from there", file=sys.stderr, flush=True)
        raise SystemExit(1) from None

    # ------------------------------------------------------------ evaluation, report, curves

    def evaluation_due(self, step: int) -> bool:
        every = self.config.eval_every
        return step == self.steps or (every > 0 and step % every == 0)

    def evaluate(self, crm, tests, template: str, weights: dict, step: int, greedy: bool) -> dict[str, float]:
        """Held-out scores, sampled as in training and, if asked, greedy: their means, for metrics.jsonl."""
        cfg = self.config
        kinds = {"sampled": (cfg.eval_answers, cfg.temperature)} | ({"greedy": (1, 0.0)} if greedy else {})
        with unsharded(crm):
            rows = held_out(crm, tests, template, kinds, cfg.mode, weights, self.ranks, cfg.max_new_tokens,
                            official=cfg.official)
        self.log("held_out", *({"step": step, **row} for row in rows))
        means = held_out_means(rows)
        print0(f"step {step}, held out: " + ", ".join(f"{key} {value:.3f}" for key, value in means.items()))
        return means

    def finish(self, compare: bool) -> None:
        """Print where everything is. compare: also the first and the last held-out evaluation, compared."""
        if self.is_first and compare:
            self.report()
        print0(f"weights {self.saved}, numbers {self.folder / 'metrics.jsonl'}, "
               f"picture {self.folder / 'curves.png'}")

    def report(self) -> None:
        rows, metrics = self.read("held_out"), [row for row in self.read("metrics") if "seconds" in row]
        steps = sorted({row["step"] for row in rows})
        before, after = ({(row["kind"], row["index"]): row for row in rows if row["step"] == step}
                         for step in (steps[0], steps[-1]))
        both = [key for key in before if key in after]      # --eval-limit may have changed on --resume
        print0(f"\nheld-out split, step {steps[0]} -> {steps[-1]}, mean over questions "
               "[95 % paired bootstrap interval]")
        print0("\n".join(summary_lines([before[key] for key in both], [after[key] for key in both])))
        seconds = [row["seconds"] for row in metrics]
        print0(f"{np.median(seconds):.2f} s per step (median), {sum(seconds) / 60:.1f} min for all "
               f"{len(seconds)}, peak memory {max(row['peak_memory_gb'] for row in metrics):.2f} GB")

    def curves(self, panels: dict[str, list[str]]) -> None:
        """curves.png from metrics.jsonl. panels: {title: keys}; each key thin, its running mean thick."""
        if not self.is_first:
            return
        from matplotlib.figure import Figure
        rows, columns = self.read("metrics"), math.ceil(len(panels) / 2)
        figure = Figure(figsize=(4.2 * columns, 6), layout="constrained")
        for place, (title, keys) in enumerate(panels.items(), 1):
            axis = figure.add_subplot(2, columns, place, title=title, xlabel="step")
            for key in keys:
                logged = [row for row in rows if row.get(key) is not None]
                steps, values = [row["step"] for row in logged], [row[key] for row in logged]
                width = max(1, len(values) // 10)
                means = [np.mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]
                line, = axis.plot(steps, values, linewidth=1, alpha=0.25)
                axis.plot(steps, means, "o-" if len(values) < 20 else "-", color=line.get_color(), label=key)
            axis.legend(fontsize=8, frameon=False)
            axis.grid(alpha=0.25)
        figure.savefig(self.folder / "curves.png", dpi=110)
