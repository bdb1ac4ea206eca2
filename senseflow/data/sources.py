# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Prompts and images: the five kinds of data set, and the loader over them.

    checked = check_data_args(args)           # before any weight loads
    rows = load_rows(args, checked)           # columns in Arrow; images stay files or bytes until they are read
    check_latents(args, rows, shape)          # if the images were encoded beforehand: do they fit the teacher?
    for batch in make_dataloader(args, rows, rank, world_size, iteration, samples_seen, needs_images):
        ...                                   # one micro-batch of this rank; endless

Iteration `i` trains on one GLOBAL batch of train_batch_size * gradient_accumulation_steps * world_size samples. A sample's
`slot` is its place in it. Its row, crop and flip follow from (seed, iteration, samples seen before, slot) alone, so the same
global batch comes at any number of processes and micro-batches, and a resumed run goes on as if it had not stopped.
With --streaming, the row follows from more than that: see senseflow.data.streaming.
"""

import glob
import json
import logging
import os
import random
from functools import partial
from typing import Any, Callable, Optional, Union

import datasets
import pyarrow as pa
from PIL import Image

from senseflow.data.captions import caption_array, captions_of, first_empty, what_column_holds
from senseflow.data.imagefolder import FolderError, files_below, holds_images, read_folder, says_its_splits
from senseflow.data.images import read_image
from senseflow.data.lmdb import LatentRows
from senseflow.data.loader import GlobalBatchSampler, PromptImageDataset, PromptImageLoader, collate
from senseflow.data.streaming import StreamedBatches, StreamedRows, undecoded
from senseflow.errors import UserError, require_package


logger = logging.getLogger(__name__)

SOURCES = ("dataset_name", "train_data_dir", "dataset_json", "prompts_file", "dataset_lmdb")
JSON_KEYS = ("keys", "image_paths", "prompts")
LOOKED_AT = 256  # rows at the start, and as many at random, whose images must be there before a run starts
STALLED = 1800  # seconds without an answer of a worker that end a run; a stream may pass over rows for longer


def _refusal(flag: str, value: Any, problem: str, fix: str) -> UserError:
    return UserError(" ".join(f"--{flag} {value}: {problem}; {fix}".split()), exit_code=2)


# Rows ----------------------------------------------------------------------------------------------------------------
class Rows:
    """Prompts and images as Arrow columns; `len(rows)` is their number. `senseflow.data.lmdb.LatentRows` is its like for latents.

    Args:
        origin: the flag and its value that the rows came from, for messages.
        prompts: one column of strings, or of lists of strings.
        images: one column of paths, or of `datasets.Image(decode=False)`; None if no image is ever read.
        folder: what relative paths are relative to.
        left_aside: what of the data set is not used, for the log; "" if everything is.
    """

    field = "pixel_values"

    def __init__(
        self, origin: str, prompts: datasets.Dataset, images: Optional[datasets.Dataset] = None, folder: str = "",
        left_aside: str = "",
    ):  # fmt: skip
        self.origin, self.prompts, self.images, self.folder, self.left_aside = (
            origin,
            prompts,
            images,
            folder,
            left_aside,
        )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def size(self) -> str:
        return f"{len(self)} rows"

    def captions(self, row: int) -> list[str]:
        return captions_of(next(iter(self.prompts[row].values())))

    def read(self, row: int) -> tuple[str, Optional[Image.Image], str]:
        """(name for messages, upright RGB image, ""); (name, None, why) if it cannot be read."""
        (cell,) = self.images[row].values()
        if isinstance(cell, str):
            cell = {"path": os.path.join(self.folder, cell), "bytes": None}
        path, content = (cell["path"], cell["bytes"]) if cell else (None, None)
        # An image that lives in a table has a file name at best.
        name = path if path and content is None else f"{path or 'image'} (row {row} of {self.origin})"
        return name, *read_image(path, content)


AnyRows = Union[Rows, LatentRows, StreamedRows]
AnyDataset = Union[datasets.Dataset, datasets.IterableDataset]


def check_data_args(args) -> Optional[AnyRows]:
    """Checks the data flags before any weight loads.

    Returns:
        The rows of a file, and of `--dataset_lmdb`, which had to be read for it (hand them to `load_rows`); else None.
    Raises:
        UserError: exit code 2.
    """
    given = [flag for flag in SOURCES if getattr(args, flag) is not None]
    every = ", ".join(f"--{flag}" for flag in SOURCES)
    if len(given) != 1:
        found = " and ".join(f"--{flag} {getattr(args, flag)}" for flag in given) or "no data set is given"
        raise UserError(f"{found}: give exactly one of {every}", exit_code=2)
    flag, path = given[0], getattr(args, given[0])
    if args.max_train_samples is not None and args.max_train_samples < 1:
        raise _refusal("max_train_samples", args.max_train_samples, "leaves no row", "give 1 or more, or leave it out")
    if args.dataset_config_name is not None and flag != "dataset_name":
        raise _refusal("dataset_config_name", args.dataset_config_name, f"means nothing to --{flag}", "leave it out")
    if args.streaming and flag not in ("dataset_name", "train_data_dir"):
        fix = "leave it out, or give --dataset_name or --train_data_dir"
        raise UserError(f"--streaming: --{flag} {path} is not streamed; {fix}", exit_code=2)

    if flag == "dataset_json":
        return _read_json(args)
    if flag == "prompts_file":
        if _images_needed(args):
            asked = f"--gan_weight {args.gan_weight} --backward_simulation_prob {args.backward_simulation_prob}"
            fix = "give --gan_weight 0 --backward_simulation_prob 1, or a data set with images"
            raise _refusal(flag, path, f"has no images, and {asked} needs them", fix)
        return _read_prompts(args)
    if flag == "dataset_lmdb":
        return _read_lmdb(args)
    # A Hub id has one slash at most and begins with a name.
    local = flag == "train_data_dir" or path.startswith((".", "/", "~")) or path.count("/") > 1
    if local and not os.path.isdir(path):
        raise _refusal(flag, path, "there is no such folder", "give one that exists")
    return None


def load_rows(args, checked: Optional[AnyRows] = None) -> AnyRows:
    """The rows of the data set, cut to `--max_train_samples`.

    Args:
        checked: what `check_data_args(args)` returned, so that no file is parsed twice.
    Raises:
        UserError: exit code 2: the data set cannot be loaded, is empty, or has no such column.
    """
    checked = checked or check_data_args(args)
    if checked is not None:
        return checked
    flag = "dataset_name" if args.dataset_name is not None else "train_data_dir"
    path = getattr(args, flag)
    saved = any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))
    own = os.path.isdir(path) and not saved and args.dataset_config_name is None and not says_its_splits(path)
    if flag == "train_data_dir" or (own and holds_images(path)):
        return _read_folder(args, flag, path)
    dataset, left_aside = _load_dataset(flag, path, args.dataset_config_name, args.streaming, saved)
    if not args.streaming:
        dataset = dataset.with_format(None)
        dataset = dataset.select(range(min(args.max_train_samples or len(dataset), len(dataset))))

    def column(column_flag: str, wrong: Callable[[Any], str], wanted: str) -> AnyDataset:
        name = getattr(args, column_flag)
        shown = f"it has the columns: {', '.join(dataset.column_names)}"
        if name not in dataset.features:
            raise _refusal(column_flag, name, f"no column has that name in --{flag} {path}", shown)
        found = wrong(dataset.features[name])
        if found:
            raise _refusal(column_flag, name, f"holds {found}, not {wanted}, in --{flag} {path}", shown)
        return dataset.select_columns([name])

    prompts, images = column("caption_column", what_column_holds, "strings or lists of strings"), None
    if _images_needed(args):
        images = column("image_column", _no_images, "images")
    if args.streaming:
        return _stream(args, f"--{flag} {path}", dataset, left_aside)
    empty = first_empty(prompts.with_format("arrow")[:][args.caption_column])
    if empty is not None:
        raise _refusal(
            "caption_column", args.caption_column, f"is empty in row {empty} of --{flag} {path}", "caption every row"
        )
    # Decoding is left to `Rows`: a broken image is to be passed over, not to end the run.
    images = images and images.cast_column(args.image_column, datasets.Image(decode=False))
    return Rows(f"--{flag} {path}", prompts, images, left_aside=left_aside)


def check_latents(args, rows: AnyRows, shape: tuple[int, int, int]) -> None:
    """Refuses (exit code 2) stored latents that do not fit the teacher; nothing to do where none are stored, or none are read.

    Args:
        shape: (channels, height, width) of the teacher's latents at `--resolution`.
    """
    if not isinstance(rows, LatentRows) or rows.shape == tuple(shape) or not _images_needed(args):
        return
    found, wanted = (" x ".join(map(str, sizes)) for sizes in (rows.shape, shape))
    fix = "give latents of this teacher's VAE at this resolution"
    if rows.shape[0] == shape[0] and rows.shape[1] == rows.shape[2]:
        fix = f"give --resolution {rows.shape[1] * args.resolution // shape[1]}, or {fix.removeprefix('give ')}"
    problem = f"holds latents of {found}, this teacher's are {wanted} at --resolution {args.resolution}"
    raise _refusal("dataset_lmdb", rows.folder, problem, fix)


def _images_needed(args) -> bool:
    # By the GAN term, and where the input is a noised real latent.
    return args.gan_weight != 0 or args.backward_simulation_prob != 1


def _no_images(feature: Any) -> str:
    return "" if isinstance(feature, datasets.Image) else what_column_holds(feature) or "strings"


def _stream(args, origin: str, dataset: datasets.IterableDataset, left_aside: str) -> StreamedRows:
    columns = [args.caption_column, args.image_column] if _images_needed(args) else [args.caption_column]
    dataset = dataset.select_columns(columns)
    if args.max_train_samples is not None:
        dataset = dataset.take(args.max_train_samples)
    rows = StreamedRows(origin, dataset, *columns, left_aside=left_aside)
    # Every launcher sets the variable; to ask accelerate would need the process group, which is made after the checks.
    rows.check_split(args.dataloader_num_workers, int(os.environ.get("WORLD_SIZE", "1")), args.max_train_samples)
    return rows


def _load_dataset(flag: str, path: str, config: Optional[str], streaming: bool, saved: bool) -> tuple[AnyDataset, str]:
    """(the split to train on, what is left aside)."""
    if os.path.isdir(path) and ("::" in path or (glob.has_magic(path) and not saved)):
        problem = "datasets takes [ ] * ? and :: in the name of a folder for a pattern and finds no file"
        raise _refusal(flag, path, problem, "rename the folder")
    try:
        if saved and streaming:
            problem = f"--{flag} {path} was written by save_to_disk and is read from the disk as it is"
            raise UserError(f"--streaming: {problem}; leave it out", exit_code=2)
        # load_dataset refuses what save_to_disk wrote.
        loaded = datasets.load_from_disk(path) if saved else datasets.load_dataset(path, config, streaming=streaming)
        splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        if "train" not in splits and len(splits) > 1:
            raise _refusal(flag, path, f"has no split train but {', '.join(splits)}", "name the one to use train")
        used = "train" if "train" in splits else next(iter(splits))
        dataset, others = splits[used], [name for name in splits if name != used]
        notes = [f"split {used} is used, not {', '.join(others)}"] if others else []
        if os.path.isdir(path) and not saved and not says_its_splits(path):
            notes += _files_left_aside(path, config)
        if streaming:
            dataset = undecoded(dataset)
        if (next(iter(dataset), None) is None) if streaming else (len(dataset) == 0):
            raise _refusal(flag, path, "has no rows", "give a data set that has some")
        return dataset, "; ".join(notes)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # A failed build says nothing itself, its cause does.
        reason = f"cannot be loaded ({error.__cause__ or error})"
        fix = "give a Hub id or a folder that datasets.load_dataset takes"
        if not os.path.isdir(path):  # the reason is the Hub's, in the words of datasets, which keeps no more of it
            fix = "check the spelling; if it is gated or private, accept its license there and log in with `hf auth login`"
        raise _refusal(flag, path, reason, fix) from error


def _files_left_aside(path: str, config: Optional[str]) -> list[str]:
    """Says which files of a folder of tables datasets passes over: where some names have train, test ... in them, all others."""
    splits = datasets.load_dataset_builder(path, config).config.data_files.values()
    used = {str(file) for files in splits for file in files}
    endings = {os.path.splitext(file)[1] for file in used}
    files = [file for file in files_below(os.path.realpath(path)) if os.path.splitext(file)[1] in endings]
    others = [file for file in files if file not in used]
    if not others:
        return []
    return [f"files in no split, by their names, are left aside: {len(others)} of {len(files)}, one is {others[0]}"]


def _read_folder(args, flag: str, path: str) -> Rows:
    image_column = args.image_column if _images_needed(args) else None
    try:
        found = read_folder(path, args.caption_column, image_column, args.max_train_samples)
    except FolderError as error:
        if error.of_captions:
            raise _refusal("caption_column", args.caption_column, f"{error} (--{flag} {path})", error.fix) from error
        raise _refusal(flag, path, str(error), error.fix) from error
    try:
        captions = caption_array(found.captions, found.place)
    except ValueError as error:
        raise _refusal(
            "caption_column", args.caption_column, f"{error} (--{flag} {path})", "caption every image"
        ) from error
    prompts = datasets.Dataset(pa.table({"prompts": captions}))
    images = datasets.Dataset(pa.table({"images": pa.array(found.images, pa.string())})) if image_column else None
    return Rows(f"--{flag} {path}", prompts, images, left_aside=found.left_aside)


def _read_prompts(args) -> Rows:
    flag, path = "prompts_file", args.prompts_file
    try:
        with open(path, encoding="utf-8-sig") as file:
            prompts = [line.strip() for line in file if line.strip()]
        if not prompts:
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise _refusal(
            flag, path, f"no prompt can be read ({error})", "give a UTF-8 text file, one prompt a line"
        ) from error
    table = pa.table({"prompts": pa.array(prompts[: args.max_train_samples], pa.string())})
    return Rows(f"--{flag} {path}", datasets.Dataset(table))


def _read_json(args) -> Rows:
    flag, path = "dataset_json", args.dataset_json
    try:
        with open(path, encoding="utf-8-sig") as file:
            parsed = json.load(file)
    except (OSError, ValueError) as error:
        raise _refusal(
            flag, path, f"is not there, cut or not valid JSON ({error})", "give a whole JSON file"
        ) from error
    wrong = [f'"{key}"' for key in JSON_KEYS if not (isinstance(parsed, dict) and isinstance(parsed.get(key), list))]
    if wrong:
        raise _refusal(
            flag, path, f"has no list {', no list '.join(wrong)}", f"give an object of three lists: {JSON_KEYS}"
        )
    lengths = [len(parsed[key]) for key in JSON_KEYS]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        counts = ", ".join(f"{key} {length}" for key, length in zip(JSON_KEYS, lengths))
        raise _refusal(
            flag, path, f"its lists have the lengths {counts}", "write one entry of each per row, one row at least"
        )

    def where(row: int) -> str:
        return f"row {row}"

    folder, columns = os.path.dirname(os.path.abspath(path)), {}
    for key in JSON_KEYS[1:]:
        try:
            array = caption_array(parsed[key][: args.max_train_samples], where)
            if key == "image_paths" and not pa.types.is_string(array.type):
                raise ValueError("holds lists")
        except ValueError as error:
            kind = "string" if key == "image_paths" else "string or a list of strings"
            raise _refusal(
                flag, path, f"not every entry of {key} is a {kind}: it {error}", "write it again"
            ) from error
        columns[key] = datasets.Dataset(pa.table({key: array}))
    if not _images_needed(args):
        return Rows(f"--{flag} {path}", columns["prompts"])

    paths = parsed["image_paths"][: args.max_train_samples]
    count = min(LOOKED_AT, len(paths))
    looked_at = sorted({*range(count), *random.Random(args.seed).sample(range(len(paths)), count)})
    missing = [row for row in looked_at if not os.path.isfile(os.path.join(folder, paths[row]))]
    if missing:
        problem = f"{len(missing)} of {len(looked_at)} images looked at are missing, one is {paths[missing[0]]}"
        raise _refusal(
            flag, path, problem, f"give paths that are absolute or relative to {folder}, and drop what is gone"
        )
    return Rows(f"--{flag} {path}", columns["prompts"], columns["image_paths"], folder)


def _read_lmdb(args) -> LatentRows:
    flag, path = "dataset_lmdb", args.dataset_lmdb
    require_package("lmdb", f"--{flag}")
    for other in ("center_crop", "random_flip"):
        if getattr(args, other):
            # Not even a flip: mirrored latents are not the latents of a mirrored image.
            raise UserError(
                f"--{other}: the latents of --{flag} {path} are taken as they are; leave it out", exit_code=2
            )
    rows = LatentRows(path, args.max_train_samples)
    sample = random.Random(args.seed).sample(range(len(rows)), min(LOOKED_AT, len(rows)))
    rows.check(sorted({0, len(rows) - 1, *sample}), latents=_images_needed(args))
    return rows


# Batches -------------------------------------------------------------------------------------------------------------
def make_dataloader(
    args,
    rows: AnyRows,
    rank: int,
    world_size: int,
    iteration: int,
    samples_seen: int,
    needs_images: Callable[[int], bool],
) -> PromptImageLoader:
    """Endless micro-batches (see `PromptImageLoader`) of this rank, `--gradient_accumulation_steps` of them an iteration.

    `iteration` and `samples_seen` say where to start (see `GlobalBatchSampler`; `iteration` alone in a stream, see
    senseflow.data.streaming), `needs_images` when images are read. Rank 0 logs how large the data set is, and what of it is not used.
    """
    batch_size, accumulation, workers = (
        args.train_batch_size,
        args.gradient_accumulation_steps,
        args.dataloader_num_workers,
    )
    if rank == 0:
        logger.info("%s: %s%s", rows.origin, rows.size, f" ({rows.left_aside})" if rows.left_aside else "")
    if isinstance(rows, StreamedRows):
        samples = partial(
            PromptImageDataset, resolution=args.resolution, center_crop=args.center_crop, random_flip=args.random_flip, seed=args.seed,
            needs_images=needs_images,
        )  # fmt: skip
        batches = StreamedBatches(rows, samples, args.seed, batch_size, accumulation, rank, world_size, iteration)
        return PromptImageLoader(batches, batch_size=None, collate_fn=collate, num_workers=workers)
    sampler = GlobalBatchSampler(
        len(rows), args.seed, batch_size, accumulation, rank, world_size, iteration, samples_seen
    )
    dataset = PromptImageDataset(rows, args.resolution, args.center_crop, args.random_flip, args.seed, needs_images)
    # One endless iterator: its workers live as long as the run without being told to persist.
    timeout = STALLED if workers > 0 else 0
    return PromptImageLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers, timeout=timeout)
