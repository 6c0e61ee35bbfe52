"""Pictures of runs and evaluations, drawn with matplotlib, which is imported only here."""
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure


def curves(path: Path, rows: list[dict], panels: dict[str, list[str]]) -> None:
    """curves.png from the rows of metrics.jsonl. panels: {title: keys}; each key thin, its running mean thick."""
    columns = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(4.2 * columns, 6), layout="constrained")
    for place, (title, keys) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(2, columns, place, title=title, xlabel="step")
        for key in keys:
            logged = [row for row in rows if row.get(key) is not None]
            steps, values = [row["step"] for row in logged], [row[key] for row in logged]
            width = max(1, len(values) // 10)
            means = [np.mean(values[max(0, i + 1 - width):i + 1]) for i in range(len(values))]
            line, = axis.plot(steps, values, linewidth=1, alpha=0.25)
            axis.plot(steps, means, "o-" if len(values) < 20 else "-", color=line.get_color(), label=key)
        if axis.lines:
            axis.legend(fontsize=8, frameon=False)
        axis.grid(alpha=0.25)
    figure.savefig(path, dpi=110)
