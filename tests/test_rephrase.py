"""paper/rephrase.py: wordings, measures by hand, and controls that show up a model which ignores
its question."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Script, noise_image

from data import Example, load_samples
from paper.rephrase import (
    ALL,
    ASKED,
    FIXED,
    GREY,
    OTHER,
    SAMPLED,
    VARIANTS,
    Job,
    Jobs,
    measures,
    other_questions,
    paraphrases,
    summarise,
    table,
    unusable,
    wordings,
)
from runtime.files import read_jsonl

QUERY = "Please mark the large bright organ on the left with the lump, seen in this patient."
# IoU 1, 1/2, 0
TRUTH = (0, 0, 10, 10)
HALF = (0, 0, 5, 10)  # IoU 1/2 with the truth
AWAY = (50, 50, 60, 60)  # IoU 0
Box = tuple[int, int, int, int]


def run(*command: str | Path, check: int = 0) -> tuple[str, str]:
    """What a command prints to stdout and to stderr. Its exit status must be `check`."""
    script = Script(*command)
    out, error = script.communicate()
    assert script.returncode == check, (command, script.returncode, out[-2000:], error[-2000:])
    return out, error


# ---------------------------------------------------------------- wordings


@pytest.mark.parametrize(
    "kind, says",
    [
        (
            "lower case",
            "please mark the large bright organ on the left with the lump seen in this patient",
        ),
        ("shorthand", "pls mark the large bright organ on L w/ the lump, seen in this pt."),
        (
            "synonyms",
            "Please indicate the sizeable light body part on the left with the mass, seen in this "
            "patient.",
        ),
        ("telegraphic", "mark large bright organ left lump, seen patient."),
    ],
)
def test_wordings_by_hand(kind, says):
    assert VARIANTS[kind](QUERY, random.Random(0)) == says


def test_wordings_are_seeded_and_keep_the_question():
    first = wordings(QUERY, "q1", 0)
    assert set(first) == set(VARIANTS)
    assert first == wordings(QUERY, "q1", 0)
    assert any(first[kind] != wordings(QUERY, "q1", 1)[kind] for kind in first)
    assert first["history"].endswith(QUERY)
    assert QUERY[1:] in first["frame"]
    for seed in range(50):
        typed = wordings(QUERY, "q1", seed)["typos"]
        assert typed != QUERY
        assert abs(len(typed) - len(QUERY)) <= 2
        assert 1 <= sum(a != b for a, b in zip(typed.split(), QUERY.split())) <= 2


@pytest.mark.parametrize(
    "query", ["?", "Is it?", "это что", "the", "a" * 300, "Where?!", "…  two  spaces"]
)
def test_odd_questions_have_wordings_too(query):
    assert all(text.strip() and text != query for text in wordings(query, "q", 0).values())
    assert "typos" not in wordings("Is it?", "q", 0)
    assert "shorthand" not in wordings("Is it?", "q", 0)


def test_no_wording_of_the_embedded_questions_names_what_they_do_not_name():
    for row in load_samples("demo/data", "test").rows[::7]:
        query = row["query"].lower()
        for text in wordings(row["query"], row["id"], 0).values():
            named = [name for name in row["extra"]["names"] if name.lower() in text.lower()]
            assert all(name.lower() in query for name in named), (text, named)


def rows_of(*pairs: tuple[str, str]) -> list[dict]:
    """Rows of some questions and categories."""
    rows = []
    for i, (query, category) in enumerate(pairs):
        rows.append({"query": query, "category": category, "where": f"row {i}"})
    return rows


def test_another_question_is_of_another_category_where_there_is_one():
    chosen = other_questions(rows_of(("a", "x"), ("b", "x"), ("c", "y")), seed=0)
    assert chosen[:2] == ["c", "c"]
    assert chosen[2] in "ab"
    assert other_questions(rows_of(("a", "x"), ("b", "x")), seed=0) == ["b", "a"]


def test_questions_that_are_all_the_same_have_no_other_one():
    with pytest.raises(ValueError, match="row 0: all 2 questions are the same"):
        other_questions(rows_of(("a", "x"), ("a", "y")), seed=0)


# ---------------------------------------------------------------- paraphrases


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "JSON"),
        ("", "JSON"),
        ("<answer>", "JSON"),
        ("x" * 401, "JSON"),
        ("Where is it on the right?", "left"),
        ("Where is the spleen on the left?", "spleen"),
        ("What is on the left?", "Use other words"),
        ("What lies to the left?", ""),
    ],
)
def test_paraphrases_that_cannot_be_used(text, says):
    found = unusable(text, "What is on the left?", ["spleen"])
    assert says in found
    assert bool(found) == bool(says)


class Endpoint:
    """A language model that gives some replies, one after the other."""

    def __init__(self, *replies: object):
        self.replies = iter(replies)
        self.lengths: list[int] = []  # messages of each request

    def ask(self, messages: list[dict]) -> object:
        self.lengths.append(len(messages))
        return next(self.replies)


def test_a_language_model_is_asked_again_and_given_up_on():
    points = ((1, 1), (2, 2))
    extra = {"names": ["hepar", 5]}
    example = Example("q", None, "Which organ?", TRUTH, points, category="liver", extra=extra)
    first = [{"question": "The liver?"}, None, {"question": " Which part? "}]
    second = [{}, [], {"question": "Hepar?"}]
    chat = Endpoint(*first, *second)
    assert paraphrases(chat, example, count=2, tries=3) == {"paraphrase 1": "Which part?"}
    assert chat.lengths == [1, 3, 5] * 2


# ---------------------------------------------------------------- measures


def said(bbox: Box | None) -> dict:
    return {"query": "?", "bbox": bbox, "problem": "" if bbox else "no answer block"}


def test_measures_by_hand():
    found = measures(TRUTH, said(TRUTH), [said(HALF), said(AWAY), said(None)])
    assert found == pytest.approx(
        {
            "iou": 0.5 / 3,
            "worst": 0,
            "drop": 1 - 0.5 / 3,
            "hard_pass": 0,
            "as_before": 0.5 / 3,
            "consistency": 0.5 / 6,
            "flips": 2 / 3,
            "refused": 1 / 3,
        }
    )
    assert measures(TRUTH, said(HALF), [said(TRUTH)]) == pytest.approx(
        {
            "iou": 1,
            "worst": 0.5,
            "drop": -0.5,
            "hard_pass": 1,
            "as_before": 0.5,
            "consistency": 0.5,
            "flips": 0,
            "refused": 0,
        }
    )
    alone = measures(TRUTH, said(HALF), [])
    assert alone["iou"] == alone["worst"] == 0.5
    assert alone["drop"] is alone["consistency"] is None
    # two refusals do not agree
    assert measures(TRUTH, said(None), [said(None)])["consistency"] == 0


def answered(model: Callable[[Box], Box], count: int = 20) -> list[dict]:
    """Rows of a model, which is a function from what the question means to a box. Another row's
    question means that row's truth."""
    rows = []
    for i in range(count):
        truth = (10 * i, 0, 10 * i + 10, 10)
        other = (10 * i + 10, 0, 10 * i + 20, 10)
        meant = {ASKED: truth, "typos": truth, "frame": truth, OTHER: other, GREY: truth}
        row = {
            "id": str(i),
            "image": f"image {i}",
            "supercategory": "",
            "truth": truth,
            "resampled": [said(model(truth))] * 2,
            "said": {kind: said(model(box)) for kind, box in meant.items()},
        }
        rows.append(row)
    return rows


