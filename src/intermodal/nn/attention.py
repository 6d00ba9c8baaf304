"""Attention over packed sequences: one token axis, many sequences end to end, no padding.

Shape legend (library-wide): B batch, N sequences, T packed tokens, L tokens of one sequence, P patches, D width, H heads,
G key/value heads, K head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .machine import multiplies_bf16

# Queries handled at once when a window makes most of the L x L scores unnecessary.
WINDOW_BLOCK = 128
# The CPU's kernel is slower in bf16 than in float32 on sequences up to about this length: forward a little, backward twice.
FLOAT_LENGTH = 1024
PRODUCT_LENGTH = 256
"""Up to this length, under autocast on a CPU that multiplies bf16, all L x L scores are made as bf16 products: 1.6 to 2.7 times as fast as
the kernel, forward and backward (benchmarks/attention.py). Scores are rounded to bf16 then, as autocast rounds every product."""


class Segments:
    """The lengths of sequences that lie end to end on one token axis.

    Lengths are Python integers, known before any tensor work: grouping them costs no device synchronisation and is done once a
    batch, then shared by all layers.
    """

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(int(length) for length in lengths)
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"sequence lengths must be at least 1, got {self.lengths}")

    def __len__(self) -> int:
        return len(self.lengths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Segments) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return hash(self.lengths)

    def __repr__(self) -> str:
        return f"Segments({self.lengths!r})"

    @property
    def total(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def offsets(self) -> Tensor:
        """(N + 1,) int64 on the CPU: where each sequence starts, and the end of the last."""
        return torch.tensor((0, *self.lengths)).cumsum(0)

    @cached_property
    def positions(self) -> Tensor:
        """(T,) int64: 0, 1, 2, ... within each sequence."""
        starts = torch.repeat_interleave(self.offsets[:-1], torch.tensor(self.lengths, dtype=torch.long))
        return torch.arange(self.total) - starts

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """(N + 1,) int32 on `device`, as varlen kernels want it."""
        return self.offsets.to(device=device, dtype=torch.int32)

    @cached_property
    def padded(self) -> tuple[Tensor, list[tuple[int, int]]]:
        """(T,) where each token stands on an axis on which sequences are padded at their end to the longest of a group, and how many of
        what length each group holds, in order. A group's sequences are longer than half of its longest."""
        order = sorted(range(len(self)), key=self.lengths.__getitem__, reverse=True)
        starts, groups, row = [0] * len(self), [], 0
        for which in order:
            if not groups or 2 * self.lengths[which] <= groups[-1][1]:
                groups.append((0, self.lengths[which]))
            count, longest = groups[-1]
            starts[which], groups[-1], row = row, (count + 1, longest), row + longest
        return torch.repeat_interleave(torch.tensor(starts), torch.tensor(self.lengths)) + self.positions, groups

    @cached_property
    def order(self) -> Tensor:
        """(N,) the sequences from short to long, equal lengths in their given order."""
        return torch.argsort(torch.tensor(self.lengths), stable=True)

    def tokens_of(self, order: Tensor) -> Tensor:
        """(T,) index that lays the sequences out in `order` on the token axis."""
        starts = self.offsets[:-1][order]
        lengths = torch.tensor(self.lengths, dtype=torch.long)[order]
        ends = lengths.cumsum(0)
        return torch.arange(self.total) + torch.repeat_interleave(starts - (ends - lengths), lengths)

    @cached_property
    def by_length(self) -> Segments:
        """The same sequences sorted by length, so that equal ones are neighbours."""
        return Segments([self.lengths[i] for i in self.order.tolist()])


class _Permute(torch.autograd.Function):
    """`x[order]` whose backward is a gather by the inverse, not the serial scatter-add of `index_select`."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class _Spread(torch.autograd.Function):
    """Rows to their places among `rows` ones, zeros elsewhere; no two to one place, so that backward is a gather."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(places)
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, places, x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return grad.index_select(0, places), None, None


class _Collect(torch.autograd.Function):
    """What `_Spread` has spread."""

    @staticmethod
    def forward(ctx, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, places, grad), None


