"""What a bench had measured when it was stopped, so that it goes on."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import records
from ..files.whole import write_whole
from .plans import Plan, Target
from .report import Results, row_key

FILE = "unfinished.json"
Key = tuple[str, int, float | None]


@dataclass
class Unfinished:
    """Lies beside results.json as long as a bench is at work. measured: the rows that need not be measured again."""

    path: Path
    protocol: str
    targets: dict[str, str]
    measured: set[Key]

    @classmethod
    def of(cls, out: Path, protocol: str, targets: Sequence[Target], results: Results) -> Unfinished:
        """What lies in `out` of a bench under the same protocol: the rows of those targets whose weights are the
        same."""
        path, identities = out / FILE, {target.name: target.identity for target in targets}
        measured: set[Key] = set()
        if path.is_file():
            before: records.Unfinished = records.read(path, records.Unfinished,
                                                      "Remove it, and all rows are measured anew")
            there = {row_key(row) for row in results["rows"]}
            same = {name for name, identity in identities.items() if before["targets"].get(name) == identity}
            if before["protocol"] == protocol:
                measured = {key for one in before["measured"] if (key := tuple(one)) in there and _target(key) in same}
        return cls(path, protocol, identities, measured)

    def add(self, plan: Plan) -> None:
        """A row that results.json holds now."""
        self.measured.add(plan.key)
        record: dict[str, Any] = {"protocol": self.protocol, "targets": self.targets,
                                  "measured": [list(key) for key in sorted(self.measured)]}
        write_whole(self.path, (json.dumps(record, indent=1) + "\n").encode())

    def end(self) -> None:
        """The bench is done: asked for again, it measures again."""
        self.path.unlink(missing_ok=True)


def _target(key: Key) -> str:
    """The target of a row: a teacher's rows carry its solvers' names too."""
    return key[0].partition(":")[0]
