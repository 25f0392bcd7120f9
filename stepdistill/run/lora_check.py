"""How a LoRA of anybody's is called best on a base: what it says, what is measured, and which of these is believed."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import resources
from ..data.cache import fingerprint
from ..errors import RequestError
from ..evaluation.features import load_features
from ..evaluation.own import PROMPTS, teacher_plan
from ..evaluation.plans import Target, plans
from ..evaluation.reference import ShapesSource, load_reference, load_source
from ..evaluation.reference import Source as Pictures
from ..evaluation.report import at_its_ease, read_results
from ..evaluation.space import FeatureName, shipped_reference
from ..export.student import UNKNOWN, Student
from ..export.write import may_write_new, write_found
from ..methods.base import Frozen, Trained
from ..models.given_lora import given_lora, wearing
from ..models.quantized import quantization_of
from ..models.roles import Weights, build_roles
from ..models.schedulers import StockCall
from ..models.sources import Source
from ..models.stock import defaults
from ..models.teacher import Teacher, load_teacher
from .few_step import FIRST, SCALES, STEPS, Found, Judge, Judged, Way, find_call, first_ways, gains, leaders, near_ways
from .foreign_lora import Claim, ForeignLora
from .reference import OwnPictures
from .sources import located

SOLVERS = ("dpmpp_2m", "euler", "ddim")            # of the base
REFERENCE = 1000                                   # pictures of the base
LEAST = 10                                         # pictures behind any figure


@dataclass(frozen=True)
class Checked:
    """What was found of a LoRA. base: what the base itself does in few evaluations; gains: the numbers of evaluations
    at which the LoRA is better; folder: where its contract was written."""

    lora: str
    base: str
    claim: Claim | None
    found: Found
    alone: tuple[Judged, ...]
    gains: tuple[int, ...]
    alpha_kept: bool
    reference: str
    folder: Path | None

    @property
    def way(self) -> Way:
        return self.found.believed.way

    @property
    def believed(self) -> str:
        """contract, metadata or measurement."""
        return ("measurement" if self.claim is None or self.found.believed is not self.found.claimed
                else self.claim.source)

    @property
    def plain(self) -> dict[str, Any]:
        """For JSON."""
        found = self.found
        return {"lora": self.lora, "base": self.base, "believed": self.believed, "best": found.believed.plain,
                "claimed": None if found.claimed is None else {"source": self.claim.source, **found.claimed.plain},
                "alpha": "in the file" if self.alpha_kept else "lost", "gains": list(self.gains),
                "reference": self.reference,
                "measured": [one.plain for one in found.last], "coarsely": [one.plain for one in found.second],
                "alone": [one.plain for one in self.alone], "folder": None if self.folder is None else str(self.folder)}

    @property
    def words(self) -> str:
        best, claimed = self.found.believed, self.found.claimed
        lines = [f"call it by {best.way}", f"believed: the {self.believed}. {_distance(best)} to {self.reference}"]
        if claimed is not None and claimed is not best:
            lines += [f"its {self.claim.source} and its tensors disagree: the {self.claim.source} says {claimed.way}, "
                      f"which is at {_distance(claimed)}, worse beyond chance"]
        if not self.alpha_kept and best.way.scale != 1:
            lines += [f"its alpha was lost: it counts {best.way.scale:g} times"]
        return "\n".join(lines + ([] if self.folder is None else [f"wrote {self.folder}"]))


def check_lora(path: str | Path, base: Source, *, out: str | Path | None, prompts: Sequence[str] | None, samples: int,
               seed: int, guidance: float | None, features: FeatureName | None, reference: str | Path | None,
               device: str | torch.device, say: Callable[[str], None]) -> Checked:
    """See `api.check`. base: as its user names it."""
    lora, named, base = ForeignLora.open(path), base, located(base)
    if samples < LEAST:
        raise RequestError(f"{samples} samples are too few for any figure: at least {LEAST}, and 2,000 for "
                           "narrow intervals")
    folder = None if out is None else Path(out)
    if folder is not None:
        may_write_new(folder)
    ships = Path(base.place).is_relative_to(resources.SHARE / "assets")
    if features is None and not ships:
        raise RequestError(f"{base} does not draw Shapes, whose features are the only ones that ship: name the "
                           "folder of a CLIPModel by --features")
    real = real_pictures(reference, ships)
    texts = prompts_of(real, ships, prompts, samples)
    extractor = resources.SHARE / "assets/shapes-clip" if features is None else features
    seen = load_features(extractor, device)
    check_worn(lora, base)
    teacher, weights = worn(lora, base, guidance, device)
    w, batch = good_guidance(teacher) if guidance is None else guidance, FIRST if ships else 4
    target = target_of(teacher)
    pictures = own_pictures(target, w, texts[1], seed, batch, say) if real is None else real
    against = load_reference(seen, pictures, shipped_reference(extractor), say)
    judge = Judge(target, seen, against, texts[0], seed, samples, batch, wearing(teacher.network, weights))
    claim, scales = lora.claim(teacher), sorted({*SCALES, *([] if lora.told_scale is None else [lora.told_scale])})
    found = find_call(first_ways(teacher, scales, guidance=w), judge, lambda way: near_ways(teacher, way, w), samples,
                      claim and claim.way, lambda way: replace(way, scale=0.0), lora.told_scale or 1.0, say)
    alone = _alone(judge, found, w, say)
    better = tuple(gains(found.second, alone))
    if not better:
        raise RequestError(_none_found(lora, base, found, alone))
    checked = Checked(lora.path, str(named), claim, found, tuple(alone), better, lora.has_alpha, words_of(pictures),
                      folder)
    if folder is not None:
        method = claim.method if claim is not None and checked.believed == "contract" else UNKNOWN
        write_found(student_of(teacher, weights, checked.way, method, named, judge.prompts[0]), folder, "float16"
                    if lora.half else "float32")
    return checked


def check_worn(lora: ForeignLora, base: Source) -> None:
    """RequestError, by configs alone, for a base whose pictures no LoRA's are held against, and where this one does not
    fit, with the base that would."""
    teacher = load_teacher(base, device="meta")
    if teacher.family.no_pipeline:
        raise RequestError(f"{base} is no pipeline of diffusers, and LoRAs are laid on the networks of these")
    if teacher.family.video is not None:
        raise RequestError(f"{base} makes videos, and a call is judged by features of pictures: its LoRAs are called "
                           "as whoever made them says")
    try:
        given_lora(teacher, str(lora.file))
    except RequestError as error:
        raise RequestError(f"{error}. {lora.made_for[0].upper()}{lora.made_for[1:]}") from error


def worn(lora: ForeignLora, base: Source, guidance: float | None, device: str | torch.device = "cpu") -> tuple[Teacher,
                                                                                                               Weights]:
    """The base, and the LoRA as an adapter of its network. RequestError for a base of few bits."""
    teacher = load_teacher(base, device=device, scale=guidance or 1.0)
    if (kind := quantization_of(teacher.network)) is not None:
        raise RequestError(f"the network of {base} is quantised ({kind}), and a LoRA's weight is sought by adding "
                           "it to plain weights: name the plain pipeline")
    teacher.loaded.set_progress_bar_config(disable=True)
    return teacher, given_lora(teacher, str(lora.file))


def good_guidance(teacher: Teacher) -> float:
    """The scale at which a base draws well: that of its best row in the results.json beside it, else its pipeline's
    default."""
    results = Path(teacher.source.place) / "results.json"
    row = at_its_ease(read_results(results)["rows"]) if results.is_file() else None
    if row is not None:
        return row["guidance"]
    return teacher.guidance.scale({name: value for name, value in defaults(teacher.cls).items() if value is not None})


def real_pictures(reference: str | Path | None, ships: bool) -> Pictures | None:
    """Against which calls are held: those named, else Shapes for what ships; None where the base's own stand for
    them."""
    if reference is None and not ships or str(reference) == "base":
        return None
    return load_source("shapes" if reference is None else reference, LEAST)


def prompts_of(real: Pictures | None, ships: bool, prompts: Sequence[str] | None,
               samples: int) -> tuple[list[str], list[str]]:
    """Those of the LoRA's pictures, and those of the base's, which are others where there is no end of them."""
    if prompts is not None and not prompts:
        raise RequestError("the list of prompts is empty")
    if prompts is None and real is not None:
        return real.prompts(samples), []
    if prompts is None and ships:
        texts = ShapesSource().prompts(max(samples, REFERENCE) + REFERENCE)
        return texts[:samples], texts[-REFERENCE:]
    return [*(prompts or PROMPTS)], [*(prompts or PROMPTS)]


def target_of(teacher: Teacher) -> Target:
    """The base, whose scheduler and call are those of the way that it is drawn by."""
    source = teacher.source
    return Target(Path(source.place).name, teacher.loaded, given=teacher.call, guided=source.guided,
                  identity=fingerprint(source.place))


def own_pictures(target: Target, w: float, prompts: Sequence[str], seed: int, batch: int,
                 say: Callable[[str], None]) -> OwnPictures:
    """The base's own at its ease, at the scale w."""
    return OwnPictures(teacher_plan(target, w, SOLVERS, say), tuple(prompts), REFERENCE, seed + 1, batch)


