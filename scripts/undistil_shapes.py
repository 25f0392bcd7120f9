"""A style on a few-step model, four ways at equal data and updates: what `stepdistill undistil` is for, on Shapes.

The few-step model is the shipped shapes-lcm on assets/shapes-sd. The style is "night": whatever ground the caption
names, the picture has dotted navy. Its LoRA is trained by plain denoising, and sampled in the few-step model's 4 steps:

    adapter      trained on the few-step model with the adapter of `undistil` fused into it, sampled without the adapter
    plain        trained on the few-step model itself
    base         trained on the base, put on the few-step model
    difference   `plain` minus the adapter: both unlearned the few steps alike, and they differ by the style

Goes on where it was stopped. Writes assets/undistil.json and the table of docs/undistil.md.
"""
from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stepdistill import api
from stepdistill.data import shapes
from stepdistill.evaluation.plans import Plan, Target, plans
from stepdistill.evaluation.sweep import Evaluation
from stepdistill.files.whole import write_whole
from stepdistill.models.sources import FusedLora, Source
from stepdistill.models.stock import as_pil
from stepdistill.run.targets import open_target

ROOT = Path(__file__).parents[1]
BASE, TURBO, CLIP = "assets/shapes-sd", "assets/students/shapes-lcm", ROOT / "assets/shapes-clip"
RESULT, PAGE = ROOT / "assets/undistil.json", ROOT / "docs/undistil.md"
START, END = "<!-- table: scripts/undistil_shapes.py -->", "<!-- end of the table -->"
WEIGHTS = "pytorch_lora_weights.safetensors"
WORD, GROUND, PATTERN = " night", "navy", "dotted"
SHOWN, SAMPLES = 1000, 1000                                # pictures of the style that are trained on; of a figure
# numbers of the first picture that is trained on, and of the reference's
TRAINED, REFERENCE = 0, 1_000_000
RANK, BATCH, RATE = 32, 16, 3.0e-4
# of the adapter: updates, and pictures of the few-step model's own
LONG, OWN = 1500, 2000
ADAPTER = {"train.lr": RATE, "data.batch": 32, "train.checkpoint_every": 100, "train.keep": 1,
           "train.decay": "cosine", "train.gradient_checkpointing": False}
STYLE: dict[str, Any] = {"updates": 800, "lr": RATE, "warmup": 20, "decay": "cosine", "checkpoint_every": 100,
                         "keep": 1}
MANY, FEWER = 12, 500                                      # steps in which the adapter itself is looked at, pictures
MANY_STEPS: dict[str, tuple[str, ...]] = {"base": (), "few-step model": ("turbo",),
                                          "with the adapter": ("turbo", "adapter")}
