"""Flow maps: both tangents vanish at the guided teacher's flow map, which any number of steps samples exactly;
TraFlow's terms vanish there too but the one that asks for straight ways."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.flow_map import secant_target
from ..diffusion.guidance import self_guided
from ..diffusion.schedule import where
from ..methods.consistency.flow_map import FlowMap, Settings
from .paths_flow_map import flow_map as paths
from .problem import Check, FunctionRole, Problem, difference, largest

COUNT = 256
INNER = {"mean": 1.0, "std": 0.5}          # no landing on 0, where the teacher is asked at its first time instead
FINE = 400                                 # steps of a teacher


def made(problem: Problem, student: Role, w: float, steps: int = 1, teacher: Role | None = None, **settings) -> FlowMap:
    chosen = Settings(**{"derivative": "exact", **settings})
    roles = {"teacher": teacher or problem.teacher, "student": student}
    return FlowMap(chosen, roles, w, problem.sampler(FlowMap.inference(chosen, steps, problem.schedule)))


def mapped(problem: Problem, w: float) -> FunctionRole:
    """The x_0 whose step from x_t to cond.r lands where the guided teacher's trajectory is; at r = t the teacher's
    own."""
    def x0_of(x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        law, near = problem.teacher.of(problem.guided_cond(len(t), w)), t - cond.r < 1e-6
        r = torch.where(near, 0.0, cond.r)
        return where(near, law(x_t, t).x0, secant_target(x_t, law.flow(x_t, t, r), t, r, problem.schedule))
    return FunctionRole(problem.schedule, x0_of, problem.kind)


def same(problem: Problem, w: float) -> FunctionRole:
    """The guided teacher, which asks nothing of r."""
    law = lambda t: problem.teacher.of(problem.guided_cond(len(t), w))
    return FunctionRole(problem.schedule, lambda x_t, t, cond: law(t)(x_t, t).x0, problem.kind)


def tangent(problem: Problem, student: Role, progress: float = 0.5, **settings) -> float:
    found = made(problem, student, problem.w, **settings).loss(problem.batch(COUNT),
                                                               problem.step(COUNT, progress=progress))
    return found["tangent"].item() ** 0.5


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    for form in ("eulerian", "lagrangian"):
        least, other, begun = (tangent(problem, student, form=form, **INNER) for student in
                               (mapped(problem, problem.w), mapped(problem, problem.w - 1), same(problem, problem.w)))
        yield Check(f"{form} tangent at the guided flow map, over that at the flow map of another scale",
                    least / other, 1e-6)
        yield Check(f"{form} tangent at the guided flow map, over that at the guided teacher", least / begun, 1e-6)
    least, other = (tangent(problem, mapped(problem, w), derivative="pair") for w in (problem.w, problem.w - 1))
    yield Check("tangent by the default derivative at the guided flow map, over that at another scale's",
                least / other, 0.02)
    least, other = (tangent(problem, same(problem, w), progress=0.0) for w in (problem.w, problem.w - 1))
    yield Check("at the first step, tangent at the guided teacher, over that at one of another scale",
                least / other, 1e-9)
    yield from within(problem)
    yield from traflow(problem)
    noise = problem.normal(COUNT, problem.dim)
    ends = problem.flow(noise, torch.ones(COUNT).double(), torch.zeros(COUNT).double(), problem.w)
    for steps in (1, 2, 4):
        sampler = made(problem, problem.teacher, problem.w, steps).sampler
        landed = sampler(sampler.telling(mapped(problem, problem.w)), noise, problem.cond(COUNT))
        yield Check(f"{steps} steps of the flow map against the guided teacher's ODE; relative",
                    difference(landed, ends), 1e-5)


def within(problem: Problem) -> Iterator[Check]:
    """A teacher that is the student of a stage before has its guidance within."""
    taught = self_guided(same(problem, problem.w), guidance_embedding=False)
    least, other = (tangent(problem, mapped(problem, w), teacher=taught, **INNER) for w in (problem.w, problem.w - 1))
    yield Check("tangent at the flow map of a teacher with its guidance within, over that at another scale's",
                least / other, 1e-6)


def traflow(problem: Problem) -> Iterator[Check]:
    def terms(student: Role) -> dict[str, float]:
        method = made(problem, student, problem.w, form="trajectory", solver_steps=FINE)
        losses = method.trajectory_loss(problem.batch(COUNT), problem.step(COUNT))
        return {name: value.item() ** 0.5 for name, value in losses.items()}
    flows, begun = terms(mapped(problem, problem.w)), terms(same(problem, problem.w))
    worst = largest(*(flows[name] / begun[name] for name in ("consistency", "output")))
    yield Check(f"TraFlow's landings at the guided flow map of {FINE} steps, over those of one step of its teacher",
                worst, 0.02)
    yield Check("what TraFlow wants of velocities, at the guided teacher, over that at its curved flow map",
                begun["velocity"] / flows["velocity"], 1e-9)
