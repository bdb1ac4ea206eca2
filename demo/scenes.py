"""The demo's data set: captioned scenes rendered by code.

A scene is one object on a background, 64 x 64 px, and its caption names three attributes:

    "red star on stripes"

Everything else (position, size, rotation, shade, angle and phase of the stripes, ...) is drawn at random. Images of
one caption therefore differ, and a loss of diversity within a caption can be measured.
"""

import itertools
import math

import numpy as np
from PIL import Image, ImageDraw


RESOLUTION = 64
SUPERSAMPLING = 4  # shapes are rendered this much larger and averaged down, for smooth edges

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 70),
    "blue": (50, 90, 225),
    "yellow": (240, 205, 40),
    "purple": (150, 60, 190),
    "cyan": (50, 200, 215),
}
SHAPES = ("square", "triangle", "star", "ring")
BACKGROUNDS = ("slate", "paper", "dusk", "stripes")

# One entry per attribute, in the order of `attributes` tuples.
ATTRIBUTES = {"colour": tuple(COLORS), "shape": SHAPES, "background": BACKGROUNDS}


def caption_of(attributes):
    """Return the caption of an `attributes` tuple (color, shape, background)."""
    color, shape, background = attributes
    return f"{color} {shape} on {background}"


def parse_caption(caption):
    """Return the attributes tuple (color, shape, background) of a caption; ValueError for any other text."""
    words = caption.split()
    attributes = (words[0], words[1], words[3]) if len(words) == 4 else ()
    if not attributes or any(word not in names for word, names in zip(attributes, ATTRIBUTES.values())):
        raise ValueError(f"not a caption of a scene: {caption!r}; one looks like 'red star on stripes'")
    return attributes


def labels_of(caption):
    """Return the class index of every attribute that `caption` names, in the order of `ATTRIBUTES`."""
    return tuple(names.index(word) for word, names in zip(parse_caption(caption), ATTRIBUTES.values()))


def all_captions():
    """Return all 96 captions, in a fixed order."""
    return [caption_of(attributes) for attributes in itertools.product(*ATTRIBUTES.values())]


def render(attributes, rng):
    """Render one scene.

    Args:
        attributes: tuple (color, shape, background) of words from `ATTRIBUTES`.
        rng: `numpy.random.Generator`; decides everything that the caption does not name.

    Returns:
        An RGB `PIL.Image` of 64 x 64 px.
    """
    color, shape, background = attributes
    canvas = _background(background, rng)
    x, y = rng.uniform(26, 38, size=2)
    mask = _shape_mask(shape, x, y, radius=rng.uniform(16, 20), rotation=rng.uniform(-0.25, 0.25))
    paint = np.clip(np.array(COLORS[color]) * rng.uniform(0.85, 1.1), 0, 255)
    pixels = canvas * (1 - mask) + paint * mask
    return Image.fromarray(np.clip(np.round(pixels), 0, 255).astype(np.uint8))


def sample_scenes(count, seed):
    """Yield `count` pairs (caption, image), in epochs over all captions; every epoch has its own order.

    Scene i depends on (seed, i) only.
    """
    captions = all_captions()
    for index in range(count):
        epoch, position = divmod(index, len(captions))
        if position == 0:
            order = np.random.default_rng([seed, epoch]).permutation(len(captions))
        caption = captions[order[position]]
        yield caption, render(parse_caption(caption), np.random.default_rng([seed, epoch, position]))


def _background(background, rng):
    """Render the background: float array [64, 64, 3] in [0, 255]."""
    grid_y, grid_x = np.mgrid[0:RESOLUTION, 0:RESOLUTION] + 0.5
    tint = rng.uniform(0.94, 1.06, size=3)
    if background == "slate":
        gray = np.full_like(grid_x, rng.uniform(25, 70))
    elif background == "paper":
        gray = np.full_like(grid_x, rng.uniform(205, 240))
    elif background == "dusk":  # a ramp from dark to light in any direction
        angle = rng.uniform(0, 2 * math.pi)
        along = ((grid_x - 32) * math.cos(angle) + (grid_y - 32) * math.sin(angle)) / 45
        gray = 125 + rng.uniform(85, 115) * along
    else:  # stripes of any angle and phase; the edge is one pixel wide
        angle = rng.uniform(0, math.pi)
        period = rng.uniform(14, 20)
        along = grid_x * math.cos(angle) + grid_y * math.sin(angle) + rng.uniform(0, period)
        wave = np.abs((along / period) % 1 - 0.5) * 2 - 0.5  # triangle wave in [-.5, .5]
        dark, light = rng.uniform(60, 95), rng.uniform(150, 190)
        gray = dark + (light - dark) * np.clip(wave * period / 2 + 0.5, 0, 1)
    return gray[..., None] * tint


def _shape_mask(shape, x, y, radius, rotation):
    """Compute the share of every pixel that the shape covers, float array [64, 64, 1] in [0, 1].

    Lengths are in px, rotation in radians.
    """
    scale = SUPERSAMPLING
    image = Image.new("L", (RESOLUTION * scale, RESOLUTION * scale), 0)
    pen = ImageDraw.Draw(image)

    def ellipse(r, fill):
        pen.ellipse([(x - r) * scale, (y - r) * scale, (x + r) * scale, (y + r) * scale], fill=fill)

    def polygon(corner_radii):
        step = 2 * math.pi / len(corner_radii)
        angles = [rotation - math.pi / 2 + step * index for index in range(len(corner_radii))]
        pen.polygon(
            [((x + r * math.cos(a)) * scale, (y + r * math.sin(a)) * scale) for r, a in zip(corner_radii, angles)],
            fill=255,
        )

    if shape == "ring":
        ellipse(radius, 255)
        ellipse(radius * 0.5, 0)
    elif shape == "square":
        rotation += math.pi / 4
        polygon([radius * 1.15] * 4)
    elif shape == "triangle":
        polygon([radius * 1.2] * 3)
    else:
        polygon([radius * 1.2, radius * 0.5] * 5)
    return np.asarray(image.reduce(scale), dtype=np.float64)[..., None] / 255
