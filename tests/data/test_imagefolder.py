# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Folders of images: every row is used or named in the log; captions from metadata files and from .txt files."""

import json
import logging
from collections import Counter

import datasets
import pyarrow as pa
import pytest
from PIL import Image
from test_sources import PROMPTS_ONLY, always, changed, make_args, take

from senseflow.data.captions import draw_caption, first_empty
from senseflow.data.sources import check_data_args, load_rows, make_dataloader
from senseflow.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(root, files):
    """{path: what a file holds}: an image's color, a table's lines, any text."""
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (16, 16), content).save(file)
        else:
            file.write_text(
                content if isinstance(content, str) else "\n".join(map(json.dumps, content)), encoding="utf-8"
            )
    return str(root)


def listed(folder, *names):
    """Images, and a metadata.jsonl that gives each its path for a caption."""
    images = {f"{folder}{name}": (10, 20, 30) for name in names}
    return images | {f"{folder}metadata.jsonl": [{"file_name": name, "text": f"{folder}{name}"} for name in names]}


def captioned(*paths):
    """Images with a .txt each that holds its path."""
    return {path: (10, 20, 30) for path in paths} | {path.rsplit(".", 1)[0] + ".txt": path for path in paths}


FOUR = ("a.png", "b.png", "c.png", "d.png")
SPLITS = {  # name: (files, captions used, what the log says of the others)
    "folders called like splits": (
        listed("cats/", *FOUR) | listed("dogs/", *FOUR) | listed("test/", *FOUR),
        [f"{folder}/{name}" for folder in ("cats", "dogs", "test") for name in FOUR], "",
    ),
    "a file called like a split": (listed("", "a.png", "my_test_shot.png"), ["a.png", "my_test_shot.png"], ""),
    "dev and val": (captioned("dev/a.png", "val-1/b.png", "c.png"), ["dev/a.png", "val-1/b.png", "c.png"], ""),
    "a deliberate split": (
        listed("train/", *FOUR) | listed("test/", "e.png"), [f"train/{name}" for name in FOUR], "left aside: 1, one",
    ),
    "train in the metadata": (listed("", "train/a.png", "test/b.png"), ["train/a.png", "test/b.png"], ""),
    "train below": (captioned("cats/train/a.png", "dogs/b.png"), ["cats/train/a.png", "dogs/b.png"], ""),
    "not listed": (listed("", *FOUR) | {"e.png": (0, 0, 0)}, list(FOUR), "no metadata file lists are left aside: 1, one is "),
    "an archive": (captioned("a.png") | {"b.zip": "?"}, ["a.png"], "b.zip; unpack them"),
    "hidden": (captioned("a.png") | {".b.png": (0, 0, 0), "__MACOSX/c.png": (0, 0, 0)}, ["a.png"], ""),
    "captions with images of their own": (captioned("a.jpg", "a.b.webp"), ["a.b.webp", "a.jpg"], ""),
}  # fmt: skip


@pytest.mark.parametrize(
    "flags", [{}, {"streaming": True}, {"by": "dataset_name"}, {"by": "dataset_name", "streaming": True}]
)
@pytest.mark.parametrize("case", SPLITS)
def test_every_row_is_used_or_said_to_be_left_aside(case, flags, tmp_path, caplog):
    files, captions, says = SPLITS[case]
    source = {flags.get("by", "train_data_dir"): write(tmp_path / "d", files)}
    args = make_args(**source, streaming=flags.get("streaming", False), train_batch_size=1)
    rows = load_rows(args, check_data_args(args))
    with caplog.at_level(logging.INFO):
        batches = take(make_dataloader(args, rows, 0, 1, 0, 0, always), len(captions))
    assert sorted(batch["prompts"][0] for batch in batches) == sorted(captions)
    assert not any(batch["unreadable"] for batch in batches)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "senseflow.data.sources"]
    assert line.startswith(f"--{next(iter(source))} {tmp_path / 'd'}: {len(captions)} rows")
    assert says in line if says else line.endswith(" rows")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_dataloader(args, rows, 1, 2, 0, 0, always)
    assert not caplog.records  # rank 0 alone says it


