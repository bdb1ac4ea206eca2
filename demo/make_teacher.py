"""Train the demo's teacher, a tiny FluxPipeline with embedded guidance.

    python demo/make_teacher.py                    # writes demo/teacher
    python demo/make_teacher.py --max_stage vae    # stop after the VAE

Four stages, each resumed from its last checkpoint when the command is run again:

    vae      the autoencoder; then the latents of a pool of scenes are computed once
    flow     flow matching with caption dropout; the guidance embedder stays at zero
    guidance guidance distillation, as for FLUX.1-dev: the network predicts v("") + g (v(caption) - v("")) of stage
             `flow` for g in [1, 5]
    decoder  the VAE's decoder alone, on the transformer's training latents, for sharper images

Random numbers of a step depend on (seed, stage, step), so a resumed run equals an uninterrupted one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from components import MAX_SEQUENCE_LENGTH, build_text_encoders, build_transformer, build_vae
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from scenes import RESOLUTION, all_captions, sample_scenes
from tqdm import tqdm


STAGES = ("vae", "flow", "guidance", "decoder")
GUIDANCE_RANGE = (1.0, 5.0)
HERE = Path(__file__).resolve().parent


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=HERE / "teacher", help="folder of the pipeline")
    parser.add_argument(
        "--work_dir", type=Path, default=HERE / "out" / "teacher_work", help="folder of checkpoints and latents"
    )
    parser.add_argument("--max_stage", choices=STAGES, default="decoder", help="stop after this stage")
    parser.add_argument("--vae_steps", type=int, default=2000)
    parser.add_argument("--flow_steps", type=int, default=6000)
    parser.add_argument("--guidance_steps", type=int, default=1200)
    parser.add_argument("--decoder_steps", type=int, default=2000)
    parser.add_argument("--vae_batch_size", type=int, default=16, help="for the stages vae and decoder")
    parser.add_argument("--batch_size", type=int, default=64, help="for the stages flow and guidance")
    parser.add_argument("--vae_learning_rate", type=float, default=2e-3, help="for the stages vae and decoder")
    parser.add_argument("--flow_learning_rate", type=float, default=2e-3)
    parser.add_argument("--guidance_learning_rate", type=float, default=5e-4)
    parser.add_argument(
        "--decay_share", type=float, default=0.3, help="last share of a stage in which the learning rate decays to 0"
    )
    parser.add_argument("--pool_size", type=int, default=24000, help="number of scenes to train the transformer on")
    parser.add_argument(
        "--kl_weight",
        type=float,
        default=3e-4,
        help="weight of the KL term per latent value, beside the loss per pixel value",
    )
    parser.add_argument("--caption_dropout", type=float, default=0.1)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--checkpointing_steps", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def step_generator(seed, stage, step):
    """Return the `torch.Generator` (CPU) of one step of one stage."""
    return torch.Generator().manual_seed((seed * len(STAGES) + STAGES.index(stage)) * 10_000_000 + step)


class Stage:
    """Train one network: learning rate with warm-up and final decay, EMA, checkpoints.

    Muon optimizes the matrices of attention and feed-forward layers, if there are any, in about 0.6 of the steps that
    AdamW needs. AdamW optimizes the rest.
    """

    def __init__(self, name, network, steps, learning_rate, args):
        self.name, self.network, self.steps, self.args = name, network, steps, args
        self.path = args.work_dir / f"{name}.pt"
        matrices, others = [], []
        for key, parameter in network.named_parameters():
            inner = "transformer_blocks." in key and ".norm" not in key and parameter.ndim == 2
            (matrices if inner else others).append(parameter)
        self.optimizers = [torch.optim.AdamW(others, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        self.learning_rate = learning_rate
        self.average = {key: value.clone() for key, value in network.state_dict().items()}
        self.step = 0
        if self.path.exists():
            state = torch.load(self.path, map_location=args.device, weights_only=True)
            network.load_state_dict(state["network"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                optimizer.load_state_dict(saved)
            self.average, self.step = state["average"], state["step"]

    def rate(self, step):
        """Return the learning rate: warm-up over 100 steps, constant, linear decay over the last `decay_share`."""
        remaining = (self.steps - step) / max(1.0, self.args.decay_share * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / 100, remaining)

    def save(self):
        state = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "average": self.average,
            "step": self.step,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def run(self, compute_loss):
        """Train up to `steps` and load the EMA weights into `network`; `compute_loss(step)` returns a scalar."""
        self.network.train()
        smooth_loss = None
        with tqdm(total=self.steps, initial=self.step, desc=self.name, mininterval=5) as progress:
            while self.step < self.steps:
                for optimizer in self.optimizers:
                    optimizer.param_groups[0]["lr"] = self.rate(self.step)
                loss = compute_loss(self.step)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                self.network.zero_grad()
                # The decay grows with the step, so that the average soon forgets the initial weights.
                decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
                for key, value in self.network.state_dict().items():
                    self.average[key].lerp_(value, 1 - decay)
                self.step += 1
                progress.update()
                smooth_loss = loss.item() if smooth_loss is None else 0.98 * smooth_loss + 0.02 * loss.item()
                progress.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
                if self.step % self.args.checkpointing_steps == 0 or self.step == self.steps:
                    self.save()
        self.network.load_state_dict(self.average)
        self.network.eval().requires_grad_(False)


def render_pool(args):
    """Render the pool of scenes: (images uint8 [N, 64, 64, 3], caption index int64 [N])."""
    index_of = {caption: index for index, caption in enumerate(all_captions())}
    images, captions = [], []
    for caption, image in tqdm(sample_scenes(args.pool_size, args.seed), total=args.pool_size, desc="scenes"):
        images.append(np.asarray(image))
        captions.append(index_of[caption])
    return torch.from_numpy(np.stack(images)), torch.tensor(captions)


def to_pixels(images, device):
    """Convert uint8 [B, 64, 64, 3] to float [B, 3, 64, 64] in [-1, 1]."""
    return images.to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae, images, args):
    """Run stage `vae`: train encoder and decoder together."""
    stage = Stage("vae", vae, args.vae_steps, args.vae_learning_rate, args)

    def compute_loss(step):
        generator = step_generator(args.seed, "vae", step)
        rows = torch.randint(len(images), (args.vae_batch_size,), generator=generator)
        pixels = to_pixels(images[rows], args.device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        return image_loss(decoded, pixels) + args.kl_weight * posterior.kl().sum() / noise.numel()

    stage.run(compute_loss)


def train_decoder(vae, images, latents, args):
    """Run stage `decoder`: train the decoder alone on the pool's raw latents [N, 8, 8, 8] and images."""
    vae.decoder.requires_grad_(True)
    stage = Stage("decoder", vae.decoder, args.decoder_steps, args.vae_learning_rate, args)

    def compute_loss(step):
        rows = torch.randint(len(images), (args.vae_batch_size,), generator=step_generator(args.seed, "decoder", step))
        return image_loss(vae.decode(latents[rows]).sample, to_pixels(images[rows], args.device))

    stage.run(compute_loss)


