"""Train adapters with the three scripts on tiny pipelines: one frozen base for teacher, student and fake score."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import infer
import train_dmd2_sdxl
import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import (
    assert_same,
    assert_same_image,
    built,
    card_code,
    image_of,
    launch,
    missing,
    models_class,
    refused,
    resume_is_the_same_run,
    states,
    the_cards_call_is_infers_image,
    without,
)
from senseflow.errors import UserError
from senseflow.inference import find_model, load_model_pipeline
from senseflow.memory.counter import Counter, Work
from senseflow.models.autocast import WeightCopies
from senseflow.models.lora import FILE, export_lora, fuse_applications, lora_config
from senseflow.models.quantization import quantization_states
from senseflow.training.roles import LaunchConfig, Role
from senseflow_utils import Guidance
from tiny_pipelines import cache_repository


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
NETWORK = {"flux": "transformer", "sd3": "transformer", "sdxl": "unet"}
QUANTIZED = ["flux 4bit", "sd3 8bit", "sdxl 4bit", "sdxl 8bit"]


@pytest.fixture
def flags(teachers, data, vision, tmp_path):
    """Return flags(name, *more) -> arguments of a script with adapters, without discriminator unless `gan=True`.

    A name may be followed by what the base is quantized to: "flux 4bit".
    """

    def make(name, *more, gan=False):
        name, _, quantization = name.partition(" ")
        more += ("--base_quantization", quantization) if quantization else ()
        seen = [
            "--discriminator_backbone",
            str(vision / "dinov2"),
            "--discriminator_text_encoder",
            str(vision / "clip"),
        ]
        return [
            *(
                "--pretrained_model_name_or_path",
                str(teachers[name]),
                "--dataset_json",
                str(data),
                "--resolution",
                "64",
            ),
            *("--rank", "4", "--report_to", "none"),
            *("--train_batch_size", "2", "--ttur_ratio", "1", "--learning_rate", "1e-3", "--ida_decay", "0.5"),
            *("--output_dir", str(tmp_path / "out"), "--export_dtype", "fp32"),
            *(["--max_sequence_length", "16"] if name != "sdxl" else []),
            *(["--lr_warmup_steps", "0"] if name == "flux" else []),
            *(seen if gan else ["--gan_weight", "0"]),
            *more,
        ]

    return make


def own_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return a network's parameters and buffers by their names without adapters, leaving out the adapters'."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors if ".lora_" not in name}


@torch.no_grad()
def outputs(run) -> list[torch.Tensor]:
    """Return outputs of teacher, student and fake score, at the student's guidance if the teacher has an embedder."""
    models, t = run.models, torch.tensor([900.0, 500.0])
    x_t = torch.randn(2, *models.latent_shape, generator=torch.Generator().manual_seed(0))
    condition = models.encode_prompts(("a red square", "blue"))
    embedded = models.teacher.module.config.get("guidance_embeds")
    guidance = Guidance(torch.full((2,), run.args.student_guidance_scale), True) if embedded else None
    teacher = models.predict(models.teacher, x_t, t, condition, guidance).output
    return [teacher, *(models.predict(role, x_t, t, condition).output for role in (models.student, models.fake_score))]


@pytest.mark.parametrize("name", [*SCRIPTS, *QUANTIZED])
def test_three_roles_are_one_base_and_two_adapters(name, flags):
    run = built(SCRIPTS[name.split()[0]], flags(name, gan=True))
    models, base = run.models, own_of(run.models.teacher.module)
    quantized = [key for key, tensor in base.items() if tensor.dtype in (torch.uint8, torch.int8)]
    assert len(quantized) == (
        sum(isinstance(m, torch.nn.Linear) for m in models.teacher.module.modules()) if " " in name else 0
    )
    start = {key: tensor.clone() for key, tensor in base.items()}

    def assert_one_base():
        for role in (models.student, models.fake_score):
            own = own_of(role.module)
            assert own.keys() == base.keys() and all(own[key] is base[key] for key in base)
            states = zip(quantization_states(role.module), quantization_states(models.teacher.module), strict=True)
            assert all(state is other for state, other in states)

    assert_one_base()
    students, fakes = models.student.parameters, models.fake_score.parameters
    assert students.keys() == fakes.keys() and len(students) > 20 and all(".lora_" in key for key in students)
    assert (
        sum(key.endswith("lora_A.default.weight") and tensor.abs().sum() > 0 for key, tensor in students.items()) > 10
    )
    assert all(torch.equal(students[key], fakes[key]) and students[key] is not fakes[key] for key in students)
    teacher, student, fake = outputs(run)
    assert torch.equal(teacher, student) and torch.equal(teacher, fake) and teacher.std() > 0
    for iteration in range(2):
        run.step(iteration)
    assert_one_base()
    assert (len(quantization_states(models.teacher.module)) > 10) == (" " in name)
    assert all(torch.equal(base[key], start[key]) for key in base)
    again, student, fake = outputs(run)
    assert torch.equal(again, teacher)
    assert len({tensor.sum().item() for tensor in (teacher, student, fake)}) == 3


