"""Metrics of questions that mean several: where the same words mean several things in one image (add_siblings),
and where a box was asked for each region (extras/boxes.py). p: a prediction of metrics.py.
"""

from collections import defaultdict

from extras.boxes import soft_f1
from metrics import iou, mean
from rewards import box_iou


def add_siblings(predictions: list[dict]) -> list[dict]:
    """truth.siblings of each prediction, in place: the true boxes that questions about the same image and category
    have and it has not. What is not among these predictions is not known; a question without a category has none."""
    boxes = defaultdict(set)
    for p in predictions:
        boxes[p.get("image"), p["category"]].add(tuple(p["truth"]["bbox"]))
    for p in predictions:
        known = boxes[p["image"], p["category"]] if p.get("image") and p["category"] else set()
        p["truth"]["siblings"] = sorted(known - {tuple(p["truth"]["bbox"])})
    return predictions


def iou_any(p: dict, completion: dict) -> float:
    """IoU with the best of the true box and its siblings. Beyond `iou`: the right kind of thing, but the wrong one."""
    boxes = p["truth"]["bbox"], *p["truth"]["siblings"]
    return max(box_iou(completion["bbox"], box) for box in boxes) if completion["bbox"] else 0.0


def among_siblings(score):
    """A metric of the questions that have siblings (see add_siblings): score(p, n), n the siblings and itself."""

    def metric(p: dict) -> float | None:
        siblings = p["truth"].get("siblings")
        return score(p, 1 + len(siblings)) if siblings and "bbox" in p["asked"] else None

    return metric


def region_f1(p: dict, completion: dict, least: float | None = None) -> float | None:
    """Soft F1 of the boxes' IoUs over the best assignment, or F1 of those with at least that IoU; None where one box
    was asked for."""
    if "regions" not in p["truth"]:
        return None
    ious = [
        [box_iou(part["bbox"], truth) if part["bbox"] else 0.0 for truth in p["truth"]["regions"]]
        for part in completion["regions"]
    ]
    return soft_f1(
        ious if least is None else [[float(v >= least) for v in row] for row in ious],
        len(p["truth"]["regions"]),
    )


def count_error(p: dict, completion: dict) -> float | None:
    """|n - m| / m of n boxes for m regions; None where one box was asked for."""
    if "regions" not in p["truth"]:
        return None
    return abs(len(completion["regions"]) / len(p["truth"]["regions"]) - 1)


METRICS = {  # name: function of a prediction -> float, or None where undefined; their titles: metrics.py
    # where several in the image are meant by the same words; by luck: one of the n picked blindly, as well drawn
    "iou_several": among_siblings(lambda p, n: mean(p, iou)),
    "iou_any": among_siblings(lambda p, n: mean(p, iou_any)),
    "iou_luck": among_siblings(lambda p, n: mean(p, iou_any) / n),
    # where a box was asked for each region
    "soft_f1": lambda p: mean(p, region_f1),
    "f1_50": lambda p: mean(p, lambda p, c: region_f1(p, c, 0.5)),
    "count_error": lambda p: mean(p, count_error),
}
