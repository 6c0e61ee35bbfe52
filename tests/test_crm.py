"""The CRM: encoding, positions, what trains, the reference model, saving and loading."""

import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from conftest import both_families, noise_image, random_crm
from peft import PeftModel
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from crm import BANNED, CRM, load_crm
from data import PROMPTS, BadRow, Example
from runtime.optim import Optimizer
from runtime.parallel import Ranks
from runtime.pretrained import read_settings
from sampling import sample
from scoring import logp


def nudge(parameters: dict[str, torch.nn.Parameter], size: float) -> None:
    """Moves each parameter by random numbers of a size."""
    with torch.no_grad():
        for parameter in parameters.values():
            generator = torch.Generator().manual_seed(0)
            step = size * torch.randn(parameter.shape, generator=generator)
            parameter.add_(step.to(parameter.dtype))


def small_prompt(crm: CRM):
    return crm.encode(noise_image(56, 56), "x")


def assert_close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------- from image and text to tokens


@both_families
def test_positions_equal_get_rope_index_and_completions_continue_from_the_largest(crm, prompts):
    for prompt in prompts:
        ids = prompt.ids[None]
        is_image = (ids == crm.image_id).int()
        positions, delta = crm.model.model.get_rope_index(ids, is_image, prompt.grid_thw)
        assert torch.equal(prompt.positions, positions[:, 0])
        # where transformers' generate goes on
        assert prompt.positions.max() + 1 == len(prompt.ids) + delta.item()
        # time and height differ, so this is not one axis three times
        assert not torch.equal(prompt.positions[1], prompt.positions[0])


def test_text_that_looks_like_a_special_token_stays_text(crm):
    plain = crm.encode(noise_image(56, 56), "a <|image_pad|> b <|im_end|>")
    end = crm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (plain.ids == crm.image_id).sum() == 4  # the image's own 2 x 2
    assert (plain.ids == end).sum() == 2  # the chat's own
    assert "<|image_pad|> b <|im_end|>" in crm.tokenizer.decode(plain.ids)


def test_the_image_is_resized_once_and_a_prompt_has_both_sizes(crm):
    prompt = crm.encode(noise_image(61, 203), "x")
    assert prompt.sizes.image == (61, 203)
    assert prompt.sizes.model == (56, 196)
    assert prompt.grid_thw.tolist() == [[1, 14, 4]]
    assert len(prompt.pixel_values) == 56
    assert (prompt.ids == crm.image_id).sum() == 14
    assert prompt.ids[prompt.image_start] == crm.image_id


@pytest.mark.parametrize("size", [(400, 300), (61, 203), (30, 40)])  # one becomes larger
def test_an_image_is_resized_as_qwens_own_processor_resizes_it(crm, size):
    image = noise_image(*size)
    limits = {"shortest_edge": crm.min_pixels, "longest_edge": crm.max_pixels}
    own = crm.image_processor(images=image, size=limits, return_tensors="pt")
    prompt = crm.encode(image, "x")
    assert torch.equal(prompt.grid_thw, own["image_grid_thw"])
    torch.testing.assert_close(prompt.pixel_values, own["pixel_values"])


def test_a_prompt_longer_than_the_models_context_is_one_line_that_says_what_helps():
    crm = random_crm()
    image = noise_image(112, 112)
    length = len(crm.encode(image, "Where is it?").ids)
    crm.model.config.text_config.max_position_embeddings = length + 1
    crm.encode(image, "Where is it?")  # there is room for one token of a completion
    crm.model.config.text_config.max_position_embeddings = length
    with pytest.raises(ValueError, match=f"{length} tokens, 16 of them of the image.*--resize"):
        crm.encode(image, "Where is it?")
    example = Example("case-7", image, "Where?", (0, 0, 9, 9), ((1, 1), (2, 2)))
    with pytest.raises(BadRow, match="^case-7: the prompt has") as error:
        crm.prompt_of(example)
    assert len(str(error.value).splitlines()) == 1


# ---------------------------------------------------------------- tokens that mean nothing


