from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stepdistill.diffusion import guidance
from stepdistill.diffusion.contracts import Condition
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.guidance import autoguided, guided, self_guided, with_scale
from stepdistill.diffusion.prediction import Prediction, linear
from stepdistill.diffusion.views import viewed

from .schedules import SCHEDULES

F64 = torch.float64


class Told:
    """Answers with its condition's text and counts its calls."""

    schedule = SCHEDULES["vp"]

    def __init__(self):
        self.batches: list[int] = []

    def __call__(self, x_t, t, cond=None):
        self.batches.append(len(x_t))
        return Prediction(cond.text * x_t, x_t, t, self.schedule, "eps")


def case():
    cond = Condition(text=torch.full((3, 1), 2.0), null=Condition(text=torch.full((3, 1), 0.5)))
    return Told(), torch.ones(3, 1), torch.tensor([0.1, 0.5, 0.9], dtype=F64), cond


def test_guidance_mixes_raw_outputs_in_one_doubled_call():
    role, x, t, cond = case()
    p = guided(role, 3.0)(x, t, cond)
    assert p.raw.flatten().tolist() == [0.5 + 3 * 1.5] * 3 and role.batches == [6]
    assert p.kind == "eps" and torch.equal(p.x_t, x) and torch.equal(p.t, t)


def test_guidance_takes_a_scale_for_each_sample():
    role, x, t, cond = case()
    assert guided(role, torch.tensor([0.0, 1.0, 2.0]))(x, t, cond).raw.flatten().tolist() == [0.5, 2.0, 3.5]


def test_a_scale_of_one_is_the_role_itself_and_needs_no_null():
    role, x, t, cond = case()
    assert guided(role, 1) is role and guided(role, 1.0) is role
    with pytest.raises(ValueError, match="null"):
        guided(role, 2.0)(x, t, cond.replace(null=None))


def test_outside_the_interval_the_condition_stands_alone():
    role, x, t, cond = case()
    p = guided(role, 3.0, interval=(0.4, 0.6))(x, t, cond)
    assert p.raw.flatten().tolist() == [2.0, 5.0, 2.0]
    guided(role, 3.0, interval=(0.95, 1.0))(x, t, cond)
    assert role.batches == [6, 3]                                     # nobody inside: no doubled call


def test_autoguidance_moves_away_from_the_worse_network_whatever_it_predicts():
    s = SCHEDULES["flow"]
    good = Gaussian(s, torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), kind="velocity")
    bad = Gaussian(s, torch.ones(2, dtype=F64), torch.full((2,), 3.0, dtype=F64), kind="eps")
    x, t = torch.tensor([[0.3, -2.0]], dtype=F64), torch.tensor([0.4], dtype=F64)
    expected = bad(x, t).x0 + 2.5 * (good(x, t).x0 - bad(x, t).x0)
    assert torch.allclose(autoguided(good, bad, 2.5)(x, t).x0, expected)


@pytest.mark.parametrize("trained", ["vp-zero", "flow", "flow-3", "trig"])
@pytest.mark.parametrize("shown", SCHEDULES)
@pytest.mark.parametrize("kind", ["eps", "v", "velocity"])
def test_a_viewed_gaussian_is_the_gaussian_of_that_schedule(trained, shown, kind):
    mean, variances = torch.tensor([0.7, -1.0], dtype=F64), torch.tensor([0.36, 2.0], dtype=F64)
    t = torch.tensor([0.01, 0.3, 0.72, 0.99], dtype=F64)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    seen = viewed(Gaussian(SCHEDULES[trained], mean, variances, kind), SCHEDULES[shown])(x, t)
    own = Gaussian(SCHEDULES[shown], mean, variances)(x, t)
    assert torch.allclose(seen.x0, own.x0, atol=1e-9) and torch.allclose(seen.eps, own.eps, atol=1e-9)
    assert torch.allclose(seen.velocity, own.velocity, atol=1e-7)


