"""Whole groups in rollouts.jsonl, and the page that shows them: recomputed, resumed, on two ranks, in a browser."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import Script, ranks

from crm import load_crm
from data import PROMPTS, Frame, fill_prompt, load_samples, model_size, to_image, to_model
from extras import rollouts
from rewards import box_iou, parse_answer, reward_terms, total_reward
from runtime.files import read_jsonl
from runtime.run import sample_indices
from sampling import sample
from train_grpo import group_advantages

FLAGS = (
    "--weights box_iou=3 --prompts 2 --group 4 --minibatches 1 --max-new-tokens 110 --eval-every 2 --eval-answers 1 --eval-limit 4 "
    "--lr 1e-5 --schedule constant --warmup 0 --trainable '' --rollouts-every 1 --save-every 2 --out"
)
HOSTILE = '<think>a</think></script><script>window.bad = 1</script><img src=x onerror="window.bad = 1"> & "quoted"'


def done(*scripts):
    for script in scripts:
        out, error = script.communicate()
        assert script.returncode == 0, error[-3000:]
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollouts") / "run"
    said = done(Script("train_grpo.py --steps 3", FLAGS, folder))
    assert f"python -m extras.rollouts {folder}" in said.splitlines()[-1]
    return folder


@pytest.fixture(scope="module")
def rows(run):
    return read_jsonl(run / "rollouts.jsonl")


@pytest.fixture
def copy(run, tmp_path):
    """A run folder of one's own, without checkpoints."""
    return Path(shutil.copytree(run, tmp_path / "copy", ignore=shutil.ignore_patterns("step_*")))


def change(folder, **changes):
    """Change the first completion of the first group."""
    rows = read_jsonl(folder / "rollouts.jsonl")
    rows[0]["completions"][0] |= changes
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def data_of(page: str) -> dict:
    return json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1],
        parse_constant=pytest.fail,
    )


# ---------------------------------------------------------------- rollouts.jsonl


def test_every_step_has_the_same_four_held_out_prompts_and_two_of_its_own(rows):
    held_out = [(row["step"], row["id"]) for row in rows if row["split"] == "test"]
    tests, train = load_samples("demo/data", "test"), load_samples("demo/data", "train")
    assert held_out == [(step, tests.ids()[i]) for step in range(4) for i in range(4)]
    own = [(row["step"], row["id"]) for row in rows if row["split"] == "train"]
    assert own == [
        (step + 1, train.ids()[i])
        for step in range(3)
        for i in sample_indices(len(train), 2, 0, step)
    ]
    assert all(len(row["completions"]) == 4 for row in rows)


def test_every_number_can_be_recomputed_from_the_text(rows):
    splits, seen = {split: load_samples("demo/data", split) for split in ("test", "train")}, 0
    for row in rows:
        s = splits[row["split"]][splits[row["split"]].ids().index(row["id"])]
        frame = Frame(s.image.size, model_size(s.image.size))
        truth = to_model(s.bbox, frame), to_model(s.points, frame)
        assert row["query"] == s.query and row["truth"] == json.loads(
            json.dumps({"bbox": s.bbox, "points": s.points})
        )
        for c in row["completions"]:
            terms, answer = (
                reward_terms(c["text"], *truth, False, frame.model),
                parse_answer(c["text"]),
            )
            assert c["terms"] == terms and c["problem"] == answer.problem
            assert c["reward"] == pytest.approx(
                total_reward(terms, "soft", {"box_iou": 3}), abs=1e-6
            )
            for key in ("bbox", "points"):
                xy = getattr(answer, key)
                assert c[key] == (xy and json.loads(json.dumps(to_image(xy, frame))))
            assert 0 < c["length"] <= 110 and (c["finished"] or c["length"] == 110)
            seen += bool(c["bbox"])
        rewards, logged = (
            torch.tensor([[c[key] for c in row["completions"]]]) for key in ("reward", "advantage")
        )
        torch.testing.assert_close(logged, group_advantages(rewards))
    assert seen > 20


