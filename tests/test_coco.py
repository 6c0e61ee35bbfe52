"""COCO data sets: layouts, masks in every form, and what is wrong, by file and annotation."""

import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

from data import BadRow, load_samples
from extras.coco import png

SQUARE = np.zeros((40, 60), bool)
SQUARE[5:25, 10:30] = True
POLYGON = [[10, 5, 30, 5, 30, 25, 10, 25]]
COUNTS = np.diff(np.flatnonzero(np.diff(np.r_[False, SQUARE.T.ravel(), False])), prepend=0).tolist()
RLE = {"size": [40, 60], "counts": [*COUNTS, int(2400 - sum(COUNTS))]}


def coco(**changes):
    annotation = {
        "id": 3,
        "image_id": 7,
        "category_id": 1,
        "bbox": [10, 5, 20, 20],
        "segmentation": POLYGON,
    } | changes
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}],
        "categories": [{"id": 1, "name": "liver", "supercategory": "Abdomen"}],
        "annotations": [annotation],
    }


def write(root, file, images, **changes):
    for path in (root / file, root / images / "a.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(coco(**changes)))
    Image.new("RGB", (60, 40), "grey").save(root / images / "a.png")
    return root


@pytest.mark.parametrize(
    "file, images, split",
    [
        ("annotations/instances_train2017.json", "train2017", "train"),
        ("test/_annotations.coco.json", "test", "test"),
        ("test.json", "images", "test"),
        ("annotations.json", "images", "train"),
        ("val.json", "images/val", "val"),
    ],
)
def test_the_layouts_that_people_have(tmp_path, file, images, split):
    sample = load_samples(write(tmp_path, file, images), split)[0]
    assert (sample.bbox, sample.category, sample.supercategory) == (
        (10, 5, 30, 25),
        "liver",
        "Abdomen",
    )
    assert sample.query == "Where is the liver?" and np.array_equal(sample.mask, SQUARE)
    with pytest.raises(ValueError, match=f"the splits there: {split}"):
        load_samples(tmp_path, "other")


@pytest.mark.parametrize("form", ["polygon", "counts", "compressed"])
def test_a_mask_is_the_same_in_every_form(form):
    if form == "compressed":
        mask = pytest.importorskip(
            "pycocotools.mask", reason="pip install -r requirements-extras.txt"
        )
        segmentation = mask.encode(np.asfortranarray(SQUARE.astype(np.uint8)))
    else:
        segmentation = {"polygon": POLYGON, "counts": RLE}[form]
    path = png(segmentation, (40, 60))
    import io

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(path))) > 0, SQUARE)


@pytest.mark.parametrize("size", [[60, 40], [40, 61]])
def test_a_compressed_mask_of_another_size_than_its_image_is_named(tmp_path, size):
    mask = pytest.importorskip("pycocotools.mask", reason="pip install -r requirements-extras.txt")
    rle = mask.encode(np.zeros(size, np.uint8, order="F"))
    with pytest.raises(ValueError, match="RLE has the size .*, but its image has \\[40, 60\\]"):
        png(rle | {"counts": rle["counts"].decode()}, (40, 60))


def test_a_category_without_a_name_is_no_matter_where_there_is_a_question(tmp_path):
    write(tmp_path, "train.json", "images", query="What is the large organ?", category_id=9)
    sample = load_samples(tmp_path)[0]
    assert (sample.query, sample.category) == ("What is the large organ?", "")


def test_links_to_images_and_json_files_are_followed_and_names_that_lead_out_are_not(tmp_path):
    write(tmp_path / "real", "train.json", "images")
    hub = tmp_path / "hub"
    (hub / "images").mkdir(parents=True)
    for name in ("train.json", "images/a.png"):
        (hub / name).symlink_to(tmp_path / "real" / name)
    assert len(load_samples(hub)) == 1 and load_samples(hub)[0].category == "liver"
    table = coco()
    table["images"][0]["file_name"] = "../../real/images/a.png"
    (tmp_path / "out/images").mkdir(parents=True)
    (tmp_path / "out/train.json").write_text(json.dumps(table))
    with pytest.raises(BadRow, match="image: .* is outside"):
        load_samples(tmp_path / "out")[0]


def test_a_question_of_its_own_and_a_single_file(tmp_path):
    write(tmp_path, "train.json", "images", query="What is the large organ?")
    assert load_samples(tmp_path / "train.json")[0].query == "What is the large organ?"


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"image_id": 8}, "image: no file ''"),
        ({"segmentation": [], "bbox": [1, 2]}, "annotation: not as COCO"),
        ({"segmentation": [[10, 5, float("inf"), 5, 30, 25]]}, "mask: has coordinates far"),
        ({"image_id": [7]}, "annotation: not"),
        ({"segmentation": {"size": [40, 60], "counts": [10**40]}}, "mask: RLE of 1000"),
        ({"segmentation": {"size": [40, 60], "counts": [3]}}, "mask: RLE of 3 pixels"),
        (
            {"segmentation": {"size": [60, 40], "counts": RLE["counts"]}},
            "mask: RLE has the size [60",
        ),
        ({"segmentation": {"size": 5, "counts": RLE["counts"]}}, "mask: is neither polygons nor"),
        ({"category_id": 9}, 'category_id: 9 has no name in "categories", so there is no question'),
        ({"category_id": None}, "category_id: None has no name"),
        ({"category_id": "1"}, "category_id: '1' has no name"),
        ({"segmentation": [["x"]]}, "mask: "),
        ({"segmentation": {"counts": "abc"}}, "mask: "),
        ({"segmentation": []}, "bbox: is missing, or points are"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, says):
    if changes.get("segmentation") == {"counts": "abc"} and importlib.util.find_spec("pycocotools"):
        says = "mask: is neither polygons nor RLE"
    samples = load_samples(write(tmp_path, "train.json", "images", **changes))
    with pytest.raises(BadRow, match="train.json, annotation 3") as error:
        samples[0]
    assert says in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_json_file_that_is_not_coco_s_is_named(tmp_path):
    (tmp_path / "train.json").write_text('{"images": []}')
    with pytest.raises(
        ValueError, match="train.json: annotations, categories: missing, or no list"
    ):
        load_samples(tmp_path)
    write(
        tmp_path / "more", "annotations/instances_train2017.json", "train2017"
    )  # captions beside instances
    (tmp_path / "more/annotations/captions_train2017.json").write_text(
        '{"images": [], "annotations": []}'
    )
    assert (
        len(load_samples(tmp_path / "more"))
        == len(load_samples(tmp_path / "more/annotations/instances_train2017.json"))
        == 1
    )
    write(tmp_path / "rob", "test/_annotations.coco.json", "test")
    assert load_samples(tmp_path / "rob/test", "test")[0].category == "liver"
    huge = coco() | {
        "images": [{"id": 7, "file_name": "a.png", "width": 300_000, "height": 300_000}],
        "annotations": [5, {"id": 3, "image_id": 7, "category_id": 1, "segmentation": POLYGON}],
    }
    (write(tmp_path / "huge", "train.json", "images") / "train.json").write_text(json.dumps(huge))
    for i, says in enumerate(
        ("annotation 0, annotation: not as COCO", "annotation 3, mask: of 300000x300000 pixels")
    ):
        with pytest.raises(BadRow, match=says):
            load_samples(tmp_path / "huge")[i]
    (tmp_path / "train.json").write_text("[")
    with pytest.raises(ValueError, match="train.json: not JSON"):
        load_samples(tmp_path)
