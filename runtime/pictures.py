"""A picture with mask, box and key points drawn in, as asm.overlay returns it."""

from itertools import cycle

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

OVERLAY_SIDE = 448  # pictures with a shorter long side are enlarged to it
MASK_COLOUR, BOX_COLOUR, POINT_COLOURS = (
    (20, 220, 190),
    (255, 196, 61),
    ((255, 82, 119), (176, 116, 255)),
)


def draw(image, mask=None, bbox=None, points=None):
    """The picture with mask (tint, outline), box and key points drawn in; any of the three may be None.
    image   PIL image or (H, W, 3) uint8 array
    mask    (H, W) bool, else ValueError
    bbox    (x1, y1, x2, y2), edges, image frame; points: any number of (x, y), pixel indices, image frame
    ->      PIL RGB image, enlarged to a long side of 448 px if it is smaller, so that the lines are crisp
    """
    picture = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    enlargement = max(1.0, OVERLAY_SIDE / max(picture.size))
    size = [max(1, round(side * enlargement)) for side in picture.size]
    finer = (
        2 if max(size) <= 1024 else 1
    )  # PIL draws hard edges: draw at twice the size, then shrink
    canvas = picture.resize([finer * side for side in size], Image.Resampling.BICUBIC)
    line = finer * max(2, round(max(size) / 280))
    if mask is not None:
        if np.shape(mask) != picture.size[::-1]:
            raise ValueError(
                f"mask: {np.shape(mask)} is not the image's size, {picture.size[::-1]}"
            )
        inside = Image.fromarray(np.asarray(mask, dtype=bool).astype(np.uint8) * 255)
        inside = inside.resize(canvas.size, Image.Resampling.BILINEAR).point(
            lambda grey: 255 * (grey > 127)
        )
        contour = ImageChops.subtract(
            inside, inside.filter(ImageFilter.MinFilter(line // 2 * 2 + 1))
        )
        tint = inside.point(lambda grey: grey * 36 // 100)
        canvas.paste(MASK_COLOUR, mask=ImageChops.lighter(tint, contour))
    pen = ImageDraw.Draw(canvas)
    factor = np.array(canvas.size) / picture.size  # image frame -> canvas
    if bbox is not None:
        (x1, y1), (x2, y2) = np.sort(np.reshape(bbox, (2, 2)), axis=0) * factor
        # the dark halo keeps the line readable on bright tissue
        for grow, width, colour in ((line, 2 * line, "#141414"), (line / 2, line, BOX_COLOUR)):
            pen.rectangle((x1 - grow, y1 - grow, x2 + grow, y2 + grow), outline=colour, width=width)
    for point, colour in zip([] if points is None else points, cycle(POINT_COLOURS)):
        x, y = (
            np.array(point, dtype=float) + 0.5
        ) * factor  # a point is a pixel's index: draw at its centre
        for radius, fill in ((3.2 * line, "#141414"), (2.7 * line, "white"), (1.9 * line, colour)):
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return canvas.resize(size, Image.Resampling.LANCZOS)
