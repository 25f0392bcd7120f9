"""What is measured of a run while it trains: pure functions of samples, of a critic and of a log.

Samples x (P M, C, ...) are of P prompts in order, each with the same M noises; `like` are those that they are held
against, of the same shape. Shares and ratios have no unit, so one band serves points, pictures and latents.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from ..diffusion.contracts import Condition, Role
from ..diffusion.schedule import Schedule

LEVELS = (0.25, 0.5, 0.75)        # times at which a critic is asked
REACH = 1.1                       # what lies further out than so many times the farthest value is saturated
Row = dict[str, float]


def of_samples(x: Tensor, like: Tensor, prompts: int, role: str) -> Row:
    """All signals of samples, by name; those that there is nothing to tell of are left out."""
    x, like = x.double(), like.double()
    found = {"offset": offset(x, like), "spread": spread(x, like), "saturation": saturation(x, like)}
    if x[0, 0].numel() > 1:
        found["detail"] = detail(x, like)
    if len(x) > prompts:
        found["diversity"] = diversity(x, like, prompts)
    if prompts > 1 and (way := following(x, like, prompts)) is not None:
        found["following"] = way
    return {f"{name}/{role}": value for name, value in found.items()}


def offset(x: Tensor, like: Tensor) -> float:
    """How far the mean of the channels lies from that of `like`, in its deviations: 0 is right."""
    return ((_mean(x) - _mean(like)).square().mean().sqrt() / _deviation(like)).item()


def spread(x: Tensor, like: Tensor) -> float:
    """The deviation about the channels' means, over that of `like`: 1 is right."""
    return (_deviation(x) / _deviation(like)).item()


def saturation(x: Tensor, like: Tensor) -> float:
    """The share of values that lie beyond all of `like`."""
    centre = _mean(like)
    return ((x - centre).abs() > REACH * (like - centre).abs().max()).double().mean().item()


def detail(x: Tensor, like: Tensor) -> float:
    """The deviation within a sample's channels, over that of `like`: 0 where pictures are of one colour."""
    within = lambda z: z.flatten(2).std(2).mean()
    return (within(x) / within(like)).item()


def diversity(x: Tensor, like: Tensor, prompts: int) -> float:
    """The mean distance of two samples of a prompt, over that of `like`: 0 where all noises give one sample."""
    return (_apart(x, prompts) / _apart(like, prompts)).item()


def following(x: Tensor, like: Tensor, prompts: int) -> float | None:
    """The correlation of what prompts change in the mean sample with what they change in `like`: 1 is right, 0 where
    prompts are not heard, below 0 where they are taken for others. None where prompts change nothing to speak of in
    `like`."""
    own, theirs = _effects(x, prompts), _effects(like, prompts)
    if theirs.square().mean().sqrt() < 0.05 * _deviation(like):
        return None
    return (own * theirs).sum().div((own.norm() * theirs.norm()).clamp_min(1e-12)).item()


def change(x: Tensor, before: Tensor, like: Tensor) -> float:
    """How far samples of the same noises have moved, in deviations of `like`."""
    return ((x - before).double().square().mean().sqrt() / _deviation(like.double())).item()


def of_critic(critic: Role, schedule: Schedule, x: Tensor, held: Tensor | None, cond: Condition, eps: Tensor) -> Row:
    """unfit: the share of the critic's squared error at the student's samples that the best a f + b x_t + c would take
    away, f its x_0: an E[x_0 | x_t] leaves none. lag: its error at fresh samples over that at held ones, which it has
    had time to learn."""
    unfit, lag = [], []
    for level in LEVELS:
        t = torch.full((len(x),), level, dtype=torch.float64)
        x_t = schedule.add_noise(x, eps, t)
        f = critic(x_t, t, cond).x0
        error = (f - x).double().square().mean()
        if not error.isfinite():
            return {"unfit/critic": error.item()}
        columns = torch.stack([f.double().flatten(), x_t.double().flatten(),
                               torch.ones(f.numel(), dtype=torch.float64, device=f.device)], 1)
        # the normal equations, of three unknowns, once the columns are of one size
        columns = columns / columns.norm(dim=0).clamp_min(1e-12)
        weights = torch.linalg.lstsq((columns.T @ columns).cpu(), (columns.T @ x.double().flatten()).cpu()[:, None],
                                     driver="gelsd").solution
        best = (x.double().flatten() - (columns @ weights.to(columns))[:, 0]).square().mean()
        unfit.append((1 - best / error.clamp_min(1e-12)).clamp(0, 1).item())
        if held is not None:
            before = (critic(schedule.add_noise(held, eps, t), t, cond).x0 - held).double().square().mean()
            lag.append((error / before.clamp_min(1e-12)).item())
    return {"unfit/critic": sum(unfit) / len(unfit)} | ({"lag/critic": sum(lag) / len(lag)} if lag else {})


def of_terms(update: str, gradients: Mapping[str, Sequence[Tensor]]) -> Row:
    """Of the terms of an update's loss: each one's share of the norms of their gradients, and the least cosine of two
    of them."""
    flat = {name: torch.cat([g.flatten().double() for g in parts]) for name, parts in gradients.items()}
    norms = {name: g.norm().item() for name, g in flat.items()}
    whole = sum(norms.values())
    if len(flat) < 2 or not whole:
        return {}
    names = list(flat)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1:] if norms[a] and norms[b]]
    cosines = [(flat[a] @ flat[b]).item() / (norms[a] * norms[b]) for a, b in pairs]
    return ({f"share/{update}/{name}": norm / whole for name, norm in norms.items()}
            | ({f"angle/{update}": min(cosines)} if cosines else {}))


def of_logits(logits: Sequence[Tensor], slopes: Sequence[Tensor]) -> Row:
    """accuracy: the share of logits (B, ...) that are right. slopes: of the discriminator's loss in them, which is
    below 0 where the sample is real and above where it is not, or 0 where the logit is so right that no more is asked.
    variation: their deviation."""
    z, slope = (torch.cat([one.reshape(len(one), -1).mean(1) for one in some]).double() for some in (logits, slopes))
    return {"accuracy/discriminator": 1 - (z * slope > 0).double().mean().item(),
            "variation/discriminator": z.std().item()}


def of_log(rows: Sequence[Mapping[str, float]], clip: float | None) -> Row:
    """Of the steps since the last look: medians of losses and of gradient norms, the share of steps that were clipped,
    and that were left out because float16 overflowed."""
    found: Row = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        kind, _, rest = name.partition("/")
        if kind == "grad_norm":
            found[name] = median(values)
            found[f"clipped/{rest}"] = 0.0 if clip is None else sum(value > clip for value in values) / len(values)
        elif kind == "skipped":
            found[name] = sum(values) / len(values)
        elif rest and kind != "lr":
            found[f"loss/{name}"] = median(values)
    return found


def _mean(x: Tensor) -> Tensor:
    """Of each channel: (1, C, 1, ...)."""
    return x.mean([0, *range(2, x.ndim)], keepdim=True)


def _deviation(x: Tensor) -> Tensor:
    return (x - _mean(x)).square().mean().sqrt().clamp_min(1e-12)


def _apart(x: Tensor, prompts: int) -> Tensor:
    some = x.reshape(prompts, len(x) // prompts, -1)
    return torch.stack([torch.pdist(one).mean() for one in some]).mean().clamp_min(1e-12)


def _effects(x: Tensor, prompts: int) -> Tensor:
    """(P, D): each prompt's mean sample without what they have in common."""
    means = x.reshape(prompts, len(x) // prompts, -1).mean(1)
    return means - means.mean(0)
