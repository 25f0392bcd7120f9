"""Buckets of aspect: which there are, which picture is in which, and which batch is of which."""
from __future__ import annotations

from collections import Counter

import pytest
import torch

from stepdistill.data.buckets import Bucketed, Chosen, farthest, filled, nearest, standard, told
from stepdistill.data.datasets import Samples
from stepdistill.data.images import ShapesImages
from stepdistill.data.stream import Stream
from stepdistill.diffusion.contracts import Condition

SIZES = ((64, 64), (96, 64), (64, 96))


def bucketed(*counts: int | None, own: bool = True) -> Bucketed:
    """Sample i of bucket b is the number 1000 b + i; of endless ones, or of those that all share, it is i."""
    def samples(bucket: int, count: int | None) -> Samples:
        first = 1000 * bucket if own else 0
        return Samples(count, lambda indices: Condition(label=indices + first),
                       lambda indices: torch.zeros(len(indices), 1, 2 + bucket, 2))
    return Bucketed(tuple(samples(i, count) for i, count in enumerate(counts)),
                    tuple((1, 2 + i, 2) for i in range(len(counts))), own)


@pytest.mark.parametrize("own, multiple, expected", [
    ((1024, 1024), 8, {(1024, 1024), (768, 1344), (832, 1216), (896, 1152), (960, 1088), (1088, 960), (1152, 896),
                       (1216, 832), (1344, 768)}),
    ((32, 32), 8, {(32, 32), (24, 40), (40, 24)}),
    ((16, 16), 8, {(16, 16)}),
])
def test_the_standard_buckets_have_about_the_teacher_s_area(own, multiple, expected):
    found = standard(own, multiple)
    assert found[0] == own and {*found} == expected and len({*found}) == len(found)
    assert all(0.9 <= height * width / (own[0] * own[1]) <= 1 for height, width in found)


def test_buckets_of_another_shape_than_a_square():
    assert standard((480, 832), 16)[0] == (480, 832)
    assert (832, 480) in standard((480, 832), 16) and (608, 640) in standard((480, 832), 16)


def test_a_picture_is_of_the_nearest_aspect_in_logarithms():
    """sqrt(1.5) = 1.2247 halves the way from 1 to 1.5 in logarithms, not 1.25."""
    pictures = [(50, 50), (122, 100), (123, 100), (100, 123), (1000, 10), (3, 4)]
    assert nearest(pictures, SIZES).tolist() == [0, 0, 1, 2, 1, 2]


def test_a_bucket_of_fewer_pictures_than_a_batch_is_merged_into_its_nearest(caplog):
    pictures = [(64, 64)] * 5 + [(96, 64)] * 2 + [(64, 96)] * 4
    caplog.set_level("INFO")
    found = filled(pictures, SIZES, least=4)
    assert [(size, numbers.tolist()) for size, numbers in found] == [((64, 64), [0, 1, 2, 3, 4, 5, 6]),
                                                                     ((64, 96), [7, 8, 9, 10])]
    assert "batch of 4" in caplog.text and "96 x 64 with 2" in caplog.text
    assert [size for size, _ in filled(pictures, SIZES, least=2)] == [*SIZES]
    assert [(size, len(numbers)) for size, numbers in filled(pictures, SIZES, least=100)] == [((64, 64), 11)]
    assert [size for size, _ in filled([(64, 96)] * 3, SIZES, least=1)] == [(64, 96)]          # empty ones go unsaid


def test_what_is_told_of_a_picture_s_size():
    """600 x 400 covers 64 x 64 at a scale of 0.16, as 96 x 64, of which 16 rows are cut above and below; 10 x 40 at
    6.4, as 64 x 256."""
    assert (told([(600, 400), (10, 40), (64, 64)], (64, 64)).tolist()
            == [[600, 400, 16, 0, 64, 64], [10, 40, 0, 96, 64, 64], [64, 64, 0, 0, 64, 64]])
    assert told([(100, 100)], (96, 64)).tolist() == [[100, 100, 0, 16, 96, 64]]


def test_the_farthest_bucket():
    assert farthest(((64, 64), (96, 64), (48, 96))) == (48, 96)


def test_every_sample_is_seen_as_often_and_every_batch_is_of_one_bucket():
    data, batch, seen = bucketed(7, 4, 1), 4, Counter()
    stream = Stream(data, batch, seed=5)
    buckets = []
    for step in range(3 * 12):                                # 12 epochs of 12 samples, if no batch were filled up
        made = stream.batch(step, "student")
        assert made.x0.shape == (batch, *made.shape) and len({i // 1000 for i in made.cond.label.tolist()}) == 1
        assert data.shapes[made.cond.label[0] // 1000] == made.shape
        buckets.append(made.cond.label[0].item() // 1000)
        seen.update(made.cond.label.tolist())
    counts = {name: count for name, count in seen.items()}
    assert len(counts) == 12 and max(counts.values()) - min(counts.values()) <= 5, counts
    assert 0.5 < Counter(buckets)[0] / len(buckets) < 0.65    # 7 of 12
    assert buckets != sorted(buckets) and buckets[:12] != buckets[12:24]


def test_an_epoch_shows_a_bucket_that_batches_divide_every_sample_once():
    stream = Stream(bucketed(8, 4, 12), 4, seed=0)
    for epoch in range(3):
        seen = Counter(i for step in range(6 * epoch, 6 * epoch + 6)
                       for i in stream.batch(step, "critic", 1).cond.label.tolist())
        assert len(seen) == 24 and {*seen.values()} == {1}


def test_the_bucket_depends_on_the_moment_and_not_on_the_rank():
    stream = Stream(bucketed(8, 8, 8), 4, seed=1)
    of = lambda *moment: stream.batch(*moment).shape
    for step in range(12):
        joined = stream.batch(step, "student")
        parts = [stream.batch(step, "student", 0, rank, 2, micro, 2) for rank in (0, 1) for micro in (0, 1)]
        assert {part.shape for part in parts} == {joined.shape}
        assert torch.cat([part.cond.label for part in parts]).tolist() == joined.cond.label.tolist()
        assert (torch.cat([part.ids for part in parts]).tolist() == joined.ids.tolist()
                == list(range(4 * step, 4 * step + 4)))
    walks = [[of(step, *rest) for step in range(12)] for rest in (("student",), ("critic",), ("critic", 1))]
    assert walks[0] != walks[1] != walks[2]


@pytest.mark.parametrize("count", [None, 12])
def test_what_is_of_any_size_is_walked_as_without_buckets_and_its_size_is_drawn(count):
    data = bucketed(count, count, count, own=False)
    stream, plain = Stream(data, 4, seed=2), Stream(data.parts[0], 4, seed=2)
    shapes = Counter()
    for step in range(300):
        made = stream.batch(step, "student")
        assert made.cond.label.tolist() == plain.batch(step, "student").cond.label.tolist()
        shapes[made.shape] += 1
    assert all(70 <= shapes[shape] <= 130 for shape in data.shapes)


def test_chosen_pictures_are_those_numbers():
    images, numbers = ShapesImages(16, count=9), torch.tensor([1, 4, 8])
    chosen, of = Chosen(images, numbers), torch.tensor([2, 0])
    assert chosen.count == 3 and chosen.captions(of) == images.captions(torch.tensor([8, 1]))
    assert torch.equal(chosen.pixels(of), images.pixels(torch.tensor([8, 1])))
    assert chosen.identity != Chosen(images, numbers[:2]).identity != images.identity
