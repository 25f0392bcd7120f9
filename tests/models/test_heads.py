"""Heads by hand, and what becomes of heads of another form."""
from __future__ import annotations

from math import cos, pi, sin, sqrt

import pytest
import torch
import torch.nn.functional as F

from stepdistill.diffusion.contracts import Condition
from stepdistill.methods.base import Frozen, Heads, Trained
from stepdistill.models.heads import TokenHead, channel_means, time_vector, told_of
from stepdistill.models.roles import Lora, Places, build_roles
from stepdistill.models.teacher import load_teacher

BLOCKS = ("down_blocks.0", "mid_block")


def needs(kind: str) -> dict:
    return {"teacher": Frozen(), "student": Trained(), "discriminator": Heads("teacher", kind=kind)}


def made(family, kind: str):
    return build_roles(load_teacher(family.source), needs(kind), {"student": Lora(4), "discriminator": Places(BLOCKS)})


def test_a_token_head_is_one_tap_nine_taps_beside_a_skip_and_a_projection():
    torch.manual_seed(0)
    head, x, told = TokenHead((6, 4, 4), 5), torch.randn(2, 6, 4, 4), torch.randn(2, 5)
    seen = F.conv2d(x, head.first[0].weight, head.first[0].bias)
    seen = F.leaky_relu(F.group_norm(seen, 32, head.first[1].weight, head.first[1].bias), 0.2)
    beside = F.conv2d(seen, head.beside[0].weight, head.beside[0].bias, padding=1)
    beside = F.leaky_relu(F.group_norm(beside, 32, head.beside[1].weight, head.beside[1].bias), 0.2)
    both = ((seen + beside) / sqrt(2)).permute(0, 2, 3, 1).reshape(2, 16, 128)
    known = (both @ head.last.weight.reshape(128) + head.last.bias
             + (both * (told @ head.told.weight.T)[:, None]).sum(2) / sqrt(128))
    torch.testing.assert_close(head(x, told), known, atol=1e-5, rtol=1e-4)
    turned = head(x.flip(3), told).reshape(2, 4, 4).flip(2).reshape(2, 16)
    assert (turned - head(x, told)).abs().max() > 1e-3, "it sees where its neighbours lie"


def test_levels_are_told_as_waves():
    (found,) = time_vector(torch.tensor([0.3], dtype=torch.float64)).tolist()
    angles = [pi * 0.3 * turns for turns in (1, 2, 4, 8)]
    assert found == pytest.approx([*map(cos, angles), *map(sin, angles)], abs=1e-6)
    cond, t = Condition(pooled=torch.arange(6.0).reshape(2, 3)), torch.tensor([0.3, 0.9], dtype=torch.float64)
    assert torch.equal(told_of(cond, t)[:, :3], cond.pooled) and torch.equal(told_of(cond, t)[:, 3:], time_vector(t))


def test_heads_on_a_network_are_told_the_level_and_the_prompt_beside_its_features(family, inputs):
    """With the features held, both still change every logit."""
    heads = made(family, "tokens")["discriminator"]
    x_t, t, cond = inputs
    logits = heads(x_t, t, cond)
    shapes = [family.feature_shapes[name] for name in BLOCKS]
    assert [tuple(each.shape) for each in logits] == [(3, height * width) for _, height, width in shapes]
    maps = {name: torch.randn(3, *shape) for name, shape in zip(BLOCKS, shapes)}
    usual, later, other = (heads._read(maps, *given) for given in
                           ((t, cond), (t / 2, cond), (t, cond.replace(text=cond.text.flip(0)))))
    assert (all((a - b).abs().min() > 0 for a, b in zip(usual, later))
            and all((a - b)[0].abs().min() > 0 for a, b in zip(usual, other)))
    again = made(family, "tokens")["discriminator"](x_t, t, cond)
    assert all(torch.equal(a, b) for a, b in zip(again, logits)), "first values are a function of the seed"


def test_heads_without_weights_are_means_over_channels(family, inputs):
    roles = made(family, "channels")
    assert roles.parameters("discriminator") == [] and roles.state_dict("discriminator") == {}
    x = torch.arange(12.0).reshape(1, 3, 2, 2)
    assert channel_means(x).tolist() == [[4.0, 5.0, 6.0, 7.0]]
    prediction, logits = roles["discriminator"].with_prediction(*inputs)
    assert torch.equal(prediction.raw, roles["teacher"](*inputs).raw)
    shown = {}
    mid = roles.teacher.network.get_submodule("mid_block")
    handle = mid.register_forward_hook(lambda module, args, out: shown.update(mid=out))
    roles["teacher"](*inputs)
    handle.remove()
    torch.testing.assert_close(logits[1], shown["mid"].float().mean(1).flatten(1))


def test_heads_of_another_form_are_named(family):
    """As a run of an earlier version left them."""
    before, now = made(family, "pooled"), made(family, "tokens")
    with pytest.raises(ValueError, match="role 'discriminator'.*before they judged every position.*begun anew"):
        now.load_state_dict("discriminator", before.state_dict("discriminator"))
    with pytest.raises(ValueError, match="weights of adapter 'student'") as other:
        now.load_state_dict("student", {"lora": torch.zeros(1)})
    assert "position" not in str(other.value)
