# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Scoring networks whose published files are in layouts of their own, read into transformers' classes: HPS v2.1, ImageReward.

Sizes are read from the tensors' shapes; the widths of attention heads, which these do not say, are those of the published networks.
Every tensor of a file has its place, or is named in IGNORED.
"""

import math
import re
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, CLIPConfig, CLIPModel

from senseflow.errors import UserError
from senseflow.models.hub import abbreviate


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's images
HEADS = {"vision": 80, "text": 64, "blip": 64}  # numbers wide
IGNORED = r"(visual\.)?attn_mask|blip\.(vision|text)_proj\..*|.*\.position_ids"  # computed, or of BLIP's own training

# (name in the file, name in the class), by regular expression; {} stands for the tensor's last name.
BLOCK = [
    (r"ln_1\.", "layer_norm1."),
    (r"ln_2\.", "layer_norm2."),
    (r"attn\.out_proj\.", "self_attn.out_proj."),
    (r"mlp\.c_fc\.", "mlp.fc1."),
    (r"mlp\.c_proj\.", "mlp.fc2."),
]
CLIP_NAMES = [
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
    *BLOCK,
]
TRANSPOSED = ("visual.proj", "text_projection")
BLIP_NAMES = [
    (r"^blip\.text_encoder\.", "text."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision.encoder.layers.\1.self_attn.projection."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.", r"vision.encoder.layers.\1.self_attn."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
]


def read_weights(flag: str, file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file or of what torch.save wrote, of a training checkpoint's `state_dict`, too.

    Raises:
        UserError: exit code 2; it is neither.
    """
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        if not state or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError("it holds no tensors by name")
    except Exception as error:  # pickle, zip and safetensors have each their own
        why = " ".join(str(error).split())[:200]
        raise UserError(f"{flag} {file}: no weights can be read ({why}); download it again", 2) from error
    return {name.removeprefix("module."): tensor.float() for name, tensor in state.items()}


def renamed(state: dict[str, torch.Tensor], names: list[tuple[str, str]]) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in state.items():
        if re.fullmatch(IGNORED, name):
            continue
        tensor = tensor.T if name in TRANSPOSED else tensor
        for pattern, new in names:
            name = re.sub(pattern, new, name)
        packed = re.fullmatch(r"(.*)\.attn\.in_proj_(weight|bias)", name)
        if packed is None:
            found[name] = tensor
            continue
        for part, own in zip("qkv", tensor.chunk(3)):
            found[f"{packed[1]}.self_attn.{part}_proj.{packed[2]}"] = own
    return found


