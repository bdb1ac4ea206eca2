# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""--streaming: every row once per epoch over processes and workers, exact resume, formats, bad input."""

import io
import json
import logging
import pickle
import tarfile

import datasets
import numpy as np
import pytest
import torch
from data_sets import (
    PROMPTS_ONLY,
    always,
    changed,
    make_args,
    never,
    odd_only,
    refusal,
    take,
    write_dataset,
    write_folder,
)
from PIL import Image

import train_senseflow_flux as script
from helpers import resume_is_the_same_run
from senseflow.data.loader import make_dataloader
from senseflow.data.rows import ImageRows
from senseflow.data.sources import load_rows
from senseflow.errors import UserError


ROWS = 24
BROKEN = (3, 4, 17)


def image(row):
    """Encode a ramp, which shows crop and flip, and whose green shows the row."""
    pixels = np.zeros((64, 80, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(80), 10 * row
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def row_of(pixels):
    return round((pixels[1].mean().item() + 1) * 12.75)


def write_files(folder, files=4, rows=ROWS, broken=(), **columns):
    """Parquet files of equally many rows with images inside, as on the Hub."""
    folder.mkdir(exist_ok=True)
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), number=datasets.Value("int64"))
    for file in range(files):
        numbers = range(file * rows // files, (file + 1) * rows // files)
        cells = [{"bytes": image(row)[: 60 if row in broken else None], "path": None} for row in numbers]
        content = {"image": cells, "text": [f"prompt {row}" for row in numbers], "number": list(numbers), **columns}
        datasets.Dataset.from_dict(content, features).to_parquet(folder / f"train-{file}.parquet")
    return str(folder)


def stream_args(**changes):
    return make_args(**changes, streaming=True)


# The split -----------------------------------------------------------------------------------------------------------
SPLITS = {  # files, --max_train_samples, rows per epoch of (process 0, worker 0), (0, 1), (1, 0), (1, 1)
    "files": (4, None, (6, 6, 6, 6)),
    "rows of files": (3, None, (8, 4, 8, 4)),  # two processes do not divide three files
    "files, cut": (4, 10, (3, 2, 3, 2)),
    "rows of files, cut": (3, 10, (3, 3, 2, 2)),
}


@pytest.mark.parametrize("case", SPLITS)
def test_each_epoch_has_every_row_once_over_processes_and_workers(case, tmp_path):
    files, limit, sizes = SPLITS[case]
    args = stream_args(
        dataset_name=write_files(tmp_path / "d", files), dataloader_num_workers=2, train_batch_size=1,
        max_train_samples=limit, gradient_accumulation_steps=2,
    )  # fmt: skip
    rows = pickle.loads(pickle.dumps(load_rows(args)))  # as a spawned worker gets it
    epochs = {0: [], 1: []}
    for rank in range(2):
        batches = take(make_dataloader(args, rows, rank, 2, 0, 0, always), 4 * max(sizes))
        assert [batch["sample_indices"] for batch in batches[:3]] == [[rank], [2 + rank], [rank]]
        assert all(batch["prompts"] == (f"prompt {row_of(batch['pixel_values'][0])}",) for batch in batches)
        for worker in range(2):
            prompts = [batch["prompts"][0] for batch in batches[worker::2]]
            size = sizes[2 * rank + worker]
            for epoch in epochs:
                epochs[epoch].append(prompts[epoch * size : (epoch + 1) * size])
    first, second = (sum(shares, []) for shares in epochs.values())
    assert len(first) == len(set(first)) == (limit or ROWS)
    assert sorted(first) == sorted(second) and first != second
    if limit is None:
        # Rows are shuffled inside a file, too.
        assert any(share != sorted(share, key=lambda prompt: int(prompt.split()[1])) for share in epochs[0])


def test_another_seed_is_another_order(tmp_path):
    args = stream_args(dataset_name=write_files(tmp_path / "d"), **PROMPTS_ONLY)
    orders = []
    for seed in (3, 3, 4):
        args = changed(args, seed=seed)
        batches = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, never), 12)
        orders.append([prompt for batch in batches for prompt in batch["prompts"]])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


