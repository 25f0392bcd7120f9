"""Attention and its derivative forward in one pass of a Triton kernel, which never writes the matrix of weights.

With S = scale Q K^T, P = softmax(S) and O = P V, the tangent is

    dS = scale (dQ K^T + Q dK^T)
    dO = P dV + (P * dS) V - rowsum(P * dS) * O

whose three sums over keys are kept as flash attention keeps its own: by blocks of keys, rescaled where a row's largest
score grows (Dao et al. 2022, arXiv:2205.14135; with tangents, Lu & Song 2024, arXiv:2410.11081, appendix F).
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDEST = 256                                       # of a head, whose tiles must lie in a multiprocessor's memory
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def attention_jvp(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None = None,
                  scale: float | None = None) -> tuple[Tensor, Tensor]:
    """O and dO, both (B, H, M, D) in the dtype of q. No gradient flows back through them.

    q, dq (B, H, M, D), k, dk, v, dv (B, H, N, D), of one dtype of DTYPES on one GPU, D at most WIDEST. mask: added to
    the scores, of a shape that broadcasts to (B, H, M, N); where it is boolean, False leaves a key out. scale: D^(-1/2)
    unless given. A row without keys is 0.
    """
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        mask = mask.to(torch.float32).expand(*q.shape[:3], k.shape[2])
    return _attention_jvp(q, k, v, dq, dk, dv, mask, q.shape[-1] ** -0.5 if scale is None else scale)


@torch.library.custom_op("stepdistill::attention_jvp", mutates_args=())
def _attention_jvp(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None,
                   scale: float) -> tuple[Tensor, Tensor]:
    """As an operator of torch, so that torch.func hands over plain tensors, and torch.compile leaves it whole."""
    batch, heads, rows, width = q.shape
    given = [tensor.contiguous() for tensor in (q, k, v, dq, dk, dv)]
    out, dout = torch.empty_like(given[0]), torch.empty_like(given[0])
    block_d = max(16, triton.next_power_of_2(width))
    block_m, block_n = (64, 64) if block_d <= 64 else (64, 32) if block_d <= 128 else (32, 32)
    strides = (0, 0, 0, 0) if mask is None else mask.stride()
    _kernel[(triton.cdiv(rows, block_m), batch * heads)](
        *given, q if mask is None else mask, out, dout, scale, *strides, heads, rows, k.shape[2], width,
        MASKED=mask is not None, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4, num_stages=2)
    return out, dout


@_attention_jvp.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, dq: Tensor, dk: Tensor, dv: Tensor, mask: Tensor | None,
      scale: float) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))


@triton.jit
def _kernel(q, k, v, dq, dk, dv, mask, out, dout, scale, mask_b, mask_h, mask_m, mask_n, heads, rows, keys, width,
            MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_D: tl.constexpr):
    """One block of rows of one head. Tensors (B * H, rows or keys, width), contiguous."""
    head = tl.program_id(1).to(tl.int64)
    at_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at_d = tl.arange(0, BLOCK_D)
    here = (at_m < rows)[:, None] & (at_d < width)[None, :]
    own = head * rows * width + at_m[:, None] * width + at_d[None, :]
    Q, dQ = tl.load(q + own, mask=here, other=0.0), tl.load(dq + own, mask=here, other=0.0)
    largest, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    slope, O = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dO = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first in range(0, keys, BLOCK_N):
        at_n = first + tl.arange(0, BLOCK_N)
        there = (at_n < keys)[:, None] & (at_d < width)[None, :]
        other = head * keys * width + at_n[:, None] * width + at_d[None, :]
        K, dK = tl.load(k + other, mask=there, other=0.0), tl.load(dk + other, mask=there, other=0.0)
        V, dV = tl.load(v + other, mask=there, other=0.0), tl.load(dv + other, mask=there, other=0.0)
        S = tl.dot(Q, tl.trans(K), input_precision=PRECISION) * scale
        dS = tl.dot(dQ, tl.trans(K), input_precision=PRECISION)
        dS = (dS + tl.dot(Q, tl.trans(dK), input_precision=PRECISION)) * scale
        if MASKED:
            place = (head // heads) * mask_b + (head % heads) * mask_h + at_m[:, None] * mask_m + at_n[None, :] * mask_n
            S += tl.load(mask + place, mask=(at_m < rows)[:, None] & (at_n < keys)[None, :], other=0.0)
        S = tl.where((at_n < keys)[None, :], S, float("-inf"))
        grown = tl.maximum(largest, tl.max(S, 1))
        level = tl.where(grown == float("-inf"), 0.0, grown)          # a row that has seen no key yet
        P, kept = tl.exp(S - level[:, None]), tl.exp(largest - level)
        PdS = P * dS
        total, slope = total * kept + tl.sum(P, 1), slope * kept + tl.sum(PdS, 1)
        O = O * kept[:, None] + tl.dot(P.to(V.dtype), V, input_precision=PRECISION)
        dO = dO * kept[:, None] + tl.dot(P.to(V.dtype), dV, input_precision=PRECISION)
        dO += tl.dot(PdS.to(V.dtype), V, input_precision=PRECISION)
        largest = grown
    total = tl.where(total == 0.0, 1.0, total)
    O = O / total[:, None]
    dO = dO / total[:, None] - (slope / total)[:, None] * O
    tl.store(out + own, O.to(out.dtype.element_ty), mask=here)
    tl.store(dout + own, dO.to(dout.dtype.element_ty), mask=here)
