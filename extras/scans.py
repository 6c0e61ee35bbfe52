"""DICOM and NIfTI: ask about one slice of a scan, and get the mask on the scan's own grid.

    python -m extras.scans --image ct.nii.gz --query "Where is the liver?" --plane coronal
    python -m extras.scans --image folder_of_a_series --query "…" --slice 45 --window lung
    python -m extras.scans --image film.dcm --query "…" --frame 12 --completions 8

--image is a DICOM file, a folder with the files of one series, or a NIfTI file. All other flags,
the files in --out and the exit status are those of infer.py. In addition, mask.nii.gz or mask.dcm
(a DICOM SEG) holds the mask on the grid of the scan, and "scan" in result.json the box and the
points in millimetres.

There are three coordinate frames:
  grid          indices (i, j, k) of voxels, as stored
  image frame   pixels of the slice as radiologists see it, with the patient's right on the left and
                the front or the head up. One side is enlarged until the pixels are square.
  patient       millimetres in LPS: x leads to the patient's left, y to the back, z to the head

In samples.jsonl, "scan": {"slice": 45, "window": "lung"} chooses a slice. runtime/readers.py names
`read_png` for that. extras/scan_files.py reads the files.
"""

import io
import logging
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import permutations
from pathlib import Path
from threading import RLock

import numpy as np
from PIL import Image

import infer
from data import TAUGHT
from extras.scan_files import Dicom, Nifti, ScanError, is_dicom
from runtime.cli import dashed, exit_on, flag, parse_args, use_embedded
from runtime.files import parse_object, read_text
from runtime.images import MIN_SIDE

# Directions in the patient: the axis of LPS, and the sign along it.
DIRECTIONS = {"L": (0, 1), "P": (1, 1), "S": (2, 1), "I": (2, -1)}
# Where a slice's x, its y and its number lead.
PLANES = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}
PLANE_ACROSS = ("sagittal", "coronal", "axial")  # each axis of LPS
COUNTED = {"axial": "feet to head", "coronal": "front to back", "sagittal": "right to left"}

# The level and the width of a window: the values from level - width / 2 to level + width / 2 become
# the greys from black to white.
WINDOWS = {"soft": (40, 400), "lung": (-600, 1500), "bone": (400, 1800), "brain": (40, 80)}
PERCENTILES = (0.5, 99.5)  # They become black and white where there is no window.

MAX_STRETCH = 64  # largest ratio of a pixel's sides
NIFTI_NAMES = (".nii", ".nii.gz")
WRITTEN_MASKS = ("mask.nii.gz", "mask.dcm")
FARTHEST = 0.1  # of a voxel: how far a mask may lie from its image
LARGEST_LABEL = 2**16 - 1  # that fits into a PNG file

READING = RLock()  # see `quiet`


@dataclass
class ScanConfig:
    """Which slice of a scan is shown, and with which grey values.

    The fields are flags of this command and keys of "scan" in samples.jsonl.
    """

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
        "CT in Hounsfield units, else percentiles",
    )

    def given(self) -> list[str]:
        """The names of the fields that differ from their defaults."""
        return [f.name for f in fields(ScanConfig) if getattr(self, f.name) != f.default]


@dataclass
class Config(ScanConfig, infer.Config):  # the flags of infer.py come first
    image: str = flag("required", "a DICOM file, a folder with one DICOM series, or a NIfTI file")
    out: str = flag("out", "folder for mask.png, the scan's mask, overlay.png and result.json")


# ---------------------------------------------------------------- reading


def is_scan(path: Path) -> bool:
    """Whether this is a folder, or a file that is named as NIfTI or DICOM or begins as DICOM."""
    if path.is_dir():
        return True
    if not path.is_file():
        return False
    return path.name.lower().endswith((*NIFTI_NAMES, ".dcm")) or is_dicom(path)


def open_scan(path: Path, choice: ScanConfig) -> Nifti | Dicom:
    if path.is_file() and path.name.lower().endswith(NIFTI_NAMES):
        return Nifti(path, choice.frame, choice.series)
    return Dicom(path, choice.frame, choice.series)


def read_view(path: str | Path, choice: ScanConfig | None = None) -> "View | None":
    """The chosen slice of a scan, by default the middle one. None for a file that is no scan.

    ScanError, a ValueError of one line, says what is wrong with the file or with the choice.
    """
    path = Path(path)
    choice = choice or ScanConfig()
    if is_scan(path):
        with quiet():
            return View(open_scan(path, choice), choice)
    if path.is_file() and choice.given():
        flags = ", ".join(dashed(name) for name in choice.given())
        raise ScanError(f"is neither DICOM nor NIfTI: leave out {flags}")
    return None


