"""Check under FSDP2 that one group of towers is gathered at a time, and that training equals that of one process.

Launched by test_modes.py: python tests/workers/gathered_towers.py OUTPUT_DIR
"""

import copy
import math
import sys

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

from senseflow.errors import exit_without_finalization
from senseflow.models.discriminator import TOWERS_PER_GROUP, Discriminator, TowerGroup
from senseflow.training.runtime import Runtime
from train_senseflow_flux import parse_args


NUM_MAPS, NUM_GROUPS = 6, math.ceil(6 / TOWERS_PER_GROUP)
flags = "--pretrained_model_name_or_path none --mixed_precision no --report_to none --max_grad_norm 1e9".split()
runtime = Runtime(parse_args([*flags, "--output_dir", sys.argv[1], "--lr_warmup_steps", "0"]))
discriminator = Discriminator(8, NUM_MAPS, 6)
unsharded = copy.deepcopy(discriminator).train()
role = runtime.trained_role("discriminator", discriminator, 0.1, gather_bf16=False)
groups = [module for module in role.module.modules() if isinstance(module, TowerGroup)]
assert len(groups) == 2 * NUM_GROUPS > 2 and all(isinstance(group, FSDPModule) for group in groups)
num_gathered: dict[str, list[int]] = {"forward": [], "backward": []}


def count(direction: str) -> None:
    states = [group._get_fsdp_state()._fsdp_param_group._sharded_state for group in groups]
    num_gathered[direction].append(states.count(ShardedState.UNSHARDED))


for group in groups:
    group.norms["0"].register_forward_hook(lambda *_: count("forward"))
    group.norms["0"].register_full_backward_pre_hook(lambda *_: count("backward"))
generator = torch.Generator().manual_seed(0)
real, fake, reference = ([torch.randn(2, 8, 9, 9, generator=generator) for _ in range(NUM_MAPS)] for _ in range(3))
text = torch.randn(2, 6, generator=generator)


def loss_of(logits) -> torch.Tensor:
    return sum(each.square().mean() * (number + 1) for number, each in enumerate(logits))


for checkpointing in (False, True):  # with checkpointing every group runs again in its backward
    for group in groups:
        group.gradient_checkpointing = checkpointing
    with role.accumulate():
        role.backward(loss_of(role((real, fake), reference, text)))
    loss_of(unsharded((real, fake), reference, text)).backward()
gradients = {name: parameter.grad for name, parameter in unsharded.named_parameters()}
for name, parameter in role.parameters.items():
    torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], msg=name)
assert num_gathered == {"forward": [1] * 3 * 2 * NUM_GROUPS, "backward": [1] * 2 * 2 * NUM_GROUPS}, num_gathered

# In a student update, gradient flows through the frozen discriminator to the image.
gradients = []
for network in (role, unsharded.eval().requires_grad_(False)):
    image = [features.clone().requires_grad_() for features in fake]
    loss_of(network((image,), reference, text)).backward()
    gradients.append([features.grad for features in image])
torch.testing.assert_close(*gradients)
assert max(num_gathered["forward"] + num_gathered["backward"]) == 1, num_gathered
runtime.accelerator.wait_for_everyone()
runtime.accelerator.end_training()
exit_without_finalization()
