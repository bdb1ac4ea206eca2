# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""A training script's run on tensors without values, with its memory and FLOPs counted: what `--dry_run` is made of.

The script's own `load_parts` and `train_iteration` run on fake tensors, which have shapes and no values: of the teacher its
configurations are read and no weights. Every storage is counted where it is born and where it is freed, and every operation's
FLOPs. A sharded run of many processes is one process here, with a process group that talks to nobody.
"""

import math
import os
import sys
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import FunctionType
from typing import Any, Callable, Iterator, Optional
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from senseflow.arguments import torch_dtype
from senseflow.memory.counter import GRADIENTS, HOST, STATES, WEIGHTS, Counter, tensors_in
from senseflow.models.hub import ModelSource, fingerprint
from senseflow.models.quantization import quantize_network
from senseflow.models.text_encoders import text_encoders_of
from senseflow.models.weights import from_pretrained_meta


ENCODERS, FROZEN = "text encoders", "other frozen"
BLOCK = 256  # of bitsandbytes' 8-bit Adam: one scale for as many numbers
STAGES = {"networks": 20, "optimizers": 5, "other iteration": 25, "student's turn": 50}  # per cent of the time, about


# ---------------------------------------------------------------------------------------------------------------------
# What stands in for weights, optimizers that need a GPU, and other processes
# ---------------------------------------------------------------------------------------------------------------------
def of_diffusers(
    kind, path, subfolder=None, dtype=None, torch_dtype=None, output_loading_info=False, revision=None, **_
):
    config = kind.load_config(path, subfolder=subfolder, revision=revision)
    network = without_values(kind.from_config(config)).to(dtype or torch_dtype or torch.float32).eval()
    return (network, {"missing_keys": [], "unexpected_keys": []}) if output_loading_info else network


def of_transformers(
    kind, path, subfolder="", dtype=None, torch_dtype=None, output_loading_info=False, revision=None, **_
):
    config = kind.config_class.from_pretrained(path, subfolder=subfolder or "", revision=revision or "main")
    network = without_values(kind(config)).to(dtype or torch_dtype or torch.float32).eval()
    return (network, {"missing_keys": set(), "unexpected_keys": set()}) if output_loading_info else network


def opened(source: ModelSource, cls, subfolder, dtype=torch.float32):
    return of_diffusers(cls, source.path, source.network_subfolder(subfolder), dtype, revision=source.revision)


def without_values(network: torch.nn.Module) -> torch.nn.Module:
    """A network of which no buffer is real, as tables of positions are that were computed by numpy."""
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return network


def _apply(module: torch.nn.Module, change: Callable, recurse: bool = True) -> torch.nn.Module:
    """`torch.nn.Module._apply`, which swaps fake tensors and so fails where anything refers to them; a parameter stays the same."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for own in (module._parameters, module._buffers):
        for name, tensor in own.items():
            changed = tensor if tensor is None else change(tensor)
            if changed is tensor:
                continue
            if own is module._parameters:
                tensor.data = changed.detach()
                tensor.fake_device = changed.device
            else:
                own[name] = changed
    return module


