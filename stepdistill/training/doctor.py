"""The doctor of a run: every so many steps a look at what it trains, a row of signals, and words where something is
wrong.

What the loop knows anyway (losses, gradient norms, steps that overflowed) is read off its log. The rest is taken of a
small fixed probe: some prompts with some noises each. All draws are keyed by names of the doctor's own, so training is
the same to the bit with it and without.
"""
from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from .. import parallel
from ..diffusion.contracts import Batch, Condition, Role
from ..diffusion.draws import Step, key
from ..errors import Stopped
from ..files import records
from ..methods.base import Update, due
from . import signals
from .diagnosis import Finding, judge
from .signals import Row
from .tracking import truncate

if TYPE_CHECKING:
    from .loop import Shared, Trainer

SIGNALS = "signals.jsonl"
WATCHED = 1 << 20                  # weights of a role whose way is measured: whole tensors, the first ones that fit
SHOWN = 4                          # names in a message
TAIL = 1 << 20                     # bytes of the log that are read at a look
log = logging.getLogger("stepdistill")


class Relapse(Exception):
    """A run is to go back to a checkpoint of `step` or before. finding: why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.words)
        self.finding = finding


@dataclass(frozen=True)
class Patient:
    """What is looked at. sample and teacher give (P M, ...) samples of the same P prompts with the same M noises; plain
    the teacher's without guidance, None where it is not guided. noise, cond: theirs. base: the network that never
    changes, and frozen its weights. critic: as it is asked to denoise the student's samples, None where there is none;
    critic_cond: what it is told. heads: of the discriminator, each of which gives logits (B, ...)."""

    prompts: int
    noise: Tensor
    cond: Condition
    sample: Callable[[], Tensor]
    teacher: Callable[[], Tensor]
    base: Role
    plain: Callable[[], Tensor] | None = None
    frozen: Sequence[Tensor] = ()
    critic: Role | None = None
    critic_cond: Condition | None = None
    heads: Sequence[nn.Module] = ()


@dataclass(frozen=True)
class Orders:
    """every: steps from look to look. then: what is done about a finding, beside saying it. bands: signal -> its band.
    facts: what the advice names, entry -> value. alone: rank 0 looks, which on a sharded base all do."""

    every: int
    then: str
    bands: Mapping[str, Sequence[float]]
    facts: Mapping[str, Any]
    alone: bool = True


class Doctor:
    """Called after every step. Rank 0 writes and judges."""

    def __init__(self, trainer: Trainer, patient: Patient, orders: Orders) -> None:
        self.trainer, self.patient, self.orders = trainer, patient, orders
        self.path = trainer.run_dir / SIGNALS
        self.rows: list[dict[str, float | str]] = []
        self.said: set[str] = set()
        self.weights: dict[str, list[Tensor]] = {}
        self.teacher = self.held = self.answer = None
        self.constant: Row = {}
        self.since = 0
        # till then it waits
        self.begins = min((update.since for update in trainer.updates if "student" in update.trains), default=0)

    def start(self, done: int) -> None:
        """Before the first step: forgets the signals after `done`, and draws what all later looks are held against."""
        self.since = done
        if not self._looks():
            return
        if parallel.rank() == 0:
            self.rows = truncate(self.path, done, records.Signals)
            self.said = {finding.name for finding in self.judged()}
        with self._aside():
            self.teacher = self.patient.teacher()
            if self.patient.plain is not None:
                self.constant = signals.of_samples(self.teacher, self.patient.plain(), self.patient.prompts, "teacher")
            self.answer = self._answer()
        if done == self.begins and not self.rows:
            self.look(done)
        self._watch(done)

    def __call__(self, step: int) -> None:
        looked = step >= self.begins and (due(step, self.orders.every)
                                          or step in (self.begins, self.trainer.config.updates))
        if self._looks():
            if looked:
                self.look(step)
            self._watch(step)
        if looked:
            self._act(step)

    def look(self, step: int) -> None:
        """A row of signals, and what is new in what they mean."""
        row: dict[str, float | str] = {"step": step} | self._logged(step) | self._moved()
        with self._aside():
            row |= self._probed(row) | (self._terms(max(0, step - 1)) if self.orders.alone else {})
        self.since = step
        if parallel.rank():
            return
        self.rows.append(written(self.path, row))
        found = self.judged()
        for finding in found:
            if finding.name not in self.said:
                log.warning(f"step {step:,}: {finding.words}")
        self.said = {finding.name for finding in found}

    # -- what is measured --------------------------------------------------------------------------------------------

    def _logged(self, step: int) -> Row:
        rows = tail(self.trainer.run_dir / "metrics.jsonl") if parallel.rank() == 0 else []
        return signals.of_log([row for row in rows if self.since < row["step"] <= step], self.trainer.config.clip)

    def _watch(self, step: int) -> None:
        """Keeps weights before a step that is looked at."""
        last = self.trainer.config.updates
        if due(step + 1, self.orders.every) or step + 1 == last:
            self.weights = {role: [p.detach().clone() for p in self._some(role)] for role in self.trainer.optimizers}

    def _some(self, role: str) -> list[Tensor]:
        """Of a role's weights those that are watched: as many tensors as fit, and at least one."""
        found, left = [], WATCHED
        for p in self.trainer.optimizers[role].parameters:
            if p.numel() <= left or not found:
                found.append(p)
                left -= p.numel()
        return found

    @torch.no_grad()
    def _moved(self) -> Row:
        """By role how far the last step moved its weights, over their size."""
        size = lambda tensors: torch.stack([t.detach().double().norm() for t in tensors]).norm()
        found = {}
        for role, before in self.weights.items():
            now = self._some(role)
            found[f"moved/{role}"] = (size([p - q for p, q in zip(now, before, strict=True)])
                                      / size(now).clamp_min(1e-12)).item()
        if "moved/critic" in found and found["moved/student"]:
            found["pace/critic"] = found["moved/critic"] / found["moved/student"]
        return found

    @torch.no_grad()
    def _probed(self, known: Mapping[str, float | str]) -> Row:
        patient, x = self.patient, self.patient.sample()
        row = signals.of_samples(x, self.teacher, patient.prompts, "student") | self.constant
        if patient.critic is not None:
            eps = self._eps(x)
            row |= signals.of_critic(patient.critic, patient.critic.schedule, x, self.held, patient.critic_cond, eps)
        if self.held is not None:
            row["changed/student"] = signals.change(x, self.held, self.teacher)
            row["unheard/student"] = 0.0 if row["changed/student"] else known["moved/student"]
        self.held = x
        row["drift/teacher"] = signals.change(self._answer(), self.answer, self.teacher)
        leaked = [p.grad for p in patient.frozen if p.grad is not None]
        row["leak/teacher"] = torch.stack([g.double().norm() for g in leaked]).norm().item() if leaked else 0.0
        return row

    def _eps(self, x: Tensor) -> Tensor:
        step = Step(self.trainer.config.seed, 0, 0.0, "doctor", 0, torch.arange(len(x)), x.device)
        return step.normal("probe", tuple(x.shape[1:]))

    @torch.no_grad()
    def _answer(self) -> Tensor:
        """The base's, at fixed inputs."""
        return self.patient.base(self.patient.noise, torch.full((len(self.patient.noise),), 0.5, dtype=torch.float64),
                                 self.patient.cond).x0

    def _terms(self, index: int) -> Row:
        """Of the losses at a few samples: how their terms' gradients lie to each other, and how often the discriminator
        is right."""
        row: Row = {}
        for update, repeat, shared in self.trainer.due(index):
            if not repeat:
                self.trainer.enable(update.trains)
                with self.trainer.autocast(), heard(self.patient.heads) as logits:
                    losses = update.loss(*self._asked(update, index, shared))
                row |= self._of_losses(update, losses, [one for one in logits if one.requires_grad])
        return row

    def _of_losses(self, update: Update, losses: Mapping[str, Tensor], logits: Sequence[Tensor]) -> Row:
        row: Row = {}
        terms = {name: loss for name, loss in losses.items() if loss.requires_grad}
        if "discriminator" in terms and logits:
            slopes = torch.autograd.grad(terms["discriminator"], logits, retain_graph=True, materialize_grads=True)
            row |= signals.of_logits(logits, slopes)
        if len(terms) > 1:
            watched = [p for role in update.trains for p in self._some(role)]
            gradients = {name: torch.autograd.grad(loss, watched, retain_graph=True, materialize_grads=True)
                         for name, loss in terms.items()}
            row |= signals.of_terms(update.name, gradients)
        return row

    def _asked(self, update: Update, index: int, shared: Shared) -> tuple[Batch, Step]:
        """What a loss is given: the first samples of the batch, under draws of the doctor's own."""
        config, device = self.trainer.config, self.trainer.device
        batch = head(next(self.trainer.micro_batches(index, shared)), len(self.patient.noise), device)
        step = Step(key(config.seed, "doctor"), index, index / config.updates, update.name, 0, batch.ids, device,
                    shared.kept[0])
        return batch, step

    # -- what is done about it ---------------------------------------------------------------------------------------

    def judged(self) -> list[Finding]:
        """What ails the run at the last look."""
        return judge(self.rows, self.orders.bands, self.orders.facts)

    def _act(self, step: int) -> None:
        """All ranks stop, or go back, together."""
        if self.orders.then == "warn":
            return
        found = [finding for finding in self.judged() if finding.grave] if parallel.rank() == 0 else []
        sick = parallel.gather(torch.tensor([float(found[0].since) if found else -1.0]))[0].item()
        if sick < 0:
            return
        finding = found[0] if found else Finding("relapse", step, int(sick), "rank 0 says what", "")
        if self.orders.then == "rollback":
            raise Relapse(finding)
        raise Stopped(f"stopped after step {step}, as train.doctor asks: {finding.words} {self.trainer.kept()}")

    def _looks(self) -> bool:
        return parallel.rank() == 0 or not self.orders.alone

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Global generators are as they were afterwards."""
        device = self.trainer.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(key(self.trainer.config.seed, "doctor"))
            yield


def written(path: Path, row: Mapping[str, float | str]) -> dict[str, float | str]:
    """Adds a row to signals.jsonl, and gives it as it stands there: of a signal that is not finite only that it was
    not."""
    lost = [name for name, value in row.items() if not isinstance(value, str) and not math.isfinite(value)]
    kept = {name: value if isinstance(value, str | int) else float(f"{value:.6g}") for name, value in row.items()
            if name not in lost}
    if lost:
        kept |= {"not_finite": f"{', '.join(lost[:SHOWN])} of step {row['step']} {'are' if len(lost) > 1 else 'is'} "
                 "not finite."}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(kept) + "\n")
    return kept


@contextmanager
def heard(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Yields a list that fills with what these modules return while it lasts."""
    found: list[Tensor] = []
    hook = register_module_forward_hook(lambda module, args, output: found.append(output)
                                        if any(module is one for one in modules) else None)
    try:
        yield found
    finally:
        hook.remove()


def head(batch: Batch, count: int, device: torch.device) -> Batch:
    """Its first samples, on the device; ids and times stay on the CPU."""
    pairs = batch.pairs
    if pairs is not None:
        pairs = replace(pairs, noise=pairs.noise[:count], nodes=pairs.nodes[:count],
                        times=pairs.times[:count]).to(device)
    x0 = None if batch.x0 is None else batch.x0[:count].to(device)
    prompts = None if batch.prompts is None else batch.prompts[:count]
    return Batch(batch.ids[:count], batch.cond[:count].to(device), x0, batch.shape, pairs, prompts)


def tail(path: Path) -> list[dict[str, float]]:
    """The last rows of a log."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL))
        text = file.read()
    whole = text if size <= TAIL else text.partition(b"\n")[2]
    return [row for _, _, row in records.lines(whole, records.Metrics) if not isinstance(row, ValueError)]