@pytest.mark.parametrize("name", [*SCRIPTS, "flux 4bit", "sdxl 8bit"])
def test_gradient_reaches_only_the_trained_adapter_with_or_without_checkpointing(name, flags, monkeypatch):
    backward, touched, gradients = Role.backward, [], []

    def watched(role, loss):
        roles = {key: getattr(run.models, key) for key in ("teacher", "student", "fake_score", "discriminator")}
        assert all(parameter.grad is None for other in roles.values() for parameter in other.module.parameters())
        backward(role, loss)
        reached = {
            key: {n for n, p in other.module.named_parameters() if p.grad is not None} for key, other in roles.items()
        }
        touched.append((role.name, {key for key, names in reached.items() if names}))
        assert reached[role.name] == set(role.parameters)
        gradients[-1] |= {f"{role.name}/{key}": parameter.grad.clone() for key, parameter in role.parameters.items()}
        if role.name != "fake_score":  # these step at the end: keep their gradients aside until then
            held.append([(parameter, parameter.grad) for parameter in role.parameters.values()])
            for parameter in role.parameters.values():
                parameter.grad = None

    step = Role.step

    def stepped(role, measure_update=False):
        for parameter, gradient in held.pop(0) if role.name != "fake_score" else ():
            parameter.grad = gradient
        return step(role, measure_update)

    monkeypatch.setattr(Role, "backward", watched)
    monkeypatch.setattr(Role, "step", stepped)
    for more in ((), ("--gradient_checkpointing",)):
        held = []
        gradients.append({})
        run = built(SCRIPTS[name.split()[0]], flags(name, "--isg_weight", "1", *more, gan=True))
        for role in (run.models.student, run.models.fake_score):  # while B is zero, so is the gradient of A
            for key, parameter in role.parameters.items():
                parameter.data += 0.01 * torch.randn(
                    parameter.shape, generator=torch.Generator().manual_seed(len(key))
                )
        run.step(0)
    assert touched == [(role, {role}) for role in ("student", "discriminator", "fake_score")] * 2
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        torch.testing.assert_close(plain[key], checkpointed[key], rtol=1e-5, atol=1e-7, msg=key)
    assert sum(gradient.abs().sum() > 0 for gradient in plain.values()) > 40


@pytest.mark.parametrize("name", SCRIPTS)
def test_under_bfloat16_adapters_are_float32_and_all_roles_compute_alike(name, flags, bfloat16):
    run = built(SCRIPTS[name], flags(name, *bfloat16))
    models = run.models
    assert {tensor.dtype for tensor in own_of(models.student.module).values()} == {torch.bfloat16}
    for role in (models.student, models.fake_score):
        assert {parameter.dtype for parameter in role.parameters.values()} == {torch.float32}
    under_autocast = []
    for role in (models.teacher, models.student, models.fake_score):
        layer = next(module for module in role.module.modules() if isinstance(module, torch.nn.Linear))
        layer.register_forward_pre_hook(lambda *_: under_autocast.append(torch.is_autocast_enabled("cpu")))
    teacher, student, fake = outputs(run)
    assert under_autocast == [True] * 3
    assert torch.equal(teacher, student) and torch.equal(teacher, fake)
    (values, _), _ = run.step(0)
    assert all(value.isfinite() for value in values.values()) and not torch.equal(outputs(run)[1], teacher)
    assert torch.equal(outputs(run)[0], teacher)


def test_ida_moves_a_and_b_of_the_fake_score_towards_the_students(flags):
    run = built(SCRIPTS["sd3"], flags("sd3", "--learning_rate_fake", "0", "--ida_decay", "0.25"))
    start = {key: tensor.clone() for key, tensor in run.models.fake_score.parameters.items()}
    run.step(0)
    for key, tensor in run.models.fake_score.parameters.items():
        torch.testing.assert_close(tensor, 0.25 * start[key] + 0.75 * run.models.student.parameters[key])
    assert any(not torch.equal(start[key], tensor) for key, tensor in run.models.fake_score.parameters.items())


