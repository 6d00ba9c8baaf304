"""Models with a resampler: every picture is squeezed to one square and becomes a fixed number of tokens, whatever its size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from ..batch import Visual
from .boxes import BoxFrame, cells
from .image import ImageProcessor
from .media import Clip, MediaError, Piece, Plan, Run, refuse_bounds
from .tiles import Whole

BOX_TAGS = ("<ref>", "</ref>", "<box>", "</box>")
TEMPLATE = (
    "{%- set seen = namespace(pictures=0) -%}"
    "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- else -%}{%- set seen.pictures = seen.pictures + 1 -%}"
    "{{- 'Picture ' ~ seen.pictures ~ ': <img><imgpad></img>\\n' -}}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
"""ChatML with numbered pictures, as Qwen-VL-Chat's `from_list_format` and `make_context` write it; the checkpoint has no template file."""


class SquarePlanner:
    """Pixels of pictures that are all squeezed to one square, and positions that only count."""

    side: int
    processor: ImageProcessor

    def pixels(self, items: Sequence[Image.Image | Clip], plans: Sequence[Plan]) -> Tensor:
        return self.processor(items).pixels if items else torch.empty(0, 3, self.side, self.side)

    def visual(self, plans: Sequence[Plan], pixels: Tensor) -> Visual:
        return Visual(pixels, layout=tuple(plan.detail for plan in plans))

    def positions(self, length: int, runs: Sequence[tuple[int, Run]]) -> Tensor:
        return torch.arange(length)


@dataclass
class QueryPlanner(SquarePlanner):
    """Tokens and pixels of pictures for Qwen-VL."""

    placeholders: dict[str, int]
    side: int
    """Pixels of the tower's square input."""
    queries: int
    """Side of the square of tokens that a picture becomes."""
    processor: ImageProcessor

    def plan(self, item: Image.Image | Clip, among: int) -> Plan:
        refuse_bounds(item, "Qwen-VL")
        if isinstance(item, Clip):
            raise MediaError("Qwen-VL takes no videos; give frames as pictures, or use Qwen2-VL or later")
        piece = Piece(grid=(1, self.queries, self.queries))
        return Plan("image", self.placeholders["image"], ((piece,),), detail=Whole(newline=False))

    def frame(self, size: tuple[int, int], plan: Plan) -> BoxFrame:
        view, square = self.processor.affine(size), (0.0, 0.0, float(self.side), float(self.side))
        tokens = cells(view, square, self.queries, self.queries, size)
        return BoxFrame(size, (((self.side, self.side), view),), "thousandths", "tags", BOX_TAGS, tuple(tokens))


@dataclass
class LatentPlanner(SquarePlanner):
    """Tokens and pixels of pictures for Idefics2. Latents stand on no part of the picture, and the family writes no boxes of its own:
    they are written as parts of one."""

    placeholders: dict[str, int]
    boundary: str
    """The token on both sides of a picture, as text."""
    side: int
    latents: int
    processor: ImageProcessor

    def plan(self, item: Image.Image | Clip, among: int) -> Plan:
        refuse_bounds(item, "Idefics2")
        if isinstance(item, Clip):
            raise MediaError("Idefics2 takes no videos; give frames as pictures, or use a LLaVA-OneVision or Qwen2-VL model")
        run = (Piece(grid=(1, 1, self.latents)),)
        return Plan("image", self.placeholders["image"], (run,), boundary=self.boundary, detail=Whole(newline=False))

    def frame(self, size: tuple[int, int], plan: Plan) -> BoxFrame:
        view = self.processor.affine(size)
        return BoxFrame(size, (((self.side, self.side), view),), "unit", "plain", tokens=(None,) * self.latents)
