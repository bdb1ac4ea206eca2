# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""--aspect_ratio_buckets: sizes read from headers, the size of an iteration, the order of its rows."""

import json
import logging
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from data_sets import PROMPTS_ONLY, always, changed, make_args, take, write_dataset
from PIL import Image, ImageFile

from senseflow.data.buckets import BucketRows, Buckets, image_sizes
from senseflow.data.loader import BucketBatchSampler, make_dataloader
from senseflow.data.rows import ImageRows
from senseflow.data.sources import load_rows


SIZES = [[16, 16], [8, 24], [24, 8], [16, 24]]
ROWS = [0] * 9 + [1] * 3 + [2] * 12  # the size of each row; none has the last


def batches(batch_size, accumulation, world_size, iterations, seed=5, iteration=0, samples_seen=0):
    """{(iteration, sample index): row} of all ranks, and the size of each iteration."""
    counts = np.bincount(ROWS, minlength=len(SIZES))
    buckets = Buckets(seed, SIZES, counts.tolist())
    rows = {}
    for rank in range(world_size):
        order = BucketRows(
            buckets, [[np.flatnonzero(np.array(ROWS) == bucket)] for bucket in range(4)], counts[:, None]
        )
        shape = (len(ROWS), seed, batch_size, accumulation, rank, world_size, iteration, samples_seen)
        for keys in take(BucketBatchSampler(*shape, bucket_rows=order), accumulation * iterations):
            for row, number, sample_index in keys:
                assert (number, sample_index) not in rows
                rows[number, sample_index] = row
    return rows, [buckets.draw(number) for number in range(iteration, iteration + iterations)]


@pytest.mark.parametrize("shape", [(4, 2, 1), (1, 2, 4), (2, 2, 2)])
def test_an_iteration_has_rows_of_one_size_in_all_processes(shape):
    rows, drawn = batches(*shape, 300)
    assert rows == batches(8, 1, 1, 300)[0], "whatever the number of processes"
    assert len(rows) == 8 * 300 and {ROWS[row] for row in rows.values()} == {0, 1, 2}
    for number, bucket in enumerate(drawn):
        assert {ROWS[rows[number, index]] for index in range(8)} == {bucket}
    counts = [drawn.count(bucket) for bucket in range(4)]
    assert counts == pytest.approx([300 * 9 / 24, 300 * 3 / 24, 150, 0], abs=30), "as often as there are rows"


def test_every_row_of_a_size_comes_once_before_any_comes_again():
    rows, drawn = batches(4, 1, 1, 60)
    for bucket in range(3):
        used = [rows[number, index] for number in range(60) if drawn[number] == bucket for index in range(4)]
        own = [row for row, size in enumerate(ROWS) if size == bucket]
        epochs = [used[i : i + len(own)] for i in range(0, len(used) - len(own), len(own))]
        assert len(epochs) > 1 and all(sorted(epoch) == own for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1


def test_a_resumed_run_continues_also_with_another_global_batch():
    whole, _ = batches(4, 1, 1, 40)
    later, _ = batches(2, 1, 2, 23, iteration=17, samples_seen=17 * 4)
    assert later == {key: row for key, row in whole.items() if key[0] >= 17}
    larger, _ = batches(8, 1, 1, 20, iteration=17, samples_seen=17 * 4)
    again, _ = batches(8, 1, 1, 10, iteration=27, samples_seen=17 * 4 + 10 * 8)
    assert again == {key: row for key, row in larger.items() if key[0] >= 27}


def write_images(folder) -> str:
    """20 images of three shapes; the first one lies on its side, the last one is no image."""
    paths = []
    for row in range(20):
        size = [(24, 24), (36, 12), (12, 36)][row % 3]
        path = folder / f"{row}.{'jpg' if row == 0 else 'png'}"
        image, exif = Image.new("RGB", (12, 36) if row == 0 else size), Image.Exif()
        exif[274] = 6 if row == 0 else 1  # to be turned: 36 wide, 12 high
        image.save(path, exif=exif)
        paths.append(path.name)
    path.write_bytes(b"no image")
    data = {"image_paths": paths, "prompts": [f"prompt {row}" for row in range(20)]}
    (folder / "data.json").write_text(json.dumps(data))
    return str(folder / "data.json")


def test_sizes_come_from_headers_and_are_kept(tmp_path, monkeypatch):
    def decode(*_):
        raise AssertionError("pixels are read")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decode)
    rows = load_rows(make_args(dataset_json=write_images(tmp_path)))
    found = image_sizes(rows)
    shapes = [[24, 24], [12, 36], [36, 12]]
    assert found.tolist() == [[12, 36]] + [shapes[row % 3] for row in range(1, 19)] + [[0, 0]]
    monkeypatch.setattr(ImageRows, "image_sizes", decode)
    assert np.array_equal(image_sizes(rows), found)
    with pytest.raises(AssertionError, match="pixels are read"):  # other rows
        image_sizes(load_rows(make_args(dataset_json=write_images(tmp_path), max_train_samples=5)))


