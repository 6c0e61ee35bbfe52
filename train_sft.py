"""Supervised fine-tuning: the warm start before GRPO, and the paper's baseline (arXiv 2508.08177,
section 5).

    python train_sft.py --steps 200 --lr 1e-3
    torchrun --nproc-per-node 8 train_sft.py @recipes/sft_7b.args

Cross-entropy on the true completion, with the reasoning trace where the data has one, through the
same packed forward, prompts, examples, logs and checkpoints as train_grpo.py:

    L = - (1 / tokens of the step) sum_t log pi(token_t | image, question, tokens before)

Defaults are the paper's (lr 5e-6, cosine, warm-up 0.1, 5 epochs) except the batch (128), which
suits the embedded default. Difference from the paper: the trace is learned as well; --no-think
leaves it out.

Read next: train_grpo.py.
"""

import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

import metrics
from crm import CRM, Group, load_crm
from data import EMBEDDED, BadRow, Example, Examples, load_splits
from evaluate import log_held_out
from rewards import MODES
from runtime.cli import exit_on, flag, parse_args, print0, use_embedded
from runtime.optim import Optimizer
from runtime.parallel import Ranks, equal_passes, peak_memory
from runtime.run import TRACKERS, Run, learning_rate, step_indices
from runtime.stats import explain_memory, warn_of_jump
from scoring import Pack, group_of, score


