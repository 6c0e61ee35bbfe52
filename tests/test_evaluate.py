"""evaluate.py: numbers by hand, interruptions, late ranks, what tells two evaluations apart."""

import json
import os
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import Script, noise_image, ranks
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

import crm as crm_module
import evaluate
import metrics
from asm import load_asm
from data import EMBEDDED, Example, Examples, load_samples
from metrics import decode_mask, encode_mask
from runtime.files import read_jsonl
from runtime.parallel import Ranks

REFUSAL = {"bbox": None, "points": None, "text": "", "problem": "no answer block"}
BOX = (10, 10, 20, 20)
PAIR = ((12, 12), (18, 18))


def run(*command, check=0):
    """A script in a process of its own -> (stdout, stderr). Its exit status must be `check`."""
    script = Script(*command)
    out, error = script.communicate(timeout=400)
    assert script.returncode == check, (command, script.returncode, out[-2000:], error[-3000:])
    return out, error


def line(i, bboxes, truth=(0, 0, 10, 10), points=None, **more):
    """A prediction, with a completion for each box; None: a refusal."""
    completions = []
    for bbox in bboxes:
        completion = REFUSAL
        if bbox is not None:
            completion = {"text": "", "bbox": bbox, "points": points, "problem": ""}
        completions.append(completion)
    usable = [k for k, bbox in enumerate(bboxes) if bbox is not None]
    p = {
        "id": str(i),
        "index": i,
        "size": [100, 100],
        "image": f"image {i}",
        "supercategory": "A",
        "category": "a",
        "wording": None,
        "names": [],
        "query": "?",
        "truth": {"bbox": list(truth), "points": [[2, 2], [8, 8]], "mask": None},
        "asked": ["bbox", "points"],
        "completions": completions,
        "kept": usable[0] if usable else None,
        "dice": None,
        "mask": None,
    }
    return p | more


def save(folder, lines):
    folder.mkdir()
    text = "".join(json.dumps(row) + "\n" for row in lines)
    (folder / "predictions.jsonl").write_text(text)
    return folder


class Few(list):
    """Examples in memory, as load_samples gives them."""

    def ids(self):
        return [example.id for example in self]


def few(n=2, size=(100, 80)):
    return Few(Example(f"q{i}", noise_image(*size, i), "?", BOX, PAIR) for i in range(n))


# ---------------------------------------------------------------- tables of predictions


