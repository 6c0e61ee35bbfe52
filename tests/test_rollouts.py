"""Whole groups in rollouts.jsonl, and the page that shows them: recomputed, resumed, on two ranks,
in a browser."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import Script, noise_image, ranks

from crm import load_crm
from data import Sizes, load_samples, model_size, to_image, to_model
from extras import rollouts
from rewards import box_iou, parse_answer, reward_terms, total_reward
from runtime.files import read_jsonl
from runtime.run import step_indices
from sampling import sample
from train_grpo import group_advantages

FLAGS = (
    "--coefficients box_iou=3 --prompts 2 --group 4 --minibatches 1 --max-new-tokens 110 "
    "--eval-every 1 --eval-limit 4 --lr 1e-5 --schedule constant --warmup 0 --trainable '' "
    "--save-every 2 --out"
)
HOSTILE = (
    "<think>a</think></script><script>window.bad = 1</script>"
    '<img src=x onerror="window.bad = 1"> & "quoted"'
)


def train(*command):
    """A training run in a process of its own."""
    script = Script("train_grpo.py", *command)
    finish(script)


def finish(*scripts):
    for script in scripts:
        _, error = script.communicate()
        assert script.returncode == 0, error[-3000:]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts") / "run"
    train("--steps 3", FLAGS, folder)
    return folder


@pytest.fixture(scope="module")
def rows(run):
    return read_jsonl(run / "rollouts.jsonl")


@pytest.fixture
def copy(run, tmp_path):
    """A run folder of one's own, without checkpoints."""
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("step_*")))


def write_rows(folder, rows):
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(folder, **changes):
    """Changes the first completion of the first group."""
    rows = read_jsonl(folder / "rollouts.jsonl")
    rows[0]["completions"][0] |= changes
    write_rows(folder, rows)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def data_of(page):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(found[1], parse_constant=pytest.fail)


def as_json(value):
    """What JSON makes of a value: tuples are lists."""
    return json.loads(json.dumps(value))


def texts_of(row):
    return [completion["text"] for completion in row["completions"]]


# ---------------------------------------------------------------- rollouts.jsonl


def test_every_step_has_the_same_four_held_out_prompts_and_two_of_its_own(rows):
    tests = load_samples("demo/data", "test").spread(4)
    training = load_samples("demo/data", "train")
    held_out = [(row["step"], row["id"]) for row in rows if row["split"] == "test"]
    assert held_out == [(step, name) for step in range(4) for name in tests.ids()]
    own = [(row["step"], row["id"]) for row in rows if row["split"] == "train"]
    expected = []
    for step in range(3):
        for i in step_indices(len(training), 2, 0, step):
            expected.append((step + 1, training.ids()[i]))
    assert own == expected
    assert all(len(row["completions"]) == 4 for row in rows)


def test_every_number_can_be_recomputed_from_the_text(rows):
    splits = {split: load_samples("demo/data", split) for split in ("test", "train")}
    boxes = 0
    for row in rows:
        examples = splits[row["split"]]
        example = examples[examples.ids().index(row["id"])]
        sizes = Sizes(example.image.size, model_size(example.image.size))
        true_box = to_model(example.bbox, sizes)
        true_points = to_model(example.points, sizes)
        assert row["query"] == example.query
        assert row["truth"] == as_json({"bbox": example.bbox, "points": example.points})
        for completion in row["completions"]:
            terms = reward_terms(completion["text"], true_box, true_points, sizes.model)
            assert completion["terms"] == terms
            reward = total_reward(terms, "soft", {"box_iou": 3})
            assert completion["reward"] == pytest.approx(reward, abs=1e-6)
            answer = parse_answer(completion["text"])
            assert completion["problem"] == answer.problem
            for key, xy in (("bbox", answer.bbox), ("points", answer.points)):
                in_image = None if xy is None else as_json(to_image(xy, sizes))
                assert completion[key] == in_image
            assert 0 < completion["length"] <= 110
            assert completion["finished"] or completion["length"] == 110
            boxes += completion["bbox"] is not None
        rewards = torch.tensor([[completion["reward"] for completion in row["completions"]]])
        logged = torch.tensor([[completion["advantage"] for completion in row["completions"]]])
        torch.testing.assert_close(logged, group_advantages(rewards))
    assert boxes > 20


