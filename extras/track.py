"""--track: the numbers of metrics.jsonl also in a tracker. The file stays the record; no tracker can end a run.

    python train_grpo.py --track tensorboard                        # then: tensorboard --logdir runs
    python -m runtime.run --track wandb runs/NAME                   # a run that has ended, afterwards

tensorboard writes to runs/NAME/tensorboard; wandb, trackio and swanlab to where they are set up to write, as run NAME
of project medreasoner. A resumed run sends its earlier rows again, to a new run: none is missing or there twice.
"""

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from runtime.cli import TRACKERS, Parser, exit_on, print0
from runtime.files import parse_object, read_jsonl, read_text

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


def need(name: str) -> None:
    """ValueError where the tracker's package is not installed."""
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"--track {name}: is not installed; pip install {name}")


class Tracker:
    """One tracker of one run. What it raises, in the constructor, too, is one line, and it is dropped."""

    def __init__(self, name: str, folder: Path, config: dict, rows=()):
        self.name, self.send, self.end = name, None, None
        self.try_to(self.start, folder.resolve(), config)
        self.log(*rows)

    def start(self, folder: Path, config: dict) -> None:
        if self.name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            writer = SummaryWriter(folder / "tensorboard")
            writer.add_text(
                "config", "    " + json.dumps(config, indent=1).replace("\n", "\n    ")
            )  # Markdown: code

            def send(numbers: dict, step: int) -> None:
                for key, value in numbers.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            self.send, self.end = send, writer.close
        else:
            module = importlib.import_module(self.name)
            module.init(project="medreasoner", name=folder.name, config=config)
            self.send, self.end = module.log, module.finish

    def log(self, *rows: dict) -> None:
        """Rows of metrics.jsonl; of each the numbers are sent."""
        for row in rows:
            if self.send:
                numbers = {
                    key: value
                    for key, value in row.items()
                    if type(value) in (int, float) and key != "step"
                }
                self.try_to(self.send, numbers, step=row["step"])

    def finish(self) -> None:
        if self.end:
            self.try_to(self.end)

    def try_to(self, function: Callable, *args, **options) -> None:
        try:
            function(*args, **options)
        except (*FAILURES, *self.own_errors()) as error:
            self.send = self.end = None
            print0(
                f"\n--track {self.name}: {type(error).__name__}: {' '.join(str(error).split())}; it is dropped, "
                "metrics.jsonl has everything"
            )

    def own_errors(self) -> set[type[Exception]]:
        """The exceptions that the tracker's own modules define."""
        values = [
            value
            for name, module in list(sys.modules.items())
            if name.split(".")[0] == self.name
            for value in vars(module).values()
        ]
        return {
            value
            for value in values
            if isinstance(value, type)
            and issubclass(value, Exception)
            and value.__module__.split(".")[0] == self.name
        }


def main() -> None:
    """Send a finished run, whole."""
    parser = Parser(description=__doc__)
    parser.add_argument("--track", required=True, choices=TRACKERS)
    parser.add_argument("folder", type=Path, help="a run folder")
    args = parser.parse_args()
    with exit_on(ValueError, OSError):
        need(args.track)
        config = parse_object(read_text(args.folder / "config.json"), args.folder / "config.json")
        rows = read_jsonl(args.folder / "metrics.jsonl")
        if not rows:
            raise ValueError(f"{args.folder / 'metrics.jsonl'}: no row there")
        for number, row in enumerate(rows, 1):
            if type(row.get("step")) is not int:
                raise ValueError(
                    f"{args.folder / 'metrics.jsonl'}, line {number}: step is no whole number; give the "
                    "folder of a run of train_grpo.py or train_sft.py"
                )
    tracker = Tracker(args.track, args.folder, config, rows)
    tracker.finish()
    if not tracker.end:  # it was dropped
        raise SystemExit(1)
    print0(f"{len(rows)} rows of {args.folder} -> {args.track}")
