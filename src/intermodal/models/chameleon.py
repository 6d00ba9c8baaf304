"""Chameleon: one decoder over one vocabulary of words and picture codes, and the VQ-VAE that makes and draws the codes.

Nothing is masked: an image token is scored like a word, so the model can learn to draw (PITFALLS D5). Sources: chameleon
`inference/transformer.py`; arXiv 2405.09818; Hugging Face `modeling_chameleon.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import IntermodalError
from ..inputs.codes import CodePlanner, ImageTokens
from .decoder import DecoderConfig
from .generative import Generative
from .vqvae import VQVAE, VQConfig


@dataclass(frozen=True)
class ChameleonConfig:
    text: DecoderConfig
    vq: VQConfig
    image_tokens: ImageTokens
    image_id: int
    """The placeholder in a rendered conversation; the model never sees it."""
    side: int = 512
    """Pixels of a side of every picture."""
    rules: Literal["authors", "transformers"] = "authors"
    """Where the two disagree on pixels: exact [-1, 1] and a rounded resize, or 0.0078 x - 1 and a truncated one (PITFALLS D4)."""

    @property
    def grid(self) -> int:
        """Codes along a side of a picture."""
        return self.side // self.vq.shrink

    def check(self) -> None:
        """Raises IntermodalError for a model that cannot be built, or could not read a picture once it is."""
        if self.side % self.vq.shrink:
            raise IntermodalError(
                f"pictures of {self.side} x {self.side} pixels do not divide into codes of {self.vq.shrink} x {self.vq.shrink}: "
                f"their side (the VQ-VAE's resolution, where nothing else is said) should be a multiple of {self.vq.shrink}"
            )
        if self.text.qk_norm and self.text.qk_layernorm:
            raise IntermodalError(
                "qk_norm and qk_layernorm are both true, and queries and keys have one norm: set one of them to false"
            )
        tokens = self.image_tokens
        beyond = sorted(token for token in {*tokens.ids, tokens.begin, tokens.end} if not 0 <= token < self.text.vocab_size)
        if beyond:
            raise IntermodalError(
                f"the vocabulary has {self.text.vocab_size} tokens, 0 to {self.text.vocab_size - 1}, and of a picture's codes and frame "
                f"{len(beyond)} are beyond it ({', '.join(map(str, beyond[:5]))}): vocab_size and vocabulary_map are of two models"
            )


class Chameleon(Generative):
    def __init__(self, config: ChameleonConfig):
        super().__init__()
        config.check()
        self.config, self.family = config, "chameleon"
        self.vqmodel = VQVAE(config.vq)
        self._init_decoder(config.text)

    def bind(self) -> None:
        """Let the processor use this model's VQ-VAE. `load` calls it."""
        planner = self.processor.planner if self.processor else None
        if isinstance(planner, CodePlanner):
            planner.vq = self.vqmodel
