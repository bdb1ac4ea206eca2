#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Kill a tiny run at random moments, resume it, and compare the result with that of an uninterrupted run.

    python benchmarks/kill_resume.py [--kills 20] [--mode single] [--processes 1]

SIGKILL ends the launcher and all processes at a moment drawn uniformly between the first iteration of the
uninterrupted run and its end, the export included. The run saves after every iteration and keeps two checkpoints, so
that many kills interrupt the saving or the removal of one. "Identical" means every tensor of the last checkpoint,
networks and optimizers, and every file of the exported pipeline. The exit code is 1 unless all runs are identical.
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

from modes import ROOT, training_command, write_networks

from senseflow.training.checkpoints import INCOMPLETE, REPLACED, iteration_of, list_checkpoints


ITERATIONS = 30


def start(args, folder: Path, output_dir: Path, *flags: str) -> subprocess.Popen:
    """Start a tiny run with the networks and data in `folder`."""
    flags = ["--train_batch_size", 1, "--max_train_steps", ITERATIONS, "--checkpointing_steps", 1, *flags]
    flags += ["--checkpoints_total_limit", 2, "--output_dir", output_dir]
    script = ROOT / "train_senseflow_flux.py"
    command = training_command(folder, args.mode, args.processes, "no", script, *flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, start_new_session=True, env=environment, **quiet)


def run_uninterrupted(args, folder: Path, output_dir: Path) -> tuple[float, float]:
    """Run to the end; return the seconds until the first checkpoint and until the end."""
    since, first, process = time.monotonic(), None, start(args, folder, output_dir)
    while process.poll() is None:
        first = first or (time.monotonic() - since if list_checkpoints(str(output_dir)) else None)
        time.sleep(0.02)
    assert process.returncode == 0, "the uninterrupted run failed"
    return first, time.monotonic() - since


def kill_and_resume(args, folder: Path, number: int, seconds: float, reference: dict[str, str]) -> bool:
    """Kill a run after `seconds`, resume it, print a row of the table; return whether the result is the reference."""
    output_dir = folder / f"killed-{number}"
    process = start(args, folder, output_dir)
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    complete = list_checkpoints(str(output_dir)) if output_dir.exists() else []
    partial = [path.name for suffix in (INCOMPLETE, REPLACED) for path in output_dir.glob(f"*{suffix}")]
    resume = ["--resume_from_checkpoint", "latest"] if complete else []
    code = start(args, folder, output_dir, *resume).wait()
    identical = code == 0 and digests(output_dir) == reference
    last = iteration_of(complete[-1]) if complete else "none"
    verdict = "identical" if identical else f"DIFFERENT (exit code {code})"
    print(f"| {number} | {seconds:.2f} | {last} | {', '.join(partial) or '-'} | {verdict} |", flush=True)
    return identical


def digests(output_dir: Path) -> dict[str, str]:
    """Hash every file of the exported pipeline and of the last checkpoint, except state.json, which names the run."""
    last = list_checkpoints(str(output_dir))[-1]
    pipeline = [path for path in output_dir.glob("*/*") if "checkpoint" not in str(path)]
    files = [path for path in [*pipeline, *last.rglob("*")] if path.is_file() and path.name != "state.json"]
    return {str(path.relative_to(output_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--mode", default="single", help="name of a file of accelerate_configs/")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_networks(folder)
        first, end = run_uninterrupted(args, folder, folder / "uninterrupted")
        reference = digests(folder / "uninterrupted")
        print(f"uninterrupted: first checkpoint after {first:.1f} s, end after {end:.1f} s")
        print(f"{len(reference)} files are compared")
        print("| kill | after s | last complete checkpoint | partial folders | result of the resumed run |")
        print("|---|---|---|---|---|", flush=True)
        rng = random.Random(args.seed)
        moments = [rng.uniform(first - (end - first) / ITERATIONS, end) for _ in range(args.kills)]
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // args.processes)) as pool:
            kills = pool.map(lambda kill: kill_and_resume(args, folder, *kill, reference), enumerate(moments, 1))
            identical = list(kills)
    print(f"{sum(identical)} of {len(identical)} identical")
    sys.exit(sum(identical) < len(identical))


if __name__ == "__main__":
    main()
