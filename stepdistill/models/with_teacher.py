"""Sampling with the teacher in a stock pipeline: its scheduler goes by a schedule of roles, and its denoiser is the
student and the teacher by turns.

The pipeline is called as its teacher is, with guidance, so that it hands over the prompt and what stands in for none.
In the student's turns the network is asked about the prompt alone, and its answer stands in both places: guidance mixes
it with itself, whatever the scale. So each turn costs the evaluations that it needs, and no more.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from ..diffusion.collaboration import Collaboration, Course, Judge, Turn, system
from ..diffusion.prediction import Prediction
from ..diffusion.sampler import SHAPING, Sampler
from ..diffusion.schedule import Schedule, VariancePreserving
from ..diffusion.times import LEVELS
from ..errors import RequestError
from .adapters import activate, active_adapters
from .families import Family, family_of
from .loading import settings_of

# Pipelines whose guidance is one call of the network on both halves of a batch, of which the second has the prompts.
SERVED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "PixArtAlphaPipeline",
          "PixArtSigmaPipeline", "SanaPipeline")
SAME = 1e-6                                         # of alphas_cumprod of two schedulers of one noise
Score = Callable[[Tensor], Tensor]                  # pixels (B, 3, H, W) in [-1, 1] -> (B,), more is better


class TurnScheduler:
    """What a stock pipeline asks of a scheduler, by a schedule of roles. Its state is alpha x_0 + sigma eps."""

    order = 1

    def __init__(self, together: Collaboration, schedule: Schedule, kind: str, own: SchedulerMixin,
                 judge: Judge | None) -> None:
        self.together, self.schedule, self.kind, self.judge = together, schedule, kind, judge
        self.config = {**own.config, "use_dynamic_shifting": False}       # of which pipelines read no more
        self.init_noise_sigma = together.start
        self.course: Course | None = None                                 # of the call that is on its way, or the last

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        times = torch.tensor([turn.evaluation.time for turn in self.together.turns], dtype=torch.float64)
        told = (times * self.schedule.nodes - 1 if isinstance(self.schedule, VariancePreserving)
                else LEVELS * self.schedule.sigma(times))
        self.timesteps = told.float().to(device)
        self.course = Course(self.together, self.judge)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | None = None) -> Tensor:
        return sample

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor,
             generator: torch.Generator | list[torch.Generator] | None = None, return_dict: bool = True
             ) -> tuple[Tensor]:
        turn, x = self.course.turn, sample.float()
        noise = (randn_tensor(x.shape, generator=generator, device=x.device, dtype=sample.dtype).float()
                 if turn.noisy else None)
        level = torch.full((len(x),), turn.evaluation.level, dtype=torch.float64)
        p = Prediction(model_output.float(), x, level, self.schedule, self.kind)
        return (self.course.take(p, noise).to(sample.dtype),)


class TurnDenoiser:
    """The forward of a denoiser that is the student and the teacher by turns.

    student: the pipeline's own forward; teacher: another network's, or the same one within `off`, which takes the
    student's adapter off. doubled: batches hold what stands in for no prompt, and then the prompts.
    """

    def __init__(self, scheduler: TurnScheduler, student: Callable[..., Any], teacher: Callable[..., Any],
                 off: Callable[[], AbstractContextManager], doubled: bool) -> None:
        self.scheduler, self.networks, self.off = scheduler, {"student": student, "teacher": teacher}, off
        self.doubled, self.answer = doubled, None
        self.evaluations = {"student": 0, "teacher": 0}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        turn, chosen = self.scheduler.course.turn, self.scheduler.course.chosen
        batch = next(len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        half = batch // 2 if self.doubled else batch
        rows = torch.arange(batch)[batch - half if turn.passes == 1 else 0:]
        if chosen is not None:
            rows = rows[chosen.cpu()[rows % half]]
        self.evaluations[turn.role] += len(rows)
        if len(rows):
            with self.off() if turn.role == "teacher" else nullcontext():
                given = (args, kwargs) if len(rows) == batch else _picked((args, kwargs), rows, batch)
                found = self.networks[turn.role](*given[0], **given[1])
            self.answer = found[0], type(found)
        raw, kind = self.answer                         # where no rows are asked for an earlier one, for its shape
        full = raw.new_zeros(batch, *raw.shape[1:])
        if len(rows):
            full[rows] = raw
            if self.doubled and turn.passes == 1:
                full[rows - half] = raw
        return (full,) if kind is tuple else kind(full)


def _picked(value: Any, rows: Tensor, batch: int) -> Any:
    """These rows of all that has one for each sample of a batch, however deep it lies."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _picked(one, rows, batch) for key, one in value.items()}
    return type(value)(_picked(one, rows, batch) for one in value) if isinstance(value, tuple | list) else value


