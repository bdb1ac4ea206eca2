# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Choose the attention kernels of a network by the names of diffusers (--attention_backend).

Networks that send their attention through diffusers' dispatcher get the kernel from there. The others, such as those
of SD 3.5 and SDXL, have torch's own kernels and xformers.
"""

import copy
import functools
import importlib.util

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch.nn.attention import SDPBackend, sdpa_kernel

from senseflow.arguments import ATTENTION_BACKENDS
from senseflow.errors import UserError


# What the names mean for a network that does not dispatch: one of torch's kernels.
TORCH_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
    "flash": SDPBackend.FLASH_ATTENTION,
}
QUERY_AND_KEY_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")  # in all attention layers of diffusers


def set_attention_backend(network: torch.nn.Module, name: str) -> None:
    """Make all attention layers of a network use one kernel, in recomputed and compiled blocks, too.

    Args:
        name: one of ATTENTION_BACKENDS that `check_attention_backend` has let pass in this process.
    """
    for layer in attention_layers(network):
        dispatched = dispatches(layer)
        if dispatched:
            # Not by the network's own method, which changes the default of all other networks, too.
            layer.processor._attention_backend = AttentionBackendName(name)
        elif name == "xformers":
            layer.set_use_memory_efficient_attention_xformers(True)
        elif name in TORCH_KERNELS:
            layer.set_processor(with_kernel(layer.processor, TORCH_KERNELS[name]))
        if name == "xformers" or (dispatched and "native" not in name):
            keep_dtype_of_norms(layer)


def attention_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the layers of a network that compute attention by a processor of diffusers."""
    return [
        module for module in network.modules() if hasattr(module, "processor") and hasattr(module, "set_processor")
    ]


def dispatches(layer: torch.nn.Module) -> bool:
    """Return whether an attention layer sends its attention through diffusers' dispatcher."""
    return hasattr(layer.processor, "_attention_backend")


def with_kernel(processor, kernel: SDPBackend):
    """Return a copy of an attention processor in whose call torch has one kernel to choose from.

    Blocks are recomputed in the backward pass, outside of any context around the forward; a processor is part of them.
    """
    processor = copy.copy(processor)
    processor.__class__ = class_with_kernel(type(processor), kernel)
    return processor


@functools.cache  # blocks whose processors are of one class share what torch.compile makes
def class_with_kernel(cls: type, kernel: SDPBackend) -> type:
    @functools.wraps(cls.__call__)  # the layer passes on the keywords that are in this signature
    def call(self, *args, **kwargs):
        with sdpa_kernel(kernel):
            return cls.__call__(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call})


def keep_dtype_of_norms(layer: torch.nn.Module) -> None:
    """Make the norms of queries and keys return the precision of their input.

    Autocast returns them in float32. It casts them back for torch's attention, but not for kernels of other packages,
    which then refuse them or their mixture with values in bfloat16.
    """
    for name in QUERY_AND_KEY_NORMS:
        norm = getattr(layer, name, None)
        if norm is not None:
            norm.register_forward_hook(lambda module, args, output: output.to(args[0].dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Before any weights load
# ---------------------------------------------------------------------------------------------------------------------
def check_attention_backend(
    flag: str, name: str, network: torch.nn.Module, device: torch.device, dtype: torch.dtype, backward: bool
) -> None:
    """Refuse (UserError, exit code 2) a backend that a network cannot have here, and list those that it can.

    A kernel from the Hub is downloaded.

    Args:
        flag: flag and value for the message.
        network: without weights, on the meta device.
        dtype: of the network's computation.
        backward: whether it is trained.
    """
    layers = attention_layers(network)
    if not layers:
        raise UserError(f"{flag}: {type(network).__name__} has no attention of diffusers; drop the flag", exit_code=2)
    dispatched = any(map(dispatches, layers))
    widths = sorted({getattr(layer, "inner_dim", 64) // getattr(layer, "heads", 1) for layer in layers})

    def problem_of(name: str) -> str:
        """Return why a backend cannot be used, or nothing."""
        if name == "native":
            return ""
        if not dispatched and name not in ("xformers", *TORCH_KERNELS):
            cls = type(network).__name__
            return f"{cls} does not go through diffusers' dispatcher, so it has torch's kernels and xformers only"
        package = package_of(name, dispatched)
        if package and importlib.util.find_spec(package) is None:
            return f"needs {package}, which is not installed: pip install {package}"
        if package and device.type != "cuda":
            return "needs a CUDA GPU"
        for width in widths:
            try:
                run_attention(name, dispatched, width, device, dtype, backward)
            except Exception as error:  # each package raises its own
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(":. ")
                shown = f"{str(dtype).removeprefix('torch.')} with heads of {width}"
                fix = f": install its build for torch {torch.__version__}" if package else ""
                return f"does not run here, on {device.type} in {shown} ({reason}){fix}"
        return ""

    problem = problem_of(name)
    if problem:
        # Not those of the Hub, which would be downloaded.
        names = [other for other in ATTENTION_BACKENDS if "hub" not in other and not problem_of(other)]
        raise UserError(f"{flag}: {problem}; give --attention_backend {', '.join(names)}", exit_code=2)


def package_of(name: str, dispatched: bool) -> str:
    """Return the optional package that holds the kernel, or nothing for torch's kernels."""
    if name == "xformers":
        return "xformers"
    if not dispatched or "native" in name:
        return ""
    return "kernels" if "hub" in name else "flash_attn"


def run_attention(
    name: str, dispatched: bool, width: int, device: torch.device, dtype: torch.dtype, backward: bool
) -> None:
    """Run a small attention, and its backward pass. Raise the error of a kernel that does not run."""
    shape = (1, 128, 2, width)  # (batch, tokens, heads, width)
    query = torch.zeros(shape, device=device, dtype=dtype, requires_grad=backward)
    if dispatched:
        with attention_backend(name):
            output = dispatch_attention_fn(query, query, query)
    elif name == "xformers":
        from xformers.ops import memory_efficient_attention

        output = memory_efficient_attention(query, query, query)
    else:
        query = query.transpose(1, 2)
        with sdpa_kernel(TORCH_KERNELS[name]):
            output = torch.nn.functional.scaled_dot_product_attention(query, query, query)
    if backward:
        output.sum().backward()