def test_held_out_prompts_are_sampled_with_the_same_random_numbers_at_every_step(rows):
    crm, tests = load_crm("demo/crm"), load_samples("demo/data", "test")
    prompts = [
        crm.encode(tests[i].image, fill_prompt(PROMPTS["reasoning"], tests[i].query))
        for i in range(4)
    ]
    groups = sample(crm, prompts, 4, 110, 1.0, [(0, 0, 0, i, i, 0) for i in range(4)])
    for row, group in zip(rows, groups):
        assert [c["text"] for c in row["completions"]] == group.texts
        assert [c["length"] for c in row["completions"]] == group.lengths.tolist()
        assert [c["finished"] for c in row["completions"]] == group.finished.tolist()
    before, after = (
        [
            c["text"]
            for row in rows
            if (row["step"], row["split"]) == (step, "test")
            for c in row["completions"]
        ]
        for step in (0, 1)
    )
    assert sum(a == b for a, b in zip(before, after)) > 3  # a small update leaves many of 16


def test_neither_groups_nor_evaluations_change_a_number_of_the_training(run, tmp_path):
    done(
        Script(
            "train_grpo.py --steps 3",
            FLAGS,
            tmp_path,
            "--rollouts-every 0 --eval-every -1 --save-every -1",
        )
    )
    for name in ("metrics", "samples"):
        one, other = (
            [
                {
                    key: value
                    for key, value in row.items()
                    if not key.startswith(("seconds", "peak", "tokens_per", "sampled/", "greedy/"))
                }
                for row in read_jsonl(folder / f"{name}.jsonl")
                if row["step"]
            ]
            for folder in (run, tmp_path)
        )
        assert one == other and len(one) == 3, name
    own = read_jsonl(tmp_path / "rollouts.jsonl")  # after the last step, there is no held-out split
    assert own == [
        row
        for row in read_jsonl(run / "rollouts.jsonl")
        if (row["step"], row["split"]) == (3, "train")
    ]
    assert len(data_of(rollouts.page(tmp_path))["groups"]) == 2


def test_a_resumed_run_has_every_group_once(run, tmp_path):
    cut = shutil.copytree(run, tmp_path / "cut", ignore=shutil.ignore_patterns("step_000003"))
    (cut / "config.json").write_text((cut / "config.json").read_text().replace(str(run), str(cut)))
    done(
        Script("train_grpo.py --steps 3 --resume", FLAGS, cut)
    )  # from step 2; step 3 was logged, too
    assert (cut / "rollouts.jsonl").read_text() == (run / "rollouts.jsonl").read_text()


def test_two_sharded_ranks_log_what_one_does(rows, tmp_path):
    done(*ranks(2, "train_grpo.py --steps 1 --parallel fsdp", FLAGS, tmp_path))
    two = read_jsonl(tmp_path / "rollouts.jsonl")
    one = [row for row in rows if row["step"] <= 1]
    for a, b in zip(one, two, strict=True):
        assert all(a[key] == b[key] for key in ("step", "split", "index", "id", "truth"))
        if a["step"] == 0 or a["split"] == "train":  # sampled before the first update
            assert [c["text"] for c in a["completions"]] == [c["text"] for c in b["completions"]]
            for key in ("reward", "advantage"):
                assert [c[key] for c in a["completions"]] == pytest.approx(
                    [c[key] for c in b["completions"]], abs=1e-5
                )


def test_fixed_prompts_are_spread_over_what_can_be_rewarded():
    def Rows(*masks):
        return [SimpleNamespace(mask=mask) for mask in masks]

    assert rollouts.fixed_prompts(Rows(*"abcdefgh"), need_mask=True) == [0, 2, 4, 6]
    assert rollouts.fixed_prompts(Rows(None, "a", None, "b"), need_mask=True) == [1, 3]
    assert rollouts.fixed_prompts(Rows(None, "a", None, "b"), need_mask=False) == [0, 1, 2, 3]
    assert rollouts.fixed_prompts([], need_mask=True) == []


# ---------------------------------------------------------------- rollouts.html


def test_a_group_is_summed_up_by_hand():
    texts = ["x", "x", "y", "z"]
    boxes, problems = (
        [[0, 0, 10, 10], [0, 0, 10, 5], None, None],
        ["", "", "no answer block", "no answer block"],
    )
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
        "completions": [
            {
                "text": t,
                "problem": p,
                "bbox": b,
                "points": None,
                "reward": r,
                "advantage": 0.0,
                "length": 5,
                "finished": True,
                "terms": {"box_iou": 0.5, "other": 1.0},
            }
            for t, p, b, r in zip(texts, problems, boxes, [4.0, 3.0, 1.0, 0.0])
        ],
    }
    shown = rollouts.group(row, {"box_iou": 3.0, "other": 0.0})
    assert shown["summary"] == {
        "mean": 2.0,
        "best": 1.0,
        "parsed": 0.5,
        "zero_std": 0.0,
        "identical": round(1 / 3, 4),
        "reward_std": round(math.sqrt(10 / 3), 4),
    }
    assert [c["iou"] for c in shown["completions"]] == [1.0, 0.5, 0.0, 0.0]
    assert shown["completions"][0]["terms"] == {"box_iou": 0.5}


