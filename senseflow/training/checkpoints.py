# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: complete or absent, found, compared with the run that resumes from them, and removed when there are too many."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Optional, Sequence

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError

from senseflow.errors import UserError
from senseflow.models.hub import fingerprint
from senseflow.models.lora import FILE, LORA_FLAGS, adapter_of
from senseflow.training.metrics import Metrics
from senseflow.training.roles import Role, launch_config
from senseflow.training.runtime import ENDINGS, Runtime


logger = get_logger(__name__)

# What is being written, and what its successor is about to replace. Names that nobody gives a folder of his own.
INCOMPLETE, REPLACED = ".senseflow-incomplete", ".senseflow-replaced"


def checkpoints(output_dir: str) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if (p / "state.json").is_file()), key=number_of)


def number_of(checkpoint: Path) -> int:
    """The iteration in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def find_checkpoint(args) -> Optional[Path]:
    """The checkpoint that `--resume_from_checkpoint` names, None without the flag; before any model loads.

    Raises:
        UserError: exit code 2: nothing to resume from, or an output folder that holds another run.
    """
    output_dir, wanted = args.output_dir, args.resume_from_checkpoint
    here = checkpoints(output_dir)
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; give a folder", exit_code=2)
    if wanted is None:
        if here or any((Path(output_dir) / file).exists() for file in ("model_index.json", FILE)):
            fix = "choose an empty folder" + (", or --resume_from_checkpoint latest" if here else "")
            raise UserError(f"--output_dir {output_dir} holds another run: {fix}", exit_code=2)
        return None
    if wanted == "latest":
        if not here:
            raise UserError(
                f"--resume_from_checkpoint latest: no complete checkpoint in --output_dir {output_dir}; drop the flag to start",
                exit_code=2,
            )
        check_launch(here[-1])
        return here[-1]
    if wanted in [path.name for path in here]:  # as in the diffusers examples
        wanted = Path(output_dir) / wanted
    if not (Path(wanted) / "state.json").is_file():
        message = f"--resume_from_checkpoint {wanted}: not a complete checkpoint, neither a folder nor a name below --output_dir"
        raise UserError(f"{message} (no state.json)", exit_code=2)
    later = [path.name for path in here if number_of(path) > read_state(Path(wanted))["iteration"]]
    if later:
        # They would be "latest" before this run's own, and --checkpoints_total_limit would keep them instead.
        message = f"--resume_from_checkpoint {wanted}: --output_dir {output_dir} holds later ones ({', '.join(later)})"
        raise UserError(message + "; move them away, or choose another --output_dir", exit_code=2)
    check_launch(Path(wanted))
    return Path(wanted)


def check_launch(checkpoint: Path) -> None:
    """Refuses (exit code 2) a checkpoint whose optimizer state another kind of launch wrote.

    One process, DDP and FSDP2 read each other's, at any number of processes; ZeRO reads its own stage's at the same number.
    """
    made, now = read_state(checkpoint)["launch"], launch_record()
    if made != now and any(mode.startswith("zero") for mode in (made["mode"], now["mode"])):
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: made under {made['mode']} in {made['processes']} processes, and this is "
            f"{now['mode']} in {now['processes']}; DeepSpeed's state fits the same stage and number alone: launch as it was made",
            exit_code=2,
        )


def launch_record() -> dict:
    """How this run was launched, for state.json."""
    return {"mode": launch_config().mode, "processes": launch_config().world_size}


def read_state(checkpoint: Path) -> dict:
    """state.json of a checkpoint: iteration, samples_seen, args, fingerprint, launch. UserError (exit code 2) where it is cut."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not {"iteration", "samples_seen", "args", "fingerprint", "launch"} <= set(state):
            raise ValueError("incomplete")
        return state
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--resume_from_checkpoint {checkpoint}: state.json is damaged; use another one", exit_code=2
        ) from error


