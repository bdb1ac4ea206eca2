"""Compare every kind of VAE with the stock pipeline's code, and check its precision."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    FluxPipeline,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    QwenImage21Pipeline,
    QwenImageEditPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import built
from senseflow.memory.counter import Counter
from senseflow.models import vae as vae_module
from senseflow.models.hub import ModelSource
from senseflow.models.schedulers import bind_generator
from senseflow.training import validation
from senseflow.training.models import TrainingModels
from senseflow_utils import StatelessRNG
from tiny_pipelines import tiny_vae, vivid, write_sd3, write_sdxl


SIDE = 32
LEVELS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
ATTENTION = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 1}


class NoDraws:
    """Return zeros as noise, so that a posterior's sample is its mean."""

    def normal(self, name, sample_indices, shape):
        return torch.zeros(len(sample_indices), *shape)


def flux(folder):
    """Return (VAE, the stock images -> x0, the stock x0 -> packed latents, pipeline, arguments of its call)."""
    pipeline = FluxPipeline.from_pretrained(folder("flux"))
    encoder = FluxImg2ImgPipeline(**pipeline.components)
    return (
        pipeline.vae,
        lambda images: encoder._encode_vae_image(images, torch.Generator()),
        lambda x0: FluxPipeline._pack_latents(x0, *x0.shape),
        pipeline,
        {"prompt": ["a", "b"]},
    )


