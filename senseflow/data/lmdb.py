# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --dataset_lmdb: prompts and latents in the LMDB folder that DMD2's scripts write. Keys and values:

    latents_shape       text "N C H W"
    latents_{row}_data  C * H * W numbers, raw float16: a VAE's latent, scaled as the network takes it
    prompts_{row}_data  UTF-8 text

The package lmdb is optional and imported at the first read. It maps the file into memory, so that reading past the end
of a cut file would kill the process: sizes are compared first.
"""

import hashlib
import math
import os
from contextlib import contextmanager
from typing import Iterator, Optional

import numpy as np

from senseflow.data.rows import data_error, rows_to_check, uses_images
from senseflow.errors import require_package


class LatentRows:
    """Prompts and latents of one LMDB folder. Like `senseflow.data.rows.ImageRows`, but `read` returns latents.

    Picklable.

    Args:
        limit: use the first so many rows; None: all.
    Attributes:
        shape: (C, H, W) of every row.
        fingerprint: what a resumed run compares; see `read_lmdb`.
    Raises:
        UserError: exit code 2: no such folder, a cut file, no valid `latents_shape`.
    """

    field = "latents"

    def __init__(self, folder: str, limit: Optional[int] = None):
        self.origin, self.folder = f"--dataset_lmdb {folder}", folder
        try:
            count, *shape = self._read_shape()
        except (OSError, ValueError) as error:
            fix = 'copy it again; data.mdb must be there, with latents_shape as text, "N C H W"'
            raise data_error(self.origin, f"it is cut or no LMDB of latents ({error})", fix) from error
        self.shape, self._count = tuple(shape), min(count, limit or count)
        self.summary = self.fingerprint = f"{self._count} rows"

    def _read_shape(self) -> list[int]:
        """Read N, C, H, W. Raises OSError or ValueError if they are not there or the file is cut."""
        size = os.path.getsize(os.path.join(self.folder, "data.mdb"))
        with self._open() as environment:
            expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        if size < expected:
            raise ValueError(f"data.mdb has {size} of {expected} bytes")
        text = self._get("latents_shape").decode()
        shape = [int(number) for number in text.split()]
        if len(shape) != 4 or min(shape) < 1:
            raise ValueError(f"latents_shape is {text!r}")
        return shape

    @contextmanager
    def _open(self):
        """Open a read-only environment. Turns lmdb's errors into OSError.

        Opened for each read, which takes 0.1 ms: an open one must not be inherited by a forked worker, cannot be
        pickled for a spawned one, and a process may have it open only once.
        """
        import lmdb

        try:
            with lmdb.open(self.folder, create=False, readonly=True, lock=False, readahead=False) as environment:
                yield environment
        except lmdb.Error as error:
            raise OSError(str(error)) from error

    def _get(self, key: str) -> bytes:
        """Get the value of a key. Raises OSError if there is none or it cannot be read."""
        with self._open() as environment, environment.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise OSError(f"{key} is missing")
        return value

    def __len__(self) -> int:
        return self._count

    def prompt(self, row: int) -> str:
        """Read the row's prompt. Raises OSError or ValueError."""
        return self._get(f"prompts_{row}_data").decode()

    def captions(self, row: int) -> list[str]:
        """List the row's one prompt. Raises UserError (exit code 1) if there is none: no other can replace it."""
        try:
            return [self.prompt(row)]
        except (OSError, ValueError) as error:
            problem = f"the prompt of row {row} cannot be read ({error})"
            raise data_error(self.origin, problem, "write it again", 1) from error

    def all_captions(self) -> Iterator[str]:
        """Iterate over the prompts of all rows. UserError as by `captions`."""
        for row in range(len(self)):
            yield from self.captions(row)

    def latents(self, row: int) -> np.ndarray:
        """Read (C, H, W) float32. Raises OSError if they are not there, ValueError if they have another size."""
        value, size = self._get(f"latents_{row}_data"), 2 * math.prod(self.shape)
        if len(value) != size:
            raise ValueError(f"latents_{row}_data has {len(value)} bytes, {self.shape} in float16 has {size}")
        return np.frombuffer(value, "<f2").reshape(self.shape).astype(np.float32)

    def read(self, row: int) -> tuple[str, Optional[np.ndarray], str]:
        """Read (name for messages, (C, H, W) float32, ""), or (name, None, why it cannot be read or is not finite)."""
        name = f"latents_{row}_data in {self.folder}"
        try:
            latents = self.latents(row)
        except (OSError, ValueError) as error:
            return name, None, str(error)
        return (name, latents, "") if np.isfinite(latents).all() else (name, None, "it is not finite")


def read_lmdb(args, path: str) -> LatentRows:
    """Read shapes and sizes, and try some rows, whose prompts go into the fingerprint. UserError (exit code 2)."""
    require_package("lmdb", "--dataset_lmdb")
    rows = LatentRows(path, args.max_train_samples)
    content = hashlib.sha256()
    for row in rows_to_check(len(rows)):
        try:
            content.update(rows.prompt(row).encode())
            if uses_images(args):
                rows.latents(row)
        except (OSError, ValueError) as error:
            raise data_error(rows.origin, f"row {row} cannot be read ({error})", "write it again") from error
    rows.fingerprint = f"{rows.summary}, hash {content.hexdigest()[:12]}"
    return rows
