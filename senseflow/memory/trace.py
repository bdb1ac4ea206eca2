# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Run a training script on fake tensors, and count its memory and work.

The script's `make_models` and `train_iteration` run on fake tensors, which have shapes but no values. Of the teacher
only configurations are read. A sharded run of many processes is traced in one process, with a process group that does
not communicate.
"""

import math
import os
import sys
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Callable, Iterator
from unittest import mock

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import distributed
from torch._subclasses.fake_impls import op_implementations_dict
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from senseflow.arguments import torch_dtype
from senseflow.memory.counter import GRADIENTS, HOST, STATES, WEIGHTS, Counter, Work, tensors_in
from senseflow.memory.gpu_rules import gpu_rules
from senseflow.models.discriminator import VisionFeatures
from senseflow.models.hub import check_stored_values, extremes_of
from senseflow.models.lora import fuse_lora, read_adapter
from senseflow.models.quantization import quantize_network
from senseflow.models.text_encoders import text_encoders_of
from senseflow.models.weights import fingerprint, from_pretrained_meta
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime


ENCODERS, FROZEN = "text encoders", "other frozen"
LOADING_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys")  # of from_pretrained
ORDINARY, WITH_STUDENT = "ordinary", "with_student"  # iterations without and with an update of the student


@dataclass
class Trace:
    """The memory of one process, in bytes, and its work in an iteration."""

    peak: int
    at_peak: dict[tuple[str, str], float]  # {(owner, kind): bytes}, see senseflow.memory.counter
    peak_phase: tuple[str, str]
    encoder_bytes: int  # of the text encoders, which load in host memory
    work: dict[str, dict[tuple[str, str], Work]]  # {ORDINARY or WITH_STUDENT: {(owner, activity): Work}}
    checkpoint_bytes: int
    export_bytes: int
    num_params: dict[str, int]  # {role: number}
    optimizer_bytes: dict[str, int]  # {role: bytes}


# ---------------------------------------------------------------------------------------------------------------------
# Replacements of weights, of code that needs a GPU, and of other processes
# ---------------------------------------------------------------------------------------------------------------------
def fake_from_pretrained(
    cls, path, subfolder=None, dtype=None, torch_dtype=None, output_loading_info=False, revision=None, **_
):
    """Replace `from_pretrained` of diffusers and transformers: build the network from its configuration."""
    if issubclass(cls, ModelMixin):
        network = cls.from_config(cls.load_config(path, subfolder=subfolder, revision=revision))
    else:
        network = cls(cls.config_class.from_pretrained(path, subfolder=subfolder or "", revision=revision or "main"))
    for module in network.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not isinstance(buffer, FakeTensor):  # such as a position table made by numpy
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    network = network.to(dtype or torch_dtype or torch.float32).eval()
    return (network, dict.fromkeys(LOADING_INFO, ())) if output_loading_info else network


def fake_network(source, cls, subfolder, dtype=torch.float32):
    """Replace `from_pretrained_meta`: build the network from its configuration."""
    return source.load(cls.from_pretrained, subfolder=source.network_subfolder(subfolder), dtype=dtype)


def apply_in_place(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
    """Replace `torch.nn.Module._apply`, which swaps fake tensors and fails where anything refers to them."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for tensors in (module._parameters, module._buffers):
        for name, tensor in tensors.items():
            result = tensor if tensor is None else function(tensor)
            if result is tensor:
                continue
            if tensors is module._parameters:
                tensor.data = result.detach()
                tensor.fake_device = result.device
            else:
                tensors[name] = result
    return module


