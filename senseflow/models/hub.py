# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Check and load pipelines and networks from a folder or the Hub. Nothing here depends on a family of pipelines."""

import inspect
import json
import logging
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence

import diffusers
import torch
import transformers
from diffusers import ModelMixin, SchedulerMixin
from huggingface_hub import constants, errors, hf_hub_download, list_repo_files, resolve_revision, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from safetensors import safe_open

from senseflow.errors import UserError, loading, unwritable_cache


logger = logging.getLogger(__name__)
UNREADABLE = (HTTPError, OSError, ValueError)  # raised by the Hub, its cache and damaged files
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:-\d+-of-\d+)?"
    r"(?:\.(?P<variant>[^.]+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
)
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}  # in model_index.json
VALUE_DTYPES = {"F64", "F32", "F16", "BF16"}  # of safetensors files; weights in any other are codes

RETRY = "try again later, or set HF_HUB_OFFLINE=1 if all of it is in the cache"
NOT_CACHED = "the cache ({cache}) lacks it or a part of it: unset HF_HUB_OFFLINE, or try again when the Hub answers"
HUB_REASONS = {  # the most specific first
    errors.GatedRepoError: "it is gated on the Hub: accept its license at {page}, then log in with `hf auth login`",
    errors.RepositoryNotFoundError: "the Hub has no such repository, or hides it: check the spelling, or log in with "
    "`hf auth login` if it is private",
    errors.RevisionNotFoundError: "the Hub has no such revision of it: give a branch, a tag, or a commit that "
    "{page}/commits lists",
    errors.RemoteEntryNotFoundError: "the Hub lacks {cause.response.url}",
    HfHubHTTPError: f"the Hub answers {{cause.response.status_code}}: {RETRY}",
    HTTPError: f"the Hub cannot be reached ({{cause}}): {RETRY}",
    HFValidationError: "it is no Hub id: give a folder or a Hub id",
    (errors.OfflineModeIsEnabled, LocalEntryNotFoundError, errors.RevisionResolutionError): NOT_CACHED,
}


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
        LocalEntryNotFoundError: the Hub does not serve (`hub_error` finds why), and the cache lacks the repository.
        RevisionNotFoundError: the Hub has no such revision.
        HFValidationError: the name is no Hub id.
    """
    try:
        commit = resolve_revision(name, revision=revision).resolved  # also stored in the cache, for offline use
        return Repository(commit, False, frozenset(list_repo_files(name, revision=commit)))
    except errors.RevisionNotFoundError:  # the Hub's answer: an older copy in the cache would hide a typo
        raise
    except (HTTPError, errors.RevisionResolutionError, errors.OfflineModeIsEnabled):
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True))
    files = frozenset(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return Repository(folder.name, True, files)


def hub_error(error: Optional[BaseException]) -> Optional[BaseException]:
    """Find the most specific error of the Hub or its cache in a chain of exceptions; None if there is none."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return next((error for cls in HUB_REASONS for error in chain if isinstance(error, cls)), None)


