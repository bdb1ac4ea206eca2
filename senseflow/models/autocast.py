# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Weights in the precision of autocast, cast once instead of whenever their layer runs.

Autocast casts the float32 weights of linear layers and convolutions in every pass. Between two steps the result is the
same, so a copy changes no number.
"""

from types import MethodType
from typing import Iterator

import torch
import torch.nn.functional as F


LINEAR = torch.nn.Linear
CONVOLUTIONS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
GROUP_SIZE = 2**27  # about how many gradients are in memory in both precisions at once


def autocast_layers(network: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the layers whose weight and bias autocast casts, and which use them in torch's own forward only.

    Not those within a module that sets `without_autocast`.
    """
    forwards = {cls.forward for cls in (LINEAR, *CONVOLUTIONS)}
    parts = [part for part in network.modules() if getattr(part, "without_autocast", False)]
    left_out = {layer for part in parts for layer in part.modules()}
    for layer in network.modules():
        if type(layer).forward in forwards and layer not in left_out:
            yield layer


def cast_frozen_layers(network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of a frozen network that autocast would cast to `dtype` in every pass."""
    for layer in autocast_layers(network):
        layer.to(dtype)


class WeightCopies:
    """Copies, in the precision of autocast, of the float32 weights that a network trains.

    Layers use them under autocast, and their own weights without. Gradients reach the weights in float32, as through
    autocast's cast; where a layer runs twice in one call, its gradients are added before that cast.

    Args:
        network: with its values.
        trained: the parameters that are trained.
        dtype: of autocast.
    """

    def __init__(self, network: torch.nn.Module, trained: list[torch.nn.Parameter], dtype: torch.dtype):
        masters, self._places = set(trained), []
        self._masters: list[torch.nn.Parameter] = []
        for layer in autocast_layers(network):
            names = [name for name, weight in layer.named_parameters(recurse=False) if weight in masters]
            self._masters += [getattr(layer, name) for name in names]
            self._places += [(vars(layer), f"autocast_{name}") for name in names]  # attributes, not in the state dict
            if names:
                run = run_linear if isinstance(layer, LINEAR) else run_convolution
                layer.forward = MethodType(run, layer)
        self.tensors = [weight.detach().to(dtype) for weight in self._masters]
        self._groups, start, size = [], 0, 0
        for index, weight in enumerate(self._masters, 1):
            size += weight.numel()
            if size >= GROUP_SIZE or index == len(self._masters):
                self._groups.append(slice(start, index))
                start, size = index, 0
        self.detach()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights again, after they have changed."""
        if self.tensors:
            torch._foreach_copy_(self.tensors, self._masters)

    def attach(self) -> None:
        """Let the layers use the copies such that gradients of the next call reach the weights."""
        for group in self._groups:
            self._install(group, _Cast.apply(self.tensors[group], *self._masters[group]))

    def detach(self) -> None:
        """Let the layers use the copies as constants."""
        self._install(slice(None), self.tensors)

    def _install(self, group: slice, tensors) -> None:
        for (attributes, name), tensor in zip(self._places[group], tensors):
            attributes[name] = tensor


class _Cast(torch.autograd.Function):
    """Return the copies in the place of their weights; cast all gradients in one operation."""

    @staticmethod
    def forward(context, copies, *masters):
        context.set_materialize_grads(False)
        return tuple(copy.detach() for copy in copies)

    @staticmethod
    def backward(context, *gradients):
        present = [gradient for gradient in gradients if gradient is not None]
        cast = [torch.empty_like(gradient, dtype=torch.float32) for gradient in present]
        if present:
            torch._foreach_copy_(cast, present)
        remaining = iter(cast)
        return None, *(gradient if gradient is None else next(remaining) for gradient in gradients)


def autocast_weight(layer: torch.nn.Module, name: str = "weight") -> torch.Tensor:
    """Return a layer's parameter, or its copy in the precision of autocast if there is one."""
    return vars(layer).get(f"autocast_{name}", getattr(layer, name))


def run_linear(layer: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """Replace `torch.nn.Linear.forward`."""
    if not torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x)
    return F.linear(x, autocast_weight(layer), autocast_weight(layer, "bias"))


def run_convolution(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Replace the forward of torch's convolutions."""
    if not torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x)
    return layer._conv_forward(x, autocast_weight(layer), autocast_weight(layer, "bias"))
