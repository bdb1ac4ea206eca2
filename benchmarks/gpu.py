#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Measure speed and memory of the training scripts at full size, with random weights, on one GPU; without a network.

    python benchmarks/gpu.py --output_dir OUT --minutes 0             # on any machine: the dry runs of all cases
    python benchmarks/gpu.py --output_dir OUT                         # the cases, in their order, for nine minutes
    python benchmarks/gpu.py --output_dir OUT --before WORKTREE       # COMPARED also by the scripts of another commit
    python benchmarks/gpu.py --output_dir OUT --cases sdxl flux-rank  # two of them
    python benchmarks/gpu.py --output_dir OUT --tiny                  # tiny networks, to test this file without a GPU

A case is a training command (bf16, gradient checkpointing, 1024 px, batch 1, accumulation 1, every loss on) whose
`main` runs without the export. Iterations and roles are timed by CUDA events. The same command with --dry_run gives
FLOPs, peak and estimated seconds, on the CPU; give them before the GPU is there, since they slow the host down.
OUT/gpu.json and OUT/gpu.md have the results; a case that has not run is "not measured", and runs when OUT is given
again.
"""

import argparse
import gc
import importlib
import json
import math
import os
import resource
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Optional

import full_size
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel

from senseflow.memory.speed import CARDS


@dataclass
class Case:
    """A training command.

    Attributes:
        teacher: name in full_size.NETWORKS.
        configuration: file of accelerate_configs/.
        dry_run: another case with the same dry run, which traces neither kernels of attention nor compiled code.
        compiled: as by `accelerate launch --dynamo_backend inductor`.
        channels_last: whether convolutions of student, fake score, teacher, discriminator and VAE have their weights
            in that order of memory.
        script: the training script, if it is not the teacher's in full_size.NETWORKS.
    """

    teacher: str
    flags: list[str] = field(default_factory=list)
    configuration: str = "single"
    dry_run: Optional[str] = None
    compiled: bool = False
    channels_last: bool = False
    script: Optional[str] = None

    @property
    def script_name(self) -> str:
        return self.script or full_size.script_of(self.teacher)

    @property
    def warm_up(self) -> int:
        """Number of iterations that are not timed; those in which blocks are compiled are among them."""
        return 4 if self.compiled else 2


EIGHT_BIT, RANK = ["--use_8bit_adam"], ["--rank", "64"]
CUDNN = ["--attention_backend", "_native_cudnn"]
FAKE_SCORE_KEPT = ["--gradient_checkpointing_interval", "1", "0"]  # its activations
# In the order in which they run.
CASES = {
    "flux-rank": Case("flux", RANK),
    "sdxl": Case("sdxl"),
    "sdxl-8bit": Case("sdxl", EIGHT_BIT),
    "sd35-medium": Case("sd35-medium"),
    "sdxl-compiled": Case("sdxl", dry_run="sdxl", compiled=True),
    "flux-rank-compiled": Case("flux", RANK, dry_run="flux-rank", compiled=True),
    "sdxl-fast": Case("sdxl", ["--bf16_weight_copies", *FAKE_SCORE_KEPT], compiled=True),
    "flux-rank-fast": Case("flux", [*RANK, *CUDNN, *FAKE_SCORE_KEPT], compiled=True),
    "flux-rank-cudnn": Case("flux", [*RANK, *CUDNN], dry_run="flux-rank"),
    "sdxl-interval-2": Case("sdxl", ["--gradient_checkpointing_interval", "2"]),
    "flux-rank-interval-2": Case("flux", [*RANK, "--gradient_checkpointing_interval", "2"]),
    "flux-rank-flash3": Case("flux", [*RANK, "--attention_backend", "_flash_3_hub"], dry_run="flux-rank"),
    "sdxl-channels-last": Case("sdxl", dry_run="sdxl", channels_last=True),
    "sd35-medium-compiled": Case("sd35-medium", dry_run="sd35-medium", compiled=True),
    "flux-rank-4bit": Case("flux", [*RANK, "--base_quantization", "4bit", *EIGHT_BIT]),
    "sd35-medium-8bit": Case("sd35-medium", EIGHT_BIT),
    "sd35-medium-fsdp2": Case("sd35-medium", configuration="fsdp2"),
    "sd35-large-rank": Case("sd35-large", RANK),
    "sdxl-rank": Case("sdxl", RANK),
    "sdxl-dmd2": Case("sdxl", script="train_dmd2_sdxl"),
    "sd35-medium-zero3": Case("sd35-medium", configuration="zero3"),
}
COMPARED = ("flux-rank", "sdxl", "sdxl-8bit", "sd35-medium")  # by --before, with flags that earlier commits have
OPERATORS = "operators"
WITH_STUDENT, WITHOUT_STUDENT = "with student update", "without"  # kinds of iterations
TTUR = 2  # the student is updated in every second iteration; the table computes the mean at the recipe's 5
GIB = 2**30


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
    teacher, flags = CASES[case].teacher, CASES[case].flags
    networks, data, resolution = output / "networks", output / "data" / "data.json", 64 if tiny else 1024
    full_size.write_configs(teacher, networks / teacher, tiny)
    full_size.write_configs("discriminator", networks / "discriminator", tiny)
    if not data.exists():
        write_data(data.parent, resolution)
    command = ["--pretrained_model_name_or_path", networks / teacher, "--resolution", resolution]
    command += ["--dataset_json", data, "--output_dir", output / "out" / case]
    if case != "sdxl-dmd2":
        command += ["--discriminator_backbone", networks / "discriminator" / "dinov2"]
        command += ["--discriminator_text_encoder", networks / "discriminator" / "clip"]
    command += ["--mixed_precision", "bf16", "--gradient_checkpointing", "--train_batch_size", 1]
    command += ["--gradient_accumulation_steps", 1, "--max_train_steps", iterations, "--ttur_ratio", TTUR]
    command += ["--checkpointing_steps", 1000000, "--report_to", "none", "--dataloader_num_workers", 0, *flags]
    return [str(part) for part in command]


@contextmanager
def launch_environment(configuration: str, compiled: bool = False):
    """Set the variables that `accelerate launch` sets for one process of a file of accelerate_configs/.

    Args:
        compiled: as by `--dynamo_backend inductor`.
    """
    variables = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR" if compiled else "NO"}
    if configuration != "single":
        variables |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
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
def run_case(name: str, output: Path, tiny: bool, timed: int, gib: Optional[float] = None) -> dict:
    """Run a training command, with `gib` GiB of the GPU's memory or all of it; return what was measured.

    Args:
        timed: number of iterations that are timed.
    """
    case, gpu = CASES[name], torch.cuda.is_available()
    iterations = case.warm_up + timed
    flags = training_flags(name, output, tiny, iterations)
    script = importlib.import_module(case.script_name)
    if gpu and gib:
        torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    stopwatch = Stopwatch()
    stopwatch.time_networks()
    result, rows = {"case": name, **platform()}, []
    train_iteration = script.train_iteration

    def timed_iteration(iteration, batches, models, args):
        if iteration == 0:
            result["loading"] = read_peaks()
            if case.channels_last:
                order_channels_last(models)
        first_spans = {label: len(spans) for label, spans in stopwatch.spans.items()}
        with stopwatch.span("iteration"):
            values, debug_latents = train_iteration(iteration, batches, models, args)
        kind = WITH_STUDENT if "dmd_loss" in values else WITHOUT_STUDENT
        values_now = {label: value.detach() for label, value in values.items()}
        rows.append((kind, iteration >= case.warm_up, first_spans, values_now))
        print(f"{time.strftime('%H:%M:%S')} {name}: iteration {iteration + 1} of {iterations}", flush=True)
        return values, debug_latents

    script.train_iteration = timed_iteration
    for method in ("save", "export", "_check_disk"):  # tens of GiB
        setattr(script.Checkpointer, method, lambda *args: None)
    with launch_environment(case.configuration, case.compiled), full_size.random_weights("cuda" if gpu else "cpu"):
        script.main(flags)
    result["peak"] = read_peaks()
    return result | {"iterations": summarize(rows, stopwatch.seconds())}


def order_channels_last(models) -> None:
    """Reorder the weights of two-dimensional convolutions; their outputs follow."""
    roles = (models.student, models.fake_score, models.teacher, models.discriminator)
    for module in (models.vae, *(role.module for role in roles)):
        module.to(memory_format=torch.channels_last)


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
    """Start the command of a case with --dry_run on the CPU; its numbers go to OUT/dry_runs/CASE.json."""
    flags = training_flags(case, output, tiny, TTUR)
    flags += ["--dry_run", "--dry_run_output", str(output / "dry_runs" / f"{case}.json")]
    script = full_size.ROOT / f"{CASES[case].script_name}.py"
    with launch_environment(CASES[case].configuration):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["nice", "-n", "19", sys.executable, script, *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def start_case(case: str, root: Path, output: Path, args) -> subprocess.Popen:
    """Start a case by the gpu.py of this commit or of another one."""
    command = [sys.executable, root / "benchmarks" / "gpu.py", "--output_dir", output, "--in_process", "--cases", case]
    # Earlier commits count the four iterations that they do not time.
    iterations = args.iterations if root == full_size.ROOT else args.iterations + 4
    command += ["--iterations", iterations, *(["--tiny"] if args.tiny else [])]
    command += ["--gib", args.gib] if args.gib else []
    environment = {**os.environ, "PYTHONPATH": str(root)}
    (output / "cases").mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([str(part) for part in command], env=environment)


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------
COLUMNS = ("case", "without student update, s", "with, s", "s / iteration at ttur 5", "estimated, without / with")
COLUMNS += ("TFLOP, without / with", "of the matmul rate", "peak GiB", "--dry_run", "reserved", "loading GiB")
COLUMNS += ("losses finite",)


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values) if values else math.nan


def read_results(folder: Path) -> dict[str, dict]:
    """Read the JSON files of a folder, by their names."""
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def report(output: Path) -> str:
    """Write gpu.json and gpu.md from the results there are; return the latter."""
    results, dry_runs = read_results(output / "cases"), read_results(output / "dry_runs")
    before = {f"{case} before": result for case, result in read_results(output / "before" / "cases").items()}
    (output / "gpu.json").write_text(json.dumps(results | before, indent=1) + "\n")
    operators, lines = results.get(OPERATORS, {}), []
    rate = operators.get("matmul_tflops")
    if rate:
        platform = f"{operators['device']}, torch {operators['torch']}"
        lines += [f"{platform}; bf16 matrix products of 8192: {rate:.0f} TFLOP/s.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for case in CASES:
        if f"{case} before" in before:
            lines.append(f"| {case} before | " + " | ".join(cells_of(before[f"{case} before"], {}, rate)) + " |")
        dry_run = dry_runs.get(CASES[case].dry_run or case, {})
        lines.append(f"| {case} | " + " | ".join(cells_of(results.get(case), dry_run, rate)) + " |")
    lines += ["", "Seconds by network, mean of the timed iterations (without / with student update):", ""]
    for case, result in (before | results).items():
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


def cells_of(result: Optional[dict], dry_run: dict, rate: Optional[float]) -> list[str]:
    """Return the cells of one case after its name."""
    if result is None or "failed" in result:
        return ["not measured" if result is None else result["failed"], *[""] * (len(COLUMNS) - 2)]
    timed = [row for row in result["iterations"] if row["timed"]]
    seconds = [mean(row["seconds"] for row in timed if row["student"] == student) for student in (False, True)]
    finite = all(math.isfinite(value) for row in result["iterations"] for value in row["values"].values())
    estimated, tflop, share, peak = "", "", "", result["peak"].get("allocated", 0)
    if dry_run:
        kinds = [dry_run["iterations"][kind] for kind in ("ordinary", "with_student")]
        tflop = " / ".join(f"{kind['tflops']:.0f}" for kind in kinds)
        card = next((card for card in CARDS if card in result["device"]), None)
        if card:
            estimated = " / ".join(f"{kind['seconds'][card]:.2f}" for kind in kinds)
        if rate:
            share = f"{sum(kind['tflops'] / measured for kind, measured in zip(kinds, seconds)) / 2 / rate:.0%}"
        traced = dry_run["peak_gib"]
        dry_run = f"{traced:.1f}" + (f" ({traced / peak - 1:+.1%})" if peak else "")
    return [
        *(f"{value:.2f}" for value in (*seconds, (4 * seconds[0] + seconds[1]) / 5)),
        estimated,
        tflop,
        share,
        f"{peak:.1f}",
        dry_run or "",
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
    parser.add_argument("--before", type=Path, metavar="WORKTREE", help="another commit, for the cases COMPARED")
    parser.add_argument("--iterations", type=int, default=4, help="timed iterations of a case, after its warm-up")
    parser.add_argument(
        "--minutes", type=float, default=9, help="no case starts after this time, and one that runs ends"
    )
    parser.add_argument("--gib", type=float, help="use this much of the GPU's memory, as a smaller card has")
    parser.add_argument("--tiny", action="store_true", help="tiny networks at 64 px, to test this file")
    parser.add_argument("--in_process", action="store_true", help="run the first case in this process, without tables")
    return parser.parse_args(argv)


def main(argv=None) -> None:
    args = parse_args(argv)
    for folder in ("cases", "dry_runs"):
        (args.output_dir / folder).mkdir(parents=True, exist_ok=True)
    if args.in_process:
        return run_in_this_process(args.cases[0], args)
    deadline = time.monotonic() + 60 * args.minutes
    traced = dict.fromkeys(CASES[case].dry_run or case for case in args.cases if case != OPERATORS)
    missing = [case for case in traced if not (args.output_dir / "dry_runs" / f"{case}.json").exists()]
    dry_runs = [start_dry_run(case, args.output_dir, args.tiny) for case in missing]
    own = (full_size.ROOT, args.output_dir)
    for case in args.cases:
        earlier = [(args.before, args.output_dir / "before")] if args.before and case in COMPARED else []
        for root, output in (*earlier, own):
            measured = "failed" not in read_results(output / "cases").get(case, {"failed": ""})
            if measured or time.monotonic() >= deadline:
                continue
            process = start_case(case, root.resolve(), output.resolve(), args)
            try:
                process.wait(deadline - time.monotonic())
            except subprocess.TimeoutExpired:
                process.kill()
            print(report(args.output_dir), flush=True)
    for dry_run in dry_runs:
        dry_run.wait()
    print(report(args.output_dir), flush=True)


if __name__ == "__main__":
    main()
