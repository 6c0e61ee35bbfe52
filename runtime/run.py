"""What a training run does besides training: data order, run folder, resume, evaluation, report.

`Run(cfg, ranks)` refuses what cannot run and writes nothing; `begin` makes or resumes the folder; the loop then calls
`log`, `warn`, `evaluate`, `save` and, around whatever reads samples, `checkpoint_on_bad_row`. A folder named
step_000100 is a complete checkpoint, whatever was killed when.
"""

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

from crm import CRM, load_crm
from data import BadRow, load_samples
from metrics import held_out, held_out_means
from runtime.cli import RunConfig, dashed, print0
from runtime.files import parse_object, read_jsonl, read_text, read_torch, to_disk, write_whole
from runtime.optim import Optimizer
from runtime.parallel import Ranks, unsharded
from runtime.pretrained import remembered_frame
from runtime.readers import read_rows
from runtime.step import warnings_of

LOGS = (
    "metrics",
    "samples",
    "held_out",
    "rollouts",
)  # NAME.jsonl, one object per line, each with its step
MAY_CHANGE = {  # on --resume; everything else decides what is learned
    "resume",
    "out",
    "steps",
    "epochs",
    "timeout",
    "parallel",
    "offload",
    "checkpointing",
    "pack_tokens",
    "micro_batch",
    "cuda_graphs",
    "max_skipped",
    "eval_every",
    "eval_answers",
    "eval_limit",
    "save_every",
    "keep",
    "track",
    "rollouts_every",
}


# ---------------------------------------------------------------- schedules and data


def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up over `warmup` steps, then constant, linear or cosine decay to 0. step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return (
        peak
        * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
            schedule
        ]
    )