def fingerprints_of(models) -> dict[str, Any]:
    """What stored state belongs to, of a script's `TrainingModels`: the frozen networks, the adapters, and the kind of optimizer."""
    fingerprints = {"teacher": models.teacher_fingerprint, "optimizer": type(models.student.optimizer).__name__}
    fingerprints |= adapter_of(models.student.module)
    if models.discriminator is not None:
        fingerprints["discriminator_backbone"] = (
            f"{fingerprint(models.vision_features)} {models.vision_features.layers}"
        )
        fingerprints["discriminator_resolution"] = models.vision_features.resolution
        fingerprints["discriminator_text_encoder"] = fingerprint(models.text_features)
    return fingerprints


def compare_with_checkpoint(checkpoint: Path, state: dict, args, fingerprints: dict, roles: Sequence[Role]) -> None:
    """Refuses stored state that this run cannot use; lists every other changed flag in one log line.

    Raises:
        UserError: another teacher, another optimizer, or a network that the checkpoint does not hold.
    """
    for role in roles:
        if not (checkpoint / role.subfolder).is_dir():
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: holds no {role.name}, which --gan_weight {args.gan_weight} needs; "
                "resume with --gan_weight 0 or start anew"
            )
    given, stored = args.base_quantization, state["args"].get("base_quantization", "none")
    if given != stored:
        fix = "give that, or start in a new --output_dir"
        raise UserError(f"--base_quantization {given}: {checkpoint} was made with {stored}; {fix}")
    for name, value in fingerprints.items():
        if state["fingerprint"].get(name) != value:
            if name in LORA_FLAGS:
                given, stored = getattr(args, name), state["args"].get(name)
                if isinstance(given, list):
                    given, stored = " ".join(given), " ".join(stored or [])
                raise UserError(
                    f"--{name} {given}: {checkpoint} was made with {stored}; give that, or start in a new --output_dir"
                )
            raise UserError(
                f"--resume_from_checkpoint {checkpoint}: made with another {name}; give the {name} it was made with, "
                "or start in a new --output_dir"
            )
    if state["args"].get("pretrained_model_name_or_path") == args.pretrained_model_name_or_path:
        for name in ("revision", "variant"):  # of what is not trained, too; a folder has no revision
            stored, given = state["args"].get(name), getattr(args, name)
            if stored != given and (stored or name == "variant"):
                fix = f"give --{name} {stored}" if stored else f"drop --{name}"
                raise UserError(
                    f"--{name} {given}: {checkpoint} was made with {stored}; {fix}, or start in a new --output_dir"
                )
    ignored = {"resume_from_checkpoint", "output_dir"}
    # The stored student is what goes on: how this run's would have started does not matter any more.
    ignored |= {"student_model_name_or_path", *(() if args.rank else ("student_guidance_scale",))}
    changed = [
        f"--{name} {state['args'].get(name)} -> {value}"
        for name, value in vars(args).items()
        if name not in ignored and state["args"].get(name) != value
    ]
    logger.info(
        f"resuming from {checkpoint} at iteration {state['iteration']}; changed: {', '.join(changed) or 'nothing'}"
    )


def check_disk(args, roles: Iterable[Role]) -> None:
    """Before training: refuses a run whose next checkpoint does not fit on the disk of --output_dir (exit code 1)."""
    each = 2 if args.use_8bit_adam else 8  # two Adam moments
    each += 4 if launch_config().mode.startswith("zero") else 0  # the masters, beside the weights
    size = sum(role.weight_bytes + each * role.num_trained_params for role in roles)
    free = shutil.disk_usage(args.output_dir).free
    if free < size:
        raise UserError(
            f"--output_dir {args.output_dir}: a checkpoint takes {size / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; "
            "free some space or choose another disk"
        )


