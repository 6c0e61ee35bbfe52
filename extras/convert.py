"""Writes other data sets as a folder with samples.jsonl, which --data takes (runtime/readers.py).

    python -m extras.convert slake SLAKE out       # mask.txt, {train,validation,test}.json, imgs/
    python -m extras.convert biomedparse DATA out  # {train,test}/, {train,test}_mask/, *.json
    python -m extras.convert pannuke PANNUKE out   # fold1-*.parquet … fold3-*.parquet

There is one mask per target, and box and key points are the mask's. A row says its kind (a row
"by wording" of evaluate.py), its language and what else the source says of it:

  slake         explicit: the target is named, by our question for each label or by a question of
                the set. implicit: only the answer names it. English is in the splits train, val and
                test, and Chinese in train_zh, val_zh and test_zh.
  biomedparse   explicit: the names of the files are made into questions.
  pannuke       one: a nucleus among `alike` of its class, ambiguous on purpose. all: their union.
                Fold 3 is the split "test".

Sides in names are the patient's. "side": {"patient": "left", "image": "right"} also has the half of
the image.

What is unknown, missing or wrong is counted and named in OUT/report.json, and so is every question
that is left out.
"""

import argparse
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data import box_from_mask
from extras.convert_folder import Folder, bytes_in, greys, json_list, parquet_rows
from extras.convert_words import mentions, target, where_is
from rewards import Box
from runtime.cli import Parser, exit_on, show_every_character
from runtime.files import parse_object, read_text

SHOWN = 3  # names of a fault that are printed; report.json has them all


def first_that_exists(paths: list[Path]) -> Path | None:
    for path in paths:
        if path.exists():
            return path
    return None


# ---------------------------------------------------------------- SLAKE

LEAST = 16  # pixels of a label in a mask: fewer are traces of resampling
SLACK = 2  # pixels by which a box of detection.json may differ from the mask's
QUESTION_FILES = {
    "test": ["test.json"],
    "val": ["validation.json", "validate.json"],
    "train": ["train.json"],
}
NO_REGION = {"KG", "Modality", "Plane", "Quality"}  # content types of questions that are about none


@dataclass(frozen=True)
class Asked:
    """A question of SLAKE. where: file and row, for people."""

    where: str
    row: dict


def slake(source: Path, out: Folder) -> None:
    """Adds each label of each mask.png, and the set's own questions that fit just one of them."""
    labels = slake_labels(source / "mask.txt")
    asked, split_of = slake_questions(source, out)
    images = first_that_exists([source / "imgs/imgs", source / "imgs"])
    if images is None or not images.is_dir():
        raise ValueError(f"{source / 'imgs'}: no such folder")
    with_question = {image.partition("/")[0] for image in split_of}
    for path in sorted(images.iterdir()):
        if path.is_dir() and path.name not in with_question:
            out.add_fault("image without a question", path.name)
    find = mentions(labels.values())
    for image, questions in asked.items():
        split = split_of[image]
        label_image(images / image, questions, split, labels, find, out)


def slake_labels(file: Path) -> dict[int, str]:
    """Returns {grey value: label} of mask.txt. ValueError names the line that is wrong."""
    labels = {}
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if not line.strip():
            continue
        value, _, name = line.partition(":")
        value = value.strip()
        name = name.strip()
        if not re.fullmatch("[0-9]+", value) or not name:
            raise ValueError(f"{file}, line {number}: not value:Name")
        if int(value) in labels:
            raise ValueError(f"{file}, line {number}: the value {value} was there before")
        labels[int(value)] = name
    return labels


