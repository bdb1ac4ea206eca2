"""One run at a time writes to an output folder; a run that was killed is followed without a hand."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest
from accelerate import PartialState

import train_senseflow_flux as script
from helpers import ROOT, refused
from senseflow.errors import UserError
from senseflow.training import lock
from senseflow.training.lock import OutputLock


OWNER = """
import os, sys, time
from pathlib import Path
from accelerate import PartialState
from senseflow.training.lock import OutputLock
PartialState()
lock = OutputLock(Path(sys.argv[1]))
if os.fork() > 0:  # the child stands for a worker of the data loader, which outlives its parent
    print("locked", flush=True)
time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    PartialState()
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.5)


def test_a_second_run_is_refused_and_a_killed_one_is_followed_at_once(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 600)
    command = [sys.executable, "-c", OWNER, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    owner = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        assert owner.stdout.readline() == b"locked\n"
        flags = ["--pretrained_model_name_or_path", str(teacher), "--prompts_file", str(ROOT / "prompts.txt")]
        flags += ["--gan_weight", "0", "--backward_simulation_prob", "1", "--resolution", "64"]
        message = f"--output_dir {tmp_path / 'out'}: another run writes there (process {owner.pid} on "
        refused(script, [*flags, "--output_dir", str(tmp_path / "out")], 2, message, capsys)
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
        OutputLock(tmp_path / "out").release()
        assert not list((tmp_path / "out").iterdir())
    finally:
        os.killpg(owner.pid, signal.SIGKILL)


@pytest.mark.parametrize("other_host, locks", [(True, True), (False, False)])
def test_without_the_systems_lock_a_run_is_alive_while_it_renews_its_own(other_host, locks, tmp_path, monkeypatch):
    """On another host, or on a file system without locks."""
    if not locks:
        monkeypatch.setattr(lock.fcntl, "lockf", lambda *args: os.stat(tmp_path / "missing"))
    machine = "another" if other_host else lock.BOOT_ID.read_text().strip()
    (tmp_path / lock.LOCK_FILE).write_text(json.dumps({"host": "node7", "process": 42, "machine": machine}))
    stop = threading.Event()

    def renew():
        while not stop.wait(0.05):
            os.utime(tmp_path / lock.LOCK_FILE)

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(
        UserError, match=r"another run writes there \(process 42 on node7\); wait for its end"
    ) as error:
        OutputLock(tmp_path)
    assert error.value.exit_code == 2
    stop.set()
    thread.join()
    held = OutputLock(tmp_path)
    assert json.loads(held.path.read_text())["process"] == os.getpid()
    before = held.path.stat().st_mtime_ns
    for _ in range(100):
        if held.path.stat().st_mtime_ns != before:
            break
        stop.clear()
        stop.wait(0.05)
    else:
        pytest.fail("the lock is not renewed")
    held.release()
    assert not held.path.exists()


def test_a_folder_to_which_nothing_can_be_written_is_named(tmp_path):
    """A limit on the size of files stands for a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(UserError, match=f"^--output_dir {tmp_path}: cannot be written to .File too large.; give"):
            OutputLock(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
