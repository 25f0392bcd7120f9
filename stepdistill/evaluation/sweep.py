"""The NFE sweep: rows of a table, each a call of a stock pipeline, all from the same noise and the same prompts."""
from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .. import parallel
from ..data.shapes import attributes_of
from ..errors import RequestError
from ..files.lock import cleared
from ..models.reading import resized
from ..models.stock import say_cut
from .counting import counted
from .estimate import share_of
from .fd import too_few
from .features import dimensions
from .means import clip_score, diversity
from .metrics import Means
from .plans import SOLVERS, Plan, Target, latency, plans
from .progress import meter
from .protocol import Protocol, fingerprint
from .reference import Source, load_source
from .report import Results, in_words, join, picture_name, read_results, row_key, write_report, write_results
from .sheets import sheet
from .space import FeatureNames, Space, figures
from .unfinished import Unfinished

EACH = 4                  # samples of a prompt behind the figure `diversity`
SHOWN = 10                # samples of a row in the report
LEAST = 10                # samples and pictures behind any figure


def admitted(samples: int, prompts: Sequence[str] | None, features: FeatureNames, reference: Path | str) -> Source:
    """The reference. RequestError for what could not be measured, known before anything is loaded or drawn."""
    for name in features:
        dimensions(name)
    source = load_source(reference, samples)
    if min(samples, source.count) < LEAST:
        raise RequestError(f"{samples} samples against {source.count} pictures of {source.name} are too few for "
                           f"any figure: at least {LEAST} of each, and 2,000 samples for narrow intervals")
    if prompts is not None and not prompts:
        raise RequestError("the list of prompts is empty")
    if prompts is None:
        source.prompts(1)
    return source


