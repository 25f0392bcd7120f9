"""A bench of one's own model: against the teacher's own pictures from the same noise, where no set of real pictures is
to be had.

A Fréchet distance would want thousands of pictures of what the teacher was trained on; this wants a few prompts.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import parallel
from ..errors import RequestError
from ..files.lock import cleared
from ..models.stock import FRAMES, some_frames
from .estimate import Estimate, mean_of
from .features import Features, load_features
from .means import clip_score, diversity, of_prompts
from .metrics import Means
from .motion import displacement, in_words, of_videos
from .page import write_own_report
from .plans import Plan, Target, latency, plans
from .progress import meter
from .protocol import fingerprint
from .report import Results, picture_name, write_results
from .sheets import sheet
from .space import FeatureNames, figures

STEPS, COARSE, SHOWN, BATCH, CALLS = 25, 32, 6, 4, 2
PROMPTS = ("a portrait of an old fisherman, natural light", "a red bicycle leaning on a white wall",
           "a bowl of ramen, studio photo",
           "a watercolor of a harbour at dawn", "two cats asleep on a blue sofa",
           "an astronaut walking through a forest",
           "a street in Tokyo at night in the rain", "a glass chess set, macro photo")


def bench_own(targets: Sequence[Target], teacher: Target, nfe: Sequence[int], out: Path, *, guidance: Sequence[float],
              solvers: Sequence[str], seed: int = 0, prompts: Sequence[str] | None = None, samples: int = 16,
              features: FeatureNames | None = None, device: str | torch.device = "cpu",
              say: Callable[[str], None] = print, made: Mapping[str, Any] | None = None,
              metrics: Mapping[str, str] | None = None) -> Results:
    """Measures every target at every count of network evaluations, and writes results.json, report.html and samples/.

    samples: pictures a row, those of one prompt after another's. features: those of `load_features`, a single one;
    None: no CLIP score, and diversity in pixels. The teacher's own picture is drawn in 25 steps at the last of
    `guidance`. A distance to it says how far a student follows the teacher from noise to picture, as trajectory and
    consistency methods teach it; those that match distributions need not. metrics: of plugins, name -> what changes
    with its code. RequestError where none of `nfe` can be met, and where another process writes there.
    """
    texts = list(PROMPTS if prompts is None else prompts)
    if samples < 2 or not texts:
        raise RequestError("a bench against the teacher's own pictures takes a prompt and at least 2 samples; "
                           f"found {len(texts)} and {samples}")
    if features is not None and len(features) != 1:
        raise RequestError("a bench against the teacher's own pictures reads one kind of features; found "
                           f"{len(features)}: name one, or a `reference` of real pictures")
    with parallel.held_by_first(cleared(out)):
        best = teacher_plan(teacher, guidance[-1], solvers, say)
        rows = [best, *(plan for target in targets for plan in plans(target, nfe, guidance, solvers, say))]
        space = None if features is None else load_features(*features, device)
        return _measured(rows, texts, samples, seed, space, out, made or {}, metrics or {}, say)


def _measured(rows: Sequence[Plan], texts: Sequence[str], samples: int, seed: int, space: Features | None, out: Path,
              made: Mapping[str, Any],
              metrics: Mapping[str, str], say: Callable[[str], None]) -> Results:
    """The results of these rows, of which the first is the teacher at its ease, once they are on the disk. Ranks share
    the pictures, and the first one writes."""
    best, asked = rows[0], [texts[i % len(texts)] for i in range(samples)]
    means = [Means(metrics) for _ in rows]
    seen = drawn(rows, asked, seed, space, means)
    measured = [_row(plan, found, asked, texts, seed, space) | {"made": {**made, **plan.target.made}}
                for plan, found in zip(rows, seen, strict=True)]
    for row, plan, own in zip(measured, rows, means, strict=True):
        row["metrics"] |= own.figures(plan.target.prompted)
    for row, found in zip(measured, seen, strict=True):
        row["metrics"] |= of_videos(found, seen[0], len(texts), seed) if "moved" in found else {}
    in_space = f"pixels of {COARSE} x {COARSE}" if space is None else space.name
    protocol = {"reference": f"the teacher's own pictures, {best.name}, {best.steps} steps, w = {best.guidance:g}",
                "samples": samples, "seed": seed,
                "prompts": list(texts), "features": None if space is None else space.name,
                "diversity": f"mean distance in {in_space}"} | ({"metrics": dict(metrics)} if metrics else {})
    words = list(in_words(measured))
    results: Results = ({"protocol": {"id": fingerprint(protocol), **protocol}, "rows": measured}
                        | ({"words": words} if words else {}))
    for sentence in words:
        say(sentence)
    if parallel.rank() == 0:
        _write(results, rows, seen, out)
    return results


def _write(results: Results, rows: Sequence[Plan], seen: Sequence[Mapping[str, Tensor]], out: Path) -> None:
    shown = [found["shown"][:FRAMES if "moved" in found else SHOWN] for found in seen]
    for row, pictures in zip(results["rows"], shown, strict=True):
        sheet([pictures], out / "samples" / picture_name(row))
    together = sheet(shown, out / "samples" / "together.png", [f"{plan.name}, {plan.nfe} NFE" for plan in rows])
    write_results(results, out)
    write_own_report(results, together, out)


def teacher_plan(teacher: Target, w: float, solvers: Sequence[str], say: Callable[[str], None]) -> Plan:
    """The teacher in STEPS steps of the first solver that its pipeline takes, DPM-Solver++ before others."""
    order = sorted(solvers, key=lambda name: name != "dpmpp_2m")
    found = [plan for plan in plans(teacher, (STEPS, 2 * STEPS), (w,), order, say) if plan.steps == STEPS]
    if not found:
        raise RequestError(f"{teacher.name} cannot be drawn of in {STEPS} steps of {', '.join(solvers)}: name another "
                           "of --solvers")
    return min(found, key=lambda plan: order.index(plan.name.partition(":")[2]))


def drawn(rows: Sequence[Plan], asked: Sequence[str], seed: int, space: Features | None,
          means: Sequence[Means]) -> list[dict[str, Tensor]]:
    """What is kept of each row's pictures: squared distances to those of the first row (n,), the pictures coarse (n, D)
    or their features, and the first ones whole; of videos the features (n, F, D) of some frames, how far they move
    (n,), and some frames of the first. Batches go through all rows, so that no more than a batch is held; ranks share
    them."""
    found: list[list[dict[str, Tensor]]] = []              # of each batch, of each row
    with meter(parallel.rank() == 0) as report:
        for ids in parallel.share(torch.arange(len(asked)).split(BATCH)):
            found.append(_of_batch(rows, [asked[i] for i in ids.tolist()], ids, seed, space, means))
            report("images of each row", int(ids[-1]) + 1, len(asked))
    whole = parallel.dealt(found)
    for mean in means:
        mean.join()
    return [{name: torch.cat([part[name] for part in parts if name in part]) for name in parts[0]}
            for parts in zip(*whole, strict=True)]


def _of_batch(rows: Sequence[Plan], asked: Sequence[str], ids: Tensor, seed: int, space: Features | None,
              means: Sequence[Means]) -> list[dict[str, Tensor]]:
    batch, kept = [plan.images(asked, ids, seed) for plan in rows], []
    for plan, mean, pixels in zip(rows, means, batch, strict=True):
        plan.check_finite(int((~pixels.isfinite().flatten(1).all(1)).sum()), len(pixels))
        mean.add(pixels, asked if plan.target.prompted else None)
        own = {"apart": ((pixels - batch[0]) / 2).square().flatten(1).mean(1), "seen": _seen(pixels, space)}
        if pixels.ndim == 5:
            own["moved"] = displacement(pixels)
        if ids[0] < (SHOWN if pixels.ndim == 4 else 1):
            own["shown"] = pixels if pixels.ndim == 4 else some_frames(pixels)[0]
        kept.append(own)
    return kept


def _seen(pixels: Tensor, space: Features | None) -> Tensor:
    if pixels.ndim == 5:
        frames = some_frames(pixels)
        return _seen(frames.flatten(0, 1), space).unflatten(0, frames.shape[:2])
    return (F.adaptive_avg_pool2d(pixels / 2, COARSE).flatten(1) / (3 * COARSE**2) ** 0.5 if space is None
            else space.images(pixels))


def _row(plan: Plan, found: Mapping[str, Tensor], asked: Sequence[str], texts: Sequence[str], seed: int,
         space: Features | None) -> dict[str, Any]:
    """A row of results.json."""
    taken = latency(plan, asked, seed, CALLS)
    return {"target": plan.name, "method": plan.target.method, "nfe": plan.nfe, "steps": plan.steps,
            "guidance": plan.guidance, "samples": len(asked), "seed": seed,
            "metrics": looks(plan, found, asked, texts, space), "latency_ms": taken, "images_per_s": 1000 / taken}


def looks(plan: Plan, found: Mapping[str, Tensor], asked: Sequence[str], texts: Sequence[str],
          space: Features | None) -> dict[str, float | None]:
    """The figures of what `drawn` kept of a row. to_teacher: root mean square over pixels in [0, 1]; None of the
    teacher's own pictures."""
    several = [group for group in of_prompts(found["seen"], len(texts)) if len(group) > 1]
    text = None if space is None or not plan.target.prompted else space.texts(list(asked))
    squared = mean_of(found["apart"])
    apart = (Estimate(*(max(end, 0.0) ** 0.5 for end in (squared.value, squared.low, squared.high)))
             if squared.value else None)
    metrics = figures("to_teacher", apart) | figures("clip_score", None if text is None
                                                     else clip_score(found["seen"], text))
    return metrics | figures("diversity", diversity(several) if several else None)