def test_tables_of_a_hand_made_file_equal_numbers_by_hand(tmp_path):
    dice = {"points": 0.5, "box": 0.25, "one": 0.75, "both": 1.0}
    no_dice = dict.fromkeys(dice, 0.0)
    other = {"supercategory": "B", "category": "b"}
    lines = [
        line(0, [[0, 0, 10, 10]], points=[[2, 2], [8, 8]], dice=dice),  # IoU 1, pDice 1
        line(1, [[0, 0, 5, 10]], **other),  # IoU 0.5
        line(2, [[20, 20, 30, 30]], **other, dice=no_dice),  # IoU 0
        line(3, [None], dice=no_dice),
    ]
    folder = save(tmp_path / "e", lines)
    out, _ = run("evaluate.py --rescore", folder)
    summary = json.loads((folder / "summary.json").read_text())
    whole = summary["all"]
    means = {name: whole[name]["mean"] for name in metrics.METRICS if whole[name] is not None}
    assert means == pytest.approx(
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
    assert whole["n"] == 4
    assert whole["iou_parsed"]["n"] == 3
    assert whole["dice_box"]["n"] == 3
    assert whole["named"] is None
    assert summary["supercategory"]["B"]["iou"]["mean"] == 0.25
    assert summary["category"]["a"]["n"] == 2
    assert summary["refusals"] == {"no answer block": 1}
    text = (folder / "table.md").read_text()
    for cell in ("| all | 4 | 37.5 [–]", "- 1 × no answer block", "| B | 2 | 25.0 [–]"):
        assert cell in text
    for absent in ("named", "voted"):
        assert absent not in text
    assert "| all | 4 |" in out


def test_a_new_metric_is_one_line_and_rescores_an_old_run_from_its_masks(
    tmp_path, monkeypatch, capsys
):
    mask = np.zeros((20, 30), bool)
    mask[2:9, 3:8] = True
    truth = np.zeros((20, 30), bool)
    truth[2:9, 5:11] = True
    row = line(0, [[3, 2, 8, 9]], mask=encode_mask(mask))
    row["truth"]["mask"] = encode_mask(truth)
    folder = save(tmp_path / "e", [row])

    def area(p):
        return float(decode_mask(p["mask"]).sum() / decode_mask(p["truth"]["mask"]).sum())

    monkeypatch.setitem(metrics.METRICS, "area", ("area", area))
    evaluate.main(evaluate.Config(rescore=str(folder)))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["all"]["area"]["mean"] == 35 / 42
    assert "| area |" in capsys.readouterr().out


def test_2500_predictions_score_in_20_seconds_without_a_model(tmp_path):
    dice = {"points": 0.1, "box": 0.2, "one": 0.2, "both": 0.3}
    lines = []
    for i in range(2500):
        names = {"supercategory": f"S{i % 15}", "category": f"c{i % 108}"}
        lines.append(line(i, [[0, 0, 5 + i % 5, 10]], **names, dice=dice))
    folder = save(tmp_path / "e", lines)
    start = time.perf_counter()
    summary = metrics.report(metrics.read_predictions(folder), folder)
    assert time.perf_counter() - start < 20
    assert summary["all"]["iou"]["mean"] == pytest.approx(0.7)


# ---------------------------------------------------------------- --compare


def test_compare_pairs_the_questions_and_names_those_in_only_one(tmp_path):
    a = save(tmp_path / "a", [line(i, [[0, 0, 5, 10]]) for i in range(30)])
    b = save(tmp_path / "b", [line(i, [[0, 0, 10, 10]]) for i in reversed(range(30))])
    out, _ = run("evaluate.py --compare", a, b)
    assert "IoU                   50.0 -> 100.0   +50.0 [+50.0, +50.0]" in out
    c = save(tmp_path / "c", [line(i, [[0, 0, 5, 10]]) for i in range(29)])
    _, error = run("evaluate.py --compare", a, c, check=2)
    assert "1 questions are in only one, the first is 29" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "change, says",
    [
        ({"truth": {"bbox": [0, 0, 10, 11], "points": [[2, 2], [8, 8]]}}, "its truth differs"),
        ({"truth": {"bbox": [0, 0, 10, 10], "points": [[2, 2], [8, 9]]}}, "its truth differs"),
        ({"query": "!"}, "its query differs"),
        ({"image": "another"}, "its image differs"),
    ],
)
def test_compare_does_not_pair_questions_of_different_data(tmp_path, change, says):
    a = save(tmp_path / "a", [line(i, [[0, 0, 5, 10]]) for i in range(6)])
    lines = [line(i, [[0, 0, 5, 10]]) for i in range(6)]
    lines[4] |= change
    b = save(tmp_path / "b", lines)
    with pytest.raises(ValueError, match=f"question 4: {says}"):
        metrics.compare(metrics.read_predictions(a), metrics.read_predictions(b))


def test_compare_takes_an_evaluation_with_masks_and_one_without(tmp_path):
    before = [line(i, [[0, 0, 5, 10]]) for i in range(6)]
    after = [line(i, [[0, 0, 10, 10]]) for i in range(6)]
    for p in after:
        p["truth"]["mask"] = encode_mask(np.ones((2, 2), bool))
    lines = metrics.compare(before, after)
    assert "50.0 -> 100.0" in lines[0]


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "no predictions.jsonl"),
        ("", "empty, or of an older version"),
        ('{"id": "a"}\n', "empty, or of an older version"),
        ('{"completions": []}\n{"id"\n', "predictions.jsonl, line 2: not JSON"),
        ("[1]\n", "predictions.jsonl, line 1: not a JSON object"),
    ],
)
def test_a_folder_without_predictions_is_one_line_and_status_2(tmp_path, capsys, text, says):
    if text is not None:
        (tmp_path / "predictions.jsonl").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(evaluate.Config(rescore=str(tmp_path)))
    said = capsys.readouterr().err
    assert said.startswith("error:")
    assert says in said
    assert said.count("\n") == 1


