"""AccVideo: no loss where the student's steps land on the guided teacher's way; the heads see the stored states and the
student's landings where they lie, and know nothing where these are the same."""
from __future__ import annotations

from collections.abc import Iterator

import torch

from ..diffusion.contracts import Role
from ..methods.trajectory.accvideo import AccVideo, Settings
from .kd import traveller
from .paths_accvideo import paths
from .problem import Check, Problem, difference, largest, off_law

COUNT, STEPS, MANY = 256, 4, 5_000


def made(problem: Problem, student: Role, steps: int = STEPS, **settings) -> AccVideo:
    heads = settings.pop("discriminator", None)
    chosen = Settings(**{"nodes": steps, "gan_weight": 0.1 if heads else 0.0, **settings})
    roles = {"teacher": problem.teacher, "student": student} | ({"discriminator": heads} if heads else {})
    return AccVideo(chosen, roles, problem.w, problem.sampler(AccVideo.inference(chosen, steps, problem.schedule)))


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from paths(problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    batch, step = problem.paired(COUNT, nodes=8, w=problem.w), problem.step(COUNT)
    student, other = traveller(problem, STEPS, problem.w), traveller(problem, STEPS, 1.0)
    rest, usual = (made(problem, role).student_loss(batch, step)["regression"] for role in (student, other))
    yield Check("regression where the steps land on the guided teacher's way, over that on the unguided one's",
                (rest / usual).item(), 1e-18)
    drawn = made(problem, student).sampler(student, batch.pairs.noise, batch.cond)
    yield Check("its sample in 4 steps against the teacher's; relative", difference(drawn, batch.x0), 1e-9)
    yield from game(problem)


def game(problem: Problem) -> Iterator[Check]:
    """What the heads are shown of a student on another way, and what it is worth where they cannot tell."""
    batch, step, shown = problem.paired(MANY, nodes=STEPS, w=problem.w), problem.step(MANY), []
    heads = lambda x, t, cond: shown.append((x.detach(), t)) or [0 * x[:, :2]]
    method = made(problem, traveller(problem, STEPS, 1.0), discriminator=heads, gan_weight=0.3)
    losses = method.student_loss(batch, step)
    losses |= method.critic_loss(batch, problem.step(MANY, "discriminator", kept=step.kept))
    yield Check("losses where the heads cannot tell, from 0 and 2",
                largest(losses["gan"].abs().item(), abs(losses["discriminator"].item() - 2)), 1e-12)
    (fooling, judged), (real, t), (fake, again) = shown
    nodes = torch.arange(STEPS).double() / STEPS
    yield Check("moments of the nodes that are judged, from a uniform law's, in standard errors", off_law(t.round(
        decimals=2), nodes), 6)
    yield Check("times at which they judge, from each other", largest((t - judged).abs().max().item(),
                                                                      (t - again).abs().max().item()), 0)
    one, r = torch.ones(MANY, dtype=torch.float64), t.round(decimals=2)
    begun = problem.flow(batch.pairs.noise, one, r + 1 / STEPS, problem.w)
    yield Check("real states against the teacher's way at that time; relative",
                difference(real, problem.flow(batch.pairs.noise, one, r, problem.w)), 1e-9)
    landed = problem.flow(begun, r + 1 / STEPS, r, 1.0)
    yield Check("fake states against where the student's step lands; relative", difference(fake, landed), 1e-9)
    yield Check("what the student is judged by from that; relative", difference(fooling, landed), 1e-9)
