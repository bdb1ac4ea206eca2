"""Compare a script's class with recorded calls of the stock pipeline.

For a script of your own, in a test:

    # of tests/helpers.py: the script, its flags
    run = built(script, [..., "--gradient_checkpointing", "--validation_prompts", "a red square"])
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 4.0}, scale=4.0)   # guided
    assert_called_as_stock(run, run.pipeline_kwargs | {"guidance_scale": 1.0}, scale=None)  # not guided

`pipeline_kwargs` are in the units of the pipeline (`true_cfg_scale=4.0, negative_prompt=" "`; a guidance that counts
from 0), `scale` in those of the script, as --dmd_guidance_scale. Networks must be in float32. The run needs a VAE that
decodes: --validation_prompts, or --gan_weight above 0.
"""

from typing import Callable, Optional, Sequence

import diffusers
import torch

from senseflow_utils import Guidance


# Of different lengths, so that an attention mask matters; with what some pipelines clean away and others do not.
PROMPTS = ["a red square", '<b>Two</b> Cats & a "Very" old house, 50% OFF!']


def assert_close(found: torch.Tensor, wanted: torch.Tensor, what: str, atol: float = 1e-4, rtol: float = 1e-4) -> None:
    def message(difference: str) -> str:
        return f"{what}\n{difference}"

    torch.testing.assert_close(found.float(), wanted.float(), rtol=rtol, atol=atol, msg=message)


def recorded_calls(pipeline, prompts: Sequence[str], one_by_one: bool, **call):
    """Record a stock call of prompts, or one of each prompt; return what `recorded_call` does."""
    batches = [[prompt] for prompt in prompts] if one_by_one else [list(prompts)]
    recorded = []
    for batch in batches:
        texts = {name: [text] * len(batch) for name, text in call.items() if isinstance(text, str)}
        recorded.append(recorded_call(pipeline, prompt=batch, **call | texts))
    steps, last, images = zip(*recorded)
    joined = []
    for samples, timesteps, outputs in (zip(*step) for step in zip(*steps)):
        joined.append((torch.cat(samples), timesteps[0], torch.cat(outputs)))
    return joined, torch.cat(last), torch.cat(images)


def recorded_call(pipeline, **call) -> tuple[list[tuple], torch.Tensor, torch.Tensor]:
    """Record a stock call.

    Returns:
        (sample, timestep, output after guidance), the scheduler's inputs, of each step; the last latents; the images
        (B, 3, H, W) in [0, 1].
    """
    steps, latents, step = [], [], pipeline.scheduler.step

    def spy(model_output, timestep, sample, *args, **kwargs):
        steps.append((sample.clone(), torch.as_tensor(timestep), model_output.clone()))
        stepped = step(model_output, timestep, sample, *args, **kwargs)
        latents.append(stepped[0].clone())
        return stepped

    pipeline.scheduler.step = spy
    try:
        images = pipeline(**call, output_type="pt", return_dict=False)[0]
    finally:
        pipeline.scheduler.step = step
    return steps, latents[-1], images


