#!/usr/bin/env python
"""Keep the blocks under `# Copied from MODULE.NAME` in the training scripts equal to what they were copied from.

    python tests/copies.py        # writes the copies; `make fix-copies`

A marker may end in "but for lines marked WORD": lines that end in `# WORD` are the copy's own. It may go on
"with A->B, C->D": these words are replaced.
"""

import ast
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_senseflow_flux", "train_senseflow_sd3", "train_senseflow_sdxl", "train_dmd2_sdxl")
MARKER = re.compile(r"^# Copied from (\w+)\.(\w+)(?: but for lines marked (\w+))?(?: with (.+))?$", re.MULTILINE)


def definitions(module: str) -> dict[str, str]:
    """Return {name: source} of a script's functions and classes, without decorators."""
    text = (ROOT / f"{module}.py").read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def copies(module: str) -> list[tuple[str, str, str]]:
    """Return (name, source, what the source should be) of every marked block of a script."""
    text, own, result = (ROOT / f"{module}.py").read_text(), definitions(module), []
    for marker in MARKER.finditer(text):
        origin, name, mark, replaced = marker.groups()
        assert text[marker.end() + 1 :].startswith(own[name]), f"{module}: the marker of {name} is not above it"
        wanted = definitions(origin)[name]
        for pair in filter(None, (replaced or "").split(", ")):
            before, after = pair.split("->")
            assert before in wanted, f"{module}.{name}: {before} is not in what it was copied from"
            wanted = wanted.replace(before, after)
        result.append((name, own[name], with_marked_lines(wanted, own[name], mark) if mark else wanted))
    assert text.count("# Copied from ") == len(result), f"{module}: a marker that is not understood"
    return result


def with_marked_lines(wanted: str, copy: str, mark: str) -> str:
    """Insert the lines of a copy that end in `# mark` after the line that stands before them in the copy."""
    lines, position = wanted.split("\n"), 0
    for line in copy.split("\n"):
        if line.endswith(f"# {mark}"):
            lines.insert(position, line)
            position += 1
        elif line in lines[position:]:
            position = lines.index(line, position) + 1
    return "\n".join(lines)


def main() -> None:
    for module in SCRIPTS:
        for name, source, wanted in copies(module):
            if source != wanted:
                path = ROOT / f"{module}.py"
                path.write_text(path.read_text().replace(source, wanted))
                print(f"{path.name}: {name} rewritten")


if __name__ == "__main__":
    main()
