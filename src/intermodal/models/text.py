"""Text towers of the contrastive family: CLIP's (causal, pooled at the end token) and SigLIP's (bidirectional, pooled last)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Texts
from ..config import Positive
from ..nn.layers import Encoder, TransformerConfig


@dataclass(frozen=True)
class TextConfig(TransformerConfig):
    vocab_size: Positive = 49408
    context: Positive = 77
    """Longest text in tokens. SigLIP was trained on texts padded to exactly this."""
    eos_id: int = 49407
    """CLIP pools where this id first stands; 2 selects the rule of old Hugging Face checkpoints, the largest id."""
    pad_id: int = 1
    bos_id: int = 49406


LEGACY_EOS = 2  # Hugging Face `modeling_clip.py:552-571`: configs from before PR 24773 name a wrong end token


class TextTower(nn.Module):
    """Token and position embedding, blocks, a last LayerNorm; the subclasses say who sees whom and which token is the text."""

    causal: bool

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.encoder = Encoder(config, causal=self.causal)
        self.final_layer_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, texts: Texts) -> Tensor:
        """Packed ids of N texts -> (N, D) pooled.

        Raises:
            ValueError: a text is longer than the context.
        """
        segments = texts.segments
        if segments.longest > self.config.context:
            raise ValueError(
                f"a text has {segments.longest} tokens, this tower's context is {self.config.context}; truncate it first"
            )
        # Sorting the ids once makes equal lengths neighbours, so that no layer has to gather its queries, keys and values.
        ordered, tokens = segments.by_length, segments.tokens_of(segments.order)
        ids = texts.ids[tokens.to(texts.ids.device)]
        positions = ordered.positions.to(ids.device)
        # not `table[positions]`, whose backward adds rows in whatever order threads come: no run would be the same twice
        x_TD = self.token_embedding(ids) + F.embedding(positions, self.position_embedding)
        x_TD = self.encoder(x_TD, ordered)
        pooled_ND = self.final_layer_norm(x_TD[self.pooled(ids, ordered.offsets.to(ids.device))])
        return pooled_ND[torch.argsort(segments.order).to(ids.device)]

    def pooled(self, ids_T: Tensor, offsets: Tensor) -> Tensor:
        """(N,) the token of each text that stands for it."""
        raise NotImplementedError("a text tower's subclass says which token is pooled")


class ClipTextTower(TextTower):
    """Causal, pooled at the end token: what follows it cannot be seen, so no padding is needed and texts are packed as they are.

    Source: open_clip `transformer.py:941-944,1716-1721`.
    """

    causal = True

    def pooled(self, ids_T: Tensor, offsets: Tensor) -> Tensor:
        score = ids_T if self.config.eos_id == LEGACY_EOS else (ids_T == self.config.eos_id).to(ids_T.dtype)
        return first_largest(score, offsets)


class SiglipTextTower(TextTower):
    """Bidirectional, no mask: padding is part of the text, and the last position is pooled. Texts come padded to `context`.

    Source: big_vision `models/proj/image_text/text_transformer.py:58-61,82-84`.
    """

    causal = False

    def forward(self, texts: Texts) -> Tensor:
        wrong = {length for length in texts.segments.lengths if length != self.config.context}
        if wrong:
            raise ValueError(
                f"SigLIP texts must be padded to exactly {self.config.context} tokens (got lengths {sorted(wrong)[:5]}); "
                "`model.processor.texts` does it"
            )
        return super().forward(texts)

    def pooled(self, ids_T: Tensor, offsets: Tensor) -> Tensor:
        return offsets[1:] - 1


def first_largest(score_T: Tensor, offsets: Tensor) -> Tensor:
    """(N,) index on the token axis of the first largest score of each sequence.

    The scores are non-negative integers; adding a bonus that falls with the position makes the first of equals win.
    """
    total = score_T.shape[0]
    lengths = offsets[1:] - offsets[:-1]
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=score_T.device), lengths)
    ranked = score_T.long() * total + (total - 1 - torch.arange(total, device=score_T.device))
    best = torch.full((len(lengths),), -1, dtype=torch.long, device=score_T.device)
    best = best.scatter_reduce(0, sequence, ranked, reduce="amax", include_self=False)
    return total - 1 - best % total
