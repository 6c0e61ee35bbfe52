"""The embedded tiny CRM: a real Qwen2.5-VL with random weights and a small tokenizer, taught by train_sft.py.

    python -m demo.make_crm            # tokenizer, random model, pool of warm-start data, SFT, demo/crm

Same classes and same file formats as Qwen2.5-VL-7B, a two-thousandth of its size. Seed 0. The warm start stops early on
purpose: it writes the format and points roughly. Measured on two shared cores (2026-11-22): 3.07M parameters, 1,600 steps
of 16, 42 minutes beside other work.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from crm import BANNED, CHAT, CRM, END, load_crm
from data import PROMPTS, load_samples

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BANNED]


def tiny_tokenizer(texts, vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's own pre-tokenizer (one token a digit) and special tokens, trained on texts."""
    tokenizer = Qwen2Tokenizer().train_new_from_iterator(texts, vocab_size - len(SPECIAL), show_progress=False)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[1:]})
    return tokenizer


def tiny_crm(texts, vocab_size=2048, hidden=192, layers=4, heads=6, kv_heads=2, mlp=512,
             vision_hidden=128, vision_layers=4, vision_heads=4, vision_mlp=256, seed=0, **options) -> CRM:
    """A CRM with random weights. Every second vision layer sees the whole image, the others 112-pixel windows."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(texts, vocab_size)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    half = hidden // heads // 2                     # rotary frequencies, shared out to time, height and width
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    config = Qwen2_5_VLConfig(
        text_config=dict(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=hidden, intermediate_size=mlp,
                         num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                         max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
                         rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=sections)),
        vision_config=dict(depth=vision_layers, hidden_size=vision_hidden, intermediate_size=vision_mlp,
                           num_heads=vision_heads, out_hidden_size=hidden, window_size=112,
                           fullatt_block_indexes=list(range(1, vision_layers, 2))),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"], tie_word_embeddings=True,
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = [ids[token] for token in END]
    return CRM(model, tokenizer, Qwen2VLImageProcessorPil(max_pixels=224 * 224), **options)      # the data's largest


def corpus(samples) -> list[str]:
    """What the tokenizer is trained on: the prompts, and the questions and traces of the data."""
    rows = samples.rows
    return [*PROMPTS.values(), *CHAT, *(row["query"] for row in rows), *(row["think"] for row in rows)] + \
        [json.dumps({"bbox": [0] * 4, "points_1": [0] * 2, "points_2": [0] * 2})] * 500


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", default="build/pool", help="training data; made with demo.make_data when missing")
    parser.add_argument("--pool-size", type=int, default=12000)
    parser.add_argument("--work", default="build/crm", help="folder for the random model and the SFT run")
    parser.add_argument("--out", default="demo/crm")
    parser.add_argument("--steps", type=int, nargs="+", default=[1100, 1600],
                        help="optimizer steps; each further number resumes with a longer cosine")
    parser.add_argument("--lr", type=float, default=1e-3)
    for name, default in dict(vocab_size=2048, hidden=192, layers=4, heads=6, kv_heads=2, mlp=512, vision_hidden=128,
                              vision_layers=4, vision_heads=4, vision_mlp=256).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    options = vars(parser.parse_args())
    pool, size, work, out, steps, lr = (options.pop(k) for k in ("pool", "pool_size", "work", "out", "steps", "lr"))
    if not Path(pool).exists():
        subprocess.run([sys.executable, "-m", "demo.make_data", "--train", str(size), "--test", "0", "--seed", "1",
                        "--out", pool], check=True)
    crm = tiny_crm(corpus(load_samples(pool)), **options)
    print(f"{sum(p.numel() for p in crm.model.parameters()) / 1e6:.2f}M parameters, {len(crm.tokenizer)} tokens")
    crm.save(f"{work}/random")
    for i, total in enumerate(steps):
        subprocess.run([sys.executable, "train_sft.py", "--crm", f"{work}/random", "--data", pool, "--steps", str(total),
                        "--batch", "16", "--lr", str(lr), "--out", f"{work}/sft", "--eval-every", "-1",
                        *["--resume"] * (i > 0)], check=True)
    last = load_crm(f"{work}/sft/step_{steps[-1]:06d}")
    last.model.half()                               # on disk only: load_crm casts to what is asked for
    last.save(out)
