"""Stable Diffusion 1.x and 2.x, and SDXL: UNet2DConditionModel on the latents of an AutoencoderKL."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from ...diffusion.contracts import Condition
from ...diffusion.schedule import VariancePreserving, moved
from ...errors import RequestError, gist
from ..adapters import matching
from . import Layout, call_of

PIPELINES = {cls.__name__: cls for cls in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
KINDS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
W_WIDTH = 256                                      # of LCM's embedding of w
# The layers that LCM-LoRA adapts (arXiv:2311.05556): attention, feed-forward, convolutions and the way in of time.
LCM_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
               "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj")


def w_embedding(w: Tensor, width: int = W_WIDTH) -> Tensor:
    """w (B,), 1 is conditional only -> (B, width) float32: sin and cos of 1000 (w - 1) 10000^(-j / (width / 2 - 1)).

    LCM, arXiv:2310.04378. Equal to the last bit to what a stock pipeline tells its network at guidance_scale = w: w - 1
    is taken in float64, all else in float32, because the largest angles are thousands of turns.
    """
    told = (w.double().cpu() - 1).float() * 1000
    half = width // 2
    frequencies = (torch.arange(half) * -(torch.tensor(10000.0).log() / (half - 1))).exp()
    angles = told[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1).to(w.device)


def feature_shapes(network: UNet2DConditionModel) -> dict[str, tuple[int, int, int]]:
    """Its blocks in the order in which they run -> (C, H, W) of their outputs, for latents of the network's own size."""
    widths, size = network.config.block_out_channels, network.config.sample_size
    sizes = [(size, size) if isinstance(size, int) else tuple(size)]
    for _ in widths[1:]:
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    last = len(widths) - 1
    down = {f"down_blocks.{i}": (width, *sizes[min(i + 1, last)]) for i, width in enumerate(widths)}
    up = {f"up_blocks.{i}": (width, *sizes[max(last - i - 1, 0)]) for i, width in enumerate(reversed(widths))}
    return {**down, "mid_block": (widths[-1], *sizes[-1]), **up}


def default_features(network: UNet2DConditionModel) -> tuple[str, ...]:
    """Where DMD2 (arXiv:2405.14867) puts its head: the bottleneck."""
    return ("mid_block",)


def load(source: str, class_name: str, revision: str | None, dtype: torch.dtype) -> UNet2DCondition:
    """The safety checker stays where it is: it is no part of what is distilled."""
    parts: dict[str, Any] = {"dtype": dtype}
    if class_name == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    return UNet2DCondition(_read(source, class_name, revision, parts), source, revision, parts)


def _read(source: str, class_name: str, revision: str | None, parts: Mapping[str, Any]) -> DiffusionPipeline:
    cls = PIPELINES[class_name]
    try:
        single = source.endswith(".safetensors")
        pipeline = cls.from_single_file(source, **parts) if single else cls.from_pretrained(source, revision=revision, **parts)
        return pipeline.to(parts["dtype"])            # earlier diffusers do not know `dtype`
    except OSError as error:
        raise RequestError(f"the teacher {source} cannot be loaded: {gist(error)}") from error


