"""Students of tiny pipelines with random, clearly visible weights, as a finished run would hand them over."""
from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from stepdistill.export import Student
from stepdistill.methods.base import Follows, Frozen, Inference, Trained
from stepdistill.models.families import load_teacher
from stepdistill.models.roles import Full, Lora, build_roles

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import save_tiny

LCM = Inference("LCMScheduler", {"original_inference_steps": 50}, {"num_inference_steps": 4, "guidance_scale": 1.0})
LORA = Lora(rank=4, alpha=6.0)           # alpha other than the rank: a loader that loses it shows


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny teachers by prediction type."""
    return {kind: save_tiny(tmp_path_factory.mktemp(kind) / "teacher", kind) for kind in ("epsilon", "v_prediction")}


@pytest.fixture(scope="session")
def make(teachers: dict[str, Path]) -> Callable[..., Student]:
    """make(kind="epsilon", setting=LORA, told=False, inference=LCM, **fields of Student): the "ema" of a run."""
    def student(kind: str = "epsilon", setting: Lora | Full = LORA, told: bool = False,
                inference: Inference = LCM, **more) -> Student:
        needs = {"teacher": Frozen(), "student": Trained("teacher"), "ema": Follows("student", 0.9)}
        roles = build_roles(load_teacher(teachers[kind]), needs, {"student": setting}, told_w=("student",) if told else ())
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, weight in roles.state_dict("ema").items():
                scale = 0.3 if ".lora_B." in key or "cond_proj" in key else 0.02
                weight += scale * torch.randn(weight.shape, generator=generator)
        prompts = ("a large red ring", "a small blue square on green", "two triangles")
        return Student.of(roles, "ema", inference, "lcm", "run-1", **{"prompts": prompts, **more})
    return student
