# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The kept checkpoints of a run: drawn with infer.py one after the other, and what was measured of them as curves."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from senseflow.errors import UserError


def find_checkpoints(run: Path) -> dict[int, Path]:
    """{iteration: folder}, in order. UserError (2) where there is none."""
    found = {}
    for folder in run.glob("checkpoint-*"):
        name = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if name and (folder / "senseflow.json").is_file():
            found[int(name[1])] = folder
    if not found:
        raise UserError(f"--checkpoints {run}: holds no checkpoint-N; give the --output_dir of a training run", 2)
    return dict(sorted(found.items()))


def draw(checkpoint: Path, prompts_file: str, images: Path, batch_size: int, device: str) -> None:
    """Has infer.py draw what is missing. UserError (1) where it ends with an error, which it has said."""
    command = [
        sys.executable,
        Path(__file__).parents[2] / "infer.py",
        "--model",
        checkpoint,
        "--prompts_file",
        prompts_file,
    ]
    command += ["--output_dir", images, "--batch_size", batch_size, "--device", device]
    code = subprocess.run([str(word) for word in command]).returncode
    if code:
        problem = f"infer.py ended with {code} at {checkpoint.name}; see its message above"
        raise UserError(f"--checkpoints {checkpoint.parent}: {problem}")


def plot(path: Path, columns: dict[str, str], found: dict[int, dict[str, dict[str, Any]]]) -> None:
    """A panel for each metric: its value, and its standard error as a band, against iterations.

    Args:
        columns: {metric: how it is called}.
        found: {iteration: {metric: result}}.
    """
    from matplotlib.figure import Figure

    metrics = list(next(iter(found.values())))
    figure = Figure(figsize=(4 * len(metrics), 3), layout="constrained")
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0]):
        values = [result[metric]["value"] for result in found.values()]
        errors = [result[metric]["standard_error"] or 0 for result in found.values()]
        axes.plot(list(found), values, marker="o")
        band = ([value - sign * error for value, error in zip(values, errors)] for sign in (1, -1))
        axes.fill_between(list(found), *band, alpha=0.2)
        axes.set_title(columns[metric])
        axes.set_xlabel("iterations")
    figure.savefig(path, format="png", dpi=120)
