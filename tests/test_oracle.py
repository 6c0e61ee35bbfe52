"""extras/oracle.py and the IoU among siblings: a disc, a ring, two discs, nine nuclei, every number known."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image
from test_scripts import rows, run

from asm import load_asm, prompt_tokens
from data import Frame, Sample, box_from_mask, keypoints_from_mask, load_samples
from evaluate import METRICS
from extras import oracle, tables
from extras.oracle import (
    GROUPS,
    PARTS,
    WRITTEN,
    Prompt,
    deepest,
    filled,
    measure,
    measure_all,
    pieces,
    segment_all,
    split_loss,
    spread_points,
    summarise,
    table,
    true_prompts,
)
from extras.several import add_siblings
from metrics import QUESTION_METRICS, mask_dice, prediction
from runtime.cli import ROOT
from runtime.parallel import Ranks

SIDE = 120
Y, X = np.mgrid[:SIDE, :SIDE]


def disc(x, y, radius, hole=0):
    distance = np.hypot(X - x, Y - y)
    return (distance <= radius) & (distance >= hole)


DISC, RING = disc(60, 60, 30), disc(60, 60, 30, hole=15)
TWO = disc(30, 60, 20) | disc(90, 60, 20)  # of the same area
NINE = np.any([disc(20 + 40 * i, 20 + 40 * j, 9) for i in range(3) for j in range(3)], axis=0)
MASKS = {"disc": DISC, "ring": RING, "two": TWO, "nine": NINE}


def sample(mask, name="a", category="nucleus", supercategory="Histology"):
    return Sample(
        name,
        noise_image(SIDE, SIDE),
        "?",
        box_from_mask(mask),
        keypoints_from_mask(mask),
        mask,
        supercategory,
        category,
    )


class Filler:
    """A segmenter that fills a box, and gives a prompt without one the whole image."""

    calls = 0

    def segment(self, image, boxes=None, points=None):
        self.calls += 1
        shape = image.shape[:2]
        masks = (
            [filled(shape, [box]) for box in boxes]
            if boxes
            else [np.ones(shape, bool) for _ in points]
        )
        return np.array(masks), np.ones(len(masks))


class Perfect:
    """A segmenter that knows the truth: of a box what of it is inside, of points the pieces that they lie on."""

    def __init__(self, truth):
        self.truth = truth

    def segment(self, image, boxes=None, points=None, negative=0):
        masks = []
        for i in range(len(boxes or points)):
            hit = [
                part
                for part in pieces(self.truth)
                if points and any(part[int(y), int(x)] for x, y in points[i])
            ]
            masks.append(
                self.truth & filled(self.truth.shape, [boxes[i]]) if boxes else np.any(hit, axis=0)
            )
        return np.array(masks), np.ones(len(masks))


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("name, count", [("disc", 1), ("ring", 1), ("two", 2), ("nine", 9)])
def test_pieces_are_counted_and_make_up_the_mask(name, count):
    found = pieces(MASKS[name])
    assert len(found) == count and (np.any(found, axis=0) == MASKS[name]).all()


def test_pieces_come_by_area_touch_at_corners_and_specks_are_left_out():
    mask = np.zeros((40, 40), bool)
    mask[2:6, 2:6] = mask[20:30, 20:30] = mask[30:32, 30:32] = True  # 16; 100 with 4 at its corner
    mask[0, 39] = mask[35:38, 0:5] = True  # 1 and 15 pixels
    assert [part.sum() for part in pieces(mask)] == [104, 16]
    assert [part.sum() for part in pieces(np.eye(3, dtype=bool))] == [3]  # all of it is a speck


def test_points_are_deep_inside_apart_and_nested():
    assert deepest(DISC) == (60, 60)
    points = spread_points(DISC, pieces(DISC), 8)
    assert (
        points[0] == (60, 60)
        and len(set(points)) == 8
        and all(DISC[int(y), int(x)] for x, y in points)
    )
    # the second is where the depth 30 - r equals the distance r to the first
    assert math.hypot(points[1][0] - 60, points[1][1] - 60) == pytest.approx(15, abs=1)
    assert {x for x, _ in spread_points(TWO, pieces(TWO), 2)} == {30, 90}
    nine = spread_points(NINE, pieces(NINE), 8)
    assert len(set(nine)) == 8 and {v for point in nine for v in point} == {20, 60, 100}
    dot = np.zeros((5, 5), bool)
    dot[2, 3] = True
    assert spread_points(dot, pieces(dot), 4) == ((3, 2),) * 4


def test_the_point_off_the_target_is_in_the_box_and_not_in_the_mask():
    (ring,) = true_prompts(sample(RING))["box, 2 points, 1 off"]
    assert ring.points[2] == (60, 60) and ring.negative == 1  # the hole
    (two,) = true_prompts(sample(TWO))["box, 2 points, 1 off"]
    assert abs(two.points[2][0] - 60) <= 1  # between them
    whole = np.ones((20, 20), bool)
    (full,) = true_prompts(Sample("a", None, "?", (0, 0, 20, 20), ((5, 5), (15, 15)), whole))[
        "box, 2 points, 1 off"
    ]
    assert full.negative == 0 and len(full.points) == 2  # a full box has none


def test_a_filled_box_is_its_pixels():
    assert (
        filled((4, 5), [(1, 1, 3, 4)]).sum() == 6
        and filled((4, 5), [(1, 1, 3, 4), (2, 0, 5, 2)]).sum() == 11
    )
    assert (
        filled((4, 5), [(-9, -9, 99, 99)]).all()
        and not filled((4, 5), [(0.6, 0.6, 1.4, 1.4)]).any()
    )


# ---------------------------------------------------------------- Dice of true prompts


def test_every_dice_of_a_perfect_segmenter():
    def of(mask):
        return measure(Perfect(mask), sample(mask))["dice"]

    assert set(of(DISC).values()) == set(of(RING).values()) == {1.0}
    two = of(TWO)
    assert two["1 point"] == two["a box each, 1 piece"] == pytest.approx(2 / 3)
    assert (
        two["2 points"]
        == two["box"]
        == two["a box each, 2 pieces"]
        == two["a box and a point each, all"]
        == 1
    )
    nine = of(NINE)
    for k in (1, 2, 4, 8):
        s = "s" * (k > 1)
        assert (
            nine[f"{k} point{s}"]
            == nine[f"a box each, {k} piece{s}"]
            == pytest.approx(2 * k / (9 + k))
        )
    assert nine["a box each, all"] == nine[WRITTEN] == 1


def test_the_prompt_merely_filled_and_what_a_segmenter_that_fills_adds_to_it():
    for name, mask in MASKS.items():
        row = measure(Filler(), sample(mask))
        fill = mask.sum() / np.prod(np.subtract(box_from_mask(mask)[2:], box_from_mask(mask)[:2]))
        assert row["fill"] == pytest.approx(fill) and row["filled"]["box"] == pytest.approx(
            2 * fill / (1 + fill)
        )
        assert row["area"] == mask.mean() and row["pieces"] == len(pieces(mask)), name
        for geometry, value in row["filled"].items():
            assert row["dice"][geometry] == value
        assert row["dice"]["1 point"] == pytest.approx(2 * mask.mean() / (1 + mask.mean()))
    assert measure(Filler(), sample(DISC))["fill"] == pytest.approx(math.pi / 4, abs=0.03)
    one, nine = measure(Filler(), sample(disc(20, 20, 9))), measure(Filler(), sample(NINE))
    assert nine["filled"]["a box each, all"] == pytest.approx(
        one["filled"]["box"]
    )  # of nine as of one
    assert nine["filled"]["box"] < 0.6 < 0.8 < nine["filled"]["a box each, all"]


def test_a_segmenter_that_takes_no_points_off_the_target_is_not_given_any():
    assert "box, 2 points, 1 off" not in measure(Filler(), sample(DISC))["dice"]
    assert "box, 2 points, 1 off" in measure(Perfect(DISC), sample(DISC))["dice"]


def test_prompts_of_one_form_are_one_batch_and_equal_ones_are_drawn_once():
    asm = Filler()
    measure(asm, sample(NINE))
    assert asm.calls == 7  # boxes alone, with 1 and with 2 points; 1, 2, 4 and 8 points
    asm.calls = 0
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    masks = segment_all(asm, image, [Prompt((0, 0, 5 + i % 100, 5)) for i in range(130)])
    assert len(masks) == 100 and asm.calls == 2


def test_batches_give_the_masks_of_single_prompts_and_a_point_off_the_target_counts():
    asm, case = load_asm(ROOT / "demo/asm", "cpu"), load_samples("demo/data", "test")[4]
    image, prompts = (
        np.asarray(case.image),
        [p for several in true_prompts(case).values() for p in several],
    )
    masks = segment_all(asm, image, prompts)
    for prompt in prompts:
        points = [prompt.points] if prompt.points else None
        (alone,), _ = asm.segment(image, prompt.box and [prompt.box], points, prompt.negative)
        assert mask_dice(masks[prompt], alone) > 0.999
    coords, labels = prompt_tokens(
        [prompts[0].box], [[(1, 2), (3, 4), (5, 6)]], image.shape[:2], 128, negative=2
    )
    assert labels.tolist() == [[2, 3, 1, 0, 0]] and coords.shape == (1, 5, 2)
    points = [[prompts[0].box[:2], case.points[0]]]
    on, off = (asm.logits(image, [prompts[0].box], points, negative=n)[0] for n in (0, 1))
    assert not torch.allclose(on, off)


# ---------------------------------------------------------------- whose loss it is


def answered(sample, bbox, points=None, asked=("bbox", "points")):
    p = prediction(sample, 0, ["x"], Frame((SIDE, SIDE), (SIDE, SIDE)))
    p["completions"][0] |= {"bbox": bbox, "points": points, "problem": ""}
    return add_siblings([p | {"asked": list(asked)}])[0]


def test_the_parts_by_hand():
    """Two discs; the CRM boxes the left one only. A segmenter that knows the truth leaves it all to the CRM."""
    two = sample(TWO)
    row = measure(Perfect(TWO), two, answered(two, (10, 40, 51, 81), ((30, 60), (30, 60))))
    assert row["crm"] == pytest.approx(2 / 3)
    assert split_loss(row, "a box each, all") == pytest.approx(
        {"loss": 1 / 3, "segmenter": 0, "geometry": 0, "crm": 1 / 3}
    )
    # one that fills: the gap between the discs is geometry, the corners are its own, a refusal is the CRM's
    row = measure(Filler(), two, answered(two, None))
    best, box = row["filled"]["a box each, all"], row["filled"]["box"]
    assert split_loss(row, "a box each, all") == pytest.approx(
        {"loss": 1, "segmenter": 1 - best, "geometry": best - box, "crm": box}
    )
    assert best == pytest.approx(2 * (math.pi / 4) / (1 + math.pi / 4), abs=0.03) and box < best


def test_a_perfect_crm_has_no_part_and_a_box_alone_is_compared_with_the_true_box():
    disc_ = sample(DISC)
    row = measure(Filler(), disc_, answered(disc_, disc_.bbox, disc_.points))
    assert split_loss(row, "box")["crm"] == 0 and row["iou"] == 1
    row = measure(Filler(), disc_, answered(disc_, disc_.bbox, asked=["bbox"]))
    assert row["written"] == "box" and split_loss(row, "box")["crm"] == 0
    huge = measure(
        Filler(), disc_, answered(disc_, (-1e5, -1e5, 1e5, 1e5))
    )  # clipped: the whole image
    assert huge["crm"] == row["dice"]["1 point"]


def noisy_rows(count, seed, kinds=("A", "B")):
    rng = np.random.default_rng(seed)
    names = list(true_prompts(sample(DISC)))
    return [
        {
            "id": str(i),
            "supercategory": kinds[i % len(kinds)],
            "category": f"c{i % 4}",
            "pieces": 1 + i % 20,
            "fill": 0.5,
            "area": 0.1,
            "dice": dict(zip(names, rng.random(len(names)))),
            "filled": {"box": rng.random()},
            "written": WRITTEN,
            "crm": rng.random(),
            "iou": rng.random(),
            "iou_several": None,
            "iou_any": None,
            "iou_luck": None,
        }
        for i in range(count)
    ]


def test_the_three_parts_sum_to_one_minus_dice_everywhere():
    summary = summarise(noisy_rows(200, 0), noisy_rows(100, 1))
    parts = [summary["all"], *(part for key in GROUPS for part in summary[key].values())]
    assert (
        len(parts) == 1 + 2 + 4 + 5 and sum(part["n"] for part in summary["pieces"].values()) == 200
    )
    for part in parts:
        mean = {key: value["mean"] for key, value in part["split"].items()}
        assert abs(mean["segmenter"] + mean["geometry"] + mean["crm"] - mean["loss"]) < 1e-9
        assert part["split"]["crm"]["low"] < mean["crm"] < part["split"]["crm"]["high"]


def test_the_best_geometry_is_chosen_on_the_other_questions_and_never_on_these():
    others, asked = noisy_rows(60, 1), noisy_rows(60, 0)
    for row in asked:
        row["dice"]["8 points"] = 1.0  # the best here
    for row in others:
        row["dice"]["4 points"] = 0.9  # the best there
        row["dice"]["box"] = 0.0 if row["supercategory"] == "A" else 1.0  # but for group B
    summary = summarise(asked, others)
    assert summary["all"]["best"] == summary["supercategory"]["A"]["best"] == "4 points"
    assert (
        summary["supercategory"]["B"]["best"] == "box"
        and summary["supercategory"]["B"]["chosen_on"] == 30
    )
    few = summarise(asked, others[:18])["supercategory"]["B"]  # nine of B are too few
    assert few["chosen_on"] == 18
    alone = summarise(asked, [])
    assert alone["all"]["best"] is None and not alone["all"]["split"]
    assert "Not split" in table(alone, 0) and "segmenter" not in table(alone, 0)


def test_what_a_table_shows():
    text = table(summarise(noisy_rows(40, 0), noisy_rows(40, 1)), 3)
    assert (
        "40 questions; 3 without a mask" in text
        and "| 1 - Dice | segmenter | geometry | CRM |" in text
    )
    assert "| 17 pieces or more | 8 | 18.5 | 50 | 10.0 |" in text and "sibling" not in text
    assert text.index("2-3 pieces") < text.index("4-8 pieces") < text.index("9-16 pieces")


def test_samples_without_masks_are_left_out():
    whole, none = sample(DISC), sample(DISC)
    none.mask = None
    assert [row["id"] for row in measure_all(Filler(), [none, whole], Ranks())] == ["a"]


# ---------------------------------------------------------------- siblings


def among(bboxes, answers, **change):
    """Predictions for targets in one image, each answered with a box."""
    found = []
    for i, (bbox, answer) in enumerate(zip(bboxes, answers)):
        case = Sample(
            str(i), noise_image(SIDE, SIDE), "?", bbox, ((1, 1), (2, 2)), category="nucleus"
        )
        found.append(answered(case, answer) | change)
    return add_siblings(found)


NUCLEI = [(40 * i, 40 * j, 40 * i + 20, 40 * j + 20) for j in range(3) for i in range(3)]


def score(p):
    return {key: QUESTION_METRICS[key][1](p) for key in ("iou_several", "iou_any", "iou_luck")}


def test_one_nucleus_of_nine_is_found_by_luck_in_one_of_nine():
    """A CRM that always answers the first nucleus, as well as can be."""
    scores = [score(p) for p in among(NUCLEI, [NUCLEI[0]] * 9)]
    assert scores[0] == pytest.approx({"iou_several": 1, "iou_any": 1, "iou_luck": 1 / 9})
    assert scores[5] == pytest.approx({"iou_several": 0, "iou_any": 1, "iou_luck": 1 / 9})
    assert np.mean([s["iou_several"] for s in scores]) == pytest.approx(
        np.mean([s["iou_luck"] for s in scores])
    )
    half = among(NUCLEI, [(40, 0, 60, 10)] * 9)[0]  # half of the second one
    assert score(half) == pytest.approx({"iou_several": 0, "iou_any": 0.5, "iou_luck": 0.5 / 9})
    assert score(among(NUCLEI, [None] * 9)[0]) == {"iou_several": 0, "iou_any": 0, "iou_luck": 0}


@pytest.mark.parametrize("change", [{"category": ""}, {"image": None}, {"asked": ["points"]}])
def test_without_a_category_an_image_or_a_box_there_are_no_siblings(change):
    assert score(among(NUCLEI, NUCLEI, **change)[0]) == dict.fromkeys(
        ("iou_several", "iou_any", "iou_luck")
    )


def test_other_images_other_categories_and_the_same_target_asked_again_are_no_siblings():
    one, again = among([NUCLEI[0]] * 2, [NUCLEI[1]] * 2)
    assert one["truth"]["siblings"] == again["truth"]["siblings"] == []
    other = Sample(
        "o", noise_image(SIDE, SIDE, seed=1), "?", NUCLEI[2], ((1, 1), (2, 2)), category="nucleus"
    )
    found = add_siblings(
        [one, answered(other, None), answered(sample(DISC, category="gland"), None)]
    )
    assert [p["truth"]["siblings"] for p in found] == [[], [], []]
    assert score(one)["iou_any"] is None


def test_tables_have_the_columns_where_siblings_exist_and_only_there():
    lines = [
        p | {"supercategory": "Histology", "dice": None} for p in among(NUCLEI, [NUCLEI[0]] * 9)
    ]
    text = tables.table(tables.summarise(lines, METRICS), METRICS)
    assert (
        "| IoU, of several | IoU, any sibling | IoU, by luck |" in text
        and "| 100.0 [100.0, 100.0] | 11.1 [" in text
    )
    one = [p | {"dice": None} for p in among(NUCLEI[:1], NUCLEI[:1])]
    assert "sibling" not in tables.table(tables.summarise(one, METRICS), METRICS)


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    """An evaluation of perfect predictions for six embedded questions."""
    folder = tmp_path_factory.mktemp("oracle")
    cases = load_samples("demo/data", "test")[:6]
    lines = [{"id": case.id, "bbox": case.bbox, "points": case.points} for case in cases]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    run("evaluate.py --limit 6 --predictions", folder / "p.jsonl", "--out", folder / "eval")
    return folder


def test_oracle_beside_perfect_predictions_finds_no_fault_in_them(tmp_path, perfect):
    out, _ = run("evaluate.py --limit 6 --oracle", perfect / "eval", "--out", tmp_path / "o")
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    whole, evaluated = summary["all"], rows(perfect / "eval/predictions.jsonl")
    assert whole["split"]["crm"]["mean"] == 0 and whole["n"] == whole["chosen_on"] == 6
    for name, kind in (("box", "box"), ("box, 1 point", "one"), (WRITTEN, "both")):
        assert whole["dice"][name]["mean"] == pytest.approx(
            np.mean([row["dice"][kind] for row in evaluated]), abs=2e-3
        )
    for row in summary["questions"]:
        parts = split_loss(row, whole["best"])
        assert abs(sum(parts[key] for key in PARTS if key != "loss") - (1 - row["crm"])) < 1e-9
    assert (tmp_path / "o/table.md").read_text().startswith("Percent") and "merely filled" in out
    assert "sibling" not in out
    # without predictions, and the same command again
    for _ in range(2):
        run("evaluate.py --limit 3 --oracle --out", tmp_path / "alone")
    alone = json.loads((tmp_path / "alone/summary.json").read_text())
    assert (
        set(alone["all"]["split"]) == {"loss", "segmenter", "geometry"} and alone["all"]["n"] == 3
    )


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--oracle {eval} --limit 7", "1 of 7 questions"),
        ("--oracle nowhere", "no predictions.jsonl"),
        (
            "--oracle {eval} --frame model",
            "--frame model is the frame of a file of --predictions: give that, or no --frame",
        ),
        ("--oracle --asm none", "--asm none"),
        ("--oracle --crm demo/crm", "--crm"),
        ("--oracle --predictions {file}", "--predictions"),
        ("--oracle {eval} --split train --limit 3", "3 of 3 questions"),
        ("--oracle --data nowhere", "nowhere"),
        ("--oracle --split none", "no sample in split 'none'"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(tmp_path, perfect, flags, says):
    flags = flags.format(eval=perfect / "eval", file=perfect / "p.jsonl")
    _, error = run("evaluate.py", flags, "--out", tmp_path / "o", check=2)
    assert (
        error.startswith("error:")
        and error.count("\n") == 1
        and says in error
        and not (tmp_path / "o").exists()
    )


def test_an_evaluation_in_the_folder_is_not_overwritten(perfect):
    before = (perfect / "eval/table.md").read_text()
    _, error = run("evaluate.py --limit 6 --oracle --out", perfect / "eval", check=2)
    assert "give another --out" in error and (perfect / "eval/table.md").read_text() == before


def own_data(folder, split="test", mask=True):
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    noise_image(SIDE, SIDE).save(folder / "images/a.png")
    Image.fromarray(np.uint8(TWO) * 255).save(folder / "masks/a.png")
    row = {
        "image": "a.png",
        "query": "?",
        "split": split,
        "id": "test_00000",
        "bbox": [10, 40, 111, 81],
        "points": [[30, 60], [90, 60]],
    } | ({"mask": "a.png"} if mask else {})
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_data_without_a_train_split_have_no_parts_and_data_without_masks_are_refused(tmp_path):
    out, _ = run("evaluate.py --oracle --data", own_data(tmp_path / "d"), "--out", tmp_path / "o")
    assert "Not split" in out and "| a box each, 2 pieces |" in out
    unmasked = own_data(tmp_path / "n", mask=False)
    _, error = run("evaluate.py --oracle --data", unmasked, "--out", tmp_path / "m", check=2)
    assert (
        "no sample has a mask" in error and error.count("\n") == 1 and not (tmp_path / "m").exists()
    )


def test_predictions_of_other_data_with_the_same_ids_are_refused(tmp_path, perfect):
    other = own_data(tmp_path / "d")
    _, error = run(
        "evaluate.py --oracle", perfect / "eval", "--data", other, "--out", tmp_path / "o", check=2
    )
    assert (
        "sample test_00000: the predictions are of a target in" in error
        and not (tmp_path / "o").exists()
    )


def test_two_ranks_measure_what_one_measures():
    class Two(Ranks):
        def gather(self, items):
            return items

    cases = [sample(mask, name) for name, mask in MASKS.items()]
    parts = [measure_all(Filler(), cases, Two(rank=rank, world=2)) for rank in range(2)]
    assert [row["id"] for row in parts[0]] == ["disc", "two"] and [
        row["id"] for row in parts[1]
    ] == ["ring", "nine"]
    assert sorted(parts[0] + parts[1], key=lambda row: row["id"]) == sorted(
        oracle.measure_all(Filler(), cases, Ranks()), key=lambda row: row["id"]
    )
