# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --train_data_dir: images with captions in metadata files, as in datasets' imagefolder, or in .txt files.

Not by `datasets`: its globs cannot look into folders called `[a]` or `a::b`, it reads a caption `None` or `7` of a CSV
file as missing or a number, and it has no .txt files.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from senseflow.data.rows import ImageRows, data_error, uses_images


IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
METADATA = frozenset(ImageFolder.METADATA_FILENAMES)
Row = tuple[str, Any, str]  # the image's path, what was written as its caption(s), a name for messages


def read_imagefolder(args) -> ImageRows:
    """Read the rows of the metadata files or, if there are none, the images in the order of their paths.

    Raises:
        UserError: exit code 2: no images or captions, a file that cannot be read, an image that is not there.
    """
    origin = f"--train_data_dir {args.train_data_dir}"
    files = list_files(os.path.normpath(args.train_data_dir))
    images = [file for file in files if os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES]
    metadata = [file for file in files if os.path.basename(file) in METADATA]
    if not images:
        raise data_error(origin, "there are no images", "give a folder of images with captions, archives unpacked")
    rows: list[Row] = []
    for file in metadata or images:
        try:
            rows += _read_metadata(file, args.caption_column) if metadata else [_read_text(file)]
        except (OSError, ValueError, csv.Error) as error:  # json's and pyarrow's are ValueErrors
            fix = "write metadata.jsonl or metadata.csv (file_name, text), or a UTF-8 .txt beside each image"
            raise data_error(origin, f"the captions of {file} cannot be read ({error})", fix) from error
    if not rows:
        raise data_error(origin, "the metadata files are empty", "write a row for each image")
    unlisted = sorted(set(images) - {path for path, _, _ in rows})
    rows = rows[: args.max_train_samples]
    paths, captions, names = map(list, zip(*rows))
    known = set(images)
    missing = [name for path, _, name in rows if path not in known and not os.path.isfile(path)]
    if missing and uses_images(args):
        problem = f"{len(missing)} of {len(rows)} images are missing, the first is that of {missing[0]}"
        raise data_error(origin, problem, "give paths relative to the metadata file, and drop what is gone")
    note = f"images in no metadata file are not used: {len(unlisted)}, one is {unlisted[0]}" if unlisted else ""
    return ImageRows(origin, captions, paths if uses_images(args) else None, names.__getitem__, note)


def list_files(folder: str) -> list[str]:
    """List the paths of all files, sorted, without hidden ones and folders like __MACOSX. Follows links."""
    files = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        files += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _read_metadata(file: str, caption_column: str) -> list[Row]:
    if file.endswith(".parquet"):
        entries = pq.read_table(file).to_pylist()
    else:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            if file.endswith(".csv"):
                entries = _read_csv(lines, caption_column)
            else:
                entries = [json.loads(line) for line in lines if line.strip()]
    rows = []
    for number, entry in enumerate(entries):
        for column in ("file_name", caption_column):
            if entry.get(column) is None:
                raise ValueError(f"row {number} has no {column}, its columns are {', '.join(entry)}")
        path = os.path.normpath(os.path.join(os.path.dirname(file), entry["file_name"]))
        rows.append((path, entry[caption_column], f"row {number} ({entry['file_name']}) of {file}"))
    return rows


def _read_csv(lines, caption_column: str) -> list[dict[str, Any]]:
    entries = list(csv.DictReader(lines, strict=True))
    for number, entry in enumerate(entries):
        if None in entry or None in entry.values():
            raise ValueError(f"row {number} has not as many cells as there are columns: quote captions with commas")
    entries = [{column: cell or None for column, cell in entry.items()} for entry in entries]
    if entries and all((entry.get(caption_column) or "").replace(".", "", 1).isdecimal() for entry in entries):
        raise ValueError(f"column {caption_column} holds numbers only")
    return entries


def _read_text(image: str) -> Row:
    file = Path(image).with_suffix(".txt")
    captions = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    return image, captions, str(file)
