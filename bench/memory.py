"""What a training run needs: memory per GPU by purpose, and operations per step (make memory).

    python -m bench.memory                                          # each size: LoRA, all weights,
                                                                    # offloaded, sharded
    python -m bench.memory @recipes/lora_7b.args --data U-MRG-14K --gpus 8           # a GRPO run
    python -m bench.memory train_sft @recipes/sft_7b.args --data U-MRG-14K --gpus 8  # an SFT run

The configuration, the tokenizer and some of the data are read; no weight is loaded. Parameters are
counted exactly, on a model without memory. Activations are arithmetic, from the shapes in
sampling.py and scoring.py, for completions of full length. Nothing here is measured; a run's own
peak is in its metrics.jsonl.

Three phases take turns: sampling, the reference's forward pass, the update. What they share stays.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train_grpo
import train_sft
from bench.random_model import config_of
from crm import CHAT, LORA_TARGETS
from data import (
    EMBEDDED,
    MAX_PIXELS,
    MIN_PIXELS,
    Examples,
    fill_prompt,
    load_prompt,
    load_samples,
    model_size,
)
from runtime.cli import exit_on, flag, parse_args, use_embedded
from runtime.optim import BUCKET
from runtime.pretrained import FAMILIES, Family, read_settings
from scoring import LOGITS_AT_ONCE

GB = 1e9
CONTEXT = 1.0  # GB that CUDA, cuBLAS and NCCL take: an assumption
SUSTAINED = 400e12  # operations per second of one H100 that a well-fed bfloat16 model reaches
USABLE = 0.95  # of a card, beside what fragmentation wastes
MERGE = 2  # patches along an image token
EXAMPLES_READ = 16  # of the training data, for the lengths of prompts
MOST_SHARDS = 8  # GPUs of a node: runtime/fsdp.py shards within one
Bytes = dict[str, float]  # by purpose
Config = train_grpo.Config | train_sft.Config


class Need:
    """What decides the memory of one rank. Sizes are in tokens and in patches of the vision tower.

    model    without memory
    cfg      the run's Config
    prompt   tokens of the longest prompt, its image's among them
    patches  of its image
    card     memory of a GPU, GB
    """

    def __init__(
        self,
        model: torch.nn.Module,
        cfg: Config,
        gpus: int,
        prompt: int,
        patches: int,
        card: float = 80.0,
    ):
        self.model = model
        self.cfg = cfg
        self.gpus = gpus
        self.prompt = prompt
        self.patches = patches
        self.card = card
        self.width = 4 if cfg.dtype == "float32" else 2  # bytes per weight
        self.is_grpo = isinstance(cfg, train_grpo.Config)
        longest = prompt + cfg.max_new_tokens  # one completion is never cut
        if self.is_grpo:
            self.G = cfg.group
            self.questions = cfg.prompts  # per step, over all ranks
            self.prompts = -(-cfg.prompts // gpus)  # sampled per step by a rank
            self.pack = max(cfg.pack_tokens, longest)  # tokens scored at once
            self.images = max(1, self.pack // (prompt + self.G))  # of a pack
            self.reference = cfg.kl_coef > 0 and cfg.lora_rank == 0
        else:
            self.G = 1
            self.questions = cfg.batch
            self.prompts = 0
            self.pack = cfg.micro_batch * longest
            self.images = cfg.micro_batch
            self.reference = False
        self.shards = 1
        if cfg.parallel == "fsdp" and gpus > 1:
            self.shards = min(MOST_SHARDS, gpus)

        text = model.config.text_config
        self.family = FAMILIES[model.config.model_type]
        self.head_size = model.model.language_model.layers[0].self_attn.head_dim
        width_of_keys = text.num_key_value_heads * self.head_size
        self.cache_per_token = 2 * text.num_hidden_layers * width_of_keys * self.width
        of_tower = [name for name in self.trained() if name.startswith("model.visual")]
        self.tower_is_frozen = cfg.lora_rank > 0 or not of_tower

    def trained(self) -> dict[str, int]:
        """Returns {name: number of elements} of what trains."""
        rank = self.cfg.lora_rank
        if rank > 0:
            matrices = {}
            for name, module in self.model.named_modules():
                if isinstance(module, torch.nn.Linear) and re.fullmatch(LORA_TARGETS, name):
                    matrices[name] = rank * (module.in_features + module.out_features)
            return matrices
        found = {}
        for name, parameter in self.model.named_parameters():
            if re.search(self.cfg.trainable, name):
                found[name] = parameter.numel()
        return found


def count(module: torch.nn.Module) -> int:
    """Returns the number of a module's weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def without_weights(config: Any) -> torch.nn.Module:
    """Returns a model of a configuration that takes no memory."""
    with torch.device("meta"):
        return FAMILIES[config.model_type].model(config)


