# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Rows of captions and images: what the readers of all sources but streams and latents return."""

import random
from typing import Callable, Iterator, Optional, Union

import datasets
from PIL import Image

from senseflow.data.captions import parse_captions
from senseflow.data.images import read_image
from senseflow.errors import UserError


NUM_CHECKED = 256  # rows at the start, and as many at random, that must be readable before a run starts


def data_error(origin: str, problem: str, fix: str, exit_code: int = 2) -> UserError:
    """Make a one-line error. `origin` is the flag and its value."""
    return UserError(" ".join(f"{origin}: {problem}; {fix}".split()), exit_code)


def uses_images(args) -> bool:
    """Tell whether the run reads images at all: for the GAN term, or for inputs that are noised real latents."""
    return args.gan_weight != 0 or args.backward_simulation_prob != 1


def rows_to_check(num_rows: int, seed: int) -> list[int]:
    """Choose the rows to look at before a run starts: the first ones, the last one and a random sample."""
    count = min(NUM_CHECKED, num_rows)
    return sorted({*range(count), num_rows - 1, *random.Random(seed).sample(range(num_rows), count)})


def _cells(column: Union[list, datasets.Dataset]) -> Iterator:
    if isinstance(column, list):
        yield from column
    else:
        for chunk in column.with_format("arrow")[:].column(0).chunks:
            yield from chunk.to_pylist()


class ImageRows:
    """Captions and images as Arrow columns. `len(rows)` is their number. Picklable.

    Args:
        origin: the flag and value that name the data set in messages.
        captions: strings and lists of strings: a list, or a data set of one column.
        images: paths, or a data set of one column of undecoded images; None if no image is ever read.
        row_name: `row_name(row)` names a row in messages.
        note: what of the data set is not used, for the log.
    Raises:
        UserError: exit code 2: a row without captions.
    """

    field = "pixel_values"

    def __init__(
        self,
        origin: str,
        captions: Union[list, datasets.Dataset],
        images: Union[list[str], datasets.Dataset, None] = None,
        row_name: Callable[[int], str] = "row {}".format,
        note: str = "",
    ):
        for row, cell in enumerate(_cells(captions)):
            try:
                parse_captions(cell)
            except ValueError as error:
                raise data_error(origin, f"{row_name(row)} {error}", "caption every row with text") from error
        if isinstance(captions, list):
            captions = datasets.Dataset.from_dict({"captions": [parse_captions(cell) for cell in captions]})
        if isinstance(images, list):
            images = datasets.Dataset.from_dict({"images": images})
            images = images.cast_column("images", datasets.Image(decode=False))
        self.origin, self._captions, self._images = origin, captions, images
        self.summary = f"{len(captions)} rows{note and f' ({note})'}"

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, row: int) -> list[str]:
        """List a row's captions."""
        return parse_captions(next(iter(self._captions[row].values())))

    def read(self, row: int) -> tuple[str, Optional[Image.Image], str]:
        """Read a row's image: (name for messages, upright RGB image, ""), or (name, None, why it cannot be read)."""
        cell = next(iter(self._images[row].values())) or {"path": None, "bytes": None}
        path, content = cell["path"], cell["bytes"]
        # An image inside a table has a file name at best.
        name = path if path and content is None else f"{path or 'image'} (row {row} of {self.origin})"
        return name, *read_image(path, content)