@dataclass(frozen=True)
class Together:
    """A pipeline that samples with the teacher. call: the keyword arguments of its calls; turns: who is asked when."""

    call: Mapping[str, Any]
    turns: tuple[Turn, ...]
    nfe: float
    _denoiser: TurnDenoiser
    _decode: Callable[[Tensor], Tensor]

    @property
    def evaluations(self) -> dict[str, int]:
        """Samples that have passed the student's network so far, and the teacher's."""
        return dict(self._denoiser.evaluations)

    @torch.no_grad()
    def x0(self) -> list[Tensor]:
        """What each turn of the last call made of the pictures: (B, 3, H, W) in [-1, 1] each, on the CPU."""
        course = self._denoiser.scheduler.course
        if course is None:
            raise RequestError("nothing was drawn yet: call the pipeline with `call` first")
        return [self._decode(x0).clamp(-1, 1).float().cpu() for x0 in course.x0]


@contextmanager
def with_teacher(pipe: DiffusionPipeline, name: str, call: Mapping[str, Any], *, guidance: float,
                 teacher: DiffusionPipeline | None = None, adapter: str | None = None, score: Score | None = None,
                 below: float | None = None, **options: Any) -> Iterator[Together]:
    """Within, a few-step pipeline samples with its teacher's help; nothing is trained.

        call = stepdistill.load(pipe, folder)
        with stepdistill.with_teacher(pipe, "diversity", call, guidance=2.0) as together:
            image = pipe(prompt, **together.call).images[0]

    name: "diversity" (arXiv:2503.10637), "distillation_pp" (arXiv:2412.08871) or "adaptive" (arXiv:2312.10835);
    options: its own. call: the keyword arguments by which the student is called, under the pipeline's scheduler.
    guidance: the teacher's scale, 1 for none. The teacher is the same network without the student's LoRA, which
    `adapter` names where several are active, those of a style among them; or the pipeline `teacher`, where a student
    has weights of its own or its LoRA is fused. score, below: of `adaptive`: pictures that score less go back to the
    teacher. RequestError for what does not fit together.
    """
    family = _family(pipe, call)
    network = pipe.components[family.denoiser]
    if teacher is not None:
        _check_teacher(teacher, pipe, family)
    together = collaboration(pipe, name, call, guidance, **options)
    decode = lambda latents: family.codec(pipe.components | settings_of(pipe.config)).pixels(latents)
    scheduler = TurnScheduler(together, family.schedule(pipe.scheduler), family.kind(pipe.scheduler), pipe.scheduler,
                              _judge(name, score, below, decode))
    doubled = any(turn.passes == 2 for turn in together.turns)
    off = nullcontext if teacher is not None else _switch(network, adapter)
    asked = network.forward if teacher is None else teacher.components[family.denoiser]
    denoiser = TurnDenoiser(scheduler, network.forward, asked, off, doubled)
    shaped = {key: value for key, value in call.items() if key not in SHAPING}
    called = {**shaped, "num_inference_steps": len(together.turns),
              **family.guidance(network).call(guidance if doubled else 1.0)}
    with _in_place(pipe, network, scheduler, denoiser):
        yield Together(called, together.turns, together.nfe(), denoiser, decode)


def collaboration(pipe: DiffusionPipeline, name: str, call: Mapping[str, Any], guidance: float, **options: Any
                  ) -> Collaboration:
    """The turns that `with_teacher` takes with these. RequestError for what does not fit together."""
    schedule = _family(pipe, call).schedule(pipe.scheduler)
    try:
        sampler = Sampler.of_call(pipe.scheduler, call["num_inference_steps"], schedule, call)
    except ValueError as error:
        raise RequestError(f"the student's sampler cannot be shared with a teacher: {error}") from error
    return system(name, sampler, schedule, guidance, **options)


@contextmanager
def _in_place(pipe: DiffusionPipeline, network: nn.Module, scheduler: TurnScheduler, denoiser: TurnDenoiser
              ) -> Iterator[None]:
    own, before = pipe.scheduler, vars(network).get("forward")
    pipe.scheduler, network.forward = scheduler, denoiser
    try:
        yield
    finally:
        pipe.scheduler = own
        del network.forward
        if before is not None:
            network.forward = before


