"""Other data sets as a folder with samples.jsonl, which --data takes (runtime/readers.py).

    python -m extras.convert slake SLAKE out          # mask.txt, {train,validation,test}.json, imgs/xmlabN/
    python -m extras.convert biomedparse DATA out     # {train,test}/, {train,test}_mask/, {train,test}.json
    python -m extras.convert pannuke PANNUKE out      # fold1-*.parquet … fold3-*.parquet; fold 3 is "test"

One mask per target; box and key points are the mask's. A sample says its kind (a row "by wording" of evaluate.py), its
language and what else the source says of it:
  slake         explicit: the target is named, by our question for each label or by one of the set; implicit: only
                the answer names it. English is in train, val and test; Chinese in train_zh, val_zh and test_zh.
  biomedparse   explicit, from file names; a mask is all there is of a target in the image.
  pannuke       one: a nucleus among `alike` of its class, ambiguous on purpose; all: their union.
Sides in names are the patient's; side = {"patient": "left", "image": "right"} also has the half of the image.

What is unknown, missing or wrong is counted and named in OUT/report.json, and so is every question that is left out.
"""

import argparse
import re
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data import box_from_mask
from extras.convert_folder import Folder, bytes_in, greys, json_list, parquet_rows
from extras.convert_words import mentions, target, where_is
from runtime.cli import Parser, exit_on
from runtime.files import parse_object, read_text

SHOWN = 3  # names of a fault that are printed; report.json has them all
LEAST = 16  # pixels of a label in SLAKE's masks: fewer are traces of resampling
SLACK = 2  # pixels by which a box of detection.json may differ from the mask's
LISTS = {
    "test": ("test.json",),
    "val": ("validation.json", "validate.json"),
    "train": ("train.json",),
}
NO_REGION = {"KG", "Modality", "Plane", "Quality"}  # content types of questions that are about none
FOLDS = {
    "fold1": "train",
    "fold2": "train",
    "fold3": "test",
    "train": "train",
    "val": "val",
    "test": "test",
}
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


# ---------------------------------------------------------------- SLAKE


def slake(source: Path, out: Folder) -> None:
    """Each label of mask.png, and the set's own questions that fit just one of them."""
    labels, asked, split_of = {}, defaultdict(list), {}
    for number, line in enumerate(read_text(source / "mask.txt").splitlines(), 1):
        value, _, name = map(str.strip, line.partition(":"))
        if line.strip() and (not re.fullmatch("[0-9]+", value) or not name or int(value) in labels):
            raise ValueError(
                f"{source / 'mask.txt'}, line {number}: not value:Name, or a value that was there before"
            )
        labels |= {int(value): name} if value else {}
    for split, names in LISTS.items():
        file = next((source / name for name in names if (source / name).is_file()), None)
        if not file:
            out.fault("missing file", f"{names[0]}, the questions of {split}")
        for number, row in enumerate(json_list(file) if file else ()):
            where, image = f"{file.name}, row {number}", row.get("img_name")
            if not isinstance(row.get("question"), str) or not re.fullmatch(
                r"[\w-]+/[\w.-]+", str(image)
            ):
                out.fault("question left out: no question, or no img_name", where)
            elif split_of.setdefault(image, split) != split:
                out.fault(f"question left out: its image is in {split_of[image]}, too", where)
            else:
                asked[image].append((where, row))
    images = next((path for path in (source / "imgs/imgs", source / "imgs") if path.is_dir()), None)
    if not images:
        raise ValueError(f"{source / 'imgs'}: no such folder")
    for path in sorted(images.iterdir()):
        if path.is_dir() and not any(image.startswith(f"{path.name}/") for image in split_of):
            out.fault("image without a question", path.name)
    find = mentions(list(labels.values()))
    for image, rows in asked.items():
        slake_image(images / image, rows, split_of[image], labels, find, out)


