"""Trains the teacher of assets/shapes-sd, a Stable Diffusion of four million parameters, from scratch on Shapes.

    python scripts/train_teacher.py --vae assets/shapes-sd/vae --text runs/world/text --out assets/shapes-sd

v-prediction on Stable Diffusion's noise schedule, the caption dropped from one sample in ten for guidance. Latents and
embeddings are made once. Stopped and started again, it goes on from its last checkpoint; --export writes the pipeline
of the checkpoint as it is.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from resumable import keep, restore
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from stepdistill.data.shapes import captions, render, scenes
from stepdistill.export.dtypes import save_pipeline

TRAIN_SEED = 4
SCHEDULER = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                 clip_sample=False,
                 set_alpha_to_one=True, steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing")


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=8, out_channels=8, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        # diffusers reads this as the NUMBER of heads
        cross_attention_dim=96, attention_head_dim=4, norm_num_groups=16)


def text_encoder_of(folder: Path) -> CLIPTextModel:
    """The text tower of a CLIPModel folder as the stand-alone encoder that a pipeline holds."""
    clip = CLIPModel.from_pretrained(folder).float()
    encoder = CLIPTextModel(clip.config.text_config)
    encoder.load_state_dict(clip.text_model.state_dict())
    return encoder.eval()


@torch.no_grad()
def make_cache(vae: AutoencoderKL, text: CLIPTextModel, tokenizer: CLIPTokenizer, count: int) -> dict[str, Tensor]:
    """Scaled latents (count, 8, 8, 8) and caption embeddings (count, 20, 96), in half precision to save memory."""
    latents, embeddings = [], []
    for block in torch.arange(count).split(500):
        scene = scenes(block, TRAIN_SEED)
        latents.append(vae.encode(render(scene)).latent_dist.mode() * vae.config.scaling_factor)
        embeddings.append(embed(text, tokenizer, captions(scene)).half())
    return {"latents": torch.cat(latents).half(), "embeddings": torch.cat(embeddings)}


def embed(text: CLIPTextModel, tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return text(tokens.input_ids).last_hidden_state


def ramp(updates: int) -> Callable[[int], float]:
    """Learning rate: warm up, hold, fall from half-way on."""
    return lambda i: min(1, (i + 1) / 200, max(0.0, 2 * (1 - i / updates)))


def advance(i: int, loss: Tensor, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer,
            schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """Update i, and that of the average of the weights."""
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    with torch.no_grad():
        decay = min(0.999, (1 + i) / (10 + i))
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("assets/shapes-sd/vae"))
    parser.add_argument("--text", type=Path, default=Path("runs/world/text"))
    parser.add_argument("--out", type=Path, default=Path("assets/shapes-sd"))
    parser.add_argument("--work", type=Path, default=Path("runs/world/teacher"))
    parser.add_argument("--images", type=int, default=80_000)
    parser.add_argument("--updates", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--export", action="store_true", help="write the pipeline of the last checkpoint and stop")
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.vae).float().eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.text)
    text = text_encoder_of(args.text)
    unet = make_unet()
    ema = make_unet().requires_grad_(False)
    ema.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp(args.updates))
    parts = {"unet": unet, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    start, spent = restore(args.work, parts)
    if args.export:
        return finish(args, vae, text, tokenizer, ema, start, spent)
    begin = time.time() - spent
    if not (args.work / "cache.pt").exists():
        torch.save(make_cache(vae, text, tokenizer, args.images), args.work / "cache.pt")
    cache = torch.load(args.work / "cache.pt")
    with torch.no_grad():
        null = embed(text, tokenizer, [""])
    squares = DDIMScheduler(**SCHEDULER).alphas_cumprod
    for i in range(start, args.updates):
        draw = torch.Generator().manual_seed(i)
        index = torch.randint(args.images, (args.batch,), generator=draw)
        x0, context = cache["latents"][index].float(), cache["embeddings"][index].float()
        eps = torch.randn(x0.shape, generator=draw)
        # one timestep in each of `batch` equal bins: less noise in the loss than independent draws
        t = ((torch.arange(args.batch) + torch.rand(args.batch, generator=draw)) / args.batch * 1000).long()
        dropped = torch.rand(args.batch, generator=draw) < 0.1
        context = torch.where(dropped[:, None, None], null, context)
        alpha, sigma = (a.sqrt()[:, None, None, None] for a in (squares[t], 1 - squares[t]))
        v = unet(alpha * x0 + sigma * eps, t, context).sample
        loss = F.mse_loss(v, alpha * eps - sigma * x0)
        advance(i, loss, unet, ema, optimizer, schedule)
        if i % 50 == 0:
            print(f"{i:5d} {time.time() - begin:6.0f} s  loss {loss.item():.4f}", flush=True)
        if (i + 1) % 250 == 0 or i + 1 == args.updates:
            keep(args.work, parts, i + 1, time.time() - begin)
    finish(args, vae, text, tokenizer, ema, args.updates, time.time() - begin)


def finish(args, vae, text, tokenizer, ema, updates: int, seconds: float) -> None:
    """Saves the whole pipeline in half precision, so that a plain stock call runs it in float32."""
    pipeline = StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=ema,
                                       scheduler=DDIMScheduler(**SCHEDULER),
                                       safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    save_pipeline(pipeline.to(torch.float32), args.out, torch.float16)
    made = {"command": "python " + " ".join(sys.argv), "updates": updates, "batch": args.batch, "lr": args.lr,
            "images": args.images,
            "train_seed": TRAIN_SEED, "seconds": round(seconds), "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in ema.parameters())}
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
