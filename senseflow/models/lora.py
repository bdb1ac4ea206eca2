# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Low-rank adapters (LoRA): teacher, student and fake score over one copy of the teacher's weights.

Student and fake score are twins of the teacher: networks of their own, with an adapter of their own, whose frozen tensors are the
teacher's. A twin takes no memory for weights, and no adapter is ever switched on or off: gradient checkpointing recomputes under
the adapter it ran under, and DDP and the optimizer see the few parameters of one role.
"""

import copy
import difflib
import json
import logging
import re
from pathlib import Path
from typing import Any, Iterable, Optional, Sequence

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from diffusers.training_utils import cast_training_params
from safetensors import safe_open
from safetensors.torch import load_file

from senseflow.errors import UserError, loading, require_package
from senseflow.models.hub import UNREADABLE, ModelSource, abbreviate, fingerprint, hub_reason
from senseflow.models.quantization import quantization_states, quantize_network
from senseflow.models.weights import materialize


logger = logging.getLogger(__name__)

ADAPTER = "default"  # the name peft gives to the adapter of a network; not a part of the names in a file
FILE = "pytorch_lora_weights.safetensors"
LORA_FLAGS = ("rank", "lora_alpha", "lora_layers")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def target_modules(layers: Sequence[str]):
    """What peft's LoraConfig takes: one regular expression, or a list of names."""
    return layers[0] if len(layers) == 1 and re.search(r"[*+?|()\[\]\\^$]", layers[0]) else list(layers)


def lora_config(args):
    """peft's configuration of the adapters."""
    from peft import LoraConfig

    return LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=target_modules(args.lora_layers))


def check_lora_args(args, kind: type, config: dict, default_layers: Sequence[str]) -> None:
    """Refuses (exit code 2) layers that the network does not have, and an adapter to start from that has others; fills in
    --lora_alpha and --lora_layers. No weight loads.

    Args:
        kind, config: class and configuration of the teacher's network.
    """
    if not args.rank:
        return
    require_package("peft", "--rank")
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    if args.base_quantization != "none":
        require_package("bitsandbytes", f"--base_quantization {args.base_quantization}")
        if args.teacher_lora:
            fix = "fuse it into a whole pipeline first, and give that"
            raise UserError(
                f"--teacher_lora {args.teacher_lora}: stock pipelines fuse none into a quantized base; {fix}", 2
            )
    if args.teacher_lora:
        find_lora(ModelSource("--teacher_lora", args.teacher_lora))
    args.lora_alpha = float(args.rank) if args.lora_alpha is None else args.lora_alpha
    args.lora_layers = args.lora_layers or list(default_layers)
    with torch.device("meta"):
        network = kind.from_config(config)
    modules = dict(network.named_modules())
    possible = {name for name, module in modules.items() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    targets = target_modules(args.lora_layers)
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            wanted = LoraConfig(target_modules=targets if isinstance(targets, str) else [target])
            found = {name for name in modules if name and check_target_module_exists(wanted, name)}
        except re.error as error:
            raise UserError(
                f"--lora_layers {target}: is no regular expression ({error}); mend it, or give names", 2
            ) from error
        if not found & possible:
            near = ", ".join(similar_layers(target, possible))
            raise UserError(
                f"--lora_layers {target}: no linear or convolutional layer is called so; there are {near}, ...", 2
            )
        if found - possible:
            other = sorted(found - possible)[0]
            message = f"--lora_layers {target}: also means {other}, a {type(modules[other]).__name__}, which takes no adapter"
            raise UserError(f"{message}; name linear and convolutional layers alone", 2)
    if args.student_model_name_or_path:
        check_start(args, network)


def check_start(args, network: torch.nn.Module) -> None:
    """Refuses (exit code 2) a --student_model_name_or_path that holds no adapter as this run trains it.

    Args:
        network: the teacher's, without weights.
    """
    start = ModelSource("--student_model_name_or_path", args.student_model_name_or_path)
    with loading(start.flag, start.path):
        with safe_open(find_lora(start), "pt") as file:
            shapes = {inner_name(name): list(file.get_slice(name).get_shape()) for name in file.keys()}
            said = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    alpha = next((value for name, value in said.items() if name.rpartition(".")[2] == "lora_alpha"), args.lora_alpha)
    if alpha != args.lora_alpha:
        raise UserError(
            f"{start}: its adapter has alpha {alpha:g}, this run's {args.lora_alpha:g}; give --lora_alpha {alpha:g}", 2
        )
    network.add_adapter(lora_config(args))
    own = {stored_name(name): list(tensor.shape) for name, tensor in network.named_parameters() if ".lora_" in name}
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name} - {args.rank}
    if ranks:
        raise UserError(f"{start}: its adapter has rank {min(ranks)}; give --rank {min(ranks)}", 2)
    other = [name for name in {**own, **shapes} if own.get(name) != shapes.get(name)]
    if other:
        raise UserError(
            f"{start}: its adapter has other layers ({abbreviate(other)}); give the --lora_layers it was trained with",
            2,
        )


