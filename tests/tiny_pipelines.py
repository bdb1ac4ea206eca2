"""Random tiny pipelines that train at 64 px on a CPU; nothing is downloaded.

    python tests/tiny_pipelines.py flux DIR              a FluxPipeline with embedded guidance
    python tests/tiny_pipelines.py sd3 DIR               a StableDiffusion3Pipeline, built as SD 3.5 Medium is
    python tests/tiny_pipelines.py sdxl DIR              a StableDiffusionXLPipeline
    python tests/tiny_pipelines.py NAME DIR              that of teachers/train_senseflow_NAME.py
    python tests/tiny_pipelines.py discriminator DIR     DIR/dinov2 and DIR/clip, for the discriminator's two flags
                                                         (and DIR/dinov2 for --feature_model of evaluate.py)

Only widths and depths are tiny: classes, schedulers and layouts are those of the real ones.
"""

import argparse
import hashlib
import logging
import os
import string
from pathlib import Path


if __name__ == "__main__":  # a user's first command: no notes of the libraries on packages that are not needed
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


# Words have ids of their own; other text falls apart into characters (T5) or bytes (CLIP), so that prompts differ
# where they should: CLIP would read a byte without an id as the end of the text.
WORDS = (
    "a an the of on in at and with under over near two three red green blue yellow orange purple pink brown grey "
    "black white dark light small large big old new square circle triangle star ring cat dog bird horse car tree "
    "house flower mountain river city sky sea man woman child photo painting picture left right above below number"
).split()
T5_CHARACTERS = string.ascii_letters + string.digits + string.punctuation
WIDTH = 32
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_TEMPLATE = """{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{{ message.content[0].text }}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def byte_letters() -> list[str]:
    """The 256 letters in which CLIP's byte-level BPE writes bytes: itself if printable, else one from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + rest) for rest in range(256 - len(printable))]


