"""Load from folders and the Hub: reasons of failures, the cache without the Hub, variants, commits."""

import json
import os
import re
import shutil
import socket
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    Krea2Pipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import constants, errors
from huggingface_hub.utils import hf_raise_for_status
from safetensors.torch import load_file

import infer
import train_senseflow_flux
import train_senseflow_sdxl
from helpers import assert_same_image, image_of, refused, without
from senseflow.errors import UserError
from senseflow.models import discriminator
from senseflow.models import hub as hub_module
from senseflow.models.hub import ModelSource, check_pipeline, load_network, load_pipeline, saved_components
from tiny_pipelines import cache_repository, only_variant, write_flux, write_sdxl


FIRST, SECOND = "01" * 20, "23" * 20  # commits
TEACHER = "--pretrained_model_name_or_path"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Use an empty cache of the Hub, which is switched off in every test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def no_network(monkeypatch):
    """Switch the Hub on while no host name resolves."""

    def fails(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", fails)


def answer(status: int, code: str = "", message: str = "", file: str = "model_index.json"):
    """Return what huggingface_hub raises for an answer of the Hub."""
    headers = {"X-Error-Code": code, "X-Error-Message": message}
    request = httpx2.Request("GET", f"https://huggingface.co/some/model/resolve/main/{file}")
    response = httpx2.Response(
        status, headers={name: value for name, value in headers.items() if value}, request=request
    )
    with pytest.raises(errors.HfHubHTTPError) as caught:
        hf_raise_for_status(response)
    return caught.value


GATED = answer(403, "GatedRepo")
AGAIN = "try again later, or set HF_HUB_OFFLINE=1 if all of it is in the cache"
ANSWERS = {
    "gated": (
        GATED,
        "gated on the Hub: accept its license at https://huggingface.co/some/model, then .*`hf auth login`",
    ),
    "gated, no token": (answer(401, "GatedRepo"), "gated on the Hub: accept its license"),
    "no repository": (answer(404, "RepoNotFound"), "no such repository, or hides it: check the spelling, or log in"),
    "private": (answer(401), "no such repository, or hides it"),
    "no revision": (
        answer(404, "RevisionNotFound"),
        "no such revision of it: give .*https://huggingface.co/some/model/commits",
    ),
    "no file": (answer(404, "EntryNotFound", file="vae/config.json"), "the Hub lacks https.*/main/vae/config.json"),
    "a bad token": (
        answer(401, message="Invalid credentials in Authorization header"),
        "answers 401: log in with `hf auth login` and a token that may read it",
    ),
    "a weak token": (
        answer(403),
        "answers 403: log in with `hf auth login` and a token that may read it",
    ),
    "too often": (answer(429), f"answers 429: {AGAIN}"),
    "down": (answer(503), f"answers 503: {AGAIN}"),
    "no route": (httpx2.ConnectError("no route"), rf"cannot be reached \(no route\): {AGAIN}"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_errors_give_the_hubs_reason(case, hub, tmp_path, monkeypatch):
    """Check the reason for a bare and a wrapped error, before weights load and while they load."""
    error, reason = ANSWERS[case]

    def refuses(*args, **kwargs):
        raise error

    def library(*args, **kwargs):
        try:
            raise error
        except Exception:
            raise OSError("some/model is not a valid model identifier\nlisted on ...")  # noqa: B904

    with pytest.raises(OSError) as passed_on:
        library()
    assert re.search(reason, hub_module.hub_reason(error)) and re.search(
        reason, hub_module.hub_reason(passed_on.value)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "resolve_revision", refuses)
    with pytest.raises(UserError, match=f"^--flag some/model: no such folder, and .*{reason}") as caught:
        ModelSource("--flag", "some/model").read_json("model_index.json")
    assert caught.value.exit_code == 2
    # While weights load: the message must not blame the files.
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    cache_repository(hub, "some/model", tmp_path / "model", FIRST)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", library)
    with pytest.raises(UserError, match=f"^--flag some/model.*: .*{reason}") as caught:
        load_network(ModelSource("--flag", "some/model"), FluxTransformer2DModel, "transformer")
    assert caught.value.exit_code == 1 and "download or copy" not in str(caught.value)


def test_a_cache_that_cannot_be_written_to_is_named(monkeypatch):
    """At the first look, and while weights load. No process may make folders in /sys/kernel."""

    def write(*args, **kwargs):
        os.makedirs("/sys/kernel/hub/models--some--model")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/sys/kernel/hub")
    monkeypatch.setattr(hub_module, "resolve_revision", write)
    source, reason = ModelSource("--flag", "some/model"), "/sys/kernel/hub cannot be written to .*: set HF_HOME to a"
    with pytest.raises(UserError, match=f"^--flag some/model: .*{reason}"):
        source.read_json("model_index.json")
    with pytest.raises(UserError, match=f"^--flag some/model: {reason}"), source.loading():
        write()


def test_a_revision_that_the_hub_lacks_is_not_taken_from_the_cache(hub, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    cache_repository(hub, "some/model", tmp_path / "model", FIRST)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        hub_module, "resolve_revision", lambda *a, **k: (_ for _ in ()).throw(ANSWERS["no revision"][0])
    )
    with pytest.raises(UserError, match="the Hub has no such revision"):
        ModelSource("--flag", "some/model").read_json("config.json")


def test_every_flag_with_a_hub_id_gives_the_hubs_reason(teacher, vision, data, hub, tmp_path, monkeypatch, capsys):
    write_sdxl(tmp_path / "sdxl")
    capsys.readouterr()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "resolve_revision", lambda *args, **kwargs: (_ for _ in ()).throw(GATED))
    common = ["--dataset_json", str(data), "--resolution", "64", "--output_dir", str(tmp_path / "out")]
    frozen = ["--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")]
    flags = (TEACHER, "--student_model_name_or_path", "--discriminator_backbone", "--discriminator_text_encoder")
    cases = [(train_senseflow_flux, teacher, flag) for flag in flags]
    cases += [(train_senseflow_sdxl, tmp_path / "sdxl", "--pretrained_vae_model_name_or_path")]
    for script, model, flag in cases:
        arguments = [TEACHER, str(model), *common, *frozen, flag, "some/model"]
        refused(
            script,
            arguments,
            2,
            "it is gated on the Hub: accept its license at https://huggingface.co/some/model",
            capsys,
        )
        refused(script, arguments, 2, f"error: {flag} some/model", capsys)
    for flag, model in (("--model", teacher), ("--transformer", teacher), ("--unet", tmp_path / "sdxl")):
        arguments = [
            "--model",
            str(model),
            flag,
            "some/model",
            "--prompt",
            "a hat",
            "--output_dir",
            str(tmp_path / "out"),
        ]
        refused(infer, arguments, 2, f"error: {flag} some/model: no such folder, and it is gated on the Hub", capsys)


def test_a_repository_that_is_not_cached(hub, no_network, monkeypatch):
    with pytest.raises(
        UserError, match=r"some/model: no such folder, and the Hub cannot be reached \(.*not known\): try again"
    ):
        ModelSource("--flag", "some/model").read_json("model_index.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no such folder, and the cache .*/hub.* lacks it .*: unset HF_HUB_OFFLINE"):
        ModelSource("--flag", "some/model").read_json("model_index.json")
    with pytest.raises(UserError, match="no/such/folder: no such folder, and it is no Hub id: give"):
        ModelSource("--flag", "no/such/folder").read_json("model_index.json")


@pytest.mark.parametrize("offline", [True, False], ids=["switched off", "unreachable"])
def test_a_cached_repository_loads_without_the_hub(offline, teacher, vision, hub, tmp_path, no_network, monkeypatch):
    """Load sharded networks, in a pipeline and alone, and the rest of the pipeline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    whole = DiffusionPipeline.from_pretrained(teacher)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards/transformer").glob("*-of-*.safetensors"))) > 1
    cache_repository(hub, "some/teacher", tmp_path / "shards", FIRST)
    cache_repository(hub, "some/network", tmp_path / "shards/transformer", FIRST)
    transformer = load_network(ModelSource("--flag", "some/teacher"), FluxTransformer2DModel, "transformer")
    alone = load_network(ModelSource("--flag", "some/network"), FluxTransformer2DModel, "transformer")
    pipeline = load_pipeline(ModelSource("--flag", "some/teacher"), type(whole), transformer=transformer)
    for found in (transformer, alone):
        assert all(
            np.array_equal(a, b) for a, b in zip(found.state_dict().values(), whole.transformer.state_dict().values())
        )
    assert pipeline.transformer is transformer and pipeline.text_encoder_2 is not None
    for name in ("dinov2", "clip"):
        cache_repository(hub, f"some/{name}", vision / name, FIRST)
    args = {
        "discriminator_backbone": "some/dinov2",
        "discriminator_text_encoder": "some/clip",
        "discriminator_layers": [0],
    }
    args |= {"discriminator_resolution": None, "resolution": [64, 64], "aspect_ratio_buckets": None}
    discriminator.check_discriminator_args(SimpleNamespace(**args))
    discriminator.VisionFeatures("some/dinov2")
    assert discriminator.TextFeatures("some/clip")(["a cat"]).isfinite().all()
    # A shard that was never downloaded.
    next((hub / "models--some--network/snapshots" / FIRST).glob("*00002-of*")).unlink()
    with pytest.raises(UserError, match="some/network: the cache .* lacks it or a part of it"):
        load_network(ModelSource("--flag", "some/network"), FluxTransformer2DModel, "transformer")


def test_a_process_keeps_to_one_commit(hub, tmp_path):
    for commit in (FIRST, SECOND):
        (tmp_path / "card").mkdir(exist_ok=True)
        (tmp_path / "card/config.json").write_text(json.dumps({"commit": commit}))
        cache_repository(hub, "some/model", tmp_path / "card", commit)
        assert ModelSource("--flag", "some/model").read_json("config.json") == {"commit": FIRST}
    assert ModelSource("--flag", "some/model").commit == FIRST
    assert ModelSource("--flag", "some/model", SECOND).commit == SECOND
    assert ModelSource("--flag", "some/model", SECOND).read_json("config.json") == {"commit": SECOND}
    assert ModelSource("--flag", str(tmp_path)).commit is None
    with pytest.raises(UserError, match="--revision main: .* is a folder"):
        _ = ModelSource("--flag", str(tmp_path), "main").commit


def test_a_run_keeps_its_teachers_commit_and_variant(teacher, data, hub, tmp_path, capsys):
    """Train, export, sample and resume with a cached teacher in one variant; then its main branch moves."""
    DiffusionPipeline.from_pretrained(teacher).save_pretrained(
        tmp_path / "fp16", variant="fp16", max_shard_size="20KB"
    )
    (tmp_path / "fp16/README.md").write_text("---\nlicense: apache-2.0\n---\n")
    cache_repository(hub, "some/teacher", tmp_path / "fp16", FIRST)
    flags = [TEACHER, "some/teacher", "--dataset_json", str(data), "--resolution", "64", "--max_sequence_length", "16"]
    flags += [
        "--gan_weight",
        "0",
        "--checkpointing_steps",
        "1",
        "--export_dtype",
        "fp32",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags += ["--max_train_steps"]
    capsys.readouterr()
    refused(
        train_senseflow_flux,
        [*flags, "1"],
        2,
        "text_encoder holds only *.fp16.safetensors: give --variant fp16",
        capsys,
    )
    refused(
        train_senseflow_flux,
        [*flags, "1", "--variant", "bf16"],
        2,
        "holds only *.fp16.safetensors: give --variant",
        capsys,
    )
    flags[-1:] = [
        "--variant",
        "fp16",
        "--student_model_name_or_path",
        str(tmp_path / "fp16/transformer"),
        "--max_train_steps",
    ]
    train_senseflow_flux.main([*flags, "1"])
    out = tmp_path / "out"
    for folder in (out, out / "checkpoint-1"):
        record = json.loads((folder / "senseflow.json").read_text())
        found = {name: record[name] for name in ("teacher", "teacher_revision", "teacher_variant", "pixel_multiple")}
        assert found == {
            "teacher": "some/teacher",
            "teacher_revision": FIRST,
            "teacher_variant": "fp16",
            "pixel_multiple": 16,
        }
    card = (out / "README.md").read_text()
    assert f"`some/teacher`, revision `{FIRST}`, variant `fp16`" in card and "license: apache-2.0" in card
    for name in ("text_encoder", "text_encoder_2", "vae", "tokenizer_2"):  # copied as they are, under plain names
        files = {file.name.replace(".fp16", ""): file for file in (tmp_path / "fp16" / name).iterdir()}
        assert {file.name for file in (out / name).iterdir()} == files.keys()
        for copied in (file for file in (out / name).iterdir() if not file.name.endswith(".index.json")):
            assert copied.read_bytes() == files[copied.name].read_bytes(), copied
    assert len(list((out / "text_encoder_2").glob("model-*.safetensors"))) > 1
    image = image_of(out, tmp_path / "whole")
    assert_same_image(image_of(out / "checkpoint-1", tmp_path / "checkpoint"), image)

    write_flux(tmp_path / "later", seed=5)
    shutil.copytree(
        tmp_path / "fp16/transformer", tmp_path / "later/transformer", dirs_exist_ok=True
    )  # other components, same transformer
    cache_repository(hub, "some/teacher", tmp_path / "later", SECOND)
    hub_module.resolve_repo.cache_clear()
    assert_same_image(image_of(out / "checkpoint-1", tmp_path / "again"), image)
    flags = [*flags[:-1], "--resume_from_checkpoint", "latest", "--max_train_steps", "2"]
    capsys.readouterr()
    refused(train_senseflow_flux, flags, 1, f"was made with {FIRST}; give --revision {FIRST}, or start", capsys)
    cache_repository(hub, "some/teacher", teacher, FIRST)
    (hub / "models--some--teacher/refs/main").write_text(SECOND)
    hub_module.resolve_repo.cache_clear()
    flags += ["--revision", FIRST]
    plain = without(flags, "--variant", "--student_model_name_or_path")
    refused(train_senseflow_flux, plain, 1, "was made with fp16; give --variant fp16, or start", capsys)
    train_senseflow_flux.main(flags)
    assert (out / "checkpoint-2").is_dir() and "license: apache-2.0" in (out / "README.md").read_text()


def test_variants_are_chosen_per_component(teacher, tmp_path):
    """Each component has the variant's weights if there are any, else its plain weights, as in diffusers."""
    mixed = tmp_path / "mixed"
    shutil.copytree(teacher, mixed)
    only_variant(mixed / "vae")
    fp16 = mixed / "vae/diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(fp16, mixed / "vae/diffusion_pytorch_model-1-of-1.ema.safetensors")
    source = ModelSource("--flag", str(mixed), variant="fp16")
    chosen = {part: source.weight_variant(part) for part in ("vae", "transformer", "tokenizer")}
    assert chosen == {"vae": "fp16", "transformer": None, "tokenizer": None}
    for kind, part in ((AutoencoderKL, "vae"), (FluxTransformer2DModel, "transformer")):
        load_network(source, kind, part)
    pipeline = load_pipeline(source, DiffusionPipeline)
    plain = load_file(next((teacher / "vae").glob("*.safetensors")))
    assert all(np.array_equal(plain[name], tensor) for name, tensor in pipeline.vae.state_dict().items())
    with pytest.raises(
        UserError, match=r"vae holds only \*.ema.safetensors and \*.fp16.safetensors: give --variant ema"
    ):
        load_network(ModelSource("--flag", str(mixed)), AutoencoderKL, "vae")
    # Only the VAE, which is handed over, has the variant.
    args = SimpleNamespace(pretrained_vae_model_name_or_path=str(mixed), variant="fp16")
    vae_source = train_senseflow_sdxl.SDXLModels.vae_source(args, source)
    assert isinstance(load_network(vae_source, AutoencoderKL, "vae"), AutoencoderKL)
    for weights in (mixed / "vae").glob("*.safetensors"):
        weights.unlink()
    assert load_pipeline(source, DiffusionPipeline, vae=pipeline.vae).vae is pipeline.vae


def test_files_and_missing_variants_are_refused(teacher, vision, data, tmp_path, capsys):
    def bad(needle, *add):
        flags = [
            TEACHER,
            str(teacher),
            "--dataset_json",
            str(data),
            "--resolution",
            "64",
            "--output_dir",
            str(tmp_path / "out"),
        ]
        flags += [
            "--discriminator_backbone",
            str(vision / "dinov2"),
            "--discriminator_text_encoder",
            str(vision / "clip"),
        ]
        refused(train_senseflow_flux, [*flags, *map(str, add)], 2, needle, capsys)

    (weights,) = (teacher / "transformer").glob("*.safetensors")
    bad(f"{weights}: is a single file; give a folder with a model_index.json", TEACHER, weights)
    bad(f"{teacher}/vae: has no model_index.json", TEACHER, teacher / "vae")
    student = "--student_model_name_or_path"
    bad(f"{student} {weights}: is a single file; give a folder with a config.json", student, weights)
    bad("dinov2/model.safetensors: is a single file; give a folder with a config.json", "--discriminator_backbone",
        vision / "dinov2/model.safetensors")  # fmt: skip
    shutil.copytree(teacher / "transformer", tmp_path / "student")
    only_variant(tmp_path / "student")
    bad("student: it holds only *.fp16.safetensors: give --variant fp16", student, tmp_path / "student")
    bad(f"--variant fp16: {teacher} holds no weights *.fp16.safetensors", "--variant", "fp16")
    bad(f"--revision main: {teacher} is a folder", "--revision", "main")


FLUX, XL = (
    {name: ["somewhere", "Some"] for name in names.split()}
    for names in (
        "scheduler vae text_encoder tokenizer text_encoder_2 tokenizer_2 transformer",
        "scheduler vae text_encoder tokenizer text_encoder_2 tokenizer_2 unet",
    )
)
KREA = {name: ["somewhere", "Some"] for name in "scheduler vae text_encoder tokenizer transformer".split()}
LAYERS = "text_encoder_select_layers"


@pytest.mark.parametrize(
    "cls, index, supported, problem",
    [
        (FluxPipeline, {"_class_name": "FluxPipeline", **FLUX}, (), None),
        (FluxPipeline, {"_class_name": "FluxPipeline", **FLUX, "image_encoder": [None, None]}, (), None),
        (FluxPipeline, {"_class_name": "FluxImg2ImgPipeline", **FLUX}, (), None),
        (FluxPipeline, {"_class_name": "FluxControlNetPipeline", **FLUX, "controlnet": ["a", "b"]}, (), "holds a Fl"),
        (FluxPipeline, {"_class_name": "ChromaPipeline", **KREA}, (), "holds a ChromaPipeline"),
        (FluxPipeline, {"_class_name": "FluxPipeline", **FLUX, "_name_or_path": "a", "no_such": None}, (), None),
        (FluxPipeline, {"_class_name": "FluxPipeline", **FLUX, "is_new": True}, (), "has is_new true in its model_in"),
        (StableDiffusionXLPipeline, {**XL, "force_zeros_for_empty_prompt": True}, (), None),
        (StableDiffusionXLPipeline, {**XL, "force_zeros_for_empty_prompt": False}, (), "has force_zeros_for_empty_pr"),
        (StableDiffusionXLPipeline, {**XL, "add_watermarker": False}, ("add_watermarker",), None),
        (StableDiffusionXLPipeline, {**XL, "requires_aesthetics_score": True}, (), "has requires_aesthetics_score t"),
        (StableDiffusionXLPipeline, {**XL, "requires_aesthetics_score": False}, (), None),
        (Krea2Pipeline, {**KREA, LAYERS: [2, 5, 8, 11, 14, 17], "patch_size": 2}, (LAYERS,), None),
        (Krea2Pipeline, {**KREA, LAYERS: [2, 5]}, (), "has text_encoder_select_layers [2, 5] in its model_index"),
        (Krea2Pipeline, {**KREA, "is_distilled": True}, (), "has is_distilled true"),
    ],
)
def test_a_pipeline_is_what_loads_as_its_class_and_is_called_as_it_is_by_default(
    cls, index, supported, problem, tmp_path
):
    """Entries of model_index.json besides components change the stock call; a list of them is no component."""
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls.__name__, **index}))
    source = ModelSource("--flag", str(tmp_path))
    if problem:
        with pytest.raises(UserError, match=re.escape(problem)) as refusal:
            check_pipeline(source, cls, supported)
        assert refusal.value.exit_code == 2
    else:
        assert check_pipeline(source, cls, supported) == source
    assert set(saved_components(index)) <= {*FLUX, *XL, "controlnet"}


def test_a_network_is_found_by_itself_or_in_a_pipeline(hub, tmp_path):
    both = {"config.json", "vae/config.json"}  # a pipeline with another config.json at the top
    there = {"vae": {"config.json"}, "pipeline": {"vae/config.json"}, "both": both}
    for name, files in there.items():
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("{}")
        cache_repository(hub, f"someone/{name}", tmp_path / name, FIRST)
    for source in (str(tmp_path), "someone"):
        found = {name: ModelSource("--flag", f"{source}/{name}").network_subfolder("vae") for name in there}
        assert found == {"vae": None, "pipeline": "vae", "both": "vae"}
