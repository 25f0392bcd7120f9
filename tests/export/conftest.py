"""Students of tiny pipelines with random, clearly visible weights, as a finished run would hand them over."""
from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepdistill.export import Student
from stepdistill.methods.base import Follows, Frozen, Trained
from stepdistill.models.roles import Full, Lora, build_roles
from stepdistill.models.schedulers import StockCall
from stepdistill.models.teacher import load_teacher

sys.path.insert(0, str(Path(__file__).parents[1]))
from diffusers import PixArtSigmaPipeline
from families.dit import tiny_dit
from families.pixart import tiny_pixart
from families.sana import tiny_sana
from tiny import save_tiny, save_tiny_sd3

LCM = StockCall("LCMScheduler", {"original_inference_steps": 50}, {"num_inference_steps": 4, "guidance_scale": 1.0})
FLOW_LCM = StockCall("FlowMatchLCMScheduler", {"shift": 2.0},
                     {"num_inference_steps": 4, "guidance_scale": 1.0, "sigmas": [1.0, 0.75, 0.5, 0.25]})
TRANSFORMERS = {"dit": tiny_dit, "pixart": lambda: tiny_pixart(PixArtSigmaPipeline, 8, 2),
                "sana": lambda: tiny_sana(solver=True, scale=0.5)}
LORA = Lora(rank=4, alpha=6.0)           # alpha other than the rank: a loader that loses it shows


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny teachers by prediction type."""
    place = lambda kind: tmp_path_factory.mktemp(kind) / "teacher"
    others = {kind: place(kind) for kind in TRANSFORMERS}
    for kind, folder in others.items():
        TRANSFORMERS[kind]().save_pretrained(folder)
    return others | {kind: save_tiny(place(kind), kind) for kind in ("epsilon", "v_prediction")} | {
        "sd3": save_tiny_sd3(place("sd3"), call={"max_sequence_length": 0}),
        "sd3-t5": save_tiny_sd3(place("sd3-t5"), t5=True)}


@pytest.fixture(scope="session")
def make(teachers: dict[str, Path]) -> Callable[..., Student]:
    """make(kind="epsilon", setting=LORA, guidance_embedding=False, stock=its kind's LCM, reads=(), **fields of
    Student): the "ema" of a run."""
    def student(kind: str = "epsilon", setting: Lora | Full = LORA, guidance_embedding: bool = False,
                stock: StockCall | None = None, reads: tuple[str, ...] = (), **more) -> Student:
        needs = {"teacher": Frozen(), "student": Trained("teacher", reads or ("w",) * guidance_embedding),
                 "ema": Follows("student", 0.9)}
        stock = stock or (FLOW_LCM if kind.startswith(("sd3", "sana")) else LCM)
        roles = build_roles(load_teacher(teachers[kind]), needs, {"student": setting})
        generator = torch.Generator().manual_seed(1)
        layers = [f"{path}.weight" for path in roles.teacher.family.time.layers(roles.reads["ema"])]
        with torch.no_grad():
            for key, weight in roles.state_dict("ema").items():
                scale = 0.3 if ".lora_B." in key or key in layers else 0.02
                weight += scale * torch.randn(weight.shape, generator=generator)
        stock = replace(stock, call={**stock.call, **roles.teacher.call})
        prompts = ("a large red ring", "a small blue square on green", "two triangles")
        return Student.of(roles, "ema", stock, "lcm", "run-1", **{"prompts": prompts, **more})
    return student
