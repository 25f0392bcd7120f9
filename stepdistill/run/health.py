"""A run as its doctor sees it, and what a run folder says of its health."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..diffusion.contracts import Condition, Role
from ..diffusion.guidance import guided, with_scale
from ..diffusion.prediction import Prediction
from ..diffusion.schedule import Schedule
from ..errors import RequestError, Stopped
from ..files import records
from ..files.whole import put_aside, write_whole
from ..recipe import Recipe
from ..training import Trainer, checkpoints
from ..training.diagnosis import PATIENCE, Finding, bands_of, history, judge
from ..training.doctor import SIGNALS, Doctor, Orders, Patient, written
from . import folder
from .data import noises, preview_prompts
from .preview import base_samples, student_samples
from .resuming import write_down
from .setup import Run
from .telling import log

PICTURE = "signals.png"
SLOWER = 10                                            # what rates are divided by on the way back
# of a probe: prompts, samples at least and at most, and numbers in all
PROMPTS, LEAST, MOST, NUMBERS = 4, 8, 128, 4096


def attend(run: Run, trainer: Trainer) -> None:
    """Gives a training its doctor, if the recipe wants one, and if it is long enough for what takes several looks to
    find."""
    train = run.recipe.train
    if train.doctor != "off" and train.updates >= PATIENCE * train.doctor_every:
        doctor = Doctor(trainer, patient(run), Orders(train.doctor_every, train.doctor, bands_of(run.recipe.method),
                                                      facts(run.recipe), not train.fsdp))
        trainer.hear(doctor, doctor.start)


def patient(run: Run) -> Patient:
    """The student's samples are of its weights as they are trained, not of their average."""
    texts = list(dict.fromkeys(preview_prompts(run, 4 * PROMPTS)))[:PROMPTS]
    each = max(LEAST, min(MOST, NUMBERS // torch.Size(run.teacher.latent_shape).numel())) // len(texts)
    size = max(1, run.recipe.data.batch // run.recipe.train.accumulate)
    cond = run.teacher.encode([text for text in texts for _ in range(each)])
    noise = _noise(run, each, len(texts))
    student = lambda noise, cond: student_samples(run, noise, cond, "student")
    teacher: Callable[[float], Callable[[], Tensor]] = lambda w: _in_pieces(
        lambda noise, cond: base_samples(run, noise, cond, w), noise, cond, size)
    critic, critic_cond = run.method.denoiser, cond
    if critic is not None and "w" in run.roles.reads["critic"]:
        critic_cond = with_scale(cond, float(run.method.sampler.nfe))            # the last exit, which is the sample
    trained = {id(p) for role in run.roles.names for p in run.roles.parameters(role)}
    return Patient(
        prompts=len(texts), noise=noise("start"), cond=cond, sample=_in_pieces(student, noise, cond, size),
        teacher=teacher(run.guidance), plain=teacher(1.0) if run.guidance > 1 else None,
        base=Pieces(guided(run.roles.base, run.guidance), size),
        frozen=[p for p in run.teacher.network.parameters() if id(p) not in trained],
        critic=None if critic is None else Pieces(critic, size), critic_cond=critic_cond,
        heads=list(run.roles["discriminator"].heads.values()) if "discriminator" in run.roles else [])


def _in_pieces(draw: Callable[[Callable[[str], Tensor], Condition], Tensor], noise: Callable[[str], Tensor],
               cond: Condition,
               size: int) -> Callable[[], Tensor]:
    """All samples of a probe, no more at a time than a micro-batch of the training holds: the doctor needs no memory
    that it does not."""
    parts = [slice(first, first + size) for first in range(0, len(cond), size)]
    return torch.no_grad()(lambda: torch.cat([draw(lambda name, part=part: noise(name)[part], cond[part])
                                              for part in parts]))


@dataclass(frozen=True)
class Pieces:
    """A role that is asked for no more samples at a time than `size`."""

    role: Role
    size: int

    @property
    def schedule(self) -> Schedule:
        return self.role.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        parts = [slice(first, first + self.size) for first in range(0, len(t), self.size)]
        found = [self.role(x_t[part], t[part], None if cond is None else cond[part]) for part in parts]
        return replace(found[0], raw=torch.cat([one.raw for one in found]), x_t=x_t, t=t)


def _noise(run: Run, each: int, prompts: int) -> Callable[[str], Tensor]:
    """The same noises for every prompt."""
    return lambda name: noises(run, "doctor", name, torch.arange(each)).repeat(prompts,
                                                                               *[1] * len(run.teacher.latent_shape))


def note(place: Path, step: int, recipe: Recipe, says: str) -> None:
    """A row of signals.jsonl on what was not finite."""
    if recipe.train.doctor != "off" and parallel.rank() == 0:
        written(place / SIGNALS, {"step": step, "not_finite": says})


def go_back(whole: Recipe, place: Path, run: Path, finding: Finding, left: int) -> Recipe:
    """Puts the checkpoints of a stage aside that its sickness may have reached, and lowers the rates of the recipe,
    whose training can then go on from the last one before, or from the beginning. left: how often that may be done yet.
    Stopped where it may not."""
    if not left:
        raise Stopped(f"stopped, as train.doctor asks: {finding.words} It has gone back often enough, each time "
                      "to smaller rates.")
    sick = [saved for saved in checkpoints.found(place) if checkpoints.step_of(saved) >= finding.since]
    healthy = next((saved for saved in checkpoints.found(place) if checkpoints.step_of(saved) < finding.since), None)
    parallel.barrier()
    for saved in sick if parallel.rank() == 0 else ():
        put_aside(saved, "sick")
    parallel.barrier()
    rates = {"train.lr": whole.train.lr} | {f"{name}.lr": choice.lr
                                            for name, choice in (("critic", whole.critic),
                                                                 ("discriminator", whole.discriminator))
                                            if choice is not None and choice.lr is not None}
    lowered = {entry: rate / SLOWER for entry, rate in rates.items()}
    log.warning(f"back to {healthy or 'the beginning'}, with "
                f"{', '.join(f'{entry} {rate:g}' for entry, rate in lowered.items())}: {finding.words}")
    recipe = Recipe.load(whole.resolved(), lowered)
    write_down(run, recipe)
    return recipe


def facts(recipe: Recipe) -> dict[str, Any]:
    """What an advice names."""
    low = recipe.guidance if isinstance(recipe.guidance, int | float) else max(recipe.guidance)
    known = {"updates": recipe.train.updates, "guidance": float(low), "train.lr": recipe.train.lr}
    own = {f"{name}.lr": choice.lr for name, choice in (("critic", recipe.critic),
                                                        ("discriminator", recipe.discriminator))
           if choice is not None and choice.lr is not None}
    settings = asdict(recipe.method_settings())
    return known | own | {f"settings.{name}": settings[name] for name in ("critic_steps", "gan_weight")
                          if name in settings}


@dataclass(frozen=True)
class Health:
    """What the signals of a run say. now: what holds at its last look; was: what held before and does not now."""

    folder: Path
    step: int
    now: list[Finding]
    was: list[Finding]
    signals: Mapping[str, float | str]
    picture: Path

    @property
    def words(self) -> str:
        verdict = [finding.words for finding in self.now] or ["healthy: every signal is in its band"]
        before = [f"before, until step {finding.found:,}: {finding.name} (since step {finding.since:,}): "
                  f"{finding.says}" for finding in self.was]
        return "\n".join([f"{self.folder}, step {self.step:,}", *verdict, *before, f"its signals: {self.picture}"])

    @property
    def plain(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"folder": str(self.folder), "step": self.step, "healthy": not self.now,
                "now": [asdict(finding) for finding in self.now],
                "was": [asdict(finding) for finding in self.was], "signals": dict(self.signals),
                "picture": str(self.picture)}


def health(run: Path) -> list[Health]:
    """Of a finished or a running run, stage by stage; signals.png is written beside the signals.

    RequestError for what is no run, and for one that no doctor has looked at.
    """
    recipe = folder.recipe_of(run)
    looks = [(stage, place, _looks(place / SIGNALS))
             for stage, place in zip(recipe.stages, folder.stage_folders(recipe, run), strict=True)
             if (place / SIGNALS).is_file()]
    if not any(rows for *_, rows in looks):
        raise RequestError(f"{run} holds no {SIGNALS} with a look in it: its training has not begun, train.doctor is "
                           f"off, or the run is shorter than {PATIENCE} looks; --set train.doctor=warn and "
                           "train.doctor_every have it looked at from its next step on")
    return [_health(stage, place, rows) for stage, place, rows in looks if rows]


def _looks(file: Path) -> list[dict[str, Any]]:
    """What a signals.jsonl holds; lines that no doctor wrote are left out, with a word."""
    read = [row for _, _, row in records.lines(file.read_bytes(), records.Signals)]
    rows = [row for row in read if not isinstance(row, ValueError) and isinstance(row.get("step"), int)
            and all(isinstance(value, str) == (name == "not_finite") for name, value in row.items())]
    if len(rows) < len(read):
        log.warning(f"{file}: {len(read) - len(rows)} of {len(read)} lines are damaged, and left out")
    return rows


def _health(recipe: Recipe, place: Path, rows: list[dict[str, Any]]) -> Health:
    from ..evaluation.vitals import vitals  # here, because matplotlib takes a quarter of a second

    bands, known = bands_of(recipe.method), facts(recipe)
    now = judge(rows, bands, known)
    names = {finding.name for finding in now}
    was = [finding for finding in history(rows, bands, known) if finding.name not in names]
    write_whole(place / PICTURE, vitals(rows, bands, [(finding.since, finding.name) for finding in now]))
    return Health(place, int(rows[-1]["step"]), now, was, rows[-1], place / PICTURE)
