"""Real patients for the demo data: chest CT and brain MR with experts' masks.

They are test cases inside the source package of pyradiomics 3.0.1. How it is fetched is said in
demo/make/data.py; make embedded does it. The package is read, not installed.

The lungs are found by their air, and tumours are what an expert outlined. Lungs are whole slices of
both chests, train and test at least GAP mm apart. The brain of patient 1 is for training, that of
patient 2 for the test, and so is the one small lung nodule. The other chest's tumour is far larger
than a nodule, so it is left out, and so are the slices that show it. All slices are axial in the
radiological convention, as the phantoms are.
"""

import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from demo.make.phantoms import Masks, Rng, Size, finish, fog

ARCHIVE = "build/pyradiomics-3.0.1.tar.gz"
LEAST = 100  # mm2 of a tumour on a usable slice
GAP = 10  # mm between any train slice and any test slice of a chest: every second slice there is
NOTICE = """The chest CT and brain MR pictures of patients ("pyradiomics ..." in a sample's
image_source) are test cases of pyradiomics 3.0.1, cropped, turned, resampled and changed in
contrast. Its licence (BSD-3-Clause):

"""
NRRD_TYPES = {"short": "<i2", "int": "<i4", "uchar": "u1", "unsigned char": "u1"}
VOLUMES = ("brain1", "brain2", "lung1", "lung2")
FLIPPED = ("brain1", "brain2")  # stored from back to front


@dataclass(frozen=True)
class Case:
    """One slice of a patient."""

    name: str  # of the volume
    z: int  # of the slice
    image: np.ndarray  # (H, W) float32, in Hounsfield units where it is a CT
    mask: np.ndarray  # (H, W) bool
    spacing: float  # mm per pixel


Clinic = dict[tuple[str, int], list[Case]]  # of (category with its side, part)


def read_nrrd(blob: bytes) -> tuple[dict[str, str], np.ndarray]:
    """Returns the header and the volume (x, y, z) of a gzipped NRRD of integers; x grows to the
    patient's left. ValueError for another type or encoding."""
    head, body = blob.split(b"\n\n", 1)
    lines = [line for line in head.decode().splitlines() if ": " in line]
    fields = dict(line.split(": ", 1) for line in lines)
    kind = fields["type"]
    encoding = fields["encoding"]
    if kind not in NRRD_TYPES or encoding != "gzip":
        raise ValueError(f"expected a gzipped NRRD of short or int, found {encoding} of {kind}")
    shape = [int(n) for n in fields["sizes"].split()]
    count = int(np.prod(shape))
    volume = np.frombuffer(zlib.decompress(body, 47), NRRD_TYPES[kind], count=count)
    return fields, volume.reshape(shape, order="F")


def load_patients(archive: str | Path = ARCHIVE) -> tuple[str, Clinic]:
    """Returns the licence text and the usable slices. ValueError where the archive is missing."""
    if not Path(archive).is_file():
        raise ValueError(
            f"--patients {archive}: no such file; make embedded fetches it, and demo/make/data.py "
            "has the commands"
        )
    clinic: Clinic = {}
    with tarfile.open(archive) as tar:
        licence = read_member(tar, "LICENSE.txt").decode()
        for name in VOLUMES:
            fields, image = read_nrrd(read_member(tar, f"data/{name}_image.nrrd"))
            _, label = read_nrrd(read_member(tar, f"data/{name}_label.nrrd"))
            add_slices(clinic, name, fields, image, label)
    return licence, clinic


def read_member(tar: tarfile.TarFile, name: str) -> bytes:
    return tar.extractfile(f"pyradiomics-3.0.1/{name}").read()


def add_slices(
    clinic: Clinic, name: str, fields: dict[str, str], image: np.ndarray, label: np.ndarray
) -> None:
    """Adds the usable slices of one volume to the clinic."""
    directions = fields["space directions"].split(",")
    spacing = abs(float(directions[0].strip("(")))
    thick = abs(float(directions[-1].strip(")")))
    tumour_on = (label > 0).any((0, 1))  # by slice
    for z in range(image.shape[2]):
        picture = image[:, :, z].T.astype(np.float32)
        mask = label[:, :, z].T > 0
        if name in FLIPPED:
            picture = picture[::-1]
            mask = mask[::-1]
        if mask.sum() * spacing**2 > LEAST and name != "lung2":
            key = "lung nodule", 1
            if name in FLIPPED:
                key = "brain tumour", int(name == "brain2")
            clinic.setdefault(key, []).append(Case(name, z, picture, mask, spacing))
        part = part_of(z, thick)
        shows_tumour = tumour_on[max(0, z - 1) : z + 2].any()
        if name.startswith("lung") and part is not None and not shows_tumour:
            for side, lung in find_lungs(picture, spacing).items():
                case = Case(name, z, picture, lung, spacing)
                clinic.setdefault((f"lung:{side}", part), []).append(case)