class UNet2DCondition:
    """A family, see `families.Family`. parts: what, beside the source, made the pipeline; `pipeline()` repeats it."""

    name = "unet2d_condition"
    schedule_name = "vp"
    null_prompt = ""
    without = ()
    seeded_steps, plane = True, False
    w_path = "time_embedding.cond_proj"

    def __init__(self, pipeline: DiffusionPipeline, source: str, revision: str | None, parts: Mapping[str, Any]) -> None:
        _check(pipeline, source)
        self.source, self.revision, self.call = source, revision, call_of(source)
        self.scheduler = pipeline.scheduler
        self.schedule = VariancePreserving.of(pipeline.scheduler.alphas_cumprod)
        self.kind = KINDS[pipeline.scheduler.config.prediction_type]
        self.network = pipeline.unet.eval().requires_grad_(False)
        size = self.network.config.sample_size
        self.latent_shape = (self.network.config.in_channels, *((size, size) if isinstance(size, int) else size))
        self.default_targets = matching(self.network, LCM_TARGETS)
        self.feature_shapes, self.default_features = feature_shapes(self.network), default_features(self.network)
        self.w_features = (W_WIDTH, self.network.time_embedding.linear_1.in_features)
        self._pipeline, self._parts, self._null = pipeline, dict(parts), None
        self.codec = pipeline.vae.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.codec.device

    def to(self, device: torch.device | str) -> UNet2DCondition:
        """Moves the network, with the adapters on it, the text encoders and the codec."""
        self._pipeline.to(device)
        self._null = None
        return self

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Condition:
        """text (B, L, D); SDXL adds pooled (B, D) and time_ids (B, 6). null is what the stock pipeline subtracts: the
        encoding of "", or zeros where an SDXL pipeline says so. The null's tensors are one row, expanded."""
        if self._null is None:
            self._null = self._embed([self.null_prompt], null=True)
        return self._embed(prompts, null=False).replace(null=self._null.map(lambda row: row.expand(len(prompts), *row.shape[1:])))

    def _embed(self, prompts: list[str], null: bool) -> Condition:
        """The stock pipeline's own encoding of prompts or, `null`, of its empty negative prompt."""
        found = self._pipeline.encode_prompt(prompts, device=self.device, num_images_per_prompt=1,
                                             do_classifier_free_guidance=null)[null::2]
        if len(found) == 1:
            return Condition(text=found[0])
        text, pooled = found
        size = tuple(side * self._pipeline.vae_scale_factor for side in self.latent_shape[1:])
        ids = torch.tensor([[*size, 0, 0, *size]], dtype=text.dtype, device=text.device)
        return Condition(text=text, pooled=pooled, time_ids=ids.expand(len(prompts), 6))

    @torch.no_grad()
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> scaled latents, float32: the posterior's mode, or a sample of it where a
        generator is given."""
        posterior = self.codec.encode(pixels.to(self.device, self.codec.dtype)).latent_dist
        latents = posterior.mode() if generator is None else posterior.sample(generator)
        return latents.float() * self.codec.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pixels (B, 3, H, W) in [-1, 1], float32, clipped as the stock pipeline does."""
        return self.pixels(latents).clamp(-1, 1)

    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode`, but not clipped, and with gradients to the latents: a pixel beyond the range is to find its way back."""
        latents = latents.to(self.device, self.codec.dtype) / self.codec.config.scaling_factor
        return self.codec.decode(latents, return_dict=False)[0].float()

    def told_time(self, t: Tensor) -> Tensor:
        """t (B,) in [0, 1] -> N t - 1, (B,) float64 on the CPU, a whole number when within 1e-6 of one."""
        told = t.double().cpu() * self.schedule.nodes - 1
        nearest = told.round()
        return torch.where((told - nearest).abs() < 1e-6, nearest, told)

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        """The raw output, in the shape and dtype of x_t (B, C, H, W). Reads text, pooled, time_ids and w."""
        if cond is None or cond.text is None:
            raise ValueError("this network is told a text: pass a condition from family.encode(prompts)")
        dtype = network.conv_in.weight.dtype
        w = None if cond.w is None else moved(w_embedding(cond.w).to(dtype), x_t.device)
        added = None if cond.pooled is None else {"text_embeds": cond.pooled.to(dtype), "time_ids": cond.time_ids.to(dtype)}
        told = moved(self.told_time(t).float(), x_t.device)
        return network(x_t.to(dtype), told, cond.text.to(dtype), timestep_cond=w, added_cond_kwargs=added,
                       return_dict=False)[0].to(x_t.dtype)

    def feature_map(self, output: Tensor | tuple[Tensor, Any], x_t: Tensor) -> Tensor:
        """What a block returned in the pass of x_t, as a map (B, C, H, W). Blocks on the way down return what they skip, too."""
        return output if isinstance(output, Tensor) else output[0]

    def fresh_network(self, state: Mapping[str, Tensor], told_w: bool = False) -> UNet2DConditionModel:
        """A stock float32 network of its own with these weights. told_w: it reads w; that layer is zero unless in `state`."""
        config = {"time_cond_proj_dim": W_WIDTH} if told_w else {}
        with torch.device("meta"):
            network = UNet2DConditionModel.from_config(self.network.config, **config)
        if told_w:
            state = {f"{self.w_path}.weight": torch.zeros(self.w_features[::-1]), **state}
        network.to_empty(device=self.network.device).load_state_dict(state)
        return network.eval().requires_grad_(False)

    def pipeline(self, network: UNet2DConditionModel | None = None, scheduler: SchedulerMixin | None = None) -> DiffusionPipeline:
        """A new stock pipeline, its network and scheduler read from the source unless given. Codec and text encoders,
        which nobody trains, are shared with this family."""
        given = {"unet": network, "scheduler": scheduler}
        shared = {name: part for name, part in self._pipeline.components.items() if name not in given}
        parts = self._parts | shared | {name: part for name, part in given.items() if part is not None}
        return _read(self.source, type(self._pipeline).__name__, self.revision, parts).to(self.device)


def _check(pipeline: DiffusionPipeline, source: str) -> None:
    """RequestError for pipelines of a supported class whose parts this family does not translate."""
    unet, codec, scheduler = pipeline.unet.config, pipeline.vae.config, pipeline.scheduler
    refused = {
        f"its network reads {unet.in_channels} channels and its latents have {codec.latent_channels}":
            unet.in_channels != codec.latent_channels,
        "its network is told a guidance scale: it is a student already": unet.time_cond_proj_dim is not None,
        "its network is told classes or images": unet.class_embed_type is not None or unet.encoder_hid_dim_type is not None,
        "its latents are shifted by a mean": codec.latents_mean is not None,
        f"its scheduler {type(scheduler).__name__} has no alphas_cumprod": "alphas_cumprod" not in vars(scheduler),
        f"its prediction type is none of {', '.join(KINDS)}": scheduler.config.get("prediction_type") not in KINDS,
    }
    if reasons := [reason for reason, holds in refused.items() if holds]:
        raise RequestError(f"the teacher {source} cannot be distilled here: {'; '.join(reasons)}")


def _inputs(networks: Mapping[str, nn.Module], call: Mapping[str, Any], empty: Callable[..., Tensor]) -> dict[str, Any]:
    config, length = networks["unet"].config, networks["text_encoder"].config.max_position_embeddings
    size, added = config.sample_size, None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": empty(pooled), "time_ids": empty(6)}
    return {"sample": empty(config.in_channels, *((size, size) if isinstance(size, int) else size)), "timestep": empty(),
            "encoder_hidden_states": empty(length, config.cross_attention_dim), "added_cond_kwargs": added}


LAYOUT = Layout("unet", LCM_TARGETS, VariancePreserving.of(torch.linspace(0.999, 0.005, 1000)), "vp", feature_shapes, default_features, _inputs)
