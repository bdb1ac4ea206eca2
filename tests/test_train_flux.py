"""The real FLUX script on a tiny pipeline: everything on, resume, export, DDP, prompts only, warm start, bad input."""

import copy
import errno
import io
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

import infer
import train_senseflow_flux as script
from helpers import (
    ROOT,
    assert_guided_where_asked,
    assert_same,
    assert_same_image,
    built,
    image_of,
    launch,
    logged,
    missing,
    refused,
    resume_is_the_same_run,
    run_card,
    states,
    the_cards_call_is_infers_image,
    without,
    without_gan,
)
from senseflow.errors import UserError
from senseflow.models.weights import fingerprint
from senseflow.training import checkpoints, export
from stock_call import assert_called_as_stock
from tiny_pipelines import write_discriminator, write_flux


SCRIPT = "train_senseflow_flux.py"


@pytest.fixture
def flags(teacher, vision, data):
    """Everything on: GAN, ISG, IDA, accumulation 2, the student in every second iteration."""
    return [
        *("--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data), "--resolution", "64"),
        *("--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")),
        *(
            "--train_batch_size",
            "2",
            "--gradient_accumulation_steps",
            "2",
            "--ttur_ratio",
            "2",
            "--learning_rate",
            "1e-3",
        ),
        *(
            "--lr_warmup_steps",
            "4",
            "--max_train_steps",
            "4",
            "--checkpointing_steps",
            "2",
            "--max_sequence_length",
            "16",
        ),
        *("--export_dtype", "fp32", "--random_flip"),
    ]


