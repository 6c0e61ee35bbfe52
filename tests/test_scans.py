"""DICOM and NIfTI: what is seen, what is written on the scan's grid, which input is an error.

The files are those inside the packages pydicom and nibabel, and some that are made here. nibabel's
own reorientation and DICOM's formula are the oracles.
"""

import gzip
import io
import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from PIL import Image
from test_hostile import FEW, SEEDS, changed

import infer
from crm import Group, load_crm
from data import EMBEDDED, BadRow, load_samples
from extras import scans
from extras.scan_files import ScanError, SeveralFrames
from extras.scans import PLANES, ScanConfig, View, find_window, read_png, read_view, slice_number
from runtime.cli import parse_args

nib = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

NIFTI = Path(nib.__file__).parent / "tests/data"
DICOM = Path(pydicom.__file__).parent / "data/test_files"
CT5N = DICOM / "dicomdirtests/98892001/CT5N"
SHAPE = (20, 24, 17)  # columns, rows, images of the series made here
AXIAL = (1, 0, 0, 0, 1, 0)  # image orientations
CORONAL = (1, 0, 0, 0, 0, -1)
SAGITTAL = (0, 1, 0, 0, 0, -1)
ORIGIN = (-30, 40, 5)


def view_of(path, **choice) -> View:
    return read_view(path, ScanConfig(**choice))


def orientation_of(affine) -> np.ndarray:
    return nib.io_orientation(affine)


def reoriented(image, codes: str):
    """A volume by nibabel with its axes in another order, at the same positions."""
    wanted = nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(
        nib.orientations.ornt_transform(orientation_of(image.affine), wanted)
    )


def shown(volume: np.ndarray, plane: str, n: int) -> np.ndarray:
    """(rows, columns) of a slice of an LPS volume, a view: right on the left, front or head up."""
    head_up = volume[:, :, ::-1]
    if plane == "axial":
        return volume[:, :, n].T
    if plane == "coronal":
        return head_up[:, n].T
    return head_up[n].T


def resized(drawn: np.ndarray, view: View) -> np.ndarray:
    """A mask on the voxels of a slice as a mask in its image frame."""
    picture = Image.fromarray(drawn).resize(view.image.size, Image.Resampling.NEAREST)
    return np.asarray(picture)


def everywhere(view: View) -> np.ndarray:
    return np.ones(view.image.size[::-1], bool)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Five NIfTI files of several orders of axes: {name: (path, frame, the volume by nibabel)}."""
    folder = tmp_path_factory.mktemp("nifti")
    brain = nib.load(NIFTI / "example4d.nii.gz")  # oblique, LAS, 2 x 2 x 2.2 mm
    one = nib.Nifti1Image(np.asarray(brain.dataobj[..., 1]), brain.affine, brain.header)
    turned = reoriented(one, "PIR")
    thick = nib.Nifti1Image(
        one.get_fdata().astype(np.float32)[::2, :, ::-1], one.affine @ np.diag([2, 1, -1, 1])
    )
    nib.save(nib.Nifti2Image(turned.dataobj, turned.affine), folder / "turned.nii")
    nib.save(thick, folder / "thick.nii.gz")
    files = [
        (NIFTI / "example4d.nii.gz", 1),
        (NIFTI / "anatomical.nii", None),
        (NIFTI / "reoriented_anat_moved.nii", None),
        (folder / "turned.nii", None),
        (folder / "thick.nii.gz", None),
    ]
    found = {}
    for path, frame in files:
        image = nib.load(path)
        data = np.asarray(image.dataobj)
        if frame is not None:
            data = data[..., frame]
        found[path.name] = path, frame, nib.Nifti1Image(data, image.affine)
    return found


NAMES = (
    "example4d.nii.gz",
    "anatomical.nii",
    "turned.nii",
    "reoriented_anat_moved.nii",
    "thick.nii.gz",
)


def write_series(
    folder: Path, turn=AXIAL, origin=ORIGIN, step=2.5, spacing=(0.8, 0.8), seed=0, **tags
) -> tuple[Path, np.ndarray]:
    """A CT series: its folder, and its random Hounsfield units (columns, rows, images)."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(-1000, 1000, SHAPE)
    uid = pydicom.uid.generate_uid()
    normal = np.cross(turn[:3], turn[3:])
    names = np.random.default_rng(1).permutation(SHAPE[2])  # files are not in order
    for k, name in enumerate(names):
        ds = pydicom.dcmread(DICOM / "CT_small.dcm")
        ds.Columns, ds.Rows, _ = SHAPE
        ds.RescaleIntercept = -1024
        ds.RescaleSlope = 1
        ds.SeriesInstanceUID = uid
        ds.SOPInstanceUID = pydicom.uid.generate_uid()
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.ImageOrientationPatient = list(turn)
        ds.PixelSpacing = list(spacing)
        ds.ImagePositionPatient = [f"{v:.6f}" for v in origin + normal * step * k]
        ds.PixelData = np.int16(values[:, :, k].T + 1024).tobytes()
        for key, value in tags.items():
            setattr(ds, key, value)
        ds.save_as(folder / f"IM{name:04}")
    return folder, values


def series_affine(turn=AXIAL) -> np.ndarray:
    """The affine, in NIfTI's RAS, of what write_series makes."""
    columns = [
        np.array(turn[:3]) * 0.8,
        np.array(turn[3:]) * 0.8,
        np.cross(turn[:3], turn[3:]) * 2.5,
        ORIGIN,
    ]
    return np.diag([-1, -1, 1, 1]) @ np.vstack([np.stack(columns, axis=1), (0, 0, 0, 1)])


def write_image(path: Path, stored: np.ndarray, modality="MR", **tags) -> Path:
    """One DICOM file with these stored values (rows, columns), int16 or uint16, and these tags."""
    ds = pydicom.dcmread(DICOM / "CT_small.dcm")
    for key in ("RescaleSlope", "RescaleIntercept", "PixelPaddingValue"):
        if key in ds:
            delattr(ds, key)
    ds.Modality = modality
    ds.Rows, ds.Columns = stored.shape
    ds.PixelRepresentation = int(stored.dtype == np.int16)
    ds.PixelData = stored.tobytes()
    for key, value in tags.items():
        if key.startswith("PixelPadding"):
            ds.add_new(key, "SS" if ds.PixelRepresentation else "US", value)
        else:
            setattr(ds, key, value)
    ds.save_as(path)
    return path


# ---------------------------------------------------------------- what is seen


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", NAMES)
def test_nifti_is_shown_as_nibabel_reorients_it(volumes, name, plane):
    path, frame, image = volumes[name]
    view = view_of(path, plane=plane, frame=frame, slice="9")
    wanted = reoriented(image, "LPS")
    assert np.array_equal(view.values, shown(wanted.get_fdata(), plane, 9))
    zooms = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[plane]
    across, down = np.array(wanted.header.get_zooms())[list(zooms)] * view.values.shape[::-1]
    assert view.image.width / view.image.height == pytest.approx(across / down, rel=0.04)


