# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Mix several data sets: their rows one after the other, and by --dataset_weights how often each comes."""

import bisect
import itertools
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, Iterator, Optional, Sequence

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
    def groups(self) -> list[range]:
        """The rows of each data set."""
        return [range(start, end) for start, end in itertools.pairwise(self.starts)]

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

    def all_captions(self) -> Iterator[str]:
        """Iterate over the captions of all rows."""
        return itertools.chain.from_iterable(source.all_captions() for source in self.sources)

    def read(self, row: int) -> tuple[str, Any, str]:
        source, row = self._find(row)
        return source.read(row)


class WeightedOrder:
    """An endless order of rows in which groups of them have shares: a function of (seed, position) alone.

    Positions are cut into blocks. In each, a group with share w has w * block places, rounded so that its places in
    all blocks so far are w * positions to 1; where they are is drawn. A group's rows are drawn without replacement:
    all come once before any comes again.

    Args:
        groups: numbers of rows.
        weights: of the groups, positive.
        name: of this order, among others of the same seed.
    """

    def __init__(self, groups: Sequence[Sequence[int]], weights: Sequence[float], seed: int, name: str = ""):
        self.groups, self.seed, self.name = groups, seed, name
        shares = [weight / sum(weights) for weight in weights]
        self.block = max(MIN_BLOCK, math.ceil(2 / min(shares)))  # so that each group has a place in each
        self._ends = np.cumsum([0, *shares])
        self._ends[-1] = 1
        self._places = lru_cache(maxsize=2)(self._draw_places)  # a batch that crosses blocks or epochs needs two
        self._orders = [lru_cache(maxsize=2)(partial(self._draw_order, group)) for group in range(len(groups))]

    def _num_places(self, block: int) -> np.ndarray:
        """Return how many places each group has before a block."""
        return np.diff(np.floor(block * self.block * self._ends).astype(np.int64))

    def _draw_places(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return for each place of a block the group, and how many places the group has before it."""
        before = self._num_places(block)
        groups = np.repeat(np.arange(len(before)), self._num_places(block + 1) - before)
        generator = StatelessRNG(self.seed, block).generator(f"places{self.name}")
        groups = groups[torch.randperm(len(groups), generator=generator).numpy()]
        turns = np.empty_like(groups)
        for group, first in enumerate(before):
            turns[groups == group] = first + np.arange((groups == group).sum())
        return groups, turns

    def _draw_order(self, group: int, epoch: int) -> torch.Tensor:
        generator = StatelessRNG(self.seed, epoch).generator(f"order{self.name}_{group}")
        return torch.randperm(len(self.groups[group]), generator=generator)

    def row(self, position: int) -> int:
        """Return the row at a position, from 0."""
        block, place = divmod(position, self.block)
        groups, turns = self._places(block)
        group = int(groups[place])
        epoch, index = divmod(int(turns[place]), len(self.groups[group]))
        return int(self.groups[group][self._orders[group](epoch)[index]])
