# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The discriminator of SenseFlow over a vision foundation model (section 3.4), after StyleGAN-T and ADD.

    VisionFeatures    images -> maps of a frozen DINOv2, one per chosen depth
    TextFeatures      prompts -> embedding of a frozen CLIP text encoder
    Discriminator     a trained head per map: features of an image, of a reference image and of the text -> logits

DiffAugment changes the images that are classified, never the reference.
"""

import math
from functools import partial
from typing import Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, CLIPTextModelWithProjection, Dinov2Config, Dinov2Model

from senseflow.arguments import sizes_by_flag
from senseflow.errors import UserError
from senseflow.models.autocast import cast_frozen_layers
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
    shown, size = min(sizes_by_flag(args).items(), key=lambda item: min(item[1]))
    value = args.discriminator_resolution
    flag = shown if value is None else f"--discriminator_resolution {value}"
    if (min(size) if value is None else value) < config.patch_size:
        raise UserError(f"{flag}: must be at least the patch size {config.patch_size} of {path}", exit_code=2)
    if value is not None and value > min(size):
        problem = f"must not exceed {shown}; lower it, or drop it to use images as they are"
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

    Norms and the residual stream are float32, whatever the precision of matrix products in the blocks (release).

    Args:
        path: folder or Hub id.
        layers: increasing block numbers; None for `default_layers`. Blocks above the last are dropped.
        dtype: of autocast; no autocast for float32.
        gradient_checkpointing: recompute the blocks in the backward pass.
        resolution: pixels to which the shorter side of images is resized; None: not resized.
    """

    _repeated_blocks = ("Dinov2Layer",)

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
        if dtype != torch.float32:
            cast_frozen_layers(self, dtype)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return maps (B, C, h, w), float32, after the embedding and after each chosen block, without the final norm.

        Each map is patch tokens plus CLS token. h and w are height and width over the patch size, rounded down.

        Args:
            images: (B, 3, H, W) in [-1, 1], at least a patch high and wide; gradient flows back to them.
        """
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype != torch.float32):
            images = images.float()
            shorter = min(images.shape[2:])
            if self.resolution not in (None, shorter):
                size = [round(side * self.resolution / shorter) for side in images.shape[2:]]
                images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
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
TOWERS_PER_GROUP = 4  # run side by side: fewer operations on the GPU, and more memory, than one after the other


class LocalBatchNorm(nn.Module):
    """Batch norm over groups of at most `virtual_batch` neighboring samples, without running statistics (StyleGAN-T).

    The size of a group is the largest divisor of the batch up to `virtual_batch`; with 1 this is an instance norm.
    """

    virtual_batch = 8

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, num_batches: int = 1) -> torch.Tensor:
        """Normalize x (num_batches * B, C, H, W); no group has samples of two batches."""
        batch = len(x) // num_batches
        size = max(d for d in range(1, min(batch, self.virtual_batch) + 1) if batch % d == 0)
        groups = len(x) // size
        x = x.unflatten(0, (groups, size)).transpose(0, 1).flatten(1, 2)  # (size, groups * C, H, W)
        weight, bias = self.weight.repeat(groups), self.bias.repeat(groups)
        x = torch.batch_norm(x, weight, bias, None, None, True, 0.0, 1e-5, torch.backends.cudnn.enabled)
        return x.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


class CircularPad(torch.autograd.Function):
    """Pad (..., H, W) by one on each side, circularly: F.pad(mode="circular") in a quarter of its operations."""

    @staticmethod
    def forward(context, x):
        for dim in (-2, -1):
            x = torch.cat([x.narrow(dim, -1, 1), x, x.narrow(dim, 0, 1)], dim)
        return x

    @staticmethod
    def backward(context, gradient):
        for dim in (-1, -2):
            size = gradient.shape[dim] - 2
            inner = gradient.narrow(dim, 1, size).clone(memory_format=torch.contiguous_format)
            inner.narrow(dim, -1, 1).add_(gradient.narrow(dim, 0, 1))
            inner.narrow(dim, 0, 1).add_(gradient.narrow(dim, -1, 1))
            gradient = inner
        return gradient


class SpectralConv(nn.Module):
    """Convolutions of several towers side by side, with circular padding and spectral norm (Miyato et al., 2018).

    x (B, towers * inputs, H, W) -> (B, towers * outputs, H', W'). The largest singular value of each tower's weights W
    is estimated by u W v, where u and v follow W by a power iteration. It divides the output, which is smaller than W.
    """

    def __init__(self, towers: int, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__()
        self.towers, self.kernel, self.stride = towers, kernel, stride
        self.weight = nn.Parameter(torch.empty(towers * outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(towers * outputs))
        self.register_buffer("u", torch.empty(towers, outputs, 1))
        self.register_buffer("v", torch.empty(towers, inputs * kernel**2, 1))

    @torch.no_grad()
    def init_tower(self, tower: int) -> None:
        """Draw one tower's weights as nn.Conv2d does, and its u and v."""
        outputs, inputs = len(self.bias) // self.towers, self.weight.shape[1]
        conv, rows = nn.Conv2d(inputs, outputs, self.kernel), slice(tower * outputs, (tower + 1) * outputs)
        self.weight[rows], self.bias[rows] = conv.weight, conv.bias
        for vectors in (self.u, self.v):
            vectors[tower, :, 0] = F.normalize(torch.randn(vectors.shape[1]), dim=0, eps=1e-12)

    def forward(
        self, x: Optional[torch.Tensor] = None, scale: Optional[torch.Tensor] = None, iterate: bool = False
    ) -> Optional[torch.Tensor]:
        """Convolve x, multiply by a scale (towers, 1, 1, 1) and add the bias.

        Without x return the singular values (towers, 1, 1), float32, with gradient to the weights. With `iterate` run
        a power iteration. All is done here because ZeRO-3 gathers the weights for calls of the module.
        """
        if x is not None:
            x = CircularPad.apply(x) if self.kernel == 3 else x
            x = F.conv2d(x, self.weight, stride=self.stride, groups=self.towers).unflatten(1, (self.towers, -1))
            return torch.addcmul(self.bias.view(self.towers, -1, 1, 1), x, scale).flatten(1, 2)
        if iterate:
            return self.iterate()
        return self.u.transpose(1, 2) @ (self._matrices() @ self.v)

    @torch.no_grad()
    def iterate(self, steps: int = 1) -> None:
        """Move u and v towards the first singular vectors of the weights, in place."""
        matrices = self._matrices()
        for _ in range(steps):
            for vector, product in ((self.u, lambda: matrices @ self.v), (self.v, lambda: matrices.mT @ self.u)):
                result = product()
                torch.div(result, result.norm(dim=1, keepdim=True).clamp(min=1e-12), out=vector)

    def _matrices(self) -> torch.Tensor:
        """Return the weights as a view (towers, outputs, inputs * kernel^2)."""
        return self.weight.flatten(1).unflatten(0, (self.towers, -1))


