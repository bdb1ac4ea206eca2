# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Choose the reader of the data set.

Each returns rows: `captions(row)`, `read(row)`, `field`, `origin`, `summary`, `fingerprint`.
"""

from typing import Union

from senseflow.data.hub_dataset import read_dataset
from senseflow.data.imagefolder import read_imagefolder
from senseflow.data.json_file import read_json
from senseflow.data.lmdb import LatentRows, read_lmdb
from senseflow.data.prompts import read_prompts_file
from senseflow.data.rows import ImageRows, data_error, uses_images
from senseflow.data.streaming import StreamedRows
from senseflow.errors import UserError


Rows = Union[ImageRows, LatentRows, StreamedRows]


def _read_prompts(args) -> ImageRows:
    origin = f"--prompts_file {args.prompts_file}"
    if uses_images(args):
        flags = f"--gan_weight {args.gan_weight} --backward_simulation_prob {args.backward_simulation_prob}"
        fix = "give --gan_weight 0 --backward_simulation_prob 1, or a data set with images"
        raise data_error(origin, f"has no images, and {flags} needs them", fix)
    prompts = [prompt for prompt in read_prompts_file(args.prompts_file) if prompt]
    return ImageRows(origin, prompts[: args.max_train_samples])


READERS = {
    "dataset_name": read_dataset,
    "train_data_dir": read_imagefolder,
    "dataset_json": read_json,
    "prompts_file": _read_prompts,
    "dataset_lmdb": read_lmdb,
}


def load_rows(args) -> Rows:
    """Read the rows of the one data set given, cut to --max_train_samples. Raises UserError (exit code 2)."""
    given = [flag for flag in READERS if getattr(args, flag) is not None]
    if len(given) != 1:
        problem = " and ".join(f"--{flag} {getattr(args, flag)}" for flag in given) or "no data set is given"
        raise UserError(f"{problem}: give exactly one of {', '.join(f'--{flag}' for flag in READERS)}", 2)
    return READERS[given[0]](args)


def check_latents(args, rows: Rows, shape: tuple[int, int, int]) -> None:
    """Refuse (exit code 2) stored latents, if they are read, of another shape (C, H, W) than the teacher's."""
    if isinstance(rows, LatentRows) and rows.shape != tuple(shape) and uses_images(args):
        size = " ".join(map(str, args.resolution))
        problem = f"holds latents of {rows.shape}, this teacher's are {tuple(shape)} at --resolution {size}"
        fix = "give latents of this teacher's VAE, and the --resolution that they have"
        raise data_error(rows.origin, problem, fix)
