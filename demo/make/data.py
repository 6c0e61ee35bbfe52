"""Build the demo data: U-MRG parquet files of procedural phantoms and of real brain MR and chest
CT; some pictures.

    python -m pip download --no-deps -d build nilearn==0.14.1   # once: MNI152 is read out of this
                                                                wheel # once, too: pyradiomics 3.0.1
                                                                for the patients, see
                                                                demo/make/patients.py
    python -m demo.make.data                                    # demo/data/{train,test}.parquet,
                                                                demo/images/
    python -m demo.make.data --train 12000 --test 0 --seed 1 --out build/pool   # a pool for a warm
                                                                                start

Sample i of a split depends on (seed, split, i) only and categories take turns, so the same seed
gives the same bytes (with the same Pillow and pyarrow). Real slices: MNI152 T1, 1 mm, in the
radiological convention (the patient's left is on the right of the image; sagittal slices face
left), train and test at least GAP mm apart along the slicing axis; the template is symmetric, so
sagittal slices count by their distance from the midline. Real patients: demo/make/patients.py.
Everything else is drawn by demo/make/phantoms.py; the words are in demo/make/wordings.py.
extra_info.names: lower-case words of which one in a trace means that it names the target. Measured
on one core of a shared two-core machine (2026-11-24): 23 s and 10.2 MB for the default, 131 s for
the 12,000."""

import argparse
import gzip
import io
import json
import struct
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw
from scipy import ndimage

from data import box_from_mask, keypoints_from_mask
from demo.make import patients, phantoms
from demo.make.wordings import WORDS, check, names, pick_query, pick_trace

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
SHOWCASE = {
    "brain_mr_axial": ("ventricles", "MR", "axial"),
    "brain_mr_coronal": ("hemisphere", "MR", "coronal"),
    "brain_mr_sagittal": ("corpus callosum", "MR", "sagittal"),
    "brain_mr_patient": ("brain tumour", "MR", "pyradiomics"),
    "chest_ct_patient": ("lung", "CT", "pyradiomics"),
    "abdomen_ct": ("kidney", "CT", "phantom"),
    "chest_xray": ("pneumonia", "X-ray", "phantom"),
    "fundus": ("optic disc", "Fundus", "phantom"),
    "dermoscopy": ("melanoma", "Dermoscopy", "phantom"),
    "breast_us": ("breast mass", "Ultrasound", "phantom"),
}
DRAWN = """brain_mr_patient.png and chest_ct_patient.png show patients. The other brain MR pictures are of a template,
and the rest is drawn by `demo/make/phantoms.py`."""
NOTICE = """The brain MR pictures of the template are slices of the MNI152 template (ICBM 2009a nonlinear symmetric),
resampled and changed in contrast. Its notice:

Copyright (C) 1993–2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute,
McGill University. Permission to use, copy, modify, and distribute this software and its documentation for
any purpose and without fee is hereby granted, provided that the above copyright notice appear in all copies.
The authors and McGill University make no representations about the suitability of this software for any
purpose. It is provided "as is" without express or implied warranty. The authors are not responsible for any
data loss, equipment damage, property loss, or injury to subjects or patients resulting from the use or
misuse of this software package."""

# --- the real brain -------------------------------------------------------------------------------


def read_nifti(blob):
    """Gzipped NIfTI-1 of uint8 -> (x, y, z) array; x grows to the patient's right, y to the front,
    z up."""
    raw = gzip.decompress(blob)
    shape = struct.unpack("<3h", raw[42:48])
    kind = struct.unpack("<h", raw[70:72])[0]
    offset = 352
    if kind != 2:
        raise ValueError(f"expected a NIfTI volume of uint8 (datatype 2), found datatype {kind}")
    return np.frombuffer(raw, np.uint8, offset=offset).reshape(shape, order="F")


def place_balls(markers, value, *balls):
    """Write `value` into balls (x, y, z, radius) in mm, MNI coordinates, and their mirror
    images."""
    for x, y, z, r in balls:
        for cx in {98 + x, 98 - x}:
            centre = np.array([cx, 134 + y, 72 + z])
            lo = (centre - r).clip(0).astype(int)
            hi = centre + r + 1
            window = markers[tuple(slice(a, int(b)) for a, b in zip(lo, hi))]
            gx, gy, gz = np.ogrid[tuple(slice(a, a + n) for a, n in zip(lo, window.shape))]
            window[(gx - cx) ** 2 + (gy - 134 - y) ** 2 + (gz - 72 - z) ** 2 <= r * r] = value


