"""What a run needs, computed from its configuration; random models and commands of the bench."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import Script
from transformers import AutoTokenizer

import evaluate
import train_grpo
import train_sft
from bench import __main__ as bench
from bench import memory, parity, random_model
from bench.memory import Need
from demo.make.crm import image_processor_of
from runtime.cli import ROOT, parse_args
from runtime.files import read_jsonl

RECIPES = {"lora_7b": ("train_grpo", 1), "soft_7b": ("train_grpo", 64), "sft_7b": ("train_sft", 8)}
# recipes of Qwen3-VL: the model of bench/random_model.py, its billions of parameters, a card's GB
QWEN3_RECIPES = {
    "qwen3vl_4b_lora": ("qwen3-4b", 4.44, 24),
    "qwen3vl_8b_lora": ("qwen3-8b", 8.77, 40),
}
CONFIGS = {"train_grpo": train_grpo.Config, "train_sft": train_sft.Config}
FROZEN_TOWER = "language_model|lm_head"  # for --trainable


def write_what_a_plan_reads(folder: Path, size: str) -> str:
    """Writes a configuration, a tokenizer and an image processor. No weights."""
    tokenizer = AutoTokenizer.from_pretrained("demo/crm")
    random_model.config_of(size, tokenizer.convert_tokens_to_ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    family = random_model.SIZES[size].family
    image_processor_of(family, random_model.RELEASED_MAX_PIXELS).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder_7b(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What a plan reads of Lingshu-7B."""
    return write_what_a_plan_reads(tmp_path_factory.mktemp("7b"), "7b")


def need(gpus: int = 1, **flags: object) -> Need:
    """What the 3B needs for 8 prompts per GPU x 16 completions of 512 tokens."""
    usual = {"prompts": 8 * gpus, "group": 16, "max_new_tokens": 512, "checkpointing": True}
    cfg = train_grpo.Config(**usual | flags)
    model = memory.without_weights(random_model.config_of("3b"))
    return Need(model, cfg, gpus, prompt=1150, patches=3600)


def plan(capsys: pytest.CaptureFixture, *words: str) -> str:
    """What bench.memory prints about a run on the embedded data."""
    memory.main([*words, "--data", "demo/data"])
    return capsys.readouterr().out


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_prints_a_plan_that_fits_its_card(recipe, folder_7b, capsys):
    script, gpus = RECIPES[recipe]
    words = (script, f"@recipes/{recipe}.args", "--crm", folder_7b, "--gpus", str(gpus))
    out = plan(capsys, *words)
    assert "fits on a GPU of 80 GB" in out
    assert "8.29 billion parameters" in out
    assert "PFLOP per step" in out


@pytest.mark.parametrize("recipe", QWEN3_RECIPES)
def test_every_recipe_of_qwen3_vl_fits_its_card(recipe, tmp_path, capsys):
    size, billions, card = QWEN3_RECIPES[recipe]
    folder = write_what_a_plan_reads(tmp_path, size)
    out = plan(capsys, f"@recipes/{recipe}.args", "--crm", folder, "--card", str(card))
    assert f"\nfits on a GPU of {card} GB" in out
    assert f"{billions} billion parameters" in out
    said = (ROOT / f"recipes/{recipe}.args").read_text().replace("\n# ", " ")
    most = float(out.split("| most at once | ")[1].split()[0])
    assert f"--card {card}: {most:.0f} GB" in said


def test_a_plan_of_an_unknown_family_is_one_line_with_status_2(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(SystemExit) as stopped:
        plan(capsys, "--crm", str(tmp_path))
    assert stopped.value.code == 2
    assert "'llama' is not one of qwen2_5_vl, qwen3_vl" in capsys.readouterr().err


def test_a_plan_says_what_does_not_fit(folder_7b, capsys):
    out = plan(capsys, "@recipes/soft_7b.args", "--crm", folder_7b, "--gpus", "1")
    assert "does NOT fit on a GPU of 80 GB" in out
    assert "1 of a rank's 128 prompts sampled together" in out


def test_a_plan_resizes_as_the_checkpoint_remembers(folder_7b, tmp_path, capsys):
    for file in Path(folder_7b).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "settings.json").write_text('{"resize": "square:280"}')
    remembered = plan(capsys, "--crm", str(tmp_path))
    given = plan(capsys, "--crm", folder_7b, "--resize", "square:280")
    assert remembered.splitlines()[1:] == given.splitlines()[1:]
    assert "prompts of 2" in given  # a hundred tokens of the image, and more of the words


def test_a_missing_checkpoint_is_one_line_with_status_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        plan(capsys, "--crm", "nowhere/at/all")
    assert stopped.value.code == 2
    assert "error: --crm nowhere/at/all" in capsys.readouterr().err


# ---------------------------------------------------------------- memory


