"""Teachers in closed form: Gaussian data and mixtures of them, under any schedule, as roles.

With x_0 ~ N(m, C), x_t is N(alpha m, alpha^2 C + sigma^2 I), and the posterior means of x_0 and eps, the flow map of
the probability-flow ODE, the density and its samples are all known. Parameters are float64; outputs have the state's
dtype.
"""
from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import log, pi
from typing import Sequence

import torch
from torch import Tensor

from .contracts import Condition
from .prediction import Prediction, truth
from .schedule import Schedule, like


def _as_kind(x0: Tensor, eps: Tensor, x_t: Tensor, t: Tensor, schedule: Schedule, kind: str) -> Prediction:
    return Prediction(truth(x0, eps, t, schedule, kind), x_t, t, schedule, kind)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """x_0 ~ N(mean, covariance). mean: the shape of one sample, D numbers; covariance: (D,), a diagonal, or (D, D).

    kind: the parameterisation in which it answers, as a network would; `v` is regular at both ends.
    """

    schedule: Schedule
    mean: Tensor
    covariance: Tensor
    kind: str = "v"

    @cached_property
    def _axes(self) -> tuple[Tensor, Tensor | None]:
        """Principal variances (D,), and the axes in columns (D, D), None where they are the coordinates."""
        covariance = self.covariance.double()
        return torch.linalg.eigh(covariance) if covariance.ndim == 2 else (covariance, None)

    def _scaled(self, x: Tensor, coefficient: Tensor) -> Tensor:
        """x (B, ...) with its component along each principal axis multiplied by `coefficient` (B, D) or (D,)."""
        axes = self._axes[1]
        coefficient, flat = coefficient.to(x), x.flatten(1)
        if axes is None:
            return (flat * coefficient).reshape(x.shape)
        return ((flat @ axes.to(x) * coefficient) @ axes.to(x).T).reshape(x.shape)

    def _centred(self, x: Tensor, t: Tensor) -> Tensor:
        return x - like(self.schedule.alpha(t), x) * self.mean.to(x)

    def _variances(self, t: Tensor) -> Tensor:
        """Of x_t along the principal axes: alpha^2 lambda + sigma^2, (B, D)."""
        return self.schedule.alpha(t)[:, None] ** 2 * self._axes[0] + self.schedule.sigma(t)[:, None] ** 2

    def posterior(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t], neither by dividing by alpha or sigma."""
        offset, variances = self._centred(x_t, t), self._variances(t)
        x0 = self.mean.to(x_t) + self._scaled(offset, self.schedule.alpha(t)[:, None] * self._axes[0] / variances)
        return x0, self._scaled(offset, self.schedule.sigma(t)[:, None] / variances)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        return _as_kind(*self.posterior(x_t, t), x_t, t, self.schedule, self.kind)

    def flow(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """Where the probability-flow ODE carries x_t from t to r: alpha_r m + sqrt(V_r / V_t) (x_t - alpha_t m)."""
        stretched = self._scaled(self._centred(x_t, t), (self._variances(r) / self._variances(t)).sqrt())
        return like(self.schedule.alpha(r), x_t) * self.mean.to(x_t) + stretched

    def log_density(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log p_t(x_t), (B,)."""
        variances = self._variances(t)
        squares = (self._scaled(self._centred(x_t, t), variances.rsqrt()).flatten(1) ** 2).sum(1)
        return -0.5 * (squares + (variances.log() + log(2 * pi)).sum(1).to(x_t))

    def samples(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape) float64 draws of x_0."""
        z = torch.randn(n, *self.mean.shape, generator=generator, dtype=torch.float64)
        return self.mean.double() + self._scaled(z, self._axes[0].sqrt())


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """x_0 ~ sum_k weights_k N_k. weights: (K,), summing to 1; components share one schedule and one shape.

    A condition with a label (B,) keeps the components of that label (component k's is k unless `labels` (K,) says
    otherwise), and a negative label keeps all: the null that guidance needs. ValueError for a label that no component
    has.
    """

    weights: Tensor
    components: Sequence[Gaussian]
    labels: Tensor | None = None
    kind: str = "v"

    @classmethod
    def of(cls, schedule: Schedule, weights: Tensor, means: Tensor, stds: Tensor,
           labels: Tensor | None = None) -> GaussianMixture:
        """Round components: weights (K,), means (K, *shape), stds (K,)."""
        parts = [Gaussian(schedule, m, (s.double() ** 2).expand(m.numel())) for m, s in zip(means, stds)]
        return cls(weights.double() / weights.double().sum(), parts, labels)

    @property
    def schedule(self) -> Schedule:
        return self.components[0].schedule

    @cached_property
    def _stacked(self) -> tuple[Tensor, Tensor, Tensor]:
        """Means (K, D), principal variances (K, D) and axes in columns (K, D, D) of the components."""
        eye = torch.eye(self.components[0].mean.numel(), dtype=torch.float64)
        variances, axes = zip(*(c._axes for c in self.components))
        return (torch.stack([c.mean.double().flatten() for c in self.components]), torch.stack(variances),
                torch.stack([eye if a is None else a for a in axes]))

    def _terms(self, x_t: Tensor, t: Tensor, cond: Condition | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of every component: log(weight_k p_k(x_t)), (B, K), -inf where the label excludes it, weights renormalised;
        the offset of x_t along its axes and its variances there, (B, K, D)."""
        means, spread, axes = self._stacked
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        offset = x_t.flatten(1)[:, None] - (alpha[:, None, None] * means).to(x_t)
        along = torch.einsum("bkd,kde->bke", offset, axes.to(x_t))
        variances = (alpha[:, None, None] ** 2 * spread + sigma[:, None, None] ** 2).to(x_t)
        densities = -0.5 * (along**2 / variances + (variances * (2 * pi)).log()).sum(2)
        prior = self.weights.log().to(x_t).expand(len(x_t), -1)
        if cond is not None and cond.label is not None:
            labels = torch.arange(len(self.components)) if self.labels is None else self.labels
            label = cond.label[:, None]
            kept = (label < 0) | (label == labels.to(label))
            if not kept.any(1).all():
                raise ValueError(f"a label is one of {sorted(set(labels.tolist()))}, or negative for all; found "
                                 f"{cond.label.tolist()}")
            prior = torch.where(kept, prior, -torch.inf).log_softmax(1)
        return prior + densities, along, variances

    def log_density(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        """log p_t(x_t | cond), (B,)."""
        return self._terms(x_t, t, cond)[0].logsumexp(1)

    def posterior(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t] and E[eps | x_t], neither by dividing by alpha or sigma."""
        means, spread, axes = self._stacked
        logits, along, variances = self._terms(x_t, t, cond)
        shares, whitened = logits.softmax(1), along / variances
        back = lambda scale: torch.einsum("bke,kde,bk->bd", whitened * scale, axes.to(x_t), shares)
        x0 = shares @ means.to(x_t) + back((self.schedule.alpha(t)[:, None, None] * spread).to(x_t))
        eps = back(like(self.schedule.sigma(t), whitened))
        return x0.reshape(x_t.shape), eps.reshape(x_t.shape)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        return _as_kind(*self.posterior(x_t, t, cond), x_t, t, self.schedule, self.kind)

    def samples(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(n, *shape) float64 draws of x_0, and the component (n,) of each."""
        which = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        drawn = torch.stack([c.samples(n, generator) for c in self.components])
        return drawn[which, torch.arange(n)], which

    def flow(self, x_t: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """In one dimension the ODE keeps quantiles: CDF_r^-1(CDF_t(x_t)), by bisection. x_t: (B, 1)."""
        if x_t.shape[1:] != (1,):
            raise ValueError("the flow of a mixture is closed in one dimension only, found shape "
                             f"{tuple(x_t.shape[1:])}")
        wanted, reach = self._cdf(x_t, t), 1e3
        low, high = torch.full_like(x_t, -reach), torch.full_like(x_t, reach)
        for _ in range(80):
            middle = (low + high) / 2
            below = self._cdf(middle, r) < wanted
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _cdf(self, x: Tensor, t: Tensor) -> Tensor:
        scores = torch.stack([c._centred(x, t) / c._variances(t).sqrt().to(x) for c in self.components])
        return (self.weights.to(x)[:, None, None] * torch.special.ndtr(scores)).sum(0)
