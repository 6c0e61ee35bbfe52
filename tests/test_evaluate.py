"""evaluate.py: numbers by hand, predictions of other models, interruptions, late ranks."""

import json
import os
import time
import weakref

import numpy as np
import pytest
from conftest import noise_image, ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scripts import ROOT, rows, run

import crm as crm_module
import evaluate
from data import Frame, Sample, load_samples, model_size, to_model
from evaluate import METRICS
from extras import pictures, predictions, tables
from extras.predictions import decode_mask, encode_mask
from runtime.cli import parse_args

NO_MASK = {"bbox": None, "points": None, "text": "", "problem": "no answer block"}


def line(i, bboxes, truth=(0, 0, 10, 10), points=None, dice=None, **more):
    completions = [
        NO_MASK if b is None else {"text": "", "bbox": b, "points": points, "problem": ""}
        for b in bboxes
    ]
    kept = next((k for k, b in enumerate(bboxes) if b), None)
    return {
        "id": str(i),
        "index": i,
        "size": [100, 100],
        "supercategory": "A",
        "category": "a",
        "wording": None,
        "names": [],
        "query": "?",
        "truth": {"bbox": list(truth), "points": [[2, 2], [8, 8]], "mask": None},
        "asked": ["bbox", "points"],
        "completions": completions,
        "kept": kept,
        "dice": dice,
        "mask": None,
    } | more


def save(folder, lines):
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def test_tables_of_a_hand_made_file_equal_numbers_by_hand(tmp_path):
    dice = {"points": 0.5, "box": 0.25, "one": 0.75, "both": 1.0}
    folder = save(
        tmp_path / "e",
        [
            line(0, [[0, 0, 10, 10]], points=[[2, 2], [8, 8]], dice=dice),  # IoU 1, pDice 1
            line(1, [[0, 0, 5, 10]], supercategory="B", category="b", dice=None),  # IoU 0.5
            line(
                2,
                [[20, 20, 30, 30]],
                supercategory="B",
                category="b",
                dice=dict.fromkeys(dice, 0.0),
            ),  # IoU 0
            line(3, [None], dice=dict.fromkeys(dice, 0.0)),
        ],
    )  # a refusal
    out, _ = run("evaluate.py --rescore", folder)
    summary = json.loads((folder / "summary.json").read_text())
    mean = {key: value["mean"] for key, value in summary["all"].items() if key != "n" and value}
    assert mean == pytest.approx(
        {
            "iou": 0.375,
            "iou50": 0.5,
            "pdice": 0.25,
            "pdice_2iu": 0.5,
            "refused": 0.25,
            "parse_ok": 0.75,
            "iou_parsed": 0.5,
            "dice_points": 0.5 / 3,
            "dice_box": 0.25 / 3,
            "dice_one": 0.25,
            "dice_both": 1 / 3,
        },
        abs=1e-6,
    )
    assert summary["all"]["iou_parsed"]["n"] == 3 and summary["all"]["named"] is None
    assert summary["all"]["n"] == 4 and summary["all"]["dice_box"]["n"] == 3
    assert (
        summary["supercategory"]["B"]["iou"]["mean"] == 0.25 and summary["category"]["a"]["n"] == 2
    )
    assert summary["refusals"] == {"no answer block": 1}
    text = (folder / "table.md").read_text()
    assert (
        "| all | 4 | 37.5 [–]" in text
        and "1 × no answer block" in text
        and "| B | 2 | 25.0 [–]" in text
    )
    assert "named" not in text and "voted" not in text
    assert "| all | 4 |" in out


def test_several_completions_are_averaged_voted_and_passed_at_n():
    row = line(0, [[0, 0, 5, 10], None, [0, 0, 5, 10], [0, 0, 10, 10]])
    score = evaluate.scores(row)
    assert (
        score["iou"] == (0.5 + 0 + 0.5 + 1) / 4
        and score["refused"] == 0.25
        and score["iou50"] == 0.75
    )
    assert score["voted"] == 0.5 and score["best"] == 1 and score["pass"] == 1
    assert tables.summarise([row], METRICS)["all"]["pass"]["mean"] == 1
    assert tables.summarise([line(0, [[0, 0, 5, 10]])], METRICS)["all"]["pass"] is None


