"""`train_iteration` of the FLUX script on tiny networks: which role is trained when, and how many forwards run."""

from collections import Counter

import pytest
import torch

import train_senseflow_flux as script
from helpers import built
from senseflow.arguments import LR_SCHEDULERS
from senseflow.training.models import TrainingModels
from senseflow.training.roles import Role
from senseflow.training.runtime import Runtime
from senseflow_utils import Guidance, StatelessRNG, num_simulated_steps


@pytest.fixture
def build(teacher, vision, data, tmp_path):
    """build(*flags) -> `built` of the FLUX script on the tiny teacher; its step returns no batches."""

    def make(*flags):
        flags = [
            *("--pretrained_model_name_or_path", str(teacher), "--output_dir", str(tmp_path)),
            *("--dataset_json", str(data), "--resolution", "64", "--train_batch_size", "2", "--report_to", "none"),
            *("--discriminator_backbone", f"{vision}/dinov2", "--discriminator_text_encoder", f"{vision}/clip"),
            *("--lr_warmup_steps", "0", "--max_sequence_length", "16", "--learning_rate", "1e-3", *flags),
        ]
        run = built(script, flags)
        step = run.step
        run.step = lambda iteration: step(iteration)[0]
        return run

    return make


def roles_of(models: TrainingModels) -> dict[str, Role]:
    return {name: getattr(models, name) for name in ("student", "teacher", "fake_score", "discriminator")}


def weights(role: Role) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in role.module.state_dict().items()}


def test_each_backward_reaches_only_the_network_being_trained(build, monkeypatch):
    run = build("--ttur_ratio", "1")
    changed = []

    def gradients():
        return {
            name: sum(p.grad.abs().sum().item() for p in role.module.parameters() if p.grad is not None)
            for name, role in roles_of(run.models).items()
        }

    backward = Role.backward

    def recording(role, loss):
        before = gradients()
        backward(role, loss)
        after = gradients()
        changed.append((role.name, sorted(name for name in after if after[name] != before[name])))

    monkeypatch.setattr(Role, "backward", recording)
    run.step(0)
    assert changed == [(name, [name]) for name in ("student", "discriminator", "fake_score")]
    assert all(total == 0 for total in gradients().values()), "a step leaves no gradient behind"
    for frozen in (run.pipeline.vae.decoder, run.models.vision_features):
        assert all(parameter.grad is None for parameter in frozen.parameters())


def test_a_student_update_does_not_change_the_discriminators_step(build):
    """The student's loss runs the discriminator frozen: no gradient leaks into its own step."""
    runs = [build("--ttur_ratio", ratio, "--adam_epsilon", "1e-3") for ratio in "12"]  # with and without an update
    for run in runs:
        run.step(0)
    a, b = (weights(run.models.discriminator) for run in runs)
    torch.testing.assert_close(
        a, b, rtol=1e-5, atol=1e-6
    )  # the student runs with gradient in one, without in the other


def test_the_student_steps_in_every_ttur_th_iteration_and_ida_moves_the_fake_score(build):
    run = build("--ttur_ratio", "2", "--gan_weight", "0", "--ida_decay", "0.5", "--learning_rate_fake", "0")
    student, fake = run.models.student, run.models.fake_score
    start, start_fake = weights(student), weights(fake)
    values, debug_latents = run.step(0)
    assert all(torch.equal(start[name], tensor) for name, tensor in weights(student).items()) and not debug_latents
    assert "dmd_loss" not in values and "fake_loss" in values
    values, debug_latents = run.step(1)
    moved, moved_fake = weights(student), weights(fake)
    assert any(not torch.equal(start[name], moved[name]) for name in start)
    # The fake score's rate is 0: only IDA moves it, half of the way to the student after the student's step.
    for name, parameter in run.models.fake_score.parameters.items():
        torch.testing.assert_close(moved_fake[name], (start_fake[name] + moved[name]) / 2)
        assert parameter.grad is None
    assert {"dmd_loss", "isg_loss", "fake_loss", "dmd_non_finite"} <= set(values)
    assert set(debug_latents) == {"student_x0", "fake_x0", "teacher_x0", "isg_target", "isg_direct"}


