"""Other data sets: small folders in their formats, every sample equal to what was put in, every fault named."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import box_from_mask, keypoints_from_mask, load_samples
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


def disc(x, y, r=5):
    ys, xs = np.mgrid[:H, :W]
    return (xs - x) ** 2 + (ys - y) ** 2 <= r * r


# a patient seen from the front
PLACES = {"Liver": disc(15, 30), "Left Lung": disc(45, 10), "Right Lung": disc(15, 10, 7)}


def write_image(file, array=None):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((H, W, 3), 90, np.uint8) if array is None else array).save(file)


def labelled(places):
    grey = np.zeros((H, W), np.uint8)
    for value, label in TABLE.items():
        grey[places.get(label, np.zeros((H, W), bool))] = int(value)
    return grey


def ask(question, answer, lang="en", image="xmlab1", content="Position", qid=1, **more):
    return {
        "img_id": 1,
        "img_name": f"{image}/source.jpg",
        "question": question,
        "answer": answer,
        "q_lang": lang,
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
    ask("Which organ filters the blood of the gut?", "Liver", qid=1),
    ask("Where is the liver?", "Lower left", qid=2),
    ask("哪个器官最大？", "右肺", "zh", qid=3),
    ask("Is the left lung healthy?", "Yes", qid=4),
]


@pytest.fixture
def slake(tmp_path):
    root = tmp_path / "SLAKE"
    for name in ("xmlab1", "xmlab2"):
        write_image(root / f"imgs/{name}/source.jpg")
        write_image(root / f"imgs/{name}/mask.png", labelled(PLACES))
        boxes = {label: box_from_mask(mask) for label, mask in PLACES.items()}
        (root / f"imgs/{name}/detection.json").write_text(
            json.dumps([{label: [x, y, X - x, Y - y]} for label, (x, y, X, Y) in boxes.items()])
        )
    (root / "mask.txt").write_text("".join(f"{value}:{name}\n" for value, name in TABLE.items()))
    for name, rows in (
        ("test", TEST),
        ("validation", []),
        ("train", [ask("Which organ beats?", "x", image="xmlab2")]),
    ):
        (root / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return root


def convert(kind, source):
    out = source.parent / "out"
    main([kind, str(source), str(out)])
    return json.loads((out / "report.json").read_text()), lambda split: list(
        load_samples(out, split)
    )


def faults(report) -> dict[str, list[str]]:
    for kind, fault in report["faults"].items():
        assert fault["count"] == len(fault["names"]) > 0, kind
    return {kind: fault["names"] for kind, fault in report["faults"].items()}


def has_what_was_put_in(sample, mask):
    assert np.array_equal(sample.mask, mask) and sample.bbox == box_from_mask(mask)
    assert sample.points == keypoints_from_mask(mask)


# ---------------------------------------------------------------- SLAKE


def test_slake_has_every_label_and_the_questions_that_fit_one(slake):
    report, split = convert("slake", slake)
    samples = split("test")
    assert report["samples"]["test"] == {"explicit": 3 + 2, "implicit": 1} and len(samples) == 6
    for sample in samples + split("test_zh") + split("train"):
        has_what_was_put_in(sample, PLACES[sample.category])
        assert sample.supercategory == "X-Ray Chest"
    own = {sample.extra["qid"]: sample for sample in samples if "qid" in sample.extra}
    assert {qid: (s.category, s.extra["kind"]) for qid, s in own.items()} == {
        1: ("Liver", "implicit"),
        2: ("Liver", "explicit"),
        4: ("Left Lung", "explicit"),
    }
    assert own[1].query == TEST[0]["question"] and own[1].extra["answer"] == "Liver"
    assert (report["images"], report["masks"]) == (2, 6)
    assert faults(report) == {
        "question left out: it names no label": ["train.json, row 0: Which organ beats? x"]
    }


def test_the_chinese_half_is_a_split_of_its_own(slake):
    report, split = convert("slake", slake)
    assert report["samples"]["test_zh"] == {"explicit": 3, "implicit": 1}
    assert {sample.extra["language"] for sample in split("test_zh")} == {"zh"}
    assert {sample.extra["language"] for sample in split("test")} == {"en"}
    queries = {
        sample.category: sample.query
        for sample in split("test_zh")
        if sample.extra["kind"] == "explicit"
    }
    assert queries == {
        "Liver": "肝脏在哪里？",
        "Left Lung": "患者左侧的肺部在哪里？",
        "Right Lung": "患者右侧的肺部在哪里？",
    }
    (implicit,) = (sample for sample in split("test_zh") if sample.extra["kind"] == "implicit")
    assert (implicit.category, implicit.query) == ("Right Lung", "哪个器官最大？")


def test_sides_are_the_patient_s_and_the_half_of_the_image_is_stated(slake, capsys):
    report, split = convert("slake", slake)
    lung = next(sample for sample in split("test") if sample.category == "Left Lung")
    assert lung.query == "Where is the patient's left lung?"
    assert lung.extra["side"] == {"patient": "left", "image": "right"}
    assert report["sides"] == {
        "patient's left: right half of the image": 2,
        "patient's right: left half of the image": 2,
    }
    assert "patient's left: right half of the image: 2" in capsys.readouterr().out


def test_kinds_are_rows_of_the_tables(slake):
    _, split = convert("slake", slake)
    assert {prediction(sample, 0, [""], None)["wording"] for sample in split("test")} == {
        "explicit",
        "implicit",
    }


@pytest.mark.parametrize(
    "row, why",
    [
        (ask("Which organ is abnormal?", "Lung"), "it fits several labels"),
        (ask("Is the heart here?", "No"), "its target is not in the mask"),
        (
            ask("What is the function of the liver?", "Detoxification", content="KG"),
            "it is about KG",
        ),
        (ask("Is it good?", "Yes"), "it names no label"),
        (ask("Wo ist die Leber?", "Liver", "de"), "language 'de'"),
        (ask("Is the liver well?", "Yes", base_type="kvqa"), "it is about Position"),
        (ask("Where is the liver?", "x") | {"img_name": None}, "no question, or no img_name"),
        (ask("Where is the liver?", "x"), "its image is in test, too"),
    ],
)
def test_a_question_that_is_left_out_is_named_with_the_reason(slake, row, why, capsys):
    rows = json.loads((slake / "train.json").read_text())
    row |= {"img_name": row["img_name"] and f"xmlab{1 if 'too' in why else 2}/source.jpg"}
    (slake / "train.json").write_text(json.dumps([*rows, row], ensure_ascii=False))
    named = faults(convert("slake", slake)[0])[f"question left out: {why}"]
    assert any(name.startswith("train.json, row 1") for name in named)
    assert f"question left out: {why}: {len(named)}: train.json, row" in capsys.readouterr().out


def test_what_is_wrong_with_slake_s_files_is_named(slake):
    grey = labelled(PLACES | {"Heart": np.arange(W * H).reshape(H, W) < 3})
    grey[39, :20] = 37
    write_image(
        slake / "imgs/xmlab2/mask.png", np.repeat(grey[..., None], 3, 2)
    )  # three equal channels: the same
    (slake / "imgs/xmlab2/detection.json").write_text(
        json.dumps(
            [
                {"Liver": [10, 25, 5, 11]},
                {"Liver": [13, 25, 8, 11]},
                {"Left Lung": [0, 0, 9, 9]},
                {"Heart": [1, 1, 2, 2]},
                {"Lung": [1, 1, 2, 2]},
            ]
        )
    )
    (slake / "validation.json").unlink()
    names = {
        "xmlab3": "no mask",
        "xmlab4": "small",
        "xmlab5": "coloured",
        "xmlab6": "no image",
        "xmlab7": "broken",
    }
    for name in (*names, "xmlab8"):
        write_image(slake / f"imgs/{name}/source.jpg")
        write_image(slake / f"imgs/{name}/mask.png", labelled(PLACES))
    (slake / "imgs/xmlab3/mask.png").unlink()
    write_image(slake / "imgs/xmlab4/mask.png", labelled(PLACES)[:30])
    write_image(slake / "imgs/xmlab5/mask.png", np.uint8(np.indices((H, W, 3)).sum(0)))
    (slake / "imgs/xmlab6/source.jpg").unlink()
    (slake / "imgs/xmlab7/source.jpg").write_bytes(b"no image")
    rows = [ask("Where is the liver?", "", image=name) for name in ("xmlab2", *names)]
    (slake / "train.json").write_text(json.dumps(rows))
    report, split = convert("slake", slake)
    assert {sample.category for sample in split("train")} == set(PLACES) and len(
        split("train")
    ) == 4
    named = faults(report)
    assert named["unknown label"] == [
        "xmlab2/mask.png: value 37, 20 pixels",
        "xmlab2/detection.json: Lung",
    ]
    assert named["missing file"] == ["validation.json, the questions of val"]
    assert named["missing mask"] == ["xmlab3/mask.png (1 questions left out)"]
    assert named["missing image"] == ["xmlab6/source.jpg (1 questions left out)"]
    assert named["wrong image"][0].startswith(
        "xmlab7/source.jpg (1 questions left out): is not an image"
    )
    assert named["image without a question"] == ["xmlab8"]
    assert named["missing box"] == ["xmlab4/detection.json"]
    assert named["wrong box"] == [
        "xmlab2/detection.json: Left Lung [0, 0, 9, 9], in the mask (40.0, 5.0, 51.0, 16.0)",
        "xmlab2/detection.json: Heart is not in the mask",
    ]
    wrong = named["wrong mask"]
    assert wrong[0] == "xmlab2/mask.png: Heart has only 3 pixels" and "is coloured" in wrong[-1]
    assert wrong[1:4] == ["xmlab4/mask.png: is 60x30, its image 60x40"] * 3
    assert named["question left out: its target is not in the mask"] == [
        "train.json, row 2: Where is the liver? "
    ]


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
    assert sorted(set().union(*mentions(list(TABLE.values()))(text))) == found


def test_one_lung_in_the_mask_is_the_lung():
    find = mentions(list(TABLE.values()))
    assert target(find("the lung"), {"Left Lung", "Liver"}) == ("Left Lung", "")
    assert target(find("heart or liver"), {"Liver"})[1] == "its target is not in the mask"


# ---------------------------------------------------------------- BiomedParse

PAIRS = {"a_1_CT_abdomen": ["liver", "left+kidney"], "b_pathology_breast": ["neoplastic+cells"]}


@pytest.fixture
def biomed(tmp_path):
    root = tmp_path / "DATA"
    # in these files, what is not 0 is inside
    masks = {
        "liver": disc(15, 30),
        "left+kidney": disc(45, 10),
        "neoplastic+cells": disc(9, 9) | disc(50, 30),
    }
    for split, stems in (("test", PAIRS), ("train", {"c_CT_abdomen": ["liver"]})):
        annotations = []
        for stem, targets in stems.items():
            write_image(root / split / f"{stem}.png")
            for name in targets:
                write_image(
                    root / f"{split}_mask" / f"{stem}_{name}.png", np.uint8(masks[name]) * 9
                )
                annotations.append(
                    {
                        "mask_file": f"{stem}_{name}.png",
                        "file_name": f"{stem}.png",
                        "image_id": 1,
                        "sentences": [{"raw": f"the {name}", "sent": name, "sent_id": 1}],
                    }
                )
        (root / f"{split}.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    return root, masks


def test_biomedparse_is_read_from_names(biomed):
    root, masks = biomed
    report, split = convert("biomedparse", root)
    assert (
        report["samples"] == {"test": {"explicit": 3}, "train": {"explicit": 1}}
        and not report["faults"]
    )
    for sample in split("test") + split("train"):
        has_what_was_put_in(sample, masks[sample.category.replace(" ", "+")])
    kidney, liver, cells = split("test")
    assert kidney.query == "Where is the patient's left kidney in this CT image of the abdomen?"
    assert (
        kidney.extra["side"] == {"patient": "left", "image": "right"} and "side" not in liver.extra
    )
    assert (cells.category, cells.supercategory) == ("neoplastic cells", "pathology breast")
    assert cells.extra["sentences"] == ["the neoplastic+cells"]


def test_several_sets_of_biomedparse_in_one_folder_stay_apart(biomed):
    root, _ = biomed
    (root.parent / "all").mkdir()
    root.rename(root.parent / "all/one")
    shutil.copytree(root.parent / "all/one", root.parent / "all/two")
    report, split = convert("biomedparse", root.parent / "all")
    assert (
        len(split("test")) == 6
        and len({sample.id for sample in split("test")}) == 6
        and not report["faults"]
    )


def test_what_is_wrong_with_biomedparse_is_named(biomed):
    root, _ = biomed
    write_image(root / "train/a_1_CT_abdomen.png")
    write_image(root / "train_mask/a_1_CT_abdomen_liver.png", np.uint8(disc(9, 9)))
    write_image(root / "test/lonely_CT_chest.png")
    write_image(root / "test_mask/orphan_CT_chest_lung.png", np.uint8(disc(9, 9)))
    write_image(root / "test/d_CT_chest.png")
    write_image(root / "test_mask/d_CT_chest_lung.png", np.zeros((H, W), np.uint8))
    write_image(root / "test_mask/d_CT_chest_heart.png", np.ones((H, 20), np.uint8))
    (root / "test_mask/d_CT_chest_rib.png").write_bytes(b"none")
    write_image(root / "test_mask/d_CT_chest.png", np.uint8(disc(9, 9)))
    (root / "train/c_CT_abdomen.png").write_bytes(b"none")
    (root / "train.json").write_text("version 1")
    said = json.loads((root / "test.json").read_text())
    said["annotations"].append(said["annotations"][0] | {"mask_file": "gone.png"})
    (root / "test.json").write_text(json.dumps(said))
    report, split = convert("biomedparse", root)
    assert len(split("test")) == 3 and list(report["samples"]) == ["test"]
    named = faults(report)
    assert named["missing mask"] == ["test_mask/gone.png, which test.json has"]
    assert named["missing image"] == [
        "test_mask/orphan_CT_chest_lung.png: no file in test/ begins its name"
    ]
    assert named["image without a mask"] == ["test/lonely_CT_chest.png"]
    assert named["unknown label"] == ["test_mask/d_CT_chest.png: not IMG_MODALITY_SITE_TARGET"]
    assert named["mask left out: its image is in test, too"] == [
        "train_mask/a_1_CT_abdomen_liver.png"
    ]
    assert named["mask left out: its image is wrong"] == ["train_mask/c_CT_abdomen_liver.png"]
    assert named["wrong image"][0].startswith("train/c_CT_abdomen.png: is not an image")
    assert named["wrong sentences"][0].startswith("train.json") and len(named["wrong mask"]) == 3
    assert "test_mask/d_CT_chest_heart.png: is 20x40, its image 60x40" in named["wrong mask"]
    assert "test_mask/d_CT_chest_lung.png: is empty" in named["wrong mask"]


# ---------------------------------------------------------------- PanNuke


def png(array) -> dict:
    Image.fromarray(array).save(buffer := io.BytesIO(), "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def nuclei(masks, categories, tissue=3):
    return {
        "image": png(np.full((H, W, 3), 200, np.uint8)),
        "instances": [png(mask) for mask in masks],
        "categories": categories,
        "tissue": tissue,
    }


THREE = [disc(9, 9), disc(30, 20), disc(50, 30)]


@pytest.fixture
def pannuke(tmp_path):
    (tmp_path / "PANNUKE").mkdir()
    for fold in (1, 2, 3):
        write_fold(tmp_path / "PANNUKE", fold, [nuclei(THREE, [0, 0, 1])])
    return tmp_path / "PANNUKE"


def write_fold(root, fold, rows):
    pq.write_table(pa.Table.from_pylist(rows), root / f"fold{fold}-00000-of-00001.parquet")


def test_pannuke_has_each_nucleus_and_all_of_a_class(pannuke):
    report, split = convert("pannuke", pannuke)
    assert (
        report["samples"] == {"train": {"one": 6, "all": 4}, "test": {"one": 3, "all": 2}}
        and not report["faults"]
    )
    assert (report["images"], report["masks"]) == (3, 15)
    samples = {
        (sample.extra["kind"], sample.category, i % 2): sample
        for i, sample in enumerate(split("test"))
    }
    assert len(samples) == 5
    one = [sample for sample in split("test") if sample.extra["kind"] == "one"]
    for sample, mask in zip(one, THREE):
        has_what_was_put_in(sample, mask)
    assert [sample.extra["alike"] for sample in one] == [2, 2, 1]
    assert [sample.query for sample in one[1:]] == [
        "Where is a neoplastic nucleus in this breast tissue?",
        "Where is an inflammatory nucleus in this breast tissue?",
    ]
    both = next(sample for sample in split("test") if sample.category == "all neoplastic")
    has_what_was_put_in(both, THREE[0] | THREE[1])
    assert both.query == "Where are all the neoplastic nuclei in this breast tissue?"


def test_what_is_wrong_with_pannuke_is_named(pannuke):
    bad = nuclei(
        [disc(9, 9), disc(9, 9), np.zeros((H, W), bool), np.ones((H, 14), bool)],
        [0, 7, 1, 1],
        tissue=40,
    )
    bad["instances"].append({"bytes": b"none", "path": None})
    broken = nuclei(THREE, [0, 0, 1]) | {"image": {"bytes": b"none", "path": None}}
    write_fold(
        pannuke,
        3,
        [bad | {"categories": [0, 7, 1, 1, 4]}, nuclei(THREE, [0, 0]), nuclei([], []), broken],
    )
    report, split = convert("pannuke", pannuke)
    assert [sample.query for sample in split("test")] == [
        "Where is a neoplastic nucleus?",
        "Where are all the neoplastic nuclei?",
    ]
    named, file = faults(report), "fold3-00000-of-00001.parquet, row"
    assert named["unknown label"] == [f"{file} 0: tissue 40", f"{file} 0, nucleus 1: category 7"]
    assert named["image without a nucleus"] == [f"{file} 2: 0 nuclei, 0 categories"]
    assert named["wrong image"][0].startswith(f"{file} 3 (3 nuclei left out): is not an image")
    assert named["wrong mask"][:2] == [
        f"{file} 0, nucleus 2: is empty",
        f"{file} 0, nucleus 3: is 14x40, its image 60x40",
    ]
    assert named["wrong mask"][2].startswith(f"{file} 0, nucleus 4: is not an image")
    assert named["wrong mask"][3] == f"{file} 1: 3 nuclei, 2 categories"


# ---------------------------------------------------------------- refusals


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_, exit_on(ValueError, OSError):
        main([str(a) for a in argv])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and line.startswith("error: ")
    return line


@pytest.mark.parametrize("kind", ["slake", "biomedparse", "pannuke"])
def test_a_bad_source_is_refused_with_one_line_and_nothing_is_written(tmp_path, capsys, kind):
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refused(capsys, kind, tmp_path / "nowhere", tmp_path / "out")
    assert "empty" in refused(capsys, kind, tmp_path / "empty", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("mask.txt", "70 Liver", "mask.txt, line 1"),
        ("mask.txt", "70:Liver\n70:Lung", "mask.txt, line 2"),
        ("test.json", "{", "test.json: not JSON"),
        ("test.json", '{"a": 1}', "test.json: not a JSON list"),
        ("test.json", "[1]", "test.json: not a JSON list of objects"),
    ],
)
def test_a_broken_slake_is_refused_with_one_line(slake, capsys, file, text, says):
    (slake / file).write_text(text)
    assert says in refused(capsys, "slake", slake, slake.parent / "out")
    assert [path.name for path in slake.parent.iterdir()] == ["SLAKE"]


def test_a_disk_that_fills_up_at_the_end_leaves_nothing(slake, capsys, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "finish", full)
    assert "No space left" in refused(capsys, "slake", slake, slake.parent / "out")
    assert [path.name for path in slake.parent.iterdir()] == ["SLAKE"]


def test_parquet_that_is_not_pannuke_s_is_refused(pannuke, capsys):
    file = pannuke / "fold3-00000-of-00001.parquet"
    pq.write_table(pa.table({"image": [1]}), file)
    run = "pannuke", pannuke, pannuke.parent / "out"
    assert "column categories, instances, tissue is missing" in refused(capsys, *run)
    file.write_bytes(b"PAR1")
    assert "not a readable parquet file" in refused(capsys, *run)
    file.rename(pannuke / "x.parquet")
    assert "none of fold1" in refused(capsys, *run)
    assert [path.name for path in pannuke.parent.iterdir()] == ["PANNUKE"]


def test_an_out_that_exists_is_refused_and_left_alone(slake, capsys):
    out = slake.parent / "out"
    out.mkdir()
    assert "is there already" in refused(capsys, "slake", slake, out) and not list(out.iterdir())
    assert "no such folder" in refused(capsys, "slake", slake, slake.parent / "no/out")
    assert "invalid choice" in refused(capsys, "coco", slake, slake.parent / "new")


def test_a_question_names_the_patient_s_side():
    assert where_is("Right Femoral Head") == "Where is the patient's right femoral head?"
    assert where_is("Bladder", "zh") == "膀胱在哪里？"
