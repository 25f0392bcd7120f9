"""The table of paths through a method: its defaults, every setting at another value, what shipped recipes choose.

A setting that changes what a method computes has a path here, or `uncovered` names it.
"""
from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ..methods import METHODS, load_method
from ..methods.base import Guidance
from ..models.schedulers import stock_call
from ..recipe import Recipe
from ..recipe.catalogue import builtin
from ..run.negatives import kept_scale
from .hand import LEVELS
from .problem import Problem


@dataclass(frozen=True)
class Path:
    """name: what is special of it. settings: other than the defaults. w: the recipe's guidance, None a drawn scale.
    full: all weights are trained. previous: the teacher is the student of the stage before. nodes: of the pairs.
    progress: of the training. kept: the scale of a student that keeps its guidance, under negatives of its own; None:
    it keeps none."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 4
    w: Guidance | None = None
    full: bool = False
    previous: bool = False
    nodes: int = 4
    progress: float = 0.0
    kept: float | None = None

    def settings_of(self, method: str) -> Any:
        """The method's settings."""
        return load_method(method).Settings(**self.settings)

    def scale(self, problem: Problem) -> Guidance:
        return problem.w if self.w is None else self.w


def of(name: str, steps: int = 4, w: Guidance | None = None, full: bool = False, **settings: Any) -> Path:
    return Path(name, settings, steps, w, full)


RANGE = (1.5, 4.0)
KEPT = Path("guidance kept, negatives", kept=2.7)
ONE = of("1 step", 1)
AFTER = Path("of the stage before", previous=True)
GUIDED = (of("a range of scales", w=RANGE), of("no guidance", w=1.0))
HUBER = of("Huber, c = 0.3", loss="huber", huber_c=0.3)
CONSISTENCY = (of("squared", loss="squared"), HUBER, of("10 nodes, 2 steps", 2, nodes=10), *GUIDED, AFTER)
SKIPS = (of("skip 2", skip=2), of("skip 7 of 10", nodes=10, skip=7), of("shift 3", shift=3.0),
         of("an averaged target", full=True))
