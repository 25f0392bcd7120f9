"""Which calls of stock pipelines make the rows of a bench, and how many network evaluations each one takes."""
from __future__ import annotations

import time
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    SchedulerMixin,
)
from torch import Tensor

from ..diffusion.draws import key
from ..errors import RequestError
from ..models.families import stock_guidance, stock_prompts
from ..models.schedulers import is_flow, stock_scheduler
from ..models.stock import Guidance, pictures, unknown
from ..models.with_teacher import Help
from .counting import counted, denoiser_of


def _each(n: int) -> int:
    return n


def _twice(n: int) -> int | None:
    """k steps of Heun take 2 k - 1 evaluations: the last one is Euler's."""
    return (n + 1) // 2 if n % 2 else None


# name -> stock scheduler, what is changed on top of the teacher's config, and the steps that hit n evaluations exactly.
Solvers = dict[str, tuple[type[SchedulerMixin], dict[str, Any], Callable[[int], int | None]]]
SOLVERS: Solvers = {
    "ddim": (DDIMScheduler, {"set_alpha_to_one": True}, _each),
    "euler": (EulerDiscreteScheduler, {}, _each),
    "heun": (HeunDiscreteScheduler, {}, _twice),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}, _each),
}
FLOW_SOLVERS: Solvers = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}, _each),
    "heun": (FlowMatchHeunDiscreteScheduler, {}, _twice),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2,
                                               "use_flow_sigmas": True,
                                               "prediction_type": "flow_prediction"}, _each),
}


@dataclass(frozen=True)
class Target:
    """What stands in the table. A teacher has no `call` and is swept over solvers and guidance, under stock schedulers.

    A student is called as its stepdistill.json says: call holds the literal keyword arguments of the pipeline call, the
    pipeline its scheduler; only the number of steps is varied. method: None of what others made. given: what every call
    of the pipeline is given beside; guided: and what a guided one is. companion: nobody asked for it; where it cannot
    be run, its rows are left out. identity: changes with its weights. trained: the guidance scale, or the range of
    scales, that a student was trained at. fixed_steps: its number of steps is folded into its weights, or its
    solver's. made: what results.json says of its weights, such as where they lie. help: of the teacher, in each of a
    student's calls.
    """

    name: str
    pipeline: DiffusionPipeline
    method: str | None = None
    call: Mapping[str, Any] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    guided: Mapping[str, Any] = field(default_factory=dict)
    companion: bool = False
    identity: str = ""
    trained: float | tuple[float, float] | None = None
    fixed_steps: bool = False
    made: Mapping[str, Any] = field(default_factory=dict)
    help: Help | None = None

    def __post_init__(self) -> None:
        if ":" in self.name or self.name == "real":
            raise RequestError(f"a target cannot be named {self.name!r}: `real` and names with a colon stand for "
                               "other rows")

    @property
    def guidance(self) -> Guidance:
        return stock_guidance(self.pipeline).beside_too(self.guided)

    @property
    def prompted(self) -> bool:
        """Whether prompts make a difference to it."""
        return stock_prompts(self.pipeline).tell(self.pipeline)