def sdxl(folder):
    """Use a mean and a standard deviation per channel, as some derivatives of SDXL do."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder("sdxl"))
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.5], "latents_std": [1.5, 0.7, 2.0, 1.1]}
    pipeline.register_modules(vae=tiny_vae(scaling_factor=0.5, **statistics))
    encoder = StableDiffusionXLImg2ImgPipeline(**pipeline.components)
    return (
        pipeline.vae,
        lambda images: encoder.prepare_latents(images, None, 2, 1, torch.float32, "cpu", add_noise=False),
        lambda x0: x0,
        pipeline,
        {"prompt": ["a", "b"], "guidance_scale": 1.0},
    )


def qwen(folder):
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.7, 2.0, 1.1]
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, joint_attention_dim=8, axes_dims_rope=(4, 6, 6), **ATTENTION
    )
    stock = SimpleNamespace(vae=vae, latent_channels=4)
    return (
        vae,
        lambda images: QwenImageEditPipeline._encode_vae_image(stock, images[:, :, None], None)[:, :, 0],
        lambda x0: QwenImagePipeline._pack_latents(x0, *x0.shape),
        QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer),
        {"prompt_embeds": torch.randn(2, 3, 8), "prompt_embeds_mask": torch.ones(2, 3), "true_cfg_scale": 1.0},
    )


def folding_vae() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIDE
    )
    vae.bn.running_mean.uniform_(-1, 1)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def flux2(folder):
    """Fold latents 2 x 2 into channels and standardize them by the running statistics of a batch norm."""
    vae = folding_vae()
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_single_layers=1,
        joint_attention_dim=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
        **ATTENTION,
    )
    stock = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer)
    return (
        vae,
        lambda images: stock._encode_vae_image(images, None),
        lambda x0: Flux2KleinPipeline._pack_latents(x0),
        stock,
        {"prompt_embeds": torch.randn(2, 3, 8), "guidance_scale": 1.0},
    )


class Ideogram4Models(TrainingModels):
    """Folded channels are (p, p, C), of a pipeline without methods that fold."""

    def fold(self, latents):
        squares = latents.unflatten(2, (-1, 2)).unflatten(4, (-1, 2))  # (B, C, h, p, w, p)
        return squares.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def unfold(self, latents):
        return latents.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4).flatten(2, 3)


def ideogram4(folder):
    """Use the VAE of `flux2` with another order of the folded channels. There is no stock code that encodes."""
    vae = folding_vae()
    config = {"in_channels": 16, "intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": 8}
    transformer = Ideogram4Transformer2DModel(mrope_section=(4, 2, 2), **config, **ATTENTION)
    stock = Ideogram4Pipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, transformer, transformer)
    text = torch.randn(2, 3 + (SIDE // 16) ** 2, 8)
    stock.encode_prompt = lambda prompt, grid_h, grid_w, **kwargs: (
        text,
        *stock._prepare_ids([3, 3], grid_h, grid_w, 3, "cpu"),
    )

    def encode(images):
        latents = vae.encode(images).latent_dist.mean
        tokens = torch.stack([latents[:, :, i::2, j::2] for i in range(2) for j in range(2)], 1).flatten(1, 2)
        mean, var = (tensor.view(1, -1, 1, 1) for tensor in (vae.bn.running_mean, vae.bn.running_var))
        return (tokens - mean) / (var + vae.config.batch_norm_eps).sqrt()

    call = {"prompt": ["a", "b"], "guidance_scale": 1.0, "guidance_schedule": None, "max_sequence_length": 3}
    return vae, encode, lambda x0: x0.flatten(2).mT, stock, call


def sana(folder):
    """Use a VAE without posterior, shift and gradient checkpointing, with other names in its configuration."""
    blocks, widths = ("ResBlock", "EfficientViTBlock", "EfficientViTBlock", "EfficientViTBlock"), (8, 8, 8, 8)
    vae = AutoencoderDC(
        **{"latent_channels": 4, "attention_head_dim": 8, "scaling_factor": 0.5},
        **{"encoder_block_types": blocks, "encoder_block_out_channels": widths, "encoder_layers_per_block": (1,) * 4},
        **{"decoder_block_types": blocks, "decoder_block_out_channels": widths, "decoder_layers_per_block": (1,) * 4},
        **{"encoder_qkv_multiscales": ((),) * 4, "decoder_qkv_multiscales": ((),) * 4},
        **{"downsample_block_type": "Conv", "upsample_block_type": "interpolate"},
    )
    transformer = SanaTransformer2DModel(
        **{"in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 1, "cross_attention_head_dim": 16},
        **{"cross_attention_dim": 16, "caption_channels": 8, "sample_size": 4},
        **ATTENTION,
    )
    text = {"prompt_embeds": torch.randn(2, 3, 8), "prompt_attention_mask": torch.ones(2, 3)}
    return (
        vae,
        lambda images: vae.encode(images).latent * 0.5,
        lambda x0: x0,
        SanaPipeline(None, None, vae, transformer, FlowMatchEulerDiscreteScheduler()),
        {**text, "guidance_scale": 1.0, "use_resolution_binning": False},
    )


KINDS = {"flux": (flux, 8), "sdxl": (sdxl, 8), "qwen": (qwen, 8), "flux2": (flux2, 16), "sana": (sana, 8)}
KINDS["ideogram4"] = ideogram4, 16


@pytest.fixture(scope="module")
def folder(teacher, tmp_path_factory):
    """Return folder(kind) -> folder of a tiny pipeline."""
    written = {"flux": teacher}
    for kind, write in (("sd3", write_sd3), ("sdxl", write_sdxl)):
        written[kind] = tmp_path_factory.mktemp(kind)
        write(written[kind])
    return written.get


@pytest.fixture(params=KINDS)
def stock(request, folder):
    torch.manual_seed(0)
    make, scale = KINDS[request.param]
    vae, encode, pack, pipeline, call = make(folder)
    vivid(vae).eval()
    return SimpleNamespace(vae=vae, encode=encode, pack=pack, pipeline=pipeline, call=call, scale=scale)


def models_of(stock, vae) -> TrainingModels:
    """Return the models of a script for the stock pipeline, of which only the VAE is there."""
    models = object.__new__(Ideogram4Models if isinstance(stock.pipeline, Ideogram4Pipeline) else TrainingModels)
    models.vae, models.pipeline_class = vae, type(stock.pipeline)
    return models


def encode(models, images, rng, sample_indices):
    batch = {"pixel_values": images, "sample_indices": sample_indices}
    return models.real_latents(batch, torch.arange(len(images)), rng)


@torch.no_grad()
def test_latents_and_images_equal_those_of_the_stock_pipeline(stock, monkeypatch):
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mean)
    config, images = dict(stock.vae.config), torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    assert vae_module.vae_scale_of(config) == stock.scale
    models = models_of(stock, stock.vae)
    x0 = encode(models, images, NoDraws(), [0, 1])
    assert x0.shape == (2, *vae_module.latent_shape_of(config, (SIDE, SIDE))) and x0.dtype == torch.float32
    torch.testing.assert_close(x0, stock.encode(images), rtol=1e-4, atol=1e-5)

    # A stock call whose scheduler returns these latents, whatever the network's output.
    x0 = torch.randn_like(x0)
    stock.pipeline.scheduler.step = lambda *args, **kwargs: (stock.pack(x0),)
    stock.pipeline.set_progress_bar_config(disable=True)
    student_samples = stock.pipeline(
        **stock.call, height=SIDE, width=SIDE, num_inference_steps=1, output_type="pt"
    ).images
    decoded = models.decode(x0)
    torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), student_samples, rtol=1e-4, atol=1e-5)
    assert decoded.shape == images.shape and 0.01 < student_samples.std()


@torch.no_grad()
def test_an_alpha_channel_is_opaque_when_encoded_and_over_white_when_decoded():
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.3] * 4, latents_std=[1.5] * 4
    )
    models, images = object.__new__(TrainingModels), torch.rand(2, 3, 64, 64) * 2 - 1
    models.vae, models.pipeline_class = vivid(vae).eval(), QwenImage21Pipeline
    x0 = encode(models, images, NoDraws(), [0, 1])
    opaque = torch.cat([images, torch.ones(2, 1, 64, 64)], 1).unsqueeze(2)
    pipeline = SimpleNamespace(vae=vae, latent_channels=4)
    torch.testing.assert_close(x0, QwenImage21Pipeline._encode_vae_image(pipeline, opaque, None).squeeze(2))
    stock = vae.decode((x0 * 1.5 + 0.3).unsqueeze(2)).sample.squeeze(2).clamp(-1, 1) / 2 + 0.5
    pixels = [Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()) for image in stock]
    over_white = [Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), image) for image in pixels]
    seen = torch.stack(
        [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255 for image in over_white]
    )
    torch.testing.assert_close(models.decode(x0) / 2 + 0.5, seen, rtol=0, atol=0.02)


def test_the_order_of_folded_channels_is_never_assumed(folder):
    vae, _, _, pipeline, _ = ideogram4(folder)
    models = object.__new__(TrainingModels)
    models.vae, models.pipeline_class = vae, type(pipeline)
    with pytest.raises(NotImplementedError, match="Ideogram4Pipeline has no _unpatchify_latents: define fold and unf"):
        models.decode(torch.randn(1, 16, 2, 2))


def test_a_vae_is_loaded_without_its_unused_half(stock, tmp_path):
    """Gradient flows through the decoder, not into its weights."""
    stock.vae.save_pretrained(tmp_path)
    args = SimpleNamespace(mixed_precision="no", rank=0, vae_dtype="auto", gradient_checkpointing=True)

    def load(encodes, decodes):
        return vae_module.load_vae(
            ModelSource("--vae", str(tmp_path)), type(stock.vae), args, "cpu", encodes, decodes, "bf16"
        )

    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    encoder, decoder = (models_of(stock, load(*halves)) for halves in ((True, False), (False, True)))
    whole = models_of(stock, stock.vae)
    assert (
        not list(encoder.vae.decoder.parameters())
        and not list(decoder.vae.encoder.parameters())
        and load(False, False) is None
    )
    x0 = encode(encoder, images, StatelessRNG(0, 0), [3, 5])
    torch.testing.assert_close(x0, encode(whole, images, StatelessRNG(0, 0), [3, 5]), rtol=1e-4, atol=1e-5)
    has_posterior = not isinstance(stock.vae, AutoencoderDC)
    assert (x0 - encode(encoder, images, NoDraws(), [3, 5])).abs().max() > 1e-3 or not has_posterior
    x0 = (0.1 * torch.randn_like(x0)).requires_grad_()
    decoded = decoder.decode(x0)
    torch.testing.assert_close(decoded, whole.decode(x0), rtol=1e-4, atol=1e-5)
    decoded.square().mean().backward()
    assert (x0.grad.abs().flatten(1).sum(1) > 0).all() and all(p.grad is None for p in decoder.vae.parameters())


@pytest.fixture
def bf16():
    """Reset accelerate, which keeps one precision per process, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield "--mixed_precision", "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}


