# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Roles whose weights, gradients and optimizer state are sharded over the processes: by FSDP2, or by DeepSpeed's ZeRO."""

import logging
import warnings
from contextlib import nullcontext
from typing import Optional

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from senseflow.models.lora import share_base
from senseflow.models.weights import Weights, is_meta, materialize, meta_network, read_into, rows_of
from senseflow.training.roles import Role, join_shards
from senseflow_utils import ida_update


class ShardedRole(Role):
    """A role of which no process holds everything."""

    def _over_parts(self, sums):
        return self.accelerator.reduce(sums, reduction="sum")

    def _gradients_stay_here(self, yes):
        return nullcontext()  # kept whole until the last micro-batch, they would fill the memory that sharding saves

    def network(self):
        weights = self.weights()
        if not self.accelerator.is_main_process:
            return None
        network = meta_network(self._class, self.module.config, Weights(tensors=weights))
        del network.weights
        network.load_state_dict(weights, assign=True)
        return network

    def _part(self):
        return self.accelerator.process_index, self.accelerator.num_processes


# FSDP2 ---------------------------------------------------------------------------------------------------------------
def shard(
    module: torch.nn.Module, mesh: DeviceMesh, reshard: bool, policy: Optional[MixedPrecisionPolicy] = None
) -> None:
    """Shares a network's weights out over the mesh, in place: its blocks (`_no_split_modules`) one by one, then the rest.

    Args:
        reshard: whether gathered weights are freed after the forward, and gathered once more for the backward.
        policy: precision of the gathered weights and of the gradients' average; None: that of the weights.
    """
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes it in place
    policy = policy or MixedPrecisionPolicy(cast_forward_inputs=False)
    options = {"mesh": mesh, "reshard_after_forward": reshard, "mp_policy": policy}
    blocks = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    for part in reversed(list(module.modules())):  # children before their parents
        if part is not module and type(part).__name__ in blocks:
            fully_shard(part, **options)
    fully_shard(module, **options)


