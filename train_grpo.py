"""Train the Clinical Reasoning Module with GRPO (arXiv 2402.03300), as MedReasoner does (arXiv 2508.08177).

    python train_grpo.py                      # the embedded default: a tiny model, a small data set, one CPU
    torchrun --nproc-per-node 8 train_grpo.py @recipes/lora_7b.args

For each question, sample a group of answers and reward each for its format and for where it points. An answer
is better or worse by how far it lies above its own group's mean, in standard deviations: its advantage. Raise
the probability of the better, lower that of the worse, within a trust region and near where we started from:

    A_i  = (r_i - mean(r)) / (std(r) + eps)                                          group_advantages
    rho  = pi(token) / pi_old(token)                                                 one number a token
    L    = - sum_t w_t min(rho A, clip(rho, 1-c, 1+c) A)  +  beta sum_t w_t KL_t     grpo_loss
    KL_t = pi_ref/pi - log(pi_ref/pi) - 1                                            "k3"

Defaults are the paper's; the sizes (prompts a step, group, tokens, steps) are the embedded default's.
Differences from the paper, each a flag:
  1. Rewards follow the formulas, not the released code's quirks (--official gives those).
  2. Images keep their aspect ratio (--resize square:840 gives the release's canvas).
  3. k3's value is unbiased, but its gradient is not that of the reverse KL; --kl k2 has that gradient.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from asm import load_asm
from bench.memory import dry_run
from crm import Group, load_crm
from data import (MAX_PIXELS, MIN_PIXELS, BadRow, Sample, clip_to, fill_prompt, load_prompt, model_size,
                  to_image, to_model)
from rewards import MODES, parse_answer, reward_terms, smooth_log, total_reward
from runtime.cli import exit_on, flag, parse_args, print0
from runtime.files import read_torch
from runtime.step import PANELS, add_up, check_first_step, completion_rows, step_row, to_floats, warnings_of
from runtime.optim import Optimizer
from runtime.parallel import KINDS as PARALLEL
from runtime.parallel import Ranks, deal, gathered, passes, spread
from runtime.run import Run, learning_rate, load_splits, sample_indices
from scoring import KINDS


@dataclass
class Config:
    # what
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    asm: str | None = flag(None, "segmenter, only loaded for the mask_dice reward")
    out: str = flag("runs/grpo", "run folder")
    resume: str = flag("no", "go on from the last checkpoint in --out; auto: if there is one",
                       ("no", "yes", "auto"), bare="yes")
    seed: int = flag(0, "of everything random")
    dtype: str = flag("auto", "of the model: auto is bfloat16 on CUDA, float32 elsewhere",
                      ("auto", "float32", "bfloat16"))
    parallel: str = flag("ddp", "how the model is spread over torchrun's ranks, see parallel.py", PARALLEL)
    timeout: float = flag(30, "minutes that a rank waits for the others")
    dry_run: int = flag(0, "of a run on this many GPUs: build all but the weights, say what it needs, stop")
    only: str = flag("", "train only on super-categories whose name has a match of this regular expression")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    # prompts and images
    prompt: str = flag("reasoning", "reasoning, direct, or a text file with {query}")
    resize: str = flag("aspect", "aspect, or square:SIDE")
    min_pixels: int = flag(MIN_PIXELS, "smallest image, model frame")
    max_pixels: int = flag(MAX_PIXELS, "largest image, model frame")
    # sampling
    steps: int = flag(100, "rollouts")
    prompts: int = flag(8, "P, prompts a step over all ranks (paper: 128)")
    group: int = flag(8, "G, answers to a prompt (paper: 16)")
    max_new_tokens: int = flag(128, "an answer's limit (paper: 2048)")
    temperature: float = flag(1.0, "samples and scores")
    resample: int = flag(0, "times that groups whose rewards are all equal are replaced by other prompts")
    # rewards
    mode: str = flag("soft", "reward mode", tuple(MODES))
    weights: str = flag("", "factors of terms, e.g. box_iou=2,mask_dice=1 (a term outside the mode is added)")
    official: bool = flag(False, "rewards as the released code computes them")
    # advantages and loss
    norm: str = flag("group", "divides advantages: the std of the group, nothing, or the std of the batch",
                     ("group", "none", "batch"))
    agg: str = flag("sequence", "mean per answer, then of answers; mean of all tokens; sum / max_new_tokens",
                    ("sequence", "token", "constant"))
    clip_low: float = flag(0.2, "ratio's lower bound is 1 - this")
    clip_high: float = flag(0.2, "ratio's upper bound is 1 + this")
    dual_clip: float = flag(3.0, "bound on the loss of a bad answer's token (0: none)")
    kl: str = flag("k3", "estimator of the KL to the reference", ("k1", "k2", "k3"))
    kl_coef: float = flag(0.01, "beta (0: no reference policy is kept)")
    mask_truncated: bool = flag(False, "answers cut at the limit do not train")
    # updates
    minibatches: int = flag(2, "optimizer updates a rollout and epoch")
    inner_epochs: int = flag(1, "passes over a rollout")
    lr: float = flag(1e-6, "peak learning rate")
    warmup: int = flag(0, "steps of linear warm-up")
    schedule: str = flag("constant", "after warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.01, "AdamW's")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    max_skipped: int = flag(3, "steps in a row without a finite gradient after which to give up")
    replay: str = flag("", "look for the group that spoilt a step: the run's skipped_*.pt, --crm beside it")
    lora_rank: int = flag(0, "train LoRA matrices of this rank instead of the whole model")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    trainable: str = flag("", "train only parameters whose name has a match of this regular expression")
    checkpointing: bool = flag(False, "recompute activations in backward")
    offload: bool = flag(False, "keep the reference, master weights and AdamW's moments in host memory")
    # speed: the same numbers, only sooner (off: dense, no-share-vision, no-drop-finished, pack-tokens 1)
    attention: str = flag("rows", "how answers that share a prompt attend, see attention.py", KINDS)
    share_vision: bool = flag(True, "features of a frozen vision tower are computed once a step")
    drop_finished: bool = flag(True, "answers that ended leave the sampler's batch")
    cuda_graphs: bool = flag(False, "replay the sampler's step as a CUDA graph; its cache stays in memory")
    pack_tokens: int = flag(8192, "most tokens scored at once; groups share a stream, longer ones are cut")
    # looking
    eval_every: int = flag(50, "steps between held-out evaluations (0: only first and last; -1: none)")
    eval_answers: int = flag(4, "sampled answers to a held-out question")
    eval_limit: int = flag(0, "held-out samples used (0: all)")
    save_every: int = flag(100, "steps between checkpoints (0: only the last; -1: none)")
    keep: int = flag(0, "newest checkpoints kept, beside the best evaluated (0: all)")


# ---------------------------------------------------------------- the algorithm, on plain tensors

def group_advantages(rewards: torch.Tensor, norm: str = "group", eps: float = 1e-6) -> torch.Tensor:
    """Rewards (P, G) -> advantages (P, G): r minus its group's mean, divided by the group's unbiased std
    (GRPO), by nothing (arXiv 2503.20783), or by the std of all. A group of equal rewards gets exactly 0."""
    centred = rewards - rewards.mean(1, keepdim=True)
    centred = torch.where(rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True), 0.0, centred)
    if norm == "none":
        return centred
    return centred / ((rewards.std(1, keepdim=True) if norm == "group" else rewards.std()) + eps)


def token_weights(mask: torch.Tensor, agg: str = "sequence", max_tokens: int | None = None) -> torch.Tensor:
    """How much each token counts: mask (N, T) of an optimizer step's rows over all ranks -> weights (N, T).

    sequence  mean over an answer's tokens, then over answers                  sums to 1
    token     mean over all tokens of the step (arXiv 2503.14476)              sums to 1
    constant  sum / (answers * max_tokens), no length bias (arXiv 2503.20783)  sums to the mean fill
    So a micro-batch's loss is a plain weighted sum, and the gradient does not depend on how the step is cut.
    Rows without tokens (mask_truncated) count as no answer."""
    mask = mask.float()
    answers = mask.any(1).sum().clamp(min=1)
    if agg == "sequence":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / answers
    return mask / (mask.sum().clamp(min=1) if agg == "token" else answers * max_tokens)


def grpo_loss(logp, old_logp, ref_logp, advantages, weights, clip_low=0.2, clip_high=0.2, dual_clip=3.0,
              kl_coef=0.01, kl="k3"):
    """logp, old_logp, ref_logp | None (N, T), advantages (N,), weights (N, T) -> loss (), stats.

    Only logp carries a gradient. The stats are weighted as the loss is, so those of micro-batches add up
    (ratio_max and ratio_min do not: they take the max and the min)."""
    mask, A = weights > 0, advantages[:, None]
    zero = torch.zeros_like(old_logp)                                       # before exp: inf * 0 is nan
    ratio = torch.where(mask, logp - old_logp, zero).clamp(-20, 20).exp()   # rho
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    gain = torch.minimum(ratio * A, clipped * A)                            # PPO's pessimistic bound
    if dual_clip:
        gain = torch.where(A < 0, torch.maximum(gain, dual_clip * A), gain) # arXiv 1912.09729
    loss = -(weights * gain).sum()
    stats = {"clip_frac": (weights * (clipped * A < ratio * A)).sum(),
             "ratio_max": ratio.max(), "ratio_min": ratio.min()}
    if ref_logp is not None:
        x = torch.where(mask, ref_logp - logp, zero).clamp(-20, 20)         # log pi_ref/pi
        estimate = {"k1": -x, "k2": 0.5 * x ** 2, "k3": (x.exp() - x - 1).clamp(-10, 10)}[kl]
        stats["kl"] = (weights * estimate).sum()
        loss = loss + kl_coef * stats["kl"]
    return loss, {key: value.detach() for key, value in stats.items()}


# ---------------------------------------------------------------- one group, sampled and rewarded

@dataclass
class Rollout:
    """One question, its G answers and what they earned."""
    sample: Sample
    group: Group
    terms: list[dict[str, float]]               # a dict an answer
    rewards: torch.Tensor                       # (G,)
    advantages: torch.Tensor | None = None      # (G,)
    weights: torch.Tensor | None = None         # (G, T) how much each token counts in its optimizer step
    old_logp: torch.Tensor | None = None        # (G, T) under the policy that sampled, as the scorer sees it
    ref_logp: torch.Tensor | None = None        # (G, T) under the reference policy


def parse_weights(text: str) -> dict[str, float]:
    try:
        pairs = [item.split("=") for item in text.split(",") if item]
        weights = {name.strip(): float(value) for name, value in pairs}
    except ValueError:
        raise ValueError(f"--weights {text}: give term=number, separated by commas") from None
    known = dict.fromkeys([*MODES["hard"], *MODES["base"], "mask_dice"], 0.0)
    total_reward(known, "soft", weights)                    # a ValueError names the unknown term
    return weights


def reward(sample: Sample, group: Group, cfg: Config, weights: dict[str, float], asm) -> Rollout:
    """Every term of every answer, in the model frame, and the totals."""
    frame, terms = group.prompt.frame, []
    gt_box, gt_points = to_model(sample.bbox, frame), to_model(sample.points, frame)
    for text in group.texts:
        terms.append(reward_terms(text, gt_box, gt_points, cfg.official))
        if asm:
            terms[-1]["mask_dice"] = mask_dice(asm, sample, parse_answer(text, cfg.official), frame)
    totals = [total_reward(t, cfg.mode, weights) for t in terms]
    if not all(map(math.isfinite, totals)):
        raise RuntimeError(f"reward of sample {sample.id} is not finite: {totals}")
    return Rollout(sample, group, terms, torch.tensor(totals))


def mask_dice(asm, sample: Sample, answer, frame) -> float:
    """S_log(Dice) of the frozen segmenter's mask for this answer; 0 without a box."""
    if sample.mask is None:
        raise BadRow(f"sample {sample.id}: no mask, which the mask_dice reward needs; drop it from --weights")
    if not answer.bbox:
        return 0.0
    box = [clip_to(sample.image.size, to_image(answer.bbox, frame))]
    points = answer.points and [clip_to(sample.image.size, to_image(answer.points, frame))]
    mask, _ = asm.segment(np.asarray(sample.image), box, points)
    return smooth_log(2 * (mask[0] & sample.mask).sum() / (mask[0].sum() + sample.mask.sum()))


