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
from senseflow.models.hub import UNREADABLE, few, file_of, files_of, fingerprint, hub_reason, loading_model
from senseflow.models.quantization import BACKENDS, quantization_states, quantize_network
from senseflow.models.weights import materialize


logger = logging.getLogger(__name__)

ADAPTER = "default"  # the name peft gives to the adapter of a network; not a part of the names in a file
FILE = "pytorch_lora_weights.safetensors"
LORA_FLAGS = ("rank", "lora_alpha", "lora_layers")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def add_lora_arguments(parser, layers: Sequence[str]) -> None:
    """The flags of adapters; `layers` are what --lora_layers is for the script's teacher."""
    add = parser.add_argument_group("low-rank adaptation").add_argument
    add(
        "--rank",
        type=int,
        default=0,
        help="train adapters of this rank on the teacher's own weights, which are then held once, instead of two whole networks "
        "(0: full fine-tuning); needs peft",
    )
    add("--lora_alpha", type=float, help="the adapters' output is scaled by this over the rank (default: the rank)")
    add(
        "--lora_layers",
        nargs="+",
        help=f"linear and convolutional layers with adapters: ends of their names, or one regular expression of peft's for their "
        f"whole names (default: {' '.join(layers)})",
    )
    add(
        "--teacher_lora",
        help="a LoRA that is fused into the teacher on loading: a .safetensors file, or a folder or Hub id that holds one",
    )
    add("--teacher_lora_scale", type=float, default=1.0, help="of --teacher_lora (diffusers)")
    add(
        "--base_quantization",
        default="none",
        choices=("none", *BACKENDS),
        help="hold the teacher's linear layers, which student and fake score share, in 8 bits or in 4 (nf4); needs bitsandbytes",
    )


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
        find_lora("--teacher_lora", args.teacher_lora)
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
    start = f"--student_model_name_or_path {args.student_model_name_or_path}"
    with loading("--student_model_name_or_path", args.student_model_name_or_path):
        with safe_open(start_file(args), "pt") as file:
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
            f"{start}: its adapter has other layers ({few(other)}); give the --lora_layers it was trained with", 2
        )


def start_file(args) -> Path:
    """The file of the adapter that --student_model_name_or_path names. UserError (exit code 2) where there is none."""
    return find_lora("--student_model_name_or_path", args.student_model_name_or_path)


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
        with loading_model("--student_model_name_or_path", args.student_model_name_or_path):
            weights = {inner_name(name): tensor for name, tensor in load_file(start_file(args)).items()}
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
def find_lora(flag: str, path: str) -> Path:
    """The file of a LoRA, by itself, or in a folder or Hub repository, where it is the only one or has diffusers' name.

    UserError (exit code 2) where there is none, or more than one.
    """
    if Path(path).is_file():
        return Path(path)
    try:
        found = [file for file in files_of(path) if file.endswith(".safetensors") and "/" not in file]
        if FILE in found or len(found) == 1:
            return file_of(path, FILE if FILE in found else found[0])
    except UNREADABLE as error:
        raise UserError(f"{flag} {path}: no such file or folder, and {hub_reason(error)}", 2) from error
    fix = "give the one that is the LoRA, by itself" if found else "give a LoRA's file, or a folder with one"
    raise UserError(f"{flag} {path}: holds {len(found)} .safetensors files; {fix}", 2)


def fuse_lora(pipeline, network: str, flag: str, path: str, scale: Optional[float]) -> str:
    """Fuses a LoRA into a pipeline, as its stock methods do; into its text encoders, too, where it has weights for them.

    Args:
        network: the component that it must have weights for.
        scale: None: nothing is fused, only the fingerprint taken.
    Returns:
        The fingerprint of that network, unfused, with the LoRA: whatever the precision, which what is fused depends on.
    Raises:
        UserError: exit code 1; not a LoRA, or one for another network.
    """
    file = find_lora(flag, path)
    with loading_model(flag, path):
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
                f"{flag} {path}: {len(unknown)} of its {len(layers)} layers have no place there ({few(unknown)})"
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
    found = fuse_lora(pipeline, network, "--teacher_lora", args.teacher_lora, args.teacher_lora_scale)
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