def chain(*balls):
    """Balls strung from each given ball to the next: a thick line."""
    pairs = zip(np.array(balls[:-1]), np.array(balls[1:]))
    return [tuple(a + (b - a) * k) for a, b in pairs for k in np.linspace(0, 1, 6)]


def load_brain(wheel):
    """MNI152 -> (t1 uint8 (197, 233, 189), dict of structure -> bool volume). How the structures
    are found:

    ventricles: the two closed pockets of fluid (neither grey nor white matter) in the brain's
    middle; corpus callosum: white matter near the midline; cerebellum and brain stem: a watershed
    of the T1 picture from hand-placed seeds, as dark fluid clefts part them from the cerebrum;
    hemispheres: the rest, halved."""
    if not Path(wheel).is_file():
        raise SystemExit(
            f"{wheel} is missing: python -m pip download --no-deps -d build nilearn==0.14.1"
        )
    with zipfile.ZipFile(wheel) as archive:
        name = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
        t1, grey, white = (read_nifti(archive.read(name.format(k))) for k in ("t1", "gm", "wm"))
    brain = t1 > 0
    x, y, z = np.ogrid[-98:99, -134:99, -72:117]
    fluid = brain & (grey.astype(np.int16) + white < 110)
    pockets, _ = ndimage.label(fluid & (abs(x) < 40) & (y > -60) & (y < 42) & (z > -22) & (z < 34))
    sides = [
        pockets == np.bincount(pockets[half].ravel())[1:].argmax() + 1 for half in np.s_[:85, 112:]
    ]
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
    little = (
        ndimage.binary_closing(np.pad(parts[low] == 1, 4), iterations=3)[4:-4, 4:-4, 4:-4]
        & brain[low]
    )
    parts[low][little & (parts[low] != 2)] = (
        1  # back from the cerebrum: the fissures between its leaves
    )
    tissue = brain & (t1 > 80)
    cerebrum = brain & (parts == 3)
    middle, _ = ndimage.label(white[98] > 128)
    arch = middle == np.bincount(middle[90:190, 72:110].ravel())[1:].argmax() + 1
    arch = ndimage.binary_dilation(arch, iterations=2)
    structures = {
        "ventricles": sides[0] | sides[1],
        "cerebellum": ndimage.binary_opening(tissue & (parts == 1), iterations=2),
        "brain stem": ndimage.binary_opening(
            tissue & (parts == 2) & (abs(x) < 16) & (z < -4), iterations=2
        ),
        "corpus callosum": (white > 140) & arch[None] & (abs(x) < 12),
        "hemisphere:left": cerebrum & (x > 0),  # the image's left is the patient's right
        "hemisphere:right": cerebrum & (x < 0),
    }
    return t1, structures


def part_of(plane, index):
    """0 train, 1 test, None for the slices between them: every 25 mm, 13 mm of train and 4 mm of
    test."""
    k = (abs(index - 98) + 9 if plane == "sagittal" else index) % 25
    return 0 if k < 13 else 1 if 17 <= k < 21 else None


def cut(volume, plane, index):
    """One slice as an image: axial and coronal in the radiological convention, sagittal facing
    left."""
    flat = {"sagittal": volume[index], "coronal": volume[:, index], "axial": volume[:, :, index]}[
        plane
    ]
    return flat[::-1, ::-1].T


def usable_slices(structures):
    """(category, part) -> [(plane, index)], with the promise about the gap checked."""
    usable = {}
    for category, (planes, least) in PLANES.items():
        volume = structures.get(category, structures["hemisphere:left"])
        for plane in planes:
            axis = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
            areas = volume.sum(tuple({0, 1, 2} - {axis}))
            for index in np.flatnonzero(areas >= least).tolist():
                usable.setdefault((category, part_of(plane, index)), []).append((plane, index))
    for plane in ("axial", "coronal", "sagittal"):
        at = [
            {
                abs(i - 98) if plane == "sagittal" else i
                for (_, part), s in usable.items()
                if part == p
                for q, i in s
                if q == plane
            }
            for p in (0, 1)
        ]
        assert min(abs(a - b) for a in at[0] for b in at[1]) >= GAP, plane
    assert all((category, part) in usable for category in PLANES for part in (0, 1)), "no slice"
    return usable


# --- samples --------------------------------------------------------------------------------------