def test_weight_copies_train_to_the_bit_as_without_them(build, bfloat16, tmp_path):
    """With gradient checkpointing, accumulation and IDA, and from a checkpoint on."""
    flags = [*bfloat16, *"--ttur_ratio 2 --ida_decay 0.5 --gradient_accumulation_steps 2".split()]
    plain, copied = build(*flags), build(*flags, "--bf16_weight_copies")
    for iteration in range(4):
        if iteration == 2:
            for role in (copied.models.student, copied.models.fake_score):
                role.save(tmp_path)
                with torch.no_grad():
                    torch._foreach_zero_(list(role.parameters.values()))
                role.copies.refresh()
                role.load(tmp_path)
        for run in (plain, copied):
            run.step(iteration)
    for name, role in roles_of(plain.models).items():
        other = roles_of(copied.models)[name]
        torch.testing.assert_close(weights(role), weights(other), rtol=0, atol=0)
        assert role.copies is None and (other.copies is None) == (name in ("teacher", "discriminator"))


def test_the_fake_score_trains_after_ida_on_what_the_student_generated_before_its_step(build, monkeypatch):
    run = build("--ttur_ratio", "1", "--gan_weight", "0", "--backward_simulation_prob", "1", "--ida_decay", "0.5")
    order, trained_on, predict = [], [], run.models.predict

    def record_calls(name):
        method = getattr(Role, name)

        def recording(role, *args, **kwargs):
            order.append(f"{role.name} {name}")
            return method(role, *args, **kwargs)

        monkeypatch.setattr(Role, name, recording)

    def recording_predict(role, x_t, t, *args, **kwargs):
        if role.name == "fake_score" and torch.is_grad_enabled():
            trained_on.append((x_t, t))
        return predict(role, x_t, t, *args, **kwargs)

    for name in ("step", "ida_update_from", "backward"):
        record_calls(name)
    run.models.predict = recording_predict
    _, debug_latents = run.step(0)
    expected = ["student backward", "student step", "fake_score ida_update_from"]
    assert order == [*expected, "fake_score backward", "fake_score step"]
    ((x_t, t),) = trained_on
    noise = StatelessRNG(run.args.seed, 0).normal("fake_noise", [0, 1], run.models.latent_shape)
    torch.testing.assert_close(x_t, run.schedule.add_noise(debug_latents["student_x0"], noise, t))


@pytest.mark.parametrize("gan", [True, False])
def test_a_ttur_cycle_runs_as_few_forwards_as_possible(build, gan):
    ratio = 5
    flags = [] if gan else ["--gan_weight", "0"]
    run = build("--ttur_ratio", str(ratio), *flags)
    counts = Counter()

    def counting(name, module):
        module.register_forward_hook(lambda *_: counts.update([name]))

    models = run.models
    for name in ("student", "teacher", "fake_score"):
        counting(name, getattr(models, name).module)
    counting("text", run.pipeline.text_encoder_2)
    counting("encode", run.pipeline.vae.encoder)
    if gan:
        counting("decode", run.pipeline.vae.decoder)
        counting("vision", models.vision_features)
        counting("heads", models.discriminator.module)
        counting("discriminator_text", models.text_features)
    for iteration in range(ratio):
        run.step(iteration)
    simulated = [num_simulated_steps(StatelessRNG(run.args.seed, i), 0.5, 4) for i in range(ratio)]
    assert None in simulated and any(simulated), "this seed should cover both kinds of input"
    expected = {
        # One per iteration, the simulation's, and one for the ISG target.
        "student": ratio + sum(filter(None, simulated)) + 1,
        "teacher": 2,  # L_DMD and the ISG target, in the student update
        "fake_score": ratio + 1,  # its own loss, and L_DMD
        "text": ratio,
        "encode": simulated.count(None),
    }
    if gan:
        expected |= {"decode": ratio, "heads": ratio + 1, "discriminator_text": ratio}
        expected["vision"] = 3 * ratio  # reference, augmented real, augmented fake
    assert counts == expected
    assert gan or not list(run.pipeline.vae.decoder.parameters())


