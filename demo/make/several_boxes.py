"""One box and two points against a box for each piece, on demo/histology.

    python -m demo.make.several_boxes              # seed 0; --seeds 0 1 2: three; resumes
    python -m demo.make.several_boxes --table      # only the table of what is there

Both ways have the same warm start, GRPO and evaluation. The embedded CRM never saw these pictures.
So it first learns from 2,000 other questions of the same generator, 140 steps of 16, once with
--prompt reasoning and once with --prompt boxes. Then come 25 steps of GRPO on the 120 training
questions, 8 x 8 completions a step.

The table has greedy completions on the 90 test questions: soft F1 of boxes over the pieces
(extras/boxes.py), where one box is a set of one; Dice of the boxes merely filled, without a
network; Dice of the mask from boxes and points (demo/asm). Differences are paired over questions,
and intervals are 95 % bootstrap.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from data import Examples, load_samples
from extras.boxes import region_f1, regions
from metrics import mask_dice, paired_interval, read_predictions, regions_of, shown
from rewards import Box

DATA = "demo/histology"
POOL = "build/histology"
WARM_STEPS = 140
GRPO_STEPS = 25
TOKENS = "--max-new-tokens 320"
WARM = (
    f"train_sft.py --crm demo/crm --data {POOL} --steps {WARM_STEPS} --batch 16 --micro-batch 16 "
    f"--lr 6e-4 --eval-every -1 --resume auto {TOKENS}"
)
GRPO = (
    f"train_grpo.py @recipes/demo.args --data {DATA} --steps {GRPO_STEPS} --prompts 8 --group 8 "
    f"--lr 5e-5 --warmup 3 --eval-every -1 --resume auto {TOKENS}"
)
EVALUATE = f"evaluate.py --data {DATA} {TOKENS}"
PROMPTS = ("reasoning", "boxes")
SCORES = {"soft F1": "f1", "Dice, boxes filled": "filled", "Dice of the mask": "dice"}
Rows = list[dict]  # one for each question: its category, and the values of SCORES


# ---------------------------------------------------------------- runs


def run(command: str, out: Path, *more: str) -> None:
    subprocess.run([sys.executable, *command.split(), "--out", str(out), *more], check=True)


def trained(command: str, steps: int, out: Path, *more: str) -> str:
    """Trains, unless that was done before. Returns the last checkpoint."""
    checkpoint = out / f"step_{steps:06d}"
    if not checkpoint.exists():
        run(command, out, *more)
    return str(checkpoint)


def evaluate(checkpoint: str, out: Path) -> None:
    if not (out / "predictions.jsonl").exists():
        run(EVALUATE, out, "--crm", checkpoint)


def run_all(out: Path, seeds: list[int]) -> None:
    """Makes everything that the table needs and that is not there yet."""
    if not Path(POOL).exists():
        command = [sys.executable, "-m", "demo.make.histology", "--train", "2000", "--test", "0"]
        subprocess.run([*command, "--seed", "1", "--out", POOL], check=True)
    for prompt in PROMPTS:
        warm = trained(WARM, WARM_STEPS, out / f"warm-{prompt}", "--prompt", prompt)
        evaluate(warm, out / f"eval-{prompt}-warm")
        for seed in seeds:
            flags = ("--crm", warm, "--seed", str(seed))
            checkpoint = trained(GRPO, GRPO_STEPS, out / f"grpo-{prompt}-{seed}", *flags)
            evaluate(checkpoint, out / f"eval-{prompt}-{seed}")


# ---------------------------------------------------------------- the table


def scores(folder: Path, examples: Examples) -> Rows:
    """Returns the scores of every question's completion in an evaluation's folder."""
    rows = []
    for i, p in enumerate(read_predictions(folder)):
        example = examples[i]
        found = regions_of(shown(p))
        parts = [{"bbox": box} for box, _ in found if box is not None]
        p["truth"]["regions"] = [box for box, _ in regions(example)]
        boxes = [part["bbox"] for part in parts]
        row = {
            "category": example.category,
            "f1": region_f1(p, {"regions": parts}) if parts else 0.0,
            "dice": p["dice"]["both"],
            "filled": mask_dice(filled(example.mask.shape, boxes), example.mask),
        }
        rows.append(row)
    return rows


def filled(shape: tuple[int, int], boxes: list[Box]) -> np.ndarray:
    """Returns (H, W) bool: the pixels whose centre is in one of the boxes."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, bool)
    for x1, y1, x2, y2 in boxes:
        mask |= (x1 <= x + 0.5) & (x + 0.5 < x2) & (y1 <= y + 0.5) & (y + 0.5 < y2)
    return mask


def compared(before: Rows, after: Rows) -> str:
    """Returns cells of a table row: each score's two means and their paired difference."""
    cells = []
    for key in SCORES.values():
        old = [row[key] for row in before]
        new = [row[key] for row in after]
        found = paired_interval(old, new)
        cells.append(
            f"{np.mean(old):.3f} | {np.mean(new):.3f} | "
            f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        )
    return " | ".join(cells) + " |"


def head(one: str, two: str) -> list[str]:
    """Returns the first two lines of a table that compares two columns in every score."""
    titles = " | ".join(f"{score}: {one} | {two} | difference" for score in SCORES)
    return [f"| | | {titles} |", "|---" * (2 + 3 * len(SCORES)) + "|"]


def table(out: Path, seeds: list[int]) -> str:
    """Returns what is there as Markdown: one box against several, then before and after GRPO."""
    examples = load_samples(DATA, "test")
    titles = {"warm": "warm start"} | {str(seed): f"GRPO, seed {seed}" for seed in seeds}
    found: dict[tuple[str, str], Rows] = {}
    for prompt in PROMPTS:
        for at in titles:
            folder = out / f"eval-{prompt}-{at}"
            if folder.exists():
                found[prompt, at] = scores(folder, examples)
    lines = head("one box", "a box each")
    for at, title in titles.items():
        if ("reasoning", at) in found and ("boxes", at) in found:
            lines += by_category(title, found["reasoning", at], found["boxes", at])
    lines += ["", *head("before", "after")]
    for (prompt, at), rows in found.items():
        if at != "warm":
            lines.append(f"| {titles[at]} | {prompt} | " + compared(found[prompt, "warm"], rows))
    return "\n".join(lines)


def by_category(title: str, one: Rows, each: Rows) -> list[str]:
    """Returns one line over all questions and one for each category."""
    lines = [f"| {title} | all | " + compared(one, each)]
    for category in sorted({row["category"] for row in one}):
        own = [row for row in one if row["category"] == category]
        own_each = [row for row in each if row["category"] == category]
        lines.append(f"| {title} | {category} | " + compared(own, own_each))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/several_boxes"))
    parser.add_argument("--table", action="store_true", help="only the table of what is there")
    args = parser.parse_args()
    if not args.table:
        run_all(args.out, args.seeds)
    print(table(args.out, args.seeds))


if __name__ == "__main__":
    main()
