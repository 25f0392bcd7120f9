"""A network of any family as a role: role(x_t, t, cond) -> Prediction."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.prediction import Prediction
from .attention import differentiable, has_tangent
from .families import Family


class Denoiser:
    """One network, or one adapter of a network, under its family's conventions. It can be differentiated forward.

    context: entered around every call; an adapter bank hands in `partial(bank.use, name)`.
    told_w: whether this role reads the guidance scale `cond.w`. A role that does not never sees it, so that teacher and
    student may share a batch's condition; a role that does refuses a condition without it.
    """

    def __init__(self, family: Family, network: nn.Module, context: Callable[[], AbstractContextManager] = nullcontext,
                 told_w: bool = False) -> None:
        self.family, self.network, self.context, self.told_w = family, network, context, told_w
        self.schedule = family.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        """x_t (B, C, H, W); t (B,) float64 in [0, 1]. The raw output has the dtype of x_t."""
        if self.told_w and (cond is None or cond.w is None):
            raise ValueError("this role is told its guidance scale, but the condition has no w: pass cond.replace(w=...)")
        if not self.told_w and cond is not None and cond.w is not None:
            cond = cond.replace(w=None)
        with self.context(), self._attention(x_t, t, cond):
            raw = self.family.predict(self.network, x_t, t, cond)
        return Prediction(raw, x_t, t, self.schedule, self.family.kind)

    def _attention(self, x_t: Tensor, t: Tensor, cond: Condition | None) -> AbstractContextManager:
        """The chosen kernels have no derivative forward, so within torch.func.jvp attention is computed as it is written."""
        given = [x_t, t, *(() if cond is None else (value for value in vars(cond).values() if isinstance(value, Tensor)))]
        return differentiable(self.network) if has_tangent(*given) else nullcontext()
