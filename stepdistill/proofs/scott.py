"""SCott: on average over the fresh noise, its fixed point is the product of the stochastic steps' mean factors, which
draws the data in; the heads judge the data and the student's x_0 as they are."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..methods.consistency.scott import SCott, Settings
from .followers import following
from .paths_scott import paths
from .problem import Affine, Check, Problem, difference, largest, off_zero
from .trajectory import Trajectory, bent, ddim_factor, sde_factor

COUNT, MANY, NODES, SUBSTEPS, ETA = 256, 40_000, 10, 3, 0.4


def made(problem: Problem, student: Role, target: Role | None = None, discriminator: Role | None = None,
         **settings) -> SCott:
    chosen = Settings(**{"nodes": NODES, "skip": 1, "substeps": SUBSTEPS, "eta": ETA,
                         "gan_weight": 0.5 if discriminator else 0.0, **settings})
    roles = {"teacher": problem.teacher, "student": student, "target": target or student}
    sampler = problem.sampler(SCott.inference(chosen, 1, problem.schedule, problem.w))
    return SCott(chosen, roles | ({"discriminator": discriminator} if discriminator else {}), problem.w, sampler)


def trajectory(problem: Problem) -> Trajectory:
    return Trajectory.of(problem, torch.linspace(1, 0, NODES * SUBSTEPS + 1, dtype=torch.float64), sde_factor(ETA))


def pulls(problem: Problem, student: Role) -> Tensor:
    """Slopes of the loss in what each sample adds to the student's x_0, a constant and a multiple of x_t: (B, 2 D)."""
    add, times = (torch.zeros(MANY, problem.dim, dtype=torch.float64, requires_grad=True) for _ in range(2))
    method = made(problem, bent(student, add, times), student)
    loss = method.student_loss(problem.batch(MANY), problem.step(MANY))["consistency"]
    return torch.cat(torch.autograd.grad(loss, (add, times)), 1)


def identities(problem: Problem) -> Iterator[Check]:
    yield from closed_forms(problem)
    yield from paths(problem)
    yield from following("scott", problem)


def closed_forms(problem: Problem) -> Iterator[Check]:
    batch, step, noise = problem.batch(COUNT), problem.step(COUNT), problem.normal(COUNT, problem.dim)
    path = trajectory(problem)
    yield Check("mean slopes at the product of the guided teacher's stochastic steps, in standard errors",
                off_zero(pulls(problem, path.consistent())), 6)
    begin, end = torch.ones(COUNT, dtype=torch.float64), torch.zeros(COUNT, dtype=torch.float64)
    found = made(problem, path.consistent()).sampler(path.consistent(), noise, batch.cond)
    yield Check("one step of the stock sampler against all those steps; relative",
                difference(found, path.carried(noise, begin, end)), 1e-9)

    ode = Trajectory.of(problem, path.grid, ddim_factor)
    root = made(problem, ode.consistent(), eta=0.0).student_loss(batch, step)["consistency"].sqrt()
    yield Check("root of the loss at the product of DDIM's steps, where no noise is fresh", root.item(), 1e-9)
    yield Check("largest share of the ODE's deviation that the stochastic steps leave",
                (path.factors.prod(0) / ode.factors.prod(0)).max().item(), 0.95)
    yield from game(problem, problem.affine())


def game(problem: Problem, learner: Affine) -> Iterator[Check]:
    """What the heads are shown, and told."""
    shown: list[tuple[Tensor, Tensor]] = []
    heads = lambda x, t, cond: shown.append((x.detach(), t)) or [x[:, :1]]
    method = made(problem, learner.as_network(problem.kind), discriminator=heads)
    batch, step = problem.batch(COUNT), problem.step(COUNT)
    gan = method.student_loss(batch, step)["gan"]
    method.critic_loss(batch, problem.step(COUNT, "critic+discriminator", kept=step.kept))
    (x, t), (real, at), (fake, again) = shown
    yield Check("the student's loss of the heads against their weight; relative",
                difference(gan.detach(), -0.5 * x[:, :1].mean()), 1e-12)
    yield Check("what they are shown as real against the data, and as fake against the student's x_0",
                largest(difference(real, batch.x0), difference(fake, x)), 0)
    told = method.times(step)[0]
    yield Check("the time that they are told against the student's",
                largest(*((u - told).abs().max().item() for u in (t, at, again))), 0)
