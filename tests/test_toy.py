"""The whole method against known answers: a script's `train_iteration`, with a teacher that is a formula (toy.py)."""

import copy

import pytest
import torch

from senseflow.models.discriminator import diff_augment
from senseflow.training.runtime import Runtime
from senseflow_utils import StatelessRNG
from toy import (
    ANCHORS,
    FAMILIES,
    Evaluation,
    Mixture,
    ToyModels,
    distill,
    few_step_samples,
    make_args,
    make_batch,
    make_mixture,
    make_schedule,
    pretrain_mlp,
)
from train_senseflow_flux import train_iteration


both_families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: these matrices are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------------------------------------------------------
# One Gaussian per class, affine networks: the exact fixed point
# ---------------------------------------------------------------------------------------------------------------------
class Affine(torch.nn.Module):
    """Predict x0 = slope x_t + offset, with a slope per timestep and an offset per timestep and class.

    The exact network of a Gaussian has this form at every timestep, and so has the exact one-step student.
    """

    def __init__(self, teacher: Mixture):
        super().__init__()
        self.schedule, rows, dim = teacher.schedule, len(teacher.schedule.train_timesteps), teacher.shape[-1]
        self.slope = torch.nn.Parameter(torch.full((rows, dim), 0.2))
        self.offset = torch.nn.Parameter(torch.zeros(rows, teacher.num_classes, dim))

    def forward(self, x_t, t, condition):
        row = torch.searchsorted(self.schedule.train_timesteps, t.contiguous())
        x0 = self.slope[row][:, None] * x_t + self.offset[row, condition][:, None]
        alpha, sigma = (level.float().view(-1, 1, 1) for level in self.schedule.levels(t))
        return self.schedule.target(x0, (x_t - alpha * x0) / sigma, t)


def gaussian_teacher(family: str, dim: int = 4, anchors: int = 1, guided: bool = False) -> Mixture:
    """Make two classes, N(means[c], 0.5^2) each, on a table of few timesteps: the anchors and some between."""
    schedule = make_schedule(family, ANCHORS[family][:anchors])
    levels = torch.tensor([*ANCHORS[family], 850.0, 650.0, 350.0, 150.0], dtype=torch.float64)
    schedule.train_timesteps = levels.sort().values
    if family != "flow":
        schedule.dmd_range, schedule.fake_range = (0, 6), (0, 7)
    means = 0.4 * torch.randn(2, dim, generator=torch.Generator().manual_seed(3))
    return Mixture(schedule, means, torch.arange(2), 0.5, empty_mean=torch.full((dim,), 0.1) if guided else None)


@pytest.mark.parametrize(
    "family, guidance", [("flow", 1.0), ("flow", 2.5), ("epsilon", 1.0), ("epsilon", 2.5), ("v", 2.5)]
)
def test_a_gaussian_is_met_exactly(family, guidance):
    """The fixed point of one-step DMD with affine networks is the teacher's own Gaussian.

    A student x0 = A noise + b_c samples N(b_c, A^2). The fake score's optimum for it and the teacher's output are the
    exact posterior means of two Gaussians, both affine in x_t. Their difference, the gradient of L_DMD, vanishes at
    every x_t and t if and only if the Gaussians are equal: b_c = mu_c and |A| = s. Classifier-free guidance w towards
    an empty prompt of mean mu_0 and equal s is affine too, and moves only the mean: b_c = mu_0 + w (mu_c - mu_0).
    """
    teacher = gaussian_teacher(family, guided=guidance > 1)
    args = make_args(
        max_train_steps=400,
        train_batch_size=32,
        learning_rate=0.03,
        learning_rate_fake=0.05,
        dmd_guidance_scale=[guidance] * 2,
    )
    start = Affine(teacher)
    models = distill(args, teacher, start)
    condition = torch.arange(2).repeat(500)
    x0 = few_step_samples(models.student.module, teacher, condition, "stochastic", seed=5)
    empty = torch.full((4,), 0.1)
    for c in range(2):
        samples, mean = x0[condition == c].flatten(0, 1), teacher.means[c]
        if guidance > 1:
            mean = empty + guidance * (mean - empty)
        torch.testing.assert_close(samples.mean(0), mean, rtol=0, atol=0.05)
        torch.testing.assert_close(samples.std(0), torch.full((4,), 0.5), rtol=0, atol=0.05)