def merged(tokens: list[str], words: list[list[str]]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Merges that build words from their letters, and the vocabulary of `tokens` and of what is merged."""
    tokens, merges = [*tokens], []
    for symbols in words:
        while len(symbols) > 1:  # from the left, so that words share their beginnings
            if (symbols[0], symbols[1]) not in merges:
                merges.append((symbols[0], symbols[1]))
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
            if symbols[0] not in tokens:
                tokens.append(symbols[0])
    return {token: index for index, token in enumerate(tokens)}, merges


def clip_tokenizer() -> CLIPTokenizer:
    """Bytes, with merges that build WORDS."""
    tokens = ["<|startoftext|>", "<|endoftext|>"]
    tokens += byte_letters() + [f"{letter}</w>" for letter in byte_letters()]
    vocabulary, merges = merged(tokens, [[*word[:-1], f"{word[-1]}</w>"] for word in WORDS])
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Bytes, with merges that build words of prompts and of the pipelines' templates."""
    template = "system user assistant Describe image detailing color shape size texture quantity text objects think"
    words = (*WORDS, *template.split())
    vocabulary, merges = merged(byte_letters(), [["\u0120", *word] for word in words])
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_tokens(QWEN_TOKENS, special_tokens=True)
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


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
    pieces += [(f"\u2581{word}", -2.0) for word in WORDS if len(word) > 1] + [
        (character, -4.0) for character in T5_CHARACTERS
    ]
    return T5TokenizerFast(vocab=pieces, extra_ids=0)


def vivid(module: torch.nn.Module) -> torch.nn.Module:
    """Larger weights than at initialization, so that outputs depend visibly on every input."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


def tiny_t5(tokenizer: T5TokenizerFast, width: int = WIDTH) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=2 * WIDTH, num_layers=1, num_heads=2)
    return vivid(T5EncoderModel(config))


def tiny_vae(**config) -> AutoencoderKL:
    """8 x, 4 latent channels."""
    return vivid(
        AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            **config,
        )
    )


def write_flux(path, guidance_embeds: bool = True, layers: int = 1, seed: int = 0) -> None:
    """A FluxPipeline with the scheduler configuration of FLUX.1-dev; 64 px are 8 x 8 latents, 16 tokens.

    Args:
        layers: of each kind.
    """
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            shift=3.0,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=tiny_vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.8, shift_factor=0.1),
        transformer=vivid(transformer),
        text_encoder=vivid(CLIPTextModel(clip_config(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=tiny_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
    ).save_pretrained(path)


def write_sd3(path, t5: bool = True, layers: int = 2, seed: int = 0) -> None:
    """Write a StableDiffusion3Pipeline with SD 3.5's scheduler and dual attention in its first block."""
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,  # both CLIPs side by side, padded to T5's width: here it is no wider
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.8, shift_factor=0.1),
        transformer=vivid(transformer),
        text_encoder=vivid(CLIPTextModelWithProjection(clip_config(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=vivid(CLIPTextModelWithProjection(clip_config(tokenizer))),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=tiny_t5(tokenizer_3, width=2 * WIDTH) if t5 else None,
        tokenizer_3=tokenizer_3 if t5 else None,
    ).save_pretrained(path)


def write_sdxl(path, seed: int = 0) -> None:
    """A StableDiffusionXLPipeline with the scheduler of SDXL's base; its mid-block sees 4 x 4 at 64 px."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        projection_class_embeddings_input_dim=6 * 8 + WIDTH,
        cross_attention_dim=2 * WIDTH,
    )
    tokenizer = clip_tokenizer()
    StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            timestep_spacing="leading",
            steps_offset=1,
        ),
        vae=tiny_vae(scaling_factor=0.13),
        unet=vivid(unet),
        text_encoder=vivid(CLIPTextModel(clip_config(tokenizer))),
        tokenizer=tokenizer,
        text_encoder_2=vivid(CLIPTextModelWithProjection(clip_config(tokenizer))),
        tokenizer_2=clip_tokenizer(),
    ).save_pretrained(path)


# ---------------------------------------------------------------------------------------------------------------------
# Teachers of teachers/train_senseflow_NAME.py: write_NAME
# ---------------------------------------------------------------------------------------------------------------------
TEXT = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def tiny_qwen3(tokenizer: Qwen2Tokenizer, cls: type = Qwen3Model, layers: int = 3):
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=layers, head_dim=16, **TEXT)
    return vivid(cls(config))


def write_qwenimage(path, seed: int = 0) -> None:
    """A QwenImagePipeline with the scheduler configuration of Qwen-Image; 64 px are 8 x 8 latents, 16 tokens."""
    torch.manual_seed(seed)
    tokenizer, rope = qwen_tokenizer(), {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "rope_parameters": rope, **TEXT}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": WIDTH}
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=tiny_qwen_vae(),
        text_encoder=vivid(
            Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
        ),
        tokenizer=tokenizer,
        transformer=vivid(transformer),
    ).save_pretrained(path)  # fmt: skip


def write_zimage(path, seed: int = 0) -> None:
    """A ZImagePipeline with a fixed shift; 64 px are 8 x 8 latents, 16 tokens, which the network pads to 32."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=vivid(transformer),
    ).save_pretrained(path)


def tiny_folding_vae() -> AutoencoderKLFlux2:
    """8 x, 4 latent channels, folded to 16 x and 16 channels by the statistics of a batch norm."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=64
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return vivid(vae)


def tiny_flux2_transformer(guidance_embeds: bool) -> Flux2Transformer2DModel:
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=3 * WIDTH, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    return vivid(transformer)


def write_flux2(path, seed: int = 0) -> None:
    """A Flux2Pipeline with a plain tokenizer, since its own processor needs torchvision; 64 px are 16 tokens."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    text = {"model_type": "mistral", "vocab_size": len(tokenizer), "num_hidden_layers": 31, "head_dim": 16, **TEXT}
    vision = {"model_type": "pixtral", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "intermediate_size": 32, "image_size": 32, "patch_size": 16}  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))
    with torch.no_grad():
        encoder.get_input_embeddings().weight.mul_(10)  # few tokens are of the prompt
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_folding_vae(),
        text_encoder=vivid(encoder),  # the pipeline reads layers 10, 20 and 30
        tokenizer=tokenizer,
        transformer=tiny_flux2_transformer(guidance_embeds=True),
    ).save_pretrained(path)


