# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The discriminator of SenseFlow over a vision foundation model (section 3.4), after StyleGAN-T and ADD.

    VisionFeatures    images -> maps of a frozen DINOv2, one per chosen depth
    TextFeatures      prompts -> embedding of a frozen CLIP text encoder
    Discriminator     a trained head per map: features of an image, of a reference image and of the text -> logits

DiffAugment changes the images that are classified, never the reference.
"""

import math
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, CLIPTextModelWithProjection, Dinov2Config, Dinov2Model

from senseflow.errors import UserError
from senseflow.models.hub import ModelSource, load_network
from senseflow_utils import StatelessRNG


LAYERS_OF_24 = (2, 5, 8, 10, 14, 19, 23)
CONDITION_CHANNELS = 64
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# ---------------------------------------------------------------------------------------------------------------------
# Frozen networks
# ---------------------------------------------------------------------------------------------------------------------
def default_layers(num_blocks: int) -> list[int]:
    """Return the blocks whose output is used: the release's of 24 blocks, else the same relative depths."""
    return sorted({max(0, round((layer + 1) / 24 * num_blocks) - 1) for layer in LAYERS_OF_24})


def check_discriminator_args(args) -> None:
    """Check backbone, text encoder, layers and resolution by their configurations.

    Raises:
        UserError: exit code 2.
    """
    text_encoder = ModelSource("--discriminator_text_encoder", args.discriminator_text_encoder)
    _read_config(text_encoder, "CLIP", ("clip", "clip_text_model"))
    path, layers = args.discriminator_backbone, args.discriminator_layers
    config = Dinov2Config(**_read_config(ModelSource("--discriminator_backbone", path), "DINOv2", ("dinov2",)))
    name = "resolution" if args.discriminator_resolution is None else "discriminator_resolution"
    flag, value = f"--{name} {getattr(args, name)}", getattr(args, name)
    if value < config.patch_size:
        raise UserError(f"{flag}: must be at least the patch size {config.patch_size} of {path}", exit_code=2)
    if value > args.resolution:
        problem = f"must not exceed --resolution {args.resolution}; lower it, or drop it to use images as they are"
        raise UserError(f"{flag}: {problem}", exit_code=2)
    last = config.num_hidden_layers - 1
    if layers is not None and (layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] <= last):
        problem = f"must increase and lie in 0..{last}, the blocks of {path}"
        raise UserError(f"--discriminator_layers {' '.join(map(str, layers))}: {problem}", exit_code=2)


def _read_config(source: ModelSource, family: str, model_types: Sequence[str]) -> dict:
    config = source.read_json("config.json")
    if config is None:
        raise source.error(f"no readable config.json; give a {family}")
    if config.get("model_type") not in model_types:
        raise source.error(f"is a {config.get('model_type')}, give a {family}")
    return config


