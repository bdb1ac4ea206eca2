"""The SDXL script on a tiny pipeline: both methods, the network call, DMD2's classifier, other levels, bad input."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file

import train_senseflow_sdxl as script
from helpers import (
    assert_guided_where_asked,
    assert_same,
    assert_same_image,
    assert_starts_as_the_teacher,
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
)
from senseflow.errors import UserError
from senseflow.models.discriminator import LatentClassifier
from senseflow.training.roles import Role
from senseflow_utils import StatelessRNG
from stock_call import assert_called_as_stock
from tiny_pipelines import tiny_vae, write_sdxl


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    path = tmp_path_factory.mktemp("sdxl")
    write_sdxl(path)
    return path


@pytest.fixture
def flags(sdxl, data):
    """DMD2 with accumulation 2, the student in every second iteration."""
    return [
        *(
            "--pretrained_model_name_or_path",
            str(sdxl),
            "--dataset_json",
            str(data),
            "--resolution",
            "64",
            "--method",
            "dmd2",
        ),
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
        *("--max_train_steps", "4", "--checkpointing_steps", "2", "--export_dtype", "fp32"),
    ]


@pytest.fixture
def senseflow(flags, vision):
    """SenseFlow with everything on, IDA too."""
    vision = ["--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")]
    return [*without(flags, "--method"), *vision, "--ida_decay", "0.97"]


@pytest.mark.parametrize("method", ["senseflow", "dmd2"])
def test_each_method_resume_export_and_a_stock_call(method, flags, senseflow, tmp_path):
    flags = {"dmd2": [*flags, "--classifier_weight", "1"], "senseflow": senseflow}[method]
    whole = resume_is_the_same_run(
        script, flags, tmp_path, "--validation_prompts", "a red square", "--validation_steps", "2"
    )
    record = json.loads((whole / "senseflow.json").read_text())
    assert record["timesteps"] == [999, 749, 499, 249] and "timesteps" not in record["pipeline_call"]
    the_cards_call_is_infers_image(whole, "timesteps", tmp_path)
    assert_same_image(image_of(whole / "checkpoint-4", tmp_path / "c"), image_of(whole, tmp_path / "images"))
    tags = logged(whole).Tags()
    own = {"senseflow": {"isg_loss", "discriminator_loss"}, "dmd2": {"classifier_loss"}}
    assert {"dmd_loss", "adversarial_loss", "real_logits", "fake_logits"} | own[method] <= set(tags["scalars"])
    assert {"validation/images", "validation/panel"} <= set(tags["images"])


def test_latents_another_vae_other_levels_and_bf16(senseflow, lmdb_of_latents, tmp_path):
    """LMDB latents, decoded for the discriminator; another VAE, which is saved; anchors that the call must name."""
    other = tmp_path / "other_vae"
    torch.manual_seed(7)
    tiny_vae(scaling_factor=0.2).save_pretrained(other)
    flags = [
        *without(senseflow, "--dataset_json"),
        "--dataset_lmdb",
        str(lmdb_of_latents),
        "--anchors",
        "999",
        "600",
        "300",
    ]
    out = tmp_path / "out"
    arguments = [
        *flags,
        "--pretrained_vae_model_name_or_path",
        str(other),
        "--output_dir",
        str(out),
        "--gradient_checkpointing",
    ]
    arguments += ["--validation_prompts", "a red square", "--validation_steps", "4"]
    launch("train_senseflow_sdxl.py", arguments, precision="bf16")
    record = json.loads((out / "senseflow.json").read_text())
    assert record["pipeline_call"]["timesteps"] == [999, 600, 300]
    the_cards_call_is_infers_image(out, "timesteps", tmp_path)
    saved = AutoencoderKL.from_pretrained(out, subfolder="vae")
    assert saved.config.scaling_factor == 0.2
    wanted = AutoencoderKL.from_pretrained(other).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in saved.state_dict().items())
    assert_same_image(image_of(out / "checkpoint-4", tmp_path / "c"), image_of(out, tmp_path / "images"))
    with pytest.raises(UserError, match="made with another vae"):
        script.main([*flags, "--output_dir", str(out), "--resume_from_checkpoint", "latest"])


def test_prompts_alone_train_dmd2_and_a_warm_start(flags, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red square\na blue circle\n")
    flags = [
        *without(flags, "--dataset_json", "--max_train_steps"),
        "--prompts_file",
        str(prompts),
        "--gan_weight",
        "0",
    ]
    flags = [*without(flags, "--export_dtype"), "--export_dtype", "bf16"]
    first, second = tmp_path / "first", tmp_path / "second"
    script.main([*flags, "--output_dir", str(first), "--max_train_steps", "2"])
    start = ["--student_model_name_or_path", str(first), "--learning_rate", "0", "--learning_rate_fake", "1e-3"]
    script.main([*flags, *start, "--output_dir", str(second), "--max_train_steps", "2"])
    a, b = (load_file(path / "unet" / "diffusion_pytorch_model.safetensors") for path in (first, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    run_card(first)
    assert " with DMD2 (arXiv 2405.14867): 2 iterations." in (first / "README.md").read_text()


def test_dmd2_in_two_processes_trains_as_in_one(flags, tmp_path):
    """The classifier is a part of the fake score: one wrapped module runs twice before its backward."""
    common = [*without(flags, "--gradient_accumulation_steps", "--train_batch_size", "--checkpointing_steps")]
    common += ["--checkpointing_steps", "4", "--adam_epsilon", "1e-3", "--classifier_weight", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    launch("train_senseflow_sdxl.py", [*common, "--train_batch_size", "4", "--output_dir", str(one)])
    launch("train_senseflow_sdxl.py", [*common, "--train_batch_size", "2", "--output_dir", str(two)], processes=2)
    assert_same(states(one / "checkpoint-4"), states(two / "checkpoint-4"), rtol=1e-4, atol=1e-5)


@pytest.fixture
def build(flags, tmp_path):
    """build(*flags) -> what tests/scripts.py `built` has to say, for DMD2."""
    return lambda *add: built(script, [*flags, "--output_dir", str(tmp_path), "--report_to", "none", *add])


def test_the_network_is_called_as_the_stock_pipeline_calls_it(build):
    run = build("--gan_weight", "0", "--validation_prompts", "a red square")
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 8.0}, scale=8.0)
    assert_called_as_stock(run, run.pipeline_kwargs, scale=None)
    assert_starts_as_the_teacher(run.models)


ZERO_SNR, V_PREDICTION = {"rescale_betas_zero_snr": True}, {"prediction_type": "v_prediction"}


def change_scheduler(folder, changes: dict) -> None:
    """Change entries of a saved pipeline's scheduler; None removes one."""
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.fixture(scope="module")
def unlike_base(sdxl, tmp_path_factory):
    """A teacher of v-prediction with zero terminal SNR, whose unconditional prompt is "" instead of zeros.

    It was saved as an image-to-image pipeline.
    """
    path = tmp_path_factory.mktemp("unlike") / "sdxl"
    shutil.copytree(sdxl, path)
    changes = {"force_zeros_for_empty_prompt": False, "_class_name": "StableDiffusionXLImg2ImgPipeline"}
    index = json.loads((path / "model_index.json").read_text()) | changes
    (path / "model_index.json").write_text(json.dumps(index))
    change_scheduler(path, {**ZERO_SNR, **V_PREDICTION, "timestep_spacing": "trailing"})
    return path


