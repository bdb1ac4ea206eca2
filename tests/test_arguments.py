"""What was given on the command line, and what of it would change nothing."""

import pytest

import train_senseflow_flux
import train_senseflow_sd3
import train_senseflow_sdxl
from senseflow.arguments import Parser, check_common_args
from senseflow.errors import UserError


SCRIPTS = {"flux": train_senseflow_flux, "sd3": train_senseflow_sd3, "sdxl": train_senseflow_sdxl}
GAN_OFF, PROMPTS_ALONE = (
    ["--gan_weight", "0"],
    ["--gan_weight", "0", "--backward_simulation_prob", "1", "--prompts_file", "p.txt"],
)


def parse(script: str, *flags: str):
    """The arguments of a run as `check_args` looks at them, before anything about the teacher is asked."""
    data = [] if "--prompts_file" in flags or "--dataset_lmdb" in flags else ["--dataset_name", "a/b"]
    args = SCRIPTS[script].parse_args(["--pretrained_model_name_or_path", "x", "--output_dir", "y", *data, *flags])
    if script == "sd3":
        train_senseflow_sd3.apply_preset(args, 24)
    return args


def check(script: str, *flags: str) -> None:
    check_common_args(parse(script, *flags), getattr(SCRIPTS[script], "INACTIVE_FLAGS", ()))


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
    assert args.given == names, "given as it is by default is given, too"
    assert "given" not in vars(args) and vars(args).keys() > names and args.ttur_ratio == 5


def test_a_flag_that_adds_to_a_list_is_known_to_be_given():
    parser = Parser()
    parser.add_argument("--call", nargs="+", action="extend", default=[])
    args = parser.parse_args(["--call", "a", "--call", "b"])
    assert args.call == ["a", "b"] and args.given == {"call"} and not parser.parse_args([]).given


INACTIVE_FLAGS = {
    "a discriminator's rate": ("flux", GAN_OFF, ["--learning_rate_disc", "1e-4"], "--learning_rate_disc 0.0001: --gan_weight 0"),
    "a discriminator's network": ("sd3", GAN_OFF, ["--discriminator_backbone", "d"], "--discriminator_backbone d: --gan_weight 0"),
    "its layers": ("flux", GAN_OFF, ["--discriminator_layers", "1", "2"], "--discriminator_layers 1 2: --gan_weight 0"),
    "its eyes": ("sd3", GAN_OFF, ["--discriminator_resolution", "518"], "--discriminator_resolution 518: --gan_weight 0"),
    "its eyes, of DMD2": ("sdxl", ["--method", "dmd2"], ["--discriminator_resolution", "518"], "518: --method dmd2"),
    "its reader": ("flux", GAN_OFF, ["--discriminator_text_encoder", "c"], "--discriminator_text_encoder c: --gan_weight 0"),
    "a classifier": (
        "sdxl", ["--method", "dmd2", *GAN_OFF], ["--classifier_weight", "0.1"], "--classifier_weight 0.1: --gan_weight 0"
    ),
    "a margin": ("sd3", ["--isg_weight", "0"], ["--isg_margin", "5"], "--isg_margin 5: --isg_weight 0"),
    "a guidance": ("flux", ["--isg_weight", "0"], ["--isg_guidance_scale", "1", "2"], "--isg_guidance_scale 1 2: --isg_weight 0"),
    "steps of a warm-up": ("sdxl", [], ["--lr_warmup_steps", "9"], "--lr_warmup_steps 9: --lr_scheduler constant"),
    "a start of a warm-up": ("flux", ["--lr_warmup_steps", "0"], ["--lr_warmup_start_factor", "0.1"], "0.1: --lr_warmup_steps 0"),
    "validation": ("flux", [], ["--validation_steps", "9"], "--validation_steps 9: a run without --validation_prompts"),
    "validation images": ("sdxl", [], ["--num_validation_images", "2"], "2: a run without --validation_prompts"),
    "a teacher's steps": ("flux", [], ["--teacher_num_inference_steps", "9"], "9: a run without --validation_prompts"),
    "a teacher's guidance": ("sd3", [], ["--teacher_guidance_scale", "4"], "4: a run without --validation_prompts"),
    "logs": ("flux", ["--report_to", "none"], ["--logging_dir", "l"], "--logging_dir l: --report_to none"),
    "columns": ("flux", PROMPTS_ALONE, ["--caption_column", "c"], "--caption_column c: a data set without columns"),
    "images": ("flux", PROMPTS_ALONE, ["--random_flip"], "--random_flip: a run that looks at no image"),
    "crops": ("flux", [*GAN_OFF, "--backward_simulation_prob", "1"], ["--center_crop"], "--center_crop: a run that looks at no"),
    "a VAE": ("flux", PROMPTS_ALONE, ["--vae_dtype", "fp32"], "--vae_dtype fp32: a run without a VAE"),
    "a VAE for latents": ("sd3", [*GAN_OFF, "--dataset_lmdb", "l"], ["--vae_dtype", "fp32"], "fp32: a run without a VAE"),
    "a VAE for DMD2 on latents": (
        "sdxl", ["--method", "dmd2", "--dataset_lmdb", "l"], ["--vae_dtype", "bf16"], "--vae_dtype bf16: --method dmd2 on latents"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INACTIVE_FLAGS)
def test_a_flag_that_would_change_nothing_is_refused(case):
    script, off, flag, needle = INACTIVE_FLAGS[case]
    check(script, *off)
    with pytest.raises(UserError) as error:
        check(script, *off, *flag)
    assert needle in str(error.value) and "leave it out" in str(error.value) and error.value.exit_code == 2


def test_a_flag_that_is_of_use_is_not_refused():
    vision = ["--learning_rate_disc", "1e-4", "--discriminator_backbone", "d", "--random_flip", "--vae_dtype", "fp32"]
    check(
        "flux",
        *vision,
        "--isg_margin",
        "5",
        "--lr_warmup_start_factor",
        "0.1",
        "--validation_prompts",
        "a",
        "--validation_steps",
        "9",
    )
    check("sdxl", "--lr_warmup_steps", "0", "--lr_scheduler", "constant")
    check(
        "sdxl", "--lr_warmup_steps", "9", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_start_factor", "0.1"
    )
    check("sd3", *PROMPTS_ALONE, "--vae_dtype", "fp32", "--validation_prompts", "a")
    check("flux", *GAN_OFF, "--center_crop", "--image_column", "image")


def test_rates_that_nobody_gave_follow_the_students_and_are_higher_for_adapters():
    def rates(*flags):
        args = parse("flux", *flags)
        return pytest.approx((args.learning_rate, args.learning_rate_fake, args.learning_rate_disc), rel=1e-12)

    assert rates() == (1e-5, 1e-5, 1e-5) and rates("--learning_rate", "2e-5") == (2e-5, 2e-5, 2e-5)
    assert rates("--rank", "4") == (7e-5, 5e-5, 1e-5)
    assert rates("--rank", "4", "--learning_rate", "1.4e-4") == (1.4e-4, 1e-4, 2e-5)
    given = ("--learning_rate", "1", "--learning_rate_fake", "2", "--learning_rate_disc", "3")
    assert rates(*given) == (1, 2, 3) and rates("--rank", "4", *given) == (1, 2, 3)