def test_held_out_prompts_are_sampled_with_the_same_random_numbers_at_every_step(rows):
    crm = load_crm("demo/crm")
    tests = load_samples("demo/data", "test").spread(4)
    prompts = [crm.prompt_of(tests[i]) for i in range(4)]
    seeds = [(0, 0, 0, i, i, 0) for i in range(4)]
    for row, group in zip(rows, sample(crm, prompts, 4, 110, 1.0, seeds)):
        assert texts_of(row) == group.texts
        completions = row["completions"]
        assert [completion["length"] for completion in completions] == group.lengths.tolist()
        assert [completion["finished"] for completion in completions] == group.finished.tolist()
    texts = {}
    for step in (0, 1):
        held_out = [row for row in rows if (row["step"], row["split"]) == (step, "test")]
        texts[step] = [text for row in held_out for text in texts_of(row)]
    same = sum(before == after for before, after in zip(texts[0], texts[1]))
    assert same > 3  # a small update leaves many of 16


def test_neither_groups_nor_evaluations_change_a_number_of_the_training(run, tmp_path):
    train("--steps 3", FLAGS, tmp_path, "--eval-every -1 --save-every -1")
    measured_elsewhere = ("seconds", "peak", "tokens_per", "sampled/", "greedy/", "warnings")

    def training_rows(folder, name):
        found = []
        for row in read_jsonl(folder / f"{name}.jsonl"):
            if row["step"] > 0:
                kept = {k: v for k, v in row.items() if not k.startswith(measured_elsewhere)}
                found.append(kept)
        return found

    for name in ("metrics", "best_and_worst"):
        with_groups = training_rows(run, name)
        assert training_rows(tmp_path, name) == with_groups
        assert len(with_groups) == 3
    assert read_jsonl(tmp_path / "rollouts.jsonl") == []


def test_a_resumed_run_has_every_group_once(run, tmp_path):
    cut = shutil.copytree(run, tmp_path / "cut", ignore=shutil.ignore_patterns("step_000003"))
    config = (cut / "config.json").read_text()
    (cut / "config.json").write_text(config.replace(str(run), str(cut)))
    train("--steps 3 --resume", FLAGS, cut)  # from step 2; step 3 had been logged
    assert (cut / "rollouts.jsonl").read_text() == (run / "rollouts.jsonl").read_text()


def test_two_sharded_ranks_log_what_one_does(rows, tmp_path):
    finish(*ranks(2, "train_grpo.py --steps 1 --parallel fsdp", FLAGS, tmp_path))
    two = read_jsonl(tmp_path / "rollouts.jsonl")
    one = [row for row in rows if row["step"] <= 1]
    for a, b in zip(one, two, strict=True):
        for key in ("step", "split", "index", "id", "truth"):
            assert a[key] == b[key]
        if a["step"] > 0 and a["split"] == "test":
            continue  # sampled after the first update
        assert texts_of(a) == texts_of(b)
        for key in ("reward", "advantage"):
            values = [completion[key] for completion in a["completions"]]
            others = [completion[key] for completion in b["completions"]]
            assert values == pytest.approx(others, abs=1e-5)


# ---------------------------------------------------------------- rollouts.html


def test_a_group_is_summed_up_by_hand():
    completions = []
    for text, bbox, reward in (
        ("x", [0, 0, 10, 10], 4.0),
        ("x", [0, 0, 10, 5], 3.0),
        ("y", None, 1.0),
        ("z", None, 0.0),
    ):
        completion = {
            "text": text,
            "problem": "" if bbox else "no answer block",
            "bbox": bbox,
            "points": None,
            "reward": reward,
            "advantage": 0.0,
            "length": 5,
            "finished": True,
            "terms": {"box_iou": 0.5, "other": 1.0},
        }
        completions.append(completion)
    row = {
        "step": 3,
        "split": "test",
        "index": 0,
        "id": "a",
        "size": [20, 20],
        "query": "?",
        "category": "",
        "truth": {"bbox": [0, 0, 10, 10], "points": [[1, 1], [2, 2]]},
        "asked": ["bbox", "points"],
        "completions": completions,
    }
    shown = rollouts.group_of(row, {"box_iou": 3.0})
    assert shown["summary"] == {
        "mean": 2.0,
        "best": 1.0,
        "parsed": 0.5,
        "zero_std": 0.0,
        "identical": round(1 / 3, 4),
        "reward_std": round(math.sqrt(10 / 3), 4),
    }
    assert [completion["iou"] for completion in shown["completions"]] == [1.0, 0.5, 0.0, 0.0]
    assert shown["completions"][0]["terms"] == {"box_iou": 0.5}


