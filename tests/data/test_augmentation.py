"""Captions that are left out by chance, and mirror images: functions of the sample's place, whoever asks."""
from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import stepdistill
from stepdistill.data.cache import Cache
from stepdistill.data.datasets import Encoders, Samples, cached_images, live_images
from stepdistill.data.images import BothWays
from stepdistill.data.stream import Stream
from stepdistill.diffusion.contracts import Condition
from stepdistill.errors import RequestError
from stepdistill.recipe import Recipe


def numbered(indices: Tensor) -> Condition:
    label = indices.clone()
    return Condition(label=label, null=Condition(label=torch.full_like(label, -1)))


def stream(share: float, batch: int = 64) -> Stream:
    return Stream(Samples(1000, numbered, lambda indices: indices.float()[:, None]), batch, 5, None, share)


def test_the_share_of_captions_is_left_out_and_nothing_else_changes():
    whole, kept = [stream(share, 1000) for share in (0.0, 0.25)]
    dropped = []
    for step in range(8):
        one, other = whole.batch(step, "student"), kept.batch(step, "student")
        gone = other.cond.label == -1
        assert (torch.equal(one.x0, other.x0) and torch.equal(one.cond.label[~gone], other.cond.label[~gone])
                and torch.equal(one.ids, other.ids))
        dropped.append(gone)
    share = torch.stack(dropped).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 8000) ** 0.5                 # four standard errors of 8,000 draws
    assert not torch.equal(dropped[0], dropped[1])


def test_a_draw_is_of_the_place_and_of_the_update():
    kept = stream(0.5)
    joined = kept.batch(3, "student")
    parts = [kept.batch(3, "student", 0, rank, 2, micro, 2) for rank in (0, 1) for micro in (0, 1)]
    assert torch.equal(joined.cond.label, torch.cat([part.cond.label for part in parts]))
    assert torch.equal(joined.cond.label, stream(0.5).batch(3, "student").cond.label)      # a run that goes on
    gone = [kept.batch(3, "critic", repeat).cond.label == -1 for repeat in (0, 1)]
    assert not torch.equal(*gone)


@dataclass(frozen=True)
class Ramps:
    """Picture i is i + 1 times a ramp from left to right."""

    count: int | None
    identity = {"images": "ramps"}

    def captions(self, indices: Tensor) -> list[str]:
        return [f"ramp {i}" for i in indices.tolist()]

    def pixels(self, indices: Tensor) -> Tensor:
        return (indices.float() + 1)[:, None, None, None] * torch.linspace(-0.1, 0.1, 4).expand(1, 3, 2, 4)


def encoded(texts: list[str]) -> Condition:
    label = torch.tensor([int(text.split()[-1]) if text else -1 for text in texts])
    return Condition(label=label, null=Condition(label=torch.full_like(label, -1)))


@pytest.mark.parametrize("made", [live_images, cached_images])
def test_finite_pictures_come_both_ways_cached_or_not(made, tmp_path):
    data = made(BothWays(Ramps(3)), Encoders(encoded, lambda pixels: pixels, "none"), Cache(tmp_path))
    x0, cond = data[torch.arange(6)]
    ramp = torch.linspace(-0.1, 0.1, 4).expand(3, 2, 4)
    assert data.count == 6 and cond.label.tolist() == [0, 0, 1, 1, 2, 2]
    for i in range(3):
        assert torch.equal(x0[2 * i], (i + 1) * ramp) and torch.equal(x0[2 * i + 1], -(i + 1) * ramp)
    assert BothWays(Ramps(3)).identity != Ramps(3).identity


def test_endless_pictures_are_mirrored_by_their_number():
    ids = torch.arange(2000)
    pixels = BothWays(Ramps(None)).pixels(ids)
    mirrored = pixels[:, 0, 0, 0] > 0
    assert (torch.equal(pixels.abs(), Ramps(None).pixels(ids).abs())
            and abs(mirrored.double().mean().item() - 0.5) < 0.045)
    assert torch.equal(BothWays(Ramps(None)).pixels(ids[700:703]), pixels[700:703])


@pytest.mark.parametrize(("name", "entries", "message"), [
    ("shapes/lcm", {"data.flip": True}, "data.flip is on, but the captions of Shapes tell left from right"),
    ("shapes/swiftbrush", {"data.flip": True}, "data.flip is on, but data.prompts have no images of yours"),
    ("shapes/kd", {"data.caption_dropout": 0.1}, "data.caption_dropout is 0.1, but pairs are ways that the teacher "
     "took by their captions"),
    ("shapes/lcm", {"data.caption_dropout": 1.0}, "data.caption_dropout is 1.0; it should be below 1")])
def test_where_they_cannot_hold_they_are_refused(name, entries, message):
    with pytest.raises(RequestError, match=message):
        Recipe.load(name, entries)


def test_points_have_no_mirror_image(tmp_path):
    with pytest.raises(RequestError, match="data.flip is on, but .* points of the plane, which have no mirror image"):
        stepdistill.train("toy/lcm", out=tmp_path / "run", **{"data.flip": True})


def test_a_resumed_run_leaves_out_the_same_captions(tmp_path):
    short = {"train.updates": 3, "train.checkpoint_every": 2, "train.log_every": 1, "train.warmup": 0,
             "train.decay": "constant", "data.batch": 16,
             "data.caption_dropout": 0.5}
    whole = stepdistill.train("toy/lcm", out=tmp_path / "whole", **short)
    half = stepdistill.train("toy/lcm", out=tmp_path / "half", **short | {"train.updates": 2})
    stepdistill.train("toy/lcm", out=half, resume=True, **short)
    plain = stepdistill.train("toy/lcm", out=tmp_path / "plain", **short | {"data.caption_dropout": 0.0})
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (whole, half, plain)]
    assert metrics[0] == metrics[1] != metrics[2]
