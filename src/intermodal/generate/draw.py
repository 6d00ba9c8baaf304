"""Drawing with tokens: what may come next in a text and in a picture, and guidance without a classifier.

In a text every word and the reply's end may come, and a picture may begin while the context has room for all of it. In a picture exactly
the grid's number of codes comes, then its end, which is forced. Sources: chameleon `inference/chameleon.py:251-269,301-366`,
`logits_processor.py:312-336`; what the reference does by reading everything again at each switch goes on in the same cache here
(PITFALLS 8.11).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from ..inputs.codes import CodePlanner, ImageTokens
from ..inputs.marks import marks_of
from ..nn.layers import at_least_float32
from .sample import Sampling, choose

CANNOT_DRAW = (
    "this model reads pictures and cannot draw any: its files hold no decoder for picture codes, as Hugging Face's Chameleon files do not; "
    "add that of the VQGAN it was trained with: intermodal convert MODEL NEW --vq-decoder FOLDER"
)


@dataclass
class Drawing:
    """A picture under way."""

    guides: tuple[tuple[int, ...], ...]
    """Prompts of the streams that guide it: with the conversation's pictures alone, and with nothing."""
    codes: list[int] = field(default_factory=list)

    @property
    def streams(self) -> int:
        return 1 + len(self.guides)


def guided(full_V: Tensor, guides: Sequence[Tensor], guidance: float, image_guidance: float | None) -> Tensor:
    """Scores of a guided picture: nothing + guidance * (full - nothing), or, with the stream that sees only pictures,
    nothing + image_guidance * (pictures - nothing) + guidance * (full - pictures)."""
    if not guides:
        return full_V
    nothing = guides[-1]
    if image_guidance is None or len(guides) == 1:
        return nothing + guidance * (full_V - nothing)
    return nothing + image_guidance * (guides[0] - nothing) + guidance * (full_V - guides[0])


class Canvas:
    """What one model may draw, and how, in one call."""

    def __init__(
        self,
        planner: CodePlanner,
        vocabulary: int,
        bos: int | None,
        sampling: Sampling,
        device: torch.device,
        draws: bool,
        marks: Collection[int] = (),
        ends: Collection[int] = (),
    ):
        self.planner, self.sampling, self.tokens, self.bos = planner, sampling, planner.image_tokens, bos
        self.side, self.count = planner.grid, planner.grid**2
        self.length = self.count + 2
        """Tokens of a picture with its begin and end."""
        words = torch.ones(vocabulary, dtype=torch.bool, device=device)
        codes = torch.tensor(self.tokens.ids, device=device)
        self.ends = frozenset(ends)
        """Tokens that end a reply. The begin of a picture may be one: then there comes none, drawn or not, and the reply is over."""
        never = [*planner.placeholders.values(), self.tokens.end, *(set(marks) - self.ends)]
        words[codes] = words[torch.tensor(never, device=device)] = False
        words[self.tokens.begin] = True
        self.words, self.codes, self.draws = words, codes, draws
        self.image_sampling = replace(
            sampling, temperature=sampling.image_temperature, top_p=sampling.image_top_p, top_k=0, min_p=0.0, repetition_penalty=1.0
        )

    @classmethod
    def of(cls, model, sampling: Sampling, ends: Collection[int]) -> Canvas | None:
        """None where the model's vocabulary holds no pictures. A model without a VQ decoder reads pictures and draws none.

        Args:
            ends: tokens that end a reply: of the tokens that are no words only these may come in a text.
        """
        planner = model.processor.planner
        if not isinstance(planner, CodePlanner):
            return None
        draws, marks = not cannot_draw(model), marks_of(model.processor.tokenizer)
        return cls(planner, len(model.head_weight), model.processor.bos_id, sampling, model.device, draws, marks, ends)

    @property
    def streams(self) -> int:
        """Cache slots of one conversation."""
        if not self.draws or (self.sampling.guidance == 1 and self.sampling.image_guidance is None):
            return 1
        return 2 if self.sampling.image_guidance is None else 3

    @property
    def room(self) -> int:
        """Tokens that a prompt should leave for a picture beside the words of the reply."""
        return self.length if self.draws and self.sampling.max_images and self.tokens.begin not in self.ends else 0

    def text_scores(self, row_V: Tensor, may_draw: bool) -> Tensor:
        """Scores with what cannot come in a text ruled out."""
        row_V = row_V.masked_fill(~self.words, -torch.inf)
        if not (may_draw and self.draws) and self.tokens.begin not in self.ends:
            row_V[self.tokens.begin] = -torch.inf
        return row_V

    def missed(self, row_V: Tensor, room: int, pictures: int) -> str:
        """Why a picture does not come that these scores of a text would begin; "" where none is missed.

        Args:
            room: tokens that the context has left.
            pictures: how many the reply has.
        """
        if (self.draws and room >= self.length) or int(row_V.masked_fill(~self.words, -torch.inf).argmax()) != self.tokens.begin:
            return ""
        if not self.draws:
            return CANNOT_DRAW
        wanted = self.tokens.begin not in self.ends and pictures < self.sampling.max_images
        return f"a picture was left out: it takes {self.length} tokens, and the context had {room} left" if wanted else ""

    def start(self, prompt: list[int], said: list[int]) -> Drawing:
        """A picture begins: `said` ends with its begin token."""
        first = (self.bos,) if self.bos is not None else ()
        nothing = (*first, self.tokens.begin)
        if self.streams == 1:
            return Drawing(())
        if self.streams == 2:
            return Drawing((nothing,))
        return Drawing(((*first, *pictures_of([*prompt, *said[:-1]], self.tokens), self.tokens.begin), nothing))

    def choose(self, scores: list[Tensor], generator: torch.Generator) -> int:
        """The next code of a picture, as a token: guidance, then only codes, then temperature and top-p."""
        full, *guides = (at_least_float32(row_V[self.codes]) for row_V in scores)  # guidance takes differences of near numbers
        row = guided(full, guides, self.sampling.guidance, self.sampling.image_guidance)
        return self.tokens.ids[choose(row, (), self.image_sampling, generator)]

    def picture(self, tokens: list[int]) -> Image.Image:
        return self.planner.picture(torch.tensor(tokens))

    def partial(self, tokens: list[int]) -> Image.Image:
        """The rows so far; what is not drawn yet is grey."""
        filled = [*tokens, *[tokens[-1]] * (self.count - len(tokens))]
        picture = self.picture(filled)
        top = round(picture.height * len(tokens) / self.count)
        picture.paste((128, 128, 128), (0, top, picture.width, picture.height))
        return picture


def cannot_draw(model) -> bool:
    """Whether a model's vocabulary holds pictures, and it has no decoder to draw them with. False of models that only say words."""
    planner = model.processor.planner if model.processor else None
    return isinstance(planner, CodePlanner) and (planner.vq is None or planner.vq.decoder is None)


def pictures_of(ids: Sequence[int], tokens: ImageTokens) -> list[int]:
    """The pictures of a conversation, each from its begin to its end token, without the words between them."""
    out: list[int] = []
    inside = False
    for token in ids:
        inside = inside or token == tokens.begin
        if inside:
            out.append(token)
        inside = inside and token != tokens.end
    return out
