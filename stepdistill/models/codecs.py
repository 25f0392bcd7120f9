"""The kinds of codecs: how pixels become the latents that a network knows, and latents pixels."""
from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


class Codec:
    """An autoencoder whose latents are moved and scaled, by one number or by channel: latents = (z - shift) scale.

    network: an autoencoder of diffusers, frozen; shift and scale: numbers, or tensors (C, 1, 1). patch: squares of so
    many latents a side are folded into channels first.
    """

    def __init__(self, network: nn.Module, scale: float | Tensor, shift: float | Tensor = 0.0, patch: int = 1) -> None:
        self.network, self.scale, self.shift, self.patch = network.eval().requires_grad_(False), scale, shift, patch

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels (B, 3, H, W) in [-1, 1] -> latents, float32: the posterior's mode, or a sample of it where a generator
        is given."""
        posterior = self.network.encode(pixels.to(self.network.device, self.dtype)).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator)
        z = pixel_unshuffle(z, self.patch)
        return (z.float() - _on(self.shift, z)) * _on(self.scale, z)

    def pixels(self, latents: Tensor) -> Tensor:
        """Latents -> pixels (B, 3, H, W), float32, [-1, 1] and a little beyond, with gradients to the latents."""
        latents = latents.to(self.network.device, self.dtype)
        z = latents / _on(self.scale, latents) + _on(self.shift, latents)
        return self.network.decode(pixel_shuffle(z.to(self.dtype), self.patch), return_dict=False)[0].float()


class Plain(Codec):
    """An autoencoder without a posterior, such as AutoencoderDC: a picture has one latent."""

    @torch.no_grad()
    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.network.encode(pixels.to(self.network.device, self.dtype)).latent.float() * self.scale


class Framed(Codec):
    """An autoencoder of videos: a picture is a video of one frame, and its latents are given without their frame axis.

    shift and scale: tensors (C, 1, 1, 1).
    """

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return super().encode(pixels[:, :, None], generator)[:, :, 0]

    def pixels(self, latents: Tensor) -> Tensor:
        """By the autoencoder's layers: its `decode` clips pixels, and those that it clips have no gradient."""
        z = latents.to(self.network.device, self.dtype)[:, :, None]
        z = z / _on(self.scale, z) + _on(self.shift, z)
        return self.network.decoder(self.network.post_quant_conv(z.to(self.dtype)))[:, :, 0].float()


class Video(Codec):
    """An autoencoder of videos whose convolutions reach back in time: AutoencoderKLWan.

    shift and scale: tensors (C, 1, 1, 1).
    """

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """pixels (B, F, 3, H, W); pictures (B, 3, H, W) are videos of one frame."""
        frames = pixels[:, None] if pixels.ndim == 4 else pixels
        return super().encode(frames.transpose(1, 2), generator)

    def pixels(self, latents: Tensor) -> Tensor:
        """(B, F, 3, H, W). One video after the other: the activations of several would fill a card."""
        z = latents.to(self.network.device, self.dtype)
        z = (z / _on(self.scale, z) + _on(self.shift, z)).to(self.dtype)
        return torch.cat([self._decoded(one) for one in z.split(1)]).transpose(1, 2).float()

    def _decoded(self, z: Tensor) -> Tensor:
        """By the autoencoder's layers, frame after frame as its `decode` calls them, which clips pixels: those that it
        clips have no gradient."""
        decoder, patch = self.network.decoder, self.network.config.patch_size
        # what each convolution has seen last, in fewer places than these
        memory = [None] * len([*decoder.modules()])
        frames = [decoder(frame, feat_cache=memory, feat_idx=[0], first_chunk=i == 0)
                  for i, frame in enumerate(self.network.post_quant_conv(z).split(1, 2))]
        return unpatchify(torch.cat(frames, 2), patch or 1)


class Points(Codec):
    """Where samples are what the network sees: nothing is encoded."""

    dtype, network = torch.float32, None

    def __init__(self) -> None: ...

    def encode(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return pixels

    def pixels(self, latents: Tensor) -> Tensor:
        return latents


def scaled(vae: Any) -> Codec:
    """By the scaling factor of its config: Stable Diffusion 1 and 2, SDXL."""
    return Codec(vae, vae.config.scaling_factor)


def shifted(vae: Any) -> Codec:
    """By the shift and the scaling factor of its config: Stable Diffusion 3, Flux."""
    return Codec(vae, vae.config.scaling_factor, vae.config.shift_factor)


def normalised(vae: Any) -> Codec:
    """By the mean and the deviation of each channel, and the scaling factor: SDXL pipelines whose codec has
    latents_mean."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (vae.config.latents_mean, vae.config.latents_std))
    return Codec(vae, vae.config.scaling_factor / std, mean)


def folded(vae: Any) -> Codec:
    """By 2 x 2 latents and the running statistics of its normalisation, which are weights and no config: FLUX.2."""
    mean, variance = (values.float()[:, None, None] for values in (vae.bn.running_mean, vae.bn.running_var))
    return Codec(vae, (variance + vae.config.batch_norm_eps).rsqrt(), mean, patch=2)


def framed(vae: Any) -> Codec:
    """By the mean and the deviation of each channel, with a frame axis: Qwen-Image."""
    mean, std = (torch.tensor(values)[:, None, None, None]
                 for values in (vae.config.latents_mean, vae.config.latents_std))
    return Framed(vae, 1 / std, mean)


def video(vae: Any) -> Codec:
    """By the mean and the deviation of each channel: Wan."""
    mean, std = (torch.tensor(values)[:, None, None, None]
                 for values in (vae.config.latents_mean, vae.config.latents_std))
    return Video(vae, 1 / std, mean)


def _on(value: float | Tensor, x: Tensor) -> float | Tensor:
    return value.to(x.device) if isinstance(value, Tensor) else value