def image_loss(decoded, pixels):
    """Compute L1, which keeps edges sharp, plus a squared loss, without which small objects stay gray for long."""
    error = decoded - pixels
    return error.abs().mean() + 4 * error.square().mean()


@torch.no_grad()
def encode_pool(vae, images, args):
    """Sample raw latents of the pool, float [N, 8, 8, 8], and set the VAE's shift and scaling factors."""
    path = args.work_dir / f"latents_{args.vae_steps}_{args.pool_size}.pt"
    if path.exists():
        latents = torch.load(path, map_location=args.device, weights_only=True)
    else:
        generator = step_generator(args.seed, "vae", args.vae_steps)
        latents = []
        for rows in tqdm(torch.arange(len(images)).split(256), desc="latents"):
            posterior = vae.encode(to_pixels(images[rows], args.device)).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
            latents.append(posterior.mean + posterior.std * noise)
        latents = torch.cat(latents)
        torch.save(latents, path)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return latents


def pack(latents, vae):
    """Normalize and pack raw latents [N, 8, 8, 8] for the transformer: [N, 16, 32]."""
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    return FluxPipeline._pack_latents(latents, *latents.shape)


class Velocity:
    """Predict the velocity with a FLUX transformer; caption index -1 stands for the empty caption."""

    @torch.no_grad()
    def __init__(self, pipeline, device):
        prompts = all_captions() + [""]
        self.embeddings, self.pooled, self.text_ids = pipeline.encode_prompt(
            prompts, prompt_2=prompts, device=device, max_sequence_length=MAX_SEQUENCE_LENGTH
        )
        side = RESOLUTION // pipeline.vae_scale_factor // 2
        self.image_ids = FluxPipeline._prepare_latent_image_ids(1, side, side, device, self.embeddings.dtype)

    def __call__(self, network, x_t, sigma, captions, guidance):
        """Return noise - x0 [B, 16, 32] for x_t [B, 16, 32], sigma [B] in [0, 1], captions int64 [B], guidance [B]."""
        return network(
            hidden_states=x_t,
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=self.embeddings[captions],
            pooled_projections=self.pooled[captions],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]


