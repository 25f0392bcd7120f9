"""`--with-teacher`: a student's target with its teacher at hand, and the sheet of what each turn decides."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import resources
from ..data.cache import fingerprint
from ..data.shapes import captions, scenes
from ..diffusion.collaboration import SYSTEMS, check_options, options_of, sent_back
from ..errors import RequestError
from ..evaluation.features import load_features
from ..evaluation.plans import Plan, Target
from ..evaluation.sheets import sheet
from ..models.sources import Source
from ..models.with_teacher import Help
from .sources import located
from .targets import Opened, open_target, ships, teachers

CLIP, CALIBRATED = "assets/shapes-clip", 64         # whose pictures are scored, and how many of them
OWN = ("guidance", "teacher", "share")              # options of ours, beside a system's own


@dataclass(frozen=True)
class Asked:
    """What `--with-teacher` says. guidance: the teacher's scale; teacher: where it lies; share: of the pictures that
    adaptive is to send back."""

    name: str
    options: Mapping[str, float]
    guidance: float | None = None
    teacher: str | None = None
    share: float = 0.5

    @classmethod
    def of(cls, text: str) -> Asked:
        """NAME or NAME,option=value,... . RequestError for what is none, before anything is loaded."""
        name, *rest = text.split(",")
        if name not in SYSTEMS:
            raise RequestError(f"--with-teacher {text}: there is no system {name!r}, there are {', '.join(SYSTEMS)}")
        known = [*OWN[:2], *OWN[2:] * (name == "adaptive"), *options_of(name)]
        found: dict[str, Any] = {}
        for one in rest:
            key, _, value = one.partition("=")
            if key not in known or not value:
                raise RequestError(f"--with-teacher {text}: {one!r} is no option of {name}, which are written "
                                   f"{name},{known[-1]}={options_of(name)[known[-1]]} and may be {', '.join(known)}")
            if key in found:
                raise RequestError(f"--with-teacher {text}: {key} is given twice: say it once")
            found[key] = value if key == "teacher" else _number(text, key, value)
        own = {key: found.pop(key) for key in OWN if key in found}
        if not 0 <= own.get("share", 0.5) <= 1:
            raise RequestError(f"--with-teacher {text}: a share of pictures is from 0 to 1")
        try:
            check_options(name, own.get("guidance", 1.0), found)
        except RequestError as error:
            raise RequestError(f"--with-teacher {text}: {error}") from error
        if "teacher" in own:
            located(Source.of(own["teacher"]))
        return cls(name, found, **own)


def _number(text: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"--with-teacher {text}: {key} is a number, such as {key}=1; found {value!r}")
    return int(number) if number.is_integer() and "." not in value else number


def helped(opened: Opened, asked: Asked, beside: Sequence[Target], device: torch.device | str = "cpu") -> Target:
    """The student's target with its teacher's help, under a name of its own. beside: the teachers that are open
    already. RequestError where the teacher or its scale are not to be told."""
    target = opened.target
    if target.call is None:
        raise RequestError(f"{target.name} is called as a teacher is: --with-teacher helps students, and few-step "
                           "pipelines of others")
    teacher = _teacher(opened, asked, beside)
    guidance = opened.guidance if asked.guidance is None else asked.guidance
    if guidance is None:
        raise RequestError(f"nothing says at which guidance scale the teacher of {target.name} is asked: "
                           f"--with-teacher {asked.name},guidance=7.5 does")
    help = Help(asked.name, guidance, teacher.pipeline.to(device), asked.options, teacher.guided)
    help.turns(target.pipeline, {**target.given, **target.call})
    if asked.name == "adaptive":
        help = _judged(replace(help, share=asked.share), opened, device)
    told = {"system": asked.name, "guidance": guidance, **asked.options}
    told |= {"share": asked.share} if asked.name == "adaptive" else {}
    return replace(target, name=f"{target.name} + teacher ({asked.name})", help=help,
                   identity=f"{target.identity} {teacher.identity} {told}",
                   made={**target.made, "with_teacher": told})


def _teacher(opened: Opened, asked: Asked, beside: Sequence[Target]) -> Target:
    if asked.teacher is not None:
        found = open_target(Source.of(asked.teacher), "teacher").target
        if found.call is not None:
            raise RequestError(f"{asked.teacher} is a few-step generator itself, and no teacher")
        return found
    if opened.teacher is None:
        raise RequestError(f"nothing says what {opened.target.name} was made of: --with-teacher "
                           f"{asked.name},teacher=FOLDER does, or its id on the Hub")
    found = [one for one in beside if one.identity == fingerprint(opened.teacher.place)]
    if not found:
        raise RequestError(f"the teacher of {opened.target.name}, {opened.teacher}, cannot be loaded: --with-teacher "
                           f"{asked.name},teacher=FOLDER says where it lies")
    return found[0]


def _judged(help: Help, opened: Opened, device: torch.device | str) -> Help:
    """With a CLIP score as its judge, so that the share of the student's pictures is sent back which was asked for."""
    if not ships(opened):
        raise RequestError("adaptive judges pictures, and a judge of Shapes alone ships: from Python, "
                           'stepdistill.with_teacher(pipe, "adaptive", call, score=..., below=...) takes yours')
    space = load_features(resources.locate(CLIP), device)

    def score(pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        return 100 * F.cosine_similarity(space.images(pixels), space.texts(list(prompts)))

    target, prompts = opened.target, captions(scenes(torch.arange(CALIBRATED)))
    call, own = {**target.given, **target.call}, target.pipeline.scheduler
    alone = Plan(target, target.name, own, call, 0, call["num_inference_steps"], 1.0)
    return replace(help, score=score, below=sent_back(score(alone.images(prompts, torch.arange(CALIBRATED), 0),
                                                            prompts), help.share))


@contextmanager
def called(opened: Opened, call: Mapping[str, Any], texts: Sequence[str], asked: Asked | None, x0: str | Path | None,
           device: torch.device | str, say: Callable[[str], None]) -> Iterator[Mapping[str, Any]]:
    """The keyword arguments of a call for these texts, with the teacher's help where it is asked for. x0: where a sheet
    of what each turn made of the pictures is written once they are drawn, a row a turn."""
    if asked is None:
        yield call
        return
    help = helped(opened, asked, teachers([opened], say), device).help
    with help.of(opened.target.pipeline, call, texts) as together:
        yield together.call
        if x0 is not None:
            sheet(together.x0(), x0, [turn.words for turn in together.turns])
    counts = ", ".join(f"{count / len(texts):g} of the {role}" for role, count in together.evaluations.items())
    say(f"{asked.name}: network evaluations a picture: {counts}")
