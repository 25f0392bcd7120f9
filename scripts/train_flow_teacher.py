"""Trains the teacher of assets/shapes-sd3, a Stable Diffusion 3 of three million parameters, from scratch on Shapes.

    python scripts/train_flow_teacher.py --text runs/world/text --text-2 runs/world/text-2 --out assets/shapes-sd3

Rectified flow: x_t = (1 - t) x0 + t eps, the network reads 1000 t and learns eps - x0; the caption dropped from one
sample in ten for guidance. Two text encoders and no T5: stock pipelines put 256 tokens of zeros in T5's place, which
would cost five times the work here, so this one is trained, and must be called, with max_sequence_length=0, as its
stepdistill.json says. Latents and embeddings are made once. Stopped and started again, it goes on from its last
checkpoint; --export writes the pipeline of the checkpoint as it is.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from resumable import keep, restore
from torch import Tensor, nn
from train_teacher import TRAIN_SEED, advance, ramp
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepdistill.data.shapes import captions, render, scenes
from stepdistill.export.dtypes import save_pipeline

CALL = {"max_sequence_length": 0}                        # what every call of the pipeline is given: no tokens in T5's
                                                         # place
SHIFT = 1.0                                              # of the sampling grid; larger pictures than 8 x 8 latents want
                                                         # more


def make_transformer() -> SD3Transformer2DModel:
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=8, out_channels=8, num_layers=5, attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=192, caption_projection_dim=128, pooled_projection_dim=128, pos_embed_max_size=16,
        qk_norm="rms_norm")
    for module in net.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    # AdaLN-zero (Peebles and Xie 2023), which diffusers leaves out: every block starts as the identity, the output as
    # zero
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
    return net


def text_encoder_of(folder: Path) -> CLIPTextModelWithProjection:
    """The text tower of a CLIPModel folder with its projection, as SD3's pipeline holds it."""
    clip = CLIPModel.from_pretrained(folder).float()
    # the configuration asks for half precision
    encoder = CLIPTextModelWithProjection(clip.config.text_config).float()
    encoder.load_state_dict({name: value for name, value in clip.state_dict().items() if name.startswith("text_")})
    return encoder.eval()


def make_pipeline(vae: Path, text: Path, text_2: Path, transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    vae = AutoencoderKL.from_pretrained(vae).float().eval()
    vae.register_to_config(shift_factor=0.0)             # SD3's pipeline adds it, so it must be a number
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT), vae=vae,
        text_encoder=text_encoder_of(text), tokenizer=CLIPTokenizer.from_pretrained(text),
        text_encoder_2=text_encoder_of(text_2), tokenizer_2=CLIPTokenizer.from_pretrained(text_2),
        text_encoder_3=None, tokenizer_3=None)


