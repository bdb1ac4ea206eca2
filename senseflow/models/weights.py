# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Networks that hold nothing until they are where they learn: then each process reads its own part of every tensor from the files.

A network is made on the meta device, placed or sharded, and filled tensor by tensor (`fill`). No process holds more of it than
its part and one tensor, neither when a run starts nor when it is saved (`save_tensors`) or goes on.
"""

import contextlib
import copy
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Optional, Sequence

import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from senseflow.errors import loading
from senseflow.models.hub import ModelSource, abbreviate, load_network


NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}
NAMES |= {
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# ---------------------------------------------------------------------------------------------------------------------
# Where a network's tensors lie
# ---------------------------------------------------------------------------------------------------------------------
class Weights:
    """The tensors of a network by name, in safetensors files; each is read when it is asked for, and by the rows asked for.

    Args:
        files: safetensors files, which are complete (their headers are read).
        tensors: what is in memory instead, and goes before what the files hold.
        flag, path: what a message names when a file cannot be read after all.
    """

    def __init__(self, files: Iterable[Path] = (), tensors: Optional[dict] = None, flag: str = "", path: object = ""):
        self.flag, self.path, self._tensors, self._places = flag, path, dict(tensors or {}), {}
        for file in files:
            with safe_open(file, "pt") as held:
                self._places |= {name: (file, name) for name in held.keys()}

    def __deepcopy__(self, memo):
        return self  # nothing changes it

    def __contains__(self, name: str) -> bool:
        return name in self._tensors or name in self._places

    def names(self) -> set[str]:
        return {*self._tensors, *self._places}

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self._tensors:
            return tuple(self._tensors[name].shape)
        file, own = self._places[name]
        with safe_open(file, "pt") as held:
            return tuple(held.get_slice(own).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor, or some of its rows, in the file's precision, on the CPU; copy it before long, its file stays open."""
        if name in self._tensors:
            whole = self._tensors[name]
            return whole[rows] if whole.dim() else whole
        file, own = self._places[name]
        with (
            loading(self.flag, self.path),
            safe_open(file, "pt") as held,
        ):  # opened anew: what was read before is let go
            part = held.get_slice(own)
            return part[rows] if part.get_shape() else held.get_tensor(own)

    def first(self, name: str, count: int) -> torch.Tensor:
        """The first `count` values of a tensor, flat."""
        row = math.prod(self.shape(name)[1:])
        return self.read(name, slice(math.ceil(count / max(row, 1)))).flatten()[:count]

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> "Weights":
        """The same but for some tensors."""
        other = copy.copy(self)
        other._tensors = {**self._tensors, **tensors}
        return other

    def renamed(self, names: dict[str, str]) -> "Weights":
        """The same under other names, {new: old}."""
        other = copy.copy(self)
        other._tensors = {new: self._tensors[old] for new, old in names.items() if old in self._tensors}
        other._places = {new: self._places[old] for new, old in names.items() if old in self._places}
        return other

    def below(self, prefix: str) -> "Weights":
        """Those of a part of the network, by their names in it."""
        return self.renamed({name[len(prefix) + 1 :]: name for name in self.names() if name.startswith(f"{prefix}.")})


def weights_of(network: torch.nn.Module) -> Weights:
    """What a network will be filled with, or holds."""
    return vars(network).get("weights") or Weights(tensors=network.state_dict())


def part_of(network: torch.nn.Module, name: str) -> torch.nn.Module:
    """A filled copy of a small part of a network, in float32 on the CPU."""
    part = copy.deepcopy(network.get_submodule(name)).float()
    part.weights = weights_of(network).below(name)
    return materialize(part, "cpu")


def state_dict_problems(expected: Mapping, actual: Mapping) -> str:
    """Describe how names and shapes differ: "1 missing (a), 1 of another shape (b [3] not [4])"; "" if they don't.

    Args:
        expected, actual: {name: tensor or shape}.
    """
    expected, actual = (
        {name: list(getattr(value, "shape", value)) for name, value in state.items()} for state in (expected, actual)
    )
    common = expected.keys() & actual.keys()
    problems = {
        "missing": expected.keys() - common,
        "unexpected": actual.keys() - common,
        "of another shape": [
            f"{name} {actual[name]} not {expected[name]}" for name in common if actual[name] != expected[name]
        ],
    }
    return ", ".join(f"{len(names)} {problem} ({abbreviate(names)})" for problem, names in problems.items() if names)


