"""Runs that must go wrong, and one that must not: what the signals of training say of each, and when, beside the Frechet distance.

    python demo/going_wrong.py      # about half an hour on two cores

The demo's training to two steps: as it is; with a rate 30 times too high; with a fake score that never learns; with the gradient of
L_DMD turned around. Checkpoints are drawn and measured as the demo's student. Prints Markdown tables, which README.md has.
"""

import re
import sys

import run as demo
from measure import load_judge, load_pictures, measure
from scenes import all_captions
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


STEPS = 2
SETTINGS = demo.TRAINING_FLAGS[STEPS]
EVERY = 50  # iterations between the pictures of validation, and between checkpoints
SHOWN = (50, 100, 200, 300, 500)
PICTURES_PER_CAPTION = 6
START = "import senseflow_args, train_senseflow_flux as script; {}; senseflow_args.run_script(script.main)"
# 2 T - F lies on the other side of T: the gradient F - T turns around, what it is divided by stays.
FLIP = "right = script.dmd_loss; script.dmd_loss = lambda x0, fake, teacher: right(x0, 2 * teacher - fake, teacher)"
RUNS = {
    "as it is": ({}, "pass"),
    "rate x 30": ({"learning_rate": 30 * SETTINGS["learning_rate"]}, "pass"),
    "fake score's rate 0": ({"learning_rate_fake": 0.0}, "pass"),
    "L_DMD turned around": ({}, FLIP),
}


def train(name, changed, patch, folder):
    validation = {"validation_prompts": all_captions()[::12], "num_validation_images": 4, "validation_steps": EVERY}
    settings = SETTINGS | changed | validation | {"checkpointing_steps": EVERY}
    command = [sys.executable, "-c", START.format(patch), "--pretrained_model_name_or_path", demo.TEACHER]
    command += ["--dataset_json", demo.OUT / "data" / "data.json", "--output_dir", folder, *demo.flags(settings)]
    demo.call(name, command, folder.with_suffix(".log"))


def draw(model, pictures, steps, seed, *guidance):
    prompts = demo.OUT / "prompts_going_wrong.txt"
    prompts.write_text("\n".join(all_captions() * PICTURES_PER_CAPTION) + "\n")
    settings = {"prompts_file": prompts, "batch_size": 96, "num_inference_steps": steps, "sampler": "euler", "seed": seed}
    settings |= {"height": demo.RESOLUTION, "width": demo.RESOLUTION, "dtype": "fp32", "device": "cpu"}
    command = [sys.executable, demo.ROOT / "infer.py", "--model", model, "--output_dir", pictures, *demo.flags(settings), *guidance]
    demo.call(str(pictures), command, pictures.with_suffix(".log"))


def signals_of(folder):
    """{signal: {iteration: value}} of a run."""
    events = EventAccumulator(str(folder / "logs" / "senseflow")).Reload()
    names = [name for name in events.Tags()["scalars"] if name.startswith("signal/")]
    return {name.removeprefix("signal/"): {e.step: e.value for e in events.Scalars(name)} for name in names}


def warnings_of(log):
    """What a run warned of signals."""
    return re.findall(r"WARNING.*?(iteration .*signal/.*)", log.read_text())


def table(names, rows):
    print("| | " + " | ".join(map(str, names)) + " |\n|" + "---|" * (len(names) + 1))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(values) + " |")
    print()


def main():
    captions, folder = all_captions() * PICTURES_PER_CAPTION, demo.OUT / "going_wrong"
    folder.mkdir(parents=True, exist_ok=True)
    if not (demo.OUT / "data").exists():
        demo.write_data(demo.OUT / "data")
    judge, teacher = load_judge(demo.OUT / "judge.pt"), folder / "teacher"
    draw(demo.TEACHER, teacher, demo.TEACHER_STEPS, demo.PICTURE_SEED, "--guidance_scale", demo.TEACHER_GUIDANCE)
    reference = load_pictures(teacher, len(captions))
    distances, signals = {}, {}
    for name, (changed, patch) in RUNS.items():
        run = folder / re.sub(r"\W+", "_", name)
        print(f"{name}: in {run}", flush=True)
        if not run.exists():
            train(name, changed, patch, run)
        for iteration in SHOWN:
            pictures = run / f"pictures-{iteration}"
            draw(run / f"checkpoint-{iteration}", pictures, STEPS, demo.PICTURE_SEED)
            found = measure(judge, load_pictures(pictures, len(captions)), captions, reference)
            distances.setdefault(name, []).append(f"{found['fd']:.2f} ({found['diversity']:.2f})")
        signals[name] = signals_of(run)
    print("\nFD (diversity) of checkpoints\n")
    table(SHOWN, distances)
    for signal in signals["as it is"]:
        print(f"{signal}\n")
        near = {name: found[signal] for name, found in signals.items()}
        table(SHOWN, {name: [f"{values[at]:.3g}" if at in values else "" for at in SHOWN] for name, values in near.items()})
    for name in RUNS:
        for line in warnings_of((folder / re.sub(r"\W+", "_", name)).with_suffix(".log")):
            print(f"{name}: {line}")


if __name__ == "__main__":
    main()
