# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Arguments and small data sets for the tests of senseflow.data."""

import csv
import io
import itertools
import json
from types import SimpleNamespace

import datasets
import pytest
from PIL import Image

from senseflow.data.buckets import Buckets
from senseflow.data.sources import load_rows
from senseflow.errors import UserError


PROMPTS_ONLY = dict(gan_weight=0.0, backward_simulation_prob=1.0)


def make_args(**changes) -> SimpleNamespace:
    args = dict(
        dataset_name=None, dataset_config_name=None, train_data_dir=None, dataset_json=None, prompts_file=None,
        dataset_lmdb=None, image_column="image", caption_column="text", resolution=[16, 16], center_crop=True,
        aspect_ratio_buckets=None, random_flip=False, max_train_samples=None, train_batch_size=2, seed=3,
        gradient_accumulation_steps=1, dataloader_num_workers=0, gan_weight=1.0, backward_simulation_prob=0.5,
        streaming=False, dataset_weights=None, max_train_steps=100, given=(),
    )  # fmt: skip
    assert set(changes) <= set(args)
    return changed(SimpleNamespace(**args), **changes)


def changed(args, **changes) -> SimpleNamespace:
    """Set flags as if they were given after those of `args`."""
    given = dict.fromkeys([*args.given, *(flag for flag, value in changes.items() if value is not None)])
    return SimpleNamespace(**{**vars(args), **changes, "given": tuple(given)})


def one_size(size=(16, 16)) -> Buckets:
    return Buckets(3, [size], [1])


# At module level, so that spawned workers find them.
def always(iteration):
    return True


def never(iteration):
    return False


def odd_only(iteration):
    return iteration % 2 == 1


def take(loader, count):
    return list(itertools.islice(loader, count))


def all_captions(rows):
    captions = [rows.captions(row) for row in range(len(rows))]
    assert list(rows.all_captions()) == list(itertools.chain.from_iterable(captions))
    return captions


def refusal(args, *parts) -> str:
    """Check that loading the rows ends with exit code 2 and one line that has these parts."""
    with pytest.raises(UserError) as caught:
        load_rows(args)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message
    assert all(part in message for part in parts), message
    return message


def color(row: int) -> tuple:
    return (20 * row, 255 - 20 * row, 7 * row)


def write_json(folder, count=6, broken=(), **changes):
    """Images of one color each, named by row; the second half by absolute paths."""
    (folder / "images").mkdir(exist_ok=True)
    paths = []
    for row in range(count):
        path = folder / "images" / f"{row}.png"
        Image.new("RGB", (20, 16), color(row)).save(path)
        if row in broken:
            path.write_bytes(path.read_bytes()[:40])
        paths.append(str(path) if row >= count // 2 else f"images/{row}.png")
    content = {"keys": list(range(count)), "image_paths": paths, "prompts": [f"prompt {row}" for row in range(count)]}
    (folder / "data.json").write_text(json.dumps({**content, **changes}))
    return str(folder / "data.json")


def write_folder(folder, metadata="jsonl"):
    folder.mkdir()
    entries = [{"file_name": f"{row}.png", "text": f"prompt {row}", "other": f"o{row}"} for row in range(6)]
    for row, entry in enumerate(entries):
        Image.new("RGB", (20, 16), color(row)).save(folder / entry["file_name"])
    if metadata == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(entries[0]))
            writer.writeheader()
            writer.writerows(entries)
    elif metadata == "parquet":
        datasets.Dataset.from_list(entries).to_parquet(folder / "metadata.parquet")
    else:
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
    return str(folder)


def write_dataset(folder, form="parquet"):
    """Images inside the table, as on the Hub."""
    cells = []
    for row in range(6):
        content = io.BytesIO()
        Image.new("RGB", (20, 16), color(row)).save(content, "PNG")
        cells.append({"bytes": content.getvalue(), "path": None})
    columns = {"image": cells, "caption": [f"prompt {row}" for row in range(6)], "number": list(range(6))}
    dataset = datasets.Dataset.from_dict({**columns, "sparse": ["a", None] * 3}).cast_column("image", datasets.Image())
    path = folder / "dataset"
    if form == "saved":
        dataset.save_to_disk(path)
    elif form == "saved splits":
        datasets.DatasetDict(test=dataset.select([0]), train=dataset).save_to_disk(path)
    else:
        path.mkdir()
        dataset.to_parquet(path / "train.parquet")
        dataset.select([0]).to_parquet(path / "test.parquet")
    return str(path)