def slake_image(
    file: Path, rows: list, split: str, labels: dict[int, str], find, out: Folder
) -> None:
    name, places, boxes = file.parent.name, {}, {}
    lost = f"({len(rows)} questions left out)"
    grey = out.read(greys, file.parent / "mask.png", "mask", f"{name}/mask.png {lost}")
    image = None if grey is None else out.image(file, name, f"{name}/{file.name} {lost}")
    if not image:
        return
    facts = {key: str(rows[0][1].get(key) or "") for key in ("modality", "location")}
    facts["supercategory"] = " ".join(facts.values()).strip()
    for value, pixels in zip(
        *(array.tolist() for array in np.unique(grey[grey > 0], return_counts=True))
    ):
        label = labels.get(value)
        if not label:
            out.fault("unknown label", f"{name}/mask.png: value {value}, {pixels} pixels")
        elif pixels < LEAST:
            out.fault("wrong mask", f"{name}/mask.png: {label} has only {pixels} pixels")
        elif place := out.target(grey == value, image, label, f"{name}/mask.png", **facts):
            places[label], boxes[label] = place, box_from_mask(grey == value)
            for language in ("en", "zh"):
                out.add(
                    place,
                    id=f"{name}-{label}-{language}",
                    split=split + "_zh" * (language == "zh"),
                    kind="explicit",
                    query=where_is(label, language),
                    language=language,
                )
    compare_boxes(file.parent / "detection.json", boxes, set(labels.values()), out)
    for where, row in rows:
        language, content, answer = (
            row.get("q_lang"),
            row.get("content_type"),
            str(row.get("answer") or ""),
        )
        question, answered = find(row["question"]), find(answer)
        label, why = target(answered or question, set(places))
        if language not in ("en", "zh"):
            why = f"language {language!r}"
        elif content in NO_REGION or row.get("base_type") == "kvqa":
            why = f"it is about {content}"
        if why:
            out.fault(f"question left out: {why}", f"{where}: {row['question']} {answer}")
        else:
            out.add(
                places[label],
                id=f"{name}-q{row.get('qid')}",
                split=split + "_zh" * (language == "zh"),
                kind="explicit" if any(label in own for own in question) else "implicit",
                query=row["question"],
                language=language,
                qid=row.get("qid"),
                answer=answer,
                content_type=content,
            )


def compare_boxes(file: Path, boxes: dict, known: set[str], out: Folder) -> None:
    """Name where detection.json, [{label: [x, y, w, h]}, …], is not what the mask says; the mask is believed."""

    def read(file: Path) -> dict:
        given = defaultdict(list)
        for label, (x, y, w, h) in (pair for item in json_list(file) for pair in item.items()):
            given[label].append((x, y, -x - w, -y - h))
        return {
            label: np.multiply([min(edge) for edge in zip(*several)], (1, 1, -1, -1)).tolist()
            for label, several in given.items()
        }  # of a label that is there twice: around both

    where = f"{file.parent.name}/{file.name}"
    for label, box in (out.read(read, file, "box", where) or {}).items():
        if label not in known:
            out.fault("unknown label", f"{where}: {label}")
        elif label not in boxes:
            out.fault("wrong box", f"{where}: {label} is not in the mask")
        elif np.abs(np.subtract(box, boxes[label])).max() > SLACK:
            out.fault("wrong box", f"{where}: {label} {box}, in the mask {boxes[label]}")


# ---------------------------------------------------------------- BiomedParse


def biomedparse(source: Path, out: Folder) -> None:
    """IMG_MODALITY_SITE_TARGET+with+plus.png of IMG_MODALITY_SITE.png, in one data set, or a folder of several."""
    folders = sorted(
        (path for path in source.glob("**/*_mask") if path.is_dir()),
        key=lambda path: (path.name, path),
    )
    split_of = {}
    for folder in folders:  # test before train: what is in both stays in test
        split, within = folder.name.removesuffix("_mask"), folder.parent.relative_to(source)
        files = {
            path.stem: path for path in sorted((folder.parent / split).glob("*")) if path.is_file()
        }
        said, used = biomedparse_sentences(folder.parent / f"{split}.json", folder, out), {}
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            where, stem = file.relative_to(source), file.stem
            while stem and stem not in files:
                stem = stem.rpartition("_")[0]
            label = re.sub("[+_]", " ", file.stem[len(stem) :]).strip()
            if not stem:
                out.fault("missing image", f"{where}: no file in {split}/ begins its name")
                continue
            if stem not in used:
                used[stem] = out.image(files[stem], stem, files[stem].relative_to(source))
            grey = out.read(greys, file, "mask", where)
            if not label or stem.count("_") < 2:
                out.fault("unknown label", f"{where}: not IMG_MODALITY_SITE_TARGET")
            elif split_of.setdefault(within / stem, split) != split:
                out.fault(f"mask left out: its image is in {split_of[within / stem]}, too", where)
            elif not used[stem]:
                out.fault("mask left out: its image is wrong", where)
            elif grey is not None and (place := out.target(grey > 0, used[stem], label, where)):
                _, modality, site = stem.rsplit("_", 2)
                out.add(
                    place,
                    id="-".join([*within.parts, file.stem]),
                    split=split,
                    kind="explicit",
                    language="en",
                    query=where_is(
                        label, rest=f" in this {modality} image of the {site.replace('+', ' ')}"
                    ),
                    supercategory=f"{modality} {site}",
                    modality=modality,
                    site=site,
                    sentences=said[file.name],
                )
        for stem in sorted(files.keys() - used):
            out.fault("image without a mask", files[stem].relative_to(source))