# ---------------------------------------------------------------- a model's completions


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of two completions for each of six embedded questions."""
    folder = tmp_path_factory.mktemp("evaluate") / "all"
    out, _ = run("evaluate.py", SIX, folder)
    return folder, out


SIX = "--limit 6 --batch 2 --completions 2 --max-new-tokens 110 --out"


def test_an_evaluation_writes_a_table_a_picture_and_masks(evaluated):
    folder, out = evaluated
    assert "| all | 6 |" in out
    assert (folder / "examples.png").stat().st_size > 10_000
    assert not list(folder.glob("part-*"))
    for row in read_jsonl(folder / "predictions.jsonl"):
        assert len(row["completions"]) == 2
        assert all(0 <= value <= 1 for value in row["dice"].values())


def test_an_interrupted_evaluation_goes_on_and_gives_what_an_uninterrupted_one_gives(
    tmp_path, evaluated
):
    folder, _ = evaluated
    text = (folder / "predictions.jsonl").read_text()
    cut = tmp_path / "cut"
    cut.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"out": str(cut)}
    (cut / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    two_lines = text.index("\n", text.index("\n") + 1) + 1
    (cut / "part-0.jsonl").write_text(text[: two_lines + 40])  # and a torn one
    run("evaluate.py", SIX, cut)
    assert (cut / "predictions.jsonl").read_text() == text
    assert not list(cut.glob("part-*"))
    _, error = run("evaluate.py --seed 1", SIX, cut, check=2)
    assert "an evaluation with other flags is in there; give another --out" in error
    assert (cut / "predictions.jsonl").read_text() == text


def rank_1_is_late():
    if os.environ["RANK"] != "1":
        return
    load = crm_module.load_crm

    def load_late(*args, **more):
        time.sleep(6)
        return load(*args, **more)

    crm_module.load_crm = load_late


def test_a_late_rank_neither_loses_nor_doubles_a_question(tmp_path):
    """A rank that loaded slowly once saw the other's lines as done: 12 questions gave 9 rows."""
    flags = "--asm none --limit 7 --batch 1 --max-new-tokens 8 --out"
    run("evaluate.py", flags, tmp_path / "one")
    scripts = ranks(2, "evaluate.py", flags, tmp_path / "two", before=rank_1_is_late)
    said = [script.communicate() for script in scripts]
    assert [script.returncode for script in scripts] == [0, 0], said
    two = (tmp_path / "two/predictions.jsonl").read_text()
    assert two == (tmp_path / "one/predictions.jsonl").read_text()


