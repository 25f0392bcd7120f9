"""How diversely a shipped student of Shapes draws with its teacher's help, beside both alone: the figures of
docs/with_teacher.md.

    python scripts/with_teacher.py shapes-dmd2 --out with_teacher.json

A prompt's diversity is the mean distance of two of its pictures in the features of assets/shapes-clip; rows share their
prompts and noises, so the ratio to the teacher's is taken prompt by prompt.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from torch import Tensor

from stepdistill import resources
from stepdistill.data.shapes import attributes_of, captions, scenes
from stepdistill.diffusion.collaboration import sent_back
from stepdistill.diffusion.draws import key
from stepdistill.evaluation.estimate import mean_of
from stepdistill.evaluation.features import load_features
from stepdistill.evaluation.reference import load_source
from stepdistill.export import open_export, read_settings
from stepdistill.models.with_teacher import with_teacher

EACH, BATCH, STEPS, CALIBRATED = 4, 50, 16, 100
SYSTEMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("diversity", {}), ("diversity", {"teacher_steps": 2, "guidance": 1.0}), ("diversity", {"teacher_steps": 2}),
    ("distillation_pp", {}), ("distillation_pp", {"weight": 0.5}), ("adaptive", {}))


class Bench:
    """Pictures of the same prompts and noises, by one call after another."""

    def __init__(self, prompts: int) -> None:
        self.features = load_features(resources.locate("assets/shapes-clip"))
        self.asked = [prompt for prompt in load_source("shapes", 2000).prompts(prompts) for _ in range(EACH)]
        self.wanted = torch.stack([attributes_of(prompt) for prompt in self.asked])
        self.at = 0

    def seen(self, pipe: DiffusionPipeline, call: dict[str, Any], asked: Sequence[str] | None = None) -> Tensor:
        """Features of the pictures of a call, (n, D)."""
        found, asked = [], self.asked if asked is None else asked
        for self.at in range(0, len(asked), BATCH):
            some = list(asked[self.at:self.at + BATCH])
            generators = [torch.Generator().manual_seed(key(0, "sample", self.at + i)) for i in range(len(some))]
            drawn = pipe(some, generator=generators, output_type="pt", **call).images
            found.append(self.features.images(drawn * 2 - 1))
        return torch.cat(found)

    def score(self, pixels: Tensor) -> Tensor:
        """The CLIP score of the pictures that are being drawn, for their prompts."""
        texts = self.features.texts(list(self.asked[self.at:self.at + len(pixels)]))
        return 100 * F.cosine_similarity(self.features.images(pixels), texts)

    def row(self, name: str, nfe: float, draw: Callable[[], Tensor], teacher: Tensor | None = None) -> dict[str, Any]:
        """teacher: diversity by prompt that the row is held against."""
        begin = time.perf_counter()
        found = draw()
        each = torch.stack([torch.pdist(group.double()).mean() for group in found.unflatten(0, (-1, EACH))])
        own = mean_of(each)
        row = {"name": name, "nfe": nfe, "diversity": own.value, "each": each.tolist(),
               "right": (self.features.attribute_classifier(found) == self.wanted).all(1).double().mean().item()}
        if teacher is not None:
            apart = mean_of(each - teacher)
            row["to_teacher"] = [100 * edge / teacher.mean().item() for edge in (apart.value, apart.low, apart.high)]
        told = "" if teacher is None else " ({:+.1f} % [{:+.1f}, {:+.1f}] to the teacher's)".format(*row["to_teacher"])
        print(f"{name}: {nfe:g} NFE, diversity {own.value:.3f}{told}, all attributes {row['right']:.1%}, "
              f"{time.perf_counter() - begin:.0f} s", flush=True)
        return row


def measured(student: str, prompts: int) -> list[dict[str, Any]]:
    folder = f"assets/students/{student}"
    bench, w = Bench(prompts), float(read_settings(folder)["trained_guidance"])
    pipe, call = open_export(folder, fused=False)
    base, _ = open_export(folder, fused=False)
    base.unload_lora_weights()
    base.scheduler = DPMSolverMultistepScheduler.from_config(base.scheduler.config, algorithm_type="dpmsolver++",
                                                             timestep_spacing="trailing")
    rows = [bench.row(f"teacher, dpmpp_2m, w = {w:g}", 2 * STEPS,
                      lambda: bench.seen(base, {"num_inference_steps": STEPS, "guidance_scale": w}))]
    teacher = torch.tensor(rows[0]["each"], dtype=torch.float64)
    rows.append(bench.row("student", call["num_inference_steps"], lambda: bench.seen(pipe, call), teacher))
    known = captions(scenes(torch.arange(CALIBRATED)))
    texts = bench.features.texts(known)
    below = sent_back(100 * F.cosine_similarity(bench.seen(pipe, call, known), texts), 0.5)
    for name, options in SYSTEMS:
        given = {"guidance": w, **options, **({"score": bench.score, "below": below} if name == "adaptive" else {})}
        with with_teacher(pipe, name, call, **given) as together:
            called = ", ".join([name, *(f"{option} = {value:g}" for option, value in options.items())])
            row = bench.row(called, together.nfe, lambda: bench.seen(pipe, dict(together.call)), teacher)
            row["nfe"] = sum(together.evaluations.values()) / len(bench.asked)
            print(f"    {row['nfe']:g} evaluations a picture: {together.evaluations}", flush=True)
        rows.append(row)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", help="a folder of assets/students")
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_grad_enabled(False)
    rows = measured(asked.student, asked.prompts)
    if asked.out is not None:
        asked.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
