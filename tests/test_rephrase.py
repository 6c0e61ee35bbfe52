"""paper/rephrase.py: wordings, measures by hand, the controls that show up a model which ignores
its question."""

import json
import random
from types import SimpleNamespace

import pytest
from conftest import noise_image
from test_scripts import rows, run

from data import Sample, load_samples
from paper.rephrase import (
    ALL,
    ASKED,
    FIXED,
    GREY,
    OTHER,
    SAMPLED,
    VARIANTS,
    Jobs,
    measures,
    paraphrases,
    strangers,
    summarise,
    table,
    unusable,
    wordings,
)

QUERY = "Please mark the large bright organ on the left with the lump, seen in this patient."
TRUTH, HALF, AWAY = (0, 0, 10, 10), (0, 0, 5, 10), (50, 50, 60, 60)  # IoU 1, 1/2, 0


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
            "Please indicate the sizeable light body part on the left with the mass, seen in this patient.",
        ),
        ("telegraphic", "mark large bright organ left lump, seen patient."),
    ],
)
def test_wordings_by_hand(kind, says):
    assert VARIANTS[kind](QUERY, random.Random(0)) == says


def test_wordings_are_seeded_and_keep_the_question():
    first = wordings(QUERY, "q1", 0)
    assert set(first) == set(VARIANTS) and first == wordings(QUERY, "q1", 0)
    assert any(first[kind] != wordings(QUERY, "q1", 1)[kind] for kind in first)
    assert first["history"].endswith(QUERY) and QUERY[1:] in first["frame"]
    for seed in range(50):
        typed = wordings(QUERY, "q1", seed)["typos"]
        assert typed != QUERY and abs(len(typed) - len(QUERY)) <= 2
        assert 1 <= sum(a != b for a, b in zip(typed.split(), QUERY.split())) <= 2


@pytest.mark.parametrize(
    "query", ["?", "Is it?", "это что", "the", "a" * 300, "Where?!", "…  two  spaces"]
)
def test_odd_questions_have_wordings_too(query):
    assert all(text.strip() and text != query for text in wordings(query, "q", 0).values())
    assert "typos" not in wordings("Is it?", "q", 0) and "shorthand" not in wordings(
        "Is it?", "q", 0
    )


def test_no_wording_of_the_embedded_questions_names_what_they_do_not_name():
    samples = load_samples("demo/data", "test")
    for sample in (samples[i] for i in range(0, 360, 7)):
        for text in wordings(sample.query, sample.id, 0).values():
            named = [name for name in sample.extra["names"] if name.lower() in text.lower()]
            assert all(name.lower() in sample.query.lower() for name in named), (text, named)


def test_another_question_is_of_another_category_where_there_is_one():
    def given(*pairs):
        return SimpleNamespace(
            rows=[
                {"query": query, "category": category, "where": f"row {i}"}
                for i, (query, category) in enumerate(pairs)
            ]
        )

    chosen = strangers(given(("a", "x"), ("b", "x"), ("c", "y")), 0)
    assert chosen[:2] == ["c", "c"] and chosen[2] in "ab"
    assert strangers(given(("a", "x"), ("b", "x")), 0) == ["b", "a"]
    with pytest.raises(ValueError, match="row 0: all 2 questions are the same"):
        strangers(given(("a", "x"), ("a", "y")), 0)


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
    assert says in found and bool(found) == bool(says)


def test_a_language_model_is_asked_again_and_given_up_on():
    class Endpoint:
        def __init__(self, replies):
            self.replies, self.asked = iter(replies), []

        def ask(self, messages):
            self.asked.append(len(messages))
            return next(self.replies)

    sample = Sample(
        "q",
        None,
        "Which organ?",
        TRUTH,
        ((1, 1), (2, 2)),
        category="liver",
        extra={"names": ["hepar", 5]},
    )
    chat = Endpoint(
        [
            {"question": "The liver?"},
            None,
            {"question": " Which part? "},
            {},
            [],
            {"question": "Hepar?"},
        ]
    )
    assert (
        paraphrases(chat, sample, 2, 3) == {"paraphrase 1": "Which part?"}
        and chat.asked == [1, 3, 5] * 2
    )


# ---------------------------------------------------------------- measures


def said(bbox, problem=""):
    return {"query": "?", "bbox": bbox, "problem": problem if bbox else "no answer block"}


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
            "iou_any": None,
            "iou_luck": None,
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
            "iou_any": None,
            "iou_luck": None,
        }
    )
    alone = measures(TRUTH, said(HALF), [])
    assert alone["iou"] == alone["worst"] == 0.5 and alone["drop"] is alone["consistency"] is None
    # two refusals do not agree
    assert measures(TRUTH, said(None), [said(None)])["consistency"] == 0


