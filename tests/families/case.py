"""What the matrix of families needs to know of a tiny real pipeline."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn


def by_callback(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Tensor:
    """The latents after the last step of a call, as the pipeline holds them."""
    seen: list[Tensor] = []

    def keep(pipeline: DiffusionPipeline, step: int, time: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(given["latents"].clone())
        return given

    pipe(**call, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["latents"])
    return seen[-1]


def reconstructed(vae: nn.Module, pixels: Tensor) -> Tensor:
    """Pixels there and back by an AutoencoderKL, whose latents are the mode of its posterior."""
    return vae.decode(vae.encode(pixels).latent_dist.mode()).sample


def as_they_are(latents: Tensor, shape: tuple[int, ...]) -> Tensor:
    return latents


@dataclass(frozen=True)
class Case:
    """build: the pipeline, of its real class with a tiny config and random weights.

    sizes: two sizes of pictures, (height, width) in pixels; frames: of videos. scales: guidance scales. call: what
    every call is given, such as max_sequence_length. latents: the last latents of a call; unpacked: these, as our
    sampler's state of `shape` (B, C, H, W). reconstructed: pixels (B, 3, H, W), of videos (B, F, 3, H, W), there and
    back by the pipeline's autoencoder. ignored: fields of a condition that do not change the prediction. still: parts
    of the names of adapter weights that never get a gradient. guidance: of what is trained. forms: of export. methods:
    what is trained for two updates, beside their settings; data: on what, as a recipe says it.
    """

    build: Callable[[], DiffusionPipeline]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    scales: tuple[float, ...] = (1.0, 3.0)
    call: Mapping[str, Any] = field(default_factory=dict)
    latents: Callable[[DiffusionPipeline, Mapping[str, Any]], Tensor] = by_callback
    unpacked: Callable[[Tensor, tuple[int, ...]], Tensor] = as_they_are
    reconstructed: Callable[[nn.Module, Tensor], Tensor] = reconstructed
    ignored: tuple[str, ...] = ()
    still: tuple[str, ...] = ()
    guidance: float = 2.0
    forms: tuple[str, ...] = ("lora", "pipeline")
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {
        "lcm": {}, "dmd2": {"critic_steps": 1, "gan_weight": 0.1}, "scm": {}})
    data: Mapping[str, Any] = field(default_factory=lambda: {"images": "shapes", "count": 4, "batch": 2})
    frames: int | None = None
    prompts: tuple[str, str] = ("a red ring", "a blue square")

    def picture(self, size: tuple[int, int]) -> tuple[int, ...]:
        """The shape of one sample's pixels."""
        return (3, *size) if self.frames is None else (self.frames, 3, *size)
