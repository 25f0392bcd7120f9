"""What is measured on each path of a method, on the problem's own noise and on those of problem.BEYOND.

The loss of an arbitrary student and its gradient, and what the stock scheduler, stepped as a pipeline steps it, makes
of an arbitrary student. Both have a known value that is written out by hand.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..diffusion.contracts import Batch, Condition, Pairs, Role
from ..diffusion.draws import Step
from ..diffusion.guidance import guided, self_guided
from ..methods import load_method
from ..methods.base import Method
from ..models.schedulers import StockCall, sampler_of, stock_call, stock_scheduler
from ..models.stock import Guidance
from ..run.negatives import keeping
from .hand import LEVELS, Hand, Learner, guided_mean, sites
from .path_table import PUBLISHED, Path, all_paths, refused, served
from .paths import Exact
from .problem import Check, FunctionRole, Problem, difference, largest

COUNT, SAMPLES = 64, 16
AVERAGED = ("cd", "tract")                  # whose target is an average of the student, an adapter's too
STOCK = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


@dataclass
class Cast:
    """A method on a path, with the arbitrary networks that play its roles."""

    problem: Problem
    path: Path
    settings: Any
    stock: StockCall
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

    @property
    def told(self) -> Condition:
        """The condition under which the student, which is affine in its text, says what its own guidance makes of
        it."""
        cond = self.batch.cond
        return cond if self.path.kept is None else cond.replace(text=guided_mean(cond, self.path.kept))

    def student(self, x: Tensor, t: Tensor) -> Tensor:
        return self.learner.x0(x, t, self.told, self.w)

    def drawn(self, x: Tensor, t: Tensor) -> Tensor:
        """The student's x_0 as its sampler asks for it: of a range it is told the middle."""
        scale = self.path.scale(self.problem)
        return self.learner.x0(x, t, self.told[:SAMPLES], scale if isinstance(scale, float) else sum(scale) / 2)

    def averaged(self, x: Tensor, t: Tensor) -> Tensor:
        """The target's x_0."""
        return self.target.x0(x, t, self.told, self.w)

    def eps(self) -> Tensor:
        return self.step.normal("noise", self.batch.shape).double()

    def only(self, kept: Tensor) -> Cast:
        """On some of its samples; kept (B,) bool. Each draws what it drew."""
        ids, cond, x0 = (each[kept] for each in (self.batch.ids, self.batch.cond, self.batch.x0))
        some = replace(self.batch, ids=ids, cond=cond, x0=x0, pairs=None)
        return replace(self, batch=some, step=replace(self.step, ids=some.ids))


def cast(name: str, path: Path, problem: Problem, **moment: Any) -> Cast:
    """ValueError where no stock scheduler serves the path on this noise."""
    kind, settings, scale = load_method(name), path.settings_of(name), path.scale(problem)
    inference = kind.inference(settings, path.steps, problem.schedule, scale)
    inference = inference if path.kept is None else replace(inference, cfg=path.kept)
    exported = stock_call(inference, problem.schedule, Guidance(embedded="guidance_scale"))
    needs = kind.needs(settings, path.full)
    learner, average = (Learner(problem, needs["student"].reads) for _ in range(2))
    target = average if path.full or name in AVERAGED else learner
    network, averaged = (FunctionRole(problem.schedule, each.network, problem.kind) for each in (learner, average))
    within = "teacher" not in needs or needs["teacher"].within
    teacher = _teacher(problem, path, learner.reads_w) if path.previous and within else problem.teacher
    roles: dict[str, Role] = {"teacher": teacher, "student": network, "target": averaged}
    sampler = sampler_of(exported, problem.schedule, problem.scheduler)
    method = kind(settings, keeping({role: roles[role] for role in needs}, needs, path.kept), scale, sampler)
    batch = _batch(problem, path)
    step = Exact(**vars(problem.step(COUNT, **{"progress": path.progress, **moment})))
    return Cast(problem, path, settings, exported, method, learner, target, batch, step, Hand(problem))


def _teacher(problem: Problem, path: Path, reads_w: bool) -> Role:
    """A student that is guided within: at the scale that it is told, or has learned."""
    def x0_of(x: Tensor, t: Tensor, cond: Condition) -> Tensor:
        if cond.null is None:
            raise ValueError("a teacher that has its guidance within was guided again")
        w = cond.w.double() if reads_w else path.scale(problem)
        return problem.teacher(x, t, Condition(text=guided_mean(cond, w))).x0
    return self_guided(FunctionRole(problem.schedule, x0_of, problem.kind), guidance_embedding=reads_w)


def _batch(problem: Problem, path: Path) -> Batch:
    """Arbitrary data, noises and states of ways between, under prompts of their own."""
    noise, states = problem.normal(COUNT, problem.dim), problem.normal(COUNT, path.nodes, problem.dim)
    times = torch.linspace(1, 0, path.nodes + 1, dtype=torch.float64)[1:].expand(COUNT, -1)
    cond = problem.prompts(COUNT)
    if path.kept is not None:                      # every other sample has a negative of its own
        own = torch.arange(COUNT)[:, None] % 2 == 0
        cond = cond.replace(negative=Condition(text=torch.where(own, problem.normal(COUNT, problem.dim),
                                                                cond.null.text)))
    return Batch(torch.arange(COUNT), cond, states[:, -1], pairs=Pairs(noise, states, times))