def converge_spectral_norms(heads: torch.nn.Module) -> None:
    """Run the power iterations of the spectral norms until they converge."""
    for group in (*heads.cls, *heads.refmap):
        for conv in group.convs:
            conv.iterate(200)


def test_accumulation_trains_the_same_global_batch_alike(build):
    """Sixteen images at once, or in two micro-batches of eight; with clipping and all losses."""
    results = []
    for batch, accumulated in ((16, 1), (8, 2)):
        sizes = ("--train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulated))
        run = build("--ttur_ratio", "1", "--adam_epsilon", "1e-3", "--max_grad_norm", "0.1", *sizes)
        converge_spectral_norms(run.models.discriminator.module)  # a power iteration steps once per micro-batch
        values = [run.step(iteration)[0] for iteration in range(2)]
        trained = [role.parameters for name, role in roles_of(run.models).items() if name != "teacher"]
        results.append((values, *trained))
    for once, twice in zip(*results):
        torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_the_student_starts_as_the_teacher_at_the_folded_guidance(build):
    run = build("--gan_weight", "0", "--student_guidance_scale", "3.5")
    x_t, t = torch.randn(2, *run.models.latent_shape), torch.tensor([1000.0, 512.8])
    with torch.no_grad():
        condition = run.models.encode_prompts(["red square", "blue"])
        teacher = run.models.predict(run.models.teacher, x_t, t, condition, Guidance(torch.full((2,), 3.5), True)).x0
        other = run.models.predict(run.models.teacher, x_t, t, condition, Guidance(torch.full((2,), 1.0), False)).x0
        student = run.models.predict(run.models.student, x_t, t, condition).x0
        fake = run.models.predict(run.models.fake_score, x_t, t, condition).x0
    torch.testing.assert_close(student, teacher, atol=2e-5, rtol=1e-5)
    assert torch.equal(student, fake) and not torch.allclose(other, teacher, atol=1e-3)
    dropped = build("--gan_weight", "0", "--student_guidance_scale", "0").models.student.module.state_dict()
    name = "time_text_embed.timestep_embedder.linear_2.bias"
    assert torch.equal(dropped[name], run.models.teacher.module.state_dict()[name])


def rates_of(args, step_every: int, steps: int) -> list[float]:
    """Return the learning rate of each step of a role that steps in every so many iterations."""
    role, rates = Runtime(args).trained_role("student", torch.nn.Linear(2, 2), 1e-3, step_every=step_every), []
    for _ in range(steps):
        with role.accumulate():
            role.backward(role(torch.ones(1, 2)).sum())
        rates.append(role.learning_rate)
        role.step()
    return rates


@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_learning_rate_schedule_is_read_at_the_iteration_of_the_step(name, build):
    flags = ["--gan_weight", "0", "--lr_scheduler", name, "--lr_warmup_steps", "4", "--max_train_steps", "12"]
    args = build(*flags, "--lr_warmup_start_factor", "0").args
    every, second = rates_of(args, 1, 12), rates_of(args, 2, 6)
    assert second == every[1::2]
    assert all(0 <= rate <= 1e-3 for rate in every)
    warm_up = [1e-3] * 5 if name == "constant" else [0, 2.5e-4, 5e-4, 7.5e-4, 1e-3]
    assert every[:5] == pytest.approx(warm_up)
    assert (every[11] < 5e-4) == (name not in ("constant", "constant_with_warmup")), every


def test_the_warm_up_of_flux_is_the_releases(build):
    """Its student's k-th step, from 0, is in iteration 5k + 4, and its fake score's in iteration k."""
    args = build("--gan_weight", "0", "--lr_warmup_steps", "500").args
    assert args.lr_warmup_start_factor == 0.5 and args.lr_scheduler == "constant_with_warmup"
    student = [1e-3 * min(1, 0.5 + 0.5 * (5 * k + 4) / 500) for k in range(103)]
    assert rates_of(args, 5, 103) == pytest.approx(student, rel=1e-12)
    assert rates_of(args, 1, 3) == pytest.approx([1e-3 * (0.5 + 0.5 * k / 500) for k in range(3)], rel=1e-12)
