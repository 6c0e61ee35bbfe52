"""learn/SYMPTOMS.md: each symptom is provoked on a tiny model, and what it prints is there."""

import ast
import json
import math
import re
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Script, random_crm, ranks
from test_frames import WRITTEN, write_data

import data
import evaluate
import infer
import scoring
import train_grpo
import train_sft
from crm import CRM, load_crm
from data import EMBEDDED, Sizes, load_samples, to_model
from demo.make.check_crm import SHORT, target_name
from evaluate import held_out, held_out_means
from extras import predictions
from rewards import write_answer
from runtime import parallel, stats
from runtime.cli import ROOT, dashed, parse_args
from runtime.files import read_jsonl
from runtime.parallel import Ranks
from runtime.run import Run
from runtime.stats import WARNINGS, covers, explain_memory, first_look, warn_of_jump, warnings_of

PAGE = (ROOT / "learn/SYMPTOMS.md").read_text(encoding="utf-8")
QUIET = "--eval-every -1 --save-every -1 "
ONE_UPDATE = "--prompts 2 --minibatches 1 "
# a step of the embedded model that earns something: a quarter of a second
SMALL = f"--crm demo/crm --data demo/data --group 4 --max-new-tokens 110 --seed 3 {ONE_UPDATE}"

PROVOKED: set[str] = set()  # the sentences of WARNINGS that a test of this file has provoked


@pytest.fixture(scope="module", autouse=True)
def no_pictures() -> Iterable[None]:
    """curves.png takes as long as all the rest of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the flags of a model that has learned nothing."""
    folder = tmp_path_factory.mktemp("random")
    random_crm().save(folder)
    return f"--crm {folder} --data demo/data --group 2 {ONE_UPDATE}"


def train(flags: str, out: Path) -> list[dict]:
    """Runs train_grpo.py in this process. Returns the rows of metrics.jsonl."""
    argv = [*flags.split(), "--out", str(out)]
    train_grpo.main(parse_args(train_grpo.Config, "", argv=argv))
    return read_jsonl(out / "metrics.jsonl")


def assert_warned(found: list[str], *beginnings: str) -> None:
    """Each beginning is that of one sentence found."""
    for beginning in beginnings:
        (sentence,) = [sentence for sentence in found if sentence.startswith(beginning)]
        PROVOKED.add(sentence)


# ---------------------------------------------------------------- nothing is wrong


def test_the_first_steps_of_the_embedded_recipe_warn_of_nothing(tmp_path, capsys):
    flags = f"@{ROOT}/recipes/demo.args --crm demo/crm --data demo/data --save-every -1 "
    # a third of the recipe's questions, so that it takes seconds
    rows = train(flags + "--prompts 4 --steps 2 --eval-every -1", tmp_path / "run")
    assert [row["warnings"] for row in rows] == [[], []]
    assert rows[1]["whole_image"] < 0.1
    assert "Qwen's authors" not in capsys.readouterr().out


# ---------------------------------------------------------------- nothing can be read


def test_a_model_that_has_learned_nothing(random_model, tmp_path, capsys):
    (row,) = train(
        random_model + QUIET + "--max-new-tokens 12 --kl-coef 0 --steps 1", tmp_path / "run"
    )
    assert row["grad_norm"] == 0.0
    assert_warned(
        row["warnings"],
        "the gradient is exactly 0",
        "almost no completion can be parsed",
        "most completions are cut",
        "most groups have equal rewards",
    )
    said = capsys.readouterr().out
    assert "4 of the first 4 completions cannot be parsed:\n    no answer block: '" in said
    assert said.count("    no answer block: '") == 3  # the first three
    assert all(sentence in said for sentence in row["warnings"])


def test_a_long_unparsable_completion_is_cut_and_good_ones_are_not_shown(capsys):
    first_look([("x" * 999, "no answer block"), ("good", "")], [900], weights=10**6)
    said = capsys.readouterr().out
    assert "1 of the first 2 completions cannot be parsed:" in said
    assert said.count("x") == 300
    first_look([("good", "")], [900], weights=10**6)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- a reward that does not rise


@pytest.fixture(scope="module")
def means() -> dict[str, dict[str, float]]:
    """Returns held-out means of the embedded model: as it is, and with a careless format."""
    crm = load_crm(EMBEDDED["crm"])
    examples = load_samples(EMBEDDED["data"], "test").spread(4)
    found = {}
    for name, temperature in (("careless", 1.5), ("as it is", 1.0)):
        kinds = {"sampled": (4, temperature)}
        rows = held_out(crm, examples, kinds, "soft", {}, Ranks(), max_new_tokens=110)
        found[name] = held_out_means(rows)
    return found


