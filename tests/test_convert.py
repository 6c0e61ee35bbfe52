"""Other data sets: small folders in their formats, every example equal to what was put in, and
every fault named."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import Example, Sizes, box_from_mask, keypoints_from_mask, load_samples
from extras.convert import main
from extras.convert_folder import Folder
from extras.convert_words import mentions, target, where_is
from metrics import prediction
from runtime.cli import exit_on

W, H = 60, 40
TABLE = {
    "70": "Liver",
    "175": "Liver Cancer",
    "215": "Left Lung",
    "225": "Right Lung",
    "180": "Heart",
}


def disc(x: int, y: int, r: int = 5) -> np.ndarray:
    ys, xs = np.mgrid[:H, :W]
    return (xs - x) ** 2 + (ys - y) ** 2 <= r * r


# a patient seen from the front
PLACES = {"Liver": disc(15, 30), "Left Lung": disc(45, 10), "Right Lung": disc(15, 10, 7)}


def write_image(file: Path, pixels: np.ndarray | None = None) -> None:
    """Writes pixels, or a plain picture."""
    if pixels is None:
        pixels = np.full((H, W, 3), 90, np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def labelled(places: dict[str, np.ndarray]) -> np.ndarray:
    """Returns SLAKE's grey image of some labels."""
    grey = np.zeros((H, W), np.uint8)
    for value, label in TABLE.items():
        if label in places:
            grey[places[label]] = int(value)
    return grey


class Converted:
    """What a conversion wrote."""

    def __init__(self, kind: str, source: Path) -> None:
        self.folder = source.parent / "out"
        main([kind, str(source), str(self.folder)])
        self.report = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))

    def split(self, name: str) -> list[Example]:
        return list(load_samples(self.folder, name))

    def faults(self) -> dict[str, list[str]]:
        """Returns {kind: names}."""
        found = {}
        for kind, fault in self.report["faults"].items():
            assert fault["count"] == len(fault["names"]) > 0, kind
            found[kind] = fault["names"]
        return found


def assert_it_is(example: Example, mask: np.ndarray) -> None:
    """Asserts that an example's target is a mask that was put in."""
    assert np.array_equal(example.mask, mask)
    assert example.bbox == box_from_mask(mask)
    assert example.points == keypoints_from_mask(mask)


# ---------------------------------------------------------------- SLAKE


def asked(
    question: str,
    answer: str,
    language: str = "en",
    image: str = "xmlab1",
    content: str = "Position",
    qid: int = 1,
    **more: Any,
) -> dict[str, Any]:
    """Returns a row of SLAKE's json."""
    return {
        "img_id": 1,
        "img_name": f"{image}/source.jpg",
        "question": question,
        "answer": answer,
        "q_lang": language,
        "location": "Chest",
        "modality": "X-Ray",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "triple": ["vhead"],
        "content_type": content,
        "qid": qid,
        **more,
    }


TEST = [
    asked("Which organ filters the blood of the gut?", "Liver", qid=1),
    asked("Where is the liver?", "Lower left", qid=2),
    asked("哪个器官最大？", "右肺", "zh", qid=3),
    asked("Is the left lung healthy?", "Yes", qid=4),
]


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def slake(tmp_path: Path) -> Path:
    root = tmp_path / "SLAKE"
    boxes = []
    for label, mask in PLACES.items():
        x1, y1, x2, y2 = box_from_mask(mask)
        boxes.append({label: [x1, y1, x2 - x1, y2 - y1]})
    for name in ("xmlab1", "xmlab2"):
        write_image(root / f"imgs/{name}/source.jpg")
        write_image(root / f"imgs/{name}/mask.png", labelled(PLACES))
        write_json(root / f"imgs/{name}/detection.json", boxes)
    (root / "mask.txt").write_text("".join(f"{value}:{name}\n" for value, name in TABLE.items()))
    write_json(root / "test.json", TEST)
    write_json(root / "validation.json", [])
    write_json(root / "train.json", [asked("Which organ beats?", "x", image="xmlab2")])
    return root


