# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Everything a GPU can say within nine minutes: the scripts' own loops at full size, on random weights; no network is needed.

    python benchmarks/gpu.py --output_dir OUT                         # all cases, one after the other
    python benchmarks/gpu.py --output_dir OUT --cases sdxl flux-rank  # some
    python benchmarks/gpu.py --output_dir OUT --tiny                  # tiny networks, on a CPU too: does it run?

A case is a training command (bf16, gradient checkpointing, 1024 px, batch 1, accumulation 1, every term on) whose `main` runs as it
stands; what it would write is left out. Iterations are timed by CUDA events, by role too; one of the student's turns and one other
are counted in FLOPs; the same command with --dry_run is traced on the CPU beside it. OUT/gpu.json and OUT/gpu.md hold what has run;
cases that have not are "not measured".
"""

import argparse
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Optional

import full_size
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


ROOT = Path(__file__).resolve().parents[1]
EIGHT_BIT = ["--use_8bit_adam"]
# {case: (teacher, flags, configuration of accelerate_configs/)}; what costs most to be left out comes first
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
OPERATORS, TURN = "operators", "student's turn"
TTUR = 2  # a student's turn every second iteration; the table says what that makes at the recipe's 5
GIB, WARM_UP = 2**30, 2


class SignalMonitor:
    """Seconds of named parts, by CUDA events where there is a GPU; nothing waits until `seconds` is asked for."""

    def __init__(self):
        self.spans: dict[str, list] = defaultdict(list)

    def now(self):
        if not torch.cuda.is_available():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def part(self, name: str):
        start = self.now()
        yield
        self.spans[name].append((start, self.now()))

    def seconds(self) -> dict[str, list[float]]:
        if not torch.cuda.is_available():
            return {name: [end - start for start, end in spans] for name, spans in self.spans.items()}
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1000 for start, end in spans] for name, spans in self.spans.items()}


def watched(owner, name: str, watch: SignalMonitor, label) -> None:
    """Has every call of `owner.name` timed under `label`, a text or a function of the call's first argument."""
    function = getattr(owner, name)

    def timed(*args, **kwargs):
        with watch.part(label(args[0]) if callable(label) else label):
            return function(*args, **kwargs)

    setattr(owner, name, timed)