def test_a_marked_voxel_of_an_oblique_las_volume_appears_where_it_lies(tmp_path):
    brain = nib.load(NIFTI / "example4d.nii.gz")
    assert nib.aff2axcodes(brain.affine) == ("L", "A", "S")
    assert abs(brain.affine[1, 2]) > 0.1
    data = np.zeros(brain.shape[:3], np.int16)
    data[100:103, 80:83, 20:23] = 1  # far left, front, high
    nib.save(nib.Nifti1Image(data, brain.affine), tmp_path / "a.nii")

    def centre(plane, n):
        grey = np.asarray(view_of(tmp_path / "a.nii", plane=plane, slice=n).image.convert("L"))
        rows, columns = np.nonzero(grey > 127)
        return columns.mean(), rows.mean()

    assert centre("axial", 21) == (101, 96 - 1 - 81)  # the left on the right, the front up
    x, y = centre("sagittal", 101)
    assert x == 96 - 1 - 81  # the front on the left
    assert y < 4  # the head up
    left, back, up = brain.affine[:3] @ [101, 81, 21, 1] * (-1, -1, 1)
    view = view_of(tmp_path / "a.nii", slice="21")
    assert view.to_mm(101.5, 14.5) == pytest.approx([left, back, up], abs=2e-3)


@pytest.mark.parametrize(
    "turn, plane",
    [
        (AXIAL, "axial"),
        (SAGITTAL, "sagittal"),
        (CORONAL, "coronal"),
        ((-1, 0, 0, 0, -1, 0), "axial"),
        ((0.96, 0.28, 0, -0.28, 0.96, 0), "axial"),
    ],
)
def test_a_dicom_series_looks_as_the_same_volume_in_nifti(tmp_path, turn, plane):
    folder, values = write_series(tmp_path / "ct", turn)
    image = nib.Nifti1Image(values.astype(np.int16), series_affine(turn))
    nib.save(image, tmp_path / "ct.nii.gz")
    for cut in PLANES:
        choice = {"plane": cut, "slice": "0.3", "window": "lung"}
        one = view_of(folder, **choice)
        two = view_of(tmp_path / "ct.nii.gz", **choice)
        assert np.array_equal(one.image, two.image)
        assert one.number == two.number
        assert one.to_mm(3.5, 7.25) == pytest.approx(two.to_mm(3.5, 7.25), abs=2e-3)
    assert view_of(folder).plane == plane
    assert view_of(folder).window == (40, 400)  # CT without a window of its own


def test_dicom_millimetres_are_those_of_its_formula():
    ds = pydicom.dcmread(DICOM / "CT_small.dcm")
    x = 10 * ds.PixelSpacing[1] + ds.ImagePositionPatient[0]
    y = 20 * ds.PixelSpacing[0] + ds.ImagePositionPatient[1]
    z = ds.ImagePositionPatient[2]
    view = view_of(DICOM / "CT_small.dcm")
    assert view.to_mm(10.5, 20.5) == pytest.approx([x, y, z], abs=2e-3)


def test_windows():
    values = np.array([[-160.0, 40, 240, 1000]])
    assert find_window("soft", values, (7, 9), True) == (40, 400)
    assert find_window("lung", values, (7, 9), True) == (-600, 1500)
    assert find_window("50,10", values, (7, 9), True) == (50, 10)
    assert find_window("auto", values, (7, 9), True) == (7, 9)
    assert find_window("auto", values, (7, 0), True) == (40, 400)
    assert find_window("auto", values, None, False)[1] > 1000
    level, width = find_window("auto", np.arange(1001.0), None, False)
    assert (level, width) == pytest.approx((500, 990))
    assert find_window("auto", np.array([3.0, np.nan]), None, False) == (3, 1)
    grey = np.asarray(view_of(DICOM / "CT_small.dcm", window="40,400").image)[..., 0]
    ds = pydicom.dcmread(DICOM / "CT_small.dcm")
    wanted = np.clip((ds.pixel_array - 1024.0 + 160) / 400, 0, 1) * 255
    assert np.abs(grey - wanted).max() <= 0.5


@pytest.mark.parametrize(
    "text, number",
    [("0", 0), ("9", 9), ("0.5", 5), ("0.0", 0), ("1.0", 9), ("0.99", 9), ("1", 1)],
)
def test_slices_by_number_and_by_fraction(text, number):
    assert slice_number(text, 10) == number


def test_monochrome1_is_inverted_and_12_bits_are_windowed():
    view = view_of(DICOM / "dicomdirtests/77654033/CR1/6154")
    ds = pydicom.dcmread(view.scan.images[0][0].filename)
    assert ds.PhotometricInterpretation == "MONOCHROME1"
    order = view.values.ravel().argsort()
    greys = np.int64(np.asarray(view.image)[..., 0]).ravel()[order]
    assert greys[0] > greys[-1]
    assert (np.diff(greys) <= 0).all()
    assert not view.scan.placed
    assert "unknown orientation" in str(view)


@pytest.mark.parametrize(
    "name, frame",
    [
        ("examples_ybr_color.dcm", 7),
        ("examples_palette.dcm", None),
        ("examples_jpeg2k.dcm", None),
        ("SC_rgb_rle_16bit_2frame.dcm", 1),
        ("SC_ybr_full_422_uncompressed.dcm", None),
    ],
)
def test_colour_is_colour(name, frame):
    image = np.asarray(view_of(DICOM / name, frame=frame).image)
    ds = pydicom.dcmread(DICOM / name)
    raw = pydicom.pixels.pixel_array(ds, index=frame or 0)
    if name == "examples_palette.dcm":
        raw = pydicom.pixels.apply_color_lut(raw, ds)
    assert np.abs(image - raw / np.iinfo(raw.dtype).max * 255).max() <= 0.51
    assert np.ptp(image, axis=-1).max() > 50


@pytest.mark.parametrize(
    "kind", ["_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_padded"]
)
def test_one_picture_in_several_transfer_syntaxes(kind):
    one = view_of(DICOM / "MR_small.dcm").image
    assert np.array_equal(one, view_of(DICOM / f"MR_small{kind}.dcm").image)


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    folder, _ = write_series(tmp_path / "ct", spacing=(1.6, 0.8))
    view = view_of(folder, slice="3")
    assert view.image.size == (20, 48)
    assert view.to_mm(0.5, 47.0) == pytest.approx([-30, 40 + 1.6 * 23, 5 + 3 * 2.5])
    coronal = view_of(folder, plane="coronal").image
    assert coronal.size == (20, round(17 * 2.5 / 0.8))


