"""LCM-LoRA and DMD2 of one step as one would write them by hand for one UNet: no roles, no recipe, no logs."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

NODES, C = 50, 0.001


def adapted(network: nn.Module, lora: dict[str, Any]) -> tuple[nn.Module, list[nn.Parameter]]:
    """The network with one float32 LoRA of peft, and the parameters of it."""
    config = LoraConfig(r=lora["rank"], lora_alpha=lora["rank"], target_modules=lora["targets"],
                        init_lora_weights="gaussian")
    inject_adapter_in_model(config, network)
    trained = [p for name, p in network.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return network, trained


class Loop:
    """What both share: the data on the device, the schedule as tables, a call under autocast, an optimizer's step."""

    def __init__(self, data: Any, asked: dict[str, Any], device: torch.device) -> None:
        self.x0, self.cond, self.device = data.x0, data.cond, device
        self.batch, self.w, self.lr = asked["data"]["batch"], asked["guidance"], asked["train"]["lr"]
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        bar = (1 - betas).cumprod(0)
        self.alpha, self.sigma = (value.float().to(device) for value in (bar.sqrt(), (1 - bar).sqrt()))

    def optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=self.lr, fused=True)

    def apply(self, loss: Tensor, optimizer: torch.optim.AdamW) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def rows(self) -> Tensor:
        return torch.randint(len(self.x0), (self.batch,), device=self.device)

    def predict(self, network: nn.Module, x: Tensor, i: Tensor, cond: Any) -> Tensor:
        """eps of x (B, C, H, W) at the timesteps i (B,)."""
        dtype = torch.bfloat16
        added = None if cond.pooled is None else {"text_embeds": cond.pooled.to(dtype),
                                                  "time_ids": cond.time_ids.to(dtype)}
        with torch.autocast(self.device.type, dtype, cache_enabled=False):
            return network(x.to(dtype), i.float(), cond.text.to(dtype), added_cond_kwargs=added,
                           return_dict=False)[0].float()

    def guided(self, network: nn.Module, x: Tensor, i: Tensor, cond: Any) -> Tensor:
        without, given = self.predict(network, torch.cat([x, x]), torch.cat([i, i]), self.doubled(cond)).chunk(2)
        return without + self.w * (given - without)

    def doubled(self, cond: Any) -> Any:
        return type(cond).cat([cond.null, cond.replace(null=None)])

    def a(self, i: Tensor) -> Tensor:
        return self.alpha[i][:, None, None, None]

    def s(self, i: Tensor) -> Tensor:
        return self.sigma[i][:, None, None, None]

    def clean(self, x: Tensor, eps: Tensor, i: Tensor) -> Tensor:
        return (x - self.s(i) * eps) / self.a(i)


class LcmLoop(Loop):
    """Luo et al. 2023, arXiv:2310.04378, algorithm 1, with the student itself as the target."""

    def __init__(self, network: Callable[[], nn.Module], data: Any, asked: dict[str, Any],
                 device: torch.device) -> None:
        super().__init__(data, asked, device)
        self.teacher = network()
        self.student, trained = adapted(network(), asked["student"]["lora"])
        self.adamw = self.optimizer(trained)

    def step(self, index: int) -> None:
        rows = self.rows()
        x0, cond = self.x0[rows], self.cond[rows]
        i = torch.randint(1, NODES + 1, (self.batch,), device=self.device) * (1000 // NODES) - 1
        x = self.a(i) * x0 + self.s(i) * torch.randn_like(x0)
        s = (i - 1000 // NODES).clamp(min=0)
        with torch.no_grad():
            eps = self.guided(self.teacher, x, i, cond)
            near = self.a(s) * self.clean(x, eps, i) + self.s(s) * eps
            target = self.consistent(near, s, cond)
        loss = (((self.consistent(x, i, cond) - target) ** 2 + C * C).sqrt() - C).mean()
        self.apply(loss, self.adamw)

    def consistent(self, x: Tensor, i: Tensor, cond: Any) -> Tensor:
        scaled = (10.0 * i.float())[:, None, None, None]
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
        return c_skip * x + c_out * self.clean(x, self.predict(self.student, x, i, cond), i)


class Dmd2Loop(Loop):
    """Yin et al. 2024, arXiv:2405.14867, at one step, without its discriminator: the critic trains on the student's
    sample."""

    def __init__(self, network: Callable[[], nn.Module], data: Any, asked: dict[str, Any],
                 device: torch.device) -> None:
        super().__init__(data, asked, device)
        self.teacher = network()
        self.student, trained = adapted(network(), asked["student"]["lora"])
        self.critic, followed = adapted(network(), asked["student"]["lora"])
        self.of_student, self.of_critic = self.optimizer(trained), self.optimizer(followed)

    def step(self, index: int) -> None:
        cond = self.cond[self.rows()]
        noise = torch.randn(self.batch, *self.x0.shape[1:], device=self.device)
        last = torch.full((self.batch,), 999, device=self.device)
        x = self.clean(noise, self.predict(self.student, noise, last, cond), last)
        i = torch.randint(20, 980, (self.batch,), device=self.device)
        x_i = (self.a(i) * x + self.s(i) * torch.randn_like(x)).detach()
        with torch.no_grad():
            real = self.clean(x_i, self.guided(self.teacher, x_i, i, cond), i)
            fake = self.clean(x_i, self.predict(self.critic, x_i, i, cond), i)
            weight = 1 / (x - real).abs().mean((1, 2, 3), keepdim=True)
            aim = x - weight * (fake - real)
        self.apply(0.5 * ((x - aim) ** 2).mean(), self.of_student)
        x, eps = x.detach(), torch.randn_like(x)
        i = torch.randint(0, 1000, (self.batch,), device=self.device)
        eps_hat = self.predict(self.critic, self.a(i) * x + self.s(i) * eps, i, cond)
        self.apply(((eps_hat - eps) ** 2).mean(), self.of_critic)
