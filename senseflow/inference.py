# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Models to draw with: a pipeline, a checkpoint or an adapter with its teacher, other people's weights in a pipeline; how each is
to be called.

Everything is found and compared before any weight loads. `infer.py` is the command line.
"""

import argparse
import hashlib
import inspect
import json
import logging
import math
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Mapping, Optional

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, LCMScheduler
from safetensors import safe_open
from safetensors.torch import load_file

from senseflow.arguments import SAMPLERS
from senseflow.errors import UserError, require_package
from senseflow.models.hub import ModelSource, abbreviate, fingerprint, load_network, load_pipeline, saved_components
from senseflow.models.lora import ADAPTER, FILE, fuse_lora, stored_name
from senseflow.models.quantization import BACKENDS, quantize_network
from senseflow.models.vae import latent_shape_of, vae_scale_of
from senseflow.student_config import absolute_if_local


logger = logging.getLogger(__name__)

NETWORKS = ("transformer", "unet")
WRAPPERS = {
    "module",
    "_fsdp_wrapped_module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
}  # DDP, FSDP, compile, checkpointing
# What a network's configuration must have in common with the one whose place it takes: its class, its latents and its text.
FITTING = (
    "_class_name",
    "in_channels",
    "joint_attention_dim",
    "cross_attention_dim",
    "pooled_projection_dim",
    "caption_channels",
)

# How the published weights are drawn with: (pipeline, changes to its scheduler, what its call has besides 4 steps at 1024 px).
# With these changes a stock 4-step call visits the trained levels at any size, and fewer steps visit some of them.
FLOW, SHIFT = FlowMatchEulerDiscreteScheduler.__name__, math.log(2.002)
# Sigmas 1 .9045 .7595 .5128: FLUX's own at 1024 px. No guidance in the call: the network has no embedder for it.
FLUX = {"_class_name": FLOW, "use_dynamic_shifting": False, "shift": math.exp(1.15), "shift_terminal": None}
# Sigmas 1 .9 .75 .5
SD35 = {
    "_class_name": FLOW,
    "use_dynamic_shifting": True,
    "base_shift": SHIFT,
    "max_shift": SHIFT,
    "shift_terminal": 0.5,
}
SD35_CALL = {"guidance_scale": 1.0, "max_sequence_length": 77}
SDXL = {"_class_name": LCMScheduler.__name__, "original_inference_steps": 4}  # timesteps 999 749 499 249
RELEASED = {
    "flux": ("FluxPipeline", FLUX, {"max_sequence_length": 512}),
    "sd35-medium": ("StableDiffusion3Pipeline", SD35, SD35_CALL),
    "sd35-large": ("StableDiffusion3Pipeline", SD35, SD35_CALL),
    "sdxl": ("StableDiffusionXLPipeline", SDXL, {"guidance_scale": 0.0}),
    "sdxl-dmd2": ("StableDiffusionXLPipeline", SDXL, {"guidance_scale": 0.0}),
}


# ---------------------------------------------------------------------------------------------------------------------
# What a model is
# ---------------------------------------------------------------------------------------------------------------------
@dataclass
class Model:
    """A pipeline, or a checkpoint to which its teacher lends the rest of the pipeline; a network may be swapped in."""

    name: str  # `--model` as given
    base: str  # folder or Hub id of the whole pipeline: the model itself, or a checkpoint's teacher
    revision: Optional[str]  # of the base: a commit; None for a folder
    variant: Optional[str]  # of the base's weights, and of others that come in it
    index: dict[str, Any]  # the base's model_index.json
    parameters: Mapping[str, inspect.Parameter]  # of the pipeline's call
    distilled: dict[
        str, Any
    ]  # senseflow.json, or what stands for it; empty where nothing says how the network was trained
    replaced: dict[str, tuple[str, str]]  # (folder or Hub id, subfolder) of what comes from elsewhere than the base
    scheduler: dict[str, Any] = field(default_factory=dict)  # changes to the scheduler's configuration
    swapped: Optional[tuple[str, str]] = None  # (flag, value) of the network in the place of the model's own
    checkpoint: Optional[Path] = (
        None  # its weights, where they are a bare state dict; `replaced` then says whose configuration
    )
    network_config: Optional[dict] = None  # its configuration, where that is given by itself
    adapter: Optional[Path] = None  # the file of an adapter for the base's own network

    @property
    def network(self) -> Optional[str]:
        """The component that is distilled; None if the pipeline has neither."""
        return next((name for name in NETWORKS if name in self.index), None)

    @property
    def pipeline_class(self) -> type:
        """Of the base; DiffusionPipeline, which finds it, where diffusers itself has none of that name."""
        return getattr(diffusers, str(self.index.get("_class_name")), DiffusionPipeline)

    def source(self, flag: str, path: str) -> ModelSource:
        """Where a folder or Hub id is read, and what messages name."""
        return ModelSource(flag, path, self.revision_of(path), self.variant)

    def revision_of(self, source: str) -> Optional[str]:
        """The revision at which a folder or Hub id is read."""
        return self.revision if source == self.base else None

    def place(self, component: str) -> tuple[str, str]:
        """(folder or Hub id, path in it) of a component's configuration."""
        source, subfolder = self.replaced.get(component, (self.base, component))
        return source, str(
            PurePosixPath(subfolder, "scheduler_config.json" if component == "scheduler" else "config.json")
        )

    def config(self, component: str) -> dict[str, Any]:
        """A component's configuration; empty if the pipeline has no such component."""
        if component not in self.index:
            return {}
        if component == self.network and self.network_config is not None:
            return self.network_config
        flag, (source, file) = (
            self.swapped[0] if self.swapped and component == self.network else "--model",
            self.place(component),
        )
        config = self.source(flag, source).read_json(file) or {}
        return config | (self.scheduler if component == "scheduler" else {})


