"""The matrix notices: each shared block is broken once, and the rows that it stands under turn red.

`pytest -s` prints which. A fault is put wherever the block was imported to; faults that only a real network can show
are seen by the contract, in the last tests.
"""
from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from stepdistill.diffusion import draws, flow_map, guidance, times
from stepdistill.losses import adversarial, matching, regression
from stepdistill.methods import load_method
from stepdistill.proofs.problem import Problem

from .test_identities import PROVED

MATCHING = ("diff_instruct", "dmd", "dmd2", "swiftbrush")
CRITICS = (*MATCHING, "sid")
TARGETS = ("cd", "lcm", "tcd", "tract")
SEGMENTS = ("mcm", "pcm", "tscd")


def everywhere(monkeypatch, original, broken) -> None:
    """Replaces a function in every module of the package that holds it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("stepdistill"):
            for attribute, value in list(vars(module).items()):
                if value is original:
                    monkeypatch.setattr(module, attribute, broken)


def red(method: str) -> list[str]:
    """The checks of a method that fail, on one problem under each noise."""
    module = importlib.import_module(f"stepdistill.proofs.{method}")
    identities = vars(module).get("closed_forms", module.identities)      # paths have faults of their own
    found = []
    for noise in ("vp", "flow"):
        try:
            found += [check.name for check in identities(Problem(5, noise)) if not check.passed]
        except (ValueError, RuntimeError) as error:          # such as a graph that is gone: noticed, too
            found.append(f"{type(error).__name__}: {error}")
    return found


def wrong_sign(m) -> None:
    original = matching.distribution_matching
    everywhere(m, original, lambda x, real, fake, weight: original(x, fake, real, weight))


def wrong_sign_of_identity(m) -> None:
    original = matching.score_identity
    everywhere(m, original, lambda x, real, fake, alpha, weight: -original(x, real, fake, alpha, weight))


def wrong_sign_of_the_step(m) -> None:
    everywhere(m, flow_map.ddim_step, lambda p, r: _step(p, r, -1))


def _step(p, r, sign):
    coefficient = lambda c: c.reshape(-1, *[1] * (p.x_t.ndim - 1)).to(p.x_t)
    return coefficient(p.schedule.alpha(r)) * p.x0 + sign * coefficient(p.schedule.sigma(r)) * p.eps


def no_stop_gradient(m) -> None:
    """Targets and aims are not held fixed."""
    m.setattr(torch, "no_grad", _open)
    coefficient = lambda weight, x: weight.to(x).reshape(-1, *[1] * (x.ndim - 1))
    everywhere(m, matching.distribution_matching, lambda x, real, fake, weight:
               0.5 * regression.squared(x, x - coefficient(weight, x) * (fake - real)))


class _open(nullcontext):
    def __call__(self, function):
        return function


def guidance_off_by_one(m) -> None:
    original = guidance.guided
    everywhere(m, original, lambda role, w, interval=None: original(role, w - 1, interval))


def time_off_by_one(m) -> None:
    """Steps land one of a thousand times beside their time."""
    everywhere(m, flow_map.ddim_step, lambda p, r: _step(p, torch.where(r > 0, r - 1e-3, r), 1))


def told_time_off_by_one(m) -> None:
    """Samplers tell the network a time that is one of a thousand late."""
    from stepdistill.diffusion.sampler import Sampler
    original = Sampler._predict
    m.setattr(Sampler, "_predict",
              lambda self, role, x, e, cond: original(self, role, x,
                                                      replace(e, time=e.time - 1e-3, level=e.level - 1e-3), cond))


def noise_reused(m) -> None:
    """All draws of a moment are one."""
    m.setattr(draws.Step, "_key", lambda self, *name: draws.key(self.seed, self.index))


def half_a_loss(m) -> None:
    original = regression.squared
    everywhere(m, original, lambda x, y: original(x, y) / 2)


def real_for_fake(m) -> None:
    for original in (adversarial.discriminator_loss, adversarial.hinge_discriminator_loss):
        everywhere(m, original, lambda real, fake, original=original: original(fake, real))


def early_times(m) -> None:
    """Of all laws of times the nearer half alone, and another grid of Karras et al."""
    for original in (times.uniform, times.log_normal, times.logit_normal, times.discrete, times.weighted):
        everywhere(m, original, lambda *given, original=original: lambda u: original(*given)(u / 2))
    original = times.karras
    everywhere(m, original, lambda *given: original(*given, rho=1.0))


def prompt_dropped(m) -> None:
    """Samplers do not show the network its prompt."""
    from stepdistill.diffusion.sampler import Sampler
    original = Sampler._predict
    m.setattr(Sampler, "_predict", lambda self, role, x, e, cond: original(self, role, x, e, cond.null or cond))


def target_is_the_student(m) -> None:
    """The running average is not asked."""
    for method in map(load_method, TARGETS):
        m.setattr(method, "__init__", lambda self, settings, roles, *rest, original=method.__init__:
                  original(self, settings, {**roles, "target": roles["student"]}, *rest))


# fault -> methods of which at least one row must turn red
FAULTS = {
    wrong_sign: MATCHING,
    wrong_sign_of_identity: ("sid",),
    wrong_sign_of_the_step: (*SEGMENTS, "cd", "lcm", "tcd", "kd", "reflow", "tract", "lightning"),
    no_stop_gradient: (*MATCHING, "lcm", "tcd"),
    guidance_off_by_one: (*CRITICS, *SEGMENTS, "cd", "lcm", "tcd", "scm", "tract"),
    time_off_by_one: (*SEGMENTS, "cd", "lcm", "tcd", "kd", "tract"),
    told_time_off_by_one: (*CRITICS, *SEGMENTS, "cd", "ict", "lcm", "tcd", "kd", "reflow", "tract"),
    noise_reused: CRITICS,
    half_a_loss: ("kd", "reflow", "dmd"),
    real_for_fake: ("pcm", "tscd", "dmd2", "ladd", "lightning"),
    early_times: (*CRITICS, *SEGMENTS, "cd", "ict", "tcd", "scm", "add", "ladd", "reflow", "lightning"),
    prompt_dropped: CRITICS,
    target_is_the_student: TARGETS,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.long
def test_a_broken_block_turns_rows_red(fault, monkeypatch):
    for method in PROVED:                                    # imported while whole, so that the fault finds them
        importlib.import_module(f"stepdistill.proofs.{method}")
    with monkeypatch.context() as m:
        fault(m)
        found = {method: rows for method in PROVED if (rows := red(method))}
    print(f"\n{fault.__name__}: {', '.join(f'{method} {len(rows)}' for method, rows in found.items())}")
    unseen = [method for method in FAULTS[fault] if method not in found]
    assert not unseen, f"{fault.__name__} goes unseen in {unseen}"
