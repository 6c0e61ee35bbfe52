"""Builds demo/histology: sections whose questions mean one of many alike, or several pieces.

    python -m demo.make.histology             # demo/histology/{train,test}.parquet, 0.8 MB, 8 s
    python -m demo.make.histology --train 2000 --test 0 --seed 1 --out build/histology

The second command makes a pool for a warm start. demo/data has no such targets: there "the large
gland" and "the white blood cell" are the only ones. Four categories take turns, each with pictures
of its own (112 to 140 px, a few larger):

  nucleus       one nucleus of 3 to 6 that look alike, and a row for each of them. The question is
                ambiguous on purpose: nothing in it says which nucleus is meant
  all nuclei    3 to 9 nuclei, scattered; the mask is their union
  gland pieces  one branched gland that the section cuts 3 to 6 times, side by side; the mask is all
                of it
  all glands    2 to 5 glands, scattered; the mask is their union

The pieces of a mask are at least 4 pixels apart. extra_info.kind is "one" or "all", and
extra_info.alike is how many pieces or look-alikes there are. Picture i of a split depends on (seed,
split, i) only. Questions never name their target (demo/make/wordings.py); half of the test split's
are unseen wordings.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import ndimage

from data import box_from_mask
from demo.make.data import SPLITS, encode_image, encode_mask, pick_size, umrg_row, write_parquet
from demo.make.phantoms import Canvas, Rng, Size, cells, finish, gland, stroma
from demo.make.wordings import Words, check, names, pick_query, pick_trace

APART = 6  # pixels between the circles that pieces are drawn in
MODALITY = "Histopathology"
COUNTS = {  # fewest and most pieces in a picture
    "nucleus": (3, 6),
    "all nuclei": (3, 9),
    "gland pieces": (3, 6),
    "all glands": (2, 5),
}
WORDS = {
    "nucleus": Words(
        "Histology",
        "a single nucleus",
        "nucle",
        ("a dark round violet body", "a violet disc within pink tissue"),
        (
            "the dark round body that holds a cell's genes",
            "the violet disc in the middle of a cell",
            "the round violet spot that stains with haematoxylin",
            "the dark body that divides when a cell divides",
            "the round violet body with the genes inside",
            "the dark disc that haematoxylin stains",
        ),
    ),
    "all nuclei": Words(
        "Histology",
        "the whole set of nuclei",
        "nucle",
        ("a scatter of dark round bodies", "a field of violet discs"),
        (
            "the set of all dark round bodies that hold the cells' genes",
            "every violet disc in the pink field taken together",
            "the sum of all round spots stained by haematoxylin",
            "all the dark bodies that a pathologist would count",
            "every dark round body with genes inside",
            "all violet discs in the field, without exception",
        ),
    ),
    "gland pieces": Words(
        "Histology",
        "the branched gland",
        "gland crypt acin tubul",
        ("a cluster of rings with pale hollows", "a close group of cell-lined openings"),
        (
            "the close cluster of rings that belong to one branching structure",
            "the one structure that the section has cut several times",
            "the group of neighbouring hollows lined by purple cells",
            "the whole lobed structure whose branches lie side by side",
            "the cluster of rings that are branches of one structure",
            "the structure cut several times, with all its hollows",
        ),
    ),
    "all glands": Words(
        "Histology",
        "the whole set of glands",
        "gland crypt acin tubul",
        ("a scatter of purple rings", "a field of separate hollow rings"),
        (
            "the set of all purple rings with a pale hollow",
            "every hollow structure lined by purple cells, near or far",
            "all the rings here that pour mucus into their hollows",
            "the sum of all round structures with a white opening",
            "every purple ring around a pale opening",
            "all hollow structures here that make mucus",
        ),
    ),
}

# ---------------------------------------------------------------- pictures

Circle = tuple[float, float, float]  # x, y and radius in scene units
Drawn = tuple[np.ndarray, list[np.ndarray]]  # image (H, W, 3) in 0..1, and the mask of each piece


def places(
    c: Canvas,
    count: int,
    radius: tuple[float, float],
    within: tuple[float, float, float, float] | None = None,
) -> list[Circle]:
    """Returns `count` circles that are apart from each other.

    radius: the range of the radii. within: x1, y1, x2, y2 of the circles' edges; None: the
    picture."""
    u = c.rng.uniform
    if within is None:
        within = (c.x.min(), c.y.min(), c.x.max(), c.y.max())
    x1, y1, x2, y2 = within
    found: list[Circle] = []
    while len(found) < count:
        found = []
        for _ in range(40 * count):
            r = u(*radius)
            x = u(x1 + r, x2 - r)
            y = u(y1 + r, y2 - r)
            if len(found) < count and is_apart(c, (x, y, r), found):
                found.append((x, y, r))
    return found


def is_apart(c: Canvas, circle: Circle, others: list[Circle]) -> bool:
    """Whether a circle keeps its distance from the others."""
    x, y, r = circle
    for other_x, other_y, other_r in others:
        distance = math.hypot(x - other_x, y - other_y)
        if distance <= 1.15 * (r + other_r) + APART * c.px:
            return False
    return True


def nuclei(rng: Rng, size: Size, count: int) -> Drawn:
    """Draws `count` look-alike nuclei in pink stroma."""
    c = Canvas(rng, size, (0, 0, 0), turn=0, zoom=(0.95, 1.1), shift=0, stretch=0)
    u = rng.uniform
    _, violet, _ = stroma(c)
    for i, (x, y, r) in enumerate(places(c, count, (0.11, 0.14))):
        body = c.blob(x, y, r, r * u(0.8, 1), u(0, 3), 0.05)
        c.paint(body, violet * u(0.95, 1.05), f"{i}", soft=1.5)
        spots = c.pixels(np.array([[x, y]]) + rng.normal(0, 0.3 * r, (3, 2)))
        cells(c, spots, rng.uniform(0.8, 1.4, 3), violet * 0.7, 0.05, 0.7)  # clumps of chromatin
    image = finish(rng, np.clip(c.image, 0, 1), 0.012, 0, 0.06)
    return image, list(c.masks().values())


def glands(rng: Rng, size: Size, count: int, together: bool) -> Drawn:
    """Draws `count` scattered glands or, together, as many cuts through one, side by side."""
    c = Canvas(rng, size, (0, 0, 0), turn=0, zoom=(0.95, 1.1), shift=0, stretch=0)
    pink, violet, fibre = stroma(c)
    centres = rng.uniform((0, 0), size[::-1], (int(size[0] * size[1] / 500), 2))
    cells(c, centres, rng.uniform(1.2, 1.8, len(centres)), violet, 0.12, 0.4)
    x, y = rng.uniform(-0.3, 0.3, 2)
    if together:
        rings = places(c, count, (0.13, 0.18), (x - 0.62, y - 0.62, x + 0.62, y + 0.62))
    else:
        rings = places(c, count, (0.17, 0.26))
    for i, (ring_x, ring_y, r) in enumerate(rings):
        gland(c, ring_x, ring_y, r, f"{i}", pink, violet, fibre)
    image = finish(rng, np.clip(c.image, 0, 1), 0.012, 0, 0.06)
    return image, list(c.masks().values())


def draw(rng: Rng, size: Size, category: str) -> Drawn:
    """Draws a picture of a category, whose pieces are all in it, apart, and large enough to point
    at."""
    least, most = COUNTS[category]
    count = int(rng.integers(least, most + 1))
    while True:
        if "nucle" in category:
            image, masks = nuclei(rng, size, count)
        else:
            image, masks = glands(rng, size, count, together=category == "gland pieces")
        if are_apart(masks) and all(is_one_piece(mask) for mask in masks):
            return image, masks


def are_apart(masks: list[np.ndarray]) -> bool:
    """Whether no two masks come closer than 4 pixels."""
    widened = [ndimage.binary_dilation(mask, iterations=2) for mask in masks]
    return np.sum(widened, axis=0).max() == 1


def is_one_piece(mask: np.ndarray) -> bool:
    _, count = ndimage.label(mask, np.ones((3, 3)))
    return count == 1 and mask.sum() >= 80


# ---------------------------------------------------------------- rows


def make_rows(seed: int, part: int, index: int) -> list[dict]:
    """Returns the rows about picture `index` of part 0 (train) or 1 (test), in the U-MRG schema:
    one for each nucleus, or one for all pieces."""
    rng = np.random.default_rng([seed, part, index])
    split = SPLITS[part]
    category = list(WORDS)[index % len(WORDS)]
    unseen = part == 1 and index // len(WORDS) % 2 == 1
    size = pick_size(rng)
    image, masks = draw(rng, size, category)
    name = f"{split}_{index:04}"
    encoded = encode_image(np.round(image * 255).astype(np.uint8))
    if category == "nucleus":
        targets = {f"{name}_{k}": mask for k, mask in enumerate(masks)}
    else:
        targets = {name: np.any(masks, axis=0)}
    rows = []
    for identity, mask in targets.items():
        query, wording = pick_query(rng, category, MODALITY, "", unseen, WORDS)
        extra = {
            "id": identity,
            "supercategory": "Histology",
            "category": category,
            "index": 0,  # in its split, see make_split
            "kind": "one" if category == "nucleus" else "all",
            "alike": len(masks),
            "wording": wording,
            "unseen_wording": unseen,
            "names": names(category, "", WORDS),
            "think": pick_trace(rng, category, MODALITY, "", box_from_mask(mask), size, WORDS),
        }
        picture = {"bytes": encoded, "path": f"{name}.jpg"}
        encoded_mask = {"bytes": encode_mask(mask), "path": f"{identity}.png"}
        rows.append(umrg_row(query, picture, encoded_mask, mask, extra))
    return rows


def make_split(seed: int, part: int, count: int) -> list[dict]:
    """Returns about `count` rows: pictures of each category in turn, until a category has its
    quarter."""
    rows: list[dict] = []
    rows_of: Counter[str] = Counter()
    index = 0
    while len(rows) < count:
        category = list(WORDS)[index % len(WORDS)]
        if rows_of[category] < count / len(WORDS):
            made = make_rows(seed, part, index)
            rows_of[category] += len(made)
            rows += made
        index += 1
    for number, row in enumerate(rows):
        row["extra_info"]["index"] = number
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, default=120, help="rows of the training split")
    parser.add_argument("--test", type=int, default=90, help="rows of the test split; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo/histology"))
    args = parser.parse_args()
    check(WORDS)
    args.out.mkdir(parents=True, exist_ok=True)
    for part, count in enumerate((args.train, args.test)):
        if count == 0:
            continue
        rows = make_split(args.seed, part, count)
        write_parquet(rows, args.out / f"{SPLITS[part]}.parquet")
        counts = Counter(row["extra_info"]["category"] for row in rows)
        for category, number in sorted(counts.items()):
            print(f"{SPLITS[part]:6}{category:14}{number:4}")


if __name__ == "__main__":
    main()
