"""The student as a pipeline: how it is called for validation, what is written of it, and its model card."""

import ast
import json
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusionXLPipeline
from huggingface_hub import split_torch_state_dict_into_shards
from PIL import Image

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import models_class
from senseflow.models.hub import ModelSource
from senseflow.student_config import make_student_config
from senseflow.training import export, validation
from tiny_pipelines import write_flux, write_sd3, write_sdxl


class EditsImages:
    """A pipeline whose first argument is an image, and whose call takes no guidance_scale."""

    _optional_components: list = []
    scheduler = FlowMatchEulerDiscreteScheduler()
    vae = SimpleNamespace(decode=lambda latents: latents)

    def __call__(self, image=None, prompt=None, generator=None, num_inference_steps=28):
        assert image is None and isinstance(prompt, str)
        self.prompts = [*getattr(self, "prompts", []), prompt]
        self.vae.decode(torch.full((1, 4, 1, 1), float(len(self.prompts))))
        return SimpleNamespace(images=[Image.new("RGB", (8, 8))])


def test_the_prompt_goes_by_its_name(tmp_path):
    split = PartialState().split_between_processes
    accelerator = SimpleNamespace(split_between_processes=split, autocast=torch.no_grad)
    args = SimpleNamespace(validation_prompts=["a cat", "a dog"], num_validation_images=1, seed=0)
    pipeline = EditsImages()
    rows, latents = validation.generate_images(accelerator, pipeline, args, {"num_inference_steps": 4})
    assert [[tuple(each.shape), each.max().item()] for row in latents for each in row] == [
        [(4, 1, 1), 1],
        [(4, 1, 1), 2],
    ]
    assert pipeline.prompts == ["a cat", "a dog"]

    # senseflow.json is that of a call without guidance_scale, and the card's call is the one in it.
    args = SimpleNamespace(sampler="euler", export_dtype="fp32", rank=0, base_quantization="none", variant="fp16")
    args.pretrained_model_name_or_path = str(tmp_path)
    args.resolution, args.aspect_ratio_buckets = [64, 64], [[64, 96], [96, 64]]
    levels = {"sigmas": [1.0, 0.5], "timesteps": [1000.0, 500.0], "pixel_multiple": 32, "iteration": 7}
    levels["pipeline_class"] = "EditsImages"

    def config(**pipeline_kwargs):
        return make_student_config(
            args, revision=None, pipeline_kwargs=pipeline_kwargs, teacher_fingerprint="", **levels
        )

    record = config(num_inference_steps=2)
    assert "guidance_scale" not in record and record["pixel_multiple"] == 32 and record["teacher_variant"] == "fp16"
    assert config(guidance_scale=1.0)["guidance_scale"] == 1.0
    models = SimpleNamespace(source=ModelSource("--model", str(tmp_path)), method="a method", comfyui_shift=None)
    export.write_model_card(tmp_path, "pipeline = EditsImages()", args, models, record)
    card = (tmp_path / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("image = "))
    names = {"pipeline": EditsImages()}
    exec(line, names)
    assert names["pipeline"].prompts == ["a prompt"] and "ComfyUI" not in card
    assert f"Distilled from `{tmp_path.name}`, variant `fp16` with a method: 7 iterations." in card
    assert "on images\nof 64 x 96, 96 x 64 (height x width)." in card


