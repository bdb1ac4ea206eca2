# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Make micro-batches: transform images, order samples without state, replace unreadable images, run workers.

Iteration `i` trains on one GLOBAL batch of train_batch_size * gradient_accumulation_steps * world_size samples. A
sample's index is its position in it. Its row, crop and flip follow from (seed, iteration, samples seen before, index)
alone, so the same global batch comes at any number of processes and micro-batches, and a resumed run continues as if
it had not stopped. With --streaming, the row follows from more than that: see senseflow.data.streaming.

Workers may be forked or spawned: nothing that they are given is a lambda or a local class. They send bytes of uint8
arrays through a pipe. torch would put tensors into the shared memory, of which containers
have 64 MB. The main process converts the arrays to floats.
"""

import logging
import signal
import threading
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Callable, Iterator, Optional, Sequence, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset, Sampler

from senseflow.data.buckets import BucketRows, Buckets, make_buckets
from senseflow.data.mixture import MixedRows, WeightedOrder
from senseflow.data.rows import data_error
from senseflow.data.streaming import StreamedBatches, StreamedRows
from senseflow.errors import UserError
from senseflow_utils import StatelessRNG


logger = logging.getLogger(__name__)

FIELDS = ("pixel_values", "latents")  # a batch has one of them
WORKER_TIMEOUT = 1800  # seconds without an answer of a worker that end a run; a stream may skip rows for longer
MIN_ROWS = 1000  # the share of unreadable rows is checked from so many rows on
Key = tuple[int, int, int]  # what a sample is a function of: row, iteration (from 0), sample index


def make_dataloader(
    args, rows, rank: int, world_size: int, iteration: int, samples_seen: int, needs_images: Callable[[int], bool]
) -> "PromptImageLoader":
    """Make the endless micro-batches of this rank, `--gradient_accumulation_steps` of them an iteration.

    Args:
        iteration, samples_seen: where to start (see `GlobalBatchSampler`; `iteration` alone in a stream).
        needs_images: `needs_images(iteration)`: whether images are read. Picklable.
    """
    mixed = isinstance(rows, MixedRows)
    if rank == 0:
        num_samples = args.max_train_steps * args.train_batch_size * args.gradient_accumulation_steps * world_size
        for line in rows.describe(num_samples) if mixed else [f"{rows.origin}: {rows.summary}"]:
            logger.info(line)
    order = args.seed, args.train_batch_size, args.gradient_accumulation_steps, rank, world_size, iteration
    buckets, bucket_rows = make_buckets(args, rows)
    make_samples = partial(
        PromptImageDataset,
        buckets=buckets,
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        seed=args.seed,
        needs_images=needs_images,
    )
    workers = args.dataloader_num_workers
    if isinstance(rows, StreamedRows):
        batches = StreamedBatches(rows, make_samples, *order)
        return PromptImageLoader(
            batches, batch_size=None, collate_fn=collate, num_workers=workers, worker_init_fn=ignore_ctrl_c
        )
    if bucket_rows is not None:
        batches = BucketBatchSampler(len(rows), *order, samples_seen, bucket_rows=bucket_rows)
    else:
        weighted = WeightedOrder(rows.groups, rows.weights, args.seed) if mixed and rows.weights else None
        batches = GlobalBatchSampler(len(rows), *order, samples_seen, weighted)
    return PromptImageLoader(
        make_samples(rows),
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_ctrl_c,
        timeout=WORKER_TIMEOUT if workers > 0 else 0,
    )


def ignore_ctrl_c(worker: int) -> None:
    """Let a worker outlive a Ctrl-C, which reaches all processes of a terminal: the run goes on to its checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Samples -------------------------------------------------------------------------------------------------------------
