"""README.md and docs/: every command block runs on tiny pipelines or is listed below; flags, links and paths exist."""

import argparse
import ast
import importlib
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, Dinov2Model

import tiny_pipelines
from helpers import card_code


ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = (
    "train_senseflow_flux",
    "train_senseflow_sd3",
    "train_senseflow_sdxl",
    "train_dmd2_sdxl",
    "infer",
    "evaluate",
)
LANGUAGES = {"bash": True, "python": True, "json": True, "text": False, "bibtex": False}  # {language: whether it runs}

# Blocks that do not run here: {(document, how the block starts): why}. The flags in them are still checked.
NOT_RUN = {
    ("README.md", "pip install -r requirements.txt"): "installs packages",
    ("README.md", "make demo"): "three minutes, and the tests themselves; the targets are checked below",
    ("memory.md", "WORLD_SIZE=64 ACCELERATE_USE_FSDP=true"): (
        "a process of its own for half a minute; the tests of the dry run start it in these environments"
    ),
    ("memory.md", "accelerate launch --config_file accelerate_configs/fsdp2_2nodes.yaml"): (
        "two nodes; test_modes.py runs this configuration as two launches"
    ),
    ("export.md", "python -m senseflow.convert_lora"): "tests/test_convert_lora.py runs it, with another name",
    ("lora.md", "python -m senseflow.merge_lora"): "tests/test_convert_lora.py runs it, with other names",
    ("checkpoints.md", "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT"): "an environment variable of the launcher alone",
    ("teachers.md", "python teachers/"): "tests/test_teachers_train.py trains every file",
    ("new_teacher.md", "from helpers import built"): "a template; the tests of the three scripts run it in full",
}
# Flags of other programs, by the program.
OTHER_FLAGS = {
    "accelerate launch": {"config_file", "num_processes", "machine_rank", "main_process_ip", "multi_gpu"}
    | {"dynamo_backend", "dynamo_mode", "dynamo_use_dynamic"},
    "senseflow.convert_lora, senseflow.merge_lora": {"to", "dtype"},
    "docker, Slurm": {"memory", "shm-size", "signal"},
}
OTHER_PATHS = {"networks/convert_flux_lora.py", "teachers/train_senseflow_NAME.py"}  # of sd-scripts; a placeholder


# ---------------------------------------------------------------------------------------------------------------------
# Reading the documents
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Block:
    document: str
    language: str
    text: str

    @property
    def not_run(self) -> list[tuple[str, str]]:
        """Its keys in NOT_RUN."""
        return [key for key in NOT_RUN if key[0] == self.document and self.text.startswith(key[1])]


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = document.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert text.count("```") == 2 * len(found), f"{document.name}: a fence that is indented or not closed"
    return [Block(document.name, language, text) for language, text in found]