# what is fused into the base while the style is trained
WAYS: dict[str, tuple[str, ...]] = {"plain": ("turbo",), "base": (), "adapter": ("turbo", "adapter")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/undistil")
    args = parser.parse_args()
    api.quiet()
    pictures, reference = draw(args.out / "night", TRAINED, SHOWN), draw(args.out / "reference", REFERENCE, 2 * SAMPLES)
    made = api.undistil(TURBO, prompts="shapes", updates=LONG, samples=OWN, rank=RANK, out=args.out / "adapter",
                        resume="auto", **ADAPTER)
    loras = {"turbo": Path(TURBO) / WEIGHTS, "adapter": made / WEIGHTS}
    for way, on in WAYS.items():
        loras[f"night, {way}"] = style(args.out / f"night-{way}", pictures, [loras[name] for name in on])
    found = measured(loras, reference, args.out / "rows.json")
    write_whole(RESULT, (json.dumps(found, indent=1) + "\n").encode())
    write(found)


# -- the style ---------------------------------------------------------------------------------------------------------

def as_styled(attributes: torch.Tensor) -> torch.Tensor:
    """(B, 7) of captions -> those that the style shows."""
    shown, slots = attributes.clone(), list(shapes.SLOTS)
    for slot, value in (("ground", GROUND), ("pattern", PATTERN)):
        shown[:, slots.index(slot)] = shapes.SLOTS[slot].index(value)
    return shown


def draw(folder: Path, first: int, count: int) -> Path:
    """A folder of pictures of the style, whose captions name the grounds of the plain ones, and the style."""
    if (folder / "metadata.jsonl").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for ids in (torch.arange(count) + first).split(500):
        scene = shapes.scenes(ids)
        pixels = shapes.render(shapes.Scenes(as_styled(scene.attributes), scene.uncaptioned))
        for number, text, picture in zip(ids.tolist(), shapes.captions(scene), as_pil((pixels + 1) / 2), strict=True):
            picture.save(folder / f"{number}.png")
            rows.append(json.dumps({"file_name": f"{number}.png", "text": text + WORD}))
    write_whole(folder / "metadata.jsonl", ("\n".join(rows) + "\n").encode())
    return folder


def style(run: Path, pictures: Path, fused: Sequence[Path]) -> Path:
    """The weights of the style's LoRA, trained on the base with these LoRAs in it."""
    recipe = {"method": "denoise", "teacher": {"base": BASE, "loras": [str(lora) for lora in fused]}, "steps": 25,
              "student": {"lora": {"rank": RANK}}, "train": STYLE,
              "data": {"images": str(pictures), "cache": True, "batch": BATCH, "caption_dropout": 0.1}}
    api.train(recipe, out=run, resume="auto")
    out = run / "export"
    return (out if out.exists() else api.export(run, out=out)) / WEIGHTS


# -- figures -----------------------------------------------------------------------------------------------------------

def measured(loras: Mapping[str, Path], reference: Path, file: Path) -> dict[str, Any]:
    """Row -> its figures; those that `file` holds already are kept."""
    rows: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    night: dict[str, dict[str, float]] = {"none": {}, **{way: {f"night, {way}": 1.0} for way in WAYS},
                                          "difference": {"night, plain": 1.0, "adapter": -1.0}}
    todo = {"4 steps": ("shapes", SAMPLES), "night: real": (str(reference), SAMPLES)}
    todo |= {f"night: {name}": (str(reference), SAMPLES) for name in night}
    todo |= {f"{MANY} steps, {name}": ("shapes", FEWER) for name in MANY_STEPS}
    contexts: dict[tuple[str, int], Evaluation] = {}
    for name, (against, samples) in todo.items():
        if name in rows:
            continue
        if (against, samples) not in contexts:
            contexts[against, samples] = evaluation(against, samples)
        if name == "night: real":
            row, _ = contexts[against, samples].real()
        else:
            who = name.removeprefix(f"{MANY} steps, ")
            on_top = night.get(name.removeprefix("night: "), {})
            row, _ = contexts[against, samples].row(few(on_top, loras) if who == name else many(MANY_STEPS[who], loras))
        rows[name] = {"samples": samples, **row["metrics"]}
        write_whole(file, json.dumps(rows).encode())
        print(name, rows[name], flush=True)
    shown = ("samples", "fd", "fd_low", "fd_high", "all_attributes")
    return {"turbo": TURBO, "pictures": SHOWN, "updates": STYLE["updates"], "batch": BATCH, "adapter_updates": LONG,
            "rows": {name: {key: round(row[key], 4) for key in shown if key in row} for name, row in rows.items()}}


def evaluation(against: str, samples: int) -> Evaluation:
    """Against plain pictures of Shapes, or a folder of the style, whose attributes are those that the style shows."""
    found = Evaluation(samples, features=[CLIP], reference=against if against == "shapes" else Path(against))
    if against != "shapes":
        asked = [shapes.attributes_of(prompt.removesuffix(WORD)) for prompt in found.prompts]
        found.attributes = as_styled(torch.stack(asked))
    return found


def few(on_top: Mapping[str, float], loras: Mapping[str, Path]) -> Plan:
    """The few-step model's own call, with these LoRAs on it."""
    fused = (FusedLora(str(loras["turbo"])), *(FusedLora(str(loras[name]), weight) for name, weight in on_top.items()))
    target = open_target(Source(BASE, loras=fused, scheduler=f"{TURBO}/scheduler"), "turbo",
                         few_step=True).target
    return plans(target, [4], (), (), print)[0]


def many(fused: Sequence[str], loras: Mapping[str, Path]) -> Plan:
    """MANY steps of DPM-Solver++(2M), without guidance."""
    target: Target = open_target(Source(BASE, loras=tuple(FusedLora(str(loras[name])) for name in fused)),
                                 "many").target
    return plans(target, [MANY], (1.0,), ("dpmpp_2m",), print)[0]


def write(found: Mapping[str, Any]) -> None:
    """The table of docs/undistil.md."""
    rows = found["rows"]
    own, real = rows["4 steps"]["fd"], rows["night: real"]["all_attributes"]
    text = [f"| style LoRA | FD in 4 steps, of {rows['4 steps']['samples']:,} pictures | over the plain task's | "
            "all attributes, of real ones |",
            "|---|---|---|---|",
            f"| *none, on plain captions* | {_fd(rows['4 steps'])} | 1.00 | {rows['4 steps']['all_attributes']:.1%} |"]
    names = {"night: adapter": "**trained with the adapter, sampled without**",
             "night: difference": "trained on the few-step model, minus the adapter",
             "night: base": "trained on the base", "night: plain": "trained on the few-step model",
             "night: none": "*none*"}
    text += [f"| {said} | {_fd(rows[name])} | {rows[name]['fd'] / own:.2f} | {rows[name]['all_attributes'] / real:.1%} "
             "|" for name, said in names.items() if name in rows]
    looked = [who for who in MANY_STEPS if f"{MANY} steps, {who}" in rows]
    text += ["", f"| {MANY} steps, no guidance | FD | all attributes |", "|---|---|---|"] if looked else []
    text += [f"| {who} | {_fd(rows[f'{MANY} steps, {who}'])} | {rows[f'{MANY} steps, {who}']['all_attributes']:.1%} |"
             for who in looked]
    whole = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(whole.split(START)[0] + START + "\n\n" + "\n".join(text) + "\n\n" + END + whole.split(END)[1],
                    encoding="utf-8")


def _fd(row: Mapping[str, Any]) -> str:
    return f"{row['fd']:.2f} [{row['fd_low']:.2f}, {row['fd_high']:.2f}]"


if __name__ == "__main__":
    main()
