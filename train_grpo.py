"""Train the Clinical Reasoning Module with GRPO (arXiv 2402.03300), as MedReasoner does
(arXiv 2508.08177).

    python train_grpo.py                  # the embedded default: a tiny model, small data, one CPU
    torchrun --nproc-per-node 8 train_grpo.py @recipes/lora_7b.args

For each question, sample a group of completions, and reward each one for its format and for where
it points. A completion's advantage says by how many standard deviations its reward is above the
mean of its group. Completions with a positive advantage become more likely and the others less
likely, within a trust region, and near the model that training started from.

The life of one batch, with P questions and G completions each:

    image, question ── crm.encode ──> Prompt (L,)                  L tokens, most of them the image
         │                               │ sample
         │                               v
         │            completions: tokens (G, T), texts              one Group per question
         │                               │ reward_terms, total_reward     <── true box and points
         v                               v
    (segmenter: only if         rewards (P, G)
     mask_dice is rewarded)              │ group_advantages
                                         v
                                advantages (P, G)
                                         │ make_packs
                                         v
    [prompt | c1 | … | cG] ── score ──> logp (g, T) ── grpo_loss ──> loss () ──> gradient
                                                                               ──> AdamW: weights

    A_i  = (r_i - mean(r)) / (std(r) + eps)                                     group_advantages
    rho  = pi(token) / pi_old(token)                                            one per token
    L    = - sum_t w_t min(rho A, clip(rho, 1-c, 1+c') A)  +  beta sum_t w_t KL_t       grpo_loss
    KL_t = pi_ref/pi - log(pi_ref/pi) - 1                                       "k3"

What trains is said at the start: all weights, or LoRA matrices. The reference model is frozen. The
segmenter is frozen as well, and it is not even loaded unless the reward has the term mask_dice.
With --resume the model is built from --crm as at the start, so the reference is right for free,
and the optimizer's float32 weights of the checkpoint are then copied into the policy. Ctrl-C and
SIGTERM let the run save what is done, and leave with status 0.

Defaults are the paper's but for the sizes (questions per step, group, tokens, steps). The embedded
default has flags of its own, in recipes/demo.args.

    Dr. GRPO  --norm none --agg constant --kl-coef 0                             arXiv 2503.20783
    DAPO      --agg token --clip-high 0.28 --resample 3 --kl-coef 0              arXiv 2503.14476
    GSPO      --ratio sequence --clip-low 3e-4 --clip-high 4e-4 --kl-coef 0      arXiv 2507.18071

Differences from the paper:
  1. Rewards follow its formulas, not the quirks of its released code, which are in
     extras/official_rewards.py.
  2. Images keep their aspect ratio; --resize square:840 gives the release's canvas.
  3. The sampler's kernels round differently from the scorer's. Importance weights, capped at 2,
     correct that; --sampler-is 0 switches them off.
The value of k3 is unbiased, but its gradient is not that of the reverse KL; --kl k2 has that
gradient.

Read next: rewards.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

import metrics
from asm import ASM, load_asm, segment_regions
from crm import CRM, Group, load_crm
from data import EMBEDDED, BadRow, Example, Examples, evenly_spread, load_splits, to_image
from evaluate import log_held_out
from rewards import (
    MODES,
    PIXEL_TERMS,
    parse_coefficients,
    reward_formula,
    smooth_log,
    total_reward,
)
from runtime.cli import exit_on, flag, parse_args, print0, use_embedded
from runtime.optim import Optimizer
from runtime.parallel import Ranks, equal_passes, peak_memory
from runtime.run import TRACKERS, Run, learning_rate, step_indices
from runtime.stats import (
    MAXIMA,
    MINIMA,
    Phases,
    StepStats,
    check_first_step,
    covers,
    explain_memory,
    first_look,
    spread,
    warn_of_jump,
)
from sampling import TRAINING, sample
from scoring import all_logp, make_packs, score

RECIPE = "recipes/demo.args"  # read where --crm is not given


@dataclass
class Config:
    # model
    crm: str | None = flag(None, "Qwen2.5-VL or Qwen3-VL, folder or hub name")
    prompt: str | None = flag(
        None, "reasoning, direct, boxes, a text file with {query}, or the text itself"
    )
    resize: str | None = flag(None, "aspect, aspect:MAX_PIXELS or square:SIDE")
    dtype: str = flag(
        "auto", "compute type; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    trainable: str = flag("", "train only parameters whose name this regular expression matches")
    lora_rank: int = flag(0, "train LoRA matrices of this rank instead of the model (0: no)", low=0)
    checkpointing: bool = flag(False, "compute activations again in the backward pass")
    offload: bool = flag(False, "optimizer state and reference model live in host memory")
    # data
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    seed: int = flag(0, "seed of every random choice", low=0)
    # sampling
    steps: int = flag(100, "rollouts", low=1)
    prompts: int = flag(8, "P, questions per step over all ranks (paper: 128)", low=1)
    group: int = flag(8, "G, completions per question (paper: 16)", low=2)
    max_new_tokens: int = flag(128, "longest completion in tokens (paper: 2048)", low=1)
    temperature: float = flag(1.0, "softmax temperature of sampling and scoring", above=0)
    resample: int = flag(
        0, "times that groups of equal rewards are replaced by other questions", low=0
    )
    # reward
    mode: str = flag("soft", "reward mode, see rewards.py", tuple(MODES))
    coefficients: str = flag("", "of reward terms, as in box_iou=2,mask_dice=1; may add terms")
    asm: str | None = flag(None, "segmenter, only loaded for the term mask_dice")
    # advantages and loss
    norm: str = flag(
        "group",
        "divide by the std of the group, of nothing, of the step",
        ("group", "none", "batch"),
    )
    agg: str = flag("sequence", "see token_weights", ("sequence", "token", "constant"))
    ratio: str = flag("token", "pi/pi_old, or its mean over a completion", ("token", "sequence"))
    clip_low: float = flag(0.2, "the ratio's lower bound is 1 - this", low=0)
    clip_high: float = flag(0.2, "the ratio's upper bound is 1 + this", low=0)
    dual_clip: float = flag(
        3.0, "where A < 0 a token gains at least this x A (0: no)", low=1, off=0
    )
    kl: str = flag("k3", "estimator of the KL to the reference model", ("k1", "k2", "k3"))
    kl_coef: float = flag(0.01, "beta (0: no reference model is kept)", low=0)
    entropy_coef: float = flag(0.0, "bonus for entropy, falls linearly to 0 over the run", low=0)
    sampler_is: float = flag(2.0, "cap on pi_old / pi_sampler (0: no such weights)", low=1, off=0)
    # updates
    minibatches: int = flag(2, "optimizer updates per rollout and epoch", low=1)
    inner_epochs: int = flag(1, "passes over a rollout", low=1)
    lr: float = flag(1e-6, "peak learning rate", above=0)
    warmup: int = flag(0, "steps of linear warm-up", low=0)
    schedule: str = flag("constant", "lr after warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.01, "AdamW's weight decay", low=0)
    pack_tokens: int = flag(10240, "most tokens scored at once; longer groups are split", low=1)
    parallel: str = flag(
        "ddp", "how ranks share the model, see runtime/parallel.py", ("ddp", "fsdp")
    )
    # run folder, evaluation, checkpoints
    out: str = flag("runs/grpo", "run folder")
    resume: str = flag(
        "no",
        "go on from the last checkpoint; auto: if there is one",
        ("no", "yes", "auto"),
        bare="yes",
    )
    eval_every: int = flag(50, "steps between evaluations (0: first and last; -1: none)", low=-1)
    eval_limit: int = flag(0, "held-out questions, evenly spread (0: all)", low=0)
    save_every: int = flag(100, "steps between checkpoints (0: only the last; -1: none)", low=-1)
    keep: int = flag(0, "newest checkpoints to keep, besides the best one (0: all)", low=0)
    track: str | None = flag(None, "also log to a tracker, see extras/track.py", tuple(TRACKERS))


# ---------------------------------------------------------------- the algorithm, on plain tensors


def group_advantages(rewards: torch.Tensor, norm: str = "group", eps: float = 1e-6) -> torch.Tensor:
    """Rewards (P, G) -> advantages (P, G).

    An advantage is the reward minus its group's mean, divided by the group's unbiased standard
    deviation ("group"), by nothing ("none"), or by the standard deviation of all rewards ("batch").
    A group of equal rewards gets exactly 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    all_equal = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    centred = torch.where(all_equal, 0.0, centred)
    if norm == "none":
        return centred
    std = rewards.std() if norm == "batch" else rewards.std(1, keepdim=True)
    return centred / (std + eps)