# Resume --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_continues_to_the_bit(workers, tmp_path, caplog):
    """Train for two epochs with unreadable images; resume at micro-batches 3 and 15, which are worker 1's."""
    args = stream_args(
        dataset_name=write_files(tmp_path / "d", broken=BROKEN), dataloader_num_workers=workers,
        gradient_accumulation_steps=3, center_crop=False, random_flip=True,
    )  # fmt: skip
    rows = load_rows(args)
    with caplog.at_level(logging.INFO):
        whole = take(make_dataloader(args, rows, 0, 1, 0, 0, always), 24)
    warnings = [record.getMessage() for record in caplog.records if "unreadable" in record.getMessage()]
    assert len(warnings) == 3  # one of each image, though two epochs have passed
    assert all(sum(f"of 'prompt {row}' in --dataset_name" in message for message in warnings) == 1 for row in BROKEN)
    assert [batch["sample_indices"] for batch in whole[:4]] == [[0, 1], [2, 3], [4, 5], [0, 1]]

    # An unreadable image and its prompt are replaced by the next readable row of the same sub-stream.
    for worker in range(max(workers, 1)):
        samples = [
            (p, r) for batch in whole[worker :: max(workers, 1)] for p, r in zip(batch["prompts"], batch["rows"])
        ]
        readable = {row: prompt for position, (prompt, row) in enumerate(samples) if row == position}
        replaced = [position for position, (_, row) in enumerate(samples) if row != position]
        assert replaced
        for position in replaced[:-1]:
            assert samples[position][1] == min([row for row in readable if row > position], default=None)
        assert all(prompt == readable.get(row, prompt) for prompt, row in samples)
    assert sum(batch["num_replaced"] for batch in whole) == 2 * len(BROKEN)
    assert {f"prompt {row_of(pixels)}" for batch in whole for pixels in batch["pixel_values"]} == {
        f"prompt {row}" for row in range(ROWS) if row not in BROKEN
    }

    for iteration in (1, 5):
        later = take(make_dataloader(args, rows, 0, 1, iteration, 0, always), 24 - 3 * iteration)
        assert any(batch["num_replaced"] for batch in later)
        for expected, batch in zip(whole[3 * iteration :], later):
            assert torch.equal(expected["pixel_values"], batch["pixel_values"])
            assert {**expected, "pixel_values": 0} == {**batch, "pixel_values": 0}


def test_nothing_is_decoded_that_is_not_needed(tmp_path, monkeypatch):
    args = stream_args(dataset_name=write_files(tmp_path / "d", broken=[0]))
    opened = []
    decode = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or decode(*a, **k))
    batches = iter(make_dataloader(args, load_rows(args), 0, 1, 4, 0, odd_only))
    batch = next(batches)
    assert batch["pixel_values"] is None and len(batch["prompts"]) == 2 and opened == []
    assert next(batches)["pixel_values"].shape == (2, 3, 16, 16) and len(opened) >= 2


# Formats -------------------------------------------------------------------------------------------------------------
def write_tars(folder):
    folder.mkdir()
    for file in range(2):
        with tarfile.open(folder / f"{file}.tar", "w") as tar:
            for row in range(3 * file, 3 * file + 3):
                for ending, content in (("png", image(row)), ("txt", f"prompt {row}".encode())):
                    entry = tarfile.TarInfo(f"{row}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return str(folder)


def unknown_features(monkeypatch):
    """A data set from a generator, which declares no columns."""

    def rows():
        for row in range(6):
            yield {"image": Image.open(io.BytesIO(image(row))), "text": f"prompt {row}"}

    generated = datasets.IterableDataset.from_generator(rows)
    assert generated.features is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: generated)
    return dict(dataset_name="someone/something")


FORMATS = {
    "parquet": lambda folder, _: dict(dataset_name=write_files(folder / "a", 2, rows=6)),
    "imagefolder": lambda folder, _: dict(dataset_name=write_folder(folder / "a")),
    "webdataset": lambda folder, _: dict(
        dataset_name=write_tars(folder / "a"), image_column="png", caption_column="txt"
    ),
    "unknown features": lambda folder, monkeypatch: unknown_features(monkeypatch),
}


