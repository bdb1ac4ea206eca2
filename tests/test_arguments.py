"""What was given on the command line, and what of it would change nothing."""

import os
import re
import subprocess
import sys

import pytest

import evaluate
import infer
import train_dmd2_sdxl
import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from helpers import ROOT, models_class
from senseflow.arguments import (
    Parser,
    apply_preset,
    check_common_args,
    complete_args,
    file_size,
    keep_last,
    number,
)
from senseflow.errors import UserError


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
SCRIPTS["dmd2"] = train_dmd2_sdxl
GAN_OFF, PROMPTS_ALONE = (
    ["--gan_weight", "0"],
    ["--gan_weight", "0", "--backward_simulation_prob", "1", "--prompts_file", "p.txt"],
)


def parse(script: str, *flags: str):
    """The completed arguments of a run."""
    data = [] if "--prompts_file" in flags or "--dataset_lmdb" in flags else ["--dataset_name", "a/b"]
    args = SCRIPTS[script].parse_args(["--pretrained_model_name_or_path", "x", "--output_dir", "y", *data, *flags])
    if script == "sd3":
        apply_preset(args, train_senseflow_sd3.PRESETS["medium"])
    complete_args(args)
    return args


def test_what_was_given_is_known_and_does_not_show():
    args = parse(
        "flux", "--anchors", "1000", "500", "--random_flip", "--learning_rate", "1e-5", "--sampler", "stochastic"
    )
    names = {
        "pretrained_model_name_or_path",
        "output_dir",
        "dataset_name",
        "anchors",
        "random_flip",
        "learning_rate",
        "sampler",
    }
    assert set(args.given) == names, "given as it is by default is given, too"
    assert "given" not in vars(args) and vars(args).keys() > names and args.ttur_ratio == 5


def test_a_flag_that_adds_to_a_list_is_known_to_be_given():
    parser = Parser()
    parser.add_argument("--call", nargs="+", action="extend", default=[])
    args = parser.parse_args(["--call", "a", "--call", "b"])
    assert args.call == ["a", "b"] and args.given == ("call",) and not parser.parse_args([]).given


@pytest.mark.parametrize("script", [*SCRIPTS.values(), infer, evaluate], ids=lambda script: script.__name__)
def test_arguments_that_are_not_utf8_are_refused(script):
    """Trackers, tokenizers and Arrow would each fail on them in its own words."""
    flags = ["--output_dir", "out", "--prompts_file", "a", os.fsdecode(b"caf\xe9.txt")]
    with pytest.raises(UserError, match=r"^--prompts_file 'caf\\udce9.txt': is not UTF-8; rename ") as caught:
        script.parse_args(flags)
    assert caught.value.exit_code == 2


FILES = [*(f"{script.__name__}.py" for script in SCRIPTS.values()), "infer.py", "evaluate.py"]


@pytest.mark.parametrize("script", FILES)
def test_a_flag_that_is_given_twice_is_refused(script):
    flag = "--images" if script == "evaluate.py" else "--output_dir"
    command = [sys.executable, str(ROOT / script), flag, "a", f"{flag}=b"]
    ended = subprocess.run(command, capture_output=True, text=True)
    line = f"{script}: error: {flag}=b: is given more than once; give it once (see --help)\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", line)


def test_the_last_of_a_repeated_flag_is_kept():
    words = [
        "script.py",
        "--rank",
        "4",
        "--anchors",
        "9",
        "5",
        "--dry_run",
        "48",
        "--rank=8",
        "--anchors",
        "7",
        "--dry_run",
    ]
    assert keep_last(words) == ["script.py", "--rank=8", "--anchors", "7", "--dry_run"]
    assert keep_last(words, ["--rank", "--anchors", "--seed"]) == ["script.py", "--dry_run"]


INACTIVE = {
    "a discriminator's rate": ("flux", GAN_OFF, ["--learning_rate_disc", "1e-4"], "--gan_weight 0"),
    "a discriminator's network": ("sd3", GAN_OFF, ["--discriminator_backbone", "d"], "--gan_weight 0"),
    "its layers": ("flux", GAN_OFF, ["--discriminator_layers", "1", "2"], "--gan_weight 0"),
    "a discriminator's rate for DMD2": ("dmd2", [], ["--learning_rate_disc", "1e-4"], "DMD2"),
    "its text encoder": ("flux", GAN_OFF, ["--discriminator_text_encoder", "c"], "--gan_weight 0"),
    "a classifier": ("dmd2", GAN_OFF, ["--classifier_weight", "0.1"], "--gan_weight 0"),
    "a margin": ("sd3", ["--isg_weight", "0"], ["--isg_margin", "5"], "--isg_weight 0"),
    "a guidance": ("flux", ["--isg_weight", "0"], ["--isg_guidance_scale", "1", "2"], "--isg_weight 0"),
    "steps of a warm-up": ("sdxl", [], ["--lr_warmup_steps", "9"], "without warm-up"),
    "a start of a warm-up": (
        "flux",
        ["--lr_warmup_steps", "0"],
        ["--lr_warmup_start_factor", "0.1"],
        "without warm-up",
    ),
    "validation": ("flux", [], ["--validation_steps", "9"], "without --validation_prompts"),
    "a teacher's guidance": ("sd3", [], ["--teacher_guidance_scale", "4"], "without --validation_prompts"),
    "logs": ("flux", ["--report_to", "none"], ["--logging_dir", "l"], "--report_to none"),
    "columns": ("flux", PROMPTS_ALONE, ["--caption_column", "c"], "without columns"),
    "images": ("flux", PROMPTS_ALONE, ["--random_flip"], "without images"),
    "a VAE": ("flux", PROMPTS_ALONE, ["--vae_dtype", "fp32"], "without a VAE"),
    "a VAE for latents": ("sd3", [*GAN_OFF, "--dataset_lmdb", "l"], ["--vae_dtype", "fp32"], "without a VAE"),
    "adapters": ("flux", [], ["--lora_alpha", "4"], "without --rank"),
    "files of a whole network": ("flux", ["--rank", "4"], ["--max_shard_size", "5GB"], "with --rank"),
}


