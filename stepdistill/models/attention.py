"""Which kernel computes attention: torch's own choice (sdpa), that of xformers, or torch's flash kernel; and attention
with a JVP, by a Triton kernel of ours where there is a GPU for it, else by torch's math kernel.

A network of diffusers computes attention in processors, and there are two kinds of them. Some ask diffusers'
dispatcher, which reads their `_attention_backend` (Flux, Qwen-Image, Wan); others call a kernel themselves (UNets, SD3,
PixArt, DiT), and `network.set_attention_backend` passes over these without a word. So every processor is looked at
here: the first kind is given the dispatcher's backend, the second is exchanged, and one of neither kind is refused. The
network's method is not called, because it also changes the backend of every other network in the process.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import partial, wraps
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SanaLinearAttnProcessor2_0,
    SanaMultiscaleAttnProcessor2_0,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from diffusers.utils import is_xformers_available
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import RequestError

BACKENDS = ("auto", "sdpa", "xformers", "flash")       # auto: what diffusers chose
DISPATCHER = {"sdpa": AttentionBackendName.NATIVE, "xformers": AttentionBackendName.XFORMERS,
              "flash": AttentionBackendName._NATIVE_FLASH}
HALF = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256                                       # of torch's flash kernel on CUDA
OLDEST = (8, 0)                                         # the compute capability that it takes
TRITON = ("cuda",) if find_spec("triton") else ()       # where attention with a JVP is one kernel


def _flash(x: Tensor) -> AbstractContextManager:
    """The flash kernel and no other. On CUDA it has 16 bits only: what is computed in float32 there, as a preview of a
    full student is outside of autocast, takes the kernel that torch chooses."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return sdpa_kernel(SDPBackend.FLASH_ATTENTION) if kind == "cpu" or dtype in HALF else nullcontext()


class FlashAttnProcessor(AttnProcessor2_0):
    """Of UNets, PixArt and DiT. diffusers reads the signature of __call__, so it stays that of the parent."""

    @wraps(AttnProcessor2_0.__call__)
    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _flash(hidden_states):
            return super().__call__(attn, hidden_states, *args, **kwargs)


class FlashJointAttnProcessor(JointAttnProcessor2_0):
    """Of SD3."""

    @wraps(JointAttnProcessor2_0.__call__)
    def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _flash(hidden_states):
            return super().__call__(attn, hidden_states, *args, **kwargs)


PROCESSORS = (
    {"sdpa": AttnProcessor2_0, "xformers": XFormersAttnProcessor, "flash": FlashAttnProcessor},
    {"sdpa": JointAttnProcessor2_0, "xformers": XFormersJointAttnProcessor, "flash": FlashJointAttnProcessor},
)
LINEAR = (SanaLinearAttnProcessor2_0, SanaMultiscaleAttnProcessor2_0)     # no softmax: there is one way to compute it


def set_attention(network: nn.Module, backend: str) -> None:
    """Gives every attention of the network, whatever adapters are on it, a backend of BACKENDS.

    RequestError, before anything is changed, if some attention has no form for the backend, or the network has no
    attention and the backend is neither auto nor sdpa.
    """
    if backend == "auto":
        return
    layers = _attentions(network)
    if not layers and backend != "sdpa":
        raise RequestError(f"a {type(network).__name__} has no attention that {backend} could compute: choose auto or "
                           "sdpa")
    others = [_other(layer.processor, backend) for layer in layers]
    if None in others:
        unknown = type(layers[others.index(None)].processor).__name__
        raise RequestError(f"attention by a {unknown} of diffusers has no form for {backend}: choose auto")
    for layer, processor in zip(layers, others, strict=True):
        layer.set_processor(processor)


@contextmanager
def differentiable(network: nn.Module) -> Iterator[None]:
    """Within, the network has a derivative forward, torch.func.jvp: attention and its tangent are computed by the
    Triton kernel, or as they are written, by torch's math kernel. The kernels of flash and of xformers have no
    derivative forward, and that of group norms has none for a transposed view, which attention over pixels makes. The
    chosen backend comes back afterwards."""
    chosen = {layer: layer.processor for layer in _attentions(network)}
    norms = [module for module in network.modules() if isinstance(module, nn.GroupNorm)]
    try:
        for layer, processor in chosen.items():
            layer.set_processor(_other(processor, "sdpa") or processor)
        for norm in norms:
            norm.forward = partial(_laid_out, norm.forward)
        with sdpa_kernel(SDPBackend.MATH), _Tangents():
            yield
    finally:
        for norm in norms:
            del norm.forward
        for layer, processor in chosen.items():
            layer.set_processor(processor)


