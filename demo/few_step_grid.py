"""Measure the teacher at few steps, over guidance and shift of the schedule: the baseline of the student.

    python demo/few_step_grid.py --steps 2 3 4 --guidance 1 1.5 2 3 --shift 1 2 3
    python demo/few_step_grid.py --steps --base_quantization 8bit 4bit    # quantized, at 28 steps

Prints one line per setting: Frechet distance to the teacher at 28 steps, captions right, diversity.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from components import MAX_SEQUENCE_LENGTH
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from measure import OUT, load_classifier, measure
from scenes import RESOLUTION, all_captions

from senseflow.models.quantization import BACKENDS, quantize_network


@torch.no_grad()
def sample(pipeline, captions, steps, guidance, shift, seed, batch_size=120):
    """Generate images of `captions`, uint8 [N, 64, 64, 3]; the noise of image i depends on (seed, i)."""
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(captions), batch_size):
        batch = captions[start : start + batch_size]
        images += pipeline(
            batch,
            height=RESOLUTION,
            width=RESOLUTION,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=[torch.Generator().manual_seed(seed * 100_000 + start + index) for index in range(len(batch))],
        ).images
    return np.stack([np.asarray(image) for image in images])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent / "teacher")
    parser.add_argument("--steps", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0])
    parser.add_argument("--shift", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    parser.add_argument("--reference_guidance", type=float, default=2.0, help="guidance of the reference, 28 steps")
    parser.add_argument(
        "--base_quantization",
        choices=BACKENDS,
        nargs="*",
        default=[],
        help="also measure the quantized teacher at 28 steps",
    )
    parser.add_argument("--images_per_caption", type=int, default=4, help="at least 2, to measure diversity")
    args = parser.parse_args()

    classifier = load_classifier(OUT / "classifier.pt")
    pipeline = FluxPipeline.from_pretrained(args.model)
    captions = all_captions() * args.images_per_caption
    reference = sample(pipeline, captions, 28, args.reference_guidance, 1.0, seed=1)

    def report(steps, guidance, shift, seed):
        images = sample(pipeline, captions, steps, guidance, shift, seed)
        result = measure(classifier, images, captions, reference)
        print(
            f"steps {steps:2d}  guidance {guidance:.2f}  shift {shift:.2f}  fd {result['fd']:7.2f}  "
            f"captions right {result['accuracy']:.3f}  diversity {result['diversity']:.2f}",
            flush=True,
        )

    print("floor: the teacher at 28 steps, other seeds")
    report(28, args.reference_guidance, 1.0, seed=2)
    transformer = pipeline.transformer
    for bits in args.base_quantization:
        print(f"the teacher at 28 steps, the same seeds, in {bits}")
        pipeline.transformer = FluxTransformer2DModel.from_pretrained(args.model, subfolder="transformer")
        quantize_network(pipeline.transformer, bits, "cpu")
        report(28, args.reference_guidance, 1.0, seed=1)
    pipeline.transformer = transformer
    for steps, guidance, shift in itertools.product(args.steps, args.guidance, args.shift):
        report(steps, guidance, shift, seed=1)


if __name__ == "__main__":
    main()