def test_a_teacher_that_is_not_like_sdxls_base_is_called_and_saved_as_it_is(flags, unlike_base, tmp_path):
    flags = [*flags, "--pretrained_model_name_or_path", str(unlike_base), "--report_to", "none", "--gan_weight", "0"]
    run = built(script, [*flags, "--output_dir", str(tmp_path / "built"), "--validation_prompts", "a red square"])
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 8.0}, scale=8.0)
    assert run.schedule.levels(run.schedule.anchors)[0][0] == 0
    flags += ["--max_train_steps", "1", "--ttur_ratio", "1"]
    for kind, add in (("full", []), ("adapter", ["--rank", "2"])):
        script.main([*flags, *add, "--output_dir", str(tmp_path / kind)])
    index = json.loads((tmp_path / "full/model_index.json").read_text())
    assert index["force_zeros_for_empty_prompt"] is False and index["_class_name"] == "StableDiffusionXLPipeline"
    (tmp_path / "full/model_index.json").write_text(json.dumps(index | {"layers": [2, 5, 8]}))
    for kind in ("full", "adapter"):
        scheduler = json.loads((tmp_path / kind / "scheduler/scheduler_config.json").read_text())
        assert scheduler["_class_name"] == "LCMScheduler" and scheduler.items() >= (ZERO_SNR | V_PREDICTION).items()
        image_of(tmp_path / kind, tmp_path / "images" / kind)
        run_card(tmp_path / kind)


