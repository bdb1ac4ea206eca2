# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""`--dry_run`: what a training command takes of a GPU, before it has one. The run itself is senseflow.memory.trace's."""

import os
import re
import subprocess
import sys
from collections import defaultdict
from typing import Any, Optional, Sequence

from torch._subclasses.fake_tensor import FakeTensorMode
from tqdm.auto import tqdm

from senseflow.memory.counter import GRADIENTS, HOST, KINDS, STATES, WEIGHTS, Counter
from senseflow.memory.trace import init_fake_process_group, patch_loaders, trace


GIB = 2**30
CARDS = (24, 40, 48, 80, 141)  # GiB of memory, nearly: what a card is called by
USABLE = 0.93  # of it, assumed: the rest is the driver's context, the kernels' workspaces and fragments
MORE = "twice as many processes"


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------
def under_zero(found: dict[str, Any], mode: str, processes: int, half: bool) -> dict[str, Any]:
    """What the trace of whole networks says of DeepSpeed, by arithmetic: `found`, changed.

    The optimizer owns float32 masters and moments of this process's part; the network computes with weights in half precision,
    whole, or shared out (ZeRO-3), and keeps its part of the gradients.
    """
    at_peak = dict(found["at_peak"])
    for name, numbers in found["numbers"].items():
        size = 4 if name == "discriminator" or not half else 2
        at_peak[name, WEIGHTS] = size * numbers / (processes if mode == "zero3" else 1)
        if name != "teacher":
            at_peak[name, GRADIENTS] = size * numbers / processes
            at_peak[name, STATES] = (found["states"][name] + 4 * numbers) / processes
    return found | {"at_peak": at_peak, "peak": sum(size for (owner, _), size in at_peak.items() if owner != HOST)}


def gib(size: float) -> str:
    return f"{size / GIB:.2f}" if size >= 0.1 * GIB else f"{size / GIB:.5f}"


def tell(found: dict[str, Any], mode: str, processes: int) -> None:
    """Prints the tables."""
    arithmetic = "; weights, gradients and optimizer by arithmetic" if mode.startswith("zero") else ""
    print(f"{mode}, {processes} process{'es' if processes > 1 else ''}: GiB per process at the peak{arithmetic}")
    print(f"{'':15}" + "".join(f"{kind:>13}" for kind in KINDS))
    for owner in dict.fromkeys(owner for owner, _ in found["at_peak"] if owner != HOST):
        row = [found["at_peak"].get((owner, kind), 0) for kind in KINDS]
        if sum(row) >= 0.0005 * found["peak"]:
            print(f"{owner:15}" + "".join(f"{gib(size) if size else '':>13}" for size in row))
    print(f"peak {gib(found['peak'])} GiB, in: {', '.join(filter(None, found['where']))}")
    for_good = "for good" if found["at_peak"].get((HOST, WEIGHTS)) else "while they are loaded"
    print(
        f"in the host's memory: text encoders, {gib(found['encoders'])} GiB, {for_good}; of other networks a tensor at a time"
    )
    print(f"on disk: a checkpoint {gib(found['checkpoint'])} GiB, the export {gib(found['export'])} GiB")
    for stage, flops in found["flops"].items():
        by_owner: dict[str, float] = defaultdict(float)
        for (owner, _), count in flops.items():
            by_owner[owner] += count / 1e12
        shown = ", ".join(f"{owner} {count:.1f}" for owner, count in by_owner.items() if count >= 0.05)
        print(f"{stage}: {sum(by_owner.values()):.1f} TFLOP ({shown})")


def verdict(peak: float) -> str:
    """The line of the cards that `peak` bytes fit, and by how much they do not fit the others."""
    over = {card: peak / GIB - USABLE * card for card in CARDS}
    fits = ", ".join(str(card) for card, more in over.items() if more <= 0)
    fails = ", ".join(f"{card} by {more:.1f}" for card, more in over.items() if more > 0)
    said = [f"fits in {fits} GB"] * bool(fits) + [f"does not fit in {fails} GiB"] * bool(fails)
    return "; ".join(said) + f" (of a card {USABLE:.0%} are counted on)"