def find_model(name: str, revision: Optional[str] = None, variant: Optional[str] = None) -> Model:
    """Reads what `--model` is: a pipeline, or a checkpoint, whose senseflow.json names its teacher.

    Args:
        revision, variant: of the pipeline, or of the teacher of a checkpoint folder in place of what its senseflow.json says.
    Raises:
        UserError: exit code 2; unknown, damaged, neither a pipeline nor a checkpoint, or without weights in that variant.
    """
    flag, base, replaced = "--model", name, {}
    if os.path.isfile(name) and not name.endswith(".json"):
        raise UserError(f"--model {name}: is a single file; give it to --checkpoint, and a pipeline to --model", 2)
    source = ModelSource(flag, name, revision)
    index = source.read_json("model_index.json")
    distilled = source.read_json("senseflow.json") or {}
    if index is None:
        base = distilled.get("teacher")
        if not isinstance(base, str):
            raise UserError(
                f"--model {name}: has neither model_index.json nor a senseflow.json that names a teacher", 2
            )
        flag = f"--model {name}: the teacher in its senseflow.json,"
        revision = revision if os.path.isdir(name) else None
        revision = revision or (None if os.path.isdir(base) else distilled.get("teacher_revision"))
        variant = variant or distilled.get("teacher_variant")
        source = ModelSource(flag, base, revision)
        index = source.read_json("model_index.json")
        if index is None:
            raise UserError(f"{flag} {base}, has no model_index.json", 2)
        replaced = {part: (name, part) for part in index if ModelSource(flag, name).files(part)}
    class_name = str(index.get("_class_name"))
    parameters = inspect.signature(getattr(diffusers, class_name, DiffusionPipeline).__call__).parameters
    if "prompt" not in parameters:
        raise UserError(
            f"--model {name}: {class_name} is no text-to-image pipeline of diffusers {diffusers.__version__}", 2
        )
    model = Model(name, base, source.commit, variant, index, parameters, distilled, replaced)
    check_usage(model, f"--model {name}")
    if base != name and distilled.get("rank"):
        take_adapter(model)
    return model


