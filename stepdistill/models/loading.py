"""A pipeline's components as its Source says: read with their weights, or made from their configs alone."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.models.modeling_utils import LegacyModelMixin
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import RequestError, first_lines
from ..files import foreign
from .families import FAMILIES, Family, family_of, stock_index, text_to_image
from .fused import Trace, fuse_loras, try_loras
from .quantized import HEAD, keep_packed_, quantization_of, quantize_, read_saved, saved_as
from .sources import (
    SETTINGS,
    UNLOADABLE,
    Index,
    Source,
    absent_parts,
    at_revision,
    blaming,
    cached_file,
    call_of,
    configs_of,
    index_at,
    is_processor,
    listed,
)
from .weights import check_components, class_of, scheduler_class, weight_files


@dataclass(frozen=True)
class Loading:
    """A teacher that is to be read. index: what its pipeline is made of; dtype: of its networks."""

    source: Source
    index: Index
    family: Family
    dtype: torch.dtype

    @cached_property
    def kind(self) -> type[DiffusionPipeline]:
        return getattr(diffusers, caller(self.source, self.index))

    @property
    def dropped(self) -> tuple[str, ...]:
        """The components that the pipeline has and the family leaves where they are."""
        absent = absent_parts(self.index)
        return tuple(name for name in self.family.arguments(self.kind.__name__) if name in self.index
                     and name not in absent and name in slots(self.kind))

    @property
    def without(self) -> tuple[str, ...]:
        """The components that from_pretrained of its class must be told to do without."""
        return tuple(name for name in self.family.optional if name in absent_parts(self.index))

    def check(self) -> None:
        """RequestError for components that are not what their configs say, as far as their files are here."""
        source, taken = self.source, signature(self.kind.__call__).parameters
        for name in ("clip_skip", "negative_prompt", "guidance_rescale"):
            if (value := vars(source)[name]) is not None and name not in taken:
                raise RequestError(f"{name} is {value!r}, but a call of {self.kind.__name__} takes none: leave it out")
        # Some classes take any keyword, and leave those that they do not know alone.
        if names := [name for name in call_of(source) if name not in taken]:
            raise RequestError(f"{source} says in its {SETTINGS} that every call of it is given {', '.join(names)}, "
                               f"which a call of {self.kind.__name__} does not take: leave it out")
        if len(self.index) > 1:
            self._check_kinds()
        self._check_packed()
        index = (cached_file(source.place, "model_index.json", source.revision) if not Path(source.place).exists()
                 else Path(source.place) / "model_index.json")
        replaced = [name for name in ("vae", "scheduler") if vars(source)[name] is not None]
        if index is not None and index.is_file():
            check_components(index.parent, source, self.index, {*replaced, *self.family.arguments(self.kind.__name__)})

    def _check_packed(self) -> None:
        """RequestError for components to quantise that are no denoiser and no text encoder of this pipeline."""
        asked = self.source.components_to_quantize
        if asked is None:
            return
        absent, denoiser = absent_parts(self.index), self.family.denoiser
        may = [denoiser, *(name for name in slots(self.kind) if name.startswith("text_encoder") and name not in absent)]
        wrong = [name for name in asked if name not in may]
        if self.source.quantization is None or wrong or denoiser not in asked:
            found = ("quantization says no kind: nf4 or int8" if self.source.quantization is None
                     else f"it quantises {' and '.join(may)} alone" if wrong
                     else f"a LoRA lies on its {denoiser}: name that too, or leave the list out")
            raise RequestError(f"components_to_quantize names {', '.join(asked)} of a {self.kind.__name__}, "
                               f"but {found}")

    def _check_kinds(self) -> None:
        """RequestError for a pipeline without one of its parts, and for an autoencoder or a network of another class
        than its pipeline's."""
        may_lack = {name for name in self.kind._optional_components if not name.startswith("text_encoder")}
        optional = {*self.family.optional, *may_lack} - {self.family.denoiser}
        absent, held = absent_parts(self.index), listed(self.index)
        # a plan needs none, so that one may be left out; an encoder whose tokenizer is null reads nothing
        needless = lambda name: name.startswith("tokenizer") and (name not in absent or name.replace(
            "tokenizer", "text_encoder") in absent)
        lacking = [name for name in slots(self.kind) if name not in optional and name not in held
                   and not needless(name)]
        if lacking:
            raise RequestError(f"{self.source} is no whole pipeline: its model_index.json names no "
                               f"{', '.join(lacking)}")
        types = self.kind._get_signature_types()
        for name in (name for name in ("vae", self.family.denoiser) if name in types):
            found = class_of(name, *self.index[name])
            if not issubclass(found, (*types[name], LegacyModelMixin)):        # whose early names stand for others
                raise RequestError(f"the {name} of {self.source} is an {found.__name__}, which is not served: a "
                                   f"{self.kind.__name__} is served with an {types[name][0].__name__}")

    def pipeline(self, parts: Mapping[str, Any]) -> tuple[DiffusionPipeline, tuple[Trace, ...]]:
        """The stock pipeline with these components, the others read; and where the LoRAs that were fused into those
        show."""
        given = {**self.family.arguments(self.kind.__name__), **dict.fromkeys(self.without), **parts}
        return read_pipeline(self.kind, self.source, self.dtype, given)

    def parts_on_meta(self) -> dict[str, Any]:
        """The components on the meta device, made from their configs, and the scheduler; no tokenizers."""
        configs = Source(configs_of(self.source), self.source.revision)
        with _configs_at_hand(self.source):
            index = index_at(configs) if self.source.is_file else self.index
        dropped = self.family.arguments(self.kind.__name__)
        own = replaced_on_meta(self.source)
        parts = {name: _on_meta(configs, name, *made_by) for name, made_by in listed(index).items()
                 if name not in (*dropped, *own) and not is_processor(name, made_by[1])} | own
        networks = {name: part.to(self.dtype) for name, part in parts.items() if isinstance(part, nn.Module)}
        made = settings_of(index) | networks | {"scheduler": parts["scheduler"]}
        if self.source.loras:
            try_loras(self.kind(**dict.fromkeys(slots(self.kind)) | dropped | networks
                                | {"scheduler": parts["scheduler"]}),
                      self.source.loras)
        return made