def token_weights(
    mask: torch.Tensor, agg: str = "sequence", max_tokens: int | None = None
) -> torch.Tensor:
    """How much each token counts in an optimizer step: mask (N, T) of the completions of all ranks
    -> (N, T).

    sequence  mean over a completion's tokens, then over completions    sums to 1
    token     mean over all tokens of the step                          sums to 1
    constant  sum / (completions * max_tokens): no length bias          sums to the mean fill

    So the loss of a micro-batch is a plain weighted sum, and the gradient does not depend on how
    the step is cut. Rows without a token count as no completion."""
    mask = mask.float()
    completions = mask.any(1).sum().clamp(min=1)
    if agg == "sequence":
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        return mask / lengths / completions
    if agg == "token":
        return mask / mask.sum().clamp(min=1)
    return mask / (completions * max_tokens)


def grpo_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
    kl_coef: float = 0.01,
    kl: str = "k3",
    ratio: str = "token",
    sampler_logp: torch.Tensor | None = None,
    sampler_is: float = 0.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the loss () and its statistics. Only logp carries a gradient.

    logp          (N, T) under the policy
    old_logp      (N, T) under the policy that sampled, as the scorer computes it
    ref_logp      (N, T) under the reference model, or None: no KL
    advantages    (N,)
    weights       (N, T) of the tokens; 0 past a completion's length
    sampler_logp  (N, T) as the sampler computed it, for the correction that sampler_is caps
    Statistics are weighted as the loss is, so those of micro-batches add up. (ratio_max takes the
    maximum of them, ratio_min the minimum.)"""
    mask = weights > 0
    A = advantages[:, None]
    zero = torch.zeros_like(old_logp)

    # rho = pi / pi_old. What is masked becomes 0 before exp, because inf * 0 is nan.
    log_ratio = torch.where(mask, logp - old_logp, zero)
    if ratio == "sequence":  # GSPO, Eq. 7
        lengths = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio.sum(1, keepdim=True) / lengths).expand_as(mask)
    rho = log_ratio.clamp(-20, 20).exp()

    # J = min(rho A, clip(rho) A), PPO's pessimistic bound
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(rho * A, clipped * A)
    if dual_clip:  # arXiv 1912.09729
        gain = torch.where(A < 0, torch.maximum(gain, dual_clip * A), gain)
    is_clipped = clipped * A < rho * A
    stats = {
        "clip_frac": (weights * is_clipped).sum(),
        "clip_low_frac": (weights * (is_clipped & (A < 0))).sum(),
        "clip_high_frac": (weights * (is_clipped & (A > 0))).sum(),
        "ratio_max": rho.max(),
        "ratio_min": rho.min(),
    }

    # The sampler's kernels round differently from the scorer's, so the tokens come from a
    # distribution a little beside pi_old. Importance weights pi_old / pi_sampler correct that, and
    # a cap keeps their variance small (truncated importance sampling).
    if sampler_is and sampler_logp is not None:
        log_weight = torch.where(mask, old_logp - sampler_logp, zero).clamp(-20, 20)
        correction = log_weight.exp().clamp(max=sampler_is)
        gain = gain * correction
        stats["sampler_is_mean"] = (weights * correction).sum()
        stats["sampler_is_capped"] = (weights * (correction >= sampler_is)).sum()

    loss = -(weights * gain).sum()
    if ref_logp is not None:
        x = torch.where(mask, ref_logp - logp, zero).clamp(-20, 20)  # log pi_ref / pi
        if kl == "k1":
            estimate = -x
        elif kl == "k2":
            estimate = 0.5 * x**2
        else:
            estimate = (x.exp() - x - 1).clamp(-10, 10)
        stats["kl"] = (weights * estimate).sum()
        loss = loss + kl_coef * stats["kl"]
    return loss, {name: value.detach() for name, value in stats.items()}


# ---------------------------------------------------------------- groups, sampled and rewarded


@dataclass
class Rollout(Group):
    """A group, what its completions earned, and what the loss needs of them."""

    example: Example
    terms: list[dict[str, float]]  # of each completion
    rewards: torch.Tensor  # (G,)
    advantages: torch.Tensor | None = None  # (G,)
    token_weights: torch.Tensor | None = None  # (G, T) in the optimizer step
    old_logp: torch.Tensor | None = None  # (G, T) under the policy that sampled; None: logp itself
    ref_logp: torch.Tensor | None = None  # (G, T) under the reference model; None: no KL


@dataclass
class Setup:
    """What roll_out needs besides the questions."""

    cfg: Config
    crm: CRM
    asm: ASM | None  # only where mask_dice is rewarded
    coefficients: dict[str, float]  # of reward terms


def roll_out(
    setup: Setup,
    examples: Examples,
    picks: Sequence[tuple[int, int]],
    step: int,
    attempt: int = 0,
) -> list[Rollout]:
    """Samples and rewards one group of completions for each of some questions of a step.

    picks: of each question its place in the step and its index in `examples`. What is sampled
    depends on the seed, the step and the place, not on the ranks."""
    cfg = setup.cfg
    crm = setup.crm
    questions = [examples[index] for _, index in picks]
    prompts = [crm.prompt_of(question) for question in questions]
    seeds = [(cfg.seed, TRAINING, step, place, index, attempt) for place, index in picks]
    groups = sample(crm, prompts, cfg.group, cfg.max_new_tokens, cfg.temperature, seeds)
    rollouts = []
    for question, group in zip(questions, groups):
        terms = reward_group(question, group, crm, setup.asm)
        totals = [total_reward(of_one, cfg.mode, setup.coefficients) for of_one in terms]
        if not all(map(math.isfinite, totals)):
            raise RuntimeError(f"a reward of {question.id} is not finite: {totals}")
        rewards = torch.tensor(totals)
        rollouts.append(Rollout(**vars(group), example=question, terms=terms, rewards=rewards))
    return rollouts


def reward_group(
    example: Example, group: Group, crm: CRM, asm: ASM | None
) -> list[dict[str, float]]:
    """Returns every reward term of every completion. With a segmenter mask_dice is among them."""
    sizes = group.prompt.sizes
    terms = []
    for text in group.texts:
        of_completion = crm.answer_format.reward_terms(text, example, sizes)
        if asm is not None:
            of_completion["mask_dice"] = mask_dice_term(asm, example, text, group, crm)
        terms.append(of_completion)
    return terms


def mask_dice_term(asm: ASM, example: Example, text: str, group: Group, crm: CRM) -> float:
    """Returns S_log(Dice) of the mask that the segmenter draws from a completion's boxes and
    points; 0 without a box. BadRow where the example has no true mask."""
    if example.mask is None:
        raise BadRow(
            f"{example.id}: no mask, which the reward term mask_dice needs; leave the term out of "
            "--coefficients"
        )
    regions = []
    for bbox, points in crm.answer_format.parse(text).regions:
        if bbox is not None:
            in_image = None if points is None else to_image(points, group.prompt.sizes)
            regions.append((to_image(bbox, group.prompt.sizes), in_image))
    if not regions:
        return 0.0
    mask, _ = segment_regions(asm, np.asarray(example.image), regions)
    return smooth_log(metrics.mask_dice(mask, example.mask))


def look_at_first(batch: list[Rollout], crm: CRM) -> None:
    """Prints what the very first completions of this rank point to, see learn/SYMPTOMS.md."""
    crm.check_coordinates([group.example for group in batch], batch)
    problems = []
    image_tokens = []
    for group in batch:
        image_tokens.append(int((group.prompt.ids == crm.image_id).sum()))
        for text in group.texts:
            problems.append((text, crm.answer_format.parse(text).problem))
    first_look(problems, image_tokens, crm.model.num_parameters())


def places_of_rank(prompts: int, minibatches: int, ranks: Ranks) -> list[int]:
    """Returns which of a step's questions are this rank's: an equal part of every mini-batch, so
    that a mini-batch is the same on any number of ranks. They are in the order of mini-batches."""
    places = np.arange(prompts).reshape(minibatches, ranks.world, -1)
    return places[:, ranks.rank].ravel().tolist()


# ---------------------------------------------------------------- one optimizer update


def weigh_tokens(minibatch: list[Rollout], cfg: Config, ranks: Ranks) -> None:
    """Sets token_weights of every group: of one optimizer step, over all ranks."""
    own_lengths = [length for group in minibatch for length in group.lengths.tolist()]
    lengths = torch.tensor(ranks.gather(own_lengths))  # (N,) of all ranks
    mask = torch.arange(cfg.max_new_tokens) < lengths[:, None]
    weights = token_weights(mask, cfg.agg, cfg.max_new_tokens)
    own_weights = weights[ranks.rank * len(own_lengths) :][: len(own_lengths)]
    for group, of_group in zip(minibatch, own_weights.split(cfg.group)):
        T = group.tokens.shape[1]
        group.token_weights = of_group[:, :T].to(group.tokens.device)


def update_policy(
    crm: CRM,
    optimizer: Optimizer,
    minibatch: list[Rollout],
    cfg: Config,
    ranks: Ranks,
    lr: float,
    entropy_coef: float,
    stats: StepStats,
) -> float:
    """One optimizer update: forward, loss, backward, step. Returns the gradient's norm.

    The loss is one weighted sum over the tokens of all ranks, so it may be added up pack by pack.
    Adds what is measured to `stats`."""
    weigh_tokens(minibatch, cfg, ranks)
    # A group of equal rewards has no gradient unless KL or entropy moves it. One group is kept all
    # the same: under FSDP all ranks meet in a backward pass, and the logs need a loss.
    live = minibatch
    if cfg.kl_coef == 0 and entropy_coef == 0:
        live = [group for group in minibatch if group.advantages.any()]
        if not live:
            live = minibatch[:1]
    packs = make_packs(live, cfg.pack_tokens)
    # where the model is sharded, ranks with fewer packs repeat their first one with the factor 0
    for pack, factor in equal_passes(ranks, packs, crm.is_sharded):
        scored = score(crm, pack, cfg.temperature, entropy_coef > 0)
        losses = []
        for group, rows, (logp, entropy) in zip(pack.groups, pack.rows, scored):
            weights = factor * group.token_weights[rows]
            # with one update per rollout the policy that sampled is the policy itself
            old_logp = logp.detach() if group.old_logp is None else group.old_logp[rows]
            ref_logp = None if group.ref_logp is None else group.ref_logp[rows]
            loss, measured = grpo_loss(
                logp,
                old_logp,
                ref_logp,
                group.advantages[rows],
                weights,
                clip_low=cfg.clip_low,
                clip_high=cfg.clip_high,
                dual_clip=cfg.dual_clip,
                kl_coef=cfg.kl_coef,
                kl=cfg.kl,
                ratio=cfg.ratio,
                sampler_logp=group.logp[rows],
                sampler_is=cfg.sampler_is,
            )
            mean_entropy = (weights * entropy).sum()
            losses.append(loss - entropy_coef * mean_entropy)
            gap = (old_logp - group.logp[rows]).abs()  # between the scorer and the sampler
            stats.add(
                loss=losses[-1],
                entropy=mean_entropy,
                weight=weights.sum(),
                logp_gap=gap.max(),
                logp_gap_sum=(weights * gap).sum(),
                **measured,
            )
        sum(losses).backward()
    return optimizer.step(lr)  # sums gradients over ranks, clips their norm, updates


# ---------------------------------------------------------------- what is logged


def completion_records(batch: list[Rollout], crm: CRM, ranks: Ranks) -> list[dict]:
    """Returns a record of each completion of all ranks: its text for best_and_worst.jsonl, its
    numbers for metrics.jsonl."""
    records = []
    for rollout in batch:
        of_group = {
            "id": rollout.example.id,
            "query": rollout.example.query,
            **spread(rollout.rewards, rollout.texts),
        }
        for g, text in enumerate(rollout.texts):
            answer = crm.answer_format.parse(text)
            boxes = [bbox for bbox, _ in answer.regions if bbox is not None]
            record = {
                **of_group,
                "text": text,
                "reward": float(rollout.rewards[g]),
                "length": int(rollout.lengths[g]),
                "parse_ok": float(not answer.problem),
                "whole_image": float(any(covers(b, rollout.prompt.sizes.model) for b in boxes)),
                "finished": float(rollout.finished[g]),
                **rollout.terms[g],
            }
            records.append(record)
    return ranks.gather(records)


def best_and_worst(records: list[dict]) -> dict[str, dict]:
    ordered = sorted(records, key=lambda record: record["reward"])
    return {"best": ordered[-1], "worst": ordered[0]}


def step_row(
    records: list[dict],
    totals: dict[str, float],
    grad_norms: list[float],
    terms: Sequence[str],
) -> dict:
    """Returns the numbers of a line of metrics.jsonl: means over the completions of all ranks, and
    statistics of the loss. totals: StepStats.total; terms: names of the reward terms."""
    columns: dict[str, list[float]] = {}
    for name, value in records[0].items():
        if not isinstance(value, str):
            columns[name] = [record[name] for record in records]
    row = {name: sum(values) / len(values) for name, values in columns.items()}
    row["tokens"] = sum(columns["length"])
    row["length_min"] = min(columns["length"])
    row["length_max"] = max(columns["length"])
    finished = [record["length"] for record in records if record["finished"]]
    if finished:
        row["length_finished"] = sum(finished) / len(finished)
    for name in terms:
        row[f"{name}/std"] = float(np.std(columns[name]))

    totals = dict(totals)
    weight = max(totals.pop("weight"), 1e-9)  # the sum of all token weights, over all updates
    totals["logp_gap_mean"] = totals.pop("logp_gap_sum")
    for name, value in totals.items():
        if name == "loss":
            row[name] = value / len(grad_norms)
        elif name in MAXIMA + MINIMA:
            row[name] = value
        else:
            row[name] = value / weight
    finite = [norm for norm in grad_norms if math.isfinite(norm)]
    row["grad_norm"] = sum(finite) / max(1, len(finite))
    row["skipped"] = len(grad_norms) - len(finite)
    return row


def group_record(step: int, split: str, place: int, rollout: Rollout, crm: CRM) -> dict:
    """Returns a group as a line of rollouts.jsonl, from which extras/rollouts.py makes a page.
    place: its number among the groups of its split."""
    record = metrics.prediction(
        rollout.example, place, rollout.texts, rollout.prompt.sizes, crm.answer_format
    )
    for g, completion in enumerate(record["completions"]):
        completion["reward"] = rollout.rewards[g].item()
        completion["advantage"] = rollout.advantages[g].item()
        completion["length"] = rollout.lengths[g].item()
        completion["finished"] = rollout.finished[g].item()
        completion["terms"] = rollout.terms[g]
    return {"step": step, "split": split, **record}


def log_groups(
    run: Run, step: int, tests: Examples, setup: Setup, own: list[tuple[int, Rollout]]
) -> None:
    """Writes whole groups to rollouts.jsonl: of four held-out questions, which are always the same
    and are sampled with the same random numbers, and of the step's first two.

    own: (place, group) of this rank."""
    ranks = run.ranks
    needs_mask = setup.asm is not None
    usable = []
    for i in evenly_spread(len(tests), 8):
        if not needs_mask or tests[i].mask is not None:
            usable.append(i)
    fixed = [usable[i] for i in evenly_spread(len(usable), 4)]
    picks = list(enumerate(fixed))[ranks.rank :: ranks.world]
    with setup.crm.gathered():
        groups = roll_out(setup, tests, picks, step=0)
    records = []
    for (place, _), group in zip(picks, groups):
        group.advantages = group_advantages(group.rewards[None], setup.cfg.norm)[0]
        records.append(group_record(step, "test", place, group, setup.crm))
    for place, group in own:
        if place < 2:
            records.append(group_record(step, "train", place, group, setup.crm))
    records = ranks.gather(records)
    run.log("rollouts", *sorted(records, key=lambda record: (record["split"], record["index"])))


PANELS = {  # of curves.png: title, keys of metrics.jsonl
    "reward": ["reward"],
    "held-out box IoU": ["sampled/iou", "greedy/iou", "sampled/iou_named"],
    "held-out completions": ["sampled/parse_ok", "sampled/named"],
    "reward terms": ["think_format", "answer_format", "box_iou", "point_dice"],
    "completion length (tokens)": ["length"],
    "entropy": ["entropy"],
    "KL to the reference": ["kl"],
}


# ---------------------------------------------------------------- the run


def main(cfg: Config) -> None:
    ranks = Ranks.start()
    with exit_on(ValueError, OSError):
        use_embedded(cfg, {"crm": EMBEDDED["crm"], "data": EMBEDDED["data"]})
        coefficients = parse_coefficients(cfg.coefficients)
        formula, maximum = reward_formula(cfg.mode, coefficients)
        check_sizes(cfg, ranks)
        train, tests = load_splits(cfg.data, cfg.skip_bad_rows, cfg.eval_limit)
        if cfg.eval_every < 0:
            tests = Examples([])
        needs_asm = any(term in coefficients for term in PIXEL_TERMS)
        if needs_asm:
            use_embedded(cfg, {"asm": EMBEDDED["asm"]})
        run = Run(cfg, ranks)  # with --resume it compares all flags, so they are final here
        asm = load_asm(cfg.asm, ranks.device) if needs_asm else None
        torch.manual_seed(cfg.seed)  # LoRA's matrices are the same on every rank
        crm = load_crm(cfg.crm, ranks.device, ranks.dtype(cfg.dtype), cfg.prompt, cfg.resize)
        if run.checkpoint is not None:
            crm.check_settings(run.checkpoint)
        parameters = crm.prepare_training(
            cfg.trainable,
            cfg.lora_rank,
            reference=cfg.kl_coef > 0,
            checkpointing=cfg.checkpointing,
            offload=cfg.offload,
            ranks=ranks if cfg.parallel == "fsdp" else None,
        )
        optimizer = Optimizer(parameters, cfg.weight_decay, crm.is_sharded, cfg.offload)
        start_step = run.begin(optimizer, cfg.steps)  # --resume fills optimizer and weights here
    print0(crm.what_trains())
    print0(f"reward = {formula}, at most {maximum:g}")
    print0(
        f"{len(train)} training questions, {cfg.prompts} x {cfg.group} completions per step on "
        f"{ranks.world} x {ranks.device} -> {run.folder}"
    )
    own_places = places_of_rank(cfg.prompts, cfg.minibatches, ranks)
    per_update = len(own_places) // cfg.minibatches
    updates = cfg.inner_epochs * cfg.minibatches
    setup = Setup(cfg, crm, asm, coefficients)

    if start_step == 0 and len(tests) > 0:
        means = log_held_out(run, crm, tests, cfg, coefficients, step=0, greedy=True)
        run.log("metrics", {"step": 0, **means})
        log_groups(run, 0, tests, setup, own=[])
    if start_step > 0 and ranks.is_main:
        lr_today = learning_rate(start_step - 1, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
        warn_of_jump(run.read("metrics"), lr_today)
    steps = range(start_step, cfg.steps)
    bar = tqdm(steps, initial=start_step, total=cfg.steps, disable=not ranks.is_main, ncols=100)
    for step in bar:
        phases = Phases(ranks)
        stats = StepStats()
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
        entropy_coef = cfg.entropy_coef * (1 - step / cfg.steps)

        # 1. A group of completions for each question of this step. Questions are a pure function of
        #    seed and step. Under FSDP every rank holds the whole model meanwhile.
        indices = step_indices(len(train), cfg.prompts, cfg.seed, step)
        picks = [(place, indices[place]) for place in own_places]
        with (
            run.checkpoint_on_bad_row(step, crm, optimizer),
            crm.gathered(),
            run.interruptible(),
        ):
            batch = roll_out(setup, train, picks, step)
            for attempt in range(1, cfg.resample + 1):
                replace_equal_groups(batch, setup, train, own_places, step, attempt)
        phases.end("sample")
        if step == 0:
            look_at_first(batch, crm)

        # 2. Each completion's advantage over its group. Rewards are those of all ranks.
        rewards = torch.stack(ranks.gather([group.rewards for group in batch]))  # (P, G)
        advantages = group_advantages(rewards, cfg.norm).to(ranks.device)  # (P, G)
        for group, of_group in zip(batch, ranks.share(list(advantages))):
            group.advantages = of_group

        # 3. Log-probabilities under the reference model and, if a step makes several updates, under
        #    the policy that sampled. They are computed as the update will compute them, because the
        #    sampler's kernels round differently.
        if updates > 1:
            with crm.gathered():
                old_logp = all_logp(crm, batch, cfg.pack_tokens, cfg.temperature)
            for group, logp in zip(batch, old_logp):
                group.old_logp = logp
        if cfg.kl_coef > 0:
            with crm.reference(), crm.gathered():
                ref_logp = all_logp(crm, batch, cfg.pack_tokens, cfg.temperature)
            for group, logp in zip(batch, ref_logp):
                group.ref_logp = logp
        phases.end("reference")
        run.leave_if_stopped(step, crm, optimizer)  # nothing of this step is in the weights yet

        # 4. Updates, each with a mini-batch: forward, loss, backward, optimizer.
        grad_norms = []
        for update in range(updates):
            at = (update % cfg.minibatches) * per_update
            minibatch = batch[at : at + per_update]
            norm = update_policy(crm, optimizer, minibatch, cfg, ranks, lr, entropy_coef, stats)
            grad_norms.append(norm)
            if step == 0 and update == 0:
                lengths = [length for group in batch for length in group.lengths.tolist()]
                check_first_step(
                    stats.total(ranks), lengths, crm.compute_dtype, updates, ranks.device.type
                )
        phases.end("update")

        # 5. Log, evaluate on held-out questions, save.
        done = step + 1
        records = completion_records(batch, crm, ranks)
        measured = step_row(records, stats.total(ranks), grad_norms, list(batch[0].terms[0]))
        row = {"step": done, "lr": lr, **measured}
        row |= phases.seconds()
        row["tokens_per_second"] = row["tokens"] / row["seconds"]
        row["peak_memory_gb"] = peak_memory(ranks.device)
        stopped = run.stopped()
        is_due = run.is_due(done, stopped)
        is_last = done == cfg.steps
        evaluates = len(tests) > 0 and run.evaluation_is_due(done) and (is_last or not stopped)
        if evaluates:
            if is_due:  # first: an evaluation takes long, and a cluster may not wait
                run.save(done, crm, optimizer)
            row |= log_held_out(run, crm, tests, cfg, coefficients, done, greedy=is_last)
            log_groups(run, done, tests, setup, own=list(zip(own_places, batch)))
        run.warn(row)
        run.log("metrics", row)
        run.log("best_and_worst", {"step": done, **best_and_worst(records)})
        bar.set_postfix(reward=f"{row['reward']:.2f}", seconds=f"{row['seconds']:.2f}")
        if is_due:
            if not evaluates:  # last: a checkpoint has the rows of all its steps beside it
                run.save(done, crm, optimizer)
            run.curves(PANELS)
        run.give_up_on_skipped()
        if stopped:
            break
    if done == cfg.steps and len(tests) > 0 and ranks.is_main:
        print0(metrics.changes(run.read("held_out"), run.read("metrics")))
    run.finish(done)
    if len(tests) > 0:
        print0(f"see the groups: python -m extras.rollouts {run.folder}")
    ranks.stop()


def check_sizes(cfg: Config, ranks: Ranks) -> None:
    """ValueError where the questions of a step cannot be shared out evenly."""
    unit = ranks.world * cfg.minibatches
    if cfg.prompts % unit != 0:
        enough = math.ceil(cfg.prompts / unit) * unit
        raise ValueError(
            f"--prompts {cfg.prompts}: must be a multiple of ranks x --minibatches, "
            f"{ranks.world} x {cfg.minibatches}, as an update takes whole groups; give --prompts "
            f"{enough} or another number of --minibatches"
        )


def replace_equal_groups(
    batch: list[Rollout],
    setup: Setup,
    train: Examples,
    places: list[int],
    step: int,
    attempt: int,
) -> None:
    """Replaces groups of equal rewards, which teach nothing, by groups of other questions."""
    cfg = setup.cfg
    equal = [i for i, group in enumerate(batch) if group.rewards.min() == group.rewards.max()]
    other_order = cfg.seed + 7919 * attempt  # any prime gives each attempt a seed of its own
    indices = step_indices(len(train), cfg.prompts, other_order, step)
    picks = [(places[i], indices[places[i]]) for i in equal]
    others = roll_out(setup, train, picks, step, attempt)
    for i, group in zip(equal, others):
        batch[i] = group


# flags of former versions, and what to use now
MOVED = {
    "weights": "it is called --coefficients",
    "official": "python -m extras.official_rewards takes the flags of this script",
    "freeze_vision": 'give --trainable "language_model|lm_head"',
    "max_pixels": "give --resize aspect:PIXELS",
    "min_pixels": "a checkpoint remembers it; load_crm(min_pixels=...) sets it",
    "test_data": 'give --data a folder with the splits "train" and "test"',
    "only": "make a data set of the rows that are meant, see paper/experiments.py",
    "timeout": "it is TIMEOUT_MINUTES in runtime/parallel.py",
    "max_grad_norm": "it is MAX_GRAD_NORM in runtime/optim.py",
    "max_skipped": "it is MAX_SKIPPED in runtime/run.py",
    "cuda_graphs": "it is the argument graphs of sampling.sample",
    "mask_truncated": "a change of three lines, see learn/CHANGES.md",
    "eval_answers": "it is EVAL_COMPLETIONS in evaluate.py",
    "coordinates": "they are the checkpoint's; train_sft.py --coordinates teaches others",
    "rollouts_every": "groups are logged at every evaluation: --eval-every",
}


if __name__ == "__main__":
    with exit_on(BadRow), explain_memory():
        main(parse_args(Config, __doc__, recipe=RECIPE, moved=MOVED))
