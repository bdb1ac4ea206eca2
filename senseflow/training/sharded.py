# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Roles whose weights, gradients and optimizer state are sharded over the processes, by FSDP2 or DeepSpeed.

FSDP2 and ZeRO-3 shard all three; ZeRO-2 shards gradients and optimizer state.
"""

import logging
import warnings
from contextlib import nullcontext
from typing import Callable, Optional

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from senseflow.models.lora import share_base
from senseflow.models.weights import Weights, is_meta, local_rows, materialize, meta_network, read_into
from senseflow.training.roles import Role, join_shards


class ShardedRole(Role):
    """A role of which every process holds a shard."""

    def _sum_over_shards(self, sums):
        return self.accelerator.reduce(sums, reduction="sum")

    def _defer_gradient_sync(self):
        return nullcontext()  # unsharded gradients would take the memory that sharding saves

    def gather_network(self):
        weights = self.weights()
        if not self.accelerator.is_main_process:
            return None
        network = meta_network(self._class, self.module.config, Weights(weights))
        del network.weights
        network.load_state_dict(weights, assign=True)
        return network

    def _shard_index(self):
        return self.accelerator.process_index, self.accelerator.num_processes


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2
# ---------------------------------------------------------------------------------------------------------------------
def shard(
    module: torch.nn.Module, mesh: DeviceMesh, reshard: bool, policy: Optional[MixedPrecisionPolicy] = None
) -> None:
    """Shard a network's weights over the mesh, in place: each of its blocks (`_no_split_modules`), then the rest.

    Args:
        reshard: whether gathered weights are freed after the forward, and gathered again for the backward.
        policy: the precision of the gathered weights and of the gradients' average (default: that of the weights).
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    policy = policy or MixedPrecisionPolicy(cast_forward_inputs=False)
    options = {"mesh": mesh, "reshard_after_forward": reshard, "mp_policy": policy}
    blocks = {name for child in module.modules() for name in getattr(child, "_no_split_modules", None) or ()}
    for child in reversed(list(module.modules())):  # children before their parents
        if child is not module and type(child).__name__ in blocks:
            fully_shard(child, **options)
    fully_shard(module, **options)


