"""The scripts as a newcomer runs them:
the README's commands, bad input, interruption, resuming, several processes."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Script
from PIL import Image
from safetensors.torch import load_file

import evaluate
import infer
import train_grpo
import train_sft
from bench.random_model import config_of
from data import load_samples
from extras.intervals import paired_bootstrap
from runtime.cli import ROOT, parse_args

BRAIN = "demo/images/brain_mr_axial.png"
SMALL = (
    "--prompts 4 --group 4 --minibatches 2 --max-new-tokens 110 --eval-every -1 "
    "--lr 1e-4 --schedule constant --trainable '' "
)


def run(*command, check=0, **env):
    """A script in a process of its own -> (stdout, stderr); its exit status must be `check`."""
    script = Script(*command, **env)
    out, error = script.communicate(timeout=400)
    assert script.returncode == check, (command, script.returncode, out[-2000:], error[-3000:])
    return out, error


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_times(row):
    return {k: v for k, v in row.items() if not k.startswith(("seconds", "peak", "tokens_per"))}


# ---------------------------------------------------------------- infer.py


@pytest.fixture(scope="module")
def inferred(tmp_path_factory):
    out = tmp_path_factory.mktemp("infer")
    return out, run(
        "infer.py --image",
        BRAIN,
        "--query 'What are the paired dark cavities?' --samples 4 --out",
        out,
    )[0]


def test_infer_writes_reasoning_box_points_and_a_mask_in_the_images_own_size(inferred):
    out, said = inferred
    result, (W, H) = json.loads((out / "result.json").read_text()), Image.open(ROOT / BRAIN).size
    mask = np.asarray(Image.open(out / "mask.png"))
    assert (
        mask.shape == (H, W)
        and set(np.unique(mask)) <= {0, 255}
        and result["mask_pixels"] == (mask == 255).sum()
    )
    x1, y1, x2, y2 = result["bbox"]
    assert -W < x1 < x2 < 2 * W and -H < y1 < y2 < 2 * H and len(result["points"]) == 2
    assert result["reasoning"] and result["reasoning"].strip() in said and result["problem"] == ""
    assert len(result["texts"]) == 4 and 0 <= result["agreement"] <= 1
    assert Image.open(out / "overlay.png").size[0] >= W and str(out / "overlay.png") in said


def refusal(capfd, module, *flags):
    """What a script says, in this process, on its way out with status 2."""
    argv = [word for part in flags for word in shlex.split(str(part))]
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        module.main(
            parse_args(
                module.Config, "", "recipes/demo.args" if module is train_grpo else None, argv
            )
        )
    assert exit_.value.code == 2
    return capfd.readouterr().err.strip().splitlines()


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--image {0}/none.png --query x", "none.png does not exist"),
        ("--image {0} --query x", "directory"),
        ("--image {0}/text.png --query x", "text.png is not an image"),
        ("--image {1} --query '  '", "--query is empty"),
        ("--image {0}/one.png --query x", "one.png is 1x1"),
        ("--image {0}/huge.png --query x", "huge.png has more than"),
        ("--image {1} --query x --crm {0}", "config.json"),
        ("--image {1} --query x --asm {0}/text.png", "text.png"),
        ("--image {1} --query x --prompt nonsense", "--prompt nonsense"),
        ("--image {1} --query x --resize square:5", "--resize square:5"),
    ],
)
def test_infer_refuses_bad_input_with_one_line_and_writes_nothing(tmp_path, capfd, flags, says):
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("L", (1, 1)).save(tmp_path / "one.png")
    Image.new("1", (12_000, 9_000)).save(tmp_path / "huge.png")
    lines = refusal(capfd, infer, flags.format(tmp_path, ROOT / BRAIN), "--out", tmp_path / "out")
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    assert not (tmp_path / "out").exists()


def test_the_exit_status_of_the_program_itself_is_2(tmp_path):
    _, error = run(
        "infer.py --query x --image", tmp_path / "none.png", "--out", tmp_path / "out", check=2
    )
    assert error == f"error: --image {tmp_path / 'none.png'} does not exist\n"  # the name once


def test_infer_says_why_when_no_answer_is_usable(tmp_path):
    _, error = run(
        "infer.py --image", BRAIN, "--query x --max-new-tokens 3 --out", tmp_path, check=3
    )
    assert "no answer block" in error
    assert json.loads((tmp_path / "result.json").read_text())["problem"] == "no answer block"
    assert not (tmp_path / "mask.png").exists()


# ---------------------------------------------------------------- the command line


def test_numbers_out_of_range_are_refused(capsys):
    for flags in (
        "--steps -1",
        "--steps 0",
        "--prompts 0",
        "--minibatches 0",
        "--save-every -2",
        "--seed -1",
        "--kl-coef -0.1",
        "--max-new-tokens 0",
    ):
        with pytest.raises(SystemExit) as exit_:
            parse_args(train_grpo.Config, "", argv=shlex.split(flags))
        assert exit_.value.code == 2 and f"{flags}: must be at least" in capsys.readouterr().err


@pytest.mark.parametrize(
    "module", [train_grpo, train_sft, infer, evaluate], ids=lambda module: module.__name__
)
def test_help_lists_every_flag_and_an_unknown_flag_is_refused(module, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_args(module.Config, module.__doc__, argv=["--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0
    assert all("--" + name.replace("_", "-") in said for name in module.Config.__dataclass_fields__)
    with pytest.raises(SystemExit) as exit_:
        parse_args(
            module.Config,
            "",
            argv=["--no-such-flag", "1"] + ["--image", "x", "--query", "y"] * (module is infer),
        )
    assert exit_.value.code == 2 and "--no-such-flag" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", sorted(p.name for p in (ROOT / "recipes").glob("*.args")))
def test_every_recipe_parses(recipe):
    module = dict.fromkeys(("eval", "slake", "biomedparse"), evaluate) | {"sft": train_sft}
    module = module.get(recipe.partition("_")[0], train_grpo)
    config = parse_args(module.Config, "", argv=[f"@{ROOT / 'recipes' / recipe}"])
    assert (
        config.out.startswith("eval/")
        if module is evaluate
        else config.out.startswith("runs/") and config.lr > 0
    )


@pytest.fixture(scope="module")
def config_of_7b(tmp_path_factory):
    """The real sizes' config.json with the embedded tokenizer: all but the weights."""
    folder = tmp_path_factory.mktemp("7b")
    config_of("7b").save_pretrained(folder)
    for file in (ROOT / "demo/crm").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["size"] = {"shortest_edge": 3136, "longest_edge": 12845056}  # Qwen2.5-VL's own
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(
    "recipe, most", [("lora_7b", (20, 45)), ("soft_7b", (30, 80)), ("sft_7b", (30, 80))]
)
def test_every_training_recipe_of_7b_fits_its_gpu(recipe, most, config_of_7b):
    script = "train_sft" if recipe.startswith("sft") else "train_grpo"
    said, _ = run(
        f"-m bench.memory {script} @recipes/{recipe}.args --data demo/data --gpus 8 --crm",
        config_of_7b,
    )
    assert "8.29 billion parameters" in said and "PFLOP per step" in said
    assert most[0] < float(re.search(r"most at once \| (\S+)", said)[1]) < most[1]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--group 1", "--group 1: must be at least 2"),
        (
            "--prompts 6 --minibatches 4",
            "--prompts 6: must be a multiple of ranks x --minibatches, 1 x 4, as an update takes "
            "whole groups; give --prompts 8 or another number of --minibatches",
        ),
        ("--temperature 0", "--temperature 0.0: must be greater than 0"),
        ("--weights box_iou", "--weights box_iou"),
        ("--weights nonsense=1", "nonsense"),
        ("--resize 840", "--resize 840"),
        ("--trainable '*'", "--trainable *"),
        ("--data nowhere", "nowhere"),
        ("--resume", "--resume"),
        ("--crm ./nowhere", "nowhere"),
    ],
)
def test_train_grpo_refuses_bad_flags_with_one_line_before_writing_anything(
    tmp_path, capfd, flags, says
):
    lines = refusal(capfd, train_grpo, "--out", tmp_path / "run", flags)
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], lines
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- training


