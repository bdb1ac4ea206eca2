#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Run `--dry_run` for all teachers at full size, from configurations alone, and print the tables of docs/memory.md.

    python benchmarks/memory_table.py                             # all; about a minute per row and core
    python benchmarks/memory_table.py --teachers sdxl --rows full

1024 px, one image per process, `--mixed_precision bf16 --gradient_checkpointing --offload_text_encoders`, else the
defaults. Outputs of --dry_run are kept in benchmarks/out/memory.json; delete an entry there to trace it again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from full_size import ROOT, script_of, write_configs
from gpu import launch_environment, write_data

from senseflow.memory.report import CARDS, USABLE


OUTPUTS = ROOT / "benchmarks" / "out" / "memory.json"
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


def dry_run(teacher: str, row: str, folder: Path) -> str:
    """Return what the teacher's script prints with --dry_run."""
    configuration, processes, flags = ROWS[row]
    discriminator = "discriminator-small" if SMALL in row else "discriminator"
    for name in (teacher, discriminator):
        write_configs(name, folder / name)
    command = [sys.executable, ROOT / f"{script_of(teacher)}.py", "--pretrained_model_name_or_path", folder / teacher]
    command += ["--dataset_json", write_data(folder / "data", 64), "--output_dir", folder / "out"]
    command += ["--discriminator_backbone", folder / discriminator / "dinov2"]
    command += ["--discriminator_text_encoder", folder / discriminator / "clip"]
    command += ["--report_to", "none", "--dry_run", *COMMON, *flags]
    with launch_environment(configuration):
        environment = {**os.environ, "WORLD_SIZE": str(processes), "RANK": "0"}
    result = subprocess.run([str(part) for part in command], env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"{teacher}, {row}: exit code {result.returncode}")
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    OUTPUTS.parent.mkdir(exist_ok=True)
    outputs = json.loads(OUTPUTS.read_text()) if OUTPUTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for teacher in args.teachers:
            for row in args.rows:
                if f"{teacher}, {row}" not in outputs:
                    outputs[f"{teacher}, {row}"] = dry_run(teacher, row, Path(folder))
                    OUTPUTS.write_text(json.dumps(outputs, indent=1))
    print("| | " + " | ".join(args.rows) + " |\n" + "|---" * (len(args.rows) + 1) + "|")
    for teacher in args.teachers:
        cells = []
        for row in args.rows:
            peak = float(re.search(r"^peak ([\d.]+) GiB", outputs[f"{teacher}, {row}"], re.MULTILINE)[1])
            card = next((card for card in CARDS if peak <= USABLE * card), None)
            cells.append(f"{peak:.1f}" + (f" ({card} GB)" if card else ""))
        print(f"| {NAMES[teacher]} | " + " | ".join(cells) + " |")
    print("\n| | GiB on the disk: a checkpoint | the export |\n|---|---|---|")
    for teacher in args.teachers:
        for row in args.rows:
            sizes = re.search(r"a checkpoint ([\d.]+) GiB, the export ([\d.]+) GiB", outputs[f"{teacher}, {row}"])
            print(f"| {NAMES[teacher]}, {row} | {' | '.join(sizes.groups())} |")
    print("\n| | peak in | TFLOP of an iteration without / with student update |\n|---|---|---|")
    for teacher in args.teachers:
        for row in args.rows:
            output = outputs[f"{teacher}, {row}"]
            phase = re.search(r"^peak .*, in: (.*)$", output, re.MULTILINE)[1]
            tflop = " / ".join(re.findall(r"^[a-z' ]+: ([\d.]+) TFLOP", output, re.MULTILINE))
            print(f"| {NAMES[teacher]}, {row} | {phase} | {tflop} |")


if __name__ == "__main__":
    main()
