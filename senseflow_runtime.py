# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""What stands behind the four roles of a training loop (student, teacher, fake_score, discriminator), and what every script
does around it: arguments and errors, logging, panels, the model card. Checkpoints are senseflow_checkpoints'.

A loop speaks to a `Role` and never to what is behind it. That a role is a plain module, wrapped by DDP, or a part of a module
that other roles share (`parameters`, `select`) is decided here alone.
"""

import argparse
import importlib.util
import logging
import math
import os
import pickle
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Callable, ContextManager, Optional

import datasets
import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    LoggerType,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from diffusers.optimization import SchedulerType, get_scheduler
from huggingface_hub.utils import logging as hub_logging
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from senseflow_utils import ida_update


logger = get_logger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------
class UserError(Exception):
    """Something that the user can mend: one line that names the flag, the value and the fix.

    Args:
        message: that line.
        exit_code: 2 for bad arguments (found before any weight loads), 1 otherwise.
    """

    def __init__(self, message: str, exit_code: int = 1):
        super().__init__(message)
        self.exit_code = exit_code


class HelpFormatter(argparse.HelpFormatter):
    """Shows a default only where there is one worth showing."""

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        shown = " ".join(f"{value:g}" for value in action.default) if isinstance(action.default, list) else action.default
        return f"{action.help} [{shown}]".replace("%", "%%")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad argument in one line, as everything else here does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} (see --help)", exit_code=2)


def quiet_libraries() -> None:
    """Keeps the libraries' notes and bars from stderr, where a user looks for this project's one line."""
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    for library in (transformers, diffusers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's main(); a UserError becomes one line on stderr and its exit code, without a traceback."""
    quiet_libraries()
    try:
        main()
    except UserError as error:
        if error.exit_code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks find a bad argument; one says so
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


@contextmanager
def loading(flag: str, value):
    """Turns what a library raises over missing or damaged weights into a UserError (exit code 1) that names the flag."""
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{flag} {value}: cannot load the weights ({first_line}); download or copy them again") from error


def require_package(name: str, flag: str) -> None:
    """Refuses (exit code 2) a flag whose optional package is not installed; does not import it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(f"{flag} needs {name}, which is not installed: pip install {name}, or drop the flag", exit_code=2)


def complete_args(args):
    """Fills in what one flag takes from another; guidance scales become [MIN, MAX]. UserError (exit code 2) for more than two."""
    for name in ("dmd_guidance_scale", "isg_guidance_scale"):
        values = getattr(args, name)
        if values is not None:
            if len(values) > 2:
                raise UserError(f"--{name} {values}: give one value, or MIN MAX", exit_code=2)
            setattr(args, name, [values[0], values[-1]])
    args.learning_rate_fake = args.learning_rate if args.learning_rate_fake is None else args.learning_rate_fake
    args.learning_rate_disc = args.learning_rate if args.learning_rate_disc is None else args.learning_rate_disc
    return args


def check_common_args(args) -> None:
    """What every script's arguments must satisfy; UserError (exit code 2) for the first that does not."""

    def refuse(name: str, fix: str):
        raise UserError(f"--{name} {getattr(args, name)}: {fix}", exit_code=2)

    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            refuse(name, "must be a finite number")
    for name in (
        "resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "ttur_ratio", "checkpointing_steps",
        "checkpoints_total_limit", "validation_steps", "num_validation_images", "teacher_num_inference_steps",
        "max_sequence_length", "max_train_samples",
    ):  # fmt: skip
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            refuse(name, "must be 1 or more")
    for name in (
        "gan_weight", "isg_weight", "isg_margin", "learning_rate", "learning_rate_fake", "learning_rate_disc", "lr_warmup_steps",
        "adam_epsilon", "adam_weight_decay", "student_guidance_scale", "teacher_guidance_scale", "classifier_weight",
        "dataloader_num_workers", "seed",
    ):  # fmt: skip
        if getattr(args, name, 0) < 0:
            refuse(name, "must not be negative")
    for name in ("ida_decay", "backward_simulation_prob", "lr_warmup_start"):
        if not 0 <= getattr(args, name) <= 1:
            refuse(name, "must lie in [0, 1]")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            refuse(name, "must lie in [0, 1)")
    if args.max_grad_norm <= 0:
        refuse("max_grad_norm", "must be above 0; a large number clips nothing")
    if args.seed >= 2**32:
        refuse("seed", "must be below 2**32")
    if args.lr_scheduler == "polynomial" and min(args.learning_rate, args.learning_rate_fake, args.learning_rate_disc) <= 1e-7:
        refuse("lr_scheduler", "decays to 1e-7, which is not below every learning rate; choose another")
    for name in ("dmd_guidance_scale", "isg_guidance_scale"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"--{name} {low:g} {high:g}: MIN is above MAX; swap them", exit_code=2)
        if low < 0:
            raise UserError(f"--{name} {low:g} {high:g}: must not be negative", exit_code=2)
    if args.anchors is not None:
        shown = " ".join(f"{t:g}" for t in args.anchors)
        if not all(0 < t <= 1000 for t in args.anchors):
            raise UserError(f"--anchors {shown}: timesteps must lie in (0, 1000]", exit_code=2)
        if any(a <= b for a, b in zip(args.anchors, args.anchors[1:])):
            raise UserError(f"--anchors {shown}: must decrease; sort them, largest first", exit_code=2)
    if args.mixed_precision not in ("no", "bf16"):  # the default comes from accelerate's configuration, unchecked by argparse
        refuse("mixed_precision", "give no or bf16")
    if args.use_8bit_adam:
        require_package("bitsandbytes", "--use_8bit_adam")
    if getattr(args, "enable_xformers_memory_efficient_attention", False):
        require_package("xformers", "--enable_xformers_memory_efficient_attention")
        if not torch.cuda.is_available():
            raise UserError("--enable_xformers_memory_efficient_attention needs a CUDA GPU: drop the flag", exit_code=2)
    if args.report_to != "none":
        if args.report_to not in [tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL]:
            refuse("report_to", "is no tracker of accelerate; give tensorboard, wandb, ... or none")
        require_package(args.report_to, f"--report_to {args.report_to}")