def test_a_link_that_leads_back_adds_no_rows(tmp_path):
    args = make_args(train_data_dir=write(tmp_path / "d", captioned("a/a.png")))
    (tmp_path / "d" / "a" / "back").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "b").symlink_to(tmp_path / "elsewhere")
    write(tmp_path / "elsewhere", captioned("b.png"))
    rows = load_rows(args)
    assert [rows.captions(row) for row in range(len(rows))] == [["a/a.png"], ["b.png"]]


def table_files(*names):
    return {f"{name}.csv": f"text\n{name}" for name in names}


def test_files_of_a_table_that_datasets_passes_over_are_named(tmp_path, caplog):
    for number, (names, says) in enumerate([
        (("cats", "test"), "files in no split, by their names, are left aside: 1 of 2"),
        (("train", "test"), "split train is used, not test"),
        (("cats", "dogs"), ""),
    ]):  # fmt: skip
        args = make_args(dataset_name=write(tmp_path / str(number), table_files(*names)), **PROMPTS_ONLY)
        for streaming in (False, True):
            args = changed(args, streaming=streaming)
            caplog.clear()
            with caplog.at_level(logging.INFO):
                make_dataloader(args, load_rows(args), 0, 1, 0, 0, always)
            (line,) = [record.getMessage() for record in caplog.records if record.name == "senseflow.data.sources"]
            count = 1 if says else 2
            assert f": {count} {'files' if streaming else 'rows'}" in line
            assert says in line if says else "(" not in line


@pytest.mark.parametrize("name", ["a [1]", "b::c", "what?", "*", "zip::file"])
def test_folders_may_be_called_anything(name, tmp_path):
    for flag in ("train_data_dir", "dataset_name"):
        args = make_args(**{flag: write(tmp_path / name / flag, captioned("[x]/a::b.png", "c.png"))})
        rows = load_rows(args, check_data_args(args))
        assert [rows.captions(row) for row in range(2)] == [["[x]/a::b.png"], ["c.png"]]
        assert all(rows.read(row)[1] is not None for row in range(2))
    # datasets cannot look into such folders for tables, nor into the latter ones at all.
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "saved")
    saved, table = (
        (tmp_path / "saved").rename(tmp_path / name / "saved"),
        write(tmp_path / name / "table", table_files("a")),
    )
    for path, works in ((str(saved), "::" not in name), (table, False)):
        args = make_args(dataset_name=path, **PROMPTS_ONLY)
        if works:
            assert len(load_rows(args, check_data_args(args))) == 1
            continue
        with pytest.raises(UserError, match="in the name of a folder .* rename the folder") as caught:
            load_rows(args, check_data_args(args))
        assert caught.value.exit_code == 2 and f"--dataset_name {path}" in str(caught.value)


# Captions ----------------------------------------------------------------------------------------------------------------
def csv_file(*rows, head="file_name,text"):
    return {"a.png": (0, 0, 0), "b.png": (0, 0, 0), "metadata.csv": "\n".join([head, *rows])}


def json_file(*captions):
    entries = [{"file_name": name, "text": caption} for name, caption in zip(FOUR, captions)]
    return {name: (0, 0, 0) for name in FOUR[: len(captions)]} | {"metadata.jsonl": entries}


WORDS = {
    "words for nothing": (csv_file("a.png,None", "b.png,NA"), [["None"], ["NA"]]),
    "null": (csv_file("a.png,null", "b.png,nan"), [["null"], ["nan"]]),
    "a number among words": (
        csv_file("a.png,7", 'b.png,"a ""red"", cube\nand more"'),
        [["7"], ['a "red", cube\nand more']],
    ),
    "lists": (json_file(["a", "b"], ["c"]), [["a", "b"], ["c"]]),
    "a list among strings": (json_file("a", ["b", "c"]), [["a"], ["b", "c"]]),
    "lines": ({"a.png": (0, 0, 0), "a.txt": "\ufeffred\r\n\n green \n"}, [["red", "green"]]),
}


