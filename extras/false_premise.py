"""Questions about what is not in the image, made from any data set.

    python -m extras.false_premise --data demo/data --split test --count 90 --out build/absent
    python evaluate.py --data build/absent --split test
    python -m extras.false_premise --data demo/data --mix --out build/mixed     # to train on

Three kinds, as equal in number as the data allow:

    absent category   an image of one part of the body, asked about another part that pictures of
                      this modality can show: a brain MR, asked about the liver
    absent modality   the same, and no row of the data shows what is asked for in this modality: a
                      skin photograph, asked about the liver
    absent side       a lesion in one half of the image, asked about in the other half. Each such
                      question has a twin of the kind "present side", which names the true half, so
                      that the words alone do not give the answer away

Image and question are two rows of the data, so neither looks different from an ordinary one.

What could make such a question answerable after all. An abdominal CT has a spleen even where its
row is about the liver, and a chest CT has a heart although all hearts of the data are X-rays. So
what counts is not the modality, but which part of the body an image shows: the row's place, see
`place_of`. Chest and abdomen are one place, as a slice may show both, and so are head and neck. A
row whose place is not known is left out and counted. And no category is asked about that any row
of the data has in the same image.

Writes {split}.parquet in the U-MRG schema into --out. A question about what is not there has
"nothing_here": true in its extra_info, and its kind begins with "absent", which is its line in the
tables of evaluate.py ("wording"). Readers want a target for each row: it keeps the image's own box,
points and mask, and what is scored against them means nothing. With --mix both splits are written,
train and test, each with its ordinary rows as well.
"""

import argparse
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data import EMBEDDED, Example, Examples, load_samples
from runtime.cli import Parser, exit_on, show_every_character

ABSENT = "absent"  # kinds that begin so are of questions about what is not there
KINDS = ("absent category", "absent modality", "absent side")
PRESENT_SIDE = "present side"
SPLITS = ("train", "test")  # of --mix
TRACE = "I look for what the question describes. This image does not show it."

# modalities that show one place only, whatever the category
CLOSED = {
    "fundus": "eye",
    "oct": "eye",
    "dermoscopy": "skin",
    "endoscopy": "gut",
    "colonoscopy": "gut",
    "histopathology": "slide",
    "pathology": "slide",
    "microscopy": "slide",
}
PLACES = {  # place: words of super-categories and categories that lie there
    "head": "brain cerebral cerebellum hemisphere ventricles callosum head skull neck carotid",
    "trunk": "abdomen heart lung lungs chest thorax liver spleen kidney kidneys pancreas stomach "
    "bladder prostate uterus colon aorta pneumonia pleural cardiac myocardium atrium breast spine",
    "eye": "eye retina retinal macula optic",
    "skin": "skin melanoma",
    "slide": "histology nucleus nuclei gland",
}
# of a lesion another one may be in the other half of an image; of an organ, it always is
LESIONS = (
    "tumour tumor cancer nodule mass lesion cyst polyp consolidation haematoma hematoma aneurysm "
    "melanoma pneumonia metastasis"
)

# ---------------------------------------------------------------- the mark


def asks_for_nothing(example: Example) -> bool:
    """Whether an example's question is about what its image does not show."""
    return example.extra.get("nothing_here") is True


def is_absent(p: dict) -> bool:
    """`asks_for_nothing` of a prediction, a line of predictions.jsonl."""
    return (p.get("wording") or "").startswith(ABSENT)


# ---------------------------------------------------------------- what a row shows


@dataclass(frozen=True)
class Facts:
    """What is known of a row without its pixels."""

    index: int  # in its split
    category: str
    modality: str  # lower case; "" where the data does not say
    place: str | None
    image: Any  # equal where two rows are about one image


def place_of(category: str, supercategory: str, modality: str) -> str | None:
    """Returns the part of the body that an image shows, a key of PLACES or a value of CLOSED; None
    where it is not known, or where the words name several."""
    closed = CLOSED.get(modality.lower())
    if closed is not None:
        return closed
    for text in (category, supercategory):  # "brain tumour" says more than "Neoplasm"
        words = set(text.lower().split())
        found = [place for place, known in PLACES.items() if words & set(known.split())]
        if len(found) == 1:
            return found[0]
    return None


def is_lesion(category: str) -> bool:
    """Whether one of the LESIONS is in the name of a category."""
    return bool(set(LESIONS.split()) & set(category.lower().split()))


def image_key(row: dict) -> Any:
    """Returns a path, or the hash of the bytes: what tells two images apart."""
    source = row["image"]
    if callable(source):
        source = source()
    return hash(source) if isinstance(source, bytes) else source


