"""Faults planted in the methods of distribution matching, and in the blocks that they share: each turns a row red."""
from __future__ import annotations

import pytest

from .planting import Fault, first_red, plant, whole

DI, DMD, DMD2, SID, SWIFT = "diff_instruct", "dmd", "dmd2", "sid", "swiftbrush"
METHODS = (DI, DMD, DMD2, SID, SWIFT)
OF = {name: f"methods.distribution.{name}" for name in METHODS}


def of(method: str, name: str, old: str, new: str, count: int = 1) -> Fault:
    return Fault(name, OF[method], old, new, (method,), count)


FAULTS = (
    # Diff-Instruct
    of(DI, "mean of the law fixed", "log_normal(self.schedule, settings.mean, settings.std)", "log_normal(self.schedule, -1.2, settings.std)"),
    of(DI, "std of the law fixed", "log_normal(self.schedule, settings.mean, settings.std)", "log_normal(self.schedule, settings.mean)"),
    of(DI, "sigma_data fixed", "self.settings.sigma_data).to", "1.0).to"),
    of(DI, "critic's error in eps", "batch.cond).x0, x)", "batch.cond).eps, x)"),
    of(DI, "critic's sample keeps its gradient", "        with torch.no_grad():\n            x = rollout", "        with torch.enable_grad():\n            x = rollout"),
    of(DI, "real and fake swapped", "(x, real, fake, torch", "(x, fake, real, torch"),
    of(DI, "teacher not guided", "guided(self.teacher, drawn(self.guidance, step))", "self.teacher"),
    of(DI, "critic guided too", "fake = self.critic(", "fake = guided(self.critic, drawn(self.guidance, step))("),
    of(DI, "roles of the updates swapped", 'Update(("critic",), self.critic_loss), Update(("student",), self.student_loss)',
       'Update(("critic",), self.student_loss), Update(("student",), self.critic_loss)'),
    of(DI, "student first", 'Update(("critic",), self.critic_loss), Update(("student",), self.student_loss)',
       'Update(("student",), self.student_loss), Update(("critic",), self.critic_loss)'),
    of(DI, "the weight of DMD", "torch.ones_like(t)", "1 / (x - real).detach().abs().mean(1)"),
    # DMD
    of(DMD, "t_range unread", "levels(*settings.t_range)", "levels(0.02, 0.98)"),
    of(DMD, "critic at the student's levels", "discrete(levels(*settings.t_range)), discrete(levels())",
       "discrete(levels(*settings.t_range)), discrete(levels(*settings.t_range))"),
    of(DMD, "normalised by the critic", "dmd(x.detach(), real)", "dmd(x.detach(), fake)"),
    of(DMD, "normaliser keeps its gradient", "matching\": distribution_matching(x, real, fake, dmd(x.detach(), real)).mean()",
       "matching\": (dmd(x, real) * ((fake - real) * x).mean(1)).mean()"),
    of(DMD, "regression to the first node", "nodes[:, -1]", "nodes[:, 0]"),
    of(DMD, "regression of the fresh noise", "batch.pairs.noise, batch.cond)", "step.normal(\"start\", batch.shape), batch.cond)"),
    of(DMD, "regression_weight fixed", "self.settings.regression_weight * squared", "0.25 * squared"),
    of(DMD, "critic on a fresh batch", "self.critic_loss, shares=1)", "self.critic_loss)"),
    of(DMD, "sample kept with its gradient", 'step.kept["sample"] = x.detach()', 'step.kept["sample"] = x'),
    of(DMD, "critic learns from the data", 'x, eps, t = step.kept["sample"]', "x, eps, t = batch.x0"),
    of(DMD, "teacher guided at the middle of a range", "drawn(self.guidance, step)",
       "(self.guidance if isinstance(self.guidance, float) else sum(self.guidance) / 2)"),
    # DMD2
    of(DMD2, "t_range unread", "levels(*settings.t_range)", "levels(0.02, 0.98)"),
    of(DMD2, "critic at the student's levels", "discrete(levels(*settings.t_range)), discrete(levels())",
       "discrete(levels(*settings.t_range)), discrete(levels(*settings.t_range))"),
    of(DMD2, "critic_steps unread", "repeat=s.critic_steps", "repeat=5"),
    of(DMD2, "share_rollout unread", "shares=s.critic_steps if s.share_rollout else 1", "shares=1"),
    of(DMD2, "always shared", "shares=s.critic_steps if s.share_rollout else 1", "shares=s.critic_steps"),
    of(DMD2, "the first critic step is not shared", "if s.share_rollout else 1", "if s.share_rollout else 0"),
    of(DMD2, "tell_exit unread", "told_exit(batch.cond, self.sampler, step) if self.settings.tell_exit else batch.cond", "batch.cond"),
    of(DMD2, "the exit always told", "told_exit(batch.cond, self.sampler, step) if self.settings.tell_exit else batch.cond",
       "told_exit(batch.cond, self.sampler, step)"),
    of(DMD2, "the exit told to the teacher", "(x_t, t, batch.cond).x0\n        fake", "(x_t, t, cond).x0\n        fake"),
    of(DMD2, "a shared sample with an exit of its own", 'return step.kept["sample"], step.kept["cond"]',
       'return step.kept["sample"], self.heard(batch, step)'),
    of(DMD2, "a fresh sample with the exit that was kept", "return rollout(self.sampler, self.student, batch.cond, step, batch.shape), self.heard(batch, step)",
       "return rollout(self.sampler, self.student, batch.cond, step, batch.shape), batch.cond"),
    of(DMD2, "the kept sample passed over", 'if "sample" in step.kept', "if False"),
    of(DMD2, "kept with its gradient", "step.kept.update(sample=x.detach()", "step.kept.update(sample=x"),
    of(DMD2, "the critic takes no exit", 'Trained("teacher", told_w=settings.tell_exit)', 'Trained("teacher")'),
    of(DMD2, "the fooled gradient stops before the critic", "seen = x if self.discriminator else x.detach()", "seen = x.detach()"),
    of(DMD2, "gan_weight unread", "self.settings.gan_weight * fool", "5e-3 * fool"),
    of(DMD2, "critic_gan_weight unread", "self.settings.critic_gan_weight * told", "1e-2 * told"),
    of(DMD2, "the GAN's weights swapped", "self.settings.gan_weight * fool", "self.settings.critic_gan_weight * fool"),
    of(DMD2, "real and fake swapped in the game", "tell_apart(self.discriminator(real, t, cond), logits)",
       "tell_apart(logits, self.discriminator(real, t, cond))"),
    of(DMD2, "real at the fake's level", 't = self.trained(step.uniform("real t"))', "t = t"),
    of(DMD2, "real under the fake's noise", 'step.normal("real noise", batch.shape)', "eps"),
    of(DMD2, "real without noise", "self.discriminator(real, t, cond)", "self.discriminator(batch.x0, t, cond)"),
    of(DMD2, "real judged without the exit", "self.discriminator(real, t, cond)", "self.discriminator(real, t, batch.cond)"),
    of(DMD2, "the discriminator does not train", 'two if self.discriminator else two[:1]', "two[:1]"),
    of(DMD2, "a discriminator at weight 0", '({"discriminator": Heads("critic")} if settings.gan_weight else {})', '{"discriminator": Heads("critic")}'),
    of(DMD2, "heads on the teacher", 'Heads("critic")', 'Heads("teacher")'),
    of(DMD2, "real and fake scores swapped", "distribution_matching(x, real, fake.x0", "distribution_matching(x, fake.x0.detach(), real + 0 * fake.x0"),
    of(DMD2, "critic guided too", "fake, logits = self.judged(x_t, t, cond)",
       "fake, logits = guided(self.critic, drawn(self.guidance, step))(x_t, t, cond), self.judged(x_t, t, cond)[1]"),
    # SiD
    of(SID, "alpha unread", "fake, self.settings.alpha, weight", "fake, 1.0, weight"),
    of(SID, "critic_trained_at unread", "w if settings.critic_trained_at is None else settings.critic_trained_at", "w"),
    of(SID, "critic_asked_at unread", "self.trained_at if settings.critic_asked_at is None else settings.critic_asked_at", "self.trained_at"),
    of(SID, "asked at the teacher's where None", "self.trained_at if settings.critic_asked_at", "w if settings.critic_asked_at"),
    of(SID, "the lower end of a range", "w = middle(guidance)", "w = guidance if isinstance(guidance, float) else guidance[0]"),
    of(SID, "the scales swapped", "guided(self.critic, self.trained_at)", "guided(self.critic, self.asked_at)"),
    of(SID, "critic_steps unread", "repeat=self.settings.critic_steps", "repeat=1"),
    of(SID, "drop unread", "else settings.drop", "else 0.1"),
    of(SID, "nothing is dropped where the critic is trained at 1", "self.trained_at == self.asked_at == 1", "self.trained_at == 1"),
    of(SID, "prompts dropped where nothing is guided", "0.0 if self.trained_at == self.asked_at == 1 else settings.drop", "settings.drop"),
    of(SID, "the sample still sees the dropped prompt", "self.student, cond, step, batch.shape", "self.student, batch.cond, step, batch.shape"),
    of(SID, "the critic still sees the dropped prompt", "(x_t, t, self.heard(cond, step))", "(x_t, t, self.heard(batch.cond, step))"),
    of(SID, "tell_exit unread", "told_exit(cond, self.sampler, step) if self.settings.tell_exit else cond", "cond"),
    of(SID, "the exit told to the teacher", "(x_t, t, batch.cond).x0\n", "(x_t, t, self.heard(batch.cond, step)).x0\n"),
    of(SID, "t_range unread", "levels(*settings.t_range)", "levels(0.02, 0.98)"),
    of(SID, "the teacher held fixed", "real, fake, self.settings.alpha", "real.detach(), fake, self.settings.alpha"),
    of(SID, "the critic held fixed", "real, fake, self.settings.alpha", "real, fake.detach(), self.settings.alpha"),
    of(SID, "the noised sample held fixed", "x_t = self.schedule.add_noise(x, step", "x_t = self.schedule.add_noise(x.detach(), step"),
    of(SID, "the weight keeps its gradient", "dmd(x.detach(), real.detach())", "dmd(x, real)"),
    of(SID, "weighed by the critic's distance", "dmd(x.detach(), real.detach())", "dmd(x.detach(), fake.detach())"),
    of(SID, "real and fake swapped", "(x, real, fake, self", "(x, fake, real, self"),
    of(SID, "teacher not guided", "guided(self.teacher, drawn(self.guidance, step))", "self.teacher"),
    of(SID, "the critic's sample keeps its gradient", "with torch.no_grad():", "with torch.enable_grad():"),
    of(SID, "student first", 'Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps), Update(("student",), self.student_loss)',
       'Update(("student",), self.student_loss), Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps)'),
    # SwiftBrush
    of(SWIFT, "t_range unread", "levels(*settings.t_range)", "levels(0.02, 0.98)"),
    of(SWIFT, "drop unread", "< self.settings.drop)", "< 0.1)"),
    of(SWIFT, "nothing is dropped", "batch.cond.dropped(step.uniform(\"drop\") < self.settings.drop) if self.settings.drop else batch.cond", "batch.cond"),
    of(SWIFT, "prompts kept where they should be dropped", '"drop") <', '"drop") >'),
    of(SWIFT, "two scales where one is drawn", "guided(role, w)(x_t", "guided(role, drawn(self.guidance, step) if role is self.teacher else 1.0)(x_t"),
    of(SWIFT, "teacher and critic swapped", "(self.teacher, self.critic))", "(self.critic, self.teacher))"),
    of(SWIFT, "the weight sigma", "self.schedule.alpha(t) * self.schedule.sigma(t)).mean", "self.schedule.sigma(t)).mean"),
    of(SWIFT, "the critic's weight alpha", ".to(error) ** 2 * error", ".to(error) * error"),
    of(SWIFT, "critic on a fresh batch", "self.critic_loss, shares=1)", "self.critic_loss)"),
    of(SWIFT, "sample kept with its gradient", 'step.kept["sample"] = x.detach()', 'step.kept["sample"] = x'),
    of(SWIFT, "the critic's error in x_0", "t), t, cond).eps, eps)", "t), t, cond).x0, x)"),
    # what they share
    Fault("the sign of the match", "losses.matching", "x - like(weight, x) * (fake - real)", "x + like(weight, x) * (fake - real)", (DI, DMD, DMD2, SWIFT)),
    Fault("the match is not held fixed", "losses.matching", "(fake - real)).detach()", "(fake - real))", (DI, DMD, DMD2, SWIFT)),
    Fault("twice the match", "losses.matching", "0.5 * squared", "squared", (DI, DMD, DMD2, SWIFT)),
    Fault("1 + alpha in the identity", "losses.matching", "* ((1 - alpha) * d + fake - x)", "* ((1 + alpha) * d + fake - x)", (SID,)),
    Fault("real for fake in the identity", "losses.matching", "* d + fake - x)", "* d + real - x)", (SID,)),
    Fault("denoising in x_0", "losses.matching", "squared(prediction.raw, truth(x0, eps, prediction.t, prediction.schedule, prediction.kind))",
          "squared(prediction.x0, x0)", (DMD, DMD2, SID)),
    Fault("a root mean square in the normaliser", "diffusion.weighting", "(x0 - teacher_x0).abs().flatten(1).mean(1)",
          "(x0 - teacher_x0).square().flatten(1).mean(1).sqrt()", (DMD, DMD2, SID)),
    Fault("a sum in the normaliser", "diffusion.weighting", "(x0 - teacher_x0).abs().flatten(1).mean(1)", "(x0 - teacher_x0).abs().flatten(1).sum(1)",
          (DMD, DMD2, SID)),
    Fault("EDM's weight without the data's", "diffusion.weighting", "snr(schedule, t) + 1 / sigma_data**2", "snr(schedule, t)", (DI,)),
    Fault("a normaliser of each row of pixels", "diffusion.weighting", ".abs().flatten(1).mean(1)", ".abs().mean((1, 3))[:, 0]", (DMD, DMD2, SID)),
    Fault("a sum over pixels", "losses.regression", "(x - y).square().flatten(1).mean(1)", "(x - y).square().flatten(1).sum(1)", METHODS),
    Fault("the identity summed over pixels", "losses.matching", "fake - x)).flatten(1).mean(1)", "fake - x)).flatten(1).sum(1)", (SID,)),
    Fault("a teacher with its guidance within is guided again", "diffusion.guidance", "if isinstance(role, SelfGuided):", "if False:", (DMD2,)),
    Fault("exits counted from 0", "diffusion.rollout", "1.0 + left_by(sampler, step)", "0.0 + left_by(sampler, step)", (DMD2, SID)),
    Fault("the last exit alone", "diffusion.rollout", 'int(step.shared("exit") * sampler.nfe)', "sampler.nfe - 1", (DMD2, SID)),
    Fault("the first exit alone", "diffusion.rollout", 'int(step.shared("exit") * sampler.nfe)', "0", (DMD2, SID)),
    Fault("noises of a rollout are one", "diffusion.rollout", 'f"renoise {i}"', '"start"', (DMD2, SID)),
    Fault("gradients through the whole rollout", "diffusion.sampler", "with torch.no_grad():", "with torch.enable_grad():", (DMD2, SID)),
    Fault("the upper end of a range", "diffusion.guidance", 'low + (high - low) * step.uniform("guidance")', "high + 0 * step.uniform(\"guidance\")", METHODS),
    Fault("guidance from the prompt up", "diffusion.guidance", "without + like(w, given)", "given + like(w, given)", METHODS),
    Fault("the null is the prompt", "diffusion.guidance", "Condition.cat([cond.null, replace(cond, null=None)])",
          "Condition.cat([replace(cond, null=None), replace(cond, null=None)])", METHODS),
    Fault("levels without their last", "diffusion.times", "min(int(high * LEVELS), LEVELS - 1) + 1", "min(int(high * LEVELS), LEVELS - 1)", (DMD, DMD2, SID, SWIFT)),
    Fault("levels one early", "diffusion.times", "dtype=torch.float64) + 1) / LEVELS\n\n\ndef karras", "dtype=torch.float64) + 0) / LEVELS\n\n\ndef karras",
          (DMD, DMD2, SID, SWIFT)),
    Fault("a log-normal law of sigma alone", "diffusion.times", ".exp().atan())\n\n\ndef logit", ".exp().clamp(max=1.0).asin())\n\n\ndef logit", (DI,)),
    Fault("the sampler's steps uneven", "methods.base", '"original_inference_steps": steps', '"original_inference_steps": 50', (DMD2, SID)),
    Fault("what was dropped is swapped", "diffusion.contracts", "getattr(self.null, name), value)", "value, getattr(self.null, name))", (SID, SWIFT)),
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
