"""What the demo measures on a folder of images: Frechet distance, captions right, diversity within a caption.

    python demo/measure.py --prompts_file demo/out/prompts.txt --reference DIR --images DIR [DIR ...]

The judge is a small ResNet trained on clean scenes, from scratch; the distillation never sees it.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import ATTRIBUTES, RESOLUTION, labels_of, parse_caption, sample_scenes
from transformers import ResNetConfig, ResNetModel


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from senseflow.evaluation import metrics


FEATURES = 64
THUMBNAIL = 16  # px; what the diversity is measured on
OUT = Path(__file__).resolve().parent / "out"


class Judge(torch.nn.Module):
    """A ResNet with one classification head per attribute, and features that also tell how the image looks.

    The features must give back an 8 x 8 thumbnail as well as the attributes. Without that they would hold the
    caption and nothing else, and the Frechet distance would not see what the caption leaves open.
    """

    def __init__(self):
        super().__init__()
        config = ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic", num_channels=3
        )
        self.trunk = ResNetModel(config)
        self.project = torch.nn.Linear(64 * 4 * 4, FEATURES)
        self.attributes = torch.nn.Linear(FEATURES, sum(map(len, ATTRIBUTES.values())))
        self.thumbnail = torch.nn.Linear(FEATURES, 8 * 8 * 3)

    def features(self, pixels):
        """Pixels [B, 3, 64, 64] in [-1, 1] -> features [B, 64]."""
        return self.project(self.trunk(pixels).last_hidden_state.flatten(1))

    def logits(self, features):
        """Features [B, 64] -> one tensor of logits [B, classes] per attribute."""
        return self.attributes(F.relu(features)).split([len(names) for names in ATTRIBUTES.values()], dim=1)


def to_pixels(images):
    """uint8 array [N, 64, 64, 3] -> float tensor [N, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_judge(scenes=12000, epochs=4, batch_size=64, learning_rate=3e-3, seed=1234):
    """Train a `Judge` on `scenes` clean scenes; well under a minute on one core."""
    torch.manual_seed(seed)
    captions, images = zip(*sample_scenes(scenes, seed))
    pixels = to_pixels(np.stack([np.asarray(image) for image in images]))
    labels = torch.tensor([labels_of(caption) for caption in captions])
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate)
    steps = epochs * (scenes // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(scenes, (batch_size,))
        # A little noise, so that the last digit of a pixel decides nothing.
        batch = pixels[rows] + 0.03 * torch.randn(batch_size, *pixels.shape[1:])
        features = judge.features(batch)
        loss = F.mse_loss(judge.thumbnail(features), F.adaptive_avg_pool2d(batch, 8).flatten(1))
        for logits, label in zip(judge.logits(features), labels[rows].T):
            loss = loss + 0.25 * F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return judge.eval().requires_grad_(False)


def load_judge(path):
    """The judge stored at `path`, trained and stored there if it is missing."""
    if path.exists():
        judge = Judge()
        judge.load_state_dict(torch.load(path, weights_only=True))
        return judge.eval().requires_grad_(False)
    judge = train_judge()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(judge.state_dict(), path)
    return judge


def load_images(folder, count):
    """The images 0000.png ... of a folder as uint8 [count, 64, 64, 3]."""
    images = [Image.open(Path(folder) / f"{index:04d}.png").convert("RGB") for index in range(count)]
    return np.stack([np.asarray(image) for image in images])


def extract(judge, images):
    """uint8 [N, 64, 64, 3] -> (features [N, 64] float64, predicted class index per attribute [N, 3])."""
    features = torch.cat([judge.features(batch) for batch in to_pixels(images).split(250)])
    classes = torch.stack([logits.argmax(1) for logits in judge.logits(features)], dim=1)
    return features.double(), classes


def accuracy(classes, captions):
    """Share of images of which the judge reads EVERY attribute as the caption names it."""
    wanted = torch.tensor([labels_of(caption) for caption in captions])
    return (classes == wanted).all(1).double().mean().item()


def spread(images, captions):
    """Spread within a caption, one number per background: tr(C^1/2) of the images' thumbnails about their caption's mean.

    C is the within-caption covariance of 16 x 16 thumbnails (pixels in [0, 1]). Its trace would not do: stripes that
    all run in one direction but start anywhere have as much variance as stripes in all directions, only in fewer
    dimensions. The sum of the standard deviations along C's axes sees both.

    Args:
        images: uint8 array [N, 64, 64, 3].
        captions: N captions, each at least twice.

    Returns:
        dict background -> float.
    """
    side = RESOLUTION // THUMBNAIL
    thumbnails = images.reshape(len(images), THUMBNAIL, side, THUMBNAIL, side, 3).mean((2, 4)) / 255
    thumbnails = torch.from_numpy(thumbnails.reshape(len(images), -1))
    rows_of = {}
    for row, caption in enumerate(captions):
        rows_of.setdefault(caption, []).append(row)
    result = {}
    for background in ATTRIBUTES["background"]:
        groups = [rows for caption, rows in rows_of.items() if parse_caption(caption)[2] == background]
        residuals = torch.cat([thumbnails[rows] - thumbnails[rows].mean(0) for rows in groups])
        degrees_of_freedom = len(residuals) - len(groups)
        result[background] = torch.linalg.svdvals(residuals).sum().item() / degrees_of_freedom**0.5
    return result


def diversity(spread_of_these, spread_of_reference):
    """Mean over the backgrounds of the spread relative to the reference's: 1 = as diverse as the reference."""
    ratios = [spread_of_these[background] / spread_of_reference[background] for background in spread_of_reference]
    return sum(ratios) / len(ratios)


def measure(judge, images, captions, reference):
    """fd, accuracy, diversity, diversity_by_background and feature_diversity of `images` against the images `reference`."""
    features, classes = extract(judge, images)
    these, theirs = spread(images, captions), spread(reference, captions)
    reference_features = extract(judge, reference)[0]
    apart = [metrics.diversity(found, captions).mean().item() for found in (features, reference_features)]
    return {
        "fd": metrics.frechet_distance(features, reference_features),
        "accuracy": accuracy(classes, captions),
        "diversity": diversity(these, theirs),
        "diversity_by_background": {name: these[name] / theirs[name] for name in these},
        "feature_diversity": apart[0] / apart[1],  # as evaluate.py has it
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts_file", type=Path, required=True, help="the captions, one a line")
    parser.add_argument("--reference", type=Path, required=True, help="folder of the images to compare with")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders to measure")
    parser.add_argument("--judge", type=Path, default=OUT / "judge.pt", help="trained and stored here if missing")
    args = parser.parse_args()
    captions = args.prompts_file.read_text().splitlines()
    judge = load_judge(args.judge)
    reference = load_images(args.reference, len(captions))
    for folder in args.images:
        print(folder, json.dumps(measure(judge, load_images(folder, len(captions)), captions, reference)))


if __name__ == "__main__":
    main()
