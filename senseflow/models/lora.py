# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Low-rank adapters (LoRA): teacher, student and fake score over one copy of the teacher's weights.

Student and fake score are copies of the teacher's network that share its frozen tensors and have an adapter each. A
copy takes no memory for weights, and no adapter is ever switched on or off: gradient checkpointing recomputes with the
adapter of the forward pass, and DDP and the optimizer see the few parameters of one role.
"""

import copy
import difflib
import hashlib
import json
import logging
import re
from pathlib import Path
from types import MethodType
from typing import Any, Mapping, Optional, Sequence, Union

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LoraBaseMixin
from diffusers.training_utils import cast_training_params
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya, convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import FSDPModule

from senseflow.errors import UserError, loading, require_package
from senseflow.models.autocast import autocast_weight
from senseflow.models.hub import UNREADABLE, ModelSource, abbreviate, hub_reason
from senseflow.models.quantization import quantization_states, quantize_network
from senseflow.models.weights import check_export_dtype, fingerprint, materialize, state_dict_problems


logger = logging.getLogger(__name__)

ADAPTER = "default"  # peft's name of a network's adapter, which files leave out of tensor names
FILE = "pytorch_lora_weights.safetensors"
LORA_FLAGS = ("rank", "lora_alpha", "lora_layers")
# Names of a LoRA's tensors in files of diffusers, peft, kohya and XLabs: how they end, and those of text encoders.
LAYER_TENSOR = re.compile(
    r"[._]lora\d?[._](A|B|down|up|linear_layer\.(down|up)|magnitude_vector)(\.(weight|bias))?$|\.alpha$"
)
TEXT_ENCODER_LAYER = re.compile(r"(lora_te|text_encoder).*lora([._]linear_layer)?[._](A|down)\.weight$")
TEXT_ENCODER_DORA = re.compile(r"(lora_te|text_encoder).*lora_magnitude_vector")  # which diffusers does not load


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


def check_lora_args(args, pipeline_class, name: str, cls, config: dict) -> None:
    """Check the flags of adapters, and an adapter from which the run starts, against the teacher's network.

    Args:
        pipeline_class, name: of the teacher's pipeline, and of that network in it.
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
    for owner, method in ((cls, "add_adapter"), (pipeline_class, "save_lora_weights")):
        if not hasattr(owner, method):
            problem = f"diffusers' {owner.__name__} has no {method}, which adapters need"
            raise UserError(f"--rank {args.rank}: {problem}; train without --rank", exit_code=2)
    with torch.device("meta"):
        network = cls.from_config(config)
    check_lora_layers(args.lora_layers, network)
    if args.teacher_lora:
        check_teacher_lora(ModelSource("--teacher_lora", args.teacher_lora), pipeline_class, name, network)
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
    with loading(str(source)):
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
    fuse_applications(student)
    if args.student_model_name_or_path:
        source = ModelSource("--student_model_name_or_path", args.student_model_name_or_path)
        with source.loading(), torch.no_grad():
            weights, _ = read_adapter(find_lora(source), student)
            for name, parameter in student.named_parameters():
                if ".lora_" in name:
                    scale = args.lora_alpha / args.rank if ".lora_B." in name else 1
                    parameter.copy_(weights[stored_name(name)] / scale)
    fake_score = copy_sharing_base(student, base)
    for network in (student, fake_score):
        vars(network)["adapter_base"] = base  # for `share_base`; not as a submodule
    return student, fake_score


def fuse_applications(network: torch.nn.Module) -> None:
    """Apply the adapters of linear layers with fewer operations than peft, which casts to float32 and back."""
    from peft.tuners.lora import LoraLayer

    for layer in network.modules():
        if isinstance(layer, LoraLayer) and isinstance(layer.lora_A[ADAPTER], torch.nn.Linear):
            layer.forward = MethodType(apply_adapter, layer)


def apply_adapter(layer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Return base(x) + scaling * x A^T B^T of a peft layer with a linear adapter, in autocast's precision."""
    adapter = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    lora_a, lora_b = (half.weight for half in adapter)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once for base and adapter
        lora_a, lora_b = map(autocast_weight, adapter)
    elif x.dtype != lora_a.dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    out, hidden = layer.base_layer(x, *args, **kwargs), torch.nn.functional.linear(x, lora_a)
    added = torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2), lora_b.t(), alpha=layer.scaling[ADAPTER])
    return added.view(out.shape)


def share_base(network: torch.nn.Module) -> None:
    """Replace the frozen parameters of adapted copies in `network` by those of the base that each was copied from.

    FSDP2 makes shards for every network. Call this once both are sharded, before FSDP first uses the copy's shards.
    """
    for adapted in [module for module in network.modules() if "adapter_base" in vars(module)]:
        if not isinstance(adapted.adapter_base, FSDPModule):
            raise RuntimeError("the role of the network that adapters share must be made before those of the adapters")
        tensors = dict(adapted.adapter_base.named_parameters())
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


