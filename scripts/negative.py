"""Whether a negative prompt acts on a few-step student as on its teacher, measured on Shapes.

    python scripts/negative.py pictures runs/negative-pictures
    stepdistill train shapes/lcm-negative --set data.images=runs/negative-pictures --out runs/negative
    stepdistill export runs/negative --out runs/negative-lora
    python scripts/negative.py measure runs/negative.json teacher assets/shapes-sd --steps 50
    python scripts/negative.py measure runs/negative.json student runs/negative-lora
    python scripts/negative.py distance runs/negative-fd.json student runs/negative-lora
    python scripts/negative.py table runs/negative.json --distance runs/negative-fd.json

Of the pictures, which are Shapes, two captions in five leave the ground's colour or pattern open.
A prompt leaves one attribute of the ground open, and the negative prompt names one value of it; or, "asked", the prompt
itself asks for what the negative names. `gone` is the share of pictures in which the judge of attributes does not see
the named value, `others` the mean share of the remaining slots that are as the prompt asks, beside the worst one; each
also without the negative, from the same noise.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from stepdistill.data.shapes import SLOTS, Scenes, captions, render, scenes
from stepdistill.diffusion.draws import key
from stepdistill.evaluation.features import load_features
from stepdistill.evaluation.plans import plans, solver_scheduler
from stepdistill.evaluation.sweep import Evaluation
from stepdistill.models.stock import as_pil
from stepdistill.run.targets import open_target

JUDGE, SEED, BATCH, STEPS = "assets/shapes-clip", 777, 64, 4
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


def cases(count: int) -> dict[str, tuple[list[str], str]]:
    """Name -> prompts, and the slot whose value the negative names."""
    scene = scenes(torch.arange(count), SEED)
    return ({f"open {slot}": (opened(scene, slot), slot) for slot in OPEN}
            | {"asked pattern": (captions(scene), "pattern")})


def measure(out: Path, name: str, target: str, steps: int | None, guidance: float, count: int) -> None:
    """Adds the rows of a target that `out` has not yet; those of a student without the negative too."""
    found = open_target(target, name)
    own = found.target.call or found.target.guidance.call(guidance) | {"num_inference_steps": steps}
    pipe = found.target.pipeline
    if found.target.call is None:
        pipe.scheduler = solver_scheduler(found.target, "dpmpp_2m")
    pipe.set_progress_bar_config(disable=True)
    attributes, judge = scenes(torch.arange(count), SEED).attributes, load_features(JUDGE)
    for case, (prompts, slot) in cases(count).items():
        words = [SLOTS[slot][i] for i in attributes[:, NAMES.index(slot)].tolist()]
        for given in (True,) if name == "teacher" else (True, False):
            if any((row["target"], row["case"], row["negative"]) == (name, case, given) for row in read(out)):
                continue
            seen = [judge.attribute_classifier(judge.images(2 * drawn(pipe, own, prompts, words if given else None,
                                                                      first) - 1))
                    for first in range(0, count, BATCH)]
            row = {"target": name, "case": case, "negative": given, "count": count, "call": dict(own),
                   **rates(torch.cat(seen), attributes, slot)}
            write(out, [*read(out), row])
            print(json.dumps(row), flush=True)


@torch.no_grad()
def drawn(pipe: DiffusionPipeline, call: Mapping[str, Any], prompts: Sequence[str], negatives: Sequence[str] | None,
          first: int) -> Tensor:
    """Pictures in [0, 1] of BATCH prompts from `first` on, by the plain call; the noise of each is its number's."""
    part = slice(first, first + BATCH)
    told = {} if negatives is None else {"negative_prompt": list(negatives[part])}
    generators = [torch.Generator().manual_seed(key(SEED, "negative", first + i)) for i in range(len(prompts[part]))]
    return pipe(list(prompts[part]), generator=generators, output_type="pt", **call, **told).images.float()