def test_everything_on_resume_export_and_a_stock_call(flags, data, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    validation = ["--validation_prompts", "a red square", "a blue square", "--validation_steps", "3"]
    validation += ["--num_validation_images", "2"]
    whole = resume_is_the_same_run(script, flags, tmp_path, *validation)
    halves = tmp_path / "halves"
    assert (
        sorted(p.name for p in halves.glob("checkpoint-*")) == ["checkpoint-4"]
        and len(list(whole.glob("checkpoint-*"))) == 2
    )

    # What was logged.
    events = logged(whole)
    losses = {
        "dmd_loss",
        "isg_loss",
        "adversarial_loss",
        "fake_loss",
        "discriminator_loss",
        "real_logits",
        "fake_logits",
    }
    norms = {"student_grad_norm", "fake_score_grad_norm", "discriminator_grad_norm"}
    assert losses | norms | {"dmd_non_finite", "lr", "samples_per_second"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("fake_loss")] == [1, 2, 3, 4]
    seen = {
        f"signal/{name}" for name in "diversity saturation contrast sharpness latent_diversity latent_contrast".split()
    }
    assert {f"signal/{name}" for name in "fake_lag fake_error dmd_ratio update_ratio".split()} <= set(
        events.Tags()["scalars"]
    )
    found = json.loads((whole / "checkpoint-4" / "validation.json").read_text())
    assert found.pop("iteration") == 4
    assert found == {name: pytest.approx(events.Scalars(name)[-1].value, rel=1e-6) for name in seen}
    # Images before the first iteration, at --validation_steps and after the last; a resumed run has no first one. Each
    # is the same on the disk and in the tracker: the teacher's two and the student's two of each prompt. A panel shows
    # the last student update since the start.
    for folder, steps, panels in ((whole, [0, 3, 4], [3, 4]), (halves, [3, 4], [4])):
        expected = {f"images-{step}.png" for step in steps} | {f"panel-{step}.png" for step in panels}
        assert {path.name for path in (folder / "validation").iterdir()} == expected
        assert [e.step for e in logged(folder).Images("validation/images")] == steps
    tracked = Image.open(io.BytesIO(events.Images("validation/images")[1].encoded_image_string))
    stored = Image.open(whole / "validation" / "images-3.png")
    assert stored.width == 4 * 64 and stored.height > 2 * 64 and np.array_equal(tracked, stored)

    # The pipeline: a fresh process, the stock call of the card, the levels of training, the image of infer.py.
    record = json.loads((whole / "senseflow.json").read_text())
    assert record["num_inference_steps"] == 4 and record["iteration"] == 4 and record["sampler"] == "stochastic"
    the_cards_call_is_infers_image(whole, "sigmas", tmp_path)

    # The log of a run: its global batch is not the recipe's, and its last line is the command that samples from it.
    batch = "a global batch of 4, and the defaults are for 8: give --gradient_accumulation_steps 4, or"
    assert caplog.text.count(batch) == 3, caplog.text
    _, script_path, *arguments = shlex.split(re.search(r"to generate an image: (python .*)", caplog.text)[1])
    assert Path(script_path).resolve() == ROOT / "infer.py" and arguments[3] == "a red square"
    infer.main([*arguments, "--seed", "3"])
    command_image = np.asarray(Image.open(whole / "samples" / "0000.png"))
    assert_same_image(command_image, image_of(whole, tmp_path / "images"))

    # A checkpoint is usable as it stands, and the student in it is the one that was exported.
    FluxTransformer2DModel.from_pretrained(whole / "checkpoint-4", subfolder="transformer")
    assert_same_image(image_of(whole / "checkpoint-4", tmp_path / "c"), image_of(whole, tmp_path / "images"))

    # Stored state that is of no use is refused.
    write_discriminator(tmp_path / "vision", seed=1)
    other = tmp_path / "other"
    shutil.copytree(halves, other)
    state = json.loads((other / "checkpoint-4" / "state.json").read_text())
    state["fingerprint"]["teacher"] = "0" * 16
    (other / "checkpoint-4" / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match="another teacher"):
        script.main([*flags, "--output_dir", str(other), "--resume_from_checkpoint", "latest"])
    with pytest.raises(UserError, match="another discriminator_backbone"):
        backbone = ["--discriminator_backbone", str(tmp_path / "vision" / "dinov2")]
        script.main([*flags, *backbone, "--output_dir", str(halves), "--resume_from_checkpoint", "latest"])
    with pytest.raises(UserError, match="holds later ones .checkpoint-4") as error:
        resume = ["--output_dir", str(whole), "--resume_from_checkpoint", str(whole / "checkpoint-2")]
        script.main([*flags, *resume])
    assert error.value.exit_code == 2
    weights = halves / "checkpoint-4" / "fake_score" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "the data set (" not in caplog.text  # it is the same until here
    content = json.loads(data.read_text())
    content["image_paths"] = [str(data.parent / path) for path in content["image_paths"]]
    content["prompts"][3] = "another prompt"
    (tmp_path / "data.json").write_text(json.dumps(content))
    others = [*without(flags, "--dataset_json"), "--dataset_json", str(tmp_path / "data.json")]
    with pytest.raises(UserError, match="--resume_from_checkpoint") as error:
        script.main(
            [*others, "--output_dir", str(halves), "--resume_from_checkpoint", "latest", "--max_train_steps", "6"]
        )
    assert re.search(r"changed: .*the data set \(12 rows, hash (\w+) -> 12 rows, hash (?!\1)\w+\)", caplog.text)
    assert error.value.exit_code == 1
    # The disk must hold what is to come, of iterations 1 to 4 or 3 and 4, and the export.
    size = sum(file.stat().st_size for file in (whole / "checkpoint-4").rglob("*") if file.is_file())
    export_size = sum(file.stat().st_size for file in whole.glob("[!c]*/*.safetensors"))
    for steps, limit, number, fix in (
        ("1", "9", 4, "give --checkpoints_total_limit 2, free some space"),
        ("3", "9", 2, "are free; free some space"),
        ("1", "2", 3, "give --checkpoints_total_limit 1, free some space"),
    ):
        free = int((number - 0.5) * size) + export_size
        monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, free))  # noqa: B023
        few = ["--checkpointing_steps", steps, "--checkpoints_total_limit", limit]
        with pytest.raises(UserError, match=f"{number} checkpoints of .* and the export of .*{fix}"):
            script.main([*flags, *few, "--output_dir", str(tmp_path / "full")])


