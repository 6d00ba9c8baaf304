"""Contrastive losses in tiles: no B x B matrix is ever held, on one rank or on many.

Each loss returns `(sum, count)`; the caller divides once, by the pairs of the whole step on all ranks. Shapes: B local pairs,
E embedding width, R ranks.

On R ranks every rank keeps its image embeddings; the text embeddings travel around a ring, a small block of them at a time, together
with what belongs to them (their gradient, for softmax their column statistics), and are home after R hops. A rank therefore holds a
few small blocks beside its own rows, and the memory of the loss does not grow with R. Gradients are computed in the same sweep as the
loss and handed out by `backward`: the loss is a scalar, so they only have to be scaled. All ranks must scale their loss alike, as a
training loop does anyway.

Sources: SigLIP section 3.3 (chunked loss, positives only in a rank's own block) and big_vision
`trainers/proj/image_text/siglip.py:303-306` (a sum over a row, a mean over rows); CLIP figure 3 and open_clip `loss.py:80-130`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError

TILE = 1024
BLOCKS = 64
"""A rank's texts travel in this many blocks, each of at least `LEAST_BLOCK` rows: smaller buffers against more messages."""
LEAST_BLOCK = 32
Duplicates = Literal["negative", "positive", "ignore"]


class RingLike(Protocol):
    """Neighbour exchange among ranks; `parallel.ring.Ring` is the real one."""

    rank: int
    size: int

    def start(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        """Send to the next rank, receive from the one before; the returned function waits and gives what arrived."""
        ...


class NoRing:
    """One rank: a block that is sent is home at once."""

    rank, size = 0, 1

    def start(self, tensors: list[Tensor]) -> Callable[[], list[Tensor]]:
        return lambda: tensors


def sigmoid_loss(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    groups: Tensor | None = None,
    duplicates: Duplicates = "negative",
    ring: RingLike | None = None,
    tile: int = TILE,
) -> tuple[Tensor, int]:
    """SigLIP's loss: every image-text pair is a yes-or-no question; sum over all pairs, to be divided by B and not by B squared.

    Args:
        image, text: (B, E) unit vectors; row i of one belongs to row i of the other.
        log_scale, bias: scalars; logits = exp(log_scale) * cosine + bias.
        groups: (B,) integers; pairs that share one show the same thing.
        duplicates: what an off-diagonal pair within a group is: a "negative" (the published loss), a "positive", or "ignore"d.
        ring: the ranks that share this batch.

    Returns:
        (sum over this rank's rows, B).

    Raises:
        InputError: pictures and texts are not pairs: another number of rows or another width, or groups of another number.
    """
    _check_pairs(image, text, groups)
    job = _Job(ring or NoRing(), groups, duplicates, tile)
    return _Sigmoid.apply(image, text, log_scale, bias, job), image.shape[0]  # pyright: ignore[reportReturnType]


def softmax_loss(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    *,
    groups: Tensor | None = None,
    duplicates: Duplicates = "negative",
    ring: RingLike | None = None,
    tile: int = TILE,
) -> tuple[Tensor, int]:
    """CLIP's loss: the mean of the cross entropies over texts for each image and over images for each text.

    `duplicates` "positive" spreads the target evenly over a row's positives; "ignore" takes them out of the row's softmax. Other
    arguments and the result are those of `sigmoid_loss`.
    """
    _check_pairs(image, text, groups)
    job = _Job(ring or NoRing(), groups, duplicates, tile)
    return _Softmax.apply(image, text, log_scale, job), image.shape[0]  # pyright: ignore[reportReturnType]


def _check_pairs(image: Tensor, text: Tensor, groups: Tensor | None) -> None:
    if image.ndim != 2 or image.shape != text.shape:
        raise InputError(
            f"a contrastive loss takes pairs, (B, E) of pictures and (B, E) of texts, not {tuple(image.shape)} and {tuple(text.shape)}"
        )
    if groups is not None and groups.shape != image.shape[:1]:
        raise InputError(f"`groups` has one integer a pair, ({len(image)},), not {tuple(groups.shape)}")


@dataclass
class _Job:
    ring: RingLike
    groups: Tensor | None
    duplicates: Duplicates
    tile: int

    def __post_init__(self) -> None:
        if self.duplicates not in ("negative", "positive", "ignore"):
            raise ValueError(f"duplicates must be negative, positive or ignore, not {self.duplicates!r}")
        if self.duplicates == "negative":
            self.groups = None
        elif self.groups is None:
            raise ValueError(f"duplicates={self.duplicates!r} needs `groups`, one integer a pair")


@dataclass
class _Tile:
    """A rectangle of the logits: rows of this rank's images, columns of the visiting block of texts."""

    rows: slice
    columns: slice
    offset: int | None = None
    """Which diagonal of the rectangle holds the pairs that belong together by position; None where it holds none."""
    same: Tensor | None = None
    """Boolean mask of pairs within a group, where groups count."""

    def pairs(self) -> tuple[slice, slice]:
        """The rows and the columns of the pairs on the diagonal."""
        assert self.offset is not None
        row, column = self.rows.start + max(0, -self.offset), self.columns.start + max(0, self.offset)
        count = min(self.rows.stop - row, self.columns.stop - column)
        return slice(row, row + count), slice(column, column + count)


def _tiles(job: _Job, count: int, width: int, first: int | None, columns_groups: Tensor | None) -> Iterator[_Tile]:
    """Rectangles over all `count` images and a block of `width` texts, whose first is text `first` where the block is at home."""
    for r in range(0, count, job.tile):
        rows = slice(r, min(r + job.tile, count))
        for c in range(0, width, job.tile):
            columns = slice(c, min(c + job.tile, width))
            tile = _Tile(rows, columns)
            if first is not None and -(rows.stop - r) < (offset := r - (first + c)) < columns.stop - c:
                tile.offset = offset
            if job.groups is not None and columns_groups is not None:
                tile.same = job.groups[rows, None] == columns_groups[None, columns]
            yield tile


def _ring_sweep(
    job: _Job, travelling: list[Tensor], visit: Callable[[list[Tensor], int | None], None], carried: list[Tensor]
) -> list[Tensor]:
    """Show every rank's rows of texts to this rank, block by block.

    `travelling` (texts, groups) does not change and moves on while `visit` computes; `carried` (gradients, statistics) is changed by
    `visit` in place and moves after it. Both have a text a row. `visit` gets a block of all of them and, where it is at home, the number of
    its first row. Returns `carried`, filled.
    """
    ring, count = job.ring, travelling[0].shape[0]
    step = count if ring.size == 1 else max(LEAST_BLOCK, -(-count // BLOCKS))
    for at in range(0, count, step):
        block, own = [t[at : at + step] for t in travelling], [c[at : at + step] for c in carried]
        moving = own
        for hop in range(ring.size):
            arrive = ring.start(block) if hop + 1 < ring.size else None
            visit([*block, *moving], at if hop == 0 else None)
            if ring.size > 1 and moving:
                moving = ring.start(moving)()  # one more hop than the texts need: the carried part must come home
            if arrive is not None:
                block = arrive()
        if ring.size > 1:
            for mine, arrived in zip(own, moving, strict=True):
                mine.copy_(arrived)
    return carried


def _upcast(*tensors: Tensor) -> list[Tensor]:
    """Losses are computed in float32, or in float64 where the embeddings are."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return [t.detach().to(dtype).contiguous() for t in tensors]


def _inner(a_BE: Tensor, b_BE: Tensor, tile: int) -> Tensor:
    """The sum of products in float64, a tile of rows at a time."""
    pieces = zip(a_BE.split(tile), b_BE.split(tile), strict=True)
    return torch.stack([(a.double() * b).sum() for a, b in pieces]).sum()


def _hand_out(ctx, grad: Tensor) -> list[Tensor]:
    """The gradients that forward made, scaled in place: a copy would double the memory of the loss.

    Raises:
        RuntimeError: a second backward through the same loss.
    """
    if ctx.gradients is None:
        raise RuntimeError("the gradients of this loss were handed out already; call the loss again for a second backward")
    gradients, ctx.gradients = ctx.gradients, None
    return [g.mul_(grad.to(g.dtype)) for g in gradients]


class _Sigmoid(torch.autograd.Function):
    """softplus(z) for every pair, minus z for the positives (softplus(-z) = softplus(z) - z). Gradient: sigmoid(z) - positive."""

    @staticmethod
    def forward(ctx, image, text, log_scale, bias, job: _Job):
        image_BE, text_BE, scale, shift = _upcast(image, text, log_scale.exp(), bias)
        scale_value = scale.item()
        need_grad = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float64, device=image.device)
        bias_grad = torch.zeros_like(total)
        image_grad = torch.zeros_like(image_BE) if need_grad else None

        def visit(block: list[Tensor], first: int | None) -> None:
            texts, texts_grad = block[0], block[-1] if need_grad else None
            groups = block[1] if job.groups is not None else None
            for tile in _tiles(job, image_BE.shape[0], texts.shape[0], first, groups):
                z = torch.addmm(shift, image_BE[tile.rows], texts[tile.columns].T, alpha=scale_value)
                dropped = _off_diagonal(tile) if job.duplicates == "ignore" and tile.same is not None else None
                if dropped is not None:
                    z.masked_fill_(dropped, -torch.inf)  # softplus and sigmoid are then 0: the pair does not exist
                total.add_(F.softplus(z).sum(dtype=torch.float64))
                if job.duplicates == "positive" and tile.same is not None:
                    total.sub_(z[tile.same].sum(dtype=torch.float64))
                elif tile.offset is not None:
                    total.sub_(z.diagonal(tile.offset).sum(dtype=torch.float64))
                if not need_grad:
                    continue
                g = z.sigmoid_()
                if job.duplicates == "positive" and tile.same is not None:
                    g.sub_(tile.same.to(g.dtype))
                elif tile.offset is not None:
                    g.diagonal(tile.offset).sub_(1)
                bias_grad.add_(g.sum(dtype=torch.float64))
                image_grad[tile.rows].addmm_(g, texts[tile.columns], alpha=scale_value)  # pyright: ignore[reportOptionalSubscript]
                texts_grad[tile.columns].addmm_(g.T, image_BE[tile.rows], alpha=scale_value)  # pyright: ignore[reportOptionalSubscript]

        travelling = [text_BE] + ([job.groups] if job.groups is not None else [])
        carried = _ring_sweep(job, travelling, visit, [torch.zeros_like(text_BE)] if need_grad else [])
        if image_grad is not None:
            # d z / d log_scale = scale * cosine, and image . image_grad sums exactly that times the gradient
            scale_grad = _inner(image_BE, image_grad, job.tile)
            ctx.gradients = [image_grad, carried[0], scale_grad.to(log_scale), bias_grad.to(bias)]
        return total.to(image_BE.dtype)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_hand_out(ctx, grad), None


def _off_diagonal(tile: _Tile) -> Tensor:
    """The same-group pairs of a tile that are not the pair itself."""
    mask = tile.same.clone()  # pyright: ignore[reportOptionalMemberAccess]
    if tile.offset is not None:
        mask.diagonal(tile.offset).fill_(False)
    return mask


class _Softmax(torch.autograd.Function):
    """Two sweeps: log-sum-exp of rows and columns, then gradients from tiles made again."""

    @staticmethod
    def forward(ctx, image, text, log_scale, job: _Job):
        image_BE, text_BE, scale = _upcast(image, text, log_scale.exp())
        scale_value = scale.item()
        spread = job.duplicates == "positive"
        rows = _Stats.empty(image_BE)

        def logits(tile: _Tile, texts: Tensor) -> Tensor:
            z = (image_BE[tile.rows] @ texts[tile.columns].T).mul_(scale_value)
            if job.duplicates == "ignore" and tile.same is not None:
                z.masked_fill_(_off_diagonal(tile), -torch.inf)
            return z

        def gather(block: list[Tensor], first: int | None) -> None:
            columns, groups = _Stats(block[-1]), block[1] if job.groups is not None else None
            for tile in _tiles(job, image_BE.shape[0], block[0].shape[0], first, groups):
                z = logits(tile, block[0])
                rows.add(tile.rows, z, 1)
                columns.add(tile.columns, z, 0)
                if spread and tile.same is not None:
                    hit = z.masked_fill(~tile.same, 0)
                    rows.hit(tile.rows, hit.sum(1), tile.same.sum(1))
                    columns.hit(tile.columns, hit.sum(0), tile.same.sum(0))
                elif tile.offset is not None:
                    pairs, (at_rows, at_columns) = z.diagonal(tile.offset), tile.pairs()
                    rows.hit(at_rows, pairs, torch.ones_like(pairs))
                    columns.hit(at_columns, pairs, torch.ones_like(pairs))

        travelling = [text_BE] + ([job.groups] if job.groups is not None else [])
        columns = _Stats(_ring_sweep(job, travelling, gather, [_Stats.empty(text_BE).table])[0])
        total = (rows.cross_entropy() + columns.cross_entropy()) / 2
        if any(ctx.needs_input_grad):
            image_grad, text_grad = _Softmax.gradients(job, image_BE, text_BE, rows, columns, logits, scale_value)
            scale_grad = _inner(image_BE, image_grad, job.tile)
            ctx.gradients = [image_grad, text_grad, scale_grad.to(log_scale)]
        return total.to(image_BE.dtype)

    @staticmethod
    def gradients(job: _Job, image_BE, text_BE, rows: _Stats, columns: _Stats, logits, scale_value) -> tuple[Tensor, Tensor]:
        """d loss / d z = (softmax over the row + softmax over the column) / 2 - target, tile by tile."""
        image_grad = torch.zeros_like(image_BE)
        row_lse, row_share = rows.lse, 0.5 / rows.table[:, 3].clamp(min=1)

        def push(block: list[Tensor], first: int | None) -> None:
            texts, column_table, texts_grad = block[0], block[-2], block[-1]
            groups = block[1] if job.groups is not None else None
            column_lse, column_share = _Stats(column_table).lse, 0.5 / column_table[:, 3].clamp(min=1)
            for tile in _tiles(job, image_BE.shape[0], texts.shape[0], first, groups):
                z = logits(tile, texts)
                g = (z - row_lse[tile.rows, None]).exp_()
                g.add_(z.sub_(column_lse[None, tile.columns]).exp_()).mul_(0.5)
                if job.duplicates == "positive" and tile.same is not None:
                    g.sub_(tile.same * (row_share[tile.rows, None] + column_share[None, tile.columns]))
                elif tile.offset is not None:
                    g.diagonal(tile.offset).sub_(1)
                image_grad[tile.rows].addmm_(g, texts[tile.columns], alpha=scale_value)
                texts_grad[tile.columns].addmm_(g.T, image_BE[tile.rows], alpha=scale_value)

        travelling = [text_BE] + ([job.groups] if job.groups is not None else []) + [columns.table]
        return image_grad, _ring_sweep(job, travelling, push, [torch.zeros_like(text_BE)])[0]

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return *_hand_out(ctx, grad), None


class _Stats:
    """What a cross entropy needs of each row (or column), gathered over tiles: one (B, 4) table, so that it travels as one tensor.

    Column 0: largest logit, 1: sum of exp(logit - largest), 2: sum of the positives' logits, 3: how many positives.
    """

    def __init__(self, table: Tensor):
        self.table = table

    @staticmethod
    def empty(like: Tensor) -> _Stats:
        table = like.new_zeros(like.shape[0], 4)
        table[:, 0] = -torch.inf
        return _Stats(table)

    def add(self, at: slice, z: Tensor, dim: int) -> None:
        top, total = self.table[at, 0], self.table[at, 1]
        new_top = torch.maximum(top, z.amax(dim))
        anchor = new_top.masked_fill(new_top == -torch.inf, 0)  # a tile may be empty of admitted pairs
        total.mul_((top - anchor).exp_()).add_((z - anchor.unsqueeze(dim)).exp_().sum(dim))
        top.copy_(new_top)

    def hit(self, at: slice, logits: Tensor, count: Tensor) -> None:
        self.table[at, 2] += logits
        self.table[at, 3] += count

    @property
    def lse(self) -> Tensor:
        return self.table[:, 0] + self.table[:, 1].log()

    def cross_entropy(self) -> Tensor:
        return (self.lse - self.table[:, 2] / self.table[:, 3]).sum(dtype=torch.float64)
