# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Check and load pipelines and networks from a folder or the Hub. Nothing here depends on a family of pipelines."""

import hashlib
import json
import logging
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Optional, Sequence

import torch
from huggingface_hub import constants, errors, hf_hub_download, model_info, resolve_revision, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

from senseflow.errors import UserError, loading


logger = logging.getLogger(__name__)
UNREADABLE = (HTTPError, OSError, ValueError)  # raised by the Hub, its cache and damaged files
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub
# ---------------------------------------------------------------------------------------------------------------------
class Repository(NamedTuple):
    """A repository of the Hub at one commit."""

    commit: str
    local_files_only: bool  # the Hub is switched off or unreachable, and the cache serves instead
    files: frozenset[str]  # paths; with `local_files_only` those in the cache


@cache
def resolve_repo(name: str, revision: Optional[str] = None) -> Repository:
    """Resolve a Hub id to a commit, once: a process keeps to it, whatever is pushed meanwhile.

    Raises:
        HTTPError: the Hub's answer, if the cache lacks the repository, too.
        LocalEntryNotFoundError: the Hub is switched off and the cache lacks the repository.
        HFValidationError: the name is no Hub id.
    """
    refusal = None
    if not constants.HF_HUB_OFFLINE:
        try:
            commit = resolve_revision(name, revision=revision).resolved  # also stored in the cache, for offline use
            files = frozenset(file.rfilename for file in model_info(name, revision=commit).siblings)
            return Repository(commit, False, files)
        except errors.RevisionNotFoundError:
            raise
        except (HTTPError, errors.RevisionResolutionError) as error:
            refusal = hub_error(error)
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise refusal or error from None
    files = frozenset(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return Repository(folder.name, True, files)


def hub_error(error: Optional[BaseException]) -> Optional[BaseException]:
    """Find the error of the Hub or its cache in a chain of exceptions; None if there is none."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    absent = (errors.OfflineModeIsEnabled, LocalEntryNotFoundError, errors.RevisionResolutionError, HFValidationError)
    found = (error for types in (HfHubHTTPError, HTTPError, absent) for error in chain if isinstance(error, types))
    return next(found, None)


def hub_reason(error: BaseException) -> str:
    """Explain why the Hub or its cache failed and what to do; of another error, return the first line."""
    cause, retry = hub_error(error), "try again later, or set HF_HUB_OFFLINE=1 if all of it is in the cache"
    page = f"{constants.ENDPOINT}/{getattr(cause, 'repo_id', None) or ''}"
    if isinstance(cause, errors.GatedRepoError):
        return f"it is gated on the Hub: accept its license at {page}, then log in with `hf auth login`"
    if isinstance(cause, errors.RepositoryNotFoundError):
        fix = "check the spelling, or log in with `hf auth login` if it is private"
        return f"the Hub has no such repository, or hides it: {fix}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"the Hub has no such revision of it: give a branch, a tag, or a commit that {page}/commits lists"
    if isinstance(cause, errors.RemoteEntryNotFoundError):
        file = str(cause.response.url).partition("/resolve/")[2].partition("/")[2]
        return f"it has no {file or 'such file'} on the Hub"
    if isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        fix = "log in with `hf auth login` and a token that may read it" if status in (401, 403) else retry
        return f"the Hub answers {status}: {fix}"
    if isinstance(cause, HTTPError):
        return f"the Hub cannot be reached ({cause}): {retry}"
    if isinstance(cause, HFValidationError):
        return "it is no Hub id: give a folder or a Hub id"
    if cause is None:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    if constants.HF_HUB_OFFLINE:
        return f"the cache ({constants.HF_HUB_CACHE}) lacks it or a part of it: unset HF_HUB_OFFLINE to download it"
    return "the Hub cannot be reached and the cache lacks a part of it: try again later"


# ---------------------------------------------------------------------------------------------------------------------
# One pipeline or network
# ---------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelSource:
    """Where a pipeline or network is, and which flag messages name.

    Attributes:
        flag: with its dashes.
        path: a folder or a Hub id.
        revision: of a Hub id: branch, tag or commit.
        variant: of the weight files, such as "fp16"; components without this variant load their plain weights.
    """

    flag: str
    path: str
    revision: Optional[str] = None
    variant: Optional[str] = None
    _configs: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"

    def error(self, problem: str, exit_code: int = 2, subfolder: Optional[str] = None) -> UserError:
        """Make a UserError that names flag, path and subfolder."""
        return UserError(f"{self}{f' ({subfolder})' if subfolder else ''}: {problem}", exit_code)

    @property
    def is_folder(self) -> bool:
        return os.path.isdir(self.path)

    @property
    def commit(self) -> Optional[str]:
        """The commit of a Hub id; None for a folder. UserError (exit code 2) for a folder with a revision."""
        if not self.is_folder:
            return resolve_repo(self.path, self.revision).commit
        if self.revision is not None:
            problem = f"{self.path} is a folder, which has none; drop --revision"
            raise UserError(f"--revision {self.revision}: {problem}", exit_code=2)
        return None

    # Files ----------------------------------------------------------------------------------------------------------
    def files(self, subfolder: Optional[str] = None) -> list[str]:
        """List the names of the files in one folder of the source, without those in folders below it."""
        if self.is_folder:
            return [file.name for file in Path(self.path, subfolder or "").glob("*") if file.is_file()]
        files = map(Path, sorted(resolve_repo(self.path, self.revision).files))
        return [file.name for file in files if file.parent == Path(subfolder or "")]

    def file(self, name: str) -> Optional[Path]:
        """Download a file, if it is on the Hub, and return its path; None if there is no such file."""
        if self.is_folder:
            return Path(self.path, name) if Path(self.path, name).is_file() else None
        if name not in resolve_repo(self.path, self.revision).files:
            return None
        return Path(self.load(hf_hub_download, filename=name))

    def has_file(self, name: str) -> bool:
        try:
            return self.file(name) is not None
        except UNREADABLE:  # not reachable
            return False

    def check_not_a_file(self, wanted: str) -> None:
        """Raise a UserError (exit code 2) for a file instead of a folder; it names the folder that holds `wanted`."""
        if not os.path.isfile(self.path):
            return
        folder = next((folder for folder in Path(self.path).resolve().parents if (folder / wanted).is_file()), None)
        problem = "the index of a sharded network" if self.path.endswith(".index.json") else "a single file"
        fix = f"give a folder with a {wanted}, as diffusers' save_pretrained writes it"
        raise self.error(f"is {problem}; {fix if folder is None else f'give its folder, {folder}'}")

    def read_json(self, file: str) -> Optional[dict]:
        """Read a JSON file; None if there is none. UserError (exit code 2) for an unknown source or a damaged file."""
        self.check_not_a_file(file)
        try:
            path = self.file(file)
        except UNREADABLE as error:
            raise self.error(f"no such folder, and {hub_reason(error)}") from error
        try:
            return None if path is None else dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self.error(f"{file} is damaged ({error}); copy it again") from error

    def config(self, cls, subfolder: Optional[str] = None, exact: bool = True) -> dict:
        """Read the configuration of a component, once.

        Args:
            exact: refuse the configuration of another class; a scheduler accepts that of any in its family.
        Raises:
            UserError: exit code 2; unreadable, or of another class.
        """
        if (cls, subfolder) not in self._configs:
            self.check_not_a_file(cls.config_name)
            try:
                self._configs[cls, subfolder] = self.load(cls.load_config, subfolder=subfolder)
            except UNREADABLE as error:
                on_hub = not self.is_folder and hub_error(error)
                reason = hub_reason(error) if on_hub else f"no readable {cls.__name__}; download or copy it again"
                raise self.error(reason, subfolder=subfolder) from error
        config = dict(self._configs[cls, subfolder])
        class_name = config.get("_class_name", cls.__name__)
        if exact and class_name != cls.__name__:
            raise self.error(f"is a {class_name}, this script takes a {cls.__name__}", subfolder=subfolder)
        return config

    # Weights --------------------------------------------------------------------------------------------------------
    def network_subfolder(self, name: str) -> Optional[str]:
        """Return where a network is: in the folder of its name, as in a pipeline, or at the top (None)."""
        if name and (self.has_file(f"{name}/config.json") or not self.has_file("config.json")):
            return name
        return None

    def variants(self, subfolder: Optional[str] = None) -> set[Optional[str]]:
        """Return the variants of the weights in a folder; None stands for plain weights."""
        return {match["variant"] for match in map(WEIGHTS.fullmatch, self.files(subfolder)) if match}

    def weight_variant(self, subfolder: Optional[str] = None) -> Optional[str]:
        """Return `variant` if the folder has weights in it, else None, as pipelines choose for each component.

        UserError (exit code 2) if the folder has weights in other variants only.
        """
        variants = self.variants(subfolder)
        if variants and not variants & {self.variant, None}:
            held = " and ".join(f"*.{name}.safetensors" for name in sorted(variants))
            raise self.error(f"{subfolder or 'it'} holds only {held}: give --variant {sorted(variants)[0]}")
        return self.variant if self.variant in variants else None

    def load(self, loader: Callable, **kwargs):
        """Call a loader of diffusers, transformers or huggingface_hub; for a Hub id at its commit.

        The loader is told if the Hub does not serve: diffusers would ask it for shards even if the cache has them all.
        """
        if self.is_folder:
            return loader(self.path, **kwargs)
        commit, local, _ = resolve_repo(self.path, self.revision)
        try:
            return loader(self.path, revision=commit, local_files_only=local, **kwargs)
        except OSError as error:
            if local and "file named" in str(error):  # the only sign of a file that the cache lacks
                raise LocalEntryNotFoundError(str(error)) from error
            raise

    @contextmanager
    def loading(self):
        """Turn an error while weights load into a UserError (exit code 1), with the Hub's reason if the Hub failed."""
        with loading(self.flag, self.path):
            try:
                yield
            except Exception as error:
                if self.is_folder or hub_error(error) is None:
                    raise
                raise self.error(hub_reason(error), exit_code=1) from error

    def check_complete(self, missing: Sequence[str], unexpected: Sequence[str]) -> None:
        """Raise a UserError (exit code 1) if weights are missing; warn of unexpected ones."""
        if missing:
            problem = f"{len(missing)} weights are missing ({abbreviate(missing)}); download or copy them again"
            raise self.error(problem, exit_code=1)
        if unexpected:
            names = abbreviate(unexpected)
            logger.warning("%s: %d weights have no place in its config.json (%s)", self, len(unexpected), names)


def teacher_source(args) -> ModelSource:
    """Return where the teacher is."""
    path = args.pretrained_model_name_or_path
    return ModelSource("--pretrained_model_name_or_path", path, args.revision, args.variant)


def student_source(args, teacher: ModelSource) -> ModelSource:
    """Return where the weights are that student and fake score start from."""
    path = args.student_model_name_or_path
    return ModelSource("--student_model_name_or_path", path, variant=teacher.variant) if path else teacher


def abbreviate(names: Iterable[str]) -> str:
    """Join the first three of many names."""
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


# ---------------------------------------------------------------------------------------------------------------------
# Checks before any weights load
# ---------------------------------------------------------------------------------------------------------------------
def saved_components(index: dict) -> list[str]:
    """List the components with which a pipeline was saved, from its model_index.json."""
    return sorted(name for name, entry in index.items() if isinstance(entry, list) and entry[0])


def missing_components(pipeline_class, index: dict) -> dict[str, None]:
    """Return {component: None} for the required components that a pipeline was saved without (SD 3.5 without T5).

    They are arguments of from_pretrained, which otherwise fails.
    """
    absent = {name for name, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    return dict.fromkeys(sorted(absent - set(pipeline_class._optional_components)))


def check_pipeline(source: ModelSource, pipeline_class) -> ModelSource:
    """Check that a source is a pipeline of this class, with weights in its variant; return it with its commit.

    Raises:
        UserError: exit code 2; unknown, of another class, or without such weights.
    """
    index = source.read_json("model_index.json")
    if index is None:
        raise source.error("has no model_index.json; give a diffusers pipeline folder or a Hub id")
    if index.get("_class_name") != pipeline_class.__name__:
        raise source.error(f"holds a {index.get('_class_name')}, this script trains a {pipeline_class.__name__}")
    source, variant = replace(source, revision=source.commit), source.variant
    if variant not in {None, *map(source.weight_variant, saved_components(index))}:
        problem = f"{source.path} holds no weights *.{variant}.safetensors; drop --variant"
        raise UserError(f"--variant {variant}: {problem}", exit_code=2)
    return source


def check_compatible(source: ModelSource, cls, subfolder: str, teacher_config: dict, names: Sequence[str]) -> None:
    """Check that a network can replace the teacher's: its configuration has the same values of `names`.

    Raises:
        UserError: exit code 2; the network is absent, or its latents or prompts are others.
    """
    location = source.network_subfolder(subfolder)
    config = source.config(cls, location)
    source.weight_variant(location)
    for name in names:
        if config.get(name) != teacher_config.get(name):
            problem = f"its {name} is {config.get(name)}, the teacher's {teacher_config.get(name)}"
            raise source.error(f"{problem}; give one that was made for this teacher")


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def load_network(source: ModelSource, cls, subfolder: str, **kwargs: Any) -> torch.nn.Module:
    """Load a network from a pipeline, or by itself. UserError (exit code 1) for missing or damaged weights."""
    with source.loading():
        location = source.network_subfolder(subfolder)
        kwargs |= {"subfolder": location, "variant": source.weight_variant(location), "output_loading_info": True}
        network, info = source.load(cls.from_pretrained, **kwargs)
    source.check_complete(info["missing_keys"], info["unexpected_keys"])
    return network


def load_pipeline(source: ModelSource, cls, **components):
    """Load a pipeline around `components` (and other arguments of from_pretrained). UserError (1) for bad weights."""
    with source.loading():
        index = source.read_json("model_index.json")
        variants = set().union(*(source.variants(name) for name in saved_components(index) if name not in components))
        variant = source.variant if source.variant in variants else None
        return source.load(cls.from_pretrained, **{"variant": variant, **missing_components(cls, index), **components})


def fingerprint(module: torch.nn.Module) -> str:
    """Hash the shapes and a few values of every weight: 16 hex digits that differ between teachers.

    Values are rounded to bfloat16, so that the precision in which the network was loaded does not matter.
    """
    digest, unread = hashlib.sha256(), vars(module).get("weights")  # of senseflow.models.weights.meta_network
    for name, parameter in module.named_parameters():
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        first = parameter.detach().flatten()[:8] if unread is None else unread.first(name, 8)
        digest.update(first.bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
