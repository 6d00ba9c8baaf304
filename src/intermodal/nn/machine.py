"""What a processor does in hardware."""

from __future__ import annotations

import torch


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are done in hardware: elsewhere PyTorch emulates them, several times slower than float32."""
    return device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
