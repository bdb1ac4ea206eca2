# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Define, complete and check the arguments that scripts share. Imports no torch, so that --help answers at once."""

import argparse
import logging
import math
import os
import re
import sys
from typing import Callable, Collection, Optional, Sequence

from senseflow.errors import UserError, require_package


logger = logging.getLogger(__name__)

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # names in torch
SAMPLERS = ("stochastic", "euler")  # see senseflow_utils.sampler_step
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
# Trackers of accelerate.
TRACKERS = ("aim", "tensorboard", "wandb", "trackio", "comet_ml", "mlflow", "clearml", "dvclive", "swanlab")
# Kernels that diffusers' dispatcher knows, have a backward pass and run on CUDA devices.
ATTENTION_BACKENDS = (
    "native", "_native_cudnn", "_native_efficient", "_native_flash", "_native_math", "flash", "flash_hub",
    "flash_varlen", "flash_varlen_hub", "_flash_3_hub", "_flash_3_varlen_hub", "flash_4_hub", "xformers",
)  # fmt: skip
LORA_LEARNING_RATES = (7, 5, 1)  # with --rank: student, fake score, discriminator, in units of full fine-tuning's rate


def torch_dtype(name: str):
    """Return the torch.dtype of a name in DTYPES."""
    import torch

    return getattr(torch, DTYPES[name])


def torch_device(name: Optional[str]):
    """Return the torch.device of --device; None is cuda, or cpu without a GPU. UserError (2) for an absent device."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not available here; give cpu, or a device that torch has", 2) from error


# ---------------------------------------------------------------------------------------------------------------------
# Parsing
# ---------------------------------------------------------------------------------------------------------------------
def number(cls: type, low: float = -math.inf, high: float = math.inf, exclude: str = "") -> Callable[[str], float]:
    """Make an argparse type: a finite int or float in [low, high]; `exclude` "low" or "high" excludes that end."""
    if high < math.inf:
        wanted = f"in {'(' if exclude == 'low' else '['}{low}, {high}{')' if exclude == 'high' else ']'}"
    else:
        wanted = f"above {low}" if exclude == "low" else f"{low} or more" if low > -math.inf else "finite"
    wanted = f"a whole number, {wanted}" if cls is int else wanted

    def parse(text: str):
        try:
            value = cls(text)
        except ValueError:
            value = math.nan
        excluded = (exclude == "low" and value == low) or (exclude == "high" and value == high)
        if not low <= value <= high or excluded or math.isinf(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text}")
        return value

    return parse


def file_size(text: str) -> str:
    """Check a size such as 10GB, as diffusers takes it: an argparse type."""
    if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", text, re.IGNORECASE) or not float(text[:-2]):
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 10GB, not {text}")
    return text


def image_sizes(text: str) -> list[list[int]]:
    """Parse "H,W;H,W;...", as diffusers' examples take it, to [[height, width], ...]: an argparse type."""
    found = [re.fullmatch(r"\s*([1-9]\d*)\s*,\s*([1-9]\d*)\s*", pair) for pair in text.split(";")]
    sizes = [[int(side) for side in match.groups()] for match in found if match]
    if len(sizes) < len(found) or len(set(map(tuple, sizes))) < len(sizes):
        raise argparse.ArgumentTypeError(f"must be different sizes H,W;H,W;... such as 1024,1024;832,1216, not {text}")
    return sizes


def dtype(text: str) -> str:
    """Parse fp32, bf16 or fp16, also by their long names: an argparse type."""
    return next((short for short, long in DTYPES.items() if text == long), text)


def attention_backend(text: str) -> str:
    """Check a name of ATTENTION_BACKENDS: an argparse type."""
    if text not in ATTENTION_BACKENDS:
        reason = " (sage has no backward pass)" if "sage" in text else ""
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(ATTENTION_BACKENDS)}{reason}, not {text}")
    return text


class HelpFormatter(argparse.HelpFormatter):
    """Show every default that is a value."""

    def _get_help_string(self, action):
        if action.default is False or action.default in (None, "", argparse.SUPPRESS):  # 0 is shown
            return action.help
        default = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
        return f"{action.help} (default: {shown})".replace("%", "%%")


