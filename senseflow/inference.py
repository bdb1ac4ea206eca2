# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Find the pipeline that infer.py samples from, check it before any weights load, and load it.

`find_model` starts from --model: a whole pipeline, or a checkpoint or adapter whose senseflow.json names its teacher.
A network that was distilled elsewhere may replace the pipeline's own. `load_model_pipeline` loads the result.
"""

import hashlib
import inspect
import json
import logging
import math
import os
import pickle
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Mapping, Optional

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from senseflow.errors import UserError, require_package
from senseflow.models.attention import check_attention_backend, set_attention_backend
from senseflow.models.hub import (
    ModelSource,
    check_processors,
    check_weights,
    load_network,
    load_pipeline,
    saved_components,
)
from senseflow.models.lora import ADAPTER, FILE, fuse_lora, lora_fingerprint, read_adapter, stored_name
from senseflow.models.quantization import BACKENDS, quantize_network
from senseflow.models.vae import latent_shape_of, vae_scale_of
from senseflow.models.weights import fingerprint, state_dict_problems
from senseflow.released import RELEASED
from senseflow.student_config import STUDENT_CONFIG, read_student_config


logger = logging.getLogger(__name__)

NETWORKS = ("transformer", "unet")
# Parts of names in a state dict that DDP, FSDP, torch.compile and activation checkpointing insert.
WRAPPERS = {"module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}
# Entries of a network's configuration that must be those of the network it replaces: class, latents and prompts.
PROMPT_ENTRIES = ("joint_attention_dim", "cross_attention_dim", "pooled_projection_dim", "caption_channels")
COMPATIBLE = ("_class_name", "in_channels", *PROMPT_ENTRIES)


@dataclass
class Model:
    """A pipeline to sample from, none of whose weights is loaded.

    Attributes:
        source: the value of --model.
        base: the whole pipeline: `source`, or the teacher of a checkpoint or adapter.
        index: model_index.json of the base.
        student_config: senseflow.json, or what --released replaces it with; empty for a pipeline without either.
        replaced: {component: (source, folder in it)} of the components that are not the base's.
        scheduler_changes: replace entries of the scheduler's configuration.
        state_dict: a file with the network's weights.
        state_dict_config: its configuration, if it is not the base's.
        adapter: a file with a LoRA for the base's network.
    """

    source: ModelSource
    base: ModelSource
    index: dict[str, Any]
    student_config: dict[str, Any]
    replaced: dict[str, tuple[ModelSource, str]] = field(default_factory=dict)
    scheduler_changes: dict[str, Any] = field(default_factory=dict)
    state_dict: Optional[Path] = None
    state_dict_config: Optional[dict[str, Any]] = None
    adapter: Optional[Path] = None

    @property
    def class_name(self) -> str:
        return str(self.index.get("_class_name"))

    @property
    def pipeline_class(self) -> type:
        """The pipeline's class; DiffusionPipeline, which finds it on loading, if diffusers has none of that name."""
        return getattr(diffusers, self.class_name, DiffusionPipeline)

    @property
    def call_parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.pipeline_class.__call__).parameters

    @property
    def network(self) -> Optional[str]:
        """Name of the component that is distilled; None if the pipeline has neither of NETWORKS."""
        return next((name for name in NETWORKS if name in self.index), None)

    def location(self, component: str) -> tuple[ModelSource, str]:
        """Return the source of a component and its folder there."""
        return self.replaced.get(component, (self.base, component))

    def config(self, component: str) -> dict[str, Any]:
        """Read the configuration of a component; return {} if the pipeline has no such component."""
        if component not in self.index:
            return {}
        if component == self.network and self.state_dict_config is not None:
            return dict(self.state_dict_config)
        source, folder = self.location(component)
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        config = source.read_json(str(PurePosixPath(folder, file))) or {}
        return config | (self.scheduler_changes if component == "scheduler" else {})


