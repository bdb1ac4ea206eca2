# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Load the published files of HPS v2.1 and ImageReward, whose tensors have other names, into transformers."""

import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import BlipConfig, BlipTextModel, BlipVisionModel, CLIPConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from senseflow.errors import UserError


def transformer_sizes(width: int, layers: int, heads: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * width}


HPSV2_CONFIG = CLIPConfig(  # open_clip's ViT-H-14
    vision_config=transformer_sizes(1280, layers=32, heads=16) | {"patch_size": 14, "hidden_act": "gelu"},
    text_config=transformer_sizes(1024, layers=24, heads=16) | {"hidden_act": "gelu"},
    projection_dim=1024,
)
IMAGEREWARD_CONFIG = BlipConfig(  # BLIP large
    vision_config=transformer_sizes(1024, layers=24, heads=16) | {"image_size": 224, "layer_norm_eps": 1e-6},
    text_config=transformer_sizes(768, layers=12, heads=12),
)

UNUSED = r"(visual\.)?attn_mask|blip\.(vision|text)_proj\..*|.*\.position_ids"  # computed, or for BLIP's own training
TRANSPOSED = ("visual.proj", "text_projection")
# (regular expression of a part of names in a published file, replacement)
RENAMES = [
    # HPS v2.1
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    # ImageReward
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^mlp\.layers\.", "mlp."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    # Both
    (r"\.attn\.", ".self_attn."),
    (r"\.(ln_|norm)(\d)\.", r".layer_norm\2."),
]


def convert_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of a published file as in transformers. Split packed q, k and v. Transpose projections."""
    converted = {}
    for name, tensor in state.items():
        if re.fullmatch(UNUSED, name):
            continue
        tensor = tensor.T if name in TRANSPOSED else tensor
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        packed = re.fullmatch(r"(.*)\.in_proj_(weight|bias)", name)
        if packed:
            for letter, part in zip("qkv", tensor.chunk(3)):
                converted[f"{packed[1]}.{letter}_proj.{packed[2]}"] = part
        else:
            converted[name] = tensor
    return converted


def load_published(flag: str, file: Path, network: nn.Module) -> nn.Module:
    """Load exactly the weights of a published file into a network; UserError (2) if they are others or damaged."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        network.load_state_dict(convert_names(state.get("state_dict", state)))
    except Exception as error:  # torch.load passes on those of pickle and zip; load_state_dict names wrong weights
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag} {file}: cannot be loaded ({reason}); download the published file again", 2) from error
    return network.eval()


def hpsv2_pixels(side: int, image: Image.Image) -> torch.Tensor:
    """Return the input of HPS v2, (3, side, side): the image scaled to fit in float, and padded with black."""
    pixels, scale = to_tensor(image) / 255, side / max(image.size)
    size = [round(length * scale) for length in pixels.shape[1:]]
    if scale != 1:
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    rows, columns = (side - length for length in size)
    return normalize(F.pad(pixels, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))


def imagereward_pixels(side: int, image: Image.Image) -> torch.Tensor:
    """Return the input of ImageReward, (3, side, side): the shorter side scaled to fit, the longer one cropped."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return normalize(to_tensor(image.crop((left, top, left + side, top + side))) / 255)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an RGB image, (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Normalize pixels in [0, 1] by the mean and the standard deviation of CLIP's images."""
    return (pixels - torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)) / torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)


class ImageReward(nn.Module):
    """A text encoder with cross-attention to the image, and a head on its first token (Xu et al., 2023)."""

    mean, std = 0.16717362830052426, 1.0333394966054072  # of the published network's raw scores

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        width = config.text_config.hidden_size
        sizes = {"0": (width, 1024), "2": (1024, 128), "4": (128, 64), "6": (64, 16), "7": (16, 1)}  # others: dropout
        self.mlp = nn.Sequential(OrderedDict((name, nn.Linear(*shape)) for name, shape in sizes.items()))

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Return the scores (B,) of images (B, 3, H, W) for the tokens (B, L) of their prompts."""
        image_states = self.vision(pixels).last_hidden_state
        states = self.text(
            input_ids,
            attention_mask,
            encoder_hidden_states=image_states,
            encoder_attention_mask=torch.ones(image_states.shape[:2], device=image_states.device),
            is_decoder=False,  # the configuration's True creates the cross-attention; the text is not causal
        ).last_hidden_state
        return (self.mlp(states[:, 0]).float().squeeze(1) - self.mean) / self.std