def test_four_steps_equal_two_and_two_resumed_bit_for_bit(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("train_grpo.py", SMALL, "--steps 4 --save-every 2 --weights mask_dice=1 --out", whole)
    run("train_grpo.py", SMALL, "--steps 2 --weights mask_dice=1 --out", cut)
    run("train_grpo.py", SMALL, "--steps 4 --weights mask_dice=1 --resume --out", cut, curves=True)
    a, b = (load_file(folder / "step_000004/model.safetensors") for folder in (whole, cut))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(
        not torch.equal(a[k], v.to(a[k].dtype))
        for k, v in load_file(ROOT / "demo/crm/model.safetensors").items()
    )
    assert [without_times(r) for r in rows(whole / "metrics.jsonl")] == [
        without_times(r) for r in rows(cut / "metrics.jsonl")
    ]
    for name in ("config.json", "curves.png", "samples.jsonl", "step_000004/trainer.pt"):
        assert (cut / name).stat().st_size > 0
    row = rows(whole / "metrics.jsonl")[0]
    assert (
        row["logp_gap"] < 1e-4
        and 0 <= row["mask_dice"] <= 1
        and row["seconds"] > 0
        and row["entropy"] > 0
    )
    best = rows(whole / "samples.jsonl")[0]
    assert best["best"]["reward"] >= best["worst"]["reward"] and "text" in best["best"]
    _, error = run("train_grpo.py", SMALL, "--out", whole, check=2)  # never written over
    assert "--resume" in error


def test_every_switch_of_a_study_changes_the_run_and_none_breaks_it(tmp_path):
    flags = (
        "--mode hard --norm none --agg constant --kl k2 --clip-high 0.28 --dual-clip 0 --resample 1 "
        "--official --mask-truncated --freeze-vision --checkpointing --inner-epochs 2 --schedule cosine "
        "--warmup 1 --pack-tokens 400 --prompt direct --temperature 0.8 --resize square:112"
    )
    run("train_grpo.py", SMALL, flags, "--steps 2 --out", tmp_path / "a")
    run(
        "train_grpo.py",
        SMALL,
        "--steps 1 --kl-coef 0 --norm batch --agg token --lora-rank 4 --eval-every 0",
        "--eval-limit 2 --weights mask_dice=1 --out",
        tmp_path / "b",
    )
    a, b = (rows(tmp_path / name / "metrics.jsonl")[-1] for name in "ab")
    assert (
        a["reward"] != b["reward"]
        and "kl" in a
        and "kl" not in b
        and a["grad_norm"] > 0
        and b["grad_norm"] > 0
    )
    start, end = (
        load_file(folder / "model.safetensors")
        for folder in (ROOT / "demo/crm", tmp_path / "a/step_000002")
    )
    moved = {k: not torch.equal(v.float(), end[k]) for k, v in start.items()}
    assert any(moved.values()) and not any(v for k, v in moved.items() if "visual" in k)


def test_neither_the_size_of_packs_nor_offloading_changes_a_number(tmp_path):
    """Of two steps with four updates each, the first to rounding. The second samples from weights that differ in their
    last digits, and one draw at the edge of a token's probability makes another completion."""
    flags = "--freeze-vision --inner-epochs 2 --steps 2 --save-every 1 --norm none --out"
    run("train_grpo.py", SMALL, flags, tmp_path / "fast")
    run("train_grpo.py", SMALL, "--pack-tokens 1 --offload", flags, tmp_path / "slow")
    metrics = (rows(tmp_path / name / "metrics.jsonl") for name in ("fast", "slow"))
    for fast, slow, bound in zip(*metrics, (1e-4, 0.1), strict=True):
        for key in ("reward", "length", "entropy", "kl", "loss", "grad_norm"):
            assert fast[key] == pytest.approx(slow[key], rel=bound, abs=1e-3 * bound), key
    start, fast, slow = (
        load_file(folder / "model.safetensors")
        for folder in (
            ROOT / "demo/crm",
            tmp_path / "fast/step_000001",
            tmp_path / "slow/step_000001",
        )
    )
    moved = max((fast[name] - start[name].float()).abs().max() for name in fast)
    assert moved > 5e-5 and all(
        (fast[name] - slow[name]).abs().max() < 0.05 * moved for name in fast
    )


def test_bad_gradients_are_skipped_and_a_run_of_them_ends_the_run(tmp_path, monkeypatch, capfd):
    loss, calls = train_grpo.grpo_loss, []

    def broken(*args, **options):  # from the third step on
        calls.append(1)
        value, stats = loss(*args, **options)
        return value * (float("nan") if len(calls) > 8 else 1.0), stats

    monkeypatch.setattr(train_grpo, "grpo_loss", broken)
    config = parse_args(
        train_grpo.Config,
        "",
        "recipes/demo.args",
        shlex.split(SMALL)
        + [
            "--steps",
            "9",
            "--save-every",
            "2",
            "--max-skipped",
            "2",
            "--out",
            str(tmp_path / "run"),
        ],
    )
    with pytest.raises(RuntimeError, match="2 steps in a row without a finite gradient"):
        train_grpo.main(config)
    metrics = rows(tmp_path / "run/metrics.jsonl")
    assert [row["skipped"] for row in metrics] == [0, 0, 2, 2]
    good, last = (load_file(tmp_path / f"run/step_00000{n}/model.safetensors") for n in (2, 4))
    assert all(torch.equal(good[name], last[name]) for name in good)
    assert capfd.readouterr().out.count("update was skipped: lower --lr") == 1


def test_ctrl_c_finishes_the_step_saves_and_exits_0(tmp_path):
    process = Script("train_grpo.py", SMALL, "--steps 500 --out", tmp_path / "run")
    deadline = time.time() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.time() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(60)
    assert process.returncode == 0, said
    last = rows(tmp_path / "run/metrics.jsonl")[-1]["step"]
    assert f"stopped at {last} of 500 steps; the same command with --resume continues" in said[0]
    assert last < 500 and (tmp_path / f"run/step_{last:06d}/model.safetensors").exists()


def test_sft_lowers_the_cross_entropy_and_resumes_exactly(tmp_path):
    flags = (
        "--crm demo/crm --data demo/data --eval-every -1 --batch 8 --micro-batch 4 --lr 3e-4 "
        "--schedule constant"
    )
    run("train_sft.py", flags, "--steps 6 --out", tmp_path / "whole")
    run("train_sft.py", flags, "--steps 3 --out", tmp_path / "cut")
    run("train_sft.py", flags, "--steps 6 --resume --out", tmp_path / "cut", curves=True)
    assert (tmp_path / "cut/curves.png").exists()
    a, b = (
        load_file(tmp_path / name / "step_000006/model.safetensors") for name in ("whole", "cut")
    )
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = [row["loss"] for row in rows(tmp_path / "whole/metrics.jsonl")]
    assert all(0 < loss < 3 for loss in losses)


@pytest.mark.parametrize(
    "flags, learned", [("", True), ("--no-think", False), ("--prompt direct", False)]
)
def test_sft_learns_the_trace_where_it_is_wanted(monkeypatch, tmp_path, flags, learned):
    class Seen(Exception):
        pass

    def group_of(crm, prompt, texts):
        raise Seen(texts[0])

    monkeypatch.setattr(train_sft, "group_of", group_of)
    argv = shlex.split(
        f"--crm demo/crm --data demo/data --eval-every -1 --batch 1 --steps 1 {flags} --out"
    ) + [str(tmp_path)]
    with pytest.raises(Seen) as seen:
        train_sft.main(parse_args(train_sft.Config, "", argv=argv))
    assert str(seen.value).startswith("<think>") == learned and "<answer>" in str(seen.value)


@pytest.mark.parametrize(
    "flags, traces, warned",
    [("", 0, 1), ("", 1, 0), ("--prompt direct", 0, 0), ("--no-think", 0, 0)],
)
def test_sft_warns_once_where_the_prompt_asks_for_traces_and_no_row_has_one(
    tmp_path, capfd, flags, traces, warned
):
    for name in ("images", "masks"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        Image.effect_noise((60, 60), 99).save(tmp_path / "mine" / name / "a.png")
    lines = [
        {"image": "a.png", "mask": "a.png", "query": "?"}
        | ({"think": "a disc"} if i < traces else {})
        for i in range(4)
    ]
    (tmp_path / "mine/samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    argv = shlex.split(f"--crm demo/crm --batch 2 --steps 2 --save-every -1 {flags}")
    train_sft.main(
        parse_args(
            train_sft.Config,
            "",
            argv=[*argv, "--data", str(tmp_path / "mine"), "--out", str(tmp_path / "run")],
        )
    )
    assert capfd.readouterr().out.count("no training row has one") == warned


def test_a_minute_of_grpo_beats_its_start_by_more_than_chance(tmp_path):
    run(
        "train_grpo.py @recipes/demo.args --crm demo/crm --data demo/data --steps 8 --lr 1e-4 --warmup 0 --schedule constant",
        "--eval-limit 120 --eval-answers 2 --out",
        tmp_path / "run",
    )
    scores = [row for row in rows(tmp_path / "run/held_out.jsonl") if row["kind"] == "sampled"]
    before, after = ([row["reward"] for row in scores if row["step"] == step] for step in (0, 8))
    assert len(before) == len(after) == min(120, len(load_samples("demo/data", "test")))
    change, low, _ = paired_bootstrap(before, after)
    assert change > 0.05 and low > 0  # the 95 % interval of the paired change excludes chance


@pytest.mark.skipif(not shutil.which("make"), reason="make is needed")
def test_make_help_has_a_line_for_every_target_and_the_readme_names_set_up_and_help():
    said = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    targets = re.findall(r"^\.PHONY: (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [line.split()[1] for line in said] == targets and all(
        len(line.split()) > 3 for line in said
    )
    assert all(f"`make {name}`" in (ROOT / "README.md").read_text() for name in ("setup", "help"))


def test_the_readme_names_only_files_and_flags_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"`((?:[\w.-]+/)*[\w-]+\.(?:py|args|md|txt|png|json|parquet))`", text):
        if not path.startswith(("runs/", "out/")) and "/" in path or path.endswith(".py"):
            assert (ROOT / path).exists(), path
    flags = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)) - {
        "nproc-per-node",
        "nnodes",
        "rdzv-backend",
        "rdzv-id",
        "rdzv-endpoint",
        "no-deps",
        "no-build-isolation",
        "gpus",
        "sheet",
        "backend",
        "local",
        "target",
    }  # torchrun's, pip's, our tools', verl.model_merger's
    known = {
        name.replace("_", "-")
        for module in (train_grpo, train_sft, infer, evaluate)
        for name in module.Config.__dataclass_fields__
    } | {"no-think", "help"}
    for tool in (*ROOT.glob("paper/*.py"), *ROOT.glob("bench/*.py"), *ROOT.glob("demo/*.py")):
        known |= set(re.findall(r'add_argument\("--([a-z-]+)"', tool.read_text()))
    assert flags <= known, flags - known
