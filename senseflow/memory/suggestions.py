# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""`--dry_run GB`: which flags make a command fit a GPU, or turn the memory that it leaves into speed.

Every suggestion is traced, in a process of its own, and keeps the global batch.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Optional

from senseflow.arguments import keep_last
from senseflow.memory.speed import CARDS, USABLE


Changes = dict[str, Optional[list]]  # {flag: its values, or None to leave it out}
PROCESSES = "processes"  # the key of their number among changes
INTERVAL = "--gradient_checkpointing_interval"


@dataclass
class Command:
    """A training command.

    Attributes:
        words: the script and its arguments.
        environment: as the launcher left it, with the launch mode, which `launch_config` removes.
    """

    words: list[str]
    environment: dict[str, str]
    processes: int

    def trace(self, changes: Changes) -> Optional[dict]:
        """Return what the changed command writes with --dry_run_output; None if it fails."""
        (processes,) = changes.get(PROCESSES, [self.processes])
        flags = {flag: values for flag, values in changes.items() if flag != PROCESSES}
        added = [str(word) for flag, values in flags.items() if values is not None for word in (flag, *values)]
        without = [flag for flag, values in flags.items() if values is None]
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "dry_run.json"
            words = keep_last([*self.words, *added, "--dry_run", "--dry_run_output", str(output)], without)
            environment = self.environment | {"WORLD_SIZE": str(processes), "RANK": "0"}
            result = subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.DEVNULL)
            return json.loads(output.read_text()) if result.returncode == 0 else None

    def describe(self, changes: Changes) -> str:
        """Return changes in words, such as "with --rank 64, without --bf16_weight_copies"."""
        given = {word.partition("=")[0] for word in self.words}
        flags = {flag: values for flag, values in changes.items() if flag != PROCESSES}
        added = [" ".join(map(str, (flag, *values))) for flag, values in flags.items() if values is not None]
        added += [f"{number} processes" for number in changes.get(PROCESSES, ())]
        without = [flag for flag, values in flags.items() if values is None and flag in given]
        parts = [f"with {' '.join(added)}"] * bool(added) + [f"without {' '.join(without)}"] * bool(without)
        return ", ".join(parts)


def gib(size: float) -> str:
    return f"{size:.2f}" if size >= 0.1 else f"{size:.5f}"


# ---------------------------------------------------------------------------------------------------------------------
# A command that does not fit
# ---------------------------------------------------------------------------------------------------------------------
def savings(args, mode: str, processes: int) -> list[Changes]:
    """Return changes that may save memory, the least costly first; a run may refuse some of them."""
    micro_batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    adapters = not mode.startswith("zero") and not args.student_model_name_or_path
    changes: list[tuple[bool, Changes]] = [
        (not args.gradient_checkpointing, {"--gradient_checkpointing": []}),
        (args.gradient_checkpointing and args.gradient_checkpointing_interval != [1, 1], {INTERVAL: [1]}),
        (args.bf16_weight_copies, {"--bf16_weight_copies": None}),
        (encodes_on_gpu(args), cache(args)),
        (encodes_on_gpu(args), {"--offload_text_encoders": []}),
        (micro_batch > 1, batch(1, micro_batch * accumulation)),
        (not args.use_8bit_adam and mode != "fsdp2", {"--use_8bit_adam": []}),
        (mode not in ("single", "ddp"), {PROCESSES: [2 * processes]}),
        (args.rank == 0 and adapters, {"--rank": [64]}),
        (args.base_quantization == "none" and adapters and mode != "fsdp2", {"--base_quantization": ["4bit"]}),
        (args.gan_weight > 0, {"--gan_weight": [0]}),
    ]
    return [change for possible, change in changes if possible]


def encodes_on_gpu(args) -> bool:
    return not (args.offload_text_encoders or args.cache_dir)


def cache(args) -> Changes:
    return {"--cache_dir": [f"{args.output_dir}/prompts"]}


def batch(size: int, accumulation: int) -> Changes:
    return {"--train_batch_size": [size], "--gradient_accumulation_steps": [accumulation]}