class FakeAdamW8bit(torch.optim.Optimizer):
    """Allocate the states of bitsandbytes' AdamW8bit, which needs a GPU: one byte per moment and value, and scales."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state, quantized = self.state[parameter], parameter.numel() >= 4096
            for name in () if state else ("state1", "state2"):
                state[name] = torch.zeros_like(parameter, dtype=torch.uint8 if quantized else torch.float32)
                if quantized:
                    state[f"absmax_{name}"] = torch.zeros(math.ceil(parameter.numel() / 256))  # one scale per block
            parameter.add_(parameter.grad)  # its work: a kernel per tensor


class FakeQuantizedLinear(torch.nn.Linear):
    """Allocate the memory of a quantized layer of bitsandbytes: its values and scales, and the full weight in use."""

    def __init__(self, layer: torch.nn.Linear, bits: int):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        num_values, self.compute_dtype, self.bias = layer.weight.numel(), layer.weight.dtype, layer.bias
        self.weight = torch.nn.Parameter(torch.empty(num_values * bits // 8, dtype=torch.uint8), requires_grad=False)
        scales = torch.empty(layer.out_features if bits == 8 else math.ceil(num_values / 64))
        self.register_buffer("scales", scales, persistent=False)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out = _DequantizedMatmul.apply(states.to(self.compute_dtype), self.out_features)
        return out if self.bias is None else out + self.bias


class _DequantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(context, states, out_features):
        context.in_features = states.shape[-1]
        return states @ states.new_empty(states.shape[-1], out_features)

    @staticmethod
    def backward(context, gradient):
        return gradient @ gradient.new_empty(gradient.shape[-1], context.in_features), None


def fake_quantize_network(network: torch.nn.Module, base_quantization: str, device) -> None:
    """Replace `quantize_network`."""
    for name, layer in list(network.named_modules()):
        if type(layer) is torch.nn.Linear:
            parent, _, child = name.rpartition(".")
            layer = FakeQuantizedLinear(layer, int(base_quantization[0]))
            setattr(network.get_submodule(parent), child, layer)


def all_nonzero(mode, function, values: torch.Tensor) -> torch.Tensor:
    """Replace `nonzero` of a tensor without values, such as a mask of text: every value counts."""
    return values.new_empty((values.numel(), values.dim()), dtype=torch.int64)


def copy_plain(original, tensor: torch.Tensor, memo: dict) -> torch.Tensor:
    """Replace the copying of a tensor that a module holds as a plain attribute, which has values in a trace, too."""
    if type(tensor) is not torch.Tensor:
        return original(tensor, memo)
    with unset_fake_temporarily():
        return original(tensor, memo)


def true_of_bool(original, mode, function, value: torch.Tensor):
    """Replace the reading of a single value, if it is a bool, such as whether a mask selects all text: it does."""
    return True if value.dtype is torch.bool else original(mode, function, value)


def all_in_first_bin(mode, function, values: torch.Tensor, weights=None, minlength: int = 0) -> torch.Tensor:
    """Replace `bincount` of a tensor without values, such as the experts that tokens go to: all go to the first.

    The FLOPs are those of any distribution, the activations at least those.
    """
    with unset_fake_temporarily():  # what follows depends on the counts
        return torch.tensor([values.numel()] + [0] * (minlength - 1))


@contextmanager
def patch_loaders(args) -> Iterator[None]:
    """Make networks load without weights, and without what needs values or a GPU."""
    replacements = {
        from_pretrained_meta: fake_network,
        fingerprint: lambda network: "",
        check_stored_values: lambda source, subfolder: None,
        extremes_of: lambda weights: {},
        fuse_lora: lambda source, pipeline, scale: None,  # the sizes stay
        read_adapter: unset_fake_temporarily()(read_adapter),
        quantize_network: fake_quantize_network,
    }
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    with ExitStack() as stack:

        def patch(owner, name, value, **kwargs):
            stack.enter_context(mock.patch.object(owner, name, value, **kwargs))

        for cls in (ModelMixin, PreTrainedModel):
            patch(cls, "from_pretrained", classmethod(fake_from_pretrained))
        patch(PreTrainedModel, "initialize_weights", lambda network: None)
        patch(torch.nn.Module, "_apply", apply_in_place)
        patch(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True)
        modules = [
            module for name, module in sys.modules.items() if name.startswith(("senseflow", "train_", "__main__"))
        ]
        for module in modules:  # every module that has imported one of the functions
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in replacements:
                    patch(module, name, replacements[value])
        if args.use_8bit_adam:
            stack.enter_context(mock.patch("bitsandbytes.optim.AdamW8bit", FakeAdamW8bit))
        read_value = torch.ops.aten._local_scalar_dense.default
        without_values = {
            read_value: partial(true_of_bool, op_implementations_dict[read_value]),
            torch.ops.aten.nonzero.default: all_nonzero,
            torch.ops.aten.bincount.default: all_in_first_bin,
        }
        stack.enter_context(mock.patch.dict(op_implementations_dict, without_values))
        copy_tensor = torch.Tensor.__deepcopy__
        patch(torch.Tensor, "__deepcopy__", lambda tensor, memo: copy_plain(copy_tensor, tensor, memo))
        yield


def init_fake_process_group() -> None:
    """Start a process group of the launch's size whose collectives return at once, with its first process only."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        from torch.testing._internal.distributed.fake_pg import FakeStore

        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
            os.environ.setdefault(name, str(value))  # as a launcher does; nothing connects
        distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def roles_of(models) -> dict[str, Role]:
    """Return the roles by name, the teacher first, because adapters share its tensors."""
    roles = {name: getattr(models, name) for name in ("teacher", "student", "fake_score", "discriminator")}
    return models.further_roles | {name: role for name, role in roles.items() if role is not None}


def largest_size(args) -> list[int]:
    """Return [height, width] of the largest images that a run trains on."""
    return max(args.aspect_ratio_buckets or [args.resolution], key=math.prod)


