"""Real patients for the demo data: chest CT and brain MR with experts' masks, out of pyradiomics'
source package.

    python -m pip download --no-deps --no-build-isolation --no-binary :all: -d build
                                                                                                          pyradiomics==3.0.1
                                                                                                          #
                                                                                                          once

(pip runs its setup.py to learn its name: numpy and versioneer must be installed.) The lungs are
found by their air; tumours are what an expert outlined. Lungs: whole slices of both chests, train
and test at least GAP mm apart. Tumours: the brain of patient 1 is for training, that of patient 2
for the test, and so is the one small lung nodule; the other chest's tumour is far larger than a
nodule, so it is left out and so are the slices that show it. All are axial in the radiological
convention, as the phantoms are."""

import tarfile
import zlib
from pathlib import Path

import numpy as np
from scipy import ndimage

from demo.make.phantoms import finish, fog

ARCHIVE = "build/pyradiomics-3.0.1.tar.gz"
LEAST = 100  # mm2 of a tumour on a usable slice
GAP = 10  # mm between any train slice and any test slice of a chest: every second slice there is
NOTICE = """The chest CT and brain MR pictures of patients ("pyradiomics ..." in a sample's image_source) are test cases of
pyradiomics 3.0.1, cropped, turned, resampled and changed in contrast. Its licence (BSD-3-Clause):

"""
NRRD_TYPES = {"short": "<i2", "int": "<i4", "uchar": "u1", "unsigned char": "u1"}
FLIPPED = ("brain1", "brain2")  # stored from back to front


def read_nrrd(blob):
    """(header, volume (x, y, z)) of a gzipped NRRD of integers; x grows to the patient's left."""
    head, body = blob.split(b"\n\n", 1)
    fields = dict(line.split(": ", 1) for line in head.decode().splitlines() if ": " in line)
    if fields["type"] not in NRRD_TYPES or fields["encoding"] != "gzip":
        raise ValueError(
            f"expected a gzipped NRRD of short or int, found {fields['encoding']} of {fields['type']}"
        )
    shape = [int(n) for n in fields["sizes"].split()]
    volume = np.frombuffer(
        zlib.decompress(body, 47), NRRD_TYPES[fields["type"]], count=int(np.prod(shape))
    )
    return fields, volume.reshape(shape, order="F")


def load_patients(archive=ARCHIVE):
    """(licence text, {(category with side, part): [(name, z, image (H, W), mask (H, W), mm per
    pixel)]})."""
    if not Path(archive).is_file():
        raise SystemExit(
            f"{archive} is missing: see demo/make/patients.py for the one command that downloads it"
        )
    with tarfile.open(archive) as tar:
        read = lambda name: tar.extractfile(f"pyradiomics-3.0.1/{name}").read()
        licence = read("LICENSE.txt").decode()
        volumes = {
            name: (
                *read_nrrd(read(f"data/{name}_image.nrrd")),
                read_nrrd(read(f"data/{name}_label.nrrd"))[1],
            )
            for name in ("brain1", "brain2", "lung1", "lung2")
        }
    slices = {}
    for name, (fields, image, label) in volumes.items():
        spacing = abs(float(fields["space directions"].split(",")[0].strip("(")))
        thick = abs(float(fields["space directions"].split(",")[-1].strip(")")))
        turn = np.s_[::-1] if name in FLIPPED else np.s_[:]
        tumour = (label > 0).any((0, 1))
        for z in range(image.shape[2]):
            picture = image[:, :, z].T[turn].astype(np.float32)
            mask = label[:, :, z].T[turn] > 0
            if mask.sum() * spacing**2 > LEAST and name != "lung2":
                key = (
                    ("brain tumour", int(name == "brain2"))
                    if name in FLIPPED
                    else ("lung nodule", 1)
                )
                slices.setdefault(key, []).append((name, z, picture, mask, spacing))
            part = part_of(z, thick)
            if (
                name.startswith("lung")
                and part is not None
                and not tumour[max(0, z - 1) : z + 2].any()
            ):
                for side, lung in find_lungs(picture, spacing).items():
                    slices.setdefault((f"lung:{side}", part), []).append(
                        (name, z, picture, lung, spacing)
                    )
    return licence, slices


