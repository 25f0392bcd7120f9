"""How a few-step generator is called best: a race of calls, by the distance of its pictures to those of its base at its
ease, or to real ones.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all calls with few pictures, the best few of each
number of steps with more, and the best of these with as many as their figures need. No real pictures are wanted: the
reference is the base's own, in many steps at its good guidance, unless there are real ones.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..diffusion.schedule import RectifiedFlow
from ..diffusion.times import LEVELS
from ..evaluation.estimate import Estimate, around
from ..evaluation.fd import Moments, Reference, frechet_infinity, slopes, too_few
from ..evaluation.features import Features
from ..evaluation.kernels import kid, kid_slopes
from ..evaluation.means import clip_score
from ..evaluation.plans import Plan, Target
from ..methods.base import Inference
from ..models.schedulers import is_flow, stock_scheduler
from ..models.teacher import Teacher

STEPS = (1, 2, 4, 8)
GRID = ("original_inference_steps", "shift")
SCALES = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)     # of a LoRA whose alpha may be lost
# of one step from unit noise: Yin et al. 2024, arXiv:2405.14867; Zhou et al. 2024, arXiv:2404.04057
STARTS = (0.4, 0.625)
# of LCM-LoRAs; of TCD's (arXiv:2402.19159); of flows of large pictures
COARSE_NODES, TCD_NOISE, SHIFT = 50, 0.3, 3.0
FIRST, SECOND, THIRD = 32, 120, 500               # pictures of a call in the rounds before the last
KEPT, WIDE, LAST = 4, 8, 4                        # calls of a number of steps in the second round; of all in the
                                                  # third and in the last
GAIN = 0.2                                        # share of its distance by which a base is to be beaten
# by how much of the best figure a call of fewer evaluations may be worse
SLACK = 0.05


@dataclass(frozen=True, eq=False)
class Way:
    """A way to call a generator: a stock scheduler and the literal keyword arguments of the pipeline's call.

    nfe: network evaluations of a picture; guidance: 1 is none; scale: of the LoRA, 0 the base. inference: the same in
    words of the mathematics, from which its neighbours are made; None of one that somebody else spelled.
    """

    scheduler: SchedulerMixin
    call: Mapping[str, Any]
    nfe: int
    steps: int
    guidance: float = 1.0
    scale: float = 1.0
    inference: Inference | None = None

    @property
    def drawn_by(self) -> tuple[SchedulerMixin, str, float]:
        """All that its pictures depend on: ways that agree in it draw the same."""
        return self.scheduler, repr(self.call), self.scale

    def __str__(self) -> str:
        call = ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
                         for name, value in self.call.items())
        grid = ", ".join(f"{name}={value:g}" for name, value in self.grid.items())
        weight = "" if self.scale == 1 else f", LoRA weight {self.scale:g}"
        return f"{type(self.scheduler).__name__}({grid}), {call}{weight}"

    @property
    def grid(self) -> dict[str, float]:
        """What of the scheduler's config says where its steps lie."""
        return {name: self.scheduler.config[name] for name in GRID if name in self.scheduler.config}


@dataclass(frozen=True)
class Judged:
    """A way with its figures over so many samples. distance: "fd", or "kid" where these are too few for that; nearer is
    better.

    slopes: the derivatives of the figure towards each of its samples (n,) and towards each picture of the reference
    (m,).
    """

    way: Way
    samples: int
    distance: str
    figure: Estimate
    slopes: tuple[Tensor, Tensor]
    clip_score: float | None = None

    def beats(self, other: Judged) -> bool:
        """Whether it is nearer to the reference beyond chance, as `apart` counts that. other: measured by the same
        figure."""
        return self.apart(other).high < 0

    def apart(self, other: Judged) -> Estimate:
        """The difference of the figures. Both drew for the same prompts from the same noise, and share the reference:
        what is common to them cancels, which their own intervals do not show."""
        if (self.distance, self.samples) != (other.distance, other.samples):
            raise ValueError(f"{self.distance} of {self.samples} samples is not held against {other.distance} of "
                             f"{other.samples}")
        variance = sum((mine - theirs).var().item() / len(mine)
                       for mine, theirs in zip(self.slopes, other.slopes, strict=True))
        return around(self.figure.value - other.figure.value, variance)

    @property
    def plain(self) -> dict[str, Any]:
        way = self.way
        return {"scheduler": type(way.scheduler).__name__, "grid": way.grid, "call": dict(way.call), "steps": way.steps,
                "nfe": way.nfe,
                "guidance": way.guidance, "scale": way.scale, "samples": self.samples,
                **self.figure.named(self.distance),
                "clip_score": self.clip_score}


