# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Mix several data sets: their rows one after the other, and by --dataset_weights how often each comes."""

import bisect
import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Optional

import numpy as np
import torch

from senseflow.data.rows import ImageRows
from senseflow_utils import StatelessRNG


MIN_BLOCK = 1000  # samples


@dataclass
class MixedRows:
    """The rows of several data sets, numbered through. Like `senseflow.data.rows.ImageRows`. Picklable.

    Args:
        weights: of the data sets; None: in proportion to their rows.
    """

    sources: list[ImageRows]
    weights: Optional[list[float]] = None

    field = "pixel_values"

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each data set, and the number of all rows."""
        return [0, *itertools.accumulate(map(len, self.sources))]

    @property
    def shares(self) -> list[float]:
        """The share of each data set in the samples."""
        weights = self.weights or [len(source) for source in self.sources]
        return [weight / sum(weights) for weight in weights]

    @property
    def origin(self) -> str:
        return " and ".join(source.origin for source in self.sources)

    @property
    def fingerprint(self) -> str:
        return " and ".join(source.fingerprint for source in self.sources)

    def describe(self, num_samples: int) -> list[str]:
        """Describe each data set for the log.

        Args:
            num_samples: of the whole run.
        """
        return [
            f"{source.origin}: {source.summary}; {100 * share:.3g} % of the samples, "
            f"{num_samples * share / len(source):.3g} epochs in the whole run"
            for source, share in zip(self.sources, self.shares)
        ]

    def __len__(self) -> int:
        return self.starts[-1]

    def _find(self, row: int) -> tuple[ImageRows, int]:
        number = bisect.bisect_right(self.starts, row) - 1
        return self.sources[number], row - self.starts[number]

    def captions(self, row: int) -> list[str]:
        source, row = self._find(row)
        return source.captions(row)

    def read(self, row: int) -> tuple[str, Any, str]:
        source, row = self._find(row)
        return source.read(row)


class WeightedOrder:
    """The row at each position of a run over `MixedRows` with weights: a function of (seed, position) alone.

    Positions are cut into blocks. In each, a data set with share w has w * block places, rounded so that its places in
    all blocks so far are w * positions to 1; where they are is drawn. A data set's rows are drawn without replacement:
    each comes once before any comes again.
    """

    def __init__(self, rows: MixedRows, seed: int):
        self.starts, self.seed = rows.starts, seed
        self.ends = np.cumsum([0, *rows.shares])
        self.ends[-1] = 1
        self.block = max(MIN_BLOCK, math.ceil(2 / min(rows.shares)))  # so that each data set has a place in each
        self._places = lru_cache(maxsize=2)(self._draw_places)  # a batch that crosses blocks or epochs needs two
        self._orders = [lru_cache(maxsize=2)(self._draw_order) for _ in rows.sources]

    def _num_places(self, block: int) -> np.ndarray:
        """Return how many places each data set has before a block."""
        return np.diff(np.floor(block * self.block * self.ends).astype(np.int64))

    def _draw_places(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each place of a block the data set, and which of all samples of that data set it is."""
        before = self._num_places(block)
        sources = np.repeat(np.arange(len(before)), self._num_places(block + 1) - before)
        generator = StatelessRNG(self.seed, block).generator("data_sets")
        sources = sources[torch.randperm(len(sources), generator=generator).numpy()]
        samples = np.empty_like(sources)
        for source, first in enumerate(before):
            is_source = sources == source
            samples[is_source] = first + np.arange(is_source.sum())
        return sources, samples

    def _draw_order(self, source: int, epoch: int) -> torch.Tensor:
        generator = StatelessRNG(self.seed, epoch).generator(f"epoch_order_{source}")
        return torch.randperm(self.starts[source + 1] - self.starts[source], generator=generator)

    def row(self, position: int) -> int:
        """Return the row at a position of the run, from 0."""
        block, place = divmod(position, self.block)
        sources, samples = self._places(block)
        source = int(sources[place])
        start, end = self.starts[source : source + 2]
        epoch, index = divmod(int(samples[place]), end - start)
        return start + int(self._orders[source](source, epoch)[index])
