"""Trains assets/shapes-clip: a small CLIP on Shapes, and the attribute classifier, linear heads on its image features.

    python scripts/train_clip.py --updates 3000 --lr 1.5e-3 --work runs/world/clip-1 --out runs/world/text
    python scripts/train_clip.py --init runs/world/text --codec assets/shapes-sd/vae --out assets/shapes-clip

The text tower learns in minutes and then stays, so that teachers can train on it while the vision tower, which has
shapes to learn, goes on.
The 64 features are trained on three things at once: the contrastive loss of CLIP (Radford et al. 2021), the
attributes of each slot, and what captions leave out (places, sizes, light), so that Fréchet distances also see
collapsed layouts. Stopped and started again, it goes on from its last checkpoint.
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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from stepdistill.data.shapes import SIZE, SLOTS, captions, render, scenes

TRAIN_SEED, HELD_OUT_SEED = 1, 2
TOKENS = 20


def make_tokenizer() -> CLIPTokenizer:
    """Byte-level BPE with CLIP's end-of-word mark, trained on captions; any text still has a spelling."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1024, end_of_word_suffix="</w>", initial_alphabet=letters,
                                  show_progress=False)
    bpe.train_from_iterator(captions(scenes(torch.arange(20_000), TRAIN_SEED)), trainer)
    learned = json.loads(bpe.to_str())["model"]
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in learned["merges"]]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    return CLIPTokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in learned["merges"]], model_max_length=TOKENS)


def make_model(tokenizer: CLIPTokenizer) -> CLIPModel:
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id}
    text = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
                          num_attention_heads=4, max_position_embeddings=TOKENS, projection_dim=64, **ends)
    vision = CLIPVisionConfig(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
                              image_size=SIZE, patch_size=4, projection_dim=64)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def uncaptioned_targets(scene) -> Tensor:
    """(B, 9): what the auxiliary regression is asked for: layout and sizes in [-0.5, 0.5], the light on a circle."""
    u = scene.uncaptioned.float()
    light = 2 * math.pi * u[:, 9]
    return torch.cat([u[:, :7] - 0.5, torch.stack([light.cos(), light.sin()], 1) / 2], 1)


@torch.no_grad()
def restored(codec: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Through the autoencoder and back, with noise of up to a third of their spread on the latents."""
    latents = codec.encode(pixels).latent_dist.mode()
    level = 0.3 * torch.rand(len(latents), 1, 1, 1) / codec.config.scaling_factor
    return codec.decode(latents + level * torch.randn_like(latents)).sample.clamp(-1, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets/shapes-clip"))
    parser.add_argument("--work", type=Path, default=Path("runs/world/clip"))
    parser.add_argument("--init", type=Path,
                        help="folder of an earlier run to go on from; its text tower is kept as it is")
    parser.add_argument("--codec", type=Path, help="folder of an autoencoder: half of the pictures pass through it")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0,
                        help="of the weights: another one makes another text tower of the same pictures")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    codec = AutoencoderKL.from_pretrained(args.codec).float().eval() if args.codec else None
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    heads = nn.ModuleDict({slot: nn.Linear(64, len(values)) for slot, values in SLOTS.items()}
                          | {"uncaptioned": nn.Linear(64, 9)})
    if args.init:
        model.load_state_dict(CLIPModel.from_pretrained(args.init).float().state_dict())
        heads.load_state_dict(load_file(args.init / "judge.safetensors"), strict=False)
        for part in (model.text_model, model.text_projection):
            part.requires_grad_(False)
    parameters = [p for p in (*model.parameters(), *heads.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    warm_up = lambda i: min(1, (i + 1) / 100) * min(1, 2 * (1 - i / args.updates))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    parts = {"model": model, "heads": heads, "optimizer": optimizer, "schedule": schedule}
    start, spent = restore(args.work, parts)
    begin = time.time() - spent
    for i in range(start, args.updates):
        # fresh pictures
        scene = scenes(torch.arange(i * args.batch, (i + 1) * args.batch) + (10**8 if args.init else 0), TRAIN_SEED)
        pixels = render(scene)
        noise = torch.Generator().manual_seed(i)
        if args.codec:                     # the classifier also sees pictures as a teacher's autoencoder would return
                                           # them
            half = args.batch // 2
            pixels[:half] = restored(codec, pixels[:half])
        pixels = pixels + 0.08 * torch.rand(len(pixels), 1, 1, 1,
                                            generator=noise) * torch.randn(pixels.shape, generator=noise)
        tokens = tokenizer(captions(scene), padding="max_length", truncation=True, return_tensors="pt")
        text = model.get_text_features(**tokens).pooler_output
        image = model.get_image_features(pixel_values=pixels).pooler_output
        logits = model.logit_scale.exp().clamp(max=100) * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
        labels = torch.arange(len(logits))
        contrast = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        attribute_loss = sum(F.cross_entropy(heads[slot](image), scene.attributes[:, k])
                             for k, slot in enumerate(SLOTS))
        uncaptioned_loss = F.mse_loss(heads["uncaptioned"](image), uncaptioned_targets(scene))
        loss = 0.25 * contrast + attribute_loss + 0.5 * uncaptioned_loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if i % 50 == 0:
            right = torch.stack([heads[s](image).argmax(1) == scene.attributes[:, k] for k, s in enumerate(SLOTS)], 1)
            print(f"{i:5d} {time.time() - begin:6.0f} s  contrast {contrast:.3f}  attributes {attribute_loss:.3f}  "
                  f"uncaptioned {uncaptioned_loss:.4f}"
                  f"  all right {right.all(1).float().mean():.3f}", flush=True)
        if (i + 1) % 250 == 0:
            keep(args.work, parts, i + 1, time.time() - begin)
    finish(args, model.eval(), heads.eval(), tokenizer, time.time() - begin)


@torch.no_grad()
def finish(args, model: CLIPModel, heads: nn.ModuleDict, tokenizer: CLIPTokenizer, seconds: float) -> None:
    """Saves model, processor, attribute classifier, and what was reached on 10,000 held-out pictures."""
    right = []
    for block in torch.arange(10_000).split(500):
        scene = scenes(block, HELD_OUT_SEED)
        image = model.get_image_features(pixel_values=render(scene)).pooler_output
        right.append(torch.stack([heads[s](image).argmax(1) == scene.attributes[:, k] for k, s in enumerate(SLOTS)], 1))
    right = torch.cat(right).double()
    figures = {"all_attributes_real": right.prod(1).mean().item(), **dict(zip(SLOTS, right.mean(0).tolist()))}
    model.half().save_pretrained(args.out)
    make_tokenizer().save_pretrained(args.out)       # the one in use remembers how it padded
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE},
                       image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(args.out)
    classifier = {f"{slot}.{name}": p.half().contiguous() for slot in SLOTS
                  for name, p in heads[slot].state_dict().items()}
    save_file(classifier, args.out / "judge.safetensors",
              metadata={"slots": json.dumps({s: list(v) for s, v in SLOTS.items()})})
    made = {"command": "python " + " ".join(sys.argv), "updates": args.updates, "batch": args.batch, "lr": args.lr,
            "train_seed": TRAIN_SEED, "held_out_seed": HELD_OUT_SEED, "seconds": round(seconds),
            "threads": torch.get_num_threads(),
            "figures": figures}
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
