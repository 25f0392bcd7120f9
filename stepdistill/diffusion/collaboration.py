"""A schedule of roles for sampling: at which evaluation the student is asked and at which its teacher, at which
guidance scale, what becomes of x_0, and where one hands over to the other. Nothing is trained.

Each system below is a row of turns, made of the student's own sampler. A turn is an evaluation of that sampler or one
of the teacher's, so a few-step sampler is itself a schedule in which all turns are the student's.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import RequestError
from .contracts import Condition, Role
from .flow_map import ddim_step
from .guidance import guided
from .prediction import Prediction
from .readers import MULTISTEP, Evaluation, Rule
from .sampler import Draw, Sampler
from .schedule import Schedule, VariancePreserving, where
from .times import LEVELS

Judge = Callable[[Tensor], Tensor]                  # x_0 (B, ...) -> (B,) bool, those that go back to the teacher


@dataclass(frozen=True)
class Turn:
    """One evaluation: whose it is, at which guidance scale (1 is none), and where the rule takes the state.

    back: the judge sees where this turn lands; samples that it sends back are noised anew to this time, and the turns
    that follow are theirs alone. None: no judge.
    """

    role: Literal["student", "teacher"]
    scale: float
    evaluation: Evaluation
    back: float | None = None

    @property
    def passes(self) -> int:
        """Network evaluations of one sample: a guided turn takes two."""
        return 1 if self.scale == 1 else 2

    @property
    def noisy(self) -> bool:
        """Whether it takes fresh noise."""
        return self.evaluation.noisy or self.back is not None

    @property
    def words(self) -> str:
        """Of one row of a sheet."""
        guidance = "" if self.scale == 1 else f", w = {self.scale:g}"
        return f"{self.role}{guidance}, t = {self.evaluation.level:.3g}"


@dataclass(frozen=True)
class Collaboration:
    """Turns from noise to x_0: together(student, teacher, noise, cond, draw) -> x_0. start scales unit noise, as of
    `Sampler`."""

    start: float
    turns: tuple[Turn, ...]

    def nfe(self, sent_back: float = 1.0) -> float:
        """Network evaluations of one sample, of both networks, a guided one counted twice. sent_back: the share of
        samples that the judge sends back."""
        judged = next((i for i, turn in enumerate(self.turns) if turn.back is not None), len(self.turns))
        return sum(turn.passes * (sent_back if i > judged else 1) for i, turn in enumerate(self.turns))

    def __call__(self, student: Role, teacher: Role, noise: Tensor, cond: Condition | None = None,
                 draw: Draw | None = None, judge: Judge | None = None) -> Tensor:
        """noise: (B, ...) unit normal; draw(i): fresh noise of that shape after turn i, asked for in order. Networks
        are asked for all samples at every turn; a course keeps what a judge did not send back."""
        course, x = Course(self, judge), self.start * noise
        for i, turn in enumerate(self.turns):
            e = turn.evaluation
            role = guided(teacher, turn.scale) if turn.role == "teacher" else student
            p = role(x, torch.full((len(x),), e.time, dtype=torch.float64), cond)
            x = course.take(replace(p, t=torch.full((len(x),), e.level, dtype=torch.float64)),
                            draw(i) if turn.noisy else None)
        return x


class Course:
    """One sampling on its way: told what the network of each turn says, it says which state comes next.

    Our sampler and the scheduler in a stock pipeline both go by it. x0: what each turn so far made of the picture,
    (B, ...) each. chosen: the samples that were sent back, (B,) bool, None before anything was judged.
    """

    def __init__(self, together: Collaboration, judge: Judge | None = None) -> None:
        if judge is None and any(turn.back is not None for turn in together.turns):
            raise RequestError("this schedule sends some samples back to the teacher, and nothing says which: pass a "
                               "judge")
        self.together, self.judge = together, judge
        self.history: list[Prediction] = []
        self.x0: list[Tensor] = []
        self.chosen: Tensor | None = None

    @property
    def turn(self) -> Turn:
        """The one to come."""
        return self.together.turns[len(self.x0)]

    def take(self, p: Prediction, noise: Tensor | None) -> Tensor:
        """The state after this turn. p: what its network says of the state before, at that state's level."""
        turn, x = self.turn, p.x_t
        landing = torch.full((len(x),), turn.evaluation.landing, dtype=torch.float64)
        self.history = [*self.history[-1:], p]
        landed = turn.evaluation.rule(self.history, landing, noise if turn.evaluation.noisy else None)
        if self.chosen is not None:                      # the others are done, and stay as they are
            self.x0.append(where(self.chosen, p.x0, x))
            return where(self.chosen, landed, x)
        self.x0.append(p.x0)
        if turn.back is None:
            return landed
        self.chosen = self.judge(landed)
        back = torch.full((len(x),), turn.back, dtype=torch.float64)
        return where(self.chosen, p.schedule.start(landed, noise, back), landed)