def save_checkpoint(
    runtime: Runtime, iteration: int, samples_seen: int, fingerprints: dict, extras: Callable[[Path], None]
) -> None:
    """Writes checkpoint-{iteration}/ aside and renames it when complete, then drops what --checkpoints_total_limit allows.

    Args:
        iteration: iterations done.
        samples_seen: the position in the data.
        prints: fingerprints of the frozen networks and the optimizer, checked on resume.
        extras: writes what makes the student usable as it stands (scheduler, senseflow.json); main process only.
    """
    args, main = runtime.args, runtime.accelerator
    for role in runtime.trained:
        role.check_finite()
    final = Path(args.output_dir) / f"checkpoint-{iteration}"
    aside = final.with_name(final.name + INCOMPLETE)
    with writing(aside):
        if main.is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        main.wait_for_everyone()
        for role in runtime.trained:
            role.save(aside)
        main.wait_for_everyone()
        if main.is_main_process:
            extras(aside)
            state = {
                "iteration": iteration,
                "samples_seen": samples_seen,
                "args": vars(args),
                "fingerprint": fingerprints,
            }
            state["launch"] = launch_record()
            (aside / "state.json").write_text(json.dumps(state, indent=1))
            replace_folder(aside, final)
            if args.checkpoints_total_limit is not None:
                for old in checkpoints(args.output_dir)[: -args.checkpoints_total_limit]:
                    discard(old)
        main.wait_for_everyone()
    runtime.saved = iteration


def check_finished(runtime: Runtime, metrics: Metrics, iteration: int) -> None:
    """Ends a run that something stopped, after its checkpoint; a signal that came in the last iteration has stopped nothing.

    Raises:
        UserError: exit code 130 after Ctrl-C, 143 after SIGTERM, 1 with what a process' data ended with.
    """
    args = runtime.args
    if metrics.ended_by == "failure":
        reason = gather_object([str(metrics.failure)] if metrics.failure else [])[0]
        raise UserError(f"{reason}, {runtime.last_checkpoint()}", everywhere=True)
    if iteration < args.max_train_steps:
        what = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM"}[metrics.ended_by]
        message = f"stopped by {what}; checkpoint-{iteration} in {args.output_dir} is complete: go on with"
        raise UserError(
            f"{message} --resume_from_checkpoint latest", exit_code=ENDINGS[metrics.ended_by], everywhere=True
        )


@contextmanager
def writing(aside: Path):
    """Turns a full disk, or another that cannot be written to, into a UserError; what was written so far is removed."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        shutil.rmtree(aside, ignore_errors=True)
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--output_dir {aside.parent}: {aside.name.removesuffix(INCOMPLETE)} could not be written ({reason}); what was there "
            "before is intact: free some space, then --resume_from_checkpoint latest"
        ) from error


def discard(folder: Path) -> None:
    """Removes a folder; renamed first, so that half of it is never taken for the whole."""
    aside = folder.with_name(folder.name + REPLACED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def clear_leftovers(output_dir: str) -> None:
    """Removes what a killed run left half-written, and puts back what it had moved aside for a successor that never came."""
    for old in Path(output_dir).glob(f"*{REPLACED}"):
        final = old.with_name(old.name.removesuffix(REPLACED))
        if not re.fullmatch(r"checkpoint-\d+", final.name) and not final.exists():
            os.rename(old, final)
    for suffix in (INCOMPLETE, REPLACED):
        for folder in Path(output_dir).glob(f"*{suffix}"):
            shutil.rmtree(folder)


def replace_folder(new: Path, final: Path) -> None:
    """Renames `new` to `final`; what stood there before is removed only after."""
    old = final.with_name(final.name + REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(new, final)
    shutil.rmtree(old, ignore_errors=True)


def publish_folder(aside: Path, final: Path, last: str) -> None:
    """Moves every entry of `aside` into the existing folder `final`, `last` (the file that makes it count) at the end."""
    for entry in sorted(aside.iterdir(), key=lambda p: p.name == last):
        target = final / entry.name
        if entry.is_dir():
            replace_folder(entry, target)
        else:
            os.replace(entry, target)
    aside.rmdir()
