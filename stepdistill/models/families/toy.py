"""Toy: the closed-form teacher of a mixture in the plane, whose samples are points. There is no stock pipeline to leave
with."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...diffusion.contracts import Condition
from ...diffusion.toy import SHAPE, labels_of
from ...errors import RequestError
from ..codecs import Points
from ..extra_embedding import StockInput, TimeEmbedding
from ..stock import Guidance
from ..toy_network import LAYERS, WAVES, WIDTH, ToyNetwork, kind_of, noise_of, open_toy
from ..toy_reward import ToyReward
from ..vision import PlaneVisionConfig
from . import Family, Parts, Size

if TYPE_CHECKING:
    from ..teacher import Teacher

NO_TEXT = "which is guided towards classes and away from no text: leave it out"
POINTS = "the teacher is Toy, whose samples are points of the plane"


def encode(teacher: Teacher, prompts: list[str], null: bool) -> Condition:
    """label (B,); the null's is -1."""
    return Condition(label=labels_of(prompts, teacher.network.classes).to(teacher.device))


def inputs(network: nn.Module, x_t: Tensor, timestep: Tensor, cond: Condition) -> dict[str, Any]:
    return {"x_t": x_t, "t": timestep, "label": cond.label, "w": cond.w}


def fresh(network: ToyNetwork, config: Mapping[str, Any]) -> ToyNetwork:
    return ToyNetwork(network.mixture, network.classes, **config)


def latent_shape(parts: Parts, size: Size) -> tuple[int, ...]:
    if size is not None:
        raise RequestError(f"{POINTS}, which have no resolution: leave it out")
    return SHAPE


FAMILY = Family(
    name="toy", denoiser="network", schedule=noise_of, kind=kind_of, open=open_toy, fresh=fresh, encode=encode,
    inputs=inputs,
    timestep=lambda t, scheduler: t, timestep_dtype=torch.float64, latent_shape=latent_shape,
    time=TimeEmbedding("embed", "waves", {"w": StockInput("w_in", 2, {"w_in": True}, WIDTH)}, 2 * WAVES),
    condition_shapes=lambda parts, call: {"label": ()}, codec=lambda parts: Points(),
    guidance=lambda network: Guidance(embedded="guidance_scale"),
    feature_shapes=lambda network, shape: dict.fromkeys(LAYERS, (WIDTH, 1, 1)),
    default_features=lambda network: LAYERS[-1:],
    feature_map=lambda network, output, x_t: output[:, :, None, None], output=lambda raw, x_t: raw,
    targets=tuple(f"{layer}.1" for layer in LAYERS),
    samples="points", seeded_steps=True, vision=lambda name: PlaneVisionConfig(), reward=ToyReward,
    unserved={
        "negative_prompt": f"the teacher is Toy, {NO_TEXT}",
        "guidance_rescale": f"the teacher is Toy, {NO_TEXT}",
        "data.flip": f"{POINTS}, which have no mirror image: leave it off",
        "teacher.quantization": "the teacher is Toy, whose network is small: leave it out",
        "evaluate.reference": f"figures are of pictures, and {POINTS}: leave it out, and `stepdistill verify` "
        "measures them",
        "train.gradient_checkpointing": "the teacher is Toy, whose network has no blocks to compute again: "
        "leave it off",
        "train.fsdp": "the teacher is Toy, which has no weights to shard: leave it off",
        "train.attention": "the teacher is Toy, whose network has no attention: leave it out",
        "discriminator.network": f"it judges pictures, and {POINTS} with features of their own: leave it out",
        "reward": f"it judges pictures, and {POINTS} with a reward of their own: leave it out"},
    no_pipeline="Toy has no pipeline in diffusers, so its students are not sampled, benched or exported: their "
                "pictures lie in the run's samples/, and `stepdistill verify METHOD` trains and measures a "
                "method's recipe")
