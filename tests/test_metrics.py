"""metrics.py, runtime/step.py, extras/intervals.py, extras/mask_reward.py: scores by hand, intervals that cover,
held-out rows, warnings."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import noise_image, random_crm

from data import Frame, Sample, to_model
from extras.compare import change_text, summary_lines
from extras.intervals import interval, paired_bootstrap
from extras.mask_reward import mask_rewards
from metrics import QUESTION_METRICS, held_out, held_out_means, mask_dice, prediction
from rewards import smooth_log, write_answer
from runtime import metrics
from runtime.parallel import Ranks
from runtime.step import add_up, step_row, total_stats, warnings_of
from sampling import sample as sample_groups

BOX, PAIR = (10, 10, 20, 20), ((12, 12), (18, 18))


def sample(**extra):
    return Sample("q", noise_image(100, 100), "What is it?", BOX, PAIR, extra=extra)


def text(box, think="a liver", points=((12, 12), (18, 18))):
    keys = {"bbox": list(box), "points_1": list(points[0]), "points_2": list(points[1])}
    return f"<think>{think}</think><answer>{keys}</answer>"


def scored(texts, **extra):
    p = prediction(sample(**extra), 0, texts, Frame((100, 100), (100, 100)))
    return {key: metric(p) for key, (_, metric) in QUESTION_METRICS.items()}


# ---------------------------------------------------------------- scores


def test_scores_are_means_over_completions_and_their_conditions_by_hand():
    half = text((10, 10, 20, 15), think="The LIVER is seen")  # IoU 0.5, named
    full = text(BOX, think="a spleen")  # IoU 1, not named
    found = scored(
        [half, full, "no idea", text(BOX, points=((1,), (2,)))], names=["liver", "hepatic"]
    )
    assert found == pytest.approx(
        {
            "iou": (0.5 + 1 + 0 + 1) / 4,
            "pdice": 2 / 4,
            "parse_ok": 2 / 4,
            "iou_parsed": (0.5 + 1) / 2,
            "named": 2 / 4,
            "iou_named": (0.5 + 1) / 2,
            "iou_several": None,
            "iou_any": None,
            "iou_luck": None,
            "soft_f1": None,
            "f1_50": None,
            "count_error": None,
        }
    )


def test_what_is_undefined_is_none_and_never_zero():
    found = scored(["no idea"], names=["liver"])
    assert found["iou_parsed"] is None and found["iou_named"] is None and found["named"] == 0
    assert scored([text(BOX)])["named"] is None and scored([text(BOX)])["iou_named"] is None
    assert scored([text(BOX)], names="liver")["named"] is None  # not a list


def test_a_box_beyond_the_image_is_scored_as_it_was_written():
    """Once clipped before scoring: 0.25 instead of 0.0004 for a box 50 times too large."""
    whole = Sample("q", noise_image(100, 100), "?", (0, 0, 100, 100), PAIR)
    p = prediction(whole, 0, [text((0, 0, 5000, 5000))], Frame((100, 100), (100, 100)))
    assert p["completions"][0]["bbox"] == (0, 0, 5000, 5000)
    assert QUESTION_METRICS["iou"][1](p) == pytest.approx(1 / 2500)


def test_predictions_are_taken_to_the_image_frame():
    written = text(
        (20, 5, 40, 10), points=((24.5, 5.75), (36.5, 8.75))
    )  # BOX and PAIR in a frame of 200 x 50
    p = prediction(sample(), 0, [written], Frame((100, 100), (200, 50)))
    assert p["completions"][0]["bbox"] == BOX and p["completions"][0]["points"] == PAIR
    assert QUESTION_METRICS["iou"][1](p) == QUESTION_METRICS["pdice"][1](p) == 1


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


def test_the_mask_reward_is_of_the_mask_in_the_image_frame_and_zero_without_a_box():
    case, asm, frame = sample(), Filler(), Frame((100, 100), (200, 50))
    case.mask = np.zeros((100, 100), bool)
    case.mask[10:20, 10:20] = True
    points = (24.5, 5.75), (36.5, 8.75)
    texts = [
        text((20, 5, 40, 10), points=points),
        "no idea",
        text((20, 5, 30, 10), points=points),
        text((-1e6, 0, 1e6, 5)),
    ]
    earned = mask_rewards(asm, case, texts, frame)
    assert earned[:3] == [1, 0, smooth_log(2 / 3)] and earned[3] == smooth_log(0)
    assert asm.asked[0] == ([BOX], [PAIR]) and asm.asked[2][0] == [(-100, 0, 200, 10)]


def test_mask_dice_by_hand():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[1:] = True, True
    assert (
        mask_dice(a, b) == 2 * 4 / (8 + 12)
        and mask_dice(a, a) == 1
        and mask_dice(a & False, b) == 0
    )
    assert mask_dice(a & False, b & False) == 0


# ---------------------------------------------------------------- intervals


def coverage(draw, truth, trials=2000):
    hits = 0
    for trial in range(trials):
        found = draw(trial)
        hits += found.low <= truth <= found.high
    return hits / trials


def test_intervals_cover_95_percent_and_neither_90_nor_99():
    """One standard deviation of the share over 2000 trials is 0.005: 90 % and 99 % are many of them away."""
    rng = np.random.default_rng(0)
    values = rng.beta(0.5, 0.8, (2000, 120))  # as IoU: bounded, piled up at both ends
    single = coverage(lambda i: interval(values[i], draws=400, seed=i), 0.5 / 1.3)
    noise = rng.normal(size=(2, 2000, 120))
    paired = coverage(
        lambda i: paired_bootstrap(noise[0, i], noise[0, i] + 0.3 + noise[1, i], 400, i), 0.3
    )
    assert 0.93 < single < 0.965 and 0.93 < paired < 0.965


def test_intervals_leave_out_what_is_undefined():
    assert interval([None, None]) is None and interval([]) is None
    assert interval([None, 0.5, 0.5]) == (0.5, 0.5, 0.5)
    assert paired_bootstrap([0, None, 0, 1], [1, 1, None, 2]) == (1, 1, 1)
    assert interval([0, 1, 1]).low < 2 / 3 < interval([0, 1, 1]).high
    assert (
        change_text([0.25] * 5 + [None], [0.5] * 6)
        == "0.250 -> 0.500   +0.250 [+0.250, +0.250]   5 of 6 questions"
    )
    assert (
        change_text([0.25] * 4, [0.5] * 4) == "0.250 -> 0.500   +0.250 [–]"
    )  # too few for an interval
    assert change_text([None], [1]) == ""


# ---------------------------------------------------------------- held-out questions


@pytest.fixture(scope="module")
def crm():
    return random_crm()


def samples(n=5):
    return [
        Sample(
            str(i),
            noise_image(56 + 28 * (i % 2), 56, i),
            f"What is number {i}?",
            BOX,
            PAIR,
            extra={"names": ["liver"], "unseen_wording": i % 2 == 1},
        )
        for i in range(n)
    ]


def ask_all(crm, **more):
    return held_out(
        crm,
        samples(),
        {"sampled": (2, 1.0), "greedy": (1, 0.0)},
        "soft",
        {},
        Ranks(),
        max_new_tokens=6,
        **more,
    )


def test_held_out_rows_are_in_order_and_do_not_depend_on_the_batch(crm):
    rows = ask_all(crm)
    assert [(row["kind"], row["index"]) for row in rows] == [
        (kind, i) for kind in ("sampled", "greedy") for i in range(5)
    ]
    assert rows == ask_all(crm, batch=2)
    assert [row["wording"] for row in rows[:2]] == ["seen", "unseen"]
    assert {*QUESTION_METRICS, "reward", "id"} < rows[0].keys() and rows[0]["iou_parsed"] is None


def test_what_is_drawn_for_a_question_depends_on_no_other_question(crm):
    def texts(indexes, batch):
        return {
            i: group.texts
            for i, (_, _, group, _) in zip(
                indexes, metrics.ask(crm, samples(), indexes, {"sampled": (2, 1.0)}, 6, 0, batch)
            )
        }

    drawn = texts(range(5), 5)
    assert len({text for both in drawn.values() for text in both}) == 10
    assert texts(range(5), 2) == drawn and texts([1, 3], 5) == {i: drawn[i] for i in (1, 3)}


def test_held_out_rows_of_one_image_and_category_have_scores_among_siblings_whatever_their_rank(
    crm,
):
    asked = samples(3)
    for case, box in zip(asked, [BOX, (30, 30, 40, 40), BOX]):
        case.image, case.category, case.bbox = asked[0].image, "nucleus", box
    asked[2].category = "gland"
    mine = Ranks(0, 2)
    mine.gather = lambda rows: (
        rows + [(0, rows[0][1] | {"index": 1, "truth": {"bbox": (30, 30, 40, 40)}}, 0.0)]
    )
    for rows in (
        held_out(crm, asked, {"sampled": (2, 1.0)}, "soft", {}, Ranks(), 6),
        held_out(crm, asked, {"sampled": (2, 1.0)}, "soft", {}, mine, 6),
    ):
        assert [row["iou_any"] is None for row in rows] == [False, False, True]
        assert all(row["iou_luck"] == row["iou_any"] / 2 for row in rows[:2])


def test_a_prompt_is_encoded_once_for_sampled_and_greedy(crm, monkeypatch):
    encode, calls = crm.encode, []
    monkeypatch.setattr(crm, "encode", lambda *args: calls.append(1) or encode(*args))
    ask_all(crm)
    assert len(calls) == 5


def test_the_temperature_of_the_run_is_the_temperature_of_the_held_out_split(crm, monkeypatch):
    used = []
    monkeypatch.setattr(
        metrics, "sample_groups", lambda *args: used.append(args[4]) or sample_groups(*args)
    )
    held_out(crm, samples(1), {"sampled": (2, 0.7)}, "soft", {}, Ranks(), max_new_tokens=4)
    assert used == [0.7]


def test_a_perfect_completion_earns_the_most_in_the_held_out_split(crm, monkeypatch):
    close = Sample(
        "q", noise_image(300, 200), "?", (60, 60, 90, 90), ((70, 70), (74, 73))
    )  # 10 px on the 840 canvas

    def perfect(crm, prompts, *_):
        answers = [
            write_answer(to_model(close.bbox, p.frame), to_model(close.points, p.frame))
            for p in prompts
        ]
        return [
            SimpleNamespace(prompt=p, texts=["<think>x</think>" + answer])
            for p, answer in zip(prompts, answers)
        ]

    monkeypatch.setattr(metrics, "sample_groups", perfect)
    (row,) = held_out(crm, [close], {"greedy": (1, 0.0)}, "soft", {"mask_dice": 1.0}, Ranks())
    assert (
        row["reward"] == pytest.approx(4)
        and row["iou"] == pytest.approx(1)
        and row["parse_ok"] == 1
    )


def test_ranks_share_the_questions_without_loss_whatever_their_batches(crm):
    parts = []
    for rank in range(2):
        ranks = Ranks(rank, 2)
        ranks.gather = lambda rows: rows
        parts += held_out(
            crm, samples(), {"sampled": (2, 1.0)}, "soft", {}, ranks, 6, batch=1 + rank
        )
    assert sorted(parts, key=lambda row: row["index"]) == [
        r for r in ask_all(crm) if r["kind"] == "sampled"
    ]


def test_means_leave_out_scores_that_no_question_has():
    rows = [{"kind": "sampled", "reward": 1.0, **dict.fromkeys(QUESTION_METRICS)} for _ in range(2)]
    rows[0]["iou"] = 0.5
    assert held_out_means(rows) == {"sampled/iou": 0.5, "sampled/reward": 1.0}


def test_the_summary_compares_all_questions_and_each_kind_of_wording():
    def rows(value):
        return [
            {
                "kind": "sampled",
                "wording": ("seen", "unseen")[i % 2],
                "reward": 1.0,
                **dict.fromkeys(QUESTION_METRICS),
                "iou": value,
                "named": value * (i % 2),
            }
            for i in range(10)
        ]

    lines = summary_lines(rows(0.25), rows(0.5))
    assert [line.split()[:3] for line in lines if "iou" in line] == [
        ["sampled", "iou", "0.250"],
        ["sampled,", "seen", "iou"],
        ["sampled,", "unseen", "iou"],
    ]
    assert "0.250 -> 0.500   +0.250 [+0.250, +0.250]" in lines[0]
    seen, unseen = (line for line in lines if "named" in line and "seen" in line)
    assert (
        "0.000 -> 0.000" in seen
        and "0.250 -> 0.500" in unseen
        and not any("pdice" in line for line in lines)
    )


# ---------------------------------------------------------------- a training step


def test_statistics_add_up_and_extremes_do_not():
    total = {}
    for new in (
        {"loss": torch.tensor(1.0), "ratio_max": torch.tensor(1.5), "ratio_min": torch.tensor(0.5)},
        {"loss": 2.0, "ratio_max": 1.2, "ratio_min": 0.7},
    ):
        add_up(total, new)
    assert total_stats(total, Ranks()) == {"loss": 3.0, "ratio_max": 1.5, "ratio_min": 0.5}
    assert total_stats({}, Ranks()) == {}


def test_a_step_row_has_the_mean_gap_of_the_first_update():
    total = {}
    add_up(total, {"scored": 2.0, "gap_sum": 0.25, "kl": 1.0, "loss": 3.0, "logp_gap": 4.0})
    completions = [{"id": "a", "reward": 1.0, "length": 4}, {"id": "b", "reward": 0.0, "length": 6}]
    row = step_row(completions, total, [1.0, float("inf")], 1e-6, [0, 1, 3, 5], torch.device("cpu"))
    assert (
        row["logp_gap_mean"] == 0.25
        and row["kl"] == 0.5
        and row["loss"] == 1.5
        and row["logp_gap"] == 4
    )
    assert (
        row["reward"] == 0.5
        and row["skipped"] == 1
        and row["grad_norm"] == 1
        and row["seconds/update"] == 2
    )
    assert row["tokens_per_second"] == 2 and "gap_sum" not in row and "id" not in row


def test_warnings_name_what_is_wrong_and_are_silent_when_nothing_is():
    fine = {
        "skipped": 0,
        "parse_ok": 0.9,
        "finished": 1.0,
        "zero_std": 0.1,
        "entropy": 0.5,
        "length": 80,
        "kl": 0.01,
        "logp_gap_mean": 1e-5,
        "sampled/parse_ok": 0.9,
    }
    assert (
        warnings_of(fine, fine) == warnings_of({"step": 3, "loss": 1.0}, {}) == []
    )  # GRPO's row, SFT's
    for key, value, flag in (
        ("skipped", 1, "--lr"),
        ("parse_ok", 0.0, "train_sft.py"),
        ("finished", 0.2, "--max-new"),
        ("zero_std", 0.95, "--temperature"),
        ("entropy", 0.01, "--kl-coef"),
        ("kl", 3.0, "--kl-coef"),
        ("sampled/parse_ok", 0.6, "--lr"),
        ("logp_gap_mean", 0.2, "--dtype"),
    ):
        (warning,) = warnings_of(fine | {key: value}, fine)
        assert flag in warning
