"""The training loop. It knows roles and updates; it knows no method."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.amp import GradScaler

from .. import parallel
from ..diffusion.contracts import Batch
from ..diffusion.draws import Step, key
from ..errors import RequestError, Stopped
from ..methods.base import FIXED, Method, Update, due
from . import checkpoints, nonfinite
from .launch import launched
from .memory import held
from .optimizers import RoleOptimizer, TrainConfig, learning_rate, load_scales, scales
from .stopping import interruptions
from .tracking import Tracker

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}      # of autocast; fp32 has none
log = logging.getLogger("stepdistill")
WARM = 8                                       # steps within which every state of a compiled network turns up


class Stream(Protocol):
    """The data of (step, update, repeat): this rank's slice of this micro-batch."""

    def batch(self, step: int, update: str, repeat: int = 0, rank: int = 0, world: int = 1, micro: int = 0,
              micros: int = 1) -> Batch: ...


class Roles(Protocol):
    """Networks by name, as training sees them."""

    @property
    def names(self) -> Sequence[str]: ...
    def parameters(self, name: str) -> list[torch.nn.Parameter]: ...
    def state_dict(self, name: str) -> Mapping[str, Tensor]: ...
    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> Any: ...
    def follow(self, leader: str, step: int) -> None: ...


@dataclass(frozen=True)
class Shared:
    """Whose batch is used, and what was kept of each of its micro-batches."""

    update: str
    repeat: int
    kept: list[dict[str, Any]]


