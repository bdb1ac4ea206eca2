"""The demo: distil the bundled teacher to a few steps, sample it, measure it. `make demo` calls this.

    python demo/run.py              # to one step; three to five minutes on two cores
    python demo/run.py --steps 2    # to two
    python demo/run.py --seed 1     # with another training seed

It drives the repository's own scripts, train_senseflow_flux.py through `accelerate launch` and infer.py, and leaves
in demo/out: comparison.png, report.json and student, a diffusers pipeline. A stage whose inputs have not changed since
it last ran is not run again.
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
from measure import load_images, load_judge, measure
from scenes import RESOLUTION, all_captions, sample_scenes


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = HERE / "out"
TEACHER = HERE / "teacher"
SCRIPTS = sorted(ROOT.glob("*.py"))

IMAGES_PER_CAPTION = 12  # x 96 captions = 1152 images a row of the report
SCENES_TO_TRAIN_ON = 960
TEACHER_STEPS = 28
TEACHER_GUIDANCE = 2.0
# The teacher's best guidance at a few steps, and its best shift at two, found by few_step_grid.py; README.md has the table.
TEACHER_FEW_GUIDANCE, TEACHER_FEW_SHIFT = {1: 1.5, 2: 2.0}, 3.0
# infer.py draws image i with seed + i: far enough apart to share none.
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
    "isg_margin": 100,  # t_mid near the middle of its segment, where one more step of the teacher's helps most
    "gan_weight": 0,  # images this simple need no discriminator, and it would cost more than all the rest
    "backward_simulation_prob": 1.0,
    "dmd_guidance_scale": 1.7,  # a guided score belongs to a narrower distribution than guidance draws
    "isg_guidance_scale": TEACHER_GUIDANCE,
    "student_guidance_scale": TEACHER_GUIDANCE,
    "mixed_precision": "no",
    "export_dtype": "fp32",
    "report_to": "tensorboard",
}
TRAINING_FLAGS = {
    # One step starts far from where it is to end: it learns fast, and takes little of ISG, whose target ends in the student itself.
    1: COMMON_FLAGS
    | {"anchors": [1000], "learning_rate": 4e-4, "learning_rate_fake": 1e-3, "ida_decay": 0.9, "isg_weight": 0.05},
    # What shift 3 visits in two steps: the student starts from the teacher's best.
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
    """Runs named stages, and reuses one whose stamp, a hash of its inputs, is that of its last complete run."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def run(self, name, inputs, output, action):
        """Run `action()` unless `output` stands from the same inputs.

        Args:
            name: of the stage and of its stamp.
            inputs: what decides the output: files or folders (Path, hashed by content) and anything JSON can hold.
            output: Path, deleted before the stage runs.
            action: makes `output`.

        Returns:
            Seconds the stage took when it ran.
        """
        stamp = digest(inputs)
        record = self.folder / f"{name}.json"
        if record.exists() and output.exists():
            last = json.loads(record.read_text())
            if last["stamp"] == stamp:
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
        record.write_text(json.dumps({"stamp": stamp, "seconds": seconds}))
        print(f"{name}: {seconds:.0f} s", flush=True)
        return seconds


def digest(inputs):
    """Hash of a list of Paths (by content, folders file by file) and JSON values."""
    hasher = hashlib.sha256()
    for value in inputs:
        if isinstance(value, Path):
            files = sorted(path for path in value.rglob("*") if path.is_file()) if value.is_dir() else [value]
            for file in files:
                hasher.update(str(file.relative_to(value.parent)).encode() + file.read_bytes())
        else:
            hasher.update(json.dumps(value).encode())
    return hasher.hexdigest()


def call(name, command, log):
    """Run a command from the repository's root with half of the cores; ends the demo in one line if it fails."""
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
    """A stage failed; the message says which and where to look."""


def flags(values):
    """{"a": 1, "b": [2, 3]} -> ["--a", 1, "--b", 2, 3]."""
    return [
        part
        for name, value in values.items()
        for part in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def write_data(folder):
    """The training scenes as `--dataset_json` wants them: data.json and the images it names."""
    (folder / "images").mkdir(parents=True)
    table = {"keys": [], "image_paths": [], "prompts": []}
    for index, (caption, image) in enumerate(sample_scenes(SCENES_TO_TRAIN_ON, seed=7)):
        image.save(folder / "images" / f"{index:04d}.png")
        table["keys"].append(f"{index:04d}")
        table["image_paths"].append(f"images/{index:04d}.png")
        table["prompts"].append(caption)
    (folder / "data.json").write_text(json.dumps(table))


def write_shifted_teacher(folder):
    """The teacher with a scheduler of shift TEACHER_FEW_SHIFT, for the samples at few steps."""
    shutil.copytree(TEACHER, folder)
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"shift": TEACHER_FEW_SHIFT}, indent=2) + "\n")