class VisionFeatures(nn.Module):
    """A frozen DINOv2 that returns maps of several depths.

    Weights and the residual stream are float32, whatever the precision of matrix products in the blocks (release).

    Args:
        path: folder or Hub id.
        layers: increasing block numbers; None for `default_layers`. Blocks above the last are dropped.
        dtype: of autocast; no autocast for float32.
        gradient_checkpointing: recompute the blocks in the backward pass.
        resolution: side in pixels to which images are resized; None: not resized.
    """

    def __init__(
        self,
        path: str,
        layers: Optional[Sequence[int]] = None,
        dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        resolution: Optional[int] = None,
    ):
        super().__init__()
        self.dtype, self.gradient_checkpointing, self.resolution = dtype, gradient_checkpointing, resolution
        source, for_pretraining = ModelSource("--discriminator_backbone", path), ["embeddings.mask_token"]
        model = load_network(source, Dinov2Model, "", for_pretraining, dtype=torch.float32)
        self.layers = list(layers) if layers is not None else default_layers(model.config.num_hidden_layers)
        self.embeddings = model.embeddings
        self.blocks = model.encoder.layer[: self.layers[-1] + 1]
        self.channels, self.num_maps = model.config.hidden_size, len(self.layers) + 1
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return maps (B, C, h, w), float32, after the embedding and after each chosen block, without the final norm.

        Each map is patch tokens plus CLS token. h and w are height and width over the patch size, rounded down.

        Args:
            images: (B, 3, H, W) in [-1, 1], at least a patch high and wide; gradient flows back to them.
        """
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            images = images.float()
            if self.resolution not in (None, images.shape[-1]):
                images = F.interpolate(images, size=(self.resolution,) * 2, mode="bilinear", antialias=True)
            images = ((images + 1) / 2 - self.mean) / self.std
            patches = self.embeddings.patch_embeddings.projection(images)
            batch, channels, height, width = patches.shape
            tokens = patches.flatten(2).transpose(1, 2) + self._positions(height, width)
            cls = self.embeddings.cls_token + self.embeddings.position_embeddings[:, :1]
            states = torch.cat([cls.expand(batch, -1, -1), tokens], 1)
            maps = [states]
            for number, block in enumerate(self.blocks):
                if self.gradient_checkpointing:  # in eval mode nothing is random
                    states = checkpoint(block, states, use_reentrant=False, preserve_rng_state=False)
                else:
                    states = block(states)
                if number in self.layers:
                    maps.append(states)
        return [(m[:, 1:] + m[:, :1]).transpose(1, 2).reshape(batch, channels, height, width) for m in maps]

    def _positions(self, height: int, width: int) -> torch.Tensor:
        # The release interpolates bilinearly, transformers bicubically.
        positions = self.embeddings.position_embeddings[:, 1:]
        side = round(positions.shape[1] ** 0.5)
        grid = positions.transpose(1, 2).reshape(1, -1, side, side)
        if (height, width) != (side, side):
            grid = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)
        return grid.flatten(2).transpose(1, 2)


class TextFeatures(nn.Module):
    """The projected, L2-normalized text embedding of a frozen CLIP (folder or Hub id), in float32 (release)."""

    def __init__(self, path: str):
        super().__init__()
        source = ModelSource("--discriminator_text_encoder", path)
        with source.loading():
            self.tokenizer = source.load(AutoTokenizer.from_pretrained)
        self.model = load_network(source, CLIPTextModelWithProjection, "", dtype=torch.float32)
        self.channels = self.model.config.projection_dim
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, prompts: list[str]) -> torch.Tensor:
        """Return embeddings (B, T), float32, of unit length."""
        kwargs = {"max_length": self.model.config.max_position_embeddings, "padding": "max_length", "truncation": True}
        tokens = self.tokenizer(list(prompts), return_tensors="pt", **kwargs)
        ids = tokens.input_ids.to(self.model.device)
        return F.normalize(self.model(ids).text_embeds.float(), dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The heads
# ---------------------------------------------------------------------------------------------------------------------
class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most `virtual_batch` neighboring samples, without running statistics (StyleGAN-T).

    The size of a group is the largest divisor of the batch up to `virtual_batch`; with 1 this is an instance norm.
    """

    virtual_batch = 8

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize x (B, C, H, W)."""
        batch = x.shape[0]
        size = max(d for d in range(1, min(batch, self.virtual_batch) + 1) if batch % d == 0)
        groups = x.float().unflatten(0, (batch // size, size))
        variance, mean = torch.var_mean(groups, dim=(1, 3, 4), keepdim=True, correction=0)
        x = ((groups - mean) * torch.rsqrt(variance + 1e-5)).flatten(0, 1).to(x.dtype)
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, padding_mode="circular")
    return spectral_norm(conv, n_power_iterations=1, eps=1e-12)


class Block(nn.Sequential):
    """Spectral-norm convolution, local batch norm, LeakyReLU."""

    def __init__(self, channels: int, kernel: int):
        super().__init__(_conv(channels, channels, kernel), LocalBatchNorm(channels), nn.LeakyReLU(0.2))


class Residual(Block):
    """(f(x) + x) / sqrt(2) of a 3x3 block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (super().forward(x) + x) / 2**0.5


