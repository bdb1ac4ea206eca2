# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read sets of images and their prompts: folders, of infer.py or others, and captions JSONs as for training."""

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Hashable, Optional, Sequence

from PIL import Image

from senseflow.data.images import count_by_ending, split_images
from senseflow.data.json_file import read_captions_json
from senseflow.data.prompts import read_lines, read_prompts_file
from senseflow.data.rows import parse_captions
from senseflow.errors import UserError


logger = logging.getLogger(__name__)


@dataclass
class ImageSet:
    """The images of a folder or a captions JSON, in order.

    Attributes:
        name: the path as the user gave it.
        files: their paths.
        sizes: their widths and heights in pixels.
        prompts: their prompts; None if there are none.
        cache: the folder for their features.
    """

    name: str
    files: list[Path]
    sizes: list[tuple[int, int]]
    prompts: Optional[list[str]]
    cache: Path

    @property
    def groups(self) -> Sequence[Hashable]:
        """The prompt of each image; without prompts, each image is a group of its own."""
        return self.prompts or range(len(self.files))


def read_image_set(flag: str, path: str, prompts_file: Optional[str] = None) -> ImageSet:
    """Read the images of a folder or a captions JSON; of several prompts, the first. UserError (2) if one is bad."""
    location = Path(path)
    if location.is_file():
        if prompts_file:
            problem = f"{flag} {path} is a JSON with captions of its own"
            raise UserError(f"--prompts_file {prompts_file}: {problem}; give one of both", 2)
        captions, images = read_captions_json(flag, path)
        files, prompts = list(map(Path, images)), []
        for row, cell in enumerate(captions):
            try:
                prompts.append(parse_captions(cell)[0])
            except ValueError as error:
                raise UserError(f"{flag} {path}: row {row} {error}; caption every row with text", 2) from error
        return ImageSet(path, files, read_sizes(flag, path, files), prompts, location.parent / ".features")
    if not location.is_dir():
        raise UserError(f"{flag} {path}: no such folder; give a folder of images, or a JSON of images and captions", 2)
    entries = [entry for entry in location.iterdir() if entry.name not in ("grid.png", "metadata.jsonl")]
    files, others = split_images(entry for entry in entries if not entry.is_dir())
    folders = sum(entry.is_dir() and not entry.name.startswith(".") for entry in entries)
    counts = [count_by_ending(others), f"{folders} folder{'s' * (folders > 1)}" * bool(folders)]
    unused = ", ".join(filter(None, counts))
    if not files:
        problem = "has no image that Pillow opens" + (f", but {unused}" if unused else "")
        raise UserError(f"{flag} {path}: {problem}; generate some with infer.py", 2)
    logger.info("%s %s: %d images%s", flag, path, len(files), f"; not used: {unused}" if unused else "")
    prompts = None
    if prompts_file:
        prompts = read_numbered_prompts(prompts_file, files)
    elif (location / "metadata.jsonl").exists():
        prompts = read_metadata(flag, location, files)
    return ImageSet(path, files, read_sizes(flag, path, files), prompts, location / ".features")


def read_metadata(flag: str, folder: Path, files: list[Path]) -> list[str]:
    """Return the prompts of images from infer.py's metadata.jsonl."""
    try:
        records = [json.loads(line) for line in read_lines(folder / "metadata.jsonl") if line]
        prompts = {record["file_name"]: parse_captions(record["prompt"])[0] for record in records}
        return [prompts[file.name] for file in files]
    except (ValueError, TypeError, KeyError) as error:  # a killed run may leave an incomplete line
        problem = f"metadata.jsonl lacks the prompt of an image ({error})"
        raise UserError(f"{flag} {folder}: {problem}; run infer.py again, or give --prompts_file", 2) from error


def read_numbered_prompts(path: str, files: list[Path]) -> list[str]:
    """Return the prompts of images: the first number in an image's name is the index of its line, from 0."""
    prompts = {index: line for index, line in enumerate(read_prompts_file(path)) if line}
    matches = [re.fullmatch(r"([0-9]+)(_[0-9]+)?", file.stem) for file in files]  # 0007_1: its second image
    numbers = [int(match[1]) if match else -1 for match in matches]
    for file, number in zip(files, numbers):
        if number not in prompts:
            raise UserError(f"--prompts_file {path}: no prompt for {file.name}; that of 0007.png is on line 8", 2)
    return [prompts[number] for number in numbers]


def read_sizes(flag: str, path: str, files: list[Path]) -> list[tuple[int, int]]:
    """Return the width and height of each image, from its file's header."""
    sizes, broken = [], []
    for file in files:
        try:
            with Image.open(file) as image:
                sizes.append(image.size)
        except Exception:  # each format raises errors of its own
            broken.append(file.name)
    if broken:
        problem = f"{len(broken)} images cannot be read, such as {broken[0]}"
        raise UserError(f"{flag} {path}: {problem}; generate or copy them again", 2)
    return sizes
