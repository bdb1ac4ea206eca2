"""Encode prompts once, and find them again by their text and by everything else that the encoding depends on."""

import copy
import json
import os
import resource
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from senseflow.errors import UserError
from senseflow.models import prompt_cache
from senseflow.models.prompt_cache import PromptCache, encoder_identity, make_folder
from tiny_pipelines import clip_config, clip_tokenizer, t5_tokenizer


PROMPTS = [f"a red square number {number}" for number in range(11)]


class Encoder:
    """Encode a text to random numbers of its own, in two precisions, and note it."""

    def __init__(self, fails_after: int = 10**6):
        self.prompts, self.fails_after = [], fails_after

    def __call__(self, prompts):
        (prompt,) = prompts
        if len(self.prompts) == self.fails_after:
            raise KeyboardInterrupt
        self.prompts.append(prompt)
        generator = torch.Generator().manual_seed(hash(prompt) % 2**32)
        return torch.randn(1, 5, 3, generator=generator).bfloat16(), torch.randn(1, 2, generator=generator)


def assert_reads(cache: PromptCache) -> None:
    """Check batches of prompts, in another order and twice, to the bit."""
    for prompts in (PROMPTS, PROMPTS[:2:-1], [PROMPTS[4]] * 2):
        wanted = [torch.cat(parts) for parts in zip(*[Encoder()([prompt]) for prompt in prompts])]
        for found, part in zip(cache.read(prompts), wanted, strict=True):
            assert found.dtype == part.dtype and torch.equal(found, part)


def folder_of(tmp_path, **identity):
    return make_folder(str(tmp_path), identity or {"a": 1})


def files_in(folder) -> set[str]:
    return set(os.listdir(folder)) - {"encoder.json"}


@pytest.mark.parametrize("on_disk", [True, False])
def test_every_prompt_is_encoded_once(on_disk, tmp_path):
    encoder = Encoder()
    folder = folder_of(tmp_path) if on_disk else None
    cache = PromptCache(encoder, folder)
    assert cache.fill(lambda: [*PROMPTS, *PROMPTS[::2]]) == len(PROMPTS)
    assert encoder.prompts == PROMPTS
    assert_reads(cache)
    with pytest.raises(KeyError, match="another"):
        cache.read(["another"])
    if on_disk:  # the next run encodes what is new
        cache = PromptCache(encoder, folder)
        assert cache.fill(lambda: [*PROMPTS, "new"]) == 1 and encoder.prompts[len(PROMPTS) :] == ["new"]
        assert_reads(cache)


def test_processes_share_the_work_and_wait_for_each_other(tmp_path, monkeypatch):
    """Without a message between them: by their files. Each starts when those before it have encoded their shares."""
    monkeypatch.setattr(prompt_cache, "POLL_SECONDS", 0.01)
    encoders, caches, threads, folder = [Encoder() for _ in range(3)], [], [], folder_of(tmp_path)
    for rank, encoder in enumerate(encoders):
        caches.append(PromptCache(encoder, folder))
        assert len(caches[rank]._files) == rank
        threads.append(threading.Thread(target=caches[rank].fill, args=(lambda: PROMPTS, rank, 3), daemon=True))
        threads[rank].start()
        while len(list(folder.glob("*.safetensors"))) == rank:
            time.sleep(0.01)
        assert rank == 2 or all(thread.is_alive() for thread in threads)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert [encoder.prompts for encoder in encoders] == [PROMPTS[rank::3] for rank in range(3)]
    for cache in caches:
        assert_reads(cache)


def test_a_process_that_waits_ends_when_it_is_told_to(tmp_path):
    def check_stopped():
        if files_in(folder):  # it has encoded its share
            raise UserError("stopped by SIGTERM", 143)

    folder = folder_of(tmp_path)
    with pytest.raises(UserError, match="SIGTERM"):
        PromptCache(Encoder(), folder).fill(lambda: PROMPTS, 0, 2, check_stopped)


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_cache, "FILE_BYTES", 2 * 38)  # two rows a file
    folder, killed, second = folder_of(tmp_path), Encoder(fails_after=5), Encoder()
    with pytest.raises(KeyboardInterrupt):
        PromptCache(killed, folder).fill(lambda: PROMPTS)
    (folder / ".half.safetensors.tmp").write_bytes(b"half")
    cache = PromptCache(second, folder)
    assert cache.fill(lambda: PROMPTS) == 7 and second.prompts == PROMPTS[4:]
    assert_reads(cache)
    os.utime(folder / ".half.safetensors.tmp", (0, 0))
    folder_of(tmp_path)
    assert all(name.endswith(".safetensors") and not name.startswith(".") for name in files_in(folder))


