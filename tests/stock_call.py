"""Compare a script's network call and noise levels with a recorded call of the stock pipeline.

For a script of your own, in a test:

    run = built(script, [...])  # of tests/helpers.py: the script, its command line
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 4.0}, scale=4.0)   # guided
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 1.0}, scale=None)  # not guided

`pipeline_kwargs` are in the units of the pipeline (`true_cfg_scale=4.0, negative_prompt=" "`; a guidance that counts
from 0), `scale` in those of the script, as --dmd_guidance_scale. Networks must be in float32.
"""

from typing import Callable, Optional

import torch

from senseflow_utils import Guidance


PROMPTS = ["a red square", "two cats and a very old house"]  # of different lengths, so that an attention mask matters


def recorded_steps(pipeline, **call) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Record (sample, timestep, output after guidance), the scheduler's inputs, in each step of a stock call."""
    steps, step = [], pipeline.scheduler.step

    def spy(model_output, timestep, sample, *args, **kwargs):
        steps.append((sample.clone(), torch.as_tensor(timestep), model_output.clone()))
        return step(model_output, timestep, sample, *args, **kwargs)

    pipeline.scheduler.step = spy
    try:
        pipeline(**call, output_type="latent")
    finally:
        pipeline.scheduler.step = step
    return steps


@torch.no_grad()
def assert_called_as_stock(
    run,
    pipeline_kwargs: dict,
    scale: Optional[float],
    as_x0: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents,
) -> None:
    """Check that a stock call visits the anchors and that `predict` gives its outputs, for one prompt and for two.

    Args:
        run: of `helpers.built`; the pipeline has the scheduler that the script exports.
        pipeline_kwargs: of the stock call, without the prompt; a text, such as a negative prompt, is given with each.
        scale: guidance scale in the script's units; None if the teacher is asked without guidance.
        as_x0: turns the stock pipeline's latents (packed into tokens, or with a frame axis) into (B, C, H, W).
    """
    models, pipeline = run.models, run.pipeline
    pipeline.set_progress_bar_config(disable=True)
    for prompts in (PROMPTS[:1], PROMPTS):
        texts = {name: [text] * len(prompts) for name, text in pipeline_kwargs.items() if isinstance(text, str)}
        steps = recorded_steps(pipeline, prompt=list(prompts), **pipeline_kwargs | texts)
        visited = torch.stack([timestep.double() for _, timestep, _ in steps])
        torch.testing.assert_close(visited, models.schedule.anchors, rtol=0, atol=1e-2)
        condition = models.encode_prompts(tuple(prompts))
        assert all(len(tensor) == len(prompts) for tensor in condition)
        guidance = None if scale is None else Guidance(torch.full((len(prompts),), scale), scale > 1)
        for sample, timestep, wanted in steps:
            x_t, t = as_x0(sample).float(), timestep.double().expand(len(prompts))
            assert x_t.shape[1:] == models.latent_shape
            output = models.predict(models.teacher, x_t, t, condition, guidance).output
            torch.testing.assert_close(output, as_x0(wanted).float(), rtol=1e-4, atol=1e-4)
            if len(prompts) > 1:  # a network that ignores its condition would pass so far
                swapped = tuple(tensor.flip(0) for tensor in condition)
                other = models.predict(models.teacher, x_t, t, swapped, guidance).output
                assert (other - output).abs().mean() > 1e-3
