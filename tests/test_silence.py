"""extras/silence.py: what is read, what it earns, what is counted, and that training runs on it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import noise_image
from hypothesis import given
from hypothesis import strategies as st
from test_infer import BOX, Asker, ask, completion  # noqa: F401  (ask is a fixture)
from test_scripts import run

import metrics
from data import ANSWER_FORMATS, ONE_BOX, PROMPTS, Example, Sizes, answer_format_of, load_prompt
from extras.false_premise import asks_for_nothing
from extras.silence import MAY_BE_SILENT, SILENCE, is_silent, parse, reward_terms, target_text
from rewards import MODES, total_reward
from runtime.files import read_jsonl
from train_grpo import group_advantages

SIZES = Sizes((112, 112), (112, 112))
SILENT = f"<think>I see no liver.</think>{SILENCE}"
SOMETHING = Example("q", noise_image(112, 112), "?", BOX, ((20, 20), (40, 40)), think="A disc.")
NOTHING = replace(SOMETHING, extra={"nothing_here": True, "kind": "absent category"})
PERFECT = ONE_BOX.target_text(SOMETHING, SIZES, True)
MISS = completion((60, 60, 100, 100), ((70, 70), (90, 90)))


def reward(text: str, example: Example, mode: str = "soft") -> float:
    return total_reward(reward_terms(text, example, SIZES), mode)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    "body, silent",
    [
        ('{"bbox": null}', True),
        ("{'bbox': null}", True),
        ('{"bbox": null, "points_1": null, "points_2": null}', True),
        ('{"bbox": null, "points_1": [1, 2], "points_2": [3, 4]}', False),
        ('{"points_1": null}', False),
        ("{}", False),
        ("null", False),
        ('{"bbox": []}', False),
        ('{"bbox": "null"}', False),
    ],
)
def test_what_counts_as_silence(body, silent):
    text = f"<think>t</think><answer>{body}</answer>"
    assert is_silent(text) is silent
    answer = parse(text)
    if silent:
        assert (answer.think, answer.bbox, answer.points, answer.problem) == ("t", None, None, "")
    else:
        assert answer.problem


def test_a_box_is_read_as_before():
    assert parse(PERFECT) == ONE_BOX.parse(PERFECT)


@given(st.text())
def test_no_text_raises(text):
    answer = parse(f"<think>{text}</think><answer>{text}</answer>")
    assert answer.bbox is None or len(answer.bbox) == 4
    reward_terms(text, NOTHING, SIZES)


def test_the_prompt_chooses_this_format_and_the_others_keep_theirs():
    assert load_prompt("nothing") == MAY_BE_SILENT.prompt
    assert answer_format_of(load_prompt("nothing")) is MAY_BE_SILENT
    assert SILENCE in MAY_BE_SILENT.prompt
    for name in PROMPTS:
        assert answer_format_of(PROMPTS[name]) is ONE_BOX
    assert answer_format_of(load_prompt("boxes")).key == "boxes"
    assert ANSWER_FORMATS[MAY_BE_SILENT.key] == "extras.silence.MAY_BE_SILENT"


# ---------------------------------------------------------------- what it earns


@pytest.mark.parametrize("mode", MODES)
def test_right_silence_earns_what_a_right_box_earns(mode):
    assert reward(PERFECT, SOMETHING, mode) == pytest.approx(len(MODES[mode]))
    assert reward(SILENT, NOTHING, mode) == pytest.approx(len(MODES[mode]))


@pytest.mark.parametrize("mode", MODES)
def test_silence_where_there_is_something_earns_nothing(mode):
    assert set(reward_terms(SILENT, SOMETHING, SIZES).values()) == {0.0}
    assert reward(SILENT, SOMETHING, mode) == 0 < reward(MISS, SOMETHING, mode) + 1e-9


def test_a_box_where_nothing_is_earns_its_format_alone():
    terms = reward_terms(PERFECT, NOTHING, SIZES)
    assert terms["think_format"] == terms["answer_format"] == 1
    assert terms["box_iou"] == terms["point_dice"] == terms["base_iou"] == 0
    assert reward(PERFECT, NOTHING) == 2


def test_silence_without_a_trace_earns_less():
    assert reward(SILENCE, NOTHING) == pytest.approx(3)
    assert reward("I see nothing", NOTHING) == 0


def test_every_completion_has_the_terms_of_one_box():
    names = set(ONE_BOX.reward_terms(PERFECT, SOMETHING, SIZES))
    for text in ("", SILENT, PERFECT, MISS):
        for example in (SOMETHING, NOTHING):
            terms = reward_terms(text, example, SIZES)
            assert set(terms) == names
            assert all(math.isfinite(v) and 0 <= v <= 1 for v in terms.values())


def test_the_group_pushes_towards_silence_where_nothing_is_and_away_where_something_is():
    import torch

    texts = [SILENT, PERFECT, MISS, MISS]
    rewards = [[reward(text, example) for text in texts] for example in (SOMETHING, NOTHING)]
    advantages = group_advantages(torch.tensor(rewards))
    something, nothing = advantages.tolist()
    assert something[0] == min(something) < 0 < something[1]
    assert nothing[0] == max(nothing) > 0 > nothing[1]


def test_supervised_training_imitates_silence_where_nothing_is():
    silent = replace(NOTHING, think="It is not there.")
    assert target_text(silent, SIZES, True) == f"<think>It is not there.</think>{SILENCE}"
    assert target_text(silent, SIZES, False) == SILENCE
    assert target_text(SOMETHING, SIZES, True) == PERFECT


# ---------------------------------------------------------------- what is counted


def scores(texts: list[str], example: Example) -> dict:
    p = metrics.prediction(example, 0, texts, SIZES, MAY_BE_SILENT)
    return metrics.scores(p, metrics.metrics_of([p]))


@pytest.mark.parametrize(
    "text, right, wrong",
    [(SILENT, 1.0, 1.0), (PERFECT, 0.0, 0.0)],
    ids=["always silent", "always sure"],
)
def test_models_that_always_do_the_same(text, right, wrong):
    on_nothing = scores([text, text], NOTHING)
    on_something = scores([text, text], SOMETHING)
    assert on_nothing["silent_right"] == right
    assert on_something["silent_wrong"] == wrong
    assert on_nothing["silent_wrong"] is on_something["silent_right"] is None


def test_a_model_that_knows():
    on_nothing = scores([SILENT], NOTHING)
    on_something = scores([PERFECT], SOMETHING)
    assert on_nothing["silent_right"] == 1
    assert on_something["silent_wrong"] == 0
    assert on_something["iou"] == 1
    assert on_nothing["iou"] is on_nothing["pdice"] is on_nothing["iou50"] is None
    assert on_nothing["parse_ok"] == 1  # silence is a well-formed answer


def test_half_of_the_completions():
    assert scores([SILENT, PERFECT], NOTHING)["silent_right"] == 0.5
    assert scores([SILENT, PERFECT], SOMETHING)["iou"] == 0.5


# ---------------------------------------------------------------- scripts


def test_infer_says_that_nothing_is_here(ask: Asker):  # noqa: F811
    got = ask([SILENT], "--prompt nothing")
    assert got.status == 0
    assert "nothing here" in got.out
    assert got.result["problem"] == ""
    assert not (ask.out / "mask.png").exists()
    pointed = ask([completion(BOX)], "--prompt nothing")
    assert pointed.status == 0
    assert pointed.result["bbox"] is not None


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed")
    run("-m extras.false_premise --mix --limit 24 --share 0.4 --out", out)
    return out


def test_training_and_evaluation_run_on_a_mix(mixed, tmp_path):
    warm = ["train_sft.py --prompt nothing --steps 2 --batch 4 --eval-every -1 --lr 1e-4"]
    run(*warm, "--crm demo/crm --data", mixed, "--out", tmp_path / "warm")
    checkpoint = tmp_path / "warm/step_000002"
    assert '\\"bbox\\": null' in (checkpoint / "settings.json").read_text()
    out, _ = run(
        "train_grpo.py --steps 1 --prompts 4 --group 2 --minibatches 1 --max-new-tokens 24",
        "--eval-limit 8 --lr 1e-5 --crm",
        checkpoint,
        "--data",
        mixed,
        "--out",
        tmp_path / "grpo",
    )
    assert "silent_right" in out
    held_out = read_jsonl(tmp_path / "grpo/held_out.jsonl")
    assert {"silent_right", "silent_wrong"} <= held_out[0].keys()
    run(
        "evaluate.py --max-new-tokens 24 --crm",
        tmp_path / "grpo/step_000001",
        "--data",
        mixed,
        "--out",
        tmp_path / "eval",
    )
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    wordings = summary["wording"]
    assert wordings["absent category"]["silent_right"] is not None
    assert wordings["absent category"]["iou"] is None
    assert any(wordings[name]["iou"] is not None for name in ("seen", "unseen"))


def test_the_mark_is_read_from_extra_info(mixed):
    assert asks_for_nothing(NOTHING)
    assert not asks_for_nothing(SOMETHING)
