"""DICOM and NIfTI: one slice of a scan as a picture, and its mask back on the scan's own grid.

    view = read_view("ct", ScanConfig(plane="coronal", window="lung"))     # None for PNG and the like
    view.image                                                             # what the models see
    view.write(mask, bbox, points, Path("out"))                            # mask.nii.gz or mask.dcm, millimetres

A scan is a DICOM file, a folder with the files of one series, or NIfTI; extras/scan_files.py reads it. Three frames:
  grid          indices (i, j, k) of voxels, as stored
  image frame   the slice as radiologists see it (the patient's right on the left, front or head up), its pixels
                enlarged along one side until they are square
  patient       millimetres in LPS: x to the patient's left, y to the back, z to the head
"""

import io
import logging
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

from extras.scan_files import Dicom, Nifti, Refused, is_dicom
from runtime.cli import dashed, flag
from runtime.images import MIN_SIDE

AXES = {"L": (0, 1), "P": (1, 1), "S": (2, 1), "I": (2, -1)}  # letter: axis of the patient, sign
PLANES = {
    "axial": "LPS",
    "coronal": "LIP",
    "sagittal": "PIL",
}  # where x and y lead, and the slices' numbers
COUNTED = {"axial": "feet to head", "coronal": "front to back", "sagittal": "right to left"}
WINDOWS = {
    "soft": (40, 400),
    "lung": (-600, 1500),
    "bone": (400, 1800),
    "brain": (40, 80),
}  # level, width
PERCENTILES = 0.5, 99.5  # black and white where there is no window
MAX_STRETCH = 64  # of a pixel's sides


@dataclass
class ScanConfig:
    """Which slice of a scan, and its grey values: flags of infer.py, keys of "scan" in samples.jsonl."""

    slice: str = flag("0.5", "slice of a scan: a number from 0, or a fraction with a point")
    plane: str | None = flag(
        None, "cut through a scan (default: as it was acquired)", tuple(PLANES)
    )
    frame: int | None = flag(
        None, "frame of a multi-frame DICOM file, volume of a 4-D NIfTI, from 0", low=0
    )
    series: str | None = flag(None, "series of a folder: its UID, or how that ends")
    window: str = flag(
        "auto",
        f"grey values: {', '.join(WINDOWS)}, LEVEL,WIDTH; auto: the file's own, else soft for "
        "CT, else percentiles",
    )

    def given(self) -> list[str]:
        return [f.name for f in fields(ScanConfig) if getattr(self, f.name) != f.default]


def is_scan(path: Path) -> bool:
    """Whether this is a folder, or a file that is named NIfTI or DICOM, or begins as DICOM does."""
    named = path.name.lower().endswith((".nii", ".nii.gz", ".dcm"))
    return path.is_dir() or path.is_file() and (named or is_dicom(path))


def read_view(path: str | Path, choice: ScanConfig = ScanConfig()) -> "View | None":
    """The chosen slice of a scan; None for any other file. Refused (a ValueError): one line, what to give instead."""
    path = Path(path)
    if not is_scan(path):
        if choice.given() and path.is_file():
            raise Refused(
                f"is neither DICOM nor NIfTI: leave out {', '.join(map(dashed, choice.given()))}"
            )
        return None
    kind = Nifti if path.is_file() and path.name.lower().endswith((".nii", ".nii.gz")) else Dicom
    with quiet():
        return View(kind(path, choice.frame, choice.series), choice)


def scan_config(scan: dict) -> ScanConfig:
    """The choice that "scan": {"slice": 45, ...} makes, in samples.jsonl or a request of the page."""
    names = {f.name for f in fields(ScanConfig)}
    if (
        not isinstance(scan, dict)
        or not scan.keys() <= names
        or not {*map(type, scan.values())} <= {str, int, float}
    ):
        raise Refused(
            f'"scan": {scan!r} is not an object of text and numbers with keys among {sorted(names)}'
        )
    return ScanConfig(**scan)


