# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The run around a training loop: processes, devices, signals, trackers, and the making of roles."""

import logging
import os
import signal
import sys
import time
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path
from typing import Callable, Optional

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    set_seed,
)
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from tqdm.auto import tqdm

from senseflow.arguments import warn_inactive
from senseflow.errors import INTERRUPTED, TERMINATED, UserError, check_launcher, exit_now, print_from_signal_handler
from senseflow.models.weights import is_meta, materialize
from senseflow.training.compilation import compile_blocks, set_up_compilation
from senseflow.training.lock import OutputLock
from senseflow.training.roles import LaunchConfig, Role, launch_config, set_schedule_step
from senseflow.training.sharded import FSDP2Role, ZeroRole, deepspeed_engine, materialize_for_deepspeed, shard


logger = get_logger(__name__)

# What ends a run early, the most important first, and its exit code: unreadable data, Ctrl-C, a cluster's signal.
ENDINGS = {"failure": 1, "SIGINT": INTERRUPTED, "SIGTERM": TERMINATED}
SAME_CTRL_C = 0.5  # seconds within which one Ctrl-C may arrive twice, from the terminal and from the launcher
TRACKERS_OF_LISTS = ("wandb", "swanlab")  # their `log_images` takes lists of images


def check_launch_supports(args, launch: LaunchConfig) -> None:
    """Raise a UserError (exit code 2) for a flag that this launch does not support."""
    if args.use_8bit_adam and launch.mode == "fsdp2":
        raise UserError("--use_8bit_adam: bitsandbytes cannot take FSDP2's shards: drop it, or use zero3.yaml", 2)
    if args.rank and launch.mode.startswith("zero"):
        fix = "use single.yaml, ddp.yaml or fsdp2.yaml, or drop it"
        raise UserError(f"--rank {args.rank}: adapters share weights, which DeepSpeed would copy: {fix}", 2)
    if args.base_quantization != "none" and launch.mode != "replicated":
        problem, fix = "FSDP2 cannot shard such a base", "use single.yaml or ddp.yaml, or drop it"
        raise UserError(f"--base_quantization {args.base_quantization}: {problem}: {fix}", 2)
    if args.bf16_weight_copies and launch.mode != "replicated":
        warn_inactive(args, f"{launch.mode}, which computes with bf16 weights in any case", ("bf16_weight_copies",))


