from __future__ import annotations

import json

import pytest
import torch
from tiny import ASSETS
from transformers import CLIPModel, Dinov2Config, Dinov2Model, ViTConfig

from stepdistill.diffusion.contracts import Condition
from stepdistill.errors import RequestError
from stepdistill.methods.base import Codec, Features, Frozen, Heads, Trained
from stepdistill.models.heads import prompt_vector
from stepdistill.models.roles import Lora, Places, build_roles
from stepdistill.models.teacher import load_teacher
from stepdistill.models.vision import PictureHeads, VisionConfig

NEEDS = {"teacher": Frozen(), "student": Trained(), "decode": Codec(), "features": Features(),
         "discriminator": Heads("features")}
CPU = torch.device("cpu")
CLIP = str(ASSETS / "shapes-clip")


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    """A DINOv2 of random weights as its folder lies on the Hub: 28 pixels shown, patches of 14, positions of another
    size."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=12, num_attention_heads=2, image_size=56,
                             patch_size=14)).save_pretrained(folder)
    processor = {"crop_size": {"height": 28, "width": 28}, "image_mean": [0.485, 0.456, 0.406],
                 "image_std": [0.229, 0.224, 0.225],
            "size": {"shortest_edge": 32}, "image_processor_type": "BitImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(folder)


def pixels(side: int, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_layers_that_are_read_are_those_published(dino):
    assert VisionConfig.of(dino).default == ("embeddings", "layers.2", "layers.5", "layers.8", "layers.11")
    vision_config = VisionConfig.of(CLIP)
    assert (vision_config.default == ("embeddings", "layers.0", "layers.1", "layers.2")
            and set(vision_config.shapes.values()) == {(96, 8, 8)})
    assert tuple(vision_config.read(["layers.2", "embeddings"])) == ("embeddings", "layers.2")


def test_maps_are_the_patches_of_the_network_s_own_pass(dino):
    vision_config = VisionConfig.of(dino)
    vision, shown = vision_config.features(("embeddings", "layers.5", "layers.11"), CPU), pixels(28)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        tokens = Dinov2Model.from_pretrained(dino).eval()((shown / 2 + 0.5 - mean) / std,
                                                          output_hidden_states=True).hidden_states
    for found, place in zip(vision(shown), (0, 6, 12), strict=True):
        assert found.shape == (2, 16, 2, 2)
        torch.testing.assert_close(found, tokens[place][:, 1:].reshape(2, 2, 2, 16).permute(0, 3, 1, 2))


def test_a_clip_model_is_read_at_its_vision_side():
    vision, shown = VisionConfig.of(CLIP).features(("layers.0",), CPU), pixels(32)
    with torch.no_grad():
        tokens = CLIPModel.from_pretrained(CLIP, dtype=torch.float32).vision_model(
            shown, output_hidden_states=True).hidden_states
    torch.testing.assert_close(vision(shown)[0], tokens[1][:, 1:].transpose(1, 2).unflatten(2, (8, 8)))


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_pixels_of_any_size_and_no_weight(dino, autocast):
    vision, shown = VisionConfig.of(dino).features(("layers.2", "layers.11"), CPU), pixels(20).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, autocast):
        maps = vision(shown)
    assert all(m.dtype == torch.float32 for m in maps)
    sum(m.square().sum() for m in maps).backward()
    assert shown.grad.any() and all(p.grad is None and not p.requires_grad for p in vision.parameters())


def test_heads_are_told_the_prompt(dino):
    shapes = VisionConfig.of(dino).read(None)
    heads, maps = PictureHeads(shapes, 6, seed=3), [torch.randn(2, *shape) for shape in shapes.values()]
    one, two = (Condition(text=torch.full((2, 4, 6), value)) for value in (0.0, 1.0))
    first, second = heads(maps, one), heads(maps, two)
    assert [tuple(logits.shape) for logits in first] == [(2, 4)] * 5, "a logit at each of 2 x 2 positions"
    assert all(((a - b).abs() > 1e-5).all() for a, b in zip(first, second))
    assert torch.equal(prompt_vector(two.replace(pooled=torch.zeros(2, 3))), torch.zeros(2, 3))
    again, other = PictureHeads(shapes, 6, seed=3).state_dict(), PictureHeads(shapes, 6, seed=4).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in heads.state_dict().items())
    assert all(value.any() and not torch.equal(value, other[key]) for key, value in again.items()
               if key.endswith("weight") and value.ndim > 1)


def test_roles_of_a_method_that_judges_pictures(folders, inputs, perturb):
    """Decoder, vision network and heads beside an adapter: who is called how, who has weights, whom gradients reach."""
    family = load_teacher(folders["epsilon"])
    roles = build_roles(family, NEEDS, {"student": Lora(4), "discriminator": Places(("layers.0", "layers.2"), CLIP)})
    assert roles.names == tuple(NEEDS) and [bool(roles.parameters(name)) for name in NEEDS] == [False, True, False,
                                                                                                False, True]
    assert [bool(roles.state_dict(name)) for name in NEEDS] == [False, True, False, False, True]
    perturb(roles.parameters("student"))
    x_t, t, cond = inputs
    x0 = roles["student"](x_t, t, cond).x0
    decoded = roles["decode"](x0)
    torch.testing.assert_close(decoded.clamp(-1, 1), family.decode(x0))
    logits = roles["discriminator"](roles["features"](decoded), cond)
    assert [tuple(each.shape) for each in logits] == [(3, 64)] * 2
    sum(each.sum() for each in logits).backward()
    own = {id(p) for name in ("student", "discriminator") for p in roles.parameters(name)}
    assert all(p.grad is not None and p.grad.any() for name in ("student", "discriminator")
               for p in roles.parameters(name))
    frozen = (*family.network.parameters(), *family.codec.network.parameters(), *roles["features"].parameters())
    assert all(p.grad is None for p in frozen if id(p) not in own)
    assert roles.to("cpu")["features"] is roles["features"]


def test_a_decoder_passes_gradients_beyond_the_range_of_pixels(folders, inputs):
    family, latents = load_teacher(folders["epsilon"]), 40 * inputs[0].clone().requires_grad_()
    latents.retain_grad()
    decoded = family.pixels(latents)
    assert decoded.abs().max() > 1 and not family.decode(latents).requires_grad
    decoded[decoded.abs() > 1].sum().backward()
    assert latents.grad.any()


def test_what_cannot_see_is_refused(tmp_path, family):
    with pytest.raises(RequestError, match="no vision network .*nowhere with its .*facebook/dinov2-small would do"):
        VisionConfig.of(str(tmp_path / "nowhere"))
    ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(RequestError, match="is a vit; features are read of dinov2"):
        VisionConfig.of(str(tmp_path))
    with pytest.raises(RequestError, match="layers.9.*its features are embeddings, layers.0"):
        build_roles(family, NEEDS, {"student": Lora(4), "discriminator": Places(("layers.9",), CLIP)})
    for needs in ({**NEEDS, "second": Heads("features")},
                  {name: need for name, need in NEEDS.items() if name != "discriminator"}):
        with pytest.raises(ValueError, match="features: .* read by one discriminator"):
            build_roles(family, needs, {"student": Lora(4)})
    with pytest.raises(ValueError, match="'decode', which is no network"):
        build_roles(family, {**NEEDS, "second": Heads("decode")}, {"student": Lora(4)})
