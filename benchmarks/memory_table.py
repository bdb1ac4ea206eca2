#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Run `--dry_run` for all teachers at full size, from configurations alone, and print the tables of docs/memory.md.

    python benchmarks/memory_table.py                             # all; about a minute per row and core
    python benchmarks/memory_table.py --teachers sdxl --rows full

1024 px, one image per process, `--mixed_precision bf16 --gradient_checkpointing --offload_text_encoders`, more than
1,000 prompts, else the defaults. What --dry_run writes is kept in benchmarks/out/memory.json; delete an entry there to
trace it again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from full_size import ROOT, script_of, write_configs
from gpu import launch_environment, write_data

from senseflow.memory.report import SIZES, USABLE
from senseflow.memory.trace import ORDINARY, WITH_STUDENT
from senseflow.models.text_encoders import MAX_PROMPTS_IN_MEMORY


OUTPUTS = ROOT / "benchmarks" / "out" / "memory.json"
NAMES = {"sdxl": "SDXL", "sd35-medium": "SD 3.5 Medium", "sd35-large": "SD 3.5 Large", "flux": "FLUX.1-dev"}
FURTHER_NAMES = {
    "sana": "Sana 1.5 1.6B",
    "flux2-klein-4b": "FLUX.2 klein base 4B",
    "flux2-klein-9b": "FLUX.2 klein base 9B",
    "zimage": "Z-Image",
    "qwenimage21": "Qwen-Image 2.1",
    "ovis_image": "Ovis-Image",
    "chroma": "Chroma",
    "ideogram4": "Ideogram 4",
    "krea2": "Krea 2",
    "qwenimage": "Qwen-Image",
    "flux2": "FLUX.2 dev",
}
NAMES |= FURTHER_NAMES
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
FURTHER_ROWS = ("full", "fsdp2 on 8", "rank")  # of FURTHER_NAMES
COMMON = ["--mixed_precision", "bf16", "--gradient_checkpointing", "--offload_text_encoders", "--resolution", "1024"]


def has(teacher: str, row: str) -> bool:
    """Return whether the table has this row of the teacher."""
    if teacher == "ovis_image" and "rank" in row:  # its pipeline loads no adapters
        return False
    return teacher not in FURTHER_NAMES or row in FURTHER_ROWS


def write_prompts(folder: Path) -> Path:
    """Write a dataset JSON with so many prompts that the text encoders stay on the CPU during a run."""
    path = write_data(folder, 64)
    images = json.loads(path.read_text())["image_paths"]
    keys = [f"{index}" for index in range(MAX_PROMPTS_IN_MEMORY + 1)]
    rows = {"keys": keys, "image_paths": images[:1] * len(keys), "prompts": [f"a red square {key}" for key in keys]}
    path.write_text(json.dumps(rows))
    return path


def dry_run(teacher: str, row: str, folder: Path) -> dict:
    """Return what the teacher's script writes with --dry_run_output."""
    configuration, processes, flags = ROWS[row]
    discriminator = "discriminator-small" if SMALL in row else "discriminator"
    for name in (teacher, discriminator):
        write_configs(name, folder / name)
    command = [sys.executable, ROOT / f"{script_of(teacher)}.py", "--pretrained_model_name_or_path", folder / teacher]
    command += ["--dataset_json", write_prompts(folder / "data"), "--output_dir", folder / "out"]
    command += ["--discriminator_backbone", folder / discriminator / "dinov2"]
    command += ["--discriminator_text_encoder", folder / discriminator / "clip"]
    command += ["--report_to", "none", "--dry_run", "--dry_run_output", folder / "dry_run.json", *COMMON, *flags]
    with launch_environment(configuration):
        environment = {**os.environ, "WORLD_SIZE": str(processes), "RANK": "0"}
    result = subprocess.run([str(part) for part in command], env=environment, stdout=subprocess.DEVNULL)
    if result.returncode:
        sys.exit(f"{teacher}, {row}: exit code {result.returncode}")
    return json.loads((folder / "dry_run.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    args.rows = [row for row in args.rows if any(has(teacher, row) for teacher in args.teachers)]
    OUTPUTS.parent.mkdir(exist_ok=True)
    outputs = json.loads(OUTPUTS.read_text()) if OUTPUTS.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for teacher in args.teachers:
            for row in args.rows:
                if has(teacher, row) and f"{teacher}, {row}" not in outputs:
                    outputs[f"{teacher}, {row}"] = dry_run(teacher, row, Path(folder))
                    OUTPUTS.write_text(json.dumps(outputs, indent=1))
    print("| | " + " | ".join(args.rows) + " |\n" + "|---" * (len(args.rows) + 1) + "|")
    for teacher in args.teachers:
        cells = []
        for row in args.rows:
            if not has(teacher, row):
                cells.append("")
                continue
            peak = outputs[f"{teacher}, {row}"]["peak_gib"]
            card = next((card for card in SIZES if peak <= USABLE * card), None)
            cells.append(f"{peak:.1f}" + (f" ({card} GB)" if card else ""))
        print(f"| {NAMES[teacher]} | " + " | ".join(cells) + " |")
    rows = [
        (f"{NAMES[teacher]}, {row}", outputs[f"{teacher}, {row}"])
        for teacher in args.teachers
        for row in args.rows
        if has(teacher, row)
    ]
    print("\n| | peak in | GiB on the disk: a checkpoint | the export |\n" + "|---" * 4 + "|")
    for name, output in rows:
        print(f"| {name} | {output['peak_phase']} | {output['checkpoint_gib']:.1f} | {output['export_gib']:.1f} |")
    print("\n| iteration, ordinary / with the student's update | operations | GB moved | TFLOP | H200, s |")
    print("|---" * 5 + "|")
    for name, output in rows:
        kinds = [output["iterations"][kind] for kind in (ORDINARY, WITH_STUDENT)]
        cells = (
            " / ".join(f"{kind['operations']:,}" for kind in kinds),
            " / ".join(f"{kind['gigabytes']:,.0f}" for kind in kinds),
            " / ".join(f"{kind['tflops']:,.0f}" for kind in kinds),
            " / ".join(f"{kind['seconds']['H200']:.2f}" for kind in kinds),
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