# Rules ---------------------------------------------------------------------------------------------------------------
def _ode(history: list[Prediction], r: Tensor, noise: Tensor | None) -> Tensor:
    return ddim_step(history[-1], r)


def _renoised(history: list[Prediction], r: Tensor, noise: Tensor | None) -> Tensor:
    return history[-1].schedule.add_noise(history[-1].x0, noise, r)


def _nudged(history: list[Prediction], r: Tensor, noise: Tensor | None, weight: float, rule: Rule) -> Tensor:
    """The student's own rule from its own state, believing in an x_0 between its own and the teacher's."""
    student, teacher = history
    x0 = student.x0 + weight * (teacher.x0 - student.x0)
    return rule([replace(student, raw=x0, kind="x0")], r, noise)


# Systems -------------------------------------------------------------------------------------------------------------
def alone(student: Sampler) -> Collaboration:
    """The student's own sampler."""
    return Collaboration(student.start, tuple(Turn("student", 1.0, e) for e in student.evaluations))


def diversity(student: Sampler, schedule: Schedule, guidance: float, teacher_steps: int = 1,
              handover: int = 1) -> Collaboration:
    """Gandikota & Bau 2025, arXiv:2503.10637: a distilled model decides on too few pictures in its first step, so the
    teacher takes that step, by its ODE, and the student goes on from there.

    handover: the student's evaluation from which it takes over, 0 for the student alone, as many as it has for the
    teacher alone; teacher_steps: of even length in t, on whole nodes of a discrete schedule. The paper hands over at
    the time of the teacher's own grid that lies nearest; here its last step lands on the student's, and nothing is
    noised anew.
    """
    _single(student)
    count = student.nfe
    _require(0 <= handover <= count, f"the student takes over at one of its evaluations 0 to {count - 1}, or at "
             f"{count} not at all; found handover = {handover}")
    if handover == 0:
        return alone(student)
    end = 0.0 if handover == count else student.evaluations[handover].level
    _check_times(schedule, student.evaluations[0].level, student.evaluations[handover - 1].landing, teacher_steps)
    first = _teachers(schedule, student.evaluations[0].level, end, teacher_steps, guidance)
    return Collaboration(1.0, first + alone(student).turns[handover:])


def distillation_pp(student: Sampler, schedule: Schedule, guidance: float, weight: float = 0.1,
                    guided_steps: int = 1) -> Collaboration:
    """Distillation++, Park, Lee & Ye, ICCV 2025, arXiv:2412.08871: in its first steps the student's x_0 is noised
    anew, the teacher denoises it with guidance, and the student goes on from x_0 + weight (x_0 of the teacher - x_0).

    That is a step of score distillation, taken on the picture instead of on weights. x_0 is noised to where the
    student's step lands. Written from the paper's abstract, for its code is not to be had: the default weight, a small
    one, is ours (figures: docs/with_teacher.md). guided_steps: how many of the student's steps, from the first one.
    """
    _single(student)
    _require(1 <= guided_steps < student.nfe, "the teacher looks at an x_0 that goes on to another step, so it helps "
             f"in 1 to {student.nfe - 1} of {student.nfe} steps; found guided_steps = {guided_steps}")
    turns: list[Turn] = []
    for i, e in enumerate(student.evaluations):
        if i >= guided_steps:
            turns.append(Turn("student", 1.0, e))
            continue
        then = Evaluation(_node(schedule, e.landing), e.landing, e.landing,
                          partial(_nudged, weight=weight, rule=e.rule), e.noisy)
        turns += [Turn("student", 1.0, replace(e, rule=_renoised, noisy=True)), Turn("teacher", float(guidance), then)]
    return Collaboration(student.start, tuple(turns))


def adaptive(student: Sampler, schedule: Schedule, guidance: float, teacher_steps: int = 4,
             strength: float = 0.4) -> Collaboration:
    """Starodubcev et al., CVPR 2024, arXiv:2312.10835: many pictures of a student are better than the teacher's, so
    only those that a judge finds poor are noised anew and finished by the teacher.

    strength: the time from which it denoises them; at 1 that is a fresh picture of its own. The paper's judge is a
    percentile of a score of the student's pictures (`sent_back`); its code goes through pixels, here latents are kept.
    """
    _single(student)
    *before, last = alone(student).turns
    strength = _node(schedule, strength)
    _check_times(schedule, strength, 0.0, teacher_steps)
    after = _teachers(schedule, strength, 0.0, teacher_steps, guidance)
    return Collaboration(student.start, (*before, replace(last, back=strength), *after))


