"""What every training run shares and no paper is about: schedules, data order, the run folder, checkpoints, curves.
"""
import json
import math
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from data import load_samples
from runtime.cli import print0
from runtime.files import read_torch
from runtime.metrics import held_out, held_out_means, summary_lines
from runtime.optim import Optimizer
from runtime.parallel import Ranks, gathered


# ---------------------------------------------------------------- schedules

def learning_rate(step: int, steps: int, peak: float, warmup: int, schedule: str) -> float:
    """Linear warm-up over `warmup` steps, then constant, linear or cosine decay to 0. step counts from 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return peak * shape[schedule]


def sample_indices(count: int, n: int, seed: int, step: int) -> list[int]:
    """The samples of a step, a pure function of (seed, step):
    epochs are permutations of range(count), read in order."""
    at = np.arange(step * n, (step + 1) * n)
    epochs = {e: np.random.default_rng([seed, int(e)]).permutation(count) for e in np.unique(at // count)}
    return [int(epochs[k // count][k % count]) for k in at]


def load_splits(config):
    """(training samples, held-out samples) of a Config; what --skip-bad-rows left out is said."""
    def load(split, path):
        samples = load_samples(path, split, config.skip_bad_rows)
        if samples.skipped:
            print0(f"{path}, {split}: {len(samples.skipped)} bad rows left out, the first: {samples.skipped[0]}")
        return samples

    train = load("train", config.data)
    train = train.only(config.only) if config.only else train
    if config.eval_every < 0:
        return train, []
    held_out_at = getattr(config, "test_data", None) or config.data
    if Path(held_out_at).is_file() and held_out_at == config.data:
        raise ValueError(f"--data {config.data}: one file has no held-out split; give a folder, or "
                         "--eval-every -1")
    return train, load("test", held_out_at)[:config.eval_limit or None]


# ---------------------------------------------------------------- the run folder

class Run:
    """runs/NAME: config.json, metrics.jsonl, samples.jsonl, held_out.jsonl, curves.png, step_000100/ …

    Text first: everything a picture shows can be read from metrics.jsonl. Only rank 0 writes."""

    def __init__(self, config, ranks: Ranks):
        self.folder, self.config, self.ranks, self.stop = Path(config.out), config, ranks, False
        if config.resume == "no" and (self.folder / "metrics.jsonl").exists():
            raise ValueError(f"--out {self.folder}: a run is in there already; --resume goes on with it, "
                             "another --out begins a new one")
        self.last, self.state = self._last_good() if config.resume != "no" else (None, None)
        if config.resume == "yes" and self.state is None:
            raise ValueError(f"--resume: no step_* checkpoint in {self.folder}; --resume auto begins there")

    def _last_good(self):
        """(newest checkpoint that can be read, its trainer.pt); the others are named."""
        for folder in sorted(self.folder.glob("step_*[0-9]"), reverse=True):
            try:
                return folder, read_torch(folder / "trainer.pt")
            except (OSError, ValueError) as error:
                print0(f"{folder}: cannot be read ({error}), so the one before it is taken")
        return None, None

    def begin(self, optimizer: Optimizer, steps: int) -> int:
        """Make or resume the folder; the number of steps already done.
        Later lines of a resumed run are dropped."""
        state, self.state = self.state, None
        done = state["step"] if state else 0
        if done >= steps:
            raise ValueError(f"--steps {steps}: {self.folder} has {done} steps already; give more")
        self.steps = steps
        for number in (signal.SIGINT, signal.SIGTERM):          # finish the step, save, leave
            signal.signal(number, self._stop)
        if state:
            optimizer.load(self.last, state)
        if self.ranks.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
            for left in [*self.folder.glob("step_*.tmp"), *self.folder.glob("step_*.old")]:
                shutil.rmtree(left)                                     # of a kill while saving or deleting
            for file in self.folder.glob("*.jsonl"):
                lines = file.read_text().splitlines(keepends=True)      # a kill may have torn the last
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
                aside = file.with_suffix(".tmp")
                aside.write_text("".join(kept if state else []))
                aside.replace(file)
        return done

    def stopped(self) -> bool:
        """Whether any rank was asked to stop: all must leave after the same step."""
        return any(self.ranks.gather([self.stop]))

    def _stop(self, *_):
        self.stop = True
        print0("\nstopping after this step")

    def log(self, name: str, *rows: dict) -> None:
        if self.ranks.rank == 0:
            try:
                with open(self.folder / f"{name}.jsonl", "a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
            except OSError as error:
                self._cannot_write(self.folder / f"{name}.jsonl", error)

    def read(self, name: str) -> list[dict]:
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def due(self, step: int, now: bool) -> bool:
        """Whether to save and draw: after every --save-every steps, after the last, or now."""
        every = self.config.save_every
        return bool(now or step == self.steps or every > 0 and step % every == 0)

    def save(self, step: int, crm, optimizer: Optimizer) -> Path | str:
        """step_000100/: what from_pretrained loads, and trainer.pt to go on from. Written aside, then
        renamed, so that a kill at any moment leaves the last one whole. --keep of them and the best stay."""
        if self.config.save_every < 0:
            return "not saved"
        folder = self.folder / f"step_{step:06d}"
        aside, lead = folder.with_suffix(".tmp"), self.ranks.rank == 0
        try:
            if lead:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            self.ranks.wait()
            with gathered(crm):
                if lead:
                    crm.save(aside)
            optimizer.save(aside, step, self.ranks.rank)
            self.ranks.wait()
            if lead:
                for path in [*aside.rglob("*"), aside]:
                    _fsync(path)
                self._remove(folder)
                aside.rename(folder)
                _fsync(self.folder)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if lead:                                            # torch: RuntimeError on a full disk
                shutil.rmtree(aside, ignore_errors=True)
            self._cannot_write(folder, error)
        if lead and self.config.keep:
            evaluated = [row for row in self.read("metrics") if "sampled/iou" in row]
            best = max(evaluated, key=lambda row: row["sampled/iou"], default={"step": -1})["step"]
            for old in sorted(self.folder.glob("step_*[0-9]"))[:-self.config.keep]:
                if old.name != f"step_{best:06d}":
                    self._remove(old)
        return folder

    def _remove(self, folder: Path) -> None:
        """Renamed first: a kill while deleting leaves no half checkpoint under a checkpoint's name."""
        if folder.exists():
            shutil.rmtree(folder.rename(folder.with_suffix(".old")))

    def _cannot_write(self, path: Path, error: Exception):
        last = max(self.folder.glob("step_*[0-9]"), default="no checkpoint")
        print(f"error: {path} cannot be written ({str(error).splitlines()[0]}); {last} is whole, and "
              "--resume auto goes on from there", file=sys.stderr, flush=True)
        raise SystemExit(1) from None

    def evaluate(self, crm, tests, template: str, weights: dict, step: int, greedy: bool) -> dict:
        """The held-out split, sampled as in training and, at both ends of a run, greedy;
        a row for metrics.jsonl."""
        c = self.config
        kinds = {"sampled": (c.eval_answers, getattr(c, "temperature", 1.0))}
        if greedy:
            kinds["greedy"] = (1, 0.0)
        with gathered(crm):
            rows = held_out(crm, tests, template, kinds, c.mode, weights, self.ranks, c.max_new_tokens,
                            official=getattr(c, "official", False))
        self.log("held_out", *({"step": step, **scores} for scores in rows))
        row = held_out_means(rows)
        print0(f"step {step}, held out: " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        return row

    def report(self) -> None:
        """Print the held-out split before and after, each change with its interval over the samples,
        and the cost."""
        if self.ranks.rank:
            return
        rows, metrics = self.read("held_out"), [row for row in self.read("metrics") if "seconds" in row]
        steps = sorted({row["step"] for row in rows})
        print0(f"\nheld-out split, step {steps[0]} -> {steps[-1]}, "
            "mean over questions [95 % paired bootstrap interval]")
        print0("\n".join(summary_lines(*([row for row in rows if row["step"] == step]
                                         for step in (steps[0], steps[-1])))))
        seconds = sorted(row["seconds"] for row in metrics)
        print0(f"a step took {seconds[len(seconds) // 2]:.2f} s (median), "
            f"all {len(seconds)} {sum(seconds) / 60:.1f} min, "
            f"peak memory {max(row['peak_memory_gb'] for row in metrics):.2f} GB")

    def curves(self, panels: dict[str, list[str]]) -> None:
        """curves.png from metrics.jsonl: one panel a title, its keys over the steps, with a running mean."""
        if self.ranks.rank != 0:
            return
        import matplotlib
        matplotlib.use("agg")
        import matplotlib.pyplot as plt
        rows = self.read("metrics")
        figure, axes = plt.subplots(2, -(-len(panels) // 2), figsize=(4.2 * -(-len(panels) // 2), 6),
                                    squeeze=False)
        for axis, (title, keys) in zip(axes.flat, panels.items()):
            for key in keys:
                points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                if not points:
                    continue
                x, y = np.array(points, dtype=float).T
                sparse = len(x) < 0.5 * len(rows)
                line, = axis.plot(x, y, "o-" if sparse else "-", alpha=1 if sparse else 0.25,
                                  lw=1.5 if sparse else 1, label=key if sparse else None)
                if not sparse:                                  # a mean over the last tenth of the run
                    width = max(1, len(y) // 10)
                    mean = [y[max(0, i - width + 1):i + 1].mean() for i in range(len(y))]
                    axis.plot(x, mean, color=line.get_color(), lw=2, label=key)
            axis.set_title(title, loc="left", fontsize=11)
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if axis.lines:
                axis.legend(fontsize=8, frameon=False)
        for axis in axes.flat[len(panels):]:
            axis.set_visible(False)
        for axis in axes[-1]:
            axis.set_xlabel("step")
        figure.tight_layout()
        figure.savefig(self.folder / "curves.png", dpi=110)
        plt.close(figure)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