@dataclass(frozen=True)
class Plan:
    """One row to be: a scheduler put into the target's pipeline and a call of it. nfe counts network evaluations."""

    target: Target
    name: str
    scheduler: SchedulerMixin
    call: Mapping[str, Any]
    nfe: int
    steps: int
    guidance: float

    @property
    def key(self) -> tuple[str, int, float]:
        return self.name, self.nfe, self.guidance

    def images(self, prompts: Sequence[str], ids: Tensor, seed: int) -> Tensor:
        """(B, 3, H, W) in [-1, 1] on the CPU. The noise of a sample depends on (seed, its id) alone, in every row."""
        pipeline, spelled = self.target.pipeline, stock_prompts(self.target.pipeline)
        asked = prompts if self.target.prompted else [spelled.any(pipeline)] * len(prompts)
        generators = [torch.Generator().manual_seed(key(seed, "sample", i)) for i in ids.tolist()]
        with torch.random.fork_rng(), _scheduler(pipeline, self.scheduler), self._called(asked) as call:
            # for pipelines that keep the generator to themselves
            torch.manual_seed(key(seed, "pipeline", ids[0].item()))
            return pictures(pipeline, spelled, asked, generator=generators, **call) * 2 - 1

    @contextmanager
    def _called(self, prompts: Sequence[str]) -> Iterator[Mapping[str, Any]]:
        """The keyword arguments of the call, with the teacher at hand where it helps."""
        if self.target.help is None:
            yield self.call
        else:
            with self.target.help.of(self.target.pipeline, self.call, prompts) as together:
                yield together.call

    @property
    def networks(self) -> list[torch.nn.Module]:
        """Whose evaluations are counted."""
        helper = self.target.help
        return [denoiser_of(one) for one in (self.target.pipeline, *(() if helper is None else (helper.teacher,)))]

    def counts(self, evaluated: float) -> dict[str, float]:
        """What results.json says of the evaluations of an image, where a judge may have sent it back."""
        return {} if self.target.help is None else {"evaluations": evaluated}

    def check_count(self, evaluated: int, drawn: int) -> None:
        """RuntimeError where the networks were evaluated another number of times than was planned. Of a judge's
        verdicts only the share is planned, so there it lies between none and all."""
        least = most = self.nfe
        if self.target.help is not None:
            turns = self.target.help.turns(self.target.pipeline, self.call)
            least, most = ((self.nfe,) * 2 if turns.nfe(0.0) == turns.nfe() else (turns.nfe(0.0), turns.nfe()))
        if not least * drawn <= evaluated <= most * drawn:
            raise RuntimeError(f"{self.name} was planned with {self.nfe} network evaluations per image but took "
                               f"{evaluated / drawn:g}")

    def check_finite(self, broken: int, drawn: int) -> None:
        """RequestError where some of the pictures drawn have pixels that are no finite number."""
        if broken:
            raise RequestError(f"{broken:,} of {drawn:,} pictures of {self.name} at {self.nfe} NFE have pixels "
                               "that are no finite number: the pipeline overflows. Look at its dtype (an autoencoder "
                               "in float16 is the usual place) and at the student's weights")


def plans(target: Target, nfe: Sequence[int], guidance: Sequence[float], solvers: Sequence[str],
          say: Callable[[str], None]) -> list[Plan]:
    """The rows of a target in the order of their evaluations. RequestError if none of `nfe` can be met; of a companion
    that is said, and it has no rows."""
    target.pipeline.set_progress_bar_config(disable=True)
    try:
        rows = (_teacher(target, nfe, guidance, solvers, say) if target.call is None else
                _student(target, nfe, say) if target.help is None else _helped(target, nfe, say))
        if not rows:
            raise RequestError(f"{target.name} can be run at none of nfe={list(nfe)} with "
                               f"guidance={list(guidance)} and solvers={list(solvers)}: a guided step takes two "
                               "evaluations, k steps of heun take 2 k - 1")
    except RequestError as error:
        if not target.companion or not {*solvers} <= SOLVERS.keys():
            raise
        say(f"{target.name}, which stands beside the students, is left out: {error}")
        return []
    return sorted(rows, key=lambda row: row.nfe)