def part_of(z, thick):
    """0 train, 1 test, None between them: of every 12 slices 6 are for training and 3 for the
    test."""
    gap = -(-GAP // thick) - 1  # slices left out on either side of the test's
    k = z % 12
    return 1 if 7 <= k < 10 else 0 if k < 7 - gap or k >= 10 + gap else None


def find_lungs(picture, spacing):
    """{side of the image: mask}: the air within the body, its vessels filled in. A slice without
    two is left out."""
    pieces, _ = ndimage.label(picture > -400)
    body = ndimage.binary_fill_holes(pieces == np.bincount(pieces.ravel())[1:].argmax() + 1)
    air, count = ndimage.label(ndimage.binary_opening(body & (picture < -400), iterations=2))
    middle = ndimage.center_of_mass(body)[1]
    found = {}
    for k in range(1, count + 1):
        piece = air == k
        if piece.sum() * spacing**2 > 4000:
            x = ndimage.center_of_mass(piece)[1] - middle
            piece = ndimage.binary_closing(np.pad(piece, 8), iterations=6)[8:-8, 8:-8]
            found.setdefault("left" if x < 0 else "right", []).append(
                ndimage.binary_fill_holes(piece)
            )
    # one piece a side, both beside the midline: where they touch, they are one piece and the slice
    # is of no use
    return (
        {side: p[0] for side, p in found.items()}
        if sorted(map(len, found.values())) == [1, 1]
        else {}
    )


def patient(rng, size, picture, mask, spacing, category):
    """A slice in a new pose, crop and contrast -> (image (H, W) in 0..1, mask)."""
    u = rng.uniform
    lesion = category in ("lung nodule", "brain tumour")
    rows, cols = np.nonzero(
        ndimage.binary_opening(
            picture > (-400 if category.startswith("lung") else 150), iterations=3
        )
    )
    extent = np.array([np.ptp(rows) + 1, np.ptp(cols) + 1])
    middle = np.array([rows.min() + rows.max(), cols.min() + cols.max()]) / 2
    scale = max(extent / np.array(size)) / u(0.84, 1.0)  # source pixels per pixel
    if lesion:  # a whole chest would leave it a few pixels: crop
        closer = min(1, np.sqrt(mask.sum()) / u(11, 17) / scale)
        scale, free = scale * closer, np.array(size) * scale * (1 - closer) / 2
        middle = np.clip(
            np.argwhere(mask).mean(0) + rng.uniform(-0.3, 0.3, 2) * size * scale,
            middle - free,
            middle + free,
        )
    angle = rng.normal(0, 0.07)
    squeeze = u(0.96, 1.04, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn * squeeze
    offset = middle - matrix @ ((np.array(size) - 1) / 2 + u(-0.03, 0.03, 2) * size)
    blur = max(0, scale / 2 - 0.4)
    low, high = (
        (u(-1150, -1000), u(150, 400))
        if category.startswith("lung")
        else (u(0, 120), np.percentile(picture[picture > 150], 99) * u(0.8, 1.1))
    )
    smooth = ndimage.gaussian_filter(np.clip((picture - low) / (high - low), 0, 1), blur)
    image = ndimage.affine_transform(smooth, matrix, offset, size, order=1)
    inside = ndimage.affine_transform(mask.astype(np.float32), matrix, offset, size, order=1) > 0.5
    # heads are alike on both sides, and there is one patient to learn from
    if category == "brain tumour" and u() < 0.5:
        image = image[:, ::-1]
        inside = inside[:, ::-1]
    image = image * (1 + 0.05 * fog(rng, size, min(size) / 2))
    return finish(rng, image, 0.012, 0.006), inside
