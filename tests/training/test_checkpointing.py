"""--gradient_checkpointing_interval: which blocks are recomputed, and that gradients stay the same."""

from collections import Counter
from math import ceil

import pytest
import torch

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import built
from senseflow.training.roles import Role
from tiny_pipelines import write_flux, write_sd3


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
BLOCKS = "FluxTransformerBlock FluxSingleTransformerBlock JointTransformerBlock ResnetBlock2D BasicTransformerBlock"


@pytest.mark.parametrize("name, blocks, more", [("flux", 4, ["--rank", "4"]), ("sd3", 5, []), ("sdxl", 11, [])])
def test_every_third_block_is_recomputed_with_equal_gradients(
    name, blocks, more, teachers, data, tmp_path, monkeypatch
):
    """And none of the fake score, in an iteration of several forwards, with and without gradient.

    Args:
        blocks: that diffusers recomputes; of SDXL's, all but the first of the middle.
    """
    path = teachers[name] if name == "sdxl" else tmp_path / name
    if name == "flux":
        write_flux(path, layers=2)
    elif name == "sd3":
        write_sd3(path, layers=5)
    backward, step, in_backward = Role.backward, Role.step, [""]

    def recording_backward(role, loss):
        in_backward[0] = role.name
        backward(role, loss)
        in_backward[0] = ""

    def measure(*flags):
        recomputed, gradients = Counter(), {}

        def recording_step(role, *args, **kwargs):
            gradients.update({(role.name, name): p.grad.clone() for name, p in role.parameters.items()})
            return step(role, *args, **kwargs)

        monkeypatch.setattr(Role, "step", recording_step)
        arguments = ["--pretrained_model_name_or_path", path, "--output_dir", tmp_path, "--dataset_json", data]
        arguments += ["--resolution", "64", "--report_to", "none", "--gan_weight", "0", "--ttur_ratio", "1"]
        arguments += ["--gradient_accumulation_steps", "2", *more, *flags]
        run = built(SCRIPTS[name], [str(part) for part in arguments])
        for block in (*run.models.student.module.modules(), *run.models.fake_score.module.modules()):
            if type(block).__name__ in BLOCKS.split():
                block.register_forward_pre_hook(lambda *_: recomputed.update(filter(None, in_backward)))
        run.step(0)
        return recomputed, gradients

    monkeypatch.setattr(Role, "backward", recording_backward)
    all_blocks, expected = measure("--gradient_checkpointing")
    some, gradients = measure("--gradient_checkpointing_interval", "3", "0")
    assert all_blocks == {"student": 2 * blocks, "fake_score": 2 * blocks}
    assert some == {"student": 2 * ceil(blocks / 3)}
    assert gradients.keys() == expected.keys() and any(gradient.any() for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-5, atol=1e-7, msg=str(key))