# ---------------------------------------------------------------------------------------------------------------------
# Networks without memory
# ---------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def meta_network(kind, config: dict, weights: Weights, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A network of diffusers without memory for what `weights` holds, which `fill` gives it; other buffers are as they are made.

    Args:
        dtype: of parameters and stored buffers; what its class keeps in float32 stays in it.
    """
    with default_dtype(dtype), init_empty_weights():
        network = kind.from_config(config)
    kept = kind._keep_in_fp32_modules or ()
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if set(kept) & set(name.split(".")) else dtype)
    network.weights = weights
    return network.eval()


def from_pretrained_meta(
    source: ModelSource, cls, subfolder: str, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """A network of a pipeline, or one by itself, as `senseflow.models.hub.load_network` would load it, but empty: see `fill`. What is not
    in safetensors files is loaded here.

    Raises:
        UserError: exit code 1; weights are missing or damaged.
    """
    with source.loading():
        location = source.network_subfolder(subfolder)
        files = safetensors_files(source, location)
        config = source.load(cls.load_config, subfolder=location)
        weights = Weights(files, flag=source.flag, path=source.path)
    if not files:
        weights = Weights(tensors=load_network(source, cls, subfolder, dtype=dtype).state_dict())
    network = meta_network(cls, config, weights, dtype)
    network.register_to_config(_name_or_path=source.path)
    names = OrderedDict((name, name) for name in weights.names())
    network._fix_state_dict_keys_on_load(names)
    network.weights = weights = weights.renamed(names)
    wanted = network.state_dict(keep_vars=True)
    read = {id(tensor) for name, tensor in wanted.items() if name in weights}
    missing = {name for name, tensor in wanted.items() if id(tensor) not in read}
    source.check_complete(missing, weights.names() - set(wanted))
    with source.loading():
        for name in wanted:
            if name in weights and weights.shape(name) != tuple(wanted[name].shape):
                raise ValueError(f"{name} is of another shape than config.json says")
    return network


def safetensors_files(source: ModelSource, subfolder: Optional[str]) -> list[Path]:
    """The files of a network's weights, of a Hub id downloaded; none where it has others alone.

    Raises:
        OSError: its index names a file that is not there.
    """

    variant = source.weight_variant(subfolder)

    def found(name: str) -> Optional[Path]:
        return source.file(f"{subfolder}/{name}" if subfolder else name)

    index = found(_add_variant(SAFE_WEIGHTS_INDEX_NAME, variant))
    if index is None:
        file = found(_add_variant(SAFETENSORS_WEIGHTS_NAME, variant))
        return [] if file is None else [file]
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = {name: found(name) for name in names}
    for name, file in files.items():
        if file is None:
            raise (OSError if source.is_folder else LocalEntryNotFoundError)(f"{name} is not there")
    return list(files.values())


# ---------------------------------------------------------------------------------------------------------------------
# Filling
# ---------------------------------------------------------------------------------------------------------------------
def is_meta(network: torch.nn.Module) -> bool:
    """Whether anything in a network waits for `fill`."""
    return any("weights" in vars(part) for part in network.modules())


@torch.no_grad()
def materialize(
    network: torch.nn.Module, device, take: Optional[Callable[[torch.nn.Module], None]] = None
) -> torch.nn.Module:
    """Gives what is on the meta device memory on `device`, moves the rest there, and reads the values: of shards those of this
    process alone, one tensor after the other. Parameters become other objects; those that were one stay one.

    Args:
        take: called with every part, children before their parents, when it holds the values of its own parameters; it may take
            them away before the next is read.
    """
    if take is None and not is_meta(network):
        return network.to(device)
    sources, made, parts = {}, {}, list(reversed(list(network.modules())))
    for part in network.modules():
        weights = vars(part).pop("weights", None)
        if weights is not None:
            sources |= {child: (weights, f"{name}." if name else "") for name, child in part.named_modules()}
    names: dict[int, list[str]] = {}  # tensors that are one have several
    for part, (_, prefix) in sources.items():
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            names.setdefault(id(tensor), []).append(f"{prefix}{name}")
    held = list(network.state_dict(keep_vars=True).values())  # so that no id is given anew

    def place(part: torch.nn.Module) -> list[tuple[torch.Tensor, list[str]]]:
        placed = []
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if tensor.device.type == "meta":
                    if id(tensor) not in made:
                        new = torch.empty_like(tensor, device=device)
                        is_parameter = isinstance(tensor, torch.nn.Parameter)
                        made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                    own[name] = made[id(tensor)]
                elif own is part._buffers:
                    own[name] = tensor.to(device)
                else:
                    tensor.data = tensor.data.to(device)
                placed.append((name, names.get(id(tensor), [])))
        return placed

    def read(part: torch.nn.Module, placed) -> None:
        weights, _ = sources.get(part, (None, ""))
        for name, stored in placed if weights is not None else ():
            known = next((other for other in stored if other in weights), None)
            if known is not None:
                read_into(getattr(part, name), weights, known)

    if take is None:
        placed = {part: place(part) for part in parts}
        for part in parts:
            if isinstance(part, FSDPModule):
                part._apply(lambda tensor: tensor, recurse=False)  # FSDP looks at its parameters anew
        for part in parts:
            read(part, placed[part])
    else:
        for part in parts:
            read(part, place(part))
            take(part)
    del held
    return network


def read_into(tensor: torch.Tensor, weights: Weights, name: str) -> None:
    """Copies a stored tensor into one of a network; of a shard its rows alone are read."""
    if not isinstance(tensor, DTensor):
        tensor.detach().copy_(weights.read(name))
        return
    local = tensor.to_local().detach()
    if local.numel():
        local.copy_(weights.read(name, rows_of(tensor)))


def rows_of(tensor: DTensor) -> slice:
    """Which rows of a tensor, sharded along its first dimension, this process holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offset[0], offset[0] + shape[0]) if shape else slice(None)


# ---------------------------------------------------------------------------------------------------------------------
# Files, one tensor at a time
# ---------------------------------------------------------------------------------------------------------------------
def save_tensors(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    whole: Callable[[str], torch.Tensor],
    writes: bool,
    pattern: str = "model{suffix}.safetensors",
    index: str = "model.safetensors.index.json",
    shard_size: str = "10GB",
) -> None:
    """Writes safetensors as diffusers' save_pretrained does, in several files where they are large. All processes call it.

    Args:
        tensors: shapes and dtypes by name; their values are not looked at.
        whole: `whole(name)` -> the tensor; all processes call it in the same order, and one tensor is held at a time.
        writes: whether this process writes.
    """
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        with open(folder / file, "wb") if writes else contextlib.nullcontext() as stream:
            if writes:
                stream.write(header([(name, empty[name]) for name in names]))
            for name in names:
                tensor = whole(name).detach()
                if writes:
                    tensor = tensor.to("cpu", empty[name].dtype).contiguous()
                    stream.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
                del tensor
    if writes and split.is_sharded:
        record = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / index).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def header(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """The beginning of a safetensors file, whose tensors follow it in this order."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