def test_names_and_wordings_get_their_columns_where_the_data_has_them():
    def asked(i, think, wording):
        row = line(i, [[0, 0, 5 * (1 + i), 10]], wording=wording, names=["liver"])
        row["completions"][0]["text"] = f"<think>{think}</think>"
        return row

    summary = tables.summarise(
        [asked(0, "The Liver", "seen"), asked(1, "a spleen", "unseen")], METRICS
    )
    assert summary["all"]["named"]["mean"] == 0.5 and summary["all"]["iou_named"] == {
        "mean": 0.5,
        "low": 0.5,
        "high": 0.5,
        "n": 1,
    }
    assert (
        summary["wording"]["unseen"]["named"]["mean"] == 0
        and summary["wording"]["unseen"]["iou_named"] is None
    )
    text = tables.table(summary, METRICS)
    assert "| named right | IoU, named right |" in text and "*by wording*" in text


def test_a_new_metric_is_one_line_and_rescores_an_old_run_from_its_masks(
    tmp_path, monkeypatch, capsys
):
    mask, truth = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    mask[2:9, 3:8], truth[2:9, 5:11] = True, True
    row = line(0, [[3, 2, 8, 9]], mask=encode_mask(mask))
    row["truth"]["mask"] = encode_mask(truth)
    folder = save(tmp_path / "e", [row])
    monkeypatch.setitem(
        evaluate.METRICS,
        "area",
        (
            "area",
            lambda p: float(decode_mask(p["mask"]).sum() / decode_mask(p["truth"]["mask"]).sum()),
        ),
    )
    evaluate.main(evaluate.Config(rescore=str(folder)))
    assert json.loads((folder / "summary.json").read_text())["all"]["area"]["mean"] == 35 / 42
    assert "| area |" in capsys.readouterr().out


@given(st.integers(1, 12), st.integers(1, 12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_masks_come_back_from_their_run_lengths(height, width, random):
    mask = np.array([[random.random() < 0.5 for _ in range(width)] for _ in range(height)])
    for m in (mask, mask & False, mask | True):
        rle = json.loads(json.dumps(encode_mask(m)))
        assert sum(rle["counts"]) == m.size and (decode_mask(rle) == m).all()
    assert encode_mask(np.array([[0, 1], [1, 1]], bool)) == {
        "size": [2, 2],
        "counts": [1, 3],
    }  # COCO's: by column


def test_compare_pairs_the_questions_and_names_those_in_only_one(tmp_path):
    a = save(tmp_path / "a", [line(i, [[0, 0, 5, 10]]) for i in range(30)])
    b = save(tmp_path / "b", [line(i, [[0, 0, 10, 10]]) for i in reversed(range(30))])
    out, _ = run("evaluate.py --compare", a, b)
    assert "IoU                    50.0 -> 100.0   +50.0 [+50.0, +50.0]" in out
    c = save(tmp_path / "c", [line(i, [[0, 0, 5, 10]]) for i in range(29)])
    _, error = run("evaluate.py --compare", a, c, check=2)
    assert "1 questions are in only one, first 29" in error
    _, error = run("evaluate.py --rescore", tmp_path / "nothing", check=2)
    assert "no predictions.jsonl" in error


def test_2500_predictions_score_in_20_seconds_without_a_model(tmp_path):
    lines = [
        line(
            i,
            [[0, 0, 5 + i % 5, 10]],
            supercategory=f"S{i % 15}",
            category=f"c{i % 108}",
            dice={"points": 0.1, "box": 0.2, "one": 0.2, "both": 0.3},
        )
        for i in range(2500)
    ]
    folder, start = save(tmp_path / "e", lines), time.perf_counter()
    evaluate.tables.report(evaluate.read_predictions(folder), evaluate.METRICS, folder)
    assert time.perf_counter() - start < 20


# ---------------------------------------------------------------- predictions of other models


@pytest.fixture(scope="module")
def tests():
    return load_samples("demo/data", "test")[:6]


def answers(tests, frame):
    """Perfect ones, in a frame."""
    for sample in tests:
        size = sample.image.size
        target = {"pixels": size, "norm1000": (1000, 1000), "model": model_size(size)}[frame]
        there = Frame(size, target)
        yield {
            "id": sample.id,
            "bbox": to_model(sample.bbox, there),
            "points": to_model(sample.points, there),
        }


def predicted(tmp_path, lines, flags, check=0, name="p"):
    file = tmp_path / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in lines))
    return run(
        "evaluate.py --limit 6 --asm none --predictions",
        file,
        "--out",
        tmp_path / name,
        flags,
        check=check,
    )


