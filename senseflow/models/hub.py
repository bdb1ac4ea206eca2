# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Pipelines and networks by folder or Hub id: looked at before any weight loads, then loaded. No family of pipelines is named."""

import hashlib
import json
import logging
import os
import re
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Optional, Sequence

import torch
from huggingface_hub import constants, errors, hf_hub_download, model_info, resolve_revision, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

from senseflow.errors import UserError, loading


logger = logging.getLogger(__name__)
UNREADABLE = (HTTPError, OSError, ValueError)  # what the Hub, its cache and files that are not as they should be raise
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------
class Repository(NamedTuple):
    """A repository of the Hub, as this process sees it from its first look on."""

    commit: str
    local_files_only: bool  # the Hub is switched off, or does not serve it now; the cache does
    files: frozenset[str]  # their paths; with `local_files_only` of those in the cache


@cache
def resolve_repo(name: str, revision: Optional[str] = None) -> Repository:
    """A repository by its Hub id: one commit throughout a process, whatever is pushed meanwhile.

    Raises:
        HTTPError: what the Hub said, and the cache has no such repository.
        LocalEntryNotFoundError: the Hub is switched off, and the cache has no such repository.
        HFValidationError: a name that is no Hub id.
    """
    refused = None
    if not constants.HF_HUB_OFFLINE:
        try:
            commit = resolve_revision(
                name, revision=revision
            ).resolved  # notes it in the cache, for when the Hub is off
            return Repository(
                commit, False, frozenset(file.rfilename for file in model_info(name, revision=commit).siblings)
            )
        except errors.RevisionNotFoundError:
            raise
        except (HTTPError, errors.RevisionResolutionError) as error:
            refused = hub_error(error)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise refused or error from None
    return Repository(
        folder.name, True, frozenset(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    )


def from_hub(load: Callable, path: str, revision: Optional[str] = None, **options):
    """`load(path, **options)`, a loader of diffusers, transformers or huggingface_hub; of a Hub id at the commit of `look_up`.

    Where the Hub does not serve, loaders are told so: diffusers asks it for a component's shards even if the cache has them all.
    """
    if os.path.isdir(path):
        return load(path, **options)
    commit, local, _ = resolve_repo(path, revision)
    try:
        return load(path, revision=commit, local_files_only=local, **options)
    except OSError as error:
        if local and "file named" in str(error):  # libraries say no more of what the cache lacks
            raise LocalEntryNotFoundError(str(error)) from error
        raise


def hub_error(error: BaseException) -> Optional[BaseException]:
    """What the Hub or its cache raised, of an error and those that led to it; None if neither did."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    absent = (errors.OfflineModeIsEnabled, LocalEntryNotFoundError, errors.RevisionResolutionError, HFValidationError)
    return next(
        (error for kind in (HfHubHTTPError, HTTPError, absent) for error in chain if isinstance(error, kind)), None
    )


def hub_reason(error: BaseException) -> str:
    """Why the Hub did not give what was asked of it and what to do about it, half a sentence; of any other error the first line."""
    found, again = hub_error(error), "try again later, or set HF_HUB_OFFLINE=1 if all of it is in the cache"
    kind = getattr(found, "repo_type", None) or "model"
    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{getattr(found, 'repo_id', None) or ''}"
    if isinstance(found, errors.GatedRepoError):
        return f"it is gated on the Hub: accept its license at {page}, then log in with `hf auth login`"
    if isinstance(found, errors.RepositoryNotFoundError):
        return "the Hub has no such repository, or hides it: check the spelling, or log in with `hf auth login` if it is private"
    if isinstance(found, errors.RevisionNotFoundError):
        return f"the Hub has no such revision of it: give a branch, a tag, or a commit that {page}/commits lists"
    if isinstance(found, errors.RemoteEntryNotFoundError):
        return f"it has no {str(found.response.url).partition('/resolve/')[2].partition('/')[2] or 'such file'} on the Hub"
    if isinstance(found, HfHubHTTPError):
        token = {
            401: "log in with `hf auth login`",
            403: f"give your token the right to it at {constants.ENDPOINT}/settings/tokens",
        }
        return f"the Hub answers {found.response.status_code}: {token.get(found.response.status_code, again)}"
    if isinstance(found, HTTPError):
        return f"the Hub cannot be reached ({found}): {again}"
    if isinstance(found, HFValidationError):
        return "it is no Hub id: give a folder or a Hub id"
    if found is None:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    if constants.HF_HUB_OFFLINE:
        return f"the cache ({constants.HF_HUB_CACHE}) lacks it or a part of it: unset HF_HUB_OFFLINE to download it"
    return "the Hub cannot be reached and the cache lacks a part of it: try again later"


def file_of(path: str, file: str, revision: Optional[str] = None) -> Optional[Path]:
    """A file of a folder or Hub repository, downloaded; None if it has none, or the cache has none and the Hub does not serve."""
    if os.path.isdir(path):
        return Path(path, file) if Path(path, file).is_file() else None
    if file not in resolve_repo(path, revision).files:
        return None
    return Path(from_hub(hf_hub_download, path, revision, filename=file))


# ---------------------------------------------------------------------------------------------------------------------
# Before any weight loads
# ---------------------------------------------------------------------------------------------------------------------
def refuse_file(flag: str, path: str, wanted: str) -> None:
    """Refuses (exit code 2) a file in the place of a folder; names the folder around it that holds a file `wanted`."""
    if os.path.isfile(path):
        around = next((folder for folder in Path(path).resolve().parents if (folder / wanted).is_file()), None)
        what = "the index of a sharded network" if path.endswith(".index.json") else "a single file"
        fix = (
            f"give its folder, {around}"
            if around
            else f"give a folder with a {wanted}, as diffusers' save_pretrained writes it"
        )
        raise UserError(f"{flag} {path}: is {what}; {fix}", exit_code=2)


def read_json(flag: str, path: str, file: str, revision: Optional[str] = None) -> Optional[dict]:
    """One JSON file of a folder or Hub repository; None if there is none.

    Raises:
        UserError: exit code 2; no such folder and the Hub's reason, or a damaged file.
    """
    refuse_file(flag, path, file)
    try:
        found = file_of(path, file, revision)
    except UNREADABLE as error:
        raise UserError(f"{flag} {path}: no such folder, and {hub_reason(error)}", exit_code=2) from error
    try:
        return None if found is None else dict(json.loads(found.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{flag} {path}: {file} is damaged ({error}); copy it again", exit_code=2) from error


def commit_of(path: str, revision: Optional[str] = None) -> Optional[str]:
    """The commit of a Hub id; None for a folder, of which a revision is refused (UserError, exit code 2)."""
    if not os.path.isdir(path):
        return resolve_repo(path, revision).commit
    if revision is not None:
        raise UserError(f"--revision {revision}: {path} is a folder, which has none; drop --revision", exit_code=2)
    return None


def variants_of(path: str, subfolder: Optional[str], revision: Optional[str] = None) -> set[Optional[str]]:
    """The variants in which a folder holds weights; None stands for weights without."""
    if os.path.isdir(path):
        names = [file.name for file in Path(path, subfolder or "").glob("*")]
    else:
        files = [Path(file) for file in resolve_repo(path, revision).files]
        names = [file.name for file in files if file.parent == Path(subfolder or "")]
    return {match["variant"] for match in map(WEIGHTS.fullmatch, names) if match}


def choose_variant(
    flag: str, path: str, subfolder: Optional[str], variant: Optional[str], revision: Optional[str] = None
):
    """`variant` where the weights come in it, else None: as pipelines choose for each component. UserError (exit code 2) where
    they come in others alone."""
    found = variants_of(path, subfolder, revision)
    if found and not found & {variant, None}:
        held, other = " and ".join(f"*.{name}.safetensors" for name in sorted(found)), sorted(found)[0]
        raise UserError(f"{flag} {path}: {subfolder or 'it'} holds only {held}: give --variant {other}", exit_code=2)
    return variant if variant in found else None


def components_of(index: dict) -> list[str]:
    """The components that a pipeline was saved with, of its model_index.json."""
    return sorted(name for name, entry in index.items() if isinstance(entry, list) and entry[0])


def missing_components(pipeline_class, index: dict) -> dict[str, None]:
    """{component: None} of what a pipeline was saved without (SD 3.5 without T5): from_pretrained wants to be told."""
    named = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    return dict.fromkeys(sorted(named - set(pipeline_class._optional_components)))


def check_pipeline(
    pipeline_class, flag: str, path: str, revision: Optional[str] = None, variant: Optional[str] = None
):
    """Refuses (exit code 2) an unknown folder or Hub id, and one that holds another pipeline class, or no such weights.

    Returns:
        The commit of a Hub id, which is the revision from here on; None for a folder.
    """
    index = read_json(flag, path, "model_index.json", revision)
    if index is None:
        raise UserError(
            f"{flag} {path}: has no model_index.json; give a diffusers pipeline folder or a Hub id", exit_code=2
        )
    if index.get("_class_name") != pipeline_class.__name__:
        message = f"{flag} {path}: holds a {index.get('_class_name')}, this script trains a {pipeline_class.__name__}"
        raise UserError(message, exit_code=2)
    commit = commit_of(path, revision)
    if variant not in {None, *(choose_variant(flag, path, part, variant, commit) for part in components_of(index))}:
        raise UserError(
            f"--variant {variant}: {path} holds no weights *.{variant}.safetensors; drop --variant", exit_code=2
        )
    return commit


def config_of(kind, flag: str, path: str, subfolder=None, revision: Optional[str] = None, exact: bool = True) -> dict:
    """A component's configuration, no weights; UserError (exit code 2) where it cannot be read or, with `exact`, is of another
    class (a scheduler reads the configuration of any other of its family)."""
    refuse_file(flag, path, kind.config_name)
    where = f"{flag} {path}" + (f" ({subfolder})" if subfolder else "")
    try:
        config = from_hub(kind.load_config, path, revision, subfolder=subfolder)
    except UNREADABLE as error:
        told = not os.path.isdir(path) and hub_error(error)
        reason = hub_reason(error) if told else f"no readable {kind.__name__}; download or copy it again"
        raise UserError(f"{where}: {reason}", exit_code=2) from error
    found = config.get("_class_name", kind.__name__)
    if exact and found != kind.__name__:
        raise UserError(f"{where}: is a {found}, this script takes a {kind.__name__}", exit_code=2)
    return config


def check_compatible(
    flag: str, path: str, kind, subfolder: str, teacher: dict, names: Sequence[str], variant=None
) -> None:
    """Refuses (exit code 2) a network to take the place of the teacher's own that is not there, or whose configuration differs in
    one of `names`, the entries that say which latents and prompts it speaks of."""
    place = subfolder_of(path, subfolder)
    other = config_of(kind, flag, path, place)
    choose_variant(flag, path, place, variant)
    for name in names:
        if other.get(name) != teacher.get(name):
            message = f"{flag} {path}: its {name} is {other.get(name)}, the teacher's {teacher.get(name)}"
            raise UserError(message + "; give one that was made for this teacher", exit_code=2)


def has_file(path: str, file: str, revision: Optional[str] = None) -> bool:
    """Whether a folder or Hub repository has this file."""
    try:
        return file_of(path, file, revision) is not None
    except UNREADABLE:  # nothing that can be reached
        return False


def files_of(path: str) -> list[str]:
    """The paths of the files of a Hub repository, or of a folder and the folders in it."""
    if os.path.isdir(path):
        return [
            str(file.relative_to(path))
            for pattern in ("*", "*/*")
            for file in Path(path).glob(pattern)
            if file.is_file()
        ]
    return sorted(resolve_repo(path).files)


def subfolder_of(path: str, name: str, revision: Optional[str] = None) -> Optional[str]:
    """Where a network lies in a folder or Hub repository: under its name in a pipeline, or by itself (None)."""
    return (
        name
        if name and (has_file(path, f"{name}/config.json", revision) or not has_file(path, "config.json", revision))
        else None
    )


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
@contextmanager
def loading_model(flag: str, path: str):
    """`senseflow.arguments.loading` for a folder or Hub id; where the Hub is what fails, its reason stands for advice about weights."""
    with loading(flag, path):
        try:
            yield
        except Exception as error:
            if os.path.isdir(path) or hub_error(error) is None:
                raise
            raise UserError(f"{flag} {path}: {hub_reason(error)}") from error


def few(names: Iterable[str]) -> str:
    """The first three of many names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def load_network(
    kind,
    flag: str,
    path: str,
    subfolder: str,
    revision: Optional[str] = None,
    variant: Optional[str] = None,
    **options: Any,
) -> torch.nn.Module:
    """A network of a pipeline, or one by itself. UserError (exit code 1) where weights are missing or damaged."""
    with loading_model(flag, path):
        place = subfolder_of(path, subfolder, revision)
        options |= {"subfolder": place, "variant": choose_variant(flag, path, place, variant, revision)}
        network, info = from_hub(kind.from_pretrained, path, revision, output_loading_info=True, **options)
    check_complete(flag, path, info["missing_keys"], info["unexpected_keys"])
    return network


def check_complete(flag: str, path: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """UserError (exit code 1) where weights are missing; a warning where some have no place."""
    if missing:
        raise UserError(
            f"{flag} {path}: {len(missing)} weights are missing ({few(missing)}); download or copy them again"
        )
    if unexpected:
        logger.warning(
            "%s %s: %d weights have no place in its config.json (%s)", flag, path, len(unexpected), few(unexpected)
        )


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of a network's shapes and of a few values of every weight: another teacher has another one.

    Values are rounded to bfloat16, so that it is the same in whatever precision the network was loaded.
    """
    digest, unread = (
        hashlib.sha256(),
        vars(module).get("weights"),
    )  # of senseflow.models.weights: the network is empty yet
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        first = parameter.detach().flatten()[:8] if unread is None else unread.first(name, 8)
        digest.update(first.bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_pipeline(
    kind, flag: str, path: str, revision: Optional[str] = None, variant: Optional[str] = None, **components
):
    """A pipeline around `components`, and other arguments of from_pretrained; UserError (exit code 1) where weights are damaged."""
    with loading_model(flag, path):
        index = read_json(flag, path, "model_index.json", revision)
        held = set().union(
            *(variants_of(path, part, revision) for part in components_of(index) if part not in components)
        )
        components = {"variant": variant if variant in held else None} | missing_components(kind, index) | components
        return from_hub(kind.from_pretrained, path, revision, **components)
