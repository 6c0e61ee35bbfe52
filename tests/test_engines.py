"""extras/engines.py without any engine: call shapes, what an export holds, bad input. make test-verl has verl itself."""

import importlib.util
import inspect
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_image
from PIL import Image

from data import MAX_PIXELS, Frame, load_prompt, load_samples, model_size, to_model
from extras import engines
from rewards import MODES, reward_terms, total_reward, write_answer
from runtime.cli import ROOT, parse_args

TRUTH = json.dumps(
    {"bbox_2d": [10, 20, 60, 80], "point_2d": [[20, 30], [50, 60]], "frame": [112, 84]}
)
GOOD = "<think>here</think>" + write_answer((10, 20, 60, 80), ((20, 30), (50, 60)))
TEXTS = (
    GOOD,
    "<think>x</think>" + write_answer((12, 18, 50, 90), ((15, 30), (70, 60))),
    "nothing",
    "",
)


def run(*argv):
    engines.main(
        parse_args(engines.Config, "", argv=list(map(str, argv)), embedded=lambda config: ["data"])
    )


def refused(capsys, *argv) -> str:
    """The one line of an export that ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    return line


def ours(text, mode="soft", weights=None, official=False):
    terms = reward_terms(text, (10, 20, 60, 80), ((20, 30), (50, 60)), official, (112, 84))
    return total_reward(terms, mode, weights), terms


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
    easyr1 = engines.easyr1(
        {"response": text, "response_length": 9, "ground_truth": TRUTH}, mode=mode
    )
    assert verl == {"score": total, **terms} and easyr1 == {"overall": total, **terms}
    trl = engines.reward(
        prompts=[[{}]] * 2,
        completions=[[{"role": "assistant", "content": text}]] * 2,
        mode=mode,
        completion_ids=[[1]] * 2,
        ground_truth=[TRUTH] * 2,
        trainer_state=None,
        log_metric=print,
    )
    assert (
        trl
        == [total, total]
        == engines.reward([text] * 2, ground_truth=[TRUTH] * 2, mode=mode, images=[None])
    )


def test_what_an_engine_logs_is_numbers():
    for result in (
        engines.compute_score("", GOOD, TRUTH),
        engines.easyr1({"response": GOOD, "ground_truth": TRUTH}),
    ):
        assert all(type(value) is float for value in result.values()) and max(result.values()) == 4
    assert engines.REWARD_TYPE == "sequential" and engines.REWARD_NAME


def test_weights_and_the_released_quirks_reach_the_reward():
    text, more = TEXTS[1], {"box_iou": 3}
    assert (
        engines.compute_score("", text, TRUTH, weights=more)["score"] == ours(text, weights=more)[0]
    )
    released = engines.easyr1({"response": text, "ground_truth": TRUTH}, official=True)
    assert released["overall"] == ours(text, official=True)[0]
    with pytest.raises(ValueError, match="mask_dice"):
        engines.compute_score("", text, TRUTH, weights={"mask_dice": 1})


def test_the_truth_of_the_released_data_is_on_the_840_canvas():
    truth = json.loads(TRUTH)
    del truth["frame"]
    terms = reward_terms(TEXTS[1], (10, 20, 60, 80), ((20, 30), (50, 60)))
    assert engines.score(TEXTS[1], json.dumps(truth))[1] == terms


def by_path():
    """The file, loaded as engines do: by its path, and with nothing of ours on sys.path."""
    spec = importlib.util.spec_from_file_location("custom_reward", ROOT / "extras/engines.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_file_loads_by_its_path_and_a_reward_worker_imports_no_torch(tmp_path):
    code = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('m', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "print(m.compute_score('', sys.argv[2], sys.argv[3])['score'], 'torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, ROOT / "extras/engines.py", GOOD, TRUTH],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out == "4.0 False\n"


def test_ms_swift_finds_one_reward_per_mode(monkeypatch):
    class ORM:
        def __init__(self, args=None, **options):
            self.args = args

    orms = {"theirs": ORM}
    monkeypatch.setitem(sys.modules, "swift", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "swift.rewards", SimpleNamespace(ORM=ORM, orms=orms))
    by_path()
    assert orms.keys() == {"theirs", *(f"medreasoner_{mode}" for mode in MODES)}
    for mode in MODES:
        made = orms[f"medreasoner_{mode}"](args="theirs")
        assert isinstance(made, ORM) and made.args == "theirs"
        assert made(completions=list(TEXTS), ground_truth=[TRUTH] * 4, images=[None] * 4) == [
            ours(text, mode)[0] for text in TEXTS
        ]


# ---------------------------------------------------------------- what an export holds


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    file = tmp_path_factory.mktemp("export") / "new" / "test.parquet"
    run("--data", ROOT / "demo/data", "--split", "test", "--out", file, "--resize", "square:56")
    return file


def test_every_row_gives_the_reward_that_training_here_gives(exported):
    samples, table = load_samples(ROOT / "demo/data", "test"), pq.read_table(exported).to_pylist()
    assert len(table) == len(samples)
    for i in range(0, len(samples), 10):
        sample, row = samples[i], table[i]
        frame = Frame(sample.image.size, (56, 56))
        box, points = to_model(sample.bbox, frame), to_model(sample.points, frame)
        w, h = frame.model
        for text in (
            write_answer([round(v) for v in box], [map(round, p) for p in points]),
            write_answer((0, 0, w // 2, h // 2), ((1, 1), (w // 3, h // 3))),
            "?",
        ):
            want = total_reward(reward_terms(text, box, points, frame=frame.model), "hard")
            assert abs(engines.score(text, row["ground_truth"], "hard")[0] - want) < 1e-9
        assert row["reward_model"] == {"style": "rule", "ground_truth": row["ground_truth"]}
        assert row["extra_info"]["index"] == i and row["extra_info"]["id"] == sample.id


def test_our_own_reader_finds_the_same_truth_and_image_in_it(exported):
    samples, again = load_samples(ROOT / "demo/data", "test"), load_samples(exported, "test")
    for i in range(0, len(again), 40):
        sample, back = samples[i], again[i]
        frame = Frame(sample.image.size, (56, 56))
        np.testing.assert_allclose(back.bbox, to_model(sample.bbox, frame), atol=1e-9)
        np.testing.assert_allclose(back.points, to_model(sample.points, frame), atol=1e-9)
        assert (
            back.image.tobytes()
            == sample.image.resize((56, 56), Image.Resampling.BICUBIC).tobytes()
        )


def test_the_columns_are_what_each_engine_reads(exported):
    row, sample = (
        pq.read_table(exported)[:1].to_pylist()[0],
        load_samples(ROOT / "demo/data", "test")[0],
    )
    text = load_prompt("reasoning").replace("{query}", sample.query)
    assert (
        row["prompt"] == [{"role": "user", "content": "<image>" + text}] and row["data_source"]
    )  # verl, ms-swift
    assert row["problem"] == "<image>" + text  # EasyR1
    assert row["trl_prompt"] == [{"role": "user", "content": text}]  # TRL
    assert [set(image) for image in row["images"]] == [{"bytes", "path"}] and "masks" not in row
    assert Image.open(io.BytesIO(row["images"][0]["bytes"])).size == (56, 56)
    assert not row["images"][0][
        "path"
    ]  # an engine that finds a file of that name would read it instead


def sample_of(query, size=(200, 130)):
    sample = load_samples(ROOT / "demo/data", "test")[0]
    return replace(sample, image=noise_image(*size), query=query)


@pytest.mark.parametrize(
    "query",
    ["Is <image> what <video> and <audio> are?", "<|image_pad|><|im_end|>", "<image><image>"],
)
def test_a_question_can_contain_an_engines_tags(query):
    (row,) = engines.rows([sample_of(query)], "{query}", "train", "aspect", MAX_PIXELS)
    text = row["prompt"][0]["content"]
    assert text.startswith("<image>") and not engines.TAG.search(text.removeprefix("<image>"))
    assert text.removeprefix("<image>").replace("< ", "<") == query == row["extra_info"]["question"]
    assert not engines.TAG.search(row["trl_prompt"][0]["content"]) and row["problem"] == text


def test_the_answers_format_is_not_taken_for_a_tag():
    for name in ("reasoning", "direct"):
        (row,) = engines.rows(
            [sample_of("a < b | c > d?")], load_prompt(name), "train", "aspect", MAX_PIXELS
        )
        assert row["trl_prompt"][0]["content"] == load_prompt(name).replace(
            "{query}", "a < b | c > d?"
        )


def test_images_come_in_a_frame_that_engines_keep():
    limits = parse_args(engines.Config, "", argv=["--out", "x"], embedded=lambda config: [])
    assert limits.max_pixels == MAX_PIXELS
    for size in ((200, 130), (31, 900), (14, 14), (1500, 1400)):
        (row,) = engines.rows([sample_of("?", size)], "{query}", "train", "aspect", MAX_PIXELS)
        w, h = Image.open(io.BytesIO(row["images"][0]["bytes"])).size
        assert (w, h) == tuple(json.loads(row["ground_truth"])["frame"]) == model_size(size)
        assert model_size((w, h), "aspect", 4 * 28 * 28, 16384 * 28 * 28) == (
            w,
            h,
        )  # verl's and EasyR1's limits


# ---------------------------------------------------------------- bad input


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys):
    out, data = tmp_path / "new" / "x.parquet", tmp_path / "data"
    assert "no such file" in refused(capsys, "--data", tmp_path / "none", "--out", out)
    data.mkdir()
    assert "neither" in refused(capsys, "--data", data, "--out", out)
    (data / "train.parquet").write_text("not a table")
    assert "not a readable parquet" in refused(capsys, "--data", data, "--out", out)
    pq.write_table(
        pa.table({"prompt": [[{"role": "user", "content": "?"}]]}), data / "train.parquet"
    )
    assert "column images, reward_model is missing" in refused(capsys, "--data", data, "--out", out)
    assert "no sample in split 'val'" in refused(
        capsys, "--data", data, "--split", "val", "--out", out
    )
    for flags, problem in (
        (["--resize", "square:55"], "--resize"),
        (["--max-pixels", "9"], "--max-pixels"),
        (["--prompt", "nowhere"], "--prompt"),
        (["--lr", "1"], "unknown flag --lr"),
    ):
        assert problem in refused(capsys, "--data", ROOT / "demo/data", "--out", out, *flags)
    assert "--out is required" in refused(capsys, "--data", data)
    assert "name in .parquet" in refused(capsys, "--data", data, "--out", tmp_path / "x.csv")
    assert not out.parent.exists() and sorted(path.name for path in tmp_path.rglob("*")) == [
        "data",
        "train.parquet",
    ]


def test_a_bad_row_ends_the_export_or_is_left_out(tmp_path, capsys):
    folder = tmp_path / "data"
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    noise_image(60, 50).save(folder / "images/a.png")
    good = {"image": "a.png", "query": "?", "bbox": [1, 2, 30, 40], "points": [[5, 6], [20, 30]]}
    lines = [good] * 70 + [good | {"bbox": [30, 2, 1, 40]}]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    out = tmp_path / "out" / "x.parquet"
    assert "line 71, bbox" in refused(capsys, "--data", folder, "--out", out)
    assert not list(out.parent.iterdir())
    run("--data", folder, "--out", out, "--skip-bad-rows")
    assert pq.read_table(out).num_rows == 70 and re.search(
        "1 bad rows skipped.*\n.*70 questions", capsys.readouterr().out
    )
    before = out.read_bytes()
    assert "is there already" in refused(capsys, "--data", folder, "--out", out, "--skip-bad-rows")
    assert out.read_bytes() == before


# ---------------------------------------------------------------- the recipe


def test_the_verl_recipe_says_what_ours_says():
    import train_grpo

    command = ["sh", ROOT / "recipes/verl_soft_7b.sh", "trainer.nnodes=1"]
    flags = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"VERL": r"printf %s\n", "PATH": "/usr/bin:/bin"},
    ).stdout.splitlines()
    theirs = dict(flag.split("=", 1) for flag in flags)
    cfg = parse_args(train_grpo.Config, "", argv=["@recipes/soft_7b.args"])

    def value(name):
        return next(text for key, text in theirs.items() if key.endswith(name))

    assert value("model.path") == cfg.crm and value("reward_kwargs.mode") == cfg.mode
    for name, number in {
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
        "clip_grad": cfg.max_grad_norm,
        "clip_ratio_low": cfg.clip_low,
        "clip_ratio_high": cfg.clip_high,
        "clip_ratio_c": cfg.dual_clip,
        "kl_loss_coef": cfg.kl_coef,
        "entropy_coeff": cfg.entropy_coef,
        "save_freq": cfg.save_every,
        "test_freq": cfg.eval_every,
        "ppo_max_token_len_per_gpu": cfg.pack_tokens,
    }.items():
        assert float(value(name)) == number, name
    assert (cfg.schedule, cfg.agg, cfg.kl, cfg.norm) == ("constant", "sequence", "k3", "group")
    for name, word in {
        "lr_scheduler_type": "constant",
        "loss_agg_mode": "seq-mean-token-mean",
        "kl_loss_type": "low_var_kl",
        "norm_adv_by_std_in_grpo": "True",
    }.items():
        assert value(name) == word
    assert flags[-1] == "trainer.nnodes=1"  # given by hand: after, so it wins
    assert inspect.signature(getattr(engines, value("custom_reward_function.name"))).parameters