def test_ids_beyond_the_tokenizer_are_neither_sampled_nor_scored():
    """A vocabulary is padded. Its last ids are decoded to nothing, and servers reject them."""
    crm = random_crm()
    known = len(crm.tokenizer)
    vocabulary = crm.model.config.text_config.vocab_size
    assert vocabulary > known
    with torch.no_grad():
        crm.model.lm_head.weight[known:] *= 100  # they would be drawn nearly always
    prompt = small_prompt(crm)

    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plain = crm.model.lm_head(hidden).softmax(-1)
    assert plain[:, known:].sum(1).mean() > 0.9
    probabilities = crm.logits(hidden, 1.0).softmax(-1)
    assert (probabilities[:, known:] == 0).all()
    assert_close(probabilities[:, :known].sum(1), torch.ones(5))

    (group,) = sample(crm, [prompt], 16, 12, temperature=1.5, seed=0)
    banned = crm.tokenizer.convert_tokens_to_ids(list(BANNED))
    assert (group.tokens < known).all()
    assert not torch.isin(group.tokens, torch.tensor(banned)).any()

    group.tokens[0, 0] = vocabulary - 1
    scored = logp(crm, group, [0, 1], 1.5)
    assert scored[0, 0] < -1e6
    assert_close(scored[1].detach(), group.logp[1])


# ---------------------------------------------------------------- the vision tower


def test_features_that_are_known_already_stay_with_their_own_image():
    crm = random_crm(trainable="language_model|lm_head")
    prompts = [crm.encode(noise_image(56, 56, seed), "x") for seed in range(4)]
    alone = [crm.image_features([replace(prompt)])[0] for prompt in prompts]
    crm.image_features([prompts[0], prompts[2]])
    for features, expected in zip(crm.image_features(prompts), alone, strict=True):
        assert_close(features, expected)


def test_a_frozen_vision_tower_gets_no_gradient():
    crm = random_crm(trainable="language_model|lm_head")
    (group,) = sample(crm, [small_prompt(crm)], 2, 6)
    logp(crm, group, [0, 1]).sum().backward()
    for name, parameter in crm.model.named_parameters():
        assert (parameter.grad is None) == ("visual" in name), name


# ---------------------------------------------------------------- what trains

NO_VISION = "language_model|lm_head"


@pytest.mark.parametrize(
    "trainable, lora_rank, reference, checkpointing, offload",
    list(product(["", NO_VISION, "q_proj"], [0, 4], [False, True], [False, True], [False, True])),
)
def test_every_combination_trains_what_it_says_beside_a_reference_that_stays(
    trainable, lora_rank, reference, checkpointing, offload
):
    crm = random_crm()
    prompt = small_prompt(crm)
    (group,) = sample(crm, [prompt], 2, 5, seed=1)
    parameters = crm.prepare_training(
        trainable,
        lora_rank,
        reference=reference,
        checkpointing=checkpointing,
        offload=offload,
    )

    # what trains, by name
    for name, parameter in crm.model.named_parameters():
        expected = re.search(trainable, name) is not None
        if lora_rank > 0:
            expected = expected and "lora_" in name
        assert parameter.requires_grad == expected, name
        assert (name in parameters) == expected, name
    assert crm.vision_is_frozen == (lora_rank > 0 or trainable != "")
    assert crm.checkpointing == checkpointing
    assert (crm.ref_model is not None) == (reference and lora_rank == 0)

    # at the start nothing has changed; what trains gets a gradient, and nothing else does
    now = logp(crm, group, [0, 1])
    assert_close(now.detach(), group.logp)
    now.sum().backward()
    for name, parameter in crm.model.named_parameters():
        assert (parameter.grad is not None) == (name in parameters), name

    # the reference stays where the policy started, and asking for it changes nothing
    nudge(parameters, 0.02)
    moved = logp(crm, group, [0, 1]).detach()
    assert (moved - group.logp).abs().max() > 1e-3
    if reference or lora_rank > 0:
        with crm.reference():
            start = logp(crm, group, [0, 1])
        assert_close(start, group.logp)
        assert not start.requires_grad
    assert torch.equal(logp(crm, group, [0, 1]).detach(), moved)
    for name, parameter in crm.model.named_parameters():
        assert parameter.requires_grad == (name in parameters), name


@pytest.mark.parametrize(
    "options, says",
    [
        ({"trainable": "q_prj"}, "--trainable q_prj: no parameter that trains"),
        ({"trainable": "visual", "lora_rank": 4}, "--trainable visual: no parameter that trains"),
        ({"trainable": "("}, "--trainable (: not a regular expression"),
        ({"lora_rank": 4, "ranks": Ranks(0, 2)}, "use --parallel ddp"),
        ({"offload": True, "ranks": Ranks(0, 2)}, "--offload works with --parallel ddp"),
    ],
)
def test_what_cannot_train_is_one_line(options, says):
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        random_crm().prepare_training(**options)
    assert len(str(error.value).splitlines()) == 1


