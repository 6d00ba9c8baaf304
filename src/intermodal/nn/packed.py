"""A decoder's weights laid out for products with few rows: in oneDNN's blocked format, once for a whole generation on the CPU.

A plain weight is read slowly there: in bf16 every product lays it out anew, in float32 MKL's kernels do without AVX-512 on some processors.
Measured on two cores that read memory at 40 to 55 GB/s: 12 to 20 GB/s of a plain weight, 28 to 43 of one laid out (`benchmarks/decode.py`).
The two operators are those that `torch.compile` puts in the place of a linear layer with frozen weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

ROWS = 8
"""What oneDNN is told to expect; any number of rows can be multiplied."""


class PackedLinear:
    """Linear layers that read one input, as one product: (T, in) -> (T, all their outputs side by side). It does not follow when their
    weights change."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = bias

    @classmethod
    def of(cls, *layers: nn.Linear) -> PackedLinear:
        """All of them with a bias, or none."""
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        return cls(torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TD, self.weight, self.bias, "none", [], "")


def can_pack(weight: Tensor, size: int) -> bool:
    """Whether weights like this one can be laid out, and the machine has twice the `size` bytes of the copy to spare."""
    if not (weight.is_cpu and torch.backends.mkldnn.is_available()) or torch.is_autocast_enabled("cpu"):
        return False
    known = weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return known and 2 * size <= _spare_memory()


def _spare_memory() -> int:
    """Bytes that Linux could give without swapping; 0 where there is no telling."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
