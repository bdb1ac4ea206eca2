# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Arguments and errors: what a user can get wrong becomes one line and an exit code, wherever possible before a weight loads."""

import argparse
import math
import os
from typing import Sequence

import torch
from accelerate.utils import LoggerType
from diffusers.optimization import SchedulerType

from senseflow.errors import UserError, require_package


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind is not SchedulerType.PIECEWISE_CONSTANT]


def check_xformers(flag: str) -> None:
    """Refuses (exit code 2) xformers where its attention does not run: not installed, no GPU, or built for another torch."""
    require_package("xformers", flag)
    if not torch.cuda.is_available():
        raise UserError(f"{flag} needs a CUDA GPU: drop the flag", exit_code=2)
    from xformers.ops import memory_efficient_attention

    query = torch.zeros(1, 8, 1, 64, device=f"cuda:{os.environ.get('LOCAL_RANK', 0)}", dtype=torch.float16)
    try:
        memory_efficient_attention(query, query, query)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(":. ")
        fix = f"install its build for torch {torch.__version__}, or drop the flag"
        raise UserError(f"{flag}: xformers' attention does not run here ({reason}); {fix}", exit_code=2) from error


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
class HelpFormatter(argparse.HelpFormatter):
    """Shows a default only where there is one worth showing."""

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        shown = (
            " ".join(f"{value:g}" for value in action.default) if isinstance(action.default, list) else action.default
        )
        return f"{action.help} [{shown}]".replace("%", "%%")


class Arguments(argparse.Namespace):
    """Parsed arguments, and in `given` the names of those that stood on the command line, which vars() does not show."""

    __slots__ = ("given",)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad argument in one line, as everything else here does, and knows what was given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_args(self, argv=None) -> Arguments:
        args, absent = super().parse_args(argv, Arguments()), []  # a list, as action="extend" adds to one
        names = [action.dest for action in self._actions]
        without_defaults = super().parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
        args.given = frozenset(name for name in names if getattr(without_defaults, name) is not absent)
        return args

    def error(self, message):
        raise UserError(f"{message} (see --help)", exit_code=2)


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
        choices=("none", "8bit", "4bit"),
        help="hold the teacher's linear layers, which student and fake score share, in 8 bits or in 4 (nf4); needs bitsandbytes",
    )


