"""Statistics of validation images and latents, and signals: closed forms, and a run that goes wrong."""

import io
import json
import logging
import math
import re
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm.auto import tqdm

import train_senseflow_flux as script
from helpers import ROOT
from senseflow.training import metrics as metrics_module
from senseflow.training import roles
from senseflow.training import runtime as runtime_module
from senseflow.training.signals import BANDS, SignalMonitor
from senseflow.training.validation import image_statistics, labeled_grid, latent_statistics


@pytest.fixture
def flags(teacher, data):
    path = ["--pretrained_model_name_or_path", str(teacher), "--dataset_json", str(data), "--resolution", "64"]
    return [*path, "--gan_weight", "0", "--report_to", "none"]


def image(pixels) -> Image.Image:
    return Image.fromarray(np.asarray(pixels, dtype=np.uint8))


def test_image_statistics():
    flat = image(np.full((32, 32, 3), 128))
    statistics = image_statistics([[flat, flat], [flat, flat]])
    assert statistics == pytest.approx({"saturation": 0, "contrast": 0, "sharpness": 0, "diversity": 0}, abs=1e-12)
    assert "diversity" not in image_statistics([[flat], [flat]])

    # Differences between prompts are not diversity.
    black, white = image(np.zeros((32, 32, 3))), image(np.full((32, 32, 3), 255))
    assert image_statistics([[black, black], [white, white]])["diversity"] == 0
    assert image_statistics([[black, white, black]])["diversity"] == pytest.approx(2 / 3)

    red = np.zeros((32, 32, 3))
    red[..., 0], red[..., 1] = 255, 51
    assert image_statistics([[image(red)]])["saturation"] == pytest.approx(1)

    # Half the energy of a checkerboard is its mean; the rest is at the highest frequency, which large squares lack.
    checkerboard = np.indices((32, 32)).sum(0) % 2 * 255
    statistics = image_statistics([[image(checkerboard)]])
    assert statistics["contrast"] == pytest.approx(0.5) and statistics["sharpness"] == pytest.approx(0.25)
    blurred = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((8, 8))) * 255
    statistics = image_statistics([[image(blurred)]])
    assert statistics["contrast"] == pytest.approx(0.5) and statistics["sharpness"] < 0.05


def test_a_grid_names_its_columns_and_rows():
    """The images are in it as they are; prompts of any script and length are written above them."""
    gray = [[image(np.full((64, 64, 3), 60 * row + 20 * column)) for column in (1, 2)] for row in (0, 1)]

    def grid(*captions, columns=("teacher", "student")):
        return np.asarray(labeled_grid(gray, columns, captions))

    def text_heights(pixels):
        """(The height of the text, that of the image below it) of each row of images."""
        is_image = (pixels[:, 0] != 255).any(1)
        edges = [0, *np.flatnonzero(np.diff(is_image)) + 1, len(pixels)]
        return np.diff(edges).reshape(-1, 2)

    bare, labeled = grid(), grid("a red square", "a blue dog")
    assert bare.shape[1] == 128 and bare.shape[0] > 128 and labeled.shape[0] > bare.shape[0]
    assert (text_heights(labeled)[:, 1] == 64).all()
    start = text_heights(labeled)[0, 0]
    assert np.array_equal(labeled[start : start + 64], np.hstack([np.asarray(each) for each in gray[0]]))
    assert not np.array_equal(labeled, grid("a red square", "a blue cat"))
    assert not np.array_equal(bare, grid(columns=("teacher", "fake score")))
    # A long prompt is cut; what the font cannot draw, or Unicode does not have, is no reason to stop.
    long = text_heights(grid("a red square", "word " * 500))[1, 0]
    assert text_heights(labeled)[1, 0] < long == text_heights(grid("a red square", "word " * 900))[1, 0]
    grid("\u65e5\u672c\u8a9e \u0431 \U0001f98a", "\udcff\n\0")
    grid("", "W" * 1000)


def test_latent_statistics():
    # A channel that varies by 3 about its mean and a constant one; the second image is the first plus 2.
    first = torch.stack([torch.tensor([[1.0, 7.0], [7.0, 1.0]]), torch.full((2, 2), 5.0)])
    statistics = latent_statistics([[first, first + 2], [first + 10, first + 14]])
    assert statistics == pytest.approx({"latent_contrast": 1.5, "latent_diversity": (2 + 4) / 2})
    assert latent_statistics([[first], [first]]) == pytest.approx({"latent_contrast": 1.5})
    assert latent_statistics([[first.unsqueeze(1)]]) == pytest.approx({"latent_contrast": 1.5})  # of a video VAE


