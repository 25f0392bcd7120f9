"""A teacher: what all families share. Loading, null conditions, a network of its own for a role, a stock pipeline
again."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.guidance import with_scale
from ..diffusion.prediction import Combine, rescaled
from ..diffusion.sampler import Sampler
from ..diffusion.schedule import like, moved
from ..diffusion.times import LEVELS
from ..errors import RequestError
from ..methods.base import Inference
from .adapters import matching
from .encoders import check_prompts
from .extra_embedding import added, fold, install, reading
from .families import Family, Size, family_of, served
from .fused import Trace
from .loading import Loading, settings_of
from .schedulers import StockCall, noise_refusals, sampler_of, stock_call
from .sources import Source, blaming, call_of, class_at, index_at
from .stock import defaults, unknown
from .weights import check_files, settled


class Teacher:
    """A loaded pipeline under the conventions of its family. The network is frozen and in evaluation mode.

    family: what differs for its kind. source: what it was loaded from. traces: where the LoRAs that were fused show.
    call: the keyword arguments that every call of its stock pipeline is given. parts: its components and settings by
    name; scheduler: its own. network: the one that is distilled. schedule, kind: its noise, and what it predicts.
    without: the components that from_pretrained of its class must be told to do without; dropped: those that it has and
    this loads without, such as a safety checker. loaded: the stock pipeline, None for Toy and on the meta device; cls:
    its class, None for Toy. guidance: how a call of its pipeline speaks of it.
    resolution: of its samples, height and width in pixels; None for its network's own. frames: of its videos; None for
    pictures. scale: what a network that reads its guidance scale by itself is given where a condition says none; None
    for others. read: the stock pipeline again, with these components; None where there is none. told: the tensors of
    a condition that its network reads.
    """

    def __init__(self, family: Family, parts: Mapping[str, Any], source: Source, *, scale: float = 1.0,
                 resolution: int | tuple[int, int] | None = None, frames: int | None = None,
                 loaded: DiffusionPipeline | None = None, without: tuple[str, ...] = (), dropped: tuple[str, ...] = (),
                 traces: tuple[Trace, ...] = (), cls: type[DiffusionPipeline] | None = None,
                 read: Callable[[Mapping[str, Any]], DiffusionPipeline] | None = None) -> None:
        _check(family, parts, source)
        self.family, self.parts, self.source, self.traces = family, dict(parts), source, traces
        self.without, self.dropped = without, dropped
        self.loaded, self._read, self.cls = loaded, read, cls
        size, self.call = every_call(family, parts, source, resolution, frames)
        self.resolution, self.frames = size and size[:2], None if family.video is None else size[2]
        self.scheduler, self.network = parts["scheduler"], parts[family.denoiser].eval().requires_grad_(False)
        self.guidance = family.guidance(self.network).beside_too(source.guided)
        self.scale = scale if self.guidance.within else None
        self.schedule, self.kind = family.schedule(self.scheduler), family.kind(self.scheduler)
        self.codec, self.latent_shape = family.codec(parts), family.latent_shape(parts, size)
        self.default_targets = matching(self.network, family.targets)
        self.feature_shapes, self.default_features = (family.feature_shapes(self.network, self.latent_shape),
                                                      family.default_features(self.network))
        # Parameters of each component that has any, before adapters lie on the network.
        self.sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()
                      if isinstance(part, nn.Module)}
        self.told = tuple(family.condition_shapes(parts, self.asked))
        self._null: Condition | None = None

    @property
    def name(self) -> str:
        return self.family.name

    def shape_at(self, sides: tuple[int, int]) -> tuple[int, ...]:
        """The shape of its latents at another height and width in pixels. RequestError for sides that it does not
        draw."""
        return self.family.latent_shape(self.parts, self.family.size(sides, self.frames))

    def at(self, sides: tuple[int, int]) -> Teacher:
        """This teacher, its networks and all, as one whose samples have another height and width in pixels.
        RequestError as `shape_at`."""
        shape = self.shape_at(sides)
        other = copy(self)
        other.latent_shape, other.resolution, other._null = shape, sides, None
        other.call = {**self.call, **self.family.call(self.parts, self.family.size(sides, self.frames))}
        other.feature_shapes = self.family.feature_shapes(self.network, shape)
        return other

    @property
    def combine(self) -> Combine:
        """How guidance mixes its raw outputs, combine(given, without, w)."""
        share = self.source.guidance_rescale
        return self.family.combine if share is None else rescaled(self.family.combine, share)

    @property
    def null_prompt(self) -> str:
        negative = self.source.negative_prompt
        return self.family.null_prompt if negative is None else negative

    @property
    def asked(self) -> dict[str, Any]:
        """`call` with the defaults of its pipeline's class."""
        return {**({} if self.cls is None else defaults(self.cls)), **self.call}

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's own weights, which adapters on it have not."""
        return self._dtype_of(self.network)

    def _dtype_of(self, network: nn.Module) -> torch.dtype:
        return network.get_submodule(self.family.weights or self.family.time.first).weight.dtype

    def to(self, device: torch.device | str) -> Teacher:
        """Moves the network, with the adapters on it, the text encoders and the codec."""
        for part in self.parts.values():
            if isinstance(part, nn.Module):
                part.to(device)
        self._null = None
        return self

    # -- conditions and latents --------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: list[str], negative: bool = False) -> Condition:
        """The condition of prompts, or of negative prompts as the stock pipeline encodes them. null is what that
        subtracts where it is given none; its tensors are one row, expanded. On the meta device tensors of the same
        shapes and dtypes."""
        make = self._shaped if self.device.type == "meta" else self._encoded
        if self._null is None:
            self._null = make([self.null_prompt], True)
        null = self._null.map(lambda row: row.expand(len(prompts), *row.shape[1:]))
        return make(prompts, negative).replace(null=null)

    def _encoded(self, prompts: list[str], null: bool) -> Condition:
        return self.family.encode(self, list(prompts), null)

    def _shaped(self, prompts: list[str], null: bool) -> Condition:
        shapes = self.family.condition_shapes(self.parts, self.asked)
        dtypes = {name: torch.int64 if name in ("label", "mask") else self.dtype for name in shapes}
        return Condition(**{name: torch.empty(len(prompts), *shape, dtype=dtypes[name], device="meta")
                            for name, shape in shapes.items()})

    def sized(self, cond: Condition, rows: Tensor) -> Condition:
        """The condition with what is told of each picture's size, (B, 6) as `data.buckets.told` says it, where the
        network reads such."""
        if cond.time_ids is None:
            return cond
        ids = self.family.sized(rows).to(cond.time_ids)
        return cond.replace(time_ids=ids, null=cond.null.replace(time_ids=ids))

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1], of videos (B, F, 3, H, W), -> latents as the network knows them, float32: the
        posterior's mode, or a sample of it where a generator is given."""
        return self.codec.encode(pixels.to(self.device), generator)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels (B, 3, H, W) in [-1, 1], of videos (B, F, 3, H, W), float32, clipped as the stock pipeline
        does; points as they are."""
        return self.pixels(latents).clamp(-1, 1) if self.family.samples == "pictures" else latents

    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode`, but not clipped, and with gradients to the latents: a pixel beyond the range is to find its way
        back."""
        return self.codec.pixels(latents)

    # -- the network -------------------------------------------------------------------------------------------------

    def timestep(self, t: Tensor) -> Tensor:
        """t (B,) in [0, 1] -> what the network is told, (B,) float64 on the CPU."""
        return self.family.timestep(t.double().cpu(), self.scheduler)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        """The raw output, in the shape and dtype of x_t (B, ...). Reads the family's fields of cond, and all of
        cond.extra."""
        if lacking := [name for name in self.told if cond is None or vars(cond)[name] is None]:
            raise ValueError(f"this network reads {', '.join(lacking)}: pass a condition of teacher.encode(prompts)")
        time, dtype = self.family.time, self._dtype_of(network)
        timestep = moved(self.timestep(t).to(self.family.timestep_dtype or dtype), x_t.device)
        seen = x_t if self.family.scaling is None else like(self.family.scaling(t.double().cpu(), self.scheduler),
                                                            x_t) * x_t
        given = self.family.inputs(network, seen.to(dtype), timestep, cond)
        own = [name for name in time.own(tuple(cond.extra)) if name != "w" or not self.guidance.within]
        with reading(network, time.sinusoids, {name: cond.extra[name] for name in own}):
            raw = network(**given)
        return self.family.output(raw, x_t).to(x_t.dtype)

    def scaled(self, cond: Condition) -> Condition:
        """The condition with the scale that the network reads by itself, where it does and the condition says none."""
        return cond if self.scale is None or cond.w is not None else with_scale(cond, self.scale)

    def feature_map(self, output: Any, x_t: Tensor) -> Tensor:
        """What a module returned in the pass of x_t, as a map (B, C, H, W)."""
        return self.family.feature_map(self.network, output, x_t)

    def inputs(self, batch: int) -> dict[str, Any]:
        """What the denoiser's forward is called with, for a batch of null prompts at t = 1: for measuring."""
        x_t = torch.zeros(batch, *self.latent_shape, device=self.device, dtype=self.dtype)
        timestep = self.timestep(torch.ones(batch)).to(self.device, self.family.timestep_dtype or self.dtype)
        return self.family.inputs(self.network, x_t, timestep, self.scaled(self.encode([self.null_prompt] * batch)))

    def fresh_network(self, state: Mapping[str, Tensor], reads: Sequence[str] = ()) -> nn.Module:
        """A float32 network of its own with these weights. reads: the numbers beside its time that it reads; their
        layers are zero unless in `state`."""
        time = self.family.time
        network = self.family.fresh(self.network, time.config(reads))
        layers = time.layers(reads)
        if own := f"{time.sinusoids}.layer" if time.own(reads) else None:
            install(network, time.sinusoids, nn.Linear(layers[own], time.out(network, own), bias=False))
        network = (network.to_empty(device=self.device) if any(p.is_meta for p in network.parameters())
                   else network.to(self.device))
        kept = network.state_dict()
        # tables that a class makes itself and keeps out of its state
        for path, buffer in self.network.named_buffers():
            if path not in kept:
                network.get_buffer(path).copy_(buffer)
        network.load_state_dict({**self.silent(reads), **state})
        return network.eval().requires_grad_(False)

    def silent(self, reads: Sequence[str]) -> dict[str, Tensor]:
        """The layers that read these numbers, where they contribute nothing yet."""
        time = self.family.time
        return {f"{path}.weight": torch.zeros(time.out(self.network, path), width, device=self.device)
                for path, width in time.layers(reads).items()}

    def sinusoids(self, timestep: Tensor) -> Tensor:
        """Of what the network is told (N,) -> (N, D) float64, made in the network's own float32."""
        time = self.family.time
        given = timestep.to(self.device, self.family.timestep_dtype or torch.float32) * time.scale(self.network)
        return self.network.get_submodule(time.sinusoids)(given).double().cpu()

    def folded(self, layers: Mapping[str, Tensor], reads: Sequence[str], weight: Tensor, sampler: Sampler,
               w: float | None) -> tuple[Tensor, Tensor]:
        """What these numbers add in a sampler's steps as a term b a on the weights of the time embedding's first linear
        layer: (a (n, D), b (O, n)), see `extra_embedding.fold`. layers: the weights that read them; weight: (O, D); w:
        the guidance scale."""
        every = torch.linspace(1 / LEVELS, 1, LEVELS, dtype=torch.float64)
        return fold(added(self.family.time, layers, numbers(reads, sampler, w)), weight.double(),
                    self.sinusoids(self.timestep(sampler.times)), self.sinusoids(self.timestep(every)))

    # -- stock -------------------------------------------------------------------------------------------------------

    def stock_call(self, inference: Inference) -> StockCall:
        """How its stock pipeline samples so. ValueError where no stock scheduler does."""
        if self.scale is not None:
            inference = replace(inference, guidance=self.scale)
        found = stock_call(inference, self.schedule, self.guidance, self.scheduler, self.family.sigmas)
        call = {**found.call, **self.call}
        if self.cls is not None and (names := unknown(self.cls, call)):
            raise ValueError(f"it asks its pipeline for {', '.join(names)}, which a call of {self.cls.__name__} "
                             "does not take: choose a method or settings of even steps, which need nothing but "
                             "their number")
        return StockCall(found.scheduler, found.config, call, found.components)

    def sampler(self, stock: StockCall) -> Sampler:
        """The sampler that training and the stock pipeline share. ValueError for what its scheduler does not serve."""
        return sampler_of(stock, self.schedule, self.scheduler)

    def pipeline(self, network: nn.Module | None = None, scheduler: SchedulerMixin | None = None) -> DiffusionPipeline:
        """A new stock pipeline, its network and scheduler read from the source unless given. Codec and text encoders,
        which nobody trains, are shared with this teacher. RequestError where the family has none."""
        if self._read is None:
            raise RequestError(self.family.no_pipeline or f"{self.source} was opened without weights")
        given = {self.family.denoiser: network, "scheduler": scheduler}
        shared = {name: part for name, part in self.parts.items() if name not in given}
        return self._read(shared | {name: part for name, part in given.items() if part is not None}).to(self.device)