def embed(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token embeddings (B, 20, 192) and pooled embeddings (B, 128)."""
    text, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, do_classifier_free_guidance=False, **CALL)
    return text, pooled


@torch.no_grad()
def make_cache(pipeline: StableDiffusion3Pipeline, latents: Path | None, count: int) -> dict[str, Tensor]:
    """Scaled latents (count, 8, 8, 8) and the embeddings of their captions, in half precision to save memory.

    latents: a cache whose pictures are the same, if there is one.
    """
    made, texts, pools = [], [], []
    for block in torch.arange(count).split(500):
        scene = scenes(block, TRAIN_SEED)
        if latents is None:
            made.append(pipeline.vae.encode(render(scene)).latent_dist.mode().half()
                        * pipeline.vae.config.scaling_factor)
        text, pooled = embed(pipeline, captions(scene))
        texts.append(text.half())
        pools.append(pooled.half())
    if len(torch.cat(pools).unique(dim=0)) < len(set(captions(scenes(torch.arange(count), TRAIN_SEED)))):
        raise SystemExit("two captions have one pooled embedding: is eos_token_id that of the tokenizer?")
    kept = torch.cat(made) if latents is None else torch.load(latents, mmap=True)["latents"][:count].clone()
    return {"latents": kept, "text": torch.cat(texts), "pooled": torch.cat(pools)}


def times(batch: int, draw: torch.Generator) -> Tensor:
    """Half of the batch logit-normal, as SD3 was trained (Esser et al. 2024), half uniform: students of few steps start
    at t = 1 and stop near 0, where the logit-normal density vanishes. One time in each of equal bins, for less
    noise."""
    bins = torch.arange(batch // 2)
    normal, uniform = ((bins + torch.rand(len(bins), generator=draw)) / len(bins) for _ in range(2))
    return torch.cat([torch.special.ndtri(normal.clamp(1e-4, 1 - 1e-4)).sigmoid(), uniform])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, default=Path("assets/shapes-sd/vae"))
    parser.add_argument("--text", type=Path, default=Path("runs/world/text"))
    parser.add_argument("--text-2", type=Path, default=Path("runs/world/text-2"))
    parser.add_argument("--latents", type=Path, help="the cache of train_teacher.py, for its latents")
    parser.add_argument("--out", type=Path, default=Path("assets/shapes-sd3"))
    parser.add_argument("--work", type=Path, default=Path("runs/world/flow"))
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--updates", type=int, default=8500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--export", action="store_true", help="write the pipeline of the last checkpoint and stop")
    args = parser.parse_args()
    torch.manual_seed(0)
    net, ema = make_transformer(), make_transformer().requires_grad_(False)
    ema.load_state_dict(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.0, betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp(args.updates))
    parts = {"net": net, "ema": ema, "optimizer": optimizer, "schedule": schedule}
    start, spent = restore(args.work, parts)
    pipeline = make_pipeline(args.vae, args.text, args.text_2, ema)
    if args.export:
        return finish(args, pipeline, start, spent)
    begin = time.time() - spent
    if not (args.work / "cache.pt").exists():
        torch.save(make_cache(pipeline, args.latents, args.images), args.work / "cache.pt")
    cache = torch.load(args.work / "cache.pt")
    with torch.no_grad():
        null_text, null_pooled = embed(pipeline, [""])
    for i in range(start, args.updates):
        draw = torch.Generator().manual_seed(i)
        index = torch.randint(args.images, (args.batch,), generator=draw)
        x0, text, pooled = (cache[name][index].float() for name in ("latents", "text", "pooled"))
        eps = torch.randn(x0.shape, generator=draw)
        t = times(args.batch, draw)
        dropped = torch.rand(args.batch, generator=draw) < 0.1
        text, pooled = torch.where(dropped[:, None, None], null_text,
                                   text), torch.where(dropped[:, None], null_pooled, pooled)
        noised = torch.lerp(x0, eps, t[:, None, None, None])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            v = net(noised, encoder_hidden_states=text, pooled_projections=pooled, timestep=1000 * t).sample
        loss = F.mse_loss(v.float(), eps - x0)
        advance(i, loss, net, ema, optimizer, schedule)
        if i % 50 == 0:
            print(f"{i:5d} {time.time() - begin:6.0f} s  loss {loss.item():.4f}", flush=True)
        if (i + 1) % 250 == 0 or i + 1 == args.updates:
            keep(args.work, parts, i + 1, time.time() - begin)
    finish(args, pipeline, args.updates, time.time() - begin)


def finish(args, pipeline: StableDiffusion3Pipeline, updates: int, seconds: float) -> None:
    """Saves the whole pipeline in half precision, so that a plain stock call runs it in float32."""
    save_pipeline(pipeline.to(torch.float32), args.out, torch.float16)
    (args.out / "stepdistill.json").write_text(json.dumps({"call": CALL}, indent=1) + "\n")
    made = {"command": "python " + " ".join(sys.argv), "updates": updates, "batch": args.batch, "lr": args.lr,
            "images": args.images,
            "train_seed": TRAIN_SEED, "seconds": round(seconds), "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in pipeline.transformer.parameters())}
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
