from __future__ import annotations

import pytest
import torch

from stepdistill.data.shapes import COLOURS, SIZE, SLOTS, UNCAPTIONED, Scenes, attributes_of, captions, render, scenes


def test_a_scene_and_its_picture_do_not_depend_on_the_batch():
    ids = torch.tensor([5, 0, 2**40, 7])
    together = scenes(ids, seed=3)
    pictures = render(together)
    for i in range(len(ids)):
        alone = scenes(ids[i:i + 1], seed=3)
        assert torch.equal(alone.attributes[0], together.attributes[i]) and torch.equal(alone.uncaptioned[0],
                                                                                        together.uncaptioned[i])
        assert torch.allclose(render(alone)[0], pictures[i], atol=1e-6)
    assert not torch.equal(scenes(ids, seed=4).attributes, together.attributes)


def test_these_scenes_are_for_ever():
    """Golden: the shipped teacher and every reference of the Fréchet distance were made from these."""
    scene = scenes(torch.arange(3), seed=0)
    assert captions(scene) == ["a green square left of a yellow triangle on a plain maroon background",
                               "a green cross left of a yellow cross on a dotted maroon background",
                               "a blue ring left of a blue cross on a plain maroon background"]
    assert torch.allclose(render(scene).mean((1, 2, 3)), torch.tensor([-0.5570, -0.5129, -0.5570]), atol=1e-4)


def test_pixels_fill_their_range_and_no_more():
    pixels = render(scenes(torch.arange(256)))
    assert pixels.shape == (256, 3, SIZE, SIZE) and pixels.dtype == torch.float32
    assert -1 <= pixels.min() < -0.9 and 0.9 < pixels.max() <= 1


def test_a_larger_picture_shows_the_same():
    scene = scenes(torch.arange(16))
    small, large = render(scene), torch.nn.functional.avg_pool2d(render(scene, 2 * SIZE), 2)
    assert (small - large).abs().mean() < 0.03


def test_captions_and_attributes_round_trip():
    scene = scenes(torch.arange(2000))
    texts = captions(scene)
    assert torch.equal(torch.stack([attributes_of(text) for text in texts]), scene.attributes)
    turned = sum(" right of " in text or " below " in text for text in texts)
    assert 0.45 < turned / len(texts) < 0.55


@pytest.mark.parametrize("text", ["", "a red circle", "a red circle beside of a blue ring on a plain navy background",
                                  "a pink circle above a blue ring on a plain navy background",
                                  "a red circle above a blue ring on a plain navy background today"])
def test_other_texts_have_no_attributes(text):
    assert attributes_of(text) is None


def test_the_two_objects_differ_and_every_value_occurs():
    attributes = scenes(torch.arange(50_000)).attributes
    names = list(SLOTS)
    first, second = (attributes[:, [names.index(f"{which}_shape"), names.index(f"{which}_colour")]]
                     for which in ("first", "second"))
    assert (first != second).any(1).all()
    for column, values in enumerate(SLOTS.values()):
        shares = torch.bincount(attributes[:, column], minlength=len(values)) / len(attributes)
        assert (shares * len(values) - 1).abs().max() < 0.06


@pytest.mark.parametrize("slot", list(SLOTS))
def test_every_attribute_is_visible(slot):
    """With all that captions leave out held fixed, another value of any slot changes the picture clearly."""
    column, scene = list(SLOTS).index(slot), scenes(torch.arange(128))
    pictures = render(scene)
    for shift in range(1, len(SLOTS[slot])):
        attributes = scene.attributes.clone()
        attributes[:, column] = (attributes[:, column] + shift) % len(SLOTS[slot])
        changed = ((render(Scenes(attributes, scene.uncaptioned)) - pictures).abs().amax(1) > 0.2).flatten(1).sum(1)
        assert changed.min() >= 4


def test_objects_stand_where_and_in_the_colour_that_the_caption_says():
    scene = scenes(torch.arange(200))
    uncaptioned = scene.uncaptioned.clone()
    uncaptioned[:, UNCAPTIONED.index("reverse")] = 1.0                       # first object first
    pixels = (render(scene) + 1) / 2
    palette = torch.tensor(list(COLOURS.values()))
    wrong = 0
    for picture, text in zip(pixels, captions(Scenes(scene.attributes, uncaptioned))):
        words = text.replace("left of", "left").split()
        hue = (picture.permute(1, 2, 0) / picture.amax(0)[..., None]).reshape(-1, 3)
        nearest = torch.cdist(hue, palette / palette.amax(1, keepdim=True))
        found, which = nearest.min(1)
        grid = (torch.arange(SIZE * SIZE) % SIZE if words[3] == "left" else torch.arange(SIZE * SIZE) // SIZE).float()
        place = [grid[(which == list(COLOURS).index(colour)) & (found < 0.1)] for colour in (words[1], words[5])]
        wrong += words[1] != words[5] and not (len(place[0]) and len(place[1]) and place[0].mean() < place[1].mean())
    assert wrong <= 2