def draw_batch(latents, captions, args, stage, step):
    """Return x0, noise and x_t [B, 16, 32], sigma [B], captions [B] of one step, and its generator."""
    generator = step_generator(args.seed, stage, step)
    rows = torch.randint(len(latents), (args.batch_size,), generator=generator)
    x0 = latents[rows]
    noise = torch.randn(x0.shape, generator=generator).to(args.device)
    sigma = torch.randn(args.batch_size, generator=generator).sigmoid().to(args.device)
    x_t = torch.lerp(x0, noise, sigma[:, None, None])
    return x0, noise, x_t, sigma, captions[rows], generator


def train_flow(transformer, velocity, latents, captions, args):
    """Run stage `flow`: flow matching with a share of empty captions."""
    unguided = torch.ones(args.batch_size, device=args.device)

    def compute_loss(step):
        x0, noise, x_t, sigma, wanted, generator = draw_batch(latents, captions, args, "flow", step)
        dropped = torch.rand(args.batch_size, generator=generator) < args.caption_dropout
        prediction = velocity(transformer, x_t, sigma, wanted.masked_fill(dropped, -1), unguided)
        return (prediction - (noise - x0)).square().mean()

    # The output layer of the guidance embedder is zero; frozen, it makes guidance have no effect in this stage.
    transformer.time_text_embed.guidance_embedder.requires_grad_(False)
    stage = Stage("flow", transformer, args.flow_steps, args.flow_learning_rate, args)
    stage.run(compute_loss)


def train_guidance(student, teacher, velocity, latents, captions, args):
    """Run stage `guidance`: train `student` to predict the classifier-free guidance of `teacher` for every g."""
    unguided = torch.ones(args.batch_size, device=args.device)
    low, high = GUIDANCE_RANGE

    def compute_loss(step):
        _, _, x_t, sigma, wanted, generator = draw_batch(latents, captions, args, "guidance", step)
        guidance = low + (high - low) * torch.rand(args.batch_size, generator=generator).to(args.device)
        with torch.no_grad():
            conditional = velocity(teacher, x_t, sigma, wanted, unguided)
            empty = velocity(teacher, x_t, sigma, torch.full_like(wanted, -1), unguided)
            target = empty + guidance[:, None, None] * (conditional - empty)
        return (velocity(student, x_t, sigma, wanted, guidance) - target).square().mean()

    student.load_state_dict(teacher.state_dict())
    student.requires_grad_(True)
    stage = Stage("guidance", student, args.guidance_steps, args.guidance_learning_rate, args)
    stage.run(compute_loss)


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)

    vae = build_vae().to(args.device)
    flow = build_transformer().to(args.device)
    tokenizer, text_encoder, tokenizer_2, text_encoder_2 = build_text_encoders()
    images, captions = render_pool(args)

    train_vae(vae, images, args)
    latents = encode_pool(vae, images, args)
    if args.max_stage == "vae":
        return

    transformer = build_transformer().to(args.device)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=text_encoder.to(args.device),
        tokenizer=tokenizer,
        text_encoder_2=text_encoder_2.to(args.device),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    velocity = Velocity(pipeline, args.device)
    packed = pack(latents, vae)
    train_flow(flow, velocity, packed, captions, args)
    if args.max_stage == "flow":
        return

    train_guidance(transformer, flow, velocity, packed, captions, args)
    if args.max_stage == "decoder":
        train_decoder(vae, images, latents, args)
    pipeline.save_pretrained(args.output_dir)
    # Arguments for infer.py: FLUX's defaults of 512 text tokens and 1024 px do not fit this pipeline.
    usage = {"pipeline_call": {"height": RESOLUTION, "width": RESOLUTION, "max_sequence_length": MAX_SEQUENCE_LENGTH}}
    (args.output_dir / "senseflow.json").write_text(json.dumps(usage, indent=1) + "\n")
    size = sum(file.stat().st_size for file in args.output_dir.rglob("*") if file.is_file())
    tqdm.write(f"saved {args.output_dir} ({size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
