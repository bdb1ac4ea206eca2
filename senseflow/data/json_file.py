# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --dataset_json: lists "keys" (not used), "image_paths" (absolute or relative to the file) and "prompts"."""

import json
import os

from senseflow.data.rows import ImageRows, data_error, rows_to_check, uses_images


def read_json(args) -> ImageRows:
    """Read captions and paths, cut to --max_train_samples. Raises UserError (exit code 2)."""
    origin, folder = f"--dataset_json {args.dataset_json}", os.path.dirname(os.path.abspath(args.dataset_json))
    try:
        with open(args.dataset_json, encoding="utf-8-sig") as file:
            content = json.load(file)
        captions, paths = content["prompts"], content["image_paths"]
        if not len(captions) == len(paths) > 0:
            raise ValueError(f"{len(captions)} prompts, {len(paths)} image_paths")
        captions = captions[: args.max_train_samples]
        paths = [os.path.join(folder, path) for path in paths[: args.max_train_samples]]
    except (OSError, ValueError, TypeError, KeyError) as error:
        fix = 'give {"keys": [...], "image_paths": [...], "prompts": [...]}, lists of one length'
        raise data_error(origin, f"cannot be read ({type(error).__name__}: {error})", fix) from error
    if not uses_images(args):
        return ImageRows(origin, captions)
    rows = rows_to_check(len(paths), args.seed)
    missing = [paths[row] for row in rows if not os.path.isfile(paths[row])]
    if missing:
        problem = f"{len(missing)} of {len(rows)} images looked at are missing, one is {missing[0]}"
        raise data_error(origin, problem, f"give paths that are absolute or relative to {folder}")
    return ImageRows(origin, captions, paths)