def numbers(reads: Sequence[str], sampler: Sampler, w: float | None) -> dict[str, Tensor]:
    """What a student reads at each evaluation of a sampler, (k,) float64: its guidance scale, and where its step
    lands."""
    if "w" in reads and w is None:
        raise RequestError("this student reads its guidance scale, and weights hold one: say which")
    known = {"w": torch.full((sampler.nfe,), 1.0 if w is None else w, dtype=torch.float64),
             "r": sampler.landings}
    if unknown := [name for name in reads if name not in known]:
        raise RequestError(f"nothing says which {', '.join(unknown)} a student is to read in its steps")
    return {name: known[name] for name in reads}


def _check(family: Family, parts: Mapping[str, Any], source: Source) -> None:
    """RequestError for pipelines of a supported class whose parts their family does not translate."""
    reasons = [reason for reason, holds in family.refusals(parts).items() if holds]
    if source.guided and family.guidance(parts[family.denoiser]).within:
        asked = " or ".join(source.guided)
        reasons += [f"its network reads its guidance scale by itself, and no {asked}: leave it out"]
    if not reasons:
        reasons = noise_refusals(family.schedule(parts["scheduler"]), family.kind(parts["scheduler"]),
                                  parts["scheduler"])
    if reasons:
        raise RequestError(f"the teacher {source} cannot be distilled here: {'; '.join(reasons)}")