PATHS: dict[str, tuple[Path, ...]] = {
    "cd": (*CONSISTENCY, ONE, KEPT),
    "flow_map": (*GUIDED, AFTER, ONE, KEPT,
                 of("exact", derivative="exact"),
                 of("one difference", derivative="difference"),
                 of("mean and deviation", mean=0.9, std=1.1),
                 of("half alike", alike=0.5),
                 of("width", width=0.01),
                 of("no warm-up", warmup=0.0),
                 of("long warm-up", warmup=0.8),
                 of("damping 1", 2, damping=1.0),
                 of("lagrangian", form="lagrangian"),
                 of("lagrangian, exact, a range of scales", 2, RANGE, form="lagrangian", derivative="exact"),
                 of("lagrangian, one difference", form="lagrangian", derivative="difference"),
                 of("trajectory", form="trajectory"),
                 of("trajectory, 2 solver steps", form="trajectory", solver_steps=2),
                 of("trajectory, other weights", 1, form="trajectory", output_weight=0.3, velocity_weight=0.1)),
    "ict": (ONE,
            of("few nodes, 2 steps", 2, first_nodes=6, last_nodes=9),
            Path("nodes doubled once", {"first_nodes": 8, "last_nodes": 30}, progress=0.4),
            Path("nodes doubled thrice", progress=0.45),
            Path("nodes doubled to the end", {"last_nodes": 70}, progress=0.9),
            of("mean", mean=0.4),
            of("deviation", std=0.7),
            of("Huber, c = 0.3", huber_c=0.3)),
    "lcm": (*CONSISTENCY, *SKIPS, KEPT, replace(KEPT, name="guidance kept, negatives, an averaged target", full=True),
            of("the data's path", w=1.0, bridge="data"),
            of("the data's path, guidance embedding, skip 2", w=RANGE, bridge="data", skip=2, guidance_embedding=True),
            of("guidance embedding, a range of scales", w=RANGE, guidance_embedding=True),
            of("guidance embedding, one scale", guidance_embedding=True),
            of("guidance embedding, an averaged target", w=RANGE, full=True, guidance_embedding=True),
            Path("of the stage before, guidance embedding", {"guidance_embedding": True}, w=RANGE, previous=True)),
    "mcm": (*GUIDED, AFTER, ONE, KEPT,
            of("few nodes, 2 steps", 2, first_nodes=8, last_nodes=16),
            Path("nodes half grown", {"first_nodes": 8, "last_nodes": 72}, progress=0.25),
            Path("nodes grown", {"first_nodes": 8, "last_nodes": 72}, progress=0.7),
            Path("nodes that grow to the end", {"first_nodes": 8, "last_nodes": 72, "grown": 1.0}, progress=0.7),
            of("a node a step", 8, first_nodes=8, last_nodes=8),
            of("DDIM", eta=0.0),
            of("eta 1", eta=1.0),
            of("squared", loss="squared"),
            of("max(SNR, 1)", weight="truncated"),
            of("the data's path", w=1.0, bridge="data"),
            of("the data's path, squared, 1 step", 1, w=1.0, bridge="data", loss="squared")),
    "mlcm": (*GUIDED, AFTER, ONE, KEPT,
             of("2 segments of 10 nodes", 2, nodes=10),
             of("a node a step", 8, nodes=8),
             of("states of 3 steps", state_steps=3),
             of("states of 1 step", 2, state_steps=1),
             of("the whole", stage="whole"),
             of("the whole, 1 step", 1, stage="whole"),
             of("the whole, 3 of 8 ends", 3, stage="whole"),
             of("the whole, 3 of 4 ends", 3, stage="whole", ends=4),
             of("the whole, bridges of 1 step", 2, stage="whole", bridge_steps=1),
             of("the whole, a range of scales", 2, w=RANGE, stage="whole"),
             Path("the whole, of the stage before", {"stage": "whole"}, previous=True)),
    "scm": (*GUIDED, ONE, KEPT,
            of("exact", derivative="exact"),
            of("mean and deviation", mean=0.9, std=1.1),
            of("one difference", derivative="difference"),
            of("width", width=0.01),
            of("no warm-up", warmup=0.0),
            of("long warm-up", warmup=0.8),
            of("damping 1", 2, damping=1.0)),
    "tcd": (*CONSISTENCY, *SKIPS, KEPT,
            of("gamma 0", gamma=0.0),
            of("gamma 0.5", gamma=0.5),
            of("gamma 1", gamma=1.0),
            of("shift 3, gamma 0", shift=3.0, gamma=0.0),
            of("skip 2, gamma 1", skip=2, gamma=1.0),
            of("shift 2, gamma 1, an averaged target", full=True, shift=2.0, gamma=1.0),
            of("Huber, gamma 0, a range of scales", w=RANGE, loss="huber", huber_c=0.3, gamma=0.0)),
    "boot": (of("a range of scales", 1, RANGE), of("no guidance", 1, 1.0),
             Path("of the stage before", steps=1, previous=True),
             of("10 nodes", 1, nodes=10),
             of("3 solver steps", 1, solver_steps=3)),
    "guided": (GUIDED[0], of("SNR + 1", w=RANGE, weight="v"), of("no guidance embedding", guidance_embedding=False),
               replace(KEPT, settings={"guidance_embedding": False}),
               of("16 steps", 16, RANGE)),
    "kd": (ONE, of("absolute", loss="absolute"), of("2 steps on 4 nodes", 2)),
    "progressive": (*GUIDED, AFTER, KEPT,
                    of("SNR + 1", weight="v"),
                    of("16 steps", 16),
                    of("guidance embedding, a range of scales", w=RANGE, guidance_embedding=True),
                    Path("of the stage before, guidance embedding", {"guidance_embedding": True}, 8, RANGE,
                         previous=True)),
    "snapfusion": (*GUIDED,
                   of("never guided", guided_share=0.0),
                   of("always guided", guided_share=1.0),
                   of("always guided, a range of scales, SNR + 1", 2, RANGE, guided_share=1.0, weight="v"),
                   of("always guided, 16 steps", 16, guided_share=1.0),
                   of("no denoising", denoising_weight=0.0),
                   of("much denoising, always guided", denoising_weight=1.5, guided_share=1.0)),
    "reflow": (HUBER, of("distil", distil=True), of("distil, 1 step", 1, distil=True)),
    "tract": (*GUIDED, AFTER, KEPT, of("20 nodes, 1 step", 1, nodes=20), of("2 steps", 2),
              of("a step a node", 4, nodes=4)),
}
ELSEWHERE = {"target_decay"}                # settings that no loss reads: followers.py has their rows

