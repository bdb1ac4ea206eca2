"""Run the FLUX script with compiled blocks, none of which may be compiled after two student updates.

Launched by test_modes.py: python tests/workers/compiled.py [the script's arguments]
"""

import sys

import torch
from torch._dynamo.utils import counters

import train_senseflow_flux as script
from senseflow.errors import run_script


train_iteration = script.train_iteration


def iteration_without_compilation(iteration, *args):
    with torch.compiler.set_stance("fail_on_recompile" if iteration >= 10 else "default"):
        return train_iteration(iteration, *args)


def main() -> None:
    script.train_iteration = iteration_without_compilation
    script.main(sys.argv[1:])
    assert counters["stats"]["unique_graphs"] > 20 and not counters["graph_break"], counters


run_script(main)
