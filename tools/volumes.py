"""DICOM and NIfTI: one slice of a scan as a picture, and its mask back on the scan's own grid.

    view = read_view("ct", ScanConfig(plane="coronal", window="lung"))     # None for PNG and the like
    view.image                                                             # what the models see
    view.write(mask, bbox, points, Path("out"))                            # mask.nii.gz or mask.dcm, millimetres

A scan is a DICOM file, a folder with the files of one series, or NIfTI. Three frames:
  grid          indices (i, j, k) of its voxels: the array of NIfTI; column, row and image of DICOM
  image frame   the slice as radiologists see it (the patient's right on the left, front or head up), its pixels
                made square
  patient       millimetres in LPS: x to the patient's left, y to the back, z to the head
Packages are in requirements-tools.txt and imported where they are used; ValueError names the one that is missing.
"""
import io
import logging
import math
import struct
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import permutations
from pathlib import Path
from textwrap import shorten

import numpy as np
from PIL import Image

from runtime.cli import dashed, flag
from runtime.images import MIN_SIDE

AXES = {"L": (0, 1), "P": (1, 1), "S": (2, 1), "I": (2, -1)}              # letter: axis of the patient, sign
PLANES = {"axial": "LPS", "coronal": "LIP", "sagittal": "PIL"}           # towards where x, y and the slices count
COUNTED = {"axial": "feet to head", "coronal": "front to back", "sagittal": "right to left"}
WINDOWS = {"soft": (40, 400), "lung": (-600, 1500), "bone": (400, 1800), "brain": (40, 80)}     # level, width
PERCENTILES = 0.5, 99.5         # black and white where there is no window
MAX_STRETCH = 64                # of the sides of a voxel
UNEVEN = 0.05                   # slices are a volume if their distances differ by less than this share
HEADER = ("Rows Columns NumberOfFrames SeriesInstanceUID Modality PhotometricInterpretation SamplesPerPixel "
          "ImageOrientationPatient ImagePositionPatient PixelSpacing ImagerPixelSpacing PixelAspectRatio SliceThickness "
          "RescaleSlope RescaleIntercept WindowCenter WindowWidth SharedFunctionalGroupsSequence "
          "PerFrameFunctionalGroupsSequence").split()
GEOMETRY = ("pixdim qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y "
            "srow_z xyzt_units").split()
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError, RuntimeError, OSError,
              EOFError, MemoryError, SyntaxError, struct.error, zlib.error)        # found by fuzzing


class Refused(ValueError):
    """One line: what is wrong with a scan, and what to give instead."""


@dataclass
class ScanConfig:
    """Which slice of a scan, and its grey values: flags of infer.py, keys of "scan" in samples.jsonl."""
    slice: str = flag("0.5", "slice of a scan: a number from 0, or a fraction such as 0.25")
    plane: str | None = flag(None, "cut through a scan (default: as it was acquired)", tuple(PLANES))
    frame: int | None = flag(None, "frame of a multi-frame DICOM file, volume of a 4-D NIfTI, from 0", low=0)
    series: str | None = flag(None, "series of a folder: its UID, or how that ends")
    window: str = flag("auto", "grey values: soft, lung, bone, brain, LEVEL,WIDTH; auto: the file's own, else soft "
                       "for CT, else percentiles")

    def given(self) -> list[str]:
        return [f.name for f in fields(ScanConfig) if getattr(self, f.name) != f.default]


def is_scan(path: str | Path) -> bool:
    """Whether this is a folder, or a file named or marked as NIfTI or DICOM."""
    path = Path(path)
    if path.is_dir() or not path.is_file():
        return path.is_dir()
    if path.name.lower().endswith((".nii", ".nii.gz", ".dcm")):
        return True
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def read_view(path: str | Path, choice: ScanConfig = ScanConfig()) -> "View | None":
    """The chosen slice; None for what is no scan. Refused (a ValueError) has one line for what cannot be shown."""
    path = Path(path)
    if not is_scan(path):
        if choice.given() and path.is_file():
            raise Refused(f"is neither DICOM nor NIfTI: leave out {', '.join(map(dashed, choice.given()))}")
        return None
    with quiet():
        return View((Nifti if path.name.lower().endswith((".nii", ".nii.gz")) else Dicom)(path, choice), choice)


