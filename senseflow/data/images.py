# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Image files as they should be looked at: upright, RGB, transparent pixels on white, 16 bits and floats scaled to 8 bits."""

import io
from typing import Optional

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image, UnidentifiedImageError


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by the EXIF orientation tag


def read_image(path: Optional[str], content: Optional[bytes] = None) -> tuple[Optional[Image.Image], str]:
    """(an upright RGB image, "") out of its bytes or, where there are none, its file or URL; (None, why) if it cannot be read."""
    try:
        if content is None:
            if not path:
                return None, "there is no image"
            with xopen(path, "rb") if "://" in path else open(path, "rb") as file:
                content = file.read()
        image = Image.open(io.BytesIO(content))
        image.load()
        orientation = _orientation(image)
        image = _as_rgb(image)
        return (image.transpose(TURNS[orientation]) if orientation in TURNS else image), ""
    except UnidentifiedImageError:  # its message names a place in the memory
        return None, "in no format that Pillow reads"
    except (
        Exception
    ) as error:  # Each decoder raises what it likes over a broken file: AVIF's RuntimeError, others struct.error ...
        return None, " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]


def _orientation(image: Image.Image) -> int:
    # The one tag, not ImageOps.exif_transpose: that rewrites the whole block, which a tag that nobody needs can break.
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a block that is no EXIF, which the image's pixels do not need
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _in_eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts it to
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _in_eight_bits(image: Image.Image) -> Image.Image:
    """Grey (L, or LA) of a mode that `convert` would clip at 255.

    Integers span 16 bits and floats [0, 1]; where 32-bit ones lie outside, their own extremes. ValueError if one is not finite.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    low, high, white = values.min(), values.max(), 1 if image.mode == "F" else 65535
    if low >= 0 and high <= white:
        low, high = 0, white
    grey = Image.fromarray(np.round((values - low) * (255 / ((high - low) or 1))).astype(np.uint8))
    if "transparency" in image.info:  # a PNG's one value that is transparent
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey
