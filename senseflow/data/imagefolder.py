# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Folders of images: captions stand in metadata files, as datasets' imagefolder has them, or in a .txt beside each image.

`datasets` is not asked: it takes file and folder names with train, test, dev or val in them for splits and drops what matches
none, its globs cannot look into folders called `[a]` or `a::b`, and it reads a caption `None` in a CSV file as none.
"""

import csv
import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import pyarrow.parquet as pq
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from huggingface_hub import DatasetCard


IMAGE_SUFFIXES = frozenset(ImageFolder.EXTENSIONS)
METADATA = tuple(ImageFolder.METADATA_FILENAMES)
TABLES = (
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".json",
    ".jsonl",
    ".tar",
    ".lance",
)  # what else datasets makes rows of


class FolderError(ValueError):
    """What is wrong with a folder: a predicate, and the fix.

    Attributes:
        of_captions: it is the caption column that is wrong.
    """

    def __init__(self, problem: str, fix: str, of_captions: bool = False):
        super().__init__(problem)
        self.fix, self.of_captions = fix, of_captions


@dataclass
class FolderRows:
    """The rows of a folder, in the order of their files.

    Attributes:
        captions: what was written: strings, lists, None or anything else; not judged here.
        images: paths; empty where no image is read.
        places: names of each row for messages.
        left_aside: what of the folder is not used, for the log; "" if everything is.
    """

    captions: list[Any] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    places: list[tuple[int, str, str]] = field(default_factory=list)
    left_aside: str = ""

    def place(self, row: int) -> str:
        number, name, file = self.places[row]
        return f"row {number} ({name}) of {file}" if name != file else file


def files_below(folder: str) -> list[str]:
    """Paths of all files, sorted; neither hidden ones nor folders like __MACOSX, which datasets passes over too."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        found += [os.path.join(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def is_image(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES


def says_its_splits(folder: str) -> bool:
    """Whether a README.md says which of a folder's files are which split, for datasets."""
    card = os.path.join(folder, "README.md")
    return os.path.isfile(card) and bool(
        DatasetCard.load(card, ignore_metadata_errors=True).data.to_dict().get("configs")
    )


def holds_images(folder: str) -> bool:
    """Whether datasets.load_dataset would take a folder for one of images: of these it has more than of tables."""
    files = files_below(folder)
    kinds = Counter(os.path.splitext(path)[1].lower() for path in files if os.path.basename(path) not in METADATA)
    images = sum(kinds[kind] for kind in IMAGE_SUFFIXES)
    return images > 0 and images > max(kinds[kind] for kind in TABLES)


def read_folder(
    folder: str, caption_column: str, image_column: Optional[str], limit: Optional[int] = None
) -> FolderRows:
    """The rows of a folder: those of its metadata files or, where it has none, its images.

    Where the folder has no metadata file itself and a folder called train, only that one is read: datasets' layout for splits.

    Args:
        image_column: `image` for the metadata's `file_name`, `x` for its `x_file_name`; None: no image is read.
        limit: use the first so many rows.
    Raises:
        FolderError: no image, no caption file, metadata that cannot be read, an image that is not there.
    """
    folder, notes = os.path.normpath(folder), []
    files, inside = files_below(folder), os.path.join(folder, "train", "")
    if os.path.isdir(inside) and not any(os.path.isfile(os.path.join(folder, name)) for name in METADATA):
        others = [path for path in files if is_image(path) and not path.startswith(inside)]
        files = [path for path in files if path.startswith(inside)]
        if others:
            notes.append(
                f"its folder train is the split used; images elsewhere are left aside: {len(others)}, one is {others[0]}"
            )
    images = [path for path in files if is_image(path)]
    metadata = [path for path in files if os.path.basename(path) in METADATA]
    archives = [path for path in files if path.lower().endswith((".zip", ".tar", ".gz"))]
    if archives:
        notes.append(f"archives are left aside: {len(archives)}, one is {archives[0]}; unpack them to use them")
    if not images:
        raise FolderError(
            f"has no images{''.join(f'; {note}' for note in notes)}", "give a folder of images with captions"
        )
    columns = (caption_column, image_column)
    rows = _read_metadata(metadata, *columns) if metadata else _read_texts(images, *columns)
    if not rows.captions:
        raise FolderError("has no rows: its metadata files are empty", "write a row for each image")
    unlisted = sorted(set(images) - set(rows.images)) if image_column is not None else []
    if unlisted:
        notes.append(f"images that no metadata file lists are left aside: {len(unlisted)}, one is {unlisted[0]}")
    rows.captions, rows.images = rows.captions[:limit], rows.images[:limit]
    known = set(files)
    missing = [row for row, path in enumerate(rows.images) if path not in known and not os.path.isfile(path)]
    if missing:
        problem = (
            f"{len(missing)} of {len(rows.images)} images are missing, the first is that of {rows.place(missing[0])}"
        )
        raise FolderError(problem, "give their paths relative to the metadata file, and drop what is gone")
    rows.left_aside = "; ".join(notes)
    return rows


