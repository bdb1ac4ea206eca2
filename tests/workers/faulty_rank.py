"""Run the FLUX script with a fault in the process of rank 1. Launched by test_modes.py.

python tests/workers/faulty_rank.py {error, nan, unreadable, encoding, elsewhere} [the script's arguments]
"""

import os
import sys
import tempfile

import train_senseflow_flux as script
from senseflow.errors import UserError, run_script


train_iteration, make_dataloader = script.train_iteration, script.make_dataloader
fault, *arguments = sys.argv[1:]


def faulty_iteration(iteration, *args):
    if iteration > 0 and fault == "error":
        raise UserError("--dataset_json data.json: the disk went away; mount it again")
    values, debug_latents = train_iteration(iteration, *args)
    if iteration > 0 and fault == "nan":
        values["fake_loss"] = values["fake_loss"] * float("nan")
    return values, debug_latents


def unreadable_data(*args):
    loader = make_dataloader(*args)
    loader.failure = UserError("--dataset_json data.json: lost.png; mend it")
    return loader


def faulty_encoding(models, prompts):
    raise UserError("--cache_dir cache: the disk went away; mount it again")


if fault == "elsewhere":  # a relative path is another one in each process, as on another node
    os.chdir(tempfile.mkdtemp(dir=arguments[-1]))
if os.environ["RANK"] == "1":
    if fault == "encoding":
        script.FluxModels.encode_prompts = faulty_encoding
    script.train_iteration = faulty_iteration
    if fault == "unreadable":
        script.make_dataloader = unreadable_data
run_script(lambda: script.main(arguments))
