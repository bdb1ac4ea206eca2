# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""senseflow.json: what is written is read back; see tests/test_infer.py for damaged files."""

from types import SimpleNamespace

from senseflow.models.hub import ModelSource
from senseflow.student_config import make_student_config, read_student_config, write_student_config


def make(rank: int, **changes) -> dict:
    args = SimpleNamespace(
        sampler="stochastic",
        pretrained_model_name_or_path="some/teacher",
        variant=None,
        rank=rank,
        lora_alpha=8.0,
        base_quantization="none",
        teacher_lora=None,
        teacher_lora_scale=0.5,
        resolution=[64, 96],
        aspect_ratio_buckets=None,
    )
    vars(args).update(changes)
    levels = {"sigmas": [1.0, 0.5], "timesteps": [1000.0, 500.0], "pixel_multiple": 16}
    kwargs = {"pipeline_kwargs": {"guidance_scale": 3.5}, "teacher_fingerprint": "abc"}
    kwargs["pipeline_class"] = "FluxPipeline"
    return make_student_config(args, revision="0123", iteration=7, **levels, **kwargs)


def test_a_config_is_read_as_it_was_made(tmp_path):
    config = make(rank=0)
    assert config == {
        "sigmas": [1.0, 0.5],
        "timesteps": [1000.0, 500.0],
        "sampler": "stochastic",
        "num_inference_steps": 2,
        "sizes": [[64, 96]],
        "pixel_multiple": 16,
        "teacher": "some/teacher",
        "teacher_revision": "0123",
        "teacher_variant": None,
        "iteration": 7,
        "pipeline_class": "FluxPipeline",
        "pipeline_call": {"guidance_scale": 3.5},
        "guidance_scale": 3.5,
    }
    (tmp_path / "a").mkdir()
    write_student_config(tmp_path / "a", config)
    assert read_student_config(ModelSource("--model", str(tmp_path)), "a") == config
    assert read_student_config(ModelSource("--model", str(tmp_path))) is None


def test_an_adapter_has_what_its_base_is_made_of(tmp_path):
    (tmp_path / "style.safetensors").touch()
    config = make(rank=4, base_quantization="4bit", teacher_lora=str(tmp_path / "x/../style.safetensors"))
    added = {name: value for name, value in config.items() if name not in make(rank=0)}
    assert added == {
        "rank": 4,
        "lora_alpha": 8.0,
        "teacher_fingerprint": "abc",
        "base_quantization": "4bit",
        "teacher_lora": str(tmp_path / "x/../style.safetensors"),
        "teacher_lora_scale": 0.5,
    }
    (tmp_path / "x").mkdir()
    absolute = make(rank=4, teacher_lora=str(tmp_path / "x/../style.safetensors"))["teacher_lora"]
    assert absolute == str(tmp_path / "style.safetensors")
