# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Images to latents and back: what differs between VAEs is read from their configurations, none is named.

One x0 is what a stock pipeline starts to denoise, before it is packed into tokens: (C, H, W), standardized, without a frame axis,
and folded into channels where the VAE's statistics are those of folded latents.
"""

from functools import partial
from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.utils.checkpoint import checkpoint

from senseflow.arguments import torch_dtype
from senseflow.models.hub import ModelSource, load_network
from senseflow_utils import StatelessRNG


# ---------------------------------------------------------------------------------------------------------------------
# From the configuration
# ---------------------------------------------------------------------------------------------------------------------
def vae_scale_of(config: dict) -> int:
    """Pixels per number of x0, along a side."""
    levels = config.get("block_out_channels") or config.get("encoder_block_out_channels") or config["dim_mult"]
    return 2 ** (len(levels) - 1) * fold_of(config)


def latent_shape_of(config: dict, resolution: int) -> tuple[int, int, int]:
    """(channels, height, width) of one x0 at this resolution; `config` is the VAE's."""
    channels = config.get("latent_channels") or config["z_dim"]
    return (channels * fold_of(config) ** 2, *[resolution // vae_scale_of(config)] * 2)


def fold_of(config: dict) -> int:
    """Side of the square of latents that stand in the channels of one place of x0: that of the VAE's batch norm."""
    return config["patch_size"][0] if "batch_norm_eps" in config else 1


def has_frames(config: dict) -> bool:
    """Whether this is a VAE of films, for which an image is one of a single frame: (B, C, 1, H, W)."""
    return "temperal_downsample" in config  # diffusers' spelling


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def load_vae(source: ModelSource, cls, args, device, encodes: bool, decodes: bool, auto: str) -> Optional[ModelMixin]:
    """The frozen VAE on its device, without the half that nothing will run; None where neither is.

    Args:
        auto: "fp32" or "bf16": what `--vae_dtype auto` means under --mixed_precision bf16, as the teacher's release has it.
    """
    if not (encodes or decodes):
        return None
    auto = auto if args.mixed_precision == "bf16" else "fp32"
    vae = load_network(source, cls, "vae", dtype=torch_dtype(auto if args.vae_dtype == "auto" else args.vae_dtype))
    if not encodes:
        vae.encoder = torch.nn.Module()  # not None: some count the layers of both halves whenever they run one
    if not decodes:
        vae.decoder = torch.nn.Module()
    elif args.gradient_checkpointing:
        checkpoint_decoder(vae)
    # Whoever calls, a stock pipeline under autocast too.
    vae.encode, vae.decode = partial(_in_own_precision, vae, vae.encode), partial(_in_own_precision, vae, vae.decode)
    return vae.requires_grad_(False).eval().to(device)


def checkpoint_decoder(vae: ModelMixin) -> None:
    """Has the decoder's activations computed again in the backward, of one residual block at a time: the last of them, at the
    images' own size, set the peak of a student's turn. VAEs of other blocks do it as diffusers has it, where they can.
    """
    blocks = [part for part in vae.decoder.modules() if isinstance(part, (ResnetBlock2D, Upsample2D))]
    for block in blocks:
        block.forward = partial(_recomputed, block.forward)
    if not blocks and vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()


def _recomputed(forward, *args, **kwargs):
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )  # in eval mode it draws nothing


def _in_own_precision(vae: ModelMixin, function, x: torch.Tensor, *args, **kwargs):
    with torch.autocast(x.device.type, enabled=False):
        return function(x.to(vae.dtype), *args, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Images and latents
# ---------------------------------------------------------------------------------------------------------------------
def statistics_of(vae: ModelMixin) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) that x0 is freed from, float32, to be broadcast against x0 (B, C, H, W)."""
    config = vae.config
    if "batch_norm_eps" in config:
        mean, std = vae.bn.running_mean.float(), (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
    else:
        each = config.get("latents_mean") is not None and config.get("latents_std") is not None
        mean, std = (config.latents_mean, config.latents_std) if each else (config.get("shift_factor") or 0, 1)
        mean, std = torch.tensor(mean, dtype=torch.float32), torch.tensor(std) / (config.get("scaling_factor") or 1)
    return mean.view(-1, 1, 1).to(vae.device), std.view(-1, 1, 1).to(vae.device)


def encode(vae: ModelMixin, images: torch.Tensor, rng: StatelessRNG, sample_indices: Sequence[int]) -> torch.Tensor:
    """x0 of images (B, 3, H, W) in [-1, 1]: a sample of the VAE's posterior, or its one latent where it has none; float32."""
    frames, (mean, std) = has_frames(vae.config), statistics_of(vae)
    encoded = vae.encode(images.unsqueeze(2) if frames else images)
    if "latent_dist" in encoded:
        posterior = encoded.latent_dist
        sample = posterior.mean + posterior.std * rng.normal("posterior", sample_indices, posterior.mean.shape[1:])
    else:
        sample = encoded.latent
    sample = sample.squeeze(2) if frames else sample
    return (F.pixel_unshuffle(sample.float(), fold_of(vae.config)) - mean) / std


def decode(vae: ModelMixin, x0: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), about [-1, 1], float32; gradient flows."""
    frames, (mean, std) = has_frames(vae.config), statistics_of(vae)
    latents = F.pixel_shuffle(x0 * std + mean, fold_of(vae.config))
    images = vae.decode(latents.unsqueeze(2) if frames else latents, return_dict=False)[0].float()
    return images.squeeze(2) if frames else images


def real_latents(vae: Optional[ModelMixin], batch: dict, rows: torch.Tensor, rng: StatelessRNG) -> torch.Tensor:
    """x0 of the given rows of a batch, float32: its latents where the data set holds latents, else its images encoded."""
    if "latents" in batch:
        return batch["latents"][rows]
    return encode(vae, batch["pixel_values"][rows], rng, [batch["sample_indices"][row] for row in rows.tolist()])


def real_images(vae: ModelMixin, batch: dict) -> torch.Tensor:
    """Images (B, 3, H, W) in [-1, 1] of a batch; decoded where the data set holds latents."""
    return decode(vae, batch["latents"]) if "latents" in batch else batch["pixel_values"]