# ---------------------------------------------------------------------------------------------------------------------
# One iteration, written a second time
# ---------------------------------------------------------------------------------------------------------------------
def plain_descent(rate: float, rate_fake: float) -> dict:
    """Return flags that make AdamW gradient descent at these rates: epsilon is far above every second moment."""
    huge = 1e6
    return {
        "learning_rate": rate * huge,
        "learning_rate_fake": rate_fake * huge,
        "adam_epsilon": huge,
        "max_grad_norm": 1e9,
        "lr_scheduler": "constant",
    }


def descend(network, loss, rate):
    parameters = list(network.parameters())
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter -= rate * gradient


@pytest.mark.parametrize("simulated", [0, 2])
def test_an_iteration_is_the_one_written_by_hand(simulated):
    """Plain lines for a flow: backward simulation, L_DMD, L_ISG, the student's step, IDA, the fake score's step."""
    teacher = gaussian_teacher("flow", anchors=4, guided=True)
    args = make_args(
        train_batch_size=4, ttur_ratio=1, ida_decay=0.9, isg_weight=0.7, dmd_guidance_scale=[2.0, 3.0],
        isg_guidance_scale=[1.0, 4.0], **plain_descent(0.5, 0.8),
    )  # fmt: skip
    start = Affine(teacher)
    with torch.no_grad():
        start.offset.normal_(generator=torch.Generator().manual_seed(0))
    iteration = next(i for i in range(99) if StatelessRNG(0, i).shared_integer("simulated_steps", 4) == simulated)
    batch, models = make_batch(args, teacher, iteration), ToyModels(args, teacher, start)
    values, _ = train_iteration(iteration, [batch], models, args)

    rng, sample_indices, anchors = StatelessRNG(0, iteration), range(4), [*ANCHORS["flow"], 0.0]
    student, fake, condition = copy.deepcopy(start), copy.deepcopy(start), models.condition(batch)

    def normal(name):
        return rng.normal(name, sample_indices, teacher.shape)

    def sigma(t):
        return (t / 1000).float().view(-1, 1, 1)

    def at(t):
        return torch.full((4,), t, dtype=torch.float64)

    def guided(x, t, name, scales):
        w = rng.uniform(name, sample_indices, *scales).view(-1, 1, 1)
        empty = teacher(x, t, torch.full_like(condition, -1))
        return empty + w * (teacher(x, t, condition) - empty)

    x = normal("input_noise")
    with torch.no_grad():
        for i in range(simulated):
            x0 = x - sigma(at(anchors[i])) * student(x, at(anchors[i]), condition)
            x = (1 - sigma(at(anchors[i + 1]))) * x0 + sigma(at(anchors[i + 1])) * normal(f"renoise_{i}")
    t, t_next = at(anchors[simulated]), at(anchors[simulated + 1])
    velocity = student(x, t, condition)
    x0 = x - sigma(t) * velocity

    with torch.no_grad():
        rows = len(teacher.schedule.train_timesteps)
        t_dmd = teacher.schedule.train_timesteps[
            rows - 1 - (torch.sigmoid(rng.normal("dmd_timestep", sample_indices)) * rows).long()
        ]
        noised = (1 - sigma(t_dmd)) * x0 + sigma(t_dmd) * normal("dmd_noise")
        fake_x0 = noised - sigma(t_dmd) * fake(noised, t_dmd, condition)
        teacher_x0 = noised - sigma(t_dmd) * guided(noised, t_dmd, "dmd_guidance", (2.0, 3.0))
        gradient = (fake_x0 - teacher_x0) / (x0 - teacher_x0).abs().mean((1, 2), keepdim=True)

        t_mid = rng.integers("mid_timestep", sample_indices, torch.ceil(t_next + 20), torch.floor(t - 20)).double()
        x_mid = x + (sigma(t_mid) - sigma(t)) * guided(x, t, "isg_guidance", (1.0, 4.0))
        x_end = x_mid + (sigma(t_next) - sigma(t_mid)) * student(x_mid, t_mid, condition)
    direct = x + (sigma(t_next) - sigma(t)) * velocity
    isg = (((direct - x_end) ** 2 + 1e-6).sqrt() - 1e-3).mean()
    # (x0 * gradient).mean() has L_DMD's gradient.
    descend(student, (x0 * gradient).mean() + 0.7 * isg, 0.5)

    with torch.no_grad():
        for fake_weight, student_weight in zip(fake.parameters(), student.parameters()):
            fake_weight.copy_(0.9 * fake_weight + 0.1 * student_weight)
    t = teacher.schedule.train_timesteps[
        rows - 1 - (torch.sigmoid(rng.normal("fake_timestep", sample_indices)) * rows).long()
    ]
    x0, noise = x0.detach(), normal("fake_noise")
    output = fake((1 - sigma(t)) * x0 + sigma(t) * noise, t, condition)
    fake_loss = (output - (noise - x0)).square().mean()
    descend(fake, fake_loss, 0.8)

    torch.testing.assert_close(values["dmd_loss"], 0.5 * gradient.square().mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["isg_loss"], isg.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values["fake_loss"], fake_loss.detach(), rtol=1e-4, atol=1e-6)
    for role, expected in ((models.student, student), (models.fake_score, fake)):
        for name, parameter in expected.named_parameters():
            expected_change = (parameter - start.get_parameter(name)).detach()
            change = (role.module.get_parameter(name) - start.get_parameter(name)).detach()
            torch.testing.assert_close(change, expected_change, rtol=1e-3, atol=2e-6)
            assert expected_change.abs().max() > 1e-4
            assert not role.parameters[name].requires_grad and role.parameters[name].grad is None