@pytest.mark.parametrize("frame", ["pixels", "norm1000", "model"])
def test_perfect_predictions_are_perfect_in_the_frame_they_were_written_in(tmp_path, tests, frame):
    predicted(tmp_path, answers(tests, frame), f"--frame {frame}")
    for row in rows(tmp_path / "p/predictions.jsonl"):
        score = evaluate.scores(row)
        assert score["iou"] == pytest.approx(1, abs=1e-6) and score["pdice"] == pytest.approx(
            1, abs=1e-6
        )


def test_missing_predictions_are_refusals_that_are_counted_and_reported(tmp_path, tests):
    out, _ = predicted(tmp_path, list(answers(tests, "pixels"))[:4], "")
    summary = json.loads((tmp_path / "p/summary.json").read_text())
    assert "2 of 6 questions have no prediction" in out and summary["refusals"] == {
        "no prediction": 2
    }
    assert summary["all"]["iou"]["mean"] == pytest.approx(4 / 6)


@pytest.mark.parametrize(
    "change, flags, says",
    [
        (
            lambda a: a + [dict(a[0], id="nobody")],
            "",
            "'nobody'; those there look like 'test_00000'",
        ),
        (lambda a: a + [a[2]], "", "line 7: id"),
        (lambda a: a, "--frame model --resize square:56", "--frame model is wrong"),
        (lambda a: [{"bbox": [1, 2, 3, 4]}], "", "line 1: an object with id"),
        (lambda a: [{"id": a[0]["id"]}], "", "line 1: an object with id"),
        (lambda a: a[:1] + [{"id": "x", "points": 5}], "", "line 2: an object with id"),
        (lambda a: [{"id": "x", "text": 5, "bbox": [1, 2, 3, 4]}], "", "line 1: an object with id"),
        (lambda a: [], "", "p.jsonl: no line in it"),
        (
            lambda a: [{"id": a[0]["id"], "bbox": [0.1, 0.2, 0.9, 0.95]}],
            "",
            "look like fractions of the image; give pixels",
        ),
    ],
    ids=[
        "unknown",
        "repeated",
        "frame",
        "no id",
        "no answer",
        "points 5",
        "text 5",
        "empty",
        "fractions",
    ],
)
def test_predictions_that_cannot_be_meant_are_refused_with_one_line_and_nothing_written(
    tmp_path, tests, change, flags, says
):
    _, error = predicted(tmp_path, change(list(answers(tests, "pixels"))), flags, check=2)
    assert says in error and error.count("\n") == 1 and not (tmp_path / "p").exists()


def test_the_example_that_the_help_prints_is_a_line_that_can_be_read(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args(evaluate.Config, evaluate.__doc__, argv=["--help"])
    out, _ = run("-m extras.predictions --help")
    for text in (capsys.readouterr().out, out):
        line = next(
            line for line in text.splitlines() if line.strip().startswith('{"id": "mine-3", "bbox"')
        )
        assert "python data.py PATH" in text
        (tmp_path / "p.jsonl").write_text(line[: line.rindex("}") + 1].strip())
        given, asked = predictions.read_given(str(tmp_path / "p.jsonl"))
        assert asked == ["bbox", "points"] and len(given["mine-3"]["points"]) == 2


class Few(list):
    """Samples in memory, as load_samples gives them."""

    skipped = ()

    def ids(self):
        return [sample.id for sample in self]


def few(n=2, size=(100, 80)):
    return Few(
        Sample(f"q{i}", noise_image(*size, i), "?", (10, 10, 20, 20), ((12, 12), (18, 18)))
        for i in range(n)
    )


def from_lines(tmp_path, *given, samples=None, **flags):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, given)))
    config = evaluate.Config(predictions=str(file), data="d", asm="none", out="x", **flags)
    return predictions.from_file(config, samples or few())


ODD = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda x: (
        st.lists(x, max_size=5)
        | st.dictionaries(st.sampled_from(["id", "bbox", "points", "a"]), x, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["id", "text", "bbox", "points"]), ODD) | ODD)
