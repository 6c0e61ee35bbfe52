"""extras/engines.py without any engine: call shapes, what an export holds, bad input.

`make test-verl` checks it with verl itself."""

import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_image
from PIL import Image

import train_grpo
from data import (
    MAX_PIXELS,
    MIN_PIXELS,
    Example,
    Sizes,
    fill_prompt,
    load_prompt,
    load_samples,
    model_size,
    to_model,
)
from extras import engines, official_rewards
from rewards import MODES, Terms, reward_terms, total_reward, write_answer
from runtime.cli import ROOT, parse_args
from runtime.optim import MAX_GRAD_NORM

BOX = (10, 20, 60, 80)
POINTS = ((20, 30), (50, 60))
SIZE = (112, 84)
TRUTH = json.dumps({"bbox_2d": BOX, "point_2d": POINTS, "size": SIZE})
GOOD = "<think>here</think>" + write_answer(BOX, POINTS)
NEAR = "<think>x</think>" + write_answer((12, 18, 50, 90), ((15, 30), (70, 60)))
TEXTS = (GOOD, NEAR, "nothing", "")


def run(*argv: object) -> None:
    words = [str(word) for word in argv]
    engines.main(parse_args(engines.Config, "", argv=words, moved=engines.MOVED))


def rejected(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Returns the one line of an export that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    line = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    return line


def ours(
    text: str, mode: str = "soft", coefficients: dict[str, float] | None = None
) -> tuple[float, Terms]:
    """Returns the reward and the terms that training here gives."""
    terms = reward_terms(text, BOX, POINTS, SIZE)
    return total_reward(terms, mode, coefficients), terms


# ---------------------------------------------------------------- one reward, four call shapes


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("mode", MODES)
def test_the_same_number_in_every_call_shape(text, mode):
    total, terms = ours(text, mode)
    verl = engines.compute_score(
        data_source="medreasoner",
        solution_str=text,
        ground_truth=TRUTH,
        extra_info={"index": 0, "num_turns": None},
        mode=mode,
    )
    assert verl == {"score": total, **terms}
    reward_input = {"response": text, "response_length": 9, "ground_truth": TRUTH}
    assert engines.easyr1(reward_input, mode=mode) == {"overall": total, **terms}
    trl = engines.reward(
        prompts=[[{}]] * 2,
        completions=[[{"role": "assistant", "content": text}]] * 2,
        mode=mode,
        completion_ids=[[1]] * 2,
        ground_truth=[TRUTH] * 2,
        trainer_state=None,
        log_metric=print,
    )
    assert trl == [total, total]
    swift = engines.reward([text] * 2, ground_truth=[TRUTH] * 2, mode=mode, images=[None])
    assert swift == [total, total]


def test_what_an_engine_logs_is_numbers():
    verl = engines.compute_score("", GOOD, TRUTH)
    easyr1 = engines.easyr1({"response": GOOD, "ground_truth": TRUTH})
    for result in (verl, easyr1):
        assert all(type(value) is float for value in result.values())
        assert max(result.values()) == 4
    assert engines.REWARD_TYPE == "sequential"
    assert engines.REWARD_NAME


def test_coefficients_reach_the_reward():
    triple = {"box_iou": 3.0}
    result = engines.compute_score("", NEAR, TRUTH, coefficients=triple)
    assert result["score"] == ours(NEAR, coefficients=triple)[0]
    assert result["score"] > ours(NEAR)[0]
    with pytest.raises(ValueError, match="mask_dice"):
        engines.compute_score("", NEAR, TRUTH, coefficients={"mask_dice": 1.0})


def test_the_released_quirks_reach_the_reward():
    terms = official_rewards.reward_terms(NEAR, BOX, POINTS)
    result = engines.easyr1({"response": NEAR, "ground_truth": TRUTH}, official=True)
    assert result == {"overall": total_reward(terms, "soft"), **terms}
    assert terms != ours(NEAR)[1]


def test_the_truth_of_the_released_data_is_on_the_840_canvas():
    truth = json.dumps({"bbox_2d": BOX, "point_2d": POINTS})
    terms = reward_terms(NEAR, BOX, POINTS)
    assert engines.score(NEAR, truth)[1] == terms
    assert terms != ours(NEAR)[1]


def test_an_older_export_has_the_same_reward():
    truth = json.dumps({"bbox_2d": BOX, "point_2d": POINTS, "frame": SIZE})
    assert engines.score(NEAR, truth) == ours(NEAR)


def by_path() -> ModuleType:
    """Returns the file, loaded as engines do: by its path."""
    spec = importlib.util.spec_from_file_location("custom_reward", ROOT / "extras/engines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_loads_by_its_path_and_a_reward_worker_imports_no_torch(tmp_path):
    """Nothing of ours is on sys.path there."""
    lines = [
        "import importlib.util, sys",
        "spec = importlib.util.spec_from_file_location('m', sys.argv[1])",
        "m = importlib.util.module_from_spec(spec)",
        "spec.loader.exec_module(m)",
        "score = m.compute_score('', sys.argv[2], sys.argv[3])['score']",
        "print(score, 'torch' in sys.modules)",
    ]
    command = [sys.executable, "-c", "\n".join(lines), ROOT / "extras/engines.py", GOOD, TRUTH]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "4.0 False\n"


def test_ms_swift_finds_one_reward_per_mode(monkeypatch):
    class ORM:
        def __init__(self, args: Any = None, **options: Any) -> None:
            self.args = args

    orms: dict[str, Any] = {"theirs": ORM}
    rewards_of_swift = SimpleNamespace(ORM=ORM, orms=orms)
    monkeypatch.setitem(sys.modules, "swift", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "swift.rewards", rewards_of_swift)
    by_path()
    assert orms.keys() == {"theirs", *(f"medreasoner_{mode}" for mode in MODES)}
    for mode in MODES:
        made = orms[f"medreasoner_{mode}"](args="theirs")
        assert isinstance(made, ORM)
        assert made.args == "theirs"
        values = made(completions=list(TEXTS), ground_truth=[TRUTH] * 4, images=[None] * 4)
        assert values == [ours(text, mode)[0] for text in TEXTS]


# ---------------------------------------------------------------- what an export holds


@pytest.fixture(scope="module")
def examples() -> Sequence[Example]:
    return load_samples(ROOT / "demo/data", "test")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("export") / "new" / "test.parquet"
    run("--data", ROOT / "demo/data", "--split", "test", "--out", file, "--resize", "square:56")
    return file


def in_square(example: Example) -> Sizes:
    return Sizes(example.image.size, (56, 56))


def test_every_row_gives_the_reward_that_training_here_gives(exported, examples):
    table = pq.read_table(exported).to_pylist()
    assert len(table) == len(examples)
    for i in range(0, len(examples), 10):
        example = examples[i]
        row = table[i]
        box = to_model(example.bbox, in_square(example))
        points = to_model(example.points, in_square(example))
        rounded_box = [round(value) for value in box]
        rounded_points = [[round(x), round(y)] for x, y in points]
        for text in (
            write_answer(rounded_box, rounded_points),
            write_answer((0, 0, 28, 28), ((1, 1), (18, 18))),
            "?",
        ):
            wanted = total_reward(reward_terms(text, box, points, (56, 56)), "hard")
            got, _ = engines.score(text, row["ground_truth"], "hard")
            assert got == pytest.approx(wanted, abs=1e-9)
        assert row["reward_model"] == {"style": "rule", "ground_truth": row["ground_truth"]}
        assert row["extra_info"]["index"] == i
        assert row["extra_info"]["id"] == example.id


def test_our_own_reader_finds_the_same_truth_and_image_in_it(exported, examples):
    again = load_samples(exported, "test")
    assert len(again) == len(examples)
    for i in range(0, len(again), 40):
        example = examples[i]
        sizes = in_square(example)
        np.testing.assert_allclose(again[i].bbox, to_model(example.bbox, sizes), atol=1e-9)
        np.testing.assert_allclose(again[i].points, to_model(example.points, sizes), atol=1e-9)
        resized = example.image.resize((56, 56), Image.Resampling.BICUBIC)
        assert again[i].image.tobytes() == resized.tobytes()
        assert again[i].query.endswith(fill_prompt(load_prompt("reasoning"), example.query))


def test_the_columns_are_what_each_engine_reads(exported, examples):
    (row,) = pq.read_table(exported)[:1].to_pylist()
    text = fill_prompt(load_prompt("reasoning"), examples[0].query)
    # verl, ms-swift
    assert row["prompt"] == [{"role": "user", "content": "<image>" + text}]
    assert row["data_source"] == "medreasoner"
    # EasyR1
    assert row["problem"] == "<image>" + text
    # TRL
    assert row["trl_prompt"] == [{"role": "user", "content": text}]
    (image,) = row["images"]
    assert set(image) == {"bytes", "path"}
    assert Image.open(io.BytesIO(image["bytes"])).size == (56, 56)
    assert image["path"] == ""  # an engine that finds a file of that name would read it instead
    assert "masks" not in row


def row_about(
    example: Example, template: str = "{query}", resize: str = "aspect"
) -> dict[str, Any]:
    """Returns the row of one example."""
    (row,) = engines.rows([example], template, "train", resize)
    return row


@pytest.mark.parametrize(
    "query",
    ["Is <image> what <video> and <audio> are?", "<|image_pad|><|im_end|>", "<image><image>"],
)
def test_a_question_can_contain_an_engines_tags(examples, query):
    row = row_about(replace(examples[0], query=query))
    text = row["prompt"][0]["content"]
    assert text.startswith("<image>")
    asked = text.removeprefix("<image>")
    assert not engines.TAG.search(asked)
    assert asked.replace("< ", "<") == query
    assert row["extra_info"]["question"] == query
    assert not engines.TAG.search(row["trl_prompt"][0]["content"])
    assert row["problem"] == text


@pytest.mark.parametrize("name", ["reasoning", "direct"])
def test_the_answers_format_is_not_taken_for_a_tag(examples, name):
    query = "a < b | c > d?"
    row = row_about(replace(examples[0], query=query), load_prompt(name))
    assert row["trl_prompt"][0]["content"] == fill_prompt(load_prompt(name), query)


@pytest.mark.parametrize("size", [(200, 130), (31, 900), (14, 14), (1500, 1400)])
def test_images_come_in_a_size_that_engines_keep(examples, size):
    row = row_about(replace(examples[0], image=noise_image(*size)))
    found = Image.open(io.BytesIO(row["images"][0]["bytes"])).size
    assert list(found) == json.loads(row["ground_truth"])["size"]
    assert found == model_size(size, "aspect", MIN_PIXELS, MAX_PIXELS)
    # with the limits of verl and EasyR1
    assert model_size(found, "aspect", 4 * 28 * 28, 16384 * 28 * 28) == found


def test_a_limit_of_pixels_bounds_the_images(examples):
    row = row_about(replace(examples[0], image=noise_image(1500, 1400)), resize="aspect:100000")
    width, height = Image.open(io.BytesIO(row["images"][0]["bytes"])).size
    assert 50_000 < width * height <= 100_000


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--resize", "square:55"], "--resize square:55"),
        (["--max-pixels", "9"], "--max-pixels has moved: give --resize aspect:PIXELS"),
        (["--prompt", "nowhere"], "--prompt nowhere"),
        (["--prompt", "boxes"], "--prompt boxes: the reward here is of one box"),
        (["--lr", "1"], "unknown flag --lr"),
        (["--split", "val"], "in split 'val'"),
    ],
)
def test_a_bad_flag_is_one_line_and_leaves_nothing(tmp_path, capsys, flags, says):
    out = tmp_path / "new" / "x.parquet"
    assert says in rejected(capsys, "--data", ROOT / "demo/data", "--out", out, *flags)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_out_is_one_line(tmp_path, capsys):
    data = ["--data", ROOT / "demo/data"]
    assert "--out is required" in rejected(capsys, *data)
    assert "give a name in .parquet" in rejected(capsys, *data, "--out", tmp_path / "x.csv")
    there = tmp_path / "x.parquet"
    there.write_text("mine")
    assert "is there already" in rejected(capsys, *data, "--out", there)
    assert there.read_text() == "mine"