class Critic(torch.nn.Module):
    """A linear discriminator of images, called as senseflow.models.discriminator.Discriminator is."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(24, 5)
        with torch.no_grad():
            self.linear.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(1))

    def forward(self, batches, reference, text):
        return [
            self.linear(maps[0].flatten(1)) + text * reference[0].flatten(1).mean(1, keepdim=True) for maps in batches
        ]


def test_the_adversarial_turns_are_the_ones_written_by_hand():
    """The GAN term's part of the student's step, and the discriminator's step."""
    teacher = gaussian_teacher("flow", dim=3, anchors=4)
    args = make_args(train_batch_size=4, ttur_ratio=1, gan_weight=2.0, **plain_descent(0.5, 0.8))
    iteration = next(i for i in range(99) if StatelessRNG(0, i).shared_integer("simulated_steps", 4) == 0)
    rng, sample_indices, start, critic = StatelessRNG(0, iteration), range(4), Affine(teacher), Critic()

    def decode(x0):
        return x0.mT.unflatten(2, (2, 4))

    def omega(t):
        return (0.3 + torch.arange(4) * t / 1000).float()

    batch = make_batch(args, teacher, iteration)
    batch["pixel_values"] = decode(batch["pixel_values"])
    text = torch.tensor([0.5, -0.2, 0.1, 0.4])[:, None]
    moved = {}
    for with_gan in (True, False):
        models = ToyModels(args, teacher, start)
        if with_gan:
            models.discriminator = Runtime(args).trained_role("discriminator", copy.deepcopy(critic), 0.5e6)
            models.real_images = lambda batch: batch["pixel_values"]
            models.decode, models.omega = decode, omega
            models.vision_features, models.discriminator_text = (lambda pixels: [pixels]), (lambda batch: text)
            discriminator = models.discriminator.module
        train_iteration(iteration, [batch], models, args)
        moved[with_gan] = [
            p.detach() - q.detach() for p, q in zip(models.student.module.parameters(), start.parameters())
        ]

    t = torch.full((4,), 1000.0, dtype=torch.float64)
    noise = rng.normal("input_noise", sample_indices, teacher.shape)
    condition = models.condition(batch)
    fake = diff_augment(decode(noise - start(noise, t, condition)), rng, sample_indices, "fake")
    real, reference = diff_augment(batch["pixel_values"], rng, sample_indices, "real"), [batch["pixel_values"]]

    (logits,) = critic(([fake],), reference, text)
    adversarial = -2.0 * (omega(t) * logits.mean(1)).mean()
    for together, alone, gradient in zip(
        *moved.values(), torch.autograd.grad(adversarial, start.parameters(), retain_graph=True)
    ):
        torch.testing.assert_close(together - alone, -0.5 * gradient, rtol=1e-3, atol=2e-6)
        assert gradient.abs().max() > 1e-4

    real_logits, fake_logits = critic(([real], [fake.detach()]), reference, text)
    hinge = (1 - real_logits).relu().mean(1) + (1 + fake_logits).relu().mean(1)
    expected = copy.deepcopy(critic)
    gradients = torch.autograd.grad((omega(t) * hinge).mean(), critic.parameters())
    with torch.no_grad():
        for parameter, gradient in zip(expected.parameters(), gradients):
            parameter -= 0.5 * gradient
    torch.testing.assert_close(
        dict(discriminator.named_parameters()), dict(expected.named_parameters()), rtol=1e-4, atol=2e-6
    )


