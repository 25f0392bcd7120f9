"""Stable Diffusion 1.5 and XL at their true sizes, on the meta device: what roles weigh beside the base."""
from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny import tiny_pipeline

from stepdistill.methods.base import Follows
from stepdistill.methods.distribution.dmd2 import DMD2, Settings
from stepdistill.models.discriminator import tap
from stepdistill.models.families.unet2d_condition import FAMILY
from stepdistill.models.roles import Lora, Places, build_roles
from stepdistill.models.sources import Source
from stepdistill.models.teacher import Teacher

# as published, with the parameters that the published weights have
CONFIGS = {
    "sd15": ({"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280),
              "attention_head_dim": 8},
             859_520_964),
    "sdxl": ({"sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
              "attention_head_dim": (5, 10, 20),
              "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
              "transformer_layers_per_block": (1, 2, 10),
              "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
              "projection_class_embeddings_input_dim": 2816}, 2_567_463_684),
}
NEEDS = DMD2.needs(Settings(), full=False) | {"ema": Follows("student", 0.999)}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def network(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[name][0])


def family(name: str) -> Teacher:
    """With this network in bfloat16; all else is tiny, and of no matter here."""
    parts = {**tiny_pipeline().components, "unet": network(name).bfloat16()}
    return Teacher(FAMILY, parts, Source(name))


def size(parameters) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("setting, most", [(Lora(64), 1.5), (Lora(32, targets=ATTENTION), 1.15)],
                         ids=["lcm targets", "attention"])
def test_student_critic_average_and_heads_weigh_little_beside_the_base(name, setting, most):
    made = family(name)
    base = size(made.network.parameters())
    assert base == 2 * CONFIGS[name][1]
    with torch.device("meta"):
        roles = build_roles(made, NEEDS, {"student": setting})
    own = {role: size(roles.parameters(role)) for role in roles}
    live = size(made.network.parameters()) + own["discriminator"]
    assert live == base + sum(own.values()) and own["student"] == own["critic"] == own["ema"] > 0
    print(f"{name}, rank {setting.rank}: {live / base:.4f} of the base, heads {own['discriminator'] // 4:,}")
    assert live <= most * base


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_on_every_block_have_less_than_ten_million_parameters(name):
    made = family(name)
    with torch.device("meta"):
        roles = build_roles(made, NEEDS, {"student": Lora(1, targets=("to_q",)),
                                          "discriminator": Places(tuple(made.feature_shapes))})
    heads = roles.parameters("discriminator")
    print(f"{name}: {sum(p.numel() for p in heads):,} parameters of {len(made.feature_shapes)} heads")
    assert {p.dtype for p in heads} == {torch.float32} and 1e6 < sum(p.numel() for p in heads) < 10e6


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sample_size", [None, (37, 50)])
def test_features_have_the_shapes_that_heads_are_made_for(name, sample_size):
    unet = network(name)
    if sample_size is not None:
        unet.register_to_config(sample_size=sample_size)
    config = unet.config
    side = sample_size or (config.sample_size,) * 2
    shapes = FAMILY.feature_shapes(unet, (config.in_channels, *side))
    inputs = {"sample": (config.in_channels, *side), "timestep": (),
              "encoder_hidden_states": (77, config.cross_attention_dim)}
    added = {"text_embeds": (1280,), "time_ids": (6,)} if name == "sdxl" else {}
    empty = lambda shapes: {key: torch.empty(2, *shape, device="meta") for key, shape in shapes.items()}
    with torch.no_grad(), tap(unet, tuple(shapes)) as found:
        unet(**empty(inputs), added_cond_kwargs=empty(added))
    got = {key: tuple((output if torch.is_tensor(output) else output[0]).shape[1:]) for key, output in found.items()}
    assert got == shapes and list(found) == list(shapes), "they are listed in the order in which they run"
