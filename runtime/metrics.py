"""The numbers of a GRPO step: what is logged, the warnings, the check before the first update."""
import math

import numpy as np
import torch

from data import fill_prompt, to_image, to_model
from rewards import Answer, box_iou, parse_answer, point_dice, reward_terms, total_reward
from runtime.parallel import Ranks, peak_memory
from sampling import sample

SCORES = ("iou", "pdice", "reward", "parse_ok")            # of a held-out answer
PANELS = {"reward": ["reward"], "held-out box IoU": ["sampled/iou", "greedy/iou"],
          "reward terms": ["think_format", "answer_format", "box_iou", "point_dice"],
          "answer length (tokens)": ["length"], "entropy": ["entropy"], "KL to the reference": ["kl"]}
EXTREMES = {"ratio_max": max, "ratio_min": min, "logp_gap": max}        # all other statistics add up


def add_up(total: dict, new: dict) -> None:
    for key, value in new.items():
        value = float(value)
        total[key] = EXTREMES[key](total[key], value) if key in total and key in EXTREMES else \
            value if key in EXTREMES else total.get(key, 0.0) + value


def answer_rows(r) -> list[dict]:
    """What is logged of each answer of a Rollout: words for samples.jsonl, numbers for metrics.jsonl."""
    texts, flat = r.group.texts, float(r.rewards.min() == r.rewards.max())
    same = 1 - (len(set(texts)) - 1) / (len(texts) - 1)
    return [{"id": r.sample.id, "query": r.sample.query, "text": text, "reward": float(total),
             "reward_std": float(r.rewards.std()), "zero_std": flat, "identical": same, "length": int(length),
             "parse_ok": float(not parse_answer(text).problem), "finished": float(ended), **terms}
            for text, total, terms, length, ended
            in zip(texts, r.rewards, r.terms, r.group.lengths, r.group.finished)]


def means(answers: list[dict]) -> dict[str, float]:
    keys = [key for key, value in answers[0].items() if not isinstance(value, str)]
    return {key: sum(answer[key] for answer in answers) / len(answers) for key in keys}


def step_row(answers, stats, grad_norms, lr, clock, device) -> dict[str, float]:
    """A line of metrics.jsonl: means over all answers, statistics of the loss, seconds by phase."""
    scored, _ = stats.pop("scored", 1.0), stats.pop("gap_sum", 0.0)
    share = dict.fromkeys(("kl", "entropy", "clip_frac"), max(scored, 1e-9)) | {"loss": len(grad_norms)}
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    seconds = {name: b - a for name, a, b in zip(("sample", "reference", "update"), clock, clock[1:])}
    total = clock[-1] - clock[0]
    return {**means(answers), **{key: value / share.get(key, 1) for key, value in stats.items()},
            "grad_norm": sum(finite) / max(1, len(finite)), "skipped": len(grad_norms) - len(finite),
            "lr": lr, "seconds": total, **{f"seconds/{name}": value for name, value in seconds.items()},
            "tokens_per_second": sum(answer["length"] for answer in answers) / total,
            "peak_memory_gb": peak_memory(device)}


def worries(row: dict, first: dict) -> list[str]:
    """What in a step's numbers will not mend itself, and the flag that helps.
    first: the numbers of the run's first step."""
    longer = row["length"] > 2 * first["length"] + 16
    surer = row.get("entropy", 1) < 0.1 * first.get("entropy", 0)
    signs = ((row["skipped"], "a gradient is not finite and its update was skipped: lower --lr"),
             (row["parse_ok"] < 0.05, "almost no answer parses: warm up with train_sft.py"),
             (row["finished"] < 0.5, "most answers are cut: raise --max-new-tokens or give --mask-truncated"),
             (row["zero_std"] > 0.8, "most groups have equal rewards: raise --temperature or --group"),
             (surer, "entropy has collapsed: lower --lr or raise --kl-coef"),
             (longer, "answers grow and grow, so length pays: try --agg constant"),
             (row.get("kl", 0) > 1, "the policy has left the reference: lower --lr or raise --kl-coef"),
             (row.get("logp_gap", 0) > 5, "sampled and scored log-probabilities differ: try --dtype float32"))
    return [sentence for seen, sentence in signs if seen]