def write_data(folder: Path, resolution: int) -> Path:
    """Eight images of noise and their prompts."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rows, noise = {"keys": [], "image_paths": [], "prompts": []}, np.random.default_rng(0)
    for index in range(8):
        size = (resolution, resolution, 3)
        Image.fromarray(noise.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{index}.jpg")
        for name, value in zip(rows, (str(index), f"{index}.jpg", f"a red square number {index}")):
            rows[name].append(value)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def command_of(case: str, folder: Path, tiny: bool, iterations: int) -> tuple[str, list[str]]:
    """(script, its flags) of a case; writes what they name."""
    teacher, flags, _ = CASES[case]
    kind = full_size.TEACHERS[teacher][2]
    full_size.write(teacher, folder / teacher, tiny)
    full_size.write("discriminator", folder / "discriminator", tiny)
    resolution = 64 if tiny else 1024
    command = ["--pretrained_model_name_or_path", str(folder / teacher), "--resolution", str(resolution)]
    command += [
        "--dataset_json",
        str(write_data(folder / "data", resolution)),
        "--output_dir",
        str(folder / "out" / case),
    ]
    if "dmd2" not in flags:
        command += ["--discriminator_backbone", str(folder / "discriminator" / "dinov2")]
        command += ["--discriminator_text_encoder", str(folder / "discriminator" / "clip")]
    command += ["--mixed_precision", "bf16", "--gradient_checkpointing", "--train_batch_size", "1"]
    command += ["--gradient_accumulation_steps", "1", "--max_train_steps", str(iterations), "--ttur_ratio", str(TTUR)]
    command += ["--checkpointing_steps", "1000000", "--report_to", "none", "--dataloader_num_workers", "0", *flags]
    return f"train_senseflow_{kind}", command


@contextmanager
def launched_under(configuration: str):
    """The environment that `accelerate launch` of one process would make of a configuration."""
    extra = {}
    if configuration != "single":
        extra = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    if configuration == "fsdp2":
        extra |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
    if configuration.startswith("zero"):
        extra |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": configuration[-1]}
    before = dict(os.environ)
    os.environ.update(extra)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_case(case: str, folder: Path, tiny: bool, iterations: int, gib: Optional[float] = None) -> dict:
    """One case from its arguments to its last iteration, with `gib` GiB of the GPU's memory or all of it."""
    name, command = command_of(case, folder, tiny, iterations)
    script = importlib.import_module(name)
    from senseflow.models.discriminator import VisionFeatures
    from senseflow.training.roles import Role

    watch, gpu = SignalMonitor(), torch.cuda.is_available()
    if gpu and gib:
        torch.cuda.set_per_process_memory_fraction(gib * GIB / torch.cuda.get_device_properties(0).total_memory)
    result = {"case": case, "device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__}
    rows, flops = [], {}
    watched(Role, "__call__", watch, lambda role: f"{role.name} forward")
    watched(Role, "backward", watch, lambda role: f"{role.name} backward")
    watched(VisionFeatures, "forward", watch, "DINOv2 forward")
    watched(AutoencoderKL, "decode", watch, "VAE decode")
    watched(AutoencoderKL, "encode", watch, "VAE encode")
    for kind in (Role, *Role.__subclasses__()):
        if "step" in vars(kind):
            watched(kind, "step", watch, lambda role: f"{role.name} step")
    train_iteration = script.train_iteration

    def timed_iteration(iteration, *args):
        if iteration == 0:
            result["loading"] = peaks(gpu)
        counted = gib is None and iteration >= iterations - TTUR  # counting takes memory by itself
        if iteration == iterations - TTUR:
            result["peak"] = peaks(
                gpu
            )  # before FLOPs are counted, for which tensors are kept that are freed otherwise
        counter = FlopCounterMode(display=False) if counted else nullcontext()
        spans = {label: len(spans) for label, spans in watch.spans.items()}
        with counter, watch.part("iteration"):
            values, panel = train_iteration(iteration, *args)
        student = "dmd_loss" in values
        if counted:
            flops[TURN if student else "other"] = counter.get_total_flops() / 1e12
        numbers = {label: value.detach() for label, value in values.items()}
        rows.append((student, iteration < WARM_UP, counted, spans, numbers))
        print(f"{time.strftime('%H:%M:%S')} {case}: iteration {iteration + 1} of {iterations}", flush=True)
        return values, panel

    script.train_iteration = timed_iteration
    script.export = lambda *args, **kwargs: None
    script.check_disk = lambda *args, **kwargs: None
    with launched_under(CASES[case][2]), full_size.random_weights("cuda" if gpu else None):
        script.main(command)
    result |= {"tflop": flops, "iterations": []}
    seconds = watch.seconds()
    for number, (student, warm, counted, first, numbers) in enumerate(rows):
        last = rows[number + 1][3] if number + 1 < len(rows) else {}
        models = {
            label: sum(times[first.get(label, 0) : last.get(label, len(times))]) for label, times in seconds.items()
        }
        kept = {
            "student": student,
            "timed": not warm and not counted,
            "seconds": models.pop("iteration"),
            "models": models,
        }
        result["iterations"].append(kept | {"values": {label: float(value) for label, value in numbers.items()}})
    return result


def foretold(case: str, output: Path, tiny: bool) -> subprocess.Popen:
    """Has the command of a case traced with --dry_run, beside the others; what it prints goes to OUT/cases/CASE.txt."""
    (output / "cases").mkdir(parents=True, exist_ok=True)
    script, command = command_of(case, output / "traced" / case, tiny, TTUR)
    with launched_under(CASES[case][2]):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output / "cases" / f"{case}.txt", "w") as said:
        return subprocess.Popen(
            [sys.executable, ROOT / f"{script}.py", *command, "--dry_run"], env=environment, stdout=said
        )


def peaks(gpu: bool) -> dict:
    """Peak GiB since the last call: allocated, reserved; of the host, since the start."""
    import resource

    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = {"host": host}
    if gpu:
        found |= {
            "allocated": torch.cuda.max_memory_allocated() / GIB,
            "reserved": torch.cuda.max_memory_reserved() / GIB,
        }
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return found