def draw_caption(captions: Sequence[str], seed: int, iteration: int, sample_index: int) -> str:
    """Draw one of a sample's captions: a function of (seed, iteration, sample index) alone."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(StatelessRNG(seed, iteration).integers("caption", [sample_index], 0, len(captions) - 1))]


@dataclass
class PromptImageDataset(Dataset):
    """`dataset[(row, iteration, sample_index)]` is a dict:

        pixel_values  (3, H, W) uint8 array; None where needs_images(iteration) is false: nothing is read then
        latents       (C, H, W) float32 array or None, in the place of pixel_values if `rows` holds latents
        prompt        one of the row's captions
        size          (H, W) in pixels of all images of the iteration
        row           the row used: instead of one with an unreadable image, the next readable one, with its prompt
        sample_index  as asked for
        unreadable    (name, why) of the images or latents skipped, in order

    Args:
        rows: `ImageRows`, `LatentRows` or a `Substream`.
        buckets: give the size of an iteration. Images are scaled to cover it (Lanczos), and cropped.
        center_crop, random_flip: crop the center instead of a random part; flip half of the samples. Latents stay as
            they are.
    Raises:
        UserError: nothing readable in all rows, or in 1,000 in a row; no prompt in a row of latents.
    """

    rows: Any
    buckets: Buckets
    center_crop: bool
    random_flip: bool
    seed: int
    needs_images: Callable[[int], bool]

    def __getitem__(self, key: Key) -> dict[str, Any]:
        row, iteration, index = key
        unreadable, value, size = [], None, self.buckets.size(iteration)
        if self.needs_images(iteration):
            row, value, unreadable = self._next_readable(row)
            if self.rows.field == "pixel_values":
                value = self._transform(value, size, StatelessRNG(self.seed, iteration), index)
        prompt = draw_caption(self.rows.captions(row), self.seed, iteration, index)
        sample = {self.rows.field: value, "size": size, "prompt": prompt, "row": row, "sample_index": index}
        return {**sample, "unreadable": unreadable}

    def __getitems__(self, keys: list[Key]) -> list[Union[dict[str, Any], UserError]]:
        """Return the samples for a DataLoader. A UserError is returned: raised, it would arrive as a traceback."""
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return [error]

    def _next_readable(self, row: int) -> tuple[int, Union[Image.Image, np.ndarray], list[tuple[str, str]]]:
        unreadable = []
        # If the disk is gone, one sample must not try a million rows.
        tries = min(len(self.rows), MIN_ROWS)
        for candidate in range(row, row + tries):
            candidate %= len(self.rows)
            name, value, reason = self.rows.read(candidate)
            if value is not None:
                return candidate, value, unreadable
            unreadable.append((name, reason))
        problem = "none of {} rows can be read, one is {}: {}".format(tries, *unreadable[0])
        raise data_error(self.rows.origin, problem, "repair them", 1)

    def _transform(self, image: Image.Image, size: Sequence[int], rng: StatelessRNG, sample_index: int) -> np.ndarray:
        size = size[1], size[0]  # as Pillow counts: width, height
        wanted, own = max(zip(size, image.size), key=lambda sides: sides[0] / sides[1])
        scaled = [max(low, round(side * wanted / own)) for low, side in zip(size, image.size)]
        spare = [side - low for side, low in zip(scaled, size)]
        corner = [pixels // 2 for pixels in spare]
        if not self.center_crop:
            draws = rng.uniform("crop", [sample_index], shape=(2,))[0].tolist()
            corner = [min(int(draw * (pixels + 1)), pixels) for draw, pixels in zip(draws, spare)]
        # Compute only the pixels inside the crop: the same values, and a long thin image cannot fill the memory.
        steps = [side / new for side, new in zip(image.size, scaled)]
        low = [first * step for first, step in zip(corner, steps)]
        ends = [first + side for first, side in zip(corner, size)]
        high = [min(end * step, side) for end, step, side in zip(ends, steps, image.size)]
        image = image.resize(size, Image.Resampling.LANCZOS, box=(*low, *high))
        if self.random_flip and rng.uniform("flip", [sample_index]).item() < 0.5:
            image = ImageOps.mirror(image)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def collate(samples: list[Union[dict[str, Any], UserError]]) -> Union[dict[str, Any], UserError, None]:
    """Make a micro-batch of numpy arrays. A UserError stays one; no samples (see `StreamedBatches`) become None.

    Images or latents are None where they are not read. `num_replaced` samples have another row than their own.
    """
    if not samples or isinstance(samples[0], UserError):
        return samples[0] if samples else None
    field = next(field for field in FIELDS if field in samples[0])
    values = [sample[field] for sample in samples]
    return {
        field: None if values[0] is None else np.stack(values),
        "size": samples[0]["size"],
        "prompts": tuple(sample["prompt"] for sample in samples),  # a pipeline's encode_prompt writes into a list
        "sample_indices": [sample["sample_index"] for sample in samples],
        "rows": [sample["row"] for sample in samples],
        "unreadable": [skipped for sample in samples for skipped in sample["unreadable"]],
        "num_replaced": sum(bool(sample["unreadable"]) for sample in samples),
    }


# Batches -------------------------------------------------------------------------------------------------------------
@lru_cache(maxsize=2)  # a batch that crosses epochs needs two
def epoch_order(num_rows: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(num_rows, generator=StatelessRNG(seed, epoch).generator("epoch_order"))


@dataclass
class GlobalBatchSampler(Sampler[list[Key]]):
    """Endless micro-batches of one rank: lists of `batch_size` keys, `accumulation` of them an iteration.

    Position p = samples_seen + sample index of the whole run is row permutation(seed, p // num_rows)[p % num_rows]:
    over all ranks every row comes once per epoch, and batches cross epochs. Sample index = (micro-batch * world_size +
    rank) * batch_size + position in the micro-batch.

    Args:
        iteration: number of the first iteration, from 0.
        samples_seen: samples of all iterations before it, over all ranks. Each iteration adds a global batch.
        weighted: the order of rows with --dataset_weights, instead of that permutation.
    """

    num_rows: int
    seed: int
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    iteration: int = 0
    samples_seen: int = 0
    weighted: Optional[WeightedOrder] = None

    def row(self, position: int) -> int:
        """Return the row at a position of the run, from 0."""
        if self.weighted is not None:
            return self.weighted.row(position)
        epoch, index = divmod(position, self.num_rows)
        return int(epoch_order(self.num_rows, self.seed, epoch)[index])

    def __iter__(self) -> Iterator[list[Key]]:
        iteration, seen = self.iteration, self.samples_seen
        while True:
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * self.batch_size
                yield [(self.row(seen + index), iteration, index) for index in range(first, first + self.batch_size)]
            iteration, seen = iteration + 1, seen + self.batch_size * self.accumulation * self.world_size


@dataclass
class BucketBatchSampler(GlobalBatchSampler):
    """Endless micro-batches of one rank, as `GlobalBatchSampler`, but with rows of one size in each iteration.

    Over all ranks every row comes once before any row of its size comes again, of its data set with --dataset_weights.
    """

    bucket_rows: Optional[BucketRows] = None

    def __iter__(self) -> Iterator[list[Key]]:
        share = self.batch_size * self.world_size
        starts = self.bucket_rows.starts(self.iteration, self.samples_seen, share * self.accumulation)
        for iteration, (bucket, start) in enumerate(starts, start=self.iteration):
            for first in range(self.rank * self.batch_size, share * self.accumulation, share):
                indices = range(first, first + self.batch_size)
                yield [(self.bucket_rows.row(bucket, start + index), iteration, index) for index in indices]


class UnreadableCounter:
    """Warn of each unreadable row of a rank once, and fail when they are more than 1 % of 1,000 rows or more."""

    def __init__(self, origin: str):
        self.origin, self.num_rows, self.num_replaced, self.warned = origin, 0, 0, set()

    def add(self, batch: dict[str, Any]) -> Optional[UserError]:
        """Count a collated batch. Return the error (exit code 1) that should end the run, if any."""
        for name, reason in batch["unreadable"]:
            if name not in self.warned:
                logger.warning("unreadable (%s), the next readable row is used instead: %s", reason, name)
            self.warned.add(name)
        if any(batch.get(field) is not None for field in FIELDS):
            self.num_rows += len(batch["rows"])
            self.num_replaced += batch["num_replaced"]
        if self.num_rows < MIN_ROWS or self.num_replaced * 100 <= self.num_rows:
            return None
        share = f"{self.num_replaced} of {self.num_rows} rows could not be read (more than 1 %)"
        return data_error(self.origin, f"{share}, one is {min(self.warned)}", "repair or drop them", 1)


_waiting = False  # whether the main process waits for a worker


def _on_worker_exit(*_) -> None:
    # torch's own handler raises wherever the main process is: inside an iteration, or a checkpoint.
    if _waiting:
        _error_if_any_worker_fails()


class PromptImageLoader(DataLoader):
    """A DataLoader over `PromptImageDataset` or `StreamedBatches`. Yields what `collate` makes, as tensors.

    pixel_values (B, 3, H, W) lie in [-1, 1]. Each rank gets its share: `Accelerator.prepare` must not split it again.

    Attributes:
        failure: the error that should end the run once its checkpoint is saved (exit code 1): more than 1 % of the
            rows were unreadable. Valid micro-batches still follow.
        read_prompts: `read_prompts(prompts)` returns entries to add to a micro-batch, such as encodings of prompts. It
            is called in this process, while the device works on the iteration before.
    Raises:
        UserError: exit code 1, while iterating: no micro-batch can be made, or a worker has died or does not answer.
    """

    failure: Optional[UserError] = None
    read_prompts: Optional[Callable[[Sequence[str]], dict[str, Any]]] = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        counter = UnreadableCounter(self.dataset.rows.origin)
        for batch in self._fetch():  # without a name: an error's traceback would keep the workers
            if isinstance(batch, UserError):
                raise batch
            if batch is not None:
                self.failure = self.failure or counter.add(batch)
                encoded = self.read_prompts(batch["prompts"]) if self.read_prompts else {}
                yield {name: _to_tensor(value) for name, value in batch.items()} | encoded

    def _fetch(self) -> Iterator[Union[dict[str, Any], UserError, None]]:
        """Yield what the workers send. Report a dead worker here, between two iterations, in one line."""
        global _waiting
        try:
            batches = super().__iter__()
        except (OSError, RuntimeError) as error:  # no room for a semaphore or a process
            raise self._worker_error(error) from error
        if self.num_workers > 0 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, _on_worker_exit)
        while True:
            _waiting = True
            try:
                _error_if_any_worker_fails()  # that died since the last batch
                batch = next(batches)
            except RuntimeError as error:
                if str(error).startswith("DataLoader "):  # not from inside a worker
                    raise self._worker_error(error) from error
                raise
            finally:
                _waiting = False
            yield batch

    def _worker_error(self, error: Exception) -> UserError:
        problem = f"the data workers have died, cannot start or do not answer ({str(error).rstrip('. ')})"
        fix = "give fewer --dataloader_num_workers, or more memory (docker run --memory, --shm-size)"
        return data_error(self.dataset.rows.origin, problem, fix, 1)


def _to_tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    tensor = torch.from_numpy(value)
    return tensor.float() / 127.5 - 1 if tensor.dtype == torch.uint8 else tensor
