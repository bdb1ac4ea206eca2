# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""--train_data_dir: every image below it is a row or named in the log; captions from metadata files and .txt files."""

import json
import logging
import os
import pickle
from collections import Counter

import datasets
import pytest
from data_sets import PROMPTS_ONLY, all_captions, always, changed, make_args, refusal, take
from PIL import Image

from senseflow.data.loader import draw_caption, make_dataloader
from senseflow.data.sources import load_rows


def write(root, files):
    """Write files by path: an image of a color, the lines of a table, or text."""
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, tuple):
            Image.new("RGB", (16, 16), content).save(file)
        else:
            text = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
            file.write_text(text, encoding="utf-8")
    return str(root)


def listed(folder, *names):
    """Images, and a metadata.jsonl that gives each its path as caption."""
    images = {f"{folder}{name}": (10, 20, 30) for name in names}
    return images | {f"{folder}metadata.jsonl": [{"file_name": name, "text": f"{folder}{name}"} for name in names]}


def captioned(*paths):
    """Images with a .txt each that holds its path."""
    return {path: (10, 20, 30) for path in paths} | {path.rsplit(".", 1)[0] + ".txt": path for path in paths}


FORMATS = ("a.avif", "b.bmp", "c.gif", "d.jp2", "e.jpeg", "f.JPG", "g.PNG", "h.qoi", "i.tiff", "j.webp")
FOUR = ("a.png", "b.png", "c.png", "d.png")
FOLDERS = {  # name: (files, captions used, what the log adds to the number of rows)
    "folders called like splits": (
        listed("cats/", *FOUR) | listed("train/", *FOUR) | listed("test/", *FOUR),
        [f"{folder}/{name}" for folder in ("cats", "train", "test") for name in FOUR],
        "",
    ),
    "a file called like a split": (listed("", "a.png", "my_test_shot.png"), ["a.png", "my_test_shot.png"], ""),
    "dev and val": (captioned("dev/a.png", "val-1/b.png", "c.png"), ["dev/a.png", "val-1/b.png", "c.png"], ""),
    "not listed": (
        listed("", *FOUR) | {"e.png": (0, 0, 0)},
        list(FOUR),
        "; not used: 1 .png; images in no metadata file: 1, one is ",
    ),
    "hidden": (
        captioned("a.png") | {".b.png": (0, 0, 0), "._a.png": "x", ".DS_Store": "x", "__MACOSX/c.png": (0, 0, 0)},
        ["a.png"],
        "",
    ),
    "every format": (captioned(*FORMATS), list(FORMATS), ""),
    "no format": (
        captioned("a.png") | {name: "x" for name in ("b.heic", "b.txt", "c.MP4", "d.mp4", "e.txt", "f.h5", "LICENSE")},
        ["a.png"],
        "; not used: 2 .txt, 2 .mp4, 1 without an ending, 1 .heic, 1 .h5; files with captions that Pillow cannot "
        "open: 1, one is ",
    ),
    "two images, two captions": (captioned("a.jpg", "a.b.webp"), ["a.b.webp", "a.jpg"], ""),
    "names like globs": (captioned("[x]/a::b.png", "what?/*.png"), ["[x]/a::b.png", "what?/*.png"], ""),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_every_image_is_used_or_named_in_the_log(case, tmp_path, caplog):
    files, captions, note = FOLDERS[case]
    args = make_args(train_data_dir=write(tmp_path / "zip::d [1]", files), train_batch_size=1)
    rows = load_rows(args)
    with caplog.at_level(logging.INFO):
        batches = take(make_dataloader(args, rows, 0, 1, 0, 0, always), len(captions))
    assert sorted(batch["prompts"][0] for batch in batches) == sorted(captions)
    assert not any(batch["unreadable"] for batch in batches)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "senseflow.data.loader"]
    assert line.startswith(f"--train_data_dir {args.train_data_dir}: {len(captions)} rows")
    assert note in line if note else line.endswith(" rows")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        make_dataloader(args, rows, 1, 2, 0, 0, always)
    assert not caplog.records  # rank 0 alone logs it


