"""What DICOM and NIfTI have in common: a grid of voxels, and the affine from there to the patient.

Nifti and Dicom have
  shape         of the grid, whose indices (i, j, k) are the axes of NIfTI's array; DICOM's column, row and image
  affine        (4, 4) from (i, j, k, 1) to millimetres in LPS: x to the patient's left, y to the back, z to the head
  placed        whether the file says so; else the affine is a guess and only what is shown depends on it
  read          (axis, n) -> the slice there; write(grid, folder) -> the file of a mask
  frames        how many there are to choose one from
  modality, inverted, own_window(k)         how its grey values are shown
Their packages are imported here and only here (requirements-extras.txt); Refused names the one that is missing.
"""

import math
import re
import struct
import zlib
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import shorten

import numpy as np

MOST_FRAMES = 100_000
UNEVEN = 0.05  # images are a volume if their distances differ by less than this share
GEOMETRY = (
    "pixdim qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y "
    "srow_z xyzt_units"
).split()
REQUIRED = (
    "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime AccessionNumber "
    "ReferringPhysicianName"
).split()  # of patient and study, in a DICOM SEG
UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    OSError,
    EOFError,
    MemoryError,
    SyntaxError,
    struct.error,
    zlib.error,
)


class Refused(ValueError):
    """One line: what is wrong with a scan, and what to give instead."""


class SeveralFrames(Refused):
    """A frame must be chosen."""


class Nifti:
    """One volume of a NIfTI file; frame: which, where there are several."""

    modality, inverted = "", False

    def __init__(self, path: Path, frame: int | None, series: str | None):
        self.nib = need("nibabel")
        self.errors = (
            self.nib.filebasedimages.ImageFileError,
            self.nib.spatialimages.HeaderDataError,
        )
        if series:
            raise Refused("is NIfTI, which has no series: leave out --series")
        with refusing("is not NIfTI", *self.errors):
            self.file = self.nib.load(path)
            shape, header = self.file.shape, self.file.header
            if not isinstance(self.file, self.nib.Nifti1Pair) or len(shape) < 3 or min(shape) < 1:
                raise Refused(f"has the shape {shape}: a NIfTI volume with three axes is needed")
            if header.get_data_dtype().kind not in "iuf":
                raise Refused("has colour or complex voxels: one real number per voxel is needed")
            unit = {"meter": 1000, "micron": 0.001}.get(header.get_xyzt_units()[0], 1)
            self.affine = np.diag([-unit, -unit, unit, 1]) @ self.file.affine  # RAS -> LPS, mm
            self.placed = bool(header["qform_code"] > 0 or header["sform_code"] > 0)
        self.shape, self.frames = shape[:3], math.prod(shape[3:])
        self.volume = np.unravel_index(one_of(frame, self.frames, "volumes"), shape[3:], order="F")

    def read(self, axis: int, n: int) -> np.ndarray:
        """Float64, the other two axes in order."""
        index = [n if a == axis else slice(None) for a in range(3)]
        with refusing("is truncated", *self.errors):
            return np.asarray(self.file.dataobj[(*index, *map(int, self.volume))], np.float64)

    def own_window(self, k):
        return None

    def write(self, grid: np.ndarray, out: Path) -> str:
        """mask.nii.gz: grid (uint8) with the input's geometry."""
        kind = (
            self.nib.Nifti2Image
            if isinstance(self.file, self.nib.Nifti2Image)
            else self.nib.Nifti1Image
        )
        header = kind.header_class()
        for key in GEOMETRY:  # and nothing else: other fields may name the patient
            header[key] = self.file.header[key]
        header.set_data_dtype(np.uint8)
        self.nib.save(kind(grid, self.file.affine, header), out / "mask.nii.gz")
        return "mask.nii.gz"


