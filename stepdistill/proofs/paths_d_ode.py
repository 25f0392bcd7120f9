"""D-ODE by hand, on each path of its settings: no number but the solver's shares takes a gradient."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..diffusion.mixing import Mixing
from ..methods.base import Frozen, Trained
from ..methods.trajectory.d_ode import DODE
from .affine import Net
from .paths import Algorithm, Known, Order, Path, Turn, rows, stepped
from .problem import Check, Problem

MOST = 8                                       # steps of a path; each has times that float32 holds, as a flow's are

PATHS = (
    Path("the defaults, 4 steps, shapes/d_ode", steps=4, elsewhere=True),
    Path("toy/d_ode, no guidance", steps=4, guidance=1.0, elsewhere=True),
    Path("2 steps", steps=2),
    Path("8 steps, 2 substeps", {"substeps": 2}, steps=8, elsewhere=True),
    Path("8 steps, 5 substeps, x_0", {"substeps": 5, "output": "x0"}, steps=8),
    Path("x_0", {"output": "x0"}, steps=4, elsewhere=True),
)


class Own(Mixing):
    """A student whose numbers are its shares."""

    @property
    def numbers(self) -> dict[str, Tensor]:
        return {"shares": self.shares}

    def x0(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return self.role.x0(x, t, text)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    teacher = Net.of(problem)
    return {"teacher": teacher,
            "student": Own(teacher, (0.6 * problem.normal(MOST - 1)).requires_grad_(), settings.output)}


def known(turn: Turn) -> Known:
    """The sum over steps, from the second, of the mean squared distance to the teacher's finer solve, and its slope in
    each share where the state that the step begins in is fixed."""
    k, fine, output = turn.path.steps, turn.settings.substeps, turn.settings.output
    teacher, text = turn.roles["teacher"], turn.guided(turn.scale)
    step = lambda x, i, n: stepped(turn.problem, teacher.x0(x, at(i, n), text), x, at(i, n), at(i + 1, n))[0]
    at = lambda i, n: torch.full((len(text),), 1 - i / n, dtype=torch.float64)
    x = y = turn.noise("start")
    before, value, slopes = x, torch.zeros(()), torch.zeros(MOST - 1, dtype=torch.float64)
    for i in range(k):
        for j in range(fine):
            y = step(y, fine * i + j, fine * k)
        o = said(turn, teacher.x0(x, at(i, k), text), x, at(i, k))[output]
        x = step(x, i, k)
        if i:
            x = x + turn.roles["student"].shares[i - 1].detach() * (o - before)
            value, slopes[i - 1] = value + (x - y).square().mean(), 2 * ((x - y) * (o - before)).mean()
        before = o
    return Known({"solver": value}, {"student": slopes})


def said(turn: Turn, x0: Tensor, x: Tensor, t: Tensor) -> dict[str, Tensor]:
    schedule = turn.problem.schedule
    return {"x0": x0, "eps": (x - schedule.alpha(t)[:, None] * x0) / schedule.sigma(t)[:, None]}


ALGORITHM = Algorithm(DODE, roles, lambda settings: [Order(("student",))],
                      lambda settings: {"teacher": Frozen(), "student": Trained("teacher", solver=settings.output)},
                      known, defaults={"substeps": 10, "output": "eps"}, renoised=False)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
