# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Keep a second run out of an output folder, and let a run that was killed be resumed without a hand."""

import atexit
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from accelerate.logging import get_logger

from senseflow.errors import UserError


logger = get_logger(__name__)

LOCK_FILE = "run.lock"
HEARTBEAT_SECONDS = 10
PATIENCE_SECONDS = 150  # without a heartbeat; a shared file system may show one 60 s late
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class OutputLock:
    """Make a folder and lock it until `release` or the end of this process.

    The lock file names its host and process. It is held by a lock of the operating system, which ends with the process
    in whatever way it ends. Not every shared file system shows such locks to other hosts. The time of the file is
    renewed for these: a file from another host, or from before a reboot, is stale if its time stays the same for
    PATIENCE_SECONDS.

    Raises:
        UserError: exit code 2; another run writes to the folder, or nothing can be written to it.
    """

    def __init__(self, folder: Path):
        self.path, self._process = folder / LOCK_FILE, os.getpid()
        machine = BOOT_ID.read_text().strip() if BOOT_ID.exists() else socket.gethostname()
        record = {"host": socket.gethostname(), "process": self._process, "machine": machine}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_enforced = self._open()
            owner = self._owner()
            if owner and not (is_enforced and owner.get("machine") == machine):
                self._wait_for_heartbeat(owner)
            self._file.truncate(0)
            self._file.write(json.dumps(record).encode())
        except OSError as error:
            problem = f"cannot be written to ({error.strerror}); give another folder"
            raise UserError(f"--output_dir {folder}: {problem}", exit_code=2) from error
        self._released = threading.Event()
        threading.Thread(target=self._renew, daemon=True).start()
        atexit.register(self.release)

    def release(self) -> None:
        """Remove the lock. After a run that could not, the next one finds it stale."""
        if self._process == os.getpid() and not self._released.is_set():
            self._released.set()
            self.path.unlink(missing_ok=True)
            self._file.close()

    def _open(self) -> bool:
        """Open and lock the file. Return whether this file system has locks. UserError if another run has it."""
        while True:
            self._file = open(self.path, "ab+", buffering=0)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                raise self._refusal(self._owner()) from None
            except OSError:
                return False
            if self.path.exists() and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                return True  # else its owner removed it meanwhile

    def _owner(self) -> dict:
        """Read whose lock it is; empty for a new file."""
        self._file.seek(0)
        try:
            return dict(json.loads(self._file.read(4096)))
        except (ValueError, TypeError):
            return {}

    def _refusal(self, owner: dict) -> UserError:
        run = f"process {owner.get('process')} on {owner.get('host')}"
        problem = f"another run writes there ({run}); wait for its end, or give another folder"
        return UserError(f"--output_dir {self.path.parent}: {problem}", exit_code=2)

    def _wait_for_heartbeat(self, owner: dict) -> None:
        """Return after PATIENCE_SECONDS; UserError if the lock is renewed meanwhile."""
        run, time_seen = f"process {owner.get('process')} on {owner.get('host')}", self.path.stat().st_mtime_ns
        logger.info(f"{self.path}: waiting {PATIENCE_SECONDS} s for a sign that {run} still runs")
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            if self.path.stat().st_mtime_ns != time_seen:
                raise self._refusal(owner)
            time.sleep(HEARTBEAT_SECONDS / 10)

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT_SECONDS):
            with suppress(OSError, ValueError):  # an outage of the file system, or just released
                os.utime(self._file.fileno())
