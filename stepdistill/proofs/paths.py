"""Paths through a method: its defaults, every setting at another value, and what the shipped recipes choose.

A setting that changes what a method computes has a path here, or `uncovered` names it. Of each path two things are measured, on
the problem's own noise and on those of hand.BEYOND: the gradient of an arbitrary student's loss, and what the stock
scheduler, stepped as a pipeline steps it, makes of an arbitrary student. Both have a known value that is written out by hand.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..diffusion.contracts import Batch, Condition, Pairs, Role
from ..diffusion.draws import Step
from ..diffusion.guidance import self_guided
from ..methods import load_method
from ..methods.base import Guidance, Inference, Method
from ..models.schedulers import stock_scheduler
from ..recipe import Recipe, builtin
from .hand import LEVELS, Hand, Learner, guided_mean, sites
from .problem import Believer, Check, Problem, difference, largest

COUNT, SAMPLES = 64, 16
AVERAGED = ("cd", "tract")                  # whose target is an average of the student, an adapter's too
STOCK = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclass(frozen=True)
class Path:
    """name: what is special of it. settings: other than the defaults. w: the recipe's guidance, None a drawn scale above 1.
    full: all weights are trained. previous: the teacher is the student of the stage before. nodes: of the pairs."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 4
    w: Guidance | None = None
    full: bool = False
    previous: bool = False
    nodes: int = 4

    def asked(self, method: str) -> Any:
        """The method's settings."""
        return load_method(method).Settings(**self.settings)

    def scale(self, problem: Problem) -> Guidance:
        return problem.w if self.w is None else self.w


RANGE = (1.5, 4.0)
HUBER = {"loss": "huber", "huber_c": 0.3}
CONSISTENCY = (Path("squared", {"loss": "squared"}), Path("Huber, c = 0.3", HUBER), Path("10 nodes, 2 steps", {"nodes": 10}, 2))
AFTER = Path("of the stage before", previous=True)
SKIPS = (Path("skip 2", {"skip": 2}), Path("skip 7 of 10", {"nodes": 10, "skip": 7}), Path("shift 3", {"shift": 3.0}),
         Path("an averaged target", full=True), Path("a range of scales", w=RANGE), Path("no guidance", w=1.0), AFTER)
PATHS: dict[str, tuple[Path, ...]] = {
    "cd": (*CONSISTENCY, Path("a range of scales", w=RANGE), Path("no guidance", w=1.0), Path("1 step", steps=1), AFTER),
    "lcm": (*CONSISTENCY, *SKIPS, Path("told a range", {"told": True}, w=RANGE), Path("told one scale", {"told": True}),
            Path("told, an averaged target", {"told": True}, w=RANGE, full=True),
            Path("of the stage before, told", {"told": True}, w=RANGE, previous=True)),
    "scm": (Path("exact", {"derivative": "exact"}), Path("mean and deviation", {"mean": 0.9, "std": 1.1}), Path("width", {"width": 0.01}),
            Path("no warm-up", {"warmup": 0.0}), Path("long warm-up", {"warmup": 0.8}), Path("damping 1", {"damping": 1.0}, 2),
            Path("a range of scales", w=RANGE), Path("no guidance", w=1.0), Path("1 step", steps=1)),
    "tcd": (*CONSISTENCY, *SKIPS, Path("gamma 0", {"gamma": 0.0}), Path("gamma 0.5", {"gamma": 0.5}), Path("gamma 1", {"gamma": 1.0}),
            Path("shift 3, gamma 0", {"shift": 3.0, "gamma": 0.0}), Path("skip 2, gamma 1", {"skip": 2, "gamma": 1.0}),
            Path("shift 2, gamma 1, an averaged target", {"shift": 2.0, "gamma": 1.0}, full=True),
            Path("Huber, gamma 0, a range of scales", HUBER | {"gamma": 0.0}, w=RANGE)),
    "guided": (Path("a range of scales", w=RANGE), Path("SNR + 1", {"weight": "v"}, w=RANGE), Path("untold", {"told": False}),
               Path("16 steps", {}, 16, RANGE)),
    "kd": (Path("absolute", {"loss": "absolute"}), Path("1 step", steps=1), Path("2 steps on 4 nodes", steps=2)),
    "progressive": (Path("SNR + 1", {"weight": "v"}), Path("16 steps", {}, 16), Path("told a range", {"told": True}, w=RANGE),
                    Path("a range of scales", w=RANGE), Path("no guidance", w=1.0), AFTER,
                    Path("of the stage before, told", {"told": True}, 8, RANGE, previous=True)),
    "reflow": (Path("distil", {"distil": True}), Path("Huber", HUBER), Path("distil, 1 step", {"distil": True}, 1)),
    "tract": (Path("20 nodes, 1 step", {"nodes": 20}, 1), Path("2 steps", steps=2), Path("a range of scales", w=RANGE),
              Path("no guidance", w=1.0), Path("a step a node", {"nodes": 4}, 4), AFTER),
}
ELSEWHERE = {"target_decay": "what follows the student"}          # settings that no loss reads, and the row that does


