# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Sets of images and their prompts, as evaluate.py measures them: infer.py's folders, other folders, captions as for training."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from PIL import Image

from senseflow.errors import UserError


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass
class ImageSet:
    """The images of a folder or a JSON, in order.

    Attributes:
        name: as it was given.
        files: their paths.
        prompts: theirs; None where nothing says them.
        cache: where what networks say of them is kept.
    """

    name: str
    files: list[Path]
    prompts: Optional[list[str]]
    cache: Path

    @property
    def groups(self) -> list[int]:
        """Of each image the number of its prompt; images without prompts are each by themselves."""
        if self.prompts is None:
            return list(range(len(self.files)))
        first: dict[str, int] = {}
        return [first.setdefault(prompt, len(first)) for prompt in self.prompts]


def find_images(flag: str, path: str, prompts_file: Optional[str] = None) -> ImageSet:
    """UserError (2): nothing there, no images, images that cannot be opened, or prompts missing for some."""
    place = Path(path)
    if place.is_file():
        return _of_json(flag, place)
    if not place.is_dir():
        raise UserError(f"{flag} {path}: is no folder; give one of images, or a JSON of images and captions", 2)
    files = sorted(file for file in place.iterdir() if file.suffix.lower() in SUFFIXES and file.name != "grid.png")
    if not files:
        raise UserError(f"{flag} {path}: holds no image ({', '.join(SUFFIXES)}); draw some with infer.py", 2)
    check_images(flag, path, files)
    prompts, records = None, place / "metadata.jsonl"
    if prompts_file:
        prompts = _numbered(prompts_file, files)
    elif records.exists():
        said = {}
        for line in records.read_text(encoding="utf-8").splitlines():
            try:
                said |= {(record := json.loads(line))["file_name"]: record["prompt"]}
            except (ValueError, TypeError, KeyError):
                continue  # cut by a kill: its image is without a prompt
        missing = [file.name for file in files if file.name not in said]
        if missing:
            problem = f"metadata.jsonl has no prompt of {len(missing)} images, one is {missing[0]}"
            raise UserError(f"{flag} {path}: {problem}; run infer.py again, or give --prompts_file", 2)
        prompts = [said[file.name] for file in files]
    return ImageSet(path, files, prompts, place / ".features")


def _of_json(flag: str, place: Path) -> ImageSet:
    try:
        parsed = json.loads(place.read_text(encoding="utf-8-sig"))
        files, prompts = [place.parent / name for name in parsed["image_paths"]], parsed["prompts"]
        prompts = [prompt if isinstance(prompt, str) else prompt[0] for prompt in prompts]
        if len(files) != len(prompts) or not files:
            raise ValueError(f"{len(files)} image_paths, {len(prompts)} prompts")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        wanted = 'give {"image_paths": [...], "prompts": [...]}, as for training'
        raise UserError(f"{flag} {place}: no images and captions can be read ({error}); {wanted}", 2) from error
    check_images(flag, str(place), files)
    return ImageSet(str(place), files, prompts, place.parent / ".features")


def _numbered(path: str, files: list[Path]) -> list[str]:
    """The line of each image by the number in its name."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--prompts_file {path}: cannot be read ({error}); give a UTF-8 text file, one prompt a line", 2
        ) from error
    prompts = []
    for file in files:
        line = int(file.stem) if file.stem.isdecimal() else -1
        if not (0 <= line < len(lines) and lines[line].strip()):
            raise UserError(
                f"--prompts_file {path}: no line is that of {file.name}; 0007.png's would be the eighth", 2
            )
        prompts.append(lines[line].strip())
    return prompts


def check_images(flag: str, path: str, files: list[Path]) -> None:
    """UserError (2) where some are no images; their heads are read."""
    broken = []
    for file in files:
        try:
            with Image.open(file):
                pass
        except Exception:  # each format has its own
            broken.append(file.name)
    if broken:
        raise UserError(
            f"{flag} {path}: {len(broken)} images cannot be read, one is {broken[0]}; draw or copy them again", 2
        )
