"""Faults planted in the hybrids, and in the loss that two of them share: each turns a row red."""
from __future__ import annotations

import pytest

from .planting import Fault, of, shared_out, unseen, whole

SPRINT, RCM, EM, REWARD = "sana_sprint", "rcm", "em_distillation", "reward"
METHODS = (SPRINT, RCM, EM, REWARD)
TRIG = (SPRINT, RCM)

FAULTS = (
    # SANA-Sprint
    of(SPRINT, "the student is told no scale", "with_scale(batch.cond, w) if self.settings.guidance_embedding else "
       "batch.cond",
       "batch.cond"),
    of(SPRINT, "guidance_embedding unread", 'reads=("w",) * settings.guidance_embedding', 'reads=("w",)'),
    of(SPRINT, "teacher not guided", "guided(self.teacher, w)(", "guided(self.teacher, 1.0)("),
    of(SPRINT, "noise_share unread", "< self.settings.noise_share", "< 0.5"),
    of(SPRINT, "pure noise told the time of noised data", "torch.where(pure, self.begins,",
       "torch.where(~pure, self.begins,"),
    of(SPRINT, "one time for both losses", 'step.uniform("judged t")', 'step.uniform("t")'),
    of(SPRINT, "judged_mean unread", "settings.judged_mean,", "0.1,"),
    of(SPRINT, "judged_std unread", "settings.judged_std)", "1.0)", count=1),
    of(SPRINT, "real and fake under one noise", 'f"{name} noise"', '"fake noise"'),
    of(SPRINT, "gan_weight unread", "self.settings.gan_weight * fooled", "0.5 * fooled"),
    of(SPRINT, "real and fake swapped in the game", "zip(real, fake, strict=True)", "zip(fake, real, strict=True)"),
    of(SPRINT, "the sample kept with its gradient", 'step.kept["sample"] = x.detach()', 'step.kept["sample"] = x'),
    of(SPRINT, "heads on a fresh batch", "self.critic_loss, shares=1)", "self.critic_loss)"),
    of(SPRINT, "pooled heads", 'Heads("teacher", kind="tokens")', 'Heads("teacher")'),
    of(SPRINT, "told the upper end of a range where it is sampled", "scale = middle(guidance) if",
       "scale = (guidance if isinstance(guidance, float) else guidance[1]) if"),
    of(SPRINT, "sampled at even times", "times=sampled_at(steps, schedule), ", ""),
    # rCM
    of(RCM, "the matching from the first step on", "if step.progress < self.settings.warmup:", "if False:"),
    of(RCM, "matching_weight unread", "self.settings.matching_weight or prod", "prod"),
    of(RCM, "the released scales without the numbers", "prod(batch.shape) ** 0.5 / 50", "1.0"),
    of(RCM, "critic_steps unread", "repeat=self.settings.critic_steps", "repeat=4"),
    of(RCM, "rollout_steps unread", "* self.settings.rollout_steps)", "* 4)"),
    of(RCM, "rollouts one step longer", 'range(int(step.shared("steps") *', 'range(1 + int(step.shared("steps") *'),
    of(RCM, "times of a rollout that rise", "torch.minimum(t, self.level(", "torch.maximum(t, self.level("),
    of(RCM, "gradients through the whole rollout", "with torch.no_grad():\n            for i",
       "with torch.enable_grad():\n            for i"),
    of(RCM, "noises of a rollout are one", 'f"renoise {i}"', '"start"'),
    of(RCM, "shift unread", "self.settings.shift)(u)", "5.0)(u)"),
    of(RCM, "teacher not guided", "guided(self.teacher, drawn(self.guidance, step))", "self.teacher"),
    of(RCM, "real and fake swapped", "distribution_matching(x, real, fake,", "distribution_matching(x, fake, real,"),
    of(RCM, "the critic's sample keeps its gradient", "with torch.no_grad():\n            x = self.rolled",
       "with torch.enable_grad():\n            x = self.rolled"),
    of(RCM, "scores matched at the consistency's times", 'self.level(step.uniform("matched t"))', 't'),
    # EM Distillation
    of(EM, "langevin_steps unread", "range(s.langevin_steps)", "range(8)"),
    of(EM, "noise_rate unread", "1 - s.noise_rate, 0.0", "1 - 0.16, 0.0"),
    of(EM, "the noise is not cancelled", "return z, drift / (1 - kept**s.langevin_steps)",
       "return z, eps * like(self.schedule.sigma(t) / self.schedule.alpha(t), eps)"),
    of(EM, "drifts do not decay", "drift = kept * drift +", "drift = drift +"),
    of(EM, "z at rest", "if s.latent_rate:", "if False:"),
    of(EM, "z without its noise", 'step.normal(f"latent {i}", shape)', "0.0"),
    of(EM, "one noise for all steps", 'f"noise {i}"', '"noise 0"'),
    of(EM, "z drawn by alpha instead of alpha^2", "like(ratio**2, x) * apart", "like(ratio, x) * apart"),
    of(EM, "the student at the first z", "x = self.generate(z, batch.cond)\n        return",
       'x = self.generate(step.normal("start", batch.shape), batch.cond)\n        return'),
    of(EM, "teacher not guided", "guided(self.teacher, drawn(self.guidance, step))", "self.teacher"),
    of(EM, "critic_steps unread", "repeat=self.settings.critic_steps", "repeat=1"),
    of(EM, "critic at the student's levels", "for whole in (False, True)", "for whole in (False, False)"),
    # reward feedback
    of(REWARD, "last unread", "min(s.last, sampler.nfe)", "1"),
    of(REWARD, "an evaluation early", 'sampler.nfe - 1 - int(step.shared("exit") * last)',
       'max(0, sampler.nfe - 2 - int(step.shared("exit") * last))'),
    of(REWARD, "the first evaluations judged", "exit = sampler.nfe - 1 - int(", "exit = int("),
    of(REWARD, "gradients through the whole rollout", "with torch.no_grad():\n            x_t",
       "with torch.enable_grad():\n            x_t"),
    of(REWARD, "margin unread", "-score if s.margin is None else", "-score if True else"),
    of(REWARD, "the reward lowered", "-score if s.margin is None", "score if s.margin is None"),
    of(REWARD, "no hinge", "F.relu(s.margin - score)", "s.margin - score"),
    of(REWARD, "latents judged", "self.reward(self.decode(x), batch.prompts)", "self.reward(x, batch.prompts)"),
    of(REWARD, "prompts of other samples", "self.decode(x), batch.prompts", "self.decode(x), batch.prompts[::-1]"),
    of(REWARD, "weight unread", "s.weight * short.mean()", "short.mean()"),
    of(REWARD, "nearness unread", "s.nearness * squared", "squared"),
    of(REWARD, "near to itself", "sampler.predict(self.begun,", "sampler.predict(self.student,"),
    of(REWARD, "gradients to the student as it began", "with torch.no_grad():\n            before",
       "with torch.enable_grad():\n            before"),
    of(REWARD, "what follows it is kept near", 'Follows("student", 0.0, until=0)', 'Follows("student", 0.0)'),
    of(REWARD, "fresh unread", "noise=float(settings.fresh)", "noise=0.0"),
    # what they share
    Fault("the tangent's mean fixed", "losses.continuous", "settings.mean, settings.std)", "0.9, settings.std)", TRIG),
    Fault("the tangent's std fixed", "losses.continuous", "settings.mean, settings.std)", "settings.mean, 1.6)", TRIG),
    Fault("damping unread", "losses.continuous", "self.settings.damping)", "0.1)", TRIG),
    Fault("always exact", "losses.continuous", 'self.settings.derivative == "exact"', "True", TRIG),
    Fault("warmup unread", "losses.continuous", "progress / self.settings.warmup)", "progress / 0.1)", TRIG),
    Fault("twice the width", "losses.continuous", "self.settings.width, self.first",
          "2 * self.settings.width, self.first", TRIG),
    Fault("a flow's samples at even times", "diffusion.continuous", "shifted(uniform(), SHIFT)", "uniform()", TRIG),
    Fault("the tangent without x", "losses.tangent", "- r * cos * sin * (x + slope)", "- r * cos * sin * slope", TRIG),
    Fault("the tangent not normalised", "losses.tangent", "return g / (g.square()", "return g + 0 * (g.square()", TRIG),
)


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS)
def test_whole_methods_are_green(method):
    assert whole(method) == []


@pytest.mark.parametrize("fault", shared_out(FAULTS), ids=str)
def test_a_fault_turns_a_row_red(fault, monkeypatch):
    left = unseen(fault, monkeypatch)
    assert not left, f"{fault.name} goes unseen in {', '.join(left)}"
