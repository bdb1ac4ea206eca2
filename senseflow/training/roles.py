# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The roles of a training loop (student, teacher, fake_score, discriminator), and what may stand behind them.

    Role         a copy of the network in every process: one process, or DDP
    ShardedRole  weights, gradients and optimizer state shared out by FSDP2
    ZeroRole     by DeepSpeed: the optimizer state and gradients (ZeRO-2), the weights too (ZeRO-3)

A loop speaks to a role and never to what is behind it. That a role trains a part of its module alone (`parameters`), over tensors
which other roles share (senseflow.models.lora), is decided here, too.
"""

import copy
import functools
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, ContextManager, Optional, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from torch.distributed.fsdp import CPUOffloadPolicy

from senseflow.errors import UserError, loading, require_package
from senseflow.models.lora import save_adapter, stored_name
from senseflow.models.weights import Weights, materialize, meta_network, read_into, save_tensors
from senseflow_utils import ida_update


SAMPLE = 2**20  # values of a network, by which an update is measured
DIFFUSERS_FILE = "diffusion_pytorch_model{suffix}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# How the processes were launched
# ---------------------------------------------------------------------------------------------------------------------
class LaunchConfig:
    """What `accelerate launch --config_file` asked for.

    Attributes:
        mode: "replicated" (one process, or DDP), "fsdp2", "zero2", "zero3".
        world_size: number of processes over all nodes.
        plugin: accelerate's reading of the configuration file under fsdp2 and ZeRO, else None.
    """

    def __init__(self):
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.mode, self.plugin = "replicated", None
        if _set("ACCELERATE_USE_DEEPSPEED"):
            require_package("deepspeed", "the DeepSpeed configuration of accelerate")
            self.plugin = DeepSpeedPlugin()
            self.mode = f"zero{self.plugin.zero_stage}"
            zero = self.plugin.deepspeed_config["zero_optimization"]
            for entry in sorted({"optimizer", "scheduler"} & set(self.plugin.deepspeed_config)):
                self._refuse(
                    f"{entry} of the DeepSpeed file",
                    "leave it out; --learning_rate, --adam_beta1, --lr_scheduler, ... say it",
                )
            offloaded = {
                (zero.get(name) or {}).get("device", "none") for name in ("offload_optimizer", "offload_param")
            }
            if self.plugin.zero_stage not in (2, 3):
                self._refuse(f"zero_stage {self.plugin.zero_stage}", "give 2 or 3, or take ddp.yaml")
            if offloaded - {"none", None}:
                self._refuse(
                    "offload_optimizer_device, offload_param_device",
                    "set them to none; more processes or ZeRO-3 save memory",
                )
        elif _set("ACCELERATE_USE_FSDP"):
            self.plugin = FullyShardedDataParallelPlugin()
            self.mode = "fsdp2"
            if self.plugin.fsdp_version != 2:
                self._refuse(f"fsdp_version {self.plugin.fsdp_version}", "set it to 2")
            if isinstance(self.plugin.cpu_offload, CPUOffloadPolicy):
                self._refuse("fsdp_offload_params", "set it to false")
            if self.plugin.activation_checkpointing:
                self._refuse("fsdp_activation_checkpointing", "set it to false and give --gradient_checkpointing")

    @staticmethod
    def _refuse(entry: str, fix: str):
        raise UserError(f"accelerate's configuration: {entry} is not supported here: {fix}", exit_code=2)


def _set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


@functools.cache
def launch_config() -> LaunchConfig:
    """How this process was launched. UserError (exit code 2) for a configuration that no role can follow.

    Read once, and then taken out of the environment: accelerate would prepare networks after its own rules (one per process, with
    an optimizer), and transformers and diffusers would load text encoders as if they were to be sharded, too.
    """
    launch = LaunchConfig()
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ.pop(variable, None)
    if not torch.cuda.is_available():
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # not looked for, with a warning, when a library imports deepspeed
    if launch.mode.startswith("zero"):
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    return launch


# ---------------------------------------------------------------------------------------------------------------------
# A copy in every process
# ---------------------------------------------------------------------------------------------------------------------
class Role:
    """One of the networks that the loop speaks of.

    Called, it runs its network: inside its own `accumulate` and with gradients enabled through whatever synchronizes gradients
    between processes, everywhere else as a frozen network (gradient still flows to its inputs). Made by `Runtime`.

    Args:
        name: "student", "teacher", "fake_score", "discriminator".
        module: the network, on the CPU or on its device, or empty (senseflow.models.weights), to be filled where it learns.
        dtype: what floating-point inputs are cast to.
        accelerator: of the run.
        parameters: what it trains, by name in the module; none for the teacher.
        autocast: whether the network computes under the run's autocast, where nothing else puts it there.
        max_grad_norm, accumulation: of its step; micro-batches of an iteration.
        subfolder: where a checkpoint holds its weights (default: its name).
    Attributes:
        module: the bare network, for a pipeline or a config; never call it in a loop.
        parameters: what the optimizer owns, by name; shards where the network is sharded.
        weight_bytes, num_trained_params: size of what a checkpoint stores of the network, and how many numbers it trains.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        dtype: torch.dtype,
        accelerator: Accelerator,
        parameters: Optional[dict[str, torch.nn.Parameter]] = None,
        autocast: bool = False,
        max_grad_norm: float = 1.0,
        accumulation: int = 1,
        subfolder: Optional[str] = None,
    ):
        self.name, self.module, self.dtype, self.accelerator = name, module, dtype, accelerator
        self.parameters = {} if parameters is None else parameters
        self.autocast, self.max_grad_norm, self.accumulation = autocast, max_grad_norm, accumulation
        self.subfolder = subfolder or name
        self.optimizer = self.lr_scheduler = None
        self._wrapped, self._learning, self._turns = module, False, 0
        self._class = type(module)  # before a wrapper gives it another
        state = module.state_dict()  # before anything shards it
        self._adapted = hasattr(module, "peft_config")
        if self._adapted or not hasattr(module, "save_pretrained"):
            kept = {*self.parameters, *(() if self._adapted else dict(module.named_buffers()))}
            state = {name: tensor for name, tensor in state.items() if name in kept}
        self._stored = {stored_name(name): name for name in state}  # {name in a checkpoint: name in the module}
        self._like = {stored_name(name): torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
        self.weight_bytes = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        self.num_trained_params = sum(parameter.numel() for parameter in self.parameters.values())

    def prepare(self, make_optimizer: Callable[[list[torch.nn.Parameter]], tuple]) -> None:
        """Puts the network where it learns; `make_optimizer(parameters) -> (optimizer, lr_scheduler)`."""
        materialize(self.module, self.accelerator.device)
        self._look_up_parameters()
        self.optimizer, self.lr_scheduler = make_optimizer(list(self.parameters.values()))
        self._wrapped = self.accelerator.prepare(self.module)

    def _look_up_parameters(self) -> None:
        """After what has put others into their place."""
        own = dict(self.module.named_parameters())
        self.parameters = {name: own[name] for name in self.parameters}

    def __call__(self, *args, **kwargs):
        network = self._wrapped if self._learning and torch.is_grad_enabled() else self.module
        with self.accelerator.autocast() if self.autocast else nullcontext():
            return network(*args, **kwargs)

    @contextmanager
    def accumulate(self):
        """The role's turn to learn from one micro-batch: forward, loss and `backward` happen inside, `step` after the last.

        Entered once per micro-batch. Only this role's parameters take gradient; what other roles accumulated stays.
        """
        self._turns += 1
        with self._gradients_stay_here(self._turns % self.accumulation > 0):
            self._set_learning(True)
            try:
                yield
            finally:
                self._set_learning(False)

    def _gradients_stay_here(self, yes: bool) -> ContextManager:
        """Whether the processes' gradients are not averaged yet, as another micro-batch follows."""
        return self.accelerator.no_sync(self._wrapped) if yes else nullcontext()

    def _set_learning(self, learning: bool) -> None:
        self._learning = learning
        self.module.train(learning)
        for parameter in self.parameters.values():
            parameter.requires_grad_(learning)

    def backward(self, loss: torch.Tensor) -> None:
        """Backward of a micro-batch's mean loss; divides by the number of accumulated micro-batches. Inside `accumulate` only."""
        (loss / self.accumulation).backward()

    def _step(self) -> torch.Tensor:
        """Clips, steps optimizer and schedule, clears the gradients. Returns the gradient norm before clipping (no host sync).

        A step whose norm is not finite is not taken: weights and moments stay as they are, and the schedule goes on. 8-bit Adam
        cannot be told so without a sync, and takes the gradient for zero: moments decay, and weights follow what is left of them.
        """
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        norm = self._full_tensor(torch.nn.utils.get_total_norm(gradients))
        scale, finite = (norm / self.max_grad_norm).clamp(min=1), norm.isfinite()
        if self.optimizer.defaults.get("fused"):
            # As torch.amp.GradScaler hands them over: the one divides the gradients, where the other is 1 nothing happens.
            self.optimizer.grad_scale, self.optimizer.found_inf = scale, (~finite).float()
        else:
            for gradient in gradients:
                gradient.div_(scale).masked_fill_(~finite, 0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def step(self, measure_update: bool = False):
        """Clips, steps optimizer and schedule, clears the gradients (no host sync).

        Returns:
            The gradient norm before clipping; with `measure_update` (it, norm of the update over that of the weights), both of about
            SAMPLE of their values.
        """
        before = self._some_values() if measure_update else None
        norm = self._step()
        if before is None:
            return norm
        after = self._some_values()
        update, weights = self._over_parts(torch.stack([(after - before).square().sum(), after.square().sum()])).sqrt()
        return norm, update / weights

    def _some_values(self) -> torch.Tensor:
        """Every n-th value of the masters that this process holds, flat."""
        stride = max(1, self.num_trained_params // SAMPLE)
        return torch.cat([tensor.flatten()[::stride] for tensor in self._masters()])

    def ida_update_from(self, other: "Role", decay: float) -> None:
        """IDA: moves every parameter of this role towards the other role's: own <- decay * own + (1 - decay) * other."""
        ida_update(list(self.parameters.values()), list(other.parameters.values()), decay)

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def _masters(self) -> list[torch.Tensor]:
        """This process's part of the fp32 weights that the optimizer owns, as plain tensors."""
        return [parameter.detach() for parameter in self.parameters.values()]

    def check_finite(self) -> None:
        """Refuses (UserError, in all processes) weights that hold NaN or infinity: they shall not be saved over sound ones."""
        finite = torch.stack([tensor.isfinite().all() for tensor in self._masters()]).all()
        if self.accelerator.reduce(finite.float(), reduction="mean") < 1:
            raise UserError(
                f"the weights of the {self.name} are not finite; resume from a checkpoint with a lower --learning_rate"
            )

    # Checkpoints: the whole weights in one place, as a single process would write them; the optimizer's state by parts.
    def network(self) -> Optional[torch.nn.Module]:
        """The whole network, in the main process; None in the others. All call it; nobody trains it any further."""
        return self.module if self.accelerator.is_main_process else None

    def _over_parts(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over this process's part of the weights, over all of them; all processes call it."""
        return sums

    def _full_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """A parameter or buffer as it is without sharding; all processes call it."""
        return tensor

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by their names in the module."""
        return {**dict(self.module.named_parameters(remove_duplicate=False)), **dict(self.module.named_buffers())}

    def weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint stores of the network, on the CPU of the main process; empty in the others. All call it."""
        tensors, weights = self._tensors(), {}
        for stored, name in self._stored.items():
            whole = self._full_tensor(tensors[name]).detach()
            if self.accelerator.is_main_process:
                weights[stored] = whole.cpu().contiguous()
        return weights

    def save(self, folder: Path) -> None:
        """Writes weights (safetensors; as diffusers does where the network is a diffusers model, or one with an adapter) and
        optimizer state. No process holds more of the network than it does anyway, and one tensor."""
        path, main, names = folder / self.subfolder, self.accelerator.is_main_process, {}
        if main:
            path.mkdir(parents=True, exist_ok=True)
        if self._adapted:
            weights = self.weights()
            if main:
                save_adapter(path, self.module, weights)
        else:
            if hasattr(self.module, "save_pretrained"):
                names = {"pattern": DIFFUSERS_FILE, "index": SAFE_WEIGHTS_INDEX_NAME}
                if main:
                    meta_network(self._class, self.module.config, Weights()).save_config(path)
            tensors = self._tensors()
            save_tensors(path, self._like, lambda name: self._full_tensor(tensors[self._stored[name]]), main, **names)
        part, parts = self._part()
        if part is not None:
            state = {"state": self._optimizer_state(), "steps": self.lr_scheduler.last_epoch}
            torch.save(state, folder / f"{self.name}_optimizer-{part + 1:05d}-of-{parts:05d}.pt")

    def _part(self) -> tuple[Optional[int], int]:
        """Which part of the optimizer's state this process writes, and how many there are."""
        return (0 if self.accelerator.is_main_process else None), 1

    def _optimizer_state(self) -> dict[str, dict[str, Any]]:
        """Adam's moments of this process's part, {parameter's name: {"exp_avg": ...}}; a network that has not stepped has none."""
        state = self.optimizer.state
        return {name: dict(state[parameter]) for name, parameter in self.parameters.items() if parameter in state}

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, exactly. Rates, betas and the schedule are those of THIS run, at the stored step.

        Raises:
            UserError: files missing, cut, or of another network.
        """
        with loading("--resume_from_checkpoint", folder / self.subfolder):
            weights = stored_weights(folder / self.subfolder)
            missing, unexpected = set(self._stored) - weights.names(), weights.names() - set(self._stored)
            missing = {name for name in missing if self._stored[name] in self.parameters}
            if missing or unexpected:
                raise UserError(
                    f"--resume_from_checkpoint {folder}: {self.name} is another network "
                    f"({len(missing)} weights missing, {len(unexpected)} unexpected)"
                )
            files = sorted(folder.glob(f"{self.name}_optimizer-*.pt"))
            if not files:
                raise OSError(f"no optimizer state of the {self.name}")
            # Of many parts, each process wants some rows of every tensor.
            parts = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
            self._load_weights(weights)
            self._load_optimizer_state([part["state"] for part in parts])
        steps = self.lr_scheduler.last_epoch = parts[0]["steps"]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas
        ):
            group["lr"] = base * factor(steps)

    @torch.no_grad()
    def _load_weights(self, weights: Weights) -> None:
        """Takes what is stored, one tensor after the other."""
        tensors = self._tensors()
        for stored in weights.names():
            read_into(tensors[self._stored[stored]], weights, stored)

    def _load_optimizer_state(self, parts: Sequence[dict]) -> None:
        """Takes the state of all parts; of a sharded run, too."""
        state = {index: join_shards(parts, name) for index, name in enumerate(self.parameters) if name in parts[0]}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})


def join_shards(parts: Sequence[dict], name: str, rows: slice = slice(None)) -> dict[str, Any]:
    """A copy of a parameter's optimizer state, or of some rows of it, from that of its shards, which are cut along their first
    dimension; of other rows nothing is read."""
    first, joined = parts[0][name], {}
    for key, value in first.items():
        if not torch.is_tensor(value) or not value.dim():
            joined[key] = copy.deepcopy(value)
            continue
        shards = [part[name][key] for part in parts]
        start, stop, _ = rows.indices(sum(len(shard) for shard in shards))
        kept, begin = [], 0
        for shard in shards:
            kept.append(shard[max(start - begin, 0) : max(stop - begin, 0)])
            begin += len(shard)
        joined[key] = torch.cat(kept)
    return joined


def stored_weights(folder: Path) -> Weights:
    """All tensors of a folder's safetensors files (one, or the shards of a large model)."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise OSError(f"no safetensors file in {folder}")
    return Weights(files, flag="--resume_from_checkpoint", path=folder)
