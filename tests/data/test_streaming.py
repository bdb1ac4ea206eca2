# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""--streaming: every row once per epoch over processes and workers, exact resume, no needless decoding, kinds, bad input."""

import io
import json
import logging
import pickle
import tarfile
import zipfile

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import PROMPTS_ONLY, always, changed, make_args, odd_only, take, write_folder, write_json

import train_senseflow_flux as script
from helpers import resume_is_the_same_run
from senseflow.data.images import read_image
from senseflow.data.sources import check_data_args, check_latents, load_rows, make_dataloader
from senseflow.errors import UserError


ROWS = 24
BROKEN = (3, 4, 17)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def image(row):
    """A ramp whose green is the row's: where it was cropped and whether it was flipped shows, and so does whose it is."""
    pixels = np.zeros((64, 80, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(80), 10 * row
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def row_of(pixels):
    return round((pixels[1].mean().item() + 1) * 12.75)


def write_files(folder, files=4, rows=ROWS, broken=(), **columns):
    """Parquet files of as many rows each, with images inside, as on the Hub."""
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


def never(iteration):
    return False


def rows_of(args):
    rows = load_rows(args, check_data_args(args))
    check_latents(args, rows, (4, 2, 2))
    return rows


# The split -------------------------------------------------------------------------------------------------------------
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
        dataset_name=write_files(tmp_path / "d", files), dataloader_num_workers=2, train_batch_size=1, max_train_samples=limit,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    rows = pickle.loads(pickle.dumps(rows_of(args)))  # as a spawned worker gets it
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
    first, second = (sum(models, []) for models in epochs.values())
    assert len(first) == len(set(first)) == (limit or ROWS)
    assert sorted(first) == sorted(second) and first != second
    if limit is None:
        # Not in the order of the files either.
        assert any(part != sorted(part, key=lambda prompt: int(prompt.split()[1])) for part in epochs[0])


def test_another_seed_is_another_order(tmp_path):
    args = stream_args(dataset_name=write_files(tmp_path / "d"), **PROMPTS_ONLY)
    orders = []
    for seed in (3, 3, 4):
        args = changed(args, seed=seed)
        batches = take(make_dataloader(args, rows_of(args), 0, 1, 0, 0, never), 12)
        orders.append([prompt for batch in batches for prompt in batch["prompts"]])
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


# Resume ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_goes_on_to_the_bit(workers, tmp_path, caplog):
    """Two epochs with unreadable images; the resumes begin at micro-batches 3 and 15, which are worker 1's."""
    args = stream_args(
        dataset_name=write_files(tmp_path / "d", broken=BROKEN), dataloader_num_workers=workers, gradient_accumulation_steps=3,
        center_crop=False, random_flip=True,
    )  # fmt: skip
    rows = rows_of(args)
    with caplog.at_level(logging.INFO):
        whole = take(make_dataloader(args, rows, 0, 1, 0, 0, always), 24)
    assert "passes over" not in caplog.text
    warned = [record.getMessage() for record in caplog.records if "unreadable" in record.getMessage()]
    assert len(warned) == 3  # once an image, though two epochs passed
    assert all(sum(f"of 'prompt {row}' in --dataset_name" in message for message in warned) == 1 for row in BROKEN)
    assert [batch["sample_indices"] for batch in whole[:4]] == [[0, 1], [2, 3], [4, 5], [0, 1]]

    # An unreadable image and its prompt gave way to the next readable row of the same sub-stream.
    for worker in range(max(workers, 1)):
        samples = [
            (p, r) for batch in whole[worker :: max(workers, 1)] for p, r in zip(batch["prompts"], batch["rows"])
        ]
        own = {row: prompt for place, (prompt, row) in enumerate(samples) if row == place}
        gone = [place for place, (_, row) in enumerate(samples) if row != place]
        assert gone and all(
            samples[place][1] == min([row for row in own if row > place], default=None) for place in gone[:-1]
        )
        assert all(prompt == own.get(row, prompt) for prompt, row in samples)
    assert sum(batch["gave_way"] for batch in whole) == 2 * len(BROKEN)
    assert {f"prompt {row_of(pixels)}" for batch in whole for pixels in batch["pixel_values"]} == {
        f"prompt {row}" for row in range(ROWS) if row not in BROKEN
    }

    for iteration in (1, 5):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            later = take(make_dataloader(args, rows, 0, 1, iteration, 0, always), 24 - 3 * iteration)
        assert f"passes over the first {6 * iteration} rows" in caplog.text
        assert any(batch["gave_way"] for batch in later)
        for expected, found in zip(whole[3 * iteration :], later):
            assert torch.equal(expected["pixel_values"], found["pixel_values"])
            assert {**expected, "pixel_values": 0} == {**found, "pixel_values": 0}


def test_nothing_is_decoded_that_is_not_needed(tmp_path, monkeypatch):
    args = stream_args(dataset_name=write_files(tmp_path / "d", broken=[0]))
    opened = []
    decode = Image.open
    monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a) or decode(*a, **k))
    batches = iter(make_dataloader(args, rows_of(args), 0, 1, 4, 0, odd_only))
    batch = next(batches)
    assert batch["pixel_values"] is None and len(batch["prompts"]) == 2 and opened == []
    assert next(batches)["pixel_values"].shape == (2, 3, 16, 16) and len(opened) >= 2


