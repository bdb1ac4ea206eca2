"""Is the network called as the stock pipeline calls it, and where it was trained? The stock call is recorded; a script's levels and
`predict` are compared with it.

For a script of your own (`test_the_network_is_called_as_the_stock_pipeline_calls_it` of the three scripts' tests shows it whole):

    args = script.parse_args([...])
    script.check_args(args)
    schedule, scheduler, call = script.make_schedule(args, "cpu")
    parts, pipeline = script.load_parts(args, Runtime(args), schedule)
    pipeline.register_modules(scheduler=scheduler)
    assert_called_as_stock(parts, schedule, pipeline, call | {"guidance_scale": 4.0}, scale=4.0)    # guided
    assert_called_as_stock(parts, schedule, pipeline, call | {"guidance_scale": 1.0}, scale=None)   # not guided

`call` is in the pipeline's own words (`true_cfg_scale=4.0, negative_prompt=" "`; a guidance that is counted from 0), `scale` in the
script's: what `--dmd_guidance_scale` would say. Networks must be in float32.
"""

from typing import Callable, Optional

import torch

from senseflow_utils import Guidance, Schedule


PROMPTS = ["a red square", "two cats and a very old house"]  # of different length, which an attention mask must show


def recorded_steps(pipeline, **call) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(sample, timestep, output after guidance) of each step of a stock call, as its scheduler is told them."""
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
    models,
    schedule: Schedule,
    pipeline,
    call: dict,
    scale: Optional[float],
    as_x0: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents,
) -> None:
    """A stock call, for one prompt and for two, visits the anchors, and the teacher says there what it says in the call.

    Args:
        parts, schedule: what the script's `load_parts` and `make_schedule` made; `pipeline` with the scheduler that it saves.
        call: of the stock pipeline, without the prompt; a text in it, as a negative prompt is, is given with each.
        scale: guidance in the script's units; None where the teacher is asked without.
        as_x0: the stock pipeline's latents (packed into tokens, or with a frame axis) to (B, C, H, W).
    """
    pipeline.set_progress_bar_config(disable=True)
    for prompts in (PROMPTS[:1], PROMPTS):
        texts = {name: [text] * len(prompts) for name, text in call.items() if isinstance(text, str)}
        steps = recorded_steps(pipeline, prompt=list(prompts), **call | texts)
        visited = torch.stack([timestep.double() for _, timestep, _ in steps])
        torch.testing.assert_close(visited, schedule.anchors, rtol=0, atol=1e-2)
        condition = models.encode_prompts(tuple(prompts))
        assert all(len(part) == len(prompts) for part in condition)
        guidance = None if scale is None else Guidance(torch.full((len(prompts),), scale), scale > 1)
        for sample, timestep, wanted in steps:
            x_t, t = as_x0(sample).float(), timestep.double().expand(len(prompts))
            assert x_t.shape[1:] == models.latent_shape
            output = models.predict(models.teacher, x_t, t, condition, guidance).output
            torch.testing.assert_close(output, as_x0(wanted).float(), rtol=1e-4, atol=1e-4)
            if len(prompts) > 1:  # none of this would be seen in a network that does not look
                swapped = models.predict(
                    models.teacher, x_t, t, tuple(part.flip(0) for part in condition), guidance
                ).output
                assert (swapped - output).abs().mean() > 1e-3
