"""The recipes for models that people have: read, checked and planned with the published configs of their teachers."""
from __future__ import annotations

from pathlib import Path

import pytest
from real_models import NAMES, described, write

from stepdistill.models.families import FAMILIES
from stepdistill.recipe import Recipe
from stepdistill.run.plan import plan

RECIPES = sorted(f"{path.parent.name}/{path.stem}" for path in (Path(__file__).parents[2] / "recipes").glob("*/*.yaml")
                 if path.parent.name not in ("toy", "shapes", "shapes-sd3"))
DATA = {"images": {"data.images": "shapes", "data.count": 64}, "prompts": {"data.prompts": ["a red ring"]},
        "samples": {"data.samples.prompts": ["a red ring"]}}
QUICK = ("pixart-sigma/lcm",)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        return made.setdefault(name, made.get(name) or write(name, tmp_path_factory.mktemp("real") / name))
    return folder


def test_each_model_has_its_recipes():
    assert {f"{name}/{method}" for name in NAMES for method in ("lcm", "dmd2")} == {*RECIPES}
    assert all(described(name)["pipeline"] in FAMILIES for name in NAMES)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.long)
                                  for name in RECIPES])
def test_a_recipe_is_planned_with_its_teacher_s_configs(folder_of, name):
    model, method = name.split("/")
    known = described(model)
    assert Recipe.load(name).teacher.base == known["source"] and Recipe.load(name).method == method
    found = plan(Recipe.load(name, {"teacher": str(folder_of(model)), **DATA[Recipe.load(name).data.kind]}))
    roles = found["roles"]
    assert (roles["teacher"]["parameters"] == known["parameters"] and roles["teacher"]["bytes"]
            == 2 * known["parameters"])
    trained = {role for role, row in roles.items() if row["trained"]}
    assert trained == ({"student"} if method == "lcm" else {"student", "critic"})
    assert found["peak"] > found["bytes"] > 2 * known["parameters"]


@pytest.mark.long
def test_two_loras_on_flux_add_a_tenth_to_the_base(folder_of):
    """Of rank 32 on its attention, with gradients and moments: 12 bytes a weight beside its own four."""
    attention = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    role = {"lora": {"rank": 32, "targets": attention}}
    recipe = Recipe.load("flux1-dev/dmd2", {"teacher": str(folder_of("flux1-dev")), "data.prompts": ["a red ring"],
                                            "student": role, "critic": role})
    found = plan(recipe)
    roles = found["roles"]
    assert sum(roles[name]["bytes"] for name in ("teacher", "student", "critic")) <= 1.1 * roles["teacher"]["bytes"]
    assert found["over_base"] <= 1.1
    assert (sum(row["bytes"] + 12 * row["trained"] for row in roles.values() if row["trained"])
            < 0.1 * roles["teacher"]["bytes"])
