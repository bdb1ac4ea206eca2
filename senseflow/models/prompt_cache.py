# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Encode every prompt of a data set once, and keep the results in memory or, with --cache_dir, on the disk.

The folder of one encoder holds safetensors files, each with rows of several prompts: `keys` (N, 16), the hashes of
their texts, and `0`, `1`, ..., the tensors (N, ...) that each prompt is encoded to. Files are complete or absent and
never change, so that any number of processes and runs may write and read them at the same time. The name of the folder
is a hash of all that the result depends on besides the text.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Mapping, Optional, Sequence

import diffusers
import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from senseflow.errors import UserError, write_atomically


logger = logging.getLogger(__name__)

KEY_BYTES = 16
KEY = np.dtype(f"S{KEY_BYTES}")
# A file is written when its rows take so many bytes or seconds: what a killed run loses.
FILE_BYTES, FILE_SECONDS = 2**28, 60
POLL_SECONDS = 0.5  # between two looks for files that other processes write
OLD_SECONDS = 24 * 3600  # after which a file that is not complete is nobody's any more
GIB = 2**30
Encode = Callable[[Sequence[str]], tuple[torch.Tensor, ...]]


# ---------------------------------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------------------------------
def key_of(prompt: str) -> bytes:
    return hashlib.blake2b(prompt.encode(), digest_size=KEY_BYTES).digest()


def encoder_identity(
    settings: Mapping[str, Any], networks: Mapping[str, torch.nn.Module], tokenizers: Mapping
) -> dict:
    """Describe all that an encoding depends on besides the text, in JSON's types.

    Args:
        settings: what else the call of the encoders depends on.
        networks: the text encoders by name, with their final weights.
        tokenizers: by name; anything with `save_pretrained`.
    """
    return {
        **settings,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "networks": {name: network_hash(network) for name, network in networks.items()},
        "tokenizers": {name: files_hash(tokenizer) for name, tokenizer in tokenizers.items()},
    }


def network_hash(network: torch.nn.Module) -> str:
    """Hash the configuration of a network and every name, dtype, shape and value."""
    config = {k: v for k, v in network.config.to_dict().items() if not k.startswith("_") and "version" not in k}
    texts = [json.dumps(config, sort_keys=True, default=str)]
    with ThreadPoolExecutor() as pool:
        texts += pool.map(_tensor_hash, network.state_dict().items())
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _tensor_hash(item: tuple[str, torch.Tensor]) -> str:
    name, tensor = item
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}"


