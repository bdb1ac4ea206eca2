# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read rows as a stream (--streaming): split over processes and workers, shuffled, endless, without state.

Every DataLoader worker of every process reads a sub-stream of its own, from files (or, where the processes do not
divide their number, from every so many rows of files) that no other reads in the same epoch. Worker w of W makes
micro-batches w, w + W, w + 2 W, ... of its process: the order in which a DataLoader asks its workers. Each takes as
many rows as it has samples, readable or not. So the iteration alone gives the position in each sub-stream, and a
resumed run skips the rows before it, undecoded. With another number of processes, workers, samples per micro-batch or
micro-batches per iteration, the position is another one.
"""

import itertools
import os
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional

import datasets
import numpy as np
import pyarrow as pa
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from senseflow.data.images import read_image
from senseflow.data.rows import data_error, get_field, parse_captions


# Rows that each worker shuffles. datasets holds half as many again, and cannot shuffle more than 2 GiB: 5 MB an image.
SHUFFLE_BUFFER = 256
# What datasets raises over a file that is lost, cut or unlike the others.
STREAM_ERRORS = (OSError, ValueError, RuntimeError, KeyError, pa.ArrowException, datasets.exceptions.DatasetsError)


@dataclass
class StreamedRows:
    """Where a stream comes from. Has no length. Picklable.

    Attributes:
        origin: the flag and value that name the data set in messages.
        dataset: with the columns that are read, images undecoded, cut to --max_train_samples.
    """

    origin: str
    dataset: datasets.IterableDataset
    caption_column: str
    image_column: str

    @property
    def summary(self) -> str:
        return f"{self.dataset.num_shards} files"

    @property
    def fingerprint(self) -> str:
        """What a resumed run compares: the number of files, since rows and their captions are not known before."""
        return self.summary


def make_streamed_rows(args, origin: str, dataset: datasets.IterableDataset) -> StreamedRows:
    """Make the rows of a stream. UserError (2) for more workers in a process than it has files, or than rows."""
    # Every launcher sets the variable; accelerate's process group is made after the checks.
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    files = split_dataset_by_node(dataset, rank=0, world_size=world_size).num_shards
    if args.dataloader_num_workers > files:
        problem = f"{origin} has {files} files for a process, and a worker needs one of its own"
        raise data_error(f"--dataloader_num_workers {args.dataloader_num_workers}", problem, f"give {files} or fewer")
    readers = max(args.dataloader_num_workers, 1) * world_size
    if args.max_train_samples is not None and args.max_train_samples < readers:
        problem = f"fewer than the {readers} workers of all processes, each of which needs a row"
        raise data_error(f"--max_train_samples {args.max_train_samples}", problem, f"give {readers} or more")
    return StreamedRows(origin, dataset, args.caption_column, args.image_column)


class Substream:
    """The endless rows of one worker, by their position from 0, for `senseflow.data.loader.PromptImageDataset`.

    A row is held from when it is first asked for until `forget`. An unreadable image, and its prompt, is replaced by
    the next readable row of the sub-stream; that row is also used in its own place.

    Args:
        rank, world_size: the process. The worker is the one that this runs in.
        position: rows before it are skipped.
    Raises:
        UserError: exit code 1: the stream breaks off, a row has no caption, or the worker has no row at all.
    """

    field = "pixel_values"

    def __init__(self, rows: StreamedRows, seed: int, rank: int, world_size: int, position: int):
        self.rows, self.origin = rows, rows.origin
        self._stream = itertools.islice(self._epochs(seed, rank, world_size), position, None)
        self._held: deque[dict[str, Any]] = deque()
        self._first = position  # of those held

    def _epochs(self, seed: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        row = None
        for epoch in itertools.count():
            # Not `set_epoch`: it writes to memory that all workers share, and they are not in the same epoch. One file
            # after the other: from several at a time, datasets would hold two row groups of each, and sleep for 5 s
            # after each epoch.
            generator = np.random.default_rng((seed, epoch))
            options = {"buffer_size": SHUFFLE_BUFFER, "max_buffer_input_shards": 1}
            order = self.rows.dataset.shuffle(generator=generator, **options)
            for row in split_dataset_by_node(order, rank=rank, world_size=world_size):
                yield row
            if row is None:
                raise data_error(self.origin, "a worker has no row", "give fewer --dataloader_num_workers", 1)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> dict[str, Any]:
        while position >= self._first + len(self._held):
            try:
                self._held.append(next(self._stream))
            except STREAM_ERRORS as error:
                problem = f"the stream breaks off ({type(error).__name__}: {error})"
                fix = "repair it and continue with --resume_from_checkpoint latest"
                raise data_error(self.origin, problem, fix, 1) from error
        return self._held[position - self._first]

    def forget(self, position: int) -> None:
        """Drop the rows before a position."""
        while self._first < position:
            self._held.popleft()
            self._first += 1

    def captions(self, position: int) -> list[str]:
        try:
            return parse_captions(get_field(self[position], self.rows.caption_column))
        except ValueError as error:
            flag, row = f"--caption_column {self.rows.caption_column}", f"row {position} of a worker's share"
            raise data_error(flag, f"{row} of {self.origin} {error}", "caption it", 1) from error

    def read(self, position: int) -> tuple[str, Optional[Image.Image], str]:
        """Read a row's image: (name for messages, upright RGB image, ""), or (name, None, why it cannot be read)."""
        cell = self[position][self.rows.image_column] or {"path": None, "bytes": None}
        path, name = cell["path"], cell["path"]
        if not path or cell["bytes"] is not None:
            # Rows of a stream have no numbers. The name is the same in every epoch, so that one warning is given.
            name = f"{path or 'image'} of {self.captions(position)[0][:80]!r} in {self.origin}"
        return name, *read_image(path, cell["bytes"])


@dataclass
class StreamedBatches(IterableDataset):
    """One process's share of a stream for a DataLoader without a batch size: endless micro-batches (lists of samples).

    A worker whose turn comes before that of the first micro-batch's worker gives an empty list, to be skipped. Sample
    indices are those of `senseflow.data.loader.GlobalBatchSampler`.

    Args:
        make_samples: `make_samples(substream)` is a `senseflow.data.loader.PromptImageDataset`. Picklable.
        batch_size, accumulation: samples in a micro-batch, micro-batches in an iteration.
        iteration: number of the first iteration, from 0.
    """

    rows: StreamedRows
    make_samples: Callable[[Substream], Any]
    seed: int
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    iteration: int

    def __iter__(self) -> Iterator[list]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = self.iteration * self.accumulation
        if worker < first % workers:
            yield []
        made = (first - worker + workers - 1) // workers  # micro-batches below `first` that are this worker's
        stream = Substream(self.rows, self.seed, self.rank, self.world_size, made * self.batch_size)
        samples = self.make_samples(stream)
        for number in itertools.count(made * workers + worker, workers):
            iteration, micro = divmod(number, self.accumulation)
            position = number // workers * self.batch_size
            index = (micro * self.world_size + self.rank) * self.batch_size
            yield samples.__getitems__([(position + i, iteration, index + i) for i in range(self.batch_size)])
            stream.forget(position + self.batch_size)
