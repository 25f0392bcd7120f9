"""What a distillation method is: the roles it needs, and a list of updates over them."""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Callable, ClassVar, Mapping

from torch import Tensor

from ..diffusion.contracts import Batch, Role
from ..diffusion.draws import Step

Losses = dict[str, Tensor]        # scalars; their sum is the objective, each is logged under its name


@dataclass(frozen=True)
class Frozen:
    """The teacher: never trained."""


@dataclass(frozen=True)
class Trained:
    """A role that updates train: an adapter on the network of `start`, or a copy of it, which it equals at first."""

    start: str = "teacher"


@dataclass(frozen=True)
class Follows:
    """The running average of another role after each of its updates: x <- decay x + (1 - decay) leader."""

    leader: str
    decay: float


Need = Frozen | Trained | Follows


@dataclass(frozen=True)
class Update:
    """Train these roles, and only these, on this loss."""

    trains: tuple[str, ...]
    loss: Callable[[Batch, Step], Losses]
    every: int = 1                # run on steps divisible by `every`
    repeat: int = 1               # optimizer steps, each on a fresh batch, per run

    @property
    def name(self) -> str:
        return "+".join(self.trains)

    def due(self, step: int) -> bool:
        return step % self.every == 0


@dataclass(frozen=True)
class Inference:
    """How a student is sampled: a stock scheduler and the literal keyword arguments of the pipeline call.

    `scheduler` names a class of diffusers; `config` is changed on top of the teacher's own scheduler config.
    """

    scheduler: str
    config: Mapping[str, Any]
    call: Mapping[str, Any]


class Method(ABC):
    """Subclasses are final: one file, one paper, no method inherits from another method.

    A method sees its roles as callables only, so that the same file runs on a closed-form denoiser, a full network
    and an adapter. `settings` is the method's own frozen dataclass, `guidance` the recipe's: a scale, a range of
    scales, or None for a teacher without guidance.
    """

    Settings: ClassVar[type]
    data: ClassVar[tuple[str, ...]]               # what it can train on: "images", "prompts"

    def __init__(self, settings: Any, roles: Mapping[str, Role], guidance: float | tuple[float, float], steps: int) -> None:
        self.settings, self.roles, self.guidance, self.steps = settings, roles, guidance, steps

    @classmethod
    @abstractmethod
    def needs(cls, settings: Any, full: bool) -> dict[str, Need]:
        """Role name -> what it is. `full`: the student trains all its weights rather than an adapter."""

    @classmethod
    @abstractmethod
    def inference(cls, settings: Any, steps: int, schedule: str) -> Inference:
        """The stock scheduler that serves `steps` evaluations. schedule: "vp" or "flow". ValueError if none does."""

    @abstractmethod
    def updates(self) -> list[Update]: ...