def test_sizes_of_images_inside_tables(tmp_path):
    rows = load_rows(make_args(dataset_name=write_dataset(tmp_path), caption_column="caption"))
    assert image_sizes(rows).tolist() == [[16, 20]] * 6
    cells = [{"bytes": None, "path": None}, None, {"bytes": b"no image", "path": None}]
    images = datasets.Dataset.from_dict({"image": cells}).cast_column("image", datasets.Image(decode=False))
    assert list(ImageRows("--dataset_name x", ["a"] * 3, images).image_sizes(0, 3)) == [(0, 0)] * 3


def test_batches_have_the_size_of_their_images(tmp_path, caplog):
    args = make_args(dataset_json=write_images(tmp_path), aspect_ratio_buckets=SIZES, resolution=[16, 24])
    with caplog.at_level(logging.INFO):
        loader = make_dataloader(args, load_rows(args), 0, 1, 0, 0, always)
    line = "rows by height x width: 16 x 16: 6, 8 x 24: 7, 24 x 8: 6, 16 x 24: 1"  # the last one is no image
    assert line in caplog.text and "never trained at" not in caplog.text
    found = take(loader, 60)
    assert {tuple(batch["size"]) for batch in found} == set(map(tuple, SIZES))
    for batch in found:
        assert batch["pixel_values"].shape == (2, 3, *batch["size"])
    used = Counter(row for batch in found if list(batch["size"]) != [16, 24] for row in batch["rows"])
    assert set(used) == set(range(19)) and max(used.values()) - min(used.values()) < 6
    resumed = take(make_dataloader(changed(args, dataloader_num_workers=1), load_rows(args), 0, 1, 30, 60, always), 30)
    for batch, wanted in zip(resumed, found[30:], strict=True):
        assert batch["prompts"] == wanted["prompts"]
        assert torch.equal(batch["pixel_values"], wanted["pixel_values"])

    with caplog.at_level(logging.WARNING):
        caplog.clear()
        args = changed(args, aspect_ratio_buckets=[*SIZES[:3], [24, 64]], resolution=[16, 16])
        make_dataloader(args, load_rows(args), 0, 1, 0, 0, always)
    assert "24 x 8: 6, 24 x 64: 0 (0: never trained at)" in caplog.text


def test_data_sets_keep_their_weights(tmp_path):
    """Three quarters of the samples come from the smaller data set, which has one shape of the other's two."""
    for name, count in (("a", 4), ("b", 16)):
        (tmp_path / name).mkdir()
        for row in range(count):
            size = (36, 12) if name == "a" or row % 2 else (12, 36)
            Image.new("RGB", size).save(tmp_path / name / f"{row}.png")
            (tmp_path / name / f"{row}.txt").write_text(f"{name} {row}")
    args = make_args(train_data_dir=[str(tmp_path / "a"), str(tmp_path / "b")], dataset_weights=[3.0, 1.0])
    args = changed(args, aspect_ratio_buckets=SIZES[:3], gradient_accumulation_steps=2)
    found = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, lambda iteration: False), 1600)
    counts = Counter((tuple(batch["size"]), prompt[0]) for batch in found for prompt in batch["prompts"])
    shares = {key: count / 3200 for key, count in counts.items()}
    assert shares == pytest.approx({((8, 24), "a"): 0.75, ((8, 24), "b"): 0.125, ((24, 8), "b"): 0.125}, abs=0.03)
    used = Counter(prompt for batch in found for prompt in batch["prompts"] if prompt[0] == "a")
    assert len(used) == 4 and max(used.values()) - min(used.values()) <= 1


def test_without_images_each_size_comes_as_often_and_rows_in_their_own_order(tmp_path):
    args = make_args(dataset_json=write_images(tmp_path), **PROMPTS_ONLY)
    plain = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, lambda iteration: False), 200)
    args = changed(args, aspect_ratio_buckets=SIZES)
    found = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, lambda iteration: False), 200)
    assert [batch["rows"] for batch in found] == [batch["rows"] for batch in plain]
    counts = Counter(tuple(batch["size"]) for batch in found)
    assert len(counts) == 4 and min(counts.values()) > 30