# Kinds -----------------------------------------------------------------------------------------------------------------
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
    """As from a generator: nothing is said about the columns."""

    def rows():
        for row in range(6):
            yield {"image": Image.open(io.BytesIO(image(row))), "text": f"prompt {row}"}

    generated = datasets.IterableDataset.from_generator(rows)
    assert generated.features is None
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.IterableDatasetDict(train=generated))
    return dict(dataset_name="someone/something")


KINDS = {
    "parquet": lambda folder, _: dict(dataset_name=write_files(folder / "a", 2, rows=6)),
    "imagefolder": lambda folder, _: dict(train_data_dir=write_folder(folder / "a", "jsonl")),
    "webdataset": lambda folder, _: dict(
        dataset_name=write_tars(folder / "a"), image_column="png", caption_column="txt"
    ),
    "unknown features": lambda folder, monkeypatch: unknown_features(monkeypatch),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_streams(kind, tmp_path, monkeypatch):
    args = stream_args(**KINDS[kind](tmp_path, monkeypatch))
    batches = take(make_dataloader(args, rows_of(args), 0, 1, 0, 0, always), 3)
    found = {prompt: pixels for batch in batches for prompt, pixels in zip(batch["prompts"], batch["pixel_values"])}
    assert sorted(found) == [f"prompt {row}" for row in range(6)]
    for prompt, pixels in found.items():
        row = int(prompt.split()[1])
        green = 255 - 20 * row if kind == "imagefolder" else 10 * row
        assert (pixels[1, 8, 8].item() + 1) * 127.5 == pytest.approx(green, abs=1e-3)
    # Prompts alone train from a stream with images, too; then no image column is asked for.
    alone = changed(args, image_column="nowhere", **PROMPTS_ONLY)
    batch = next(iter(make_dataloader(alone, rows_of(alone), 0, 1, 0, 0, never)))
    assert batch["pixel_values"] is None and set(batch["prompts"]) <= set(found)


def test_a_image_may_lie_behind_a_url(tmp_path):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", image(7))
    assert read_image(f"zip://a.png::{tmp_path / 'images.zip'}")[0].getpixel((5, 5)) == (5, 70, 0)
    assert read_image(f"zip://gone.png::{tmp_path / 'images.zip'}")[0] is None


# Bad input -------------------------------------------------------------------------------------------------------------
def cut_second_file(folder):
    file = sorted(folder.glob("*.parquet"))[1]
    file.write_bytes(file.read_bytes()[:-50])


def no_captions(folder):
    write_files(folder, text=[None] * 6)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "damage, says", [(cut_second_file, "cannot be read on"), (no_captions, "--caption_column text")]
)
def test_a_stream_that_breaks_is_one_line(damage, says, workers, tmp_path):
    args = stream_args(dataset_name=write_files(tmp_path / "d"), dataloader_num_workers=workers)
    rows = rows_of(args)
    damage(tmp_path / "d")
    with pytest.raises(UserError, match=says) as caught:
        take(make_dataloader(args, rows, 0, 1, 0, 0, always), 13)
    assert (
        caught.value.exit_code == 1
        and "\n" not in str(caught.value)
        and f"--dataset_name {tmp_path / 'd'}" in str(caught.value)
    )


