"""A decoder's weights laid out for products with few rows: in oneDNN's blocked format, once for a whole generation on the CPU.

A plain weight is read slowly there: in bf16 every product lays it out anew, in float32 MKL's kernels do without AVX-512 on some processors.
Measured on two cores that read memory at 40 to 55 GB/s: 12 to 20 GB/s of a plain weight, 28 to 43 of one laid out (`benchmarks/decode.py`).
The two operators are those that `torch.compile` puts in the place of a linear layer with frozen weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROWS = 8
"""What oneDNN is told to expect; any number of rows can be multiplied."""
CGROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Where a container's limit and what it uses of it stand, by version."""


class LaidOutLinear:
    """Linear layers that read one input, as one product: (T, in) -> (T, all their outputs side by side). For inference: it has no
    gradient, and does not follow when the weights change."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = bias

    @classmethod
    def of(cls, *layers: nn.Linear) -> LaidOutLinear:
        """All of them with a bias, or none."""
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        return cls(torch.cat([layer.weight.detach() for layer in layers]), torch.cat(biases) if biases else None)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x_TD, self.weight, self.bias, "none", [], "")


@dataclass(frozen=True)
class LaidOutLayer:
    """One layer's products: queries, keys and values; the attention's output; gate and up; down."""

    qkv: LaidOutLinear
    out: LaidOutLinear
    gate_up: LaidOutLinear
    down: LaidOutLinear


@dataclass(frozen=True)
class Layout:
    """A decoder's products, beside its plain weights. It belongs to one generation, and hangs on its cache, or to a frozen model."""

    layers: Sequence[LaidOutLayer]
    head: LaidOutLinear


class KeptLayout:
    """The layout of a model whose weights do not change, for all its generations. A copy or a pickle of the model begins without it."""

    def __init__(self):
        self.layout: Layout | None = None
        self.made = False

    def __reduce__(self) -> tuple[type[KeptLayout], tuple[()]]:
        return KeptLayout, ()


def can_lay_out(layers: Sequence[nn.Linear], head: Tensor, kind: type[nn.Linear]) -> bool:
    """Whether plain layers of a `kind`, without hooks, hold weights of one type that oneDNN multiplies, and the machine has twice their
    size to spare."""
    weights = [head, *(layer.weight for layer in layers)]
    plain = all(type(layer) is kind and not layer._forward_hooks and not layer._forward_pre_hooks for layer in layers)
    if not (
        plain and torch.backends.mkldnn.is_available() and all(type(weight.data) is Tensor and weight.is_cpu for weight in weights)
    ):
        return False
    types = {weight.dtype for weight in weights}
    known = {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())
    return len(types) == 1 and types <= known and 2 * sum(weight.nbytes for weight in weights) <= _spare_memory()


def _spare_memory() -> int:
    """Bytes that Linux could give without swapping, within the container's limit; 0 where there is no telling."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.exists() else []
    spare = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)
    for limit, used in CGROUPS:
        said = [path.read_text().strip() for name in (limit, used) if (path := Path("/sys/fs/cgroup") / name).exists()]
        if len(said) == 2 and said[0].isdigit():
            spare = min(spare, int(said[0]) - int(said[1]))
    return spare
