"""From a recipe to a run: the teacher, its roles, the method and its sampler. The one place that builds them, on any
device."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from torch import Tensor, nn

from ..data.prompts import Captions
from ..diffusion.contracts import Role
from ..diffusion.guidance import guided
from ..diffusion.sampler import Sampler
from ..errors import RequestError
from ..methods import load_method
from ..methods.base import Features, Follows, Heads, Method, middle
from ..models.extra_embedding import selectors
from ..models.own_schedulers import fitted
from ..models.quantized import half_
from ..models.roles import Roles, Weights, build_roles
from ..models.schedulers import StockCall, stock_scheduler
from ..models.teacher import Teacher, load_teacher
from ..recipe import Recipe
from ..recipe.values import size_of
from ..training import TrainConfig, checkpoints
from . import folder
from .buckets import Sides, bucket_sizes
from .checks import (
    Checked,
    begun_with,
    check,
    check_attention,
    check_embeddings,
    learning_rates,
    needs_of,
    network_features,
    student_setting,
)
from .inference import inference_of
from .negatives import keeping, kept_scale
from .rewards import judge_of, wanted
from .sources import source_of


@dataclass(frozen=True)
class Previous:
    """The student of the stage before, with which a stage begins. checksum: of its weights' file."""

    weights: Weights
    checksum: str


@dataclass(frozen=True)
class Run:
    """A recipe with everything that it names. stock: how a stock pipeline samples the student. previous: the checksum
    of the student that it began with. role: what samples, where that was chosen; checkpoint: where its weights were
    read from."""

    recipe: Recipe
    teacher: Teacher
    roles: Roles
    method: Method
    stock: StockCall
    device: torch.device
    previous: str | None = None
    role: str | None = None
    checkpoint: Path | None = None
    opened: dict[str, Captions] = field(default_factory=dict, init=False, compare=False, repr=False)
        # its data, looked through once

    @property
    def sampling_role(self) -> str:
        return self.role or sampling_role(self.recipe)

    @property
    def judged(self) -> bool:
        """Whether its method reads the prompts of a batch, for a reward."""
        return wanted(self.roles.needs)

    @property
    def sizes(self) -> tuple[Sides, ...]:
        """Height and width of the recipe's buckets, the teacher's own first; none without buckets."""
        return bucket_sizes(self.recipe, self.teacher)

    @property
    def step(self) -> int | None:
        """Of the checkpoint."""
        return None if self.checkpoint is None else checkpoints.step_of(self.checkpoint)

    @property
    def guidance(self) -> float:
        """The recipe's guidance scale, of a range its middle."""
        return middle(self.recipe.guidance)

    def called(self, role: Role, reads: Sequence[str] = ()) -> Role:
        """A role of the student's, which reads these numbers, as its pipeline calls it: guided, where the call guides
        it."""
        within = "w" in reads or self.teacher.scale is not None
        return role if within else guided(role, self.teacher.guidance.scale(self.stock.call))

    def scheduler(self) -> SchedulerMixin:
        """The stock scheduler, or one of our own for a student that is a solver."""
        stock = stock_scheduler(self.stock.scheduler, self.stock.config, self.teacher.scheduler)
        return fitted(stock, self.roles[self.sampling_role])


def setup(recipe: Recipe, device: torch.device, dtype: torch.dtype | None = None, previous: Previous | None = None,
          attention: str | None = None) -> Run:
    """Loads the teacher and builds the roles on it. RequestError, with the recipe's line, for what cannot work.

    previous: what a stage after the first is trained from. Without it, as for a run that is only looked at, the student
    begins as the base, and the base is the teacher. dtype, attention: as the recipe says, unless given.
    """
    checked, attention = check(recipe), attention or recipe.train.attention
    check_attention(recipe, attention, device)
    reward = judge_of(recipe, checked.needs, device)
    with recipe.blaming("teacher", "cannot be loaded"):
        teacher = load_teacher(source_of(recipe), dtype or _dtype(recipe), device, middle(recipe.guidance),
                               size_of(recipe.resolution), recipe.frames)
    check_embeddings(recipe, checked.needs, teacher.guidance.within)
    if dtype is None and recipe.train.precision == "fp16" and _frozen(recipe):
        half_(teacher.network)                         # alone: codecs overflow in float16
    stock, sampler = sampling(recipe, teacher)
    if "r" in checked.needs["student"].reads and teacher.family.no_pipeline is None and device.type != "meta":
        _check_landings(recipe, teacher, sampler)
    begun = None if previous is None else previous.weights
    if recipe.previous is None and recipe.student.begins_with is not None:
        begun = begun_with(recipe, teacher)
    roles = _roles(recipe, teacher, checked, begun, attention, reward).to(device)
    method = load_method(recipe.method)(checked.settings, keeping(roles, roles.needs, kept_scale(recipe)),
                                        recipe.guidance, sampler)
    return Run(recipe, teacher, roles, method, stock, device, None if previous is None else previous.checksum)


