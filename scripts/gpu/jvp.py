"""Attention with its derivative forward, one Triton kernel: its time beside the forward of torch's flash kernel (of
float32 torch's own choice), the memory that it adds to its arguments and results, and its relative error to float64.

What it is held against: at most 2.5 times the flash forward's time, memory linear in the length, errors of at most 1e-2
in bf16 and 1e-5 in fp32.
"""
from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from common import Clock, Record, device_of, parser, sync
from torch import Tensor
from torch.cuda import Event
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepdistill.models.triton_attention import attention_jvp  # alone here: it wants Triton

HEADS, WIDTH = 24, 64                              # of SD3.5-medium
LENGTHS = (1024, 4096, 16384)                      # tokens of 512, 1024 and 2048 px
EXACT = 4096                                       # above it float64 would write too large a matrix
ROUNDS = 20
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def main() -> None:
    args = parser(__doc__).parse_args()
    clock, device = Clock(args.seconds), device_of(args)
    record = Record("jvp", args, device)
    # Triton's interpreter has no bfloat16
    cases = [("fp16", 40), ("fp32", 40)] if args.tiny else [(name, n) for n in LENGTHS for name in ("bf16", "fp32")]
    size = (2, 16) if args.tiny else (HEADS, WIDTH)
    for name, length in cases:
        key = f"{name} {length}"
        if not record.has(key) and clock.left > 5:
            record.add(key, measure(DTYPES[name], length, *size, device))
            print(key, record.figures[key])
    record.close()


def measure(dtype: torch.dtype, length: int, heads: int, width: int, device: torch.device) -> dict[str, Any]:
    made = torch.Generator(device).manual_seed(0)
    given = [torch.randn(1, heads, length, width, device=device, generator=made).to(dtype) for _ in range(6)]
    found: dict[str, Any] = {"heads": heads, "width": width, "length": length}
    if length <= EXACT:
        for name, mine, exact in zip(("error", "tangent_error"), attention_jvp(*given), known(given), strict=True):
            found[name] = ((mine.double() - exact).norm() / exact.norm()).item()
    if device.type != "cuda":
        return found
    forward = lambda: F.scaled_dot_product_attention(*given[:3])
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if dtype != torch.float32 else sdpa_kernel(list(FUSED)):
        flash = milliseconds(forward, device)
    own = milliseconds(lambda: attention_jvp(*given), device)
    return found | {"forward_ms": flash, "jvp_ms": own, "ratio": own / flash, "added_mb": added(given, device)}


FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def known(given: list[Tensor]) -> tuple[Tensor, Tensor]:
    q, k, v, *tangents = (tensor.double() for tensor in given)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(F.scaled_dot_product_attention, (q, k, v), tuple(tangents))


def milliseconds(work: Callable[[], Any], device: torch.device) -> float:
    for _ in range(3):
        work()
    sync(device)
    taken = []
    for _ in range(ROUNDS):
        start, end = Event(enable_timing=True), Event(enable_timing=True)
        start.record()
        work()
        end.record()
        sync(device)
        taken.append(start.elapsed_time(end))
    return median(taken)


def added(given: list[Tensor], device: torch.device) -> float:
    """Megabytes at the peak beyond arguments and results."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    made = attention_jvp(*given)
    sync(device)
    return (torch.cuda.max_memory_allocated(device) - before - sum(tensor.nbytes for tensor in made)) / 1e6


if __name__ == "__main__":
    main()
