# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The networks of a run, and the methods by which the training loop calls them; a script's subclass adds its own."""

import copy
import inspect
import math
import os
from typing import Any, Callable, Optional, Sequence

import torch
from accelerate import init_empty_weights
from accelerate.logging import get_logger
from torch.utils.checkpoint import checkpoint

from senseflow.arguments import apply_preset, check_common_args, complete_args, sizes_by_flag
from senseflow.errors import UserError
from senseflow.models.attention import check_attention_backend, set_attention_backend
from senseflow.models.discriminator import check_discriminator_args
from senseflow.models.hub import (
    ModelSource,
    check_compatible,
    check_pipeline,
    load_pipeline,
    student_source,
)
from senseflow.models.lora import adapted_copies, adapter_settings, check_lora_args, fuse_or_quantize
from senseflow.models.prompt_cache import check_cache_dir
from senseflow.models.text_encoders import place_text_encoders
from senseflow.models.vae import decode, encode, latent_shape_of, load_vae, repack
from senseflow.models.weights import fingerprint, from_pretrained_meta, materialize
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow_utils import Guidance, Prediction, Schedule, StatelessRNG, guide


logger = get_logger(__name__)

MAX_AREA_CHANGE = 0.1  # between --resolution and others, for a teacher whose noise levels depend on the size
LOWEST_DEFAULT_ANCHOR = 50  # a timestep; below it next to nothing is left to generate


