# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""Encode prompts to conditions: where the frozen text encoders are, and for how long."""

from functools import partial
from typing import Optional, Sequence, Union

import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device

from senseflow.errors import UserError


MAX_PROMPTS_IN_MEMORY = 1000  # embeddings of FLUX.1-dev take 4 MB per prompt in bf16


def text_encoders_of(pipeline) -> dict[str, torch.nn.Module]:
    """Return the text encoders of a pipeline by component."""
    components = pipeline.components.items()
    return {name: part for name, part in components if name.startswith("text_encoder") and part is not None}


def place_text_encoders(args, pipeline, device) -> None:
    """Put the frozen text encoders on the device or, with --offload_text_encoders, let them run on the CPU."""
    for encoder in text_encoders_of(pipeline).values():
        encoder.requires_grad_(False).eval().to("cpu" if args.offload_text_encoders else device)
    if args.offload_text_encoders:  # for stock calls of the pipeline, too
        pipeline.encode_prompt = partial(_encode_on_their_device, pipeline, pipeline.encode_prompt)


def _encode_on_their_device(pipeline, encode_prompt, *args, device, **kwargs) -> tuple:
    own_device = next(iter(text_encoders_of(pipeline).values())).device
    return send_to_device(encode_prompt(*args, device=own_device, **kwargs), device)  # lists of tensors, too


def has_few_prompts(rows) -> bool:
    """Return whether a data set has at most MAX_PROMPTS_IN_MEMORY different prompts; those of a stream are unknown."""
    prompts: set[str] = set()
    for prompt in rows.all_captions() if hasattr(rows, "all_captions") else ():
        prompts.add(prompt)
        if len(prompts) > MAX_PROMPTS_IN_MEMORY:
            return False
    return bool(prompts)


def pad_condition(
    embeds: Union[torch.Tensor, Sequence[torch.Tensor]], length: int, mask: Optional[torch.Tensor] = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad text of variable length, since conditions must have one length throughout a run.

    Args:
        embeds: (B, L, D), or a list of (L, D) of different lengths.
        length: --max_sequence_length.
        mask: (B, L), nonzero where `embeds` is text (default: everywhere).
    Returns:
        Embeds (B, length, D), zeros behind the text of each row; mask (B, length), bool, true for text.
    Raises:
        UserError: a prompt is longer than `length`.
    """
    texts = (
        list(embeds) if mask is None else [text[is_text.bool()] for text, is_text in zip(embeds, mask, strict=True)]
    )
    longest = max(map(len, texts))
    if longest > length:
        problem = f"a prompt has {longest} tokens; raise it, or shorten the prompt"
        raise UserError(f"--max_sequence_length {length}: {problem}")
    padded = torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in texts])
    lengths = torch.tensor([len(text) for text in texts], device=padded.device)
    return padded, torch.arange(length, device=padded.device) < lengths[:, None]
