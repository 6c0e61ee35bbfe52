"""SFT's learning rate for paper/experiments.py, looked for on training questions alone.

    python -m paper.sft_rate --steps 40        # and --steps N for a longer run: the best rate may
                                               differ

Every sixth training question is held out; SFT runs on the others with each rate, and evaluate.py
scores the held-out ones as the experiments do, four sampled completions per question."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from evaluate import scores
from extras.predictions import read_predictions

if __name__ == "__main__":
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
    data.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(args.data / "train.parquet")
    held_out = np.arange(len(table)) % 6 == 0
    pq.write_table(table.filter(~held_out), data / "train.parquet")
    pq.write_table(table.filter(held_out), data / "test.parquet")
    for rate in args.rates:
        run = args.work / f"rate-{args.steps}-{rate:g}"
        subprocess.run(
            [
                sys.executable,
                "train_sft.py",
                "--crm",
                args.crm,
                "--data",
                data,
                "--steps",
                str(args.steps),
                "--batch",
                str(args.batch),
                "--lr",
                str(rate),
                "--eval-every",
                "-1",
                "--out",
                run,
                "--resume",
                "auto",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        subprocess.run(
            [
                sys.executable,
                "evaluate.py",
                "--crm",
                run / f"step_{args.steps:06d}",
                "--data",
                data,
                "--samples",
                "4",
                "--limit",
                str(args.limit),
                "--out",
                f"{run}-eval",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        rows = [scores(row) for row in read_predictions(Path(f"{run}-eval"))]
        print(
            f"--lr {rate:g}: IoU {100 * np.mean([row['iou'] for row in rows]):.1f}, "
            f"named {100 * np.mean([row['named'] for row in rows]):.0f} %",
            flush=True,
        )
