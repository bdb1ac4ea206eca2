# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Low-rank adapters (LoRA): teacher, student and fake score over one copy of the teacher's weights.

Student and fake score are copies of the teacher's network that share its frozen tensors and have an adapter each. A
copy takes no memory for weights, and no adapter is ever switched on or off: gradient checkpointing recomputes with the
adapter of the forward pass, and DDP and the optimizer see the few parameters of one role.
"""

import copy
import difflib
import json
import logging
import re
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from diffusers.training_utils import cast_training_params
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import save_file

from senseflow.errors import UserError, loading, require_package
from senseflow.models.hub import UNREADABLE, ModelSource, abbreviate, hub_reason
from senseflow.models.quantization import quantization_states, quantize_network
from senseflow.models.weights import fingerprint, materialize, state_dict_problems


logger = logging.getLogger(__name__)

ADAPTER = "default"  # peft's name of a network's adapter, which files leave out of tensor names
FILE = "pytorch_lora_weights.safetensors"
LORA_FLAGS = ("rank", "lora_alpha", "lora_layers")


# ---------------------------------------------------------------------------------------------------------------------
# Before any weights load
# ---------------------------------------------------------------------------------------------------------------------
def target_modules(layers: Sequence[str]) -> Union[str, list[str]]:
    """Return --lora_layers for peft's LoraConfig: one regular expression, or a list of names."""
    return layers[0] if len(layers) == 1 and re.search(r"[*+?|()\[\]\\^$]", layers[0]) else list(layers)


def lora_config(args):
    """Make peft's configuration of the adapters."""
    from peft import LoraConfig

    return LoraConfig(r=args.rank, lora_alpha=args.lora_alpha, target_modules=target_modules(args.lora_layers))


def check_lora_args(args, cls, config: dict) -> None:
    """Check the flags of adapters, and an adapter from which the run starts, against the teacher's network.

    Args:
        cls, config: class and configuration of that network.
    Raises:
        UserError: exit code 2; packages, files or layers are missing.
    """
    if not args.rank:
        for flag, value in (("--teacher_lora", args.teacher_lora), ("--base_quantization", args.base_quantization)):
            if value not in (None, "none"):
                fix = "give --rank, or a whole pipeline as the teacher"
                raise UserError(f"{flag} {value}: only adapters train over such a base; {fix}", exit_code=2)
        return
    require_package("peft", "--rank")
    if args.base_quantization != "none":
        require_package("bitsandbytes", f"--base_quantization {args.base_quantization}")
        if args.teacher_lora:
            problem = (
                "stock pipelines cannot fuse one into a quantized base; fuse it into a pipeline first, and give that"
            )
            raise UserError(f"--teacher_lora {args.teacher_lora}: {problem}", exit_code=2)
    if args.teacher_lora:
        find_lora(ModelSource("--teacher_lora", args.teacher_lora))
    with torch.device("meta"):
        network = cls.from_config(config)
    check_lora_layers(args.lora_layers, network)
    if args.student_model_name_or_path:
        check_initial_adapter(args, network)


def check_lora_layers(layers: Sequence[str], network: torch.nn.Module) -> None:
    """Check that each of --lora_layers matches linear and convolutional layers only, and at least one."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    modules = dict(network.named_modules())
    supported = {name for name, module in modules.items() if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))}
    targets = target_modules(layers)
    for target in [targets] if isinstance(targets, str) else targets:
        flag = f"--lora_layers {target}"
        try:
            config = LoraConfig(target_modules=targets if isinstance(targets, str) else [target])
            matched = {name for name in modules if name and check_target_module_exists(config, name)}
        except re.error as error:
            raise UserError(f"{flag}: not a regular expression ({error}); correct it, or give names", 2) from error
        if not matched & supported:
            names = {re.sub(r"^.*blocks\.\d+\.", "", name) for name in supported}
            similar = ", ".join(difflib.get_close_matches(target, names, 3, 0.0))
            raise UserError(f"{flag}: matches no linear or convolutional layer; there are {similar}, ...", 2)
        for name in sorted(matched - supported):
            problem = f"also matches {name}, a {type(modules[name]).__name__}, which cannot have an adapter"
            raise UserError(f"{flag}: {problem}; name linear and convolutional layers only", 2)


def check_initial_adapter(args, network: torch.nn.Module) -> None:
    """Check that --student_model_name_or_path is an adapter like this run's, for a network on the meta device."""
    source = ModelSource("--student_model_name_or_path", args.student_model_name_or_path)
    with loading(source.flag, source.path):
        weights, _ = read_adapter(find_lora(source), network)
    ranks = {tensor.shape[0] for name, tensor in weights.items() if ".lora_A." in name} - {args.rank}
    if ranks:
        raise source.error(f"its adapter has rank {min(ranks)}; give --rank {min(ranks)}")
    network.add_adapter(lora_config(args))
    expected = {stored_name(name): tensor for name, tensor in network.named_parameters() if ".lora_" in name}
    problem = state_dict_problems(expected, weights)
    if problem:
        raise source.error(f"its adapter has other layers ({problem}); give the --lora_layers it was trained with")