class Tower(nn.Sequential):
    """Convolutions from maps (B, C, h, w) to 64 channels at an eighth of the sides, rounded up.

    Attributes:
        gradient_checkpointing: keep only the input for the backward pass, neither activations nor normalized weights.
    """

    gradient_checkpointing = False

    def __init__(self, channels: int):
        layers = [Block(channels, 1)]
        for stage in range(3):
            layers.append(_conv(channels, channels, 3, stride=2))
            if stage < 2:
                layers.append(Residual(channels, 3))
        super().__init__(*layers, _conv(channels, CONDITION_CHANNELS, 1))

    def forward(self, maps: Sequence[torch.Tensor], one: torch.Tensor) -> list[torch.Tensor]:
        """Run on each of the maps separately, with weights that are normalized once.

        Args:
            one: 1, with gradient in training: FSDP2 frees a tower after its backward only if an input takes gradient.
        """
        if self.gradient_checkpointing:
            kwargs = {"context_fn": lambda: (nullcontext(), self._without_power_iteration())}
            return checkpoint(self._run, maps, one, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return self._run(maps, one)

    def _run(self, maps: Sequence[torch.Tensor], one: torch.Tensor) -> list[torch.Tensor]:
        with parametrize.cached():
            self._normalize_weights(one.device.type)
            return [nn.Sequential.forward(self, features.float()) * one for features in maps]

    def _normalize_weights(self, device_type: str) -> None:
        """Run every convolution's power iteration and division in float32; `parametrize.cached` keeps the result."""
        with torch.autocast(device_type, enabled=False):
            for module in self.modules():
                if parametrize.is_parametrized(module):
                    _ = module.weight

    @contextmanager
    def _without_power_iteration(self):
        """Reuse the norms of the first run in the recomputation."""
        norms = [module for module in self.modules() if hasattr(module, "_power_method")]
        training = [norm.training for norm in norms]
        for norm in norms:
            norm.eval()
        try:
            yield
        finally:
            for norm, mode in zip(norms, training):
                norm.train(mode)


class TextMap(nn.Module):
    """A linear map with weights initialized from N(0, 1), scaled by 1 / sqrt(inputs) in the forward, and zero bias."""

    def __init__(self, inputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CONDITION_CHANNELS, inputs))
        self.bias = nn.Parameter(torch.zeros(CONDITION_CHANNELS))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return F.linear(text, self.weight / self.weight.shape[1] ** 0.5, self.bias)


