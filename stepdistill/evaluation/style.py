"""What is left of a style where a student wears it: how much of the base's change, and what that means in words."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .estimate import Estimate, around, jackknife, ratio_of
from .fd import Moments, Reference, frechet_infinity, too_few
from .means import of_prompts
from .space import Figures, figures

KEPT, LOST, OVERDONE = 0.8, 0.5, 1.25      # shares of the base's change: of a style that is kept, lost and overdone
# of the base's differences between seeds: about as much, and nearly one picture
ALIKE, SAME = 0.9, 1 / 3
FOLLOWED = 1.0                             # points of CLIP score that a prompt is followed less


@dataclass(frozen=True)
class Worn:
    """A style on a student at one scale, beside the same style on the base, from the same noise.

    kept: share of the base's change of mean features that the student's has along it; None where the base shows none.
    differ: what pictures of one prompt differ by, over the base's. followed: the difference in CLIP score, None without
    one. fd: Fréchet distance to the base's pictures; None of too few.
    """

    scale: float
    kept: Estimate | None
    differ: Estimate | None
    followed: Estimate | None
    fd: Estimate | None

    @property
    def plain(self) -> Figures:
        """As results.json has it."""
        found: Figures = {"scale": self.scale}
        for name, estimate in (("kept", self.kept), ("diversity_ratio", self.differ),
                               ("clip_score_change", self.followed), ("fd", self.fd)):
            found |= figures(name, estimate)
        return found


def kept(base: Tensor, styled_base: Tensor, student: Tensor, styled_student: Tensor) -> Estimate | None:
    """<e, d> / <d, d> for the style's mean changes d of the base and e of the student; 1 is all of it. Features (n, D),
    sample by sample from the same noise, at least 3.

    Both products are taken between different samples, so that the scatter of single pictures adds to neither; the
    interval is the jackknife's. None where it is not sure that the base changes at all.
    """
    d, e = (styled_base - base).double(), (styled_student - student).double()
    (change, changes), (along, alongs) = _crossed(d, d), _crossed(e, d)
    n = len(d)
    seen = around((change / (n * (n - 1))).item(), jackknife([changes / ((n - 1) * (n - 2))]).item(), n - 1)
    return None if seen.low <= 0 else around((along / change).item(), jackknife([alongs / changes]).item(), n - 1)


def _crossed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of x_i . y_j over all pairs of different samples, (), and the same without each of the samples, (n,)."""
    own = (x * y).sum(1)
    whole = x.sum(0) @ y.sum(0) - own.sum()
    return whole, whole - x @ y.sum(0) - y @ x.sum(0) + 2 * own


def differ(styled_student: Tensor, styled_base: Tensor, prompts: int) -> Estimate | None:
    """What pictures of one prompt differ by, over the base's, prompt by prompt. Features (n, D), of samples that go
    through the prompts again and again. None of a single prompt, and where the base's do not differ."""
    over, under = (torch.stack([torch.pdist(group.double()).mean() for group in of_prompts(x, prompts)])
                   for x in (styled_student, styled_base))
    return None if len(under) < 2 or not under.all() else ratio_of(over, under)


def distance(styled_student: Tensor, styled_base: Tensor, prompts: int, seed: int) -> Estimate | None:
    """The Fréchet distance of the two laws, of different noise: the student's odd rounds through the prompts against
    the base's even ones. None of too few."""
    odd = (torch.arange(len(styled_base)) // prompts).remainder(2).bool()
    ours, theirs = styled_student[odd], styled_base[~odd]
    if too_few(len(ours), len(theirs), ours.shape[1]):
        return None
    return frechet_infinity(ours, Reference((Moments.of(theirs[0::2]), Moments.of(theirs[1::2])), theirs), seed)


def verdict(worn: Sequence[Worn], bare: Estimate | None, space: str) -> str:
    """In words. worn: in the order of their scales; bare: what pictures of one prompt differ by without the style, over
    the base's."""
    return "; ".join(filter(None, (_style(worn, space), _seeds(worn, bare), _prompts(worn))))


def _style(worn: Sequence[Worn], space: str) -> str:
    seen = [one for one in worn if one.kept is not None]
    if not seen:
        return f"the style changes nothing on the base that {space} sees, so that nothing can be said of it"
    shares = ", ".join(f"{_percent(one.kept)} at scale {one.scale:g}" for one in seen)
    lost = [one.scale for one in seen if one.kept.high < LOST]
    if lost:
        left = [one.scale for one in seen if one.scale not in lost]
        where = "at every scale" if not left else f"above scale {max(left):g}" if max(left) < min(lost) else _at(lost)
        return f"the style is lost {where} (kept are {shares})"
    if overdone := [one.scale for one in seen if one.kept.low > OVERDONE]:
        return f"the style is overdone {_at(overdone)} (kept are {shares})"
    if any(one.kept.high < KEPT for one in seen):
        return f"keeps a part of the style: {shares}"
    return (f"keeps the style: {shares}" if all(one.kept.low >= KEPT for one in seen)
            else f"keeps of the style {shares}, and more samples would tell")


def _seeds(worn: Sequence[Worn], bare: Estimate | None) -> str | None:
    seen = [(0.0, bare), *((one.scale, one.differ) for one in worn)]
    known = [(scale, ratio) for scale, ratio in seen if ratio is not None]
    if not known:
        return None
    same = [scale for scale, ratio in known if ratio.high < SAME]
    if same:
        return "all seeds draw nearly the same picture" + ("" if len(same) == len(known) else f" {_at(same)}")
    least, most = (choose((ratio for _, ratio in known), key=lambda ratio: ratio.value) for choose in (min, max))
    if least.high < ALIKE:
        return f"pictures of one prompt differ less than the base's, {_percent(least)} at the least"
    if most.low > 1 / ALIKE:
        return f"pictures of one prompt differ more than the base's, {_percent(most)} at the most"
    if least.low < ALIKE**2:
        return f"pictures of one prompt differ by {_percent(least)} of what the base's do, and more samples would tell"
    return "pictures of one prompt differ as much as the base's"


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f} to {100 * share.high:.0f})"


def _prompts(worn: Sequence[Worn]) -> str | None:
    less = [one for one in worn if one.followed is not None and one.followed.high < -FOLLOWED]
    if not less:
        return None
    return (f"prompts are followed less {_at([one.scale for one in less])} (CLIP score "
            f"{min(one.followed.value for one in less):+.1f})")


def _at(scales: Sequence[float]) -> str:
    words = ["no style" if not scale else f"scale {scale:g}" for scale in scales]
    return "at " + " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
