"""From signals to words: what ails a run, and what helps. A pure function of the rows of signals.jsonl, of bands and of
facts.

bands: signal -> (low, high) within which healthy runs stayed, and out of which they never were for long; recorded, see
bands.json. facts: entry of the recipe -> its value, as far as an advice names it.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, float | str]
Bands = Mapping[str, Sequence[float]]
Facts = Mapping[str, Any]

PATIENCE = 3                       # looks in a row that a signal must be out of its band
YOUNG = 0.15                       # share of the updates in which a student is on its way into the bands
FALLEN = 0.6                       # of its best, what is left of a diversity that is called falling
BANDS = Path(__file__).with_name("bands.json")


@dataclass(frozen=True)
class Finding:
    """name: of the sickness. since: the step at which it began, found: the one at which it was known. grave: a run is
    not to go on so."""

    name: str
    found: int
    since: int
    says: str
    helps: str
    grave: bool = True

    @property
    def words(self) -> str:
        return f"{self.name}: {self.says} (since step {self.since:,}). What helps: {self.helps}."


@dataclass(frozen=True)
class Rule:
    """A signal that leaves its band on one side. says and helps: formats of value, edge and role. limit: in place of a
    band's edge, what no healthy run has; such a rule holds from the first step on."""

    name: str
    signal: str
    side: str
    says: str
    helps: Callable[[Facts, str], str]
    limit: float | None = None
    grave: bool = True

    def edge(self, bands: Bands, signal: str) -> float | None:
        if self.limit is not None:
            return self.limit
        return None if signal not in bands else bands[signal][self.side == "high"]

    def broken(self, value: float, edge: float) -> bool:
        return value > edge if self.side == "high" else value < edge


def bands_of(method: str) -> dict[str, list[float]]:
    """Of a method; of a signal that was not recorded of it, the hull of all methods' bands."""
    recorded = json.loads(BANDS.read_text(encoding="utf-8"))["bands"]
    hull: dict[str, list[float]] = {}
    for bands in recorded.values():
        for signal, (low, high) in bands.items():
            least, most = hull.get(signal, (low, high))
            hull[signal] = [min(least, low), max(most, high)]
    return hull | recorded.get(method, {})


def judge(rows: Sequence[Row], bands: Bands, facts: Facts) -> list[Finding]:
    """What holds at the last row, the gravest first. rows: by rising steps, the first of them of step 0 or of a
    resumption."""
    if not rows:
        return []
    if "not_finite" in rows[-1]:
        return [Finding("overflow", _step(rows[-1]), _step(rows[-1]), str(rows[-1]["not_finite"]),
                        f"{lower(facts, 'student')}, a smaller train.clip, train.precision: fp32")]
    found = [*_ruled(rows, bands, facts), *_falling(rows, facts)]
    return list({finding.name: finding for finding in reversed(found)}.values())[::-1]


def history(rows: Sequence[Row], bands: Bands, facts: Facts) -> list[Finding]:
    """Every finding of the whole run, each as it was last known, in the order in which they came up."""
    known: dict[str, Finding] = {}
    for end in range(1, len(rows) + 1):
        known.update((finding.name, finding) for finding in judge(rows[:end], bands, facts))
    return list(known.values())


def _ruled(rows: Sequence[Row], bands: Bands, facts: Facts) -> Iterator[Finding]:
    young = _young(rows, facts)
    for rule in RULES:
        for signal in [name for name in rows[-1] if name == rule.signal or rule.signal.endswith("/")
                       and name.startswith(rule.signal)]:
            edge = rule.edge(bands, signal)
            seen = [row for row in rows if signal in row and (rule.limit is not None or _step(row) > young)]
            if edge is None or len(seen) < PATIENCE or not all(rule.broken(row[signal], edge)
                                                               for row in seen[-PATIENCE:]):
                continue
            out = next((row for row in reversed(rows) if signal in row and not rule.broken(row[signal], edge)), None)
            since = next(_step(row) for row in rows if signal in row and (out is None or _step(row) > _step(out)))
            role = signal.partition("/")[2]
            says = rule.says.format(value=seen[-1][signal], edge=edge, role=role)
            yield Finding(rule.name, _step(rows[-1]), since, says, rule.helps(facts, role), rule.grave)


