"""Networks and heads of few numbers, whose values and gradients can be written down."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..diffusion.contracts import Condition
from ..diffusion.prediction import Prediction, truth
from ..diffusion.schedule import Schedule, like
from .problem import Problem


@dataclass
class Net:
    """A role whose x_0 is m + (1 + t) S x_t + U text + p t + q w, put as a network of its kind puts it.

    w is the number that the condition holds, a scale, an exit or a share, and 0 where it holds none.
    """

    schedule: Schedule
    kind: str
    numbers: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem, kind: str | None = None) -> Net:
        vector, matrix = (problem.dim,), (problem.dim, problem.dim)
        shapes = {"m": vector, "S": matrix, "U": matrix, "p": vector, "q": vector}
        numbers = {name: (0.6 * problem.normal(*shape)).requires_grad_() for name, shape in shapes.items()}
        return cls(problem.schedule, kind or problem.kind, numbers)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Prediction:
        x0 = self._affine(x_t.flatten(1), t, cond.text, next(iter(cond.extra.values()), None)).reshape(x_t.shape)
        eps = (x_t - like(self.schedule.alpha(t), x_t) * x0) / like(self.schedule.sigma(t), x_t)
        return Prediction(truth(x0, eps, t, self.schedule, self.kind), x_t, t, self.schedule, self.kind)

    def _affine(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor | None) -> Tensor:
        n, t = self.numbers, t[:, None]
        extra = 0 if w is None else w[:, None] * n["q"]
        return n["m"] + (1 + t) * (x @ n["S"].T) + text @ n["U"].T + t * n["p"] + extra

    @torch.no_grad()
    def x0(self, x: Tensor, t: Tensor, text: Tensor, w: Tensor | None = None) -> Tensor:
        """(B, D), no gradient. A guided network is this one at the guided text, since it is affine in text."""
        return self._affine(x, t, text, w)

    def slopes(self, pull: Tensor, x: Tensor, t: Tensor, text: Tensor, w: Tensor | None = None) -> Tensor:
        """Of a loss in all numbers, flat, where `pull` (B, D) is its slope in x_0."""
        extra = torch.zeros(len(x), dtype=torch.float64) if w is None else w
        parts = pull.sum(0), pull.T @ ((1 + t)[:, None] * x), pull.T @ text, pull.T @ t, pull.T @ extra
        return torch.cat([part.flatten() for part in parts])

    def back(self, pull: Tensor, t: Tensor) -> Tensor:
        """The slope in x_t (B, D) that `pull`, a slope in x_0, makes."""
        return (1 + t)[:, None] * (pull @ self.numbers["S"].detach())


@dataclass
class QuadraticHeads:
    """K logits z Q z + u z + c s + e text + o w of features z (B, F), levels s (B, L) and the prompt."""

    numbers: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem, features: int, levels: int = 1, count: int = 2) -> QuadraticHeads:
        shapes = {"Q": (count, features, features), "u": (count, features), "c": (count, levels),
                  "e": (count, problem.dim), "o": (count,)}
        return cls({name: (0.3 * problem.normal(*shape)).requires_grad_() for name, shape in shapes.items()})

    def __call__(self, z: Tensor, s: Tensor, cond: Condition) -> Tensor:
        n = self.numbers
        logits = torch.einsum("bf,kfg,bg->bk", z, n["Q"], z) + z @ n["u"].T + s @ n["c"].T + cond.text @ n["e"].T
        return logits if cond.w is None else logits + cond.w[:, None] * n["o"]

    def slopes(self, pull: Tensor, z: Tensor, s: Tensor, text: Tensor, w: Tensor | None = None) -> Tensor:
        """Of a loss in all numbers, flat, where `pull` (B, K) is its slope in the logits."""
        extra = torch.zeros(len(z), dtype=torch.float64) if w is None else w
        parts = torch.einsum("bk,bf,bg->kfg", pull, z, z), pull.T @ z, pull.T @ s, pull.T @ text, pull.T @ extra
        return torch.cat([part.flatten() for part in parts])

    def back(self, pull: Tensor, z: Tensor) -> Tensor:
        """The slope in z (B, F) that `pull`, a slope in the logits, makes."""
        Q, u = self.numbers["Q"].detach(), self.numbers["u"].detach()
        return torch.einsum("bk,kfg,bg->bf", pull, Q + Q.mT, z) + pull @ u


@dataclass
class QuadraticDiscriminator:
    """Quadratic heads, called as a discriminator on a network's features is."""

    numbers: dict[str, Tensor]

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition) -> Tensor:
        return QuadraticHeads(self.numbers)(x_t.flatten(1), t[:, None], cond)


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x)."""
    return torch.logaddexp(x, torch.zeros_like(x))


# Logits of two heads at each of their positions, which lie beside each other, (B, 5).
TOKENS = (2, 3)


@dataclass
class TokenDiscriminator:
    """Two quadratic heads of a logit at each of their positions, called as a discriminator on a network's features
    is."""

    numbers: dict[str, Tensor]

    @classmethod
    def of(cls, problem: Problem) -> TokenDiscriminator:
        return cls(QuadraticHeads.of(problem, problem.dim, count=sum(TOKENS)).numbers)

    def __call__(self, x_s: Tensor, s: Tensor, cond: Condition) -> list[Tensor]:
        return list(QuadraticHeads(self.numbers)(x_s.flatten(1), s[:, None], cond).split(TOKENS, 1))


def mean_of_tokens(values: Tensor) -> Tensor:
    """Of values at all positions: the mean over those of each head, and then over heads and samples."""
    return torch.stack([of_head.mean() for of_head in values.split(TOKENS, 1)]).mean()


def token_shares(count: int) -> Tensor:
    """What a position's value has in `mean_of_tokens` of `count` samples, (5,)."""
    return torch.cat([torch.full((tokens,), 1 / (tokens * len(TOKENS) * count), dtype=torch.float64)
                      for tokens in TOKENS])
