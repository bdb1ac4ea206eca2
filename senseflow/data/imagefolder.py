# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read --train_data_dir: images with captions in metadata files, as in datasets' imagefolder, or in .txt files.

Not by `datasets`: its globs cannot look into folders called `[a]` or `a::b`, it reads a caption `None` or `7` of a CSV
file as missing or a number, and it has no .txt files.
"""

import csv
import itertools
import json
import os
import re
from typing import Any

import pyarrow.parquet as pq
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from senseflow.data.images import count_by_ending, split_images
from senseflow.data.prompts import read_lines
from senseflow.data.rows import ImageRows, data_error, uses_images


Row = tuple[str, Any]  # the image's path, what was written as its caption(s)


def read_imagefolder(args, path: str) -> ImageRows:
    """Read the rows of the metadata files or, if there are none, the images in the order of their paths.

    UserError (2) if there are no images or captions, a file cannot be read, or an image is not there.
    """
    origin, files, seen = f"--train_data_dir {path}", [], set()
    for parent, folders, names in os.walk(os.path.normpath(path), followlinks=True):
        if os.path.realpath(parent) in seen:  # by a link, which may lead back to a folder above it
            folders.clear()
            continue
        seen.add(os.path.realpath(parent))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))  # such as __MACOSX
        files += [os.path.join(parent, name) for name in names]
    images, others = split_images(files)
    metadata = [file for file in others if os.path.basename(file) in ImageFolder.METADATA_FILENAMES]
    if not images:
        problem = "there are no images" + (f" that Pillow opens, but {count_by_ending(others)}" if others else "")
        raise data_error(origin, problem, "give a folder of images with captions, archives unpacked")
    for first, second in itertools.pairwise(sorted(metadata, key=os.path.split)):
        if os.path.dirname(first) == os.path.dirname(second):
            raise data_error(origin, f"{first} and {second} are both there", "keep one metadata file in a folder")
    rows: list[Row] = []
    for file in metadata or images:
        try:
            rows += _read_metadata(file, args.caption_column) if metadata else [_read_text(file)]
        except (OSError, ValueError, csv.Error) as error:  # json's and pyarrow's are ValueErrors
            fix = "write metadata.jsonl or metadata.csv (file_name, text), or a UTF-8 .txt beside each image"
            raise data_error(origin, f"the captions of {file} cannot be read ({error})", fix) from error
    if not rows:
        raise data_error(origin, "the metadata files are empty", "write a row for each image")
    unused = _describe_unused(images, others, metadata, {path for path, _ in rows})
    paths, captions = map(list, zip(*rows[: args.max_train_samples]))
    missing = [path for path in set(paths).difference(images) if not os.path.isfile(path)]
    if missing and uses_images(args):
        problem = f"{len(missing)} of {len(paths)} images are missing, one is {min(missing)}"
        raise data_error(origin, problem, "give paths relative to the metadata file, and drop what is gone")
    image_rows = ImageRows(origin, captions, paths if uses_images(args) else None, paths.__getitem__)
    image_rows.summary += unused
    return image_rows


def _describe_unused(images: list[str], others: list[str], metadata: list[str], used: set[str]) -> str:
    """Describe for the log, in one line, the files that are neither rows nor the captions of rows."""
    captions = set(metadata or map(_text_file, images))
    unlisted = [image for image in images if image not in used]
    others = [file for file in others if file not in captions and file not in used]
    description = f"; not used: {count_by_ending(unlisted + others)}" if unlisted or others else ""
    if unlisted:
        description += f"; images in no metadata file: {len(unlisted)}, one is {unlisted[0]}"
    texts = set() if metadata else {file for file in others if file.endswith(".txt")}
    captioned = [file for file in others if file not in texts and _text_file(file) in texts]
    if captioned:
        description += f"; files with captions that Pillow cannot open: {len(captioned)}, one is {captioned[0]}"
    return description


def _read_metadata(file: str, caption_column: str) -> list[Row]:
    if file.endswith(".parquet"):
        entries = pq.read_table(file).to_pylist()
    elif file.endswith(".csv"):
        with open(file, encoding="utf-8-sig", newline="") as lines:
            entries = list(csv.DictReader(lines, strict=True, restval=""))
    else:
        entries = [json.loads(line) for line in read_lines(file) if line.strip()]
    rows = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"row {number} is {str(entry)[:60]}, not an object")
        if None in entry:
            raise ValueError(f"row {number} has more cells than there are columns: quote captions with commas")
        for column in ("file_name", caption_column):
            if entry.get(column) in (None, ""):
                raise ValueError(f"row {number} has no {column}, its columns are {', '.join(entry)}")
        if not isinstance(entry["file_name"], str):
            raise ValueError(f"the file_name of row {number} is {entry['file_name']}, not a path")
        rows.append((os.path.normpath(os.path.join(os.path.dirname(file), entry["file_name"])), entry[caption_column]))
    if rows and file.endswith(".csv") and all(re.fullmatch(r"[\d.eE+-]+", caption) for _, caption in rows):
        raise ValueError(f"the column {caption_column} holds numbers, not captions")
    return rows


def _text_file(image: str) -> str:
    return os.path.splitext(image)[0] + ".txt"


def _read_text(image: str) -> Row:
    return image, [line.strip() for line in read_lines(_text_file(image)) if line.strip()]
