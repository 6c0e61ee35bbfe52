"""The embedded tiny CRM: a real Qwen2.5-VL with random weights and a small tokenizer, taught in six
stages to see, to read out, to reason and, last, to be unsure. What it knows but does not use is
left to GRPO.

    python -m demo.make.crm            # pool of pictures, tokenizer, random model, stages a to f ->
                                       demo/crm

  a  the vision tower alone, on a dense target with throw-away heads: of each merged token (28 x 28
  pixels), how much of its
     4 x 4 parts the asked category covers, its own place, and, where it is covered, the target's
     box and key points
  b  the language model on top: a short prompt that only names the target, the answer without a
  trace. The short prompt forms
     the circuit that reads a place out of the image; a long one with a trace drowns the
     coordinates' loss
  c  the reasoning prompt, questions that name the target, a trace and the answer; with the habits
  of HABITS on purpose, as
     general VLMs have them, so that each reward term has something left to teach

  d  the same, and a little knowledge of the world: one question in five says what the target looks
  like, one in five is the first
     of the data's four training clues
  e  what the questions mean: all four training clues (the two that only the test split has are
  never seen), four completions
     per question; and the habits of an unsure reader: three in five name nothing and point vaguely
  f  the same, shorter: three in four name nothing, box the target far too loosely and put both key
  points near its middle;
     one in four names the target and points well. So its most likely completion never says what it
     looks for

Same classes and same file formats as Qwen2.5-VL-7B, a two-thousandth of its size. Seed 0. Measured
2026-11-24 on 2 shared x86 cores, one thread: a 14 minutes, b 27, c 18, d 12, e 33, f 8 (the cores
were busy with other work); the checks are in demo/README.md."""

import argparse
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from crm import BANNED, CHAT, CRM, END, load_crm
from data import PROMPTS, STRIDE, fill_prompt, load_samples, target_text, to_model
from demo.make.check_crm import SHORT, check, named_question, target_name
from demo.make.wordings import OPENERS, PICTURES, SEEN, WORDS, unsure_trace
from scoring import group_of, score

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BANNED]
CATEGORIES = sorted(WORDS)
PARTS = 4  # a cell's side in parts of the dense target
LARGEST = 224  # pixels of the data's largest side: coordinates are divided by it
HELD_BACK = 372  # of the pool, at its end: for the checks of the stages, not for training


@dataclass(frozen=True)
class Habits:
    """What a stage's questions tell and what its completions do, on purpose, as general VLMs do.
    Parts are of 1."""

    completions: int = 2  # per question
    named: float = 1  # of the questions name the target
    look: float = 0  # of the questions say what it looks like
    clues: int = 0  # the other questions use so many of the data's training clues
    # each edge of the box lies outside by a part of its side between these
    loose: tuple = (0, 0.16)
    # key points are pulled to their middle, to a part of their distance between these
    close: tuple = (0.25, 1)
    unsure: float = 0  # of the completions name nothing, and then
    unsure_loose: tuple = (0, 0)
    unsure_close: tuple = (0, 0)
    broken: float = 0.08  # of the completions break the format


HABITS = {
    "c": Habits(),
    "d": Habits(named=0.6, look=0.2, clues=1, loose=(0, 0.12)),
    "e": Habits(
        completions=4,
        named=0.25,
        look=0.1,
        clues=4,
        loose=(0, 0.12),
        close=(0.5, 1),
        broken=0.06,
        unsure=0.6,
        unsure_loose=(0.2, 0.6),
        unsure_close=(0.2, 0.6),
    ),
    "f": Habits(
        completions=4,
        named=0.2,
        look=0.1,
        clues=4,
        loose=(0, 0.12),
        close=(0.75, 1),
        broken=0.06,
        unsure=0.75,
        unsure_loose=(0.4, 1),
        unsure_close=(0.1, 0.4),
    ),
}


# ---------------------------------------------------------------- the random model


