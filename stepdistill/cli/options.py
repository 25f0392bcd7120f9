"""Options that several commands have, and how their values are read."""
from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RequestError

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a built-in name such as shapes/lcm.",
                                           autocompletion=lambda incomplete: completions("recipes", incomplete))]
Sets = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE",
                                                help="Change one entry, such as train.lr=1e-4.")]
Out = Annotated[Path | None, typer.Option(help="Where to write.")]
Checkpoint = Annotated[int | None, typer.Option(metavar="STEP", min=1, help="Of a run: another than the last.")]
Weights = Annotated[str | None, typer.Option(metavar="ema|student", help="Of a run that has both; ema unless given.")]
Plugins = Annotated[str | None, typer.Option("--plugins", metavar="FOLDER", help="Methods, families, metrics and "
                                             "data of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.",
                                                callback=lambda scale: guidance_scale("--guidance", scale))]
WithTeacher = Annotated[str | None, typer.Option(metavar="NAME[,OPTION=VALUE...]", help="A student's teacher helps: "
                                                 "diversity, distillation_pp or adaptive.")]
X0 = Annotated[Path | None, typer.Option("--x0", metavar="PNG", help="With a teacher: what each evaluation draws.")]
# how `--resume auto` is handed on: an option cannot be both a switch and a choice
RESUME_AUTO = "--resume-auto"
MANY = 10_000_000                      # of anything that is counted: beyond it a number is a slip
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the noise.")]
Target = "A run folder, an export folder, or a diffusers pipeline (folder or Hub id)."


def completions(kind: str, incomplete: str) -> list[str]:
    """What a shell completes: the methods or recipes that begin so."""
    from ..recipe import catalogue
    rows = {"methods": catalogue.methods, "recipes": catalogue.recipes}[kind]()
    return [row["name"] for row in rows if row["name"].startswith(incomplete)]


def guidance_scale(option: str, number: float | None) -> float | None:
    if number is not None and not 1 <= number < math.inf:
        raise RequestError(f"{option} {number}: should be a finite number, such as 3.0, and at least 1, which is none")
    return number


def numbers(option: str, text: str, kind: type, example: str, least: int = 1) -> list[Any]:
    """Numbers of at least `least` with commas between."""
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= number <= MANY for number in found):
        raise RequestError(f"{option} {text}: should be finite numbers of at least {least}, and at most {MANY:,}, "
                           f"with commas between, such as {example}")
    return found


def size_in_bytes(option: str, text: str) -> float:
    """A size such as 16GB or 24 GiB, in bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(MB|MiB|GB|GiB)", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise RequestError(f"{option} is {text}; expected a size such as 16GB or 24GiB")
    return float(found[1]) * {"mb": 1e6, "mib": 2**20, "gb": 1e9, "gib": 2**30}[found[2].lower()]
