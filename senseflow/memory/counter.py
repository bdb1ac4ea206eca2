# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Count memory, operations, bytes moved and FLOPs by owner.

Every storage is counted from its allocation to its release.
"""

import weakref
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


KINDS = WEIGHTS, GRADIENTS, STATES, ACTIVATIONS = "weights", "gradients", "optimizer", "activations"
HOST = "host"  # owner of what is not on the GPU
NEEDS_VALUES = (torch.ops.aten.arange, torch.ops.aten.linspace, torch.ops.aten.scalar_tensor)
TAKES_MASKS = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
# Operations that launch nothing on a GPU, besides views.
NO_KERNEL = {
    "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty",
    "aten::new_empty_strided", "aten::set_", "aten::resize_", "aten::lift_fresh", "prim::device",
    "profiler::_record_function_enter_new", "profiler::_record_function_exit",
}  # fmt: skip
# Operations that write over tensors which they do not read.
OVERWRITING = {"aten::copy_", "aten::_foreach_copy_", "aten::fill_", "aten::zero_"}


@dataclass
class Work:
    """The work of a phase on a GPU."""

    operations: float = 0  # that launch a kernel; one on a list of tensors (foreach) counts as one
    bytes_moved: float = 0  # of inputs and outputs
    flops: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.operations + other.operations, self.bytes_moved + other.bytes_moved, self.flops + other.flops)

    def __mul__(self, factor: float) -> "Work":
        return Work(self.operations * factor, self.bytes_moved * factor, self.flops * factor)


class Counter(TorchDispatchMode):
    """Count bytes of live storages by label, their peak, and work, of fake and of real tensors.

    Inside a FakeTensorMode large tensors are fake. Results of real tensors alone, and random numbers of a generator,
    stay real, because control flow may depend on their values.

    Attributes:
        live, peak: bytes now, and at most since `reset`, without the owner HOST.
        by_label, at_peak: {(owner, one of KINDS): bytes} now, and at the peak.
        phase, peak_phase: (owner, activity) now, and at the peak.
        work: {phase: Work} since it was last cleared.
    """

    def __init__(self):
        super().__init__()
        self.live, self.by_label, self.phase = 0, defaultdict(int), ("loading", "")
        self._storages: dict[int, tuple[int, tuple]] = {}  # {address: (bytes, label)}
        self.reset()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the wrapper around every operation is slow

    def reset(self) -> None:
        self.peak, self.at_peak, self.peak_phase = self.live, dict(self.by_label), self.phase
        self.work: dict[tuple, Work] = defaultdict(Work)

    @contextmanager
    def in_phase(self, owner: str, activity: str):
        before, self.phase = self.phase, (owner, activity)
        try:
            yield
        finally:
            self.phase = before

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # the operations on its shards arrive here separately
        kwargs = kwargs or {}
        tensors = tensors_in((args, kwargs))
        real = tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        real = real or isinstance(kwargs.get("generator"), torch.Generator)
        real = real or function._overloadpacket in NEEDS_VALUES
        if function._overloadpacket in TAKES_MASKS:
            args = (args[0], positions_of(args[1]), *args[2:])
        if real and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                out = function(*args, **kwargs)
        else:
            out = function(*args, **kwargs)
        outputs = tensors_in(out)
        if not function.is_view and function._schema.name not in NO_KERNEL:
            work = self.work[self.phase]
            work.operations += 1
            written = outputs or written_tensors(function, args)
            read = set(tensors) - set(written) if function._schema.name in OVERWRITING else tensors
            work.bytes_moved += sum(map(moved_bytes, (*read, *written)))
            work.flops += flops_of(function, args, kwargs, out)
        for tensor in outputs:
            self.track(tensor)
        return out

    def track(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage until it is released, unless it is counted already or on the meta device."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" or key in self._storages:
            return
        label = (self.phase[0], ACTIVATIONS)
        self._storages[key] = (storage.nbytes(), label)
        weakref.finalize(storage, self._release, key).atexit = False
        self._add(storage.nbytes(), label)

    def label(self, tensor: torch.Tensor, owner: str, kind: str) -> None:
        """Assign a tensor to an owner, unless it has one: adapters share tensors of the teacher."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        self.track(tensor)
        key = tensor.untyped_storage()._cdata
        size, label = self._storages[key]
        if label[1] == ACTIVATIONS:
            self._move(key, size, (owner, kind))

    def patch_resize(self):
        """Count `UntypedStorage.resize_` as well, with which FSDP frees and allocates gathered weights."""
        resize = torch.UntypedStorage.resize_

        def counted_resize(storage, size):
            result, key = resize(storage, size), storage._cdata
            if key in self._storages:
                _, label = self._storages[key]
                self._move(key, size, (self.phase[0], ACTIVATIONS) if label[1] == ACTIVATIONS else label)
            return result

        return mock.patch.object(torch.UntypedStorage, "resize_", counted_resize)

    def _move(self, key: int, size: int, label: tuple) -> None:
        old_size, old_label = self._storages[key]
        self._storages[key] = (size, label)
        self._add(-old_size, old_label)
        self._add(size, label)

    def _add(self, size: int, label: tuple) -> None:
        self.by_label[label] += size
        self.live += size if label[0] != HOST else 0
        if self.live > self.peak:
            self.peak, self.at_peak, self.peak_phase = self.live, dict(self.by_label), self.phase

    def _release(self, key: int) -> None:
        size, label = self._storages.pop(key)
        self._add(-size, label)


def positions_of(indices: list) -> list:
    """Replace the masks with values among the indices of an operation by the positions that they select.

    The result's shape depends on them, and a fake tensor would have no values.
    """
    positions = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool:
            positions.append(index)
        else:
            with unset_fake_temporarily():
                positions.extend(index.nonzero().unbind(1))
    return positions


def tensors_in(values) -> list[torch.Tensor]:
    """Return the tensors of nested lists, tuples and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def written_tensors(function, args) -> list[torch.Tensor]:
    """Return the arguments that an operation without results, such as a fused optimizer's, writes to."""
    schema = function._schema.arguments
    return tensors_in([value for value, argument in zip(args, schema) if argument.is_write])


def moved_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's different values: those of an expanded dimension are one in memory."""
    return tensor.element_size() * prod(size for size, stride in zip(tensor.shape, tensor.stride()) if stride)


def flops_of(function, args, kwargs, out) -> int:
    """Return the FLOPs of an operation by torch's formulas."""
    if function is torch.ops.aten.convolution_backward.default:  # torch's formula ignores groups
        (gradient, x, weight), transposed, needed = args[:3], args[7], args[10]
        positions = (x if transposed else gradient).shape
        return 2 * positions[0] * prod(positions[2:]) * weight.numel() * sum(needed[:2])
    count = flop_registry.get(function._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=out)
