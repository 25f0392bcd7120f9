"""What a run reads from the cache is what it would have made."""
from __future__ import annotations

import pytest
import torch
from diffusers import PixArtAlphaPipeline
from families.pixart import tiny_pixart

from stepdistill.recipe import Recipe
from stepdistill.run.data import dataset
from stepdistill.run.setup import setup


@pytest.mark.parametrize("data",
                         [{"prompts": ["a", "b"]}, {"samples": {"prompts": ["a", "b"], "steps": 1}, "count": 2}])
def test_pictures_of_another_size_are_not_those_in_the_cache(tmp_path, monkeypatch, data):
    """Of one teacher, whose network is told sizes."""
    monkeypatch.setenv("STEPDISTILL_CACHE", str(tmp_path / "cache"))
    tiny_pixart(PixArtAlphaPipeline, 128, 8).save_pretrained(tmp_path / "teacher")
    for resolution, told, latents in (([16, 16], [16, 16, 1], (8, 8)), ([16, 32], [16, 32, 0.5], (8, 16))):
        recipe = Recipe.model_validate({
            "method": "dmd2", "teacher": str(tmp_path / "teacher"), "resolution": resolution,
            "student": {"lora": {"rank": 2}}, "steps": 2,
            "settings": {"gan_weight": 0.0}, "data": {**data, "batch": 2}, "train": {"updates": 1}})
        x0, cond = dataset(setup(recipe, torch.device("cpu")))[torch.tensor([0, 1])]
        assert cond.time_ids.tolist() == [told, told] and (x0 is None or x0.shape == (2, 4, *latents))


@pytest.mark.parametrize("method", ["ict", "diff_ratio"])
def test_a_method_that_asks_no_teacher_trains_on_a_guided_ones_pictures(tiny_teacher, method):
    """They are those that a method with a teacher is shown."""
    def made(method, settings):
        recipe = Recipe.model_validate({
            "method": method, "settings": settings, "teacher": str(tiny_teacher), "student": {"lora": {"rank": 2}},
            "critic": {"lora": {"rank": 2}} if method != "ict" else None, "steps": 1, "train": {"updates": 1},
            "data": {"samples": {"prompts": ["a", "b"], "steps": 2, "guidance": 2.5}, "count": 2, "batch": 2,
                     "cache": False}})
        return dataset(setup(recipe, torch.device("cpu")))[torch.tensor([0, 1])][0]
    assert torch.equal(made(method, {}), made("dmd2", {"gan_weight": 0.0}))
