"""What a run will cost, read off configs: networks stand on the meta device, where they have shapes and no bytes."""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import resources
from .diffusion.contracts import Batch, Condition, Pairs
from .diffusion.draws import Step
from .diffusion.guidance import self_guided
from .diffusion.prediction import Prediction
from .diffusion.sampler import Sampler
from .diffusion.schedule import Schedule
from .errors import RequestError, gist
from .judges import judge, judged, tapped
from .methods import load_method
from .methods.base import FIXED, Codec, Features, Follows, Heads, Method, Need, Trained
from .models.discriminator import Shape, head, paired, tap
from .models.families import FAMILIES, Layout, call_of, layout
from .models.schedulers import stock_scheduler
from .models.vision import PictureHeads, prompt_width
from .plane import on_toy
from .recipe import Critic, Recipe, RoleChoice
from .work import checked, needs_of

ADAM, GRADIENT, FLOAT = 8, 4, 4       # bytes a trained parameter: two moments, its gradient, itself
LIBRARIES = 600_000_000               # bytes that torch, diffusers and transformers hold before any network


def plan(recipe: Recipe) -> dict[str, Any]:
    """{roles: {name: {parameters, trained, bytes}}, bytes, peak, passes, disk, downloads}; bytes as plain numbers.

    bytes: of all weights; peak: with gradients, optimizers and activations, an estimate. No weights are read. Of several
    stages roles, bytes and peak are those of the largest, passes a mean over all their steps, disk the sum, and `stages` has each.
    """
    found = [_stage(stage) for stage in recipe.stages]
    if len(found) == 1:
        return found[0]
    passes = [row["passes"] for row in found]
    updates, samples = sum(p["updates"] for p in passes), sum(p["updates"] * p["batch"] for p in passes)
    mean = {name: _short(sum(p[name] * p["updates"] * p["batch"] for p in passes) / samples) for name in ("forward", "backward")}
    each = [{"method": stage.method, "steps": stage.steps, **row} for stage, row in zip(recipe.stages, found, strict=True)]
    passes = mean | {"batch": _short(samples / updates), "updates": updates}
    return max(found, key=lambda row: row["peak"]) | {"disk": sum(row["disk"] for row in found), "passes": passes, "stages": each}


def _stage(recipe: Recipe) -> dict[str, Any]:
    source = resources.pipeline(recipe.teacher)
    if on_toy(recipe):
        raise recipe.refuse("teacher", f"is {recipe.teacher}, a Toy, which there is nothing to plan of: its recipes train within a minute, "
                            "by `stepdistill train`; plans are made of pipelines, such as assets/shapes-sd")
    settings, needs, _ = checked(recipe)
    if recipe.train.ema is not None:
        needs = needs | {"ema": Follows("student", recipe.train.ema)}
    with recipe.blaming("teacher", "cannot be planned on"):
        teacher = _teacher(source, recipe.revision)
    roles = _roles(recipe, needs, teacher)
    weights = sum(row["bytes"] for row in roles.values())
    trained = sum(row["trained"] for row in roles.values())
    passes, held = _passes(recipe, settings, needs, teacher)
    peak = LIBRARIES + weights + trained * (GRADIENT + ADAM) + round(held * _activations(recipe, teacher))
    return {"roles": roles, "bytes": weights, "peak": peak, "passes": passes, "disk": _disk(recipe, roles, teacher),
            "downloads": _downloads(source, recipe.revision, roles, teacher) + _vision_downloads(recipe, needs, roles)}