def timed(function, repeat: int = 10) -> float:
    """Seconds of one call, the mean of some after three."""
    for _ in range(3):
        function()
    watch = SignalMonitor()
    with watch.part("all"):
        for _ in range(repeat):
            function()
    return watch.seconds()["all"][0] / repeat


def run_operators(tiny: bool) -> dict:
    """The card's own rate of bf16 matrix products, and attention forward and backward at the teachers' shapes, by backend."""
    device, size = ("cuda" if torch.cuda.is_available() else "cpu"), 64 if tiny else 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    result = {"case": OPERATORS, "device": name, "torch": torch.__version__, "attention": []}
    result["matmul_tflops"] = 2 * size**3 / timed(lambda: a @ b) / 1e12
    shapes = {
        "FLUX": (24, 4608, 128),
        "SD 3.5 Large": (38, 4429, 64),
        "SDXL, 64 x 64": (10, 4096, 64),
        "DINOv2": (16, 5330, 64),
    }
    attentions = {
        kind.name.lower(): attention_of(kind) for kind in list(SDPBackend.__members__.values()) if kind.value >= 0
    }
    attentions |= optional_attentions()
    for where, (heads, length, width) in shapes.items():
        q, k, v, g = (
            torch.randn(1, heads, 64 if tiny else length, width, device=device, dtype=torch.bfloat16) for _ in range(4)
        )
        flops = 2 * 2 * heads * q.shape[2] ** 2 * width * 3.5 / 1e12  # forward, and 2.5 times that backward
        for kind, attend in attentions.items():
            tensors = [t.clone().requires_grad_() for t in (q, k, v)]
            row = {"shape": where, "backend": kind}
            try:
                seconds = timed(lambda tensors=tensors, attend=attend, g=g: attend(*tensors).backward(g))
                finite = all(bool(t.grad.isfinite().all()) for t in tensors)
                row |= {"ms": 1000 * seconds, "tflops": flops / seconds, "finite": finite}
            except Exception as error:  # a backend that does not take this shape, or is not there
                row["failed"] = reason(error)
            result["attention"].append(row)
    return result


def attention_of(kind):
    def attend(q, k, v):
        with sdpa_kernel(kind):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    return attend


def optional_attentions() -> dict:
    """Attention (B, heads, length, width) of packages that may be there."""
    found = {}
    try:
        from xformers.ops import memory_efficient_attention

        found["xformers"] = lambda *qkv: memory_efficient_attention(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)
    except ImportError:
        pass
    try:
        from flash_attn import flash_attn_func

        found["flash-attn"] = lambda *qkv: flash_attn_func(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)
    except ImportError:
        pass
    return found


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


def keep(case: str, output: Path, function, *args) -> None:
    """Runs a case and writes what it found, or why it found nothing."""
    start = time.time()
    try:
        result = function(*args)
    except BaseException as error:
        traceback.print_exc()
        result = {"case": case, "failed": reason(error)}
    result["case_seconds"] = time.time() - start
    (output / "cases").mkdir(parents=True, exist_ok=True)
    (output / "cases" / f"{case}.json").write_text(json.dumps(result, indent=1))


