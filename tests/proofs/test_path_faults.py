"""Faults of the consistency and the trajectory methods, each planted alone: an identity row of the method turns red.

Every setting that changes a path has one that ignores it or takes it wrongly; `pytest -s` prints what noticed.
"""
from __future__ import annotations

import importlib
from dataclasses import fields

import pytest

from stepdistill import resources
from stepdistill.methods import load_method
from stepdistill.models.teacher import load_teacher
from stepdistill.proofs import pipelines

from .planting import Fault, first_red, identities, plant, shared_out
from .test_path_table import METHODS

DISTANCE = "distance(settings.loss, settings.huber_c)"
SQUARED, HUBER = (f'distance("{name}", settings.huber_c)' for name in ("squared", "huber"))
DECAY = 'Follows("student", settings.target_decay)'
CHOSEN = "}[settings.loss]"
SWAPPED, HALVED = 'Follows("student", 1 - settings.target_decay)', 'Follows("student", settings.target_decay / 2)'
DRAWN = "drawn(self.guidance, step)"
MIDDLE = "middle(guidance) if settings.guidance_embedding"
HIGHEST, LOWEST = (f"(guidance if isinstance(guidance, float) else guidance[{i}]) if settings.guidance_embedding"
                   for i in (-1, 0))


def of(method: str, module: str, *changes: tuple[str, str]) -> list[Fault]:
    return [Fault(f"{old} -> {new}", module, old, new, (method,)) for old, new in changes]