@pytest.mark.parametrize("name", SCRIPTS)
def test_accumulation_trains_the_same_global_batch_alike(name, flags):
    results = []
    for batch, accumulated in (("4", "1"), ("2", "2")):
        sizes = ("--train_batch_size", batch, "--gradient_accumulation_steps", accumulated)
        run = built(SCRIPTS[name], flags(name, "--adam_epsilon", "1e-3", *sizes))
        for iteration in range(2):
            run.step(iteration)
        results.append((run.models.student.parameters, run.models.fake_score.parameters))
    for once, twice in zip(*results):
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["sdxl", "sdxl 4bit"])
def test_dmd2_in_two_processes_equals_one_and_resumes(name, flags, tmp_path):
    """The classifier shares the fake score's network, which runs three times before its backward."""
    common = without(
        flags(name), "--gan_weight", "--ida_decay", "--train_batch_size", "--output_dir", "--learning_rate"
    )
    common += ["--classifier_weight", "1", "--learning_rate", "1e-2"]
    common += ["--adam_epsilon", "1e-3", "--max_train_steps", "3", "--checkpointing_steps", "1"]
    one, two, again = tmp_path / "one", tmp_path / "two", tmp_path / "again"
    train_dmd2_sdxl.main([*common, "--train_batch_size", "4", "--output_dir", str(one)])
    launch("train_dmd2_sdxl.py", [*common, "--train_batch_size", "2", "--output_dir", str(two)], processes=2)
    a, b = states(one / "checkpoint-3"), states(two / "checkpoint-3")
    assert_same(a, b, rtol=0, atol=1e-5)
    classifier = {key for key in a if key.startswith("fake_score/classifier.")}
    assert classifier and {key for key in a if key.startswith("fake_score/")} - classifier == {
        f"fake_score/unet.{key.removeprefix('unet/')}" for key in a if key.startswith("unet/")
    }
    assert max(tensor.abs().max() for key, tensor in a.items() if key.startswith("unet/") and "lora_B" in key) > 1e-3
    shutil.copytree(one / "checkpoint-2", again / "checkpoint-2")
    resumed = ["--train_batch_size", "4", "--output_dir", str(again), "--resume_from_checkpoint", "latest"]
    train_dmd2_sdxl.main([*common, *resumed])
    assert_same(a, states(again / "checkpoint-3"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_bit_exact_resume_stored_adapters_and_model_card(name, flags, tmp_path):
    """Alpha differs from the rank, and the learning rate is high, so that images show both."""
    common = without(flags(name, gan=True), "--output_dir", "--ttur_ratio", "--learning_rate")
    common += ["--ttur_ratio", "2", "--learning_rate", "3e-2", "--learning_rate_disc", "1e-3", "--lora_alpha", "8"]
    common += ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    student_samples = [
        "--validation_prompts",
        "a red square",
        "--validation_steps",
        "2",
        "--teacher_num_inference_steps",
        "2",
    ]
    whole = resume_is_the_same_run(SCRIPTS[name], common, tmp_path, *student_samples)
    checkpoint, network = whole / "checkpoint-4", NETWORK[name]

    files = {
        str(path.relative_to(whole)): set(load_file(path))
        for path in whole.rglob("*.safetensors")
        if path.parts[-3] != "checkpoint-2"
    }
    student, exported = files.pop(f"checkpoint-4/{network}/{FILE}"), files.pop(FILE)
    assert student == files.pop(f"checkpoint-4/fake_score/{FILE}")
    if name == "sdxl":
        kohya = {"lora_unet_" + key.split(".lora_")[0].replace(".", "_") for key in student}
        parts = ("lora_down.weight", "lora_up.weight", "alpha")
        assert exported == {f"{layer}.{part}" for layer in kohya for part in parts}
    else:
        assert exported == {f"{network}.{key}" for key in student}
    assert all(re.search(r"\.lora_[AB]\.weight$", key) for key in student)
    assert files.keys() == {"checkpoint-4/discriminator/model.safetensors"}
    record = json.loads((whole / "senseflow.json").read_text())
    assert record["pipeline_call"]["guidance_scale"] == {"flux": 3.5, "sd3": 1.0, "sdxl": 0.0}[name]

    the_cards_call_is_infers_image(whole, "timesteps" if name == "sdxl" else "sigmas", tmp_path, fresh=name == "flux")
    student_samples = image_of(whole, tmp_path / "images")
    assert_same_image(image_of(checkpoint, tmp_path / "checkpoint"), student_samples)
    # The README's stock lines make a whole pipeline; fusing the adapter by hand gives the trained student.
    names: dict = {}
    exec(card_code(whole).split("image =")[0], names)
    pipeline, taught = names["pipeline"], load_file(checkpoint / network / FILE)
    base = {key: tensor.clone() for key, tensor in own_of(getattr(pipeline, network)).items()}
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "fused")
    shutil.copy(whole / "senseflow.json", tmp_path / "fused")
    assert_same_image(image_of(tmp_path / "fused", tmp_path / "of_fused"), student_samples)
    moved = 0
    for key, tensor in getattr(pipeline, network).state_dict().items():
        layer = key.removesuffix(".weight")
        if f"{layer}.lora_A.weight" in taught:
            a, b = (taught[f"{layer}.lora_{half}.weight"] for half in "AB")
            delta = 8 / 4 * (b.flatten(1) @ a.flatten(1)).view_as(tensor)
            torch.testing.assert_close(tensor, base[key] + delta, rtol=0, atol=1e-5)
            moved = max(moved, delta.abs().max().item())
        else:
            assert torch.equal(tensor, base[key]), key
    assert moved > 0.01

    if name != "flux":
        return
    resumed = ["--output_dir", str(tmp_path / "halves"), "--resume_from_checkpoint", "latest"]
    for more in (["--rank", "2"], ["--rank", "0"], ["--lora_alpha", "4.0"], ["--lora_layers", "to_q"]):
        dropped = (more[0], "--lora_alpha") if more == ["--rank", "0"] else (more[0],)
        with pytest.raises(UserError, match=f"^{' '.join(more)}: {tmp_path}.* was made with"):
            SCRIPTS[name].main([*without(common, *dropped), *resumed, *more])


@pytest.fixture(scope="module")
def exported(teachers, tmp_path_factory):
    """Run on a copy of the FLUX teacher; hold the output and that copy."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(teachers["flux"], folder / "teacher")
    (folder / "prompts.txt").write_text("a red square\n")
    train_senseflow_flux.main(
        [
            *(
                "--pretrained_model_name_or_path",
                str(folder / "teacher"),
                "--prompts_file",
                str(folder / "prompts.txt"),
            ),
            *(
                "--gan_weight",
                "0",
                "--backward_simulation_prob",
                "1",
                "--resolution",
                "64",
                "--max_sequence_length",
                "16",
            ),
            *("--rank", "2", "--max_train_steps", "1", "--output_dir", str(folder / "out"), "--report_to", "none"),
        ]
    )
    return folder


def other_weights(folder):
    path = folder / "teacher/transformer/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "proj_out.weight": weights["proj_out.weight"] + 1}, path)


def unknown_layers(folder):
    weights = load_file(folder / "out" / FILE)
    save_file(
        {key.replace("0.attn.to_q", "7.attn.to_q"): tensor for key, tensor in weights.items()}, folder / "out" / FILE
    )


def without_alpha(folder):
    """Remove alpha, which only the file's metadata holds; without it peft assumes the rank."""
    record = json.loads((folder / "out/senseflow.json").read_text())
    (folder / "out/senseflow.json").write_text(json.dumps(record | {"lora_alpha": 4.0}))


@pytest.mark.parametrize(
    "damage, more, code, needle",
    [
        (other_weights, (), 1, "its adapter was trained over other weights than those of "),
        (unknown_layers, (), 1, f"{FILE} has layers that this network lacks"),
        (without_alpha, (), 1, "has rank 2 and alpha 2, senseflow.json 2 and 4;"),
        (lambda folder: (folder / "out" / FILE).unlink(), (), 2, f"there is no {FILE}"),
        (lambda folder: None, ("--transformer", "x"), 2, "is an adapter for its teacher's own transformer"),
    ],
)
def test_infer_refuses_other_bases_and_damaged_adapters(damage, more, code, needle, exported, tmp_path, capsys):
    shutil.copytree(exported, tmp_path / "copy")
    record = json.loads((exported / "out/senseflow.json").read_text())
    record["teacher"] = str(tmp_path / "copy/teacher")
    (tmp_path / "copy/out/senseflow.json").write_text(json.dumps(record))
    arguments = ["--model", str(tmp_path / "copy/out"), "--prompt", "a cat", "--output_dir", str(tmp_path / "images")]
    infer.main([*arguments, "--dtype", "fp16"])  # rounding to fp16 must not look like another base
    capsys.readouterr()
    damage(tmp_path / "copy")
    refused(infer, [*arguments[:-1], str(tmp_path / "others"), *more], code, needle, capsys)


# The layers for which programs look in a file: with .lora_up.weight, .lora_down.weight and .alpha in kohya's form,
# with .lora_A.weight and .lora_B.weight in diffusers'. The rules are those of
# - ComfyUI 0.8.0: model_lora_keys_unet in comfy/lora.py, over unet_to_diffusers, flux_to_diffusers, mmdit_to_diffusers
#   in comfy/utils.py. "lora_unet_" and diffusers' name with underscores for a UNet; "transformer." and diffusers' name
#   for FLUX and SD 3.
# - Forge (June 2025): copies of these in packages_3rdparty/comfyui_lora_collection, without SD 3.
# - kohya's sd-scripts (February 2026), for a UNet only: convert_diffusers_to_sai_if_needed in networks/lora.py turns
#   these names into its own.
UNET_LAYERS = (
    r"lora_unet_(((down|up)_blocks_\d|mid_block)_(resnets_\d_(conv1|conv2|conv_shortcut|time_emb_proj)"
    r"|attentions_\d_(proj_(in|out)|transformer_blocks_\d+_(attn[12]_to_(q|k|v|out_0)|ff_net_(0_proj|2)))"
    r"|(down|up)samplers_0_conv)|conv_in|conv_out|(time|add)_embedding_linear_[12])"
)
BLOCK_LAYERS = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.net\.(0\.proj|2)"
FLUX_LAYERS = (
    rf"transformer\.(transformer_blocks\.\d+\.({BLOCK_LAYERS})"
    r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out))"
)
SD3_LAYERS = rf"transformer\.transformer_blocks\.\d+\.({BLOCK_LAYERS}|attn2\.(to_[qkv]|to_out\.0))"


