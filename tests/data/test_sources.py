# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Data: order, transform, unreadable images, the five kinds of data set, bad input."""

import csv
import gc
import io
import itertools
import json
import logging
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import sys
import threading
from types import SimpleNamespace

import datasets
import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from senseflow.data import lmdb as lmdb_module
from senseflow.data import loader as loader_module
from senseflow.data import sources
from senseflow.data.loader import GlobalBatchSampler, PromptImageDataset, UnreadableCounter, collate
from senseflow.data.sources import check_data_args, check_latents, load_rows, make_dataloader
from senseflow.errors import UserError


def make_args(**changes) -> SimpleNamespace:
    args = dict(
        dataset_name=None, dataset_config_name=None, train_data_dir=None, dataset_json=None, prompts_file=None,
        dataset_lmdb=None, image_column="image", caption_column="text", resolution=16, center_crop=True, random_flip=False,
        max_train_samples=None, train_batch_size=2, gradient_accumulation_steps=1, dataloader_num_workers=0, seed=3,
        gan_weight=1.0, backward_simulation_prob=0.5, streaming=False,
    )  # fmt: skip
    assert set(changes) <= set(args)
    return SimpleNamespace(**{**args, **changes})


def changed(args, **changes) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(args), **changes})


PROMPTS_ONLY = dict(gan_weight=0.0, backward_simulation_prob=1.0)


# At module level, so that spawned workers find them.
def always(iteration):
    return True


def odd_only(iteration):
    return iteration % 2 == 1


def colour(row: int) -> tuple:
    return (20 * row, 255 - 20 * row, 7 * row)


