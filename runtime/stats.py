"""The numbers of a training step: their sums, what they warn of, what must hold before the first.

Nothing here knows how a model is trained. The trainers name what they measure, and `WARNINGS` says
which of these names point to a problem, and to which flag.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from runtime.cli import print0
from runtime.parallel import Ranks

MAXIMA = ("ratio_max", "logp_gap")  # of these the largest value of a step counts
MINIMA = ("ratio_min",)  # of these the smallest; everything else is added up

Row = dict[str, float]


class StepStats:
    """The statistics of one step, over its micro-batches and then over the ranks."""

    def __init__(self, maxima: tuple[str, ...] = MAXIMA, minima: tuple[str, ...] = MINIMA):
        self.maxima = maxima
        self.minima = minima
        self.values: dict[str, torch.Tensor] = {}

    def add(self, **values: torch.Tensor | float) -> None:
        """Add the statistics of a micro-batch. They stay on their device, so that the host does not
        wait."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64).detach()
            if name not in self.values:
                self.values[name] = value
            elif name in self.maxima:
                self.values[name] = torch.maximum(self.values[name], value)
            elif name in self.minima:
                self.values[name] = torch.minimum(self.values[name], value)
            else:
                self.values[name] = self.values[name] + value

    def total(self, ranks: Ranks) -> Row:
        """The statistics so far over all ranks, as Python numbers. All ranks must call this
        together."""
        numbers = {name: float(value) for name, value in self.values.items()}
        total = StepStats(self.maxima, self.minima)
        for numbers_of_rank in ranks.gather([numbers]):
            total.add(**numbers_of_rank)
        return {name: float(value) for name, value in total.values.items()}


