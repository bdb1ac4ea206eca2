"""The DMD2 script on a tiny pipeline: resume, export, the classifier, two processes, bad input."""

import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

import train_dmd2_sdxl as script
from helpers import (
    assert_same,
    assert_same_image,
    built,
    image_of,
    launch,
    logged,
    refused,
    resume_is_the_same_run,
    run_card,
    states,
    the_cards_call_is_infers_image,
    without,
)
from senseflow.models.discriminator import LatentClassifier
from senseflow.training.roles import Role
from senseflow_utils import StatelessRNG


@pytest.fixture
def flags(teachers, data):
    """Accumulation 2, the student in every second iteration."""
    flags = "--resolution 64 --train_batch_size 2 --gradient_accumulation_steps 2 --ttur_ratio 2 --learning_rate 1e-3"
    flags += " --max_train_steps 4 --checkpointing_steps 2 --export_dtype fp32"
    return ["--pretrained_model_name_or_path", str(teachers["sdxl"]), "--dataset_json", str(data), *flags.split()]


@pytest.fixture
def build(flags, tmp_path):
    """build(*flags) -> the run of `helpers.built`."""
    return lambda *add: built(script, [*flags, "--output_dir", str(tmp_path), "--report_to", "none", *add])


def test_resume_export_and_a_stock_call(flags, tmp_path):
    validation = ("--validation_prompts", "a red square", "--validation_steps", "2")
    whole = resume_is_the_same_run(script, [*flags, "--classifier_weight", "1"], tmp_path, *validation)
    the_cards_call_is_infers_image(whole, "timesteps", tmp_path)
    assert_same_image(image_of(whole / "checkpoint-4", tmp_path / "c"), image_of(whole, tmp_path / "images"))
    tags = logged(whole).Tags()
    losses = {"dmd_loss", "adversarial_loss", "classifier_loss", "real_logits", "fake_logits"}
    assert losses <= set(tags["scalars"]) and "isg_loss" not in tags["scalars"]
    assert {"validation/images", "validation/panel"} <= set(tags["images"])


def test_prompts_alone_and_a_warm_start(flags, tmp_path):
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


def test_two_processes_train_as_one(flags, tmp_path):
    """The classifier is a part of the fake score: one wrapped module runs twice before its backward."""
    common = [*without(flags, "--gradient_accumulation_steps", "--train_batch_size", "--checkpointing_steps")]
    common += ["--checkpointing_steps", "4", "--adam_epsilon", "1e-3", "--classifier_weight", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    launch("train_dmd2_sdxl.py", [*common, "--train_batch_size", "4", "--output_dir", str(one)])
    launch("train_dmd2_sdxl.py", [*common, "--train_batch_size", "2", "--output_dir", str(two)], processes=2)
    assert_same(states(one / "checkpoint-4"), states(two / "checkpoint-4"), rtol=1e-4, atol=1e-5)


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
    assert len(layers) == convolutions + 1 and logits.shape == (2, 1, 1, 1)
    if channels > 1000:
        assert [module.num_groups for module in classifier if isinstance(module, torch.nn.GroupNorm)] == [32] * 4
        return
    (gradient,) = torch.autograd.grad(classifier(x)[0], x)
    assert (gradient[0].abs().sum(0) > 0).all(), "every place of the map counts"
    assert gradient[1].abs().sum() == 0
    assert classifier(torch.randn(2, channels, size[0] + 8, size[1])).shape == (2,), "for larger maps, too"


def test_the_classifier_computes_in_the_precision_of_its_weights_under_autocast():
    torch.manual_seed(0)
    classifier, features = LatentClassifier(32, 8, 8), torch.randn(2, 32, 8, 8).bfloat16()
    exact = classifier(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(features), exact)
        assert classifier.bfloat16()(features.float()).dtype == torch.bfloat16  # gathered in bfloat16


BAD = {
    "another pipeline": (["--pretrained_model_name_or_path", "{flux}"], "holds a FluxPipeline"),
    "classifier weight": (["--classifier_weight", "-1"], "--classifier_weight -1"),
    "a classifier that never learns": (["--classifier_weight", "0"], "--classifier_weight 0"),
    "a loss of SenseFlow": (["--isg_weight", "1"], "--isg_weight"),
    "no middle": (["--pretrained_model_name_or_path", "{bare}"], "no mid-block for DMD2's classifier"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, flags, teachers, tmp_path, monkeypatch, capsys):
    add, needle = BAD[case]
    bare = tmp_path / "bare"
    shutil.copytree(teachers["sdxl"], bare)
    config = bare / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"mid_block_type": None}))
    monkeypatch.setattr(
        UNet2DConditionModel, "from_pretrained", lambda *a, **k: pytest.fail("weights before the check")
    )
    add = [part.format(flux=teachers["flux"], bare=bare) for part in add]
    refused(script, [*flags, "--output_dir", str(tmp_path / "out"), *add], 2, needle, capsys)