def find_model(
    path: str,
    revision: Optional[str] = None,
    variant: Optional[str] = None,
    network: Optional[ModelSource] = None,
    subfolder: str = "",
    config_file: Optional[str] = None,
    released: Optional[str] = None,
) -> Model:
    """Find and check a pipeline to sample from, without loading weights.

    Args:
        path: a pipeline, checkpoint or adapter: a folder or Hub id.
        revision, variant: of the pipeline, or of a checkpoint's teacher in place of those in its senseflow.json.
        network: replaces the pipeline's own; its flag is --transformer, --unet or, for a state dict, --checkpoint.
        subfolder: folder of that network in its source.
        config_file: configuration of a state dict, if it is not the base's.
        released: key of RELEASED.
    Raises:
        UserError: exit code 2; unknown, damaged, incomplete, or parts that do not fit together.
    """
    model = find_pipeline(ModelSource("--model", path, revision, variant))
    if network is not None:
        replace_network(model, replace(network, variant=model.base.variant), subfolder, config_file)
    if released is not None:
        apply_released(model, released)
    elif network is not None:
        find_student_config(model, network, subfolder)
    check_components(model)
    return model


def find_pipeline(source: ModelSource) -> Model:
    """Find the whole pipeline: `source` itself, or the teacher that its senseflow.json names."""
    index, student_config = source.read_json("model_index.json"), read_student_config(source) or {}
    base, replaced = source, {}
    if index is None:
        base = find_teacher(source, student_config)
        index = base.read_json("model_index.json")
        if index is None:
            raise base.error("has no model_index.json")
        index["_class_name"] = student_config.get("pipeline_class", index.get("_class_name"))
        replaced = {name: (source, name) for name in saved_components(index) if source.files(name)}
    model = Model(source, replace(base, revision=base.commit), index, student_config, replaced)
    if "prompt" not in model.call_parameters:
        problem = f"{model.class_name} is no text-to-image pipeline of diffusers {diffusers.__version__}"
        raise source.error(problem)
    check_pipeline_kwargs(model, source)
    if base is not source and "rank" in student_config:
        model.adapter = find_adapter(model)
        model.replaced.pop(model.network, None)  # in a checkpoint, the folder of the adapter
    return model


def find_teacher(source: ModelSource, student_config: dict[str, Any]) -> ModelSource:
    """Return where the teacher of a checkpoint or adapter is."""
    path = student_config.get("teacher")
    if path is None:
        raise source.error(f"has neither model_index.json nor a {STUDENT_CONFIG} that names a teacher")
    revision = source.revision if source.is_folder else None  # else it is the revision of the checkpoint itself
    if not os.path.isdir(path):
        revision = revision or student_config.get("teacher_revision")
    variant = source.variant or student_config.get("teacher_variant")
    return ModelSource(f"{source}: the teacher in its {STUDENT_CONFIG},", path, revision, variant)


def find_adapter(model: Model) -> Path:
    """Return the file of an adapter, in the output folder of a run or in a checkpoint."""
    require_package("peft", str(model.source))
    if model.student_config.get("base_quantization") in BACKENDS:
        require_package("bitsandbytes", str(model.source))
    file = model.source.file(FILE) or model.source.file(f"{model.network}/{FILE}")
    if file is None:
        raise model.source.error(f"its {STUDENT_CONFIG} is that of an adapter, but there is no {FILE}; copy it again")
    return file


def replace_network(model: Model, network: ModelSource, subfolder: str, config_file: Optional[str]) -> None:
    """Replace the network, or for --checkpoint its weights. UserError (2) if it is absent or does not fit."""
    name = model.network
    if name is None or network.flag not in (f"--{name}", "--checkpoint"):
        fix = "drop it" if name is None else f"give --{name}"
        raise network.error(f"{model.class_name} has no {network.flag.removeprefix('--')}; {fix}")
    if model.adapter is not None:
        raise network.error(f"{model.source} is an adapter for its teacher's own {name}; give a whole --model")
    if network.flag == "--checkpoint":
        model.state_dict = Path(network.path)
        if not model.state_dict.is_file():
            raise network.error("no such file; give the path of one")
        model.replaced.setdefault(name, (model.base, name))
        if config_file is None:
            return
    own_config = {"_class_name": model.index[name][1], **model.config(name)}
    if model.state_dict is not None:
        file, flag = Path(config_file), f"--{name}_config"
        model.state_dict_config = config = ModelSource(flag, str(file.parent)).read_json(file.name)
    else:
        file, flag = PurePosixPath(network.path, subfolder, "config.json"), f"--{name}_subfolder"
        model.replaced[name] = (network, subfolder)
        config = model.config(name)
    if not config:
        raise network.error(f"no {file}; name the folder or file that has one with {flag}")
    for key in COMPATIBLE:
        if key in own_config and config.get(key, own_config[key]) != own_config[key]:
            problem = f"{key} is {config[key]}, but {own_config[key]} in {model.source.path}"
            raise network.error(f"{problem}; give the --model that it was distilled from")


