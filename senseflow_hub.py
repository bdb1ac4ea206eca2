# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Pipelines and networks by folder or Hub id: looked at before any weight loads, then loaded. No family of pipelines is named."""

import json
import os
import re
from pathlib import Path
from typing import Optional, Sequence

import torch
import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from senseflow_args import UserError, loading


# ---------------------------------------------------------------------------------------------------------------------
# Before any weight loads
# ---------------------------------------------------------------------------------------------------------------------
def read_index(path: str, revision: Optional[str] = None) -> dict:
    """model_index.json of a pipeline. OSError or ValueError where there is none."""
    name, local = "model_index.json", os.path.isdir(path)
    index = json.loads(Path(Path(path) / name if local else hf_hub_download(path, name, revision=revision)).read_text())
    if not isinstance(index, dict):
        raise ValueError("no index")
    return index


def check_pipeline(pipeline_class, flag: str, path: str, revision: Optional[str] = None) -> None:
    """Refuses (exit code 2) an unknown folder or Hub id, and one that holds another pipeline class."""
    if not os.path.isdir(path) and not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path):
        raise UserError(f"{flag} {path}: no such folder; give a diffusers pipeline folder or a Hub id", exit_code=2)
    try:
        index = read_index(path, revision)
    except (OSError, ValueError) as error:
        message = f"{flag} {path}: neither a folder with model_index.json nor a Hub id that can be reached"
        raise UserError(message, exit_code=2) from error
    if index.get("_class_name") != pipeline_class.__name__:
        message = f"{flag} {path}: holds a {index.get('_class_name')}, this script trains a {pipeline_class.__name__}"
        raise UserError(message, exit_code=2)


def left_out(pipeline_class, index: dict) -> dict[str, None]:
    """{component: None} of what a pipeline was saved without (SD 3.5 without T5): from_pretrained wants to be told."""
    named = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    return dict.fromkeys(sorted(named - set(pipeline_class._optional_components)))


def config_of(
    kind, flag: str, path: str, subfolder: Optional[str] = None, revision: Optional[str] = None, exact: bool = True
) -> dict:
    """A component's configuration, no weights; UserError (exit code 2) where it cannot be read or, with `exact`, is of another
    class (a scheduler reads the configuration of any other of its family)."""
    where = f"{flag} {path}" + (f" ({subfolder})" if subfolder else "")
    try:
        config = kind.load_config(path, subfolder=subfolder, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: no readable {kind.__name__}; download or copy it again", exit_code=2) from error
    found = config.get("_class_name", kind.__name__)
    if exact and found != kind.__name__:
        raise UserError(f"{where}: is a {found}, this script takes a {kind.__name__}", exit_code=2)
    return config


def check_alike(flag: str, path: str, kind, subfolder: str, teacher: dict, names: Sequence[str]) -> None:
    """Refuses (exit code 2) a network to take the place of the teacher's own that is not there, or whose configuration differs in
    one of `names`, the entries that say which latents and prompts it speaks of."""
    other = config_of(kind, flag, path, subfolder_of(path, subfolder))
    for name in names:
        if other.get(name) != teacher.get(name):
            message = f"{flag} {path}: its {name} is {other.get(name)}, the teacher's {teacher.get(name)}"
            raise UserError(message + "; give one that was made for this teacher", exit_code=2)


def holds(path: str, file: str) -> bool:
    """Whether a folder or Hub repository has this file."""
    if os.path.isdir(path):
        return (Path(path) / file).is_file()
    try:
        return bool(hf_hub_download(path, file))
    except (OSError, ValueError):  # no such file there, or nothing that can be reached
        return False


def subfolder_of(path: str, name: str) -> Optional[str]:
    """Where a network lies in a folder or Hub repository: under its name in a pipeline, or by itself (None)."""
    return name if holds(path, f"{name}/config.json") or not holds(path, "config.json") else None


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def load_network(kind, flag: str, path: str, subfolder: str, **source) -> torch.nn.Module:
    """A network of a pipeline, or one by itself. UserError (exit code 1) where weights are missing or damaged."""
    with loading(flag, path):
        network, info = kind.from_pretrained(path, subfolder=subfolder_of(path, subfolder), output_loading_info=True, **source)
        if info["missing_keys"]:
            raise ValueError(f"{len(info['missing_keys'])} weights are missing, {sorted(info['missing_keys'])[0]} among them")
        return network


def load_pipeline(pipeline_class, flag: str, path: str, revision: Optional[str] = None, **components):
    """The rest of the teacher's pipeline around `components`; UserError (exit code 1) where weights are missing or damaged."""
    with loading(flag, path):
        components = left_out(pipeline_class, read_index(path, revision)) | components
        return pipeline_class.from_pretrained(path, revision=revision, **components)


def absolute_if_local(path: str) -> str:
    """A folder's absolute path, so that a checkpoint finds its teacher from anywhere; a Hub id as it is."""
    return str(Path(path).resolve()) if os.path.isdir(path) else path


def license_of(path: str) -> dict[str, str]:
    """The licence entries of a model's card (license, license_name, license_link); {"license": "other"} where it has none."""
    try:
        card = ModelCard.load(Path(path) / "README.md" if os.path.isdir(path) else path).data
    except (OSError, ValueError, yaml.YAMLError, HfHubHTTPError):
        return {"license": "other"}
    entries = {name: getattr(card, name, None) for name in ("license", "license_name", "license_link")}
    return {name: str(value) for name, value in entries.items() if value} or {"license": "other"}
