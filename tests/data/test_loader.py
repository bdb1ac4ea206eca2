# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The loader: order of samples, transform, unreadable images, workers."""

import gc
import logging
import multiprocessing
import os
import re
import signal
import threading
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from data_sets import always, changed, color, make_args, odd_only, one_size, take, write_dataset, write_json
from PIL import Image

from senseflow.data import loader as loader_module
from senseflow.data.loader import GlobalBatchSampler, PromptImageDataset, UnreadableCounter, collate, make_dataloader
from senseflow.data.rows import ImageRows
from senseflow.data.sources import load_rows
from senseflow.errors import UserError
from senseflow_utils import needs_images


# The order of samples ------------------------------------------------------------------------------------------------
def global_batches(num_rows, batch_size, accumulation, world_size, iterations, **start):
    """{(iteration, sample index): row} of all ranks. Every sample index comes once."""
    rows = {}
    for rank in range(world_size):
        sampler = GlobalBatchSampler(num_rows, 5, batch_size, accumulation, rank, world_size, **start)
        for keys in take(sampler, accumulation * iterations):
            assert len(keys) == batch_size
            for row, iteration, sample_index in keys:
                assert (iteration, sample_index) not in rows
                rows[iteration, sample_index] = row
    return rows


@pytest.mark.parametrize("shape", [(4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1)])
@pytest.mark.parametrize("num_rows", [5, 21])
def test_global_batch_does_not_depend_on_its_division(shape, num_rows):
    whole = global_batches(num_rows, 8, 1, 1, 7)
    assert sorted(whole) == [(iteration, sample_index) for iteration in range(7) for sample_index in range(8)]
    assert global_batches(num_rows, *shape, 7) == whole


def test_a_micro_batch_is_a_slice_over_ranks():
    sampler = GlobalBatchSampler(100, 5, batch_size=2, accumulation=3, rank=1, world_size=2)
    indices = [[sample_index for _, _, sample_index in keys] for keys in take(sampler, 4)]
    assert indices == [[2, 3], [6, 7], [10, 11], [2, 3]]


def test_every_row_once_per_epoch_and_epochs_differ():
    samples = global_batches(21, 2, 2, 2, 8)  # 64 samples: three epochs, whose boundaries lie inside batches
    rows = [samples[key] for key in sorted(samples)]
    epochs = [rows[:21], rows[21:42], rows[42:63]]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and list(range(21)) not in epochs


def test_resume_inside_an_epoch_continues():
    whole = global_batches(21, 4, 2, 1, 9)
    later = global_batches(21, 2, 2, 2, 5, iteration=4, samples_seen=32)
    assert later == {key: row for key, row in whole.items() if key[0] >= 4}
    # The global batch may change at a resume: positions continue where the samples stopped.
    smaller = global_batches(21, 2, 1, 1, 4, iteration=4, samples_seen=32)
    assert [smaller[key] for key in sorted(smaller)] == [whole[4, sample_index] for sample_index in range(8)]


# Transform -----------------------------------------------------------------------------------------------------------
class OneImage:
    """Rows that all hold one image."""

    origin, field, summary = "--dataset_json x", "pixel_values", ""

    def __init__(self, image, count=1, before_read=lambda: None):
        self.image, self.count, self.before_read = image, count, before_read

    def __len__(self):
        return self.count

    def captions(self, row):
        return [""]

    def read(self, row):
        self.before_read()
        return "x", self.image, "torn"


def transform(image, iteration=0, sample_index=0, resolution=(16, 16), center_crop=False, random_flip=False):
    """Transform one image as the loader does, to [-1, 1]."""
    dataset = PromptImageDataset(OneImage(image), one_size(resolution), center_crop, random_flip, 3, always)
    sample = dataset[0, iteration, sample_index]["pixel_values"]
    assert sample.dtype == np.uint8 and sample.flags.c_contiguous
    return torch.from_numpy(sample).float() / 127.5 - 1


@pytest.mark.parametrize("height, width", [(16, 16), (24, 16), (16, 40)])
@pytest.mark.parametrize("size", [(50, 30), (30, 50), (9, 10), (16, 16), (64, 16), (5, 300)])
def test_images_cover_the_resolution_then_center_crop(size, height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    scale = max(width / size[0], height / size[1])
    scaled = max(width, round(size[0] * scale)), max(height, round(size[1] * scale))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    plain = image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    expected = torch.tensor(np.array(plain)).permute(2, 0, 1) / 127.5 - 1
    result = transform(image, resolution=(height, width), center_crop=True)
    assert result.shape == (3, height, width)
    assert (result - expected).abs().max() <= 1.01 / 127.5


def test_random_crop_reaches_both_ends_and_is_stateless():
    ramp = Image.fromarray(np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None], (16, 20, 3)).copy())

    def left_edges(iteration):
        return [round((transform(ramp, iteration, index)[0, 0, 0].item() + 1) * 127.5) for index in range(60)]

    edges = left_edges(0)
    assert set(edges) == set(range(5))
    assert edges == left_edges(0) != left_edges(1)