def stock(problem: Problem, exported: StockCall) -> SchedulerMixin:
    """The scheduler that a student leaves with, told what its network predicts."""
    scheduler = stock_scheduler(exported.scheduler, exported.config, problem.scheduler)
    if problem.name == "vp":
        scheduler.register_to_config(prediction_type=STOCK[problem.kind])
    return scheduler


def scale_at_export(exported: StockCall) -> float:
    """The guidance scale in the exported call: a stock pipeline tells it a network that reads one, and guides any other
    itself where it is above 1."""
    return exported.call["guidance_scale"]


@torch.no_grad()
def piped(found: Cast, noise: Tensor, generator: torch.Generator) -> Tensor:
    """What a stock pipeline makes of unit noise: set_timesteps, the scheduler's first state, its step."""
    problem, call, scheduler = found.problem, found.stock.call, stock(found.problem, found.stock)
    grid = next(name for name in ("sigmas", "timesteps", "num_inference_steps") if name in call)
    scheduler.set_timesteps(**{grid: call[grid]})
    network = FunctionRole(problem.schedule, found.learner.network, problem.kind)
    takes, given = inspect.signature(scheduler.step).parameters, {"eta": call.get("eta", 0.0), "generator": generator}
    given = {name: value for name, value in given.items() if name in takes}
    cond = found.batch.cond[:SAMPLES]
    w = scale_at_export(found.stock)
    cond = cond.replace(w=torch.full((SAMPLES,), w).double()) if found.learner.reads_w else cond
    x = noise if problem.name == "flow" else noise * scheduler.init_noise_sigma
    times = [(time.item() + (problem.name == "vp")) / LEVELS for time in scheduler.timesteps]
    for time, t, r in zip(scheduler.timesteps, times, [*times[1:], 0.0]):
        t, r = (torch.full((SAMPLES,), each, dtype=torch.float64) for each in (t, r))
        cond = cond.replace(r=r) if "r" in found.learner.reads else cond
        seen = x if problem.name == "flow" else scheduler.scale_model_input(x, time)
        raw = network(seen.double(), t, cond).raw
        if w > 1 and not found.learner.reads_w:
            away = cond.null if cond.negative is None else cond.negative
            raw = (1 - w) * network(seen.double(), t, away.replace(extra=cond.extra)).raw + w * raw
        x = scheduler.step(raw, time, x, **given, return_dict=False)[0]
    return x.double()


# -- rows --------------------------------------------------------------------------------------------------------------

Known = Callable[[Cast], Tensor]               # a loss written out, a scalar
Kept = Callable[[Cast], Tensor]                # (B,) bool: the samples that the loss written out is for
Sampled = Callable[[Cast, Tensor, Callable[[int], Tensor]], Tensor]            # (cast, noise, draw) -> the sample
TRAINED = "loss and gradient against those of the loss written out"
DRAWN = "what the stock scheduler and ours draw against the sampler written out"


def trained(name: str, path: Path, problem: Problem, known: Known, kept: Kept | None = None, value: bool = True,
            **moment: Any) -> float:
    """How far the gradient of the method's loss is from that of the one written out, and its value too; relative."""
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
    w = torch.full((SAMPLES,), scale_at_export(found.stock)).double()
    cond, network = cond.replace(w=w) if found.learner.reads_w else cond, found.learner.network
    with torch.no_grad():
        right = known(found, noise, draws[0])
        role = FunctionRole(problem.schedule, network, problem.kind)
        role = found.method.sampler.telling(role) if "r" in found.learner.reads else role
        role = role if found.learner.reads_w else guided(role, scale_at_export(found.stock))
        ours = found.method.sampler(role, noise, cond, draws[1])
    return largest(difference(piped(found, noise, streams[2]), right), difference(ours, right))


def table(name: str, problem: Problem) -> Iterator[Check]:
    """Of the settings and the paths themselves."""
    own = vars(load_method(name).Settings())
    off = sum(own[key] != value for key, value in PUBLISHED[name].items())
    yield Check("defaults that are not the published ones", off, 0)
    wrong = sum(served(name, path, problem) == refused(name, path, problem) for path in all_paths(name))
    yield Check("paths that are refused where a stock scheduler exists, or the other way round", wrong, 0)


def rows(name: str, problem: Problem, loss: Known, sample: Sampled, tolerance: float = 1e-9,
         kept: Kept | None = None) -> Iterator[Check]:
    """Of every path that this noise serves. tolerance: of losses; a told scale is a float32 number. Stock schedulers
    have float32 coefficients, and EulerDiscreteScheduler, which serves steps that do not divide 1000, ends at 4096
    where a zero terminal SNR has no end."""
    yield from table(name, problem)
    places = sites(problem)
    for path in all_paths(name):
        if not served(name, path, problem):
            continue
        reads_scale, rounded = path.settings.get("guidance_embedding"), problem.name == "vp" and LEVELS % path.steps
        yield Check(f"{path.name}: {TRAINED}, on {len(places)} noises; relative",
                    largest(*(trained(name, path, place, loss, kept) for place in places)),
                    1e-5 if reads_scale else tolerance)
        yield Check(f"{path.name}: {DRAWN}, on {len(places)} noises; relative",
                    largest(*(sampled(name, path, place, sample) for place in places)), 1e-3 if rounded else 1e-4)
