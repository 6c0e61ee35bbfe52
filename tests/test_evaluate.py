"""evaluate.py: numbers by hand, intervals that cover, answers from elsewhere, interruptions."""
import json
import time

import numpy as np
import pytest

import evaluate
from data import Frame, load_samples, model_size, to_model
from test_scripts import ROOT, rows, run


def line(i, bboxes, truth=(0, 0, 10, 10), points=None, dice=None, **more):
    answers = [{"text": "", "bbox": b, "points": points if b else None, "problem": "" if b else "no answer block"}
               for b in bboxes]
    kept = next((k for k, b in enumerate(bboxes) if b), None)
    return {"id": str(i), "index": i, "size": [100, 100], "supercategory": "A", "category": "a", "wording": None,
            "query": "?", "truth": {"bbox": list(truth), "points": [[2, 2], [8, 8]]}, "answers": answers,
            "kept": kept, "dice": dice} | more


def save(folder, lines):
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def test_tables_of_a_hand_made_file_equal_numbers_by_hand(tmp_path):
    dice = {"points": 0.5, "box": 0.25, "one": 0.75, "both": 1.0}
    folder = save(tmp_path / "e", [
        line(0, [[0, 0, 10, 10]], points=[[2, 2], [8, 8]], dice=dice),          # IoU 1, pDice 1
        line(1, [[0, 0, 5, 10]], supercategory="B", category="b", dice=None),   # IoU 0.5
        line(2, [[20, 20, 30, 30]], supercategory="B", category="b", dice=dict.fromkeys(dice, 0.0)),    # IoU 0
        line(3, [None], dice=dict.fromkeys(dice, 0.0))])                        # a refusal
    out, _ = run("evaluate.py --rescore", folder)
    summary = json.loads((folder / "summary.json").read_text())
    mean = {key: value["mean"] for key, value in summary["all"].items() if key != "n"}
    assert mean == pytest.approx({
        "iou": 0.375, "iou50": 0.5, "pdice": 0.25, "pdice_2iu": 0.5, "refused": 0.25,
        "dice_points": 0.5 / 3, "dice_box": 0.25 / 3, "dice_one": 0.25, "dice_both": 1 / 3}, abs=1e-6)
    assert summary["all"]["n"] == 4 and summary["all"]["dice_box"]["n"] == 3
    assert summary["supercategory"]["B"]["iou"]["mean"] == 0.25 and summary["category"]["a"]["n"] == 2
    assert summary["refusals"] == {"no answer block": 1}
    text = (folder / "table.md").read_text()
    assert "| all | 4 | 37.5 [" in text and "1 × no answer block" in text and "| B | 2 | 25.0 [0.0, 50.0]" in text
    assert "| all | 4 |" in out


def test_several_answers_are_averaged_voted_and_passed_at_n():
    row = line(0, [[0, 0, 5, 10], None, [0, 0, 5, 10], [0, 0, 10, 10]])
    score = evaluate.scores(row)
    assert score["iou"] == (0.5 + 0 + 0.5 + 1) / 4 and score["refused"] == 0.25 and score["iou50"] == 0.75
    assert score["voted"] == 0.5 and score["best"] == 1 and score["pass"] == 1
    assert evaluate.summarise([row])["all"]["pass"]["mean"] == 1
    assert "pass" not in evaluate.summarise([line(0, [[0, 0, 5, 10]])])["all"]


def test_intervals_cover_at_the_nominal_rate():
    rng, hits = np.random.default_rng(0), 0
    for trial in range(400):
        values = rng.beta(0.5, 0.8, 80)                                 # as IoU: bounded, piled up at both ends
        found = evaluate.interval(values, draws=500, seed=trial)
        hits += found["low"] <= 0.5 / 1.3 <= found["high"]
    assert 365 <= hits <= 393                                           # 95 % of 400, three standard deviations
    assert evaluate.interval([None, None]) is None


def test_compare_pairs_the_questions_and_names_those_in_only_one(tmp_path):
    a = save(tmp_path / "a", [line(i, [[0, 0, 5, 10]]) for i in range(30)])
    b = save(tmp_path / "b", [line(i, [[0, 0, 10, 10]]) for i in reversed(range(30))])
    out, _ = run("evaluate.py --compare", a, b)
    assert "IoU              50.0 -> 100.0   +50.0 [+50.0, +50.0]" in out
    c = save(tmp_path / "c", [line(i, [[0, 0, 5, 10]]) for i in range(29)])
    _, error = run("evaluate.py --compare", a, c, check=2)
    assert "1 questions are in only one, first 29" in error
    _, error = run("evaluate.py --rescore", tmp_path / "nothing", check=2)
    assert "no predictions.jsonl" in error


