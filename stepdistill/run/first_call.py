"""Before the first update: one stock call of the base, as the student will be called, against our sampler.

What the stock pipeline cannot call, or calls otherwise than we think, shows here and not at the export, after the
training.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..diffusion.sampler import Sampler
from ..errors import RequestError, first_lines
from ..export.proof import COARSE, SEED, sampled, tolerance
from ..models.schedulers import StockCall, stock_scheduler
from ..models.stock import pictures
from ..training.loop import DTYPES
from .buckets import views
from .data import preview_prompts
from .setup import Run, sampling

STEPS = 2


def check_first_call(run: Run) -> float | None:
    """The largest difference of a pixel in [0, 1] between the teacher's stock pipeline, called as the student will be,
    and our sampler, for one prompt, of buckets at two aspects; None for what has no pipeline. The call takes 2 steps,
    or as many as are served; its network is the base, which an untrained student is.

    RequestError where the pipeline refuses the call, or differs by more than 1e-4 in float32. In 16 bits the limit is
    three times what another attention kernel changes, and at least 2^-5.
    """
    if run.teacher.loaded is None:
        return None
    return max(_difference(replace(run, teacher=teacher)) for teacher in views(run.teacher, run.sizes))


def _difference(run: Run) -> float:
    dtype = DTYPES.get(run.recipe.train.precision)
    with whole_float32(), torch.autocast(run.device.type, dtype, dtype is not None, cache_enabled=False):
        stock, sampler = _short(run)
        reads = run.roles.reads["student"]
        scale = 1.0 if "w" in reads else run.teacher.guidance.scale(stock.call)      # the base reads none that is told
        call = {**stock.call, **run.teacher.call,
                **({} if run.teacher.scale is not None else run.teacher.guidance.call(scale))}
        base = run.called(run.roles.base, reads)
        prompt = preview_prompts(run, 1)[:1]
        theirs, cond = _theirs(run, stock, call, prompt), run.teacher.encode(prompt)
        ours = sampled(run.teacher, sampler, base, cond)
        limit = tolerance(run.teacher)
        if run.teacher.dtype != torch.float32:
            with sdpa_kernel(SDPBackend.MATH):
                again = sampled(run.teacher, sampler, base, cond)
            limit = max(COARSE, 3 * (again - ours).abs().max().item())
    if not theirs.isfinite().all():
        raise run.recipe.refuse("teacher", f"is {run.teacher.source}, whose stock {_pipeline(run)}, called with "
                                f"{call}, draws a picture of NaN or infinities: such stand among its weights. Save or "
                                "download it anew. Nothing was trained")
    difference = (theirs - ours).abs().max().item()
    if not difference <= limit:
        raise run.recipe.refuse("teacher", f"is {run.teacher.source}, whose stock {_pipeline(run)}, called with "
                                f"{call}, differs from our sampler by {difference:.2e} on [0, 1] pixels, where "
                                f"{limit:.1e} is allowed: a student would not leave as it was trained. Nothing "
                                "was trained")
    return difference


@contextmanager
def whole_float32() -> Iterator[None]:
    """Inside, a card's float32 products keep all their digits. TensorFloat-32, which torch's convolutions use unless
    told otherwise, keeps ten bits: there a difference in the last place of an input is one of 1e-3 in the output."""
    places = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    for place in places:
        place.allow_tf32 = False
    try:
        yield
    finally:
        for place, allowed in zip(places, before, strict=True):
            place.allow_tf32 = allowed


def _pipeline(run: Run) -> str:
    return type(run.teacher.loaded).__name__


def _short(run: Run) -> tuple[StockCall, Sampler]:
    """As the student is sampled, in 2 steps where its scheduler serves them."""
    try:
        stock, sampler = sampling(run.recipe.model_copy(update={"steps": min(STEPS, run.recipe.steps)}), run.teacher)
    except RequestError:
        return run.stock, run.method.sampler
    return (stock, sampler) if stock.scheduler == run.stock.scheduler else (run.stock, run.method.sampler)


def _theirs(run: Run, stock: StockCall, call: Mapping[str, Any], prompt: list[str]) -> Tensor:
    pipe, own = run.teacher.loaded, run.teacher.loaded.scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        pipe.scheduler = stock_scheduler(stock.scheduler, stock.config, run.teacher.scheduler)
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return pictures(pipe, run.teacher.family.prompts, prompt, generator=torch.Generator().manual_seed(SEED),
                            **call)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise run.recipe.refuse("teacher", f"is {run.teacher.source}, whose stock {_pipeline(run)} cannot be called "
                                f"with {call}: {first_lines(error)}. Nothing was trained") from error
    finally:
        pipe.scheduler = own
