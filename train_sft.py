"""Supervised fine-tuning: the warm start before GRPO, and the paper's baseline (arXiv 2508.08177, section 5).

    python train_sft.py --steps 200 --lr 1e-3
    torchrun --nproc-per-node 8 train_sft.py @recipes/sft_7b.args

Cross-entropy on the true answer, and on the reasoning trace where the data has one, through the same packed
forward, prompts, samples, logs and checkpoints as train_grpo.py:

    L = - (1 / tokens of the step) sum_t log pi(token_t | image, question, tokens before)

Defaults are the paper's (lr 5e-6, cosine, warm-up 0.1, batch 128, 5 epochs) except the batch, which suits the
embedded default. Difference from the paper: the trace is learned, too (--no-think leaves it out).
"""
from dataclasses import dataclass

import torch
from tqdm import tqdm

from bench.memory import dry_run
from crm import load_crm
from data import MAX_PIXELS, MIN_PIXELS, BadRow, fill_prompt, load_prompt, target_text
from rewards import MODES
from runtime.cli import exit_on, flag, parse_args, print0
from runtime.optim import Optimizer
from runtime.parallel import KINDS as PARALLEL
from runtime.parallel import Ranks, passes, peak_memory, spread
from runtime.run import Run, learning_rate, load_splits, sample_indices


@dataclass
class Config:
    # what
    crm: str | None = flag(None, "Qwen2.5-VL folder or hub name")
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    test_data: str | None = flag(None, "where the held-out split is, if not in --data")
    out: str = flag("runs/sft", "run folder")
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
    think: bool = flag(True, "learn the reasoning trace where the data has one")
    resize: str = flag("aspect", "aspect, or square:SIDE")
    min_pixels: int = flag(MIN_PIXELS, "smallest image, model frame")
    max_pixels: int = flag(MAX_PIXELS, "largest image, model frame")
    # updates
    batch: int = flag(32, "samples a step over all ranks (paper: 128)")
    micro_batch: int = flag(32, "samples of a rank in one forward")
    epochs: float = flag(5, "passes over the data")
    steps: int = flag(0, "optimizer steps (0: from --epochs)")
    lr: float = flag(5e-6, "peak learning rate")
    warmup_ratio: float = flag(0.1, "part of the steps with linear warm-up")
    schedule: str = flag("cosine", "after warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.01, "AdamW's")
    max_grad_norm: float = flag(1.0, "gradient clipping")
    lora_rank: int = flag(0, "train LoRA matrices of this rank instead of the whole model")
    freeze_vision: bool = flag(False, "leave the vision tower as it is")
    checkpointing: bool = flag(False, "recompute activations in backward")
    offload: bool = flag(False, "keep master weights and AdamW's moments in host memory")
    # looking
    mode: str = flag("soft", "reward mode of the held-out evaluation", tuple(MODES))
    max_new_tokens: int = flag(128, "an answer's limit in the held-out evaluation")
    eval_every: int = flag(0, "steps between held-out evaluations (0: only first and last; -1: none)")
    eval_answers: int = flag(4, "sampled answers to a held-out question")
    eval_limit: int = flag(0, "held-out samples used (0: all)")
    save_every: int = flag(500, "steps between checkpoints (0: only the last; -1: none)")
    keep: int = flag(0, "newest checkpoints kept, beside the best evaluated (0: all)")


PANELS = {"cross-entropy (nats a token)": ["loss"], "held-out box IoU": ["sampled/iou", "greedy/iou"]}


def main(cfg: Config) -> None:
    ranks = Ranks.start(cfg.timeout)
    with exit_on(ValueError, OSError):
        template, (mine, rest) = load_prompt(cfg.prompt), divmod(cfg.batch, ranks.world)
        if rest or not mine:
            raise ValueError(f"--batch must be a multiple of the {ranks.world} ranks; got {cfg.batch}")
        train, tests = load_splits(cfg)
        if cfg.dry_run:
            return print0(dry_run(cfg, train))
        run = Run(cfg, ranks)
        torch.manual_seed(cfg.seed)                 # LoRA's matrices: the same on every rank
        crm = load_crm(cfg.crm, ranks.device, ranks.dtype(cfg.dtype), cfg.lora_rank,
                       freeze_vision=cfg.freeze_vision, checkpointing=cfg.checkpointing, resize=cfg.resize,
                       min_pixels=cfg.min_pixels, max_pixels=cfg.max_pixels)
        kind = spread(crm, cfg.parallel, ranks, cfg.offload)
        optimizer = Optimizer(crm.trainable(), cfg.weight_decay, kind, cfg.offload)
        steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch))
        first = run.begin(optimizer, steps)
    print0(f"{optimizer.size:,} trainable parameters on {ranks.world} x "
        f"{ranks.device}, {len(train)} training samples, {steps} steps of {cfg.batch} -> {run.folder}")

    def example(i):
        prompt = crm.encode((sample := train[i]).image, fill_prompt(template, sample.query))
        return crm.group(prompt, [target_text(sample, prompt.frame, cfg.think)])

    if first == 0 and tests:
        run.log("metrics", {"step": 0, **run.evaluate(crm, tests, template, {}, 0, greedy=True)})
    bar = tqdm(range(first, steps), initial=first, total=steps, disable=ranks.rank > 0, ncols=100)
    for step in bar:
        start = ranks.clock()

        # 1. samples, a pure function of seed and step; each a group of one answer, the true one
        indexes = sample_indices(len(train), cfg.batch, cfg.seed, step)[ranks.rank * mine:][:mine]
        groups = [example(i) for i in indexes]

        # 2. one denominator over all ranks, then cross-entropy, a few sequences at a time
        tokens, loss = sum(ranks.gather([int(g.lengths.sum()) for g in groups])), 0.0
        parts = [groups[at:at + cfg.micro_batch] for at in range(0, mine, cfg.micro_batch)]
        for few, _ in passes(crm, ranks, parts):
            scores = crm.score([(group, [0]) for group in few])
            part = -sum(logp.sum() for logp, _ in scores) / tokens
            part.backward()
            loss += part.item()
        warmup = round(cfg.warmup_ratio * steps)
        lr = learning_rate(step, steps, cfg.lr, warmup, cfg.schedule)
        grad_norm = optimizer.step(lr, cfg.max_grad_norm)

        # 3. look
        done, seconds = step + 1, ranks.clock() - start
        row = {"step": done, "loss": sum(ranks.gather([loss])), "grad_norm": grad_norm, "lr": lr,
               "seconds": seconds, "tokens_per_second": tokens / seconds,
               "peak_memory_gb": peak_memory(ranks.device)}
        stopped = run.stopped()
        if tests and (done == steps or cfg.eval_every > 0 and done % cfg.eval_every == 0):
            row |= run.evaluate(crm, tests, template, {}, done, greedy=done == steps)
        run.log("metrics", row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", s=f"{seconds:.1f}")
        if run.due(done, stopped):
            saved = run.save(done, crm, optimizer)
            run.curves(PANELS)
        if stopped:
            break
    if tests and not stopped:
        run.report()
    print0(f"weights {saved}, numbers {run.folder / 'metrics.jsonl'}, picture {run.folder / 'curves.png'}")
    ranks.stop(crm)


if __name__ == "__main__":
    with exit_on(BadRow):
        main(parse_args(Config, __doc__))