@pytest.mark.parametrize("sample", [2**20, 40])
def test_an_update_is_measured_against_the_weights(sample, flags, tmp_path, monkeypatch):
    """AdamW's first step moves every weight by the rate; the ratio is the same for a sample of the values."""
    monkeypatch.setattr(roles, "UPDATE_SAMPLE_SIZE", sample)
    args = script.parse_args(
        [*flags, "--output_dir", str(tmp_path), "--adam_weight_decay", "0", "--lr_warmup_steps", "0"]
    )
    runtime = runtime_module.Runtime(args)
    network = torch.nn.Linear(16, 24, bias=False)
    torch.nn.init.constant_(network.weight, 2.0)
    role = runtime.trained_role("student", network, 1e-3)
    with role.accumulate():
        role.backward(role(torch.ones(2, 16)).sum())
    norm, ratio = role.step(measure_update=True)
    assert norm > 0 and ratio.item() == pytest.approx(1e-3 / 2, rel=2e-3)
    with role.accumulate():
        role.backward(role(torch.ones(2, 16)).sum() * math.nan)
    assert role.step(measure_update=True)[1] == 0  # a skipped step


def test_the_fake_score_lags_if_its_loss_is_above_its_mean(flags, tmp_path, monkeypatch, caplog):
    runtime = runtime_module.Runtime(script.parse_args([*flags, "--output_dir", str(tmp_path)]))
    role = runtime.trained_role("student", torch.nn.Linear(1, 1), 0.1)
    metrics, logged = metrics_module.Metrics(runtime, role, 1, tqdm(disable=True)), []
    monkeypatch.setattr(runtime, "log", lambda values, step: logged.append(values))
    for iteration, loss in enumerate((0.5, 0.5, 1.0, 0.5)):
        metrics.push(iteration, {"fake_loss": torch.tensor(loss)})
    metrics.flush()
    lags = [values.get("signal/fake_lag") for values in logged]
    assert lags[0] is None and lags[1:] == pytest.approx([1, 2, 0.75])
    monkeypatch.setattr(metrics_module, "MEAN_WINDOW", 3)
    for iteration, loss in enumerate((1.0, 1.0), 4):
        metrics.push(iteration, {"fake_loss": torch.tensor(loss)})
    metrics.flush()
    assert logged[-1]["signal/fake_lag"] == pytest.approx(1 / (0.625 + (1 - 0.625) / 3))
    for iteration in range(2 * BANDS["signal/fake_lag"].window):
        metrics.push(iteration, {"fake_loss": torch.tensor(1.2**iteration)})
    assert "signal/fake_lag" in caplog.text


def test_speed_is_that_of_iterations_and_the_bar_shows_running_means(flags, tmp_path, monkeypatch):
    """An iteration takes .05 s or more. A flush right after it, and half a second of saving, are not the next's."""

    class Loader(list):
        failure = None

    runtime = runtime_module.Runtime(script.parse_args([*flags, "--output_dir", str(tmp_path)]))
    role = runtime.trained_role("student", torch.nn.Linear(1, 1), 0.1)
    bar, logged = tqdm(disable=True), []
    monkeypatch.setattr(bar, "set_postfix", lambda values, refresh: logged[-1].update(bar=values))
    monkeypatch.setattr(runtime, "log", lambda values, step: logged.append(dict(values)))
    metrics = metrics_module.Metrics(runtime, role, 2, bar)
    losses = [1.0, 3.0, 5.0, math.nan]
    for iteration, _ in enumerate(metrics.batches(Loader([{}] * len(losses)), len(losses))):
        time.sleep(0.05)
        values = {"fake_loss": torch.tensor(losses[iteration])}
        metrics.push(iteration, values | ({"dmd_loss": torch.tensor(8.0)} if iteration == 0 else {}))
        if iteration == 1:
            metrics.flush()
            time.sleep(0.5)
    metrics.flush()
    assert all(4 < values["samples_per_second"] <= 40 for values in logged), logged
    assert [values["bar"]["fake_loss"] for values in logged] == ["1", "2", "3", "3"]
    assert all(values["bar"]["dmd_loss"] == "8" for values in logged) and "signal/fake_lag" not in logged[-1]


def test_log_lines_stand_above_the_progress_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    with tqdm(total=2, file=stream):
        record = logging.LogRecord("n", logging.INFO, "f", 1, "[RANK 0] saved %s", ("checkpoint-2",), None)
        runtime_module.ProgressBarHandler().emit(record)
    assert "\rsaved checkpoint-2\n" in stream.getvalue(), stream.getvalue()