@pytest.mark.parametrize(
    "card, found",
    [
        ("license: other\nlicense_name: flux-dev", {"license": "other", "license_name": "flux-dev"}),
        ("license: apache-2.0", {"license": "apache-2.0"}),
        ("tags: [a", {"license": "other"}),
        ("tags: [a]", {"license": "other"}),
    ],
)
def test_the_teachers_license_is_named(card, found, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{card}\n---\ntext")
    assert export.license_of(ModelSource("--model", str(tmp_path))) == found


@pytest.mark.parametrize("name", ["a 'quoted' \"name\"", "back\\nslash", "a\nline | break"])
def test_any_path_or_prompt_makes_a_valid_card_without_folders(name, tmp_path):
    folder, lora = tmp_path / name, tmp_path / name / f"{name}.safetensors"
    folder.mkdir()
    lora.touch()
    required = ["--pretrained_model_name_or_path", str(folder), "--output_dir", str(tmp_path / "out")]
    given = ["--rank", "2", "--teacher_lora", str(lora), "--variant", name, "--learning_rate", str(7 * 1e-5)]
    args = train_senseflow_sdxl.parse_args([*required, *given, "--validation_prompts", name, "b"])
    source = SimpleNamespace(read_json=lambda file: {}, file=lambda file: None, revision=None)
    levels = {"sigmas": [1.0], "timesteps": [999.0], "pixel_multiple": 8, "iteration": 7, "revision": None}
    config = make_student_config(
        args, **levels, pipeline_kwargs={"a": name}, teacher_fingerprint="", pipeline_class="P"
    )
    models = SimpleNamespace(source=source, pipeline_class=StableDiffusionXLPipeline, network_name="unet")
    vars(models).update(method="DMD2", comfyui_shift=None)
    export.write_model_card(tmp_path, export.adapter_code(args, models, {}, config), args, models, config)

    card = (tmp_path / "README.md").read_text()
    tree = ast.parse(card.split("```python\n")[1].split("```")[0])
    constants = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert {"path/of/this/folder", f"path/of/{name}", f"path/of/{lora.name}", name} <= constants
    assert str(tmp_path) not in card
    rows = [re.split(r"(?<!\\)\|", line) for line in card.splitlines() if line.startswith("|")]
    assert {len(row) for row in rows} == {4}
    table = {row[1].strip(): row[2].strip() for row in rows}
    assert table["learning_rate"] == "7e-05" and table["validation_prompts"].endswith(", b") and "given" not in table
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["lora"] and "base_model:" not in card


# At the default anchors, of a run at 1024 pixels: what was compared with images of ComfyUI (docs/lora.md).
FLUX = "1, 0.904531, 0.759511, 0.512844, 0"
SD3 = "1, 0.9, 0.75, 0.5, 0"
SDXL = "14.6146, 4.08173, 1.61289, 0.693205, 0"


@pytest.mark.parametrize(
    "script, write, sigmas, more",
    [
        (train_senseflow_flux, write_flux, FLUX, {"FluxGuidance": "3.5"}),
        (
            train_senseflow_flux,
            write_flux,
            FLUX,
            {
                "FluxGuidance": "has no effect",
                "ModelSamplingFlux, if the scheduler is simple": "max_shift 1.15, base_shift 0.5, 1024 x 1024",
            },
        ),
        (train_senseflow_sd3, write_sd3, SD3, {}),
        (train_senseflow_sdxl, write_sdxl, SDXL, {}),
    ],
    ids=["flux adapter", "flux", "sd3", "sdxl"],
)
def test_the_card_has_the_settings_of_comfyui(script, write, sigmas, more, tmp_path):
    write(tmp_path)
    cls, adapter = models_class(script), more.get("FluxGuidance") == "3.5"

    def settings(*flags):
        required = ["--pretrained_model_name_or_path", str(tmp_path), "--output_dir", "out", *flags]
        args = script.parse_args([*required, *(["--rank", "2"] if adapter else [])])
        models = cls.__new__(cls)  # no weights load
        models.source = ModelSource("--pretrained_model_name_or_path", str(tmp_path))
        models.schedule, _, call = cls.make_schedule(args, models.source, "cpu")
        embeds = SimpleNamespace(guidance_embeds=adapter)
        models.args, models.student = args, SimpleNamespace(module=SimpleNamespace(config=embeds))
        config = {"num_inference_steps": call["num_inference_steps"], "sampler": args.sampler, "pipeline_call": call}
        text = export.comfyui_section(models, config | ({"rank": 2} if adapter else {}))
        assert ("LoraLoaderModelOnly" in text) == adapter and (f"{cls.network_name}/" in text) != adapter
        rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("|")][2:]
        return {name.strip(): value.strip() for name, value in rows}

    common = {"CFG": "1.0", "denoise": "1.0", "latent": "empty, 1024 x 1024"}
    levels = {"sigmas to paste (ManualSigmas)": sigmas, "or the scheduler": "simple, which visits these sigmas"}
    assert settings() == {"sampler": "lcm", "steps": "4", **common, **levels, **more}
    other = settings("--anchors", "900", "400", *([] if script is train_senseflow_sdxl else ["--sampler", "euler"]))
    assert "or the scheduler" not in other and other["steps"] == "2"
    assert other["sampler"] == ("lcm" if script is train_senseflow_sdxl else "euler")
    if script is train_senseflow_sdxl:  # ComfyUI's own finite level in the place of pure noise
        file = tmp_path / "scheduler/scheduler_config.json"
        changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        v_prediction = settings()
        assert v_prediction["ModelSamplingDiscrete"] == "v_prediction, zsnr true"
        assert v_prediction["sigmas to paste (ManualSigmas)"].startswith("4518.")


def test_the_default_size_of_shards_writes_the_largest_students_into_one_file():
    args = train_senseflow_flux.parse_args(["--pretrained_model_name_or_path", "x", "--output_dir", "x"])
    tensors = {str(number): torch.empty(2**30, device="meta") for number in range(12)}  # FLUX in float32: 48 GB
    assert not split_torch_state_dict_into_shards(tensors, max_shard_size=args.max_shard_size).is_sharded
