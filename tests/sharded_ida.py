"""Launched by test_modes.py: IDA on sharded roles whose gathered weights a forward has left behind, then a forward at once."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.device_mesh import init_device_mesh


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from senseflow_roles import ShardedRole, launched


launched()
accelerator = Accelerator(cpu=True)
mesh = init_device_mesh("cpu", (accelerator.num_processes,))
x, whole, roles = torch.arange(3.0), [], []
for name in ("fake_score", "student"):
    module = torch.nn.Linear(3, 5, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.arange(15.0).view(5, 3) ** (1 + len(roles)))
    whole.append(module.weight.detach().clone())
    parameters = dict(module.named_parameters())
    role = ShardedRole(name, module, torch.float32, accelerator, parameters, mesh=mesh, reshard=False, half=False)
    role.prepare(lambda own: (torch.optim.AdamW(own), None))
    role._set_learning(False)
    roles.append(role)
fake_score, student = roles
with torch.no_grad():
    fake_score(x), student(x)  # the gathered weights stay, as `reshard` is false
    fake_score.align_with(student, 0.25)
    torch.testing.assert_close(fake_score(x), (0.25 * whole[0] + 0.75 * whole[1]) @ x)
