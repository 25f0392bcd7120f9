"""What follows a student: after n updates of one that stands still, decay^n of the distance is left."""
from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

from .. import resources
from ..methods import load_method
from ..models.roles import Full, build_roles
from ..models.teacher import Teacher, load_teacher
from .path_table import PUBLISHED
from .problem import Check, Problem, largest

UPDATES = 3


@lru_cache(maxsize=1)
def toy() -> Teacher:
    return load_teacher(resources.pipeline("assets/toy"))


def left(method: str, **settings: float) -> tuple[float, float]:
    """The least and the largest share of the distance to the student that is left after UPDATES of it."""
    kind = load_method(method)
    needs = kind.needs(kind.Settings(**settings), True)
    roles = build_roles(toy(), needs, {"student": Full()})
    with torch.no_grad():
        for parameter in roles.parameters("student"):
            parameter.add_(1.0)
    before = [p.clone() for p in roles.parameters("target")]
    far = [s - b for s, b in zip(roles.parameters("student"), before)]
    for _ in range(UPDATES):
        roles.follow("student")
    near = [s - p for s, p in zip(roles.parameters("student"), roles.parameters("target"))]
    shares = torch.cat([(n / f).flatten() for n, f in zip(near, far)])
    return shares.min().item(), shares.max().item()


def following(method: str, problem: Problem) -> Iterator[Check]:
    """At the published decay, which is the default, and at one that is drawn."""
    drawn = problem.uniform(0.2, 0.9)
    for name, decay, found in (("the default decay", PUBLISHED[method]["target_decay"], left(method)),
                               (f"decay {drawn:.2f}", drawn, left(method, target_decay=drawn))):
        off = largest(*(abs(share - decay**UPDATES) for share in found))
        yield Check(f"what follows the student, at {name}: share of the way left by {UPDATES} updates",
                    off, 1e-5)
