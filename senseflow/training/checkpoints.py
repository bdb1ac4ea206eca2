# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Write checkpoints that are complete or absent, resume from them, and export the student."""

import errno
import json
import os
import re
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from accelerate.logging import get_logger
from accelerate.utils import gather_object
from safetensors import SafetensorError

from senseflow.arguments import torch_dtype
from senseflow.errors import UserError
from senseflow.models.lora import FILE, LORA_FLAGS
from senseflow.student_config import make_student_config, write_student_config
from senseflow.training.export import (
    export_adapter,
    export_pipeline,
    teacher_files,
    write_adapter_files,
    write_pipeline_files,
)
from senseflow.training.hub_upload import create_hub_repo, upload_export
from senseflow.training.metrics import Metrics
from senseflow.training.models import TrainingModels
from senseflow.training.roles import launch_config
from senseflow.training.runtime import ENDINGS, Runtime


logger = get_logger(__name__)

# Suffixes of a folder that is being written, and of one that is about to be replaced.
INCOMPLETE, REPLACED = ".senseflow-incomplete", ".senseflow-replaced"
GIB = 2**30


class Checkpointer:
    """Save, resume and export a run.

    Args:
        args: the command line.
        runtime, models: of the run.
        scheduler: what the student is exported with.
        pipeline_kwargs: of the stock call that visits the trained noise levels.
        data: fingerprint of the rows; a resumed run logs another one.
    """

    def __init__(self, args, runtime: Runtime, models: TrainingModels, scheduler, pipeline_kwargs: dict, data: str):
        self.args, self.runtime, self.models, self.pipeline_kwargs = args, runtime, models, pipeline_kwargs
        self.data = data
        self.extra_components = {"scheduler": scheduler, **models.extra_components}
        self.teacher_files = {} if args.rank else teacher_files(models, self.extra_components)
        self.fingerprints = models.fingerprints()
        self.exported: list[str] = []  # names in --output_dir, in the main process

    def resume(self) -> tuple[int, int]:
        """Load the checkpoint to resume from, if any. Return (iterations done, samples seen).

        Raises:
            UserError: a checkpoint that this run cannot continue; an export that cannot be written; too little space;
                a repository on the Hub that cannot be created.
        """
        checkpoint = find_checkpoint(self.args)
        state = read_state(checkpoint) if checkpoint else {"iteration": 0, "samples_seen": 0}
        if checkpoint:
            self._check_compatible(checkpoint, state)
            for role in self.runtime.trained:
                role.load(checkpoint)
                role.check_finite(f"--resume_from_checkpoint {checkpoint}: ")
        if self.runtime.accelerator.is_main_process:
            remove_leftovers(self.args.output_dir)
            if self.args.push_to_hub:
                create_hub_repo(self.args)
            self._check_export(state["iteration"])
            self._check_disk(state["iteration"])
        self.runtime.saved = state["iteration"]
        return state["iteration"], state["samples_seen"]

    def save(self, iteration: int, samples_seen: int, signals: Optional[dict] = None) -> None:
        """Write checkpoint-{iteration} aside and rename it when complete, then drop old ones. All processes call it.

        Args:
            iteration: iterations done.
            samples_seen: position in the data.
            signals: of the last validation images, for validation.json.
        """
        accelerator = self.runtime.accelerator
        for role in self.runtime.trained:
            role.check_finite()
        final = Path(self.args.output_dir) / f"checkpoint-{iteration}"
        aside = final.with_name(final.name + INCOMPLETE)
        with writing(aside):
            if accelerator.is_main_process:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir(parents=True)
            accelerator.wait_for_everyone()
            for role in self.runtime.trained:
                role.save(aside)
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                for name, component in self.extra_components.items():
                    component.save_pretrained(aside / name)
                write_student_config(aside, self._student_config(iteration))
                if signals:
                    (aside / "validation.json").write_text(json.dumps(signals, indent=1))
                state = {"iteration": iteration, "samples_seen": samples_seen, "args": self._recorded_args()}
                state |= {"fingerprint": self.fingerprints, "launch": launch_record(), "data": self.data}
                (aside / "state.json").write_text(json.dumps(state, indent=1))
                replace_folder(aside, final)
                if self.args.checkpoints_total_limit is not None:
                    for old in list_checkpoints(self.args.output_dir)[: -self.args.checkpoints_total_limit]:
                        remove_folder(old)
            accelerator.wait_for_everyone()
        logger.info(f"saved {final}")
        self.runtime.saved = iteration

    def check_finished(self, metrics: Metrics, iteration: int) -> None:
        """Exit a run that was interrupted before its last iteration; its checkpoint has been saved.

        Raises:
            UserError: exit code 130 after Ctrl-C, 143 after SIGTERM, 1 if the data of a process ended the run.
        """
        if metrics.ended_by == "failure":
            reason = gather_object([str(metrics.failure)] if metrics.failure else [])[0]
            raise UserError(f"{reason}, {self.runtime.last_checkpoint()}", everywhere=True)
        if iteration < self.args.max_train_steps:
            signal = {"SIGINT": "Ctrl-C", "SIGTERM": "SIGTERM"}[metrics.ended_by]
            where = f"checkpoint-{iteration} in {self.args.output_dir}"
            message = f"stopped by {signal}; {where} is complete: continue with"
            code = ENDINGS[metrics.ended_by]
            raise UserError(f"{message} --resume_from_checkpoint latest", exit_code=code, everywhere=True)

    def export(self, iteration: int) -> None:
        """Write the student to --output_dir as a pipeline, or with --rank as an adapter. All processes call it."""
        self.models.student.check_finite()
        aside = Path(self.args.output_dir) / f"export{INCOMPLETE}"
        config = self._student_config(iteration)
        with writing(aside):
            if self.args.rank:
                last = export_adapter(aside, self.args, self.models, self.extra_components, config)
            else:
                files = self.teacher_files
                last = export_pipeline(aside, self.args, self.models, self.extra_components, config, files)
            if self.runtime.accelerator.is_main_process:
                self.exported = sorted(os.listdir(aside))
                publish_folder(aside, Path(self.args.output_dir), last)
        kind = "adapter" if self.args.rank else "pipeline"
        logger.info(f"the {kind} is in {self.args.output_dir}; to generate an image: {self._infer_command()}")
        self.runtime.accelerator.wait_for_everyone()

    def upload(self) -> None:
        """Upload the export to the repository of --push_to_hub: after `Runtime.finish`, as it may take very long.

        Raises:
            UserError: exit code 1; the upload fails.
        """
        if self.exported and self.args.push_to_hub:
            upload_export(self.args, self.exported)

    def _infer_command(self) -> str:
        """Return the command that generates an image with what was exported, for the shell."""
        script = os.path.relpath(Path(__file__).resolve().parents[2] / "infer.py")
        prompt = (self.args.validation_prompts or ["a lighthouse at dusk"])[0]
        words = ["python", script, "--model", self.args.output_dir, "--prompt", prompt]
        return shlex.join([*words, "--output_dir", os.path.join(self.args.output_dir, "samples")])

    def _recorded_args(self) -> dict:
        """Return the arguments with the commit at which the teacher was read."""
        return {**vars(self.args), "revision": self.models.source.revision}

    def _student_config(self, iteration: int) -> dict:
        schedule, source = self.models.schedule, self.models.source
        return make_student_config(
            self.args,
            revision=source.revision,
            sigmas=schedule.levels(schedule.anchors)[1].tolist(),
            timesteps=schedule.anchors.tolist(),
            pixel_multiple=self.models.pixel_multiple(source),
            pipeline_class=self.models.pipeline_class.__name__,
            pipeline_kwargs=self.pipeline_kwargs,
            iteration=iteration,
            teacher_fingerprint=self.models.teacher_fingerprint,
        )

    def _check_compatible(self, checkpoint: Path, state: dict) -> None:
        """Refuse a checkpoint that this run cannot continue; log every other flag that has changed.

        Raises:
            UserError: another teacher or optimizer, other adapters, or a network that the checkpoint does not hold.
        """
        args, new_folder = self._recorded_args(), "or start in a new --output_dir"
        stored_args = state["args"]
        for role in self.runtime.trained:
            if not (checkpoint / role.subfolder).is_dir():
                raise UserError(
                    f"--resume_from_checkpoint {checkpoint}: holds no {role.name}, which --gan_weight "
                    f"{args['gan_weight']} needs; resume with --gan_weight 0, or start anew"
                )

        def refuse(name: str, fix: str = "") -> None:
            given, stored = (" ".join(v) if isinstance(v, list) else v for v in (args[name], stored_args.get(name)))
            made = f"{checkpoint} was made with {stored}"
            raise UserError(f"--{name} {given}: {made}; {fix or 'give that'}, {new_folder}")

        if args["base_quantization"] != stored_args.get("base_quantization", "none"):
            refuse("base_quantization")
        for name, value in self.fingerprints.items():
            if state["fingerprint"].get(name) != value:
                if name in LORA_FLAGS:
                    refuse(name)
                message = f"made with another {name}; give the {name} it was made with, {new_folder}"
                raise UserError(f"--resume_from_checkpoint {checkpoint}: {message}")
        if stored_args.get("pretrained_model_name_or_path") == args["pretrained_model_name_or_path"]:
            for name in ("revision", "variant"):  # a folder has no revision
                stored = stored_args.get(name)
                if stored != args[name] and (stored or name == "variant"):
                    refuse(name, f"give --{name} {stored}" if stored else f"drop --{name}")
        # How this run's student would have started does not matter: the stored one goes on.
        ignored = {"resume_from_checkpoint", "output_dir", "student_model_name_or_path"}
        ignored |= set() if args["rank"] else {"student_guidance_scale"}
        changed = [
            f"--{name} {stored_args.get(name)} -> {value}"
            for name, value in args.items()
            if name not in ignored and stored_args.get(name) != value
        ]
        if state.get("data", self.data) != self.data:  # older checkpoints have none
            changed.append(f"the data set ({state['data']} -> {self.data})")
        changed = ", ".join(changed) or "nothing"
        logger.info(f"resuming from {checkpoint} at iteration {state['iteration']}; changed: {changed}")

    def _check_export(self, iteration: int) -> None:
        """Write and remove what the export holds besides weights. UserError (exit code 1) if it cannot be written."""
        aside = Path(self.args.output_dir) / f"export{INCOMPLETE}"
        with writing(aside):
            write = write_adapter_files if self.args.rank else write_pipeline_files
            write(aside, self.args, self.models, self.extra_components, self._student_config(iteration))
        shutil.rmtree(aside)

    def _check_disk(self, iteration: int) -> None:
        """Refuse (UserError, exit code 1) a run whose checkpoints and export do not fit on the disk."""
        args, existing = self.args, len(list_checkpoints(self.args.output_dir))
        each = 2 if args.use_8bit_adam else 8  # bytes of two Adam moments
        each += 4 if launch_config().mode.startswith("zero") else 0  # and of the master weight
        size = sum(role.weight_bytes + each * role.num_trained_params for role in self.runtime.trained)
        export = self.models.student.weight_bytes // 4 * torch_dtype(args.export_dtype).itemsize
        export += sum(file.stat().st_size for file in self.teacher_files.values())
        steps, last = args.checkpointing_steps, args.max_train_steps
        new = last // steps - iteration // steps + (last % steps > 0) if iteration < last else 0
        if args.checkpoints_total_limit is not None:  # an old one goes only when the new one is complete
            new = min(new, max(1, args.checkpoints_total_limit + 1 - existing))
        free = shutil.disk_usage(args.output_dir).free
        if free < new * size + export:
            limit = int((free - export) // size) + existing - 1
            problem = f"{new} checkpoints of {size / GIB:.1f} GiB and the export of {export / GIB:.1f} GiB are to come"
            fix = f"give --checkpoints_total_limit {limit}, " if 0 < limit and limit + 1 - existing < new else ""
            raise UserError(
                f"--output_dir {args.output_dir}: {problem}, and only {free / GIB:.1f} GiB are free; {fix}free some "
                "space or choose another disk"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Finding checkpoints
# ---------------------------------------------------------------------------------------------------------------------
def list_checkpoints(output_dir: str) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted((p for p in folders if (p / "state.json").is_file()), key=iteration_of)


def iteration_of(checkpoint: Path) -> int:
    """Return the iteration in a checkpoint's name."""
    return int(checkpoint.name.split("-")[1])


def find_checkpoint(args) -> Optional[Path]:
    """Return the checkpoint that --resume_from_checkpoint names; None without the flag. No model loads.

    Raises:
        UserError: exit code 2; nothing to resume from, or an --output_dir that holds another run.
    """
    output_dir, wanted = args.output_dir, args.resume_from_checkpoint
    existing = list_checkpoints(output_dir)
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise UserError(f"--output_dir {output_dir}: is a file; give a folder", exit_code=2)
    if wanted is None:
        if existing or any((Path(output_dir) / file).exists() for file in ("model_index.json", FILE)):
            fix = "choose an empty folder" + (", or --resume_from_checkpoint latest" if existing else "")
            raise UserError(f"--output_dir {output_dir} holds another run: {fix}", exit_code=2)
        return None
    if wanted == "latest":
        if not existing:
            problem = f"no complete checkpoint in --output_dir {output_dir}; drop the flag to start"
            raise UserError(f"--resume_from_checkpoint latest: {problem}", exit_code=2)
        checkpoint = existing[-1]
    else:
        names = [path.name for path in existing]
        checkpoint = Path(output_dir) / wanted if wanted in names else Path(wanted)  # as in diffusers examples
        if not (checkpoint / "state.json").is_file():
            problem = "not a complete checkpoint (no state.json), neither as a folder nor as a name in --output_dir"
            raise UserError(f"--resume_from_checkpoint {wanted}: {problem}", exit_code=2)
        start = read_state(checkpoint)["iteration"]
        later = [path.name for path in existing if iteration_of(path) > start]
        if later:
            # They would be "latest" before this run's own, and --checkpoints_total_limit would keep them instead.
            problem = f"--output_dir {output_dir} holds later ones ({', '.join(later)})"
            fix = "move them away, or choose another --output_dir"
            raise UserError(f"--resume_from_checkpoint {wanted}: {problem}; {fix}", exit_code=2)
    check_launch(checkpoint)
    return checkpoint


def check_launch(checkpoint: Path) -> None:
    """Refuse (UserError, exit code 2) a checkpoint whose optimizer state another kind of launch wrote.

    One process, DDP and FSDP2 read each other's, at any number of processes; ZeRO reads its own stage's at the same
    number.
    """
    made, now = read_state(checkpoint)["launch"], launch_record()
    if made != now and any(mode.startswith("zero") for mode in (made["mode"], now["mode"])):
        launches = f"{made['mode']} in {made['processes']} processes, and this is {now['mode']} in {now['processes']}"
        fix = "DeepSpeed's state fits only the same stage and number: launch as before"
        raise UserError(f"--resume_from_checkpoint {checkpoint}: made under {launches}; {fix}", exit_code=2)


def launch_record() -> dict:
    """Return how this run was launched, for state.json."""
    return {"mode": launch_config().mode, "processes": launch_config().world_size}


def read_state(checkpoint: Path) -> dict:
    """Read state.json: iteration, samples_seen, args, fingerprint, launch, data. UserError (2) if it is damaged."""
    try:
        state = json.loads((checkpoint / "state.json").read_text())
        if not {"iteration", "samples_seen", "args", "fingerprint", "launch"} <= set(state):
            raise ValueError("incomplete")
        return state
    except (TypeError, ValueError) as error:
        message = f"--resume_from_checkpoint {checkpoint}: state.json is damaged; use another one"
        raise UserError(message, exit_code=2) from error


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are complete or absent
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def writing(aside: Path):
    """Remove what was written so far if an error ends it; turn a full disk and the like into a UserError."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        cut = isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error)
        if not (isinstance(error, OSError) or cut):
            raise
        full = cut or error.errno in (errno.ENOSPC, errno.EDQUOT)
        problem = f"could not be written ({str(error).strip().splitlines()[0]}); what was there before is intact"
        fix = f"{'free some space' if full else 'correct that'}, then --resume_from_checkpoint latest"
        name = aside.name.removesuffix(INCOMPLETE)
        raise UserError(f"--output_dir {aside.parent}: {name} {problem}: {fix}") from error


def remove_folder(folder: Path) -> None:
    """Remove a folder; it is renamed first, so that half of it is never taken for the whole."""
    aside = folder.with_name(folder.name + REPLACED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside)


def remove_leftovers(output_dir: str) -> None:
    """Remove what a killed run left half-written, and restore what it had moved aside before replacing it."""
    for old in Path(output_dir).glob(f"*{REPLACED}"):
        final = old.with_name(old.name.removesuffix(REPLACED))
        if not re.fullmatch(r"checkpoint-\d+", final.name) and not final.exists():
            os.rename(old, final)
    for suffix in (INCOMPLETE, REPLACED):
        for folder in Path(output_dir).glob(f"*{suffix}"):
            shutil.rmtree(folder)


def replace_folder(new: Path, final: Path) -> None:
    """Rename `new` to `final`; what was there before is removed only afterwards."""
    old = final.with_name(final.name + REPLACED)
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    os.rename(new, final)
    shutil.rmtree(old, ignore_errors=True)


def publish_folder(aside: Path, final: Path, last: str) -> None:
    """Move every entry of `aside` into the folder `final`; at the end `last`, the file that makes it count."""
    for entry in sorted(aside.iterdir(), key=lambda p: p.name == last):
        target = final / entry.name
        if entry.is_dir():
            replace_folder(entry, target)
        else:
            os.replace(entry, target)
    aside.rmdir()