def test_the_teacher_is_run_without_a_prompt_only_for_the_loss_that_is_guided(build):
    assert_guided_where_asked(lambda *add: build("--method", "senseflow", "--gan_weight", "0", *add))


def test_the_discriminators_weight_is_the_roots_of_abar(senseflow, tmp_path):
    run = built(script, [*senseflow, "--output_dir", str(tmp_path), "--report_to", "none"])
    omega = run.models.omega(run.schedule.anchors)
    torch.testing.assert_close(omega, torch.tensor([0.068, 0.238, 0.527, 0.822]), atol=1e-3, rtol=0)


def test_the_classifier_sees_the_middle_alone_and_learns_in_the_fake_scores_turn_only(build, monkeypatch):
    run = build("--ttur_ratio", "1", "--gradient_accumulation_steps", "1", "--classifier_weight", "1")
    models, args = run.models, run.args
    score = models.fake_score.module
    features, ran = [], {"up": 0, "mid": 0}

    def watch(module, inputs, output):
        features.append(output)
        ran["mid"] += 1

    score.unet.mid_block.register_forward_hook(watch)
    score.unet.up_blocks[0].register_forward_hook(lambda *_: ran.update(up=ran["up"] + 1))

    # The features are those of the UNet's own forward.
    x_t, t = torch.randn(2, *models.latent_shape), torch.tensor([700.0, 3.0])
    with torch.no_grad():
        condition = models.encode_prompts(["a red square", "blue"])
        inputs = models.unet_inputs(models.fake_score, x_t, t, condition)
        score.unet(**inputs)
        torch.testing.assert_close(script.mid_block_features(score.unet, **inputs), features[0])
    assert ran == {"up": 1, "mid": 2}

    # L_DMD and the fake score's loss run the whole network; the classifier runs half of it, for student, real, fake.
    ran.update(up=0, mid=0)
    turns = []
    backward = Role.backward
    monkeypatch.setattr(
        Role, "backward", lambda role, loss: (turns.append((role.name, loss.item())), backward(role, loss))
    )
    head = [parameter.clone() for parameter in score.classifier.parameters()]
    (values, _), (batch,) = run.step(0)
    assert ran == {"up": 2, "mid": 5}
    assert [name for name, _ in turns] == ["student", "fake_score"]
    loss = values["dmd_loss"] + args.gan_weight * values["adversarial_loss"]
    assert turns[0][1] == pytest.approx(loss.item(), rel=1e-5)
    loss = values["fake_loss"] + values["classifier_loss"]
    assert turns[1][1] == pytest.approx(loss.item(), rel=1e-5)
    assert any(not torch.equal(a, b) for a, b in zip(head, score.classifier.parameters()))


def test_the_classifier_is_shown_noised_latents_of_student_and_real_images(build):
    run = build("--ttur_ratio", "1", "--gradient_accumulation_steps", "1")
    models, schedule, args = run.models, run.schedule, run.args
    shown, classify = {}, models.classify

    def recording(x0, rng, sample_indices, name, condition):
        shown[name] = x0.detach()
        return classify(x0, rng, sample_indices, name, condition)

    models.classify = recording
    (_, seen), (batch,) = run.step(0)
    with torch.no_grad():
        real = models.real_latents(batch, torch.arange(2), StatelessRNG(args.seed, 0))
    torch.testing.assert_close(shown["real"], real)
    assert torch.equal(shown["student"], seen["student_x0"]) and torch.equal(shown["fake"], seen["student_x0"])

    told = []

    def role(classify=False, **inputs):
        told.append((classify, inputs))

    role.dtype = torch.float32
    rng = StatelessRNG(0, 5)
    models.fake_score = role
    classify(real, rng, [0, 1], "real", (torch.zeros(2, 3, 4), torch.zeros(2, 4)))
    ((asked, inputs),) = told
    t = rng.integers("real_classifier_timestep", [0, 1], 0, 999)
    noise = rng.normal("real_classifier_noise", [0, 1], real.shape[1:])
    assert asked and inputs["timestep"].tolist() == t.tolist()
    torch.testing.assert_close(inputs["sample"], schedule.add_noise(real, noise, t))


