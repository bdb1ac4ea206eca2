# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Pictures to latents and back: what differs between VAEs is read from their configurations, none is named."""

from typing import Optional, Sequence

import torch
from diffusers import ModelMixin

from senseflow_hub import load_network
from senseflow_utils import Draws


def vae_scale_of(config: dict) -> int:
    """Pixels per latent along a side."""
    return 2 ** (len(config.get("block_out_channels") or config["encoder_block_out_channels"]) - 1)


def latent_shape_of(config: dict, resolution: int) -> tuple[int, int, int]:
    """(channels, height, width) of one x0 at this resolution; `config` is the VAE's."""
    return (config["latent_channels"], *[resolution // vae_scale_of(config)] * 2)


def load_vae(kind, flag: str, path: str, args, device, encodes: bool, decodes: bool, **source) -> Optional[ModelMixin]:
    """The frozen VAE on its device, without the half that nothing will run; None where neither is."""
    if not (encodes or decodes):
        return None
    vae = load_network(kind, flag, path, "vae", **source)
    if not encodes:
        vae.encoder = None
    if not decodes:
        vae.decoder = None
    elif args.gradient_checkpointing and vae._supports_gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return vae.requires_grad_(False).eval().to(device)


def shift_of(vae: ModelMixin) -> float:
    """What a VAE's latents are off zero by; not every kind has the entry."""
    return vae.config.get("shift_factor") or 0


def encode(vae: ModelMixin, pictures: torch.Tensor, draws: Draws, slots: Sequence[int]) -> torch.Tensor:
    """x0 of pictures (B, 3, H, W) in [-1, 1]: a sample of the VAE's posterior, or its one latent where it has none; float32."""
    encoded = vae.encode(pictures.to(vae.dtype))
    if "latent_dist" in encoded:
        posterior = encoded.latent_dist
        sample = posterior.mean + posterior.std * draws.normal("posterior", slots, posterior.mean.shape[1:])
    else:
        sample = encoded.latent
    return (sample.float() - shift_of(vae)) * vae.config.scaling_factor


def decode(vae: ModelMixin, x0: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W), about [-1, 1], float32; gradient flows."""
    latents = x0 / vae.config.scaling_factor + shift_of(vae)
    return vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()


def real_latents(vae: Optional[ModelMixin], batch: dict, rows: torch.Tensor, draws: Draws) -> torch.Tensor:
    """x0 of the given rows of a batch, float32: its latents where the data set holds latents, else its pictures encoded."""
    if "latents" in batch:
        return batch["latents"][rows]
    return encode(vae, batch["pixel_values"][rows], draws, [batch["slots"][row] for row in rows.tolist()])


def real_pictures(vae: ModelMixin, batch: dict) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [-1, 1] of a batch; decoded where the data set holds latents."""
    return decode(vae, batch["latents"]) if "latents" in batch else batch["pixel_values"]
