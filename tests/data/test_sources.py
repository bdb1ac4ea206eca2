# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Choosing the reader; JSON files, prompt files and data sets of `datasets`; bad input."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import re
import tarfile
from pathlib import Path

import datasets
import pytest
from data_sets import (
    PROMPTS_ONLY,
    all_captions,
    always,
    changed,
    color,
    make_args,
    never,
    one_size,
    refusal,
    take,
    write_dataset,
    write_folder,
    write_json,
)
from huggingface_hub import constants
from PIL import Image

from senseflow.data import rows as rows_module
from senseflow.data.loader import PromptImageDataset, make_dataloader
from senseflow.data.prompts import read_prompts_file
from senseflow.data.sources import READERS, load_rows
from senseflow.errors import UserError


IN_TABLE = dict(image_column="image", caption_column="caption")
SOURCES = {
    "json": lambda folder: dict(dataset_json=write_json(folder)),
    "csv": lambda folder: dict(train_data_dir=write_folder(folder / "a", "csv")),
    "jsonl": lambda folder: dict(train_data_dir=write_folder(folder / "a", "jsonl")),
    "metadata.parquet": lambda folder: dict(train_data_dir=write_folder(folder / "a", "parquet")),
    "imagefolder by name": lambda folder: dict(dataset_name=write_folder(folder / "a")),
    "parquet": lambda folder: dict(dataset_name=write_dataset(folder), **IN_TABLE),
    "saved": lambda folder: dict(dataset_name=write_dataset(folder, "saved"), **IN_TABLE),
    "saved splits": lambda folder: dict(dataset_name=write_dataset(folder, "saved splits"), **IN_TABLE),
}


@pytest.mark.parametrize("source", SOURCES)
def test_sources_have_the_same_rows(source, tmp_path):
    args = make_args(**SOURCES[source](tmp_path))
    rows = pickle.loads(pickle.dumps(load_rows(args)))  # as a spawned worker gets it
    assert all_captions(rows) == [[f"prompt {row}"] for row in range(6)]
    assert [rows.read(row)[1].getpixel((3, 3)) for row in range(6)] == [color(row) for row in range(6)]
    shorter = load_rows(changed(args, max_train_samples=4))
    assert len(shorter) == 4 and shorter.captions(3) == ["prompt 3"]
    assert shorter.read(3)[1].getpixel((3, 3)) == color(3)
    # A data set with images also serves prompts alone. No image column is needed then.
    assert load_rows(changed(args, image_column="nowhere", **PROMPTS_ONLY)).captions(5) == ["prompt 5"]


GREEN = "ein grüner\u2028Würfel"


def test_prompts_file(tmp_path):
    path = tmp_path / "prompts.txt"
    # A line ends at a line feed, with or without a carriage return before it, and at no other separator.
    path.write_bytes("\ufeffa red cube \r\n\n   \n\tein grüner\u2028Würfel\na\rb\x0cc\x85d\u2029e\n".encode())
    assert read_prompts_file(str(path)) == ["a red cube", "", "", GREEN, "a\rb\x0cc\x85d\u2029e", ""]
    args = make_args(prompts_file=str(path), **PROMPTS_ONLY)
    rows = load_rows(args)
    assert all_captions(rows) == [["a red cube"], [GREEN], ["a\rb\x0cc\x85d\u2029e"]]
    assert len(load_rows(changed(args, max_train_samples=2))) == 2
    (batch,) = take(make_dataloader(args, rows, 0, 1, 0, 0, never), 1)
    assert batch["pixel_values"] is None and batch["unreadable"] == [] and batch["sample_indices"] == [0, 1]
    assert batch["prompts"] == tuple(rows.captions(row)[0] for row in batch["rows"])


@pytest.mark.parametrize("source", SOURCES)
def test_the_fingerprint_is_that_of_captions_and_names_not_of_the_place(source, tmp_path):
    fingerprints = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        args = make_args(**SOURCES[source](folder))
        fingerprints.append(load_rows(args).fingerprint)
    assert fingerprints[0] == fingerprints[1] and fingerprints[0].startswith("6 rows, hash ")
    assert load_rows(changed(args, max_train_samples=4)).fingerprint.startswith("4 rows, hash ")


def test_another_caption_or_another_order_of_the_images_is_another_fingerprint(tmp_path):
    def fingerprint(**changes):
        return load_rows(make_args(dataset_json=write_json(tmp_path, 2, **changes))).fingerprint

    images = {"image_paths": ["images/1.png", "images/0.png"]}
    kinds = ({}, {"prompts": ["prompt 0", "prompt"]}, {"prompts": ["prompt 0", ["prompt 1", "b"]]}, images)
    assert len({fingerprint(**changes) for changes in kinds}) == 4


