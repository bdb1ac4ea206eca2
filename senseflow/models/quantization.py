# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""A smaller base for adapters: the frozen network's linear layers in 8 or 4 bits (bitsandbytes).

The layers, and what stands in them, are those of diffusers' own loader with the same configuration. That loader wants a GPU;
here a network is quantized on a CPU, too.
"""

from typing import Any

import torch

from senseflow.models.weights import materialize


# What stands for each in diffusers: (quant_backend, quant_kwargs) of a PipelineQuantizationConfig, without the precision.
BACKENDS: dict[str, tuple[str, dict[str, Any]]] = {
    "8bit": ("bitsandbytes_8bit", {"load_in_8bit": True}),
    "4bit": ("bitsandbytes_4bit", {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
}


@torch.no_grad()
def quantize_network(network: torch.nn.Module, base_quantization: str, device) -> None:
    """Puts quantized layers into the place of all linear layers, one by one; they compute in the network's dtype.

    Args:
        network: in memory, or empty (senseflow.models.weights): then one layer at a time is read and quantized.
        base_quantization: "8bit" (LLM.int8) or "4bit" (nf4, blocks of 64).
        device: of the quantized layers, and where they are quantized.
    """
    dtype = network.dtype
    places = {part: (parent, name) for parent in network.modules() for name, part in parent.named_children()}

    def replace(part: torch.nn.Module) -> None:
        if type(part) is torch.nn.Linear:
            parent, name = places[part]
            setattr(parent, name, quantize_linear(part, base_quantization, dtype, device))
            part.weight.data = part.weight.new_empty(0)

    materialize(network, "cpu", replace)


def quantize_linear(layer: torch.nn.Linear, base_quantization: str, dtype: torch.dtype, device) -> torch.nn.Module:
    """One linear layer, quantized on `device`, which computes in `dtype`."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    shape, weight = (layer.in_features, layer.out_features, layer.bias is not None), layer.weight.data
    if base_quantization == "4bit":
        how = {"quant_type": "nf4", "compress_statistics": False}
        small = Linear4bit(*shape, compute_dtype=dtype, device="meta", **how)
        small.weight = Params4bit(weight, requires_grad=False, module=small, **how)
        # Else the first input decides, and on some CPUs the first pass packs the weights anew, which twins share.
        small.compute_type_is_set, small.support_avx512bf16_for_cpu = True, False
    else:
        small = Linear8bitLt(*shape, has_fp16_weights=False, device="meta")
        small.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    small.bias = layer.bias
    small.requires_grad_(False).to(device)
    if base_quantization == "8bit":
        small.init_8bit_state()  # by itself it does so when it first runs, and a twin would be left without
    return small.train(layer.training)


def quantization_states(network: torch.nn.Module) -> list[Any]:
    """What belongs to quantized weights and is neither parameter nor buffer: scales and tables, which twins share, too."""
    states = []
    for module in network.modules():
        states += [getattr(own, "quant_state", None) for own in (getattr(module, "weight", None), module)]
        states += [getattr(getattr(module, "state", None), name, None) for name in ("CB", "SCB")]
    return list({id(state): state for state in states if state is not None}.values())


def quantization_config(base_quantization: str, component: str, dtype: str) -> str:
    """The code of the configuration with which diffusers loads a pipeline over the same base."""
    backend, arguments = BACKENDS[base_quantization]
    shown = ", ".join(f'"{name}": {value!r}' for name, value in arguments.items()).replace("'", '"')
    if base_quantization == "4bit":
        shown += f', "bnb_4bit_compute_dtype": {dtype}'
    return f'PipelineQuantizationConfig("{backend}", {{{shown}}}, ["{component}"])'
