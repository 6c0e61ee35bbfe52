"""The numbers of a training step: what is logged, the warnings, the check before the first update."""

import math

import numpy as np
import torch

from runtime.parallel import Ranks, peak_memory

PANELS = {
    "reward": ["reward"],
    "held-out box IoU": ["sampled/iou", "greedy/iou"],
    "held-out completions": ["sampled/parse_ok", "sampled/named"],
    "reward terms": ["think_format", "answer_format", "box_iou", "point_dice"],
    "completion length (tokens)": ["length"],
    "entropy": ["entropy"],
    "KL to the reference": ["kl"],
}
EXTREMES = {"ratio_max": torch.maximum, "ratio_min": torch.minimum, "logp_gap": torch.maximum}


def add_up(total: dict, new: dict) -> None:
    """Add a micro-batch's statistics to a step's, on the device they are on: the host does not wait."""
    for key, value in new.items():
        value = torch.as_tensor(value).detach().double()
        total[key] = EXTREMES.get(key, torch.add)(total[key], value) if key in total else value


def total_stats(stats: dict, ranks: Ranks) -> dict[str, float]:
    """A step's statistics over all ranks, as Python numbers."""
    total = {}
    for part in ranks.gather([{key: float(value) for key, value in stats.items()}]):
        add_up(total, part)
    return {key: float(value) for key, value in total.items()}


def spread(rewards: torch.Tensor, texts: list[str]) -> dict[str, float]:
    """How different the completions of one group are."""
    return {
        "reward_std": float(rewards.std()),
        "zero_std": float(rewards.min() == rewards.max()),
        "identical": 1 - (len(set(texts)) - 1) / (len(texts) - 1),
    }


def completion_rows(rollout, answers) -> list[dict]:
    """One row per completion of a Rollout: its text for samples.jsonl, its numbers for metrics.jsonl."""
    r, texts = rollout.rewards, rollout.texts
    shared = {"id": rollout.sample.id, "query": rollout.sample.query, **spread(r, texts)}
    return [
        {
            **shared,
            "text": text,
            "reward": float(reward),
            "length": int(length),
            "parse_ok": float(not answers.read(text).problem),
            "finished": float(finished),
            **terms,
        }
        for text, reward, terms, length, finished in zip(
            texts, r, rollout.terms, rollout.lengths, rollout.finished
        )
    ]


def step_row(completions, stats, grad_norms, lr, clock, device) -> dict[str, float]:
    """A line of metrics.jsonl: means over all completions, statistics of the loss (total_stats), seconds by phase.
    clock: the times before sampling, the reference, the update, and after it."""
    row = {
        key: sum(completion[key] for completion in completions) / len(completions)
        for key, value in completions[0].items()
        if not isinstance(value, str)
    }
    scored = max(stats.pop("scored", 1.0), 1e-9)  # the sum of all token weights, over all updates
    if "gap_sum" in stats:
        row["logp_gap_mean"] = (
            stats.pop("gap_sum") * len(grad_norms) / scored
        )  # of the first update only
    divisors = {"kl": scored, "entropy": scored, "clip_frac": scored, "loss": len(grad_norms)}
    row |= {key: value / divisors.get(key, 1) for key, value in stats.items()}
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    (sampling, reference, update), total = np.diff(clock).tolist(), clock[-1] - clock[0]
    return row | {
        "grad_norm": sum(finite) / max(1, len(finite)),
        "skipped": len(grad_norms) - len(finite),
        "lr": lr,
        "seconds": total,
        "seconds/sample": sampling,
        "seconds/reference": reference,
        "seconds/update": update,
        "peak_memory_gb": peak_memory(device),
        "tokens_per_second": sum(completion["length"] for completion in completions) / total,
    }


def warnings_of(row: dict, first: dict) -> list[str]:
    """What in a step's row points to a problem, and the flag that helps. first: what the run logged first of each key."""
    collapsed = row.get("entropy", 1) < 0.1 * first.get("entropy", 0)
    unread = row.get("sampled/parse_ok", 1) < first.get("sampled/parse_ok", 0) - 0.2
    problems = {
        "a gradient is not finite, its update was skipped: lower --lr": row.get("skipped", 0) > 0,
        "almost no completion can be parsed: warm up with train_sft.py": row.get("parse_ok", 1)
        < 0.05,
        "far fewer held-out completions can be parsed than at first: lower --lr; in train_sft.py give rows traces": unread,
        "most completions are cut: raise --max-new-tokens or give --mask-truncated": row.get(
            "finished", 1
        )
        < 0.5,
        "most groups have equal rewards: raise --temperature or --group": row.get("zero_std", 0)
        > 0.8,
        "entropy has collapsed: lower --lr or raise --kl-coef": collapsed,
        "the policy is far from the reference: lower --lr or raise --kl-coef": row.get("kl", 0) > 1,
        "sampled and scored log-probabilities differ: try --dtype float32": row.get(
            "logp_gap_mean", 0
        )
        > 0.05,
    }
    return [sentence for sentence, found in problems.items() if found]


def check_first_step(stats: dict, completions: list[dict], dtype: torch.dtype) -> None:
    """What must be true just before the very first update; else a RuntimeError, before hours of compute."""
    mean_gap = stats.get("gap_sum", 0) / max(stats.get("scored", 0), 1e-9)
    exact = dtype == torch.float32  # in bfloat16 two kernels differ: take the mean
    gap, near = (stats.get("logp_gap", 0), 1e-4) if exact else (mean_gap, 0.05)
    for ok, problem in (
        (all(row["length"] for row in completions), "a completion is empty"),
        (math.isfinite(stats.get("loss", 0)), "the loss is not finite"),
        (gap < near, f"sampled and scored log-probabilities differ: {stats}"),
        (abs(stats.get("kl", 0)) < near, f"the KL to a fresh reference is not 0: {stats}"),
        (abs(stats.get("ratio_max", 1) - 1) < 1e-5, f"the first ratio is not 1: {stats}"),
    ):
        if not ok:
            raise RuntimeError(f"sanity check of the first step: {problem}")