@pytest.mark.parametrize(
    "kind, rank, asked, dtype, decoder_dtype",
    [
        ("flux", "0", "auto", torch.bfloat16, torch.float32),
        ("flux", "4", "auto", torch.bfloat16, torch.bfloat16),
        ("flux", "0", "fp32", torch.float32, torch.float32),
        ("sd3", "0", "auto", torch.float32, torch.float32),
        ("sdxl", "4", "auto", torch.float32, torch.float32),
        ("sdxl", "0", "bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_the_vae_computes_in_its_own_precision_in_training_and_validation(
    kind, rank, asked, dtype, decoder_dtype, folder, data, vision, bf16, tmp_path
):
    """Under autocast, convolutions of a float32 VAE would return bfloat16.

    A stock call in bfloat16 does not upcast a VAE with `force_upcast`, which is for float16. Training's decode agrees
    with it in either precision.
    """
    flags = [
        *(
            "--pretrained_model_name_or_path",
            str(folder(kind)),
            "--dataset_json",
            str(data),
            "--resolution",
            "64",
            *bf16,
        ),
        *("--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")),
        *("--train_batch_size", "2", "--vae_dtype", asked, "--output_dir", str(tmp_path), "--report_to", "none"),
        *("--validation_prompts", "a red square", "--rank", rank),
    ]
    run = built(SCRIPTS[kind], flags)
    vae = run.pipeline.vae
    assert vae.config.force_upcast and vae.dtype == dtype
    assert {tensor.dtype for tensor in run.models.student.parameters.values()} == {torch.float32}
    seen: set = set()
    for half in ("encoder", "decoder"):
        for module in getattr(vae, half).modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _, inputs, output, half=half: seen.add((half, output.dtype)))
    batch = {"pixel_values": torch.rand(2, 3, 64, 64) * 2 - 1, "sample_indices": [0, 1]}
    x0 = run.models.real_latents(batch, torch.arange(2), StatelessRNG(0, 0))
    assert x0.dtype == run.models.decode(x0).dtype == torch.float32
    assert seen == {("encoder", dtype), ("decoder", decoder_dtype)}
    assert all(torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in vae.decoder.parameters())
    assert {tensor.dtype for tensor in run.models.text_features.parameters()} == {torch.float32}

    seen.clear()
    run.pipeline.set_progress_bar_config(disable=True)
    validation.generate_images(run.runtime.accelerator, run.pipeline, run.args, run.pipeline_kwargs)
    assert seen == {("decoder", decoder_dtype)}

    def stock_call(kind):
        generator = torch.Generator().manual_seed(0)
        bind_generator(run.pipeline.scheduler, generator)
        with run.runtime.accelerator.autocast():
            return run.pipeline("a red square", generator=generator, output_type=kind, **run.pipeline_kwargs).images

    with torch.no_grad():
        latents = stock_call("latent").float()
        latents = latents if latents.dim() == 4 else FluxPipeline._unpack_latents(latents, 64, 64, 8)
        decoded = (run.models.decode(latents) / 2 + 0.5).clamp(0, 1)
        assert (stock_call("pt").float() - decoded).abs().mean() < 4e-3  # a stock call's latents are in bfloat16