@settings(max_examples=300, deadline=None)
def test_odd_types_give_one_line_or_a_refusal(tmp_path_factory, odd):
    if isinstance(odd, dict) and "id" in odd:
        odd["id"] = "q0" if isinstance(odd["id"], str) else odd["id"]
    try:
        p = from_lines(tmp_path_factory.mktemp("odd"), odd, {"id": "q1", "text": ""})[0]
    except ValueError as error:
        assert "p.jsonl" in str(error) and "\n" not in str(error)
    else:
        assert all(
            value is None or 0 <= value <= 2
            for value in evaluate.scores(p | {"dice": None}).values()
        )
        json.dumps(p)


def test_what_was_not_asked_for_is_no_refusal_and_has_no_score(tmp_path):
    boxes = from_lines(
        tmp_path, {"id": "q0", "bbox": [10, 10, 20, 20]}, {"id": "q1", "bbox": [1, 2, "x", 4]}
    )
    first, second = (evaluate.scores(p | {"dice": None}) for p in boxes)
    assert (
        first["iou"] == 1
        and first["refused"] == 0
        and first["pdice"] is None
        and first["iou_parsed"] == 1
    )
    assert second["iou"] == 0 and second["refused"] == 1 and second["pdice"] is None
    points = from_lines(tmp_path, {"id": "q0", "points": [[12, 12], [18, 18]]})
    first, second = (evaluate.scores(p | {"dice": None}) for p in points)
    assert first["pdice"] == 1 and first["refused"] == 0 and first["iou"] is first["iou50"] is None
    assert second["pdice"] == 0 and second["refused"] == 1  # no line for it
    both = from_lines(
        tmp_path,
        {"id": "q0", "bbox": [10, 10, 20, 20]},
        {"id": "q1", "bbox": [10, 10, 20, 20], "points": [[12, 12], [18, 18]]},
    )
    first, second = (evaluate.scores(p | {"dice": None}) for p in both)
    assert (
        first["refused"] == 1
        and first["iou"] == 1
        and first["pdice"] == 0
        and second["refused"] == 0
    )


def test_text_with_unusual_line_separators_stays_one_line(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"id": "q0", "text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n")
    assert predictions.read_given(str(file))[0]["q0"]["text"] == "a\u2028b\x85c"


def test_images_are_not_kept_while_predictions_are_read(tmp_path):
    class Lazy(Few):
        alive = most = 0

        def __getitem__(self, i):
            sample, owner = few(40)[i], self
            owner.alive += 1
            owner.most = max(owner.most, owner.alive)
            weakref.finalize(sample, lambda: setattr(owner, "alive", owner.alive - 1))
            return sample

    samples = Lazy(few(40))
    assert (
        len(from_lines(tmp_path, {"id": "q0", "text": ""}, samples=samples)) == 40
        and samples.most <= 2
    )


@pytest.mark.parametrize("size", [(400, 300), (61, 203)])
def test_the_model_frame_is_the_one_that_encode_uses(tmp_path, size):
    """Once 392x308 here and 252x168 in encode: the checkpoint's own limit was left out."""
    prompt = crm_module.load_crm(ROOT / "demo/crm").encode(noise_image(*size), "?")
    x, y = (m / i for m, i in zip(prompt.frame.model, size))
    (p,) = from_lines(
        tmp_path,
        {"id": "q0", "bbox": [10 * x, 10 * y, 20 * x, 20 * y]},
        samples=few(1, size),
        frame="model",
        crm=str(ROOT / "demo/crm"),
    )
    assert p["completions"][0]["bbox"] == pytest.approx([10, 10, 20, 20])


def test_the_model_frame_is_the_one_that_a_checkpoint_remembers_unless_flags_say_otherwise(
    tmp_path,
):
    folder, size = tmp_path / "crm", (400, 300)
    crm_module.load_crm(ROOT / "demo/crm", resize="square:168").save(folder)
    for flags in ({}, {"resize": "aspect"}, {"resize": "aspect", "max_pixels": 100_000}):
        frame = crm_module.load_crm(folder, **flags).encode(noise_image(*size), "?").frame.model
        x, y = (m / i for m, i in zip(frame, size))
        (p,) = from_lines(
            tmp_path,
            {"id": "q0", "bbox": [10 * x, 10 * y, 20 * x, 20 * y]},
            samples=few(1, size),
            frame="model",
            crm=str(folder),
            **flags,
        )
        assert p["completions"][0]["bbox"] == pytest.approx([10, 10, 20, 20]), flags


