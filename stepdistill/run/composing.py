"""A bench of a student under other people's LoRAs."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import resources
from ..errors import RequestError
from ..evaluation.compose import SAMPLES, SCALES, bench_composed, check_composed
from ..evaluation.own import PROMPTS
from ..evaluation.reference import ShapesSource
from ..evaluation.report import Results
from ..evaluation.space import FeatureName, FeatureNames
from ..export import read_settings
from ..export.folder import is_export
from ..models.families import stock_prompts
from ..models.sources import FusedLora
from ..recipe.plugins import Folder
from ..training import launched
from . import folder
from .benching import common, feature_spaces
from .sources import marked
from .targets import open_target, ships, teachers
from .teacher_checks import quantization
from .telling import log

CAPTIONS = 8                                       # of Shapes


def compose(targets: Sequence[str | Path], loras: Sequence[str | Path], *, scales: Sequence[float] | None,
            samples: int | None, out: str | Path, features: FeatureName | FeatureNames | None,
            prompts: Sequence[str] | None, metrics: Sequence[str], plugins: str | Path | None,
            unused: Mapping[str, Any], **told: Any) -> Results:
    """`stepdistill.bench` of the one student among `targets` under other LoRAs, beside its teacher. unused: options
    that this has no use for. told: the rest of `evaluation.compose.bench_composed`'s.

    RequestError, before anything is loaded, for a target that has no LoRA to lay others beside, for LoRAs that are not
    to be had, and for a bench that cannot be.
    """
    if wrong := [name.replace("_", "-") for name, value in unused.items() if value]:
        raise RequestError("a bench under other LoRAs is of a student in its own steps, against its own teacher: leave "
                           f"--{wrong[0]} out")
    if len(targets) != 1:
        raise RequestError(f"a bench under other LoRAs is of one student at a time; found {len(targets)} targets")
    _must_have_lora(targets[0])
    styles = [FusedLora(str(resources.locate(lora) or lora)) for lora in loras]
    scales, samples = SCALES if scales is None else scales, SAMPLES if samples is None else samples
    asked = None if features is None else feature_spaces(features)
    check_composed(styles, scales, PROMPTS if prompts is None else prompts, samples, asked)
    outside = None if plugins is None else Folder.open(plugins)
    marks = marked(metrics, outside, device := launched())
    opened = open_target(targets[0], Path(targets[0]).resolve().name, say=log.info, plugins=outside)
    if stock_prompts(opened.target.pipeline).gives == "frames":
        raise RequestError(f"{opened.target.name} makes videos, and a style is looked at in pictures")
    beside = teachers([opened], log.info)
    if not beside:
        raise RequestError(f"the teacher of {opened.target.name} cannot be loaded, and a style is measured on it "
                           "too: put it back")
    for pipeline in (opened.target.pipeline, beside[0].pipeline):
        pipeline.to(device)
    if prompts is None and ships(opened):
        prompts = ShapesSource().prompts(CAPTIONS)
    spaces = feature_spaces(None) if asked is None and ships(opened) else asked
    return bench_composed(opened.target, beside[0], styles, Path(out), scales=scales, prompts=prompts,
                          trained=1.0 if opened.guidance is None else opened.guidance, samples=samples,
                          features=spaces, **common(device, marks), **told)


def _must_have_lora(name: str | Path) -> None:
    """RequestError for what is no student, and for one that was trained in full, before it is loaded."""
    place, found, packed = resources.locate(name), "no student", None
    if place is not None and folder.is_run(place):
        recipe = folder.recipe_of(place)
        found = (None if recipe.student.lora is not None else "a run that trained a solver" if recipe.trains_solver
                 else "a run that trained all its weights")
        packed = quantization(recipe)
    elif place is not None and is_export(place):
        settings = read_settings(place)
        found = "a whole pipeline" if settings["format"] == "pipeline" else None
        packed = settings.get("quantization")
    if found is None and packed is None:
        return
    if found is None:
        raise RequestError(f"the base of {name} is quantised ({packed}): LoRAs lie beside its weights there, and no "
                           "other is laid on a student's. Name a student of a base that is not")
    raise RequestError(f"{name} is {found}, and a bench under other LoRAs asks whether a distilled LoRA goes with "
                       "them: name a run with `student: {lora: …}`, or its export")
