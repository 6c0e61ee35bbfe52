"""Train the Clinical Reasoning Module with GRPO (arXiv 2402.03300), as MedReasoner does (arXiv 2508.08177).

    python train_grpo.py                      # the embedded default: a tiny model, a small data set, one CPU
    torchrun --nproc-per-node 8 train_grpo.py @recipes/lora_7b.args

For each prompt, sample a group of completions and reward each for its format and for where it points. A completion's
advantage is the number of standard deviations by which its reward exceeds its group's mean. Raise the probability of
completions with a positive advantage, lower that of the others, within a trust region and near the model that training
started from:

    A_i  = (r_i - mean(r)) / (std(r) + eps)                                          group_advantages
    rho  = pi(token) / pi_old(token)                                                 one ratio per token
    L    = - sum_t w_t min(rho A, clip(rho, 1-c, 1+c') A)  +  beta sum_t w_t KL_t     grpo_loss
    KL_t = pi_ref/pi - log(pi_ref/pi) - 1                                            "k3"

Defaults are the paper's but for the sizes (prompts per step, group, tokens, steps); the embedded default's own flags are
in recipes/demo.args.
  Dr. GRPO  --norm none --agg constant --kl-coef 0                             arXiv 2503.20783
  DAPO      --agg token --clip-high 0.28 --resample 3 --kl-coef 0              arXiv 2503.14476
  GSPO      --ratio sequence --clip-low 3e-4 --clip-high 4e-4 --kl-coef 0      arXiv 2507.18071

Differences from the paper, each a flag:
  1. Rewards follow the formulas, not the released code's quirks (--official gives those).
  2. Images keep their aspect ratio (--resize square:840 gives the release's canvas).
Note that k3's value is unbiased, but its gradient is not that of the reverse KL; --kl k2 has that gradient.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from asm import load_asm
from crm import Group
from data import BadRow, Sample, fill_prompt
from rewards import reward_formula, total_reward
from runtime.cli import RunConfig, exit_on, flag, parse_args, parse_weights, print0
from runtime.parallel import Ranks, equal_passes, unsharded
from runtime.run import Run, learning_rate, load_policy, load_splits, sample_indices
from runtime.step import PANELS, add_up, check_first_step, completion_rows, step_row, total_stats
from sampling import sample
from scoring import all_logp, make_packs, score


@dataclass
class Config(RunConfig):  # model, data, optimizer, evaluation, checkpoints: runtime/cli.py
    out: str = flag("runs/grpo", "run folder")
    asm: str | None = flag(None, "segmenter, only loaded for the mask_dice reward")
    # sampling
    steps: int = flag(100, "rollouts", low=1)
    prompts: int = flag(8, "P, prompts per step over all ranks (paper: 128)", low=1)
    group: int = flag(8, "G, completions per prompt (paper: 16)", low=2)
    resample: int = flag(
        0, "how often groups of equal rewards are replaced by other prompts", low=0
    )
    cuda_graphs: bool = flag(True, "on a GPU, replay the sampler's step as a CUDA graph")
    # advantages and loss
    norm: str = flag(
        "group",
        "the std to divide by: the group's, none, or that of all rewards",
        ("group", "none", "batch"),
    )
    agg: str = flag(
        "sequence",
        "how token losses are averaged: see token_weights",
        ("sequence", "token", "constant"),
    )
    ratio: str = flag(
        "token", "pi/pi_old per token, or its geometric mean per completion", ("token", "sequence")
    )
    clip_low: float = flag(0.2, "the ratio's lower bound is 1 - this", low=0)
    clip_high: float = flag(0.2, "the ratio's upper bound is 1 + this", low=0)
    dual_clip: float = flag(
        3.0, "where A < 0, a token gains at least this x A (0: no bound)", low=1, off=0
    )
    kl: str = flag("k3", "estimator of the KL to the reference model", ("k1", "k2", "k3"))
    kl_coef: float = flag(0.01, "beta (0: no reference model is kept)", low=0)
    entropy_coef: float = flag(0.0, "bonus for entropy, decays linearly to 0 over the run", low=0)
    mask_truncated: bool = flag(False, "completions truncated at the limit do not train")
    # updates
    minibatches: int = flag(2, "optimizer updates per rollout and epoch", low=1)
    inner_epochs: int = flag(1, "passes over a rollout", low=1)
    warmup: int = flag(0, "steps of linear warm-up", low=0)
    pack_tokens: int = flag(10240, "most tokens scored at once; longer groups are split", low=1)
    max_skipped: int = flag(
        3, "steps in a row without a finite gradient after which the run ends", low=1
    )
    rollouts_every: int = flag(
        0, "steps between whole groups in rollouts.jsonl (0: at evaluations only)", low=0
    )


# ---------------------------------------------------------------- the algorithm, on plain tensors


def group_advantages(rewards: torch.Tensor, norm: str = "group", eps: float = 1e-6) -> torch.Tensor:
    """Rewards (P, G) -> advantages (P, G): r minus its group's mean, divided by the group's unbiased std, by
    nothing, or by the std of all. A group of equal rewards gets exactly 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = torch.where(
        rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, centred
    )
    if norm == "none":
        return centred
    return centred / ((rewards.std(1, keepdim=True) if norm == "group" else rewards.std()) + eps)