@pytest.mark.parametrize(
    "indexes, says",
    [
        ([0, 1, 1], "1 of 3 questions are missing, 1 are there twice"),
        ([0, 1, 2, 2], "0 of 3 questions are missing, 1 are there twice"),
    ],
)
def test_an_evaluation_that_is_not_exactly_complete_is_an_error(tmp_path, indexes, says):
    text = "".join(json.dumps({"index": i}) + "\n" for i in indexes)
    (tmp_path / "part-0.jsonl").write_text(text)
    found = evaluate.finished(tmp_path)
    with pytest.raises(ValueError, match=says):
        evaluate.in_order(found, 3, tmp_path)
    assert evaluate.in_order(found[1::-1], 2, tmp_path) == found[:2]


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--crm nowhere/at/all", "nowhere/at/all"),
        ("--crm demo/data", "--crm demo/data: no folder with a config.json there"),
        ("--asm nowhere", "nowhere"),
        ("--data nowhere", "--data nowhere"),
        ("--split none", "no sample in split 'none'"),
        ("--prompt nowhere", "--prompt nowhere"),
        ("--resize square:3", "--resize square:3"),
        ("--samples 4", "--samples has moved: it is called --completions"),
        ("--predictions p.jsonl", "--predictions has moved: python -m extras.predictions"),
        ("--oracle", "--oracle has moved: python -m extras.oracle"),
    ],
)
def test_a_flag_that_does_not_fit_is_one_line_and_nothing_is_written(tmp_path, flags, says):
    _, error = run("evaluate.py", flags, "--limit 1 --out", tmp_path / "out", check=2)
    assert error.startswith("error:")
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_row_that_does_not_fit_its_image_is_an_error_before_anything_is_written(tmp_path):
    data = own_data(tmp_path / "data")
    noise_image(50, 40).save(data / "masks/a.png")
    _, error = run("evaluate.py --asm none --data", data, "--out", tmp_path / "out", check=2)
    assert "line 1, mask: is 50x40, its image 60x40; fix the row or use --skip-bad-rows" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- other weights, other data


