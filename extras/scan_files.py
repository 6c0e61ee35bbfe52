"""Readers of DICOM and NIfTI: a grid of voxels, and where it lies in the patient.

Nifti and Dicom have the same attributes and methods.
  shape     Size of the grid. Its indices (i, j, k) are the axes of NIfTI's array, and in DICOM the
            column, the row and the image.
  affine    (4, 4), from (i, j, k, 1) to millimetres in LPS: x leads to the patient's left, y to the
            back, z to the head.
  placed    Whether the file says where it lies. If it does not, the affine is a guess, and only
            what is shown depends on it.
  frames    How many frames or volumes there are to choose one from.
  inverted  Whether large values are dark.
  read(axis, number)     The values of one slice across an axis, and which of them are padding.
  own_window(k)          The (level, width) that the file gives for image k, or None.
  in_hounsfield(k)       Whether the values of image k are known to be Hounsfield units.
  write(grid, folder)    Writes a mask on the grid. Returns the name of the file.
pydicom, nibabel and highdicom (requirements-extras.txt) are imported here and nowhere else.
"""

import math
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

import numpy as np

MOST_FRAMES = 100_000
UNEVEN = 0.05  # Images are a volume if their distances differ by less than this share.

# The fields of a NIfTI header that say where the grid lies.
GEOMETRY = (
    "pixdim",
    "qform_code",
    "sform_code",
    "quatern_b",
    "quatern_c",
    "quatern_d",
    "qoffset_x",
    "qoffset_y",
    "qoffset_z",
    "srow_x",
    "srow_y",
    "srow_z",
    "xyzt_units",
)
MILLIMETRES = {"meter": 1000, "micron": 0.001}  # In one of NIfTI's other units of length.

# What the standard requires a DICOM SEG to say of patient and study.
REQUIRED = (
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
)
PATIENT_GROUPS = (0x10, 0x32, 0x38)  # Everything in them is about patient, study or visit.
MIXED_GROUPS = (0x08, 0x12, 0x40)  # Some of their attributes are.
PATIENT_WORDS = "Physician|Study|Patient(?!Identity)|Procedure|Diagnos|Accession|ClinicalTrial"

# What the packages raise for files that are broken.
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

Header = Any  # A pydicom.Dataset. The package is imported only when a DICOM file is read.


class ScanError(ValueError):
    """A scan that cannot be used. The text is one line: what is wrong, and what to give instead."""


class SeveralFrames(ScanError):
    """A scan with several frames or volumes, of which none was chosen."""


# ---------------------------------------------------------------- NIfTI


