# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Choose the readers of the data sets.

Each returns rows: `captions(row)`, `all_captions()` (not a stream's), `read(row)`, `field`, `origin`, `summary`,
`fingerprint`.
"""

from typing import Union

from senseflow.data.hub_dataset import read_dataset
from senseflow.data.imagefolder import read_imagefolder
from senseflow.data.json_file import read_json
from senseflow.data.lmdb import LatentRows, read_lmdb
from senseflow.data.mixture import MixedRows
from senseflow.data.prompts import read_prompts_file
from senseflow.data.rows import ImageRows, data_error, uses_images
from senseflow.data.streaming import StreamedRows
from senseflow.errors import UserError


Rows = Union[ImageRows, MixedRows, LatentRows, StreamedRows]


def _read_prompts(args, path: str) -> ImageRows:
    origin = f"--prompts_file {path}"
    if uses_images(args):
        flags = f"--gan_weight {args.gan_weight} --backward_simulation_prob {args.backward_simulation_prob}"
        fix = "give --gan_weight 0 --backward_simulation_prob 1, or a data set with images"
        raise data_error(origin, f"has no images, and {flags} needs them", fix)
    prompts = [prompt for prompt in read_prompts_file(path) if prompt]
    return ImageRows(origin, prompts[: args.max_train_samples])


READERS = {
    "dataset_json": read_json,
    "dataset_name": read_dataset,
    "train_data_dir": read_imagefolder,
    "prompts_file": _read_prompts,
    "dataset_lmdb": read_lmdb,
}


def load_rows(args) -> Rows:
    """Read the rows of the data sets given, each cut to --max_train_samples. Raises UserError (exit code 2)."""
    values = {flag: getattr(args, flag) for flag in args.given if flag in READERS}
    values = {flag: [value] if isinstance(value, str) else value for flag, value in values.items()}
    named = [(flag, value) for flag in values for value in values[flag]]
    _check_mixture(args, named)
    sources = [READERS[flag](args, value) for flag, value in named]
    return sources[0] if len(sources) == 1 else MixedRows(sources, args.dataset_weights)


def _check_mixture(args, named: list[tuple[str, str]]) -> None:
    """Refuse (UserError, exit code 2) data sets that do not mix, and weights that do not fit.

    Args:
        named: (flag, value) of each data set.
    """
    flags = [flag for flag, _ in named]
    if not named:
        raise UserError(f"no data set is given: give one of {', '.join(f'--{flag}' for flag in READERS)}", 2)
    if "dataset_lmdb" in flags and len(named) > 1:
        problem = "holds latents, which do not mix with other data sets; give one or the other"
        raise UserError(f"--dataset_lmdb {args.dataset_lmdb}: {problem}", 2)
    if args.streaming and "dataset_name" in flags and len(named) > 1:
        raise UserError("--streaming: several data sets cannot be streams; drop it, or give one --dataset_name", 2)
    weights = args.dataset_weights
    if weights is None:
        return
    shown = f"--dataset_weights {' '.join(f'{weight:g}' for weight in weights)}"
    if len(weights) != len(named):
        problem = f"{len(weights)} weights for {len(named)} data sets"
        raise UserError(f"{shown}: {problem}; give one for each, in the order of the command line", 2)
    if min(weights) < 1e-6 * sum(weights):
        raise UserError(f"{shown}: the smallest share is below one in a million; drop that data set", 2)


def check_latents(args, rows: Rows, shape: tuple[int, int, int]) -> None:
    """Refuse (exit code 2) stored latents, if they are read, of another shape (C, H, W) than the teacher's."""
    if isinstance(rows, LatentRows) and rows.shape != tuple(shape) and uses_images(args):
        size = " ".join(map(str, args.resolution))
        problem = f"holds latents of {rows.shape}, this teacher's are {tuple(shape)} at --resolution {size}"
        fix = "give latents of this teacher's VAE, and the --resolution that they have"
        raise data_error(rows.origin, problem, fix)
