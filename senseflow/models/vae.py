# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Encode images to latents and decode them with any VAE: what differs between VAEs is read from their configurations.

One x0 is what a stock pipeline starts to denoise, before it is packed into tokens: (C, H, W), standardized, without a
frame axis, and folded if the VAE's statistics are those of folded latents; in which order, the pipeline decides.
"""

from functools import partial
from typing import Callable, Optional, Sequence

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d, EfficientViTBlock, ResBlock
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from PIL import Image
from torch.utils.checkpoint import checkpoint

from senseflow.arguments import torch_dtype
from senseflow.models.hub import ModelSource, load_network
from senseflow_utils import StatelessRNG


# Of AutoencoderKL and of AutoencoderDC, which has no checkpointing in diffusers; nor have Qwen-Image's and Wan's VAEs,
# whose blocks' names end in these words.
DECODER_BLOCKS = (ResnetBlock2D, Upsample2D, ResBlock, EfficientViTBlock, DCUpBlock2d)
VIDEO_DECODER_BLOCKS = ("ResidualBlock", "Resample")


# ---------------------------------------------------------------------------------------------------------------------
# Configurations
# ---------------------------------------------------------------------------------------------------------------------
def vae_scale_of(config: dict) -> int:
    """Return how many pixels one position of x0 spans along a side."""
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or config["dim_mult"]
    return 2 ** (len(levels) - 1) * fold_of(config)


def latent_shape_of(config: dict, size: Sequence[int]) -> tuple[int, int, int]:
    """Return (channels, height, width) of one x0 of an image of this size, (height, width) in pixels."""
    channels, scale = config.get("latent_channels") or config["z_dim"], vae_scale_of(config)
    return channels * fold_of(config) ** 2, size[0] // scale, size[1] // scale


def fold_of(config: dict) -> int:
    """Return the side of the squares of latents folded into channels of x0: the patch of the VAE's batch norm."""
    return config["patch_size"][0] if "batch_norm_eps" in config else 1


def has_frames(config: dict) -> bool:
    """Return whether this is a VAE of videos, for which an image has one frame: (B, C, 1, H, W)."""
    return "temperal_downsample" in config  # diffusers' spelling


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def load_vae(source: ModelSource, cls, args, device, encodes: bool, decodes: bool, auto: str) -> Optional[ModelMixin]:
    """Load the frozen VAE without unused halves; None if neither half is used.

    Args:
        auto: "fp32" or "bf16": what `--vae_dtype auto` means with --mixed_precision bf16. For bf16 the encoder
            computes in bf16 and the decoder, but for adapters, in float32, on weights rounded to bf16 (release).
    """
    if not (encodes or decodes):
        return None
    auto = auto if args.mixed_precision == "bf16" else "fp32"
    dtype = torch_dtype(auto if args.vae_dtype == "auto" else args.vae_dtype)
    # With adapters the decoder's backward sets the peak: at 1024 px, 4.4 GiB more in float32 than in bf16.
    decoder_dtype = torch.float32 if args.vae_dtype == "auto" and not args.rank else dtype
    vae = load_network(source, cls, "vae", dtype=dtype)
    for name in {"decoder", "post_quant_conv"} & dict(vae.named_children()).keys():
        getattr(vae, name).to(decoder_dtype)
    if not encodes:
        vae.encoder = torch.nn.Module()  # not None: some VAEs count the layers of both halves
    if not decodes:
        vae.decoder = torch.nn.Module()
    elif args.gradient_checkpointing:
        checkpoint_decoder(vae)
    # On the instance, so that a stock pipeline under autocast has them, too.
    vae.encode = partial(_without_autocast, vae.encode, dtype)
    vae.decode = partial(_without_autocast, vae.decode, decoder_dtype)
    return vae.requires_grad_(False).eval().to(device)