def test_flip_follows_from_iteration_and_sample_index_alone():
    half = Image.new("RGB", (16, 16))
    half.paste((255, 255, 255), (0, 0, 8, 16))

    def is_flipped(sample_index, random_flip=True):
        return transform(half, 2, sample_index, random_flip=random_flip)[0, 0, 0].item() < 0

    torch.manual_seed(0)
    flipped = [is_flipped(sample_index) for sample_index in range(64)]
    assert 16 < sum(flipped) < 48
    torch.manual_seed(1)
    assert [is_flipped(sample_index) for sample_index in reversed(range(64))][::-1] == flipped
    assert not any(is_flipped(sample_index, random_flip=False) for sample_index in range(64))


# Unreadable images ---------------------------------------------------------------------------------------------------
def test_an_unreadable_row_is_replaced_by_the_next_readable_one(tmp_path, caplog):
    args = make_args(dataset_json=write_json(tmp_path, broken=(2, 3, 5)))
    dataset = PromptImageDataset(load_rows(args), one_size(), True, False, 3, always)
    for row, used, skipped in [(0, 0, []), (2, 4, [2, 3]), (3, 4, [3]), (5, 0, [5])]:
        sample = dataset[row, 0, 7]
        assert (sample["row"], sample["prompt"], sample["sample_index"]) == (used, f"prompt {used}", 7)
        assert [name for name, _ in sample["unreadable"]] == [f"{tmp_path}/images/{name}.png" for name in skipped]
        assert sample["pixel_values"][:, 8, 8].tolist() == list(color(used))

    with caplog.at_level(logging.WARNING):
        first = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 6)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3  # one of each file, though two epochs have passed
    assert all(sum(f"{name}.png" in message for message in warnings) == 1 for name in (2, 3, 5))
    again = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 6)
    assert [batch["rows"] for batch in again] == [batch["rows"] for batch in first]


def test_if_no_row_is_readable_the_run_ends(tmp_path):
    for workers in (0, 1):
        args = make_args(dataset_json=write_json(tmp_path, 3, broken=(0, 1, 2)), dataloader_num_workers=workers)
        with pytest.raises(UserError, match="--dataset_json .*data.json: none of 3 rows.*png") as caught:
            take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 1)
        assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    rows = OneImage(None, count=10**9)  # a lost disk: one sample does not try all rows
    with pytest.raises(UserError, match="none of 1000 rows can be read, one is x: torn"):
        PromptImageDataset(rows, one_size(), True, False, 3, always)[5, 0, 0]


@pytest.mark.parametrize("field", ["pixel_values", "latents"])
def test_more_than_one_percent_of_a_thousand_rows_is_a_failure(field):
    image = np.zeros((3, 1, 1), np.uint8)

    def batch(bad):
        sample = {field: image, "size": (1, 1), "prompt": "", "row": 0, "sample_index": 0}
        # A bad sample skipped three rows; it counts as one.
        skipped = [("lost.png", "torn")] * 3
        return collate([{**sample, "unreadable": skipped if index < bad else []} for index in range(100)])

    counter = UnreadableCounter("--dataset_json data.json")
    for _ in range(9):
        assert counter.add(batch(bad=10)) is None  # 10 %, but of fewer than 1,000 rows
    failure = counter.add(batch(bad=0))
    assert re.search("--dataset_json data.json: 90 of 1000 .*lost.png", str(failure)) and failure.exit_code == 1

    counter = UnreadableCounter("")
    for _ in range(30):
        assert counter.add(batch(bad=1)) is None  # exactly 1 %
    assert "32 of 3100 " in str(counter.add(batch(bad=2)))


def test_the_loop_asks_the_loader_for_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "MIN_ROWS", 8)
    args = make_args(dataset_json=write_json(tmp_path, broken=(2,)))
    loader = make_dataloader(args, load_rows(args), 0, 1, 0, 0, always)
    batches = iter(loader)
    take(batches, 3)
    assert loader.failure is None  # 1 of 6, but of fewer than 8 rows
    take(batches, 1)
    failure = loader.failure
    message = f"^--dataset_json {args.dataset_json}: . of 8 rows .*2.png; "
    assert failure.exit_code == 1 and re.search(message, str(failure))
    (batch,) = take(batches, 1)  # valid batches still follow
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and loader.failure is failure


