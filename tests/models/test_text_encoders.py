"""Pad, offload and cache the embeddings of prompts."""

from types import SimpleNamespace

import pytest
import torch

from senseflow.errors import UserError
from senseflow.models import text_encoders


PROMPTS = ("a red square", "two cats and an old house", "blue")


def embeds_of(prompt: str) -> torch.Tensor:
    """Return (number of words, 3)."""
    return torch.tensor([[len(word), ord(word[0]), 1.0] for word in prompt.split()])


def longest_together(prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the left to the longest prompt, as tokenizers of language models do; return embeddings and mask."""
    texts = [embeds_of(prompt) for prompt in prompts]
    length = max(map(len, texts))
    embeds = torch.stack([torch.cat([torch.full((length - len(text), 3), 7.0), text]) for text in texts])
    return embeds, torch.stack([torch.arange(length) >= length - len(text) for text in texts]).long()


def encode(prompts) -> tuple[torch.Tensor, torch.Tensor]:
    embeds, mask = longest_together(prompts)
    return text_encoders.pad_condition(embeds, 8, mask)


def test_text_is_padded_to_one_length_with_a_mask():
    embeds, mask = encode(PROMPTS)
    assert embeds.shape == (3, 8, 3) and mask.shape == (3, 8) and mask.dtype == torch.bool
    for row, prompt in enumerate(PROMPTS):
        text = embeds_of(prompt)
        assert mask[row].tolist() == [True] * len(text) + [False] * (8 - len(text))
        assert torch.equal(embeds[row][mask[row]], text) and not embeds[row][~mask[row]].any()
    listed = text_encoders.pad_condition([embeds_of(prompt) for prompt in PROMPTS], 8)
    assert torch.equal(listed[0], embeds) and torch.equal(listed[1], mask)
    alone = text_encoders.pad_condition(embeds_of(PROMPTS[0])[None], 3)
    assert torch.equal(alone[0][0], embeds_of(PROMPTS[0])) and alone[1].all()
    with pytest.raises(UserError, match="--max_sequence_length 5: a prompt has 6 tokens"):
        text_encoders.pad_condition(*longest_together(PROMPTS)[:1], 5, longest_together(PROMPTS)[1])


def test_outputs_of_offloaded_encoders_are_on_the_device():
    """Pipelines with text of variable length return lists of tensors, and other objects."""
    encoder = torch.nn.Embedding(1, 1)
    encoder.device = encoder.weight.device  # as models of transformers have
    pipeline = SimpleNamespace(components={"text_encoder": encoder})

    def encode_prompt(prompts, device):
        return [torch.ones(len(prompt), 3, device=device) for prompt in prompts], None, torch.ones(2, device=device)

    pipeline.encode_prompt = encode_prompt
    text_encoders.place_text_encoders(SimpleNamespace(offload_text_encoders=True), pipeline, "meta")
    texts, absent, pooled = pipeline.encode_prompt(["a", "bc"], device="meta")
    assert [text.shape[0] for text in texts] == [1, 2] and absent is None
    assert {tensor.device.type for tensor in (*texts, pooled)} == {"meta"}
