"""Build the components of the demo's teacher, a tiny FLUX pipeline of diffusers' and transformers' classes.

    64 x 64 px  -> VAE (8x) ->  8 x 8 x 8 latents  -> packed 2 x 2 ->  16 tokens of 32 numbers

The text encoders are random and frozen: distinct words have distinct embeddings, and the transformer needs no more.
"""

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from scenes import RESOLUTION, all_captions
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast


MAX_SEQUENCE_LENGTH = 6  # T5 tokens: the four words of a caption, the end token, one pad
CLIP_SEQUENCE_LENGTH = 16
TEXT_WIDTH = 32
LATENT_CHANNELS = 8


def build_vae():
    """Build an untrained AutoencoderKL, 8x down, 8 latent channels, without attention."""
    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=RESOLUTION,
    )


def build_transformer():
    """Build an untrained FluxTransformer2DModel (2.1 M parameters) whose guidance embedder outputs zeros."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    # As in DiT, every block starts as the identity and the output as zero; a network this small does not learn shapes
    # otherwise. The guidance embedder starts at zero so that the first stage can ignore it.
    zeroed = [
        transformer.proj_out,
        transformer.norm_out.linear,
        transformer.time_text_embed.guidance_embedder.linear_2,
    ]
    for block in transformer.transformer_blocks:
        zeroed += [block.norm1.linear, block.norm1_context.linear]
    zeroed += [block.norm.linear for block in transformer.single_transformer_blocks]
    for linear in zeroed:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def build_text_encoders():
    """Build the random text encoders: (tokenizer, text_encoder, tokenizer_2, text_encoder_2)."""
    words = sorted({word for caption in all_captions() for word in caption.split()})
    tokenizer = _clip_tokenizer(words)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_SEQUENCE_LENGTH,
            initializer_factor=8.0,  # with the default, pooled embeddings hardly differ between captions
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    tokenizer_2 = _t5_tokenizer(words)
    text_encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer_2),
            d_model=TEXT_WIDTH,
            d_kv=16,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    return tokenizer, text_encoder.eval(), tokenizer_2, text_encoder_2.eval()


def _clip_tokenizer(words):
    """Build a CLIP tokenizer with one token per word of `words`; any other word is split into letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = letters + [letter + "</w>" for letter in letters]
    merges = []
    for word in words:
        pieces = list(word[:-1]) + [word[-1] + "</w>"]
        # Earlier merges apply first, as in the tokenizer; the remaining pieces are joined from the left.
        for left, right in merges:
            for index in range(len(pieces) - 1, 0, -1):
                if (pieces[index - 1], pieces[index]) == (left, right):
                    pieces[index - 1 : index + 1] = [left + right]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            tokens.append(pieces[0])
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        model_max_length=CLIP_SEQUENCE_LENGTH,
    )


def _t5_tokenizer(words):
    """Build a T5 tokenizer with one token per word of `words`; only a Unigram model survives a reload."""
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(f"\u2581{word}", -2.0) for word in words]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=MAX_SEQUENCE_LENGTH)
