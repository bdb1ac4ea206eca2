# Copyright 2026 The SenseFlow-scripts authors. Licensed under the Apache License, Version 2.0.
"""The mathematics of SenseFlow (Ge et al., ICLR 2026, arXiv 2506.00523): tensors in, tensors out.

No function depends on a network, a pipeline or a device layout. The notation is the same in every script:

    x0        clean latent                         (B, C, H, W), or any (B, ...)
    noise     standard normal, the shape of x0
    x_t       alpha(t) x0 + sigma(t) noise
    t         timestep in [0, 1000], one per sample  (B,)
    anchors   the few timesteps at which the student is run, largest first
    output    what a network returns: velocity = noise - x0 (rectified flow), epsilon = noise or
              v = alpha noise - sigma x0 (DDPM)

Every loss is written on (x0, noise) pairs, so that the same code serves both families; `FlowSchedule` and
`DDPMSchedule` turn a network's output into such a pair.
"""

import hashlib
import math
from typing import NamedTuple, Optional, Sequence, Union

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------------------------------------------------------------
# Random draws
# ---------------------------------------------------------------------------------------------------------------------
class StatelessRNG:
    """Draw all random numbers of one training iteration, without any state.

    A shared number is a function of (seed, iteration, name): it is the same on all ranks, for decisions on how many
    forwards run. A per-sample number is a function of (seed, iteration, name, sample index), where the sample index is
    the sample's place in the GLOBAL batch of the iteration: it does not depend on the number of processes, on the
    micro-batch, or on what was drawn before. Hence there is no state to save, and a resumed run is the same run.
    Numbers are drawn on the CPU, so that they are the same on every device, and then moved.

    Args:
        seed: --seed of the run.
        iteration: number of the iteration, from 0.
        device: device of per-sample tensors.
    """

    def __init__(self, seed: int, iteration: int, device: Union[str, torch.device] = "cpu"):
        self.seed, self.iteration, self.device = seed, iteration, torch.device(device)

    def generator(self, name: str, sample_index: Optional[int] = None) -> torch.Generator:
        """Return the torch.Generator of one draw; a sample index of None means a shared one."""
        key = f"{self.seed}/{self.iteration}/{name}/{'shared' if sample_index is None else sample_index}"
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def shared_uniform(self, name: str) -> float:
        """Draw one number in [0, 1), the same on all ranks."""
        return torch.rand((), generator=self.generator(name), dtype=torch.float64).item()

    def shared_integer(self, name: str, high: int) -> int:
        """Draw one integer in [0, high), the same on all ranks."""
        return int(torch.randint(high, (), generator=self.generator(name)).item())

    def normal(self, name: str, sample_indices: Sequence[int], shape: Sequence[int] = ()) -> torch.Tensor:
        """Draw standard normal numbers, (B, *shape), float32."""
        rows = [torch.randn(tuple(shape), generator=self.generator(name, index)) for index in sample_indices]
        return torch.stack(rows).to(self.device, non_blocking=True)

    def uniform(
        self, name: str, sample_indices: Sequence[int], low=0.0, high=1.0, shape: Sequence[int] = ()
    ) -> torch.Tensor:
        """Draw uniform numbers in [low, high), (B, *shape), float32; the ends may be tensors that broadcast."""
        rows = [torch.rand(tuple(shape), generator=self.generator(name, index)) for index in sample_indices]
        return low + (high - low) * torch.stack(rows).to(self.device, non_blocking=True)

    def integers(self, name: str, sample_indices: Sequence[int], low, high) -> torch.Tensor:
        """Draw uniform integers in [low, high], BOTH included, (B,), int64; the ends are integers or (B,) tensors."""
        drawn = torch.floor(self.uniform(name, sample_indices, low, high + 1))
        return torch.clamp(drawn, max=high).long()


