"""Healthy runs of every method, their toy recipes shortened, with a seed that no band was recorded of: the doctor says
nothing."""
from __future__ import annotations

import pytest

from stepdistill import api
from stepdistill.recipe import Recipe
from stepdistill.recipe.catalogue import COMPOSED, builtin
from stepdistill.run.health import health

SHARE, LOOKS = 0.1, 14            # of a recipe's updates


def changes(recipe: Recipe) -> dict[str, float]:
    """A shorter training with another seed. Of several methods in stages the whole: a student that was hardly trained
    is no start of a healthy stage."""
    if recipe.name in COMPOSED:
        return {"train.seed": 7}
    updates = max(60, round(SHARE * recipe.train.updates))
    return {"train.updates": updates, "train.warmup": min(recipe.train.warmup, updates // 5), "train.seed": 7,
            "train.log_every": updates // LOOKS, "train.doctor_every": updates // LOOKS}


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in builtin() if name.startswith("toy/")])
def test_a_healthy_run_raises_nothing(tmp_path, name):
    run = api.train(name, out=tmp_path / "run", **changes(Recipe.load(name)))
    assert [finding.words for one in health(run) for finding in (*one.now, *one.was)] == []