def commands(text: str) -> list[list[str]]:
    """The command lines of a bash block as words, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def after_script(words: list[str]) -> tuple[list[str], str, list[str]]:
    """(what stands before the script, the script, its arguments) of a command line with a Python script."""
    places = [number for number, word in enumerate(words) if word.endswith(".py")]
    assert places, f"{shlex.join(words)}: runs no script; list its block in NOT_RUN, with the reason"
    place = places[0]
    return words[:place], words[place], words[place + 1 :]


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# Running the blocks
# ---------------------------------------------------------------------------------------------------------------------
class Inception(torch.nn.Module):
    """Stands for the published network: called as it is, on uint8 images."""

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), [4, 4]).flatten(1)


def value_of(arguments: list[str], flag: str) -> str:
    return arguments[arguments.index(flag) + 1] if flag in arguments else ""


class Workspace:
    """A folder in which the documents' commands run, with tiny networks and data in the place of the real ones."""

    def __init__(self, folder: Path, teacher: Path, vision: Path, data: Path, latents: Path):
        self.folder, self.vision, self.ran = folder, vision, set()
        pipelines = {name: folder / "pipelines" / name for name in ("sd3", "sdxl")}
        tiny_pipelines.write_sd3(pipelines["sd3"])
        tiny_pipelines.write_sdxl(pipelines["sdxl"])
        self.stand_ins = {
            "black-forest-labs/FLUX.1-dev": str(teacher),
            "stabilityai/stable-diffusion-3.5-medium": str(pipelines["sd3"]),
            "stabilityai/stable-diffusion-xl-base-1.0": str(pipelines["sdxl"]),
            "data.json": str(data),
            "latents": str(latents),
            "photos": str(folder / "photos"),
            "my-account/my-dataset": str(folder / "saved"),
            "domiso/SenseFlow": "flux-4step",
            "FOLDER": "transformer",
        }
        rows = json.loads(data.read_text())
        files, prompts = [str(data.parent / name) for name in rows["image_paths"]], rows["prompts"]
        columns = datasets.Dataset.from_dict({"image": files, "text": prompts})
        columns.cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
        (folder / "photos").mkdir()
        for number in range(4):
            shutil.copy(files[number], folder / "photos" / f"{number}.png")
            (folder / "photos" / f"{number}.txt").write_text(prompts[number])
        for name in ("prompts.txt", "coco.txt"):
            (folder / name).write_text("a red square\na blue circle\na cat\n")
        for name in ("accelerate_configs", "tests"):
            os.symlink(ROOT / name, folder / name)

    def write_scorers(self) -> list[str]:
        """Flags of evaluate.py for tiny networks."""
        folder = self.folder / "scorers"
        if not folder.exists():
            folder.mkdir()
            torch.jit.script(Inception()).save(folder / "inception.pt")
            tokenizer = tiny_pipelines.clip_tokenizer()
            layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
            config = CLIPConfig(
                text_config=tiny_pipelines.clip_config(tokenizer).to_dict(),
                vision_config=layers | {"patch_size": 16, "image_size": 64},
                projection_dim=16,
            )
            CLIPModel(config).save_pretrained(folder / "clip")
            tokenizer.save_pretrained(folder / "clip")
            Dinov2Model.from_pretrained(self.vision / "dinov2").save_pretrained(folder / "dinov2")
            for name in ("clip", "dinov2"):
                size = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
                CLIPImageProcessorPil(**size).save_pretrained(folder / name)
        networks = {"inception": "inception.pt", "clip_model": "clip", "pickscore_model": "clip"}
        networks |= {"feature_model": "dinov2"}
        flags = [word for flag, name in networks.items() for word in (f"--{flag}", str(folder / name))]
        return [*flags, "--device", "cpu"]

    def run_block(self, block: Block) -> None:
        if block.language == "python":
            self.run_python(block.text)
        elif block.language == "json":
            self.run_json(block.text)
        else:
            for words in commands(block.text):
                self.run(words)

    def run_python(self, text: str) -> None:
        """Code that goes on after that of the adapter's model card, which makes `pipeline`."""
        self.need("flux-4step-lora")
        exec(card_code(self.folder / "flux-4step-lora") + text, {})

    def run_json(self, text: str) -> None:
        """A data set of a training run."""
        rows = json.loads(text)
        for path in rows["image_paths"]:
            (self.folder / path).parent.mkdir(exist_ok=True)
            Image.new("RGB", (80, 64), "red").save(self.folder / path)
        (self.folder / "rows.json").write_text(text)
        teacher = "stabilityai/stable-diffusion-xl-base-1.0"
        command = f"python train_senseflow_sdxl.py --rank 2 --pretrained_model_name_or_path {teacher}"
        self.run([*command.split(), "--dataset_json", str(self.folder / "rows.json"), "--output_dir", "from-rows"])

    def need(self, output: str) -> None:
        """Runs the README's command that makes an output folder, if it is not there yet."""
        if (self.folder / output).exists():
            return
        for block in blocks(README):
            for words in commands(block.text) if block.language == "bash" else []:
                if value_of(words, "--output_dir") == output and "--resume_from_checkpoint" not in words:
                    return self.run(words)

    def run(self, words: list[str]) -> None:
        """Runs one command line in this process, which stands for all that it would launch."""
        before, script, arguments = after_script(words)
        if before[0] == "accelerate":
            config = launch_command_parser().parse_args([*before[2:], script]).config_file
            assert config is None or (self.folder / config).is_file()
        else:
            assert before == ["python"]
        arguments = [self.stand_ins.get(word, word) for word in arguments]
        arguments = [re.sub(r"/checkpoint-\d+$", "/checkpoint-2", word) for word in arguments]
        flags = ("--model", "--images", "--reference", "--checkpoints", "--transformer")
        read = [value_of(arguments, flag) for flag in flags]
        if "--resume_from_checkpoint" in arguments:
            read.append(value_of(arguments, "--output_dir"))
        for path in read:
            if path and not os.path.isabs(path):
                self.need(path.split("/")[0])
        if script == "tests/tiny_pipelines.py":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [script, *arguments])
                return tiny_pipelines.main()
        small = {"infer.py": self.small_infer, "evaluate.py": self.small_evaluate}.get(script, self.small_training)
        arguments = small(arguments, script)
        if (script, *arguments) in self.ran:
            return
        self.ran.add((script, *arguments))
        output = Path(value_of(arguments, "--output_dir") or "outputs")
        continues = {"--resume_from_checkpoint", "--dry_run"} & set(arguments)
        if script.startswith("train_") and output.exists() and not continues:
            shutil.rmtree(output)
        AcceleratorState._reset_state()  # runs of other tests, and later ones, have another precision
        try:
            importlib.import_module(Path(script).stem).main(arguments)
        finally:
            AcceleratorState._reset_state()

    def small_training(self, arguments: list[str], script: str) -> list[str]:
        """A training command of two iterations at 64 px."""
        resumed, own = "--resume_from_checkpoint" in arguments, set(arguments)
        small = {"--resolution": "64", "--max_train_steps": "3" if resumed else "2", "--ttur_ratio": "1"}
        small |= {"--checkpointing_steps": "2"}
        if "sdxl" not in script:
            small["--max_sequence_length"] = "16"
        if "--rank" in own:
            small["--rank"] = "4"
        if "--gradient_accumulation_steps" in own:
            small["--gradient_accumulation_steps"] = "1"
        if "--validation_prompts" in own:
            small |= {"--validation_steps": "2", "--teacher_num_inference_steps": "2"}
        discriminator = {"--discriminator_backbone": "dinov2", "--discriminator_text_encoder": "clip"}
        if "dmd2" not in script and not {"--gan_weight", *discriminator} & own:
            small |= {flag: str(self.vision / name) for flag, name in discriminator.items()}
        return [*arguments, *(word for pair in small.items() for word in pair)]  # the last one counts

    def small_infer(self, arguments: list[str], script: str) -> list[str]:
        size = "304" if value_of(arguments, "--prompts_file") == "coco.txt" else "64"  # a patch has 299 px
        teacher = os.path.isabs(value_of(arguments, "--model"))
        steps = ["--num_inference_steps", "2"] if "--num_inference_steps" in arguments else []
        if teacher or size != "64":
            steps += ["--height", size, "--width", size]
        return [*arguments, *steps]

    def small_evaluate(self, arguments: list[str], script: str) -> list[str]:
        layouts = {"hpsv2", "imagereward"}  # published files, whose layouts tests of their own write
        return [word for word in arguments if word not in layouts] + self.write_scorers()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, teacher, vision, data, lmdb_of_latents):
    return Workspace(tmp_path_factory.mktemp("docs"), teacher, vision, data, lmdb_of_latents)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_blocks_run(document, workspace, monkeypatch):
    monkeypatch.chdir(workspace.folder)
    for block in blocks(document):
        assert block.language in LANGUAGES, (
            f"{document.name}: a block of language {block.language!r}: {block.text[:60]}"
        )
        if LANGUAGES[block.language] and not block.not_run:
            workspace.run_block(block)


