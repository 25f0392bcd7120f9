"""Does a distilled LoRA go with others? The base, the student, a style on the base and a style on the student, from the
same noise."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import parallel
from ..errors import RequestError
from ..files.lock import cleared
from ..models.fused import ADAPTER, load_lora
from ..models.sources import LORA_FILE, FusedLora
from .estimate import Estimate, mean_of
from .features import Features, load_features
from .metrics import Means
from .own import COARSE, PROMPTS, drawn, looks, teacher_plan
from .page import Drawing, write_composed_report
from .plans import Plan, Target, at_guidance, evaluations
from .protocol import fingerprint
from .report import Results, write_results
from .sheets import sheet
from .space import FeatureNames
from .style import Worn, differ, distance, kept, verdict

SCALES, SAMPLES, SHOWN = (0.5, 0.75, 1.0), 64, 3
Seen = Mapping[str, Tensor]                        # of a row, as `drawn` keeps it


@dataclass(frozen=True)
class Composition:
    """What all rows have in common. rows: the base in many steps and then the student, a row for each guidance
    scale."""

    rows: Sequence[Plan]
    texts: Sequence[str]
    samples: int
    seed: int
    space: Features | None
    metrics: Mapping[str, str]
    made: Mapping[str, Any]

    @property
    def asked(self) -> list[str]:
        return [self.texts[i % len(self.texts)] for i in range(self.samples)]

    @property
    def named(self) -> str:
        """The space that features lie in."""
        return f"pixels of {COARSE} x {COARSE}" if self.space is None else self.space.name

    @cached_property
    def told(self) -> Tensor | None:
        """Features of the prompts, where there are some."""
        return None if self.space is None or not self.rows[0].target.prompted else self.space.texts(self.asked)

    def draw(self, worn: str) -> tuple[list[Seen], list[dict[str, Any]]]:
        """What is kept of each row's pictures, and the rows of results.json. worn: what is added to their names."""
        means = [Means(self.metrics) for _ in self.rows]
        seen = drawn(self.rows, self.asked, self.seed, self.space, means)
        return seen, [self._row(*one, worn) for one in zip(self.rows, seen, means, strict=True)]

    def _row(self, plan: Plan, found: Seen, mean: Means, worn: str) -> dict[str, Any]:
        metrics = looks(plan, found, self.asked, self.texts, self.space) | mean.figures(plan.target.prompted)
        return {"target": plan.name + worn, "method": plan.target.method, "nfe": plan.nfe, "steps": plan.steps,
                "guidance": plan.guidance, "samples": self.samples, "seed": self.seed, "metrics": metrics,
                "latency_ms": None, "images_per_s": None, "made": {**self.made, **plan.target.made}}

    def compared(self, scale: float, bare: Sequence[Seen], styled: Sequence[Seen], row: int) -> Worn:
        """The student's `row` under a style beside the base under it. bare: the rows without it."""
        (base, base_with), (student, student_with) = ((bare[i]["seen"], styled[i]["seen"]) for i in (0, row))
        count = len(self.texts)
        return Worn(scale, kept(base, base_with, student, student_with), differ(student_with, base_with, count),
                    self._followed(student_with, base_with), distance(student_with, base_with, count, self.seed))

    def _followed(self, ours: Tensor, theirs: Tensor) -> Estimate | None:
        if self.told is None:
            return None
        score = lambda images: 100 * F.cosine_similarity(images, self.told).clamp(min=0)
        return mean_of(score(ours) - score(theirs))


def bench_composed(student: Target, base: Target, styles: Sequence[FusedLora], out: Path, *, trained: float,
                   solvers: Sequence[str], scales: Sequence[float] = SCALES, guidance: Sequence[float] | None = None,
                   seed: int = 0, prompts: Sequence[str] | None = None, samples: int = SAMPLES,
                   features: FeatureNames | None = None, device: str | torch.device = "cpu",
                   say: Callable[[str], None] = print, made: Mapping[str, Any] | None = None,
                   metrics: Mapping[str, str] | None = None) -> Results:
    """Measures each style LoRA on the base and on the student, and writes results.json, report.html and samples/.

    The base is drawn in 25 steps at the scale `trained`, which the student was trained for; the student as it is
    called, and at `guidance`, its own and 1 unless given. samples: pictures a row, which go through the prompts again
    and again. features: those of `load_features`, a single one; None: of coarse pixels. RequestError, before anything
    is drawn, for a LoRA that does not fit and for guidance that the student cannot take.
    """
    texts = list(PROMPTS if prompts is None else prompts)
    check_composed(styles, scales, texts, samples, features)
    called = [_called(student, w, say) for w in _scales(student, guidance)]
    pipelines = base.pipeline, student.pipeline
    for style in styles:
        with _worn(pipelines, style):
            say(f"{name_of(style)} fits")
    with parallel.held_by_first(cleared(out)):
        rows = [teacher_plan(base, trained, solvers, say), *(replace(plan, nfe=evaluations(plan)) for plan in called)]
        space = None if features is None else load_features(*features, device)
        common = Composition(rows, texts, samples, seed, space, metrics or {}, made or {})
        return _written(common, styles, sorted(scales), out, say)


def name_of(style: FusedLora) -> str:
    """What tables call a LoRA: its file's name, or its folder's."""
    path = Path(style.path)
    return path.parent.name if path.name == LORA_FILE and path.parent.name else path.name.removesuffix(".safetensors")