def pick_size(rng):
    """(height, width): mostly 112 to 140 pixels, some up to 168, few up to 224; two in five are
    square."""
    draw = rng.uniform()
    low, high = (112, 140) if draw < 0.87 else (141, 168) if draw < 0.98 else (169, 224)
    height, width = (low + (high + 1 - low) * rng.uniform(size=2) ** 1.4).astype(int).tolist()
    return (height, height) if rng.uniform() < 0.4 else (height, width)


def encode_image(pixels):
    """uint8 pixels -> JPEG bytes; PNG was never the smaller one, noise does not compress."""
    Image.fromarray(pixels).save(buffer := io.BytesIO(), format="JPEG", quality=86, optimize=True)
    return buffer.getvalue()


def encode_mask(mask):
    Image.fromarray(mask.astype(np.uint8) * 255).save(
        buffer := io.BytesIO(), format="PNG", optimize=True
    )
    return buffer.getvalue()


def make_sample(seed, part, index, brain, clinic):
    """Sample `index` of part 0 (train) or 1 (test): a parquet row, and its picture before
    compression."""
    rng = np.random.default_rng([seed, part, index])
    category = list(SOURCES)[index % len(SOURCES)]
    turn = index // len(SOURCES)
    scene, modality = SOURCES[category][turn % len(SOURCES[category])]
    unseen = part == 1 and (turn // 2 + index) % 2 == 1
    size = pick_size(rng)
    side = ("left", "right")[rng.integers(2)] if category in PAIRED else ""
    key = f"{category}:{side}" if side else category
    while True:  # once in a while the target is hidden behind another organ or leaves the picture
        if scene == "patient" and (key, part) in clinic:
            cases = clinic[key, part]
            name, z, *case = cases[rng.integers(len(cases))]
            picture, mask = patients.patient(rng, size, *case, category)
            masks = {key: mask}
            source = f"pyradiomics {name} axial {z}"
        elif scene:  # a phantom, too, where the part has no such patient
            drawn = "chest_ct" if scene == "patient" else scene
            picture, masks = getattr(phantoms, drawn)(rng, size, category, modality)
            source = "phantom"
        else:
            t1, structures, usable = brain
            slices = usable[category, part]
            planes = sorted({p for p, _ in slices})
            plane = planes[rng.integers(len(planes))]
            slices = [s for s in slices if s[0] == plane]
            at = slices[rng.integers(len(slices))][1]
            flat = {k: cut(v, plane, at) for k, v in structures.items() if k == key}
            picture, masks = phantoms.brain_mr(rng, size, cut(t1, plane, at), flat, category)
            source = f"MNI152 {plane} {at}"
        mask = masks.get(key, np.zeros(size, bool))
        pieces, count = ndimage.label(mask)
        if count > 1:  # crumbs would stretch the box
            areas = np.bincount(pieces.ravel())[1:]
            mask = np.isin(pieces, np.flatnonzero(areas >= 0.08 * areas.max()) + 1)
        if mask.sum() >= 80 and min(np.ptp(np.argwhere(mask), 0)) >= 8:
            break
    box = box_from_mask(mask)
    points = keypoints_from_mask(mask)
    pixels = np.round(picture * 255).astype(np.uint8)
    query, wording = pick_query(rng, category, modality, side, unseen)
    split = ("train", "test")[part]
    identity = f"{split}_{index:05d}"
    row = {
        "data_source": "umrg",
        "prompt": [{"role": "user", "content": query}],
        "images": [{"bytes": encode_image(pixels), "path": f"{identity}.jpg"}],
        "masks": [{"bytes": encode_mask(mask), "path": f"{identity}_mask.png"}],
        "reward_model": {
            "style": "rule",
            "ground_truth": json.dumps({"bbox_2d": box, "point_2d": points}),
        },
        "extra_info": {
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
        },
    }
    return row, pixels, mask


# --- output ---------------------------------------------------------------------------------------


def write_parquet(rows, path):
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", row_group_size=256)
    return path.stat().st_size


def write_showcase(rows, pixels, folder, licence):
    """Standalone pictures of test rows, with a README of suggested queries and the template's
    notice."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Test pictures",
        "",
        "Out of the demo's test part, so no demo model was trained on them. For example:",
        "",
        '    python infer.py --image demo/images/NAME --query "..."',
        "",
        "| picture | suggested query | target | true box |",
        "|---|---|---|---|",
    ]
    for name, (category, modality, source) in SHOWCASE.items():
        for row, image in zip(rows, pixels):
            info = row["extra_info"]
            kind = info["category"], info["modality"]
            if (
                kind == (category, modality)
                and source in info["image_source"]
                and not info["unseen_wording"]
            ):
                Image.fromarray(image).save(folder / f"{name}.png", optimize=True)
                box = [round(v) for v in json.loads(row["reward_model"]["ground_truth"])["bbox_2d"]]
                lines.append(f"| {name}.png | {row['prompt'][0]['content']} | {category} | {box} |")
                break
    lines += ["", DRAWN, "", NOTICE, "", patients.NOTICE + licence]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def contact_sheet(rows, path, columns=10, cell=150):
    """Samples with box (green), mask contour (yellow) and key points (red, blue), the category
    below each."""
    sheet = Image.new("RGB", (columns * cell, -(-len(rows) // columns) * (cell + 24)), "white")
    pen = ImageDraw.Draw(sheet)
    for k, row in enumerate(rows):
        image = Image.open(io.BytesIO(row["images"][0]["bytes"])).convert("RGB")
        mask = np.asarray(Image.open(io.BytesIO(row["masks"][0]["bytes"]))) > 0
        truth = json.loads(row["reward_model"]["ground_truth"])
        zoom = cell / max(image.size)
        size = [round(v * zoom) for v in image.size]
        image = image.resize(size)
        mask = np.asarray(Image.fromarray(mask).resize(size))
        pixels = np.array(image)
        pixels[mask & ~ndimage.binary_erosion(mask)] = (255, 230, 0)
        image = Image.fromarray(pixels)
        ImageDraw.Draw(image).rectangle([v * zoom for v in truth["bbox_2d"]], outline=(0, 255, 0))
        for (x, y), colour in zip(truth["point_2d"], ("red", "blue")):
            x = x * zoom
            y = y * zoom
            ImageDraw.Draw(image).ellipse([x - 2, y - 2, x + 3, y + 3], fill=colour)
        x = k % columns * cell
        y = k // columns * (cell + 24)
        sheet.paste(image, (x, y))
        pen.text((x + 2, y + cell), row["extra_info"]["category"], fill="black")
        pen.text((x + 2, y + cell + 10), row["extra_info"]["modality"], fill="grey")
    sheet.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--train", type=int, default=1800, help="samples in train.parquet")
    parser.add_argument("--test", type=int, default=360, help="samples in test.parquet; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("demo/data"))
    parser.add_argument("--images", type=Path, help="folder of standalone pictures")
    parser.add_argument("--wheel", default=WHEEL, help="the nilearn wheel")
    parser.add_argument("--patients", default=patients.ARCHIVE, help="pyradiomics' source package")
    parser.add_argument(
        "--preview", type=Path, help="also write a contact sheet of 62 samples to this PNG"
    )
    args = parser.parse_args()
    if args.images is None and args.out == Path("demo/data"):
        args.images = Path("demo/images")
    check()
    start = time.perf_counter()
    t1, structures = load_brain(args.wheel)
    brain = t1, structures, usable_slices(structures)
    licence, clinic = patients.load_patients(args.patients)
    args.out.mkdir(parents=True, exist_ok=True)
    counts = Counter()
    sizes = {}
    preview = []
    for part, (split, number) in enumerate((("train", args.train), ("test", args.test))):
        if not number:
            continue
        made = [make_sample(args.seed, part, i, brain, clinic) for i in range(number)]
        rows = [row for row, _, _ in made]
        sizes[split] = write_parquet(rows, args.out / f"{split}.parquet")
        infos = [row["extra_info"] for row in rows]
        counts.update(
            (info["supercategory"], info["category"], info["modality"], split) for info in infos
        )
        preview = preview or rows[: 2 * len(SOURCES)]
        if split == "test" and args.images:
            write_showcase(rows, [pixels for _, pixels, _ in made], args.images, licence)
    print(f"{'super-category':15}{'category':18}{'modality':16}{'train':>6}{'test':>6}")
    for group, category, modality in sorted({key[:3] for key in counts}):
        n = [counts[group, category, modality, split] for split in ("train", "test")]
        print(f"{group:15}{category:18}{modality:16}{n[0]:6}{n[1]:6}")
    megabytes = ", ".join(f"{split} {size / 1e6:.2f} MB" for split, size in sizes.items())
    seconds = time.perf_counter() - start
    print(f"{args.out}: {args.train} train, {args.test} test; {megabytes}; {seconds:.0f} s")
    if args.preview:
        contact_sheet(preview, args.preview)


if __name__ == "__main__":
    main()
