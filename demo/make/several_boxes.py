"""One box and two points against a box for each piece, on demo/histology: the same warm start, GRPO
and evaluation.

    python -m demo.make.several_boxes                    # seed 0; --seeds 0 1 2: three; goes on
                                                         where it stopped
    python -m demo.make.several_boxes --table            # only the table of what is there

The embedded CRM never saw these pictures. So it first learns from 2,000 other questions of the same
generator, 140 steps of 16, once with --prompt reasoning and once with --prompt multi; then 25 steps
of GRPO on the 120 training questions, 8 x 8 completions a step. The table has greedy completions on
the 90 test questions: soft F1 of boxes over the pieces (extras/boxes.py), where one box is a set of
one; Dice of the boxes merely filled, without a network; Dice of the mask from boxes and points
(demo/asm). Differences are paired over questions, intervals are 95 % bootstrap."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from data import load_samples
from extras.boxes import regions
from extras.intervals import paired_bootstrap
from extras.oracle import filled
from extras.predictions import read_predictions, shown
from extras.several import region_f1
from metrics import mask_dice

DATA = "demo/histology"
POOL = "build/histology"
LENGTH = "--max-new-tokens 320"
RESUME = "--resume auto"  # an interrupted run continues
WARM = (
    f"train_sft.py --crm demo/crm --data {POOL} --test-data {DATA} --steps 140 --batch 16 --micro-batch 16 "
    f"--lr 6e-4 --eval-every -1 {RESUME} {LENGTH}"
)
GRPO = (
    f"train_grpo.py @recipes/demo.args --data {DATA} --steps 25 --prompts 8 --group 8 --lr 5e-5 --warmup 3 "
    f"--eval-every -1 --rollouts-every 1000 {RESUME} {LENGTH}"
)
LAST = {WARM: "step_000140", GRPO: "step_000025"}
KINDS = ("reasoning", "multi")
SCORES = {"soft F1": "f1", "Dice, boxes filled": "filled", "Dice of the mask": "dice"}


def run(command: str, out: Path, *more) -> Path:
    """A script, unless what it writes last is there already; its folder."""
    done = "predictions.jsonl" if "evaluate" in command else LAST[command]
    if not (out / done).exists():
        subprocess.run(
            [sys.executable, *command.split(), "--out", str(out), *map(str, more)], check=True
        )
    return out


def evaluated(checkpoint: Path, out: Path) -> Path:
    return run(f"evaluate.py --data {DATA} {LENGTH}", out, "--crm", checkpoint)


def scores(folder: Path, samples) -> list[dict]:
    """f1, filled and dice of every question's completion; one box counts as a set of one."""
    rows = []
    for p, sample in zip(read_predictions(folder), samples, strict=True):
        completion = shown(p)
        parts = completion.get("regions", [completion] if completion["bbox"] else [])
        p["truth"]["regions"] = [box for box, _ in regions(sample)]
        boxes = [part["bbox"] for part in parts if part["bbox"]]
        rows.append(
            {
                "category": sample.category,
                "f1": region_f1(p, {"regions": parts}),
                "dice": p["dice"]["both"],
                "filled": mask_dice(filled(sample.mask.shape, boxes), sample.mask),
            }
        )
    return rows


def compare(before: list[dict], after: list[dict]) -> str:
    """Cells of a table row: each score's two means and their paired difference."""
    cells = []
    for key in SCORES.values():
        pair = [[row[key] for row in rows] for rows in (before, after)]
        means = " | ".join(f"{np.mean(values):.3f}" for values in pair)
        cells.append("{} | {:+.3f} [{:+.3f}, {:+.3f}]".format(means, *paired_bootstrap(*pair)))
    return " | ".join(cells) + " |"


def table(out: Path, seeds: list[int]) -> str:
    samples = load_samples(DATA, "test")
    found = {
        (kind, at): scores(out / f"eval-{kind}-{at}", samples)
        for kind in KINDS
        for at in ("warm", *seeds)
        if (out / f"eval-{kind}-{at}").exists()
    }
    whose = {"warm": "warm start", **{seed: f"GRPO, seed {seed}" for seed in seeds}}

    def head(names):
        return [
            "| | | "
            + " | ".join(f"{score}: {' | '.join(names)} | difference" for score in SCORES)
            + " |",
            "|---" * (2 + 3 * len(SCORES)) + "|",
        ]

    lines = head(("one box", "a box each"))
    for at, name in whose.items():
        one, each = (found.get((kind, at)) for kind in KINDS)
        for category in (
            ["all", *sorted({sample.category for sample in samples})] if one and each else []
        ):
            chosen = (
                [row for row in rows if category in ("all", row["category"])]
                for rows in (one, each)
            )
            lines.append(f"| {name} | {category} | " + compare(*chosen))
    lines += ["", *head(("before", "after"))]
    lines += [
        f"| {whose[at]} | {kind} | " + compare(found[kind, "warm"], rows)
        for (kind, at), rows in found.items()
        if at != "warm"
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/several_boxes"))
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    args = parser.parse_args()
    if not args.table:
        if not (Path(POOL) / "samples.jsonl").exists():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "demo.make.histology",
                    "--train",
                    "2000",
                    "--test",
                    "0",
                    "--seed",
                    "1",
                    "--out",
                    POOL,
                ],
                check=True,
            )
        for kind in KINDS:
            warm = run(WARM, args.out / f"warm-{kind}", "--prompt", kind) / LAST[WARM]
            evaluated(warm, args.out / f"eval-{kind}-warm")
            for seed in args.seeds:
                trained = (
                    run(GRPO, args.out / f"grpo-{kind}-{seed}", "--crm", warm, "--seed", seed)
                    / LAST[GRPO]
                )
                evaluated(trained, args.out / f"eval-{kind}-{seed}")
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()