def test_slake_has_every_label_and_the_questions_that_fit_one(slake):
    converted = Converted("slake", slake)
    examples = converted.split("test")
    assert converted.report["samples"]["test"] == {"explicit": 3 + 2, "implicit": 1}
    assert len(examples) == 6
    for example in examples + converted.split("test_zh") + converted.split("train"):
        assert_it_is(example, PLACES[example.category])
        assert example.supercategory == "X-Ray Chest"
    of_the_set = {}
    for example in examples:
        if "qid" in example.extra:
            of_the_set[example.extra["qid"]] = example
    assert sorted(of_the_set) == [1, 2, 4]
    for qid, label, kind in (
        (1, "Liver", "implicit"),
        (2, "Liver", "explicit"),
        (4, "Left Lung", "explicit"),
    ):
        assert of_the_set[qid].category == label
        assert of_the_set[qid].extra["kind"] == kind
    assert of_the_set[1].query == TEST[0]["question"]
    assert of_the_set[1].extra["answer"] == "Liver"
    assert converted.report["images"] == 2
    assert converted.report["masks"] == 6
    assert converted.faults() == {
        "question left out: it names no label": ["train.json, row 0: Which organ beats? x"]
    }


def test_the_chinese_half_is_a_split_of_its_own(slake):
    converted = Converted("slake", slake)
    assert converted.report["samples"]["test_zh"] == {"explicit": 3, "implicit": 1}
    chinese = converted.split("test_zh")
    assert {example.extra["language"] for example in chinese} == {"zh"}
    assert {example.extra["language"] for example in converted.split("test")} == {"en"}
    queries = {}
    implicit = []
    for example in chinese:
        if example.extra["kind"] == "explicit":
            queries[example.category] = example.query
        else:
            implicit.append((example.category, example.query))
    assert queries == {
        "Liver": "肝脏在哪里？",
        "Left Lung": "患者左侧的肺部在哪里？",
        "Right Lung": "患者右侧的肺部在哪里？",
    }
    assert implicit == [("Right Lung", "哪个器官最大？")]


def test_sides_are_the_patient_s_and_the_half_of_the_image_is_stated(slake, capsys):
    converted = Converted("slake", slake)
    lung = next(x for x in converted.split("test") if x.category == "Left Lung")
    assert lung.query == "Where is the patient's left lung?"
    assert lung.extra["side"] == {"patient": "left", "image": "right"}
    assert converted.report["sides"] == {
        "patient's left: right half of the image": 2,
        "patient's right: left half of the image": 2,
    }
    assert "patient's left: right half of the image: 2" in capsys.readouterr().out


def test_kinds_are_rows_of_the_tables(slake):
    wordings = set()
    for example in Converted("slake", slake).split("test"):
        sizes = Sizes(example.image.size, example.image.size)
        wordings.add(prediction(example, 0, [""], sizes)["wording"])
    assert wordings == {"explicit", "implicit"}


@pytest.mark.parametrize(
    "row, problem",
    [
        (asked("Which organ is abnormal?", "Lung"), "it fits several labels"),
        (asked("Is the heart here?", "No"), "its target is not in the mask"),
        (
            asked("What is the function of the liver?", "Detoxification", content="KG"),
            "it is about KG",
        ),
        (asked("Is it good?", "Yes"), "it names no label"),
        (asked("Wo ist die Leber?", "Liver", "de"), "language 'de'"),
        (asked("Is the liver well?", "Yes", base_type="kvqa"), "it is about Position"),
        (asked("Where is the liver?", "x", img_name=None), "no question, or no img_name"),
        (asked(["Where?"], "x"), "no question, or no img_name"),
        (
            asked("Where is the liver?", "x", img_name="xmlab1/source.jpg"),
            "its image is also in test",
        ),
    ],
)
def test_a_question_that_is_left_out_is_named_with_the_reason(slake, row, problem, capsys):
    rows = json.loads((slake / "train.json").read_text())
    if row["img_name"] is not None and "also in" not in problem:
        row = row | {"img_name": "xmlab2/source.jpg"}
    write_json(slake / "train.json", [*rows, row])
    kind = f"question left out: {problem}"
    named = Converted("slake", slake).faults()[kind]
    assert any(name.startswith("train.json, row 1") for name in named)
    assert f"{kind}: {len(named)}: train.json, row" in capsys.readouterr().out