def part_of(z: int, thick: float) -> int | None:
    """Returns 0 for train, 1 for test, None between them: of every 12 slices up to 6 are for
    training and 3 for the test. thick: mm between slices."""
    left_out = -(-GAP // thick) - 1  # on either side of the test's
    k = z % 12
    if 7 <= k < 10:
        return 1
    if k < 7 - left_out or k >= 10 + left_out:
        return 0
    return None


def find_lungs(picture: np.ndarray, spacing: float) -> Masks:
    """Returns {side of the image: mask} of the air within the body, its vessels filled in. {} where
    there are not two lungs."""
    pieces, _ = ndimage.label(picture > -400)
    largest = np.bincount(pieces.ravel())[1:].argmax() + 1
    body = ndimage.binary_fill_holes(pieces == largest)
    air, count = ndimage.label(ndimage.binary_opening(body & (picture < -400), iterations=2))
    middle = ndimage.center_of_mass(body)[1]
    found: dict[str, list[np.ndarray]] = {"left": [], "right": []}
    for k in range(1, count + 1):
        piece = air == k
        if piece.sum() * spacing**2 <= 4000:
            continue
        side = "left" if ndimage.center_of_mass(piece)[1] < middle else "right"
        closed = ndimage.binary_closing(np.pad(piece, 8), iterations=6)[8:-8, 8:-8]
        found[side].append(ndimage.binary_fill_holes(closed))
    # Where the lungs touch they are one piece, and the slice is of no use.
    if len(found["left"]) != 1 or len(found["right"]) != 1:
        return {}
    return {"left": found["left"][0], "right": found["right"][0]}


def patient(rng: Rng, size: Size, case: Case, category: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns a slice in a new pose, crop and contrast: image (H, W) in 0..1, and its mask."""
    u = rng.uniform
    is_chest = category.startswith("lung")
    picture = case.image
    body = ndimage.binary_opening(picture > (-400 if is_chest else 150), iterations=3)
    rows, columns = np.nonzero(body)
    extent = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1])
    middle = np.array([rows.min() + rows.max(), columns.min() + columns.max()]) / 2
    scale = max(extent / np.array(size)) / u(0.84, 1.0)  # source pixels per pixel
    if category in ("lung nodule", "brain tumour"):
        # in a whole chest a lesion would have a few pixels, so the picture is cropped
        closer = min(1, np.sqrt(case.mask.sum()) / u(11, 17) / scale)
        free = np.array(size) * scale * (1 - closer) / 2
        scale = scale * closer
        centre = np.argwhere(case.mask).mean(0) + rng.uniform(-0.3, 0.3, 2) * size * scale
        middle = np.clip(centre, middle - free, middle + free)
    angle = rng.normal(0, 0.07)
    squeeze = u(0.96, 1.04, 2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = scale * turn * squeeze
    offset = middle - matrix @ ((np.array(size) - 1) / 2 + u(-0.03, 0.03, 2) * size)
    blur = max(0, scale / 2 - 0.4)
    if is_chest:
        low = u(-1150, -1000)
        high = u(150, 400)
    else:
        low = u(0, 120)
        high = np.percentile(picture[picture > 150], 99) * u(0.8, 1.1)
    smooth = ndimage.gaussian_filter(np.clip((picture - low) / (high - low), 0, 1), blur)
    image = ndimage.affine_transform(smooth, matrix, offset, size, order=1)
    mask = case.mask.astype(np.float32)
    inside = ndimage.affine_transform(mask, matrix, offset, size, order=1) > 0.5
    # heads are alike on both sides, and there is one patient to learn from
    if category == "brain tumour" and u() < 0.5:
        image = image[:, ::-1]
        inside = inside[:, ::-1]
    image = image * (1 + 0.05 * fog(rng, size, min(size) / 2))
    return finish(rng, image, 0.012, 0.006), inside