def test_a_model_that_ignores_its_question_is_consistent_and_the_controls_show_it_up():
    summary = summarise(answered(lambda meant: (0, 0, 200, 10)))
    for kind in (ALL, OTHER, GREY, SAMPLED):
        found = summary["kinds"][kind]
        assert found["consistency"]["mean"] == 1
        assert found["as_before"]["mean"] == 1
        assert found["flips"]["mean"] == 0
    for key in ("mean", "low", "high"):
        assert summary["beyond"][key] == 0
    assert "Not shown that it listens" in table(summary)


def test_a_model_that_listens_changes_its_answer_with_the_question_alone():
    summary = summarise(answered(lambda meant: meant))
    assert summary["kinds"][ALL]["consistency"]["mean"] == 1
    assert summary["kinds"][OTHER]["consistency"]["mean"] == 0
    assert summary["kinds"][ALL]["hard_pass"]["mean"] == 1
    assert summary["kinds"][OTHER]["drop"]["mean"] == 1
    assert summary["beyond"]["mean"] == 1
    assert "It listens to the question" in table(summary)


def test_questions_about_one_image_are_no_independent_evidence():
    rows = answered(lambda meant: meant)
    for row in rows:
        row["image"] = "the only one"
    found = summarise(rows)["kinds"][ALL]["iou"]
    assert found["n"] == 20
    assert found["images"] == 1
    assert "100.0 [–]" in table(summarise(rows))