def without_component(name: str) -> str:
    """Remove a pipeline's component from a tensor's name in an adapter file."""
    return re.sub(r"^(transformer|unet)\.", "", name)


# ---------------------------------------------------------------------------------------------------------------------
# Networks over one base
# ---------------------------------------------------------------------------------------------------------------------
def copy_sharing_base(network: torch.nn.Module, base: torch.nn.Module) -> torch.nn.Module:
    """Copy a network, sharing with it all parameters and buffers of `base`, quantized ones too, and nothing else."""
    shared = (*base.parameters(), *base.buffers(), *quantization_states(base))
    return copy.deepcopy(network, {id(tensor): tensor for tensor in shared})


def adapted_copies(base: torch.nn.Module, args) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Make student and fake score over the teacher's network.

    They equal each other at the start, and the teacher too, as half of each new adapter is zero, unless
    --student_model_name_or_path gives an adapter to start from.

    Args:
        base: the teacher's frozen network on its device: tensors of a copy that is moved later are not shared.
    Returns:
        (student, fake score), of which only the adapters take gradient, in float32 whatever the precision of `base`.
    """
    student = copy_sharing_base(base, base)
    student.add_adapter(lora_config(args))
    cast_training_params(student, torch.float32)
    if args.student_model_name_or_path:
        source = ModelSource("--student_model_name_or_path", args.student_model_name_or_path)
        with source.loading(), torch.no_grad():
            weights, _ = read_adapter(find_lora(source), student)
            for name, parameter in student.named_parameters():
                if ".lora_" in name:
                    scale = args.lora_alpha / args.rank if ".lora_B." in name else 1
                    parameter.copy_(weights[stored_name(name)] / scale)
    return student, copy_sharing_base(student, base)


def share_base(network: torch.nn.Module, base: torch.nn.Module) -> None:
    """Replace the frozen parameters of an adapted copy of `base`, perhaps a part of `network`, by those of `base`.

    FSDP2 makes shards for every network. Call this once both are sharded, before FSDP first uses the copy's shards.
    """
    (adapted,) = (module for module in network.modules() if hasattr(module, "peft_config"))
    tensors = dict(base.named_parameters())
    names = [name for name, _ in adapted.named_parameters() if ".lora_" not in name]
    shared = {name: tensors[name.replace(".base_layer.", ".")] for name in names}
    adapted.load_state_dict(shared, strict=False, assign=True)


# ---------------------------------------------------------------------------------------------------------------------
# A teacher with a LoRA
# ---------------------------------------------------------------------------------------------------------------------
def find_lora(source: ModelSource) -> Path:
    """Find the file of a LoRA: the source itself, or in it the only safetensors file or the one with diffusers' name.

    Raises:
        UserError: exit code 2; none, or several.
    """
    if Path(source.path).is_file():
        return Path(source.path)
    try:
        files = [file for file in source.files() if file.endswith(".safetensors")]
        if FILE in files or len(files) == 1:
            return source.file(FILE if FILE in files else files[0])
    except UNREADABLE as error:
        raise source.error(f"no such file or folder, and {hub_reason(error)}") from error
    fix = "give the path of the LoRA itself" if files else "give a LoRA's file, or a folder with one"
    raise source.error(f"holds {len(files)} .safetensors files; {fix}")


def fuse_lora(source: ModelSource, pipeline, network: str, scale: Optional[float]) -> str:
    """Fuse a LoRA into a pipeline with its stock methods, and into its text encoders if it has weights for them.

    Args:
        network: name of the component for which it must have weights.
        scale: None only computes the fingerprint.
    Returns:
        The fingerprint of that network with the LoRA beside it: fused weights would depend on the precision.
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
        pattern = re.compile(rf"{network}\.(?P<layer>.*)\.(lora_A|lora\.down)\.weight")
        layers = {match["layer"] for match in map(pattern.fullmatch, weights) if match}
        unknown = layers - {name for name, part in module.named_modules() if hasattr(part, "lora_A")}
        if unknown:
            names = abbreviate(unknown)
            logger.warning(f"{source}: {len(unknown)} of its {len(layers)} layers are not in the network ({names})")
        adapted_fingerprint = fingerprint(module)
        if scale is not None:
            pipeline.fuse_lora(lora_scale=scale)
        pipeline.unload_lora_weights()
    return adapted_fingerprint


def fuse_or_quantize(args, pipeline, network: str, device) -> Optional[str]:
    """Apply --teacher_lora or --base_quantization to the teacher; return its fingerprint, or None without these."""
    module = getattr(pipeline, network)
    if args.base_quantization != "none":
        unquantized = fingerprint(module)
        quantize_network(module, args.base_quantization, device)
        return f"{unquantized} in {args.base_quantization}"
    if not args.teacher_lora:
        return None
    materialize(module, "cpu")
    source = ModelSource("--teacher_lora", args.teacher_lora)
    return f"{fuse_lora(source, pipeline, network, args.teacher_lora_scale)} at {args.teacher_lora_scale:g}"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def stored_name(name: str) -> str:
    """Return a parameter's name in a file; diffusers leaves peft's name of the adapter out."""
    return name.replace(f".{ADAPTER}.", ".") if ".lora_" in name else name