class Phases:
    """Seconds that the phases of a step take."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.start = ranks.clock()
        self.last = self.start
        self.found: Row = {}

    def end(self, name: str) -> None:
        """Ends a phase. The next one begins."""
        now = self.ranks.clock()
        self.found[f"seconds/{name}"] = now - self.last
        self.last = now

    def seconds(self) -> Row:
        """{"seconds": of all phases, "seconds/sample": …}"""
        return {"seconds": self.last - self.start, **self.found}


def spread(rewards: torch.Tensor, texts: list[str]) -> Row:
    """How different the completions of one group are. rewards: (G,), G at least 2.

    "identical" is 0 where all texts differ and 1 where all are the same."""
    different_texts = len(set(texts))
    return {
        "reward_std": float(rewards.std()),
        "zero_std": float(rewards.min() == rewards.max()),
        "identical": 1 - (different_texts - 1) / (len(texts) - 1),
    }


# ---------------------------------------------------------------- warnings


def boxes_miss(row: Row, first_values: Row) -> bool:
    # A box that overlaps nothing still earns up to 0.1 for the attempt; 0.15 is an IoU of about
    # 0.03. A completion that cannot be parsed earns 0.
    parsed = row.get("parse_ok", 0)
    return parsed > 0.5 and row.get("box_iou", 1) < 0.15 * parsed


def only_the_format_is_better(row: Row, first_values: Row) -> bool:
    parses = row.get("sampled/parse_ok", 0) > first_values.get("sampled/parse_ok", 1) + 0.1
    points = row.get("sampled/iou_parsed", 1) >= first_values.get("sampled/iou_parsed", 0)
    return "zero_std" in row and parses and not points  # train_sft.py has no coefficients


def held_out_reward_is_flat(row: Row, first_values: Row) -> bool:
    if row.get("step", 0) < 50 or not {"sampled/reward", "zero_std"} <= row.keys():
        return False  # a row without zero_std is of train_sft.py
    return row["sampled/reward"] <= first_values.get("sampled/reward", -math.inf)


def gradient_is_zero(row: Row, first_values: Row) -> bool:
    is_skipped = row.get("skipped", 0) > 0  # then the norm is that of no update
    return row.get("grad_norm", 1) == 0 and not is_skipped


def traces_are_missing(row: Row, first_values: Row) -> bool:
    return row.get("parse_ok", 0) > 0.5 and row.get("think_format", 1) < 0.5


def completions_became_short(row: Row, first_values: Row) -> bool:
    # completions that were cut at first may become shorter without any harm
    were_finished = first_values.get("finished", 0) > 0.5
    return were_finished and row.get("length", math.inf) < 0.5 * first_values.get("length", 0)


def entropy_has_collapsed(row: Row, first_values: Row) -> bool:
    return row.get("entropy", 1) < 0.1 * first_values.get("entropy", 0)


def held_out_parse_rate_fell(row: Row, first_values: Row) -> bool:
    return row.get("sampled/parse_ok", 1) < first_values.get("sampled/parse_ok", 0) - 0.2


# What in a row of metrics.jsonl points to a problem: the sentence with the flag that helps, and the
# condition on the row and on the values that the run logged first. A value that a row lacks is
# fine. learn/SYMPTOMS.md says more about each.
WARNINGS: list[tuple[str, Callable[[Row, Row], bool]]] = [
    (
        "a gradient is not finite, its update was skipped: lower --lr",
        lambda row, first_values: row.get("skipped", 0) > 0,
    ),
    (
        "the gradient is exactly 0, nothing is learned: rewards within each group are equal; raise "
        "--temperature, --group or --max-new-tokens, or warm up with train_sft.py",
        gradient_is_zero,
    ),
    (
        "almost no completion can be parsed: warm up with train_sft.py",
        lambda row, first_values: row.get("parse_ok", 1) < 0.05,
    ),
    (
        "far fewer held-out completions can be parsed than at first: lower --lr; in train_sft.py "
        "give rows traces",
        held_out_parse_rate_fell,
    ),
    (
        "most completions are cut: raise --max-new-tokens",
        lambda row, first_values: row.get("finished", 1) < 0.5,
    ),
    (
        "most groups have equal rewards: raise --temperature or --group",
        lambda row, first_values: row.get("zero_std", 0) > 0.8,
    ),
    (
        "the held-out reward is no higher than at first: raise --lr, --prompts or --group",
        held_out_reward_is_flat,
    ),
    (
        "held-out completions are better formed than at first, but their boxes are no better: give "
        "--coefficients box_iou=2",
        only_the_format_is_better,
    ),
    (
        "completions can be parsed, but their boxes miss: the data's boxes must be pixels of the "
        "image; python data.py PATH --sheet sheet.png draws them",
        boxes_miss,
    ),
    (
        "most boxes cover the whole image: give --mode hard or --coefficients box_scale=1",
        lambda row, first_values: row.get("whole_image", 0) > 0.5,
    ),
    (
        "most completions have no trace: give --prompt reasoning, and warm up with train_sft.py on "
        "rows that have traces",
        traces_are_missing,
    ),
    (
        "completions are less than half as long as at first: read rollouts.jsonl; lower --lr or "
        "raise --kl-coef",
        completions_became_short,
    ),
    (
        "entropy has collapsed: lower --lr or raise --kl-coef",
        entropy_has_collapsed,
    ),
    (
        "the policy is far from the reference: lower --lr or raise --kl-coef",
        lambda row, first_values: row.get("kl", 0) > 1,
    ),
    (
        "sampled and scored log-probabilities differ: try --dtype float32",
        lambda row, first_values: row.get("logp_gap_mean", 0) > 0.05,
    ),
]


def warnings_of(row: Row, first_values: Row) -> list[str]:
    """The sentences of WARNINGS that hold for a step's row. first_values: what the run logged first
    of each name."""
    return [sentence for sentence, holds in WARNINGS if holds(row, first_values)]


# ---------------------------------------------------------------- what no row can hold

# Qwen's authors recommend 1,024 to 2,048 for boxes (ggml-org/llama.cpp, issue 16842).
FEWEST_IMAGE_TOKENS = 1024
# The smallest Qwen2.5-VL has three billion weights. The embedded model has three million, and its
# images are small on purpose.
SMALLEST_REAL_MODEL = 1e9
SHOWN = 3  # completions that cannot be parsed
SHOWN_CHARACTERS = 300


def covers(box: tuple[float, float, float, float], size: tuple[int, int]) -> bool:
    """Whether a box (x1, y1, x2, y2) covers at least nine tenths of an image of (width, height)."""
    width, height = size
    x1, y1, x2, y2 = box
    covered_width = min(x2, width) - max(x1, 0)
    covered_height = min(y2, height) - max(y1, 0)
    return covered_width > 0 and covered_width * covered_height >= 0.9 * width * height


def first_look(problems: list[tuple[str, str]], image_tokens: list[int], weights: int) -> None:
    """Prints what the first completions show: some that cannot be parsed, and whether images are
    small for a real model.

    problems      (text, what is wrong with it or "") of each completion
    image_tokens  of each image
    weights       of the model"""
    broken = [(text, problem) for text, problem in problems if problem]
    if broken:
        print0(f"\n{len(broken)} of the first {len(problems)} completions cannot be parsed:")
    for text, problem in broken[:SHOWN]:
        print0(f"    {problem}: {text[:SHOWN_CHARACTERS]!r}")
    mean = sum(image_tokens) / len(image_tokens)
    if weights >= SMALLEST_REAL_MODEL and mean < FEWEST_IMAGE_TOKENS:
        print0(
            f"an image has {mean:,.0f} tokens; Qwen's authors recommend 1,024 to 2,048 for boxes: "
            "--resize aspect:1605632 allows 2,048; enlarge the files of small images"
        )


def warn_of_jump(logged: list[Row], lr: float) -> None:
    """Prints a line where the last step that was logged had another learning rate than today's
    flags would have given it. logged: the rows of metrics.jsonl. lr: what they would have given."""
    if not logged:
        return
    before = logged[-1].get("lr", lr)
    if not math.isclose(before, lr, rel_tol=1e-6):
        print0(
            f"the learning rate of step {logged[-1]['step']} was {before:.3g}, and these flags "
            f"would have made it {lr:.3g}: --schedule follows --steps, so curves jump here; give "
            "--steps as before"
        )


@contextmanager
def explain_memory() -> Iterator[None]:
    """Inside, where the memory of an accelerator is used up, a line says which flags need less."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(
            "out of memory: lower --pack-tokens (train_sft.py: --micro-batch), --max-new-tokens or "
            "--resize, or give --checkpointing, --offload, --lora-rank or --parallel fsdp; python "
            "-m bench.memory says what a run needs",
            file=sys.stderr,
            flush=True,
        )
        raise


