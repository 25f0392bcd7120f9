"""Toy: the closed-form teacher of a mixture in the plane, and students that are it plus a small network, zero at first."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor, nn

from ...data.toy import SHAPE, Toy, labels_of
from ...diffusion.contracts import Condition
from ...diffusion.draws import key
from ...diffusion.exact import GaussianMixture
from ...diffusion.schedule import RectifiedFlow, Schedule, VariancePreserving
from ...errors import RequestError

SCHEDULERS = {"vp": DDIMScheduler, "flow": FlowMatchEulerDiscreteScheduler}
WIDTH, DEPTH, WAVES = 128, 3, 8
LAYERS = tuple(f"hidden.{i}" for i in range(DEPTH))


class ToyNetwork(nn.Module):
    """The mixture's exact prediction plus an MLP whose last layer is zero at first: a student begins as its teacher does.

    forward(x_t (B, 2, 1, 1), t (B,), label (B,), w (B,) or None) -> raw prediction (B, 2, 1, 1). Its first values are a
    function of nothing: every student of Toy begins alike.
    """

    def __init__(self, mixture: GaussianMixture, classes: int, told_w: bool = False) -> None:
        super().__init__()
        self.mixture, self.classes = mixture, classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key("toy network"))
            self.embed = nn.Linear(2 + 2 * WAVES + classes + 1, WIDTH)
            self.hidden = nn.ModuleList([nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(DEPTH)])
            self.out = nn.Linear(WIDTH, 2)
        if told_w:
            self.w_in = nn.Linear(2, WIDTH, bias=False)
        for parameter in (*self.out.parameters(), *(self.w_in.parameters() if told_w else ())):
            nn.init.zeros_(parameter)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor, w: Tensor | None = None) -> Tensor:
        # The noise level as 2 log(sigma / alpha), from about -10 to 10 on the way; Fourier features of it.
        level = (-self.mixture.schedule.log_snr(t)).clamp(-12, 12)
        waves = level[:, None] * 0.15 * 1.6 ** torch.arange(WAVES, device=level.device)
        told = torch.cat([waves.sin(), waves.cos()], 1).to(x_t)
        kinds = nn.functional.one_hot(label + 1, self.classes + 1).to(x_t)
        h = self.embed(torch.cat([x_t.flatten(1), told, kinds], 1))
        if w is not None:
            h = h + self.w_in(torch.stack([w - 1, w.log()], 1).to(h))
        for block in self.hidden:
            h = h + block(h)
        return self.mixture(x_t, t, Condition(label=label)).raw + self.out(nn.functional.silu(h)).reshape(x_t.shape)


def feature_shapes(network: ToyNetwork) -> dict[str, tuple[int, int, int]]:
    return {name: (WIDTH, 1, 1) for name in LAYERS}


def default_features(network: ToyNetwork) -> tuple[str, ...]:
    return LAYERS[-1:]


def load(source: str, class_name: str, revision: str | None, dtype: torch.dtype) -> ToyFamily:
    if dtype != torch.float32:
        raise RequestError(f"Toy is computed in float32; found {dtype}: set train.precision to fp32")
    return ToyFamily(source)


class Points(nn.Identity):
    """The codec of points."""

    dtype = torch.float32


class ToyFamily:
    """A family, see `families.Family`. The codec is the identity, and there is no stock pipeline to leave with."""

    name = "toy"
    revision = None
    null_prompt = ""
    latent_shape = SHAPE
    default_targets = tuple(f"{layer}.1" for layer in LAYERS)
    w_path, w_features = "w_in", (2, WIDTH)
    call: Mapping[str, Any] = {}
    without: tuple[str, ...] = ()
    seeded_steps = plane = True

    def __init__(self, source: str) -> None:
        self.source, self.toy = source, Toy(source)
        self.schedule_name = self.toy.said["noise"]
        self.scheduler = SCHEDULERS[self.schedule_name].from_pretrained(source, subfolder="scheduler")
        flow = self.schedule_name == "flow"
        self.schedule: Schedule = RectifiedFlow() if flow else VariancePreserving.of(self.scheduler.alphas_cumprod)
        self.kind = "velocity" if flow else "v"
        self.classes = int(self.toy.labels.max()) + 1
        self.network = self._network(False)
        self.feature_shapes, self.default_features = feature_shapes(self.network), default_features(self.network)
        self.codec = Points()

    def _network(self, told_w: bool) -> ToyNetwork:
        return ToyNetwork(self.toy.law(self.schedule, self.kind), self.classes, told_w).eval().requires_grad_(False)

    def to(self, device: torch.device | str) -> ToyFamily:
        self.network.to(device)
        return self

    def encode(self, prompts: list[str]) -> Condition:
        """label (B,); the null's is -1."""
        labels = labels_of(prompts, self.classes).to(next(self.network.parameters()).device)
        return Condition(label=labels, null=Condition(label=torch.full_like(labels, -1)))

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Points as they are."""
        return pixels.to(next(self.network.parameters()).device)

    def decode(self, latents: Tensor) -> Tensor:
        """Points as they are."""
        return latents

    def pixels(self, latents: Tensor) -> Tensor:
        """Points as they are."""
        return latents

    def told_time(self, t: Tensor) -> Tensor:
        return t

    def predict(self, network: nn.Module, x_t: Tensor, t: Tensor, cond: Condition | None) -> Tensor:
        if cond is None or cond.label is None:
            raise ValueError("this network is told a class: pass a condition from family.encode(prompts)")
        return network(x_t, t, cond.label, cond.w)

    def feature_map(self, output: Tensor, x_t: Tensor) -> Tensor:
        return output[:, :, None, None]

    def fresh_network(self, state: Mapping[str, Tensor], told_w: bool = False) -> ToyNetwork:
        network = self._network(told_w).to(next(self.network.parameters()).device)
        network.load_state_dict({**network.state_dict(), **state})
        return network

    def pipeline(self, network: nn.Module | None = None, scheduler: SchedulerMixin | None = None) -> Any:
        raise RequestError("Toy has no pipeline in diffusers, so its students are not sampled, benched or exported: their pictures lie "
                           "in the run's samples/, and `stepdistill verify METHOD` trains and measures a method's recipe")
