"""Looks for SFT's learning rate for paper/experiments.py, on training questions alone.

    python -m paper.sft_rate --steps 40     # and --steps N for a longer run, whose best may differ

Every sixth training question is held out. SFT runs on the others with each rate, and evaluate.py
scores the held-out ones as the experiments do, four sampled completions per question.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from metrics import read_predictions, scores
from paper.subset import read_split, write_split
from runtime.cli import exit_on


def hold_out(data: Path, out: Path) -> None:
    """Writes every sixth training row as the test split of a new data set, and the others as its
    training split."""
    table = read_split(data, "train")
    is_held_out = np.arange(len(table)) % 6 == 0
    write_split(table.filter(~is_held_out), out, "train")
    write_split(table.filter(is_held_out), out, "test")


def run(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def try_rate(rate: float, data: Path, args: argparse.Namespace) -> str:
    """Trains with a learning rate and evaluates. Returns one line about it."""
    folder = args.work / f"rate-{args.steps}-{rate:g}"
    run(
        *("train_sft.py", "--crm", args.crm, "--data", str(data), "--steps", str(args.steps)),
        *("--batch", str(args.batch), "--lr", str(rate), "--eval-every", "-1"),
        *("--out", str(folder), "--resume", "auto"),
    )
    checkpoint = folder / f"step_{args.steps:06d}"
    run(
        *("evaluate.py", "--crm", str(checkpoint), "--data", str(data), "--completions", "4"),
        *("--limit", str(args.limit), "--out", f"{folder}-eval"),
    )
    rows = [scores(p) for p in read_predictions(f"{folder}-eval")]
    iou = 100 * np.mean([row["iou"] for row in rows])
    named = 100 * np.mean([row["named"] for row in rows])
    return f"--lr {rate:g}: IoU {iou:.1f}, named {named:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper.sft_rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--crm", default="demo/crm")
    parser.add_argument(
        "--data", type=Path, default=Path("demo/data"), help="folder with train.parquet"
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-5, 1e-4, 4e-4, 1e-3])
    parser.add_argument("--limit", type=int, default=120, help="held-out questions")
    parser.add_argument("--work", type=Path, default=Path("runs/paper"))
    args = parser.parse_args()
    data = args.work / "rate-data"
    with exit_on(ValueError, OSError):
        hold_out(args.data, data)
    for rate in args.rates:
        print(try_rate(rate, data, args), flush=True)


if __name__ == "__main__":
    main()
