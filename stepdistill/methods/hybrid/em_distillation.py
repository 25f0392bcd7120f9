"""EM Distillation for One-step Diffusion Models. Xie et al. 2024, arXiv:2405.16852.

    x_t      =  alpha g(z) + sigma eps, g the one-step student
    repeat langevin_steps times                                   (E: towards the teacher's law, on noises)
        ds   <- real score - fake score at x_t
        eps  <- eps + g_e (sigma ds - eps) + sqrt(2 g_e) n
        z    <- z + g_z (alpha J' ds - z) + sqrt(2 g_z) n'         J = dg / dz
    student  <- | x_t - alpha g(z) |^2 at the new z, without what of eps is noise        (M)
    critic   <- denoise the student's samples

Maximum likelihood, the forward KL divergence, at each noise level: the chain stays near the law whose density is that
of (eps, z) times teacher over student at x_t. What is left of eps without its noise is the decayed sum of the drifts;
in x_0 it is sigma / alpha times that, a mean of real - fake along the chain. With one step, and g_z = 0, it is DMD's.

No code was released. Source of the defaults: (a) accounts of the paper; the weights of noise levels are DMD's, for the
paper's are not told.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import Schedule, like
from ...diffusion.times import NoiseLaw
from ...diffusion.weighting import dmd
from ...losses.matching import denoising, distribution_matching
from ..base import (
    Frozen,
    Guidance,
    Inference,
    Losses,
    Method,
    Need,
    Trained,
    Update,
    check_noise,
    noise_levels,
    renoising,
)

LEAST = 1e-6                   # g_e, below which what is left of a chain's noise is 1 to rounding


@dataclass(frozen=True, kw_only=True)
class Settings:
    langevin_steps: int = 8            # of a chain (a: 16 on ImageNet 64, 8 on 128 and for Stable Diffusion)
    noise_rate: float = 0.16           # g_e (a: 0.4^2)
    latent_rate: float = 1.6e-5        # g_z (a: 0.004^2); 0 leaves z where it is, and the way back through g out
    critic_steps: int = 1              # critic updates a step
    start_time: float | None = None    # at which the student begins, with unit noise; None: t = 1 (a: sigma / alpha of
                                       # e^3)
    noise_law: NoiseLaw = "uniform"    # of the levels of chains and critic: uniform, lognormal, shifted, mixture
    t_range: tuple[float, float] = (0.02, 0.98)    # of these, those of chains
    mean: float = -1.2                 # of ln(sigma / alpha), of lognormal and mixture
    std: float = 1.2                   # of ln(sigma / alpha), of lognormal and mixture
    shift: float = 3.0                 # of shifted: towards noise above 1

    def __post_init__(self) -> None:
        check_noise(self)
        if not LEAST <= self.noise_rate <= 1 or not 0 <= self.latent_rate < 1:
            raise ValueError(f"noise_rate must be from {LEAST} to 1, latent_rate in [0, 1); found {self.noise_rate}, "
                             f"{self.latent_rate}")


class EMDistillation(Method):
    Settings = Settings
    data = ("prompts", "images", "samples")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student, self.critic = (roles[name] for name in ("teacher", "student", "critic"))
        self.schedule = self.teacher.schedule
        self.matched, self.trained = (noise_levels(settings, self.schedule, whole) for whole in (False, True))

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher"), "critic": Trained("teacher")}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        if steps != 1:
            raise ValueError(f"em_distillation makes one-step students, found {steps} steps: dmd2 makes few-step ones")
        return renoising(settings, steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.student_loss),
                Update(("critic",), self.critic_loss, repeat=self.settings.critic_steps)]

    def student_loss(self, batch: Batch, step: Step) -> Losses:
        z, drift, weight = self.chain(batch, step, self.matched(step.uniform("t")))
        x = self.generate(z, batch.cond)
        return {"matching": distribution_matching(x, drift, torch.zeros_like(drift), weight).mean()}

    def critic_loss(self, batch: Batch, step: Step) -> Losses:
        with torch.no_grad():
            x = self.generate(step.normal("start", batch.shape), batch.cond)
        t, eps = self.trained(step.uniform("t")), step.normal("noise", batch.shape)
        x_t = self.schedule.add_noise(x, eps, t)
        return {"denoising": denoising(self.critic(x_t, t, batch.cond), x, eps).mean()}

    # -- terms -------------------------------------------------------------------------------------------------------

    def generate(self, z: Tensor, cond: Condition) -> Tensor:
        """g(z), the one evaluation of the sampler, with gradients to z too."""
        only = torch.zeros(len(z), dtype=torch.int64)
        return self.sampler.predict(self.student, self.sampler.start * z, only, cond).x0

    @torch.no_grad()
    def chain(self, batch: Batch, step: Step, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z at its end; the drifts of eps left by then, in x_0, as a mean of real - fake; and DMD's weight (B,)."""
        s, shape, cond = self.settings, batch.shape, batch.cond
        teacher, kept, drift = guided(self.teacher, drawn(self.guidance, step)), 1 - s.noise_rate, 0.0
        z, eps = step.normal("start", shape), step.normal("noise", shape)
        ratio = self.schedule.alpha(t) / self.schedule.sigma(t)
        for i in range(s.langevin_steps):
            with torch.set_grad_enabled(s.latent_rate > 0):
                z = z.requires_grad_(s.latent_rate > 0)
                x = self.generate(z, cond)
            x_t = self.schedule.add_noise(x.detach(), eps, t)
            real = teacher(x_t, t, cond).x0
            apart = real - self.critic(x_t, t, cond).x0
            drift = kept * drift + s.noise_rate * apart
            eps = (kept * eps + s.noise_rate * like(ratio, eps) * apart
                   + (2 * s.noise_rate) ** 0.5 * step.normal(f"noise {i}", shape))
            if s.latent_rate:
                pull, = torch.autograd.grad(x, z, like(ratio**2, x) * apart)
                z = ((1 - s.latent_rate) * z.detach() + s.latent_rate * pull
                     + (2 * s.latent_rate) ** 0.5 * step.normal(f"latent {i}", shape))
        return z, drift / (1 - kept**s.langevin_steps), dmd(x.detach(), real)
