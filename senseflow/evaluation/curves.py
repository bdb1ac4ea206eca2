# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Find the checkpoints of a run, generate images with each of them, and plot their metrics against iterations."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from senseflow.errors import UserError


INFER = Path(__file__).parents[2] / "infer.py"


def find_checkpoints(run: Path) -> dict[int, Path]:
    """Return {iteration: folder} of a run's checkpoints, in order.

    Raises:
        UserError: exit code 2; there are none.
    """
    folders = [file.parent for file in run.glob("checkpoint-*/senseflow.json")]
    checkpoints = {int(f.name[11:]): f for f in folders if re.fullmatch(r"checkpoint-\d+", f.name)}
    if not checkpoints:
        raise UserError(f"--checkpoints {run}: has no checkpoint-N; give the --output_dir of a training run", 2)
    return dict(sorted(checkpoints.items()))


def generate_images(checkpoint: Path, output_dir: Path, flags: list) -> None:
    """Run infer.py, which generates the images that are missing in `output_dir`.

    Raises:
        UserError: exit code 1; infer.py failed, after it printed why.
    """
    command = [sys.executable, INFER, "--model", checkpoint, "--output_dir", output_dir, *flags]
    code = subprocess.run([str(word) for word in command]).returncode
    if code:
        problem = f"infer.py ended with exit code {code} for {checkpoint.name}; see its message above"
        raise UserError(f"--checkpoints {checkpoint.parent}: {problem}")


def plot_curves(path: Path, titles: dict[str, str], results: dict[int, dict[str, dict[str, Any]]]) -> None:
    """Write a PNG with one plot per metric: its value and standard error against iterations.

    Args:
        titles: {metric: title}.
        results: {iteration: {metric: result}}.
    """
    from matplotlib.figure import Figure

    iterations, metrics = list(results), list(next(iter(results.values())))
    figure = Figure(figsize=(4 * len(metrics), 3), layout="constrained")
    for metric, axes in zip(metrics, figure.subplots(1, len(metrics), squeeze=False)[0]):
        values = [result[metric]["value"] for result in results.values()]
        errors = [result[metric]["standard_error"] or 0 for result in results.values()]
        axes.errorbar(iterations, values, errors, marker="o", capsize=3)
        axes.set(title=titles[metric], xlabel="iterations")
    figure.savefig(path, format="png", dpi=120)
