"""Where the memory of a training run goes, and how much it computes, from a configuration (make memory).

    python -m bench.memory                          # 3B and 7B, LoRA, full and sharded, at 840 px, G = 16, 512 tokens
    python -m bench.memory train_grpo @recipes/lora_7b.args --data U-MRG-14K --gpus 8      # one run, or train_sft

Counts are exact (the model is built without memory); activations are those of --checkpointing: one hidden state per
layer and token, and one layer's own working set. Seconds are arithmetic, at a stated throughput, not measurements.
"""
import argparse
import re
import sys
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import train_grpo
import train_sft
from bench.random_model import SIZES, config_of
from crm import CHAT, LORA_TARGETS
from data import MAX_PIXELS, MIN_PIXELS, fill_prompt, load_prompt, load_samples, model_size
from runtime.cli import exit_on, flag, parse_args
from scoring import LOGITS_CHUNK

BF16, FP32, GB = 2, 4, 1e9
SUSTAINED = 400e12                  # operations per second of one H100 that a well-fed bfloat16 model reaches


def without_weights(config):
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def memory(model, lora_rank: int, group: int, tokens: int, prompt: int, prompts: int, pack: int, shards: int = 1,
           reference: bool = True, offload: bool = False) -> dict[str, float]:
    """GB of one rank by purpose. prompt: tokens of text and image; prompts: sampled at once; pack: --pack-tokens;
    shards: ranks over which FSDP shards the model, 1 without. offload: what --offload leaves on the GPU."""
    c, N = model.config.text_config, sum(p.numel() for p in model.parameters())
    head = c.hidden_size // c.num_attention_heads
    adapted = [m for name, m in model.named_modules()
               if isinstance(m, torch.nn.Linear) and re.fullmatch(LORA_TARGETS, name)]
    trained = sum(lora_rank * (m.in_features + m.out_features) for m in adapted) if lora_rank else N
    S = max(pack, prompt + tokens)                      # longest pack: one completion is never cut
    wide = 3 * c.intermediate_size + 6 * c.hidden_size  # what one layer keeps per token while it is recomputed
    out = {"weights, bfloat16": N * BF16,               # under FSDP: unsharded to sample
           "LoRA matrices, bfloat16": trained * BF16 if lora_rank else 0,
           "float32 masters": trained * FP32 / shards,
           "gradients, float32": trained * FP32 / shards, "AdamW's two moments": trained * 2 * FP32 / shards,
           "reference": 0 if lora_rank or not reference else N * BF16 / shards,
           "cache while sampling": prompts * (prompt + group * tokens) * c.num_hidden_layers * 2
           * c.num_key_value_heads * head * BF16,
           "activations while updating": S * (c.num_hidden_layers * c.hidden_size + wide) * BF16,
           "logits, a chunk": 3 * LOGITS_CHUNK["cuda"] * FP32}
    out = {name: value / GB for name, value in out.items()}
    in_turn = ["cache while sampling", "activations while updating"]
    if offload:                             # gradients are added up on the GPU; the reference comes for its pass
        out |= dict.fromkeys(("float32 masters", "AdamW's two moments"), 0.0)
        in_turn.append("reference")
    steady = sum(v for k, v in out.items() if k not in in_turn)
    return out | {"most at once": steady + max(out[k] for k in in_turn)}


def table(columns: dict[str, dict[str, float]]) -> str:
    lines = ["| GB | " + " | ".join(columns) + " |", "|---" + "|---" * len(columns) + "|"]
    for name in next(iter(columns.values())):
        lines.append(f"| {name} | " + " | ".join(f"{column[name]:.1f}" for column in columns.values()) + " |")
    return "\n".join(lines)


