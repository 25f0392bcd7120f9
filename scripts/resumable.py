"""What the world's trainings share: going on from the last checkpoint."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def restore(work: Path, parts: dict[str, Any]) -> tuple[int, float]:
    """Puts the parts back as the last checkpoint in `work` left them. Returns the updates and the seconds done: 0
    without one."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "checkpoint.pt").exists():
        return 0, 0.0
    saved = torch.load(work / "checkpoint.pt")
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return saved["update"], saved["seconds"]


def keep(work: Path, parts: dict[str, Any], update: int, seconds: float) -> None:
    """Writes the checkpoint aside, then renames it."""
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"update": update, "seconds": seconds}, work / "checkpoint.tmp")
    (work / "checkpoint.tmp").replace(work / "checkpoint.pt")
