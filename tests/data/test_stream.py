from __future__ import annotations

import pytest
import torch

from stepdistill.data.datasets import Samples
from stepdistill.data.stream import Stream
from stepdistill.data.walk import permuted
from stepdistill.diffusion.contracts import Condition
from stepdistill.errors import RequestError


def numbers(indices):
    """A condition and latents that name the sample they belong to."""
    return Condition(label=indices, null=Condition(label=indices * 0))


def stream(count, batch=12, seed=0):
    return Stream(Samples(count, numbers, lambda indices: indices[:, None].double()), batch, seed)


def seen(source, steps, update="student", repeat=0):
    return torch.cat([source.batch(step, update, repeat).cond.label for step in steps])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 24, 100, 1000, 1024, 20_001])
def test_each_epoch_is_a_permutation_and_no_two_are_alike(count):
    rows = permuted(torch.arange(3 * count), count, seed=5).reshape(3, count)
    assert torch.equal(rows.sort(1).values, torch.arange(count).expand(3, -1))
    if count > 10:
        assert all((rows[i] != rows[j]).float().mean() > 0.8 for i, j in ((0, 1), (0, 2), (1, 2)))
        assert (permuted(torch.arange(count), count, seed=6) != rows[0]).float().mean() > 0.8


def test_a_permutation_asked_for_piece_by_piece_is_the_same():
    places = torch.tensor([10**9 + 7, 3, 3, 250])
    assert torch.equal(permuted(places, 100, 1), torch.cat([permuted(place[None], 100, 1) for place in places]))


def test_a_permutation_looks_random():
    """Every sample may stand anywhere, neighbours are scattered, and each order of three comes up equally often."""
    count, epochs = 30, 4000
    rows = permuted(torch.arange(count * epochs), count, seed=2).reshape(epochs, count)
    table = torch.zeros(count, count).index_put_((torch.arange(count).expand(epochs, -1).reshape(-1), rows.reshape(-1)),
                                                 torch.tensor(1.0), accumulate=True)
    chi = ((table - epochs / count) ** 2 / (epochs / count)).sum()
    freedom = (count - 1) ** 2
    assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5
    steps = (rows.diff(dim=1) % count).reshape(-1)
    shares = torch.bincount(steps, minlength=count)[1:] / len(steps) * (count - 1)
    assert (shares - 1).abs().max() < 0.1
    triples = permuted(torch.arange(3 * 6000), 3, seed=4).reshape(-1, 3) @ torch.tensor([9, 3, 1])
    assert triples.unique(return_counts=True)[1].tolist() == pytest.approx([1000] * 6, rel=0.15)


def test_an_epoch_covers_a_finite_set_across_batches():
    labels = seen(stream(30), range(5))                       # 5 batches of 12 are 2 epochs of 30
    assert sorted(labels[:30].tolist()) == list(range(30)) == sorted(labels[30:].tolist())
    assert labels[:30].tolist() != labels[30:].tolist()


def test_endless_data_are_consecutive_and_never_come_twice():
    labels = seen(stream(None), range(4))
    assert (labels.diff() == 1).all() and labels.min() >= 0


@pytest.mark.parametrize("count", [30, 5, None])
def test_ranks_and_micro_batches_are_slices_of_one_joined_batch(count):
    source = stream(count)
    whole = source.batch(7, "critic", 2)
    for world, micros in ((1, 1), (2, 1), (1, 3), (2, 3), (4, 3)):
        parts = [source.batch(7, "critic", 2, rank, world, micro, micros) for rank in range(world)
                 for micro in range(micros)]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.x0 for part in parts]), whole.x0)
        assert torch.equal(Condition.cat([part.cond for part in parts]).label, whole.cond.label)
        assert all(len(part) == 12 // (world * micros) for part in parts)


def test_ids_are_distinct_even_where_samples_repeat():
    batch = stream(5).batch(3, "student")
    assert len(batch.ids.unique()) == 12 and batch.ids.dtype == torch.int64 and len(batch.cond.label.unique()) == 5


def test_data_are_a_function_of_seed_step_update_and_repeat():
    reference = seen(stream(1000), [3])
    assert torch.equal(seen(stream(1000), [3]), reference)
    others = [seen(stream(1000, seed=1), [3]), seen(stream(1000), [4]), seen(stream(1000), [3], "critic"),
              seen(stream(1000), [3], repeat=1)]
    assert not any(torch.equal(other, reference) for other in others)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(RequestError, match="12.*2 processes x 4 micro-batches.*multiple of 8"):
        stream(30).batch(0, "student", world=2, micros=4)


def test_prompts_only_have_no_latents():
    assert Stream(Samples(10, numbers), 4, 0).batch(0, "student").x0 is None
