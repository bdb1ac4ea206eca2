"""Launch the training scripts, read their checkpoints and generate with their pipelines."""

import hashlib
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Iterator, Optional

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import infer
from senseflow import errors
from senseflow.arguments import keep_last
from senseflow.data.loader import make_dataloader
from senseflow.training.models import TrainingModels
from senseflow.training.runtime import Runtime
from senseflow_utils import Guidance, needs_images


ROOT = Path(__file__).parent.parent


def states(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every network and optimizer of a checkpoint."""
    tensors = {}
    for file in sorted(checkpoint.rglob("*.safetensors")):
        tensors |= {f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()}
    for file in sorted(checkpoint.glob("*_optimizer-*.pt")):
        state = torch.load(file, weights_only=True)
        tensors[f"{file.stem}/steps"] = torch.tensor(state["steps"])
        for index, moments in state["state"].items():
            tensors |= {f"{file.stem}/{index}/{name}": tensor for name, tensor in moments.items()}
    return tensors


def assert_same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys() and len(a) > 100
    for name in a:
        if tolerance:
            torch.testing.assert_close(a[name], b[name], msg=name, **tolerance)
        else:
            assert torch.equal(a[name], b[name]), name


def assert_same_image(a: np.ndarray, b: np.ndarray) -> None:
    """To 1 of 255: another path, batch or thread, or another place in memory, may round a matrix product otherwise."""
    assert a.shape == b.shape
    largest = np.abs(a.astype(int) - b.astype(int)).max()
    assert largest <= 1, f"images differ by up to {largest} of 255"


training_runs: list[tuple[str, list[str], str]] = []  # (script's name, arguments, precision) not yet traced
# What a dry run does not see, or only counts.
NOT_TRACED = (
    "--output_dir --resume_from_checkpoint --validation_prompts --validation_steps --num_validation_images "
    "--report_to --max_train_steps --checkpointing_steps --checkpoints_total_limit --export_dtype --seed "
    "--random_flip --learning_rate --learning_rate_fake --learning_rate_disc --lr_scheduler --lr_warmup_steps "
    "--adam_epsilon --max_grad_norm --mixed_precision"
).split()


def record_runs(patch: pytest.MonkeyPatch) -> None:
    """Add the complete training runs of this process to `training_runs`; `start` adds those that it launches."""
    arguments_of: dict[int, tuple] = {}
    for script in [module for name, module in sys.modules.items() if name.startswith("train_")]:
        cls = models_class(script)

        def parse_args(argv=None, name=script.__name__, parse=cls.parse_args):
            args = parse(argv)
            arguments_of[id(args)] = args, name, argv
            return args

        patch.setattr(cls, "parse_args", staticmethod(parse_args))
    finish = Runtime.finish

    def recording(runtime):
        finish(runtime)
        args = runtime.args
        if id(args) in arguments_of and args.dry_run is None:
            training_runs.append((*arguments_of[id(args)][1:], args.mixed_precision))

    patch.setattr(Runtime, "finish", recording)


def dry_runs(traced: Path) -> Iterator[tuple[ModuleType, list[str]]]:
    """Yield (script, arguments) of --dry_run for the recorded runs of a kind that has no file in `traced` yet."""
    while training_runs:
        name, arguments, precision = training_runs.pop()
        if not Path(arguments[arguments.index("--pretrained_model_name_or_path") + 1]).exists():
            continue  # it came from a Hub that ended with its test
        arguments = without(arguments, *NOT_TRACED)
        # Numbers count as 0, 1 or more, paths by their last names without digits.
        words = [re.sub(r"\d+$", "", Path(word).name) if "/" in word else word for word in arguments]
        kind = [name, precision, *(str(min(float(word), 2)) if is_number(word) else word for word in words)]
        with suppress(FileExistsError):
            (traced / hashlib.sha256(json.dumps(kind).encode()).hexdigest()).touch(exist_ok=False)
            yield importlib.import_module(name), [*arguments, "--mixed_precision", precision, "--dry_run"]


def is_number(word: str) -> bool:
    return word.replace(".", "", 1).replace("e-", "", 1).isdigit()


def start(
    script,
    arguments,
    processes: int = 1,
    precision: str = "no",
    mode: str = "",
    *more: str,
    stdout: int = subprocess.DEVNULL,
) -> subprocess.Popen:
    """Launch a script as a user does.

    Args:
        mode: name of a file in accelerate_configs/, or a path without .yaml.
        more: flags of `accelerate launch`.
        stdout: as for `Popen`.
    """
    if script.startswith("train_"):
        training_runs.append((script.removesuffix(".py"), arguments, precision))
    config = ROOT / "accelerate_configs" / f"{mode or ('single' if processes == 1 else 'ddp')}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", str(processes), "--mixed_precision", precision]
    command += ["--main_process_port", "0", *more, str(ROOT / script), *keep_last(arguments)]  # any free port
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # for the scripts in tests/workers
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    pipes = {"stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, cwd=ROOT, env=environment, start_new_session=True)


def launch(*args, **kwargs) -> str:
    """A script as a user launches it (see `start`), to its end; what it says on stderr."""
    process = start(*args, **kwargs)
    _, said = process.communicate()
    assert process.returncode == 0, said[-3000:]
    return said


def resume_is_the_same_run(script, flags, folder: Path, *validation) -> Path:
    """4 iterations at once, and 2, resume, 2: the same in all tensors. Returns the output folder of the whole run."""
    whole, halves = folder / "whole", folder / "halves"
    script.main([*flags, *validation, "--output_dir", str(whole)])
    script.main([*flags, "--output_dir", str(halves), "--max_train_steps", "2"])
    resume = ["--resume_from_checkpoint", "latest", "--checkpoints_total_limit", "1"]
    script.main([*flags, *validation, "--output_dir", str(halves), *resume])
    end = states(whole / "checkpoint-4")
    assert_same(end, states(halves / "checkpoint-4"))
    assert any(not torch.equal(tensor, states(whole / "checkpoint-2")[name]) for name, tensor in end.items())
    return whole


def card_code(model: Path) -> str:
    """Return the code of a model card, with the paths that its placeholders stand for."""
    card = (model / "README.md").read_text(encoding="utf-8")
    record = json.loads((model / "senseflow.json").read_text())
    code = card.split("```python\n")[1].split("```")[0]
    for path in filter(os.path.isabs, (record["teacher"], record.get("teacher_lora", ""))):
        assert path not in card
        code = code.replace(repr(f"path/of/{Path(path).name}"), repr(path))
    return code.replace("'path/of/this/folder'", repr(str(model)))


def the_cards_call_is_infers_image(model: Path, levels: str, folder: Path, fresh: bool = True) -> None:
    """The card's few lines, in a fresh process or in this one, visit the record's levels and draw what infer.py draws.

    Args:
        levels: "sigmas" or "timesteps": what of the scheduler is compared with senseflow.json.
    """
    record = json.loads((model / "senseflow.json").read_text())
    code = card_code(model)
    code = code.replace('"a prompt"', '"a red square"').replace(").images", ", generator=g, output_type='np').images")
    bind = "pipeline.scheduler.step = functools.partial(pipeline.scheduler.step, generator=g)\nimage ="
    if "XL" in code:
        bind = "image ="  # this pipeline hands the generator on by itself
    watch = (
        "import torch, numpy, functools\ng = torch.Generator().manual_seed(3)\n"
        + code.replace("image =", bind)
        + f"\nnumpy.save({str(folder / 'stock.npy')!r}, image)\n"
        + f"numpy.save({str(folder / 'levels.npy')!r}, pipeline.scheduler.{levels}.numpy())\n"
    )
    if fresh:
        subprocess.run([sys.executable, "-c", watch], check=True, capture_output=True)
    else:
        exec(watch, {})
    np.testing.assert_allclose(np.load(folder / "levels.npy")[: len(record[levels])], record[levels], atol=1e-6)
    student_samples = image_of(model, folder / "images")
    assert_same_image(student_samples, (np.load(folder / "stock.npy") * 255).round().astype("uint8"))
    assert student_samples.std() > 0


def run_card(model: Path) -> None:
    """The model card's code as it is printed, in the precision of the export: it runs, and draws something."""
    names: dict = {}
    exec(card_code(model), names)
    assert np.asarray(names["image"]).std() > 0


def image_of(model: Path, folder: Path) -> np.ndarray:
    """What infer.py draws with a model's own settings."""
    infer.main(["--model", str(model), "--prompt", "a red square", "--seed", "3", "--output_dir", str(folder)])
    return np.asarray(Image.open(folder / "0000.png"))


def logged(output_dir: Path):
    """The tensorboard events of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {file.parent for file in (output_dir / "logs").rglob("events*")} & set((output_dir / "logs").iterdir())
    return EventAccumulator(str(folder)).Reload()


def refused(script, arguments, code: int, needle: str, capsys) -> None:
    """The script ends with this exit code and one line on stderr that holds `needle`."""
    with pytest.raises(SystemExit) as stop:
        errors.run_script(lambda: script.main(arguments))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == code and len(lines) == 1 and needle in lines[0], lines


def missing(monkeypatch, *packages: str) -> None:
    """These packages are not installed, as far as checks of arguments can see."""
    find = importlib.util.find_spec
    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None if name in packages else find(name))


def without(flags: list[str], *names: str) -> list[str]:
    """Flags without some and the values that follow them (any number)."""
    kept, dropping = [], False
    for part in flags:
        dropping = part in names if part.startswith("--") else dropping
        kept += [] if dropping else [part]
    return kept


def without_gan(flags: list[str]) -> list[str]:
    """Flags without the adversarial term, and without what then has no use."""
    return [*without(flags, "--discriminator_backbone", "--discriminator_text_encoder"), "--gan_weight", "0"]


def models_class(script) -> type[TrainingModels]:
    """The subclass of TrainingModels that a script defines."""
    classes = [
        value for value in vars(script).values() if isinstance(value, type) and issubclass(value, TrainingModels)
    ]
    (cls,) = [cls for cls in set(classes) if cls.__module__ == script.__name__]
    return cls


def built(script, arguments: list[str]) -> SimpleNamespace:
    """What `main` makes of these arguments before its loop, with the pipeline's scheduler already that of the student.

    Attributes:
        args, schedule, pipeline_kwargs, runtime, models, pipeline: the script's.
        step: step(iteration) -> (what `train_iteration` returns, its batches).
    """
    args = script.parse_args(arguments)
    cls = models_class(script)
    script = sys.modules[getattr(script.main, "func", script.main).__module__]  # of a file of teachers/: its script
    source, rows = script.prepare(cls, args)
    schedule, scheduler, pipeline_kwargs = cls.make_schedule(args, source, "cpu")
    runtime = Runtime(args)
    models = script.make_models(cls, args, source, schedule, runtime)
    models.pipeline.register_modules(scheduler=scheduler)
    reads_images = partial(needs_images, args.seed, args.gan_weight, args.backward_simulation_prob)
    data = iter(make_dataloader(args, rows, 0, 1, 0, 0, reads_images))

    def step(iteration):
        batches = [next(data) for _ in range(args.gradient_accumulation_steps)]
        return script.train_iteration(iteration, batches, models, args), batches

    return SimpleNamespace(
        args=args,
        schedule=schedule,
        pipeline_kwargs=pipeline_kwargs,
        runtime=runtime,
        models=models,
        pipeline=models.pipeline,
        step=step,
    )


@torch.no_grad()
def assert_starts_as_the_teacher(models, guidance: Optional[Guidance] = None) -> None:
    """Student and fake score, which are never guided, say what the teacher says at this guidance."""
    x_t, t = torch.randn(2, *models.latent_shape), torch.tensor([900.0, 500.0])
    condition = models.encode_prompts(("a red square", "blue"))
    teacher = models.predict(models.teacher, x_t, t, condition, guidance).x0
    for role in (models.student, models.fake_score):
        torch.testing.assert_close(models.predict(role, x_t, t, condition).x0, teacher, atol=2e-5, rtol=1e-5)


def assert_guided_where_asked(build) -> None:
    """Check the teacher's forwards in L_DMD and in L_ISG: twice the batch for a loss that guides, and only there.

    Args:
        build: `build(*flags) -> built(...)` of a script whose teacher has no guidance embedder.
    """
    one_student_turn = ("--ttur_ratio", "1", "--gradient_accumulation_steps", "1", "--isg_weight", "1")
    for dmd, isg in (("1", "4"), ("4", "1"), ("1", "1")):
        run = build(*one_student_turn, "--dmd_guidance_scale", dmd, "--isg_guidance_scale", isg)
        outputs: list[tuple] = []
        run.models.teacher.module.register_forward_hook(
            lambda _, inputs, output, outputs=outputs: outputs.append(output)
        )
        run.step(0)
        assert [len(output[0]) for output in outputs] == [
            run.args.train_batch_size * (2 if float(scale) > 1 else 1) for scale in (dmd, isg)
        ]