def test_a_lone_rank_shards_nothing():
    crm = random_crm(ranks=Ranks(0, 1))
    assert not crm.is_sharded
    assert torch.equal(crm.run(torch.add, torch.ones(2), 1), torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize(
    "options, says",
    [
        (
            {"reference": True},
            "343,872 of 343,872 weights train; the vision tower trains as well; "
            "reference model: a frozen copy of the start",
        ),
        (
            {"trainable": NO_VISION},
            "102,976 of 343,872 weights train; the vision tower is frozen; reference model: none",
        ),
        (
            {"lora_rank": 4, "reference": True},
            "8,192 of 352,064 weights train, LoRA matrices in the language model; the vision tower "
            "is frozen; reference model: the same model with its LoRA matrices switched off",
        ),
    ],
)
def test_a_run_says_what_trains_what_is_frozen_and_what_the_reference_is(options, says):
    crm = random_crm()
    parameters = crm.prepare_training(**options)
    assert crm.what_trains() == says
    count = sum(parameter.numel() for parameter in parameters.values())
    assert says.startswith(f"{count:,} of ")


# ---------------------------------------------------------------- the reference model


@both_families
@pytest.mark.parametrize("offload", [False, True])
def test_reference_stays_where_the_policy_started(family, offload):
    crm = random_crm(family=family)
    parameters = crm.prepare_training(reference=True, offload=offload)
    (group,) = sample(crm, [small_prompt(crm)], 2, 6)
    start = logp(crm, group, [0, 1]).detach()
    nudge(parameters, 0.01)
    with crm.reference():
        assert torch.equal(logp(crm, group, [0, 1]), start)
    assert (logp(crm, group, [0, 1]) - start).abs().max() > 1e-3


def test_after_an_error_inside_the_reference_the_policy_is_there_again():
    for options in ({"reference": True}, {"lora_rank": 4, "trainable": "q_proj"}):
        crm = random_crm(**options)
        policy = crm.model
        trains = [parameter.requires_grad for parameter in policy.parameters()]
        with pytest.raises(KeyError), crm.reference():
            raise KeyError("x")
        assert crm.model is policy
        assert [parameter.requires_grad for parameter in policy.parameters()] == trains


def test_without_a_reference_asking_for_one_is_an_error(crm):
    with pytest.raises(ValueError, match="reference=True"), crm.reference():
        pass


# ---------------------------------------------------------------- LoRA


@both_families
def test_lora_trains_only_its_matrices_and_switched_off_it_is_the_reference(family, tmp_path):
    plain = random_crm(family=family)
    crm = random_crm(family=family)
    parameters = crm.prepare_training(lora_rank=4)
    assert len(parameters) > 0
    for name in parameters:
        assert "lora_" in name
        assert "visual" not in name
    prompt = small_prompt(crm)
    (group,) = sample(crm, [prompt], 2, 8, seed=1)
    (of_plain,) = sample(plain, [prompt], 2, 8, seed=1)
    assert group.texts == of_plain.texts  # fresh matrices change nothing

    nudge(parameters, 0.05)
    moved = logp(crm, group, [0, 1]).detach()
    assert (moved - group.logp).abs().max() > 1e-3
    with crm.reference():
        assert_close(logp(crm, group, [0, 1]), group.logp)
    (resampled,) = sample(crm, [prompt], 2, 8, seed=1)  # the decoding step has the matrices as well
    assert_close(logp(crm, resampled, [0, 1]).detach(), resampled.logp)
    crm.save(tmp_path / "merged")
    assert_close(logp(load_crm(tmp_path / "merged"), group, [0, 1]), moved)


def test_lora_computes_in_the_models_type_and_trains_in_float32():
    crm = load_crm("demo/crm", dtype=torch.bfloat16)
    optimizer = Optimizer(crm.prepare_training(lora_rank=4))
    assert {parameter.dtype for parameter in optimizer.parameters} == {torch.bfloat16}
    assert {master.dtype for master in optimizer.masters} == {torch.float32}


def test_the_adapter_is_saved_exactly_beside_the_merged_weights(tmp_path):
    crm = load_crm("demo/crm", dtype=torch.bfloat16)
    nudge(crm.prepare_training(lora_rank=4), 0.001)
    crm.save(tmp_path)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained("demo/crm", dtype=torch.bfloat16)
    again = dict(PeftModel.from_pretrained(base, tmp_path / "adapter").named_parameters())
    compared = 0
    for name, parameter in crm.lora.named_parameters():
        if "lora_" in name:
            assert torch.equal(again[name], parameter), name
            compared += 1
    assert compared > 0


def test_an_optimizer_of_other_parameters_is_one_line(tmp_path):
    one = Optimizer(random_crm().prepare_training("norm"))
    other = Optimizer(random_crm().prepare_training("mlp"))
    one.save(tmp_path, 3, 0)
    record = json.loads((tmp_path / "trainer.json").read_text())
    with pytest.raises(ValueError, match="--resume: .*other parameters"):
        other.load(tmp_path, record)


# ---------------------------------------------------------------- a folder of a checkpoint


@both_families
def test_saved_folder_loads_with_from_pretrained_and_gives_the_same_numbers(crm, prompts, tmp_path):
    (group,) = sample(crm, prompts[:1], 2, 10, seed=1)
    crm.save(tmp_path / "crm")
    crm.family.model.from_pretrained(tmp_path / "crm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "crm")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == crm.end[0]
    again = load_crm(tmp_path / "crm")
    image = noise_image(112, 84)
    assert torch.equal(again.encode(image, "x").ids, crm.encode(image, "x").ids)
    assert torch.equal(logp(again, group, [0, 1]), logp(crm, group, [0, 1]))


SIDE_FILES = {
    "chat_template.json": b'{"chat_template": "{{ messages }}"}\n',
    "video_preprocessor_config.json": b'{"fps": 2,\n "max_frames": 768}',
}


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_files_that_a_server_wants_survive_saving(tmp_path, lora_rank):
    random_crm().save(tmp_path / "start")
    for name, content in SIDE_FILES.items():
        (tmp_path / "start" / name).write_bytes(content)
    crm = load_crm(tmp_path / "start")
    crm.prepare_training(lora_rank=lora_rank)
    crm.save(tmp_path / "end")
    load_crm(tmp_path / "end").save(tmp_path / "later")
    for folder in ("end", "later"):
        for name, content in SIDE_FILES.items():
            assert (tmp_path / folder / name).read_bytes() == content
    assert not (tmp_path / "end/chat_template.jinja").exists()  # the start had none


def write_hub_cache(folder: Path, name: str, crm: CRM) -> Path:
    """Writes a checkpoint as the hub's cache keeps it. Returns its folder of this one version."""
    version = "0123456789abcdef0123456789abcdef01234567"
    home = folder / f"models--{name.replace('/', '--')}"
    crm.save(home / "snapshots" / version)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(version)
    return home / "snapshots" / version


@pytest.mark.parametrize("file", ["settings.json", "frame.json"])  # the second is an older name
def test_the_settings_and_side_files_of_a_hub_name_are_used(tmp_path, monkeypatch, file):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = write_hub_cache(tmp_path, "someone/model", random_crm(0, "direct", "square:84"))
    (folder / "settings.json").rename(folder / file)
    (folder / "chat_template.json").write_bytes(SIDE_FILES["chat_template.json"])

    crm = load_crm("someone/model")
    assert crm.template == PROMPTS["direct"]
    assert crm.encode(noise_image(200, 100), "x").sizes.model == (84, 84)
    crm.save(tmp_path / "saved")
    saved = (tmp_path / "saved/chat_template.json").read_bytes()
    assert saved == SIDE_FILES["chat_template.json"]


def test_a_hub_name_without_settings_has_the_usual_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = write_hub_cache(tmp_path, "someone/model", random_crm(0, "direct", "square:84"))
    (folder / "settings.json").unlink()
    crm = load_crm("someone/model")
    assert crm.template == PROMPTS["reasoning"]
    assert crm.encode(noise_image(224, 112), "x").sizes.model == (224, 112)
    with pytest.raises(ValueError, match="--crm someone/other: cannot be loaded"):
        load_crm("someone/other")


def make_nothing(folder: Path) -> None:
    pass


def make_run_folder(folder: Path) -> None:
    (folder / "step_000004").mkdir()
    (folder / "step_000008").mkdir()
    (folder / "step_best1").mkdir()


def make_llama(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def make_config_alone(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen2_5_vl"}')


@pytest.mark.parametrize(
    "make, says",
    [
        (make_nothing, "no folder with a config.json"),
        (make_run_folder, "folder of a run; give a checkpoint in it, such as .*step_000008"),
        (make_llama, "'llama', not one of qwen2_5_vl, qwen3_vl; for Qwen3.5 and later .* verl"),
        (make_config_alone, "cannot be loaded"),
    ],
)
def test_a_folder_that_has_no_model_of_a_known_family_is_named(tmp_path, make, says):
    make(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{says}") as error:
        load_crm(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_a_name_beside_existing_folders_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="--crm runs/nope: no folder with a config.json there"):
        load_crm("runs/nope")


# ---------------------------------------------------------------- settings: prompt and resize


def test_prompts_have_a_place_for_the_question():
    for text in PROMPTS.values():
        assert "{query}" in text


def test_a_checkpoint_remembers_its_prompt_and_an_explicit_one_wins(tmp_path):
    assert load_crm("demo/crm").template == PROMPTS["reasoning"]
    load_crm("demo/crm", prompt="Where is it? {query}").save(tmp_path)
    assert load_crm(tmp_path).template == "Where is it? {query}"
    assert load_crm(tmp_path, prompt="direct").template == PROMPTS["direct"]
    with pytest.raises(ValueError, match="--prompt nonsense"):
        load_crm(tmp_path, prompt="nonsense")


def test_a_named_prompt_is_remembered_by_name_so_that_a_changed_one_reaches_the_model(
    tmp_path, monkeypatch
):
    assert read_settings("demo/crm")["prompt"] == "reasoning"
    load_crm("demo/crm", prompt="direct").save(tmp_path)
    monkeypatch.setitem(PROMPTS, "direct", "Point: {query}")
    assert load_crm(tmp_path).template == "Point: {query}"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_a_checkpoint_remembers_its_resize_and_explicit_arguments_win(tmp_path, lora_rank):
    image = noise_image(400, 300)

    def model_frame(**given):
        return load_crm(tmp_path, **given).encode(image, "x").sizes.model

    crm = load_crm("demo/crm", resize="square:168", max_pixels=40_000)
    crm.prepare_training(lora_rank=lora_rank)
    crm.save(tmp_path)
    assert model_frame() == (168, 168)
    assert model_frame(resize="aspect") == (224, 168)
    assert model_frame(resize="aspect", max_pixels=20_000) == (140, 112)
    assert model_frame(resize="aspect:20000") == (140, 112)
    # for a server's own resizing
    size = json.loads((tmp_path / "preprocessor_config.json").read_text())["size"]
    assert size["longest_edge"] == 40_000


@pytest.mark.parametrize("file", ["settings.json", "frame.json"])
def test_other_settings_than_a_checkpoint_was_trained_with_are_named(tmp_path, file):
    crm = random_crm(0, "direct", "square:84")
    crm.save(tmp_path)
    (tmp_path / "settings.json").rename(tmp_path / file)
    crm.check_settings(tmp_path)
    other = random_crm(0, "reasoning", "square:112")
    with pytest.raises(ValueError, match="--resume: ") as error:
        other.check_settings(tmp_path)
    assert "prompt was 'direct', is 'reasoning'" in str(error.value)
    assert "resize was 'square:84', is 'square:112'" in str(error.value)
    assert "max_pixels" not in str(error.value)


@pytest.mark.parametrize(
    "text, says",
    [
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"prompt": 5}', "prompt: 5"),
        ('{"prompt": ["a"]}', "prompt: ['a']"),
        ('{"prompt": "Where?"}', "--prompt Where?: "),
        ('{"min_pixels": "a"}', "min_pixels: 'a'"),
        ('{"max_pixels": 1.5}', "max_pixels: 1.5"),
        ('{"min_pixels": true}', "min_pixels: True"),
        ('{"lora_rank": 4}', "lora_rank: 4"),
        ('{"resize": null}', "resize: None"),
        ('{"resize": "round:7"}', "--resize round:7: "),
        ('{"coordinates": "inches"}', "coordinates are one of pixels, norm1000"),
    ],
)
@pytest.mark.parametrize("file", ["settings.json", "frame.json"])
def test_settings_that_save_did_not_write_are_named(tmp_path, file, text, says):
    shutil.copytree("demo/crm", tmp_path, dirs_exist_ok=True)
    (tmp_path / "settings.json").unlink()
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=file) as error:
        load_crm(tmp_path)
    assert says in str(error.value)
    assert len(str(error.value).splitlines()) == 1
