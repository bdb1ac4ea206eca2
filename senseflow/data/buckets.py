# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Sizes of training images (--aspect_ratio_buckets): which row has which, and which one an iteration has.

All images of an iteration, in all processes, have one size. An image has the size whose aspect ratio is nearest to its
own. Sizes are drawn as often as there are rows of them, so that every row comes equally often in the long run.
"""

import hashlib
import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Iterator, Optional, Sequence

import datasets
import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import find_nearest_bucket
from tqdm.auto import tqdm

from senseflow.data.mixture import MixedRows, WeightedOrder
from senseflow.data.rows import data_error, uses_images
from senseflow.errors import write_atomically
from senseflow_utils import StatelessRNG


logger = logging.getLogger(__name__)


@dataclass
class Buckets:
    """Draw the size of each iteration's images: a function of (seed, iteration), the same in all processes.

    Args:
        sizes: (height, width) in pixels.
        weights: of each size, to which its probability is proportional.
    """

    seed: int
    sizes: Sequence[Sequence[int]]
    weights: Sequence[float]

    def draw(self, iteration: int) -> int:
        """Return the index of an iteration's size."""
        if len(self.sizes) == 1:
            return 0
        ends = np.cumsum(self.weights)
        position = StatelessRNG(self.seed, iteration).shared_uniform("bucket") * ends[-1]
        return int(np.searchsorted(ends, position, side="right"))

    def size(self, iteration: int) -> Sequence[int]:
        """Return (height, width) of an iteration's images."""
        return self.sizes[self.draw(iteration)]


class BucketRows:
    """The rows of each size, in an endless order each.

    Args:
        groups: of each size, the rows of each data set.
        weights: of each size, in proportion to which its rows come from each data set.
    """

    def __init__(self, buckets: Buckets, groups: Sequence[Sequence[np.ndarray]], weights: np.ndarray):
        self.buckets = buckets
        self._orders = [self._order(number, *of_size) for number, of_size in enumerate(zip(groups, weights))]

    def _order(self, number: int, groups: Sequence[np.ndarray], weights: np.ndarray) -> Optional[WeightedOrder]:
        weights = np.maximum(weights, 1e-6 * weights.sum())  # a smaller share would need a longer block
        filled = [number for number, group in enumerate(groups) if len(group) > 0]
        if not filled:
            return None
        name = f"_of_size_{number}"
        return WeightedOrder([groups[i] for i in filled], [weights[i] for i in filled], self.buckets.seed, name)

    def row(self, bucket: int, position: int) -> int:
        """Return the row at a position, from 0, of the order of one size."""
        return self._orders[bucket].row(position)

    def starts(self, iteration: int, samples_seen: int, global_batch: int) -> Iterator[tuple[int, int]]:
        """Yield (size, position of the first sample in its order) of each iteration from this one on.

        The position is the number of samples that earlier iterations took from the size: the number of those
        iterations times the mean of their global batches. That is exact unless a resumed run has changed the global
        batch, and always a function of (iteration, samples seen).
        """
        drawn = np.zeros(len(self._orders), int)
        for earlier in range(iteration):
            drawn[self.buckets.draw(earlier)] += 1
        while True:
            bucket = self.buckets.draw(iteration)
            yield bucket, int(drawn[bucket]) * samples_seen // max(iteration, 1)
            drawn[bucket] += 1
            iteration, samples_seen = iteration + 1, samples_seen + global_batch


def make_buckets(args, rows) -> tuple[Buckets, Optional[BucketRows]]:
    """Find the size of each row's image. All processes call it.

    Returns:
        The sizes of iterations, and the rows of each size; None if all rows have any: without --aspect_ratio_buckets,
        and in a run that reads no images.
    """
    sizes = args.aspect_ratio_buckets or [args.resolution]
    if len(sizes) == 1 or not uses_images(args):
        return Buckets(args.seed, sizes, [1] * len(sizes)), None
    found = np.concatenate([image_sizes(source) for source in getattr(rows, "sources", [rows])])
    found[found[:, 0] == 0] = args.resolution  # unreadable; the loader reports them
    different, which = np.unique(found, axis=0, return_inverse=True)
    nearest = [find_nearest_bucket(*size, sizes) for size in different.tolist()]
    bucket_of_row = np.array(nearest, np.min_scalar_type(len(sizes)))[which]
    weighted = isinstance(rows, MixedRows) and rows.weights
    parts = [np.arange(part.start, part.stop) for part in (rows.groups if weighted else [range(len(rows))])]
    groups = [[part[bucket_of_row[part] == bucket] for part in parts] for bucket in range(len(sizes))]
    counts = np.array([list(map(len, of_size)) for of_size in groups])
    weights = counts * np.divide(rows.shares, counts.sum(0)) if weighted else counts
    if PartialState().is_main_process:
        numbers = zip(sizes, counts.sum(1).tolist())
        shown = ", ".join(f"{height} x {width}: {number}" for (height, width), number in numbers)
        empty = "" if counts.sum(1).all() else " (0: never trained at)"
        log = logger.warning if empty else logger.info
        log("--aspect_ratio_buckets: rows by height x width: %s%s", shown, empty)
    buckets = Buckets(args.seed, sizes, weights.sum(1).tolist())
    return buckets, BucketRows(buckets, groups, weights)


def image_sizes(rows) -> np.ndarray:
    """Read the (height, width) of each row's image from its header; (0, 0) if it has none. All processes call it.

    Each process reads a part. They are kept in datasets' cache for the next run.

    Returns:
        (N, 2) int32.
    Raises:
        UserError: exit code 1: the cache cannot be written to.
    """
    state, main = PartialState(), PartialState().is_main_process
    names = f"{os.getcwd()} {rows.origin} {rows.fingerprint}"  # its path may be relative
    key = hashlib.sha256(names.encode(errors="surrogatepass")).hexdigest()[:24]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "senseflow" / f"{key}-sizes.npy"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [np.load(path) if main and path.exists() else None]
        if broadcast_object_list(kept)[0] is not None:  # processes on other machines may not see the file
            return kept[0]
        part, parts = state.process_index, state.num_processes
        first, last = len(rows) * part // parts, len(rows) * (part + 1) // parts
        sizes = tqdm(rows.image_sizes(first, last), "sizes of images", last - first, disable=not main)
        found = np.concatenate(gather_object([np.fromiter(sizes, np.dtype((np.int32, 2)), last - first)]))
        if main:
            write_atomically(path, partial(_save, found))
        return found
    except OSError as error:
        problem = f"{path.parent} cannot be written to ({error.strerror})"
        raise data_error(rows.origin, problem, "set HF_HOME to a folder that can", 1) from error


def _save(array: np.ndarray, path: Path) -> None:
    with open(path, "wb") as file:  # to a path without .npy, numpy would add it
        np.save(file, array)
