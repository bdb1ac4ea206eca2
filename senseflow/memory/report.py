# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""`--dry_run`: trace a training command (senseflow.memory.trace) and print its memory, work and the cards it fits."""

import inspect
import json
import os
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from senseflow.errors import UserError, check_writable, write_atomically
from senseflow.memory.counter import GRADIENTS, HOST, KINDS, STATES, WEIGHTS, Counter, Work
from senseflow.memory.speed import CARDS, GIB, SIZES, USABLE, seconds_of
from senseflow.memory.suggestions import Command, gib, suggest_savings, suggest_speed
from senseflow.memory.trace import (
    ORDINARY,
    WITH_STUDENT,
    Trace,
    init_fake_process_group,
    largest_size,
    patch_loaders,
    trace,
)


def apply_zero(traced: Trace, mode: str, processes: int, bf16: bool) -> Trace:
    """Return the memory of a process under DeepSpeed ("zero2" or "zero3"), computed from a trace of whole networks.

    The optimizer holds float32 masters and moments of this process's part. The network computes with half-precision
    weights, which are whole or sharded (ZeRO-3), and keeps its part of the gradients.
    """
    at_peak = dict(traced.at_peak)
    for name, num_params in traced.num_params.items():
        size = 2 if bf16 and name != "discriminator" else 4
        at_peak[name, WEIGHTS] = size * num_params / (processes if mode == "zero3" else 1)
        if name != "teacher":
            at_peak[name, GRADIENTS] = size * num_params / processes
            at_peak[name, STATES] = (traced.optimizer_bytes[name] + 4 * num_params) / processes
    peak = sum(size for (owner, _), size in at_peak.items() if owner != HOST)
    masters = sum(4 * num_params for name, num_params in traced.num_params.items() if name != "teacher")
    return replace(traced, at_peak=at_peak, peak=peak, checkpoint_bytes=traced.checkpoint_bytes + masters)


def summarize(args, traced: Trace, mode: str, processes: int, encodes_first: bool) -> dict:
    """Return what is printed, and what --dry_run_output writes, as numbers by name.

    Args:
        processes: number of processes, one on each GPU.
        encodes_first: whether prompts are encoded before training.
    """
    iterations = {}
    for name, phases in traced.work.items():
        phases = {phase: work for phase, work in phases.items() if phase[0] != HOST}
        roles: dict[str, dict] = defaultdict(dict)
        for (role, activity), work in phases.items():
            roles[role][activity or "other"] = work_numbers({(role, activity): work})
        iterations[name] = {**work_numbers(phases), "roles": roles}
    with_student, share = iterations[WITH_STUDENT], 1 / args.ttur_ratio
    without = iterations.get(ORDINARY, with_student)
    seconds = {card: (1 - share) * without["seconds"][card] + share * with_student["seconds"][card] for card in CARDS}
    return {
        "mode": mode,
        "processes": processes,
        "image_size": largest_size(args),
        "peak_gib": traced.peak / GIB,
        "peak_phase": ", ".join(filter(None, traced.peak_phase)),
        "memory_gib": nested({label: size / GIB for label, size in traced.at_peak.items() if label[0] != HOST}),
        "parameters": traced.num_params,
        "host_gib": traced.encoder_bytes / GIB,
        "encodes_first": encodes_first,
        "checkpoint_gib": traced.checkpoint_bytes / GIB,
        "export_gib": traced.export_bytes / GIB,
        "fits": [name for name, card in CARDS.items() if traced.peak <= USABLE * card.gib * GIB],
        "iterations": iterations,
        "seconds": seconds,
        "hours": {card: args.max_train_steps * mean / 3600 for card, mean in seconds.items()},
    }


def work_numbers(phases: dict[tuple[str, str], Work]) -> dict:
    """Return the work of phases together, and its estimated seconds on each card."""
    work = sum(phases.values(), Work())
    return {
        "operations": round(work.operations),
        "gigabytes": work.bytes_moved / 1e9,
        "tflops": work.flops / 1e12,
        "seconds": {name: sum(seconds_of(phases, card).values()) for name, card in CARDS.items()},
    }


