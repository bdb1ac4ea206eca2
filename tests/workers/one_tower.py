"""Launched by test_modes.py under FSDP2: what a process gathers of a discriminator, and that it learns as one that is whole.

python tests/one_tower.py OUTPUT_DIR
"""

import copy
import sys
from pathlib import Path

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from senseflow.models.discriminator import Discriminator, Tower
from senseflow.training.runtime import Runtime
from train_senseflow_flux import parse_args


MAPS = 6
flags = [
    "--pretrained_model_name_or_path",
    "none",
    "--mixed_precision",
    "no",
    "--report_to",
    "none",
    "--max_grad_norm",
    "1e9",
]
runtime = Runtime(parse_args([*flags, "--output_dir", sys.argv[1], "--lr_warmup_steps", "0"]))
heads = Discriminator(8, MAPS, 6)
whole = copy.deepcopy(heads).train()
role = runtime.trained_role("discriminator", heads, 0.1, gather_bf16=False)
towers = [module for module in role.module.modules() if isinstance(module, Tower)]
assert len(towers) == 2 * MAPS and all(isinstance(tower, FSDPModule) for tower in towers)
gathered: dict[str, list[int]] = {"forward": [], "backward": []}


def count(passing: str) -> None:
    units = [tower._get_fsdp_state()._fsdp_param_group for tower in towers]
    gathered[passing].append(sum(unit._sharded_state == ShardedState.UNSHARDED for unit in units))


for tower in towers:
    tower[0].register_forward_hook(lambda *_: count("forward"))
    tower[0].register_full_backward_pre_hook(lambda *_: count("backward"))
generator = torch.Generator().manual_seed(0)
real, fake, reference = ([torch.randn(2, 8, 9, 9, generator=generator) for _ in range(MAPS)] for _ in range(3))
text = torch.randn(2, 6, generator=generator)


def loss_of(logits) -> torch.Tensor:
    return sum(own.square().mean() * (number + 1) for number, own in enumerate(logits))


for again in (False, True):  # the second time every tower runs again in its backward
    for tower in towers:
        tower.gradient_checkpointing = again
    with role.accumulate():
        role.backward(loss_of(role((real, fake), reference, text)))
    loss_of(whole((real, fake), reference, text)).backward()
own = dict(whole.named_parameters())
for name, parameter in role.parameters.items():
    torch.testing.assert_close(parameter.grad.full_tensor(), own[name].grad, msg=name)
assert gathered == {"forward": [1] * 3 * 3 * MAPS, "backward": [1] * 2 * 3 * MAPS}, gathered

# In the student's turn gradient goes through it, to the image.
gradients = []
for network in (role, whole.eval().requires_grad_(False)):
    image = [features.clone().requires_grad_() for features in fake]
    loss_of(network((image,), reference, text)).backward()
    gradients.append([features.grad for features in image])
torch.testing.assert_close(*gradients)
assert max(gathered["forward"] + gathered["backward"]) == 1, gathered
runtime.accelerator.wait_for_everyone()
runtime.accelerator.end_training()
