"""What the scripts share stays the same: marked blocks, flags, and no flag that nothing reads."""

import ast
import importlib
import re

import pytest

from helpers import ROOT
from senseflow.arguments import Parser


SCRIPTS = ("train_senseflow_flux", "train_senseflow_sd3", "train_senseflow_sdxl")
MARKER = re.compile(r"^# Copied from (\w+)\.(\w+)(?: but for lines marked (\w+))?(?: with (.+))?$", re.MULTILINE)
# What a script may say differently about a flag of another script: its help and its default.
SAME = ("nargs", "type", "const", "dest", "metavar", "required")


def definitions(module: str) -> dict[str, tuple[int, str]]:
    """{name: (first line, source)} of a module's functions and classes, decorators included."""
    text = (ROOT / f"{module}.py").read_text()
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = (first, "\n".join(lines[first - 1 : node.end_lineno]))
    return found


def copies(module: str) -> list[tuple[str, str, str]]:
    """(name, its source without what the marker allows, what the marker says it should be) of every marked block."""
    text, own, result = (ROOT / f"{module}.py").read_text(), definitions(module), []
    for marker in MARKER.finditer(text):
        origin, name, mark, replaced = marker.groups()
        line = text[: marker.start()].count("\n") + 2
        (source,) = [source for first, source in own.values() if first == line]
        if mark:
            kept = [line for line in source.splitlines() if not line.endswith(f"# {mark}")]
            assert len(kept) < len(source.splitlines()), f"{module}.{name} has no line marked {mark}"
            source = "\n".join(kept)
        wanted = definitions(origin)[name][1]
        for pair in (replaced or "").split(", "):
            if pair:
                before, after = pair.split("->")
                assert before in wanted, f"{module}.{name}: {before} is not in what it was copied from"
                wanted = wanted.replace(before, after)
        result.append((name, source, wanted))
    assert text.count("Copied from") - text.count("`# Copied from`") == len(result), (
        f"{module}: a marker that is not understood"
    )
    return result


@pytest.mark.parametrize("module", SCRIPTS[1:])
def test_marked_blocks_are_what_they_were_copied_from(module):
    found = copies(module)
    assert {name for name, _, _ in found} >= {
        "TrainingModels",
        "student_input",
        "student_losses",
        "train_iteration",
        "main",
    }
    for name, source, wanted in found:
        assert source == wanted, f"{module}.{name} has drifted"


class Caught(Exception):
    """A script's parser, on its way out."""


def parsers(monkeypatch) -> dict[str, dict]:
    """{script: {flag: its argparse action}}."""

    def catch(parser, argv=None):
        raise Caught(parser)

    monkeypatch.setattr(Parser, "parse_args", catch)
    found = {}
    for name in SCRIPTS:
        with pytest.raises(Caught) as caught:
            importlib.import_module(name).parse_args([])
        found[name] = {action.dest: action for action in caught.value.args[0]._actions if action.dest != "help"}
    return found


def test_flags_mean_the_same_everywhere_and_each_is_read(monkeypatch):
    modules = "".join(path.read_text() for path in ROOT.glob("senseflow_*.py"))
    arguments = (ROOT / "senseflow/arguments.py").read_text()
    checks = arguments[arguments.index("def check_common_args") :]
    modules = modules.replace(checks, "")  # to be checked is not to be used
    found = parsers(monkeypatch)
    for script, actions in found.items():
        text = (ROOT / f"{script}.py").read_text()
        assert len(text.splitlines()) <= 720 and len(actions) <= 85
        text += modules
        for name, action in actions.items():
            read = f"args.{name}" in text or f'"{name}"' in text.replace(f'add("--{name}"', "")
            assert read, f"{script}: --{name} is dead"
            assert action.help and action.container.title != "options", f"{script}: --{name} stands in no group"
            for other in found.values():
                for attribute in SAME:
                    assert getattr(action, attribute) == getattr(other.get(name, action), attribute), (
                        script,
                        name,
                        attribute,
                    )
