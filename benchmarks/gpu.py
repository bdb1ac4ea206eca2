#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Measure speed and memory of the training scripts at full size, with random weights, on one GPU; without a network.

    python benchmarks/gpu.py --output_dir OUT                         # all cases, as far as --minutes allows
    python benchmarks/gpu.py --output_dir OUT --cases sdxl flux-rank  # two of them
    python benchmarks/gpu.py --output_dir OUT --tiny                  # tiny networks, to test this file without a GPU

A case is a training command (bf16, gradient checkpointing, 1024 px, batch 1, accumulation 1, every loss on) whose
`main` runs without the export. Iterations and roles are timed by CUDA events. FLOPs are counted in the last two
iterations, one of which updates the student. The same command runs with --dry_run on the CPU at the same time.
OUT/gpu.json and OUT/gpu.md have the results; a case that has not run is "not measured".
"""

import argparse
import gc
import importlib
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Optional

import full_size
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


EIGHT_BIT = ["--use_8bit_adam"]
# {case: (teacher, flags, configuration of accelerate_configs/)}, in the order in which they run
CASES = {
    "flux-rank": ("flux", ["--rank", "64"], "single"),
    "sdxl": ("sdxl", [], "single"),
    "sd35-medium": ("sd35-medium", [], "single"),
    "sdxl-8bit": ("sdxl", EIGHT_BIT, "single"),
    "sd35-medium-8bit": ("sd35-medium", EIGHT_BIT, "single"),
    "flux-rank-4bit": ("flux", ["--rank", "64", "--base_quantization", "4bit", *EIGHT_BIT], "single"),
    "sd35-medium-fsdp2": ("sd35-medium", [], "fsdp2"),
    "sd35-large-rank": ("sd35-large", ["--rank", "64"], "single"),
    "sdxl-rank": ("sdxl", ["--rank", "64"], "single"),
    "sdxl-dmd2": ("sdxl", ["--method", "dmd2"], "single"),
    "sd35-medium-zero3": ("sd35-medium", [], "zero3"),
}
OPERATORS = "operators"
WITH_STUDENT, WITHOUT_STUDENT = "with student update", "without"  # kinds of iterations
TTUR = 2  # the student is updated in every second iteration; the table computes the mean at the recipe's 5
GIB, WARM_UP = 2**30, 2


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------
class Stopwatch:
    """Measure seconds of named spans, by CUDA events where there is a GPU; only `seconds` synchronizes."""

    def __init__(self):
        self.spans: dict[str, list] = defaultdict(list)

    def now(self):
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str):
        start = self.now()
        yield
        self.spans[name].append((start, self.now()))

    def seconds(self) -> dict[str, list[float]]:
        if not torch.cuda.is_available():
            return {name: [end - start for start, end in spans] for name, spans in self.spans.items()}
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1000 for start, end in spans] for name, spans in self.spans.items()}

    def time_method(self, cls: type, method: str, label) -> None:
        """Time every call of `cls.method` as `label`, a string or a function of the object."""
        function = getattr(cls, method)

        def timed(instance, *args, **kwargs):
            with self.span(label(instance) if callable(label) else label):
                return function(instance, *args, **kwargs)

        setattr(cls, method, timed)

    def time_networks(self) -> None:
        """Time the methods of all roles, of DINOv2 and of the VAE."""
        from senseflow.models.discriminator import VisionFeatures
        from senseflow.training.roles import Role

        self.time_method(Role, "__call__", lambda role: f"{role.name} forward")
        self.time_method(Role, "backward", lambda role: f"{role.name} backward")
        self.time_method(VisionFeatures, "forward", "DINOv2 forward")
        self.time_method(AutoencoderKL, "decode", "VAE decode")
        self.time_method(AutoencoderKL, "encode", "VAE encode")
        for cls in (Role, *Role.__subclasses__()):
            if "step" in vars(cls):
                self.time_method(cls, "step", lambda role: f"{role.name} step")


def time_call(function, repeat: int = 10) -> float:
    """Return the mean seconds of one call, after three calls that are not counted."""
    for _ in range(3):
        function()
    stopwatch = Stopwatch()
    with stopwatch.span("all"):
        for _ in range(repeat):
            function()
    return stopwatch.seconds()["all"][0] / repeat


def read_peaks() -> dict:
    """Return the peak GiB since the last call, allocated and reserved on the GPU, and of the host since the start."""
    peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if torch.cuda.is_available():
        peaks["allocated"] = torch.cuda.max_memory_allocated() / GIB
        peaks["reserved"] = torch.cuda.max_memory_reserved() / GIB
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return peaks


# ---------------------------------------------------------------------------------------------------------------------
# Training commands
# ---------------------------------------------------------------------------------------------------------------------
def write_data(folder: Path, resolution: int) -> Path:
    """Write eight images of noise, and return the dataset JSON with their prompts."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng, names = np.random.default_rng(0), [f"{index}.jpg" for index in range(8)]
    for name in names:
        Image.fromarray(rng.integers(0, 255, (resolution, resolution, 3), dtype=np.uint8)).save(folder / name)
    rows = {"keys": names, "image_paths": names, "prompts": [f"a red square number {index}" for index in range(8)]}
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def training_flags(case: str, output: Path, tiny: bool, iterations: int) -> list[str]:
    """Return the flags of a case; write its configurations and data to OUT/networks and OUT/data unless they exist."""
    teacher, flags, _ = CASES[case]
    networks, data, resolution = output / "networks", output / "data" / "data.json", 64 if tiny else 1024
    full_size.write_configs(teacher, networks / teacher, tiny)
    full_size.write_configs("discriminator", networks / "discriminator", tiny)
    if not data.exists():
        write_data(data.parent, resolution)
    command = ["--pretrained_model_name_or_path", networks / teacher, "--resolution", resolution]
    command += ["--dataset_json", data, "--output_dir", output / "out" / case]
    if "dmd2" not in flags:
        command += ["--discriminator_backbone", networks / "discriminator" / "dinov2"]
        command += ["--discriminator_text_encoder", networks / "discriminator" / "clip"]
    command += ["--mixed_precision", "bf16", "--gradient_checkpointing", "--train_batch_size", 1]
    command += ["--gradient_accumulation_steps", 1, "--max_train_steps", iterations, "--ttur_ratio", TTUR]
    command += ["--checkpointing_steps", 1000000, "--report_to", "none", "--dataloader_num_workers", 0, *flags]
    return [str(part) for part in command]


