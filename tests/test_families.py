"""Qwen3-VL beside Qwen2.5-VL: what a checkpoint's coordinates are, and where they are used."""

import contextlib
import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
from conftest import both_families, noise_image, random_crm
from transformers import AutoConfig

import evaluate
import infer
import train_grpo
import train_sft
from crm import CRM, load_crm
from data import COORDINATES, PROMPTS, Example, Sizes, load_samples, target_text, to_model
from demo.make.crm import Lesson, corpus, tiny_crm
from extras import engines, predictions, serve
from infer import answer
from rewards import MODES, write_answer
from runtime.cli import parse_args
from runtime.pretrained import FAMILIES, read_settings
from sampling import sample

EXAMPLE = Example("a", noise_image(200, 120), "What?", (20, 30, 90, 100), ((40, 50), (70, 80)))


def without_settings(folder: Path) -> Path:
    """Returns a copy of the embedded checkpoint, taught in pixels, that remembers nothing."""
    shutil.copytree("demo/crm", folder)
    (folder / "settings.json").unlink()
    return folder


# ---------------------------------------------------------------- a checkpoint's coordinates


@both_families
def test_a_model_without_settings_writes_as_its_family_was_taught(family, crm):
    prompt = crm.prompt_of(EXAMPLE)
    sizes = {"qwen2_5_vl": (196, 112), "qwen3_vl": (1000, 1000)}
    assert prompt.sizes == Sizes((200, 120), sizes[family])
    text = crm.tokenizer.decode(prompt.ids)
    assert COORDINATES[crm.family.coordinates] in text
    assert "{" + "coordinates}" not in text
    assert text.startswith("<|im_start|>system") == (family == "qwen2_5_vl")


@both_families
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_coordinates_are_remembered_told_and_not_contradicted(
    family, coordinates, tmp_path, capsys
):
    start = random_crm(family=family)
    start.save(tmp_path / "start")
    (tmp_path / "start/settings.json").unlink()
    load_crm(tmp_path / "start", coordinates=coordinates).save(tmp_path / "taught")
    assert read_settings(tmp_path / "taught")["coordinates"] == coordinates
    crm = load_crm(tmp_path / "taught")
    assert crm.coordinates == coordinates
    assert f"CRM: {family}, coordinates {coordinates}" in capsys.readouterr().out
    prompt = crm.prompt_of(EXAMPLE)
    assert COORDINATES[coordinates] in crm.tokenizer.decode(prompt.ids)
    assert (prompt.sizes.model == (1000, 1000)) == (coordinates == "norm1000")
    load_crm(tmp_path / "taught", coordinates=coordinates)
    (other,) = set(COORDINATES) - {coordinates}
    says = f"--coordinates {other}: .*taught was trained in {coordinates}"
    with pytest.raises(ValueError, match=says):
        load_crm(tmp_path / "taught", coordinates=other)


def test_every_script_and_page_takes_the_flag_with_the_same_choices():
    for module in (train_sft, evaluate, infer, serve, engines):
        fields = {field.name: field for field in dataclasses.fields(module.Config)}
        assert fields["coordinates"].metadata["choices"] == tuple(COORDINATES), module
    assert "the checkpoint's" in train_grpo.MOVED["coordinates"]  # GRPO cannot teach them


def test_a_template_of_ones_own_may_name_the_coordinates_or_not():
    crm = random_crm(prompt="{query} Point, {coordinates}.", family="qwen3_vl")
    prompt = crm.encode_question(EXAMPLE.image, "Say {coordinates}?")
    told = f"Say {{coordinates}}? Point, {COORDINATES['norm1000']}."
    assert told in crm.tokenizer.decode(prompt.ids)


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_what_sft_imitates_earns_all_rewards_and_lies_where_the_truth_is(coordinates):
    crm = random_crm(family="qwen3_vl", prompt="reasoning")
    crm.coordinates = coordinates
    sizes = crm.prompt_of(EXAMPLE).sizes
    text = target_text(dataclasses.replace(EXAMPLE, think="it is"), sizes)
    terms = crm.answer_format.reward_terms(text, EXAMPLE, sizes)
    for name in MODES["soft"]:
        assert terms[name] > 0.95, (name, terms)
    placed = infer.placed_inside(crm.answer_format.parse(text).bbox, None, sizes)["bbox"]
    assert placed == pytest.approx(EXAMPLE.bbox, abs=1)


def test_an_answer_in_thousandths_is_placed_in_the_image(monkeypatch):
    crm = random_crm(family="qwen3_vl")
    prompt = crm.prompt_of(EXAMPLE)

    def written(*arguments):
        groups = sample(*arguments)
        groups[0].texts = [write_answer((100, 250, 450, 750), ((200, 400), (350, 600)))]
        return groups

    monkeypatch.setattr(infer, "sample", written)
    _, (completion,), kept = answer(crm, prompt, 1, 4, 0.0, 0)
    assert kept == 0
    assert completion["bbox"] == pytest.approx((20, 30, 90, 90))


# ---------------------------------------------------------------- the wrong frame is named


