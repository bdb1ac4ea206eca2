# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""--dataset_lmdb: latents are read exactly, also by workers; unreadable ones are replaced; bad input."""

import logging
import os
import pickle
import runpy
import sys

import lmdb
import numpy as np
import pytest
import torch
from data_sets import (
    PROMPTS_ONLY,
    always,
    changed,
    make_args,
    odd_only,
    one_size,
    refusal,
    take,
    write_json,
)

from senseflow.data import lmdb as lmdb_module
from senseflow.data import rows as rows_module
from senseflow.data import sources
from senseflow.data.lmdb import LatentRows
from senseflow.data.loader import GlobalBatchSampler, PromptImageDataset, make_dataloader
from senseflow.data.sources import check_latents, load_rows
from senseflow.errors import UserError


SHAPE = (4, 2, 3)


def latents(row, shape=SHAPE):
    """Any bits that are a finite float16: signed zeros, subnormals, the largest."""
    bits = np.random.default_rng(row).integers(0, 2**16, shape, dtype=np.uint16).view("<f2")
    return np.where(np.isfinite(bits), bits, np.float16(65504))


def write_lmdb(folder, count=6, shape=SHAPE, **changes):
    """As DMD2 writes it; `changes` replaces values, or drops those that are None."""
    values = {"latents_shape": " ".join(map(str, (count, *shape))).encode()}
    for row in range(count):
        values[f"latents_{row}_data"] = latents(row, shape).tobytes()
        values[f"prompts_{row}_data"] = f"ein Würfel {row}".encode()
    with lmdb.open(str(folder / "lmdb"), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in (values | changes).items():
            if value is not None:
                transaction.put(key.encode(), value)
    return str(folder / "lmdb")


def lmdb_args(folder, **changes):
    return make_args(dataset_lmdb=write_lmdb(folder, **changes))


def test_latents_and_prompts_are_read_exactly_also_by_workers(tmp_path):
    args = changed(lmdb_args(tmp_path), gradient_accumulation_steps=2)
    rows = pickle.loads(pickle.dumps(load_rows(args)))  # as a spawned worker gets it
    assert len(rows) == 6 and rows.shape == SHAPE
    assert rows.fingerprint == load_rows(args).fingerprint
    (tmp_path / "other").mkdir()
    other = load_rows(lmdb_args(tmp_path / "other", prompts_3_data=b"another")).fingerprint
    assert other != rows.fingerprint and other.startswith("6 rows, hash ")
    keys = take(GlobalBatchSampler(6, 3, 2, 2, 1, 2, 4, 32), 8)
    for workers in (0, 2):  # 2: forked from a process that has read the same folder
        loader = make_dataloader(changed(args, dataloader_num_workers=workers), rows, 1, 2, 4, 32, odd_only)
        for batch, expected in zip(take(loader, 8), keys):
            used, iterations, indices = zip(*expected)
            assert batch["rows"] == list(used) and batch["sample_indices"] == list(indices)
            assert batch["prompts"] == tuple(f"ein Würfel {row}" for row in used)
            assert "pixel_values" not in batch and batch["unreadable"] == []
            if odd_only(iterations[0]):
                stored = np.stack([latents(row) for row in used]).astype(np.float32)
                assert batch["latents"].dtype == torch.float32 and torch.equal(batch["latents"], torch.tensor(stored))
            else:
                assert batch["latents"] is None


def test_unreadable_latents_are_replaced_and_a_missing_prompt_ends_the_run(tmp_path, caplog):
    infinite = latents(0).copy()
    infinite[1, 1, 1] = np.inf
    folder = write_lmdb(
        tmp_path, 7, latents_2_data=infinite.tobytes(), latents_3_data=bytes(4), latents_4_data=None,
        prompts_5_data=None, latents_6_data=np.full(SHAPE, np.nan, "<f2").tobytes(),
    )  # fmt: skip
    sample = PromptImageDataset(LatentRows(folder, 5), one_size(), False, False, 3, always)[2, 0, 7]
    assert (sample["row"], sample["prompt"]) == (0, "ein Würfel 0")
    assert sample["unreadable"] == [
        (f"latents_2_data in {folder}", "it is not finite"),
        (f"latents_3_data in {folder}", "latents_3_data has 4 bytes, (4, 2, 3) in float16 has 48"),
        (f"latents_4_data in {folder}", "latents_4_data is missing"),
    ]
    rows = LatentRows(folder)
    assert rows.read(5)[1] is not None and rows.read(6)[1] is None
    args = make_args(dataset_lmdb=folder)
    with pytest.raises(UserError, match="prompt of row 5 .*prompts_5_data is missing") as caught:
        take(make_dataloader(args, rows, 0, 1, 0, 0, always), 7)
    assert caught.value.exit_code == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        take(make_dataloader(args, LatentRows(folder, 3), 0, 1, 0, 0, always), 6)
    assert ["latents_2_data" in record.getMessage() for record in caplog.records] == [True]


def test_first_and_last_row_of_those_used_are_always_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "NUM_CHECKED", 1)
    for row in (0, 4):
        (tmp_path / str(row)).mkdir()
        args = lmdb_args(tmp_path / str(row), **{f"latents_{row}_data": None})
        refusal(changed(args, max_train_samples=5), f"latents_{row}_data is missing")
        # Rows that are cut off, and latents that are never read, need not be there.
        assert len(load_rows(changed(args, **PROMPTS_ONLY))) == 6
    assert len(load_rows(changed(args, max_train_samples=4))) == 4