def find_student_config(model: Model, network: ModelSource, subfolder: str) -> None:
    """Take senseflow.json and the scheduler in a replaced network's folder or the one above it, if they are there."""
    source, folder = network, PurePosixPath(subfolder)
    if os.path.exists(network.path):
        path = os.path.abspath(os.path.join(network.path, subfolder))
        parent, name = os.path.split(os.path.dirname(path) if os.path.isfile(path) else path)
        source, folder = replace(network, path=parent), PurePosixPath(name)
    for place in dict.fromkeys((folder, folder.parent)):
        student_config = read_student_config(source, str(place))
        if student_config is None:
            continue
        model.student_config = student_config
        check_pipeline_kwargs(model, network)
        if source.has_file(str(place / "scheduler/scheduler_config.json")):
            model.replaced["scheduler"] = (source, str(place / "scheduler"))
        else:
            problem = f"no scheduler beside its {STUDENT_CONFIG}"
            logger.info("%s: %s; the noise levels are those of %s", network, problem, model.source)
        return
    problem = f"no {STUDENT_CONFIG} beside it and no --released"
    logger.info("%s: %s; sampling as %s does", network, problem, model.source)


def apply_released(model: Model, name: str) -> None:
    """Sample with the preset of published weights. UserError (2) if it is for another pipeline."""
    preset = RELEASED[name]
    if model.class_name != preset.pipeline:
        problem = f"is for a {preset.pipeline}; {model.source} is a {model.class_name}"
        raise UserError(f"--released {name}: {problem}", exit_code=2)
    if model.student_config:
        logger.info("--released %s overrides the %s of %s", name, STUDENT_CONFIG, model.source.path)
    pipeline_kwargs = {"num_inference_steps": 4, "height": 1024, "width": 1024, **preset.pipeline_kwargs}
    model.student_config = {"sampler": "stochastic", "pipeline_call": pipeline_kwargs}
    model.scheduler_changes = dict(preset.scheduler)


def check_pipeline_kwargs(model: Model, source: ModelSource) -> None:
    """Refuse (exit code 2) the senseflow.json of a source if the pipeline's call does not take its arguments."""
    unknown = model.student_config.get("pipeline_call", {}).keys() - model.call_parameters.keys()
    if unknown:
        problem = f"pipeline_call in {STUDENT_CONFIG} has {', '.join(sorted(unknown))}, which {model.class_name} lacks"
        raise source.error(f"{problem}; copy the file again")


def check_components(model: Model) -> None:
    """Refuse (exit code 2) a pipeline that lacks a component, a package, or weights in the variant asked for."""
    variants = {None}
    for name in saved_components(model.index):
        source, folder = model.location(name)
        if source is model.base and source.is_folder and not Path(source.path, name).is_dir():
            raise source.error(f"lacks {name}, which its model_index.json names; copy it")
        if not (name == model.network and model.state_dict):
            variants.add(check_weights(source, folder))
    check_processors(model.base, model.index)
    variant = model.source.variant
    if variant not in variants:
        problem = f"{model.base.path} holds no weights *.{variant}.safetensors; drop --variant"
        raise UserError(f"--variant {variant}: {problem}", exit_code=2)