class Nifti:
    """One volume of a NIfTI file. `frame` says which, where there are several."""

    inverted = False

    def __init__(self, path: Path, frame: int | None, series: str | None) -> None:
        self.nibabel = import_package("nibabel")
        self.errors = (
            self.nibabel.filebasedimages.ImageFileError,
            self.nibabel.spatialimages.HeaderDataError,
        )
        if series:
            raise ScanError("is NIfTI, which has no series: leave out --series")
        with one_line_errors("is not NIfTI", *self.errors):
            self.file = self.nibabel.load(path)
            self._check_kind()
            header = self.file.header
            unit = MILLIMETRES.get(header.get_xyzt_units()[0], 1)
            from_ras = np.diag([-unit, -unit, unit, 1])  # NIfTI's x leads right, its y to the front
            self.affine = from_ras @ self.file.affine
            self.placed = bool(header["qform_code"] > 0 or header["sform_code"] > 0)
        self.shape = self.file.shape[:3]
        volumes = self.file.shape[3:]
        self.frames = math.prod(volumes)
        chosen = choose_frame(frame, self.frames, "volumes")
        self.volume = [int(n) for n in np.unravel_index(chosen, volumes, order="F")]

    def _check_kind(self) -> None:
        shape = self.file.shape
        is_nifti = isinstance(self.file, self.nibabel.Nifti1Pair)
        if not is_nifti or len(shape) < 3 or min(shape) < 1:
            raise ScanError(f"has the shape {shape}: a NIfTI volume with three axes is needed")
        if self.file.header.get_data_dtype().kind not in "iuf":
            raise ScanError("has colour or complex voxels: one real number per voxel is needed")

    def read(self, axis: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The values of a slice (float64, the other two axes in order), and which are padding."""
        index = [slice(None), slice(None), slice(None)]
        index[axis] = number
        with one_line_errors("is truncated", *self.errors):
            values = np.asarray(self.file.dataobj[(*index, *self.volume)], np.float64)
        return values, np.zeros(values.shape, bool)  # NIfTI has no padding

    def own_window(self, k: int) -> None:
        """NIfTI does not say how its values are shown."""

    def in_hounsfield(self, k: int) -> bool:
        """NIfTI does not say what its values measure."""
        return False

    def write(self, grid: np.ndarray, folder: Path) -> str:
        """Write `grid` (uint8) with the geometry of the scan as mask.nii.gz. Returns that name."""
        kind = self.nibabel.Nifti1Image
        if isinstance(self.file, self.nibabel.Nifti2Image):
            kind = self.nibabel.Nifti2Image
        header = kind.header_class()
        for key in GEOMETRY:  # and no other field, because another may name the patient
            header[key] = self.file.header[key]
        header.set_data_dtype(np.uint8)
        self.nibabel.save(kind(grid, self.file.affine, header), folder / "mask.nii.gz")
        return "mask.nii.gz"


# ---------------------------------------------------------------- DICOM


class Dicom:
    """The images of one DICOM series: several files, or the frames of one file.

    `frame` chooses a single frame. images is [(header, number of the frame in its file)], sorted
    along the images' normal: images[k] has the index k of the grid.
    """

    def __init__(self, path: Path, frame: int | None, series: str | None) -> None:
        files = dicom_files(path)
        self.pydicom = import_package("pydicom")
        self.pixels = import_package("pydicom.pixels")
        errors = import_package("pydicom.errors")
        self.errors = (errors.InvalidDicomError, errors.BytesLengthException)
        headers = choose_series(self._read_headers(files), series)
        with one_line_errors("has a broken header", *self.errors):
            self.images, self.frames = choose_images(headers, frame)
            self.affine, self.placed = place(*self.images[0])
            if len(self.images) > 1:
                self._stack(several_files=len(headers) > 1)
            first = headers[0]
            self.shape = (int(first.Columns), int(first.Rows), len(self.images))
            self.colours = first.get("PhotometricInterpretation")
        self.inverted = self.colours == "MONOCHROME1"

    def _read_headers(self, files: list[Path]) -> dict[str, list[Header]]:
        """The headers of the files that have an image, by the UID of their series."""
        found = {}
        for file in files:
            if not is_dicom(file):
                raise ScanError(
                    f"is not DICOM, or has other files in it: {file.name} does not begin as "
                    "DICOM files do"
                )
            with one_line_errors(f"{file.name} is not DICOM", *self.errors):
                header = self.pydicom.dcmread(file, stop_before_pixels=True)
                if header.get("Rows") and header.get("Columns"):
                    uid = str(header.get("SeriesInstanceUID", ""))
                    found.setdefault(uid, []).append(header)
        return found

    def _stack(self, several_files: bool) -> None:
        """Sort the images along their normal. Their positions give the third column of the affine.

        ScanError if the images are not a volume. It is SeveralFrames for the frames of one file,
        because one of them can be chosen.
        """
        places = [place(*image) for image in self.images]
        problem = self._problem_of_volume(places)
        if problem:
            count = len(self.images)
            if several_files:
                raise ScanError(f"has {count} images {problem}: give one of its files")
            raise SeveralFrames(f"has {count} images {problem}: give --frame, 0 to {count - 1}")
        order = np.argsort(self._depths(places))
        first_affine, _ = places[order[0]]
        last_affine, _ = places[order[-1]]
        self.images = [self.images[at] for at in order]
        self.affine = first_affine.copy()
        self.affine[:3, 2] = (last_affine - first_affine)[:3, 3] / (len(order) - 1)

    def _problem_of_volume(self, places: list[tuple[np.ndarray, bool]]) -> str:
        """Why images at these places are not a volume, "" if they are."""
        affines = [affine for affine, _ in places]
        turned = [np.abs(affine[:3, :3] - self.affine[:3, :3]).max() for affine in affines]
        sizes = {(header.Rows, header.Columns) for header, _ in self.images}
        if (
            not all(placed for _, placed in places)
            or len(sizes) > 1
            or max(turned) > 1e-3 * np.abs(self.affine[:3, :3]).max()
        ):
            return "without positions, or of several sizes or directions"
        gaps = np.diff(np.sort(self._depths(places)))
        is_even = gaps.min() > 1e-3 and np.ptp(gaps) <= UNEVEN * gaps.mean()
        if not is_even:
            return f"{gaps.min():.2f} to {gaps.max():.2f} mm apart, which are no volume"
        return ""

    def _depths(self, places: list[tuple[np.ndarray, bool]]) -> list[float]:
        """How far along the normal of the first image each image lies, in millimetres."""
        normal = self.affine[:3, 2] / np.linalg.norm(self.affine[:3, 2])
        return [affine[:3, 3] @ normal for affine, _ in places]

    def read(self, axis: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The values of a slice, the other two axes in order, and which of them are padding.

        Values are float64, or uint8 with RGB as a third axis.
        """
        if axis == 2:
            return self._decode(number)
        lines = []
        padded_lines = []
        for k in range(self.shape[2]):
            values, is_padding = self._decode(k)
            lines.append(values.take(number, axis))
            padded_lines.append(is_padding.take(number, axis))
        return np.stack(lines, axis=1), np.stack(padded_lines, axis=1)

    def _decode(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The values of image k after the modality LUT, and which of them are padding.

        (columns, rows) float64, or (columns, rows, 3) uint8 of a colour image.
        """
        header, frame = self.images[k]
        file = Path(header.filename)
        with one_line_errors(f"cannot be decoded, in {file.name}", *self.errors):
            stored = self.pixels.pixel_array(file, index=frame)
            bits = header.get("BitsStored", 8)
            if self.colours == "PALETTE COLOR":
                stored = self.pixels.apply_color_lut(stored, header)
                bits = 8 * stored.itemsize
            if stored.ndim == 3:
                values = np.uint8(stored[..., :3] / (2**bits - 1) * 255 + 0.5)
                return values.swapaxes(0, 1), np.zeros(values.shape[1::-1], bool)
            return self._after_modality_lut(stored, header, frame).T, find_padding(stored, header).T

    def _after_modality_lut(self, stored: np.ndarray, header: Header, frame: int) -> np.ndarray:
        if "ModalityLUTSequence" in header:
            return np.float64(self.pixels.apply_modality_lut(stored, header))
        slope = float(tag(header, frame, "RescaleSlope", 1))
        intercept = float(tag(header, frame, "RescaleIntercept", 0))
        return stored * slope + intercept

    def own_window(self, k: int) -> tuple[float, float] | None:
        """(level, width) of image k, the first where it has several."""
        header, frame = self.images[k]
        with one_line_errors("has a broken window", *self.errors):
            levels = np.ravel(tag(header, frame, "WindowCenter", ()))
            widths = np.ravel(tag(header, frame, "WindowWidth", ()))
            if levels.size == 0 or widths.size == 0:
                return None
            return float(levels[0]), float(widths[0])

    def in_hounsfield(self, k: int) -> bool:
        """Whether image k is a CT that says how its stored values become Hounsfield units.

        A CT without rescale (made from a picture, or stripped by an anonymizer) has values of an
        unknown scale, and so has one whose RescaleType is another (DICOM PS3.3 C.11.1.1.2).
        """
        header, frame = self.images[k]
        with one_line_errors("has a broken rescale", *self.errors):
            if header.get("Modality") != "CT":
                return False
            if "ModalityLUTSequence" in header:
                return header.ModalityLUTSequence[0].get("ModalityLUTType") == "HU"
            slope = tag(header, frame, "RescaleSlope")
            intercept = tag(header, frame, "RescaleIntercept")
            if slope is None or intercept is None:
                return False
            unit = tag(header, frame, "RescaleType") or "HU"  # a plain CT may leave it out
            return unit == "HU"

    def write(self, grid: np.ndarray, folder: Path) -> str:
        """Write mask.dcm, a DICOM SEG of the images that `grid` marks. Returns that name.

        Where no SEG can be made, returns a line that begins with "none" and says why.
        """
        try:
            import highdicom
            from pydicom.sr.codedict import codes
        except ImportError:
            return (
                "none: a DICOM SEG needs the package highdicom: "
                "pip install -r requirements-extras.txt"
            )
        try:
            made = self._make_seg(grid, highdicom, codes)
        except (*UNREADABLE, *self.errors) as error:
            return f"none: no DICOM SEG can refer to this file ({shorten(str(error), 200)})"
        for element in list(made):
            if is_about_the_patient(element):
                del made[element.tag]
        made.save_as(folder / "mask.dcm")
        return "mask.dcm"

    def _make_seg(self, grid: np.ndarray, highdicom: ModuleType, codes: Any) -> Header:
        headers, masks = self._marked_images(grid)
        algorithm = highdicom.AlgorithmIdentificationSequence(
            "MedReasoner", codes.DCM.ArtificialIntelligence, "1"
        )
        structure = codes.SCT.AnatomicalStructure
        segment = highdicom.seg.SegmentDescription(
            segment_number=1,
            segment_label="answer",
            segmented_property_category=structure,
            segmented_property_type=structure,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        return highdicom.seg.Segmentation(
            source_images=headers,
            pixel_array=masks,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[segment],
            series_instance_uid=highdicom.UID(),
            series_number=1,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="MedReasoner",
            manufacturer_model_name="reference implementation",
            software_versions="1",
            device_serial_number="0",
        )

    def _marked_images(self, grid: np.ndarray) -> tuple[list[Header], np.ndarray]:
        """The headers that a SEG refers to, and its masks (images, rows, columns)."""
        masks = grid.transpose(2, 1, 0)
        first, _ = self.images[0]
        if first.get("NumberOfFrames", 1) > 1:  # a SEG refers to all frames of such a file
            every_frame = np.zeros((int(first.NumberOfFrames), *masks.shape[1:]), np.uint8)
            every_frame[[frame for _, frame in self.images]] = masks
            return [first], every_frame
        marked = np.flatnonzero(masks.any(axis=(1, 2)))
        if marked.size == 0:
            marked = np.array([0])
        headers = [self.images[k][0] for k in marked]
        return headers, masks[marked]


def dicom_files(path: Path) -> list[Path]:
    """The file itself, or the DICOM files in a folder. ScanError if the folder has none."""
    if not path.is_dir():
        return [path]
    files = [
        file for file in sorted(path.iterdir()) if file.suffix.lower() == ".dcm" or is_dicom(file)
    ]
    if not files:
        raise ScanError(
            "is a directory without DICOM: give the one that holds the files of a series"
        )
    return files


def is_dicom(file: Path) -> bool:
    """Whether this is a file that begins as DICOM files do."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def choose_series(found: dict[str, list[Header]], wanted: str | None) -> list[Header]:
    """The headers of the one series in {UID: headers} whose UID ends in `wanted`."""
    if not found:
        raise ScanError("is DICOM without an image: give another file or folder")
    chosen = [uid for uid in found if uid.endswith(wanted or "")]
    if len(chosen) == 1:
        return found[chosen[0]]
    names = [
        f"{uid} ({headers[0].get('Modality')}, {len(headers)} files)"
        for uid, headers in found.items()
    ]
    count = f"{len(chosen)} series"
    if wanted:
        count += f" that end in {wanted}"
    raise ScanError(f"has {count}: give --series with one of {shorten('; '.join(names), 400)}")


def choose_images(headers: list[Header], frame: int | None) -> tuple[list[tuple[Header, int]], int]:
    """[(header, frame)] of all frames, or of the chosen one, and how many there are to choose from.

    Without a chosen frame, all frames of a file are one volume, and there is nothing to choose.
    """
    counts = [int(header.get("NumberOfFrames") or 1) for header in headers]
    count = sum(counts)
    if count > MOST_FRAMES:  # said before a list of that length takes all memory
        raise ScanError(f"claims to have {count:,} frames: {MOST_FRAMES:,} can be read at most")
    if len(headers) > 1 and (frame is not None or count > len(headers)):
        raise ScanError("is a series of files: give one of them to choose a --frame in it")
    images = []
    for header, frames in zip(headers, counts):
        images += [(header, number) for number in range(frames)]
    if frame is None:
        return images, 1
    return [images[choose_frame(frame, count, "frames")]], count


def tag(header: Header, frame: int, name: str, default: Any = None) -> Any:
    """An attribute of one frame.

    The file's own comes first, then that of the frame's functional groups, then the shared one.
    """
    value = header.get(name)
    if value is not None:
        return value
    per_frame = header.get("PerFrameFunctionalGroupsSequence") or ()
    shared = header.get("SharedFunctionalGroupsSequence") or ()
    for groups in (*per_frame[frame : frame + 1], *shared[:1]):
        for element in groups:
            if element.VR != "SQ" or not element.value:
                continue
            value = element.value[0].get(name)
            if value is not None:
                return value
    return default


def place(header: Header, frame: int) -> tuple[np.ndarray, bool]:
    """(4, 4) from (column, row, 0) of a frame to LPS, and whether the file says where that is.

    Where it does not, the affine has only the spacing. The formula is in DICOM PS3.3 C.7.6.2.1.1.
    """
    spacing = (
        tag(header, frame, "PixelSpacing")
        or header.get("ImagerPixelSpacing")
        or header.get("PixelAspectRatio")
        or (1, 1)
    )
    down, right = np.float64(spacing)
    orientation = tag(header, frame, "ImageOrientationPatient")
    position = tag(header, frame, "ImagePositionPatient")
    placed = bool(orientation and position)
    if not placed:
        orientation = (1, 0, 0, 0, 1, 0)
        position = (0, 0, 0)
    along_row, along_column = np.float64(orientation).reshape(2, 3)
    thickness = float(tag(header, frame, "SliceThickness") or 1)
    affine = np.eye(4)
    affine[:3, 0] = along_row * right
    affine[:3, 1] = along_column * down
    affine[:3, 2] = np.cross(along_row, along_column) * thickness
    affine[:3, 3] = np.float64(position)
    return affine, placed


def find_padding(stored: np.ndarray, header: Header) -> np.ndarray:
    """Where the stored values are padding, which fills an image outside what was acquired (bool).

    PixelPaddingValue is one value, or with PixelPaddingRangeLimit one end of a range (DICOM PS3.3
    C.7.5.1.1.2). Both have the type of the pixels. Some writers give them the other sign (63536 for
    -2000), and the cast undoes that.
    """
    value = header.get("PixelPaddingValue")
    limit = header.get("PixelPaddingRangeLimit")
    if not isinstance(value, int) or stored.dtype.kind not in "iu":
        return np.zeros(stored.shape, bool)
    if not isinstance(limit, int):
        limit = value
    ends = np.array([value, limit], np.int64).astype(stored.dtype)
    return (stored >= ends.min()) & (stored <= ends.max())


def is_about_the_patient(element: Any) -> bool:
    """Whether an element of a DICOM SEG says more of patient or study than the standard requires.

    highdicom copies such elements from the images: age, history, other numbers, physicians,
    descriptions.
    """
    if element.keyword in REQUIRED:
        return False
    if element.tag.group in PATIENT_GROUPS:
        return True
    if element.tag.group in MIXED_GROUPS:
        return re.search(PATIENT_WORDS, element.keyword) is not None
    return False


# ---------------------------------------------------------------- both


def choose_frame(frame: int | None, count: int, what: str) -> int:
    """The chosen one of `count` frames or volumes. One must be chosen where there are several."""
    if frame is None and count == 1:
        return 0
    line = f"has {count} {what}: give --frame, 0 to {count - 1}"
    if frame is None:
        raise SeveralFrames(line)
    if not isinstance(frame, int) or not 0 <= frame < count:
        raise ScanError(line)
    return frame


def import_package(name: str) -> ModuleType:
    """The module of that name. ScanError says what to install."""
    try:
        return import_module(name)
    except ImportError:
        package = name.split(".")[0]
        raise ScanError(
            f"needs the package {package}: pip install -r requirements-extras.txt"
        ) from None


@contextmanager
def one_line_errors(problem: str, *errors: type[Exception]) -> Iterator[None]:
    """Make a ScanError of one line from what a reader raises for a broken file."""
    try:
        yield
    except ScanError:
        raise
    except (*UNREADABLE, *errors) as error:
        reason = shorten(str(error) or type(error).__name__, 300)
        raise ScanError(f"{problem}, or broken ({reason})") from None
