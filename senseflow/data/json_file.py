# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --dataset_json: lists "keys" (not used), "image_paths" (absolute or relative to the file) and "prompts"."""

import hashlib
import json
import os
from typing import Any

from senseflow.data.rows import PATH_ERRORS, ImageRows, data_error, map_rows, rows_to_check, uses_images


def read_captions_json(flag: str, path: str) -> tuple[list[Any], list[str]]:
    """Read captions, which are not checked, and absolute paths of images. Raises UserError (exit code 2)."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        captions, images = content["prompts"], [os.path.join(folder, image) for image in content["image_paths"]]
        if not len(captions) == len(images) > 0:
            raise ValueError(f"{len(captions)} prompts, {len(images)} image_paths")
    except (OSError, ValueError, TypeError, KeyError) as error:
        fix = 'give {"image_paths": [...], "prompts": [...]}, lists of one length'
        raise data_error(f"{flag} {path}", f"cannot be read ({type(error).__name__}: {error})", fix) from error
    return captions, images


def read_json(args, path: str) -> ImageRows:
    """Read captions and paths, cut to --max_train_samples. Raises UserError (exit code 2)."""
    flag, limit = "--dataset_json", args.max_train_samples
    origin = f"{flag} {path}"

    def read() -> tuple[list, list[str]]:
        captions, paths = read_captions_json(flag, path)
        return captions[:limit], paths[:limit]

    try:
        with open(path, "rb") as file:
            key = hashlib.file_digest(file, "sha256")
    except OSError:
        read()  # raises
        raise
    key.update(f"{os.path.dirname(os.path.abspath(path))} {limit}".encode())
    # A million rows take 1 GB as lists, in each process that holds these.
    table, content = map_rows(origin, key.hexdigest(), read)
    captions, images = (table.select_columns([name]) for name in table.column_names)
    if not uses_images(args):
        return ImageRows(origin, captions, content=content)
    rows = rows_to_check(len(table))
    paths = [image.decode("utf-8", PATH_ERRORS) for image in images[rows]["images"]]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        problem = f"{len(missing)} of {len(rows)} images looked at are missing, one is {missing[0]}"
        raise data_error(origin, problem, "give paths that are absolute or relative to the file")
    return ImageRows(origin, captions, images, content=content)