def test_the_student_learns_in_every_ttur_th_iteration_and_the_fake_score_in_each():
    teacher = gaussian_teacher("flow", anchors=4)
    moved = {"student": [], "fake_score": []}
    before = {}

    def watch(iteration, models, values):
        for name in moved:
            slope = getattr(models, name).module.slope.detach().clone()
            moved[name].append(not torch.equal(before.get(name, torch.full_like(slope, 0.2)), slope))
            before[name] = slope

    distill(
        make_args(max_train_steps=6, ttur_ratio=3, train_batch_size=4, lr_scheduler="constant"),
        teacher,
        Affine(teacher),
        watch,
    )
    assert moved == {"student": [False, False, True] * 2, "fake_score": [True] * 6}


def test_without_simulation_real_latents_are_noised_to_an_anchor_per_sample():
    teacher = gaussian_teacher("epsilon", anchors=4)
    args = make_args(train_batch_size=40, backward_simulation_prob=0.0)
    models, batch, asked = ToyModels(args, teacher, Affine(teacher)), make_batch(args, teacher, 0), []
    predict = models.predict

    def recording(role, x_t, t, *rest, **kwargs):
        asked.append((role.name, x_t, t))
        return predict(role, x_t, t, *rest, **kwargs)

    models.predict = recording
    train_iteration(0, [batch], models, args)
    name, x_t, t = asked[0]
    noise = StatelessRNG(0, 0).normal("input_noise", range(40), teacher.shape)
    assert name == "student" and set(t.tolist()) == set(ANCHORS["epsilon"])
    expected = teacher.schedule.add_noise(batch["pixel_values"], noise, t)
    expected[t == 999] = noise[t == 999]  # where the sampler starts from pure noise, though abar is not 0
    torch.testing.assert_close(x_t, expected)


# ---------------------------------------------------------------------------------------------------------------------
# A mixture, four steps
# ---------------------------------------------------------------------------------------------------------------------
@both_families
def test_four_steps_come_near_the_mixture(family):
    """At four steps the student closes most of the distance between the undistilled network and exact samples.

    DMD compares the samples of all anchors together and pulls at every anchor alike, so the mode weights and the
    spread at the last anchor are near the truth and not equal to it; L_ISG (weight 0.5) keeps them closer.
    """
    teacher = make_mixture(make_schedule(family))
    network = pretrain_mlp(teacher)
    evaluation = Evaluation(teacher, network)
    assert evaluation.start["distance"] > 20 * evaluation.floor["distance"]
    models = distill(make_args(isg_weight=0.5, max_train_steps=700), teacher, network)
    result = evaluation(models.student.module)
    assert result["closed"] > 0.8
    assert result["weights"].min() > 0.7 and result["weights"].max() < 1.35
    assert abs(result["spread"] / teacher.spread - 1) < 0.2