@pytest.mark.parametrize("trained", ["vp", "vp-zero", "trig"])
def test_a_view_is_regular_at_both_ends_and_keeps_x0_beyond_the_networks_last_noise(trained):
    role = Gaussian(SCHEDULES[trained], torch.tensor([0.7], dtype=F64), torch.tensor([0.36], dtype=F64))
    x, t = torch.tensor([[0.4], [0.4]], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    seen = viewed(role, SCHEDULES["flow"])(x, t)
    assert torch.allclose(seen.x0[0], x[0])
    assert torch.allclose(seen.x0[1], role(x[1:], t[1:]).x0) and torch.allclose(seen.eps[1], x[1])


def test_a_role_under_its_own_schedule_is_itself():
    role = Gaussian(SCHEDULES["trig"], torch.zeros(1), torch.ones(1))
    assert viewed(role, SCHEDULES["trig"]) is role


def test_a_role_that_has_its_guidance_within_is_not_guided_again():
    role, x, t, cond = case()
    for w in (1.0, 3.0, torch.tensor([1.0, 2.0, 3.0])):
        assert torch.equal(guided(self_guided(role, guidance_embedding=False), w)(x, t, cond).raw, 2.0 * x)
    assert role.batches == [3, 3, 3]
    with pytest.raises(ValueError, match="leave the interval out"):
        guided(self_guided(role, guidance_embedding=False), 3.0, (0.2, 0.8))


def test_a_role_that_is_told_its_scale_is_told_it_for_each_sample():
    _, x, t, cond = case()
    scales = []

    class Listens:
        schedule = SCHEDULES["vp"]

        def __call__(self, x_t, t, cond=None):
            scales.append(cond.w)
            return Prediction(x_t, x_t, t, self.schedule, "eps")

    role = self_guided(Listens(), guidance_embedding=True)
    for w in (1.0, torch.tensor([1.0, 2.0, 3.0], dtype=F64)):
        guided(role, w)(x, t, cond)
    role(x, t, cond)
    assert (scales[0].tolist() == [1, 1, 1] and scales[1].tolist() == [1, 2, 3] and scales[2] is None
            and role.schedule is SCHEDULES["vp"])
    assert with_scale(cond, 2).w.dtype == F64 and cond.w is None
    with pytest.raises(ValueError, match="goes into a condition"):
        with_scale(None, 2.0)


class Network(Told):
    """As Told, and it notes the scales that it is told; its outputs are mixed by `combine`."""

    def __init__(self, combine):
        super().__init__()
        self.combine, self.scales = combine, []

    def __call__(self, x_t, t, cond=None):
        self.scales.append(None if cond.w is None else cond.w.tolist())
        return replace(super().__call__(x_t, t, cond), combine=self.combine)


def capped(given, without, w):
    """A guidance that is not linear."""
    return without + w * (given - without).clamp(max=0.4)


VIEWS = {"viewed": lambda role: viewed(role, SCHEDULES["flow"]),
         "viewed in trig": lambda role: viewed(role, SCHEDULES["trig"]),
         "autoguided": lambda role: autoguided(role, role, 1.5)}
WITHIN = {"self-guided": lambda role: self_guided(role, guidance_embedding=False),
          "self-guided, told": lambda role: self_guided(role, guidance_embedding=True)}
WRAPPERS = VIEWS | WITHIN


@pytest.mark.parametrize("inner", VIEWS)
@pytest.mark.parametrize("outer", VIEWS)
@pytest.mark.parametrize("combine", [linear, capped])
def test_guidance_mixes_the_network_s_own_outputs_within_any_two_wrappers(outer, inner, combine):
    _, x, t, cond = case()
    wrapped = lambda role: VIEWS[outer](VIEWS[inner](role))
    found, known = guided(wrapped(Network(combine)), 3.0), wrapped(guided(Network(combine), 3.0))
    assert torch.equal(found(x, t, cond).raw, known(x, t, cond).raw)
    unguided = wrapped(Network(combine))(x, t, cond).x0
    assert (found(x, t, cond).x0 - unguided).abs().min() > 0.01
    assert torch.allclose(guided(wrapped(Network(combine)), 1.0)(x, t, cond).x0, unguided)


@pytest.mark.parametrize("inner, outer", [(a, b) for a in WRAPPERS for b in WRAPPERS if {a, b} & WITHIN.keys()])
def test_guidance_within_is_found_under_any_wrapper_and_not_added_to(outer, inner):
    _, x, t, cond = case()
    role = Network(linear)
    wrapped = WRAPPERS[outer](WRAPPERS[inner](role))
    alone = wrapped(x, t, cond)
    asked = len(role.batches)
    assert torch.equal(guided(wrapped, 3.0)(x, t, cond).raw, alone.raw)
    assert role.batches == [3] * (2 * asked)
    tells = "told" in (outer if outer in WITHIN else inner)             # the outer of two decides
    assert role.scales[:asked] == [None] * asked and role.scales[asked:] == [[3.0] * 3 if tells else None] * asked
    with pytest.raises(ValueError, match="leave the interval out"):
        guided(wrapped, 3.0, (0.2, 0.8))


@pytest.mark.parametrize("wrap", VIEWS.values())
def test_nothing_is_guided_twice(wrap):
    role = guided(Network(linear), 2.0)
    for found in (role, wrap(role)):
        with pytest.raises(ValueError, match="guided already, at w = 2.0"):
            guided(found, 3.0)


def test_an_interval_is_of_the_times_that_are_seen():
    _, x, t, cond = case()
    seen = guided(viewed(Network(linear), SCHEDULES["flow"]), 3.0, (0.4, 0.6))(x, t, cond)
    on, off = (guided(viewed(Network(linear), SCHEDULES["flow"]), w)(x, t, cond) for w in (3.0, 1.0))
    assert torch.allclose(seen.raw, torch.where(torch.tensor([[False], [True], [False]]), on.raw, off.raw))


def test_every_role_that_is_made_of_a_role_is_a_wrapper():
    """So that `guided` sees what lies in it: a class of the maths or the models that holds a Role and answers as
    one."""
    found = []
    for part in ("diffusion", "models", "methods", "losses"):
        for path in sorted((Path(guidance.__file__).parents[1] / part).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    holds = [a for a in node.body if isinstance(a, ast.AnnAssign)
                             and ast.unparse(a.annotation) == "Role"]
                    calls = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__call__"]
                    bases = [ast.unparse(base) for base in node.bases]
                    if "Wrapper" in bases:
                        found.append(node.name)
                    elif holds and calls:
                        assert node.name == "Wrapper", f"{path.name}: {node.name} holds a role and is none of Wrapper's"
    assert {"Viewed", "Guided", "SelfGuided", "Autoguided"} <= set(found)