def check_first_step(stats: dict, rows: list[dict], dtype: torch.dtype) -> None:
    """Before hours of compute: what must have been true just before the very first update."""
    exact = dtype == torch.float32                          # in bfloat16 two kernels differ: take the mean
    gap = stats.get("logp_gap", 0) if exact else stats.get("gap_sum", 0) / max(stats.get("scored", 0), 1e-9)
    near = 1e-4 if exact else 0.05
    for ok, problem in (
            (all(row["length"] for row in rows), "an answer is empty"),
            (not stats or math.isfinite(stats["loss"]), "the loss is not finite"),
            (gap < near, f"sampled and scored log-probabilities differ: {stats}"),
            (abs(stats.get("kl", 0)) < near, f"the KL to a fresh reference is not 0: {stats}"),
            (abs(stats.get("ratio_max", 1) - 1) < 1e-5, f"the first ratio is not 1: {stats}")):
        if not ok:
            raise RuntimeError(f"sanity check of the first step: {problem}")


# ---------------------------------------------------------------- held-out evaluation

def held_out(crm, samples, template: str, mode: str, weights: dict | None, ranks: Ranks,
             answers: int = 4, temperature: float = 1.0, max_new_tokens: int = 512, batch: int = 16,
             seed: int = 0, official: bool = False) -> list[dict]:
    """Answers to every sample -> one row a sample, in the samples' order: id, and the mean over its answers
    of the box IoU and true pDice (plain, image frame), the reward (model frame, without mask_dice), parse_ok.
    An answer that cannot be parsed scores 0. temperature 0 needs one answer."""
    rows, weights = [], {name: w for name, w in (weights or {}).items() if name != "mask_dice"}
    for start in range(ranks.rank * batch, len(samples), ranks.world * batch):
        part = [samples[i] for i in range(start, min(start + batch, len(samples)))]
        prompts = [crm.encode(s.image, fill_prompt(template, s.query)) for s in part]
        seeds = [(seed, 1, i) for i in range(start, start + len(part))]
        for offset, (sample, group) in enumerate(zip(
                part, sample(crm, prompts, answers, max_new_tokens, temperature, seeds))):
            frame, scores = group.prompt.frame, []
            for text in group.texts:
                answer = parse_answer(text, official)
                truth = to_model(sample.bbox, frame), to_model(sample.points, frame)
                terms = reward_terms(text, *truth, official)
                scores.append((box_iou(to_image(answer.bbox, frame), sample.bbox) if answer.bbox else 0.0,
                               point_dice(to_image(answer.points, frame), sample.points)
                               if answer.points else 0.0,
                               total_reward(terms, mode, weights), float(not answer.problem)))
            means = np.mean(scores, 0).tolist()
            rows.append({"index": start + offset, "id": sample.id, **dict(zip(SCORES, means))})
    return sorted(ranks.gather(rows), key=lambda row: row["index"])


def medoid(answers: list[Answer]) -> tuple[int | None, float | None]:
    """(index of the answer to keep, mean IoU of its box with the other boxes).
    A box beats points alone; None if nothing can be used, and no agreement with fewer than two boxes."""
    boxed = [i for i, answer in enumerate(answers) if answer.bbox]
    if not boxed:
        return next((i for i, answer in enumerate(answers) if answer.points), None), None
    agreement = {i: np.mean([box_iou(answers[i].bbox, answers[j].bbox) for j in boxed if j != i] or [0])
                 for i in boxed}
    best = max(boxed, key=agreement.get)
    return best, float(agreement[best]) if len(boxed) > 1 else None


def paired_bootstrap(before, after, draws: int = 10_000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of after - before over the same samples,
    with the ends of its 95 % percentile bootstrap interval."""
    difference = np.asarray(after) - np.asarray(before)
    picks = np.random.default_rng(seed).integers(0, len(difference), (draws, len(difference)))
    low, high = np.percentile(difference[picks].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def mask_dice(mask, truth) -> float:
    return float(2 * (mask & truth).sum() / max(1, mask.sum() + truth.sum()))