# ---------------------------------------------------------------------------------------------------------------------
# Roles
# ---------------------------------------------------------------------------------------------------------------------
class Role:
    """One of the networks that the loop speaks of.

    Called, it runs its network: inside its own `turn` and with gradients enabled through whatever synchronises gradients
    between processes, everywhere else as a frozen network (gradient still flows to its inputs). Made by `Runtime`.

    Attributes:
        name: "student", "teacher", "fake_score", "discriminator".
        module: the bare network, for a pipeline, a config, or an export; never call it in a loop.
        dtype: what floating-point inputs are cast to.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        dtype: torch.dtype,
        select: Callable[[], ContextManager] = nullcontext,
        accelerator: Optional[Accelerator] = None,
        parameters: Optional[dict[str, torch.nn.Parameter]] = None,
        max_grad_norm: float = 1.0,
        subfolder: Optional[str] = None,
    ):
        self.name, self.module, self.dtype = name, module, dtype
        self.select, self.accelerator, self.max_grad_norm = select, accelerator, max_grad_norm
        self.parameters = {} if parameters is None else parameters
        self.subfolder = subfolder or name
        self.optimizer = self.lr_scheduler = None
        self._wrapped, self._learning = module, False

    def __call__(self, *args, **kwargs):
        network = self._wrapped if self._learning and torch.is_grad_enabled() else self.module
        with self.select():
            return network(*args, **kwargs)

    @contextmanager
    def turn(self):
        """The role's turn to learn from one micro-batch: forward, loss and `backward` happen inside, `step` after the last.

        Entered once per micro-batch. Only this role's parameters take gradient; what other roles accumulated stays.
        """
        with self.select(), self.accelerator.accumulate(self._wrapped):
            self._set_learning(True)
            try:
                yield
            finally:
                self._set_learning(False)

    def _set_learning(self, learning: bool) -> None:
        self._learning = learning
        self.module.train(learning)
        for parameter in self.parameters.values():
            parameter.requires_grad_(learning)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a micro-batch's mean loss; divides by the number of accumulated micro-batches. Inside `turn` only."""
        self.accelerator.backward(loss)

    def step(self) -> torch.Tensor:
        """Clips, steps optimiser and schedule, clears the gradients. Returns the gradient norm before clipping (no host sync)."""
        norm = self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.max_grad_norm)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def align_with(self, other: "Role", decay: float) -> None:
        """IDA: moves every parameter of this role towards the other role's: own <- decay * own + (1 - decay) * other."""
        ida_update(list(self.parameters.values()), list(other.parameters.values()), decay)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def check_finite(self) -> None:
        """Refuses (UserError) weights that hold NaN or infinity: they shall not be saved over sound ones."""
        if not torch.stack([parameter.detach().isfinite().all() for parameter in self.parameters.values()]).all():
            raise UserError(f"the weights of the {self.name} are not finite; resume from a checkpoint with a lower --learning_rate")

    def save(self, folder: Path) -> None:
        """Writes weights (safetensors; a diffusers folder where the network is a diffusers model) and optimiser state.

        Called by all processes; the main one writes.
        """
        if not self.accelerator.is_main_process:
            return
        path = folder / self.subfolder
        if hasattr(self.module, "save_pretrained"):
            self.module.save_pretrained(path)
        else:
            path.mkdir(parents=True)
            buffers = dict(self.module.named_buffers())
            state = {k: v for k, v in self.module.state_dict().items() if k in self.parameters or k in buffers}
            save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, path / "model.safetensors")
        training = {"state": self.optimizer.state_dict()["state"], "steps": self.lr_scheduler.last_epoch}
        torch.save(training, folder / f"{self.name}_optimizer.pt")

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, exactly. Rates, betas and the schedule are those of THIS run, at the stored step.

        Raises:
            UserError: files missing, cut, or of another network.
        """
        with loading("--resume_from_checkpoint", folder / self.subfolder):
            state = read_safetensors(folder / self.subfolder)
            missing, unexpected = self.module.load_state_dict(state, strict=False)
            missing = [name for name in missing if name in self.parameters]
            if missing or unexpected:
                raise UserError(
                    f"--resume_from_checkpoint {folder}: {self.name} is another network "
                    f"({len(missing)} weights missing, {len(unexpected)} unexpected)"
                )
            training = torch.load(folder / f"{self.name}_optimizer.pt", map_location="cpu", weights_only=True)
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": training["state"], "param_groups": groups})
        steps = self.lr_scheduler.last_epoch = training["steps"]
        for group, base, factor in zip(self.optimizer.param_groups, self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas):
            group["lr"] = base * factor(steps)


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files (one, or the shards of a large model), on the CPU."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise OSError(f"no safetensors file in {folder}")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


class Runtime:
    """Processes, devices, trackers, and the making of roles. One Accelerator per trained role, as DeepSpeed will need.

    Args:
        args: reads output_dir, logging_dir, report_to, mixed_precision, allow_tf32, gradient_accumulation_steps, seed and the
            optimiser's flags.
    """

    def __init__(self, args):
        self.args = args
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
        if not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # A multi-GPU configuration launched on a machine without a GPU runs on its CPU, over gloo.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        log_with = None if args.report_to == "none" else args.report_to
        self.main = self._accelerator(log_with=log_with)
        self.device = self.main.device
        self.weight_dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
        self.trained: list[Role] = []
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        set_seed(args.seed)  # initial weights of the discriminator; every draw of the training itself is stateless

    def _accelerator(self, log_with=None) -> Accelerator:
        args, k = self.args, self.args.gradient_accumulation_steps
        folder = Path(args.output_dir)
        return Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=k, sync_with_dataloader=False),
            log_with=log_with,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / args.logging_dir)),
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of the gradients
        )

    def frozen_role(self, name: str, module: torch.nn.Module, select: Callable[[], ContextManager] = nullcontext) -> Role:
        """A role that never learns (the teacher); its module is in the precision of the run's frozen networks already."""
        module.requires_grad_(False).eval().to(self.device)
        return Role(name, module, self.weight_dtype, select=select)

    def trained_role(
        self,
        name: str,
        module: torch.nn.Module,
        learning_rate: float,
        every: int = 1,
        subfolder: Optional[str] = None,
        parameters: Optional[dict[str, torch.nn.Parameter]] = None,
        select: Callable[[], ContextManager] = nullcontext,
    ) -> Role:
        """A role that learns, with its optimiser and learning-rate schedule.

        Args:
            every: it steps in every `every`-th iteration; warm-up and decay, given in iterations, are divided by it.
            subfolder: where a checkpoint holds its weights (default: its name).
            parameters: what it trains, by name in the module (default: everything). Fewer where roles share a module.
            select: a context manager that makes its part of a shared module the active one and then restores what was.
        """
        args, accelerator = self.args, self._accelerator() if self.trained else self.main
        parameters = dict(module.named_parameters()) if parameters is None else parameters
        module.requires_grad_(False)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        role = Role(name, module, self.weight_dtype, select, accelerator, parameters, args.max_grad_norm, subfolder)
        optimizer = self._optimizer_class()(
            list(parameters.values()),
            lr=learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.adam_weight_decay,
        )
        role.lr_scheduler = self._lr_scheduler(optimizer, every)
        role._wrapped, role.optimizer = accelerator.prepare(module, optimizer)
        role._set_learning(False)
        self.trained.append(role)
        return role

    def _optimizer_class(self):
        if self.args.use_8bit_adam:
            import bitsandbytes

            return bitsandbytes.optim.AdamW8bit
        return torch.optim.AdamW

    def _lr_scheduler(self, optimizer, every: int):
        args = self.args
        warmup, total = args.lr_warmup_steps // every, max(1, args.max_train_steps // every)
        scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        if args.lr_warmup_start > 0:
            # The warm-up rises from this fraction of the rate instead of from 0.
            def from_start(factor):
                start = args.lr_warmup_start
                return lambda step: start + (1 - start) * factor(step) if step < warmup else factor(step)

            scheduler.lr_lambdas = [from_start(factor) for factor in scheduler.lr_lambdas]
            for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
                group["lr"] = base * factor(0)
        return scheduler

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes; one collective, no host sync."""
        return self.main.reduce(values, reduction="mean")

    def gather_objects(self, objects: list) -> list:
        """The lists of all processes, joined."""
        return gather_object(objects) if self.main.num_processes > 1 else objects

    def to_device(self, batch: dict) -> dict:
        """A batch with its tensors on this process's device."""
        return {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def start_trackers(self, project: str) -> None:
        """Starts --report_to with the run's arguments as its configuration."""
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(self.args).items()}
        self.main.init_trackers(project, config=plain)

    def log_picture(self, name: str, picture: Image.Image, step: int) -> None:
        """One picture to every tracker that shows pictures."""
        for tracker in self.main.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(picture)[None]}, step=step, **layout)


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------
class Metrics:
    """Scalars of the iterations to the trackers and the progress bar, read one iteration late: the device never waits for the host.

    Stops the run (UserError) when values are not finite `patience` times in a row, with no sound student's turn between. Samples
    whose DMD gradient was not finite are counted as `dmd_non_finite`, the mean over micro-batches and processes.
    """

    shown = ("dmd_loss", "isg_loss", "adversarial_loss", "fake_loss", "discriminator_loss")

    def __init__(self, runtime: Runtime, student: Role, samples: int, progress, patience: int = 3):
        self.runtime, self.student, self.samples, self.progress, self.patience = runtime, student, samples, progress, patience
        self.pending: Optional[tuple[int, float, list[str], torch.Tensor]] = None
        self.bad_in_a_row, self.since, self.postfix = 0, time.monotonic(), {}

    def push(self, iteration: int, values: dict[str, torch.Tensor]) -> None:
        """Takes the device scalars of an iteration, logs the one before."""
        self.flush()
        names = sorted(values)
        stacked = torch.stack([values[name].detach().float().reshape(()) for name in names])
        self.pending = (iteration, self.student.learning_rate, names, self.runtime.mean(stacked))

    def flush(self) -> None:
        """Logs the last iteration pushed, if that has not been done."""
        if self.pending is None:
            return
        iteration, rate, names, stacked = self.pending
        self.pending = None
        numbers = dict(zip(names, stacked.tolist()))
        self._check(iteration, numbers)
        now = time.monotonic()
        numbers |= {"lr": rate, "samples_per_second": self.samples / max(now - self.since, 1e-9)}
        self.since = now
        self.runtime.main.log(numbers, step=iteration)
        self.postfix |= {name: f"{numbers[name]:.4g}" for name in self.shown if name in numbers}
        self.progress.set_postfix(self.postfix, refresh=False)
        self.progress.update(1)

    def _check(self, iteration: int, numbers: dict[str, float]) -> None:
        bad = [name for name, number in numbers.items() if not math.isfinite(number)]
        if numbers.get("dmd_non_finite", 0) > 0:
            bad.append("dmd_gradient")
        if bad:
            self.bad_in_a_row += 1
            logger.warning(f"iteration {iteration}: not finite: {', '.join(bad)} ({self.bad_in_a_row} in a row)")
            if self.bad_in_a_row >= self.patience:
                raise UserError(
                    f"{', '.join(bad)} not finite {self.patience} times in a row, last in iteration {iteration}: the run has "
                    "diverged; resume from an earlier checkpoint with a lower --learning_rate"
                )
        elif "dmd_loss" in numbers:
            self.bad_in_a_row = 0