def write_flux2_klein(path, seed: int = 0) -> None:
    """A Flux2KleinPipeline; 64 px are 4 x 4 folded latents, 16 tokens."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_folding_vae(),
        text_encoder=tiny_qwen3(tokenizer, Qwen3ForCausalLM, layers=28),  # the pipeline reads layers 9, 18 and 27
        tokenizer=tokenizer,
        transformer=tiny_flux2_transformer(guidance_embeds=False),
    ).save_pretrained(path)


QWEN3_VL_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": WIDTH}


def qwen3_vl_config(tokenizer: Qwen2Tokenizer, layers: int) -> Qwen3VLConfig:
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e6}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": layers, "head_dim": 16, "rope_parameters": rope, **TEXT}
    vision = {**QWEN3_VL_VISION, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=text, vision_config=vision)


def tiny_qwen_vae() -> AutoencoderKLQwenImage:
    """8 x, 4 latent channels, with a frame axis."""
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 2.0, 1.1]}
    return vivid(AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1, **statistics))


def write_krea2(path, seed: int = 0) -> None:
    """A Krea2Pipeline with the scheduler configuration that its docstring names; 64 px are 16 tokens."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=WIDTH, num_text_layers=2,
        text_num_attention_heads=2, text_num_key_value_heads=2, text_intermediate_size=32,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    Krea2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=6400
        ),
        vae=tiny_qwen_vae(),
        text_encoder=vivid(Qwen3VLModel(qwen3_vl_config(tokenizer, 3))),
        tokenizer=tokenizer,
        transformer=vivid(transformer),
        text_encoder_select_layers=(1, 3),
    ).save_pretrained(path)


def write_qwenimage21(path, seed: int = 0) -> None:
    """A QwenImage21Pipeline with the scheduler configuration of Qwen-Image 2.1; 64 px are 4 x 4 latents, 16 tokens.

    Its own processor needs torchvision: Llava's does the same with text.
    """
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, num_res_blocks=1,
        latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1],
    )  # fmt: skip
    kwargs = {"patch_size": 16, "chat_template": QWEN_TEMPLATE, "image_token": "<|image_pad|>"}
    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer, **kwargs)
    QwenImage21Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=256, max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=vivid(vae),
        text_encoder=vivid(Qwen3VLForConditionalGeneration(qwen3_vl_config(tokenizer, 2))),
        processor=processor,
        transformer=vivid(transformer),
    ).save_pretrained(path)  # fmt: skip


def write_ideogram4(path, seed: int = 0) -> None:
    """An Ideogram4Pipeline of two networks; 64 px are 4 x 4 folded latents, 16 tokens."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    networks = [
        Ideogram4Transformer2DModel(
            in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=32,
            adaln_dim=16, llm_features_dim=13 * WIDTH, mrope_section=(4, 2, 2),
        )
        for _ in range(2)
    ]  # fmt: skip
    Ideogram4Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_folding_vae(),
        text_encoder=vivid(Qwen3VLModel(qwen3_vl_config(tokenizer, 36))),  # the pipeline reads layers up to 35
        tokenizer=tokenizer,
        transformer=vivid(networks[0]),
        unconditional_transformer=vivid(networks[1]),
    ).save_pretrained(path)


def write_ovis_image(path, seed: int = 0) -> None:
    """An OvisImagePipeline; 64 px are 8 x 8 latents, 16 tokens."""
    torch.manual_seed(seed)
    tokenizer = qwen_tokenizer()
    transformer = OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    OvisImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=tiny_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tiny_qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=vivid(transformer),
    ).save_pretrained(path)


def write_chroma(path, seed: int = 0) -> None:
    """A ChromaPipeline with levels that are not shifted, as Chroma1-HD's; 64 px are 8 x 8 latents, 16 tokens."""
    torch.manual_seed(seed)
    tokenizer = t5_tokenizer()
    transformer = ChromaTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
        approximator_hidden_dim=32, approximator_layers=2,
    )  # fmt: skip
    ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=tiny_t5(tokenizer),
        tokenizer=tokenizer,
        transformer=vivid(transformer),
    ).save_pretrained(path)


