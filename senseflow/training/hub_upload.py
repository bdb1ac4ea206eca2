# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Upload the export to the Hub, as the diffusers examples do."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from accelerate.logging import get_logger
from huggingface_hub import create_repo, upload_folder

from senseflow.errors import UserError
from senseflow.models.hub import UNREADABLE


logger = get_logger(__name__)


def create_hub_repo(args) -> None:
    """Create the repository of --push_to_hub, unless it exists, and set `args.hub_model_id` to its whole id.

    Raises:
        UserError: exit code 1; the Hub cannot be reached, or refuses.
    """
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    try:
        args.hub_model_id = create_repo(name, exist_ok=True).repo_id
    except UNREADABLE as error:
        fix = "check --hub_model_id, the token's rights and the connection"
        raise UserError(f"--push_to_hub: {name} cannot be created ({first_line(error)}); {fix}") from error


def upload_export(args, entries: Sequence[str]) -> None:
    """Upload the export and nothing else of --output_dir. The main process calls it.

    Args:
        entries: names of the export's files and folders in --output_dir.
    Raises:
        UserError: exit code 1; the upload fails.
    """
    folder = Path(args.output_dir)
    patterns = [f"{name}/*" if (folder / name).is_dir() else name for name in entries]
    try:
        upload_folder(
            repo_id=args.hub_model_id,
            folder_path=folder,
            commit_message="End of training",
            allow_patterns=patterns,
        )
    except UNREADABLE as error:
        command = ["hf", "upload", args.hub_model_id, args.output_dir, ".", "--include", *patterns]
        fix = f"the export in {args.output_dir} is complete; upload it with {shlex.join(command)}"
        raise UserError(f"--push_to_hub: the upload has failed ({first_line(error)}); {fix}") from error
    logger.info(f"uploaded the export to {args.hub_model_id}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