@pytest.fixture
def build(flags, tmp_path):
    """build(*flags) -> what tests/scripts.py `built` has to say, without the adversarial term."""
    return lambda *add: built(
        script, [*without_gan(flags), "--output_dir", str(tmp_path), "--report_to", "none", *add]
    )


@pytest.fixture(scope="module")
def without_embedder(tmp_path_factory):
    """The flags of a teacher without guidance embedder, as FLUX.1-schnell is."""
    path = tmp_path_factory.mktemp("schnell")
    write_flux(path, guidance_embeds=False)
    return "--pretrained_model_name_or_path", str(path)


def unpacked(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._unpack_latents(latents, 64, 64, 8)


def test_the_network_is_called_as_the_stock_pipeline_calls_it(build, without_embedder):
    decodes = ("--validation_prompts", "a red square")
    run = build(*decodes)
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 3.5}, 3.5, unpacked)
    assert_called_as_stock(run, run.pipeline_kwargs, 1.0, unpacked)
    run = build(*decodes, *without_embedder)
    guided = {"true_cfg_scale": 4.0, "negative_prompt": ""}
    assert_called_as_stock(run, run.pipeline_kwargs | guided, 4.0, unpacked)
    assert_called_as_stock(run, run.pipeline_kwargs, None, unpacked)
    run.schedule.anchors -= 1
    with pytest.raises(AssertionError, match="the stock call visits other timesteps than the anchors"):
        assert_called_as_stock(run, run.pipeline_kwargs, None, unpacked)


def test_the_teacher_is_run_without_a_prompt_only_for_the_loss_that_is_guided(build, without_embedder):
    assert_guided_where_asked(lambda *add: build(*without_embedder, *add))


def test_a_guidance_that_nothing_embeds_is_warned_of(build, without_embedder, caplog):
    warning = "--student_guidance_scale: no effect in a run whose teacher has no guidance embedder"
    build("--student_guidance_scale", "2")
    assert warning not in caplog.text
    build(*without_embedder, "--student_guidance_scale", "2")
    assert warning in caplog.text


def test_anchors_that_nobody_gave_serve_or_are_refused(flags, teacher, tmp_path, capsys):
    """Qwen-Image's scheduler ends its four steps at 20 of 1000; at 345 without shift_terminal, as FLUX at 64 px."""
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_terminal": 0.02}))
    flags = [*flags, "--output_dir", str(tmp_path / "out")]
    there = ["--pretrained_model_name_or_path", str(other)]
    for isg in ([], ["--isg_weight", "0"]):
        said = "--anchors 1000 739.6 420.4 20 (the default for this teacher): 20 is below 50"
        refused(script, [*flags, *there, *isg], 2, said, capsys)
    # The user's own are his will; but ISG must find a timestep between them.
    given = ["--anchors", "1000", "743", "425", "20"]
    script.prepare(script.FluxModels, script.parse_args([*flags, *there, *given, "--isg_weight", "0"]))
    refused(
        script, [*flags, *there, *given, "--isg_margin", "11"], 2, "11 leaves no timestep between 20 and 0", capsys
    )
    script.prepare(script.FluxModels, script.parse_args([*flags, *there, *given, "--isg_margin", "9"]))

    # Too near each other, for ISG's default margin; without ISG, the margin is not what helps.
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift_terminal": 0.9}))
    said = "(the default for this teacher): --isg_margin 20 leaves no timestep between 1000 and"
    for isg, fix in (
        ([], "lower it, or give --anchors further apart"),
        (["--isg_weight", "0"], "; give --anchors, such as 1000"),
    ):
        with pytest.raises(UserError) as error:
            script.prepare(script.FluxModels, script.parse_args([*flags, *there, *isg]))
        assert said in str(error.value) and fix in str(error.value) and error.value.exit_code == 2