def step_weights(groups: list[Group], cfg: Config, ranks: Ranks) -> list[torch.Tensor]:
    """token_weights of one optimizer step over all ranks; this rank's share, (G, T) a group."""
    lengths = [n if ended or not cfg.mask_truncated else 0
               for group in groups for n, ended in zip(group.lengths.tolist(), group.finished.tolist())]
    everyone = torch.tensor(ranks.gather(lengths))
    weights = token_weights(torch.arange(cfg.max_new_tokens) < everyone[:, None], cfg.agg, cfg.max_new_tokens)
    mine = weights[ranks.rank * len(lengths):][:len(lengths)].view(len(groups), -1, cfg.max_new_tokens)
    return [w[:, :group.tokens.shape[1]].to(group.tokens.device) for w, group in zip(mine, groups)]


# ---------------------------------------------------------------- a step that went wrong, group by group

def keep_batch(path, batch: list[Rollout]) -> None:
    """All that --replay needs of the groups of a step whose gradient was not finite."""
    keys = ("advantages", "weights", "old_logp", "ref_logp")
    torch.save([{"id": r.sample.id, "query": r.sample.query, "image": torch.tensor(np.array(r.sample.image)),
                 "texts": r.group.texts, "tokens": r.group.tokens, "lengths": r.group.lengths,
                 **{key: getattr(r, key) for key in keys}} for r in batch], path)


