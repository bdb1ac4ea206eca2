# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Rows of captions and images: what the readers of all sources but streams and latents return."""

import hashlib
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable, Iterator, Optional, Union

import datasets
import pyarrow as pa
from filelock import FileLock
from PIL import Image

from senseflow.data.images import read_image, read_size
from senseflow.errors import UserError, write_atomically


NUM_CHECKED = 512  # rows that must be readable before a run starts
BATCH_ROWS = 10_000  # rows that are hashed or written at once
HASH = b"senseflow_hash"  # where a mapped table keeps the hash of its rows
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
    captions = _as_list(cell)
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"holds {str(cell)[:60]}, not a caption or a list of captions")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError as error:  # a lone surrogate, which JSON may hold and no tokenizer takes
        raise ValueError(f"holds {ascii(cell)[:60]}, which is no valid Unicode: {error.reason}") from error
    return captions


def _batches(column: Union[list, datasets.Dataset]) -> Iterator[list]:
    """Yield the cells of a list, or of a data set's one column, BATCH_ROWS at a time."""
    if isinstance(column, list):
        yield from (column[first : first + BATCH_ROWS] for first in range(0, len(column), BATCH_ROWS))
    else:
        yield from (table.column(0).to_pylist() for table in column.with_format("arrow").iter(BATCH_ROWS))


def hash_rows(
    origin: str, captions: Union[list, datasets.Dataset], paths: Optional[list[str]], row_name: Callable[[int], str]
) -> str:
    """Hash the captions and the names of the files of all rows. UserError (2): a row without captions."""
    content, first = hashlib.sha256(), 0
    for cells in _batches(captions):
        names = itertools.repeat("") if paths is None else map(os.path.basename, paths[first : first + len(cells)])
        rows: Any = zip(cells, names)
        try:
            "".join(cells).encode()  # most data sets have one caption a row: this checks them 10 times as fast
            texts = itertools.chain.from_iterable((name, cell) for cell, name in rows)
        except (TypeError, UnicodeEncodeError):
            texts = []
            for row, (cell, name) in enumerate(rows, start=first):
                try:
                    texts += [name, *parse_captions(cell)]
                except ValueError as error:
                    raise data_error(origin, f"{row_name(row)} {error}", "caption every row with text") from error
        content.update("\0".join([*texts, ""]).encode("utf-8", PATH_ERRORS))
        first += len(cells)
    return content.hexdigest()[:12]


def map_rows(origin: str, key: str, read: Callable[[], tuple[list, list[str]]]) -> tuple[datasets.Dataset, str]:
    """Map a table of captions and images from datasets' cache, into which the first process that asks writes it.

    All processes of a machine and their workers share its memory.

    Args:
        key: what the table is a function of.
        read: return captions, which are then checked, and paths.
    Returns:
        (the columns `captions` and `images`, the hash of the rows).
    Raises:
        UserError: exit code 2: a row without captions; a cache that cannot be written to.
    """
    path = Path(datasets.config.HF_DATASETS_CACHE) / "senseflow" / f"{key}.arrow"

    def write(aside: Path) -> None:
        captions, paths = read()
        schema = pa.schema({"captions": pa.list_(pa.string()), "images": pa.binary()})
        schema = schema.with_metadata({HASH: hash_rows(origin, captions, paths, "row {}".format)})
        with open(aside, "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for cells, names in zip(_batches(captions), _batches(paths)):
                columns = [_as_list(cell) for cell in cells], [_path_bytes(name) for name in names]
                writer.write(pa.record_batch(list(columns), schema=schema))

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                write_atomically(path, write)
        with pa.memory_map(str(path)) as file:
            content = pa.ipc.open_stream(file).schema.metadata[HASH].decode()
        return datasets.Dataset.from_file(str(path)), content
    except pa.ArrowInvalid as error:  # a machine may have stopped before the disk had all of it
        raise data_error(origin, f"{path} is damaged ({error})", "delete it: it is made again") from error
    except OSError as error:
        problem = f"{path.parent} cannot be written to ({error.strerror})"
        raise data_error(origin, problem, "set HF_HOME to a folder that can") from error


def _as_list(cell: Any) -> list:
    return cell if isinstance(cell, list) else [cell]


def _path_bytes(path: str) -> bytes:
    return path.encode("utf-8", PATH_ERRORS)  # the names of files need not be UTF-8


def get_field(row: Any, name: str) -> Any:
    """Get a row's cell, or of a cell with fields one, such as json.caption; None if there is none."""
    if not isinstance(row, dict) or name in row:
        return row[name] if isinstance(row, dict) else None
    column, dot, field = name.partition(".")
    return get_field(row.get(column), field) if dot else None


def _image_size(cell: pa.Scalar) -> tuple[int, int]:
    if isinstance(cell, pa.BinaryScalar):
        return read_size(cell.as_py().decode("utf-8", PATH_ERRORS))
    if not cell.is_valid:
        return 0, 0
    content = cell["bytes"].as_buffer()  # not copied: of a mapped file, only the header is read
    return read_size(cell["path"].as_py(), None if content is None else pa.BufferReader(content))


class ImageRows:
    """Captions and images as Arrow columns, which forked workers share. Picklable.

    Args:
        origin: the flag and value that name the data set in messages.
        captions: a list of strings and lists of strings, or a data set of one such column.
        images: paths, or a data set of one column of undecoded images or of paths as bytes; None if no image is ever
            read.
        row_name: `row_name(row)` names a row in messages.
        content: hash of the rows, which are checked; None: they are not, and it is computed.
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
        content: Optional[str] = None,
    ):
        if content is None:
            content = hash_rows(origin, captions, images if isinstance(images, list) else None, row_name)
        if isinstance(captions, list):
            captions = datasets.Dataset.from_dict({"captions": [_as_list(cell) for cell in captions]})
        if isinstance(images, list):
            images = datasets.Dataset.from_dict({"images": [_path_bytes(path) for path in images]})
        self.origin, self._captions, self._images = origin, captions, images
        self.summary = f"{len(captions)} rows"
        self.fingerprint = f"{self.summary}, hash {content}"

    def __len__(self) -> int:
        return len(self._captions)

    def captions(self, row: int) -> list[str]:
        return parse_captions(next(iter(self._captions[row].values())))

    def image_sizes(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Yield (height, width) of the images of rows `first` to `last` - 1, upright, from their headers alone.

        (0, 0) for an image that has none.
        """
        images = self._images.select(range(first, last)).with_format("arrow")
        with ThreadPoolExecutor(16) as pool:  # of a file system over the network, each file is waited for
            for table in images.iter(1000):
                yield from pool.map(_image_size, table.column(0))

    def all_captions(self) -> Iterator[str]:
        """Iterate over the captions of all rows."""
        for cells in _batches(self._captions):
            for cell in cells:
                yield from _as_list(cell)

    def read(self, row: int) -> tuple[str, Optional[Image.Image], str]:
        """Read a row's image: (name for messages, upright RGB image, ""), or (name, None, why it cannot be read)."""
        cell = next(iter(self._images[row].values())) or {"path": None, "bytes": None}
        if isinstance(cell, bytes):
            cell = {"path": cell.decode("utf-8", PATH_ERRORS), "bytes": None}
        path, content = cell["path"], cell["bytes"]
        # An image inside a table has a file name at best.
        name = path if path and content is None else f"{path or 'image'} (row {row} of {self.origin})"
        return name, *read_image(path, content)