def encode_and_free(counter: Counter, models) -> dict[str, Any]:
    """Encode one prompt on the GPU and free the text encoders, the discriminator's too.

    Returns:
        What `read_prompts` will return, on the meta device.
    """
    with counter.in_phase(ENCODERS, "encoding before training"):
        for encoder in text_encoders_of(models.pipeline).values():
            encoder.to(models.device)
        encoded: dict[str, Any] = {"condition": models.encode_prompts(["a prompt"])}
        if models.text_features is not None:
            encoded["text_features"] = models.text_features(["a prompt"])
    models.pipeline.register_modules(**dict.fromkeys(text_encoders_of(models.pipeline)))
    models.text_features = None
    return tree_map(lambda part: part.to("meta"), encoded)


def make_batch(args, models, sample_indices: list[int], device, encoded: dict[str, Any]) -> dict[str, Any]:
    """Make a micro-batch of images or, with --dataset_lmdb, of latents; and of encodings like those of one prompt."""
    size = largest_size(args)
    batch = {"sample_indices": sample_indices, "prompts": ("a prompt",) * len(sample_indices), "size": size}
    name, shape = "pixel_values", (3, *size)
    if args.dataset_lmdb:
        name, shape = "latents", models.latent_shape

    def zeros(one: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(sample_indices), *one.shape[1:], dtype=one.dtype, device=device)

    encoded = tree_map(zeros, encoded)
    return batch | {name: torch.zeros(len(sample_indices), *shape, device=device)} | encoded


def patch_phase(counter: Counter, obj, method: str, owner, activity: str):
    """Count a method as the phase (owner, activity); `owner` is a string or a function of the first argument."""
    function = getattr(obj, method)

    def counted(*args, **kwargs):
        with counter.in_phase(owner(args[0]) if callable(owner) else owner, activity):
            return function(*args, **kwargs)

    return mock.patch.object(obj, method, counted)


def patch_training(stack: ExitStack, counter: Counter) -> None:
    """Count the phases of roles and DINOv2, and leave out DDP, whose gradients `keep_gradients` allocates."""
    activities = {"__call__": "forward", "backward": "backward", "step": "step", "ida_update_from": "IDA"}
    for method, activity in activities.items():
        stack.enter_context(patch_phase(counter, Role, method, lambda role: role.name, activity))
    stack.enter_context(patch_phase(counter, VisionFeatures, "forward", "DINOv2", "forward"))
    prepare_model = partial(Accelerator.prepare_model, evaluation_mode=True)
    stack.enter_context(mock.patch.object(Accelerator, "prepare", lambda self, module: prepare_model(self, module)))
    stack.enter_context(mock.patch.object(Accelerator, "no_sync", lambda *_: nullcontext()))


def print_stage(stage: str) -> None:
    print(f"dry run: {stage}", file=sys.stderr)


def trace(
    args, source, encodes_first: bool, models_class, make_models, train_iteration, counter: Counter, device="cpu"
) -> Trace:
    """Run `make_models`, a step of every optimizer, and an iteration without and with student update, under `counter`.

    Args:
        encodes_first: whether prompts are encoded before training, and the text encoders freed.
        device: of the tensors; fake tensors can be on "cuda" without a GPU, with torch's build for GPUs.
    """
    print_stage("loading networks")
    with ExitStack() as stack:
        stack.enter_context(counter.patch_resize())
        patch_training(stack, counter)
        if device == "cpu":
            stack.enter_context(gpu_rules())
        with unset_fake_temporarily():
            runtime = Runtime(args)
            runtime.device = torch.device(device)  # cpu:0 is another device to fake tensors
            schedule = models_class.make_schedule(args, source, "cpu")[0]
        for name, value in vars(schedule).items():
            if isinstance(value, torch.Tensor):
                setattr(schedule, name, value.to(runtime.device))
        stack.enter_context(mock.patch.object(Accelerator, "device", runtime.device))
        models = make_models(models_class, args, source, schedule, runtime)
        roles = roles_of(models)
        encoders = HOST if args.offload_text_encoders and not encodes_first else ENCODERS
        label_networks(counter, models, encoders)
        encoder_bytes, bytes_on_disk = counter.by_label[encoders, WEIGHTS], sizes_on_disk(args, models)
        counter.reset()
        encoded = encode_and_free(counter, models) if encodes_first else {}
        encoding = counter.peak, counter.at_peak, counter.peak_phase
        for method in ("encode", "decode") if models.vae is not None else ():
            stack.enter_context(patch_phase(counter, models.vae, method, "VAE", method))
        stack.enter_context(patch_phase(counter, models, "condition", encoders, "forward"))

        print_stage("optimizers")
        is_ddp = runtime.launch.mode == "replicated" and runtime.launch.world_size > 1
        optimizer_bytes = allocate_states(counter, roles, stack, keep_gradients=is_ddp)
        counter.reset()
        work = {}
        for stage in (ORDINARY, WITH_STUDENT):
            print_stage(f"iteration {stage}")
            if stage == WITH_STUDENT or args.ttur_ratio > 1:
                work[stage] = run_iteration(args, models, train_iteration, counter, stage, encoded)
        training = counter.peak, counter.at_peak, counter.peak_phase
        return Trace(
            *max(training, encoding, key=lambda found: found[0]),
            encoder_bytes,
            work,
            *bytes_on_disk,
            num_params={name: sum(p.numel() for p in role.module.parameters()) for name, role in roles.items()},
            optimizer_bytes=optimizer_bytes,
        )


