#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Measure how long processes take, and how much memory, from their imports to the first batch of a large data set.

    python benchmarks/large_data.py

The data sets are a JSON file of a million rows and ten Parquet files of ten million captions. Of each, two processes
start at the same time without a cache, and one later. Memory is what it is above the imports, at most: private to the
process, and pages of mapped files, which all processes share and the system takes back when it needs memory.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
WORDS = "a red fox jumps over the lazy dog in golden light with a soft focus on mountain and river at night".split()


def write_json(folder: Path, num_rows: int) -> str:
    rng = random.Random(0)
    prompts = [" ".join(rng.choices(WORDS, k=rng.randint(10, 44))) for _ in range(num_rows)]
    names = [f"{row:07d}" for row in range(num_rows)]
    content = {"keys": names, "image_paths": [f"images/{name[:4]}/{name}.jpg" for name in names], "prompts": prompts}
    (folder / "data.json").write_text(json.dumps(content))
    return str(folder / "data.json")


def write_parquet(folder: Path, num_rows: int) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(0)
    (folder / "parquet").mkdir()
    for number in range(10):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(10, 34))) for _ in range(num_rows // 10)]
        pq.write_table(pa.table({"text": texts}), folder / "parquet" / f"train-{number:05d}-of-00010.parquet")
    return str(folder / "parquet")


def memory(process: str) -> tuple[float, float]:
    """Return (private, file-backed) resident memory in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return tuple(int(found) / 1024 for found in re.findall(r"Rss(?:Anon|File):\s+(\d+)", status))


def start(flag: str, path: str) -> None:
    """What a training script does with its data before it loads a network."""
    import train_senseflow_flux as script
    from senseflow.data.loader import make_dataloader
    from senseflow.data.sources import load_rows

    arguments = "--pretrained_model_name_or_path x --output_dir y --gan_weight 0 --backward_simulation_prob 1".split()
    args = script.parse_args([*arguments, f"--{flag}", path])
    print(json.dumps(memory("self")), flush=True)
    begin, cpu = time.time(), time.process_time()
    rows = load_rows(args)
    next(iter(make_dataloader(args, rows, 0, 1, 0, 0, lambda iteration: False)))
    print(json.dumps([time.time() - begin, time.process_time() - cpu, len(rows)]), flush=True)


def measure(num_processes: int, flag: str, path: str, cache: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, __file__, "--start", flag, path]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(num_processes)]
    imports = [json.loads(process.stdout.readline()) for process in processes]
    peaks = [[0.0, 0.0] for _ in processes]
    while any(process.poll() is None for process in processes):
        for process, peak in zip(processes, peaks):
            if process.poll() is None:
                peak[:] = map(max, zip(peak, memory(process.pid) or peak))
        time.sleep(0.01)
    for process, before, peak in zip(processes, imports, peaks):
        seconds, cpu, rows = json.loads(process.stdout.readline())
        private, mapped = (high - low for high, low in zip(peak, before))
        print(f"| `--{flag}`, {rows:,} rows | {seconds:.1f} | {cpu:.1f} | {private:.0f} | {mapped:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="Rows of the JSON file; Parquet has ten times more."
    )
    parser.add_argument("--start", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start:
        return start(*args.start)
    print("| data | seconds | of CPU | private MiB | mapped MiB |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        sources = {
            "dataset_json": write_json(path, args.rows),
            "dataset_name": write_parquet(path, 10 * args.rows),
        }
        for flag, source in sources.items():
            for num_processes in (2, 1):
                measure(num_processes, flag, source, path / "cache")


if __name__ == "__main__":
    main()
