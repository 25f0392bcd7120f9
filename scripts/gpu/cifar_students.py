"""The students of CIFAR-10: their recipes, trained by `stepdistill.train` in as many updates as fit, and what they
draw."""
from __future__ import annotations

import gc
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import internals
import torch
from cifar_data import CLASSES
from common import Clock, sync

WARM, TIMED = 3, 8                    # updates before those that are timed, and these
SLACK = 1.2                           # an update on real data against one on data that lies on the card
NOTICE = 60.0                         # seconds for caching pictures, the first call and the last checkpoint
PROMPTS = [f"class {i}" for i in range(CLASSES)]
BLOCKS = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1"]


@dataclass(frozen=True)
class Student:
    """A recipe, less what all share; asked: in how many steps what it trained is drawn. updates: at most."""

    method: str
    steps: int
    asked: tuple[int, ...]
    updates: int
    lr: float
    settings: Mapping[str, Any]
    images: bool = True               # whether it is shown pictures; else it sees classes alone
    critic_lr: float | None = None
    discriminator: Mapping[str, Any] | None = None
    train: Mapping[str, Any] | None = None


ADVERSARIAL = {"betas": [0.0, 0.99], "clip": 10.0}
DMD2: dict[str, Any] = {"lr": 1e-4, "critic_lr": 2e-4, "discriminator": {"lr": 2e-4}, "train": {"clip": 10.0},
                        "settings": {"critic_steps": 2, "share_rollout": True}}
STUDENTS = {
    # The law of the noise levels is the paper's of CIFAR-10; differences want more digits than bfloat16 has.
    "scm": Student("scm", 2, (1, 2, 4), 1200, 3e-4, {"mean": -1.0, "std": 1.4}, train={"precision": "fp32"}),
    "sid-1": Student("sid", 1, (1,), 2000, 1e-4, {}, images=False, critic_lr=2e-4, train={"betas": [0.0, 0.999]}),
    "sid-4": Student("sid", 4, (4,), 1700, 1e-4, {}, images=False, critic_lr=2e-4, train={"betas": [0.0, 0.999]}),
    "dmd2-1": Student("dmd2", 1, (1,), 1700, **DMD2),
    "dmd2-4": Student("dmd2", 4, (4,), 1500, **DMD2),
    "ladd-1": Student("ladd", 1, (1,), 3200, 1e-4, {"shares": [1.0], "warmup_shares": [1.0], "warmup_updates": 0,
                                                    "mean": -1.0},
                      discriminator={"features": BLOCKS, "lr": 4e-4}, train=ADVERSARIAL),
    "ladd-4": Student("ladd", 4, (4,), 3200, 1e-4, {"warmup_updates": 100, "mean": -1.0},
                      discriminator={"features": BLOCKS, "lr": 4e-4},
                      train=ADVERSARIAL),
}


def recipe(name: str, teacher: Path, images: Path, overrides: Mapping[str, Any]) -> internals.Recipe:
    """teacher: a pipeline's folder; images: a folder of classes. All weights are trained."""
    student = STUDENTS[name]
    data = {"images": str(images), "cache": True} if student.images else {"prompts": PROMPTS}
    train = {"updates": student.updates, "lr": student.lr, "warmup": 100, "decay": "cosine", "ema": 0.999,
             "weight_decay": 0.0,
             "precision": "bf16", "checkpoint_every": 500, "log_every": 100}
    asked = {"method": student.method, "teacher": str(teacher), "student": "full", "steps": student.steps,
             "settings": dict(student.settings),
             "data": {**data, "batch": 512}, "train": train | dict(student.train or {}),
             "evaluate": {"prompts": PROMPTS[:4]}}
    asked |= {} if student.critic_lr is None else {"critic": {"lora": None, "lr": student.critic_lr}}
    asked |= {} if student.discriminator is None else {"discriminator": dict(student.discriminator)}
    return internals.Recipe.load(asked, overrides)


def seconds_an_update(asked: internals.Recipe, device: torch.device) -> float:
    """Measured, on random data."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = internals.open_trainer(asked.resolved(), device, Path(folder), prompt="class")
        for i in range(WARM):
            trainer.step(i)
        sync(device)
        begun = time.perf_counter()
        for i in range(WARM, WARM + TIMED):
            trainer.step(i)
        sync(device)
        found = (time.perf_counter() - begun) / TIMED
    del trainer
    gc.collect()
    return found


def paced(asked: internals.Recipe, device: torch.device, seconds: float) -> internals.Recipe:
    """The same recipe with as many updates as these seconds have room for, at most its own."""
    fits = int((seconds - NOTICE) / (SLACK * seconds_an_update(asked, device)))
    return internals.Recipe.load(asked.resolved(), {"train.updates": max(1, min(asked.train.updates, fits))})


def train(asked: internals.Recipe, run: Path, clock: Clock) -> bool:
    """Whether it is trained to its end; where the clock has run out before, or at Ctrl-C, the run goes on from its
    checkpoint another time."""
    if internals.is_run(run) and internals.finished(run, asked):
        return True
    try:
        with alarm(clock.left):
            internals.train(asked, out=run, resume=internals.is_run(run))
    except (internals.Stopped, KeyboardInterrupt) as stopped:        # the latter before the first update
        print(f"{run.name}: {str(stopped) or 'no time was left to begin with it'}", flush=True)
        return False
    return True


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """After these, Ctrl-C: a training then keeps what it has."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3) if isfinite(seconds) else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
