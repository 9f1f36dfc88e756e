"""Train the demo checkpoint: VAE, then text encoder, then UNet on cached latents.

    python -m fastsd.demo.train            # all stages; stages that are done are skipped, a broken-off one resumes

Each stage keeps its state under `--work` (weights, optimiser, step) and appends a line per 100 steps to `--log`; a
finished stage writes its component into `--out` in the diffusers layout, as fp16 safetensors. Everything random comes
from `--seed`, but a resumed stage draws other batches than one that ran through.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsd.demo import world

HERE = Path(__file__).parent
VAE_STEPS, TEXT_STEPS, UNET_STEPS = 7000, 500, 5800
IMAGES = 24_000  # cached latents the UNet learns from
BATCH = 64

VAE_CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 48, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": world.PIXELS,
}
UNET_CONFIG: dict[str, Any] = {
    "sample_size": world.PIXELS // 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (64, 80, 96),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,  # as in Stable Diffusion's own files, this is the number of heads
    "cross_attention_dim": 128,
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
TEXT_CONFIG: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "projection_dim": 128,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",  # few steps start from pure noise (https://arxiv.org/abs/2305.08891, section 3.3)
}


class Run:
    """One stage's optimiser, one-cycle learning rate, resumable state and log."""

    def __init__(self, name: str, args: argparse.Namespace, modules: list[nn.Module], steps: int, lr: float) -> None:
        self.name, self.args, self.modules, self.steps = name, args, modules, steps
        self.parameters = [p for m in modules for p in m.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=steps + 1, pct_start=0.05, final_div_factor=100
        )
        self.average: list[Tensor] = [p.detach().clone() for p in self.parameters]
        self.file = args.work / f"{name}.pt"
        self.step = 0
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for module, weights in zip(modules, state["modules"], strict=True):
                module.load_state_dict(weights)
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.average, self.step = state["average"], state["step"]
            print(f"{name}: resumed at step {self.step}", flush=True)
        self.rng = np.random.default_rng((args.seed, sum(map(ord, name)), self.step))
        torch.manual_seed(args.seed + self.step)

    def save(self) -> None:
        """Write the state, so that a crash leaves the old one or the new one."""
        state = {
            "modules": [m.state_dict() for m in self.modules],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "average": self.average,
            "step": self.step,
        }
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.file)

    def loop(self) -> Iterator[int]:
        """The remaining steps; the caller computes `self.loss` and calls `update`."""
        started, first, losses = time.time(), self.step, []
        while self.step < self.steps:
            yield self.step
            losses.append(self.last)
            if self.step % 100 == 0:
                pace = (time.time() - started) / (self.step - first)
                line = f"{self.name} step {self.step}/{self.steps} loss {np.mean(losses):.5f} {pace:.3f} s/step"
                print(line, flush=True)
                with open(self.args.log, "a") as log:
                    log.write(line + "\n")
                losses = []
            if self.step % 500 == 0:
                self.save()
        self.save()

    def update(self, loss: Tensor) -> None:
        """One optimiser step, and one of the weight average."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        self.last = float(loss.detach())
        # Weight average (Polyak): a horizon that grows with the run, at most about 1000 steps.
        decay = min(0.999, 1 - 1 / (1 + self.step / 10))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)

    def finish(self) -> None:
        """Put the averaged weights into the modules."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.average, strict=True):
                parameter.copy_(average)


