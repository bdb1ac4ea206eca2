"""Networks read tensor by tensor equal those of diffusers' loader, whatever their files; files equal its, too."""

import copy
import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from senseflow.errors import UserError
from senseflow.memory.counter import Counter
from senseflow.memory.trace import FakeQuantizedLinear
from senseflow.models.hub import ModelSource, load_network
from senseflow.models.quantization import quantize_linear, quantize_network
from senseflow.models.weights import (
    fingerprint,
    from_pretrained_meta,
    is_meta,
    materialize,
    materialize_submodule,
    save_tensors,
    stored_weights,
    weights_of,
)
from tiny_pipelines import write_sd3, write_sdxl


FLAG = "--pretrained_model_name_or_path"


@pytest.fixture(scope="module")
def networks(teacher, tmp_path_factory):
    """Return {class: (folder of a pipeline, component)}."""
    folders = {"sd3": tmp_path_factory.mktemp("sd3"), "sdxl": tmp_path_factory.mktemp("sdxl")}
    write_sd3(folders["sd3"])
    write_sdxl(folders["sdxl"])
    return {
        FluxTransformer2DModel: (teacher, "transformer"),
        SD3Transformer2DModel: (folders["sd3"], "transformer"),
        UNet2DConditionModel: (folders["sdxl"], "unet"),
    }


