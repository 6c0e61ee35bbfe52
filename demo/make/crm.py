"""Teaches the embedded tiny CRM: a real Qwen2.5-VL with random weights and a small tokenizer.

    python -m demo.make.crm     # pictures, tokenizer, random model, stages a to c -> demo/crm
    torchrun --nproc-per-node 2 -m demo.make.crm     # a step's lessons in two processes of a CPU
    python -m demo.make.crm --family qwen3_vl --work build/qwen3_vl --out build/crm3

It learns in three stages to see, to read out, and to reason. It is only ever shown true boxes, key
points and traces. How to point where a question does not name its target is never shown: that is
left to GRPO.

  a  The vision tower alone, on a dense target with heads that are thrown away. For each merged
     token (28 x 28 pixels) they predict how much of its 4 x 4 parts the asked category covers, its
     own place and, where it is covered, the target's box and key points.
  b  The language model on top: a short prompt that is only the target's name, and an answer without
     a trace. This forms the circuit that reads a place out of the image; in a long completion the
     coordinates' loss would drown.
  c  Reasoning and knowledge, and the sight of stage b is kept. A question that names the target is
     answered with trace and answer. A question by clue, as the data asks, is answered with the
     trace alone: what is meant, and roughly where, but no box and no points.

Same classes and same file formats as Qwen2.5-VL-7B, a two-thousandth of its size. Seed 0. Times and
checks are in demo/README.md.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import PreTrainedConfig, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from crm import BANNED, CHAT, CRM, END, load_crm
from data import (
    PROMPTS,
    Example,
    Examples,
    Sizes,
    fill_prompt,
    load_samples,
    target_text,
    to_model,
)
from demo.make.check_crm import SHORT, check, named_question, target_name
from demo.make.wordings import OPENERS, PICTURES, SEEN, WORDS
from runtime.cli import print0
from runtime.files import read_torch
from runtime.parallel import Ranks
from runtime.pretrained import FAMILIES
from scoring import Pack, group_of, score

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BANNED]
CATEGORIES = sorted(WORDS)
PARTS = 4  # a merged token's side, in parts of the dense target
LARGEST = 224  # pixels of the data's largest side: coordinates are divided by it
HELD_BACK = 372  # of the pool, at its end: for the checks of the stages, not for training
KNOW = "{query}\nName what is meant: "  # asks for the trace alone


# ---------------------------------------------------------------- what is asked, what is shown


@dataclass(frozen=True)
class Kind:
    """A kind of lesson: the prompt, what is put into it, and what is shown as its completion."""

    template: str
    question: Callable[[Example, random.Random], str]
    completion: Callable[[Example, Sizes], str]


def the_name(example: Example, rng: random.Random) -> str:
    return target_name(example)


def question_by_clue(example: Example, rng: random.Random) -> str:
    """Returns one of the data's training questions. The clues and openers that only the test split
    has are never drawn."""
    side = "left" if "left" in example.query else "right"
    clue = rng.choice(WORDS[example.category].clues[:SEEN]).format(side=side)
    picture = PICTURES[example.extra["modality"]]
    return rng.choice(OPENERS[:SEEN]).format(clue=clue, picture=picture)


def answer_alone(example: Example, sizes: Sizes) -> str:
    return target_text(example, sizes, with_think=False)


def trace_alone(example: Example, sizes: Sizes) -> str:
    return f"<think>{example.think}</think>"


LESSONS = {
    "name": Kind(SHORT, the_name, answer_alone),
    "question": Kind(PROMPTS["reasoning"], named_question, target_text),
    "clue": Kind(KNOW, question_by_clue, trace_alone),
}


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
    head_size: int = 0  # of Qwen3-VL's language model; 0: hidden / heads, as in Qwen2.5-VL


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
    family: str = "qwen2_5_vl",
    **sizes: int,
) -> CRM:
    """Returns a CRM with random weights, whose tokenizer is trained on texts.

    prompt, resize: see CRM. family: of FAMILIES. sizes: fields of Shape. Every second vision layer
    of a Qwen2.5-VL sees the whole image, the others windows of 112 pixels."""
    torch.manual_seed(seed)
    shape = Shape(**sizes)
    tokenizer = tiny_tokenizer(texts, shape.vocab_size)
    model = FAMILIES[family].model(tiny_config(shape, tokenizer, family))
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(END))
    image_processor = image_processor_of(family, LARGEST**2)
    return CRM(model, tokenizer, image_processor, prompt, resize)


def tiny_config(shape: Shape, tokenizer: Qwen2Tokenizer, family: str) -> PreTrainedConfig:
    """Returns the configuration of a tiny model with this tokenizer."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    head_size = shape.head_size or shape.hidden // shape.heads
    frequencies = head_size // 2  # of a head, shared out to time, height, width
    sixteenths = {"qwen2_5_vl": 6, "qwen3_vl": 5}  # of them for height, and for width
    of_height = sixteenths[family] * frequencies // 16
    of_time = frequencies - 2 * of_height
    rope = dict(
        rope_type="default",
        rope_theta=10000.0,
        mrope_section=[of_time, of_height, of_height],
    )
    own_rope = {"qwen2_5_vl": dict(), "qwen3_vl": dict(mrope_interleaved=True)}
    own_text = {"qwen2_5_vl": dict(), "qwen3_vl": dict(head_dim=head_size)}
    own_vision = {
        "qwen2_5_vl": dict(
            window_size=112, fullatt_block_indexes=list(range(1, shape.vision_layers, 2))
        ),
        "qwen3_vl": dict(
            num_position_embeddings=(LARGEST // 16) ** 2,
            deepstack_visual_indexes=list(range(shape.vision_layers - 1)),
        ),
    }
    return FAMILIES[family].model.config_class(
        text_config=dict(
            **own_text[family],
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
            rope_parameters=rope | own_rope[family],
        ),
        vision_config=dict(
            depth=shape.vision_layers,
            hidden_size=shape.vision_hidden,
            intermediate_size=shape.vision_mlp,
            num_heads=shape.vision_heads,
            out_hidden_size=shape.hidden,
            **own_vision[family],
        ),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def image_processor_of(family: str, max_pixels: int) -> Qwen2VLImageProcessorPil:
    """Returns the image processor of a family's released checkpoints, but for the largest size."""
    own = {
        "qwen2_5_vl": dict(),
        "qwen3_vl": dict(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    }
    return Qwen2VLImageProcessorPil(max_pixels=max_pixels, **own[family])


def corpus(examples: Examples, family: str = "qwen2_5_vl") -> list[str]:
    """Returns what the tokenizer is trained on: the prompts, the questions and traces of the data,
    and enough answers."""
    chat = (FAMILIES[family].system + CHAT[0], *CHAT[1:])
    coordinates = FAMILIES[family].coordinates
    texts = [fill_prompt(PROMPTS[name], "{query}", coordinates) for name in ("reasoning", "direct")]
    texts += chat
    texts += [row["query"] for row in examples.rows]
    texts += [row["think"] for row in examples.rows]
    answer = json.dumps({"bbox": [0] * 4, "points_1": [0] * 2, "points_2": [0] * 2})
    return texts + [answer] * 500


# ---------------------------------------------------------------- what the stages learn from


class Lesson:
    """One picture with what is asked about it and what is shown: the encoded prompt, the dense
    target and the completion.

    kind      a key of LESSONS
    prompt    its pixels are in float16, as pictures stay in memory
    group     the one completion
    share     (merged tokens, PARTS * PARTS) how much of each part the target covers, 0 to 1
    place     (merged tokens, 2) x, y of each token's centre, in parts of LARGEST
    truth     (8,) box and key points, in parts of LARGEST
    category  its number in CATEGORIES"""

    def __init__(self, crm: CRM, example: Example, kind: str, rng: random.Random):
        template = LESSONS[kind].template
        question = LESSONS[kind].question(example, rng)
        self.prompt = crm.encode(example.image, fill_prompt(template, question, crm.coordinates))
        self.prompt.pixel_values = self.prompt.pixel_values.half()
        completion = LESSONS[kind].completion(example, self.prompt.sizes)
        self.group = group_of(crm, self.prompt, [completion])
        sizes = crm.frames(example.image.size)["pixels"]
        self.share = covered_shares(example.mask, sizes.model, crm.family.stride)
        self.place = token_places(sizes.model, crm.family.stride)
        first, second = to_model(example.points, sizes)
        self.truth = torch.tensor([*to_model(example.bbox, sizes), *first, *second]) / LARGEST
        self.category = CATEGORIES.index(example.category)


def covered_shares(mask: np.ndarray, size: tuple[int, int], stride: int) -> torch.Tensor:
    """Returns how much of each part of each merged token a (H, W) mask covers.

    size: (width, height) of the resized image -> (merged tokens, PARTS * PARTS)"""
    width, height = size
    pixels = Image.fromarray(np.uint8(mask) * 255).resize(size, Image.Resampling.BILINEAR)
    rows = height // stride
    columns = width // stride
    side = stride // PARTS
    parts = (np.asarray(pixels) / 255).reshape(rows, PARTS, side, columns, PARTS, side)
    share = parts.mean((2, 5)).transpose(0, 2, 1, 3)  # (rows, columns, PARTS, PARTS)
    return torch.tensor(share.reshape(-1, PARTS**2), dtype=torch.float32)


def token_places(size: tuple[int, int], stride: int) -> torch.Tensor:
    """Returns x, y of the centre of each merged token, in parts of LARGEST, (merged tokens, 2)."""
    width, height = size
    ys, xs = np.mgrid[0 : height // stride, 0 : width // stride]
    centres = np.stack([xs.ravel() + 0.5, ys.ravel() + 0.5], axis=1)
    return torch.tensor(centres * stride / LARGEST, dtype=torch.float32)


class Drawer:
    """Draws lessons from a pool. Those by name are always the same of a picture, and are kept."""

    def __init__(self, crm: CRM, pool: Examples, rng: random.Random):
        self.crm = crm
        self.pool = pool
        self.rng = rng
        self.kept: dict[int, Lesson] = {}

    def draw(self, kind: str, count: int) -> list[Lesson]:
        """Returns lessons of random pictures; the last HELD_BACK of the pool are never drawn."""
        lessons = []
        for _ in range(count):
            i = self.rng.randrange(len(self.pool) - HELD_BACK)
            lessons.append(self.lesson(i, kind))
        return lessons

    def lesson(self, i: int, kind: str) -> Lesson:
        if kind != "name":
            return Lesson(self.crm, self.pool[i], kind, self.rng)
        if i not in self.kept:
            self.kept[i] = Lesson(self.crm, self.pool[i], kind, self.rng)
        return self.kept[i]


# ---------------------------------------------------------------- losses


class Heads(nn.Module):
    """What stage a predicts from a merged token; thrown away after stage b."""

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


def answer_loss(crm: CRM, lessons: list[Lesson], digit_weight: float) -> torch.Tensor:
    """Returns the cross-entropy of the completions, in which digits count more: mean over
    tokens."""
    digit_ids = torch.tensor(crm.tokenizer.convert_tokens_to_ids(list("0123456789")))
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
    """How a stage is taught: how many lessons of each kind make a step, and at what rate.

    dense_weight  of the dense loss, on a third of the lessons (in stage a on all); 0: none
    digit_weight  of a digit's cross-entropy
    stretch       the learning rate is that of a run so many times as long"""

    name: str
    steps: int
    lr: float
    lessons: dict[str, int]
    dense_weight: float = 0
    digit_weight: float = 1
    stretch: float = 1


STAGES = (
    Stage("a", 4000, 1e-3, {"name": 16}, dense_weight=1),
    # it ends at a quarter of its peak, as stage c goes on from there
    Stage("b", 1600, 1e-3, {"name": 24}, dense_weight=0.3, stretch=22 / 15),
    Stage("c", 1300, 8e-4, {"question": 8, "clue": 6, "name": 6}, digit_weight=3),
)
NAMES = "".join(stage.name for stage in STAGES)


def run_stage(
    stage: Stage,
    crm: CRM,
    heads: Heads,
    pool: Examples,
    seed: int,
    work: str | Path,
    ranks: Ranks,
) -> None:
    """Trains one stage and checks what it taught. Stage a trains the vision tower, the others
    everything. Every rank draws its share of a step's lessons. Snapshots go into the folder
    `work`."""
    start = time.time()
    drawer = Drawer(crm, pool, random.Random(seed + 1000 * ranks.rank))
    trained = crm.model.model.visual if stage.name == "a" else crm.model
    parameters = list(trained.parameters())
    adamw = torch.optim.AdamW([*parameters, *heads.parameters()], lr=stage.lr, weight_decay=0.01)
    for step in range(stage.steps):
        lessons = []
        for kind, count in stage.lessons.items():
            lessons += drawer.draw(kind, count // ranks.world)
        loss, told = stage_loss(stage, crm, heads, lessons)
        (loss / ranks.world).backward()
        sum_over_ranks([*parameters, *heads.parameters()], ranks)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(stage, step)
        adamw.step()
        adamw.zero_grad()
        if not ranks.is_main:
            continue
        if step % 50 == 0 or step == stage.steps - 1:
            seconds = time.time() - start
            print(f"stage {stage.name} step {step:5}  {told}  {seconds:.0f} s", flush=True)
        if stage.name != "a" and step % 250 == 249 and step < stage.steps - 1:
            crm.save(f"{work}/{stage.name}_{step + 1}")
    if not ranks.is_main:
        return
    if stage.name == "a":
        report_dense(crm, heads, drawer)
    else:
        report(stage, crm, pool)


def sum_over_ranks(parameters: list[nn.Parameter], ranks: Ranks) -> None:
    """Adds up the gradients of torchrun's processes."""
    if ranks.world == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)


def stage_loss(
    stage: Stage, crm: CRM, heads: Heads, lessons: list[Lesson]
) -> tuple[torch.Tensor, str]:
    """Returns the loss of a step, and its parts in words."""
    loss = torch.zeros(())
    told = []
    if stage.dense_weight:
        shown = lessons if stage.name == "a" else lessons[: len(lessons) // 3]
        dense_loss, parts = dense(crm, heads, shown)
        loss = loss + stage.dense_weight * dense_loss
        told.append(f"dense {dense_loss.item():.3f}  parts' IoU {parts:.2f}")
    if stage.name != "a":
        text_loss = answer_loss(crm, lessons, stage.digit_weight)
        loss = loss + text_loss
        told.append(f"text {text_loss.item():.3f}")
    return loss, "  ".join(told)


def learning_rate(stage: Stage, step: int) -> float:
    """Returns the learning rate of a step: a short warm-up, and a cosine."""
    warmup = min(1, (step + 1) / 30)
    done = step / (stage.steps * stage.stretch)
    return stage.lr * warmup * (0.5 * (1 + np.cos(np.pi * done)) + 0.02)


@torch.no_grad()
def report_dense(crm: CRM, heads: Heads, drawer: Drawer) -> None:
    """Prints stage a's check: the parts' IoU on the pictures that were held back."""
    ious = []
    total = len(drawer.pool)
    for at in range(total - HELD_BACK, total, 31):
        _, iou = dense(crm, heads, [drawer.lesson(i, "name") for i in range(at, at + 31)])
        ious.append(iou)
    iou = np.mean(ious)
    print(f"check a: IoU of the parts on {HELD_BACK} pictures held back {iou:.3f}", flush=True)


def report(stage: Stage, crm: CRM, pool: Examples) -> None:
    """Prints the check of stages b and c: greedy completions about pictures that were held back."""
    held_back = pool[len(pool) - HELD_BACK :]
    asked = [(SHORT, "name")]
    if "clue" in stage.lessons:
        asked += [(PROMPTS["reasoning"], "named"), (PROMPTS["reasoning"], "data")]
    for template, how in asked:
        print(f"check {stage.name}, {how}: {check(crm, held_back, template, how)}", flush=True)


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
    parser.add_argument("--family", default="qwen2_5_vl", choices=FAMILIES)
    parser.add_argument(
        "--begin", default="a", choices=NAMES, help="stage to begin with, from --work"
    )
    parser.add_argument("--end", default=NAMES[-1], choices=NAMES, help="last stage")
    for stage in STAGES:
        parser.add_argument(f"--steps-{stage.name}", type=int, default=stage.steps)
        parser.add_argument(f"--lr-{stage.name}", type=float, default=stage.lr)
    for field in fields(Shape):
        parser.add_argument("--" + field.name.replace("_", "-"), type=int, default=field.default)
    return parser.parse_args()


def asked_stages(args: argparse.Namespace) -> list[Stage]:
    """Returns the stages from --begin to --end, as the command line wants them."""
    stages = []
    for stage in STAGES[NAMES.index(args.begin) : NAMES.index(args.end) + 1]:
        steps = getattr(args, f"steps_{stage.name}")
        lr = getattr(args, f"lr_{stage.name}")
        stages.append(replace(stage, steps=steps, lr=lr))
    return stages


def make_pool(path: str, size: int) -> None:
    """Makes the training pictures: other ones than those of demo/data."""
    command = [sys.executable, "-m", "demo.make.data", "--train", str(size), "--test", "0"]
    subprocess.run([*command, "--seed", "1", "--out", path], check=True)


def main() -> None:
    args = parse()
    ranks = Ranks.start()
    sizes = {field.name: getattr(args, field.name) for field in fields(Shape)}
    if ranks.is_main and not Path(args.pool).exists():
        make_pool(args.pool, args.pool_size)
    ranks.wait()
    pool = load_samples(args.pool)
    before = ""
    if args.begin == "a":
        crm = tiny_crm(corpus(pool, args.family), family=args.family, **sizes)
        millions = sum(p.numel() for p in crm.model.parameters()) / 1e6
        print0(f"{millions:.2f}M parameters, {len(crm.tokenizer)} tokens")
    else:
        before = f"{args.work}/{NAMES[NAMES.index(args.begin) - 1]}"
        crm = load_crm(before)
    heads = Heads(args.hidden)
    if args.begin != "a":
        heads.load_state_dict(read_torch(f"{before}/heads.pt"))
    for stage in asked_stages(args):
        run_stage(stage, crm, heads, pool, ord(stage.name), args.work, ranks)
        if ranks.is_main:
            crm.save(f"{args.work}/{stage.name}")
            torch.save(heads.state_dict(), f"{args.work}/{stage.name}/heads.pt")
        ranks.wait()
    if ranks.is_main and args.end == NAMES[-1]:
        crm.model.half()  # on disk only: load_crm casts to what is asked for
        crm.save(args.out)
    ranks.stop()


if __name__ == "__main__":
    main()
