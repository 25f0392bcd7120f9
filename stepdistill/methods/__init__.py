"""The table of contents: one row a paper. Reading it imports no torch."""
from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import RequestError

if TYPE_CHECKING:
    from .base import Method

KINDS = ("images", "prompts", "samples", "pairs")      # what data can be, each in place of the others


@dataclass(frozen=True)
class Entry:
    """module is relative to this package, and of a plugin's method absolute; steps: the fewest and the most evaluations
    at which the method is at its best."""

    module: str
    cls: str
    title: str
    arxiv: str
    family: str
    needs: tuple[str, ...]
    data: tuple[str, ...]
    steps: tuple[int, int]


METHODS: dict[str, Entry] = {
    "cd": Entry("consistency.cd", "CD", "Consistency Models", "2303.01469", "consistency",
                needs=("teacher", "student", "target"), data=("images", "samples", "pairs"), steps=(1, 4)),
    "flow_map": Entry("consistency.flow_map", "FlowMap", "Align Your Flow", "2506.14603", "consistency",
                      needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(1, 8)),
    "ict": Entry("consistency.ict", "ICT", "Improved Techniques for Training Consistency Models", "2310.14189",
                 "consistency",
                 needs=("student",), data=("images", "samples", "pairs"), steps=(1, 4)),
    "lcm": Entry("consistency.lcm", "LCM", "Latent Consistency Models", "2310.04378", "consistency",
                 needs=("teacher", "student", "target"), data=("images", "samples", "pairs"), steps=(2, 8)),
    "mcm": Entry("consistency.mcm", "MCM", "Multistep Consistency Models", "2403.06807", "consistency",
                 needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(1, 16)),
    "mlcm": Entry("consistency.mlcm", "MLCM", "Multistep Consistency Distillation of Latent Diffusion Model",
                  "2406.05768", "consistency", needs=("teacher", "student"), data=("prompts",), steps=(2, 8)),
    "pcm": Entry("consistency.pcm", "PCM", "Phased Consistency Model", "2405.18407", "consistency",
                 needs=("teacher", "student", "discriminator"), data=("images", "samples", "pairs"), steps=(2, 16)),
    "scflow": Entry("consistency.scflow", "SCFlow", "Self-Corrected Flow Distillation", "2412.16906", "consistency",
                    needs=("teacher", "student", "target", "discriminator"), data=("images", "samples", "pairs"),
                    steps=(1, 4)),
    "scm": Entry("consistency.scm", "SCM", "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
                 "2410.11081",
                 "consistency", needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(1, 4)),
    "scott": Entry("consistency.scott", "SCott", "Stochastic Consistency Distillation", "2403.01505", "consistency",
                   needs=("teacher", "student", "target", "critic", "discriminator"),
                   data=("images", "samples", "pairs"),
                   steps=(1, 4)),
    "tcd": Entry("consistency.tcd", "TCD", "Trajectory Consistency Distillation", "2402.19159", "consistency",
                 needs=("teacher", "student", "target"), data=("images", "samples", "pairs"), steps=(2, 8)),
    "tscd": Entry("consistency.tscd", "TSCD", "Trajectory Segmented Consistency Distillation", "2404.13686",
                  "consistency",
                  needs=("teacher", "student", "critic", "discriminator"), data=("images", "samples", "pairs"),
                  steps=(1, 8)),
    "accvideo": Entry("trajectory.accvideo", "AccVideo", "AccVideo: Accelerating Video Diffusion Model with Synthetic "
                      "Dataset", "2503.19462", "trajectory",
                      needs=("teacher", "student", "discriminator"), data=("pairs",), steps=(4, 10)),
    "boot": Entry("trajectory.boot", "BOOT", "BOOT: Data-free Distillation of Denoising Diffusion Models with "
                  "Bootstrapping", "2306.05544", "trajectory",
                  needs=("teacher", "student"), data=("prompts",), steps=(1, 1)),
    "denoise": Entry("trajectory.denoise", "Denoise", "Denoising Diffusion Probabilistic Models", "2006.11239",
                     "trajectory", needs=("student",), data=("images", "samples"), steps=(20, 100)),
    "d_ode": Entry("trajectory.d_ode", "DODE", "Distilling ODE Solvers of Diffusion Models into Smaller Steps",
                   "2309.16421", "trajectory", needs=("teacher", "student"), data=("prompts",), steps=(4, 10)),
    "guided": Entry("trajectory.guided", "GuidedDistillation", "On Distillation of Guided Diffusion Models",
                    "2210.03142", "trajectory",
                    needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(4, 32)),
    "kd": Entry("trajectory.kd", "KD", "Knowledge Distillation in Iterative Generative Models",
                "2101.02388", "trajectory",
                needs=("teacher", "student"), data=("pairs",), steps=(1, 4)),
    "progressive": Entry("trajectory.progressive", "Progressive", "Progressive Distillation",
                         "2202.00512", "trajectory",
                         needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(4, 8)),
    "reflow": Entry("trajectory.reflow", "Reflow", "Rectified Flow", "2209.03003", "trajectory",
                    needs=("teacher", "student"), data=("pairs",), steps=(1, 4)),
    "snapfusion": Entry("trajectory.snapfusion", "SnapFusion", "SnapFusion", "2306.00980", "trajectory",
                        needs=("teacher", "student"), data=("images", "samples", "pairs"), steps=(4, 8)),
    "tract": Entry("trajectory.tract", "TRACT", "Transitive Closure Time-Distillation", "2303.04248", "trajectory",
                   needs=("teacher", "student", "target"), data=("images", "samples", "pairs"), steps=(1, 4)),
    "diff_instruct": Entry("distribution.diff_instruct", "DiffInstruct", "Diff-Instruct", "2305.18455", "distribution",
                           needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"), steps=(1, 1)),
    "dmd": Entry("distribution.dmd", "DMD", "Distribution Matching Distillation", "2311.18828", "distribution",
                 needs=("teacher", "student", "critic"), data=("pairs",), steps=(1, 1)),
    "dmd2": Entry("distribution.dmd2", "DMD2", "Improved Distribution Matching Distillation",
                  "2405.14867", "distribution",
                  needs=("teacher", "student", "critic", "discriminator"),
                  data=("prompts", "images", "samples"), steps=(1, 4)),
    "f_distill": Entry("distribution.f_distill", "FDistill", "One-step Diffusion Models with f-Divergence "
                       "Distribution Matching",
                       "2502.15681", "distribution", needs=("teacher", "student", "critic", "discriminator"),
                       data=("images", "samples"), steps=(1, 4)),
    "sid": Entry("distribution.sid", "SiD", "Score identity Distillation", "2404.04057", "distribution",
                 needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"), steps=(1, 4)),
    "swiftbrush": Entry("distribution.swiftbrush", "SwiftBrush", "SwiftBrush", "2312.05239", "distribution",
                        needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"), steps=(1, 1)),
    "disback": Entry("distribution.disback", "DisBack", "Distribution Backtracking Distillation",
                     "2408.15991", "distribution",
                     needs=("teacher", "student", "critic", *(f"record{i}" for i in range(1, 10))),
                     data=("prompts", "images", "samples"), steps=(1, 1)),
    "uni_instruct": Entry("distribution.uni_instruct", "UniInstruct", "Uni-Instruct", "2505.20755", "distribution",
                          needs=("teacher", "student", "critic", "discriminator"), data=("images", "samples"),
                          steps=(1, 4)),
    "smd": Entry("distribution.smd", "SMD", "Score-of-Mixture Training", "2502.09609", "distribution",
                 needs=("teacher", "student", "critic", "discriminator"), data=("images", "samples"), steps=(1, 4)),
    "tdm": Entry("distribution.tdm", "TDM", "Trajectory Distribution Matching", "2503.06674", "distribution",
                 needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"), steps=(2, 8)),
    "dp_dmd": Entry("distribution.dp_dmd", "DPDMD", "Diversity-Preserved Distribution Matching Distillation",
                    "2602.03139", "distribution",
                    needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"), steps=(2, 8)),
    "diff_ratio": Entry("distribution.diff_ratio", "DiffRatio", "DiffRatio", "2502.08005", "distribution",
                        needs=("student", "critic", "discriminator"), data=("images", "samples"), steps=(1, 1)),
    "em_distillation": Entry("hybrid.em_distillation", "EMDistillation", "EM Distillation", "2405.16852", "hybrid",
                             needs=("teacher", "student", "critic"), data=("prompts", "images", "samples"),
                             steps=(1, 1)),
    "rcm": Entry("hybrid.rcm", "RCM", "Score-Regularized Continuous-Time Consistency Model", "2510.08431", "hybrid",
                 needs=("teacher", "student", "critic"), data=("images", "samples", "pairs"), steps=(1, 4)),
    "reward": Entry("hybrid.reward", "RewardFeedback", "Reward Feedback Learning", "2304.05977", "hybrid",
                    needs=("student", "begun", "decode", "reward"), data=("prompts", "images", "samples"),
                    steps=(1, 8)),
    "sana_sprint": Entry("hybrid.sana_sprint", "SanaSprint", "SANA-Sprint", "2503.09641", "hybrid",
                         needs=("teacher", "student", "discriminator"), data=("images", "samples", "pairs"),
                         steps=(1, 4)),
    "add": Entry("adversarial.add", "ADD", "Adversarial Diffusion Distillation", "2311.17042", "adversarial",
                 needs=("teacher", "student", "decode", "features", "discriminator"),
                 data=("images", "samples"), steps=(1, 4)),
    "ladd": Entry("adversarial.ladd", "LADD", "Latent Adversarial Diffusion Distillation", "2403.12015", "adversarial",
                  needs=("teacher", "student", "discriminator"), data=("samples", "images"), steps=(1, 4)),
    "lightning": Entry("adversarial.lightning", "Lightning", "Progressive Adversarial Diffusion Distillation",
                       "2402.13929", "adversarial",
                       needs=("teacher", "student", "critic", "discriminator"),
                       data=("images", "samples"), steps=(2, 8)),
}


REGISTERED: dict[str, type[Method]] = {}      # methods from outside, which have rows in METHODS too


def register_method(name: str, method: type[Method], *, title: str, arxiv: str = "", family: str = "plugin",
                    steps: tuple[int, int] = (1, 4)) -> None:
    """Makes a method from outside known by its name, in this process: recipes, `verify` and exports take it as one of
    ours.

    title, arxiv, steps: of its row in `stepdistill methods`. Registered again, it takes the place of what was
    registered before. RequestError for a name of ours, and for a class that is no whole method.
    """
    if name in METHODS and name not in REGISTERED:
        raise RequestError(f"{name} is a method of stepdistill's own, which is not replaced: choose another name")
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise RequestError(f"a method is named by small letters, digits and _, such as my_method; found {name!r}")
    _check(name, method)
    needs = tuple(method.needs(method.Settings(), full=True))
    METHODS[name] = Entry(method.__module__, method.__name__, title, arxiv, family, needs, tuple(method.data), steps)
    REGISTERED[name] = method


def _check(name: str, method: type[Method]) -> None:
    from .base import Method
    if not isinstance(method, type) or not issubclass(method, Method):
        raise RequestError(f"the method {name} should be a subclass of stepdistill.methods.base.Method; found "
                           f"{method!r}")
    if inspect.isabstract(method):
        raise RequestError(f"the method {name} lacks {', '.join(sorted(method.__abstractmethods__))}")
    if missing := sorted({"Settings", "data"} - {entry for cls in method.__mro__ for entry in vars(cls)}):
        raise RequestError(f"the method {name} lacks {', '.join(missing)}")
    if not is_dataclass(method.Settings) or not method.Settings.__dataclass_params__.frozen:
        raise RequestError(f"the Settings of {name} should be a frozen dataclass: @dataclass(frozen=True, "
                           "kw_only=True)")
    try:
        method.Settings()
    except TypeError as error:
        raise RequestError(f"the Settings of {name} need a default each: {error}") from error
    if not method.data or not {*method.data} <= {*KINDS}:
        raise RequestError(f"the data of {name} should be some of {', '.join(KINDS)}; found {method.data!r}")


def load_method(name: str) -> type[Method]:
    """The class of a method by its name in METHODS. RequestError for any other name, with the nearest one."""
    if name not in METHODS:
        near = get_close_matches(name, METHODS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RequestError(f"there is no method {name!r}: {hint}methods are {', '.join(METHODS)}")
    entry = METHODS[name]
    if name in REGISTERED:
        return REGISTERED[name]
    return getattr(import_module(f".{entry.module}", __package__), entry.cls)
