"""Keys and values of conversations under way, one slot a conversation, filled as they grow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Segments

GROW = 256
"""Tokens by which the buffers grow; they at least double, so that growing costs a constant a token."""


class Cache:
    """(layers, slots, 2 G, capacity, K): the G heads' keys, then their values. `lengths[slot]` tokens of a slot are valid.

    A step packs the new tokens of some slots (`begin`), every layer then calls `attend`, and `commit` makes them count.
    """

    def __init__(self, layers: int, slots: int, heads: int, head: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.shape, self.dtype, self.device = (layers, slots, heads, head), dtype, torch.device(device)
        self.capacity = 0
        self.store = self._room(0)
        self.lengths = [0] * slots
        self.slots: list[int] = []
        self.segments = Segments([])

    def _room(self, capacity: int) -> Tensor:
        layers, slots, heads, head = self.shape
        return torch.zeros(layers, slots, 2 * heads, capacity, head, dtype=self.dtype, device=self.device)

    def begin(self, slots: list[int], segments: Segments) -> None:
        """Announce the step: the packed tokens are `segments.lengths[i]` new ones of `slots[i]`."""
        self.slots, self.segments = slots, segments
        self.totals = [self.lengths[slot] + new for slot, new in zip(slots, segments.lengths, strict=True)]
        self.most = max(self.totals)
        if self.most > self.capacity:
            capacity = max(self.most, 2 * self.capacity, GROW)
            store = self._room(capacity)
            store[..., : self.capacity, :] = self.store
            self.store, self.capacity = store, capacity
            self.as_rows = self.seen = ()  # views of the old one, which can go
        self.single = segments.longest == 1
        """Whether every conversation has one new token: all but its prompt."""
        self.rows = None  # the first layer that is called fills in what is the same for all

    def _begin_single(self) -> None:
        """One new token of each: what is the same for all layers is made once, for small products the calls themselves take the time."""
        layers, _, heads, head = self.shape
        count, totals_N = len(self.slots), torch.tensor(self.totals)
        # where the new keys and values stand when a layer's store is seen as rows of K: one write for all, half the calls of two
        first_N = torch.tensor(self.slots) * 2 * heads * self.capacity + totals_N - 1
        self.rows = (first_N[:, None] + torch.arange(2 * heads) * self.capacity).flatten().to(self.device)
        self.as_rows = self.store.view(layers, -1, head).unbind(0)
        first = self.slots[0]
        together = self.slots == list(range(first, first + count))
        seen = (self.store[:, first : first + count] if together else self.store)[:, :, :, : self.most]
        self.seen = [half.unbind(0) for half in seen.chunk(2, dim=2)]
        self.chosen = None if together else torch.tensor(self.slots, device=self.device)
        self.mask = None
        if len(set(self.totals)) > 1:
            self.mask = (torch.arange(self.most)[None] < totals_N[:, None])[:, None, None].to(self.device)

    def commit(self) -> None:
        for slot, total in zip(self.slots, self.totals, strict=True):
            self.lengths[slot] = total

    def free(self, slot: int) -> None:
        """Forget a conversation; its slot can take another."""
        self.lengths[slot] = 0

    def attend(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float | None = None) -> Tensor:
        """Store the new keys and values and let the new queries see everything up to themselves: (T, H, K)."""
        if not q_THK.dtype == k_TGK.dtype == v_TGK.dtype == self.dtype:  # under autocast
            q_THK, k_TGK, v_TGK = (x.to(self.dtype) for x in (q_THK, k_TGK, v_TGK))
        if self.single:
            if self.rows is None:
                self._begin_single()
            assert self.rows is not None
            self.as_rows[layer].index_copy_(0, self.rows, torch.cat([k_TGK, v_TGK], 1).flatten(0, 1))
            k, v = (half[layer] if self.chosen is None else half[layer][self.chosen] for half in self.seen)
            # the heads of a group stand where several queries would: the kernel reads their keys once instead of once a head
            q_NGRK = q_THK.reshape(len(q_THK), k.shape[1], -1, q_THK.shape[2])
            return F.scaled_dot_product_attention(q_NGRK, k, v, attn_mask=self.mask, scale=scale).flatten(1, 2)
        store, gqa, pieces = self.store[layer], q_THK.shape[1] != k_TGK.shape[1], []
        for slot, total, q, k, v in zip(
            self.slots, self.totals, *(x.split(self.segments.lengths) for x in (q_THK, k_TGK, v_TGK)), strict=True
        ):
            start, mask = total - q.shape[0], None
            seen_k, seen_v = store[slot, :, :total].chunk(2)
            seen_k[:, start:], seen_v[:, start:] = k.transpose(0, 1), v.transpose(0, 1)
            if start:
                mask = torch.arange(total, device=q.device)[None] <= torch.arange(start, total, device=q.device)[:, None]
            out = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                seen_k[None],
                seen_v[None],
                attn_mask=mask,
                is_causal=not start,
                scale=scale,
                enable_gqa=gqa,
            )
            pieces.append(out[0].transpose(0, 1))
        return torch.cat(pieces)