class Arguments(argparse.Namespace):
    """Parsed arguments. `given` holds the flags of the command line, in its order; vars() does not show it."""

    __slots__ = ("given",)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports a bad argument as a UserError and keeps which flags were given."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_args(self, argv: Optional[Sequence[str]] = None) -> Arguments:
        words = sys.argv[1:] if argv is None else list(argv)
        for index, word in enumerate(words):
            try:
                word.encode()
            except UnicodeEncodeError:
                flag = next((flag for flag in reversed(words[:index]) if flag.startswith("--")), "")
                self.error(f"{flag} {ascii(word)}: is not UTF-8; rename the file or folder, or give the text in UTF-8")
        self.check_repeated(words)
        names = [action.dest for action in self._actions if action.default is not argparse.SUPPRESS]
        args = super().parse_args(argv, Arguments(**dict.fromkeys(names)))
        options = [self._option_string_actions.get(word.partition("=")[0]) for word in words]
        order = dict.fromkeys([option.dest for option in options if option] + names)
        args.given = tuple(name for name in order if getattr(args, name, None) is not None)
        for name in set(names).difference(args.given):
            setattr(args, name, self.get_default(name))
        return args

    def check_repeated(self, argv: Sequence[str]) -> None:
        """Refuse a flag that is given twice and does not collect: only the last one would count."""
        found: set[argparse.Action] = set()
        for word in argv:
            action = self._option_string_actions.get(word.partition("=")[0])
            if action in found and not isinstance(action, argparse._AppendAction):
                self.error(f"{word}: is given more than once; give it once")
            found |= {action} - {None}

    def error(self, message):
        message = re.sub(r"^argument (\S+): (must be .*), not (\S*)$", r"\1 \3: \2", message)  # flag, value, fix
        raise UserError(f"{message.removeprefix('argument ')} (see --help)", exit_code=2)


class SetToken(argparse.Action):
    """Set HF_TOKEN, which huggingface_hub reads; a token among the arguments would be logged, saved and published."""

    def __call__(self, parser, namespace, value, option_string=None):
        os.environ["HF_TOKEN"] = value


def keep_last(argv: Sequence[str], without: Collection[str] = ()) -> list[str]:
    """Drop the earlier ones of flags that a command line gives more than once, and flags of `without`, with values."""
    given: dict[str, list[str]] = {}
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            given.pop(flag, None)
        given.setdefault(flag, []).append(word)
    return [word for flag, words in given.items() if flag not in without for word in words]


# fmt: off
def add_model_arguments(parser: Parser, pipeline: str, network: str):
    """Add the flags of the teacher. Return the function that adds further flags to this group.

    Args:
        pipeline, network: names of the diffusers classes that the script trains.
    """
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", required=True, help=f"Hub id or folder of the teacher, a {pipeline}.")
    add("--revision", help="Branch, tag or commit of the teacher on the Hub. The run keeps the commit it starts with.")
    add("--variant", help="Variant of the weight files, e.g. fp16, of the teacher and of other networks that have it.")
    add("--student_model_name_or_path",
        help=f"Hub id or folder of a {network} or {pipeline} from which student and fake score start; with --rank, of "
        "an adapter of that rank.")
    return add


def add_lora_arguments(parser: Parser) -> None:
    """Add the flags of low-rank adapters."""
    add = parser.add_argument_group("low-rank adaptation").add_argument
    add("--rank", type=number(int, 0), default=0,
        help="Train adapters of this rank over one copy of the teacher's weights, instead of two whole networks; 0: "
        "full fine-tuning.")
    add("--lora_alpha", type=number(float, 0, exclude="low"),
        help="The adapter's output is scaled by alpha / rank; default: the rank.")
    add("--lora_layers", nargs="+",
        help="Layers with adapters: suffixes of layer names, or one regular expression for whole names.")
    add("--teacher_lora",
        help="With --rank: LoRA to fuse into the teacher: a .safetensors file, or a folder or Hub id that holds one.")
    add("--teacher_lora_scale", type=number(float), default=1.0, help="Scale of --teacher_lora.")
    add("--base_quantization", default="none", choices=("none", "8bit", "4bit"),
        help="With --rank: hold the linear layers of the teacher's weights, which all adapters share, in 8 bits "
        "(LLM.int8) or 4 bits (nf4). Needs bitsandbytes.")


