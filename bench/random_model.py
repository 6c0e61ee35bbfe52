"""A model of the real architecture with random weights: for speed and memory without a checkpoint.

    python -m bench.random_model 3b --out build/3b

    3b, 7b      the released sizes of Qwen2.5-VL
    wide        the 3B's width with two language and two vision layers and 8,192 words, for a CPU
    tiny        their shape, small
    qwen3-2b, qwen3-4b, qwen3-8b    the released sizes of Qwen3-VL
    qwen3-tiny  their shape, small, with 8,192 words

The tokenizer is the embedded one: its prompts are shorter than Qwen's, and ids beyond it decode to
nothing. Completions of such a model practically never end by themselves, so each has
--max-new-tokens tokens. As in the released weights, a few channels of the keys are very large, see
`add_key_biases` and `scale_key_norms`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from crm import CRM, END
from demo.make.crm import image_processor_of
from runtime.pretrained import FAMILIES

RELEASED_MAX_PIXELS = 12845056  # in the preprocessor_config.json of Qwen2.5-VL's checkpoints
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
TEXT_QWEN3_2B = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=6144,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
)
TEXT_QWEN3_4B = TEXT_QWEN3_2B | dict(
    hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32
)
TEXT_QWEN3_8B = TEXT_QWEN3_4B | dict(hidden_size=4096, intermediate_size=12288)
TEXT_QWEN3_TINY = TEXT_TINY | dict(vocab_size=8192, head_dim=48)
VISION_QWEN3 = dict(
    depth=24,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=16,
    deepstack_visual_indexes=[5, 11, 17],
)
VISION_QWEN3_8B = dict(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    deepstack_visual_indexes=[8, 16, 24],
)
VISION_QWEN3_TINY = dict(
    depth=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    deepstack_visual_indexes=[0],
)


@dataclass(frozen=True)
class Size:
    """A model by its configuration."""

    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool  # embedding and vocabulary projection are one
    family: str = "qwen2_5_vl"


# the released ones are the config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct, and of
# Qwen3-VL-2B-Instruct, -4B-Instruct and -8B-Instruct
SIZES = {
    "3b": Size(TEXT_3B, VISION, tied=True),
    "7b": Size(TEXT_7B, VISION, tied=False),
    "wide": Size(
        TEXT_3B | dict(vocab_size=8192, num_hidden_layers=2),
        VISION | dict(depth=2, fullatt_block_indexes=[1]),
        tied=True,
    ),
    "tiny": Size(TEXT_TINY, VISION_TINY, tied=True),
    "qwen3-2b": Size(TEXT_QWEN3_2B, VISION_QWEN3, tied=True, family="qwen3_vl"),
    "qwen3-4b": Size(TEXT_QWEN3_4B, VISION_QWEN3, tied=True, family="qwen3_vl"),
    "qwen3-8b": Size(TEXT_QWEN3_8B, VISION_QWEN3_8B, tied=False, family="qwen3_vl"),
    "qwen3-tiny": Size(TEXT_QWEN3_TINY, VISION_QWEN3_TINY, tied=True, family="qwen3_vl"),
}


def no_id(token: str) -> int:
    return 0


def rope_of(size: Size) -> dict[str, Any]:
    """Returns the rotary frequencies of a head, shared out to time, height and width: 16, 24, 24
    in the real Qwen2.5-VL, 24, 20, 20 in the real Qwen3-VL."""
    text = size.text
    head_size = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"])
    frequencies = head_size // 2
    sixteenths, own = {
        "qwen2_5_vl": (6, dict(rope_theta=1e6)),
        "qwen3_vl": (5, dict(rope_theta=5e6, mrope_interleaved=True)),
    }[size.family]
    of_height = sixteenths * frequencies // 16
    of_time = frequencies - 2 * of_height
    return dict(rope_type="default", mrope_section=[of_time, of_height, of_height], **own)


def config_of(size: str, to_id: Callable[[str], int] = no_id) -> PreTrainedConfig:
    """Returns the configuration of a size. to_id: the tokenizer's ids of the special tokens."""
    of_size = SIZES[size]
    text = of_size.text
    return FAMILIES[of_size.family].model.config_class(
        text_config=dict(
            **text,
            max_position_embeddings=128000,
            rms_norm_eps=1e-6,
            tie_word_embeddings=of_size.tied,
            bos_token_id=None,
            eos_token_id=to_id("<|im_end|>"),
            pad_token_id=to_id("<|endoftext|>"),
            rope_parameters=rope_of(of_size),
        ),
        vision_config=dict(**of_size.vision, out_hidden_size=text["hidden_size"]),
        tie_word_embeddings=of_size.tied,
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


@torch.no_grad()
def scale_key_norms(model: torch.nn.Module, weight: float = 30.0, channels: int = 4) -> None:
    """Makes the same channels of the same layers large in a Qwen3-VL, in place. Its keys have no
    biases but are normalised, so it is the weights of their norms that are large."""
    layers = model.model.language_model.layers
    for attention in {layers[0].self_attn, layers[-1].self_attn}:
        half = attention.head_dim // 2
        weights = attention.k_norm.weight.view(2, half)  # (half, channels of a half)
        weights[:, half - channels // 2 :] = weight


LARGE_KEYS = {"qwen2_5_vl": add_key_biases, "qwen3_vl": scale_key_norms}


def random_model(
    size: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    tokenizer: str = "demo/crm",
    seed: int = 0,
) -> CRM:
    """Returns a CRM of that size with random weights and a few large channels of its keys; the same
    for the same seed."""
    own_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    config = config_of(size, own_tokenizer.convert_tokens_to_ids)
    family = SIZES[size].family
    torch.manual_seed(seed)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = FAMILIES[family].model(config)
    finally:
        torch.set_default_dtype(usual)
    LARGE_KEYS[family](model)
    model.generation_config.eos_token_id = own_tokenizer.convert_tokens_to_ids(list(END))
    return CRM(model, own_tokenizer, image_processor_of(family, RELEASED_MAX_PIXELS))


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
