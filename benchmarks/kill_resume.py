#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Kills a tiny run at random moments (SIGKILL, all its processes), resumes it, and compares its end with an uninterrupted run's.

    python benchmarks/kill.py [--kills 20] [--mode single] [--processes 1]

The run saves after every iteration and keeps two checkpoints, so that a good part of the kills falls into saving or removing one.
Moments are uniform over the uninterrupted run, from its first iteration to its end, the export among it. "Identical" is every
tensor of the last checkpoint, networks and optimizers, and every file of the exported pipeline. Exit code 1 unless all are.
"""

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

from modes import write_networks

from senseflow.training.checkpoints import INCOMPLETE, REPLACED, checkpoints, number_of


ITERATIONS = 30


class Tiny:
    """A tiny run; `folder` holds its networks and data."""

    def __init__(self, args, folder: Path):
        self.args, self.folder = args, folder

    def start(self, out: Path, *more: str) -> subprocess.Popen:
        args, folder = self.args, self.folder
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / "accelerate_configs" / f"{args.mode}.yaml"), "--mixed_precision", "no"]
        command += [
            "--num_processes",
            str(args.processes),
            "--main_process_port",
            "0",
            str(ROOT / "train_senseflow_flux.py"),
        ]
        command += [
            *("--pretrained_model_name_or_path", str(folder / "teacher"), "--dataset_json", str(folder / "data.json")),
            *(
                "--discriminator_backbone",
                str(folder / "dinov2"),
                "--discriminator_text_encoder",
                str(folder / "clip"),
            ),
            *("--resolution", "64", "--max_sequence_length", "16", "--train_batch_size", "1", "--report_to", "none"),
            *("--max_train_steps", str(ITERATIONS), "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"),
            *("--output_dir", str(out), *more),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, start_new_session=True, env=environment, **quiet)

    def measure(self, out: Path) -> tuple[float, float]:
        """Runs to the end; when the first checkpoint came, and when the run ended, in seconds."""
        start, first, process = time.monotonic(), None, self.start(out)
        while process.poll() is None:
            first = first or (time.monotonic() - start if checkpoints(str(out)) else None)
            time.sleep(0.02)
        assert process.returncode == 0, "the uninterrupted run failed"
        return first, time.monotonic() - start

    def killed_and_resumed(self, number: int, moment: float, reference: dict[str, str]) -> bool:
        """Prints one row of the table; whether the end is the reference's."""
        out = self.folder / f"killed-{number}"
        process = self.start(out)
        time.sleep(moment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = checkpoints(str(out)) if out.exists() else []
        half = [p.name for suffix in (INCOMPLETE, REPLACED) for p in out.glob(f"*{suffix}")]
        resume = ["--resume_from_checkpoint", "latest"] if left else []
        code = self.start(out, *resume).wait()
        same = code == 0 and digests(out) == reference
        last = number_of(left[-1]) if left else "none"
        verdict = "identical" if same else f"DIFFERENT (exit code {code})"
        print(f"| {number} | {moment:.2f} | {last} | {', '.join(half) or '-'} | {verdict} |", flush=True)
        return same


def digests(out: Path) -> dict[str, str]:
    """A hash of every file of the pipeline and of the last checkpoint, but for what names the folder or the resume."""
    last = checkpoints(str(out))[-1]
    files = [path for path in [*out.glob("*/*"), *last.rglob("*")] if path.is_file()]
    chosen = [
        path for path in files if path.name != "state.json" and (last in path.parents or "checkpoint" not in str(path))
    ]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in chosen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mode", default="single", help="a file of accelerate_configs/")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_networks(Path(folder), "tiny")
        tiny = Tiny(args, Path(folder))
        first, end = tiny.measure(tiny.folder / "whole")
        reference = digests(tiny.folder / "whole")
        print(
            f"uninterrupted: first checkpoint after {first:.1f} s, end after {end:.1f} s, {len(reference)} files compared"
        )
        print(
            "| kill | after s | last complete checkpoint | found half-way | end of the resumed run |\n|---|---|---|---|---|",
            flush=True,
        )
        draw = random.Random(args.seed)
        moments = [draw.uniform(first - (end - first) / ITERATIONS, end) for _ in range(args.kills)]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // args.processes)) as pool:
            same = list(pool.map(lambda job: tiny.killed_and_resumed(*job, reference), enumerate(moments, 1)))
    print(f"{sum(same)} of {len(same)} identical")
    sys.exit(sum(same) < len(same))


if __name__ == "__main__":
    main()