def fill_in(args, values: dict):
    """Gives the flags that were not given (None) the values by their names; returns `args`."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# Of student, fake score and discriminator with --rank, in units of the rate of full fine-tuning; demo/README.md.
LORA_RATES = (7, 5, 1)


def complete_args(args):
    """Fills in what one flag takes from another; guidance scales become [MIN, MAX]. UserError (exit code 2) for more than two."""
    for name in ("dmd_guidance_scale", "isg_guidance_scale"):
        values = getattr(args, name)
        if values is not None:
            if len(values) > 2:
                raise UserError(f"--{name} {values}: give one value, or MIN MAX", exit_code=2)
            setattr(args, name, [values[0], values[-1]])
    student, fake_score, discriminator = LORA_RATES if args.rank else (1, 1, 1)
    if "learning_rate" not in args.given:
        args.learning_rate *= student
    if args.learning_rate_fake is None:
        args.learning_rate_fake = args.learning_rate * fake_score / student
    if args.learning_rate_disc is None:
        args.learning_rate_disc = args.learning_rate * discriminator / student
    return args


def check_common_args(args, unused: Sequence[tuple] = ()) -> None:
    """What every script's arguments must satisfy; UserError (exit code 2) for the first that does not.

    Args:
        unused: of the script's own, as UNUSED is, and looked at before it.
    """

    def refuse(name: str, fix: str):
        raise UserError(f"--{name} {getattr(args, name)}: {fix}", exit_code=2)

    for name, value in vars(args).items():
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            refuse(name, "must be a finite number")
    for name in (
        "resolution", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "ttur_ratio", "checkpointing_steps",
        "checkpoints_total_limit", "validation_steps", "num_validation_images", "teacher_num_inference_steps",
        "max_sequence_length", "max_train_samples",
    ):  # fmt: skip
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            refuse(name, "must be 1 or more")
    for name in (
        "gan_weight", "isg_weight", "isg_margin", "learning_rate", "learning_rate_fake", "learning_rate_disc", "lr_warmup_steps",
        "adam_epsilon", "adam_weight_decay", "student_guidance_scale", "teacher_guidance_scale", "classifier_weight",
        "dataloader_num_workers", "seed", "rank",
    ):  # fmt: skip
        if getattr(args, name, 0) < 0:
            refuse(name, "must not be negative")
    for name in ("ida_decay", "backward_simulation_prob", "lr_warmup_start_factor"):
        if not 0 <= getattr(args, name) <= 1:
            refuse(name, "must lie in [0, 1]")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(args, name) < 1:
            refuse(name, "must lie in [0, 1)")
    if args.lora_alpha is not None and args.lora_alpha <= 0:
        refuse("lora_alpha", "must be above 0")
    if args.max_grad_norm <= 0:
        refuse("max_grad_norm", "must be above 0; a large number clips nothing")
    if args.seed >= 2**32:
        refuse("seed", "must be below 2**32")
    if (
        args.lr_scheduler == "polynomial"
        and min(args.learning_rate, args.learning_rate_fake, args.learning_rate_disc) <= 1e-7
    ):
        refuse("lr_scheduler", "decays to 1e-7, which is not below every learning rate; choose another")
    for name in ("dmd_guidance_scale", "isg_guidance_scale"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"--{name} {low:g} {high:g}: MIN is above MAX; swap them", exit_code=2)
        if low < 0:
            raise UserError(f"--{name} {low:g} {high:g}: must not be negative", exit_code=2)
    if args.anchors is not None:
        shown = " ".join(f"{t:g}" for t in args.anchors)
        if not all(0 < t <= 1000 for t in args.anchors):
            raise UserError(f"--anchors {shown}: timesteps must lie in (0, 1000]", exit_code=2)
        if any(a <= b for a, b in zip(args.anchors, args.anchors[1:])):
            raise UserError(f"--anchors {shown}: must decrease; sort them, largest first", exit_code=2)
    if args.dry_run is not None and args.resume_from_checkpoint:
        raise UserError(
            f"--dry_run: looks at no checkpoint; leave --resume_from_checkpoint {args.resume_from_checkpoint} out", 2
        )
    if args.mixed_precision not in (
        "no",
        "bf16",
    ):  # the default comes from accelerate's configuration, unchecked by argparse
        refuse("mixed_precision", "give no or bf16")
    if args.use_8bit_adam:
        require_package("bitsandbytes", "--use_8bit_adam")
    if getattr(args, "enable_xformers_memory_efficient_attention", False):
        check_xformers("--enable_xformers_memory_efficient_attention")
    if args.report_to != "none":
        if args.report_to not in [tracker.value for tracker in LoggerType if tracker is not LoggerType.ALL]:
            refuse("report_to", "is no tracker of accelerate; give tensorboard, wandb, ... or none")
        require_package(args.report_to, f"--report_to {args.report_to}")
    refuse_unused(args, (*unused, *INACTIVE_FLAGS))


def refuse_unused(args, table: Sequence[tuple]) -> None:
    """Refuses (exit code 2) the first flag that was given and would change nothing; `table` as UNUSED."""
    for is_off, where, names in table:
        for name in names:
            if name in args.given and is_off(args):
                value = getattr(args, name)
                values = value if isinstance(value, list) else [value] * (value is not True)
                shown = " ".join(f"{number:g}" if isinstance(number, float) else str(number) for number in values)
                raise UserError(f"{f'--{name} {shown}'.strip()}: {where} has no use for it; leave it out", exit_code=2)


# (whether something is off, how a message names that, the flags that then change nothing)
INACTIVE_FLAGS = (
    (lambda args: args.rank == 0, "a run without --rank", ("lora_alpha", "lora_layers", "teacher_lora", "base_quantization")),
    (lambda args: args.teacher_lora is None, "a run without --teacher_lora", ("teacher_lora_scale",)),
    (lambda args: args.gan_weight == 0, "--gan_weight 0",
     ("learning_rate_disc", "discriminator_backbone", "discriminator_layers", "discriminator_resolution",
      "discriminator_text_encoder", "classifier_weight")),
    (lambda args: args.isg_weight == 0, "--isg_weight 0", ("isg_margin", "isg_guidance_scale")),
    (lambda args: args.lr_scheduler == "constant" and args.lr_warmup_steps > 0, "--lr_scheduler constant",
     ("lr_warmup_steps", "lr_warmup_start_factor")),
    (lambda args: args.lr_warmup_steps == 0, "--lr_warmup_steps 0", ("lr_warmup_start_factor",)),
    (lambda args: not args.validation_prompts, "a run without --validation_prompts",
     ("validation_steps", "num_validation_images", "teacher_num_inference_steps", "teacher_guidance_scale")),
    (lambda args: args.report_to == "none", "--report_to none", ("logging_dir",)),
    (lambda args: not (args.dataset_name or args.train_data_dir), "a data set without columns", ("image_column", "caption_column")),
    (lambda args: args.gan_weight == 0 and args.backward_simulation_prob == 1, "a run that looks at no image",
     ("image_column", "center_crop", "random_flip")),
    (lambda args: args.gan_weight == 0 and not args.validation_prompts and (args.backward_simulation_prob == 1
     or args.dataset_lmdb), "a run without a VAE", ("vae_dtype",)),
)  # fmt: skip
