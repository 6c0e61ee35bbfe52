"""An answer that may say that the image does not show what is asked for.

    python -m extras.false_premise --mix --out build/mixed
    python train_sft.py --prompt nothing --data build/mixed …   # a checkpoint remembers its prompt
    python train_grpo.py --crm runs/warm/step_000100 --data build/mixed …

    <think>…</think><answer>{"bbox": null}</answer>

The reward of a completion, by what it says and what is true:

                    something is there           nothing is there
    a box           that of rewards.py           the terms of its format alone
    silence         0, every term                1, every term but those of the trace

So right silence earns what a perfect box earns, and silence where there is something earns nothing,
not even for its format: less than any attempt. The group's mean as baseline does the rest. A model
that is never silent gets no signal from that, so a few supervised steps come first.
The term mask_dice is computed elsewhere and knows nothing of silence: leave it out here.

Silence is a well-formed answer: it has no problem and no box. In the tables of evaluate.py
"silence, right" is the share of completions that are silent where nothing is there, and "silence,
wrong" where something is. IoU and pDice are those of the questions that have an answer. Where some
completions of a question point and some are silent, metrics.medoid keeps one that points.
"""

from collections.abc import Callable
from typing import Any

import metrics
from data import ADVICE, EXAMPLE_ANSWER, ONE_BOX, AnswerFormat, Example, Sizes
from extras.false_premise import asks_for_nothing, is_absent
from rewards import Answer, Terms, answer_fields, parse_answer

OF_TRACE = ("think_format", "base_think")
OF_ANSWER = ("answer_format", "base_answer")
SILENCE = '<answer>{"bbox": null}</answer>'
PROMPT = (
    "{query}\n"
    "Reason first, then point to the region that is meant, in pixels of this image:\n"
    f"<think>what you see, what it is, where it lies</think>{EXAMPLE_ANSWER}\n"
    f"{ADVICE}\n"
    f'Where this image does not show it, there is "nothing" to point to: {SILENCE}'
)


def parse(text: str) -> Answer:
    """Returns what can be read from a completion. Silence has neither box nor points, and no
    problem. No text raises an error."""
    answer = parse_answer(text)
    if is_silent(text):
        return Answer(answer.think, None, None, "")
    return answer


def is_silent(text: str) -> bool:
    """Whether a completion's answer is {"bbox": null}; points that are null as well are allowed."""
    _, _, fields = answer_fields(text)
    if fields is None or "bbox" not in fields:
        return False
    return all(value is None for value in fields.values())


def reward_terms(text: str, example: Example, sizes: Sizes) -> Terms:
    """Returns every term of a completion, as the table at the top of this file says."""
    terms = ONE_BOX.reward_terms(text, example, sizes)
    nothing_there = asks_for_nothing(example)
    if is_silent(text):
        earned = dict.fromkeys(terms, float(nothing_there))
        if nothing_there:
            earned |= {name: terms[name] for name in OF_TRACE}
        return earned
    if nothing_there:
        earned = dict.fromkeys(terms, 0.0)
        return earned | {name: terms[name] for name in OF_TRACE + OF_ANSWER}
    return terms


def target_text(example: Example, sizes: Sizes, with_think: bool = True) -> str:
    """Returns the completion of a perfect model, in the model frame."""
    if not asks_for_nothing(example):
        return ONE_BOX.target_text(example, sizes, with_think)
    if with_think and example.think:
        return f"<think>{example.think}</think>{SILENCE}"
    return SILENCE


# ---------------------------------------------------------------- the metrics
# They take a prediction p of metrics.py.


def silence(p: dict, where_absent: bool) -> float | None:
    """Returns the share of silent completions; None for a question of the other sort."""
    if is_absent(p) is not where_absent:
        return None
    silent = [is_silent(completion["text"]) for completion in p["completions"]]
    return sum(silent) / len(silent)


def where_present(metric: Callable[[dict], Any]) -> Callable[[dict], Any]:
    """Returns a metric that is None where nothing is there to be pointed to."""
    return lambda p: None if is_absent(p) else metric(p)


OF_A_TARGET = ("iou", "iou_parsed", "pdice", "iou50", "pdice_2iu", "voted", "best", "pass")
OF_A_TARGET += ("dice_points", "dice_box", "dice_one", "dice_both")
METRICS = {  # name: (title, function of a prediction)
    "silent_right": ("silence, right", lambda p: silence(p, where_absent=True)),
    "silent_wrong": ("silence, wrong", lambda p: silence(p, where_absent=False)),
}
for name in OF_A_TARGET:
    title, metric = metrics.METRICS[name]
    METRICS[name] = (title, where_present(metric))

MAY_BE_SILENT = AnswerFormat(
    prompt=PROMPT,
    parse=parse,
    reward_terms=reward_terms,
    target_text=target_text,
    truth=ONE_BOX.truth,
    key="nothing",
    metrics=METRICS,
)