def replay(cfg: Config) -> None:
    """Loss and gradient of each group of a kept batch by itself, under --crm as it was then."""
    ranks = Ranks.start()
    with exit_on(ValueError, OSError):
        batch, template = read_torch(cfg.replay, ranks.device), load_prompt(cfg.prompt)
        crm = load_crm(cfg.crm, ranks.device, ranks.dtype(cfg.dtype), resize=cfg.resize,
                       min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels,
                       checkpointing=cfg.checkpointing, attention=cfg.attention)
    parameters = list(crm.trainable(cfg.trainable).values())
    for kept in batch:
        image = Image.fromarray(kept["image"].cpu().numpy())
        prompt = crm.encode(image, fill_prompt(template, kept["query"]))
        tokens, lengths, old, ref = (kept[key] for key in ("tokens", "lengths", "old_logp", "ref_logp"))
        group = Group(prompt, tokens, lengths, old, lengths > 0, kept["texts"])
        logp = crm.logp(group, range(len(lengths)), cfg.temperature)
        loss, _ = grpo_loss(logp, old, ref, kept["advantages"], kept["weights"], cfg.clip_low, cfg.clip_high,
                            cfg.dual_clip, cfg.kl_coef, cfg.kl)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        norm = torch.stack([g.float().norm() for g in gradients if g is not None]).norm().item()
        print0(f"{kept['id']}: loss {loss.item():.4g}, gradient {norm:.4g}, lowest log-probability "
            f"{logp.min().item():.4g}" + ("" if math.isfinite(norm) else "   <- not finite"))


