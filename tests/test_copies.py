"""What the scripts share stays the same, every flag is read, and imports go one way."""

import ast
import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib

import copies
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from helpers import ROOT
from senseflow.arguments import LR_SCHEDULERS, TRACKERS, Parser


@pytest.mark.parametrize("module", copies.SCRIPTS[1:])
def test_marked_blocks_are_what_they_were_copied_from(module):
    blocks = copies.copies(module)
    names = {name for name, _, _ in blocks}
    assert names >= {"main"} if "dmd2" in module else {"student_losses", "train_iteration", "make_models", "main"}
    for name, source, wanted in blocks:
        assert source == wanted, f"{module}.{name} has drifted: make fix-copies"


def test_a_copy_that_drifted_is_rewritten(tmp_path, monkeypatch, capsys):
    for script in copies.SCRIPTS:
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    sdxl, flux = tmp_path / "train_senseflow_sdxl.py", tmp_path / "train_senseflow_flux.py"
    before = sdxl.read_text()
    flux.write_text(flux.read_text().replace("totals: dict[str, torch.Tensor] = {}", "totals = {}"))
    monkeypatch.setattr(copies, "ROOT", tmp_path)
    copies.main()
    assert sdxl.read_text() == before.replace("totals: dict[str, torch.Tensor] = {}", "totals = {}")
    assert "train_senseflow_sdxl.py: train_iteration rewritten" in capsys.readouterr().out
    assert all(source == wanted for _, source, wanted in copies.copies("train_senseflow_sdxl"))


class Caught(Exception):
    """A script's parser."""


@pytest.fixture
def parsers(monkeypatch) -> dict[str, dict]:
    """{script: {flag: its argparse action}}."""

    def catch(parser, argv=None):
        raise Caught(parser)

    monkeypatch.setattr(Parser, "parse_args", catch)
    found = {}
    for name in copies.SCRIPTS:
        with pytest.raises(Caught) as caught:
            importlib.import_module(name).parse_args([])
        found[name] = {action.dest: action for action in caught.value.args[0]._actions if action.dest != "help"}
    return found


def test_flags_mean_the_same_everywhere_and_each_is_read(parsers):
    library = "".join(path.read_text() for path in (ROOT / "senseflow").rglob("*.py") if path.name != "arguments.py")
    arguments = (ROOT / "senseflow/arguments.py").read_text()
    library += arguments[arguments.index("def complete_args") : arguments.index("def check_common_args")]
    for script, actions in parsers.items():
        text = (ROOT / f"{script}.py").read_text()
        text = text[text.index("import torch") :] + library
        if "dmd2" in script:
            text += (ROOT / "train_senseflow_sdxl.py").read_text()
        for name, action in actions.items():
            read = f"args.{name}" in text or f'"{name}"' in text or f'args["{name}"]' in text
            assert read or name in ("preset", "hub_token"), f"{script}: --{name} is dead"
            assert action.help and action.container.title != "options", f"{script}: --{name} stands in no group"
            for other in parsers.values():
                for attribute in ("nargs", "const", "dest", "metavar", "required", "help"):
                    same = getattr(other.get(name, action), attribute)
                    assert attribute == "help" or getattr(action, attribute) == same, (script, name, attribute)


def test_choices_are_those_of_the_libraries():
    from accelerate.utils import LoggerType
    from diffusers.optimization import SchedulerType

    schedulers = {kind.value for kind in SchedulerType} - {"piecewise_constant"}  # which needs rules
    assert set(LR_SCHEDULERS) == schedulers
    assert set(TRACKERS) == {tracker.value for tracker in LoggerType} - {"all"}


@pytest.mark.parametrize("script", [*(f"{name}.py" for name in copies.SCRIPTS), "infer.py", "evaluate.py"])
def test_help_answers_before_heavy_imports(script):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(ROOT / script)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(stop.code or ' '.join(sorted(heavy)) or 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-500:]
    assert "usage:" in result.stdout


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl", "dmd2", "a copy of flux"])
def test_a_script_trains_from_another_folder(name, teachers, tmp_path):
    """By its path; and a copy of it, which finds the installed library alone."""
    script = ROOT / ("train_dmd2_sdxl.py" if name == "dmd2" else f"train_senseflow_{name}.py")
    pipeline = teachers.get({"dmd2": "sdxl"}.get(name, name), teachers["flux"])
    if not script.exists():
        script = tmp_path / "train_mine.py"
        shutil.copy(ROOT / "train_senseflow_flux.py", script)
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    (cwd / "prompts.txt").write_text("a red square\na cat\n")
    flags = "--prompts_file prompts.txt --gan_weight 0 --backward_simulation_prob 1 --resolution 64"
    flags += " --max_train_steps 1 --report_to none --output_dir out"
    command = [sys.executable, str(script), "--pretrained_model_name_or_path", str(pipeline), *flags.split()]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (cwd / "out" / "senseflow.json").is_file() and (cwd / "out" / "model_index.json").is_file()


def test_scripts_and_functions_stay_short():
    for path in [*ROOT.glob("*.py"), *(ROOT / "senseflow").rglob("*.py")]:
        text = path.read_text()
        assert len(text.splitlines()) <= 600, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
                assert node.end_lineno - node.lineno < 100, f"{path.name}: {node.name}"