class Trainer:
    """Runs a method's updates on its roles, and keeps the run folder.

    on_step: called after every training step with its number, from 1: pictures, evaluation, benchmarks. They may use
    the global random generators as they like: training draws from none. on_start: called before the first step with
    the steps that are done: a run that was killed after it saved may owe pictures of that step. picture: where the
    picture of a step lies, if on_step made one.
    """

    def __init__(self, method: Method, roles: Roles, stream: Stream, config: TrainConfig, run_dir: Path,
                 on_step: Sequence[Callable[[int], None]] = (), on_start: Sequence[Callable[[int], None]] = (),
                 picture: Callable[[int], Path] | None = None) -> None:
        self.device, self.roles, self.stream, self.config = launched(), roles, stream, config
        self.run_dir, self.updates = Path(run_dir), method.updates()
        self.on_step, self.on_start = list(on_step), list(on_start)
        trained = dict.fromkeys(role for update in self.updates for role in update.trains)
        if unknown := trained.keys() - set(roles.names):
            raise ValueError(f"updates train {sorted(unknown)}, but the roles are {sorted(roles.names)}")
        if unknown := config.rates.keys() - trained:
            raise ValueError(f"{sorted(unknown)} have learning rates, but the updates train {sorted(trained)}")
        self.optimizers = {role: RoleOptimizer(roles.parameters(role), config) for role in trained}
        self.scalers = {update.name: GradScaler(self.device.type, enabled=config.precision == "fp16")
                        for update in self.updates}
        frozen = {role for role, need in method.needs(method.settings, full=True).items() if isinstance(need, FIXED)}
        self.saved = [role for role in roles.names if role not in frozen and roles.state_dict(role)]
        self.enabled: tuple[str, ...] = ()
        self.images, self.done, self.picture = 0, 0, picture

    def hear(self, on_step: Callable[[int], None], on_start: Callable[[int], None]) -> None:
        """One more to be told of steps."""
        self.on_step.append(on_step)
        self.on_start.append(on_start)

    # -- the run -----------------------------------------------------------------------------------------------------

    def train(self, resume: bool = False) -> None:
        """Trains to the last step and saves it. resume: goes on from the latest checkpoint, or begins if there is none.

        Stopped on Ctrl-C, on a full disk, on a loss that is not finite and where the GPU is too small; RequestError if
        the folder holds another run.
        """
        if resume:
            self.resume()
        elif (self.run_dir / "metrics.jsonl").exists() or checkpoints.latest(self.run_dir):
            raise RequestError(f"{self.run_dir} holds a run. Resume it, or choose another folder.")
        try:
            if self.config.compile:
                self.warm_up()
            self.tell(self.on_start, self.done)
            with interruptions() as interrupted, Tracker(self.run_dir, self.device, self.config, self.done) as tracker:
                for index in range(self.done, self.config.updates):
                    self.finish(index + 1, self.step(index), tracker, interrupted)
        except KeyboardInterrupt:                       # Ctrl-C for the second time
            raise Stopped(f"interrupted within step {self.done + 1}. {self.kept()}") from None
        except torch.OutOfMemoryError as error:
            raise Stopped(f"out of memory in step {self.done + 1}: {held(self.optimizers, self.device)}. "
                          f"{self.kept()}") from error
        except OSError as error:
            raise Stopped(f"stopped after step {self.done}: {error}. {self.kept()}") from error
        except RuntimeError as error:
            if not parallel.lost(error):
                raise
            raise Stopped(f"another process of this training has ended, within step {self.done + 1}: what it said "
                          f"last says why. {self.kept()}") from error

    def step(self, index: int) -> dict[str, Tensor]:
        """One training step: every update that is due. Returns losses and gradient norms by name, () each."""
        logs: dict[str, Tensor] = {}
        for update, repeat, shared in self.due(index):
            self.run(update, index, repeat, shared, logs)
        self.done = index + 1
        return logs

    def due(self, index: int) -> Iterator[tuple[Update, int, Shared]]:
        """The optimizer steps of a training step: the update, its repeat, and whose batch it sees."""
        shared: Shared | None = None
        for update in self.updates:
            for repeat in range(update.repeat if update.due(index) else 0):
                if shared is None or repeat >= update.shares:
                    shared = Shared(update.name, repeat, [{} for _ in range(self.config.accumulate)])
                yield update, repeat, shared

    def warm_up(self) -> None:
        """Compiles every state that training meets: runs the first steps and drops their gradients, until two compile
        nothing. Draws and batches are functions of the step, so the run is the same with it as without."""
        graphs, quiet, index = torch._dynamo.utils.counters["stats"], 0, 0
        while quiet < 2 and index < WARM:
            before = graphs["unique_graphs"]
            for update, repeat, shared in self.due(index):
                self.gradients(update, index, repeat, shared, {})
                for role in update.trains:
                    self.optimizers[role].drop()
            quiet, index = quiet + 1 if graphs["unique_graphs"] == before else 0, index + 1
        self.images = 0

    def run(self, update: Update, index: int, repeat: int, shared: Shared, logs: dict[str, Tensor]) -> None:
        """One optimizer step on the roles of this update; all other roles are frozen."""
        self.gradients(update, index, repeat, shared, logs)
        self.apply(update, index, logs)

    def gradients(self, update: Update, index: int, repeat: int, shared: Shared, logs: dict[str, Tensor]) -> None:
        """Those of one optimizer step."""
        self.enable(update.trains)
        for micro, batch in enumerate(self.micro_batches(index, shared)):
            losses = self.backward(update, _moved(batch, self.device), index, repeat, micro, shared.kept[micro])
            self.images += len(batch) * parallel.world_size()
            for name, value in losses.items():
                _mean(logs, f"{update.name}/{name}", value, update.repeat * self.config.accumulate)

    def micro_batches(self, index: int, shared: Shared) -> Iterator[Batch]:
        """This rank's share of an optimizer step's data."""
        rank, world, micros = parallel.rank(), parallel.world_size(), self.config.accumulate
        return (self.stream.batch(index, shared.update, shared.repeat, rank, world, micro, micros)
                for micro in range(micros))

    def apply(self, update: Update, index: int, logs: dict[str, Tensor]) -> None:
        """Steps the roles of this update, and those that follow them. In fp16 a step whose gradient overflowed is left
        out and counted as skipped, and the next ones are scaled by less."""
        scaler = self.scalers[update.name]
        for role in update.trains:
            norm = self.optimizers[role].step(learning_rate(self.config, index, role), scaler)
            if scaler.is_enabled():
                _mean(logs, f"skipped/{role}", 1 - norm.isfinite().float(), update.repeat)
                norm = norm.nan_to_num(0, 0, 0)
            _mean(logs, f"grad_norm/{role}", norm, update.repeat)
            self.roles.follow(role, index)
        scaler.update()

    def backward(self, update: Update, batch: Batch, index: int, repeat: int, micro: int,
                 kept: dict[str, Any]) -> dict[str, Tensor]:
        """Adds a micro-batch's gradients, under generators that are a function of the moment: dropout is part of the
        run. torch.manual_seed would, without a GPU, keep every one of its calls, and the stack of it, for one to
        come."""
        step = Step(self.config.seed, index, index / self.config.updates, update.name, repeat, batch.ids, self.device,
                    kept)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            seed = key(self.config.seed, "dropout", index, update.name, repeat, parallel.rank(), micro)
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)
            with self.autocast():
                losses = update.loss(batch, step)
            self.scalers[update.name].scale(sum(losses.values()) / self.config.accumulate).backward()
        return losses

    def autocast(self) -> AbstractContextManager[Any]:
        """As the recipe's precision says. It keeps no copies of weights: one made by a pass without gradients would
        serve the student's pass too, which then had none."""
        dtype = DTYPES.get(self.config.precision)
        return torch.autocast(self.device.type, dtype, dtype is not None, cache_enabled=False)

    def enable(self, trains: tuple[str, ...]) -> None:
        """Only these roles take gradients."""
        if trains == self.enabled:
            return
        for role, optimizer in self.optimizers.items():
            for parameter in optimizer.parameters:
                parameter.requires_grad_(role in trains)
        self.enabled = trains

    # -- after a step ------------------------------------------------------------------------------------------------

    def finish(self, step: int, logs: dict[str, Tensor], tracker: Tracker, interrupted: Callable[[], bool]) -> None:
        """Logs, saves and tells what is due after this step, counted from 1."""
        config = self.config
        rates = {"lr": learning_rate(config, step - 1)} | {f"lr/{role}": learning_rate(config, step - 1, role)
                                                           for role in config.rates}
        tracker.add(step, rates, logs, self.images)
        self.images = 0
        last = step == config.updates
        logging, saving = last or due(step, config.log_every), last or due(step, config.checkpoint_every)
        stopping = not last and self._agreed(interrupted(), logging)
        if (logging or saving or stopping) and (found := tracker.flush()):
            says = f"{found[1]}. {self._explained(found[0])}"
            raise Stopped(f"{says} {self.kept()} {nonfinite.advice(config)}", says)
        with tracker.pause():
            if saving or stopping:
                tracker.sync()
                self.save(step)
            self.tell(self.on_step, step)
            if self.picture is not None:
                tracker.picture(step, self.picture(step))
            if stopping:
                raise Stopped(f"interrupted after step {step} of {config.updates}. {self.kept()}")

    def tell(self, hearers: Sequence[Callable[[int], None]], step: int) -> None:
        with self.eager():
            for hearer in hearers:
                hearer(step)

    def save(self, step: int) -> None:
        """Every role that changes and every optimizer, written by rank 0. Stopped where a weight is not finite."""
        for role in self.saved:
            if (name := nonfinite.first(self.roles.state_dict(role))) is not None:
                says = f"{name} of the {role} is not finite after step {step}, which is not saved."
                raise Stopped(f"{says} {self.kept()} {nonfinite.advice(self.config)}", says)
        if parallel.rank() == 0:
            kept = checkpoints.save(self.run_dir, step,
                                    {f"role-{role}": self.roles.state_dict(role) for role in self.saved}
                             | {f"optimizer-{role}": optimizer.state() for role, optimizer in self.optimizers.items()}
                             | ({"scales": scales(self.scalers)} if self.config.precision == "fp16" else {}))
            log.info(f"step {step:,} of {self.config.updates:,} is kept: {kept}")
            if self.config.keep is not None:
                checkpoints.prune(self.run_dir, step, self.config.keep)
        parallel.barrier()

    def resume(self) -> None:
        """Puts roles, optimizers and the step back to the newest checkpoint that can be used, if there is any. Those
        that cannot are named and put aside. RequestError where none of them can."""
        taken = checkpoints.newest(self.run_dir, self.take, aside=True)
        if taken is not None:
            self.done = checkpoints.step_of(taken[0])

    def take(self, folder: Path) -> None:
        """Roles and optimizers of a checkpoint. RequestError where it is not of this run."""
        if (step := checkpoints.step_of(folder)) > self.config.updates:
            raise RequestError(f"the checkpoint {folder} is of step {step}, and this run has {self.config.updates}")
        found = checkpoints.load(folder)
        expected = {f"role-{role}" for role in self.saved} | {f"optimizer-{role}" for role in self.optimizers}
        begun = found.pop("scales", None)                 # of fp16, which a run may come to or leave on the way
        if found.keys() != expected:
            raise RequestError(f"{folder} holds {', '.join(sorted(found)) or 'nothing'}; this recipe needs "
                               f"{', '.join(sorted(expected))}. "
                               "Resume with the recipe that the run was begun with.")
        try:
            for role in self.saved:
                self.roles.load_state_dict(role, found[f"role-{role}"])
            for role, optimizer in self.optimizers.items():
                optimizer.load(found[f"optimizer-{role}"])
            if begun is not None and self.config.precision == "fp16":
                load_scales(self.scalers, begun)
        except ValueError as error:
            raise RequestError(f"{folder} does not fit this recipe: {error}") from error

    def _explained(self, step: int) -> str:
        with self.eager():
            return nonfinite.explained(self, step)

    def eager(self) -> AbstractContextManager[Any]:
        """Where batches have a size of their own, or modules are looked into, nothing is compiled anew."""
        return torch.compiler.set_stance("force_eager") if self.config.compile else nullcontext()

    def _agreed(self, interrupted: bool, logging: bool) -> bool:
        """Whether to stop. Several ranks ask each other where they wait for each other anyway, at logging steps."""
        if parallel.world_size() == 1:
            return interrupted
        if not logging:
            return False
        flag = torch.tensor(float(interrupted), device=self.device)
        parallel.all_reduce_mean_([flag])
        return flag.item() > 0

    def kept(self) -> str:
        """A sentence on what is saved."""
        folder = checkpoints.latest(self.run_dir)
        return f"{folder} is kept: resume to go on from there." if folder else "No checkpoint was written yet."


def _mean(logs: dict[str, Tensor], name: str, value: Tensor, count: int) -> None:
    share = value.detach() / count
    logs[name] = logs[name] + share if name in logs else share


def _moved(batch: Batch, device: torch.device) -> Batch:
    """The batch on the training device; ids stay where they are read, on the CPU."""
    x0 = None if batch.x0 is None else batch.x0.to(device, non_blocking=True)
    pairs = None if batch.pairs is None else batch.pairs.to(device, non_blocking=True)
    return replace(batch, x0=x0, cond=batch.cond.to(device, non_blocking=True), pairs=pairs)
