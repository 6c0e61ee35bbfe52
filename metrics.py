"""What is measured of completions: scores, and their means over held-out questions.

Held-out evaluation and evaluate.py's tables score a completion in one way: `prediction` takes its box and points to
the image frame as they are, never clipped; a question's score is the mean over its completions. A completion with a
problem (rewards.parse_answer) is a refusal. What can still be read of it counts; what cannot be read scores 0.
"""

import hashlib
from collections.abc import Iterator
from functools import partial

import numpy as np

from data import OneBox, clip_to, fill_prompt, to_image
from rewards import Answer, box_iou, parse_answer, point_dice, total_reward
from runtime.parallel import Ranks
from sampling import sample as sample_groups


def prediction(
    sample, index: int, texts: list[str], frame, official: bool = False, answers=OneBox
) -> dict:
    """One question with its completions, as JSON can hold it; boxes and points in the image frame. kept: see medoid.
    names and wording come from the sample's extra: a list of names, and unseen_wording, true or false, else its kind.
    image: a digest of the pixels, by which extras.several finds the questions about one image. answers: see
    data.answers_of; of several boxes bbox is the one around them, and regions has each with its points."""

    def shown(answer: Answer) -> dict:
        return {
            key: xy and to_image(xy, frame)
            for key, xy in (("bbox", answer.bbox), ("points", answer.points))
        }

    read, truth = [answers.read(text, official) for text in texts], answers.truth(sample)
    several = "regions" in truth
    completions = [
        {
            "text": text,
            **shown(answer),
            "problem": answer.problem,
            **({"regions": [shown(part) for part in answer.parts]} if several else {}),
        }
        for text, answer in zip(texts, read)
    ]
    names, unseen, kind = (sample.extra.get(key) for key in ("names", "unseen_wording", "kind"))
    return {
        "id": sample.id,
        "index": index,
        "size": sample.image.size,
        "query": sample.query,
        "image": hashlib.blake2b(sample.image.tobytes(), digest_size=8).hexdigest(),
        "supercategory": sample.supercategory,
        "category": sample.category,
        "names": [str(name).lower() for name in names] if isinstance(names, list) else [],
        "wording": ("unseen" if unseen else "seen")
        if isinstance(unseen, bool)
        else str(kind or "") or None,
        "truth": truth,
        "asked": ["bbox"] if several else ["bbox", "points"],
        "completions": completions,
        "kept": medoid(read)[0],
    }


def iou(p: dict, completion: dict) -> float | None:
    """Box IoU; 0 without a readable box, None where no box was asked for."""
    if "bbox" not in p["asked"]:
        return None
    return box_iou(completion["bbox"], p["truth"]["bbox"]) if completion["bbox"] else 0.0


def pdice(p: dict, completion: dict, published: bool = False) -> float | None:
    """True pDice, or as published 2I/U; 0 without readable points, None where no points were asked for."""
    if "points" not in p["asked"]:
        return None
    return (
        point_dice(completion["points"], p["truth"]["points"], published)
        if completion["points"]
        else 0.0
    )


def parsed(p: dict, completion: dict) -> bool:
    return not completion["problem"]


def named(p: dict, completion: dict) -> bool | None:
    """Whether the trace names the target: one of its names occurs in it. None where the data has no names."""
    trace = (parse_answer(completion["text"]).think or "").lower()
    return any(name in trace for name in p["names"]) if p["names"] else None


def mean(p: dict, score, where=None) -> float | None:
    """Mean of score(p, completion) over the completions for which where(p, completion) is true; else None."""
    values = [score(p, c) for c in p["completions"] if where is None or where(p, c)]
    return sum(values) / len(values) if values and None not in values else None


SEVERAL = {
    "iou_several": "IoU, of several",
    "iou_any": "IoU, any sibling",
    "iou_luck": "IoU, by luck",
    "soft_f1": "soft F1",
    "f1_50": "F1, IoU ≥ 0.5",
    "count_error": "count error",
}


def of_several(key: str, p: dict) -> float | None:
    """A metric of extras/several.py; None unless several in the image are meant by the words, or a box was asked for
    each region."""
    if not p["truth"].get("siblings") and "regions" not in p["truth"]:
        return None
    from extras.several import METRICS

    return METRICS[key](p)


QUESTION_METRICS = {  # name: (title, function of a prediction -> float, or None where undefined)
    "iou": ("IoU", lambda p: mean(p, iou)),
    "pdice": ("pDice", lambda p: mean(p, pdice)),
    "parse_ok": ("parse rate", lambda p: mean(p, parsed)),
    "iou_parsed": ("IoU, parsed", lambda p: mean(p, iou, where=parsed)),
    "named": ("named right", lambda p: mean(p, named)),
    "iou_named": ("IoU, named right", lambda p: mean(p, iou, where=named)),
    **{key: (title, partial(of_several, key)) for key, title in SEVERAL.items()},
}


