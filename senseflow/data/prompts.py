# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read text files by line, and files of prompts. Imports no heavy library."""

from pathlib import Path
from typing import Union

from senseflow.errors import UserError


def read_lines(path: Union[str, Path], errors: str = "strict") -> list[str]:
    r"""Read the lines of a UTF-8 text file, which end at \n or \r\n. OSError or ValueError if it cannot be read.

    Not with `splitlines`, which splits at characters that may stand inside a caption, such as U+2028.
    """
    text = Path(path).read_bytes().decode("utf-8-sig", errors)
    return [line.removesuffix("\r") for line in text.split("\n")]


def read_prompts_file(path: str) -> list[str]:
    """Read the lines of --prompts_file, stripped; a blank line is "". UserError (2) without UTF-8 text."""
    try:
        prompts = [line.strip() for line in read_lines(path)]
        if not any(prompts):
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({error}); give a UTF-8 text file, one prompt a line"
        raise UserError(f"--prompts_file {path}: {problem}", 2) from error
    return prompts
