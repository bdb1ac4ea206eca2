# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""`--dry_run`: what a training command takes of a GPU, before it has one.

The script's own `load_parts` and `train_iteration` run on fake tensors, which have shapes and no values: of the teacher its
configurations are read and no weights. Every storage is counted where it is born and where it is freed, and every operation's FLOPs.
A sharded run of many processes is one process here, with a process group that talks to nobody.
"""

import math
import os
import sys
import time
import weakref
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Callable, Iterator, Optional
from unittest import mock

import torch
from diffusers import ModelMixin
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from senseflow_args import DTYPES, UserError
from senseflow_prompts import text_encoders_of


GIB = 2**30
CARDS = (24, 40, 48, 80, 141)  # GB, as they are sold, of memory
USABLE = 0.93  # of a card: the rest is the driver's context, the kernels' workspaces and fragments
WEIGHTS, GRADIENTS, STATES, REST = "weights", "gradients", "optimiser", "activations"
FROZEN = "frozen networks"
TABLES = (torch.ops.aten.arange, torch.ops.aten.linspace)  # made for their values
BLOCK = 256  # of bitsandbytes' 8-bit Adam: one scale for as many numbers


# ---------------------------------------------------------------------------------------------------------------------
# Counting
# ---------------------------------------------------------------------------------------------------------------------
class Counter(TorchDispatchMode):
    """Counts the bytes of all live storages by label, the peak, and FLOPs by phase, of fake tensors and of real ones alike.

    Attributes:
        live, peak: bytes now, and at most since `reset`.
        by_label, at_peak: {(owner, kind): bytes} now, and when the peak was reached.
        phase, where: what is going on, and what was at the peak.
        flops: {phase: FLOPs} since `reset`.
    """

    def __init__(self):
        super().__init__()
        self.live, self.by_label, self.phase = 0, defaultdict(int), "loading"
        self._held: dict[int, tuple[int, tuple]] = {}
        self.reset()

    def reset(self) -> None:
        self.peak, self.at_peak, self.where, self.flops = self.live, dict(self.by_label), self.phase, defaultdict(int)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        if count is not None:
            self.flops[self.phase] += count(*args, **(kwargs or {}), out_val=out)
        for tensor in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.hold(tensor)
        return out

    def hold(self, tensor: torch.Tensor) -> None:
        """Counts the storage of a tensor, unless it is known, until nothing holds it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            return
        size = storage.nbytes()
        self._held[key] = (size, (None, REST))
        weakref.finalize(storage, self._release, key).atexit = False
        self._add(size, (None, REST))

    def label(self, tensor: torch.Tensor, owner: str, kind: str) -> None:
        """Says whose a tensor is; the first to say so is right (twins share what is the teacher's)."""
        for part in parts_of(tensor):
            self.hold(part)
            key = part.untyped_storage()._cdata
            size, old = self._held[key]
            if old == (None, REST):
                self._held[key] = (size, (owner, kind))
                self.by_label[old] -= size
                self.by_label[owner, kind] += size

    def _add(self, size: int, label: tuple) -> None:
        self.live += size
        self.by_label[label] += size
        if self.live > self.peak:
            self.peak, self.at_peak, self.where = self.live, dict(self.by_label), self.phase

    def _release(self, key: int) -> None:
        size, label = self._held.pop(key)
        self._add(-size, label)

    @contextmanager
    def during(self, phase: str):
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a process holds of a tensor: itself, or its shard."""
    local = getattr(tensor, "_local_tensor", None)
    yield tensor if local is None else local


class Fake(TorchDispatchMode):
    """Fake tensors where anything is large, real ones where decisions depend on values: what is computed of real tensors alone, and
    what is drawn with a generator, is real."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        real = tensors and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if real or isinstance(kwargs.get("generator"), torch.Generator) or function._overloadpacket in TABLES:
            with unset_fake_temporarily():
                return function(*args, **kwargs)
        return function(*args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# What stands in for weights, optimisers that need a GPU, and other processes
# ---------------------------------------------------------------------------------------------------------------------
def of_diffusers(kind, path, subfolder=None, dtype=None, torch_dtype=None, output_loading_info=False, revision=None, **_):
    config = kind.load_config(path, subfolder=subfolder, revision=revision)
    network = kind.from_config(config).to(dtype or torch_dtype or torch.float32).eval()
    return (network, {"missing_keys": [], "unexpected_keys": []}) if output_loading_info else network


def of_transformers(kind, path, subfolder="", dtype=None, torch_dtype=None, output_loading_info=False, revision=None, **_):
    config = kind.config_class.from_pretrained(path, subfolder=subfolder or "", revision=revision or "main")
    network = kind(config).to(dtype or torch_dtype or torch.float32).eval()
    return (network, {"missing_keys": set(), "unexpected_keys": set()}) if output_loading_info else network


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
                    self.state[parameter][name] = torch.zeros_like(parameter, dtype=torch.float32 if small else torch.uint8)
                    if not small:
                        self.state[parameter][f"absmax_{name}"] = torch.zeros(math.ceil(parameter.numel() / BLOCK))


@contextmanager
def stand_ins(script) -> Iterator[None]:
    """Networks without weights, fingerprints without values, 8-bit Adam without a GPU."""
    import senseflow_checkpoints
    import senseflow_discriminator
    import senseflow_hub
    import senseflow_lora
    import senseflow_roles

    eight_bit = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=AdamW8bit))
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(ModelMixin, "from_pretrained", classmethod(of_diffusers)))
        stack.enter_context(mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(of_transformers)))
        stack.enter_context(mock.patch.object(PreTrainedModel, "init_weights", lambda network: None))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _apply))
        stack.enter_context(mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, create=True))
        for module in (senseflow_checkpoints, senseflow_discriminator, senseflow_hub, senseflow_lora, senseflow_roles):
            if hasattr(module, "fingerprint"):
                stack.enter_context(mock.patch.object(module, "fingerprint", lambda network: ""))
        stack.enter_context(mock.patch.dict(sys.modules, {"bitsandbytes": eight_bit}))
        yield


