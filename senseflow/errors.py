# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Report what a user can fix as one line and an exit code, and write files so that they are complete or absent."""

import atexit
import errno
import importlib.util
import json
import logging
import os
import pickle
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, NoReturn, Optional

from safetensors import SafetensorError


# Exit codes: 128 + SIGINT, 128 + SIGTERM.
INTERRUPTED, TERMINATED = 130, 143
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
LAUNCHER_POLL_SECONDS = 3  # torchrun polls its processes ten times a second


class UserError(Exception):
    """An error that the user can fix: one line that names the flag, the value and the fix.

    Args:
        message: that line.
        exit_code: 2 for bad arguments (found before any weights load), 130 and 143 for a run ended by Ctrl-C and
            SIGTERM, else 1.
        everywhere: whether all processes raise it at the same place. Only one of them prints it then.
    """

    def __init__(self, message: str, exit_code: int = 1, everywhere: bool = False):
        super().__init__(message)
        self.exit_code, self.everywhere = exit_code, everywhere


def run_script(main: Callable[[], object]) -> None:
    """Run a script's main function. Print a UserError or Ctrl-C as one line on stderr, without a traceback, and exit.

    If several processes run, the launcher gets the message, too; it ends the others and prints the message last.
    A complete run of several processes ends without Python's finalization.
    """
    quiet_libraries()
    rank = os.environ.get("RANK", "0")
    try:
        main()
    except UserError as error:
        traceback.clear_frames(error.__traceback__)  # close the progress bar first: it would stand below the message
        line = " ".join(str(error).split())
        if rank == "0" or not (error.exit_code == 2 or error.everywhere):  # all processes find bad arguments
            print_error(f"{'' if error.exit_code in (INTERRUPTED, TERMINATED) else 'error: '}{line}")
        write_launcher_error(line)
        if error.everywhere and "torch" in sys.modules:
            from torch import distributed

            if distributed.is_initialized():
                distributed.destroy_process_group()  # a process whose peer exits without this may abort
        sys.exit(error.exit_code)
    except KeyboardInterrupt as interrupt:
        traceback.clear_frames(interrupt.__traceback__)
        exit_now("stopped by Ctrl-C")
    except Exception as error:
        if type(error).__name__.startswith("Dist") or "gloo" in str(
            error
        ):  # torch.distributed.DistError and its subclasses
            print_error(
                f"process {rank} has lost contact to another process, whose message tells the reason ({error})"
            )
            time.sleep(LAUNCHER_POLL_SECONDS)  # the launcher should see first the process that failed first
            sys.exit(1)
        write_launcher_error(traceback.format_exc())
        raise
    if "torch" in sys.modules and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        exit_without_finalization()


def quiet_libraries() -> None:
    """Keep notes and progress bars of the libraries from stderr, where a user looks for this project's one line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read on import; notes on packages that are not needed
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # from diffusers, for every Hub id
    warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")  # torch: RMS norms under autocast
    if "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].logging.set_verbosity_error()
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    for library in ("transformers", "diffusers"):
        if library in sys.modules:
            sys.modules[library].utils.logging.set_verbosity_error()
            sys.modules[library].utils.logging.disable_progress_bar()


def print_error(line: str) -> None:
    """Print one line on stderr, after the script's name."""
    print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)


def print_from_signal_handler(line: str) -> None:
    """Print one line below a progress bar, in the main process alone; safe where a signal interrupts `print`."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\n{Path(sys.argv[0]).name}: {line}\n".encode())


def exit_without_finalization() -> NoReturn:
    """End this process with exit code 0, without Python's finalization.

    A thread of the process group that asks for the interpreter then aborts the process ("terminate called without an
    active exception"), and the launcher reports a failure.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def exit_now(line: str) -> NoReturn:
    """Print a line and end this process with exit code 130, without unwinding, which may take long, hang or fail."""
    print_from_signal_handler(line)
    write_launcher_error(line)
    os._exit(INTERRUPTED)


def write_launcher_error(message: str) -> None:
    """Write why this process ends to the file in which torchrun, the launcher behind accelerate, looks for it."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        record = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
        Path(file).write_text(json.dumps(record))


def unwritable_cache(error: Optional[BaseException]) -> Optional[str]:
    """Explain an error in a chain by which a cache of Hugging Face could not be written to; None for others."""
    from huggingface_hub import constants

    folders = (constants.HF_HOME, constants.HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE", constants.HF_HOME))
    while error is not None:
        file = str(getattr(error, "filename", None))
        in_cache = any(file.startswith(folder) or folder.startswith(file) for folder in folders)
        if isinstance(error, OSError) and error.errno in UNWRITABLE and in_cache:
            return f"{file} cannot be written to ({error.strerror}): set HF_HOME to a folder that can"
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def loading(origin: str):
    """Turn a library's error over missing or damaged weights into a UserError (exit code 1) that names their origin.

    Args:
        origin: flag and value.
    """
    try:
        yield
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = first_line.partition(". If you want to")[0]  # the rest is for who calls the library
        message = f"{origin}: cannot load the weights ({reason}); download or copy them again"
        raise UserError(message) from error


def check_launcher() -> None:
    """Refuse (exit code 2) a WORLD_SIZE of several processes without what a launcher sets beside it."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and missing:
        fix = "start the script by accelerate launch, or unset it"
        raise UserError(f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set without {', '.join(missing)}: {fix}", 2)


def require_package(name: str, flag: str) -> None:
    """Refuse (exit code 2) a flag whose optional package is not installed, without importing it."""
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"{flag} needs {name}, which is not installed: pip install {name}, or drop the flag", exit_code=2
        )


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)`, then rename: `path` is there completely or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


def check_writable(flag: str, path: Path) -> None:
    """Refuse (exit code 2) a file that `write_atomically` could not write."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{flag} {path}: is not a file; give the path of one", exit_code=2)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.touch()
        temporary.unlink(missing_ok=True)  # of several processes, another may be first
    except OSError as error:
        problem = f"cannot be written ({error.strerror}); make its folder, or give another path"
        raise UserError(f"{flag} {path}: {problem}", exit_code=2) from error
