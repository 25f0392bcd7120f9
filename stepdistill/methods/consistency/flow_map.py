"""Flow maps: Align Your Flow. Sabour et al. 2025, arXiv:2506.14603, AYF-EMD and AYF-LMD.

    t >= r  <- the later and the earlier of two draws, x_t <- noise the data to t    (of a flow, as which any is viewed)
    u       =  the student's velocity at (x_t, t), which reads r: its step lands on G = x_t - (t - r) u
    v       <- the guided teacher's velocity at (x_t, t); lagrangian: at (G, r)
    du      <- d u / dt where dx / dt = v and r stays; lagrangian: -d u / dr where x_t and t stay
    g       <- v - u - k (t - r) du                                                  (k from 0 to 1)
    u       <- u + g / (|g| + c)

At the teacher's flow map g is 0: u is the average velocity of its trajectory from t to r. `eulerian` is MeanFlow's
identity (Geng et al. 2025, arXiv:2505.13447) with the teacher's v. It is sampled by Euler or DDIM in any number of
steps, whose landings are folded into the weights at export. `trajectory` is TraFlow's sum (Wu et al. 2025,
arXiv:2502.16972), without derivatives; x_s, x_0 by steps of the teacher:

    | G(x_t -> r) - G(x_s -> r) |^2 + | G(x_t -> 0) - x_0 |^2 + | u - v |^2

Its last term asks for straight ways, and bends the map where the teacher's are curved. That paper has no code and was
read in its abstract: the equations and their weights are ours. Sources of the other defaults: (s) sCM, which the first
paper follows, (2) a re-implementation; it has no code. Its k ends at 0.99.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...diffusion.bridges import bridge
from ...diffusion.contracts import Batch, Condition
from ...diffusion.draws import Step
from ...diffusion.guidance import drawn, guided
from ...diffusion.schedule import RectifiedFlow, Schedule, like
from ...diffusion.solvers import ddim
from ...diffusion.times import LEVELS, logit_normal
from ...diffusion.triples import ordered
from ...diffusion.views import viewed
from ...losses.regression import squared
from ...losses.tangent import Field, difference, exact, normalised, pair, pushed
from ..base import Frozen, Guidance, Inference, Losses, Method, Need, Trained, Update, check_counts

FLOW = RectifiedFlow()
FIRST, INSIDE = 1 / LEVELS, 0.1 / LEVELS      # as in scm: of the times that a network was taught
LEAST = 1e-4                                  # length of a difference where t - r is less
Form = Literal["eulerian", "lagrangian", "trajectory"]
Derivative = Literal["exact", "pair", "difference"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    form: Form = "eulerian"
    mean: float = -0.8             # of logit t and of logit r (2)
    std: float = 1.0               # of the same (2)
    alike: float = 0.0             # share of a batch with r = t (2; MeanFlow, without a teacher: 0.75)
    warmup: float = 0.1            # share of the training in which k grows (s)
    damping: float = 0.1           # c, against the root mean square of g (s)
    derivative: Derivative = "pair"    # of u (p: exact); as in scm, differences look back on what is right sooner
    width: float = 0.03            # of a difference, in t or r
    solver_steps: int = 4          # of the teacher's DDIM in each of its ways; these three are of `trajectory` alone
    output_weight: float = 1.0
    velocity_weight: float = 1.0

    def __post_init__(self) -> None:
        for name, choices in (("form", get_args(Form)), ("derivative", get_args(Derivative))):
            if vars(self)[name] not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; found {vars(self)[name]!r}")
        check_counts(self)
        least = min(self.output_weight, self.velocity_weight)
        if min(self.std, self.damping, self.width - LEAST) <= 0 or least < 0:
            raise ValueError(f"std and damping must be above 0, width above {LEAST:g}, "
                             f"output_weight and velocity_weight not negative; found {vars(self)}")
        if not 0 <= self.warmup <= 1 or not 0 <= self.alike < 1:
            raise ValueError(f"warmup is a share from 0 to 1, alike one below 1; found {self.warmup}, {self.alike}")


class FlowMap(Method):
    Settings = Settings
    data = ("images", "samples", "pairs")

    def __init__(self, settings, roles, guidance, sampler) -> None:
        super().__init__(settings, roles, guidance, sampler)
        self.teacher, self.student = (viewed(roles[name], FLOW) for name in ("teacher", "student"))
        self.own = roles["student"].schedule
        self.law = logit_normal(settings.mean, settings.std)
        ends = torch.tensor([FIRST, FIRST + INSIDE, 1 - INSIDE], dtype=torch.float64)
        self.first, *self.inside = FLOW.time_at(self.own.angle(ends)).tolist()

    @classmethod
    def needs(cls, settings: Settings, full: bool) -> dict[str, Need]:
        return {"teacher": Frozen(), "student": Trained("teacher", reads=("r",))}

    @classmethod
    def inference(cls, settings: Settings, steps: int, schedule: Schedule, guidance: Guidance = 1.0) -> Inference:
        return Inference(steps)

    def updates(self) -> list[Update]:
        return [Update(("student",), self.trajectory_loss if self.settings.form == "trajectory" else self.loss)]

    def loss(self, batch: Batch, step: Step) -> Losses:
        t, r = self.times(step)
        teacher = guided(self.teacher, drawn(self.guidance, step))
        x = FLOW.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        u, length = self.velocity(x, t, r, batch.cond), like(t - r, x)
        with torch.no_grad():
            if self.settings.form == "eulerian":
                v = teacher(x, t, batch.cond).velocity
                room = t - r.clamp(min=self.first)
                du = self.slope(lambda x, t: self.velocity(x, t, r, batch.cond), x, t, v, 1.0, room)
            else:
                v = teacher(x - length * u, r.clamp(min=self.first), batch.cond).velocity
                du = self.slope(lambda x, r: self.velocity(x, t, r, batch.cond), x, r, 0 * x, -1.0, t - r)
        k = min(1.0, step.progress / self.settings.warmup) if self.settings.warmup else 1.0
        g = v - u.detach() - k * length * du
        return {"tangent": pushed(u, normalised(g, self.settings.damping)).mean()}

    def trajectory_loss(self, batch: Batch, step: Step) -> Losses:
        (t, r), cond = self.times(step), batch.cond
        teacher = guided(self.teacher, drawn(self.guidance, step))
        s, early, end = (r + (t - r) * step.uniform("s")).clamp(min=self.first), 0 * t + self.first, 0 * t
        x = FLOW.add_noise(batch.x0, step.normal("noise", batch.shape), t)
        with torch.no_grad():
            x_s, x_0 = (bridge(ddim, teacher, x, t, to, cond, self.settings.solver_steps) for to in (s, early))
            x_0, v = bridge(ddim, teacher, x_0, early, end, cond), teacher(x, t, cond).velocity
            target = self.land(x_s, s, r, cond)
        u = self.velocity(x, t, r, cond)
        return {"consistency": squared(x - like(t - r, x) * u, target).mean(),
                "output": self.settings.output_weight * squared(self.land(x, t, end, cond), x_0).mean(),
                "velocity": self.settings.velocity_weight * squared(u, v).mean()}

    # -- terms -----------------------------------------------------------------------------------------------------

    def times(self, step: Step) -> tuple[Tensor, Tensor]:
        """t >= r, (B,) float64, of FLOW: t among those that the network knows, r as well or 0."""
        t, r = ordered(*(self.law(step.uniform(name)) for name in "tr"), step.uniform("alike") < self.settings.alike)
        t = t.clamp(*self.inside)
        return t, torch.where(r < self.first, 0.0, torch.minimum(r, t))

    def velocity(self, x: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        """The student's u, told where to land in its own time."""
        return self.student(x, t, cond.replace(r=self.own.time_at(FLOW.angle(r)))).velocity

    def land(self, x: Tensor, t: Tensor, r: Tensor, cond: Condition) -> Tensor:
        return x - like(t - r, x) * self.velocity(x, t, r, cond)

    def slope(self, field: Field, x: Tensor, t: Tensor, dx: Tensor, dt: float, length: Tensor) -> Tensor:
        """d field / dt along (dx, dt), by a step back of no more than `length` (B,)."""
        if self.settings.derivative == "exact":
            return exact(field, x, t, dx, dt)
        return {"pair": pair, "difference": difference}[self.settings.derivative](
            field, x, t, dx, dt, length.clamp(LEAST, self.settings.width))