@pytest.mark.parametrize("form", FORMATS)
def test_formats_of_streams(form, tmp_path, monkeypatch):
    args = stream_args(**FORMATS[form](tmp_path, monkeypatch))
    batches = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 3)
    images = {prompt: pixels for batch in batches for prompt, pixels in zip(batch["prompts"], batch["pixel_values"])}
    assert sorted(images) == [f"prompt {row}" for row in range(6)]
    for prompt, pixels in images.items():
        row = int(prompt.split()[1])
        green = 255 - 20 * row if form == "imagefolder" else 10 * row
        assert (pixels[1, 8, 8].item() + 1) * 127.5 == pytest.approx(green, abs=1e-3)
    # A stream with images also serves prompts alone. No image column is needed then.
    alone = changed(args, image_column="nowhere", **PROMPTS_ONLY)
    batch = next(iter(make_dataloader(alone, load_rows(alone), 0, 1, 0, 0, never)))
    assert batch["pixel_values"] is None and set(batch["prompts"]) <= set(images)


# Bad input -----------------------------------------------------------------------------------------------------------
def cut_second_file(folder):
    file = sorted(folder.glob("*.parquet"))[1]
    file.write_bytes(file.read_bytes()[:-50])


def no_captions(folder):
    write_files(folder, text=[None] * 6)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage, message", [(cut_second_file, "breaks off"), (no_captions, "--caption_column text")])
def test_a_stream_that_breaks_is_one_line(damage, message, workers, tmp_path):
    args = stream_args(dataset_name=write_files(tmp_path / "d"), dataloader_num_workers=workers)
    rows = load_rows(args)
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=message) as caught:
        take(make_dataloader(args, rows, 0, 1, 0, 0, always), 13)
    assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
    assert f"--dataset_name {args.dataset_name}" in str(caught.value)


def not_parquet(folder):
    folder.mkdir()
    (folder / "a.parquet").write_text("x")
    return str(folder)


def table(folder, **changes):
    return {"dataset_name": write_files(folder / "d"), **changes}


BAD = {  # name: (arguments, part of the message, the flag it names, the number of processes if not 1)
    "no caption column": (lambda f: table(f, caption_column="txt"), "image, text, number", "caption_column"),
    "caption column": (lambda f: table(f, caption_column="number"), "holds 0, not a caption", "caption_column"),
    "image column": (lambda f: table(f, image_column="text"), "Value('string')", "image_column"),
    "no rows": (lambda f: dict(dataset_name=write_files(f / "d", rows=0)), "it has no rows", "dataset_name"),
    "no parquet": (lambda f: dict(dataset_name=not_parquet(f / "d")), "cannot be loaded", "dataset_name"),
    "workers": (lambda f: table(f, dataloader_num_workers=5), "give 4 or fewer", "dataloader_num_workers"),
    "workers of two": (lambda f: table(f, dataloader_num_workers=3), "give 2 or fewer", "dataloader_num_workers", "2"),
    "rows of two": (lambda f: table(f, max_train_samples=1), "give 2 or more", "max_train_samples", "2"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_flag_value_and_fix(case, tmp_path, monkeypatch):
    arguments, part, flag, *processes = BAD[case]
    monkeypatch.setenv("WORLD_SIZE", *(processes or ["1"]))
    args = stream_args(**arguments(tmp_path))
    refusal(args, part, f"--{flag} {getattr(args, flag)}")


def test_what_save_to_disk_wrote_is_not_streamed(tmp_path):
    args = stream_args(dataset_name=write_dataset(tmp_path, "saved"), caption_column="caption")
    assert isinstance(load_rows(args), ImageRows)


# The script ----------------------------------------------------------------------------------------------------------
def test_flux_trains_and_resumes_from_a_stream(teacher, vision, tmp_path):
    flags = [
        *("--pretrained_model_name_or_path", str(teacher)),
        *("--dataset_name", write_files(tmp_path / "d"), "--streaming"),
        *("--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")),
        *("--resolution", "64", "--train_batch_size", "2", "--ttur_ratio", "2", "--learning_rate", "1e-3"),
        *("--lr_warmup_steps", "4", "--max_train_steps", "4", "--checkpointing_steps", "2"),
        *("--max_sequence_length", "16"),
        *("--export_dtype", "fp32", "--random_flip", "--dataloader_num_workers", "3"),
    ]
    whole = resume_is_the_same_run(script, flags, tmp_path)
    assert json.loads((whole / "checkpoint-4" / "state.json").read_text())["args"]["streaming"] is True