def read_labels(path: Path, choice: ScanConfig, image: Path | None = None) -> Image.Image:
    """The labels in a slice of a mask that is DICOM or NIfTI, in the image frame.

    Where `image` is a scan as well, the mask is cut as its image is, and ScanError says if it does
    not lie where the image does. Its axes may have another order.
    """
    with quiet():
        if image is None or not is_scan(image):
            return Slice(open_scan(path, choice), choice).labels()
        image_slice = Slice(open_scan(image, choice), choice)
        choice = replace(choice, plane=image_slice.plane)
        mask_slice = Slice(open_scan(path, choice), choice)
        check_positions(mask_slice, image_slice, image.name)
        return mask_slice.labels()


def read_png(path: Path, choice: dict, is_mask: bool, image: Path | None = None) -> bytes:
    """An image or a mask as PNG, or the bytes of a file that is no scan as they are.

    choice is "scan" of a row, {} for the middle slice. A mask keeps its labels, in 16 bits where
    one is above 255. image is the file of a mask's image, with which its position is compared.
    """
    path = Path(path)
    config = scan_config(choice)
    if is_mask and not is_scan(path):
        return path.read_bytes()
    if is_mask:
        picture = read_labels(path, config, image)
    else:
        view = read_view(path, config)
        if view is None:
            return path.read_bytes()
        picture = view.image
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return buffer.getvalue()


def scan_config(scan: dict) -> ScanConfig:
    """The choice that {"slice": 45, ...} makes, in samples.jsonl or in a request of the page."""
    names = sorted(f.name for f in fields(ScanConfig))
    problem = ScanError(
        f'"scan": {scan!r} is not an object of text and numbers with keys among {names}'
    )
    if not isinstance(scan, dict):
        raise problem
    for name, value in scan.items():
        if name not in names or type(value) not in (str, int, float):  # a bool is none of these
            raise problem
    return ScanConfig(**scan)


@contextmanager
def quiet() -> Iterator[None]:
    """Read without what the packages print and log. Our own errors say what matters.

    Warnings and logging are switched off for the process, so one thread reads at a time.
    """
    with READING, warnings.catch_warnings(action="ignore"):
        before = logging.root.manager.disable
        logging.disable()
        try:
            yield
        finally:
            logging.disable(before)


# ---------------------------------------------------------------- one slice


