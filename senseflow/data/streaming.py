# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Rows that come as a stream (--streaming): split over processes and workers, shuffled, endless; the position needs no state.

Every DataLoader worker of every process reads a sub-stream of its own, from files (or, where the processes do not divide their
number, from every so many rows of files) that no other reads in the same epoch. Worker w of W makes micro-batches w, w + W,
w + 2 W, ... of its process: the order in which a DataLoader asks its workers. Each takes as many rows as it has samples, readable
or not. So the iteration alone says how far each sub-stream has come, and a resumed run passes over the rows before, undecoded.
It goes on elsewhere with another number of processes, workers, samples per micro-batch or micro-batches per iteration.
"""

import itertools
import logging
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

from senseflow.data.captions import captions_of
from senseflow.data.images import read_image
from senseflow.errors import UserError


logger = logging.getLogger(__name__)

# Rows to draw from, per worker. datasets holds half as many again, and cannot shuffle more than 2 GiB: 5 MB an image.
SHUFFLE_BUFFER = 256
HEAD = 16  # rows from which the columns are known where the data set does not say
# What datasets raises over a file that is lost, cut or unlike the others.
BROKEN = (OSError, ValueError, RuntimeError, KeyError, pa.ArrowException, datasets.exceptions.DatasetsError)


@dataclass
class StreamedRows:
    """Where a stream comes from. Has no length. Picklable.

    Attributes:
        origin: the flag and its value, for messages.
        dataset: with the columns that are read, images undecoded, cut to `--max_train_samples`.
        image_column: None if no image is ever read.
        left_aside: what of the data set is not used, for the log; "" if everything is.
    """

    origin: str
    dataset: datasets.IterableDataset
    caption_column: str
    image_column: Optional[str] = None
    left_aside: str = ""

    @property
    def size(self) -> str:
        return f"{self.dataset.num_shards} files"

    def check_split(self, workers: int, world_size: int, limit: Optional[int]) -> None:
        """Refuses (UserError, exit code 2) more workers per process, or more of all, than there are files or rows for.

        Args:
            workers: `--dataloader_num_workers`; 0: the process reads for itself.
            limit: `--max_train_samples`.
        """
        files = split_dataset_by_node(self.dataset, rank=0, world_size=world_size).num_shards
        if workers > files:
            problem = (
                f"{self.origin} has {files} file{'s' * (files > 1)} for a process, and a worker needs one of its own"
            )
            raise UserError(f"--dataloader_num_workers {workers}: {problem}; give {files} or fewer", exit_code=2)
        parts = max(workers, 1) * world_size
        if limit is not None and limit < parts:
            problem = f"is fewer than the {parts} workers of all processes"
            raise UserError(f"--max_train_samples {limit}: {problem}; give {parts} or more", exit_code=2)


def undecoded(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    """The same with known columns, and images left as files or bytes. Raises one of BROKEN."""
    if dataset.features is None:
        dataset = dataset.cast(datasets.Dataset.from_list(list(dataset.take(HEAD))).features)
    return dataset.decode(False)


class Substream:
    """The endless rows of one worker as `senseflow.data.loader.PromptImages` reads them, by their position from 0.

    A row is there from when it is first asked for until `forget`. An unreadable image, and its prompt, gives way to the next
    readable row of the sub-stream; that row is also used in its own place.

    Args:
        rank, world_size: the process. The worker is the one that this runs in.
        position: rows before it are passed over.
    Raises:
        UserError: exit code 1: what follows in the stream cannot be read, an empty prompt, or no row at all.
    """

    field = "pixel_values"

    def __init__(self, rows: StreamedRows, seed: int, rank: int, world_size: int, position: int):
        self.rows, self.origin = rows, rows.origin
        self._following = itertools.islice(self._epochs(seed, rank, world_size), position, None)
        self._held: deque[dict[str, Any]] = deque()
        self._first = position  # of those held

    def _epochs(self, seed: int, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        row = None
        for epoch in itertools.count():
            # Not `set_epoch`: it writes to memory that all workers share, and they are not in the same epoch. One file after the
            # other: from several at a time, datasets would hold two row groups of each, and sleep for 5 s after each epoch.
            generator = np.random.default_rng((seed, epoch))
            order = self.rows.dataset.shuffle(
                generator=generator, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1
            )
            for row in split_dataset_by_node(order, rank=rank, world_size=world_size):
                yield row
            if row is None:
                raise UserError(
                    f"{self.origin}: a worker has files without a row; give fewer --dataloader_num_workers"
                )

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> dict[str, Any]:
        while position >= self._first + len(self._held):
            try:
                self._held.append(next(self._following))
            except BROKEN as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                fix = "mend it and go on with --resume_from_checkpoint latest"
                raise UserError(f"{self.origin}: the stream cannot be read on ({reason}); {fix}") from error
        return self._held[position - self._first]

    def forget(self, position: int) -> None:
        """Drops the rows before a position."""
        while self._first < position:
            self._held.popleft()
            self._first += 1

    def captions(self, position: int) -> list[str]:
        try:
            return captions_of(self[position][self.rows.caption_column])
        except ValueError as error:
            flag = f"--caption_column {self.rows.caption_column}"
            raise UserError(
                f"{flag}: {error} in row {position} of a worker's share of {self.origin}; caption it"
            ) from error

    def read(self, position: int) -> tuple[str, Optional[Image.Image], str]:
        """(name for messages, upright RGB image, ""); (name, None, why) if it cannot be read."""
        cell = self[position][self.rows.image_column] or {"path": None, "bytes": None}
        path, content = cell["path"], cell["bytes"]
        # Rows of a stream have no numbers. The name is the same in every epoch, so that it is warned of once.
        name = (
            path
            if path and content is None
            else f"{path or 'image'} of {self.captions(position)[0][:80]!r} in {self.origin}"
        )
        return name, *read_image(path, content)


class StreamedBatches(IterableDataset):
    """One process's share of a stream: endless lists of samples, a micro-batch each, for a DataLoader without a batch size.

    An empty list stands where it is a worker's turn and the micro-batch that the run starts with is a later worker's; to be
    passed over. Slot = (micro-batch * world_size + rank) * batch_size + place, as in `senseflow.data.loader.GlobalBatchSampler`.

    Args:
        samples: `samples(rows)` is a `senseflow.data.loader.PromptImages` over a `Substream`. Picklable.
        batch_size, accumulation: samples in a micro-batch, micro-batches in an iteration.
        iteration: number of the first iteration, from 0.
    """

    def __init__(
        self, rows: StreamedRows, samples: Callable[[Substream], Any], seed: int, batch_size: int, accumulation: int,
        rank: int, world_size: int, iteration: int,
    ):  # fmt: skip
        self.rows, self.samples, self.seed, self.batch_size, self.accumulation = (
            rows,
            samples,
            seed,
            batch_size,
            accumulation,
        )
        self.rank, self.world_size, self.iteration = rank, world_size, iteration
        if iteration > 0 and rank == 0:
            passed = iteration * accumulation * batch_size
            logger.info("%s: each process passes over the first %d rows of its share, undecoded", rows.origin, passed)

    def __iter__(self) -> Iterator[list]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first = self.iteration * self.accumulation
        if worker < first % workers:
            yield []
        made = (first - worker + workers - 1) // workers  # micro-batches below `first` that are this worker's
        stream = Substream(self.rows, self.seed, self.rank, self.world_size, made * self.batch_size)
        samples = self.samples(stream)
        for number in itertools.count(made * workers + worker, workers):
            iteration, micro = divmod(number, self.accumulation)
            position = number // workers * self.batch_size
            sample_index = (micro * self.world_size + self.rank) * self.batch_size
            yield samples.__getitems__(
                [(position + place, iteration, sample_index + place) for place in range(self.batch_size)]
            )
            stream.forget(position + self.batch_size)
