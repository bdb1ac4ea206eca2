# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --dataset_name: the split train of a Hub id or of a folder for datasets' load_dataset or load_from_disk."""

import os
from typing import Any, Union

import datasets

from senseflow.data.rows import ImageRows, data_error, parse_captions, uses_images
from senseflow.data.streaming import StreamedRows, make_streamed_rows
from senseflow.errors import UserError, unwritable_cache


AnyDataset = Union[datasets.Dataset, datasets.IterableDataset]


def read_dataset(args) -> Union[ImageRows, StreamedRows]:
    """Load the caption and image columns, cut to --max_train_samples. UserError (2) if they cannot be loaded."""
    origin = f"--dataset_name {args.dataset_name}"
    try:
        dataset, first_row = _load(args)
    except (OSError, ValueError, RuntimeError, KeyError, datasets.exceptions.DatasetsError) as error:
        fix = "check the spelling; if it is gated or private, accept its license there and log in with `hf auth login`"
        if os.path.isdir(args.dataset_name):
            fix = "give a folder that datasets.load_dataset takes, or a folder of images to --train_data_dir"
        if unwritable_cache(error):
            raise UserError(f"{origin}: {unwritable_cache(error)}", exit_code=2) from error
        # The message of a failed build is in its cause.
        raise data_error(origin, f"cannot be loaded ({error.__cause__ or error})", fix) from error

    names = {"caption_column": args.caption_column}
    if uses_images(args):
        names["image_column"] = args.image_column
    for flag, name in names.items():
        if name not in dataset.features:
            fix = f"give one of {', '.join(dataset.features)}"
            raise data_error(f"--{flag} {name}", f"there is no such column in {origin}", fix)
        if flag == "image_column" and not isinstance(dataset.features[name], datasets.Image):
            problem = f"the column holds {dataset.features[name]} in {origin}, not images"
            raise data_error(f"--{flag} {name}", problem, "give a column of datasets.Image")
    captions_flag = f"--caption_column {args.caption_column}"
    try:
        parse_captions(first_row[args.caption_column])
    except ValueError as error:
        raise data_error(captions_flag, f"row 0 of {origin} {error}", "give a column of captions") from error
    if args.max_train_samples is not None:
        dataset = dataset.take(args.max_train_samples)
    if isinstance(dataset, datasets.IterableDataset):
        return make_streamed_rows(args, origin, dataset.select_columns(list(names.values())))
    captions, *images = (dataset.select_columns([name]) for name in names.values())
    return ImageRows(origin, captions, images[0] if images else None, f"{captions_flag}: row {{}}".format)


def _load(args) -> tuple[AnyDataset, dict[str, Any]]:
    """Load the split train with undecoded images, so that a broken one can be skipped later, and its first row."""
    path = args.dataset_name
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