def test_a_held_out_reward_that_stays_is_flat_from_step_50(means):
    same = {"zero_std": 0.1, **means["as it is"]}
    assert warnings_of({"step": 49, **same}, same) == []
    assert_warned(warnings_of({"step": 50, **same}, same), "the held-out reward is no higher")
    assert warnings_of({"step": 50, **same}, {"sampled/reward": same["sampled/reward"] - 1}) == []


def test_a_better_format_without_better_boxes(means):
    well_formed = {"sampled/parse_ok": means["as it is"]["sampled/parse_ok"]}
    assert well_formed["sampled/parse_ok"] > means["careless"]["sampled/parse_ok"] + 0.1
    worse = {"sampled/iou_parsed": means["careless"]["sampled/iou_parsed"] - 0.01}
    cautious = means["careless"] | well_formed | worse
    found = warnings_of({"zero_std": 0.1, **cautious}, means["careless"])
    assert_warned(found, "held-out completions are better formed")
    assert warnings_of(means["as it is"], means["careless"]) == []  # its boxes are better as well


def test_a_format_that_is_lost(means):
    found = warnings_of(means["careless"], means["as it is"])
    assert_warned(found, "far fewer held-out completions can be parsed")


# ---------------------------------------------------------------- boxes


def write_data_of_thousandths(folder: Path) -> None:
    """Two of the embedded questions, on images of 3,000 pixels, with numbers from 0 to 1000."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, example in enumerate(load_samples(EMBEDDED["data"], "train")[:2]):
        example.image.resize((3000, 3000)).save(folder / f"images/{i}.png", compress_level=1)
        of_thousand = Sizes(example.image.size, (1000, 1000))
        row = {
            "image": f"{i}.png",
            "query": example.query,
            "bbox": to_model(example.bbox, of_thousand),
            "points": to_model(example.points, of_thousand),
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))


def test_boxes_in_another_frame_miss_from_step_1_and_a_picture_shows_them(tmp_path, capsys):
    write_data_of_thousandths(tmp_path / "data")
    flags = SMALL.replace("demo/data", str(tmp_path / "data"))
    (row,) = train(flags + QUIET + "--steps 1", tmp_path / "run")
    assert row["parse_ok"] > 0.5
    assert_warned(row["warnings"], "completions can be parsed, but their boxes miss")
    assert data.main([str(tmp_path / "data"), "--sheet", str(tmp_path / "sheet.png")]) == 0
    assert (tmp_path / "sheet.png").exists()
    assert "the boxes look like" not in capsys.readouterr().out  # they fit into such images


def test_boxes_in_another_frame_are_named_where_they_do_not_fit(tmp_path, capsys):
    write_data(tmp_path, WRITTEN["0 to 1000"], with_masks=True)
    assert data.main([str(tmp_path)]) == 2
    said = capsys.readouterr().out
    assert "the boxes look like 0 to 1000 (fit 1.00), not like pixels of the image" in said


def test_shifted_boxes_of_another_model_are_named(tmp_path, capsys):
    write_data(tmp_path, WRITTEN["pixels"], with_masks=True)
    lines = []
    for row in load_samples(tmp_path, "train").rows:  # pixels, and said to be thousandths
        lines.append(json.dumps({"id": row["id"], "bbox": row["bbox"]}) + "\n")
    (tmp_path / "theirs.jsonl").write_text("".join(lines))
    flags = f"{tmp_path}/theirs.jsonl --data {tmp_path} --split train --frame norm1000 --asm none"
    predictions.main([*flags.split(), "--out", str(tmp_path / "eval")])
    assert (
        "the boxes look like pixels (mean IoU 1.00), not like norm1000" in capsys.readouterr().out
    )


def test_boxes_that_cover_the_whole_image(tmp_path, monkeypatch):
    def sample(crm, prompts, *args):
        groups = train_grpo_sample(crm, prompts, *args)
        for group in groups:
            width, height = group.prompt.sizes.model
            answer = write_answer((0, 0, width, height - 1), ((9, 9), (20, 20)))
            group.texts = [f"<think>everything</think>{answer}"] * 3 + group.texts[:1]
        return groups

    train_grpo_sample = train_grpo.sample
    monkeypatch.setattr(train_grpo, "sample", sample)
    (row,) = train(SMALL + QUIET + "--steps 1", tmp_path / "run")
    assert row["whole_image"] == 0.75
    assert "whole_image/std" not in row  # it is no reward term
    assert_warned(row["warnings"], "most boxes cover the whole image")


def test_nine_tenths_of_an_image_are_the_whole_image():
    assert covers((0, 0, 100, 50), (100, 50))
    assert covers((-500, -500, 500, 500), (100, 50))
    assert covers((10, 0, 100, 50), (100, 50))
    assert not covers((11, 0, 100, 50), (100, 50))
    assert not covers((200, 200, 900, 900), (100, 50))  # past it on both sides


def test_few_image_tokens_are_said_of_real_models_only(tmp_path, monkeypatch, capsys):
    first_look([], [900, 900], weights=3_754_622_976)
    assert "an image has 900 tokens; Qwen's authors recommend" in capsys.readouterr().out
    first_look([], [900, 1200], weights=3_754_622_976)
    first_look([], [36], weights=3_068_160)
    assert capsys.readouterr().out == ""
    width, height = data.model_size((3000, 2000), "aspect:1605632")
    assert stats.FEWEST_IMAGE_TOKENS < width * height / data.STRIDE**2 <= 2048

    monkeypatch.setattr(stats, "SMALLEST_REAL_MODEL", 3_000_000)
    train(SMALL.replace("110", "4") + QUIET + "--steps 1 --resize square:112", tmp_path / "run")
    assert "an image has 16 tokens; Qwen's authors recommend" in capsys.readouterr().out


# ---------------------------------------------------------------- the policy breaks


def test_a_learning_rate_that_is_far_too_high(tmp_path):
    rows = train(SMALL + QUIET + "--steps 2 --lr 100", tmp_path / "run")
    assert_warned(
        rows[1]["warnings"], "the policy is far from the reference", "entropy has collapsed"
    )


def with_wrong_sampler(crm: CRM, *args: object) -> list:
    """What `sample` returns, but it takes every token for a bit more probable than it is."""
    groups = with_wrong_sampler.right(crm, *args)
    if with_wrong_sampler.calls > 0:  # the check of the first step would end the run
        for group in groups:
            group.logp += 0.1
    with_wrong_sampler.calls += 1
    return groups


def test_a_sampler_that_does_not_agree_with_the_scorer(random_model, tmp_path, monkeypatch):
    monkeypatch.setattr(with_wrong_sampler, "right", train_grpo.sample, raising=False)
    monkeypatch.setattr(with_wrong_sampler, "calls", 0, raising=False)
    monkeypatch.setattr(train_grpo, "sample", with_wrong_sampler)
    rows = train(random_model + QUIET + "--steps 2 --max-new-tokens 4", tmp_path / "run")
    assert_warned(rows[1]["warnings"], "sampled and scored log-probabilities differ")
    assert rows[1]["logp_gap_mean"] == pytest.approx(0.1, abs=1e-3)


def break_gradient(monkeypatch: pytest.MonkeyPatch, name: str, from_call: int) -> None:
    """Makes the gradient of one parameter NaN from some backward pass on."""
    prepare_training = CRM.prepare_training
    calls = []

    def prepare(crm: CRM, *args: object, **options: object) -> dict:
        parameters = prepare_training(crm, *args, **options)

        def broken(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(name)
            return gradient * math.nan if len(calls) > from_call else gradient

        parameters[name].register_hook(broken)
        return parameters

    monkeypatch.setattr(CRM, "prepare_training", prepare)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_that_is_not_finite_is_named_and_after_three_the_run_ends(
    random_model, tmp_path, monkeypatch, capsys, dtype
):
    name = "model.language_model.layers.1.mlp.up_proj.weight"
    break_gradient(monkeypatch, name, from_call=1)
    flags = random_model + QUIET + f"--steps 9 --max-new-tokens 4 --dtype {dtype}"
    with pytest.raises(RuntimeError, match="3 steps in a row without a finite gradient"):
        train(flags, tmp_path / "run")
    first, second, *others = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert first["skipped"] == 0
    assert len(others) == 2
    assert_warned(second["warnings"], "a gradient is not finite, its update was skipped")
    said = capsys.readouterr().out
    assert said.count(f"the gradient of {name} is not finite\n") == 3
    assert not any("exactly 0" in warning for warning in second["warnings"])  # it is skipped


def test_a_norm_that_overflows_is_told_from_a_broken_gradient(capsys):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = train_grpo.Optimizer({"weight": weight})
    (weight * 3e38).sum().backward()
    assert optimizer.step(0.1) == math.inf
    assert "the norm of the gradient is not finite, although" in capsys.readouterr().out
    assert torch.equal(weight, torch.ones(3))


def test_weights_that_have_diverged_end_the_run_with_the_question(
    random_model, tmp_path, monkeypatch, capsys
):
    update_policy = train_grpo.update_policy

    def diverge(crm: CRM, *args: object) -> float:
        norm = update_policy(crm, *args)
        with torch.no_grad():
            crm.model.lm_head.weight[5] = math.nan
        return norm

    monkeypatch.setattr(train_grpo, "update_policy", diverge)
    with pytest.raises(SystemExit) as exit_info:
        train(random_model + QUIET + "--steps 3 --max-new-tokens 4", tmp_path / "run")
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert "step 2: logits are not finite, the weights or the image are broken: " in error
    questions = [row["query"] for row in load_samples(EMBEDDED["data"], "train").rows]
    assert any(question[:80] in error for question in questions)
    assert "these weights are not saved" in error


def test_a_reward_that_is_not_finite_names_its_question(random_model, tmp_path, monkeypatch):
    def divided_by_zero(example, group, *_):
        nothing = math.nan if example.id == broken else 0.0
        zeros = dict.fromkeys(train_grpo.MODES["soft"], nothing)
        return [zeros for _ in group.texts]

    train_set = load_samples(EMBEDDED["data"], "train")
    indices = train_grpo.step_indices(len(train_set), 2, seed=0, step=0)
    broken = train_set[indices[1]].id
    monkeypatch.setattr(train_grpo, "reward_group", divided_by_zero)
    with pytest.raises(RuntimeError, match=f"a reward of {broken} is not finite"):
        train(random_model + QUIET + "--steps 1 --max-new-tokens 4", tmp_path / "run")


# ---------------------------------------------------------------- traces


def write_data_of_names(folder: Path) -> None:
    """Four of the embedded questions, in which the target's name is all that is asked."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i, example in enumerate(load_samples(EMBEDDED["data"], "train")[:4]):
        example.image.save(folder / f"images/{i}.png")
        row = {
            "image": f"{i}.png",
            "query": target_name(example),
            "bbox": example.bbox,
            "points": example.points,
        }
        lines.append(json.dumps(row) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))


