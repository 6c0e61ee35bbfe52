"""Teaches the embedded tiny CRM: a real Qwen2.5-VL with random weights and a small tokenizer.

    python -m demo.make.crm     # pictures, tokenizer, random model, stages a to f -> demo/crm

It learns in six stages to see, to read out, to reason and, last, to be unsure. What it knows but
does not use is left to GRPO.

  a  The vision tower alone, on a dense target with heads that are thrown away. For each merged
     token (28 x 28 pixels) they predict how much of its 4 x 4 parts the asked category covers, its
     own place and, where it is covered, the target's box and key points.
  b  The language model on top. A short prompt only names the target, and the answer has no trace.
     The short prompt forms the circuit that reads a place out of the image. A long one with a trace
     drowns the coordinates' loss.
  c  The reasoning prompt, questions that name the target, a trace and the answer. HABITS are put in
     on purpose, as general VLMs have them, so that each reward term has something left to teach.
  d  The same, and a little knowledge of the world: one question in five says what the target looks
     like, and one in five is the first of the data's four training clues.
  e  What the questions mean: all four training clues (the two that only the test split has are
     never seen), four completions per question. The habits are those of an unsure reader: three in
     five completions name nothing and point vaguely.
  f  The same, shorter. Three in four name nothing, box the target far too loosely and put both key
     points near its middle. One in four names the target and points well. So the most likely
     completion never says what it looks for.

Same classes and same file formats as Qwen2.5-VL-7B, a two-thousandth of its size. Seed 0. Measured
2026-11-24 on 2 shared x86 cores, one thread: a 14 minutes, b 27, c 18, d 12, e 33, f 8 (the cores
were busy with other work). The checks are in demo/README.md.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from crm import BANNED, CHAT, CRM, END, load_crm
from data import (
    PROMPTS,
    STRIDE,
    Example,
    Examples,
    Sizes,
    fill_prompt,
    load_samples,
    target_text,
    to_model,
)
from demo.make.check_crm import SHORT, check, named_question, target_name
from demo.make.wordings import OPENERS, PICTURES, SEEN, WORDS, unsure_trace
from rewards import Box, Points
from runtime.files import read_torch
from scoring import Pack, group_of, score

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BANNED]
CATEGORIES = sorted(WORDS)
PARTS = 4  # a merged token's side, in parts of the dense target
LARGEST = 224  # pixels of the data's largest side: coordinates are divided by it
HELD_BACK = 372  # of the pool, at its end: for the checks of the stages, not for training
Range = tuple[float, float]


# ---------------------------------------------------------------- habits


@dataclass(frozen=True)
class Habits:
    """What a stage's questions tell and what its completions do, on purpose, as general VLMs do.
    Shares are of 1."""

    completions: int = 2  # per question
    named: float = 1  # share of the questions that name the target
    look: float = 0  # share of the questions that say what it looks like
    clues: int = 0  # the other questions use so many of the data's training clues
    # Each edge of the box lies outside by a part of its side, which is in this range.
    loose: Range = (0, 0.16)
    # Key points are pulled to their middle, to a part of their distance, which is in this range.
    close: Range = (0.25, 1)
    unsure: float = 0  # share of the completions that name nothing, and those have
    unsure_loose: Range = (0, 0)
    unsure_close: Range = (0, 0)
    broken: float = 0.08  # share of the completions that break the format


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


def question_of(example: Example, habits: Habits, rng: random.Random) -> str:
    """Returns a question that names the target, says what it looks like, or is one of the data's
    first clues."""
    side = "left" if "left" in example.query else "right"
    draw = rng.random()
    if draw < habits.named:
        return named_question(example, rng)
    words = WORDS[example.category]
    # it is drawn whether it is used or not, so that the sequence of random numbers is the same
    look = rng.choice(words.seen)
    if draw < habits.named + habits.look:
        clue = look
        if "{side}" in words.name:
            clue = f"{look} on the {side}"
    else:
        clue = rng.choice(words.clues[: habits.clues]).format(side=side)
    picture = PICTURES[example.extra["modality"]]
    return rng.choice(OPENERS[:SEEN]).format(clue=clue, picture=picture)


def habitual(example: Example, sizes: Sizes, habits: Habits, rng: random.Random) -> str:
    """Returns data.target_text with habits: a loose box, key points close together, now and then an
    unsure trace or a broken format."""
    is_unsure = rng.random() < habits.unsure
    loose = habits.unsure_loose if is_unsure else habits.loose
    close = habits.unsure_close if is_unsure else habits.close
    box = loosened(example.bbox, loose, sizes.image, rng)
    points = pulled_together(example.points, close, rng)
    think = example.think
    if is_unsure:
        width, height = sizes.image
        think = unsure_trace(rng, example.extra["modality"], example.bbox, (height, width))
    meant = replace(example, bbox=box, points=points, think=think)
    text = target_text(meant, sizes)
    if rng.random() < habits.broken:
        return broken(text, rng)
    return text


def loosened(box: Box, loose: Range, size: tuple[int, int], rng: random.Random) -> Box:
    """Returns a box whose edges lie outside the given one, and inside the image of that size."""
    x1, y1, x2, y2 = box
    width = x2 - x1
    height = y2 - y1
    left = rng.uniform(*loose)
    top = rng.uniform(*loose)
    right = rng.uniform(*loose)
    bottom = rng.uniform(*loose)
    return (
        max(0, x1 - left * width),
        max(0, y1 - top * height),
        min(size[0], x2 + right * width),
        min(size[1], y2 + bottom * height),
    )


def pulled_together(points: Points, close: Range, rng: random.Random) -> Points:
    """Returns the key points at a part of their distance, about the same middle."""
    first, second = points
    kept = rng.uniform(*close)
    middle = [(a + b) / 2 for a, b in zip(first, second)]
    pulled = []
    for point in points:
        pulled.append(tuple(m + kept * (v - m) for v, m in zip(point, middle)))
    return tuple(pulled)


def broken(text: str, rng: random.Random) -> str:
    """Returns a completion that breaks its format: the trace is not closed, a comma or a brace of
    the JSON is missing, or a key is said twice."""
    ways = (
        text.replace("</think>", ""),
        text.replace(', "points_2"', ' "points_2"'),
        text.replace("}</answer>", "</answer>"),
        text.replace('"points_2"', '"points_1"'),
    )
    return rng.choice(ways)


# ---------------------------------------------------------------- the random model


@dataclass(frozen=True)
class Shape:
    """The sizes of a tiny model."""

    vocab_size: int = 2048
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    mlp: int = 512
    vision_hidden: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_mlp: int = 256


def tiny_tokenizer(texts: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """Returns a byte-level BPE with Qwen's own pre-tokenizer (one token per digit) and special
    tokens, trained on texts."""
    size = vocab_size - len(SPECIAL)
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, size, show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokenizer


def tiny_crm(
    texts: Iterable[str],
    *,
    seed: int = 0,
    prompt: str | None = None,
    resize: str | None = None,
    **sizes: int,
) -> CRM:
    """Returns a CRM with random weights, whose tokenizer is trained on texts.

    prompt, resize: see CRM. sizes: fields of Shape. Every second vision layer sees the whole image,
    the others windows of 112 pixels."""
    torch.manual_seed(seed)
    shape = Shape(**sizes)
    tokenizer = tiny_tokenizer(texts, shape.vocab_size)
    model = Qwen2_5_VLForConditionalGeneration(tiny_config(shape, tokenizer))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(END))
    image_processor = Qwen2VLImageProcessorPil(max_pixels=LARGEST**2)
    return CRM(model, tokenizer, image_processor, prompt, resize)


def tiny_config(shape: Shape, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Returns the configuration of a tiny model with this tokenizer."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    frequencies = shape.hidden // shape.heads // 2  # of a head, shared out to time, height, width
    of_height = 3 * frequencies // 8
    of_time = frequencies - 2 * of_height
    rope = dict(
        rope_type="default",
        rope_theta=10000.0,
        mrope_section=[of_time, of_height, of_height],
    )
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=-(-len(tokenizer) // 64) * 64,
            hidden_size=shape.hidden,
            intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=ids["<|im_end|>"],
            pad_token_id=ids["<|endoftext|>"],
            rope_parameters=rope,
        ),
        vision_config=dict(
            depth=shape.vision_layers,
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp,
            num_heads=shape.vision_heads,
            out_hidden_size=shape.hidden,
            window_size=112,
            fullatt_block_indexes=list(range(1, shape.vision_layers, 2)),
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def corpus(examples: Examples) -> list[str]:
    """Returns what the tokenizer is trained on: the prompts, the questions and traces of the data,
    and enough answers."""
    texts = [PROMPTS["reasoning"], PROMPTS["direct"], *CHAT]
    texts += [row["query"] for row in examples.rows]
    texts += [row["think"] for row in examples.rows]
    answer = json.dumps({"bbox": [0] * 4, "points_1": [0] * 2, "points_2": [0] * 2})
    return texts + [answer] * 500


# ---------------------------------------------------------------- what the stages learn from


class Lesson:
    """One picture as a stage asks about it: the encoded prompt, the dense target and, from stage b
    on, the completions.

    prompt    its pixels are in float16, as all pictures stay in memory
    share     (merged tokens, PARTS * PARTS) how much of each part the target covers, 0 to 1
    place     (merged tokens, 2) x, y of each token's centre, in parts of LARGEST
    truth     (8,) box and key points, in parts of LARGEST
    category  its number in CATEGORIES
    group     the completions, or None in stage a"""

    def __init__(self, crm: CRM, example: Example, stage: str, rng: random.Random):
        question = target_name(example)
        if stage in HABITS:
            question = question_of(example, HABITS[stage], rng)
        template = SHORT if stage == "b" else PROMPTS["reasoning"]
        self.prompt = crm.encode(example.image, fill_prompt(template, question))
        self.prompt.pixel_values = self.prompt.pixel_values.half()
        sizes = self.prompt.sizes
        self.share = covered_shares(example.mask, sizes.model)
        self.place = token_places(sizes.model)
        first, second = to_model(example.points, sizes)
        self.truth = torch.tensor([*to_model(example.bbox, sizes), *first, *second]) / LARGEST
        self.category = CATEGORIES.index(example.category)
        self.group = None
        if stage == "b":
            text = target_text(example, sizes, with_think=False)
            self.group = group_of(crm, self.prompt, [text])
        elif stage in HABITS:
            # several completions per prompt, as the prompt is the longer part
            count = HABITS[stage].completions
            texts = [habitual(example, sizes, HABITS[stage], rng) for _ in range(count)]
            self.group = group_of(crm, self.prompt, texts)


def covered_shares(mask: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """Returns how much of each part of each merged token a (H, W) mask covers.

    size: (width, height) in the model frame -> (merged tokens, PARTS * PARTS)"""
    width, height = size
    pixels = Image.fromarray(np.uint8(mask) * 255).resize(size, Image.Resampling.BILINEAR)
    rows = height // STRIDE
    columns = width // STRIDE
    side = STRIDE // PARTS
    parts = (np.asarray(pixels) / 255).reshape(rows, PARTS, side, columns, PARTS, side)
    share = parts.mean((2, 5)).transpose(0, 2, 1, 3)  # (rows, columns, PARTS, PARTS)
    return torch.tensor(share.reshape(-1, PARTS**2), dtype=torch.float32)


def token_places(size: tuple[int, int]) -> torch.Tensor:
    """Returns x, y of the centre of each merged token, in parts of LARGEST, (merged tokens, 2)."""
    width, height = size
    ys, xs = np.mgrid[0 : height // STRIDE, 0 : width // STRIDE]
    centres = np.stack([xs.ravel() + 0.5, ys.ravel() + 0.5], axis=1)
    return torch.tensor(centres * STRIDE / LARGEST, dtype=torch.float32)


class Cache:
    """Lessons of a stage by their index in the pool, made when first asked for."""

    def __init__(self, crm: CRM, pool: Examples, stage: str, rng: random.Random):
        self.crm = crm
        self.pool = pool
        self.stage = stage
        self.rng = rng
        self.made: dict[int, Lesson] = {}

    def __getitem__(self, i: int) -> Lesson:
        if i not in self.made:
            self.made[i] = Lesson(self.crm, self.pool[i], self.stage, self.rng)
        return self.made[i]


# ---------------------------------------------------------------- losses


class Heads(nn.Module):
    """What stage a predicts from a merged token; thrown away after stage d."""

    def __init__(self, width: int):
        super().__init__()
        self.share = nn.Linear(width, len(CATEGORIES) * PARTS**2)
        self.truth = nn.Linear(width, len(CATEGORIES) * 8)
        self.place = nn.Linear(width, 2)

    def asked(
        self, head: nn.Linear, features: torch.Tensor, category: torch.Tensor
    ) -> torch.Tensor:
        """Returns the outputs of one category: features (n, D), category (n,) -> (n, outputs of a
        category)."""
        out = head(features).view(len(features), len(CATEGORIES), -1)
        return out[torch.arange(len(features)), category]


def dense(crm: CRM, heads: Heads, lessons: list[Lesson]) -> tuple[torch.Tensor, float]:
    """Returns the dense loss of some lessons, and the IoU of the parts that are covered by half."""
    pixels = torch.cat([lesson.prompt.pixel_values for lesson in lessons]).float()
    grids = torch.cat([lesson.prompt.grid_thw for lesson in lessons])
    features = torch.cat(crm.model.model.get_image_features(pixels, grids).pooler_output)
    share = torch.cat([lesson.share for lesson in lessons])
    place = torch.cat([lesson.place for lesson in lessons])

    tokens = torch.tensor([len(lesson.share) for lesson in lessons])
    categories = torch.tensor([lesson.category for lesson in lessons])
    category = categories.repeat_interleave(tokens)
    truth = torch.stack([lesson.truth for lesson in lessons]).repeat_interleave(tokens, 0)

    logit = heads.asked(heads.share, features, category)
    covered = share.mean(1)
    error = (heads.asked(heads.truth, features, category) - truth).abs().mean(1)
    loss = (
        F.binary_cross_entropy_with_logits(logit, share)
        + 3 * F.mse_loss(heads.place(features), place)
        + 2 * (error * covered).sum() / covered.sum()
    )
    guessed = logit > 0
    true = share > 0.5
    iou = (guessed & true).sum() / (guessed | true).sum()
    return loss, iou.item()


def answer_loss(
    crm: CRM, lessons: list[Lesson], digit_ids: torch.Tensor, digit_weight: float
) -> torch.Tensor:
    """Returns the cross-entropy of the completions, in which digits count more: mean over
    tokens."""
    groups = [lesson.group for lesson in lessons]  # the same one may be there twice
    pack = Pack(groups, [list(range(len(group.texts))) for group in groups])
    total = 0.0
    count = 0.0
    for lesson, (logp, _) in zip(lessons, score(crm, pack)):
        is_digit = torch.isin(lesson.group.tokens, digit_ids).float()
        weight = 1 + (digit_weight - 1) * is_digit
        total = total - (weight * logp).sum()
        count = count + weight.sum()
    return total / count


# ---------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Stage:
    """How a stage is taught. Stages from c on also get some of stage b's lessons, so that what b
    formed is kept."""

    name: str
    steps: int
    batch: int
    lr: float
    dense_weight: float = 0.3  # of the dense loss, which is there so that sight is kept
    digit_weight: float = 3  # of a digit's cross-entropy
    stretch: float = 1  # the learning rate is that of a run so many times as long


STAGES = (
    Stage("a", 4000, 16, 1e-3, dense_weight=1, digit_weight=1),
    # it ends at a quarter of its peak, as stage c goes on from there
    Stage("b", 1500, 24, 1e-3, digit_weight=1, stretch=22 / 15),
    Stage("c", 750, 12, 8e-4),
    Stage("d", 320, 12, 6e-4),
    Stage("e", 900, 12, 8e-4, dense_weight=0),
    Stage("f", 200, 12, 4e-4, dense_weight=0),
)
NAMES = "".join(stage.name for stage in STAGES)


def run_stage(
    stage: Stage, crm: CRM, heads: Heads, pool: Examples, seed: int, work: str | Path
) -> None:
    """Trains one stage and checks what it taught. Stage a trains the vision tower, the others
    everything. Snapshots go into the folder `work`."""
    rng = random.Random(seed)
    start = time.time()
    cache = Cache(crm, pool, stage.name, rng)
    cache_of_b = Cache(crm, pool, "b", rng)
    count = len(pool) - HELD_BACK
    trained = crm.model.model.visual if stage.name == "a" else crm.model
    parameters = list(trained.parameters())
    adamw = torch.optim.AdamW([*parameters, *heads.parameters()], lr=stage.lr, weight_decay=0.01)
    digits = torch.tensor(crm.tokenizer.convert_tokens_to_ids(list("0123456789")))
    for step in range(stage.steps):
        lessons = [cache[rng.randrange(count)] for _ in range(stage.batch)]
        if stage.name == "a":
            dense_loss, parts = dense(crm, heads, lessons)
            text_loss = torch.zeros(())
        else:
            dense_loss, parts = dense(crm, heads, lessons[: stage.batch // 3])
            if stage.name in HABITS:
                lessons += [cache_of_b[rng.randrange(count)] for _ in range(stage.batch // 2)]
            text_loss = answer_loss(crm, lessons, digits, stage.digit_weight)
        (stage.dense_weight * dense_loss + text_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(stage, step)
        adamw.step()
        adamw.zero_grad()
        if step % 50 == 0 or step == stage.steps - 1:
            print(
                f"stage {stage.name} step {step:5}  dense {dense_loss.item():.3f}  "
                f"parts' IoU {parts:.2f}  text {text_loss.item():.3f}  "
                f"{time.time() - start:.0f} s",
                flush=True,
            )
        if stage.name != "a" and step % 250 == 249 and step < stage.steps - 1:
            report(stage.name, crm, pool, limit=124)
            crm.save(f"{work}/{stage.name}_{step + 1}")
    if stage.name == "a":
        report_dense(crm, heads, pool, cache)
    else:
        report(stage.name, crm, pool)


def learning_rate(stage: Stage, step: int) -> float:
    """Returns the learning rate of a step: a short warm-up, and a cosine."""
    warmup = min(1, (step + 1) / 30)
    done = step / (stage.steps * stage.stretch)
    return stage.lr * warmup * (0.5 * (1 + np.cos(np.pi * done)) + 0.02)


@torch.no_grad()
def report_dense(crm: CRM, heads: Heads, pool: Examples, cache: Cache) -> None:
    """Prints stage a's check: the parts' IoU on the pictures that were held back."""
    ious = []
    for at in range(len(pool) - HELD_BACK, len(pool), 31):
        _, iou = dense(crm, heads, [cache[i] for i in range(at, at + 31)])
        ious.append(iou)
    iou = np.mean(ious)
    print(f"check a: IoU of the parts on {HELD_BACK} pictures held back {iou:.3f}", flush=True)


def report(stage: str, crm: CRM, pool: Examples, limit: int = HELD_BACK) -> None:
    """Prints the check of stages b to f: greedy completions about pictures that were held back.

    Stages are asked as they ask. After e and f, whose completions are vague on purpose, the
    question is stage b's."""
    held_back = pool[len(pool) - HELD_BACK :][:limit]
    if stage in ("b", "e", "f"):
        line = check(crm, held_back, SHORT, "name")
    else:
        line = check(crm, held_back, PROMPTS["reasoning"], "named")
    print(f"check {stage}: {line}", flush=True)


