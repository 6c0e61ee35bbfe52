"""Builds the demo data: U-MRG parquet files of drawn pictures and of real brain MR and chest CT.

    make embedded                             # fetches what is needed, and runs this and more
    python -m demo.make.data                  # demo/data/{train,test}.parquet and demo/images/
    python -m demo.make.data --train 12000 --test 0 --seed 1 --out build/pool   # for the warm start

Two packages are read, and neither is installed: MNI152 is inside the wheel of nilearn 0.14.1, and
the patients are inside the source package of pyradiomics 3.0.1.

    python -m pip download --no-deps --dest build nilearn==0.14.1
    python -m pip install numpy versioneer setuptools wheel     # pyradiomics' setup.py imports them
    python -m pip download --no-deps --no-build-isolation --no-binary :all: --dest build \\
        pyradiomics==3.0.1

Row i of a split depends on (seed, split, i) only, and categories take turns. So the same seed gives
the same bytes, with the same Pillow and pyarrow.

Slices of MNI152 (T1, 1 mm) are in the radiological convention: the patient's left is on the right
of the image, and sagittal slices face left. Train and test are at least GAP mm apart along the
slicing axis. The template is symmetric, so sagittal slices count by their distance from the
midline. Real patients are in demo/make/patients.py; everything else is drawn by
demo/make/phantoms.py. The words are in demo/make/wordings.py. extra_info.names holds lower-case
words of which one in a trace means that it names the target.

Measured on one core of a shared two-core machine (2026-11-24): 23 s and 10.2 MB for the default,
131 s for the 12,000.
"""

import argparse
import gzip
import io
import json
import struct
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from scipy import ndimage

from data import box_from_mask, keypoints_from_mask
from demo.make import patients, phantoms
from demo.make.phantoms import Masks, Rng, Size
from demo.make.wordings import WORDS, check, names, pick_query, pick_trace
from runtime.cli import exit_on

Slice = tuple[str, int]  # (plane, index)
SPLITS = ("train", "test")  # part 0 and part 1
WHEEL = "build/nilearn-0.14.1-py3-none-any.whl"
GAP = 5  # mm between any train slice and any test slice of a plane
SOURCES = {  # category -> the (scene, modality) pairs that can show it; None: MNI152's slices
    "liver": [("abdomen", "CT"), ("abdomen", "MR")],
    "spleen": [("abdomen", "CT"), ("abdomen", "MR")],
    "kidney": [("abdomen", "CT"), ("abdomen", "MR")],
    "aorta": [("abdomen", "CT")],
    "ventricles": [(None, "MR")],
    "hemisphere": [(None, "MR")],
    "cerebellum": [(None, "MR")],
    "brain stem": [(None, "MR")],
    "corpus callosum": [(None, "MR")],
    "brain tumour": [(None, "MR"), (None, "MR"), ("patient", "MR")],
    "optic disc": [("fundus", "Fundus")],
    "macula": [("fundus", "Fundus")],
    "retinal fluid": [("oct_scan", "OCT")],
    "left ventricle": [("heart_mr", "MR"), ("heart_us", "Ultrasound")],
    "myocardium": [("heart_mr", "MR")],
    "left atrium": [("heart_us", "Ultrasound")],
    "heart": [("chest_xray", "X-ray")],
    "gland": [("histology", "Histopathology")],
    "white blood cell": [("blood_smear", "Microscopy")],
    "lung": [("chest_xray", "X-ray"), ("chest_ct", "CT"), ("patient", "CT")],
    "carotid artery": [("linear_us", "Ultrasound")],
    "aneurysm": [("angiogram", "Angiography")],
    "melanoma": [("dermoscopy", "Dermoscopy")],
    "breast mass": [("linear_us", "Ultrasound")],
    "lung nodule": [("chest_ct", "CT"), ("chest_ct", "CT"), ("patient", "CT")],
    "liver tumour": [("abdomen", "CT"), ("abdomen", "MR")],
    "polyp": [("endoscopy", "Endoscopy")],
    "haematoma": [("head_ct", "CT")],
    "kidney cyst": [("abdomen", "CT")],
    "pneumonia": [("chest_xray", "X-ray")],
    "consolidation": [("chest_ct", "CT")],
}
PAIRED = ("kidney", "hemisphere", "lung")  # one on each side of the image: the query says which
PLANES = {  # category -> planes that show it, and the least area (mm2) of it on a usable slice
    "ventricles": (("axial", "coronal"), 260),
    "hemisphere": (("axial", "coronal"), 3000),
    "cerebellum": (("axial", "coronal", "sagittal"), 900),
    "brain stem": (("sagittal",), 500),
    "corpus callosum": (("sagittal",), 250),
    "brain tumour": (("axial", "coronal"), 3500),
}
# standalone pictures out of the test part: file -> (category, modality, part of its source)
SHOWCASE = {  # test rows that the taught model answers right, as about half of all
    "brain_mr_axial": 66,
    "brain_mr_coronal": 67,
    "brain_mr_sagittal": 70,
    "chest_ct_patient": 81,
    "chest_ct_patient_2": 267,
    "abdomen_ct": 2,
    "chest_xray": 91,
    "fundus": 10,
    "dermoscopy": 22,
    "breast_us": 85,
}
DRAWN = """The chest_ct pictures show patients. The brain MR pictures are of a template. The rest is
drawn by `demo/make/phantoms.py`."""
NOTICE = """The brain MR pictures of the template are slices of the MNI152 template (ICBM 2009a
nonlinear symmetric), resampled and changed in contrast. Its notice:

Copyright (C) 1993–2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological
Institute, McGill University. Permission to use, copy, modify, and distribute this software and its
documentation for any purpose and without fee is hereby granted, provided that the above copyright
notice appear in all copies. The authors and McGill University make no representations about the
suitability of this software for any purpose. It is provided "as is" without express or implied
warranty. The authors are not responsible for any data loss, equipment damage, property loss, or
injury to subjects or patients resulting from the use or misuse of this software package."""