def test_a_broken_image_in_a_table_is_skipped(tmp_path):
    good = io.BytesIO()
    Image.new("RGB", (16, 16)).save(good, "PNG")
    cells = [{"bytes": b"not an image", "path": "b.png"}, None, {"bytes": good.getvalue(), "path": None}]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_dict({"image": cells, "text": list("abc")}, features).save_to_disk(tmp_path / "saved")
    rows = load_rows(make_args(dataset_name=str(tmp_path / "saved")))
    sample = PromptImageDataset(rows, one_size(), True, False, 3, always)[0, 0, 0]
    origin = f"of --dataset_name {tmp_path / 'saved'})"
    assert sample["row"] == 2 and sample["unreadable"] == [
        (f"b.png (row 0 {origin}", "in no format that Pillow reads"), (f"image (row 1 {origin}", "there is no image"),
    ]  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("caption", ["txt", "json.caption", "json.more.captions"])
def test_webdataset(caption, streaming, tmp_path):
    """Tar files of .jpg with .txt or .json; some of the latter have other fields, too."""

    def files(row):
        image, text = io.BytesIO(), f"prompt {row}"
        Image.new("RGB", (20, 16), color(row)).save(image, "JPEG", quality=100, subsampling=0)
        yield "jpg", image.getvalue()
        if caption == "txt":
            yield "txt", text.encode()
        else:
            content = {"caption": text, "more": {"captions": [text]}, "width": 20}
            yield "json", json.dumps(content | ({"similarity": 0.3} if row == 5 else {})).encode()

    (tmp_path / "shards").mkdir()
    for shard in range(2):
        with tarfile.open(tmp_path / "shards" / f"{shard:05}.tar", "w") as tar:
            for row in range(3 * shard, 3 * shard + 3):
                for ending, content in files(row):
                    entry = tarfile.TarInfo(f"{row:06}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    args = make_args(
        dataset_name=[str(tmp_path / "shards")], image_column="jpg", caption_column=caption, streaming=streaming
    )
    for prompts_only in ({}, PROMPTS_ONLY):
        alone = changed(args, **prompts_only)
        rows = pickle.loads(pickle.dumps(load_rows(alone)))
        batches = take(make_dataloader(alone, rows, 0, 1, 0, 0, never if prompts_only else always), 3)
        assert sorted(prompt for batch in batches for prompt in batch["prompts"]) == [f"prompt {r}" for r in range(6)]
    for batch in take(make_dataloader(args, load_rows(args), 0, 1, 0, 0, always), 3):
        for prompt, pixels in zip(batch["prompts"], batch["pixel_values"]):
            found = ((pixels[:, 8, 8] + 1) * 127.5).tolist()
            assert found == pytest.approx(color(int(prompt.split()[1])), abs=2)
    if caption != "txt":
        fix = "give one of jpg, json, json.caption, json.more, json.more.captions, json.width, __key__, __url__"
        refusal(changed(args, caption_column="json.text"), "--caption_column json.text: there is no such column", fix)
        refusal(
            changed(args, caption_column="json"),
            "--caption_column json: row 0",
            "or a field of this one, such as json.caption",
        )


