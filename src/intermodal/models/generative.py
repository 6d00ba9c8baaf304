"""What every model with a decoder and an output layer can do: score a conversation, reply, stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import TokenBatch
from ..nn.cache import Cache
from .decoder import Decoder, DecoderConfig, DeepStack

if TYPE_CHECKING:
    from ..generate.engine import Reply
    from ..inputs.chat import ChatProcessor


class Generative(nn.Module):
    """Base of `LanguageModel` and the stitched models. Subclasses with eyes override `embed`."""

    model: Decoder
    lm_head: nn.Linear | None
    family: str
    config: Any
    processor: ChatProcessor | None
    source: dict[str, Any]

    def _init_decoder(self, config: DecoderConfig) -> None:
        self.model = Decoder(config)
        self.lm_head = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)
        self.source, self.processor = {}, None

    @property
    def config_text(self) -> DecoderConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(V, D) of the output layer."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, batch: TokenBatch) -> tuple[Tensor, DeepStack | None]:
        """A pack's input to the decoder: (T, D), and what is added after its first layers."""
        return self.model.embed_tokens(batch.ids), None

    def hidden(self, batch: TokenBatch, cache: Cache | None = None) -> Tensor:
        """A pack -> normalised hidden states (T, D)."""
        x_TD, deepstack = self.embed(batch)
        return self.model(x_TD, batch.segments, batch.positions, cache=cache, deepstack=deepstack)

    def unembed(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> scores (T, V)."""
        return F.linear(hidden_TD, self.head_weight)

    def forward(self, batch: TokenBatch) -> Tensor:
        """A pack -> scores (T, V)."""
        return self.unembed(self.hidden(batch))

    @torch.no_grad()
    def logits(self, messages: Sequence[dict[str, Any]]) -> Tensor:
        """(T, V) float32 scores of one whole conversation, teacher-forced."""
        return self(self.processor(messages).to(self.device)).float()  # pyright: ignore[reportOptionalCall]

    def generate(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Reply:
        """Reply to one conversation; settings are those of `generate.sample.Sampling`."""
        return self.generate_batch([messages], **settings)[0]

    def generate_batch(
        self, conversations: Sequence[Sequence[dict[str, Any]]], *, slots: int = 16, progress: bool = False, **settings: Any
    ) -> list[Reply]:
        """Reply to many conversations, `slots` of them at a time; each as if it were alone."""
        from ..generate.engine import replies

        return replies(self, conversations, _sampling(settings), slots=slots, progress=progress)

    def stream(self, messages: Sequence[dict[str, Any]], **settings: Any) -> Iterator[str | Reply]:
        """Pieces of text as they come, then the `Reply`."""
        from ..generate.engine import stream

        return stream(self, messages, _sampling(settings))


def _sampling(settings: dict[str, Any]):
    from dataclasses import fields

    from ..errors import IntermodalError, nearest
    from ..generate.sample import Sampling

    names = [f.name for f in fields(Sampling)]
    for name in settings:
        if name not in names:
            raise IntermodalError(f"there is no setting {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    stop = settings.get("stop", ())
    return Sampling(**{**settings, "stop": (stop,) if isinstance(stop, str) else tuple(stop)})


class LanguageModel(Generative):
    """A decoder with its output layer: text in, text out."""

    def __init__(self, config: DecoderConfig, family: str = "llama"):
        super().__init__()
        self.config, self.family = config, family
        self._init_decoder(config)
