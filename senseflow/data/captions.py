# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Caption columns: of strings, or of lists of strings, one of which is drawn for each sample."""

import json
import re
from typing import Any, Callable, Optional, Sequence

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from senseflow_utils import StatelessRNG


STRINGS = ("string", "large_string")
LISTS = (datasets.List, datasets.LargeList)


def what_column_holds(feature: Any) -> str:
    """What a column of a data set holds, for a message; "" if it can be captions."""
    if isinstance(feature, LISTS):
        inner = what_column_holds(feature.feature)
        if isinstance(feature.feature, LISTS):
            inner = "lists"
        return inner and f"lists of {inner}"
    kind = getattr(feature, "dtype", type(feature).__name__)
    if kind in STRINGS:
        return ""
    known = {datasets.Image: "images", datasets.ClassLabel: "class labels", dict: "objects"}
    return known.get(type(feature), f"numbers ({kind})" if re.match("u?int|float|bool", kind) else kind)


def captions_of(cell: Any) -> list[str]:
    """The captions of one row of such a column. Raises ValueError, a predicate, if there is none."""
    captions = [cell] if isinstance(cell, str) or cell is None else list(cell)
    if not captions or None in captions:
        raise ValueError("is empty")
    return captions


def draw_caption(captions: Sequence[str], seed: int, iteration: int, sample_index: int) -> str:
    """One of a sample's captions; a function of (seed, iteration, slot) alone."""
    if len(captions) == 1:
        return captions[0]
    return captions[int(StatelessRNG(seed, iteration).integers("caption", [sample_index], 0, len(captions) - 1))]


def first_empty(column: pa.ChunkedArray) -> Optional[int]:
    """The first row without a caption, or with a list that is empty or has a gap; None if every row is captioned."""
    start = 0
    for chunk in column.chunks:
        empty = pc.is_null(chunk).to_numpy(zero_copy_only=False)
        if not pa.types.is_string(chunk.type) and not pa.types.is_large_string(chunk.type):
            empty |= pc.fill_null(pc.equal(pc.list_value_length(chunk), 0), True).to_numpy(zero_copy_only=False)
            gaps = pc.list_parent_indices(chunk).filter(pc.is_null(pc.list_flatten(chunk)))
            empty[gaps.to_numpy(zero_copy_only=False)] = True
        if empty.any():
            return start + int(empty.argmax())
        start += len(chunk)
    return None


def caption_array(cells: Sequence[Any], where: Callable[[int], str]) -> pa.Array:
    """Strings, or lists of strings where a row has a list, out of what a JSON or CSV file holds.

    Args:
        where: `where(row)` names a row and its file.
    Raises:
        ValueError: a predicate with the first row that has something else, or nothing.
    """
    lists = any(isinstance(cell, list) for cell in cells)
    for row, cell in enumerate(cells):
        inside = cell if isinstance(cell, list) else [cell]
        odd = [entry for entry in inside if not isinstance(entry, str)]
        if odd and odd[0] is not None:
            found = f"{type(odd[0]).__name__} {json.dumps(odd[0])[:60]}"
            raise ValueError(f"holds {found} in {where(row)}, where a string or a list of strings should be")
        if odd or not inside:
            raise ValueError(f"is empty in {where(row)}")
    if not lists:
        return pa.array(cells, pa.string())
    return pa.array([[cell] if isinstance(cell, str) else cell for cell in cells], pa.list_(pa.string()))