class TowerGroup(nn.Module):
    """Towers of convolutions, side by side: maps to 64 channels at an eighth of the sides, rounded up.

    A tower is a 1x1 block, then three 3x3 convolutions of stride 2 with residual 3x3 blocks between them, then a 1x1
    convolution. A block f is a convolution, local batch norm and LeakyReLU; a residual block is (f(x) + x) / sqrt(2).

    Attributes:
        gradient_checkpointing: keep only the input for the backward pass.
    """

    gradient_checkpointing = False

    def __init__(self, towers: int, channels: int):
        super().__init__()
        conv = partial(SpectralConv, towers, channels)
        shapes = [(channels, 1), (channels, 3, 2), (channels, 3), (channels, 3, 2), (channels, 3), (channels, 3, 2)]
        self.convs = nn.ModuleList(conv(*shape) for shape in (*shapes, (CONDITION_CHANNELS, 1)))
        self.norms = nn.ModuleDict({str(index): LocalBatchNorm(towers * channels) for index in (0, 2, 4)})
        for tower in range(towers):
            for conv in self.convs:
                conv.init_tower(tower)
        for conv in self.convs:
            conv.iterate(16)  # as often as nn.utils.parametrizations.spectral_norm does

    def forward(self, batches: Sequence[Sequence[torch.Tensor]], one: torch.Tensor) -> torch.Tensor:
        """Run on batches of maps, a map (B, C, h, w) per tower; each batch is normalized by itself.

        Args:
            one: 1, with gradient in training: FSDP2 frees the weights after the backward only if an input takes it.
        Returns:
            (batches, B, towers, 64, h', w').
        """
        with torch.autocast(one.device.type, enabled=False):
            for conv in self.convs if self.training else ():
                conv(iterate=True)  # here, because `_run` may run again in the backward pass
        if self.gradient_checkpointing:
            return checkpoint(self._run, batches, one, use_reentrant=False, preserve_rng_state=False)
        return self._run(batches, one)

    def _run(self, batches: Sequence[Sequence[torch.Tensor]], one: torch.Tensor) -> torch.Tensor:
        x = torch.cat([torch.cat(list(maps), 1) for maps in batches]).float()
        with torch.autocast(one.device.type, enabled=False):
            scales = (one / torch.stack([conv() for conv in self.convs])).unsqueeze(-1)
        for index, (conv, scale) in enumerate(zip(self.convs, scales)):
            before, x = x, conv(x, scale)
            if str(index) in self.norms:
                x = F.leaky_relu(self.norms[str(index)](x, len(batches)), 0.2)
                if index > 0:
                    x = (x + before) / 2**0.5
        return x.unflatten(0, (len(batches), -1)).unflatten(2, (-1, CONDITION_CHANNELS))