def token_weights(
    mask: torch.Tensor, agg: str = "sequence", max_tokens: int | None = None
) -> torch.Tensor:
    """How much each token counts: mask (N, T) of an optimizer step's completions over all ranks -> (N, T).

    sequence  mean over a completion's tokens, then over completions    sums to 1
    token     mean over all tokens of the step                          sums to 1
    constant  sum / (completions * max_tokens): no length bias          sums to the mean fill
    So a micro-batch's loss is a plain weighted sum, and the gradient does not depend on how the step is cut.
    Rows without tokens (mask_truncated) count as no completion."""
    mask = mask.float()
    completions = mask.any(1).sum().clamp(min=1)
    if agg == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / completions
    return mask / (mask.sum().clamp(min=1) if agg == "token" else completions * max_tokens)


def grpo_loss(
    logp,
    old_logp,
    ref_logp,
    advantages,
    weights,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=3.0,
    kl_coef=0.01,
    kl="k3",
    ratio="token",
):
    """logp, old_logp, ref_logp | None (N, T), advantages (N,), weights (N, T) -> loss (), stats.

    Only logp carries a gradient. The stats are weighted as the loss is, so those of micro-batches add up
    (ratio_max and ratio_min do not: they take the max and the min)."""
    mask, A = weights > 0, advantages[:, None]
    zero = torch.zeros_like(old_logp)  # before exp: inf * 0 is nan
    log_ratio = torch.where(mask, logp - old_logp, zero)
    if ratio == "sequence":  # GSPO, Eq. 7
        log_ratio = (
            log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ).expand_as(mask)
    rho = log_ratio.clamp(-20, 20).exp()
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(rho * A, clipped * A)  # PPO's pessimistic bound
    if dual_clip:
        gain = torch.where(A < 0, torch.maximum(gain, dual_clip * A), gain)  # arXiv 1912.09729
    loss = -(weights * gain).sum()
    stats = {
        "clip_frac": (weights * (clipped * A < rho * A)).sum(),
        "ratio_max": rho.max(),
        "ratio_min": rho.min(),
    }
    if ref_logp is not None:
        x = torch.where(mask, ref_logp - logp, zero).clamp(-20, 20)  # log pi_ref/pi
        estimate = {"k1": -x, "k2": 0.5 * x**2, "k3": (x.exp() - x - 1).clamp(-10, 10)}[kl]
        stats["kl"] = (weights * estimate).sum()
        loss = loss + kl_coef * stats["kl"]
    return loss, {key: value.detach() for key, value in stats.items()}


# ---------------------------------------------------------------- one group, sampled and rewarded


@dataclass
class Rollout(Group):
    """A group, what its completions earned, and what the loss needs from them."""

    sample: Sample
    terms: list[dict[str, float]]  # one dict per completion
    rewards: torch.Tensor  # (G,)
    advantages: torch.Tensor | None = None  # (G,)
    weights: torch.Tensor | None = None  # (G, T) how much each token counts in its optimizer step
    old_logp: torch.Tensor | None = None  # (G, T) under the policy that sampled; None: on-policy
    ref_logp: torch.Tensor | None = None  # (G, T) under the reference model; None: no KL


def reward(
    sample: Sample, group: Group, cfg: Config, weights: dict[str, float], asm, answers
) -> Rollout:
    """Every term of every completion, and the totals. answers: what the prompt asks for, data.OneBox or extras.boxes."""
    frame = group.prompt.frame
    terms = answers.reward_terms(group.texts, sample, frame, cfg.official)
    if asm:
        from extras.mask_reward import mask_rewards

        for term, dice in zip(
            terms, mask_rewards(asm, sample, group.texts, frame, answers, cfg.official)
        ):
            term["mask_dice"] = dice
    totals = [total_reward(term, cfg.mode, weights) for term in terms]
    if not all(map(math.isfinite, totals)):
        raise RuntimeError(f"reward of sample {sample.id} is not finite: {totals}")
    return Rollout(**vars(group), sample=sample, terms=terms, rewards=torch.tensor(totals))