class FSDP2Role(ShardedRole):
    """A role that FSDP2 shards. Its checkpoints fit any number of processes.

    Args:
        mesh, reshard: see `shard`.
        gather_bf16: gather the weights in `dtype`; the optimizer's own stay in float32.
    """

    def __init__(self, *args, mesh: DeviceMesh, reshard: bool, gather_bf16: bool, **kwargs):
        super().__init__(*args, autocast=True, **kwargs)
        self._mesh, self._reshard, self._gather_bf16 = mesh, reshard, gather_bf16

    def prepare(self, make_optimizer):
        policy = None
        if self._gather_bf16:  # callers cast the inputs: FSDP would round a timestep of 759 to 760
            policy = MixedPrecisionPolicy(
                param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        shard(self.module, self._mesh, self._reshard, policy)
        if is_meta(self.module):
            materialize(self.module, self.accelerator.device)
        share_base(self.module)
        # While the parameters require gradient: FSDP reads the dtype of their gradients only once.
        self.module._get_fsdp_state()._lazy_init()
        self._make_optimizer(make_optimizer)

    def _free_gathered(self) -> None:
        """Free weights that a forward left gathered, so that changed shards reach the next forward."""
        for child in self.module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def _set_training(self, training):
        self._free_gathered()
        super()._set_training(training)

    def ida_update_from(self, other, decay):
        self._free_gathered()
        super().ida_update_from(other, decay)

    def _masters(self):
        return [parameter.detach().to_local() for parameter in self.parameters.values()]

    def _full_tensor(self, tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _optimizer_state(self):
        def local(value):
            return value.to_local() if isinstance(value, DTensor) else value

        return {name: {k: local(v) for k, v in state.items()} for name, state in super()._optimizer_state().items()}

    def _load_optimizer_state(self, shards):
        for name, parameter in self.parameters.items():
            if name in shards[0]:
                state = join_shards(shards, name, local_rows(parameter))
                # The step count, too, goes to the device, where a fused optimizer expects it.
                self.optimizer.state[parameter] = {
                    key: self._shard_like(parameter, value) if value.dim() else value.to(parameter.device)
                    for key, value in state.items()
                }

    @staticmethod
    def _shard_like(parameter: DTensor, local: torch.Tensor) -> DTensor:
        """Make a tensor, sharded as the parameter is, of this process' rows."""
        kwargs = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(local.to(parameter.device), parameter.device_mesh, parameter.placements, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed
# ---------------------------------------------------------------------------------------------------------------------
def import_deepspeed():
    """Import DeepSpeed, which few runs need, without its log lines."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    return deepspeed


def deepspeed_engine(module: torch.nn.Module, config: dict, optimizer: Optional[torch.optim.Optimizer] = None):
    """Wrap a network in a DeepSpeed engine."""
    return import_deepspeed().initialize(model=module, optimizer=optimizer, config=config)[0]


def materialize_for_deepspeed(module: torch.nn.Module, config: dict, device: torch.device) -> None:
    """Materialize a network in DeepSpeed's precision; ZeRO-3 shards each submodule before the next one is read."""
    if not is_meta(module):
        return

    def shard_submodule(submodule: torch.nn.Module) -> None:
        if next(submodule.parameters(recurse=False), None) is not None:
            import_deepspeed().zero.Init(module=submodule, config_dict_or_path=config)

    if config["bf16"]["enabled"]:
        module.to(torch.bfloat16)
    on_read: Optional[Callable] = shard_submodule if config["zero_optimization"]["stage"] == 3 else None
    materialize(module, device, on_read)


class ZeroRole(ShardedRole):
    """A role that DeepSpeed shards. Its checkpoints fit only the same stage and number of processes.

    The optimizer owns flat float32 masters of this process' shard. The network's own parameters are copied from them
    after each step, so a change to those parameters would be lost.

    Args:
        config: the complete configuration of DeepSpeed.
    """

    def __init__(self, *args, config: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self._stage, self._config = config["zero_optimization"]["stage"], config

    def prepare(self, make_optimizer):
        materialize_for_deepspeed(self.module, self._config, self.accelerator.device)
        self._make_optimizer(make_optimizer)
        self._wrapped = deepspeed_engine(self.module, self._config, self.optimizer)

    def backward(self, loss):
        self._wrapped.backward(loss / self.accumulation, scale_wrt_gas=False)

    def _step(self):
        self._wrapped.step()
        self.lr_scheduler.step()
        return torch.as_tensor(self._wrapped.get_global_grad_norm(), device=self.accelerator.device)

    def ida_update_from(self, other, decay):
        super().ida_update_from(other, decay)
        self._copy_masters_to_network()

    def _masters(self):
        zero = self._wrapped.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _copy_masters_to_network(self) -> None:
        zero = self._wrapped.optimizer
        if self._stage == 2:
            zero.update_lp_params()
            return
        zero.empty_partition_cache()  # ZeRO-3 keeps small weights gathered: they would stay as they were
        for group in range(len(self._masters())):
            zero._reassign_or_swap_out_partitioned_parameters(group)

    def _full_tensor(self, tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(tensor, torch.nn.Parameter):
            return tensor
        tensor.requires_grad_(True)  # ZeRO-3 finds no master of a frozen parameter
        full = safe_get_full_fp32_param(tensor)
        tensor.requires_grad_(False)
        return full

    def _optimizer_state(self):
        moments, masters = self.optimizer.state, self._masters()
        return {str(i): {"master": master.detach(), **moments.get(master, {})} for i, master in enumerate(masters)}

    @torch.no_grad()
    def _load_weights(self, weights):
        for name, buffer in self.module.named_buffers():  # parameters come from the masters in the optimizer state
            if name in weights:
                read_into(buffer, weights, name)

    @torch.no_grad()
    def _load_optimizer_state(self, shards):
        shard = shards[self.accelerator.process_index]
        for index, master in enumerate(self._masters()):
            state = dict(shard[str(index)])
            master.copy_(state.pop("master"))
            if state:
                self.optimizer.state[master] = {k: v.to(master.device, copy=True) for k, v in state.items()}
        self._copy_masters_to_network()