class ProgressBarHandler(logging.Handler):
    """Write log lines to stderr above the progress bar, without the "[RANK 0] " that accelerate adds to all."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record).replace("[RANK 0] ", "", 1)
        if parent_process() is None:
            tqdm.write(line, file=sys.stderr)
        else:  # a worker of the DataLoader has a stale copy of the bar
            print(line, file=sys.stderr)


class Runtime:
    """The processes, devices and trackers of a run. It makes roles to fit the way the processes were launched.

    Args:
        args: the command line.
    Attributes:
        accelerator, device, launch: of this process.
        weight_dtype: the precision of the frozen networks.
        trained: the trained roles, in the order they were made.
        endings: those of ENDINGS that have reached this process.
        saved: the iterations that the last complete checkpoint holds.
    """

    def __init__(self, args):
        check_launcher()
        self.args, self.launch = args, launch_config()
        check_launch_supports(args, self.launch)
        log_format = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(format=log_format, datefmt="%H:%M:%S", level=logging.INFO, handlers=[ProgressBarHandler()])
        if not torch.cuda.is_available() and self.launch.world_size > 1:
            os.environ["ACCELERATE_USE_CPU"] = "true"  # a multi-GPU configuration on a machine without a GPU
        folder = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # a role counts its micro-batches
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / args.logging_dir)),
            kwargs_handlers=[
                AutocastKwargs(cache_enabled=False),  # the cache keeps a bf16 copy of all weights during a forward
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),  # others wait while one writes a large network
            ],
        )
        self.device = self.accelerator.device
        self.weight_dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
        self.trained: list[Role] = []
        self._compile_options = self.launch.compile_options if args.dry_run is None else None
        if self._compile_options:
            set_up_compilation(self._compile_options, self.device)
            backend = self._compile_options["backend"]
            logger.info(f"dynamo_backend {backend}: iterations are slow until the first student update has compiled")
        if self.launch.mode == "fsdp2":
            self.mesh = init_device_mesh(self.device.type, (self.accelerator.num_processes,))
        # cuDNN's attention has gradients that are not finite for some shapes. --attention_backend asks for it by name.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32  # convolutions keep torch's default, which is TF32
        set_seed(args.seed)  # initial weights of the discriminator; all random numbers of training are stateless
        self.endings: set[str] = set()
        self.saved = 0
        self._process, self._interrupted_at = os.getpid(), None
        signal.signal(signal.SIGTERM, self._on_signal)

    # Signals ---------------------------------------------------------------------------------------------------------
    def save_when_interrupted(self) -> None:
        """Make the first Ctrl-C end the run after a checkpoint, as SIGTERM does, and a second one end it at once."""
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if os.getpid() != self._process:  # a worker of the DataLoader, which inherits this handler
            if name == "SIGTERM":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._interrupted_at is not None and now - self._interrupted_at > SAME_CTRL_C:
            # torchrun forwards the first Ctrl-C as SIGINT and answers a second one with SIGTERM.
            if name == "SIGINT" or "TORCHELASTIC_RUN_ID" in os.environ:
                exit_now("stopped at once by a second Ctrl-C; complete checkpoints are intact")
        elif name == "SIGINT" and self._interrupted_at is None:
            self._interrupted_at = now
            again = "a second Ctrl-C"
            if "ACCELERATE_MIXED_PRECISION" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
                again = f"kill -INT {os.getpid()}"  # the launcher of one process dies at once, with a traceback
            print_from_signal_handler(
                f"Ctrl-C: a checkpoint is saved after this iteration or the next; {again} ends at once"
            )
        self.endings.add(name)

    def last_checkpoint(self) -> str:
        """Describe for a message which checkpoint to resume from."""
        return f"checkpoint-{self.saved} is complete" if self.saved else "no checkpoint has been saved yet"

    # Roles -----------------------------------------------------------------------------------------------------------
    def compile(self, network: torch.nn.Module) -> None:
        """Compile a network's blocks in place, if the launch's configuration says so; not in a dry run."""
        if self._compile_options:
            compile_blocks(network, self._compile_options)

    def frozen_role(self, name: str, module: torch.nn.Module) -> Role:
        """Make a role that is never trained (the teacher), of a network already in `weight_dtype`."""
        module.requires_grad_(False).eval()
        self.compile(module)  # before FSDP2 adds its hooks, which run as they are
        # Adapted copies run under autocast, which keeps some layers in float32: so does the network that they share.
        role = Role(name, module, self.weight_dtype, self.accelerator, self.args, autocast=self.args.rank > 0)
        if self.launch.mode == "zero3":
            config = self._deepspeed_config(gather_bf16=self.args.mixed_precision == "bf16")
            materialize_for_deepspeed(module, config, self.device)
            role._wrapped = deepspeed_engine(module, config)
            return role
        if self.launch.mode == "fsdp2":
            shard(module, self.mesh, self.launch.plugin.reshard_after_forward)
        if self.launch.mode != "fsdp2" or is_meta(module):
            materialize(module, self.device)
        return role

    def trained_role(
        self,
        name: str,
        module: torch.nn.Module,
        learning_rate: float,
        step_every: int = 1,
        subfolder: Optional[str] = None,
        gather_bf16: bool = True,
    ) -> Role:
        """Make a trained role with its optimizer and learning-rate schedule, of the parameters that require gradient.

        Args:
            step_every: the role steps at the end of every so many iterations. Its rate is that of that iteration.
            subfolder: the folder of the weights in a checkpoint (default: the name).
            gather_bf16: whether a sharded network is gathered in bfloat16 under --mixed_precision bf16, and another
                may have copies in it; not for one that computes with its own weights in float32, as spectral norms do.
        """
        mode, gather_bf16 = self.launch.mode, gather_bf16 and self.args.mixed_precision == "bf16"
        cls, kwargs = Role, {}
        if mode == "fsdp2":
            cls, kwargs = FSDP2Role, {"mesh": self.mesh, "reshard": self.launch.plugin.reshard_after_forward}
            kwargs["gather_bf16"] = gather_bf16
        elif mode != "replicated":
            cls, kwargs = ZeroRole, {"config": self._deepspeed_config(gather_bf16)}
        else:  # adapters are small
            kwargs["copy_weights"] = gather_bf16 and (self.args.rank > 0 or self.args.bf16_weight_copies)
        self.compile(module)
        parameters = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
        kwargs |= {"parameters": parameters, "subfolder": subfolder}
        role = cls(name, module, self.weight_dtype, self.accelerator, self.args, **kwargs)
        role.prepare(lambda parameters: self._make_optimizer(parameters, learning_rate, step_every))
        role._set_training(False)
        self.trained.append(role)
        return role

    def _make_optimizer(self, parameters: list[torch.nn.Parameter], learning_rate: float, step_every: int):
        """Make (AdamW, its learning-rate schedule)."""
        args = self.args
        cls, kwargs = torch.optim.AdamW, {"fused": True}  # without temporary tensors as large as the weights
        if args.use_8bit_adam:
            import bitsandbytes

            cls, kwargs = bitsandbytes.optim.AdamW8bit, {}
        kwargs |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        optimizer = cls(parameters, lr=learning_rate, weight_decay=args.adam_weight_decay, **kwargs)
        warmup, total, start = args.lr_warmup_steps, args.max_train_steps, args.lr_warmup_start_factor
        scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        (factor_at,) = scheduler.lr_lambdas

        def factor(step: int) -> float:
            iteration = step * step_every + step_every - 1
            # The warm-up starts from a fraction of the rate.
            return start + (1 - start) * factor_at(iteration) if iteration < warmup else factor_at(iteration)

        scheduler.lr_lambdas = [factor]
        set_schedule_step(scheduler, 0)
        return optimizer, scheduler

    def _deepspeed_config(self, gather_bf16: bool) -> dict:
        """Make DeepSpeed's configuration of one network, from that of the launch and our flags."""

        def without_auto(node: dict) -> dict:
            return {k: without_auto(v) if isinstance(v, dict) else v for k, v in node.items() if v != "auto"}

        return without_auto(self.launch.plugin.deepspeed_config) | {
            "train_micro_batch_size_per_gpu": self.args.train_batch_size,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # a role decides when it steps
            "gradient_clipping": self.args.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": gather_bf16, "check_grad_overflow": True},
        }

    # Trackers --------------------------------------------------------------------------------------------------------
    def start(self, project: str) -> None:
        """Make and lock --output_dir, and start --report_to with the run's arguments, before any weights load.

        Raises:
            UserError: exit code 2; the folder is another run's or cannot be written to, or the tracker does not start.
        """
        refusal = None
        if self.accelerator.is_main_process:
            try:
                self._lock = OutputLock(Path(self.args.output_dir))
            except UserError as error:
                refusal = str(error)
        (refusal,) = broadcast_object_list([refusal])
        if refusal:
            raise UserError(refusal, exit_code=2, everywhere=True)
        config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(self.args).items()}
        try:
            self.accelerator.init_trackers(project, config=config)
        except Exception as error:  # each tracker raises its own
            problem = f"does not start ({type(error).__name__}: {error})"
            fix = "log in to it, set its key, or give tensorboard or none"
            if isinstance(error, OSError) and error.filename:
                fix = f"make {error.filename} writable, or give another --logging_dir or --report_to none"
            raise UserError(f"--report_to {self.args.report_to}: {problem}: {fix}", exit_code=2) from error
        for tracker in self.accelerator.trackers:
            if self.args.validation_prompts and not hasattr(tracker, "log_images"):
                problem = "shows no images: those of --validation_prompts are only in --output_dir"
                logger.warning(f"--report_to {tracker.name} {problem}")

    def log(self, values: dict[str, float], step: int) -> None:
        """Log scalars to every tracker."""
        self._call_trackers(lambda tracker: tracker.log(values, step=step))

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """Write an image to --output_dir as NAME-STEP.png, and log it to every tracker that shows images."""
        if self.accelerator.is_main_process:
            file = Path(self.args.output_dir) / f"{name}-{step}.png"
            try:
                file.parent.mkdir(exist_ok=True)
                image.save(file)
            except OSError as error:  # an image is not worth a run
                logger.warning(f"{file}: cannot be written ({error.strerror})")

        def log(tracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({name: [image] if tracker.name in TRACKERS_OF_LISTS else image}, step=step)

        self._call_trackers(log)

    def _call_trackers(self, call: Callable[[GeneralTracker], None]) -> None:
        """Call a function with every tracker. One that fails is left out from then on, with a warning."""
        for tracker in list(self.accelerator.trackers):
            try:
                call(tracker)
            except Exception as error:  # each tracker raises its own
                self.accelerator.trackers.remove(tracker)
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                logger.warning(f"--report_to {tracker.name} has failed ({reason}); the run goes on without it")

    def finish(self) -> None:
        """End the trackers and the process group, and unlock --output_dir. All processes call it."""
        self._call_trackers(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()
        self.accelerator.end_training()
        if self.accelerator.is_main_process:
            self._lock.release()