def test_a_prompt_that_asks_for_no_trace(tmp_path):
    (tmp_path / "short.txt").write_text(SHORT)
    write_data_of_names(tmp_path / "data")
    flags = f"{SMALL}{QUIET}--steps 1 --prompt {tmp_path}/short.txt --data {tmp_path}/data"
    (row,) = train(flags, tmp_path / "run")
    assert row["parse_ok"] > 0.5
    assert_warned(row["warnings"], "most completions have no trace")


def test_completions_that_become_short():
    """By numbers alone: a model that forgets its traces takes many steps."""
    first = {"length": 90.0, "finished": 0.9}
    assert_warned(warnings_of({"length": 44.0}, first), "completions are less than half as long")
    assert warnings_of({"length": 46.0}, first) == []
    # those of the first step were cut, so shorter ones are better ones
    assert warnings_of({"length": 44.0}, first | {"finished": 0.1}) == []


# ---------------------------------------------------------------- machines


def run_out_of_memory() -> None:
    def score(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    scoring.score = score


def test_a_run_that_is_out_of_memory_says_which_flags_need_less(random_model, tmp_path):
    flags = random_model + QUIET + "--steps 1 --max-new-tokens 4 --kl-coef 0 --out"
    script = Script("train_grpo.py", flags, tmp_path / "run", before=run_out_of_memory)
    _, error = script.communicate()
    assert script.returncode == 1
    assert "\nout of memory: lower --pack-tokens " in error
    assert "Tried to allocate 2.00 GiB" in error


def test_other_errors_are_not_explained_by_memory(capsys):
    with pytest.raises(RuntimeError, match="a bug of ours"), explain_memory():
        raise RuntimeError("a bug of ours")
    assert capsys.readouterr().err == ""


def let_rank_1_sleep(seconds: float) -> None:
    parallel.TIMEOUT_MINUTES = 0.5 * seconds / 60
    begin = Run.__init__

    def sleep(run: Run, config: object, of: Ranks) -> None:
        if of.rank == 1:
            time.sleep(seconds)
        begin(run, config, of)

    Run.__init__ = sleep


def test_a_rank_that_waits_in_vain_says_so(random_model, tmp_path, monkeypatch, capsys):
    flags = random_model + QUIET + "--steps 1 --max-new-tokens 4 --out"
    # two ranks of one question each; the other one does not come for 4 seconds
    before = partial(let_rank_1_sleep, 4.0)
    scripts = ranks(2, "train_grpo.py", flags, tmp_path / "run", before=before)
    said = [script.communicate()[1] for script in scripts]
    assert scripts[0].returncode != 0
    *_, last = said[0].strip().splitlines()
    assert "Timed out" in last
    # a Script's process prints its error itself, so the hook is called here
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel._name_the_rank(RuntimeError, RuntimeError(last), None)
    end = "error: rank 0 of 2: RuntimeError; another rank is gone or waits elsewhere, its own "
    assert end + "message says why\n" in capsys.readouterr().err


# ---------------------------------------------------------------- resume


def test_a_learning_rate_that_jumps_after_a_resume(random_model, tmp_path, capsys):
    flags = random_model + "--eval-every -1 --max-new-tokens 4 --lr 1e-4 --schedule linear "
    train(flags + "--steps 2", tmp_path / "run")
    rows = train(flags + "--steps 4 --resume", tmp_path / "run")
    assert [row["lr"] for row in rows] == pytest.approx([1e-4, 5e-5, 5e-5, 2.5e-5])
    line = "the learning rate of step 2 was 5e-05, and these flags would have made it 7.5e-05"
    assert line in capsys.readouterr().out


def test_a_learning_rate_that_goes_on_is_not_spoken_of(capsys):
    warn_of_jump([{"step": 2, "lr": 5e-5}], 5e-5 * (1 + 1e-9))
    warn_of_jump([{"step": 2}], 5e-5)
    warn_of_jump([], 5e-5)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- the page


def templates_of(files: Iterable[Path]) -> list[str]:
    """Returns every text in some files, with … where an f-string has a value."""
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "…") for part in node.values]
                found.append("".join(part if isinstance(part, str) else "…" for part in parts))
    return found


