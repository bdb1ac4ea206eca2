"""Launched by test_modes.py under FSDP2: what a process holds of three roles over one base.

python tests/one_base.py [the FLUX script's arguments]
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_senseflow_flux as script
from senseflow.models.hub import load_network
from senseflow.training.runtime import Runtime


args = script.parse_args(sys.argv[1:])
source, rows = script.prepare(args)
runtime = Runtime(args)
schedule, _, _ = script.FluxModels.make_schedule(args, source, runtime.device)
whole = load_network(source, script.FluxTransformer2DModel, "transformer")
models = script.make_models(args, source, schedule, runtime)
roles = (models.teacher, models.student, models.fake_score)
data = iter(script.make_dataloader(args, rows, runtime.accelerator.process_index, 2, 0, 0, lambda iteration: False))


def assert_one_base() -> None:
    storages = {}
    for role in roles:
        for parameter in role.module.parameters():
            storage = parameter.to_local().untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    adapters = sum(parameter.numel() for role in roles[1:] for parameter in role.parameters.values())
    wanted = 4 * (sum(parameter.numel() for parameter in whole.parameters()) + adapters) / 2
    assert wanted <= sum(storages.values()) < 1.02 * wanted, (sum(storages.values()), wanted)  # an odd row more
    own = dict(models.teacher.module.named_parameters())
    for role in roles[1:]:
        for name, parameter in role.module.named_parameters():
            assert ".lora_" in name or parameter is own[name.replace(".base_layer.", ".")], name


assert_one_base()
before = {name: parameter.full_tensor() for name, parameter in models.teacher.module.named_parameters()}
for iteration in range(2):
    script.train_iteration(iteration, [next(data)], models, args)
for role in roles[1:]:
    role._free_gathered()
assert_one_base()
for name, parameter in models.teacher.module.named_parameters():
    assert torch.equal(parameter.full_tensor(), before[name]) and torch.equal(
        before[name], dict(whole.named_parameters())[name]
    )
moved = [
    parameter.full_tensor().abs().sum() for name, parameter in models.student.parameters.items() if "lora_B" in name
]
assert all(total > 0 for total in moved)
runtime.accelerator.wait_for_everyone()
runtime.accelerator.end_training()