class Slice:
    """Where one slice of a scan lies: the way from its image frame to the grid and to the patient.

    axes    the axes of the grid along x, along y and along the number of the slice
    steps   1 where the index in the grid grows along them, else -1
    shape   (columns, rows, slices) of the grid, seen in this plane
    size    (width, height) of the slice in the image frame
    affine  (4, 4) from (column, row, number, 1) to LPS
    """

    def __init__(self, scan: Nifti | Dicom, choice: ScanConfig) -> None:
        self.scan = scan
        self.plane, self.axes, self.steps = orient(scan, choice.plane)
        columns, rows, self.slices = [scan.shape[axis] for axis in self.axes]
        self.shape = (columns, rows, self.slices)
        self.number = slice_number(str(choice.slice), self.slices)
        self.affine = self._find_affine()
        spacing = np.linalg.norm(self.affine[:3, :2], axis=0)
        self.size = square_pixels((columns, rows), spacing)

    def _find_affine(self) -> np.ndarray:
        first = np.zeros(4)  # index in the grid of what is column 0, row 0, slice 0 here
        first[3] = 1
        affine = np.eye(4)
        for at, axis in enumerate(self.axes):
            affine[:3, at] = self.scan.affine[:3, axis] * self.steps[at]
            if self.steps[at] < 0:
                first[axis] = self.scan.shape[axis] - 1
        affine[:, 3] = self.scan.affine @ first
        return affine

    @property
    def stored_number(self) -> int:
        """The index of this slice in the grid."""
        if self.steps[2] > 0:
            return self.number
        return self.slices - 1 - self.number

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """The values (rows, columns) or (rows, columns, 3) as shown, and which are padding."""
        values, is_padding = self.scan.read(self.axes[2], self.stored_number)
        if self.axes[0] < self.axes[1]:
            values = values.swapaxes(0, 1)
            is_padding = is_padding.swapaxes(0, 1)
        step_x, step_y, _ = self.steps
        return values[::step_y, ::step_x], is_padding[::step_y, ::step_x]

    def enlarge(self, pixels: np.ndarray, resample: Image.Resampling) -> Image.Image:
        """Pixels of the grid as a picture of the slice's size."""
        return Image.fromarray(np.ascontiguousarray(pixels)).resize(self.size, resample)

    def labels(self) -> Image.Image:
        """The values themselves in the image frame, with 8 or 16 bits. Padding is background.

        ScanError if they are not whole numbers from 0 to LARGEST_LABEL.
        """
        values, is_padding = self.read()
        if values.ndim == 3:
            raise ScanError("is a colour image, not a mask: one label per voxel is needed")
        labels = np.where(is_padding, 0, values)
        are_labels = (labels >= 0) & (labels <= LARGEST_LABEL) & (labels == np.floor(labels))
        if not are_labels.all():
            raise ScanError(f"is not a mask: whole numbers from 0 to {LARGEST_LABEL} are needed")
        kind = np.uint8 if labels.max() <= 255 else np.uint16
        return self.enlarge(labels.astype(kind), Image.Resampling.NEAREST)

    def on_grid(self, mask: np.ndarray) -> np.ndarray:
        """A mask (H, W) in the image frame -> uint8 of the grid's shape.

        A voxel gets what lies at its centre.
        """
        columns, rows, _ = self.shape
        height, width = mask.shape
        row_centres = np.int64((np.arange(rows) + 0.5) * height / rows)
        column_centres = np.int64((np.arange(columns) + 0.5) * width / columns)
        grid = np.zeros(self.scan.shape, np.uint8)
        seen = grid.transpose(self.axes[::-1])  # a view: what is written there is in the grid
        step_x, step_y, step_n = self.steps
        seen = seen[::step_n, ::step_y, ::step_x]
        seen[self.number] = mask[row_centres][:, column_centres]
        return grid

    def to_mm(self, x: float, y: float) -> list[float]:
        """A place in the image frame, where 0, 0 is the corner of the first pixel -> LPS."""
        width, height = self.size
        columns, rows, _ = self.shape
        column = x * columns / width - 0.5
        row = y * rows / height - 0.5
        return (self.affine @ [column, row, self.number, 1])[:3].round(3).tolist()

    def __str__(self) -> str:
        text = f"slice {self.number} of {self.slices}"
        if not self.scan.placed:
            return f"{text}, of unknown orientation"
        text = f"{self.plane} {text}"
        if self.slices > 1:
            text += f", from 0, {COUNTED[self.plane]}"
        return text

    def write(
        self,
        mask: np.ndarray,
        bbox: list[float] | None,
        points: list[list[float]] | None,
        folder: Path,
    ) -> dict:
        """Write a mask (H, W) on the scan's grid into the folder. Returns "scan" of result.json.

        Where the scan says where it lies, that has two corners of the box and the points in
        millimetres.
        """
        with quiet():
            found = {"shown": str(self), "mask": self.scan.write(self.on_grid(mask), folder)}
        if not self.scan.placed:
            return found
        found |= {"millimetres": "LPS", "bbox": None, "points": None}
        if bbox is not None:
            found["bbox"] = [self.to_mm(*bbox[:2]), self.to_mm(*bbox[2:])]
        if points is not None:
            found["points"] = [self.to_mm(x + 0.5, y + 0.5) for x, y in points]
        return found


class View(Slice):
    """One slice of a scan, and what is seen of it.

    values      (rows, columns) float64, or (rows, columns, 3) uint8 in colour
    is_padding  (rows, columns) bool
    window      (level, width) of the grey values, None in colour
    image       a PIL image, RGB: what the models see
    choice      the ScanConfig that shows the same again
    """

    def __init__(self, scan: Nifti | Dicom, choice: ScanConfig) -> None:
        super().__init__(scan, choice)
        self.choice = replace(choice, slice=str(self.number), plane=self.plane)
        self.values, self.is_padding = self.read()
        self.window = None
        pixels = self.values
        if self.values.ndim == 2:
            self.window = self._find_window(str(choice.window))
            pixels = self.grey()
        elif choice.window != "auto":
            raise ScanError("is a colour image: leave out --window")
        self.image = self.enlarge(pixels, Image.Resampling.BICUBIC).convert("RGB")

    def _find_window(self, text: str) -> tuple[float, float]:
        k = self.scan.shape[2] // 2  # a slice across the images has the window of the middle one
        if self.axes[2] == 2:
            k = self.stored_number
        return find_window(
            text,
            self.values[~self.is_padding],
            self.scan.own_window(k),
            self.scan.in_hounsfield(k),
        )

    def grey(self) -> np.ndarray:
        """(rows, columns) uint8. Padding and NaN are black."""
        level, width = self.window
        is_dark = self.is_padding | np.isnan(self.values)
        lowest = level - width / 2
        share = np.clip((np.where(is_dark, lowest, self.values) - lowest) / width, 0, 1)
        if self.scan.inverted:
            share = 1 - share
        share[is_dark] = 0
        return np.uint8(255 * share + 0.5)

    def __str__(self) -> str:
        text = super().__str__()
        if self.window is None:
            return text
        level, width = self.window
        return f"{text}; window {level:g},{width:g}"