def test_a_wording_that_only_some_questions_have_is_counted_over_these():
    data = answered(lambda meant: meant, 4)
    del data[0]["said"]["typos"], data[1]["said"]["typos"], data[1]["said"]["frame"]
    summary = summarise(data)
    assert summary["kinds"]["typos"]["iou"]["n"] == 2
    assert summary["kinds"][ALL]["iou"]["n"] == 3
    text = table(summary)
    assert "| typos | 2 | 100.0 [" in text
    assert "shorthand" not in text
    assert text.index("frame") < text.index("*controls*") < text.index(OTHER) < text.index(SAMPLED)


def test_jobs_exchange_the_question_and_make_the_image_grey():
    example = Example("q", noise_image(30, 20), "?", TRUTH, ((1, 1), (2, 2)))
    jobs = Jobs([example], [Job(0, OTHER, "why?"), Job(0, GREY, "?")])
    assert len(jobs) == 2
    assert jobs[0].query == "why?"
    assert jobs[0].image is example.image
    assert jobs[0].bbox == TRUTH
    assert jobs[1].image.size == (30, 20)
    assert jobs[1].image.getcolors() == [(600, (128, 128, 128))]


# ---------------------------------------------------------------- the command


def test_the_embedded_model_is_asked_in_other_words(tmp_path):
    flags = "-m paper.rephrase --limit 3 --max-new-tokens 110 --out"
    out, _ = run(flags, tmp_path / "w")
    data = read_jsonl(tmp_path / "w/answers.jsonl")
    summary = json.loads((tmp_path / "w/summary.json").read_text())
    assert summary["n"] == len(data) == 3
    assert (tmp_path / "w/table.md").read_text().rstrip() in out
    for row in data:
        assert set(FIXED) < set(row["said"])
        assert row["said"][ASKED]["query"] == row["said"][GREY]["query"]
        assert len(row["resampled"]) == len(row["said"]) - 3 > 3
    run(flags, tmp_path / "again")
    assert read_jsonl(tmp_path / "again/answers.jsonl") == data


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--limit 1", "all 1 questions are the same"),
        ("--data nowhere", "nowhere: no such file or folder"),
        ("--split none", "in split 'none'"),
        ("--base-url http://localhost:1", "--base-url needs --model"),
        ("--crm nowhere", "nowhere"),
        ("--temperature -1", "--temperature"),
        ("--prompt nowhere", "--prompt nowhere"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_nothing_is_written(tmp_path, flags, says):
    _, error = run("-m paper.rephrase --limit 2", flags, "--out", tmp_path / "w", check=2)
    assert error.startswith("error:")
    assert error.count("\n") == 1
    assert says in error
    assert not (tmp_path / "w").exists()
