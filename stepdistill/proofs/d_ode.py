"""D-ODE: of data of one variance its shares are known, and its samples are the finer solve's; of others they are each
step's least squares. The schedulers that draw for a run land where our sampler does."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.guidance import guided
from ..diffusion.mixing import Mixing, Output
from ..diffusion.solvers import ddim
from ..methods.trajectory.d_ode import DODE, Settings
from ..models.own_schedulers import fitted
from ..models.schedulers import stock_call, stock_scheduler
from .hand import LEVELS, Hand
from .path_rows import STOCK
from .paths import Exact
from .paths_d_ode import paths
from .problem import Affine, Check, Law, Problem, difference, largest, reaching

COUNT, STEPS, FINE = 256, 4, 10


def made(problem: Problem, teacher: Law | Affine, shares: Tensor, output: Output = "eps") -> DODE:
    chosen = Settings(substeps=FINE, output=output)
    roles = {"teacher": teacher, "student": Mixing(teacher, shares, output)}
    return DODE(chosen, roles, problem.w, problem.sampler(DODE.inference(chosen, STEPS, problem.schedule, problem.w)))


def loss_at(problem: Problem, teacher: Law, shares: Tensor, output: Output) -> Tensor:
    return made(problem, teacher, shares, output).loss(problem.batch(COUNT, data=False), moment(problem))["solver"]


def moment(problem: Problem) -> Exact:
    return Exact(**vars(problem.step(COUNT)))


def identities(problem: Problem) -> Iterator[Check]:
    for output in ("eps", "x0"):
        yield from of_one_variance(problem, output)
        yield from of_any(problem, output)
    yield from as_called(problem)
    teacher = problem.affine()
    loss = made(problem, teacher, problem.normal(STEPS - 1).requires_grad_()).loss(
        problem.batch(COUNT, data=False), moment(problem))["solver"]
    yield Check("gradient that reaches the teacher", reaching(loss, teacher), 0)
    yield from paths(problem)


def of_one_variance(problem: Problem, output: Output) -> Iterator[Check]:
    """All that a solver meets is a multiple of where it began, so that one number a step makes up for all it missed."""
    variance = 0.2 + 0.3 * problem.uniform()
    teacher = problem.law(variance * torch.eye(problem.dim, dtype=torch.float64))
    shares, none = known_shares(problem, variance, output), torch.zeros(STEPS - 1, dtype=torch.float64)
    rest, usual = (loss_at(problem, teacher, each, output) for each in (shares, none))
    yield Check(f"loss at the shares of data of one variance, over that at DDIM's, {output}", (rest / usual).item(),
                1e-18)
    noise, cond = problem.normal(COUNT, problem.dim), problem.cond(COUNT)
    method = made(problem, teacher, shares, output)
    drawn = method.sampler.fitted(method.student)(guided(teacher, problem.w), noise, cond)
    fine = ddim(guided(teacher, problem.w), noise, torch.linspace(1, 0, FINE * STEPS + 1, dtype=torch.float64), cond)
    yield Check(f"its sample in {STEPS} steps against the teacher's in {FINE * STEPS}, {output}; relative",
                difference(drawn, fine), 1e-9)


def known_shares(problem: Problem, variance: float, output: Output) -> Tensor:
    """With x_t - alpha_t m = f_t (x_1 - alpha_1 m), f is a number, and so is what the network says, as it changes."""
    coefficients = lambda t: [each.squeeze() for each in Hand(problem).at(torch.tensor([t], dtype=torch.float64))]

    def factor(t: float, r: float) -> Tensor:
        (a, s), (a_r, s_r) = coefficients(t), coefficients(r)
        return (a_r * a * variance + s_r * s) / (a**2 * variance + s**2)

    f = aim = torch.ones((), dtype=torch.float64)
    shares, before = [], f
    for i in range(STEPS):
        a, s = coefficients(1 - i / STEPS)
        o = {"eps": s, "x0": a * variance}[output] / (a**2 * variance + s**2) * f
        for j in range(FINE):
            aim = aim * factor(*(1 - (FINE * i + n) / FINE / STEPS for n in (j, j + 1)))
        landed = f * factor(1 - i / STEPS, 1 - (i + 1) / STEPS)
        shares += [(aim - landed) / (o - before)] if i else []
        f, before = aim if i else landed, o
    return torch.stack(shares)


def of_any(problem: Problem, output: Output) -> Iterator[Check]:
    shares = least_squares(problem, output).requires_grad_()
    none = torch.zeros_like(shares, requires_grad=True)
    best, usual = (loss_at(problem, problem.teacher, each, output) for each in (shares, none))
    at_best, at_none = torch.autograd.grad(best, shares)[0], torch.autograd.grad(usual, none)[0]
    yield Check(f"slopes at each step's least squares, over the largest at DDIM's, {output}",
                (at_best.abs().max() / at_none.abs().max()).item(), 1e-9)
    noise, cond, w = problem.normal(COUNT, problem.dim), problem.cond(COUNT), problem.w
    exact = problem.flow(noise, torch.ones(COUNT).double(), torch.zeros(COUNT).double(), w)
    method = made(problem, problem.teacher, shares.detach(), output)
    role = guided(problem.teacher, w)
    ours, theirs = (difference(sampler(role, noise, cond), exact)
                    for sampler in (method.sampler.fitted(method.student), method.sampler))
    yield Check(f"its samples from the exact flow's, over DDIM's in as many steps, {output}", ours / theirs, 0.7)


def least_squares(problem: Problem, output: Output) -> Tensor:
    """<change, y - ddim> / |change|^2 of each step from the second, one after another."""
    hand, mean = Hand(problem), problem.guided_cond(COUNT, problem.w).text
    at = lambda i, n: torch.full((COUNT,), 1 - i / n, dtype=torch.float64)
    x = y = moment(problem).normal("start", (problem.dim,))
    shares, before = [], x
    for i in range(STEPS):
        for j in range(FINE * i, FINE * (i + 1)):
            y = hand.ddim(y, at(j, FINE * STEPS), at(j + 1, FINE * STEPS), mean)
        says = {"eps": hand.noise, "x0": hand.clean}[output]
        o = says(x, *hand.at(at(i, STEPS)), mean)
        x = hand.ddim(x, at(i, STEPS), at(i + 1, STEPS), mean)
        if i:
            shares.append(((o - before) * (y - x)).sum() / (o - before).square().sum())
            x = x + shares[-1] * (o - before)
        before = o
    return torch.stack(shares)


@torch.no_grad()
def as_called(problem: Problem) -> Iterator[Check]:
    """As a stock pipeline steps one of our own schedulers, twice over: no call remembers the one before."""
    noise, cond, off = problem.normal(COUNT, problem.dim), problem.guided_cond(COUNT, problem.w), []
    call = stock_call(DODE.inference(Settings(), STEPS, problem.schedule, problem.w), problem.schedule)
    for output in ("eps", "x0"):
        role = Mixing(problem.teacher, problem.normal(STEPS - 1), output)
        scheduler = fitted(stock_scheduler(call.scheduler, call.config, problem.scheduler), role)
        if problem.name == "vp":
            scheduler.register_to_config(prediction_type=STOCK[problem.kind])
        ours = problem.sampler(DODE.inference(Settings(), STEPS, problem.schedule)).fitted(role)(role, noise, cond)
        off += [difference(stepped(problem, scheduler, call.call, noise, cond), ours) for _ in range(2)]
    yield Check("what our scheduler draws against our sampler; relative", largest(*off), 1e-4)
    yield Check("the scale at which its pipeline guides, from the recipe's",
                abs(call.call["guidance_scale"] - problem.w), 0)


def stepped(problem: Problem, scheduler, call, noise: Tensor, cond: Condition) -> Tensor:
    """As a pipeline goes."""
    grid = "sigmas" if problem.name == "flow" else "num_inference_steps"
    scheduler.set_timesteps(**{grid: call[grid]})
    x = noise
    for time in scheduler.timesteps:
        t = torch.full((COUNT,), (time.item() + (problem.name == "vp")) / LEVELS, dtype=torch.float64)
        x = scheduler.step(problem.teacher(x, t, cond).raw, time, x, return_dict=False)[0]
    return x