def rows_of_page() -> list[list[str]]:
    """Returns the cells of the page's table."""
    rows = []
    for line in PAGE.splitlines():
        if line.startswith("| ") and not line.startswith("| what you see"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def test_the_page_quotes_every_warning_exactly():
    for sentence, _ in WARNINGS:
        assert f'"{sentence}"' in PAGE, sentence


def test_every_sentence_that_the_page_quotes_is_printed_somewhere():
    ours = [*ROOT.glob("*.py"), *(ROOT / "runtime").glob("*.py"), ROOT / "extras/predictions.py"]
    templates = templates_of(ours)
    printed = [cells[2] for cells in rows_of_page()]
    assert len(printed) > 20
    quoted = []
    for cell in printed:
        cell = cell.replace('"think"', "'think'")  # a quote inside a quote
        quoted += re.findall(r'"([^"]*)"', cell)
    assert len(quoted) > len(WARNINGS) + 10
    for sentence in quoted:
        sentence = sentence.replace("'think'", '"think"').removeprefix("error: …: …")
        assert any(sentence in template for template in templates), sentence


def test_the_page_has_every_symptom_that_was_asked_for():
    page = PAGE.lower()
    asked = (
        "reward is flat",
        "only the format",
        "near 0 from step 1",
        "whole image",
        "kl jumps",
        "entropy collapses",
        "gradient is exactly 0",
        "nan",
        "traces are skipped",
        "out of memory",
        "run hangs",
        "jump after a resume",
        "boxes are shifted",
    )
    for symptom in asked:
        assert re.search(rf"\*\*[^*]*{symptom}[^*]*\*\*", page), symptom


def test_the_flags_of_the_page_are_flags():
    known = {"--help", "--sheet", "--frame"}  # the last two of data.py and extras.predictions
    for script in (train_grpo, train_sft, evaluate, infer):
        known |= {dashed(name) for name in script.Config.__dataclass_fields__}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE))
    assert len(named) > 15
    assert named <= known, named - known


def test_every_warning_was_provoked_in_this_file(request: pytest.FixtureRequest):
    """Only where all tests of the file have run, in one process."""
    here = [item for item in request.session.items if item.path == request.path]
    tests = [name for name in globals() if name.startswith("test_")]
    if len({item.originalname for item in here}) < len(tests) or hasattr(
        request.config, "workerinput"
    ):
        pytest.skip("some tests of this file have run elsewhere")
    sentences = {sentence for sentence, _ in WARNINGS}
    assert sentences == PROVOKED