# What the papers and the released training choose, and with it the methods' own defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cd": {"nodes": 40, "loss": "squared", "huber_c": 0.001, "target_decay": 0.95},
    "flow_map": {"mean": -0.8, "std": 1.0, "damping": 0.1},
    "ict": {"first_nodes": 10, "last_nodes": 1280, "mean": -1.1, "std": 2.0, "huber_c": 0.00054},
    "lcm": {"nodes": 50, "skip": 1, "bridge": "ddim", "loss": "huber", "huber_c": 0.001, "target_decay": 0.95,
            "shift": 1.0},
    "mcm": {"first_nodes": 64, "last_nodes": 1280, "grown": 0.5, "bridge": "addim", "eta": 0.75, "loss": "norm",
            "weight": "v"},
    "mlcm": {"stage": "segments", "nodes": 40, "state_steps": 20, "ends": 8, "bridge_steps": 3},
    "scm": {"mean": -0.1, "std": 1.6, "warmup": 0.1, "damping": 0.1},
    "scott": {"nodes": 1000, "skip": 24, "substeps": 3, "eta": 0.1, "loss": "squared", "gan_weight": 0.4,
              "target_decay": 0.95,
              "guidance_embedding": False},
    "tcd": {"nodes": 50, "skip": 1, "gamma": 0.2, "loss": "squared", "huber_c": 0.001, "target_decay": 0.95,
            "shift": 1.0},
    "boot": {"nodes": 40, "solver_steps": 1},
    "guided": {"weight": "truncated", "guidance_embedding": True},
    "kd": {"loss": "squared"},
    "progressive": {"weight": "truncated", "guidance_embedding": False},
    "snapfusion": {"guided_share": 0.1, "denoising_weight": 0.2, "weight": "truncated"},
    "reflow": {"distil": False, "loss": "squared", "huber_c": 0.001},
    "tract": {"nodes": 40, "target_decay": 0.5},
}


@lru_cache
def shipped(method: str) -> tuple[Path, ...]:
    """One of each choice that recipes which ship make of this method, in any of their stages."""
    found: dict[tuple, Path] = {}
    names = [name for name, file in builtin().items() if f"method: {method}" in file.read_text(encoding="utf-8")]
    for name in names:
        stage: Recipe | None = Recipe.load(name)
        while stage is not None:
            if stage.method == method:
                nodes = 4 if stage.data.pairs is None else stage.data.pairs.nodes
                path = Path(f"{name}, {stage.steps} steps", asdict(stage.method_settings()), stage.steps,
                            stage.guidance, stage.student.lora is None, stage.taught_by_previous, nodes,
                            kept=kept_scale(stage))
                found.setdefault(tuple(map(str, asdict(replace(path, name="")).values())), path)
            stage = stage.previous
    return tuple(found.values())


def all_paths(method: str) -> tuple[Path, ...]:
    return (Path("defaults", steps=min(4, METHODS[method].steps[1])), *PATHS[method], *shipped(method))


def uncovered(method: str, settings: type | None = None) -> list[str]:
    """The settings of a method that no path of its own has at another value than the default, and values of choices
    that none has."""
    settings = settings or load_method(method).Settings
    hints, default = get_type_hints(settings, vars(inspect.getmodule(settings))), settings()
    missing = []
    for name in (f.name for f in fields(settings) if f.name not in ELSEWHERE):
        seen = {path.settings.get(name, vars(default)[name]) for path in (Path("defaults"), *PATHS[method])}
        hint = hints[name]
        choices = (True, False) if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()
        missing += [f"{name} = {value!r}" for value in choices if value not in seen]
        missing += [] if choices or len(seen) > 1 else [name]
    return missing


def served(name: str, path: Path, problem: Problem) -> bool:
    """Whether a stock scheduler exists for it: those of LCM and TCD have nodes that divide 1000 and no shift; of a flow
    none adds a share of fresh noise."""
    settings = vars(path.settings_of(name))
    if problem.name == "flow":
        return settings.get("gamma", 1.0) in (0, 1)
    return name not in ("lcm", "tcd") or LEVELS % settings["nodes"] == 0 and settings["shift"] == 1


def refused(name: str, path: Path, problem: Problem) -> bool:
    try:
        inference = load_method(name).inference(path.settings_of(name), path.steps, problem.schedule,
                                                path.scale(problem))
        stock_call(inference, problem.schedule)
    except ValueError:
        return True
    return False
