"""Two evaluations of the same questions, compared: paired differences with their 95 % bootstrap intervals."""

from itertools import product

import numpy as np

from extras.intervals import FEW, paired_bootstrap
from extras.predictions import read_predictions
from metrics import QUESTION_METRICS


def compare(one: str, two: str, metrics: dict) -> None:
    """Print the paired differences of two evaluations of the same questions. metrics: evaluate.METRICS."""
    before, after = ({p["id"]: p for p in read_predictions(folder)} for folder in (one, two))
    if before.keys() != after.keys():
        only = sorted(before.keys() ^ after.keys())
        raise ValueError(
            f"--compare {one} {two}: {len(only)} questions are in only one, first {only[0]}"
        )
    print(f"{one} -> {two}, {len(before)} questions, percent [95 % paired bootstrap interval]")
    for title, metric in metrics.values():
        old, new = ([metric(side[name]) for name in before] for side in (before, after))
        if text := change_text(old, new, in_percent=True):
            print(f"  {title:21} {text}")


def report(held_out: list[dict], metrics: list[dict]) -> None:
    """Print what a training run changed on the held-out split, from its first evaluation to its last, and its times."""
    steps, metrics = (
        sorted({row["step"] for row in held_out}),
        [row for row in metrics if "seconds" in row],
    )
    before, after = (
        {(row["kind"], row["index"]): row for row in held_out if row["step"] == step}
        for step in (steps[0], steps[-1])
    )
    both = [key for key in before if key in after]  # --eval-limit may have changed on --resume
    print(
        f"\nheld-out split, step {steps[0]} -> {steps[-1]}, mean over questions [95 % paired bootstrap interval]"
    )
    print("\n".join(summary_lines([before[key] for key in both], [after[key] for key in both])))
    seconds = [row["seconds"] for row in metrics]
    print(
        f"{np.median(seconds):.2f} s per step (median), {sum(seconds) / 60:.1f} min for all {len(seconds)}, "
        f"peak memory {max(row['peak_memory_gb'] for row in metrics):.2f} GB",
        flush=True,
    )


def summary_lines(before: list[dict], after: list[dict]) -> list[str]:
    """Two held_out results for the same questions: one line per kind and score over all questions; IoU and named
    right also over the wordings seen in training and over the unseen ones."""
    lines = []
    for kind, wording in product(
        dict.fromkeys(row["kind"] for row in before), (None, "seen", "unseen")
    ):
        pairs = [
            (old, new)
            for old, new in zip(before, after)
            if old["kind"] == kind and wording in (None, old["wording"])
        ]
        for key in ("iou", "named") if wording else (*QUESTION_METRICS, "reward"):
            if text := change_text([old[key] for old, _ in pairs], [new[key] for _, new in pairs]):
                lines.append(f"  {f'{kind}, {wording}' if wording else kind:15} {key:10} {text}")
    return lines


def change_text(before: list, after: list, in_percent: bool = False) -> str:
    """ "0.250 -> 0.300   +0.050 [+0.010, +0.090]" over the questions where both are defined; "" if none."""
    pairs = [pair for pair in zip(before, after) if None not in pair]
    if not pairs:
        return ""
    numbers = np.array([*np.mean(pairs, axis=0), *paired_bootstrap(*zip(*pairs))])
    form, ends = "{:.3f} -> {:.3f}   {:+.3f}", " [{:+.3f}, {:+.3f}]"
    if in_percent:
        form, ends, numbers = "{:5.1f} -> {:5.1f}   {:+.1f}", " [{:+.1f}, {:+.1f}]", 100 * numbers
    form += ends if len(pairs) >= FEW else " [–]"
    some = "" if len(pairs) == len(before) else f"   {len(pairs)} of {len(before)} questions"
    return form.format(*numbers) + some
