# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Read files of prompts, one a line. Imports no heavy library."""

from pathlib import Path

from senseflow.errors import UserError


def read_prompts_file(path: str) -> list[str]:
    """Read the lines of --prompts_file, stripped; a blank line is "". UserError (2) without UTF-8 text."""
    try:
        # Not splitlines(), which also splits at characters that may stand inside a prompt.
        prompts = [line.strip() for line in Path(path).read_text("utf-8-sig").split("\n")]
        if not any(prompts):
            raise ValueError("it is empty")
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({error}); give a UTF-8 text file, one prompt a line"
        raise UserError(f"--prompts_file {path}: {problem}", 2) from error
    return prompts