def allocate_states(
    counter: Counter, roles: dict[str, Role], stack: ExitStack, keep_gradients: bool
) -> dict[str, int]:
    """Take a step with every optimizer, which allocates its states; return their bytes by role.

    From now on gradients are labeled as such.

    Args:
        keep_gradients: keep the gradients of all networks, as DDP does in its buckets.
    """
    kept: dict[torch.nn.Parameter, torch.Tensor] = {}

    def label_gradient(owner: str, parameter: torch.nn.Parameter) -> None:
        if keep_gradients:
            parameter.grad = kept.setdefault(parameter, parameter.grad)
        counter.label(parameter.grad, owner, GRADIENTS)

    for role in roles.values():
        for parameter in role.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
            label_gradient(role.name, parameter)
            requires_grad = parameter.requires_grad
            parameter.requires_grad_(True)  # needed by the hook; a role's parameters require it only in training
            hook = parameter.register_post_accumulate_grad_hook(partial(label_gradient, role.name))
            stack.callback(hook.remove)
            parameter.requires_grad_(requires_grad)
        if role.optimizer is not None:
            role.step()
            for tensor in tensors_in(list(role.optimizer.state.values())):
                counter.label(tensor, role.name, STATES)
    return {name: counter.by_label[name, STATES] for name in roles}


def run_iteration(
    args, models, train_iteration, counter: Counter, stage: str, encoded: dict[str, Any]
) -> dict[tuple[str, str], Work]:
    """Run an iteration with at most two micro-batches; return the work of all of them by phase."""
    micro_batches = min(2, args.gradient_accumulation_steps)  # the second adds to existing gradients
    sample_indices = list(range(args.train_batch_size * micro_batches))
    counter.work.clear()
    with counter.in_phase("loop", ""):
        batches = [
            make_batch(args, models, sample_indices[i::micro_batches], models.device, encoded)
            for i in range(micro_batches)
        ]
        train_iteration(args.ttur_ratio - (stage == WITH_STUDENT), batches, models, args)
    scale = args.gradient_accumulation_steps / micro_batches
    once = ("step", "IDA")  # in an iteration, whatever the number of micro-batches
    return {phase: work * (1 if phase[1] in once else scale) for phase, work in counter.work.items()}


def module_tensors(*modules) -> Iterator[torch.Tensor]:
    """Yield the parameters and buffers of those of `modules` that are modules."""
    for module in modules:
        if isinstance(module, torch.nn.Module):
            yield from (*module.parameters(), *module.buffers())


def label_networks(counter: Counter, models, encoders: str) -> None:
    """Label the weights and buffers of the roles, of the text encoders and of other frozen networks."""
    for name, role in roles_of(models).items():
        for tensor in role.copies.tensors if role.copies is not None else ():
            counter.label(tensor, name, WEIGHTS)
    owners = {name: [role.module] for name, role in roles_of(models).items()}
    owners[encoders] = text_encoders_of(models.pipeline).values()
    owners[FROZEN] = [*models.pipeline.components.values(), models.vision_features, models.text_features]
    for owner, modules in owners.items():
        for tensor in module_tensors(*modules):
            counter.label(tensor, owner, WEIGHTS)


def sizes_on_disk(args, models) -> tuple[int, int]:
    """Return the bytes of a checkpoint, and of the export if the teacher is stored in --export_dtype."""
    trained = [role for role in roles_of(models).values() if role.optimizer is not None]
    moments = 2 if args.use_8bit_adam else 8  # bytes per value
    checkpoint = sum(role.weight_bytes + moments * role.num_trained_params for role in trained)
    values = models.student.num_trained_params
    if not args.rank:
        replaced = {id(tensor) for tensor in models.teacher.module.parameters()}
        frozen = module_tensors(*models.pipeline.components.values())
        values = models.student.weight_bytes // 4 + sum(t.numel() for t in frozen if id(t) not in replaced)
    return checkpoint, values * torch_dtype(args.export_dtype).itemsize