def check_attention(model: Model, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse (exit code 2) an --attention_backend that the model's network cannot have here."""
    flag = f"--attention_backend {name}"
    if model.network is None:
        raise UserError(f"{flag}: {model.class_name} has neither transformer nor unet; drop it", exit_code=2)
    config = model.config(model.network)
    with init_empty_weights():
        network = getattr(diffusers, config.get("_class_name", model.index[model.network][1])).from_config(config)
    check_attention_backend(flag, name, network, device, dtype, backward=False)


def hash_model(model: Model) -> str:
    """Hash weights, configurations and student_config to 12 hex digits, which differ between models.

    Of a file, its size and 64 blocks are hashed; of a component on the Hub, its commit.
    """
    settings = [model.student_config, model.scheduler_changes, model.state_dict_config, model.base.variant]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    files = [file for file in (model.state_dict, model.adapter) if file is not None]
    for name in saved_components(model.index):
        source, folder = model.location(name)
        if source.is_folder:
            files += [Path(source.path, folder, file) for file in sorted(source.files(folder))]
        else:
            digest.update(f"{name} {source.path} {source.commit} {folder}".encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.parent.name}/{file.name} {size}".encode())
        with open(file, "rb") as stream:
            for position in range(0, size, max(4096, size // 64)):
                stream.seek(position)
                digest.update(stream.read(4096))
    return digest.hexdigest()[:12]


def pixel_multiple(model: Model) -> int:
    """Return what divides height and width: as in senseflow.json, else the VAE's factor times the network's patch."""
    if "pixel_multiple" in model.student_config:
        return model.student_config["pixel_multiple"]
    vae, network = model.config("vae"), model.config("transformer") or model.config("unet")
    try:
        scale, channels = vae_scale_of(vae), latent_shape_of(vae, (0, 0))[0]
    except KeyError:  # no VAE, or one that no script here trains with
        scale, channels = 1, network.get("in_channels", 1)
    # FLUX and its like fold 2 x 2 latents into channels before the network, whose own patch_size does not count then.
    packed = math.isqrt(network.get("in_channels", 1) // channels)
    patch = network.get("patch_size") or network.get("all_patch_size") or 1
    return scale * (packed if packed > 1 else max(patch) if isinstance(patch, list) else patch)


def load_model_pipeline(
    model: Model,
    sampler: Optional[str],
    device: torch.device,
    dtype: torch.dtype,
    attention_backend: Optional[str] = None,
) -> DiffusionPipeline:
    """Load the whole pipeline onto a device. UserError (1) for missing or damaged weights.

    Args:
        attention_backend: of the network, which `check_attention` has let pass; None: torch's choice.
    """
    components = {name: load_component(model, name, dtype) for name in model.replaced}
    if model.adapter is not None:
        # The fingerprint of the base rounds weights to bfloat16, which is not the same after rounding to float16.
        exact = torch.float32 if dtype == torch.float16 else dtype
        components[model.network] = load_component(model, model.network, exact)
    pipeline = load_pipeline(model.base, model.pipeline_class, dtype=dtype, **components)
    if model.adapter is not None:
        prepare_adapter_base(model, pipeline, device, dtype)
        load_adapter(model, getattr(pipeline, model.network))
    if attention_backend is not None:
        set_attention_backend(getattr(pipeline, model.network), attention_backend)
    try:
        pipeline.to(device)
    except torch.OutOfMemoryError as error:
        problem = "too small for this pipeline; give --dtype bf16 or another device"
        raise UserError(f"--device {device}: {problem}") from error
    changes = dict(model.scheduler_changes)
    cls = getattr(diffusers, changes.pop("_class_name", ""), type(pipeline.scheduler))
    if cls is FlowMatchEulerDiscreteScheduler:
        changes["stochastic_sampling"] = sampler == "stochastic"
    if changes:  # as keywords: from_config ignores changes to values that are defaults in the configuration
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_component(model: Model, name: str, dtype: torch.dtype):
    """Load one component, of the class in its own configuration or else in the base's model_index.json."""
    library, class_name = model.index[name]
    class_name = model.config(name).get("_class_name", class_name)
    cls = getattr(diffusers if library == "diffusers" else transformers, class_name)
    if name == model.network and model.state_dict is not None:
        return load_state_dict(model, cls, dtype)
    source, folder = model.location(name)
    if issubclass(cls, torch.nn.Module):
        return load_network(source, cls, folder, dtype=dtype)
    with source.loading():
        return source.load(cls.from_pretrained, subfolder=folder)


def read_state_dict(source: ModelSource) -> dict[str, torch.Tensor]:
    """Read the state dict of --checkpoint onto the CPU, without WRAPPERS in names. UserError (1) if it holds none."""
    with source.loading():
        if source.path.endswith(".safetensors"):
            state = load_file(source.path)
        else:
            try:
                # If possible mapped instead of read: a network in float32 may be larger than the memory.
                mmap = zipfile.is_zipfile(source.path)
                state = torch.load(source.path, map_location="cpu", weights_only=True, mmap=mmap)
            except pickle.UnpicklingError as error:
                problem = "damaged, or holds more than tensors; save the state dict alone"
                raise source.error(problem, exit_code=1) from error
    if isinstance(state, dict):
        state = next((state[key] for key in ("model", "ema_model") if key in state), state)
    if not isinstance(state, dict) or not state or not all(torch.is_tensor(tensor) for tensor in state.values()):
        problem = "holds no state dict under model, under ema_model or by itself; save one"
        raise source.error(problem, exit_code=1)
    return {".".join(part for part in name.split(".") if part not in WRAPPERS): state[name] for name in state}


def load_state_dict(model: Model, cls: type, dtype: torch.dtype) -> torch.nn.Module:
    """Make the network with the weights of --checkpoint. UserError (1) if names or shapes are not the network's."""
    source = ModelSource("--checkpoint", str(model.state_dict))
    state, config = read_state_dict(source), model.config(model.network)
    # A FLUX student has no embedder, its teacher has.
    if "guidance_embeds" in config and model.state_dict_config is None:
        config["guidance_embeds"] = any("guidance_embedder" in name for name in state)
    with init_empty_weights(include_buffers=False):
        network = cls.from_config(config)
    problems = state_dict_problems(network.state_dict(), state)
    if problems:
        fix = f"give the --model that it was distilled from, or --{model.network}_config"
        raise source.error(f"not the weights of this {cls.__name__}: {problems}; {fix}", exit_code=1)
    for name, tensor in state.items():  # one by one, so that the memory holds only one of them twice
        state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    network.load_state_dict(state, assign=True)
    return network.eval()


def prepare_adapter_base(model: Model, pipeline: DiffusionPipeline, device: torch.device, dtype: torch.dtype) -> None:
    """Turn the pipeline's network into what the adapter was trained over: --teacher_lora fused, quantized.

    UserError (1) if its fingerprint is another than in training.
    """
    network, config, teacher = getattr(pipeline, model.network), model.student_config, model.base.path
    lora, scale = config.get("teacher_lora"), config.get("teacher_lora_scale", 1.0)
    quantization, base_fingerprint = config.get("base_quantization"), fingerprint(network)
    if lora is not None:
        teacher += f" with {lora}"
        lora = ModelSource(f"{model.source}: the LoRA of its teacher,", lora)
        base_fingerprint += f" with {lora_fingerprint(lora, scale)}"
    if quantization in BACKENDS:
        base_fingerprint += f" in {quantization}"
    if base_fingerprint != config.get("teacher_fingerprint"):
        at = f" at {model.base.revision}" if model.base.revision else ""
        problem = f"its adapter was trained over other weights than those of {teacher}{at}; restore these"
        raise model.source.error(problem, exit_code=1)
    if network.dtype != dtype:
        network.to(dtype)
    if lora is not None:
        fuse_lora(lora, pipeline, scale)
    if quantization in BACKENDS:
        quantize_network(network, quantization, device)


def load_adapter(model: Model, network: torch.nn.Module) -> None:
    """Add the adapter to the network. UserError (1) if it is damaged or for other layers."""
    with model.source.loading():
        weights, alpha = read_adapter(model.adapter, network)
        network.load_lora_adapter(weights, prefix=None, adapter_name=ADAPTER)
        loaded = {stored_name(name) for name, _ in network.named_parameters() if ".lora_" in name}
        if loaded != weights.keys():
            raise ValueError(f"{model.adapter.name} has layers that this network lacks")
    found = (network.peft_config[ADAPTER].r, network.peft_config[ADAPTER].r if alpha is None else alpha)
    expected = (model.student_config["rank"], model.student_config["lora_alpha"])
    if found != expected:
        problem = "{} has rank {} and alpha {:g}, {} {} and {:g}".format(FILE, *found, STUDENT_CONFIG, *expected)
        raise model.source.error(f"{problem}; copy both again", exit_code=1)