class _Tangents(TorchFunctionMode):
    """Attention that is differentiated forward goes to the Triton kernel, where it serves its arguments."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            return _with_tangent(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _with_tangent(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
                  is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """As scaled_dot_product_attention, with its tangent."""
    given = (query, key, value)
    if query.device.type not in TRITON or dropout_p or is_causal or enable_gqa or not has_tangent(*given):
        return F.scaled_dot_product_attention(*given, attn_mask, dropout_p, is_causal, scale=scale,
                                              enable_gqa=enable_gqa)
    from . import triton_attention as fused
    if query.dtype not in fused.DTYPES or not query.shape[-1] == value.shape[-1] <= fused.WIDEST:
        return F.scaled_dot_product_attention(*given, attn_mask, scale=scale)
    primals, tangents = zip(*(forward_ad.unpack_dual(tensor) for tensor in given), strict=True)
    tangents = [torch.zeros_like(p) if d is None else d for p, d in zip(primals, tangents, strict=True)]
    return forward_ad.make_dual(*fused.attention_jvp(*primals, *tangents, attn_mask, scale))


def _laid_out(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x.contiguous())


def has_tangent(*tensors: Tensor) -> bool:
    """Whether one of them is being differentiated forward, as the arguments of a function within torch.func.jvp are."""
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


# -- what a backend can serve
# -----------------------------------------------------------------------------------------------

def check_backend(backend: str, device: torch.device, dtype: torch.dtype, network: nn.Module | None = None) -> None:
    """RequestError if a backend cannot compute attention of this dtype on this device, or that of this network, which
    may be on the meta device and is changed."""
    if network is not None:
        set_attention(network, backend)
    if reason := refusal(backend, device, dtype, () if network is None else head_sizes(network)):
        raise RequestError(reason)


def refusal(backend: str, device: torch.device, dtype: torch.dtype, heads: Iterable[int] = ()) -> str | None:
    """Why a backend cannot compute attention of this dtype and these head sizes on this device; None if it can."""
    if backend == "xformers":
        return _xformers_refusal(device, dtype, heads)
    return _flash_refusal(device, dtype, heads) if backend == "flash" else None


def _xformers_refusal(device: torch.device, dtype: torch.dtype, heads: Iterable[int]) -> str | None:
    if not is_xformers_available():
        return "xformers is not installed: pip install xformers, or choose sdpa"
    if device.type != "cuda":
        return f"xformers has kernels for CUDA alone, and this runs on {device.type}: choose sdpa or flash"
    if dtype not in (*HALF, torch.float32):
        return f"xformers computes in 16 bits or float32, found {dtype}: choose sdpa"
    step = 8 if dtype in HALF else 4                    # 128 bits, in which its matrix products read
    if wrong := [size for size in heads if size % step]:
        return (f"xformers takes heads whose size is a multiple of {step} in {dtype}, and this network's are "
                f"{_listed(wrong)}: choose sdpa")
    return None


def _flash_refusal(device: torch.device, dtype: torch.dtype, heads: Iterable[int]) -> str | None:
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"torch has flash kernels for CUDA and the CPU, and this runs on {device.type}: choose sdpa"
    if dtype not in HALF:
        return (f"the flash kernel of CUDA computes in 16 bits alone, found {dtype}: let train.precision be bf16, "
                "or choose sdpa")
    if wrong := [size for size in heads if size > WIDEST_HEAD]:
        return (f"the flash kernel takes heads of at most {WIDEST_HEAD}, and this network's are {_listed(wrong)}: "
                "choose sdpa")
    if (found := torch.cuda.get_device_capability(device)) < OLDEST:
        return (f"the flash kernel takes a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, found "
                f"{found[0]}.{found[1]}: choose sdpa")
    return None


def head_sizes(network: nn.Module) -> tuple[int, ...]:
    """The widths of the heads of its attention, each once, ascending."""
    return tuple(sorted({layer.inner_dim // layer.heads for layer in _attentions(network)}))


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes))


def _attentions(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, Attention | AttentionModuleMixin)
            and not isinstance(module.processor, LINEAR)]


def _other(processor: Any, backend: str) -> Any | None:
    """A processor that computes the same by another backend; None if there is none."""
    if "_attention_backend" in dir(processor):
        other = copy(processor)
        other._attention_backend = DISPATCHER[backend]
        return other
    return next((row[backend]() for row in PROCESSORS if type(processor) in row.values()), None)