@dataclass(frozen=True)
class Help:
    """How a teacher helps in every call of a student's pipeline: the arguments of `with_teacher`.

    beside: what a guided call of the teacher is given as well. score: pixels (B, 3, H, W) in [-1, 1] and their prompts
    -> (B,). share: of the pictures that score less than `below`, where it was measured.
    """

    name: str
    guidance: float
    teacher: DiffusionPipeline
    options: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    score: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    below: float | None = None
    share: float = 1.0

    def turns(self, pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Collaboration:
        """What a call is made of. RequestError where the student would have no turn."""
        together = collaboration(pipe, self.name, call, self.guidance, **self.options)
        if all(turn.role == "teacher" for turn in together.turns):
            raise RequestError("the teacher would draw alone: a student of more steps, or a smaller handover, has a "
                               "turn")
        return together

    def of(self, pipe: DiffusionPipeline, call: Mapping[str, Any], prompts: Sequence[str]
           ) -> AbstractContextManager[Together]:
        """`with_teacher` for a call of these prompts."""
        score = None if self.score is None else lambda pixels: self.score(pixels, prompts)
        return with_teacher(pipe, self.name, {**call, **self.beside}, guidance=self.guidance, teacher=self.teacher,
                            score=score, below=self.below, **self.options)


def _family(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Family:
    """RequestError for a pipeline, or a call of it, where turns cannot be taken."""
    name = type(pipe).__name__
    if name not in SERVED:
        raise RequestError(f"a {name} is not sampled with the teacher: served are {', '.join(SERVED)}, which guide by "
                           "one call of their network")
    family = family_of(name)
    guidance = family.guidance(pipe.components[family.denoiser])
    if guidance.within:
        raise RequestError(f"the network of this {name} reads its guidance scale, and a call of it guides no teacher: "
                           "export the student as a LoRA, which has its scale within")
    if "num_inference_steps" not in call:
        raise RequestError("the call of a few-step student says its num_inference_steps; found "
                           f"{', '.join(call) or 'nothing'}")
    if (scale := guidance.scale(call)) != 1:
        raise RequestError(f"the student is called with a guidance scale of {scale:g}, and beside a teacher it is "
                           "called without: `guidance` is the teacher's alone")
    return family


def _check_teacher(teacher: DiffusionPipeline, pipe: DiffusionPipeline, family: Family) -> None:
    """RequestError where the teacher's steps would land elsewhere than the student's begin."""
    if type(teacher) is not type(pipe):
        raise RequestError(f"the teacher of a {type(pipe).__name__} is one too; found a {type(teacher).__name__}")
    kinds = [family.kind(one.scheduler) for one in (teacher, pipe)]
    if kinds[0] != kinds[1]:
        raise RequestError(f"teacher and student share their states, and the teacher's scheduler says that its network "
                           f"predicts {kinds[0]}, the student's {kinds[1]}: a LoRA of this teacher would be right")
    schedules = [family.schedule(one.scheduler) for one in (teacher, pipe)]
    times = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)
    levels = [schedule.angle(times).cos() ** 2 for schedule in schedules]
    apart = (levels[0] - levels[1]).abs()
    if apart.max() > SAME:
        at = times[apart.argmax()].item()
        raise RequestError("teacher and student share their states, and their schedules differ: at t = "
                           f"{at:.3g} the signal's share is {levels[0][apart.argmax()].item():.4g} of the teacher and "
                           f"{levels[1][apart.argmax()].item():.4g} of the student. A student of this teacher's noise "
                           "would be right")


def _switch(network: nn.Module, adapter: str | None) -> Callable[[], AbstractContextManager]:
    """What takes the student's adapter off the network, and puts it on again. RequestError where it is not to be
    told."""
    active = active_adapters(network)
    if not active:
        raise RequestError("the pipeline carries no active LoRA, so the teacher is not the same network: load the LoRA "
                           "and do not fuse it, or pass the base as `teacher`, a pipeline")
    if adapter is None and len(active) > 1 or adapter is not None and adapter not in active:
        raise RequestError(f"the active adapters are {', '.join(active)}"
                           + ("" if adapter is None else f", and {adapter} is none of them")
                           + f": say which is the student, such as adapter={active[-1]!r}")
    student = adapter or active[0]
    return lambda: _without(network, student, active)


@contextmanager
def _without(network: nn.Module, student: str, active: list[str]) -> Iterator[None]:
    activate(network, [name for name in active if name != student])
    try:
        yield
    finally:
        activate(network, active)


def _judge(name: str, score: Score | None, below: float | None, decode: Callable[[Tensor], Tensor]) -> Judge | None:
    """The judge of latents that a score of pictures makes."""
    if name != "adaptive":
        if score is not None or below is not None:
            raise RequestError(f"{name} judges no pictures: leave score and below out")
        return None
    if score is None or below is None:
        raise RequestError("adaptive sends poor pictures back to the teacher: pass `score`, a function of pixels "
                           "(B, 3, H, W) in [-1, 1] that gives a number for each, and `below`, the score that is too "
                           "low, such as sent_back(scores, 0.5) of some of the student's pictures")

    def judge(x0: Tensor) -> Tensor:
        found = score(decode(x0).clamp(-1, 1).float())
        if found.shape != (len(x0),) or not found.isfinite().all():
            raise RequestError(f"score should give {len(x0)} finite numbers, one a picture; found {found!r:.200}")
        return found.to(x0.device) < below
    return judge
