"""Tiny networks and data, made once per session; everything runs offline on a CPU."""

import json
import os
import signal
import tempfile


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from PIL import Image  # noqa: E402

from helpers import dry_runs, record_runs  # noqa: E402
from senseflow.arguments import Parser  # noqa: E402
from senseflow.models.hub import resolve_repo  # noqa: E402
from tiny_pipelines import write_discriminator, write_flux, write_sd3, write_sdxl  # noqa: E402


@pytest.fixture(autouse=True)
def a_fresh_look_at_the_hub():
    """Each test is a process of its own to the Hub's repositories, which a process sees at one commit."""
    resolve_repo.cache_clear()


@pytest.fixture(autouse=True, scope="session")
def the_last_of_a_repeated_flag_counts():
    """So tests change the flags of fixtures; what the scripts do is tested in processes of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "check_repeated", lambda *args: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def training_runs_are_recorded():
    with pytest.MonkeyPatch.context() as patch:
        record_runs(patch)
        yield


@pytest.fixture(scope="session")
def traced(tmp_path_factory):
    """A folder, the same in all processes of pytest-xdist, with a file for each kind of run that was traced."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traced"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def a_dry_run_of_what_was_trained(training_runs_are_recorded, traced):
    """--dry_run traces what a test or its fixtures have trained, here or launched, once for each kind of run.

    It comes after the end of the test's own fixtures, so without its patches.
    """
    yield
    with tempfile.TemporaryDirectory() as folder:
        for script, arguments in dry_runs(traced):
            AcceleratorState._reset_state()  # its precision
            script.main([*arguments, "--output_dir", folder])
            AcceleratorState._reset_state()


@pytest.fixture(autouse=True, scope="session")
def what_datasets_caches_ends_with_the_tests(tmp_path_factory):
    """Also of scripts that they launch."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(autouse=True)
def ctrl_c_ends_the_tests():
    """And not a script's loop that a test has run here."""
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A tiny FluxPipeline with embedded guidance."""
    path = tmp_path_factory.mktemp("flux")
    write_flux(path)
    return path


@pytest.fixture(scope="session")
def teachers(teacher, tmp_path_factory):
    """Return {script: folder of a tiny pipeline}."""
    found = {"flux": teacher}
    for name, write in (("sd3", write_sd3), ("sdxl", write_sdxl)):
        found[name] = tmp_path_factory.mktemp(name)
        write(found[name])
    return found


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """A folder with a tiny DINOv2 (dinov2/) and a tiny CLIP text encoder (clip/)."""
    path = tmp_path_factory.mktemp("vision")
    write_discriminator(path)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A dataset JSON of 12 images of different sizes."""
    path = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    colors = ["red", "green", "blue", "yellow", "black", "white"]
    names, prompts = [], []
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (70 + i, 90 - i, 3), dtype=np.uint8)).save(path / f"{i}.png")
        names.append(f"{i}.png")
        prompts.append(f"a {colors[i % 6]} square number {i}")
    rows = {"keys": [str(i) for i in range(12)], "image_paths": names, "prompts": prompts}
    (path / "data.json").write_text(json.dumps(rows))
    return path / "data.json"


@pytest.fixture(scope="session")
def lmdb_of_latents(tmp_path_factory):
    """A folder with DMD2's LMDB: six latents of the tiny VAE's shape at 64 px."""
    import lmdb

    path = tmp_path_factory.mktemp("lmdb")
    rng = np.random.default_rng(0)
    with lmdb.open(str(path), map_size=2**20) as store, store.begin(write=True) as transaction:
        transaction.put(b"latents_shape", b"6 4 8 8")
        for i in range(6):
            transaction.put(f"latents_{i}_data".encode(), rng.standard_normal((4, 8, 8)).astype(np.float16).tobytes())
            transaction.put(f"prompts_{i}_data".encode(), f"a red square number {i}".encode())
    return path


@pytest.fixture
def bfloat16():
    """Runs of this test may be of another precision than those of this process before it, and after it."""
    AcceleratorState._reset_state()
    yield ["--mixed_precision", "bf16", "--gradient_checkpointing"]
    AcceleratorState._reset_state()
