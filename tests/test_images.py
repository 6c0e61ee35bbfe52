"""One function reads a mask, one an image: what the numbers of a file mean, and odd files.

FUZZ_FILES=3000 pytest tests/test_images.py -k fuzz        # so many per format, not 40
"""

import io
import os
import random
import struct
import zlib

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image, ImageFilter

from runtime.images import headers_fit, load_image, load_mask

ONE = np.zeros((64, 64), bool)
ONE[10:30, 10:30] = True
TWO = np.zeros((64, 64), int)
TWO[10:30, 10:30] = 1
TWO[40:60, 40:60] = 2
BORDER = np.zeros((64, 64), int)  # label 1 with a border of 2 pixels that has label 2
BORDER[8:32, 8:32] = 2
BORDER[10:30, 10:30] = 1


def encoded(image, kind="PNG", **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def recoloured(labels, *values, kind=np.uint8):
    """(H, W) labels 0, 1, 2 -> the values, numbers or colours, of the same places."""
    return np.array(values, kind)[labels]


# ---------------------------------------------------------------- files that Pillow does not write


def exif(*entries, order="<"):
    """EXIF of raw entries (tag, type, count, four bytes or more)."""
    ifd, rest = struct.pack(f"{order}H", len(entries)), b""
    start = 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, payload in sorted(entries):
        if len(payload) > 4:
            offset = struct.pack(f"{order}I", start + len(rest))
            rest += payload
            payload = offset
        ifd += struct.pack(f"{order}HHI", tag, kind, count) + payload.ljust(4, b"\0")
    mark = b"II" if order == "<" else b"MM"
    header = mark + struct.pack(f"{order}HI", 42, 8)
    return b"Exif\0\0" + header + ifd + bytes(4) + rest


def turned_by(orientation):
    return 0x0112, 3, 1, struct.pack("<H", orientation)


def tiff(*pages, entries=()):
    """An uncompressed TIFF of (H, W) or (H, W, 3 or 4) pages, with raw entries in each."""
    data, links = bytearray(b"II*\0\0\0\0\0"), [4]
    for page in pages:
        page = np.ascontiguousarray(page)
        channels = 1 if page.ndim == 2 else page.shape[2]
        strip = len(data)
        data += page.tobytes()
        sample = {"u": 1, "i": 2, "f": 3}[page.dtype.kind]
        numbers = [
            (256, 3, [page.shape[1]]),
            (257, 3, [page.shape[0]]),
            (258, 3, [8 * page.itemsize] * channels),
            (259, 3, [1]),
            (262, 3, [2 if channels > 1 else 1]),
            (273, 4, [strip]),
            (277, 3, [channels]),
            (278, 3, [page.shape[0]]),
            (279, 4, [page.nbytes]),
            (339, 3, [sample] * channels),
        ]
        if channels == 4:
            numbers.append((338, 3, [2]))
        own = [
            (tag, kind, len(values), struct.pack(f"<{len(values)}{' HHI'[kind - 1]}", *values))
            for tag, kind, values in numbers
        ]
        own = [entry for entry in own if entry[0] not in {odd[0] for odd in entries}]
        own = sorted([*own, *entries])
        start = len(data)
        data[links[-1] : links[-1] + 4] = struct.pack("<I", start)
        ifd, rest = struct.pack("<H", len(own)), b""
        after = start + 2 + 12 * len(own) + 4
        for tag, kind, count, payload in own:
            if len(payload) > 4:
                offset = struct.pack("<I", after + len(rest))
                rest += payload
                payload = offset
            ifd += struct.pack("<HHI", tag, kind, count) + payload.ljust(4, b"\0")
        links.append(start + len(ifd))
        data += ifd + bytes(4) + rest
    return bytes(data)


def png16(pixels):
    """A PNG of 16 bits per channel from an (H, W, 2 to 4) array."""
    kind = {2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels.astype(">u2"))

    def chunk(name, body):
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# ---------------------------------------------------------------- the orientation of EXIF


ODD = {
    "a rational -1/0": (0x011A, 10, 1, struct.pack("<ii", -1, 0)),
    "text in a number": (0x0100, 2, 4, b"abc\0"),
    "a number in a text": (0x010E, 4, 1, struct.pack("<I", 7)),
    "a directory that is text": (0x8769, 2, 4, b"abc\0"),
    "an unknown type": (0x9999, 99, 1, b"\1\2\3\4"),
    "a double that is NaN": (0x9998, 12, 1, struct.pack("<d", np.nan)),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_tag_is_no_reason_to_lose_a_file_or_its_orientation(kind, odd):
    picture = np.asarray(noise_image(40, 30))
    entries = turned_by(6), ODD[odd]
    if kind == "TIFF":
        if ODD[odd][0] == 0x0100:
            pytest.skip("this tag is the width of a TIFF, without which there is no picture")
        data = tiff(picture, entries=entries)
    else:
        data = encoded(picture, kind, exif=exif(*entries))
    image = np.asarray(load_image(data)).astype(int)
    upright = np.rot90(picture, -1).astype(int)
    assert image.shape == upright.shape
    if kind in ("PNG", "TIFF"):
        assert np.array_equal(image, upright)
    mask = np.zeros((30, 40), np.uint8)
    mask[5:10, 5:25] = 255
    assert np.array_equal(load_mask(encoded(mask), of=data), np.rot90(mask, -1) > 0)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(value):
    picture = noise_image(40, 30)
    data = encoded(picture, exif=exif(turned_by(value)))
    assert np.array_equal(load_image(data), picture)


# ---------------------------------------------------------------- masks: label maps


VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0] + [0] * (3 * 252) + [224, 224, 192]


def palette(labels, colours):
    image = Image.fromarray(labels.astype(np.uint8))
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(colours)
    return image


@pytest.mark.parametrize(
    "mask, named",
    [
        (palette(recoloured(BORDER, 0, 1, 255), VOC), "1, 255"),
        (palette(TWO, VOC), "1, 2"),
        (recoloured(BORDER, 0, 1, 255), "1, 255"),  # the same labels as grey
        (recoloured(BORDER, 0, 15, 255), "15, 255"),
        (recoloured(TWO, 0, 254, 255), "254, 255"),
        (recoloured(TWO, 0, 3, 150), "3, 150"),
        (recoloured(TWO, 255, 128, 0), "128, 255"),  # optic disc and cup, as REFUGE has them
        (recoloured(TWO, 0, 128, 255), "128, 255"),
        (recoloured(TWO, 0, 85, 170), "85, 170"),
        (recoloured(TWO, (0, 0, 0), (255, 0, 0), (0, 255, 0)), r"\(255, 0, 0\)"),
        (recoloured(TWO, (255, 255, 255), (255, 0, 0), (255, 0, 0)), r"\(255, 255, 255\)"),
        (recoloured(TWO, (0, 0, 0), (128, 0, 0), (0, 0, 128)), "128"),
        (recoloured(TWO, (0, 0, 0), (1, 0, 0), (2, 0, 0)), r"\(1, 0, 0\), \(2, 0, 0\)"),
        (recoloured(TWO, 0, 1000, 2000, kind=np.uint16), "1000, 2000"),
        (recoloured(TWO, 0, 1, 300, kind=np.uint16), "1, 300"),
        (recoloured(TWO, 0, 300, 65535, kind=np.uint16), "300, 65535"),
        (recoloured(TWO, 0, 70_000, 80_000, kind=np.int32), "70000, 80000"),
        (recoloured(TWO, 0, 0.3, 0.9, kind=np.float32), "0.3, 0.9"),
        (recoloured(TWO, 0, -1, 1, kind=np.float32), "-1, 1"),
        (recoloured(TWO, (0, 0, 0, 255), (255, 0, 0, 255), (0, 0, 255, 255)), "255"),
        (recoloured(TWO, (0, 0, 0, 0), (255, 0, 0, 255), (0, 0, 255, 255)), "255"),
    ],
)
def test_several_labels_are_named_and_never_united(mask, named):
    kind = "TIFF" if isinstance(mask, np.ndarray) and mask.dtype.kind in "fi" else "PNG"
    with pytest.raises(ValueError, match=f"has the labels .*{named}.*one mask per row is needed"):
        load_mask(encoded(mask, kind))


@pytest.mark.parametrize("high", [1, 7, 38, 128, 200, 255])
def test_one_label_is_the_target_whatever_its_number(high):
    label = np.uint8(ONE * high)
    colour = np.uint8(ONE[..., None] * [high, 0, high // 2])
    files = {
        "grey": encoded(label),
        "palette": encoded(palette(label, [5, 5, 70, *range(1, 256), *[9] * 510][:768])),
        "VOC palette": encoded(palette(label, VOC)),
        "colour": encoded(colour),
        "16 bits": encoded(label.astype(np.uint16) * 257),
        "32 bits": encoded(label.astype(np.int32) * 70_000, "TIFF"),
        "float": encoded(np.float32(ONE * high * 0.9), "TIFF"),
        "alpha": encoded(np.dstack([colour * 0 + 255, label])),
        "black alpha": encoded(np.dstack([colour * 0, label])),
        "grey alpha": encoded(
            Image.merge("LA", [Image.new("L", (64, 64), 80), Image.fromarray(label)])
        ),
    }
    for name, data in files.items():
        assert np.array_equal(load_mask(data), ONE), name


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF"])
def test_a_palette_that_only_makes_a_grey_mask_small_counts_as_its_greys(kind):
    soft = Image.fromarray(np.uint8(ONE) * 255).filter(ImageFilter.GaussianBlur(1.5))
    wanted = np.asarray(soft) > 127
    shuffled = np.random.default_rng(0).permutation(256)
    indices = Image.fromarray(np.argsort(shuffled).astype(np.uint8)[np.asarray(soft)])
    small = palette(np.asarray(indices), np.repeat(shuffled, 3).tolist())
    assert np.array_equal(load_mask(encoded(small, kind)), wanted)
    assert np.array_equal(load_mask(encoded(soft.convert("P"), kind)), wanted)


@pytest.mark.parametrize("colours", [[255, 255, 255, 0, 0, 0], [250, 250, 250, 8, 8, 8]])
def test_a_palette_with_a_bright_background_is_not_guessed_at(colours):
    with pytest.raises(ValueError, match="palette whose background, index 0, is bright"):
        load_mask(encoded(palette(ONE, colours)))


def test_alpha_and_colours_that_contradict_each_other_are_not_guessed_at():
    contradiction = recoloured(ONE * 1, (0, 0, 0, 255), (255, 255, 255, 0))
    with pytest.raises(
        ValueError, match="black where it is opaque and bright where it is transparent"
    ):
        load_mask(encoded(contradiction))
    with pytest.raises(ValueError, match="transparent everywhere"):
        load_mask(encoded(recoloured(ONE * 1, (0, 0, 0, 0), (255, 255, 255, 0))))


def test_the_colours_of_transparent_pixels_do_not_count():
    hidden = recoloured(TWO, (0, 0, 0, 255), (255, 255, 255, 255), (255, 255, 255, 0))
    assert np.array_equal(load_mask(encoded(hidden)), TWO == 1)


def test_masks_of_16_bit_colours_are_named():
    deep = png16(recoloured(TWO, (0, 0, 0), (200, 200, 200), (65535,) * 3, kind=np.uint16))
    with pytest.raises(ValueError, match="colours of 16 bits; save the mask as grey"):
        load_mask(deep)


def test_a_16_bit_or_float_mask_with_soft_edges_is_cut_at_half():
    soft = np.asarray(Image.fromarray(np.uint8(ONE) * 255).filter(ImageFilter.GaussianBlur(2)))
    assert np.array_equal(load_mask(encoded(soft.astype(np.uint16) * 257)), soft > 127)
    assert np.array_equal(load_mask(encoded(np.float32(soft / 255), "TIFF")), soft > 127)
    broken = np.float32(soft / 255)
    broken[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        load_mask(encoded(broken, "TIFF"))


def test_blurred_resized_and_compressed_masks_are_no_label_maps():
    rng = np.random.default_rng(0)
    for i in range(120):
        x, y, w, h = rng.integers(10, 60, 4)
        mask = Image.new("L", (130, 130))
        mask.paste(255, (int(x), int(y), int(x + w), int(y + h)))
        steps = {
            0: lambda m: m.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 3))),
            1: lambda m: m.resize(tuple(rng.integers(60, 260, 2)), int(rng.integers(2, 6))),
            2: lambda m: m.rotate(rng.uniform(0, 90), Image.Resampling.BICUBIC),
        }
        mask = steps[i % 3](mask)
        kind = ("PNG", "JPEG", "WEBP")[i // 3 % 3]
        quality = {} if kind == "PNG" else {"quality": int(rng.integers(60, 100))}
        wanted = np.asarray(mask) > 127
        found = load_mask(encoded(mask.convert(("L", "RGB")[i % 2]), kind, **quality))
        assert (found & wanted).sum() / (found | wanted).sum() > 0.9


# ---------------------------------------------------------------- images: depth, alpha


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_colours_that_8_bits_would_blacken_are_named_and_full_ones_are_read(channels):
    ramp = np.arange(40 * 30).reshape(30, 40, 1) * np.ones(channels)
    deep = np.uint16(ramp * 3)
    full = np.uint16(ramp * 54)
    if channels != 3:
        deep[..., -1] = full[..., -1] = 65535
    with pytest.raises(
        ValueError, match="colours of 16 bits, of which the upper 8 are nearly black"
    ):
        load_image(png16(deep))
    seen = np.asarray(load_image(png16(full))).astype(int)
    assert abs(seen[..., 0] - full[..., 0] // 257).max() <= 1


def test_deep_colours_of_tiff_and_ppm_are_seen():
    dark = np.uint16(np.arange(40 * 30).reshape(30, 40, 1) * np.ones(3))
    ppm = b"P6 40 30 65535\n" + dark.astype(">u2").tobytes()
    for data in (tiff(dark), ppm):
        with pytest.raises(ValueError, match="colours of 16 bits"):
            load_image(data)


@pytest.mark.parametrize("hot", [[65535], [65535, 60000, 65535], [0, 65535]])
def test_hot_and_dead_pixels_do_not_blacken_an_image_of_12_bits(hot):
    rng = np.random.default_rng(0)
    values = rng.integers(20_000, 24_096, (64, 64), dtype=np.uint16)
    clean = np.asarray(load_image(encoded(values))).astype(int)
    values[0, : len(hot)] = hot
    seen = np.asarray(load_image(encoded(values))).astype(int)
    assert abs(seen[1:] - clean[1:]).max() <= 2
    assert seen[0, len(hot) - 1, 0] == 255


def test_a_small_bright_object_keeps_its_shades():
    values = np.random.default_rng(0).integers(0, 200, (64, 64), dtype=np.uint16)
    values[20:26, 20:26] = np.arange(36).reshape(6, 6) * 100 + 1000  # 0.9 % of the pixels
    seen = np.asarray(load_image(encoded(values)))[..., 0]
    assert len(np.unique(seen[20:26, 20:26])) > 30


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_image_that_is_transparent_everywhere_is_named(mode):
    image = noise_image(40, 30).convert(mode)
    image.putalpha(0)
    with pytest.raises(ValueError, match="transparent everywhere"):
        load_image(encoded(image))
    image.putalpha(Image.linear_gradient("L").resize((40, 30)))
    assert np.asarray(load_image(encoded(image)))[-1].any()


# ---------------------------------------------------------------- pages


def stacks():
    pages = [noise_image(40, 30, seed) for seed in range(2)]
    more = dict(save_all=True, append_images=pages[1:])
    yield "TIFF", encoded(pages[0], "TIFF", **more)
    yield "GIF", encoded(pages[0], "GIF", **more)
    yield "WEBP", encoded(pages[0], "WEBP", **more)
    yield "PNG", encoded(pages[0], "PNG", **more)


@pytest.mark.parametrize("kind, data", list(stacks()))
def test_a_stack_or_an_animation_is_named_for_images_and_masks(tmp_path, kind, data):
    for load in (load_image, load_mask):
        with pytest.raises(ValueError, match="several pages or frames of one size"):
            load(data)
    file = tmp_path / "stack"
    file.write_bytes(data)
    row = {"image": file, "mask": None, "bbox": [1, 2, 9, 9], "points": [[3, 4], [5, 6]]}
    assert not headers_fit(row)  # so the check before a run decodes it and names it


def test_pyramids_and_previews_are_one_picture():
    picture = noise_image(40, 30)
    small = np.asarray(picture.resize((20, 15)))
    assert np.array_equal(load_image(tiff(np.asarray(picture), small)), picture)
    mpo = encoded(picture, "MPO", save_all=True, append_images=[picture])
    assert load_image(mpo).size == (40, 30)


def test_a_broken_second_page_does_not_cost_the_first():
    picture = noise_image(40, 30)
    data = bytearray(tiff(np.asarray(picture)))
    count = struct.unpack_from("<H", data, struct.unpack_from("<I", data, 4)[0])[0]
    end = struct.unpack_from("<I", data, 4)[0] + 2 + 12 * count
    data[end : end + 4] = struct.pack("<I", 10**6)
    assert np.array_equal(load_image(bytes(data)), picture)


# ---------------------------------------------------------------- fuzz


FUZZ_FILES = int(os.environ.get("FUZZ_FILES", 40))
KINDS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM")
PLACES = {  # orientation -> where EXIF shows the stored pixel (x, y) of a W x H picture
    1: lambda x, y, W, H: (x, y),
    2: lambda x, y, W, H: (W - 1 - x, y),
    3: lambda x, y, W, H: (W - 1 - x, H - 1 - y),
    4: lambda x, y, W, H: (x, H - 1 - y),
    5: lambda x, y, W, H: (y, x),
    6: lambda x, y, W, H: (H - 1 - y, x),
    7: lambda x, y, W, H: (H - 1 - y, W - 1 - x),
    8: lambda x, y, W, H: (y, W - 1 - x),
}


def slowly_turned(pixels, orientation):
    H, W = len(pixels), len(pixels[0])
    shown = {}
    for y in range(H):
        for x in range(W):
            shown[PLACES[orientation](x, y, W, H)] = pixels[y][x]
    width, height = max(x for x, _ in shown) + 1, max(y for _, y in shown) + 1
    return [[shown[x, y] for x in range(width)] for y in range(height)]


def slow_target(labels, orientation):
    """The reference reader of a mask, of the labels written: None where there are several."""
    pixels = slowly_turned(labels.tolist(), orientation)
    if len({label for row in pixels for label in row} - {0}) > 1:
        return None
    return [[label != 0 for label in row] for row in pixels]


def slow_pixel(value, mode, low, high, colours):
    """The reference reader of an image: one stored value -> (red, green, blue)."""
    if mode == "1":
        return (255 * value,) * 3
    if mode == "L":
        return (value,) * 3
    if mode == "P":
        return tuple(colours[3 * value : 3 * value + 3])
    if mode == "LA":
        return (round(value[0] * value[1] / 255),) * 3
    if mode == "RGBA":
        return tuple(round(v * value[3] / 255) for v in value[:3])
    if mode == "RGB":
        return tuple(value)
    return (int((value - low) / (high - low) * 255),) * 3  # 16 bits, 32 bits, float


def has_square(labels, label, side):
    """Whether a label can be seen as a square: thinner ones look like soft edges."""
    H, W = labels.shape
    for y in range(H - side + 1):
        for x in range(W - side + 1):
            if (labels[y : y + side, x : x + side] == label).all():
                return True
    return False


def random_labels(rng, side):
    """(H, W) with one or two labels 1 and 2, rectangles of which a square is to be seen."""
    H, W = rng.randint(20, 48), rng.randint(20, 48)
    count = rng.choice((1, 1, 2))
    while True:
        labels = np.zeros((H, W), int)
        for label in range(1, count + 1):
            y, x = rng.randint(0, H - side), rng.randint(0, W - side)
            labels[y : y + rng.randint(side, H), x : x + rng.randint(side, W)] = label
        if all(has_square(labels, label, side) for label in range(count + 1)):
            return labels


TAGS = (0x010E, 0x010F, 0x011A, 0x0128, 0x0131, 0x8769, 0x8825, 0xA005, 0x9999, 0xEA1C)
TAGS_AFTER_THOSE_OF_TIFF = TAGS[5:]  # a TIFF cannot be read without the tags after a broken one


def odd_entry(rng, tags):
    kinds = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
    tag = rng.choice(tags)
    kind = rng.choice([*kinds, 99])
    count = rng.choice((1, 1, 1, 2, 5, 0))
    payload = rng.choice(
        (
            rng.randbytes(count * kinds.get(kind, 4)),
            b"\xff" * (count * kinds.get(kind, 4)),
            bytes(count * kinds.get(kind, 4)),
            struct.pack("<ii", -1, 0),
            rng.randbytes(rng.randint(0, 9)),
        )
    )
    return tag, kind, count, payload


def mask_pixels(labels, mode, kind, rng):
    """Labels in a mode, with random values: an array or a palette image. Background is 0, clear."""
    values = [0, *rng.sample(range(1, 256), 2)]
    if kind == "JPEG":  # other labels do not survive it
        greys = recoloured(labels, 0, *rng.choice(((255, 128), (255, 100), (255, 160))))
        return greys if mode == "L" else np.repeat(greys[..., None], 3, 2)
    if mode == "P":
        colours = [rng.randrange(256) for _ in range(768)]
        if rng.random() < 0.5:
            colours = VOC
        return palette(recoloured(labels, *values), colours)
    if mode == "1":
        return np.array(labels > 0)
    if mode == "L":
        return recoloured(labels, *values)
    if mode == "RGB":
        one = [rng.choice((0, 128, 255)) for _ in range(3)]
        two = [rng.choice((0, 128, 255)) for _ in range(3)]
        one[rng.randrange(3)] = two[rng.randrange(3)] = 255
        if max(abs(a - b) for a, b in zip(one, two)) < 100:
            two = [255 - v for v in one] if min(one) == 0 and max(one) == 255 else [0, 0, 255]
        return recoloured(labels, (0, 0, 0), one, two)
    if mode in ("RGBA", "LA"):
        return recoloured(labels, *[[*[200] * (len(mode) - 1), v] for v in values])
    if mode == "I;16":
        return recoloured(labels, 0, *rng.sample(range(1, 65536), 2), kind=np.uint16)
    if mode == "I":
        return recoloured(labels, 0, *rng.sample(range(1, 2**31), 2), kind=np.int32)
    return recoloured(
        labels, 0, *rng.sample([rng.uniform(0.01, 2000) for _ in "ab"], 2), kind=np.float32
    )


MODES = {  # of masks and images in each format
    "PNG": ("1", "L", "P", "LA", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB"),
    "TIFF": ("L", "RGB", "RGBA", "I;16", "I", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
}


def write(pixels, kind, orientation, rng):
    """A file with one odd tag and the orientation, in the formats that have tags."""
    entries = [odd_entry(rng, TAGS_AFTER_THOSE_OF_TIFF if kind == "TIFF" else TAGS)]
    if orientation != 1 or rng.random() < 0.5:
        entries.append(turned_by(orientation))
    if kind == "TIFF":
        return tiff(np.asarray(pixels), entries=entries)
    options = {}
    if kind in ("PNG", "JPEG", "WEBP"):
        options["exif"] = exif(*entries)
    if kind == "WEBP":
        options |= {"lossless": True, "exact": True}
    if kind == "JPEG":
        options |= {"quality": 98, "subsampling": 0}
    return encoded(pixels, kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_of_masks(kind):
    raised = {True: 0, False: 0}
    for seed in range(FUZZ_FILES):
        rng = random.Random(f"{kind} {seed}")
        labels = random_labels(rng, 8 if kind == "JPEG" else 3)
        mode = rng.choice(MODES[kind])
        orientation = rng.randint(1, 8) if kind in ("PNG", "JPEG", "WEBP", "TIFF") else 1
        pixels = mask_pixels(labels, mode, kind, rng)
        if mode == "1":
            labels = np.minimum(labels, 1)
        wanted = slow_target(labels, orientation)
        data = write(pixels, kind, orientation, rng)
        try:
            found = load_mask(data)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
            raised[wanted is None] += 1
            assert wanted is None or "palette" in str(error), (seed, mode, error)
            continue
        assert wanted is not None, (seed, mode, "several labels were united")
        if kind == "JPEG":
            assert (found == np.array(wanted)).mean() > 0.97, (seed, mode)
        else:
            assert np.array_equal(found, wanted), (seed, mode)
    assert raised[True] > 0
    assert raised[False] <= 0.02 * FUZZ_FILES + 1


@pytest.mark.parametrize("kind", KINDS)
def test_fuzz_of_images(kind):
    for seed in range(FUZZ_FILES):
        rng = random.Random(f"{kind} {seed} image")
        H, W, mode = rng.randint(14, 24), rng.randint(14, 24), rng.choice(MODES[kind])
        orientation = rng.randint(1, 8) if kind in ("PNG", "JPEG", "WEBP", "TIFF") else 1
        numbers = np.random.default_rng(seed)
        colours = numbers.integers(0, 256, 768).tolist()
        if mode == "1":
            values = pixels = numbers.random((H, W)) < 0.5
        elif mode == "P":
            values = numbers.integers(0, 256, (H, W))
            pixels = palette(values, colours)
        elif mode in ("I;16", "I", "F"):
            dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
            values = pixels = numbers.integers(0, 60_000, (H, W)).astype(dtype)
        else:
            channels = len(mode)
            shape = (H, W) if channels == 1 else (H, W, channels)
            values = pixels = numbers.integers(0, 256, shape).astype(np.uint8)
        if kind == "PPM" and mode == "I;16":
            pixels = Image.fromarray(values.astype(np.int32))
        low, high = np.min(values), np.max(values)
        plain = [[slow_pixel(v, mode, low, high, colours) for v in row] for row in values.tolist()]
        wanted = np.array(slowly_turned(plain, orientation))
        found = np.asarray(load_image(write(pixels, kind, orientation, rng))).astype(int)
        assert found.shape == wanted.shape, (seed, mode, orientation)
        off = abs(found - wanted).max() if kind != "JPEG" else abs(found - wanted).mean()
        assert off <= (6 if kind == "JPEG" else 1), (seed, mode, orientation)