def test_a_cut_lmdb_is_refused_before_it_is_read(tmp_path):
    args = lmdb_args(tmp_path, count=30, shape=(4, 16, 16))
    assert len(load_rows(args)) == 30
    file = os.path.join(args.dataset_lmdb, "data.mdb")
    whole = os.path.getsize(file)
    assert whole > 60000
    for size in (whole - 1, whole - 4096, whole // 2, 3 * 4096, 2 * 4096, 5000, 4096, 100, 0):
        os.truncate(file, size)
        refusal(args, f"--dataset_lmdb {args.dataset_lmdb}", "is cut or no LMDB")


def test_latents_must_fit_the_teacher(tmp_path):
    args = changed(lmdb_args(tmp_path, shape=(4, 2, 2)), resolution=[32, 32])
    rows = load_rows(args)
    for shape in ((4, 4, 4), (16, 2, 2)):
        with pytest.raises(UserError) as caught:
            check_latents(args, rows, shape)
        problem = f"{args.dataset_lmdb}: holds latents of (4, 2, 2), this teacher's are {shape} at --resolution 32 32"
        assert caught.value.exit_code == 2 and problem in str(caught.value)
        check_latents(changed(args, **PROMPTS_ONLY), rows, shape)
    check_latents(args, rows, (4, 2, 2))
    check_latents(args, load_rows(make_args(dataset_json=write_json(tmp_path))), (4, 4, 4))


def test_the_package_lmdb_is_needed_by_its_flag_alone(tmp_path, monkeypatch):
    folder = write_lmdb(tmp_path)
    monkeypatch.setitem(sys.modules, "lmdb", None)  # an import of it fails
    for module in (lmdb_module, sources):
        runpy.run_path(module.__file__)
    args = make_args(dataset_json=write_json(tmp_path))
    take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 1)
    refusal(make_args(dataset_lmdb=folder), "--dataset_lmdb needs lmdb, which is not installed")


def file_as_folder(folder):
    (folder / "file").touch()
    return make_args(dataset_lmdb=str(folder / "file"))


def no_lmdb(folder):
    (folder / "data.mdb").write_bytes(b"a" * 20000)
    return make_args(dataset_lmdb=str(folder))


BAD = {  # name: (arguments, part of the message)
    "no folder": (lambda f: make_args(dataset_lmdb=str(f / "gone")), "data.mdb must be there"),
    "a file": (file_as_folder, "data.mdb must be there"),
    "not an lmdb": (no_lmdb, "no LMDB"),
    "no shape": (lambda f: lmdb_args(f, latents_shape=None), "latents_shape is missing"),
    "three numbers as shape": (lambda f: lmdb_args(f, latents_shape=b"6 4 2"), "'6 4 2'"),
    "no numbers as shape": (lambda f: lmdb_args(f, latents_shape=b"6 4 2 x"), "N C H W"),
    "zero in the shape": (lambda f: lmdb_args(f, latents_shape=b"6 0 2 3"), "'6 0 2 3'"),
    "fewer rows than declared": (lambda f: lmdb_args(f, latents_shape=b"7 4 2 3"), "prompts_6_data is missing"),
    "latents missing": (lambda f: lmdb_args(f, latents_3_data=None), "row 3 cannot be read (latents_3_data is"),
    "float32 latents": (lambda f: lmdb_args(f, latents_3_data=bytes(96)), "96 bytes, (4, 2, 3) in float16 has 48"),
    "prompt missing": (lambda f: lmdb_args(f, prompts_3_data=None), "prompts_3_data is missing"),
    "binary prompt": (lambda f: lmdb_args(f, prompts_3_data=b"\xff"), "row 3 cannot be read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_flag_value_and_fix(case, tmp_path):
    arguments, part = BAD[case]
    args = arguments(tmp_path)
    refusal(args, part, f"--dataset_lmdb {args.dataset_lmdb}: ")
