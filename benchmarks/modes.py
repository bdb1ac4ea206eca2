#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Seconds per iteration and peak memory per process of every configuration of accelerate_configs/, on two sizes of FLUX.

    python benchmarks/modes.py [--sizes tiny mid] [--modes single ddp fsdp2 zero2 zero3] [--precision no] [--processes 2]

Every mode trains on the same global batches, everything on (GAN, ISG, IDA), random weights. A table goes to the standard output.
The launched processes run this file again, which trains with the real script, times its iterations, and looks at the memory that
they need, without that of loading and saving.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SIZES = {
    "tiny": {},
    "mid": {"num_layers": 3, "num_single_layers": 4, "attention_head_dim": 64, "num_attention_heads": 12},
}
ITERATIONS, SKIPPED = 15, 5  # in two of the ten that are timed the student learns


def write_networks(folder: Path, size: str) -> None:
    """A random FLUX pipeline of this size, a tiny discriminator's networks, and a data set of 8 images."""
    import numpy as np
    from diffusers import FluxTransformer2DModel
    from PIL import Image

    from tiny_pipelines import write_discriminator, write_flux

    write_flux(folder / "teacher")
    write_discriminator(folder)
    if SIZES[size]:
        config = FluxTransformer2DModel.load_config(folder / "teacher", subfolder="transformer")
        axes = [16, 24, 24]
        network = FluxTransformer2DModel.from_config({**config, **SIZES[size], "axes_dims_rope": axes})
        network.save_pretrained(folder / "teacher" / "transformer")
    for i in range(8):
        image = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
    names = [str(i) for i in range(8)]
    rows = {"keys": names, "image_paths": [f"{i}.png" for i in range(8)], "prompts": names}
    (folder / "data.json").write_text(json.dumps(rows))


def peak_mib(reset: bool = False) -> float:
    """The most memory that this process has held since the last reset: of its GPU if it has one, else resident."""
    import torch

    if torch.cuda.is_available():
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def measured(arguments: list[str], report: Path) -> None:
    """In a launched process: trains, and writes what it saw."""
    import torch

    import train_senseflow_flux as script

    iterate, seconds = script.train_iteration, []

    def timed(iteration, *args):
        if iteration == SKIPPED:
            peak_mib(reset=True)
        start = time.perf_counter()
        out = iterate(iteration, *args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if iteration + 1 == ITERATIONS:
            parameters = sum(script_parameters(args[1].student))
            taken = {
                "seconds": sum(seconds[SKIPPED:]) / (ITERATIONS - SKIPPED),
                "mib": peak_mib(),
                "parameters": parameters,
            }
            Path(f"{report}-{os.environ.get('RANK', '0')}").write_text(json.dumps(taken))
        return out

    script.train_iteration = timed
    script.main(arguments)


def script_parameters(role):
    """Sizes of a network's weights, whole."""
    return (getattr(parameter, "ds_numel", parameter.numel()) for parameter in role.module.parameters())


def run(size: str, mode: str, args, folder: Path) -> list[dict]:
    """One mode; what each process saw."""
    processes = 1 if mode == "single" else args.processes
    report = folder / f"{mode}-report"
    arguments = [
        *("--pretrained_model_name_or_path", str(folder / "teacher"), "--dataset_json", str(folder / "data.json")),
        *("--discriminator_backbone", str(folder / "dinov2"), "--discriminator_text_encoder", str(folder / "clip")),
        *(
            "--resolution",
            "64",
            "--max_sequence_length",
            "16",
            "--max_train_steps",
            str(ITERATIONS),
            "--report_to",
            "none",
        ),
        *("--train_batch_size", str(2 * args.processes // processes), "--gradient_accumulation_steps", "2"),
        *("--checkpointing_steps", "1000", "--output_dir", str(folder / mode)),
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / "accelerate_configs" / f"{mode}.yaml"), "--num_processes", str(processes)]
    command += ["--mixed_precision", args.precision, __file__, "--report", str(report), *arguments]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads(Path(f"{report}-{rank}").read_text()) for rank in range(processes)]


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
                seen = run(size, mode, args, Path(folder))
                name = f"{size}, {seen[0]['parameters'] / 1e6:.2f} M"
                memory = ", ".join(f"{one['mib']:.0f}" for one in seen)
                print(
                    f"| {name} | {mode} | {len(seen)} | {max(one['seconds'] for one in seen):.2f} | {memory} |",
                    flush=True,
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--report"]:
        measured(sys.argv[3:], Path(sys.argv[2]))
    else:
        main()