def _read_metadata(files: list[str], caption_column: str, image_column: Optional[str]) -> FolderRows:
    rows = FolderRows()
    for file in files:
        folder = os.path.dirname(file)
        copy_sharing_base = next((other for other in files if other < file and os.path.dirname(other) == folder), None)
        if copy_sharing_base:
            raise FolderError(
                f"has two metadata files in one folder, {copy_sharing_base} and {file}", "keep one of them"
            )
        entries = _entries(file, caption_column)
        columns = {name: None for entry in entries for name in entry}
        shown = ", ".join(_shown(name) for name in columns)
        if entries and caption_column not in columns:
            problem = f"no column has that name in {file}"
            raise FolderError(problem, f"it has the columns: {shown}", of_captions=True)
        key = None
        if image_column is not None and entries:
            key = f"{image_column}_file_name" if f"{image_column}_file_name" in columns else "file_name"
            if key not in columns or (key == "file_name" and image_column != "image"):
                problem = f"{file} has no column file_name for the images of --image_column {image_column}"
                raise FolderError(problem, f"it has the columns: {shown}")
        for number, entry in enumerate(entries):
            name = entry.get(key or "file_name")
            if key is not None:
                if not isinstance(name, str) or not name:
                    raise FolderError(f"{key} is empty in row {number} of {file}", "name each row's image")
                path = os.path.normpath(name)
                if os.path.isabs(path) or path.split(os.sep)[0] == ".." or "://" in name:
                    problem = f"{key} {name} in row {number} of {file} leads out of the file's folder"
                    raise FolderError(problem, "give paths relative to the metadata file")
                rows.images.append(os.path.join(folder, path))
            rows.captions.append(entry.get(caption_column))
            rows.places.append((number, str(name), file))
    return rows


def _shown(column: str) -> str:
    return "image" if column == "file_name" else column.removesuffix("_file_name")


def _is_number(cell: Optional[str]) -> bool:
    try:
        return math.isfinite(float(cell or ""))  # "nan" is a word that somebody may have written
    except ValueError:
        return False


def _entries(file: str, caption_column: str) -> list[dict[str, Any]]:
    """The rows of a metadata file. Cells of a CSV file are text, but for captions that are numbers all: a wrong column."""
    try:
        if file.endswith(".parquet"):
            return pq.read_table(file).to_pylist()
        if file.endswith(".jsonl"):
            with open(file, encoding="utf-8-sig") as lines:
                entries = [json.loads(line) for line in lines if line.strip()]
            if not all(isinstance(entry, dict) for entry in entries):
                raise ValueError("a line is no object")
            return entries
        with open(file, encoding="utf-8-sig", newline="") as lines:
            entries = list(csv.DictReader(lines, strict=True))
        uneven = [number for number, entry in enumerate(entries) if None in entry or None in entry.values()]
        if uneven:
            raise ValueError(f"row {uneven[0]} has not as many cells as there are columns")
        if not entries or caption_column not in entries[0]:
            return entries
        for entry in entries:
            entry[caption_column] = entry[caption_column] or None  # an empty cell is all that CSV has for none
        if all(_is_number(entry[caption_column]) for entry in entries):
            entries = [entry | {caption_column: float(entry[caption_column])} for entry in entries]
        return entries
    except (OSError, ValueError, csv.Error) as error:  # json's and pyarrow's are ValueErrors
        raise FolderError(f"{file} cannot be read ({' '.join(str(error).split())})", "write it again") from error


def _read_texts(images: list[str], caption_column: str, image_column: Optional[str]) -> FolderRows:
    texts = {path: os.path.splitext(path)[0] + ".txt" for path in images}
    without = [path for path, text in texts.items() if not os.path.isfile(text)]
    if len(without) == len(images):
        fix = "write a metadata.jsonl or metadata.csv (file_name, text), or a .txt beside each image"
        raise FolderError("has no captions", fix)
    if without:
        problem = f"{len(without)} of {len(images)} images have no .txt with a caption beside them, the first is {without[0]}"
        raise FolderError(problem, "caption them, or take them out of the folder")
    if caption_column != "text" or image_column not in ("image", None):
        wanted = f"--caption_column {caption_column}" if caption_column != "text" else f"--image_column {image_column}"
        raise FolderError(
            f"has a .txt beside each image and no metadata file, where {wanted} could stand", "leave it out"
        )
    rows = FolderRows()
    for text in texts.values():
        try:
            lines = [line.strip() for line in Path(text).read_text("utf-8-sig").splitlines()]
        except (OSError, ValueError) as error:
            raise FolderError(f"{text} cannot be read ({error})", "write the caption as UTF-8 text") from error
        captions = [line for line in lines if line]
        rows.captions.append(captions if len(captions) > 1 else captions[0] if captions else None)
        rows.places.append((0, text, text))
    rows.images = images if image_column is not None else []
    return rows