def plan(cfg) -> str:
    """What a run of train_grpo.py or train_sft.py needs and does: config.json, tokenizer, image processor and data
    are read, the model is built without memory, no weight is loaded. ValueError as load_crm."""
    train = load_samples(cfg.data, "train", cfg.skip_bad_rows)
    try:
        model = without_weights(AutoConfig.from_pretrained(cfg.crm))
        tokenizer, processor = AutoTokenizer.from_pretrained(cfg.crm), Qwen2VLImageProcessorPil.from_pretrained(cfg.crm)
    except OSError as error:
        raise ValueError(f"--crm {cfg.crm}: cannot be loaded ({str(error).splitlines()[0]})") from None
    most = cfg.max_pixels or min(MAX_PIXELS, processor.size["longest_edge"])
    template, lengths = load_prompt(cfg.prompt), []
    for sample in (train[i] for i in range(min(16, len(train)))):
        W, H = model_size(sample.image.size, cfg.resize or "aspect", cfg.min_pixels or MIN_PIXELS, most)
        text = tokenizer("".join(CHAT) + fill_prompt(template, sample.query)).input_ids
        lengths.append(len(text) + W * H // (processor.patch_size * processor.merge_size) ** 2)
    grpo = hasattr(cfg, "group")
    rows, G, prompt = (cfg.prompts, cfg.group, max(lengths)) if grpo else (cfg.batch, 1, max(lengths))
    pack = cfg.pack_tokens if grpo else cfg.micro_batch * (prompt + cfg.max_new_tokens)
    ranks = cfg.gpus
    shards = min(8, ranks) if cfg.parallel == "fsdp" else 1
    column = memory(model, cfg.lora_rank, G, cfg.max_new_tokens, prompt, -(-rows // ranks) if grpo else 0, pack, shards,
                    grpo and cfg.kl_coef > 0, cfg.offload)
    N = sum(p.numel() for p in model.parameters())
    forwards = 3 + cfg.checkpointing + (1 + (cfg.kl_coef > 0) if grpo else 0)       # a backward is worth two
    work = forwards * 2 * N * rows * (prompt + G * cfg.max_new_tokens)
    return (f"{cfg.crm}: {N / 1e9:.2f} billion parameters; {len(train)} training samples; prompts of {min(lengths)} to "
            f"{max(lengths)} tokens; per step {rows} x {G} completions of up to {cfg.max_new_tokens} tokens on {ranks} ranks, "
            f"--parallel {cfg.parallel}\n\n{table({'one rank': column})}\n\n"
            f"{work / 1e15:.2f} PFLOP per step if every completion has full length; at {SUSTAINED / 1e12:.0f} TFLOP/s per rank that "
            f"is {work / SUSTAINED / ranks:.1f} s, beside the sampler's waiting for memory. Arithmetic, not measured.")


@dataclass
class GrpoPlan(train_grpo.Config):
    gpus: int = flag(1, "GPUs of the run", low=1)


@dataclass
class SftPlan(train_sft.Config):
    gpus: int = flag(1, "GPUs of the run", low=1)


if __name__ == "__main__":
    if sys.argv[1:2] in (["train_grpo"], ["train_sft"]):
        config = parse_args(GrpoPlan if sys.argv[1] == "train_grpo" else SftPlan, __doc__, argv=sys.argv[2:])
        with exit_on(ValueError, OSError):
            print(plan(config))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[s for s in SIZES if s != "tiny"], nargs="+", default=["3b", "7b"])
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="per completion")
    parser.add_argument("--prompt", type=int, default=1150, help="tokens; an 840 x 840 image has 900")
    parser.add_argument("--prompts", type=int, default=8, help="sampled at once on one GPU")
    parser.add_argument("--pack", type=int, default=8192, help="--pack-tokens")
    parser.add_argument("--shards", type=int, default=8, help="of --parallel fsdp")
    args = parser.parse_args()
    print(table({f"{size.upper()} {kind}": memory(without_weights(config_of(size)), rank, args.group, args.tokens,
                                                   args.prompt, args.prompts, args.pack, shards, offload=offload)
                 for size in args.size
                 for kind, rank, shards, offload in (("LoRA", args.lora_rank, 1, False), ("full", 0, 1, False),
                                                     ("full, --offload", 0, 1, True),
                                                     (f"full, {args.shards} shards", 0, args.shards, False))}))