def test_links_are_followed(tmp_path):
    args = make_args(train_data_dir=write(tmp_path / "d", captioned("a/a.png")))
    write(tmp_path / "elsewhere", captioned("b.png"))
    (tmp_path / "d" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "a" / "up").symlink_to(tmp_path / "d")  # each image is read once
    assert all_captions(load_rows(args)) == [["a/a.png"], ["b.png"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_names_that_are_not_utf8_are_read(workers, tmp_path):
    folder, name = tmp_path / "d", os.fsdecode(b"caf\xe9")
    args = make_args(train_data_dir=write(folder, captioned("a.png")), dataloader_num_workers=workers)
    (folder / "a.png").rename(folder / f"{name}.png")
    (folder / "a.txt").rename(folder / f"{name}.txt")
    write(folder, captioned("b.png") | {"b.png": "x"})
    rows = pickle.loads(pickle.dumps(load_rows(args)))
    batch = next(iter(make_dataloader(args, rows, 0, 1, 0, 0, always)))
    assert batch["prompts"] == ("a.png", "a.png") and [len(rows), batch["num_replaced"]] == [2, 1]


# Captions ------------------------------------------------------------------------------------------------------------
def csv_file(*rows, head="file_name,text"):
    return {"a.png": (0, 0, 0), "b.png": (0, 0, 0), "metadata.csv": "\n".join([head, *rows])}


def json_file(*captions):
    entries = [{"file_name": name, "text": caption} for name, caption in zip(FOUR, captions)]
    return {name: (0, 0, 0) for name in FOUR[: len(captions)]} | {"metadata.jsonl": entries}


CAPTIONS = {
    "words like missing values": (csv_file("a.png,None", "b.png,nan"), [["None"], ["nan"]]),
    "numbers and quotes": (
        csv_file("a.png,7", 'b.png,"a ""red"", cube\nand more"'),
        [["7"], ['a "red", cube\nand more']],
    ),
    "lists": (json_file(["a", "b"], ["c"]), [["a", "b"], ["c"]]),
    "a list among strings": (json_file("a", ["b", "c"]), [["a"], ["b", "c"]]),
    "lines": ({"a.png": (0, 0, 0), "a.txt": "\ufeffred\r\n\n gre\u2028e\rn \n"}, [["red", "gre\u2028e\rn"]]),
    "lines of JSON": (
        {"a.png": (0, 0, 0), "metadata.jsonl": '{"file_name": "a.png",\r "text": "a\u2028\x85b"}\r\n\r\n'},
        [["a\u2028\x85b"]],
    ),
}


@pytest.mark.parametrize("case", CAPTIONS)
def test_captions_are_read_as_they_were_written(case, tmp_path):
    files, captions = CAPTIONS[case]
    assert all_captions(load_rows(make_args(train_data_dir=write(tmp_path / "d", files)))) == captions


def list_sources(folder):
    """The same lists of captions in every source that may have them."""
    captions = [["a", "b", "c", "d"], ["e"], ["f", "g"]]
    texts = {f"{name[0]}.txt": "\n".join(lines) for name, lines in zip(FOUR, captions)}
    write(folder / "txt", {name: (0, 0, 0) for name in FOUR[:3]} | texts)
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


def test_one_of_a_list_of_captions_is_drawn_by_iteration_and_sample(tmp_path):
    drawn = {}
    for source, flags in list_sources(tmp_path).items():
        args = make_args(**flags, train_batch_size=3)
        rows = load_rows(args)
        drawn[source] = [batch["prompts"] for batch in take(make_dataloader(args, rows, 0, 1, 0, 0, always), 60)]
        for prompts in drawn[source]:
            assert isinstance(prompts, tuple)
            assert sorted("aaaabcc"["abcdefg".index(prompt)] for prompt in prompts) == ["a", "b", "c"]  # one of a row
        counts = Counter(prompt for prompts in drawn[source] for prompt in prompts)
        assert set(counts) == set("abcdefg") and all(counts[prompt] < 30 for prompt in "abcd") and counts["e"] == 60
        if source != "stream":
            later = take(make_dataloader(args, rows, 0, 1, 7, 21, always), 5)
            assert [batch["prompts"] for batch in later] == drawn[source][7:12]
    assert drawn["txt"] == drawn["jsonl"] == drawn["json"] == drawn["parquet"]
    assert {draw_caption("abcd", 3, 0, sample_index) for sample_index in range(40)} == set("abcd")


BAD = {  # name: (files, changed arguments, parts of the message)
    "empty cell": (csv_file("a.png,red", "b.png,"), {}, ["row 1 has no text, its columns", "metadata.csv"]),
    "null": (json_file("a", None), {}, ["row 1 has no text", "metadata.jsonl"]),
    "two tables": (csv_file("a.png,x") | json_file("a"), {}, ["metadata.csv and ", "metadata.jsonl are both there"]),
    "empty list": (json_file(["a"], []), {}, ["d/b.png holds []"]),
    "gap in a list": (json_file(["a"], ["b", None]), {}, ["d/b.png holds ['b', None]"]),
    "half a character": (json_file("a", "\ud83d"), {}, ["d/b.png holds '\\ud83d', which is no valid Unicode"]),
    "numbers": (json_file("a", 7), {}, ["d/b.png holds 7, not a caption or a list of captions"]),
    "lists of numbers": (json_file([1, 2]), {}, ["d/a.png holds [1, 2]"]),
    "no such column": (csv_file("a.png,x"), {"caption_column": "c"}, ["has no c, its columns are file_name, text"]),
    "no file_name": (csv_file("x,y", head="name,text"), {}, ["has no file_name, its columns are name, text"]),
    "uneven": (csv_file("a.png,a red, cube"), {}, ["metadata.csv", "row 0 has more cells", "quote captions"]),
    "no JSON": (json_file("a") | {"metadata.jsonl": '{"file_name": '}, {}, ["metadata.jsonl cannot be read"]),
    "a path as number": (
        json_file("a") | {"metadata.jsonl": [{"file_name": 7, "text": "a"}]},
        {},
        ["row 0 is 7, not"],
    ),
    "no object": (json_file("a") | {"metadata.jsonl": "[1]"}, {}, ["row 0 is [1], not an object"]),
    "numbers in CSV": (csv_file("a.png,0.5", "b.png,2e-3"), {}, ["the column text holds numbers, not captions"]),
    "gone": (csv_file("a.png,x", "c.png,y"), {}, ["1 of 2 images are missing", "d/c.png"]),
    "empty table": (csv_file(), {}, ["metadata files are empty"]),
    "no caption file": ({"a.png": (0, 0, 0)}, {}, ["a.png cannot be read", "or a UTF-8 .txt beside each image"]),
    "empty .txt": (captioned("a.png", "b.png") | {"b.txt": " \n"}, {}, ["b.png holds [], not a caption"]),
    "no images": ({"a.txt": "a", "a.heic": "a"}, {}, ["there are no images that Pillow opens, but 1 .heic, 1 .txt"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_one_line_with_row_and_file(case, tmp_path):
    files, changes, parts = BAD[case]
    args = make_args(train_data_dir=write(tmp_path / "d", files), **changes)
    refusal(args, f"--train_data_dir {args.train_data_dir}", *parts)
    refusal(changed(args, train_data_dir=str(tmp_path / "gone")), "gone: there are no images")


def test_what_is_not_read_need_not_be_there(tmp_path):
    args = make_args(train_data_dir=write(tmp_path / "d", csv_file("a.png,x", "c.png,y")))
    assert len(load_rows(changed(args, max_train_samples=1))) == 1
    assert all_captions(load_rows(changed(args, **PROMPTS_ONLY))) == [["x"], ["y"]]