def add_data_arguments(parser: Parser) -> None:
    """Add the flags of the data sets."""
    add = parser.add_argument_group("data (give at least one of the first five)").add_argument
    add("--dataset_json", nargs="+",
        help='JSON files {"keys": [...], "image_paths": [...], "prompts": [...]}; paths absolute or relative to the '
        "file.")
    add("--dataset_name", nargs="+", help="Hub ids or folders of data sets, as datasets.load_dataset takes them.")
    add("--train_data_dir", nargs="+",
        help="Folders of images; captions in metadata.jsonl, .csv or .parquet, or in a .txt file beside each image, "
        "one per line.")
    add("--prompts_file",
        help="Text file with one prompt per line, for runs without images: --gan_weight 0 "
        "--backward_simulation_prob 1.")
    add("--dataset_lmdb",
        help="Folder with DMD2's LMDB of VAE latents and prompts, without other data sets. Needs lmdb.")
    add("--dataset_weights", type=number(float, 0, exclude="low"), nargs="+",
        help="Shares of several data sets in the samples, in the order of the command line; need not sum to 1. By "
        "default, every row comes equally often.")
    add("--dataset_config_name", help="Configuration of --dataset_name.")
    add("--image_column", default="image", help="Name of the image column.")
    add("--caption_column", default="text",
        help="Name of the caption column, or of a field in one, such as json.caption. If a row holds a list of "
        "captions, one is picked at random.")
    add("--streaming", action="store_true", help="Read --dataset_name as a stream, without a copy on the disk.")
    add("--resolution", type=number(int, 1), nargs="+", default=[1024, 1024],
        help="Size of the training images in pixels: one side of a square, or HEIGHT WIDTH. Images are resized to "
        "cover it, then cropped.")
    add("--aspect_ratio_buckets", type=image_sizes, metavar='"H,W;H,W;..."',
        help="Sizes of the training images. An image gets the one with the nearest aspect ratio, and an iteration has "
        "images of one. --resolution is then the size of validation images and of the exported pipeline's call.")
    add("--center_crop", action="store_true", help="Crop the center instead of a random part.")
    add("--random_flip", action="store_true", help="Flip half of the images horizontally.")
    add("--max_train_samples", type=number(int, 1), help="Use only the first N rows of each data set.", metavar="N")
    add("--dataloader_num_workers", type=number(int, 0), default=0,
        help="Processes that read images, for each training process.")


def add_distribution_matching_arguments(parser: Parser, title: str):
    """Add the flags that SenseFlow shares with DMD2. Return the function that adds further flags to this group."""
    add = parser.add_argument_group(title).add_argument
    add("--anchors", type=number(float, 0, 1000, exclude="low"), nargs="+",
        help="Decreasing timesteps in (0, 1000] at which the student is run.")
    add("--ttur_ratio", type=number(int, 1), help="Iterations per update of the student (two time-scale update rule).")
    add("--dmd_guidance_scale", type=number(float, 0), nargs="+",
        help="Guidance scale of the teacher in L_DMD: one value, or MIN MAX to draw from.")
    add("--backward_simulation_prob", type=number(float, 0, 1),
        help="Probability that an iteration's input comes from the student's own first steps; otherwise real latents "
        "are noised.")
    return add


def add_senseflow_arguments(parser: Parser):
    """Add the flags of the method. Return the function that adds further flags to this group."""
    add = add_distribution_matching_arguments(parser, "senseflow")
    add("--ida_decay", type=number(float, 0, 1),
        help="IDA: after the student's step, fake <- decay * fake + (1 - decay) * student. 1 turns it off.")
    add("--isg_weight", type=number(float, 0),
        help="Weight of intra-segment guidance, a Charbonnier loss. 0 turns it off.")
    add("--isg_margin", type=number(float, 0),
        help="Distance of ISG's intermediate timestep from both ends of its segment.")
    add("--isg_guidance_scale", type=number(float, 0), nargs="+",
        help="Guidance scale of the teacher in L_ISG: one value, or MIN MAX to draw from.")
    add("--gan_weight", type=number(float, 0),
        help="Weight of the adversarial loss, which is also weighted by omega(t), see below. 0 turns it off, and no "
        "discriminator is loaded.")
    add("--discriminator_backbone", default="facebook/dinov2-large", help="Hub id or folder of a DINOv2.")
    add("--discriminator_layers", type=number(int, 0), nargs="+",
        help="Blocks of the backbone whose output the discriminator sees; default: 2 5 8 10 14 19 23 of 24 blocks, "
        "and the same relative depths for another number of blocks.")
    add("--discriminator_resolution", type=number(int, 1),
        help="Pixels to which the shorter side of images is resized for the backbone; default: not resized.")
    add("--discriminator_text_encoder", default="openai/clip-vit-large-patch14",
        help="Hub id or folder of a CLIP text encoder with projection.")
    return add


