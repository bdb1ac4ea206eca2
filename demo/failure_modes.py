"""Compare sound runs with runs that must fail: the signals of training, their warnings, and the Frechet distance.

    python demo/failure_modes.py      # about half an hour on two cores

Sound are the demo's training to two steps, to one step, and of adapters. Runs to two steps must fail with a learning
rate 30 times as high, with a fake score whose learning rate is 0, and with a reversed gradient of L_DMD. Prints the
tables of benchmarks/RESULTS.md.
"""

import re
import shutil
import statistics
import sys

import run as demo
from measure import load_classifier, load_images, measure
from scenes import all_captions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


VALIDATION_STEPS = 50
MEASURED = (100, 300)  # iterations whose checkpoints are measured, besides the last
IMAGES_PER_CAPTION = 6
CODE = "import train_senseflow_flux as script; from senseflow.errors import run_script; {}; run_script(script.main)"
# With 2 T - F in place of the fake score's F, the gradient F - T is reversed; its normalizer |x0 - T| stays the same.
REVERSED = "loss = script.dmd_loss; script.dmd_loss = lambda x0, fake, teacher: loss(x0, 2 * teacher - fake, teacher)"
ADAPTERS = {"rank": 32, "learning_rate": 2e-4, "learning_rate_fake": 1e-3, "ida_decay": 0.9, "max_train_steps": 750}
# {name: (sampling steps of the student, flags that differ, patch of the script)}
RUNS = {
    "two steps": (2, {}, "pass"),
    "one step": (1, {}, "pass"),
    "rank 32": (2, ADAPTERS, "pass"),
    "rate x 30": (2, {"learning_rate": 30 * demo.TRAINING_FLAGS[2]["learning_rate"]}, "pass"),
    "fake score's rate 0": (2, {"learning_rate_fake": 0.0}, "pass"),
    "L_DMD reversed": (2, {}, REVERSED),
}


def train(name, steps, changed, patch, folder):
    """Train one of RUNS; its output goes to FOLDER.log."""
    settings = demo.TRAINING_FLAGS[steps] | changed | {"checkpointing_steps": MEASURED[0]}
    settings |= {"validation_prompts": all_captions()[::12], "num_validation_images": 4}
    settings |= {"validation_steps": VALIDATION_STEPS}
    command = [sys.executable, "-c", CODE.format(patch), "--pretrained_model_name_or_path", demo.TEACHER]
    command += ["--dataset_json", demo.OUT / "data" / "data.json", "--output_dir", folder, *demo.flags(settings)]
    demo.run_command(name, command, folder.with_suffix(".log"))


def generate(model, images, steps, *guidance):
    """Generate the images of all captions with infer.py."""
    prompts = demo.OUT / "prompts_failure_modes.txt"
    prompts.write_text("\n".join(all_captions() * IMAGES_PER_CAPTION) + "\n")
    settings = {"prompts_file": prompts, "batch_size": 96, "num_inference_steps": steps, "sampler": "euler"}
    settings |= {"seed": demo.IMAGE_SEED, "height": demo.RESOLUTION, "width": demo.RESOLUTION}
    settings |= {"dtype": "fp32", "device": "cpu"}
    command = [sys.executable, demo.ROOT / "infer.py", "--model", model, "--output_dir", images]
    demo.run_command(str(images), [*command, *demo.flags(settings), *guidance], images.with_suffix(".log"))


def signals_of(folder):
    """Return {signal: mean of its last tenth} of a run."""
    events = EventAccumulator(str(folder / "logs" / "senseflow"), size_guidance={"scalars": 0}).Reload()
    signals = {}
    for name in events.Tags()["scalars"]:
        if name.startswith("signal/"):
            values = [event.value for event in events.Scalars(name)]
            signals[name] = statistics.mean(values[-max(1, len(values) // 10) :])
    return signals


def warnings_of(log):
    """Return {signal: iteration of its warning} of a run."""
    matches = re.findall(r"WARNING.*?iteration (\d+): (signal/\S+) is", log.read_text())
    return {name: int(iteration) for iteration, name in matches}


def print_table(names, rows):
    print("| | " + " | ".join(map(str, names)) + " |\n|" + "---|" * (len(names) + 1))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")
    print()


def main():
    captions, folder = all_captions() * IMAGES_PER_CAPTION, demo.OUT / "failure_modes"
    folder.mkdir(parents=True, exist_ok=True)
    if not (demo.OUT / "data").exists():
        demo.write_data(demo.OUT / "data")
    classifier, teacher = load_classifier(demo.OUT / "classifier.pt"), folder / "teacher"
    generate(demo.TEACHER, teacher, demo.TEACHER_STEPS, "--guidance_scale", demo.TEACHER_GUIDANCE)
    reference = load_images(teacher, len(captions))
    distances, signals = {}, {}
    for name, (steps, changed, patch) in RUNS.items():
        run = folder / re.sub(r"\W+", "_", name)
        print(f"{name}: in {run}", flush=True)
        if not (run / "senseflow.json").exists():
            shutil.rmtree(run, ignore_errors=True)
            train(name, steps, changed, patch, run)
        last = changed.get("max_train_steps", demo.TRAINING_FLAGS[steps]["max_train_steps"])
        for iteration in (*MEASURED, last):
            images = run / f"images-{iteration}"
            generate(run if iteration == last else run / f"checkpoint-{iteration}", images, steps)
            result = measure(classifier, load_images(images, len(captions)), captions, reference)
            distances.setdefault(name, []).append(f"{result['fd']:.2f} ({result['diversity']:.2f})")
        warnings = warnings_of(run.with_suffix(".log"))
        for signal, value in signals_of(run).items():
            cell = f"{value:.2g}" + (f" **{warnings[signal]}**" if signal in warnings else "")
            signals.setdefault(f"`{signal}`", {})[name] = cell
    print("\nFD (diversity) of checkpoints\n")
    print_table((*MEASURED, "last"), distances)
    print("Signals, mean of their last tenth; in bold the iteration of the warning\n")
    print_table(RUNS, {signal: [cells.get(name, "") for name in RUNS] for signal, cells in signals.items()})


if __name__ == "__main__":
    try:
        main()
    except demo.DemoError as error:
        sys.exit(f"failure_modes: {error}")