def take_adapter(model: Model) -> None:
    """Finds the adapter of `model.name`, a training run's output or a checkpoint. UserError (2) where there is none."""
    require_package("peft", f"--model {model.name}")
    if model.distilled.get("base_quantization") in BACKENDS:
        require_package("bitsandbytes", f"--model {model.name}")
    model.replaced.pop(model.network, None)  # a folder of a checkpoint, with the adapter alone
    for place in (FILE, f"{model.network}/{FILE}"):
        if ModelSource("--model", model.name).has_file(place):
            model.adapter = ModelSource("--model", model.name).file(place)
            return
    raise UserError(
        f"--model {model.name}: its senseflow.json is that of an adapter, but there is no {FILE}; copy it again", 2
    )


def check_usage(model: Model, origin: str) -> None:
    """UserError (2) where the senseflow.json in `model.distilled`, which `origin` brought, does not fit the pipeline."""
    call = model.distilled.get("pipeline_call", {})
    if not isinstance(call, dict) or set(call) - set(model.parameters):
        raise UserError(
            f"{origin}: pipeline_call in senseflow.json is no call of this pipeline; copy the file again", 2
        )
    if model.distilled.get("sampler", "euler") not in SAMPLERS:
        raise UserError(f"{origin}: sampler in senseflow.json must be one of {SAMPLERS}; copy the file again", 2)
    multiple = model.distilled.get("pixel_multiple", 1)
    if not isinstance(multiple, int) or multiple < 1:
        raise UserError(
            f"{origin}: pixel_multiple in senseflow.json must be a number of pixels; copy the file again", 2
        )


def check_parts(model: Model, variant: Optional[str] = None) -> None:
    """UserError (2) where the base lacks a component that nothing replaces, weights come in another variant alone, or none come in
    the `variant` that was asked for."""
    base = "--model" if model.base == model.name else f"--model {model.name}: the teacher in its senseflow.json,"
    places = [(base, model.base, part) for part in saved_components(model.index) if part not in model.replaced]
    for _, source, part in places:
        if os.path.isdir(source) and not Path(source, part).is_dir():
            raise UserError(
                f"--model {model.name}: {source} lacks {part}, which its model_index.json names; copy it", 2
            )
    if model.swapped and model.checkpoint is None:
        places.append((model.swapped[0], *model.replaced[model.network]))
    chosen = [model.source(flag, source).weight_variant(part) for flag, source, part in places]
    if variant is not None and variant not in chosen:
        raise UserError(
            f"--variant {variant}: {model.base} holds no weights *.{variant}.safetensors; drop --variant", 2
        )


def swap_network(args: argparse.Namespace, model: Model) -> None:
    """Puts what --transformer, --unet or --checkpoint names in the place of the model's own network, and the senseflow.json
    beside it in the place of the model's, unless --released says how to draw.

    UserError (2): no such network, or one that this pipeline cannot take.
    """
    flag = next((name for name in (*NETWORKS, "checkpoint") if getattr(args, name) is not None), None)
    if args.subfolder is not None and flag not in NETWORKS:
        raise UserError(
            f"--transformer_subfolder {args.subfolder}: of what? Give --transformer or --unet, or drop it", 2
        )
    if args.network_config is not None and flag != "checkpoint":
        raise UserError(f"--transformer_config {args.network_config}: only --checkpoint needs one; drop it", 2)
    if flag is None:
        return
    value, own, class_name = getattr(args, flag), model.network, model.index["_class_name"]
    origin = f"--{flag} {value}"
    if model.adapter is not None:
        raise UserError(
            f"{origin}: --model {model.name} is an adapter for its teacher's own {own}; give a whole --model", 2
        )
    if own is None or flag not in (own, "checkpoint"):
        raise UserError(f"{origin}: {class_name} has no {flag}; {f'give --{own}' if own else 'drop it'}", 2)
    wanted = {"_class_name": model.index[own][1]} | model.config(own)
    model.swapped = (f"--{flag}", str(PurePosixPath(value, args.subfolder or "")))
    if flag == "checkpoint":
        model.checkpoint = Path(value)
        if value.endswith(".index.json"):
            raise UserError(f"{origin}: is the index of a sharded network; give its folder to --{own}", 2)
        if not model.checkpoint.is_file():
            raise UserError(f"{origin}: no such file; give the path of one", 2)
        model.replaced.setdefault(own, (model.base, own))
        if args.network_config is not None:
            path = Path(args.network_config)
            model.network_config = ModelSource(f"--{own}_config", str(path.parent)).read_json(path.name) or {}
        usage_near, fix = (str(model.checkpoint.parent), ""), f"give --{own}_config"
    elif os.path.isfile(value) and not value.endswith(".json"):
        raise UserError(
            f"{origin}: is a single file; give it to --checkpoint, or a folder with its config.json here", 2
        )
    else:
        usage_near = model.replaced[own] = (value, args.subfolder or "")
        fix = f"name the folder that has one with --{own}_subfolder"
    config = model.config(own)
    if not config:
        raise UserError(f"{origin}: no {args.network_config or PurePosixPath(*model.place(own))}; {fix}", 2)
    for name in FITTING:
        if name in wanted and config.get(name, wanted[name]) != wanted[name]:
            there = f"{name} is {config[name]}, but {wanted[name]} in {model.name}"
            raise UserError(f"{origin}: {there}; give the --model that it was distilled from", 2)
    if args.released is None:
        take_usage(model, *usage_near)