FAULTS = [
    *of(
        "cd", "methods.consistency.cd",
        (DISTANCE, SQUARED),
        (DISTANCE, HUBER),
        (DISTANCE, "distance(settings.loss, 0.001)"),
        (DECAY, SWAPPED),
        (DECAY, HALVED),
        ("target_decay: float = 0.95", "target_decay: float = 0.5"),
        ("settings.nodes, sampler.times)", "40, sampler.times)"),
        ("[known, sampled, torch", "[known, torch"),
        (DRAWN, "1.0"),
        ("consistency(self.target(", "consistency(self.student("),
        ("below(t, self.grid.flip(0))", "below(t, self.grid.flip(0), 2)"),
    ),
    *of(
        "cd", "diffusion.solvers",
        ("where(inner, heun_step(here, role(x, torch.where(inner, r, t), cond)), x)", "x"),
        ("heun_step(here, role(x,", "heun_step(here, role(here.x_t,"),
    ),
    *of(
        "ict", "methods.consistency.ict",
        ("doubling(settings.first_nodes,", "doubling(10,"),
        ("settings.last_nodes)", "1280)"),
        ("self.settings.mean", "1.1"),
        ("self.settings.std", "1.2"),
        ("self.settings.huber_c", "0.00054"),
        ("torch.no_grad(), step", "step"),
        ('with step.same_dropout("pair"):', 'with step.same_dropout("other"):'),
        ("like(1 / (self.level(t) - self.level(s)), apart) * apart", "apart"),
        ("self.level(t) - self.level(s)", "t - s"),
        ("self.nodes(step.progress)", "self.nodes(0.0)"),
        ("return t, below(t, nodes)", "return t, below(t, nodes, 2)"),
        ("[known, sampled]", "[known]"),
        (".tan().clamp(*SIGMAS)", ".tan()"),
        ("times[0], times[-1] = 1.0, origin(schedule)", "times[0] = 1.0"),
    ),
    *of(
        "ict", "losses.regression",
        ("(squared(x, y) + c * c).sqrt() - c", "pseudo_huber(x, y, c)"),
    ),
    *of(
        "ict", "diffusion.triples",
        ("2 ** floor(progress", "2 ** round(progress"),
    ),
    *of(
        "lcm", "methods.consistency.lcm",
        (DISTANCE, SQUARED),
        (DISTANCE, HUBER),
        (DISTANCE, "distance(settings.loss, 2 * settings.huber_c)"),
        ("self.grid, self.settings.skip)", "self.grid, 1)"),
        ("discrete(self.grid[1:])", "discrete(self.grid[:-1].clamp_min(1e-3))"),
        ("grid(settings.nodes, settings.shift)", "grid(settings.nodes)"),
        ('if self.settings.bridge == "data"', "if False"),
        ('if self.settings.bridge == "data"', "if True"),
        ("shift=settings.shift", "shift=1.0"),
        (".expand(len(batch))", ".expand(len(batch)) - 1"),
        ("self.target(x, u, cond)", "self.target(x, u, batch.cond)"),
        ("noise, s)", 'step.normal("other", batch.shape), s)'),
        ("batch.cond.replace(w=scale) if self.settings.guidance_embedding else batch.cond", "batch.cond"),
        (MIDDLE, HIGHEST),
        ('roles.get("target", self.student)', "self.student"),
        ("guided(self.teacher, w), x_t", "guided(self.teacher, 1.0), x_t"),
        (DECAY, SWAPPED),
        (DECAY, HALVED),
        ("nodes=settings.nodes", "nodes=50"),
        ("huber_c: float = 0.001", "huber_c: float = 0.01"),
        ("s, t, s > 0)", "s, t, s >= 0)"),
    ),
    *of(
        "tcd", "methods.consistency.tcd",
        (DISTANCE, SQUARED),
        (DISTANCE, HUBER),
        (DISTANCE, "distance(settings.loss, settings.huber_c / 2)"),
        ("self.grid, self.settings.skip)", "self.grid, 1)"),
        ("settings.shift, self.end)", "1.0, self.end)"),
        ("shift=settings.shift", "shift=1.0"),
        ("noise=settings.gamma", "noise=0.2"),
        ("noise=settings.gamma", "noise=1 - settings.gamma"),
        ("nodes=settings.nodes", "nodes=50"),
        ("self.target, x_s", "self.student, x_s"),
        (DECAY, SWAPPED),
        (DECAY, HALVED),
        (DRAWN, "1.0"),
        ("settings.shift, self.end)", "settings.shift)"),
    ),
    *of(
        "tcd", "diffusion.triples",
        ("(last - first + 1)", "(last - first)"),
        ("(torch.searchsorted(grid, t) - k)", "(torch.searchsorted(grid, t) - 1)"),
        ("shifted(uniform(), shift)", "uniform()"),
    ),
    *of(
        "mcm", "methods.consistency.mcm",
        ("exponential(settings.first_nodes,", "exponential(64,"),
        ("settings.last_nodes, settings.grown)", "1280, settings.grown)"),
        ("settings.last_nodes, settings.grown)", "settings.last_nodes, 0.5)"),
        ("self.nodes(step.progress)", "self.nodes(0.0)"),
        ("below(t, self.edges)", "below(t, self.edges, 2)"),
        ("grid(steps * round(self.nodes(step.progress) / steps))", "grid(steps * (1 + round(self.nodes(step.progress) "
         "/ steps)))"),
        ('if self.settings.bridge == "data"', "if False"),
        ('if self.settings.bridge == "data"', "if True"),
        ("self.settings.eta * squared", "0.75 * squared"),
        ("self.settings.eta * squared", "self.settings.eta ** 2 * squared"),
        ("squared(p.x0, batch.x0)", "squared(p.x0, x_t)"),
        ("}[settings.loss]", '}["norm"]'),
        ("}[settings.loss]", '}["squared"]'),
        ("}[settings.weight]", '}["v"]'),
        ("self.weight(self.schedule, t)", "self.weight(self.schedule, s.clamp_min(0.001))"),
        ("s, t, s > r)", "s, t, s < r)"),
        (DRAWN, "1.0"),
    ),
    *of(
        "mlcm", "methods.consistency.mlcm",
        ('settings.stage == "segments"\n', "True\n"),
        ('settings.stage == "segments"\n', "False\n"),
        ("grid(settings.nodes if", "grid(40 if"),
        ("else settings.ends)", "else 8)"),
        ("sampler.nfe if self.by_segments else 1", "1"),
        ("sampler.nfe if self.by_segments else 1", "2 * sampler.nfe if self.by_segments else 1"),
        ("below(t, self.edges)", "below(t, self.edges, 2)"),
        ("return t, below(t, self.grid),", "return t, below(t, self.grid, 2),"),
        ("self.teacher_state, 1)", "self.teacher_state, 2)"),
        ("self.student_state, settings.bridge_steps", "self.student_state, 3"),
        ("even(self.settings.state_steps)", "even(20)"),
        ("[:, None], t)", "[:, None], t - 0.01)"),
        ("s, t, s > r)", "s, t, s < r)"),
        ("with torch.no_grad():", "with torch.enable_grad():"),
        ('step.normal("noise", batch.shape), t)', 'step.normal("start", batch.shape), t)'),
        ("self.sampler(self.student", "self.sampler(self.teacher"),
        ("ddim(teacher, step", "ddim(self.teacher, step"),
        ("nodes=settings.ends)", "nodes=8)"),
        ("Inference(steps, noise=1.0", "Inference(steps, noise=0.0"),
        (DRAWN, "1.0"),
    ),
    *of(
        "mcm", "diffusion.solvers",
        ("x) + missing).sqrt()", "x) - missing).sqrt()"),
    ),
    *of(
        "mcm", "losses.regression",
        ("difference.shape[1] ** 0.5", "difference.shape[1]"),
    ),
    *of(
        "scm", "methods.consistency.scm",
        (DRAWN, "1.0"),
    ),
    *of(
        "scm", "diffusion.continuous",
        ("min(time(1 - i / steps), first)", "time(1 - i / steps)"),
        ("NOISIEST_FLOW if isinstance(schedule, RectifiedFlow) else NOISIEST", "NOISIEST"),
        ("if discrete and first == 1:", "if discrete:"),
        ("shifted(uniform(), SHIFT)", "uniform()"),
    ),
    *of(
        "scm", "losses.continuous",
        ("settings.mean, settings.std)", "-0.1, settings.std)"),
        ("settings.mean, settings.std)", "settings.mean, 1.6)"),
        ("min(1.0, progress / self.settings.warmup)", "min(1.0, progress / 0.1)"),
        ("if self.settings.warmup else 1.0", "if self.settings.warmup else 0.0"),
        ("self.settings.damping)", "0.1)"),
        ('self.settings.derivative == "exact"', "True"),
        ("exact(field, x, t, velocity, RADIAN)", "trig_pair(field, x, t, velocity, self.settings.width, self.first)"),
        ("self.settings.width, self.first", "2 * self.settings.width, self.first"),
    ),
    *of(
        "scm", "losses.tangent",
        ("- r * cos * sin * (x + slope)", "- r * cos * sin * slope"),
    ),
    *of(
        "flow_map", "methods.consistency.flow_map",
        ('self.settings.form == "eulerian"', "True"),
        ('self.settings.form == "eulerian"', "False"),
        ('self.trajectory_loss if self.settings.form == "trajectory"', "self.trajectory_loss if False"),
        ("settings.mean, settings.std)", "-0.8, settings.std)"),
        ("settings.mean, settings.std)", "settings.mean, 1.0)"),
        ('step.uniform("alike") < self.settings.alike', 'step.uniform("alike") < 0'),
        ("min(1.0, step.progress / self.settings.warmup)", "min(1.0, step.progress / 0.1)"),
        ("if self.settings.warmup else 1.0", "if self.settings.warmup else 0.0"),
        ("self.settings.damping)", "0.1)"),
        ('self.settings.derivative == "exact"', "True"),
        ("}[self.settings.derivative]", '}["pair"]'),
        ("length.clamp(LEAST, self.settings.width)", "length.clamp(LEAST, 0.03)"),
        ("cond, self.settings.solver_steps)", "cond, 4)"),
        ("self.settings.output_weight *", "1.0 *"),
        ("self.settings.velocity_weight *", "1.0 *"),
        ("- k * length * du", "- k * du"),
        ("0 * x, -1.0, t - r)", "0 * x, 1.0, t - r)"),
        ("teacher(x - length * u, r.clamp", "teacher(x, r.clamp"),
        ("r.clamp(min=self.first), batch", "t, batch"),
        ("cond.replace(r=self.own.time_at(FLOW.angle(r)))", "cond.replace(r=r)"),
        ("cond.replace(r=self.own.time_at(FLOW.angle(r)))", "cond.replace(r=0 * r)"),
        ("torch.where(r < self.first, 0.0,", "torch.where(r < self.first, r,"),
        ("return Inference(steps)", "return Inference(steps, noise=1.0)"),
        ("drawn(self.guidance, step))\n        x =", "1.0)\n        x ="),
        ("drawn(self.guidance, step))\n        s, early", "1.0)\n        s, early"),
    ),
    *of(
        "flow_map", "losses.tangent",
        ("2 * half - whole", "whole"),
        ("return torch.ones_like(back), back", "return torch.ones_like(back), 2 * back"),
    ),
    *of(
        "flow_map", "diffusion.triples",
        ("torch.where(alike, t, torch.minimum(one, other))", "torch.minimum(one, other)"),
    ),
    *of(
        "boot", "methods.trajectory.boot",
        ("grid(settings.nodes)", "grid(40)"),
        ("self.settings.solver_steps)", "1)"),
        ("self.signal(e, t, batch.cond), e,", "self.signal(e, s, batch.cond), e,"),
        ("squared(self.signal(e, s, batch.cond)", "squared(self.signal(e, t, batch.cond)"),
        ("torch.ones_like(t), cond.replace(r=t)", "t, cond.replace(r=t)"),
        (DRAWN, "1.0"),
        ("with torch.no_grad():", "with torch.enable_grad():"),
    ),
    *of(
        "guided", "methods.trajectory.guided",
        ("}[settings.weight]", '}["truncated"]'),
        (MIDDLE, HIGHEST),
        (MIDDLE, LOWEST),
        ("with_scale(batch.cond, w) if self.settings.guidance_embedding",
         "with_scale(batch.cond, w - 1) if self.settings.guidance_embedding"),
        ("if self.settings.guidance_embedding else batch.cond", "if True else batch.cond"),
        ('reads=("w",) * settings.guidance_embedding', "reads=()"),
        (DRAWN, "drawn(self.guidance, step) + 0.5"),
    ),
    *of(
        "kd", "methods.trajectory.kd",
        ('"absolute": absolute', '"absolute": squared'),
        (CHOSEN, '}["absolute"]'),
    ),
    *of(
        "kd", "diffusion.contracts",
        ("self.nodes[:, every - 1::every]", "self.nodes[:, 0::every]"),
        ("times[rows, j + 1]", "times[rows, j + 1] / 2"),
    ),
    *of(
        "progressive", "methods.trajectory.progressive",
        ("}[settings.weight]", '}["truncated"]'),
        ("with_scale(batch.cond, w) if", "with_scale(batch.cond, w - 1) if"),
        (MIDDLE, HIGHEST),
        ('reads=("w",) * settings.guidance_embedding', "reads=()"),
        ("guided(self.teacher, w)", "self.teacher"),
    ),
    *of(
        "progressive", "diffusion.sampler",
        ("trailing(2 * self.nfe", "trailing(2 * self.nfe + 2"),
    ),
    *of(
        "progressive", "diffusion.bridges",
        ("ddim_step(role(x_m, m, cond), r)", "ddim_step(role(x_m, t, cond), r)"),
    ),
    *of(
        "snapfusion", "methods.trajectory.snapfusion",
        ("< self.settings.guided_share", "< 0.1"),
        ("< self.settings.guided_share", "< 1 - self.settings.guided_share"),
        ("losses[\"denoising\"] = self.settings.denoising_weight *", "losses[\"denoising\"] = 0.2 *"),
        ("}[settings.weight]", '}["truncated"]'),
        ("two_in_one(guided(self.teacher, w)", "two_in_one(self.teacher"),
        ("student = guided(self.student, w)", "student = self.student"),
        ("plain = found if student is self.student else", "plain = found if True else"),
        ("cfg=middle(guidance)", "cfg=1.0"),
        (DRAWN, "1.0"),
    ),
    *of(
        "progressive", "diffusion.readers",
        ("_sigma_levels(scheduler, schedule)\n    return _start(scheduler), [",
         "_sigma_levels(scheduler, schedule)\n    return 1.01, ["),
    ),
    *of(
        "reflow", "methods.trajectory.reflow",
        (DISTANCE, SQUARED),
        (DISTANCE, HUBER),
        (DISTANCE, "distance(settings.loss, 0.001)"),
        ("if settings.distil else", "if False else"),
        ("discrete(sampler.times)", "discrete(sampler.times[:1])"),
        ("found.eps - found.x0", "found.eps"),
        ("schedule.time_at(flow.angle(place(u)))", "place(u)"),
    ),
    *of(
        "tract", "methods.trajectory.tract",
        ("grid(settings.nodes), grid(sampler.nfe)", "grid(settings.nodes), grid(4)"),
        ("grid(settings.nodes), grid(sampler.nfe)", "grid(40), grid(sampler.nfe)"),
        ("s, t, s > r)", "s, t, s >= r)"),
        ("below(t, self.edges)", "below(t, self.edges, 2)"),
        ("flow_map(self.target", "flow_map(self.student"),
        (DRAWN, "1.0"),
        (DECAY, SWAPPED),
        (DECAY, HALVED),
        ("truncated_snr(self.schedule, t)", "truncated_snr(self.schedule, s)"),
    ),
    *of(
        "tract", "models.ema",
        ("self.leader, 1 - self.decay", "self.leader, self.decay"),
    ),
    *of(
        "lcm", "diffusion.guidance",
        ("return low + (high - low) * step.uniform", "return low + 0 * step.uniform"),
        ("return replace(role, w=w)", "return Guided(role, w, interval)"),
    ),
    *of(
        "lcm", "models.schedulers",
        ("inference.nodes or inference.steps", "inference.steps"),
        ("(nodes - nodes * i // steps) / nodes", "1 - i / steps"),
        ('{"shift": inference.shift}', '{"shift": 1.0}'),
        ("= inference.guidance", "= 1.0"),
    ),
    *of(
        "lcm", "diffusion.contracts",
        ("self.null if self.negative is None else self.negative", "self.null"),
    ),
    *of(
        "lcm", "run.negatives",
        ('if name == "student" or isinstance(need, Follows)', 'if name == "student"'),
        ("guided(roles[name], scale)", "guided(roles[name], scale / 2)"),
        ("if scale is None:", "if True:"),
    ),
    *of(
        "lcm", "models.schedulers",
        ("guidance.call(inference.cfg)", "guidance.none"),
    ),
    *of(
        "flow_map", "diffusion.guidance",
        ("cond.against.replace(extra=cond.extra), cond", "cond.against, cond"),
    ),
    *of(
        "tcd", "models.schedulers",
        ('{"eta": inference.noise}', '{"eta": 0.2}'),
        ("if inference.noise:", "if False:"),
    ),
    *of(
        "cd", "diffusion.guidance",
        ("return replace(role, w=w)", "return Guided(role, w, interval)"),
    ),
    *of(
        "lcm", "diffusion.consistency",
        ("(LEVELS * t - 1)", "LEVELS * t"),
    ),
    *of(
        "kd", "losses.regression",
        ("(x - y).abs()", "2 * (x - y).abs()"),
    ),
    *of(
        "d_ode", "methods.trajectory.d_ode",
        ("x = here, x.detach()", "x = here, x"),
        ("/ settings.substeps\n", "/ 10\n"),
        ("squared(x, aims[i])", "squared(x, aims[i - 1])"),
        ('solver=settings.output)', 'solver="eps")'),
        ('guided(roles["teacher"], middle(guidance))', 'guided(roles["teacher"], 1.0)'),
        ("cfg=middle(guidance)", "cfg=1.0"),
        ("self.student.shares[i - 1]", "self.student.shares[0]"),
        ("before, x = here,", "before, x = before or here,"),
    ),
    *of(
        "d_ode", "diffusion.mixing",
        ("- before.view(output)", "- 0 * before.view(output)"),
        ("ddim_step(here, r) + share", "ddim_step(here, r) - share"),
    ),
    *of(
        "d_ode", "diffusion.sampler",
        ("for share in role.shares.tolist()", "for share in role.shares.flip(0).tolist()"),
    ),
    *of(
        "d_ode", "models.own_schedulers",
        ("self.shares[self.done - 1]", "self.shares[self.done - 2]"),
        ("self.done, self.before = self.done + 1, now", "self.done, self.before = 1, now"),
    ),
]


