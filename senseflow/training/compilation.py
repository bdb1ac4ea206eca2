# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""torch.compile of the repeated blocks of networks, as accelerate's dynamo settings ask for.

Each class of blocks is compiled once for every kind of call (with gradient or without, shapes, precision, adapters),
not once for every block. What is between the blocks runs as it is.
"""

from functools import partial
from typing import Any

import torch

from senseflow.errors import UserError


# A residual block of SDXL's UNet has a shape for each resolution and width, and four kinds of calls. What exceeds the
# limit would run without being compiled; torch warns then.
RECOMPILE_LIMIT = 256
BLOCKS_OF_ANY_NETWORK = ("ResnetBlock2D",)  # of UNets and VAEs; diffusers names other blocks in the network's class


def set_up_compilation(options: dict[str, Any], device: torch.device) -> None:
    """Compile a small function, and set what torch.compile needs for our networks.

    Raises:
        UserError: exit code 2; the backend does not work here, as for want of a C compiler.
    """
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.optimize_ddp = False  # it cuts blocks at DDP's buckets, and refuses checkpoints inside them
    try:
        torch.compile(lambda x: x.sin() + 1, **options)(torch.ones(8, device=device))
    except Exception as error:  # each backend raises its own
        reason = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        entry = f"dynamo_backend {options['backend']}, dynamo_mode {options.get('mode', 'default')}"
        fix = "install what is missing, or set dynamo_backend to no"
        raise UserError(f"accelerate's configuration: {entry} does not run here ({reason}): {fix}", 2) from error


def compile_blocks(network: torch.nn.Module, options: dict[str, Any]) -> None:
    """Compile the forward of a network's repeated blocks in place.

    Modules and the names of parameters stay. Hooks, such as FSDP's, are not compiled. A compiled network cannot be
    copied: the copy's blocks would run with the original's weights.
    """
    names = set(BLOCKS_OF_ANY_NETWORK)
    for module in network.modules():
        names |= set(getattr(module, "_repeated_blocks", None) or getattr(module, "_no_split_modules", None) or ())
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    for block in blocks:
        forward = block.forward
        if isinstance(forward, partial):  # of torch.utils.checkpoint: what it recomputes is compiled
            compiled = torch.compile(forward.args[0], **options)
            block.forward = partial(forward.func, compiled, *forward.args[1:], **forward.keywords)
        else:
            block.forward = torch.compile(forward, **options)