def test_2500_predictions_score_in_20_seconds_without_a_model(tmp_path):
    lines = [line(i, [[0, 0, 5 + i % 5, 10]], supercategory=f"S{i % 15}", category=f"c{i % 108}",
                  dice={"points": 0.1, "box": 0.2, "one": 0.2, "both": 0.3}) for i in range(2500)]
    folder, start = save(tmp_path / "e", lines), time.perf_counter()
    evaluate.report(evaluate.read_predictions(folder), folder)
    assert time.perf_counter() - start < 20


# ---------------------------------------------------------------- answers made elsewhere


@pytest.fixture(scope="module")
def tests():
    return load_samples("demo/data", "test")[:6]


def answers(tests, frame):
    """Perfect ones, in a frame."""
    for sample in tests:
        size = sample.image.size
        target = {"pixels": size, "norm1000": (1000, 1000), "model": model_size(size)}[frame]
        there = Frame(size, target)
        yield {"id": sample.id, "bbox": to_model(sample.bbox, there), "points": to_model(sample.points, there)}


def predicted(tmp_path, lines, flags, check=0, name="p"):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return run("evaluate.py --limit 6 --asm none --predictions", file, "--out", tmp_path / name, flags, check=check)


@pytest.mark.parametrize("frame", ["pixels", "norm1000", "model"])
def test_perfect_answers_are_perfect_in_the_frame_they_were_written_in(tmp_path, tests, frame):
    predicted(tmp_path, answers(tests, frame), f"--frame {frame}")
    for row in rows(tmp_path / "p/predictions.jsonl"):
        score = evaluate.scores(row)
        assert score["iou"] == pytest.approx(1, abs=1e-6) and score["pdice"] == pytest.approx(1, abs=1e-6)


def test_missing_answers_are_refusals_that_are_counted_and_said(tmp_path, tests):
    out, _ = predicted(tmp_path, list(answers(tests, "pixels"))[:4], "")
    summary = json.loads((tmp_path / "p/summary.json").read_text())
    assert "2 of 6 questions have no prediction" in out and summary["refusals"] == {"no prediction": 2}
    assert summary["all"]["iou"]["mean"] == pytest.approx(4 / 6)


@pytest.mark.parametrize("spoil, flags, says", [
    (lambda a: a + [dict(a[0], id="nobody")], "", "1 of 7 ids are not in --data"),
    (lambda a: a + [a[2]], "", "line 7: id"),
    (lambda a: a, "--frame model --resize square:56", "--frame model is wrong"),
    (lambda a: [{"bbox": [1, 2, 3, 4]}], "", "line 1: an object with id"),
    (lambda a: [{"id": a[0]["id"]}], "", "line 1: an object with id"),
], ids=["unknown", "repeated", "frame", "no id", "no answer"])
def test_answers_that_cannot_be_meant_are_refused_with_one_line_and_nothing_written(
        tmp_path, tests, spoil, flags, says):
    _, error = predicted(tmp_path, spoil(list(answers(tests, "pixels"))), flags, check=2)
    assert says in error and error.count("\n") == 1 and not (tmp_path / "p").exists()


# ---------------------------------------------------------------- a model's answers


def test_an_interrupted_evaluation_goes_on_and_gives_what_an_uninterrupted_one_gives(tmp_path):
    flags = "--limit 6 --batch 2 --samples 2 --max-new-tokens 110 --out"
    out, _ = run("evaluate.py", flags, tmp_path / "whole")
    whole = (tmp_path / "whole/predictions.jsonl").read_text()
    assert "| all | 6 |" in out and (tmp_path / "whole/examples.png").stat().st_size > 10_000
    cut = tmp_path / "cut"
    cut.mkdir()
    config = json.loads((tmp_path / "whole/config.json").read_text()) | {"out": str(cut)}
    (cut / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (cut / "part-0.jsonl").write_text(whole[:whole.index("\n", whole.index("\n") + 1) + 40])    # two lines, a torn one
    run("evaluate.py", flags, cut)
    assert (cut / "predictions.jsonl").read_text() == whole and not list(cut.glob("part-*"))
    _, error = run("evaluate.py --seed 1", flags, cut, check=2)
    assert "other flags" in error
    run("-m torch.distributed.run --nproc-per-node 2 evaluate.py", flags, tmp_path / "two")
    assert (tmp_path / "two/predictions.jsonl").read_text() == whole
    assert all(0 <= v <= 1 for row in rows(tmp_path / "whole/predictions.jsonl") for v in row["dice"].values())


def test_masks_of_perfect_answers_are_good_and_need_both_or_either():
    sample = load_samples("demo/data", "test")[0]
    asm = evaluate.load_asm(str(ROOT / "demo/asm"), "cpu")
    perfect = {"text": "", "bbox": list(sample.bbox), "points": [list(p) for p in sample.points], "problem": ""}
    found = evaluate.prediction(sample, 0, [perfect], asm)["dice"]
    assert set(found) == {"points", "box", "one", "both"} and found["both"] > 0.6
    boxless = evaluate.prediction(sample, 0, [perfect | {"bbox": None}], asm)["dice"]
    assert boxless["box"] == 0 and boxless["points"] == found["points"] == boxless["both"]
