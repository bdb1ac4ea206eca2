"""Fuse LoRAs of several programs into a teacher, text encoders included, or refuse them by name."""

import copy
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel, PixArtSigmaPipeline, PixArtTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import built, models_class, refused, the_cards_call_is_infers_image
from senseflow.errors import UserError
from senseflow.inference import find_model, load_model_pipeline
from senseflow.models.lora import check_lora_args
from senseflow_utils import Guidance


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
ENCODERS = {
    "flux": ["text_encoder"],
    "sd3": ["text_encoder", "text_encoder_2"],
    "sdxl": ["text_encoder", "text_encoder_2"],
}


@pytest.fixture
def flags(teachers, data, tmp_path):
    """Return flags(name) -> arguments of a script with adapters over a teacher with the LoRA of `lora(name)`."""

    def make(name):
        text = ["--max_sequence_length", "16"] if name != "sdxl" else []
        return [
            *("--pretrained_model_name_or_path", str(teachers[name]), "--dataset_json", str(data)),
            *("--resolution", "64", "--gan_weight", "0", "--rank", "4", "--report_to", "none"),
            *("--output_dir", str(tmp_path / "out"), "--teacher_lora", str(tmp_path / "style.safetensors")),
            *("--teacher_lora_scale", "0.5", "--max_train_steps", "1", *text),
        ]

    return make


def pipeline_of(name, teachers):
    return models_class(SCRIPTS[name]).pipeline_class.from_pretrained(teachers[name])


def write_lora(name: str, teachers, file, form: str = "diffusers") -> dict[str, torch.Tensor]:
    """Write and return a LoRA of network and text encoders, as diffusers or kohya do, or a DoRA of the network."""
    torch.manual_seed(1)
    pipeline, layers, network = pipeline_of(name, teachers), {}, models_class(SCRIPTS[name]).network_name
    for component in (network, *([] if form == "dora" else ENCODERS[name])):
        module = getattr(pipeline, component)
        targets = ["to_q", "to_v"] if component == network else ["q_proj", "out_proj", "fc1"]
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, use_dora=form == "dora")
        inject_adapter_in_model(config, module)
        module.peft_config = {"default": config}
        state = get_peft_model_state_dict(module, adapter_name="default")
        layers |= {f"{component}.{key}": tensor.contiguous() for key, tensor in state.items()}
    if form == "kohya":
        layers = kohya_form(layers, network)
    save_file(layers, file)
    return layers


def kohya_form(layers, network: str) -> dict[str, torch.Tensor]:
    """Rename the tensors of a LoRA as sd-scripts does, which for FLUX has one layer for query, key and value."""
    prefixes, kohya = {network: "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}, {}
    for key, tensor in layers.items():
        component, layer, half = re.fullmatch(r"(\w+)\.(.*)\.lora_(A|B)\.weight", key).groups()
        if network == "transformer" and component == network:
            if not layer.endswith("to_q") or layer.startswith("single"):
                continue
            layer, tensor = "double_blocks.0.img_attn.qkv", torch.cat([tensor] * 3) if half == "B" else tensor
        elif component != network:
            layer = f"text_model.{layer.removeprefix('text_model.')}"
        stem = f"{prefixes[component]}_{layer.replace('.', '_')}"
        kohya |= {f"{stem}.lora_{'down' if half == 'A' else 'up'}.weight": tensor, f"{stem}.alpha": torch.tensor(4.0)}
    return kohya


@torch.no_grad()
@pytest.mark.parametrize(
    "name, form",
    [(name, form) for name in SCRIPTS for form in ("diffusers", "dora", "kohya") if (name, form) != ("sd3", "kohya")],
)
def test_all_of_a_lora_is_in_the_teacher(name, form, flags, teachers, tmp_path, caplog):
    """Diffusers has no reader of kohya's form for SD 3."""
    write_lora(name, teachers, tmp_path / "style.safetensors", form)
    models = built(SCRIPTS[name], flags(name)).models
    assert str(tmp_path) not in caplog.text  # no layer is left out
    stock, plain = pipeline_of(name, teachers), pipeline_of(name, teachers)
    stock.load_lora_weights(tmp_path, weight_name="style.safetensors")
    stock.fuse_lora(components=[models.network_name, *ENCODERS[name]], lora_scale=0.5)

    prompts, t = ("a red square", "blue"), torch.tensor([900.0, 500.0])
    own, x_t, conditions = models.pipeline, torch.randn(2, *models.latent_shape), []
    for models.pipeline in (own, stock, plain):
        conditions.append(models.encode_prompts(prompts))
    for fused, expected, unchanged in zip(*conditions):
        torch.testing.assert_close(fused, expected, rtol=0, atol=1e-6)
        clip_is_in_it = form != "dora" and fused.shape[-1] != 6 and (name != "flux" or fused.dim() == 2)
        assert (fused - unchanged).abs().max() > 0.01 or not clip_is_in_it
    outputs = []
    for pipeline in (own, stock, plain):
        role = copy.copy(models.teacher)
        role.module = role._wrapped = getattr(pipeline, models.network_name)
        outputs.append(models.predict(role, x_t, t, conditions[0], Guidance(torch.full((2,), 3.5), True)).output)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-5)
    assert (outputs[0] - outputs[2]).abs().max() > 0.01