def test_memory_of_weights_and_optimizer_is_counted_exactly():
    """3B, all weights: bfloat16 weights 2, float32 masters 4, gradients 4, two moments 8 bytes."""
    N = memory.count(need().model)
    full = memory.memory(need())
    sizes = {
        "weights": 2,
        "float32 masters": 4,
        "gradients, float32": 4,
        "AdamW's two moments": 8,
        "reference model": 2,
    }
    for name, size in sizes.items():
        assert full[name] == pytest.approx(N * size / 1e9)


def test_offloading_and_sharding_save_what_they_move():
    N = memory.count(need().model)
    full = memory.memory(need())
    offloaded = memory.memory(need(offload=True))
    sharded = memory.memory(need(gpus=8, parallel="fsdp"))
    assert offloaded["gradients, float32"] == full["gradients, float32"]  # summed on the GPU
    assert "AdamW's two moments" not in offloaded
    assert "float32 masters" not in offloaded
    assert sharded["AdamW's two moments"] == pytest.approx(N / 1e9)
    assert offloaded["most at once"] < full["most at once"] - 20
    assert sharded["most at once"] < full["most at once"] - 20


def test_only_what_trains_has_an_optimizer():
    rank = 64
    n = need(lora_rank=rank)
    lora = memory.memory(n)
    layer = 0
    for module in n.model.model.language_model.layers[0].modules():
        if isinstance(module, torch.nn.Linear):
            layer += rank * sum(module.weight.shape)
    layers = n.model.config.text_config.num_hidden_layers
    assert lora["AdamW's two moments"] == pytest.approx(layers * layer * 8 / 1e9)
    assert "reference model" not in lora  # the matrices are switched off instead


def test_what_a_regular_expression_leaves_out_does_not_train():
    norms = need(trainable="language_model.*norm").trained()
    assert norms
    assert all("norm" in name for name in norms)
    assert need(trainable=FROZEN_TOWER).tower_is_frozen
    assert not need().tower_is_frozen


def test_rollouts_are_planned_in_chunks_that_half_of_the_free_memory_holds():
    n = need(prompts=64)
    per_prompt = n.cache_per_token * (n.prompt + 16 * 512)
    assert n.cache_per_token == 36 * 2 * 2 * 128 * 2  # layers, k and v, heads, size, bytes
    for free, together in ((1e12, 64), (10 * per_prompt, 5), (0, 1)):
        assert memory.at_once(n, free) == together


def test_trained_vision_tower_keeps_its_activations_and_checkpointing_drops_those_of_the_layers():
    frozen = memory.memory(need(trainable=FROZEN_TOWER))
    trained = memory.memory(need())
    kept = memory.memory(need(checkpointing=False))
    tower = "update: vision tower"
    assert frozen[tower] < trained[tower] < kept[tower]
    assert kept["update: language layers"] > 5 * trained["update: language layers"]


def test_operations_are_those_of_a_hand_count():
    """3B LoRA: sampling 1, the reference 1, the update 2 and 1 recomputed: five forward passes."""
    n = need(lora_rank=64, minibatches=1)
    body = memory.count(n.model.model.language_model.layers)
    head = memory.count(n.model.lm_head)
    tower = memory.count(n.model.model.visual.blocks)
    merger = memory.count(n.model.model.visual.merger)
    words = 8 * (1150 + 16 * 512)
    written = 8 * 16 * 512
    expected = 5 * 2 * (body * words + head * written) + 2 * 8 * 3600 * (tower + merger / 4)
    assert memory.operations(n) == pytest.approx(expected)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", [*RECIPES, *QWEN3_RECIPES])
def test_recipes_parse_and_their_multi_node_commands_have_a_rendezvous(recipe):
    script, _ = RECIPES.get(recipe, ("train_grpo", 1))
    parse_args(CONFIGS[script], "", argv=[f"@recipes/{recipe}.args"])
    text = (ROOT / f"recipes/{recipe}.args").read_text()
    assert "--nnodes" in text
    for start in text.split("torchrun ")[1:]:
        command = start.split("\n\n")[0].split(f"@recipes/{recipe}")[0]
        for flag in ("--rdzv-backend", "--rdzv-id", "--rdzv-endpoint"):
            assert (flag in command) == ("--nnodes" in command), command


@pytest.mark.parametrize("recipe", ["eval_7b", "slake_7b", "biomedparse_7b"])
def test_recipes_of_evaluations_ask_the_test_split_on_the_papers_canvas(recipe):
    cfg = parse_args(evaluate.Config, "", argv=[f"@recipes/{recipe}.args"])
    assert cfg.split == "test"
    assert cfg.resize == "square:840"


def test_the_recipe_of_the_papers_table_says_what_it_cannot_reproduce():
    text = (ROOT / "recipes/eval_7b.args").read_text().replace("\n# ", " ")
    assert "cannot reproduce the published IoU of 32.42" in text


# ---------------------------------------------------------------- random models and parity


def test_random_models_have_large_key_biases_in_the_first_and_the_last_layer():
    crm = random_model.random_model("tiny", dtype=torch.float32)
    layers = crm.model.model.language_model.layers
    for layer in (layers[0], layers[-1]):
        bias = layer.self_attn.k_proj.bias.view(-1, layer.self_attn.head_dim)
        assert ((bias > 50).sum(1) == 4).all()  # four channels per head