def checkpoint_decoder(vae: ModelMixin) -> None:
    """Recompute the decoder's activations in the backward pass, one residual block at a time.

    The last blocks, at full resolution, set the peak memory of the student's step. A block of a VAE of videos also
    keeps what the next frame needs, in lists which a second run must not read: an image has no next frame, so it runs
    without them. VAEs with other blocks use the checkpointing of diffusers, if they support it.
    """
    frames, modules = has_frames(vae.config), vae.decoder.modules()
    if frames:
        blocks = [module for module in modules if type(module).__name__.endswith(VIDEO_DECODER_BLOCKS)]
    else:
        blocks = [module for module in modules if isinstance(module, DECODER_BLOCKS)]
    for block in blocks:  # in eval mode nothing is random
        forward = partial(_of_one_frame, block.forward) if frames else block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    if not blocks and vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()


def _of_one_frame(function, x: torch.Tensor, *caches, **further_caches):
    """Call the forward of a block of a video VAE without what it would keep for a next frame."""
    return function(x)


def _without_autocast(function, dtype: torch.dtype, x: torch.Tensor, *args, **kwargs):
    with torch.autocast(x.device.type, enabled=False):
        return function(x.to(dtype), *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Images and latents
# ---------------------------------------------------------------------------------------------------------------------
def statistics_of(vae: ModelMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of unstandardized latents, float32, to broadcast against x0 (B, C, H, W)."""
    config = vae.config
    if "batch_norm_eps" in config:
        mean, std = vae.bn.running_mean.float(), (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
    else:
        per_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
        shared = (config.get("shift_factor") or 0, 1)
        mean, std = (config.latents_mean, config.latents_std) if per_channel else shared
        mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std) / (config.get("scaling_factor") or 1)
    return mean.view(-1, 1, 1).to(vae.device), std.view(-1, 1, 1).to(vae.device)


def repack(pipeline_class: type, vae: ModelMixin, latents: torch.Tensor, name: str) -> torch.Tensor:
    """Fold squares of latents (B, C, H, W) into channels, or back, if the VAE's statistics are of folded latents.

    The VAE's configuration has the size of the squares, but not the order of the channels: the pipeline has.

    Args:
        name: of the pipeline's method.
    """
    if fold_of(vae.config) == 1:
        return latents
    if not hasattr(pipeline_class, name):
        message = f"{pipeline_class.__name__} has no {name}: define fold and unfold in the script's class"
        raise NotImplementedError(message)
    return getattr(pipeline_class, name)(latents)


def encode(
    vae: ModelMixin,
    images: torch.Tensor,
    rng: StatelessRNG,
    sample_indices: Sequence[int],
    fold: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Encode images (B, 3, H, W) in [-1, 1] to x0, float32: a sample of the posterior if the VAE has one."""
    frames, (mean, std) = has_frames(vae.config), statistics_of(vae)
    if vae.config.get("in_channels") == 4:
        images = torch.cat([images, torch.ones_like(images[:, :1])], 1)  # opaque
    encoded = vae.encode(images.unsqueeze(2) if frames else images)
    if "latent_dist" in encoded:
        posterior = encoded.latent_dist
        sample = posterior.mean + posterior.std * rng.normal("posterior", sample_indices, posterior.mean.shape[1:])
    else:
        sample = encoded.latent
    sample = sample.squeeze(2) if frames else sample
    return (fold(sample.float()) - mean) / std


def decode(vae: ModelMixin, x0: torch.Tensor, unfold: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Decode x0 to images (B, 3, H, W), about in [-1, 1], float32; gradient flows.

    Images with an alpha channel are laid over white, as those of a data set are.
    """
    frames, (mean, std) = has_frames(vae.config), statistics_of(vae)
    latents = unfold(x0 * std + mean)
    images = vae.decode(latents.unsqueeze(2) if frames else latents, return_dict=False)[0].float()
    images = images.squeeze(2) if frames else images
    if images.shape[1] == 4:
        images, alpha = images[:, :3], images[:, 3:] / 2 + 0.5
        images = alpha * images + (1 - alpha)
    return images


def over_white(image: Image.Image) -> Image.Image:
    """Lay a stock call's image over white where it is transparent, as `decode` does; return it in RGB."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
