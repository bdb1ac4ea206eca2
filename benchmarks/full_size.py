#!/usr/bin/env python
# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Write the configurations of the full-size teachers without weights, and load them with random weights.

    python benchmarks/full_size.py flux DIR      # or sd35-large, sd35-medium, sdxl, discriminator, discriminator-small

The folder has the class names, layout and scheduler of the published pipeline, and the tests' small tokenizers.
"""

import argparse
import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from diffusers import ModelMixin
from transformers import PreTrainedModel

from senseflow.models import discriminator
from senseflow.models.discriminator import Discriminator


ROOT = Path(__file__).resolve().parents[1]
LOADING_INFO = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"), ())

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
FLUX_VAE = {**VAE, "scaling_factor": 0.3611, "shift_factor": 0.1159}
SD3_VAE = {**VAE, "scaling_factor": 1.5305, "shift_factor": 0.0609}
SDXL_VAE = {**VAE, "scaling_factor": 0.13025, "latent_channels": 4}

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
SD3_TEXT_ENCODERS = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5_XXL}

# {name: (name in tests/tiny_pipelines.py, {component: changes to the configuration of the tiny pipeline})}
NETWORKS = {
    "flux": ("flux", {"transformer": FLUX, "vae": FLUX_VAE, "text_encoder": CLIP_L, "text_encoder_2": T5_XXL}),
    "sd35-large": ("sd3", {"transformer": SD35_LARGE, "vae": SD3_VAE, **SD3_TEXT_ENCODERS}),
    "sd35-medium": ("sd3", {"transformer": SD35_MEDIUM, "vae": SD3_VAE, **SD3_TEXT_ENCODERS}),
    "sdxl": ("sdxl", {"unet": SDXL, "vae": SDXL_VAE, "text_encoder": CLIP_L, "text_encoder_2": CLIP_G}),
    "discriminator": ("discriminator", {"dinov2": DINOV2_LARGE, "clip": CLIP_L}),
    "discriminator-small": ("discriminator", {"dinov2": DINOV2_SMALL, "clip": CLIP_L}),
}


def script_of(teacher: str) -> str:
    """Return the name of the training script of a teacher in NETWORKS."""
    return f"train_senseflow_{NETWORKS[teacher][0]}"


def write_configs(name: str, folder: Path, tiny: bool = False) -> None:
    """Write configurations, tokenizers and scheduler of one of NETWORKS, unless the folder exists.

    Args:
        tiny: keep the networks as small as in the tests.
    """
    if folder.exists():
        return
    pipeline, changes = NETWORKS[name]
    command = [sys.executable, ROOT / "tests" / "tiny_pipelines.py", pipeline, folder]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    for component, values in {} if tiny else changes.items():
        config = folder / component / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | values, indent=2))


@contextmanager
def random_weights(device="cpu"):
    """Make `from_pretrained` return networks with random weights on `device`, built from their configurations."""

    def load_diffusers(cls, path, subfolder=None, dtype=None, torch_dtype=None, output_loading_info=False, **_):
        config = cls.load_config(path, subfolder=subfolder)
        network = build(lambda: cls.from_config(config), dtype or torch_dtype)
        return (network, LOADING_INFO) if output_loading_info else network

    def load_transformers(cls, path, subfolder="", dtype=None, torch_dtype=None, output_loading_info=False, **_):
        config = cls.config_class.from_pretrained(path, subfolder=subfolder or "")
        network = build(lambda: cls(config)).to(dtype or torch_dtype)
        return (network, LOADING_INFO) if output_loading_info else network

    def build(make, dtype=None):
        default_dtype = torch.get_default_dtype()
        torch.manual_seed(0)
        torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else torch.float32)
        try:
            with torch.device(device):
                return make().eval()
        finally:
            torch.set_default_dtype(default_dtype)

    def build_discriminator(*args):
        with torch.device(device):
            return Discriminator(*args)

    with (
        mock.patch.object(discriminator, "Discriminator", build_discriminator),
        mock.patch.object(ModelMixin, "from_pretrained", classmethod(load_diffusers)),
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(load_transformers)),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NETWORKS)
    parser.add_argument("folder", metavar="DIR", type=Path)
    args = parser.parse_args()
    write_configs(args.name, args.folder)


if __name__ == "__main__":
    main()
