"""The files of runs/ whole, with tiny networks in the place of the weights. `make test-runs`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import Workspace

from helpers import ROOT, without


RUNS = sorted(path.name for path in (ROOT / "runs").glob("*.sh") if path.name != "common.sh")


@pytest.fixture(scope="session")
def workspace(teacher, vision, data, lmdb_of_latents, tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp("runs"), teacher, vision, data, lmdb_of_latents)


def run(name: str, workspace: Workspace, **variables: str) -> subprocess.CompletedProcess:
    """A file of runs/ as a user starts it, made small by its own variables."""
    family = name.split("_")[0].replace("sd35", "sd3").replace("photos", "sdxl")
    teacher = {"flux": "black-forest-labs/FLUX.1-dev", "sd3": "stabilityai/stable-diffusion-3.5-medium"}
    teacher = workspace.stand_ins[teacher.get(family, "stabilityai/stable-diffusion-xl-base-1.0")]
    train = f"--resolution 64 --discriminator_text_encoder {workspace.vision}/clip --report_to none --ttur_ratio 1"
    if "photos" not in name:  # which names its own
        train += f" --discriminator_backbone {workspace.vision}/dinov2"
    if family != "sdxl":
        train += " --max_sequence_length 16"
    scorers = without(workspace.write_scorers(), "--inception")  # which a run gives itself
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "TEACHER": teacher,
        "DATA": workspace.stand_ins["data.json"],
        "PHOTOS": str(workspace.folder / "photos"),
        "PROMPTS": str(workspace.folder / "prompts.txt"),
        "OUT": str(workspace.folder / name),
        "TABLE": str(workspace.folder / f"{name}.md"),
        "INCEPTION": str(workspace.folder / "scorers/inception.pt"),
        "METRICS": "fid clip pickscore",
        "EVALUATE": " ".join(scorers),
        "TRAIN": train,
        "STEPS": "2",
        "TEACHER_STEPS": "2",
        "GPUS": "2",
        "BACKBONE": f"{workspace.vision}/dinov2",
        **variables,
    }
    return subprocess.run(["bash", ROOT / "runs" / name], env=environment, capture_output=True, text=True, cwd="/")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_from_the_weights_to_a_row_and_does_nothing_twice(name, workspace):
    ended = run(name, workspace)
    assert ended.returncode == 0, ended.stderr[-3000:]
    output = workspace.folder / name
    table = (workspace.folder / f"{name}.md").read_text()
    assert f"| {output}/student | " in table and ("the paper" in table) == ("photos" not in name)
    written = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    if "lora" in name and "80gb" in name:
        again = run(name, workspace)
        assert again.returncode == 0 and again.stdout.endswith(table), again.stderr[-3000:]
        assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == written