def test_bad_data_is_one_line_and_leaves_nothing(tmp_path, capsys):
    out = tmp_path / "new" / "x.parquet"
    data = tmp_path / "data"
    assert "no such file" in rejected(capsys, "--data", data, "--out", out)
    data.mkdir()
    assert "neither" in rejected(capsys, "--data", data, "--out", out)
    (data / "train.parquet").write_text("not a table")
    assert "not a readable parquet" in rejected(capsys, "--data", data, "--out", out)
    table = pa.table({"prompt": [[{"role": "user", "content": "?"}]]})
    pq.write_table(table, data / "train.parquet")
    line = rejected(capsys, "--data", data, "--out", out)
    assert "column images, reward_model is missing" in line
    assert not out.parent.exists()


def test_a_bad_row_ends_the_export_or_is_left_out(tmp_path, capsys):
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    noise_image(60, 50).save(folder / "images/a.png")
    good = {"image": "a.png", "query": "?", "bbox": [1, 2, 30, 40], "points": [[5, 6], [20, 30]]}
    bad = good | {"bbox": [30, 2, 1, 40]}
    lines = [json.dumps(row) + "\n" for row in [good] * 70 + [bad]]
    (folder / "samples.jsonl").write_text("".join(lines))
    out = tmp_path / "out" / "x.parquet"
    assert "line 71, bbox" in rejected(capsys, "--data", folder, "--out", out)
    assert list(out.parent.iterdir()) == []
    run("--data", folder, "--out", out, "--skip-bad-rows")
    said = capsys.readouterr().out
    assert pq.read_table(out).num_rows == 70
    assert re.search(r"1 bad rows skipped.*\n.*70 questions", said)