def sample_indices(count: int, n: int, seed: int, step: int) -> list[int]:
    """The n samples of a step, a pure function of (seed, step): each epoch is a permutation of range(count), and the
    steps read the epochs in order."""
    places = range(step * n, (step + 1) * n)
    epochs = {place // count for place in places}
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in epochs}
    return [int(orders[place // count][place % count]) for place in places]


def load_splits(cfg: RunConfig):
    """(training samples, held-out samples), each row's cheap properties checked."""

    def load(path, split):
        samples = load_samples(path, split, cfg.skip_bad_rows)
        samples.check()
        return samples

    train = load(cfg.data, "train")
    train = train.only(cfg.only) if cfg.only else train
    if cfg.eval_every < 0:
        return train, []
    names = read_rows(Path(cfg.test_data or cfg.data), None)[1]
    held_out = next(
        (name for split in ("test", "val") for name in names if name.startswith(split)), None
    )
    if not cfg.test_data and (Path(cfg.data).suffix == ".parquet" or not held_out):
        print0(
            f'{cfg.data}: no split "test" there, so nothing is held out; --test-data PATH names one'
        )
        return train, []
    if not held_out and len(names) == 1:  # --test-data may call its own split as it likes
        held_out = names[0]
    return train, load(cfg.test_data or cfg.data, held_out or "test")[: cfg.eval_limit or None]


def load_policy(cfg: RunConfig, ranks: Ranks, reference: bool = False) -> tuple[CRM, Optimizer]:
    """The model that trains, with its reference model where there is one, and the optimizer of what trains."""
    torch.manual_seed(cfg.seed)  # LoRA's matrices: the same on every rank
    crm = load_crm(
        cfg.crm,
        ranks.device,
        ranks.dtype(cfg.dtype),
        lora_rank=cfg.lora_rank,
        reference=reference,
        freeze_vision=cfg.freeze_vision,
        checkpointing=cfg.checkpointing,
        resize=cfg.resize,
        min_pixels=cfg.min_pixels,
        max_pixels=cfg.max_pixels,
        prompt=cfg.prompt,
        offload=cfg.offload,
    )
    crm.trainable(cfg.trainable)
    if cfg.parallel == "fsdp":
        from runtime.fsdp import shard

        shard(crm, ranks, cfg.offload)
    return crm, Optimizer(
        crm.trainable(cfg.trainable),
        cfg.weight_decay,
        sharded=crm.root is not None,
        offload=cfg.offload,
    )


# ---------------------------------------------------------------- the run folder


class Run:
    """runs/NAME: config.json, metrics.jsonl, samples.jsonl, held_out.jsonl, rollouts.jsonl, curves.png, step_000100/

    Text first: everything that a picture shows can be read from metrics.jsonl. Only rank 0 writes."""

    def __init__(self, config: RunConfig, ranks: Ranks):
        """ValueError where --out holds files that this run must not touch, or cannot resume."""
        self.config, self.ranks, self.folder = config, ranks, Path(config.out)
        self.is_first, self.stop, self.saved = ranks.rank == 0, False, "not saved"
        self.first, self.warned, self.skipped, self.tracker = {}, set(), 0, None
        if config.track:
            from extras.track import need

            need(config.track)
        self._check_folder()
        self.checkpoint, self.state = (
            self._newest_checkpoint() if config.resume != "no" else (None, None)
        )
        if self.state:
            self._check_flags()
        elif config.resume == "yes":
            raise ValueError(
                f"--resume: no checkpoint step_* in {self.folder}; --resume auto starts there"
            )

    def _check_folder(self) -> None:
        """Only what a training run wrote is touched: not a data set's samples.jsonl or a model's config.json."""
        config, rows = (
            self.folder / "config.json",
            [row for name in LOGS for row in self.read(name)],
        )
        ours = config.exists() and "out" in parse_object(read_text(config), config)
        if (rows or config.exists()) and not (ours and all("step" in row for row in rows)):
            there = [
                path.name
                for path in (config, *(self.folder / f"{name}.jsonl" for name in LOGS))
                if path.exists()
            ]
            raise ValueError(
                f"--out {self.folder}: {', '.join(there)}: not a training run's; give another --out"
            )
        if self.config.resume == "no" and rows:
            raise ValueError(
                f"--out {self.folder}: there is a run; --resume continues it, another --out starts "
                "a new one"
            )

    def _check_flags(self) -> None:
        """--resume trains as before: ValueError names each flag that would change that."""
        path = self.folder / "config.json"
        before, now = (
            parse_object(read_text(path), path),
            json.loads(json.dumps(asdict(self.config))),
        )
        changed = [
            f"{dashed(name)} was {before[name]!r}, is {value!r}"
            for name, value in now.items()
            if name in before and name not in MAY_CHANGE and before[name] != value
        ]
        if changed:
            raise ValueError(
                f"--resume: {'; '.join(changed)}: give what {path} says, or another --out"
            )

    def begin(self, crm: CRM, optimizer: Optimizer, steps: int) -> int:
        """Make or resume the folder -> the number of steps already done. Rows logged after the checkpoint are dropped.
        From here on SIGINT and SIGTERM let a step finish, save and leave."""
        state, self.state = self.state, None
        self.start, self.steps = state["step"] if state else 0, steps
        if self.start >= steps:
            raise ValueError(
                f"--steps {steps}: {self.folder} has {self.start} steps already; give more"
            )
        if state:  # files that --prompt or --crm name may have changed meanwhile
            changed = [
                f"{key} was {value!r}, is {crm.frame()[key]!r}"
                for key, value in remembered_frame(self.checkpoint).items()
                if crm.frame()[key] != value
            ]
            if changed:
                raise ValueError(
                    f"--resume: {'; '.join(changed)}: restore what {self.checkpoint} was trained with"
                )
            optimizer.load(self.checkpoint, state)
            print0(f"resuming from {self.checkpoint}")
        logs = {
            name: [row for row in self.read(name) if state and row["step"] <= self.start]
            for name in LOGS
        }
        for row in logs["metrics"]:
            self._remember(row)
        if self.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in [
                *self.folder.glob("step_*.tmp"),
                *self.folder.glob("step_*.old"),
            ]:  # of a kill
                shutil.rmtree(leftover)
            for name, rows in logs.items():
                path = self.folder / f"{name}.jsonl"
                if path.exists():
                    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
            write_whole(
                self.folder / "config.json", json.dumps(asdict(self.config), indent=2) + "\n"
            )
            if self.config.track:
                from extras.track import Tracker

                self.tracker = Tracker(
                    self.config.track, self.folder, asdict(self.config), logs["metrics"]
                )
        for number in (signal.SIGINT, signal.SIGTERM):  # last: a tracker may have set its own
            signal.signal(number, self._stop)
        return self.start

    def log(self, name: str, *rows: dict) -> None:
        if self.is_first:
            try:
                with open(self.folder / f"{name}.jsonl", "a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as error:
                self._cannot_write(self.folder / f"{name}.jsonl", error)
            if self.tracker and name == "metrics":
                self.tracker.log(*rows)

    def read(self, name: str) -> list[dict]:
        return read_jsonl(self.folder / f"{name}.jsonl")

    def warn(self, row: dict) -> None:
        """Print each warning about a step once per run. The row keeps it, for when the run is resumed."""
        warnings = warnings_of(row, self.first)
        row["warnings"] = [text for text in warnings if text not in self.warned]
        for text in row["warnings"]:
            print0(f"\nstep {row['step']}: {text}")
        self._remember(row)

    def _remember(self, row: dict) -> None:
        self.first = row | self.first
        self.warned |= set(row.get("warnings", []))
        self.skipped = self.skipped + 1 if row.get("skipped") else 0

    def stopped(self) -> bool:
        """Whether any rank was asked to stop: all must leave after the same step."""
        return any(self.ranks.gather([self.stop]))

    def _stop(self, *_):
        self.stop = True
        print0("\nstopping after this step")

    def give_up_after(self, steps: int) -> None:
        """RuntimeError after so many steps in a row with a skipped update."""
        if self.skipped >= steps:
            raise RuntimeError(
                f"{self.skipped} steps in a row without a finite gradient: start one with a lower --lr, "
                f"perhaps with a checkpoint of {self.folder} as --crm"
            )

    @contextmanager
    def checkpoint_on_bad_row(self, step: int, crm, optimizer: Optimizer):
        """Around whatever reads samples, on all ranks: after a bad row on any, or logits that are not finite, all save
        the `step` steps that are done and raise BadRow. Inside, a rank must not wait for others."""
        problem = None
        try:
            yield
        except (BadRow, FloatingPointError) as error:
            problem = str(error)
        problems = [text for text in self.ranks.gather([problem]) if text]
        if problems:
            if step > self.start:
                self.save(step, crm, optimizer)
            raise BadRow(problems[0])

    def checkpoints(self) -> dict[int, Path]:
        """{step: folder}, oldest first."""
        return dict(
            sorted((int(folder.name[5:]), folder) for folder in self.folder.glob("step_*[0-9]"))
        )

    def _newest_checkpoint(self) -> tuple[Path | None, dict | None]:
        """(folder, its trainer.pt) of the newest checkpoint that can be read; broken ones are printed."""
        for folder in reversed(self.checkpoints().values()):
            try:
                return folder, read_torch(folder / "trainer.pt", mmap=True)
            except (OSError, ValueError) as error:
                print0(f"{folder}: cannot be read ({error}); the one before it is used")
        return None, None

    def due(self, step: int, stopped: bool) -> bool:
        """Whether to save and draw: after every --save-every steps, after the last, and when stopped."""
        every = self.config.save_every
        return stopped or step == self.steps or (every > 0 and step % every == 0)

    def save(self, step: int, crm, optimizer: Optimizer) -> None:
        """step_000100/: what from_pretrained loads, and trainer.pt to resume from. Written under a temporary name, then
        renamed: a kill at any moment leaves the checkpoint before whole."""
        if self.config.save_every < 0:
            return
        self.saved = self.folder / f"step_{step:06d}"
        folder = self.saved.with_suffix(".tmp")
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
                for path in [*folder.rglob("*"), folder]:
                    to_disk(path)
                remove(self.saved)
                folder.rename(self.saved)
                to_disk(self.folder)
        except torch.OutOfMemoryError:  # a RuntimeError, but not the disk's
            raise
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if self.is_first:  # torch: RuntimeError on a full disk
                shutil.rmtree(folder, ignore_errors=True)
            self._cannot_write(self.saved, error)
        if (
            self.is_first and self.config.keep
        ):  # the newest, and the best of those that were evaluated
            saved, iou = (
                self.checkpoints(),
                {row["step"]: row.get("sampled/iou") for row in self.read("metrics")},
            )
            best = max((s for s in saved if iou.get(s) is not None), key=iou.get, default=None)
            for old in list(saved)[: -self.config.keep]:
                if old != best:
                    remove(saved[old])

    def _cannot_write(self, path: Path, error: Exception):
        last = max(self.checkpoints().values(), default="no checkpoint")
        print(
            f"error: {path} cannot be written ({str(error).splitlines()[0]}); {last} is whole, and --resume auto "
            "continues from there",
            file=sys.stderr,
            flush=True,
        )
        raise SystemExit(1) from None

    def evaluation_due(self, step: int) -> bool:
        every = self.config.eval_every
        return step == self.steps or (every > 0 and step % every == 0)

    def evaluate(self, crm, tests, weights: dict, step: int, greedy: bool) -> dict[str, float]:
        """Held-out scores, sampled as in training and, if asked, greedy: their means, for metrics.jsonl."""
        cfg = self.config
        kinds = {"sampled": (cfg.eval_answers, cfg.temperature)} | (
            {"greedy": (1, 0.0)} if greedy else {}
        )
        with unsharded(crm):
            rows = held_out(
                crm,
                tests,
                kinds,
                cfg.mode,
                weights,
                self.ranks,
                cfg.max_new_tokens,
                official=cfg.official,
            )
        self.log("held_out", *({"step": step, **row} for row in rows))
        means = held_out_means(rows)
        self.first = means | self.first
        print0(
            f"step {step}, held out: "
            + ", ".join(f"{key} {value:.3f}" for key, value in means.items())
        )
        return means

    def log_groups(self, step: int, crm, tests, roll_out, advantages, own=()) -> None:
        """rollouts.jsonl, at each evaluation and every --rollouts-every steps: whole groups of four held-out prompts,
        always the same with the same random numbers, and of the step's first two. own: this rank's (place, Rollout)."""
        cfg = self.config
        if (
            step
            and not self.evaluation_due(step)
            and not (cfg.rollouts_every and step % cfg.rollouts_every == 0)
        ):
            return
        from extras.rollouts import group_rows

        self.log(
            "rollouts", *group_rows(step, cfg, self.ranks, crm, tests, roll_out, advantages, own)
        )

    def finish(self, done: int, compare: bool) -> None:
        """Print where everything is after `done` steps. compare: if these are all, also what the last held-out
        evaluation has changed since the first."""
        if done < self.steps:
            resume = (
                "" if self.saved == "not saved" else "; the same command with --resume continues"
            )
            print0(f"\nstopped at {done} of {self.steps} steps{resume}")
        elif self.is_first and compare:
            from extras.compare import report

            report(self.read("held_out"), self.read("metrics"))
        if self.tracker:
            self.tracker.finish()
        print0(
            f"weights {self.saved}, numbers {self.folder / 'metrics.jsonl'}, picture {self.folder / 'curves.png'}"
        )
        if (self.folder / "rollouts.jsonl").exists():
            print0(f"to see groups of completions learn: python -m extras.rollouts {self.folder}")

    def curves(self, panels: dict[str, list[str]]) -> None:
        """curves.png: {title: keys of metrics.jsonl}."""
        if self.is_first:
            from extras.pictures import curves

            curves(self.folder / "curves.png", self.read("metrics"), panels)


def remove(folder: Path) -> None:
    """A checkpoint, renamed first: half of one never has a checkpoint's name."""
    if folder.exists():
        shutil.rmtree(folder.rename(folder.with_suffix(".old")))


if __name__ == "__main__":  # a run that has ended, to a tracker
    from extras.track import main

    main()
