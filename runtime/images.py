"""Image and mask files, read as data only: an allow-list of formats, one-line errors.

`load_image` is the one function that reads an image, `load_mask` the one that reads a mask. A mask
file says by its numbers which pixels are the target, so its numbers are looked at before anything
is converted. Where they could be read in two ways, ValueError says so: a wrong target would be
trained on without a word.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from runtime.registry import find

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # Pillow starts no other decoder
MIN_SIDE = 14  # an image smaller than one patch of Qwen2.5-VL holds nothing to ground
MAX_RATIO = 200  # of an image's sides, the limit of Qwen's own resize

SCAN_READERS = {  # single files that Pillow cannot read: read(path, choice, is_mask, image)
    ".dcm": "extras.scans.read_png",
    ".nii": "extras.scans.read_png",
    ".nii.gz": "extras.scans.read_png",
}

Source = str | Path | bytes  # a file's path, or what is in it

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {  # its values, and what makes an image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # those that exchange width and height

FEW_COLOURS = 256  # a mask with more has been through JPEG or the like
JPEG_NOISE = 2  # of 255, between neighbours in an even area
NOISE = 4 / 255  # of full scale, what a good JPEG leaves in even areas
MIN_SOLID = (
    0.1  # of a label's pixels are the middle of an even square of 3 x 3; of JPEG's noise, fewer
)
MAX_LEFT = 48  # of 255, by which a pixel of a mask may differ from shades of its one colour

BROKEN = (  # what Pillow's decoders raise on broken files, found by fuzzing
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
)

# Pillow warns of odd tags and of sizes; what matters of it is an error here. Set once for the
# process, because warnings.catch_warnings is not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


# ---------------------------------------------------------------- images


def load_image(source: Source) -> Image.Image:
    """An upright RGB image from a file or its bytes; of a scan (DICOM, NIfTI) the middle slice.

    Numbers beyond 8 bits are stretched to black and white, see `_stretch`. Transparent pixels
    become black, as nothing is known of what lies behind them. Raises ValueError, one line, for
    what is none of FORMATS or broken, a side under MIN_SIDE pixels, several pages, NaN, an image
    without any visible pixel, 16-bit colours that 8 bits cannot show, and what Pillow takes for a
    decompression bomb (over 89M pixels).
    """
    picture = _decode(_slice_of_scan(source))
    image = picture.image
    if min(image.size) < MIN_SIDE:
        width, height = picture.stored_size
        raise ValueError(f"is {width}x{height}: a side must have {MIN_SIDE} pixels at least")
    if picture.has_deep_colours and _is_nearly_black(image):
        raise ValueError(
            "has colours of 16 bits, of which the upper 8 are nearly black; convert it to 8 bits"
        )
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_stretch(np.asarray(image, dtype=np.float64)))
    if image.has_transparency_data:
        rgba = _convert(image, "RGBA")
        alpha = rgba.getchannel("A")
        if alpha.getextrema() == (0, 0):
            raise ValueError("is transparent everywhere; save it without its alpha channel")
        black = Image.new("RGBA", rgba.size)
        image = Image.composite(rgba, black, alpha)
    return _convert(image, "RGB")


def _stretch(values: np.ndarray) -> np.ndarray:
    """(H, W) numbers of any range -> uint8, from their minimum to their maximum.

    An end that lies farther from the middle 99.8 % of the pixels than these are wide is a defect,
    such as one hot pixel at 65,535 in an image of 12 bits. It would blacken all others, so the
    stretch stops before it.
    """
    if not np.isfinite(values).all():
        raise ValueError("has NaN or infinite pixels; replace them by numbers")
    low, high = values.min(), values.max()
    usual_low = np.percentile(values, 0.1, method="higher")
    usual_high = np.percentile(values, 99.9, method="lower")
    usual_width = usual_high - usual_low
    if usual_width > 0 and usual_low - low > usual_width:
        low = usual_low
    if usual_width > 0 and high - usual_high > usual_width:
        high = usual_high
    width = max(high - low, 1e-12)
    return np.uint8((values.clip(low, high) - low) / width * 255)


def _is_nearly_black(image: Image.Image) -> bool:
    """Whether no colour of an 8-bit image reaches half of white. Its alpha does not count."""
    extrema = [
        image.getchannel(band).getextrema() for band in image.getbands() if band not in ("A", "a")
    ]
    return max(high for _, high in extrema) < 128


# ---------------------------------------------------------------- masks


def load_mask(source: Source, of: Source | None = None) -> np.ndarray:
    """(H, W) bool, upright: the target of a mask file or its bytes. One file has one target.

    of: the mask's image. If that is turned by EXIF, a mask of its stored size is turned with it,
    unless the mask has an orientation of its own. Raises ValueError, one line, as load_image, and
    for several labels.
    """
    picture = _decode(_slice_of_scan(source, is_mask=True, of=of))
    if picture.has_deep_colours:
        raise ValueError("has colours of 16 bits; save the mask as grey of 8 or 16 bits")
    mask = _target(picture.image, picture.is_jpeg)
    if of is None or picture.orientation is not None:
        return mask
    orientation, stored_size = _orientation_and_size(of)
    if stored_size != picture.stored_size or orientation not in TURNS:
        return mask
    return np.asarray(Image.fromarray(mask).transpose(TURNS[orientation]))


def _target(image: Image.Image, is_jpeg: bool) -> np.ndarray:
    """(H, W) bool: which pixels of a decoded mask are meant, by the kind of its numbers."""
    if image.mode == "P":
        return _target_of_palette(image)
    if image.mode.startswith(("I", "F")):
        return _target_of_greys(np.asarray(image))
    if image.has_transparency_data:
        return _target_of_alpha(np.asarray(_convert(image, "RGBA")))
    if image.mode in ("1", "L"):
        return _target_of_greys(np.asarray(image), is_jpeg)
    return _target_of_colours(np.asarray(_convert(image, "RGB")), is_jpeg)


def _target_of_greys(values: np.ndarray, is_jpeg: bool = False) -> np.ndarray:
    """(H, W) numbers, as stored -> bool.

    One number besides 0 is the target, whatever it is. Several are a mask from 0 to full scale with
    soft edges, cut at half, or labels, which ValueError names.
    """
    if not np.isfinite(values).all():
        raise ValueError("has NaN or infinite pixels; replace them by numbers")
    numbers = np.unique(values)
    labels = numbers[numbers != 0]
    full = _full_scale(values.dtype, numbers[-1])
    if numbers[0] < 0:  # as -1 for "do not care": the background is not what is left
        raise _several(labels)
    if len(labels) <= 1:
        return values > 0
    if full is None:
        raise _several(labels)
    if _are_labels(values, full, is_jpeg):
        filled = np.unique(values[_filled(values)])
        raise _several(filled[filled != 0] if len(labels) > 5 else labels)
    return values > full / 2


def _full_scale(kind: np.dtype, highest: float) -> float | None:
    """The number that stands for "all of this pixel" in a mask with soft edges; None where there is
    none.

    It is the end of a usual range whose upper half is in use: 1.0 of a float, 8 bits, 16 bits.
    """
    if kind.kind == "f" and highest <= 1:
        return 1.0
    for full in (255, 65535):
        if full / 2 < highest <= full:
            return full
    return None


def _are_labels(values: np.ndarray, full: float, is_jpeg: bool) -> bool:
    """Whether an (H, W) mask of several numbers from 0 to full is a map of labels.

    A half tone (in 8 bits 32 to 223) that fills a square of 3 x 3 pixels is a label. Blurring,
    resizing and JPEG give many half tones, but lines of them; where a slow gradient turns, a square
    may be even, but then what is around it is nearly the same.

    Without any half tone there is no soft edge. Then further numbers near 0 or near full scale are
    labels, as 0, 1 and 255, if they fill squares. JPEG leaves noise there, but on both sides, and
    little of it is even.
    """
    low, high = full / 8, full * 7 / 8
    halftone = (values > low) & (values < high)
    filled = _filled(values)
    if is_jpeg:
        filled = maximum_filter(values, 3) - minimum_filter(values, 3) <= JPEG_NOISE
    squares = filled & halftone
    if squares.any():
        around = maximum_filter(values, 5).astype(float) - minimum_filter(values, 5)
        is_gradient = (around > 0) & (around < low)
        return bool((squares & ~is_gradient).any())
    if halftone.any() or is_jpeg:
        return False
    lowest, highest = values.min(), values.max()
    near_black = (values > lowest) & (values <= low)
    near_white = (values > lowest) & (values < highest) & (values >= high)
    near = near_black | near_white
    if near_black.any() and near_white.any():
        near &= (values > NOISE * full) & (values < full - NOISE * full)
    return bool(near.any() and filled[near].mean() > MIN_SOLID)


def _filled(values: np.ndarray) -> np.ndarray:
    """(H, W) bool: the middles of squares of 3 x 3 pixels, all inside, that have one number."""
    middle = values[:, 1:-1]
    across = (values[:, :-2] == middle) & (middle == values[:, 2:])
    down = (middle[:-2] == middle[1:-1]) & (middle[1:-1] == middle[2:])
    filled = np.zeros(values.shape, bool)
    filled[1:-1, 1:-1] = across[:-2] & across[1:-1] & across[2:] & down
    return filled


def _several(labels: np.ndarray) -> ValueError:
    """The error of a file with several labels: numbers, or rows of red, green, blue."""
    named = [str(tuple(label.tolist())) if np.ndim(label) else f"{label:g}" for label in labels[:5]]
    return ValueError(f"has the labels {', '.join(named)}: one mask per row is needed")


def _target_of_palette(image: Image.Image) -> np.ndarray:
    """A palette image -> (H, W) bool.

    A palette's colours are there to tell labels apart, so its indices are the labels and 0 is the
    background. Two kinds of file only use a palette to be small: a grey mask, of which the greys
    count, and a shape of one colour, of which the alpha counts.
    """
    indices = np.asarray(image)
    used, first = np.unique(indices, return_index=True)
    colours = np.asarray(_convert(image, "RGBA")).reshape(-1, 4)[first].astype(int)
    greys, alpha = colours[:, 0], colours[:, 3]
    brightness = colours[:, :3].max(axis=1) * alpha // 255
    table = np.zeros(256, np.uint8)
    if (colours[:, :3] == colours[0, :3]).all() and len(np.unique(alpha)) > 1:
        table[used] = alpha
        return _target_of_greys(table[indices])
    if len(used) > 1 and used[0] == 0 and brightness[0] > 127 and (brightness[1:] < 32).all():
        raise ValueError(
            "has a palette whose background, index 0, is bright and whose labels are black or "
            "transparent; save it as grey, 255 on the target"
        )
    is_grey = (colours[:, :3] == greys[:, None]).all() and (alpha == 255).all()
    if is_grey and len(np.unique(greys)) == len(used):
        table[used] = greys
        return _target_of_greys(table[indices])
    labels = used[used != 0]
    if len(labels) > 1:
        raise _several(labels)
    return indices > 0


def _target_of_alpha(rgba: np.ndarray) -> np.ndarray:
    """(H, W, 4) uint8 -> bool.

    Where all that can be seen has one colour, the shape is in the alpha; otherwise the colours are
    looked at, over black.
    """
    colours, alpha = rgba[..., :3], rgba[..., 3]
    if not alpha.any():
        raise ValueError("is transparent everywhere; save the mask as grey, 255 on the target")
    if alpha.min() == alpha.max():
        return _target_of_colours(colours)
    visible = colours[alpha > 0]
    hidden = colours[alpha == 0]
    if (visible == visible[0]).all():
        if visible[0].max() < 32 and hidden.max(initial=0) > 127:
            raise ValueError(
                "is black where it is opaque and bright where it is transparent; save the mask as "
                "grey, 255 on the target"
            )
        return _target_of_greys(alpha)
    over_black = np.uint8(np.round(colours * (alpha[..., None] / 255)))
    return _target_of_colours(over_black)


def _target_of_colours(rgb: np.ndarray, is_jpeg: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 -> bool: one colour on black, with soft edges or without.

    Each colour is taken apart: how much of the commonest bright colour it has, which is its grey,
    and what is left. In a file of few colours nothing may be left; JPEG blurs colours at edges, so
    in a file of many only what fills a square counts.
    """
    if (rgb == rgb[..., :1]).all():
        return _target_of_greys(rgb[..., 0], is_jpeg)
    red, green, blue = np.moveaxis(rgb.astype(np.int32), 2, 0)
    codes = red << 16 | green << 8 | blue
    used, counts = np.unique(codes, return_counts=True)
    colours = np.stack([used >> 16, used >> 8 & 255, used & 255], axis=1)
    brightness = colours.max(axis=1)
    labels = colours[used != 0]
    if len(labels) == 1:
        return codes != 0
    if brightness.max() <= 127:
        raise _several(labels)
    bright = np.flatnonzero(brightness >= 7 / 8 * brightness.max())
    main = colours[bright[counts[bright].argmax()]]
    share = colours @ main / (main @ main)
    left = abs(colours - share[:, None] * main).max(axis=1)
    other = left > MAX_LEFT
    if len(used) > FEW_COLOURS:
        other &= np.isin(used, codes[_filled(codes)])
    if other.any():
        raise _several(np.stack([main, *colours[other]]))
    is_grey = main.max() - main.min() <= MAX_LEFT
    full = main.max() if is_grey else 255  # a grey is as bright as it is; a colour stands for white
    greys = np.uint8(np.round(share * full).clip(0, 255))
    return _target_of_greys(greys[np.searchsorted(used, codes)], is_jpeg)


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class _Picture:
    """A decoded file. image is upright; orientation is None where the file has no such tag."""

    image: Image.Image
    orientation: int | None
    stored_size: tuple[int, int]
    has_deep_colours: bool
    is_jpeg: bool


