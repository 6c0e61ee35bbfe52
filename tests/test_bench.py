"""What a run needs, computed from its configuration; the random models of the bench."""

import pytest
import torch
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import evaluate
import train_grpo
import train_sft
from bench import memory, random_model
from bench.memory import Need
from runtime.cli import ROOT, parse_args

RECIPES = {"lora_7b": ("train_grpo", 1), "soft_7b": ("train_grpo", 64), "sft_7b": ("train_sft", 8)}


@pytest.fixture(scope="module")
def folder_7b(tmp_path_factory):
    """What a plan reads of Lingshu-7B: its configuration, a tokenizer, an image processor. No
    weights."""
    folder = tmp_path_factory.mktemp("7b")
    tokenizer = AutoTokenizer.from_pretrained("demo/crm")
    random_model.config_of("7b", tokenizer.convert_tokens_to_ids).save_pretrained(folder)
    for part in (tokenizer, Qwen2VLImageProcessorPil(max_pixels=12845056)):
        part.save_pretrained(folder)
    return folder


def need(gpus=1, **flags):
    model = memory.without_weights(random_model.config_of("3b"))
    flags = {"prompts": 8 * gpus, "group": 16, "max_new_tokens": 512, "checkpointing": True} | flags
    return Need(model, train_grpo.Config(**flags), gpus, prompt=1150, patches=3600)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_prints_a_plan_that_fits_its_card(recipe, folder_7b, capsys):
    kind, gpus = RECIPES[recipe]
    memory.main(
        [
            kind,
            f"@recipes/{recipe}.args",
            "--crm",
            str(folder_7b),
            "--data",
            "demo/data",
            "--gpus",
            str(gpus),
        ]
    )
    out = capsys.readouterr().out
    assert "fits on a GPU of 80 GB" in out
    assert "8.29 billion parameters" in out
    assert "PFLOP per step" in out


def test_a_plan_says_what_does_not_fit(folder_7b, capsys):
    memory.main(
        ["@recipes/soft_7b.args", "--crm", str(folder_7b), "--data", "demo/data", "--gpus", "1"]
    )
    out = capsys.readouterr().out
    assert "does NOT fit on a GPU of 80 GB" in out
    assert "1 of a rank's 128 prompts sampled together" in out


def test_a_missing_checkpoint_is_one_line_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        memory.main(["--crm", "nowhere/at/all", "--data", "demo/data"])
    assert stopped.value.code == 2
    assert "error: --crm nowhere/at/all" in capsys.readouterr().err


def test_memory_of_weights_and_optimizer_is_counted_exactly():
    """3B, all weights: bfloat16 weights 2, float32 masters 4, gradients 4, two moments 8 bytes
    each."""
    N = sum(p.numel() for p in need().model.parameters())
    full, offloaded, sharded = (
        memory.memory(need(**flags))
        for flags in ({}, {"offload": True}, {"gpus": 8, "parallel": "fsdp"})
    )
    for name, size in (
        ("weights", 2),
        ("float32 masters", 4),
        ("gradients, float32", 4),
        ("AdamW's two moments", 8),
        ("reference model", 2),
    ):
        assert full[name] == pytest.approx(N * size / 1e9)
    assert offloaded["gradients, float32"] == full["gradients, float32"]  # summed on the GPU
    assert "AdamW's two moments" not in offloaded
    assert "float32 masters" not in offloaded
    assert sharded["AdamW's two moments"] == pytest.approx(N / 1e9)
    assert offloaded["most at once"] < sharded["most at once"] + 20 < full["most at once"]


def test_only_what_trains_has_an_optimizer():
    rank = 64
    lora = memory.memory(need(lora_rank=rank))
    model = need().model
    c = need().model.config.text_config
    layer = sum(
        rank * sum(m.weight.shape)
        for name, m in model.model.language_model.layers[0].named_modules()
        if isinstance(m, torch.nn.Linear)
    )
    assert lora["AdamW's two moments"] == pytest.approx(c.num_hidden_layers * layer * 8 / 1e9)
    assert "reference model" not in lora  # the matrices are switched off instead
    norms = need(trainable="language_model.*norm").trained()
    assert norms
    assert all("norm" in name for name in norms)
    assert need(freeze_vision=True).frozen_tower


def test_rollouts_are_planned_in_chunks_that_half_of_the_free_memory_holds():
    n = need(prompts=64)
    per_prompt = n.cache_per_token * (n.prompt + 16 * 512)
    assert n.cache_per_token == 36 * 2 * 2 * 128 * 2  # layers, k and v, heads, size, bytes
    for free, together in ((1e12, 64), (10 * per_prompt, 5), (0, 1)):
        assert memory.at_once(n, free) == together


def test_trained_vision_tower_keeps_its_activations_and_checkpointing_drops_those_of_the_layers():
    frozen, trained, kept = (
        memory.memory(need(**flags))
        for flags in ({"freeze_vision": True}, {}, {"checkpointing": False})
    )
    name = "update: vision tower"
    assert frozen[name] < trained[name] < kept[name]
    assert kept["update: language layers"] > 5 * trained["update: language layers"]


def test_operations_are_those_of_a_hand_count():
    """3B LoRA: sampling 1, the reference 1, the update 2 and 1 recomputed: five forward passes."""
    n = need(lora_rank=64, minibatches=1)
    model = n.model
    body, head, tower, merger = map(
        memory.count,
        (
            model.model.language_model.layers,
            model.lm_head,
            model.model.visual.blocks,
            model.model.visual.merger,
        ),
    )
    words = 8 * (1150 + 16 * 512)
    completions = 8 * 16 * 512
    expected = 5 * 2 * (body * words + head * completions) + 2 * 8 * 3600 * (tower + merger / 4)
    assert memory.operations(n) == pytest.approx(expected)


def test_recipes_parse_and_their_multi_node_commands_have_a_rendezvous():
    for recipe, (kind, _) in RECIPES.items():
        config = train_grpo.Config if kind == "train_grpo" else train_sft.Config
        parse_args(config, "", argv=[f"@recipes/{recipe}.args"])
        text = (ROOT / f"recipes/{recipe}.args").read_text()
        for start in text.split("torchrun ")[1:]:
            command = start.split("\n\n")[0].split(f"@recipes/{recipe}")[0]
            several = "--nnodes" in command
            for flag in ("--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"):
                assert (flag in command) == several, command
        assert "--nnodes" in text
    assert "cannot be reproduced" in (ROOT / "recipes/eval_7b.args").read_text()
    for recipe in ("eval_7b", "slake_7b", "biomedparse_7b"):
        cfg = parse_args(
            evaluate.Config, "", argv=[f"@recipes/{recipe}.args"], embedded=lambda config: []
        )
        assert cfg.split == "test"
        assert cfg.resize == "square:840"


def test_random_models_have_large_key_biases_in_the_first_and_the_last_layer():
    crm = random_model.random_model("tiny", dtype=torch.float32)
    layers = crm.model.model.language_model.layers
    for layer in (layers[0], layers[-1]):
        bias = layer.self_attn.k_proj.bias.view(-1, layer.self_attn.head_dim)
        assert ((bias > 50).sum(1) == 4).all()  # four channels per head
    config = random_model.config_of("wide").text_config
    real = random_model.config_of("3b").text_config
    assert config.hidden_size == real.hidden_size
    assert config.num_hidden_layers == 2