def mask_dice(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice 2|M T| / (|M| + |T|) of two (H, W) bool masks, in [0, 1]; 0 when both are empty."""
    return float(2 * (mask & truth).sum() / max(1, mask.sum() + truth.sum()))


def united_mask(asm, pixels: np.ndarray, parts) -> tuple[np.ndarray, list[float]]:
    """The masks of some boxes and points, united. pixels (H, W, 3) uint8; parts: (bbox, points), image frame, either
    may be None -> (H, W) bool, and the segmenter's own score of each part that has something. Coordinates are
    clipped: the segmenter was not trained on boxes that leave their image."""
    mask, scores = np.zeros(pixels.shape[:2], bool), []
    for bbox, points in parts:
        if bbox or points:
            prompt = ([clip_to(pixels.shape[1::-1], xy)] if xy else None for xy in (bbox, points))
            masks, (score, *_) = asm.segment(pixels, *prompt)
            mask |= masks[0]
            scores.append(float(score))
    return mask, scores


def medoid(answers: list[Answer]) -> tuple[int | None, float | None]:
    """(index of the answer to keep, mean IoU of its box with the other boxes).
    A box beats points alone; None if nothing can be used, and no agreement with fewer than two boxes."""
    boxed = [i for i, answer in enumerate(answers) if answer.bbox]
    if not boxed:
        return next((i for i, answer in enumerate(answers) if answer.points), None), None
    agreement = {
        i: np.mean([box_iou(answers[i].bbox, answers[j].bbox) for j in boxed if j != i] or [0])
        for i in boxed
    }
    best = max(boxed, key=agreement.get)
    return best, float(agreement[best]) if len(boxed) > 1 else None


# ---------------------------------------------------------------- held-out questions


def ask(
    crm,
    samples,
    indexes,
    kinds: dict[str, tuple[int, float]],
    max_new_tokens: int,
    seed: int,
    batch: int = 0,
    official: bool = False,
) -> Iterator[tuple]:
    """Put questions to the CRM -> (kind, sample, group, prediction) for each question and kind.

    kinds: {name: (completions per question, temperature)}; temperature 0 takes the most likely token. A prompt is
    encoded once for all kinds. batch: questions encoded at once (0: 64 on CUDA, else 16)."""
    batch = batch or (64 if crm.device.type == "cuda" else 16)
    for start in range(0, len(indexes), batch):
        part = indexes[start : start + batch]
        chosen = [samples[i] for i in part]
        prompts = [crm.encode(s.image, fill_prompt(crm.template, s.query)) for s in chosen]
        for kind, (completions, temperature) in kinds.items():
            seeds = [(seed, 1, i) for i in part]
            groups = sample_groups(crm, prompts, completions, max_new_tokens, temperature, seeds)
            for i, sample, group in zip(part, chosen, groups):
                yield (
                    kind,
                    sample,
                    group,
                    prediction(sample, i, group.texts, group.prompt.frame, official, crm.answers),
                )


def held_out(
    crm,
    samples,
    kinds: dict[str, tuple[int, float]],
    mode: str,
    weights: dict,
    ranks: Ranks,
    max_new_tokens: int = 512,
    batch: int = 0,
    official: bool = False,
) -> list[dict]:
    """Every sample's question under every kind (see `ask`) -> one row per kind and sample, in that order: kind, index,
    id, wording, QUESTION_METRICS, and the mean reward (model frame, without mask_dice)."""
    from extras.several import add_siblings

    weights = {name: weight for name, weight in weights.items() if name != "mask_dice"}
    mine, rows = range(len(samples))[ranks.rank :: ranks.world], []
    for kind, sample, group, p in ask(
        crm, samples, mine, kinds, max_new_tokens, 0, batch, official
    ):
        terms = crm.answers.reward_terms(group.texts, sample, group.prompt.frame, official)
        rewards = [total_reward(term, mode, weights) for term in terms]
        rows.append((list(kinds).index(kind), p, sum(rewards) / len(rewards)))
    rows = sorted(ranks.gather(rows), key=lambda row: (row[0], row[1]["index"]))
    add_siblings([p for _, p, _ in rows])
    return [
        {
            "kind": list(kinds)[kind],
            "index": p["index"],
            "id": p["id"],
            "wording": p["wording"],
            **{key: metric(p) for key, (_, metric) in QUESTION_METRICS.items()},
            "reward": reward,
        }
        for kind, p, reward in rows
    ]


def held_out_means(rows: list[dict]) -> dict[str, float]:
    """{"sampled/iou": …} over held_out's rows; a score that no row has is left out."""
    values = {}
    for row in rows:
        for key in (*QUESTION_METRICS, "reward"):
            if row[key] is not None:
                values.setdefault(f"{row['kind']}/{key}", []).append(row[key])
    return {key: sum(scores) / len(scores) for key, scores in values.items()}
