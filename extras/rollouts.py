"""See groups of completions learn: rollouts.jsonl of a training run as one HTML page.

    python -m extras.rollouts runs/demo          # writes runs/demo/rollouts.html

The page needs no network: pictures, styles and script are inside it. A line of rollouts.jsonl is
one group of one step, see train_grpo.log_groups. It is what metrics.prediction returns (boxes and
points in the image frame), and each completion also has its reward, advantage, terms and length,
and whether it finished. Groups of the split "test" are of the same held-out questions at each step,
drawn with the same random numbers, so that only the weights differ. Those of "train" are the
step's own.
"""

import argparse
import base64
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from data import clip_to, load_splits
from metrics import iou
from rewards import MODES, parse_coefficients, reward_formula
from runtime.cli import ROOT, Parser, exit_on, show_every_character
from runtime.files import parse_object, read_jsonl, read_text, write_whole
from runtime.stats import spread

PAGE = Path(__file__).with_suffix(".html")
SIDE = {"test": 640, "train": 400}  # pixels of the longer side of a picture
MOST_STEPS = 60


@dataclass(frozen=True)
class Training:
    """What the page needs of a run's flags."""

    formula: str  # of the reward
    coefficients: dict[str, float]  # of the terms that count
    norm: str  # of the advantages
    data: str
    skip_bad_rows: bool


def page(folder: Path, most_steps: int = MOST_STEPS) -> str:
    """Returns rollouts.html of a run folder. ValueError, one line, where there is nothing to show.

    most_steps: of a longer run, so many steps are shown, evenly spread."""
    file = folder / "rollouts.jsonl"
    rows = read_jsonl(file)
    if not rows:
        raise ValueError(
            f"{folder}: no rollouts.jsonl with a line in it; train_grpo.py writes it at each "
            "evaluation"
        )
    training = read_training(folder / "config.json")
    groups = []
    for number, row in enumerate(rows, 1):
        with written_by_training(f"{file}, line {number}"):
            groups.append(group_of(row, training.coefficients))
    steps = spread_steps([group["step"] for group in groups], most_steps)
    groups = [group for group in groups if group["step"] in steps]
    content = {
        "run": folder.name,
        "formula": training.formula,
        "norm": training.norm,
        "steps": steps,
        "coefficients": training.coefficients,
        "pictures": pictures(groups, training),
        "groups": groups,
    }
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    # Inside <script>, "<" could end the script. As "\u003c" it is the same JSON, whatever a
    # completion says.
    return read_text(PAGE).replace("{{DATA}}", text.replace("<", "\\u003c"))


def read_training(file: Path) -> Training:
    """Returns what a run's config.json says. ValueError where another program wrote it."""
    flags = parse_object(read_text(file), file)
    with written_by_training(file):
        given = parse_coefficients(flags["coefficients"])
        formula, _ = reward_formula(flags["mode"], given)
        coefficients = dict.fromkeys(MODES[flags["mode"]], 1.0) | given
        return Training(
            formula=formula,
            coefficients={name: value for name, value in coefficients.items() if value != 0},
            norm=flags["norm"],
            data=flags["data"],
            skip_bad_rows=flags["skip_bad_rows"],
        )


@contextmanager
def written_by_training(where: str | Path) -> Iterator[None]:
    """Inside, a key that is missing or not what it should be is a ValueError of one line: another
    program wrote the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{where}: not as train_grpo.py writes it ({problem}); give the folder of one of its "
            "runs"
        ) from None


def spread_steps(steps: Sequence[int], most: int) -> list[int]:
    """Returns at most `most` of the different steps, in order: the first, the last, and steps
    between."""
    different = sorted(set(steps))
    count = min(most, len(different))
    picks = np.linspace(0, len(different) - 1, count).round().astype(int)
    return [different[i] for i in picks]


# ---------------------------------------------------------------- one group


def group_of(row: dict[str, Any], coefficients: dict[str, float]) -> dict[str, Any]:
    """Returns what the page shows of a line of rollouts.jsonl, numbers rounded."""
    group = {key: row[key] for key in ("split", "index", "size", "query", "category", "truth")}
    group["step"] = int(row["step"])
    group["id"] = str(row["id"])
    group["summary"] = summary_of(row)
    completions = row["completions"]
    group["completions"] = [completion_of(row, c, coefficients) for c in completions]
    return rounded(group)


def summary_of(row: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers above a group."""
    completions = row["completions"]
    rewards = torch.tensor([completion["reward"] for completion in completions])
    ious = [iou(row, completion) for completion in completions]
    parsed = [not completion["problem"] for completion in completions]
    return {
        "mean": rewards.mean().item(),
        "best": max(ious),
        "parsed": sum(parsed) / len(parsed),
        **spread(rewards, [completion["text"] for completion in completions]),
    }


def completion_of(
    row: dict[str, Any], completion: dict[str, Any], coefficients: dict[str, float]
) -> dict[str, Any]:
    """Returns what the page shows of a completion. Coordinates are clipped."""
    keys = ("text", "problem", "reward", "advantage", "length", "finished")
    shown = {key: completion[key] for key in keys}
    for key in ("bbox", "points"):
        xy = completion[key]
        shown[key] = None if xy is None else clip_to(row["size"], xy)
    shown["iou"] = iou(row, completion)
    shown["terms"] = {name: completion["terms"][name] for name in coefficients}
    return shown


def rounded(value: Any) -> Any:
    """Returns floats anywhere in JSON with four decimals; None for what JSON does not have."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


# ---------------------------------------------------------------- pictures


def pictures(groups: Sequence[dict], training: Training) -> dict[str, str]:
    """Returns {"split/id": JPEG as a data URI} of every group's image. Where the data cannot be
    read there are none, and a line says so.

    Held-out questions are those of data.load_splits, whatever their split is called."""
    try:
        train, held_out = load_splits(data_path(training.data), training.skip_bad_rows)
        found = {}
        for split, examples in (("test", held_out), ("train", train)):
            wanted = {group["id"] for group in groups if group["split"] == split}
            for i, name in enumerate(examples.ids()):
                if name in wanted:
                    found[f"{split}/{name}"] = data_uri(examples[i].image, SIDE[split])
    except (OSError, ValueError) as error:
        print(f"the groups have no pictures: {error}")
        return {}
    return found


def data_path(path: str) -> Path:
    """Returns --data of a run. A path inside this checkout is kept relative to it."""
    if not Path(path).exists() and (ROOT / path).exists():
        return ROOT / path
    return Path(path)


def data_uri(image: Image.Image, side: int) -> str:
    """Returns a picture as a JPEG inside a URI. side: pixels of its longer side, at most."""
    small = image.copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    show_every_character()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a run of train_grpo.py")
    parser.add_argument(
        "--most-steps",
        type=int,
        default=MOST_STEPS,
        help=f"of a longer run, as many steps, evenly spread ({MOST_STEPS})",
    )
    args = parser.parse_args(argv)
    if args.most_steps < 1:
        parser.error(f"--most-steps {args.most_steps}: must be at least 1")
    with exit_on(ValueError, OSError):
        out = args.folder / "rollouts.html"
        write_whole(out, page(args.folder, args.most_steps))
    print(f"{out}, {out.stat().st_size / 1e6:.1f} MB: open it in a browser")


if __name__ == "__main__":
    main()