SYSTEMS: Mapping[str, Callable[..., Collaboration]] = {"diversity": diversity, "distillation_pp": distillation_pp,
                                                       "adaptive": adaptive}
# of their options, whatever the student is
LIMITS = {"teacher_steps": (1, LEVELS), "handover": (0, LEVELS), "weight": (0, 1), "guided_steps": (1, LEVELS),
          "strength": (1 / LEVELS, 1)}
PAPERS = {"diversity": "2503.10637", "distillation_pp": "2412.08871", "adaptive": "2312.10835"}


def system(name: str, student: Sampler, schedule: Schedule, guidance: float, **options: Any) -> Collaboration:
    """A system by its name. guidance: the teacher's scale. RequestError for an unknown name or option, and for values
    that it does not take."""
    if name not in SYSTEMS:
        raise RequestError(f"there is no system {name!r} of sampling with the teacher: there are "
                           f"{', '.join(SYSTEMS)}")
    check_options(name, guidance, options)
    return SYSTEMS[name](student, schedule, guidance, **options)


def check_options(name: str, guidance: float, options: Mapping[str, Any]) -> None:
    """RequestError for a scale of the teacher, and for options of a system, that are none whatever the student is."""
    _require(1 <= guidance < float("inf"), f"the teacher's guidance scale is at least 1, which is none; found "
             f"{guidance:g}")
    known = options_of(name)
    if unknown := sorted(options.keys() - known.keys()):
        raise RequestError(f"{name} has no option {', '.join(unknown)}: it has {', '.join(known)}")
    for key, value in options.items():
        whole = isinstance(known[key], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise RequestError(f"{key} of {name} is a {'whole ' * whole}number, such as {known[key]}; found {value!r}")
        low, high = LIMITS[key]
        _require(low <= value <= high, f"{key} of {name} is from {low:g} to {high:g}; found {key} = {value:g}")


def options_of(name: str) -> dict[str, int | float]:
    """The options of a system, with their defaults."""
    taken = inspect.signature(SYSTEMS[name]).parameters
    return {key: one.default for key, one in taken.items() if one.default is not one.empty}


def sent_back(scores: Tensor, share: float) -> float:
    """The score below which this share of samples lies: scores (n,) of a student's pictures. With `score < sent_back`
    as the judge, that share of them goes back to the teacher; of ties, none."""
    _require(0 <= share <= 1, f"a share of samples is from 0 to 1; found {share:g}")
    ordered, count = scores.double().sort().values, round(share * len(scores))
    return ordered[count].item() if count < len(scores) else float("inf")


def _teachers(schedule: Schedule, high: float, low: float, steps: int, guidance: float) -> tuple[Turn, ...]:
    """The teacher's ODE from the time `high` down to `low`, in even steps."""
    inner = [_node(schedule, high + (low - high) * i / steps) for i in range(1, steps)]
    times = [high, *inner, low]
    return tuple(Turn("teacher", float(guidance), Evaluation(_node(schedule, t), t, r, _ode))
                 for t, r in zip(times, times[1:], strict=False))


def _check_times(schedule: Schedule, high: float, low: float, steps: int) -> None:
    """RequestError for more steps of the teacher than a discrete schedule has times."""
    most = round((high - low) * schedule.nodes) if isinstance(schedule, VariancePreserving) else LEVELS
    _require(steps <= most, f"the teacher has {most} times from t = {high:.3g} to {low:.3g}, and takes a step from "
             f"each at most; found teacher_steps = {steps}")


def _node(schedule: Schedule, t: float) -> float:
    """The nearest time that a network has learned: of a discrete schedule a node."""
    return max(1, round(t * schedule.nodes)) / schedule.nodes if isinstance(schedule, VariancePreserving) else t


def _single(student: Sampler) -> None:
    """RequestError for a sampler whose steps look back at earlier evaluations: those would be another role's."""
    if looking_back := [e.rule for e in student.evaluations if e.rule in MULTISTEP]:
        raise RequestError(f"the student's scheduler steps by {looking_back[0].__name__.strip('_')}, which looks back "
                           "at an earlier evaluation, where the teacher's would be: give it one whose steps stand "
                           "alone, such as LCMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise RequestError(message)
