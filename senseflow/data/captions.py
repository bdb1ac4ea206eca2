# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Check and pick captions: a row has one string or a list of strings."""

from typing import Any, Sequence

from senseflow_utils import StatelessRNG


def parse_captions(cell: Any) -> list[str]:
    """List the captions of one row. Raises ValueError (a predicate) if there are none."""
    captions = cell if isinstance(cell, list) else [cell]
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"holds {str(cell)[:60]}, not a caption or a list of captions")
    return captions


def draw_caption(captions: Sequence[str], seed: int, iteration: int, sample_index: int) -> str:
    """Draw one of a sample's captions: a function of (seed, iteration, sample index) alone."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(StatelessRNG(seed, iteration).integers("caption", [sample_index], 0, len(captions) - 1))]