def write_enhanced(path: Path, values: np.ndarray, order: np.ndarray, **rescale) -> Path:
    """A multi-frame CT of Hounsfield units (columns, rows, images), its frames in another order."""
    ds = pydicom.dcmread(DICOM / "CT_small.dcm")
    ds.Columns, ds.Rows, ds.NumberOfFrames = SHAPE
    ds.PixelData = np.int16(values[:, :, order].T + 1024).tobytes()
    for key in (
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(ds, key)
    orientation = pydicom.Dataset()
    orientation.ImageOrientationPatient = list(AXIAL)
    measures = pydicom.Dataset()
    measures.PixelSpacing = [0.8, 0.8]
    measures.SliceThickness = 2.5
    transformation = pydicom.Dataset()
    transformation.RescaleSlope = 1
    transformation.RescaleIntercept = -1024
    for key, value in rescale.items():
        setattr(transformation, key, value)
    shared = pydicom.Dataset()
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelMeasuresSequence = [measures]
    shared.PixelValueTransformationSequence = [transformation]
    ds.SharedFunctionalGroupsSequence = [shared]
    ds.PerFrameFunctionalGroupsSequence = []
    for k in order:
        position = pydicom.Dataset()
        position.ImagePositionPatient = [-30, 40, 5 + 2.5 * k]
        group = pydicom.Dataset()
        group.PlanePositionSequence = [position]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    ds.save_as(path)
    return path


def test_the_frames_of_an_enhanced_file_are_a_volume(tmp_path):
    folder, values = write_series(tmp_path / "ct")
    order = np.random.default_rng(3).permutation(SHAPE[2])
    file = write_enhanced(tmp_path / "enhanced.dcm", values, order)
    for plane in PLANES:
        one = view_of(folder, plane=plane, slice="5")
        two = view_of(file, plane=plane, slice="5")
        assert np.array_equal(one.image, two.image)
        assert one.to_mm(4, 5) == two.to_mm(4, 5)
    single = view_of(file, frame=2)
    assert np.array_equal(single.values, values[:, :, order[2]].T)


def test_a_view_says_what_shows_the_same_again():
    path = NIFTI / "example4d.nii.gz"
    view = view_of(path, frame=1, plane="coronal", slice="0.3", window="400,800")
    again = read_view(path, view.choice)
    assert view.choice == ScanConfig("28", "coronal", 1, window="400,800")
    assert again.choice == view.choice
    assert view.slices == 96
    assert np.array_equal(view.image, again.image)
    assert not np.array_equal(view.image, view_of(path, frame=0).image)


@pytest.mark.parametrize(
    "path, count", [(NIFTI / "example4d.nii.gz", 2), (DICOM / "examples_ybr_color.dcm", 30)]
)
def test_that_a_frame_must_be_chosen_is_an_error_of_its_own(path, count):
    with pytest.raises(SeveralFrames, match=f"give --frame, 0 to {count - 1}"):
        read_view(path)
    assert view_of(path, frame=0).scan.frames == count
    with pytest.raises(ScanError) as error:
        view_of(path, frame=count)
    assert not isinstance(error.value, SeveralFrames)


def test_every_file_in_the_packages_is_read_or_is_an_error_of_one_line(capfd):
    seen = 0
    lines = []
    for path in [*DICOM.parent.rglob("*"), *NIFTI.rglob("*.nii*")]:
        try:
            seen += read_view(path) is not None
        except ScanError as error:
            lines.append(str(error))
    assert seen > 80
    for line in lines:
        assert len(line.splitlines()) == 1
        assert len(line) < 550
    assert capfd.readouterr() == ("", "")
    for words in (
        "give --frame, 0 to 29",
        "give --frame, 0 to 19",
        "cannot be decoded",
        "without an image",
        "does not begin as DICOM",
        "a side must have",
        "give --series with one of",
    ):
        assert any(words in line for line in lines), words


# ---------------------------------------------------------------- padding and Hounsfield units


def body(dtype=np.int16) -> np.ndarray:
    """(48, 40) stored values from 100 to 1699, in the middle of an image whose edge is padding."""
    values = np.random.default_rng(5).integers(100, 1700, (48, 40)).astype(dtype)
    values[10, 10] = 100
    values[20, 20] = 1699
    return values


def framed(values: np.ndarray, padding) -> tuple[np.ndarray, np.ndarray]:
    """The values with five pixels of padding on each side, and where the padding is."""
    is_padding = np.ones(values.shape, bool)
    is_padding[5:-5, 5:-5] = False
    return np.where(is_padding, padding, values).astype(values.dtype), is_padding


def grey_of(path: Path, **choice) -> np.ndarray:
    return np.asarray(view_of(path, **choice).image)[..., 0]


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "padding, dtype, tags",
    [
        (-2000, np.int16, {"PixelPaddingValue": -2000}),
        (-32768, np.int16, {"PixelPaddingValue": -32768}),
        (32767, np.int16, {"PixelPaddingValue": 32767}),
        (0, np.uint16, {"PixelPaddingValue": 0}),
        (4095, np.uint16, {"PixelPaddingValue": 4095}),
        (65535, np.uint16, {"PixelPaddingValue": 65535}),
        (-1995, np.int16, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1990}),
        (-1995, np.int16, {"PixelPaddingValue": -1990, "PixelPaddingRangeLimit": -2000}),
    ],
)
def test_padding_does_not_count_for_windows_and_is_black(
    tmp_path, padding, dtype, tags, photometric
):
    values = body(dtype)
    stored, is_padding = framed(values, padding)
    file = write_image(tmp_path / "a.dcm", stored, PhotometricInterpretation=photometric, **tags)
    low, high = np.percentile(values[~is_padding], (0.5, 99.5))
    assert view_of(file).window == pytest.approx(((low + high) / 2, high - low))
    for window in ("auto", "900,1000"):
        if window == "900,1000":
            low, high = 400, 1400
        wanted = np.clip((np.float64(values) - low) / (high - low), 0, 1)
        if photometric == "MONOCHROME1":
            wanted = 1 - wanted
        grey = grey_of(file, window=window)
        assert np.abs(grey - 255 * wanted)[~is_padding].max() <= 0.51
        assert (grey[is_padding] == 0).all()


def test_a_padding_value_with_the_wrong_sign_is_understood(tmp_path):
    stored, is_padding = framed(body(), -2000)
    file = write_image(tmp_path / "a.dcm", stored)
    ds = pydicom.dcmread(file)
    ds.add_new("PixelPaddingValue", "US", 63536)
    ds.save_as(file)
    assert np.array_equal(view_of(file).is_padding, is_padding)


@pytest.mark.parametrize("value", [None, [-2000, -1000]])
def test_a_padding_value_that_is_none_pads_nothing(tmp_path, value):
    stored, _ = framed(body(), -2000)
    file = write_image(tmp_path / "a.dcm", stored, PixelPaddingValue=value)
    assert not view_of(file).is_padding.any()
    assert view_of(file).window[1] > 3000


@pytest.mark.parametrize("plane", PLANES)
def test_padding_is_found_in_each_plane_of_a_series(tmp_path, plane):
    folder, values = write_series(tmp_path / "ct", PixelPaddingValue=24, Modality="MR")
    for file in folder.iterdir():  # 24 is what is stored for -1000
        ds = pydicom.dcmread(file)
        stored = ds.pixel_array.copy()
        stored[:9, :7] = 24
        ds.PixelData = stored.tobytes()
        ds.save_as(file)
    values[:7, :9] = -1000
    view = view_of(folder, plane=plane, slice="3")
    assert np.array_equal(view.is_padding, shown(values, plane, 3) == -1000)
    assert np.array_equal(view.values, shown(values, plane, 3))
    if plane != "sagittal":
        assert 0 < view.is_padding.mean() < 0.5
    else:
        assert view.is_padding.any()
    lowest, _ = np.percentile(shown(values, plane, 3)[~view.is_padding], (0.5, 99.5))
    assert view.window[0] - view.window[1] / 2 == pytest.approx(lowest)


def test_a_slice_that_is_all_padding_is_one_line(tmp_path):
    stored = np.full((30, 30), -2000, np.int16)
    file = write_image(tmp_path / "a.dcm", stored, PixelPaddingValue=-2000)
    with pytest.raises(ScanError, match="has no finite value in this slice"):
        read_view(file)


