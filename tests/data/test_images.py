# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Image files: every mode of Pillow keeps its ramp, transparency is white, orientation survives any EXIF block, reasons."""

import io
import json
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin
from test_sources import make_args

from senseflow.data.images import read_image
from senseflow.data.sources import check_data_args


RAMP = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
GREY = Image.fromarray(RAMP)
VIA = {"La": "LA", "RGBa": "RGBA", "LAB": "RGB"}  # what Pillow converts to these from


def in_mode(mode):
    """A ramp from black to white in a mode of Pillow."""
    if mode.startswith("I;16"):
        order = {"I;16B": ">u2"}.get(mode, "<u2")
        return Image.frombytes(mode, GREY.size, (RAMP.astype(order) * 257).tobytes())
    if mode == "I":
        return Image.fromarray(RAMP.astype(np.int32) * 257)
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    return (GREY.convert(VIA[mode]) if mode in VIA else GREY).convert(mode)


def read(image, monkeypatch):
    """As if a file had this mode: Pillow writes few of them, and decoders give all."""
    monkeypatch.setattr(Image, "open", lambda file: image)
    return read_image(None, b"x")


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_keeps_its_ramp(mode, monkeypatch):
    found, why = read(in_mode(mode), monkeypatch)
    assert why == "" and found.mode == "RGB"
    off = np.abs(np.asarray(found, int) - RAMP[..., None])
    if mode == "1":  # black and white, dithered
        assert {tuple(pixel) for pixel in np.asarray(found).reshape(-1, 3)} == {(0, 0, 0), (255, 255, 255)}
        assert np.asarray(found)[:, 128:].mean() > 150 > 100 > np.asarray(found)[:, :128].mean()
    else:
        assert off.max() <= (2 if mode in ("LAB", "YCbCr") else 0)


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
    kind, ends, wanted = SPANS[case]
    Image.fromarray(np.linspace(*ends, 256)[None].repeat(4, 0).astype(kind)).save(tmp_path / "a.tiff")
    found = np.asarray(read_image(str(tmp_path / "a.tiff"))[0], int)
    assert np.abs(found - np.linspace(*wanted, 256)[None, :, None]).max() <= 1


def test_sixteen_bits_of_a_png_and_floats_that_are_no_numbers(tmp_path):
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.mode.startswith("I")
    assert np.array_equal(np.asarray(read_image(str(tmp_path / "a.png"))[0])[..., 0], RAMP)
    Image.fromarray(np.array([[0.5, np.nan]], np.float32)).save(tmp_path / "a.tiff")
    assert read_image(str(tmp_path / "a.tiff")) == (None, "has values that are not finite")


# Transparency --------------------------------------------------------------------------------------------------------------
def palette(key):
    image = Image.new("P", (4, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    for place in range(4):
        image.putpixel((place, 0), place)
    return image, key


def with_alpha(mode):
    image = Image.new("RGBA", (4, 1), (255, 0, 0, 0))  # red, and hidden
    image.putpixel((1, 0), (0, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    for step in {"LA": ["LA"], "La": ["LA", "La"], "RGBa": ["RGBa"], "PA": ["PA"], "RGBA": []}[mode]:
        image = image.convert(step)
    return image


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_transparent_pixels_are_put_on_white(mode, monkeypatch):
    found, _ = read(with_alpha(mode), monkeypatch)
    pixels = np.asarray(found)[0].tolist()
    assert pixels[0] == pixels[3] == [255, 255, 255] and pixels[1] == [0, 0, 0]
    assert mode == "PA" or np.abs(np.array(pixels[2]) - 204).max() <= 1


KEYS = {  # name: (image, its transparency, the places that are white then)
    "an entry": (lambda: palette(1)[0], 1, {1}),
    "the entries' alpha": (lambda: palette(0)[0], bytes([0, 255, 0, 255]), {0, 2}),
    "a grey": (lambda: Image.fromarray(np.array([[7, 8, 9, 7]], np.uint8)), 7, {0, 3}),
    "a color": (
        lambda: Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4], [3, 2, 1], [1, 2, 3]]], np.uint8)),
        (1, 2, 3),
        {0, 3},
    ),
    "sixteen bits": (lambda: Image.fromarray(np.array([[700, 701, 702, 700]], np.uint16)), 700, {0, 3}),
}