# ---------------------------------------------------------------- a model's completions


def test_an_interrupted_evaluation_goes_on_and_gives_what_an_uninterrupted_one_gives(tmp_path):
    flags = "--limit 6 --batch 2 --samples 2 --max-new-tokens 110 --out"
    out, _ = run("evaluate.py", flags, tmp_path / "whole")
    whole = (tmp_path / "whole/predictions.jsonl").read_text()
    assert "| all | 6 |" in out and (tmp_path / "whole/examples.png").stat().st_size > 10_000
    cut = tmp_path / "cut"
    cut.mkdir()
    config = json.loads((tmp_path / "whole/config.json").read_text()) | {"out": str(cut)}
    (cut / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (cut / "part-0.jsonl").write_text(
        whole[: whole.index("\n", whole.index("\n") + 1) + 40]
    )  # two lines, a torn one
    run("evaluate.py", flags, cut)
    assert (cut / "predictions.jsonl").read_text() == whole and not list(cut.glob("part-*"))
    _, error = run("evaluate.py --seed 1", flags, cut, check=2)
    assert "other flags" in error
    assert all(
        0 <= v <= 1
        for row in rows(tmp_path / "whole/predictions.jsonl")
        for v in row["dice"].values()
    )


def rank_1_is_late():
    if os.environ["RANK"] == "1":
        load = crm_module.load_crm
        crm_module.load_crm = lambda *args, **more: (time.sleep(6), load(*args, **more))[1]


def test_a_late_rank_neither_loses_nor_doubles_a_question(tmp_path):
    """Once a rank that loaded slowly saw the other's lines as done, and 12 questions gave 9 rows."""
    flags = "--asm none --limit 7 --batch 1 --max-new-tokens 8 --out"
    run("evaluate.py", flags, tmp_path / "one")
    scripts = ranks(2, "evaluate.py", flags, tmp_path / "two", before=rank_1_is_late)
    said = [script.communicate() for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0], said
    assert (tmp_path / "two/predictions.jsonl").read_text() == (
        tmp_path / "one/predictions.jsonl"
    ).read_text()


@pytest.mark.parametrize(
    "indexes, says",
    [
        ([0, 1, 1], "1 of 3 questions are missing, 1 are there twice"),
        ([0, 1, 2, 2], "0 of 3 questions are missing, 1 are there twice"),
    ],
)
def test_an_evaluation_that_is_not_exactly_complete_is_an_error(tmp_path, indexes, says):
    (tmp_path / "part-0.jsonl").write_text(
        "".join(json.dumps({"index": i}) + "\n" for i in indexes)
    )
    found = predictions.finished(tmp_path)
    with pytest.raises(ValueError, match=says):
        predictions.in_order(found, 3, tmp_path)
    assert predictions.in_order(found[1::-1], 2, tmp_path) == found[:2]


def test_masks_need_the_parts_they_are_made_from_and_are_kept():
    sample = load_samples("demo/data", "test")[0]
    asm = evaluate.load_asm(str(ROOT / "demo/asm"), "cpu")
    perfect = {
        "text": "",
        "bbox": list(sample.bbox),
        "points": [list(p) for p in sample.points],
        "problem": "",
    }

    def masked(completion):
        return evaluate.add_masks(
            {"completions": [completion], "kept": 0, "truth": {}}, sample, asm
        )

    found = masked(perfect)
    assert set(found["dice"]) == {"points", "box", "one", "both"} and found["dice"]["both"] > 0.6
    assert (decode_mask(found["truth"]["mask"]) == sample.mask).all()
    assert evaluate.mask_dice(decode_mask(found["mask"]), sample.mask) == found["dice"]["both"]
    boxless = masked(perfect | {"bbox": None})["dice"]
    assert boxless["box"] == 0 and boxless["points"] == found["dice"]["points"] == boxless["both"]
    nothing = masked(NO_MASK)
    assert nothing["mask"] is None and set(nothing["dice"].values()) == {0}
    assert masked(perfect | {"bbox": [-1e6, -1e6, 1e6, 1e6]})["mask"]  # clipped for the segmenter


def test_each_kind_of_mask_is_made_of_its_own_parts_of_the_kept_completion():
    sample, asked = few(1)[0], []

    class Asked:
        def segment(self, image, boxes, points):
            asked.append((boxes, points))
            return np.zeros((1, *image.shape[:2]), bool), np.ones(1)

    kept = {"text": "", "bbox": (10, 10, 20, 20), "points": ((12, 12), (18, 18)), "problem": ""}
    other = kept | {"bbox": (0, 0, 50, 50)}
    evaluate.add_masks({"completions": [other, kept], "kept": 1, "truth": {}}, sample, Asked())
    box, both = [(10, 10, 20, 20)], [((12, 12), (18, 18))]
    assert asked == [
        (None, both),
        (box, None),
        (box, [((12, 12),)]),
        (box, both),
    ]  # points, box, one, both


def test_examples_show_every_question_once_with_a_legend(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(pictures, "draw_example", lambda axis, p, sample: shown.append(p["index"]))
    pictures.examples(
        [line(i, [[0, 0, 10, 1 + i]]) for i in range(30)], few(30), tmp_path / "e.png"
    )
    quality = [(1 + i) / 10 if i < 10 else 10 / (1 + i) for i in shown]
    assert len(shown) == len(set(shown)) == 12 and quality == sorted(quality)
    assert quality[0] == 0.1 and quality[-1] == 1
    shown.clear()
    pictures.examples(
        [line(i, [None, [0, 0, 9, 9]][i : i + 1]) for i in range(2)], few(2), tmp_path / "e.png"
    )
    assert shown == [0, 1] and (tmp_path / "e.png").stat().st_size > 1000


class Kept(pictures.Figure):
    """A figure that can still be looked at once it has been written."""

    written = []

    def savefig(self, *args, **options):
        super().savefig(*args, **options)
        self.written.append(self)


@pytest.mark.parametrize("n, size", [(1, (30, 200)), (12, (100, 80))])
def test_examples_show_the_question_and_the_whole_legend_however_narrow_the_image(
    tmp_path, monkeypatch, n, size
):
    monkeypatch.setattr(pictures, "Figure", Kept)
    asked = (
        "What could the oval on the left be, which costs $5 at the back and which a $ hides from nobody "
        + "at all " * 20
    )
    pictures.examples(
        [line(i, [[0, 0, 10, 10]]) | {"query": asked} for i in range(n)],
        few(n, size),
        tmp_path / "e.png",
    )
    figure = Kept.written.pop()
    legend, titles = (
        figure.legends[0].get_window_extent(),
        [axis.get_title() for axis in figure.axes],
    )
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width and 0 <= legend.y0
    assert all(
        title.startswith("What could the oval") and title.endswith("…\na, IoU 1.00")
        for title in titles
    )
    assert all(
        0 <= axis.title.get_window_extent().x0
        and axis.title.get_window_extent().x1 <= figure.bbox.width
        for axis in figure.axes
    )


def test_curves_name_only_what_has_been_logged(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "Figure", Kept)
    pictures.curves(
        tmp_path / "c.png",
        [{"step": 1, "sampled/iou": 0.5, "sampled/named": None}],
        {"held out": ["sampled/iou", "sampled/named"], "KL": ["kl"]},
    )
    first, second = Kept.written.pop().axes
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "sampled/iou"
    ] and second.get_legend() is None


def test_the_interval_of_fewer_than_five_questions_is_a_dash():
    def cells(n):
        summary = tables.summarise([line(i, [[0, 0, 5 + i, 10]]) for i in range(n)], METRICS)
        return tables.table(summary, METRICS).splitlines()[4].split(" | ")

    assert cells(4)[1:3] == ["4", "65.0 [–]"] and cells(5)[1:3] == ["5", "70.0 [58.0, 82.0]"]


def test_a_row_that_does_not_fit_its_image_is_refused_before_anything_is_written(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    noise_image(60, 40).save(tmp_path / "data/images/a.png")
    noise_image(50, 40).save(tmp_path / "data/masks/a.png")
    (tmp_path / "data/samples.jsonl").write_text(
        json.dumps({"image": "a.png", "mask": "a.png", "query": "?", "split": "test"})
    )
    _, error = run(
        "evaluate.py --asm none --data", tmp_path / "data", "--out", tmp_path / "out", check=2
    )
    assert "line 1, mask: is 50x40, its image 60x40; fix the row or use --skip-bad-rows" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