@pytest.mark.parametrize("fault", shared_out(FAULTS), ids=lambda fault: f"{fault.methods[0]}: {fault.name}")
def test_a_planted_fault_turns_a_row_red(fault, monkeypatch):
    method, = fault.methods
    importlib.import_module(f"stepdistill.proofs.{method}")                 # whole, before its method is not
    plant(monkeypatch, fault)
    noticed = first_red(identities(method))
    print(f"\n{fault.name}\n    {noticed}")
    assert noticed, f"goes unseen: {fault.name}"


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_has_a_fault(method):
    lines = " ".join(fault.old for fault in FAULTS if fault.methods == (method,))
    assert not [f.name for f in fields(load_method(method).Settings) if f"settings.{f.name}" not in lines]


@pytest.mark.parametrize("teacher", ["assets/shapes-sd", "assets/shapes-sd3"])
def test_another_null_prompt_is_seen(teacher, monkeypatch):
    """As if a family encoded some word for the negative prompt that nobody gave."""
    family = load_teacher(resources.pipeline(teacher))
    encode = type(family).encode
    monkeypatch.setattr(type(family), "encode", lambda self, prompts:
                        encode(self, prompts).replace(null=encode(self, ["bad"] * len(prompts))))
    assert [check.passed for check in pipelines.conditions(family, 1)] == [False, False]
    monkeypatch.undo()
    assert all(check.passed for check in pipelines.conditions(family, 1))
