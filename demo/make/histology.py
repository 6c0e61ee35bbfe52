"""Build demo/histology: stained sections whose questions mean one of many alike, or all of several
pieces.

    python -m demo.make.histology                                        # demo/histology, 0.8 MB, 8
                                                                         s
    python -m demo.make.histology --train 2000 --test 0 --seed 1 --out build/histology    # a pool
                                                                                          for a warm
                                                                                          start

demo/data has no such targets: there "the large gland" and "the white blood cell" are the only ones.
Four categories take turns, each with its own pictures (112 to 140 px, a few larger):
  nucleus       one nucleus of 3 to 6 that look alike, and a row for each of them: ambiguous on
                purpose. Nothing in a
                question says which; they are siblings (metrics.py)
  all nuclei    3 to 9 nuclei, scattered; the mask is their union
  gland pieces  one branched gland that the section cuts 3 to 6 times, side by side; the mask is all
                of it
  all glands    2 to 5 glands, scattered; the mask is their union
The pieces of a mask are at least 4 pixels apart. kind is "one" or "all". Picture i of a split
depends on (seed, split, i) only. Questions never name their target (demo/make/wordings.py); half of
the test split's are unseen wordings."""

import argparse
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
from scipy import ndimage

from data import box_from_mask
from demo.make.data import encode_image, encode_mask, pick_size
from demo.make.phantoms import Canvas, cells, finish, gland, stroma
from demo.make.wordings import Words, check, names, pick_query, pick_trace

APART = 6  # pixels between the circles that pieces are drawn in
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


def places(c, count, radius, within=None):
    """`count` circles (x, y, r) in scene units, apart from each other; radius: the range of r;
    within: of a circle's edges, (x1, y1, x2, y2), else the picture."""
    u = c.rng.uniform
    found = []
    x1, y1, x2, y2 = within or (c.x.min(), c.y.min(), c.x.max(), c.y.max())
    while len(found) < count:
        found = []
        for _ in range(40 * count):
            r = u(*radius)
            x = u(x1 + r, x2 - r)
            y = u(y1 + r, y2 - r)
            apart = all(
                math.hypot(x - a, y - b) > 1.15 * (r + s) + APART * c.px for a, b, s in found
            )
            if apart and len(found) < count:
                found.append((x, y, r))
    return found


def nuclei(rng, size, count):
    """`count` look-alike nuclei in pink stroma -> (image, [mask (H, W) of each])."""
    c = Canvas(rng, size, (0, 0, 0), turn=0, zoom=(0.95, 1.1), shift=0, stretch=0)
    u = rng.uniform
    _, violet, _ = stroma(c)
    for i, (x, y, r) in enumerate(places(c, count, (0.11, 0.14))):
        body = c.blob(x, y, r, r * u(0.8, 1), u(0, 3), 0.05)
        c.paint(body, violet * u(0.95, 1.05), f"{i}", soft=1.5)
        spots = c.pixels(np.array([[x, y]]) + rng.normal(0, 0.3 * r, (3, 2)))
        cells(c, spots, rng.uniform(0.8, 1.4, 3), violet * 0.7, 0.05, 0.7)  # clumps of chromatin
    return finish(rng, np.clip(c.image, 0, 1), 0.012, 0, 0.06), list(c.masks().values())


def glands(rng, size, count, together):
    """`count` glands, or as many cuts through one if together: side by side -> (image, [mask of
    each])."""
    c = Canvas(rng, size, (0, 0, 0), turn=0, zoom=(0.95, 1.1), shift=0, stretch=0)
    pink, violet, fibre = stroma(c)
    centres = rng.uniform((0, 0), size[::-1], (int(size[0] * size[1] / 500), 2))
    cells(c, centres, rng.uniform(1.2, 1.8, len(centres)), violet, 0.12, 0.4)
    x, y = rng.uniform(-0.3, 0.3, 2)
    if together:
        rings = places(c, count, (0.13, 0.18), (x - 0.62, y - 0.62, x + 0.62, y + 0.62))
    else:
        rings = places(c, count, (0.17, 0.26))
    for i, (x, y, r) in enumerate(rings):
        gland(c, x, y, r, f"{i}", pink, violet, fibre)
    return finish(rng, np.clip(c.image, 0, 1), 0.012, 0, 0.06), list(c.masks().values())


def draw(rng, size, category):
    """(image, [mask of each piece]): all in the picture, apart, and large enough to point at."""
    least, most = {
        "nucleus": (3, 6),
        "all nuclei": (3, 9),
        "gland pieces": (3, 6),
        "all glands": (2, 5),
    }[category]
    count = int(rng.integers(least, most + 1))
    while True:
        if "nucle" in category:
            image, masks = nuclei(rng, size, count)
        else:
            image, masks = glands(rng, size, count, together=category == "gland pieces")
        gaps = (
            np.sum([ndimage.binary_dilation(mask, iterations=2) for mask in masks], axis=0).max()
            == 1
        )
        whole = all(
            ndimage.label(mask, np.ones((3, 3)))[1] == 1 and mask.sum() >= 80 for mask in masks
        )
        if gaps and whole:
            return image, masks


# ---------------------------------------------------------------- samples


def make_rows(seed, part, index, out):
    """Picture `index` of part 0 (train) or 1 (test), written; its rows of samples.jsonl."""
    rng = np.random.default_rng([seed, part, index])
    split = ("train", "test")[part]
    category = list(WORDS)[index % len(WORDS)]
    unseen = part == 1 and index // len(WORDS) % 2 == 1
    size = pick_size(rng)
    image, masks = draw(rng, size, category)
    name = f"{split}_{index:04}"
    (out / "images" / f"{name}.jpg").write_bytes(
        encode_image(np.round(image * 255).astype(np.uint8))
    )
    targets = masks if category == "nucleus" else [np.any(masks, axis=0)]
    for k, mask in enumerate(targets):
        identity = f"{name}_{k}" if category == "nucleus" else name
        (out / "masks" / f"{identity}.png").write_bytes(encode_mask(mask))
        query, wording = pick_query(rng, category, "Histopathology", "", unseen, WORDS)
        yield {
            "id": identity,
            "image": f"{name}.jpg",
            "mask": f"{identity}.png",
            "query": query,
            "split": split,
            "supercategory": "Histology",
            "category": category,
            "kind": "one" if category == "nucleus" else "all",
            "alike": len(masks),
            "wording": wording,
            "unseen_wording": unseen,
            "names": names(category, "", WORDS),
            "think": pick_trace(
                rng, category, "Histopathology", "", box_from_mask(mask), size, WORDS
            ),
        }


def make_split(seed, part, count, out):
    """About `count` rows: pictures of each category in turn, until a category has its quarter."""
    rows = []
    full = Counter()
    index = 0
    while len(rows) < count:
        category = list(WORDS)[index % len(WORDS)]
        if full[category] < count / len(WORDS):
            made = list(make_rows(seed, part, index, out))
            full[category] += len(made)
            rows += made
        index += 1
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, default=120, help="rows of the training split")
    parser.add_argument("--test", type=int, default=90, help="rows of the test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo/histology"))
    args = parser.parse_args()
    check(WORDS)
    for folder in ("images", "masks"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
        (args.out / folder).mkdir(parents=True)
    rows = [
        row
        for part, count in enumerate((args.train, args.test))
        for row in make_split(args.seed, part, count, args.out)
    ]
    (args.out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for (split, category), count in sorted(
        Counter((row["split"], row["category"]) for row in rows).items()
    ):
        print(f"{split:6}{category:14}{count:4}")


if __name__ == "__main__":
    main()
