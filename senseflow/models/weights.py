# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Networks without values, into which each process reads its own shard of every tensor.

A network is made on the meta device, sharded there, and then read from its files tensor by tensor (`materialize`). No
process holds more than its shards and one tensor, whether it starts, saves (`save_tensors`) or resumes.
"""

import contextlib
import copy
import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterable, Mapping, NamedTuple, Optional, Sequence, Union

import torch
from accelerate import init_empty_weights
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import _TYPES
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from senseflow.errors import UserError
from senseflow.models.hub import ModelSource, abbreviate, check_stored_values, extremes_of, load_network


DTYPE_NAMES = {dtype: name for name, dtype in _TYPES.items()}  # in safetensors files


# ---------------------------------------------------------------------------------------------------------------------
# Stored tensors
# ---------------------------------------------------------------------------------------------------------------------
class StoredTensor(NamedTuple):
    """A tensor in a safetensors file, of which rows are read on demand: `stored[rows]`, on the CPU."""

    file: Path
    name: str
    shape: list[int]

    def __getitem__(self, rows) -> torch.Tensor:
        # Opened for each tensor, so that the pages of those read before are freed. The result keeps the file open.
        with safe_open(self.file, "pt") as file:
            return file.get_slice(self.name)[rows] if self.shape else file.get_tensor(self.name)


class Weights(dict[str, Union[torch.Tensor, StoredTensor]]):
    """The tensors of a network by name. They are never changed, so copies of the network share them.

    Attributes:
        source: where they were found, for messages; None for those made here.
    """

    source: Optional[ModelSource] = None

    def __deepcopy__(self, memo):
        return self

    def __or__(self, others: Mapping) -> "Weights":
        merged = Weights({**self, **others})
        merged.source = self.source
        return merged


def stored_weights(files: Iterable[Path]) -> Weights:
    """Return the tensors in safetensors files, of which only headers are read; files that are cut off are refused."""
    weights = Weights()
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                names = file.keys()
                weights |= {name: StoredTensor(path, name, file.get_slice(name).get_shape()) for name in names}
        except SafetensorError as error:
            raise OSError(f"{path.name} is empty or cut: {error}") from error
    return weights


def weights_of(network: torch.nn.Module) -> Weights:
    """Return the weights that a network holds, or with which it will be materialized."""
    return vars(network).get("weights") or Weights(network.state_dict())


def fingerprint(module: torch.nn.Module) -> str:
    """Hash the shapes and a few values of every weight: 16 hex digits that differ between teachers.

    Values are rounded to bfloat16, so that the precision in which the network was loaded does not matter.
    """
    digest, unread = hashlib.sha256(), vars(module).get("weights")
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        values = parameter.detach() if unread is None else unread[name]
        first = values[slice(8) if parameter.dim() else ...].flatten()[:8]
        digest.update(first.bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def materialize_submodule(network: torch.nn.Module, name: str) -> torch.nn.Module:
    """Return a copy of a submodule with its values, in float32 on the CPU."""
    module, weights, prefix = copy.deepcopy(network.get_submodule(name)).float(), weights_of(network), f"{name}."
    module.weights = Weights((n.removeprefix(prefix), value) for n, value in weights.items() if n.startswith(prefix))
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


def check_export_dtype(weights: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Raise a UserError (exit code 1) if weights, cast to the dtype of the export, hold NaN or infinity."""
    infinite = [name for name, ends in extremes_of(weights).items() if not ends.isfinite().all()]
    if infinite:
        problem = f"too narrow for {len(infinite)} weights, which become infinite ({abbreviate(infinite)})"
        fix = "give bf16 or fp32 with --resume_from_checkpoint latest"
        raise UserError(f"--export_dtype {str(dtype).removeprefix('torch.')}: {problem}; {fix}")


# ---------------------------------------------------------------------------------------------------------------------
# Networks without values
# ---------------------------------------------------------------------------------------------------------------------
def meta_network(cls, config: dict, weights: Weights, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Make a network of diffusers on the meta device, to be materialized. Buffers that `weights` lacks have values.

    Args:
        dtype: of parameters and stored buffers, except those that the class keeps in float32.
    """
    before = cls._set_default_torch_dtype(dtype)
    try:
        with init_empty_weights():
            network = cls.from_config(config)
    finally:
        torch.set_default_dtype(before)
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
        UserError: exit code 1 for weights that are missing, damaged or do not fit, 2 for those stored as codes.
    """
    location = source.network_subfolder(subfolder)
    source = replace(source, component=location)
    with source.loading():
        check_stored_values(source, location)
        weights = stored_weights(safetensors_files(source, location))
        config = source.load(cls.load_config, subfolder=location)
    weights = weights or Weights(load_network(source, cls, subfolder, dtype=dtype).state_dict())
    weights.source = source
    network = meta_network(cls, config, weights, dtype)
    network.register_to_config(_name_or_path=source.path)
    network._fix_state_dict_keys_on_load(weights)
    expected = network.state_dict(keep_vars=True)
    common = {name: tensor for name, tensor in expected.items() if name in weights}
    stored = set(map(id, common.values()))  # tied tensors are stored once
    missing = [name for name, tensor in expected.items() if id(tensor) not in stored]
    ignored = "|".join(cls._keys_to_ignore_on_load_unexpected or ["(?!)"])
    source.check_complete(missing, [name for name in weights if name not in expected and not re.search(ignored, name)])
    problem = state_dict_problems(common, {name: weights[name] for name in common})
    if problem:
        raise source.error(f"does not fit its config.json: {problem}; download or copy it again", exit_code=1)
    return network


def safetensors_files(source: ModelSource, subfolder: Optional[str]) -> list[Path]:
    """Find, and download from the Hub, the safetensors files of a network; none if it has other files only."""
    variant = source.weight_variant(subfolder)

    def find(name: str) -> Optional[Path]:
        return source.file(os.path.join(subfolder or "", name))

    index = find(_add_variant(SAFE_WEIGHTS_INDEX_NAME, variant))
    names = [_add_variant(SAFETENSORS_WEIGHTS_NAME, variant)]
    if index is not None:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [file for file in map(find, names) if file is not None]


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
    Raises:
        UserError: exit code 1; this process has read NaN or infinity.
    """
    if after_module is None and not is_meta(network):
        return network.to(device)
    stored: dict[torch.Tensor, tuple[Weights, str]] = {}
    source, extremes = None, {}
    for module in network.modules():
        weights = vars(module).pop("weights", None)
        source = source or getattr(weights, "source", None)
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
                weights, stored_name = stored[tensor]
                extremes |= extremes_of({stored_name: read_into(getattr(module, name), weights, stored_name)})
        if after_module is not None:
            after_module(module)
    if source is not None:
        source.check_finite(extremes)
    return network


def read_into(tensor: torch.Tensor, weights: Weights, name: str) -> torch.Tensor:
    """Copy a stored tensor into a tensor of a network; of a sharded tensor only this process's rows, and return it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().copy_(weights[name][...])
    local = tensor.to_local().detach()
    if local.numel():
        local.copy_(weights[name][local_rows(tensor) if tensor.dim() else ...])
    return local


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