class TrainingModels:
    """Hold the networks of a run, and define how the training loop calls them.

    A subclass sets the class attributes, and defines `make_schedule`, `pixel_multiple`, `encode_prompts`,
    `network_output` and `omega`; it overrides what else is different for its teacher.

    A condition is what prompts are encoded to: a tuple of tensors (B, ...) whose shapes, B apart, stay the same
    throughout a run. Text of variable length is padded, with a mask (senseflow.models.text_encoders.pad_condition).

    Args:
        args: the parsed command line.
        source: where the teacher's pipeline is.
        schedule: the first result of `make_schedule`.
        runtime: the processes and devices of the run.
    Attributes:
        student, teacher, fake_score: the roles; None until `make_models` of the script has made them.
        discriminator: the role; None with --gan_weight 0, and under DMD2.
        vision_features, text_features: the discriminator's frozen DINOv2 and CLIP; None if it is None. The CLIP is
            None, too, and `text_fingerprint` is its fingerprint, once prompts are encoded and it is freed.
        read_prompts: reads {"condition": ..., "text_features": ...} of a batch's prompts, in host memory; None if they
            are encoded in the loop (senseflow.training.prompts).
        further_roles: frozen roles of `further_networks`, by name.
        empty_condition: condition (1, ...) of the unconditional prompt; None if the teacher is never called with it.
        pipeline: the teacher's diffusers pipeline, with its text encoders.
        network: the teacher's network, on the meta device until its role is made.
        vae: the frozen VAE; None if the run needs none.
        vae_config: of the teacher's VAE.
        latent_shape: (C, H, W) of one x0 at --resolution.
        extra_components: components of the saved pipeline that are not the teacher's, besides student and scheduler.
    """

    parse_args: Callable  # parse_args(argv) -> the script's command line
    presets: dict[str, dict] = {}  # defaults of flags that depend on the teacher, by the name of `preset_name`
    inactive_flags: Sequence[tuple] = ()  # of the script alone, in the form of senseflow.arguments.INACTIVE_FLAGS
    pipeline_class: type
    network_class: type
    vae_class: type
    network_name = "transformer"  # the pipeline's component that is distilled
    further_networks: Sequence[str] = ()  # components of network_class that only a guided teacher's call runs
    unconditional_prompt: Optional[str] = ""  # what a guided teacher is called with beside the prompt; None: no text
    pipeline_entries: Sequence[str] = ()  # entries of model_index.json, besides components, that the methods read
    vae_auto_dtype = "fp32"  # what --vae_dtype auto means with --mixed_precision bf16, as in the teacher's release
    compatible_config: Sequence[str] = ()  # entries of the network's configuration in which student and teacher agree
    recipe_batch_size: Optional[int] = None  # images per iteration for which the script's defaults were made
    method = "SenseFlow (arXiv 2506.00523)"  # for the model card
    kohya_names = False  # whether an exported adapter has kohya's tensor names, which other programs look for
    comfyui_shift: Optional[float] = None  # the shift of noise levels by which ComfyUI loads this teacher, if tried
    vision_features = text_features = text_fingerprint = None
    read_prompts: Optional[Callable[[Sequence[str]], dict[str, Any]]] = None

    def __init__(self, args, source: ModelSource, schedule: Schedule, runtime: Runtime):
        self.args, self.source, self.schedule, self.device = args, source, schedule, runtime.device
        self.student = self.teacher = self.fake_score = self.discriminator = None
        self.extra_components: dict[str, Any] = {}
        dtype, vae_source = runtime.weight_dtype, self.vae_source(args, source)
        self.network = from_pretrained_meta(source, self.network_class, self.network_name, dtype=dtype)
        encodes, decodes = self.uses_vae(args)
        self.vae = load_vae(vae_source, self.vae_class, args, self.device, encodes, decodes, self.vae_auto_dtype)
        if decodes:  # the encoder sees another number of images in every iteration
            runtime.compile(self.vae.decoder)
        further = {
            name: from_pretrained_meta(source, self.network_class, name, dtype=dtype) for name in self.further_networks
        }
        self.further_fingerprints = {name: fingerprint(network) for name, network in further.items()}
        self.further_roles = {name: runtime.frozen_role(name, network) for name, network in further.items()}
        components = {self.network_name: self.network, "vae": self.vae, **further}
        self.pipeline = load_pipeline(source, self.pipeline_class, dtype=dtype, **components)
        changed_teacher = fuse_or_quantize(args, self.pipeline, self.network_name, self.device)
        self.teacher_fingerprint = changed_teacher or fingerprint(self.network)
        place_text_encoders(args, self.pipeline, self.device)
        self.vae_config = source.config(self.vae_class, "vae")
        self.latent_shape = latent_shape_of(self.vae_config, args.resolution)
        self.empty_condition = self.encode_prompts([self.unconditional_prompt]) if self.calls_twice() else None

    # -----------------------------------------------------------------------------------------------------------------
    # What a subclass defines
    # -----------------------------------------------------------------------------------------------------------------
    @classmethod
    def make_schedule(cls, args, source: ModelSource, device) -> tuple[Schedule, Any, dict]:
        """Return (schedule to train on, scheduler to save, arguments of the stock call); no weights load.

        The stock call is a plain call of the pipeline with the student. With the saved scheduler and these arguments
        it visits the anchors of the schedule.
        """
        raise NotImplementedError

    def network_output(self, role: Role, x_t: torch.Tensor, t: torch.Tensor, condition: tuple) -> torch.Tensor:
        """Call the network of a role as the stock pipeline calls it. Return its output (B, C, H, W), not guided.

        Args:
            x_t: latents (B, C, H, W), float32.
            t: timesteps (B,).
            condition: of `encode_prompts`.
        """
        raise NotImplementedError

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Encode B prompts to a condition, without gradient."""
        raise NotImplementedError

    def omega(self, t: torch.Tensor) -> torch.Tensor:
        """Return the weight (B,) of the adversarial losses at timesteps t (B,)."""
        raise NotImplementedError

    @classmethod
    def pixel_multiple(cls, source: ModelSource) -> int:
        """Return what height and width in pixels must be divisible by."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # What a subclass may override
    # -----------------------------------------------------------------------------------------------------------------
    @classmethod
    def preset_name(cls, args, source: ModelSource) -> str:
        """Return the name of the preset that --preset names, or that fits the teacher."""
        raise NotImplementedError

    @classmethod
    def check_args(cls, args, source: ModelSource) -> None:
        """Refuse (UserError, exit code 2) arguments that do not fit each other or the teacher; no weights load."""
        check_common_args(args, cls.inactive_flags)
        check_cache_dir(args)
        check_models(args, source, cls)
        if args.gan_weight > 0:
            cls.check_adversarial_args(args, source)

    @classmethod
    def check_adversarial_args(cls, args, source: ModelSource) -> None:
        """Refuse (UserError, exit code 2) a discriminator that cannot be made, with --gan_weight above 0."""
        check_discriminator_args(args)

    def predict(
        self, role: Role, x_t: torch.Tensor, t: torch.Tensor, condition: tuple, guidance: Optional[Guidance] = None
    ) -> Prediction:
        """Predict (x0, noise) with the network of a role at x_t (B, C, H, W) and t (B,).

        Args:
            condition: of `encode_prompts`.
            guidance: for the teacher alone. If no scale can be above 1, the unconditional pass is left out.
        """
        if guidance is None or not guidance.above_one:
            output = self.network_output(role, x_t, t, condition)
        else:
            pairs = zip(self.empty_condition, condition)
            both = tuple(torch.cat([empty.expand_as(tensor), tensor]) for empty, tensor in pairs)
            output = self.network_output(role, torch.cat([x_t, x_t]), torch.cat([t, t]), both)
            output = self.guide(*output.float().chunk(2), guidance.scale)
        return self.schedule.as_prediction(x_t, output, t)

    def calls_twice(self) -> bool:
        """Return whether a guided teacher is called with the unconditional prompt, too."""
        return max_guidance(self.args) > 1

    def guide(self, unconditional: torch.Tensor, conditional: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Combine two outputs (B, C, H, W) of the teacher at the scales (B,) as the stock pipeline does."""
        return guide(unconditional, conditional, scale)

    def teacher_pipeline_kwargs(self) -> dict[str, Any]:
        """Return what differs from the student's stock call when the teacher generates validation images."""
        steps, guidance = self.args.teacher_num_inference_steps, self.args.teacher_guidance_scale
        return {"num_inference_steps": steps, "guidance_scale": guidance, "sigmas": None}

    @staticmethod
    def vae_source(args, source: ModelSource) -> ModelSource:
        """Return where the VAE is."""
        return source

    def uses_vae(self, args) -> tuple[bool, bool]:
        """Return whether the run encodes images, and whether it decodes latents."""
        encodes = args.backward_simulation_prob < 1 and not args.dataset_lmdb
        return encodes, args.gan_weight > 0 or bool(args.validation_prompts)

    def fold(self, latents: torch.Tensor) -> torch.Tensor:
        """Fold the VAE's latents (B, C, H, W) into the channels of x0, before they are standardized."""
        return repack(self.pipeline_class, self.vae, latents, "_patchify_latents")

    def unfold(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo `fold`."""
        return repack(self.pipeline_class, self.vae, latents, "_unpatchify_latents")

    def make_student(self) -> torch.nn.Module:
        """Return what student and fake score start as, in float32, on the meta device; not called with --rank."""
        source = student_source(self.args, self.source)
        return from_pretrained_meta(source, self.network_class, self.network_name)

    @staticmethod
    def unused_weights(config: dict) -> Sequence[str]:
        """Return how the names of weights begin that no output of a network depends on; these are not trained."""
        return ()

    def lora_base(self) -> Optional[tuple[str, str]]:
        """Return architecture and version of the teacher as kohya's sd-scripts name them, for other programs."""
        return None

    def comfyui_guidance(self) -> dict[str, str]:
        """Return further {setting: value} of ComfyUI, for the model card."""
        return {}

    def encoding_settings(self) -> dict[str, Any]:
        """Return the flags on which `encode_prompts` depends, in JSON's types: part of the keys of --cache_dir."""
        return {"max_sequence_length": getattr(self.args, "max_sequence_length", None)}

    def fingerprints(self) -> dict[str, Any]:
        """Return what must be the same on resume: frozen networks, adapters, the class of the optimizer."""
        fingerprints = {"teacher": self.teacher_fingerprint, "optimizer": type(self.student.optimizer).__name__}
        fingerprints |= self.further_fingerprints | adapter_settings(self.student.module)
        if self.discriminator is not None:
            vision = self.vision_features
            fingerprints["discriminator_backbone"] = f"{fingerprint(vision)} {vision.layers}"
            fingerprints["discriminator_resolution"] = vision.resolution
            fingerprints["discriminator_text_encoder"] = self.text_fingerprint or fingerprint(self.text_features)
        return fingerprints

    # -----------------------------------------------------------------------------------------------------------------
    # What is the same for all teachers
    # -----------------------------------------------------------------------------------------------------------------
    def student_and_fake_score(self) -> tuple[torch.nn.Module, torch.nn.Module]:
        """Return the two networks to train, which start equal: with --rank two adapters over the teacher's weights."""
        if self.args.rank:
            student, fake_score = adapted_copies(materialize(self.network, self.device), self.args)
        else:
            student = self.make_student()
            fake_score = copy.deepcopy(student)
        if self.args.attention_backend:
            further = (role.module for role in self.further_roles.values())
            for network in (self.network, *further, student, fake_score):
                set_attention_backend(network, self.args.attention_backend)
        for network in (student, fake_score):  # DDP waits for the gradient of each trained weight
            unused = tuple(self.unused_weights(network.config))
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and not name.startswith(unused))
        if self.args.gradient_checkpointing:
            for network, interval in zip((student, fake_score), self.args.gradient_checkpointing_interval):
                checkpoint_blocks(network, interval)
        return student, fake_score

    def log_recipe(self, global_batch_size: int) -> None:
        """Log preset, anchors and global batch, and whether the script's defaults were made for another batch."""
        if self.presets:
            preset = self.preset_name(self.args, self.source)
            values = ", ".join(f"{name} {getattr(self.args, name)}" for name in self.presets[preset])
            logger.info(f"preset {preset}: {values}")
        anchors, recipe = ", ".join(f"{t:.1f}" for t in self.schedule.anchors), self.recipe_batch_size
        line = f"anchors {anchors}; a global batch of {global_batch_size}"
        if recipe not in (None, global_batch_size):
            each = global_batch_size // self.args.gradient_accumulation_steps
            fix = "choose --learning_rate and --max_train_steps for it"
            if recipe % each == 0:
                fix = f"give --gradient_accumulation_steps {recipe // each}, or {fix}"
            line += f", and the defaults are for {recipe}: {fix}"
        logger.info(line)

    def condition(self, batch: dict) -> tuple[torch.Tensor, ...]:
        """Return the condition of a batch's prompts: what `read_prompts` has added to the batch, or encoded here."""
        return batch["condition"] if "condition" in batch else self.encode_prompts(batch["prompts"])

    def encode_for_discriminator(self, prompts: Sequence[str]) -> tuple[torch.Tensor]:
        """Encode B prompts to the discriminator's features (B, T)."""
        return (self.text_features(prompts),)

    def discriminator_text(self, batch: dict) -> torch.Tensor:
        """Return the discriminator's features (B, T) of a batch's prompts, as `condition` does."""
        return batch["text_features"] if "text_features" in batch else self.text_features(batch["prompts"])

    def x0_shape(self, batch: dict) -> tuple[int, int, int]:
        """Return (C, H, W) of one x0 of a batch."""
        return latent_shape_of(self.vae_config, batch["size"])

    def real_latents(self, batch: dict, rows: torch.Tensor, rng: StatelessRNG) -> torch.Tensor:
        """Return x0 (R, C, H, W) of these R rows of a batch, float32: its latents, or its images encoded."""
        if "latents" in batch:
            return batch["latents"][rows]
        sample_indices = [batch["sample_indices"][row] for row in rows.tolist()]
        return encode(self.vae, batch["pixel_values"][rows], rng, sample_indices, self.fold)

    def real_images(self, batch: dict) -> torch.Tensor:
        """Return the images (B, 3, H, W) of a batch in [-1, 1]; decoded if the data set holds latents."""
        return self.decode(batch["latents"]) if "latents" in batch else batch["pixel_values"]

    def decode(self, x0: torch.Tensor) -> torch.Tensor:
        """Decode x0 (B, C, H, W) to images (B, 3, H, W), about in [-1, 1], float32, with gradient."""
        return decode(self.vae, x0, self.unfold)


def checkpoint_blocks(network: torch.nn.Module, interval: int) -> None:
    """Recompute the first of every `interval` blocks of a network of diffusers in the backward pass; none for 0.

    Blocks are what the network hands to its checkpointing function, in the order of the first forward with gradient.
    """
    numbers: dict[int, int] = {}  # by identity, so that every later forward recomputes the same blocks

    def run(block, *args):
        number = numbers.setdefault(id(getattr(block, "__self__", block)), len(numbers))  # a module or its __call__
        return checkpoint(block, *args, use_reentrant=False) if number % interval == 0 else block(*args)

    if interval > 0:
        network.enable_gradient_checkpointing(run)


# ---------------------------------------------------------------------------------------------------------------------
# Before any weights load
# ---------------------------------------------------------------------------------------------------------------------
def resolve_teacher(args, cls: type[TrainingModels]) -> ModelSource:
    """Complete the arguments and return the teacher's source at one commit.

    Raises:
        UserError: exit code 2; the teacher is missing or another pipeline.
    """
    path = args.pretrained_model_name_or_path
    source = ModelSource("--pretrained_model_name_or_path", path, args.revision, args.variant)
    source = check_pipeline(source, cls.pipeline_class, cls.pipeline_entries)
    if cls.presets:
        apply_preset(args, cls.presets[cls.preset_name(args, source)])
    complete_args(args)
    return source


def check_models(args, source: ModelSource, cls: type[TrainingModels]) -> None:
    """Refuse (UserError, exit code 2) a teacher of more than text, and flags that do not fit it.

    These are flags of adapters, start, resolution and anchors.
    """
    config = source.config(cls.network_class, cls.network_name)
    channels = latent_shape_of(source.config(cls.vae_class, "vae"), args.resolution)[0]
    taken = config.get("in_channels") or channels
    if channels * math.isqrt(taken // channels) ** 2 != taken:  # networks may fold squares of latents into channels
        problem = f"takes {taken} channels for latents of {channels}, as for inpainting or control images"
        raise source.error(f"its {cls.network_name} {problem}; give a text-to-image teacher")
    check_lora_args(args, cls.pipeline_class, cls.network_name, cls.network_class, config)
    if args.student_model_name_or_path and not args.rank:
        start = student_source(args, source)
        check_compatible(start, cls.network_class, cls.network_name, config, cls.compatible_config)
    if args.attention_backend:
        check_attention(args, cls, config)
    check_sizes(args, source, cls)
    schedule, _, pipeline_kwargs = cls.make_schedule(args, source, "cpu")
    check_anchors(args, schedule, pipeline_kwargs.keys() - inspect.signature(cls.pipeline_class.__call__).parameters)


def check_sizes(args, source: ModelSource, cls: type[TrainingModels]) -> None:
    """Refuse (UserError, exit code 2) sizes of images that the teacher does not take.

    If its noise levels depend on the size, the student is trained at those of --resolution: other sizes must be near.
    """
    multiple, area = cls.pixel_multiple(source), math.prod(args.resolution)
    scheduler = source.read_json("scheduler/scheduler_config.json") or {}
    shifts = scheduler.get("use_dynamic_shifting") and scheduler.get("base_shift") != scheduler.get("max_shift")
    for flag, size in sizes_by_flag(args).items():
        if any(side % multiple for side in size):
            raise UserError(f"{flag}: must be divisible by {multiple} for this teacher", exit_code=2)
        if shifts and abs(math.prod(size) - area) > MAX_AREA_CHANGE * area:
            tokens, wanted = math.prod(size) // multiple**2, area // multiple**2
            problem = f"has {tokens} tokens, --resolution {wanted}, and this teacher's noise levels depend on them"
            raise UserError(f"{flag}: {problem}; give sizes within {MAX_AREA_CHANGE:.0%} of that", exit_code=2)


def max_guidance(args) -> float:
    """Return the largest guidance scale at which the losses call the teacher."""
    return max([*args.dmd_guidance_scale, *(args.isg_guidance_scale if args.isg_weight > 0 else [])])


def check_anchors(args, schedule: Schedule, unknown_kwargs: set[str]) -> None:
    """Refuse (UserError, exit code 2) anchors that no stock call visits, or that leave --isg_margin no timestep.

    Default anchors are refused without ISG, too, and also if the last one is below LOWEST_DEFAULT_ANCHOR.

    Args:
        unknown_kwargs: what the stock call would need to visit them, as no scheduler does by itself, and lacks.
    """
    default, crowded = "anchors" not in args.given, schedule.check_margin(args.isg_margin)
    shown = [f"{t:.4g}" for t in schedule.anchors]
    problem, fix = None, "give --anchors, such as 1000 900 750 500"
    if unknown_kwargs:
        problem = f"the call of this teacher's pipeline has no {', '.join(sorted(unknown_kwargs))} to visit them with"
        fix = "give anchors that its scheduler visits"
    elif default and schedule.anchors[-1] < LOWEST_DEFAULT_ANCHOR:
        problem = f"{shown[-1]} is below {LOWEST_DEFAULT_ANCHOR}, where next to nothing is left to generate"
    elif crowded and (default or args.isg_weight > 0):
        problem = f"--isg_margin {args.isg_margin:g} leaves no timestep between {crowded[0]:.4g} and {crowded[1]:.4g}"
        fix = "lower it, or give --anchors further apart" if args.isg_weight > 0 else fix
    if problem:
        origin = f"--anchors {' '.join(shown)}{' (the default for this teacher)' if default else ''}"
        raise UserError(f"{origin}: {problem}; {fix}", exit_code=2)


def check_attention(args, cls: type[TrainingModels], config: dict[str, Any]) -> None:
    """Refuse (UserError, exit code 2) a kernel that the teacher's network cannot be trained with here."""
    flag = f"--attention_backend {args.attention_backend}"
    if args.enable_xformers_memory_efficient_attention:
        flag = "--enable_xformers_memory_efficient_attention"
    with init_empty_weights():
        network = cls.network_class.from_config(config)
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(gpu if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    check_attention_backend(flag, args.attention_backend, network, device, dtype, backward=True)