class FSDP2Role(ShardedRole):
    """A role whose weights, gradients and optimizer state are shared out by FSDP2; checkpoints fit any number of processes.

    Args:
        mesh, reshard: see `shard`.
        half: gather the weights, which stay in float32 where the optimizer owns them, in the precision of `dtype`.
        base: the sharded network whose twin the module is, or holds; None where it is none.
    """

    def __init__(
        self, *args, mesh: DeviceMesh, reshard: bool, gather_bf16: bool, base: Optional[torch.nn.Module], **kwargs
    ):
        super().__init__(*args, **kwargs)
        self._mesh, self._reshard, self._gather_bf16, self._base = mesh, reshard, gather_bf16, base

    def prepare(self, make_optimizer):
        policy = None
        if self._gather_bf16:
            # Inputs are cast by the caller: a timestep of 759 would be 760 in bfloat16.
            policy = MixedPrecisionPolicy(
                param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        shard(self.module, self._mesh, self._reshard, policy)
        if is_meta(self.module):
            materialize(self.module, self.accelerator.device)
        if self._base is not None:
            share_base(self.module, self._base)
        # Now, as long as the parameters take gradient: FSDP looks at them once to learn the gradients' precision.
        self.module._get_fsdp_state()._lazy_init()
        self._look_up_parameters()
        self.optimizer, self.lr_scheduler = make_optimizer(list(self.parameters.values()))

    def __call__(self, *args, **kwargs):
        with self.accelerator.autocast():
            return super().__call__(*args, **kwargs)

    def _free_gathered(self) -> None:
        """Frees gathered weights that a forward has left behind: what happens to the shards must reach the next forward."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _set_learning(self, learning):
        self._free_gathered()
        super()._set_learning(learning)

    def ida_update_from(self, other, decay):
        self._free_gathered()
        super().ida_update_from(other, decay)

    def _tensors(self):
        self._free_gathered()  # not those: what numpy has looked at, as files are written, cannot be freed by FSDP2
        return super()._tensors()

    def _masters(self):
        return [parameter.detach().to_local() for parameter in self.parameters.values()]

    def _full_tensor(self, tensor):
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _optimizer_state(self):
        def local(value):
            return value.to_local() if isinstance(value, DTensor) else value

        return {name: {k: local(v) for k, v in state.items()} for name, state in super()._optimizer_state().items()}

    def _load_optimizer_state(self, parts):
        for name, parameter in self.parameters.items():
            if name in parts[0]:
                state = join_shards(parts, name, rows_of(parameter))
                # The number of steps goes to the device, too, where a fused optimizer wants it.
                own = {
                    k: self._shard_like(parameter, v) if v.dim() else v.to(parameter.device) for k, v in state.items()
                }
                self.optimizer.state[parameter] = own

    @staticmethod
    def _shard_like(parameter: DTensor, local: torch.Tensor) -> DTensor:
        """This process's rows as a tensor that is sharded as the parameter is."""
        how = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
        return DTensor.from_local(local.to(parameter.device), parameter.device_mesh, parameter.placements, **how)


# DeepSpeed -----------------------------------------------------------------------------------------------------------
def deepspeed_engine(module: torch.nn.Module, config: dict, optimizer: Optional[torch.optim.Optimizer] = None):
    """A network in DeepSpeed's hands."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def materialize_for_deepspeed(module: torch.nn.Module, config: dict, device: torch.device) -> None:
    """Fills an empty network as DeepSpeed wants it: in its precision, with ZeRO-3 shared out part by part."""
    if not is_meta(module):
        return
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    def share_out(part: torch.nn.Module) -> None:
        if any(True for _ in part.parameters(recurse=False)):
            deepspeed.zero.Init(module=part, config_dict_or_path=config)

    if config["bf16"]["enabled"]:
        module.to(torch.bfloat16)
    materialize(module, device, share_out if config["zero_optimization"]["stage"] == 3 else None)


class ZeroRole(ShardedRole):
    """A role in DeepSpeed's hands. Its checkpoints fit the same stage and number of processes alone.

    The optimizer owns flat float32 copies of this process's part of the weights (`_masters`): what the network computes with is
    filled from them, and a change to the network's own parameters would be lost at the next step.

    Args:
        config: DeepSpeed's, complete.
    """

    def __init__(self, *args, config: dict, **kwargs):
        super().__init__(*args, **kwargs)
        self._stage, self._config = config["zero_optimization"]["stage"], config

    def prepare(self, make_optimizer):
        materialize_for_deepspeed(self.module, self._config, self.accelerator.device)
        self._look_up_parameters()
        self.optimizer, self.lr_scheduler = make_optimizer(list(self.parameters.values()))
        self._wrapped = deepspeed_engine(self.module, self._config, self.optimizer)

    def backward(self, loss):
        self._wrapped.backward(loss / self.accumulation, scale_wrt_gas=False)

    def _step(self):
        self._wrapped.step()
        self.lr_scheduler.step()
        return torch.as_tensor(self._wrapped.get_global_grad_norm(), device=self.accelerator.device)

    def ida_update_from(self, other, decay):
        ida_update(self._masters(), other._masters(), decay)
        self._fill_network()

    def _masters(self):
        zero = self._wrapped.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _fill_network(self) -> None:
        """Makes the network compute with the masters' values."""
        zero = self._wrapped.optimizer
        if self._stage == 2:
            zero.update_lp_params()
            return
        zero.empty_partition_cache()  # small weights are kept whole, and would stay as they were
        for group in range(len(self._masters())):
            zero._reassign_or_swap_out_partitioned_parameters(group)

    def _full_tensor(self, tensor):
        from deepspeed.utils import safe_get_full_fp32_param

        if not isinstance(tensor, torch.nn.Parameter):
            return tensor
        tensor.requires_grad_(True)  # ZeRO-3 knows nothing of a frozen one
        whole = safe_get_full_fp32_param(tensor)
        tensor.requires_grad_(False)
        return whole

    def _optimizer_state(self):
        state = self.optimizer.state
        return {
            str(i): {"master": master.detach(), **state.get(master, {})} for i, master in enumerate(self._masters())
        }

    @torch.no_grad()
    def _load_weights(self, weights):
        for name, buffer in self.module.named_buffers():
            if name in weights:
                read_into(buffer, weights, name)

    @torch.no_grad()
    def _load_optimizer_state(self, parts):
        part = parts[self.accelerator.process_index]
        for index, master in enumerate(self._masters()):
            master.copy_(part[str(index)]["master"])
            state = {k: v.to(master.device, copy=True) for k, v in part[str(index)].items() if k != "master"}
            if state:
                self.optimizer.state[master] = state
        self._fill_network()
