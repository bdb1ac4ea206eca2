#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Measure seconds per iteration and peak memory of the files of accelerate_configs/, for two sizes of FLUX.

    python benchmarks/modes.py [--sizes tiny mid] [--modes single ddp fsdp2 zero2 zero3] [--precision no]

Every mode trains random weights on the same global batches, with GAN, ISG and IDA, and prints a row of a table. The
launched processes run this file again: it trains with train_senseflow_flux.py, times its iterations and reads the peak
memory, without loading and saving.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "tiny": {},
    "mid": {
        "num_layers": 3,
        "num_single_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 12,
        "axes_dims_rope": [16, 24, 24],
    },
}
ITERATIONS, SKIPPED = 15, 5  # the student is updated in two of the ten iterations that are timed


def write_networks(folder: Path, size: str = "tiny") -> None:
    """Write a random FLUX pipeline of this size, a tiny discriminator's networks, and a dataset JSON of 8 images."""
    import numpy as np
    from diffusers import FluxTransformer2DModel
    from PIL import Image

    for name, path in (("flux", folder / "teacher"), ("discriminator", folder)):
        command = [sys.executable, ROOT / "tests" / "tiny_pipelines.py", name, path]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    if SIZES[size]:
        config = FluxTransformer2DModel.load_config(folder / "teacher", subfolder="transformer")
        FluxTransformer2DModel.from_config({**config, **SIZES[size]}).save_pretrained(
            folder / "teacher" / "transformer"
        )
    keys = [str(i) for i in range(8)]
    for key in keys:
        pixels = np.random.default_rng(int(key)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{key}.png")
    rows = {"keys": keys, "image_paths": [f"{key}.png" for key in keys], "prompts": keys}
    (folder / "data.json").write_text(json.dumps(rows))


def training_command(folder: Path, mode: str, processes: int, precision: str, script: Path, *flags) -> list[str]:
    """Return the command that launches `script` on what `write_networks` wrote, with `flags`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", ROOT / "accelerate_configs" / f"{mode}.yaml", "--num_processes", processes]
    command += ["--mixed_precision", precision, script, "--pretrained_model_name_or_path", folder / "teacher"]
    command += ["--dataset_json", folder / "data.json", "--discriminator_backbone", folder / "dinov2"]
    command += ["--discriminator_text_encoder", folder / "clip", "--resolution", 64, "--max_sequence_length", 16]
    return [str(part) for part in [*command, "--report_to", "none", *flags]]


def peak_mib() -> float:
    """Return the peak memory of this process since `reset_peak`: allocated on its GPU if it has one, else resident."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def train_and_measure(arguments: list[str]) -> None:
    """Train in a launched process and write the measurements to OUTPUT_DIR-RANK.json."""
    import torch

    import train_senseflow_flux as script

    train_iteration, seconds = script.train_iteration, []
    output_dir = arguments[arguments.index("--output_dir") + 1]

    def timed_iteration(iteration, batches, models, *args):
        if iteration == SKIPPED:
            reset_peak()
        start = time.perf_counter()
        result = train_iteration(iteration, batches, models, *args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if iteration + 1 == ITERATIONS:
            parameters = models.student.module.parameters()
            measured = {
                "seconds": sum(seconds[SKIPPED:]) / (ITERATIONS - SKIPPED),
                "mib": peak_mib(),
                "num_params": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters),
            }
            Path(f"{output_dir}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(measured))
        return result

    script.train_iteration = timed_iteration
    script.main(arguments)


def run(mode: str, args, folder: Path) -> list[dict]:
    """Train in one mode and return the measurements of each process."""
    processes, output_dir = 1 if mode == "single" else args.processes, folder / mode
    flags = ["--train_batch_size", 2 * args.processes // processes, "--gradient_accumulation_steps", 2]
    flags += ["--max_train_steps", ITERATIONS, "--checkpointing_steps", 1000, "--output_dir", output_dir]
    command = training_command(folder, mode, processes, args.precision, Path(__file__), *flags)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SENSEFLOW_MEASURE": "1"}
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return [json.loads(Path(f"{output_dir}-{rank}.json").read_text()) for rank in range(processes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--modes", nargs="+", default=["single", "ddp", "fsdp2", "zero2", "zero3"])
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    print("| size | mode | processes | s / iteration | peak MiB, each process |\n|---|---|---|---|---|", flush=True)
    for size in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            write_networks(Path(folder), size)
            for mode in args.modes:
                measured = run(mode, args, Path(folder))
                name = f"{size}, {measured[0]['num_params'] / 1e6:.2f} M"
                seconds = max(process["seconds"] for process in measured)
                memory = ", ".join(f"{process['mib']:.0f}" for process in measured)
                print(f"| {name} | {mode} | {len(measured)} | {seconds:.2f} | {memory} |", flush=True)


if __name__ == "__main__":
    if os.environ.get("SENSEFLOW_MEASURE"):
        train_and_measure(sys.argv[1:])
    else:
        main()