SDXL_DEPTH = {
    "block_out_channels": [32, 64, 128],
    "attention_head_dim": [1, 2, 4],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
}


@pytest.mark.parametrize(
    "name, depth, layers, num_layers",
    [
        ("flux", {"num_layers": 19, "num_single_layers": 38}, FLUX_LAYERS, 418),
        ("sd3", {"num_layers": 38, "dual_attention_layers": []}, SD3_LAYERS, 453),  # Large
        ("sd3", {"num_layers": 24, "dual_attention_layers": list(range(13))}, SD3_LAYERS, 337),  # Medium
        ("sdxl", SDXL_DEPTH, UNET_LAYERS, 788),
    ],
)
def test_other_programs_find_every_layer_of_an_adapter_as_deep_as_the_real_ones(
    name, depth, layers, num_layers, teachers, tmp_path, caplog
):
    cls = models_class(SCRIPTS[name])
    required = ["--pretrained_model_name_or_path", "x", "--prompts_file", "x", "--output_dir", "x"]
    args = SCRIPTS[name].parse_args([*required, "--rank", "2", "--lora_alpha", "8"])
    with torch.device("meta"):
        tiny = json.loads((teachers[name] / NETWORK[name] / "config.json").read_text())
        network = cls.network_class.from_config(tiny | depth)
        network.add_adapter(lora_config(args))
    shapes = {key.replace(".default", ""): p.shape for key, p in network.named_parameters() if ".lora_" in key}
    weights = {key: torch.ones(shape) for key, shape in shapes.items()}
    component, base = NETWORK[name], ("a-base", "version 1")
    names = {"base": base, "kohya_names": cls.kohya_names}
    export_lora(tmp_path, cls.pipeline_class, component, network, weights, torch.bfloat16, **names)
    with safe_open(tmp_path / FILE, "pt") as file:
        keys, metadata = set(file.keys()), file.metadata()
        alphas = {file.get_tensor(key).item() for key in keys if key.endswith(".alpha")}
        scales = {file.get_slice(key)[:1].max().item() for key in keys if re.search("lora_(up|B).weight", key)}
    parts = ("lora_up.weight", "lora_down.weight", "alpha") if cls.kohya_names else ("lora_A.weight", "lora_B.weight")
    found = {key.rpartition(".lora_")[0] if ".lora_" in key else key.removesuffix(".alpha") for key in keys}
    assert all(re.fullmatch(layers, layer) for layer in found) and len(found) == num_layers
    assert keys == {f"{layer}.{part}" for layer in found for part in parts}
    assert scales == {8 / 2} and alphas == ({2} if cls.kohya_names else set())  # what B was multiplied by
    assert metadata["modelspec.architecture"] == "a-base/lora" and metadata["ss_base_model_version"] == "version 1"
    assert metadata["ss_network_dim"] == metadata["ss_network_alpha"] == "2" and "not read" not in caplog.text

    if name == "sdxl":  # diffusers reads no embedding of the added conditions by kohya's names: its own are written
        weights["add_embedding.linear_1.lora_A.weight"] = weights["add_embedding.linear_1.lora_B.weight"] = torch.ones(
            2
        )
        export_lora(tmp_path, cls.pipeline_class, component, network, weights, torch.bfloat16, **names)
        with safe_open(tmp_path / FILE, "pt") as file:
            assert set(file.keys()) == {f"unet.{key}" for key in weights}
            assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"] == 2
        assert "diffusers does not read unet.add_embedding.linear_1.lora_A.weight, " in caplog.text


