"""Memory of the loss on each rank against the number of ranks, at a constant batch a rank.

    python benchmarks/loss_ranks.py [--batch 1024] [--width 512] [--ranks 1 2 4 8]

Counts the bytes of tensors that are alive at the worst moment of forward and backward beyond the inputs (a TorchDispatchMode that
follows every storage), so that neither the allocator's nor gloo's own buffers blur it. The ring's buffers are torch tensors and are
counted. The peer is open_clip's gather with gradients and local loss.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "properties"))


class PeakBytes(TorchDispatchMode):
    """Bytes of storages made under it: alive now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage) -> None:
        key = storage._cdata
        if key in self.known and self.known[key]() is not None:
            return
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone(_, size=size, key=key):
            self.alive -= size
            self.known.pop(key, None)

        self.known[key] = weakref.ref(storage, gone)


def share(rank: int, size: int, batch: int, width: int) -> dict[str, float]:
    import plain

    from intermodal.losses import sigmoid_loss, softmax_loss
    from intermodal.parallel.ring import Ring

    ring = Ring() if size > 1 else None
    out = {}
    for name in ("ring sigmoid", "ring softmax", "gathered softmax"):
        torch.manual_seed(rank)
        image, text = (torch.nn.functional.normalize(torch.randn(batch, width), dim=-1).requires_grad_() for _ in range(2))
        log_scale, bias = torch.tensor(2.3).requires_grad_(), torch.tensor(-10.0).requires_grad_()
        leaves = [image, text, log_scale, bias]
        with PeakBytes() as counter:
            if name == "ring sigmoid":
                total, count = sigmoid_loss(image, text, log_scale, bias, ring=ring, tile=256)
                torch.autograd.grad(total / count, leaves)
            elif name == "ring softmax":
                total, count = softmax_loss(image, text, log_scale, ring=ring, tile=256)
                torch.autograd.grad(total / count, leaves[:3])
            elif size > 1:
                torch.autograd.grad(plain.gathered_softmax_loss(image, text, log_scale), leaves[:3])
            else:
                torch.autograd.grad(plain.softmax_loss(image, text, log_scale), leaves[:3])
        out[name] = counter.peak / 1e6
    return out


def main() -> None:
    from ranks import on_ranks

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    rows = {}
    for size in arguments.ranks:
        found = on_ranks(size, share, arguments.batch, arguments.width)
        rows[size] = {name: max(rank[name] for rank in found) for name in found[0]}
        print(f"{size} ranks: " + ", ".join(f"{name} {value:.1f} MB" for name, value in rows[size].items()), flush=True)
    first, last = arguments.ranks[0], arguments.ranks[-1]
    for name in rows[first]:
        print(f"{name}: {last} ranks need {rows[last][name] / rows[first][name]:.3f}x the memory of {first}")


if __name__ == "__main__":
    main()
