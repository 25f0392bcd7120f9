"""The student's own samples and states in training: backward simulation, with one law of exits for everyone who
asks."""
from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from .contracts import Condition, Role
from .draws import Step
from .guidance import with_scale
from .prediction import Prediction
from .sampler import Draw, Sampler
from .times import LEVELS

MIDWAY = 1e-6                      # of a timestep: the last bit of a product does not say which of two times is nearer


def rollout(sampler: Sampler, role: Role, cond: Condition, step: Step, shape: tuple[int, ...]) -> Tensor:
    """x_0 as `role` predicts it at a random evaluation of its own sampler: (B, *shape), float32.

    It begins in noise and sees no data. The exit is uniform over the evaluations and equal on all ranks and
    micro-batches, so that all take as long; student, critic and discriminator draw it by this same law. Gradients flow
    through the last evaluation alone. shape: of one sample.
    """
    return sampler.simulate(role, step.normal("start", shape), left_by(sampler, step), cond, renoising(step, shape))


@torch.no_grad()
def way(sampler: Sampler, role: Role, cond: Condition, step: Step, shape: tuple[int, ...]) -> Tensor:
    """The states that the evaluations of `role`'s own sampler are given, (nfe, B, *shape).

    It begins in noise and sees no data. All samples go on to the last evaluation, so that all ranks take as long.
    shape: of one sample.
    """
    on_the_way = sampler.states(role, step.normal("start", shape), cond, renoising(step, shape))
    return torch.stack(list(islice(on_the_way, sampler.nfe)))


def stopped(sampler: Sampler, role: Role, cond: Condition, states: Tensor, exit: Tensor) -> tuple[Prediction, Tensor]:
    """What `role` predicts at an evaluation of its own `way`, exit (B,) int64 on the CPU, from 0, and where the step
    from there lands, r (B,) float64.

    `ddim_step(prediction, s)` is the student's own state at any s from r up to prediction.t, made of the x_0 and the
    eps of this prediction, through which alone gradients flow.
    """
    x = states[exit.to(states.device), torch.arange(len(exit), device=states.device)]
    return sampler.predict(role, x, exit, cond), sampler.landings[exit]


def renoising(step: Step, shape: tuple[int, ...]) -> Draw:
    """The noise that a rollout of this step adds after each of its evaluations."""
    return lambda i: step.normal(f"renoise {i}", shape)


def left_by(sampler: Sampler, step: Step) -> int:
    """The evaluation that `rollout` of this step leaves by, from 0."""
    return int(step.shared("exit") * sampler.nfe)


def below_exit(sampler: Sampler, step: Step, share: Tensor) -> Tensor:
    """Noise levels of what is not yet settled where `rollout` of this step leaves: (B,) float64, on the stock times.

    share: (B,) in [0, 1], of the level of the state at that exit. What lies midway of two times goes to the lower.
    """
    return (LEVELS * sampler.levels[left_by(sampler, step)] * share - MIDWAY).round().clamp(min=1) / LEVELS


def with_exit(cond: Condition, sampler: Sampler, step: Step) -> Condition:
    """The condition with this step's exit, counted from 1, in the place of a guidance scale: for a critic that learns
    every exit's law.

    A critic that does not read it learns the mixture of them all, which can be right where none of them is.
    """
    return with_scale(cond, 1.0 + left_by(sampler, step))