# What the papers and the training that their authors or diffusers released choose, and with it the methods' own defaults.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cd": {"nodes": 40, "loss": "squared", "huber_c": 0.001, "target_decay": 0.95},
    "lcm": {"nodes": 50, "skip": 1, "loss": "huber", "huber_c": 0.001, "target_decay": 0.95, "shift": 1.0},
    "scm": {"mean": -0.1, "std": 1.6, "warmup": 0.1, "damping": 0.1},
    "tcd": {"nodes": 50, "skip": 1, "gamma": 0.2, "loss": "squared", "huber_c": 0.001, "target_decay": 0.95, "shift": 1.0},
    "guided": {"weight": "truncated", "told": True},
    "kd": {"loss": "squared"},
    "progressive": {"weight": "truncated", "told": False},
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
                path = Path(f"{name}, {stage.steps} steps", asdict(stage.method_settings()), stage.steps, stage.guidance,
                            stage.student.lora is None, stage.taught_by_previous, nodes)
                found.setdefault(tuple(map(str, asdict(replace(path, name="")).values())), path)
            stage = stage.previous
    return tuple(found.values())


def all_paths(method: str) -> tuple[Path, ...]:
    return (Path("defaults"), *PATHS[method], *shipped(method))


def uncovered(method: str, settings: type | None = None) -> list[str]:
    """The settings of a method that no path has at another value than the default, and values of choices that none has."""
    settings = settings or load_method(method).Settings
    hints, default = get_type_hints(settings, vars(inspect.getmodule(settings))), settings()
    missing = []
    for name in (f.name for f in fields(settings) if f.name not in ELSEWHERE):
        seen = {path.settings.get(name, vars(default)[name]) for path in (Path("defaults"), *PATHS[method])}
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else (True, False) if hints[name] is bool else ()
        missing += [f"{name} = {value!r}" for value in choices if value not in seen] if choices else [name] * (len(seen) < 2)
    return missing


# -- what is made of a path ----------------------------------------------------------------------------------------------

@dataclass
class Cast:
    """A method on a path, with the arbitrary networks that play its roles. w: the scale of every sample, as the teacher is guided."""

    problem: Problem
    path: Path
    settings: Any
    inference: Inference
    method: Method
    learner: Learner
    target: Learner
    batch: Batch
    step: Step
    hand: Hand

    @property
    def w(self) -> Tensor | float:
        scale = self.path.scale(self.problem)
        return scale if isinstance(scale, float) else scale[0] + (scale[1] - scale[0]) * self.step.uniform("guidance")

    @property
    def mean(self) -> Tensor:
        """Of the guided teacher's data, (B, D)."""
        return guided_mean(self.batch.cond, self.w)

    def student(self, x: Tensor, t: Tensor) -> Tensor:
        return self.learner.x0(x, t, self.batch.cond, self.w)

    def drawn(self, x: Tensor, t: Tensor) -> Tensor:
        """The student's x_0 as its sampler asks for it: of a range it is told the middle."""
        scale = self.path.scale(self.problem)
        return self.learner.x0(x, t, self.batch.cond[:SAMPLES], scale if isinstance(scale, float) else sum(scale) / 2)

    def averaged(self, x: Tensor, t: Tensor) -> Tensor:
        """The target's x_0."""
        return self.target.x0(x, t, self.batch.cond, self.w)

    def eps(self) -> Tensor:
        return self.step.normal("noise", self.batch.shape).double()

    def only(self, kept: Tensor) -> Cast:
        """On some of its samples; kept (B,) bool. Each draws what it drew."""
        some = replace(self.batch, ids=self.batch.ids[kept], cond=self.batch.cond[kept], x0=self.batch.x0[kept], pairs=None)
        return replace(self, batch=some, step=replace(self.step, ids=some.ids))


