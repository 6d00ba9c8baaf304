"""Keys and values of conversations under way, one slot a conversation, filled as they grow."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Segments
from .laid_out import Layout

GROW = 256
"""Tokens by which the buffers grow; they at least double, so that growing costs a constant a token."""


class Cache:
    """(layers, slots, G, capacity, K) keys and values. `lengths[slot]` tokens of a slot are valid.

    A step packs the new tokens of some slots (`begin`), every layer then calls `attend`, and `commit` makes them count.
    """

    def __init__(self, layers: int, slots: int, heads: int, head: int, *, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.shape, self.dtype, self.device = (layers, slots, heads, head), dtype, torch.device(device)
        self.capacity = 0
        self.keys = self.values = self._room(0)
        self.lengths = [0] * slots
        self.slots: list[int] = []
        self.segments = Segments([])
        self.layout: Layout | None = None
        """The decoder's products for the steps to come, where they are not the plain ones."""

    def _room(self, capacity: int) -> Tensor:
        layers, slots, heads, head = self.shape
        return torch.zeros(layers, slots, heads, capacity, head, dtype=self.dtype, device=self.device)

    def begin(self, slots: list[int], segments: Segments) -> None:
        """Announce the step: the packed tokens are `segments.lengths[i]` new ones of `slots[i]`."""
        self.slots, self.segments = slots, segments
        self.totals = [self.lengths[slot] + new for slot, new in zip(slots, segments.lengths, strict=True)]
        needed = max(self.totals)
        if needed > self.capacity:
            capacity = max(needed, 2 * self.capacity, GROW)
            keys, values = self._room(capacity), self._room(capacity)
            keys[..., : self.capacity, :], values[..., : self.capacity, :] = self.keys, self.values
            self.keys, self.values, self.capacity = keys, values, capacity
        self.single = segments.longest == 1
        self.mask = None
        if self.single:
            self.at = (
                torch.tensor(slots, device=self.device),
                torch.tensor([total - 1 for total in self.totals], device=self.device),
            )
            reach = torch.arange(needed, device=self.device)
            if len(set(self.totals)) > 1:
                self.mask = (reach[None] < torch.tensor(self.totals, device=self.device)[:, None])[:, None, None]

    def commit(self) -> None:
        for slot, total in zip(self.slots, self.totals, strict=True):
            self.lengths[slot] = total

    def free(self, slot: int) -> None:
        """Forget a conversation; its slot can take another."""
        self.lengths[slot] = 0

    def attend(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGK: Tensor, scale: float | None = None) -> Tensor:
        """Store the new keys and values and let the new queries see everything up to themselves: (T, H, K)."""
        keys, values = self.keys[layer], self.values[layer]
        q_THK, k_TGK, v_TGK = (x.to(self.dtype) for x in (q_THK, k_TGK, v_TGK))  # under autocast they come in another type
        if self.single:
            slots, places = self.at
            keys[slots, :, places], values[slots, :, places] = k_TGK, v_TGK
            most = max(self.totals)
            every = self.slots == list(range(self.shape[1]))
            k, v = (x[:, :, :most] if every else x[slots, :, :most] for x in (keys, values))
            # the heads of a group stand where several queries would: the kernel reads their keys once instead of once a head
            q_NGRK = q_THK.unflatten(1, (k.shape[1], -1))
            return F.scaled_dot_product_attention(q_NGRK, k, v, attn_mask=self.mask, scale=scale).flatten(1, 2)
        gqa, pieces = q_THK.shape[1] != k_TGK.shape[1], []
        for slot, total, q, k, v in zip(
            self.slots, self.totals, *(x.split(self.segments.lengths) for x in (q_THK, k_TGK, v_TGK)), strict=True
        ):
            start = total - q.shape[0]
            keys[slot, :, start:total], values[slot, :, start:total] = k.transpose(0, 1), v.transpose(0, 1)
            seen_k, seen_v, mask = keys[slot, :, :total], values[slot, :, :total], None
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