class AdamW8bit(torch.optim.Optimizer):
    """The states of bitsandbytes' AdamW8bit, which itself needs a GPU: one byte a moment and number, and scales."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if not self.state[parameter]:
                small = parameter.numel() < 4096
                for name in ("state1", "state2"):
                    self.state[parameter][name] = torch.zeros_like(
                        parameter, dtype=torch.float32 if small else torch.uint8
                    )
                    if not small:
                        self.state[parameter][f"absmax_{name}"] = torch.zeros(math.ceil(parameter.numel() / BLOCK))


@contextmanager
def patch_loaders(args) -> Iterator[None]:
    """Networks without weights, fingerprints without values, 8-bit Adam without a GPU."""
    replaced = {from_pretrained_meta: opened, fingerprint: lambda network: "", quantize_network: quantize_fake}
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ModelMixin, "from_pretrained", classmethod(of_diffusers)))
        stack.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(of_transformers)))
        stack.enter_context(mock.patch.object(PreTrainedModel, "initialize_weights", lambda network: None))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        for module in [
            module for name, module in sys.modules.items() if name.startswith(("senseflow", "train_", "__main__"))
        ]:
            for name, value in list(vars(module).items()):  # wherever it was imported by name
                if isinstance(value, FunctionType) and value in replaced:
                    stack.enter_context(mock.patch.object(module, name, replaced[value]))
        if args.use_8bit_adam:
            stack.enter_context(mock.patch("bitsandbytes.optim.AdamW8bit", AdamW8bit))
        yield


class SmallLinear(torch.nn.Linear):
    """The memory of one of bitsandbytes' linear layers: its numbers and scales, and the whole weight while it computes."""

    def __init__(self, layer: torch.nn.Linear, bits: int):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        numbers, self.compute_dtype, self.bias = layer.weight.numel(), layer.weight.dtype, layer.bias
        self.weight = torch.nn.Parameter(torch.empty(numbers * bits // 8, dtype=torch.uint8), requires_grad=False)
        scales = torch.empty(layer.out_features if bits == 8 else math.ceil(numbers / 64))
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out = _SmallProduct.apply(states.to(self.compute_dtype), self.out_features)
        return out if self.bias is None else out + self.bias


class _SmallProduct(torch.autograd.Function):
    @staticmethod
    def forward(context, states, width):
        context.width = states.shape[-1]
        return states @ states.new_empty(states.shape[-1], width)

    @staticmethod
    def backward(context, gradient):
        return gradient @ gradient.new_empty(gradient.shape[-1], context.width), None


def quantize_fake(network: torch.nn.Module, base_quantization: str, device) -> None:
    """See `senseflow.models.quantization.quantize`."""
    for name, layer in list(network.named_modules()):
        if type(layer) is torch.nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, SmallLinear(layer, int(base_quantization[0])))


def init_fake_process_group() -> None:
    """A process group of the launch's size that answers at once, with the first of its processes alone."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
            os.environ.setdefault(name, str(value))  # as a launcher does; nobody listens
        distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def roles_of(models) -> dict[str, Any]:
    """The roles there are by name; the teacher first, whose tensors its twins share."""
    found = {name: getattr(models, name) for name in ("teacher", "student", "fake_score", "discriminator")}
    return {name: role for name, role in found.items() if role is not None}


def batch_of(args, models, sample_indices: list[int], device) -> dict[str, Any]:
    """A micro-batch as the loader makes them, of images or, from an LMDB, of latents."""
    batch = {"sample_indices": sample_indices, "rows": sample_indices, "prompts": ("a prompt",) * len(sample_indices)}
    shape, name = (3, args.resolution, args.resolution), "pixel_values"
    if args.dataset_lmdb:
        shape, name = models.latent_shape, "latents"
    return batch | {name: torch.zeros(len(sample_indices), *shape, device=device)}


def watch(counter: Counter, owner, name: str, who: Callable[[Any], str], what: str, step: Callable[[], None]):
    """Patches a method so that what it does is counted as (`who` of its first argument, `what`)."""
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        with counter.during(who(args[0]), what):
            result = function(*args, **kwargs)
        step()
        return result

    return mock.patch.object(owner, name, counted)


def trace(
    args, source, models_class, make_models, train_iteration, counter: Counter, bar: tqdm, device="cpu"
) -> dict[str, Any]:
    """Runs `make_models`, a step of every optimizer, an iteration without the student's turn and one with it, under `counter`.

    Args:
        device: of the tensors; those on "cuda" may be fake on a machine without a GPU, where torch's build is one for GPUs.
    Returns:
        peak (bytes), at_peak {(owner, kind): bytes} and where (phase); encoders: bytes of text encoders, which pass through the
        host's memory; flops {iteration: {phase: FLOPs}}; checkpoint and export (bytes); numbers {role: parameters}; states {role:
        bytes of the optimizer's}.
    """
    from senseflow.models.discriminator import VisionFeatures
    from senseflow.training.roles import Role
    from senseflow.training.runtime import Runtime

    found: dict[str, Any] = {"flops": {}}

    def enter(stage: str) -> None:
        before = sum(list(STAGES.values())[: list(STAGES).index(stage)])
        bar.update(before - bar.n)
        bar.set_description(stage)
        bar.stop = before + STAGES[stage]

    def step() -> None:
        bar.update(min(1, max(0, bar.stop - bar.n - 1)))

    with ExitStack() as stack:
        stack.enter_context(counter.resizing())
        for owner in (Role, *subclasses_of(Role)):
            for name, what in (
                ("__call__", "forward"),
                ("backward", "backward"),
                ("step", "step"),
                ("ida_update_from", "IDA"),
            ):
                if name in vars(owner):
                    stack.enter_context(watch(counter, owner, name, lambda role: role.name, what, step))
        stack.enter_context(watch(counter, VisionFeatures, "forward", lambda _: "DINOv2", "forward", step))
        # Without DDP, whose gradients are what `kept` stands for.
        prepare = partial(Accelerator.prepare_model, evaluation_mode=True)
        stack.enter_context(mock.patch.object(Accelerator, "prepare", lambda own, module: prepare(own, module)))
        stack.enter_context(mock.patch.object(Accelerator, "no_sync", lambda *_: nullcontext()))
        enter("networks")
        with unset_fake_temporarily():
            runtime = Runtime(args)
            runtime.device = torch.device(device)  # not cpu:0, which is another to fake tensors
            schedule = models_class.make_schedule(args, source, "cpu")[0]
        for name, value in vars(schedule).items():
            if isinstance(value, torch.Tensor):
                setattr(schedule, name, value.to(runtime.device))
        stack.enter_context(mock.patch.object(Accelerator, "device", runtime.device))
        models = make_models(args, source, schedule, runtime)
        pipeline = models.pipeline
        roles = roles_of(models)
        label_networks(counter, models, pipeline, args)
        encoder = HOST if args.offload_text_encoders else ENCODERS
        found["encoders"] = counter.by_label[encoder, WEIGHTS]
        for name in ("encode", "decode"):
            stack.enter_context(watch(counter, type(pipeline.vae), name, lambda _: "VAE", name, step))
        stack.enter_context(watch(counter, models, "condition", lambda _: encoder, "forward", step))
        # DDP keeps the gradients of all networks, in its buckets.
        kept = {} if runtime.launch.mode == "replicated" and runtime.launch.world_size > 1 else None
        enter("optimizers")
        for role in roles.values():
            for parameter in role.parameters.values():
                parameter.grad = torch.zeros_like(parameter)
                stack.callback(label_gradients_of(counter, parameter, role.name, kept))
            if role.optimizer is not None:
                role.step()
                for state in role.optimizer.state.values():
                    for tensor in tensors_in(state.values()):
                        counter.label(tensor, role.name, STATES)
        found["states"] = {name: counter.by_label[name, STATES] for name in roles}
        counter.reset()
        micro_batches = min(2, args.gradient_accumulation_steps)  # the second meets the gradients of the first
        sample_indices = list(range(args.train_batch_size * micro_batches))
        turn = args.ttur_ratio - 1
        for stage, iteration in (("other iteration", turn + 1), ("student's turn", turn)):
            if stage == "other iteration" and args.ttur_ratio == 1:
                continue
            enter(stage)
            counter.flops.clear()
            with counter.during("loop", ""):
                batches = [
                    batch_of(args, models, sample_indices[i::micro_batches], runtime.device)
                    for i in range(micro_batches)
                ]
                train_iteration(iteration, batches, models, args)
            scale = args.gradient_accumulation_steps / micro_batches
            found["flops"][stage] = {phase: count * scale for phase, count in counter.flops.items()}
        found |= {"peak": counter.peak, "at_peak": counter.at_peak, "where": counter.where} | sizes_on_disk(
            args, models, pipeline
        )
        found["numbers"] = {name: sum(p.numel() for p in role.module.parameters()) for name, role in roles.items()}
    bar.update(bar.total - bar.n)
    return found


def subclasses_of(kind: type) -> list[type]:
    return [each for child in kind.__subclasses__() for each in (child, *subclasses_of(child))]


def label_gradients_of(
    counter: Counter, parameter: torch.nn.Parameter, owner: str, kept: Optional[dict]
) -> Callable[[], None]:
    """Has the gradient of a parameter, and those to come, counted as such, and kept in `kept` for good; returns what ends that."""

    def label(parameter):
        if kept is not None:
            parameter.grad = kept.setdefault(parameter, parameter.grad)
        counter.label(parameter.grad, owner, GRADIENTS)

    label(parameter)
    learns = parameter.requires_grad
    parameter.requires_grad_(True)  # as a hook wants it; outside its turn a role takes no gradient
    hook = parameter.register_post_accumulate_grad_hook(label)
    parameter.requires_grad_(learns)
    return hook.remove


def tensors_of(pipeline) -> Iterator[torch.Tensor]:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            yield from (*part.parameters(), *part.buffers())


def label_networks(counter: Counter, models, pipeline, args) -> None:
    """Weights and buffers of the roles, then of what else there is."""
    for name, role in roles_of(models).items():
        for tensor in (*role.module.parameters(), *role.module.buffers()):
            counter.label(tensor, name, WEIGHTS)
    for encoder in text_encoders_of(pipeline).values():
        for tensor in (*encoder.parameters(), *encoder.buffers()):
            counter.label(tensor, HOST if args.offload_text_encoders else ENCODERS, WEIGHTS)
    frozen = list(tensors_of(pipeline))
    for features in (models.vision_features, models.text_features) if models.discriminator is not None else ():
        frozen += [*getattr(features, "parameters", list)(), *getattr(features, "buffers", list)()]
    for tensor in frozen:
        counter.label(tensor, FROZEN, WEIGHTS)


def sizes_on_disk(args, models, pipeline) -> dict[str, int]:
    """Bytes of a checkpoint and of the export."""
    trained = [role for role in roles_of(models).values() if role.optimizer is not None]
    moments, size = 2 if args.use_8bit_adam else 8, torch_dtype(args.export_dtype).itemsize
    export = models.student.num_trained_params if args.rank else models.student.weight_bytes // 4
    if not args.rank:
        network = {id(t) for t in models.teacher.module.parameters()}
        export += sum(t.numel() for t in tensors_of(pipeline) if id(t) not in network)
    return {
        "checkpoint": sum(role.weight_bytes + moments * role.num_trained_params for role in trained),
        "export": export * size,
    }