class Evaluation:
    """All that rows have in common: features, reference, prompts and seed. Made once, used for many rows."""

    def __init__(self, samples: int, seed: int = 0, prompts: Sequence[str] | None = None,
                 features: FeatureNames = ("assets/shapes-clip",), reference: Path | str = "shapes",
                 device: str | torch.device = "cpu", say: Callable[[str], None] = print,
                 made: Mapping[str, Any] | None = None, metrics: Mapping[str, str] | None = None) -> None:
        """features: of the first one all figures are taken, of the others distances. made: what every row says of the
        machine and the moment. metrics: those of plugins, name -> what changes with its code."""
        self.made, self.metrics = dict(made or {}), dict(metrics or {})
        self.source = admitted(samples, prompts, features, reference)
        self.spaces = [Space.load(name, self.source, device, say) for name in features]
        self.features, self.reference = self.spaces[0].features, self.spaces[0].reference
        for space in self.spaces:
            if reason := too_few(samples, space.reference.whole.count, space.features.dim):
                say(f"{reason}: in {space.features.name} there is none, and KID, which is right at any count, "
                    "stands for it")
        asked = self.source.prompts(samples) if prompts is None else list(prompts)
        self.prompts = [asked[i % len(asked)] for i in range(samples)]
        self.own_prompts = prompts is not None
        self.seed, self.samples = seed, samples
        self.texts = self.features.texts(self.prompts)
        self.attributes = _attributes(self.prompts) if self.features.attribute_classifier else None
        classifier = self.features.attribute_classifier
        self.protocol = Protocol(self.features.name, self.features.dim, classifier and classifier.id[:12],
                                 self.source.name,
                                 self.features.resize, "float32", fingerprint(self.prompts), samples, seed,
                                 also=tuple(space.features.name for space in self.spaces[1:]), metrics=self.metrics)

    @property
    def groups(self) -> int:
        """Prompts that are sampled EACH times."""
        return max(1, self.samples // 40)

    def measure(self, images: Sequence[Tensor], alike: Tensor | None, captioned: bool, means: Means) -> dict[str, Any]:
        """`metrics` of a row of results.json, and `also`, those in further features, where there are some.

        images: features (n, D) of each space, in the order of the prompts; alike: (groups, EACH, D) of the first one.
        captioned: whether the pictures were made for the prompts; without it nothing is said about text. means: of the
        metrics of plugins.
        """
        metrics = self.spaces[0].distances(images[0], self.seed)
        score = clip_score(images[0], self.texts) if captioned and self.texts is not None else None
        metrics |= figures("clip_score", score) | figures("diversity", None if alike is None else diversity(alike))
        right = None
        if captioned and self.attributes is not None:
            seen = self.features.attribute_classifier(images[0])
            right = share_of((seen == self.attributes).all(1).double().mean().item(), len(seen))
        also = {space.features.name: space.distances(own, self.seed)
                for space, own in zip(self.spaces[1:], images[1:], strict=True)}
        return ({"metrics": metrics | figures("all_attributes", right) | means.figures(captioned)}
                | ({"also": also} if also else {}))

    def real(self) -> tuple[dict[str, Any], Tensor]:
        """The row of fresh real pictures against the reference, and some of them."""
        found, shown, means, captioned = [], torch.empty(0), Means(self.metrics), not self.own_prompts
        for block in self.source.real(self.samples):     # features are kept, and of the pictures the first ones
            means.add(block, self.prompts[means.count:means.count + len(block)] if captioned else None)
            found.append(self.seen(block))
            if len(shown) < SHOWN:                       # pictures of a folder differ in size
                block = resized(block, min((shown if len(shown) else block).shape[-2:]))
                shown = torch.cat([shown, block])[:SHOWN].clone() if len(shown) else block[:SHOWN].clone()
        again = None if self.own_prompts else self.source.alike(self.groups, EACH)
        alike = None if again is None else torch.cat([self.features.images(block)
                                                      for block in again]).unflatten(0, (-1, EACH))
        images = list(map(torch.cat, zip(*found, strict=True)))
        row = {"target": "real", "method": None, "nfe": 0, "steps": 0, "guidance": None, "samples": self.samples,
               "seed": self.seed,
               **self.measure(images, alike, captioned, means), "latency_ms": None,
               "images_per_s": None, "made": self.made}
        return row, shown

    def seen(self, pixels: Tensor) -> list[Tensor]:
        """Features of a batch in each space."""
        return [space.features.images(pixels) for space in self.spaces]

    def row(self, plan: Plan, batch: int = 100,
            on_images: Callable[[int], None] = lambda count: None) -> tuple[dict[str, Any], Tensor]:
        """One row of results.json, and its first pictures, (SHOWN, 3, H, W). on_images hears how many were drawn so
        far."""
        features, shown, seconds, broken, means = [], None, 0.0, 0, Means(self.metrics)
        with counted(*plan.networks) as evaluations:
            for ids, prompts in self._calls(batch):
                begin = time.perf_counter()
                pixels = plan.images(prompts, ids, self.seed)
                seconds += time.perf_counter() - begin
                shown = pixels[:SHOWN] if shown is None else shown
                broken += int((~pixels.isfinite().flatten(1).all(1)).sum())
                features.append(self.seen(pixels))
                # of the prompts once over; broken pictures end in an error
                own = 0 if broken else self.samples - means.count
                means.add(pixels[:own], prompts[:own] if plan.target.prompted else None)
                on_images(int(ids[-1]) + 1)
        found = list(map(torch.cat, zip(*features, strict=True)))
        drawn = len(found[0])
        plan.check_finite(broken, drawn)
        plan.check_count(evaluations[0], drawn)
        images, others = ([own[: self.samples] for own in found],
                          found[0][self.samples:].unflatten(0, (self.groups, EACH - 1)))
        alike = torch.cat([images[0][: self.groups, None], others], 1)
        return {"target": plan.name, "method": plan.target.method, "nfe": plan.nfe, "steps": plan.steps,
                "guidance": plan.guidance,
                "samples": self.samples, "seed": self.seed,
                **self.measure(images, alike, plan.target.prompted, means),
                "latency_ms": latency(plan, self.prompts, self.seed), "images_per_s": drawn / seconds,
                "made": {**self.made, **plan.target.made, **plan.counts(evaluations[0] / drawn)}}, shown

    @property
    def images_per_row(self) -> int:
        return self.samples + self.groups * (EACH - 1)

    def _calls(self, batch: int) -> Iterator[tuple[Tensor, list[str]]]:
        """(ids, prompts) of every sample, in batches: one of each prompt, then EACH - 1 more of the first ones."""
        prompts = self.prompts + [prompt for prompt in self.prompts[: self.groups] for _ in range(EACH - 1)]
        for ids in torch.arange(len(prompts)).split(batch):
            yield ids, [prompts[i] for i in ids.tolist()]


def bench(targets: Sequence[Target], nfe: Sequence[int], samples: int, out: Path | str,
          guidance: Sequence[float] = (2.0,),
          solvers: Sequence[str] = tuple(SOLVERS), seed: int = 0, prompts: Sequence[str] | None = None,
          features: FeatureNames = ("assets/shapes-clip",), reference: Path | str = "shapes",
          reuse: Sequence[Path | str] = (),
          batch: int = 100, device: str | torch.device = "cpu", say: Callable[[str], None] = print,
          made: Mapping[str, Any] | None = None, metrics: Mapping[str, str] | None = None) -> Results:
    """Measures every target at every count of network evaluations, and writes results.json, curve.png and report.html.

    reuse: earlier results.json of the same protocol; their rows are taken over and not measured again, without their
    timings, which belong to another machine. An `out` that holds results of the same protocol is added to; a bench that
    was stopped goes on there with the rows that it lacks. metrics: of plugins, as of `Evaluation`. Several ranks share
    the rows, and the first one writes. RequestError where another process writes there.
    """
    out = Path(out)
    if not nfe or min(nfe) < 1:
        raise RequestError(f"nfe={list(nfe)}: at least one count of network evaluations, each 1 or more")
    if len({target.name for target in targets}) < len(targets):
        raise RequestError(f"targets need different names, found {[target.name for target in targets]}")
    if prompts is None and not any(target.prompted for target in targets):
        prompts = [""]                                 # none of them is told any
    with parallel.held_by_first(cleared(out)):
        rows = [plan for target in targets for plan in plans(target, nfe, guidance, solvers, say)]
        context = Evaluation(samples, seed, prompts, features, reference, device, say, made, metrics)
        for target in targets:
            say_cut(type(target.pipeline), target.pipeline.components, context.prompts,
                    {**target.given, **(target.call or {})}, say)
        results: Results = {"protocol": context.protocol.record(), "rows": []}
        if (out / "results.json").exists():
            results = join(results, read_results(out / "results.json"), out)
        results = join(results, taken := _taken(results, [Path(file) for file in reuse]))
        begun = Unfinished.of(out, context.protocol.id, targets, results)
        parallel.barrier()                             # every rank has read what is there
        known = {row_key(row) for row in taken["rows"]} | begun.measured
        results = _measured(context, [plan for plan in rows if plan.key not in known], results, out, batch, begun, say)
        if parallel.rank() == 0:
            write_results(results, out)
            write_report(results, out)
            begun.end()
    return results


def _measured(context: Evaluation, rows: Sequence[Plan], results: Results, out: Path, batch: int, begun: Unfinished,
              say: Callable[[str], None]) -> Results:
    """The results with these rows, each kept on disk when it is there."""
    with meter(parallel.rank() == 0) as report:
        each = context.images_per_row
        after = lambda i: lambda count: report("images of all rows", i * each + count, len(rows) * each)
        if ("real", 0, None) not in {row_key(row) for row in results["rows"]}:
            say(f"real pictures: {context.samples:,} fresh ones of {context.source.name}")
            results = _keep(results, *context.real(), out)
        for first in range(0, len(rows), parallel.world_size()):
            together = rows[first:first + parallel.world_size()]
            own = [context.row(plan, batch, after(first)) for plan in parallel.share(together)]
            for i, (row, shown) in enumerate(parallel.dealt(own), first):
                say(f"row {i + 1} of {len(rows)}: {in_words(row)}")
                results = _keep(results, row, shown, out)
                if parallel.rank() == 0:
                    begun.add(rows[i])
    return results


def _taken(results: Results, files: Sequence[Path]) -> Results:
    """The rows of earlier results, without timings."""
    taken: Results = {"protocol": results["protocol"], "rows": []}
    for file in files:
        earlier = read_results(file)
        stripped = [row | {"latency_ms": None, "images_per_s": None} for row in earlier["rows"]]
        taken = join(taken, {"protocol": earlier["protocol"], "rows": stripped}, file)
    return taken


def _keep(results: Results, row: dict[str, Any], shown: Tensor, out: Path) -> Results:
    """Adds a row and saves, so that a stopped bench loses the rows at work and no others."""
    results = join(results, {"protocol": results["protocol"], "rows": [row]})
    if parallel.rank() == 0:
        sheet([shown], out / "samples" / picture_name(row))
        write_results(results, out)
    return results


def _attributes(prompts: Sequence[str]) -> Tensor | None:
    """(n, 7) int64, or None if some prompt is no caption of Shapes."""
    asked = [attributes_of(prompt) for prompt in prompts]
    return None if any(slots is None for slots in asked) else torch.stack(asked)