def png_bytes(path: Path, scan: dict, mask: bool = False) -> bytes:
    """The image or the mask of a row with "scan", as data.py wants it. A mask is NIfTI on the grid of its image, or a
    picture, which stays as it is."""
    view = None if mask and not is_scan(path) else read_view(path, scan_config(scan))
    if view is None:
        return path.read_bytes()
    (view.labels() if mask else view.image).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


class View:
    """One slice of a scan: image (PIL RGB, the image frame), and the way from there to grid and patient.
    choice: what shows the same again; slices: how many there are in this plane.
    axes, steps: of the grid, and in which direction, for x, y and the number n of the slice."""

    def __init__(self, scan: Nifti | Dicom, choice: ScanConfig):
        self.scan = scan
        self.orient(choice.plane)
        columns, rows, self.slices = (scan.shape[axis] for axis in self.axes)
        self.n = slice_number(str(choice.slice), self.slices)
        self.choice = replace(choice, slice=str(self.n), plane=self.plane)
        self.size = square_pixels(
            (columns, rows), np.linalg.norm(scan.affine[:3, self.axes[:2]], axis=0)
        )
        at = self.n if self.steps[2] > 0 else self.slices - 1 - self.n
        values = scan.read(self.axes[2], at)
        values = values.swapaxes(0, 1) if self.axes[0] < self.axes[1] else values
        self.values = values[:: self.steps[1], :: self.steps[0]]  # (rows, columns)
        self.window = None
        if values.ndim == 2:
            own = scan.own_window(at if self.axes[2] == 2 else scan.shape[2] // 2)
            self.window = find_window(str(choice.window), self.values, own, scan.modality)
        elif choice.window != "auto":
            raise Refused("is a colour image: leave out --window")
        self.image = self.picture(
            self.grey() if self.window else self.values, Image.Resampling.BICUBIC
        ).convert("RGB")

    def orient(self, plane: str | None) -> None:
        """plane, axes and steps: each axis of the patient has the grid's axis nearest to it."""
        directions = self.scan.affine[:3, :3] / np.linalg.norm(self.scan.affine[:3, :3], axis=0)
        if not np.isfinite(self.scan.affine).all() or not abs(np.linalg.det(directions)) > 1e-3:
            raise Refused(
                "has a broken affine: correct its sform, or its image orientation and pixel spacing"
            )
        axis_of = max(permutations(range(3)), key=lambda axes: sum(abs(directions[range(3), axes])))
        acquired = next(
            name for name, towards in PLANES.items() if axis_of[AXES[towards[2]][0]] == 2
        )
        self.plane = plane or acquired
        if self.plane not in PLANES:
            raise Refused(f"cannot be cut {plane}: --plane is one of {', '.join(PLANES)}")
        if self.scan.shape[2] == 1 and self.plane != acquired:
            raise Refused(
                f"is a single {acquired} slice: leave out --plane, or give the whole series"
            )
        wanted = [AXES[letter] for letter in PLANES[self.plane]]
        self.axes = [axis_of[to] for to, _ in wanted]
        self.steps = [sign * (1 if directions[to, axis_of[to]] > 0 else -1) for to, sign in wanted]

    def picture(self, pixels: np.ndarray, how) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels)).resize(self.size, how)

    def grey(self) -> np.ndarray:
        """(rows, columns) uint8; NaN is black."""
        level, width = self.window
        grey = np.clip(
            (np.nan_to_num(self.values, nan=-np.inf) - (level - width / 2)) / width, 0, 1
        )
        return np.uint8(255 * (1 - grey if self.scan.inverted else grey) + 0.5)

    def labels(self) -> Image.Image:
        """The values themselves, image frame; Refused unless they are whole numbers from 0 to 255."""
        if self.values.ndim == 3 or not np.isin(self.values, np.arange(256)).all():
            raise Refused("is not a mask: whole numbers from 0 to 255 are needed")
        return self.picture(np.uint8(self.values), Image.Resampling.NEAREST)

    def on_grid(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool, image frame -> uint8 of the grid's shape: a voxel has what lies at its centre."""
        grid = np.zeros(self.scan.shape, np.uint8)
        shown = grid.transpose(self.axes[::-1])[
            tuple(slice(None, None, step) for step in self.steps[::-1])
        ]
        rows, columns = (
            np.int64((np.arange(n) + 0.5) * side / n)
            for n, side in zip(shown.shape[1:], mask.shape)
        )
        shown[self.n] = mask[rows][:, columns]  # shown is a view of grid
        return grid

    def to_mm(self, x: float, y: float) -> list[float]:
        """A place in the image frame, 0, 0 the corner of the first pixel -> LPS."""
        index = np.zeros(3)
        for axis, step, at, side in zip(
            self.axes, self.steps, (x, y, self.n + 0.5), (*self.size, None)
        ):
            count = self.scan.shape[axis]
            at = at * count / (side or count) - 0.5
            index[axis] = at if step > 0 else count - 1 - at
        return (self.scan.affine @ [*index, 1])[:3].round(3).tolist()

    def __str__(self):
        counted = f", from 0, {COUNTED[self.plane]}" if self.slices > 1 else ""
        plane, where = (
            (f"{self.plane} ", counted) if self.scan.placed else ("", ", of unknown orientation")
        )
        window = "; window {:g},{:g}".format(*self.window) if self.window else ""
        return f"{plane}slice {self.n} of {self.slices}{where}{window}"

    def write(self, mask: np.ndarray, bbox, points, out: Path) -> dict:
        """Write the mask on the scan's grid into out. -> "scan" of result.json, with two corners of the box and
        the points in millimetres, where the scan says where it lies."""
        with quiet():
            found = {"shown": str(self), "mask": self.scan.write(self.on_grid(mask), out)}
        if self.scan.placed:
            found |= {
                "millimetres": "LPS",
                "bbox": bbox and [self.to_mm(*bbox[:2]), self.to_mm(*bbox[2:])],
                "points": points and [self.to_mm(x + 0.5, y + 0.5) for x, y in points],
            }
        return {"scan": found}


def square_pixels(size: tuple[int, int], spacing: np.ndarray) -> list[int]:
    """The size (columns, rows) of a slice, enlarged where a pixel's sides differ by more than 1 %."""
    stretch = spacing / spacing.min()
    if stretch.max() > MAX_STRETCH or np.prod(size * stretch) > Image.MAX_IMAGE_PIXELS:
        raise Refused(
            "has {}x{} pixels of {:.3g} x {:.3g} mm: too large, or too long and thin".format(
                *size, *spacing
            )
        )
    size = [int(n) for n in np.round(size * stretch)] if stretch.max() > 1.01 else list(size)
    if min(size) < MIN_SIDE:
        raise Refused(f"is {size[0]}x{size[1]}: a side must have {MIN_SIDE} pixels at least")
    return size


def find_window(text: str, values: np.ndarray, own, modality: str) -> tuple[float, float]:
    """(level, width) of --window for the values of a slice. own: the file's, or None."""
    if text in WINDOWS:
        return WINDOWS[text]
    if text != "auto":
        level, width = map(number, text.split(",") if text.count(",") == 1 else "??")
        if not (math.isfinite(level) and 0 < width < math.inf):
            raise Refused(
                f"cannot be shown with --window {text}: give auto, {', '.join(WINDOWS)}, or LEVEL,WIDTH: two "
                "numbers, the width above 0"
            )
        return level, width
    if own and math.isfinite(own[0]) and 0 < own[1] < math.inf:
        return own
    if modality == "CT":
        return WINDOWS["soft"]
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise Refused("has no finite value in this slice: give another --slice")
    low, high = np.percentile(finite, PERCENTILES)
    low, high = (low, high) if low < high else (finite.min(), finite.max())
    return float(low / 2 + high / 2), float(high - low) or 1.0


def slice_number(text: str, count: int) -> int:
    """--slice of so many slices: a number from 0, or, with a point in it, a fraction of them."""
    n = number(text)
    if "." in text and 0 <= n <= 1:
        n = min(int(n * count), count - 1)
    if n not in range(count):
        raise Refused(
            f"has {count} slices: give --slice 0 to {count - 1}, or a fraction from 0.0 to 1.0, not {text}"
        )
    return int(n)


def number(text: str) -> float:
    """NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


@contextmanager
def quiet():
    """Without what the readers print and log: a line of ours says what matters."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)