@dataclass
class Config:
    # model
    crm: str | None = flag(None, "Qwen2.5-VL or Qwen3-VL, folder or hub name")
    prompt: str | None = flag(
        None, "reasoning, direct, boxes, a text file with {query}, or the text itself"
    )
    resize: str | None = flag(None, "aspect, aspect:MAX_PIXELS or square:SIDE")
    coordinates: str | None = flag(None, "see data.COORDINATES", ("pixels", "norm1000"))
    dtype: str = flag(
        "auto", "compute type; auto is bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    trainable: str = flag("", "train only parameters whose name this regular expression matches")
    lora_rank: int = flag(0, "train LoRA matrices of this rank instead of the model (0: no)", low=0)
    checkpointing: bool = flag(False, "compute activations again in the backward pass")
    offload: bool = flag(False, "optimizer state lives in host memory")
    # data
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    think: bool = flag(True, "learn the trace where the data has one and the prompt asks for it")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    seed: int = flag(0, "seed of every random choice", low=0)
    # updates
    batch: int = flag(32, "examples per step over all ranks (paper: 128)", low=1)
    micro_batch: int = flag(32, "examples of a rank in one forward pass", low=1)
    epochs: float = flag(5.0, "passes over the data", above=0)
    steps: int = flag(0, "optimizer steps (0: from --epochs)", low=0)
    lr: float = flag(5e-6, "peak learning rate", above=0)
    warmup_ratio: float = flag(0.1, "part of the steps with linear warm-up", low=0, high=1)
    schedule: str = flag("cosine", "lr after warm-up", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.01, "AdamW's weight decay", low=0)
    parallel: str = flag(
        "ddp", "how ranks share the model, see runtime/parallel.py", ("ddp", "fsdp")
    )
    # run folder, evaluation, checkpoints
    out: str = flag("runs/sft", "run folder")
    resume: str = flag(
        "no",
        "go on from the last checkpoint; auto: if there is one",
        ("no", "yes", "auto"),
        bare="yes",
    )
    mode: str = flag("soft", "reward mode of the held-out evaluation", tuple(MODES))
    max_new_tokens: int = flag(128, "longest completion of an evaluation, in tokens", low=1)
    temperature: float = flag(1.0, "softmax temperature of an evaluation", above=0)
    eval_every: int = flag(0, "steps between evaluations (0: first and last; -1: none)", low=-1)
    eval_limit: int = flag(0, "held-out questions, evenly spread (0: all)", low=0)
    save_every: int = flag(500, "steps between checkpoints (0: only the last; -1: none)", low=-1)
    keep: int = flag(0, "newest checkpoints to keep, besides the best one (0: all)", low=0)
    track: str | None = flag(None, "also log to a tracker, see extras/track.py", tuple(TRACKERS))


PANELS = {  # of curves.png: title, keys of metrics.jsonl
    "cross-entropy (nats per token)": ["loss"],
    "held-out box IoU": ["sampled/iou", "greedy/iou"],
}


def true_completion(crm: CRM, example: Example, with_think: bool) -> Group:
    """Returns a group of one completion, the one that a perfect model would write."""
    prompt = crm.prompt_of(example)
    text = crm.answer_format.target_text(example, prompt.sizes, with_think)
    return group_of(crm, prompt, [text])


def warn_without_traces(train: Examples) -> None:
    """Prints a line where traces are to be learned and the data has none."""
    if not any(row["think"] for row in train.rows):
        print0(
            'warning: the prompt asks for a trace, but no training row has one in "think", so the '
            "model unlearns to reason; add traces, or give --prompt direct"
        )


def main(cfg: Config) -> None:
    ranks = Ranks.start()
    with exit_on(ValueError, OSError):
        use_embedded(cfg, {"crm": EMBEDDED["crm"], "data": EMBEDDED["data"]})
        if cfg.batch % ranks.world != 0:
            raise ValueError(f"--batch {cfg.batch}: give a multiple of the {ranks.world} ranks")
        train, tests = load_splits(cfg.data, cfg.skip_bad_rows, cfg.eval_limit)
        if cfg.eval_every < 0:
            tests = Examples([])
        run = Run(cfg, ranks)
        torch.manual_seed(cfg.seed)  # LoRA's matrices are the same on every rank
        dtype = ranks.dtype(cfg.dtype)
        crm = load_crm(cfg.crm, ranks.device, dtype, cfg.prompt, cfg.resize, cfg.coordinates)
        if run.checkpoint is not None:
            crm.check_settings(run.checkpoint)
        parameters = crm.prepare_training(
            cfg.trainable,
            cfg.lora_rank,
            checkpointing=cfg.checkpointing,
            offload=cfg.offload,
            ranks=ranks if cfg.parallel == "fsdp" else None,
        )
        optimizer = Optimizer(parameters, cfg.weight_decay, crm.is_sharded, cfg.offload)
        steps = cfg.steps or max(1, round(cfg.epochs * len(train) / cfg.batch))
        start_step = run.begin(optimizer, steps)  # --resume fills optimizer and weights here
    with_think = cfg.think and "<think>" in crm.template
    if with_think:
        warn_without_traces(train)
    warmup = round(cfg.warmup_ratio * steps)
    print0(crm.what_trains())
    print0(
        f"{len(train)} training examples, {steps} steps of {cfg.batch} on "
        f"{ranks.world} x {ranks.device} -> {run.folder}"
    )
    if start_step == 0 and len(tests) > 0:
        means = log_held_out(run, crm, tests, cfg, {}, step=0, greedy=True)
        run.log("metrics", {"step": 0, **means})
    if start_step > 0 and ranks.is_main:
        lr_today = learning_rate(start_step - 1, steps, cfg.lr, warmup, cfg.schedule)
        warn_of_jump(run.read("metrics"), lr_today)
    bar = tqdm(
        range(start_step, steps),
        initial=start_step,
        total=steps,
        disable=not ranks.is_main,
        ncols=100,
    )
    for step in bar:
        start = ranks.clock()

        # 1. This rank's examples, a pure function of seed and step.
        indices = ranks.share(step_indices(len(train), cfg.batch, cfg.seed, step))
        with run.checkpoint_on_bad_row(step, crm, optimizer):
            groups = [true_completion(crm, train[i], with_think) for i in indices]

        # 2. Cross-entropy, a few sequences at a time, with one denominator over all ranks.
        own_tokens = sum(int(group.lengths.sum()) for group in groups)
        tokens = sum(ranks.gather([own_tokens]))
        packs = []
        for at in range(0, len(groups), cfg.micro_batch):
            pack = Pack()
            for group in groups[at : at + cfg.micro_batch]:
                pack.add(group, row=0)
            packs.append(pack)
        own_loss = 0.0
        for pack, factor in equal_passes(ranks, packs, crm.is_sharded):
            total = sum(logp.sum() for logp, _ in score(crm, pack))
            loss = -factor * total / tokens
            loss.backward()
            own_loss += loss.item()
        lr = learning_rate(step, steps, cfg.lr, warmup, cfg.schedule)
        run.leave_if_stopped(step, crm, optimizer)  # nothing of this step is in the weights yet
        grad_norm = optimizer.step(lr)

        # 3. Numbers, the held-out split, checkpoints.
        done = step + 1
        seconds = ranks.clock() - start
        stopped = run.stopped()
        row = {
            "step": done,
            "loss": sum(ranks.gather([own_loss])),
            "grad_norm": grad_norm,
            "skipped": int(not math.isfinite(grad_norm)),
            "lr": lr,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_gb": peak_memory(ranks.device),
        }
        is_due = run.is_due(done, stopped)
        is_last = done == steps
        evaluates = len(tests) > 0 and run.evaluation_is_due(done) and (is_last or not stopped)
        if evaluates:
            if is_due:  # first: an evaluation takes long, and a cluster may not wait
                run.save(done, crm, optimizer)
            row |= log_held_out(run, crm, tests, cfg, {}, done, greedy=is_last)
        run.warn(row)
        run.log("metrics", row)
        bar.set_postfix(loss=f"{row['loss']:.3f}", s=f"{seconds:.1f}")
        if is_due:
            if not evaluates:  # last: a checkpoint has the rows of all its steps beside it
                run.save(done, crm, optimizer)
            run.curves(PANELS)
        run.give_up_on_skipped()
        if stopped:
            break
    if done == steps and len(tests) > 0 and ranks.is_main:
        print0(metrics.changes(run.read("held_out"), run.read("metrics")))
    run.finish(done)
    ranks.stop()


# flags of former versions, and what to use now
MOVED = {
    "weights": "SFT has no reward; a held-out evaluation reports that of --mode",
    "freeze_vision": 'give --trainable "language_model|lm_head"',
    "max_pixels": "give --resize aspect:PIXELS",
    "min_pixels": "a checkpoint remembers it; load_crm(min_pixels=...) sets it",
    "test_data": 'give --data a folder with the splits "train" and "test"',
    "only": "make a data set of the rows that are meant, see paper/experiments.py",
    "timeout": "it is TIMEOUT_MINUTES in runtime/parallel.py",
    "max_grad_norm": "it is MAX_GRAD_NORM in runtime/optim.py",
    "eval_answers": "it is EVAL_COMPLETIONS in evaluate.py",
}


if __name__ == "__main__":
    with exit_on(BadRow), explain_memory():
        main(parse_args(Config, __doc__, moved=MOVED))