# ---------------------------------------------------------------- the recipe


def test_the_verl_recipe_says_what_ours_says():
    script = ROOT / "recipes/verl_soft_7b.sh"
    done = subprocess.run(
        ["sh", script, "trainer.nnodes=1"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"VERL": r"printf %s\n", "PATH": "/usr/bin:/bin"},
    )
    flags = done.stdout.splitlines()
    theirs = dict(flag.split("=", 1) for flag in flags)
    cfg = parse_args(train_grpo.Config, "", argv=["@recipes/soft_7b.args"])

    def value(ending: str) -> str:
        (found,) = [text for key, text in theirs.items() if key.endswith(ending)]
        return found

    assert value("model.path") == cfg.crm
    assert value("reward_kwargs.mode") == cfg.mode
    numbers = {
        "total_training_steps": cfg.steps,
        "train_batch_size": cfg.prompts,
        "rollout.n": cfg.group,
        "ppo_mini_batch_size": cfg.prompts // cfg.minibatches,
        "ppo_epochs": cfg.inner_epochs,
        "optim.lr": cfg.lr,
        "max_response_length": cfg.max_new_tokens,
        "rollout.temperature": cfg.temperature,
        "lr_warmup_steps": cfg.warmup,
        "weight_decay": cfg.weight_decay,
        "clip_grad": MAX_GRAD_NORM,
        "clip_ratio_low": cfg.clip_low,
        "clip_ratio_high": cfg.clip_high,
        "clip_ratio_c": cfg.dual_clip,
        "kl_loss_coef": cfg.kl_coef,
        "entropy_coeff": cfg.entropy_coef,
        "save_freq": cfg.save_every,
        "test_freq": cfg.eval_every,
        "ppo_max_token_len_per_gpu": cfg.pack_tokens,
    }
    for name, number in numbers.items():
        assert float(value(name)) == number, name
    assert (cfg.schedule, cfg.agg, cfg.kl, cfg.norm) == ("constant", "sequence", "k3", "group")
    assert (cfg.trainable, cfg.checkpointing) == ("", True)
    words = {
        "lr_scheduler_type": "constant",
        "loss_agg_mode": "seq-mean-token-mean",
        "kl_loss_type": "low_var_kl",
        "norm_adv_by_std_in_grpo": "True",
        "freeze_vision_tower": "False",
        "enable_gradient_checkpointing": "True",
    }
    for name, word in words.items():
        assert value(name) == word
    function = getattr(engines, value("custom_reward_function.name"))
    assert list(inspect.signature(function).parameters)[:3] == [
        "data_source",
        "solution_str",
        "ground_truth",
    ]
    assert flags[-1] == "trainer.nnodes=1"  # given by hand: after, so it wins


def test_the_comments_of_the_verl_recipe_name_flags_that_exist():
    text = (ROOT / "recipes/verl_soft_7b.sh").read_text()
    names = re.findall(r"`# --([a-z-]+)", text)
    assert len(names) > 20
    for name in names:
        assert hasattr(train_grpo.Config(), name.replace("-", "_")), name