def answers_in(crm: CRM, examples: list[Example], coordinates: str) -> list:
    """Returns groups with the true boxes in other coordinates than crm's, perhaps."""
    prompts = [crm.prompt_of(example) for example in examples]
    groups = sample(crm, prompts, 2, 2)
    for group, example in zip(groups, examples):
        sizes = crm.frames(example.image.size)[coordinates]
        box = to_model(example.bbox, sizes)
        group.texts = [write_answer(box, to_model(example.points, sizes)), "no answer"]
    return groups


@both_families
@pytest.mark.parametrize("taught", COORDINATES)
@pytest.mark.parametrize("asked", COORDINATES)
def test_a_model_that_is_asked_in_the_wrong_frame_is_named(family, taught, asked, crm, capsys):
    examples = list(load_samples("demo/data")[:4])
    asked_crm = random_crm(family=family)
    asked_crm.coordinates = asked
    capsys.readouterr()
    asked_crm.check_coordinates(examples, answers_in(asked_crm, examples, taught))
    said = capsys.readouterr().out
    if taught == asked:
        assert said == ""
    else:
        assert f"boxes look like {taught} (mean IoU 0.50), not like {asked} (mean IoU 0." in said
        assert f"give --coordinates {taught}" in said


def test_the_embedded_model_asked_in_thousandths_is_named_by_an_evaluation(tmp_path, capsys):
    folder = without_settings(tmp_path / "crm")
    flags = f"--crm {folder} --coordinates norm1000 --limit 8 --asm none --max-new-tokens 128 "
    argv = [*flags.split(), "--out", str(tmp_path / "eval")]
    evaluate.main(parse_args(evaluate.Config, "", argv=argv))
    assert "boxes look like pixels (mean IoU 0." in capsys.readouterr().out


@pytest.mark.parametrize("frame, like", [("norm1000", "model"), ("model", "norm1000")])
def test_predictions_in_another_frame_are_named_by_the_frame_check(
    frame, like, qwen3, tmp_path, capsys
):
    examples = load_samples("demo/data", "test")[:20]
    resize = predictions.resize_of(str(qwen3), None)
    assert resize.stride == 32
    lines = []
    for example in examples:
        sizes = predictions.sizes_in(like, example.image.size, resize)
        lines.append(json.dumps({"id": example.id, "bbox": to_model(example.bbox, sizes)}) + "\n")
    (tmp_path / "theirs.jsonl").write_text("".join(lines))
    flags = f"{tmp_path}/theirs.jsonl --data demo/data --frame {frame} --crm {qwen3} --asm none"
    with contextlib.suppress(SystemExit):  # where most boxes leave their image it is an error
        predictions.main([*flags.split(), "--out", str(tmp_path / "eval")])
    said = "".join(capsys.readouterr())
    assert f"the boxes look like {like} (mean IoU 1.00), not like {frame}" in said


# ---------------------------------------------------------------- exports, and making one


@pytest.mark.parametrize("flags, size", [("", (1000, 1000)), ("--coordinates pixels", (224, 192))])
def test_engines_get_images_and_truth_as_the_family_reads_them(flags, size, tmp_path):
    example = dataclasses.replace(EXAMPLE, image=noise_image(224, 192))
    cfg = parse_args(engines.Config, "", argv=[*f"--family qwen3_vl {flags}".split(), "--out", "x"])
    family = FAMILIES[cfg.family]
    coordinates = cfg.coordinates or family.coordinates
    template = PROMPTS["direct"]
    (row,) = engines.rows([example], template, "test", "aspect", coordinates, family.stride)
    truth = json.loads(row["ground_truth"])
    assert truth["size"] == list(size)
    assert truth["bbox_2d"] == pytest.approx(to_model(example.bbox, Sizes((224, 192), size)))
    assert COORDINATES[coordinates] in row["problem"]
    total, _ = engines.score(write_answer(truth["bbox_2d"], truth["point_2d"]), row["ground_truth"])
    assert total > 2.9


def test_an_unknown_family_of_an_export_is_one_line(tmp_path, capsys):
    cfg = engines.Config(out=str(tmp_path / "a.parquet"), family="qwen3_5")
    with pytest.raises(SystemExit):
        engines.main(cfg)
    assert "--family qwen3_5: not one of qwen2_5_vl, qwen3_vl" in capsys.readouterr().err


@both_families
def test_the_embedded_model_can_be_made_as_either_family(family, tmp_path):
    examples = load_samples("demo/data")[:40]
    sizes = dict(vocab_size=600, hidden=32, layers=2, heads=2, kv_heads=1, mlp=64)
    tower = dict(vision_hidden=32, vision_layers=2, vision_heads=2, vision_mlp=64)
    crm = tiny_crm(corpus(examples, family), family=family, **sizes, **tower)
    lesson = Lesson(crm, examples[0], "name", random.Random(0))
    image_tokens = int((lesson.prompt.ids == crm.image_id).sum())
    assert len(lesson.share) == len(lesson.place) == image_tokens
    assert float(lesson.place.min()) > 0 and float(lesson.place.max()) < 1
    assert float(lesson.truth.min()) >= 0 and float(lesson.truth.max()) <= 1
    crm.save(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == family
    assert load_crm(tmp_path).coordinates == FAMILIES[family].coordinates
