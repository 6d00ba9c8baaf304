"""From scores to the next token. Settings have the names and the order of application that transformers and vLLM users know."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import SettingError
from ..errors import IntermodalError, nearest


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn. Temperature 0 is greedy and ignores the rest but the repetition penalty."""

    max_new_tokens: int = 256
    """Of text; pictures count against the context alone."""
    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability is at least this."""
    min_p: float = 0.0
    """Keep tokens at least this share as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative scores of tokens that already occurred (CTRL, arXiv 1909.05858)."""
    stop: tuple[str, ...] = ()
    """Text that ends a reply; it is not part of it."""
    seed: int = 0
    """Of the draws: one stream of random numbers a conversation, so that a reply is the same alone and in a batch. Copies of one
    conversation are therefore answered alike; give them other seeds, call by call."""
    max_images: int = 4
    """Pictures in one reply, where the model draws."""
    image_temperature: float = 1.0
    image_top_p: float = 1.0
    guidance: float = 1.0
    """Classifier-free guidance of pictures towards the conversation: 1 is off; Chameleon's authors use 3."""
    image_guidance: float | None = None
    """A third stream that sees the conversation's pictures and not its words; the authors use 1.2."""
    too_long: Literal["error", "drop_oldest"] = "error"
    """A conversation that leaves no room for a reply is an error, or loses its oldest turns (never a leading system message or its last
    question), until `max_new_tokens`, but at most half of the context, are free."""

    def check(self) -> None:
        """Raises SettingError for a value of another type or out of range; it says what is allowed."""
        warmth, share = "0, or a number from 1e-6 up", "a number above 0, at most 1"  # by a temperature below that, scores overflow
        allowed: dict[str, tuple[str, Callable[[Any], bool]]] = {
            "max_new_tokens": ("a whole number from 1 up", lambda value: value >= 1),
            "temperature": (warmth, lambda value: value == 0 or value >= 1e-6),
            "top_k": ("a whole number from 0 up", lambda value: value >= 0),
            "top_p": (share, lambda value: 0 < value <= 1),
            "min_p": ("a number from 0 to 1", lambda value: 0 <= value <= 1),
            "repetition_penalty": ("a number above 0", lambda value: value > 0),
            "stop": ("texts, none of them empty", lambda value: all(isinstance(text, str) and text for text in value)),
            "seed": ("a whole number from -2^63 to 2^63 - 1", lambda value: -(2**63) <= value < 2**63),
            "max_images": ("a whole number from 0 up", lambda value: value >= 0),
            "image_temperature": (warmth, lambda value: value == 0 or value >= 1e-6),
            "image_top_p": (share, lambda value: 0 < value <= 1),
            "guidance": ("a number from 0 up", lambda value: value >= 0),
            "image_guidance": ("a number from 0 up, or None", lambda value: value is None or value >= 0),
            "too_long": ('"error" or "drop_oldest"', lambda value: value in ("error", "drop_oldest")),
        }
        for setting in fields(self):
            value, (words, fits) = getattr(self, setting.name), allowed[setting.name]
            if not (_of_kind(value, setting.default) and fits(value)):
                raise SettingError(f"{setting.name}={value!r} is out of range: {words}")


def _of_kind(value: Any, default: Any) -> bool:
    """Whether a value is of its setting's type, which the default has; where that is None, a number or None. Numbers are finite."""
    if isinstance(default, str | tuple):
        return isinstance(value, type(default))
    if default is None and value is None:
        return True
    if isinstance(value, bool):
        return False
    if isinstance(value, Integral):
        return abs(int(value)) <= 2**63
    return not isinstance(default, int) and isinstance(value, Real) and math.isfinite(value)


def sampling_of(settings: dict[str, Any]) -> Sampling:
    """From keyword arguments.

    Raises:
        IntermodalError: there is no such setting.
    """
    names = [f.name for f in fields(Sampling)]
    for name in settings:
        if name not in names:
            raise IntermodalError(f"there is no setting {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    stop = settings.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Collection) else stop
    return Sampling(**{**settings, "stop": stop})


def penalised(scores_V: Tensor, seen: Sequence[int] | Tensor, penalty: float) -> Tensor:
    """Scores with the repetition penalty on tokens that occurred."""
    if penalty == 1.0:
        return scores_V
    tokens = torch.as_tensor(seen, device=scores_V.device).unique()
    chosen = scores_V[tokens]
    return scores_V.index_copy(0, tokens, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def filtered(scores_V: Tensor, sampling: Sampling) -> Tensor:
    """Scores divided by the temperature, with -inf where top-k, top-p and min-p rule a token out (in this order, as transformers)."""
    scores_V = scores_V / sampling.temperature
    if 0 < sampling.top_k < scores_V.shape[0]:
        scores_V = scores_V.masked_fill(scores_V < scores_V.topk(sampling.top_k).values[-1], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = scores_V.sort()
        out = ordered.softmax(0).cumsum(0) <= 1 - sampling.top_p
        out[-1] = False
        scores_V = scores_V.masked_fill(torch.zeros_like(out).index_copy(0, order, out), -torch.inf)
    if sampling.min_p > 0:
        chances = scores_V.softmax(0)
        scores_V = scores_V.masked_fill(chances < sampling.min_p * chances.max(), -torch.inf)
    return scores_V


def choose(scores_V: Tensor, seen: Sequence[int] | Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token of one conversation. Each has its own generator, so that a batch draws what single calls would."""
    scores_V = penalised(scores_V.float(), seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    chances = filtered(scores_V, sampling).softmax(0).cpu()
    return int(torch.multinomial(chances, 1, generator=generator))
