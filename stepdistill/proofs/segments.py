"""What the rows of methods that are consistent within segments share, written out by hand."""
from __future__ import annotations

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from .paths import Turn, stepped


def landings(turn: Turn, t: Tensor, s: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """Of a bridge from t to s and a landing at r: the student's x_r and the target's, r, what the student was given, at
    which time, and how much of x_0 x_r holds."""
    student, problem = turn.roles["student"], turn.problem
    x_t = turn.noised(turn.x0, t)
    x_s = stepped(problem, turn.roles["teacher"].x0(x_t, t, turn.guided(turn.scale)), x_t, t, s)[0]
    inside = s > r
    begin = torch.where(inside, s, t)
    target = torch.where(inside[:, None], stepped(problem, student.x0(x_s, begin, turn.text), x_s, begin, r)[0], x_s)
    x_r, share = stepped(problem, student.x0(x_t, t, turn.text), x_t, t, r)
    return x_r, target, r, x_t, t, share


def judged(turn: Turn, x_r: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_r noised to one of the times i / 1000 from r to the end of its segment, which is not among them, the time, how
    much of x_r that holds, and the logits, of all positions where each has its own."""
    schedule, k = turn.problem.schedule, turn.path.steps
    first = torch.ceil(1000 * r - 1e-6).clamp(min=1)
    last = torch.floor(1000 * ((r * k + 1e-6).floor() + 1) / k - 1 + 1e-6)
    time = (first + (turn.step.uniform("judged t") * (last - first + 1)).floor()) / 1000
    kept = schedule.alpha(time) / schedule.alpha(r)
    fresh = (schedule.sigma(time) ** 2 - (kept * schedule.sigma(r)) ** 2).clamp(min=0).sqrt()
    x = kept[:, None] * x_r + fresh[:, None] * turn.noise("judged noise")
    with torch.no_grad():
        logits = turn.roles["discriminator"](x, time, Condition(text=turn.text))
    return x, time, kept, logits if isinstance(logits, Tensor) else torch.cat(logits, 1)