# Workers -------------------------------------------------------------------------------------------------------------
def test_workers_change_nothing_and_images_are_read_only_when_needed(tmp_path, monkeypatch):
    args = make_args(dataset_json=write_json(tmp_path, broken=(1,)), gradient_accumulation_steps=2)
    args = changed(args, center_crop=False, random_flip=True)
    rows = load_rows(args)
    batches = {}
    for workers in (0, 2):
        loader = make_dataloader(changed(args, dataloader_num_workers=workers), rows, 1, 2, 4, 32, odd_only)
        batches[workers] = take(loader, 8)
    assert [batch["sample_indices"] for batch in batches[0]] == [[2, 3], [6, 7]] * 4
    for without, with_workers in zip(batches[0], batches[2]):
        pixels = without.pop("pixel_values"), with_workers.pop("pixel_values")
        assert without == with_workers
        assert (pixels[0] is None and pixels[1] is None) or torch.equal(*pixels)

    read_rows, read = [], ImageRows.read
    monkeypatch.setattr(ImageRows, "read", lambda self, row: read_rows.append(row) or read(self, row))
    loader = iter(make_dataloader(args, rows, 0, 1, 4, 32, odd_only))
    assert [next(loader)["pixel_values"] for _ in range(2)] == [None, None] and read_rows == []
    assert next(loader)["pixel_values"].shape == (2, 3, 16, 16) and len(read_rows) >= 2


@pytest.mark.parametrize("source", ["json", "stream"])
def test_spawned_workers_give_what_forked_ones_do_and_outlive_ctrl_c(source, tmp_path):
    """As on macOS, and with Python 3.14: what workers are given is pickled, and they inherit no handler of signals."""
    flags = {"dataset_json": write_json(tmp_path)}
    if source == "stream":
        flags = {"dataset_name": write_dataset(tmp_path), "caption_column": "caption", "streaming": True}
    args = make_args(**flags, dataloader_num_workers=1)
    position = load_rows(args), 0, 1, 2, 4, partial(needs_images, args.seed, 1.0, 0.5)
    expected, loader = take(make_dataloader(args, *position), 6), make_dataloader(args, *position)
    loader.multiprocessing_context = "spawn"
    before, batches = set(multiprocessing.active_children()), iter(loader)
    found = take(batches, 1)
    (worker,) = set(multiprocessing.active_children()) - before
    ignored = re.search(r"SigIgn:\s+(\w+)", Path(f"/proc/{worker.pid}/status").read_text())[1]
    assert int(ignored, 16) >> (signal.SIGINT - 1) & 1  # else the next line would make the loader wait for ever
    os.kill(worker.pid, signal.SIGINT)
    found += take(batches, 5)
    assert [batch["prompts"] for batch in found] == [batch["prompts"] for batch in expected]
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(found, expected))


def kill_worker():
    os.kill(os.getpid(), signal.SIGKILL)


def never_answer():
    threading.Event().wait()


@pytest.mark.parametrize(
    "before_read, reason",
    [(kill_worker, r"DataLoader worker \(pid"), (never_answer, "timed out after 0.2 seconds")],
)
def test_a_worker_that_dies_or_stalls_is_one_line(before_read, reason, monkeypatch):
    monkeypatch.setattr(loader_module, "WORKER_TIMEOUT", 0.2 if before_read is never_answer else 60)
    # How long the loader then waits for the worker to leave.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    args = make_args(dataset_json="x", dataloader_num_workers=1)
    rows = OneImage(Image.new("RGB", (16, 16)), 8, before_read)
    message = f"--dataset_json x: .*{reason}.* give fewer --dataloader_num_workers, or more memory"
    with pytest.raises(UserError, match=message) as caught:
        take(make_dataloader(args, rows, 0, 1, 0, 0, always), 1)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    if before_read is kill_worker:  # reported by the signal, not when the time was over
        assert "killed by signal" in "".join(traceback.format_exception(caught.value))
    gc.collect()


def test_a_worker_that_dies_is_reported_between_two_iterations(tmp_path):
    args = make_args(dataset_json=write_json(tmp_path), dataloader_num_workers=1)
    batches = iter(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always))
    before = set(multiprocessing.active_children())
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - before
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # inside an iteration: nothing is raised
    with pytest.raises(UserError, match="is killed by signal"):
        take(batches, 10)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_float32_from_minus_one_to_one_and_sent_as_bytes(workers):
    rows = OneImage(Image.new("RGB", (16, 16), (0, 255, 51)), 4)
    loader = make_dataloader(make_args(dataloader_num_workers=workers), rows, 0, 1, 0, 0, always)
    (batch,) = take(loader, 1)
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"].amax((0, 2, 3)).tolist() == pytest.approx([-1, 1, -0.6])
    assert batch["prompts"] == ("", "")  # a tuple: nobody can write into it
    sent = loader.collate_fn(loader.dataset.__getitems__([(0, 0, 0), (1, 0, 1)]))
    assert sent["pixel_values"].dtype == np.uint8 and sent["pixel_values"].shape == (2, 3, 16, 16)
    assert not any(torch.is_tensor(value) for value in sent.values())  # nothing in shared memory