def publish(module: Any, folder: Path) -> None:
    """Write a component's folder whole, since a folder that is there says that its stage is done."""
    temporary = folder.with_suffix(".tmp")
    module.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def to_tensor(images: list[np.ndarray[Any, Any]], device: torch.device) -> Tensor:
    """Pixels uint8 [height, width, 3] to float32 [batch, 3, height, width] in -1..1."""
    return torch.from_numpy(np.stack(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def paint_crop(rng: np.random.Generator, size: int) -> np.ndarray[Any, Any]:
    """A random scene, cropped around a point of its shape, so that most crops hold edges."""
    scene = world.random_scene(rng)
    at = world.place_shape(scene, rng)
    pixels = world.paint(scene, at)
    if size == world.PIXELS:
        return pixels
    angle, reach = rng.uniform(0, 2 * math.pi), at.radius * rng.uniform(0.2, 1.2)
    x0 = int(np.clip(at.x + reach * math.cos(angle) - size / 2, 0, world.PIXELS - size))
    y0 = int(np.clip(at.y + reach * math.sin(angle) - size / 2, 0, world.PIXELS - size))
    return pixels[y0 : y0 + size, x0 : x0 + size]


def train_vae(args: argparse.Namespace) -> None:
    """Compress pixels to 4 channels at an eighth of the size, and back."""
    from diffusers import AutoencoderKL

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(**VAE_CONFIG).to(args.device)
    run = Run("vae", args, [vae], args.vae_steps, 2e-3)
    for step in run.loop():
        # Crops are cheaper; the last part sees whole images, where the middle's attention spans more tokens.
        size, batch = (64, 16) if step < 0.85 * run.steps else (world.PIXELS, 4)
        pixels = to_tensor([paint_crop(run.rng, size) for _ in range(batch)], args.device)
        with torch.autocast(args.device.type, torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - pixels
        loss = error.abs().mean() + 2 * error.square().mean() + 1e-6 * posterior.kl().mean() / 64
        run.update(loss)
    run.finish()
    with torch.no_grad():
        vae.eval()
        rng = np.random.default_rng((args.seed, 1))
        images = to_tensor([paint_crop(rng, world.PIXELS) for _ in range(256)], args.device)
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(32)])
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    publish(vae.half(), args.out / "vae")


def make_tokenizer(folder: Path, rng: np.random.Generator) -> None:
    """CLIP's tokenizer (byte-level BPE with an end-of-word mark) whose merges come from the demo's captions."""
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    backend = CLIPTokenizer().backend_tokenizer
    captions = [world.caption(world.random_scene(rng), rng) for _ in range(20_000)]
    alphabet = sorted(ByteLevel.alphabet())
    backend.train_from_iterator(
        captions,
        BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False),
    )
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    # The order of CLIP's own vocabulary: bytes, bytes that end a word, merges, the two marks.
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocabulary, merges, model_max_length=TEXT_CONFIG["max_position_embeddings"])
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").unlink()  # says again what the two files of CLIP's layout say
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that `make_tokenizer` wrote."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: Any, captions: list[str], device: torch.device) -> Tensor:
    """Token ids, int64 [batch, 77]."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return encoded.input_ids.to(device)  # type: ignore[no-any-return]


ATTRIBUTES: dict[str, tuple[str | None, ...]] = {
    "shape": world.SHAPES,
    "color": tuple(world.COLORS),
    "background": tuple(world.COLORS),
    "size": tuple(world.SIZES),
    "place": world.PLACES,
}


def train_text(args: argparse.Namespace) -> None:
    """Teach the text encoder what a caption says: each attribute, read off the token that ends it and the padding.

    It stays as it is from then on: trained together with the UNet, it lost the places and shapes that the UNet does not
    use in its first thousand steps (a linear probe found 48 % of the places), and the UNet then never learned them.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    make_tokenizer(args.out / "tokenizer", np.random.default_rng((args.seed, 2)))
    tokenizer = load_tokenizer(args.out / "tokenizer")
    torch.manual_seed(args.seed)
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPTextConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **marks, **TEXT_CONFIG)
    config._attn_implementation = "eager"  # the fused attention's backward takes longer than all else on a CPU
    encoder = CLIPTextModel(config).to(args.device)
    heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()}).to(args.device)
    run = Run("text", args, [encoder, heads], args.text_steps, 2e-3)
    for _ in run.loop():
        scenes = [world.random_scene(run.rng) for _ in range(BATCH)]
        ids = tokenize(tokenizer, [world.caption(scene, run.rng) for scene in scenes], args.device)
        end = (ids == tokenizer.eos_token_id).int().argmax(dim=1).cpu().numpy()
        later = run.rng.integers(end, ids.shape[1])  # somewhere in the padding, which the UNet sees as well
        rows = torch.arange(BATCH, device=args.device)
        loss = torch.zeros((), device=args.device)
        with torch.autocast(args.device.type, torch.bfloat16):
            states = encoder(ids).last_hidden_state
            for position in (end, later):
                state = states[rows, torch.from_numpy(position).to(args.device)]
                for name, values in ATTRIBUTES.items():
                    labels = torch.tensor([values.index(getattr(scene, name)) for scene in scenes], device=args.device)
                    loss = loss + F.cross_entropy(heads[name](state).float(), labels) / 2
        run.update(loss)
    run.finish()
    publish(encoder.half(), args.out / "text_encoder")