def add_optimization_arguments(parser: Parser) -> None:
    """Add the flags of batches, learning rates and optimizers."""
    add = parser.add_argument_group("optimization").add_argument
    add("--train_batch_size", type=number(int, 1), default=1, help="Images per process and micro-batch.")
    add("--gradient_accumulation_steps", type=number(int, 1), default=1, help="Micro-batches per iteration.")
    add("--max_train_steps", type=number(int, 1), help="Iterations, that is steps of the fake score.")
    add("--learning_rate", type=number(float, 0),
        help="Learning rate of the student; its default is seven times as high with --rank.")
    add("--learning_rate_fake", type=number(float, 0),
        help="Learning rate of the fake score; default: --learning_rate, or with --rank 5/7 of it.")
    add("--learning_rate_disc", type=number(float, 0),
        help="Learning rate of the discriminator; default: --learning_rate, or with --rank 1/7 of it.")
    add("--lr_scheduler", default="constant", choices=LR_SCHEDULERS, help="Learning-rate schedule, as in diffusers.")
    add("--lr_warmup_steps", type=number(int, 0), default=0, help="Warm-up in iterations.")
    add("--lr_warmup_start_factor", type=number(float, 0, 1), default=0.0,
        help="Fraction of the learning rate at which the warm-up starts.")
    add("--adam_beta1", type=number(float, 0, 1, exclude="high"), default=0.9, help="First beta of AdamW.")
    add("--adam_beta2", type=number(float, 0, 1, exclude="high"), default=0.999, help="Second beta of AdamW.")
    add("--adam_epsilon", type=number(float, 0), default=1e-8, help="Epsilon of AdamW.")
    add("--adam_weight_decay", type=number(float, 0), default=0.0, help="Weight decay of AdamW.")
    add("--max_grad_norm", type=number(float, 0, exclude="low"), default=1.0,
        help="Gradients of each network are clipped to this norm.")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="Seed of all random numbers.")


def add_precision_arguments(parser: Parser) -> None:
    """Add the flags of precision, memory and speed."""
    add = parser.add_argument_group("precision and memory").add_argument
    add("--mixed_precision", choices=["no", "bf16"], default=os.environ.get("ACCELERATE_MIXED_PRECISION", "no"),
        help="bf16: teacher and text encoders in bf16 (ours; the release's text encoders are fp32 but for FLUX's), "
        "trained networks with fp32 master weights. The default comes from accelerate's configuration.")
    add("--vae_dtype", choices=["auto", "fp32", "bf16"], default="auto",
        help="Precision of the VAE. auto: as in the release, that is fp32; for FLUX with --mixed_precision bf16, "
        "weights and encoding are bf16, and decoding computes in fp32 (with --rank in bf16, which is ours).")
    add("--gradient_checkpointing", action="store_true",
        help="Recompute activations of student, fake score, DINOv2 and VAE decoder in the backward pass.")
    add("--gradient_checkpointing_interval", type=number(int, 0), nargs="+", default=[1], metavar="N",
        help="Recompute the first of every N blocks of student and fake score only: less time, more memory. Two "
        "values: for the student, and for the fake score. 0: none. Implies --gradient_checkpointing.")
    add("--bf16_weight_copies", action="store_true",
        help="With --mixed_precision bf16: keep a bf16 copy of the weights of student and fake score, two bytes a "
        "weight, instead of casting them in every pass. Adapters have one in any case.")
    add("--cache_dir", metavar="DIR",
        help="Encode every prompt of the data set once, before training, keep the results in this folder for later "
        "runs, too, and free the text encoders.")
    add("--offload_text_encoders", action="store_true",
        help="Keep the text encoders on the CPU. If the data set has at most 1,000 prompts, they are encoded once and "
        "the encoders are freed; with more, give --cache_dir.")
    add("--use_8bit_adam", action="store_true", help="Use 8-bit AdamW. Needs bitsandbytes.")
    add("--allow_tf32", action="store_true",
        help="Allow TF32 for matrix products on Ampere and later GPUs, as the release does.")
    add("--attention_backend", type=attention_backend, metavar="NAME",
        help="Attention kernel of student, fake score and teacher, by diffusers' name; default: torch's choice, but "
        "not cuDNN's kernel. native: the same. _native_flash, _native_efficient, _native_math, _native_cudnn: one of "
        "torch's. With cuDNN's, gradients are not finite at some shapes (pytorch#196678); such steps are skipped. "
        "flash, flash_varlen: of flash-attn. flash_hub, flash_varlen_hub, _flash_3_hub, _flash_3_varlen_hub, "
        "flash_4_hub: downloaded from the Hub by the package kernels. xformers: of xformers. Networks outside of "
        "diffusers' dispatcher, such as those of SD 3.5 and SDXL, have torch's kernels, of which flash is one, and "
        "xformers.")
    add("--enable_xformers_memory_efficient_attention", action="store_true",
        help="The same as --attention_backend xformers. Needs a GPU.")
    add("--dry_run", type=number(float, 0), nargs="?", const=0.0, metavar="GB",
        help="Train nothing: print the memory, the operations and the estimated time of this command and, if GB is "
        "given, flags with which it fits a GPU of that size, or is faster with the memory that it leaves.")
    add("--dry_run_output", metavar="FILE", help="With --dry_run: JSON file for its numbers.")