# ---------------------------------------------------------------------------------------------------------------------
# The tables
# ---------------------------------------------------------------------------------------------------------------------
def report(output: Path) -> str:
    """Writes gpu.json and gpu.md of what has run; returns the latter."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted((output / "cases").glob("*.json"))}
    (output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    operators = found.get(OPERATORS, {})
    rate = operators.get("matmul_tflops")
    lines = []
    if rate:
        lines += [
            f"{operators['device']}, torch {operators['torch']}; bf16 matrix products of 8192: {rate:.0f} TFLOP/s.",
            "",
        ]
    lines += [
        "| case | other iteration, s | student's turn, s | s / iteration at ttur 5 | TFLOP, other / student's | of the matmul rate "
    ]
    lines[-1] += "| peak GiB | traced | reserved | loading GiB | losses finite |"
    lines += ["|---" * 11 + "|"]
    for case in CASES:
        result, said = found.get(case), output / "cases" / f"{case}.txt"
        traced = re.search(r"^peak ([\d.]+) GiB", said.read_text() if said.exists() else "", re.MULTILINE)
        if result is None or "failed" in result:
            lines.append(f"| {case} | {'not measured' if result is None else result['failed']} |" + " |" * 9)
            continue
        timed = [row for row in result["iterations"] if row["timed"]]
        other, student = (mean([row["seconds"] for row in timed if row["student"] == turn]) for turn in (False, True))
        tflop = result["tflop"]
        share = ""
        if rate and {"other", TURN} <= tflop.keys():
            share = f"{(tflop['other'] / other + tflop[TURN] / student) / 2 / rate:.0%}"
        finite = all(
            value == value and abs(value) != float("inf")
            for row in result["iterations"]
            for value in row["values"].values()
        )
        peak, loading = result["peak"], result["loading"]
        lines.append(
            f"| {case} | {other:.2f} | {student:.2f} | {(4 * other + student) / 5:.2f} | "
            f"{tflop.get('other', 0):.0f} / {tflop.get(TURN, 0):.0f} | {share} | "
            f"{peak.get('allocated', 0):.1f} | {traced[1] if traced else ''} | "
            f"{peak.get('reserved', 0):.1f} | {loading.get('allocated', 0):.1f} | "
            f"{'yes' if finite else 'NO'} |"
        )
    lines += ["", "Seconds by role, mean of the timed iterations of each kind (other / student's turn):", ""]
    for case, result in found.items():
        if "iterations" not in result:
            continue
        timed = [row for row in result["iterations"] if row["timed"]]
        cells = []
        for part in sorted({part for row in timed for part in row["models"]}):
            both = [
                mean([row["models"].get(part, 0) for row in timed if row["student"] == turn]) for turn in (False, True)
            ]
            cells.append(f"{part} {both[0]:.2f} / {both[1]:.2f}")
        lines.append(f"- {case}: {'; '.join(cells)}")
    if operators.get("attention"):
        lines += [
            "",
            "| attention, forward and backward | backend | ms | TFLOP/s | gradients finite |",
            "|---" * 5 + "|",
        ]
        for row in operators["attention"]:
            cells = (
                [row["failed"], "", ""]
                if "failed" in row
                else [f"{row['ms']:.2f}", f"{row['tflops']:.0f}", str(row["finite"])]
            )
            lines.append(f"| {row['shape']} | {row['backend']} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    (output / "gpu.md").write_text(text)
    return text


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--cases", nargs="+", choices=[OPERATORS, *CASES], default=[OPERATORS, *CASES])
    parser.add_argument(
        "--iterations",
        type=int,
        default=8,
        help=f"of a case, of which the first {WARM_UP} and last {TTUR} are not timed",
    )
    parser.add_argument("--minutes", type=float, default=9, help="no case is begun after this time")
    parser.add_argument("--gib", type=float, help="of the GPU's memory, as if the card had no more; default: all")
    parser.add_argument("--here", action="store_true", help="the first case, in this process, and no tables")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny networks at 64 px: whether this runs, not what it costs"
    )
    args = parser.parse_args(argv)
    start, output = time.monotonic(), args.output_dir
    if args.here:
        how = (run_operators, args.tiny)
        if args.cases != [OPERATORS]:
            how = (run_case, args.cases[0], output / "folder", args.tiny, args.iterations, args.gib)
        return keep(args.cases[0], output, *how)
    traces = [foretold(case, output, args.tiny) for case in args.cases if case != OPERATORS]
    for case in args.cases:
        if time.monotonic() - start > 60 * args.minutes:
            break
        command = [
            sys.executable,
            __file__,
            "--here",
            "--cases",
            case,
            "--output_dir",
            output,
            "--iterations",
            args.iterations,
        ]
        command += ["--gib", args.gib] if args.gib else []
        subprocess.run([str(part) for part in command] + ["--tiny"] * args.tiny)
        print(report(output), flush=True)
    for trace in traces:
        trace.wait()
    print(report(output), flush=True)


if __name__ == "__main__":
    main()