def facts_of(examples: Examples) -> list[Facts]:
    """Returns the facts of each row, in order."""
    found = []
    for index, row in enumerate(examples.rows):
        modality = str(row["extra"].get("modality") or "").lower()
        place = place_of(row["category"], row["supercategory"], modality)
        found.append(Facts(index, row["category"].lower(), modality, place, image_key(row)))
    return found


class Knowledge:
    """What the data set as a whole says of its categories."""

    def __init__(self, facts: Sequence[Facts]):
        self.modalities: dict[str, set[str]] = {}  # of each category
        self.in_image: dict[Any, set[str]] = {}  # categories that rows have in an image
        for fact in facts:
            self.modalities.setdefault(fact.category, set()).add(fact.modality)
            self.in_image.setdefault(fact.image, set()).add(fact.category)

    def kind(self, image: Facts, asked: Facts) -> str | None:
        """Returns which kind of question it is to ask about one row's target in another row's
        image; None where the image may show it, or too little is known."""
        if not image.modality or not asked.category:
            return None
        if image.place is None or asked.place is None or image.place == asked.place:
            return None
        shown = self.in_image[image.image]
        if asked.category in shown:
            return None
        if is_lesion(asked.category) and any(is_lesion(category) for category in shown):
            return None
        if image.modality in self.modalities[asked.category]:
            return "absent category"
        return "absent modality"


# ---------------------------------------------------------------- pairs


def pair(
    facts: Sequence[Facts], kind: str, count: int, rng: np.random.Generator
) -> list[tuple[Facts, Facts]]:
    """Returns up to `count` pairs (image, question) of a kind. Images and questions are used as
    evenly as that goes: each image at most once."""
    knowledge = Knowledge(facts)
    used: Counter[str] = Counter()
    pairs = []
    for i in rng.permutation(len(facts)):
        if len(pairs) == count:
            break
        image = facts[i]
        fitting = [asked for asked in facts if knowledge.kind(image, asked) == kind]
        if not fitting:
            continue
        rarest = min(used[asked.category] for asked in fitting)
        fitting = [asked for asked in fitting if used[asked.category] == rarest]
        asked = fitting[rng.integers(len(fitting))]
        used[asked.category] += 1
        pairs.append((image, asked))
    return pairs


def half_of(example: Example) -> str | None:
    """Returns "left" or "right" where the box lies in one half of the image; None if in both."""
    middle = example.image.width / 2
    x1, _, x2, _ = example.bbox
    if x2 <= middle:
        return "left"
    if x1 >= middle:
        return "right"
    return None


def one_sided(
    facts: Sequence[Facts], examples: Examples, count: int, rng: np.random.Generator
) -> list[tuple[Facts, str]]:
    """Returns up to `count` rows of lesions that lie in one half of their image, and that half. An
    image in which the data has the same category twice is left out, and so is a question that has
    a side in it."""
    times = Counter((fact.image, fact.category) for fact in facts)
    found = []
    for i in rng.permutation(len(facts)):
        if len(found) == count:
            break
        fact = facts[i]
        words = set(examples.rows[i]["query"].lower().replace(",", " ").split())
        if not is_lesion(fact.category) or times[fact.image, fact.category] > 1:
            continue
        if words & {"left", "right"}:
            continue
        half = half_of(examples[i])
        if half is not None:
            found.append((fact, half))
    return found


# ---------------------------------------------------------------- rows of parquet