# Loading --------------------------------------------------------------------------------------------------------------

def load_teacher(source: str | Path | Source, dtype: torch.dtype = torch.float32,
                 device: torch.device | str | None = None,
                 scale: float = 1.0, resolution: int | tuple[int, int] | None = None,
                 frames: int | None = None) -> Teacher:
    """Loads a diffusers pipeline as a Source says; a folder, a Hub id or one .safetensors file stands for a Source of
    it alone.

    dtype: of the network, the text encoders and the codec, torch.float32 or torch.bfloat16. device: where to, the CPU
    unless given; on "meta" every network is built from its config, no weights are read, and conditions are shapes.
    scale: the guidance scale of a network that reads one by itself. resolution: of its pictures in pixels, a side or
    height and width; its own unless given; frames: of its videos, as many as its pipeline makes unless given.
    RequestError, before any weights are read, for what is missing, damaged or of an unsupported class.
    """
    source, meta = Source.of(source), device is not None and torch.device(device).type == "meta"
    if dtype not in (torch.float32, torch.bfloat16):
        raise RequestError(f"a teacher is loaded in float32 or bfloat16, not in {dtype}: codecs overflow in float16")
    index = index_at(source)
    family = family_of(served(source, index["_class_name"]))
    source = settled(source, index)
    check_files(source)
    family.size(None, frames)
    options = {"scale": scale, "resolution": resolution, "frames": frames}
    if family.open is not None:
        with blaming("a teacher", source.place):
            teacher = Teacher(family, family.open(source.place, dtype), source, **options)
    else:
        # configs are read field by field, and any of them may hold anything
        with blaming("a teacher", source.place):
            loading = Loading(source, index, family, dtype)
            loading.check()
            teacher = (Teacher(family, loading.parts_on_meta(), source, cls=loading.kind, **options) if meta
                       else _with_weights(loading, options))
    teacher = teacher if device is None else teacher.to(device)
    if not meta:
        with blaming("a text encoder", source.place):
            check_prompts(teacher)
    return teacher