def saved(folder):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(folder / "saved")
    return str(folder / "saved")


def written(file, text):
    """A file; its folder's path where that was made for it."""
    made = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return str(file.parent if made else file)


def table(folder, **changes):
    return {"dataset_name": write_files(folder / "d"), **changes}


BAD = {  # name: (arguments, what the message says, whose value it names, the number of processes if not 1)
    "json": (lambda f: dict(dataset_json=write_json(f)), "--streaming: --dataset_json", "dataset_json"),
    "prompts": (lambda f: dict(prompts_file=written(f / "p.txt", "a"), **PROMPTS_ONLY), "--streaming", "prompts_file"),
    "lmdb": (lambda f: dict(dataset_lmdb=str(f)), "give --dataset_name or --train_data_dir", "dataset_lmdb"),
    "saved": (lambda f: dict(dataset_name=saved(f)), "--streaming: --dataset_name", "dataset_name"),
    "no caption column": (lambda f: table(f, caption_column="txt"), "image, text, number", "caption_column"),
    "caption column": (lambda f: table(f, caption_column="number"), "not strings", "caption_column"),
    "image column": (lambda f: table(f, image_column="text"), "holds strings, not images", "image_column"),
    "no rows": (lambda f: dict(dataset_name=write_files(f / "d", rows=0)), "has no rows", "dataset_name"),
    "no parquet": (
        lambda f: dict(dataset_name=written(f / "d" / "a.parquet", "x")),
        "cannot be loaded",
        "dataset_name",
    ),
    "workers": (lambda f: table(f, dataloader_num_workers=5), "give 4 or fewer", "dataloader_num_workers"),
    "workers of two": (lambda f: table(f, dataloader_num_workers=3), "give 2 or fewer", "dataloader_num_workers", "2"),
    "samples": (
        lambda f: table(f, dataloader_num_workers=2, max_train_samples=3),
        "give 4 or more",
        "max_train_samples",
        "2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_flag_value_and_fix(case, tmp_path, monkeypatch):
    arguments, says, named, *processes = BAD[case]
    monkeypatch.setenv("WORLD_SIZE", *(processes or ["1"]))
    args = stream_args(**arguments(tmp_path))
    with pytest.raises(UserError) as caught:
        load_rows(args, check_data_args(args))
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and says in message
    assert f"--{named} {getattr(args, named)}" in message


# The script ------------------------------------------------------------------------------------------------------------
def test_flux_trains_and_resumes_from_a_stream(teacher, vision, tmp_path):
    flags = [
        *(
            "--pretrained_model_name_or_path",
            str(teacher),
            "--dataset_name",
            write_files(tmp_path / "d"),
            "--streaming",
        ),
        *("--discriminator_backbone", str(vision / "dinov2"), "--discriminator_text_encoder", str(vision / "clip")),
        *("--resolution", "64", "--train_batch_size", "2", "--ttur_ratio", "2", "--learning_rate", "1e-3"),
        *(
            "--lr_warmup_steps",
            "4",
            "--max_train_steps",
            "4",
            "--checkpointing_steps",
            "2",
            "--max_sequence_length",
            "16",
        ),
        *("--export_dtype", "fp32", "--random_flip", "--dataloader_num_workers", "3"),
    ]
    whole = resume_is_the_same_run(script, flags, tmp_path)
    assert json.loads((whole / "checkpoint-4" / "state.json").read_text())["args"]["streaming"] is True