@contextmanager
def launch_environment(configuration: str):
    """Set the variables that `accelerate launch` sets for one process of a file of accelerate_configs/."""
    variables = {}
    if configuration != "single":
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        variables["MASTER_PORT"] = "29511"
    if configuration == "fsdp2":
        variables |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    if configuration.startswith("zero"):
        variables |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": configuration[-1]}
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# ---------------------------------------------------------------------------------------------------------------------
# The cases
# ---------------------------------------------------------------------------------------------------------------------
def run_case(case: str, output: Path, tiny: bool, iterations: int, gib: Optional[float] = None) -> dict:
    """Run a training command, with `gib` GiB of the GPU's memory or all of it; return what was measured."""
    flags, gpu = training_flags(case, output, tiny, iterations), torch.cuda.is_available()
    script = importlib.import_module(full_size.script_of(CASES[case][0]))
    if gpu and gib:
        torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    stopwatch = Stopwatch()
    stopwatch.time_networks()
    result, rows, tflop = {"case": case, **platform()}, [], {}
    train_iteration = script.train_iteration

    def timed_iteration(iteration, *args):
        if iteration == 0:
            result["loading"] = read_peaks()
        if iteration == iterations - TTUR:
            result["peak"] = read_peaks()  # before FLOPs are counted, which keeps tensors alive
        counted = gib is None and iteration >= iterations - TTUR
        counter = FlopCounterMode(display=False) if counted else nullcontext()
        first_spans = {label: len(spans) for label, spans in stopwatch.spans.items()}
        with counter, stopwatch.span("iteration"):
            values, debug_latents = train_iteration(iteration, *args)
        kind = WITH_STUDENT if "dmd_loss" in values else WITHOUT_STUDENT
        if counted:
            tflop[kind] = counter.get_total_flops() / 1e12
        values_now = {name: value.detach() for name, value in values.items()}
        rows.append((kind, iteration >= WARM_UP and not counted, first_spans, values_now))
        print(f"{time.strftime('%H:%M:%S')} {case}: iteration {iteration + 1} of {iterations}", flush=True)
        return values, debug_latents

    script.train_iteration = timed_iteration
    for name in ("save", "export", "_check_disk"):  # tens of GiB
        setattr(script.Checkpointer, name, lambda *args: None)
    with launch_environment(CASES[case][2]), full_size.random_weights("cuda" if gpu else "cpu"):
        script.main(flags)
    return result | {"tflop": tflop, "iterations": summarize(rows, stopwatch.seconds())}