def _teacher(target: Target, nfe: Sequence[int], guidance: Sequence[float], solvers: Sequence[str],
             say: Callable[[str], None]) -> list[Plan]:
    rows, known = [], _solvers_for(target)
    unserved = [name for name in solvers if name in SOLVERS and name not in known]
    for name in unserved:
        say(f"{target.name} is not run with {name}, which has no form for flow matching")
    schedulers = {name: solver_scheduler(target, name) for name in solvers if name not in unserved}
    for name, scheduler in [*schedulers.items()]:
        if reason := _reason_against(target, scheduler):
            say(f"{target.name} is not run with {name}: {reason}")
            del schedulers[name]
    for w in guidance:
        call = {**target.given, **target.guidance.call(w)}
        first = Plan(target, target.name, target.pipeline.scheduler, call | {"num_inference_steps": 1}, 0, 1, float(w))
        passes = evaluations(first)
        for name, scheduler in schedulers.items():
            for n in nfe:
                steps = None if n % passes else known[name][2](n // passes)
                if steps == 1 and scheduler.config.get("shift_terminal") is not None:
                    continue                               # it stretches a grid to its end, which one time has not
                if steps is not None:
                    asked = call | {"num_inference_steps": steps} | _grid(target, scheduler, steps)
                    rows.append(Plan(target, f"{target.name}:{name}", scheduler, asked, n, steps, float(w)))
    return rows


def _reason_against(target: Target, scheduler: SchedulerMixin) -> str | None:
    """Why a pipeline cannot be called with a scheduler of another class than its own: some pass a grid of their own,
    which not all take, and some do not let a scheduler scale what the network reads."""
    call, scaled = {**target.given, **target.guidance.none, "num_inference_steps": 1}, []
    if type(scheduler) is type(target.pipeline.scheduler):
        return None
    tried = deepcopy(scheduler)
    if scales := "init_noise_sigma" in dir(tried):
        own = tried.scale_model_input
        tried.scale_model_input = lambda *given, **more: scaled.append(given) or own(*given, **more)
    try:
        evaluations(Plan(target, target.name, tried, call, 1, 1, 1.0))
    except (ValueError, TypeError) as error:              # a step may lack what the pipeline gives it
        return str(error)
    if scales and not scaled and tried.init_noise_sigma != 1:
        return f"a {type(target.pipeline).__name__} does not let a {type(tried).__name__} scale what its network reads"
    return None


def _solvers_for(target: Target) -> Solvers:
    """Those that a pipeline's noise schedule can be run with."""
    own = target.pipeline.scheduler
    if is_flow(own):
        return FLOW_SOLVERS
    if "beta_schedule" not in own.config:
        raise RequestError(f"{target.name} has a {type(own).__name__}, which holds neither betas nor a flow: "
                           f"the solvers {', '.join(SOLVERS)} need them")
    return SOLVERS


def solver_scheduler(target: Target, solver: str) -> SchedulerMixin:
    """The solver's stock scheduler under the pipeline's own noise schedule, with trailing steps."""
    known, own = _solvers_for(target), target.pipeline.scheduler
    if solver not in known:
        raise RequestError(f"unknown solver {solver!r}; known are {', '.join(known)}")
    kind, changes, _ = known[solver]
    if known is SOLVERS:
        changes = {"timestep_spacing": "trailing"} | changes
    else:
        shift = own.config["flow_shift" if "flow_shift" in own.config else "shift"]
        changes = {"flow_shift" if kind is DPMSolverMultistepScheduler else "shift": shift} | changes
    return stock_scheduler(kind.__name__, changes, own)


def _grid(target: Target, scheduler: SchedulerMixin, steps: int) -> dict[str, Any]:
    """Euler's own grid of k steps ends at a thousandth, where the last evaluation is wasted; the others have no choice,
    nor have pipelines whose call takes no sigmas."""
    even = {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}
    return (even if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not unknown(type(target.pipeline), even)
            else {})


def _student(target: Target, nfe: Sequence[int], say: Callable[[str], None]) -> list[Plan]:
    """Steps that the scheduler refuses are left out, with a word about it."""
    call, scheduler = dict(target.call), target.pipeline.scheduler
    own, guidance, rows = call["num_inference_steps"], target.guidance.scale(call), []
    passes = evaluations(Plan(target, target.name, scheduler, {**target.given, **call}, 0, own, guidance)) // own
    if passes > 1 and (left := [n for n in nfe if n % passes]):
        say(f"{target.name} is guided, and a step takes {passes} evaluations: it is not run at "
            f"{', '.join(map(str, left))}")
    for n in (n for n in nfe if n % passes == 0):
        try:
            asked = {**target.given, **at_steps(target, n // passes)}
        except RequestError as error:
            say(f"{target.name} is not run at {n // passes} steps: {error}")
            continue
        rows.append(Plan(target, target.name, scheduler, asked, n, n // passes, guidance))
    return rows


def _helped(target: Target, nfe: Sequence[int], say: Callable[[str], None]) -> list[Plan]:
    """The student's rows with what the teacher adds to them; of a judge's verdicts as many as it was made to find
    poor."""
    rows = []
    for row in _student(replace(target, help=None), nfe, say):
        try:
            count = target.help.turns(target.pipeline, row.call).nfe(target.help.share)
        except RequestError as error:
            say(f"{target.name} is not run at {row.steps} steps: {error}")
            continue
        rows.append(replace(row, target=target, nfe=round(count), guidance=target.help.guidance))
    return rows


def at_steps(target: Target, steps: int) -> dict[str, Any]:
    """A student's call at this number of steps, and at its own number the call as it is. Even sigmas of a flow are made
    anew.

    RequestError for a number that it was not made for: where its own is folded into its weights, listed with its times,
    or that of a scheduler that was made to give them; and for one that its scheduler does not serve.
    """
    call, scheduler = dict(target.call), target.pipeline.scheduler
    own, sigmas = call["num_inference_steps"], call.get("sigmas")
    if steps == own:
        return call
    if (why := _fixed(target)) is not None:
        raise RequestError(f"{target.name} was made for {own} steps, {why}: it cannot be sampled in {steps}")
    if sigmas is None:
        serve(scheduler, steps)
    return call | {"num_inference_steps": steps} | ({} if sigmas is None
                                                    else {"sigmas": [1 - i / steps for i in range(steps)]})


def _fixed(target: Target) -> str | None:
    """Why a student's number of steps is the one that it was made for; None where others are served."""
    call, sigmas = target.call, target.call.get("sigmas")
    if target.fixed_steps:
        return "which are folded into its weights, or of each of which its solver has a number"
    if "timesteps" in call:
        return f"at the times {call['timesteps']}"
    if target.method is not None and sigmas is None and is_flow(target.pipeline.scheduler):
        return "whose times its scheduler was made to give"       # of a pipeline whose call takes no sigmas
    return None if sigmas is None or _even(sigmas) else f"at the sigmas {sigmas}"


def _even(sigmas: Sequence[float]) -> bool:
    return all(abs(sigma - (1 - i / len(sigmas))) < 1e-6 for i, sigma in enumerate(sigmas))


def serve(scheduler: SchedulerMixin, steps: int) -> None:
    """RequestError where a scheduler has no such number of steps."""
    # a pipeline's, whose value matters not
    own = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        deepcopy(scheduler).set_timesteps(steps, **own)
    except ValueError as error:
        raise RequestError(f"{type(scheduler).__name__} does not serve {steps} steps: {error}") from error


def at_guidance(target: Target, w: float, say: Callable[[str], None]) -> dict[str, Any]:
    """What a call is given for the guidance scale w, of which 1 is none. It is said where guidance is added to a
    student that was trained to do without. RequestError for less than 1, and of a network that reads its scale for one
    that it was not trained at."""
    if not 1 <= w < float("inf"):
        raise RequestError(f"a guidance scale of {w:g} was asked for: it should be at least 1, which is none")
    if target.call is not None and target.trained is not None:
        low, high = target.trained if isinstance(target.trained, (tuple, list)) else (target.trained, target.trained)
        learned = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        if target.guidance.within and not low <= w <= high:
            raise RequestError(f"{target.name} was trained for a guidance scale of {learned}, which its network "
                               f"reads; asked for was {w:g}")
        if not target.guidance.within and w > 1 == target.guidance.scale(target.call):
            say(f"{target.name} was trained in with a guidance scale of {learned}: {w:g} guides it once more, at "
                "two evaluations a step")
    return target.guidance.call(w)


def evaluations(plan: Plan) -> int:
    """Network evaluations per image, counted in a call: a guided step shows as two, whatever the pipeline's
    conventions."""
    with counted(*plan.networks) as count:
        plan.images([stock_prompts(plan.target.pipeline).any(plan.target.pipeline)], torch.tensor([0]), seed=0)
    return count[0]


def latency(plan: Plan, prompts: Sequence[str], seed: int, calls: int = 5) -> float:
    """Median milliseconds of a call for a single image, from prompt to pixels on the CPU, after one to warm up.

    A student's LoRA and a teacher's are fused by then, as a student's card has it.
    """
    times = []
    for i in range(calls + 1):
        begin = time.perf_counter()
        plan.images([prompts[i % len(prompts)]], torch.tensor([i]), seed)
        times.append(1000 * (time.perf_counter() - begin))
    return median(times[1:])


@contextmanager
def _scheduler(pipeline: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    own, pipeline.scheduler = pipeline.scheduler, scheduler
    try:
        yield
    finally:
        pipeline.scheduler = own
