"""Faults planted in DP-DMD and DiffRatio, and in what DMD2 has of Decoupled DMD: each turns a row red."""
from __future__ import annotations

import pytest

from .planting import Fault, of, shared_out, unseen, whole

DMD2, DIVERSE, RATIO = "dmd2", "dp_dmd", "diff_ratio"

FAULTS = (
    # DP-DMD
    of(DIVERSE, "nodes unread", "grid(settings.nodes,", "grid(30,"),
    of(DIVERSE, "anchor unread", "[:settings.anchor + 1]", "[:6]"),
    of(DIVERSE, "one of the teacher's steps too few", "[:settings.anchor + 1]", "[:settings.anchor]"),
    of(DIVERSE, "shift unread by the teacher's steps", "settings.nodes, settings.shift)", "settings.nodes, 3.0)"),
    of(DIVERSE, "diversity_weight unread", "self.settings.diversity_weight * squared", "0.05 * squared"),
    of(DIVERSE, "critic_steps unread", "repeat=self.settings.critic_steps", "repeat=5"),
    of(DIVERSE, "matching reaches the first step", "self.landing(first, 0).detach()", "self.landing(first, 0)"),
    of(DIVERSE, "matching reaches the last step alone", "x = self.landing(self.says(x, i, cond), i)",
       "x = self.landing(self.says(x.detach(), i, cond), i)"),
    of(DIVERSE, "the state the teacher arrives at taken for an x_0",
       "secant_target(noise, ddim(teacher, noise, self.times, cond), start, end, self.schedule)",
       "ddim(teacher, noise, self.times, cond)"),
    of(DIVERSE, "the student's steps from another noise", "first = self.says(self.sampler.start * noise",
       'first = self.says(step.normal("other", batch.shape)'),
    of(DIVERSE, "the teacher's steps not guided", "self.first_guess(teacher,", "self.first_guess(self.teacher,"),
    of(DIVERSE, "real score not guided", "real, fake = teacher(x_t", "real, fake = self.teacher(x_t"),
    of(DIVERSE, "real and fake swapped", "(x, real, fake, dmd", "(x, fake, real, dmd"),
    of(DIVERSE, "critic at the student's levels", "for whole in (False, True)", "for whole in (False, False)"),
    of(DIVERSE, "the critic's noise the rollout's again", 'step.uniform("t")), step.normal("noise", batch.shape)',
       'step.uniform("t")), step.normal("start", batch.shape)'),
    of(DIVERSE, "student first", 'Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps), '
       'Update(("student",), self.student_loss)',
       'Update(("student",), self.student_loss), '
       'Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps)'),
    # DiffRatio
    of(RATIO, "down the log ratio", '"log_ratio": -(like', '"log_ratio": (like'),
    of(RATIO, "divergence unread", "relative_weight(self.settings.divergence,", 'relative_weight("reverse_kl",'),
    of(RATIO, "the ratio upside down", "ratio(logits.detach())", "ratio(-logits.detach())"),
    of(RATIO, "the weight keeps its gradient", "ratio(logits.detach())", "ratio(logits)"),
    of(RATIO, "weight unread", "** POWERS[self.settings.weight]", "** 1"),
    of(RATIO, "weighed upside down", "self.schedule.sigma(t) / self.schedule.alpha(t)",
       "self.schedule.alpha(t) / self.schedule.sigma(t)"),
    of(RATIO, "critic_steps unread", "repeat=self.settings.critic_steps", "repeat=1"),
    of(RATIO, "the classifier at the student's levels", "for whole in (False, True)", "for whole in (False, False)"),
    of(RATIO, "data taken for samples", "discriminator_loss(real, fake)", "discriminator_loss(fake, real)"),
    of(RATIO, "data without noise", "for clean in (batch.x0,", "for clean in (batch.x0 * 0 + 1,"),
    of(RATIO, "heads on the student", 'Heads("critic")', 'Heads("student")'),
    of(RATIO, "the classifier's features do not train", 'Update(("critic", "discriminator"),',
       'Update(("discriminator",),'),
    of(RATIO, "sample kept with its gradient", 'step.kept["sample"] = x.detach()', 'step.kept["sample"] = x'),
    of(RATIO, "no sample shared", "shares=1)", "shares=0)"),
    # Decoupled DMD
    of(DMD2, "decoupled, but the matched score is guided", "w = 1.0 if self.settings.decoupled else", "w ="),
    of(DMD2, "decoupled, but nothing added", 'if self.settings.decoupled else {}', "if False else {}"),
    of(DMD2, "guidance takes away", "(x, given, without, dmd", "(x, without, given, dmd"),
    of(DMD2, "guidance under the match's noise", 'step.normal("guidance noise", batch.shape)',
       'step.normal("noise", batch.shape)'),
    Fault("guidance at all levels", "diffusion.rollout", "sampler.levels[left_by(sampler, step)] * share", "share",
          (DMD2,)),
    Fault("guidance off the stock times", "diffusion.rollout", "* share - MIDWAY).round()", "* share - MIDWAY)",
          (DMD2,)),
    Fault("of two times that are as near the upper", "diffusion.rollout", "share - MIDWAY", "share + MIDWAY", (DMD2,)),
    # what they share
    Fault("start_time unread", "methods.base", "times=(settings.start_time,)", "times=(1.0,)", (RATIO,)),
    Fault("the upper end of a range", "diffusion.guidance", 'low + (high - low) * step.uniform("guidance")',
          "high + 0 * step.uniform(\"guidance\")", (DIVERSE,)),
    Fault("the match is not held fixed", "losses.matching", "(fake - real)).detach()", "(fake - real))", (DIVERSE,)),
    Fault("h not over h(1)", "losses.divergence", "h(r) / h(r.new_ones(()))", "h(r)", (RATIO,)),
)


@pytest.mark.long
@pytest.mark.parametrize("method", (DIVERSE, RATIO))
def test_whole_methods_are_green(method):
    assert whole(method) == []


@pytest.mark.parametrize("fault", shared_out(FAULTS), ids=str)
def test_a_fault_turns_a_row_red(fault, monkeypatch):
    left = unseen(fault, monkeypatch)
    assert not left, f"{fault.name} goes unseen in {', '.join(left)}"
