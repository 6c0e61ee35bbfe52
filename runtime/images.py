"""Image and mask files, read as data only: an allow-list of formats, one-line errors."""

import io
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")  # Pillow starts no other decoder
MIN_SIDE = 14  # an image smaller than one patch of Qwen2.5-VL holds nothing to ground
MAX_RATIO = 200  # of an image's sides, the limit of Qwen's own resize
ORIENTATION = 0x0112  # the EXIF tag


def load_image(source: str | Path | bytes) -> Image.Image:
    """An upright RGB image from a file or its bytes. Depths beyond 8 bits are stretched from their own minimum and
    maximum; transparent pixels become black. ValueError, one line, for what is none of FORMATS or broken, for a
    side under 14 pixels, for NaN, and for what Pillow takes for a decompression bomb (over 89M pixels)."""
    with _opened(source) as image:
        if min(image.size) < MIN_SIDE:
            raise ValueError(
                f"is {image.width}x{image.height}: a side must have {MIN_SIDE} pixels at least"
            )
        image = ImageOps.exif_transpose(image)
        image.load()
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError("has NaN or infinite pixels; replace them by numbers")
        low, high = values.min(), values.max()
        image = Image.fromarray(np.uint8((values - low) / max(high - low, 1e-12) * 255))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.composite(rgba, Image.new("RGBA", rgba.size), rgba.getchannel("A"))
    return image.convert("RGB")


def load_mask(source: str | Path | bytes, of: str | Path | bytes | None = None) -> np.ndarray:
    """(H, W) bool: where a 0/255 image is above 127, or a 0/1 image above 0. ValueError: as load_image, several labels.
    of: the mask's image. If that is turned by EXIF, so is a mask of its stored size with no EXIF of its own."""
    with _opened(source, is_mask=True) as mask:
        has_its_own = ORIENTATION in mask.getexif()
        mask = Image.fromarray(
            np.asarray(ImageOps.exif_transpose(mask).convert("L"))
        )  # pixels only
    if of is not None and not has_its_own:
        with _opened(of) as image:
            if image.size == mask.size:
                mask.getexif()[ORIENTATION] = image.getexif().get(ORIENTATION, 1)
    values = np.asarray(ImageOps.exif_transpose(mask))
    labels = np.unique(values[values > 0])
    if len(labels) > 1 and labels[-1] <= 127:
        raise ValueError(
            f"has the labels {', '.join(map(str, labels[:5]))}: one mask per row is needed"
        )
    return values > (127 if values.max() > 127 else 0)


def headers_fit(row: dict) -> bool:
    """Whether image and mask of a row (see readers.py) are pictures of one size, before EXIF turns them, with box and
    points in pixels inside. True where no header is at hand: of bytes, functions, DICOM, NIfTI."""
    from extras.scans import is_scan

    sizes = []
    try:
        for file in (row["image"], row["mask"]):
            if isinstance(file, Path) and not is_scan(file):
                with _opened(file) as picture:
                    sizes.append(picture.size)
    except ValueError:
        return False
    corners = np.reshape([*(row["bbox"] or ()), *np.ravel(row["points"] or ())], (-1, 2))
    return not sizes or (
        sizes[0] == sizes[-1]
        and MIN_SIDE <= min(sizes[0])
        and max(sizes[0]) <= MAX_RATIO * min(sizes[0])
        and max(row["bbox"] or [2]) > 1  # else fractions
        and bool(((corners >= -1) & (corners <= np.add(sizes[0], 1))).all())
    )


@contextmanager
def _opened(source: str | Path | bytes, is_mask: bool = False):
    """A Pillow image, not yet decoded; of DICOM and NIfTI the middle slice. What readers raise for broken, hostile or
    huge files is one ValueError."""
    if not isinstance(source, bytes):
        from extras.scans import is_scan, png_bytes

        if is_scan(Path(source)):
            source = png_bytes(Path(source), {}, is_mask)
        elif not Path(source).is_file():
            raise ValueError("does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield Image.open(
                io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS
            )
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ValueError(
            f"has more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale or tile it first"
        ) from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(
            f"is not an image of the formats {', '.join(FORMATS)}, or broken ({error})"
        ) from None
