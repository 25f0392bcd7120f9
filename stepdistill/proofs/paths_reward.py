"""Reward feedback by hand, on each path of its settings: through a curved decoder, with a quadratic reward."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..methods.base import Codec, Follows, Reward, Trained
from ..methods.hybrid.reward import RewardFeedback
from .affine import Net
from .paths import Algorithm, Known, Order, Path, Turn, renoised, rows, stepped
from .paths_add import PIXELS, Curved
from .problem import Check, Problem

PATHS = (
    Path("the defaults", steps=4, elsewhere=True),
    Path("the defaults in one step, not guided", guidance=1.0, elsewhere=True),
    Path("a range of guidance, which nothing reads", steps=2, guidance=(1.5, 4.0)),
    Path("shapes/reward, judged at any of 4 evaluations", {"last": 4}, steps=4, guidance=1.0, elsewhere=True,
         moments=(0, 1, 2)),
    Path("toy/reward", {"last": 4, "weight": 0.02}, steps=4, guidance=1.0, elsewhere=True),
    Path("shapes/hyper", steps=8, guidance=1.0, elsewhere=True),
    Path("toy/hyper", {"weight": 0.02}, steps=8, guidance=1.0, elsewhere=True),
    Path("of a consistency model, judged at any of 4 evaluations", {"last": 4, "fresh": True}, steps=4,
         moments=(0, 1, 2)),
    Path("judged at 2 of 8 evaluations", {"last": 2}, steps=8, moments=(0, 1, 2)),
    Path("more evaluations to be judged than there are", {"last": 9}, steps=2),
    Path("margin 0.3", {"margin": 0.3}, steps=2),
    Path("a margin that all reach", {"margin": -1e3}),
    Path("weight 0.2", {"weight": 0.2}),
    Path("weight 0.2, margin 0.5", {"weight": 0.2, "margin": 0.5}, steps=4),
    Path("nearness 0", {"nearness": 0.0}),
    Path("nearness 3", {"nearness": 3.0}, steps=2),
)


@dataclass
class Judge:
    """R = k u p - |V p|^2 of a picture's numbers p, with k = 1 + the prompt, a number, modulo 5."""

    u: Tensor
    V: Tensor

    @classmethod
    def of(cls, problem: Problem) -> Judge:
        return cls(problem.normal(PIXELS), 0.3 * problem.normal(2, PIXELS))

    def __call__(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        p = pixels.flatten(1)
        return self.read(prompts) * (p @ self.u) - (p @ self.V.T).square().sum(1)

    def slope(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.read(prompts)[:, None] * self.u - 2 * pixels @ self.V.T @ self.V

    @staticmethod
    def read(prompts: Sequence[str]) -> Tensor:
        return torch.tensor([1.0 + int(prompt) % 5 for prompt in prompts], dtype=torch.float64)


def roles(problem: Problem, settings: Any) -> dict[str, Any]:
    begun = {"begun": Net.of(problem)} if settings.nearness else {}
    return {"student": Net.of(problem), **begun, "decode": Curved.of(problem, problem.dim, PIXELS),
            "reward": Judge.of(problem)}


def arrived(turn: Turn) -> tuple[Tensor, Tensor]:
    """The student's own state at the evaluation that is judged, and when that is: of DDIM's steps, or of x_0 noised
    anew."""
    s, student, steps = turn.settings, turn.roles["student"], turn.path.steps
    judged = steps - 1 - int(turn.step.shared("exit") * min(s.last, steps))
    x, t = turn.noise("start"), torch.ones(len(turn.text), dtype=torch.float64)
    for i in range(judged):
        r = 1 - torch.full_like(t, (i + 1) / steps)
        x0 = student.x0(x, t, turn.text)
        x = (renoised(turn.problem, x0, x, t, r, turn.noise(f"renoise {i}")) if s.fresh
             else stepped(turn.problem, x0, x, t, r)[0])
        t = r
    return x, t


@torch.no_grad()
def known(turn: Turn) -> Known:
    s, (x_t, t), prompts = turn.settings, arrived(turn), turn.batch.prompts
    student, decode, judge = (turn.roles[name] for name in ("student", "decode", "reward"))
    x = student.x0(x_t, t, turn.text)
    pixels = decode(x)
    score = judge(pixels, prompts)
    wanting = torch.ones_like(score) if s.margin is None else (score < s.margin).double()
    values = {"reward": s.weight * (wanting * ((s.margin or 0.0) - score)).mean()}
    pull = decode.back(-s.weight / len(x) * wanting[:, None] * judge.slope(pixels, prompts), x)
    if s.nearness:
        off = x - turn.roles["begun"].x0(x_t, t, turn.text)
        values["nearness"] = s.nearness * off.square().mean()
        pull = pull + 2 * s.nearness * off / off.numel()
    return Known(values, {"student": student.slopes(pull, x_t, t, turn.text)})


def needs(settings: Any) -> dict[str, Any]:
    begun = {"begun": Follows("student", 0.0, until=0)} if settings.nearness else {}
    return {"student": Trained("teacher"), **begun, "decode": Codec(), "reward": Reward()}


ALGORITHM = Algorithm(
    RewardFeedback, roles,
    orders=lambda settings: [Order(("student",))],
    needs=needs,
    known=known,
    defaults={"last": 1, "margin": None, "nearness": 1.0, "fresh": False},
    renoised=lambda settings: settings.fresh,
)


def paths(problem: Problem) -> Iterator[Check]:
    yield from rows(ALGORITHM, problem, PATHS)
