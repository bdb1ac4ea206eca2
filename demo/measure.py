"""Measure a folder of the demo's images: Frechet distance, share of right captions, diversity within a caption.

    python demo/measure.py --prompts_file demo/out/prompts.txt --reference DIR --images DIR [DIR ...]

The features are those of a small ResNet trained on rendered scenes. The distillation does not use it.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scenes import ATTRIBUTES, RESOLUTION, labels_of, parse_caption, sample_scenes
from transformers import ResNetConfig, ResNetModel

from senseflow.data.prompts import read_prompts_file
from senseflow.evaluation import metrics


FEATURES = 64
THUMBNAIL = 16  # px; diversity is measured on thumbnails of this size
OUT = Path(__file__).resolve().parent / "out"


class SceneClassifier(torch.nn.Module):
    """A ResNet with one classification head per attribute, whose features also encode the rest of the image.

    A head for an 8 x 8 thumbnail makes the features encode more than the caption, so that the Frechet distance covers
    what the caption does not name.
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
        """Compute features [B, 64] of pixels [B, 3, 64, 64] in [-1, 1]."""
        return self.project(self.trunk(pixels).last_hidden_state.flatten(1))

    def logits(self, features):
        """Compute one tensor of logits [B, classes] per attribute from features [B, 64]."""
        return self.attributes(F.relu(features)).split([len(names) for names in ATTRIBUTES.values()], dim=1)


def to_pixels(images):
    """Convert a uint8 array [N, 64, 64, 3] to a float tensor [N, 3, 64, 64] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_classifier(scenes=12000, epochs=4, batch_size=64, learning_rate=3e-3, seed=1234):
    """Train a `SceneClassifier` on `scenes` rendered scenes, in less than a minute on one core."""
    torch.manual_seed(seed)
    captions, images = zip(*sample_scenes(scenes, seed))
    pixels = to_pixels(np.stack([np.asarray(image) for image in images]))
    labels = torch.tensor([labels_of(caption) for caption in captions])
    classifier = SceneClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=learning_rate)
    steps = epochs * (scenes // batch_size)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(scenes, (batch_size,))
        # Noise makes the classifier insensitive to rounding of pixels.
        batch = pixels[rows] + 0.03 * torch.randn(batch_size, *pixels.shape[1:])
        features = classifier.features(batch)
        loss = F.mse_loss(classifier.thumbnail(features), F.adaptive_avg_pool2d(batch, 8).flatten(1))
        for logits, label in zip(classifier.logits(features), labels[rows].T):
            loss = loss + 0.25 * F.cross_entropy(logits, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return classifier.eval().requires_grad_(False)


def load_classifier(path):
    """Load the classifier at `path`; train it and store it there if it is missing."""
    if path.exists():
        classifier = SceneClassifier()
        classifier.load_state_dict(torch.load(path, weights_only=True))
        return classifier.eval().requires_grad_(False)
    classifier = train_classifier()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(classifier.state_dict(), path)
    return classifier


def load_images(folder, count):
    """Load the images 0000.png ... of a folder as uint8 [count, 64, 64, 3]."""
    images = [Image.open(Path(folder) / f"{index:04d}.png").convert("RGB") for index in range(count)]
    return np.stack([np.asarray(image) for image in images])


def extract(classifier, images):
    """Return features [N, 64] (float64) and predicted class indices [N, 3] of images, uint8 [N, 64, 64, 3]."""
    features = torch.cat([classifier.features(batch) for batch in to_pixels(images).split(250)])
    classes = torch.stack([logits.argmax(1) for logits in classifier.logits(features)], dim=1)
    return features.double(), classes


def accuracy(classes, captions):
    """Return the share of images whose attributes are ALL classified as the caption names them."""
    wanted = torch.tensor([labels_of(caption) for caption in captions])
    return (classes == wanted).all(1).double().mean().item()


def spread(images, captions):
    """Compute the spread within captions for each background: tr(C^1/2).

    C is the within-caption covariance of 16 x 16 thumbnails (pixels in [0, 1]). The trace of C is not enough: stripes
    of one direction and any phase have as much variance as stripes of all directions, only in fewer dimensions. The
    sum of the standard deviations along the axes of C reflects both.

    Args:
        images: uint8 array [N, 64, 64, 3].
        captions: N captions, each at least twice.

    Returns:
        {background: spread}
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


def diversity(spreads, reference_spreads):
    """Return the spread relative to the reference, mean over the backgrounds: 1 = as diverse as the reference."""
    ratios = [spreads[background] / reference_spreads[background] for background in reference_spreads]
    return sum(ratios) / len(ratios)


def measure(classifier, images, captions, reference):
    """Compare `images` with the images `reference`; both have the captions `captions`.

    Returns:
        dict of fd, accuracy, diversity, diversity_by_background and feature_diversity (as in evaluate.py).
    """
    features, classes = extract(classifier, images)
    spreads, reference_spreads = spread(images, captions), spread(reference, captions)
    reference_features = extract(classifier, reference)[0]
    feature_diversity = metrics.diversity(features, captions).mean().item()
    reference_diversity = metrics.diversity(reference_features, captions).mean().item()
    return {
        "fd": metrics.frechet_distance(features, reference_features),
        "accuracy": accuracy(classes, captions),
        "diversity": diversity(spreads, reference_spreads),
        "diversity_by_background": {name: spreads[name] / reference_spreads[name] for name in spreads},
        "feature_diversity": feature_diversity / reference_diversity,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts_file", type=Path, required=True, help="captions, one per line")
    parser.add_argument("--reference", type=Path, required=True, help="folder of images to compare with")
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders to measure")
    parser.add_argument(
        "--classifier", type=Path, default=OUT / "classifier.pt", help="trained and stored here if it is missing"
    )
    args = parser.parse_args()
    captions = [prompt for prompt in read_prompts_file(args.prompts_file) if prompt]
    classifier = load_classifier(args.classifier)
    reference = load_images(args.reference, len(captions))
    for folder in args.images:
        print(folder, json.dumps(measure(classifier, load_images(folder, len(captions)), captions, reference)))


if __name__ == "__main__":
    main()
