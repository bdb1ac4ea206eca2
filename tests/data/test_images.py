# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Image files: modes of Pillow, transparency, orientation under any EXIF block, reasons."""

import io
import random
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin

from senseflow.data.images import read_image


RAMP = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
GRAY = Image.fromarray(RAMP)
VIA = {"RGBa": "RGBA", "LAB": "RGB"}  # what Pillow converts to these modes from


def in_mode(mode):
    """A ramp from black to white in a mode of Pillow."""
    if mode.startswith("I;16"):
        order = {"I;16B": ">u2"}.get(mode, "<u2")
        return Image.frombytes(mode, GRAY.size, (RAMP.astype(order) * 257).tobytes())
    if mode == "I":
        return Image.fromarray(RAMP.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    return (GRAY.convert(VIA[mode]) if mode in VIA else GRAY).convert(mode)


def read(image, monkeypatch):
    """Read an image as if a file had its mode: Pillow writes few of them, and decoders make all."""
    monkeypatch.setattr(Image, "open", lambda file: image)
    return read_image(None, b"x")


@pytest.mark.parametrize("mode", [mode for mode in Image.MODES if mode != "La"])
def test_every_mode_keeps_its_ramp(mode, monkeypatch):
    image, reason = read(in_mode(mode), monkeypatch)
    assert reason == "" and image.mode == "RGB"
    pixels = np.asarray(image, int)
    if mode == "1":  # black and white, dithered
        assert {tuple(pixel) for pixel in pixels.reshape(-1, 3)} == {(0, 0, 0), (255, 255, 255)}
        assert pixels[:, 128:].mean() > 150 > 100 > pixels[:, :128].mean()
    else:
        assert np.abs(pixels - RAMP[..., None]).max() <= (2 if mode in ("LAB", "YCbCr") else 0)


SPANS = {  # name: (values at the ends of the ramp, what they become)
    "I within 16 bits": (np.int32, (0, 32768), (0, 128)),
    "I of few values": (np.int32, (0, 255), (0, 1)),
    "I beyond 16 bits": (np.int32, (-1000, 2_000_000), (0, 255)),
    "I of one value": (np.int32, (2_000_000, 2_000_000), (0, 0)),
    "F in [0, 1]": (np.float32, (0, 0.5), (0, 128)),
    "F beyond": (np.float32, (-3, 5000), (0, 255)),
    "F beyond 1": (np.float32, (0, 255), (0, 255)),
}


@pytest.mark.parametrize("case", SPANS)
def test_numbers_are_scaled_by_their_range(case, tmp_path):
    dtype, ends, expected = SPANS[case]
    Image.fromarray(np.linspace(*ends, 256)[None].repeat(4, 0).astype(dtype)).save(tmp_path / "a.tiff")
    pixels = np.asarray(read_image(str(tmp_path / "a.tiff"))[0], int)
    assert np.abs(pixels - np.linspace(*expected, 256)[None, :, None]).max() <= 1


def test_sixteen_bits_of_a_png_and_floats_that_are_not_finite(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode.startswith("I")
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "a.png"))[0])[..., 0], RAMP)
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "a.tiff")
    assert read_image(str(tmp_path / "a.tiff")) == (None, "has values that are not finite")


# Transparency --------------------------------------------------------------------------------------------------------
def palette():
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for index in range(4):
        image.putpixel((index, 0), index)
    return image


def with_alpha(mode):
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 0))  # red, and hidden
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "PA"])
def test_transparent_pixels_are_put_on_white(mode, monkeypatch):
    pixels = np.asarray(read(with_alpha(mode), monkeypatch)[0])[0].tolist()
    assert pixels[0] == pixels[3] == [255, 255, 255] and pixels[1] == [0, 0, 0]
    assert mode == "PA" or np.abs(np.array(pixels[2]) - 204).max() <= 1


