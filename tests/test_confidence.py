"""extras/confidence.py: signals by hand, the fit, infer.py --abstain, and the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_infer import BOX, Asker, ask, completion  # noqa: F401  (ask is a fixture)
from test_scripts import run

import metrics
from crm import load_crm
from data import EMBEDDED, load_samples
from extras.confidence import (
    NO_ANSWER,
    SIGNALS,
    Fit,
    agreement,
    bounds,
    fit_all,
    fit_logistic,
    is_number_token,
    judged,
    kept_iou,
    number_logp,
    read_fit,
    score_confidence,
    vote,
)
from extras.selective import aurc
from runtime.cli import ROOT
from runtime.files import read_jsonl
from sampling import sample

A = (0.0, 0.0, 10.0, 10.0)
B = (0.0, 0.0, 10.0, 5.0)  # IoU 0.5 with A
FAR = (50.0, 50.0, 60.0, 60.0)


# ---------------------------------------------------------------- the signals


def test_agreement_is_the_mean_iou_of_each_two_boxes():
    assert agreement([A, A, A]) == 1
    assert agreement([A, B]) == 0.5
    assert agreement([A, B, FAR]) == pytest.approx(0.5 / 3)
    assert agreement([A, None]) == 0  # without a box it agrees with none
    assert agreement([None, None]) == 0
    assert agreement([A]) is None


def test_the_vote_of_masks_by_hand():
    masks = np.zeros((3, 4, 4), bool)
    masks[0, 0] = masks[1, 0] = masks[2, 3] = True
    # 12 pixels of masks; 8 of them are covered by one of the two others, 4 by none
    assert vote(masks) == pytest.approx(8 / (12 * 2))
    assert vote(masks[:2]) == 1
    assert vote(masks[1:]) == 0
    assert vote(np.zeros((3, 4, 4), bool)) == 0
    assert vote(masks[:1]) is None


def test_only_digits_of_the_answers_coordinates_count():
    pieces = ["<think>", "T1", "</think>", "<answer>", '{"bbox', '": [', "1", "2", ", ", "3"]
    pieces += ["], ", '"points', "_", "1", '": [', "4", "]}", "</answer>"]
    numbers = [piece for piece, counts in zip(pieces, is_number_token(pieces)) if counts]
    assert numbers == ["1", "2", "3", "4"]
    whole_key = ["<answer>", '{"points_2": [', "7", "]}"]
    assert is_number_token(whole_key) == [False, False, True, False]


@pytest.fixture(scope="module")
def embedded():
    return load_crm(EMBEDDED["crm"])


def test_the_log_probability_of_numbers_is_that_of_the_sampler(embedded):
    example = load_samples(EMBEDDED["data"], "test")[0]
    prompt = embedded.prompt_of(example)
    (group,) = sample(embedded, [prompt], 4, max_new_tokens=96, seed=0)
    compared = 0
    for row, text in enumerate(group.texts):
        length = int(group.lengths[row])
        pieces = [embedded.tokenizer.decode([t]) for t in group.tokens[row, :length].tolist()]
        chosen = torch.tensor(is_number_token(pieces))
        if not chosen.any():
            assert number_logp(embedded, prompt, text) is None
            continue
        wanted = group.logp[row, :length][chosen].mean()
        assert number_logp(embedded, prompt, text) == pytest.approx(float(wanted), abs=2e-3)
        compared += 1
    assert compared >= 2


def test_a_text_without_numbers_has_no_log_probability(embedded):
    example = load_samples(EMBEDDED["data"], "test")[0]
    prompt = embedded.prompt_of(example)
    assert number_logp(embedded, prompt, "<think>12</think>no answer") is None


# ---------------------------------------------------------------- the fit


def signals(value: float) -> dict[str, float]:
    return {"agreement": value, "vote": value, "logp": -1.0, "mask_score": 0.5}


def test_a_fit_is_calibrated_and_rises_with_a_signal_that_knows():
    rng = np.random.default_rng(0)
    values = rng.uniform(size=2000)
    hits = rng.uniform(size=2000) < values  # the signal is the probability of a hit
    fit = fit_logistic([signals(v) for v in values], hits, ["agreement"])
    assert fit.confidence(signals(0.9)) > 0.8
    assert fit.confidence(signals(0.5)) == pytest.approx(0.5, abs=0.05)
    assert fit.confidence(signals(0.1)) < 0.2
    assert fit.confidence({}) == NO_ANSWER
    mean = np.mean([fit.confidence(signals(v)) for v in values])
    assert mean == pytest.approx(hits.mean(), abs=0.01)


@pytest.mark.parametrize("outcome", [True, False])
def test_a_fit_to_equal_outcomes_stays_finite(outcome):
    fit = fit_logistic([signals(v) for v in (0.1, 0.5, 0.9)], [outcome] * 3, list(SIGNALS))
    value = fit.confidence(signals(0.5))
    assert 0 < value < 1
    assert (value > 0.5) is outcome
    assert np.isfinite(fit.weight).all()


def test_a_missing_signal_counts_as_its_mean():
    rows = [signals(0.2), signals(0.8) | {"logp": None}]
    fit = fit_logistic(rows, [False, True], list(SIGNALS))
    parts = fit.parts(signals(0.8) | {"logp": None})
    assert parts["logp"] == 0
    assert parts["agreement"] > 0


def test_nothing_to_fit_is_one_line():
    with pytest.raises(ValueError, match="no question of --fit has an answer"):
        fit_logistic([], [], ["agreement"])


# ---------------------------------------------------------------- models that are known


def prediction(i: int, iou: float | None, kind: str | None = None, value: float = 0.5) -> dict:
    """Returns a prediction whose kept box has this IoU; None: no answer. value: its signals."""
    truth = [0, 0, 10, 10]
    box = None if iou is None else [0, 0, 10, 10 * iou] if iou else [50, 50, 60, 60]
    return {
        "id": str(i),
        "image": f"image {i}",
        "wording": kind,
        "asked": ["bbox", "points"],
        "truth": {"bbox": truth, "points": None},
        "completions": [{"text": "", "bbox": box, "points": None, "problem": ""}],
        "kept": None if iou is None else 0,
        "signals": {} if iou is None else signals(value),
    }


IOUS = [0.9, 0.1, 0.6, 0.0, 0.4, 0.8]
ANSWERABLE = [prediction(i, iou) for i, iou in enumerate(IOUS)]
ABSENT = [prediction(100 + i, 0.7, kind="absent category") for i in range(6)]


def test_an_answer_to_a_question_without_one_is_no_hit():
    assert [kept_iou(p) for p in ANSWERABLE] == pytest.approx(IOUS)
    assert [kept_iou(p) for p in ABSENT] == [0] * 6
    assert kept_iou(prediction(0, None)) == 0


def test_a_model_that_is_always_sure_has_only_false_alarms():
    sure = np.full(6, 0.9)
    found = score_confidence(sure, ANSWERABLE, 0.5, sure, ABSENT)
    assert found["aurc"].mean == pytest.approx(1 - np.mean(IOUS))
    assert found["answered"].mean == 1
    assert found["iou_answered"].mean == pytest.approx(np.mean(IOUS))
    assert found["ece"].mean == pytest.approx(0.9 - 3 / 6)
    assert found["refused"].mean == 0
    assert found["alarms_50"].mean == found["alarms_80"].mean == 1
    of_two = score_confidence(sure, ANSWERABLE, 0.5, sure[:2], ABSENT[:2])
    assert of_two["alarms_50"].images == 2  # too few for an interval, see selective.shown


def test_a_model_that_is_always_silent_refuses_everything():
    silent = np.full(6, NO_ANSWER)
    rows = [prediction(i, None) for i in range(6)]
    found = score_confidence(silent, rows, 0.0, silent, ABSENT)
    assert found["aurc"].mean == 1
    assert found["coverage_at_50"].mean == 0
    assert found["answered"].mean == 0
    assert found["iou_answered"] is None
    assert found["ece"] is None
    assert found["refused"].mean == 1
    assert found["alarms_50"] is None


def test_a_model_that_knows_refuses_what_is_not_there_and_nothing_else():
    knows = np.array(IOUS) + 0.05
    found = score_confidence(knows, ANSWERABLE, 0.04, np.full(6, 0.01), ABSENT)
    assert found["answered"].mean == 1
    assert found["refused"].mean == 1
    assert found["alarms_50"].mean == found["alarms_80"].mean == 0
    # means from the surest on: 0.9, 0.85, 0.767, 0.675, 0.56, 0.467
    assert found["coverage_at_50"].mean == pytest.approx(5 / 6)


def test_the_bounds_of_any_confidence():
    found = bounds([*ANSWERABLE, prediction(9, None)])
    iou = np.array([*IOUS, 0])
    answered_first = np.array([1] * 6 + [-1])
    assert found["(none)"]["aurc"].mean == pytest.approx(aurc(answered_first, iou))
    assert found["(none)"]["coverage_at_50"].mean == 0  # the mean of the answered is 0.467
    assert found["(perfect)"]["aurc"].mean == pytest.approx(aurc(iou, iou))
    assert found["(perfect)"]["coverage_at_50"].mean == pytest.approx(5 / 7)


def test_each_signal_and_all_together_are_fitted_on_what_was_answered():
    rows = [prediction(i, iou, value=iou) for i, iou in enumerate(IOUS)] + [prediction(9, None)]
    fits = fit_all(rows)
    assert list(fits) == [*SIGNALS, "all"]
    assert fits["all"].names == tuple(SIGNALS)
    confidence = judged(fits["agreement"], rows)
    assert confidence[-1] == NO_ANSWER
    assert np.argsort(confidence[:-1]).tolist() == np.argsort(IOUS).tolist()


def test_the_tables_of_evaluate_show_agreement_and_confidence():
    p = {"agreement": 0.25, "confidence": 0.75}
    assert metrics.METRICS["agreement"][1](p) == 0.25
    assert metrics.METRICS["confidence"][1](p) == 0.75
    assert metrics.METRICS["confidence"][1]({}) is None


# ---------------------------------------------------------------- infer.py --abstain


def test_infer_gives_an_answer_that_it_is_sure_of(ask: Asker):  # noqa: F811
    got = ask([completion(BOX)] * 4, "--abstain 0.5")
    assert got.status == 0
    assert got.result["opinion"]["confidence"] == 1
    assert got.result["opinion"]["sure"]
    assert got.result["bbox"] is not None
    assert (ask.out / "mask.png").is_file()
    assert not (ask.out / "unsure").exists()


def test_infer_says_that_it_is_not_sure_and_keeps_the_mask_apart(ask: Asker):  # noqa: F811
    ask([completion(BOX)] * 2)  # an earlier answer, whose pictures must not stay
    texts = [completion(BOX), completion((60, 60, 100, 100)), completion((12, 10, 50, 50))]
    got = ask(texts, "--abstain 0.5")
    assert got.status == 0
    assert "not sure: the completions point to different places" in got.out
    assert got.err == ""
    assert got.result["said"].startswith("not sure: ")
    assert "bbox" not in got.result
    assert got.result["unsure"]["bbox"] is not None
    assert not (ask.out / "mask.png").exists()
    assert not (ask.out / "overlay.png").exists()
    assert np.asarray(Image.open(ask.out / "unsure/mask.png")).any()
    sure = ask(texts, "--abstain 0")
    assert sure.result["bbox"] is not None
    assert not (ask.out / "unsure/mask.png").exists()


def test_infer_without_a_usable_completion_is_as_before(ask: Asker):  # noqa: F811
    got = ask(["nothing", "at all"], "--abstain 0.5")
    assert got.status == 3
    assert "no usable completion" in got.err


def test_abstain_and_zoom_exclude_each_other(ask: Asker):  # noqa: F811
    line = ask.rejected([completion(BOX)] * 2, "--abstain 0.5 --zoom 2")
    assert "--abstain and --zoom" in line


def test_a_fit_is_read_from_the_checkpoint_and_a_wrong_one_is_one_line(tmp_path: Path):
    assert read_fit(tmp_path) is None
    fit = Fit(("agreement",), (0.5,), (0.1,), (2.0,), 0.0)
    content = {"fits": {"all": vars(fit)}}
    (tmp_path / "confidence.json").write_text(json.dumps(content))
    assert read_fit(tmp_path).confidence({"agreement": 0.5}) == 0.5
    assert read_fit(tmp_path).confidence({"agreement": 0.7}) == pytest.approx(1 / (1 + np.exp(-4)))
    (tmp_path / "confidence.json").write_text('{"fits": {"all": {"bias": 1}}}')
    with pytest.raises(ValueError, match="confidence.json: fits.all is not what"):
        read_fit(tmp_path)


# ---------------------------------------------------------------- the command


def test_the_command_measures_and_goes_on_where_it_stopped(tmp_path: Path):
    absent = ROOT / "demo/absent"
    crm = tmp_path / "crm"
    shutil.copytree(EMBEDDED["crm"], crm)
    flags = ["-m extras.confidence --limit 5 --fit-limit 6 --completions 3 --max-new-tokens 96"]
    flags += ["--save --crm", crm, "--absent", absent, "--out", tmp_path / "sure"]
    out, _ = run(*flags)
    for name in (*SIGNALS, "all", "(none)", "(perfect)"):
        assert f"| {name} |" in out
    for title in ("AURC", "calibration error", "false alarms at coverage 0.8"):
        assert title in out
    folder = tmp_path / "sure"
    assert (folder / "curves.png").stat().st_size > 10_000
    fit = json.loads((folder / "confidence.json").read_text())
    assert fit["questions"] == 6
    rows = read_jsonl(folder / "test/predictions.jsonl")
    assert len(rows) == 5
    assert all(0 <= row["confidence"] <= 1 for row in rows)
    assert all(set(row["signals"]) == set(SIGNALS) for row in rows if row["kept"] is not None)
    assert any(row["signals"] for row in rows)
    assert "confidence" in (folder / "test/table.md").read_text()
    assert (crm / "confidence.json").read_text() == (folder / "confidence.json").read_text()
    again, _ = run(*flags)  # nothing is asked again, although the checkpoint has a new file
    assert again.splitlines()[-8:] == out.splitlines()[-8:]
    rescored, _ = run("evaluate.py --rescore", folder / "test")
    assert "| agreement | confidence |" in rescored
    picture = ROOT / "demo/images/fundus.png"
    asked = ["infer.py --query Where? --abstain 1 --image", picture, "--crm", crm]
    said, _ = run(*asked, "--out", tmp_path / "out")
    assert "not sure" in said
    opinion = json.loads((tmp_path / "out/result.json").read_text())["opinion"]
    assert opinion["fitted"]
    assert 0 < opinion["confidence"] < 1


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--fit test", "--fit test: is also --split"),
        ("--asm none", "two of the signals are of masks"),
        ("--completions 1", "must be at least 2"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(tmp_path, flags, says):
    _, error = run(f"-m extras.confidence {flags} --out", tmp_path / "c", check=2)
    assert says in error
    assert not (tmp_path / "c").exists()
