"""Run every role of every script with a substitute for xformers, and refuse an xformers that fails."""

import sys
from types import SimpleNamespace

import diffusers.models.attention_dispatch
import diffusers.models.attention_processor
import pytest
import torch

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import built, refused
from senseflow.training import models as training_models
from tiny_pipelines import write_sd3, write_sdxl


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
FLAG = "--enable_xformers_memory_efficient_attention"


class TorchWithGPU:
    """torch that reports a GPU and makes its tensors on the CPU."""

    cuda = SimpleNamespace(is_available=lambda: True)

    def __getattr__(self, name):
        found = getattr(torch, name)
        if name not in ("zeros", "randn"):
            return found
        return lambda *shape, device=None, **how: found(*shape, **how)


@pytest.fixture
def attend(monkeypatch):
    """Replace xformers' attention; `attend.shapes` lists the queries' shapes, `attend.fails` is an error to raise."""
    attend = SimpleNamespace(shapes=[], fails=None)

    def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, op=None):
        if attend.fails:
            raise attend.fails
        attend.shapes.append(query.shape)
        # xformers takes (B, L, heads, D), or (B, L, D).
        query, key, value = (each.transpose(1, -2) if each.ndim == 4 else each for each in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)
        return out.transpose(1, -2) if out.ndim == 4 else out

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    package = SimpleNamespace(ops=ops, __spec__=object())
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr(diffusers.models.attention_dispatch, "_CAN_USE_XFORMERS_ATTN", True)
    monkeypatch.setattr(diffusers.models.attention_dispatch, "xops", ops)
    # Setting a network's backend sets a global, which must not reach other tests.
    backends = diffusers.models.attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(backends, "_active_backend", backends._active_backend)
    monkeypatch.setattr(diffusers.models.attention_processor, "is_xformers_available", lambda: True)
    monkeypatch.setattr(diffusers.models.attention_processor, "xformers", package, raising=False)
    for module in (training_models, diffusers.models.attention_processor):  # both first try xformers on a GPU
        monkeypatch.setattr(module, "torch", TorchWithGPU())
    return attend


@pytest.fixture(params=SCRIPTS)
def run(request, teacher, data, tmp_path, monkeypatch):
    """Return (script, flags) without the adversarial term."""
    kind, path = request.param, teacher
    if kind != "flux":
        path = tmp_path / kind
        {"sd3": write_sd3, "sdxl": write_sdxl}[kind](path)
    flags = [
        "--pretrained_model_name_or_path",
        str(path),
        "--dataset_json",
        str(data),
        "--resolution",
        "64",
        "--gan_weight",
        "0",
    ]
    flags += ["--output_dir", str(tmp_path / "out"), "--train_batch_size", "2"]
    return SCRIPTS[kind], flags + (["--max_sequence_length", "16"] if kind != "sdxl" else [])


@torch.no_grad()
def test_every_role_uses_xformers(run, attend, monkeypatch):
    script, flags = run
    x_t, t = torch.randn(2, *built(script, flags).models.latent_shape), torch.tensor([900.0, 500.0])

    def predictions(models):
        condition, found = models.encode_prompts(("a red square", "blue")), []
        for role in (models.teacher, models.student, models.fake_score):
            attend.shapes.clear()
            found.append((models.predict(role, x_t, t, condition).x0, len(attend.shapes)))
        return found

    plain = predictions(built(script, flags).models)
    for (wanted, none), (x0, calls) in zip(plain, predictions(built(script, [*flags, FLAG]).models), strict=True):
        assert none == 0 and calls > 0
        torch.testing.assert_close(x0, wanted, atol=1e-5, rtol=1e-5)


def test_failing_xformers_is_refused(run, attend, capsys):
    script, flags = run
    attend.fails = NotImplementedError("No operator found:\n  many lines")
    refused(script, [*flags, FLAG], 2, f"{FLAG}: xformers' attention does not run here (No operator found)", capsys)
