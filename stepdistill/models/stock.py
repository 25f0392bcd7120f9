"""How a call of a stock pipeline is spelled: its guidance, its prompts, and the pictures that it returns."""
from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Guidance:
    """How a pipeline's call speaks of the guidance scale w, of which 1 is conditional only.

    keyword: takes w - offset; None of a call that cannot guide. beside: what a guided call needs as well, such as a
    negative prompt. off: further keywords that switch guidance off. embedded: the keyword of a scale that the network
    itself reads, where its class has such an input. within: this pipeline's own network reads its scale there: a step
    costs one evaluation, whatever the scale.
    """

    keyword: str | None = "guidance_scale"
    offset: float = 0.0
    beside: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)
    embedded: str | None = None
    within: bool = False

    @property
    def none(self) -> Mapping[str, Any]:
        """The keyword arguments that switch classifier-free guidance off."""
        return self.off if self.keyword is None else {self.keyword: 1.0 - self.offset, **self.off}

    def call(self, w: float) -> Mapping[str, Any]:
        """The keyword arguments of a call at the scale w. RequestError for one that guides where none can."""
        if self.within:
            return {self.embedded: float(w)}
        if self.keyword is None and w > 1:
            raise RequestError(f"no call of this pipeline guides, so its guidance is 1; found {w:g}")
        return {self.keyword: w - self.offset, **self.beside} if w > 1 else self.none

    def beside_too(self, more: Mapping[str, Any]) -> Guidance:
        """The same, where a guided call needs these keyword arguments as well."""
        return replace(self, beside={**self.beside, **more})

    def scale(self, call: Mapping[str, Any]) -> float:
        """The scale w of a call; 1 where it does not say. Stock pipelines guide above 1 only."""
        if self.within:
            return float(call.get(self.embedded, 1.0))
        if self.keyword is None:
            return 1.0
        return max(1.0, float(call.get(self.keyword, 1.0 - self.offset)) + self.offset)


FRAMES = 8                                          # of a video that are looked at
USUAL = Guidance()                                  # of pipelines that say guidance_scale, 1 for none


@dataclass(frozen=True)
class Prompts:
    """How a pipeline's call takes prompts, and what it gives. keyword: of the prompts; read: what stands there for one
    of them, None where this pipeline is told nothing.

    output_type: of pictures, where "pt" is not known; gives: under which name a call gives them. each: keywords that a
    call takes once for every prompt, as a list. count: the keyword of the number of pictures, where it does not follow
    from the prompts. any: a prompt that this pipeline draws.
    """

    keyword: str = "prompt"
    read: Callable[[DiffusionPipeline, str], Any] = lambda pipeline, prompt: prompt
    output_type: Literal["pt", "np"] = "pt"
    gives: Literal["images", "frames"] = "images"
    each: tuple[str, ...] = ("negative_prompt",)
    count: str | None = None
    any: Callable[[DiffusionPipeline], str] = lambda pipeline: ""

    def tell(self, pipeline: DiffusionPipeline) -> bool:
        """Whether prompts make a difference to this pipeline."""
        return self.read(pipeline, self.any(pipeline)) is not None

    def call(self, pipeline: DiffusionPipeline, prompts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of this call for these prompts."""
        spread = {name: [call[name]] * len(prompts) for name in self.each if name in call}
        told = [self.read(pipeline, prompt) for prompt in prompts]
        counted = {} if self.count is None else {self.count: len(prompts)}
        return {**call, **spread, **counted, **({} if None in told else {self.keyword: told})}

    def written(self, pipeline: DiffusionPipeline, prompt: str) -> str:
        """The argument of a call that asks for one prompt, as Python is written: by its name, unless a prompt is the
        first."""
        value, first = self.read(pipeline, prompt), [*inspect.signature(type(pipeline).__call__).parameters][1]
        if value is None:
            return f"{self.count}=1"
        if self.keyword == first == "prompt":
            return json.dumps(value, ensure_ascii=False)
        return f"{self.keyword}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else [value]}"


def cut(kind: type[DiffusionPipeline], parts: Mapping[str, Any], prompts: Sequence[str],
        call: Mapping[str, Any]) -> tuple[int, int]:
    """How many prompts are longer than each of a pipeline's text encoders reads, and how many tokens the most patient
    of them reads.

    CLIP reads as many as its tokenizer says; another encoder what the call or the pipeline's own default names
    max_sequence_length. (0, 0) for a pipeline without tokenizers.
    """
    asked = {**defaults(kind), **call}.get("max_sequence_length")
    found = [part for part in parts.values() if isinstance(part, PreTrainedTokenizerBase)]
    limits = [(part, part.model_max_length if "CLIP" in type(part).__name__ or asked is None else asked)
              for part in found]
    if not limits:
        return 0, 0
    tokenizer, limit = max(limits, key=lambda pair: pair[1])
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids]
    return sum(length > limit for length in lengths), limit


def say_cut(kind: type[DiffusionPipeline], parts: Mapping[str, Any], prompts: Sequence[str], call: Mapping[str, Any],
            say: Callable[[str], None]) -> None:
    """One line where prompts are longer than is read of them, which the libraries' own notices would say a time
    each."""
    count, limit = cut(kind, parts, prompts, call)
    if count:
        say(f"{count:,} of {len(prompts):,} prompts are longer than the {limit} tokens that a {kind.__name__} reads: "
            "the rest of them has no effect")


def unknown(cls: type[DiffusionPipeline], call: Mapping[str, Any]) -> list[str]:
    """The keywords of a call that this class of pipelines does not take."""
    taken = inspect.signature(cls.__call__).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return []
    return sorted(call.keys() - {parameter.name for parameter in taken})


def defaults(cls: type[DiffusionPipeline]) -> dict[str, Any]:
    """What a call of this class of pipelines is given where it says nothing. Its encode_prompt has others."""
    parameters = inspect.signature(cls.__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items()
            if parameter.default is not parameter.empty}


def as_pil(images: Tensor) -> list[Image]:
    """(B, 3, H, W) in [0, 1] -> pictures of 8 bits, rounded as stock pipelines do."""
    return DiffusionPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())


def some_frames(videos: Tensor) -> Tensor:
    """Of videos (B, F, 3, H, W) the frames to look at: 8, from the first to the last, or all of fewer."""
    count = videos.shape[1]
    return videos[:, torch.linspace(0, count - 1, min(FRAMES, count)).round().long()]


def pictures(pipeline: DiffusionPipeline, spelled: Prompts, prompts: Sequence[str], **call: Any) -> Tensor:
    """What a call of a stock pipeline draws: (B, 3, H, W) in [0, 1], of videos (B, F, 3, H, W), float32, on the CPU."""
    images = getattr(pipeline(**spelled.call(pipeline, prompts, call), output_type=spelled.output_type), spelled.gives)
    if spelled.output_type == "np":
        images = torch.from_numpy(images).movedim(-1, -3)
    return images.float().cpu()