def test_any_change_of_what_an_encoding_depends_on_is_another_folder(tmp_path):
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    network = prompt_cache.transformers.CLIPTextModel(clip_config(tokenizer))

    def folder(network=network, tokenizer=tokenizer, **settings):
        settings = {"max_sequence_length": 16, **settings}
        return make_folder(
            str(tmp_path), encoder_identity(settings, {"text_encoder": network}, {"tokenizer": tokenizer})
        )

    fine_tuned, configured, retokenized = copy.deepcopy(network), copy.deepcopy(network), copy.deepcopy(tokenizer)
    with torch.no_grad():
        *_, (_, weight) = ((name, tensor) for name, tensor in fine_tuned.named_parameters() if tensor.dim() == 2)
        weight[-1, -1] += 1e-3
    configured.config.eos_token_id = 2
    retokenized.add_tokens(["square"])
    folders = [
        folder(),
        folder(network=fine_tuned),
        folder(network=copy.deepcopy(network).bfloat16()),
        folder(network=configured),
        folder(tokenizer=retokenized),
        folder(tokenizer=t5_tokenizer()),
        folder(max_sequence_length=32),
        folder(encode_prompts="edited"),
    ]
    assert len(set(folders)) == len(folders)
    assert folder(network=copy.deepcopy(network), tokenizer=copy.deepcopy(tokenizer)) == folders[0]
    assert json.loads((folders[0] / "encoder.json").read_text())["max_sequence_length"] == 16
    PromptCache(Encoder(), folders[0]).fill(lambda: PROMPTS)
    assert PromptCache(Encoder(), folders[1]).fill(lambda: PROMPTS) == len(PROMPTS)


def test_a_file_that_is_cut_or_removed_is_one_line(tmp_path):
    folder = folder_of(tmp_path)
    cache = PromptCache(Encoder(), folder)
    cache.fill(lambda: PROMPTS)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    fix = f"--cache_dir {folder}: {file.name} is damaged or gone .*; delete it, and its prompts are encoded again"
    for cut in (0, 5, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(UserError, match=fix):
            PromptCache(Encoder(), folder)
    file.unlink()
    with pytest.raises(UserError, match=fix) as caught:
        cache.read(PROMPTS[:1])
    assert caught.value.exit_code == 1
    PromptCache(Encoder(), folder).fill(lambda: PROMPTS)  # does what the message says


def test_a_full_disk_is_one_line_before_and_while_it_fills(tmp_path, monkeypatch):
    """RLIMIT_FSIZE fails at the same place as a full disk."""
    folder = folder_of(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")  # without progress bar, which cannot be written then either
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(
            UserError, match=f"--cache_dir {folder}: cannot be written .*free some space and start again"
        ):
            PromptCache(Encoder(), folder).fill(lambda: PROMPTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert not files_in(folder)
    disk_usage = SimpleNamespace(free=11 * 38 - 1)
    monkeypatch.setattr(prompt_cache.shutil, "disk_usage", lambda folder: disk_usage)
    encoder = Encoder()
    with pytest.raises(UserError, match="11 prompts of .* take .* GiB are free; free some space, or give"):
        PromptCache(encoder, folder).fill(lambda: PROMPTS)
    assert len(encoder.prompts) == 1
    disk_usage.free += 1
    PromptCache(encoder, folder).fill(lambda: PROMPTS)


def test_the_index_takes_24_bytes_a_prompt(tmp_path):
    """So a million prompts take 23 MiB in a process, whatever the size of their encodings."""
    folder, count = folder_of(tmp_path), 20_000
    cache = PromptCache(lambda prompts: (torch.zeros(1, 1),), folder)
    cache.fill(lambda: map(str, range(count)))
    assert sum(part.nbytes for part in cache._index()) == 24 * count
    keys = cache._index()[0]
    assert np.all(keys[:-1] < keys[1:])
