# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Memory and FLOPs of what runs, by whose they are: every storage is counted where it is born and where it is freed."""

import weakref
from collections import defaultdict
from contextlib import contextmanager
from typing import Iterator
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


KINDS = WEIGHTS, GRADIENTS, STATES, REST = "weights", "gradients", "optimizer", "activations"
HOST = "host"
TABLES = (torch.ops.aten.arange, torch.ops.aten.linspace)  # made for their values


class Counter(TorchDispatchMode):
    """Counts the bytes of all live storages by label, the peak, and FLOPs, of fake tensors and of real ones alike.

    Within a FakeTensorMode: tensors are fake where anything is large, and real where decisions depend on values: what is computed
    of real tensors alone, and what is drawn with a generator, is real.

    Attributes:
        live, peak: bytes now, and at most since `reset`, without those of the owner HOST.
        by_label, at_peak: {(owner, one of KINDS): bytes} now, and when the peak was reached.
        phase, where: (who, what) goes on now, and did at the peak.
        flops: {phase: FLOPs} since `reset`.
    """

    def __init__(self):
        super().__init__()
        self.live, self.by_label, self.phase = 0, defaultdict(int), ("loading", "")
        self._held: dict[int, tuple[int, tuple]] = {}
        self.reset()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and a wrapper around every operation takes its time

    def reset(self) -> None:
        self.peak, self.at_peak, self.where, self.flops = self.live, dict(self.by_label), self.phase, defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # what it does with its shards comes here by itself
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        real = tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        real = real or isinstance(kwargs.get("generator"), torch.Generator) or function._overloadpacket in TABLES
        if real and torch.device(kwargs.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                out = function(*args, **kwargs)
        else:
            out = function(*args, **kwargs)
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.flops[self.phase] += count(*args, **kwargs, out_val=out)
        for tensor in tensors_in((out,)):
            self.hold(tensor)
        return out

    def hold(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor, unless it is known or on the meta device, until nothing holds it any more."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        label = (self.phase[0], REST)
        self._held[key] = (storage.nbytes(), label)
        weakref.finalize(storage, self._release, key).atexit = False
        self._add(storage.nbytes(), label)

    def resizing(self):
        """Patches the one change of a storage that is no operation: how FSDP frees and fills gathered weights."""
        resize = torch.UntypedStorage.resize_

        def resized(storage, size):
            result, key = resize(storage, size), storage._cdata
            if key in self._held:
                old, label = self._held[key]
                self._held[key] = (size, (self.phase[0], label[1]) if label[1] == REST else label)
                self._add(-old, label)
                self._add(size, self._held[key][1])
            return result

        return mock.patch.object(torch.UntypedStorage, "resize_", resized)

    def label(self, tensor: torch.Tensor, owner: str, kind: str) -> None:
        """Says whose a tensor is; the first to say so is right (twins share what is the teacher's)."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        self.hold(tensor)
        key = tensor.untyped_storage()._cdata
        size, old = self._held[key]
        if old[1] == REST:
            self._held[key] = (size, (owner, kind))
            self._add(-size, old)
            self._add(size, (owner, kind))

    def _add(self, size: int, label: tuple) -> None:
        self.by_label[label] += size
        self.live += size if label[0] != HOST else 0
        if self.live > self.peak:
            self.peak, self.at_peak, self.where = self.live, dict(self.by_label), self.phase

    def _release(self, key: int) -> None:
        size, label = self._held.pop(key)
        self._add(-size, label)

    @contextmanager
    def during(self, owner: str, what: str):
        before, self.phase = self.phase, (owner, what)
        try:
            yield
        finally:
            self.phase = before


def tensors_in(values) -> Iterator[torch.Tensor]:
    """The tensors of an operation's arguments or results."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
