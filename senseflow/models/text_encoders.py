# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Prompts to conditions: where the frozen text encoders are, and for how long."""

import os
from functools import partial
from typing import Optional, Sequence, Union

import torch
import torch.nn.functional as F
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from tqdm.auto import tqdm

from senseflow.errors import UserError


logger = get_logger(__name__)

SMALL_SET = 1000  # prompts whose embeddings are kept; those of FLUX.1-dev take 4 MB each in bf16


def text_encoders_of(pipeline) -> dict[str, torch.nn.Module]:
    """The text encoders that a pipeline has, by component."""
    components = pipeline.components.items()
    return {name: part for name, part in components if name.startswith("text_encoder") and part is not None}


def place_text_encoders(args, pipeline, device) -> None:
    """Puts the frozen text encoders on the device or, with --offload_text_encoders, leaves them on the CPU to run there."""
    for encoder in text_encoders_of(pipeline).values():
        encoder.requires_grad_(False).eval().to("cpu" if args.offload_text_encoders else device)
    if args.offload_text_encoders:
        pipeline.encode_prompt = partial(
            _encode_where_they_are, pipeline, pipeline.encode_prompt
        )  # the stock call's, too


def _encode_where_they_are(pipeline, encode_prompt, *args, device, **kwargs) -> tuple:
    where = next(iter(text_encoders_of(pipeline).values())).device
    return send_to_device(encode_prompt(*args, device=where, **kwargs), device)  # lists of tensors, too


def encode_small_set(args, rows, pipeline, encode_prompts, device):
    """With --offload_text_encoders and at most SMALL_SET different prompts: encodes them all, once, and frees the encoders.

    Args:
        rows: of the data set.
        encode_prompts: `encode_prompts(prompts) -> condition`, a tuple of tensors (B, ...).
    Returns:
        What takes the place of `encode_prompts`. The encoders stay on the CPU where --validation_prompts will need them.
    """
    prompts = few_prompts(rows) if args.offload_text_encoders else None
    if prompts is None:
        return encode_prompts
    encoders = text_encoders_of(pipeline)
    for encoder in encoders.values():
        encoder.to(device)
    shown = tqdm(prompts, "prompts", disable=os.environ.get("LOCAL_RANK", "0") != "0")
    table = {prompt: [part.cpu() for part in encode_prompts([prompt])] for prompt in shown}
    for encoder in encoders.values():
        encoder.to("cpu")
    if not args.validation_prompts:
        pipeline.register_modules(**dict.fromkeys(encoders))
    logger.info(
        f"{len(table)} prompts are encoded; the text encoders are {'on the CPU' if args.validation_prompts else 'freed'}"
    )
    return lambda prompts: tuple(torch.cat(parts).to(device) for parts in zip(*[table[prompt] for prompt in prompts]))


def pad_condition(
    embeds: Union[torch.Tensor, Sequence[torch.Tensor]], length: int, mask: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Text of variable length as a condition must be, of one length throughout a run: (embeds (B, length, D), mask (B, length)).

    Args:
        embeds: (B, L, D), or (L, D) a prompt, each of a length of its own.
        length: --max_sequence_length.
        mask: (B, L), nonzero where a place of `embeds` is text (default: everywhere).
    Returns:
        The text at the start of each row, then zeros; and a mask, bool, true where there is text.
    Raises:
        UserError: a prompt is longer than `length`.
    """
    texts = list(embeds) if mask is None else [text[own.bool()] for text, own in zip(embeds, mask, strict=True)]
    longest = max(map(len, texts))
    if longest > length:
        raise UserError(
            f"--max_sequence_length {length}: a prompt has {longest} tokens; raise it, or shorten the prompt"
        )
    padded = torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts])
    lengths = torch.tensor([len(text) for text in texts], device=padded.device)
    return padded, torch.arange(length, device=padded.device) < lengths[:, None]


def few_prompts(rows) -> Optional[list[str]]:
    """The different prompts of a data set, if they are at most SMALL_SET; None for more, and for a stream."""
    found: dict[str, None] = {}
    for row in range(len(rows) if hasattr(rows, "__len__") else 0):
        found |= dict.fromkeys(rows.captions(row))
        if len(found) > SMALL_SET:
            return None
    return list(found) or None