def summarize(rows: list[tuple], seconds: dict[str, list[float]]) -> list[dict]:
    """Assign the seconds of the spans to the iterations in which they began."""
    iterations = []
    for (kind, timed, first, values), following in zip(rows, [*rows[1:], None]):
        last = following[2] if following else {}
        networks = {
            label: sum(spans[first.get(label, 0) : last.get(label, len(spans))]) for label, spans in seconds.items()
        }
        row = {"student": kind == WITH_STUDENT, "timed": timed, "seconds": networks.pop("iteration")}
        row |= {"networks": networks, "values": {label: float(value) for label, value in values.items()}}
        iterations.append(row)
    return iterations


def platform() -> dict:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__}


def run_operators(tiny: bool) -> dict:
    """Measure bf16 matrix products, and each attention backend, forward and backward, at the teachers' shapes."""
    device, size = ("cuda" if torch.cuda.is_available() else "cpu"), 64 if tiny else 8192
    normal = partial(torch.randn, device=device, dtype=torch.bfloat16)
    a, b = normal(size, size), normal(size, size)
    result = {"case": OPERATORS, **platform(), "attention": []}
    result["matmul_tflops"] = 2 * size**3 / time_call(lambda: a @ b) / 1e12
    shapes = {"FLUX": (24, 4608, 128), "SD 3.5 Large": (38, 4429, 64)}
    shapes |= {"SDXL, 64 x 64": (10, 4096, 64), "DINOv2": (16, 5330, 64)}
    for name, (heads, length, width) in shapes.items():
        length = 64 if tiny else length
        q, k, v, gradient = (normal(1, heads, length, width) for _ in range(4))
        tflop = 2 * 2 * heads * length**2 * width * 3.5 / 1e12  # forward, and 2.5 times as many backward
        for backend in (backend for backend in SDPBackend.__members__.values() if backend.value >= 0):
            row = {"shape": name, "backend": backend.name.lower()}
            tensors = [tensor.clone().requires_grad_() for tensor in (q, k, v)]

            def attend(tensors=tensors, backend=backend, gradient=gradient):
                with sdpa_kernel(backend):
                    torch.nn.functional.scaled_dot_product_attention(*tensors).backward(gradient)

            try:
                seconds = time_call(attend)
                finite = all(bool(tensor.grad.isfinite().all()) for tensor in tensors)
                row |= {"ms": 1000 * seconds, "tflops": tflop / seconds, "finite": finite}
            except RuntimeError as error:  # a backend that does not support this shape or device
                row["failed"] = first_line(error)
            result["attention"].append(row)
    return result


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def run_in_this_process(case: str, args) -> None:
    """Run a case and write its result, or its error, to OUT/cases/CASE.json."""
    start = time.time()
    try:
        if case == OPERATORS:
            result = run_operators(args.tiny)
        else:
            result = run_case(case, args.output_dir, args.tiny, args.iterations, args.gib)
    except BaseException as error:
        traceback.print_exc()
        result = {"case": case, "failed": first_line(error)}
    result["case_seconds"] = time.time() - start
    (args.output_dir / "cases" / f"{case}.json").write_text(json.dumps(result, indent=1))


