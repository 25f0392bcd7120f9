"""The teacher of a recipe: a text, or a table of what it is made of."""
from __future__ import annotations

import json

import pytest
from tiny import save_tiny

from stepdistill.errors import RequestError
from stepdistill.models.sources import FusedLora, Source
from stepdistill.recipe import Recipe
from stepdistill.run.sources import named, source_of

TEXT = """\
method: lcm
teacher:
  base: {teacher}
  variant: fp16
  loras:
    - {{path: assets/shapes-clip, weight: 0.5}}
    - mine.safetensors
data: {{images: shapes, batch: 4}}
train: {{updates: 10}}
"""


@pytest.fixture
def path(tmp_path, tiny_teacher):
    (tmp_path / "mine.yaml").write_text(TEXT.format(teacher=tiny_teacher))
    return tmp_path / "mine.yaml"


def changed(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(RequestError) as caught:
        Recipe.load(path)
    return str(caught.value)


def test_a_table_says_all_of_a_teacher(path, tiny_teacher, tmp_path, monkeypatch):
    recipe = Recipe.load(path)
    assert named(recipe) == Source(str(tiny_teacher), variant="fp16",
                                   loras=(FusedLora("assets/shapes-clip", 0.5), FusedLora("mine.safetensors")))
    (tmp_path / "mine.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    asset, mine = source_of(recipe).loras
    assert (asset.path.endswith("/assets/shapes-clip") and asset.path.startswith("/")
            and mine.path == str(tmp_path / "mine.safetensors"))
    plain = recipe.resolved()["teacher"]
    assert plain == {"base": str(tiny_teacher), "variant": "fp16",
                     "loras": [{"path": "assets/shapes-clip", "weight": 0.5},
                                                                             {"path": str(tmp_path
                                                                                          / "mine.safetensors"),
                                                                                          "weight": 1.0}]}
    assert Recipe.load(recipe.resolved()).resolved() == recipe.resolved()


def test_a_text_is_a_teacher_s_base(path, tiny_teacher, tmp_path):
    other = save_tiny(tmp_path / "other")
    written = {"method": "lcm", "teacher": str(other), "data": {"images": "shapes", "batch": 2},
               "train": {"updates": 1}}
    recipe = Recipe.load(written)
    assert named(recipe) == Source(str(other)) and recipe.resolved()["teacher"] == str(other)
    assert named(Recipe.load(written, {"teacher.variant": "fp16"})) == Source(str(other), variant="fp16")
    assert named(Recipe.load(path, {"teacher": str(other)})) == Source(str(other))
    assert named(Recipe.load(path, {"teacher": str(other), "teacher.variant": "ema"})) == Source(str(other),
                                                                                                 variant="ema")
    assert named(Recipe.load(path, {"teacher.base": str(other)})).base == str(other)
    assert named(Recipe.load(path, {"teacher.loras": None or []})).loras == ()


def test_revision_where_it_stood_before_is_the_teacher_s(tiny_teacher):
    written = {"method": "lcm", "teacher": "owner/name", "data": {"images": "shapes", "batch": 2},
               "train": {"updates": 1}}
    known = Source("owner/name", "v1")
    for recipe in (Recipe.load(written | {"revision": "v1"}), Recipe.load(written, {"revision": "v1"}),
                   Recipe.load(written | {"teacher": {"base": "owner/name", "revision": "v1"}, "revision": "v1"}),
                   Recipe.load(written | {"teacher": {"base": "owner/name", "revision": "v1"}, "revision": None})):
        assert named(recipe) == known and recipe.resolved()["teacher"] == {"base": "owner/name", "revision": "v1"}
        assert "revision" not in recipe.resolved()
    assert named(Recipe.load(written | {"revision": None})) == Source("owner/name")
    with pytest.raises(RequestError, match="revision is 'v1', and teacher.revision, where it belongs now, is 'v2': "
                       "leave one of them out"):
        Recipe.load(written | {"teacher": {"base": "owner/name", "revision": "v2"}, "revision": "v1"})
    set_ = Recipe.load(written, {"revision": "v1"}).arguments
    assert set_ == f"recipe --set 'teacher.revision={json.dumps('v1')}'"


@pytest.mark.parametrize(("old", "new", "line", "said"), [
    ("variant: fp16", "varaint: fp16", 4, "teacher.varaint is no entry of teacher; did you mean variant?"),
    ("weight: 0.5", "wieght: 0.5", 6, "teacher.loras.0.wieght is no entry of teacher.loras.0; did you mean weight?"),
    ("weight: 0.5", "weight: .nan", 6, "teacher.loras.0.weight is nan; it should be a finite number"),
    ("- mine.safetensors", "- 3", 7, "teacher.loras.1 is 3; it should be a table"),
    ("  base: ", "  vae: ", 2, "teacher.base is missing"),
    ("  base: ", "  base: ./nowhere/", 2, "teacher cannot be loaded: there is no pipeline at"),
    ("variant: fp16", "variant: 16", 4, "teacher.variant is 16; it should be a text"),
])
def test_a_slip_in_the_table_is_refused_at_its_line(path, old, new, line, said):
    message = changed(path, old, new)
    assert f"mine.yaml:{line}:" in message and said in message, message


def test_no_stage_changes_what_a_teacher_is(path):
    stages = "stages: [{steps: 4}, {steps: 2, teacher.variant: ema}]"
    path.write_text(path.read_text() + stages)
    with pytest.raises(RequestError, match="teacher is no entry of a stage: it is the whole recipe's"):
        Recipe.load(path)
    path.write_text(path.read_text().replace("teacher.variant: ema", "teacher: {base: x}"))
    with pytest.raises(RequestError, match="teacher of a stage is .*it should be base, the recipe's pipeline, "
                       "or previous"):
        Recipe.load(path)