# ---------------------------------------------------------------- the real brain


@dataclass(frozen=True)
class Brain:
    """MNI152: its T1 picture, its structures and the slices that show them."""

    t1: np.ndarray  # (197, 233, 189) uint8
    structures: Masks  # volumes of the same shape
    slices: dict[tuple[str, int], list[Slice]]  # of (category, part)


def read_nifti(blob: bytes) -> np.ndarray:
    """Returns the (x, y, z) array of a gzipped NIfTI-1 of uint8; x grows to the patient's right, y
    to the front, z up. ValueError for another type."""
    raw = gzip.decompress(blob)
    shape = struct.unpack("<3h", raw[42:48])
    (kind,) = struct.unpack("<h", raw[70:72])
    if kind != 2:
        raise ValueError(f"expected a NIfTI volume of uint8 (datatype 2), found datatype {kind}")
    return np.frombuffer(raw, np.uint8, offset=352).reshape(shape, order="F")


Ball = tuple[float, float, float, float]  # x, y, z and radius in mm, MNI coordinates


def place_balls(markers: np.ndarray, value: int, *balls: Ball) -> None:
    """Writes `value` into balls and into their mirror images."""
    for x, y, z, r in balls:
        for cx in {98 + x, 98 - x}:
            centre = np.array([cx, 134 + y, 72 + z])
            low = (centre - r).clip(0).astype(int)
            high = (centre + r + 1).astype(int)
            window = markers[tuple(slice(a, b) for a, b in zip(low, high))]
            grid = tuple(slice(a, a + n) for a, n in zip(low, window.shape))
            gx, gy, gz = np.ogrid[grid]
            distance = (gx - cx) ** 2 + (gy - 134 - y) ** 2 + (gz - 72 - z) ** 2
            window[distance <= r * r] = value


def chain(*balls: Ball) -> list[Ball]:
    """Returns balls strung from each given ball to the next: a thick line."""
    strung = []
    for a, b in pairwise(np.array(balls)):
        strung += [tuple(a + (b - a) * k) for k in np.linspace(0, 1, 6)]
    return strung