DC_DECODER = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (32, 32)}
DC_DECODER |= {"layers_per_block": (4, 3), "qkv_multiscales": ((), (5,))}
VIDEO_VAE = {"base_dim": 16, "z_dim": 4, "dim_mult": [1] * 4, "num_res_blocks": 3}
VIDEO_VAE |= {"latents_mean": [0.3] * 4, "latents_std": [1.5] * 4}


@pytest.mark.parametrize(
    "vae",
    [
        AutoencoderKL(layers_per_block=3, block_out_channels=[32, 32], norm_num_groups=8, **LEVELS),
        AutoencoderDC(
            latent_channels=4,
            attention_head_dim=8,
            **{f"{half}_{key}": DC_DECODER[key] for half in ("encoder", "decoder") for key in DC_DECODER},
        ),
        AutoencoderKLQwenImage(**VIDEO_VAE),
        AutoencoderKLQwenImage21(**VIDEO_VAE, decoder_base_dim=16),
        AutoencoderKLWan(**VIDEO_VAE),
    ],
    ids=lambda vae: type(vae).__name__,
)
def test_a_checkpointed_decoder_gives_the_same_gradient_in_less_memory(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    args, found = SimpleNamespace(mixed_precision="no", rank=0, vae_dtype="auto"), []
    for args.gradient_checkpointing in (False, True):
        decoder = vae_module.load_vae(ModelSource("--vae", str(tmp_path)), type(vae), args, "cpu", False, True, "fp32")
        shape = vae_module.latent_shape_of(vae.config, (64, 64))
        x0 = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with Counter() as counter:
            vae_module.decode(decoder, x0, unfold=torch.clone).square().mean().backward()
        found.append((x0.grad, counter.peak))
    (plain, most), (again, less) = found
    assert plain.abs().max() > 0 and torch.equal(plain, again)
    assert less < 0.5 * most
