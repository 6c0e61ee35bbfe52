"""How well a confidence says which answers are good: curves, their area, calibration, refusals.

Everything here works on plain arrays, one number per question:

    confidence  (n,) higher is surer; below 0: nothing was pointed to, so there is no answer to keep
    iou         (n,) of the answer that is kept; 0 without one
    absent      (n,) bool: what is asked for is not in the image, so any answer is a false alarm

Whoever answers only the surest questions has a coverage, the share that is answered, and a risk,
the mean of 1 - IoU over the answered ones. The area under that curve is the AURC. It is the mean
risk where the confidence says nothing, and smallest where it sorts by IoU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit  # quantiles of Student's t

from metrics import FEW, Interval

BINS = 10  # of the reliability diagram, equally wide
DRAWS = 1000  # of the bootstrap


# ---------------------------------------------------------------- risk and coverage


def surest_first(confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order of falling confidence (n,), and which tie each place of it belongs to
    (n,), counted from 0."""
    order = np.argsort(-confidence, kind="stable")
    ordered = confidence[order]
    is_new = np.append(False, ordered[1:] != ordered[:-1])
    return order, is_new.cumsum()


def risk_curve(confidence: np.ndarray, iou: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns coverage (n,) and risk (n,) when the k surest questions are answered, k = 1 … n.

    Within a tie no question comes before another: each counts with the mean of the tie."""
    order, tie = surest_first(confidence)
    loss = 1 - iou[order]
    of_tie = np.bincount(tie, loss) / np.bincount(tie)
    k = np.arange(1, len(loss) + 1)
    return k / len(loss), of_tie[tie].cumsum() / k


def aurc(confidence: np.ndarray, iou: np.ndarray) -> float:
    """Returns the area under the risk-coverage curve, the mean risk over k = 1 … n."""
    return float(risk_curve(confidence, iou)[1].mean())


def coverage_at(confidence: np.ndarray, iou: np.ndarray, least: float = 0.5) -> float:
    """Returns the largest coverage at which the answered questions have a mean IoU of at least
    `least`; 0 where there is none.

    A threshold cannot cut through a tie, and a question without an answer is never answered."""
    coverage, risk = risk_curve(confidence, iou)
    order, tie = surest_first(confidence)
    ends_tie = np.append(tie[1:] != tie[:-1], True)
    allowed = ends_tie & (confidence[order] >= 0) & (1 - risk >= least - 1e-9)
    return float(coverage[allowed].max(initial=0.0))


# ---------------------------------------------------------------- calibration


def reliability(probability: np.ndarray, hit: np.ndarray) -> list[tuple[float, float, int]]:
    """Returns (mean probability, share of hits, count) of each bin that is not empty.

    probability (n,) in [0, 1]; hit (n,) bool."""
    bin_of = np.minimum((probability * BINS).astype(int), BINS - 1)
    found = []
    for number in np.unique(bin_of):
        inside = bin_of == number
        means = float(probability[inside].mean()), float(hit[inside].mean())
        found.append((*means, int(inside.sum())))
    return found


def calibration_error(probability: np.ndarray, hit: np.ndarray) -> float:
    """Returns the expected calibration error: |mean probability - share of hits|, averaged over
    the bins by their counts. Questions without an answer are left out; nan where none is left."""
    answered = probability >= 0
    if not answered.any():
        return float("nan")
    bins = reliability(probability[answered], hit[answered])
    total = sum(count for _, _, count in bins)
    return sum(count * abs(said - was) for said, was, count in bins) / total


# ---------------------------------------------------------------- refusals


def threshold_at(confidence: np.ndarray, coverage: float) -> float:
    """Returns the threshold from which at least this share of the questions is answered; nan where
    more of them have no answer."""
    k = int(np.ceil(coverage * len(confidence) - 1e-9))
    if k < 1:
        return float("inf")
    threshold = np.sort(confidence)[::-1][k - 1]
    return float(threshold) if threshold >= 0 else float("nan")


def false_alarms(confidence: np.ndarray, absent: np.ndarray, coverage: float) -> float:
    """Returns the share of questions without an answer in the image that are answered all the same,
    at the threshold that answers this share of the others. nan where there is no such threshold.

    So confidences, and models, are compared at equal coverage."""
    threshold = threshold_at(confidence[~absent], coverage)
    if np.isnan(threshold):
        return float("nan")
    return share_answered(confidence[absent], threshold)


def share_answered(confidence: np.ndarray, threshold: float) -> float:
    """Returns the share of questions whose confidence reaches a threshold; nan without a question.
    A question without an answer never does."""
    if len(confidence) == 0:
        return float("nan")
    return float((confidence >= max(threshold, 0.0)).mean())


# ---------------------------------------------------------------- intervals


def bootstrap(
    statistic: Callable[..., float],
    columns: Sequence[np.ndarray],
    images: Sequence[Any],
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval | None:
    """Returns statistic(*columns) of all questions with its 95 % bootstrap interval.

    Images are drawn, each with all of its questions, and deviations are widened by Student's t, as
    metrics.interval does for means. columns: (n,) each; images: of what image each question is.
    The interval is kept inside [0, 1], where every statistic here lies. None where it is nan."""
    value = statistic(*columns)
    if np.isnan(value):
        return None
    of_image: dict[Any, list[int]] = {}
    for i, image in enumerate(images):
        of_image.setdefault(image, []).append(i)
    groups = [np.array(indexes) for indexes in of_image.values()]
    count = len(groups)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(draws):
        drawn = np.concatenate([groups[g] for g in rng.integers(0, count, count)])
        values.append(statistic(*(column[drawn] for column in columns)))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    wider = 1.0
    if count > 1:
        wider = stdtrit(count - 1, 0.975) / 1.96 * np.sqrt(count / (count - 1))
    return Interval(
        mean=value,
        low=float(max(0.0, value + wider * (low - value))),
        high=float(min(1.0, value + wider * (high - value))),
        n=len(images),
        images=count,
    )


def shown(found: Interval | None) -> str:
    """Returns "0.375 [0.300, 0.450]"; "–" where there is none, no interval of few images."""
    if found is None:
        return "–"
    if found.images < FEW:
        return f"{found.mean:.3f} [–]"
    return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