def slake_questions(source: Path, out: Folder) -> tuple[dict[str, list[Asked]], dict[str, str]]:
    """Returns the questions about each image, and the split of each image.

    Test is read before train, so an image that is in both stays in test."""
    asked: dict[str, list[Asked]] = defaultdict(list)
    split_of: dict[str, str] = {}
    for split, names in QUESTION_FILES.items():
        file = first_that_exists([source / name for name in names])
        if file is None:
            out.add_fault("missing file", f"{names[0]}, the questions of {split}")
            continue
        for number, row in enumerate(json_list(file)):
            where = f"{file.name}, row {number}"
            image = str(row.get("img_name"))
            is_question = isinstance(row.get("question"), str)
            if not is_question or not re.fullmatch(r"[\w-]+/[\w.-]+", image):
                out.add_fault("question left out: no question, or no img_name", where)
                continue
            first_split = split_of.setdefault(image, split)
            if first_split != split:
                out.add_fault(f"question left out: its image is also in {first_split}", where)
                continue
            asked[image].append(Asked(where, row))
    return asked, split_of


def label_image(
    file: Path,
    questions: list[Asked],
    split: str,
    labels: dict[int, str],
    find: Callable[[str], list[set[str]]],
    out: Folder,
) -> None:
    """Adds an image, the labels in the mask.png beside it, and the questions that fit one."""
    name = file.parent.name
    where = f"{name}/mask.png"
    lost = f"({len(questions)} questions left out)"
    grey = out.read(greys, file.parent / "mask.png", "mask", f"{where} {lost}")
    if grey is None:
        return
    image = out.add_image(file, name, f"{name}/{file.name} {lost}")
    if image is None:
        return
    row = questions[0].row
    modality = str(row.get("modality") or "")
    location = str(row.get("location") or "")
    facts = {
        "modality": modality,
        "location": location,
        "supercategory": f"{modality} {location}".strip(),
    }

    targets: dict[str, dict] = {}
    boxes: dict[str, Box] = {}
    for value in np.unique(grey[grey > 0]).tolist():
        mask = grey == value
        pixels = int(mask.sum())
        label = labels.get(value)
        if label is None:
            out.add_fault("unknown label", f"{where}: value {value}, {pixels} pixels")
            continue
        if pixels < LEAST:
            out.add_fault("wrong mask", f"{where}: {label} has only {pixels} pixels")
            continue
        found = out.add_target(mask, image, label, where, **facts)
        if found is None:
            continue
        targets[label] = found
        boxes[label] = box_from_mask(mask)
        for language in ("en", "zh"):
            out.add_row(
                found,
                id=f"{name}-{label}-{language}",
                split=split_in(language, split),
                kind="explicit",
                query=where_is(label, language),
                language=language,
            )
    compare_boxes(file.parent / "detection.json", boxes, set(labels.values()), out)
    for question in questions:
        add_own_question(question, name, split, targets, find, out)


def split_in(language: str, split: str) -> str:
    """Returns the split for a language: the Chinese half has splits of its own."""
    return f"{split}_zh" if language == "zh" else split


def add_own_question(
    asked: Asked,
    name: str,
    split: str,
    targets: dict[str, dict],
    find: Callable[[str], list[set[str]]],
    out: Folder,
) -> None:
    """Adds a question of the set where it fits one of an image's targets, {label: keys of a row}.

    The answer says which target is meant, or, where it names none, the question does."""
    row = asked.row
    question = row["question"]
    answer = str(row.get("answer") or "")
    language = row.get("q_lang")
    content = row.get("content_type")
    in_question = find(question)
    in_answer = find(answer)
    label, problem = target(in_answer if in_answer else in_question, targets.keys())
    if language not in ("en", "zh"):
        problem = f"language {language!r}"
    elif content in NO_REGION or row.get("base_type") == "kvqa":
        problem = f"it is about {content}"
    if problem:
        out.add_fault(f"question left out: {problem}", f"{asked.where}: {question} {answer}")
        return
    is_named = any(label in labels for labels in in_question)
    out.add_row(
        targets[label],
        id=f"{name}-q{row.get('qid')}",
        split=split_in(language, split),
        kind="explicit" if is_named else "implicit",
        query=question,
        language=language,
        qid=row.get("qid"),
        answer=answer,
        content_type=content,
    )


