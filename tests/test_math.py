"""Every formula of senseflow_utils against a closed form or a reference in float64."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from senseflow_utils import (
    DDPMSchedule,
    FlowSchedule,
    Prediction,
    StatelessRNG,
    adversarial_loss,
    backward_simulation,
    denoising_loss,
    dmd_loss,
    guide,
    hinge_loss,
    ida_update,
    isg_loss,
    isg_target,
    logistic_loss,
    non_saturating_loss,
    sampler_step,
)


SDXL = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (3, 4, 5)


def flow(**kwargs) -> FlowSchedule:
    return FlowSchedule(torch.arange(1000, 0, -1), (1000, 904.5, 759.5, 512.8), **kwargs)


def ddpm(scheduler: DDPMScheduler = SDXL, **kwargs) -> DDPMSchedule:
    prediction_type = scheduler.config.prediction_type
    anchors = (999, 749, 499, 249)
    return DDPMSchedule(
        scheduler.alphas_cumprod, torch.arange(1000), anchors, prediction_type=prediction_type, **kwargs
    )


def randn(*shape, seed=0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def levels_of(family: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(alpha, sigma) in float64, written down a second time, shaped for (B, 3, 4, 5)."""
    if family == "flow":
        alpha, sigma = 1 - t / 1000, t / 1000
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = torch.cumprod(1 - betas, 0) ** 0.5
        if family == "v, zero SNR":  # Lin et al., 2023, arXiv 2305.08891: sqrt(abar) is shifted and scaled
            alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
        alpha = alphas[t.long()]
        sigma = (1 - alpha**2) ** 0.5
    return alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)


V = DDPMScheduler.from_config(SDXL.config, prediction_type="v_prediction")
ZERO_SNR = DDPMScheduler.from_config(V.config, rescale_betas_zero_snr=True)
FAMILIES = {"flow": flow, "epsilon": ddpm, "v": partial(ddpm, V), "v, zero SNR": partial(ddpm, ZERO_SNR)}
DDPM_TIMES = torch.tensor([999.0, 749.0, 249.0, 20.0, 0.0], dtype=torch.float64)
TIMES = dict.fromkeys(FAMILIES, DDPM_TIMES)
TIMES["flow"] = torch.tensor([1000.0, 904.5, 512.8, 20.0, 1.0], dtype=torch.float64)
all_families = pytest.mark.parametrize("family", FAMILIES)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------
@all_families
def test_noising_mixes_each_sample_at_its_own_level(family):
    t, x0, noise = TIMES[family], randn(5, *SHAPE), randn(5, *SHAPE, seed=1)
    alpha, sigma = levels_of(family, t)
    x_t = FAMILIES[family]().add_noise(x0, noise, t)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, (alpha * x0 + sigma * noise).float(), rtol=1e-6, atol=1e-6)


@all_families
def test_the_exact_output_splits_into_the_pair_that_made_x_t(family):
    schedule, t, x0, noise = FAMILIES[family](), TIMES[family], randn(5, *SHAPE), randn(5, *SHAPE, seed=1)
    alpha, sigma = levels_of(family, t)
    output = schedule.target(x0, noise, t)
    expected = {"flow": noise - x0, "epsilon": noise}.get(family, (alpha * noise - sigma * x0).float())
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    prediction = schedule.as_prediction(schedule.add_noise(x0, noise, t), output, t)
    torch.testing.assert_close(prediction.output, output)
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(prediction.noise, noise, rtol=1e-5, atol=1e-5)


@all_families
def test_split_of_any_output_is_a_pair_of_x_t_and_carries_its_gradient(family):
    t, x_t = TIMES[family], randn(5, *SHAPE)
    output = randn(5, *SHAPE, seed=1).requires_grad_()
    alpha, sigma = levels_of(family, t)
    prediction = FAMILIES[family]().as_prediction(x_t, output, t)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.noise, x_t.double(), rtol=1e-5, atol=1e-5)
    prediction.x0.sum().backward()
    slope = -sigma / alpha if family == "epsilon" else -sigma
    torch.testing.assert_close(output.grad, slope.float().expand_as(output), rtol=1e-4, atol=0)