def check_teacher_lora(source: ModelSource, pipeline_class, name: str, network: torch.nn.Module) -> None:
    """Check that a pipeline's stock methods can fuse all of a LoRA into the teacher's network, perhaps a meta network.

    Layers that the network lacks are only named in a warning: a stock pipeline leaves them out, too.

    Raises:
        UserError: exit code 2; damaged, no LoRA for this network, or a LoRA with more than low-rank layers.
    """
    file = find_lora(source)
    with source.loading():
        tensors = load_file(file)
    others = [key for key in tensors if not LAYER_TENSOR.search(key) or TEXT_ENCODER_DORA.match(key)]
    others = sorted(key for key in others if tensors[key].float().any())  # zeros change nothing
    if others:
        problem = (
            "is of no plain low-rank layer, and diffusers cannot fuse it (LoKr, LoHa, norms, biases, DoRA's scales)"
        )
        raise source.error(
            f"{others[0]} {problem}; fuse the file with the program that made it, and give that pipeline"
        )
    try:
        weights = lora_weights(pipeline_class, file, network)
    except Exception as error:  # each converter of diffusers raises its own
        problem = f"{pipeline_class.__name__} cannot read its layers, such as {min(tensors)}"
        raise source.error(f"{problem} ({type(error).__name__}: {error}); save it with save_lora_weights") from error
    prefix = f"{name}."
    weights = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
    if weights and "lora_A" not in next(iter(weights)):  # as `load_lora_adapter` does
        weights = convert_unet_state_dict_to_peft(weights)
    halves = {half: lora_halves(weights, half) for half in "AB"}
    modules = dict(network.named_modules())
    unknown = halves["A"].keys() - modules.keys()
    if len(unknown) == len(halves["A"]):
        shown = min(unknown, default=min(tensors))
        raise source.error(f"has no layer of a {type(network).__name__} ({shown}, ...); give a LoRA for it")
    for layer in sorted(halves["A"].keys() - unknown):
        (outputs, inputs), own = (
            modules[layer].weight.shape[:2],
            (halves["B"][layer].shape[0], halves["A"][layer].shape[1]),
        )
        if own != (outputs, inputs):
            problem = (
                f"{layer} takes {inputs} and returns {outputs} values, its layer takes {own[1]} and returns {own[0]}"
            )
            raise source.error(f"{problem}; give a LoRA for this network (a control LoRA widens it)")
    if unknown:
        names = abbreviate(unknown)
        logger.warning(f"{source}: {len(unknown)} of its {len(halves['A'])} layers are not in the network ({names})")


def lora_weights(pipeline_class, file: Path, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Read a LoRA as a pipeline does: {"component.layer...": tensor}."""
    config = {"unet_config": network.config}  # some pipelines need it for other programs' numbers of blocks
    weights = pipeline_class.lora_state_dict(str(file.parent), weight_name=file.name, **config)
    return weights[0] if isinstance(weights, tuple) else weights


def lora_halves(weights: Mapping[str, torch.Tensor], half: str) -> dict[str, torch.Tensor]:
    """Return {layer: tensor} of the matrices A or B."""
    end = f".lora_{half}.weight"
    return {key.removesuffix(end): tensor for key, tensor in weights.items() if key.endswith(end)}


def fuse_lora(source: ModelSource, pipeline, scale: float) -> None:
    """Fuse a checked LoRA into a pipeline's network and text encoders with its stock methods.

    Layers of text encoders that the stock methods leave out are named in a warning.

    Raises:
        UserError: exit code 1; of another pipeline.
    """
    file = find_lora(source)
    with source.loading():
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name)
        encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        loaded = sum(hasattr(module, "lora_A") for encoder in encoders for module in encoder.modules())
        with safe_open(file, "pt") as tensors:
            wanted = [key for key in tensors.keys() if TEXT_ENCODER_LAYER.match(key)]
        if loaded < len(wanted):
            problem = f"{len(wanted) - loaded} of its {len(wanted)} layers of text encoders"
            logger.warning(f"{source}: {problem} are not in {type(pipeline).__name__}'s ({abbreviate(wanted)})")
        pipeline.fuse_lora(components=pipeline._lora_loadable_modules, lora_scale=scale)
        pipeline.unload_lora_weights()


def lora_fingerprint(source: ModelSource, scale: float) -> str:
    """Hash a LoRA's file. A fingerprint of fused weights would depend on the precision in which they are fused."""
    with open(find_lora(source), "rb") as file:
        return f"{hashlib.file_digest(file, 'sha256').hexdigest()[:16]} at {scale:g}"


def fuse_or_quantize(args, pipeline, network: str, device) -> Optional[str]:
    """Apply --teacher_lora or --base_quantization to the teacher; return its fingerprint, or None without these."""
    module = getattr(pipeline, network)
    if args.base_quantization != "none":
        unchanged = fingerprint(module)
        quantize_network(module, args.base_quantization, device)
        return f"{unchanged} in {args.base_quantization}"
    if not args.teacher_lora:
        return None
    source, unchanged = ModelSource("--teacher_lora", args.teacher_lora), fingerprint(module)
    materialize(module, "cpu")
    fuse_lora(source, pipeline, args.teacher_lora_scale)
    return f"{unchanged} with {lora_fingerprint(source, args.teacher_lora_scale)}"


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
    check_export_dtype(layers, dtype)
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