def nested(values: dict[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = defaultdict(dict)
    for (outer, inner), value in values.items():
        result[outer][inner] = value
    return result


def print_summary(summary: dict, args) -> None:
    """Print the tables of memory, work and time."""
    mode, processes = summary["mode"], summary["processes"]
    arithmetic = "; weights, gradients and optimizer by arithmetic" if mode.startswith("zero") else ""
    print(f"{mode}, {processes} process{'es' if processes > 1 else ''}: GiB per process at the peak{arithmetic}")
    if args.aspect_ratio_buckets:
        print("images of {} x {} pixels, the largest of --aspect_ratio_buckets".format(*summary["image_size"]))
    print(f"{'':15}" + "".join(f"{kind:>13}" for kind in KINDS))
    for owner, sizes in summary["memory_gib"].items():
        row = [sizes.get(kind, 0) for kind in KINDS]
        if sum(row) >= 0.0005 * summary["peak_gib"]:
            print(f"{owner:15}" + "".join(f"{gib(size) if size else '':>13}" for size in row))
    print(f"peak {gib(summary['peak_gib'])} GiB, in: {summary['peak_phase']}")
    stay = args.offload_text_encoders and not summary["encodes_first"]
    duration = "during the run" if stay else "while they load"
    print(f"in host memory: text encoders, {gib(summary['host_gib'])} GiB, {duration}; one tensor of other networks")
    sizes = f"a checkpoint {gib(summary['checkpoint_gib'])} GiB, the export {gib(summary['export_gib'])} GiB"
    print(f"on disk: {sizes}")
    cards = summary["fits"] or list(CARDS)
    for name, iteration in summary["iterations"].items():
        print(f"\niteration {name.replace('_', ' '):24}{'operations':>12}{'GB moved':>12}{'TFLOP':>10}")
        rows = {f"{role}, {act}": row for role, acts in iteration["roles"].items() for act, row in acts.items()}
        for label, row in (*rows.items(), ("all", iteration)):
            print(f"{label:34}{row['operations']:12,}{row['gigabytes']:12,.1f}{row['tflops']:10.1f}")
        print("estimated seconds: " + ", ".join(f"{card} {iteration['seconds'][card]:.2f}" for card in cards))
    hours = ", ".join(
        f"{card} {summary['hours'][card]:,.0f}"
        + (f" ({processes * summary['hours'][card]:,.0f} GPU-hours)" if processes > 1 else "")
        for card in cards
    )
    print(f"\nestimated hours of {args.max_train_steps:,} iterations: {hours}")
    print("These times are estimates, without data, validation, checkpoints and communication between GPUs.")


def fit(peak: float) -> str:
    """Return a line with the cards that `peak` bytes fit, and by how much they exceed the others."""
    excess = {size: peak / GIB - USABLE * size for size in SIZES}
    fits = ", ".join(str(size) for size, gib in excess.items() if gib <= 0)
    fails = ", ".join(f"{size} by {gib:.1f}" for size, gib in excess.items() if gib > 0)
    parts = [f"fits in {fits} GB"] * bool(fits) + [f"does not fit in {fails} GiB"] * bool(fails)
    return "; ".join(parts) + f" ({USABLE:.0%} of a card are assumed to be usable)"


def report(args, source, rows, models_class, make_models, train_iteration) -> None:
    """Print, in the first process, what a process of this command needs, instead of training.

    Args:
        source: the teacher's pipeline.
        rows: of the data set.
        models_class, make_models, train_iteration: those of the script. The class's file is the one that is run again
            with other flags.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    from senseflow.training.prompts import encodes_before_training
    from senseflow.training.roles import launch_config

    if args.dry_run_output:
        check_writable("--dry_run_output", Path(args.dry_run_output))
    os.environ["ACCELERATE_USE_CPU"] = "true"  # also on a machine with a GPU
    environment = dict(os.environ)
    launch = launch_config()
    mode = launch.mode if launch.mode != "replicated" else "ddp" if launch.world_size > 1 else "single"
    if mode.startswith("zero"):
        launch.mode = "replicated"  # DeepSpeed is not traced, see `apply_zero`
    encodes_first = encodes_before_training(args, rows)
    init_fake_process_group()
    counter = Counter()
    try:
        with patch_loaders(args), FakeTensorMode(allow_non_fake_inputs=True), counter:
            traced = trace(args, source, encodes_first, models_class, make_models, train_iteration, counter)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        problem = f"the result of {error.func} depends on values, and a trace has shapes only"
        raise UserError(f"--dry_run: {problem}; run this command with --max_train_steps 1 instead") from error
    if mode.startswith("zero"):
        traced = apply_zero(traced, mode, launch.world_size, args.mixed_precision == "bf16")
    summary = summarize(args, traced, mode, launch.world_size, encodes_first)
    print_summary(summary, args)
    print(fit(traced.peak))
    if args.dry_run_output:
        text = json.dumps(summary, indent=1) + "\n"
        write_atomically(Path(args.dry_run_output), lambda file: file.write_text(text))
    if args.dry_run:
        command = Command([inspect.getfile(models_class), *sys.argv[1:]], environment, launch.world_size)
        suggest = suggest_savings if traced.peak > USABLE * args.dry_run * GIB else suggest_speed
        suggest(args, command, mode, summary)
