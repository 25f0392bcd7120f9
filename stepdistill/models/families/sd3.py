"""Stable Diffusion 3 and 3.5: SD3Transformer2DModel, a rectified flow on the shifted latents of an AutoencoderKL."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import SchedulerMixin, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from ...diffusion.contracts import Condition
from ...diffusion.schedule import RectifiedFlow, moved
from ...errors import RequestError, gist
from ..adapters import matching
from . import Layout, absent_parts, call_of

T5 = ("text_encoder_3", "tokenizer_3")             # what an SD3 without T5 must be told to do without
T5_TOKENS = 256                                    # max_sequence_length of a stock call: zeros stand in for a missing T5
# The attention layers are those of diffusers' train_dreambooth_lora_sd3.py; the feed-forward layers and the way in of time,
# here the modulations, are what LCM-LoRA adapts in a UNet. No gradient ever reaches add_q_proj of the last block, whose
# text is not read any more.
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff.net.0.proj", "ff.net.2",
           "ff_context.net.0.proj", "ff_context.net.2", "norm1.linear", "norm1_context.linear", "norm_out.linear")


def feature_shapes(network: SD3Transformer2DModel) -> dict[str, tuple[int, int, int]]:
    """Its blocks in the order in which they run -> (C, H, W) of their picture tokens, for latents of the network's own size."""
    side = network.config.sample_size // network.config.patch_size
    return {f"transformer_blocks.{i}": (network.inner_dim, side, side) for i in range(network.config.num_layers)}


def default_features(network: SD3Transformer2DModel) -> tuple[str, ...]:
    """The block in the middle."""
    return (f"transformer_blocks.{network.config.num_layers // 2}",)


def load(source: str, class_name: str, revision: str | None, dtype: torch.dtype) -> SD3:
    """T5 is loaded where the teacher has it."""
    absent = absent_parts(source, revision)
    without = tuple(name for name in T5 if name in absent)
    return SD3(_read(source, revision, dict.fromkeys(without) | {"dtype": dtype}), source, revision, dtype, without)


def _read(source: str, revision: str | None, parts: Mapping[str, Any]) -> StableDiffusion3Pipeline:
    try:
        pipeline = StableDiffusion3Pipeline.from_pretrained(source, revision=revision, **parts)
        return pipeline.to(parts["dtype"])            # earlier diffusers do not know `dtype`
    except OSError as error:
        raise RequestError(f"the teacher {source} cannot be loaded: {gist(error)}") from error


