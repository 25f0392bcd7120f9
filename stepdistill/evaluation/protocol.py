"""What a figure depends on beside the generator: two figures are comparable if their protocols have one id."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RequestError

ESTIMATOR = "FD at infinity: parabola in 1/n over n, n/2, n/3; reference by halves; KID and precision on a subset"


@dataclass(frozen=True)
class Protocol:
    """features and judge carry hashes of their weights; prompts a hash of the list; reference its source and seed.
    also: further features in which distances are taken; metrics: those of plugins, each with what changes with its
    code. Without any of these the id is what it was before there were some."""

    features: str
    dim: int
    judge: str | None
    reference: str
    resize: str
    dtype: str
    prompts: str
    samples: int
    seed: int
    estimator: str = ESTIMATOR
    also: tuple[str, ...] = ()
    metrics: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def id(self) -> str:
        without_place = {"features": self.features.rpartition("@")[2],
                         "also": [name.rpartition("@")[2] for name in self.also]}
        return fingerprint({name: value for name, value in (asdict(self) | without_place).items()
                            if name not in ("also", "metrics") or value})

    def record(self) -> dict[str, Any]:
        """As results.json has it. The id does not depend on where the features' folder lies."""
        entries = {"id": self.id, **asdict(self), "also": list(self.also)}
        return {name: value for name, value in entries.items() if name not in ("also", "metrics") or value}


def fingerprint(value: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def demand_same(ours: dict[str, Any], theirs: dict[str, Any], where: Path | str) -> None:
    """Refuses two protocol records of different id, and says where they part."""
    if ours["id"] == theirs.get("id"):
        return
    parts = [f"{key} is {theirs.get(key)!r} there and {value!r} here"
             for key, value in ours.items() if key != "id" and theirs.get(key) != value]
    raise RequestError(f"{where} was measured under another protocol, so its figures cannot stand beside these: "
                       f"{'; '.join(parts)}. Ask for the same samples, seed, prompts and features, or write to another "
                       "folder")