def test_a_label_a_mask_and_a_file_of_slake_that_is_wrong_is_named(slake):
    grey = labelled(PLACES | {"Heart": np.arange(W * H).reshape(H, W) < 3})
    grey[39, :20] = 37
    # three equal channels are the same as one
    write_image(slake / "imgs/xmlab2/mask.png", np.repeat(grey[..., None], 3, 2))
    (slake / "validation.json").unlink()
    write_json(slake / "train.json", [asked("Where is the liver?", "", image="xmlab2")])
    write_image(slake / "imgs/xmlab3/source.jpg")
    converted = Converted("slake", slake)
    assert {example.category for example in converted.split("train")} == set(PLACES)
    named = converted.faults()
    assert named["unknown label"] == ["xmlab2/mask.png: value 37, 20 pixels"]
    assert named["wrong mask"] == ["xmlab2/mask.png: Heart has only 3 pixels"]
    assert named["missing file"] == ["validation.json, the questions of val"]
    assert named["image without a question"] == ["xmlab3"]


@pytest.mark.parametrize(
    "wrong, kind, says",
    [
        ("no mask", "missing mask", "xmlab2/mask.png (1 questions left out)"),
        ("small mask", "wrong mask", "xmlab2/mask.png: is 60x30, its image 60x40"),
        (
            "coloured mask",
            "wrong mask",
            "xmlab2/mask.png (1 questions left out): is coloured, not grey",
        ),
        (
            "transparent mask",
            "wrong mask",
            "xmlab2/mask.png (1 questions left out): has transparent pixels; save it as grey",
        ),
        ("no image", "missing image", "xmlab2/source.jpg (1 questions left out)"),
        (
            "broken image",
            "wrong image",
            "xmlab2/source.jpg (1 questions left out): is not an image",
        ),
    ],
)
def test_an_image_of_slake_whose_files_are_wrong_is_named(slake, wrong, kind, says):
    folder = slake / "imgs/xmlab2"
    if wrong == "no mask":
        (folder / "mask.png").unlink()
    elif wrong == "small mask":
        write_image(folder / "mask.png", labelled(PLACES)[:30])
    elif wrong == "coloured mask":
        write_image(folder / "mask.png", np.uint8(np.indices((H, W, 3)).sum(0)))
    elif wrong == "transparent mask":
        rgba = np.full((H, W, 4), 70, np.uint8)
        rgba[..., 3] = 255 * PLACES["Liver"]
        write_image(folder / "mask.png", rgba)
    elif wrong == "no image":
        (folder / "source.jpg").unlink()
    else:
        (folder / "source.jpg").write_bytes(b"no image")
    converted = Converted("slake", slake)
    assert converted.faults()[kind][0].startswith(says)
    assert "train" not in converted.report["samples"]


def test_a_box_of_slake_that_is_not_the_mask_s_is_named(slake):
    boxes = [
        {"Liver": [10, 25, 5, 11]},
        {"Liver": [13, 25, 8, 11]},  # both together are right
        {"Left Lung": [0, 0, 9, 9]},
        {"Heart": [1, 1, 2, 2]},
        {"Lung": [1, 1, 2, 2]},
    ]
    write_json(slake / "imgs/xmlab2/detection.json", boxes)
    (slake / "imgs/xmlab1/detection.json").unlink()
    named = Converted("slake", slake).faults()
    assert named["missing box"] == ["xmlab1/detection.json"]
    assert named["unknown label"] == ["xmlab2/detection.json: Lung"]
    assert named["wrong box"] == [
        "xmlab2/detection.json: Left Lung [0, 0, 9, 9], in the mask (40.0, 5.0, 51.0, 16.0)",
        "xmlab2/detection.json: Heart is not in the mask",
    ]


