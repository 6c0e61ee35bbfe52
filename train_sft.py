"""Supervised fine-tuning: the warm start before GRPO, and the paper's baseline (arXiv 2508.08177, section 5).

    python train_sft.py --steps 200 --lr 1e-3
    torchrun --nproc-per-node 8 train_sft.py @recipes/sft_7b.args

Cross-entropy on the true completion, with the reasoning trace where the data has one, through the same packed
forward, prompts, samples, logs and checkpoints as train_grpo.py:

    L = - (1 / tokens of the step) sum_t log pi(token_t | image, question, tokens before)

Defaults are the paper's (lr 5e-6, cosine, warm-up 0.1, 5 epochs) except the batch (128), which suits the embedded
default. Difference from the paper: the trace is learned, too (--no-think leaves it out).
"""

from dataclasses import dataclass

from tqdm import tqdm

from data import BadRow, fill_prompt
from runtime.cli import RunConfig, exit_on, flag, parse_args, print0
from runtime.parallel import Ranks, equal_passes, peak_memory
from runtime.run import Run, learning_rate, load_policy, load_splits, sample_indices
from scoring import group_of, score

PANELS = {
    "cross-entropy (nats per token)": ["loss"],
    "held-out box IoU": ["sampled/iou", "greedy/iou"],
}


@dataclass
class Config(RunConfig):  # model, data, evaluation, checkpoints: runtime/cli.py
    out: str = flag("runs/sft", "run folder")
    think: bool = flag(
        True, "learn the reasoning trace where the data has one and the prompt asks for it"
    )
    batch: int = flag(32, "samples per step over all ranks (paper: 128)", low=1)
    micro_batch: int = flag(32, "samples of a rank in one forward pass", low=1)
    epochs: float = flag(5.0, "passes over the data", above=0)
    steps: int = flag(0, "optimizer steps (0: from --epochs)", low=0)
    lr: float = flag(5e-6, "peak learning rate", above=0)
    warmup_ratio: float = flag(0.1, "part of the steps with linear warm-up", low=0, high=1)
    schedule: str = flag("cosine", "after warm-up", ("constant", "linear", "cosine"))
    eval_every: int = flag(
        0, "steps between held-out evaluations (0: first and last only; -1: none)", low=-1
    )
    save_every: int = flag(500, "steps between checkpoints (0: only the last; -1: none)", low=-1)


def main(cfg: Config) -> None:
    ranks = Ranks.start(cfg.timeout)
    with exit_on(ValueError, OSError):
        if cfg.batch % ranks.world:
            raise ValueError(f"--batch {cfg.batch}: give a multiple of the {ranks.world} ranks")
        train, tests = load_splits(cfg)
        run = Run(cfg, ranks)
        crm, optimizer = load_policy(cfg, ranks)
        steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch))
        first = run.begin(crm, optimizer, steps)
    print0(
        f"{optimizer.size:,} trainable parameters on {ranks.world} x {ranks.device}, {len(train)} training "
        f"samples, {steps} steps of {cfg.batch} -> {run.folder}"
    )

    think = cfg.think and "<think>" in crm.template
    if think and not any(row["think"] for row in train.rows):
        print0(
            'warning: the prompt asks for a trace, but no training row has one in "think", so the model unlearns to '
            "reason; add traces, or give --prompt direct"
        )

    def true_completion(sample):
        """A group of one completion, the one that a perfect model would write."""
        prompt = crm.encode(sample.image, fill_prompt(crm.template, sample.query))
        return group_of(crm, prompt, [crm.answers.target_text(sample, prompt.frame, think)])

    if first == 0 and tests:
        run.log("metrics", {"step": 0, **run.evaluate(crm, tests, {}, 0, greedy=True)})
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=ranks.rank > 0, ncols=100)
    for step in bar:
        start = ranks.clock()

        # 1. this rank's samples, a pure function of seed and step
        indices = ranks.share(sample_indices(len(train), cfg.batch, cfg.seed, step))
        with run.checkpoint_on_bad_row(step, crm, optimizer):
            groups = [true_completion(train[i]) for i in indices]

        # 2. one denominator over all ranks, then cross-entropy, a few sequences at a time
        tokens, loss = sum(ranks.gather([int(group.lengths.sum()) for group in groups])), 0.0
        packs = [
            [(group, [0]) for group in groups[at : at + cfg.micro_batch]]
            for at in range(0, len(groups), cfg.micro_batch)
        ]
        for pack, counts in equal_passes(crm, ranks, packs):
            part = -counts * sum(logp.sum() for logp, _ in score(crm, pack)) / tokens
            part.backward()
            loss += part.item()
        lr = learning_rate(step, steps, cfg.lr, round(cfg.warmup_ratio * steps), cfg.schedule)
        grad_norm = optimizer.step(lr, cfg.max_grad_norm)

        # 3. numbers, the held-out split, checkpoints
        done, seconds, stopped = step + 1, ranks.clock() - start, run.stopped()
        row = {
            "step": done,
            "loss": sum(ranks.gather([loss])),
            "grad_norm": grad_norm,
            "lr": lr,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gb": peak_memory(ranks.device),
        }
        if tests and run.evaluation_due(done):
            row |= run.evaluate(crm, tests, {}, done, greedy=done == steps)
        run.warn(row)
        run.log("metrics", row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", s=f"{seconds:.1f}")
        if run.due(done, stopped):
            run.save(done, crm, optimizer)
            run.curves(PANELS)
        if stopped:
            break
    run.finish(done, compare=bool(tests))
    ranks.stop()


if __name__ == "__main__":
    with exit_on(BadRow):
        main(parse_args(Config, __doc__))
