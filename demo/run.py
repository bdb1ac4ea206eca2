"""Distill the bundled teacher to few steps, generate images and measure them. `make demo` runs this file.

    python demo/run.py              # one step; three to five minutes on two cores
    python demo/run.py --steps 2    # two steps
    python demo/run.py --seed 1     # another training seed

It runs the scripts of the repository, train_senseflow_flux.py and infer.py, and writes
demo/out: comparison.png, report.json and student, a diffusers pipeline. A stage runs again only if its inputs change.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from comparison import draw_comparison
from components import MAX_SEQUENCE_LENGTH
from measure import load_classifier, load_images, measure
from scenes import RESOLUTION, all_captions, sample_scenes


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = HERE / "out"
TEACHER = HERE / "teacher"
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "senseflow").rglob("*.py")])

IMAGES_PER_CAPTION = 12  # x 96 captions = 1152 images per row of the report
SCENES_TO_TRAIN_ON = 960
TEACHER_STEPS = 28
TEACHER_GUIDANCE = 2.0
# The teacher's best guidance at one and two steps and its best shift at two, found by few_step_grid.py.
TEACHER_FEW_GUIDANCE, TEACHER_FEW_SHIFT = {1: 1.5, 2: 2.0}, 3.0
# infer.py generates image i with seed + i, so these two have no seed in common.
IMAGE_SEED, OTHER_IMAGE_SEED = 0, 1_000_000

COMMON_FLAGS = {
    "max_train_steps": 500,
    "train_batch_size": 32,
    "resolution": RESOLUTION,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    "sampler": "euler",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "adam_beta1": 0.0,
    "adam_beta2": 0.99,
    "ttur_ratio": 3,
    "isg_margin": 100,  # keeps t_mid near the middle of its segment, where the teacher's extra step helps most
    "gan_weight": 0,  # these images need no discriminator, and it would take more time than all the rest
    "backward_simulation_prob": 1.0,
    "dmd_guidance_scale": 1.7,  # below TEACHER_GUIDANCE: a guided score narrows more than guided sampling
    "isg_guidance_scale": TEACHER_GUIDANCE,
    "student_guidance_scale": TEACHER_GUIDANCE,
    "mixed_precision": "no",
    "export_dtype": "fp32",
    "report_to": "tensorboard",
}
TRAINING_FLAGS = {
    # One step starts far from its goal, so learning rates are high. ISG, whose target ends in the student, has little
    # weight.
    1: COMMON_FLAGS
    | {"anchors": [1000], "learning_rate": 4e-4, "learning_rate_fake": 1e-3, "ida_decay": 0.9, "isg_weight": 0.05},
    # The levels of two steps at shift 3, so that the student starts from the teacher's best few-step sampling.
    2: COMMON_FLAGS
    | {
        "anchors": [1000, 750],
        "learning_rate": 3e-5,
        "learning_rate_fake": 2e-4,
        "ida_decay": 0.97,
        "isg_weight": 1.0,
    },
}


class Stages:
    """Run named stages; skip a stage whose inputs have the same hash as in its last complete run."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name, inputs, output, action):
        """Run `action()` unless `output` exists and was made from the same inputs.

        Args:
            name: name of the stage and of its record.
            inputs: files and folders (Path, hashed by content) and JSON values.
            output: Path, deleted before the stage runs.
            action: creates `output`.

        Returns:
            Seconds of the stage's last run.
        """
        inputs_hash = digest(inputs)
        record = self.folder / f"{name}.json"
        if record.exists() and output.exists():
            last = json.loads(record.read_text())
            if last["inputs"] == inputs_hash:
                print(f"{name}: unchanged", flush=True)
                return last["seconds"]
        record.unlink(missing_ok=True)
        if output.is_dir():
            shutil.rmtree(output)
        output.unlink(missing_ok=True)
        print(f"{name}: started", flush=True)
        start = time.monotonic()
        action()
        seconds = time.monotonic() - start
        record.write_text(json.dumps({"inputs": inputs_hash, "seconds": seconds}))
        print(f"{name}: {seconds:.0f} s", flush=True)
        return seconds


def digest(inputs):
    """Hash a list of Paths (by content, folders file by file) and JSON values."""
    hasher = hashlib.sha256()
    for value in inputs:
        if isinstance(value, Path):
            files = sorted(path for path in value.rglob("*") if path.is_file()) if value.is_dir() else [value]
            for file in files:
                hasher.update(str(file.relative_to(value.parent)).encode() + file.read_bytes())
        else:
            hasher.update(json.dumps(value).encode())
    return hasher.hexdigest()