def test_the_page_stands_alone_and_is_small(run):
    page = rollouts.page(run)
    code = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page).replace(
        "http://www.w3.org/2000/svg", ""
    )
    assert not re.search(
        r"https?:|wss?:|[\"'(]//|\bsrc=|@import|url\(|fetch\(|XMLHttp|<link|<iframe", code
    )
    assert "default-src 'none'" in page and page.count("data:image/jpeg;base64,") == 4 + 6
    assert len(page.encode()) * 9 / 4 * 2 < 5e6  # the demo logs 9 steps of twice as large groups


def test_the_page_has_every_group_and_its_numbers(run, rows):
    data = data_of(rollouts.page(run))
    assert data["weights"] == {"think_format": 1, "answer_format": 1, "box_iou": 3, "point_dice": 1}
    assert data["steps"] == [0, 1, 2, 3] and len(data["groups"]) == len(rows)
    for row, shown in zip(rows, data["groups"]):
        for c, d in zip(row["completions"], shown["completions"]):
            assert d["text"] == c["text"] and d["reward"] == pytest.approx(c["reward"], abs=1e-4)
            total = sum(factor * d["terms"][name] for name, factor in data["weights"].items())
            assert total == pytest.approx(c["reward"], abs=1e-3)
            assert d["iou"] == (
                pytest.approx(box_iou(c["bbox"], row["truth"]["bbox"]), abs=1e-4)
                if c["bbox"]
                else 0
            )


def test_text_cannot_leave_its_place(copy):
    before = rollouts.page(copy)
    change(copy, text=HOSTILE)
    page = rollouts.page(copy)
    for word in ("<script", "</script", "<img"):
        assert page.count(word) == before.count(word)
    assert data_of(page)["groups"][0]["completions"][0]["text"] == HOSTILE


def test_what_json_does_not_have_stays_out_of_the_page(copy):
    change(copy, bbox=[0.0, 0.0, math.inf, 1e308], points=[[math.nan, 0.0], [1.0, 1.0]])
    data_of(rollouts.page(copy))


def test_a_long_run_is_thinned_to_its_first_its_last_and_steps_between(run):
    assert data_of(rollouts.page(run, most_steps=3))["steps"] == [0, 2, 3]


def test_a_page_without_its_data_says_so_and_has_no_pictures(copy, capsys):
    config = json.loads((copy / "config.json").read_text()) | {"data": "moved"}
    (copy / "config.json").write_text(json.dumps(config))
    rollouts.main([str(copy)])
    said = capsys.readouterr().out
    assert "no picture" in said and "moved" in said and "rollouts.html" in said
    assert data_of((copy / "rollouts.html").read_text())["pictures"] == {}


@pytest.mark.parametrize("make", [lambda path: path / "nowhere", lambda path: path])
def test_a_folder_without_groups_is_one_line_and_status_2(tmp_path, capsys, make):
    with pytest.raises(SystemExit, match="2"):
        rollouts.main([str(make(tmp_path))])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "rollouts.jsonl" in said and not list(tmp_path.iterdir())


def foreign(rows, change):
    rows = json.loads(json.dumps(rows))
    change(rows[1])
    return rows


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda row: [row.clear(), row.update(input="?", output="x", gts="", score=1.0, step=1)],
            "'completions'",
        ),  # verl's
        (lambda row: row.pop("step"), "KeyError: 'step'"),
        (lambda row: row.update(step="last"), "'last'"),
        (lambda row: row.update(completions=5), "TypeError"),
        (lambda row: row.update(completions=[]), "ValueError"),
        (lambda row: row["completions"][0].pop("reward"), "KeyError: 'reward'"),
        (lambda row: row["completions"][0].pop("terms"), "KeyError: 'terms'"),
        (lambda row: row["completions"][0].update(reward=None), "NoneType"),
    ],
)
def test_a_line_of_another_program_is_one_line_and_status_2(copy, rows, capsys, change, says):
    (copy / "rollouts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in foreign(rows, change))
    )
    with pytest.raises(SystemExit, match="2"):
        rollouts.main([str(copy)])
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "rollouts.jsonl, line 2: not as train_grpo.py writes it" in said
        and says in said
    )
    assert "give the folder" in said and not (copy / "rollouts.html").exists()