@pytest.mark.parametrize("case", KEYS)
def test_a_transparent_key_is_put_on_white(case):
    make, key, white = KEYS[case]
    content = io.BytesIO()
    make().save(content, "PNG", **({} if case == "sixteen bits" else {"transparency": key}))
    data = content.getvalue()
    if case == "sixteen bits":  # which Pillow reads and does not write
        chunk = b"tRNS" + struct.pack(">H", key)
        data = data[:33] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    pixels = np.asarray(read_image(None, data)[0])[0].tolist()
    assert {place for place, pixel in enumerate(pixels) if pixel == [255, 255, 255]} == white


# Orientation ---------------------------------------------------------------------------------------------------------------
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
    """White on the left."""
    image = Image.new("RGB", (32, 16))
    image.paste((255, 255, 255), (0, 0, 16, 16))
    content = io.BytesIO()
    image.save(content, form, **({} if block is None else {"exif": block}))
    return content.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_the_tag_says(orientation, form):
    white = {2: (24, 8), 3: (24, 8), 5: (8, 8), 6: (8, 8), 7: (8, 24), 8: (8, 24)}.get(orientation, (8, 8))
    found, _ = read_image(None, white_left(exif_block(orientation), form))
    assert found.size == ((16, 32) if orientation in (5, 6, 7, 8) else (32, 16))
    assert min(found.getpixel(white)) > 240
    assert max(found.getpixel((found.width - 1 - white[0], found.height - 1 - white[1]))) < 15


def test_no_exif_block_makes_a_sound_image_unreadable():
    block, numbers = exif_block(), random.Random(0)
    turned = 0
    for _ in range(400):
        broken = bytearray(block)
        for _ in range(numbers.choice((1, 2, 8))):
            broken[numbers.randrange(6, len(broken))] = numbers.choice(
                (0, 1, 2, 127, 128, 255, numbers.randrange(256))
            )
        if numbers.random() < 0.2:
            del broken[numbers.randrange(6, len(broken)) :]
        found, why = read_image(None, white_left(bytes(broken), numbers.choice(("JPEG", "PNG", "WEBP"))))
        assert why == "" and found.size in ((16, 32), (32, 16)), broken.hex()
        turned += found.size == (16, 32)
    assert turned > 200  # most blocks have their one tag still


# Reasons -------------------------------------------------------------------------------------------------------------------
def test_the_reason_is_handed_back(tmp_path, monkeypatch):
    assert read_image(None, None) == (None, "there is no image")
    assert read_image(str(tmp_path / "gone.png")) == (None, "No such file or directory")
    assert read_image(None, b"text") == (None, "in no format that Pillow reads")
    found, why = read_image(None, white_left(None)[:400])
    assert found is None and "truncated" in why.lower()
    avif = white_left(None, "AVIF")
    found, why = read_image(None, avif[:-30] + bytes(30))
    assert found is None and why and "\n" not in why

    def load(self):
        raise RuntimeError("Failed to decode\nframe 0")  # what the AVIF decoder says

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert read_image(None, white_left(None)) == (None, "Failed to decode frame 0")


def test_a_warning_gives_the_reason(tmp_path):
    (tmp_path / "a.png").write_bytes(b"?")
    (tmp_path / "data.json").write_text(json.dumps({"keys": [0], "image_paths": ["a.png"], "prompts": ["a"]}))
    rows = check_data_args(make_args(dataset_json=str(tmp_path / "data.json")))
    assert rows.read(0) == (str(tmp_path / "a.png"), None, "in no format that Pillow reads")