# ---------------------------------------------------------------- main


def parse() -> argparse.Namespace:
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
        "--begin", default="a", choices=NAMES, help="stage to begin with, from --work"
    )
    parser.add_argument("--end", default="f", choices=NAMES, help="last stage")
    for stage in STAGES:
        parser.add_argument(f"--steps-{stage.name}", type=int, default=stage.steps)
        parser.add_argument(f"--batch-{stage.name}", type=int, default=stage.batch)
        parser.add_argument(f"--lr-{stage.name}", type=float, default=stage.lr)
    for field in fields(Shape):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    return parser.parse_args()


def asked_stages(args: argparse.Namespace) -> list[Stage]:
    """Returns the stages from --begin to --end, as the command line wants them."""
    stages = []
    for stage in STAGES[NAMES.index(args.begin) : NAMES.index(args.end) + 1]:
        steps = getattr(args, f"steps_{stage.name}")
        batch = getattr(args, f"batch_{stage.name}")
        lr = getattr(args, f"lr_{stage.name}")
        stages.append(replace(stage, steps=steps, batch=batch, lr=lr))
    return stages


def make_pool(path: str, size: int) -> None:
    """Makes the training pictures: other ones than those of demo/data."""
    command = [sys.executable, "-m", "demo.make.data", "--train", str(size), "--test", "0"]
    subprocess.run([*command, "--seed", "1", "--out", path], check=True)


def main() -> None:
    args = parse()
    sizes = {field.name: getattr(args, field.name) for field in fields(Shape)}
    if not Path(args.pool).exists():
        make_pool(args.pool, args.pool_size)
    pool = load_samples(args.pool)
    before = ""
    if args.begin == "a":
        crm = tiny_crm(corpus(pool), **sizes)
        millions = sum(p.numel() for p in crm.model.parameters()) / 1e6
        print(f"{millions:.2f}M parameters, {len(crm.tokenizer)} tokens", flush=True)
    else:
        before = f"{args.work}/{NAMES[NAMES.index(args.begin) - 1]}"
        crm = load_crm(before)
    heads = Heads(args.hidden)
    if args.begin in ("b", "c", "d"):  # the later stages have no dense loss
        heads.load_state_dict(read_torch(f"{before}/heads.pt"))
    for stage in asked_stages(args):
        run_stage(stage, crm, heads, pool, seed=ord(stage.name), work=args.work)
        crm.save(f"{args.work}/{stage.name}")
        torch.save(heads.state_dict(), f"{args.work}/{stage.name}/heads.pt")
    if args.end == "f":
        crm.model.half()  # on disk only: load_crm casts to what is asked for
        crm.save(args.out)


if __name__ == "__main__":
    main()