def test_two_processes_train_as_one(flags, tmp_path):
    """The same global batch of 16 in two processes and in one, both divisible by the virtual batch of 8."""
    common = [*flags, "--gradient_accumulation_steps", "1", "--checkpointing_steps", "4", "--adam_epsilon", "1e-3"]
    one, two = tmp_path / "one", tmp_path / "two"
    output = launch(SCRIPT, [*common, "--train_batch_size", "16", "--output_dir", str(one)])
    assert "fake_loss=" in output, "the progress bar shows losses"
    launch(SCRIPT, [*common, "--train_batch_size", "8", "--output_dir", str(two)], processes=2)
    a, b = states(one / "checkpoint-4"), states(two / "checkpoint-4")
    assert_same(a, b, rtol=1e-4, atol=1e-5)
    assert (two / "model_index.json").exists()


def test_prompts_alone_train_other_anchors_and_a_warm_start(flags, teacher, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\n\na blue circle\n")
    flags = without_gan(without(flags, "--dataset_json", "--random_flip"))
    alone = ["--prompts_file", str(prompts), "--backward_simulation_prob", "1", "--max_train_steps", "2"]
    first = tmp_path / "first"
    script.main(
        [*flags, *alone, "--output_dir", str(first), "--anchors", "1000", "900.5", "300", "120", "--sampler", "euler"]
    )
    record = json.loads((first / "senseflow.json").read_text())
    assert record["timesteps"] == [1000, 900.5, 300, 120] and record["sampler"] == "euler"
    assert record["pipeline_call"]["sigmas"] == record["sigmas"], "no scheduler configuration visits these"
    pipeline = DiffusionPipeline.from_pretrained(first)
    call = {**record["pipeline_call"], "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    latents = pipeline("a red square", **call).images
    np.testing.assert_allclose(pipeline.scheduler.sigmas[:-1].numpy(), record["sigmas"], atol=1e-6)
    assert torch.isfinite(latents).all()

    # Warm start from that pipeline, and from its transformer folder: no step is taken, so it comes out as it went in.
    for start in (first, first / "transformer"):
        second = tmp_path / f"from_{start.name}"
        frozen = ["--learning_rate", "0", "--student_model_name_or_path", str(start), "--output_dir", str(second)]
        script.main([*flags, *alone, *frozen, "--lr_scheduler", "cosine", "--mixed_precision", "no"])
        a, b = (load_file(p / "transformer" / "diffusion_pytorch_model.safetensors") for p in (first, second))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_bf16_and_checkpointing_run(flags, tmp_path):
    """Precision comes from accelerate's configuration, as in diffusers' examples."""
    add = ["--report_to", "tensorboard", "--allow_tf32", "--export_dtype", "bf16", "--validation_steps", "2"]
    add += ["--validation_prompts", "a red square", "--gradient_checkpointing_interval", "2", "0"]
    launch(SCRIPT, [*flags, "--output_dir", str(tmp_path), *add], precision="bf16")
    exported = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    run_card(tmp_path)
    stored = states(tmp_path / "checkpoint-4")
    assert all(tensor.dtype == torch.float32 for name, tensor in stored.items() if name.startswith("transformer/"))
    assert json.loads((tmp_path / "checkpoint-4" / "state.json").read_text())["args"]["mixed_precision"] == "bf16"
    assert all(torch.isfinite(tensor.float()).all() for tensor in stored.values())


BAD = {
    "no data": (["--dataset_json"], [], "--dataset_json"),
    "two data": ([], ["--prompts_file", "x.txt"], "--prompts_file"),
    "anchors rise": ([], ["--anchors", "500", "900"], "--anchors 500 900"),
    "anchors out of range": ([], ["--anchors", "1200", "900"], "--anchors 1200: must be in (0"),
    "anchors zero": ([], ["--anchors", "1000", "0"], "--anchors 0: must"),
    "gan weight": ([], ["--gan_weight", "-1"], "--gan_weight -1"),
    "isg weight": ([], ["--isg_weight", "-0.5"], "--isg_weight -0.5"),
    "isg margin": ([], ["--isg_margin", "200"], "--isg_margin 200"),
    "decay": ([], ["--ida_decay", "1.5"], "--ida_decay 1.5"),
    "probability": ([], ["--backward_simulation_prob", "-0.1"], "--backward_simulation_prob -0.1"),
    "ttur": ([], ["--ttur_ratio", "0"], "--ttur_ratio 0"),
    "batch": ([], ["--train_batch_size", "0"], "--train_batch_size 0"),
    "guidance": ([], ["--dmd_guidance_scale", "8", "1"], "--dmd_guidance_scale 8 1"),
    "guidance of three": ([], ["--isg_guidance_scale", "1", "2", "3"], "--isg_guidance_scale"),
    "three intervals": (
        [],
        ["--gradient_checkpointing_interval", "1", "2", "3"],
        "--gradient_checkpointing_interval 1 2 3: give one value, or STUDENT FAKE_SCORE",
    ),
    "resolution": ([], ["--resolution", "72"], "--resolution 72"),
    "teacher": (
        [],
        ["--pretrained_model_name_or_path", "/no/such/model"],
        "--pretrained_model_name_or_path /no/such/model",
    ),
    "hub id": (
        [],
        ["--pretrained_model_name_or_path", "nobody/nothing"],
        "--pretrained_model_name_or_path nobody/nothing",
    ),
    "resume": ([], ["--resume_from_checkpoint", "latest"], "--resume_from_checkpoint latest"),
    "resume path": ([], ["--resume_from_checkpoint", "/no/such/checkpoint"], "--resume_from_checkpoint /no/such"),
    "8 bit": ([], ["--use_8bit_adam"], "--use_8bit_adam"),
    "xformers": ([], ["--enable_xformers_memory_efficient_attention"], "--enable_xformers"),
    "tracker": ([], ["--report_to", "nothing"], "--report_to: invalid choice: 'nothing'"),
    "backbone": ([], ["--discriminator_backbone", "/no/such/dino"], "--discriminator_backbone /no/such/dino"),
    "layers": ([], ["--discriminator_layers", "3", "99"], "--discriminator_layers"),
    "type": ([], ["--ttur_ratio", "often"], "--ttur_ratio"),
    "seed": ([], ["--seed", "5000000000"], "--seed 5000000000"),
    "beta": ([], ["--adam_beta1", "1"], "--adam_beta1 1"),
    "nan": ([], ["--gan_weight", "nan"], "--gan_weight nan"),
    "nan in a list": ([], ["--dmd_guidance_scale", "nan"], "--dmd_guidance_scale"),
    "clipping": ([], ["--max_grad_norm", "0"], "--max_grad_norm 0"),
    "sequence": ([], ["--max_sequence_length", "600"], "--max_sequence_length 600"),
    "output file": ([], ["--output_dir", __file__], f"--output_dir {__file__}"),
    "output below a file": ([], ["--output_dir", f"{__file__}/out"], "Not a directory); give another folder"),
    "output read-only": ([], ["--output_dir", "/sys/kernel"], "--output_dir /sys/kernel: cannot be written to ("),
    "logs below a file": (
        [],
        ["--logging_dir", f"{__file__}/logs"],
        f"make {__file__}/logs writable, or",
    ),
    "unknown flag": ([], ["--gan_wait", "1"], "--gan_wait"),
    "student": ([], ["--student_model_name_or_path", "/no/such/student"], "--student_model_name_or_path /no/such"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, flags, tmp_path, monkeypatch, capsys):
    drop, add, needle = BAD[case]
    missing(monkeypatch, "bitsandbytes", "xformers")
    monkeypatch.setattr(
        script.FluxTransformer2DModel,
        "from_pretrained",
        lambda *a, **k: pytest.fail("weights were loaded before the check"),
    )
    monkeypatch.setattr(sys, "argv", ["train_senseflow_flux.py"])
    refused(script, [*without(flags, *drop), "--output_dir", str(tmp_path / "out"), *add], 2, needle, capsys)


def test_latents_of_another_teacher_are_refused(flags, lmdb_of_latents, tmp_path, monkeypatch, capsys):
    """DMD2's LMDB holds latents of one VAE at one size: here 4 x 8 x 8, and this teacher has 4 x 16 x 16 at 128 px."""
    monkeypatch.setattr(
        script.FluxTransformer2DModel, "from_pretrained", lambda *a, **k: pytest.fail("weights before the check")
    )
    flags = [
        *without(flags, "--dataset_json", "--random_flip", "--resolution"),
        "--dataset_lmdb",
        str(lmdb_of_latents),
    ]
    refused(
        script, [*flags, "--resolution", "128", "--output_dir", str(tmp_path / "out")], 2, "--dataset_lmdb", capsys
    )


def test_a_fresh_process_says_one_line(flags, tmp_path):
    """Nothing that a library has to say at import or while loading stands beside it."""
    command = [
        sys.executable,
        str(ROOT / "train_senseflow_flux.py"),
        *flags,
        "--output_dir",
        str(tmp_path),
        "--ida_decay",
        "2",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "train_senseflow_flux.py: error: --ida_decay 2: must be in [0, 1] (see --help)\n"


def test_another_run_another_pipeline_and_cut_weights(flags, teacher, tmp_path, monkeypatch, capsys):
    def bad(code, needle, *add):
        refused(script, [*flags, *add], code, needle, capsys)

    taken = tmp_path / "taken"
    (taken / "checkpoint-2").mkdir(parents=True)
    (taken / "checkpoint-2" / "state.json").write_text("{}")
    bad(2, "state.json is damaged", "--output_dir", str(taken), "--resume_from_checkpoint", "latest")
    bad(2, f"--output_dir {taken}", "--output_dir", str(taken))
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    index = json.loads((other / "model_index.json").read_text())
    without_encoder = {name: entry for name, entry in index.items() if name != "text_encoder_2"}
    renamed = {**without_encoder, "_class_name": "StableDiffusion3Pipeline"}
    (other / "model_index.json").write_text(json.dumps(renamed))
    bad(
        2,
        "StableDiffusion3Pipeline",
        "--output_dir",
        str(tmp_path / "a"),
        "--pretrained_model_name_or_path",
        str(other),
    )
    (other / "model_index.json").write_text(json.dumps(index))
    (weights,) = (other / "transformer").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    flag = "--pretrained_model_name_or_path"
    bad(1, flag, "--output_dir", str(tmp_path / "b"), flag, str(other))


class WithoutSigmas(FluxPipeline):
    """A pipeline whose call leaves the noise levels to the scheduler."""

    def __call__(self, prompt, height, width, num_inference_steps, guidance_scale, max_sequence_length, generator):
        raise NotImplementedError


def test_levels_that_no_stock_call_visits_are_refused(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script.FluxModels, "pipeline_class", WithoutSigmas)
    flags = [*without_gan(flags), "--output_dir", str(tmp_path)]
    needle = "--anchors 1000 900 300 100: the call of this teacher's pipeline has no sigmas to visit them with"
    refused(script, [*flags, "--anchors", "1000", "900", "300", "100"], 2, needle, capsys)
    script.prepare(
        script.FluxModels, script.parse_args(flags)
    )  # the saved scheduler visits the default anchors by itself


def test_leftovers_of_a_killed_run_go_and_what_is_the_users_stays(tmp_path):
    def folder(name):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)

    for name in ("logs", "logs.old", "checkpoint-2", "checkpoint-2.incomplete", "vae"):
        folder(name)
    made = checkpoints.INCOMPLETE, checkpoints.REPLACED
    for name in (
        f"checkpoint-4{made[0]}",
        f"export{made[0]}",
        f"checkpoint-1{made[1]}",
        f"vae{made[1]}",
        f"transformer{made[1]}",
    ):
        folder(name)
    checkpoints.remove_leftovers(str(tmp_path))
    kept = {path.name: (path / "file").read_text() for path in tmp_path.iterdir()}
    users = {name: name for name in ("logs", "logs.old", "checkpoint-2", "checkpoint-2.incomplete", "vae")}
    # A transformer that was moved aside comes back; a checkpoint that was being removed does not.
    assert kept == {**users, "transformer": f"transformer{made[1]}"}


def test_a_fingerprint_is_the_networks_and_not_its_precisions():
    network = torch.nn.Linear(4, 4)
    print_ = fingerprint(network)
    assert fingerprint(copy.deepcopy(network).bfloat16()) == print_
    assert fingerprint(torch.nn.Linear(4, 4)) != print_


def test_weights_that_are_not_finite_are_not_saved(flags, tmp_path, monkeypatch):
    def spoil(*args, **kwargs):
        with torch.no_grad():
            args[2].student.parameters["proj_out.bias"].fill_(float("nan"))
        return {"dmd_loss": torch.tensor(0.0)}, {}

    monkeypatch.setattr(script, "train_iteration", spoil)
    for steps, folder in (("2", "checkpoint"), ("1", "export")):
        arguments = [*without_gan(flags), "--max_train_steps", steps, "--output_dir", str(tmp_path / folder)]
        with pytest.raises(UserError, match="weights of the student are not finite"):
            script.main(arguments)
        assert (
            not list((tmp_path / folder).glob("checkpoint-*"))
            and not (tmp_path / folder / "model_index.json").exists()
        )


def test_an_export_that_fails_loses_nothing(flags, teacher, tmp_path, monkeypatch):
    """The teacher is gone at the end."""
    place, out = (str(tmp_path / name) for name in ("teacher", "out"))
    shutil.copytree(teacher, place)

    def remove_teacher(*args):
        shutil.move(f"{place}/text_encoder_2", tmp_path / "moved")
        return train_iteration(*args)

    train_iteration = script.train_iteration
    flags = [*without_gan(flags), "--pretrained_model_name_or_path", place, "--output_dir", out]
    flags += ["--max_train_steps", "1"]
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="export could not be written .*: correct that"),
    ):
        patch.setattr(script, "train_iteration", remove_teacher)
        script.main(flags)
    assert {path.name for path in Path(out).iterdir()} == {"checkpoint-1", "logs", "run.lock"}
    shutil.move(tmp_path / "moved", f"{place}/text_encoder_2")
    script.main([*flags, "--resume_from_checkpoint", "latest"])
    assert "run.lock" not in os.listdir(out)
    FluxPipeline.from_pretrained(out)

    # What can be tried is tried before training.
    def fill_disk(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "write_model_card", fill_disk)
    monkeypatch.setattr(script, "train_iteration", lambda *args: pytest.fail("trained"))
    with pytest.raises(UserError, match="export could not be written .*: free some space, then"):
        script.main([*flags, "--output_dir", str(tmp_path / "other")])
    assert not list((tmp_path / "other").glob("*incomplete"))


def test_a_tracker_that_fails_does_not_end_the_run(flags, tmp_path, monkeypatch, caplog):
    """The disk of the event file is full from the first iteration on."""

    def fill_disk(*args):
        for file in (tmp_path / "logs" / "senseflow").glob("events*"):
            file.unlink()
            file.symlink_to("/dev/full")
        return train_iteration(*args)

    train_iteration = script.train_iteration
    monkeypatch.setattr(script, "train_iteration", fill_disk)
    script.main([*without_gan(flags), "--output_dir", str(tmp_path)])
    warnings = [text for text in caplog.messages if "goes on without it" in text]
    assert (
        len(warnings) == 1 and "--report_to tensorboard has failed (OSError: [Errno 28] No space left" in warnings[0]
    )
    assert (tmp_path / "checkpoint-4" / "state.json").exists() and (tmp_path / "model_index.json").exists()


def test_a_diverged_run_stops(flags, tmp_path, monkeypatch):
    def broken(student_x0, fake_x0, teacher_x0):
        loss, found = script_loss(student_x0, fake_x0, teacher_x0)
        return loss, found | {"dmd_non_finite": torch.tensor(1)}

    script_loss = script.dmd_loss
    monkeypatch.setattr(script, "dmd_loss", broken)
    with pytest.raises(UserError, match="dmd_gradient not finite 3 times in a row"):
        script.main(
            [*without_gan(flags), "--output_dir", str(tmp_path), "--ttur_ratio", "1", "--max_train_steps", "8"]
        )