class Dicom:
    """The images of a series, in order of k: files, or frames of one file. frame: a single one of them.
    images: (header, frame) of each."""

    def __init__(self, path: Path, frame: int | None, series: str | None):
        files = [path]
        if path.is_dir():
            files = [
                file
                for file in sorted(path.iterdir())
                if file.suffix.lower() == ".dcm" or is_dicom(file)
            ]
        if not files:
            raise Refused(
                "is a directory without DICOM: give the one that holds the files of a series"
            )
        self.dicom, self.pixels, errors = (
            need("pydicom"),
            need("pydicom.pixels"),
            need("pydicom.errors"),
        )
        self.errors = errors.InvalidDicomError, errors.BytesLengthException
        headers = self.series(files, series)
        with refusing("has a broken header", *self.errors):
            held = [int(header.get("NumberOfFrames") or 1) for header in headers]
            count, self.frames = sum(held), 1  # without --frame all frames are one volume
            if count > MOST_FRAMES:  # before a list of that length is made
                raise Refused(
                    f"claims to have {count:,} frames: {MOST_FRAMES:,} can be read at most"
                )
            self.images = [
                (header, f) for header, frames in zip(headers, held) for f in range(frames)
            ]
            if len(headers) > 1 and (frame is not None or count > len(headers)):
                raise Refused("is a series of files: give one of them to choose a --frame in it")
            if frame is not None:
                self.frames, self.images = count, [self.images[one_of(frame, count, "frames")]]
            self.affine, self.placed = place(*self.images[0])
            problem = self.stack() if len(self.images) > 1 else ""
            if problem and len(headers) > 1:
                raise Refused(f"has {count} images {problem}: give one of its files")
            if problem:
                raise SeveralFrames(f"has {count} images {problem}: give --frame, 0 to {count - 1}")
            first = headers[0]
            self.shape, self.modality = (
                (int(first.Columns), int(first.Rows), len(self.images)),
                first.get("Modality"),
            )
            self.kind = first.get("PhotometricInterpretation")
        self.inverted = self.kind == "MONOCHROME1"

    def series(self, files: list[Path], wanted: str | None) -> list:
        """The headers of one series."""
        found = {}
        for file in files:
            if not is_dicom(file):
                raise Refused(
                    f"is not DICOM, or holds what is not: {file.name} does not begin as DICOM files do"
                )
            with refusing(f"{file.name} is not DICOM", *self.errors):
                header = self.dicom.dcmread(file, stop_before_pixels=True)
                if header.get("Rows") and header.get("Columns"):
                    found.setdefault(str(header.get("SeriesInstanceUID", "")), []).append(header)
        if not found:
            raise Refused("is DICOM without an image: give another file or folder")
        chosen = [uid for uid in found if uid.endswith(wanted or "")]
        if len(chosen) != 1:
            names = "; ".join(
                f"{uid} ({h[0].get('Modality')}, {len(h)} files)" for uid, h in found.items()
            )
            count = f"{len(chosen)} series" + (f" that end in {wanted}" if wanted else "")
            raise Refused(f"has {count}: give --series with one of {shorten(names, 400)}")
        return found[chosen[0]]

    def stack(self) -> str:
        """Sort the images along their normal, and let their positions make the affine. -> why they are no volume."""
        places = [place(*image) for image in self.images]
        turned = [np.abs(p[:3, :3] - self.affine[:3, :3]).max() for p, _ in places]
        if (
            not all(placed for _, placed in places)
            or len({(h.Rows, h.Columns) for h, _ in self.images}) > 1
            or max(turned) > 1e-3 * np.abs(self.affine[:3, :3]).max()
        ):
            return "without positions, or of several sizes or directions"
        normal = self.affine[:3, 2] / np.linalg.norm(self.affine[:3, 2])
        depth = [p[:3, 3] @ normal for p, _ in places]
        order = np.argsort(depth)
        gaps = np.diff(np.sort(depth))
        if not gaps.min() > 1e-3 or np.ptp(gaps) > UNEVEN * gaps.mean():
            return f"{gaps.min():.2f} to {gaps.max():.2f} mm apart, which are no volume"
        first, last = places[order[0]][0], places[order[-1]][0]
        self.images, self.affine = [self.images[i] for i in order], first.copy()
        self.affine[:3, 2] = (last - first)[:3, 3] / gaps.size
        return ""

    def read(self, axis: int, n: int) -> np.ndarray:
        """Float64, the other two axes in order; uint8 with RGB as a third."""
        if axis == 2:
            return self.decode(n)
        return np.stack([self.decode(k).take(n, axis) for k in range(self.shape[2])], axis=1)

    def decode(self, k: int) -> np.ndarray:
        """(columns, rows) after the modality LUT, or (columns, rows, 3)."""
        header, frame = self.images[k]
        file = Path(header.filename)
        with refusing(f"cannot be decoded, in {file.name}", *self.errors):
            values, bits = self.pixels.pixel_array(file, index=frame), header.get("BitsStored", 8)
            if self.kind == "PALETTE COLOR":
                values = self.pixels.apply_color_lut(values, header)
                bits = 8 * values.itemsize
            if values.ndim == 3:
                return np.uint8(values[..., :3] / (2**bits - 1) * 255 + 0.5).swapaxes(0, 1)
            if "ModalityLUTSequence" in header:
                return np.float64(self.pixels.apply_modality_lut(values, header)).T
            slope, intercept = (
                tag(header, frame, "RescaleSlope", 1),
                tag(header, frame, "RescaleIntercept", 0),
            )
            return (values * float(slope) + float(intercept)).T

    def own_window(self, k: int) -> tuple[float, float] | None:
        """(level, width), the first where the image has several."""
        with refusing("has a broken window", *self.errors):
            level, width = (
                np.ravel(tag(*self.images[k], name, ())) for name in ("WindowCenter", "WindowWidth")
            )
            return (float(level[0]), float(width[0])) if len(level) and len(width) else None

    def write(self, grid: np.ndarray, out: Path) -> str:
        """mask.dcm, a DICOM SEG of the images that grid marks. Where none can be made, a line that says why."""
        try:
            import highdicom as hd
            from pydicom.sr.codedict import codes
        except ImportError:
            return "none: a DICOM SEG needs the package highdicom: pip install -r requirements-extras.txt"
        masks, (headers, frames) = grid.transpose(2, 1, 0), zip(*self.images)
        try:
            if headers[0].get("NumberOfFrames", 1) > 1:  # a SEG refers to all of a file's frames
                marked, pixels = (
                    headers[:1],
                    np.zeros((int(headers[0].NumberOfFrames), *masks.shape[1:]), np.uint8),
                )
                pixels[list(frames)] = masks
            else:
                kept = np.flatnonzero(masks.any(axis=(1, 2))) if masks.any() else [0]
                marked, pixels = [headers[k] for k in kept], masks[kept]
            how = hd.AlgorithmIdentificationSequence(
                "MedReasoner", codes.DCM.ArtificialIntelligence, "1"
            )
            what = codes.SCT.AnatomicalStructure
            part = hd.seg.SegmentDescription(
                1, "answer", what, what, hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC, how
            )
            made = hd.seg.Segmentation(
                marked,
                pixels,
                hd.seg.SegmentationTypeValues.BINARY,
                [part],
                hd.UID(),
                1,
                hd.UID(),
                1,
                "MedReasoner",
                "reference implementation",
                "1",
                "0",
            )
        except (*UNREADABLE, *self.errors) as error:
            return f"none: no DICOM SEG can refer to this file ({shorten(str(error), 200)})"
        for element in [*made]:
            if of_the_patient(element):
                del made[element.tag]
        made.save_as(out / "mask.dcm")
        return "mask.dcm"