def test_what_else_a_question_may_mean_counts_with_its_luck():
    found = measures(TRUTH, said(TRUTH), [said(HALF), said(AWAY), said(None)], [AWAY, HALF])
    assert found["iou"] == pytest.approx(0.5 / 3)
    assert found["iou_any"] == pytest.approx(2 / 3) and found["iou_luck"] == pytest.approx(2 / 9)
    rows = [
        row | {"siblings": [(500, 0, 510, 10)]}
        for row in answered(lambda meant: (500, 0, 510, 10), 3)
    ]
    assert "| IoU, any sibling | IoU, by luck |" in table(summarise(rows))
    assert "sibling" not in table(summarise(answered(lambda meant: meant, 3)))


def answered(model, count=20):
    """Rows of a model, a function from what the question means to a box; another sample's question
    means its truth."""
    found = []
    for i in range(count):
        truth, other = (10 * i, 0, 10 * i + 10, 10), (10 * i + 10, 0, 10 * i + 20, 10)
        meant = {ASKED: truth, "typos": truth, "frame": truth, OTHER: other, GREY: truth}
        found.append(
            {
                "id": str(i),
                "supercategory": "",
                "truth": truth,
                "siblings": [],
                "resampled": [said(model(truth))] * 2,
                "said": {kind: said(model(where)) for kind, where in meant.items()},
            }
        )
    return found


def test_a_model_that_ignores_its_question_is_consistent_and_the_controls_show_it_up():
    deaf = summarise(answered(lambda meant: (0, 0, 200, 10)))
    for kind in (ALL, OTHER, GREY, SAMPLED):
        found = deaf["kinds"][kind]
        assert (
            found["consistency"]["mean"] == found["as_before"]["mean"] == 1
            and found["flips"]["mean"] == 0
        )
    assert deaf["beyond"]["mean"] == deaf["beyond"]["low"] == deaf["beyond"]["high"] == 0
    assert "Not shown that it listens" in table(deaf)
    listens = summarise(answered(lambda meant: meant))
    assert (
        listens["kinds"][ALL]["consistency"]["mean"] == 1
        and listens["kinds"][OTHER]["consistency"]["mean"] == 0
    )
    assert (
        listens["kinds"][ALL]["hard_pass"]["mean"] == 1
        and listens["kinds"][OTHER]["drop"]["mean"] == 1
    )
    assert listens["beyond"]["mean"] == 1 and "It listens to the question" in table(listens)


def test_a_wording_that_only_some_questions_have_is_counted_over_these():
    data = answered(lambda meant: meant, 4)
    del data[0]["said"]["typos"], data[1]["said"]["typos"], data[1]["said"]["frame"]
    summary = summarise(data)
    assert summary["kinds"]["typos"]["iou"]["n"] == 2 and summary["kinds"][ALL]["iou"]["n"] == 3
    text = table(summary)
    assert "| typos | 2 | 100.0 [" in text and "shorthand" not in text
    assert text.index("frame") < text.index("*controls*") < text.index(OTHER) < text.index(SAMPLED)


def test_jobs_exchange_the_question_and_make_the_image_grey():
    sample = Sample("q", noise_image(30, 20), "?", TRUTH, ((1, 1), (2, 2)))
    asked, grey = Jobs([sample], [(0, OTHER, "why?"), (0, GREY, "?")])
    assert asked.query == "why?" and asked.image is sample.image and asked.bbox == TRUTH
    assert grey.image.size == (30, 20) and grey.image.getcolors() == [(600, (128, 128, 128))]


# ---------------------------------------------------------------- the command


def test_the_embedded_model_is_asked_in_other_words(tmp_path):
    flags = "-m paper.rephrase --limit 3 --max-new-tokens 110 --out"
    out, _ = run(flags, tmp_path / "w")
    data, summary = (
        rows(tmp_path / "w/answers.jsonl"),
        json.loads((tmp_path / "w/summary.json").read_text()),
    )
    assert summary["n"] == len(data) == 3 and (tmp_path / "w/table.md").read_text().rstrip() in out
    for row in data:
        assert (
            set(FIXED) < set(row["said"])
            and row["said"][ASKED]["query"] == row["said"][GREY]["query"]
        )
        assert len(row["resampled"]) == len(row["said"]) - 3 > 3
    run(flags, tmp_path / "again")
    assert rows(tmp_path / "again/answers.jsonl") == data


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--limit 1", "all 1 questions are the same"),
        ("--data nowhere", "nowhere: no such file or folder"),
        ("--split none", "no sample in split"),
        ("--base-url http://localhost:1", "--base-url needs --model"),
        ("--crm nowhere", "nowhere"),
        ("--temperature -1", "--temperature"),
        ("--prompt nowhere", "--prompt nowhere"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_nothing_is_written(tmp_path, flags, says):
    _, error = run("-m paper.rephrase --limit 2", flags, "--out", tmp_path / "w", check=2)
    assert (
        error.startswith("error:")
        and error.count("\n") == 1
        and says in error
        and not (tmp_path / "w").exists()
    )