class SD3:
    """A family, see `families.Family`. Its time is the noise level: the scheduler's shift shapes grids, not the path."""

    name = "sd3"
    schedule_name = "flow"
    schedule = RectifiedFlow()
    kind = "velocity"
    null_prompt = ""
    w_path = None
    w_features = None
    seeded_steps = plane = False

    def __init__(self, pipeline: StableDiffusion3Pipeline, source: str, revision: str | None, dtype: torch.dtype,
                 without: tuple[str, ...]) -> None:
        _check(pipeline, source)
        self.source, self.revision, self.call, self.without = source, revision, call_of(source), without
        self.scheduler = pipeline.scheduler
        self.network = pipeline.transformer.eval().requires_grad_(False)
        config = self.network.config
        self.latent_shape = (config.in_channels, config.sample_size, config.sample_size)
        self.default_targets = matching(self.network, TARGETS)
        self.feature_shapes = feature_shapes(self.network)
        self.default_features = default_features(self.network)
        self._pipeline, self._dtype, self._null = pipeline, dtype, None
        self.codec = pipeline.vae.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.codec.device

    def to(self, device: torch.device | str) -> SD3:
        """Moves the network, with the adapters on it, the text encoders and the codec."""
        self._pipeline.to(device)
        self._null = None
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """text (B, L, D), CLIP's tokens before T5's; pooled (B, P). null is the encoding of "", as the stock pipeline
        subtracts it: one row, expanded."""
        if self._null is None:
            self._null = self._embed([self.null_prompt])
        return self._embed(prompts).replace(null=self._null.map(lambda row: row.expand(len(prompts), *row.shape[1:])))

    def _embed(self, prompts: list[str]) -> Condition:
        text, _, pooled, _ = self._pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False,
            max_sequence_length=self.call.get("max_sequence_length", T5_TOKENS))
        return Condition(text=text, pooled=pooled)

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> shifted and scaled latents, float32: the posterior's mode, or a sample of it
        where a generator is given."""
        posterior, config = self.codec.encode(pixels.to(self.device, self.codec.dtype)).latent_dist, self.codec.config
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return (latents.float() - config.shift_factor) * config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Shifted and scaled latents -> pixels (B, 3, H, W) in [-1, 1], float32, clipped as the stock pipeline does."""
        return self.pixels(latents).clamp(-1, 1)

    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode`, but not clipped, and with gradients to the latents: a pixel beyond the range is to find its way back."""
        config = self.codec.config
        latents = latents.to(self.device, self.codec.dtype) / config.scaling_factor + config.shift_factor
        return self.codec.decode(latents, return_dict=False)[0].float()

    def told_time(self, t: Tensor) -> Tensor:
        """t (B,) in [0, 1] -> N t, (B,) float64 on the CPU."""
        return t.double().cpu() * self.scheduler.config.num_train_timesteps

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        """The raw output, in the shape and dtype of x_t (B, C, H, W). Reads text and pooled."""
        if cond is None or cond.text is None or cond.pooled is None:
            raise ValueError("this network is told a text and its pooled embedding: pass a condition from family.encode(prompts)")
        dtype = network.pos_embed.proj.weight.dtype
        return network(hidden_states=x_t.to(dtype), timestep=moved(self.told_time(t).float(), x_t.device),
                       encoder_hidden_states=cond.text.to(dtype), pooled_projections=cond.pooled.to(dtype),
                       return_dict=False)[0].to(x_t.dtype)

    def feature_map(self, output: tuple[Tensor | None, Tensor], x_t: Tensor) -> Tensor:
        """What a block returned in the pass of x_t, its text tokens and its picture tokens (B, N, D), as a map (B, D, H, W)."""
        _, tokens = output
        height, width = (side // self.network.config.patch_size for side in x_t.shape[2:])
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def fresh_network(self, state: Mapping[str, Tensor], told_w: bool = False) -> SD3Transformer2DModel:
        """A stock float32 network of its own with these weights. ValueError for told_w, which it has no input for."""
        if told_w:
            raise ValueError("an SD3Transformer2DModel has no input for a guidance scale")
        with torch.device("meta"):
            network = SD3Transformer2DModel.from_config(self.network.config)
        network.to_empty(device=self.network.device).load_state_dict(state)
        return network.eval().requires_grad_(False)

    def pipeline(self, network: SD3Transformer2DModel | None = None,
                 scheduler: SchedulerMixin | None = None) -> StableDiffusion3Pipeline:
        """A new stock pipeline, its network and scheduler read from the source unless given. Codec and text encoders,
        which nobody trains, are shared with this family."""
        given = {"transformer": network, "scheduler": scheduler}
        shared = {name: part for name, part in self._pipeline.components.items() if name not in given}
        parts = {"dtype": self._dtype} | shared | {name: part for name, part in given.items() if part is not None}
        return _read(self.source, self.revision, parts).to(self.device)


def _check(pipeline: StableDiffusion3Pipeline, source: str) -> None:
    """RequestError for pipelines whose parts this family does not translate."""
    network, codec, scheduler = pipeline.transformer.config, pipeline.vae.config, type(pipeline.scheduler).__name__
    refused = {
        f"its network reads {network.in_channels} channels and its latents have {codec.latent_channels}":
            network.in_channels != codec.latent_channels,
        f"its network gives {network.out_channels} channels for {network.in_channels}":
            network.out_channels not in (None, network.in_channels),
        "its codec says no shift_factor, which its pipeline adds to latents": codec.shift_factor is None,
        f"its scheduler {scheduler} is none of flow matching": not scheduler.startswith("FlowMatch"),
    }
    if reasons := [reason for reason, holds in refused.items() if holds]:
        raise RequestError(f"the teacher {source} cannot be distilled here: {'; '.join(reasons)}")


def _inputs(networks: Mapping[str, nn.Module], call: Mapping[str, Any], empty: Callable[..., Tensor]) -> dict[str, Any]:
    config = networks["transformer"].config
    tokens = networks["text_encoder"].config.max_position_embeddings + call.get("max_sequence_length", T5_TOKENS)
    return {"hidden_states": empty(config.in_channels, config.sample_size, config.sample_size), "timestep": empty(),
            "encoder_hidden_states": empty(tokens, config.joint_attention_dim),
            "pooled_projections": empty(config.pooled_projection_dim)}


LAYOUT = Layout("transformer", TARGETS, RectifiedFlow(), "flow", feature_shapes, default_features, _inputs)