def test_a_random_qwen3_vl_has_large_keys_deepstack_and_heads_of_their_own_size():
    crm = random_model.random_model("qwen3-tiny", dtype=torch.float32)
    layers = crm.model.model.language_model.layers
    for layer in (layers[0], layers[-1]):
        assert (layer.self_attn.k_norm.weight > 20).sum() == 4
    text = crm.model.config.text_config
    assert text.head_dim != text.hidden_size // text.num_attention_heads
    assert text.num_key_value_heads < text.num_attention_heads
    assert len(crm.model.config.vision_config.deepstack_visual_indexes) == 1
    assert crm.coordinates == "norm1000"


@pytest.mark.parametrize(
    "size, billions", [("3b", 3.75), ("7b", 8.29), ("qwen3-2b", 2.13), ("qwen3-8b", 8.77)]
)
def test_released_sizes_have_the_released_number_of_parameters(size, billions):
    model = memory.without_weights(random_model.config_of(size))
    assert memory.count(model) / 1e9 == pytest.approx(billions, abs=0.005)


def test_wide_has_the_width_of_3b_and_two_layers():
    wide = random_model.config_of("wide").text_config
    real = random_model.config_of("3b").text_config
    assert wide.hidden_size == real.hidden_size
    assert wide.num_hidden_layers == 2


@pytest.mark.parametrize("path", ["demo/crm", "QWEN3"])
def test_packed_scores_and_sampled_tokens_are_the_oracles(path, qwen3, monkeypatch):
    for size, small in (("P", 1), ("G", 2), ("T", 12)):
        monkeypatch.setattr(parity, size, small)
    monkeypatch.setattr(parity, "WAYS", {"packed": parity.Way(checkpointing=True)})
    table = parity.parity(path.replace("QWEN3", str(qwen3)), torch.device("cpu"))
    for name in ("float32, packed", "bfloat16, packed"):
        assert table[name]["passed"], (name, table[name])
    # a mean over two dozen tokens is not as small as one over thousands
    assert table["bfloat16, large keys"]["mean gap"] < 5 * parity.GAP


def test_a_row_of_the_parity_table_says_what_failed():
    assert bench.parity_text({"passed": False, "problem": "no kernel"}) == "no kernel"
    assert "0.0123 nats" in bench.parity_text({"mean gap": 0.0123})
    row = {"logp": 1e-7, "gradient": 2e-7, "sampled": 3e-7, "equal completions": 1.0}
    assert bench.parity_text(row).split() == ["1.0e-07", "2.0e-07", "3.0e-07", "1.00"]


# ---------------------------------------------------------------- the commands of python -m bench


def bench_args(*words: str) -> Namespace:
    return bench.parse(list(words))


@pytest.mark.parametrize("size", [None, "wide", "3b", "7b", "qwen3-4b"])
@pytest.mark.parametrize("flags", ["", *bench.OFF.values()])
def test_every_command_of_a_measurement_parses(size, flags):
    args = bench_args(*(["--random-model", size] if size else []))
    words = bench.our_command(flags, args, "out/bench")
    assert words[0] == "train_grpo.py"
    cfg = parse_args(train_grpo.Config, "", argv=words[1:])
    assert cfg.steps == args.steps
    assert cfg.out == "out/bench"
    assert cfg.minibatches == 1
    assert cfg.trainable == ""


def test_graphs_are_switched_off_by_a_module_and_not_by_a_flag():
    args = bench_args("--no-graphs")
    assert bench.our_command("", args, "out")[:2] == ["-m", "bench.without_graphs"]
    assert bench.result_name("roofline", args) == "roofline_no_graphs"


def test_a_run_without_graphs_is_a_run(tmp_path):
    """On a CPU there are none, and the numbers are the same."""
    flags = (
        "@recipes/demo.args --crm demo/crm --data demo/data --steps 1 --prompts 1 --group 2 "
        "--max-new-tokens 8 --eval-every -1 --save-every -1 --out"
    )
    rewards = []
    for script in ("train_grpo.py", "-m bench.without_graphs"):
        out = tmp_path / script.split(".")[0].strip("- ")
        run = Script(f"{script} {flags}", out)
        _, error = run.communicate()
        assert run.returncode == 0, error
        rewards.append(read_jsonl(out / "metrics.jsonl")[-1]["reward"])
    assert rewards[0] == rewards[1]


def test_a_median_leaves_the_first_step_out():
    rows = [{"seconds": 9.0, "seconds/sample": 5.0, "length": 1.0, "tokens_per_second": 1.0}]
    for seconds in (1.0, 3.0, 2.0):
        row = {"seconds": seconds, "seconds/sample": seconds / 2, "length": 4.0}
        rows.append(row | {"tokens_per_second": 8.0})
    for row in rows:
        row["peak_memory_gb"] = row["seconds"]
    found = bench.medians(rows)
    assert found["seconds"] == 2
    assert found["seconds/sample"] == 1
    assert found["peak_memory_gb"] == 3