def write_json(folder, count=6, broken=(), name="data.json", **changes):
    """Images of one color each, named by row; the second half by absolute paths."""
    (folder / "images").mkdir(exist_ok=True)
    paths = []
    for row in range(count):
        path = folder / "images" / f"{row}.png"
        Image.new("RGB", (20, 16), colour(row)).save(path)
        if row in broken:
            path.write_bytes(path.read_bytes()[:40])
        paths.append(str(path) if row >= count // 2 else f"images/{row}.png")
    content = {"keys": list(range(count)), "image_paths": paths, "prompts": [f"prompt {row}" for row in range(count)]}
    (folder / name).write_text(json.dumps({**content, **changes}))
    return str(folder / name)


def take(loader, count):
    return list(itertools.islice(loader, count))


# The order of samples --------------------------------------------------------------------------------------------------
def global_batches(num_rows, batch_size, accumulation, world_size, iterations, **start):
    """{(iteration, slot): row} of all ranks; every slot is seen once."""
    found = {}
    for rank in range(world_size):
        sampler = GlobalBatchSampler(num_rows, 5, batch_size, accumulation, rank, world_size, **start)
        for keys in take(sampler, accumulation * iterations):
            assert len(keys) == batch_size
            for row, iteration, sample_index in keys:
                assert (iteration, sample_index) not in found
                found[iteration, sample_index] = row
    return found


@pytest.mark.parametrize("shape", [(4, 2, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 8, 1)])
@pytest.mark.parametrize("num_rows", [5, 21])
def test_global_batch_does_not_depend_on_its_division(shape, num_rows):
    whole = global_batches(num_rows, 8, 1, 1, 7)
    assert sorted(whole) == [(iteration, sample_index) for iteration in range(7) for sample_index in range(8)]
    assert global_batches(num_rows, *shape, 7) == whole


def test_a_micro_batch_is_a_slice_over_ranks():
    sampler = GlobalBatchSampler(100, 5, batch_size=2, accumulation=3, rank=1, world_size=2)
    assert [[sample_index for _, _, sample_index in keys] for keys in take(sampler, 4)] == [
        [2, 3],
        [6, 7],
        [10, 11],
        [2, 3],
    ]
    assert sampler.global_batch == 12


def test_every_row_once_per_epoch_and_epochs_differ():
    found = global_batches(21, 2, 2, 2, 8)  # 64 samples: three epochs, the boundaries inside batches
    rows = [found[key] for key in sorted(found)]
    epochs = [rows[:21], rows[21:42], rows[42:63]]
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and list(range(21)) not in epochs


def test_resume_inside_an_epoch_continues():
    whole = global_batches(21, 4, 2, 1, 9)
    later = global_batches(21, 2, 2, 2, 5, iteration=4, samples_seen=32)
    assert later == {key: row for key, row in whole.items() if key[0] >= 4}
    # The global batch may change at a resume: positions go on where the samples stopped.
    smaller = global_batches(21, 2, 1, 1, 4, iteration=4, samples_seen=32)
    assert [smaller[key] for key in sorted(smaller)] == [whole[4, sample_index] for sample_index in range(8)]


# Transform -----------------------------------------------------------------------------------------------------------
class OneImage:
    """Rows that all hold one image."""

    origin, field, size, left_aside = "--dataset_json x", "pixel_values", "", ""

    def __init__(self, image, count=1):
        self.one, self.count = image, count

    def __len__(self):
        return self.count

    def captions(self, row):
        return [""]

    def read(self, row):
        return "x", self.one, "torn"


def transform(image, iteration=0, sample_index=0, resolution=16, center_crop=False, random_flip=False):
    """As it leaves the loader, but for the batch."""
    dataset = PromptImageDataset(OneImage(image), resolution, center_crop, random_flip, 3, always)
    sample = dataset[0, iteration, sample_index]["pixel_values"]
    assert sample.dtype == np.uint8 and sample.flags.c_contiguous
    return torch.from_numpy(sample).float() / 127.5 - 1


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (9, 10), (16, 16), (64, 16), (5, 300)])
def test_shorter_side_to_the_resolution_then_center_crop(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    scaled = [max(16, round(side * 16 / min(size))) for side in size]
    left, top = (scaled[0] - 16) // 2, (scaled[1] - 16) // 2
    plain = image.resize(scaled, Image.Resampling.LANCZOS).crop((left, top, left + 16, top + 16))
    expected = torch.tensor(np.array(plain)).permute(2, 0, 1) / 127.5 - 1
    found = transform(image, center_crop=True)
    assert found.shape == (3, 16, 16)
    assert (found - expected).abs().max() <= 1.01 / 127.5


def test_random_crop_reaches_both_ends_and_is_stateless():
    ramp = Image.fromarray(np.broadcast_to(np.arange(20, dtype=np.uint8)[None, :, None], (16, 20, 3)).copy())

    def left_edge(iteration, sample_index):
        return round((transform(ramp, iteration, sample_index)[0, 0, 0].item() + 1) * 127.5)

    found = [left_edge(0, sample_index) for sample_index in range(60)]
    assert set(found) == set(range(5))
    assert found == [left_edge(0, sample_index) for sample_index in range(60)]
    assert found != [left_edge(1, sample_index) for sample_index in range(60)]


def test_flip_follows_from_iteration_and_slot_alone():
    half = Image.new("RGB", (16, 16))
    half.paste((255, 255, 255), (0, 0, 8, 16))
    torch.manual_seed(0)
    flipped = [transform(half, 2, sample_index, random_flip=True)[0, 0, 0].item() < 0 for sample_index in range(64)]
    assert 16 < sum(flipped) < 48
    torch.manual_seed(1)
    backwards = [
        transform(half, 2, sample_index, random_flip=True)[0, 0, 0].item() < 0 for sample_index in reversed(range(64))
    ]
    assert backwards[::-1] == flipped
    assert not any(transform(half, 2, sample_index)[0, 0, 0].item() < 0 for sample_index in range(64))


# Unreadable images -------------------------------------------------------------------------------------------------
def test_unreadable_gives_way_to_the_next_readable_row(tmp_path, caplog):
    args = make_args(dataset_json=write_json(tmp_path, broken=(2, 3, 5)))
    dataset = PromptImageDataset(load_rows(args), 16, True, False, 3, always)
    for row, used, passed_over in [(0, 0, []), (2, 4, [2, 3]), (3, 4, [3]), (5, 0, [5])]:
        sample = dataset[row, 0, 7]
        assert (sample["row"], sample["prompt"], sample["slot"]) == (used, f"prompt {used}", 7)
        assert [name for name, _ in sample["unreadable"]] == [
            str(tmp_path / "images" / f"{name}.png") for name in passed_over
        ]
        assert sample["pixel_values"][:, 8, 8].tolist() == list(colour(used))

    with caplog.at_level(logging.WARNING):
        first = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 6)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 3  # once a file, though two epochs passed
    assert all(sum(f"{name}.png" in message for message in warned) == 1 for name in (2, 3, 5))
    again = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 6)
    assert [batch["rows"] for batch in again] == [batch["rows"] for batch in first]


def test_none_readable_stops(tmp_path):
    for workers in (0, 1):
        args = make_args(dataset_json=write_json(tmp_path, 3, broken=(0, 1, 2)), dataloader_num_workers=workers)
        with pytest.raises(UserError, match="--dataset_json .*data.json: none of 3 rows.*png") as caught:
            take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 1)
        assert caught.value.exit_code == 1 and "\n" not in str(caught.value)


def test_a_lost_disk_does_not_walk_through_all_rows():
    rows = OneImage(None, count=10**9)
    with pytest.raises(UserError, match="none of 1000 rows can be read, one is x: torn"):
        PromptImageDataset(rows, 16, True, False, 3, always)[5, 0, 0]


