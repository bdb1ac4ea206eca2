"""Runs that must go wrong, and some that must not: what the signals of training say of each, and when, beside the Frechet distance.

    python demo/failure_modes.py      # about half an hour on two cores

The demo's training as it is, to two steps, to one, and of adapters; and to two with a rate 30 times too high, with a fake score
that never learns, and with the gradient of L_DMD turned around. Prints Markdown tables, which README.md has.
"""

import re
import shutil
import statistics
import sys

import run as demo
from measure import load_images, load_judge, measure
from scenes import all_captions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


EVERY = 50  # iterations between the images of validation
SHOWN = (100, 300, 500)  # and the last: iterations of the checkpoints that are drawn
IMAGES_PER_CAPTION = 6
START = "import senseflow.arguments, train_senseflow_flux as script; {}; senseflow.errors.run_script(script.main)"
# 2 T - F lies on the other side of T: the gradient F - T turns around, what it is divided by stays.
FLIP = "right = script.dmd_loss; script.dmd_loss = lambda x0, fake, teacher: right(x0, 2 * teacher - fake, teacher)"
ADAPTERS = {"rank": 32, "learning_rate": 2e-4, "learning_rate_fake": 1e-3, "ida_decay": 0.9, "max_train_steps": 750}
# Name: steps of the student, flags that are different, and what is done to the script.
RUNS = {
    "two steps": (2, {}, "pass"),
    "one step": (1, {}, "pass"),
    "rank 32": (2, ADAPTERS, "pass"),
    "rate x 30": (2, {"learning_rate": 30 * demo.TRAINING_FLAGS[2]["learning_rate"]}, "pass"),
    "fake score's rate 0": (2, {"learning_rate_fake": 0.0}, "pass"),
    "L_DMD turned around": (2, {}, FLIP),
}


def train(name, steps, changed, patch, folder):
    validation = {"validation_prompts": all_captions()[::12], "num_validation_images": 4, "validation_steps": EVERY}
    settings = demo.TRAINING_FLAGS[steps] | changed | validation | {"checkpointing_steps": SHOWN[0]}
    command = [sys.executable, "-c", START.format(patch), "--pretrained_model_name_or_path", demo.TEACHER]
    command += ["--dataset_json", demo.OUT / "data" / "data.json", "--output_dir", folder, *demo.flags(settings)]
    demo.call(name, command, folder.with_suffix(".log"))


def draw(model, images, steps, seed, *guidance):
    prompts = demo.OUT / "prompts_failure_modes.txt"
    prompts.write_text("\n".join(all_captions() * IMAGES_PER_CAPTION) + "\n")
    settings = {
        "prompts_file": prompts,
        "batch_size": 96,
        "num_inference_steps": steps,
        "sampler": "euler",
        "seed": seed,
    }
    settings |= {"height": demo.RESOLUTION, "width": demo.RESOLUTION, "dtype": "fp32", "device": "cpu"}
    command = [
        sys.executable,
        demo.ROOT / "infer.py",
        "--model",
        model,
        "--output_dir",
        images,
        *demo.flags(settings),
        *guidance,
    ]
    demo.call(str(images), command, images.with_suffix(".log"))


def signals_of(folder):
    """{signal: the mean of its last tenth} of a run."""
    events = EventAccumulator(str(folder / "logs" / "senseflow"), size_guidance={"scalars": 0}).Reload()
    values = {
        name: [e.value for e in events.Scalars(name)]
        for name in events.Tags()["scalars"]
        if name.startswith("signal/")
    }
    return {name: statistics.mean(found[-max(1, len(found) // 10) :]) for name, found in values.items()}


def warnings_of(log):
    """{signal: iteration of its warning} of a run."""
    return {
        name: int(iteration)
        for iteration, name in re.findall(r"WARNING.*?iteration (\d+): (signal/\S+) is", log.read_text())
    }


def table(names, rows):
    print("| | " + " | ".join(map(str, names)) + " |\n|" + "---|" * (len(names) + 1))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")
    print()


def main():
    captions, folder = all_captions() * IMAGES_PER_CAPTION, demo.OUT / "failure_modes"
    folder.mkdir(parents=True, exist_ok=True)
    if not (demo.OUT / "data").exists():
        demo.write_data(demo.OUT / "data")
    judge, teacher = load_judge(demo.OUT / "judge.pt"), folder / "teacher"
    draw(demo.TEACHER, teacher, demo.TEACHER_STEPS, demo.IMAGE_SEED, "--guidance_scale", demo.TEACHER_GUIDANCE)
    reference = load_images(teacher, len(captions))
    distances, signals = {}, {}
    for name, (steps, changed, patch) in RUNS.items():
        run = folder / re.sub(r"\W+", "_", name)
        print(f"{name}: in {run}", flush=True)
        if not (run / "senseflow.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            train(name, steps, changed, patch, run)
        last = changed.get("max_train_steps", demo.TRAINING_FLAGS[steps]["max_train_steps"])
        for iteration in (*SHOWN[:-1], last):
            images = run / f"images-{iteration}"
            draw(run if iteration == last else run / f"checkpoint-{iteration}", images, steps, demo.IMAGE_SEED)
            found = measure(judge, load_images(images, len(captions)), captions, reference)
            distances.setdefault(name, []).append(f"{found['fd']:.2f} ({found['diversity']:.2f})")
        warned = warnings_of(run.with_suffix(".log"))
        for signal, value in signals_of(run).items():
            said = f"{value:.2g}" + (f" **{warned[signal]}**" if signal in warned else "")
            signals.setdefault(f"`{signal}`", {})[name] = said
    print("\nFD (diversity) of checkpoints\n")
    table((*SHOWN[:-1], "last"), distances)
    print("Signals, the mean of their last tenth, and in bold the iteration that warned\n")
    table(RUNS, {signal: [found.get(name, "") for name in RUNS] for signal, found in signals.items()})


if __name__ == "__main__":
    try:
        main()
    except demo.DemoError as error:
        sys.exit(f"failure_modes: {error}")
