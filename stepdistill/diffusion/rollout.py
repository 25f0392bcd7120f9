"""The student's own samples in training: backward simulation, with one law of exits for everyone who asks."""
from __future__ import annotations

from torch import Tensor

from .contracts import Condition, Role
from .draws import Step
from .sampler import Sampler


def rollout(sampler: Sampler, role: Role, cond: Condition, step: Step, shape: tuple[int, ...]) -> Tensor:
    """x_0 as `role` predicts it at a random evaluation of its own sampler: (B, *shape), float32.

    It begins in noise and sees no data. The exit is uniform over the evaluations and equal on all ranks and
    micro-batches, so that all take as long; student, critic and discriminator draw it by this same law. Gradients flow
    through the last evaluation alone. shape: of one sample.
    """
    exit = int(step.shared("exit") * sampler.nfe)
    return sampler.simulate(role, step.normal("start", shape), exit, cond, lambda i: step.normal(f"renoise {i}", shape))
