# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Quantize a frozen network's linear layers to 8 or 4 bits (bitsandbytes), as a smaller base for adapters.

The layers equal those of diffusers' loader with the same configuration. That loader needs a GPU; this code does not.
"""

from functools import partial
from typing import Any

import torch

from senseflow.models.weights import materialize


# (quant_backend, quant_kwargs) of diffusers' PipelineQuantizationConfig.
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "8bit": ("bitsandbytes_8bit", {"load_in_8bit": True}),
    "4bit": ("bitsandbytes_4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


@torch.no_grad()
def quantize_network(network: torch.nn.Module, base_quantization: str, device) -> None:
    """Replace all linear layers by quantized ones, one by one; they compute in the network's dtype.

    Args:
        network: in memory, or on the meta device (senseflow.models.weights): then one layer at a time is read.
        base_quantization: "8bit" (LLM.int8) or "4bit" (nf4, blocks of 64).
        device: where layers are quantized and stay.
    """
    dtype = network.dtype
    parents = {child: (parent, name) for parent in network.modules() for name, child in parent.named_children()}

    def replace(module: torch.nn.Module) -> None:
        if type(module) is torch.nn.Linear:
            parent, name = parents[module]
            setattr(parent, name, quantize_linear(module, base_quantization, dtype, device))
            module.weight.data = module.weight.new_empty(0)

    materialize(network, "cpu", replace)


def quantize_linear(layer: torch.nn.Linear, base_quantization: str, dtype: torch.dtype, device) -> torch.nn.Module:
    """Quantize one linear layer on `device`; the result computes in `dtype`."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    shape, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
    if base_quantization == "4bit":
        kwargs = {"quant_type": "nf4", "compress_statistics": False}
        quantized = Linear4bit(*shape, compute_dtype=dtype, device="meta", **kwargs)
        quantized.weight = Params4bit(weight, requires_grad=False, module=quantized, **kwargs)
        # Otherwise the first input would decide, and some CPUs would repack the weights, which copies share.
        quantized.compute_type_is_set, quantized.support_avx512bf16_for_cpu = True, False
    else:
        quantized = Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        quantized.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    quantized.bias = layer.bias
    quantized.requires_grad_(False).to(device)
    if base_quantization == "8bit":
        quantized.init_8bit_state()  # now, not in the first forward, for copies to have it, too
    # bitsandbytes returns the precision of the input, which after a norm is float32 under autocast.
    quantized.register_forward_pre_hook(partial(cast_input, dtype))
    return quantized.train(layer.training)


def cast_input(dtype: torch.dtype, layer: torch.nn.Module, args: tuple) -> tuple:
    """Cast the input of a quantized layer, so that its output is in `dtype` as a linear layer's is under autocast."""
    return args[0].to(dtype), *args[1:]


def quantization_states(network: torch.nn.Module) -> list[Any]:
    """List scales and tables of quantized weights: neither parameters nor buffers, yet shared by copies, too."""
    states = []
    for module in network.modules():
        states += [getattr(owner, "quant_state", None) for owner in (getattr(module, "weight", None), module)]
        states += [getattr(getattr(module, "state", None), name, None) for name in ("CB", "SCB")]
    return list({id(state): state for state in states if state is not None}.values())


def quantization_config(base_quantization: str, component: str, dtype: str) -> str:
    """Write the code of the configuration with which diffusers loads a pipeline over the same base."""
    backend, kwargs = BACKENDS[base_quantization]
    shown = ", ".join(f'"{name}": {value!r}' for name, value in kwargs.items()).replace("'", '"')
    if base_quantization == "4bit":
        shown += f', "bnb_4bit_compute_dtype": {dtype}'
    return f'PipelineQuantizationConfig("{backend}", {{{shown}}}, ["{component}"])'
