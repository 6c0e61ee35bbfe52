"""Procedural medical pictures that look like their modality, each with the masks of what is in it.

Every scene is a function `scene(rng, size, target, modality) -> (image, masks)`. The image is
(H, W) or (H, W, 3), floats in 0..1; masks are {name: (H, W) bool}. All randomness comes from `rng`.
Axial
and coronal pictures follow the radiological convention: the patient's left is on the right of the
image. A name with a side, "kidney:left", means the side of the *image*.

Scene coordinates: x to the right, y down, the shorter half side is 1. Nothing here is anatomy to
learn medicine from: shapes are idealised, but where things lie is roughly right.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

Rng = np.random.Generator
Size = tuple[int, int]  # (height, width)
Masks = dict[str, np.ndarray]  # name -> (H, W) bool
Line = tuple[Any, Any]  # points (n, 2) and the width, or the width at each point

# ---------------------------------------------------------------- primitives


def fog(rng: Rng, size: Size, cell: float) -> np.ndarray:
    """Smooth random field (H, W), about zero mean and unit variance; `cell` is the grain in
    pixels."""
    rough = rng.standard_normal(
        (max(2, round(size[0] / cell)) + 1, max(2, round(size[1] / cell)) + 1)
    )
    return np.asarray(
        Image.fromarray(rough.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    )


def bezier(*points: Any, n: int = 24) -> np.ndarray:
    """Points (n, 2) on the Bezier curve of the given control points."""
    points = np.array(points, np.float64)
    t = np.linspace(0, 1, n)[:, None]
    while len(points) > 1:
        points = [a + (b - a) * t for a, b in pairwise(points)]
    return points[0]


def strokes(size: Size, lines: list[Line]) -> np.ndarray:
    """Anti-aliased coverage (H, W) in 0..1 of polylines [(points (n, 2) in pixels, width or widths
    (n,))]."""
    sheet = Image.new("L", (size[1] * 3, size[0] * 3))
    pen = ImageDraw.Draw(sheet)
    for points, width in lines:
        enlarged = np.asarray(points) * 3 + 1.5
        widths = np.broadcast_to(width, len(points)) * 3.0
        for (a, b), w in zip(pairwise(enlarged), widths):
            pen.line([*a, *b], 255, max(1, round(w)))
            if w > 3:
                pen.ellipse([*(b - w / 2), *(b + w / 2)], 255)
    return np.asarray(sheet.reduce(3), np.float32) / 255


class Canvas:
    """An image and a label map under a random pose; what is painted later covers what was painted
    before."""

    def __init__(
        self,
        rng: Rng,
        size: Size,
        base: Any = 0.0,
        turn: float = 0.08,
        zoom: tuple[float, float] = (0.88, 1.04),
        shift: float = 0.07,
        stretch: float = 0.8,
    ):
        self.rng = rng
        self.size = size
        half = min(size) / 2
        angle = rng.normal(0, turn)
        scale = 1 / rng.uniform(*zoom)
        # a picture that is not square is filled a little further along its long side, as scanners'
        # crops are
        wide = np.array([size[1], size[0]]) / min(size)
        fill = wide**stretch * rng.uniform(0.95, 1.05, 2)
        c = math.cos(angle) * scale / half
        s = math.sin(angle) * scale / half
        self.matrix = np.array([[c, s], [-s, c]]) / fill[:, None]
        self.centre = (
            np.array([size[1] - 1, size[0] - 1]) / 2 + rng.uniform(-shift, shift, 2) * half * wide
        )
        self.inverse = np.linalg.inv(self.matrix)
        self.px = math.sqrt(abs(np.linalg.det(self.matrix)))
        # pixels of a scene unit along the wider side
        self.longest = np.linalg.norm(self.inverse, 2)
        self.u = np.arange(size[1], dtype=np.float32)[None] - np.float32(self.centre[0])
        self.v = np.arange(size[0], dtype=np.float32)[:, None] - np.float32(self.centre[1])
        m = self.matrix.astype(np.float32)
        self.x = m[0, 0] * self.u + m[0, 1] * self.v
        self.y = m[1, 0] * self.u + m[1, 1] * self.v
        base = np.asarray(base, np.float32)
        self.image = np.broadcast_to(base, (*size, 3) if base.shape == (3,) else size).copy()
        self.labels = np.zeros(size, np.uint8)
        self.names = [None]

    def pixels(self, points: Any) -> np.ndarray:
        """Scene coordinates (n, 2) -> pixels (n, 2)."""
        return np.asarray(points) @ self.inverse.T + self.centre

    def blob(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        turn: float = 0.0,
        wobble: float = 0.08,
        flat: float = 0.0,
    ) -> np.ndarray:
        """Signed depth in pixels (H, W), positive inside, of an ellipse with a Fourier-perturbed
        contour.

        `flat` below 0 dents the blob's -x side (a crescent, a bean); far outside the depth is just
        -99."""
        reach = (1.1 + 2.2 * wobble) * max(rx, ry) * self.longest + 8
        px, py = self.pixels([[cx, cy]])[0]
        depth = np.full(self.size, -99, np.float32)
        y0 = max(0, int(py - reach))
        y1 = min(self.size[0], int(py + reach) + 1)
        x0 = max(0, int(px - reach))
        x1 = min(self.size[1], int(px + reach) + 1)
        if y0 >= y1 or x0 >= x1:
            return depth
        z = (self.x[y0:y1, x0:x1] - cx + 1j * (self.y[y0:y1, x0:x1] - cy)) * np.exp(-1j * turn)
        z = (z.real / rx + 1j * (z.imag / ry)).astype(np.complex64)
        radius = np.abs(z) + 1e-6
        spin = z / radius
        series = np.zeros_like(spin)
        # Horner: the k-th harmonic is spin**k times a random amplitude and phase
        for k in (5, 4, 3, 2, 1):
            a = wobble * self.rng.normal(0, 1.3 / (k + 1)) if k > 1 else 0
            series = (series + a * np.exp(1j * self.rng.uniform(0, 2 * math.pi))) * spin
        dent = flat * np.clip(-spin.real, 0, 1) ** 2
        depth[y0:y1, x0:x1] = (1 + series.real + dent - radius) * (min(rx, ry) / self.px)
        return depth

    def paint(
        self,
        depth: np.ndarray,
        value: Any,
        name: str | None = None,
        soft: float = 1.2,
        opacity: float = 1.0,
        detail: bool = False,
    ) -> None:
        """Lay `value` where depth is positive; `name` labels the region; a `detail` keeps the label
        below."""
        alpha = np.clip(depth / soft + 0.5, 0, 1) * opacity
        if self.image.ndim == 3:
            alpha = alpha[..., None]
        self.image += (np.asarray(value, np.float32) - self.image) * alpha
        if not detail:
            if name not in self.names:
                self.names.append(name)
            self.labels[depth > 0] = self.names.index(name)

    def draw(self, lines: list[Line], value: Any, opacity: float = 1.0) -> np.ndarray:
        """Strokes in scene coordinates, width in scene units; returns their coverage."""
        cover = (
            strokes(self.size, [(self.pixels(p), np.asarray(w) / self.px) for p, w in lines])
            * opacity
        )
        cover3 = cover[..., None] if self.image.ndim == 3 else cover
        self.image += (np.asarray(value, np.float32) - self.image) * cover3
        return cover

    def spot(self, mask: np.ndarray, radius: float) -> np.ndarray:
        """A random scene point of the mask at least `radius` (scene units) deep, or as deep as
        there is."""
        deep = ndimage.distance_transform_edt(mask)
        rows, cols = np.nonzero(deep >= min(radius / self.px, deep.max() * 0.9))
        i = self.rng.integers(len(rows))
        return self.matrix @ (np.array([cols[i], rows[i]]) - self.centre)

    def mask(self, name: str) -> np.ndarray:
        return self.labels == self.names.index(name)

    def masks(self) -> Masks:
        return {name: self.labels == i for i, name in enumerate(self.names) if name}


def finish(
    rng: Rng, image: np.ndarray, noise: float = 0.02, grain: float = 0.0, contrast: float = 0.12
) -> np.ndarray:
    """Scanner noise (white `noise`, correlated `grain`), then a random contrast, brightness and
    gamma."""
    if grain:
        image = image + grain * fog(rng, image.shape[:2], 2.0)
    image = image + noise * rng.standard_normal(image.shape, np.float32)
    image = (image - 0.5) * rng.uniform(1 - contrast, 1 + contrast) + 0.5 + rng.uniform(-0.03, 0.03)
    return np.clip(image, 0, 1) ** rng.uniform(0.88, 1.14)


def jitter(rng: Rng, table: dict[str, float], spread: float = 0.025) -> dict[str, float]:
    return {k: v + rng.normal(0, spread) for k, v in table.items()}


# ---------------------------------------------------------------- CT, MR and X-ray of the trunk

ABDOMEN = {  # grey of each tissue: CT with contrast, fat-suppressed T2-weighted MR
    "CT": dict(
        fat=0.20,
        muscle=0.44,
        liver=0.57,
        spleen=0.63,
        kidney=0.80,
        medulla=0.66,
        aorta=0.90,
        cava=0.70,
        bone=0.97,
        marrow=0.72,
        water=0.34,
        bowel=0.42,
        gas=0.02,
        tumour=0.36,
    ),
    "MR": dict(
        fat=0.20,
        muscle=0.12,
        liver=0.34,
        spleen=0.58,
        kidney=0.70,
        medulla=0.86,
        aorta=0.03,
        cava=0.06,
        bone=0.05,
        marrow=0.25,
        water=0.97,
        bowel=0.48,
        gas=0.03,
        tumour=0.66,
    ),
}


def spine(c: Canvas, y: float, bone: float, marrow: float, canal: float) -> None:
    """A vertebra seen from below: body, arch, transverse and spinous processes, canal."""
    arms = [(-0.26, y + 0.22), (0, y + 0.16), (0.26, y + 0.22)]
    tail = [(0, y + 0.15), (0, y + 0.36)]
    c.draw([(arms, 0.05), (tail, 0.06)], bone)
    c.paint(c.blob(0, y, 0.17, 0.14, wobble=0.05), bone)
    c.paint(c.blob(0, y, 0.145, 0.115, wobble=0.05), marrow)
    c.paint(c.blob(0, y + 0.17, 0.085, 0.065, wobble=0.05), bone)
    c.paint(c.blob(0, y + 0.17, 0.06, 0.045, wobble=0.05), canal)


def ribs(c: Canvas, rx: float, ry: float, bone: float, count: int = 9) -> None:
    """Short bright arcs along the body wall, as oblique cuts through ribs."""
    lines = []
    for a in (
        np.linspace(0.15, 2 * math.pi - 0.15, count) + c.rng.normal(0, 0.08, count) + math.pi / 2
    ):
        arc = a + np.linspace(-0.1, 0.1, 5) * c.rng.uniform(0.6, 1.3)
        lines.append((np.stack([rx * np.cos(arc), ry * np.sin(arc)], 1), 0.045))
    c.draw(lines, bone)


def abdomen(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Axial slice of the upper abdomen; `target` may ask for a "liver tumour" or a "kidney
    cyst"."""
    g = jitter(rng, ABDOMEN[modality])
    c = Canvas(rng, size, 0.02, zoom=(0.92, 1.12))
    u = rng.uniform
    if modality == "CT":
        c.draw([(bezier((-0.9, 0.78), (0, 1.05), (0.9, 0.78)), 0.03)], 0.35)  # the table
    c.paint(c.blob(0, 0, 0.96, 0.74, wobble=0.035), g["fat"] + 0.02)
    c.paint(c.blob(0, 0.01, 0.87, 0.65, wobble=0.03), g["muscle"])
    inner = c.blob(0, 0.0, 0.80, 0.575, wobble=0.035)
    c.paint(inner, g["fat"] + 0.03 * fog(rng, size, 7))
    ribs(c, 0.835, 0.61, g["bone"])
    for _ in range(rng.integers(5, 9)):  # loops of bowel, some with gas
        x = u(-0.3, 0.5)
        y = u(-0.42, 0.02)
        r = u(0.06, 0.11)
        c.paint(np.minimum(c.blob(x, y, r * 1.3, r, u(0, 3), 0.15), inner - 2), g["bowel"] + 0.1)
        c.paint(
            np.minimum(c.blob(x, y, r, r * 0.7, 0, 0.15), inner - 3),
            g["gas"] if u() < 0.4 else g["bowel"],
        )
    # the stomach: wall, content, an air bubble floating in front
    x = u(0.22, 0.34)
    y = u(-0.3, -0.22)
    c.paint(np.minimum(c.blob(x, y, 0.27, 0.2, -0.5, 0.1), inner - 2), g["bowel"] + 0.14)
    c.paint(np.minimum(c.blob(x, y, 0.235, 0.165, -0.5, 0.1), inner - 3), g["bowel"] - 0.06)
    c.paint(np.minimum(c.blob(x - 0.02, y - 0.07, 0.15, 0.07, 0, 0.1), inner - 4), g["gas"])
    s = u(0.85, 1.15)
    spleen = c.blob(u(0.56, 0.62), u(0.06, 0.16), 0.15 * s, 0.29 * s, u(0.1, 0.4), 0.07, flat=-0.35)
    c.paint(np.minimum(spleen, inner - 1.5), g["spleen"] + 0.012 * fog(rng, size, 6), "spleen")
    s = u(0.88, 1.1)
    liver = np.maximum(
        c.blob(u(-0.46, -0.4), u(-0.1, 0), 0.40 * s, 0.44 * s, u(-0.2, 0.2), 0.07),
        c.blob(u(-0.14, -0.06), u(-0.33, -0.27), 0.32 * s, 0.16 * s, u(-0.1, 0.2), 0.1),
    )
    liver = np.minimum(liver, inner - 1.5)
    c.paint(liver, g["liver"] + 0.015 * fog(rng, size, 5), "liver")
    hilum = np.array([-0.18, -0.06]) + rng.normal(0, 0.03, 2)
    veins = [
        bezier(
            hilum, hilum + rng.normal((-0.12, 0), 0.08), hilum + rng.normal((-0.33, 0), 0.14), n=12
        )
        for _ in range(4)
    ]
    before = c.image.copy()
    c.draw([(vein, np.linspace(0.045, 0.012, 12)) for vein in veins], g["cava"] + 0.03, 0.8)
    c.image = np.where(liver > 1, c.image, before)  # vessels of the liver stay within it
    if u() < 0.6:
        # gall bladder
        c.paint(c.blob(u(-0.26, -0.16), u(-0.06, 0.04), 0.07, 0.11, u(-0.5, 0.5), 0.05), g["water"])
    kidneys = {}
    for side, sign in (("left", -1), ("right", 1)):
        s = u(0.85, 1.15)
        x = sign * u(0.40, 0.46)
        y = u(0.24, 0.32)
        turn = -sign * u(0.2, 0.6)
        kidneys[side] = c.blob(
            x, y, 0.15 * s, 0.185 * s, turn if sign > 0 else turn + math.pi, 0.05, -0.2
        )
        c.paint(c.blob(x, y, 0.19 * s, 0.23 * s, 0, 0.05), g["fat"])  # fat capsule
        c.paint(kidneys[side], g["kidney"], f"kidney:{side}")
        c.paint(
            c.blob(x - sign * 0.01, y, 0.09 * s, 0.12 * s, 0, 0.2),
            g["medulla"],
            detail=True,
            soft=3,
        )
        c.paint(c.blob(x - sign * 0.05 * s, y, 0.05 * s, 0.055 * s, 0, 0.2), g["fat"], detail=True)
    for sign in (-1, 1):
        c.paint(c.blob(sign * 0.24, 0.46, 0.09, 0.12, sign * 0.3, 0.08), g["muscle"])  # psoas
    spine(c, 0.40, g["bone"], g["marrow"], g["muscle"])
    c.paint(c.blob(u(-0.2, -0.15), u(0.17, 0.21), 0.085, 0.065, 0, 0.08), g["cava"])
    r = u(0.085, 0.115)
    aorta = c.blob(u(0.02, 0.08), u(0.14, 0.19), r, r * u(0.95, 1.05), 0, 0.03)
    c.paint(aorta - -1.2, g["muscle"])  # its wall, or it drowns in the vertebra
    c.paint(aorta, g["aorta"], "aorta")
    if target == "liver tumour":
        r = u(0.10, 0.19)
        x, y = c.spot(c.mask("liver"), r * 1.05)
        lump = np.minimum(c.blob(x, y, r, r * u(0.8, 1.2), u(0, 3), 0.12), liver - 1)
        c.paint(lump, g["tumour"] + 0.03 * fog(rng, size, 4), "liver tumour", soft=2)
        c.paint(lump - 0.45 * r / c.px, g["tumour"] - 0.09, detail=True, soft=4)
    if target == "kidney cyst":
        side, sign = (("left", -1), ("right", 1))[rng.integers(2)]
        rows, cols = np.nonzero(kidneys[side] > 1)
        x, y = c.matrix @ (np.array([cols.mean(), rows.mean()]) - c.centre)
        r = u(0.10, 0.15)
        a = u(-1.2, 1.2)
        x = x + sign * 0.14 * math.cos(a)
        y = y + 0.17 * math.sin(a)
        c.paint(c.blob(x, y, r, r, 0, 0.02), g["water"], "kidney cyst")
    noise = dict(noise=0.012, grain=0.02) if modality == "CT" else dict(noise=0.02, grain=0.008)
    if modality == "MR":
        c.image *= 1 + 0.10 * (c.x * u(-1, 1) + c.y * u(-1, 1))  # coil shading
    return finish(rng, c.image, **noise), c.masks()


