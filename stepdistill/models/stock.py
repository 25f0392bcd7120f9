"""How a call of a stock pipeline is spelled: its guidance, its prompts, and the pictures that it returns."""
from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Guidance:
    """How a pipeline's call speaks of the guidance scale w, of which 1 is conditional only.

    keyword: takes w - offset. beside: what a guided call needs as well, such as a negative prompt. off: further
    keywords that switch guidance off. embedded: the keyword of a scale that the network itself reads, where its class
    has such an input.
    within: this pipeline's own network reads its scale there: a step costs one evaluation, whatever the scale.
    """

    keyword: str = "guidance_scale"
    offset: float = 0.0
    beside: Mapping[str, Any] = field(default_factory=dict)
    off: Mapping[str, Any] = field(default_factory=dict)
    embedded: str | None = None
    within: bool = False

    @property
    def none(self) -> dict[str, Any]:
        """The keyword arguments that switch classifier-free guidance off."""
        return {self.keyword: 1.0 - self.offset, **self.off}

    def call(self, w: float) -> dict[str, Any]:
        """The keyword arguments of a call at the scale w."""
        if self.within:
            return {self.embedded: float(w)}
        return {self.keyword: w - self.offset, **self.beside} if w > 1 else self.none

    def scale(self, call: Mapping[str, Any]) -> float:
        """The scale w of a call; 1 where it does not say. Stock pipelines guide above 1 only."""
        if self.within:
            return float(call.get(self.embedded, 1.0))
        return max(1.0, float(call.get(self.keyword, 1.0 - self.offset)) + self.offset)


USUAL = Guidance()                                  # of pipelines that say guidance_scale, 1 for none


@dataclass(frozen=True)
class Prompts:
    """How a pipeline's call takes prompts, and what it gives. keyword: of the prompts; read: what stands there for one
    of them.

    output_type: of pictures, where "pt" is not known. each: keywords that a call takes once for every prompt, as a list.
    """

    keyword: str = "prompt"
    read: Callable[[DiffusionPipeline, str], Any] = lambda pipeline, prompt: prompt
    output_type: Literal["pt", "np"] = "pt"
    each: tuple[str, ...] = ()

    def call(self, pipeline: DiffusionPipeline, prompts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
        """The keyword arguments of this call for these prompts."""
        spread = {name: [call[name]] * len(prompts) for name in self.each if name in call}
        return {**call, **spread, self.keyword: [self.read(pipeline, prompt) for prompt in prompts]}

    def written(self, pipeline: DiffusionPipeline, prompt: str) -> str:
        """The argument of a call that asks for one prompt, as Python is written: by its name, unless a prompt is the first."""
        value, first = self.read(pipeline, prompt), [*inspect.signature(type(pipeline).__call__).parameters][1]
        if self.keyword == first == "prompt":
            return json.dumps(value, ensure_ascii=False)
        return f"{self.keyword}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else [value]}"


def cut(kind: type[DiffusionPipeline], parts: Mapping[str, Any], prompts: Sequence[str], call: Mapping[str, Any]) -> tuple[int, int]:
    """How many prompts are longer than each of a pipeline's text encoders reads, and how many tokens the most patient of them reads.

    CLIP reads as many as its tokenizer says; another encoder what the call or the pipeline's own default names max_sequence_length.
    (0, 0) for a pipeline without tokenizers.
    """
    asked = {**defaults(kind), **call}.get("max_sequence_length")
    found = [part for part in parts.values() if isinstance(part, PreTrainedTokenizerBase)]
    limits = [(part, part.model_max_length if "CLIP" in type(part).__name__ or asked is None else asked) for part in found]
    if not limits:
        return 0, 0
    tokenizer, limit = max(limits, key=lambda pair: pair[1])
    lengths = [len(ids) for ids in tokenizer(list(prompts), truncation=False, verbose=False).input_ids]
    return sum(length > limit for length in lengths), limit


def say_cut(kind: type[DiffusionPipeline], parts: Mapping[str, Any], prompts: Sequence[str], call: Mapping[str, Any],
            say: Callable[[str], None]) -> None:
    """One line where prompts are longer than is read of them, which the libraries' own notices would say a time each."""
    count, limit = cut(kind, parts, prompts, call)
    if count:
        say(f"{count:,} of {len(prompts):,} prompts are longer than the {limit} tokens that a {kind.__name__} reads: the rest of them "
            "has no effect")


def unknown(cls: type[DiffusionPipeline], call: Mapping[str, Any]) -> list[str]:
    """The keywords of a call that this class of pipelines does not take."""
    taken = inspect.signature(cls.__call__).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        return []
    return sorted(call.keys() - {parameter.name for parameter in taken})


def defaults(cls: type[DiffusionPipeline]) -> dict[str, Any]:
    """What a call of this class of pipelines is given where it says nothing. Its encode_prompt has others."""
    parameters = inspect.signature(cls.__call__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if parameter.default is not parameter.empty}


def as_pil(images: Tensor) -> list[Image]:
    """(B, 3, H, W) in [0, 1] -> pictures of 8 bits, rounded as stock pipelines do."""
    return DiffusionPipeline.numpy_to_pil(images.permute(0, 2, 3, 1).numpy())


def pictures(pipeline: DiffusionPipeline, spelled: Prompts, prompts: Sequence[str], **call: Any) -> Tensor:
    """What a call of a stock pipeline draws: (B, 3, H, W) in [0, 1], float32, on the CPU."""
    images = pipeline(**spelled.call(pipeline, prompts, call), output_type=spelled.output_type).images
    if spelled.output_type == "np":
        images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return images.float().cpu()