def _decode(source: Source) -> _Picture:
    """The pixels of a file in the mode in which they are stored, upright. ValueError: one line."""
    with _opened(source) as image:
        has_pages = _has_pages_of_one_size(image)
        has_deep_colours = _has_deep_colours(image)
        is_jpeg = image.format in ("JPEG", "MPO")
        if has_pages:
            loaded, orientation = image, None
        else:
            loaded, orientation = _load_upright(image)
    if has_pages:
        raise ValueError("has several pages or frames of one size; save the one that is meant")
    stored_size = _stored_size(loaded.size, orientation)
    return _Picture(loaded, orientation, stored_size, has_deep_colours, is_jpeg)


def _load_upright(image: Image.Image) -> tuple[Image.Image, int | None]:
    """(the decoded image, upright, and the orientation that it had, or None).

    Not ImageOps.exif_transpose: it writes all tags back, which fails where one of them is odd, and
    only the orientation matters here.
    """
    if image.format == "TIFF":
        orientation = _orientation_of(image)
        _keep_only_orientation(image, orientation)
        image.load()  # Pillow turns a TIFF by itself
        return image, orientation
    image.load()  # the tags of a PNG may come after its pixels
    orientation = _orientation_of(image)
    if orientation in TURNS:
        return image.transpose(TURNS[orientation]), orientation
    return image, orientation