def check_composed(styles: Sequence[FusedLora], scales: Sequence[float], texts: Sequence[str], samples: int,
                   features: FeatureNames | None) -> None:
    """RequestError for a composition that cannot be: LoRAs that are not to be had or not told apart, too few samples.
    The rest as `bench_composed`."""
    for style in styles:
        try:
            style.file()
        except OSError as error:
            raise RequestError(f"the LoRA {style.path} cannot be had: {error}") from error
    names = [name_of(style) for style in styles]
    if len({*names}) < len(names):
        raise RequestError(f"LoRAs are told apart by their names; found {', '.join(names)}: rename a file or "
                           "its folder")
    if not scales or not all(0 < scale < float("inf") for scale in scales) or len({*scales}) < len(scales):
        raise RequestError("the scales of a style are different numbers above 0, such as 0.5, 0.75, 1; found "
                           f"{', '.join(f'{s:g}' for s in scales)}")
    if not texts or samples < max(3, 2 * len(texts)):
        raise RequestError(f"a composition takes at least 3 samples, and 2 of each prompt; found {samples} of "
                           f"{len(texts)} prompts")
    if features is not None and len(features) != 1:
        raise RequestError(f"a composition is looked at in one kind of features; found {len(features)}: name one")


def _scales(student: Target, guidance: Sequence[float] | None) -> list[float]:
    """Those that are asked for; else the student's own and 1, which a network that reads its scale has not learned."""
    own = student.guidance.scale(student.call)
    return list(dict.fromkeys((own, *(() if student.guidance.within else (1.0,))) if guidance is None
                              else map(float, guidance)))


def _called(student: Target, w: float, say: Callable[[str], None]) -> Plan:
    """A call of the student at this guidance scale. RequestError where it takes none."""
    call, own = dict(student.call), student.guidance.scale(student.call)
    if w != own:
        call |= at_guidance(student, w, say)
    return Plan(student, student.name, student.pipeline.scheduler, {**student.given, **call}, 0,
                call["num_inference_steps"], w)


@contextmanager
def _worn(pipelines: Sequence[Any], style: FusedLora) -> Iterator[None]:
    """These pipelines with the LoRA on them. RequestError where it does not fit."""
    try:
        for pipeline in pipelines:
            load_lora(pipeline, style)
        yield
    finally:
        for pipeline in pipelines:
            pipeline.unload_lora_weights()


def _written(common: Composition, styles: Sequence[FusedLora], scales: Sequence[float], out: Path,
             say: Callable[[str], None]) -> Results:
    say(f"{len(common.asked)} pictures each of {', '.join(f'{plan.name}, {plan.nfe} NFE' for plan in common.rows)}, "
        "without a style first")
    bare, rows = common.draw("")
    composed: list[dict[str, Any]] = []
    grids: list[tuple[str, list[list[Seen]]]] = []         # of each style its name and columns
    pipelines = [plan.target.pipeline for plan in common.rows[:2]]
    for style in styles:
        name, styled = name_of(style), []
        with _worn(pipelines, style):
            for scale in scales:
                say(f"{name} at {scale:g}")
                for pipeline in pipelines:
                    pipeline.set_adapters([ADAPTER], adapter_weights=[scale])
                seen, more = common.draw(f" + {name} at {scale:g}")
                styled.append(seen)
                rows += more
        composed += [_composed(common, name, scales, bare, styled, row) for row in range(1, len(common.rows))]
        grids.append((name, [bare, *styled]))
    for one in composed:
        say(f"{one['lora']} at w = {one['guidance']:g}: {one['verdict']}")
    results: Results = {"protocol": _protocol(common), "rows": rows, "compose": composed}
    if parallel.rank() == 0:
        write_results(results, out)
        write_composed_report(results, [_drawing(common, *grid, scales, out) for grid in grids], out)
    return results


def _drawing(common: Composition, name: str, columns: Sequence[Sequence[Seen]], scales: Sequence[float],
             out: Path) -> Drawing:
    words = f"{name}: a column without it and at {', '.join(f'{scale:g}' for scale in scales)}, from the same noise"
    return Drawing(words, _grid(common, columns, out / "samples" / f"{name}.png"))


def _composed(common: Composition, name: str, scales: Sequence[float], bare: Sequence[Seen],
              styled: Sequence[Sequence[Seen]], row: int) -> dict[str, Any]:
    """An entry of `compose` of results.json."""
    worn = [common.compared(scale, bare, seen, row) for scale, seen in zip(scales, styled, strict=True)]
    plain = differ(bare[row]["seen"], bare[0]["seen"], len(common.texts))
    return {"lora": name, "guidance": common.rows[row].guidance, "scales": [one.plain for one in worn],
            "verdict": verdict(worn, plain, common.named)}


def _protocol(common: Composition) -> dict[str, Any]:
    best = common.rows[0]
    protocol = {"reference": f"the teacher under the same LoRA, {best.name}, {best.steps} steps, w = {best.guidance:g}",
                "samples": common.samples, "seed": common.seed, "prompts": list(common.texts),
                "features": None if common.space is None else common.space.name,
                "diversity": f"mean distance in {common.named}"}
    protocol |= {"metrics": dict(common.metrics)} if common.metrics else {}
    return {"id": fingerprint(protocol), **protocol}


def _grid(common: Composition, columns: Sequence[Sequence[Seen]], path: Path) -> bytes:
    """PNG: for each of the first samples a row for the base and one for each of the student's; a column for each
    scale."""
    samples = range(min(SHOWN, common.samples))
    rows = [torch.stack([column[i]["shown"][sample] for column in columns]) for sample in samples
            for i in range(len(common.rows))]
    captions = [f"{plan.name}, {plan.nfe} NFE, w = {plan.guidance:g}" for _ in samples for plan in common.rows]
    return sheet(rows, path, captions)
