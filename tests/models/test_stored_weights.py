"""Weights that cannot be used as they are stored are refused, whatever component and flag they come from."""

import json
import shutil

import pytest
import torch
from diffusers import BitsAndBytesConfig, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

import infer
import train_senseflow_flux
from helpers import refused, without
from senseflow.errors import UserError
from senseflow.models.quantization import quantize_network


TEACHER = "--pretrained_model_name_or_path"


def changed_teacher(teacher, folder, component: str, change):
    """Copy a pipeline with other stored weights in one component; `change(state_dict)` is in place."""
    shutil.copytree(teacher, folder)
    (file,) = (folder / component).glob("*.safetensors")
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})
    return folder


def scale_to_float8(state: dict) -> None:
    """Store matrices as other programs do: float8 codes, and a scale beside each."""
    for name, weight in [(n, w) for n, w in state.items() if n.endswith(".weight") and w.dim() == 2]:
        scale = weight.abs().max() / 448
        state |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name[:-6]}scale_weight": scale.reshape(1)}


def save_quantized(teacher, folder, bits: int):
    """Copy a pipeline with a transformer of bitsandbytes layers, and the configuration that diffusers writes of it."""
    network = FluxTransformer2DModel.from_pretrained(str(teacher), subfolder="transformer")
    quantize_network(network, f"{bits}bit", "cpu")
    changed_teacher(teacher, folder, "transformer", lambda state: state.clear() or state.update(network.state_dict()))
    config = {**network.config, "quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True}).to_dict()}
    (folder / "transformer/config.json").write_text(json.dumps({**config, "_class_name": type(network).__name__}))
    return folder


@pytest.fixture
def train(teacher, data, tmp_path):
    """Return `train(teacher, *flags)` -> arguments of a short run of two iterations without the adversarial term."""

    def arguments(path, *flags) -> list[str]:
        common = ["--dataset_json", data, "--resolution", "64", "--output_dir", tmp_path / "out", "--gan_weight", "0"]
        return [*map(str, [TEACHER, path, *common, "--max_train_steps", "2", "--max_sequence_length", "16", *flags])]

    return arguments


def test_weights_that_are_codes_are_refused(teacher, train, tmp_path, capsys):
    """Refuse them before training in every component and by every flag, and in infer.py what no library decodes."""
    float8 = changed_teacher(teacher, tmp_path / "float8", "transformer", scale_to_float8)
    codes = f"{float8} (transformer): 30 weights in diffusion_pytorch_model.safetensors are codes of type F8_E4M3"
    for flags in ([], ["--rank", "2"], ["--rank", "2", "--base_quantization", "8bit"], ["--dry_run"]):
        refused(train_senseflow_flux, train(float8, *flags), 2, f"error: {TEACHER} {codes}", capsys)
    student = "--student_model_name_or_path"
    refused(train_senseflow_flux, train(teacher, student, float8), 2, f"error: {student} {codes}", capsys)
    generate = ["--prompt", "a hat", "--output_dir", str(tmp_path / "out"), "--model"]
    refused(infer, [*generate, str(float8)], 2, f"error: --model {codes}", capsys)
    for component in ("vae", "text_encoder_2"):
        float8 = changed_teacher(teacher, tmp_path / component, component, scale_to_float8)
        for script, arguments in ((train_senseflow_flux, train(float8)), (infer, [*generate, str(float8)])):
            refused(script, arguments, 2, f"{float8} ({component}): ", capsys)
            refused(script, arguments, 2, "are codes of type F8_E4M3", capsys)
    for bits in (8, 4):
        quantized = save_quantized(teacher, tmp_path / f"{bits}bit", bits)
        needle = f"{quantized} (transformer): is quantized (bitsandbytes), which cannot be trained; give the weights"
        refused(train_senseflow_flux, train(quantized), 2, needle, capsys)
        refused(train_senseflow_flux, train(teacher, student, quantized), 2, needle, capsys)
        # Without that entry of its configuration, its codes still give it away.
        shutil.copy(teacher / "transformer/config.json", quantized / "transformer/config.json")
        codes = f"codes of type {'I8' if bits == 8 else 'U8'}, not values"
        refused(train_senseflow_flux, train(quantized), 2, codes, capsys)


def first_matrix(state: dict) -> str:
    return next(name for name in sorted(state) if name.endswith(".weight") and state[name].dim() == 2)


def put_infinity(state: dict) -> None:
    state[first_matrix(state)][1, 1] = float("inf")


DAMAGES = {
    "hold NaN or infinity": put_infinity,
    "weights are missing": lambda state: state.pop(first_matrix(state)),
    "[5, 7]": lambda state: state.update({first_matrix(state): torch.zeros(5, 7)}),
    "1 weights have no place in its config.json (alien)": lambda state: state.update(alien=torch.zeros(2)),
}


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder_2"])
@pytest.mark.parametrize("problem", DAMAGES)
def test_damaged_weights_are_named(problem, component, teacher, train, tmp_path, capsys):
    """Name component and weight, in training and in infer.py; transformers' classes may leave stored weights out."""
    if "no place" in problem and component == "text_encoder_2":
        pytest.skip("a whole CLIP or T5 serves as a text encoder")
    model = changed_teacher(teacher, tmp_path / "model", component, DAMAGES[problem])
    name = "alien" if "no place" in problem else first_matrix(load_file(next((teacher / component).glob("*.safe*"))))
    generate = ["--model", str(model), "--prompt", "a hat", "--output_dir", str(tmp_path / "out")]
    for script, arguments in ((train_senseflow_flux, train(model)), (infer, generate)):
        with pytest.raises(UserError) as caught:
            script.main(arguments)
        message = str(caught.value)
        assert caught.value.exit_code == 1 and all(part in message for part in (f"({component})", name, problem)), (
            message
        )


def test_a_student_and_an_adapters_base_are_checked_too(teacher, train, tmp_path):
    damaged = changed_teacher(teacher, tmp_path / "model", "transformer", put_infinity)
    student = "--student_model_name_or_path"
    for flag, arguments in (
        (student, train(teacher, student, damaged)),
        (TEACHER, train(damaged, "--rank", "2")),
        (TEACHER, train(damaged, "--rank", "2", "--base_quantization", "8bit")),
    ):
        with pytest.raises(UserError, match=f"^{flag} {damaged} .transformer.: 1 weights hold NaN or infinity"):
            train_senseflow_flux.main(arguments)


def put_nan(file) -> None:
    """Write NaN into a checkpoint's weights."""
    state = load_file(file)
    state[first_matrix(state)][1, 1] = float("nan")
    save_file(state, file, {"format": "pt"})


def test_damaged_checkpoints_are_named(teacher, train, tmp_path):
    flags = train(teacher, "--checkpointing_steps", "1", "--ttur_ratio", "1")
    train_senseflow_flux.main(flags)
    checkpoint = tmp_path / "out/checkpoint-2"
    optimizer, weights = "fake_score_optimizer-00001-of-00001.pt", "transformer/diffusion_pytorch_model.safetensors"
    contents = {name: (checkpoint / name).read_bytes() for name in (optimizer, weights)}
    resumed = [*flags, "--resume_from_checkpoint", "latest"]
    for name, content in contents.items():
        file = checkpoint / name
        for damage in (b"", content[: len(content) // 2]):
            file.write_bytes(damage)
            with pytest.raises(
                UserError, match=f"^--resume_from_checkpoint {checkpoint}.*{file.name} is empty or cut"
            ):
                train_senseflow_flux.main(resumed)
        file.write_bytes(content)
    put_nan(checkpoint / weights)
    with pytest.raises(UserError, match=f"^--resume_from_checkpoint {checkpoint}: the weights of the student are not"):
        train_senseflow_flux.main(resumed)
    (checkpoint / weights).write_bytes(contents[weights])
    shutil.move(checkpoint / optimizer, checkpoint / optimizer.replace("of-00001", "of-00002"))
    with pytest.raises(UserError, match="holds 1 of the 2 files fake_score_optimizer-"):
        train_senseflow_flux.main(resumed)


@pytest.mark.parametrize("flags", [[], ["--rank", "2", "--learning_rate", "1e6"]], ids=["pipeline", "adapter"])
def test_an_export_that_its_dtype_cannot_hold_is_refused(flags, teacher, train, tmp_path):
    """Of weights that float16 cannot hold nothing is written, and the same command exports them in bf16."""

    def enlarge(state: dict) -> None:
        state["x_embedder.weight"][0, 0] = 7e4

    model = teacher if flags else changed_teacher(teacher, tmp_path / "model", "transformer", enlarge)
    arguments = [*train(model, *flags, "--checkpointing_steps", "1", "--ttur_ratio", "1"), "--export_dtype"]
    with pytest.raises(UserError, match="^--export_dtype float16: too narrow for .* weights, which become infinite"):
        train_senseflow_flux.main([*arguments, "fp16"])
    assert not list((tmp_path / "out").glob("*.safetensors")) and not (tmp_path / "out/transformer").exists()
    train_senseflow_flux.main([*arguments, "bf16", "--resume_from_checkpoint", "latest"])
    (file,) = [file for file in (tmp_path / "out").glob("**/*.safetensors") if "checkpoint" not in str(file)][:1]
    assert all(tensor.isfinite().all() for tensor in load_file(file).values())


def test_a_teacher_that_is_not_finite_has_not_diverged(teacher, train, tmp_path):
    """Its finite weights overflow in the first iteration."""

    def enlarge(state: dict) -> None:
        state["proj_out.weight"][:] = 3e38

    model = changed_teacher(teacher, tmp_path / "model", "transformer", enlarge)
    with pytest.raises(
        UserError, match="times in a row.*: no iteration of this run was finite, so the student has not"
    ):
        train_senseflow_flux.main(["--max_train_steps", "5", *without(train(model), "--max_train_steps")])