def hub_reason(error: BaseException) -> str:
    """Explain why the Hub or its cache failed and what to do; of another error, return the first line."""
    unwritable, cause = unwritable_cache(error), hub_error(error)
    if unwritable:
        return f"{unwritable}, or HF_HUB_OFFLINE=1 if all of it is in the cache"
    if cause is None:
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    reason = next(reason for cls, reason in HUB_REASONS.items() if isinstance(cause, cls))
    page = f"{constants.ENDPOINT}/{getattr(cause, 'repo_id', None) or ''}"
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        reason = reason.replace(RETRY, "log in with `hf auth login` and a token that may read it")
    return reason.format(page=page, cause=cause, cache=constants.HF_HUB_CACHE)


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
        component: the component of a pipeline that messages name, too.
    """

    flag: str
    path: str
    revision: Optional[str] = None
    variant: Optional[str] = None
    component: Optional[str] = None

    def __str__(self) -> str:
        return f"{self.flag} {self.path}" + (f" ({self.component})" if self.component else "")

    def error(self, problem: str, exit_code: int = 2) -> UserError:
        return UserError(f"{self}: {problem}", exit_code)

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
        """Raise a UserError (exit code 2) for a file instead of the folder that holds `wanted`."""
        if os.path.isfile(self.path):
            fix = f"give a folder with a {wanted}, as diffusers' save_pretrained writes it"
            raise self.error(f"is a single file; {fix}")

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

    def config(self, cls, subfolder: Optional[str] = None) -> dict:
        """Read the configuration of a component.

        Raises:
            UserError: exit code 2; unreadable, of another class, or quantized. A scheduler accepts that of any
                scheduler.
        """
        self.check_not_a_file(cls.config_name)
        part = replace(self, component=subfolder)
        try:
            config = self.load(cls.load_config, subfolder=subfolder)
        except UNREADABLE as error:
            unreadable = f"no readable {cls.__name__}; download or copy it again"
            raise part.error(unreadable if self.is_folder else hub_reason(error)) from error
        class_name = config.get("_class_name", cls.__name__)
        if class_name != cls.__name__ and not issubclass(cls, SchedulerMixin):
            raise part.error(f"is a {class_name}, this script takes a {cls.__name__}")
        if "quantization_config" in config:
            method = config["quantization_config"].get("quant_method", "see its config.json")
            fix = "give the weights it was made from; --base_quantization, with --rank, quantizes them here"
            raise part.error(f"is quantized ({method}), which cannot be trained; {fix}")
        return config

    # Weights --------------------------------------------------------------------------------------------------------
    def network_subfolder(self, name: str) -> Optional[str]:
        """Return where a network is: in the folder of its name, as in a pipeline, or at the top (None)."""
        if name and (self.has_file(f"{name}/config.json") or not self.has_file("config.json")):
            return name
        return None

    def weight_variant(self, subfolder: Optional[str] = None) -> Optional[str]:
        """Return `variant` if the folder has weights in it, else None, as pipelines choose for each component.

        UserError (exit code 2) if the folder has weights in other variants only.
        """
        variants = {match["variant"] for match in map(WEIGHTS.fullmatch, self.files(subfolder)) if match}
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
        return loader(self.path, revision=commit, local_files_only=local, **kwargs)

    @contextmanager
    def loading(self):
        """Turn an error while weights load into a UserError (exit code 1), with the Hub's reason if the Hub failed."""
        with loading(str(self)):
            try:
                yield
            except Exception as error:
                if self.is_folder or not (hub_error(error) or unwritable_cache(error)):
                    raise
                raise self.error(hub_reason(error), exit_code=1) from error

    def check_complete(self, missing: Sequence[str], unexpected: Sequence[str] = ()) -> None:
        """Raise a UserError (exit code 1) if weights are missing, or have no place in the network."""
        if missing:
            problem = f"{len(missing)} weights are missing ({abbreviate(missing)}); download or copy them again"
            raise self.error(problem, exit_code=1)
        if unexpected:
            problem = f"{len(unexpected)} weights have no place in its config.json ({abbreviate(unexpected)})"
            raise self.error(f"{problem}; give weights that were saved with it", exit_code=1)

    def check_finite(self, extremes: dict[str, torch.Tensor]) -> None:
        """Raise a UserError (exit code 1) if weights hold NaN or infinity, of {name: smallest and largest value}."""
        if not extremes:
            return
        finite = torch.stack(list(extremes.values())).isfinite().all(1).tolist()  # waits for the device once
        damaged = [name for name, is_finite in zip(extremes, finite) if not is_finite]
        if damaged:
            problem = f"{len(damaged)} weights hold NaN or infinity ({abbreviate(damaged)})"
            raise self.error(f"{problem}; download or copy them again, or give others", exit_code=1)


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
def components_of(index: dict) -> dict[str, list]:
    """Return the components in a model_index.json: {name: [library, class]}, or [None, None] for an absent one.

    Other entries may be lists, too: arguments of the pipeline.
    """
    return {
        name: entry
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)
    }


def saved_components(index: dict) -> list[str]:
    """List the components with which a pipeline was saved, from its model_index.json."""
    return sorted(name for name, (library, _) in components_of(index).items() if library)


def missing_components(pipeline_class, index: dict) -> dict[str, None]:
    """Return {component: None} for the required components that a pipeline was saved without (SD 3.5 without T5).

    They are arguments of from_pretrained, which otherwise fails.
    """
    absent = components_of(index).keys() - set(saved_components(index))
    return dict.fromkeys(sorted(absent - set(pipeline_class._optional_components)))


