"""Check IDA and one step of a role in every mode, by the forward that follows. Launched by test_modes.py.

python tests/workers/role_step.py OUTPUT_DIR
"""

import sys

import torch

from senseflow.errors import exit_without_finalization
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from train_senseflow_flux import parse_args


flags = "--pretrained_model_name_or_path none --mixed_precision no --report_to none --max_grad_norm 0.5".split()
runtime = Runtime(parse_args([*flags, "--output_dir", sys.argv[1], "--lr_warmup_steps", "0"]))
x = torch.arange(3.0)


def role_with(weight: torch.Tensor, name: str, learning_rate: float) -> Role:
    module = torch.nn.Linear(3, 5, bias=False)
    with torch.no_grad():
        module.weight.copy_(weight)
    return runtime.trained_role(name, module, learning_rate)


def step(role: Role, target: float) -> torch.Tensor:
    with role.accumulate():
        role.backward((role(x) - target).square().sum())
    return role.step()


# IDA between two roles whose networks have run a forward before.
weights = [torch.arange(15.0).view(5, 3) ** power for power in (1, 2)]
fake_score, student = (role_with(weight, name, 0.0) for weight, name in zip(weights, ("fake_score", "student")))
for role in (fake_score, student):
    step(role, 0.0)  # after a step, ZeRO-3 keeps small weights gathered
with torch.no_grad():
    fake_score(x), student(x)  # FSDP2 and ZeRO-3 may leave weights gathered
    fake_score.ida_update_from(student, 0.25)
    torch.testing.assert_close(fake_score(x), (0.25 * weights[0] + 0.75 * weights[1]) @ x)

# A step is skipped if its gradient is not finite in one process: weights and moments stay as they were.
start = torch.linspace(-1, 1, 15).view(5, 3)
weight = torch.nn.Parameter(start.clone())
adam = torch.optim.AdamW([weight], lr=0.1, eps=1e-8, weight_decay=0.0)
role = role_with(start, "discriminator", 0.1)
for target in (1.0, float("nan"), -2.0, float("inf"), 0.5):
    last_rank = runtime.accelerator.process_index == runtime.accelerator.num_processes - 1
    finite = torch.tensor(target).isfinite()
    norm = step(role, target if finite or last_rank else 0.0)
    assert norm.isfinite() == finite, (target, norm)
    if finite:
        (weight @ x - target).square().sum().backward()
        torch.testing.assert_close(norm.cpu().float(), torch.nn.utils.clip_grad_norm_([weight], 0.5))
        adam.step()
        adam.zero_grad()
    with torch.no_grad():
        torch.testing.assert_close(role(x), weight @ x, msg=f"after the step towards {target}")
runtime.accelerator.wait_for_everyone()
runtime.accelerator.end_training()
exit_without_finalization()
