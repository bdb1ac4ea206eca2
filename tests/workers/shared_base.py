"""Check under FSDP2 that a process holds its shard of one base, which three roles share. Launched by test_modes.py.

python tests/workers/shared_base.py [the FLUX script's arguments]
"""

import sys

import torch

import helpers
import train_senseflow_flux as script
from senseflow.errors import exit_without_finalization
from senseflow.training.runtime import Runtime


class RuntimeWithJudge(Runtime):
    """Make a second frozen role after the teacher's: adapters must not take its weights for their base."""

    def frozen_role(self, name, module):
        role = super().frozen_role(name, module)
        super().frozen_role("judge", script.FluxTransformer2DModel.from_config(module.config))
        return role


helpers.Runtime = RuntimeWithJudge
run = helpers.built(script, sys.argv[1:])
stock = script.FluxTransformer2DModel.from_pretrained(run.args.pretrained_model_name_or_path, subfolder="transformer")
base_weights = dict(stock.named_parameters())
teacher, *adapted = run.models.teacher, run.models.student, run.models.fake_score


def assert_one_base() -> None:
    storages = {}
    for role in (teacher, *adapted):
        for parameter in role.module.parameters():
            storage = parameter.to_local().untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    num_values = sum(parameter.numel() for parameter in base_weights.values())
    num_values += sum(parameter.numel() for role in adapted for parameter in role.parameters.values())
    expected = 4 * num_values / 2
    assert expected <= sum(storages.values()) < 1.02 * expected, (storages, expected)  # one row more, if they are odd
    shared = dict(teacher.module.named_parameters())
    for role in adapted:
        for name, parameter in role.module.named_parameters():
            assert ".lora_" in name or parameter is shared[name.replace(".base_layer.", ".")], name


assert_one_base()
for iteration in range(2):
    run.step(iteration)
for role in adapted:
    role._free_gathered()
assert_one_base()
for name, parameter in teacher.module.named_parameters():
    assert torch.equal(parameter.full_tensor(), base_weights[name]), name
for name, parameter in run.models.student.parameters.items():
    assert "lora_B" not in name or parameter.full_tensor().abs().sum() > 0, name
run.runtime.accelerator.wait_for_everyone()
run.runtime.accelerator.end_training()
exit_without_finalization()