@pytest.mark.parametrize("case", WORDS)
def test_captions_are_read_as_they_were_written(case, tmp_path):
    files, captions = WORDS[case]
    args = make_args(train_data_dir=write(tmp_path / "d", files))
    rows = load_rows(args, check_data_args(args))
    assert [rows.captions(row) for row in range(len(rows))] == captions


def list_sources(folder):
    """The same lists of captions in every kind of data set that may have them."""
    captions = [["a", "b", "c", "d"], ["e"], ["f", "g"]]
    write(folder / "txt", {"a.png": (0, 0, 0)} | {"a.txt": "a\nb\nc\nd", "b.png": (0, 0, 0), "b.txt": "e"})
    write(folder / "txt", {"c.png": (0, 0, 0), "c.txt": "f\ng"})
    write(folder / "json", json_file(*captions))
    paths = [str(folder / "json" / name) for name in FOUR[:3]]
    (folder / "data.json").write_text(json.dumps({"keys": paths, "image_paths": paths, "prompts": captions}))
    table = datasets.Dataset.from_dict({"image": paths, "text": captions}).cast_column("image", datasets.Image())
    (folder / "table").mkdir()
    table.to_parquet(folder / "table" / "a.parquet")
    return {
        "txt": dict(train_data_dir=str(folder / "txt")), "jsonl": dict(train_data_dir=str(folder / "json")),
        "json": dict(dataset_json=str(folder / "data.json")), "parquet": dict(dataset_name=str(folder / "table")),
        "stream": dict(dataset_name=str(folder / "table"), streaming=True),
    }  # fmt: skip


def test_one_of_a_list_of_captions_is_drawn_by_iteration_and_slot(tmp_path):
    found = {}
    for kind, source in list_sources(tmp_path).items():
        args = make_args(**source, train_batch_size=3)
        rows = load_rows(args, check_data_args(args))
        batches = take(make_dataloader(args, rows, 0, 1, 0, 0, always), 60)
        for batch in batches:
            assert isinstance(batch["prompts"], tuple)
            groups = sorted("aaaabcc"["abcdefg".index(prompt)] for prompt in batch["prompts"])
            assert groups == ["a", "b", "c"]  # one of each row
        found[kind] = [batch["prompts"] for batch in batches]
        counts = Counter(prompt for prompts in found[kind] for prompt in prompts)
        assert set(counts) == set("abcdefg") and all(counts[prompt] < 30 for prompt in "abcd") and counts["e"] == 60
        if kind != "stream":
            later = take(make_dataloader(args, rows, 0, 1, 7, 21, always), 5)
            assert [batch["prompts"] for batch in later] == found[kind][7:12]
    assert found["txt"] == found["jsonl"] == found["json"] == found["parquet"]


def test_each_slot_draws_its_own_caption_and_every_part_of_a_column_is_looked_at():
    assert {draw_caption("abcd", 3, 0, sample_index) for sample_index in range(40)} == set("abcd")
    strings, lists = (
        pa.chunked_array([["a", "b"], ["c"], ["d", None]]),
        pa.chunked_array([[["a"]], [["b"], ["c", None]], [None]]),
    )
    assert (first_empty(strings), first_empty(lists), first_empty(strings[:4])) == (4, 2, None)


