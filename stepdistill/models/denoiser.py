"""A network of any family as a role: role(x_t, t, cond) -> Prediction."""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..diffusion.contracts import Condition
from ..diffusion.prediction import Prediction
from .attention import differentiable, has_tangent

if TYPE_CHECKING:
    from .teacher import Teacher


class Denoiser:
    """One network, or one adapter of a network, under its teacher's conventions. It can be differentiated forward.

    context: entered around every call; an adapter bank hands in `partial(bank.use, name)`.
    reads: the numbers of `cond.extra` that this role reads. It never sees others, so that teacher and student may share
    a batch's condition; it refuses a condition without its own.
    """

    def __init__(self, teacher: Teacher, network: nn.Module,
                 context: Callable[[], AbstractContextManager] = nullcontext,
                 reads: tuple[str, ...] = ()) -> None:
        self.teacher, self.network, self.context, self.reads = teacher, network, context, reads
        self.schedule = teacher.schedule

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition | None = None) -> Prediction:
        """x_t (B, ...); t (B,) float64 in [0, 1]. The raw output has the dtype of x_t."""
        if missing := [name for name in self.reads if cond is None or name not in cond.extra]:
            raise ValueError(f"this role reads {', '.join(self.reads)}, but the condition has no {', '.join(missing)}: "
                             "pass "
                             f"cond.replace({missing[0]}=...)")
        reads = self.reads
        if cond is not None and self.teacher.scale is not None:
            cond, reads = self.teacher.scaled(cond), {*reads, "w"}
        if cond is not None and (reads or cond.extra):
            cond = cond.replace(extra={name: cond.extra[name] for name in reads})
        with self.context(), self._attention(x_t, t, cond):
            raw = self.teacher.predict(self.network, x_t, t, cond)
        return Prediction(raw, x_t, t, self.schedule, self.teacher.kind, self.teacher.combine)

    def _attention(self, x_t: Tensor, t: Tensor, cond: Condition | None) -> AbstractContextManager:
        """The chosen kernels have no derivative forward, so within torch.func.jvp attention is computed as it is
        written."""
        given = [x_t, t, *(() if cond is None else cond.tensors())]
        return differentiable(self.network) if has_tangent(*given) else nullcontext()
