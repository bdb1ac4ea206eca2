# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Rows whose images were encoded beforehand: the LMDB folders that DMD2's scripts write. Keys, values:

    latents_shape       text "N C H W"
    latents_{row}_data  C * H * W numbers, raw float16: a VAE's latent, scaled as the network takes it
    prompts_{row}_data  UTF-8 text

The package lmdb is optional and imported at the first read. It maps the file into memory, so that reading past the end of a cut
file would kill the process: `LatentRows` compares sizes before it reads a value.
"""

import bisect
import math
import os
from contextlib import contextmanager
from typing import Iterable, Optional

import numpy as np

from senseflow.errors import UserError


class LatentRows:
    """Prompts and latents of one LMDB folder, or of a folder of several, one after the other in the order of their names.

    Like `senseflow.data.sources.Rows`, but `read` returns latents. Picklable.

    Args:
        folder: holds data.mdb, or folders that do.
        limit: use the first so many rows; None: all.
    Attributes:
        shape: (C, H, W) of every row.
    Raises:
        UserError: exit code 2: no such folder, a cut file, no sound `latents_shape`, shapes that differ; names the folder.
    """

    field, left_aside = "latents", ""

    def __init__(self, folder: str, limit: Optional[int] = None):
        self.folder, self.origin = folder, f"--dataset_lmdb {folder}"
        self.folders, self.starts, shapes = [folder], [0], []
        if os.path.isdir(folder) and not os.path.isfile(os.path.join(folder, "data.mdb")):
            inside = sorted(
                entry.path for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
            )
            self.folders = inside or [folder]
        for part in self.folders:
            count, *shape = self._header(part)
            self.starts.append(self.starts[-1] + count)
            shapes.append(tuple(shape))
            if shapes[-1] != shapes[0]:
                found, first = (" x ".join(map(str, sizes)) for sizes in (shapes[-1], shapes[0]))
                problem = f"{part} has latents of {found}, {self.folders[0]} of {first}"
                raise self._refusal(problem, "give folders of one shape, each in a run of its own")
        self.shape, self.count = shapes[0], min(self.starts[-1], limit or self.starts[-1])

    def _header(self, folder: str) -> list[int]:
        """N, C, H, W of a folder whose file is whole."""
        file = os.path.join(folder, "data.mdb")
        where = "" if folder == self.folder else f"{folder}: "
        if not os.path.isfile(file):
            raise self._refusal(
                f"{where}there is no data.mdb in such a folder", "give a folder that has one, or folders that have"
            )
        try:
            with self._opened(folder) as environment:
                promised = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        except OSError as error:
            raise self._refusal(f"{where}data.mdb is cut, unreadable or no LMDB ({error})", "copy it again") from error
        size = os.path.getsize(file)
        if size < promised:
            raise self._refusal(f"{where}data.mdb is cut: it has {size} of {promised} bytes", "copy it again")
        try:
            text = self._value(folder, "latents_shape").decode()
            shape = [int(number) for number in text.split()]
            if len(shape) != 4 or min(shape) < 1:
                raise ValueError(f"latents_shape is {text!r}")
        except (OSError, ValueError) as error:
            raise self._refusal(
                f"{where}no shape can be read ({error})", 'store latents_shape as text, "N C H W"'
            ) from error
        return shape

    def _place(self, row: int) -> tuple[str, int]:
        """(folder, number in it) of a row."""
        part = bisect.bisect_right(self.starts, row) - 1
        return self.folders[part], row - self.starts[part]

    def _refusal(self, problem: str, fix: str) -> UserError:
        return UserError(" ".join(f"{self.origin}: {problem}; {fix}".split()), exit_code=2)

    @contextmanager
    def _opened(self, folder: str):
        """A read-only environment. What lmdb raises becomes an OSError.

        Opened for each read, which takes 0.1 ms: an open one must not be inherited by a forked worker, cannot be pickled for a
        spawned one, and a process may have it open only once.
        """
        import lmdb

        try:
            with lmdb.open(folder, create=False, readonly=True, lock=False, readahead=False) as environment:
                yield environment
        except lmdb.Error as error:
            raise OSError(str(error)) from error

    def _value(self, folder: str, key: str) -> bytes:
        """What is stored under a key. Raises OSError if that is nothing, or cannot be read."""
        with self._opened(folder) as environment, environment.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise OSError(f"{key} is missing")
        return value

    def __len__(self) -> int:
        return self.count

    @property
    def size(self) -> str:
        return f"{self.count} rows"

    def _prompt(self, row: int) -> str:
        folder, number = self._place(row)
        return self._value(folder, f"prompts_{number}_data").decode()

    def _latents(self, row: int) -> np.ndarray:
        """(C, H, W) float32. Raises OSError if there are none, ValueError if they have another size."""
        folder, number = self._place(row)
        key, wanted = f"latents_{number}_data", 2 * math.prod(self.shape)
        stored = self._value(folder, key)
        if len(stored) != wanted:
            shape = " x ".join(map(str, self.shape))
            raise ValueError(f"{key} has {len(stored)} bytes, {shape} in float16 has {wanted}")
        return np.frombuffer(stored, "<f2").reshape(self.shape).astype(np.float32)

    def _named(self, row: int) -> str:
        folder, number = self._place(row)
        return f"row {number}" + ("" if folder == self.folder else f" of {folder}")

    def captions(self, row: int) -> list[str]:
        """The row's one prompt. Raises UserError (exit code 1) if there is none: no other row's could stand in for it."""
        try:
            return [self._prompt(row)]
        except (OSError, UnicodeDecodeError) as error:
            problem = f"the prompt of {self._named(row)} cannot be read ({error})"
            raise UserError(f"{self.origin}: {problem}; write it again") from error

    def read(self, row: int) -> tuple[str, Optional[np.ndarray], str]:
        """(name for messages, (C, H, W) float32, ""); (name, None, why) if it cannot be read or is not finite."""
        name = "latents_{1}_data in {0}".format(*self._place(row))
        try:
            latents = self._latents(row)
        except (OSError, ValueError) as error:
            return name, None, str(error)
        return (name, latents, "") if np.isfinite(latents).all() else (name, None, "it is not finite")

    def check(self, rows: Iterable[int], latents: bool) -> None:
        """Raises UserError (exit code 2) for the first of the rows whose prompt or, if asked, latents are not there."""
        for row in rows:
            try:
                self._prompt(row)
                if latents:
                    self._latents(row)
            except (OSError, ValueError) as error:
                fix = "write it again, with as many rows as latents_shape says"
                raise self._refusal(f"{self._named(row)} cannot be read ({error})", fix) from error
