"""--track: the numbers of metrics.jsonl also in a tracker. The file stays the record.

    python train_grpo.py --track tensorboard                  # then: tensorboard --logdir runs
    python -m extras.track --track wandb runs/NAME            # a run that has ended, afterwards

tensorboard writes to runs/NAME/tensorboard. wandb, trackio and swanlab write where they are set up
to write, as run NAME of project medreasoner. A resumed run sends its earlier rows again, to a new
run, so that none is missing or there twice. A tracker that fails is dropped, and the run goes on.

To add a tracker, write a class with the three methods of Tensorboard and name it in
runtime/run.py's TRACKERS, under the name of its package.
"""

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.cli import Parser, exit_on, print0
from runtime.files import parse_object, read_jsonl, read_text
from runtime.run import TRACKERS, find_tracker

# What a tracker may raise besides exceptions of its own.
FAILURES = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ImportError,
    AssertionError,
)


class Guard:
    """Calls a package's functions until one raises. From then on it calls none: the package is
    dropped."""

    def __init__(self, package: str):
        self.package = package
        self.is_dropped = False

    def call(self, function: Callable, *args: Any, **options: Any) -> Any:
        """function(*args, **options), or None after a failure, which is printed in one line."""
        if self.is_dropped:
            return None
        try:
            return function(*args, **options)
        except (*FAILURES, *self._own_exceptions()) as error:
            self.is_dropped = True
            problem = " ".join(str(error).split())
            print0(
                f"\n--track {self.package}: {type(error).__name__}: {problem}; it is dropped, "
                "metrics.jsonl has everything"
            )
            return None

    def _own_exceptions(self) -> set[type[Exception]]:
        """The exceptions that the package's own modules define."""
        found = set()
        for name, module in list(sys.modules.items()):
            if name.split(".")[0] == self.package:
                found |= exceptions_in(module, self.package)
        return found


def exceptions_in(module: Any, package: str) -> set[type[Exception]]:
    """The exceptions among a module's names that the package itself defines."""
    found = set()
    for value in vars(module).values():
        is_exception = isinstance(value, type) and issubclass(value, Exception)
        if is_exception and value.__module__.split(".")[0] == package:
            found.add(value)
    return found


def numbers_of(row: dict) -> dict[str, float]:
    """What a tracker is sent of a row of metrics.jsonl: its numbers, but for the step."""
    numbers = {}
    for name, value in row.items():
        if type(value) in (int, float) and name != "step":
            numbers[name] = value
    return numbers


# ---------------------------------------------------------------- the trackers


class Tensorboard:
    """Writes runs/NAME/tensorboard anew. guard.is_dropped: whether something failed."""

    def __init__(self, folder: Path, config: dict):
        """folder: the run folder. config: {flag: value}."""
        self.guard = Guard("tensorboard")
        self.writer = self.guard.call(self._open, folder, config)

    def _open(self, folder: Path, config: dict) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        writer = SummaryWriter(folder / "tensorboard")
        code = json.dumps(config, indent=1).replace("\n", "\n    ")
        writer.add_text("config", f"    {code}")  # Markdown shows indented text as code
        return writer

    def log(self, *rows: dict) -> None:
        """Sends the numbers of rows of metrics.jsonl."""
        for row in rows:
            self.guard.call(self._send, numbers_of(row), row["step"])

    def _send(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        """Closes the file."""
        if self.writer is not None:
            self.guard.call(self.writer.close)


class Hosted:
    """A tracker whose package has wandb's functions init, log and finish."""

    package = ""

    def __init__(self, folder: Path, config: dict):
        """folder: the run folder, whose name the run gets. config: {flag: value}."""
        self.guard = Guard(self.package)
        self.module = self.guard.call(importlib.import_module, self.package)
        if self.module is not None:
            name = folder.resolve().name
            self.guard.call(self.module.init, project="medreasoner", name=name, config=config)

    def log(self, *rows: dict) -> None:
        """Sends the numbers of rows of metrics.jsonl."""
        for row in rows:
            if not self.guard.is_dropped:
                self.guard.call(self.module.log, numbers_of(row), step=row["step"])

    def finish(self) -> None:
        """Ends the run there."""
        if not self.guard.is_dropped:
            self.guard.call(self.module.finish)


class Wandb(Hosted):
    package = "wandb"


class Trackio(Hosted):
    package = "trackio"


class Swanlab(Hosted):
    package = "swanlab"


# ---------------------------------------------------------------- a run that has ended


def read_run(folder: Path) -> tuple[dict, list[dict]]:
    """(flags, rows of metrics.jsonl) of a run folder. ValueError or OSError, one line, where there
    are none."""
    config = parse_object(read_text(folder / "config.json"), folder / "config.json")
    file = folder / "metrics.jsonl"
    rows = read_jsonl(file)
    if not rows:
        raise ValueError(f"{file}: no row there")
    for number, row in enumerate(rows, 1):
        if type(row.get("step")) is not int:
            raise ValueError(
                f"{file}, line {number}: step is no whole number; give the folder of a run of "
                "train_grpo.py or train_sft.py"
            )
    return config, rows


def main() -> None:
    """Sends a run that has ended. Status 1 where the tracker fails."""
    parser = Parser(description=__doc__)
    parser.add_argument("--track", required=True, choices=tuple(TRACKERS))
    parser.add_argument("folder", type=Path, help="a run folder")
    args = parser.parse_args()
    with exit_on(ValueError, OSError):
        tracker_class = find_tracker(args.track)
        config, rows = read_run(args.folder)
    tracker = tracker_class(args.folder, config)
    tracker.log(*rows)
    tracker.finish()
    if tracker.guard.is_dropped:
        raise SystemExit(1)
    print0(f"{len(rows)} rows of {args.folder} -> {args.track}")


if __name__ == "__main__":
    main()
