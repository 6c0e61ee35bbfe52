"""A Qwen2.5-VL of the real architecture with random weights: for speed and memory without a
checkpoint.

    python -m bench.random_model 3b --out build/3b

    3b, 7b   the released sizes
    wide     the 3B's width with two language and two vision layers and 8,192 words, for a CPU
    tiny     their shape, small

The tokenizer is the embedded one: its prompts are shorter than Qwen's, and ids beyond it decode to
nothing. Completions of such a model practically never end by themselves, so each has
--max-new-tokens tokens. As in the released weights, a few key biases are very large, see
`add_key_biases`.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from crm import CRM, END

RELEASED_MAX_PIXELS = 12845056  # in the preprocessor_config.json of the released checkpoints
VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    window_size=112,
    fullatt_block_indexes=[7, 15, 23, 31],
)
TEXT_3B = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
)
TEXT_7B = dict(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
)
TEXT_TINY = dict(
    vocab_size=152064,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
VISION_TINY = dict(
    depth=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    window_size=112,
    fullatt_block_indexes=[1],
)
# size -> (language model, vision tower, whether embedding and vocabulary projection are one); 3b
# and 7b are the config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    "3b": (TEXT_3B, VISION, True),
    "7b": (TEXT_7B, VISION, False),
    "wide": (
        TEXT_3B | dict(vocab_size=8192, num_hidden_layers=2),
        VISION | dict(depth=2, fullatt_block_indexes=[1]),
        True,
    ),
    "tiny": (TEXT_TINY, VISION_TINY, True),
}


def no_id(token: str) -> int:
    return 0


def config_of(size: str, to_id: Callable[[str], int] = no_id) -> Qwen2_5_VLConfig:
    """Returns the configuration of a size. to_id: the tokenizer's ids of the special tokens."""
    text, vision, tied = SIZES[size]
    frequencies = text["hidden_size"] // text["num_attention_heads"] // 2  # rotary, of a head
    of_height = 3 * frequencies // 8
    of_time = frequencies - 2 * of_height  # 16, 24, 24 at the real sizes
    rope = dict(
        rope_type="default",
        rope_theta=1e6,
        mrope_section=[of_time, of_height, of_height],
    )
    return Qwen2_5_VLConfig(
        text_config=dict(
            **text,
            max_position_embeddings=128000,
            rms_norm_eps=1e-6,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=to_id("<|im_end|>"),
            pad_token_id=to_id("<|endoftext|>"),
            rope_parameters=rope,
        ),
        vision_config=dict(**vision, out_hidden_size=text["hidden_size"]),
        tie_word_embeddings=tied,
        image_token_id=to_id("<|image_pad|>"),
        video_token_id=to_id("<|video_pad|>"),
        vision_start_token_id=to_id("<|vision_start|>"),
        vision_end_token_id=to_id("<|vision_end|>"),
    )


@torch.no_grad()
def add_key_biases(
    model: torch.nn.Module, key: float = 100.0, query: float = 5.0, channels: int = 4
) -> None:
    """Adds large biases to a few channels of every head of the first and the last language layer,
    in place.

    Qwen2.5's key biases have norms of several hundred in such layers. Attention scores become so
    large there that rounding them to bfloat16 costs nats. The channels are the last of each half of
    a head, whose rotary frequencies are the slowest, so the large score depends little on the
    distance between tokens."""
    layers = model.model.language_model.layers
    for attention in {layers[0].self_attn, layers[-1].self_attn}:
        half = attention.head_dim // 2
        for projection, size in ((attention.k_proj, key), (attention.q_proj, query)):
            heads = projection.bias.view(-1, 2, half)  # (heads, half, channels of a half)
            heads[:, :, half - channels // 2 :] += size


def random_model(
    size: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str = "demo/crm",
    seed: int = 0,
) -> CRM:
    """Returns a CRM of that size with random weights and large key biases; the same for the same
    seed."""
    own_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    config = config_of(size, own_tokenizer.convert_tokens_to_ids)
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(usual)
    add_key_biases(model)
    model.generation_config.eos_token_id = own_tokenizer.convert_tokens_to_ids(list(END))
    return CRM(model, own_tokenizer, Qwen2VLImageProcessorPil(max_pixels=RELEASED_MAX_PIXELS))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    crm = random_model(args.size, "cuda" if torch.cuda.is_available() else "cpu")
    crm.save(args.out)
    billions = sum(p.numel() for p in crm.model.parameters()) / 1e9
    print(f"{billions:.2f} billion parameters -> {args.out}")


if __name__ == "__main__":
    main()
