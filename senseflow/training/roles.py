# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The roles of a training loop: student, teacher, fake score and discriminator.

A role hides how its network is distributed over the processes. `Role` holds a full copy in every process (a single
process, or DDP); senseflow.training.sharded has the roles of FSDP2 and of DeepSpeed's ZeRO. A role may train a part of
its module only (`parameters`) and share other tensors with other roles, as adapters do (senseflow.models.lora).
"""

import copy
import functools
import os
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, NoReturn, Optional, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DeepSpeedPlugin,
    DynamoBackend,
    FullyShardedDataParallelPlugin,
    TorchDynamoPlugin,
    parse_flag_from_env,
)
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from torch.distributed.fsdp import CPUOffloadPolicy

from senseflow.errors import UserError, loading, require_package
from senseflow.models.autocast import WeightCopies
from senseflow.models.lora import save_adapter, stored_name
from senseflow.models.weights import (
    Weights,
    materialize,
    meta_network,
    read_into,
    save_tensors,
    state_dict_problems,
    stored_weights,
)
from senseflow_utils import ida_update


UPDATE_SAMPLE_SIZE = 2**20  # about how many values of a network `step(measure_update=True)` compares
DIFFUSERS_FILE = "diffusion_pytorch_model{suffix}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# How the processes were launched
# ---------------------------------------------------------------------------------------------------------------------
class LaunchConfig:
    """The configuration that `accelerate launch --config_file` left in the environment.

    Attributes:
        mode: "replicated" (a single process, or DDP), "fsdp2", "zero2" or "zero3".
        world_size: the number of processes over all nodes.
        plugin: accelerate's plugin of FSDP2 or DeepSpeed, else None.
        compile_options: arguments of torch.compile; None if nothing is compiled.
    Raises:
        UserError: exit code 2; no role can follow the configuration.
    """

    def __init__(self):
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.mode, self.plugin = "replicated", None
        for name in ("parallelism_config", "megatron_lm"):
            if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
                self._reject(name, "remove it; fsdp2.yaml shards over all processes")
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            require_package("deepspeed", "the DeepSpeed configuration of accelerate")
            self.plugin = DeepSpeedPlugin()
            self.mode = f"zero{self.plugin.zero_stage}"
            config = self.plugin.deepspeed_config
            offload = [config["zero_optimization"].get(f"offload_{name}") or {} for name in ("optimizer", "param")]
            for entry in {"optimizer", "scheduler"} & config.keys():
                self._reject(f"{entry} of the DeepSpeed file", "remove it; flags such as --learning_rate set it")
            if self.plugin.zero_stage not in (2, 3):
                self._reject(f"zero_stage {self.plugin.zero_stage}", "set it to 2 or 3, or use ddp.yaml")
            if any(entry.get("device") not in ("none", None) for entry in offload):
                fix = "set them to none; more processes or ZeRO-3 save memory"
                self._reject("offload_optimizer_device, offload_param_device", fix)
        elif parse_flag_from_env("ACCELERATE_USE_FSDP"):
            self.plugin, self.mode = FullyShardedDataParallelPlugin(), "fsdp2"
            if self.plugin.fsdp_version != 2:
                self._reject(f"fsdp_version {self.plugin.fsdp_version}", "set it to 2")
            if isinstance(self.plugin.cpu_offload, CPUOffloadPolicy):
                self._reject("fsdp_offload_params", "set it to false")
            if self.plugin.activation_checkpointing:
                self._reject("fsdp_activation_checkpointing", "set it to false and give --gradient_checkpointing")
        self.compile_options = self._read_compile_options()

    def _read_compile_options(self) -> Optional[dict[str, Any]]:
        try:
            plugin = TorchDynamoPlugin()
        except ValueError as error:
            self._reject(f"dynamo_backend ({error})", "set it to inductor or no")
        if plugin.backend == DynamoBackend.NO:
            return None
        if self.mode.startswith("zero"):
            self._reject("dynamo_backend with DeepSpeed", "set it to no, or use ddp.yaml or fsdp2.yaml")
        # As the launcher, which always passes it; torch itself would compile for any size at the second one.
        options = {"dynamic": False} | plugin.to_kwargs()
        if plugin.mode == "reduce-overhead":  # CUDA graphs overwrite what later blocks and the backward read
            self._reject("dynamo_mode reduce-overhead", "set it to default or max-autotune")
        if plugin.mode == "max-autotune":
            options["mode"] = "max-autotune-no-cudagraphs"
        return options

    @staticmethod
    def _reject(entry: str, fix: str) -> NoReturn:
        raise UserError(f"accelerate's configuration: {entry} is not supported here: {fix}", exit_code=2)


@functools.cache
def launch_config() -> LaunchConfig:
    """Read the launch configuration once, then remove it from the environment.

    Otherwise accelerate would prepare and compile networks by its own rules (one network with one optimizer), and
    transformers and diffusers would load text encoders as networks to be sharded.
    """
    launch = LaunchConfig()
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_DYNAMO_BACKEND"):
        os.environ.pop(variable, None)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed searches for one and warns, whoever imports it
    if launch.mode.startswith("zero"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return launch


# ---------------------------------------------------------------------------------------------------------------------
# A full copy in every process
# ---------------------------------------------------------------------------------------------------------------------
class Role:
    """A network with a part in the training loop, with its optimizer if it is trained. `Runtime` makes roles.

    Calling a role runs its network. Inside the role's own `accumulate`, with gradients enabled, the call goes through
    the wrapper that synchronizes gradients between processes. Anywhere else the network is frozen, and gradient still
    flows to its inputs.

    Args:
        name: "student", "teacher", "fake_score" or "discriminator".
        module: the network, on any device; on the meta device (senseflow.models.weights) until `prepare`.
        dtype: the dtype to which callers cast floating-point inputs.
        accelerator, args: of the run; of args, max_grad_norm and gradient_accumulation_steps are read.
        parameters: the trained parameters by their names in the module; none for the teacher.
        autocast: whether a call runs under the run's autocast; not needed where `accelerator.prepare` adds it.
        subfolder: the folder of the weights in a checkpoint (default: the name).
        copy_weights: keep copies of the trained weights in `dtype`, that of autocast.
    Attributes:
        module: the bare network, for a pipeline or its config; a training loop never calls it.
        parameters: what the optimizer owns, by name; shards if the network is sharded.
        copies: of the trained weights; None without `copy_weights`.
        weight_bytes: the size of the weights in a checkpoint.
        num_trained_params: the number of trained values.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        dtype: torch.dtype,
        accelerator: Accelerator,
        args,
        parameters: Optional[dict[str, torch.nn.Parameter]] = None,
        autocast: bool = False,
        subfolder: Optional[str] = None,
        copy_weights: bool = False,
    ):
        self.name, self.module, self.dtype, self.accelerator = name, module, dtype, accelerator
        self.parameters, self.autocast, self.subfolder = parameters or {}, autocast, subfolder or name
        self.copies: Optional[WeightCopies] = None
        self._copy_weights = copy_weights
        self.max_grad_norm, self.accumulation = args.max_grad_norm, args.gradient_accumulation_steps
        self.optimizer = self.lr_scheduler = None
        self._wrapped, self._training, self._num_micro_batches = module, False, 0
        self._class = type(module)  # FSDP2 changes the class of the module
        self._adapted = hasattr(module, "peft_config")
        # What a checkpoint holds: a diffusers network whole, of one with an adapter the trained parameters, of another
        # module these and its buffers.
        state = module.state_dict()  # of full tensors: the module is not sharded yet
        if self._adapted or not hasattr(module, "save_pretrained"):
            buffers = {} if self._adapted else dict(module.named_buffers())
            state = {name: tensor for name, tensor in state.items() if name in self.parameters or name in buffers}
        self._module_names = {stored_name(name): name for name in state}  # {name in a checkpoint: name in the module}
        self._stored = {stored_name(name): torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        self.num_trained_params = sum(parameter.numel() for parameter in self.parameters.values())

    def prepare(self, make_optimizer: Callable[[list[torch.nn.Parameter]], tuple]) -> None:
        """Materialize the network, then make its optimizer and wrapper.

        Args:
            make_optimizer: `make_optimizer(parameters)` -> (optimizer, lr_scheduler).
        """
        materialize(self.module, self.accelerator.device)
        self._make_optimizer(make_optimizer)
        self._wrapped = self.accelerator.prepare(self.module)
        if self._copy_weights:
            self.copies = WeightCopies(self.module, list(self.parameters.values()), self.dtype)

    def _make_optimizer(self, make_optimizer) -> None:
        """Make the optimizer of the module's present parameters: materialization and sharding have replaced them."""
        current = dict(self.module.named_parameters())
        self.parameters = {name: current[name] for name in self.parameters}
        self.optimizer, self.lr_scheduler = make_optimizer(list(self.parameters.values()))

    def __call__(self, *args, **kwargs):
        training = self._training and torch.is_grad_enabled()
        network = self._wrapped if training else self.module
        if self.copies is not None and training:
            self.copies.attach()
        with self.accelerator.autocast() if self.autocast else nullcontext():
            return network(*args, **kwargs)

    @contextmanager
    def accumulate(self):
        """Train on one micro-batch: run forward, loss and `backward` inside, and call `step` after the last one.

        Only this role's parameters take gradient inside. Gradients that other roles have accumulated stay.
        """
        self._num_micro_batches += 1
        last = self._num_micro_batches % self.accumulation == 0
        with nullcontext() if last else self._defer_gradient_sync():
            self._set_training(True)
            try:
                yield
            finally:
                self._set_training(False)

    def _defer_gradient_sync(self) -> ContextManager:
        """Keep gradients from being averaged over the processes, since another micro-batch follows."""
        return self.accelerator.no_sync(self._wrapped)

    def _set_training(self, training: bool) -> None:
        self._training = training
        self.module.train(training)
        for parameter in self.parameters.values():
            parameter.requires_grad_(training)
        if self.copies is not None and not training:
            self.copies.detach()

    def backward(self, loss: torch.Tensor) -> None:
        """Backpropagate a micro-batch's mean loss, divided by the number of micro-batches; inside `accumulate`."""
        (loss / self.accumulation).backward()

    def step(self, measure_update: bool = False):
        """Clip, step optimizer and learning rate, and clear the gradients, without a host sync.

        A step whose gradient norm is not finite is skipped: weights and moments stay, and the learning rate goes on.
        8-bit Adam cannot skip without a sync, so its gradient becomes zero: moments decay, and weights still follow
        them.

        Returns:
            The gradient norm before clipping. With `measure_update` a pair: that norm, and the ratio of the update's
            norm to the weights' norm, measured on about UPDATE_SAMPLE_SIZE values.
        """
        before = self._sample_masters() if measure_update else None
        norm = self._step()
        self._refresh_copies()
        if before is None:
            return norm
        after = self._sample_masters()
        squares = torch.stack([(after - before).square().sum(), after.square().sum()])
        update, weights = self._sum_over_shards(squares).sqrt()
        return norm, update / weights

    def _step(self) -> torch.Tensor:
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = self._full_tensor(torch.nn.utils.get_total_norm(gradients))
        scale, finite = (norm / self.max_grad_norm).clamp(min=1), norm.isfinite()
        if self.optimizer.defaults.get("fused"):
            # As torch.amp.GradScaler does: gradients are divided by grad_scale; if found_inf is 1, nothing happens.
            self.optimizer.grad_scale, self.optimizer.found_inf = scale, (~finite).float()
        else:
            torch._foreach_div_(gradients, scale)
            for gradient in gradients:  # not a product with 0, which would keep NaN
                gradient.masked_fill_(~finite, 0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _sample_masters(self) -> torch.Tensor:
        """Take every n-th value of this process' float32 master weights, flat."""
        stride = max(1, self.num_trained_params // UPDATE_SAMPLE_SIZE)
        return torch.cat([tensor.flatten()[::stride] for tensor in self._masters()])

    def ida_update_from(self, other: "Role", decay: float) -> None:
        """IDA: move every parameter towards the other role's: own <- decay * own + (1 - decay) * other."""
        ida_update(self._masters(), other._masters(), decay)
        self._refresh_copies()

    def _refresh_copies(self) -> None:
        if self.copies is not None:
            self.copies.refresh()

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def check_finite(self, origin: str = "") -> None:
        """Raise a UserError in all processes if the weights or moments hold NaN or infinity.

        Args:
            origin: what a message says before the problem.
        """
        moments = [value for state in self._optimizer_state().values() for value in state.values()]
        tensors = [*self._masters(), *filter(torch.is_tensor, moments)]
        finite = torch.stack([tensor.isfinite().all().to(self.accelerator.device) for tensor in tensors]).all()
        if self.accelerator.reduce(finite.float(), reduction="mean") < 1:
            fix = "resume from an earlier checkpoint with a lower --learning_rate"
            raise UserError(f"{origin}the weights of the {self.name} are not finite; {fix}")

    # What sharded roles override.
    def _masters(self) -> list[torch.Tensor]:
        """Return the float32 master weights, which the optimizer owns, as plain tensors; this process' shards."""
        return [parameter.detach() for parameter in self.parameters.values()]

    def _sum_over_shards(self, sums: torch.Tensor) -> torch.Tensor:
        """Add up what each process has summed over its shards. All processes call it."""
        return sums

    def _full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather a parameter or buffer of the module. All processes call it."""
        return tensor

    # Checkpoints. Weights are written in full, as a single process would write them; optimizer state in shards.
    def gather_network(self) -> Optional[torch.nn.Module]:
        """Return the full network in the main process, None in others, after training. All processes call it."""
        return self.module if self.accelerator.is_main_process else None

    def weights(self) -> dict[str, torch.Tensor]:
        """Gather what a checkpoint stores, on the CPU of the main process; empty elsewhere. All processes call it."""
        tensors, weights = self.module.state_dict(keep_vars=True), {}
        for stored, name in self._module_names.items():
            tensor = self._full_tensor(tensors[name]).detach()
            if self.accelerator.is_main_process:
                weights[stored] = tensor.cpu().contiguous()
        return weights

    def save(self, folder: Path) -> None:
        """Write the optimizer state, and the weights as safetensors files, in diffusers' layout for its networks.

        All processes call it. None holds more than its shards and one full tensor.
        """
        path, is_main, names = folder / self.subfolder, self.accelerator.is_main_process, {}
        if is_main:
            path.mkdir(parents=True, exist_ok=True)
        if self._adapted:
            weights = self.weights()
            if is_main:
                save_adapter(path, self.module, weights)
        else:
            if hasattr(self.module, "save_pretrained"):
                names = {"pattern": DIFFUSERS_FILE, "index": SAFE_WEIGHTS_INDEX_NAME}
                if is_main:  # through a network of the original class, whose name goes into config.json
                    meta_network(self._class, self.module.config, Weights()).save_config(path)
            tensors = self.module.state_dict(keep_vars=True)

            def gather(stored: str) -> torch.Tensor:
                return self._full_tensor(tensors[self._module_names[stored]])

            save_tensors(path, self._stored, gather, is_main, **names)
        shard, num_shards = self._shard_index()
        if shard is not None:
            state = {"state": self._optimizer_state(), "steps": self.lr_scheduler.last_epoch}
            torch.save(state, folder / f"{self.name}_optimizer-{shard + 1:05d}-of-{num_shards:05d}.pt")

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote. Learning rates, their schedule and betas are this run's, at the stored step.

        Raises:
            UserError: exit code 1; files are missing, damaged, or of another network.
        """
        flag, path = "--resume_from_checkpoint", folder / self.subfolder
        with loading(f"{flag} {path}"):
            weight_files = sorted(path.glob("*.safetensors"))
            optimizer_files = sorted(folder.glob(f"{self.name}_optimizer-*.pt"))
            if not weight_files or not optimizer_files:
                raise OSError(f"no {'optimizer state' if weight_files else 'weights'} of the {self.name}")
            weights = stored_weights(weight_files)
            problem = state_dict_problems(self._stored, weights)
            if problem:
                raise UserError(f"{flag} {folder}: {self.name} is another network ({problem})")
            for file in optimizer_files:
                if not zipfile.is_zipfile(file):
                    raise UserError(f"{flag} {folder}: {file.name} is empty or cut; resume from another checkpoint")
            num_files = int(optimizer_files[0].stem.rpartition("-")[2])
            if len(optimizer_files) != num_files:
                problem = f"holds {len(optimizer_files)} of the {num_files} files {self.name}_optimizer-*.pt"
                raise UserError(f"{flag} {folder}: {problem}; copy the others, too")
            # Memory-mapped: of many shards, each process reads only its own rows of every tensor.
            shards = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in optimizer_files]
            self._load_weights(weights)
            self._refresh_copies()
            self._load_optimizer_state([shard["state"] for shard in shards])
        set_schedule_step(self.lr_scheduler, shards[0]["steps"])

    def _shard_index(self) -> tuple[Optional[int], int]:
        """Return (index of the optimizer shard that this process writes, or None; number of shards)."""
        return (0 if self.accelerator.is_main_process else None), 1

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Return this process' Adam moments, {parameter name: {"exp_avg": ...}}; empty before the first step."""
        state = self.optimizer.state
        return {name: dict(state[parameter]) for name, parameter in self.parameters.items() if parameter in state}

    @torch.no_grad()
    def _load_weights(self, weights: Weights) -> None:
        """Read the stored weights, one tensor at a time."""
        tensors = self.module.state_dict(keep_vars=True)
        for stored, name in self._module_names.items():
            read_into(tensors[name], weights, stored)

    def _load_optimizer_state(self, shards: Sequence[dict]) -> None:
        """Read the optimizer state of all shards, of one process or several."""
        state = {index: join_shards(shards, name) for index, name in enumerate(self.parameters) if name in shards[0]}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def join_shards(shards: Sequence[dict], name: str, rows: slice = slice(None)) -> dict[str, Any]:
    """Join a parameter's optimizer state from shards along the first dimension, and return a copy of some rows.

    Other rows are not read.
    """
    joined = {}
    for key, value in shards[0][name].items():
        if not torch.is_tensor(value) or not value.dim():
            joined[key] = copy.deepcopy(value)
            continue
        tensors = [shard[name][key] for shard in shards]
        start, stop, _ = rows.indices(sum(map(len, tensors)))
        selected, offset = [], 0
        for tensor in tensors:
            selected.append(tensor[max(start - offset, 0) : max(stop - offset, 0)])
            offset += len(tensor)
        joined[key] = torch.cat(selected)
    return joined


def set_schedule_step(lr_scheduler: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """Set a learning-rate schedule to a step, and its optimizer's learning rates to those of that step."""
    lr_scheduler.last_epoch = step
    groups = lr_scheduler.optimizer.param_groups
    for group, rate, factor in zip(groups, lr_scheduler.base_lrs, lr_scheduler.lr_lambdas):
        group["lr"] = rate * factor(step)
