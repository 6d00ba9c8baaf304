"""One rank == two ranks == four ranks: loss and every gradient, through the real ring over gloo."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks

from intermodal import losses
from intermodal.losses import sigmoid_loss, softmax_loss

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import loss_ranks

PAIRS, WIDTH = 24, 12


def everything():
    generator = torch.Generator().manual_seed(3)
    image, text = (F.normalize(torch.randn(PAIRS, WIDTH, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    return (
        image,
        text,
        torch.arange(PAIRS) // 2 * (torch.arange(PAIRS) % 7 > 2) + 50 * torch.arange(PAIRS) * (torch.arange(PAIRS) % 7 <= 2),
    )


def share(rank, size, kind, duplicates):
    from intermodal.parallel.ring import Ring

    image, text, groups = everything()
    rows = slice(rank * PAIRS // size, (rank + 1) * PAIRS // size)
    leaves = [
        image[rows].clone().requires_grad_(),
        text[rows].clone().requires_grad_(),
        torch.tensor(1.3).double().requires_grad_(),
    ]
    if kind == "sigmoid":
        leaves.append(torch.tensor(-2.0).double().requires_grad_())
    ring = Ring() if size > 1 else None
    function = sigmoid_loss if kind == "sigmoid" else softmax_loss
    loss, count = function(*leaves, groups=groups[rows], duplicates=duplicates, ring=ring, tile=5)
    (loss / PAIRS).backward()
    return [loss.detach(), torch.tensor(count), *(leaf.grad for leaf in leaves)]


CASES = [(kind, duplicates) for kind in ("sigmoid", "softmax") for duplicates in ("negative", "positive", "ignore")]


def shares(rank, size, block=losses.LEAST_BLOCK):
    losses.LEAST_BLOCK = block  # in the rank's own process
    return [share(rank, size, *case) for case in CASES]


@pytest.mark.parametrize("block", [32, 5, 4], ids=["one block", "uneven blocks", "narrower than a tile"])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_process(size, block):
    alone, ranks = shares(0, 1), on_ranks(size, shares, block)
    for index, case in enumerate(CASES):
        mine, theirs = alone[index], [r[index] for r in ranks]
        summed = [sum(r[i] for r in theirs) for i in (0, 1)]
        gathered = [torch.cat([r[i] for r in theirs]) for i in (2, 3)]
        scalars = [sum(r[i] for r in theirs) for i in range(4, len(mine))]
        for a, b in zip(mine, [*summed, *gathered, *scalars], strict=True):
            torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}")


def test_memory_does_not_grow_with_the_ranks():
    """The same pairs a rank on 1, 2 and 4 ranks: within 5 %, where gathering everything doubles each time."""
    need = {size: on_ranks(size, loss_ranks.share, 1024, 64) for size in (1, 2, 4)}
    most = {size: {name: max(rank[name] for rank in found) for name in found[0]} for size, found in need.items()}
    for name in ("ring sigmoid", "ring softmax"):
        for size in (2, 4):
            assert most[size][name] <= 1.05 * most[1][name], (name, size)
    assert most[4]["gathered softmax"] > 3 * most[1]["gathered softmax"], "the count sees what grows"
