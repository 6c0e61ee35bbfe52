"""What a training run needs: memory per GPU by purpose, and operations per step (make memory).

    python -m bench.memory                      # 3B and 7B: LoRA, full, offloaded, sharded
    python -m bench.memory @recipes/lora_7b.args --data U-MRG-14K --gpus 8              # one run of
                                                                                        GRPO
    python -m bench.memory train_sft @recipes/sft_7b.args --data U-MRG-14K --gpus 8     # one run of
                                                                                        SFT

The configuration, the tokenizer and some of the data are read; no weight is loaded. Parameters are
counted exactly, on a model without memory. Activations are arithmetic, from the shapes in
sampling.py and scoring.py, for completions of full length. Nothing here is measured; a run's own
peak is in its metrics.jsonl.

Three phases take turns: sampling, the reference's forward pass, the update. What they share stays.
"""

import re
import sys
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train_grpo
import train_sft
from bench.random_model import config_of
from crm import CHAT, LORA_TARGETS
from data import MAX_PIXELS, MIN_PIXELS, fill_prompt, load_prompt, load_samples, model_size
from runtime.cli import exit_on, flag, parse_args
from runtime.optim import BUCKET
from scoring import LOGITS_AT_ONCE

GB = 1e9
CONTEXT = 1.0  # GB that CUDA, cuBLAS and NCCL take: an assumption
SUSTAINED = 400e12  # operations per second of one H100 that a well-fed bfloat16 model reaches
USABLE = 0.95  # of a card, beside what fragmentation wastes
# pixels along a patch, patches along an image token
PATCH = 14
MERGE = 2