def _orientation_of(image: Image.Image) -> int | None:
    """The orientation, 1 to 8, of an image by its EXIF or XMP; None where there is none to read."""
    found = []
    with suppress(*BROKEN):
        if image.format == "TIFF":
            found.append(image.tag_v2.get(ORIENTATION))
        else:
            found.append(_orientation_in(image.info["exif"]))
    with suppress(*BROKEN):  # Pillow looks in more places, but loses all tags after an odd one
        found.append(image.getexif().get(ORIENTATION))
    for value in found:
        for known in range(1, 9):
            if value == known:
                return known
    return None


def _orientation_in(exif: bytes) -> int | None:
    """The number of the tag in the first directory of EXIF, None where it has none."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = "<" if exif[:2] == b"II" else ">"
    (directory,) = struct.unpack_from(f"{order}I", exif, 4)
    (count,) = struct.unpack_from(f"{order}H", exif, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
        if tag == ORIENTATION:
            number = {3: "H", 4: "I"}[kind]
            return struct.unpack_from(f"{order}{number}", exif, entry + 8)[0]
    return None


def _keep_only_orientation(image: Image.Image, orientation: int | None) -> None:
    """Take all other tags from a TIFF before Pillow follows them to turn it."""
    with suppress(*BROKEN):
        image.getexif()  # reads them, up to an odd one
    tags = image.getexif()  # returns what was read
    for tag in list(tags):
        del tags[tag]
    if orientation is not None:
        tags[ORIENTATION] = orientation


def _orientation_and_size(source: Source) -> tuple[int | None, tuple[int, int]]:
    """(orientation or None, width and height as stored) of an image, from its header.

    A scan has no orientation.
    """
    if not isinstance(source, bytes) and is_scan(Path(source)):
        return None, (0, 0)
    with _opened(source) as image:
        orientation = _orientation_of(image)
        size = image.size
        if image.format != "TIFF":
            return orientation, size
    return orientation, _stored_size(size, orientation)  # Pillow exchanges the sides of a TIFF


def _stored_size(upright: tuple[int, int], orientation: int | None) -> tuple[int, int]:
    if orientation in SIDEWAYS:
        return upright[1], upright[0]
    return upright


def _has_pages_of_one_size(image: Image.Image) -> bool:
    """Whether a second page or frame has the size of the first, so that nobody knows which one is
    meant.

    The pages of a pyramid are the same picture in other sizes, and those of a JPEG (MPO) are
    previews.
    """
    if image.format in ("GIF", "WEBP", "PNG"):
        return getattr(image, "n_frames", 1) > 1
    if image.format != "TIFF":
        return False
    size, found, page = image.size, False, 0
    with suppress(*BROKEN):  # EOFError after the last; a page that cannot be read is none
        while not found:
            page += 1
            image.seek(page)
            found = image.size == size
    image.seek(0)
    return found


def _has_deep_colours(image: Image.Image) -> bool:
    """Whether the file has colours, or grey with alpha, of more than 8 bits: Pillow keeps the upper
    8 of them.
    """
    if len(image.getbands()) == 1 or not image.tile:
        return False
    decoder, _, _, args = image.tile[0]
    if decoder.startswith("ppm"):
        return args[-1] > 255
    return bool(re.search(r"\b(RGB[AXa]?|LA|CMYK);16[BLN]", str(args)))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    try:
        return image.convert(mode)
    except BROKEN as error:
        raise ValueError(f"has pixels of the kind {image.mode} ({error}); save it as RGB") from None


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image]:
    """A Pillow image, not yet decoded.

    What Pillow raises for broken, hostile or huge files is one ValueError; inside the block there
    must be only Pillow's work.
    """
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise ValueError("does not exist")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        most = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"has more than {most} pixels; scale or tile it first") from None
    except BROKEN as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"is not an image of the formats {', '.join(FORMATS)}, or broken ({reason})"
        ) from None


# ---------------------------------------------------------------- scans


def is_scan(path: Path) -> bool:
    """Whether a path is for SCAN_READERS: a folder, which is a DICOM series, a file with one of
    their endings, or one that begins as DICOM does.
    """
    return _scan_ending(path) is not None


def read_scan(path: Path, choice: dict, is_mask: bool = False, image: Path | None = None) -> bytes:
    """One slice of a scan as PNG. choice: {"slice": 45} and the like, for the reader of the scan.

    A mask may be an ordinary picture beside a scan; its bytes are returned as they are. image: the
    file of a mask's image, where its reader may want to compare positions.
    """
    ending = _scan_ending(path)
    if ending is None and (is_mask or not choice):
        return path.read_bytes()
    if ending is None:
        raise ValueError('is neither DICOM nor NIfTI; leave out "scan"')
    return find(SCAN_READERS[ending])(path, choice, is_mask, image)


def _scan_ending(path: Path) -> str | None:
    if path.is_dir():
        return ".dcm"
    if not path.is_file():
        return None
    for ending in SCAN_READERS:
        if path.name.lower().endswith(ending):
            return ending
    with path.open("rb") as file:
        begins_as_dicom = file.read(132)[128:] == b"DICM"
    return ".dcm" if begins_as_dicom else None


def _slice_of_scan(source: Source, is_mask: bool = False, of: Source | None = None) -> Source:
    """The PNG of a scan's middle slice; any other source as it is."""
    if isinstance(source, bytes) or not is_scan(Path(source)):
        return source
    image = Path(of) if isinstance(of, (str, Path)) else None
    return read_scan(Path(source), {}, is_mask, image)


# ---------------------------------------------------------------- without decoding


def headers_fit(row: dict) -> bool:
    """Whether image and mask of a row (see readers.py) are pictures of one page and one size,
    before EXIF turns them, with box and points in pixels inside. True where no header is at hand:
    of bytes, functions, scans.
    """
    sizes = []
    for file in (row["image"], row["mask"]):
        if not isinstance(file, Path) or is_scan(file):
            continue
        try:
            with _opened(file) as picture:
                size = picture.size
                has_pages = _has_pages_of_one_size(picture)
        except ValueError:
            return False
        if has_pages:
            return False
        sizes.append(size)
    if not sizes:
        return True
    width, height = sizes[0]
    if sizes[-1] != sizes[0] or min(width, height) < MIN_SIDE:
        return False
    if max(width, height) > MAX_RATIO * min(width, height):
        return False
    bbox = row["bbox"] or []
    points = row["points"] or []
    if bbox and max(bbox) <= 1:  # fractions
        return False
    corners = np.reshape([*bbox, *np.ravel(points)], (-1, 2))
    return bool(((corners >= -1) & (corners <= np.add(sizes[0], 1))).all())
