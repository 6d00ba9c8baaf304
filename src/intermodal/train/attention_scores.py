"""What attention does while a model trains: the largest score before the softmax, whose growth comes before a divergence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..models.decoder import Decoder, DecoderAttention

MOST_TOKENS = 256
"""How many queries of a pack are looked at: of its first sequence the last ones, then whole sequences as long as they fit."""


@contextmanager
def attention_scores(decoder: Decoder, wanted: bool = True) -> Iterator[dict[str, float]]:
    """Fills `{"attention_score": ...}` in a forward inside it: the largest |q k| / sqrt(K) of all layers and heads (arXiv 2309.14322,
    section 3.1, "attention logit growth")."""
    found: dict[str, float] = {}

    @torch.no_grad()
    def look(module: DecoderAttention, arguments) -> None:
        x_TD, segments, tables, _ = arguments
        q, k, _ = module.heads(x_TD, tables)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        start = 0
        for length in segments.lengths:
            if start and start + length > MOST_TOKENS:
                break
            part, first = slice(start, start + length), max(0, length - MOST_TOKENS)
            scores = torch.einsum("qhk,lhk->hql", q[part][first:], k[part]).float() * module.head_width**-0.5
            visible = torch.ones(length - first, length, dtype=torch.bool, device=scores.device).tril(first)
            most = scores.masked_fill(~visible, 0.0).abs().max().item()
            found["attention_score"] = max(found.get("attention_score", 0.0), most)
            start += length

    attentions = [module for module in decoder.modules() if isinstance(module, DecoderAttention)] if wanted else []
    handles = [module.register_forward_pre_hook(look) for module in attentions]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