# Bad input -----------------------------------------------------------------------------------------------------------
def text(folder, content, name="bad.json"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def table(folder, **changes):
    return {"dataset_name": write_dataset(folder), **IN_TABLE, **changes}


def column(folder, *cells):
    datasets.Dataset.from_dict({"text": cells}).save_to_disk(folder / "d")
    return dict(dataset_name=str(folder / "d"), **PROMPTS_ONLY)


def without_image(folder, row):
    path = write_json(folder, 12)
    (folder / "images" / f"{row}.png").unlink()
    return path


def csv_files(folder, *names, content="text\na"):
    for name in names:
        text(folder, content, f"{name}.csv")
    return dict(dataset_name=str(folder), **PROMPTS_ONLY)


BAD = {  # name: (arguments, part of the message, the flag it names if not the data set's)
    "none": (lambda f: {}, "--dataset_json, --dataset_name, --train_data_dir, --prompts_file, --dataset_lmdb"),
    "no json": (lambda f: dict(dataset_json=str(f / "none.json")), "No such file"),
    "cut json": (lambda f: dict(dataset_json=text(f, '{"keys": [1,\n 2')), "JSONDecodeError"),
    "binary json": (lambda f: dict(dataset_json=text(f, b"\xff\xfe\x00")), "UnicodeDecodeError"),
    "list json": (lambda f: dict(dataset_json=text(f, "[1]")), 'give {"image_paths": [...], '),
    "missing key": (lambda f: dict(dataset_json=text(f, '{"keys": [1], "image_paths": ["a"]}')), "'prompts'"),
    "lengths": (lambda f: dict(dataset_json=write_json(f, prompts=["a"] * 5)), "5 prompts, 6 image_paths"),
    "no rows": (lambda f: dict(dataset_json=write_json(f, 0)), "0 prompts, 0 image_paths"),
    "number as prompt": (lambda f: dict(dataset_json=write_json(f, 2, prompts=["a", 3])), "row 1 holds 3, not a"),
    "null as prompt": (lambda f: dict(dataset_json=write_json(f, 2, prompts=["a", None])), "row 1 holds None, not a"),
    "number as path": (lambda f: dict(dataset_json=write_json(f, 2, image_paths=["a", 3])), "cannot be read"),
    "half a character": (lambda f: dict(dataset_json=write_json(f, 2, prompts=["a", "\ud83d"])), "row 1 holds '\\ud8"),
    "missing image": (lambda f: dict(dataset_json=without_image(f, 9)), "1 of 12 images looked at are missing"),
    "no prompts file": (lambda f: dict(prompts_file=str(f / "p.txt"), **PROMPTS_ONLY), "No such file"),
    "empty prompts": (lambda f: dict(prompts_file=text(f, " \n\n"), **PROMPTS_ONLY), "empty"),
    "prompts and GAN": (lambda f: dict(prompts_file=text(f, "a"), backward_simulation_prob=1.0), "--gan_weight 0"),
    "prompts and latents": (lambda f: dict(prompts_file=text(f, "a"), gan_weight=0.0), "--backward_simulation_prob 1"),
    "no local data set": (lambda f: dict(dataset_name=str(f / "gone")), "find any data file"),
    "no split train": (lambda f: csv_files(f, "cats", "test"), "train"),
    "no image column": (lambda f: table(f, image_column="img"), "image, caption, number", "image_column"),
    "image column": (lambda f: table(f, image_column="number"), "Value('int64')", "image_column"),
    "no caption column": (lambda f: table(f, caption_column="txt"), "image, caption, number", "caption_column"),
    "numbers": (lambda f: table(f, caption_column="number"), "row 0 of --dataset_name", "caption_column"),
    "images": (lambda f: table(f, caption_column="image"), "row 0 of --dataset_name", "caption_column"),
    "captions missing": (lambda f: table(f, caption_column="sparse"), "--caption_column sparse: row 1 holds None"),
    "lists of numbers": (lambda f: column(f, [0.5], []), "holds [0.5], not a caption"),
    "lists of lists": (lambda f: column(f, [["a"]], []), "holds [['a']], not a caption"),
    "null in a list": (lambda f: column(f, ["a"], ["b", None]), "row 1 holds ['b', None]"),
    "an empty list": (lambda f: column(f, ["a"], []), "row 1 holds []"),
    "no list": (lambda f: column(f, ["a"], None), "row 1 holds None"),
    "an empty table": (lambda f: csv_files(f, "train", content="text\n"), "corresponds to no data"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_flag_value_and_fix(case, tmp_path):
    arguments, part, *named = BAD[case]
    changes = arguments(tmp_path)
    flags = named or [flag for flag in READERS if flag in changes]
    refusal(make_args(**changes), part, *[f"--{flag} {changes[flag]}" for flag in flags])


def test_a_missing_image_may_lie_anywhere(tmp_path):
    paths = [f"{row}.png" for row in range(3000)]
    for path in paths[:1000]:
        (tmp_path / path).touch()
    content = {"keys": paths, "image_paths": paths, "prompts": paths}
    args = make_args(dataset_json=text(tmp_path, json.dumps(content)))
    assert refusal(args, "images looked at are missing") == refusal(args)
    # Rows that are cut off, and images that are never read, need not be there.
    assert len(load_rows(changed(args, max_train_samples=1000))) == 1000
    assert len(load_rows(changed(args, **PROMPTS_ONLY))) == 3000
    # The first rows are always looked at.
    (tmp_path / paths[1]).unlink()
    refusal(changed(args, max_train_samples=1000), "1 of ", f"missing, one is {tmp_path / '1.png'}")


def test_a_gated_data_set_is_not_called_a_typo(monkeypatch):
    def gated(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'some/data' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    refusal(make_args(dataset_name="some/data"), "some/data: cannot be loaded ", "is a gated", "accept its license")


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    """No process may make folders in /sys/kernel."""
    monkeypatch.setattr(constants, "HF_HOME", "/sys/kernel")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/sys/kernel/datasets")
    args = make_args(dataset_name=write_folder(tmp_path / "a"))
    with pytest.raises(
        UserError, match=f"^--dataset_name {tmp_path}/a: /sys/kernel/datasets cannot be .*: set HF_HOME"
    ):
        load_rows(args)
    args = make_args(dataset_json=write_json(tmp_path))
    refusal(args, f"--dataset_json {args.dataset_json}: /sys/kernel/datasets/senseflow cannot be ", "; set HF_HOME to")


# Large files ---------------------------------------------------------------------------------------------------------
def private_memory() -> float:
    """In MB; pages of mapped files are the system's cache, which processes share."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def load_with_others(args, barrier, queue):
    barrier.wait()
    before = private_memory()
    rows = load_rows(args)
    captions = [rows.captions(row) for row in range(0, 100_000, 100)]
    queue.put((private_memory() - before, len(pickle.dumps(rows)), rows.fingerprint, captions[-1]))


def test_one_process_reads_a_json_file_and_the_others_map_what_it_wrote(tmp_path, monkeypatch):
    """As lists, these rows take 40 MB."""
    prompts = [
        f"a caption of many words, such as the number {row} and the colors of {row + 1}" for row in range(100_000)
    ]
    prompts[99_900] = ["one", "two"]
    content = {"image_paths": [f"images/{row}.jpg" for row in range(100_000)], "prompts": prompts}
    args = make_args(dataset_json=text(tmp_path, json.dumps(content)), **PROMPTS_ONLY)
    context = multiprocessing.get_context("fork")
    readers, results, barrier = context.SimpleQueue(), context.SimpleQueue(), context.Barrier(3)
    load = json.load
    monkeypatch.setattr(json, "load", lambda file: readers.put(os.getpid()) or load(file))
    processes = [context.Process(target=load_with_others, args=(args, barrier, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = sorted(results.get() for _ in processes)
    for process in processes:
        process.join()
    assert readers.get() in [process.pid for process in processes] and readers.empty()
    assert len({fingerprint for *_, fingerprint, _ in found}) == 1 and {str(last) for *_, last in found} == {
        "['one', 'two']"
    }
    assert found[1][0] < 8, found  # a copy of the table would be 12 MB
    assert all(pickled < 10_000 for _, pickled, *_ in found)  # what a spawned worker gets


def test_a_json_file_is_read_again_when_its_content_changes(tmp_path):
    """Not when it is as old and as large."""
    args = make_args(dataset_json=write_json(tmp_path, 6))
    stat = os.stat(args.dataset_json)
    first = load_rows(args)
    write_json(tmp_path, 6, prompts=[f"prompt {5 - row}" for row in range(6)])
    os.utime(args.dataset_json, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert os.stat(args.dataset_json).st_size == stat.st_size
    second = load_rows(args)
    assert all_captions(second) == all_captions(first)[::-1] and second.fingerprint != first.fingerprint
    tables = list((tmp_path / "cache" / "senseflow").glob("*.arrow"))
    assert len(tables) == 2
    for table in tables:
        table.write_bytes(b"")
    refusal(args, f"--dataset_json {args.dataset_json}: {tmp_path}/cache/senseflow/", " is damaged ", "; delete it: ")


def test_a_hash_does_not_depend_on_the_batches_that_it_is_computed_in(tmp_path, monkeypatch):
    prompts = ["a", "b", ["c", "d"], "e", "f", ["g"]]
    args = make_args(dataset_json=write_json(tmp_path, prompts=prompts))
    listed = make_args(train_data_dir=None, prompts_file=text(tmp_path, "a\nb\nc", "p.txt"), **PROMPTS_ONLY)
    found = [(load_rows(args).fingerprint, load_rows(listed).fingerprint)]
    expected = hashlib.sha256("".join(f"\0{caption}\0" for caption in "abc").encode()).hexdigest()[:12]
    assert found[0][1] == f"3 rows, hash {expected}"
    monkeypatch.setattr(rows_module, "BATCH_ROWS", 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    found.append((load_rows(args).fingerprint, load_rows(listed).fingerprint))
    assert found[0] == found[1] and all_captions(load_rows(args)) == [["a"], ["b"], ["c", "d"], ["e"], ["f"], ["g"]]