# ---------------------------------------------------------------- memory


def resident(n: Need) -> Bytes:
    """Returns the bytes that one rank holds all the time."""
    cfg = n.cfg
    weights = count(n.model)
    trained = sum(n.trained().values())
    found: Bytes = {}
    if n.shards > 1:
        found["weights and float32 masters, sharded"] = weights * 4 / n.shards
    else:
        found["weights"] = weights * n.width
        if cfg.lora_rank > 0:
            found["LoRA matrices"] = trained * n.width
        # in float32 the weights themselves are the masters; offloaded, host memory holds them
        if cfg.dtype != "float32" and not cfg.offload:
            found["float32 masters"] = trained * 4
    found["gradients, float32"] = trained * 4 / n.shards
    if not cfg.offload:
        found["AdamW's two moments"] = trained * 8 / n.shards
    if n.reference and not cfg.offload:
        found["reference model"] = weights * n.width / n.shards
    found["images of a step"] = image_bytes(n) * n.questions / n.gpus
    found["CUDA context (assumed)"] = CONTEXT * GB
    return found


def image_bytes(n: Need) -> float:
    """Returns what one prompt keeps of its image: float32 pixels of two video frames, and, where
    the vision tower is frozen, its features."""
    patch = n.family.stride // MERGE
    pixels = n.patches * 3 * 2 * patch**2 * 4
    if not n.tower_is_frozen:
        return pixels
    hidden = n.model.config.text_config.hidden_size
    return pixels + len(mergers(n.model)) * n.patches / MERGE**2 * hidden * n.width


def mergers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Returns what makes an image token of MERGE x MERGE patches: one merger, and in Qwen3-VL one
    for each inner layer whose features the language model gets as well."""
    visual = model.model.visual
    found = [visual.merger]
    if FAMILIES[model.config.model_type].deepstack:
        found += visual.deepstack_merger_list
    return found


def layer_bytes(n: Need) -> float:
    """Returns what one language layer holds per token while it computes: norms, q k v, attention,
    the MLP's three."""
    text = n.model.config.text_config
    heads = max(text.hidden_size, text.num_attention_heads * n.head_size)  # wider in Qwen3-VL
    return (3 * text.intermediate_size + 3 * text.hidden_size + 3 * heads) * n.width


def tower_bytes(n: Need, backward: bool) -> float:
    """Returns the bytes of the vision tower, per image: one layer's working set, and what its
    layers keep for a backward pass. (The MLP of Qwen3-VL's has two, not three.)"""
    vision = n.model.config.vision_config
    working = (3 * vision.intermediate_size + 6 * vision.hidden_size) * n.width
    kept = 0.0
    if backward and not n.tower_is_frozen:
        per_layer = vision.hidden_size * n.width if n.cfg.checkpointing else working
        kept = vision.depth * per_layer
    return n.patches * (working + kept)