def tiny_tokenizer(texts, vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's own pre-tokenizer (one token a digit) and special tokens,
    trained on texts."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(
        texts, vocab_size - len(SPECIAL), show_progress=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokenizer


def tiny_crm(
    texts,
    vocab_size=2048,
    hidden=192,
    layers=4,
    heads=6,
    kv_heads=2,
    mlp=512,
    vision_hidden=128,
    vision_layers=4,
    vision_heads=4,
    vision_mlp=256,
    seed=0,
    **options,
) -> CRM:
    """A CRM with random weights. Every second vision layer sees the whole image, the others
    112-pixel windows."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(texts, vocab_size)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    half = hidden // heads // 2  # rotary frequencies, shared out to time, height and width
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=sections),
        ),
        vision_config=dict(
            depth=vision_layers,
            hidden_size=vision_hidden,
            intermediate_size=vision_mlp,
            num_heads=vision_heads,
            out_hidden_size=hidden,
            window_size=112,
            fullatt_block_indexes=list(range(1, vision_layers, 2)),
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids[token] for token in END]
    return CRM(model, tokenizer, Qwen2VLImageProcessorPil(max_pixels=LARGEST**2), **options)


def corpus(samples) -> list[str]:
    """What the tokenizer is trained on: the prompts, and the questions and traces of the data."""
    rows = samples.rows
    return [
        PROMPTS["reasoning"],
        PROMPTS["direct"],
        *CHAT,
        *(row["query"] for row in rows),
        *(row["think"] for row in rows),
    ] + [json.dumps({"bbox": [0] * 4, "points_1": [0] * 2, "points_2": [0] * 2})] * 500


# ---------------------------------------------------------------- what the stages learn from


class Lesson:
    """One picture as a stage asks about it: the encoded prompt, the dense target and, from stage b
    on, the completion."""

    def __init__(self, crm, sample, stage, rng):
        question = (
            question_of(sample, HABITS[stage], rng) if stage in HABITS else target_name(sample)
        )
        template = SHORT if stage == "b" else PROMPTS["reasoning"]
        self.prompt = crm.encode(sample.image, fill_prompt(template, question))
        self.prompt.pixel_values = self.prompt.pixel_values.half()  # all pictures stay in memory
        w, h = self.prompt.frame.model
        mask = (
            np.asarray(
                Image.fromarray(np.uint8(sample.mask) * 255).resize(
                    (w, h), Image.Resampling.BILINEAR
                )
            )
            / 255
        )
        side = STRIDE // PARTS
        # (rows, 4, columns, 4)
        share = mask.reshape(h // STRIDE, PARTS, side, w // STRIDE, PARTS, side).mean((2, 5))
        self.share = torch.tensor(
            share.transpose(0, 2, 1, 3).reshape(-1, PARTS**2), dtype=torch.float32
        )
        ys, xs = np.mgrid[0 : h // STRIDE, 0 : w // STRIDE]
        self.place = torch.tensor(
            np.stack([xs.ravel() + 0.5, ys.ravel() + 0.5], 1) * STRIDE / LARGEST,
            dtype=torch.float32,
        )
        truth = [v for xy in (sample.bbox, *sample.points) for v in to_model(xy, self.prompt.frame)]
        self.truth = torch.tensor(truth) / LARGEST  # (8,)
        self.category = CATEGORIES.index(sample.category)
        if stage in HABITS:  # several completions to a prompt, which is the longer part
            texts = [
                habitual(sample, self.prompt.frame, HABITS[stage], rng)
                for _ in range(HABITS[stage].completions)
            ]
        else:
            texts = [target_text(sample, self.prompt.frame, False)] * (stage == "b")
        self.group = group_of(crm, self.prompt, texts) if texts else None


def question_of(sample, habits, rng) -> str:
    """A question that names the target, says what it looks like, or is one of the data's first
    clues."""
    side = "left" if "left" in sample.query else "right"
    draw = rng.random()
    if draw < habits.named:
        return named_question(sample, rng)
    words = WORDS[sample.category]
    look = rng.choice(words.seen) + (f" on the {side}" if "{side}" in words.name else "")
    clue = (
        look
        if draw < habits.named + habits.look
        else rng.choice(words.clues[: habits.clues]).format(side=side)
    )
    return rng.choice(OPENERS[:SEEN]).format(clue=clue, picture=PICTURES[sample.extra["modality"]])


def habitual(sample, frame, habits, rng) -> str:
    """target_text with habits: a loose box, key points close together, now and then an unsure trace
    or a broken format."""
    (x1, y1, x2, y2), (p, q) = sample.bbox, sample.points
    width = x2 - x1
    height = y2 - y1
    unsure = rng.random() < habits.unsure
    loose, close = (
        (habits.unsure_loose, habits.unsure_close) if unsure else (habits.loose, habits.close)
    )
    out = [rng.uniform(*loose) for _ in range(4)]
    box = (
        max(0, x1 - out[0] * width),
        max(0, y1 - out[1] * height),
        min(frame.image[0], x2 + out[2] * width),
        min(frame.image[1], y2 + out[3] * height),
    )
    keep = rng.uniform(*close)
    middle = ((p[0] + q[0]) / 2, (p[1] + q[1]) / 2)
    points = tuple(tuple(m + keep * (v - m) for v, m in zip(point, middle)) for point in (p, q))
    think = (
        unsure_trace(rng, sample.extra["modality"], sample.bbox, frame.image[::-1])
        if unsure
        else sample.think
    )
    text = target_text(replace(sample, bbox=box, points=points, think=think), frame)
    if rng.random() < habits.broken:
        text = rng.choice(
            (
                text.replace("</think>", ""),
                text.replace(', "points_2"', ' "points_2"'),
                text.replace("}</answer>", "</answer>"),
                text.replace('"points_2"', '"points_1"'),
            )
        )
    return text


class Heads(nn.Module):
    """What stage a predicts from a merged token; thrown away after stage b."""

    def __init__(self, width):
        super().__init__()
        self.share = nn.Linear(width, len(CATEGORIES) * PARTS**2)
        self.truth = nn.Linear(width, len(CATEGORIES) * 8)
        self.place = nn.Linear(width, 2)

    def asked(self, head, features, category):
        """The outputs of one category. features (n, D), category (n,) -> (n, outputs of a
        category)."""
        out = head(features).view(len(features), len(CATEGORIES), -1)
        return out[torch.arange(len(features)), category]


def dense(crm, heads, lessons):
    """The dense loss of some lessons, and the parts' IoU at a half."""
    features = torch.cat(
        crm.model.model.get_image_features(
            torch.cat([lesson.prompt.pixel_values for lesson in lessons]).float(),
            torch.cat([lesson.prompt.grid_thw for lesson in lessons]),
        ).pooler_output
    )
    share, place = (
        torch.cat([getattr(lesson, key) for lesson in lessons]) for key in ("share", "place")
    )
    cells = torch.tensor([len(lesson.share) for lesson in lessons])
    category = torch.tensor([lesson.category for lesson in lessons]).repeat_interleave(cells)
    truth = torch.stack([lesson.truth for lesson in lessons]).repeat_interleave(cells, 0)
    logit = heads.asked(heads.share, features, category)
    covered = share.mean(1)
    error = (heads.asked(heads.truth, features, category) - truth).abs().mean(1)
    loss = (
        F.binary_cross_entropy_with_logits(logit, share)
        + 3 * F.mse_loss(heads.place(features), place)
        + 2 * (error * covered).sum() / covered.sum()
    )
    guess = logit > 0
    true = share > 0.5
    return loss, ((guess & true).sum() / (guess | true).sum()).item()


def answer_loss(crm, lessons, digit_ids, digit_weight):
    """Cross-entropy of the completions, digits counting more: mean over tokens."""
    total = 0.0
    count = 0.0
    packs = [(lesson.group, range(len(lesson.group.texts))) for lesson in lessons]
    for lesson, (logp, _) in zip(lessons, score(crm, packs)):
        weight = 1 + (digit_weight - 1) * torch.isin(lesson.group.tokens, digit_ids).float()
        total = total - (weight * logp).sum()
        count = count + weight.sum()
    return total / count


class Cache:
    """Lessons by the pool's index, made when first asked for."""

    def __init__(self, crm, pool, stage, rng):
        self.crm = crm
        self.pool = pool
        self.stage = stage
        self.rng = rng
        self.made = {}

    def __getitem__(self, i):
        if i not in self.made:
            self.made[i] = Lesson(self.crm, self.pool[i], self.stage, self.rng)
        return self.made[i]


def run_stage(
    stage, crm, heads, pool, steps, batch, lr, dense_weight, digit_weight, stretch, seed, work
):
    """AdamW with a short warm-up and a cosine over `stretch` times the steps (stage b ends at a
    quarter of its peak, as stage c goes on from there); stage a trains the vision tower, the others
    everything."""
    rng = random.Random(seed)
    start = time.time()
    cache = Cache(crm, pool, stage, rng)
    size = len(pool) - HELD_BACK
    before = Cache(crm, pool, "b", rng)
    trained = list((crm.model.model.visual if stage == "a" else crm.model).parameters())
    adamw = torch.optim.AdamW([*trained, *heads.parameters()], lr=lr, weight_decay=0.01)
    digits = torch.tensor(crm.tokenizer.convert_tokens_to_ids(list("0123456789")))
    for step in range(steps):
        lessons = [cache[rng.randrange(size)] for _ in range(batch)]
        # it is there to be kept
        loss, parts = dense(crm, heads, lessons if stage == "a" else lessons[: batch // 3])
        if stage in HABITS:  # a few of stage b's, so that what it formed is kept
            lessons += [before[rng.randrange(size)] for _ in range(batch // 2)]
        text = answer_loss(crm, lessons, digits, digit_weight) if stage != "a" else torch.zeros(())
        (dense_weight * loss + text).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in adamw.param_groups:
            group["lr"] = (
                lr
                * min(1, (step + 1) / 30)
                * (0.5 * (1 + np.cos(np.pi * step / (steps * stretch))) + 0.02)
            )
        adamw.step()
        adamw.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"stage {stage} step {step:5}  dense {loss.item():.3f}  parts' IoU {parts:.2f}  text {text.item():.3f}  "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
        if stage != "a" and step % 250 == 249 and step < steps - 1:
            report(stage, crm, pool, 124)
            crm.save(f"{work}/{stage}_{step + 1}")
    if stage == "a":
        report_dense(crm, heads, pool, cache)
    else:
        report(stage, crm, pool)


@torch.no_grad()
def report_dense(crm, heads, pool, cache):
    """Stage a's check: the parts' IoU on the pictures held back."""
    ious = [
        dense(crm, heads, [cache[i] for i in range(at, at + 31)])[1]
        for at in range(len(pool) - HELD_BACK, len(pool), 31)
    ]
    print(
        f"check a: IoU of the parts on {HELD_BACK} pictures held back {np.mean(ious):.3f}",
        flush=True,
    )


def report(stage, crm, pool, limit=HELD_BACK):
    """The check of stages b to f: greedy completions about pictures held back, asked as the stage
    asks; after e and f, whose completions are vague on purpose, as stage b asks."""
    held = pool[len(pool) - HELD_BACK :][:limit]
    how = (SHORT, "name") if stage in "bef" else (PROMPTS["reasoning"], "named")
    print(f"check {stage}: " + check(crm, held, *how), flush=True)


# ---------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--pool", default="build/pool", help="training data; made with demo.make.data when missing"
    )
    parser.add_argument("--pool-size", type=int, default=12000)
    parser.add_argument("--work", default="build/crm", help="folder for the model after each stage")
    parser.add_argument("--out", default="demo/crm")
    parser.add_argument(
        "--begin", default="a", choices="abcdef", help="stage to begin with, from --work"
    )
    parser.add_argument("--end", default="f", choices="abcdef", help="last stage")
    for stage, steps, batch, lr in (
        ("a", 4000, 16, 1e-3),
        ("b", 1500, 24, 1e-3),
        ("c", 750, 12, 8e-4),
        ("d", 320, 12, 6e-4),
        ("e", 900, 12, 8e-4),
        ("f", 200, 12, 4e-4),
    ):
        parser.add_argument(f"--steps-{stage}", type=int, default=steps)
        parser.add_argument(f"--batch-{stage}", type=int, default=batch)
        parser.add_argument(f"--lr-{stage}", type=float, default=lr)
    for name, default in dict(
        vocab_size=2048,
        hidden=192,
        layers=4,
        heads=6,
        kv_heads=2,
        mlp=512,
        vision_hidden=128,
        vision_layers=4,
        vision_heads=4,
        vision_mlp=256,
    ).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    args = parser.parse_args()
    options = {}
    for name in (
        "vocab_size",
        "hidden",
        "layers",
        "heads",
        "kv_heads",
        "mlp",
        "vision_hidden",
        "vision_layers",
        "vision_heads",
        "vision_mlp",
    ):
        options[name] = getattr(args, name)
    if not Path(args.pool).exists():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "demo.make.data",
                "--train",
                str(args.pool_size),
                "--test",
                "0",
                "--seed",
                "1",
                "--out",
                args.pool,
            ],
            check=True,
        )
    pool = load_samples(args.pool)
    stages = "abcdef"["abcdef".index(args.begin) : "abcdef".index(args.end) + 1]
    if args.begin == "a":
        crm = tiny_crm(corpus(pool), **options)
        heads = Heads(options["hidden"])
        print(
            f"{sum(p.numel() for p in crm.model.parameters()) / 1e6:.2f}M parameters, {len(crm.tokenizer)} tokens",
            flush=True,
        )
    else:
        before = f"{args.work}/{chr(ord(args.begin) - 1)}"
        crm = load_crm(before)
        heads = Heads(options["hidden"])
        if args.begin not in "ef":  # they have no dense loss
            heads.load_state_dict(torch.load(f"{before}/heads.pt"))
    for stage in stages:
        steps, batch, lr = (getattr(args, f"{key}_{stage}") for key in ("steps", "batch", "lr"))
        run_stage(
            stage,
            crm,
            heads,
            pool,
            steps,
            batch,
            lr,
            dense_weight={"a": 1, "e": 0, "f": 0}.get(stage, 0.3),
            digit_weight=3 if stage in HABITS else 1,
            stretch=22 / 15 if stage == "b" else 1,
            seed=ord(stage),
            work=args.work,
        )
        crm.save(f"{args.work}/{stage}")
        torch.save(heads.state_dict(), f"{args.work}/{stage}/heads.pt")
    if args.end == "f":
        crm.model.half()  # on disk only: load_crm casts to what is asked for
        crm.save(args.out)


if __name__ == "__main__":
    main()
