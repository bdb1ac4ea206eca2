# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Networks without values, into which each process reads its own shard of every tensor.

A network is made on the meta device, sharded there, and then read from its files tensor by tensor (`materialize`). No
process holds more than its shards and one tensor, whether it starts, saves (`save_tensors`) or resumes.
"""

import contextlib
import copy
import json
import math
from collections import OrderedDict
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Optional, Sequence, Union

import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import _TYPES
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from senseflow.errors import loading
from senseflow.models.hub import ModelSource, abbreviate, load_network


DTYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}  # in safetensors files


# ---------------------------------------------------------------------------------------------------------------------
# Stored tensors
# ---------------------------------------------------------------------------------------------------------------------
class Weights:
    """The tensors of a network by name, read from safetensors files on demand, whole or by rows.

    Args:
        files: complete safetensors files; their headers are read.
        tensors: tensors in memory, which take precedence.
        flag, path: named in the error message if a file cannot be read later on.
    """

    def __init__(self, files: Iterable[Path] = (), tensors: Optional[dict] = None, flag: str = "", path: object = ""):
        self.flag, self.path = flag, path
        self._entries: dict[str, Union[torch.Tensor, tuple[Path, str]]] = {}  # a tensor, or file and name in it
        for file in files:
            with safe_open(file, "pt") as opened:
                self._entries |= {name: (file, name) for name in opened.keys()}
        self._entries |= tensors or {}

    def __deepcopy__(self, memo):
        return self  # immutable

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._entries[name]
        if torch.is_tensor(entry):
            return tuple(entry.shape)
        with safe_open(entry[0], "pt") as file:
            return tuple(file.get_slice(entry[1]).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Read a tensor, or some of its rows, in the file's dtype on the CPU. The result keeps the file open."""
        entry = self._entries[name]
        if torch.is_tensor(entry):
            return entry[rows] if entry.dim() else entry
        # Opened for each tensor, so that the pages of those read before are freed.
        with loading(self.flag, self.path), safe_open(entry[0], "pt") as file:
            stored = file.get_slice(entry[1])
            return stored[rows] if stored.get_shape() else file.get_tensor(entry[1])

    def first(self, name: str, count: int) -> torch.Tensor:
        """Read the first `count` values of a tensor, flat."""
        row_size = math.prod(self.shape(name)[1:])
        return self.read(name, slice(math.ceil(count / max(row_size, 1)))).flatten()[:count]

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> "Weights":
        """Return a copy in which some tensors are replaced."""
        return self._with_entries({**self._entries, **tensors})

    def renamed(self, names: Mapping[str, str]) -> "Weights":
        """Return the tensors under other names, {new: old}."""
        return self._with_entries({new: self._entries[old] for new, old in names.items()})

    def _with_entries(self, entries: dict) -> "Weights":
        other = copy.copy(self)
        other._entries = entries
        return other


def weights_of(network: torch.nn.Module) -> Weights:
    """Return the weights that a network holds, or with which it will be materialized."""
    return vars(network).get("weights") or Weights(tensors=network.state_dict())


def materialize_submodule(network: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return a copy of a submodule with its values, in float32 on the CPU."""
    module, weights, prefix = copy.deepcopy(network.get_submodule(name)).float(), weights_of(network), f"{name}."
    names = [stored for stored in weights.names() if stored.startswith(prefix)]
    module.weights = weights.renamed({stored.removeprefix(prefix): stored for stored in names})
    return materialize(module, "cpu")


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
# Networks without values
# ---------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def meta_network(cls, config: dict, weights: Weights, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Make a network of diffusers on the meta device, to be materialized. Buffers that `weights` lacks have values.

    Args:
        dtype: of parameters and stored buffers, except those that the class keeps in float32.
    """
    with default_dtype(dtype), init_empty_weights():
        network = cls.from_config(config)
    in_float32 = set(cls._keep_in_fp32_modules or ())
    for name, tensor in network.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if in_float32 & set(name.split(".")) else dtype)
    network.weights = weights
    return network.eval()