@pytest.mark.parametrize(
    "text",
    [
        '[{"Liver": [1, 2, 3]}]',
        '[{"Liver": ["1", "2", "3", "4"]}]',
        '[{"Liver": [1, 2, 3, NaN]}]',
        f'[{{"Liver": [1, 2, 3, {10**400}]}}]',
        '[{"Liver": "abcd"}]',
        '[{"Liver": null}]',
        "{}",
        "[3]",
        "",
    ],
)
def test_boxes_of_slake_that_cannot_be_read_are_a_fault_and_not_the_end(slake, text):
    (slake / "imgs/xmlab2/detection.json").write_text(text)
    converted = Converted("slake", slake)
    assert converted.faults()["wrong box"][0].startswith("xmlab2/detection.json: ")
    assert len(converted.split("train")) == 3


def test_slake_s_files_may_have_a_byte_order_mark_and_windows_line_ends(slake):
    table = (slake / "mask.txt").read_text()
    (slake / "mask.txt").write_bytes(b"\xef\xbb\xbf" + table.replace("\n", "\r\n").encode())
    (slake / "test.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TEST).encode())
    assert len(Converted("slake", slake).split("test")) == 6


@pytest.mark.parametrize(
    "text, found",
    [
        ("the upper left lung", ["Left Lung"]),
        ("Lungs", ["Left Lung", "Right Lung"]),
        ("a colonoscopy", []),
        ("左侧肺", ["Left Lung"]),
        ("left and right lungs", ["Left Lung", "Right Lung"]),
        ("liver cancer", ["Liver Cancer"]),
        ("肝癌", ["Liver Cancer"]),
        ("肺炎", []),
        ("Is the LIVER here", ["Liver"]),
        ("deliver", []),
        ("右肺和肝脏", ["Liver", "Right Lung"]),
    ],
)
def test_what_a_text_names(text, found):
    find = mentions(TABLE.values())
    assert sorted(set().union(*find(text))) == found


def test_one_lung_in_the_mask_is_the_lung():
    find = mentions(TABLE.values())
    assert target(find("the lung"), {"Left Lung", "Liver"}) == ("Left Lung", "")
    assert target(find("heart or liver"), {"Liver"}) == ("", "its target is not in the mask")


def test_a_question_names_the_patient_s_side():
    assert where_is("Right Femoral Head") == "Where is the patient's right femoral head?"
    assert where_is("Bladder", "zh") == "膀胱在哪里？"


# ---------------------------------------------------------------- BiomedParse

BIOMED_MASKS = {  # what is not 0 is inside
    "liver": disc(15, 30),
    "left+kidney": disc(45, 10),
    "neoplastic+cells": disc(9, 9) | disc(50, 30),
}
TARGETS = {
    "test": {
        "a_1_CT_abdomen": ["liver", "left+kidney"],
        "b_pathology_breast": ["neoplastic+cells"],
    },
    "train": {"c_CT_abdomen": ["liver"]},
}


@pytest.fixture
def biomed(tmp_path: Path) -> Path:
    root = tmp_path / "DATA"
    for split, targets_of in TARGETS.items():
        annotations = []
        for stem, targets in targets_of.items():
            write_image(root / split / f"{stem}.png")
            for name in targets:
                mask_file = f"{stem}_{name}.png"
                write_image(root / f"{split}_mask" / mask_file, np.uint8(BIOMED_MASKS[name]) * 9)
                sentence = {"raw": f"the {name}", "sent": name, "sent_id": 1}
                annotation = {
                    "mask_file": mask_file,
                    "file_name": f"{stem}.png",
                    "image_id": 1,
                    "sentences": [sentence],
                }
                annotations.append(annotation)
        write_json(root / f"{split}.json", {"images": [], "annotations": annotations})
    return root


def test_biomedparse_is_read_from_names(biomed):
    converted = Converted("biomedparse", biomed)
    assert converted.report["samples"] == {"test": {"explicit": 3}, "train": {"explicit": 1}}
    assert not converted.report["faults"]
    for example in converted.split("test") + converted.split("train"):
        assert_it_is(example, BIOMED_MASKS[example.category.replace(" ", "+")])
    kidney, liver, cells = converted.split("test")
    assert kidney.query == "Where is the patient's left kidney in this CT image of the abdomen?"
    assert kidney.extra["side"] == {"patient": "left", "image": "right"}
    assert "side" not in liver.extra
    assert cells.category == "neoplastic cells"
    assert cells.supercategory == "pathology breast"
    assert cells.extra["sentences"] == ["the neoplastic+cells"]


def test_several_sets_of_biomedparse_in_one_folder_stay_apart(biomed):
    everything = biomed.parent / "all"
    everything.mkdir()
    biomed.rename(everything / "one")
    shutil.copytree(everything / "one", everything / "two")
    converted = Converted("biomedparse", everything)
    examples = converted.split("test")
    assert len(examples) == 6
    assert len({example.id for example in examples}) == 6
    assert not converted.report["faults"]


def test_what_is_wrong_with_biomedparse_is_named(biomed):
    mask = np.uint8(disc(9, 9))
    write_image(biomed / "train/a_1_CT_abdomen.png")
    write_image(biomed / "train_mask/a_1_CT_abdomen_liver.png", mask)
    write_image(biomed / "test/lonely_CT_chest.png")
    write_image(biomed / "test_mask/orphan_CT_chest_lung.png", mask)
    write_image(biomed / "test/d_CT_chest.png")
    write_image(biomed / "test_mask/d_CT_chest_lung.png", np.zeros((H, W), np.uint8))
    write_image(biomed / "test_mask/d_CT_chest_heart.png", np.ones((H, 20), np.uint8))
    (biomed / "test_mask/d_CT_chest_rib.png").write_bytes(b"none")
    write_image(biomed / "test_mask/d_CT_chest.png", mask)
    write_image(biomed / "test_mask/d_CT_chest_+.png", mask)
    (biomed / "train/c_CT_abdomen.png").write_bytes(b"none")
    (biomed / "train.json").write_text("version 1")
    said = json.loads((biomed / "test.json").read_text())
    for odd_name in ("gone.png", 3):
        said["annotations"].append(said["annotations"][0] | {"mask_file": odd_name})
    write_json(biomed / "test.json", said)
    converted = Converted("biomedparse", biomed)
    assert len(converted.split("test")) == 3
    assert list(converted.report["samples"]) == ["test"]
    named = converted.faults()
    assert named["missing mask"] == [
        "test_mask/gone.png, which test.json has",
        "test_mask/3, which test.json has",
    ]
    assert named["missing image"] == [
        "test_mask/orphan_CT_chest_lung.png: no file in test/ begins its name"
    ]
    assert named["image without a mask"] == ["test/lonely_CT_chest.png"]
    assert named["unknown label"] == [
        "test_mask/d_CT_chest.png: not IMG_MODALITY_SITE_TARGET",
        "test_mask/d_CT_chest_+.png: not IMG_MODALITY_SITE_TARGET",
    ]
    assert named["mask left out: its image is also in test"] == [
        "train_mask/a_1_CT_abdomen_liver.png"
    ]
    assert named["mask left out: its image is wrong"] == ["train_mask/c_CT_abdomen_liver.png"]
    assert named["wrong image"][0].startswith("train/c_CT_abdomen.png: is not an image")
    assert named["wrong sentences"][0].startswith("train.json")
    assert len(named["wrong mask"]) == 3
    assert "test_mask/d_CT_chest_heart.png: is 20x40, its image 60x40" in named["wrong mask"]
    assert "test_mask/d_CT_chest_lung.png: is empty" in named["wrong mask"]


# ---------------------------------------------------------------- PanNuke


def struct_of(pixels: np.ndarray) -> dict[str, Any]:
    """Returns an image as parquet has it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


BROKEN = {"bytes": b"none", "path": None}


def row_of(masks: list[np.ndarray], categories: list, tissue: Any = 3) -> dict[str, Any]:
    """Returns a row of PanNuke."""
    return {
        "image": struct_of(np.full((H, W, 3), 200, np.uint8)),
        "instances": [struct_of(mask) for mask in masks],
        "categories": categories,
        "tissue": tissue,
    }


THREE = [disc(9, 9), disc(30, 20), disc(50, 30)]


def write_fold(root: Path, fold: int, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), root / f"fold{fold}-00000-of-00001.parquet")


@pytest.fixture
def pannuke(tmp_path: Path) -> Path:
    root = tmp_path / "PANNUKE"
    root.mkdir()
    for fold in (1, 2, 3):
        write_fold(root, fold, [row_of(THREE, [0, 0, 1])])
    return root


def test_pannuke_has_each_nucleus_and_all_of_a_class(pannuke):
    converted = Converted("pannuke", pannuke)
    counts = {"train": {"one": 6, "all": 4}, "test": {"one": 3, "all": 2}}
    assert converted.report["samples"] == counts
    assert not converted.report["faults"]
    assert converted.report["images"] == 3
    assert converted.report["masks"] == 15
    examples = converted.split("test")
    assert len(examples) == 5
    single = [example for example in examples if example.extra["kind"] == "one"]
    for example, mask in zip(single, THREE):
        assert_it_is(example, mask)
    assert [example.extra["alike"] for example in single] == [2, 2, 1]
    assert [example.query for example in single[1:]] == [
        "Where is a neoplastic nucleus in this breast tissue?",
        "Where is an inflammatory nucleus in this breast tissue?",
    ]
    both = next(example for example in examples if example.category == "all neoplastic")
    assert_it_is(both, THREE[0] | THREE[1])
    assert both.query == "Where are all the neoplastic nuclei in this breast tissue?"


def test_numbers_of_a_column_with_gaps_are_read(pannuke):
    """Parquet files made from tables with gaps have 3.0 for 3."""
    write_fold(pannuke, 3, [row_of(THREE, [0.0, 0.0, 1.0], 3.0), row_of(THREE, [None] * 3, None)])
    converted = Converted("pannuke", pannuke)
    assert converted.report["samples"]["test"] == {"one": 3, "all": 2}
    assert "in this breast tissue" in converted.split("test")[0].query
    unknown = converted.faults()["unknown label"]
    assert unknown[0].endswith("row 1: tissue None")
    assert unknown[1].endswith("row 1, nucleus 0: category None")


def test_what_is_wrong_with_pannuke_is_named(pannuke):
    masks = [disc(9, 9), disc(9, 9), np.zeros((H, W), bool), np.ones((H, 14), bool)]
    bad = row_of(masks, [0, 7, 1, 1, 4], tissue=40)
    bad["instances"].append(BROKEN)
    broken = row_of(THREE, [0, 0, 1]) | {"image": BROKEN}
    write_fold(pannuke, 3, [bad, row_of(THREE, [0, 0]), row_of([], []), broken])
    converted = Converted("pannuke", pannuke)
    assert [example.query for example in converted.split("test")] == [
        "Where is a neoplastic nucleus?",
        "Where are all the neoplastic nuclei?",
    ]
    named = converted.faults()
    file = "fold3-00000-of-00001.parquet, row"
    assert named["unknown label"] == [f"{file} 0: tissue 40", f"{file} 0, nucleus 1: category 7"]
    assert named["image without a nucleus"] == [f"{file} 2: 0 nuclei, 0 categories"]
    assert named["wrong image"][0].startswith(f"{file} 3 (3 nuclei left out): is not an image")
    assert named["wrong mask"][:2] == [
        f"{file} 0, nucleus 2: is empty",
        f"{file} 0, nucleus 3: is 14x40, its image 60x40",
    ]
    assert named["wrong mask"][2].startswith(f"{file} 0, nucleus 4: is not an image")
    assert named["wrong mask"][3] == f"{file} 1: 3 nuclei, 2 categories"


# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\ufeff", "\ud800"])
def test_rows_end_at_a_newline_whatever_is_in_a_question(slake, mark, capsys):
    """Some programs end a line at each of these, and UTF-8 has no half of a surrogate pair."""
    questions = [
        asked(f"Where{mark} is the liver?", f"Lower{mark}left", qid=2),
        asked(f"What{mark} is it?", "x", qid=3),
    ]
    (slake / "test.json").write_text(json.dumps(questions))
    converted = Converted("slake", slake)
    content = (converted.folder / "samples.jsonl").read_bytes()
    lines = content.decode("ascii").splitlines()
    rows = [json.loads(line) for line in lines]
    assert (
        len(rows)
        == content.count(b"\n")
        == sum(sum(kinds.values()) for kinds in converted.report["samples"].values())
    )
    assert questions[0]["question"] in [row["query"] for row in rows]
    named = converted.faults()["question left out: it names no label"]
    assert f"test.json, row 1: What{mark} is it? x" in named


def test_the_report_can_be_read_by_people(slake):
    write_json(slake / "train.json", [asked("好吗？", "是", "zh", image="xmlab2")])
    converted = Converted("slake", slake)
    assert "好吗？" in (converted.folder / "report.json").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what is rejected


def rejected(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Returns the one line with which a conversion ends, status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info, exit_on(ValueError, OSError):
        main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


@pytest.mark.parametrize("kind", ["slake", "biomedparse", "pannuke"])
def test_a_bad_source_is_one_line_and_nothing_is_written(tmp_path, capsys, kind):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert "no such folder" in rejected(capsys, kind, tmp_path / "nowhere", out)
    assert "empty" in rejected(capsys, kind, tmp_path / "empty", out)
    assert names_in(tmp_path) == ["empty"]


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("mask.txt", "70 Liver", "mask.txt, line 1: not value:Name"),
        ("mask.txt", "70:Liver\n70:Lung", "mask.txt, line 2: the value 70 was there before"),
        ("test.json", "{", "test.json: not JSON"),
        ("test.json", '{"a": 1}', "test.json: not a JSON list"),
        ("test.json", "[1]", "test.json: not a JSON list of objects"),
        ("test.json", "[" * 100_000, "test.json: not JSON"),
        ("test.json", f"[{{'x': {'9' * 5000}}}]".replace("'", '"'), "test.json: not JSON"),
    ],
)
def test_a_broken_slake_is_one_line(slake, capsys, file, text, says):
    (slake / file).write_text(text)
    assert says in rejected(capsys, "slake", slake, slake.parent / "out")
    assert names_in(slake.parent) == ["SLAKE"]


def test_a_disk_that_fills_up_at_the_end_leaves_nothing(slake, capsys, monkeypatch):
    def full(self: Folder) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "finish", full)
    assert "No space left" in rejected(capsys, "slake", slake, slake.parent / "out")
    assert names_in(slake.parent) == ["SLAKE"]


def test_parquet_that_is_not_pannuke_s_is_one_line(pannuke, capsys):
    file = pannuke / "fold3-00000-of-00001.parquet"
    out = pannuke.parent / "out"
    pq.write_table(pa.table({"image": [1]}), file)
    line = rejected(capsys, "pannuke", pannuke, out)
    assert "column categories, instances, tissue is missing" in line
    file.write_bytes(b"PAR1")
    assert "not a readable parquet file" in rejected(capsys, "pannuke", pannuke, out)
    file.rename(pannuke / "x.parquet")
    assert "none of fold1" in rejected(capsys, "pannuke", pannuke, out)
    assert names_in(pannuke.parent) == ["PANNUKE"]


def test_an_out_that_exists_is_left_alone(slake, capsys):
    out = slake.parent / "out"
    out.mkdir()
    assert "is there already" in rejected(capsys, "slake", slake, out)
    assert names_in(out) == []
    assert "no such folder" in rejected(capsys, "slake", slake, slake.parent / "no/out")
    assert "invalid choice" in rejected(capsys, "coco", slake, slake.parent / "new")
