"""Bootstrap intervals: of a mean over questions, and of a difference between two runs on the same questions."""

from collections import namedtuple

import numpy as np

Interval = namedtuple("Interval", "mean low high")
FEW = 5  # of fewer questions an interval says nothing: a dash is shown


def interval(values, draws: int = 2000, seed: int = 0) -> Interval | None:
    """Mean and 95 % percentile bootstrap interval of the values that are not None; None if there are none."""
    values = np.array([value for value in values if value is not None], dtype=float)
    if not len(values):
        return None
    picks = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(before, after, draws: int = 2000, seed: int = 0) -> Interval | None:
    """`interval` of after - before over the same questions; one with None on either side is left out."""
    return interval([b - a for a, b in zip(before, after) if None not in (a, b)], draws, seed)


def percent(found: dict | None, sign: str = "") -> str:
    """ "37.5 [30.0, 45.0]" of an Interval as a dict, with its n; "–" where there is none."""
    if not found:
        return "–"
    mean, *ends = (f"{100 * found[key]:{sign}.1f}" for key in ("mean", "low", "high"))
    return f"{mean} [{', '.join(ends) if found['n'] >= FEW else '–'}]"