@dataclass(frozen=True)
class Found:
    """best: of the last round, the call of fewest evaluations that is as good as any. last: all of that round, the
    nearest first; second: those of the round before, with fewer pictures. claimed: what was said of the generator, None
    where nothing was."""

    best: Judged
    last: tuple[Judged, ...]
    second: tuple[Judged, ...]
    claimed: Judged | None = None

    @property
    def believed(self) -> Judged:
        """The claim, unless its call is worse than the best beyond chance."""
        return self.best if self.claimed is None or self.best.beats(self.claimed) else self.claimed


Measure = Callable[[Way, int], Judged]


def find_call(ways: Sequence[Way], measure: Measure, near: Callable[[Way], Sequence[Way]] = lambda way: (),
              samples: int = 2000, claimed: Way | None = None, twin: Callable[[Way], Way] | None = None,
              told: float | None = None, say: Callable[[str], None] = lambda text: None) -> Found:
    """The best of `ways`, of the neighbours of the best of them, and of what is claimed.

    measure(way, n): of n samples, of which the first are those that fewer would be; so that nothing is drawn but what
    it draws, the same call gives the same. near: ways that differ from one in what matters less, such as guidance,
    asked of the leaders alone. samples: of a way in the last round. told: the scale that is likely, whose ways all come
    into the second round, since few pictures tell little.
    """
    first, second, third = (min(count, samples) for count in (FIRST, SECOND, THIRD))
    say(f"first round: {len(ways)} calls, {first} pictures each")
    coarse = [measure(way, first) for way in sorted(ways, key=lambda way: way.scale)]
    kept = [one.way for group in _by_steps(coarse) for place, one in enumerate(group)
            if place < KEPT or one.way.scale == told]
    say(f"second round: {len(kept)} calls and what is near to the best of them, {second} pictures each")
    finer = [measure(way, second) for way in kept]
    leaders = _in_reach([group[0] for group in _by_steps(finer)])
    finer = _different([*finer, *(measure(way, second) for leader in leaders for way in near(leader.way))])
    alike = None if twin is None else lambda one: measure(twin(one.way), second)
    chosen = _finalists(finer, WIDE) if alike is None else _sound(finer, alike)
    say(f"third round: {len(chosen)} calls, {third} pictures each")
    chosen = [one.way for one in _finalists([measure(one.way, third) for one in chosen], LAST)]
    say(f"last round: {len(chosen)} calls{'' if claimed is None else ' and the one that is claimed'}, {samples} "
        "pictures each")
    last = sorted((measure(way, samples) for way in chosen), key=_order)
    said = None if claimed is None else measure(claimed, samples)
    return Found(_cheapest(last), tuple(last), tuple(sorted(finer, key=_order)), said)


def leaders(second: Iterable[Judged], nfe: Iterable[int] = STEPS) -> list[Judged]:
    """The nearest of each of these numbers of network evaluations, as far as there are some."""
    second = list(second)
    groups = ([one for one in second if one.way.nfe == count] for count in nfe)
    return [min(group, key=_order) for group in groups if group]


def gains(second: Iterable[Judged], base: Iterable[Judged]) -> list[int]:
    """The numbers of network evaluations at which the nearest way is better than everything that the base does with as
    many, by GAIN of its distance and beyond chance: none for what is no few-step generator. base: measured as the ways
    were."""
    base = list(base)
    found = []
    for one in leaders(second, sorted({other.way.nfe for other in base})):
        plain = [other for other in base if other.way.nfe == one.way.nfe]
        if all(one.apart(other).high < -GAIN * max(other.figure.value, 0.0) for other in plain):
            found.append(one.way.nfe)
    return found