def test_padding_of_a_mask_is_background(tmp_path):
    labels, is_padding = framed(np.ones((48, 40), np.uint16), 7)
    file = write_image(tmp_path / "mask.dcm", labels, PixelPaddingValue=7)
    found = labels_in(read_png(file, {}, True))
    assert np.array_equal(found, ~is_padding)


HOUNSFIELD = {"RescaleSlope": 1, "RescaleIntercept": -1024}


@pytest.mark.parametrize(
    "modality, tags, is_soft",
    [
        ("CT", HOUNSFIELD, True),
        ("CT", HOUNSFIELD | {"RescaleType": "HU"}, True),
        ("CT", HOUNSFIELD | {"RescaleType": ""}, True),
        ("CT", {}, False),
        ("CT", {"RescaleSlope": 1}, False),
        ("CT", HOUNSFIELD | {"RescaleType": "US"}, False),
        ("CT", HOUNSFIELD | {"RescaleType": "Z_EFF"}, False),
        ("MR", HOUNSFIELD, False),
        ("PT", HOUNSFIELD, False),
    ],
)
def test_soft_tissue_is_the_window_of_hounsfield_units_only(tmp_path, modality, tags, is_soft):
    file = write_image(tmp_path / "a.dcm", body(), modality, **tags)
    view = view_of(file)
    assert (view.window == (40, 400)) == is_soft
    if not is_soft:
        low, high = np.percentile(view.values, (0.5, 99.5))
        assert view.window == pytest.approx(((low + high) / 2, high - low))
        assert grey_of(file).std() > 50  # neither black nor white
    assert view_of(file, window="soft").window == (40, 400)


@pytest.mark.parametrize("kind, is_soft", [("HU", True), ("US", False)])
def test_a_modality_lut_says_whether_it_makes_hounsfield_units(tmp_path, kind, is_soft):
    lut = pydicom.Dataset()
    lut.LUTDescriptor = [2048, 0, 16]
    lut.add_new("LUTData", "OW", np.arange(2048, dtype=np.uint16).tobytes())
    lut.ModalityLUTType = kind
    file = write_image(tmp_path / "a.dcm", body(np.uint16), "CT", ModalityLUTSequence=[lut])
    assert (view_of(file).window == (40, 400)) == is_soft


@pytest.mark.parametrize("kind, is_soft", [("HU", True), ("US", False)])
def test_the_unit_of_an_enhanced_ct_is_in_its_functional_groups(tmp_path, kind, is_soft):
    values = np.random.default_rng(0).integers(-1000, 1000, SHAPE)
    order = np.arange(SHAPE[2])
    file = write_enhanced(tmp_path / "a.dcm", values, order, RescaleType=kind)
    assert (view_of(file).window == (40, 400)) == is_soft


# ---------------------------------------------------------------- masks on the scan's grid


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", NAMES)
def test_a_mask_is_written_on_the_grid_of_its_nifti(volumes, name, plane, tmp_path):
    path, frame, image = volumes[name]
    view = view_of(path, plane=plane, frame=frame, slice="0.6")
    drawn = np.zeros(view.values.shape, bool)
    drawn[2:9, 5:8] = True
    drawn[7, 3:12] = True
    oracle = reoriented(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), "LPS")
    shown(oracle.dataobj, plane, view.number)[drawn] = 1
    wanted = reoriented(oracle, "".join(nib.aff2axcodes(image.affine)))

    scan = view.write(resized(drawn, view), (1.0, 2.0, 9.0, 8.0), ((3.0, 4.0), (5, 6)), tmp_path)

    made = nib.load(tmp_path / scan["mask"])
    given = nib.load(path)
    assert np.array_equal(made.dataobj, wanted.dataobj)
    assert made.get_data_dtype() == np.uint8
    assert np.array_equal(made.affine, given.affine)
    assert made.shape == given.shape[:3]
    assert type(made) is type(given)
    assert made.get_sform(coded=True)[1] == given.get_sform(coded=True)[1]
    again = view_of(tmp_path / scan["mask"], plane=plane, slice=str(view.number))
    assert np.array_equal(np.asarray(again.labels()) > 0, resized(drawn, view))
    diagonal = np.array(scan["bbox"][1]) - scan["bbox"][0]
    spacing = np.linalg.norm(view.scan.affine[:3, view.axes[:2]], axis=0)
    assert np.linalg.norm(diagonal) == pytest.approx(np.hypot(8, 6) * min(spacing), rel=0.06)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("turn", [AXIAL, SAGITTAL])
def test_a_mask_is_written_as_dicom_seg_of_the_images_it_lies_on(tmp_path, plane, turn):
    hd = pytest.importorskip("highdicom")
    folder, _ = write_series(tmp_path / "ct", turn)
    view = view_of(folder, plane=plane, slice="4")
    drawn = np.zeros(view.values.shape, bool)
    drawn[2:9, 5:8] = True
    mask = resized(drawn, view)
    scan = view.write(mask, None, None, tmp_path)
    assert scan["mask"] == "mask.dcm"
    assert scan["bbox"] is None
    made = hd.seg.segread(tmp_path / "mask.dcm")
    masks = made.pixel_array.reshape(-1, SHAPE[1], SHAPE[0])
    grid = np.zeros(SHAPE, np.uint8)
    for frame, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        k = round((position - ORIGIN) @ np.cross(turn[:3], turn[3:]) / 2.5)
        grid[:, :, k] = masks[frame].T
    assert np.array_equal(grid, view.on_grid(mask))
    assert grid.sum() == drawn.sum()


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "examples_overlay.dcm", "examples_palette.dcm", "MR_small_RLE.dcm"]
)
def test_the_mask_of_one_dicom_file_reads_back_equal(tmp_path, name):
    hd = pytest.importorskip("highdicom")
    view = view_of(DICOM / name)
    mask = np.zeros(view.values.shape[:2], bool)
    mask[10:30, 12:50] = True
    scan = view.write(mask, None, None, tmp_path)
    given = pydicom.dcmread(DICOM / name, stop_before_pixels=True)
    made = hd.seg.segread(tmp_path / "mask.dcm")
    assert scan["mask"] == "mask.dcm"
    assert np.array_equal(made.pixel_array, mask)
    again = labels_in(read_png(tmp_path / "mask.dcm", {}, True, DICOM / name))
    assert np.array_equal(again, mask)
    # of the patient, the SEG has what the standard requires, and result.json nothing
    about_patient = {e.keyword for e in made if e.tag.group in (0x10, 0x32, 0x38)}
    assert about_patient == {"PatientName", "PatientID", "PatientBirthDate", "PatientSex"}
    assert made.StudyInstanceUID == given.StudyInstanceUID
    assert not {"StudyDescription", "NameOfPhysiciansReadingStudy"} & set(made.dir())
    for key in ("PatientName", "PatientID"):
        if given.get(key):
            assert str(given.get(key)) not in str(scan)