# ---------------------------------------------------------------------------------------------------------------------
# Schedules: what a timestep means, and what a network's output means
# ---------------------------------------------------------------------------------------------------------------------
class Prediction(NamedTuple):
    """A network's estimates at x_t. All (B, ...), float32; they carry gradient if the network's output does."""

    output: torch.Tensor  # as the network returned it (after guidance)
    x0: torch.Tensor  # estimate of the clean latent
    noise: torch.Tensor  # estimate of the noise, from the SAME output: x_t = alpha x0 + sigma noise


class Schedule:
    """The noise levels of a teacher and the anchors of its student. Base of the two families.

    Args:
        train_timesteps: (T,) the TEACHER's training timesteps in [0, 1000], in any order. The timesteps of L_DMD and
            of the fake score's loss are drawn from them.
        anchors: (n,) decreasing timesteps at which the student is run: the levels that the saved scheduler visits.
        final: timestep that follows the last anchor. A solver step to 0 gives x0, up to the smallest noise level.
        dmd_range, fake_range: indices (low, high) into the ascending train_timesteps, both included, from which an
            index is drawn uniformly; None draws it logit-normally (0, 1), as for FLUX.
    """

    def __init__(
        self,
        train_timesteps: torch.Tensor,
        anchors: Sequence[float],
        final: float = 0.0,
        dmd_range: Optional[tuple] = None,
        fake_range: Optional[tuple] = None,
        device: Union[str, torch.device] = "cpu",
    ):
        self.train_timesteps = torch.sort(torch.as_tensor(train_timesteps, dtype=torch.float64)).values.to(device)
        self.anchors = torch.as_tensor(list(anchors), dtype=torch.float64, device=device)
        self.next_timesteps = torch.as_tensor([*list(anchors)[1:], final], dtype=torch.float64, device=device)
        self.dmd_range, self.fake_range = dmd_range, fake_range

    # What a family defines
    def levels(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (alpha, sigma) of x_t = alpha x0 + sigma noise at timesteps t; float64, in the shape of t."""
        raise NotImplementedError

    def as_prediction(self, x_t: torch.Tensor, output: torch.Tensor, t: torch.Tensor) -> Prediction:
        """Turn a network's output at x_t (B, ...) and t (B,) into an (x0, noise) pair, with gradient."""
        raise NotImplementedError

    def target(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return what a network should output for alpha x0 + sigma noise at t (B,): the fake score's target."""
        raise NotImplementedError

    # What follows from it
    def _levels_like(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = self.levels(t)
        shape = (-1,) + (1,) * (x.dim() - 1)
        return alpha.view(shape), sigma.view(shape)

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return x_t = alpha(t) x0 + sigma(t) noise, float32; t (B,)."""
        alpha, sigma = self._levels_like(x0, t)
        return (alpha * x0 + sigma * noise).float()

    def step(self, prediction: Prediction, t_next: torch.Tensor) -> torch.Tensor:
        """Take a deterministic solver step to t_next (B,): Euler for a flow, DDIM with eta 0 for DDPM."""
        return self.add_noise(prediction.x0, prediction.noise, t_next)

    def draw_dmd_timesteps(self, rng: StatelessRNG, sample_indices: Sequence[int]) -> torch.Tensor:
        """Draw the timesteps of L_DMD, (B,)."""
        return self._draw(rng, "dmd_timestep", sample_indices, self.dmd_range)

    def draw_fake_timesteps(self, rng: StatelessRNG, sample_indices: Sequence[int]) -> torch.Tensor:
        """Draw the timesteps of the fake score's loss, (B,)."""
        return self._draw(rng, "fake_timestep", sample_indices, self.fake_range)

    def _draw(
        self, rng: StatelessRNG, name: str, sample_indices: Sequence[int], index_range: Optional[tuple]
    ) -> torch.Tensor:
        if index_range is not None:
            return self.train_timesteps[rng.integers(name, sample_indices, *index_range)]
        size = len(self.train_timesteps)
        from_top = (torch.sigmoid(rng.normal(name, sample_indices)) * size).long().clamp(max=size - 1)
        return self.train_timesteps[size - 1 - from_top]

    def draw_mid_timesteps(
        self, rng: StatelessRNG, sample_indices: Sequence[int], t: torch.Tensor, t_next: torch.Tensor, margin: float
    ) -> torch.Tensor:
        """Draw ISG's t_mid, (B,): a uniform integer timestep in [t_next + margin, t - margin], see `check_margin`."""
        return rng.integers("mid_timestep", sample_indices, torch.ceil(t_next + margin), torch.floor(t - margin)).to(
            t.dtype
        )

    def check_margin(self, margin: float) -> Optional[tuple[float, float]]:
        """Return the first segment (t, t_next) that holds no timestep for `draw_mid_timesteps`, or None."""
        for t, t_next in zip(self.anchors.tolist(), self.next_timesteps.tolist()):
            if torch.ceil(torch.tensor(t_next + margin)) > torch.floor(torch.tensor(t - margin)):
                return t, t_next
        return None


class FlowSchedule(Schedule):
    """Rectified flow (FLUX, SD 3.5): sigma = t / 1000, alpha = 1 - sigma; networks return velocity = noise - x0."""

    def levels(self, t):
        sigma = t.double() / 1000
        return 1 - sigma, sigma

    def as_prediction(self, x_t, output, t):
        alpha, sigma = self._levels_like(x_t, t)
        output = output.float()
        return Prediction(output, (x_t - sigma * output).float(), (x_t + alpha * output).float())

    def target(self, x0, noise, t):
        return noise - x0


class IndexedFlowSchedule(FlowSchedule):
    """Rectified flow whose recipe counts indices into the teacher's shifted levels (SD 3.5): t_mid and its margin, and
    omega(t). A timestep's index is that of the nearest training timestep."""

    def index_of(self, t: torch.Tensor) -> torch.Tensor:
        """Return the indices (B,), int64, of timesteps t (B,) in the ascending training timesteps."""
        return (self.train_timesteps - t.double().view(-1, 1)).abs().argmin(1)

    def draw_mid_timesteps(self, rng, sample_indices, t, t_next, margin):
        margin = math.ceil(margin)
        return self.train_timesteps[
            rng.integers("mid_timestep", sample_indices, self.index_of(t_next) + margin, self.index_of(t) - margin)
        ]

    def check_margin(self, margin):
        room = self.index_of(self.anchors) - self.index_of(self.next_timesteps) - 2 * math.ceil(margin)
        return next(
            (
                (t, n)
                for t, n, left in zip(self.anchors.tolist(), self.next_timesteps.tolist(), room.tolist())
                if left < 0
            ),
            None,
        )

    def descending_sigma_squared(self, t: torch.Tensor) -> torch.Tensor:
        """Return omega(t) (B,): sigma^2 of the DESCENDING levels at t's index in the ascending ones (release)."""
        return ((self.train_timesteps.flip(0)[self.index_of(t)] / 1000) ** 2).float()


class DDPMSchedule(Schedule):
    """DDPM (SDXL): alpha = sqrt(abar_t), sigma = sqrt(1 - abar_t); networks return epsilon or v.

    epsilon = noise; v = alpha noise - sigma x0 (Salimans and Ho, 2022, arXiv 2202.00512). Only v gives an x0 where
    abar is 0, at the last timestep of a schedule with zero terminal SNR.

    Args:
        alphas_cumprod: (1000,) abar, `scheduler.alphas_cumprod` of a diffusers DDPM scheduler. Timesteps are its
            integer indices.
        prediction_type: "epsilon" or "v_prediction", as diffusers calls them.
    """

    def __init__(self, alphas_cumprod: torch.Tensor, *args, prediction_type: str = "epsilon", **kwargs):
        super().__init__(*args, **kwargs)
        self.abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device=self.train_timesteps.device)
        self.predicts_v = {"epsilon": False, "v_prediction": True}[prediction_type]

    def levels(self, t):
        abar = self.abar[t.long()]
        return abar.sqrt(), (1 - abar).sqrt()

    def as_prediction(self, x_t, output, t):
        # Computed in float64: abar goes down to .005.
        alpha, sigma = self._levels_like(x_t, t)
        output = output.float()
        if self.predicts_v:
            return Prediction(output, (alpha * x_t - sigma * output).float(), (sigma * x_t + alpha * output).float())
        return Prediction(output, ((x_t - sigma * output) / alpha).float(), output)

    def target(self, x0, noise, t):
        if not self.predicts_v:
            return noise
        alpha, sigma = self._levels_like(x0, t)
        return (alpha * noise - sigma * x0).float()


class Guidance(NamedTuple):
    """The guidance scales of a batch."""

    scale: torch.Tensor  # (B,)
    above_one: bool  # whether a scale can be above 1, known without a host sync; if not, one pass is enough


def draw_guidance(rng: StatelessRNG, name: str, sample_indices: Sequence[int], bounds: Sequence[float]) -> Guidance:
    """Draw guidance scales uniformly from `bounds`, (MIN, MAX)."""
    return Guidance(rng.uniform(name, sample_indices, *bounds), max(bounds) > 1)


def guide(unconditional: torch.Tensor, conditional: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return u + s (c - u), (B, ...); scale (B,). A sample with s <= 1 gets its conditional output."""
    scale = scale.clamp(min=1).to(conditional.dtype).view((-1,) + (1,) * (conditional.dim() - 1))
    return unconditional + scale * (conditional - unconditional)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling with the student
# ---------------------------------------------------------------------------------------------------------------------
def sampler_step(
    schedule: Schedule, sampler: str, prediction: Prediction, t_next: torch.Tensor, noise: Optional[torch.Tensor]
) -> torch.Tensor:
    """Take one step of the few-step sampler to the anchor t_next (B,).

    "stochastic" noises the predicted x0 with FRESH noise; "euler" follows the prediction (`noise` is not used).
    """
    if sampler == "euler":
        return schedule.step(prediction, t_next)
    return schedule.add_noise(prediction.x0, noise, t_next)


def num_simulated_steps(rng: StatelessRNG, probability: float, num_anchors: int) -> Optional[int]:
    """Draw the number of steps of backward simulation, the same on all ranks; None: real latents are noised."""
    if rng.shared_uniform("simulate") < probability:
        return rng.shared_integer("simulated_steps", num_anchors)
    return None


def needs_images(seed: int, gan_weight: float, backward_simulation_prob: float, iteration: int) -> bool:
    """Return whether an iteration uses real images; if not, none is read from the disk."""
    return gan_weight > 0 or num_simulated_steps(StatelessRNG(seed, iteration), backward_simulation_prob, 1) is None


@torch.no_grad()
def backward_simulation(
    predict, schedule: Schedule, sampler: str, rng: StatelessRNG, sample_indices, noise: torch.Tensor, steps: int
):
    """Return an input as in inference (DMD2, section 4.5): after the student's own first steps from pure noise.

    Args:
        predict: `predict(x_t, t) -> Prediction` of the student.
        noise: (B, ...) pure noise, the start of the sampler.
        steps: number of steps in [0, n - 1], each one forward; the same on all ranks.
    Returns:
        x_t (B, ...) at anchor number `steps`, without gradient.
    """
    x_t = noise
    for i in range(steps):
        prediction = predict(x_t, schedule.anchors[i].expand(len(sample_indices)))
        fresh = rng.normal(f"renoise_{i}", sample_indices, noise.shape[1:]) if sampler == "stochastic" else None
        x_t = sampler_step(schedule, sampler, prediction, schedule.anchors[i + 1].expand(len(sample_indices)), fresh)
    return x_t


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------
def dmd_loss(
    student_x0: torch.Tensor, fake_x0: torch.Tensor, teacher_x0: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the distribution matching loss (DMD2, eqs. 1-2; normalized as in DMD, eq. 8).

    Its gradient with respect to student_x0 is (fake_x0 - teacher_x0) / mean|student_x0 - teacher_x0| / numel.

    Args:
        student_x0: (B, ...) with gradient.
        fake_x0, teacher_x0: (B, ...) the two scores' estimates of x0 from the same noised student_x0; no gradient
            flows into them.
    Returns:
        The loss, a float32 scalar, and metrics to log:
        dmd_non_finite: the number of samples whose gradient was not finite and was zeroed there.
        signal/dmd_ratio: mean|fake_x0 - teacher_x0| / mean|student_x0 - teacher_x0|, how far the scores are apart.
        signal/fake_error: mean|student_x0 - fake_x0| / mean|student_x0 - teacher_x0|, below 1 if the fake score fits
            the student's samples better than the teacher does.
    """
    with torch.no_grad():
        x0, fake_x0, teacher_x0 = student_x0.float(), fake_x0.float(), teacher_x0.float()
        normalizer = (x0 - teacher_x0).abs().flatten(1).mean(1).view((-1,) + (1,) * (x0.dim() - 1))
        gradient, error = (fake_x0 - teacher_x0) / normalizer, (x0 - fake_x0) / normalizer
        finite = torch.isfinite(gradient)
        non_finite = (~finite.flatten(1).all(1)).sum()
        gradient, error = (torch.where(finite, x, torch.zeros_like(x)) for x in (gradient, error))
        target = x0 - gradient
    metrics = {
        "dmd_non_finite": non_finite,
        "signal/dmd_ratio": gradient.abs().mean(),
        "signal/fake_error": error.abs().mean(),
    }
    return 0.5 * F.mse_loss(student_x0.float(), target), metrics


def denoising_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the fake score's loss: the MSE between its output and `Schedule.target`, over all elements, float32."""
    return F.mse_loss(output.float(), target.float())


def isg_loss(direct: torch.Tensor, target: torch.Tensor, c: float = 1e-3) -> torch.Tensor:
    """Return the ISG loss (SenseFlow, section 3.3): mean(sqrt((direct - target)^2 + c^2) - c), float32.

    Args:
        direct: (B, ...) the student's own step from t to t_next, with gradient.
        target: (B, ...) `isg_target`; no gradient flows into it.
    """
    difference = direct.float() - target.detach().float()
    return (torch.sqrt(difference**2 + c**2) - c).mean()


@torch.no_grad()
def isg_target(teacher_predict, student_predict, schedule: Schedule, x_t, t, t_mid, t_next) -> torch.Tensor:
    """Return where the segment t -> t_next should end: after the teacher's step to t_mid and the student's to t_next.

    Args:
        teacher_predict, student_predict: `predict(x_t, t) -> Prediction`; one forward each, the teacher's guided.
        x_t: (B, ...) the student's own input at t; t > t_mid > t_next, each (B,).
    """
    x_mid = schedule.step(teacher_predict(x_t, t), t_mid)
    return schedule.step(student_predict(x_mid, t_mid), t_next)


def adversarial_loss(fake_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the student's GAN loss: -weight * mean over L, mean over B; logits (B, L), weight omega(t) (B,)."""
    return -(weight * fake_logits.float().mean(1)).mean()


def hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the discriminator's loss: relu(1 - D(real)) + relu(1 + D(fake)), mean over L, weighted, mean over B."""
    per_image = F.relu(1 - real_logits.float()).mean(1) + F.relu(1 + fake_logits.float()).mean(1)
    return (weight * per_image).mean()


def non_saturating_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Return the student's GAN loss against DMD2's classifier: mean softplus(-logit); logits (B,)."""
    return F.softplus(-fake_logits.float()).mean()


def logistic_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """Return the loss of DMD2's classifier: mean softplus(fake logit) + mean softplus(-real logit); logits (B,)."""
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


@torch.no_grad()
def ida_update(
    fake_parameters: Sequence[torch.Tensor], student_parameters: Sequence[torch.Tensor], decay: float
) -> None:
    """Set fake <- decay * fake + (1 - decay) * student, in place: IDA (SenseFlow, section 3.2)."""
    torch._foreach_lerp_(fake_parameters, student_parameters, 1 - decay)