def _order(one: Judged) -> float:
    return one.figure.value


def _by_steps(judged: Iterable[Judged]) -> list[list[Judged]]:
    """Those of each number of steps, the nearest first."""
    groups: dict[int, list[Judged]] = {}
    for one in sorted(judged, key=_order):
        groups.setdefault(one.way.steps, []).append(one)
    return [groups[steps] for steps in sorted(groups)]


def _different(judged: Iterable[Judged]) -> list[Judged]:
    """The first of those that drew the same pictures: two grids may name the same timesteps."""
    found: list[Judged] = []
    for one in judged:
        if not any(one.figure == other.figure and torch.equal(one.slopes[0], other.slopes[0]) for other in found):
            found.append(one)
    return found


def _in_reach(judged: Sequence[Judged]) -> list[Judged]:
    """Those that none of the others beats."""
    best = min(judged, key=_order)
    return [one for one in judged if not best.beats(one)]


def _finalists(finer: Sequence[Judged], room: int) -> list[Judged]:
    """The nearest of each number of steps that is in reach, and more of those in reach while there is room."""
    leaders = _in_reach([group[0] for group in _by_steps(finer)])
    others = [one for one in sorted(_in_reach(finer), key=_order) if one not in leaders]
    return sorted(leaders + others[:max(0, room - len(leaders))], key=_order)


def _sound(finer: Sequence[Judged], alike: Callable[[Judged], Judged]) -> list[Judged]:
    """The finalists of those that beat the base called alike; of all where none does."""
    left, sound = list(finer), set()
    while left:
        finalists = _finalists(left, WIDE)
        asked = [one for one in finalists if one.way not in sound]
        if not asked:
            return finalists
        good = {one.way for one in asked if one.beats(alike(one))}
        sound |= good
        left = [one for one in left if one.way in good or one not in asked]
    return _finalists(finer, WIDE)


def _cheapest(last: Sequence[Judged]) -> Judged:
    """Of those within SLACK of the nearest the one of fewest evaluations; of several the one whose pictures fit their
    prompts best."""
    best = min(last, key=_order).figure.value
    good = [one for one in last if one.figure.value <= best + SLACK * abs(best)]
    return min(good, key=lambda one: (one.way.nfe, -(one.clip_score or 0.0), one.figure.value))


# -- ways ------------------------------------------------------------------------------------------------------------

def first_ways(teacher: Teacher, scales: Sequence[float] = (1.0,), steps: Sequence[int] = STEPS,
               guidance: float = 1.0) -> list[Way]:
    """The calls that few-step generators on this teacher's noise are made for: fresh noise in each step, or none.

    One step is the same of both; on a discrete schedule it may begin below pure noise too. guidance: the base's scale,
    which only a network that reads it is given at first.
    """
    w = guidance if teacher.guidance.within else 1.0
    starts = () if isinstance(teacher.schedule, RectifiedFlow) else STARTS
    told = ([Inference(1, noise=1.0, times=times) for times in (None, *((start,) for start in starts))]
            if 1 in steps else [])
    told += [Inference(k, noise=noise) for k in steps if k > 1 for noise in (1.0, 0.0)]
    return [way for scale in scales for inference in told if (way := way_of(teacher, inference, w, scale)) is not None]