def test_a_seg_says_nothing_of_a_patient_that_it_need_not(tmp_path):
    hd = pytest.importorskip("highdicom")
    secret = dict(
        AdditionalPatientHistory="Secret",
        OtherPatientNames="Secret",
        PatientAge="058Y",
        StudyDescription="Secret",
        PatientAddress="Secret",
        NameOfPhysiciansReadingStudy="Secret",
        AdmittingDiagnosesDescription="Secret",
        PhysiciansOfRecord="Secret",
        ConsultingPhysicianName="Secret",
        ReasonForVisit="Secret",
        Occupation="Secret",
        AdmissionID="Secret",
        RequestingService="Secret",
        ClinicalTrialSponsorName="Secret",
        PatientComments="Secret",
    )
    folder, _ = write_series(tmp_path / "ct", **secret, PatientIdentityRemoved="NO", StudyID="7")
    view = view_of(folder)
    view.write(everywhere(view), None, None, tmp_path)
    made = hd.seg.segread(tmp_path / "mask.dcm")
    assert not secret.keys() & set(made.dir())
    assert b"Secret" not in (tmp_path / "mask.dcm").read_bytes()
    assert made.StudyID == "7"
    assert made.PatientIdentityRemoved == "NO"
    assert made.PatientName == "CompressedSamples^CT1"
    assert made.ReferencedSeriesSequence
    assert made.Modality == "SEG"


def test_where_no_seg_can_be_made_a_line_says_why(tmp_path, monkeypatch):
    view = view_of(DICOM / "examples_ybr_color.dcm", frame=3)
    if "highdicom" in sys.modules:
        scan = view.write(everywhere(view), None, None, tmp_path)
        assert "Frame of Reference" in scan["mask"]
    monkeypatch.setitem(sys.modules, "highdicom", None)
    scan = view.write(everywhere(view), (1, 2, 3, 4), None, tmp_path)
    assert "highdicom: pip install" in scan["mask"]
    assert "bbox" not in scan
    assert not list(tmp_path.iterdir())


def test_no_patients_name_is_written_with_nifti(tmp_path):
    image = nib.load(NIFTI / "anatomical.nii")
    image.header["descrip"] = b"Doe^Jane"
    image.header["db_name"] = b"Doe^Jane"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    nib.save(image, tmp_path / "a.nii")
    view = view_of(tmp_path / "a.nii")
    scan = view.write(everywhere(view), None, None, tmp_path)
    made = nib.load(tmp_path / "mask.nii.gz")
    assert b"Doe" not in made.header.binaryblock
    assert not made.header.extensions
    assert "Doe" not in str(scan)


def write_unplaced(path: Path, data: np.ndarray) -> Path:
    """NIfTI that does not say where it lies."""
    image = nib.Nifti1Image(data, None)
    image.header["sform_code"] = 0
    image.header["qform_code"] = 0
    nib.save(image, path)
    return path


def test_nifti_without_an_orientation_says_so_and_has_no_millimetres(tmp_path):
    file = write_unplaced(tmp_path / "a.nii", np.zeros((20, 21, 22), np.int16))
    scan = view_of(file).write(np.ones((21, 20), bool), (1, 2, 3, 4), None, tmp_path)
    assert "unknown orientation" in scan["shown"]
    assert "bbox" not in scan
    assert np.array_equal(nib.load(tmp_path / "mask.nii.gz").affine, nib.load(file).affine)


# ---------------------------------------------------------------- masks of rows


def labels_in(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


GRID = (40, 48, 20)
OWN = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 24], [0, 0, 2, -20], [0, 0, 0, 1]])


def labels_of_a_box(value=1, dtype=np.uint8) -> np.ndarray:
    labels = np.zeros(GRID, dtype)
    labels[5:15, 8:20, 6:14] = value
    return labels


@pytest.fixture
def image_file(tmp_path) -> Path:
    values = np.random.default_rng(0).integers(0, 900, GRID).astype(np.int16)
    nib.save(nib.Nifti1Image(values, OWN), tmp_path / "image.nii.gz")
    return tmp_path / "image.nii.gz"


def saved(folder: Path, labels: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(labels, affine), folder / "mask.nii.gz")
    return folder / "mask.nii.gz"


def moved(x=0.0, y=0.0, z=0.0) -> np.ndarray:
    """The image's affine, moved by millimetres."""
    affine = OWN.copy()
    affine[:3, 3] += (x, y, z)
    return affine


def turned(degrees: float, axis: int) -> np.ndarray:
    """The image's affine, turned about the centre of the grid."""
    cosine = np.cos(np.radians(degrees))
    sine = np.sin(np.radians(degrees))
    first, second = [other for other in range(3) if other != axis]
    rotation = np.eye(3)
    rotation[first, first] = rotation[second, second] = cosine
    rotation[first, second] = -sine
    rotation[second, first] = sine
    return about_the_centre(rotation)


def about_the_centre(change: np.ndarray) -> np.ndarray:
    centre = [(n - 1) / 2 for n in GRID]
    affine = np.eye(4)
    affine[:3, :3] = change @ OWN[:3, :3]
    affine[:3, 3] = (OWN @ [*centre, 1])[:3] - affine[:3, :3] @ centre
    return affine


@pytest.mark.parametrize("plane", [None, *PLANES])
@pytest.mark.parametrize(
    "affine",
    [
        np.eye(4),
        np.diag([-1.0, -1, 1, 1]),
        np.diag([1.0, 1, 2, 1]),
        moved(x=15),
        moved(y=-1),
        moved(z=2),
        moved(x=0.2),
        moved(z=0.3),
        turned(3, axis=2),
        turned(90, axis=0),
        about_the_centre(np.diag([1, 1, 1.1])),
        about_the_centre(np.diag([1.05, 1.05, 1])),
    ],
)
def test_a_mask_that_lies_elsewhere_than_its_image_is_one_line(tmp_path, image_file, affine, plane):
    file = saved(tmp_path, labels_of_a_box(), affine)
    choice = {"slice": 10}
    if plane:
        choice["plane"] = plane
    with pytest.raises(ScanError, match="its image image.nii.gz") as error:
        read_png(file, choice, True, image_file)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("plane", [None, *PLANES])
@pytest.mark.parametrize("affine", [OWN, moved(x=0.05), moved(z=-0.1), turned(0.05, axis=1)])
def test_a_mask_within_a_tenth_of_a_voxel_is_taken(tmp_path, image_file, affine, plane):
    file = saved(tmp_path, labels_of_a_box(), affine)
    choice = {"slice": 10}
    if plane:
        choice["plane"] = plane
    found = labels_in(read_png(file, choice, True, image_file))
    wanted = reoriented(nib.Nifti1Image(labels_of_a_box(), OWN), "LPS")
    wanted = shown(np.asarray(wanted.dataobj), plane or "axial", 10)
    picture = Image.fromarray(wanted).resize(found.shape[::-1], Image.Resampling.NEAREST)
    assert found.any()
    assert np.array_equal(found, picture)


@pytest.mark.parametrize("plane", [None, *PLANES])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "PIR", "SRA", "AIL", "IPR"])
def test_another_order_of_axes_at_the_same_positions_stays_right(
    tmp_path, image_file, codes, plane
):
    choice = {"slice": 10}
    if plane:
        choice["plane"] = plane
    own = saved(tmp_path, labels_of_a_box(), OWN)
    wanted = labels_in(read_png(own, choice, True, image_file))
    other = tmp_path / "other.nii.gz"
    nib.save(reoriented(nib.load(own), codes), other)
    assert nib.aff2axcodes(nib.load(other).affine) == tuple(codes)
    assert wanted.any()
    assert np.array_equal(labels_in(read_png(other, choice, True, image_file)), wanted)