def test_the_page_stands_alone_and_is_small(run):
    page = rollouts.page(run)
    without_pictures = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page)
    code = without_pictures.replace("http://www.w3.org/2000/svg", "")
    outside = (
        r"https?:|wss?:|[\"'(]//|\bsrc=|@import|url\(|fetch\(|XMLHttp|<link|<iframe"  # what loads
    )
    assert not re.search(outside, code)
    assert "default-src 'none'" in page
    assert page.count("data:image/jpeg;base64,") == 4 + 6
    assert len(page.encode()) * 9 / 4 * 2 < 5e6  # the demo logs 9 steps of twice as large groups


def test_the_page_has_every_group_and_its_numbers(run, rows):
    data = data_of(rollouts.page(run))
    coefficients = {"think_format": 1, "answer_format": 1, "box_iou": 3, "point_dice": 1}
    assert data["coefficients"] == coefficients
    assert data["steps"] == [0, 1, 2, 3]
    for row, shown in zip(rows, data["groups"], strict=True):
        true_box = row["truth"]["bbox"]
        for logged, drawn in zip(row["completions"], shown["completions"], strict=True):
            assert drawn["text"] == logged["text"]
            assert drawn["reward"] == pytest.approx(logged["reward"], abs=1e-4)
            total = sum(factor * drawn["terms"][name] for name, factor in coefficients.items())
            assert total == pytest.approx(logged["reward"], abs=1e-3)
            iou = box_iou(logged["bbox"], true_box) if logged["bbox"] else 0
            assert drawn["iou"] == pytest.approx(iou, abs=1e-4)


def test_a_term_without_weight_is_not_shown(copy):
    change_config(copy, coefficients="box_iou=3,point_dice=0")
    data = data_of(rollouts.page(copy))
    assert set(data["coefficients"]) == {"think_format", "answer_format", "box_iou"}
    assert set(data["groups"][0]["completions"][0]["terms"]) == set(data["coefficients"])


def test_text_cannot_leave_its_place(copy):
    before = rollouts.page(copy)
    change(copy, text=HOSTILE)
    page = rollouts.page(copy)
    for word in ("<script", "</script", "<img"):
        assert page.count(word) == before.count(word)
    assert data_of(page)["groups"][0]["completions"][0]["text"] == HOSTILE


def test_what_json_does_not_have_stays_out_of_the_page(copy):
    change(copy, bbox=[0.0, 0.0, math.inf, 1e308], points=[[math.nan, 0.0], [1.0, 1.0]])
    completion = data_of(rollouts.page(copy))["groups"][0]["completions"][0]
    width, height = read_jsonl(copy / "rollouts.jsonl")[0]["size"]
    assert completion["bbox"] == [0, 0, 2 * width, 2 * height]  # clipped
    assert completion["points"][1] == [1, 1]


def test_a_long_run_is_thinned_to_its_first_its_last_and_steps_between(run):
    assert data_of(rollouts.page(run, most_steps=3))["steps"] == [0, 2, 3]
    assert rollouts.spread_steps([5, 5, 1, 3], 60) == [1, 3, 5]
    assert rollouts.spread_steps(list(range(100)), 2) == [0, 99]
    assert rollouts.spread_steps([4], 1) == [4]


# ---------------------------------------------------------------- pictures


