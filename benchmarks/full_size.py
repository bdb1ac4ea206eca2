# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The teachers at full size as folders of configurations without weights, and networks that are made of those alone.

    python benchmarks/full_size.py flux DIR      # or sd35-large, sd35-medium, sdxl, discriminator

A folder has the class names, layouts and schedulers of the real pipeline; the tokenizers are small ones of the tests'.
"""

import argparse
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from diffusers import ModelMixin
from transformers import PreTrainedModel

from senseflow.models import discriminator
from senseflow.models.discriminator import Discriminator
from tiny_pipelines import write_discriminator, write_flux, write_sd3, write_sdxl


CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
CLIP_L, CLIP_G = ({**config, "vocab_size": 49408, "max_position_embeddings": 77} for config in (CLIP_L, CLIP_G))
T5_XXL = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
T5_XXL = {
    **T5_XXL,
    "feed_forward_proj": "gated-gelu",
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "tie_word_embeddings": False,
}
VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "latent_channels": 16,
}
VAE_OF_FLUX = {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
VAE_OF_SD3 = {**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
VAE_OF_SDXL = {**VAE, "scaling_factor": 0.13025, "latent_channels": 4}

FLUX = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": [16, 56, 56],
}
SD3 = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
}
SD35_MEDIUM = {
    **SD3,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
}
SD35_LARGE = {
    **SD3,
    "num_layers": 38,
    "attention_head_dim": 64,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
    "dual_attention_layers": [],
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DINOV2_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "mlp_ratio": 4}
DINOV2_LARGE = {**DINOV2_LARGE, "image_size": 518, "patch_size": 14}
DINOV2_SMALL = {**DINOV2_LARGE, "hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}

# {folder: ({component: what of its configuration differs from the tests' tiny one}, who writes the tiny one, script)}
TEACHERS = {
    "flux": (
        {"transformer": FLUX, "vae": VAE_OF_FLUX, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}, write_flux, "flux"
    ),
    "sd35-large": (
        {
            "transformer": SD35_LARGE, "vae": VAE_OF_SD3,
            "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL,
        }, write_sd3, "sd3"
    ),
    "sd35-medium": (
        {
            "transformer": SD35_MEDIUM, "vae": VAE_OF_SD3,
            "text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL,
        }, write_sd3, "sd3"
    ),
    "sdxl": (
        {"unet": SDXL, "vae": VAE_OF_SDXL, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}, write_sdxl, "sdxl"
    ),
    "discriminator": ({"dinov2": DINOV2_LARGE, "clip": CLIP_L}, write_discriminator, None),
    "discriminator-small": ({"dinov2": DINOV2_SMALL, "clip": CLIP_L}, write_discriminator, None),
}  # fmt: skip


def write(kind: str, folder: Path, tiny: bool = False) -> None:
    """Writes the folder of a teacher, or "discriminator": configurations, tokenizers and scheduler, no weights.

    Args:
        tiny: leave the networks as small as the tests have them.
    """
    components, write_tiny, _ = TEACHERS[kind]
    with tempfile.TemporaryDirectory() as made:
        write_tiny(made)
        for source in sorted(Path(made).rglob("*")):
            place = Path(folder) / source.relative_to(made)
            if source.is_file() and source.suffix != ".safetensors":
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(source.read_bytes())
    for component, changes in {} if tiny else components.items():
        config = Path(folder) / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes, indent=2))


@contextmanager
def random_weights(device=None):
    """While it is open, whoever loads a network's weights gets random ones on `device`, after the network's configuration alone."""

    def of_diffusers(kind, path, subfolder=None, dtype=None, torch_dtype=None, output_loading_info=False, **_):
        config = kind.load_config(path, subfolder=subfolder)
        network = made(lambda: kind.from_config(config), dtype or torch_dtype)
        return (network, {"missing_keys": [], "unexpected_keys": []}) if output_loading_info else network

    def of_transformers(kind, path, subfolder="", dtype=None, torch_dtype=None, output_loading_info=False, **_):
        config = kind.config_class.from_pretrained(path, subfolder=subfolder or "")
        network = made(lambda: kind(config), None).to(dtype or torch_dtype)
        info = {name: set() for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return (network, info) if output_loading_info else network

    def made(make, dtype):
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else torch.float32)
        try:
            with torch.device(device or "cpu"):
                return make().eval()
        finally:
            torch.set_default_dtype(before)

    def heads(*args):
        with torch.device(device or "cpu"):
            return Discriminator(*args)

    with (
        mock.patch.object(discriminator, "Discriminator", heads),
        mock.patch.object(ModelMixin, "from_pretrained", classmethod(of_diffusers)),
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(of_transformers)),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=TEACHERS)
    parser.add_argument("folder", metavar="DIR", type=Path)
    args = parser.parse_args()
    write(args.kind, args.folder)


if __name__ == "__main__":
    main()
