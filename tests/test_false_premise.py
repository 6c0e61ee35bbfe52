"""extras/false_premise.py: what an image shows, what may be asked about it, and the data set."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_scripts import run

from data import Examples, load_samples
from demo.make.data import SOURCES
from demo.make.wordings import WORDS
from extras.false_premise import (
    KINDS,
    Facts,
    Knowledge,
    asks_for_nothing,
    half_of,
    is_absent,
    make_rows,
    pair,
    place_of,
)
from metrics import prediction
from runtime.cli import ROOT


@pytest.mark.parametrize(
    "category, supercategory, modality, place",
    [
        ("liver", "Abdomen", "CT", "trunk"),
        ("heart", "Heart", "X-ray", "trunk"),
        ("brain tumour", "Neoplasm", "MR", "head"),
        ("lung nodule", "Neoplasm", "CT", "trunk"),
        ("left ventricle", "Heart", "MR", "trunk"),
        ("ventricles", "Brain", "MR", "head"),
        ("carotid artery", "Vessel", "Ultrasound", "head"),
        ("macula", "Eye", "Fundus", "eye"),
        ("polyp", "Non-neoplasm", "Endoscopy", "gut"),
        ("lesion", "Neoplasm", "CT", None),  # of what?
        ("brain and liver", "", "MR", None),  # two places
        ("", "", "", None),
    ],
)
def test_the_place_that_an_image_shows(category, supercategory, modality, place):
    assert place_of(category, supercategory, modality) == place


def fact(index: int, category: str, modality: str, place: str | None, image: str = "") -> Facts:
    return Facts(index, category, modality, place, image or f"image {index}")


LIVER_CT = fact(0, "liver", "ct", "trunk")
LIVER_MR = fact(1, "liver", "mr", "trunk")
SPLEEN_CT = fact(2, "spleen", "ct", "trunk")
HEART = fact(3, "heart", "x-ray", "trunk")
BRAIN_MR = fact(4, "brain stem", "mr", "head")
SKIN = fact(5, "melanoma", "dermoscopy", "skin")
UNKNOWN = fact(6, "haematoma", "ct", None)
ALL = [LIVER_CT, LIVER_MR, SPLEEN_CT, HEART, BRAIN_MR, SKIN, UNKNOWN]


def test_what_may_be_asked_about_an_image():
    knowledge = Knowledge(ALL)
    assert knowledge.kind(BRAIN_MR, LIVER_CT) == "absent category"  # livers are seen in MR
    assert knowledge.kind(SKIN, LIVER_CT) == "absent modality"
    assert knowledge.kind(BRAIN_MR, HEART) == "absent modality"


def test_what_an_image_may_show_after_all_is_not_asked_about():
    knowledge = Knowledge(ALL)
    assert knowledge.kind(LIVER_CT, SPLEEN_CT) is None  # an abdominal CT has a spleen
    assert knowledge.kind(LIVER_CT, HEART) is None  # hearts are X-rays here, and CT shows them
    assert knowledge.kind(LIVER_CT, LIVER_MR) is None
    assert knowledge.kind(UNKNOWN, LIVER_CT) is None
    assert knowledge.kind(LIVER_CT, UNKNOWN) is None
    assert knowledge.kind(fact(7, "liver", "", "trunk"), BRAIN_MR) is None  # modality not known
    tumour = fact(9, "brain tumour", "mr", "head")
    assert Knowledge([*ALL, tumour]).kind(SKIN, tumour) is None  # a lump is a lump
    assert Knowledge([*ALL, tumour]).kind(LIVER_MR, tumour) == "absent category"
    both = [*ALL, fact(8, "brain stem", "mr", "trunk", "image 1")]  # odd, but the data says so
    assert Knowledge(both).kind(LIVER_MR, BRAIN_MR) is None


def test_each_image_is_used_once_and_categories_evenly():
    facts = []
    for i in range(40):
        facts.append(fact(i, f"organ {i % 4}", "mr", ("head", "trunk")[i % 2]))
    pairs = pair(facts, "absent category", 20, np.random.default_rng(0))
    assert len(pairs) == 20
    assert len({image.index for image, _ in pairs}) == 20
    counts = Counter(asked.category for _, asked in pairs)
    for one, other in (("organ 0", "organ 2"), ("organ 1", "organ 3")):  # of one place each
        assert abs(counts[one] - counts[other]) <= 1
    assert pair(facts, "absent modality", 20, np.random.default_rng(0)) == []


# ---------------------------------------------------------------- the embedded data


@pytest.fixture(scope="module")
def embedded() -> Examples:
    return load_samples(ROOT / "demo/data", "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("absent")
    said, _ = run("-m extras.false_premise --count 45 --out", out)
    assert "15 absent category, 15 absent modality, 15 absent side, 15 present side" in said
    assert "have no known place" in said
    return out


def test_a_question_about_nothing_is_never_about_what_its_scene_can_show(embedded, made):
    """What the generator draws into one scene together is not asked about each other's pictures.
    Its scene "linear_us" has a neck or a breast, never both."""
    scenes = {}
    for category, sources in SOURCES.items():
        several = {scene for scene, _ in sources}
        scenes[category] = several - {None, "patient", "linear_us"}
    by_id = {row["id"]: row for row in embedded.rows}
    checked = 0
    for row in load_samples(made, "test").rows:
        if row["extra"]["kind"] not in KINDS[:2]:
            continue
        shown = by_id[row["extra"]["image_of"]]["category"]
        assert not scenes[shown] & scenes[row["category"]], row["id"]
        assert WORDS[shown].group != row["supercategory"], row["id"]
        checked += 1
    assert checked == 30


def test_the_set_is_an_ordinary_one_with_a_mark(made, embedded):
    run("data.py", made)
    examples = load_samples(made, "test")
    by_id = {row["id"]: i for i, row in enumerate(embedded.rows)}
    kinds = Counter()
    for i, example in enumerate(examples):
        kinds[example.extra["kind"]] += 1
        p = prediction(example, i, [""], sizes=None)
        assert p["wording"] == example.extra["kind"]
        assert is_absent(p) == asks_for_nothing(example)
        assert is_absent(p) == example.extra["kind"].startswith("absent")
        assert p["names"] == []
        source = embedded[by_id[example.extra["image_of"]]]
        assert np.array_equal(np.asarray(example.image), np.asarray(source.image))
    assert kinds == dict.fromkeys((*KINDS, "present side"), 15)


def test_sides_are_true_for_the_twin_and_false_for_the_question(made):
    by_source = {}
    for example in load_samples(made, "test"):
        if example.extra["kind"].endswith("side"):
            pair_of = by_source.setdefault(example.extra["image_of"], {})
            pair_of[example.extra["kind"]] = example
    assert len(by_source) == 15
    for twins in by_source.values():
        half = half_of(twins["present side"])
        other = {"left": "right", "right": "left"}[half]
        assert f"in the {half} half" in twins["present side"].query
        assert f"in the {other} half" in twins["absent side"].query
        assert not asks_for_nothing(twins["present side"])


def test_the_seed_decides(embedded):
    one, _ = make_rows(embedded, 9, seed=0)
    again, _ = make_rows(embedded, 9, seed=0)
    other, _ = make_rows(embedded, 9, seed=1)
    ids = [row["extra_info"]["id"] for row in one]
    assert ids == [row["extra_info"]["id"] for row in again]
    assert ids != [row["extra_info"]["id"] for row in other]


def test_the_embedded_set_is_what_the_command_makes_of_the_embedded_data(embedded):
    rows, _ = make_rows(embedded, 60, seed=0)
    there = load_samples(ROOT / "demo/absent", "test")
    assert there.ids() == [row["extra_info"]["id"] for row in rows]
    kinds = [row["extra"]["kind"] for row in there.rows]
    assert kinds[:4] == [*KINDS, "present side"]  # in turns, so that --limit has all of them


def test_a_mix_has_both_splits_and_the_ordinary_rows_as_they_were(tmp_path, embedded):
    said, _ = run("-m extras.false_premise --mix --limit 30 --share 0.25 --out", tmp_path / "mix")
    assert said.count("30 ordinary rows") == 2
    rows = load_samples(tmp_path / "mix", "test")
    assert len(load_samples(tmp_path / "mix", "train")) > 30
    ordinary = embedded.spread(30)
    for example, source in zip(rows[:30], ordinary):
        assert not asks_for_nothing(example)
        for key in ("id", "query", "bbox", "points", "category", "think"):
            assert getattr(example, key) == getattr(source, key)
        assert example.extra["names"] == source.extra["names"]
        assert example.extra["unseen_wording"] == source.extra["unseen_wording"]


def test_a_folder_of_ones_own_works_as_well(tmp_path):
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    lines = []
    rows = [("a", "liver", "Abdomen", "MR"), ("b", "brain stem", "Brain", "MR")]
    for name, category, group, modality in rows:
        Image.new("RGB", (60, 60), "grey").save(folder / f"images/{name}.png")
        lines.append(
            f'{{"image": "{name}.png", "query": "Where is {name}?", "category": "{category}", '
            f'"supercategory": "{group}", "modality": "{modality}", "split": "test", '
            '"bbox": [10, 10, 30, 30], "points": [[15, 15], [20, 20]]}'
        )
    (folder / "samples.jsonl").write_text("\n".join(lines))
    run("-m extras.false_premise --data", folder, "--out", tmp_path / "out")
    examples = load_samples(tmp_path / "out", "test")
    assert {example.extra["kind"] for example in examples} == {"absent category"}
    assert {example.query for example in examples} == {"Where is a?", "Where is b?"}
    assert all(example.mask is None for example in examples)


def test_data_that_says_too_little_is_one_line(tmp_path):
    folder = tmp_path / "mine"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (60, 60)).save(folder / "images/a.png")
    (folder / "samples.jsonl").write_text(
        '{"image": "a.png", "query": "?", "split": "test", "bbox": [1, 1, 30, 30], '
        '"points": [[5, 5], [9, 9]]}'
    )
    out = tmp_path / "out"
    _, error = run("-m extras.false_premise --data", folder, "--out", out, check=2)
    assert "no question can be made" in error
    assert not out.exists()
    _, error = run("-m extras.false_premise --share 2 --out", out, check=2)
    assert "--share between 0 and 1" in error