def join_nobody() -> None:
    """In the first process of many, a process group of the launch's size that answers at once; the others are done here."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return
    if int(os.environ.get("RANK", 0)) > 0:
        sys.exit(0)
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def roles_of(parts) -> dict[str, Any]:
    found = {name: getattr(parts, name) for name in ("student", "fake_score", "discriminator")}
    return {"teacher": parts.teacher, **{name: role for name, role in found.items() if role is not None}}


def batch_of(args, parts, slots: list[int]) -> dict[str, Any]:
    """A micro-batch as the loader makes them, of pictures or, from an LMDB, of latents."""
    batch = {"slots": slots, "rows": slots, "prompts": ("a prompt",) * len(slots)}
    shape, name = (3, args.resolution, args.resolution), "pixel_values"
    if args.dataset_lmdb:
        shape, name = parts.latent_shape, "latents"
    return batch | {name: torch.zeros(len(slots), *shape)}


def watch(counter: Counter, owner, name: str, phase: Callable[..., str]):
    """Patches a method so that what it does is counted under `phase(its first argument)`."""
    function = getattr(owner, name)

    def counted(*args, **kwargs):
        with counter.during(phase(args[0])):
            return function(*args, **kwargs)

    return mock.patch.object(owner, name, counted)


def trace(script, args, counter: Counter, progress: Callable[[str], None]) -> dict[str, Any]:
    """Runs `load_parts`, a student's turn, another iteration and a student's turn under `counter`.

    Returns:
        peak (bytes), at_peak {(owner, kind): bytes}, where (phase), loading (bytes), held {(owner, kind): bytes} after the last
        iteration, flops [{phase: FLOPs} of the student's turn, of the other], checkpoint and export (bytes).
    """
    from senseflow_discriminator import VisionFeatures
    from senseflow_roles import Role
    from senseflow_runtime import Runtime

    found: dict[str, Any] = {"flops": []}
    with ExitStack() as stack:
        for owner in (Role, *Role.__subclasses__()):
            for name, does in (("__call__", "forward"), ("backward", "backward"), ("step", "step")):
                if name in vars(owner):
                    phase = partial("{0.name}, {1}".format)
                    stack.enter_context(watch(counter, owner, name, lambda role, phase=phase, does=does: phase(role, does)))
        stack.enter_context(watch(counter, VisionFeatures, "forward", lambda _: "DINOv2, forward"))
        stack.enter_context(watch(counter, script.VAE, "decode", lambda _: "VAE, decode"))
        stack.enter_context(watch(counter, script.VAE, "encode", lambda _: "VAE, encode"))
        progress("networks")
        with unset_fake_temporarily():
            runtime = Runtime(args)
            schedule, _, _ = script.make_schedule(args, runtime.device)
        parts, pipeline = script.load_parts(args, runtime, schedule)
        found["loading"] = counter.peak
        offloaded = set()
        if args.offload_text_encoders:  # on the host: not counted
            offloaded = {id(t) for part in text_encoders_of(pipeline).values() for t in (*part.parameters(), *part.buffers())}
        label_networks(counter, parts, pipeline, offloaded)
        for role in roles_of(parts).values():
            for parameter in role.parameters.values():
                stack.callback(_taken_off(counter, parameter, role.name))
        counter.reset()
        turn = args.ttur_ratio - 1
        for what, iteration in (("student's turn", turn), ("other iteration", turn + 1), ("student's turn", turn + args.ttur_ratio)):
            progress(what)
            if what == "other iteration" and args.ttur_ratio == 1:
                continue
            slots = range(args.train_batch_size * args.gradient_accumulation_steps)
            per_batch = [list(slots)[i :: args.gradient_accumulation_steps] for i in range(args.gradient_accumulation_steps)]
            counter.flops.clear()
            with counter.during("between"):
                batches = [batch_of(args, parts, own) for own in per_batch]
                script.train_iteration(iteration, batches, parts, schedule, args, runtime.device)
            found["flops"].append(dict(counter.flops))
            label_states(counter, parts)
        found["flops"] = found["flops"][:0:-1] if args.ttur_ratio > 1 else found["flops"][-1:]
        found |= {"peak": counter.peak, "at_peak": counter.at_peak, "where": counter.where, "held": dict(counter.by_label)}
        found["host"] = sum(t.numel() * t.element_size() for t in _tensors_of(pipeline) if id(t) in offloaded)
        found |= sizes_on_disk(args, parts, pipeline)
    return found


def _taken_off(counter: Counter, parameter: torch.nn.Parameter, owner: str) -> Callable[[], None]:
    """Has the gradients of a parameter counted as such; what ends that."""
    parameter.requires_grad_(True)  # as a hook wants it; outside its turn a role takes no gradient
    hook = parameter.register_post_accumulate_grad_hook(lambda p: counter.label(p.grad, owner, GRADIENTS))
    parameter.requires_grad_(False)
    return hook.remove


def _tensors_of(pipeline) -> Iterator[torch.Tensor]:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            yield from (*part.parameters(), *part.buffers())


def label_networks(counter: Counter, parts, pipeline, offloaded: set[int]) -> None:
    """Weights and buffers of the roles, the teacher first, then what else there is."""
    for name, role in roles_of(parts).items():
        for tensor in (*role.module.parameters(), *role.module.buffers()):
            counter.label(tensor, name, WEIGHTS)
    frozen = [*_tensors_of(pipeline)]
    for features in (parts.vision_features, parts.text_features) if parts.discriminator is not None else ():
        frozen += [*getattr(features, "parameters", list)(), *getattr(features, "buffers", list)()]
    for tensor in frozen:
        counter.label(tensor, "host" if id(tensor) in offloaded else FROZEN, WEIGHTS)


def label_states(counter: Counter, parts) -> None:
    for name, role in roles_of(parts).items():
        for state in role.optimizer.state.values() if role.optimizer is not None else ():
            for tensor in state.values():
                if isinstance(tensor, torch.Tensor):
                    counter.label(tensor, name, STATES)


def sizes_on_disk(args, parts, pipeline) -> dict[str, int]:
    """Bytes of a checkpoint and of the export."""
    trained = [role for role in roles_of(parts).values() if role.optimizer is not None]
    moments = 2 if args.use_8bit_adam else 8
    student = sum(role.trained_numbers for role in (parts.student,)) if args.rank else parts.student.weight_bytes // 4
    whole = 0 if args.rank else sum(t.numel() * t.element_size() for t in _tensors_of(pipeline))
    size = DTYPES[args.export_dtype].itemsize
    return {"checkpoint": sum(role.weight_bytes + moments * role.trained_numbers for role in trained), "export": student * size + whole}