def _falling(rows: Sequence[Row], facts: Facts) -> Iterator[Finding]:
    """A diversity that falls from look to look, far from its best: before it has left its band."""
    seen = [row for row in rows if "diversity/student" in row and _step(row) > _young(rows, facts)]
    values = [min(1.0, row["diversity/student"]) for row in seen]
    if len(values) < 2 * PATIENCE:
        return
    best = max(sorted(values[i:i + PATIENCE])[PATIENCE // 2] for i in range(len(values) - PATIENCE + 1))
    last = values[-PATIENCE - 1:]
    if max(last[1:]) < FALLEN * best and last == sorted(last, reverse=True):
        since = next(step for step, value in reversed([*zip(map(_step, seen), values)]) if value >= FALLEN * best)
        yield Finding("diversity falls", _step(rows[-1]), since, f"samples of one prompt are {values[-1]:.2f} as "
                      f"far apart as the teacher's, and were {best:.2f}", diverse(facts))


def _young(rows: Sequence[Row], facts: Facts) -> float:
    """The step until which a student is on its way into the bands; it begins with the first look, for which one that
    waits is not there."""
    first = _step(rows[0])
    return first + YOUNG * (facts["updates"] - first)


def _step(row: Row) -> int:
    return int(row["step"])


# -- what helps ------------------------------------------------------------------------------------------------------

def lower(facts: Facts, role: str) -> str:
    """A smaller rate of a role."""
    entry = f"{role}.lr" if f"{role}.lr" in facts else "train.lr"
    return f"lower {entry} from {facts[entry]:g} to {facts[entry] / 10:g}"


def raised(facts: Facts, role: str) -> str:
    entry = f"{role}.lr" if f"{role}.lr" in facts else "train.lr"
    return f"raise {entry} from {facts[entry]:g}" + ("" if entry != "train.lr" else f", or give the {role} a rate "
                                                     f"of its own, {role}.lr")


def quicker(facts: Facts, role: str) -> str:
    """More steps of a critic."""
    steps = facts.get("settings.critic_steps")
    more = "" if steps is None else f"raise critic_steps from {steps} to {5 if steps < 5 else 2 * steps}, or "
    return f"{more}{raised(facts, 'critic')}"


def diverse(facts: Facts) -> str:
    steps = facts.get("settings.critic_steps")
    critic = "" if steps is None else f", raise critic_steps from {steps} to {5 if steps < 5 else 2 * steps}"
    gan = "" if "settings.gan_weight" not in facts else f", lower gan_weight from {facts['settings.gan_weight']:g}"
    return f"{lower(facts, 'student')}{critic}{gan}, go back to a checkpoint before it"


def unguided(facts: Facts, role: str) -> str:
    return f"lower guidance from {facts['guidance']:g} to {max(1, facts['guidance'] / 4):g}, or set guidance_rescale"


def _same(text: str) -> Callable[[Facts, str], str]:
    return lambda facts, role: text


def _diverse(facts: Facts, role: str) -> str:
    return diverse(facts)


RULES = (
    Rule("the teacher changes", "drift/teacher", "high", "the frozen network answers otherwise than at the start, "
         "by {value:.2g} of the deviation of its samples",
         _same("find what writes into its weights: it is to be frozen"), limit=1e-3),
    Rule("gradients reach the teacher", "leak/teacher", "high", "its weights are frozen and hold a gradient of "
         "norm {value:.2g}",
         _same("call it under torch.no_grad() or on detached inputs, and leave its weights requires_grad=False"),
         limit=0.0),
    Rule("overflow", "skipped/", "high", "{value:.0%} of the steps of the {role} are left out, since float16 overflows",
         _same("train.precision: bf16 or fp32, or a smaller rate"), limit=0.5),
    Rule("wrong adapter", "unheard/student", "high", "the student's weights move by {value:.2g} of their size, "
         "and its samples not at all: what is trained is not what is sampled",
         _same("look which adapter is active where the student is sampled, and which where it is trained"), limit=1e-9),
    Rule("frozen student", "moved/student", "low", "its weights do not move",
         lambda facts, role: f"look whether the student's loss reaches its weights; "
         f"{raised(facts, 'student')}", limit=1e-9),
    Rule("dead discriminator", "variation/discriminator", "low", "it says the same of every sample",
         _same("begin anew with a smaller discriminator.lr: its heads are dead"), limit=1e-6),
    Rule("dead discriminator", "moved/discriminator", "low", "its weights do not move",
         lambda facts, role: raised(facts, "discriminator"), limit=1e-9),
    Rule("rate too high", "moved/", "high", "a step moves the weights of the {role} by {value:.2g} of their size, "
         "where at most {edge:.2g} is healthy", lower),
    Rule("constant pictures", "detail/student", "low", "its pictures vary within by {value:.2f} of what the teacher's "
         "do, where {edge:.2f} is the least that is healthy", lambda facts, role: f"{lower(facts, 'student')}, "
         "go back to a checkpoint before it"),
    Rule("one picture for all", "diversity/student", "low", "samples of one prompt are {value:.2f} as far apart "
         "as the teacher's, where {edge:.2f} is the least that is healthy", _diverse),
    Rule("wrong captions", "following/student", "low", "what a prompt changes in its samples has a correlation "
         "of {value:.2f} with what it changes in the teacher's, where {edge:.2f} is the least that is healthy",
         _same("look whether the captions of the data are those of their pictures, and whether "
               "the student is told its prompt")),
    Rule("guidance too high", "saturation/teacher", "high", "{value:.0%} of the guided teacher's values lie beyond "
         "all that it gives without guidance, where {edge:.0%} is healthy", unguided, limit=0.1),
    Rule("guidance too high", "spread/teacher", "high", "the guided teacher's samples are {value:.2f} times as "
         "wide as without guidance", unguided, limit=2.0),
    Rule("critic lags", "unfit/critic", "high", "a scale and a shift would take away {value:.0%} of its error at "
         "the student's samples, where at most {edge:.0%} is healthy", quicker),
    Rule("critic lags", "lag/critic", "high", "its error at fresh samples of the student is {value:.2f} times that "
         "at earlier ones, where at most {edge:.2f} is healthy", quicker),
    Rule("critic lags", "pace/critic", "low", "a step moves its weights by {value:.2g} of what it moves the student's, "
         "where {edge:.2g} is the least that is healthy", quicker),
    Rule("discriminator wins", "accuracy/discriminator", "high", "it tells {value:.0%} of the samples apart, where "
         "at most {edge:.0%} is healthy, and so teaches little", lambda facts, role: lower(facts, "discriminator")),
    Rule("saturated", "saturation/student", "high", "{value:.0%} of the student's values lie beyond all of the "
         "teacher's, where at most {edge:.0%} is healthy",
         lambda facts, role: f"{lower(facts, 'student')}, lower guidance"),
    Rule("too wide", "spread/student", "high", "the student's samples are {value:.2f} times as wide as the teacher's, "
         "where at most {edge:.2f} is healthy",
         lambda facts, role: lower(facts, "student")),
    Rule("too narrow", "spread/student", "low", "the student's samples are {value:.2f} times as wide as the teacher's, "
         "where at least {edge:.2f} is healthy", _diverse),
    Rule("off centre", "offset/student", "high", "the student's mean lies {value:.2f} deviations from the teacher's, "
         "where at most {edge:.2f} is healthy",
         lambda facts, role: lower(facts, "student")),
    Rule("terms pull apart", "angle/", "low", "the gradients of the terms of {role} have a cosine of {value:.2f}, "
         "where at least {edge:.2f} is healthy",
         _same("change the weights of its terms"), grave=False),
    Rule("one term drowns the others", "share/", "high", "{role} holds {value:.0%} of the gradient, where at most "
         "{edge:.0%} is healthy",
         _same("lower the weight of this term"), grave=False),
    Rule("always clipped", "clipped/", "high", "{value:.0%} of the steps of the {role} are clipped, where at most "
         "{edge:.0%} is healthy",
         lambda facts, role: f"{lower(facts, role)}, or raise train.clip", grave=False),
)
