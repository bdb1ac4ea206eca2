# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Make torch on the CPU choose the operations and precisions that it chooses on a CUDA device."""

from contextlib import contextmanager
from functools import partial
from typing import Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _foreach_utils


AUTOCAST_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
# What CUDA's autocast computes in float32 and the CPU's does not (ATen/autocast_mode.h), as far as networks use it.
FLOAT32 = (
    "layer_norm", "native_layer_norm", "group_norm", "rms_norm", "linalg_vector_norm", "norm.ScalarOpt_dim",
    "softmax.int", "log_softmax.int", "logsumexp", "softplus", "sum", "sum.dim_IntList", "cumsum", "cumprod", "exp",
    "log", "rsqrt", "reciprocal", "pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "cosine_similarity",
    "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "_upsample_bilinear2d_aa",
    "upsample_bicubic2d", "_upsample_bicubic2d_aa",
)  # fmt: skip


@contextmanager
def gpu_rules() -> Iterator[None]:
    """Apply CUDA's autocast to FLOAT32, and torch's foreach functions to fake tensors."""
    library = torch.library.Library("aten", "IMPL")
    for name in FLOAT32:
        packet, _, overload = name.partition(".")
        function = getattr(getattr(torch.ops.aten, packet), overload or "default")
        library.impl(name, partial(in_float32, function), "AutocastCPU")
    types = [*_foreach_utils._foreach_supported_types, FakeTensor]
    try:
        with mock.patch.object(_foreach_utils, "_foreach_supported_types", types):
            yield
    finally:
        library._destroy()


def in_float32(function, *args, **kwargs):
    """Call an operation as autocast to float32 does: with its dtype argument where it has one, else with casts."""
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_CPU):
        floating = [value for value in args if isinstance(value, torch.Tensor) and value.is_floating_point()]
        if any(argument.name == "dtype" for argument in function._schema.arguments):
            if kwargs.get("dtype") is None and floating and floating[0].dtype != torch.float32:
                kwargs["dtype"] = torch.float32
        else:
            args = [value.float() if any(value is tensor for tensor in floating) else value for value in args]
        return function(*args, **kwargs)