def add_checkpointing_arguments(parser: Parser) -> None:
    """Add the flags of checkpoints and the export."""
    add = parser.add_argument_group("checkpointing").add_argument
    add("--output_dir", required=True, help="Folder for checkpoints, logs and the exported pipeline or adapter.")
    add("--checkpointing_steps", type=number(int, 1), default=3000, help="Iterations between checkpoints.")
    add("--checkpoints_total_limit", type=number(int, 1), help="Number of checkpoints to keep; default: all.")
    add("--resume_from_checkpoint", help='Checkpoint folder, name of one in --output_dir, or "latest".')
    add("--max_shard_size", type=file_size, default="1TB",
        help="Split the weights of the exported student into files of at most this size. ComfyUI takes one file only.")
    add("--export_dtype", choices=list(DTYPES), default="bf16",
        help="Precision of the exported network or adapter; other components are copies of the teacher's.")
    add("--push_to_hub", action="store_true", help="Upload the export to the Hub at the end, and nothing else.")
    add("--hub_model_id", help="Repository of --push_to_hub; default: the name of --output_dir, under your name.")
    add("--hub_token", action=SetToken, help="Token for the Hub, with write access for --push_to_hub.")


def add_validation_arguments(parser: Parser):
    """Add the flags of trackers and validation images. Return the function that adds further flags to this group."""
    add = parser.add_argument_group("logging and validation").add_argument
    add("--report_to", default="tensorboard", choices=("none", *TRACKERS), help="Tracker of accelerate.")
    add("--logging_dir", default="logs", help="Folder of the logs, in --output_dir.")
    add("--validation_prompts", nargs="+",
        help="Prompts for validation images, of the teacher once, and of the student before the first iteration, "
        "every --validation_steps and after the last. They are in --output_dir, too.")
    add("--validation_steps", type=number(int, 1), default=500, help="Iterations between validations.")
    add("--num_validation_images", type=number(int, 1), default=1, help="Validation images per prompt.")
    add("--teacher_num_inference_steps", type=number(int, 1), help="Steps of the teacher for its validation images.")
    return add


def make_flow_parser(description: str, epilog: str, pipeline: str, network: str, max_tokens: int) -> Parser:
    """Make the parser of a file in teachers/: all shared flags, and those of flow teachers guided by a second pass.

    Args:
        pipeline, network: names of the diffusers classes.
        max_tokens: the largest --max_sequence_length.
    """
    parser = Parser(description=description, epilog=epilog)
    add = add_model_arguments(parser, pipeline, network)
    add("--max_sequence_length", type=number(int, 1, max_tokens), help="Number of text tokens.")
    add_lora_arguments(parser)
    add_data_arguments(parser)
    add = add_senseflow_arguments(parser)
    add("--sampler", choices=SAMPLERS, default="stochastic",
        help="How backward simulation and the exported pipeline step from anchor to anchor.")
    add_optimization_arguments(parser)
    add_precision_arguments(parser)
    add_checkpointing_arguments(parser)
    add = add_validation_arguments(parser)
    add("--teacher_guidance_scale", type=number(float, 0),
        help="Guidance scale of the teacher for its validation images; 1: not guided.")
    return parser