# -- networks without weights ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Teacher:
    """A pipeline without weights: its networks by name, its scheduler, what its family knows, what its calls are given."""

    parts: Mapping[str, nn.Module]
    scheduler: diffusers.SchedulerMixin
    known: Layout
    call: Mapping[str, Any]

    @property
    def denoiser(self) -> nn.Module:
        return self.parts[self.known.denoiser]

    def inputs(self, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """What the denoiser is called with, on the meta device; gradients flow back to the latents."""
        told = self.known.inputs(self.parts, self.call, lambda *shape: torch.empty(batch, *shape, device="meta", dtype=dtype))
        next(_tensors(told)).requires_grad_()
        return told


def _tensors(told: Mapping[str, Any]) -> Iterator[Tensor]:
    for value in told.values():
        if isinstance(value, Tensor):
            yield value
        elif value is not None:
            yield from _tensors(value)


def _teacher(source: str, revision: str | None) -> _Teacher:
    try:
        index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    except (OSError, ValueError) as error:
        raise RequestError(f"{source} is no diffusers pipeline: {gist(error)}") from error
    if index["_class_name"] not in FAMILIES:
        raise RequestError(f"{source} is a {index['_class_name']}; supported are {', '.join(FAMILIES)}")
    if "scheduler" not in index:
        raise RequestError(f"{source} is no whole pipeline: its model_index.json names no scheduler")
    known = layout(index["_class_name"])
    names = [name for name in (known.denoiser, "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
             if index.get(name, [None])[0] is not None]
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(source, subfolder="scheduler", revision=revision)
    return _Teacher({name: _network(source, revision, name, *index[name]) for name in names}, scheduler, known, call_of(source))


def _network(source: str, revision: str | None, name: str, library: str, kind: str) -> nn.Module:
    with torch.device("meta"):
        if library == "diffusers":
            cls = getattr(diffusers, kind)
            return cls.from_config(cls.load_config(source, subfolder=name, revision=revision))
        cls = getattr(transformers, kind)
        return cls(cls.config_class.from_pretrained(source, subfolder=name, revision=revision))


def _size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# -- roles -----------------------------------------------------------------------------------------------------------------

def _roles(recipe: Recipe, needs: Mapping[str, Need], teacher: _Teacher) -> dict[str, dict[str, int]]:
    base = 2 if recipe.train.precision != "fp32" and recipe.student.lora is not None else FLOAT
    rows = {"base" if recipe.taught_by_previous else "teacher": _row(_size(teacher.denoiser), 0, base)}
    if recipe.taught_by_previous:
        rows["teacher"] = _row(_count(teacher, recipe.previous.student), 0, FLOAT)
    others = FLOAT if recipe.train.precision == "fp16" else base
    rows |= {name: _row(_size(part), 0, others) for name, part in teacher.parts.items() if name != teacher.known.denoiser}
    for name, need in needs.items():
        if isinstance(need, Features):
            with torch.device("meta"):
                rows[name] = _row(_size(judge(recipe).network()), 0, FLOAT)
        elif isinstance(need, Heads):
            count = _heads(recipe, needs, teacher, need)
            rows[name] = _row(count, count, FLOAT)
        elif not isinstance(need, FIXED):
            count = _count(teacher, _choice(recipe, needs, name))
            rows[name] = _row(count, count if isinstance(need, Trained) else 0, FLOAT)
    return rows


def _row(parameters: int, trained: int, width: int) -> dict[str, int]:
    return {"parameters": parameters, "trained": trained, "bytes": parameters * width}


def _heads(recipe: Recipe, needs: Mapping[str, Need], teacher: _Teacher, need: Heads) -> int:
    """Parameters of a discriminator."""
    with torch.device("meta"):
        if isinstance(needs[need.of], Features):
            return _size(PictureHeads(judged(recipe), prompt_width(teacher.inputs(1))))
        read = _features(recipe, teacher)
        return sum(_size(head(shape)) for shape in (paired(read) if need.pair else read).values())


def _features(recipe: Recipe, teacher: _Teacher) -> dict[str, Shape]:
    """The modules that a discriminator reads, and the shapes of what they return."""
    return tapped(recipe, teacher.known.feature_shapes(teacher.denoiser), teacher.known.default_features(teacher.denoiser))


def _choice(recipe: Recipe, needs: Mapping[str, Need], name: str) -> RoleChoice | Critic:
    need = needs[name]
    if isinstance(need, Follows):
        return _choice(recipe, needs, need.leader)
    return recipe.critic if name == "critic" and recipe.critic is not None else recipe.student


def _count(teacher: _Teacher, choice: RoleChoice | Critic) -> int:
    """Parameters of an adapter, or of a copy."""
    if choice.lora is None:
        return _size(teacher.denoiser)
    targets = choice.lora.targets or teacher.known.targets
    layers = [module for name, module in teacher.denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
              and any(name == target or name.endswith(f".{target}") for target in targets)]
    return choice.lora.rank * sum(_rows_and_columns(layer) for layer in layers)


def _rows_and_columns(layer: nn.Module) -> int:
    """What one rank of an adapter adds: its row over the input (a convolution's with its window) and its column."""
    out, *rest = layer.weight.shape
    return out + math.prod(rest)


# -- passes ----------------------------------------------------------------------------------------------------------------

@dataclass
class _Tally:
    """Evaluations of the network, each counted `weight` times; trains: the roles of the update at hand.

    held: the most evaluations a sample whose activations one update keeps for its gradients.
    """

    forward: float = 0.0
    backward: float = 0.0
    held: float = 0.0
    trains: tuple[str, ...] = ()
    weight: float = 1.0

    def add(self, role: str, x_t: Tensor, share: float = 1.0) -> bool:
        """Counts this share of a pass of x_t (B, ...) through a role's network. Returns whether gradients go back through it."""
        back = torch.is_grad_enabled() and (role in self.trains or x_t.requires_grad)
        self.forward += self.weight * share * len(x_t)
        self.backward += self.weight * share * len(x_t) * back
        return back


@dataclass(frozen=True)
class _Counted:
    """A role that predicts zeros and counts who asks."""

    name: str
    schedule: Schedule
    tally: _Tally

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        back = self.tally.add(self.name, x_t)
        return Prediction(torch.zeros_like(x_t, requires_grad=back), x_t, t, self.schedule, "eps")


@dataclass(frozen=True)
class _CountedHeads:
    """Heads on the features of a role that counts; share: how far through the network the last of them lies."""

    role: _Counted
    share: float

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        return torch.zeros(len(x_t), 1, requires_grad=self.role.tally.add(self.role.name, x_t, self.share))

    def pair(self, x_r: Tensor, r: Tensor, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Tensor:
        return self(torch.cat([x_r, x_t]), torch.cat([r, t]), cond)[:len(x_r)]

    def with_prediction(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> tuple[Prediction, Tensor]:
        return self.role(x_t, t, cond), torch.zeros(len(x_t), 1)


@dataclass(frozen=True)
class _Moment(Step):
    """A step whose shared draws, such as the exit of a rollout, all fall on `at`."""

    at: float = 0.5

    def shared(self, name: str) -> float:
        return self.at


def _passes(recipe: Recipe, settings: Any, needs: Mapping[str, Need], teacher: _Teacher) -> tuple[dict[str, float], float]:
    """Network evaluations a sample and step, by running the method's own losses on roles that count; and `_Tally.held`.

    They are a mean over the exits of the student's rollouts. A pass that ends at a discriminator's last feature counts as
    its share of a whole pass's arithmetic.
    """
    tally = _Tally()
    free: dict[type, Any] = {Codec: lambda latents: latents, Features: lambda pixels: [pixels]}      # of the denoiser's evaluations
    roles: dict[str, Any] = {name: free.get(type(need)) or _Counted(name, teacher.known.schedule, tally)
                             for name, need in needs.items() if not isinstance(need, Heads)}
    if recipe.taught_by_previous:
        roles["teacher"] = self_guided(roles["teacher"], needs_of(recipe.previous)["student"].told_w)
    heads = {name: roles[need.of] for name, need in needs.items() if isinstance(need, Heads)}
    share = _share(recipe, teacher) if any(isinstance(read, _Counted) for read in heads.values()) else 0.0
    roles |= {name: _CountedHeads(read, share) if isinstance(read, _Counted) else lambda maps, cond: maps[0].flatten(1)[:, :1]
              for name, read in heads.items()}
    method = load_method(recipe.method)(settings, roles, recipe.guidance, _sampler(recipe, settings, teacher))
    shape, ids = (teacher.denoiser.config.in_channels, 2, 2), torch.arange(2)
    null = Condition(text=torch.zeros(2, 1, 1))
    x0 = None if recipe.data.kind == "prompts" else torch.zeros(2, *shape)
    batch = Batch(ids, Condition(text=torch.zeros(2, 1, 1), null=null), x0, shape, _pairs(recipe, shape))
    for exit in range(recipe.steps):
        _count_step(method, batch, tally, (exit + 0.5) / recipe.steps, recipe.steps)
    return {"forward": _short(tally.forward), "backward": _short(tally.backward), "batch": recipe.data.batch,
            "updates": recipe.train.updates}, tally.held


def _count_step(method: Method, batch: Batch, tally: _Tally, at: float, of: int) -> None:
    """One training step as one `of` so many, with batches shared as training shares them."""
    kept: dict[str, Any] = {}
    for update in method.updates():
        tally.trains, tally.weight = update.trains, 1 / (len(batch) * of * update.every)
        for repeat in range(update.repeat):
            kept, before = kept if repeat < update.shares else {}, tally.backward
            update.loss(batch, _Moment(0, 0, 0.0, update.name, repeat, batch.ids, kept=kept, at=at))
            tally.held = max(tally.held, (tally.backward - before) / tally.weight / len(batch))


def _pairs(recipe: Recipe, shape: tuple[int, ...]) -> Pairs | None:
    """Two of the recipe's pairs, of zeros."""
    if recipe.data.pairs is None:
        return None
    n = recipe.data.pairs.nodes
    return Pairs(torch.zeros(2, *shape), torch.zeros(2, n, *shape), torch.linspace(1, 0, n + 1, dtype=torch.float64)[1:].expand(2, -1))


def _short(count: float) -> float:
    """To three digits after the point, none where it is whole."""
    return int(near) if (near := round(count, 3)).is_integer() else near


def _sampler(recipe: Recipe, settings: Any, teacher: _Teacher) -> Sampler:
    try:
        inference = load_method(recipe.method).inference(settings, recipe.steps, teacher.known.schedule_name, recipe.guidance)
        scheduler = stock_scheduler(inference.scheduler, inference.config, teacher.scheduler)
        return Sampler.of_call(scheduler, recipe.steps, teacher.known.schedule, inference.call)
    except ValueError as error:
        raise recipe.refuse("steps", f"is {recipe.steps}, which cannot be sampled: {error}") from error


def _share(recipe: Recipe, teacher: _Teacher) -> float:
    """Of the arithmetic of a whole pass, what one takes that ends after the discriminator's last feature."""
    counts = []
    for names, leave in (((), False), (tuple(_features(recipe, teacher)), True)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, tap(teacher.denoiser, names, leave):
            teacher.denoiser(**teacher.inputs(1))
        counts.append(counter.get_total_flops())
    return counts[1] / counts[0]


def _activations(recipe: Recipe, teacher: _Teacher) -> int:
    """Bytes that autograd keeps of one micro-batch, counted in a pass on the meta device."""
    network, batch = teacher.denoiser, recipe.data.batch // recipe.train.accumulate
    width = torch.float32 if recipe.train.precision == "fp32" else torch.bfloat16        # or as wide
    if recipe.train.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    network.train()
    if width != torch.float32:
        network.to(width)
    own = {id(parameter) for parameter in network.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            seen[id(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        kept.append(tensor)
        return tensor

    kept: list[Tensor] = []                # alive to the end, so that no two storages share an id
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(**teacher.inputs(batch, width), return_dict=False)
    return sum(seen.values())


# -- disk and net ----------------------------------------------------------------------------------------------------------

def _disk(recipe: Recipe, roles: Mapping[str, Mapping[str, int]], teacher: _Teacher) -> int:
    """Bytes of checkpoints (every role and both moments), the export, and the cache, unless an earlier stage has filled it."""
    adapters = [row for name, row in roles.items() if name not in (*teacher.parts, "teacher", "base")]
    each = sum(row["bytes"] + row["trained"] * ADAM for row in adapters)
    count = -(-recipe.train.updates // (recipe.train.checkpoint_every or recipe.train.updates))
    data = recipe.data
    latents, *others = (tensor.numel() for tensor in _tensors(teacher.inputs(1)) if tensor.ndim > 1)      # all but the time
    sample = FLOAT * (latents * (1 if data.pairs is None else 1 + data.pairs.nodes) + sum(others))
    same = [stage for stage in recipe.stages[:-1] if stage.data.model_dump(exclude={"batch"}) == data.model_dump(exclude={"batch"})]
    cached = data.count if data.count and (data.cache or data.made is not None) and not same else 0
    return count * each + roles["student"]["bytes"] + cached * sample


def _downloads(source: str, revision: str | None, roles: Mapping[str, Mapping[str, int]], teacher: _Teacher) -> list[str]:
    """A Hub teacher whose weights are not in the cache yet."""
    if resources.locate(source) is not None:
        return []
    from huggingface_hub import try_to_load_from_cache
    whole = f"{teacher.known.denoiser}/diffusion_pytorch_model.safetensors"
    if any(isinstance(try_to_load_from_cache(source, file, revision=revision), str) for file in (whole, f"{whole}.index.json")):
        return []
    size = sum(row["parameters"] for name, row in roles.items() if row["trained"] == 0) * FLOAT
    return [f"{source} (up to {size / 1e9:.1f} GB)"]


def _vision_downloads(recipe: Recipe, needs: Mapping[str, Need], roles: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A Hub network that judges pictures, if its weights are not in the cache yet."""
    name = next((name for name, need in needs.items() if isinstance(need, Features)), None)
    if name is None or resources.locate(source := judge(recipe).source) is not None:
        return []
    from huggingface_hub import try_to_load_from_cache
    if isinstance(try_to_load_from_cache(source, "model.safetensors"), str):
        return []
    return [f"{source} (up to {roles[name]['bytes'] / 1e9:.1f} GB)"]