def chest_ct(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Axial slice through the chest, lung window; target may be "lung nodule" or
    "consolidation"."""
    c = Canvas(rng, size, 0.01)
    u = rng.uniform
    c.draw([(bezier((-0.9, 0.76), (0, 1.02), (0.9, 0.76)), 0.03)], 0.3)
    c.paint(c.blob(0, 0, 0.97, 0.74, wobble=0.03), 0.42)
    c.paint(c.blob(0, 0, 0.88, 0.65, wobble=0.03), 0.60)
    ribs(c, 0.845, 0.62, 0.95, 11)
    c.draw([([(-0.1, -0.6), (0.1, -0.6)], 0.07)], 0.9)
    lungs = {}
    for side, sign in (("left", -1), ("right", 1)):
        s = u(0.92, 1.06)
        lung = np.minimum(
            c.blob(sign * 0.46, u(-0.02, 0.04), 0.345 * s, 0.54 * s, -sign * u(0.05, 0.2), 0.05),
            c.blob(0, 0, 0.81, 0.58, wobble=0.02),
        )
        lungs[side] = lung
        c.paint(
            lung, 0.12 + 0.012 * fog(rng, size, 4) + 0.05 * (c.y + 0.5), f"lung:{side}", soft=1.5
        )
        root = np.array([sign * 0.2, u(-0.02, 0.08)])
        twigs = []
        for a in np.linspace(-1.3, 1.3, 9) + rng.normal(0, 0.15, 9):
            tip = root + np.array([sign * math.cos(a) * 0.48, math.sin(a) * 0.5]) * u(0.6, 1.1)
            twigs.append(
                (
                    bezier(root, (root + tip) / 2 + rng.normal(0, 0.07, 2), tip, n=12),
                    np.linspace(0.035, 0.006, 12),
                )
            )
        before = c.image.copy()
        c.draw(twigs, 0.62, 0.9)
        c.image = np.where(lung > 0, c.image, before)
    heart = c.blob(
        u(0.04, 0.12), u(-0.16, -0.1), 0.27 * u(0.85, 1.1), 0.24 * u(0.9, 1.15), u(-0.4, 0.1), 0.08
    )
    c.paint(heart, 0.64 + 0.015 * fog(rng, size, 6), "heart", soft=2)
    c.paint(c.blob(-0.02, 0.12, 0.2, 0.22, 0, 0.1), 0.61)
    for x, y, r, v in (
        (-0.02, 0.12, 0.055, 0.04),
        (0.13, 0.26, 0.09, 0.70),
        (-0.07, 0.02, 0.07, 0.68),
    ):
        c.paint(c.blob(x, y, r, r, 0, 0.05), v)  # windpipe, descending aorta, great vessel
    spine(c, 0.42, 0.96, 0.78, 0.5)
    side = ("left", "right")[rng.integers(2)]
    lung = np.minimum(lungs[side], np.where(c.mask(f"lung:{side}"), 99, -99))
    if target == "lung nodule":
        r = u(0.065, 0.12)
        x, y = c.spot(lung > 0, r * 1.4)
        rays = [
            ([(x, y), (x + 1.7 * r * math.cos(a), y + 1.7 * r * math.sin(a))], 0.012)
            for a in rng.uniform(0, 6.3, rng.integers(4, 9))
        ]
        c.draw(rays, 0.6, 0.7)
        c.paint(
            c.blob(x, y, r, r * u(0.85, 1.15), u(0, 3), 0.1),
            0.74 + 0.02 * fog(rng, size, 3),
            "lung nodule",
        )
    if target == "consolidation":
        x, y = c.spot(lung > 0, 0.12)
        cloud = np.minimum(c.blob(x, y, u(0.16, 0.26), u(0.15, 0.25), u(0, 3), 0.22), lung - 0.5)
        haze = 0.55 + 0.08 * fog(rng, size, 5)
        c.paint(cloud, haze, "consolidation", soft=5, opacity=0.92)
    return finish(rng, c.image, 0.012, 0.02), c.masks()


def chest_xray(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Frontal chest film; target may be "pneumonia"."""
    c = Canvas(rng, size, 0.04, turn=0.05, zoom=(0.92, 1.08), shift=0.05)
    u = rng.uniform
    body = np.minimum(
        c.blob(0, 0.35, 1.05, 1.5, wobble=0.03), c.blob(0, 0.6, 1.3, 1.55, wobble=0.03)
    )
    c.paint(body, 0.52 + 0.12 * np.clip(c.y, -0.6, 1), soft=10)
    c.paint(c.blob(0, -1.0, 0.22, 0.35, wobble=0.05), 0.6, soft=14)
    lungs = {}
    for side, sign in (("left", -1), ("right", 1)):
        w = u(0.92, 1.08)
        base = u(0.5, 0.62) + (0.06 if sign > 0 else 0)
        cap = (
            base + 0.55 * (c.x - sign * 0.42) ** 2 - c.y
        ) / c.px  # above the dome of the diaphragm
        lung = np.maximum(
            c.blob(sign * 0.43, 0.02, 0.33 * w, 0.74, sign * -0.1, 0.04),
            c.blob(sign * 0.5, 0.38, 0.31 * w, 0.45, 0, 0.04),
        )
        lungs[side] = np.minimum(lung, cap)
        c.paint(
            lungs[side],
            0.20 + 0.05 * np.abs(c.x) + 0.02 * fog(rng, size, 9),
            f"lung:{side}",
            soft=4,
        )
        root = np.array([sign * 0.16, 0.0])
        twigs = []
        for a in np.linspace(-1.2, 1.3, 8) + rng.normal(0, 0.15, 8):
            tip = root + np.array([sign * math.cos(a) * 0.45, math.sin(a) * 0.55]) * u(0.6, 1)
            twigs.append(
                (
                    bezier(root, (root + tip) / 2 + rng.normal(0, 0.06, 2), tip, n=10),
                    np.linspace(0.05, 0.008, 10),
                )
            )
        c.draw(twigs, 0.5, 0.35)
    # mediastinum
    c.paint(0.14 / c.px - np.abs(c.x + 0.03 * np.sin(3 * c.y)) / c.px, 0.62, soft=9, opacity=0.9)
    c.paint(c.blob(0.10, -0.24, 0.11, 0.12, wobble=0.05), 0.62, soft=5)  # aortic knob
    r = u(0.28, 0.40)
    heart = np.maximum(
        c.blob(u(0.12, 0.17), u(0.30, 0.36), r, u(0.25, 0.30), u(0.35, 0.6), 0.06),
        c.blob(-0.02, u(0.16, 0.22), u(0.19, 0.23), u(0.24, 0.30), 0, 0.06),
    )
    c.paint(np.minimum(heart, (0.66 - c.y) / c.px), 0.64 + 0.08 * c.y, "heart", soft=5)
    slope = u(0.5, 0.8)
    pitch = u(2.9, 3.5)
    wave = np.cos(2 * math.pi * (pitch * c.y - slope * pitch * np.sqrt(np.abs(c.x) + 0.02) + u()))
    rear = np.clip(wave * 2.2 - 0.9, 0, 1) * np.clip((np.abs(c.x) - 0.1) * 9, 0, 1)
    rear *= np.clip((0.75 - c.y) * 4, 0, 1)
    wave = np.cos(2 * math.pi * (pitch * 0.8 * c.y + 1.1 * np.abs(c.x) + u()))
    front = np.clip(wave * 2.2 - 1.2, 0, 1) * np.clip((np.abs(c.x) - 0.3) * 5, 0, 1)
    inside = np.clip(c.blob(0, 0.1, 0.86, 0.9, wobble=0) / 4, 0, 1) * np.where(
        c.mask("heart"), 0.35, 1
    )
    c.image += (0.11 * rear + 0.055 * front) * inside
    collars = [
        bezier((s * 0.08, -0.56), (s * 0.4, -0.52), (s * 0.55, -0.82), (s * 0.95, -0.78))
        for s in (-1, 1)
    ]
    c.draw([(collar, 0.075) for collar in collars], 0.72, 0.45)
    if target == "pneumonia":
        side = ("left", "right")[rng.integers(2)]
        x, y = c.spot(c.mask(f"lung:{side}"), 0.16)
        cloud = np.minimum(
            c.blob(x, y, u(0.17, 0.27), u(0.18, 0.32), u(0, 3), 0.18), lungs[side] - 0.5
        )
        cloud = np.where(c.mask(f"lung:{side}"), cloud, -99)
        c.paint(cloud, 0.62 + 0.07 * fog(rng, size, 6), "pneumonia", soft=6, opacity=0.85)
    image = ndimage.gaussian_filter(c.image, 0.5)
    if u() < 0.5:  # the side marker of the film
        marker = Image.new("F", size[::-1], 0)
        ImageDraw.Draw(marker).text((4, 3), "R", fill=1)
        image = np.maximum(image, np.asarray(marker) * 0.9)
    return finish(rng, image, 0.018, 0.006), c.masks()


def head_ct(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Axial head CT with a bleed: a lens against the skull, or a blob within the brain."""
    c = Canvas(rng, size, 0.02, turn=0.12)
    u = rng.uniform
    rx = u(0.66, 0.74)
    ry = u(0.86, 0.92)
    w = 0.02
    c.paint(c.blob(0, 0, rx + 0.07, ry + 0.06, wobble=w), 0.30)
    c.paint(c.blob(0, 0, rx + 0.02, ry + 0.02, wobble=w), 0.98)
    brain = c.blob(0, 0, rx - 0.07, ry - 0.08, wobble=w)
    c.paint(
        brain,
        0.47 - 0.10 * np.clip(1 - brain * c.px / 0.1, 0, 1) * (fog(rng, size, 4) > 0),
        soft=1.5,
    )
    depth = np.clip(brain * c.px / 0.3, 0, 1)
    c.image += np.where(brain > 0, (0.02 * fog(rng, size, 5) - 0.04 * depth), 0)
    for sign in (-1, 1):  # deep grey nuclei and ventricles
        c.paint(c.blob(sign * 0.2, -0.02, 0.1, 0.16, sign * 0.3, 0.1), 0.5, soft=4)
        c.paint(c.blob(sign * 0.10, -0.25, 0.05, 0.17, sign * -0.35, 0.1), 0.2, soft=2)
        c.paint(c.blob(sign * 0.15, 0.28, 0.05, 0.18, sign * 0.45, 0.1), 0.2, soft=2)
    c.draw([([(0, -ry), (0, -0.38)], 0.012), ([(0, 0.4), (0, ry)], 0.012)], 0.6, 0.6)
    side = (-1, 1)[rng.integers(2)]
    if u() < 0.5:
        a = u(-0.9, 0.9)
        r = u(0.30, 0.42)
        x = side * (rx - 0.1) * math.cos(a)
        y = (ry - 0.12) * math.sin(a)
        turn = math.atan2(y, x)
        clot = np.minimum(c.blob(x, y, r * 0.42, r, turn, 0.08), brain)
    else:
        r = u(0.13, 0.24)
        x = side * u(0.22, 0.42)
        y = u(-0.35, 0.4)
        swelling = np.minimum(c.blob(x, y, r * 1.4, r * 1.4, 0, 0.12), brain)
        c.paint(swelling, 0.34, soft=5, opacity=0.8)
        clot = np.minimum(c.blob(x, y, r, r * u(0.8, 1.3), u(0, 3), 0.15), brain - 1)
    c.paint(clot, 0.82 + 0.025 * fog(rng, size, 4), "haematoma", soft=1.8)
    return finish(rng, c.image, 0.015, 0.02), c.masks()


def heart_mr(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Short-axis cine MR: bright blood pools, the dark muscular ring, dark lungs."""
    c = Canvas(rng, size, 0.05, turn=0.25, zoom=(0.9, 1.3), shift=0.16)
    u = rng.uniform
    c.image += 0.04 * fog(rng, size, 8)
    # chest wall
    c.paint(-c.blob(0.05, -0.05, 0.98, 0.9, wobble=0.08), 0.38 + 0.05 * fog(rng, size, 6), soft=4)
    c.paint(-c.blob(0.05, -0.05, 1.12, 1.03, wobble=0.05), 0.75, soft=3)  # fat under the skin
    # liver
    c.paint(c.blob(-0.35, 0.95, 0.8, 0.4, 0.1, 0.08), 0.42 + 0.03 * fog(rng, size, 5), soft=3)
    c.paint(c.blob(-0.1, 0.0, 0.62, 0.55, 0.5, 0.06), 0.62, soft=3)  # fat around the heart
    c.paint(c.blob(-0.1, 0.0, 0.57, 0.5, 0.5, 0.06), 0.22, soft=2)
    x = u(0.10, 0.2)
    y = u(-0.05, 0.1)
    r = u(0.32, 0.4)
    c.paint(
        c.blob(x - 0.42, y - 0.06, 0.30, 0.36, u(-0.2, 0.2), 0.06), 0.84, "right ventricle", soft=2
    )
    c.paint(
        c.blob(x, y, r, r * u(0.95, 1.05), 0, 0.04),
        0.24 + 0.015 * fog(rng, size, 4),
        "myocardium",
        soft=1.5,
    )
    inner = r * u(0.52, 0.68)
    pool = c.blob(x, y, inner, inner * u(0.95, 1.05), 0, 0.05)
    c.paint(pool, 0.9 + 0.02 * fog(rng, size, 5), "left ventricle", soft=1.5)
    for a in (u(0.3, 1), u(3.3, 4.2)):  # papillary muscles
        px = x + 0.68 * inner * math.cos(a)
        py = y + 0.68 * inner * math.sin(a)
        c.paint(c.blob(px, py, 0.05, 0.045), 0.35, detail=True, soft=2)
    return finish(rng, c.image * (1.05 - 0.1 * c.y), 0.025, 0.01), c.masks()


# ---------------------------------------------------------------- ultrasound


def speckle(rng: Rng, shape: Size, along: float = 1.0, across: float = 2.2) -> np.ndarray:
    """Fully developed speckle: the magnitude of filtered complex noise, mean about 1."""
    z = rng.standard_normal((2, *shape), np.float32)
    z = np.hypot(*ndimage.gaussian_filter(z, (0, along, across), truncate=2.5))
    return z / z.mean()


def echo(image: np.ndarray, grain: np.ndarray, gain: float = 0.75) -> np.ndarray:
    """Reflectivity -> B-mode picture: multiplicative speckle, then log compression as every scanner
    does."""
    return np.clip(
        0.30 * np.log1p(60 * np.clip(image, 0, 1.5) ** 2 * (0.25 + gain * grain)) / np.log(4), 0, 1
    )


def heart_us(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Apical four-chamber view: the probe sits at the apex, so the ventricles are above the
    atria."""
    c = Canvas(rng, size, 0.40, turn=0.06, zoom=(0.95, 1.05), shift=0.03)
    u = rng.uniform
    tilt = rng.normal(0, 0.12)
    x0 = u(-0.06, 0.06)
    c.image *= 1 + 0.25 * fog(rng, size, 10)
    c.paint(c.blob(x0, 0.15, 0.62 * u(0.9, 1.05), 0.78, tilt, 0.05), 0.75, soft=4)
    chambers = (
        ("right ventricle", -0.26, -0.06, 0.19, 0.33, 0.12),
        ("left ventricle", 0.24, -0.10, 0.23, 0.40, -0.1),
        ("right atrium", -0.27, 0.57, 0.21, 0.21, 0),
        ("left atrium", 0.25, 0.60, 0.22, 0.22, 0),
    )
    for name, x, y, rx, ry, turn in chambers:
        s = u(0.9, 1.1)
        turned_x = x0 + x * math.cos(tilt) - y * math.sin(tilt)
        turned_y = y * math.cos(tilt) + x * math.sin(tilt)
        c.paint(c.blob(turned_x, turned_y, rx * s, ry * s, turn + tilt, 0.07), 0.05, name, soft=3)
    leaflets = [
        bezier(*((x0 + s * x, y) for x, y in curve))
        for s in (-1, 1)
        for curve in (
            ((0.06, 0.33), (0.2, 0.24), (0.25, 0.36)),
            ((0.47, 0.33), (0.38, 0.26), (0.3, 0.38)),
        )
    ]
    c.draw([(leaflet, 0.025) for leaflet in leaflets], 0.9)  # the valves
    dx = c.x - 0
    dy = c.y + 1.02
    r = np.hypot(dx, dy)
    angle = np.arctan2(dx, dy)
    polar = speckle(rng, (150, 110), 0.9, 1.6)
    where = [np.clip(r * 70, 0, 149), np.clip((angle + 0.8) * 68, 0, 109)]
    image = echo(c.image, ndimage.map_coordinates(polar, where, order=1), 0.75)
    fan = (r < 1.95) & (np.abs(angle) < 0.72)
    image = np.where(fan, image * np.clip(1.12 - 0.22 * r, 0, 1), 0.01)
    return finish(rng, image, 0.006, contrast=0.08), {k: m & fan for k, m in c.masks().items()}


def linear_us(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Linear-probe picture of soft tissue, with a "breast mass" or a "carotid artery" seen
    lengthwise."""
    c = Canvas(rng, size, 0.3, turn=0.04, zoom=(0.95, 1.05), shift=0.02, stretch=1)
    u = rng.uniform
    wavy = c.y + 0.05 * fog(rng, size, 30) + u(-0.08, 0.08)
    layers = np.interp(
        wavy,
        (-1, -0.93, -0.88, -0.8, -0.6, -0.5, -0.3, 0, 0.3, 0.42, 0.5, 0.56, 0.75, 1),
        (0.9, 0.95, 0.6, 0.28, 0.25, 0.5, 0.55, 0.45, 0.5, 0.3, 0.65, 0.25, 0.3, 0.2),
    ).astype(np.float32)
    c.image = layers * (1 + 0.28 * fog(rng, (size[0] * 3, size[1]), 12)[: size[0]])
    septa = [
        (x - 0.3, y, u(-0.15, 0.15), u(-0.1, 0.1))
        for x, y in rng.uniform((-1, -0.75), (1, 0.6), (8, 2))
    ]
    c.draw(
        [(bezier((x, y), (x + 0.3, y + a), (x + 0.6, y + b)), 0.02) for x, y, a, b in septa],
        0.7,
        0.6,
    )
    if target == "breast mass":
        r = u(0.2, 0.34)
        x = u(-0.5, 0.5)
        y = u(-0.25, 0.2)
        lump = c.blob(x, y, r, r * u(0.75, 1.25), u(-0.3, 0.3), 0.16)
        # shadow behind it
        c.paint((r * 0.8 - np.abs(c.x - x)) / c.px * (c.y > y), 0.1, soft=10, opacity=0.65)
        c.paint(lump + 2.5, 0.6, soft=4, opacity=0.5)
        c.paint(lump, 0.085 * (1 + 0.3 * fog(rng, size, 5)), "breast mass", soft=2.5)
    else:
        y = u(-0.25, 0.2)
        tilt = u(-0.22, 0.22)
        bow = u(-0.18, 0.18)
        r = u(0.17, 0.26)
        below = c.y - y - tilt * c.x - bow * c.x**2
        off = np.abs(below)
        c.paint((r + 0.1 - off) / c.px, 0.45, soft=3)
        c.paint((r + 0.05 - off) / c.px, 0.95, soft=3)  # wall: bright line, dark line, lumen
        c.paint((r - off) / c.px, 0.035, "carotid artery", soft=2)
        # brighter behind it
        c.paint((r * 1.2 - np.abs(below - 2 * r - 0.15)) / c.px, 0.62, soft=9, opacity=0.4)
    image = echo(c.image, speckle(rng, size, 0.7, 1.3), 0.75) * (1.02 - 0.12 * c.y)
    return finish(rng, image, 0.006, contrast=0.08), c.masks()


# ---------------------------------------------------------------- vessels and eye


def tree(
    rng: Rng,
    start: np.ndarray,
    heading: float,
    length: float,
    width: float,
    depth: int,
    bend: float = 0.5,
) -> list[Line]:
    """A branching vessel as strokes in scene units."""
    end = start + length * np.array([math.cos(heading), math.sin(heading)])
    turn = rng.normal(0, bend)
    middle = (start + end) / 2 + length * 0.35 * turn * np.array(
        [-math.sin(heading), math.cos(heading)]
    )
    lines = [(bezier(start, middle, end, n=10), np.linspace(width, width * 0.75, 10))]
    if depth:
        heading -= turn * 0.7
        for fork in (rng.uniform(0.2, 0.6), -rng.uniform(0.2, 0.7)):
            longer = length * rng.uniform(0.6, 0.85)
            wider = width * rng.uniform(0.5, 0.72)
            lines += tree(rng, end, heading + fork, longer, wider, depth - 1, bend)
    return lines


def angiogram(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Subtraction angiogram: dark contrast medium on light grey, one sac on a branch."""
    c = Canvas(rng, size, 0.74, turn=0.3, zoom=(0.9, 1.15), shift=0.08)
    u = rng.uniform
    c.image += 0.03 * fog(rng, size, 14) - 0.10 * (c.x**2 + c.y**2) ** 0.5
    start = np.array([u(-0.25, 0.25), 1.1])
    lines = []
    trunk = bezier(start, (u(-0.4, 0.4), 0.6), (u(-0.3, 0.3), 0.35), n=14)
    lines.append((trunk, np.linspace(0.12, 0.10, 14)))
    for heading in (-math.pi / 2 - u(0.3, 0.8), -math.pi / 2 + u(0.3, 0.8)):
        lines += tree(rng, trunk[-1], heading, u(0.42, 0.55), u(0.075, 0.09), 4, 0.8)
    c.draw(lines, 0.28, 0.85)
    host = lines[1 + rng.integers(3)][0]
    x, y = host[rng.integers(4, len(host))]
    r = u(0.13, 0.20)
    a = u(0, 6.3)
    x = np.clip(x + 0.7 * r * math.cos(a), -0.7, 0.7)
    y = np.clip(y + 0.7 * r * math.sin(a), -0.7, 0.7)
    sac = c.blob(x, y, r, r * u(0.85, 1.15), u(0, 3), 0.08)
    c.paint(sac, 0.17 + 0.03 * np.clip(1 - sac * c.px / r, 0, 1), "aneurysm", soft=2)
    image = ndimage.gaussian_filter(c.image, 0.5)
    return finish(rng, image, 0.02, 0.012), c.masks()


def fundus(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Colour photograph of the retina: disc, macula and the vessel arcades, in a round field."""
    c = Canvas(rng, size, (0, 0, 0), turn=0.1, zoom=(0.92, 1.05), shift=0.04, stretch=0.1)
    u = rng.uniform
    hue = np.array([u(0.72, 0.88), u(0.33, 0.45), u(0.10, 0.20)])
    field = c.blob(0, 0, 0.97, 0.97, wobble=0)
    light = (
        1.05
        - 0.35 * ((c.x - u(-0.3, 0.3)) ** 2 + (c.y - u(-0.3, 0.3)) ** 2)
        + 0.03 * fog(rng, size, 8)
    )
    c.paint(field, hue * light[..., None], soft=2)
    sign = (-1, 1)[rng.integers(2)]
    disc = np.array([sign * u(0.32, 0.52), u(-0.12, 0.12)])
    fovea = disc + np.array([-sign * u(0.58, 0.72), u(0.02, 0.14)])
    dark = np.exp(-((c.x - fovea[0]) ** 2 + (c.y - fovea[1]) ** 2) / 0.13**2)
    c.image *= 1 - 0.50 * dark[..., None]
    rim = c.blob(*disc, 0.16 * u(0.9, 1.15), 0.18 * u(0.9, 1.15), u(-0.3, 0.3), 0.03)
    c.paint(rim, (0.98, 0.82, 0.50), "optic disc", soft=4)
    cup = disc + rng.normal(0, 0.015, 2)
    c.paint(c.blob(*cup, 0.075, 0.085, 0, 0.05), (1.0, 0.95, 0.76), detail=True, soft=4)
    lines = []
    for up in (-1, 1):
        # an artery and a vein side by side: one arcade round the macula, one to the nose
        for pair in (0, 1):
            far = disc + np.array([-sign * u(1.0, 1.2), up * u(0.30, 0.55)])
            bend = disc + np.array([sign * 0.05, up * u(0.5, 0.65)])
            fall = disc + np.array([-sign * 0.55, up * u(0.65, 0.8)])
            arc = bezier(disc, bend, fall, far)
            rise = disc + np.array([sign * 0.1, up * 0.3])
            end = disc + np.array([sign * u(0.35, 0.6), up * u(0.5, 0.9)])
            nose = bezier(disc, rise, end)
            width = 0.032 + 0.012 * pair
            lines += [
                (arc, np.linspace(width, width * 0.4, len(arc))),
                (nose, np.linspace(width * 0.8, 0.012, len(nose))),
            ]
            for k in rng.integers(6, 20, 3):
                way = arc[k] - arc[k - 1]
                out = math.atan2(way[1], way[0]) + rng.choice((-1, 1)) * u(0.4, 0.9)
                lines += tree(rng, arc[k], out, u(0.15, 0.25), 0.018, 2, 0.4)
    # no vessels in the fovea
    before = c.image.copy()
    clear = np.clip(1 - 1.4 * dark, 0, 1)[..., None]
    c.draw(lines, hue * (0.55, 0.30, 0.35), 0.8)
    c.image = np.where((field > 0)[..., None], before + (c.image - before) * clear, before)
    macula = c.blob(*fovea, 0.18, 0.18, wobble=0)
    masks = c.masks() | {"macula": (macula > 0) & (field > 0)}
    return np.where((field > -1)[..., None], finish(rng, c.image, 0.012, 0, 0.08), 0), masks


def oct_scan(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Optical coherence tomogram: retinal layers with the foveal pit and a dark pocket of fluid."""
    c = Canvas(rng, size, 0, turn=0.05, zoom=(0.95, 1.05), shift=0.06, stretch=1)
    u = rng.uniform
    fovea = u(-0.3, 0.3)
    x = c.x
    pit = np.exp(-(((x - fovea) / 0.22) ** 2))
    # the pigment epithelium
    floor = 0.32 + u(-0.1, 0.1) + u(-0.10, 0.10) * x + u(-0.06, 0.10) * x**2
    kind = u() < 0.5
    fx = fovea + u(-0.45, 0.45)
    fw = u(0.24, 0.42)
    bump = np.exp(-(((x - fx) / (fw * 0.8)) ** 4))
    if kind:  # fluid below the retina lifts it
        high = u(0.17, 0.28)
        roof = floor - high * np.clip(1 - ((x - fx) / fw) ** 2, 0, None)
        thick = 0.52
        base = roof
    else:  # fluid within the retina swells it
        high = u(0.15, 0.25)
        thick = 0.52 + high * 0.9 * bump
        base = floor
    thick = thick - 0.24 * pit * (1 - 0.7 * bump * (not kind))
    depth = (c.y - base) / thick  # -1 the retina's surface, 0 its base
    v = np.interp(
        depth,
        (-1.06, -1, -0.93, -0.84, -0.78, -0.6, -0.55, -0.42, -0.36, -0.12, -0.09, 0),
        (0.05, 0.85, 0.8, 0.55, 0.6, 0.55, 0.3, 0.34, 0.5, 0.22, 0.22, 0.8),
    ).astype(np.float32)
    below = np.interp(
        (c.y - floor),
        (-0.02, 0, 0.05, 0.08, 0.14, 0.45, 0.9),
        (0.0, 1.0, 1.0, 0.45, 0.55, 0.22, 0.04),
    )
    c.image = np.where(c.y > floor - 0.012, below, np.where(depth < 0, v, 0.05)).astype(np.float32)
    if kind:
        pocket = np.minimum(c.y - roof, floor - c.y - 0.012) / c.px
    else:
        pocket = c.blob(
            fx,
            (floor - 0.62 * thick)[size[0] // 2, np.abs(x[size[0] // 2] - fx).argmin()] + 0.04,
            fw * 0.75,
            high * u(0.55, 0.75),
            0,
            0.12,
        )
    c.paint(pocket, 0.06, "retinal fluid", soft=2)
    image = np.clip(c.image * (0.35 + 0.62 * speckle(rng, size, 0.5, 0.9)), 0, 1.2) ** 0.8
    return finish(rng, image + 0.03, 0.012, contrast=0.08), c.masks()


# ---------------------------------------------------------------- photographs and microscopy


def dermoscopy(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Skin under the dermatoscope: an irregular pigmented lesion, hairs, vignette."""
    c = Canvas(rng, size, (0, 0, 0), turn=0.5, zoom=(0.9, 1.1), shift=0.05)
    u = rng.uniform
    skin = np.array([u(0.78, 0.92), u(0.58, 0.70), u(0.50, 0.62)])
    tone = 1 + 0.03 * fog(rng, size, 14) + 0.02 * fog(rng, size, 3)
    c.image = (skin * tone[..., None]).astype(np.float32)
    r = u(0.28, 0.52)
    x, y = rng.uniform(-0.42, 0.42, 2)
    lump = c.blob(x, y, r, r * u(0.7, 1.1), u(0, 3), 0.20) + 1.6 * fog(rng, size, 9)
    brown = np.array([u(0.40, 0.52), u(0.24, 0.32), u(0.16, 0.24)])
    c.paint(lump + 3, brown * 1.25, soft=9, opacity=0.5)
    net = 1 + 0.14 * fog(rng, size, 2.6) + 0.14 * fog(rng, size, 9)
    c.paint(lump, brown * net[..., None], "melanoma", soft=5)
    for _ in range(rng.integers(2, 5)):  # patches of other colours: black, blue-grey, red-brown
        px = x + u(-0.6, 0.6) * r
        py = y + u(-0.6, 0.6) * r
        colour = ((0.14, 0.09, 0.09), (0.34, 0.35, 0.42), (0.50, 0.20, 0.16), (0.22, 0.13, 0.10))[
            rng.integers(4)
        ]
        patch = np.minimum(c.blob(px, py, r * u(0.25, 0.5), r * u(0.2, 0.4), u(0, 3), 0.3), lump)
        c.paint(patch, colour, detail=True, soft=9, opacity=0.75)
    hairs = []
    for _ in range(rng.integers(0, 9)):
        p = rng.uniform(-1, 1, 2)
        a = u(0, 6.3)
        d = u(0.3, 0.8)
        q = p + d * 2 * np.array([math.cos(a), math.sin(a)])
        hairs.append((bezier(p, (p + q) / 2 + rng.normal(0, 0.15, 2), q), 0.014))
    c.draw(hairs, (0.16, 0.11, 0.09), 0.75)
    edge = 1 - 0.28 * np.clip(np.hypot(c.u / size[1], c.v / size[0]) * 2 - 0.6, 0, 1) ** 1.5
    if u() < 0.3:
        edge = edge * np.clip((1.22 - np.hypot(c.u / size[1], c.v / size[0]) * 2) * 20, 0, 1)
    masks = c.masks()
    masks["melanoma"] = ndimage.binary_opening(masks["melanoma"], iterations=2)
    return finish(rng, c.image * edge[..., None], 0.010, 0, 0.06), masks


def endoscopy(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Bowel seen through the endoscope: folds around a dark lumen and one polyp, lit from the
    camera."""
    c = Canvas(rng, size, (0, 0, 0), turn=0.4, zoom=(0.95, 1.1), shift=0.05)
    u = rng.uniform
    hole = rng.uniform(-0.55, 0.55, 2)
    dx = c.x - hole[0]
    dy = c.y - hole[1]
    r = np.hypot(dx, dy) + 1e-3
    a = np.arctan2(dy, dx)
    ring = np.log(r + 0.1) * u(4.5, 6.5) + 0.5 * np.sin(3 * a + u(0, 6)) * r
    ring = ring + 1.1 * fog(rng, size, min(size) / 3.2) * r**0.5
    # narrow bright crests, broad dim valleys
    fold = np.exp(1.4 * np.sin(ring) + 0.5 * np.sin(2 * ring)) / 3.5
    light = np.clip(0.16 + 0.78 * r**0.6, 0.05, 0.85) * (0.72 + 0.32 * fold) + 0.02 * fog(
        rng, size, 4
    )
    wall = np.array([u(0.82, 0.93), u(0.46, 0.56), u(0.40, 0.48)])
    c.image = (wall * light[..., None]).astype(np.float32)
    vessels = []
    for _ in range(4):
        vessels += tree(rng, rng.uniform(-1, 1, 2), u(0, 6.3), 0.3, 0.022, 2)
    c.draw(vessels, wall * (0.72, 0.40, 0.45), 0.35)
    distance = u(0.45, 0.75)
    direction = u(0, 6.3)
    x, y = hole + distance * np.array([math.cos(direction), math.sin(direction)])
    x = np.clip(x, -0.6, 0.6)
    y = np.clip(y, -0.6, 0.6)
    q = u(0.22, 0.36)
    polyp = c.blob(x, y, q, q * u(0.75, 1.05), u(0, 3), 0.09)
    c.paint(polyp + 4, wall * 0.42, soft=9, opacity=0.6)  # shadow at its foot
    bulge = np.clip(polyp * c.px / q, 0, 1)
    lit = (
        0.55
        + 0.62 * np.sqrt(bulge)
        - 0.16 * ((c.x - x) * (x - hole[0]) + (c.y - y) * (y - hole[1])) / q
    )
    lit = lit + 0.035 * fog(rng, size, 3)
    c.paint(polyp, wall * np.array([1.05, 0.80, 0.78]) * lit[..., None], "polyp", soft=1.8)
    for _ in range(rng.integers(4, 9)):  # wet highlights
        s = u(0.02, 0.05)
        if u() < 0.5:
            place = np.array([x, y]) + rng.normal(0, 0.35 * q, 2)
        else:
            place = rng.uniform(-0.8, 0.8, 2)
        gleam = c.blob(*place, s * 1.6, s * 0.7, u(0, 3), 0.3)
        c.paint(gleam, (1, 0.97, 0.95), detail=True, soft=2.5, opacity=0.85)
    rim = (np.abs(c.u / size[1] * 2) ** 5 + np.abs(c.v / size[0] * 2) ** 5) ** 0.2
    edge = np.clip((1.06 - rim) * 25, 0, 1)
    return finish(rng, np.clip(c.image, 0, 1) * edge[..., None], 0.010, 0, 0.06), c.masks()


def cells(
    c: Canvas,
    centres: np.ndarray,
    radii: np.ndarray,
    colour: np.ndarray,
    spread: float = 0.06,
    stretch: float = 0.7,
    opacity: float = 0.9,
) -> None:
    """Many small ellipses at once, each painted in its own little window (pixels)."""
    for (x, y), r in zip(centres, radii):
        y0 = int(max(0, y - r - 2))
        y1 = int(y + r + 3)
        x0 = int(max(0, x - r - 2))
        x1 = int(x + r + 3)
        window = c.image[y0:y1, x0:x1]
        if not window.size:
            continue
        a = c.rng.uniform(0, 3.2)
        tint = colour * (1 + c.rng.normal(0, spread))
        dx = np.arange(x0, x0 + window.shape[1]) - x
        dy = np.arange(y0, y0 + window.shape[0])[:, None] - y
        p = dx * math.cos(a) + dy * math.sin(a)
        q = dy * math.cos(a) - dx * math.sin(a)
        alpha = (
            np.clip(r - np.hypot(p, q / c.rng.uniform(stretch, 1)) + 0.5, 0, 1)[..., None] * opacity
        )
        window += (tint.astype(np.float32) - window) * alpha


def stroma(c: Canvas) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pink tissue with fibres and clefts; returns its pink, the violet of nuclei, and the fibres
    (H, W)."""
    rng = c.rng
    size = c.size
    u = c.rng.uniform
    pink = np.array([u(0.86, 0.93), u(0.60, 0.68), u(0.74, 0.80)])
    violet = np.array([u(0.34, 0.44), u(0.20, 0.28), u(0.48, 0.58)])
    fibre = fog(rng, (size[0], size[1] * 4), 5)[:, : size[1]] * 0.035 + 0.03 * fog(rng, size, 16)
    c.image = (pink * (1 + fibre[..., None])).astype(np.float32)
    holes = rng.uniform((0, 0), size[::-1], (10, 2))
    cells(c, holes, rng.uniform(1.5, 4, 10), np.array([0.96, 0.93, 0.95]), 0.01, 0.3, 0.8)  # clefts
    return pink, violet, fibre


def gland(
    c: Canvas,
    x: float,
    y: float,
    r: float,
    name: str | None,
    pink: np.ndarray,
    violet: np.ndarray,
    fibre: np.ndarray,
) -> None:
    """A ring of cells round a pale lumen, seen on the stroma."""
    rng = c.rng
    u = c.rng.uniform
    rx = r
    ry = r * u(0.75, 1)
    turn = u(0, 3)
    state = rng.bit_generator.state
    outer = c.blob(x, y, rx, ry, turn, 0.12)
    rng.bit_generator.state = state  # the lumen follows the same contour
    wall = np.minimum(0.5 * r, 0.17) / r * u(0.9, 1.2)
    lumen = c.blob(x, y, rx * (1 - 1.25 * wall), ry * (1 - 1.25 * wall), turn, 0.12)
    c.paint(outer + 1.5, (0.95, 0.86, 0.91), name, soft=2)
    c.paint(outer, pink * (0.90, 0.76, 0.95) * (1 + fibre[..., None]), name, soft=2)
    c.paint(lumen, (0.97, 0.95, 0.97), detail=True, soft=2)
    ring = np.argwhere((outer > 2) & (outer < 0.62 * r * wall / c.px + 1.5))[:, ::-1]
    rng.shuffle(ring)
    chosen = ring[: int(len(ring) / 9)]
    cells(c, chosen, rng.uniform(1.7, 2.6, len(chosen)), violet, 0.12, 0.6)


def histology(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """H&E: pink stroma, scattered nuclei, one big gland (nuclei in a ring round a lumen), some
    small ones."""
    c = Canvas(rng, size, (0, 0, 0), turn=1, zoom=(0.95, 1.1), shift=0.05, stretch=0.4)
    u = rng.uniform
    pink, violet, fibre = stroma(c)
    centres = rng.uniform((0, 0), size[::-1], (int(size[0] * size[1] / 190), 2))
    cells(c, centres, rng.uniform(1.4, 2.6, len(centres)), violet, 0.12, 0.4)
    r = u(0.36, 0.54)
    x, y = rng.uniform(-0.35, 0.35, 2)
    rings = [(x, y, r, "gland")]
    for _ in range(rng.integers(1, 4)):  # smaller neighbours, well away from it
        a = u(0, 6.3)
        s = u(0.15, 0.2)
        rings.append((x + (r + s + 0.14) * math.cos(a), y + (r + s + 0.14) * math.sin(a), s, None))
    for x, y, r, name in rings[::-1]:
        gland(c, x, y, r, name, pink, violet, fibre)
    return finish(rng, np.clip(c.image, 0, 1), 0.012, 0, 0.06), c.masks()


def blood_smear(rng: Rng, size: Size, target: str, modality: str) -> tuple[np.ndarray, Masks]:
    """Stained blood film: many red cells and one white cell with a lobed violet nucleus."""
    c = Canvas(rng, size, (0, 0, 0), turn=1, zoom=(0.95, 1.05), shift=0, stretch=0)
    u = rng.uniform
    paper = np.array([u(0.90, 0.95), u(0.86, 0.92), u(0.84, 0.90)])
    c.image = (paper * (1 + 0.015 * fog(rng, size, 20)[..., None])).astype(np.float32)
    red = np.array([u(0.82, 0.90), u(0.52, 0.62), u(0.52, 0.60)])
    r = u(0.13, 0.16) / c.px
    rows = np.arange(-r, size[0] + r, 2.15 * r)
    columns = np.arange(-r, size[1] + r, 2.15 * r)
    centres = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
    centres = centres + rng.normal(0, 0.32 * r, centres.shape)
    centres = centres[rng.uniform(size=len(centres)) < u(0.5, 0.85)]
    x, y = rng.uniform(-0.55, 0.55, 2)
    s = u(0.26, 0.38)
    far = np.hypot(*(centres - c.pixels([[x, y]])[0]).T) > s / c.px + 0.75 * r
    centres = centres[far]
    cells(c, centres, np.full(len(centres), r), red, 0.03, 0.85)
    cells(c, centres, np.full(len(centres), r * 0.45), red + 0.12, 0.02, 0.85, 0.7)
    grain = 1 + 0.03 * fog(rng, size, 3)[..., None]
    body = c.blob(x, y, s, s * u(0.9, 1.1), u(0, 3), 0.06)
    c.paint(body, (0.80, 0.74, 0.86) * grain, "white blood cell", soft=2)
    purple = np.array([u(0.36, 0.44), u(0.16, 0.24), u(0.52, 0.60)])
    lobes = rng.integers(1, 5)
    for k in range(lobes):
        a = k * 6.28 / max(3, lobes) + u(-0.3, 0.3)
        d = s * (0.12 if lobes == 1 else 0.42)
        q = s * (0.62 if lobes == 1 else 0.36)
        lobe = c.blob(x + d * math.cos(a), y + d * math.sin(a), q, q * u(0.75, 1), u(0, 3), 0.15)
        c.paint(lobe, purple * (1 + 0.08 * fog(rng, size, 3)[..., None]), detail=True, soft=2)
    return finish(rng, np.clip(c.image, 0, 1), 0.010, 0, 0.06), c.masks()


# ---------------------------------------------------------------- the real brain


def brain_mr(
    rng: Rng, size: Size, t1: np.ndarray, structures: Masks, target: str
) -> tuple[np.ndarray, Masks]:
    """A real T1 slice (uint8) and its structures (bool) in a new pose and contrast, perhaps with a
    tumour."""
    u = rng.uniform
    rows, cols = np.nonzero(t1)
    extent = np.array([np.ptp(rows) + 1, np.ptp(cols) + 1])
    scale = max(*(extent / np.array(size)), 120 / min(size)) / u(0.80, 0.95)  # mm a pixel
    angle = rng.normal(0, 0.09)
    squeeze = rng.uniform(0.95, 1.05, 2)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = scale * turn * squeeze
    middle = np.array([rows.min() + rows.max(), cols.min() + cols.max()]) / 2
    offset = middle - matrix @ ((np.array(size) - 1) / 2 + rng.uniform(-0.04, 0.04, 2) * size)

    def warp(plane: np.ndarray) -> np.ndarray:
        return ndimage.affine_transform(plane.astype(np.float32), matrix, offset, size, order=1)

    c = Canvas(rng, size)
    c.image = warp(t1) / 255
    c.names = [None, "brain"]
    c.labels = (c.image > 0.1).astype(np.uint8)
    masks = {name: warp(plane) > 0.5 for name, plane in structures.items()}
    low = u(0.15, 0.30)
    high = np.percentile(c.image[c.labels > 0], 98) * u(1, 1.1)
    c.image = np.clip((c.image - low) / (high - low), 0, 1) ** u(0.9, 1.3)
    c.image *= 1 + 0.12 * fog(rng, size, min(size) / 2)  # coil shading
    if target == "brain tumour":
        r = u(0.14, 0.25)
        x, y = c.spot(c.labels > 0, r * 1.15)
        inside = np.where(c.labels > 0, 99, -99)
        swelling = np.minimum(c.blob(x, y, r * 1.7, r * 1.5, u(0, 3), 0.25), inside)
        c.paint(swelling, 0.32 + 0.02 * fog(rng, size, 5), soft=6, opacity=0.75, detail=True)
        lump = np.minimum(c.blob(x, y, r, r * u(0.75, 1.2), u(0, 3), 0.2), inside)
        c.paint(lump, 0.88 + 0.07 * fog(rng, size, 4), "brain tumour", soft=2.5)
        for _ in range(rng.integers(1, 4)):  # dead tissue leaves an uneven ring
            dx, dy = rng.normal(0, 0.16 * r, 2)
            q = r * u(0.4, 0.62)
            core = np.minimum(c.blob(x + dx, y + dy, q, q * u(0.7, 1), u(0, 3), 0.25), lump - 2)
            c.paint(core, u(0.14, 0.34) + 0.03 * fog(rng, size, 3), detail=True, soft=3)
        masks = {target: c.mask(target)}
    noise = u(0.008, 0.025) * rng.standard_normal((2, *size), np.float32)
    return finish(rng, np.hypot(c.image + noise[0], noise[1]), 0, 0), masks