@torch.no_grad()
def assert_called_as_stock(
    run,
    pipeline_kwargs: dict,
    scale: Optional[float],
    as_x0: Callable[[torch.Tensor], torch.Tensor] = lambda latents: latents,
    without_gradient: Sequence[str] = (),
    one_by_one: bool = False,
) -> None:
    """Check levels, prompts, network calls, x0 and images of the teacher against a stock call, and the student's turn.

    Args:
        run: of `helpers.built`; the pipeline has the scheduler that the script exports.
        pipeline_kwargs: of the stock call, without the prompt; a text, such as a negative prompt, is given with each.
        scale: guidance scale in the script's units; None if the teacher is asked without guidance.
        as_x0: turns the stock pipeline's latents (packed into tokens, or with a frame axis) into (B, C, H, W).
        without_gradient: trained tensors that no output depends on, such as a last block's text output.
        one_by_one: compare with a stock call of each prompt, for a pipeline whose call of several pads them.
    """
    models, pipeline = run.models, run.pipeline
    assert models.vae is not None, "the run has no VAE: build it with --validation_prompts"
    pipeline.set_progress_bar_config(disable=True)
    assert_levels_are_the_teachers(models)
    multiple, wanted = models.pixel_multiple(models.source), pipeline.image_processor.config.vae_scale_factor
    assert multiple % wanted == 0, f"pixel_multiple is {multiple}: the stock call rounds sizes to {wanted}"
    shapes = set()
    for prompts in (PROMPTS[:1], PROMPTS):
        steps, last, images = recorded_calls(pipeline, prompts, one_by_one, **pipeline_kwargs)
        visited = torch.stack([timestep.double() for _, timestep, _ in steps])
        assert visited.shape == models.schedule.anchors.shape, f"the stock call visits {visited.tolist()}"
        assert_close(
            visited, models.schedule.anchors, "the stock call visits other timesteps than the anchors", 1e-2, 0
        )
        condition = models.encode_prompts(tuple(prompts))
        assert all(len(tensor) == len(prompts) for tensor in condition), "a condition has another length"
        shapes.add(tuple(tensor.shape[1:] for tensor in condition))
        guidance = None if scale is None else Guidance(torch.full((len(prompts),), scale), scale > 1)
        for sample, timestep, wanted in steps:
            x_t, t = as_x0(sample).float(), timestep.double().expand(len(prompts))
            assert x_t.shape[1:] == models.latent_shape, f"{x_t.shape[1:]} is not the latent_shape"
            prediction = models.predict(models.teacher, x_t, t, condition, guidance)
            assert_close(prediction.output, as_x0(wanted), f"predict is not the stock call's output at {timestep}")
            if len(prompts) > 1:  # a network that ignores its condition would pass so far
                swapped = tuple(tensor.flip(0) for tensor in condition)
                other = models.predict(models.teacher, x_t, t, swapped, guidance).output
                assert (other - prediction.output).abs().mean() > 1e-3, "predict ignores the condition"
        # After the last step, which ends at x0 with either sampler.
        assert_close(prediction.x0, as_x0(last), "x0 at the last anchor is not what the stock call ends with", 1e-3)
        decoded = (models.decode(as_x0(last).float()) / 2 + 0.5).clamp(0, 1)
        if images.shape[1] == 4:  # over white
            images = images[:, 3:] * images[:, :3] + 1 - images[:, 3:]
        assert_close(decoded, images, "decode is not the stock call's image", 1e-3)
        assert ((images > 0) & (images < 1)).float().mean() > 0.1, "the VAE's images are black and white: rescale it"
        assert_close(models.fold(models.unfold(x_t)), x_t, "fold does not undo unfold")
    assert len(shapes) == 1, f"the shapes of a condition depend on the prompts: {shapes}"
    assert_trains_as_it_predicts(models, x_t, t, condition, without_gradient)


def assert_levels_are_the_teachers(models) -> None:
    """Check the schedule against the teacher's own scheduler, and its conversions against each other."""
    schedule, source = models.schedule, models.source
    cls = getattr(diffusers, source.read_json("scheduler/scheduler_config.json")["_class_name"])
    scheduler = source.load(cls.from_pretrained, subfolder="scheduler")
    if hasattr(scheduler, "alphas_cumprod") and scheduler.config.prediction_type != "flow_prediction":
        t, variance = torch.arange(len(scheduler.alphas_cumprod)), 1 - scheduler.alphas_cumprod.double()
        wanted = (1 - variance).sqrt(), variance.sqrt()
    else:
        if scheduler.config.get("use_flow_sigmas"):  # whose shift is not in the timesteps that it loads with
            scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        sigma = scheduler.sigmas[scheduler.sigmas > 0].double()
        t, wanted = 1000 * sigma, (1 - sigma, sigma)
        table = schedule.train_timesteps.double().sort().values
        assert_close(table, t.sort().values, f"train_timesteps are not those of the teacher's {cls.__name__}", 4)
    for name, found, level in zip(("alpha", "sigma"), schedule.levels(t), wanted):
        assert_close(found, level, f"the schedule's {name} is not that of the teacher's {cls.__name__}", 1e-3)
    table = schedule.train_timesteps
    t = torch.cat([schedule.anchors, table[torch.linspace(0, len(table) - 1, 5).long()]])
    x0, noise = torch.randn(2, len(t), *models.latent_shape)
    prediction = schedule.as_prediction(schedule.add_noise(x0, noise, t), schedule.target(x0, noise, t), t)
    for name, found, wanted in (("x0", prediction.x0, x0), ("noise", prediction.noise, noise)):
        assert_close(found, wanted, f"as_prediction does not find the {name} from which target is made", 1e-3)


def assert_trains_as_it_predicts(models, x_t, t, condition, without_gradient: Sequence[str] = ()) -> None:
    """Check that the student predicts the same inside and outside `accumulate`, and which tensors get a gradient."""
    student = models.student
    outside = models.predict(student, x_t, t, condition).output
    with torch.enable_grad(), student.accumulate():
        prediction = models.predict(student, x_t, t, condition)
        student.backward(prediction.x0.square().mean())
    assert_close(prediction.output.detach(), outside, "predict differs inside a training turn (recomputed blocks?)")
    missing = {name for name, parameter in student.parameters.items() if parameter.grad is None}
    student.optimizer.zero_grad(set_to_none=True)
    assert missing == set(without_gradient), f"trained tensors without gradient: {sorted(missing)}"