# ---------------------------------------------------------------------------------------------------------------------
# Imports
# ---------------------------------------------------------------------------------------------------------------------
# {part of the repository: what it may import of it}; a part is a file, or a folder in senseflow/.
ARROWS = {
    "senseflow_utils": set(),
    "senseflow.errors": set(),
    "senseflow.arguments": {"senseflow.errors"},
    "senseflow.released": set(),
    "senseflow.student_config": {"senseflow.arguments", "senseflow.errors"},
    "senseflow.data": {"senseflow.errors", "senseflow_utils"},
    "senseflow.models": {"senseflow.arguments", "senseflow.errors", "senseflow_utils"},
}
_MODELS = {"senseflow.models", *ARROWS["senseflow.models"], "senseflow.student_config", "senseflow.released"}
ARROWS |= {
    "senseflow.training": _MODELS,
    "senseflow.memory": _MODELS | {"senseflow.training"},
    "senseflow.inference": _MODELS,
    "senseflow.evaluation": _MODELS | {"senseflow.data"},
    "senseflow.convert_lora": _MODELS,
    "senseflow.merge_lora": _MODELS | {"senseflow.inference"},
}
_TRAINING = _MODELS | {"senseflow.training", "senseflow.memory", "senseflow.data"}
ARROWS |= {script: _TRAINING for script in copies.SCRIPTS}
ARROWS["train_dmd2_sdxl"] = {*_TRAINING, "train_senseflow_sdxl"}
ARROWS["teachers"] = {*_TRAINING, *copies.SCRIPTS}
ARROWS |= {
    "infer": _MODELS | {"senseflow.inference", "senseflow.data"},
    "evaluate": _MODELS | {"senseflow.evaluation", "senseflow.data"},
}


def part_of(module: str) -> str:
    """The part of the repository that a module belongs to; "" for libraries."""
    if module.split(".")[0] == "senseflow":
        return ".".join(module.split(".")[:2])
    return module if (ROOT / f"{module}.py").is_file() or module in ("helpers", "tiny_pipelines", "toy") else ""


def imports_of(path) -> set[str]:
    """The parts of the repository that a file imports, in functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module] if node.module != "senseflow" else [f"senseflow.{a.name}" for a in node.names]
            found |= {part_of(module) for module in modules}
    return found - {""}


def test_imports_go_one_way():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("teachers/*.py"), *(ROOT / "senseflow").rglob("*.py")]:
        part = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts)) or path.parent.name
        if path.name != "__init__.py":
            wrong = imports_of(path) - ARROWS[part] - {part, "senseflow_utils"}
            assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"
        else:
            assert not path.read_text(), f"{path}: no re-exports"


def requirements(*files: str) -> list[Requirement]:
    lines = [line for file in files for line in (ROOT / file).read_text().split("\n")]
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_what_is_imported_can_be_installed():
    """Also what is imported inside a function: requirements-dev.txt is for tests alone."""
    packages = importlib.metadata.packages_distributions()
    wanted = {requirement.name.lower() for requirement in requirements("requirements.txt", "requirements-gpu.txt")}
    for path in [*ROOT.glob("*.py"), *(ROOT / "senseflow").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")]
            for name in {module.split(".")[0] for module in modules if module} - sys.stdlib_module_names:
                own = {distribution.lower() for distribution in packages.get(name, [name])}
                assert part_of(name) or name == "senseflow" or own & wanted, f"{path.name} imports {name}"


def test_the_versions_of_python_are_those_of_the_requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions = [line.split(" :: ")[-1] for line in project["classifiers"]]
    assert f">={versions[0]}" == project["requires-python"] and len(versions) > 1
    for requirement in requirements("requirements.txt"):
        supported = importlib.metadata.metadata(requirement.name)["Requires-Python"]
        assert all(version in SpecifierSet(supported) for version in versions), f"{requirement.name} needs {supported}"


def test_no_room_has_a_circle_of_imports():
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "senseflow").rglob("*.py")}
    edges = {
        name: set(re.findall(r"^from (senseflow[\w.]*) import", path.read_text(), re.MULTILINE)) & set(modules)
        for name, path in modules.items()
    }
    while leaves := {name for name, others in edges.items() if not others & set(edges)}:
        edges = {name: others for name, others in edges.items() if name not in leaves}
    assert not edges, f"a circle among {', '.join(sorted(edges))}"


@pytest.mark.parametrize("folder", ["benchmarks", "demo", "tests"])
def test_tests_and_benchmarks_do_not_import_each_other(folder):
    others = {"benchmarks": {"tests"}, "demo": {"tests", "benchmarks"}, "tests": {"benchmarks"}}[folder]
    names = {name for other in others for file in (ROOT / other).glob("*.py") for name in (other, file.stem)}
    names -= {file.stem for file in (ROOT / folder).rglob("*.py")}
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bsys\.path\b", text), f"{path.relative_to(ROOT)}: pip install -e . instead"
        for node in ast.walk(ast.parse(text)):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            modules = [module] if module else [a.name for a in node.names] if isinstance(node, ast.Import) else []
            assert not {m.split(".")[0] for m in modules} & names, f"{path.relative_to(ROOT)}: {modules}"
