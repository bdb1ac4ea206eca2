# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Samples and micro-batches: the transform, the order without state, what becomes of unreadable images, the loader.

What a worker hands over is small, and goes through a pipe: bytes of uint8 arrays instead of tensors, which torch would put into
the shared memory that containers have 64 MB of. Floats are made of them in the main process.
"""

import logging
import signal
import threading
from typing import Any, Iterator, Optional, Union

import numpy as np
import torch
from PIL import Image, ImageOps
from torch._C import _error_if_any_worker_fails
from torch.utils.data import DataLoader, Dataset, Sampler

from senseflow.data.captions import draw_caption
from senseflow.errors import UserError
from senseflow_utils import StatelessRNG


logger = logging.getLogger(__name__)

FIELDS = ("pixel_values", "latents")  # a batch has one of them
SHARE_FROM = 1000  # rows from which on the share of unreadable images is judged
Key = tuple[int, int, int]  # what a sample is a function of: row, iteration (from 0), slot


# Samples -------------------------------------------------------------------------------------------------------------
class PromptImageDataset(Dataset):
    """`dataset[(row, iteration, slot)]` is a dict:

        pixel_values  (3, R, R) uint8; None where needs_images(iteration) is false: nothing is read then
        latents       (C, H, W) float32 or None, instead of pixel_values where `rows` holds latents: nothing is transformed then
        prompt        one of the row's captions
        row           the row used in the end: an unreadable image, and its prompt, gives way to the next readable row
        slot          as asked for
        unreadable    (name, why) of the images or latents passed over, in order

    Both arrays are numpy's.

    Args:
        rows: `len(rows)`, `rows.captions(row)`, `rows.read(row) -> (name, image or latents or None, why not)`, `rows.origin` and
            `rows.field`, which of the two arrays they make.
        resolution: R in pixels. The shorter side is scaled to it (Lanczos), the longer one cropped.
        center_crop, random_flip: crop in the middle instead of anywhere; mirror half of the samples. Drawn from `seed`.
        needs_images: `needs_images(iteration) -> bool`, picklable. `rows` must have images where it says yes.
    Raises:
        UserError: nothing readable in all rows, or in 1,000 that follow each other; no prompt in a row of latents.
    """

    def __init__(self, rows, resolution: int, center_crop: bool, random_flip: bool, seed: int, needs_images):
        self.rows, self.resolution, self.center_crop, self.random_flip = rows, resolution, center_crop, random_flip
        self.seed, self.needs_images = seed, needs_images

    def __getitem__(self, key: Key) -> dict[str, Any]:
        row, iteration, sample_index = key
        unreadable, value = [], None
        if self.needs_images(iteration):
            row, value, unreadable = self._next_readable(row)
            if self.rows.field == "pixel_values":
                value = self._transform(value, StatelessRNG(self.seed, iteration), sample_index)
        prompt = draw_caption(self.rows.captions(row), self.seed, iteration, sample_index)
        return {self.rows.field: value, "prompt": prompt, "row": row, "slot": sample_index, "unreadable": unreadable}

    def __getitems__(self, keys: list[Key]) -> list[Union[dict[str, Any], UserError]]:
        """What a DataLoader calls. A UserError is returned: raised in a worker, it would reach the user as a traceback."""
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return [error]

    def _next_readable(self, row: int) -> tuple[int, Union[Image.Image, np.ndarray], list[tuple[str, str]]]:
        unreadable = []
        # A disk that went away must not send one sample through a million rows.
        tries = min(len(self.rows), SHARE_FROM)
        for candidate in range(row, row + tries):
            name, found, why = self.rows.read(candidate % len(self.rows))
            if found is not None:
                return candidate % len(self.rows), found, unreadable
            unreadable.append((name, why))
        one = "{}: {}".format(*unreadable[0])
        raise UserError(f"{self.rows.origin}: none of {tries} rows can be read, one is {one}; mend them")

    def _transform(self, image: Image.Image, rng: StatelessRNG, sample_index: int) -> np.ndarray:
        size, shorter = self.resolution, min(image.size)
        scaled = [max(size, round(side * size / shorter)) for side in image.size]
        corner = [(side - size) // 2 for side in scaled]
        if not self.center_crop:
            places = rng.uniform("crop", [sample_index], shape=(2,))[0].tolist()
            corner = [min(int(place * (side - size + 1)), side - size) for place, side in zip(places, scaled)]
        # Only the pixels that the crop keeps are computed: the same values, and a long thin image cannot fill the memory.
        steps = [side / new for side, new in zip(image.size, scaled)]
        low = [first * step for first, step in zip(corner, steps)]
        high = [min((first + size) * step, side) for first, step, side in zip(corner, steps, image.size)]
        image = image.resize((size, size), Image.Resampling.LANCZOS, box=(*low, *high))
        if self.random_flip and rng.uniform("flip", [sample_index]).item() < 0.5:
            image = ImageOps.mirror(image)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def collate(examples: list[Union[dict[str, Any], UserError]]) -> Union[dict[str, Any], UserError, None]:
    """A micro-batch of B samples; a UserError stays what it is, and no samples (see `StreamedBatches`) become None.

    It holds what `PromptImageLoader` says; its arrays are still numpy's, pixel_values uint8.
    """
    if not examples or isinstance(examples[0], UserError):
        return examples[0] if examples else None
    field = next(field for field in FIELDS if field in examples[0])
    values = [example[field] for example in examples]
    return {
        field: None if values[0] is None else np.stack(values),
        "prompts": tuple(example["prompt"] for example in examples),  # a pipeline's encode_prompt writes into a list
        "sample_indices": [example["slot"] for example in examples],
        "rows": [example["row"] for example in examples],
        "unreadable": [passed for example in examples for passed in example["unreadable"]],
        "gave_way": sum(bool(example["unreadable"]) for example in examples),
    }


# Batches -------------------------------------------------------------------------------------------------------------
class GlobalBatchSampler(Sampler[list[Key]]):
    """Endless micro-batches of one rank: lists of `batch_size` keys, `accumulation` of them an iteration.

    Position p = samples_seen + slot of the whole run is row permutation(seed, p // num_rows)[p % num_rows]: over all ranks
    every row comes once per epoch, and batches cross epochs. Slot = (micro-batch * world_size + rank) * batch_size + place.

    Args:
        iteration: number of the first iteration, from 0.
        samples_seen: samples of all iterations before it, over all ranks. Each iteration adds `global_batch`.
    """

    def __init__(self, num_rows: int, seed: int, batch_size: int, accumulation: int, rank: int, world_size: int,
                 iteration: int = 0, samples_seen: int = 0):  # fmt: skip
        self.num_rows, self.seed, self.batch_size, self.accumulation = num_rows, seed, batch_size, accumulation
        self.rank, self.world_size, self.iteration, self.samples_seen = rank, world_size, iteration, samples_seen
        self.global_batch = batch_size * accumulation * world_size
        self._orders: dict[int, torch.Tensor] = {}

    def row(self, position: int) -> int:
        """The row at a position of the run, from 0."""
        epoch, place = divmod(position, self.num_rows)
        if epoch not in self._orders:
            # A batch that crosses epochs needs two orders; an order can be drawn again at any time.
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = torch.randperm(
                self.num_rows, generator=StatelessRNG(self.seed, epoch).generator("epoch_order")
            )
        return int(self._orders[epoch][place])

    def __iter__(self) -> Iterator[list[Key]]:
        iteration, seen = self.iteration, self.samples_seen
        while True:
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * self.batch_size
                yield [
                    (self.row(seen + sample_index), iteration, sample_index)
                    for sample_index in range(first, first + self.batch_size)
                ]
            iteration, seen = iteration + 1, seen + self.global_batch


class UnreadableCounter:
    """Warns of each unreadable row once, and tells when they are more than 1 % of 1,000 rows or more.

    It lives in the main process and is fed with batches, as workers cannot share a count. Each rank counts its own.
    """

    def __init__(self, origin: str):
        self.origin, self.rows, self.gave_way, self.warned = origin, 0, 0, set()

    def add(self, batch: dict[str, Any]) -> Optional[UserError]:
        """Takes a collated batch; returns what should end the run (exit code 1) when the share is too large."""
        for name, why in batch["unreadable"]:
            if name not in self.warned:
                logger.warning("unreadable (%s), the next readable row is used instead: %s", why, name)
            self.warned.add(name)
        if any(batch.get(field) is not None for field in FIELDS):
            self.rows += len(batch["rows"])
            self.gave_way += batch["gave_way"]
        if self.rows < SHARE_FROM or self.gave_way * 100 <= self.rows:
            return None
        problem = f"{self.gave_way} of {self.rows} rows could not be read (more than 1 %), one is {min(self.warned)}"
        return UserError(f"{self.origin}: {problem}; mend or drop them")


_fetching = False  # whether the main process waits for a worker


def _on_worker_end(*_) -> None:
    # torch's own handler raises wherever the main process stands: in the middle of an iteration, of a checkpoint.
    if _fetching:
        _error_if_any_worker_fails()


class PromptImageLoader(DataLoader):
    """A DataLoader over `PromptImages` or `senseflow.data.streaming.StreamedBatches`. Its micro-batches of B samples are dicts:

        pixel_values  (B, 3, R, R) float32 in [-1, 1], or None; or
        latents       (B, C, H, W) float32, or None
        prompts       tuple of B strings
        slots, rows   B integers each
        unreadable    (name, why) of all images or latents passed over
        gave_way      how many of the B samples' own rows were unreadable

    It yields one rank's share already: not for `Accelerator.prepare`, which would share it out again.

    Attributes:
        failure: what should end the run once its checkpoint is saved (exit code 1): more than 1 % of the rows were unreadable.
            None at first. Micro-batches are sound and go on coming.
    Raises:
        UserError: exit code 1, while iterating: no micro-batch can be made, or a worker has died or does not answer.
    """

    failure: Optional[UserError] = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        counter = UnreadableCounter(self.dataset.rows.origin)
        for batch in self._fetched():  # without a name: an error's traceback would keep the workers
            if isinstance(batch, UserError):
                raise batch
            if batch is not None:
                self.failure = self.failure or counter.add(batch)
                yield batch | _as_tensors(batch)

    def _fetched(self) -> Iterator[Union[dict[str, Any], UserError, None]]:
        """What the workers send. What becomes of a worker is said in one line, and here: between two iterations."""
        global _fetching
        try:
            batches = super().__iter__()
        except (
            OSError,
            RuntimeError,
        ) as error:  # no room in the shared memory for a semaphore, or in the memory for a process
            raise self._without_workers(error) from error
        if self.num_workers > 0 and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, _on_worker_end)
        while True:
            _fetching = True
            try:
                _error_if_any_worker_fails()  # in the meantime
                batch = next(batches)
            except RuntimeError as error:
                if str(error).startswith("DataLoader "):  # not out of a worker
                    raise self._without_workers(error) from error
                raise
            finally:
                _fetching = False
            yield batch

    def _without_workers(self, error: Exception) -> UserError:
        problem = (
            f"the processes that read the data have died, cannot start or do not answer ({str(error).rstrip('. ')})"
        )
        fix = "give fewer --dataloader_num_workers, or more memory and shared memory (docker run --memory, --shm-size)"
        return UserError(f"{self.dataset.rows.origin}: {problem}; {fix}")


def _as_tensors(batch: dict[str, Any]) -> dict[str, Optional[torch.Tensor]]:
    field = next(field for field in FIELDS if field in batch)
    if batch[field] is None:
        return {}
    values = torch.from_numpy(batch[field])
    return {field: values.float() / 127.5 - 1 if field == "pixel_values" else values}