def orient(scan: Nifti | Dicom, plane: str | None) -> tuple[str, list[int], list[int]]:
    """The name of the plane, and its axes and steps, see Slice. None: the plane as acquired."""
    lengths = np.linalg.norm(scan.affine[:3, :3], axis=0)
    directions = scan.affine[:3, :3] / lengths
    is_sound = np.isfinite(scan.affine).all() and abs(np.linalg.det(directions)) > 1e-3
    if not is_sound:
        raise ScanError(
            "has a broken affine: correct its sform, or its image orientation and pixel spacing"
        )
    axis_of = nearest_axes(directions)
    acquired = PLANE_ACROSS[axis_of.index(2)]  # the stored images lie along the last axis
    plane = plane or acquired
    if plane not in PLANES:
        raise ScanError(f"cannot be cut {plane}: --plane is one of {', '.join(PLANES)}")
    if scan.shape[2] == 1 and plane != acquired:
        raise ScanError(
            f"is a single {acquired} slice: leave out --plane, or give the whole series"
        )
    axes = []
    steps = []
    for letter in PLANES[plane]:
        patient_axis, sign = DIRECTIONS[letter]
        axis = axis_of[patient_axis]
        axes.append(axis)
        steps.append(sign if directions[patient_axis, axis] > 0 else -sign)
    return plane, axes, steps


def nearest_axes(directions: np.ndarray) -> tuple[int, ...]:
    """For each axis of the patient, the axis of the grid that is nearest to it, each used once."""

    def nearness(axes: tuple[int, ...]) -> float:
        return np.abs(directions[range(3), axes]).sum()

    return max(permutations(range(3)), key=nearness)


def square_pixels(counts: tuple[int, int], spacing: np.ndarray) -> tuple[int, int]:
    """The size of a slice of (columns, rows), enlarged where a pixel's sides differ by over 1 %."""
    stretch = spacing / spacing.min()
    if stretch.max() > MAX_STRETCH or np.prod(counts * stretch) > Image.MAX_IMAGE_PIXELS:
        columns, rows = counts
        right, down = spacing
        raise ScanError(
            f"has {columns}x{rows} pixels of {right:.3g} x {down:.3g} mm: too large, or too long "
            "and thin"
        )
    width, height = counts
    if stretch.max() > 1.01:
        width = round(counts[0] * stretch[0])
        height = round(counts[1] * stretch[1])
    if min(width, height) < MIN_SIDE:
        raise ScanError(f"is {width}x{height}: a side must have {MIN_SIDE} pixels at least")
    return width, height


def check_positions(mask: Slice, image: Slice, image_name: str) -> None:
    """ScanError unless each voxel of a mask lies where that of its image does.

    A mask that was saved with another affine would be mirrored or shifted without a word.
    """
    columns, rows, _ = mask.shape
    image_columns, image_rows, _ = image.shape
    if (columns, rows) != (image_columns, image_rows):
        raise ScanError(
            f"has {columns}x{rows} voxels in this slice, its image {image_name} has "
            f"{image_columns}x{image_rows}"
        )
    if not mask.scan.placed and not image.scan.placed:
        return
    if mask.slices == image.slices:
        offsets = corners(mask, 0, mask.slices - 1) - corners(image, 0, image.slices - 1)
    else:  # a mask of some slices
        offsets = corners(mask, mask.number) - corners(image, image.number)
    in_voxels = np.linalg.solve(image.affine[:3, :3], offsets)
    if np.abs(in_voxels).max() <= FARTHEST:
        return
    if not mask.scan.placed:
        problem = f"does not say where it lies, and its image {image_name} does"
    elif not image.scan.placed:
        problem = f"says where it lies, and its image {image_name} does not"
    else:
        farthest = np.linalg.norm(offsets, axis=0).max()
        problem = f"lies up to {farthest:.1f} mm away from its image {image_name}"
    raise ScanError(f"{problem}: save it with the affine of its image")