class TextMap(nn.Module):
    """A linear map with weights initialized from N(0, 1), scaled by 1 / sqrt(inputs) in the forward, and zero bias."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return F.linear(text, self.weight / self.weight.shape[1] ** 0.5, self.bias)


class Discriminator(nn.Module):
    """A head per feature map: logits = sum over 64 channels of cls(features) * (cmap(text) + refmap(reference)) / 8.

    Args:
        channels: of the maps, and inside the heads.
        num_maps: number of heads.
        text_channels: of the text embedding.
    """

    _no_split_modules = ("TowerGroup",)  # sharded, and gathered, one by one

    def __init__(self, channels: int, num_maps: int, text_channels: int):
        super().__init__()
        starts = range(0, num_maps, TOWERS_PER_GROUP)
        self.groups = [slice(start, min(start + TOWERS_PER_GROUP, num_maps)) for start in starts]
        self.cls, self.refmap = (
            nn.ModuleList(TowerGroup(group.stop - group.start, channels) for group in self.groups) for _ in range(2)
        )
        self.cmap = TextMap(text_channels, num_maps * CONDITION_CHANNELS)

    def forward(
        self, images: Sequence[Sequence[torch.Tensor]], reference: Sequence[torch.Tensor], text: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return logits (B, L), float32, of each of `images`; reference and text are processed once.

        Args:
            images: outputs of `VisionFeatures`, such as (real, fake), with gradient; each is normalized separately.
            reference: output for the images that the prompts belong to, not augmented.
            text: (B, T) of `TextFeatures`.
        """
        one = torch.ones((), device=text.device, requires_grad=self.training and torch.is_grad_enabled())
        text = self.cmap(text).unflatten(1, (-1, CONDITION_CHANNELS))[..., None, None]  # (B, heads, 64, 1, 1)
        logits = []
        for group, cls, refmap in zip(self.groups, self.cls, self.refmap):
            condition = text[:, group] + refmap([reference[group]], one)[0]
            scores = cls([maps[group] for maps in images], one) * condition
            logits.append(scores.float().sum(3).flatten(2) / CONDITION_CHANNELS**0.5)
        return torch.cat(logits, 2).unbind()


class LatentClassifier(nn.Sequential):
    """DMD2's classifier: mid-block features (B, C, height, width) -> one logit per sample (B,), for any C and size.

    Convolutions of stride 2 halve the map until a side is at most 4, one more reduces it to 1 x 1, a linear map
    follows. At 32 x 32 (SDXL at 1024 px) these are the release's four convolutions of kernel 4. Of a larger map more
    than 1 x 1 is left, and logits are averaged. GroupNorm has 32 groups if each has 8 channels or more, else fewer:
    on a 1 x 1 map few values per group would be normalized to almost nothing.

    It computes in the precision of its weights, float32 but where shards are gathered in bfloat16, without autocast.
    """

    without_autocast = True  # for senseflow.models.autocast

    def __init__(self, channels: int, height: int, width: int):
        layers = []
        while min(height, width) > 4:
            layers.append(nn.Conv2d(channels, channels, 4, stride=2, padding=1))
            height, width = height // 2, width // 2
        layers.append(nn.Conv2d(channels, channels, (height, width)))
        norm = partial(nn.GroupNorm, math.gcd(32, max(1, channels // 8)), channels)
        blocks = [part for layer in layers for part in (layer, norm(), nn.SiLU())]
        super().__init__(*blocks, nn.Conv2d(channels, 1, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return super().forward(features.to(self[0].weight.dtype)).flatten(1).mean(1)


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
    for group in (*heads.cls, *heads.refmap):
        group.gradient_checkpointing = args.gradient_checkpointing
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