def gemma_tokenizer() -> GemmaTokenizer:
    """Letters, with merges that build WORDS after a space, and bytes for what is not in the vocabulary."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary, merges = merged([*tokens, "\u2581", *T5_CHARACTERS], [["\u2581", *word] for word in WORDS])
    return GemmaTokenizer(vocab=vocabulary, merges=merges)


def write_sana(path, seed: int = 0) -> None:
    """A SanaPipeline with the scheduler of diffusers' conversion script; 64 px are 2 x 2 latents, 4 tokens."""
    torch.manual_seed(seed)
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=16,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=WIDTH, caption_channels=WIDTH,
        qk_norm="rms_norm_across_heads", sample_size=32, timestep_scale=0.5,
    )  # fmt: skip
    blocks, scales = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3, ((), (), (), (5,), (5,), (5,))
    halves = {"block_types": blocks, "block_out_channels": (8,) * 6, "layers_per_block": (1,) * 6}
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=8, encoder_qkv_multiscales=scales, decoder_qkv_multiscales=scales,
        scaling_factor=0.41407, **{f"{half}_{key}": halves[key] for half in ("encoder", "decoder") for key in halves},
    )  # fmt: skip
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "head_dim": 16, "query_pre_attn_scalar": 16, **TEXT}
    SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
        vae=vivid(vae),
        text_encoder=vivid(Gemma2Model(Gemma2Config(**text))),
        tokenizer=tokenizer,
        transformer=vivid(transformer),
    ).save_pretrained(path)  # fmt: skip


def write_discriminator(path, seed: int = 0) -> None:
    """A DINOv2 (4 blocks, 8 px patches) with its image processor, and a CLIP text encoder with projection."""
    torch.manual_seed(seed)
    config = Dinov2Config(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=8
    )
    vivid(Dinov2Model(config)).save_pretrained(Path(path) / "dinov2")
    size = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    BitImageProcessorPil(**size).save_pretrained(Path(path) / "dinov2")
    tokenizer = clip_tokenizer()
    vivid(CLIPTextModelWithProjection(clip_config(tokenizer))).save_pretrained(Path(path) / "clip")
    tokenizer.save_pretrained(Path(path) / "clip")


def only_variant(folder, variant: str = "fp16") -> None:
    """Renames the weights of a pipeline or network as `save_pretrained(variant=...)` names them."""
    for weights in Path(folder).rglob("*.safetensors"):
        weights.rename(weights.with_suffix(f".{variant}.safetensors"))


def cache_repository(cache, name: str, source, commit: str, subfolder: str = "") -> None:
    """Puts a folder into a cache of the Hub, as `name` at `commit`, which its main branch then is."""
    repository = Path(cache) / f"models--{name.replace('/', '--')}"
    for file in (file for file in Path(source).rglob("*") if file.is_file()):
        content = file.read_bytes()
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        pointer = repository / "snapshots" / commit / subfolder / file.relative_to(source)
        for place in (blob, pointer):
            place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        pointer.unlink(missing_ok=True)
        pointer.symlink_to(blob)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    writers = {name.removeprefix("write_"): write for name, write in globals().items() if name.startswith("write_")}
    parser.add_argument("kind", choices=writers)
    parser.add_argument("folder", metavar="DIR")
    args = parser.parse_args()
    writers[args.kind](args.folder)


if __name__ == "__main__":
    main()