def near_ways(teacher: Teacher, way: Way, guidance: float) -> list[Way]:
    """What is worth a try beside a good call: the base's guidance or none, and another grid or share of noise."""
    told = way.inference
    if told is None:
        return []
    found = [(told, guidance if way.guidance == 1 else 1.0)] if guidance > 1 else []
    if told.steps > 1 and isinstance(teacher.schedule, RectifiedFlow):
        own = (teacher.scheduler.config["shift"] if is_flow(teacher.scheduler) and "shift" in teacher.scheduler.config
               else SHIFT)
        found += [(Inference(told.steps, told.noise, shift=shift), way.guidance)
                  for shift in sorted({own, SHIFT} - {1.0})]
    elif told.steps > 1:
        found += [(Inference(told.steps, TCD_NOISE, end=1 / LEVELS), way.guidance)]
        found += [(Inference(told.steps, 1.0, nodes=COARSE_NODES), way.guidance)] if told.noise == 1 else []
    ways = (way_of(teacher, inference, w, way.scale) for inference, w in found)
    return [one for one in ways if one is not None]


def way_of(teacher: Teacher, inference: Inference, guidance: float = 1.0, scale: float = 1.0) -> Way | None:
    """An inference as the teacher's stock pipeline is called; None where no stock scheduler does it."""
    try:
        stock = teacher.stock_call(inference)
        scheduler = stock_scheduler(stock.scheduler, stock.config, teacher.scheduler)
    except ValueError:
        return None
    call = {**stock.call, **teacher.guidance.call(guidance)}
    return Way(scheduler, call, evaluations_of(teacher, inference.steps, guidance), inference.steps, guidance,
               scale, inference)


def evaluations_of(teacher: Teacher, steps: int, guidance: float) -> int:
    """Of a picture: a guided step is two, unless the network reads its scale."""
    return steps * (2 if guidance > 1 and not teacher.guidance.within else 1)


# -- figures ---------------------------------------------------------------------------------------------------------

class Judge:
    """Draws pictures of a way, and takes their distance to the reference's. Pictures are drawn once: a way that is
    measured with more of them keeps those that it has."""

    def __init__(self, target: Target, features: Features, reference: Reference, prompts: Sequence[str], seed: int,
                 samples: int,
                 batch: int = FIRST, dress: Callable[[float], None] = lambda scale: None) -> None:
        """target: of the pipeline; its scheduler and its call are the ways'. prompts: one after the other, over again.
        samples: of the last round, from which on the distance is Fréchet's, where they are not too few. dress: gives
        the pipeline a LoRA at a scale."""
        self.target, self.features, self.reference, self.dress = target, features, reference, dress
        self.prompts = [prompts[i % len(prompts)] for i in range(samples)]
        self.texts = features.texts(self.prompts) if target.prompted else None
        self.seed, self.samples, self.batch = seed, samples, batch
        self.kept: dict[tuple[SchedulerMixin, str, float], Tensor] = {}

    def __call__(self, way: Way, samples: int) -> Judged:
        seen = self._seen(way, samples)
        fits = None if self.texts is None else clip_score(seen, self.texts[:samples]).value
        other, whole = self.reference.subset, self.reference.whole
        if samples < self.samples or too_few(samples, whole.count, self.features.dim):
            return Judged(way, samples, "kid", kid(seen, other), kid_slopes(seen, other), fits)
        here = Moments.of(seen)
        both = slopes(seen, here, whole), slopes(other, whole, here)
        return Judged(way, samples, "fd", frechet_infinity(seen, self.reference, self.seed), both, fits)

    def _seen(self, way: Way, samples: int) -> Tensor:
        """Features (samples, D)."""
        kept = self.kept.get(way.drawn_by, torch.empty(0, self.features.dim))
        if len(kept) < samples:
            self.dress(way.scale)
            name = f"{self.target.name} by {type(way.scheduler).__name__}"
            plan = Plan(self.target, name, way.scheduler, {**self.target.given, **way.call}, way.nfe, way.steps,
                        way.guidance)
            kept = self.kept[way.drawn_by] = torch.cat([kept, *self._drawn(plan, torch.arange(len(kept), samples))])
        return kept[:samples]

    def _drawn(self, plan: Plan, ids: Tensor) -> Iterable[Tensor]:
        for some in ids.split(self.batch):
            pixels = plan.images([self.prompts[i] for i in some.tolist()], some, self.seed)
            # a call that overflows is judged by its grey pictures
            yield self.features.images(pixels.nan_to_num(0.0))
