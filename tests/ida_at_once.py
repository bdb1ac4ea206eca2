"""Launched by test_modes.py: IDA between two roles, whose networks a forward has used before, and a forward at once.

python tests/ida_at_once.py OUTPUT_DIR
"""

import sys
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from senseflow_runtime import Runtime
from train_senseflow_flux import parse_args


flags = ["--pretrained_model_name_or_path", "none", "--mixed_precision", "no", "--report_to", "none"]
runtime = Runtime(parse_args([*flags, "--output_dir", sys.argv[1]]))
x, whole, roles = torch.arange(3.0), [], []
for power, name in enumerate(("fake_score", "student"), 1):
    module = torch.nn.Linear(3, 5, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.arange(15.0).view(5, 3) ** power)
    whole.append(module.weight.detach().clone())
    role = runtime.trained_role(name, module, learning_rate=0.0)
    with role.turn():
        role.backward(role(x).sum())
    role.step()  # after a step ZeRO-3 gathers small weights, to keep them
    roles.append(role)
fake_score, student = roles
with torch.no_grad():
    fake_score(x), student(x)  # under FSDP2 and ZeRO-3 this may leave gathered weights behind
    fake_score.align_with(student, 0.25)
    torch.testing.assert_close(fake_score(x), (0.25 * whole[0] + 0.75 * whole[1]) @ x)
runtime.accelerator.wait_for_everyone()
runtime.accelerator.end_training()