def assert_equal_networks(a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Compare values and dtypes of parameters and buffers, stored or not."""
    for one, other in ((a.named_parameters(), b.named_parameters()), (a.named_buffers(), b.named_buffers())):
        one, other = dict(one), dict(other)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel])
@pytest.mark.parametrize("files", ["one", "shards", "fp16", "fp16 in shards", "bin"])
def test_networks_equal_those_that_diffusers_loads(files, kind, dtype, networks, tmp_path):
    path, name = networks[kind]
    variant, size = ("fp16" if "fp16" in files else None), ("60KB" if "shards" in files else "10GB")
    network = kind.from_pretrained(path, subfolder=name, dtype=torch.float16 if variant else torch.float32)
    how = {"max_shard_size": size, "variant": variant, "safe_serialization": files != "bin"}
    network.save_pretrained(tmp_path / name, **how)
    assert ("shards" in files) == (len(list((tmp_path / name).glob("*.safetensors"))) > 1)
    source = ModelSource(FLAG, str(tmp_path), variant=variant)
    whole = load_network(source, kind, name, dtype=dtype)
    empty = from_pretrained_meta(source, kind, name, dtype)
    assert is_meta(empty) and all(parameter.is_meta for parameter in empty.parameters())
    assert fingerprint(empty) == fingerprint(whole)
    copied = copy.deepcopy(empty)  # before it is read
    assert_equal_networks(materialize(empty, "cpu"), whole)
    assert_equal_networks(materialize(copied, "cpu"), whole)
    assert (
        not is_meta(copied)
        and copied.config == {**whole.config, "_name_or_path": str(tmp_path)}
        and not copied.training
    )
    assert {p.data_ptr() for p in empty.parameters()}.isdisjoint(p.data_ptr() for p in copied.parameters())


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("stored", torch.arange(3))
        self.register_buffer("made", torch.arange(4.0), persistent=False)


@pytest.mark.parametrize("by_parts", [False, True])
def test_tied_tensors_stay_tied_and_buffers_that_are_not_stored_stay(by_parts, tmp_path):
    whole = Tied()
    save_file(
        {name: whole.state_dict()[name] for name in ("second.weight", "first.bias", "stored")},
        tmp_path / "w.safetensors",
    )
    empty, taken = Tied(), []
    for part in (empty.first, empty.second):
        part.to("meta")
    empty.second.weight = empty.first.weight
    empty.weights = stored_weights([tmp_path / "w.safetensors"])
    network = materialize(empty, "cpu", taken.append if by_parts else None)
    assert network.first.weight is network.second.weight and torch.equal(network.made, torch.arange(4.0))
    assert_equal_networks(network, whole)
    assert taken == (list(reversed(list(network.modules()))) if by_parts else [])


def test_missing_and_misshapen_weights_are_refused(networks, tmp_path):
    path, name = networks[FluxTransformer2DModel]

    def bad(needle):
        with pytest.raises(UserError, match=f"^{FLAG} {tmp_path} .transformer.: .*{needle}") as error:
            from_pretrained_meta(ModelSource(FLAG, str(tmp_path)), FluxTransformer2DModel, name)
        assert error.value.exit_code == 1

    network = FluxTransformer2DModel.from_pretrained(path, subfolder=name)
    network.save_pretrained(tmp_path / name, max_shard_size="60KB")
    files = sorted((tmp_path / name).glob("*.safetensors"))
    held = files[0].read_bytes()
    files[0].write_bytes(held[:-1])
    bad("cannot load the weights")
    files[0].unlink()
    bad(r"weights are missing .*; download or copy them again")
    weights = load_file(files[1])
    files[0].write_bytes(held)
    dropped = sorted(weights)[0]
    save_file({key: weights[key] for key in weights if key != dropped}, files[1])
    bad(rf"1 weights are missing \({dropped}\)")
    save_file({**weights, dropped: torch.zeros(7)}, files[1])
    bad(rf"1 of another shape \({re.escape(dropped)} \[7\] not \[")


def test_parts_of_the_weights(networks):
    path, name = networks[FluxTransformer2DModel]
    whole = FluxTransformer2DModel.from_pretrained(path, subfolder=name)
    empty = from_pretrained_meta(ModelSource(FLAG, str(path)), FluxTransformer2DModel, name, torch.bfloat16)
    part = materialize_submodule(empty, "time_text_embed.guidance_embedder")
    assert_equal_networks(part, whole.time_text_embed.guidance_embedder)
    weights, own = weights_of(empty), whole.state_dict()
    for key in ("proj_out.weight", "proj_out.bias"):
        assert torch.equal(weights[key][3:7], own[key][3:7])
    assert copy.deepcopy(weights) is weights and weights_of(whole).keys() == weights.keys() == own.keys()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_layers_are_read_and_quantized_one_at_a_time(bits, networks):
    """The result equals a whole network quantized in memory, at about half of its peak memory."""
    path, name = networks[FluxTransformer2DModel]
    whole = FluxTransformer2DModel.from_pretrained(path, subfolder=name)
    held = sum(4 * parameter.numel() for parameter in whole.parameters())
    quantize_network(whole, bits, "cpu")
    empty = from_pretrained_meta(ModelSource(FLAG, str(path)), FluxTransformer2DModel, name)
    with Counter() as counter:
        quantize_network(empty, bits, "cpu")
    assert_equal_networks(empty, whole)
    assert counter.peak < 0.6 * held
    states = torch.randn(2, 16)
    torch.testing.assert_close(empty.x_embedder(states), whole.x_embedder(states), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_quantized_layer_returns_the_precision_of_autocast_as_the_dry_run_counts(bits):
    layer = torch.nn.Linear(64, 32).bfloat16()
    quantized = copy.deepcopy(quantize_linear(layer, bits, torch.bfloat16, "cpu"))
    states = torch.randn(2, 64, requires_grad=True)  # float32, as autocast leaves the output of a norm
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = layer(states), quantized(states)
    assert plain.dtype == found.dtype == FakeQuantizedLinear(layer, int(bits[0]))(states).dtype == torch.bfloat16
    assert (found - plain).abs().max() < 0.2 * plain.abs().max()
    (gradient,) = torch.autograd.grad(found.float().sum(), states)
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("size", ["10GB", "1KB"])
def test_files_equal_those_of_save_pretrained(size, networks, tmp_path):
    path, name = networks[FluxTransformer2DModel]
    network = FluxTransformer2DModel.from_pretrained(path, subfolder=name)
    network.save_pretrained(tmp_path / "diffusers", max_shard_size=size)
    (tmp_path / "ours").mkdir()
    names = {
        "pattern": "diffusion_pytorch_model{suffix}.safetensors",
        "index": "diffusion_pytorch_model.safetensors.index.json",
    }
    state, asked = network.state_dict(), []
    save_tensors(
        tmp_path / "nobody", state, lambda key: asked.append(key) or state[key], False, shard_size=size, **names
    )
    assert sorted(asked) == sorted(state) and not (tmp_path / "nobody").exists()
    save_tensors(tmp_path / "ours", state, state.__getitem__, True, shard_size=size, **names)
    network.save_config(tmp_path / "ours")
    files = {folder: sorted(file.name for file in (tmp_path / folder).iterdir()) for folder in ("diffusers", "ours")}
    assert files["ours"] == files["diffusers"] and (len(files["ours"]) > 3) == (size == "1KB")
    for file in (tmp_path / "diffusers").iterdir():
        other = tmp_path / "ours" / file.name
        if file.suffix == ".json":
            assert json.loads(file.read_text()) == json.loads(other.read_text())
        else:
            with safe_open(file, "pt") as a, safe_open(other, "pt") as b:
                assert a.metadata() == b.metadata() and set(a.keys()) == set(b.keys())
                assert all(torch.equal(a.get_tensor(key), b.get_tensor(key)) for key in a.keys())
    assert_equal_networks(FluxTransformer2DModel.from_pretrained(tmp_path / "ours"), network)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_can_be_written(dtype, tmp_path):
    state = {
        "scalar": torch.ones((), dtype=dtype),
        "none": torch.ones(0, 3, dtype=dtype),
        "some": torch.ones(3, 2, dtype=dtype).T,
    }
    save_tensors(tmp_path, state, state.__getitem__, True)
    read = stored_weights([tmp_path / "model.safetensors"])
    for name, tensor in state.items():
        found = read[name][...]
        assert found.dtype == dtype and found.shape == tensor.shape and torch.equal(found, tensor)