# ---------------------------------------------------------------- before the first update


@dataclass(frozen=True)
class Bounds:
    """How far numbers that are equal on paper may be apart just before the first update."""

    logp_gap_max: float  # sampled and scored log-probability of a token, the worst token
    logp_gap_mean: float  # the same, the weighted mean over tokens
    kl: float  # mean KL to a reference model that is a copy of the policy
    ratio: float  # pi/pi_old of a token minus 1, the worst token, where pi_old was computed apart


# By the type that computes, not the type in which weights are stored: shards are float32 although
# the model computes in bfloat16. In float32 on a CPU a difference is a bug, whatever its size.
EXACT = Bounds(logp_gap_max=1e-4, logp_gap_mean=1e-4, kl=1e-4, ratio=1e-5)
# An accelerator picks its matrix kernels by shape.
FLOAT32_ACCELERATOR = Bounds(logp_gap_max=math.inf, logp_gap_mean=1e-3, kl=1e-3, ratio=0.05)
# In bfloat16 two kernels differ in the third digit of each product: the mean says whether they
# compute the same thing, and the worst of a million tokens says little.
ROUNDED = Bounds(logp_gap_max=math.inf, logp_gap_mean=0.05, kl=0.05, ratio=20.0)
# With one update per step pi_old is pi itself, detached, in every type.
SAME_TENSOR = 1e-5


def check_first_step(
    totals: Row,
    completions_lengths: list[int],
    compute_dtype: torch.dtype,
    updates: int,
    device_type: str = "cpu",
) -> None:
    """Checks numbers that were measured before the very first update moved a weight. RuntimeError
    where they are wrong, before hours of compute; nothing is saved yet.

    totals               StepStats.total of the first update alone: loss, weight (the sum of the
                         tokens' weights), and where they were measured logp_gap_sum, logp_gap, kl,
                         ratio_max and ratio_min
    completions_lengths  in tokens
    compute_dtype        the type in which the model computes
    updates              optimizer updates of the step; if there is more than one, pi_old was
                         computed in other packs than the update
    """
    if compute_dtype != torch.float32:
        bounds = ROUNDED
    elif device_type == "cpu":
        bounds = EXACT
    else:
        bounds = FLOAT32_ACCELERATOR
    ratio_bound = bounds.ratio if updates > 1 else SAME_TENSOR

    mean_gap = totals.get("logp_gap_sum", 0.0) / max(totals.get("weight", 0.0), 1e-9)
    largest_gap = totals.get("logp_gap", 0.0)
    # 1.05 and 1 / 1.05 are equally far from 1
    ratio_above = totals.get("ratio_max", 1.0) - 1
    ratio_below = 1 / max(totals.get("ratio_min", 1.0), 1e-9) - 1

    # each comparison is written so that nan fails it
    checks = [
        (min(completions_lengths, default=1) > 0, "a completion is empty"),
        (math.isfinite(totals.get("loss", 0.0)), "the loss is not finite"),
        (
            largest_gap < bounds.logp_gap_max and mean_gap < bounds.logp_gap_mean,
            "sampled and scored log-probabilities differ",
        ),
        (abs(totals.get("kl", 0.0)) < bounds.kl, "the KL to a fresh reference is not 0"),
        (ratio_above < ratio_bound and ratio_below < ratio_bound, "the first ratio is not 1"),
    ]
    for holds, problem in checks:
        if not holds:
            raise RuntimeError(f"check of the first step: {problem}: {totals}")