def run_command(name, command, log):
    """Run a command in the repository's root with half of the cores; its output goes to the file `log`."""
    threads = str(max(1, (os.cpu_count() or 1) // 2))
    with open(log, "w") as stream:
        code = subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=stream,
            stderr=subprocess.STDOUT,
        ).returncode
    if code != 0:
        raise DemoError(f"{name} failed with exit code {code}; its output is in {log}")


class DemoError(Exception):
    """A stage failed; the message names the stage and its log."""


def flags(values):
    """Return the flags of a dictionary: {"a": 1, "b": [2, 3]} -> ["--a", 1, "--b", 2, 3]."""
    return [
        part
        for name, value in values.items()
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def write_data(folder):
    """Write the training scenes for `--dataset_json`: data.json and its images."""
    (folder / "images").mkdir(parents=True)
    table = {"keys": [], "image_paths": [], "prompts": []}
    for index, (caption, image) in enumerate(sample_scenes(SCENES_TO_TRAIN_ON, seed=7)):
        image.save(folder / "images" / f"{index:04d}.png")
        table["keys"].append(f"{index:04d}")
        table["image_paths"].append(f"images/{index:04d}.png")
        table["prompts"].append(caption)
    (folder / "data.json").write_text(json.dumps(table))


def write_shifted_teacher(folder):
    """Copy the teacher with a scheduler of shift TEACHER_FEW_SHIFT, to be sampled at few steps."""
    shutil.copytree(TEACHER, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": TEACHER_FEW_SHIFT}, indent=2) + "\n")


def time_call(model, steps, repeat=7):
    """Return the median seconds of a diffusers call for one image, on half of the cores."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": steps, "max_sequence_length": MAX_SEQUENCE_LENGTH}
    kwargs |= {"height": RESOLUTION, "width": RESOLUTION}
    seconds = []
    for _ in range(repeat):
        start = time.monotonic()
        pipeline("red star on stripes", **kwargs)
        seconds.append(time.monotonic() - start)
    return round(statistics.median(seconds), 3)


class Demo:
    """Run the stages in two lanes, each on half of the cores, and write the report."""

    def __init__(self, steps, seed):
        self.steps, self.seed = steps, seed
        self.stages = Stages(OUT / "stages")
        self.logs = OUT / "logs"
        self.logs.mkdir(exist_ok=True)
        self.captions = all_captions() * IMAGES_PER_CAPTION
        self.prompts_file = OUT / "prompts.txt"
        self.prompts_file.write_text("\n".join(self.captions) + "\n")
        self.seconds = {}

    def train(self):
        data, student = OUT / "data", OUT / "student"
        self.stages.run("data", [HERE / "scenes.py", SCENES_TO_TRAIN_ON], data, lambda: write_data(data))
        command = [sys.executable, ROOT / "train_senseflow_flux.py"]
        command += ["--pretrained_model_name_or_path", TEACHER, "--dataset_json", data / "data.json"]
        command += ["--output_dir", student, "--seed", self.seed, *flags(TRAINING_FLAGS[self.steps])]
        self.seconds["training"] = self.stages.run(
            "training",
            [TEACHER, data, *SOURCES, [str(part) for part in command]],
            student,
            lambda: run_command("training", command, self.logs / "training.log"),
        )

    def sample(self, name, model, steps, seed, guidance=None):
        """Generate one image per line of the prompts file with infer.py and the Euler sampler."""
        folder = OUT / "images" / name
        settings = {
            "prompts_file": str(self.prompts_file),
            "batch_size": 100,
            "num_inference_steps": steps,
            "sampler": "euler",
            "seed": seed,
            "height": RESOLUTION,
            "width": RESOLUTION,
            "dtype": "fp32",
            "device": "cpu",
        }
        if guidance is not None:
            settings["guidance_scale"] = guidance
        command = [sys.executable, ROOT / "infer.py", "--model", model, "--output_dir", folder, *flags(settings)]
        self.seconds[name] = self.stages.run(
            name,
            [model, self.prompts_file, *SOURCES, settings],
            folder,
            lambda: run_command(name, command, self.logs / f"{name}.log"),
        )

    def student_lane(self):
        self.train()
        self.sample("student", OUT / "student", self.steps, IMAGE_SEED)
        shifted = OUT / "teacher_shifted"
        self.stages.run(
            "teacher_shifted", [TEACHER, TEACHER_FEW_SHIFT], shifted, lambda: write_shifted_teacher(shifted)
        )
        self.sample("teacher_few", shifted, self.steps, IMAGE_SEED, TEACHER_FEW_GUIDANCE[self.steps])

    def teacher_lane(self):
        classifier = OUT / "classifier.pt"
        inputs = [HERE / "scenes.py", HERE / "measure.py"]
        self.stages.run("classifier", inputs, classifier, lambda: load_classifier(classifier))
        self.sample("teacher_28", TEACHER, TEACHER_STEPS, IMAGE_SEED, TEACHER_GUIDANCE)
        self.sample("floor", TEACHER, TEACHER_STEPS, OTHER_IMAGE_SEED, TEACHER_GUIDANCE)

    def report(self):
        """Measure all images, write report.json and comparison.png, and return the report."""
        classifier = load_classifier(OUT / "classifier.pt")
        rows = {"floor": TEACHER_STEPS, "teacher_28": TEACHER_STEPS, "teacher_few": self.steps, "student": self.steps}
        images = {name: load_images(OUT / "images" / name, len(self.captions)) for name in rows}
        report = {}
        for name, forwards in rows.items():
            report[name] = measure(classifier, images[name], self.captions, images["teacher_28"])
            report[name] |= {"forwards": forwards, "seconds": round(self.seconds[name], 1)}
        few, floor = report["teacher_few"]["fd"], report["floor"]["fd"]
        report["gap_closed"] = (few - report["student"]["fd"]) / (few - floor)
        report["training"] = {
            "seconds": round(self.seconds["training"], 1),
            "seed": self.seed,
            **TRAINING_FLAGS[self.steps],
        }
        report["note"] = "The adversarial term is off (gan_weight 0); DMD, IDA and ISG train the student."
        (OUT / "report.json").write_text(json.dumps(report, indent=2) + "\n")

        few = "1 step" if self.steps == 1 else f"{self.steps} steps"
        labels = {
            "teacher_28": f"teacher\n{TEACHER_STEPS} steps",
            "teacher_few": f"teacher\n{few}",
            "student": f"student\n{few}",
        }
        for name, label in labels.items():
            report[name]["seconds_per_image"] = time_call(
                OUT / "student" if name == "student" else TEACHER, rows[name]
            )
            labels[name] = f"{label}\n{report[name]['seconds_per_image']:.2f} s"
        columns = np.linspace(3, len(all_captions()) - 4, 9).astype(int)
        draw_comparison(
            {label: images[name][columns] for name, label in labels.items()},
            [self.captions[column] for column in columns],
        ).save(OUT / "comparison.png")
        return report


def print_report(report):
    print(f"\n{'':12} {'FD':>8} {'captions right':>15} {'diversity':>10} {'forwards':>9} {'s per image':>12}")
    for name in ("floor", "teacher_28", "teacher_few", "student"):
        row = report[name]
        seconds = f"{row['seconds_per_image']:.2f}" if "seconds_per_image" in row else ""
        measures = f"{row['fd']:8.2f} {row['accuracy']:15.3f} {row['diversity']:10.2f}"
        print(f"{name:12} {measures} {row['forwards']:9d} {seconds:>12}")
    few = report["student"]["forwards"]
    print(f"\nThe student closes {report['gap_closed']:.0%} of the teacher's gap between {few} and 28 steps.")
    print(report["note"])
    print(f"Images: {OUT / 'comparison.png'}, student: {OUT / 'student'}, numbers: {OUT / 'report.json'}.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--steps", type=int, choices=sorted(TRAINING_FLAGS), default=1, help="sampling steps of the student"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the training; that of the images stays the same")
    args = parser.parse_args()

    start = time.monotonic()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    OUT.mkdir(exist_ok=True)
    demo = Demo(args.steps, args.seed)
    with ThreadPoolExecutor(2) as lanes:
        running = [lanes.submit(demo.student_lane), lanes.submit(demo.teacher_lane)]
    try:
        for lane in running:
            lane.result()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    print_report(demo.report())
    print(f"Took {time.monotonic() - start:.0f} s.")


if __name__ == "__main__":
    main()
