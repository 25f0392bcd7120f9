"""Plans of flow transformers, from configs alone; those of UNets stand with the commands."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tiny import save_tiny_sd3
from transformers import CLIPTextConfig, T5Config

from stepdistill.methods.base import Frozen, Trained
from stepdistill.models.roles import Lora, build_roles
from stepdistill.models.teacher import load_teacher
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan

ROOT = Path(__file__).parents[2]


def recipe(teacher, rank: int = 2, **data) -> Recipe:
    return Recipe.load({"method": "lcm", "teacher": str(teacher), "student": {"lora": {"rank": rank}},
                        "guidance": 2.0, "steps": 2,
                        "data": {"images": "shapes", "batch": 4, **data}, "train": {"updates": 2}}, {})


@pytest.mark.parametrize("t5, call, tokens", [(False, {"max_sequence_length": 0}, 20),
                                              pytest.param(True, None, 276, marks=pytest.mark.long)])
def test_a_plan_counts_what_training_makes(tmp_path, t5, call, tokens):
    folder = save_tiny_sd3(tmp_path, t5, call)
    found = plan(recipe(folder))
    family = load_teacher(folder)
    roles = build_roles(family, {"teacher": Frozen(), "student": Trained()}, {"student": Lora(2)})
    assert found["roles"]["student"]["parameters"] == sum(p.numel() for p in roles.parameters("student"))
    assert (("text_encoder_3" in found["roles"]) == t5 and {"teacher", "vae", "text_encoder", "text_encoder_2"}
            <= set(found["roles"]))
    assert found["passes"] == {"forward": 4, "backward": 1, "batch": 4, "updates": 2} and found["downloads"] == []
    kept = plan(recipe(folder, count=10, cache=True))["disk"] - found["disk"]
    cond = family.encode(["a red ring"])
    assert kept == 10 * 4 * (16 * 8 * 8 + cond.text.numel() + cond.pooled.numel()) and cond.text.shape[1] == tokens


@pytest.mark.long
def test_a_peak_has_room_for_every_pass_that_gradients_go_back_through(tiny_teacher):
    """A score difference keeps the activations of the student alone, a score identity the teacher's and the critic's
    too."""
    def peak(method: str, guidance: float, batch: int = 4) -> int:
        return plan(Recipe.load({"method": method, "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
                                 "guidance": guidance,
                                 "steps": 1, "data": {"prompts": "shapes", "batch": batch},
                                 "train": {"updates": 2}}))["peak"]

    one, three, five = peak("swiftbrush", 2.0), peak("sid", 1.0), peak("sid", 2.0)
    assert three > one and five - one == pytest.approx(2 * (three - one), rel=0.1), (one, three, five)
    # a frozen pass keeps a little less
    assert three - one == pytest.approx(2 * (peak("swiftbrush", 2.0, 8) - one), rel=0.2)


def test_the_plan_of_stable_diffusion_3_from_its_configs(tmp_path):
    """2.03 billion parameters in the transformer of SD3 Medium, 4.76 in T5-XXL's encoder."""
    with torch.device("meta"):
        SD3Transformer2DModel(num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
                              pos_embed_max_size=192,
                              sample_size=128).save_config(tmp_path / "transformer")
        AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                      latent_channels=16,
                      block_out_channels=(128, 256, 512, 512), layers_per_block=2, scaling_factor=1.5305,
                      shift_factor=0.0609).save_config(tmp_path / "vae")
    CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12,
                   projection_dim=768).save_pretrained(tmp_path / "text_encoder")
    CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_attention_heads=20, num_hidden_layers=32,
                   projection_dim=1280).save_pretrained(tmp_path / "text_encoder_2")
    T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
             feed_forward_proj="gated-gelu").save_pretrained(tmp_path / "text_encoder_3")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_config(tmp_path / "scheduler")
    clip = ["transformers", "CLIPTextModelWithProjection"]
    (tmp_path / "model_index.json").write_text(json.dumps({
        "_class_name": "StableDiffusion3Pipeline", "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"], "text_encoder": clip, "text_encoder_2": clip,
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}))
    found = plan(recipe(tmp_path, rank=64))
    millions = {name: row["parameters"] / 1e6 for name, row in found["roles"].items()}
    assert (millions["teacher"] == pytest.approx(2028, abs=1) and millions["text_encoder_3"]
            == pytest.approx(4762, abs=1))
    assert (millions["text_encoder"] == pytest.approx(123.7, abs=0.1) and millions["text_encoder_2"]
            == pytest.approx(694.7, abs=0.1))
    assert found["peak"] > found["bytes"]


SHIPPED = sorted(f"{path.parent.name}/{path.stem}" for path in (ROOT / "recipes").glob("shapes*/*.yaml"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "shapes/scm" else pytest.mark.long)
                                  for name in SHIPPED])
def test_every_recipe_of_the_shipped_teachers_is_planned(name):
    found = plan(Recipe.load(name))
    assert (found["roles"]["student"]["trained"] > 0 and found["passes"]["forward"] >= 1
            and found["peak"] > found["bytes"])


def test_an_exact_derivative_is_planned():
    found = plan(Recipe.load("shapes/scm", {"settings.derivative": "exact"}))
    assert found["passes"]["backward"] == 1