def test_training_the_card_and_infer_fuse_the_text_encoder_alike(flags, teachers, tmp_path):
    write_lora("flux", teachers, tmp_path / "style.safetensors")
    more = ["--ttur_ratio", "1", "--lr_warmup_steps", "0", "--export_dtype", "fp32"]
    train_senseflow_flux.main([*flags("flux"), *more, "--learning_rate", "3e-2"])
    the_cards_call_is_infers_image(tmp_path / "out", "sigmas", tmp_path, fresh=False)
    fused, plain = (
        load_model_pipeline(find_model(str(model)), None, torch.device("cpu"), torch.float32)
        for model in (tmp_path / "out", teachers["flux"])
    )
    pooled = [pipeline.encode_prompt("a red square", None)[1] for pipeline in (fused, plain)]
    assert (pooled[0] - pooled[1]).abs().max() > 0.01


def changed(layers: dict, name: str, kind: str) -> dict[str, torch.Tensor]:
    """Return a LoRA of a kind that no stock pipeline can fuse, made of a plain one in diffusers' form."""
    network = models_class(SCRIPTS[name]).network_name
    layers = {key: tensor for key, tensor in layers.items() if key.startswith(network)}
    query = min(key for key in layers if key.endswith("to_q.lora_A.weight"))
    stem = query.removesuffix(".lora_A.weight")
    if kind == "peft's prefix":
        return {key.replace(network, "base_model.model", 1): tensor for key, tensor in layers.items()}
    if kind == "LoKr":
        return {f"lycoris_{stem.replace('.', '_')}.lokr_w1": torch.ones(2, 2)}
    if kind == "control":  # FLUX's stock loader makes the layer wider
        return {
            f"{network}.x_embedder.lora_A.weight": torch.ones(2, 32),
            f"{network}.x_embedder.lora_B.weight": torch.ones(32, 2),
        }
    added = {
        "size": {query: torch.ones(2, 48)},
        "norm": {f"{network}.transformer_blocks.0.attn.norm_q.weight": torch.ones(16)},
        "kohya's DoRA": {f"{stem}.dora_scale": torch.ones(32, 1)},
        "DoRA of a text encoder": {"text_encoder.encoder.layers.0.mlp.fc1.lora_magnitude_vector": torch.ones(64)},
    }
    return layers | added[kind]


@pytest.mark.parametrize("name, kind, needle", [
    *((name, "peft's prefix", "base_model.model.") for name in SCRIPTS),
    ("sdxl", "LoKr", ".lokr_w1 is of no plain low-rank layer"),
    *((name, "size", "to_q takes ") for name in SCRIPTS),
    ("flux", "kohya's DoRA", "to_q.dora_scale is of no plain"),
    ("flux", "control", "x_embedder takes 16 and returns 32 values, its layer takes 32 and returns 32"),
    ("flux", "norm", "norm_q.weight is of no plain low-rank layer"),
    ("sd3", "DoRA of a text encoder", "fc1.lora_magnitude_vector is of no plain"),
])  # fmt: skip
def test_what_a_stock_pipeline_cannot_fuse_is_refused_before_weights_load(
    name, kind, needle, flags, teachers, tmp_path, capsys
):
    file = tmp_path / "style.safetensors"
    save_file(changed(write_lora(name, teachers, file), name, kind), file)
    capsys.readouterr()
    refused(SCRIPTS[name], flags(name), 2, needle, capsys)


def test_layers_of_text_encoders_that_diffusers_leaves_out_are_named(flags, teachers, tmp_path, caplog):
    file = tmp_path / "style.safetensors"
    layers = write_lora("flux", teachers, file, "kohya")
    t5 = {f"lora_te3_encoder_block_0_layer_0.lora_{half}.weight": torch.ones(2, 2) for half in ("up", "down")}
    save_file(layers | t5, file)
    built(train_senseflow_flux, flags("flux"))
    assert f"{file}: 1 of its 7 layers of text encoders are not in FluxPipeline's (" in caplog.text


def test_rank_is_refused_if_diffusers_has_no_adapters_for_the_network_or_the_pipeline():
    args = train_senseflow_flux.parse_args(
        ["--pretrained_model_name_or_path", "x", "--output_dir", "x", "--dataset_json", "x", "--rank", "4"]
    )
    for network, needle in (
        (PixArtTransformer2DModel, "--rank 4: diffusers' PixArtTransformer2DModel has no add_adapter"),
        (FluxTransformer2DModel, "--rank 4: diffusers' PixArtSigmaPipeline has no save_lora_weights"),
    ):
        with pytest.raises(UserError, match=needle) as refusal:
            check_lora_args(args, PixArtSigmaPipeline, "transformer", network, {})
        assert refusal.value.exit_code == 2