def of_the_patient(element) -> bool:
    """Whether an element of a DICOM SEG, which highdicom copies from the images, says something of patient or study
    that the standard does not require there: age, history, other numbers, physicians, descriptions."""
    group, name = element.tag.group, element.keyword
    return name not in REQUIRED and (
        group in (0x10, 0x32, 0x38)
        or group in (0x08, 0x12, 0x40)
        and bool(
            re.search(
                "Physician|Study|Patient(?!Identity)|Procedure|Diagnos|Accession|ClinicalTrial",
                name,
            )
        )
    )


def is_dicom(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def tag(header, frame: int, name: str, default=None):
    """An attribute of one frame: the file's own, else that of the frame's functional groups, else the shared one."""
    if header.get(name) is not None:
        return header.get(name)
    for groups, at in (
        (header.get("PerFrameFunctionalGroupsSequence"), frame),
        (header.get("SharedFunctionalGroupsSequence"), 0),
    ):
        for element in groups[at] if groups and at < len(groups) else ():
            if element.VR == "SQ" and element.value and element.value[0].get(name) is not None:
                return element.value[0].get(name)
    return default


def place(header, frame: int) -> tuple[np.ndarray, bool]:
    """(4, 4) from (column, row, 0) of a frame to LPS, and True; the identity but for spacing where it is unknown."""
    down, right = np.float64(
        tag(header, frame, "PixelSpacing")
        or header.get("ImagerPixelSpacing")
        or header.get("PixelAspectRatio")
        or (1, 1)
    )
    turn, origin = (
        tag(header, frame, f"Image{name}Patient") for name in ("Orientation", "Position")
    )
    placed = bool(turn and origin)
    x, y = np.float64(turn if placed else (1, 0, 0, 0, 1, 0)).reshape(2, 3)
    affine = np.eye(4)
    affine[:3] = np.stack(
        [
            x * right,
            y * down,
            np.cross(x, y) * float(tag(header, frame, "SliceThickness") or 1),
            np.float64(origin if placed else (0, 0, 0)),
        ],
        axis=1,
    )
    return affine, placed


def one_of(frame: int | None, count: int, what: str) -> int:
    """--frame where there are so many; it must be given where there are several."""
    if frame is None and count == 1:
        return 0
    if not isinstance(frame, int) or not 0 <= frame < count:
        raise (SeveralFrames if frame is None else Refused)(
            f"has {count} {what}: give --frame, 0 to {count - 1}"
        )
    return frame


def need(package: str):
    try:
        return import_module(package)
    except ImportError:
        raise Refused(
            f"needs the package {package.split('.')[0]}: pip install -r requirements-extras.txt"
        ) from None


@contextmanager
def refusing(problem: str, *errors: type[Exception]):
    """What a reader raises for a broken file becomes one line."""
    try:
        yield
    except Refused:
        raise
    except (*UNREADABLE, *errors) as error:
        raise Refused(
            f"{problem}, or broken ({shorten(str(error) or type(error).__name__, 300)})"
        ) from None