def test_blocks_that_do_not_run_are_there():
    listed = [key for document in DOCUMENTS for block in blocks(document) for key in block.not_run]
    missing = set(NOT_RUN) - set(listed)
    assert not missing, f"listed as not run, but in no document: {missing}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for document in DOCUMENTS:
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"


# ---------------------------------------------------------------------------------------------------------------------
# Lines, links, paths, flags, messages
# ---------------------------------------------------------------------------------------------------------------------
def test_length():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 220
    for document in DOCUMENTS:
        lines = document.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 220, document.name
        for number, line in enumerate(lines, 1):
            assert len(line) <= 119 or line.startswith("|") or "://" in line, f"{document.name}:{number}"


def test_only_the_documents_say_what_fits_a_gpu():
    """Comments in the configurations would contradict their tables sooner or later."""
    for file in (ROOT / "accelerate_configs").iterdir():
        assert not re.search(r"\d ?Gi?B", file.read_text()), file.name


def test_readme_has_the_length_and_checkpoints_of_a_default_run():
    rows = re.findall(
        r"^\| ([\w .-]+) \| ([\d,]+) \| ([\d,]+) \|.*\| (\d+) \| \d[\d.]* GiB \|$", README.read_text(), re.MULTILINE
    )
    scripts = {"SDXL": "sdxl", "SD 3.5 Medium": "sd3", "SD 3.5 Large": "sd3", "FLUX.1-dev": "flux"}
    assert [row[0] for row in rows] == list(scripts)
    for name, *numbers in rows:
        module = importlib.import_module(f"train_senseflow_{scripts[name]}")
        args = module.parse_args(["--pretrained_model_name_or_path", "x", "--output_dir", "y"])
        batch = next(cls for cls in vars(module).values() if getattr(cls, "recipe_batch_size", None)).recipe_batch_size
        steps = args.max_train_steps
        expected = [steps, steps * batch, steps // args.checkpointing_steps]
        assert [int(number.replace(",", "")) for number in numbers] == expected, name


def test_nothing_is_left_to_do():
    assert not [document.name for document in DOCUMENTS if "TODO" in document.read_text(encoding="utf-8")]


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_links_exist(document):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{document.name}: {link}"


def tree_paths(text: str) -> list[Path]:
    """The paths of a tree in a text block: two spaces of indentation a level, two or more before a description."""
    found, parents = [], []
    for line in text.splitlines():
        left = re.split(r"\s{2,}(?=\S)", line.strip(), maxsplit=1)[0]
        depth = (len(line) - len(line.lstrip())) // 2
        names = re.findall(r"[\w./]+\.\w+|[\w/]+/", re.split(r"\s{3,}", line.strip())[0])
        parents = parents[:depth]
        found += [Path(*parents, name) for name in names]
        if left.endswith("/"):
            parents.append(left)
    return found


def test_tree_exists():
    document = ROOT / "docs" / "architecture.md"
    tree = next(block.text for block in blocks(document) if "infer.py" in block.text and block.language == "text")
    paths = tree_paths(tree)
    assert len(paths) > 10
    missing = [str(path) for path in paths if not (ROOT / path).exists()]
    assert not missing, missing


def test_named_files_exist():
    for document in DOCUMENTS:
        for path in re.findall(r"`([\w./-]+\.(?:py|yaml|md))`", prose(document)):
            if path not in OTHER_PATHS:
                places = (
                    ROOT / path,
                    ROOT / "accelerate_configs" / path,
                    ROOT / "senseflow" / path,
                    ROOT / "teachers" / path,
                    document.parent / path,
                )
                assert any(place.exists() for place in places), f"{document.name}: {path}"


@cache
def flags_of(script: str) -> frozenset[str]:
    """The flags of a script's parser."""
    found = set()

    def catch(parser, *args, **kwargs):
        found.update(option[2:] for action in parser._actions for option in action.option_strings)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", catch)
        with pytest.raises(SystemExit):
            importlib.import_module(script).parse_args([])
    assert len(found) > 5
    return frozenset(found)


def test_flags_exist():
    known = set().union(*OTHER_FLAGS.values(), *map(flags_of, SCRIPTS))
    for document in DOCUMENTS:
        found = re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*)", document.read_text(encoding="utf-8"))
        assert not set(found) - known, f"{document.name}: {set(found) - known}"