KEYS = {  # name: (image, its transparency, the positions that become white)
    "an entry": (palette, 1, {1}),
    "the entries' alpha": (palette, bytes([0, 255, 0, 255]), {0, 2}),
    "a gray": (lambda: Image.fromarray(np.array([[7, 8, 9, 7]], np.uint8)), 7, {0, 3}),
    "a gray of 16 bits": (lambda: Image.fromarray(np.array([[7, 8, 9, 7]], np.uint16)), 7, {0, 3}),
    "a color": (
        lambda: Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4], [3, 2, 1], [1, 2, 3]]], np.uint8)),
        (1, 2, 3),
        {0, 3},
    ),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_transparent_key_is_put_on_white(case):
    make, key, white = KEYS[case]
    content = io.BytesIO()
    make().save(content, "PNG", transparency=key)
    pixels = np.asarray(read_image(None, content.getvalue())[0])[0].tolist()
    assert {index for index, pixel in enumerate(pixels) if pixel == [255, 255, 255]} == white


# Orientation ---------------------------------------------------------------------------------------------------------
def exif_block(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E], exif[0x0132], exif[0x011A] = (
        "a description",
        "2026:01:01 00:00:00",
        TiffImagePlugin.IFDRational(72, 1),
    )
    exif.get_ifd(0x8769)[0x9003] = "2026:01:01 00:00:00"
    return exif.tobytes()


def white_left(block, form="JPEG"):
    """Encode an image that is white on the left."""
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    content = io.BytesIO()
    image.save(content, form, **({} if block is None else {"exif": block}))
    return content.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright_by_the_tag(orientation, form):
    white = {2: (24, 8), 3: (24, 8), 5: (8, 8), 6: (8, 8), 7: (8, 24), 8: (8, 24)}.get(orientation, (8, 8))
    image, _ = read_image(None, white_left(exif_block(orientation), form))
    assert image.size == ((16, 32) if orientation in (5, 6, 7, 8) else (32, 16))
    assert min(image.getpixel(white)) > 240
    assert max(image.getpixel((image.width - 1 - white[0], image.height - 1 - white[1]))) < 15


def test_no_exif_block_makes_a_good_image_unreadable():
    block, rng = exif_block(), random.Random(0)
    turned = 0
    for _ in range(400):
        broken = bytearray(block)
        for _ in range(rng.choice((1, 2, 8))):
            broken[rng.randrange(6, len(broken))] = rng.choice((0, 1, 2, 127, 128, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            del broken[rng.randrange(6, len(broken)) :]
        image, reason = read_image(None, white_left(bytes(broken), rng.choice(("JPEG", "PNG", "WEBP"))))
        assert reason == "" and image.size in ((16, 32), (32, 16)), broken.hex()
        turned += image.size == (16, 32)
    assert turned > 200  # most blocks still have the tag


# Reasons -------------------------------------------------------------------------------------------------------------
def test_the_reason_is_returned(tmp_path, monkeypatch):
    assert read_image(None, None) == (None, "there is no image")
    assert read_image(str(tmp_path / "gone.png")) == (None, "No such file or directory")
    assert read_image(None, b"text") == (None, "in no format that Pillow reads")
    image, reason = read_image(None, white_left(None)[:400])
    assert image is None and "truncated" in reason.lower()
    image, reason = read_image(None, white_left(None, "AVIF")[:-30] + bytes(30))
    assert image is None and reason and "\n" not in reason

    def load(self):
        raise RuntimeError("Failed to decode\nframe 0")  # as the AVIF decoder

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert read_image(None, white_left(None)) == (None, "Failed to decode frame 0")


def test_an_image_may_lie_behind_a_url(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", white_left(None, "PNG"))
    assert read_image(f"zip://a.png::{tmp_path / 'images.zip'}")[0].getpixel((5, 5)) == (255, 255, 255)
    assert read_image(f"zip://gone.png::{tmp_path / 'images.zip'}")[0] is None