def sampling(recipe: Recipe, teacher: Teacher) -> tuple[StockCall, Sampler]:
    """How the student is sampled. RequestError for a number of steps that its scheduler does not serve."""
    try:
        inference = inference_of(recipe, teacher.schedule)
        if (kept := kept_scale(recipe)) is not None:
            inference = replace(inference, cfg=kept)
        stock = teacher.stock_call(inference)
        return stock, teacher.sampler(stock)
    except ValueError as error:
        raise recipe.refuse("steps", f"is {recipe.steps}, which cannot be sampled: {error}") from error


def _check_landings(recipe: Recipe, teacher: Teacher, sampler: Sampler) -> None:
    """RequestError for so many steps that their landings could not be folded into a stock network's weights."""
    with recipe.blaming("steps", f"is {recipe.steps}, but the student of {recipe.method} reads where each lands, "
                                 "which no stock pipeline says"):
        selectors(teacher.sinusoids(teacher.timestep(sampler.times)))


def sampling_role(recipe: Recipe) -> str:
    """The role that samples: the averaged student where there is one."""
    return "student" if recipe.train.ema is None else "ema"


def previous_student(recipe: Recipe, run: Path) -> Previous:
    """What the stage before leaves to this one, from its run folder."""
    before = recipe.previous
    role = sampling_role(before)
    checkpoint, state = folder.state_of(run, role)
    return Previous(student_weights(before, state), checkpoints.checksum_of(checkpoint, role))


def student_weights(recipe: Recipe, state: Mapping[str, Tensor]) -> Weights:
    """The student of a recipe, with which a stage after it can begin. state: of its sampling role."""
    return Weights(student_setting(recipe), state, needs_of(recipe)["student"].reads)


def open_run(run: str | Path, step: int | None = None, weights: str | None = None) -> Run:
    """A run with its sampling role as a checkpoint left it, in float32 on the CPU. step: of the checkpoint, the last
    one's unless given; weights: "ema" or "student", where a run has both."""
    recipe = folder.recipe_of(Path(run))
    check_weights(recipe, weights)
    opened = setup(recipe, torch.device("cpu"), torch.float32, attention="auto")
    role = weights or opened.sampling_role
    checkpoint, state = folder.state_of(Path(run), role, step)
    try:
        opened.roles.load_state_dict(role, state)
    except ValueError as error:
        raise RequestError(f"{checkpoint} does not fit the recipe beside it: {error}") from error
    return replace(opened, role=role, checkpoint=checkpoint)


def check_weights(recipe: Recipe, weights: str | None) -> None:
    """RequestError for weights that a run has not."""
    if weights not in (None, "ema", "student"):
        raise RequestError(f"--weights {weights}: there are ema and student")
    if weights == "ema" and recipe.train.ema is None:
        raise RequestError(f"--weights ema: {recipe.name} keeps no average (train.ema is none): take student, or "
                           "leave it out")


def train_config(recipe: Recipe) -> TrainConfig:
    """What of the recipe's `train` is the loop's; the rest is the networks'."""
    entries = recipe.train.model_dump(exclude={"ema", "gradient_checkpointing", "attention", "fsdp", "doctor",
                                               "doctor_every"})
    return TrainConfig(**entries, rates=learning_rates(recipe))


def _roles(recipe: Recipe, teacher: Teacher, checked: Checked, begun: Weights | None, attention: str,
           reward: nn.Module | None) -> Roles:
    needs = dict(checked.needs)
    if any(isinstance(need, Heads) and not isinstance(needs[need.of], Features) for need in needs.values()):
        network_features(recipe, teacher.feature_shapes, teacher.default_features)
    if recipe.train.ema is not None:
        needs["ema"] = Follows("student", recipe.train.ema)
    begins = ("student", "teacher") if recipe.taught_by_previous else ("student",)
    begin: Mapping[str, Weights] = {} if begun is None else dict.fromkeys(begins, begun)
    return build_roles(teacher, needs, checked.roles, begin=begin,
                       gradient_checkpointing=recipe.train.gradient_checkpointing, attention=attention, reward=reward,
                       seed=recipe.train.seed)


def _dtype(recipe: Recipe) -> torch.dtype:
    """Of the teacher: half the memory where it stays frozen; a role of all weights starts from all their digits."""
    return torch.bfloat16 if recipe.train.precision == "bf16" and _frozen(recipe) else torch.float32


def _frozen(recipe: Recipe) -> bool:
    """Whether the base only carries adapters, or a solver."""
    roles = (recipe.student, recipe.critic)
    return recipe.trains_solver or all(role.lora is not None for role in roles if role is not None)
