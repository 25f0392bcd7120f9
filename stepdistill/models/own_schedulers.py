"""Schedulers of a solver that no stock class has. They serve our own calls of stock pipelines, and leave in no
export."""
from __future__ import annotations

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from torch import Tensor

from ..diffusion.contracts import Role
from ..diffusion.mixing import Mixing, Output


class Mixer:
    """Adds to each step of a call but the first a share of the change of an output; see `mixing.mixed_step`."""

    def __init__(self, shares: tuple[float, ...], output: Output) -> None:
        self.shares, self.output = shares, output
        self.begin()

    def begin(self) -> None:
        """Before the first step of a call."""
        self.done, self.before = 0, torch.zeros(())

    def __call__(self, landed: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
        """landed: where the stock step lands; x0, eps: what the network said of it, in float32."""
        now = {"x0": x0, "eps": eps}[self.output]
        share = self.shares[self.done - 1] if self.done else 0.0
        mixed = landed.float() + share * (now - self.before)
        self.done, self.before = self.done + 1, now
        return mixed.to(landed.dtype)


class MixingDDIMScheduler(DDIMScheduler):
    """DDIM's, of a variance-preserving network, with a `mixer`."""

    mixer: Mixer

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.mixer.begin()

    def step(self, model_output: Tensor, timestep: int, sample: Tensor, return_dict: bool = True
             ) -> DDIMSchedulerOutput | tuple[Tensor]:
        found = super().step(model_output, timestep, sample)
        kept, x0 = self.alphas_cumprod[timestep].to(sample.device), found.pred_original_sample.float()
        mixed = self.mixer(found.prev_sample, x0, (sample.float() - kept.sqrt() * x0) / (1 - kept).sqrt())
        return DDIMSchedulerOutput(mixed, x0) if return_dict else (mixed,)


class MixingFlowScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler's, of a rectified flow, with a `mixer`."""

    mixer: Mixer

    def set_timesteps(self, num_inference_steps: int | None = None, device: torch.device | str | None = None,
                      sigmas: list[float] | None = None, mu: float | None = None,
                      timesteps: list[float] | None = None) -> None:
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self.mixer.begin()

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool = True
             ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        landed = super().step(model_output, timestep, sample, return_dict=False)[0]
        sigma, x, velocity = self.sigmas[self.step_index - 1], sample.float(), model_output.float()
        mixed = self.mixer(landed, x - sigma * velocity, x + (1 - sigma) * velocity)
        return FlowMatchEulerDiscreteSchedulerOutput(mixed) if return_dict else (mixed,)


OWN = {DDIMScheduler: MixingDDIMScheduler, FlowMatchEulerDiscreteScheduler: MixingFlowScheduler}


def fitted(stock: SchedulerMixin, role: Role) -> SchedulerMixin:
    """A stock scheduler for a role: itself, or for one with a solver of its own one of ours on its config, with the
    shares as they are now."""
    if not isinstance(role, Mixing):
        return stock
    own = OWN[type(stock)].from_config(stock.config)
    own.mixer = Mixer(tuple(role.shares.tolist()), role.output)
    return own
