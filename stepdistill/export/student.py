"""What export needs to know of a trained student: plain tensors, its role, and how it is sampled."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.buckets import farthest
from ..diffusion.contracts import Role
from ..diffusion.sampler import Sampler
from ..models.schedulers import StockCall, stock_scheduler
from .dtypes import rounded

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from ..models.roles import Roles
    from ..models.sources import Source
    from ..models.teacher import Teacher


UNKNOWN = "unknown"               # the method of a LoRA of others


@dataclass(frozen=True)
class Lora:
    """An adapter in peft's terms: W <- W + scaling B A.

    state: "<module>.lora_A.weight" (r, in, ...) and "<module>.lora_B.weight" (out, r, ...), float32 unless `rounded`.
    alpha, rank_pattern and alpha_pattern as in peft's LoraConfig: a pattern is a regular expression of a module's tail.
    """

    state: Mapping[str, Tensor]
    alpha: float
    rank: int
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Lora:
        """state: an adapter's weights, of which the LoRA's are taken; config: its LoraConfig as plain values."""
        unserved = [name for name in ("use_rslora", "use_dora", "lora_bias") if config.get(name)]
        if unserved:
            raise ValueError(f"an export holds plain LoRA, found {', '.join(unserved)} in the adapter's config")
        return cls({key: value for key, value in state.items() if ".lora_" in key}, config["lora_alpha"], config["r"],
                   config.get("alpha_pattern") or {}, config.get("rank_pattern") or {})

    @property
    def modules(self) -> list[str]:
        return sorted({key.rsplit(".lora_", 1)[0] for key in self.state})

    def scaling(self, module: str) -> float:
        """alpha / r of one module."""
        matches = (value for tail, value in self.alpha_pattern.items() if re.match(rf"(.*\.)?({tail})$", module))
        return next(matches, self.alpha) / len(self.state[f"{module}.lora_A.weight"])

    def extended(self, module: str, a: Tensor, b: Tensor) -> Lora:
        """The same adapter with the term b a added to the weight of one linear module. a: (n, in), b: (out, n)."""
        down, up = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        scaling = 1.0
        if down in self.state:
            scaling = self.scaling(module)
            a, b = torch.cat([self.state[down], a]), torch.cat([self.state[up], b / scaling], 1)
        rank, tail = len(a), re.escape(module)
        return replace(self, state={**self.state, down: a, up: b},
                       rank_pattern={tail: rank, **self.rank_pattern},
                       alpha_pattern={tail: scaling * rank, **self.alpha_pattern})

    def unscaled(self) -> Lora:
        """The same adapter with every layer's scaling in its weights, for files that hold no alpha."""
        scaled = {key: value * self.scaling(key.rsplit(".lora_", 1)[0]) if ".lora_B." in key else value
                  for key, value in self.state.items()}
        return replace(self, state=scaled, alpha=float(self.rank),
                       alpha_pattern={tail: float(rank) for tail, rank in self.rank_pattern.items()})

    def rounded(self, dtype: torch.dtype) -> Lora:
        """The same adapter with its weights in dtype. RequestError where a weight is beyond its range."""
        return replace(self, state=rounded(self.state, dtype))

    def metadata(self) -> dict[str, Any]:
        """The keyword arguments of peft's LoraConfig that define the adapter, in plain JSON types.

        Without them a loader sets alpha to the rank. Modules are named in full, so nothing is matched by chance.
        """
        return {"r": self.rank, "lora_alpha": self.alpha, "rank_pattern": dict(self.rank_pattern),
                "alpha_pattern": dict(self.alpha_pattern), "target_modules": self.modules}


@dataclass(frozen=True)
class Student:
    """One role of a finished run, ready to leave. Everything is float32 and on the CPU.

    teacher: encodes, decodes and builds stock pipelines. role: the student as it samples.
    lora: its adapter, None if it trained all weights. network(sampler, w): makes a stock network that computes the
    same, adapters merged and numbers that its class cannot read folded in. reads: the numbers that it reads beside its
    time; layers: the weights that read them. scheduler: the stock scheduler of its inference; call: the literal keyword
    arguments of its pipeline call, num_inference_steps and guidance_scale among them. run names the run: an export may
    be replaced by the same run's alone. guidance: what it was trained at, a scale or a range. base_model: what users
    call the teacher, its source unless given. results: results.json as read, or None. step: of the checkpoint. sizes:
    height and width of the buckets that it was trained on, the first that of its call; none without buckets.
    """

    teacher: Teacher
    role: Role
    role_name: str
    lora: Lora | None
    network: Callable[[Sampler, float | None], nn.Module]
    reads: tuple[str, ...]
    layers: Mapping[str, Tensor]
    scheduler: SchedulerMixin
    call: Mapping[str, Any]
    method: str
    run: str
    guidance: float | tuple[float, float] | None = None
    base_model: Source | None = None
    results: Mapping[str, Any] | None = None
    prompts: tuple[str, ...] = ("",)
    step: int | None = None
    sizes: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, roles: Roles, name: str, stock: StockCall, method: str, run: str, **more: Any) -> Student:
        """The role `name` ("ema" if the run has one, else "student") of roles on the CPU. more: the fields with
        defaults."""
        teacher, state, reads = roles.teacher, roles.state_dict(name), roles.reads[name]
        lora = Lora.of(state, roles.lora_metadata(name)) if roles.is_lora(name) else None
        scheduler = stock_scheduler(stock.scheduler, stock.config, teacher.scheduler)
        layers = {f"{path}.weight": state[f"{path}.weight"] for path in teacher.family.time.layers(reads)}
        return cls(teacher, roles[name], name, lora, partial(roles.stock_network, name), reads, layers, scheduler,
                   stock.call, method, run,
                   **more)

    @property
    def guidance_embedding(self) -> bool:
        """Whether it has a guidance embedding."""
        return "w" in self.reads

    def sampler(self, call: Mapping[str, Any]) -> Sampler:
        return Sampler.of_call(self.scheduler, self.steps, self.teacher.schedule, call)

    @property
    def views(self) -> list[Student]:
        """It as it is called, and, of buckets, at the aspect that is farthest from that."""
        return [self, *([replace(self, teacher=self.teacher.at(farthest(self.sizes)))] if self.sizes else [])]

    @property
    def steps(self) -> int:
        return self.call["num_inference_steps"]