def make_rows(examples: Examples, count: int, seed: int) -> tuple[list[dict], int]:
    """Returns about `count` rows for parquet, the kinds in turns, and how many rows of the data
    have no known place. ValueError where no question can be made."""
    facts = facts_of(examples)
    rng = np.random.default_rng([seed, len(facts)])
    share = -(-count // len(KINDS))
    of_kind: list[list[list[dict]]] = []  # of each kind its questions, of a side with their twins
    for kind in KINDS[:2]:
        pairs = pair(facts, kind, share, rng)
        of_kind.append([[absent_row(examples, kind, *two)] for two in pairs])
    sides = one_sided(facts, examples, share, rng)
    of_kind.append([side_rows(examples, *side) for side in sides])
    rows = []
    for turn in zip_longest(*of_kind, fillvalue=()):
        for some in turn:
            rows += some
    if not rows:
        raise ValueError(
            "no question can be made: rows need a category and a modality in extra_info, and the "
            "data more than one part of the body"
        )
    return rows, sum(fact.place is None for fact in facts)


def absent_row(examples: Examples, kind: str, image: Facts, asked: Facts) -> dict:
    """Returns the row that asks the question of one row about the image of another."""
    example = examples[image.index]
    question = examples.rows[asked.index]
    extra = {
        "id": f"{kind.replace(' ', '_')}_{example.id}_{question['id']}",
        "supercategory": question["supercategory"],
        "category": question["category"],
        "modality": image.modality,
        "kind": kind,
        "nothing_here": True,
        "think": TRACE,
        "image_of": example.id,
        "question_of": question["id"],
    }
    return parquet_row(examples, image.index, example, question["query"], extra)


def side_rows(examples: Examples, fact: Facts, half: str) -> list[dict]:
    """Returns two rows about a lesion: in the half where it is not, and in the half where it is."""
    example = examples[fact.index]
    other = {"left": "right", "right": "left"}[half]
    rows = []
    for kind, side in (("absent side", other), (PRESENT_SIDE, half)):
        is_there = kind == PRESENT_SIDE
        extra = {
            "id": f"{kind.replace(' ', '_')}_{example.id}",
            "supercategory": example.supercategory,
            "category": example.category,
            "modality": fact.modality,
            "kind": kind,
            "nothing_here": not is_there,
            "think": example.think if is_there else TRACE,
            "image_of": example.id,
            "question_of": example.id,
        }
        query = f"{example.query} It lies in the {side} half of this picture."
        rows.append(parquet_row(examples, fact.index, example, query, extra))
    return rows


def parquet_row(
    examples: Examples, index: int, example: Example, query: str, extra: dict[str, Any]
) -> dict:
    """Returns a row in the U-MRG schema, with the image's own box, points and mask."""
    truth = {"bbox_2d": example.bbox, "point_2d": example.points}
    masks = []
    if example.mask is not None:
        pixels = Image.fromarray(np.uint8(example.mask) * 255)
        masks.append({"bytes": png_of(pixels), "path": f"{extra['id']}_mask.png"})
    return {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": query}],
        "images": [{"bytes": image_bytes(examples.rows[index], example), "path": extra["id"]}],
        "masks": masks,
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": extra,
    }


def image_bytes(row: dict, example: Example) -> bytes:
    """Returns the bytes that the data set has of an image, or PNG where it is a slice of a scan."""
    source = row["image"]
    if "scan" not in row["extra"]:
        if isinstance(source, Path):
            return source.read_bytes()
        if callable(source):
            source = source()
        if isinstance(source, bytes):
            return source
    return png_of(example.image)


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def ordinary_rows(examples: Examples) -> list[dict]:
    """Returns the rows of a data set as they are, in the U-MRG schema."""
    rows = []
    for index, row in enumerate(examples.rows):
        example = examples[index]
        extra = {key: value for key, value in row["extra"].items() if is_plain(value)}
        extra |= {
            "id": example.id,
            "supercategory": example.supercategory,
            "category": example.category,
            "think": example.think,
            "nothing_here": False,
        }
        rows.append(parquet_row(examples, index, example, example.query, extra))
    return rows


def is_plain(value: Any) -> bool:
    """Whether parquet can hold a value beside other rows' values of the same key."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, str | bool)


def write_split(rows: list[dict], folder: Path, split: str) -> None:
    """Writes a split. The file appears complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{split}.parquet.tmp"
    pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd", row_group_size=256)
    temporary.replace(folder / f"{split}.parquet")


# ---------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    show_every_character()
    parser = Parser(
        prog="python -m extras.false_premise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", default=str(EMBEDDED["data"]), help="a data set, see data.py")
    parser.add_argument("--split", default="test", help="of --data (test)")
    parser.add_argument("--count", type=int, default=90, help="questions about nothing (90)")
    parser.add_argument("--share", type=float, default=0.25, help="of them with --mix (0.25)")
    parser.add_argument("--limit", type=int, default=0, help="rows of a split, spread (0: all)")
    parser.add_argument("--mix", action="store_true", help="train and test with ordinary rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the parquet files")
    args = parser.parse_args(argv)
    with exit_on(ValueError, OSError):
        if args.count < 1 or not 0 < args.share < 1:
            raise ValueError("--count must be at least 1, and --share between 0 and 1")
        for split in SPLITS if args.mix else [args.split]:
            make_split(args, split)


def make_split(args: argparse.Namespace, split: str) -> None:
    """Makes and writes one split, and prints how many rows of each kind it has."""
    examples = load_samples(args.data, split)
    if args.limit:
        examples = examples.spread(args.limit)
    count = args.count
    ordinary = []
    if args.mix:
        count = round(args.share / (1 - args.share) * len(examples))
        ordinary = ordinary_rows(examples)
    rows, unknown = make_rows(examples, count, args.seed)
    write_split(ordinary + rows, args.out, split)
    kinds = Counter(row["extra_info"]["kind"] for row in rows)
    counted = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
    print(f"{args.out / split}.parquet: {len(ordinary)} ordinary rows, {counted}")
    if unknown:
        print(f"  {unknown} rows of {args.data}, {split}, have no known place: not paired")


if __name__ == "__main__":
    main()
