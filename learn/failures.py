"""Draws learn/pictures/ablations.png, which FAILURES.md shows, from paper/results.

python -m learn.failures
"""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from runtime.cli import ROOT

RESULTS = ROOT / "paper/results"
PICTURE = ROOT / "learn/pictures/ablations.png"
LAST = 5  # steps that a point of a curve is the mean of
PANELS = {  # title: the runs that are compared, and what each is called
    "no KL": {"soft": "as usual", "no-kl": "--kl-coef 0"},
    "no term for the box": {"soft": "as usual", "pdice": "--mode pdice"},
    "a start that breaks its format": {
        "careless-soft": "as usual",
        "careless-no-formats": "without the format terms",
    },
}


def curves(folder: Path, runs: list[str]) -> dict[str, np.ndarray]:
    """Returns the term box_iou of some runs over their steps: the mean of the last steps, and of
    the seeds that all of these runs have."""
    by_run = {}
    for run in runs:
        by_run[run] = {}
        for file in sorted(folder.glob(f"{run}-[0-9].json")):
            result = json.loads(file.read_text(encoding="utf-8"))
            by_run[run][result["seed"]] = result["curves"]["box_iou"]
    common = set.intersection(*(set(seeds) for seeds in by_run.values()))
    found = {}
    for run, seeds in by_run.items():
        values = np.mean([seeds[seed] for seed in sorted(common)], axis=0)
        ends = range(1, len(values) + 1)
        found[run] = np.array([values[max(0, end - LAST) : end].mean() for end in ends])
    return found


def draw(folder: Path, picture: Path) -> None:
    figure = Figure(figsize=(10, 3), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for axis, (title, names) in zip(axes, PANELS.items()):
        for run, values in curves(folder, list(names)).items():
            axis.plot(range(1, len(values) + 1), values, label=names[run])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("reward term box_iou")
    figure.savefig(picture, dpi=90)


if __name__ == "__main__":
    draw(RESULTS, PICTURE)
    print(f"{PICTURE.relative_to(ROOT)} is drawn")