def rates(seen: Tensor, asked: Tensor, slot: str) -> dict[str, float]:
    """Of what the judge sees, (B, 7), where the scenes have `asked`."""
    right = dict(zip(NAMES, (seen == asked).double().mean(0).tolist(), strict=True))
    gone, rest = 1 - right.pop(slot), right
    return {"gone": gone, "others": sum(rest.values()) / len(rest), **rest}


def distance(out: Path, name: str, target: str, samples: int) -> None:
    """The figures of a bench of a student at 4 steps, written to `out`."""
    found = open_target(target, name).target
    plan = next(plan for plan in plans(found, range(1, 17), (1.0,), (), print) if plan.steps == STEPS)
    figures = Evaluation(samples, 0, features=[JUDGE], reference="shapes", device=torch.device("cpu"), say=print)
    row, _ = figures.row(plan)
    write(out, [*read(out), row])
    print(json.dumps(row))


def table(file: Path, drawn: Path | None, plain: Path) -> None:
    """The student's rates as shares of its teacher's, and its distance as a multiple of a plain student's."""
    rows = {(row["target"], row["case"], row["negative"]): row for row in read(file)}
    for case in dict.fromkeys(case for who, case, _ in rows if who == "teacher"):
        own, bare, right = (rows[key] for key in (("student", case, True), ("student", case, False),
                                                  ("teacher", case, True)))
        shares = {name: own[name] / right[name] for name in ("gone", "others", *NAMES) if name in right}
        worst = min((name for name in NAMES if name in right), key=lambda name: shares[name])
        print(f"{case}: gone {own['gone']:.3f} ({bare['gone']:.3f} without the negative), {shares['gone']:.1%} of the "
              f"teacher's {right['gone']:.3f}; others {own['others']:.3f}, {shares['others']:.1%} of "
              f"{right['others']:.3f}; worst {worst} {own[worst]:.3f}, {shares[worst]:.1%} of {right[worst]:.3f}")
    if drawn is not None:
        ours = read(drawn)[-1]["metrics"]
        theirs = next(row for row in json.loads(plain.read_text())["rows"] if row["steps"] == STEPS)["metrics"]
        spread = " and ".join(f"{one['fd']:.2f} [{one['fd_low']:.2f}, {one['fd_high']:.2f}]" for one in (ours, theirs))
        print(f"FD at {STEPS} steps, of the student and of a plain one: {spread}, a ratio of "
              f"{ours['fd'] / theirs['fd']:.2f}")


def read(file: Path) -> list[dict[str, Any]]:
    return json.loads(file.read_text()) if file.is_file() else []


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("pictures")
    making.add_argument("out", type=Path)
    making.add_argument("--count", type=int, default=20_000)
    measuring = commands.add_parser("measure")
    measuring.add_argument("out", type=Path)
    measuring.add_argument("name", choices=("teacher", "student"))
    measuring.add_argument("target", help="a pipeline, an export or a run")
    measuring.add_argument("--steps", type=int, help="of a teacher, by DPM-Solver++(2M)")
    measuring.add_argument("--guidance", type=float, default=2.5, help="of a teacher")
    measuring.add_argument("--count", type=int, default=128, help="pictures a row")
    figuring = commands.add_parser("distance")
    figuring.add_argument("out", type=Path)
    figuring.add_argument("name")
    figuring.add_argument("target")
    figuring.add_argument("--samples", type=int, default=2000)
    showing = commands.add_parser("table")
    showing.add_argument("file", type=Path)
    showing.add_argument("--distance", type=Path)
    showing.add_argument("--plain", type=Path, default=Path("assets/table/lcm.json"), help="a student without guidance")
    args = parser.parse_args()
    if args.command == "pictures":
        write_pictures(args.out, args.count)
    elif args.command == "measure":
        measure(args.out, args.name, args.target, args.steps, args.guidance, args.count)
    elif args.command == "distance":
        distance(args.out, args.name, args.target, args.samples)
    else:
        table(args.file, args.distance, args.plain)


if __name__ == "__main__":
    main()