def at_once(n: Need, free: float) -> int:
    """Returns how many prompts are sampled together, with so many bytes free, as
    sampling.prompts_at_once does."""
    per_prompt = n.cache_per_token * (n.prompt + n.G * n.cfg.max_new_tokens)
    fitting = int(free / 2 // per_prompt)
    return min(n.prompts, max(1, fitting))


def sampling_bytes(n: Need, steady: float) -> tuple[Bytes, int]:
    """Returns the bytes while sampling, and how many prompts are sampled together. steady: what is
    resident."""
    text = n.model.config.text_config
    gathered = count(n.model) * n.width if n.shards > 1 else 0
    P = at_once(n, n.card * GB - steady - gathered)
    rows = P * n.G
    keys = n.prompt + n.cfg.max_new_tokens
    caches = P * n.prompt * n.cache_per_token
    prefill = caches + n.prompt * layer_bytes(n) + P * tower_bytes(n, backward=False)
    # logits as computed; in float32, and log p, and p; the distribution function in float64
    logits = rows * text.vocab_size * (n.width + 3 * 4 + 8)
    scores = rows * text.num_attention_heads * keys * 3 * 4  # of one layer, float32
    step = logits + scores + rows * layer_bytes(n)
    found = {
        "weights, gathered": gathered,
        "keys and values of prompts": caches,
        "keys and values of completions": rows * n.cfg.max_new_tokens * n.cache_per_token,
        "prefill, or decoding step": max(prefill, step),
        "decoding step's CUDA graph": step,
    }
    return found, P


def pass_bytes(n: Need, backward: bool) -> Bytes:
    """Returns the bytes of one pack's forward pass, or of forward and backward."""
    text = n.model.config.text_config
    layers = layer_bytes(n)
    kept = 0.0
    if backward:
        per_layer = text.hidden_size * n.width if n.cfg.checkpointing else layers
        kept = text.num_hidden_layers * per_layer
    # the completions' keys and values, each with the prompt's before it
    width_of_keys = text.num_key_value_heads * n.head_size
    keys = n.G * (n.prompt + n.cfg.max_new_tokens)
    repeated = keys * 2 * width_of_keys * n.width
    times = 2 if backward else 1
    logits = LOGITS_AT_ONCE["cuda"]
    copies = 4 if backward else 2  # in float32
    found = {
        "language layers": n.pack * (kept + layers * times) + repeated * times,
        "vision tower": n.images * tower_bytes(n, backward),
        "logits of a chunk": logits * (n.width + copies * 4),
    }
    if n.shards > 1:
        found["two layers, embedding, head, gathered"] = gathered_bytes(n, backward)
    elif backward:
        # one gradient as computed, and in float32
        largest = max(n.trained().values()) * (n.width + 4)
        bucket = 4 * BUCKET if n.gpus > 1 else 0
        found["one gradient, or ranks' bucket"] = max(largest, bucket)
    return found


def gathered_bytes(n: Need, backward: bool) -> float:
    """Returns the bytes of the weights that FSDP has gathered at once, and of their gradients."""
    model = n.model.model
    layers = [*model.language_model.layers, *model.visual.blocks]
    root = count(n.model) - sum(count(layer) for layer in layers)  # embedding and head, mostly
    two = 2 * count(model.language_model.layers[0])
    per_weight = n.width
    if backward:
        per_weight += n.width + 4
    return (root + two) * per_weight


def reference_bytes(n: Need) -> Bytes:
    """Returns the bytes of the reference model's forward pass."""
    found = pass_bytes(n, backward=False)
    if n.reference and n.cfg.offload:
        found["reference model"] = count(n.model) * n.width
    if n.reference and n.shards > 1:
        found["two layers, embedding, head, gathered"] = 0
        found["reference model, gathered"] = count(n.model) * n.width
    return found


def memory(n: Need) -> dict[str, float]:
    """Returns GB of one rank by purpose: what is resident, then each phase's own, then the most at
    once."""
    steady = resident(n)
    base = sum(steady.values())
    phases: dict[str, Bytes] = {}
    if n.prompts > 0:
        phases["sampling"], _ = sampling_bytes(n, base)
    if n.is_grpo and n.cfg.kl_coef > 0:
        phases["reference"] = reference_bytes(n)
    phases["update"] = pass_bytes(n, backward=True)
    rows = dict(steady)
    for phase, parts in phases.items():
        for name, value in parts.items():
            rows[f"{phase}: {name}"] = value
    largest = max(sum(parts.values()) for parts in phases.values())
    found = {name: value / GB for name, value in rows.items() if value > 0}
    found["most at once"] = (base + largest) / GB
    return found


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Returns Markdown: what is resident, then the phases, the most at once last. A cell is empty
    where it is 0."""
    names = []
    for phase in ("", "sampling", "reference", "update"):
        for column in columns.values():
            for name in column:
                own_phase = name.partition(": ")[0] if ": " in name else ""
                if own_phase == phase and name != "most at once" and name not in names:
                    names.append(name)
    lines = ["| GB | " + " | ".join(columns) + " |", "|---" + "|---" * len(columns) + "|"]
    for name in [*names, "most at once"]:
        cells = []
        for column in columns.values():
            cells.append(f"{column[name]:.1f}" if name in column else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- operations


def operations(n: Need) -> float:
    """Returns the operations of a step over all ranks, for completions of full length.

    A forward is 2 per weight and token, a backward 4, or 2 through frozen weights. Attention's own
    products are left out."""
    cfg = n.cfg
    model = n.model.model
    visual = model.visual
    written = n.G * cfg.max_new_tokens
    body = 2 * count(model.language_model.layers) * (n.prompt + written)
    head = 2 * count(n.model.lm_head) * written
    of_patches = count(visual.blocks) * n.patches
    of_tokens = sum(count(merger) for merger in mergers(n.model)) * n.patches / MERGE**2
    tower = 2 * (of_patches + of_tokens)
    update = 2 if cfg.lora_rank > 0 else 3  # in forward passes
    if cfg.checkpointing:
        update += 1
    forwards = update
    if n.is_grpo:
        updates = cfg.inner_epochs * cfg.minibatches
        forwards = 1 + update * cfg.inner_epochs  # sampling first
        if updates > 1:
            forwards += 1  # the policy that sampled
        if cfg.kl_coef > 0:
            forwards += 1  # the reference model
    tower_forwards = 1 if n.tower_is_frozen else forwards
    return n.questions * ((body + head) * forwards + tower * tower_forwards)


# ---------------------------------------------------------------- plans


def plan(cfg: Any) -> str:
    """Returns what a run needs, as text. ValueError when the checkpoint's configuration cannot be
    read.

    cfg: a GrpoPlan or an SftPlan."""
    train = load_samples(cfg.data, "train", cfg.skip_bad_rows)
    try:
        config = AutoConfig.from_pretrained(cfg.crm)
        if config.model_type not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise ValueError(f"--crm {cfg.crm}: {config.model_type!r} is not one of {known}")
        lengths, patches = prompt_sizes(cfg, train, FAMILIES[config.model_type])
    except OSError as error:
        problem = str(error).splitlines()[0]
        raise ValueError(f"--crm {cfg.crm}: cannot be loaded ({problem})") from None
    model = without_weights(config)
    n = Need(model, cfg, cfg.gpus, max(lengths), max(patches), cfg.card)
    column = memory(n)
    work = operations(n)
    usable = USABLE * cfg.card
    trained = sum(n.trained().values())
    fits = "fits" if column["most at once"] <= usable else "does NOT fit"
    together = ""
    if n.prompts > 0:
        _, P = sampling_bytes(n, sum(resident(n).values()))
        together = f", {P} of a rank's {n.prompts} prompts sampled together"
    seconds = work / SUSTAINED / cfg.gpus
    lines = [
        f"{cfg.crm}: {count(model) / 1e9:.2f} billion parameters, {trained:,} of them train",
        f"{len(train)} training examples, prompts of {min(lengths)} to {max(lengths)} tokens",
        f"per step {n.questions} x {n.G} completions of up to {cfg.max_new_tokens} tokens",
        f"on {cfg.gpus} GPUs, --parallel {cfg.parallel}{together}",
        "",
        table({"one GPU": column}),
        "",
        f"{fits} on a GPU of {cfg.card:g} GB, of which {usable:.0f} are counted on",
        f"{work / 1e15:.2f} PFLOP per step: {seconds:.1f} s at {SUSTAINED / 1e12:.0f} TFLOP/s per "
        "GPU, beside the sampler's waiting for memory",
        "arithmetic for completions of full length, not measured",
    ]
    return "\n".join(lines)


def prompt_sizes(cfg: Config, train: Examples, family: Family) -> tuple[list[int], list[int]]:
    """Returns the tokens of some training prompts, and the patches of their images, as load_crm's
    CRM would encode them."""
    tokenizer = AutoTokenizer.from_pretrained(cfg.crm)
    processor = Qwen2VLImageProcessorPil.from_pretrained(cfg.crm)
    settings = read_settings(cfg.crm)
    largest = min(MAX_PIXELS, processor.size["longest_edge"])
    resize = cfg.resize or settings.get("resize", "aspect")
    min_pixels = settings.get("min_pixels", MIN_PIXELS)
    max_pixels = settings.get("max_pixels", largest)
    coordinates = settings.get("coordinates", family.coordinates)
    template = load_prompt(cfg.prompt or settings.get("prompt", "reasoning"))
    lengths = []
    patches = []
    for i in range(min(EXAMPLES_READ, len(train))):
        example = train[i]
        size = example.image.size
        width, height = model_size(size, resize, min_pixels, max_pixels, family.stride)
        image_tokens = width * height // family.stride**2
        patches.append(image_tokens * MERGE**2)
        text = family.system + "".join(CHAT) + fill_prompt(template, example.query, coordinates)
        lengths.append(len(tokenizer(text).input_ids) + image_tokens)
    return lengths, patches


OVERVIEW = (("3b", "7b"), ("qwen3-2b", "qwen3-4b", "qwen3-8b"))  # a table each


def overview(sizes: Sequence[str]) -> str:
    """Returns a table of some sizes at 840 x 840 px (Qwen3-VL: 832 x 832): 8 prompts per GPU, 16
    completions of 512 tokens, --checkpointing."""
    kinds = {
        "LoRA": {"lora_rank": 64},
        "full": {},
        "full, --offload": {"offload": True},
        "full, 8 shards": {"parallel": "fsdp"},
    }
    columns = {}
    for size in sizes:
        model = without_weights(config_of(size))
        stride = FAMILIES[model.config.model_type].stride
        image_tokens = (840 // stride) ** 2
        for kind, flags in kinds.items():
            gpus = 8 if "parallel" in flags else 1
            cfg = train_grpo.Config(
                prompts=8 * gpus, group=16, max_new_tokens=512, checkpointing=True, **flags
            )
            patches = image_tokens * MERGE**2
            need = Need(model, cfg, gpus, prompt=image_tokens + 250, patches=patches)
            columns[f"{size.removeprefix('qwen3-').upper()} {kind}"] = memory(need)
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
        print("\n\n".join(overview(sizes) for sizes in OVERVIEW))
        return
    script = ""
    words = argv
    if argv[0] in ("train_sft", "train_grpo"):
        script = argv[0]
        words = argv[1:]
    config_class = SftPlan if script == "train_sft" else GrpoPlan
    cfg = parse_args(config_class, __doc__, argv=words)
    with exit_on(ValueError, OSError):
        use_embedded(cfg, {"crm": EMBEDDED["crm"], "data": EMBEDDED["data"]})
        print(plan(cfg))


if __name__ == "__main__":
    main(sys.argv[1:])