def candidates(args, mode: str) -> list[tuple[list[str], Sequence[str]]]:
    """What could be added to a command line that does not fit, the cheapest first: (flags, flags without use beside them).

    What is offered may be refused beside others; then it is passed over.
    """
    batch, rounds = args.train_batch_size, args.gradient_accumulation_steps
    adapters = not mode.startswith("zero") and not args.student_model_name_or_path
    of_gan = ("learning_rate_disc", "discriminator_backbone", "discriminator_layers", "discriminator_text_encoder")
    of_gan += ("discriminator_resolution", "classifier_weight")
    offered = [
        (not args.gradient_checkpointing, ["--gradient_checkpointing"], ()),
        (not args.offload_text_encoders, ["--offload_text_encoders"], ()),
        (batch > 1, ["--train_batch_size", "1", "--gradient_accumulation_steps", str(batch * rounds)], ()),
        (not args.use_8bit_adam and mode != "fsdp2", ["--use_8bit_adam"], ()),
        (mode not in ("single", "ddp"), [MORE], ()),
        (args.rank == 0 and adapters, ["--rank", "64"], ()),
        (args.base_quantization == "none" and adapters and mode != "fsdp2", ["--base_quantization", "4bit"], ()),
        (args.gan_weight > 0, ["--gan_weight", "0"], of_gan),
    ]
    return [(flags, useless) for there, flags, useless in offered if there]


def traced_with(command: list[str], processes: int) -> Optional[float]:
    """The peak, in bytes, of a command line with `--dry_run`, traced in a process of its own; None where it is refused there."""
    environment = {**os.environ, "WORLD_SIZE": str(processes), "RANK": "0"}
    result = subprocess.run(
        [sys.executable, *command, "--dry_run"], env=environment, stdout=subprocess.PIPE, text=True
    )
    found = re.search(r"^peak ([\d.]+) GiB", result.stdout, re.MULTILINE)
    return float(found[1]) * GIB if found and result.returncode == 0 else None


def suggest(args, command: list[str], mode: str, processes: int, peak: float, card: float) -> None:
    """Adds flags to the command, one after the other, until it fits the card; prints the peak of each, and the last line."""
    added: list[str] = []
    for flags, useless in candidates(args, mode):
        if peak <= USABLE * card * GIB:
            break
        more = processes * 2 if flags == [MORE] else processes
        tried = without(command, useless) + ([] if flags == [MORE] else flags)
        found = traced_with(tried, more)
        what = f"{more} processes" if flags == [MORE] else " ".join(flags)
        better = found is not None and found < 0.99 * peak
        said = (
            "refused, left out"
            if found is None
            else f"{found / GIB:.2f} GiB" + ("" if better else "; no help, left out")
        )
        print(f"with {' '.join([*added, what])}: {said}", flush=True)
        if better:
            command, processes, peak, added = tried, more, found, [*added, what]
    print(
        f"{'fits' if peak <= USABLE * card * GIB else 'does not fit'} in {card:g} GB with {' '.join(added) or 'what was tried'}"
    )


def without(command: list[str], names: Sequence[str]) -> list[str]:
    """A command line without some flags and their values."""
    kept, skips = [], False
    for word in command:
        if word.startswith("--"):
            skips = word[2:].split("=")[0] in names
        if not skips:
            kept.append(word)
    return kept


def report(args, source, models_class, make_models, train_iteration) -> None:
    """Print, in the first process, how much memory a process of this command takes, instead of training.

    Args:
        source: the teacher's pipeline.
        models_class, make_models, train_iteration: the script's own.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    from senseflow.training.roles import launch_config

    os.environ["ACCELERATE_USE_CPU"] = "true"  # where there is a GPU, too
    launch = launch_config()
    mode = launch.mode if launch.mode != "replicated" else "ddp" if launch.world_size > 1 else "single"
    processes = launch.world_size
    if mode.startswith("zero"):
        launch.mode = "replicated"
    init_fake_process_group()
    counter, bar = Counter(), tqdm(total=100, desc="dry run")
    with patch_loaders(args), FakeTensorMode(allow_non_fake_inputs=True), counter:
        found = trace(args, source, models_class, make_models, train_iteration, counter, bar)
    bar.close()
    if mode.startswith("zero"):
        found = under_zero(found, mode, processes, args.mixed_precision == "bf16")
    tell(found, mode, processes)
    print(verdict(found["peak"]))
    if args.dry_run and found["peak"] > USABLE * args.dry_run * GIB:
        command = [make_models.__code__.co_filename, *without(sys.argv[1:], ["dry_run"])]
        suggest(args, command, mode, processes, found["peak"], args.dry_run)