# fmt: on
# ---------------------------------------------------------------------------------------------------------------------
# Completing and checking
# ---------------------------------------------------------------------------------------------------------------------
def apply_preset(args, preset: dict) -> None:
    """Set the flags that were not given and have no default to the values of a preset."""
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def describe_presets(presets: dict[str, dict]) -> str:
    """Return the presets in words, for --help."""

    def shown(value):
        return " ".join(f"{number:g}" for number in value) if isinstance(value, list) else f"{value:g}"

    return "; ".join(
        f"{name}: {', '.join(f'--{flag} {shown(value)}' for flag, value in preset.items())}"
        for name, preset in presets.items()
    )


def complete_args(args) -> None:
    """Set what follows from other flags: learning rates, --lora_alpha, checkpointing, attention, and pairs of values.

    Raises:
        UserError: exit code 2; more than two values of a pair, or two kernels of attention.
    """
    pairs = {
        "resolution": "side, or HEIGHT WIDTH",
        "dmd_guidance_scale": "value, or MIN MAX",
        "isg_guidance_scale": "value, or MIN MAX",
        "gradient_checkpointing_interval": "value, or STUDENT FAKE_SCORE",
    }
    for name, pair in pairs.items():
        values = getattr(args, name)
        if values is not None:
            if len(values) > 2:
                shown = " ".join(f"{value:g}" for value in values)
                raise UserError(f"--{name} {shown}: give one {pair}", exit_code=2)
            setattr(args, name, [values[0], values[-1]])
    args.gradient_checkpointing |= "gradient_checkpointing_interval" in args.given

    def decimal(value: float) -> float:
        return float(f"{value:.12g}")  # 7e-05, not 7.000000000000001e-05: these numbers are logged and published

    student, fake_score, discriminator = LORA_LEARNING_RATES if args.rank else (1, 1, 1)
    if "learning_rate" not in args.given:
        args.learning_rate = decimal(args.learning_rate * student)
    if args.learning_rate_fake is None:
        args.learning_rate_fake = decimal(args.learning_rate * fake_score / student)
    if args.learning_rate_disc is None:
        args.learning_rate_disc = decimal(args.learning_rate * discriminator / student)
    if args.lora_alpha is None and args.rank:
        args.lora_alpha = float(args.rank)
    if args.enable_xformers_memory_efficient_attention:
        if args.attention_backend not in (None, "xformers"):
            problem = "--enable_xformers_memory_efficient_attention is given, too; drop one of both"
            raise UserError(f"--attention_backend {args.attention_backend}: {problem}", exit_code=2)
        args.attention_backend = "xformers"
    if args.dry_run is not None:  # needs no GPU, which most kernels do
        args.attention_backend, args.enable_xformers_memory_efficient_attention = None, False


def sizes_by_flag(args) -> dict[str, list[int]]:
    """Return {flag with value: [height, width]} of the images that a run trains on or generates."""
    sizes = {f"--aspect_ratio_buckets {h},{w}": [h, w] for h, w in args.aspect_ratio_buckets or []}
    return {f"--resolution {' '.join(map(str, args.resolution))}": args.resolution, **sizes}


