"""Random tiny pipelines that train at 64 px on a CPU; nothing is downloaded.

    python tests/tiny_pipelines.py flux DIR              a FluxPipeline with embedded guidance
    python tests/tiny_pipelines.py discriminator DIR     DIR/dinov2 and DIR/clip, for the discriminator's two flags
"""

import argparse
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


# Words get ids of their own; anything else falls apart into characters (T5) or bytes (CLIP), so that prompts differ where
# they should: a byte that CLIP lacked would be read as its end of text, and hide what follows from the pooled embedding.
WORDS = (
    "a an the of on in at and with under over near two three red green blue yellow orange purple pink brown grey black white "
    "dark light small large big old new square circle triangle star ring cat dog bird horse car tree house flower mountain "
    "river city sky sea man woman child photo painting picture left right above below number"
).split()
T5_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
WIDTH = 32


def byte_letters() -> list[str]:
    """The 256 letters in which CLIP's byte-level BPE writes bytes: itself if printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + rest) for rest in range(256 - len(printable))]


def clip_tokenizer() -> CLIPTokenizer:
    """Bytes, with merges that build WORDS."""
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    tokens += byte_letters() + [f"{letter}</w>" for letter in byte_letters()]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:  # from the left, so that words share their beginnings
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            if parts[0] not in tokens:
                tokens.append(parts[0])
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def t5_tokenizer() -> T5TokenizerFast:
    """Unigram pieces: transformers does not restore a T5 tokenizer of any other kind."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in WORDS if len(word) > 1] + [(character, -4.0) for character in T5_CHARACTERS]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def vivid(module: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than at initialisation, so that outputs depend visibly on every input."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


def write_flux(path, guidance_embeds: bool = True, seed: int = 0) -> None:
    """A FluxPipeline with the scheduler configuration of FLUX.1-dev; 64 px are 8 x 8 latents, 16 tokens."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.8,
        shift_factor=0.1,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=1, num_heads=2)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            shift=3.0,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=vivid(vae),
        transformer=vivid(transformer),
        text_encoder=vivid(CLIPTextModel(clip_config(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=vivid(T5EncoderModel(t5)),
        tokenizer_2=tokenizer_2,
    ).save_pretrained(path)


def write_discriminator(path, seed: int = 0) -> None:
    """A DINOv2 (4 blocks, 8 px patches) and a CLIP text encoder with projection."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    vivid(Dinov2Model(config)).save_pretrained(Path(path) / "dinov2")
    tokenizer = clip_tokenizer()
    vivid(CLIPTextModelWithProjection(clip_config(tokenizer))).save_pretrained(Path(path) / "clip")
    tokenizer.save_pretrained(Path(path) / "clip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["flux", "discriminator"])
    parser.add_argument("folder", metavar="DIR")
    args = parser.parse_args()
    {"flux": write_flux, "discriminator": write_discriminator}[args.kind](args.folder)


if __name__ == "__main__":
    main()
