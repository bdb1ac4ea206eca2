"""tests/stock_call.py fails for ports that are wrong without a word, and says what is wrong."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline, LCMScheduler

import train_senseflow_flux
import train_senseflow_sdxl
from helpers import built
from senseflow_utils import Prediction, guide
from stock_call import assert_called_as_stock
from tiny_pipelines import write_sdxl


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
    """Return {family: run} of `built`."""
    folder = tmp_path_factory.mktemp("ports")
    write_sdxl(folder / "sdxl")
    (folder / "prompts.txt").write_text("a red square\n")
    flags = ["--prompts_file", str(folder / "prompts.txt"), "--gan_weight", "0", "--backward_simulation_prob", "1"]
    flags += ["--resolution", "64", "--validation_prompts", "a", "--output_dir", str(folder), "--report_to", "none"]
    flags += ["--gradient_checkpointing"]
    path = "--pretrained_model_name_or_path"
    return {
        "sdxl": built(train_senseflow_sdxl, [*flags, path, str(folder / "sdxl")]),
        "flux": built(train_senseflow_flux, [*flags, path, str(teacher), "--max_sequence_length", "32"]),
    }


def unpacked(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._unpack_latents(latents, 64, 64, 8)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong ports: wrong(run, patch) changes a run; patch(object, name, replacement) is undone afterwards
# ---------------------------------------------------------------------------------------------------------------------
def change_output(change):
    """Change what the network of a role returns."""

    def wrong(run, patch):
        predict = run.models.predict

        def predicted(role, x_t, t, condition, guidance=None):
            output = change(predict(role, x_t, t, condition, guidance).output)
            return run.schedule.as_prediction(x_t, output, t)

        patch(run.models, "predict", predicted)

    return wrong


def change_time(run, patch):
    predict = run.models.predict
    patch(run.models, "predict", lambda role, x_t, t, *args: predict(role, x_t, t / 1000, *args))


def change_condition(change):
    def wrong(run, patch):
        encode = run.models.encode_prompts
        patch(run.models, "encode_prompts", lambda prompts: change(run.models, encode(prompts)))

    return wrong


def change_prompts(change):
    def wrong(run, patch):
        encode = run.models.encode_prompts
        patch(run.models, "encode_prompts", lambda prompts: encode([change(prompt) for prompt in prompts]))

    return wrong


def another_layer(run, patch):
    other = partial(run.pipeline.encode_prompt, clip_skip=1)  # a stock call sets clip_skip
    patch(run.pipeline, "encode_prompt", other)


def first_prompt_only(run, patch):
    patch(run.models, "encode_prompts", lambda prompts: run.models.__class__.encode_prompts(run.models, prompts[:1]))


def empty_prompt(run, patch):
    patch(run.models, "empty_condition", run.models.encode_prompts([""]))


def guided_off_by_one(run, patch):
    patch(run.models, "guide", lambda u, c, scale: guide(u, c, scale + 1))


def swapped_pair(run, patch):
    convert = run.schedule.as_prediction

    def swapped(x_t, output, t):
        output, x0, noise = convert(x_t, output, t)
        return Prediction(output, noise, x0)

    patch(run.schedule, "as_prediction", swapped)


def swapped_pair_and_target(run, patch):
    swapped_pair(run, patch)
    add_noise = run.schedule.add_noise
    patch(run.schedule, "add_noise", lambda x0, noise, t: add_noise(noise, x0, t))
    patch(run.schedule, "target", lambda x0, noise, t: x0)


def target_sign(run, patch):
    patch(run.schedule, "target", lambda x0, noise, t: x0 - noise)


def shifted_levels(run, patch):
    def levels(t):
        sigma = t.double() / 1000
        sigma = 3 * sigma / (1 + 2 * sigma)
        return 1 - sigma, sigma

    patch(run.schedule, "levels", levels)


def shifted_table(run, patch):
    sigma = run.schedule.train_timesteps / 1000
    patch(run.schedule, "train_timesteps", 1000 * 3 * sigma / (1 + 2 * sigma))


def other_betas(run, patch):
    patch(run.schedule, "abar", torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0))


def exported_as_v(run, patch):
    config = run.pipeline.scheduler.config
    patch(run.pipeline, "scheduler", LCMScheduler.from_config(config, prediction_type="v_prediction"))


def decode_unscaled(run, patch):
    patch(run.models, "decode", lambda x0: run.models.vae.decode(x0, return_dict=False)[0])


def fold_otherwise(run, patch):
    patch(run.models, "fold", lambda latents: latents.roll(1, 1))


def pack_otherwise(run, patch):
    """Tokens are (p, p, C), in what the network takes and in what it returns."""

    def permuted(latents, rows, columns):  # channels of folded squares, from (rows, columns) to (columns, rows)
        squares = F.pixel_unshuffle(latents, 2).unflatten(1, (rows, columns))
        return F.pixel_shuffle(squares.transpose(1, 2).flatten(1, 2), 2)

    predict, channels = run.models.predict, run.models.latent_shape[0]

    def predicted(role, x_t, t, *args):
        output = predict(role, permuted(x_t, channels, 4), t, *args).output
        return run.schedule.as_prediction(x_t, permuted(output, 4, channels), t)

    patch(run.models, "predict", predicted)


def ragged(models, condition):
    embeds, *rest = condition
    return embeds[:, : 30 + len(embeds)], *rest


def drops_out(run, patch):
    student, call = run.models.student, type(run.models.student).__call__
    patch(type(student), "__call__", lambda role, *a, **k: tuple(
        F.dropout(output, 0.1, role.module.training) for output in call(role, *a, **k)
    ))  # fmt: skip


def recomputed_without_positions(run, patch):
    patch(run.models.student.module, "_gradient_checkpointing_func", lambda block, *inputs: block(*inputs[:3]))


def frozen_layer(run, patch):
    student = run.models.student
    extra = {"unused.weight": torch.nn.Parameter(torch.zeros(1))}
    patch(student, "parameters", {**student.parameters, **extra})


WRONG = {
    "sign of the output": ("sdxl", change_output(torch.neg), "predict is not the stock call's output"),
    "time from 0 to 1": ("flux", change_time, "predict is not the stock call's output"),
    "order of a packed square": ("flux", pack_otherwise, "predict is not the stock call's output"),
    "guidance that counts from 0": ("sdxl", guided_off_by_one, "predict is not the stock call's output"),
    "unconditional prompt": ("sdxl", empty_prompt, "predict is not the stock call's output"),
    "layer of the embeddings": ("sdxl", another_layer, "predict is not the stock call's output"),
    "text that is cut": (
        "flux",
        change_condition(lambda models, condition: (condition[0] * (torch.arange(32) < 8)[:, None], condition[1])),
        "predict is not the stock call's output",
    ),
    "lower case": ("flux", change_prompts(str.lower), "predict is not the stock call's output"),
    "one condition for all": ("sdxl", first_prompt_only, "a condition has another length"),
    "text of variable length": ("flux", change_condition(ragged), "predict is not|shapes of a condition"),
    "pair swapped": ("sdxl", swapped_pair, "as_prediction does not find the x0"),
    "pair swapped everywhere": ("sdxl", swapped_pair_and_target, "x0 at the last anchor"),
    "sign of the target": ("flux", target_sign, "as_prediction does not find the x0"),
    "shift applied twice": ("flux", shifted_levels, "the schedule's alpha is not that of"),
    "another shift of the table": ("flux", shifted_table, "train_timesteps are not those of"),
    "levels of other betas": ("sdxl", other_betas, "the schedule's alpha is not that of"),
    "prediction of the saved scheduler": ("sdxl", exported_as_v, "x0 at the last anchor"),
    "scale of the VAE": ("sdxl", decode_unscaled, "decode is not the stock call's image"),
    "order of a fold": ("sdxl", fold_otherwise, "fold does not undo unfold"),
    "dropout": ("flux", drops_out, "predict differs inside a training turn"),
    "recomputed blocks": ("flux", recomputed_without_positions, "predict differs inside a training turn"),
    "sizes": ("flux", lambda run, patch: patch(run.models, "pixel_multiple", lambda source: 8), "pixel_multiple is 8"),
    "a tensor without gradient": ("sdxl", frozen_layer, "without gradient: .'unused.weight'."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_port_is_found(case, runs, monkeypatch):
    family, wrong, message = WRONG[case]
    run = runs[family]
    wrong(run, lambda owner, name, value: monkeypatch.setattr(owner, name, value))
    with pytest.raises(AssertionError, match=message):
        call = run.pipeline_kwargs | {"guidance_scale": 5.0}
        assert_called_as_stock(run, call, 5.0, unpacked if family == "flux" else lambda latents: latents)
