"""The table of contents: one row a paper. Reading it imports no torch."""
from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    from .base import Method


@dataclass(frozen=True)
class Entry:
    """module is relative to this package; steps: the fewest and the most evaluations at which the method is at its best."""

    module: str
    cls: str
    title: str
    arxiv: str
    family: str
    needs: tuple[str, ...]
    data: tuple[str, ...]
    steps: tuple[int, int]


METHODS: dict[str, Entry] = {
    "lcm": Entry("consistency.lcm", "LCM", "Latent Consistency Models", "2310.04378", "consistency",
                 needs=("teacher", "student", "target"), data=("images", "samples", "pairs"), steps=(2, 8)),
    "guided": Entry("trajectory.guided", "GuidedDistillation", "On Distillation of Guided Diffusion Models", "2210.03142", "trajectory",
                    needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(4, 32)),
    "kd": Entry("trajectory.kd", "KD", "Knowledge Distillation in Iterative Generative Models", "2101.02388", "trajectory",
                needs=("teacher", "student"), data=("pairs",), steps=(1, 4)),
    "progressive": Entry("trajectory.progressive", "Progressive", "Progressive Distillation", "2202.00512", "trajectory",
                         needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(4, 8)),
    "reflow": Entry("trajectory.reflow", "Reflow", "Rectified Flow", "2209.03003", "trajectory",
                    needs=("teacher", "student"), data=("pairs",), steps=(1, 4)),
    "tract": Entry("trajectory.tract", "TRACT", "Transitive Closure Time-Distillation", "2303.04248", "trajectory",
                   needs=("teacher", "student", "target"), data=("images", "samples", "pairs"), steps=(1, 4)),
    "diff_instruct": Entry("distribution.diff_instruct", "DiffInstruct", "Diff-Instruct", "2305.18455", "distribution",
                           needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"), steps=(1, 1)),
    "dmd2": Entry("distribution.dmd2", "DMD2", "Improved Distribution Matching Distillation", "2405.14867", "distribution",
                  needs=("teacher", "student", "critic", "discriminator"), data=("prompts", "images", "samples"), steps=(1, 4)),
    "swiftbrush": Entry("distribution.swiftbrush", "SwiftBrush", "SwiftBrush", "2312.05239", "distribution",
                        needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"), steps=(1, 1)),
}


def load_method(name: str) -> type[Method]:
    """The class of a method by its name in METHODS. RequestError for any other name, with the nearest one."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"there is no method {name!r}: {hint}methods are {', '.join(METHODS)}")
    entry = METHODS[name]
    return getattr(import_module(f".{entry.module}", __package__), entry.cls)
