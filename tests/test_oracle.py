"""extras/oracle.py: a disc, a ring, two discs, nine nuclei, every number known."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import noise_image
from PIL import Image
from test_evaluate import run

from asm import load_asm, prompt_tokens
from data import (
    EMBEDDED,
    Example,
    Sizes,
    box_from_mask,
    keypoints_from_mask,
    load_samples,
)
from extras import oracle, predictions
from extras.oracle import (
    GROUPS,
    MOST_PIECES,
    PARTS,
    WRITTEN,
    MaskPrompt,
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
    takes_labels,
    true_prompts,
    written_prompts,
)
from metrics import mask_dice, prediction
from runtime.files import read_jsonl
from runtime.parallel import Ranks

SIDE = 120
Y, X = np.mgrid[:SIDE, :SIDE]


def disc(x, y, radius, hole=0):
    distance = np.hypot(X - x, Y - y)
    return (distance <= radius) & (distance >= hole)


DISC = disc(60, 60, 30)
RING = disc(60, 60, 30, hole=15)
TWO = disc(30, 60, 20) | disc(90, 60, 20)  # of the same area
CENTRES = [(20 + 40 * i, 20 + 40 * j) for i in range(3) for j in range(3)]
NINE = np.any([disc(x, y, 9) for x, y in CENTRES], axis=0)
MASKS = {"disc": DISC, "ring": RING, "two": TWO, "nine": NINE}
ONE_OFF = "box, 2 points, 1 off"


def example(mask, name="a", category="nucleus", supercategory="Histology"):
    return Example(
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
        if boxes:
            masks = [filled(shape, [box]) for box in boxes]
        else:
            masks = [np.ones(shape, bool) for _ in points]
        return np.array(masks), np.ones(len(masks))


class Perfect:
    """A segmenter that knows the truth: of a box what of it is inside, of points the pieces that
    they lie on."""

    def __init__(self, truth):
        self.truth = truth
        self.labels = []

    def segment(self, image, boxes=None, points=None, labels=None):
        self.labels.append(labels)
        masks = []
        for i in range(len(boxes or points)):
            if boxes:
                masks.append(self.truth & filled(self.truth.shape, [boxes[i]]))
            else:
                masks.append(self.pieces_under(points[i]))
        return np.array(masks), np.ones(len(masks))

    def pieces_under(self, points):
        mask = np.zeros_like(self.truth)
        for piece in pieces(self.truth):
            if any(piece[int(y), int(x)] for x, y in points):
                mask |= piece
        return mask


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("name, count", [("disc", 1), ("ring", 1), ("two", 2), ("nine", 9)])
def test_pieces_are_counted_and_make_up_the_mask(name, count):
    found = pieces(MASKS[name])
    assert len(found) == count
    assert (np.any(found, axis=0) == MASKS[name]).all()


def test_pieces_come_by_area_touch_at_corners_and_specks_are_left_out():
    mask = np.zeros((40, 40), bool)
    mask[2:6, 2:6] = True  # 16 pixels
    mask[20:30, 20:30] = True  # 100, and 4 at its corner
    mask[30:32, 30:32] = True
    mask[0, 39] = True  # a speck of 1, and one of 15
    mask[35:38, 0:5] = True
    assert [piece.sum() for piece in pieces(mask)] == [104, 16]
    assert [piece.sum() for piece in pieces(np.eye(3, dtype=bool))] == [3]  # nothing but a speck


def test_points_are_deep_inside_apart_and_nested():
    assert deepest(DISC) == (60, 60)
    points = spread_points(DISC, pieces(DISC), 8)
    assert points[0] == (60, 60)
    assert len(set(points)) == 8
    assert all(DISC[int(y), int(x)] for x, y in points)
    assert spread_points(DISC, pieces(DISC), 3) == points[:3]
    # the second is where the depth 30 - r equals the distance r to the first
    x, y = points[1]
    assert math.hypot(x - 60, y - 60) == pytest.approx(15, abs=1)
    assert {x for x, _ in spread_points(TWO, pieces(TWO), 2)} == {30, 90}
    nine = spread_points(NINE, pieces(NINE), 8)
    assert len(set(nine)) == 8
    assert {value for point in nine for value in point} == {20, 60, 100}
    dot = np.zeros((5, 5), bool)
    dot[2, 3] = True
    assert spread_points(dot, pieces(dot), 4) == ((3, 2),) * 4


def test_the_point_off_the_target_is_in_the_box_and_not_in_the_mask():
    (ring,) = true_prompts(example(RING))[ONE_OFF]
    assert ring.points_off == ((60, 60),)  # the hole
    assert len(ring.points) == 2
    (two,) = true_prompts(example(TWO))[ONE_OFF]
    ((x, _),) = two.points_off
    assert abs(x - 60) <= 1  # between them
    everything = np.ones((20, 20), bool)
    full_box = Example("a", None, "?", (0, 0, 20, 20), ((5, 5), (15, 15)), everything)
    (full,) = true_prompts(full_box)[ONE_OFF]
    assert full.points_off == ()
    assert len(full.points) == 2


def test_a_filled_box_is_its_pixels():
    assert filled((4, 5), [(1, 1, 3, 4)]).sum() == 6
    assert filled((4, 5), [(1, 1, 3, 4), (2, 0, 5, 2)]).sum() == 11
    assert filled((4, 5), [(-9, -9, 99, 99)]).all()
    assert not filled((4, 5), [(0.6, 0.6, 1.4, 1.4)]).any()


# ---------------------------------------------------------------- Dice of true prompts


def test_every_dice_of_a_perfect_segmenter():
    def dice_of(mask):
        return measure(Perfect(mask), example(mask))["dice"]

    assert set(dice_of(DISC).values()) == {1.0}
    assert set(dice_of(RING).values()) == {1.0}
    two = dice_of(TWO)
    assert two["1 point"] == two["a box each, 1 piece"] == pytest.approx(2 / 3)
    for geometry in ("2 points", "box", "a box each, 2 pieces", "a box and a point each, all"):
        assert two[geometry] == 1
    nine = dice_of(NINE)
    for k, points, some in (
        (1, "1 point", "1 piece"),
        (2, "2 points", "2 pieces"),
        (4, "4 points", "4 pieces"),
        (8, "8 points", "8 pieces"),
    ):
        assert nine[points] == pytest.approx(2 * k / (9 + k))
        assert nine[f"a box each, {some}"] == pytest.approx(2 * k / (9 + k))
    assert nine["a box each, all"] == nine[WRITTEN] == 1


@pytest.mark.parametrize("name", MASKS)
def test_what_is_measured_of_a_segmenter_that_fills(name):
    mask = MASKS[name]
    row = measure(Filler(), example(mask))
    x1, y1, x2, y2 = box_from_mask(mask)
    fill = mask.sum() / ((x2 - x1) * (y2 - y1))
    assert row["fill"] == pytest.approx(fill)
    assert row["filled"]["box"] == pytest.approx(2 * fill / (1 + fill))
    assert row["area"] == mask.mean()
    assert row["pieces"] == len(pieces(mask))
    for geometry, value in row["filled"].items():
        assert row["dice"][geometry] == value
    assert row["dice"]["1 point"] == pytest.approx(2 * mask.mean() / (1 + mask.mean()))


def test_what_boxes_of_pieces_gain_by_hand():
    assert measure(Filler(), example(DISC))["fill"] == pytest.approx(math.pi / 4, abs=0.03)
    one = measure(Filler(), example(disc(20, 20, 9)))
    nine = measure(Filler(), example(NINE))
    assert nine["filled"]["a box each, all"] == pytest.approx(one["filled"]["box"])
    assert nine["filled"]["box"] < 0.6
    assert nine["filled"]["a box each, all"] > 0.8


def test_a_segmenter_that_takes_no_labels_gets_no_points_off_the_target():
    assert not takes_labels(Filler())
    assert ONE_OFF not in measure(Filler(), example(DISC))["dice"]
    assert takes_labels(Perfect(DISC))
    assert ONE_OFF in measure(Perfect(DISC), example(DISC))["dice"]


def test_labels_are_given_with_points_off_the_target_alone_one_for_each_point():
    asm = Perfect(RING)
    measure(asm, example(RING))
    given = [labels for labels in asm.labels if labels is not None]
    assert given == [[[1, 1, 0]]]
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    prompts = [MaskPrompt(None, ((60, 40),), ((5 + i, 5), (6, 6))) for i in range(3)]
    segment_all(asm, image, prompts)
    assert asm.labels[-1] == [[1, 0, 0]] * 3


def test_prompts_of_one_form_are_one_batch_and_equal_ones_are_drawn_once():
    asm = Filler()
    measure(asm, example(NINE))
    assert asm.calls == 7  # boxes alone, with 1 and with 2 points; 1, 2, 4 and 8 points
    asm.calls = 0
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    prompts = [MaskPrompt((0, 0, 5 + i % 100, 5)) for i in range(130)]
    assert len(segment_all(asm, image, prompts)) == 100
    assert asm.calls == 2


def test_batches_give_the_masks_of_single_prompts():
    asm = load_asm(EMBEDDED["asm"], "cpu")
    case = load_samples(EMBEDDED["data"], "test")[4]
    image = np.asarray(case.image)
    prompts = [prompt for some in true_prompts(case).values() for prompt in some]
    masks = segment_all(asm, image, prompts)
    for prompt in prompts:
        boxes = None if prompt.box is None else [prompt.box]
        points = None
        labels = None
        clicks = [*prompt.points, *prompt.points_off]
        if clicks:
            points = [clicks]
            labels = [[1] * len(prompt.points) + [0] * len(prompt.points_off)]
        (alone,), _ = asm.segment(image, boxes, points, labels)
        assert mask_dice(masks[prompt], alone) > 0.999


def test_a_point_off_the_target_counts():
    asm = load_asm(EMBEDDED["asm"], "cpu")
    case = load_samples(EMBEDDED["data"], "test")[4]
    image = np.asarray(case.image)
    points = [[case.bbox[:2], case.points[0]]]
    coords, kinds = prompt_tokens([case.bbox], points, image.shape[:2], 128, [[1, 0]])
    assert kinds.tolist() == [[2, 3, 1, 0]]
    assert coords.shape == (1, 4, 2)
    on, _ = asm.logits(image, [case.bbox], points, [[1, 1]])
    off, _ = asm.logits(image, [case.bbox], points, [[1, 0]])
    assert not torch.allclose(on, off)


# ---------------------------------------------------------------- whose loss it is


def answered(case, bbox, points=None, asked=("bbox", "points")):
    """A prediction for an example, in the image frame."""
    p = prediction(case, 0, ["x"], Sizes((SIDE, SIDE), (SIDE, SIDE)))
    p["completions"][0] |= {"bbox": bbox, "points": points, "problem": ""}
    p["asked"] = list(asked)
    return p


def test_the_parts_by_hand():
    """Two discs, and the CRM boxes the left one only."""
    two = example(TWO)
    left = answered(two, (10, 40, 51, 81), ((30, 60), (30, 60)))
    row = measure(Perfect(TWO), two, left)  # a segmenter that knows the truth leaves it to the CRM
    assert row["crm"] == pytest.approx(2 / 3)
    parts = {"loss": 1 / 3, "segmenter": 0, "geometry": 0, "crm": 1 / 3}
    assert split_loss(row, "a box each, all") == pytest.approx(parts)
    # of one that fills: the gap between the discs is geometry, and corners are its own loss
    row = measure(Filler(), two, answered(two, None))  # a refusal is the CRM's
    best = row["filled"]["a box each, all"]
    box = row["filled"]["box"]
    parts = {"loss": 1, "segmenter": 1 - best, "geometry": best - box, "crm": box}
    assert split_loss(row, "a box each, all") == pytest.approx(parts)
    assert best == pytest.approx(2 * (math.pi / 4) / (1 + math.pi / 4), abs=0.03)
    assert box < best


def test_a_perfect_crm_has_no_part():
    case = example(DISC)
    row = measure(Filler(), case, answered(case, case.bbox, case.points))
    assert split_loss(row, "box")["crm"] == 0
    assert row["iou"] == 1
    assert row["written"] == WRITTEN


@pytest.mark.parametrize(
    "asked, written", [(["bbox"], "box"), (["points"], "2 points"), (["bbox", "points"], WRITTEN)]
)
def test_a_crm_is_compared_with_the_true_prompt_that_it_was_asked_for(asked, written):
    case = example(DISC)
    bbox = case.bbox if "bbox" in asked else None
    points = case.points if "points" in asked else None
    row = measure(Filler(), case, answered(case, bbox, points, asked))
    assert row["written"] == written
    assert split_loss(row, "box")["crm"] == 0
    assert (row["iou"] is None) == ("bbox" not in asked)


def test_a_crm_that_writes_several_boxes_is_compared_with_a_box_and_a_point_each():
    case = example(TWO)
    p = answered(case, case.bbox, asked=["bbox"])
    regions = [
        {"bbox": (10, 40, 51, 81), "points": None},
        {"bbox": None, "points": ((90, 60),) * 2},
    ]
    p["completions"][0]["regions"] = regions
    size = (SIDE, SIDE)
    assert written_prompts(p, size) == [
        MaskPrompt((10, 40, 51, 81)),
        MaskPrompt(None, ((90, 60), (90, 60))),
    ]
    row = measure(Perfect(TWO), case, p)
    assert row["written"] == "a box and a point each, all"
    assert row["crm"] == 1


def test_coordinates_far_outside_are_clipped():
    case = example(DISC)
    huge = measure(Filler(), case, answered(case, (-1e5, -1e5, 1e5, 1e5)))
    assert huge["crm"] == huge["dice"]["1 point"]  # the whole image
    assert written_prompts(answered(case, None), (SIDE, SIDE)) == []


def noisy_rows(count, seed, kinds=("A", "B")):
    rng = np.random.default_rng(seed)
    geometries = list(true_prompts(example(DISC)))
    rows = []
    for i in range(count):
        row = {
            "id": str(i),
            "image": f"image {i}",
            "supercategory": kinds[i % len(kinds)],
            "category": f"c{i % 4}",
            "pieces": 1 + i % 20,
            "fill": 0.5,
            "area": 0.1,
            "dice": dict(zip(geometries, rng.random(len(geometries)))),
            "filled": {"box": rng.random()},
            "written": WRITTEN,
            "crm": rng.random(),
            "iou": rng.random(),
        }
        rows.append(row)
    return rows


def test_the_three_parts_sum_to_one_minus_dice_everywhere():
    summary = summarise(noisy_rows(200, 0), noisy_rows(100, 1))
    parts = [summary["all"]]
    for key in GROUPS:
        parts += summary[key].values()
    assert len(parts) == 1 + 2 + 4 + 5
    assert sum(part["n"] for part in summary["pieces"].values()) == 200
    for part in parts:
        mean = {key: found["mean"] for key, found in part["split"].items()}
        assert abs(mean["segmenter"] + mean["geometry"] + mean["crm"] - mean["loss"]) < 1e-9
        assert part["split"]["crm"]["low"] < mean["crm"] < part["split"]["crm"]["high"]
    json.dumps(summary)


def test_intervals_are_over_images():
    rows = noisy_rows(200, 0)
    for i, row in enumerate(rows):
        row["image"] = f"image {i % 3}"
    found = summarise(rows, [])["all"]
    assert found["dice"]["box"]["images"] == 3
    assert found["against"]["box"]["images"] == 3
    assert found["dice"]["box"]["n"] == 200


def test_the_best_geometry_is_chosen_on_the_other_questions_and_never_on_these():
    others = noisy_rows(60, 1)
    asked = noisy_rows(60, 0)
    for row in asked:
        row["dice"]["8 points"] = 1.0  # the best here
    for row in others:
        row["dice"]["4 points"] = 0.9  # the best there
        row["dice"]["box"] = 0.0 if row["supercategory"] == "A" else 1.0  # but for group B
    summary = summarise(asked, others)
    assert summary["all"]["best"] == "4 points"
    assert summary["supercategory"]["A"]["best"] == "4 points"
    assert summary["supercategory"]["B"]["best"] == "box"
    assert summary["supercategory"]["B"]["chosen_on"] == 30
    few = summarise(asked, others[:18])["supercategory"]["B"]  # nine of B are too few
    assert few["chosen_on"] == 18
    alone = summarise(asked, [])
    assert alone["all"]["best"] is None
    assert alone["all"]["split"] == {}
    assert "Not split" in table(alone, 0)
    assert "segmenter" not in table(alone, 0)


def test_what_a_table_shows():
    said = table(summarise(noisy_rows(40, 0), noisy_rows(40, 1)), 3)
    for part in (
        "40 questions; 3 without a mask",
        "| 1 - Dice | segmenter | geometry | CRM |",
        "| 17 pieces or more | 8 | 18.5 | 50 | 10.0 |",
        "| best prompt | IoU |",
    ):
        assert part in said
    places = [said.index(f"| {name} |") for name in MOST_PIECES]
    assert places == sorted(places)


def test_examples_without_masks_are_left_out():
    masked = example(DISC)
    without = example(DISC)
    without.mask = None
    assert [row["id"] for row in measure_all(Filler(), [without, masked], Ranks())] == ["a"]


def test_two_ranks_measure_what_one_measures():
    class Alone(Ranks):
        """One rank of two, which gathers nothing."""

        def gather(self, items):
            return items

    cases = [example(mask, name) for name, mask in MASKS.items()]
    first = measure_all(Filler(), cases, Alone(rank=0, world=2))
    second = measure_all(Filler(), cases, Alone(rank=1, world=2))
    assert [row["id"] for row in first] == ["disc", "two"]
    assert [row["id"] for row in second] == ["ring", "nine"]
    both = sorted(first + second, key=lambda row: row["id"])
    assert both == sorted(measure_all(Filler(), cases, Ranks()), key=lambda row: row["id"])


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
    """An evaluation of perfect predictions for six embedded questions."""
    folder = tmp_path_factory.mktemp("oracle")
    lines = []
    for case in load_samples(EMBEDDED["data"], "test")[:6]:
        line = {"id": case.id, "bbox": case.bbox, "points": case.points}
        lines.append(json.dumps(line) + "\n")
    (folder / "p.jsonl").write_text("".join(lines))
    predictions.main([str(folder / "p.jsonl"), "--limit", "6", "--out", str(folder / "eval")])
    return folder


def main_error(capsys, *words):
    """What the command prints in this process, where it ends with status 2."""
    with pytest.raises(SystemExit, match="2"):
        oracle.main([str(word) for word in words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error:")
    return error


def test_perfect_predictions_have_no_fault(tmp_path, perfect):
    out, _ = run("-m extras.oracle", perfect / "eval", "--limit 6 --out", tmp_path / "o")
    summary = json.loads((tmp_path / "o/summary.json").read_text())
    whole = summary["all"]
    assert whole["split"]["crm"]["mean"] == 0
    assert whole["n"] == whole["chosen_on"] == 6
    evaluated = read_jsonl(perfect / "eval/predictions.jsonl")
    for geometry, kind in (("box", "box"), ("box, 1 point", "one"), (WRITTEN, "both")):
        mean = np.mean([row["dice"][kind] for row in evaluated])
        assert whole["dice"][geometry]["mean"] == pytest.approx(mean, abs=2e-3)
    for row in summary["questions"]:
        parts = split_loss(row, whole["best"])
        loss = parts.pop("loss")
        assert set(parts) == set(PARTS) - {"loss"}
        assert abs(sum(parts.values()) - loss) < 1e-9
        assert loss == 1 - row["crm"]
    assert (tmp_path / "o/table.md").read_text().startswith("Percent")
    assert "merely filled" in out


def test_without_predictions_the_segmenter_is_measured_alone_and_again(tmp_path, capsys):
    for _ in range(2):  # the same command may run again
        oracle.main(["--limit", "3", "--out", str(tmp_path / "alone")])
    summary = json.loads((tmp_path / "alone/summary.json").read_text())
    assert set(summary["all"]["split"]) == {"loss", "segmenter", "geometry"}
    assert summary["all"]["n"] == 3
    assert "no CRM was asked" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, says",
    [
        ("{eval} --limit 7", "1 of 7 questions"),
        ("nowhere", "no predictions.jsonl"),
        ("--asm none", "--asm none: it is the segmenter that is measured"),
        ("--asm nowhere", "nowhere"),
        ("--crm demo/crm", "--crm"),
        ("{eval} --split train --limit 3", "3 of 3 questions"),
        ("--data nowhere", "nowhere"),
        ("--split none", "no sample in split 'none'"),
        ("--limit -1", "--limit -1: must be at least 0"),
        ("--seed -1", "--seed -1: must be at least 0"),
    ],
)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    tmp_path, perfect, capsys, flags, says
):
    words = flags.format(eval=perfect / "eval").split()
    assert says in main_error(capsys, *words, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_an_evaluation_in_the_folder_is_not_overwritten(perfect, capsys):
    before = (perfect / "eval/table.md").read_text()
    error = main_error(capsys, "--limit", 6, "--out", perfect / "eval")
    assert "give another --out" in error
    assert (perfect / "eval/table.md").read_text() == before


def own_data(folder, mask=True):
    """A data set of one question, without a split "train"."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    noise_image(SIDE, SIDE).save(folder / "images/a.png")
    Image.fromarray(np.uint8(TWO) * 255).save(folder / "masks/a.png")
    row = {
        "image": "a.png",
        "query": "?",
        "split": "test",
        "id": "test_00000",
        "bbox": [10, 40, 111, 81],
        "points": [[30, 60], [90, 60]],
    }
    if mask:
        row["mask"] = "a.png"
    (folder / "samples.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_data_without_a_train_split_have_no_parts(tmp_path, capsys):
    oracle.main(["--data", str(own_data(tmp_path / "d")), "--out", str(tmp_path / "o")])
    out = capsys.readouterr().out
    assert "Not split" in out
    assert "| a box each, 2 pieces |" in out


def test_data_without_masks_are_an_error(tmp_path, capsys):
    unmasked = own_data(tmp_path / "n", mask=False)
    error = main_error(capsys, "--data", unmasked, "--out", tmp_path / "o")
    assert "no example has a mask" in error
    assert not (tmp_path / "o").exists()


def test_predictions_of_other_data_with_the_same_ids_are_an_error(tmp_path, perfect, capsys):
    other = own_data(tmp_path / "d")
    error = main_error(capsys, perfect / "eval", "--data", other, "--out", tmp_path / "o")
    assert "example test_00000: the predictions are of a target in" in error
    assert not (tmp_path / "o").exists()