def step_weights(groups: list[Group], cfg: Config, ranks: Ranks) -> list[torch.Tensor]:
    """token_weights of one optimizer step over all ranks; of those, this rank's, (G, T) per group."""
    counted = [
        0 if cfg.mask_truncated and not finished else length
        for group in groups
        for length, finished in zip(group.lengths.tolist(), group.finished.tolist())
    ]
    lengths = torch.tensor(ranks.gather(counted))  # (N,) of all ranks
    mask = torch.arange(cfg.max_new_tokens) < lengths[:, None]
    weights = token_weights(mask, cfg.agg, cfg.max_new_tokens)[ranks.rank * len(counted) :][
        : len(counted)
    ]
    return [
        w[:, : group.tokens.shape[1]].to(group.tokens.device)
        for w, group in zip(weights.view(len(groups), -1, cfg.max_new_tokens), groups)
    ]


# ---------------------------------------------------------------- the loop


def main(cfg: Config) -> None:
    ranks = Ranks.start(cfg.timeout)
    with exit_on(ValueError, OSError):
        factors = parse_weights(cfg.weights)
        if cfg.prompts % (least := ranks.world * cfg.minibatches):
            raise ValueError(
                f"--prompts {cfg.prompts}: must be a multiple of ranks x --minibatches, {ranks.world} x "
                f"{cfg.minibatches}, as an update takes whole groups; give --prompts "
                f"{-(-cfg.prompts // least) * least} or another number of --minibatches"
            )
        train, tests = load_splits(cfg)
        run = Run(cfg, ranks)
        asm = load_asm(cfg.asm, ranks.device) if "mask_dice" in factors else None
        crm, optimizer = load_policy(cfg, ranks, reference=cfg.kl_coef > 0)
        first = run.begin(crm, optimizer, cfg.steps)
    formula, maximum = reward_formula(cfg.mode, factors)
    print0(f"reward = {formula}, at most {maximum:g}")
    print0(
        f"{optimizer.size:,} trainable parameters on {ranks.world} x {ranks.device}, {len(train)} training "
        f"samples, {cfg.prompts} prompts x {cfg.group} completions per step -> {run.folder}"
    )
    # which of a step's prompts are this rank's: an equal part of every mini-batch, which is the same on any number of ranks
    places = (
        np.arange(cfg.prompts)
        .reshape(cfg.minibatches, ranks.world, -1)[:, ranks.rank]
        .ravel()
        .tolist()
    )
    per_update, updates = len(places) // cfg.minibatches, cfg.inner_epochs * cfg.minibatches

    def roll_out(
        places: list[int], indices: list[int], step: int, attempt: int = 0, split=train
    ) -> list[Rollout]:
        samples = [split[indices[p]] for p in places]
        prompts = [crm.encode(s.image, fill_prompt(crm.template, s.query)) for s in samples]
        seeds = [
            (cfg.seed, 0, step, p, indices[p], attempt) for p in places
        ]  # the same on any rank
        groups = sample(
            crm, prompts, cfg.group, cfg.max_new_tokens, cfg.temperature, seeds, cfg.cuda_graphs
        )
        return [reward(s, g, cfg, factors, asm, crm.answers) for s, g in zip(samples, groups)]

    if first == 0 and tests:
        run.log("metrics", {"step": 0, **run.evaluate(crm, tests, factors, 0, greedy=True)})
        run.log_groups(0, crm, tests, roll_out, group_advantages)
    bar = tqdm(
        range(first, cfg.steps), initial=first, total=cfg.steps, disable=ranks.rank > 0, ncols=100
    )
    for step in bar:
        clock = [ranks.clock()]

        # 1. this rank's prompts, a pure function of seed and step; a group of completions of each, rewarded
        #    (unsharded: under FSDP every rank holds the whole model meanwhile)
        indices = sample_indices(len(train), cfg.prompts, cfg.seed, step)
        with run.checkpoint_on_bad_row(step, crm, optimizer), unsharded(crm):
            batch = roll_out(places, indices, step)
            for attempt in range(1, cfg.resample + 1):  # replace groups of equal rewards
                equal = [
                    i for i, group in enumerate(batch) if group.rewards.min() == group.rewards.max()
                ]
                others = sample_indices(len(train), cfg.prompts, cfg.seed + 7919 * attempt, step)
                for i, group in zip(
                    equal, roll_out([places[i] for i in equal], others, step, attempt)
                ):
                    batch[i] = group
        clock.append(ranks.clock())

        # 2. advantages, over the groups of all ranks
        rewards = torch.stack(
            ranks.gather([group.rewards for group in batch])
        )  # (P, G), rank after rank
        advantages = group_advantages(rewards, cfg.norm).to(ranks.device)
        for group, A in zip(batch, advantages[ranks.rank * len(batch) :]):
            group.advantages = A

        # 3. log-probabilities under the reference model and, where a step makes several updates, under the policy
        #    that sampled: computed as the update will, because the sampler's kernels round differently. With one
        #    update pi_old is the policy itself, and logp.detach() serves
        if cfg.kl_coef:
            with crm.reference(), unsharded(crm):
                for group, logp in zip(
                    batch, all_logp(crm, batch, cfg.pack_tokens, cfg.temperature)
                ):
                    group.ref_logp = logp
        if updates > 1:
            with unsharded(crm):
                for group, logp in zip(
                    batch, all_logp(crm, batch, cfg.pack_tokens, cfg.temperature)
                ):
                    group.old_logp = logp
        clock.append(ranks.clock())

        # 4. updates: the loss of each is one weighted sum over the tokens of all ranks
        stats, grad_norms = {}, []
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
        entropy_coef = cfg.entropy_coef * (1 - step / cfg.steps)
        for update in range(updates):
            start = (update % cfg.minibatches) * per_update
            minibatch = batch[start : start + per_update]
            for group, weights in zip(minibatch, step_weights(minibatch, cfg, ranks)):
                group.weights = weights
            # a group of equal rewards has no gradient, unless KL or entropy moves it; one is kept, for a backward pass
            live = [
                g for g in minibatch if cfg.kl_coef or entropy_coef or g.advantages.any()
            ] or minibatch[:1]
            for pack, real in equal_passes(
                crm, ranks, make_packs(live, cfg.pack_tokens)
            ):  # real: 1, or 0 to wait
                losses = []
                scored = score(crm, pack, cfg.temperature, entropy_coef > 0)  # the forward pass
                for (group, rows), (logp, entropy) in zip(pack, scored):
                    weights = real * group.weights[rows]
                    old_logp = logp.detach() if group.old_logp is None else group.old_logp[rows]
                    ref_logp = None if group.ref_logp is None else group.ref_logp[rows]
                    loss, new = grpo_loss(
                        logp,
                        old_logp,
                        ref_logp,
                        group.advantages[rows],
                        weights,
                        cfg.clip_low,
                        cfg.clip_high,
                        cfg.dual_clip,
                        cfg.kl_coef,
                        cfg.kl,
                        cfg.ratio,
                    )
                    mean_entropy = (weights * entropy).sum()
                    losses.append(loss - entropy_coef * mean_entropy)
                    add_up(
                        stats,
                        new
                        | {"loss": losses[-1], "entropy": mean_entropy, "scored": weights.sum()},
                    )
                    if update == 0:  # how far the sampler is from the scorer
                        gap = (logp.detach() - group.logp[rows]).abs()
                        add_up(stats, {"logp_gap": gap.max(), "gap_sum": (weights * gap).sum()})
                sum(losses).backward()
            if update == 0:
                at_start = dict(stats)
            grad_norms.append(
                optimizer.step(lr, cfg.max_grad_norm)
            )  # sums over ranks, clips, updates
        clock.append(ranks.clock())

        # 5. numbers over all ranks, warnings, the held-out split, checkpoints
        done = step + 1
        completions = ranks.gather(
            [row for group in batch for row in completion_rows(group, crm.answers)]
        )
        row = {
            "step": done,
            **step_row(completions, total_stats(stats, ranks), grad_norms, lr, clock, ranks.device),
        }
        if step == 0:
            check_first_step(total_stats(at_start, ranks), completions, crm.model.dtype)
        stopped = run.stopped()
        if tests and run.evaluation_due(done):
            row |= run.evaluate(crm, tests, factors, done, greedy=done == cfg.steps)
        run.warn(row)
        run.log("metrics", row)
        ranked = sorted(completions, key=lambda completion: completion["reward"])
        run.log("samples", {"step": done, "best": ranked[-1], "worst": ranked[0]})
        run.log_groups(done, crm, tests, roll_out, group_advantages, own=zip(places, batch))
        bar.set_postfix({key: f"{row[key]:.2f}" for key in ("reward", "seconds")})
        if run.due(done, stopped):
            run.save(done, crm, optimizer)
            run.curves(PANELS)
        run.give_up_after(cfg.max_skipped)
        if stopped:
            break
    run.finish(done, compare=bool(tests))
    ranks.stop()


def needs(cfg: Config) -> list[str]:
    """Which embedded defaults a command line may fall back on."""
    return ["crm", "data", "asm"] if "mask_dice" in cfg.weights else ["crm", "data"]


if __name__ == "__main__":
    with exit_on(BadRow):
        main(parse_args(Config, __doc__, "recipes/demo.args", embedded=needs))