@dataclass
class Need:
    """What decides the memory of one rank. Sizes are in tokens and in patches of the vision
    tower."""

    model: torch.nn.Module  # without memory
    cfg: object  # the run's Config
    gpus: int
    prompt: int  # tokens of the longest prompt, its image's among them
    patches: int  # of its image
    card: float = 80.0  # GB

    def __post_init__(self):
        cfg = self.cfg
        c = self.model.config.text_config
        self.grpo = hasattr(cfg, "group")
        self.G = cfg.group if self.grpo else 1
        self.questions = cfg.prompts if self.grpo else cfg.batch  # per step, over all ranks
        # sampled per step by a rank
        self.prompts = -(-cfg.prompts // self.gpus) if self.grpo else 0
        self.width = 4 if cfg.dtype == "float32" else 2  # bytes per weight
        self.shards = min(8, self.gpus) if cfg.parallel == "fsdp" and self.gpus > 1 else 1
        self.reference = self.grpo and cfg.kl_coef > 0 and cfg.lora_rank == 0
        longest = self.prompt + cfg.max_new_tokens  # one completion is never cut
        self.pack = max(cfg.pack_tokens, longest) if self.grpo else cfg.micro_batch * longest
        self.images = max(1, self.pack // (self.prompt + self.G)) if self.grpo else cfg.micro_batch
        self.head_size = c.hidden_size // c.num_attention_heads
        self.cache_per_token = (
            2 * c.num_hidden_layers * c.num_key_value_heads * self.head_size * self.width
        )
        self.frozen_tower = cfg.lora_rank > 0 or not any(
            name.startswith("model.visual") for name in self.trained()
        )

    def trained(self) -> dict[str, int]:
        """{name: number of elements} of what trains."""
        cfg = self.cfg
        out = {}
        if cfg.lora_rank:
            for name, m in self.model.named_modules():
                if isinstance(m, torch.nn.Linear) and re.fullmatch(LORA_TARGETS, name):
                    out[name] = cfg.lora_rank * (m.in_features + m.out_features)
            return out
        for name, p in self.model.named_parameters():
            frozen = cfg.freeze_vision and name.startswith("model.visual")
            if not frozen and re.search(cfg.trainable, name):
                out[name] = p.numel()
        return out


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


def without_weights(config):
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


# ---------------------------------------------------------------- memory


def resident(n: Need) -> dict[str, float]:
    """Bytes that one rank holds all the time."""
    cfg = n.cfg
    N = count(n.model)
    trained = sum(n.trained().values())
    # else the weights, or host memory, hold them
    masters = cfg.dtype != "float32" and not cfg.offload
    if n.shards > 1:
        out = {"weights and float32 masters, sharded": N * 4 / n.shards}
    else:
        out = {
            "weights": N * n.width,
            "LoRA matrices": trained * n.width if cfg.lora_rank else 0,
            "float32 masters": trained * 4 * masters,
        }
    image = n.patches * 3 * 2 * PATCH**2 * 4  # pixels, of two frames, float32
    if n.frozen_tower:  # its features are kept
        image += n.patches / MERGE**2 * n.model.config.text_config.hidden_size * n.width
    return out | {
        "gradients, float32": trained * 4 / n.shards,
        "AdamW's two moments": 0 if cfg.offload else trained * 8 / n.shards,
        "reference model": N * n.width / n.shards * (n.reference and not cfg.offload),
        "images of a step": image * n.questions / n.gpus,
        "CUDA context (assumed)": CONTEXT * GB,
    }


def layer_bytes(n: Need) -> float:
    """What one language layer holds per token while it computes: norms, q k v, attention, the MLP's
    three."""
    c = n.model.config.text_config
    return (3 * c.intermediate_size + 6 * c.hidden_size) * n.width


def tower_bytes(n: Need, backward: bool) -> float:
    """The vision tower, per image: one layer's working set, and for a backward pass what its layers
    keep."""
    v = n.model.config.vision_config
    working = (3 * v.intermediate_size + 6 * v.hidden_size) * n.width
    if not backward or n.frozen_tower:
        kept = 0
    else:
        kept = v.depth * (v.hidden_size * n.width if n.cfg.checkpointing else working)
    return n.patches * (working + kept)


def at_once(n: Need, free: float) -> int:
    """How many prompts are sampled together: sampling.prompts_at_once, with this many bytes
    free."""
    per_prompt = n.cache_per_token * (n.prompt + n.G * n.cfg.max_new_tokens)
    return min(n.prompts, max(1, int(free / 2 // per_prompt)))


def sampling(n: Need, steady: float) -> tuple[dict[str, float], int]:
    """Bytes while sampling, and the prompts sampled together."""
    cfg = n.cfg
    c = n.model.config.text_config
    gathered = {"weights, gathered": count(n.model) * n.width if n.shards > 1 else 0}
    P = at_once(n, n.card * GB - steady - sum(gathered.values()))
    rows = P * n.G
    keys = n.prompt + cfg.max_new_tokens
    prefill = (
        P * n.prompt * n.cache_per_token + n.prompt * layer_bytes(n) + P * tower_bytes(n, False)
    )
    # as computed; float32, log p, p; cdf in float64
    logits = rows * c.vocab_size * (n.width + 3 * 4 + 8)
    scores = rows * c.num_attention_heads * keys * 3 * 4  # of one layer, float32
    step = logits + scores + rows * layer_bytes(n)
    return gathered | {
        "keys and values of prompts": P * n.prompt * n.cache_per_token,
        "keys and values of completions": rows * cfg.max_new_tokens * n.cache_per_token,
        "prefill, or decoding step": max(prefill, step),
        "decoding step's CUDA graph": step if getattr(cfg, "cuda_graphs", False) else 0,
    }, P


def passes(n: Need, backward: bool) -> dict[str, float]:
    """Bytes of one pack's forward pass, or forward and backward."""
    c = n.model.config.text_config
    cfg = n.cfg
    trained = n.trained()
    kept = 0
    if backward:
        kept = c.num_hidden_layers * (
            c.hidden_size * n.width if cfg.checkpointing else layer_bytes(n)
        )
    # the completions' keys and values, each with the prompt's before it
    repeated = (
        n.G * (n.prompt + cfg.max_new_tokens) * 2 * c.num_key_value_heads * n.head_size * n.width
    )
    chunk = LOGITS_AT_ONCE["cuda"]
    out = {
        "language layers": n.pack * (kept + layer_bytes(n) * (1 + backward))
        + repeated * (1 + backward),
        "vision tower": n.images * tower_bytes(n, backward),
        "logits of a chunk": chunk * (n.width + (4 if backward else 2) * 4),
    }
    if n.shards > 1:
        model = n.model.model
        layers = (*model.language_model.layers, *model.visual.blocks)
        # embedding and vocabulary projection, mostly
        root = count(n.model) - sum(map(count, layers))
        two = 2 * count(model.language_model.layers[0])
        out["two layers, embedding, head, gathered"] = (root + two) * (
            n.width + backward * (n.width + 4)
        )
    elif backward:
        one = max(trained.values()) * (n.width + 4)  # one gradient as computed, and in float32
        out["one gradient, or ranks' bucket"] = max(one, 4 * BUCKET * (n.gpus > 1))
    return out


def memory(n: Need) -> dict[str, float]:
    """GB of one rank by purpose: what is resident, then each phase's own, then the most at once."""
    steady = resident(n)
    base = sum(steady.values())
    phases = {}
    rows = dict(steady)
    if n.prompts:
        phases["sampling"], _ = sampling(n, base)
    if n.grpo and n.cfg.kl_coef:
        phases["reference"] = passes(n, False)
        if n.reference and n.cfg.offload:
            phases["reference"] |= {"reference model": count(n.model) * n.width}
        if n.reference and n.shards > 1:
            phases["reference"] |= {
                "two layers, embedding, head, gathered": 0,
                "reference model, gathered": count(n.model) * n.width,
            }
    phases["update"] = passes(n, True)
    for phase, parts in phases.items():
        rows |= {f"{phase}: {name}": value for name, value in parts.items()}
    rows = {name: value / GB for name, value in rows.items() if value}
    return rows | {
        "most at once": (base + max(sum(parts.values()) for parts in phases.values())) / GB
    }


def table(columns: dict[str, dict[str, float]]) -> str:
    """Markdown: what is resident, then the phases, the most at once last. A cell is empty where it
    is 0."""
    names = dict.fromkeys(
        name for column in columns.values() for name in column if name != "most at once"
    )
    phases = ["", "sampling", "reference", "update"]
    names = sorted(
        names, key=lambda name: phases.index(name.split(": ")[0] if ": " in name else "")
    )
    lines = ["| GB | " + " | ".join(columns) + " |", "|---" + "|---" * len(columns) + "|"]
    for name in [*names, "most at once"]:
        cells = (f"{column[name]:.1f}" if name in column else "" for column in columns.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- operations


def operations(n: Need) -> float:
    """Operations of a step over all ranks, for completions of full length: 2 per weight and token
    forward, 4 backward, or 2 through frozen weights. Attention's own products are left out."""
    cfg = n.cfg
    model = n.model.model
    visual = n.model.model.visual
    words = n.prompt + n.G * cfg.max_new_tokens
    body = 2 * count(model.language_model.layers) * words
    head = 2 * count(n.model.lm_head) * n.G * cfg.max_new_tokens
    tower = 2 * (count(visual.blocks) * n.patches + count(visual.merger) * n.patches / MERGE**2)
    update = (2 if cfg.lora_rank else 3) + cfg.checkpointing
    forwards = [update]
    if n.grpo:
        old = cfg.inner_epochs * cfg.minibatches > 1
        forwards = [1, old, int(cfg.kl_coef > 0), update * cfg.inner_epochs]
    tower_forwards = 1 if n.frozen_tower else sum(forwards)
    return n.questions * ((body + head) * sum(forwards) + tower * tower_forwards)


# ---------------------------------------------------------------- plans


def plan(cfg) -> str:
    """What a run needs. ValueError when the checkpoint's configuration cannot be read."""
    train = load_samples(cfg.data, "train", cfg.skip_bad_rows)
    try:
        model = without_weights(AutoConfig.from_pretrained(cfg.crm))
        tokenizer = AutoTokenizer.from_pretrained(cfg.crm)
        processor = Qwen2VLImageProcessorPil.from_pretrained(cfg.crm)
    except OSError as error:
        raise ValueError(
            f"--crm {cfg.crm}: cannot be loaded ({str(error).splitlines()[0]})"
        ) from None
    most = cfg.max_pixels or min(MAX_PIXELS, processor.size["longest_edge"])
    template = load_prompt(cfg.prompt or "reasoning")
    lengths = []
    patches = []
    for sample in (train[i] for i in range(min(16, len(train)))):
        W, H = model_size(
            sample.image.size, cfg.resize or "aspect", cfg.min_pixels or MIN_PIXELS, most
        )
        patches.append(W * H // PATCH**2)
        text = tokenizer("".join(CHAT) + fill_prompt(template, sample.query)).input_ids
        lengths.append(len(text) + patches[-1] // MERGE**2)
    n = Need(model, cfg, cfg.gpus, max(lengths), max(patches), cfg.card)
    column = memory(n)
    work = operations(n)
    usable = USABLE * cfg.card
    trained = sum(n.trained().values())
    fits = "fits" if column["most at once"] <= usable else "does NOT fit"
    lines = [
        f"{cfg.crm}: {count(model) / 1e9:.2f} billion parameters, {trained:,} of them train",
        f"{len(train)} training samples, prompts of {min(lengths)} to {max(lengths)} tokens",
        f"per step {n.questions} x {n.G} completions of up to {cfg.max_new_tokens} tokens",
        f"on {cfg.gpus} GPUs, --parallel {cfg.parallel}",
    ]
    if n.prompts:
        _, together = sampling(n, sum(resident(n).values()))
        lines[-1] += f", {together} of a rank's {n.prompts} prompts sampled together"
    return "\n".join(
        [
            *lines,
            "",
            table({"one GPU": column}),
            "",
            f"{fits} on a GPU of {cfg.card:g} GB, of which {usable:.0f} are counted on",
            f"{work / 1e15:.2f} PFLOP per step: {work / SUSTAINED / cfg.gpus:.1f} s at "
            f"{SUSTAINED / 1e12:.0f} TFLOP/s per GPU, beside the sampler's waiting for memory",
            "arithmetic for completions of full length, not measured",
        ]
    )


def overview() -> str:
    """3B and 7B at 840 x 840 px: 8 prompts per GPU, 16 completions of 512 tokens,
    --checkpointing."""
    kinds = {
        "LoRA": {"lora_rank": 64},
        "full": {},
        "full, --offload": {"offload": True},
        "full, 8 shards": {"parallel": "fsdp"},
    }
    columns = {}
    for size in ("3b", "7b"):
        model = without_weights(config_of(size))
        for kind, flags in kinds.items():
            gpus = 8 if "parallel" in flags else 1
            cfg = train_grpo.Config(
                prompts=8 * gpus, group=16, max_new_tokens=512, checkpointing=True, **flags
            )
            columns[f"{size.upper()} {kind}"] = memory(
                Need(model, cfg, gpus, prompt=1150, patches=3600)
            )
    return table(columns)


@dataclass
class GrpoPlan(train_grpo.Config):
    gpus: int = flag(1, "GPUs of the run", low=1)
    card: float = flag(80.0, "memory of each, GB", above=0)


@dataclass
class SftPlan(train_sft.Config):
    gpus: int = flag(1, "GPUs of the run", low=1)
    card: float = flag(80.0, "memory of each, GB", above=0)


def main(argv: list[str]) -> None:
    if not argv:
        print(overview())
        return
    kind = SftPlan if argv[0] == "train_sft" else GrpoPlan
    config = parse_args(kind, __doc__, argv=argv[argv[0] in ("train_sft", "train_grpo") :])
    with exit_on(ValueError, OSError):
        print(plan(config))


if __name__ == "__main__":
    main(sys.argv[1:])