def corners(part: Slice, *numbers: int) -> np.ndarray:
    """(3, n) LPS of the voxels in the corners of slices with these numbers."""
    columns, rows, _ = part.shape
    voxels = [
        (column, row, number, 1)
        for number in numbers
        for column in (0, columns - 1)
        for row in (0, rows - 1)
    ]
    return (part.affine @ np.transpose(voxels))[:3]


def find_window(
    text: str, values: np.ndarray, own: tuple[float, float] | None, in_hounsfield: bool
) -> tuple[float, float]:
    """(level, width) that --window means for the values of a slice. own: the file's, if any."""
    if text in WINDOWS:
        return WINDOWS[text]
    if text != "auto":
        return parse_window(text)
    if own is not None and is_window(*own):
        return own
    if in_hounsfield:
        return WINDOWS["soft"]
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ScanError("has no finite value in this slice: give another --slice")
    low, high = np.percentile(finite, PERCENTILES)
    if low == high:
        low, high = finite.min(), finite.max()
    if low == high:
        return float(low), 1.0
    return float(low / 2 + high / 2), float(high - low)


def parse_window(text: str) -> tuple[float, float]:
    """(level, width) from "LEVEL,WIDTH"."""
    parts = text.split(",")
    if len(parts) == 2:
        level = number_in(parts[0])
        width = number_in(parts[1])
        if is_window(level, width):
            return level, width
    raise ScanError(
        f"cannot be shown with --window {text}: give auto, {', '.join(WINDOWS)}, or LEVEL,WIDTH: "
        "two numbers, the width above 0"
    )


def is_window(level: float, width: float) -> bool:
    return math.isfinite(level) and 0 < width < math.inf


def slice_number(text: str, count: int) -> int:
    """The slice that --slice means, of so many: a number from 0, or a fraction with a point."""
    number = number_in(text)
    if "." in text and 0 <= number <= 1:
        return min(int(number * count), count - 1)
    if number not in range(count):
        raise ScanError(
            f"has {count} slices: give --slice 0 to {count - 1}, or a fraction from 0.0 to 1.0, "
            f"not {text}"
        )
    return int(number)


def number_in(text: str) -> float:
    """The number in a text, NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


# ---------------------------------------------------------------- the command


def view_of(cfg: Config) -> View:
    """The slice that the flags choose. ValueError, one line, names the file."""
    choice = ScanConfig(cfg.slice, cfg.plane, cfg.frame, cfg.series, cfg.window)
    try:
        view = read_view(cfg.image, choice)
    except ValueError as error:
        raise ValueError(f"--image {cfg.image} {error}") from None
    if view is not None:
        return view
    if not Path(cfg.image).exists():
        raise ValueError(f"--image {cfg.image} does not exist")
    raise ValueError(f"--image {cfg.image} is neither DICOM nor NIfTI: give it to infer.py")


def earlier_masks(folder: Path) -> list[Path]:
    """The masks of an earlier scan in the folder. ValueError if this program did not write them."""
    found = [folder / name for name in WRITTEN_MASKS if (folder / name).exists()]
    file = folder / "result.json"
    of_a_scan = file.exists() and "scan" in parse_object(read_text(file), file)
    if found and not of_a_scan:
        raise ValueError(
            f"--out {folder} has a {found[0].name} and no result.json of a scan, so it is not a "
            "folder of this program: give another"
        )
    return found


def main(cfg: Config) -> int:
    """The exit status: 0 or 3, as infer.py's. Bad input raises SystemExit(2)."""
    use_embedded(cfg, {"crm": TAUGHT["crm"], "asm": TAUGHT["asm"]})
    folder = Path(cfg.out)
    with exit_on(ValueError, OSError):
        if not cfg.query.strip():
            raise ValueError("--query is empty: ask a question about the image")
        view = view_of(cfg)
        of_another_question = earlier_masks(folder)
        crm, asm = infer.load_models(cfg)
    status, result, mask = infer.ground(cfg, view.image, crm, asm, describe=str(view))
    for file in of_another_question:
        file.unlink(missing_ok=True)
    if mask is None:
        return status
    result["scan"] = view.write(mask, result["bbox"], result["points"], folder)
    infer.write_result(folder, result)
    print(f"scan's mask {result['scan']['mask']}")
    return status


if __name__ == "__main__":
    sys.exit(main(parse_args(Config, __doc__)))
