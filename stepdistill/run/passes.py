"""What a training step asks of its networks: passes, and the activations that autograd keeps. Counted on the meta
device."""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..diffusion.contracts import Batch, Pairs
from ..diffusion.draws import Step
from ..diffusion.times import even
from ..methods.base import Heads, Update
from ..models.attention import has_tangent
from ..models.discriminator import tap
from ..models.recompute import StopForward
from .checks import network_features
from .setup import Run


@dataclass
class PassCounts:
    """Evaluations of the network a sample and step, forward and with gradients; held: the most bytes that autograd
    keeps."""

    forward: float = 0.0
    backward: float = 0.0
    held: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class _Moment(Step):
    """A step whose shared draws, such as the exit of a rollout, all fall on `at`."""

    at: float = 0.5

    def shared(self, name: str) -> float:
        return self.at


def count_passes(run: Run) -> PassCounts:
    """By running the method's own losses, with as many samples as a micro-batch has.

    A pass that ends at a discriminator's last feature counts as its share of a whole pass's arithmetic. Passes are a
    mean over the exits of the student's rollouts: their count grows evenly from exit to exit, so the first and the last
    one tell it.
    """
    passes, batch, share = PassCounts(), _batch(run), _share(run)
    networks, last = [run.teacher.network, *run.roles.networks.values()], run.method.sampler.nfe - 1
    with ExitStack() as counting:
        for network in networks:
            if run.recipe.train.precision != "fp32":        # as autocast computes
                network.to(torch.bfloat16)
            counting.enter_context(_counted(network.train(), run, passes, share))
        for exit in (0, last):
            _step(run, batch, passes, (exit + 0.5) / (last + 1))
    return passes


def _step(run: Run, batch: Batch, passes: PassCounts, at: float) -> None:
    """One training step of two, with batches shared as training shares them. Repeats on batches of their own cost the
    same."""
    kept: dict[str, Any] = {}
    for update in run.method.updates():
        shares = min(update.shares, update.repeat)
        for repeat, count in ((0, shares), (shares, update.repeat - shares)):
            if count:
                kept = kept if repeat < shares else {}
                passes.weight = count / (2 * update.every * len(batch))
                step = _Moment(0, 0, 0.0, update.name, repeat, batch.ids, run.teacher.device, kept=kept, at=at)
                passes.held = max(passes.held, _held(run, update, batch, step))


def _held(run: Run, update: Update, batch: Batch, step: Step) -> int:
    """Bytes that autograd keeps for the gradients of one update."""
    for name in run.roles.names:
        for parameter in run.roles.parameters(name):
            parameter.requires_grad_(name in update.trains)
    networks = (run.teacher.network, *run.roles.networks.values(), *run.roles.visions.values())
    own = {id(p) for network in networks for p in network.parameters()}
    kept: list[Tensor] = []                                 # alive to the end, so that no two storages share an id

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        update.loss(batch, step)
    storages = [tensor.untyped_storage() for tensor in kept if id(tensor) not in own]
    return sum({id(storage): storage.nbytes() for storage in storages}.values())


class _Attention(torch.autograd.Function):
    """What a fused kernel keeps for its gradients: its arguments and its output, not the weights of attention."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, ...]:
        """Of losses that ask for a gradient themselves."""
        return tuple(torch.empty_like(given) for given in ctx.saved_tensors[:3])


class _FusedAttention(TorchFunctionMode):
    """On the meta device torch computes attention as it is written, and keeps what a kernel on a GPU or a CPU does
    not."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            named = [kwargs[name] for name in ("query", "key", "value") if kwargs and name in kwargs]
            given = [*args, *named][:3]
            if not has_tangent(*given):                     # kernels have no derivative forward
                return _Attention.apply(*given)
        return function(*args, **(kwargs or {}))


@contextmanager
def _counted(network: nn.Module, run: Run, passes: PassCounts, share: float) -> Iterator[None]:
    """Counts the passes of a network, and those that gradients go back through. share: of a pass that ends early."""
    forward = network.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        given = (*args, *kwargs.values())                   # x_t first, a tensor or a list of samples
        back = torch.is_grad_enabled() and (any(x.requires_grad for x in tensors_in(given)) or _trains(network, run))
        count = passes.weight * len(given[0])
        try:
            return forward(*args, **kwargs)
        except StopForward:
            count *= share
            raise
        finally:
            passes.forward += count
            passes.backward += count * back

    network.forward = counting
    try:
        yield
    finally:
        del network.forward


def _trains(network: nn.Module, run: Run) -> bool:
    """Whether the network as it is asked now, under its active adapter, is being trained."""
    bank = run.roles.bank
    if network is not run.teacher.network or bank is None:
        return any(parameter.requires_grad for parameter in network.parameters())
    return bank.active is not None and any(parameter.requires_grad for parameter in bank.parameters_of(bank.active))


def _share(run: Run) -> float:
    """Of the arithmetic of a whole pass, what one takes that ends after the discriminator's last feature."""
    if not any(isinstance(need, Heads) and need.of not in run.roles.visions for need in run.roles.needs.values()):
        return 1.0
    teacher, counts = run.teacher, []
    names = tuple(network_features(run.recipe, teacher.feature_shapes, teacher.default_features))
    for read, leave in (((), False), (names, True)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter, tap(teacher.network, read, leave):
            teacher.network(**teacher.inputs(1))
        counts.append(counter.get_total_flops())
    return counts[1] / counts[0]


def _batch(run: Run) -> Batch:
    """A micro-batch of one process, on the meta device."""
    data, shape = run.recipe.data, run.teacher.latent_shape
    count = data.batch // run.recipe.train.accumulate
    empty = lambda *sizes: torch.empty(count, *sizes, device=run.teacher.device)
    x0 = None if data.kind == "prompts" else empty(*shape)
    pairs = None
    if data.pairs is not None:
        pairs = Pairs(empty(*shape), empty(data.pairs.nodes, *shape), even(data.pairs.nodes)[1:].expand(count, -1))
    prompts = [run.teacher.null_prompt] * count
    return Batch(torch.arange(count), run.teacher.encode(prompts), x0, shape, pairs, prompts)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())
        elif isinstance(value, list):
            yield from tensors_in(value)