def fill_all(flag: str, file: Path, network: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """UserError (2) where a weight is missing, has no place, or is of another shape."""
    own = network.state_dict()
    missing, extra = set(own) - set(state), set(state) - set(own)
    other = {name for name in set(own) & set(state) if own[name].shape != state[name].shape}
    for names, problem in ((missing, "are missing"), (extra, "have no place"), (other, "are of other shapes")):
        if names:
            problem = f"{len(names)} weights of its {type(network).__name__} {problem} ({abbreviate(names)})"
            raise UserError(f"{flag} {file}: {problem}; give the published file", 2)
    network.load_state_dict(state)


def sizes_of(flag: str, file: Path, read: Callable):
    """`read()`, which looks at tensors by name. UserError (2) where one is not there."""
    try:
        return read()
    except KeyError as error:
        raise UserError(f"{flag} {file}: has no weight {error}; give the published file", 2) from error


def layers_in(state: dict[str, torch.Tensor], prefix: str) -> int:
    return 1 + max((int(name[len(prefix) :].split(".")[0]) for name in state if name.startswith(prefix)), default=-1)


# ---------------------------------------------------------------------------------------------------------------------
# HPS v2.1
# ---------------------------------------------------------------------------------------------------------------------
def read_hpsv2(file: Path, flag: str = "--hpsv2") -> CLIPModel:
    """A CLIP in open_clip's layout as a CLIPModel, float32 (HPS v2: Wu et al., 2023; a ViT-H-14). Its score is the cosine.

    Raises:
        UserError: exit code 2; no such network in the file.
    """
    state = read_weights(flag, file)

    def read() -> CLIPConfig:
        patches, (width, _, patch, _) = (
            state["visual.positional_embedding"].shape[0] - 1,
            state["visual.conv1.weight"].shape,
        )
        vocabulary, text_width = state["token_embedding.weight"].shape
        vision = {
            "hidden_size": width,
            "intermediate_size": state["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": layers_in(state, "visual.transformer.resblocks."),
            "num_attention_heads": width // HEADS["vision"],
            "patch_size": patch,
            "image_size": patch * math.isqrt(patches),
        }
        text = {
            "vocab_size": vocabulary,
            "hidden_size": text_width,
            "intermediate_size": state["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": layers_in(state, "transformer.resblocks."),
            "num_attention_heads": text_width // HEADS["text"],
            "max_position_embeddings": state["positional_embedding"].shape[0],
            "eos_token_id": vocabulary - 1,  # at which the text is pooled
        }
        own = {"hidden_act": "gelu"}
        return CLIPConfig(
            text_config=text | own, vision_config=vision | own, projection_dim=state["visual.proj"].shape[1]
        )

    network = CLIPModel(sizes_of(flag, file, read)).eval()
    fill_all(flag, file, network, renamed(state, CLIP_NAMES))
    return network


def hpsv2_pixels(side: int, image: Image.Image) -> torch.Tensor:
    """An image as HPS v2 looks at it, (3, side, side): the longer side scaled to `side`, not rounded to bytes; the rest black."""
    scale, pixels = side / max(image.size), _pixels_of(image)
    size = [round(length * scale) for length in pixels.shape[1:]]
    if scale != 1:
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    high, wide = (side - length for length in size)
    return _normalised(F.pad(pixels, (wide // 2, wide - wide // 2, high // 2, high - high // 2)))


# ---------------------------------------------------------------------------------------------------------------------
# ImageReward
# ---------------------------------------------------------------------------------------------------------------------
class ImageReward(torch.nn.Module):
    """A text encoder that attends to the image, and a head on its first token (Xu et al., 2023)."""

    mean, deviation = 0.16717362830052426, 1.0333394966054072  # of the published network's raw scores

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig, head: list[tuple[int, int]]):
        super().__init__()
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, add_pooling_layer=False)
        # Between the linear layers stood dropout alone; their places in the file are what it left.
        self.mlp = torch.nn.ModuleDict(
            {place: torch.nn.Linear(*shape) for place, shape in zip(("0", "2", "4", "6", "7"), head)}
        )

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Scores (B,) of images (B, 3, H, W) and the tokens (B, L) of their prompts."""
        seen = self.vision(pixels).last_hidden_state
        how = {"encoder_hidden_states": seen, "encoder_attention_mask": torch.ones(seen.shape[:2], device=seen.device)}
        states = self.text(input_ids, attention_mask, **how, is_decoder=False).last_hidden_state[:, 0]
        for layer in self.mlp.values():
            states = layer(states)
        return (states.float().squeeze(1) - self.mean) / self.deviation


def read_imagereward(file: Path, flag: str = "--imagereward") -> ImageReward:
    """The published network, float32, of a file in its own layout.

    Raises:
        UserError: exit code 2; no such network in the file.
    """
    state = read_weights(flag, file)

    def read() -> ImageReward:
        blocks, layers = "blip.visual_encoder.blocks.", "blip.text_encoder.encoder.layer."
        width, _, patch, _ = state["blip.visual_encoder.patch_embed.proj.weight"].shape
        vocabulary, text_width = state["blip.text_encoder.embeddings.word_embeddings.weight"].shape
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=state[f"{blocks}0.mlp.fc1.weight"].shape[0],
            num_hidden_layers=layers_in(state, blocks),
            num_attention_heads=width // HEADS["blip"],
            patch_size=patch,
            image_size=patch * math.isqrt(state["blip.visual_encoder.pos_embed"].shape[1] - 1),
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=vocabulary,
            hidden_size=text_width,
            encoder_hidden_size=width,
            intermediate_size=state[f"{layers}0.intermediate.dense.weight"].shape[0],
            num_hidden_layers=layers_in(state, layers),
            num_attention_heads=text_width // HEADS["blip"],
            max_position_embeddings=state["blip.text_encoder.embeddings.position_embeddings.weight"].shape[0],
            is_decoder=True,  # so that there is attention to the image; it is called as an encoder
        )
        head = [tuple(state[f"mlp.layers.{place}.weight"].T.shape) for place in (0, 2, 4, 6, 7)]
        return ImageReward(vision, text, head).eval()

    network = sizes_of(flag, file, read)
    fill_all(flag, file, network, renamed(state, [*BLIP_NAMES, (r"^mlp\.layers\.", "mlp.")]))
    return network


def imagereward_pixels(side: int, image: Image.Image) -> torch.Tensor:
    """An image as ImageReward looks at it, (3, side, side): the shorter side scaled to `side`, the center of the other."""
    width, height = image.size
    short = min(width, height)
    image = image.resize((side * width // short, side * height // short), Image.Resampling.BICUBIC)
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return _normalised(_pixels_of(image.crop((left, top, left + side, top + side))))


def _pixels_of(image: Image.Image) -> torch.Tensor:
    """(3, H, W) in [0, 1]."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1) / 255


def _normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