def compare_boxes(file: Path, boxes: dict[str, Box], known: set[str], out: Folder) -> None:
    """Adds a fault for each box of detection.json that is not what the mask says.

    boxes: {label: box of the mask}, which are believed; known: all labels of the set."""
    where = f"{file.parent.name}/{file.name}"
    found = out.read(detected_boxes, file, "box", where)
    if found is None:
        return
    for label, box in found.items():
        if label not in known:
            out.add_fault("unknown label", f"{where}: {label}")
            continue
        if label not in boxes:
            out.add_fault("wrong box", f"{where}: {label} is not in the mask")
            continue
        distances = np.abs(np.subtract(box, boxes[label]))
        if distances.max() > SLACK:
            out.add_fault("wrong box", f"{where}: {label} {box}, in the mask {boxes[label]}")


def detected_boxes(file: Path) -> dict[str, list[float]]:
    """Returns {label: [x1, y1, x2, y2]} of detection.json, [{label: [x, y, width, height]}, …].

    The box of a label that is there twice is around both."""
    boxes: dict[str, list[float]] = {}
    for item in json_list(file):
        for label, (x, y, width, height) in item.items():
            if not all(is_pixels(value) for value in (x, y, width, height)):
                raise ValueError(f"{label} has no box of four numbers of pixels")
            box = [x, y, x + width, y + height]
            if label in boxes:
                x1, y1, x2, y2 = boxes[label]
                box = [min(x1, box[0]), min(y1, box[1]), max(x2, box[2]), max(y2, box[3])]
            boxes[label] = box
    return boxes


