"""Negative prompts in training: a share of the samples has one, as a function of the sample's place."""
from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.data.datasets import Samples
from stepdistill.data.negatives import Negatives
from stepdistill.data.stream import Stream
from stepdistill.diffusion.contracts import Condition

COUNT = 7


def numbered(indices: Tensor) -> Condition:
    return Condition(label=indices.clone(), null=Condition(label=torch.full_like(indices, -1)))


def negative(indices: Tensor) -> Condition:
    return Condition(label=1000 + indices, null=Condition(label=torch.full_like(indices, -1)))


def stream(share: float, batch: int = 64, count: int | None = COUNT, dropout: float = 0.0) -> Stream:
    data = Samples(1000, numbered, lambda indices: indices.float()[:, None])
    return Stream(data, batch, 5, None, dropout, Negatives(negative, count, share))


def test_a_share_has_one_of_all_negatives_and_the_others_their_null():
    labels = torch.cat([stream(0.25, 1000).batch(step, "student").cond.negative.label for step in range(8)])
    own = labels[labels != -1] - 1000
    # four standard errors of 8,000 draws
    assert abs(len(own) / len(labels) - 0.25) < 4 * (0.25 * 0.75 / 8000) ** 0.5
    counts = own.bincount(minlength=COUNT) / len(own)
    assert (counts - 1 / COUNT).abs().max() < 4 * (1 / COUNT * (1 - 1 / COUNT) / len(own)) ** 0.5
    assert (stream(1.0).batch(0, "student").cond.negative.label >= 1000).all()


def test_everything_else_of_a_batch_is_as_without_them():
    plain = Stream(Samples(1000, numbered, lambda indices: indices.float()[:, None]), 64, 5).batch(2, "student")
    batch = stream(0.5).batch(2, "student")
    assert torch.equal(batch.x0, plain.x0) and torch.equal(batch.cond.label, plain.cond.label)
    assert torch.equal(batch.cond.null.label, plain.cond.null.label) and plain.cond.negative is None
    assert batch.cond.negative.null is None


def test_a_dropped_caption_gives_way_to_the_null_and_not_to_the_negative():
    cond = stream(1.0, 500, dropout=0.5).batch(0, "student").cond
    gone = cond.label == -1
    assert 150 < gone.sum() < 350 and (cond.negative.label >= 1000).all() and (cond.label < 1000).all()


def test_a_draw_is_of_the_place_and_of_the_update():
    for count in (COUNT, None):
        kept = stream(0.5, count=count)
        joined = kept.batch(3, "student").cond.negative.label
        parts = [kept.batch(3, "student", 0, rank, 2, micro, 2).cond.negative.label for rank in (0, 1)
                 for micro in (0, 1)]
        assert torch.equal(joined, torch.cat(parts))
        # a run that goes on
        assert torch.equal(joined, stream(0.5, count=count).batch(3, "student").cond.negative.label)
        assert not torch.equal(joined, kept.batch(3, "critic").cond.negative.label)
        assert not torch.equal(joined, kept.batch(4, "student").cond.negative.label)
