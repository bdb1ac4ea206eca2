# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --dataset_json: lists "keys" (not used), "image_paths" (absolute or relative to the file) and "prompts"."""

import json
import os
from typing import Any

from senseflow.data.rows import ImageRows, data_error, rows_to_check, uses_images


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


def read_json(args) -> ImageRows:
    """Read captions and paths, cut to --max_train_samples. Raises UserError (exit code 2)."""
    captions, paths = read_captions_json("--dataset_json", args.dataset_json)
    captions, paths = captions[: args.max_train_samples], paths[: args.max_train_samples]
    origin = f"--dataset_json {args.dataset_json}"
    if not uses_images(args):
        return ImageRows(origin, captions)
    rows = rows_to_check(len(paths))
    missing = [paths[row] for row in rows if not os.path.isfile(paths[row])]
    if missing:
        problem = f"{len(missing)} of {len(rows)} images looked at are missing, one is {missing[0]}"
        raise data_error(origin, problem, "give paths that are absolute or relative to the file")
    return ImageRows(origin, captions, paths)