def _with_weights(loading: Loading, options: Mapping[str, Any]) -> Teacher:
    loaded, traces = loading.pipeline({})
    if not Path(loading.source.place).exists():
        loading.check()                                # what the Hub has supplied a moment ago
    return Teacher(loading.family, loaded.components | settings_of(loaded.config), loading.source, loaded=loaded,
                   without=loading.without, dropped=loading.dropped, traces=traces, cls=loading.kind,
                   read=lambda parts: loading.pipeline(parts)[0], **options)


def every_call(family: Family, parts: Mapping[str, Any], source: Source,
               resolution: int | tuple[int, int] | None = None,
               frames: int | None = None) -> tuple[Size, dict[str, Any]]:
    """(the size of a pipeline's samples, None for its network's own; the keyword arguments that every call of it is
    given)."""
    call = call_of(source)
    sides = (resolution, resolution) if isinstance(resolution, int) else resolution
    if sides is None and {"height", "width"} <= call.keys():
        sides = call["height"], call["width"]
    size = family.size(sides, call.get("num_frames") if frames is None else frames)
    return size, {**call, **family.call(parts, size)}


def family_at(source: str | Path | Source) -> Family:
    """The family of a pipeline, by what its folder, file or Hub index says. RequestError for what is no pipeline of a
    known one."""
    source = Source.of(source)
    return family_of(served(source, class_at(source)))