def adapter_settings(network: torch.nn.Module) -> dict[str, Any]:
    """Return {flag: value} of LORA_FLAGS for a network's adapter, in JSON's types; all None if it has none."""
    config = getattr(network, "peft_config", {}).get(ADAPTER)
    if config is None:
        return dict.fromkeys(LORA_FLAGS)
    layers = config.target_modules if isinstance(config.target_modules, str) else sorted(config.target_modules)
    return dict(zip(LORA_FLAGS, (config.r, config.lora_alpha, layers)))


def save_adapter(folder: Path, network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Write `weights` (by their names in a file) as `network.save_lora_adapter(folder)` would write its own."""
    metadata = network.peft_config[ADAPTER].to_dict()  # only it holds alpha
    LoraBaseMixin.write_lora_layers(weights, str(folder), True, FILE, None, True, lora_adapter_metadata=metadata)


def export_lora(
    folder: Path,
    pipeline_class,
    component: str,
    network: torch.nn.Module,
    weights: dict[str, torch.Tensor],
    dtype: torch.dtype,
    base: Optional[tuple[str, str]] = None,
    kohya_names: bool = False,
) -> None:
    """Write an adapter as `load_lora_weights` of a pipeline and other programs read it.

    Programs that do not read diffusers' metadata take alpha as the rank. So B is multiplied by alpha / rank, and alpha
    is the rank.

    Args:
        component: name of the network in the pipeline.
        weights: {name: tensor} of `network`, as in a checkpoint.
        base: architecture and version of the teacher, for the file's metadata.
        kohya_names: name tensors as kohya's programs do and not as diffusers, if diffusers reads that, too.
    """
    config = network.peft_config[ADAPTER]
    scale, rank = config.lora_alpha / config.r, str(config.r)
    layers = {name: (tensor * scale if ".lora_B." in name else tensor).to(dtype) for name, tensor in weights.items()}
    metadata = {"format": "pt", "ss_network_dim": rank, "ss_network_alpha": rank}
    if base is not None:
        metadata |= {"modelspec.architecture": f"{base[0]}/lora", "ss_base_model_version": base[1]}

    def save(tensors: dict[str, torch.Tensor], file: str) -> None:
        converted = kohya_tensors(tensors, pipeline_class) if kohya_names else None
        if converted is None:
            settings = {f"{component}.{name}": value for name, value in config.to_dict().items()}
            settings[f"{component}.lora_alpha"] = config.r
            # Sets, which JSON lacks, become lists.
            metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(settings, default=list, indent=2, sort_keys=True)
        save_file(converted or tensors, file, metadata=metadata)

    pipeline_class.save_lora_weights(folder, **{f"{component}_lora_layers": layers}, save_function=save)


def kohya_tensors(tensors: dict[str, torch.Tensor], pipeline_class) -> Optional[dict[str, torch.Tensor]]:
    """Return an adapter of a UNet with kohya's tensor names over diffusers' layers, and an alpha for each layer.

    None, with a warning, if diffusers does not read all of these names.
    """
    converted = convert_state_dict_to_kohya(tensors)
    read = convert_unet_state_dict_to_peft(pipeline_class.lora_state_dict(dict(converted))[0])
    if read.keys() != tensors.keys():
        problem = f"diffusers does not read {abbreviate(tensors.keys() - read.keys())} by kohya's names"
        logger.warning(f"{FILE}: {problem}; it has diffusers' names, of which other programs find a part")
        return None
    return {name: tensor.float() if name.endswith(".alpha") else tensor for name, tensor in converted.items()}


def read_adapter(path: Path, network: torch.nn.Module) -> tuple[dict[str, torch.Tensor], Optional[float]]:
    """Read an adapter for a network, with diffusers' names or kohya's. B is multiplied by alpha / rank.

    Returns:
        ({`stored_name`: tensor}, alpha of the file; None if it has none, which means the rank).
    Raises:
        ValueError: layers are scaled differently.
    """
    with safe_open(path, "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}
        metadata = json.loads((file.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
    layers = {f"lora_unet_{name.replace('.', '_')}": name for name, _ in network.named_modules()}
    weights, alphas = {}, set()
    for name, tensor in stored.items():
        layer, _, part = name.partition(".")
        if layer in layers:
            name = f"{layers[layer]}.{part.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"
        if name.endswith(".alpha"):
            alphas.add(tensor.item())
        else:
            weights[without_component(name)] = tensor
    settings = {without_component(name): value for name, value in metadata.items()}
    alphas = alphas or {settings.get("lora_alpha")}
    if len(alphas) > 1 or settings.get("alpha_pattern") or settings.get("use_rslora"):
        raise ValueError("its layers are scaled differently, or by the root of the rank")
    (alpha,) = alphas
    for name, tensor in weights.items():
        if ".lora_B." in name and alpha not in (None, tensor.shape[1]):
            weights[name] = tensor.float() * (alpha / tensor.shape[1])
    return weights, alpha
