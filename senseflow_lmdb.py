# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Rows whose pictures were encoded beforehand: the LMDB folders that DMD2's scripts write. Keys and values:

    latents_shape       text "N C H W"
    latents_{row}_data  C * H * W numbers, raw float16: a VAE's latent, scaled as the network takes it
    prompts_{row}_data  UTF-8 text

The package lmdb is optional and imported at the first read. It maps the file into memory, so that reading past the end of a cut
file would kill the process: `LatentRows` compares sizes before it reads a value.
"""

import math
import os
from contextlib import contextmanager
from typing import Iterable, Optional

import numpy as np
import torch

from senseflow_args import UserError


class LatentRows:
    """Prompts and latents of one folder; like `senseflow_data.Rows`, but `read` returns latents. Picklable.

    Args:
        folder: holds data.mdb.
        limit: use the first so many rows; None: all.
    Attributes:
        shape: (C, H, W) of every row.
    Raises:
        UserError: exit code 2: no such folder, a cut file, no sound `latents_shape`.
    """

    field = "latents"

    def __init__(self, folder: str, limit: Optional[int] = None):
        self.folder, self.origin = folder, f"--dataset_lmdb {folder}"
        file = os.path.join(folder, "data.mdb")
        if not os.path.isfile(file):
            raise self._refusal("there is no data.mdb in such a folder", "give a folder that has one")
        try:
            with self._opened() as environment:
                promised = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        except OSError as error:
            raise self._refusal(f"data.mdb is cut, unreadable or no LMDB ({error})", "copy it again") from error
        size = os.path.getsize(file)
        if size < promised:
            raise self._refusal(f"data.mdb is cut: it has {size} of {promised} bytes", "copy it again")
        try:
            text = self._value("latents_shape").decode()
            self.count, *shape = [int(number) for number in text.split()]
            if len(shape) != 3 or min(self.count, *shape) < 1:
                raise ValueError(f"latents_shape is {text!r}")
        except (OSError, ValueError) as error:
            raise self._refusal(f"no shape can be read ({error})", 'store latents_shape as text, "N C H W"') from error
        self.shape, self.count = tuple(shape), min(self.count, limit or self.count)

    def _refusal(self, problem: str, fix: str) -> UserError:
        return UserError(" ".join(f"{self.origin}: {problem}; {fix}".split()), exit_code=2)

    @contextmanager
    def _opened(self):
        """A read-only environment. What lmdb raises becomes an OSError.

        Opened for each read, which takes 0.1 ms: an open one must not be inherited by a forked worker, cannot be pickled for a
        spawned one, and a process may have it open only once.
        """
        import lmdb

        try:
            with lmdb.open(self.folder, create=False, readonly=True, lock=False, readahead=False) as environment:
                yield environment
        except lmdb.Error as error:
            raise OSError(str(error)) from error

    def _value(self, key: str) -> bytes:
        """What is stored under a key. Raises OSError if that is nothing, or cannot be read."""
        with self._opened() as environment, environment.begin() as transaction:
            value = transaction.get(key.encode())
        if value is None:
            raise OSError(f"{key} is missing")
        return value

    def __len__(self) -> int:
        return self.count

    def prompt(self, row: int) -> str:
        """Raises UserError (exit code 1) if there is none: no other row's could stand in for it."""
        try:
            return self._value(f"prompts_{row}_data").decode()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.origin}: the prompt of row {row} cannot be read ({error}); write it again") from error

    def _latents(self, row: int) -> np.ndarray:
        """(C, H, W) float32. Raises OSError if there are none, ValueError if they have another size."""
        stored, wanted = self._value(f"latents_{row}_data"), 2 * math.prod(self.shape)
        if len(stored) != wanted:
            shape = " x ".join(map(str, self.shape))
            raise ValueError(f"latents_{row}_data has {len(stored)} bytes, {shape} in float16 has {wanted}")
        return np.frombuffer(stored, "<f2").reshape(self.shape).astype(np.float32)

    def read(self, row: int) -> tuple[str, Optional[torch.Tensor]]:
        """(name for messages, (C, H, W) float32), the latter None if it cannot be read or is not finite."""
        name = f"latents_{row}_data in {self.folder}"
        try:
            latents = self._latents(row)
        except (OSError, ValueError):
            return name, None
        return name, torch.from_numpy(latents) if np.isfinite(latents).all() else None

    def check(self, rows: Iterable[int], latents: bool) -> None:
        """Raises UserError (exit code 2) for the first of the rows whose prompt or, if asked, latents are not there."""
        for row in rows:
            try:
                self._value(f"prompts_{row}_data").decode()
                if latents:
                    self._latents(row)
            except (OSError, ValueError) as error:
                fix = "write it again, with as many rows as latents_shape says"
                raise self._refusal(f"row {row} cannot be read ({error})", fix) from error