def test_commands_give_a_script_its_own_flags():
    """Of the blocks that do not run, too."""
    for document in DOCUMENTS:
        for block in blocks(document):
            for words in commands(block.text) if block.language == "bash" else []:
                if any(Path(word).stem in SCRIPTS for word in words):
                    _, script, arguments = after_script(words)
                    given = {word[2:] for word in arguments if word.startswith("--")}
                    assert not given - flags_of(Path(script).stem), (document.name, script, given)


def strings(path: Path) -> list[str]:
    """The string constants of a Python file; a line break stands for what an f-string fills in."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def test_quoted_messages_are_the_codes():
    """A message that troubleshooting.md quotes is one that the code has: each part between `...`."""
    files = [*ROOT.glob("*.py"), *(ROOT / "senseflow").rglob("*.py")]
    texts = [text for file in files for text in strings(file)]
    table = re.findall(r"^\| (.*?) \|", prose(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    quotes = [quote.replace("`", "") for symptom in table for quote in re.findall(r'"([^"]+)"', symptom)]
    quotes = [quote for quote in quotes if len(quote) >= 12]
    assert len(quotes) > 15
    missing = []
    for quote in quotes:
        missing += [
            part for part in re.split(r" ?\.\.\. ?", quote) if part and not any(part in text for text in texts)
        ]
    assert not missing, missing
