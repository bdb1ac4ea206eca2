# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Find and decode image files: upright, RGB, transparent pixels on white, 16 bits and floats scaled to 8 bits."""

import io
import os
from collections import Counter
from pathlib import Path
from typing import BinaryIO, Iterable, Optional, TypeVar

import numpy as np
from datasets.utils.file_utils import xopen
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError


AnyPath = TypeVar("AnyPath", str, Path)
NOT_DECODED = ("BUFR", "GRIB", "HDF5", "MPEG", "WMF")  # formats that Pillow identifies and cannot decode


def split_images(files: Iterable[AnyPath]) -> tuple[list[AnyPath], list[AnyPath]]:
    """Return (image files, other files), sorted: by the endings of the formats that the installed Pillow decodes.

    Hidden files, such as `._0000.png` of macOS, are in neither.
    """
    formats = Image.registered_extensions()
    endings = {end for end, name in formats.items() if name in Image.OPEN and name not in NOT_DECODED}
    shown = sorted(file for file in files if not os.path.basename(file).startswith("."))
    images = [file for file in shown if _ending(file) in endings]
    return images, [file for file in shown if _ending(file) not in endings]


def count_by_ending(files: Iterable[AnyPath]) -> str:
    """Describe files that are not used: "3 .heic, 1 .txt"."""
    counts = Counter(_ending(file) or "without an ending" for file in files).most_common()
    shown = [f"{count} {ending}" for ending, count in counts[:10]]
    if counts[10:]:
        shown.append(f"{sum(count for _, count in counts[10:])} others")
    return ", ".join(shown)


def _ending(file: AnyPath) -> str:
    return os.path.splitext(file)[1].lower()


def read_image(path: Optional[str], content: Optional[bytes] = None) -> tuple[Optional[Image.Image], str]:
    """Decode an image from its bytes or, if there are none, its file or URL.

    Returns (an upright RGB image, ""), or (None, why it cannot be read).
    """
    try:
        if content is None:
            if not path:
                return None, "there is no image"
            with _open(path) as file:
                content = file.read()
        image = Image.open(io.BytesIO(content))
        image.load()
        orientation, image = _orientation(image), _as_rgb(image)
        # Without the rest of its EXIF block, which `exif_transpose` writes again, and at which it may fail.
        image.info, image.getexif()[ExifTags.Base.Orientation] = {}, orientation
        ImageOps.exif_transpose(image, in_place=True)
        return image, ""
    except UnidentifiedImageError:  # its message is the address of a buffer
        return None, "in no format that Pillow reads"
    except Exception as error:  # each decoder raises errors of its own: AVIF's RuntimeError, others struct.error ...
        return None, " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200]


def _open(path: str) -> BinaryIO:
    return xopen(path, "rb") if "://" in path else open(path, "rb")


def read_size(path: Optional[str], content: Optional[BinaryIO] = None) -> tuple[int, int]:
    """Read (height, width) of an image, upright, from its header; (0, 0) if that cannot be read."""
    try:
        with content or _open(path) as file, Image.open(file) as image:
            # Not by a method of PNG files, which reads all pixels to find an orientation behind them.
            turned = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if turned else image.size[::-1]
    except Exception:  # as in `read_image`, which says why
        return 0, 0


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # not an EXIF block; the pixels are good without it
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale a mode that `convert` would clip at 255 to gray (L, or LA if the file has a transparent value).

    Integers span 16 bits and floats [0, 1]; if values lie outside, their extremes. ValueError if one is not finite.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("has values that are not finite")
    low, high, white = values.min(), values.max(), 1 if image.mode == "F" else 65535
    if low >= 0 and high <= white:
        low, high = 0, white
    gray = Image.fromarray(np.round((values - low) * (255 / ((high - low) or 1))).astype(np.uint8))
    if "transparency" in image.info:  # the one value of a PNG file that is transparent
        gray.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return gray