def own_data(folder, rows, split):
    """A data set with the ids of some groups, whose held-out split has a name of one's own."""
    (folder / "images").mkdir(parents=True)
    noise_image(60, 40).save(folder / "images/a.png")
    lines = []
    for name, kind in sorted({(row["id"], row["split"]) for row in rows}):
        line = {
            "image": "a.png",
            "query": "?",
            "id": name,
            "split": "train" if kind == "train" else split,
            "bbox": [10, 10, 20, 20],
            "points": [[12, 12], [18, 18]],
        }
        lines.append(json.dumps(line) + "\n")
    (folder / "samples.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize("split", ["test", "val", "validation", "test_2"])
def test_a_held_out_split_of_any_name_has_pictures(copy, rows, tmp_path, capsys, split):
    """Only a split called "test" once had them."""
    change_config(copy, data=str(own_data(tmp_path / "data", rows, split)))
    found = data_of(rollouts.page(copy))["pictures"]
    groups = {f"{row['split']}/{row['id']}" for row in rows}
    assert set(found) == groups
    assert "no pictures" not in capsys.readouterr().out


def test_a_run_on_data_with_bad_rows_that_were_skipped_has_pictures(copy, rows, tmp_path):
    data = own_data(tmp_path / "data", rows, "test")
    with open(data / "samples.jsonl", "a") as file:
        file.write(json.dumps({"image": "none.png", "query": "?", "split": "test"}) + "\n")
    change_config(copy, data=str(data), skip_bad_rows=True)
    assert len(data_of(rollouts.page(copy))["pictures"]) == 4 + 6


def test_data_inside_the_checkout_are_found_from_another_folder(copy, tmp_path, monkeypatch):
    change_config(copy, data="demo/data")  # as training keeps it
    monkeypatch.chdir(tmp_path)
    assert len(data_of(rollouts.page(copy))["pictures"]) == 4 + 6


def test_a_page_without_its_data_says_so_and_has_no_pictures(copy, capsys):
    change_config(copy, data="moved")
    rollouts.main([str(copy)])
    said = capsys.readouterr().out
    assert "the groups have no pictures: moved: no such file or folder" in said
    assert "rollouts.html" in said
    assert data_of((copy / "rollouts.html").read_text())["pictures"] == {}


# ---------------------------------------------------------------- what is not a run


def main_error(capsys, *words):
    """What the command prints where it ends with status 2."""
    with pytest.raises(SystemExit, match="2"):
        rollouts.main([str(word) for word in words])
    error = capsys.readouterr().err
    assert error.startswith("error:")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_groups_is_one_line_and_status_2(tmp_path, capsys, name):
    assert "rollouts.jsonl" in main_error(capsys, tmp_path / name)
    assert not list(tmp_path.iterdir())


FOREIGN = {
    "another program's": (
        lambda row: [row.clear(), row.update(input="?", output="x", gts="", score=1.0, step=1)],
        "KeyError: 'split'",
    ),
    "no step": (lambda row: row.pop("step"), "KeyError: 'step'"),
    "a step that is text": (lambda row: row.update(step="last"), "'last'"),
    "completions that are a number": (lambda row: row.update(completions=5), "TypeError"),
    "no completion": (lambda row: row.update(completions=[]), "ValueError"),
    "no reward": (lambda row: row["completions"][0].pop("reward"), "KeyError: 'reward'"),
    "no terms": (lambda row: row["completions"][0].pop("terms"), "KeyError: 'terms'"),
    "a reward that is null": (lambda row: row["completions"][0].update(reward=None), "NoneType"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_line_of_another_program_is_one_line_and_status_2(copy, rows, capsys, name):
    change_row, says = FOREIGN[name]
    changed = as_json(rows)
    change_row(changed[1])
    write_rows(copy, changed)
    error = main_error(capsys, copy)
    assert "rollouts.jsonl, line 2: not as train_grpo.py writes it" in error
    assert says in error
    assert "give the folder" in error
    assert not (copy / "rollouts.html").exists()


@pytest.mark.parametrize(
    "config, says",
    [
        ({}, "KeyError: 'coefficients'"),
        ({"coefficients": "", "norm": "group"}, "'mode'"),
        ({"coefficients": 3, "norm": "group", "mode": "soft"}, "AttributeError"),
        ({"coefficients": "a=b", "mode": "soft"}, "ValueError: --coefficients a=b"),
    ],
)
def test_a_configuration_of_another_program_is_one_line_and_status_2(copy, capsys, config, says):
    (copy / "config.json").write_text(json.dumps(config))
    error = main_error(capsys, copy)
    assert "config.json: not as train_grpo.py writes it" in error
    assert says in error


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--most-steps 0", "--most-steps 0: must be at least 1"),
        ("--most-steps -3", "--most-steps"),
        ("--most-steps x", "invalid int value"),
        ("--steps 3", "--steps"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(copy, capsys, flags, says):
    assert says in main_error(capsys, copy, *flags.split())
    assert not (copy / "rollouts.html").exists()


def test_help_says_how_the_page_is_made(capsys):
    with pytest.raises(SystemExit, match="0"):
        rollouts.main(["--help"])
    said = capsys.readouterr().out
    assert "python -m extras.rollouts runs/demo" in said
    assert "--most-steps" in said


# ---------------------------------------------------------------- in a browser


@pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
def test_a_browser_opens_the_page_moves_the_slider_and_hovers(copy, rows, tmp_path):
    change(copy, text=HOSTILE, problem="no answer block", bbox=None, points=None)
    rollouts.main([str(copy)])

    def count(selector):
        return f"document.querySelectorAll({selector!r}).length"

    with Browser(1280, 900) as page:
        page.open(copy / "rollouts.html")
        assert page.run(count(".card")) == 4  # before training: held-out only
        assert page.run(count(".row.one")) == 16
        assert page.run("window.bad") is None
        assert page.run("document.images.length") == 0
        assert HOSTILE in page.run("document.querySelector('.card').textContent")
        assert page.run(count(".card:first-of-type .view .gt")) == 1  # the true box
        for g, completion in enumerate(read_jsonl(copy / "rollouts.jsonl")[0]["completions"]):
            row = f"document.querySelector('.row.one[data-g=\"{g}\"]')"
            flags = page.run(f"[...{row}.querySelectorAll('.flag')].map(e => e.textContent)")
            expected = []
            if not completion["finished"]:
                expected.append("cut")
            if completion["problem"]:
                expected.append("unparsed")
            assert flags == expected

        x, y = page.place("#step")
        page.click(x + 100, y)  # steps 0 to 3: right of the middle
        assert page.run("document.querySelector('#now').textContent") == "step 2"
        assert page.run(count(".card")) == 6
        held_out = next(row for row in rows if (row["step"], row["split"]) == (2, "test"))
        rewards = sorted((c["reward"] for c in held_out["completions"]), reverse=True)
        shown = page.run(
            "[...document.querySelector('.card').querySelectorAll('.strong')]"
            ".map(e => e.textContent)"
        )
        assert shown == [f"{reward:.2f}" for reward in rewards]

        page.picture(tmp_path / "wide.png")
        page.move(*page.place(".row.one", 1))
        assert page.run(count(".view.lit")) == 1
        assert page.run(count(".view .on")) == 1
        assert page.run(count(".row.on")) == 1
        lit = page.run("document.querySelector('.row.on').dataset.g")
        assert page.run("document.querySelector('.view .on').dataset.g") == lit
        page.move(5, 5)
        assert page.run(count(".on, .lit")) == 0

        of_step = [row for row in rows if row["step"] == 2]
        good = [sum(is_good(row, c) for c in row["completions"]) for row in of_step]
        unparsed = [any(c["problem"] for c in row["completions"]) for row in of_step]
        expected = {
            "all good": good.count(4),
            "mixed": sum(0 < n < 4 for n in good),
            "all bad": good.count(0),
            "unparsed": sum(unparsed),
        }
        for i, (name, cards) in enumerate(expected.items(), 1):
            page.click(*page.place(".filters button", i))
            assert page.run(count(".card")) == cards, name
        page.click(*page.place(".filters button", 0))

        page.resize(390, 844)
        assert page.run("document.documentElement.scrollWidth") == 390
        page.picture(tmp_path / "narrow.png")
        assert not page.errors
        assert {url.partition(":")[0] for url in page.requests} <= {"file", "data"}
    for name in ("wide.png", "narrow.png"):
        assert (tmp_path / name).stat().st_size > 20_000


def is_good(row, completion):
    if not completion["bbox"]:
        return False
    return box_iou(completion["bbox"], row["truth"]["bbox"]) >= 0.5
