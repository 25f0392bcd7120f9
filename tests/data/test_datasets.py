from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from stepdistill.data.cache import Cache
from stepdistill.data.datasets import Encoders, cached_images, live_images, prompts_only, teacher_samples
from stepdistill.data.images import open_images
from stepdistill.data.prompts import open_prompts
from stepdistill.data.stream import Stream
from stepdistill.data.text import LiveText, StoredText, stored_text
from stepdistill.diffusion.contracts import Condition
from stepdistill.errors import RequestError


class Text:
    """An encoder that reads letters, with a null of its own, and a record of the prompts that it was given."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, prompts):
        self.given += prompts
        letters = torch.tensor([[float(ord(c)) for c in prompt[:6].ljust(6)] for prompt in prompts], requires_grad=True)
        null = Condition(text=torch.full((1, 6, 1), -1.0), mask=torch.zeros(1, 6, dtype=torch.bool))
        return Condition(text=letters[..., None] * 1.0, mask=letters != 32,
                         null=null.map(lambda one: one.expand(len(prompts), *one.shape[1:])))


def mean_of_blocks(pixels):
    return torch.nn.functional.avg_pool2d(pixels, 4)


@pytest.fixture
def encoders():
    return Encoders(Text(), mean_of_blocks, identity="teacher-1")


def same(a: Condition, b: Condition) -> bool:
    return all(torch.equal(getattr(x, name), getattr(y, name)) for x, y in ((a, b), (a.null, b.null))
               for name in ("text", "mask"))


def test_cached_images_equal_live_ones_and_are_encoded_once(tmp_path, encoders):
    images, indices = open_images("shapes", 32, seed=1, count=150), torch.tensor([149, 0, 70, 70])
    live, cached = (make(images, encoders, Cache(tmp_path)) for make in (live_images, cached_images))
    assert live.count == cached.count == 150
    (x0, cond), (stored, found) = live[indices], cached[indices]
    assert torch.allclose(x0, stored, atol=1e-6) and x0.shape == (4, 3, 8, 8) and same(cond, found)
    assert same(cond, encoders.text(images.captions(indices)))
    refuse = Encoders(Text(), lambda pixels: pytest.fail("encoded again"), identity="teacher-1")
    assert torch.equal(cached_images(images, refuse, Cache(tmp_path))[indices][0], stored)
    assert len(refuse.text.given) == 1                                # for its null


def test_another_teacher_count_seed_or_size_is_another_cache(tmp_path, encoders):
    images, folders = open_images("shapes", 32, count=20), lambda: len(list(tmp_path.glob("images-*")))
    cached_images(images, encoders, Cache(tmp_path))
    for i, (changed, by) in enumerate([
            (images, dataclasses.replace(encoders, identity="teacher-2")),
            (dataclasses.replace(images, count=21), encoders),
            (dataclasses.replace(images, seed=1), encoders), (dataclasses.replace(images, size=64), encoders)]):
        cached_images(changed, by, Cache(tmp_path))
        assert folders() == i + 2
    cached_images(images, encoders, Cache(tmp_path))
    assert folders() == 5


def test_endless_images_cannot_be_cached(tmp_path, encoders):
    with pytest.raises(RequestError, match="how many"):
        cached_images(open_images("shapes", 32), encoders, Cache(tmp_path))


def test_a_folder_becomes_batches(tmp_path, encoders):
    for i in range(3):
        Image.new("RGB", (40, 40), (0, 0, 100 * i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"blue {i}")
    data = cached_images(open_images(tmp_path, 32), encoders, Cache(tmp_path / "cache"))
    batch = Stream(data, 6, seed=0).batch(0, "student")
    blue, digit = batch.x0[:, 2, 0, 0], batch.cond.text[:, 5, 0] - ord("0")
    assert (blue - (digit * 100 / 127.5 - 1)).abs().max() < 1e-6 and batch.x0.shape == (6, 3, 8, 8)


def test_prompts_are_encoded_once_each_and_their_null_is_not_copied(tmp_path, encoders):
    captions = ["a cat", "a dog", "a cat", "a cow"] * 50
    data = prompts_only(open_prompts(captions), encoders, Cache(tmp_path))
    assert sorted(encoders.text.given) == ["a cat", "a cat", "a cow", "a dog"]       # the first also for its null
    x0, cond = data[torch.tensor([2, 7, 198])]
    assert x0 is None and same(cond, Text()(["a cat", "a cow", "a cat"]))
    assert cond.null.text.stride(0) == 0 and len(cond.null) == 3 and not cond.text.requires_grad


def test_the_null_survives_slicing_and_joining(tmp_path, encoders):
    data = prompts_only(open_prompts(["a cat", "a dog"]), encoders, Cache(tmp_path))
    source = Stream(data, 4, seed=0)
    joined = Condition.cat([source.batch(0, "student", micro=i, micros=2).cond for i in range(2)])
    assert same(joined, source.batch(0, "student").cond)


def test_endless_prompts_are_encoded_as_they_come(tmp_path, encoders):
    prompts = open_prompts("shapes", seed=4)
    data = prompts_only(prompts, encoders, Cache(tmp_path))
    assert data.count is None and not encoders.text.given and not list(tmp_path.iterdir())
    x0, cond = data[torch.tensor([5, 2**50])]
    assert x0 is None and same(cond, Text()(prompts.captions(torch.tensor([5, 2**50]))))


@pytest.mark.parametrize("named", ["shapes", ["a cat", "a dog", "a cat"]])
def test_batches_hold_their_prompts_where_they_are_asked_for(tmp_path, encoders, named):
    data = prompts_only(open_prompts(named), encoders, Cache(tmp_path))
    batch = Stream(data, 4, seed=0, prompts=True).batch(1, "student")
    assert len(batch.prompts) == 4 and same(batch.cond, Text()(batch.prompts))
    assert Stream(data, 4, seed=0).batch(1, "student").prompts is None


def test_too_many_prompts_for_the_disk_are_encoded_as_they_come_and_this_is_said(tmp_path, encoders, caplog):
    text = stored_text(["a cat", "a dog"], encoders.text, "t", Cache(tmp_path), limit=50)
    assert isinstance(text, LiveText) and "2 different prompts" in caplog.text
    assert same(text(torch.tensor([1])), Text()(["a dog"]))
    assert isinstance(stored_text(["a cat", "a dog"], encoders.text, "t", Cache(tmp_path), limit=100), StoredText)


def test_a_text_cache_belongs_to_its_encoder_and_prompts(tmp_path):
    stores = lambda: len(list(tmp_path.glob("text-*")))
    for i, (captions, encoder) in enumerate([(["a", "b"], 1), (["a", "b"], 2), (["a", "c"], 1), (["a\0b"], 1)]):
        stored_text(captions, Text(), encoder, Cache(tmp_path))
        assert stores() == i + 1
    stored_text(["b", "a", "b"], Text(), 1, Cache(tmp_path))
    stored_text(["a", "b", "a"], Text(), 1, Cache(tmp_path))
    assert stores() == 5                                              # order matters, repeats do not


def test_a_condition_without_null_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="null"):
        stored_text(["a"], lambda prompts: Text()(prompts).replace(null=None), 1, Cache(tmp_path))


def test_the_teacher_s_samples_are_made_once_from_their_numbers(tmp_path, encoders):
    given = {}

    def generate(indices, prompts):
        given.update(zip(indices.tolist(), prompts))
        return indices[:, None, None, None] * torch.ones(1, 2, 4, 4)

    make = lambda **made_by: teacher_samples(open_prompts(["a cat", "a dog"]), 300, generate, made_by, encoders,
                                             Cache(tmp_path))
    data = make(steps=20, guidance=3.0, solver="dpmpp_2m", seed=0)
    x0, cond = data[torch.tensor([299, 4])]
    assert data.count == 300 and x0[:, 0, 0, 0].tolist() == [299, 4] and same(cond, Text()(["a dog", "a cat"]))
    assert given == {i: ("a cat", "a dog")[i % 2] for i in range(300)}
    given.clear()
    make(steps=20, guidance=3.0, solver="dpmpp_2m", seed=0)
    assert not given
    make(steps=20, guidance=4.0, solver="dpmpp_2m", seed=0)
    assert len(given) == 300


def test_no_samples_are_no_request(tmp_path, encoders):
    with pytest.raises(RequestError, match="samples.count"):
        teacher_samples(open_prompts("shapes"), 0, lambda i, p: i, {}, encoders, Cache(tmp_path))