def png_bytes(path: Path, scan: dict, mask: bool = False) -> bytes:
    """For a row with "scan": {"slice": 45, …}: its image, or its mask (NIfTI on the image's grid, or a picture)."""
    names = {f.name for f in fields(ScanConfig)}
    if not isinstance(scan, dict) or not scan.keys() <= names or not all(type(v) in (str, int, float)
                                                                         for v in scan.values()):
        raise Refused(f'"scan": {scan!r} is not an object of text and numbers with keys among {", ".join(sorted(names))}')
    if mask and not is_scan(path):
        return path.read_bytes()
    view = read_view(path, ScanConfig(**scan))
    if view is None:
        return path.read_bytes()
    (view.labels() if mask else view.image).save(buffer := io.BytesIO(), format="PNG")
    return buffer.getvalue()


class View:
    """One slice of a scan. image: PIL RGB, the image frame; plane, n, window: what is shown."""

    def __init__(self, scan, choice: ScanConfig):
        self.scan, directions = scan, scan.affine[:3, :3] / np.linalg.norm(scan.affine[:3, :3], axis=0)
        if not np.isfinite(scan.affine).all() or not abs(np.linalg.det(directions)) > 1e-3:
            raise Refused("has a broken affine: correct its sform, or its image orientation and spacing")
        nearest = max(permutations(range(3)), key=lambda p: sum(abs(directions[p[i], i]) for i in range(3)))
        acquired = next(name for name, towards in PLANES.items() if AXES[towards[2]][0] == nearest[2])
        self.plane = choice.plane or acquired
        if self.plane not in PLANES:
            raise Refused(f"cannot be cut {choice.plane}: --plane is one of {', '.join(PLANES)}")
        if scan.shape[2] == 1 and self.plane != acquired:
            raise Refused(f"is a single {acquired} slice: leave out --plane, or give the folder of its series")
        wanted = [AXES[letter] for letter in PLANES[self.plane]]
        self.axes = [nearest.index(axis) for axis, _ in wanted]                     # of the grid, for x, y, slices
        self.steps = [int(math.copysign(1, directions[axis, i])) * sign for i, (axis, sign) in zip(self.axes, wanted)]
        columns, rows, slices = (scan.shape[i] for i in self.axes)
        self.n = slice_number(str(choice.slice), slices)
        spacing = np.linalg.norm(scan.affine[:3, :3], axis=0)[self.axes[:2]]
        stretch = spacing / spacing.min()
        if stretch.max() > MAX_STRETCH or np.prod([columns, rows, *stretch]) > Image.MAX_IMAGE_PIXELS:
            raise Refused(f"has {columns}x{rows} pixels of {spacing[0]:.3g} x {spacing[1]:.3g} mm: too large to be shown")
        self.size = [round(n * s) if stretch.max() > 1.01 else n for n, s in zip((columns, rows), stretch)]
        if min(self.size) < MIN_SIDE:
            raise Refused(f"is {self.size[0]}x{self.size[1]}: a side must have {MIN_SIDE} pixels at least")
        at = self.n if self.steps[2] > 0 else slices - 1 - self.n
        values = scan.read(self.axes[2], at)
        values = (values.swapaxes(0, 1) if self.axes[0] < self.axes[1] else values)[::self.steps[1], ::self.steps[0]]
        self.values = values
        self.window = None if values.ndim == 3 else find_window(
            str(choice.window), values, scan.own_window(at if self.axes[2] == 2 else scan.shape[2] // 2), scan.modality)
        if values.ndim == 3 and choice.window != "auto":
            raise Refused("is a colour image: leave out --window")
        self.image = self.picture(self.grey() if self.window else values, Image.Resampling.BICUBIC).convert("RGB")

    def grey(self) -> np.ndarray:
        """(rows, columns) uint8; what is not finite is black."""
        level, width = self.window
        grey = np.clip((np.nan_to_num(self.values, nan=-np.inf) - (level - width / 2)) / width, 0, 1)
        return np.uint8(255 * (1 - grey if self.scan.inverted else grey) + 0.5)

    def labels(self) -> Image.Image:
        """The values as a mask, image frame; Refused unless they are whole numbers from 0 to 255."""
        if self.values.ndim == 3 or not np.isin(self.values, np.arange(256)).all():
            raise Refused("is not a mask: whole numbers from 0 to 255 are needed")
        return self.picture(np.uint8(self.values), Image.Resampling.NEAREST)

    def picture(self, pixels: np.ndarray, how) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(pixels)).resize(self.size, how)

    def on_grid(self, mask: np.ndarray) -> np.ndarray:
        """(H, W) bool, image frame -> uint8 of the grid's shape: each voxel has what lies at its centre."""
        whole = np.zeros(self.scan.shape, np.uint8)
        x, y, z = self.axes
        shown = whole.transpose(z, y, x)[::self.steps[2], ::self.steps[1], ::self.steps[0]]       # a view of whole
        rows, columns = (np.int64((np.arange(n) + 0.5) * side / n) for n, side in zip(shown.shape[1:], mask.shape))
        shown[self.n] = mask[rows][:, columns]
        return whole

    def to_mm(self, x: float, y: float) -> list[float]:
        """A place in the image frame (0, 0 is the corner of the first pixel) -> LPS."""
        index = [0.0] * 3
        for axis, step, side, at in zip(self.axes, self.steps, (*self.size, 0), (x, y, self.n)):
            at = at * self.scan.shape[axis] / side - 0.5 if side else at
            index[axis] = at if step > 0 else self.scan.shape[axis] - 1 - at
        return (self.scan.affine @ [*index, 1])[:3].round(3).tolist()

    def __str__(self):
        slices = self.scan.shape[self.axes[2]]
        text = f"{self.plane} slice {self.n} of {slices}, counted from 0, {COUNTED[self.plane]}"
        text = (text if self.scan.placed else f"slice {self.n} of {slices}, of unknown orientation")
        return text + ("; window {:g},{:g}".format(*self.window) if self.window else "")

    def write(self, mask: np.ndarray, bbox, points, out: Path) -> dict:
        """Write mask.nii.gz or mask.dcm; "scan" of result.json, with box corners and points in millimetres."""
        with quiet():
            file = self.scan.write(self.on_grid(mask), out)
        scan = {"shown": str(self), "plane": self.plane if self.scan.placed else None, "slice": self.n,
                "window": self.window, "mask": file}
        if self.scan.placed:
            scan |= {"frame": "millimetres, LPS", "bbox": bbox and [self.to_mm(*bbox[:2]), self.to_mm(*bbox[2:])],
                     "points": points and [self.to_mm(x + 0.5, y + 0.5) for x, y in points]}
        return {"scan": scan}


class Nifti:
    """A volume of a NIfTI file. shape (3,), affine (4, 4) from the grid to LPS; placed: whether the file knows it."""
    modality, inverted = "", False

    def __init__(self, path, choice):
        self.nib = need("nibabel")
        if choice.series:
            raise Refused("is NIfTI, which has no series: leave out --series")
        self.errors = self.nib.filebasedimages.ImageFileError, self.nib.spatialimages.HeaderDataError
        with refusing(f"{path.name} is not NIfTI", *self.errors):
            self.file = self.nib.load(path)
            if not isinstance(self.file, self.nib.Nifti1Pair) or len(self.file.shape) < 3 or min(self.file.shape) < 1:
                raise Refused(f"has the shape {self.file.shape} and not the three axes of a volume")
            if self.file.get_data_dtype().kind not in "iuf":
                raise Refused("has colour or complex voxels; give one real number per voxel")
            self.affine = np.diag([-1, -1, 1, 1]) @ self.file.affine                  # RAS -> LPS
            unit = {"meter": 1000.0, "micron": 0.001}.get(self.file.header.get_xyzt_units()[0], 1.0)
        self.affine[:3] *= unit
        self.placed = self.file.header["qform_code"] > 0 or self.file.header["sform_code"] > 0
        self.shape, others = self.file.shape[:3], self.file.shape[3:]
        self.volume = np.unravel_index(one_of(choice.frame, math.prod(others), "volumes"), others, order="F")

    def read(self, axis: int, n: int) -> np.ndarray:
        with refusing("is broken", *self.errors):
            index = [slice(None)] * 3
            index[axis] = n
            return np.asarray(self.file.dataobj[(*index, *map(int, self.volume))], np.float64)

    def own_window(self, k):
        return None

    def write(self, whole: np.ndarray, out: Path) -> str:
        header = type(self.file.header)()
        for key in GEOMETRY:                    # and nothing else: other fields may name the patient
            header[key] = self.file.header[key]
        header.set_data_dtype(np.uint8)
        kind = self.nib.Nifti2Image if isinstance(self.file, self.nib.Nifti2Image) else self.nib.Nifti1Image
        self.nib.save(kind(whole, self.file.affine, header), out / "mask.nii.gz")
        return "mask.nii.gz"


class Dicom:
    """The images of one series: files, or the frames of one. As Nifti; images [(header, frame)], in order of k."""

    def __init__(self, path, choice):
        self.dicom, self.errors = need("pydicom"), (need("pydicom.errors").InvalidDicomError,)
        headers = self.headers(path)
        series = {}
        for header in headers:
            series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(header)
        chosen = [uid for uid in series if uid.endswith(choice.series or "")]
        if len(chosen) != 1:
            names = "; ".join(f"{uid} ({series[uid][0].get('Modality')}, {len(series[uid])} files)" for uid in series)
            raise Refused(f"has {len(chosen) or 'no such'} series: give --series with one of {shorten(names, 400)}")
        with refusing("has a broken header"):
            self.arrange(series[chosen[0]], choice, path)

    def headers(self, path) -> list:
        found = []
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_dir() or (path.is_dir() and not is_scan(file)):
                continue
            with refusing(f"{file.name} is not DICOM", *self.errors):
                header = self.dicom.dcmread(file, stop_before_pixels=True, specific_tags=HEADER)
                if header.get("Rows") and header.get("Columns"):
                    found.append(header)
        if not found:
            raise Refused("is a directory without DICOM images; give the one with the files of a series"
                          if path.is_dir() else "is DICOM without an image; give another file of the study")
        return found

    def arrange(self, headers, choice, path):
        """Sort images along their normal; their places make the affine."""
        frames = int(headers[0].get("NumberOfFrames") or 1)
        self.images = [(header, 0) for header in headers]
        if len(headers) == 1 and choice.frame is not None:
            self.images = [(headers[0], one_of(choice.frame, frames, "frames"))]
        elif len(headers) == 1:
            self.images = [(headers[0], f) for f in range(frames)]
        elif choice.frame is not None:
            raise Refused("is a series of files: leave out --frame, or give one file")
        one = (f"has {frames} frames that are no volume: give --frame, 0 to {frames - 1}" if len(headers) == 1 else
               f"has {len(headers)} images that are no volume (%s); give one of its files")
        self.affine, self.placed = place(*self.images[0])
        if len(self.images) > 1:
            places = [place(*image) for image in self.images]
            sizes = {(h.Rows, h.Columns) for h, _ in self.images}
            turned = any(np.abs(p[:3, :3] - self.affine[:3, :3]).max() > 1e-3 * np.abs(self.affine[:3, :3]).max()
                         for p, _ in places)
            if len(sizes) > 1 or turned or not all(placed for _, placed in places):
                raise Refused(one.replace("%s", "of several sizes or directions, or without positions"))
            normal = self.affine[:3, 2] / np.linalg.norm(self.affine[:3, 2])
            depth = np.array([p[:3, 3] @ normal for p, _ in places])
            order = np.argsort(depth)
            gaps = np.diff(depth[order])
            if gaps.min() < 1e-3 or np.ptp(gaps) > UNEVEN * gaps.mean():
                raise Refused(one.replace("%s", f"{gaps.min():.2f} to {gaps.max():.2f} mm apart"))
            self.images, first, last = [self.images[i] for i in order], places[order[0]][0], places[order[-1]][0]
            self.affine = first
            self.affine[:3, 2] = (last - first)[:3, 3] / (len(order) - 1)
        header = self.images[0][0]
        self.shape, self.modality = (header.Columns, header.Rows, len(self.images)), header.get("Modality")
        self.inverted = header.get("PhotometricInterpretation") == "MONOCHROME1"

    def read(self, axis: int, n: int) -> np.ndarray:
        if axis == 2:
            return self.decode(n)
        return np.stack([self.decode(k).take(n, axis) for k in range(self.shape[2])], axis=1)

    def decode(self, k: int) -> np.ndarray:
        """(columns, rows) float64 after the modality LUT, or (columns, rows, 3) uint8."""
        header, frame = self.images[k]
        file = Path(header.filename)
        with refusing(f"{file.name} cannot be decoded", *self.errors):
            full = self.dicom.dcmread(file, stop_before_pixels=True)
            pixels = need("pydicom.pixels").pixel_array(file, index=frame)
            if header.get("PhotometricInterpretation") == "PALETTE COLOR":
                pixels = self.dicom.pixels.apply_color_lut(pixels, full)
                bits = 8 * pixels.itemsize
            else:
                bits = full.BitsStored if "BitsStored" in full else 8
            if pixels.ndim == 3:
                return np.uint8(pixels[..., :3] / (2 ** bits - 1) * 255 + 0.5).swapaxes(0, 1)
            if "ModalityLUTSequence" in full:
                return np.float64(self.dicom.pixels.apply_modality_lut(pixels, full)).T
            return (pixels * float(tag(header, frame, "RescaleSlope", 1)) +
                    float(tag(header, frame, "RescaleIntercept", 0))).T

    def own_window(self, k):
        pair = [np.ravel(tag(*self.images[k], name, ())) for name in ("WindowCenter", "WindowWidth")]
        return (float(pair[0][0]), float(pair[1][0])) if len(pair[0]) and len(pair[1]) else None

    def write(self, whole: np.ndarray, out: Path) -> str:
        """DICOM SEG of the images with the mask on them; without highdicom, or where the source lacks what a SEG must
        refer to, a sentence that says so."""
        try:
            import highdicom as hd
            from pydicom.sr.codedict import codes
        except ImportError:
            return "none: a DICOM SEG needs highdicom: pip install -r requirements-tools.txt"
        masks = whole.transpose(2, 1, 0)
        kept = [k for k in range(len(masks)) if masks[k].any()] or [0]
        full = self.dicom.dcmread(self.images[0][0].filename, stop_before_pixels=True)
        frames = int(full.get("NumberOfFrames") or 1)
        if frames > 1:
            sources, pixels = [full], np.zeros((frames, *masks.shape[1:]), np.uint8)
            pixels[[frame for _, frame in self.images]] = masks
        else:
            sources = [self.dicom.dcmread(self.images[k][0].filename, stop_before_pixels=True) for k in kept]
            pixels = masks[kept]
        how = hd.AlgorithmIdentificationSequence("MedReasoner", codes.DCM.ArtificialIntelligence, "1")
        try:
            segment = hd.seg.SegmentDescription(1, "answer", codes.SCT.AnatomicalStructure, codes.SCT.AnatomicalStructure,
                                                hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, how)
            hd.seg.Segmentation(sources, pixels, hd.seg.SegmentationTypeValues.BINARY, [segment], hd.UID(), 1, hd.UID(), 1,
                                "MedReasoner", "reference implementation", "1", "0").save_as(out / "mask.dcm")
        except UNREADABLE as error:
            (out / "mask.dcm").unlink(missing_ok=True)
            return f"none: no DICOM SEG can be made for this file ({shorten(str(error), 200)})"
        return "mask.dcm"


def tag(header, frame: int, name: str, default=None):
    """An attribute of one frame: the file's, else that of its functional groups."""
    if header.get(name) is not None:
        return header.get(name)
    for groups, at in ((header.get("PerFrameFunctionalGroupsSequence"), frame),
                       (header.get("SharedFunctionalGroupsSequence"), 0)):
        for element in groups[at] if groups and at < len(groups) else ():
            if element.VR == "SQ" and element.value and element.value[0].get(name) is not None:
                return element.value[0].get(name)
    return default


def place(header, frame: int) -> tuple[np.ndarray, bool]:
    """(4, 4) from (column, row, 0) of a frame to LPS, and whether the file knows it; else as stored, from 0."""
    down, right = np.float64(tag(header, frame, "PixelSpacing") or header.get("ImagerPixelSpacing") or
                             header.get("PixelAspectRatio") or (1, 1))
    turn, origin = (tag(header, frame, f"Image{name}Patient") for name in ("Orientation", "Position"))
    placed = bool(turn and origin)
    x, y = np.reshape(np.float64(turn if placed else (1, 0, 0, 0, 1, 0)), (2, 3))
    affine = np.eye(4)
    affine[:3] = np.stack([x * right, y * down, np.cross(x, y) * float(tag(header, frame, "SliceThickness") or 1),
                           np.float64(origin if placed else (0, 0, 0))], axis=1)
    return affine, placed


def find_window(text: str, values: np.ndarray, own, modality) -> tuple[float, float]:
    """(level, width) of --window for the values of a slice. own: the file's, or None."""
    if text in WINDOWS:
        return WINDOWS[text]
    if text != "auto":
        try:
            level, width = map(float, text.split(","))
        except ValueError:
            level = width = math.nan
        if not (math.isfinite(level) and 0 < width < math.inf):
            raise Refused(f"cannot be shown with --window {text}: give auto, {', '.join(WINDOWS)}, or LEVEL,WIDTH, two "
                          "numbers with a width above 0")
        return level, width
    if own and math.isfinite(own[0]) and 0 < own[1] < math.inf:
        return own
    if modality == "CT":
        return WINDOWS["soft"]
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise Refused("has no finite value in this slice; give another --slice")
    low, high = np.percentile(finite, PERCENTILES)
    low, high = (low, high) if low < high else (finite.min(), finite.max())
    return float(low + high) / 2, float(high - low) or 1.0


def slice_number(text: str, count: int) -> int:
    """--slice of so many slices: a number from 0, or with a point a fraction of them."""
    try:
        n = int(text) if "." not in text else int(min(float(text), 1 - 1e-9) * count) if 0 <= float(text) <= 1 else -1
    except ValueError:
        n = -1
    if not 0 <= n < count:
        raise Refused(f"has no slice {text}: give --slice 0 to {count - 1}, or a fraction from 0.0 to 1.0")
    return n


def one_of(frame: int | None, count: int, what: str) -> int:
    """--frame where there are so many; needed where there are several."""
    if not isinstance(frame, int) and (count > 1 or frame is not None) or not 0 <= (frame or 0) < count:
        raise Refused(f"has {count} {what}: give --frame, 0 to {count - 1}")
    return frame or 0


def need(package: str):
    try:
        return import_module(package)
    except ImportError:
        raise Refused(f"needs the package {package.split('.')[0]}: pip install -r requirements-tools.txt") from None


@contextmanager
def refusing(problem: str, *errors: type[Exception]):
    """What a reader raises for a broken file is one line."""
    try:
        yield
    except Refused:
        raise
    except (*UNREADABLE, *errors) as error:
        raise Refused(f"{problem}, or broken ({shorten(str(error) or type(error).__name__, 300)})") from None


@contextmanager
def quiet():
    """Without the readers' own remarks: a line of ours says what matters."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)
