"""The student as a pipeline: how it is called for validation, what is written of it, and its model card."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from senseflow.models.hub import ModelSource
from senseflow.student_config import make_student_config
from senseflow.training import export, validation


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
    levels = {"sigmas": [1.0, 0.5], "timesteps": [1000.0, 500.0], "pixel_multiple": 32, "iteration": 7}
    levels["pipeline_class"] = "EditsImages"

    def config(**pipeline_kwargs):
        return make_student_config(
            args, revision=None, pipeline_kwargs=pipeline_kwargs, teacher_fingerprint="", **levels
        )

    record = config(num_inference_steps=2)
    assert "guidance_scale" not in record and record["pixel_multiple"] == 32 and record["teacher_variant"] == "fp16"
    assert config(guidance_scale=1.0)["guidance_scale"] == 1.0
    source = ModelSource("--model", str(tmp_path))
    export.write_model_card(tmp_path, "pipeline = EditsImages()", args, source, record)
    card = (tmp_path / "README.md").read_text()
    line = next(line for line in card.splitlines() if line.startswith("image = "))
    names = {"pipeline": EditsImages()}
    exec(line, names)
    assert names["pipeline"].prompts == ["a prompt"] and f"Distilled from `{tmp_path}`, variant `fp16` with" in card


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