def is_pixels(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # no NaN, nothing that overflows


# ---------------------------------------------------------------- BiomedParse


def biomedparse(source: Path, out: Folder) -> None:
    """Adds the masks IMG_MODALITY_SITE_TARGET+with+plus.png of the images IMG_MODALITY_SITE.png.

    source: one data set, or a folder of several."""
    folders = [path for path in source.glob("**/*_mask") if path.is_dir()]
    split_of: dict[Path, str] = {}
    # test before train: what is in both stays in test
    for masks in sorted(folders, key=lambda path: (path.name, path)):
        biomedparse_split(source, masks, split_of, out)


def biomedparse_split(source: Path, masks: Path, split_of: dict[Path, str], out: Folder) -> None:
    """Adds the masks of one folder. split_of: {image: split}, which is added to."""
    split = masks.name.removesuffix("_mask")
    within = masks.parent.relative_to(source)
    images = {}
    for path in sorted((masks.parent / split).glob("*")):
        if path.is_file():
            images[path.stem] = path
    sentences = biomedparse_sentences(masks.parent / f"{split}.json", masks, out)
    added: dict[str, dict | None] = {}  # what out.add_image returned
    for file in sorted(path for path in masks.iterdir() if path.is_file()):
        where = file.relative_to(source)
        stem = longest_beginning(file.stem, images)
        if not stem:
            out.add_fault("missing image", f"{where}: no file in {split}/ begins its name")
            continue
        if stem not in added:
            added[stem] = out.add_image(images[stem], stem, images[stem].relative_to(source))
        image = added[stem]
        grey = out.read(greys, file, "mask", where)
        label = re.sub("[+_]", " ", file.stem[len(stem) :]).strip()
        if not label or stem.count("_") < 2:
            out.add_fault("unknown label", f"{where}: not IMG_MODALITY_SITE_TARGET")
            continue
        first_split = split_of.setdefault(within / stem, split)
        if first_split != split:
            out.add_fault(f"mask left out: its image is also in {first_split}", where)
            continue
        if image is None:
            out.add_fault("mask left out: its image is wrong", where)
            continue
        if grey is None:
            continue
        found = out.add_target(grey > 0, image, label, where)
        if found is None:
            continue
        _, modality, site = stem.rsplit("_", 2)
        place = f" in this {modality} image of the {site.replace('+', ' ')}"
        out.add_row(
            found,
            id="-".join([*within.parts, file.stem]),
            split=split,
            kind="explicit",
            language="en",
            query=where_is(label, rest=place),
            supercategory=f"{modality} {site}",
            modality=modality,
            site=site,
            sentences=sentences[file.name],
        )
    for stem in sorted(images.keys() - added.keys()):
        out.add_fault("image without a mask", images[stem].relative_to(source))


def longest_beginning(stem: str, images: dict[str, Path]) -> str:
    """Returns the longest image name that begins a mask's name up to a "_", or ""."""
    while stem and stem not in images:
        stem = stem.rpartition("_")[0]
    return stem


def biomedparse_sentences(file: Path, masks: Path, out: Folder) -> dict[str, list[str]]:
    """Returns {mask file: what the set's json says of it}.

    It is empty where there is no such file: the names of the masks are enough."""
    sentences: dict[str, list[str]] = defaultdict(list)
    annotations = out.read(annotations_in, file, "sentences", file.name)
    for name, texts in annotations or []:
        sentences[name] += texts
        if not (masks / name).is_file():
            out.add_fault("missing mask", f"{masks.name}/{name}, which {file.name} has")
    return sentences


def annotations_in(file: Path) -> list[tuple[str, list[str]]]:
    """Returns (mask file, sentences) of each annotation. KeyError or TypeError where one is odd."""
    found = []
    for annotation in parse_object(read_text(file), file)["annotations"]:
        texts = [sentence["raw"] for sentence in annotation["sentences"]]
        found.append((str(annotation["mask_file"]), texts))
    return found


# ---------------------------------------------------------------- PanNuke

FOLDS = {  # what a file's name has in it: the split
    "fold1": "train",
    "fold2": "train",
    "fold3": "test",
    "train": "train",
    "val": "val",
    "test": "test",
}
COLUMNS = {"image", "instances", "categories", "tissue"}
NUCLEI = ("neoplastic", "inflammatory", "connective", "dead", "epithelial")
TISSUES = (
    "adrenal gland",
    "bile duct",
    "bladder",
    "breast",
    "cervix",
    "colon",
    "esophagus",
    "head and neck",
    "kidney",
    "liver",
    "lung",
    "ovarian",
    "pancreatic",
    "prostate",
    "skin",
    "stomach",
    "testis",
    "thyroid",
    "uterus",
)


@dataclass(frozen=True)
class Nucleus:
    number: int
    mask: np.ndarray  # (H, W) bool
    target: dict  # what Folder.add_target returned


def pannuke(source: Path, out: Folder) -> None:
    """Adds each nucleus of each image, and all of a class.

    The rows of the parquet files are {image, instances: masks, categories, tissue}."""
    for file in sorted(source.glob("**/*.parquet")):
        folds = re.findall("|".join(FOLDS), str(file.relative_to(source)))
        if not folds:
            raise ValueError(f"{file}: none of {', '.join(FOLDS)} is in its name")
        fold = folds[-1]
        for number, row in enumerate(parquet_rows(file, COLUMNS)):
            name = f"{fold}-{file.stem}-{number}"
            pannuke_image(row, name, f"{file.name}, row {number}", FOLDS[fold], out)


def pannuke_image(row: dict, name: str, where: str, split: str, out: Folder) -> None:
    """Adds an image and the questions about its nuclei."""
    masks = row["instances"] or []
    categories = row["categories"] or []
    if len(masks) != len(categories) or not masks:
        kind = "wrong mask" if masks else "image without a nucleus"
        counted = f"{len(masks)} nuclei, {len(categories)} categories"
        out.add_fault(kind, f"{where}: {counted}")
        return
    lost = f"({len(masks)} nuclei left out)"
    image = out.add_image(bytes_in(row["image"]), name, f"{where} {lost}")
    if image is None:
        return
    tissue = name_of(row["tissue"], TISSUES)
    if not tissue:
        out.add_fault("unknown label", f"{where}: tissue {row['tissue']}")
    facts = {
        "split": split,
        "language": "en",
        "supercategory": "histology",
        "tissue": tissue,
    }
    in_tissue = f" in this {tissue} tissue" if tissue else ""
    for label, nuclei in nuclei_of(masks, categories, image, where, facts, out).items():
        alike = len(nuclei)
        article = "an" if label[0] in "ie" else "a"
        for nucleus in nuclei:
            out.add_row(
                nucleus.target,
                id=f"{name}-{nucleus.number}",
                kind="one",
                alike=alike,
                query=f"Where is {article} {label} nucleus{in_tissue}?",
            )
        union = np.any([nucleus.mask for nucleus in nuclei], axis=0)
        out.add_row(
            out.add_target(union, image, f"all {label}", where, **facts),
            id=f"{name}-{label}",
            kind="all",
            alike=alike,
            query=f"Where are all the {label} nuclei{in_tissue}?",
        )


def nuclei_of(
    masks: list, categories: list, image: dict, where: str, facts: dict, out: Folder
) -> dict[str, list[Nucleus]]:
    """Writes the mask of each nucleus. Returns the nuclei of each class."""
    found: dict[str, list[Nucleus]] = defaultdict(list)
    for number, (struct, category) in enumerate(zip(masks, categories)):
        this = f"{where}, nucleus {number}"
        grey = out.read(greys, bytes_in(struct), "mask", this)
        label = name_of(category, NUCLEI)
        if not label:
            out.add_fault("unknown label", f"{this}: category {category}")
            continue
        if grey is None:
            continue
        target_row = out.add_target(grey > 0, image, label, this, **facts)
        if target_row is not None:
            found[label].append(Nucleus(number, grey > 0, target_row))
    return found


def name_of(number: object, names: tuple[str, ...]) -> str:
    """Returns the name that a column means by its number. "" where there is none."""
    if number not in range(len(names)):
        return ""
    return names[int(number)]  # a column with gaps has 3.0 for 3


# ---------------------------------------------------------------- the command

CONVERTERS = {"slake": slake, "biomedparse": biomedparse, "pannuke": pannuke}


def main(argv: list[str] | None = None) -> None:
    """Converts a data set. ValueError or OSError where that cannot be done; nothing is left."""
    show_every_character()
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=CONVERTERS)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="the data set's folder")
    parser.add_argument("out", type=Path, metavar="OUT", help="a folder that is not there yet")
    args = parser.parse_args(argv)
    parent = args.out.absolute().parent
    if args.out.exists() or args.out.is_symlink():
        raise ValueError(f"{args.out}: is there already; name another folder")
    for folder in (args.source, parent):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    with TemporaryDirectory(prefix=f".{args.out.name}-", dir=parent) as temporary:
        out = Folder(Path(temporary) / args.out.name)
        CONVERTERS[args.dataset](args.source, out)
        if not out.rows:
            first = first_fault(out)
            raise ValueError(
                f"{args.source}: nothing of {args.dataset} in it that can be used{first}"
            )
        out.finish()
        out.root.rename(args.out)
    for line in summary(out):
        print(line)
    images = out.files["images"]
    masks = out.files["masks"]
    print(f"{args.out}: {images} images, {masks} masks; all names are in report.json")


def first_fault(out: Folder) -> str:
    """Returns the first fault, for the end of a line. "" if there is none."""
    for kind, names in out.faults.items():
        return f"; {kind}: {names[0]}"
    return ""


def summary(out: Folder) -> Iterator[str]:
    """Yields lines about what was written and about what is wrong with the source."""
    for split, kinds in out.counts().items():
        counted = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        yield f"{split}: {kinds.total()} questions ({counted})"
    for side, count in sorted(out.sides.items()):
        yield f"{side}: {count}"
    for kind, names in sorted(out.faults.items()):
        shown = "; ".join(names[:SHOWN])
        more = " …" if len(names) > SHOWN else ""
        yield f"{kind}: {len(names)}: {shown}{more}"


if __name__ == "__main__":
    with exit_on(ValueError, OSError):
        main()