class Discriminator(nn.Module):
    """A head per feature map: logits = sum over 64 channels of cls(features) * (cmap(text) + refmap(reference)) / 8.

    Args:
        channels: of the maps, and inside the heads.
        num_maps: number of heads.
        text_channels: of the text embedding.
    """

    _no_split_modules = ("Tower",)  # sharded, and gathered, one by one

    def __init__(self, channels: int, num_maps: int, text_channels: int):
        super().__init__()
        self.cls = nn.ModuleList(Tower(channels) for _ in range(num_maps))
        self.refmap = nn.ModuleList(Tower(channels) for _ in range(num_maps))
        self.cmap = nn.ModuleList(TextMap(text_channels) for _ in range(num_maps))

    def forward(
        self, images: Sequence[Sequence[torch.Tensor]], reference: Sequence[torch.Tensor], text: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return logits (B, L), float32, of each of `images`; reference and text are processed once.

        Args:
            images: outputs of `VisionFeatures`, such as (real, fake), with gradient; each is normalized separately.
            reference: output for the images that the prompts belong to, not augmented.
            text: (B, T) of `TextFeatures`.
        """
        logits = [[] for _ in images]
        one = torch.ones((), device=text.device, requires_grad=self.training and torch.is_grad_enabled())
        for head, (cls, refmap, cmap) in enumerate(zip(self.cls, self.refmap, self.cmap)):
            condition = cmap(text)[:, :, None, None] + refmap(reference[head : head + 1], one)[0]
            for per_head, features in zip(logits, cls([features[head] for features in images], one)):
                scores = (features * condition).float().sum(1) / CONDITION_CHANNELS**0.5
                per_head.append(scores.flatten(1))
        return tuple(torch.cat(per_head, 1) for per_head in logits)


class LatentClassifier(nn.Sequential):
    """DMD2's classifier: mid-block features (B, C, size, size) -> one logit per sample (B,), for any C and size.

    Convolutions of stride 2 halve the map down to at most 4, one more reduces it to 1 x 1, a linear map follows. At
    size 32 (SDXL at 1024 px) these are the release's four convolutions of kernel 4. GroupNorm has 32 groups if each
    has 8 channels or more, else fewer: on a 1 x 1 map few values per group would be normalized to almost nothing.

    It computes in the precision of its weights, float32 but where shards are gathered in bfloat16, without autocast.
    """

    def __init__(self, channels: int, size: int):
        layers = []
        while size > 4:
            layers.append(nn.Conv2d(channels, channels, 4, stride=2, padding=1))
            size //= 2
        layers.append(nn.Conv2d(channels, channels, size))
        norm = partial(nn.GroupNorm, math.gcd(32, max(1, channels // 8)), channels)
        blocks = [part for layer in layers for part in (layer, norm(), nn.SiLU())]
        super().__init__(*blocks, nn.Conv2d(channels, 1, 1), nn.Flatten(0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self[0].weight.dtype))


def load_discriminator(
    args, dtype: torch.dtype, device: torch.device
) -> tuple[Discriminator, VisionFeatures, TextFeatures]:
    """Load the frozen networks on the device, and make the heads on the CPU.

    Raises:
        UserError: exit code 1; weights are missing or damaged.
    """
    kwargs = {"gradient_checkpointing": args.gradient_checkpointing, "resolution": args.discriminator_resolution}
    vision = VisionFeatures(args.discriminator_backbone, args.discriminator_layers, dtype, **kwargs).to(device)
    text = TextFeatures(args.discriminator_text_encoder).to(device)
    heads = Discriminator(vision.channels, vision.num_maps, text.channels)
    for tower in (*heads.cls, *heads.refmap):
        tower.gradient_checkpointing = args.gradient_checkpointing
    return heads, vision, text


# ---------------------------------------------------------------------------------------------------------------------
# DiffAugment (Zhao et al., 2020)
# ---------------------------------------------------------------------------------------------------------------------
def diff_augment(images: torch.Tensor, rng: StatelessRNG, sample_indices: Sequence[int], name: str) -> torch.Tensor:
    """Change brightness, saturation, contrast and position, and cut out a rectangle; differentiable, not clamped.

    Args:
        images: (B, 3, H, W) in [-1, 1]; each is augmented independently.
        name: prefix of the random numbers' names, so that real and generated images are augmented independently.
    """

    def uniform(operation: str, low: float, high: float) -> torch.Tensor:
        return rng.uniform(f"{name}_{operation}", sample_indices, low, high).view(-1, 1, 1, 1)

    x = images + uniform("brightness", -0.5, 0.5)
    mean = x.mean(1, keepdim=True)
    x = mean + (x - mean) * uniform("saturation", 0, 2)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * uniform("contrast", 0.5, 1.5)
    return _cutout(_translate(x, rng, sample_indices, name), rng, sample_indices, name)


def _translate(x: torch.Tensor, rng: StatelessRNG, sample_indices, name: str) -> torch.Tensor:
    """Shift by up to an eighth of each side and fill with 0."""
    indices = []
    for axis, size in (("y", x.shape[2]), ("x", x.shape[3])):
        reach = int(size * 0.125 + 0.5)
        shift = rng.integers(f"{name}_translate_{axis}", sample_indices, -reach, reach)
        # The image is padded by one pixel of zeros, to which indices beyond its border are clamped.
        indices.append((torch.arange(1, size + 1, device=x.device) - shift[:, None]).clamp(0, size + 1))
    rows, columns = indices
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    pixels = F.pad(x, [1, 1, 1, 1]).permute(0, 2, 3, 1)
    return pixels[samples, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _cutout(x: torch.Tensor, rng: StatelessRNG, sample_indices, name: str) -> torch.Tensor:
    """Set a rectangle of a fifth of each side, centered anywhere in the image, to 0."""
    inside = []
    for axis, size in (("y", x.shape[2]), ("x", x.shape[3])):
        side = int(size * 0.2 + 0.5)
        first = rng.integers(f"{name}_cutout_{axis}", sample_indices, 0, size - side % 2) - side // 2
        positions = torch.arange(size, device=x.device)
        inside.append((positions >= first[:, None]) & (positions < first[:, None] + side))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x * ~hole
