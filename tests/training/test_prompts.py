"""Text encoders encode every prompt before training and are freed; the run is the same one, to the bit."""

import gc
import weakref

import pytest

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import assert_same, models_class, refused, states
from senseflow.errors import UserError
from senseflow.models import text_encoders


VALIDATION = ["--validation_prompts", "a red square", "--teacher_num_inference_steps", "2"]
UNCACHED = pytest.StashKey[dict]()
SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}


@pytest.fixture
def flags(teachers, vision, data):
    """flags(name) -> the arguments of a script but the output folder: two iterations, the student in the second."""

    def make(name):
        return [
            *("--pretrained_model_name_or_path", str(teachers[name]), "--dataset_json", str(data)),
            *("--discriminator_backbone", f"{vision}/dinov2", "--discriminator_text_encoder", f"{vision}/clip"),
            *"--ttur_ratio 2 --max_train_steps 2 --checkpointing_steps 1 --learning_rate 1e-3".split(),
            *"--resolution 64 --export_dtype fp32 --report_to none".split(),
            *([] if name == "sdxl" else ["--max_sequence_length", "16"]),
        ]

    return make


@pytest.fixture
def trained(flags, monkeypatch):
    """trained(name, folder, *more): train, and return (encoded, alive).

    encoded is how often the pipeline's encode_prompt was called, alive which text encoders are there after the loop.
    """

    def run(name, folder, *more):
        script, encoders, calls = SCRIPTS[name], {}, []
        pipeline_class = models_class(script).pipeline_class
        encode, cache = pipeline_class.encode_prompt, script.cache_prompts

        def count(pipeline, *args, **kwargs):
            calls.append(args or kwargs["prompt"])
            return encode(pipeline, *args, **kwargs)

        def watch(models, *args):
            parts = {**text_encoders.text_encoders_of(models.pipeline), "discriminator's": models.text_features}
            encoders.update({part_name: weakref.ref(part) for part_name, part in parts.items()})
            return cache(models, *args)

        def export(checkpointer, iteration, export=script.Checkpointer.export):
            gc.collect()
            encoders.update({part_name: reference() for part_name, reference in encoders.items()})
            return export(checkpointer, iteration)

        with monkeypatch.context() as patch:
            patch.setattr(pipeline_class, "encode_prompt", count)
            patch.setattr(script, "cache_prompts", watch)
            patch.setattr(script.Checkpointer, "export", export)
            script.main([*flags(name), *more, "--output_dir", str(folder)])
        assert len(encoders) > 2
        return len(calls), [part_name for part_name, part in encoders.items() if part is not None]

    return run


@pytest.fixture
def uncached(trained, tmp_path_factory, request):
    """uncached(name) -> the output folder of a run that encodes in its loop; each is run once."""
    folders = request.config.stash.setdefault(UNCACHED, {})

    def run(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            _, alive = trained(name, folders[name], *VALIDATION)
            assert len(alive) > 2
        return folders[name]

    return run


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl"])
def test_a_run_with_a_cache_is_the_same_run(name, trained, uncached, tmp_path):
    """To the bit, also of the validation images, and resumed from its first iteration, without encoding again."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    cache = [*VALIDATION, "--cache_dir", str(tmp_path / "cache")]
    encoded, alive = trained(name, whole, *cache)
    assert not alive
    assert_same(states(uncached(name) / "checkpoint-2"), states(whole / "checkpoint-2"))
    images = sorted((whole / "validation").glob("images-*"))
    assert len(images) == 2
    for image in images:
        assert image.read_bytes() == (uncached(name) / "validation" / image.name).read_bytes()
    again, alive = trained(name, resumed, *cache, "--resume_from_checkpoint", str(whole / "checkpoint-1"))
    assert encoded - again == 12 and not alive
    assert_same(states(whole / "checkpoint-2"), states(resumed / "checkpoint-2"))
    if name == "flux":
        file = next((tmp_path / "cache").rglob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(UserError, match=f"{file.name} is damaged or gone"):
            trained(name, tmp_path / "damaged", *cache)


@pytest.mark.parametrize("few, validate", [(True, False), (True, True), (False, True)])
def test_few_prompts_are_kept_in_memory_with_offloaded_encoders(
    few, validate, trained, uncached, tmp_path, monkeypatch, caplog
):
    """More are encoded on the CPU in every iteration, of which a warning tells."""
    monkeypatch.setattr(text_encoders, "MAX_PROMPTS_IN_MEMORY", 12 if few else 11)  # the data set has 12 prompts
    encoded, alive = trained("flux", tmp_path, "--offload_text_encoders", *(VALIDATION if validate else []))
    warned = [
        record.message for record in caplog.records if "s of every iteration; give --cache_dir" in record.message
    ]
    assert len(warned) == (0 if few else 1) and bool(alive) == (not few)
    # In the loop: two batches; validation images of the teacher once and of the student twice; and once for the time.
    assert encoded == (12 + validate if few else 2 + 3 * validate + 1)
    assert_same(states(tmp_path / "checkpoint-2"), states(uncached("flux") / "checkpoint-2"))


def test_what_cannot_be_a_cache_is_refused(flags, tmp_path, capsys):
    """Before any weights load. Root may write everywhere, but not into a file."""
    script, file = train_senseflow_flux, tmp_path / "file"
    file.touch()
    arguments = [*flags("flux"), "--output_dir", str(tmp_path / "out"), "--cache_dir"]
    for path, reason in ((file, "File exists"), (file / "folder", "Not a directory")):
        needle = f"--cache_dir {path}: cannot be written to ({reason}); give a folder that can"
        refused(script, [*arguments, str(path)], 2, needle, capsys)
    stream = ["--streaming", "--dataset_name", str(tmp_path)]
    refused(script, [*arguments, str(tmp_path), *stream], 2, "the prompts of a stream are not known before", capsys)
    assert not (tmp_path / "out").exists()