@pytest.mark.parametrize(
    "channels, size, convolutions",
    [
        (1280, (32, 32), 4), (64, (32, 32), 4), (32, (4, 4), 1), (32, (1, 1), 1), (16, (5, 5), 2), (32, (24, 24), 4),
        (32, (42, 24), 4), (32, (4, 9), 1),
    ],
)  # fmt: skip
def test_the_classifier_takes_any_middle(channels, size, convolutions):
    """Four convolutions from SDXL's 32 to 1; and logits that depend on the whole map, at any size."""
    with torch.device("meta" if channels > 1000 else "cpu"):
        classifier = LatentClassifier(channels, *size)
        x = torch.randn(2, channels, *size, requires_grad=True)
    layers = [module for module in classifier if isinstance(module, torch.nn.Conv2d)]
    logits = torch.nn.Sequential.forward(classifier, x)  # autocast knows no meta device
    assert len(layers) == convolutions + 1 and logits.shape == (2,)
    if channels > 1000:
        assert [module.num_groups for module in classifier if isinstance(module, torch.nn.GroupNorm)] == [32] * 4
        return
    (gradient,) = torch.autograd.grad(classifier(x)[0], x)
    assert (gradient[0].abs().sum(0) > 0).all(), "every place of the map counts"
    assert gradient[1].abs().sum() == 0


def test_the_classifier_computes_in_the_precision_of_its_weights_under_autocast():
    torch.manual_seed(0)
    classifier, features = LatentClassifier(32, 8, 8), torch.randn(2, 32, 8, 8).bfloat16()
    exact = classifier(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(features), exact)
        assert classifier.bfloat16()(features.float()).dtype == torch.bfloat16  # gathered in bfloat16


BAD = {
    "another pipeline": (["--pretrained_model_name_or_path", "{flux}"], "holds a FluxPipeline"),
    "method": (["--method", "dmd3"], "--method"),
    "fractional anchors": (["--anchors", "999", "500.5"], "--anchors 999 500.5"),
    "anchors above": (["--anchors", "1000", "500"], "--anchors 1000 500"),
    "classifier weight": (["--classifier_weight", "-1"], "--classifier_weight -1"),
    "resolution": (["--resolution", "60"], "--resolution 60"),
    "vae": (
        ["--pretrained_vae_model_name_or_path", "/no/such/vae"],
        "--pretrained_vae_model_name_or_path /no/such/vae",
    ),
    "student": (["--student_model_name_or_path", "{flux}"], "--student_model_name_or_path"),
    "sampler": (["--sampler", "euler"], "--sampler"),
    "latents of another size": (["--resolution", "72"], "--dataset_lmdb"),
    "8 bit": (["--use_8bit_adam"], "--use_8bit_adam"),
    "xformers": (["--enable_xformers_memory_efficient_attention"], "--enable_xformers"),
    "a classifier that never learns": (["--classifier_weight", "0"], "--classifier_weight 0"),
    "levels of EDM": (["--pretrained_model_name_or_path", "{v}"], "levels of EDMEulerScheduler"),
    "zero snr": (["--pretrained_model_name_or_path", "{v}"], "rescale_betas_zero_snr"),
    "inpainting": (["--pretrained_model_name_or_path", "{v}"], "takes 9 channels for latents of 4"),
    "prediction of x0": (["--pretrained_model_name_or_path", "{v}"], "predicts sample"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    case, flags, sdxl, teacher, lmdb_of_latents, tmp_path, monkeypatch, capsys
):
    add, needle = BAD[case]
    missing(monkeypatch, "bitsandbytes", "xformers")
    changes = {
        "prediction of x0": {"prediction_type": "sample"},
        "zero snr": ZERO_SNR,
        "levels of EDM": {"_class_name": "EDMEulerScheduler", "beta_schedule": None},
    }
    if case in changes or case == "inpainting":
        shutil.copytree(sdxl, tmp_path / "v")
        change_scheduler(tmp_path / "v", changes.get(case, {}))
    if case == "inpainting":
        config = tmp_path / "v" / "unet" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 9}))
    if "latents" in case:
        flags = [*without(flags, "--dataset_json"), "--dataset_lmdb", str(lmdb_of_latents)]
    monkeypatch.setattr(
        UNet2DConditionModel, "from_pretrained", lambda *a, **k: pytest.fail("weights before the check")
    )
    add = [part.format(flux=teacher, v=tmp_path / "v") for part in add]
    refused(script, [*flags, "--output_dir", str(tmp_path / "out"), *add], 2, needle, capsys)
