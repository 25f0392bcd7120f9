"""Two-player distillation in closed form: a one-step affine student of a Gaussian, its exact critic, and their
roles."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from stepdistill.diffusion.contracts import Batch, Condition
from stepdistill.diffusion.draws import Step
from stepdistill.diffusion.exact import Gaussian
from stepdistill.diffusion.prediction import Prediction
from stepdistill.diffusion.sampler import Sampler
from stepdistill.diffusion.schedule import RectifiedFlow, Schedule
from stepdistill.methods.base import Inference
from stepdistill.models.schedulers import StockCall, sampler_of, stock_call
from stepdistill.models.stock import Guidance

from .closed import predict, stable_diffusion

SCHEDULES: dict[str, tuple[Schedule, str]] = {"vp": (stable_diffusion(), "v"), "flow": (RectifiedFlow(), "velocity")}
TEACHERS = {"vp": DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
            "flow": FlowMatchEulerDiscreteScheduler()}
REAL_MEAN, REAL_VARIANCE = 0.7, 0.5


def gaussian(schedule: Schedule, mean: float, variance: float, kind: str) -> Gaussian:
    """One number a sample."""
    return Gaussian(schedule, torch.tensor([mean], dtype=torch.float64), torch.tensor([variance], dtype=torch.float64),
                    kind)


@dataclass
class Affine:
    """x_0 = m + s z of unit noise z: at t = 1, where one-step students begin. It notes what it was given."""

    schedule: Schedule
    m: Tensor
    s: Tensor
    given: list[Tensor] = field(default_factory=list)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        assert (t > 0.99).all(), "a one-step student is asked at the end of noise"
        self.given.append(x_t.detach())
        return predict(self.m + self.s * x_t, x_t, t, self.schedule, "x0")


def affine(schedule: Schedule, mean: float, deviation: float) -> Affine:
    number = lambda value: torch.tensor(value, dtype=torch.float64, requires_grad=True)
    return Affine(schedule, number(mean), number(deviation))


def few_steps(steps: int, schedule: str = "vp") -> Sampler:
    """Of students whose x_0 is noised again, for teachers of Stable Diffusion's or Stable Diffusion 3's noise."""
    return sampler_of(stock_call(Inference(steps, noise=1.0), SCHEDULES[schedule][0]), SCHEDULES[schedule][0],
                      TEACHERS[schedule])


def spelled(method, settings, steps: int, schedule: str, *guidance) -> StockCall:
    """A method's inference as a pipeline that can embed a guidance scale is called. schedule: a key of SCHEDULES."""
    found = SCHEDULES[schedule][0]
    return stock_call(method.inference(settings, steps, found, *guidance), found, Guidance(embedded="guidance_scale"))


def prompts(count: int, shape: tuple[int, ...] = (1,)) -> Batch:
    text = torch.zeros(count, 1, dtype=torch.float64)
    return Batch(torch.arange(count), Condition(text=text, null=Condition(text=text)), shape=shape)


def moment(count: int, update: str = "student", repeat: int = 0, index: int = 0) -> Step:
    return Step(0, index, 0.0, update, repeat, torch.arange(count))
