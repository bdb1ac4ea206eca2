# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Several data sets: numbering, shares, order by weight, workers, resume, what is logged, bad input."""

import json
import logging
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from data_sets import (
    PROMPTS_ONLY,
    all_captions,
    always,
    changed,
    color,
    make_args,
    refusal,
    take,
    write_dataset,
    write_folder,
    write_json,
)

import train_senseflow_flux as script
from helpers import resume_is_the_same_run
from senseflow.data import loader as loader_module
from senseflow.data.loader import GlobalBatchSampler, make_dataloader
from senseflow.data.mixture import MixedRows, WeightedOrder
from senseflow.data.sources import load_rows
from senseflow.errors import UserError


class Numbered:
    """Rows that only have a number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def json_in(folder, name, count=6, **changes):
    (folder / name).mkdir()
    prompts = [f"{name} {row}" for row in range(count)]
    return write_json(folder / name, count, **{"prompts": prompts, **changes})


# Rows ----------------------------------------------------------------------------------------------------------------
def test_kinds_of_data_sets_mix_in_the_order_of_the_command_line(tmp_path):
    json_file, folder, dataset = json_in(tmp_path, "a"), write_folder(tmp_path / "b"), write_dataset(tmp_path)
    args = make_args(train_data_dir=[folder], dataset_json=[json_file], max_train_samples=5)
    rows = pickle.loads(pickle.dumps(load_rows(args)))  # as a spawned worker gets it
    assert all_captions(rows) == [[f"prompt {row}"] for row in range(5)] + [[f"a {row}"] for row in range(5)]
    assert [rows.read(row)[1].getpixel((3, 3)) for row in range(10)] == 2 * [color(row) for row in range(5)]
    assert rows.fingerprint == " and ".join(
        load_rows(make_args(**{flag: value}, max_train_samples=5)).fingerprint
        for flag, value in (("train_data_dir", folder), ("dataset_json", json_file))
    )
    twice = load_rows(make_args(dataset_name=[dataset, dataset], caption_column="caption"))
    assert all_captions(twice) == 2 * [[f"prompt {row}"] for row in range(6)]
    (tmp_path / "p.txt").write_text("a\nb")
    alone = load_rows(make_args(dataset_json=json_file, prompts_file=str(tmp_path / "p.txt"), **PROMPTS_ONLY))
    assert all_captions(alone)[5:] == [["a 5"], ["a"], ["b"]]


def test_the_parser_keeps_the_order_of_the_command_line(tmp_path):
    words = "--pretrained_model_name_or_path x --output_dir y".split()
    args = script.parse_args([*words, "--train_data_dir", "c", "d", "--dataset_json=a", "--dataset_weights", "1", "2"])
    assert args.given[2:] == ("train_data_dir", "dataset_json", "dataset_weights")
    assert args.train_data_dir == ["c", "d"] and args.dataset_json == ["a"] and args.dataset_weights == [1.0, 2.0]


def test_without_weights_several_data_sets_are_as_one_of_all_their_rows(tmp_path):
    parts = [json_in(tmp_path, "a", 4), json_in(tmp_path, "b", 6)]
    contents = [json.loads((tmp_path / name / "data.json").read_text()) for name in "ab"]
    paths = [[str(tmp_path / name / path) for path in c["image_paths"]] for name, c in zip("ab", contents)]
    whole = {"image_paths": sum(paths, []), "prompts": contents[0]["prompts"] + contents[1]["prompts"]}
    (tmp_path / "whole.json").write_text(json.dumps(whole))
    args = make_args(dataset_json=[str(tmp_path / "whole.json")], center_crop=False, random_flip=True)
    expected = take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 12)
    args = changed(args, dataset_json=parts, dataloader_num_workers=2)
    for batch, of_whole in zip(take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 12), expected):
        assert torch.equal(batch.pop("pixel_values"), of_whole.pop("pixel_values")) and batch == of_whole


# Weights -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "weights, sizes",
    [([3, 1], [20, 5000]), ([7, 2, 1], [50, 50, 7]), ([1, 1, 1], [3, 4, 1]), ([1, 999, 5], [5, 2000, 400])],
)
def test_each_data_set_has_its_share_and_each_row_its_turn(weights, sizes):
    rows = MixedRows([Numbered(size) for size in sizes], weights)
    order, num = WeightedOrder(rows.groups, rows.weights, 5), 20_000
    drawn = np.array([order.row(position) for position in range(num)])
    sources = np.searchsorted(np.cumsum(sizes), drawn, side="right")
    counts = np.cumsum(sources[:, None] == np.arange(len(sizes)), 0)
    expected = np.arange(1, num + 1)[:, None] * np.array(weights) / sum(weights)
    assert np.abs(counts - expected).max() < 4 * np.sqrt(order.block) / 2  # as in draws, within a block
    assert np.abs(counts - expected)[order.block - 1 :: order.block].max() <= 1 + 1e-6
    for source, (start, size) in enumerate(zip(rows.starts, sizes)):
        turns = drawn[sources == source] - start
        epochs = [turns[first : first + size].tolist() for first in range(0, len(turns), size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs[:-1])
        assert len(set(epochs[-1])) == len(epochs[-1])
        assert size < 20 or epochs[0] != sorted(epochs[0]) and (len(epochs) < 3 or epochs[0] != epochs[1])
    # Where the places of a data set are is drawn, in each block anew.
    blocks = [sources[first : first + order.block].tolist() for first in (0, order.block)]
    assert blocks[0] != sorted(blocks[0]) and blocks[0] != blocks[1]
    assert [WeightedOrder(rows.groups, rows.weights, 6).row(position) for position in range(1000)] != drawn[
        :1000
    ].tolist()


def test_data_sets_of_one_size_have_orders_of_their_own():
    rows = MixedRows([Numbered(30), Numbered(30)], [1, 1])
    drawn = [WeightedOrder(rows.groups, rows.weights, 5).row(position) for position in range(60)]
    first, second = [row for row in drawn if row < 30], [row - 30 for row in drawn if row >= 30]
    assert first[:20] != second[:20]


def test_the_weighted_order_does_not_depend_on_processes_or_on_where_a_run_resumes():
    """The rows of a position, asked for in any order, by one sampler or by several."""
    rows = MixedRows([Numbered(7), Numbered(50)], [1, 3])

    def global_batches(batch_size, accumulation, world_size, iterations, **start):
        found = {}
        for rank in range(world_size):
            order = {"weighted": WeightedOrder(rows.groups, rows.weights, 5), **start}
            sampler = GlobalBatchSampler(57, 5, batch_size, accumulation, rank, world_size, **order)
            for keys in take(sampler, accumulation * iterations):
                found |= {key[1:]: key[0] for key in keys}
        return found

    whole = global_batches(8, 1, 1, 300)
    assert len(whole) == 2400  # three blocks
    for shape in ((2, 2, 2), (1, 2, 4)):
        assert global_batches(*shape, 300) == whole
    later = global_batches(2, 2, 2, 100, iteration=200, samples_seen=1600)
    assert later == {key: row for key, row in whole.items() if key[0] >= 200}


def test_workers_and_unreadable_images_of_a_mixture(tmp_path, caplog):
    paths = [json_in(tmp_path, "a", 4, broken=(1, 3)), json_in(tmp_path, "b", 4)]
    args = make_args(dataset_json=paths, dataset_weights=[1, 4], train_batch_size=8, gradient_accumulation_steps=2)
    rows, batches = load_rows(args), {}
    with caplog.at_level(logging.INFO):
        for workers in (0, 2):
            loader = make_dataloader(changed(args, dataloader_num_workers=workers), rows, 0, 2, 0, 0, always)
            batches[workers] = take(loader, 6)
    messages = [record.getMessage() for record in caplog.records]
    for path, share in zip(paths, ("20 % of the samples, 160 epochs", "80 % of the samples, 640 epochs")):
        assert f"--dataset_json {path}: 4 rows; {share} in the whole run" in messages
    for without, with_workers in zip(*batches.values()):
        assert torch.equal(without.pop("pixel_values"), with_workers.pop("pixel_values")) and without == with_workers
    prompts = Counter(prompt for batch in batches[0] for prompt in batch["prompts"])
    assert set(prompts) == {"a 0", "a 2", "b 0", "b 1", "b 2", "b 3"} and sum(prompts.values()) == 48
    assert sum("images/1.png" in message for message in messages) == 2  # one warning of each loader
    rows = load_rows(changed(args, dataset_json=[paths[0]] * 2, dataset_weights=None))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "MIN_ROWS", 16)
        loader = make_dataloader(args, rows, 0, 1, 0, 0, always)
        take(iter(loader), 2)
    assert f"--dataset_json {paths[0]} and --dataset_json {paths[0]}: " in str(loader.failure)


# Bad input -----------------------------------------------------------------------------------------------------------
BAD = {  # name: (arguments, parts of the message)
    "too few weights": (
        dict(dataset_json=["a", "b"], train_data_dir=["c"], dataset_weights=[1.0, 0.5]),
        ("--dataset_weights 1 0.5: 2 weights for 3 data sets; give one for each, in the order of the command line",),
    ),
    "weights of one": (dict(dataset_json=["a"], dataset_weights=[1.0, 2.0]), ("2 weights for 1 data sets",)),
    "almost nothing": (dict(dataset_json=["a", "b"], dataset_weights=[1.0, 1e-9]), ("--dataset_weights 1 1e-09: ",)),
    "latents": (
        dict(dataset_json=["a"], dataset_lmdb="latents"), ("--dataset_lmdb latents: holds latents, which do not mix",)
    ),
    "streams": (dict(dataset_name=["a", "b"], streaming=True), ("--streaming: several data sets cannot be streams",)),
    "a stream and a file": (dict(dataset_name=["a"], dataset_json=["b"], streaming=True), ("--streaming: several",)),
    "one is missing": (dict(dataset_json=["no.json", "b"]), ("--dataset_json no.json: cannot be read",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case):
    arguments, parts = BAD[case]
    refusal(make_args(**arguments), *parts)


@pytest.mark.parametrize("weights", [["0", "1"], ["-1"], ["nan"], ["inf"], ["a"]])
def test_a_weight_is_a_positive_number(weights):
    with pytest.raises(UserError, match="--dataset_weights"):
        words = "--pretrained_model_name_or_path x --output_dir y --dataset_json a --dataset_weights".split()
        script.parse_args([*words, *weights])


# The script ----------------------------------------------------------------------------------------------------------
def test_flux_trains_and_resumes_on_two_weighted_data_sets(teacher, tmp_path):
    flags = [
        *("--pretrained_model_name_or_path", str(teacher), "--dataset_json", json_in(tmp_path, "a")),
        *("--train_data_dir", write_folder(tmp_path / "b"), "--dataset_weights", "1", "3"),
        *"--gan_weight 0 --resolution 64 --train_batch_size 2 --ttur_ratio 2 --learning_rate 1e-3".split(),
        *"--max_train_steps 4 --checkpointing_steps 2 --max_sequence_length 16 --random_flip".split(),
    ]
    whole = resume_is_the_same_run(script, flags, tmp_path)
    assert json.loads((whole / "checkpoint-4" / "state.json").read_text())["data"].count("6 rows, hash ") == 2