def cache_latents(args: argparse.Namespace) -> tuple[Tensor, list[world.Scene]]:
    """Scaled latents float16 [images, 4, 16, 16] of random scenes, and the scenes; painted and encoded once."""
    from diffusers import AutoencoderKL

    file = args.work / "latents.pt"
    rng = np.random.default_rng((args.seed, 3))
    scenes = [world.random_scene(rng) for _ in range(IMAGES)]
    if not file.exists():
        vae = AutoencoderKL.from_pretrained(args.out / "vae").float().eval().to(args.device)
        parts = []
        for start in range(0, IMAGES, 50):
            batch = scenes[start : start + 50]
            pixels = to_tensor([world.paint(scene, world.place_shape(scene, rng)) for scene in batch], args.device)
            with torch.no_grad(), torch.autocast(args.device.type, torch.bfloat16):
                latents = vae.encode(pixels).latent_dist.mean
            parts.append((latents.float() * vae.config.scaling_factor).half().cpu())
        torch.save(torch.cat(parts), file)
    return torch.load(file, weights_only=True), scenes


def vaguer(scene: world.Scene, rng: np.random.Generator) -> world.Scene:
    """Now and then a caption leaves unsaid what the image shows."""
    size = scene.size if rng.random() < 0.85 else None
    place = scene.place if rng.random() < 0.85 else None
    return world.Scene(scene.shape, scene.color, scene.background, size, place)


def train_unet(args: argparse.Namespace) -> None:
    """Denoise the cached latents with v-prediction."""
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel

    latents, scenes = cache_latents(args)
    tokenizer = load_tokenizer(args.out / "tokenizer")
    torch.manual_seed(args.seed)
    unet = UNet2DConditionModel(**UNET_CONFIG).to(args.device)
    unet.set_attn_processor(AttnProcessor())  # the fused attention's backward takes half of a step on a CPU
    encoder = CLIPTextModel.from_pretrained(args.out / "text_encoder").float().to(args.device).eval()
    alphas = DDPMScheduler(**SCHEDULER_CONFIG).alphas_cumprod.to(args.device)
    run = Run("unet", args, [unet], args.unet_steps, 1.2e-3)
    for _ in run.loop():
        chosen = run.rng.integers(len(scenes), size=BATCH)
        captions = [
            "" if run.rng.random() < 0.1 else world.caption(vaguer(scenes[i], run.rng), run.rng) for i in chosen
        ]
        clean = latents[torch.from_numpy(chosen)].to(args.device).float()
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, len(alphas), (BATCH,), device=args.device)
        signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
        level = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
        with torch.autocast(args.device.type, torch.bfloat16):
            with torch.no_grad():
                states = encoder(tokenize(tokenizer, captions, args.device)).last_hidden_state
            predicted = unet(signal * clean + level * noise, timesteps, states).sample
        run.update(F.mse_loss(predicted.float(), signal * noise - level * clean))
    run.finish()
    publish(unet.half(), args.out / "unet")


def write_index(args: argparse.Namespace) -> None:
    """The files that make the components a checkpoint: the scheduler, and which class reads which folder."""
    from diffusers import DPMSolverMultistepScheduler, __version__

    DPMSolverMultistepScheduler(**SCHEDULER_CONFIG).save_pretrained(args.out / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "_fastsd": {"num_inference_steps": 20, "guidance_scale": 3.0},
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (args.out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    """Run the stages that are not done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="where the components are written")
    parser.add_argument("--work", type=Path, default=Path("runs/demo"), help="state of unfinished stages")
    parser.add_argument("--log", type=Path, default=HERE / "train.log")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS)
    parser.add_argument("--unet-steps", type=int, default=UNET_STEPS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "vae").exists():
        train_vae(args)
    if not (args.out / "text_encoder").exists():
        train_text(args)
    if not (args.out / "unet").exists():
        train_unet(args)
    write_index(args)


if __name__ == "__main__":
    main()