@pytest.mark.parametrize("turn", [AXIAL, CORONAL, SAGITTAL])
def test_a_nifti_mask_of_a_dicom_series_must_lie_where_it_does(tmp_path, turn):
    folder, values = write_series(tmp_path / "ct", turn)
    labels = np.uint8(values > 0)
    file = saved(tmp_path, labels, series_affine(turn))
    view = view_of(folder, slice="5")
    found = labels_in(read_png(file, {"slice": 5}, True, folder))
    assert np.array_equal(found, resized(np.uint8(view.values > 0), view))
    file = saved(tmp_path, labels, np.diag([0.8, 0.8, 2.5, 1]))
    with pytest.raises(ScanError, match="its image ct"):
        read_png(file, {"slice": 5}, True, folder)


def test_a_mask_of_one_slice_must_lie_at_that_slice(tmp_path, image_file):
    labels = labels_of_a_box()[:, :, 10:11]
    file = saved(tmp_path, labels, OWN @ [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 10], [0, 0, 0, 1]])
    assert labels_in(read_png(file, {"slice": "0.5"}, True, image_file)).sum() == 120
    file = saved(tmp_path, labels, OWN)
    with pytest.raises(ScanError, match=r"lies up to 20\.0 mm away"):
        read_png(file, {"slice": "0.5"}, True, image_file)


@pytest.mark.parametrize("slice, lies_there", [("0.25", True), ("0.5", False), ("0.3", False)])
def test_a_seg_must_lie_at_the_slice_that_is_shown(tmp_path, slice, lies_there):
    pytest.importorskip("highdicom")
    folder, _ = write_series(tmp_path / "ct")
    view = view_of(folder, slice="4")
    mask = np.zeros(view.image.size[::-1], bool)
    mask[2:9, 5:8] = True
    view.write(mask, None, None, tmp_path)
    if lies_there:
        found = labels_in(read_png(tmp_path / "mask.dcm", {"slice": slice}, True, folder))
        assert np.array_equal(found, mask)
    else:
        with pytest.raises(ScanError, match="mm away from its image ct"):
            read_png(tmp_path / "mask.dcm", {"slice": slice}, True, folder)


def test_a_mask_with_other_sides_than_its_image_is_one_line(tmp_path, image_file):
    file = saved(tmp_path, labels_of_a_box()[:30], OWN)
    with pytest.raises(ScanError, match="has 30x48 voxels in this slice, its image .* has 40x48"):
        read_png(file, {"slice": 10}, True, image_file)


def test_a_mask_or_an_image_without_a_position_is_one_line(tmp_path, image_file):
    unplaced = write_unplaced(tmp_path / "unplaced.nii", labels_of_a_box())
    with pytest.raises(ScanError, match="does not say where it lies, and its image .* does"):
        read_png(unplaced, {"slice": 10}, True, image_file)
    file = saved(tmp_path, labels_of_a_box(), OWN)
    with pytest.raises(ScanError, match="says where it lies, and its image .* does not"):
        read_png(file, {"slice": 10}, True, unplaced)
    assert labels_in(read_png(unplaced, {"slice": 10}, True, unplaced)).sum() == 120


@pytest.mark.parametrize(
    "value, dtype, depth",
    [
        (1, np.uint8, np.uint8),
        (2, np.float32, np.uint8),
        (255, np.int16, np.uint8),
        (300, np.int16, np.uint16),
        (14175, np.int32, np.uint16),
        (65535, np.uint16, np.uint16),
    ],
)
def test_a_mask_keeps_its_labels(tmp_path, value, dtype, depth):
    labels = labels_of_a_box(value, dtype)
    labels[0, 0, 10] = 1
    found = labels_in(read_png(saved(tmp_path, labels, OWN), {"slice": 10}, True))
    assert found.dtype == depth
    assert set(np.unique(found)) == {0, 1, value}
    assert (found == value).sum() >= 120


@pytest.mark.parametrize("value", [0.5, -1, 65536, np.nan, np.inf])
def test_what_is_no_label_is_one_line(tmp_path, value):
    labels = labels_of_a_box(value, np.float32)
    with pytest.raises(ScanError, match="is not a mask: whole numbers from 0 to 65535"):
        read_png(saved(tmp_path, labels, OWN), {"slice": 10}, True)


def test_a_colour_image_is_no_mask():
    with pytest.raises(ScanError, match="is a colour image, not a mask"):
        read_png(DICOM / "examples_palette.dcm", {}, True)


@pytest.mark.parametrize("is_mask", [False, True])
def test_a_picture_stays_as_it_is(tmp_path, is_mask):
    Image.new("L", (30, 30)).save(tmp_path / "a.png")
    assert read_png(tmp_path / "a.png", {}, is_mask) == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize(
    "choice, says",
    [
        ({"slcie": 3}, '"scan"'),
        (5, '"scan"'),
        ({"slice": [3]}, '"scan"'),
        ({"slice": True}, '"scan"'),
        ({"slice": 99}, "0 to 19"),
        ({"plane": "x"}, "--plane is one of"),
        ({"frame": "0"}, "has 1 volumes"),
    ],
)
def test_a_bad_choice_is_one_line(image_file, choice, says):
    with pytest.raises(ScanError, match=says):
        read_png(image_file, choice, False)


def write_samples(folder: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row) for row in rows]
    (folder / "samples.jsonl").write_text("\n".join(lines))