def take_usage(model: Model, source: str, subfolder: str) -> None:
    """Takes senseflow.json, and the scheduler beside it, from a swapped network's folder or the one around it; logs what holds."""
    if os.path.isdir(source):
        source, subfolder = os.path.split(os.path.abspath(os.path.join(source, subfolder)))
    origin, place = " ".join(model.swapped), PurePosixPath(subfolder)
    for folder in dict.fromkeys((place, place.parent)):
        usage = model.source(model.swapped[0], source).read_json(str(folder / "senseflow.json"))
        if usage is not None:
            model.distilled = usage
            check_usage(model, origin)
            for name, held in (("revision", model.revision), ("variant", model.variant)):
                trained = (
                    usage.get(f"teacher_{name}") if usage.get("teacher") == absolute_if_local(model.base) else None
                )
                if trained not in (None, held):
                    logger.info("%s: trained from --%s %s of %s, not %s", origin, name, trained, model.base, held)
            if model.source("", source).has_file(str(folder / "scheduler/scheduler_config.json")):
                model.replaced["scheduler"] = (source, str(folder / "scheduler"))
            else:
                logger.info(
                    "%s: no scheduler beside its senseflow.json; the noise levels are those of %s", origin, model.name
                )
            return
    whose = "its senseflow.json" if model.distilled else "the scheduler's own levels"
    logger.info("%s: no senseflow.json beside it and no --released; drawn as %s is: %s", origin, model.name, whose)


def set_released(name: str, model: Model) -> None:
    """Draws as the published weights `name` want it. UserError (2) where they are another pipeline's."""
    (pipeline, scheduler, call), class_name = RELEASED[name], model.index["_class_name"]
    if class_name != pipeline:
        raise UserError(f"--released {name}: is for a {pipeline}; --model {model.name} is a {class_name}", 2)
    if model.distilled:
        logger.info("--released %s overrides the senseflow.json of %s", name, model.name)
    if model.swapped is None:
        logger.info("--released %s: no network is swapped in; %s is taken to hold the published one", name, model.name)
    call = {"num_inference_steps": 4, "height": 1024, "width": 1024, **call}
    model.distilled, model.scheduler = {"sampler": "stochastic", "pipeline_call": call}, dict(scheduler)


