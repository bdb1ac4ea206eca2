# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Rows of captions and images: what the readers of all sources but streams and latents return."""

import hashlib
import itertools
import os
from typing import Any, Callable, Optional, Union

import datasets
from PIL import Image

from senseflow.data.images import read_image
from senseflow.errors import UserError


NUM_CHECKED = 512  # rows that must be readable before a run starts
PATH_ERRORS = "surrogatepass"  # Python reads bytes of file names that are not UTF-8 as lone surrogates


def data_error(origin: str, problem: str, fix: str, exit_code: int = 2) -> UserError:
    """Make a one-line error. `origin` is the flag and its value."""
    return UserError(" ".join(f"{origin}: {problem}; {fix}".split()), exit_code)


def uses_images(args) -> bool:
    """Tell whether the run reads images at all: for the GAN term, or for inputs that are noised real latents."""
    return args.gan_weight != 0 or args.backward_simulation_prob != 1


def rows_to_check(num_rows: int) -> list[int]:
    """Choose the rows to look at before a run starts: NUM_CHECKED or a few more, evenly spread, and the last one."""
    return sorted({*range(0, num_rows, max(1, num_rows // NUM_CHECKED)), num_rows - 1})


def parse_captions(cell: Any) -> list[str]:
    """List the captions of one row: a string or a list of strings. Raises ValueError (a predicate) for others."""
    captions = cell if isinstance(cell, list) else [cell]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"holds {str(cell)[:60]}, not a caption or a list of captions")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON may hold and no tokenizer takes
        raise ValueError(f"holds {ascii(cell)[:60]}, which is no valid Unicode: {error.reason}") from error
    return captions


class ImageRows:
    """Captions and images as Arrow columns, which forked workers share. Picklable.

    Args:
        origin: the flag and value that name the data set in messages.
        captions: a list of strings and lists of strings, or a data set of one such column.
        images: paths, or a data set of one column of undecoded images; None if no image is ever read.
        row_name: `row_name(row)` names a row in messages.
    Attributes:
        summary: for the log.
        fingerprint: what a resumed run compares: the number of rows, and a hash of all captions and names of files.
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
    ):
        listed = isinstance(captions, list)
        cells = captions if listed else (cell.as_py() for cell in captions.with_format("arrow")[:].column(0))
        names = map(os.path.basename, images) if isinstance(images, list) else itertools.repeat("")
        content = hashlib.sha256()
        for row, (cell, name) in enumerate(zip(cells, names)):
            try:
                content.update("\0".join([name, *parse_captions(cell), ""]).encode("utf-8", PATH_ERRORS))
            except ValueError as error:
                raise data_error(origin, f"{row_name(row)} {error}", "caption every row with text") from error
        if listed:
            captions = datasets.Dataset.from_dict({"captions": [parse_captions(cell) for cell in captions]})
        if isinstance(images, list):  # as bytes, since the names of files need not be UTF-8
            images = datasets.Dataset.from_dict({"images": [path.encode("utf-8", PATH_ERRORS) for path in images]})
        self.origin, self._captions, self._images = origin, captions, images
        self.summary = f"{len(captions)} rows"
        self.fingerprint = f"{self.summary}, hash {content.hexdigest()[:12]}"

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, row: int) -> list[str]:
        return parse_captions(next(iter(self._captions[row].values())))

    def read(self, row: int) -> tuple[str, Optional[Image.Image], str]:
        """Read a row's image: (name for messages, upright RGB image, ""), or (name, None, why it cannot be read)."""
        cell = next(iter(self._images[row].values())) or {"path": None, "bytes": None}
        if isinstance(cell, bytes):
            cell = {"path": cell.decode("utf-8", PATH_ERRORS), "bytes": None}
        path, content = cell["path"], cell["bytes"]
        # An image inside a table has a file name at best.
        name = path if path and content is None else f"{path or 'image'} (row {row} of {self.origin})"
        return name, *read_image(path, content)
