"""TCD: the map is an exponential integrator, and the loss vanishes where it lands on the teacher's DDIM steps, whatever
r."""
from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..diffusion.contracts import Role
from ..diffusion.flow_map import flow_map
from ..diffusion.prediction import Prediction
from ..diffusion.schedule import like
from ..diffusion.times import nodes
from ..methods.consistency.tcd import TCD, Settings
from .followers import following
from .paths_consistency import tcd as paths
from .problem import Affine, Check, Problem, difference, gradient, largest, off_law, off_zero
from .trajectory import Trajectory, ddim_factor

COUNT, MANY, NODES, STEPS = 256, 5_000, 10, 4
GAMMA = {"vp": 0.3, "flow": 0.0}


def made(problem: Problem, student: Role, **roles: Role) -> TCD:
    settings = Settings(nodes=NODES, gamma=GAMMA[problem.name])
    sampler = problem.sampler(TCD.inference(settings, STEPS, problem.schedule))
    return TCD(settings, {"teacher": problem.teacher, "student": student} | roles, problem.w, sampler)


def identities(problem: Problem) -> Iterator[Check]:
    learner, schedule = problem.affine(), problem.schedule
    network = learner.as_network(problem.kind)
    method, batch, step = made(problem, network), problem.batch(COUNT), problem.step(COUNT)
    x, r, t = problem.normal(COUNT, problem.dim), problem.times(COUNT, 0.02, 0.4), problem.times(COUNT, 0.45, 0.95)
    kept, h = schedule.sigma(r) / schedule.sigma(t), (schedule.log_snr(r) - schedule.log_snr(t)) / 2
    known = like(kept, x) * x - like(schedule.alpha(r) * (-h).expm1(), x) * network(x, t, batch.cond).x0
    yield Check("the map against the exponential integrator (sigma_r / sigma_t) x - alpha_r (e^-h - 1) x_0; relative",
                difference(flow_map(network, x, t, r, batch.cond), known), 1e-9)

    t, s, r = method.times(step)
    path = Trajectory.of(problem, torch.cat([nodes(NODES).flip(0), t.new_tensor([method.end])]), ddim_factor)
    root = made(problem, path.landing(r)).loss(batch, step)["consistency"].sqrt()
    yield Check("root of the loss of a student that lands on the guided teacher's DDIM steps at every r",
                root.item(), 1e-9)

    other = problem.affine()
    x_t = schedule.add_noise(batch.x0, step.normal("noise", batch.shape), t)
    x_s = path.carried(x_t, t, s)
    averaged = made(problem, network, target=other.as_network(problem.kind))
    for label, role, whole in (("itself, fixed", learner, method), ("an average", other, averaged)):
        target = torch.where(like(r, x_s) < like(s, x_s), mapped(problem, role, x_s, s, r), x_s).detach()
        known = gradient((mapped(problem, learner, x_t, t, r) - target).square().mean(), learner)
        found = gradient(whole.loss(batch, step)["consistency"], learner)
        yield Check(f"gradient against that with an exact target, {label}; relative", difference(found, known), 1e-9)

    yield Check("moments of the nodes t, and of r given s, against the uniform laws', in standard errors",
                drawn_times(method, problem), 6)
    if problem.name == "vp":
        yield Check("signal, old and fresh noise after a step of the sampler against algorithm 4",
                    noise_added(problem, method), 1e-9)
    noise, end = problem.normal(COUNT, problem.dim), torch.full((COUNT,), method.end, dtype=torch.float64)
    once = problem.sampler(TCD.inference(method.settings, 1, problem.schedule))
    found, known = once(path.landing(end), noise, batch.cond), path.carried(noise, torch.ones_like(end), end)
    yield Check("one step of the stock sampler against all the steps; relative", difference(found, known), 1e-9)
    yield from paths(problem)
    yield from following("tcd", problem)


def drawn_times(method: TCD, problem: Problem) -> float:
    """t = i / N, s = (i - skip) / N, r = j / N with j from 0 to that of s; not a number where s is not, or any is not a
    node."""
    times = method.times(problem.step(MANY))
    i, below, j = ((NODES * u).round() for u in times)
    expected = [node.div(NODES).clamp(min=method.end) for node in (i, (i - method.settings.skip).clamp(min=0), j)]
    if any((u - known).abs().max() > 1e-12 for u, known in zip(times, expected)):
        return float("nan")
    given = torch.stack([j - below / 2, j**2 - below * (2 * below + 1) / 6], 1)
    return largest(off_law(i, torch.arange(1, NODES + 1).double()), off_zero(given))


def mapped(problem: Problem, learner: Affine, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """sigma_r / sigma_t x + (alpha_r - alpha_t sigma_r / sigma_t) x_0."""
    kept = problem.schedule.sigma(r) / problem.schedule.sigma(t).clamp(min=1e-12)
    signal = problem.schedule.alpha(r) - problem.schedule.alpha(t) * kept
    return like(kept, x) * x + like(signal, x) * (learner.m + x @ learner.S.T)


def noise_added(problem: Problem, method: TCD) -> float:
    """The largest error of three coefficients over the steps but the last: of x_0, of the predicted eps, of the fresh
    noise."""
    squares, worst = problem.scheduler.alphas_cumprod.double(), 0.0
    x0, eps, fresh = torch.eye(3, dtype=torch.float64)[:, None]
    for e, after in zip(method.sampler.evaluations, method.sampler.times[1:]):
        t, landing = (torch.tensor([u], dtype=torch.float64) for u in (e.level, e.landing))
        prediction = Prediction(x0, problem.schedule.add_noise(x0, eps, t), t, problem.schedule, "x0")
        n = round(1000 * after.item() - 1)
        A_n, A_s = squares[n], squares[int((1 - method.settings.gamma) * n)]
        known = torch.stack([A_n, A_n / A_s * (1 - A_s), 1 - A_n / A_s]).sqrt()
        worst = largest(worst, difference(e.rule([prediction], landing, fresh)[0], known))
    return worst
