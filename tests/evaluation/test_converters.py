"""Published files of HPS v2.1 and ImageReward: the scores that their own code computes, and files that are refused.

`python benchmarks/scorer_parity.py original DIR --tiny --layers 2` printed the scores, with open_clip and ImageReward.
"""

import pytest
import torch
from published_files import (
    SIZES,
    hpsv2_config,
    hpsv2_weights,
    image_by_formula,
    imagereward_config,
    imagereward_weights,
)
from transformers import CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from senseflow.errors import UserError
from senseflow.evaluation.converters import (
    HPSV2_CONFIG,
    IMAGEREWARD_CONFIG,
    ImageReward,
    hpsv2_pixels,
    imagereward_pixels,
    load_published,
)


def test_hpsv2_has_the_scores_of_open_clip(tmp_path):
    torch.save({"epoch": 1, "state_dict": hpsv2_weights()}, tmp_path / "hps.pt")
    model = load_published("--hpsv2", tmp_path / "hps.pt", CLIPModel(hpsv2_config()))
    tokens = torch.tensor([[38, 3, 5, 39, 0, 0, 0, 0], [38, 9, 3, 7, 2, 39, 0, 0]])
    pixels = torch.stack([hpsv2_pixels(28, image_by_formula(size)) for size in (SIZES[0], SIZES[2])])
    with torch.no_grad():
        outputs = model(input_ids=tokens, pixel_values=pixels)
    scores = (outputs.image_embeds * outputs.text_embeds).sum(1)
    assert scores.tolist() == pytest.approx([-0.3692439794540405, -0.5273345112800598], abs=1e-5)


def test_imagereward_has_the_scores_of_its_own_code(tmp_path):
    torch.save(imagereward_weights(), tmp_path / "imagereward.pt")
    network = load_published("--imagereward", tmp_path / "imagereward.pt", ImageReward(imagereward_config()))
    tokens = [[30, 16, 15, 4, 26, 31, 17, 26, 5, 31, 39, 12], [4, 22, 11, 27, 19, 28, 39, 34, 39, 3, 36, 36]]
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    pixels = torch.stack([imagereward_pixels(32, image_by_formula(size)) for size in SIZES[:2]])
    with torch.no_grad():
        scores = network(pixels, torch.tensor(tokens), mask)
    assert scores.tolist() == pytest.approx([1.1821677684783936, 1.1881552934646606], abs=1e-4)


def test_published_sizes():
    """The numbers of weights of open_clip's ViT-H-14, and of BLIP large with ImageReward's head."""
    with torch.device("meta"):
        networks = CLIPModel(HPSV2_CONFIG), ImageReward(IMAGEREWARD_CONFIG)
    clip, reward = (sum(weight.numel() for weight in network.parameters()) for network in networks)
    assert clip == 986_109_441
    head = sum(
        inputs * outputs + outputs for inputs, outputs in ((768, 1024), (1024, 128), (128, 64), (64, 16), (16, 1))
    )
    vision = 24 * (12 * 1024**2 + 13 * 1024) + (3 * 16**2 + 1) * 1024 + (197 + 1) * 1024 + 2 * 1024
    cross = 2 * (768 * 768 + 768) + 2 * (1024 * 768 + 768) + 2 * 768
    text = 12 * (12 * 768**2 + 13 * 768 + cross) + (30524 + 512 + 2) * 768
    assert reward == head + vision + text


@pytest.mark.parametrize("size", [(28, 28), (40, 20), (13, 30)])
def test_pixels_by_hand(size):
    """Where nothing is scaled, hpsv2_pixels are the image's, normalized, and black around it."""
    image = image_by_formula(size)
    pixels = hpsv2_pixels(max(size), image)
    mean, std = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1), torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    top, left = (max(size) - size[1]) // 2, (max(size) - size[0]) // 2
    inside = pixels[:, top : top + size[1], left : left + size[0]]
    assert ((inside * std + mean) * 255).round().byte().permute(1, 2, 0).flatten().tolist() == list(image.tobytes())
    area = max(size) ** 2 - size[0] * size[1]
    torch.testing.assert_close(pixels.sum() - inside.sum(), area * (-mean / std).sum(), rtol=1e-3, atol=1e-2)
    assert imagereward_pixels(9, image).shape == (3, 9, 9)


@pytest.mark.parametrize("name", ["hpsv2", "imagereward"])
def test_other_weights_are_refused(name, tmp_path):
    file = tmp_path / "file.pt"
    state = {"hpsv2": hpsv2_weights, "imagereward": imagereward_weights}[name]()
    network = {"hpsv2": lambda: CLIPModel(hpsv2_config()), "imagereward": lambda: ImageReward(imagereward_config())}[
        name
    ]()

    def is_refused(changed, message):
        torch.save(changed, file)
        with pytest.raises(UserError, match=rf"--{name} {file}: cannot be loaded \(.*{message}") as caught:
            load_published(f"--{name}", file, network)
        assert caught.value.exit_code == 2

    last = sorted(name for name in state if name.endswith("2.bias"))[-1]
    is_refused({name: tensor for name, tensor in state.items() if name != last}, "Missing key")
    is_refused(state | {"visual.more": torch.zeros(1)}, "Unexpected key.*visual.more")
    is_refused(state | {last: torch.zeros(3)}, "size mismatch")
    is_refused({"state_dict": 3}, "")
    file.write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_published(f"--{name}", file, network)
