"""The few-step sampler, read off a stock diffusers scheduler, so that what is trained is what is exported.

The scheduler is asked for its grid once (`set_timesteps`); then every evaluation of the network is a row of four: the
time the network reads, the noise level its state really has, the level it lands on, and the rule that takes it there.
"""
from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .contracts import Condition, Role
from .mixing import Mixing, mixed_rule
from .prediction import Prediction
from .readers import READERS, Evaluation
from .schedule import Schedule
from .times import trailing
from .wrapper import Wrapper

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

Draw = Callable[[int], Tensor]
SHAPING = ("num_inference_steps", "timesteps", "sigmas", "eta")     # keywords of a pipeline call that shape its sampler


@dataclass(frozen=True)
class Sampler:
    """A stock scheduler's way from noise to x_0 in `steps` steps: sampler(role, noise, cond, draw) -> x_0.

    The state is ours, alpha x_0 + sigma eps; `start` scales unit noise to the state that the stock pipeline starts
    from.
    """

    steps: int
    start: float
    evaluations: tuple[Evaluation, ...]

    @classmethod
    def of(cls, scheduler: SchedulerMixin, k: int, schedule: Schedule, *, num_inference_steps: int | None = None,
           timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None, eta: float | None = None,
           **grid: Any) -> Sampler:
        """Reads `scheduler`, which is left as it is, for `k` steps of roles under `schedule`.

        The keywords are those of the pipeline call that shape the sampler; `grid` goes to set_timesteps as it is
        (original_inference_steps, mu). eta: the share of fresh noise of a TCDScheduler, 0 where the call does not say,
        as in the pipelines. ValueError for a scheduler, a config or a k that is not served.
        """
        name = type(scheduler).__name__
        if name not in READERS:
            raise ValueError(f"no sampler reads a {name}; the schedulers that can be read are "
                             f"{', '.join(sorted(READERS))}")
        if eta is not None and (name != "TCDScheduler" or not 0 <= eta <= 1):
            raise ValueError(f"eta is read with a TCDScheduler alone, and is from 0 to 1; found {eta:g} with a {name}")
        counts = {"k": k, "num_inference_steps": num_inference_steps, "len(timesteps)": timesteps and len(timesteps),
                  "len(sigmas)": sigmas and len(sigmas)}
        found = {key: value for key, value in counts.items() if value is not None}
        if k < 1 or len(set(found.values())) > 1:
            raise ValueError(f"a sampler takes at least 1 step, and one number of them, found {found}")
        scheduler = copy.deepcopy(scheduler)
        asked = {"timesteps": timesteps} if timesteps is not None else {"sigmas": sigmas, "num_inference_steps": k}
        asked = {key: value for key, value in {**asked, **grid}.items() if value is not None}
        try:
            scheduler.set_timesteps(**asked)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} does not serve {asked}: {error}") from error
        read = READERS[name] if eta is None else partial(READERS[name], eta=eta)
        start, evaluations = read(scheduler, schedule)
        return cls(k, start, tuple(evaluations))

    @classmethod
    def of_call(cls, scheduler: SchedulerMixin, k: int, schedule: Schedule, call: Mapping[str, Any]) -> Sampler:
        """As `of`, from all keyword arguments of a pipeline call: those that do not shape the sampler are passed
        over."""
        return cls.of(scheduler, k, schedule, **{key: call[key] for key in SHAPING if key in call})

    def telling(self, role: Role) -> Role:
        """The role as this sampler calls a flow map: cond.r says where the step from each of its times lands."""
        return _Landing(role, self)

    def fitted(self, role: Role) -> Sampler:
        """As this role is sampled: with the shares of one that has a solver of its own, as they are now.

        ValueError for a sampler of another number of steps, and for one that adds fresh noise, beside which an output
        that was made of other noise says nothing.
        """
        if not isinstance(role, Mixing):
            return self
        if self.stochastic or len(role.shares) != self.nfe - 1:
            raise ValueError(f"this solver has shares for {len(role.shares) + 1} steps that add no noise; found "
                             f"{self.nfe} steps" + " with fresh noise" * self.stochastic)
        first, *others = self.evaluations
        rules = [partial(mixed_rule, share=share, output=role.output) for share in role.shares.tolist()]
        return replace(self, evaluations=(first, *(replace(e, rule=rule) for e, rule in zip(others, rules))))

    @property
    def times(self) -> Tensor:
        """The time that the network reads at each evaluation, as t: (nfe,) float64."""
        return torch.tensor([e.time for e in self.evaluations], dtype=torch.float64)

    @property
    def levels(self) -> Tensor:
        """Where the state is at each evaluation, as t: (nfe,) float64."""
        return torch.tensor([e.level for e in self.evaluations], dtype=torch.float64)

    @property
    def landings(self) -> Tensor:
        """Where the step from each evaluation lands, as t: (nfe,) float64."""
        return torch.tensor([e.landing for e in self.evaluations], dtype=torch.float64)

    def doubled(self, schedule: Schedule) -> Tensor:
        """Its times, and where its last step lands, with one more between any two: (2 nfe + 1,) float64, descending.

        On discrete nodes those between are rounded to one, halves to even, as stock schedulers round.
        """
        own, middle = torch.cat([self.times, self.landings[-1:]]), trailing(2 * self.nfe, schedule)[1::2]
        return torch.cat([torch.stack([own[:-1], middle], 1).flatten(), own[-1:]])

    @property
    def nfe(self) -> int:
        """Network evaluations of one sample, a guided one counted once."""
        return len(self.evaluations)

    @property
    def stochastic(self) -> bool:
        return any(e.noisy for e in self.evaluations)

    def __call__(self, role: Role, noise: Tensor, cond: Condition | None = None, draw: Draw | None = None) -> Tensor:
        """noise: (B, ...) unit normal; draw(i): fresh noise of that shape after evaluation i, asked for in order."""
        return self.rollout(role, noise, self.nfe, cond, draw)

    def rollout(self, role: Role, noise: Tensor, until: int, cond: Condition | None = None,
                draw: Draw | None = None) -> Tensor:
        """The state that evaluation `until` would be given, at times[until]; until = nfe is the sample.

        ValueError for an evaluation that the sampler has not.
        """
        if not 0 <= until <= self.nfe:
            raise ValueError(f"a sampler of {self.nfe} evaluations cannot be rolled out to evaluation {until}: 0 to "
                             f"{self.nfe} exist")
        return next(islice(self.states(role, noise, cond, draw), until, None))

    def states(self, role: Role, noise: Tensor, cond: Condition | None = None,
               draw: Draw | None = None) -> Iterator[Tensor]:
        """The state that each evaluation is given, one after another, and the sample: nfe + 1 of them. What is not
        asked for is not computed."""
        if self.stochastic and draw is None:
            raise ValueError("this sampler is stochastic: pass draw(i), which gives the noise to add after "
                             "evaluation i")
        x, history = self.start * noise, []
        yield x
        for i, e in enumerate(self.evaluations):
            history = [*history[-1:], self._predict(role, x, e, cond)]
            x = e.rule(history, _times(e.landing, x), draw(i) if e.noisy else None)
            yield x

    def simulate(self, role: Role, noise: Tensor, exit: int, cond: Condition | None = None,
                 draw: Draw | None = None) -> Tensor:
        """Backward simulation: the clean sample that evaluation `exit` predicts where the sampler itself arrives.

        Yin et al. 2024, arXiv:2405.14867, section 4.5. Gradients flow through the last evaluation alone. exit from 0 to
        nfe - 1; the prediction at exit = nfe - 1 is the sample, where the last landing is the data.
        """
        if not 0 <= exit < self.nfe:
            raise ValueError(f"a sampler of {self.nfe} evaluations cannot be left at evaluation {exit}: 0 to "
                             f"{self.nfe - 1} exist")
        with torch.no_grad():
            x = self.rollout(role, noise, exit, cond, draw)
        return self._predict(role, x, self.evaluations[exit], cond).x0

    def predict(self, role: Role, x: Tensor, i: Tensor, cond: Condition | None = None) -> Prediction:
        """What the role says at the evaluation of each sample, i (B,) int64, in the states x (B, ...) that these are
        given."""
        return replace(role(x, self.times[i], cond), t=self.levels[i])

    def _predict(self, role: Role, x: Tensor, e: Evaluation, cond: Condition | None) -> Prediction:
        return replace(role(x, _times(e.time, x), cond), t=_times(e.level, x))


@dataclass(frozen=True)
class _Landing(Wrapper):
    """See `Sampler.telling`."""

    sampler: Sampler

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        if cond is None:
            raise ValueError("the time where a step lands goes into a condition, and there is none")
        nearest = (t.cpu()[:, None] - self.sampler.times).abs().argmin(1)
        return self.role(x_t, t, cond.replace(r=self.sampler.landings[nearest]))


def _times(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float64)