def inner_name(name: str) -> str:
    """A tensor's name in the file of an adapter, without that of the component, which a pipeline's file has before it."""
    return re.sub(r"^(transformer|unet)\.", "", name)


def similar_layers(target: str, layers: Iterable[str], number: int = 3) -> list[str]:
    """The layers most like `target`, by what stands behind the number of their block."""
    return difflib.get_close_matches(target, {re.sub(r"^.*blocks\.\d+\.", "", name) for name in layers}, number, 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Twins
# ---------------------------------------------------------------------------------------------------------------------
def copy_sharing_base(network: torch.nn.Module, base: torch.nn.Module) -> torch.nn.Module:
    """A copy of a network that shares every parameter and buffer of `base` with it, quantized ones too, and nothing else."""
    shared = (*base.parameters(), *base.buffers(), *quantization_states(base))
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def adapted_twins(base: torch.nn.Module, args) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(student, fake score) over the teacher's network: equal at the start, and as the teacher, for half of each adapter is
    zero, or as what --student_model_name_or_path holds.

    Args:
        base: the teacher's network on its device: a twin that is moved has tensors of its own. It is frozen, and keeps its class.
    Returns:
        Two networks of which the adapters alone take gradient, in float32 whatever the precision of `base`.
    """
    student = copy_sharing_base(base, base)
    student.add_adapter(lora_config(args))
    cast_training_params(student, torch.float32)
    if args.student_model_name_or_path:
        start = ModelSource("--student_model_name_or_path", args.student_model_name_or_path)
        with start.loading():
            weights = {inner_name(name): tensor for name, tensor in load_file(find_lora(start)).items()}
            with torch.no_grad():
                for name, parameter in student.named_parameters():
                    if ".lora_" in name:
                        parameter.copy_(weights[stored_name(name)])
    return student, copy_sharing_base(student, base)


def share_base(network: torch.nn.Module, base: torch.nn.Module) -> None:
    """Puts the parameters of `base` into the place of those that a twin of it, by itself or within `network`, has of its own.

    As FSDP2 needs it, which gives every network shards of its own: after both are sharded, and before FSDP looks at the twin's.
    """
    (adapted,) = (part for part in network.modules() if hasattr(part, "peft_config"))
    own, names = (
        dict(base.named_parameters()),
        [name for name, _ in adapted.named_parameters() if ".lora_" not in name],
    )
    adapted.load_state_dict(
        {name: own[name.replace(".base_layer.", ".")] for name in names}, strict=False, assign=True
    )


# ---------------------------------------------------------------------------------------------------------------------
# A teacher that is a LoRA over a pipeline
# ---------------------------------------------------------------------------------------------------------------------
def find_lora(source: ModelSource) -> Path:
    """The file of a LoRA, by itself, or in a folder or Hub repository, where it is the only one or has diffusers' name.

    UserError (exit code 2) where there is none, or more than one.
    """
    if Path(source.path).is_file():
        return Path(source.path)
    try:
        files = [file for file in source.files() if file.endswith(".safetensors")]
        if FILE in files or len(files) == 1:
            return source.file(FILE if FILE in files else files[0])
    except UNREADABLE as error:
        raise source.error(f"no such file or folder, and {hub_reason(error)}") from error
    fix = "give the one that is the LoRA, by itself" if files else "give a LoRA's file, or a folder with one"
    raise source.error(f"holds {len(files)} .safetensors files; {fix}")


def fuse_lora(source: ModelSource, pipeline, network: str, scale: Optional[float]) -> str:
    """Fuses a LoRA into a pipeline, as its stock methods do; into its text encoders, too, where it has weights for them.

    Args:
        network: the component that it must have weights for.
        scale: None: nothing is fused, only the fingerprint taken.
    Returns:
        The fingerprint of that network, unfused, with the LoRA: whatever the precision, which what is fused depends on.
    Raises:
        UserError: exit code 1; not a LoRA, or one for another network.
    """
    file = find_lora(source)
    with source.loading():
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        module = getattr(pipeline, network)
        if not getattr(module, "peft_config", None):
            raise ValueError(f"it has no layer of a {type(module).__name__}")
        weights = pipeline.lora_state_dict(str(file.parent), weight_name=file.name)
        weights = weights[0] if isinstance(weights, tuple) else weights
        ends = re.compile(rf"{network}\.(?P<layer>.*)\.(lora_A|lora\.down)\.weight")
        layers = {match["layer"] for match in map(ends.fullmatch, weights) if match}
        unknown = layers - {name for name, part in module.named_modules() if hasattr(part, "lora_A")}
        if unknown:
            logger.warning(
                f"{source}: {len(unknown)} of its {len(layers)} layers have no place there ({abbreviate(unknown)})"
            )
        found = fingerprint(module)
        if scale is not None:
            pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    return found


def make_base(args, pipeline, network: str, device) -> Optional[str]:
    """Makes the teacher of --teacher_lora or --base_quantization, before it has twins; its fingerprint, None without these."""
    if args.base_quantization != "none":
        found = fingerprint(getattr(pipeline, network))
        quantize_network(getattr(pipeline, network), args.base_quantization, device)
        return f"{found} in {args.base_quantization}"
    if not args.teacher_lora:
        return None
    materialize(getattr(pipeline, network), "cpu")
    source = ModelSource("--teacher_lora", args.teacher_lora)
    found = fuse_lora(source, pipeline, network, args.teacher_lora_scale)
    return f"{found} at {args.teacher_lora_scale:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def stored_name(name: str) -> str:
    """A parameter's name in a file: as diffusers writes those of adapters, and of any other as it is."""
    return name.replace(f".{ADAPTER}.", ".") if ".lora_" in name else name


def adapter_of(network: torch.nn.Module) -> dict[str, Any]:
    """LORA_FLAGS as a network's adapter has them, in JSON's types; all None if it has none."""
    config = getattr(network, "peft_config", {}).get(ADAPTER)
    if config is None:
        return dict.fromkeys(LORA_FLAGS)
    layers = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    return dict(zip(LORA_FLAGS, (config.r, config.lora_alpha, layers)))


def metadata_of(network: torch.nn.Module) -> dict[str, Any]:
    """What peft must know to build a network's adapter again; the one place where alpha is kept."""
    return network.peft_config[ADAPTER].to_dict()


def save_adapter(folder: Path, network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Writes what `network.save_lora_adapter(folder)` writes, of `weights` by their names in a file."""
    LoraBaseMixin.write_lora_layers(
        weights, str(folder), True, FILE, None, True, lora_adapter_metadata=metadata_of(network)
    )
