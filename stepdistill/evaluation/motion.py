"""Figures of videos: how far they move from frame to frame, beside their teacher's, and their frames as pictures."""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..models.stock import some_frames
from .estimate import Estimate, mean_of, ratio_of
from .space import Figures, figures
from .style import distance

SLOW = 0.9                                         # of the teacher's motion: less is slow motion
STILL = 1e-4                                       # root mean square of pixels in [-1, 1]: less is rounding
FIGURES = {"motion": "motion, px a frame", "motion_ratio": "× teacher's motion", "fd_frames": "FD of frames"}


def displacement(videos: Tensor) -> Tensor:
    """Pixels by which pictures move from frame to frame: (B, F, 3, H, W) -> (B,), for F >= 2; 0 where nothing moves.

    It is the shift at which a frame differs from itself, along rows and columns, as much as from the next one, in the
    mean square; at most half of the shorter side. Between whole pixels the root of the mean square is taken for a
    straight line, as that of a smooth picture is near 0. Each frame's mean colour is taken off, so that a change of
    light is no motion; contrast cancels. What flickers counts as motion, and of what moves in a part of the picture so
    much as that part's texture has of all.
    """
    x = videos.float() - videos.float().mean((-2, -1), keepdim=True)
    moved = (x[:, 1:] - x[:, :-1]).square().flatten(1).mean(1).sqrt()
    moved = torch.where(moved < STILL, 0, moved)
    shown, shifts = some_frames(x), torch.tensor(_shifts(min(x.shape[-2:]) // 2))
    # (B, shifts), from 0 on
    apart = torch.stack([_apart(shown, shift) for shift in shifts.tolist()], 1).cummax(1).values
    # the first shift that is enough
    above = (apart < moved[:, None]).sum(1).clamp(1, len(shifts) - 1)
    low, high = (apart.gather(1, (above - i)[:, None])[:, 0] for i in (1, 0))
    share = ((moved - low) / (high - low)).nan_to_num(0.0).clamp(0, 1)
    return torch.lerp(shifts[above - 1].float(), shifts[above].float(), share)


def _shifts(most: int) -> list[int]:
    """0 to 4 one by one, then each a quarter longer."""
    found = [0, 1, 2, 3, 4]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, found[-1] * 5 // 4)))
    return [shift for shift in found if shift <= max(1, most)]


def _apart(x: Tensor, shift: int) -> Tensor:
    """Root mean square between frames and themselves, shifted along rows and along columns, (B,)."""
    along = (x[..., shift:] - x[..., : x.shape[-1] - shift], x[..., shift:, :] - x[..., : x.shape[-2] - shift, :])
    return (sum(one.square().flatten(1).mean(1) for one in along) / 2).sqrt()


def of_videos(found: dict[str, Tensor], teacher: dict[str, Tensor], prompts: int, seed: int) -> Figures:
    """The figures FIGURES of a row of videos, beside its teacher's from the same noise. found: as `own.drawn` keeps it.
    fd_frames: of one frame of each video, which are independent, between different noise; None of too few."""
    metrics = figures("motion", mean_of(found["moved"]))
    if found is teacher:
        return metrics | figures("motion_ratio", None) | figures("fd_frames", None)
    ratio = ratio_of(found["moved"], teacher["moved"]) if teacher["moved"].any() else None
    frames, theirs = (_one_each(one["seen"], prompts) for one in (found, teacher))
    return metrics | figures("motion_ratio", ratio) | figures("fd_frames", distance(frames, theirs, prompts, seed))


def _one_each(seen: Tensor, prompts: int) -> Tensor:
    """Of features (n, F, D) one frame of each video, (n, D), of the samples of a prompt another one each."""
    i = torch.arange(len(seen))
    return seen[i, (i + i // prompts).remainder(seen.shape[1])]


def in_words(rows: Sequence[dict]) -> Iterator[str]:
    """What motion there is, of the rows of results.json whose motion is not their teacher's."""
    for row in rows:
        m = row["metrics"]
        if m.get("motion_ratio") is None:
            continue
        ratio = Estimate(m["motion_ratio"], m["motion_ratio_low"], m["motion_ratio_high"])
        share = f"{100 * ratio.value:.0f} % ({100 * ratio.low:.0f} to {100 * ratio.high:.0f}) of its teacher's motion"
        named = f"{row['target']}, {row['nfe']} NFE, w = {row['guidance']:g}"
        if ratio.high < SLOW:
            yield f"slow motion: {named} has {share}"
        elif ratio.low > 1 / SLOW:
            yield f"more motion: {named} has {share}"