def from_pretrained_meta(
    source: ModelSource, cls, subfolder: str, dtype: torch.dtype = torch.float32
) -> torch.nn.Module:
    """Make the network that `load_network` would load on the meta device, to be materialized later.

    Files other than safetensors are loaded now.

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
    network._fix_state_dict_keys_on_load(names)  # {new name: name in the files}
    network.weights = weights = weights.renamed(names)
    expected = network.state_dict(keep_vars=True)
    stored = {id(tensor) for name, tensor in expected.items() if name in weights}  # tied tensors are stored once
    missing = [name for name, tensor in expected.items() if id(tensor) not in stored]
    source.check_complete(missing, weights.names() - expected.keys())
    shapes = {name: weights.shape(name) for name in expected if name in weights}
    problem = state_dict_problems({name: expected[name] for name in shapes}, shapes)
    if problem:
        raise source.error(f"does not fit its config.json: {problem}; download or copy it again", exit_code=1)
    return network


def safetensors_files(source: ModelSource, subfolder: Optional[str]) -> list[Path]:
    """Find, and download from the Hub, the safetensors files of a network; none if it has other files only.

    Raises:
        OSError: a file of the index is missing.
    """
    variant = source.weight_variant(subfolder)

    def find(name: str) -> Optional[Path]:
        return source.file(f"{subfolder}/{name}" if subfolder else name)

    index = find(_add_variant(SAFE_WEIGHTS_INDEX_NAME, variant))
    if index is None:
        file = find(_add_variant(SAFETENSORS_WEIGHTS_NAME, variant))
        return [] if file is None else [file]
    files = {name: find(name) for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))}
    for name, file in files.items():
        if file is None:
            raise (OSError if source.is_folder else LocalEntryNotFoundError)(f"{name} is missing")
    return list(files.values())


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------
def is_meta(network: torch.nn.Module) -> bool:
    """Return whether any part of a network has yet to be materialized."""
    return any("weights" in vars(module) for module in network.modules())


@torch.no_grad()
def materialize(
    network: torch.nn.Module, device, after_module: Optional[Callable[[torch.nn.Module], None]] = None
) -> torch.nn.Module:
    """Move a network to a device and read its values, tensor by tensor; of sharded tensors this process's shard.

    Parameters on the meta device become new objects; tied ones stay tied.

    Args:
        after_module: called with every module, children before parents, once its own tensors have their values. It may
            replace or free them before the next module is read.
    """
    if after_module is None and not is_meta(network):
        return network.to(device)
    stored: dict[torch.Tensor, tuple[Weights, str]] = {}
    for module in network.modules():
        weights = vars(module).pop("weights", None)
        tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        for name, tensor in tensors if weights is not None else ():
            if name in weights:
                stored.setdefault(tensor, (weights, name))
    allocated: dict[torch.Tensor, torch.Tensor] = {}

    def allocate(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta":
            return tensor.to(device)
        if tensor not in allocated:
            new = torch.empty_like(tensor, device=device)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            allocated[tensor] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
        return allocated[tensor]

    for module in reversed(list(network.modules())):  # children before their parents
        originals = {**module._parameters, **module._buffers}
        for name, tensor in originals.items():
            if tensor is None:
                continue
            if name in module._buffers:
                module._buffers[name] = allocate(tensor)
            elif tensor.device.type == "meta":
                module._parameters[name] = allocate(tensor)
            else:
                tensor.data = tensor.data.to(device)
        if isinstance(module, FSDPModule):
            module._apply(lambda tensor: tensor, recurse=False)  # lets FSDP notice its new parameters
        for name, tensor in originals.items():
            if tensor in stored:
                read_into(getattr(module, name), *stored[tensor])
        if after_module is not None:
            after_module(module)
    return network


def read_into(tensor: torch.Tensor, weights: Weights, name: str) -> None:
    """Copy a stored tensor into a tensor of a network; of a sharded tensor only this process's rows are read."""
    if not isinstance(tensor, DTensor):
        tensor.detach().copy_(weights.read(name))
        return
    local = tensor.to_local().detach()
    if local.numel():
        local.copy_(weights.read(name, local_rows(tensor)))


def local_rows(tensor: DTensor) -> slice:
    """Return the rows of a tensor, sharded along its first dimension, that this process holds."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return slice(offset[0], offset[0] + shape[0]) if shape else slice(None)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------
def save_tensors(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    gather: Callable[[str], torch.Tensor],
    is_main: bool,
    pattern: str = "model{suffix}.safetensors",
    index: str = "model.safetensors.index.json",
    shard_size: str = "10GB",
) -> None:
    """Write safetensors files as diffusers' save_pretrained does, tensor by tensor. All processes call it.

    Args:
        tensors: {name: tensor}, for shapes and dtypes; values are not read.
        gather: `gather(name)` -> the full tensor; called in the same order in all processes.
        is_main: whether this process writes.
    """
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        with open(folder / file, "wb") if is_main else contextlib.nullcontext() as stream:
            if is_main:
                stream.write(safetensors_header([(name, empty[name]) for name in names]))
            for name in names:
                tensor = gather(name).detach()
                if is_main:
                    tensor = tensor.to("cpu", empty[name].dtype).contiguous()
                    stream.write(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
                del tensor
    if is_main and split.is_sharded:
        record = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / index).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def safetensors_header(tensors: Sequence[tuple[str, torch.Tensor]]) -> bytes:
    """Return the header of a safetensors file in which these tensors follow in this order."""
    entries, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