def check_common_args(args, inactive_flags: Sequence[tuple] = ()) -> None:
    """Refuse (UserError, exit code 2) arguments that do not fit together; log a warning for flags without effect.

    Args:
        inactive_flags: of the script, in the form of INACTIVE_FLAGS.
    """
    for name in ("dmd_guidance_scale", "isg_guidance_scale"):
        low, high = getattr(args, name)
        if low > high:
            raise UserError(f"--{name} {low:g} {high:g}: MIN is above MAX; swap them", exit_code=2)
    if args.anchors is not None and any(a <= b for a, b in zip(args.anchors, args.anchors[1:])):
        shown = " ".join(f"{t:g}" for t in args.anchors)
        raise UserError(f"--anchors {shown}: must decrease; sort them, largest first", exit_code=2)
    if (
        args.lr_scheduler == "polynomial"
        and min(args.learning_rate, args.learning_rate_fake, args.learning_rate_disc) <= 1e-7
    ):
        raise UserError(
            "--lr_scheduler polynomial: decays to 1e-7, which is not below every learning rate; choose another", 2
        )
    if args.aspect_ratio_buckets:
        problem = None
        if args.dataset_lmdb:
            problem = "--dataset_lmdb holds latents of one size"
        elif args.streaming and (args.gan_weight > 0 or args.backward_simulation_prob < 1):
            problem = "--streaming reads images whose sizes are not known before"
        if problem:
            raise UserError(f"--aspect_ratio_buckets: {problem}; leave out one of the two flags", exit_code=2)
    if args.dry_run is not None and args.resume_from_checkpoint:
        flag = f"--resume_from_checkpoint {args.resume_from_checkpoint}"
        raise UserError(f"--dry_run: reads no checkpoint; leave out {flag}", exit_code=2)
    if args.mixed_precision not in ("no", "bf16"):  # argparse does not check the default
        raise UserError(f"--mixed_precision {args.mixed_precision}: give no or bf16", exit_code=2)
    if args.use_8bit_adam:
        require_package("bitsandbytes", "--use_8bit_adam")
    if args.push_to_hub and args.dry_run is None:
        from huggingface_hub import get_token

        if get_token() is None:
            fix = "give --hub_token, set HF_TOKEN, or run `hf auth login`, with a token that may write"
            raise UserError(f"--push_to_hub: there is no token for the Hub; {fix}", exit_code=2)
    if args.report_to != "none":
        require_package(args.report_to, f"--report_to {args.report_to}")
    for is_inactive, run, names in (*inactive_flags, *INACTIVE_FLAGS):
        if is_inactive(args):
            warn_inactive(args, run, names)


def warn_inactive(args, run: str, names: Sequence[str]) -> None:
    """Log a warning, in the main process alone, that those of the flags that were given have no effect in a run."""
    given = [f"--{name}" for name in names if name in args.given]
    if given and os.environ.get("RANK", "0") == "0":
        logger.warning(f"{', '.join(given)}: no effect in {run}")


# (whether flags have no effect, the name of such a run in a message, the flags)
INACTIVE_FLAGS = (
    (lambda args: args.rank == 0, "a run without --rank", ("lora_alpha", "lora_layers")),
    (lambda args: args.rank > 0, "a run with --rank", ("max_shard_size", "bf16_weight_copies")),
    (lambda args: args.mixed_precision == "no", "a run without --mixed_precision bf16", ("bf16_weight_copies",)),
    (lambda args: not args.push_to_hub, "a run without --push_to_hub", ("hub_model_id",)),
    (lambda args: args.teacher_lora is None, "a run without --teacher_lora", ("teacher_lora_scale",)),
    (
        lambda args: args.gan_weight == 0,
        "a run with --gan_weight 0",
        ("learning_rate_disc", "discriminator_backbone", "discriminator_layers", "discriminator_resolution",
         "discriminator_text_encoder", "classifier_weight"),
    ),
    (
        lambda args: args.dry_run is not None,
        "--dry_run: torch's choice of attention, which it traces, takes as much memory as all but _native_math",
        ("attention_backend", "enable_xformers_memory_efficient_attention"),
    ),
    (lambda args: args.dry_run is None, "a run without --dry_run", ("dry_run_output",)),
    (lambda args: args.isg_weight == 0, "a run with --isg_weight 0", ("isg_margin", "isg_guidance_scale")),
    (
        lambda args: args.lr_scheduler == "constant" or args.lr_warmup_steps == 0,
        "a run without warm-up",
        ("lr_warmup_steps", "lr_warmup_start_factor"),
    ),
    (
        lambda args: not args.validation_prompts,
        "a run without --validation_prompts",
        ("validation_steps", "num_validation_images", "teacher_num_inference_steps", "teacher_guidance_scale"),
    ),
    (lambda args: args.report_to == "none", "a run with --report_to none", ("logging_dir",)),
    (
        lambda args: not (args.dataset_name or args.train_data_dir),
        "a data set without columns",
        ("image_column", "caption_column"),
    ),
    (lambda args: not args.dataset_name, "a run without --dataset_name", ("dataset_config_name", "streaming")),
    (lambda args: args.dataset_lmdb, "a run with --dataset_lmdb", ("center_crop", "random_flip")),
    (
        lambda args: args.gan_weight == 0 and args.backward_simulation_prob == 1,
        "a run without images",
        ("image_column", "center_crop", "random_flip"),
    ),
    (
        lambda args: args.gan_weight == 0 and not args.validation_prompts
        and (args.backward_simulation_prob == 1 or bool(args.dataset_lmdb)),
        "a run without a VAE",
        ("vae_dtype",),
    ),
)  # fmt: skip