def caller(source: Source, index: Index) -> str:
    """The class of the stock pipeline that calls this one as it is served."""
    family = family_of(text_to_image(index["_class_name"]))
    if family.called_by is None:
        return text_to_image(index["_class_name"])
    network = class_of(family.denoiser, *index[family.denoiser])
    with blaming(f"the config of {family.denoiser}", source.place):
        config = network.load_config(source.place, subfolder=family.denoiser, revision=source.revision)
    return text_to_image(family.called_by(index, config))


def settings_of(index: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a pipeline's index that are no components, such as is_distilled."""
    return {name: value for name, value in index.items() if not name.startswith("_")
            and not isinstance(value, list | tuple)}


def slots(kind: type[DiffusionPipeline]) -> list[str]:
    """The components that a pipeline of this class is made of."""
    return list(kind._get_signature_keys(kind)[0])


def read_pipeline(kind: type[DiffusionPipeline], source: Source, dtype: torch.dtype,
                  parts: Mapping[str, Any]) -> tuple[DiffusionPipeline, tuple[Trace, ...]]:
    """The stock pipeline of a source with the components `parts`, the others read; and where the LoRAs that were fused
    into those show. A LoRA is added in float32, whatever the dtype. Networks are quantised where the source says so,
    unless they are given.

    RequestError for what cannot be read and for LoRAs that do not fit.
    """
    family = family_of(kind.__name__) if source.quantization is not None and kind.__name__ in FAMILIES else None
    packed = () if family is None else [name for name in source.components_to_quantize or (family.denoiser,)
                                        if name not in parts]
    try:
        here = source if source.is_file else _supplied(kind, source, parts)
        if family is not None and family.denoiser in packed:
            parts = {**parts, **_saved_quantized(here, family, dtype)}
        tokenizers = {} if source.is_file else _tokenizers(here, parts)
        # from_pretrained takes no tokenizer in the place of a processor
        options: dict[str, Any] = {"dtype": torch.float32 if source.loras else dtype, **replaced(source, parts),
                                   **parts, **dict.fromkeys(tokenizers)}
        pipe = _read(kind, here, options)
    except UNLOADABLE as error:
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the pipeline {source} cannot be loaded: {first_lines(error)}") from error
    pipe.register_modules(**tokenizers)
    pipe.register_to_config(**stock_index(pipe))
    traces = fuse_loras(pipe, source.loras, parts) if source.loras else ()
    # earlier diffusers do not know `dtype`; what stays float32 there, stays
    for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        if quantization_of(part) is not None:
            keep_packed_(part)
        elif part.dtype != dtype:
            part.to(dtype)
    for name in (name for name in packed if quantization_of(pipe.components[name]) is None):
        quantize_(pipe.components[name], source.quantization, family.time.first if name == family.denoiser else HEAD)
    return pipe, traces


def _read(kind: type[DiffusionPipeline], source: Source, options: Mapping[str, Any]) -> DiffusionPipeline:
    if source.is_file:
        with _configs_at_hand(source):
            config = {} if source.config is None else {"config": source.config}
            return kind.from_single_file(source.place, revision=source.revision, **options, **config)
    return kind.from_pretrained(source.place, use_safetensors=True, **options, **_variant(source))


def _variant(source: Source) -> dict[str, str]:
    return {} if source.variant is None else {"variant": source.variant}


def _tokenizers(source: Source, parts: Mapping[str, Any]) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizers of a pipeline's processors, read unless `parts` has them."""
    names = [name for name, (_, class_name) in listed(index_at(source)).items() if is_processor(name, class_name)]
    with blaming("a tokenizer", source.place):
        return {name: parts.get(name) or AutoTokenizer.from_pretrained(
            source.place, subfolder=name, revision=source.revision, trust_remote_code=False) for name in names}


def _supplied(kind: type[DiffusionPipeline], source: Source, parts: Mapping[str, Any]) -> Source:
    """The source as a folder: of a Hub id that of the cache, once its files are there and have been looked at. parts:
    components that are not wanted from it."""
    if Path(source.place).is_dir():
        return source
    elsewhere = {name: None for name in ("vae", "scheduler") if vars(source)[name] is not None}
    folder = kind.download(source.place, revision=source.revision, use_safetensors=True, **_variant(source),
                           **elsewhere | dict(parts))
    index_at(Source(folder))
    return replace(source, base=folder, revision=None)


def _saved_quantized(source: Source, family: Family, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The denoiser of a pipeline that was saved quantised; nothing of another."""
    folder = Path(source.place) / family.denoiser
    if saved_as(folder) is None:
        return {}
    made_by = class_of(family.denoiser, *index_at(source)[family.denoiser])
    return {family.denoiser: read_saved(made_by, folder, weight_files(folder, source.variant)[0], dtype,
                                        family.time.first)}


@contextmanager
def _configs_at_hand(source: Source) -> Iterator[None]:
    """A single file holds no configs: RequestError that says whose are missing."""
    try:
        yield
    except (OSError, RequestError) as error:
        if not source.is_file or source.config is not None:
            raise
        raise RequestError(f"{source} is one file of weights, which holds no configs; its pipeline's are those "
                           f"of {configs_of(source)}, which is not in the cache here and was not supplied "
                           f"({first_lines(error)}): let the teacher's config name a local folder with them, such "
                           "as that pipeline saved without its weights") from error


# -- components of another source --------------------------------------------------------------------------------------

def replaced(source: Source, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The components that a source takes from elsewhere, read with their weights, as far as `parts` has none."""
    found: dict[str, Any] = {}
    if source.vae is not None and "vae" not in parts:
        _check_vae(source, _config_of_vae(source.vae))
        with blaming("vae", source.vae):
            place, where = _within(source.vae, "vae")
            found["vae"] = AutoencoderKL.from_pretrained(place, use_safetensors=True, **where)
    if source.scheduler is not None and "scheduler" not in parts:
        found["scheduler"] = _scheduler(source.scheduler)
    return found


def replaced_on_meta(source: Source) -> dict[str, Any]:
    """As `replaced`, the networks made from their configs."""
    found: dict[str, Any] = {}
    if source.vae is not None:
        config = _config_of_vae(source.vae)
        _check_vae(source, config)
        with torch.device("meta"):
            found["vae"] = AutoencoderKL.from_config(config)
    if source.scheduler is not None:
        found["scheduler"] = _scheduler(source.scheduler)
    return found


def _check_vae(source: Source, config: Mapping[str, Any]) -> None:
    """RequestError for an autoencoder that does not know the latents of the source's own."""
    configs = Source(configs_of(source), source.revision)
    with blaming("the base's own vae", source.place):
        own = AutoencoderKL.load_config(configs.place, subfolder="vae", revision=configs.revision)
    for name, found, known in (("class", config["_class_name"], "AutoencoderKL"),
                               ("base's class", own["_class_name"], "AutoencoderKL"),
                               ("latent_channels", config.get("latent_channels"), own.get("latent_channels")),
                               ("pixels a latent", _pixels(config), _pixels(own))):
        if found != known:
            raise RequestError(f"vae is {source.vae}, which does not know the latents of {source}: its {name} should "
                               f"be {known}; found {found}")


def _pixels(config: Mapping[str, Any]) -> int:
    return 2 ** (len(config.get("block_out_channels", ())) - 1)


def _config_of_vae(place: str) -> dict[str, Any]:
    with blaming("vae", place):
        place, where = _within(place, "vae")
        return dict(AutoencoderKL.load_config(place, **where))


def _scheduler(place: str) -> SchedulerMixin:
    with blaming("scheduler", place):
        place, where = _within(place, "scheduler")
        name = DDPMScheduler.load_config(place, **where)["_class_name"]        # any scheduler reads the config of any
        return scheduler_class(name).from_pretrained(place, **where)


def _within(place: str, component: str) -> tuple[str, dict[str, str | None]]:
    """A folder, that may be a component's own or a whole pipeline's, or a Hub id; and where in it the component lies.
    RequestError for a folder of pickles or with code."""
    place, revision = at_revision(place)
    folder, whole = Path(place), (Path(place) / component).is_dir()
    if folder.is_dir():
        foreign.check_folder(folder, [component] if whole else [])
        foreign.check_pickles(folder / component if whole else folder)
    return place, {"revision": revision} | ({"subfolder": component} if whole else {})


# -- the meta device ---------------------------------------------------------------------------------------------------

def _on_meta(configs: Source, name: str, library: str, class_name: str) -> nn.Module | SchedulerMixin | None:
    """A network made from its config, or the scheduler; None for what is neither, such as a tokenizer."""
    made_by = class_of(name, library, class_name)
    where = {"subfolder": name, "revision": configs.revision}
    with blaming(f"the config of {name}", configs.place):
        if issubclass(made_by, SchedulerMixin):
            return made_by.from_pretrained(configs.place, **where)
        if not issubclass(made_by, nn.Module):
            return None
        with torch.device("meta"):
            if library == "diffusers":
                return made_by.from_config(made_by.load_config(configs.place, **where))
            return made_by(made_by.config_class.from_pretrained(configs.place, **where))