def suggest_savings(args, command: Command, mode: str, summary: dict) -> None:
    """Change the command until it fits --dry_run GB, and print the peak with each change; the result comes last.

    Args:
        summary: of the command as it is.
    """
    peak, usable, chosen = summary["peak_gib"], USABLE * args.dry_run, {}
    for changes in savings(args, mode, command.processes):
        if peak <= usable:
            break
        changes = {**chosen, **changes}
        traced = command.trace(changes)
        helps = traced is not None and traced["peak_gib"] < 0.99 * peak
        verdict = "fails, left out"
        if traced is not None:
            verdict = f"{gib(traced['peak_gib'])} GiB" + "; no help, left out" * (not helps)
        print(f"{command.describe(changes)}: {verdict}", flush=True)
        if helps:
            peak, chosen = traced["peak_gib"], changes
    verdict = "fits" if peak <= usable else "does not fit"
    print(f"{verdict} in {args.dry_run:g} GB {command.describe(chosen) or 'with any of these'}")


# ---------------------------------------------------------------------------------------------------------------------
# A command that fits
# ---------------------------------------------------------------------------------------------------------------------
def speedups(args, mode: str, chosen: Changes) -> Iterator[list[Changes]]:
    """Yield what may save time for memory, as alternatives, the fastest first.

    What saves the most time for the least memory comes first.

    Args:
        chosen: the changes up to now; the caller adds to them.
    """
    if encodes_on_gpu(args):
        yield [cache(args)]
    micro_batch, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    factors = [factor for factor in range(accumulation, 1, -1) if accumulation % factor == 0]
    yield [batch(factor * micro_batch, accumulation // factor) for factor in factors]
    if args.gradient_checkpointing:
        student, fake_score = args.gradient_checkpointing_interval
        yield [{INTERVAL: [student, interval]} for interval in longer(fake_score)]
    if mode == "single" and args.mixed_precision == "bf16" and args.rank == 0 and not args.bf16_weight_copies:
        yield [{"--bf16_weight_copies": []}]
    if args.gradient_checkpointing:
        fake_score = chosen.get(INTERVAL, [fake_score])[-1]
        none = {"--gradient_checkpointing": None, INTERVAL: None}
        yield [none, *({INTERVAL: [interval, fake_score]} for interval in longer(student))]
    if args.use_8bit_adam:
        yield [{"--use_8bit_adam": None}]


def longer(interval: int) -> list[int]:
    """Return intervals of gradient checkpointing that recompute less, the least first; 0 recomputes nothing."""
    return [other for other in (0, 2) if interval != 0 and (other == 0 or other > interval)]


def suggest_speed(args, command: Command, mode: str, summary: dict) -> None:
    """Change the command as long as it fits --dry_run GB and gets faster; print peak and time with each change.

    Args:
        summary: of the command as it is.
    """
    size = min((card.gib for card in CARDS.values() if card.gib >= args.dry_run), default=None)
    card = [name for name, card in CARDS.items() if size in (card.gib, None)][-1]
    before, chosen, usable = summary["seconds"][card], {}, USABLE * args.dry_run
    seconds = before
    left = gib(usable - summary["peak_gib"])
    print(f"{left} GiB of {args.dry_run:g} GB are left; an iteration takes {before:.2f} s (estimate for {card})")
    for alternatives in speedups(args, mode, chosen):
        for changes in alternatives:
            changes = {**chosen, **changes}
            traced = command.trace(changes)
            fits = traced is not None and traced["peak_gib"] <= usable
            faster = fits and traced["seconds"][card] < 0.99 * seconds
            verdict = "fails, left out"
            if traced is not None:
                reason = "" if faster else "; not faster, left out" if fits else "; does not fit"
                verdict = f"{gib(traced['peak_gib'])} GiB, {traced['seconds'][card]:.2f} s{reason}"
            print(f"{command.describe(changes)}: {verdict}", flush=True)
            if faster:
                seconds = traced["seconds"][card]
                chosen.update(changes)
            if fits:
                break
    if chosen:
        print(f"fits in {args.dry_run:g} GB {command.describe(chosen)}, an iteration in {seconds:.2f} s")
    else:
        print(f"no flag turns the memory that is left of {args.dry_run:g} GB into speed")
