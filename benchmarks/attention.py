"""Attention of packed training batches, forward and backward, in bf16: scores as products against PyTorch's own kernel.

    python benchmarks/attention.py

Both are this library's `attention` under autocast, which chooses by length (`nn.attention.PRODUCT_LENGTH`); here each is made to take both.
Prints medians of interleaved runs, and the largest difference of an output.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from intermodal.nn import attention as packed
from intermodal.nn.machine import multiplies_bf16

MIXED = random.Random(0)
CASES = (
    ("64 pictures of 49 tokens, 12 heads", [49] * 64, 12, False),
    ("16 pictures of 197 tokens, 12 heads", [197] * 16, 12, False),
    ("64 texts of 77 tokens, 8 heads, causal", [77] * 64, 8, True),
    ("16 texts of 256 tokens, 8 heads, causal", [256] * 16, 8, True),
    ("32 conversations of 30 to 75 tokens, 8 heads, causal", [MIXED.randint(30, 75) for _ in range(32)], 8, True),
)
WIDTH = 64
"""Of a head."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--repeats", type=int, default=25)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if not multiplies_bf16(torch.device("cpu")):
        raise SystemExit("this processor does not multiply bf16, so training is in float32 here and the kernel does it all")
    table = Table(title=f"attention, forward and backward, bf16, {options.threads} threads")
    for column in ("batch", "products, ms", "kernel, ms", "ratio", "difference"):
        table.add_column(column)
    for name, lengths, heads, causal in CASES:
        segments = packed.Segments(lengths)
        q, k, v = (torch.randn(segments.total, heads, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        times: dict[int, list[float]] = {packed.PRODUCT_LENGTH: [], 0: []}
        outs = {}
        for repeat in range(options.repeats + 1):
            for longest, taken in times.items():
                usual, packed.PRODUCT_LENGTH = packed.PRODUCT_LENGTH, longest
                began = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16):
                    outs[longest] = packed.attention(q, k, v, segments, causal=causal)
                outs[longest].sum().backward()
                packed.PRODUCT_LENGTH = usual
                if repeat:  # the first is a warm-up
                    taken.append(time.perf_counter() - began)
        products, kernel = (statistics.median(taken) for taken in times.values())
        one, other = outs.values()
        difference = (one - other).abs().max().item()
        table.add_row(name, f"{products * 1e3:.1f}", f"{kernel * 1e3:.1f}", f"{kernel / products:.1f}x", f"{difference:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