def start_dry_run(case: str, output: Path, tiny: bool) -> subprocess.Popen:
    """Start the command of a case with --dry_run on the CPU; its output goes to OUT/cases/CASE.txt."""
    flags = training_flags(case, output, tiny, TTUR)
    script = full_size.ROOT / f"{full_size.script_of(CASES[case][0])}.py"
    with launch_environment(CASES[case][2]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output / "cases" / f"{case}.txt", "w") as log:
        return subprocess.Popen([sys.executable, script, *flags, "--dry_run"], env=environment, stdout=log)


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------
COLUMNS = ("case", "without student update, s", "with, s", "s / iteration at ttur 5", "TFLOP, without / with")
COLUMNS += ("of the matmul rate", "peak GiB", "--dry_run", "reserved", "loading GiB", "losses finite")


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def report(output: Path) -> str:
    """Write gpu.json and gpu.md from the results there are; return the latter."""
    results = {file.stem: json.loads(file.read_text()) for file in sorted((output / "cases").glob("*.json"))}
    (output / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    operators, lines = results.get(OPERATORS, {}), []
    rate = operators.get("matmul_tflops")
    if rate:
        platform = f"{operators['device']}, torch {operators['torch']}"
        lines += [f"{platform}; bf16 matrix products of 8192: {rate:.0f} TFLOP/s.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for case in CASES:
        log = output / "cases" / f"{case}.txt"
        dry_run = re.search(r"^peak ([\d.]+) GiB", log.read_text() if log.exists() else "", re.MULTILINE)
        cells = cells_of(results.get(case), dry_run[1] if dry_run else "", rate)
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    lines += ["", "Seconds by network, mean of the timed iterations (without / with student update):", ""]
    for case, result in results.items():
        if "iterations" in result:
            lines.append(f"- {case}: {networks_of(result)}")
    if operators.get("attention"):
        lines += ["", "| attention, forward and backward | backend | ms | TFLOP/s | gradients finite |"]
        lines += ["|---" * 5 + "|"]
    for row in operators.get("attention", []):
        cells = [row["failed"], "", ""]
        if "failed" not in row:
            cells = [f"{row['ms']:.2f}", f"{row['tflops']:.0f}", str(row["finite"])]
        lines.append(f"| {row['shape']} | {row['backend']} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (output / "gpu.md").write_text(text)
    return text


def cells_of(result: Optional[dict], dry_run: str, rate: Optional[float]) -> list[str]:
    """Return the cells of one case after its name."""
    if result is None or "failed" in result:
        return ["not measured" if result is None else result["failed"], *[""] * (len(COLUMNS) - 2)]
    timed = [row for row in result["iterations"] if row["timed"]]
    without, with_student = (
        mean(row["seconds"] for row in timed if row["student"] == student) for student in (False, True)
    )
    tflop, share = [result["tflop"].get(kind, 0) for kind in (WITHOUT_STUDENT, WITH_STUDENT)], ""
    if rate and all(tflop):
        share = f"{(tflop[0] / without + tflop[1] / with_student) / 2 / rate:.0%}"
    finite = all(math.isfinite(value) for row in result["iterations"] for value in row["values"].values())
    return [
        f"{without:.2f}",
        f"{with_student:.2f}",
        f"{(4 * without + with_student) / 5:.2f}",
        f"{tflop[0]:.0f} / {tflop[1]:.0f}",
        share,
        f"{result['peak'].get('allocated', 0):.1f}",
        dry_run,
        f"{result['peak'].get('reserved', 0):.1f}",
        f"{result['loading'].get('allocated', 0):.1f}",
        "yes" if finite else "NO",
    ]


def networks_of(result: dict) -> str:
    """Return the mean seconds of every network in both kinds of iterations."""
    timed = [row for row in result["iterations"] if row["timed"]]
    cells = []
    for network in sorted({network for row in timed for network in row["networks"]}):
        without, with_student = (
            mean(row["networks"].get(network, 0) for row in timed if row["student"] == student)
            for student in (False, True)
        )
        cells.append(f"{network} {without:.2f} / {with_student:.2f}")
    return "; ".join(cells)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=[OPERATORS, *CASES], default=[OPERATORS, *CASES])
    help = f"iterations of a case; the first {WARM_UP} and the last {TTUR} are not timed"
    parser.add_argument("--iterations", type=int, default=8, help=help)
    parser.add_argument("--minutes", type=float, default=9, help="no case starts after this time")
    parser.add_argument("--gib", type=float, help="use this much of the GPU's memory, as a smaller card has")
    parser.add_argument("--tiny", action="store_true", help="tiny networks at 64 px, to test this file")
    parser.add_argument("--in_process", action="store_true", help="run the first case in this process, without tables")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    (args.output_dir / "cases").mkdir(parents=True, exist_ok=True)
    if args.in_process:
        return run_in_this_process(args.cases[0], args)
    start = time.monotonic()
    dry_runs = [start_dry_run(case, args.output_dir, args.tiny) for case in args.cases if case != OPERATORS]
    for case in args.cases:
        if time.monotonic() - start > 60 * args.minutes:
            break
        subprocess.run([sys.executable, __file__, *argv, "--in_process", "--cases", case])
        print(report(args.output_dir), flush=True)
    for dry_run in dry_runs:
        dry_run.wait()
    print(report(args.output_dir), flush=True)


if __name__ == "__main__":
    main()