def own_data(folder, left=10):
    """A data set of one question about a square."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    noise_image(60, 40).save(folder / "images/a.png")
    draw_mask(folder, left)
    write_rows(folder, query="?")
    return folder


def draw_mask(folder, left):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, left : left + 10] = 255
    Image.fromarray(mask).save(folder / "masks/a.bmp")  # of one size, whatever is in it
    Image.fromarray(mask).save(folder / "masks/a.png")


def write_rows(folder, **fields):
    row = {"image": "a.png", "mask": "a.png", "split": "test", "id": "a"} | fields
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")


def own_crm(folder):
    return shutil.copytree(EMBEDDED["crm"], folder)


def change_weights(crm, data):
    file = next(crm.glob("*.safetensors"))
    weights = load_file(file)
    name = min(weights)
    weights[name] = weights[name] + torch.ones_like(weights[name])
    save_file(weights, file, metadata={"format": "pt"})


def change_settings(crm, data):
    (crm / "settings.json").write_text(json.dumps({"prompt": "direct"}))


def change_question(crm, data):
    write_rows(data, query="Where?")


def change_box(crm, data):
    write_rows(data, query="?", bbox=[10, 10, 21, 20], points=[[12, 12], [18, 18]])


def move_mask(crm, data):
    draw_mask(data, left=11)


def change_image(crm, data):
    noise_image(60, 40, seed=1).save(data / "images/a.png")


@pytest.mark.parametrize(
    "change",
    [change_weights, change_settings, change_question, change_box, move_mask, change_image],
)
def test_other_weights_or_data_under_the_same_path_are_noticed(tmp_path, change):
    """Resumed by flags alone, the old numbers were printed again, or two models mixed."""
    crm = own_crm(tmp_path / "crm")
    data = own_data(tmp_path / "data")
    out = tmp_path / "out"
    claim(crm, data, out)
    claim(crm, data, out)  # nothing has changed
    change(crm, data)
    with pytest.raises(ValueError, match="the weights or the data have changed since"):
        claim(crm, data, out)


def claim(crm, data, out):
    examples = load_samples(data, "test")
    config = {"crm": str(crm), "data": str(data)}
    config["fingerprint"] = evaluate.fingerprint(evaluate.checkpoint_files(str(crm)), examples)
    evaluate.claim_folder(out, config, Ranks())


def test_an_edited_mask_of_the_same_size_is_noticed(tmp_path):
    data = own_data(tmp_path / "data")
    write_rows(data, query="?", mask="a.bmp")
    before = evaluate.fingerprint([], load_samples(data, "test"))
    size = (data / "masks/a.bmp").stat().st_size
    draw_mask(data, left=12)
    assert (data / "masks/a.bmp").stat().st_size == size
    assert evaluate.fingerprint([], load_samples(data, "test")) != before


def test_a_parquet_file_has_a_fingerprint_of_its_pictures():
    examples = load_samples(EMBEDDED["data"], "test")[:2]
    same = evaluate.fingerprint([], examples)
    assert evaluate.fingerprint([], examples) == same
    first, second = examples.rows
    changed = Examples([first, second | {"mask": first["mask"]}])
    assert evaluate.fingerprint([], changed) != same


def test_the_command_notices_other_data_before_it_asks_a_model(tmp_path):
    data = own_data(tmp_path / "data")
    flags = "--asm none --max-new-tokens 4 --data"
    run("evaluate.py", flags, data, "--out", tmp_path / "out")
    table = (tmp_path / "out/table.md").read_text()
    move_mask(None, data)
    _, error = run("evaluate.py", flags, data, "--out", tmp_path / "out", check=2)
    assert "the weights or the data have changed since; give another --out" in error
    assert error.count("\n") == 1
    assert (tmp_path / "out/table.md").read_text() == table


@pytest.mark.parametrize(
    "name", ["predictions.jsonl", "summary.json", "table.md", "examples.png", "config.json"]
)
def test_files_that_no_evaluation_wrote_stay(tmp_path, name):
    (tmp_path / name).write_text('{"mine": 1}')
    config = {"crm": "a", "fingerprint": "b"}
    with pytest.raises(ValueError, match="give another --out"):
        evaluate.claim_folder(tmp_path, config, Ranks())
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_folder_with_other_files_is_used_and_they_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    evaluate.claim_folder(tmp_path, {"fingerprint": "b"}, Ranks())
    assert (tmp_path / "config.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"


# ---------------------------------------------------------------- masks of a completion


def test_masks_need_the_parts_they_are_made_from_and_are_kept():
    example = load_samples(EMBEDDED["data"], "test")[0]
    asm = load_asm(EMBEDDED["asm"], "cpu")
    points = [list(point) for point in example.points]
    perfect = {"text": "", "bbox": list(example.bbox), "points": points, "problem": ""}

    def masked(completion):
        p = {"completions": [completion], "kept": 0, "truth": {}}
        return evaluate.add_masks(p, example, asm)

    found = masked(perfect)
    assert set(found["dice"]) == {"points", "box", "one", "both"}
    assert found["dice"]["both"] > 0.6
    assert (decode_mask(found["truth"]["mask"]) == example.mask).all()
    dice = metrics.mask_dice(decode_mask(found["mask"]), example.mask)
    assert dice == found["dice"]["both"]

    boxless = masked(perfect | {"bbox": None})["dice"]
    assert boxless["box"] == 0
    assert boxless["points"] == found["dice"]["points"] == boxless["both"]

    nothing = masked(REFUSAL)
    assert nothing["mask"] is None
    assert set(nothing["dice"].values()) == {0}

    huge = masked(perfect | {"bbox": [-1e6, -1e6, 1e6, 1e6]})  # clipped for the segmenter
    assert huge["mask"] is not None


def test_without_a_segmenter_there_is_no_mask_and_no_dice():
    example = load_samples(EMBEDDED["data"], "test")[0]
    p = {"completions": [REFUSAL], "kept": None, "truth": {}}
    found = evaluate.add_masks(p, example, None)
    assert found["dice"] is None
    assert found["mask"] is None
    assert (decode_mask(found["truth"]["mask"]) == example.mask).all()


def test_each_kind_of_mask_is_made_of_its_own_parts_of_the_kept_completion():
    example = few(1)[0]
    example.mask = np.ones((80, 100), bool)
    asked = []

    class Asked:
        def segment(self, image, boxes, points):
            asked.append((boxes, points))
            return np.zeros((1, *image.shape[:2]), bool), np.ones(1)

    kept = {"text": "", "bbox": BOX, "points": PAIR, "problem": ""}
    other = kept | {"bbox": (0, 0, 50, 50)}
    p = {"completions": [other, kept], "kept": 1, "truth": {}}
    evaluate.add_masks(p, example, Asked())
    points_alone = (None, [PAIR])
    box_alone = ([BOX], None)
    box_and_one = ([BOX], [PAIR[:1]])
    both = ([BOX], [PAIR])
    assert asked == [points_alone, box_alone, box_and_one, both]


# ---------------------------------------------------------------- examples.png


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn. They can still be looked at once they have been written."""
    drawn = []

    class KeptFigure(Figure):
        def savefig(self, *args, **options):
            super().savefig(*args, **options)
            drawn.append(self)

    monkeypatch.setattr("matplotlib.figure.Figure", KeptFigure)
    return drawn


