# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The run around a training loop: processes, devices, trackers, the making of roles (senseflow.training.roles), and the metrics.

Checkpoints are senseflow.training.checkpoints'.
"""

import copy
import logging
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Optional

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from diffusers.optimization import get_scheduler
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh

from senseflow.errors import INTERRUPTED, TERMINATED, UserError, exit_now, print_from_signal_handler
from senseflow.models.weights import is_meta, materialize
from senseflow.training.roles import Role, launch_config
from senseflow.training.sharded import FSDP2Role, ZeroRole, deepspeed_engine, materialize_for_deepspeed, shard


logger = get_logger(__name__)

# What ends a run early, first things first, and its exit code: data that must be mended, Ctrl-C, a cluster.
ENDINGS = {"failure": 1, "SIGINT": INTERRUPTED, "SIGTERM": TERMINATED}
SAME_CTRL_C = (
    0.5  # seconds in which one Ctrl-C may arrive twice: from the terminal or a cluster, and from the launcher
)
TAKE_LISTS = ("wandb", "swanlab")  # of accelerate's trackers: images by the list


class Runtime:
    """Processes, devices, trackers, and the making of roles after the way the processes were launched.

    Args:
        args: reads output_dir, logging_dir, report_to, mixed_precision, allow_tf32, gradient_accumulation_steps, seed, rank and the
            optimizer's flags.
    """

    def __init__(self, args):
        self.args, self.launch = args, launch_config()
        if args.use_8bit_adam and self.launch.mode == "fsdp2":
            raise UserError(
                "--use_8bit_adam: bitsandbytes cannot take FSDP2's shards: drop it, or take zero3.yaml", exit_code=2
            )
        if args.rank and self.launch.mode.startswith("zero"):
            fix = "take single.yaml, ddp.yaml or fsdp2.yaml, or drop it"
            raise UserError(
                f"--rank {args.rank}: adapters share weights, of which DeepSpeed makes copies: {fix}", exit_code=2
            )
        if args.base_quantization != "none" and self.launch.mode != "replicated":
            fix = "take single.yaml or ddp.yaml, or drop it"
            raise UserError(
                f"--base_quantization {args.base_quantization}: FSDP2 cannot shard such a base: {fix}", exit_code=2
            )
        logging.basicConfig(
            format="%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.INFO
        )
        if not torch.cuda.is_available() and self.launch.world_size > 1:
            # A multi-GPU configuration launched on a machine without a GPU runs on its CPU, over gloo.
            os.environ["ACCELERATE_USE_CPU"] = "true"
        folder = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=1
            ),  # a role counts its micro-batches itself
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / args.logging_dir)),
            kwargs_handlers=[
                AutocastKwargs(cache_enabled=False),  # which keeps a bf16 copy of every weight until a forward ends
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
                InitProcessGroupKwargs(timeout=timedelta(hours=1)),  # the others wait while one writes a large network
            ],
        )
        self.device = self.accelerator.device
        self.weight_dtype = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
        self.trained: list[Role] = []
        self.base: Optional[torch.nn.Module] = None  # the frozen network, whose shards its twins take
        if self.launch.mode == "fsdp2":
            self.mesh = init_device_mesh(self.device.type, (self.accelerator.num_processes,))
        # The gradients of cuDNN's attention are not finite for some shapes (RESULTS.md); torch has other kernels.
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32  # convolutions keep torch's own default, which is TF32
        set_seed(args.seed)  # initial weights of the discriminator; every draw of the training itself is stateless
        self.endings: set[str] = set()  # of ENDINGS, what has reached this process
        self.saved = 0  # iterations that the last complete checkpoint holds
        self._process, self._interrupted_at = os.getpid(), None
        signal.signal(signal.SIGTERM, self._on_signal)

    def save_when_interrupted(self) -> None:
        """From now on Ctrl-C does what SIGTERM does, and a second one ends at once; before, the first one does."""
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if os.getpid() != self._process:  # a worker of the DataLoader, which inherited this handler
            if name == "SIGTERM":
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._interrupted_at is not None and now - self._interrupted_at > SAME_CTRL_C:
            # torchrun hands the first Ctrl-C on as SIGINT, and on a second one sends SIGTERM.
            if name == "SIGINT" or "TORCHELASTIC_RUN_ID" in os.environ:
                exit_now("stopped at once by a second Ctrl-C; complete checkpoints are intact")
        elif name == "SIGINT" and self._interrupted_at is None:
            self._interrupted_at = now
            print_from_signal_handler(
                "Ctrl-C: a checkpoint is saved after this iteration or the next; a second Ctrl-C ends at once"
            )
        self.endings.add(name)

    def frozen_role(self, name: str, module: torch.nn.Module) -> Role:
        """A role that never learns (the teacher); its module is in the precision of the run's frozen networks already."""
        module.requires_grad_(False).eval()
        # Its twins compute under autocast, which has some layers in float32 that are not by themselves: it does as they do.
        role = Role(name, module, self.weight_dtype, self.accelerator, autocast=self.args.rank > 0)
        if self.launch.mode == "zero3":
            config = self._deepspeed_config(gather_bf16=True)
            materialize_for_deepspeed(module, config, self.device)
            role._wrapped = deepspeed_engine(module, config)
            return role
        if self.launch.mode == "fsdp2":
            shard(module, self.mesh, self.launch.plugin.reshard_after_forward)
            self.base = module
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
        """A role that learns, with its optimizer and learning-rate schedule. It trains what takes gradient in the module.

        Args:
            every: it steps in every `every`-th iteration; warm-up and decay, given in iterations, are divided by it.
            subfolder: where a checkpoint holds its weights (default: its name).
            half: under --mixed_precision bf16, a sharded network may be gathered in bfloat16. Not one that computes with its own
                weights in float32, as spectral norms do.
        """
        args, mode = self.args, self.launch.mode
        parameters = {key: parameter for key, parameter in module.named_parameters() if parameter.requires_grad}
        gather_bf16 = gather_bf16 and args.mixed_precision == "bf16"
        kind, how = Role, {}
        if mode == "fsdp2":
            kind, how = (
                FSDP2Role,
                {"mesh": self.mesh, "reshard": self.launch.plugin.reshard_after_forward, "gather_bf16": gather_bf16},
            )
            how["base"] = self.base if any(hasattr(part, "peft_config") for part in module.modules()) else None
        elif mode != "replicated":
            kind, how = ZeroRole, {"config": self._deepspeed_config(gather_bf16)}
        role = kind(
            name,
            module,
            self.weight_dtype,
            self.accelerator,
            parameters,
            max_grad_norm=args.max_grad_norm,
            accumulation=args.gradient_accumulation_steps,
            subfolder=subfolder,
            **how,
        )

        def make_optimizer(own: list[torch.nn.Parameter]):
            betas, eps, decay = (args.adam_beta1, args.adam_beta2), args.adam_epsilon, args.adam_weight_decay
            kind, how = torch.optim.AdamW, {"fused": True}  # without temporaries as large as the weights
            if args.use_8bit_adam:
                import bitsandbytes

                kind, how = bitsandbytes.optim.AdamW8bit, {}
            optimizer = kind(own, lr=learning_rate, betas=betas, eps=eps, weight_decay=decay, **how)
            return optimizer, self._lr_scheduler(optimizer, step_every)

        role.prepare(make_optimizer)
        role._set_learning(False)
        self.trained.append(role)
        return role

    def _deepspeed_config(self, gather_bf16: bool) -> dict:
        """DeepSpeed's configuration of one network: the launch's, and what our flags say."""

        def said(node: dict) -> dict:
            return {k: said(v) if isinstance(v, dict) else v for k, v in node.items() if v != "auto"}

        return said(copy.deepcopy(self.launch.plugin.deepspeed_config)) | {
            "train_micro_batch_size_per_gpu": self.args.train_batch_size,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,  # a role says itself when it steps
            "gradient_clipping": self.args.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": gather_bf16 and self.args.mixed_precision == "bf16", "check_grad_overflow": True},
        }

    def _lr_scheduler(self, optimizer, step_every: int):
        args = self.args
        warmup, total = args.lr_warmup_steps // step_every, max(1, args.max_train_steps // step_every)
        scheduler = get_scheduler(args.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=total)
        if args.lr_warmup_start_factor > 0:
            # The warm-up rises from this fraction of the rate instead of from 0.
            def from_start(factor):
                start = args.lr_warmup_start_factor
                return lambda step: start + (1 - start) * factor(step) if step < warmup else factor(step)

            scheduler.lr_lambdas = [from_start(factor) for factor in scheduler.lr_lambdas]
            for group, base, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas):
                group["lr"] = base * factor(0)
        return scheduler

    def last_checkpoint(self) -> str:
        """What a message says of the checkpoint to go on from."""
        return f"checkpoint-{self.saved} is complete" if self.saved else "no checkpoint has been saved yet"

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean of a tensor over all processes; one collective, no host sync."""
        return self.accelerator.reduce(values, reduction="mean")

    def gather_objects(self, objects: list) -> list:
        """The lists of all processes, joined."""
        return gather_object(objects) if self.accelerator.num_processes > 1 else objects

    def to_device(self, batch: dict) -> dict:
        """A batch with its tensors on this process's device."""
        return {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def start_trackers(self, project: str) -> None:
        """Starts --report_to with the run's arguments as its configuration; before any weight loads.

        Raises:
            UserError: exit code 2: the tracker does not start: no key, no server, a folder that cannot be written to.
        """
        plain = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(self.args).items()}
        try:
            self.accelerator.init_trackers(project, config=plain)
        except Exception as error:  # every tracker has its own
            problem = f"does not start ({type(error).__name__}: {error})"  # `run_script` makes one line of it
            fix = "log in to it, set its key, or give tensorboard or none"
            raise UserError(f"--report_to {self.args.report_to}: {problem}: {fix}", exit_code=2) from error
        for tracker in self.accelerator.trackers:
            if self.args.validation_prompts and not hasattr(tracker, "log_images"):
                logger.warning(
                    f"--report_to {tracker.name} shows no images: those of --validation_prompts are not logged"
                )

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """One image to every tracker that shows images."""
        for tracker in self.accelerator.trackers:
            if not hasattr(tracker, "log_images"):
                continue  # `start_trackers` has said so
            if tracker.name == "tensorboard":
                tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")
            else:
                tracker.log_images({name: [image] if tracker.name in TAKE_LISTS else image}, step=step)
