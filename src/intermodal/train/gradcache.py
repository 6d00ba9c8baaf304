"""A contrastive batch of any size through encoders that only fit a part of it.

Source: GradCache (Gao et al. 2021); open_clip `train.py:236-306` does the same without replaying random state, so its two passes
differ under dropout. Here the second pass of a part starts from the random state of its first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..batch import PairBatch
from ..models.clip import Embeddings

Forward = Callable[[PairBatch], Embeddings]


def backward_in_parts(
    forward: Forward,
    batch: PairBatch,
    part: int,
    loss: Callable[[Embeddings, PairBatch], tuple[Tensor, Tensor]],
    *,
    before_last: Callable[[bool], AbstractContextManager] | None = None,
) -> Tensor:
    """Gradients of the whole batch's loss, with the activations of only `part` pairs alive at a time.

    Args:
        forward: the model, under whatever autocast it trains with.
        batch: B pairs.
        part: pairs a forward; B needs not be a multiple.
        loss: embeddings of all B pairs -> (what to report, the scalar to call backward on).
        before_last: a context for each second pass, told whether it is the last (DDP's `no_sync` for all but that one).

    Returns:
        The first of what `loss` returned, detached.
    """
    starts = list(range(0, len(batch), part))
    pieces: list[Embeddings] = []
    states = []
    for start in starts:
        last = start == starts[-1]
        states.append(_random_state())
        # the last part keeps its graph: its second forward would be the same work again
        with nullcontext() if last else torch.no_grad():
            pieces.append(forward(batch.slice(start, min(start + part, len(batch)))))
    image = torch.cat([piece.image.detach() for piece in pieces]).requires_grad_()
    text = torch.cat([piece.text.detach() for piece in pieces]).requires_grad_()
    after = _random_state()
    reported, objective = loss(Embeddings(image, text, pieces[-1].log_scale, pieces[-1].bias), batch)
    objective.backward()
    assert image.grad is not None and text.grad is not None  # noqa: PT018
    context = before_last or (lambda last: nullcontext())
    for index, start in _last_first(starts):
        stop = min(start + part, len(batch))
        done = index == 0 if len(starts) > 1 else True
        with context(done):
            piece = pieces[index]
            if index != len(starts) - 1:
                _restore(states[index])
                piece = forward(batch.slice(start, stop))
            torch.autograd.backward([piece.image, piece.text], [image.grad[start:stop], text.grad[start:stop]])
    _restore(after)
    return reported.detach()


def _last_first(starts: list[int]) -> Iterator[tuple[int, int]]:
    """The last part first, because its activations are waiting in memory."""
    return iter(reversed(list(enumerate(starts))))


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _restore(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
