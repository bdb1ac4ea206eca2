# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Prompts and pictures: the five kinds of data set, the transform, and a batch order that needs no state.

    checked = check_data_args(args)           # before any weight loads
    rows = load_rows(args, checked)           # columns in Arrow; pictures stay files or bytes until they are read
    check_latents(args, rows, shape)          # if the pictures were encoded beforehand: do they fit the teacher?
    for batch in make_dataloader(args, rows, rank, world_size, iteration, samples_seen, needs_pictures):
        ...                                   # one micro-batch of this rank; endless

Iteration `i` trains on one GLOBAL batch of train_batch_size * gradient_accumulation_steps * world_size samples. A sample's
`slot` is its place in it. Its row, crop and flip follow from (seed, iteration, samples seen before, slot) alone, so the same
global batch comes at any number of processes and micro-batches, and a resumed run goes on as if it had not stopped.
With --streaming, the row follows from more than that: see senseflow_stream.
"""

import io
import json
import logging
import os
import random
import struct
import zlib
from functools import partial
from typing import Any, Callable, Iterator, Optional, Union

import datasets
import numpy as np
import pyarrow as pa
import torch
from datasets.utils.file_utils import xopen
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler

from senseflow_args import UserError, require_package
from senseflow_lmdb import LatentRows
from senseflow_stream import StreamedBatches, StreamedRows, undecoded
from senseflow_utils import Draws


logger = logging.getLogger(__name__)

SOURCES = ("dataset_name", "train_data_dir", "dataset_json", "prompts_file", "dataset_lmdb")
FIELDS = ("pixel_values", "latents")  # a batch has one of them
JSON_KEYS = ("keys", "image_paths", "prompts")
LOOKED_AT = 256  # rows at the start, and as many at random, whose pictures must be there before a run starts
SHARE_FROM = 1000  # rows from which on the share of unreadable pictures is judged
# What Pillow raises on broken files. Anything else is a fault of ours, and not to be passed over.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)
Key = tuple[int, int, int]  # what a sample is a function of: row, iteration (from 0), slot


def _refusal(flag: str, value: Any, problem: str, fix: str) -> UserError:
    return UserError(" ".join(f"--{flag} {value}: {problem}; {fix}".split()), exit_code=2)


# Rows ----------------------------------------------------------------------------------------------------------------
class Rows:
    """Prompts and pictures as Arrow columns; `len(rows)` is their number. `senseflow_lmdb.LatentRows` is its like for latents.

    Args:
        origin: the flag and its value that the rows came from, for messages.
        prompts: one column of strings.
        pictures: one column of paths, or of `datasets.Image(decode=False)`; None if no picture is ever read.
        folder: what relative paths are relative to.
    """

    field = "pixel_values"

    def __init__(self, origin: str, prompts: datasets.Dataset, pictures: Optional[datasets.Dataset] = None, folder: str = ""):
        self.origin, self.prompts, self.pictures, self.folder = origin, prompts, pictures, folder

    def __len__(self) -> int:
        return len(self.prompts)

    def prompt(self, row: int) -> str:
        return next(iter(self.prompts[row].values()))

    def read(self, row: int) -> tuple[str, Optional[Image.Image]]:
        """(name for messages, upright RGB picture), the latter None if it cannot be read."""
        (cell,) = self.pictures[row].values()
        if isinstance(cell, str):
            cell = {"path": os.path.join(self.folder, cell), "bytes": None}
        path, content = (cell["path"], cell["bytes"]) if cell else (None, None)
        # A picture that lives in a table has a file name at best.
        name = path if path and content is None else f"{path or 'picture'} (row {row} of {self.origin})"
        return name, read_picture(path, content)


AnyRows = Union[Rows, LatentRows, StreamedRows]
AnyDataset = Union[datasets.Dataset, datasets.IterableDataset]


def read_picture(path: Optional[str], content: Optional[bytes]) -> Optional[Image.Image]:
    """An upright RGB picture out of its bytes or, where there are none, its file or URL; None if it cannot be read."""
    try:
        file = path if content is None and path else io.BytesIO(content or b"")
        if file is path and "://" in path:
            with xopen(path, "rb") as remote:
                file = io.BytesIO(remote.read())
        with Image.open(file) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except UNREADABLE:
        return None


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
        if _pictures_needed(args):
            asked = f"--gan_weight {args.gan_weight} --backward_simulation_prob {args.backward_simulation_prob}"
            fix = "give --gan_weight 0 --backward_simulation_prob 1, or a data set with pictures"
            raise _refusal(flag, path, f"has no pictures, and {asked} needs them", fix)
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
    dataset = _load_dataset(flag, path, args.dataset_config_name, args.streaming)
    if not args.streaming:
        dataset = dataset.with_format(None)
        dataset = dataset.select(range(min(args.max_train_samples or len(dataset), len(dataset))))

    def column(column_flag: str, fits: Callable[[Any], bool], wanted: str) -> AnyDataset:
        name = getattr(args, column_flag)
        if name not in dataset.features or not fits(dataset.features[name]):
            hint = " (captions stand in the folder's metadata.jsonl or metadata.csv)" if flag == "train_data_dir" else ""
            fix = f"it has the columns: {', '.join(dataset.column_names)}{hint}"
            raise _refusal(column_flag, name, f"no column of {wanted} has that name in --{flag} {path}", fix)
        return dataset.select_columns([name])

    prompts = column("caption_column", lambda kind: getattr(kind, "dtype", "") in ("string", "large_string"), "strings")
    pictures = None
    if _pictures_needed(args):
        pictures = column("image_column", lambda kind: isinstance(kind, datasets.Image), "pictures")
    if args.streaming:
        return _stream(args, f"--{flag} {path}", dataset)
    if prompts.with_format("arrow")[:][args.caption_column].null_count:
        raise _refusal("caption_column", args.caption_column, f"is empty in some rows of --{flag} {path}", "caption them")
    if pictures is None:
        return Rows(f"--{flag} {path}", prompts)
    # Decoding is left to `Rows`: a broken picture is to be passed over, not to end the run.
    return Rows(f"--{flag} {path}", prompts, pictures.cast_column(args.image_column, datasets.Image(decode=False)))


def check_latents(args, rows: AnyRows, shape: tuple[int, int, int]) -> None:
    """Refuses (exit code 2) stored latents that do not fit the teacher; nothing to do where none are stored, or none are read.

    Args:
        shape: (channels, height, width) of the teacher's latents at `--resolution`.
    """
    if not isinstance(rows, LatentRows) or rows.shape == tuple(shape) or not _pictures_needed(args):
        return
    found, wanted = (" x ".join(map(str, sizes)) for sizes in (rows.shape, shape))
    fix = "give latents of this teacher's VAE at this resolution"
    if rows.shape[0] == shape[0] and rows.shape[1] == rows.shape[2]:
        fix = f"give --resolution {rows.shape[1] * args.resolution // shape[1]}, or {fix.removeprefix('give ')}"
    problem = f"holds latents of {found}, this teacher's are {wanted} at --resolution {args.resolution}"
    raise _refusal("dataset_lmdb", rows.folder, problem, fix)


def _pictures_needed(args) -> bool:
    # By the GAN term, and where the input is a noised real latent.
    return args.gan_weight != 0 or args.backward_simulation_prob != 1


def _stream(args, origin: str, dataset: datasets.IterableDataset) -> StreamedRows:
    columns = [args.caption_column, args.image_column] if _pictures_needed(args) else [args.caption_column]
    dataset = dataset.select_columns(columns)
    if args.max_train_samples is not None:
        dataset = dataset.take(args.max_train_samples)
    rows = StreamedRows(origin, dataset, read_picture, *columns)
    # Every launcher sets the variable; to ask accelerate would need the process group, which is made after the checks.
    rows.check_split(args.dataloader_num_workers, int(os.environ.get("WORLD_SIZE", "1")), args.max_train_samples)
    return rows


def _load_dataset(flag: str, path: str, config: Optional[str], streaming: bool) -> AnyDataset:
    try:
        if flag == "train_data_dir":
            loaded = datasets.load_dataset("imagefolder", data_dir=path, streaming=streaming)
        elif any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json")):
            if streaming:
                problem = f"--{flag} {path} was written by save_to_disk and is read from the disk as it is"
                raise UserError(f"--streaming: {problem}; leave it out", exit_code=2)
            loaded = datasets.load_from_disk(path)  # from save_to_disk, which load_dataset refuses
        else:
            loaded = datasets.load_dataset(path, config, streaming=streaming)
        splits = {"train": loaded} if isinstance(loaded, datasets.Dataset) else loaded
        if "train" not in splits and len(splits) > 1:
            raise _refusal(flag, path, f"has no split train but {', '.join(splits)}", "name the one to use train")
        dataset = splits["train"] if "train" in splits else next(iter(splits.values()))
        if streaming:
            dataset = undecoded(dataset)
        if (next(iter(dataset), None) is None) if streaming else (len(dataset) == 0):
            raise _refusal(flag, path, "has no rows", "give a data set that has some")
        return dataset
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # A failed build says nothing itself, its cause does.
        reason = f"cannot be loaded ({error.__cause__ or error})"
        raise _refusal(flag, path, reason, "give a Hub id or a folder that datasets.load_dataset takes") from error


def _read_prompts(args) -> Rows:
    flag, path = "prompts_file", args.prompts_file
    try:
        with open(path, encoding="utf-8-sig") as file:
            prompts = [line.strip() for line in file if line.strip()]
        if not prompts:
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        raise _refusal(flag, path, f"no prompt can be read ({error})", "give a UTF-8 text file, one prompt a line") from error
    table = pa.table({"prompts": pa.array(prompts[: args.max_train_samples], pa.string())})
    return Rows(f"--{flag} {path}", datasets.Dataset(table))


def _read_json(args) -> Rows:
    flag, path = "dataset_json", args.dataset_json
    try:
        with open(path, encoding="utf-8-sig") as file:
            parsed = json.load(file)
    except (OSError, ValueError) as error:
        raise _refusal(flag, path, f"is not there, cut or not valid JSON ({error})", "give a whole JSON file") from error
    wrong = [f'"{key}"' for key in JSON_KEYS if not (isinstance(parsed, dict) and isinstance(parsed.get(key), list))]
    if wrong:
        raise _refusal(flag, path, f"has no list {', no list '.join(wrong)}", f"give an object of three lists: {JSON_KEYS}")
    lengths = [len(parsed[key]) for key in JSON_KEYS]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        counts = ", ".join(f"{key} {length}" for key, length in zip(JSON_KEYS, lengths))
        raise _refusal(flag, path, f"its lists have the lengths {counts}", "write one entry of each per row, one row at least")

    folder, columns = os.path.dirname(os.path.abspath(path)), {}
    for key in JSON_KEYS[1:]:
        try:
            array = pa.array(parsed[key][: args.max_train_samples], pa.string())
            if array.null_count:
                raise ValueError(f"{array.null_count} are null")
        except (TypeError, ValueError) as error:
            raise _refusal(flag, path, f"not every entry of {key} is a string ({error})", "write it again") from error
        columns[key] = datasets.Dataset(pa.table({key: array}))
    if not _pictures_needed(args):
        return Rows(f"--{flag} {path}", columns["prompts"])

    paths = parsed["image_paths"][: args.max_train_samples]
    count = min(LOOKED_AT, len(paths))
    looked_at = sorted({*range(count), *random.Random(args.seed).sample(range(len(paths)), count)})
    missing = [row for row in looked_at if not os.path.isfile(os.path.join(folder, paths[row]))]
    if missing:
        problem = f"{len(missing)} of {len(looked_at)} pictures looked at are missing, one is {paths[missing[0]]}"
        raise _refusal(flag, path, problem, f"give paths that are absolute or relative to {folder}, and drop what is gone")
    return Rows(f"--{flag} {path}", columns["prompts"], columns["image_paths"], folder)


def _read_lmdb(args) -> LatentRows:
    flag, path = "dataset_lmdb", args.dataset_lmdb
    require_package("lmdb", f"--{flag}")
    for other in ("center_crop", "random_flip"):
        if getattr(args, other):
            # Not even a flip: mirrored latents are not the latents of a mirrored picture.
            raise UserError(f"--{other}: the latents of --{flag} {path} are taken as they are; leave it out", exit_code=2)
    rows = LatentRows(path, args.max_train_samples)
    sample = random.Random(args.seed).sample(range(len(rows)), min(LOOKED_AT, len(rows)))
    rows.check(sorted({0, len(rows) - 1, *sample}), latents=_pictures_needed(args))
    return rows


# Samples -------------------------------------------------------------------------------------------------------------
class PromptPictures(Dataset):
    """`dataset[(row, iteration, slot)]` is a dict:

        pixel_values  (3, R, R) float32 in [-1, 1]; None where needs_pictures(iteration) is false: nothing is read then
        latents       (C, H, W) float32 or None, instead of pixel_values where `rows` holds latents: nothing is transformed then
        prompt        str
        row           the row used in the end: an unreadable picture, and its prompt, gives way to the next readable row
        slot          as asked for
        unreadable    names of the pictures or latents passed over, in order

    Args:
        resolution: R in pixels. The shorter side is scaled to it (Lanczos), the longer one cropped.
        center_crop, random_flip: crop in the middle instead of anywhere; mirror half of the samples. Drawn from `seed`.
        needs_pictures: `needs_pictures(iteration) -> bool`, picklable. `rows` must have pictures where it says yes.
    Raises:
        UserError: nothing readable in all rows, or in 1,000 that follow each other; no prompt in a row of latents.
    """

    def __init__(self, rows: AnyRows, resolution: int, center_crop: bool, random_flip: bool, seed: int, needs_pictures):
        self.rows, self.resolution, self.center_crop, self.random_flip = rows, resolution, center_crop, random_flip
        self.seed, self.needs_pictures = seed, needs_pictures

    def __getitem__(self, key: Key) -> dict[str, Any]:
        row, iteration, slot = key
        unreadable, value = [], None
        if self.needs_pictures(iteration):
            row, value, unreadable = self._next_readable(row)
            if self.rows.field == "pixel_values":
                value = self._transform(value, Draws(self.seed, iteration), slot)
        prompt = self.rows.prompt(row)
        return {self.rows.field: value, "prompt": prompt, "row": row, "slot": slot, "unreadable": unreadable}

    def __getitems__(self, keys: list[Key]) -> list[Union[dict[str, Any], UserError]]:
        """What a DataLoader calls. A UserError is returned: raised in a worker, it would reach the user as a traceback."""
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return [error]

    def _next_readable(self, row: int) -> tuple[int, Union[Image.Image, torch.Tensor], list[str]]:
        unreadable = []
        # A disk that went away must not send one sample through a million rows.
        tries = min(len(self.rows), SHARE_FROM)
        for candidate in range(row, row + tries):
            name, found = self.rows.read(candidate % len(self.rows))
            if found is not None:
                return candidate % len(self.rows), found, unreadable
            unreadable.append(name)
        raise UserError(f"{self.rows.origin}: none of {tries} rows can be read, one is {unreadable[0]}; mend them")

    def _transform(self, picture: Image.Image, draws: Draws, slot: int) -> torch.Tensor:
        size, shorter = self.resolution, min(picture.size)
        scaled = [max(size, round(side * size / shorter)) for side in picture.size]
        corner = [(side - size) // 2 for side in scaled]
        if not self.center_crop:
            places = draws.uniform("crop", [slot], shape=(2,))[0].tolist()
            corner = [min(int(place * (side - size + 1)), side - size) for place, side in zip(places, scaled)]
        # Only the pixels that the crop keeps are computed: the same values, and a long thin picture cannot fill the memory.
        steps = [side / new for side, new in zip(picture.size, scaled)]
        low = [first * step for first, step in zip(corner, steps)]
        high = [min((first + size) * step, side) for first, step, side in zip(corner, steps, picture.size)]
        picture = picture.resize((size, size), Image.Resampling.LANCZOS, box=(*low, *high))
        if self.random_flip and draws.uniform("flip", [slot]).item() < 0.5:
            picture = ImageOps.mirror(picture)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


def collate(examples: list[Union[dict[str, Any], UserError]]) -> Union[dict[str, Any], UserError, None]:
    """A micro-batch of B samples; a UserError stays what it is, and no samples (see `StreamedBatches`) become None.

    Returns:
        pixel_values  (B, 3, R, R) float32 in [-1, 1], or None; or
        latents       (B, C, H, W) float32, or None
        prompts       B strings
        slots, rows   B integers each
        unreadable    names of all pictures or latents passed over
        gave_way      how many of the B samples' own rows were unreadable
    """
    if not examples or isinstance(examples[0], UserError):
        return examples[0] if examples else None
    field = next(field for field in FIELDS if field in examples[0])
    values = [example[field] for example in examples]
    return {
        field: None if values[0] is None else torch.stack(values),
        "prompts": [example["prompt"] for example in examples],
        "slots": [example["slot"] for example in examples],
        "rows": [example["row"] for example in examples],
        "unreadable": [name for example in examples for name in example["unreadable"]],
        "gave_way": sum(bool(example["unreadable"]) for example in examples),
    }


# Batches -------------------------------------------------------------------------------------------------------------
class GlobalBatchSampler(Sampler[list[Key]]):
    """Endless micro-batches of one rank: lists of `batch_size` keys, `accumulation` of them an iteration.

    Position p = samples_seen + slot of the whole run is row permutation(seed, p // num_rows)[p % num_rows]: over all ranks
    every row comes once per epoch, and batches cross epochs. Slot = (micro-batch * world_size + rank) * batch_size + place.

    Args:
        iteration: number of the first iteration, from 0.
        samples_seen: samples of all iterations before it, over all ranks. Each iteration adds `global_batch`.
    """

    def __init__(self, num_rows: int, seed: int, batch_size: int, accumulation: int, rank: int, world_size: int,
                 iteration: int = 0, samples_seen: int = 0):  # fmt: skip
        self.num_rows, self.seed, self.batch_size, self.accumulation = num_rows, seed, batch_size, accumulation
        self.rank, self.world_size, self.iteration, self.samples_seen = rank, world_size, iteration, samples_seen
        self.global_batch = batch_size * accumulation * world_size
        self._orders: dict[int, torch.Tensor] = {}

    def row(self, position: int) -> int:
        """The row at a position of the run, from 0."""
        epoch, place = divmod(position, self.num_rows)
        if epoch not in self._orders:
            # A batch that crosses epochs needs two orders; an order can be drawn again at any time.
            self._orders = {old: order for old, order in self._orders.items() if old == epoch - 1}
            self._orders[epoch] = torch.randperm(self.num_rows, generator=Draws(self.seed, epoch).generator("epoch_order"))
        return int(self._orders[epoch][place])

    def __iter__(self) -> Iterator[list[Key]]:
        iteration, seen = self.iteration, self.samples_seen
        while True:
            for micro in range(self.accumulation):
                first = (micro * self.world_size + self.rank) * self.batch_size
                yield [(self.row(seen + slot), iteration, slot) for slot in range(first, first + self.batch_size)]
            iteration, seen = iteration + 1, seen + self.global_batch


class UnreadableCounter:
    """Warns of each unreadable row once, and stops the run when they are more than 1 % of 1,000 rows or more.

    It lives in the main process and is fed with batches, as workers cannot share a count. Each rank counts its own.
    """

    def __init__(self, origin: str):
        self.origin, self.rows, self.gave_way, self.warned = origin, 0, 0, set()

    def add(self, batch: dict[str, Any]) -> None:
        """Takes a collated batch. Raises UserError (exit code 1) when the share is too large."""
        for name in sorted(set(batch["unreadable"]) - self.warned):
            logger.warning("unreadable, the next readable row is used instead: %s", name)
        self.warned.update(batch["unreadable"])
        if any(batch.get(field) is not None for field in FIELDS):
            self.rows += len(batch["rows"])
            self.gave_way += batch["gave_way"]
        if self.rows >= SHARE_FROM and self.gave_way * 100 > self.rows:
            problem = f"{self.gave_way} of {self.rows} rows could not be read (more than 1 %), one is {min(self.warned)}"
            raise UserError(f"{self.origin}: {problem}; mend or drop them")


class PromptPictureLoader(DataLoader):
    """A DataLoader over `PromptPictures` or `StreamedBatches` that raises a worker's UserError as such and counts unreadable rows.

    It yields one rank's share already: not for `Accelerator.prepare`, which would share it out again.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:
        counter = UnreadableCounter(self.dataset.rows.origin)
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise batch
            if batch is not None:
                counter.add(batch)
                yield batch


def make_dataloader(
    args, rows: AnyRows, rank: int, world_size: int, iteration: int, samples_seen: int, needs_pictures: Callable[[int], bool]
) -> PromptPictureLoader:
    """Endless micro-batches (see `collate`) of this rank, `--gradient_accumulation_steps` of them an iteration.

    `iteration` and `samples_seen` say where to start (see `GlobalBatchSampler`; `iteration` alone in a stream, see
    senseflow_stream), `needs_pictures` when pictures are read.
    """
    batch_size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    if isinstance(rows, StreamedRows):
        samples = partial(
            PromptPictures, resolution=args.resolution, center_crop=args.center_crop, random_flip=args.random_flip, seed=args.seed,
            needs_pictures=needs_pictures,
        )  # fmt: skip
        batches = StreamedBatches(rows, samples, args.seed, batch_size, accumulation, rank, world_size, iteration)
        return PromptPictureLoader(batches, batch_size=None, collate_fn=collate, num_workers=args.dataloader_num_workers)
    sampler = GlobalBatchSampler(len(rows), args.seed, batch_size, accumulation, rank, world_size, iteration, samples_seen)
    dataset = PromptPictures(rows, args.resolution, args.center_crop, args.random_flip, args.seed, needs_pictures)
    # One endless iterator: its workers live as long as the run without being told to persist.
    return PromptPictureLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.dataloader_num_workers)
