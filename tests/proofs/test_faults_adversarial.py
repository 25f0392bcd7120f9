"""Faults planted in the adversarial methods, and in the blocks that they share: each turns a row red."""
from __future__ import annotations

import pytest

from .planting import Fault, first_red, plant, whole

ADD, LADD, LIGHT = "add", "ladd", "lightning"
METHODS = (ADD, LADD, LIGHT)
OF = {name: f"methods.adversarial.{name}" for name in METHODS}


def of(method: str, name: str, old: str, new: str, count: int = 1) -> Fault:
    return Fault(name, OF[method], old, new, (method,), count)


FAULTS = (
    # ADD
    of(ADD, "R1 on fake features", "r1(logits, real)", "r1(self.discriminator([m.requires_grad_() for m in fake], batch.cond), fake)"),
    of(ADD, "twice x as the latents' distance", 'self.settings.distance == "pixels" else x, aim)', 'self.settings.distance == "pixels" else 2 * x, aim)'),
    of(ADD, "always in pixels", 'self.settings.distance == "pixels"', "True", count=2),
    of(ADD, "always in latents", 'self.settings.distance == "pixels"', "False", count=2),
    of(ADD, "distillation_weight unread", "self.settings.distillation_weight * self.distillation", "2.5 * self.distillation"),
    of(ADD, "distillation at weight 0", "if not self.settings.distillation_weight:\n            return losses", "if False:\n            return losses"),
    of(ADD, "r1_weight unread", "weight = self.settings.r1_weight", "weight = 1e-5"),
    of(ADD, "no R1", "if weight else {}", "if False else {}"),
    of(ADD, "noise unread", "if self.settings.noise:", "if False:"),
    of(ADD, "noise at its largest deviation always", "self.settings.noise * like(step.uniform(f\"deviation of {name}\"), pixels)", "self.settings.noise"),
    of(ADD, "noise on the fake alone", "        if self.settings.noise:", '        if self.settings.noise and name == "fake":'),
    of(ADD, "noise on the real alone", "        if self.settings.noise:", '        if self.settings.noise and name == "real":'),
    of(ADD, "real and fake under one noise", 'f"noise on {name}"', '"noise on fake"'),
    of(ADD, "real and fake under one deviation", 'f"deviation of {name}"', '"deviation of fake"'),
    of(ADD, "nodes unread", "discrete(nodes(settings.nodes))", "discrete(nodes(4))"),
    of(ADD, "critic_steps unread", "count = self.settings.critic_steps", "count = 1"),
    of(ADD, "critic steps on fresh batches", "repeat=count, shares=count", "repeat=count, shares=1"),
    of(ADD, "the heads learn from the data as fake", 'step.kept["pixels"], step, "fake"', 'self.decode(batch.x0), step, "fake"'),
    of(ADD, "real and fake swapped in the game", "hinge_tell_apart(logits, self.discriminator(fake, batch.cond))",
       "hinge_tell_apart(self.discriminator(fake, batch.cond), logits)"),
    of(ADD, "the mean over heads for the student", "batch.cond)).sum(1).mean()}", "batch.cond)).mean()}"),
    of(ADD, "the mean over heads in the game", "self.discriminator(fake, batch.cond)).sum(1)", "self.discriminator(fake, batch.cond)).mean(1)"),
    of(ADD, "the heads without the prompt", "self.discriminator(real, batch.cond)", "self.discriminator(real, batch.cond.null)"),
    of(ADD, "fooled without the prompt", 'step, "fake"), batch.cond))', 'step, "fake"), batch.cond.null))'),
    of(ADD, "the student without the prompt", "s), s, batch.cond).x0", "s), s, batch.cond.null).x0"),
    of(ADD, "noised data at s = 1", "self.schedule.start(", "self.schedule.add_noise("),
    of(ADD, "started from the sample's own noise", 'step.normal("noise", batch.shape), t)', 'step.normal("start", batch.shape), t)'),
    of(ADD, "teacher not guided", "guided(self.teacher, drawn(self.guidance, step))", "self.teacher"),
    of(ADD, "the teacher's aim not held fixed", "with torch.no_grad():\n            x_t", "with torch.enable_grad():\n            x_t"),
    of(ADD, "c = alpha^2", "self.schedule.alpha(t).to(error) * error", "self.schedule.alpha(t).to(error) ** 2 * error"),
    of(ADD, "c = 1", "self.schedule.alpha(t).to(error) * error", "error"),
    of(ADD, "heads that train the student", 'Update(("discriminator",), self.critic_loss', 'Update(("student",), self.critic_loss'),
    # LADD
    of(LADD, "warm unread", "step.index < self.settings.warm", "step.index < 500"),
    of(LADD, "one step more of warm-up", "step.index < self.settings.warm", "step.index <= self.settings.warm"),
    of(LADD, "no warm-up", "self.first if step.index < self.settings.warm else self.later", "self.later"),
    of(LADD, "the laws swapped", "self.first, self.later =", "self.later, self.first ="),
    of(LADD, "shares unread", "weighted(grid, settings.shares)", "weighted(grid, (0.7, 0.1, 0.1, 0.1)[:len(grid)])"),
    of(LADD, "first_shares unread", "weighted(grid, settings.first_shares)", "weighted(grid, (0.0, 0.0, 0.5, 0.5)[-len(grid):])"),
    of(LADD, "the grid upside down", "nodes(len(settings.shares)).flip(0)", "nodes(len(settings.shares))"),
    of(LADD, "mean unread", "logit_normal(settings.mean, settings.std)", "logit_normal(1.0, settings.std)"),
    of(LADD, "std unread", "logit_normal(settings.mean, settings.std)", "logit_normal(settings.mean)"),
    of(LADD, "sigma taken for the time", "self.schedule.time_at(RectifiedFlow().angle(self.logit_normal(u)))", "self.logit_normal(u)"),
    of(LADD, "critic_steps unread", "count = self.settings.critic_steps", "count = 1"),
    of(LADD, "critic steps on fresh batches", "repeat=count, shares=count", "repeat=count, shares=1"),
    of(LADD, "sample kept with its gradient", 'step.kept["sample"] = x.detach()', 'step.kept["sample"] = x'),
    of(LADD, "the data judged as fake", 'step.kept["sample"], batch, step, "fake"', 'batch.x0, batch, step, "fake"'),
    of(LADD, "real and fake swapped in the game", "hinge_tell_apart(real, fake)", "hinge_tell_apart(fake, real)"),
    of(LADD, "real and fake at one level", 'f"{name} s"', '"fake s"'),
    of(LADD, "real and fake under one noise", 'f"{name} noise"', '"fake noise"'),
    of(LADD, "judged without noise", 'self.discriminator(self.schedule.add_noise(x, step.normal(f"{name} noise", batch.shape), s), s', "self.discriminator(x, s"),
    of(LADD, "judged without the prompt", "batch.shape), s), s, batch.cond)", "batch.shape), s), s, batch.cond.null)"),
    of(LADD, "judged at noise's end", "batch.shape), s), s, batch.cond)", "batch.shape), s), 0 * s + 1, batch.cond)"),
    of(LADD, "noised data at t = 1", "self.schedule.start(", "self.schedule.add_noise("),
    of(LADD, "the student without the prompt", "t), t, batch.cond).x0", "t), t, batch.cond.null).x0"),
    of(LADD, "heads of the student", 'Heads("teacher")', 'Heads("student")'),
    # Lightning
    of(LIGHT, "what reached the data is stepped on again", "on = t > 0", "on = t >= 0"),
    of(LIGHT, "the game's teacher not guided", "        real = self.taught(x_t, times, batch, step)",
       "        self.guidance = 1.0\n        real = self.taught(x_t, times, batch, step)"),
    of(LIGHT, "the teacher never guided", "guided(self.teacher, drawn(self.guidance, step))", "self.teacher"),
    of(LIGHT, "guided at the middle of a range", "drawn(self.guidance, step)", "(self.guidance if isinstance(self.guidance, float) else sum(self.guidance) / 2)"),
    of(LIGHT, "starts unread", "settings.starts or sampler.nfe", "sampler.nfe"),
    of(LIGHT, "starts at every node", "settings.starts or sampler.nfe", "settings.nodes"),
    of(LIGHT, "starts one early", '(step.integers("start", self.starts) + 1)', '(step.integers("start", self.starts) + 0)'),
    of(LIGHT, "nodes one too few", "torch.arange(self.small + 1)", "torch.arange(self.small)"),
    of(LIGHT, "landings below the data", "[:, None]).clamp_min(0)", "[:, None]).abs()"),
    of(LIGHT, "one large step of the teacher", "for t, r in pairwise(times):", "for t, r in [(times[0], times[-1])]:"),
    of(LIGHT, "judged_at unread", "if not self.settings.judged_at:", "if True:"),
    of(LIGHT, "judged_at's first level alone", '(step.uniform("judged s"))', '(0 * step.uniform("judged s"))'),
    of(LIGHT, "all landings noised", "torch.where(like(r > 0, x_r).bool(), x_r, noised)", "noised"),
    of(LIGHT, "the level of the noise not told", "torch.where(r > 0, r, s)", "r.clamp_min(1 / LEVELS)"),
    of(LIGHT, "told time 0 on the data", "r.clamp_min(1 / LEVELS)", "r"),
    of(LIGHT, "real and fake under noises of their own", 'step.normal("judged noise", x_r.shape[1:])', 'step.normal(f"judged noise {x_r.sum().item()}", x_r.shape[1:])'),
    of(LIGHT, "pair taken for single", '"single": self.of_one', '"single": self.of_pair'),
    of(LIGHT, "single taken for pair", '"pair": self.of_pair', '"pair": self.of_one'),
    of(LIGHT, "heads that know no pairs", 'Heads("critic", pair=settings.objective == "pair")', 'Heads("critic")'),
    of(LIGHT, "the game in place of mse", '"mse": None}', '"mse": self.of_one}'),
    of(LIGHT, "ends of a pair swapped", "self.discriminator.pair(*self.shown(x_r, times[-1], step), x_t, times[0], batch.cond)",
       "self.discriminator.pair(x_t, times[0], *self.shown(x_r, times[-1], step), batch.cond)"),
    of(LIGHT, "told the landing's time twice", "x_t, times[0], batch.cond)\n\n    def of_one", "x_t, times[-1], batch.cond)\n\n    def of_one"),
    of(LIGHT, "landing judged without the prompt", "(*self.shown(x_r, times[-1], step), batch.cond)", "(*self.shown(x_r, times[-1], step), batch.cond.null)"),
    of(LIGHT, "real and fake swapped in the game", "for x_r in (real, fake))", "for x_r in (fake, real))"),
    of(LIGHT, "landing kept with its gradient", "x_r=x_r.detach()", "x_r=x_r"),
    of(LIGHT, "the heads' states are drawn anew", '(step.kept[name] for name in ("x_t", "times", "x_r"))',
       '(*self.started(batch, step), step.kept["x_r"])'),
    of(LIGHT, "critic on a fresh batch", "self.critic_loss, shares=1)", "self.critic_loss)"),
    of(LIGHT, "the critic stays", 'Update(("critic", "discriminator"), self.critic_loss', 'Update(("discriminator",), self.critic_loss'),
    of(LIGHT, "the student lands at half way", "flow_map(self.student, x_t, times[0], times[-1], batch.cond)",
       "flow_map(self.student, x_t, times[0], times[len(times) // 2], batch.cond)"),
    of(LIGHT, "noised data at t = 1", "self.schedule.start(", "self.schedule.add_noise("),
    of(LIGHT, "a sampler of one step more", "return deterministic(steps, schedule)", "return deterministic(2 * steps, schedule)"),
    of(LIGHT, "a sampler with fresh noise", "return deterministic(steps, schedule)",
       "from ..base import renoised\n        return renoised(steps, schedule)"),
    # what they share
    Fault("the wrong sign of fooling", "losses.adversarial", "return softplus(-fake)", "return softplus(fake)", (LIGHT,)),
    Fault("saturating", "losses.adversarial", "return softplus(-fake)", "return -softplus(fake)", (LIGHT,)),
    Fault("the wrong sign of hinge fooling", "losses.adversarial", "    return -fake", "    return fake", (ADD, LADD)),
    Fault("a margin of 2", "losses.adversarial", "relu(1 - real)", "relu(2 - real)", (ADD, LADD)),
    Fault("no margin", "losses.adversarial", "relu(1 - real) + relu(1 + fake)", "-real + fake", (ADD, LADD)),
    Fault("softplus for the hinge", "losses.adversarial", "relu(1 - real) + relu(1 + fake)", "softplus(-real) + softplus(fake)", (ADD, LADD)),
    Fault("the hinge for softplus", "losses.adversarial", "softplus(-real) + softplus(fake)", "relu(1 - real) + relu(1 + fake)", (LIGHT,)),
    Fault("the mean of R1 over a map", "losses.adversarial", ".flatten(1).sum(1)", ".flatten(1).mean(1)", (ADD,)),
    Fault("R1 that trains nothing", "losses.adversarial", "create_graph=True", "create_graph=False", (ADD,)),
    Fault("R1 of the first map alone", "losses.adversarial", "for slope in slopes", "for slope in slopes[:1]", (ADD,)),
    Fault("noised data where sampling starts", "diffusion.schedule", "like(t >= 1, x0)", "like(t > 1, x0)", METHODS),
    Fault("the first share too seldom", "diffusion.times", "right=True).clamp", "right=False).sub(1).clamp(min=0).clamp", (LADD,)),
    Fault("nodes from 0", "diffusion.times", "torch.arange(1, n + 1, dtype=torch.float64) / n", "torch.arange(0, n, dtype=torch.float64).clamp(min=0.5) / n", (ADD, LADD)),
    Fault("the log-normal's sigmoid mirrored", "diffusion.times", "(mean + std * _normal(u)).sigmoid()", "(-mean - std * _normal(u)).sigmoid()", (LADD,)),
    Fault("DDIM keeps its noise level", "diffusion.flow_map", "like(schedule.alpha(r), x_t) * prediction.x0 + like(schedule.sigma(r), x_t) * prediction.eps",
          "like(schedule.alpha(r), x_t) * prediction.x0 + like(schedule.sigma(prediction.t), x_t) * prediction.eps", (LIGHT,)),
    Fault("a teacher with its guidance within is guided again", "diffusion.guidance", "if isinstance(role, SelfGuided):", "if False:", (LIGHT,)),
    Fault("a sum over pixels", "losses.regression", "(x - y).square().flatten(1).mean(1)", "(x - y).square().flatten(1).sum(1)", (ADD, LIGHT)),
    Fault("R1 of one row of a map", "losses.adversarial", ".square().flatten(1).sum(1)", ".square().flatten(1)[:, 0]", (ADD,)),
    Fault("the upper end of a range", "diffusion.guidance", 'low + (high - low) * step.uniform("guidance")', 'high + 0 * step.uniform("guidance")', (ADD, LIGHT)),
    Fault("the noise of one step renewed at all", "methods.base", '"original_inference_steps": steps', '"original_inference_steps": 50', (ADD, LADD)),
)


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize("method", METHODS)
def test_whole_methods_are_green(method, seed):
    assert whole(method, seed) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.module.split('.')[-1]}: {fault.name}")
def test_a_fault_turns_a_row_red(fault, monkeypatch):
    plant(monkeypatch, fault)
    unseen = [method for method in fault.methods if first_red(method) is None]
    assert not unseen, f"{fault.name} goes unseen in {', '.join(unseen)}"
