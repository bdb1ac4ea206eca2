# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --dataset_name: the split train of a Hub id or of a folder for datasets' load_dataset or load_from_disk."""

import os
from typing import Any, Union

import datasets

from senseflow.data.rows import ImageRows, data_error, get_field, parse_captions, uses_images
from senseflow.data.streaming import StreamedRows, make_streamed_rows
from senseflow.errors import UserError, unwritable_cache


AnyDataset = Union[datasets.Dataset, datasets.IterableDataset]


def read_dataset(args, path: str) -> Union[ImageRows, StreamedRows]:
    """Load the caption and image columns, cut to --max_train_samples. UserError (2) if they cannot be loaded."""
    origin = f"--dataset_name {path}"
    try:
        dataset, first_row = _load(args, path)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        fix = "check the spelling; if it is gated or private, accept its license there and log in with `hf auth login`"
        if os.path.isdir(path):
            fix = "give a folder that datasets.load_dataset takes, or a folder of images to --train_data_dir"
        if unwritable_cache(error):
            raise UserError(f"{origin}: {unwritable_cache(error)}", exit_code=2) from error
        # The message of a failed build is in its cause.
        raise data_error(origin, f"cannot be loaded ({error.__cause__ or error})", fix) from error

    names = {"caption_column": args.caption_column}
    if uses_images(args):
        names["image_column"] = args.image_column
    for flag, name in names.items():
        features = _flatten(dataset.features) if flag == "caption_column" else dataset.features
        if name not in features:
            fix = f"give one of {', '.join(features)}"
            raise data_error(f"--{flag} {name}", f"there is no such column in {origin}", fix)
        if flag == "image_column" and not isinstance(features[name], datasets.Image):
            problem = f"the column holds {features[name]} in {origin}, not images"
            raise data_error(f"--{flag} {name}", problem, "give a column of datasets.Image")
    captions_flag = f"--caption_column {args.caption_column}"
    try:
        parse_captions(cell := get_field(first_row, args.caption_column))
    except ValueError as error:
        fix = "give a column of captions"
        if isinstance(cell, dict) and cell:
            fix += f", or a field of this one, such as {args.caption_column}.{next(iter(cell))}"
        raise data_error(captions_flag, f"row 0 of {origin} {error}", fix) from error
    if args.max_train_samples is not None:
        dataset = dataset.take(args.max_train_samples)
    columns = [name if name in dataset.features else name.partition(".")[0] for name in names.values()]
    if isinstance(dataset, datasets.IterableDataset):
        return make_streamed_rows(args, origin, dataset.select_columns(list(dict.fromkeys(columns))))
    captions, *images = (dataset.select_columns([name]) for name in columns)
    if args.caption_column not in dataset.features:
        captions = captions.flatten().select_columns([args.caption_column])
    return ImageRows(origin, captions, images[0] if images else None, f"{captions_flag}: row {{}}".format)


def _flatten(features: dict[str, Any]) -> dict[str, Any]:
    """Add the fields of columns that hold such, as a .json file of a WebDataset does: json.caption."""
    flat = {}
    for name, feature in features.items():
        flat[name] = feature
        if isinstance(feature, dict):
            flat |= {f"{name}.{field}": kind for field, kind in _flatten(feature).items()}
    return flat


def _load(args, path: str) -> tuple[AnyDataset, dict[str, Any]]:
    """Load the split train with undecoded images, so that a broken one can be skipped later, and its first row."""
    if any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
        dataset = datasets.load_from_disk(path)
        dataset = dataset["train"] if isinstance(dataset, datasets.DatasetDict) else dataset
    else:
        dataset = datasets.load_dataset(path, args.dataset_config_name, split="train", streaming=args.streaming)
    if isinstance(dataset, datasets.IterableDataset):
        if dataset.features is None:
            dataset = dataset.cast(datasets.Dataset.from_list(list(dataset.take(16))).features)
        dataset = dataset.decode(False)
    else:
        dataset = dataset.with_format(None)
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                dataset = dataset.cast_column(name, datasets.Image(decode=False))
    rows = list(dataset.take(1))
    if not rows:
        raise ValueError("it has no rows")
    return dataset, rows[0]
