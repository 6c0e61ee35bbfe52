"""The CRM: encoding, positions, what trains, the reference model, saving and loading."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from conftest import noise_image, random_crm
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from crm import load_crm
from data import PROMPTS
from runtime import pretrained
from runtime.optim import Optimizer
from runtime.pretrained import FewRowsLinear, remembered_frame
from sampling import sample
from scoring import logp


def test_positions_equal_get_rope_index_and_completions_continue_from_the_largest(crm, prompts):
    for prompt in prompts:
        ids = prompt.ids[None]
        positions, delta = crm.model.model.get_rope_index(
            ids, (ids == crm.image_id).int(), prompt.grid_thw
        )
        assert torch.equal(prompt.positions, positions[:, 0])
        assert (
            prompt.positions.max() + 1 == len(prompt.ids) + delta.item()
        )  # where generate goes on
        assert not torch.equal(prompt.positions[1], prompt.positions[0])  # really three axes


def test_text_that_looks_like_a_special_token_stays_text(crm):
    plain = crm.encode(noise_image(56, 56), "a <|image_pad|> b <|im_end|>")
    assert (plain.ids == crm.image_id).sum() == 4  # the image's own 2 x 2
    assert (
        plain.ids == crm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    ).sum() == 2  # the chat's own
    assert "<|image_pad|> b <|im_end|>" in crm.tokenizer.decode(plain.ids)


def test_the_image_is_resized_once_and_frames_carry_both_sizes(crm):
    prompt = crm.encode(noise_image(61, 203), "x")
    assert prompt.frame.image == (61, 203) and prompt.frame.model == (56, 196)
    assert prompt.grid_thw.tolist() == [[1, 14, 4]] and len(prompt.pixel_values) == 56
    assert (prompt.ids == crm.image_id).sum() == 14 and prompt.ids[
        prompt.image_start
    ] == crm.image_id


def test_an_image_is_resized_as_qwens_own_processor_resizes_it(crm):
    for size in ((400, 300), (61, 203), (30, 40)):  # smaller, and larger
        image, limits = (
            noise_image(*size),
            {"shortest_edge": crm.min_pixels, "longest_edge": crm.max_pixels},
        )
        own, prompt = (
            crm.image_processor(images=image, size=limits, return_tensors="pt"),
            crm.encode(image, "x"),
        )
        assert torch.equal(prompt.grid_thw, own["image_grid_thw"])
        torch.testing.assert_close(prompt.pixel_values, own["pixel_values"])


def test_features_that_are_known_already_stay_with_their_own_image():
    crm = random_crm(freeze_vision=True)
    prompts = [crm.encode(noise_image(56, 56, seed), "x") for seed in range(4)]
    alone = [crm.image_features([replace(prompt)])[0] for prompt in prompts]
    crm.image_features([prompts[0], prompts[2]])
    for ours, expected in zip(crm.image_features(prompts), alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


def test_saved_folder_loads_with_from_pretrained_and_gives_the_same_numbers(crm, prompts, tmp_path):
    group = sample(crm, prompts[:1], 2, 10, seed=1)[0]
    crm.save(tmp_path / "crm")
    Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "crm")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "crm").convert_tokens_to_ids("<|im_end|>")
        == crm.end[0]
    )
    again = load_crm(tmp_path / "crm")
    assert torch.equal(
        again.encode(noise_image(112, 84), "x").ids, crm.encode(noise_image(112, 84), "x").ids
    )
    torch.testing.assert_close(logp(again, group, [0, 1]), logp(crm, group, [0, 1]), atol=0, rtol=0)


@pytest.mark.parametrize("offload", [False, True])
def test_reference_stays_where_the_policy_started(offload):
    crm = random_crm(reference=True, offload=offload)
    prompt = crm.encode(noise_image(56, 56), "x")
    group = sample(crm, [prompt], 2, 6)[0]
    start = logp(crm, group, [0, 1]).detach()
    with torch.no_grad():
        for p in crm.trainable().values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    with crm.reference():
        assert torch.equal(logp(crm, group, [0, 1]), start)
    assert (logp(crm, group, [0, 1]) - start).abs().max() > 1e-3


def test_without_a_reference_asking_for_one_is_an_error(crm):
    with pytest.raises(ValueError, match="reference=True"), crm.reference():
        pass


def test_lora_trains_only_its_matrices_and_switched_off_it_is_the_reference(tmp_path):
    crm, plain = random_crm(lora_rank=4), random_crm()
    names = crm.trainable()
    assert (
        names
        and all("lora_" in name for name in names)
        and not any("visual" in name for name in names)
    )
    prompt = crm.encode(noise_image(56, 56), "x")
    group = sample(crm, [prompt], 2, 8, seed=1)[0]
    assert (
        group.texts == sample(plain, [prompt], 2, 8, seed=1)[0].texts
    )  # a fresh adapter changes nothing
    with torch.no_grad():
        for p in names.values():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    moved, group = logp(crm, group, [0, 1]).detach(), group
    assert (moved - group.logp).abs().max() > 1e-3
    with crm.reference():
        torch.testing.assert_close(logp(crm, group, [0, 1]), group.logp, atol=1e-5, rtol=0)
    resampled = sample(crm, [prompt], 2, 8, seed=1)[0]  # the decode step sees the adapter, too
    torch.testing.assert_close(
        logp(crm, resampled, [0, 1]).detach(), resampled.logp, atol=1e-5, rtol=0
    )
    crm.save(tmp_path / "merged")
    torch.testing.assert_close(
        logp(load_crm(tmp_path / "merged"), group, [0, 1]), moved, atol=1e-5, rtol=0
    )


def test_lora_computes_in_the_models_type_and_trains_in_float32():
    crm = load_crm("demo/crm", dtype=torch.bfloat16, lora_rank=4)
    optimizer = Optimizer(crm.trainable())
    assert {p.dtype for p in optimizer.parameters} == {torch.bfloat16}
    assert {p.dtype for p in optimizer.masters} == {torch.float32}


def test_a_frozen_vision_tower_gets_no_gradient():
    crm = random_crm(freeze_vision=True)
    prompt = crm.encode(noise_image(56, 56), "x")
    logp(crm, sample(crm, [prompt], 2, 6)[0], [0, 1]).sum().backward()
    assert all(p.grad is None for n, p in crm.model.named_parameters() if "visual" in n)
    assert all(p.grad is not None for n, p in crm.model.named_parameters() if "visual" not in n)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda d: None, "no folder with a config.json"),
        (
            lambda d: [(d / f"step_00000{n}").mkdir() for n in (4, 8)],
            "folder of a run; give a checkpoint in it, such as .*step_000008",
        ),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
            "'llama', not 'qwen2_5_vl'",
        ),
        (
            lambda d: (d / "config.json").write_text('{"model_type": "qwen2_5_vl"}'),
            "cannot be loaded",
        ),
    ],
)
def test_a_folder_that_is_no_qwen2_5_vl_is_named(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"(?s){tmp_path}.*{says}"):
        load_crm(tmp_path)


def test_a_name_beside_existing_folders_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="--crm runs/nope: no folder with a config.json there"):
        load_crm("runs/nope")


def test_prompts_have_a_place_for_the_question():
    assert all("{query}" in text for text in PROMPTS.values())


def test_a_checkpoint_remembers_its_prompt_and_an_explicit_one_wins(tmp_path):
    assert load_crm("demo/crm").template == PROMPTS["reasoning"]
    load_crm("demo/crm", prompt="Where is it? {query}").save(tmp_path)
    assert load_crm(tmp_path).template == "Where is it? {query}"
    assert load_crm(tmp_path, prompt="direct").template == PROMPTS["direct"]
    with pytest.raises(ValueError, match="--prompt nothing"):
        load_crm(tmp_path, prompt="nothing")


@pytest.mark.parametrize(
    "text, says",
    [
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"prompt": 5}', "prompt: 5"),
        ('{"prompt": ["a"]}', "prompt: ['a']"),
        ('{"prompt": "Where?"}', "prompt: 'Where"),
        ('{"min_pixels": "a"}', "min_pixels: 'a'"),
        ('{"max_pixels": 1.5}', "max_pixels: 1.5"),
        ('{"lora_rank": 4}', "lora_rank: 4"),
        ('{"resize": null}', "resize: None"),
    ],
)
def test_a_frame_json_that_save_did_not_write_is_named(tmp_path, text, says):
    (tmp_path / "frame.json").write_text(text)
    with pytest.raises(ValueError, match="frame.json") as error:
        remembered_frame(tmp_path)
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_named_prompt_is_remembered_by_name_so_that_a_changed_one_reaches_the_model(
    tmp_path, monkeypatch
):
    assert remembered_frame("demo/crm")["prompt"] == "reasoning"
    load_crm("demo/crm", prompt="direct").save(tmp_path)
    monkeypatch.setitem(PROMPTS, "direct", "Point: {query}")
    assert load_crm(tmp_path).template == "Point: {query}"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_checkpoint_remembers_its_frame_and_explicit_arguments_win(tmp_path, rank):
    image = noise_image(400, 300)
    load_crm("demo/crm", lora_rank=rank, resize="square:168", max_pixels=40_000).save(tmp_path)
    assert load_crm(tmp_path).encode(image, "x").frame.model == (168, 168)
    assert load_crm(tmp_path, resize="aspect").encode(image, "x").frame.model == (224, 168)
    assert load_crm(tmp_path, resize="aspect", max_pixels=20_000).encode(
        image, "x"
    ).frame.model == (140, 112)
    size = json.loads((tmp_path / "preprocessor_config.json").read_text())["size"]
    assert size["longest_edge"] == 40_000  # for a server's own resizing


def test_the_adapter_is_saved_exactly_beside_the_merged_weights(tmp_path):
    from peft import PeftModel

    crm = load_crm("demo/crm", dtype=torch.bfloat16, lora_rank=4)
    with torch.no_grad():
        for p in crm.trainable().values():
            p.add_(0.001 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)).to(p))
    crm.save(tmp_path)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained("demo/crm", dtype=torch.bfloat16)
    again = dict(PeftModel.from_pretrained(base, tmp_path / "adapter").named_parameters())
    ours = dict(crm.lora.named_parameters())
    assert all(torch.equal(again[name], p) for name, p in ours.items() if "lora_" in name)


def test_an_optimizer_of_other_parameters_is_refused_in_one_line(tmp_path):
    one, two = Optimizer(random_crm().trainable("norm")), Optimizer(random_crm().trainable("mlp"))
    one.save(tmp_path, 3, 0)
    with pytest.raises(ValueError, match="--resume: .*other parameters"):
        two.load(tmp_path, torch.load(tmp_path / "trainer.pt"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [(1,), (5,), (64,), (65,), (2, 7)])
def test_a_cpus_product_of_few_rows_is_that_of_an_ordinary_layer(bias, rows):
    plain = torch.nn.Linear(48, 96, bias=bias)
    fast, x = copy.deepcopy(plain), torch.randn(*rows, 48, requires_grad=True)
    fast.__class__ = FewRowsLinear
    for a, b in zip(
        *(
            torch.autograd.grad((out := layer(x)).square().sum(), [x, *layer.parameters()]) + (out,)
            for layer in (plain, fast)
        ),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-5)
    assert torch.equal(
        plain.bfloat16()(x.bfloat16()), fast.bfloat16()(x.bfloat16())
    )  # float32 only


def test_large_linear_layers_of_a_model_on_a_cpu_take_few_rows_fast(monkeypatch):
    def kinds():
        return {
            type(module)
            for module in load_crm("demo/crm").model.modules()
            if isinstance(module, torch.nn.Linear)
        }

    assert kinds() == {torch.nn.Linear}  # of small weights nothing is gained
    monkeypatch.setattr(pretrained, "LARGE", 300 * 192)
    assert kinds() == {torch.nn.Linear, FewRowsLinear}
    monkeypatch.setattr(pretrained, "LARGE", 1)
    assert kinds() == {FewRowsLinear}