def words_of(pictures: Pictures) -> str:
    if isinstance(pictures, OwnPictures):
        plan = pictures.plan
        return f"{REFERENCE:,} of the base's own pictures, {plan.steps} steps at guidance {plan.guidance:g}"
    return f"{pictures.count:,} real pictures, {pictures.name}"


def _alone(judge: Judge, found: Found, w: float, say: Callable[[str], None]) -> list[Judged]:
    """What the base does in as many evaluations, by a solver of its own and called as the LoRA is. Leaves the network
    the base's."""
    say("the base itself in as many evaluations")
    rows = plans(judge.target, STEPS, tuple(dict.fromkeys((1.0, w))), SOLVERS[:1], say)
    ways = [Way(row.scheduler, row.call, row.nfe, row.steps, row.guidance, 0.0) for row in rows]
    alone = [judge(way, found.second[0].samples)
             for way in ways + [replace(one.way, scale=0.0) for one in leaders(found.second)]]
    judge.dress(0.0)
    return alone


def _none_found(lora: ForeignLora, base: Source, found: Found, alone: Sequence[Judged]) -> str:
    best = min(leaders(found.second), key=lambda one: one.figure.value)
    same = min((one for one in alone if one.way.nfe == best.way.nfe), key=lambda one: one.figure.value)
    return (f"no few-step LoRA: at its best, {best.way}, {lora.path} is at {_distance(best)}, and {base} itself "
            f"at {_distance(same)} in {same.way.nfe} network evaluations; it is better than that, beyond chance, "
            f"at no number of them. It may be of a style, or for another base: {lora.made_for}")


def _distance(one: Judged) -> str:
    name = {"fd": "a Fréchet distance", "kid": "a kernel distance (KID)"}[one.distance]
    return f"{name} of {one.figure.value:.4g} [{one.figure.low:.4g}, {one.figure.high:.4g}]"


def student_of(teacher: Teacher, weights: Weights, way: Way, method: str, base: Source, prompt: str) -> Student:
    """The LoRA at its weight as a student that leaves by `export`. base: as its user names it."""
    setting = replace(weights.setting, alpha=weights.setting.alpha * way.scale)
    roles = build_roles(teacher, {"teacher": Frozen(), "student": Trained("teacher")}, {"student": setting},
                        begin={"student": Weights(setting, weights.state)})
    stock = StockCall(type(way.scheduler).__name__, {}, way.call)
    source = replace(teacher.source, base=resources.portable(base.base))
    student = Student.of(roles, "student", stock, method, run="check", base_model=source, prompts=(prompt,))
    return replace(student, scheduler=way.scheduler)
