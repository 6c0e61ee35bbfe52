"""metrics.py and the held-out rows of evaluate.py: scores by hand, intervals that cover, tables."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import noise_image, random_crm
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import metrics
from data import Example, Sizes, to_model
from evaluate import held_out, held_out_means
from metrics import (
    HELD_OUT,
    METRICS,
    Interval,
    change_lines,
    change_text,
    compare,
    decode_mask,
    encode_mask,
    has_word,
    interval,
    mask_dice,
    medoid,
    paired_interval,
    percent,
    prediction,
    scores,
    summarise,
    table,
)
from rewards import Answer, smooth_log, write_answer
from runtime.parallel import Ranks
from train_grpo import mask_dice_term

BOX = (10, 10, 20, 20)
PAIR = ((12, 12), (18, 18))
SAME = Sizes((100, 100), (100, 100))  # both frames of an image of 100 x 100
OTHER = Sizes((100, 100), (200, 50))


def example(**extra):
    return Example("q", noise_image(100, 100), "What is it?", BOX, PAIR, extra=extra)


def text(box, think="a liver", points=PAIR):
    keys = {"bbox": list(box), "points_1": list(points[0]), "points_2": list(points[1])}
    return f"<think>{think}</think><answer>{keys}</answer>"


def scored(texts, **extra):
    p = prediction(example(**extra), 0, texts, SAME)
    return scores(p, HELD_OUT)


# ---------------------------------------------------------------- scores


def test_scores_are_means_over_completions_and_their_conditions_by_hand():
    half = text((10, 10, 20, 15), think="The LIVER is seen")  # IoU 0.5, named
    full = text(BOX, think="a spleen")  # IoU 1, not named
    broken = text(BOX, points=((1,), (2,)))  # IoU 1, named, not parsed
    found = scored([half, full, "no idea", broken], names=["liver", "hepatic"])
    by_hand = {
        "iou": (0.5 + 1 + 0 + 1) / 4,
        "pdice": 2 / 4,
        "parse_ok": 2 / 4,
        "iou_parsed": (0.5 + 1) / 2,
        "named": 2 / 4,
        "iou_named": (0.5 + 1) / 2,
    }
    assert found == pytest.approx(by_hand)


def test_several_completions_are_averaged_voted_and_passed_at_n():
    half = text((10, 10, 20, 15))
    p = prediction(example(), 0, [half, "no idea", half, text(BOX)], SAME)
    found = scores(p)
    assert found["iou"] == (0.5 + 0 + 0.5 + 1) / 4
    assert found["refused"] == 0.25
    assert found["iou50"] == 0.75
    assert found["voted"] == 0.5
    assert found["best"] == 1
    assert found["pass"] == 1
    assert found["pdice_2iu"] == pytest.approx(2 * 3 / 4)
    alone = scores(prediction(example(), 0, [half], SAME))
    assert alone["voted"] is alone["best"] is alone["pass"] is None
    refused = scores(prediction(example(), 0, ["a", "b"], SAME))
    assert refused["voted"] == refused["best"] == refused["pass"] == 0


def test_what_is_undefined_is_none_and_never_zero():
    found = scored(["no idea"], names=["liver"])
    assert found["iou_parsed"] is None
    assert found["iou_named"] is None
    assert found["named"] == 0
    for names in ({}, {"names": "liver"}, {"names": []}, {"names": [" "]}):
        found = scored([text(BOX)], **names)
        assert found["named"] is None
        assert found["iou_named"] is None


def test_a_box_beyond_the_image_is_scored_as_it_was_written():
    """Once clipped before scoring: 0.25 instead of 0.0004 for a box 50 times too large."""
    whole_image = Example("q", noise_image(100, 100), "?", (0, 0, 100, 100), PAIR)
    p = prediction(whole_image, 0, [text((0, 0, 5000, 5000))], SAME)
    assert p["completions"][0]["bbox"] == (0, 0, 5000, 5000)
    assert scores(p)["iou"] == pytest.approx(1 / 2500)


def test_predictions_are_taken_to_the_image_frame():
    written = text((20, 5, 40, 10), points=((24.5, 5.75), (36.5, 8.75)))  # BOX and PAIR in OTHER
    p = prediction(example(), 0, [written], OTHER)
    assert p["completions"][0]["bbox"] == BOX
    assert p["completions"][0]["points"] == PAIR
    assert scores(p)["iou"] == scores(p)["pdice"] == 1


@pytest.mark.parametrize(
    "trace, word, found",
    [
        ("a clear edge", "ear", False),
        ("the ear is bright", "ear", True),
        ("ear", "ear", True),
        ("earlier", "ear", False),
        ("near the ear", "ear", True),  # the second place counts
        ("both ears are seen", "ear", True),
        ("two lungs", "lung", True),
        ("the earss", "ear", False),
        ("left kidney, upper pole", "left kidney", True),
        ("cleft kidney", "left kidney", False),
        ("the (liver).", "liver", True),
        ("liver-like", "liver", True),
        ("delivery", "liver", False),
        ("", "liver", False),
    ],
)
def test_named_is_a_word(trace, word, found):
    assert has_word(trace, word) is found
    assert scored([text(BOX, think=trace)], names=[word])["named"] == found


def test_a_name_in_the_answer_alone_does_not_count():
    assert scored([f"{text(BOX, think='a shadow')} liver"], names=["liver"])["named"] == 0


def test_the_kept_answer_agrees_most_with_the_others_and_any_box_beats_points():
    def answer(bbox, points=None):
        return Answer("", bbox, points, "")

    half = (10, 10, 20, 15)
    nothing = answer(None)
    points = answer(None, PAIR)
    assert medoid([answer((50, 50, 60, 60)), answer(BOX), answer(half), answer(half)]) == (
        2,
        pytest.approx((0 + 0.5 + 1) / 3),
    )
    assert medoid([nothing, points, answer(BOX)]) == (2, None)
    assert medoid([nothing, points]) == (1, None)
    assert medoid([nothing, nothing]) == (None, None)


def test_questions_about_one_image_have_its_digest():
    first = prediction(example(), 0, ["a"], SAME)["image"]
    again = prediction(example(names=["liver"]), 7, ["b"], SAME)["image"]
    other = Example("q", noise_image(100, 100, seed=1), "What is it?", BOX, PAIR)
    assert first == again
    assert prediction(other, 0, ["a"], SAME)["image"] != first


# ---------------------------------------------------------------- masks


def test_mask_dice_by_hand():
    a = np.zeros((4, 4), bool)
    b = np.zeros((4, 4), bool)
    a[:2] = True
    b[1:] = True
    nothing = np.zeros((4, 4), bool)
    assert mask_dice(a, b) == 2 * 4 / (8 + 12)
    assert mask_dice(a, a) == 1
    assert mask_dice(nothing, b) == 0
    assert mask_dice(nothing, nothing) == 0


@given(st.integers(1, 12), st.integers(1, 12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_masks_are_the_same_after_their_run_lengths(height, width, random):
    values = [random.random() < 0.5 for _ in range(height * width)]
    some = np.array(values).reshape(height, width)
    for mask in (some, np.zeros_like(some), np.ones_like(some)):
        run_lengths = json.loads(json.dumps(encode_mask(mask)))
        assert sum(run_lengths["counts"]) == mask.size
        assert (decode_mask(run_lengths) == mask).all()


def test_run_lengths_are_cocos_by_column():
    mask = np.array([[0, 1], [1, 1]], bool)
    assert encode_mask(mask) == {"size": [2, 2], "counts": [1, 3]}
    assert encode_mask(~mask) == {"size": [2, 2], "counts": [0, 1, 3]}


class Filler:
    """A segmenter that fills its box and writes down what it was asked."""

    def __init__(self):
        self.asked = []

    def segment(self, image, boxes=None, points=None):
        self.asked.append((boxes, points))
        mask = np.zeros(image.shape[:2], bool)
        if boxes:
            x1, y1, x2, y2 = (max(0, round(v)) for v in boxes[0])
            mask[y1:y2, x1:x2] = True
        return mask[None], np.ones(1)


def test_the_mask_reward_is_of_the_mask_in_the_image_frame_and_zero_without_a_box(crm):
    asm = Filler()
    case = example()
    case.mask = np.zeros((100, 100), bool)
    case.mask[10:20, 10:20] = True
    group = SimpleNamespace(prompt=SimpleNamespace(sizes=OTHER))
    points = ((24.5, 5.75), (36.5, 8.75))

    def earned(completion):
        return mask_dice_term(asm, case, completion, group, crm)

    assert earned(text((20, 5, 40, 10), points=points)) == 1
    assert asm.asked.pop() == ([BOX], [PAIR])
    assert earned("no idea") == 0
    assert asm.asked == []
    assert earned(text((20, 5, 30, 10), points=points)) == smooth_log(2 / 3)
    assert earned(text((-1e6, 0, 1e6, 5))) == smooth_log(0)
    assert asm.asked.pop()[0] == [(-100, 0, 200, 10)]  # clipped


# ---------------------------------------------------------------- intervals


def share_covered(intervals, truth):
    hits = [found.low <= truth <= found.high for found in intervals]
    return sum(hits) / len(hits)


def test_intervals_cover_95_percent_and_neither_90_nor_99():
    """One standard deviation of the share over 2000 trials is 0.005."""
    rng = np.random.default_rng(0)
    values = rng.beta(0.5, 0.8, (2000, 120))  # as IoU: bounded, piled up at both ends
    single = [interval(row, draws=400, seed=i) for i, row in enumerate(values)]
    assert 0.93 < share_covered(single, 0.5 / 1.3) < 0.965
    before = rng.normal(size=(2000, 120))
    after = before + 0.3 + rng.normal(size=(2000, 120))
    differences = [interval(row, draws=400, seed=i) for i, row in enumerate(after - before)]
    assert 0.93 < share_covered(differences, 0.3) < 0.965


def clustered(rng, images, per_image, correlation):
    """Values of questions about images, with an intra-class correlation, and the image of each."""
    of_image = rng.normal(size=(images, 1)) * np.sqrt(correlation)
    of_question = rng.normal(size=(images, per_image)) * np.sqrt(1 - correlation)
    names = np.repeat(np.arange(images), per_image)
    return (of_image + of_question).ravel(), names


@pytest.mark.parametrize("images", [30, 60])
def test_intervals_cover_where_ten_questions_are_about_one_image(images):
    """As if questions were independent, a "95 %" interval covered 57 to 66 %."""
    rng = np.random.default_rng(images)
    by_image = []
    by_question = []
    for trial in range(1500):
        values, names = clustered(rng, images, per_image=10, correlation=0.3)
        by_image.append(interval(values, names, draws=400, seed=trial))
        if trial < 300:
            by_question.append(interval(values, draws=400, seed=trial))
    assert 0.93 <= share_covered(by_image, 0) < 0.97
    assert share_covered(by_question, 0) < 0.75
    assert by_image[0].n == 10 * images
    assert by_image[0].images == images


@pytest.mark.parametrize("images", [30, 60])
def test_paired_intervals_cover_where_ten_questions_are_about_one_image(images):
    rng = np.random.default_rng(images)
    found = []
    for _ in range(400):
        before, names = clustered(rng, images, per_image=10, correlation=0.3)
        change, _ = clustered(rng, images, per_image=10, correlation=0.3)
        found.append(paired_interval(before, before + 0.1 + change, names))
    assert share_covered(found, 0.1) >= 0.92  # one standard deviation of the share is 0.011


def test_intervals_cover_where_images_have_unequally_many_questions():
    rng = np.random.default_rng(0)
    found = []
    for trial in range(1000):
        counts = rng.integers(1, 20, 40)
        of_image = rng.normal(size=40) * np.sqrt(0.3)
        names = np.repeat(np.arange(40), counts)
        values = of_image[names] + rng.normal(size=len(names)) * np.sqrt(0.7)
        found.append(interval(values, names, draws=400, seed=trial))
    assert share_covered(found, 0) >= 0.93


def test_the_order_of_the_questions_does_not_matter_to_the_mean():
    values = [0.0, 1.0, 0.5, 0.25]
    images = ["a", "a", "b", "c"]
    found = interval(values, images)
    assert found.mean == np.mean(values)
    assert (found.n, found.images) == (4, 3)


def test_intervals_leave_out_what_is_undefined():
    assert interval([]) is None
    assert interval([None, None]) is None
    assert interval([None, 0.5, 0.5]) == Interval(0.5, 0.5, 0.5, n=2, images=2)
    assert interval([0.5, None, 0.25], ["a", "a", "a"]).images == 1
    found = interval([0, 1, 1])
    assert found.low < 2 / 3 < found.high
    paired = paired_interval([0, None, 0, 1], [1, 1, None, 2])
    assert paired == Interval(1, 1, 1, n=2, images=2)
    assert paired_interval([None], [1]) is None


def test_an_interval_of_fewer_than_five_images_is_a_dash():
    assert percent(interval([0.25, 0.75] * 2)) == "50.0 [–]"
    assert percent(interval([0.5] * 5)) == "50.0 [50.0, 50.0]"
    assert percent(interval([0.5] * 50, ["a"] * 50)) == "50.0 [–]"
    assert percent(interval([0.5] * 5), "+") == "+50.0 [+50.0, +50.0]"
    assert percent(None) == "–"


def test_a_change_is_of_the_questions_where_both_are_defined():
    said = change_text([0.25] * 5 + [None], [0.5] * 6, list("abcdef"))
    assert said == "0.250 -> 0.500   +0.250 [+0.250, +0.250]   5 of 6 questions"
    assert change_text([0.25] * 4, [0.5] * 4, list("abcd")) == "0.250 -> 0.500   +0.250 [–]"
    assert change_text([0.25] * 9, [0.5] * 9, ["a"] * 9) == "0.250 -> 0.500   +0.250 [–]"
    assert change_text([None], [1], ["a"]) == ""
    said = change_text([0.25] * 5, [0.5] * 5, list("abcde"), in_percent=True)
    assert said == "25.0 -> 50.0   +25.0 [+25.0, +25.0]"


# ---------------------------------------------------------------- tables


def predictions(count, **more):
    """Predictions whose IoUs are 0.5, 0.6, 0.7, … of questions about an image each."""
    rows = []
    for i in range(count):
        case = Example(str(i), noise_image(20, 20, i), "?", BOX, PAIR, category="c")
        p = prediction(case, i, [text((10, 10, 20, 15 + i))], SAME) | {"dice": None}
        rows.append(p | more)
    return rows


def test_a_table_has_a_dash_where_there_are_fewer_than_five_images():
    def cells(count):
        return table(summarise(predictions(count))).splitlines()[4].split(" | ")

    assert cells(4)[1:3] == ["4", "65.0 [–]"]
    five = cells(5)[2]
    assert five.startswith("70.0 [")
    assert "–" not in five


def test_a_table_says_how_many_images_the_questions_are_about():
    rows = predictions(6)
    for p in rows:
        p["image"] = "one" if p["index"] < 3 else "two"
    said = table(summarise(rows))
    assert "questions about 2 images" in said
    assert "| all | 6 | 75.0 [–]" in said


def test_names_and_wordings_get_their_columns_where_the_data_has_them():
    rows = []
    for i, (think, unseen) in enumerate([("The Liver", False), ("a spleen", True)]):
        case = example(names=["Liver"], unseen_wording=unseen)
        rows.append(prediction(case, i, [text((10, 10, 20, 15 + 5 * i), think)], SAME))
    summary = summarise(rows)
    assert summary["all"]["named"]["mean"] == 0.5
    assert summary["all"]["iou_named"] == {
        "mean": 0.5,
        "low": 0.5,
        "high": 0.5,
        "n": 1,
        "images": 1,
    }
    unseen = summary["wording"]["unseen"]
    assert unseen["named"]["mean"] == 0
    assert unseen["iou_named"] is None
    said = table(summary)
    assert "| named right | IoU, named right |" in said
    assert "*by wording*" in said
    without = table(summarise(predictions(2)))
    assert "named" not in without
    assert "wording" not in without


def test_columns_of_several_completions_exist_only_where_there_are_several():
    several = prediction(example(), 0, [text(BOX), "no idea"], SAME)
    assert summarise([several])["all"]["pass"]["mean"] == 1
    assert "pass@N" in table(summarise([several]))
    assert summarise(predictions(1))["all"]["pass"] is None
    assert "pass@N" not in table(summarise(predictions(1)))


# ---------------------------------------------------------------- two evaluations


def test_compare_is_of_the_same_questions_with_the_same_truth():
    before = predictions(6)
    after = [p | {"completions": before[5]["completions"]} for p in reversed(before)]
    first_line = compare(before, after)[0]
    assert first_line.split()[:4] == ["IoU", "75.0", "->", "100.0"]
    for p in after:
        p["truth"] = p["truth"] | {"bbox": (10, 10, 20, 21)}
    with pytest.raises(ValueError, match="question 0: its truth differs between the two"):
        compare(before, after)
    with pytest.raises(ValueError, match="1 questions are in only one, the first is 5"):
        compare(before, before[:5])


def test_compare_draws_images_and_not_questions():
    before = predictions(6)
    for p in before:
        p["image"] = "one" if p["index"] < 3 else "two"
    assert "[–]" in compare(before, before)[0]


# ---------------------------------------------------------------- held-out questions


@pytest.fixture(scope="module")
def crm():
    return random_crm()


def examples(n=5):
    found = []
    for i in range(n):
        image = noise_image(56 + 28 * (i % 2), 56, i)
        extra = {"names": ["liver"], "unseen_wording": i % 2 == 1}
        found.append(Example(str(i), image, f"What is number {i}?", BOX, PAIR, extra=extra))
    return found


BOTH_KINDS = {"sampled": (2, 1.0), "greedy": (1, 0.0)}
SAMPLED = {"sampled": (2, 1.0)}


def ask_held_out(crm, kinds=BOTH_KINDS, questions=None, ranks=None, max_new_tokens=6):
    if questions is None:
        questions = examples()
    if ranks is None:
        ranks = Ranks()
    return held_out(crm, questions, kinds, "soft", {}, ranks, max_new_tokens)


def test_held_out_rows_are_in_order(crm):
    rows = ask_held_out(crm)
    order = [(row["kind"], row["index"]) for row in rows]
    assert order == [(kind, i) for kind in ("sampled", "greedy") for i in range(5)]
    assert [row["wording"] for row in rows[:2]] == ["seen", "unseen"]
    assert {*HELD_OUT, "reward", "id", "image"} < rows[0].keys()
    assert rows[0]["iou_parsed"] is None


def test_what_is_drawn_for_a_question_depends_on_no_other_question(crm):
    def texts(indexes, batch):
        asked = evaluate.ask(crm, examples(), indexes, SAMPLED, 6, seed=0, batch=batch)
        return {p["index"]: group.texts for _, _, group, p in asked}

    drawn = texts(range(5), 5)
    assert len({text for both in drawn.values() for text in both}) == 10
    assert texts(range(5), 2) == drawn
    assert texts([1, 3], 5) == {i: drawn[i] for i in (1, 3)}


def test_a_prompt_is_encoded_once_for_sampled_and_greedy(crm, monkeypatch):
    encode = crm.encode
    calls = []

    def counted(*args):
        calls.append(args)
        return encode(*args)

    monkeypatch.setattr(crm, "encode", counted)
    ask_held_out(crm)
    assert len(calls) == 5


def test_the_temperature_of_the_run_is_the_temperature_of_the_held_out_split(crm, monkeypatch):
    sample = evaluate.sample
    used = []

    def noted(crm, prompts, completions, max_new_tokens, temperature, seeds):
        used.append(temperature)
        return sample(crm, prompts, completions, max_new_tokens, temperature, seeds)

    monkeypatch.setattr(evaluate, "sample", noted)
    ask_held_out(crm, {"sampled": (2, 0.7)}, examples(1), max_new_tokens=4)
    assert used == [0.7]


def test_a_perfect_completion_earns_the_most_in_the_held_out_split(crm, monkeypatch):
    # its points are 10 px apart on a canvas of 840
    close = Example("q", noise_image(300, 200), "?", (60, 60, 90, 90), ((70, 70), (74, 73)))

    def perfect(crm, prompts, *_):
        groups = []
        for prompt in prompts:
            box = to_model(close.bbox, prompt.sizes)
            answer = write_answer(box, to_model(close.points, prompt.sizes))
            groups.append(SimpleNamespace(prompt=prompt, texts=[f"<think>x</think>{answer}"]))
        return groups

    monkeypatch.setattr(evaluate, "sample", perfect)
    coefficients = {"mask_dice": 1.0}  # pixels are left out while training
    (row,) = held_out(crm, [close], {"greedy": (1, 0.0)}, "soft", coefficients, Ranks())
    assert row["reward"] == pytest.approx(4)
    assert row["iou"] == pytest.approx(1)
    assert row["parse_ok"] == 1


def test_ranks_share_the_questions_without_loss(crm):
    class Alone(Ranks):
        """One rank of two, which gathers nothing."""

        def gather(self, items):
            return items

    parts = []
    for rank in range(2):
        parts += ask_held_out(crm, SAMPLED, ranks=Alone(rank, 2))
    in_order = sorted(parts, key=lambda row: row["index"])
    assert in_order == ask_held_out(crm, SAMPLED)


def held_out_row(i, iou, **more):
    row = {"kind": "sampled", "index": i, "id": str(i), "image": str(i), "reward": 1.0}
    row["wording"] = ("seen", "unseen")[i % 2]
    return row | dict.fromkeys(HELD_OUT) | {"iou": iou} | more


def test_means_leave_out_scores_that_no_question_has():
    rows = [held_out_row(0, 0.5), held_out_row(1, None)]
    assert held_out_means(rows) == {"sampled/iou": 0.5, "sampled/reward": 1.0}


def test_a_run_is_compared_over_all_questions_and_over_each_kind_of_wording():
    def rows(value):
        return [held_out_row(i, value, named=value * (i % 2)) for i in range(10)]

    lines = change_lines(rows(0.25), rows(0.5))
    of_iou = [line for line in lines if " iou " in line]
    assert [line.split()[:3] for line in of_iou] == [
        ["sampled", "iou", "0.250"],
        ["sampled,", "seen", "iou"],
        ["sampled,", "unseen", "iou"],
    ]
    assert "0.250 -> 0.500   +0.250 [+0.250, +0.250]" in of_iou[0]
    _, seen, unseen = [line for line in lines if "named" in line]
    assert "0.000 -> 0.000" in seen
    assert "0.250 -> 0.500" in unseen
    assert not any("pdice" in line for line in lines)


def test_a_run_is_compared_from_its_first_evaluation_to_its_last():
    rows = []
    for step, value in ((0, 0.25), (5, 0.9), (9, 0.5)):
        rows += [{"step": step, **held_out_row(i, value)} for i in range(6)]
    rows.append({"step": 9, **held_out_row(6, 0.0)})  # --eval-limit has changed since
    logged = [{"step": i, "seconds": 2.0, "peak_memory_gb": i} for i in range(1, 10)]
    said = metrics.changes(rows, [{"step": 0}, *logged])
    assert "step 0 -> 9" in said
    assert "0.250 -> 0.500" in said
    assert "2.00 s per step (median), 0.3 min for all 9, peak memory 9.00 GB" in said


def test_every_metric_has_a_title_of_its_own():
    titles = [title for title, _ in METRICS.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    "text, word, is_there",
    [
        ("a clear border", "ear", False),
        ("the ear.", "ear", True),
        ("both ears are seen", "ear", True),
        ("nerve t12 is meant", "t1", False),
        ("nerve t1 is meant", "t1", True),
        ("这是肝脏。", "肝脏", True),  # no spaces there
        ("", "ear", False),
    ],
)
def test_a_name_is_a_word_of_the_trace(text, word, is_there):
    assert has_word(text, word) is is_there


def test_changes_pair_questions_by_id_where_a_limit_has_moved_them():
    """Other limits spread over the split otherwise, so index 1 is another question then."""

    def row(step, index, name, value):
        same = {"kind": "greedy", "wording": None, "image": name}
        return {"step": step, "index": index, "id": name, "iou": value, **same}

    held_out = [row(0, i, f"q{i}", 0.1 * i) for i in range(8)]
    held_out += [row(9, i, f"q{2 * i}", 0.2 * i + 0.5) for i in range(4)]  # every second, +0.5
    timed = [{"seconds": 1.0, "peak_memory_gb": 1.0}]
    assert "+0.500" in metrics.changes(held_out, timed)
