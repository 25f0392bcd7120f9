"""PixArt: what its calls are given, what its network is told of sizes, and networks made anew."""
from __future__ import annotations

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from families.pixart import tiny_pixart

from stepdistill.errors import RequestError
from stepdistill.models.teacher import load_teacher

PROMPTS = ["a red ring", "a blue square"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"sigma": tiny_pixart(PixArtSigmaPipeline, 8, 2), "alpha": tiny_pixart(PixArtAlphaPipeline, 128, 8)}
    folders = {name: tmp_path_factory.mktemp("pixart") / name for name in made}
    for name, folder in folders.items():
        made[name].save_pretrained(folder)
    return folders


def test_the_tokens_of_a_call_are_its_class_own(folders):
    for name, tokens in (("sigma", 300), ("alpha", 120)):
        for device in (None, "meta"):
            assert load_teacher(folders[name], device=device).encode(PROMPTS).text.shape == (2, tokens, 16)


def test_no_call_picks_a_size_from_a_table(folders):
    assert load_teacher(folders["sigma"]).call == {"use_resolution_binning": False}
    assert load_teacher(folders["sigma"], resolution=(16, 32)).call == {"height": 16, "width": 32,
                                                                        "use_resolution_binning": False}


def test_sizes_are_told_in_pixels(folders):
    own, wide = load_teacher(folders["alpha"]), load_teacher(folders["alpha"], resolution=(16, 32))
    assert own.encode(PROMPTS).time_ids.tolist() == [[256, 256, 1]] * 2
    assert wide.encode(PROMPTS).null.time_ids.tolist() == [[16, 32, 0.5]] * 2
    assert load_teacher(folders["sigma"]).encode(PROMPTS).time_ids is None


def test_a_network_that_reads_sizes_which_nobody_tells(tmp_path):
    pipeline = tiny_pixart(PixArtAlphaPipeline, 8, 2)
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config,
                                                                  use_additional_conditions=True)
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="sample_size 8 reads the sizes of pictures, which PixArtAlphaPipeline "
                       "tells at 128 alone"):
        load_teacher(tmp_path)


def test_a_network_made_anew_has_the_positions_of_the_old_one(folders):
    """They are no part of its weights."""
    teacher = load_teacher(folders["sigma"])
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor([0.3, 0.8], dtype=torch.float64)
    cond = teacher.encode(PROMPTS)
    fresh = teacher.fresh_network(teacher.network.state_dict())
    assert "pos_embed.pos_embed" not in fresh.state_dict()
    assert torch.equal(teacher.predict(fresh, x, t, cond), teacher.predict(teacher.network, x, t, cond))
