"""Pictures of a pipeline as `sample` asks for them."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..diffusion.draws import key
from ..errors import RequestError
from ..models.families import stock_prompts
from ..models.stock import pictures
from .targets import Opened, asking
from .telling import log
from .with_teacher import Asked, called

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def check_files(out: str | Path | None, x0: str | Path | None, with_teacher: str | None) -> None:
    """RequestError where a picture, or the sheet of x_0, cannot be written."""
    for file in (file for file in (out, x0) if file is not None and Path(file).suffix.lower() not in PICTURES):
        raise RequestError(f"the picture {file} should be a {', '.join(PICTURES)} file")
    if x0 is not None and with_teacher is None:
        raise RequestError("a sheet of x_0 is drawn beside a teacher: --with-teacher diversity,handover=0 is the "
                           "student alone")
    if x0 is not None and out is not None and Path(x0).resolve() == Path(out).resolve():
        raise RequestError(f"{x0} is to be the sheet of x_0 and the picture: name two files")


def draw(opened: Opened, call: Mapping[str, Any], texts: Sequence[str], seed: int, asked: Asked | None,
         x0: str | Path | None) -> Tensor:
    """(B, ..., 3, H, W) in [0, 1], one for each text: (B, 3, H, W), of videos (B, F, 3, H, W). Ranks share the texts;
    beside a teacher, whose verdicts are of all pictures together, each draws all. x0: where the first one draws a sheet
    of what each evaluation made of them."""
    every = range(len(texts))
    if asked is not None:
        return _drawn(opened, call, texts, every, seed, asked, x0 if parallel.rank() == 0 else None)
    own = parallel.share(every)
    pixels = _drawn(opened, call, texts, own, seed, None, None) if own else torch.empty(0)
    return torch.stack(parallel.dealt([*pixels.cpu()]))


def _drawn(opened: Opened, call: Mapping[str, Any], texts: Sequence[str], places: Sequence[int], seed: int,
           asked: Asked | None, x0: str | Path | None) -> Tensor:
    """Of the texts at these places, which the noise depends on."""
    pipeline, own = opened.target.pipeline, [texts[i] for i in places]
    generators = [torch.Generator().manual_seed(key(seed, "sample", i)) for i in places]
    with asking(pipeline), torch.random.fork_rng(), called(opened, call, own, asked, x0, pipeline.device,
                                                           log.info) as told:
        torch.manual_seed(key(seed, "pipeline"))
        return pictures(pipeline, stock_prompts(pipeline), own, generator=generators, **told)


def check_pictures(pixels: Tensor, target: str | Path) -> None:
    """RequestError for pictures that are not finite; a word where all are black. pixels: (B, ..., 3, H, W) in [0,
    1]."""
    if not pixels.isfinite().all():
        raise RequestError(f"the pictures of {target} are not finite (NaN): nothing was written. Weights that "
                           "training has driven away, or an autoencoder that overflows in half precision, draw such")
    if not pixels.any():
        log.warning(f"all pictures of {target} are black: a safety checker paints doubtful ones so, and a network that "
                    "draws NaN may")
