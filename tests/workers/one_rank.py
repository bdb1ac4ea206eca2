"""Launched by test_modes.py: the FLUX script, with a fault in the process of rank 1.

python tests/one_rank.py {error, nan, unreadable} [the script's arguments]
"""

import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_senseflow_flux as script
from senseflow.errors import UserError, run_script


iterate, load = script.train_iteration, script.make_dataloader


def faulty(iteration, *args):
    if iteration > 0 and sys.argv[1] == "error":
        raise UserError("--dataset_json data.json: the disk went away; mount it again")
    values, seen = iterate(iteration, *args)
    if iteration > 0 and sys.argv[1] == "nan":
        values["fake_loss"] = values["fake_loss"] * float("nan")
    return values, seen


def unreadable(*args):
    loader = load(*args)
    loader.failure = UserError("--dataset_json data.json: lost.png; mend it")
    return loader


if os.environ["RANK"] == "1":
    script.train_iteration = faulty
    if sys.argv[1] == "unreadable":
        script.make_dataloader = unreadable
run_script(lambda: script.main(sys.argv[2:]))
