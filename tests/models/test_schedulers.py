"""Fit schedulers to noise levels; a stock call with the saved scheduler must visit them."""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SCMScheduler,
    UniPCMultistepScheduler,
)

from senseflow.errors import UserError
from senseflow.models.hub import ModelSource
from senseflow.models.schedulers import fit_flow_scheduler, load_flow_scheduler
from train_senseflow_flux import FluxModels


TOKENS_1024 = 4096


def fit(levels, sampler="stochastic", dynamic=True):
    return fit_flow_scheduler(
        levels, lambda scheduler: FluxModels.stock_sigmas(scheduler, len(levels), TOKENS_1024), sampler, dynamic
    )


def visits(scheduler, steps: int) -> list[float]:
    """Return the levels that a stock call visits with the scheduler as a pipeline folder restores it."""
    return FluxModels.stock_sigmas(FlowMatchEulerDiscreteScheduler.from_config(scheduler.config), steps, TOKENS_1024)


def test_flux_levels_are_fitted_by_a_static_shift():
    flux = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)  # as FLUX.1-dev
    levels = FluxModels.stock_sigmas(flux, 4, TOKENS_1024)
    assert levels == pytest.approx([1, 0.9045, 0.7595, 0.5128], abs=1e-4)
    scheduler, visited = fit(levels)
    assert not scheduler.config.use_dynamic_shifting and scheduler.config.stochastic_sampling
    assert visits(scheduler, 4) == pytest.approx(visited, abs=1e-6) and visited == pytest.approx(levels, abs=1e-5)


def test_sd3_levels_are_fitted_by_a_static_shift():
    scheduler, visited = fit([1, 0.9, 0.75, 0.5], "euler")
    assert scheduler.config.shift == pytest.approx(3) and not scheduler.config.stochastic_sampling
    assert visits(scheduler, 4) == pytest.approx([1, 0.9, 0.75, 0.5], abs=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
def test_stretched_levels_are_fitted_by_a_terminal_shift(dynamic):
    shifted = [2 * s / (1 + s) for s in (1, 0.75, 0.5, 0.25)]
    levels = [1 - (1 - s) * (1 - 0.2) / (1 - shifted[-1]) for s in shifted]  # stretched to end at 0.2
    scheduler, visited = fit(levels, dynamic=dynamic)
    assert scheduler.config.use_dynamic_shifting == dynamic and scheduler.config.shift_terminal == pytest.approx(0.2)
    assert visits(scheduler, 4) == pytest.approx(visited, abs=1e-6) and visited == pytest.approx(levels, abs=1e-3)


def test_levels_that_no_shift_fits_are_returned():
    scheduler, visited = fit([1, 0.99, 0.31, 0.3])
    assert visited == pytest.approx([1, 0.99, 0.31, 0.3]) and visits(scheduler, 4) == pytest.approx(
        [1, 0.75, 0.5, 0.25]
    )


def test_one_step_needs_no_shift():
    scheduler, visited = fit([1.0])
    assert visited == [1.0] and visits(scheduler, 1) == pytest.approx([1.0])


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def loaded(scheduler, folder) -> FlowMatchEulerDiscreteScheduler:
    scheduler.save_pretrained(folder / "scheduler")
    return load_flow_scheduler(ModelSource("--pretrained_model_name_or_path", str(folder)))


@pytest.mark.parametrize("cls", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_a_multistep_teacher_is_trained_on_its_own_levels(cls, tmp_path):
    teacher = cls(flow_shift=3.0, **FLOW)
    scheduler = loaded(teacher, tmp_path)
    teacher.set_timesteps(1000)
    torch.testing.assert_close(scheduler.timesteps / 1000, teacher.sigmas[:-1], rtol=0, atol=4e-3)
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def test_flow_matching_of_another_solver_keeps_its_shift(tmp_path):
    assert loaded(FlowMatchHeunDiscreteScheduler(shift=2.0), tmp_path).config.shift == 2.0


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(),
        SCMScheduler(),  # as of Sana Sprint
        DPMSolverMultistepScheduler(use_flow_sigmas=True),
        DPMSolverMultistepScheduler(use_dynamic_shifting=True, **FLOW),
    ],
)
def test_levels_of_another_kind_are_refused(scheduler, tmp_path):
    with pytest.raises(UserError, match=f"has the levels of {type(scheduler).__name__}; give a teacher") as error:
        loaded(scheduler, tmp_path)
    assert error.value.exit_code == 2


def test_levels_of_another_spacing_are_refused(tmp_path):
    with pytest.raises(UserError, match="has use_karras_sigmas in its scheduler; give a"):
        loaded(FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), tmp_path)