# ---------------------------------------------------------------- the loop

def main(cfg: Config) -> None:
    ranks = Ranks.start(cfg.timeout)
    with exit_on(ValueError, OSError):
        factors, template = parse_weights(cfg.weights), load_prompt(cfg.prompt)
        mine, rest = divmod(cfg.prompts, ranks.world)               # whole groups stay on one rank
        if cfg.group < 2 or rest or mine % cfg.minibatches or not mine:
            raise ValueError("--group must be at least 2 and --prompts a multiple of ranks x --minibatches "
                             f"({ranks.world} x {cfg.minibatches}); got {cfg.group} and {cfg.prompts}")
        if cfg.temperature <= 0:
            raise ValueError("--temperature must be positive: equal answers leave nothing to compare")
        train, tests = load_splits(cfg)
        if cfg.dry_run:
            return print0(dry_run(cfg, train))
        run, dtype = Run(cfg, ranks), ranks.dtype(cfg.dtype)
        asm = load_asm(cfg.asm, ranks.device) if "mask_dice" in factors else None
        torch.manual_seed(cfg.seed)                                 # LoRA's matrices: the same on every rank
        crm = load_crm(cfg.crm, ranks.device, dtype, cfg.lora_rank, reference=cfg.kl_coef > 0,
                       freeze_vision=cfg.freeze_vision, checkpointing=cfg.checkpointing, resize=cfg.resize,
                       min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels, attention=cfg.attention,
                       share_vision=cfg.share_vision, drop_finished=cfg.drop_finished,
                       offload=cfg.offload, cuda_graphs=cfg.cuda_graphs)
        crm.trainable(cfg.trainable)
        kind = spread(crm, cfg.parallel, ranks, cfg.offload)
        optimizer = Optimizer(crm.trainable(cfg.trainable), cfg.weight_decay, kind, cfg.offload)
        first = run.begin(optimizer, cfg.steps)
    share = mine // cfg.minibatches                                 # a rank's prompts in an optimizer step
    print0(f"{optimizer.size:,} trainable parameters on {ranks.world} x {ranks.device}, {len(train)} "
        f"training samples, {cfg.prompts} prompts x {cfg.group} answers a step -> {run.folder}")

    def pixels(i) -> int:                                           # what makes one prompt longer than others
        return math.prod(model_size(train[i].image.size, cfg.resize, cfg.min_pixels, crm.max_pixels))

    def roll_out(places, indexes, step, attempt=0) -> list[Rollout]:
        indexes = [indexes[p] for p in places]
        samples = [train[i] for i in indexes]
        prompts = [crm.encode(s.image, fill_prompt(template, s.query)) for s in samples]
        seeds = [(cfg.seed, 0, step, p, i, attempt) for p, i in zip(places, indexes)]  # not of the rank
        groups = crm.sample(prompts, cfg.group, cfg.max_new_tokens, cfg.temperature, seeds)
        return [reward(s, g, cfg, factors, asm) for s, g in zip(samples, groups)]

    @torch.no_grad()
    def logp_of(groups) -> list[torch.Tensor]:                      # (G, T) each
        filled = [torch.zeros_like(group.logp) for group in groups]
        for stream in crm.packs(groups, cfg.pack_tokens):
            scored = crm.score([(groups[i], rows) for i, rows in stream], cfg.temperature)
            for (i, rows), (logp, _) in zip(stream, scored):
                filled[i][rows] = logp
        return filled

    if first == 0 and tests:
        run.log("metrics", {"step": 0, **run.evaluate(crm, tests, template, factors, 0, greedy=True)})
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, disable=ranks.rank > 0, ncols=100)
    start, said, skipped = None, set(), 0       # the first step's numbers, warnings given, bad steps in a row
    for step in bar:
        clock = [ranks.clock()]

        # 1. prompts, a pure function of seed and step; a group of answers to each, and what they earn
        indexes = sample_indices(len(train), cfg.prompts, cfg.seed, step)
        places = deal(indexes, pixels, ranks, cfg.minibatches)
        with gathered(crm):
            batch = roll_out(places, indexes, step)
            for attempt in range(1, cfg.resample + 1):              # replace groups that teach nothing
                dull = [p for p, r in enumerate(batch) if r.rewards.min() == r.rewards.max()]
                fresh = sample_indices(len(train), cfg.prompts, cfg.seed + 7919 * attempt, step)
                again = [places[p] for p in dull]
                for p, r in zip(dull, roll_out(again, fresh, step, attempt) if dull else []):
                    batch[p] = r
        clock.append(ranks.clock())

        # 2. advantages, over the groups of all ranks
        rewards = torch.stack(ranks.gather([r.rewards for r in batch]))     # (P, G), rank after rank
        advantages = group_advantages(rewards, cfg.norm).to(ranks.device)
        for r, A in zip(batch, advantages.split(mine)[ranks.rank]):
            r.advantages = A

        # 3. log-probabilities under the reference, and under the policy that sampled. the first mini-batch is
        # on-policy: its own forward gives them
        if cfg.kl_coef:
            with crm.reference(), gathered(crm):
                for r, logp in zip(batch, logp_of([r.group for r in batch])):
                    r.ref_logp = logp
        with gathered(crm):
            for r, logp in zip(batch[share:], logp_of([r.group for r in batch[share:]])):
                r.old_logp = logp
        for r in batch[:share]:
            r.old_logp = torch.zeros_like(r.group.logp)
        clock.append(ranks.clock())

        # 4. updates: the loss of each is one weighted sum over the tokens of all ranks
        stats, grad_norms = {}, []
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.schedule)
        for update in range(cfg.inner_epochs * cfg.minibatches):
            part = batch[update % cfg.minibatches * share:][:share]
            for r, weights in zip(part, step_weights([r.group for r in part], cfg, ranks)):
                r.weights = weights
            # where all advantages are 0 and there is no KL, the gradient is exactly 0
            live = [r for r in part if cfg.kl_coef or r.advantages.any()] or part[:1]
            streams = crm.packs([r.group for r in live], cfg.pack_tokens)
            for stream, counts in passes(crm, ranks, streams):
                scored = crm.score([(live[i].group, rows) for i, rows in stream], cfg.temperature)
                losses = []
                for (i, rows), (logp, entropy) in zip(stream, scored):
                    r, weight = live[i], counts * live[i].weights[rows]
                    if update == 0:
                        r.old_logp[rows] = logp.detach()                # the ratio is exactly 1
                        gap = (logp.detach() - r.group.logp[rows]).abs()
                        add_up(stats, {"logp_gap": gap.max(), "gap_sum": (weight * gap).sum()})
                    loss, s = grpo_loss(logp, r.old_logp[rows], r.ref_logp[rows] if cfg.kl_coef else None,
                                        r.advantages[rows], weight, cfg.clip_low, cfg.clip_high,
                                        cfg.dual_clip, cfg.kl_coef, cfg.kl)
                    losses.append(loss)
                    add_up(stats, {**s, "loss": loss.detach(), "entropy": (weight * entropy).sum(),
                                   "scored": weight.sum()})
                sum(losses).backward()
            if update == 0:
                at_start = dict(stats)
            grad_norms.append(optimizer.step(lr, cfg.max_grad_norm))
        clock.append(ranks.clock())

        # 5. look: numbers over all ranks, the best and the worst answer, the held-out split, the pictures
        answers = ranks.gather([row for r in batch for row in completion_rows(r)])
        if step == 0:
            check_first_step(at_start, answers, dtype)
        done, total = step + 1, {}
        for other in ranks.gather([to_floats(stats)]):
            add_up(total, other)
        row = {"step": done, **step_row(answers, total, grad_norms, lr, clock, ranks.device)}
        start = start or row
        for worry in warnings_of(row, start):
            if worry not in said:
                said.add(worry)
                print0(f"\nstep {done}: {worry}")
        skipped = skipped + 1 if row["skipped"] else 0
        if row["skipped"]:                              # what spoilt it can be looked for with --replay
            keep_batch(run.folder / f"skipped_{done:06d}_{ranks.rank}.pt", batch)
        stopped = run.stopped()
        if tests and (done == cfg.steps or cfg.eval_every > 0 and done % cfg.eval_every == 0):
            row |= run.evaluate(crm, tests, template, factors, done, greedy=done == cfg.steps)
        run.log("metrics", row)
        by_reward = sorted(answers, key=lambda answer: answer["reward"])
        run.log("samples", {"step": done, "best": by_reward[-1], "worst": by_reward[0]})
        bar.set_postfix(reward=f"{row['reward']:.2f}", iou=f"{row['box_iou']:.2f}", s=f"{row['seconds']:.1f}")
        if run.due(done, stopped or row["skipped"]):
            saved = run.save(done, crm, optimizer)
            run.curves(PANELS)
        if skipped == cfg.max_skipped:
            raise RuntimeError(f"{skipped} steps in a row without a finite gradient; --resume goes on from "
                               "the last checkpoint, with a lower --lr, say")
        if stopped:
            break
    if tests and not stopped:
        run.report()
    print0(f"weights {saved}, numbers {run.folder / 'metrics.jsonl'}, picture {run.folder / 'curves.png'}")
    ranks.stop(crm)


if __name__ == "__main__":
    with exit_on(BadRow):
        config = parse_args(Config, __doc__, "recipes/demo.args")
        (replay if config.replay else main)(config)
