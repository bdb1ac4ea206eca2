# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Encode the prompts of a run before training and free the text encoders, or warn of what they cost in its loop."""

import hashlib
import inspect
import os
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from typing import Any, Callable, Optional, Sequence

from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, gather_object
from accelerate.utils.memory import clear_device_cache

from senseflow.errors import TERMINATED, UserError
from senseflow.models.prompt_cache import PromptCache, RecordedEncodePrompt, encoder_identity, make_folder
from senseflow.models.text_encoders import MAX_PROMPTS_IN_MEMORY, has_few_prompts, text_encoders_of
from senseflow.models.weights import fingerprint
from senseflow.training.runtime import Runtime


logger = get_logger(__name__)


def encodes_before_training(args, rows) -> bool:
    """Return whether a run encodes all its prompts on the GPU before it trains, and frees the text encoders."""
    return args.cache_dir is not None or (args.offload_text_encoders and has_few_prompts(rows))


def cache_prompts(models, rows, runtime: Runtime, record_validation: Callable[[], None]) -> None:
    """Encode all prompts once and free the text encoders, the discriminator's too, with --cache_dir.

    Without it each process keeps the encodings in its memory, with --offload_text_encoders and few prompts.

    Args:
        models: a script's TrainingModels; afterwards its `read_prompts` reads what was encoded.
        rows: of the data set.
        record_validation: calls the pipeline's `encode_prompt` as validation will.
    Raises:
        UserError: exit code 1: too little space, or a damaged file; 2: a folder that is not shared; 143: SIGTERM.
    """
    args, process = models.args, (runtime.accelerator.process_index, runtime.accelerator.num_processes)
    if not encodes_before_training(args, rows):
        if args.offload_text_encoders:
            warn_of_offloaded_encoders(models)
        return
    if args.cache_dir is not None:
        check_shared(args, runtime.accelerator)
    for encoder in text_encoders_of(models.pipeline).values():
        encoder.to(models.device)
    caches = {"condition": PromptCache(models.encode_prompts, condition_folder(models))}
    if models.text_features is not None:
        caches["text_features"] = PromptCache(models.encode_for_discriminator, text_features_folder(models))
    for cache in caches.values():
        num_encoded = cache.fill(rows.all_captions, *process, partial(check_stopped, runtime))
        logger.info(f"{num_encoded} prompts are encoded; all are in {cache.folder or 'memory'}")
    recorder = models.pipeline.encode_prompt = RecordedEncodePrompt(models.pipeline.encode_prompt)
    record_validation()
    recorder.encode = None
    free_text_encoders(models)

    def read_prompts(prompts: Sequence[str]) -> dict[str, Any]:
        encoded = {name: cache.read(prompts) for name, cache in caches.items()}
        if "text_features" in encoded:
            (encoded["text_features"],) = encoded["text_features"]
        return encoded

    models.read_prompts = read_prompts


def check_shared(args, accelerator) -> None:
    """Refuse (exit code 2) a --cache_dir that is another folder on another node: processes would wait for ever."""
    is_main = accelerator.is_main_process
    with tempfile.NamedTemporaryFile(dir=args.cache_dir) if is_main else nullcontext() as file:
        (name,) = broadcast_object_list([os.path.basename(file.name) if is_main else None])
        seen = gather_object([os.path.exists(os.path.join(args.cache_dir, name))])
    if not all(seen):
        problem = "not the same folder in all processes; give one on a disk that all nodes see"
        raise UserError(f"--cache_dir {args.cache_dir}: {problem}", exit_code=2, everywhere=True)


def condition_folder(models) -> Optional[str]:
    """Return the folder of what `encode_prompts` returns; None without --cache_dir."""
    if models.args.cache_dir is None:
        return None
    pipeline = models.pipeline
    components = {name: part for name, part in pipeline.components.items() if hasattr(part, "save_pretrained")}
    tokenizers = {name: part for name, part in components.items() if name.startswith(("tokenizer", "processor"))}
    code = hashlib.sha256(inspect.getsource(type(models).encode_prompts).encode()).hexdigest()[:16]
    settings = {"pipeline": type(pipeline).__name__, "encode_prompts": code, **models.encoding_settings()}
    return make_folder(models.args.cache_dir, encoder_identity(settings, text_encoders_of(pipeline), tokenizers))


def text_features_folder(models) -> Optional[str]:
    """Return the folder of the discriminator's text features; None without --cache_dir."""
    if models.args.cache_dir is None:
        return None
    text = models.text_features
    settings = {"pipeline": type(text).__name__}
    return make_folder(models.args.cache_dir, encoder_identity(settings, {"": text.model}, {"": text.tokenizer}))


def free_text_encoders(models) -> None:
    """Free the text encoders of the pipeline and of the discriminator."""
    models.pipeline.register_modules(**dict.fromkeys(text_encoders_of(models.pipeline)))
    if models.text_features is not None:
        models.text_fingerprint, models.text_features = fingerprint(models.text_features), None
    clear_device_cache(garbage_collection=True)


def check_stopped(runtime: Runtime) -> None:
    """Raise a UserError (exit code 143) after SIGTERM, which the launcher also sends if another process fails."""
    if "SIGTERM" in runtime.endings:
        message = "stopped by SIGTERM while prompts are encoded; with --cache_dir, those encoded so far are kept"
        raise UserError(message, TERMINATED, everywhere=True)


def warn_of_offloaded_encoders(models) -> None:
    """Warn how long the text encoders on the CPU take in every iteration: measured, with one micro-batch."""
    args, start = models.args, time.monotonic()
    models.encode_prompts(["a photograph"] * args.train_batch_size)
    seconds = (time.monotonic() - start) * args.gradient_accumulation_steps
    fix = "give --cache_dir DIR to encode every prompt once" if not args.streaming else "drop it where memory allows"
    logger.warning(
        f"--offload_text_encoders: with more than {MAX_PROMPTS_IN_MEMORY} prompts, the CPU encodes them in the loop, "
        f"which takes about {seconds:.1f} s of every iteration; {fix}"
    )
