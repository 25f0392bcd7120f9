"""Further metrics: what people prefer, and figures of one's own, in each row of a bench."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import parallel
from ..errors import RequestError
from ..models.rewards import REWARDS
from ..models.stock import some_frames
from .estimate import mean_of
from .motion import FIGURES
from .space import Figures, figures

METRICS: dict[str, Metric] = {}
OWN = ("fd", "kid", "cmmd", "precision", "recall", "density", "coverage", "clip_score", "diversity", "all_attributes",
       "to_teacher", *FIGURES, *REWARDS)


@dataclass(frozen=True)
class Metric:
    """of: pictures, and where it reads prompts those, -> a number for each picture."""

    of: Callable[..., Tensor]
    prompts: bool


def register_metric(name: str, metric: Callable[..., Tensor], prompts: bool = False) -> None:
    """Makes a metric known by its name, in this process: `stepdistill bench ... --metric NAME`.

    metric(pixels): (B, 3, H, W) float32 in [-1, 1] on the CPU -> (B,), a number for each picture; its mean over a row's
    pictures is the figure. prompts: it is called metric(pixels, prompts), with a text for each; rows of pictures that
    were made for no prompt have no figure then. RequestError for a name of ours.
    """
    if name.removesuffix("_low").removesuffix("_high") in OWN or not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise RequestError(f"a metric is named by small letters, digits and _, and by none of {', '.join(OWN)}; "
                           f"found {name!r}")
    METRICS[name] = Metric(metric, prompts)


def more_metrics(protocol: Mapping[str, Any]) -> list[str]:
    """The metrics beside ours that rows of results.json have."""
    return list(protocol.get("metrics", {}))


class Means:
    """Means of metrics over the pictures of a row. marks: name -> what changes with its code or weights."""

    def __init__(self, marks: Mapping[str, str]) -> None:
        self.values: dict[str, list[Tensor]] = {name: [] for name in marks}
        self.count = 0

    def add(self, pixels: Tensor, prompts: Sequence[str] | None) -> None:
        """pixels (B, 3, H, W), perhaps none; of videos (B, F, 3, H, W), each the mean over some of its frames. prompts:
        those that they were made for, None for none."""
        self.count += len(pixels)
        for name, values in self.values.items() if len(pixels) else ():
            metric = METRICS[name]
            if not metric.prompts or prompts is not None:
                values.append(_values(name, metric, pixels, prompts) if pixels.ndim == 4
                              else _of_videos(name, metric, pixels, prompts))

    def join(self) -> None:
        """With what the other ranks added, in turn with this one."""
        for values in self.values.values():
            values[:] = parallel.dealt(values)

    def figures(self, prompted: bool) -> Figures:
        """With intervals. prompted: whether the pictures were made for prompts."""
        found: Figures = {}
        for name, values in self.values.items():
            found |= figures(name, None if METRICS[name].prompts and not prompted else mean_of(torch.cat(values)))
        return found


def _of_videos(name: str, metric: Metric, videos: Tensor, prompts: Sequence[str] | None) -> Tensor:
    frames = some_frames(videos)
    told = None if prompts is None else [prompt for prompt in prompts for _ in range(frames.shape[1])]
    return _values(name, metric, frames.flatten(0, 1), told).unflatten(0, frames.shape[:2]).mean(1)


def _values(name: str, metric: Metric, pixels: Tensor, prompts: Sequence[str] | None) -> Tensor:
    with torch.inference_mode():
        found = metric.of(pixels, list(prompts)) if metric.prompts else metric.of(pixels)
    if not isinstance(found, Tensor) or found.shape != (len(pixels),) or not found.isfinite().all():
        raise RequestError(f"the metric {name} should give a tensor of {len(pixels)} finite numbers, one a picture; "
                           f"found {found!r:.200}")
    return found