def seconds_a_image(model, steps, times=7):
    """Median of the seconds that a stock call takes for one image, on half of the cores."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    found = []
    for _ in range(times):
        start = time.monotonic()
        call = {
            "num_inference_steps": steps,
            "height": RESOLUTION,
            "width": RESOLUTION,
            "max_sequence_length": MAX_SEQUENCE_LENGTH,
        }
        pipeline("red star on stripes", **call)
        found.append(time.monotonic() - start)
    return round(statistics.median(found), 3)


class Demo:
    """The stages of the demo in two lanes, each on half of the cores, and the report."""

    def __init__(self, steps, seed):
        self.steps, self.seed = steps, seed
        self.stages = Stages(OUT / "stamps")
        self.logs = OUT / "logs"
        self.logs.mkdir(exist_ok=True)
        self.captions = all_captions() * IMAGES_PER_CAPTION
        self.prompts_file = OUT / "prompts.txt"
        self.prompts_file.write_text("\n".join(self.captions) + "\n")
        self.seconds = {}

    def train(self):
        data, student = OUT / "data", OUT / "student"
        self.stages.run("data", [HERE / "scenes.py", SCENES_TO_TRAIN_ON], data, lambda: write_data(data))
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", ROOT / "accelerate_configs" / "single.yaml", ROOT / "train_senseflow_flux.py"]
        command += ["--pretrained_model_name_or_path", TEACHER, "--dataset_json", data / "data.json"]
        command += ["--output_dir", student, "--seed", self.seed, *flags(TRAINING_FLAGS[self.steps])]
        self.seconds["training"] = self.stages.run(
            "training",
            [TEACHER, data, *SCRIPTS, [str(part) for part in command]],
            student,
            lambda: call("training", command, self.logs / "training.log"),
        )

    def sample(self, name, model, steps, seed, guidance=None):
        """Draw one image per line of the prompts file with infer.py; Euler steps."""
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
            [model, self.prompts_file, ROOT / "infer.py", settings],
            folder,
            lambda: call(name, command, self.logs / f"{name}.log"),
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
        judge = OUT / "judge.pt"
        inputs = [HERE / "scenes.py", HERE / "measure.py"]
        self.stages.run("judge", inputs, judge, lambda: load_judge(judge))
        self.sample("teacher_28", TEACHER, TEACHER_STEPS, IMAGE_SEED, TEACHER_GUIDANCE)
        self.sample("floor", TEACHER, TEACHER_STEPS, OTHER_IMAGE_SEED, TEACHER_GUIDANCE)

    def report(self):
        """Measure all images; writes report.json and comparison.png and returns the report."""
        judge = load_judge(OUT / "judge.pt")
        rows = {"floor": TEACHER_STEPS, "teacher_28": TEACHER_STEPS, "teacher_few": self.steps, "student": self.steps}
        images = {name: load_images(OUT / "images" / name, len(self.captions)) for name in rows}
        report = {}
        for name, forwards in rows.items():
            report[name] = measure(judge, images[name], self.captions, images["teacher_28"])
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
            report[name]["seconds_a_image"] = seconds_a_image(
                OUT / "student" if name == "student" else TEACHER, rows[name]
            )
            labels[name] = f"{label}\n{report[name]['seconds_a_image']:.2f} s"
        columns = np.linspace(3, len(all_captions()) - 4, 9).astype(int)
        draw_comparison(
            {label: images[name][columns] for name, label in labels.items()},
            [self.captions[column] for column in columns],
        ).save(OUT / "comparison.png")
        return report


def print_report(report):
    print(f"\n{'':12} {'FD':>8} {'captions right':>15} {'diversity':>10} {'forwards':>9} {'s an image':>12}")
    for name in ("floor", "teacher_28", "teacher_few", "student"):
        row = report[name]
        seconds = f"{row['seconds_a_image']:.2f}" if "seconds_a_image" in row else ""
        print(
            f"{name:12} {row['fd']:8.2f} {row['accuracy']:15.3f} {row['diversity']:10.2f} {row['forwards']:9d} {seconds:>12}"
        )
    few = report["student"]["forwards"]
    print(
        f"\nThe student closes {report['gap_closed']:.0%} of the distance between {few} and 28 of the teacher's steps."
    )
    print(report["note"])
    print(
        f"Look at {OUT / 'comparison.png'}; the student is {OUT / 'student'}, the numbers are in {OUT / 'report.json'}."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, choices=sorted(TRAINING_FLAGS), default=1, help="of the student")
    parser.add_argument("--seed", type=int, default=0, help="seed of the distillation; the images keep theirs")
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
