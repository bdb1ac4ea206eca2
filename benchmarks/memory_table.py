#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""What `--dry_run` says of all teachers at full size: the README's table of memory, from configurations alone.

    python benchmarks/memory_table.py                             # all; about a minute a row and core
    python benchmarks/memory_table.py --teachers sdxl --rows full

1024 px, an image per process, `--mixed_precision bf16 --gradient_checkpointing --offload_text_encoders`, everything else as the
scripts have it. What has been traced is kept in benchmarks/out/memory.json; delete there what should be traced again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests")]

import full_size
from gpu import launched_under, write_data

from senseflow.memory.report import CARDS, USABLE


OUT = ROOT / "benchmarks" / "out" / "memory.json"
NAMES = {"sdxl": "SDXL", "sd35-medium": "SD 3.5 Medium", "sd35-large": "SD 3.5 Large", "flux": "FLUX.1-dev"}
SMALL = "DINOv2 small"
# {row: (configuration of accelerate_configs/, processes, flags)}
ROWS = {
    "full": ("single", 1, []),
    "8-bit": ("single", 1, ["--use_8bit_adam"]),
    "fsdp2 on 8": ("fsdp2", 8, []),
    "rank": ("single", 1, ["--rank", "64"]),
    "rank, fsdp2 on 8": ("fsdp2", 8, ["--rank", "64"]),
    f"rank, 8-bit, {SMALL}": ("single", 1, ["--rank", "64", "--use_8bit_adam"]),
    "rank, 8-bit, 4bit base": ("single", 1, ["--rank", "64", "--use_8bit_adam", "--base_quantization", "4bit"]),
}
COMMON = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--offload_text_encoders", "--resolution", "1024"]


def trace(teacher: str, row: str, folder: Path) -> str:
    """What the script prints with --dry_run."""
    configuration, processes, more = ROWS[row]
    full_size.write(teacher, folder / teacher)
    full_size.write("discriminator-small" if SMALL in row else "discriminator", folder / "discriminator")
    script = ROOT / f"train_senseflow_{full_size.TEACHERS[teacher][2]}.py"
    command = [
        sys.executable,
        script,
        "--pretrained_model_name_or_path",
        folder / teacher,
        "--output_dir",
        folder / "out",
    ]
    command += ["--dataset_json", write_data(folder / "data", 64), "--report_to", "none", "--dry_run", *COMMON, *more]
    command += ["--discriminator_backbone", folder / "discriminator" / "dinov2"]
    command += ["--discriminator_text_encoder", folder / "discriminator" / "clip"]
    with launched_under(configuration):
        environment = {**os.environ, "WORLD_SIZE": str(processes), "RANK": "0"}
    result = subprocess.run([str(part) for part in command], env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{teacher}, {row}: ended with {result.returncode}")
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    OUT.parent.mkdir(exist_ok=True)
    said = json.loads(OUT.read_text()) if OUT.exists() else {}
    for teacher in args.teachers:
        for row in args.rows:
            if f"{teacher}, {row}" not in said:
                with tempfile.TemporaryDirectory() as folder:
                    said[f"{teacher}, {row}"] = trace(teacher, row, Path(folder))
                OUT.write_text(json.dumps(said, indent=1))
    print("| | " + " | ".join(args.rows) + " |\n" + "|---" * (len(args.rows) + 1) + "|")
    for teacher in args.teachers:
        cells = []
        for row in args.rows:
            peak = float(re.search(r"^peak ([\d.]+) GiB", said[f"{teacher}, {row}"], re.MULTILINE)[1])
            card = next((card for card in CARDS if peak <= USABLE * card), None)
            cells.append(f"{peak:.1f}" + (f" ({card} GB)" if card else ""))
        print(f"| {NAMES[teacher]} | " + " | ".join(cells) + " |")
    print("\n| | peak in | TFLOP an iteration, with the student's turn |\n|---|---|---|")
    for teacher in args.teachers:
        for row in args.rows:
            found = said[f"{teacher}, {row}"]
            where = re.search(r"^peak .*, in: (.*)$", found, re.MULTILINE)[1]
            flops = ", ".join(re.findall(r"^[a-z' ]+: ([\d.]+) TFLOP", found, re.MULTILINE))
            print(f"| {NAMES[teacher]}, {row} | {where} | {flops} |")


if __name__ == "__main__":
    main()
