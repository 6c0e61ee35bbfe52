"""Where the memory of a training run goes, computed from a configuration (make memory).

    python -m bench.memory                                  # 3B and 7B, LoRA and full, at 840 px, G = 16, 512 tokens

Counts are exact (the model is built without memory); activations are those of train_grpo.py with --checkpointing:
one hidden state a layer and token, and one layer's own working set.
"""
import argparse
import re

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from bench.random_model import SIZES, config_of
from crm import LOGITS_CHUNK, LORA_TARGETS

BF16, FP32, GB = 2, 4, 1e9


def memory(size: str, lora_rank: int, group: int, tokens: int, prompt: int, prompts: int, pack: int) -> dict[str, float]:
    """GB by purpose. prompt: tokens of text and image; prompts: sampled at once; pack: --pack-tokens."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config_of(size))
    c, N = model.config.text_config, sum(p.numel() for p in model.parameters())
    head = c.hidden_size // c.num_attention_heads
    adapted = [m for name, m in model.named_modules()
               if isinstance(m, torch.nn.Linear) and re.fullmatch(LORA_TARGETS, name)]
    trained = sum(lora_rank * (m.in_features + m.out_features) for m in adapted) if lora_rank else N
    S = max(pack, prompt + tokens)                      # longest stream: one answer is never cut
    wide = 3 * c.intermediate_size + 6 * c.hidden_size  # what one layer keeps of a token while it is recomputed
    out = {"weights, bfloat16": N * BF16,
           "float32 masters": 0 if lora_rank else N * FP32,
           "trained LoRA matrices, float32": trained * FP32 if lora_rank else 0,
           "gradients, float32": trained * FP32, "AdamW's two moments": trained * 2 * FP32,
           "reference": 0 if lora_rank else N * BF16,
           "cache while sampling": prompts * (prompt + group * tokens) * c.num_hidden_layers * 2
           * c.num_key_value_heads * head * BF16,
           "activations while updating": S * (c.num_hidden_layers * c.hidden_size + wide) * BF16,
           "logits, a chunk": 3 * LOGITS_CHUNK["cuda"] * FP32}
    out = {name: value / GB for name, value in out.items()}
    steady = sum(v for k, v in out.items() if k not in ("cache while sampling", "activations while updating"))
    return out | {"most at once": steady + max(out["cache while sampling"], out["activations while updating"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[s for s in SIZES if s != "tiny"], nargs="+", default=["3b", "7b"])
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--prompt", type=int, default=1150, help="tokens; an 840 x 840 image has 900")
    parser.add_argument("--prompts", type=int, default=8, help="sampled at once on one GPU")
    parser.add_argument("--pack", type=int, default=8192, help="--pack-tokens")
    args = parser.parse_args()
    columns = {f"{size.upper()} {kind}": memory(size, rank, args.group, args.tokens, args.prompt, args.prompts, args.pack)
               for size in args.size for kind, rank in (("LoRA", args.lora_rank), ("full", 0))}
    print("| GB | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(f"{column[name]:.1f}" for column in columns.values()) + " |")