def check_pipeline(source: ModelSource, pipeline_class, supported_entries: Sequence[str] = ()) -> ModelSource:
    """Check that a source loads as a pipeline of this class, with weights in its variant; return it with its commit.

    The name of the class may be another, such as that of an image-to-image pipeline with the same components.

    Args:
        supported_entries: entries of model_index.json besides components that may differ from the class's defaults.
    Raises:
        UserError: exit code 2; unknown, of another class, with other entries, or without such weights.
    """
    index = source.read_json("model_index.json")
    if index is None:
        raise source.error("has no model_index.json; give a diffusers pipeline folder or a Hub id")
    name, parameters = index.get("_class_name"), dict(inspect.signature(pipeline_class).parameters)
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    required -= set(pipeline_class._optional_components)
    loads = required <= components_of(index).keys() and parameters.keys() >= set(saved_components(index))
    if name != pipeline_class.__name__ and not loads:
        raise source.error(f"holds a {name}, this script trains a {pipeline_class.__name__}")
    for name in index.keys() - components_of(index).keys() - set(supported_entries):
        default = parameters[name].default if name in parameters else None
        if not name.startswith("_") and index[name] != default and (index[name] or name in parameters):
            problem = f"has {name} {json.dumps(index[name])} in its model_index.json"
            raise source.error(f"{problem}, which changes a call in a way that this script does not train")
    source, variant = replace(source, revision=source.commit), source.variant
    check_processors(source, index)
    if variant not in {None, *(check_weights(source, name) for name in saved_components(index))}:
        problem = f"{source.path} holds no weights *.{variant}.safetensors; drop --variant"
        raise UserError(f"--variant {variant}: {problem}", exit_code=2)
    return source


def check_processors(source: ModelSource, index: Mapping[str, Any]) -> None:
    """Refuse (UserError) a processor for which a package is not installed, such as torchvision, or that is damaged.

    Args:
        index: model_index.json.
    """
    for name in saved_components(index):
        library, class_name = index[name]
        cls = getattr(LIBRARIES.get(library), class_name, object)
        if not issubclass(cls, transformers.ProcessorMixin):
            continue
        try:
            with source.loading():
                source.load(cls.from_pretrained, subfolder=name)
        except ImportError as error:
            reason = str(error).strip().split(". ")[0]
            raise replace(source, component=name).error(f"{reason}; install it") from error


def check_weights(source: ModelSource, subfolder: Optional[str]) -> Optional[str]:
    """Check the weights of a component before they load, those of a Hub id by name only; return their variant.

    Raises:
        UserError: exit code 2; in other variants only, or stored as codes.
    """
    if source.is_folder:
        check_stored_values(source, subfolder)
    return source.weight_variant(subfolder)


def check_stored_values(source: ModelSource, subfolder: Optional[str]) -> None:
    """Refuse (UserError, exit code 2) weights that are codes with scales beside them: they would load as values.

    Libraries decode a component whose config.json has a quantization_config.
    """
    if "quantization_config" in (source.read_json(os.path.join(subfolder or "", "config.json")) or {}):
        return
    variant = source.weight_variant(subfolder)
    for file in source.files(subfolder):
        match = WEIGHTS.fullmatch(file)
        if not match or match["variant"] != variant or not file.endswith(".safetensors"):
            continue
        with source.loading(), safe_open(source.file(os.path.join(subfolder or "", file)), "pt") as stored:
            dtypes = {name: stored.get_slice(name).get_dtype() for name in stored.keys() if name.endswith("weight")}
        codes = {name: dtype for name, dtype in dtypes.items() if dtype not in VALUE_DTYPES}
        if codes:
            kinds = ", ".join(sorted(set(codes.values())))
            problem = f"{len(codes)} weights in {file} are codes of type {kinds}, not values ({abbreviate(codes)})"
            fix = "give the weights they were made from, in bf16, fp16 or fp32"
            raise replace(source, component=subfolder).error(f"{problem}; {fix}")