def warnings_of(caplog, monitor, name, values) -> list[str]:
    caplog.clear()
    for iteration, value in enumerate(values, 1):
        monitor.update(iteration, {name: value, "fake_loss": 1e9})
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(
    "values, iteration",
    [
        ([0.9, 0.75, 1.3], None),
        ([0.5, 0.6, 0.65, 0.8], None),  # outside, and coming in
        ([0.9, 0.6, 0.9, 0.6], None),  # never twice in a row
        ([0.9, 0.6, 0.6, 0.5], 3),
        ([0.6, 0.5, 0.6, 0.65, 0.9], None),
        ([0.6, 0.5, 0.55, 0.9], 3),  # further out than where it started
        ([2.0, 2.5, 3.0], 3),
        ([math.nan, math.nan], None),  # which ends the run elsewhere
    ],
)
def test_a_signal_that_stays_outside_its_band_is_warned_of_once(values, iteration, caplog):
    warnings = warnings_of(caplog, SignalMonitor(adapters=False), "signal/diversity", values)
    assert len(warnings) == (iteration is not None)
    if warnings:
        value = values[iteration - 1]
        assert f"iteration {iteration}: signal/diversity is {value:.3g}, outside 0.7 to 1.4: " in warnings[0]
        assert ("alike" if value < 1 else "lower --learning_rate") in warnings[0]


def test_signals_are_averaged_over_their_windows_and_harmless_sides_ignored(caplog):
    window = BANDS["signal/fake_lag"].window
    assert warnings_of(caplog, SignalMonitor(False), "signal/fake_lag", [1.0, 1.8] * window) != []
    assert warnings_of(caplog, SignalMonitor(False), "signal/fake_lag", [1.0, 1.4] * window) == []
    assert warnings_of(caplog, SignalMonitor(False), "signal/fake_lag", [1.8] * (2 * window - 1)) == []
    assert (
        warnings_of(caplog, SignalMonitor(False), "signal/fake_error", [0.1] * 2 * BANDS["signal/fake_error"].window)
        == []
    )
    # A signal that may not start outside is warned of even if it improves.
    window = BANDS["signal/fake_error"].window
    assert len(warnings_of(caplog, SignalMonitor(False), "signal/fake_error", [1.02] * window + [1.01] * window)) == 1
    assert (
        warnings_of(
            caplog, SignalMonitor(False), "signal/fake_error", [1.02] * window + [0.9] * window + [1.02] * 2 * window
        )
        == []
    )
    steps = [0.01] * 2 * BANDS["signal/update_ratio"].window
    assert len(warnings_of(caplog, SignalMonitor(False), "signal/update_ratio", steps)) == 1
    assert warnings_of(caplog, SignalMonitor(adapters=True), "signal/update_ratio", steps) == []


@pytest.mark.parametrize("reversed_gradient", [False, True])
def test_a_diverging_run_is_warned_of_and_a_good_one_not(reversed_gradient, tmp_path, caplog, monkeypatch):
    """Distill the demo's teacher to two steps, and again with the gradient of L_DMD reversed."""
    demo, right = ROOT / "demo", script.dmd_loss
    monkeypatch.syspath_prepend(str(demo))
    from run import TEACHER, TRAINING_FLAGS, all_captions, flags

    if reversed_gradient:  # 2 T - F lies on the other side of T
        monkeypatch.setattr(script, "dmd_loss", lambda x0, fake, teacher: right(x0, 2 * teacher - fake, teacher))
    captions = all_captions()
    rows = {"keys": list(range(96)), "image_paths": ["none.png"] * 96, "prompts": captions}
    (tmp_path / "data.json").write_text(json.dumps(rows))
    fast = {"max_train_steps": 48, "train_batch_size": 8, "learning_rate": 2e-4, "learning_rate_fake": 1e-3}
    steady = {"lr_scheduler": "constant", "lr_warmup_steps": 0, "report_to": "none"}
    student_samples = {"validation_prompts": captions[::24], "num_validation_images": 2, "validation_steps": 12}
    paths = {
        "pretrained_model_name_or_path": TEACHER,
        "dataset_json": tmp_path / "data.json",
        "output_dir": tmp_path / "out",
    }
    script.main([str(word) for word in flags(TRAINING_FLAGS[2] | fast | steady | student_samples | paths)])
    warned = {name for record in caplog.records for name in re.findall("signal/[a-z_]+", record.getMessage())}
    assert {"signal/sharpness", "signal/latent_contrast"} <= warned if reversed_gradient else not warned