def cast(name: str, path: Path, problem: Problem, **moment: Any) -> Cast:
    """ValueError where no stock scheduler serves the path on this noise."""
    kind, settings, scale = load_method(name), path.asked(name), path.scale(problem)
    inference = kind.inference(settings, path.steps, problem.name, scale)
    needs = kind.needs(settings, path.full)
    learner, average = (Learner(problem, needs["student"].told_w) for _ in range(2))
    target = average if path.full or name in AVERAGED else learner
    network, averaged = (Believer(problem.schedule, each.network, problem.kind) for each in (learner, average))
    roles: dict[str, Role] = {"teacher": _teacher(problem, path, learner.reads_w), "student": network, "target": averaged}
    method = kind(settings, {role: roles[role] for role in needs}, scale, problem.sampler(inference))
    batch, step = _batch(problem, path), problem.step(COUNT, **moment)
    return Cast(problem, path, settings, inference, method, learner, target, batch, step, Hand(problem))


def _teacher(problem: Problem, path: Path, reads_w: bool) -> Role:
    """The pipeline's network, or a student that is guided within: at the scale that it is told, or at the one it has learned."""
    if not path.previous:
        return problem.teacher

    def believes(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.null is None:
            raise ValueError("a teacher that has its guidance within was guided again")
        w = cond.w.double() if reads_w else path.scale(problem)
        return problem.teacher(x, t, Condition(text=guided_mean(cond, w))).x0
    return self_guided(Believer(problem.schedule, believes, problem.kind), told=reads_w)


def _batch(problem: Problem, path: Path) -> Batch:
    """Arbitrary data, noises and states of ways between, under prompts of their own."""
    noise, states = problem.normal(COUNT, problem.dim), problem.normal(COUNT, path.nodes, problem.dim)
    times = torch.linspace(1, 0, path.nodes + 1, dtype=torch.float64)[1:].expand(COUNT, -1)
    return Batch(torch.arange(COUNT), problem.prompts(COUNT), states[:, -1], pairs=Pairs(noise, states, times))


def stock(problem: Problem, inference: Inference) -> SchedulerMixin:
    """The scheduler that a student leaves with, told what its network predicts."""
    scheduler = stock_scheduler(inference.scheduler, inference.config, problem.scheduler)
    if problem.name == "vp":
        scheduler.register_to_config(prediction_type=STOCK[problem.kind])
    return scheduler


def told_at_export(inference: Inference) -> float:
    """The guidance scale in the exported call: a stock pipeline tells it a network that reads one, and guides any other itself
    where it is above 1."""
    return inference.call["guidance_scale"]


@torch.no_grad()
def piped(found: Cast, noise: Tensor, generator: torch.Generator) -> Tensor:
    """What a stock pipeline makes of unit noise: set_timesteps, the scheduler's first state, its step."""
    problem, call, scheduler = found.problem, found.inference.call, stock(found.problem, found.inference)
    scheduler.set_timesteps(sigmas=call["sigmas"]) if "sigmas" in call else scheduler.set_timesteps(call["num_inference_steps"])
    network, takes = Believer(problem.schedule, found.learner.network, problem.kind), inspect.signature(scheduler.step).parameters
    given = {name: value for name, value in {"eta": call.get("eta"), "generator": generator}.items() if name in takes and value is not None}
    cond = found.batch.cond[:SAMPLES]
    w = told_at_export(found.inference)
    cond = cond.replace(w=torch.full((SAMPLES,), w).double()) if found.learner.reads_w else cond
    x = noise if problem.name == "flow" else noise * scheduler.init_noise_sigma
    for time in scheduler.timesteps:
        t = torch.full((SAMPLES,), (time.item() + (problem.name == "vp")) / LEVELS, dtype=torch.float64)
        seen = x if problem.name == "flow" else scheduler.scale_model_input(x, time)
        raw = network(seen.double(), t, cond).raw
        if w > 1 and not found.learner.reads_w:
            raw = (1 - w) * network(seen.double(), t, cond.null).raw + w * raw
        x = scheduler.step(raw, time, x, **given, return_dict=False)[0]
    return x.double()


# -- rows ----------------------------------------------------------------------------------------------------------------

Known = Callable[[Cast], Tensor]                                  # a loss written out, a scalar
Kept = Callable[[Cast], Tensor]                                   # (B,) bool: the samples that the loss written out is for
Sampled = Callable[[Cast, Tensor, Callable[[int], Tensor]], Tensor]    # (cast, noise, draw) -> the sample, written out


def trained(name: str, path: Path, problem: Problem, known: Known, kept: Kept | None = None, value: bool = True, **moment: Any) -> float:
    """The gradient of the method's loss from that of the one written out, and the value from its value where it has that; relative."""
    found = cast(name, path, problem, **moment)
    found = found if kept is None else found.only(kept(found))
    loss, right = sum(found.method.updates()[0].loss(found.batch, found.step).values()), known(found)
    values = difference(loss.detach(), right.detach()) if value else 0.0
    return largest(values, difference(found.learner.gradient(loss), found.learner.gradient(right)))


def sampled(name: str, path: Path, problem: Problem, known: Sampled) -> float:
    """The stock scheduler's sample, and our sampler's, from the one written out; relative."""
    found = cast(name, path, problem)
    noise = problem.normal(SAMPLES, problem.dim)
    streams = [torch.Generator().manual_seed(7) for _ in range(3)]
    draws = [lambda i, s=s: torch.randn(SAMPLES, problem.dim, generator=s, dtype=torch.float64) for s in streams]
    cond = found.batch.cond[:SAMPLES]
    told = cond.replace(w=torch.full((SAMPLES,), told_at_export(found.inference)).double()) if found.learner.reads_w else cond
    with torch.no_grad():
        right = known(found, noise, draws[0])
        ours = found.method.sampler(Believer(problem.schedule, found.learner.network, problem.kind), noise, told, draws[1])
    return largest(difference(piped(found, noise, streams[2]), right), difference(ours, right))


def served(name: str, path: Path, problem: Problem) -> bool:
    """Whether a stock scheduler exists for it: those of LCM and TCD have nodes that divide 1000, and no shift; of a flow none adds
    a share of fresh noise."""
    settings = vars(path.asked(name))
    if problem.name == "flow":
        return settings.get("gamma", 1.0) in (0, 1)
    return name not in ("lcm", "tcd") or LEVELS % settings["nodes"] == 0 and settings["shift"] == 1


def refused(name: str, path: Path, problem: Problem) -> bool:
    try:
        load_method(name).inference(path.asked(name), path.steps, problem.name, path.scale(problem))
    except ValueError:
        return True
    return False


def table(name: str, problem: Problem) -> Iterator[Check]:
    """Of the settings and the paths themselves."""
    own = vars(load_method(name).Settings())
    yield Check("defaults that are not the published ones", sum(own[key] != value for key, value in PUBLISHED[name].items()), 0)
    wrong = sum(served(name, path, problem) == refused(name, path, problem) for path in all_paths(name))
    yield Check("paths that are refused where a stock scheduler exists, or the other way round", wrong, 0)


def rows(name: str, problem: Problem, loss: Known, sample: Sampled, tolerance: float = 1e-9,
         kept: Kept | None = None) -> Iterator[Check]:
    """Of every path that this noise serves. tolerance: of gradients; a told scale is a float32 number. Stock schedulers have
    float32 coefficients, and EulerDiscreteScheduler, which serves steps that do not divide 1000, ends at 4096 where a zero
    terminal SNR has no end."""
    yield from table(name, problem)
    places = sites(problem)
    for path in all_paths(name):
        if not served(name, path, problem):
            continue
        told, rounded = path.settings.get("told"), problem.name == "vp" and LEVELS % path.steps
        yield Check(f"{path.name}: loss and gradient against those of the loss written out, on {len(places)} noises; relative",
                    largest(*(trained(name, path, place, loss, kept) for place in places)), 1e-5 if told else tolerance)
        yield Check(f"{path.name}: what the stock scheduler and ours draw against the sampler written out, on {len(places)} noises; relative",
                    largest(*(sampled(name, path, place, sample) for place in places)), 1e-3 if rounded else 1e-4)
