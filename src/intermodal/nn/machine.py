"""What a processor does in hardware, and in which precision it multiplies for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are done in hardware: elsewhere PyTorch emulates them, several times slower than float32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_for(precision: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """bf16 autocast or nothing. "auto" asks the processor: without bf16 instructions, bf16 products are several times slower."""
    if precision == "auto":
        precision = "bf16" if multiplies_bf16(device) else "fp32"
    if precision in ("fp32", "fp64"):
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)