def attention(
    q_THK: Tensor,
    k_TGK: Tensor,
    v_TGK: Tensor,
    segments: Segments,
    kv_segments: Segments | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention inside each packed sequence; sequences never see each other.

    Args:
        q_THK: (T, H, K) queries.
        k_TGK, v_TGK: (T', G, K) keys and values; G divides H (grouped-query attention).
        segments: lengths of the query sequences, summing to T.
        kv_segments: lengths of the key sequences where they differ from the queries' (pooling by a probe, cross attention).
        causal: a token sees itself and what is before it in its own sequence.
        window: (left, right) how many tokens before and after a token sees; -1 means no bound. `causal` makes right 0.
        dropout: probability of dropping a score (training only, the caller passes 0 in eval).

    Returns:
        (T, H, K) in the dtype of the queries.

    Raises:
        ValueError: lengths that do not sum to the tokens given, or a causal or windowed call across different lengths.
    """
    kv = kv_segments or segments
    if segments.total != q_THK.shape[0] or kv.total != k_TGK.shape[0] or len(kv) != len(segments):
        raise ValueError(
            f"packed lengths do not fit: {len(segments)} query sequences of {segments.total} tokens for {q_THK.shape[0]} queries, "
            f"{len(kv)} key sequences of {kv.total} tokens for {k_TGK.shape[0]} keys"
        )
    if (causal or window) and kv.lengths != segments.lengths:
        raise ValueError("causal and windowed attention need queries and keys of the same lengths")
    if causal:
        window = (window[0], 0) if window else None
    if q_THK.is_cuda and q_THK.dtype in (torch.float16, torch.bfloat16) and dropout == 0.0:
        return _varlen_cuda(q_THK, k_TGK, v_TGK, segments, kv, causal, window, scale)
    if window is None and not dropout and _multiplies_scores(q_THK, max(segments.longest, kv.longest)):
        q, k, v = (x.bfloat16() for x in (q_THK, k_TGK, v_TGK))  # before anything is moved: half the bytes
        if causal and len(set(segments.lengths)) > 1:
            out_THK = _padded(q, k, v, segments, scale)
        else:
            out_THK = _grouped(q, k, v, segments, kv, causal, window, dropout, scale, products=True)
        return out_THK.to(v_TGK.dtype)
    return _grouped(q_THK, k_TGK, v_TGK, segments, kv, causal, window, dropout, scale)


def _varlen_cuda(q, k, v, segments: Segments, kv: Segments, causal, window, scale) -> Tensor:
    """FlashAttention's variable-length kernel. Not run on the development machine (no GPU); see docs/nn.md."""
    from torch.nn.attention.varlen import varlen_attn

    left, right = window if window else (-1, 0 if causal else -1)
    return varlen_attn(  # pyright: ignore[reportReturnType]
        q,
        k,
        v,
        segments.cu_seqlens(q.device),
        kv.cu_seqlens(k.device),
        segments.longest,
        kv.longest,
        scale=scale,
        window_size=(left, right),
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _multiplies_scores(q: Tensor, longest: int) -> bool:
    return (
        q.device.type == "cpu"
        and longest <= PRODUCT_LENGTH
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and q.dtype != torch.float64
        and multiplies_bf16(q.device)
    )


def _padded(q, k, v, segments: Segments, scale) -> Tensor:
    """Causal products of sequences of many lengths: what pads the end of one is seen by none of its own tokens."""
    places, groups = segments.padded
    rows = [count * length for count, length in groups]
    spread = [_Spread.apply(x, places, sum(rows)).split(rows) for x in (q, k, v)]  # pyright: ignore[reportAttributeAccessIssue]
    pieces = []
    for (count, length), *parts in zip(groups, *spread, strict=True):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        out = _products(q, k, v, True, scale)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
    return _Collect.apply(torch.cat(pieces), places)  # pyright: ignore[reportReturnType]


def _products(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """(N, H, L, K) x (N, G, L', K) -> (N, H, L, K), all of it bf16. The queries of a group of heads stand below one another."""
    (count, heads, length, width), kv_heads = q.shape, k.shape[1]
    with torch.autocast("cpu", enabled=False):
        q_BLK, k_BLK, v_BLK = (x.reshape(count * kv_heads, -1, width) for x in (q, k, v))
        alpha = width**-0.5 if scale is None else scale
        if causal:
            mask_LL = torch.full((length, length), -torch.inf, dtype=q_BLK.dtype).triu(1).repeat(heads // kv_heads, 1)
            scores = torch.baddbmm(mask_LL.expand(len(q_BLK), -1, -1), q_BLK, k_BLK.mT, alpha=alpha)
        else:
            scores = torch.bmm(q_BLK * alpha, k_BLK.mT)
        return torch.bmm(scores.softmax(-1), v_BLK).view(count, heads, length, width)


def _grouped(q, k, v, segments: Segments, kv: Segments, causal, window, dropout, scale, products: bool = False) -> Tensor:
    """Sequences of equal length become one batched call; a batch that is sorted by length is never copied."""
    shapes = list(zip(segments.lengths, kv.lengths, strict=True))
    restore = None
    if shapes != sorted(shapes):
        order = torch.tensor(sorted(range(len(shapes)), key=shapes.__getitem__))
        q, restore = _permute(q, segments, order)
        k, _ = _permute(k, kv, order)
        v, _ = _permute(v, kv, order)
        shapes.sort()
    runs = [(shape, len(list(run))) for shape, run in groupby(shapes)]
    # split, not slices: its backward writes every gradient once instead of filling a zero tensor a run
    parts_q = q.split([lq * count for (lq, _), count in runs])
    parts_k, parts_v = (x.split([lk * count for (_, lk), count in runs]) for x in (k, v))
    pieces = []
    for ((lq, lk), count), part_q, part_k, part_v in zip(runs, parts_q, parts_k, parts_v, strict=True):
        q_NHLK = part_q.unflatten(0, (count, lq)).transpose(1, 2)
        k_NGLK = part_k.unflatten(0, (count, lk)).transpose(1, 2)
        v_NGLK = part_v.unflatten(0, (count, lk)).transpose(1, 2)
        if products:
            out = _products(q_NHLK, k_NGLK, v_NGLK, causal, scale)
        else:
            out = _equal_lengths(q_NHLK, k_NGLK, v_NGLK, causal, window, dropout, scale)
        pieces.append(out.transpose(1, 2).flatten(0, 1))
    out_THK = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out_THK if restore is None else _Permute.apply(out_THK, *restore)  # pyright: ignore[reportReturnType]


def _permute(x: Tensor, segments: Segments, order: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    tokens = segments.tokens_of(order).to(x.device)
    inverse = torch.argsort(tokens)
    return _Permute.apply(x, tokens, inverse), (inverse, tokens)  # pyright: ignore[reportReturnType]


def _equal_lengths(q, k, v, causal, window, dropout, scale) -> Tensor:
    """(N, H, L, K) x (N, G, L', K) -> (N, H, L, K)."""
    if q.device.type == "cpu" and q.shape[2] <= FLOAT_LENGTH and torch.bfloat16 in (q.dtype, k.dtype, v.dtype):
        with torch.autocast("cpu", enabled=False):  # it would make bf16 of them again
            return _equal_lengths(q.float(), k.float(), v.float(), causal, window, dropout, scale).to(v.dtype)
    gqa = q.shape[1] != k.shape[1]
    length = q.shape[2]
    if window is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa)
    left, right = (length if side < 0 else side for side in window)
    blocks = []
    for start in range(0, length, WINDOW_BLOCK):
        stop = min(start + WINDOW_BLOCK, length)
        low, high = max(0, start - left), min(length, stop + right)
        distance = torch.arange(low, high, device=q.device)[None] - torch.arange(start, stop, device=q.device)[:, None]
        mask = (distance >= -left) & (distance <= right)
        keys, values = k[:, :, low:high], v[:, :, low:high]
        block = F.scaled_dot_product_attention(
            q[:, :, start:stop], keys, values, attn_mask=mask, dropout_p=dropout, scale=scale, enable_gqa=gqa
        )
        blocks.append(block)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