def write_lora(script: str, teachers: dict, file: Path) -> None:
    """Write a typical LoRA: of rank 2 and alpha 4, for attention layers, with nonzero weights."""
    torch.manual_seed(1)
    pipeline = models_class(SCRIPTS[script]).pipeline_class.from_pretrained(teachers[script])
    network, name = getattr(pipeline, NETWORK[script]), NETWORK[script]
    network.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers, metadata = get_peft_model_state_dict(network), network.peft_config["default"].to_dict()
    how = {f"{name}_lora_layers": layers, f"{name}_lora_adapter_metadata": metadata}
    pipeline.save_lora_weights(file.parent, weight_name=file.name, **how)


def test_a_teacher_with_a_lora_is_distilled_and_sampled(flags, teachers, tmp_path, capsys):
    """Sample in float32 and float16: fused weights differ, the teacher's fingerprint must not."""
    lora = tmp_path / "style/mine.safetensors"
    write_lora("sd3", teachers, lora)
    taught = [*flags("sd3"), "--teacher_lora", str(lora.parent), "--teacher_lora_scale", "0.5"]
    run, plain = built(SCRIPTS["sd3"], taught), built(SCRIPTS["sd3"], flags("sd3"))
    teacher, student, fake = outputs(run)
    assert (
        torch.equal(teacher, student)
        and torch.equal(teacher, fake)
        and not torch.allclose(teacher, outputs(plain)[0], atol=1e-3)
    )
    wanted, own = (own_of(built_run.models.teacher.module) for built_run in (plain, run))
    weights = load_file(lora)
    for key in wanted:
        layer = f"transformer.{key.removesuffix('.weight')}"
        a, b = (weights.get(f"{layer}.lora_{half}.weight") for half in "AB")
        delta = 0 if a is None else 0.5 * 4 / 2 * b @ a
        torch.testing.assert_close(own[key], wanted[key] + delta, rtol=0, atol=1e-6)

    out = ["--learning_rate", "3e-2", "--max_train_steps", "2", "--checkpointing_steps", "2"]
    SCRIPTS["sd3"].main([*without(taught, "--learning_rate"), *out])
    the_cards_call_is_infers_image(tmp_path / "out", "sigmas", tmp_path, fresh=False)
    other = ["--teacher_lora_scale", "1", "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match="made with another teacher"):
        SCRIPTS["sd3"].main([*without(taught, "--teacher_lora_scale"), *other])

    student_samples = ["--model", str(tmp_path / "out/checkpoint-2"), "--prompt", "a cat", "--output_dir"]
    infer.main([*student_samples, str(tmp_path / "half"), "--dtype", "fp16"])
    save_file({key: tensor + 1 for key, tensor in weights.items()}, lora)
    capsys.readouterr()
    needle = f"over other weights than those of {teachers['sd3']} with {lora.parent};"
    refused(infer, [*student_samples, str(tmp_path / "changed")], 1, needle, capsys)
    lora = tmp_path / "unfit/mine.safetensors"
    unfit = [*flags("sd3"), "--output_dir", str(tmp_path / "new"), "--teacher_lora", str(lora.parent)]
    write_lora("sdxl", teachers, lora)
    with pytest.raises(UserError, match=f"^--teacher_lora {lora.parent}: has no layer of a SD3Transformer2DModel"):
        built(SCRIPTS["sd3"], unfit)
    save_file({"a": torch.ones(1)}, lora.with_name("second.safetensors"))
    refused(SCRIPTS["sd3"], unfit, 2, f"--teacher_lora {lora.parent}: holds 2 .safetensors files", capsys)
    refused(
        SCRIPTS["sd3"],
        [*flags("sd3"), "--teacher_lora", str(tmp_path / "none")],
        2,
        "none: no such file or folder, and ",
        capsys,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_warning_lists_unknown_layers_of_a_teachers_lora(name, flags, teachers, tmp_path, caplog):
    lora = tmp_path / "mine.safetensors"
    write_lora(name, teachers, lora)
    built(SCRIPTS[name], [*flags(name), "--teacher_lora", str(lora)])
    assert "not in the network" not in caplog.text
    weights = load_file(lora)
    layer = sorted(weights)[0].partition(".lora_")[0]
    save_file({key.replace(f"{layer}.", f"{layer}_of_another."): tensor for key, tensor in weights.items()}, lora)
    built(SCRIPTS[name], [*flags(name), "--teacher_lora", str(lora)])
    name = f"{layer.partition('.')[2]}_of_another"
    assert f"--teacher_lora {lora}: 1 of its {len(weights) // 2} layers are not in the network ({name})" in caplog.text


def test_adapters_come_from_the_hub(exported, flags, teachers, tmp_path, monkeypatch):
    """The Hub is switched off, and the cache has everything."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache_repository(tmp_path / "hub", "me/student", exported / "out", "01" * 20)
    assert np.array_equal(image_of("me/student", tmp_path / "there"), image_of(exported / "out", tmp_path / "here"))
    write_lora("sd3", teachers, tmp_path / "style/mine.safetensors")
    cache_repository(tmp_path / "hub", "me/style", tmp_path / "style", "01" * 20)
    there, here = (
        outputs(built(SCRIPTS["sd3"], flags("sd3", "--teacher_lora", place)))
        for place in ("me/style", str(tmp_path / "style"))
    )
    assert torch.equal(there[0], here[0])


def test_student_and_fake_score_start_from_an_adapter(flags, teachers, tmp_path, capsys):
    lora = tmp_path / "start/mine.safetensors"
    write_lora("sdxl", teachers, lora)
    start = [*without(flags("sdxl"), "--rank"), "--student_model_name_or_path", str(lora)]
    fitting = {"--rank": ["2"], "--lora_alpha": ["4"], "--lora_layers": ["to_q", "to_v"]}

    def given(**changes):
        return [*start, *(word for flag, words in (fitting | changes).items() for word in (flag, *words))]

    run, weights = built(SCRIPTS["sdxl"], given()), load_file(lora)
    for role in (run.models.student, run.models.fake_score):
        own = {f"unet.{key.replace('.default', '')}": tensor for key, tensor in role.parameters.items()}
        assert own.keys() == weights.keys() and all(torch.equal(own[key], weights[key]) for key in own)
    teacher, student, fake = outputs(run)
    assert torch.equal(student, fake) and not torch.allclose(student, teacher, atol=1e-3)
    # Another alpha, and kohya's names with alpha as the rank: the same student.
    torch.testing.assert_close(outputs(built(SCRIPTS["sdxl"], given(**{"--lora_alpha": ["3"]})))[1], student)
    network, names = run.models.student.module, {key.removeprefix("unet."): tensor for key, tensor in weights.items()}
    pipeline = run.models.pipeline_class
    export_lora(tmp_path / "kohya", pipeline, "unet", network, names, torch.float32, kohya_names=True)
    given_kohya = [*given(), "--student_model_name_or_path", str(tmp_path / "kohya")]
    torch.testing.assert_close(outputs(built(SCRIPTS["sdxl"], given_kohya))[1], student)
    capsys.readouterr()
    for changes, needle in (
        ({"--rank": ["3"]}, "its adapter has rank 2; give --rank 2"),
        ({"--lora_layers": ["to_q"]}, "its adapter has other layers ("),
    ):
        refused(SCRIPTS["sdxl"], given(**changes), 2, f"{lora}: {needle}", capsys)


@pytest.mark.parametrize(
    "name, more, needle",
    [
        ("flux", ("--rank", "-1"), "--rank -1: must be a whole number, 0 or more"),
        ("flux", ("--lora_alpha", "0"), "--lora_alpha 0: must be above 0"),
        ("flux", ("--rank", "0", "--teacher_lora", "x"), "--teacher_lora x: only adapters train over such a base"),
        ("flux", ("--rank", "0", "--base_quantization", "4bit"), "--base_quantization 4bit: only adapters train"),
        (
            "flux",
            ("--lora_layers", "to_q", "attn.to_kk"),
            "--lora_layers attn.to_kk: matches no linear or convolutional layer",
        ),
        ("flux", ("--lora_layers", "attn.to_kk"), "there are attn.to_k, "),
        (
            "sdxl",
            ("--lora_layers", r".*attentions\..*"),
            "also matches down_blocks.1.attentions.0, a Transformer2DModel,",
        ),
        ("sd3", ("--lora_layers", "(to_q"), "--lora_layers (to_q: not a regular expression"),
        ("sd3", ("--lora_layers", ".*tooo_q"), "--lora_layers .*tooo_q: matches no linear"),
        ("sd3", ("--student_model_name_or_path", "x"), "--student_model_name_or_path x: no such file or folder"),
        (
            "sd3",
            ("--student_model_name_or_path", "tests"),
            "--student_model_name_or_path tests: holds 0 .safetensors files; give a",
        ),
        ("flux", ("--student_guidance_scale", "0"), "--student_guidance_scale 0: with --rank"),
        (
            "sd3",
            ("--base_quantization", "4bit", "--teacher_lora", "x"),
            "--teacher_lora x: stock pipelines cannot fuse one into",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_loads(name, more, needle, flags, capsys):
    refused(SCRIPTS[name], flags(name, *more), 2, needle, capsys)


def test_an_existing_adapter_is_not_overwritten(flags, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).touch()
    refused(SCRIPTS["flux"], flags("flux"), 2, "holds another run: choose an empty folder", capsys)


def test_deepspeed_is_refused(flags, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("senseflow.training.runtime.launch_config", LaunchConfig)
    refused(SCRIPTS["sd3"], flags("sd3"), 2, "--rank 4: adapters share weights, which DeepSpeed would copy", capsys)


def test_a_quantized_base_is_refused_under_fsdp2_and_without_bitsandbytes(flags, capsys, monkeypatch):
    arguments = flags("flux 4bit")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("senseflow.training.runtime.launch_config", LaunchConfig)
    refused(SCRIPTS["flux"], arguments, 2, "--base_quantization 4bit: FSDP2 cannot shard such a base", capsys)
    missing(monkeypatch, "bitsandbytes")
    refused(
        SCRIPTS["flux"], arguments, 2, "--base_quantization 4bit needs bitsandbytes, which is not installed", capsys
    )


@pytest.mark.parametrize("name", ["flux 4bit", "sdxl 8bit"])
def test_a_run_over_a_quantized_base_resumes_and_samples_as_trained(name, flags, tmp_path, capsys):
    kind, quantization = name.split()
    script, network = SCRIPTS[kind], NETWORK[kind]
    common = without(flags(name, gan=True), "--output_dir", "--ttur_ratio", "--learning_rate")
    common += ["--ttur_ratio", "2", "--learning_rate", "3e-2", "--learning_rate_disc", "1e-3"]
    common += ["--max_train_steps", "4", "--checkpointing_steps", "2"]
    whole = resume_is_the_same_run(script, common, tmp_path)

    record, card = json.loads((whole / "senseflow.json").read_text()), (whole / "README.md").read_text()
    assert record["base_quantization"] == quantization and f"own weights in {quantization}" in card
    names: dict = {}
    exec(card_code(whole).split("pipeline =")[0], names)
    assert (
        names["base"].components_to_quantize == [network] and f"load_in_{quantization}" in names["base"].quant_kwargs
    )
    assert "quantization_config=base" in card

    # The network that infer.py loads equals the trained student.
    run = built(script, [*common, "--output_dir", str(tmp_path / "out")])
    run.models.student.load(whole / "checkpoint-4")
    model = find_model(str(whole))
    student_samples = getattr(load_model_pipeline(model, "euler", torch.device("cpu"), torch.float32), network)
    student = run.models.student.module
    taken = {key: tensor for key, tensor in student_samples.named_parameters()}
    for key, tensor in student.named_parameters():
        assert torch.equal(tensor, taken[key]), key
        taken[key].data = tensor.data  # alignment changes last bits, which 8-bit layers amplify
    predict, x_t = run.models.predict, torch.randn(2, *run.models.latent_shape)
    condition = run.models.encode_prompts(("a red square", "blue"))
    student_samples.requires_grad_(
        False
    )  # as the student's: torch multiplies differently by weights that require grad
    with torch.no_grad():
        wanted = predict(run.models.student, x_t, torch.tensor([900.0, 500.0]), condition).output
        run.models.student.module = student_samples
        found = predict(run.models.student, x_t, torch.tensor([900.0, 500.0]), condition).output
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert image_of(whole / "checkpoint-4", tmp_path / "images").std() > 0

    capsys.readouterr()
    other = [
        *without(common, "--base_quantization"),
        "--output_dir",
        str(tmp_path / "halves"),
        "--resume_from_checkpoint",
        "latest",
    ]
    refused(script, other, 1, f"--base_quantization none: {tmp_path}", capsys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_applied_as_by_peft(dtype):
    """To rounding in float32; under autocast at least as exactly as by peft, output and gradients.

    Copies of A and B in autocast's precision change no bit.
    """

    def run(fused: bool, autocast: bool, copied: bool = False):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 32)).to(dtype)
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=8, target_modules=["0", "2"]), network)
        adapters = [p for p in network.parameters() if p.requires_grad]
        for parameter in adapters:
            parameter.data = torch.randn(parameter.shape) / 4
        if fused:
            fuse_applications(network)
        x = torch.randn(2, 5, 32, requires_grad=True)
        if not autocast:
            network.float()
        if copied:
            WeightCopies(network, adapters, torch.bfloat16).attach()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), Counter() as counter:
            out = network(x)
        operations.append(sum(counter.work.values(), Work()).operations)
        (out.float() * torch.randn(out.shape)).sum().backward()
        return [out.float(), x.grad, *(p.grad for p in adapters)]

    operations: list[float] = []
    exact = run(fused=False, autocast=False)
    torch.testing.assert_close(run(fused=True, autocast=False), exact)
    assert all(map(torch.equal, run(True, True), run(True, True, copied=True)))
    assert operations[-2] - operations[-1] == 4  # casts of A and B of two layers
    if dtype == torch.bfloat16:
        by_peft, ours = run(False, True), run(True, True)
        for wanted, theirs, own in zip(exact, by_peft, ours):
            assert 0 < (own - wanted).norm() < 1.1 * (theirs - wanted).norm()