def captions_of(figure):
    return [axis.get_title().splitlines()[-1] for axis in figure.axes]


def test_examples_show_every_question_once_from_the_worst_to_the_best(tmp_path, figures):
    lines = []
    for i in range(30):
        height = 1 + i
        p = line(i, [[0, 0, 10, height]], category=f"number {i}")
        lines.append(p)
    evaluate.draw_examples(lines, few(30), tmp_path / "e.png")
    captions = captions_of(figures.pop())
    assert len(set(captions)) == evaluate.EXAMPLES_SHOWN
    ious = [float(caption.split("IoU ")[1]) for caption in captions]
    assert ious == sorted(ious)
    assert (ious[0], ious[-1]) == (0.1, 1)


def test_examples_say_what_is_wrong_with_a_completion(tmp_path, figures):
    lines = [line(0, [None]), line(1, [[0, 0, 9, 9]])]
    evaluate.draw_examples(lines, few(2), tmp_path / "e.png")
    assert captions_of(figures.pop()) == ["a, no answer block", "a, IoU 0.81"]
    assert (tmp_path / "e.png").stat().st_size > 1000


@pytest.mark.parametrize("n, size", [(1, (30, 200)), (12, (100, 80))])
def test_examples_show_the_question_and_the_whole_legend_however_narrow_the_image(
    tmp_path, figures, n, size
):
    query = (
        "What could the oval be, which costs $5 at the back and which a $ hides " + "at all " * 30
    )
    lines = [line(i, [[0, 0, 10, 10]], query=query) for i in range(n)]
    evaluate.draw_examples(lines, few(n, size), tmp_path / "e.png")
    figure = figures.pop()
    width = figure.bbox.width
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= width
    assert legend.y0 >= 0
    assert len(figure.axes) == n
    for axis in figure.axes:
        assert axis.get_title().startswith("What could the oval")
        assert axis.get_title().endswith("…\na, IoU 1.00")
        extent = axis.title.get_window_extent()
        assert extent.x0 >= 0
        assert extent.x1 <= width


def test_help_names_every_flag_and_the_commands_that_moved():
    out, _ = run("evaluate.py --help")
    for flag in ("--crm", "--completions", "--rescore", "--compare"):
        assert flag in out
    for module in ("extras.predictions", "extras.oracle"):
        said, _ = run(f"-m {module} --help")
        assert f"python -m {module}" in said


def test_other_words_of_a_prompt_file_and_another_segmenter_are_another_evaluation(tmp_path):
    examples = load_samples("demo/data", "test")[:1]
    assert evaluate.fingerprint([], examples, "a") != evaluate.fingerprint([], examples, "b")
    assert evaluate.segmenter_files("none") == []
    in_folder = {file.name for file in evaluate.segmenter_files("demo/asm")}
    assert {"config.yaml", "model.safetensors"} <= in_folder
    (tmp_path / "m.pt").write_bytes(b"x")
    assert evaluate.segmenter_files(f"medsam:{tmp_path / 'm.pt'}") == [tmp_path / "m.pt"]


def test_flags_that_change_no_result_do_not_make_another_evaluation(tmp_path):
    config = {"crm": "a", "batch": 16, "out": "x", "fingerprint": "f"}
    evaluate.claim_folder(tmp_path, config, Ranks())
    assert evaluate.why_not_ours(tmp_path, config | {"batch": 8, "out": "./x"}) == ""
    assert "other flags" in evaluate.why_not_ours(tmp_path, config | {"crm": "b"})
