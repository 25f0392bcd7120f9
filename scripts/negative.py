"""Whether a negative prompt acts on a few-step student as on its teacher, measured on Shapes.

    python scripts/negative.py pictures runs/negative-pictures       # Shapes, two captions in five of which leave the background's colour or pattern open
    stepdistill train shapes/lcm-negative --set data.images=runs/negative-pictures --out runs/negative
    stepdistill export runs/negative --out runs/negative-lora
    python scripts/negative.py measure runs/negative-lora --plain assets/students/shapes-lcm --out runs/negative.json

A prompt leaves one attribute of its background open; the negative names one value of it. `gone` is the share of pictures in which the
judge of attributes does not see that value, `others` the share of the remaining slots that are as the prompt asks. A third case names
in the negative what the prompt itself asks for.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.data.shapes import SLOTS, Scenes, captions, render, scenes
from stepdistill.diffusion.draws import key
from stepdistill.evaluation.features import load_features
from stepdistill.evaluation.plans import Target
from stepdistill.models.stock import as_pil

TEACHER, JUDGE, SEED, BATCH = "assets/shapes-sd", "assets/shapes-clip", 777, 64
NAMES = tuple(SLOTS)
OPEN = ("ground", "pattern")                           # the slots of the background that a caption can leave open


def opened(scene: Scenes, slot: str) -> list[str]:
    """The captions without the word for this slot."""
    words = SLOTS[slot]
    named = [words[i] for i in scene.attributes[:, NAMES.index(slot)].tolist()]
    return [caption.replace(f" {word} ", " ") for caption, word in zip(captions(scene), named, strict=True)]


def write_pictures(out: Path, count: int) -> None:
    """A folder of pictures and their captions: of five samples one leaves the ground open, one the pattern."""
    out.mkdir(parents=True)
    with (out / "metadata.jsonl").open("w") as table:
        for first in range(0, count, 500):
            scene = scenes(torch.arange(first, min(first + 500, count)))
            told = [captions(scene), opened(scene, "ground"), opened(scene, "pattern")]
            for i, picture in enumerate(as_pil(render(scene) / 2 + 0.5)):
                name = f"{first + i:06d}.png"
                picture.save(out / name)
                table.write(json.dumps({"file_name": name, "text": told[max(0, (first + i) % 5 - 2)][i]}) + "\n")


def cases(count: int) -> dict[str, tuple[list[str], list[str], str, Tensor]]:
    """Name -> prompts, negatives, the slot that these name, and what the scenes show, (B, 7)."""
    found = {}
    for slot in OPEN:
        scene = scenes(torch.arange(count), SEED)
        words = [SLOTS[slot][i] for i in scene.attributes[:, NAMES.index(slot)].tolist()]
        found[f"open {slot}"] = opened(scene, slot), words, slot, scene.attributes
        found[f"asked {slot}"] = captions(scene), words, slot, scene.attributes
    return found


def shown(draw: Callable[[Sequence[str], Sequence[str] | None, int], Tensor], prompts: Sequence[str], negatives: Sequence[str] | None) -> Tensor:
    """The attributes that the judge sees, (B, 7). draw: prompts, negatives and the number of the first -> pictures in [0, 1]."""
    judge, seen = load_features(JUDGE), []
    for first in range(0, len(prompts), BATCH):
        part = slice(first, first + BATCH)
        images = draw(prompts[part], None if negatives is None else negatives[part], first)
        seen.append(judge.attribute_classifier(judge.images(images * 2 - 1)))
    return torch.cat(seen)


def drawer(target: Target, call: dict[str, Any]) -> Callable[[Sequence[str], Sequence[str] | None, int], Tensor]:
    """The plain call of the stock pipeline; every row draws from the same noises."""
    pipe = target.pipeline
    pipe.set_progress_bar_config(disable=True)

    def draw(prompts: Sequence[str], negatives: Sequence[str] | None, first: int) -> Tensor:
        generators = [torch.Generator().manual_seed(key(SEED, "negative", first + i)) for i in range(len(prompts))]
        told = {} if negatives is None else {"negative_prompt": list(negatives)}
        return pipe(list(prompts), generator=generators, output_type="pt", **call, **told).images.float()

    return draw


def rates(seen: Tensor, asked: Tensor, slot: str) -> dict[str, float]:
    """gone: the named attribute is not seen; others: the mean share of the other slots that are as asked, and the worst slot's."""
    right = (seen == asked).double().mean(0)
    rest = torch.tensor([right[i] for i, name in enumerate(NAMES) if name != slot])
    return {"gone": 1 - right[NAMES.index(slot)].item(), "others": rest.mean().item()} | {
        name: share for name, share in zip(NAMES, right.tolist(), strict=True) if name != slot}


def measure(student: str, plain: str, count: int, out: Path) -> None:
    pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("pictures")
    making.add_argument("out", type=Path)
    making.add_argument("--count", type=int, default=20_000)
    measuring = commands.add_parser("measure")
    measuring.add_argument("student")
    measuring.add_argument("--plain", default="assets/students/shapes-lcm", help="the student without guidance that FD is held against")
    measuring.add_argument("--count", type=int, default=500, help="pictures a case")
    measuring.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_pictures(args.out, args.count) if args.command == "pictures" else measure(args.student, args.plain, args.count, args.out)


if __name__ == "__main__":
    main()