@pytest.fixture
def data_folder(tmp_path, volumes) -> Path:
    """A folder for samples.jsonl: a NIfTI volume and its labels, and a DICOM series."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    path, _, image = volumes["thick.nii.gz"]
    (tmp_path / "images/a.nii.gz").write_bytes(path.read_bytes())
    labels = np.zeros(image.shape, np.uint8)
    labels[10:20, 30:60, 8:15] = 1
    nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "masks/a.nii.gz")
    nib.save(nib.Nifti1Image(labels, np.eye(4)), tmp_path / "masks/eye.nii.gz")
    write_series(tmp_path / "images/ct")
    Image.fromarray(np.tri(24, 20, dtype=bool)).save(tmp_path / "masks/ct.png")
    return tmp_path


@pytest.mark.parametrize("plane, slice, n", [("axial", 10, 10), ("coronal", 0.5, 48)])
def test_rows_choose_a_slice_of_a_scan(data_folder, volumes, plane, slice, n):
    choice = {"plane": plane, "slice": slice}
    row = {"image": "a.nii.gz", "mask": "a.nii.gz", "query": "what?", "scan": choice}
    write_samples(data_folder, [row])
    example = load_samples(data_folder)[0]
    path, _, _ = volumes["thick.nii.gz"]
    labels = reoriented(nib.load(data_folder / "masks/a.nii.gz"), "LPS")
    wanted = shown(labels.get_fdata(), plane, n) > 0
    assert example.mask.any()
    assert example.mask.shape == example.image.size[::-1]
    assert example.mask.mean() == pytest.approx(wanted.mean(), rel=0.05)
    assert np.array_equal(example.image, view_of(path, plane=plane, slice=str(n)).image)


def test_rows_may_have_a_series_and_a_box_or_a_picture_as_mask(data_folder):
    own = dict(image="ct", query="what?", bbox=[1, 2, 9, 12], points=[[3, 4], [5, 6]])
    rows = [
        own | {"scan": {}},
        own | {"scan": {"slice": 2, "window": "lung"}},
        {"image": "ct", "mask": "ct.png", "query": "what?", "scan": {}},
    ]
    write_samples(data_folder, rows)
    examples = load_samples(data_folder)
    folder = data_folder / "images/ct"
    assert np.array_equal(examples[0].image, view_of(folder).image)
    assert np.array_equal(examples[1].image, view_of(folder, slice="2", window="lung").image)
    assert not np.array_equal(examples[0].image, examples[1].image)
    assert np.array_equal(examples[2].mask, np.tri(24, 20, dtype=bool))


@pytest.mark.parametrize("scan", [{}, {"scan": {"slice": 10}}, {"scan": {"plane": "coronal"}}])
def test_a_row_whose_mask_lies_elsewhere_is_a_bad_row(data_folder, scan):
    write_samples(
        data_folder,
        [
            {"image": "a.nii.gz", "mask": "a.nii.gz", "query": "what?"} | scan,
            {"image": "a.nii.gz", "mask": "eye.nii.gz", "query": "what?"} | scan,
        ],
    )
    examples = load_samples(data_folder)
    assert examples[0].mask.any()
    with pytest.raises(BadRow, match="line 2, mask: lies up to .* from its image a.nii.gz"):
        examples[1]


def test_a_bad_choice_of_a_row_is_a_bad_row(data_folder):
    own = dict(image="a.nii.gz", query="what?", bbox=[1, 2, 9, 12], points=[[3, 4], [5, 6]])
    write_samples(data_folder, [own | {"scan": {"slice": 99}}])
    with pytest.raises(BadRow, match="image: .*0 to 23"):
        load_samples(data_folder)[0]


# ---------------------------------------------------------------- the command


def completion(bbox, points) -> str:
    answer = {"bbox": list(bbox), "points_1": list(points[0]), "points_2": list(points[1])}
    return f"<think>bright</think><answer>{json.dumps(answer)}</answer>"


class BoxSegmenter:
    """A segmenter that draws the box itself."""

    def segment(self, image, boxes=None, points=None, labels=None):
        masks = np.zeros((len(boxes), *image.shape[:2]), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes):
            mask[round(y1) : round(y2), round(x1) : round(x2)] = True
        return masks, np.full(len(boxes), 0.9, np.float32)


@pytest.fixture(scope="module")
def crm():
    return load_crm(EMBEDDED["crm"], resize="square:112")


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys, crm):
    """ask(module, flags, text) -> status, result.json, stdout. The CRM answers with that text."""

    def run(module, flags, text):
        def sample(crm, prompts, *_):
            empty = torch.zeros(1, 0)
            lengths = torch.zeros(1).long()
            done = torch.ones(1).bool()
            return [Group(prompts[0], empty.long(), lengths, empty, done, [text])]

        monkeypatch.setattr(infer, "sample", sample)
        monkeypatch.setattr(infer, "load_models", lambda cfg: (crm, BoxSegmenter()))
        argv = shlex.split(f"--query 'What is bright?' --out {run.out} {flags}")
        capsys.readouterr()
        status = module.main(parse_args(module.Config, "", argv=argv))
        result = json.loads((run.out / "result.json").read_text())
        return status, result, capsys.readouterr().out

    run.out = tmp_path / "out"
    return run


ANSWER = completion((42, 56, 84, 84), ((56, 28), (70, 63)))


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


PICTURES = {"mask.png", "overlay.png", "result.json"}


def test_the_command_asks_about_a_slice_and_writes_millimetres(ask, volumes):
    path, _, image = volumes["anatomical.nii"]
    flags = f"--image {path} --plane coronal --slice 0.25"
    status, result, out = ask(scans, flags, ANSWER)
    assert status == 0
    assert result["size"] == [33, 25]
    assert result["scan"]["mask"] == "mask.nii.gz"
    assert names_in(ask.out) == PICTURES | {"mask.nii.gz"}
    made = nib.load(ask.out / "mask.nii.gz")
    assert made.shape == image.shape
    assert np.asarray(made.dataobj).sum() == result["mask_pixels"] > 0
    x1, _, x2, _ = result["bbox"]
    corner_x = [corner[0] for corner in result["scan"]["bbox"]]
    wanted = [-image.affine[0] @ [x - 0.5, 0, 0, 1] for x in (x1, x2)]
    assert corner_x == pytest.approx(wanted, abs=2e-3)
    (_, corner_y, _), _ = result["scan"]["bbox"]
    _, (_, point_y, _) = result["scan"]["points"]
    assert corner_y == point_y  # all in one coronal slice
    assert "coronal slice 10 of 41, from 0, front to back" in out
    assert "scan's mask mask.nii.gz" in out


def test_a_mask_of_an_earlier_scan_is_deleted(ask, volumes):
    path, _, _ = volumes["anatomical.nii"]
    ask(scans, f"--image {path}", ANSWER)
    assert "mask.nii.gz" in names_in(ask.out)
    status, result, _ = ask(scans, f"--image {DICOM / 'CT_small.dcm'}", ANSWER)
    assert status == 0
    assert "mask.nii.gz" not in names_in(ask.out)
    assert (result["scan"]["mask"] == "mask.dcm") == ("mask.dcm" in names_in(ask.out))
    ask(scans, f"--image {path}", ANSWER)
    assert names_in(ask.out) == PICTURES | {"mask.nii.gz"}
    status, result, _ = ask(scans, f"--image {path}", "no answer here")
    assert status == 3
    assert "scan" not in result
    assert names_in(ask.out) == {"result.json"}


@pytest.mark.parametrize("name", ["mask.nii.gz", "mask.dcm"])
def test_a_mask_that_the_command_did_not_write_is_not_touched(ask, volumes, capsys, name):
    path, _, _ = volumes["anatomical.nii"]
    ask.out.mkdir()
    (ask.out / name).write_bytes(b"somebody's ground truth")
    with pytest.raises(SystemExit) as exit_:
        ask(scans, f"--image {path}", ANSWER)
    assert exit_.value.code == 2
    assert f"has a {name} and no result.json" in capsys.readouterr().err
    assert (ask.out / name).read_bytes() == b"somebody's ground truth"
    assert names_in(ask.out) == {name}


def test_the_command_has_the_flags_of_infer_and_five_more(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scans.py", "--help"])
    monkeypatch.delitem(sys.modules, "extras.scans")
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module("extras.scans", run_name="__main__")
    assert exit_.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith("usage:")
    for name in ("image", "query", "crm", "asm", "out", "temperature", "seed"):
        assert f"--{name} " in help_text
    for name in ("slice", "plane", "frame", "series", "window"):
        assert f"--{name} " in help_text
    assert "DICOM SEG" in help_text


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of input that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    write_series(folder / "two")
    for file in list((folder / "two").iterdir()):
        file.rename(file.with_name("A" + file.name))
    write_series(folder / "two", seed=1)
    write_series(folder / "gap")[0].joinpath("IM0005").unlink()
    write_series(folder / "unplaced", ImagePositionPatient=None)
    write_series(folder / "torn")
    for file in (folder / "torn").iterdir():
        file.write_bytes(file.read_bytes()[:5_600])
    (folder / "text.dcm").write_text("a text of more than 132 letters " * 10)
    (folder / "a.png.dcm").write_bytes(b"")
    (folder / "text.nii.gz").write_bytes(gzip.compress(b"no volume" * 100))
    (folder / "text.nii").write_text("no volume")
    data = (NIFTI / "example4d.nii.gz").read_bytes()
    (folder / "torn.nii.gz").write_bytes(data[: len(data) // 2])
    (folder / "torn.nii").write_bytes((NIFTI / "anatomical.nii").read_bytes()[:30_000])
    flat = bytearray(nib.Nifti1Image(np.zeros((20, 20, 20), np.uint8), np.eye(4)).to_bytes())
    flat[312:328] = bytes(16)  # srow_z: all voxels at one height
    (folder / "flat.nii").write_bytes(flat)
    Image.new("L", (30, 30)).save(folder / "picture.png")
    return folder


@pytest.mark.parametrize(
    "flags, says",
    [
        ("{bad}/empty", "is a directory without DICOM: give"),
        ("{bad}/two", "has 2 series: give --series with one of"),
        ("{bad}/two --series 99", "has 0 series that end in 99"),
        ("{bad}/gap", "2.50 to 5.00 mm apart"),
        (
            "{bad}/unplaced",
            "without positions, or of several sizes or directions: give one of its files",
        ),
        ("{bad}/flat.nii", "has a broken affine: correct its sform"),
        ("{bad}/torn", "cannot be decoded, in IM0"),
        ("{bad}/text.dcm", "text.dcm is not DICOM"),
        ("{bad}/a.png.dcm", "is not DICOM"),
        ("{bad}/text.nii.gz", "is not NIfTI"),
        ("{bad}/text.nii", "is not NIfTI"),
        ("{bad}/torn.nii.gz --frame 1", "is truncated"),
        ("{bad}/torn.nii --slice 24", "is truncated"),
        ("{nifti}/anatomical.nii --slice 25", "has 25 slices: give --slice 0 to 24"),
        ("{nifti}/anatomical.nii --slice=-1", "give --slice 0 to 24"),
        ("{nifti}/anatomical.nii --slice 1.5", "0.0 to 1.0"),
        ("{nifti}/anatomical.nii --slice 1,2", "not 1,2"),
        ("{nifti}/anatomical.nii --slice x", "not x"),
        ("{nifti}/anatomical.nii --window 40,0", "width above 0"),
        ("{nifti}/anatomical.nii --window 40", "LEVEL,WIDTH"),
        ("{nifti}/anatomical.nii --window nan,1", "LEVEL,WIDTH"),
        ("{nifti}/anatomical.nii --window liver", "LEVEL,WIDTH"),
        ("{nifti}/anatomical.nii --frame 1", "has 1 volumes"),
        ("{nifti}/anatomical.nii --series 1", "leave out --series"),
        ("{nifti}/example4d.nii.gz", "has 2 volumes: give --frame, 0 to 1"),
        ("{nifti}/example4d.nii.gz --frame 2", "0 to 1"),
        ("{dicom}/examples_ybr_color.dcm", "give --frame, 0 to 29"),
        ("{dicom}/rtplan.dcm", "without an image"),
        ("{dicom}/CT_small.dcm --plane coronal", "single axial slice: leave out --plane"),
        ("{dicom}/CT_small.dcm --frame 1", "has 1 frames"),
        ("{dicom}/CT_small.dcm --series 5", "that end in 5"),
        ("{dicom}/examples_palette.dcm --window lung", "colour image: leave out --window"),
        ("{dicom}/dicomdirtests/98892001/CT5N --frame 1", "series of files"),
        ("{dicom}/dicomdirtests/98892001/CT5N --plane diagonal", "invalid choice"),
        (
            "{bad}/picture.png --slice 3 --window lung",
            "is neither DICOM nor NIfTI: leave out --slice, --window",
        ),
        ("{bad}/picture.png", "is neither DICOM nor NIfTI: give it to infer.py"),
        ("{bad}/none.nii --slice 3", "none.nii does not exist"),
        ("{nifti}/anatomical.nii --query ' '", "--query is empty"),
    ],
)
def test_bad_input_is_one_line_with_status_2_and_nothing_is_written(
    bad, tmp_path, capsys, flags, says
):
    flags = flags.format(bad=bad, nifti=NIFTI, dicom=DICOM)
    with pytest.raises(SystemExit) as exit_:
        argv = shlex.split(f"--query x --out {tmp_path / 'out'} --image {flags}")
        scans.main(parse_args(scans.Config, "", argv=argv))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert flags.split()[0] in line or "invalid choice" in line or "--query" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "package, path", [("nibabel", NIFTI / "anatomical.nii"), ("pydicom", CT5N)]
)
def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, package, path):
    monkeypatch.setitem(sys.modules, package, None)
    words = f"needs the package {package}: pip install -r requirements-extras.txt"
    with pytest.raises(ScanError, match=words):
        read_view(path)


def test_one_of_two_series_is_chosen_by_the_end_of_its_uid(bad):
    uids = {str(pydicom.dcmread(file).SeriesInstanceUID) for file in (bad / "two").iterdir()}
    assert len(uids) == 2
    for uid in uids:
        view = view_of(bad / "two", series=uid[-12:])
        first, _ = view.scan.images[0]
        assert view.scan.shape == SHAPE
        assert first.SeriesInstanceUID == uid


# ---------------------------------------------------------------- broken and hostile files


def test_a_header_that_claims_billions_of_frames_is_an_error_before_memory_is_taken(tmp_path):
    header = pydicom.dcmread(DICOM / "CT_small.dcm")
    header.NumberOfFrames = 2 * 10**9
    header.save_as(tmp_path / "a.dcm")
    words = "^claims to have 2,000,000,000 frames: 100,000 can be read at most$"
    for frame in (None, 3):
        with pytest.raises(ScanError, match=words):
            view_of(tmp_path / "a.dcm", frame=frame)


def write_bent(folder: Path, name: str, seed: int) -> Path:
    """A scan, bent at random: in half of the cases its header alone."""
    header_alone = seed % 2 == 1
    if name == "series":
        for k, source in enumerate(CT5N.iterdir()):
            data = source.read_bytes()
            if k == seed % 5:
                data = changed(data, seed)
            (folder / str(k)).write_bytes(data)
        return folder
    file = folder / "a.dcm"
    if name.startswith("a.nii"):
        file = folder / name
        values = np.arange(16**3, dtype=np.int16).reshape(16, 16, 16)
        nib.save(nib.Nifti1Image(values, np.diag([2, -2, 3, 1])), file)
        data = file.read_bytes()
        cut = 400
    else:
        data = (DICOM / name).read_bytes()
        cut = data.find(b"\xe0\x7f\x10\x00")  # the pixel data's tag, -1 if there is none
    if header_alone and cut > 0:
        file.write_bytes(changed(data[:cut], seed) + data[cut:])
    else:
        file.write_bytes(changed(data, seed))
    return file


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "CT_small.dcm",
        "SC_rgb_rle_2frame.dcm",
        "liver_1frame.dcm",
        "dicomdirtests/77654033/CR1/6154",
        "SC_rgb_jpeg_dcmtk.dcm",
        "series",
        "a.nii",
        "a.nii.gz",
    ],
)
@given(seed=SEEDS)
@FEW
def test_a_bent_scan_is_read_or_is_an_error_of_one_line(name, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bent")
    file = write_bent(folder, name, seed)
    try:
        view = view_of(file)
    except ScanError as error:
        assert len(str(error).splitlines()) == 1
        return
    if view is not None:
        scan = view.write(everywhere(view), (0, 0, 1, 1), ((0, 0), (1, 1)), folder)
        assert scan["mask"].startswith("none") or (folder / scan["mask"]).is_file()