def warnings_of(caplog, script: str, *flags: str) -> list[str]:
    caplog.clear()
    check_common_args(parse(script, *flags), models_class(SCRIPTS[script]).inactive_flags)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("case", INACTIVE)
def test_a_flag_without_effect_is_warned_of_once(case, caplog):
    script, off, flag, where = INACTIVE[case]
    assert not any(flag[0] in warning for warning in warnings_of(caplog, script, *off))
    warning = warnings_of(caplog, script, *off, *flag)[-1]
    assert flag[0] in warning and ": no effect in " in warning and where in warning


def test_a_flag_with_effect_is_not_warned_of(caplog):
    def none(*args):
        assert warnings_of(caplog, *args) == []

    vision = ["--learning_rate_disc", "1e-4", "--discriminator_backbone", "d", "--random_flip", "--vae_dtype", "fp32"]
    validation = ["--validation_prompts", "a", "--validation_steps", "9"]
    none("flux", *vision, "--isg_margin", "5", "--lr_warmup_start_factor", "0.1", *validation)
    none("sdxl", "--lr_warmup_steps", "9", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_start_factor", "0.1")
    none("sd3", *PROMPTS_ALONE, "--vae_dtype", "fp32", "--validation_prompts", "a")
    none("flux", *GAN_OFF, "--center_crop", "--image_column", "image")


def test_values_are_checked_by_their_types():
    parser = Parser()
    parser.add_argument("--whole", type=number(int, 1))
    parser.add_argument("--open", type=number(float, 0, 1, exclude="high"))
    parser.add_argument("--above", type=number(float, 0, exclude="low"), nargs="+")
    parser.add_argument("--size", type=file_size)
    assert [parser.parse_args(["--size", size]).size for size in ("10GB", "1.5tb")] == ["10GB", "1.5tb"]
    args = parser.parse_args(["--whole", "3", "--open", "0", "--above", "1e-9", "7"])
    assert (args.whole, args.open, args.above) == (3, 0, [1e-9, 7])
    for flag, value, wanted in (
        ("--whole", "0", "a whole number, 1 or more"),
        ("--whole", "1.5", "a whole number, 1 or more"),
        ("--open", "1", "in [0, 1)"),
        ("--open", "nan", "in [0, 1)"),
        ("--above", "0", "above 0"),
        ("--size", "10", "a size such as 500MB or 10GB"),
        ("--size", "0GB", "a size such as 500MB or 10GB"),
        ("--above", "inf", "above 0"),
    ):
        with pytest.raises(UserError) as error:
            parser.parse_args([flag, value])
        assert str(error.value) == f"{flag} {value}: must be {wanted} (see --help)" and error.value.exit_code == 2


def test_help_shows_defaults_of_zero_and_none_that_is_empty(capsys):
    parser = Parser()
    for name, default in {"whole": 0, "real": 0.0, "text": "", "missing": None, "many": [1.0, 2.5]}.items():
        parser.add_argument(f"--{name}", default=default, help="A value.")
    parser.add_argument("--switch", action="store_true", help="A switch.")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    shown = dict(re.findall(r"^ +--(\w+).* A (.*)$", capsys.readouterr().out, re.MULTILINE))
    assert shown == {
        **{"whole": "value. (default: 0)", "real": "value. (default: 0)", "many": "value. (default: 1 2.5)"},
        **{"text": "value.", "missing": "value.", "switch": "switch."},
    }


def test_rates_that_nobody_gave_follow_the_students_and_are_higher_for_adapters():
    def rates(*flags):
        args = parse("flux", *flags)
        return args.learning_rate, args.learning_rate_fake, args.learning_rate_disc

    assert rates() == (1e-5, 1e-5, 1e-5) and rates("--learning_rate", "2e-5") == (2e-5, 2e-5, 2e-5)
    assert rates("--rank", "4") == (7e-5, 5e-5, 1e-5)
    assert rates("--rank", "4", "--learning_rate", "1.4e-4") == (1.4e-4, 1e-4, 2e-5)
    given = ("--learning_rate", "1", "--learning_rate_fake", "2", "--learning_rate_disc", "3")
    assert rates(*given) == (1, 2, 3) and rates("--rank", "4", *given) == (1, 2, 3)