def files_hash(tokenizer) -> str:
    """Hash the files that a tokenizer is saved as."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(file for file in Path(folder).rglob("*") if file.is_file()):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def make_folder(cache_dir: str, identity: dict) -> Path:
    """Make the folder of one encoder, with its identity in words. Raises OSError."""
    text = json.dumps(identity, indent=1, sort_keys=True)
    folder = Path(cache_dir) / f"prompts-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.tmp"  # several processes may write it
    temporary.write_text(text + "\n")
    os.replace(temporary, folder / "encoder.json")
    for file in folder.glob(".*.tmp"):  # of killed runs
        if file.stat().st_mtime < time.time() - OLD_SECONDS:
            file.unlink(missing_ok=True)
    return folder


def check_cache_dir(args) -> None:
    """Refuse (exit code 2) a --cache_dir that cannot be written to, and prompts that are not known before training."""
    if args.cache_dir is None:
        return
    origin = f"--cache_dir {args.cache_dir}"
    if args.streaming:
        fix = "drop it, or --streaming"
        raise UserError(f"{origin}: the prompts of a stream are not known before training; {fix}", exit_code=2)
    if args.dry_run is None:
        try:
            os.makedirs(args.cache_dir, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=args.cache_dir, prefix=".senseflow-"):
                pass
        except OSError as error:
            problem = f"cannot be written to ({error.strerror}); give a folder that can"
            raise UserError(f"{origin}: {problem}", exit_code=2) from error


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------
class PromptCache:
    """The encodings of prompts by one encoder.

    Args:
        encode: `encode([prompt])` -> tuple of tensors (1, ...).
        folder: of `make_folder`; None keeps the encodings in this process's memory.
    Raises:
        UserError: exit code 1; a damaged file.
    """

    def __init__(self, encode: Encode, folder: Optional[Path] = None):
        self.encode, self.folder = encode, folder
        self._files: list[Optional[Path]] = []  # None: the rows in memory
        self._keys: list[np.ndarray] = []  # of the rows of each file
        self._rows: tuple[torch.Tensor, ...] = ()  # in memory
        self._sorted: Optional[tuple[np.ndarray, ...]] = None  # keys, numbers of files and rows: 24 bytes a prompt
        self._look_for_files()

    def fill(
        self,
        prompts: Callable[[], Iterable[str]],
        rank: int = 0,
        world_size: int = 1,
        check_stopped: Callable[[], None] = lambda: None,
    ) -> int:
        """Encode what is missing: with a folder every `world_size`-th prompt, and wait for the other processes.

        There is no collective operation: a process waits for files, and is ended if another one fails.

        Args:
            prompts: `prompts()` iterates over all of them, in the same order in all processes.
            check_stopped: called often; may raise.
        Returns:
            The number of prompts that were missing.
        Raises:
            UserError: exit code 1; too little space on the disk, or a file that cannot be written.
        """
        keys = np.frombuffer(b"".join(map(key_of, prompts())), KEY)
        keys, first = np.unique(keys, return_index=True)
        missing = ~self._contains(keys)
        # Shares of all prompts: of those that are missing now, a process that starts later sees fewer.
        is_own = first.argsort().argsort() % world_size == rank if self.folder else True
        keys, share = keys[missing], np.sort(first[missing & is_own])
        wanted, encoded, size, since = iter(share.tolist()), [], 0, time.monotonic()
        progress = tqdm(total=len(share), desc="prompts", disable=len(share) == 0 or not is_local_main())
        position = next(wanted, None)
        for number, prompt in enumerate(prompts()):
            if position is None:
                break
            if number != position:
                continue
            check_stopped()
            row = [part.detach().cpu() for part in self.encode([prompt])]
            if number == share[0]:
                self._check_space(len(keys), sum(part.nbytes for part in row))
            encoded.append((key_of(prompt), row))
            size += sum(part.nbytes for part in row)
            if self.folder and (size >= FILE_BYTES or time.monotonic() - since > FILE_SECONDS):
                self._write(encoded)
                encoded, size, since = [], 0, time.monotonic()
            progress.update()
            position = next(wanted, None)
        progress.close()
        if self.folder is None:
            self._keep(encoded)
        else:
            self._write(encoded)
            self._wait_for(keys, check_stopped)
        return len(keys)

    def read(self, prompts: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Return the encodings (B, ...) of prompts in host memory, pinned where there is a GPU.

        Raises:
            UserError: exit code 1; a file has been removed or damaged.
        """
        parts = list(zip(*map(self._read, prompts)))
        pin = torch.cuda.is_available()
        rows = []
        for part in parts:
            out = torch.empty(len(prompts), *part[0].shape[1:], dtype=part[0].dtype, pin_memory=pin)
            rows.append(torch.cat(part, out=out))
        return tuple(rows)

    def _read(self, prompt: str) -> tuple[torch.Tensor, ...]:
        keys, files, rows = self._index()
        place = np.searchsorted(keys, np.frombuffer(key_of(prompt), KEY)[0])
        if place == len(keys) or keys[place : place + 1].tobytes() != key_of(prompt):
            raise KeyError(prompt)
        file, row = self._files[files[place]], int(rows[place])
        if file is None:
            return tuple(part[row : row + 1] for part in self._rows)
        with self._reading(file), safe_open(file, "pt") as stored:
            names = sorted(set(stored.keys()) - {"keys"}, key=int)
            return tuple(stored.get_slice(name)[row : row + 1] for name in names)

    # Files and the index ---------------------------------------------------------------------------------------------
    def _look_for_files(self) -> np.ndarray:
        """Add the files that are new; return their keys."""
        found, start = set(self.folder.glob("*.safetensors")) if self.folder else set(), len(self._files)
        for file in sorted(found.difference(self._files)):
            with self._reading(file), safe_open(file, "pt") as stored:
                self._add(file, stored.get_tensor("keys").numpy())
        return np.concatenate([np.empty(0, KEY), *self._keys[start:]])

    def _add(self, file: Optional[Path], keys: np.ndarray) -> None:
        self._files.append(file)
        self._keys.append(np.ascontiguousarray(keys).view(KEY).reshape(-1))
        self._sorted = None

    def _index(self) -> tuple[np.ndarray, ...]:
        if self._sorted is None:
            keys = np.concatenate([np.empty(0, KEY), *self._keys])
            order = np.argsort(keys, kind="stable")
            counts = [len(part) for part in self._keys]
            files = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)
            rows = np.concatenate([np.empty(0, np.uint32), *[np.arange(n, dtype=np.uint32) for n in counts]])
            self._sorted = keys[order], files[order], rows[order]
        return self._sorted

    def _contains(self, wanted: np.ndarray) -> np.ndarray:
        keys = self._index()[0]
        places = np.searchsorted(keys, wanted)
        found = np.zeros(len(wanted), bool)
        inside = places < len(keys)
        found[inside] = keys[places[inside]] == wanted[inside]
        return found

    def _wait_for(self, keys: np.ndarray, check_stopped: Callable[[], None]) -> None:
        """Wait for files with these keys, which other processes may still be encoding."""
        while len(keys):
            check_stopped()
            new = self._look_for_files()
            keys = keys[~np.isin(keys, new)]
            if len(keys) and not len(new):
                time.sleep(POLL_SECONDS)

    def _keep(self, encoded: list) -> None:
        if not encoded:
            return
        self._rows = tuple(torch.cat(parts) for parts in zip(*[row for _, row in encoded]))
        self._add(None, np.frombuffer(b"".join(key for key, _ in encoded), np.uint8))

    def _write(self, encoded: list) -> None:
        if not encoded:
            return
        tensors = {str(number): torch.cat(parts) for number, parts in enumerate(zip(*[row for _, row in encoded]))}
        keys = torch.frombuffer(bytearray(b"".join(key for key, _ in encoded)), dtype=torch.uint8)
        tensors["keys"] = keys.view(-1, KEY_BYTES)
        file = self.folder / f"{uuid.uuid4().hex}.safetensors"
        try:
            write_atomically(file, partial(save_file, tensors))
        except (OSError, SafetensorError) as error:
            file.with_name(f".{file.name}.tmp").unlink(missing_ok=True)
            problem = f"cannot be written ({str(error).strip().splitlines()[0]}); what is encoded so far is kept"
            raise UserError(f"--cache_dir {self.folder}: {problem}: free some space and start again") from error

    @contextmanager
    def _reading(self, file: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError, ValueError) as error:
            problem = f"{file.name} is damaged or gone ({str(error).strip().splitlines()[0]})"
            fix = "delete it, and its prompts are encoded again at the next start"
            raise UserError(f"--cache_dir {file.parent}: {problem}; {fix}") from error

    def _check_space(self, count: int, size: int) -> None:
        """Log how much the missing prompts take on the disk; UserError (exit code 1) if there is not so much."""
        if self.folder is None:
            return
        needed, free = count * size / GIB, shutil.disk_usage(self.folder).free / GIB
        sizes = f"{count} prompts of {size / 2**20:.2f} MiB take {needed:.2f} GiB, and {free:.2f} GiB are free"
        if is_local_main():
            logger.info("--cache_dir %s: %s", self.folder, sizes)
        if needed > free:
            fix = "free some space, or give a folder on another disk"
            raise UserError(f"--cache_dir {self.folder}: {sizes}; {fix}", everywhere=True)


def is_local_main() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


# ---------------------------------------------------------------------------------------------------------------------
# Stock calls
# ---------------------------------------------------------------------------------------------------------------------
class RecordedEncodePrompt:
    """Replace a pipeline's `encode_prompt`: answer calls that were made before from memory, on the device asked for.

    Attributes:
        encode: the pipeline's own; None once its text encoders are freed.
    """

    def __init__(self, encode: Callable):
        self.encode: Optional[Callable] = encode
        self._results: dict[str, Any] = {}

    def __call__(self, *args, device=None, **kwargs):
        call = repr((args, sorted(kwargs.items())))
        if call not in self._results:
            if self.encode is None:
                raise RuntimeError(f"the text encoders are freed, and this call was not recorded: {call}")
            self._results[call] = send_to_device(self.encode(*args, device=device, **kwargs), "cpu")
        return send_to_device(self._results[call], device)