@pytest.mark.parametrize("field", ["pixel_values", "latents"])
def test_share_rule(field):
    image = np.zeros((3, 1, 1), np.uint8)

    def batch(bad):
        sample = {field: image, "prompt": "", "row": 0, "slot": 0}
        # A bad sample passed over three rows; it counts as one.
        return collate(
            [{**sample, "unreadable": [("lost.png", "torn")] * 3 if place < bad else []} for place in range(100)]
        )

    counter = UnreadableCounter("--dataset_json data.json")
    for _ in range(9):
        assert counter.add(batch(bad=10)) is None  # 10 %, but of fewer than 1,000 rows
    failure = counter.add(batch(bad=0))
    assert re.search("--dataset_json data.json: 90 of 1000 .*lost.png", str(failure)) and failure.exit_code == 1

    counter = UnreadableCounter("")
    for _ in range(30):
        assert counter.add(batch(bad=1)) is None  # exactly 1 %
    assert "32 of 3100 " in str(counter.add(batch(bad=2)))


def test_too_many_unreadable_rows_are_a_failure_for_the_loop_to_ask_for(tmp_path, monkeypatch):
    monkeypatch.setattr(loader_module, "SHARE_FROM", 8)
    args = make_args(dataset_json=write_json(tmp_path, broken=(2,)))
    loader = make_dataloader(args, load_rows(args), 0, 1, 0, 0, always)
    batches = iter(loader)
    assert loader.failure is None
    take(batches, 3)
    assert loader.failure is None  # 1 of 6, but of fewer than 8 rows
    take(batches, 1)
    failure = loader.failure
    assert failure.exit_code == 1 and re.search(
        f"^--dataset_json {args.dataset_json}: . of 8 rows .*2.png; ", str(failure)
    )
    (batch,) = take(batches, 1)  # it is the loop that ends the run
    assert batch["pixel_values"].shape == (2, 3, 16, 16) and loader.failure is failure


# Kinds of data sets --------------------------------------------------------------------------------------------------
def write_folder(folder, metadata):
    folder.mkdir()
    entries = [{"file_name": f"{row}.png", "text": f"prompt {row}", "other": f"o{row}"} for row in range(6)]
    for row, entry in enumerate(entries):
        Image.new("RGB", (20, 16), colour(row)).save(folder / entry["file_name"])
    if metadata == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    if metadata == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    return str(folder)


def write_dataset(folder, kind="parquet"):
    """Images inside the table, as on the Hub."""
    cells = []
    for row in range(6):
        content = io.BytesIO()
        Image.new("RGB", (20, 16), colour(row)).save(content, "PNG")
        cells.append({"bytes": content.getvalue(), "path": None})
    columns = {"image": cells, "caption": [f"prompt {row}" for row in range(6)], "number": list(range(6))}
    dataset = datasets.Dataset.from_dict({**columns, "sparse": ["a", None] * 3}).cast_column("image", datasets.Image())
    target = folder / "target"
    if kind == "saved":
        dataset.save_to_disk(target)
    elif kind == "saved_splits":
        datasets.DatasetDict(test=dataset.select([0]), train=dataset).save_to_disk(target)
    else:
        target.mkdir()
        dataset.to_parquet(target / "train.parquet")
    return str(target)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