BAD = {  # name: (files, changed arguments, parts of the message)
    "empty cell": (csv_file("a.png,red", "b.png,"), {}, ["--caption_column text", "is empty in row 1 (b.png) of ", "metadata.csv"]),
    "null": (json_file("a", None), {}, ["is empty in row 1 (b.png) of ", "metadata.jsonl"]),
    "empty list": (json_file(["a"], []), {}, ["is empty in row 1 (b.png) of "]),
    "gap in a list": (json_file(["a"], ["b", None]), {}, ["is empty in row 1 (b.png) of "]),
    "numbers": (json_file("a", 7), {}, ["holds int 7 in row 1 (b.png) of ", "a string or a list of strings"]),
    "lists of numbers": (json_file([1, 2]), {}, ["holds int 1 in row 0 (a.png) of "]),
    "numbers of a CSV": (csv_file("a.png,1", "b.png,2.5"), {}, ["--caption_column text", "holds float 1.0 in row 0 (a.png)"]),
    "no such column": (csv_file("a.png,x"), {"caption_column": "caption"}, ["--caption_column caption", "columns: image, text"]),
    "no file_name": (csv_file("x,y", head="name,text"), {}, ["has no column file_name", "columns: name, text"]),
    "no such image column": (csv_file("a.png,x"), {"image_column": "photo"}, ["--image_column photo", "columns: image, text"]),
    "uneven": (csv_file("a.png,a red, cube"), {}, ["metadata.csv cannot be read (row 0 has not as many cells"]),
    "no JSON": (json_file("a") | {"metadata.jsonl": '{"file_name": '}, {}, ["metadata.jsonl cannot be read"]),
    "outside": (csv_file("../d/a.png,x"), {}, ["file_name ../d/a.png in row 0 of ", "leads out of"]),
    "gone": (csv_file("a.png,x", "c.png,y"), {}, ["1 of 2 images are missing, the first is that of row 1 (c.png) of "]),
    "two tables": (csv_file("a.png,x") | json_file("y"), {}, ["two metadata files in one folder"]),
    "empty table": (csv_file(), {}, ["has no rows"]),
    "no caption file": ({"a.png": (0, 0, 0)}, {}, ["has no captions", "or a .txt beside each image"]),
    "no .txt": (captioned("x/a.png") | {"x/b.png": (0, 0, 0)}, {}, ["1 of 2 images have no .txt", "the first is ", "x/b.png"]),
    "empty .txt": (captioned("a.png", "b.png") | {"b.txt": " \n"}, {}, ["--caption_column text", "is empty in ", "b.txt"]),
    "another column than .txt": (captioned("a.png"), {"caption_column": "caption"}, ["where --caption_column caption could stand"]),
    "no images": ({"a.txt": "a"}, {}, ["has no images"]),
    "only an archive": ({"a.zip": "a"}, {}, ["has no images", "a.zip; unpack them"]),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_one_line_with_row_and_file(case, streaming, tmp_path):
    files, changes, says = BAD[case]
    args = make_args(train_data_dir=write(tmp_path / "d", files), streaming=streaming, **changes)
    with pytest.raises(UserError) as caught:
        load_rows(args, check_data_args(args))
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message and f"--train_data_dir {tmp_path / 'd'}" in message
    assert all(part in message for part in says), message


def test_what_is_not_read_need_not_be_there(tmp_path):
    args = make_args(train_data_dir=write(tmp_path / "d", csv_file("a.png,x", "c.png,y")))
    assert len(load_rows(changed(args, max_train_samples=1))) == 1
    alone = load_rows(changed(args, image_column="nowhere", **PROMPTS_ONLY))
    assert len(alone) == 2 and alone.images is None and alone.captions(1) == ["y"]


TABLES = {  # name: (a column, what the message says)
    "numbers": ([1, 2], "holds numbers (int64), not strings"),
    "lists of numbers": ([[0.5], []], "holds lists of numbers (float64), not strings"),
    "lists of lists": ([[["a"]], []], "holds lists of lists, not strings"),
    "objects": ([{"a": "b"}, {"a": "c"}], "holds objects, not strings"),
    "null in a list": ([["a"], ["b", None]], "is empty in row 1 of"),
    "an empty list": ([["a"], []], "is empty in row 1 of"),
    "no list": ([["a"], None], "is empty in row 1 of"),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_column_that_is_no_captions_is_called_what_it_is(case, tmp_path):
    column, says = TABLES[case]
    datasets.Dataset.from_dict({"text": column}).save_to_disk(tmp_path / "d")
    args = make_args(dataset_name=str(tmp_path / "d"), **PROMPTS_ONLY)
    with pytest.raises(UserError, match="--caption_column text: ") as caught:
        load_rows(args, check_data_args(args))
    assert says in str(caught.value) and caught.value.exit_code == 2