def check_compatible(source: ModelSource, cls, subfolder: str, teacher_config: dict, names: Sequence[str]) -> None:
    """Check that a network can replace the teacher's: its configuration has the same values of `names`.

    Raises:
        UserError: exit code 2; the network is absent, or its latents or prompts are others.
    """
    location = source.network_subfolder(subfolder)
    config = source.config(cls, location)
    check_weights(source, location)
    for name in names:
        if config.get(name) != teacher_config.get(name):
            problem = f"its {name} is {config.get(name)}, the teacher's {teacher_config.get(name)}"
            raise source.error(f"{problem}; give one that was made for this teacher")


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------
def load_network(
    source: ModelSource, cls, subfolder: str, optional: Sequence[str] = (), **kwargs: Any
) -> torch.nn.Module:
    """Load a network of diffusers or transformers from a pipeline, or by itself.

    Args:
        optional: weights that may be missing.
    Raises:
        UserError: exit code 1 for missing or damaged weights, 2 for weights that are stored as codes.
    """
    location, of_diffusers = source.network_subfolder(subfolder), issubclass(cls, ModelMixin)
    source = replace(source, component=location)
    with source.loading():
        check_stored_values(source, location)
        kwargs |= {"subfolder": location or "", "variant": source.weight_variant(location)}
        kwargs["output_loading_info"] = True
        if not of_diffusers:
            kwargs["ignore_mismatched_sizes"] = True  # to name them; diffusers' own error does
        network, info = source.load(cls.from_pretrained, **kwargs)
    # The weights of a whole CLIP may serve its text encoder.
    source.check_complete(set(info["missing_keys"]) - set(optional), info["unexpected_keys"] if of_diffusers else ())
    misshapen = [f"{name} {[*stored]} not {[*shape]}" for name, stored, shape in info["mismatched_keys"]]
    if misshapen:
        raise source.error(f"does not fit its config.json: {abbreviate(misshapen)}; download or copy it again", 1)
    if getattr(network, "hf_quantizer", None) is None:  # else its tensors are the library's own
        source.check_finite(extremes_of(network.state_dict()))
    return network


def extremes_of(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return {name: smallest and largest value} of weights; both are NaN if any value is."""
    held = {name: weight for name, weight in weights.items() if weight.is_floating_point() and weight.numel()}
    return {name: torch.stack(weight.aminmax()) for name, weight in held.items()}


def load_pipeline(source: ModelSource, cls, dtype: Optional[torch.dtype] = None, **components: Any):
    """Load a pipeline around `components` (and other arguments of from_pretrained). UserError as by `load_network`."""
    index = source.read_json("model_index.json")
    for name in saved_components(index):
        library, class_name = index[name]
        network_class = getattr(LIBRARIES.get(library), class_name, object)
        if name not in components and issubclass(network_class, torch.nn.Module):
            components[name] = load_network(source, network_class, name, dtype=dtype)
    with source.loading():
        return source.load(cls.from_pretrained, dtype=dtype, **{**missing_components(cls, index), **components})


# ---------------------------------------------------------------------------------------------------------------------
# Copying
# ---------------------------------------------------------------------------------------------------------------------
def component_files(source: ModelSource, name: str) -> dict[str, Path]:
    """Find the files from which a pipeline loads a component: {name without the variant: file}.

    Of a network these are its weights in one format and variant, and its small files.
    """
    names, variant = source.files(name), source.weight_variant(name)
    found = {file: match["variant"] for file in names if (match := WEIGHTS.fullmatch(file))}
    weights = {file for file, found_variant in found.items() if found_variant == variant}
    formats = {file.rpartition(".")[2] for file in weights}
    suffix = "safetensors" if "safetensors" in formats else "bin"
    index = f".{suffix}.index.{variant}.json" if variant else f".{suffix}.index.json"
    if weights:
        small = {file for file in names if file.endswith((".json", ".py")) and ".index." not in file}
        names = small | {file for file in weights if file.endswith(suffix)} | {f for f in names if f.endswith(index)}
    files = {file: source.file(f"{name}/{file}") for file in names}
    return {file.replace(f".{variant}", "") if variant else file: path for file, path in files.items()}


def copy_component_file(path: Path, target: Path) -> None:
    """Copy a file of `component_files`; the index of shards names them without the variant, too."""
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    if target.name.endswith(".index.json"):
        variant = re.search(r"\.index(\.[^.]+)\.json$", path.name)
        if variant:
            index = json.loads(path.read_text())
            shards = {key: file.replace(variant[1], "") for key, file in index["weight_map"].items()}
            target.write_text(json.dumps({**index, "weight_map": shards}, indent=2))
