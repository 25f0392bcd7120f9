"""Trains the autoencoder of assets/shapes-sd: 32 x 32 pixels to 8 x 8 x 8 latents.

    python scripts/train_vae.py --updates 2500 --kl 5e-4 --out runs/world/vae-1
    python scripts/train_vae.py --init runs/world/vae-1 --updates 1500 --lr 1e-3 --out assets/shapes-sd/vae

Squared error plus a little KL, which keeps the latents near unit variance and the decoder calm between them.
Stopped and started again, it goes on from its last checkpoint.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from resumable import keep, restore
from torch import nn

from stepdistill.data.shapes import SIZE, render, scenes

TRAIN_SEED, HELD_OUT_SEED = 3, 2


def make_vae() -> AutoencoderKL:
    down, up = ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3
    vae = AutoencoderKL(down_block_types=down, up_block_types=up, block_out_channels=(24, 48, 96), layers_per_block=1,
                         latent_channels=8, norm_num_groups=8, sample_size=SIZE, mid_block_add_attention=False)
    with torch.no_grad():
        vae.quant_conv.bias[8:] = -5.0       # log-variances: begin with little noise, or the code is slow to be found
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/shapes-sd/vae"))
    parser.add_argument("--init", type=Path, help="folder of an earlier run to start from")
    parser.add_argument("--work", type=Path, default=Path("runs/world/vae"))
    parser.add_argument("--updates", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the KL term per latent, against the mean "
                        "squared error")
    args = parser.parse_args()
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.init).float() if args.init else make_vae()
    vae = vae.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    warm_up = lambda i: min(1, (i + 1) / 50) * min(1, 1.5 * (1 - i / args.updates))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    parts = {"vae": vae, "optimizer": optimizer, "schedule": schedule}
    start, spent = restore(args.work, parts)
    begin = time.time() - spent
    for i in range(start, args.updates):
        pixels = render(scenes(torch.arange(i * args.batch, (i + 1) * args.batch),
                               TRAIN_SEED)).to(memory_format=torch.channels_last)
        code = vae.encode(pixels).latent_dist
        restored = vae.decode(code.sample(generator=torch.Generator().manual_seed(i))).sample
        error = F.mse_loss(restored, pixels)
        loss = error + args.kl * code.kl().mean() / code.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if i % 50 == 0:
            print(f"{i:5d} {time.time() - begin:6.0f} s  PSNR {-10 * math.log10(error.item() / 4):.2f} dB"
                  f"  latents' std {code.mean.std().item():.3f}  noise {code.std.mean().item():.3f}", flush=True)
        if (i + 1) % 250 == 0:
            keep(args.work, parts, i + 1, time.time() - begin)
    finish(args, vae.eval(), time.time() - begin)


@torch.no_grad()
def finish(args, vae: AutoencoderKL, seconds: float) -> None:
    """Sets the scaling factor, saves, and measures 2,000 held-out pictures through the saved half-precision weights."""
    pixels = render(scenes(torch.arange(2000), HELD_OUT_SEED))
    latents = torch.cat([vae.encode(block).latent_dist.mode() for block in pixels.split(250)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.half().save_pretrained(args.out)
    vae.float()
    error = torch.cat([(vae.decode(vae.encode(block).latent_dist.mode()).sample.clamp(-1, 1)
                        - block).square().mean((1, 2, 3))
                       for block in pixels.split(250)])
    figures = {"psnr_db": -10 * math.log10(error.mean().item() / 4),
               "latent_mean_by_channel": latents.mean((0, 2, 3)).tolist(),
               "latent_std_by_channel": latents.std((0, 2, 3)).tolist()}
    made = {"command": "python " + " ".join(sys.argv), "updates": args.updates, "batch": args.batch, "lr": args.lr,
            "kl": args.kl,
            "train_seed": TRAIN_SEED, "held_out_seed": HELD_OUT_SEED, "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "figures": figures}
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