def load_brain(wheel: str | Path) -> Brain:
    """Returns MNI152 out of the nilearn wheel. ValueError where the wheel is missing.

    How the structures are found. Ventricles are the two closed pockets of fluid (neither grey nor
    white matter) in the brain's middle. Corpus callosum is white matter near the midline.
    Cerebellum and brain stem come from a watershed of the T1 picture from hand-placed seeds, as
    dark fluid clefts part them from the cerebrum. Hemispheres are the rest, halved."""
    if not Path(wheel).is_file():
        raise ValueError(
            f"--wheel {wheel}: no such file; make embedded fetches it, as does python -m pip "
            "download --no-deps --dest build nilearn==0.14.1"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
        t1 = read_nifti(archive.read(name.format("t1")))
        grey = read_nifti(archive.read(name.format("gm")))
        white = read_nifti(archive.read(name.format("wm")))
    brain = t1 > 0
    parts = watershed_parts(t1, brain)
    tissue = brain & (t1 > 80)
    cerebrum = brain & (parts == 3)
    x, _, z = np.ogrid[-98:99, -134:99, -72:117]
    cerebellum = ndimage.binary_opening(tissue & (parts == 1), iterations=2)
    stem = ndimage.binary_opening(tissue & (parts == 2) & (abs(x) < 16) & (z < -4), iterations=2)
    structures = {
        "ventricles": find_ventricles(brain, grey, white),
        "cerebellum": cerebellum,
        "brain stem": stem,
        "corpus callosum": (white > 140) & find_arch(white)[None] & (abs(x) < 12),
        "hemisphere:left": cerebrum & (x > 0),  # the image's left is the patient's right
        "hemisphere:right": cerebrum & (x < 0),
    }
    return Brain(t1, structures, usable_slices(structures))


def find_ventricles(brain: np.ndarray, grey: np.ndarray, white: np.ndarray) -> np.ndarray:
    """Returns the largest pocket of fluid on each side of the brain's middle."""
    x, y, z = np.ogrid[-98:99, -134:99, -72:117]
    fluid = brain & (grey.astype(np.int16) + white < 110)
    middle = (abs(x) < 40) & (y > -60) & (y < 42) & (z > -22) & (z < 34)
    pockets, _ = ndimage.label(fluid & middle)
    found = np.zeros(brain.shape, bool)
    for half in (np.s_[:85], np.s_[112:]):
        largest = np.bincount(pockets[half].ravel())[1:].argmax() + 1
        found |= pockets == largest
    return found


def find_arch(white: np.ndarray) -> np.ndarray:
    """Returns where the arch of white matter is on the middle slice, (y, z), a little widened."""
    middle, _ = ndimage.label(white[98] > 128)
    largest = np.bincount(middle[90:190, 72:110].ravel())[1:].argmax() + 1
    return ndimage.binary_dilation(middle == largest, iterations=2)


def watershed_parts(t1: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Returns 1 in the cerebellum, 2 in the brain stem, 3 in the cerebrum and 4 outside."""
    x, y, z = np.ogrid[-98:99, -134:99, -72:117]
    markers = np.zeros(t1.shape, np.int16)
    markers[(z > 25) | (y > 5) | ((z > -7) & (abs(x) < 25) & (y > -32))] = 3
    place_balls(
        markers,
        3,
        (50, -20, -20, 8),
        (20, -92, 5, 8),
        (45, -70, 5, 8),
        (55, -45, -10, 7),
        (25, -25, -15, 3),
        (12, -15, 8, 6),
        (30, -75, -5, 4),
        (30, -45, -8, 4),
        (10, -60, 5, 4),
        (0, -40, 10, 4),
    )
    place_balls(
        markers,
        1,
        *chain((8, -60, -30, 6), (16, -57, -36, 9), (30, -58, -38, 9), (34, -68, -48, 6)),
        *chain((0, -50, -16, 4), (0, -62, -18, 6), (0, -72, -28, 6), (0, -62, -42, 5)),
    )
    place_balls(
        markers,
        2,
        *chain(
            (4, -22, -10, 6),
            (5, -25, -20, 8),
            (5, -26, -31, 11),
            (0, -34, -44, 8),
            (0, -42, -56, 7),
            (0, -44, -68, 6),
        ),
        (0, -34, -10, 4),
    )
    markers[~brain] = 4
    parts = np.full(t1.shape, 3, np.int16)
    low = np.s_[:, 10:150, :110]
    parts[low] = ndimage.watershed_ift(255 - t1[low], markers[low])
    # back from the cerebrum: the fissures between the cerebellum's leaves
    padded = np.pad(parts[low] == 1, 4)
    closed = ndimage.binary_closing(padded, iterations=3)[4:-4, 4:-4, 4:-4]
    parts[low][closed & brain[low] & (parts[low] != 2)] = 1
    return parts


def part_of(plane: str, index: int) -> int | None:
    """Returns 0 for train, 1 for test, None for the slices between them: of every 25 mm, 13 are for
    training and 4 for the test."""
    place = abs(index - 98) + 9 if plane == "sagittal" else index
    k = place % 25
    if k < 13:
        return 0
    if 17 <= k < 21:
        return 1
    return None


def cut(volume: np.ndarray, plane: str, index: int) -> np.ndarray:
    """Returns one slice as an image: axial and coronal ones in the radiological convention,
    sagittal ones facing left."""
    if plane == "sagittal":
        flat = volume[index]
    elif plane == "coronal":
        flat = volume[:, index]
    else:
        flat = volume[:, :, index]
    return flat[::-1, ::-1].T


def usable_slices(structures: Masks) -> dict[tuple[str, int], list[Slice]]:
    """Returns the slices that show enough of a category, by category and part. Train and test are
    checked to be GAP mm apart."""
    usable: dict[tuple[str, int | None], list[Slice]] = {}
    for category, (planes, least) in PLANES.items():
        volume = structures.get(category, structures["hemisphere:left"])
        for plane in planes:
            axis = ("sagittal", "coronal", "axial").index(plane)
            areas = volume.sum(tuple({0, 1, 2} - {axis}))
            for index in np.flatnonzero(areas >= least).tolist():
                usable.setdefault((category, part_of(plane, index)), []).append((plane, index))
    for plane in ("axial", "coronal", "sagittal"):
        train = places_on(usable, plane, part=0)
        test = places_on(usable, plane, part=1)
        assert min(abs(a - b) for a in train for b in test) >= GAP, plane
    for category in PLANES:
        assert (category, 0) in usable, category
        assert (category, 1) in usable, category
    return usable


def places_on(usable: dict[tuple[str, int | None], list[Slice]], plane: str, part: int) -> set[int]:
    """Returns where the slices of a plane and a part lie along its axis, in mm."""
    places = set()
    for (_, part_of_slices), slices in usable.items():
        for own_plane, index in slices:
            if part_of_slices == part and own_plane == plane:
                places.add(abs(index - 98) if plane == "sagittal" else index)
    return places


# ---------------------------------------------------------------- rows


def pick_size(rng: Rng) -> Size:
    """Returns (height, width): mostly 112 to 140 pixels, some up to 168, few up to 224; two in five
    are square."""
    draw = rng.uniform()
    if draw < 0.87:
        low, high = 112, 140
    elif draw < 0.98:
        low, high = 141, 168
    else:
        low, high = 169, 224
    sides = low + (high + 1 - low) * rng.uniform(size=2) ** 1.4
    height, width = sides.astype(int).tolist()
    if rng.uniform() < 0.4:
        return height, height
    return height, width


def encode_image(pixels: np.ndarray) -> bytes:
    """Returns uint8 pixels as JPEG. PNG was never the smaller one, as noise does not compress."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=86, optimize=True)
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """Returns a (H, W) bool mask as PNG, 0 and 255."""
    buffer = io.BytesIO()
    pixels = mask.astype(np.uint8) * 255
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def umrg_row(query: str, image: dict, mask: dict, target: np.ndarray, extra: dict) -> dict:
    """Returns a row in the U-MRG schema. image and mask: {"bytes", "path"}; target: the mask's
    pixels, which box and key points are made from."""
    truth = {"bbox_2d": box_from_mask(target), "point_2d": keypoints_from_mask(target)}
    return {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": query}],
        "images": [image],
        "masks": [mask],
        "reward_model": {"style": "rule", "ground_truth": json.dumps(truth)},
        "extra_info": extra,
    }


def draw_target(
    rng: Rng,
    size: Size,
    category: str,
    side: str,
    scene: str | None,
    modality: str,
    part: int,
    brain: Brain,
    clinic: patients.Clinic,
) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns (image, mask of the target, where the image comes from). The mask may be empty."""
    key = f"{category}:{side}" if side else category
    if scene == "patient" and (key, part) in clinic:
        cases = clinic[key, part]
        case = cases[rng.integers(len(cases))]
        image, mask = patients.patient(rng, size, case, category)
        return image, mask, f"pyradiomics {case.name} axial {case.z}"
    if scene is not None:
        # a phantom as well where the part has no such patient
        drawn = "chest_ct" if scene == "patient" else scene
        image, masks = getattr(phantoms, drawn)(rng, size, category, modality)
        source = "phantom"
    else:
        slices = brain.slices[category, part]
        planes = sorted({plane for plane, _ in slices})
        plane = planes[rng.integers(len(planes))]
        indexes = [index for own_plane, index in slices if own_plane == plane]
        index = indexes[rng.integers(len(indexes))]
        flat = {k: cut(v, plane, index) for k, v in brain.structures.items() if k == key}
        image, masks = phantoms.brain_mr(rng, size, cut(brain.t1, plane, index), flat, category)
        source = f"MNI152 {plane} {index}"
    return image, masks.get(key, np.zeros(size, bool)), source


def without_crumbs(mask: np.ndarray) -> np.ndarray:
    """Returns a mask without its small pieces, which would stretch the box."""
    pieces, count = ndimage.label(mask)
    if count < 2:
        return mask
    areas = np.bincount(pieces.ravel())[1:]
    return np.isin(pieces, np.flatnonzero(areas >= 0.08 * areas.max()) + 1)


def is_large_enough(mask: np.ndarray) -> bool:
    """Whether a target can be pointed at: 80 pixels, at least 9 along each side."""
    if mask.sum() < 80:
        return False
    return min(np.ptp(np.argwhere(mask), 0)) >= 8


def make_example(
    seed: int, part: int, index: int, brain: Brain, clinic: patients.Clinic
) -> tuple[dict, np.ndarray, np.ndarray]:
    """Returns example `index` of part 0 (train) or 1 (test): a parquet row, its picture before
    compression (uint8) and its mask."""
    rng = np.random.default_rng([seed, part, index])
    category = list(SOURCES)[index % len(SOURCES)]
    turn = index // len(SOURCES)
    scene, modality = SOURCES[category][turn % len(SOURCES[category])]
    unseen = part == 1 and (turn // 2 + index) % 2 == 1
    size = pick_size(rng)
    side = ""
    if category in PAIRED:
        side = ("left", "right")[rng.integers(2)]
    while True:
        # once in a while the target is hidden behind another organ or leaves the picture
        picture, mask, source = draw_target(
            rng, size, category, side, scene, modality, part, brain, clinic
        )
        mask = without_crumbs(mask)
        if is_large_enough(mask):
            break
    box = box_from_mask(mask)
    pixels = np.round(picture * 255).astype(np.uint8)
    query, wording = pick_query(rng, category, modality, side, unseen)
    identity = f"{SPLITS[part]}_{index:05d}"
    image = {"bytes": encode_image(pixels), "path": f"{identity}.jpg"}
    extra = {
        "id": identity,
        "supercategory": WORDS[category].group,
        "category": category,
        "index": index,
        "modality": modality,
        "wording": wording,
        "unseen_wording": unseen,
        "think": pick_trace(rng, category, modality, side, box, size),
        "names": names(category, side),
        "image_source": source,
    }
    encoded_mask = {"bytes": encode_mask(mask), "path": f"{identity}_mask.png"}
    return umrg_row(query, image, encoded_mask, mask, extra), pixels, mask


# ---------------------------------------------------------------- output


def write_parquet(rows: list[dict], path: Path) -> int:
    """Writes rows into a file. Returns its size in bytes."""
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", row_group_size=256)
    return path.stat().st_size


def true_box(row: dict) -> list[int]:
    truth = json.loads(row["reward_model"]["ground_truth"])
    return [round(v) for v in truth["bbox_2d"]]


def write_showcase(
    rows: list[dict], pictures: list[np.ndarray], folder: Path, licence: str
) -> None:
    """Writes single pictures of test rows, with a README of suggested queries and the template's
    notice."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Test pictures",
        "",
        "Out of the demo's test part, so no demo model was trained on them. They are among the "
        "questions that the taught model answers right, as it does about half of all. For example:",
        "",
        '    python infer.py --image demo/images/NAME --query "..."',
        "",
        "| picture | suggested query | target | true box |",
        "|---|---|---|---|",
    ]
    for name, i in SHOWCASE.items():
        if i >= len(rows):
            continue
        Image.fromarray(pictures[i]).save(folder / f"{name}.png", optimize=True)
        query = rows[i]["prompt"][0]["content"]
        category = rows[i]["extra_info"]["category"]
        lines.append(f"| {name}.png | {query} | {category} | {true_box(rows[i])} |")
    lines += ["", DRAWN, "", NOTICE, "", patients.NOTICE + licence]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def draw_truth(row: dict, longest: int) -> Image.Image:
    """Returns a row's image with its box (green), mask contour (yellow) and key points (red,
    blue)."""
    image = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")
    mask = Image.open(io.BytesIO(row["masks"][0]["bytes"]))
    truth = json.loads(row["reward_model"]["ground_truth"])
    zoom = longest / max(image.size)
    size = [round(v * zoom) for v in image.size]
    pixels = np.array(image.resize(size))
    inside = np.asarray(Image.fromarray(np.asarray(mask) > 0).resize(size))
    pixels[inside & ~ndimage.binary_erosion(inside)] = (255, 230, 0)
    drawn = Image.fromarray(pixels)
    pen = ImageDraw.Draw(drawn)
    pen.rectangle([v * zoom for v in truth["bbox_2d"]], outline=(0, 255, 0))
    for (x, y), colour in zip(truth["point_2d"], ("red", "blue")):
        cx = x * zoom
        cy = y * zoom
        pen.ellipse([cx - 2, cy - 2, cx + 3, cy + 3], fill=colour)
    return drawn


def contact_sheet(rows: list[dict], path: Path, columns: int = 10, cell: int = 150) -> None:
    """Writes a picture of some rows with the truth drawn in and the category below each."""
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell, lines * (cell + 24)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, row in enumerate(rows):
        x = k % columns * cell
        y = k // columns * (cell + 24)
        sheet.paste(draw_truth(row, cell), (x, y))
        pen.text((x + 2, y + cell), row["extra_info"]["category"], fill="black")
        pen.text((x + 2, y + cell + 10), row["extra_info"]["modality"], fill="grey")
    sheet.save(path)


def print_counts(rows_of: dict[str, list[dict]]) -> None:
    """Prints how many rows of each kind each split has."""
    counts: Counter[tuple[str, str, str, str]] = Counter()
    for split, rows in rows_of.items():
        for row in rows:
            extra = row["extra_info"]
            kind = extra["supercategory"], extra["category"], extra["modality"]
            counts[(*kind, split)] += 1
    print(f"{'super-category':15}{'category':18}{'modality':16}{'train':>6}{'test':>6}")
    for group, category, modality in sorted({key[:3] for key in counts}):
        train = counts[group, category, modality, "train"]
        test = counts[group, category, modality, "test"]
        print(f"{group:15}{category:18}{modality:16}{train:6}{test:6}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, default=1200, help="rows of train.parquet")
    parser.add_argument("--test", type=int, default=360, help="rows of test.parquet; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo/data"))
    parser.add_argument("--images", type=Path, help="folder of single pictures")
    parser.add_argument("--wheel", default=WHEEL, help="the nilearn wheel")
    parser.add_argument("--patients", default=patients.ARCHIVE, help="pyradiomics' source package")
    parser.add_argument("--preview", type=Path, help="also write a picture of 62 rows here")
    args = parser.parse_args()
    if args.images is None and args.out == Path("demo/data"):
        args.images = Path("demo/images")
    check()
    start = time.perf_counter()
    with exit_on(ValueError, OSError):
        brain = load_brain(args.wheel)
        licence, clinic = patients.load_patients(args.patients)
    args.out.mkdir(parents=True, exist_ok=True)
    rows_of = {}
    sizes = []
    for part, (split, number) in enumerate((("train", args.train), ("test", args.test))):
        if number == 0:
            continue
        made = [make_example(args.seed, part, i, brain, clinic) for i in range(number)]
        rows = [row for row, _, _ in made]
        size = write_parquet(rows, args.out / f"{split}.parquet")
        sizes.append(f"{split} {size / 1e6:.2f} MB")
        rows_of[split] = rows
        if split == "test" and args.images is not None:
            write_showcase(rows, [pixels for _, pixels, _ in made], args.images, licence)
    print_counts(rows_of)
    seconds = time.perf_counter() - start
    megabytes = ", ".join(sizes)
    print(f"{args.out}: {args.train} train, {args.test} test; {megabytes}; {seconds:.0f} s")
    if args.preview is not None:
        first = next(iter(rows_of.values()))
        contact_sheet(first[: 2 * len(SOURCES)], args.preview)


if __name__ == "__main__":
    main()