IN_TABLE = dict(image_column="image", caption_column="caption")
KINDS = {
    "json": lambda folder: dict(dataset_json=write_json(folder)),
    "csv": lambda folder: dict(train_data_dir=write_folder(folder / "a", "csv")),
    "jsonl": lambda folder: dict(train_data_dir=write_folder(folder / "a", "jsonl")),
    "imagefolder by name": lambda folder: dict(dataset_name=write_folder(folder / "a", "jsonl")),
    "parquet": lambda folder: dict(dataset_name=write_dataset(folder), **IN_TABLE),
    "saved": lambda folder: dict(dataset_name=write_dataset(folder, "saved"), **IN_TABLE),
    "saved splits": lambda folder: dict(dataset_name=write_dataset(folder, "saved_splits"), **IN_TABLE),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_datasets(kind, tmp_path):
    args = make_args(**KINDS[kind](tmp_path))
    rows = load_rows(args, check_data_args(args))
    assert len(rows) == 6
    rows = pickle.loads(pickle.dumps(rows))  # as a spawned worker gets it
    for row in (0, 2, 5):
        assert rows.captions(row) == [f"prompt {row}"]
        assert rows.read(row)[1].getpixel((3, 3)) == colour(row)
    shorter = load_rows(changed(args, max_train_samples=4))
    assert (
        len(shorter) == 4 and shorter.captions(3) == ["prompt 3"] and shorter.read(3)[1].getpixel((3, 3)) == colour(3)
    )
    # Prompts alone train from a data set with images, too; then no image column is asked for.
    alone = load_rows(changed(args, image_column="nowhere", **PROMPTS_ONLY))
    assert alone.images is None and alone.captions(5) == ["prompt 5"]


def test_prompts_file(tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa red cube \r\n\n   \n\tein grüner Würfel\nlast", encoding="utf-8")
    args = make_args(prompts_file=str(tmp_path / "prompts.txt"), **PROMPTS_ONLY)
    rows = load_rows(args, check_data_args(args))
    assert [rows.captions(row) for row in range(len(rows))] == [["a red cube"], ["ein grüner Würfel"], ["last"]]
    assert len(load_rows(make_args(prompts_file=args.prompts_file, max_train_samples=2, **PROMPTS_ONLY))) == 2
    (batch,) = take(make_dataloader(args, rows, 0, 1, 0, 0, lambda iteration: False), 1)
    assert batch["pixel_values"] is None and batch["unreadable"] == [] and batch["sample_indices"] == [0, 1]
    assert batch["prompts"] == tuple(rows.captions(row)[0] for row in batch["rows"])


def test_a_broken_image_in_a_table_is_passed_over(tmp_path):
    good = tmp_path / "good.png"
    Image.new("RGB", (16, 16)).save(good)
    cells = [{"bytes": b"not an image", "path": "b.png"}, None, {"bytes": good.read_bytes(), "path": None}]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict({"image": cells, "text": list("abc")}, features).save_to_disk(tmp_path / "saved")
    rows = load_rows(make_args(dataset_name=str(tmp_path / "saved")))
    sample = PromptImageDataset(rows, 16, True, False, 3, always)[0, 0, 0]
    origin = f"of --dataset_name {tmp_path / 'saved'})"
    assert sample["row"] == 2 and sample["unreadable"] == [
        (f"b.png (row 0 {origin}", "in no format that Pillow reads"), (f"image (row 1 {origin}", "there is no image"),
    ]  # fmt: skip


def test_a_checked_json_is_not_parsed_again(tmp_path, monkeypatch):
    args = make_args(dataset_json=write_json(tmp_path))
    checked = check_data_args(args)
    monkeypatch.setattr(sources.json, "load", lambda file: pytest.fail("parsed twice"))
    assert load_rows(args, checked) is checked


# The loader ----------------------------------------------------------------------------------------------------------
def test_workers_change_nothing_and_images_are_read_when_needed(tmp_path, monkeypatch):
    args = make_args(
        dataset_json=write_json(tmp_path, broken=(1,)),
        center_crop=False,
        random_flip=True,
        gradient_accumulation_steps=2,
    )
    rows = load_rows(args)
    batches = {}
    for workers in (0, 2):
        loader = make_dataloader(changed(args, dataloader_num_workers=workers), rows, 1, 2, 4, 32, odd_only)
        batches[workers] = take(loader, 8)
    for alone, helped in zip(batches[0], batches[2]):
        pixels = alone.pop("pixel_values"), helped.pop("pixel_values")
        assert alone == helped
        assert (pixels[0] is None and pixels[1] is None) or torch.equal(*pixels)
    assert [batch["sample_indices"] for batch in batches[0]] == [[2, 3], [6, 7]] * 4

    read = []
    image = sources.Rows.read
    monkeypatch.setattr(sources.Rows, "read", lambda self, row: read.append(row) or image(self, row))
    loader = iter(make_dataloader(args, rows, 0, 1, 4, 32, odd_only))
    assert [next(loader)["pixel_values"] for _ in range(2)] == [None, None] and read == []
    assert next(loader)["pixel_values"].shape == (2, 3, 16, 16) and len(read) >= 2


class Reads(OneImage):
    """Rows whose images are read by a function that a worker may not survive."""

    def __init__(self, read, count=8):
        super().__init__(Image.new("RGB", (16, 16)), count)
        self.read_row = read

    def read(self, row):
        self.read_row()
        return super().read(row)


def kill_worker():
    os.kill(os.getpid(), signal.SIGKILL)


def never_answer():
    threading.Event().wait()


def ends(read, workers=2):
    """How the loader over such rows ends."""
    args = make_args(dataset_json="x", dataloader_num_workers=workers)
    with pytest.raises(
        UserError, match="--dataset_json x: .* give fewer --dataloader_num_workers, or more memory"
    ) as caught:
        take(make_dataloader_of(args, Reads(read)), 1)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    return str(caught.value)


def make_dataloader_of(args, rows):
    return make_dataloader(args, rows, 0, 1, 0, 0, always)


def test_a_worker_that_dies_or_stalls_is_one_line(monkeypatch):
    assert "DataLoader worker (pid" in ends(kill_worker)
    monkeypatch.setattr(sources, "STALLED", 0.2)
    monkeypatch.setattr(
        torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.1
    )  # what it then waits for the worker to leave
    assert "timed out after 0.2 seconds" in ends(never_answer, workers=1)
    gc.collect()


def test_a_worker_that_dies_is_told_of_between_two_iterations(tmp_path):
    args = make_args(dataset_json=write_json(tmp_path), dataloader_num_workers=1)
    batches = iter(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # in the midst of an iteration: nothing is raised
    with pytest.raises(UserError, match="Killed"):
        take(batches, 10)


def test_what_workers_send_takes_no_shared_memory(tmp_path):
    loader = make_dataloader_of(make_args(), OneImage(Image.new("RGB", (16, 16)), 4))
    sent = loader.collate_fn(loader.dataset.__getitems__([(0, 0, 0), (1, 0, 1)]))
    assert sent["pixel_values"].dtype == np.uint8 and sent["pixel_values"].shape == (2, 3, 16, 16)
    assert not any(torch.is_tensor(value) for value in sent.values())
    rows = lmdb_module.LatentRows(write_lmdb(tmp_path))
    sent = loader.collate_fn(PromptImageDataset(rows, 16, False, False, 3, always).__getitems__([(0, 0, 0)]))
    assert isinstance(sent["latents"], np.ndarray)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_float32_from_minus_one_to_one(workers):
    image = Image.new("RGB", (16, 16), (0, 255, 51))
    (batch,) = take(make_dataloader_of(make_args(dataloader_num_workers=workers), OneImage(image, 4)), 1)
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["pixel_values"].amax((0, 2, 3)).tolist() == pytest.approx([-1, 1, -0.6])
    assert batch["prompts"] == ("", "")  # a tuple: nobody can write into it


# Latents ---------------------------------------------------------------------------------------------------------------
SHAPE = (4, 2, 3)


def latents(row, shape=SHAPE):
    """Any bits that are a finite float16: signed zeros, subnormals, the largest."""
    bits = np.random.default_rng(row).integers(0, 2**16, shape, dtype=np.uint16).view("<f2")
    return np.where(np.isfinite(bits), bits, np.float16(65504))


def write_lmdb(folder, count=6, shape=SHAPE, **changes):
    """As DMD2 writes it; `changes` replaces values, or drops those that are None."""
    values = {"latents_shape": " ".join(map(str, (count, *shape))).encode()}
    for row in range(count):
        values |= {
            f"latents_{row}_data": latents(row, shape).tobytes(),
            f"prompts_{row}_data": f"ein Würfel {row}".encode(),
        }
    with lmdb.open(str(folder / "lmdb"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in (values | changes).items():
            if value is not None:
                transaction.put(key.encode(), value)
    return str(folder / "lmdb")


def lmdb_args(folder, **changes):
    """A folder written with `changes`, as arguments."""
    return dict(dataset_lmdb=write_lmdb(folder, **changes), center_crop=False)


def test_latents_and_prompts_are_read_back_exactly_by_workers_too(tmp_path):
    args = make_args(**lmdb_args(tmp_path), gradient_accumulation_steps=2)
    rows = pickle.loads(pickle.dumps(load_rows(args, check_data_args(args))))  # as a spawned worker gets it
    assert len(rows) == 6 and rows.shape == SHAPE
    keys = take(GlobalBatchSampler(6, 3, 2, 2, 1, 2, 4, 32), 8)
    for workers in (0, 2):  # 2: forked from a process that has read the same folder
        loader = make_dataloader(changed(args, dataloader_num_workers=workers), rows, 1, 2, 4, 32, odd_only)
        for batch, expected in zip(take(loader, 8), keys):
            used = [row for row, _, _ in expected]
            assert batch["rows"] == used and batch["sample_indices"] == [
                sample_index for _, _, sample_index in expected
            ]
            assert batch["prompts"] == tuple(f"ein Würfel {row}" for row in used)
            assert "pixel_values" not in batch and batch["unreadable"] == []
            if expected[0][1] % 2 == 0:
                assert batch["latents"] is None
                continue
            assert batch["latents"].dtype == torch.float32
            assert torch.equal(
                batch["latents"], torch.tensor(np.stack([latents(row) for row in used]).astype(np.float32))
            )


def test_a_folder_of_several_lmdbs_is_one(tmp_path):
    (tmp_path / "all").mkdir()
    for number, count in ((10, 2), (9, 3)):  # by name: 10 comes first
        texts = {f"prompts_{row}_data": f"{number}: {row}".encode() for row in range(count)}
        shutil.move(write_lmdb(tmp_path, count, **texts), tmp_path / "all" / str(number))
    args = make_args(dataset_lmdb=str(tmp_path / "all"), center_crop=False)
    rows = check_data_args(args)
    assert (len(rows), rows.shape) == (5, SHAPE)
    assert [rows.captions(row) for row in range(5)] == [["10: 0"], ["10: 1"], ["9: 0"], ["9: 1"], ["9: 2"]]
    for row, number in enumerate((0, 1, 0, 1, 2)):
        name, found, why = rows.read(row)
        assert name == f"latents_{number}_data in {tmp_path}/all/{10 if row < 2 else 9}" and why == ""
        assert np.array_equal(found, latents(number).astype(np.float32))
    assert len(check_data_args(changed(args, max_train_samples=3))) == 3


def several(folder, **last):
    """A folder of two LMDB folders, the last of which is written with changes."""
    (folder / "all").mkdir()
    for name, changes in (("a", {}), ("b", last)):
        shutil.move(write_lmdb(folder, **changes), folder / "all" / name)
    return dict(dataset_lmdb=str(folder / "all"), center_crop=False)


def emptied(folder, name):
    arguments = several(folder)
    os.remove(folder / "all" / name / "data.mdb")
    return arguments


def test_unreadable_latents_give_way(tmp_path, caplog):
    bad = latents(0).copy()
    bad[1, 1, 1] = np.inf
    folder = write_lmdb(
        tmp_path, 7, latents_2_data=bad.tobytes(), latents_3_data=bytes(4), latents_4_data=None, prompts_5_data=None,
        latents_6_data=np.full(SHAPE, np.nan, "<f2").tobytes(),
    )  # fmt: skip
    dataset = PromptImageDataset(lmdb_module.LatentRows(folder, 5), 16, False, False, 3, always)
    sample = dataset[2, 0, 7]
    names = [f"latents_{row}_data in {folder}" for row in (2, 3, 4)]
    assert (sample["row"], sample["prompt"], [name for name, _ in sample["unreadable"]]) == (0, "ein Würfel 0", names)
    assert [why for _, why in sample["unreadable"]] == [
        "it is not finite", "latents_3_data has 4 bytes, 4 x 2 x 3 in float16 has 48", "latents_4_data is missing",
    ]  # fmt: skip
    rows = lmdb_module.LatentRows(folder)
    assert rows.read(5)[1] is not None and rows.read(6)[1] is None
    args = make_args(dataset_lmdb=folder, center_crop=False)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UserError, match="prompt of row 5 .*prompts_5_data is missing") as caught,
    ):
        take(make_dataloader(args, rows, 0, 1, 0, 0, always), 7)
    assert caught.value.exit_code == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        take(make_dataloader(args, lmdb_module.LatentRows(folder, 3), 0, 1, 0, 0, always), 6)
    assert [names[0] in record.getMessage() for record in caplog.records] == [True]


def test_first_and_last_row_of_those_used_are_always_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LOOKED_AT", 0)
    for row in (0, 4):
        (tmp_path / str(row)).mkdir()
        args = make_args(**lmdb_args(tmp_path / str(row), **{f"latents_{row}_data": None}))
        for used in (5, 6):
            if row in (0, used - 1):
                with pytest.raises(UserError, match=f"latents_{row}_data is missing"):
                    check_data_args(changed(args, max_train_samples=used))
            else:
                assert len(check_data_args(changed(args, max_train_samples=used))) == used
        # Rows that are cut off, and latents that are never read, need not be there.
        assert len(check_data_args(changed(args, **PROMPTS_ONLY))) == 6
    assert len(check_data_args(changed(args, max_train_samples=4))) == 4


def test_a_cut_lmdb_is_refused_before_it_is_read(tmp_path):
    args = make_args(**lmdb_args(tmp_path, count=30, shape=(4, 16, 16)))
    assert len(check_data_args(args)) == 30
    file = os.path.join(args.dataset_lmdb, "data.mdb")
    whole = os.path.getsize(file)
    assert whole > 60000
    for size in (whole - 1, whole - 4096, whole // 2, 3 * 4096, 2 * 4096, 5000, 4096, 100, 0):
        os.truncate(file, size)
        with pytest.raises(UserError, match="data.mdb is cut") as caught:
            check_data_args(args)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_latents_must_fit_the_teacher(tmp_path):
    args = make_args(**lmdb_args(tmp_path, shape=(4, 2, 2)), resolution=32)
    rows = load_rows(args)
    for shape, fix in [((4, 4, 4), "give --resolution 16, or"), ((16, 2, 2), "give latents of this teacher's VAE")]:
        found = f"--dataset_lmdb {args.dataset_lmdb}: holds latents of 4 x 2 x 2, .* {shape[0]} x {shape[1]} x {shape[2]}.* {fix}"
        with pytest.raises(UserError, match=found) as caught:
            check_latents(args, rows, shape)
        assert caught.value.exit_code == 2
        check_latents(changed(args, **PROMPTS_ONLY), rows, shape)
    check_latents(args, rows, (4, 2, 2))
    check_latents(args, load_rows(make_args(dataset_json=write_json(tmp_path))), (4, 4, 4))


def test_lmdb_is_needed_by_its_flag_alone(tmp_path, monkeypatch):
    folder = write_lmdb(tmp_path)
    monkeypatch.setitem(sys.modules, "lmdb", None)  # an import of it fails
    for module in (lmdb_module, sources):
        runpy.run_path(module.__file__)
    args = make_args(dataset_json=write_json(tmp_path))
    take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 1)
    with pytest.raises(UserError, match="--dataset_lmdb needs lmdb, which is not installed") as caught:
        check_data_args(make_args(dataset_lmdb=folder, center_crop=False))
    assert caught.value.exit_code == 2


# Bad input -----------------------------------------------------------------------------------------------------------
def text(folder, content, name="bad.json"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def table(folder, **changes):
    return {"dataset_name": write_dataset(folder), **IN_TABLE, **changes}


def without_image(folder, row):
    path = write_json(folder, 12)
    (folder / "images" / f"{row}.png").unlink()
    return path


def folder_of(folder, content):
    (folder / "data.mdb").write_bytes(content)
    return dict(dataset_lmdb=str(folder), center_crop=False)


NOWHERE = "no such folder"
BAD = {  # name: (the arguments, what the message says, whose value it names where it is not the data set's)
    "none": (lambda f: {}, "--dataset_name, --train_data_dir, --dataset_json, --prompts_file, --dataset_lmdb"),
    "two": (lambda f: dict(dataset_name="a", dataset_json="b.json"), "exactly one"),
    "no json": (lambda f: dict(dataset_json=str(f / "none.json")), "No such file"),
    "cut json": (lambda f: dict(dataset_json=text(f, '{"keys": [1,\n 2')), "cut"),
    "binary json": (lambda f: dict(dataset_json=text(f, b"\xff\xfe\x00")), "not valid JSON"),
    "list json": (lambda f: dict(dataset_json=text(f, "[1]")), '"keys"'),
    "missing key": (lambda f: dict(dataset_json=text(f, '{"keys": [1], "image_paths": ["a"]}')), 'no list "prompts"'),
    "lengths": (lambda f: dict(dataset_json=write_json(f, prompts=["a"] * 5)), "keys 6, image_paths 6, prompts 5"),
    "lengths of keys": (lambda f: dict(dataset_json=write_json(f, keys=[])), "keys 0, image_paths 6, prompts 6"),
    "no rows": (lambda f: dict(dataset_json=write_json(f, 0)), "keys 0, image_paths 0, prompts 0"),
    "number as prompt": (
        lambda f: dict(dataset_json=write_json(f, 2, prompts=["a", 3])),
        "string or a list of strings",
    ),
    "null as prompt": (
        lambda f: dict(dataset_json=write_json(f, 2, prompts=["a", None])),
        "string or a list of strings",
    ),
    "half a character": (
        lambda f: dict(dataset_json=write_json(f, 2, prompts=["a", "\ud83d"])),
        "string or a list of strings",
    ),
    "missing image": (lambda f: dict(dataset_json=without_image(f, 9)), "1 of 12 images looked at are missing"),
    "no prompts file": (lambda f: dict(prompts_file=str(f / "p.txt"), **PROMPTS_ONLY), "No such file"),
    "empty prompts": (lambda f: dict(prompts_file=text(f, " \n\n"), **PROMPTS_ONLY), "empty"),
    "prompts and GAN": (lambda f: dict(prompts_file=text(f, "a"), backward_simulation_prob=1.0), "--gan_weight 0"),
    "prompts and latents": (lambda f: dict(prompts_file=text(f, "a"), gan_weight=0.0), "--backward_simulation_prob 1"),
    "no folder": (lambda f: dict(train_data_dir=str(f / "gone")), NOWHERE),
    "empty folder": (lambda f: dict(train_data_dir=str(f)), "has no images"),
    "no local dataset": (lambda f: dict(dataset_name=str(f / "gone")), NOWHERE),
    "no metadata": (lambda f: dict(train_data_dir=write_folder(f / "a", "none")), "metadata.jsonl"),
    "no image column": (lambda f: table(f, image_column="img"), "image, caption, number", "image_column"),
    "image column": (lambda f: table(f, image_column="number"), "holds numbers (int64), not images", "image_column"),
    "no caption column": (lambda f: table(f, caption_column="txt"), "image, caption, number", "caption_column"),
    "caption column": (
        lambda f: table(f, caption_column="number"),
        "holds numbers (int64), not strings",
        "caption_column",
    ),
    "captions missing": (lambda f: table(f, caption_column="sparse"), "is empty in row 1 of", "caption_column"),
    "no samples": (lambda f: dict(dataset_name="a/b", max_train_samples=0), "leaves no row", "max_train_samples"),
    "no lmdb": (lambda f: dict(dataset_lmdb=str(f / "gone"), center_crop=False), "no data.mdb"),
    "a file as lmdb": (lambda f: dict(dataset_lmdb=text(f, "a"), center_crop=False), "no data.mdb"),
    "not an lmdb": (lambda f: folder_of(f, b"a" * 20000), "no LMDB"),
    "no shape": (lambda f: lmdb_args(f, latents_shape=None), "latents_shape is missing"),
    "three numbers as shape": (lambda f: lmdb_args(f, latents_shape=b"6 4 2"), "'6 4 2'"),
    "no numbers as shape": (lambda f: lmdb_args(f, latents_shape=b"6 4 2 x"), "N C H W"),
    "zero in the shape": (lambda f: lmdb_args(f, latents_shape=b"6 0 2 3"), "'6 0 2 3'"),
    "binary shape": (lambda f: lmdb_args(f, latents_shape=b"\xff\xfe"), "N C H W"),
    "fewer rows than promised": (lambda f: lmdb_args(f, latents_shape=b"7 4 2 3"), "prompts_6_data is missing"),
    "latents missing": (
        lambda f: lmdb_args(f, latents_3_data=None),
        "row 3 cannot be read (latents_3_data is missing",
    ),
    "float32 latents": (lambda f: lmdb_args(f, latents_3_data=bytes(96)), "96 bytes, 4 x 2 x 3 in float16 has 48"),
    "prompt missing": (lambda f: lmdb_args(f, prompts_3_data=None), "prompts_3_data is missing"),
    "binary prompt": (lambda f: lmdb_args(f, prompts_3_data=b"\xff"), "row 3 cannot be read"),
    "flipped latents": (lambda f: dict(lmdb_args(f), random_flip=True), "--random_flip"),
    "cropped latents": (lambda f: dict(lmdb_args(f), center_crop=True), "--center_crop"),
    "other shape": (lambda f: several(f, shape=(4, 2, 2)), "all/b has latents of 4 x 2 x 2, "),
    "one of several without a shape": (lambda f: several(f, latents_shape=None), "all/b: no shape can be read"),
    "one of several is none": (lambda f: emptied(f, "b"), "all/b: there is no data.mdb"),
    "a row of one of several": (lambda f: several(f, latents_3_data=None), "row 3 of "),
    "config": (
        lambda f: dict(train_data_dir="a", dataset_config_name="en"),
        "--train_data_dir",
        "dataset_config_name",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_flag_value_and_fix(case, tmp_path):
    arguments, says, *named = BAD[case]
    changes = arguments(tmp_path)
    args = make_args(**changes)
    with pytest.raises(UserError) as caught:
        load_rows(args, check_data_args(args))
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and says in message
    for flag in named or [flag for flag in sources.SOURCES if flag in changes]:
        assert f"--{flag} {changes[flag]}" in message


def test_a_missing_image_may_lie_in_the_random_sample(tmp_path):
    paths = [f"{row}.png" for row in range(3000)]
    for path in paths[:1000]:
        (tmp_path / path).touch()
    content = {"keys": paths, "image_paths": paths, "prompts": paths}
    args = make_args(dataset_json=text(tmp_path, json.dumps(content)))
    with pytest.raises(UserError, match="images looked at are missing") as caught:
        check_data_args(args)
    with pytest.raises(UserError) as again:
        check_data_args(args)
    assert str(again.value) == str(caught.value)
    # Rows that are cut off, and images that are never read, need not be there.
    assert len(check_data_args(make_args(dataset_json=args.dataset_json, max_train_samples=1000))) == 1000
    assert len(check_data_args(make_args(dataset_json=args.dataset_json, **PROMPTS_ONLY))) == 3000
    # The first rows are always looked at.
    (tmp_path / paths[1]).unlink()
    with pytest.raises(UserError, match="1 of .* missing, one is 1.png"):
        check_data_args(make_args(dataset_json=args.dataset_json, max_train_samples=1000))


def test_a_data_set_that_the_hub_does_not_give_is_no_typo(monkeypatch):
    def gated(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/data' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(
        UserError, match="some/data: cannot be loaded .*is a gated dataset.*accept its license"
    ) as caught:
        load_rows(make_args(dataset_name="some/data"))
    assert caught.value.exit_code == 2