def test_a_flow_s_solver_step_is_euler():
    schedule, x_t, velocity = flow(), randn(5, *SHAPE), randn(5, *SHAPE, seed=1)
    t, t_next = TIMES["flow"], torch.tensor([904.5, 300.0, 0.0, 10.0, 0.0], dtype=torch.float64)
    stepped = schedule.step(schedule.as_prediction(x_t, velocity, t), t_next)
    expected = x_t + ((t_next - t) / 1000).view(-1, 1, 1, 1) * velocity
    torch.testing.assert_close(stepped, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheduler", [SDXL, V, ZERO_SNR])
def test_ddpm_s_solver_step_is_ddim(scheduler):
    schedule, x_t, output = ddpm(scheduler), randn(1, *SHAPE), randn(1, *SHAPE, seed=1)
    ddim = DDIMScheduler.from_config(
        scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing"
    )
    ddim.set_timesteps(4)  # 999 749 499 249
    for t in (999, 749, 499):
        stepped = schedule.step(schedule.as_prediction(x_t, output, torch.tensor([t])), torch.tensor([t - 250]))
        torch.testing.assert_close(stepped, ddim.step(output, t, x_t, eta=0.0).prev_sample, rtol=1e-4, atol=1e-5)


def test_noise_alone_has_an_x0_if_the_network_predicts_v():
    """At the last level of a schedule with zero terminal SNR, v is -x0 and the noise is x_t itself."""
    schedule, noise, v = ddpm(ZERO_SNR), randn(1, *SHAPE), randn(1, *SHAPE, seed=1)
    assert [level.item() for level in schedule.levels(torch.tensor([999]))] == [0, 1]
    prediction = schedule.as_prediction(noise, v, torch.tensor([999.0]))
    assert torch.equal(prediction.x0, -v) and torch.equal(prediction.noise, noise)


def test_a_step_back_to_the_same_level_changes_nothing():
    for family, make in FAMILIES.items():
        schedule, x_t, t = make(), randn(5, *SHAPE), TIMES[family]
        prediction = schedule.as_prediction(x_t, randn(5, *SHAPE, seed=1), t)
        torch.testing.assert_close(schedule.step(prediction, t), x_t, rtol=1e-5, atol=1e-5)


def test_an_anchor_is_followed_by_the_next_and_the_last_by_the_end():
    assert flow().anchors.tolist() == [1000, 904.5, 759.5, 512.8]
    assert flow().next_timesteps.tolist() == [904.5, 759.5, 512.8, 0]
    assert flow(final=3.0).next_timesteps.tolist() == [904.5, 759.5, 512.8, 3]


# ---------------------------------------------------------------------------------------------------------------------
# Draws of timesteps
# ---------------------------------------------------------------------------------------------------------------------
def test_flux_draws_timesteps_logit_normally_from_the_teacher_s_table():
    rng, sample_indices = StatelessRNG(0, 0), range(4000)
    for name, student_samples in (
        ("dmd_timestep", flow().draw_dmd_timesteps(rng, sample_indices)),
        ("fake_timestep", flow().draw_fake_timesteps(rng, sample_indices)),
    ):
        u = torch.sigmoid(rng.normal(name, sample_indices))
        assert torch.equal(student_samples, 1000 - torch.floor(1000 * u).double())  # sigma = 1 - floor(1000 u) / 1000
    # P(sigma > 0.75) = P(z < logit 0.25) = Phi(-log 3)
    share = (student_samples > 750).double().mean().item()
    assert abs(share - 0.5 * (1 + math.erf(-math.log(3) / 2**0.5))) < 0.02


def test_a_shifted_table_shows_in_what_is_drawn():
    shifted = FlowSchedule(
        1000 * 3 * torch.linspace(0.001, 1, 1000) / (1 + 2 * torch.linspace(0.001, 1, 1000)), (1000,)
    )
    student_samples = shifted.draw_dmd_timesteps(StatelessRNG(0, 0), range(1000))
    assert abs(student_samples.median().item() - 750) < 15  # the middle of the table is sigma 3 * .5 / (1 + 2 * .5)


def test_sdxl_draws_timesteps_uniformly_both_ends_included():
    schedule = ddpm(dmd_range=(20, 24), fake_range=(0, 2))
    dmd, fake = (
        schedule.draw_dmd_timesteps(StatelessRNG(0, 0), range(600)),
        schedule.draw_fake_timesteps(StatelessRNG(0, 0), range(600)),
    )
    assert torch.unique(dmd).tolist() == [20, 21, 22, 23, 24] and torch.unique(fake).tolist() == [0, 1, 2]
    assert torch.bincount(dmd.long())[20:].min() > 80 and torch.bincount(fake.long()).min() > 150


def test_t_mid_keeps_the_margin_from_both_ends_of_each_sample_s_segment():
    schedule = flow()
    index = torch.arange(2000) % 4
    t, t_next = schedule.anchors[index], schedule.next_timesteps[index]
    t_mid = schedule.draw_mid_timesteps(StatelessRNG(0, 0), range(2000), t, t_next, 20)
    assert torch.equal(t_mid, t_mid.round())
    for i, (low, high) in enumerate([(925, 980), (780, 884), (533, 739), (20, 492)]):
        own = t_mid[index == i]
        assert low <= own.min() <= low + 8 and high - 8 <= own.max() <= high
    assert (
        schedule.draw_mid_timesteps(StatelessRNG(0, 0), [0], t[:1], t[:1] - 100, 50).item() == 950
    )  # one left to draw


def test_a_margin_that_leaves_no_t_mid_is_found():
    assert flow().check_margin(20) is None and flow().check_margin(47) is None
    assert flow().check_margin(48) == (1000, 904.5)
    assert FlowSchedule(torch.arange(1, 1001), (1000, 500, 470)).check_margin(20) == (500, 470)


# ---------------------------------------------------------------------------------------------------------------------
# Guidance and samplers
# ---------------------------------------------------------------------------------------------------------------------
def test_guidance_is_per_sample_and_skipped_up_to_one():
    empty, own = randn(4, 6), randn(4, 6, seed=1)
    guided = guide(empty, own, torch.tensor([0.0, 1.0, 3.0, 8.0]))
    torch.testing.assert_close(guided[:2], own[:2])
    torch.testing.assert_close(guided[2], empty[2] + 3 * (own[2] - empty[2]))
    torch.testing.assert_close(guided[3], 8 * own[3] - 7 * empty[3])


@all_families
def test_the_stochastic_sampler_renoises_and_euler_follows(family):
    schedule = FAMILIES[family]()
    prediction = Prediction(*(randn(5, *SHAPE, seed=i) for i in range(3)))
    fresh, t_next = randn(5, *SHAPE, seed=9), TIMES[family]
    alpha, sigma = levels_of(family, t_next)
    stochastic = sampler_step(schedule, "stochastic", prediction, t_next, fresh)
    torch.testing.assert_close(stochastic, (alpha * prediction.x0 + sigma * fresh).float())
    euler = sampler_step(schedule, "euler", prediction, t_next, None)
    torch.testing.assert_close(euler, (alpha * prediction.x0 + sigma * prediction.noise).float())


@all_families
@pytest.mark.parametrize("sampler", ["stochastic", "euler"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_backward_simulation_runs_the_first_anchors_in_order(family, sampler, steps):
    schedule, noise, asked = FAMILIES[family](), randn(2, *SHAPE), []
    network = torch.nn.Linear(5, 5)

    def predict(x_t, t):
        asked.append((t.tolist(), x_t))
        return schedule.as_prediction(x_t, network(x_t), t)

    x_t = backward_simulation(predict, schedule, sampler, StatelessRNG(7, 3), [4, 9], noise, steps)
    assert not x_t.requires_grad
    assert [t for t, _ in asked] == [[anchor] * 2 for anchor in schedule.anchors[:steps].tolist()]

    expected, used = noise, []
    for i in range(steps):
        torch.testing.assert_close(asked[i][1], expected, rtol=1e-4, atol=1e-4)
        prediction = schedule.as_prediction(expected, network(expected).detach(), schedule.anchors[i].repeat(2))
        alpha, sigma = levels_of(family, schedule.anchors[i + 1].repeat(2))
        used.append(
            StatelessRNG(7, 3).normal(f"renoise_{i}", [4, 9], SHAPE) if sampler == "stochastic" else prediction.noise
        )
        expected = (alpha * prediction.x0 + sigma * used[-1]).float()
    torch.testing.assert_close(x_t, expected, rtol=1e-4, atol=1e-4)
    if sampler == "stochastic":
        assert all((a - b).abs().mean() > 0.5 for a, b in zip([noise, *used], used))  # fresh each time


# ---------------------------------------------------------------------------------------------------------------------
# L_DMD
# ---------------------------------------------------------------------------------------------------------------------
def gaussian_x0(x_t, alpha, sigma, mean, spread):
    """E[x0 | x_t] for x0 ~ N(mean, spread^2)."""
    return mean + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x_t - alpha * mean)


@all_families
def test_the_dmd_gradient_of_gaussian_scores_is_the_closed_form(family):
    """Two Gaussians of one spread s: x0_F - x0_T = sigma^2 / (alpha^2 s^2 + sigma^2) (m_F - m_T), whatever x_t is."""
    schedule, t = FAMILIES[family](), TIMES[family][:4]
    alpha, sigma = levels_of(family, t)
    student, mean_fake, mean_teacher, spread = randn(4, *SHAPE).double().requires_grad_(), 0.7, -0.4, 0.6
    x_t = schedule.add_noise(student.detach(), randn(4, *SHAPE, seed=1), t).double()
    fake = gaussian_x0(x_t, alpha, sigma, mean_fake, spread)
    teacher = gaussian_x0(x_t, alpha, sigma, mean_teacher, spread)
    loss, found = dmd_loss(student, fake, teacher)
    loss.backward()

    difference = (sigma**2 / (alpha**2 * spread**2 + sigma**2) * (mean_fake - mean_teacher)).expand_as(student)
    per_sample = torch.stack([(x0 - x0_teacher).abs().mean() for x0, x0_teacher in zip(student.detach(), teacher)])
    gradient = difference / per_sample.view(-1, 1, 1, 1)
    torch.testing.assert_close(student.grad, gradient / student.numel(), rtol=1e-4, atol=1e-9)
    assert loss.dtype == torch.float32 and found["dmd_non_finite"] == 0
    torch.testing.assert_close(loss.double(), 0.5 * gradient.square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found["signal/dmd_ratio"].double(), gradient.abs().mean(), rtol=1e-4, atol=0)
    error = ((student.detach() - fake) / per_sample.view(-1, 1, 1, 1)).abs().mean()
    torch.testing.assert_close(found["signal/fake_error"].double(), error, rtol=1e-4, atol=0)
    assert (student.grad > 0).all()  # descent moves the student from the fake's mean to the teacher's, which is lower


def test_no_gradient_enters_the_scores_and_their_equality_is_rest():
    student, fake, teacher = (randn(2, *SHAPE, seed=i).requires_grad_() for i in range(3))
    dmd_loss(student, fake, teacher)[0].backward()
    assert fake.grad is None and teacher.grad is None and student.grad.abs().min() > 0
    student.grad = None
    loss, found = dmd_loss(student, fake, fake)
    loss.backward()
    assert loss == found["signal/dmd_ratio"] == 0 and student.grad.abs().max() == 0
    assert found["signal/fake_error"].item() == pytest.approx(1)  # as good as the teacher


def test_non_finite_dmd_gradients_are_zeroed_where_they_are_and_counted_by_sample():
    student, fake, teacher = (randn(4, *SHAPE, seed=i) for i in range(3))
    student.requires_grad_()
    fake[1, 0, 0, :2] = math.nan
    fake[3, 0, 0, 0] = math.inf
    loss, found = dmd_loss(student, fake, teacher)
    loss.backward()
    assert found["dmd_non_finite"] == 2 and torch.isfinite(torch.stack([loss, *found.values()])).all()
    assert torch.equal(student.grad == 0, ~torch.isfinite(fake))
    with torch.no_grad():
        same = student.clone()
    assert dmd_loss(student, student * 1, same)[1]["dmd_non_finite"] == 4  # 0 / 0


def test_the_fake_score_s_loss_is_a_plain_mean_of_squares():
    output, target = randn(3, *SHAPE), randn(3, *SHAPE, seed=1)
    torch.testing.assert_close(denoising_loss(output, target), ((output - target) ** 2).sum() / output.numel())


# ---------------------------------------------------------------------------------------------------------------------
# ISG, adversarial losses, IDA
# ---------------------------------------------------------------------------------------------------------------------
@all_families
def test_the_isg_target_of_linear_networks_is_the_closed_form(family):
    """The teacher (0.3 x + 0.2) steps from t to t_mid; then the student (-0.5 x + 0.1) steps to t_next."""
    schedule, x_t = FAMILIES[family](), randn(3, *SHAPE).double()
    t = TIMES[family][:3]
    t_mid, t_next = t - torch.tensor([10.0, 100.0, 200.0]), t - torch.tensor([95.0, 150.0, 249.0])

    def predict(slope, offset):
        return lambda x, at: schedule.as_prediction(x, slope * x + offset, at)

    def step(x, start, end, output):
        (a, s), (b, r) = levels_of(family, start), levels_of(family, end)
        if family == "flow":
            return x + (r - s) * output
        if family == "epsilon":
            return b * (x - s * output) / a + r * output
        return (a * b + s * r) * x + (a * r - s * b) * output  # a rotation by the angle between the levels

    x_mid = step(x_t, t, t_mid, 0.3 * x_t + 0.2)
    expected = step(x_mid, t_mid, t_next, -0.5 * x_mid + 0.1)
    target = isg_target(predict(0.3, 0.2), predict(-0.5, 0.1), schedule, x_t, t, t_mid, t_next)
    torch.testing.assert_close(target, expected.float(), rtol=1e-4, atol=1e-4)


def test_isg_is_at_rest_where_student_and_teacher_share_one_straight_flow():
    schedule, x_t = flow(), randn(2, *SHAPE)
    velocity = randn(2, *SHAPE, seed=1)
    t, t_mid, t_next = (torch.full((2,), value, dtype=torch.float64) for value in (904.5, 800.0, 759.5))

    def predict(x, at):
        return schedule.as_prediction(x, velocity, at)

    target = isg_target(predict, predict, schedule, x_t, t, t_mid, t_next)
    assert isg_loss(schedule.step(predict(x_t, t), t_next), target) < 1e-8


def test_the_isg_loss_is_charbonnier_and_its_target_is_fixed():
    direct = torch.tensor([0.0, 1e-3, -3.0, 0.2]).requires_grad_()
    target = torch.zeros(4, requires_grad=True)
    loss = isg_loss(direct, target)
    expected = [math.sqrt(d**2 + 1e-6) - 1e-3 for d in (0.0, 1e-3, 3.0, 0.2)]
    torch.testing.assert_close(loss.item(), sum(expected) / 4, rtol=1e-5, atol=0)
    loss.backward()
    assert target.grad is None
    slopes = torch.tensor([0.0, 0.5**0.5, -1.0, 1.0]) / 4
    torch.testing.assert_close(direct.grad, slopes, rtol=1e-4, atol=0)


REAL = torch.tensor([[2.0, 0.0], [0.5, -1.0]])
FAKE = torch.tensor([[-3.0, 1.0], [0.0, -0.5]])
OMEGA = torch.tensor([0.25, 2.0])


def test_the_student_s_adversarial_loss():
    logits = FAKE.clone().requires_grad_()
    loss = adversarial_loss(logits, OMEGA)
    torch.testing.assert_close(loss.item(), -(0.25 * -1.0 + 2.0 * -0.25) / 2)
    loss.backward()
    torch.testing.assert_close(logits.grad, -torch.tensor([[0.25, 0.25], [2.0, 2.0]]) / 4)  # towards higher logits


def test_the_discriminator_s_hinge_loss():
    """relu before the mean over an image's logits: real (0, 1), (.5, 2); fake (0, 2), (1, .5)."""
    real, fake = REAL.clone().requires_grad_(), FAKE.clone().requires_grad_()
    loss = hinge_loss(real, fake, OMEGA)
    torch.testing.assert_close(loss.item(), (0.25 * (0.5 + 1.0) + 2.0 * (1.25 + 0.75)) / 2)
    loss.backward()
    torch.testing.assert_close(real.grad, -torch.tensor([[0.0, 0.25], [2.0, 2.0]]) / 4)
    torch.testing.assert_close(fake.grad, torch.tensor([[0.0, 0.25], [2.0, 2.0]]) / 4)


def test_ida_moves_the_fake_a_little_and_the_student_not():
    fake, student = [torch.zeros(3), torch.full((2,), 4.0)], [torch.ones(3), torch.full((2,), -6.0)]
    ida_update(fake, student, 0.97)
    torch.testing.assert_close(fake, [torch.full((3,), 0.03), torch.full((2,), 3.7)])
    torch.testing.assert_close(student, [torch.ones(3), torch.full((2,), -6.0)])


# ---------------------------------------------------------------------------------------------------------------------
# Random draws
# ---------------------------------------------------------------------------------------------------------------------
def test_a_sample_s_draw_depends_on_its_slot_and_not_on_its_company():
    whole = StatelessRNG(3, 8).normal("noise", range(6), SHAPE)
    apart = StatelessRNG(3, 8)
    apart.uniform("something", range(3))
    models = torch.cat([apart.normal("noise", [5, 2], SHAPE), apart.normal("noise", [0], SHAPE)])
    assert torch.equal(models, whole[[5, 2, 0]])
    assert len({row.sum().item() for row in whole}) == 6


@pytest.mark.parametrize("draw", ["normal", "uniform", "integers", "shared_uniform", "shared_integer"])
def test_a_draw_is_a_function_of_seed_iteration_and_name(draw):
    def value(seed=1, iteration=2, name="a"):
        rest = {"integers": ([0], 0, 10**6), "shared_uniform": (), "shared_integer": (10**6,)}.get(draw, ([0],))
        return float(getattr(StatelessRNG(seed, iteration), draw)(name, *rest))

    assert value() == value()
    assert len({value(), value(seed=2), value(iteration=1), value(name="b"), value(seed=2, iteration=1)}) == 5


def test_shared_draws_are_in_range_and_differ_from_those_of_the_samples():
    numbers = [StatelessRNG(0, i).shared_integer("steps", 4) for i in range(200)]
    assert set(numbers) == {0, 1, 2, 3}
    coins = torch.tensor([StatelessRNG(0, i).shared_uniform("coin") for i in range(1000)])
    assert 0 <= coins.min() and coins.max() < 1 and abs(coins.mean() - 0.5) < 0.03
    assert StatelessRNG(0, 0).shared_uniform("coin") != StatelessRNG(0, 0).uniform("coin", [0]).item()


def test_draws_have_their_distribution_over_slots_and_over_iterations():
    over_slots = StatelessRNG(0, 0).normal("a", range(3000), (4,))
    over_iterations = torch.cat([StatelessRNG(0, i).normal("a", [0], (4,)) for i in range(3000)])
    for numbers in (over_slots, over_iterations):
        torch.testing.assert_close(numbers.mean(0), torch.zeros(4), rtol=0, atol=0.08)
        torch.testing.assert_close(numbers.T.cov(), torch.eye(4), rtol=0, atol=0.1)
    scales = StatelessRNG(0, 0).uniform("scale", range(3000), 1.0, 8.0)
    assert scales.min() >= 1 and scales.max() < 8 and abs(scales.mean() - 4.5) < 0.15


def test_integers_take_ends_of_each_sample():
    low, high = torch.tensor([0, 10, 5]), torch.tensor([0, 12, 9])
    rows = torch.stack([StatelessRNG(0, i).integers("n", [0, 1, 2], low, high) for i in range(300)])
    assert [torch.unique(column).tolist() for column in rows.T] == [[0], [10, 11, 12], [5, 6, 7, 8, 9]]


def test_dmd2s_classifier_losses_are_logistic():
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0], requires_grad=True)
    student = sum(math.log(1 + math.exp(-value)) for value in (0.5, 3.0)) / 2
    assert non_saturating_loss(fake).item() == pytest.approx(student, rel=1e-6)
    told_apart = sum(math.log(1 + math.exp(value)) for value in (0.5, 3.0)) + sum(
        math.log(1 + math.exp(-v)) for v in (2.0, -1.0)
    )
    assert logistic_loss(real, fake).item() == pytest.approx(told_apart / 2, rel=1e-6)
    (gradient,) = torch.autograd.grad(non_saturating_loss(fake), fake)
    assert (gradient < 0).all(), "the student is pushed towards larger logits"