def model_digest(model: Model) -> str:
    """12 hex digits that tell retrained weights from the same ones: sizes, small files, and 64 blocks of each large file; and
    how a student is called.

    What comes from the Hub is known by its commit.
    """
    usage = [model.distilled, model.scheduler, model.network_config] + [model.variant] * (model.variant is not None)
    digest = hashlib.sha256(json.dumps(usage, sort_keys=True).encode())
    for part in sorted({*model.index, *model.replaced}):
        source, config = model.place(part)
        files = sorted(file for file in Path(source, config).parent.glob("*") if file.is_file())
        if part == model.network and model.checkpoint is not None:
            files = [model.checkpoint]
        elif part == model.network and model.adapter is not None:
            files.append(model.adapter)
        elif part in model.replaced and not os.path.isdir(source):
            digest.update(f"{part}: {model.source('', source).commit}/{config}".encode())
        for file in files:
            size = file.stat().st_size
            digest.update(f"{part}/{file.name} {size}".encode())
            with open(file, "rb") as stream:
                for position in range(0, size, max(4096, size // 64)):
                    stream.seek(position)
                    digest.update(stream.read(4096))
    if model.revision is not None:
        digest.update(model.revision.encode())
    return digest.hexdigest()[:12]


def pixel_multiple(model: Model) -> int:
    """What height and width must be divisible by: as the training noted it, else the VAE's factor times the network's patch."""
    if "pixel_multiple" in model.distilled:
        return model.distilled["pixel_multiple"]
    vae, network = model.config("vae"), model.config("transformer") or model.config("unet")
    try:
        scale, channels = vae_scale_of(vae), latent_shape_of(vae, 0)[0]
    except KeyError:  # no VAE, or of a kind that nothing here trains with
        scale, channels = 1, network.get("in_channels", 1)
    # FLUX and its like fold 2 x 2 latents into channels before the network, whose own patch_size then does not count.
    packed = math.isqrt(network.get("in_channels", 1) // channels)
    patch = network.get("patch_size") or network.get("all_patch_size") or 1
    return scale * (packed if packed > 1 else max(patch) if isinstance(patch, list) else patch)


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A state dict on the CPU, without what DDP, FSDP and the like put before its names. UserError (1) if there is none."""
    if path.suffix == ".safetensors":
        state = load_file(path)
    else:
        try:
            # Mapped, not read, where the format allows it: a network in fp32 may be larger than the memory.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            raise UserError(
                f"--checkpoint {path}: damaged, or holds more than tensors; save the state dict alone"
            ) from error
    if isinstance(state, dict):
        state = next((state[key] for key in ("model", "ema_model") if key in state), state)
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(tensor) for tensor in state.values()):
        raise UserError(
            f"--checkpoint {path}: holds no state dict under model, under ema_model or by itself; save one"
        )
    return {
        ".".join(part for part in name.split(".") if part not in WRAPPERS): tensor for name, tensor in state.items()
    }


def load_checkpoint(model: Model, network_class: type, dtype: torch.dtype) -> torch.nn.Module:
    """A network with the weights of --checkpoint, all of them and no others, without initializing any. UserError (1) otherwise."""
    state, config = read_state(model.checkpoint), model.config(model.network)
    if "guidance_embeds" in config and model.network_config is None:
        config["guidance_embeds"] = any("guidance_embedder" in name for name in state)
    with init_empty_weights(include_buffers=False):
        network = network_class.from_config(config)
    wanted = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    other = [
        f"{name} {shapes[name]} not {wanted[name]}"
        for name in wanted
        if shapes.get(name, wanted[name]) != wanted[name]
    ]
    kinds = {
        "missing": [*wanted.keys() - shapes.keys()],
        "unexpected": [*shapes.keys() - wanted.keys()],
        "of another shape": other,
    }
    faults = [f"{len(names)} {kind} ({abbreviate(names)})" for kind, names in kinds.items() if names]
    if faults:
        fix = f"give the --model that it was distilled from, or --{model.network}_config"
        raise UserError(
            f"--checkpoint {model.checkpoint}: not the weights of this network: {', '.join(faults)}; {fix}"
        )
    for name, tensor in state.items():  # each tensor goes as its cast copy comes
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    network.load_state_dict(state, assign=True)
    return network.eval()


def load_component(model: Model, name: str, dtype: torch.dtype):
    """One of `model.replaced`, of the class that its own configuration names, else of the class in the base's index."""
    library, class_name = model.index[name]
    class_name = model.config(name).get("_class_name", class_name)
    component_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
    source, subfolder = model.replaced[name]
    if name == model.network and model.checkpoint is not None:
        with ModelSource(*model.swapped).loading():
            return load_checkpoint(model, component_class, dtype)
    flag = model.swapped[0] if model.swapped and name == model.network else "--model"
    source = model.source(flag, source)
    if issubclass(component_class, diffusers.ModelMixin):
        return load_network(source, component_class, subfolder, dtype=dtype)
    options = {"dtype": dtype} if issubclass(component_class, torch.nn.Module) else {}
    with source.loading():
        return source.load(component_class.from_pretrained, subfolder=subfolder, **options)


def make_teacher(model: Model, pipeline: DiffusionPipeline) -> str:
    """Fuses the LoRA that the teacher was made with into its pipeline; the teacher's fingerprint, as training takes it."""
    network, lora = getattr(pipeline, model.network), model.distilled.get("teacher_lora")
    if network.dtype == torch.float16:  # from which rounding to the fingerprint's bfloat16 is a second rounding
        exact = load_network(model.source("--model", model.base), type(network), model.network, dtype=torch.bfloat16)
    else:
        exact = network
    if lora is None:
        return fingerprint(exact)
    scale = model.distilled.get("teacher_lora_scale", 1.0)
    source = ModelSource(f"--model {model.name}: the LoRA of its teacher,", lora)
    pipeline.register_modules(**{model.network: exact})
    found = fuse_lora(source, pipeline, model.network, scale if exact is network else None)
    if exact is not network:
        pipeline.register_modules(**{model.network: network})
        fuse_lora(source, pipeline, model.network, scale)
    return f"{found} at {scale:g}"


def load_adapter(model: Model, pipeline: DiffusionPipeline, device: torch.device) -> None:
    """Adds the model's adapter to the network that it was trained for. UserError (1) where it is not that one, or is damaged."""
    found, quantization = make_teacher(model, pipeline), model.distilled.get("base_quantization")
    if quantization in BACKENDS:
        found += f" in {quantization}"
        quantize_network(getattr(pipeline, model.network), quantization, device)
    if found != model.distilled.get("teacher_fingerprint"):
        given = f"{model.base}{f' at {model.revision}' if model.revision else ''}"
        given += f" with {model.distilled['teacher_lora']}" if model.distilled.get("teacher_lora") else ""
        raise UserError(
            f"--model {model.name}: its adapter was trained over other weights than those of {given}; restore these"
        )
    network = getattr(pipeline, model.network)
    with ModelSource("--model", model.name).loading():
        with safe_open(model.adapter, "pt") as file:
            names = set(file.keys())
        prefix = model.network if all(name.startswith(f"{model.network}.") for name in names) else None
        place = {"weight_name": model.adapter.name, "prefix": prefix, "adapter_name": ADAPTER}
        network.load_lora_adapter(str(model.adapter.parent), **place)
        own = {stored_name(name) for name, _ in network.named_parameters() if ".lora_" in name}
        if own != {name.removeprefix(f"{prefix}.") for name in names}:
            raise ValueError(f"{model.adapter.name} speaks of layers that this network does not have")
    config = network.peft_config[ADAPTER]
    if (config.r, config.lora_alpha) != (model.distilled["rank"], model.distilled.get("lora_alpha")):
        there = f"rank {config.r} and alpha {config.lora_alpha:g}"
        raise UserError(
            f"--model {model.name}: {FILE} speaks of {there}, its senseflow.json of others; copy both again"
        )


def load_model_pipeline(
    model: Model, sampler: Optional[str], device: torch.device, dtype: torch.dtype
) -> DiffusionPipeline:
    """The whole pipeline on its device. UserError (1) where weights are missing or damaged."""
    parts = {name: load_component(model, name, dtype) for name in model.replaced}
    source = model.source("--model" if model.base == model.name else f"--model {model.name}: its teacher", model.base)
    pipeline = load_pipeline(source, model.pipeline_class, dtype=dtype, **parts)
    if model.adapter is not None:
        load_adapter(model, pipeline, device)
    try:
        pipeline.to(device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--device {device}: too small for this pipeline; give --dtype bf16, or another device"
        ) from error
    changes = dict(model.scheduler)
    kind = getattr(diffusers, changes.pop("_class_name", ""), type(pipeline.scheduler))
    if kind is FlowMatchEulerDiscreteScheduler:
        changes["stochastic_sampling"] = sampler == "stochastic"
    if changes:  # as keywords: from_config forgets what is merged into a configuration that has the default there
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
