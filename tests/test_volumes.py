"""DICOM and NIfTI: what is seen, what comes back, and what is refused. The files are those inside the packages pydicom
and nibabel; nibabel's own reorientation and DICOM's formula are the oracles."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from PIL import Image
from test_hostile import FEW, SEEDS, bent
from test_infer import ask, completion  # noqa: F401 (ask is a fixture)
from test_scripts import refusal

import infer
from data import BadRow, load_image, load_samples
from extras.scan_files import Refused, SeveralFrames
from extras.scans import PLANES, ScanConfig, View, find_window, read_view, slice_number

nib = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

NIFTI = Path(nib.__file__).parent / "tests/data"
DICOM = Path(pydicom.__file__).parent / "data/test_files"
CT5N = DICOM / "dicomdirtests/98892001/CT5N"
SHAPE = 20, 24, 17  # columns, rows, images of the series made here


def view_of(path, **choice) -> View:
    return read_view(path, ScanConfig(**choice))


def lps(image) -> np.ndarray:
    """A volume by nibabel: to the left, to the back, to the head."""
    wanted = nib.orientations.axcodes2ornt("LPS")
    return image.as_reoriented(
        nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)
    )


def shown(volume: np.ndarray, plane: str, n: int) -> np.ndarray:
    """(rows, columns) of a slice of an LPS volume, a view: right on the left; front, or head, up."""
    head_up = volume[:, :, ::-1]
    return (
        volume[:, :, n] if plane == "axial" else head_up[:, n] if plane == "coronal" else head_up[n]
    ).T


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Five NIfTI files of several orders of axes: {name: (path, frame, the volume by nibabel)}."""
    folder, found = tmp_path_factory.mktemp("nifti"), {}
    brain = nib.load(NIFTI / "example4d.nii.gz")  # oblique, LAS, 2 x 2 x 2.2 mm
    one = nib.Nifti1Image(np.asarray(brain.dataobj[..., 1]), brain.affine, brain.header)
    turned = one.as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(one.affine), nib.orientations.axcodes2ornt("PIR")
        )
    )
    thick = nib.Nifti1Image(
        one.get_fdata().astype(np.float32)[::2, :, ::-1], one.affine @ np.diag([2, 1, -1, 1])
    )
    nib.save(nib.Nifti2Image(turned.dataobj, turned.affine), folder / "turned.nii")
    nib.save(thick, folder / "thick.nii.gz")
    for path, frame in (
        (NIFTI / "example4d.nii.gz", 1),
        (NIFTI / "anatomical.nii", None),
        (NIFTI / "reoriented_anat_moved.nii", None),
        (folder / "turned.nii", None),
        (folder / "thick.nii.gz", None),
    ):
        image = nib.load(path)
        data = np.asarray(image.dataobj[..., frame] if frame is not None else image.dataobj)
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
    folder,
    turn=(1, 0, 0, 0, 1, 0),
    origin=(-30, 40, 5),
    step=2.5,
    spacing=(0.8, 0.8),
    seed=0,
    **tags,
):
    """A CT series of random Hounsfield units (columns, rows, images) and the path of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(-1000, 1000, SHAPE)
    uid, normal = pydicom.uid.generate_uid(), np.cross(turn[:3], turn[3:])
    names = np.random.default_rng(1).permutation(SHAPE[2])  # files are not in order
    for k, name in enumerate(names):
        ds = pydicom.dcmread(DICOM / "CT_small.dcm")
        ds.Columns, ds.Rows, ds.RescaleIntercept, ds.RescaleSlope = *SHAPE[:2], -1024, 1
        ds.SeriesInstanceUID, ds.SOPInstanceUID = uid, pydicom.uid.generate_uid()
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.ImageOrientationPatient, ds.PixelSpacing = list(turn), list(spacing)
        ds.ImagePositionPatient = [f"{v:.6f}" for v in origin + normal * step * k]
        ds.PixelData = np.int16(values[:, :, k].T + 1024).tobytes()
        for key, value in tags.items():
            setattr(ds, key, value)
        ds.save_as(folder / f"IM{name:04}")
    return folder, values


# ---------------------------------------------------------------- what is seen


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", NAMES)
def test_nifti_is_shown_as_nibabel_reorients_it(volumes, name, plane):
    path, frame, image = volumes[name]
    view = view_of(path, plane=plane, frame=frame, slice="9")
    wanted = lps(image)
    assert np.array_equal(view.values, shown(wanted.get_fdata(), plane, 9))
    zooms = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[plane]
    across, down = np.array(wanted.header.get_zooms())[list(zooms)] * view.values.shape[::-1]
    assert view.image.width / view.image.height == pytest.approx(across / down, rel=0.04)


def test_a_marked_voxel_of_an_oblique_las_volume_appears_where_it_lies(tmp_path):
    brain = nib.load(NIFTI / "example4d.nii.gz")
    assert nib.aff2axcodes(brain.affine) == ("L", "A", "S") and abs(brain.affine[1, 2]) > 0.1
    data = np.zeros(brain.shape[:3], np.int16)
    data[100:103, 80:83, 20:23] = 1  # far left, front, high
    nib.save(nib.Nifti1Image(data, brain.affine), tmp_path / "a.nii")
    (x, y), (u, v) = (
        [
            axis.mean()
            for axis in np.nonzero(
                np.asarray(view_of(tmp_path / "a.nii", plane=plane, slice=n).image.convert("L")).T
                > 127
            )
        ]
        for plane, n in (("axial", 21), ("sagittal", 101))
    )
    assert (x, y) == (101, 96 - 1 - 81)  # the patient's left on the right, the front up
    assert u == 96 - 1 - 81 and v < 4  # the front on the left, the head up
    left, back, up = brain.affine[:3] @ [101, 81, 21, 1] * (-1, -1, 1)
    view = view_of(tmp_path / "a.nii", slice="21")
    assert view.to_mm(101.5, 14.5) == pytest.approx([left, back, up], abs=2e-3)


@pytest.mark.parametrize(
    "turn",
    [
        (1, 0, 0, 0, 1, 0),
        (0, 1, 0, 0, 0, -1),
        (1, 0, 0, 0, 0, -1),
        (-1, 0, 0, 0, -1, 0),
        (0.96, 0.28, 0, -0.28, 0.96, 0),
    ],
)
def test_a_dicom_series_looks_as_the_same_volume_in_nifti(tmp_path, turn):
    folder, values = write_series(tmp_path / "ct", turn)
    columns = [
        np.array(turn[:3]) * 0.8,
        np.array(turn[3:]) * 0.8,
        np.cross(turn[:3], turn[3:]) * 2.5,
        (-30, 40, 5),
    ]
    affine = np.diag([-1, -1, 1, 1]) @ np.vstack([np.stack(columns, axis=1), (0, 0, 0, 1)])
    nib.save(nib.Nifti1Image(values.astype(np.int16), affine), tmp_path / "ct.nii.gz")
    for plane in PLANES:
        one, two = (
            view_of(path, plane=plane, slice="0.3", window="lung")
            for path in (folder, tmp_path / "ct.nii.gz")
        )
        assert np.array_equal(one.image, two.image) and one.n == two.n
        assert one.to_mm(3.5, 7.25) == pytest.approx(two.to_mm(3.5, 7.25), abs=2e-3)
    assert (
        view_of(folder).plane
        == {0: "sagittal", 1: "coronal", 2: "axial"}[
            int(np.abs(np.cross(turn[:3], turn[3:])).argmax())
        ]
    )
    assert view_of(folder).window == (40, 400)  # CT without a window of its own


def test_dicom_millimetres_are_those_of_its_formula():
    ds = pydicom.dcmread(DICOM / "CT_small.dcm")
    x = 10 * ds.PixelSpacing[1] + ds.ImagePositionPatient[0]
    y = 20 * ds.PixelSpacing[0] + ds.ImagePositionPatient[1]
    view, z = view_of(DICOM / "CT_small.dcm"), ds.ImagePositionPatient[2]
    assert view.to_mm(10.5, 20.5) == pytest.approx([x, y, z], abs=2e-3)


def test_windows():
    values = np.array([[-160.0, 40, 240, 1000]])
    for name, window in (("soft", (40, 400)), ("lung", (-600, 1500)), ("50,10", (50, 10))):
        assert find_window(name, values, (7, 9), "CT") == window
    assert find_window("auto", values, (7, 9), "CT") == (7, 9)
    assert find_window("auto", values, (7, 0), "CT") == (40, 400)
    level, width = find_window("auto", np.arange(1001.0), None, "MR")
    assert (level, width) == pytest.approx((500, 990))
    assert find_window("auto", np.array([3.0, np.nan]), None, "") == (3, 1)
    grey = np.asarray(view_of(DICOM / "CT_small.dcm", window="40,400").image)[..., 0]
    ds = pydicom.dcmread(DICOM / "CT_small.dcm")
    wanted = np.clip((ds.pixel_array - 1024.0 + 160) / 400, 0, 1) * 255
    assert np.abs(grey - wanted).max() <= 0.5


def test_slices_by_number_and_by_fraction():
    assert [slice_number(text, 10) for text in ("0", "9", "0.5", "0.0", "1.0", "0.99", "1")] == [
        0,
        9,
        5,
        0,
        9,
        9,
        1,
    ]


def test_monochrome1_is_inverted_and_12_bits_are_windowed():
    view = view_of(DICOM / "dicomdirtests/77654033/CR1/6154")
    assert (
        pydicom.dcmread(view.scan.images[0][0].filename).PhotometricInterpretation == "MONOCHROME1"
    )
    order = view.values.ravel().argsort()
    assert (np.diff(np.int64(np.asarray(view.image)[..., 0]).ravel()[order]) <= 0).all()
    assert not view.scan.placed and "unknown orientation" in str(view)


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
    assert (
        np.abs(image - raw / np.iinfo(raw.dtype).max * 255).max() <= 0.51
        and np.ptp(image, axis=-1).max() > 50
    )


def test_one_picture_in_six_transfer_syntaxes():
    first, *others = (
        np.asarray(view_of(DICOM / f"MR_small{kind}.dcm").image)
        for kind in ("", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_padded")
    )
    assert all(np.array_equal(first, other) for other in others)


def test_pixels_that_are_not_square_are_made_square(tmp_path):
    folder, values = write_series(tmp_path / "ct", spacing=(1.6, 0.8))
    view = view_of(folder, slice="3")
    assert view.image.size == (20, 48) and view.to_mm(0.5, 47.0) == [
        -30,
        pytest.approx(40 + 1.6 * 23),
        5 + 3 * 2.5,
    ]
    assert np.asarray(view_of(folder, plane="coronal").image).shape[:2] == (
        round(17 * 2.5 / 0.8),
        20,
    )


def test_the_frames_of_an_enhanced_file_are_a_volume(tmp_path):
    folder, values = write_series(tmp_path / "ct")
    ds = pydicom.dcmread(DICOM / "CT_small.dcm")
    ds.Columns, ds.Rows, ds.NumberOfFrames = SHAPE
    order = np.random.default_rng(3).permutation(SHAPE[2])
    ds.PixelData = np.int16(values[:, :, order].T + 1024).tobytes()
    orientation, measures, rescale = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    orientation.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    measures.PixelSpacing, measures.SliceThickness = [0.8, 0.8], 2.5
    rescale.RescaleSlope, rescale.RescaleIntercept = 1, -1024
    shared, ds.PerFrameFunctionalGroupsSequence = pydicom.Dataset(), []
    shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = [orientation], [measures]
    shared.PixelValueTransformationSequence, ds.SharedFunctionalGroupsSequence = [rescale], [shared]
    for key in (
        "ImageOrientationPatient",
        "ImagePositionPatient",
        "PixelSpacing",
        "RescaleSlope",
        "RescaleIntercept",
    ):
        delattr(ds, key)
    for k in order:
        position, group = pydicom.Dataset(), pydicom.Dataset()
        position.ImagePositionPatient = [-30, 40, 5 + 2.5 * k]
        group.PlanePositionSequence = [position]
        ds.PerFrameFunctionalGroupsSequence.append(group)
    ds.save_as(tmp_path / "enhanced.dcm")
    for plane in PLANES:
        one, two = (
            view_of(path, plane=plane, slice="5") for path in (folder, tmp_path / "enhanced.dcm")
        )
        assert np.array_equal(one.image, two.image) and one.to_mm(4, 5) == two.to_mm(4, 5)
    single = view_of(tmp_path / "enhanced.dcm", frame=2)
    assert np.array_equal(single.values, values[:, :, order[2]].T)


def test_a_view_says_what_shows_the_same_again():
    path = NIFTI / "example4d.nii.gz"
    view = view_of(path, frame=1, plane="coronal", slice="0.3", window="400,800")
    again = read_view(path, view.choice)
    assert (
        view.choice == again.choice == ScanConfig("28", "coronal", 1, window="400,800")
        and view.slices == 96
    )
    assert np.array_equal(view.image, again.image) and not np.array_equal(
        view.image, view_of(path, frame=0).image
    )


@pytest.mark.parametrize(
    "path, count", [(NIFTI / "example4d.nii.gz", 2), (DICOM / "examples_ybr_color.dcm", 30)]
)
def test_that_a_frame_must_be_chosen_is_an_error_of_its_own(path, count):
    with pytest.raises(SeveralFrames, match=f"give --frame, 0 to {count - 1}"):
        read_view(path)
    assert view_of(path, frame=0).scan.frames == count
    with pytest.raises(ValueError) as error:
        view_of(path, frame=count)
    assert not isinstance(error.value, SeveralFrames)


def test_every_file_in_the_packages_is_read_or_refused_in_one_line(capfd):
    seen, refused = 0, []
    for path in [*DICOM.parent.rglob("*"), *NIFTI.rglob("*.nii*")]:
        try:
            seen += read_view(path) is not None
        except ValueError as error:
            refused.append(str(error))
    assert seen > 80 and all(len(line.splitlines()) == 1 and len(line) < 550 for line in refused)
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
        assert any(words in line for line in refused), words


# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("name", NAMES)
def test_a_mask_comes_back_on_the_grid_of_its_nifti(volumes, name, plane, tmp_path):
    path, frame, image = volumes[name]
    view = view_of(path, plane=plane, frame=frame, slice="0.6")
    oracle = lps(nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine))
    drawn = np.zeros(view.values.shape, bool)
    drawn[2:9, 5:8], drawn[7, 3:12] = True, True
    shown(oracle.dataobj, plane, view.n)[drawn] = 1
    wanted = oracle.as_reoriented(
        nib.orientations.ornt_transform(
            nib.io_orientation(oracle.affine), nib.io_orientation(image.affine)
        )
    )
    mask = np.asarray(Image.fromarray(drawn).resize(view.image.size, Image.Resampling.NEAREST))
    scan = view.write(mask, (1.0, 2.0, 9.0, 8.0), ((3.0, 4.0), (5.0, 6.0)), tmp_path)["scan"]
    made, given = nib.load(tmp_path / scan["mask"]), nib.load(path)
    assert np.array_equal(made.dataobj, wanted.dataobj) and made.get_data_dtype() == np.uint8
    assert (
        np.array_equal(made.affine, given.affine)
        and made.shape == given.shape[:3]
        and type(made) is type(given)
    )
    assert made.get_sform(coded=True)[1] == given.get_sform(coded=True)[1]
    again = view_of(tmp_path / scan["mask"], plane=plane, slice=str(view.n))
    assert np.array_equal(np.asarray(again.labels()) > 0, mask)
    corner = np.array(scan["bbox"][1]) - scan["bbox"][0]
    assert np.linalg.norm(corner) == pytest.approx(
        np.hypot(8, 6) * min(view_spacing(view)), rel=0.06
    )


def view_spacing(view):
    return np.linalg.norm(view.scan.affine[:3, view.axes[:2]], axis=0)


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("turn", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)])
def test_a_mask_comes_back_as_dicom_seg_of_the_images_it_lies_on(tmp_path, plane, turn):
    hd = pytest.importorskip("highdicom")
    folder, values = write_series(tmp_path / "ct", turn)
    view = view_of(folder, plane=plane, slice="4")
    drawn = np.zeros(view.values.shape, bool)
    drawn[2:9, 5:8] = True
    mask = np.asarray(Image.fromarray(drawn).resize(view.image.size, Image.Resampling.NEAREST))
    scan = view.write(mask, None, None, tmp_path)["scan"]
    assert scan["mask"] == "mask.dcm" and scan["bbox"] is None
    made, grid = hd.seg.segread(tmp_path / "mask.dcm"), np.zeros(SHAPE, np.uint8)
    for frame, group in enumerate(made.PerFrameFunctionalGroupsSequence):
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        k = round((position - (-30, 40, 5)) @ np.cross(turn[:3], turn[3:]) / 2.5)
        grid[:, :, k] = np.atleast_3d(
            np.moveaxis(made.pixel_array.reshape(-1, *SHAPE[1::-1]), 0, -1)
        )[..., frame].T
    assert np.array_equal(grid, view.on_grid(mask)) and grid.sum() == drawn.sum()


@pytest.mark.parametrize(
    "name", ["CT_small.dcm", "examples_overlay.dcm", "examples_palette.dcm", "MR_small_RLE.dcm"]
)
def test_the_mask_of_one_dicom_file_reads_back_equal(tmp_path, name):
    hd = pytest.importorskip("highdicom")
    view = view_of(DICOM / name)
    mask = np.zeros(view.values.shape[:2], bool)
    mask[10:30, 12:50] = True
    scan, given = (
        view.write(mask, None, None, tmp_path),
        pydicom.dcmread(DICOM / name, stop_before_pixels=True),
    )
    made = hd.seg.segread(tmp_path / "mask.dcm")
    assert scan["scan"]["mask"] == "mask.dcm" and np.array_equal(made.pixel_array, mask)
    # of the patient, the SEG has what the standard requires, and result.json nothing
    assert {element.keyword for element in made if element.tag.group in (0x10, 0x32, 0x38)} == {
        "PatientName",
        "PatientID",
        "PatientBirthDate",
        "PatientSex",
    } and made.StudyInstanceUID == given.StudyInstanceUID
    assert not {"StudyDescription", "NameOfPhysiciansReadingStudy"} & set(made.dir())
    assert not any(
        str(value) in str(scan) for key in ("PatientName", "PatientID") if (value := given.get(key))
    )


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
    view.write(np.ones(view.image.size[::-1], bool), None, None, tmp_path)
    made = hd.seg.segread(tmp_path / "mask.dcm")
    assert (
        not secret.keys() & set(made.dir())
        and b"Secret" not in (tmp_path / "mask.dcm").read_bytes()
    )
    assert (made.StudyID, made.PatientIdentityRemoved, made.PatientName) == (
        "7",
        "NO",
        "CompressedSamples^CT1",
    )
    assert made.ReferencedSeriesSequence and made.Modality == "SEG"


def test_where_no_seg_can_be_made_a_line_says_why(tmp_path, monkeypatch):
    view = view_of(DICOM / "examples_ybr_color.dcm", frame=3)
    mask = np.ones((240, 320), bool)
    if "highdicom" in sys.modules:
        assert "Frame of Reference" in view.write(mask, None, None, tmp_path)["scan"]["mask"]
    monkeypatch.setitem(sys.modules, "highdicom", None)
    scan = view.write(mask, (1, 2, 3, 4), None, tmp_path)["scan"]
    assert (
        "highdicom: pip install" in scan["mask"]
        and "bbox" not in scan
        and not [*tmp_path.iterdir()]
    )


def test_no_patients_name_is_written_with_nifti(tmp_path):
    image = nib.load(NIFTI / "anatomical.nii")
    image.header["descrip"], image.header["db_name"] = b"Doe^Jane", b"Doe^Jane"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    nib.save(image, tmp_path / "a.nii")
    view = view_of(tmp_path / "a.nii")
    scan = view.write(np.ones(view.image.size[::-1], bool), None, None, tmp_path)
    made = nib.load(tmp_path / "mask.nii.gz")
    assert (
        b"Doe" not in made.header.binaryblock
        and not made.header.extensions
        and "Doe" not in str(scan)
    )


def test_nifti_without_an_orientation_says_so_and_has_no_millimetres(tmp_path):
    image = nib.Nifti1Image(np.zeros((20, 21, 22), np.int16), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, tmp_path / "a.nii")
    view = view_of(tmp_path / "a.nii")
    scan = view.write(np.ones((21, 20), bool), (1, 2, 3, 4), None, tmp_path)["scan"]
    assert "unknown orientation" in scan["shown"] and "bbox" not in scan
    assert np.array_equal(
        nib.load(tmp_path / "mask.nii.gz").affine, nib.load(tmp_path / "a.nii").affine
    )


# ---------------------------------------------------------------- infer.py and samples.jsonl


def test_infer_asks_about_a_slice_and_writes_millimetres(ask, volumes):  # noqa: F811
    path, _, image = volumes["anatomical.nii"]
    flags = f"--image {path} --plane coronal --slice 0.25"
    status, result, said, asked, *_ = ask(
        [completion((42, 56, 84, 84), ((56, 28), (70, 63)))], flags
    )
    assert status == 0 and result["size"] == [33, 25] and result["scan"]["mask"] == "mask.nii.gz"
    made = nib.load(ask.out / "mask.nii.gz")
    assert made.shape == image.shape and np.asarray(made.dataobj).sum() == result["mask_pixels"] > 0
    x1, y1, x2, y2 = result["bbox"]
    assert np.array(result["scan"]["bbox"])[:, 0] == pytest.approx(
        [-image.affine[0] @ [x - 0.5, 0, 0, 1] for x in (x1, x2)], abs=2e-3
    )
    assert (
        result["scan"]["bbox"][0][1] == result["scan"]["points"][1][1]
    )  # all in one coronal slice
    assert "coronal slice 10 of 41, from 0, front to back" in said.out and "mask.nii.gz" in said.out
    ask([completion((42, 56, 84, 84))])  # a picture: the scan's mask is gone
    assert {file.name for file in ask.out.iterdir()} == {"mask.png", "overlay.png", "result.json"}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of input that cannot be used."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    write_series(folder / "two")
    for file in [*(folder / "two").iterdir()]:
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
        ("{bad}/none.nii --slice 3", "none.nii does not exist"),
    ],
)
def test_bad_input_is_one_line_with_status_2_and_nothing_is_written(
    bad, tmp_path, capfd, flags, says
):
    flags = flags.format(bad=bad, nifti=NIFTI, dicom=DICOM)
    (line,) = refusal(capfd, infer, "--query x --image", flags, "--out", tmp_path / "out")
    assert (
        line.startswith("error: ")
        and says in line
        and (flags.split()[0] in line or "invalid choice" in line)
    ), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "package, path", [("nibabel", NIFTI / "anatomical.nii"), ("pydicom", CT5N)]
)
def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch, package, path):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=f"needs the package {package}: pip install -r requirements-extras.txt"
    ):
        load_image(path)


def test_one_of_two_series_is_chosen_by_the_end_of_its_uid(bad):
    uids = {str(pydicom.dcmread(file).SeriesInstanceUID) for file in (bad / "two").iterdir()}
    for uid in uids:
        view = view_of(bad / "two", series=uid[-12:])
        assert view.scan.shape == SHAPE and view.scan.images[0][0].SeriesInstanceUID == uid


def test_samples_of_scans(tmp_path, volumes):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    path, _, image = volumes["thick.nii.gz"]
    (tmp_path / "images/a.nii.gz").write_bytes(path.read_bytes())
    labels = np.zeros(image.shape, np.uint8)
    labels[10:20, 30:60, 8:15] = 1
    nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "masks/a.nii.gz")
    write_series(tmp_path / "images/ct")
    own = dict(query="what?", bbox=[1, 2, 9, 12], points=[[3, 4], [5, 6]])
    rows = [
        {
            "image": "a.nii.gz",
            "mask": "a.nii.gz",
            "query": "what?",
            "scan": {"plane": plane, "slice": slice},
        }
        for plane, slice in (("axial", 10), ("coronal", 0.5))
    ]
    rows += [{"image": "ct", **own}, {"image": "ct", **own, "scan": {"slice": 2, "window": "lung"}}]
    rows += [
        {"image": "a.nii.gz", **own, "scan": scan}
        for scan in ({"slcie": 3}, 5, {"slice": [3]}, {"slice": 99}, {"plane": "x"}, {"frame": "0"})
    ]
    rows += [
        {"image": "a.nii.gz", "mask": "a.nii.gz", "query": "what?"},
        {"image": "ct", "mask": "ct.png", "query": "what?"},
    ]
    Image.fromarray(np.tri(24, 20, dtype=bool)).save(tmp_path / "masks/ct.png")
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = load_samples(tmp_path)
    assert samples[-2].mask.any() and samples[-1].mask.sum() == np.tri(24, 20).sum()
    assert np.array_equal(samples[-2].image, view_of(path).image)
    for i, (plane, n) in enumerate((("axial", 10), ("coronal", 48))):
        wanted = shown(lps(nib.Nifti1Image(labels, image.affine)).get_fdata(), plane, n) > 0
        sample = samples[i]
        assert sample.mask.any() and sample.image.size == sample.mask.shape[::-1]
        assert sample.mask.mean() == pytest.approx(wanted.mean(), rel=0.05)
        assert np.array_equal(sample.image, view_of(path, plane=plane, slice=str(n)).image)
    assert np.array_equal(samples[2].image, load_image(tmp_path / "images/ct"))
    assert not np.array_equal(samples[2].image, samples[3].image)
    for i, says in enumerate(
        ("scan", "scan", "scan", "0 to 23", "--plane is one of", "has 1 volumes"), 4
    ):
        with pytest.raises(BadRow, match="image: .*" + says):
            samples[i]


# ---------------------------------------------------------------- files from strangers


def test_a_header_that_claims_billions_of_frames_is_refused_before_memory_is_taken(tmp_path):
    header = pydicom.dcmread(DICOM / "CT_small.dcm")
    header.NumberOfFrames = 2 * 10**9
    header.save_as(tmp_path / "a.dcm")
    for frame in (None, 3):
        with pytest.raises(
            Refused, match="^claims to have 2,000,000,000 frames: 100,000 can be read at most$"
        ):
            view_of(tmp_path / "a.dcm", frame=frame)


@pytest.mark.parametrize(
    "name",
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
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
def test_a_bent_scan_is_read_or_refused_in_one_line(name, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bent")
    file = folder / "a.dcm"
    if name == "series":
        for k, source in enumerate(CT5N.iterdir()):
            file = folder / str(k)
            file.write_bytes(
                bent(source.read_bytes(), seed) if k == seed % 5 else source.read_bytes()
            )
        file = folder
    elif name.startswith("a.nii"):
        file = folder / name
        nib.save(
            nib.Nifti1Image(
                np.arange(16**3, dtype=np.int16).reshape(16, 16, 16), np.diag([2, -2, 3, 1])
            ),
            file,
        )
        data = file.read_bytes()
        file.write_bytes(bent(data[:400], seed) + data[400:] if seed % 2 else bent(data, seed))
    else:
        data = (DICOM / name).read_bytes()
        cut = (
            data.find(b"\xe0\x7f\x10\x00") if seed % 2 else 0
        )  # half of them: the header alone is bent
        file.write_bytes(bent(data[:cut], seed) + data[cut:] if cut > 0 else bent(data, seed))
    try:
        view = view_of(file)
    except ValueError as error:
        assert len(str(error).splitlines()) == 1
    else:
        if view:
            scan = view.write(
                np.ones(view.image.size[::-1], bool), (0, 0, 1, 1), ((0, 0), (1, 1)), folder
            )["scan"]
            assert scan["mask"].startswith("none") or (folder / scan["mask"]).is_file()
