"""What a bench is made of: targets beside their teachers, against real pictures or the teacher's own."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import resources
from ..errors import RequestError
from ..evaluation import sweep
from ..evaluation.own import bench_own
from ..evaluation.space import FeatureName, FeatureNames
from ..models.families import stock_prompts
from ..recipe.plugins import Folder
from ..training import launched
from . import folder
from .sources import marked
from .targets import Opened, open_target, ships, teachers
from .telling import log
from .with_teacher import Asked, helped

CLIP = "assets/shapes-clip"
REFERENCE_OF_OWN = ("the teacher's own pictures from the same noise; for a Fréchet distance give `reference`, a "
                    "folder of real pictures of what it was trained on, and `features`")


def bench(targets: Sequence[str | Path], *, nfe: Sequence[int], samples: int | None, out: str | Path, seed: int,
          guidance: Sequence[float] | None, solvers: Sequence[str], features: FeatureName | FeatureNames | None,
          reference: str | Path | None, prompts: Sequence[str] | None, reuse: Sequence[str | Path],
          few_step: Sequence[str | Path], metrics: Sequence[str], plugins: str | Path | None,
          with_teacher: str | None = None) -> dict[str, Any]:
    """`stepdistill.bench`."""
    asked = None if with_teacher is None else Asked.of(with_teacher)
    outside, spaces = None if plugins is None else Folder.open(plugins), feature_spaces(features)
    marks = marked(metrics, outside, device := launched())
    if reference not in (None, "teacher"):
        known = [""] if prompts is None else prompts           # before anything is loaded; not every target is told any
        sweep.admitted(samples or 2000, known, spaces, reference)
    opened = [open_target(target, Path(target).resolve().name, target in few_step, log.info, outside)
              for target in (*targets, *few_step)]
    videos = [o.target.name for o in opened if stock_prompts(o.target.pipeline).gives == "frames"]
    if videos and (len(videos) < len(opened) or reference not in (None, "teacher")):
        raise RequestError(f"{videos[0]} makes videos, which are measured beside their teacher's own: leave "
                           "--reference and targets that make pictures out")
    scales, beside = tuple(guidance or _own_scales(opened)), teachers(opened, log.info)
    students = [o for o in opened if o.target.call is not None]
    aided = [] if asked is None else [helped(o, asked, beside, device) for o in students]
    every = [*(o.target for o in students), *aided, *beside]
    for target in every:
        target.pipeline.to(device)
    if reference is None:
        reference = "shapes" if all(map(ships, opened)) else "teacher"
        log.info(f"measuring against {'real pictures of Shapes' if reference == 'shapes' else REFERENCE_OF_OWN}")
    told = common(device, marks)
    if reference == "teacher":
        if len(beside) != 1:
            raise RequestError("a bench against the teacher's own pictures is of students of one teacher; found "
                               f"{len(beside)}")
        return bench_own(every, beside[0], nfe, Path(out), guidance=scales, solvers=solvers, seed=seed, prompts=prompts,
                         samples=samples or 16, features=None if features is None else spaces, **told)
    return sweep.bench(every, nfe, samples or 2000, out, scales, solvers, seed, prompts, spaces, reference,
                       reuse, **told)


def common(device: torch.device, marks: Mapping[str, str]) -> dict[str, Any]:
    """What every kind of bench is told. marks: of metrics."""
    return {"device": device, "say": log.info, "made": folder.moment(device), "metrics": marks}


def feature_spaces(features: FeatureName | FeatureNames | None) -> list[FeatureName]:
    """Those that are asked for, as they lie here; that of Shapes unless there are some."""
    asked = [CLIP] if features is None else [features] if isinstance(features, FeatureName) else features
    return [name if isinstance(name, torch.nn.Module) else resources.locate(name) or name for name in asked]


def _own_scales(opened: Sequence[Opened]) -> tuple[float, ...]:
    """Without guidance, and at the scales that students were trained for."""
    return tuple(dict.fromkeys((1.0, *(o.guidance for o in opened if o.guidance is not None))))
