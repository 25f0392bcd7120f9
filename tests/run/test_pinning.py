"""What a teacher has from the Hub: a run notes the commits, and goes on with them."""
from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler

from stepdistill.errors import RequestError
from stepdistill.export.card import base_lines
from stepdistill.models import loading, sources
from stepdistill.models.sources import FusedLora, Source, at_revision
from stepdistill.recipe import Recipe
from stepdistill.run.pinning import pinned
from stepdistill.run.resuming import RECIPE, resumed
from stepdistill.run.sources import named

HELD = {("owner/base", "model_index.json", None): "b1", ("owner/vae", "config.json", None): "v1",
        ("owner/times", "scheduler_config.json", "main"): "s1",
        ("owner/style", "pytorch_lora_weights.safetensors", None): "l1",
        ("owner/styles", "one.safetensors", "v2"): "l2"}
"""Of the Hub's cache: (repository, file, revision) -> commit."""
ASKED = {"method": "lcm", "teacher": {"base": "owner/base", "vae": "owner/vae", "scheduler": "owner/times@main",
                                      "loras": ["owner/style", {"path": "owner/styles/one.safetensors@v2",
                                                                "weight": 0.5}, "owner/unknown"]},
         "data": {"images": "shapes", "batch": 2}, "train": {"updates": 1}}


@pytest.fixture
def cache(monkeypatch):
    def hub_file(place: str, name: str, revision: str | None, **options: bool) -> str | None:
        commit = HELD.get((place, name, revision))
        return None if commit is None else f"/cache/models--{place.replace('/', '--')}/snapshots/{commit}/{name}"

    monkeypatch.setattr(sources, "hub_file", hub_file)


def test_a_run_notes_the_commits_of_all_that_its_teacher_has_from_the_hub(cache):
    found = named(pinned(Recipe.load(ASKED)))
    assert found == Source("owner/base", "b1", vae="owner/vae@v1", scheduler="owner/times@s1", loras=(
        FusedLora("owner/style@l1"), FusedLora("owner/styles/one.safetensors@l2", 0.5), FusedLora("owner/unknown")))
    assert named(pinned(pinned(Recipe.load(ASKED)))) == found


def test_what_lies_here_has_no_commit(cache, tiny_teacher):
    recipe = Recipe.load(ASKED | {"teacher": {"base": str(tiny_teacher), "vae": str(Path(tiny_teacher) / "vae")}})
    assert pinned(recipe).resolved() == recipe.resolved()


def test_the_configs_of_a_single_file_have_one(cache, tmp_path):
    (tmp_path / "model.safetensors").touch()
    recipe = Recipe.load(ASKED | {"teacher": {"base": str(tmp_path / "model.safetensors"), "config": "owner/base"}})
    assert pinned(recipe).teacher.revision == "b1"


def test_a_run_goes_on_with_the_commits_that_it_began_with(cache, monkeypatch, tmp_path):
    asked = Recipe.load(ASKED)
    begun = pinned(asked)
    (tmp_path / RECIPE).write_text(begun.dump(), encoding="utf-8")
    assert resumed(tmp_path, asked).teacher == begun.teacher and resumed(tmp_path, begun).teacher == begun.teacher
    for name in (name for name in HELD if name[2] is None):          # the Hub has gone on since: nobody asked for more
        monkeypatch.setitem(HELD, name, "newer")
    assert resumed(tmp_path, asked).teacher == begun.teacher
    monkeypatch.setitem(HELD, ("owner/times", "scheduler_config.json", "main"), "s2")
    with pytest.raises(RequestError, match="teacher.scheduler was 'owner/times@s1', now 'owner/times@s2'"):
        resumed(tmp_path, asked)
    with pytest.raises(RequestError, match="teacher.vae was 'owner/vae@v1', now 'owner/other'"):
        resumed(tmp_path, Recipe.load(ASKED, {"teacher.vae": "owner/other"}))


def test_a_run_of_before_that_noted_none_goes_on(cache, tmp_path):
    recipe = Recipe.load(ASKED)
    (tmp_path / RECIPE).write_text(recipe.dump(), encoding="utf-8")
    assert resumed(tmp_path, recipe).teacher == recipe.teacher


def test_components_are_read_at_their_commit(monkeypatch):
    asked = []
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}
    monkeypatch.setattr(DDPMScheduler, "load_config", lambda place, **where: asked.append((place, where)) or config)
    monkeypatch.setattr(DDIMScheduler, "from_pretrained", lambda place, **where: asked.append((place, where)))
    monkeypatch.setattr(AutoencoderKL, "load_config", lambda place, **where: asked.append((place, where)) or {})
    loading._scheduler("owner/times@s1")
    loading._config_of_vae("owner/vae@v1")
    loading._config_of_vae("owner/vae")
    assert asked == [("owner/times", {"revision": "s1"})] * 2 + [("owner/vae", {"revision": "v1"}),
                                                                 ("owner/vae", {"revision": None})]


def test_a_lora_is_read_at_its_commit(monkeypatch):
    asked = []

    def hub_file(place: str, name: str, **options: str) -> str:
        asked.append((place, name, options))
        raise OSError("gone")

    monkeypatch.setattr(sources, "hub_file", hub_file)
    for path in ("owner/styles/one.safetensors@v2", "owner/style@l1"):
        with pytest.raises(OSError, match="gone"):
            FusedLora(path).file()
    assert asked == [("owner/styles", "one.safetensors", {"revision": "v2"}),
                     ("owner/style", "pytorch_lora_weights.safetensors", {"revision": "l1"})]


def test_a_card_says_the_commits():
    base = Source("owner/base", "b1", vae="owner/vae@v1", loras=(FusedLora("owner/styles/one.safetensors@l2"),))
    lines = "\n".join(base_lines(base, "StableDiffusionPipeline", ""))
    assert 'AutoencoderKL.from_pretrained("owner/vae", revision="v1", torch_dtype=dtype)' in lines
    assert 'pipe.load_lora_weights("owner/styles", weight_name="one.safetensors", revision="l2")' in lines


@pytest.mark.parametrize("place", ["owner/vae@../main", "owner/vae@a b", "owner/vae@-x"])
def test_what_is_no_revision_is_refused(place):
    with pytest.raises(RequestError, match="revision is .* it should be one such as main, a tag or a commit"):
        at_revision(place)
