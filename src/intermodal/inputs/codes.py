"""Early fusion's media: a picture is a run of tokens of the shared vocabulary, between a begin and an end token.

Sources: chameleon `inference/image_tokenizer.py` (pixels), `inference/vocab.py` (names); Hugging Face `processing_chameleon.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..batch import Visual
from ..errors import CheckpointError, IntermodalError
from .boxes import BoxFrame, cells
from .image import ImageProcessor
from .media import Clip, MediaError, Piece, Plan, Run, refuse_bounds
from .tiles import Whole
from .transparency import Blend

if TYPE_CHECKING:
    from ..models.vqvae import VQVAE

PIXELS_AT_ONCE = 1 << 20
"""Of all pictures that the VQ-VAE encodes together: its first level keeps 128 numbers for each."""
DIGITS = {letter: str(digit) for digit, letter in enumerate("ABCDEFGHIJ")}


@dataclass(frozen=True)
class ImageTokens:
    """Codes <-> tokens of the shared vocabulary."""

    ids: tuple[int, ...]
    """The token of each code."""
    begin: int
    end: int

    @classmethod
    def from_vocabulary(cls, vocabulary: dict[str, int], codes: int) -> ImageTokens:
        """Chameleon's names: `IMGIMG`, the code's digits as letters A to J, and a last letter that says nothing.

        Raises:
            CheckpointError: a code has no token, or two, or shares one; the begin or end token is not there; a token is no number.
        """
        wrong = next((name for name, token in vocabulary.items() if isinstance(token, bool) or not isinstance(token, int)), None)
        if wrong is not None:
            raise CheckpointError(f"the vocabulary's {wrong!r} is {vocabulary[wrong]!r}; a token's number is wanted")
        found: dict[int, int] = {}
        for name, token in vocabulary.items():
            if name.startswith("IMGIMG"):
                spelled = "".join(DIGITS.get(letter, letter) for letter in name[len("IMGIMG") : -1])
                if not spelled.isdigit() or int(spelled) in found:
                    raise CheckpointError(f"the image token {name!r} names no code of its own")
                found[int(spelled)] = token
        if sorted(found) != list(range(codes)):
            missing = sorted(set(range(codes)) - set(found))[:5]
            raise CheckpointError(f"the vocabulary has tokens for {len(found)} codes, the codebook {codes}; without one: {missing}")
        for name in (BEGIN, END):
            if name not in vocabulary:
                raise CheckpointError(f"the vocabulary has no {name!r}, which frames a picture")
        shared = [token for token, count in Counter([*found.values(), vocabulary[BEGIN], vocabulary[END]]).items() if count > 1]
        if shared:
            names = [name for name, token in vocabulary.items() if token == shared[0]][:3]
            raise CheckpointError(f"{len(shared)} tokens stand for several things: {shared[0]} is {' and '.join(names)}")
        return cls(tuple(found[code] for code in range(codes)), vocabulary[BEGIN], vocabulary[END])

    def tokens(self, codes: Tensor) -> Tensor:
        """Codes of any shape -> token ids of that shape.

        Raises:
            ValueError: one of them is none of the codebook's.
        """
        least, most = (int(codes.min()), int(codes.max())) if codes.numel() else (0, 0)
        if least < 0 or most >= len(self.ids):
            raise ValueError(f"codes from {least} to {most}: the codebook has 0 to {len(self.ids) - 1}")
        return torch.tensor(self.ids, device=codes.device)[codes]

    def codes(self, ids: Tensor) -> Tensor:
        """Token ids -> codes.

        Raises:
            ValueError: one of them is not an image token.
        """
        order = torch.argsort(torch.tensor(self.ids))
        ordered = torch.tensor(self.ids)[order]
        at = torch.searchsorted(ordered, ids).clamp(max=len(ordered) - 1)
        if not torch.equal(ordered[at], ids):
            raise ValueError(f"not image tokens: {ids[ordered[at] != ids].flatten()[:5].tolist()}")
        return order[at]


BEGIN, END = "<racm3:break>", "<eoss>"


@dataclass
class CodePlanner:
    """Tokens of pictures for a model whose vocabulary holds them."""

    placeholders: dict[str, int]
    image_tokens: ImageTokens
    side: int
    """Pixels of a side of every picture."""
    grid: int
    """Codes along a side."""
    processor: ImageProcessor
    vq: VQVAE | None = None
    """Set by the model: its own encoder."""

    @property
    def blend(self) -> Blend:
        return self.processor.blend

    def plan(self, item: Image.Image | Clip, among: int) -> Plan:
        refuse_bounds(item, "this model")
        if isinstance(item, Clip):
            raise MediaError("this model takes no videos; give frames as pictures")
        tokens = self.image_tokens
        run = (Piece(ids=(tokens.begin,)), Piece(grid=(1, self.grid, self.grid)), Piece(ids=(tokens.end,)))
        return Plan("image", self.placeholders["image"], (run,), detail=Whole(newline=False))

    def pixels(self, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]) -> Tensor:
        return self.processor(items).pixels if items else torch.empty(0, 3, self.side, self.side)

    def codes(self, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]) -> Tensor:
        """The tokens of all pictures, (pictures * grid * grid,), row by row."""
        if self.vq is None:
            raise IntermodalError("pictures become tokens by the model's VQ-VAE, and this processor has none; load the whole model")
        weight = self.vq.quantize.embedding.weight
        pixels = self.pixels(items, plans).to(weight.device)  # in float32, as they are encoded whatever the weights are
        parts = [self.vq.encode(part).cpu() for part in pixels.split(max(1, PIXELS_AT_ONCE // self.side**2))]
        return self.image_tokens.tokens(torch.cat(parts)).flatten()

    def picture(self, ids: Tensor) -> Image.Image:
        """Tokens of one picture (grid * grid,), row by row -> the picture."""
        assert self.vq is not None
        codes = self.image_tokens.codes(ids.cpu()).view(1, self.grid, self.grid)
        with torch.no_grad():
            pixels = self.vq.decode(codes.to(self.vq.quantize.embedding.weight.device))[0]
        values = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).numpy()))

    def visual(self, plans: Sequence[Plan], pixels: Tensor) -> Visual:
        return Visual(pixels, layout=tuple(plan.detail for plan in plans))

    def frame(self, size: tuple[int, int], plan: Plan) -> BoxFrame:
        view, square = self.processor.affine(size), (0.0, 0.0, float(self.side), float(self.side))
        tokens = cells(view, square, self.grid, self.grid, size)
        return BoxFrame(size, (((self.side, self.side), view),), "unit", "plain", tokens=tuple(tokens))

    def positions(self, length: int, runs: Sequence[tuple[int, Run]]) -> Tensor:
        return torch.arange(length)