def biomedparse_sentences(file: Path, masks: Path, out: Folder) -> dict[str, list[str]]:
    """{mask file: what the set's json says of it}. File names are enough where there is none."""

    def read(file: Path) -> list:
        annotations = parse_object(read_text(file), file)["annotations"]
        return [
            (a["mask_file"], [sentence["raw"] for sentence in a["sentences"]]) for a in annotations
        ]

    said = defaultdict(list)
    for name, sentences in out.read(read, file, "sentences", file.name) or ():
        said[name] += sentences
        if not (masks / name).is_file():
            out.fault("missing mask", f"{masks.name}/{name}, which {file.name} has")
    return said


# ---------------------------------------------------------------- PanNuke


def pannuke(source: Path, out: Folder) -> None:
    """Rows {image, instances: masks, categories, tissue}: each nucleus, and all of a class."""
    for file in sorted(source.glob("**/*.parquet")):
        fold = re.findall("|".join(FOLDS), str(file.relative_to(source)))
        if not fold:
            raise ValueError(f"{file}: none of {', '.join(FOLDS)} is in its name")
        for number, row in enumerate(
            parquet_rows(file, {"image", "instances", "categories", "tissue"})
        ):
            name, where = f"{fold[-1]}-{file.stem}-{number}", f"{file.name}, row {number}"
            nuclei, classes, tissue = row["instances"] or [], row["categories"] or [], row["tissue"]
            if len(nuclei) != len(classes) or not nuclei:
                out.fault(
                    "wrong mask" if nuclei else "image without a nucleus",
                    f"{where}: {len(nuclei)} nuclei, {len(classes)} categories",
                )
                continue
            if not (
                image := out.image(
                    bytes_in(row["image"]), name, f"{where} ({len(nuclei)} nuclei left out)"
                )
            ):
                continue
            if tissue not in range(len(TISSUES)):
                out.fault("unknown label", f"{where}: tissue {tissue}")
            facts = {
                "split": FOLDS[fold[-1]],
                "language": "en",
                "supercategory": "histology",
                "tissue": TISSUES[tissue] if tissue in range(len(TISSUES)) else "",
            }
            pannuke_image(nuclei, classes, image, name, where, facts, out)


def pannuke_image(
    nuclei: list, classes: list, image: dict, name: str, where: str, facts: dict, out: Folder
) -> None:
    masks = defaultdict(list)
    for i, (nucleus, label) in enumerate(zip(nuclei, classes)):
        this = f"{where}, nucleus {i}"
        grey = out.read(greys, bytes_in(nucleus), "mask", this)
        if label not in range(len(NUCLEI)):
            out.fault("unknown label", f"{this}: category {label}")
        elif grey is not None and (
            place := out.target(grey > 0, image, NUCLEI[label], this, **facts)
        ):
            masks[NUCLEI[label]].append((i, grey > 0, place))
    tissue = f" in this {facts['tissue']} tissue" if facts["tissue"] else ""
    for label, several in masks.items():
        for i, _, place in several:
            out.add(
                place,
                id=f"{name}-{i}",
                kind="one",
                alike=len(several),
                query=f"Where is {'an' if label[0] in 'ie' else 'a'} {label} nucleus{tissue}?",
            )
        union = np.any([mask for _, mask, _ in several], axis=0)
        out.add(
            out.target(union, image, f"all {label}", where, **facts),
            id=f"{name}-{label}",
            kind="all",
            alike=len(several),
            query=f"Where are all the {label} nuclei{tissue}?",
        )


CONVERTERS = {function.__name__: function for function in (slake, biomedparse, pannuke)}


def main(argv: list[str] | None = None) -> None:
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
            first = next((f"; {kind}: {names[0]}" for kind, names in out.faults.items()), "")
            raise ValueError(
                f"{args.source}: nothing of {args.dataset} in it that can be used{first}"
            )
        report = out.finish()
        out.root.rename(args.out)
    for split, kinds in report["samples"].items():
        print(
            f"{split}: {kinds.total()} samples ({', '.join(f'{n} {kind}' for kind, n in sorted(kinds.items()))})"
        )
    for side, count in sorted(out.sides.items()):
        print(f"{side}: {count}")
    for kind, names in sorted(out.faults.items()):
        print(f"{kind}: {len(names)}: {'; '.join(names[:SHOWN])}{' …' * (len(names) > SHOWN)}")
    print(
        f"{args.out}: {out.files['images']} images, {out.files['masks']} masks; all names are in report.json"
    )


if __name__ == "__main__":
    with exit_on(ValueError, OSError):
        main()