@pytest.mark.parametrize(
    "config, says",
    [
        ({}, "KeyError: 'weights'"),
        ({"weights": "", "norm": "group"}, "'mode'"),
        ({"weights": 3, "norm": "group", "mode": "soft"}, "AttributeError"),
    ],
)
def test_a_configuration_of_another_program_is_one_line_and_status_2(copy, capsys, config, says):
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match="2"):
        rollouts.main([str(copy)])
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "config.json: not as train_grpo.py writes it" in said
        and says in said
    )


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
    with pytest.raises(SystemExit, match="2"):
        rollouts.main([str(copy), *flags.split()])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said and not (copy / "rollouts.html").exists()


# ---------------------------------------------------------------- in a browser


@pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
def test_a_browser_opens_the_page_moves_the_slider_and_hovers(copy, rows, tmp_path):
    change(copy, text=HOSTILE, problem="no answer block", bbox=None, points=None)
    rollouts.main([str(copy)])
    with Browser(1280, 900) as page:
        page.open(copy / "rollouts.html")
        assert (
            page.run("document.querySelectorAll('.card').length") == 4
        )  # before training: held-out only
        assert page.run("document.querySelectorAll('.row.one').length") == 16
        assert page.run("window.bad") is None and page.run("document.images.length") == 0
        assert HOSTILE in page.run("document.querySelector('.card').textContent")
        assert (
            page.run("document.querySelectorAll('.card')[0].querySelectorAll('.view .gt').length")
            == 1
        )  # true box
        for g, c in enumerate(read_jsonl(copy / "rollouts.jsonl")[0]["completions"]):
            flags = (
                f"[...document.querySelector('.row.one[data-g=\"{g}\"]').querySelectorAll('.flag')]"
            )
            assert page.run(flags + ".map(e => e.textContent)") == ["cut"] * (not c["finished"]) + [
                "unparsed"
            ] * bool(c["problem"])

        x, y = page.place("#step")
        page.click(x + 100, y)  # steps 0 to 3: right of the middle
        assert page.run("document.querySelector('#now').textContent") == "step 2"
        assert page.run("document.querySelectorAll('.card').length") == 6
        rewards = sorted((c["reward"] for c in rows[10]["completions"]), reverse=True)
        shown = page.run(
            "[...document.querySelector('.card').querySelectorAll('.strong')].map(e => e.textContent)"
        )
        assert shown == [f"{r:.2f}" for r in rewards] and rows[10]["step"] == 2

        page.picture(tmp_path / "wide.png")
        page.move(*page.place(".row.one", 1))
        lit = page.run(
            "[document.querySelectorAll('.view.lit').length, document.querySelectorAll('.view .on').length,"
            "document.querySelectorAll('.row.on').length, document.querySelector('.row.on').dataset.g]"
        )
        assert lit[:3] == [1, 1, 1] and lit[3] == page.run(
            "document.querySelector('.view .on').dataset.g"
        )
        page.move(5, 5)
        assert page.run("document.querySelectorAll('.on, .lit').length") == 0

        for i, name in enumerate(("all good", "mixed", "all bad", "unparsed"), 1):
            page.click(*page.place(".filters button", i))
            good = [
                sum(
                    bool(c["bbox"]) and box_iou(c["bbox"], row["truth"]["bbox"]) >= 0.5
                    for c in row["completions"]
                )
                for row in rows
                if row["step"] == 2
            ]
            want = {"all good": good.count(4), "all bad": good.count(0)}
            want["mixed"] = len(good) - sum(want.values())
            want["unparsed"] = sum(
                any(c["problem"] for c in row["completions"]) for row in rows if row["step"] == 2
            )
            assert page.run("document.querySelectorAll('.card').length") == want[name], name
        page.click(*page.place(".filters button", 0))

        page.resize(390, 844)
        assert page.run("document.documentElement.scrollWidth") == 390
        page.picture(tmp_path / "narrow.png")
        assert not page.errors and {url.partition(":")[0] for url in page.requests} <= {
            "file",
            "data",
        }
    assert all((tmp_path / name).stat().st_size > 20_000 for name in ("wide.png", "narrow.png"))
