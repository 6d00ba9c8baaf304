"""A contrastive batch of any size through encoders that only fit a part of it.

Source: GradCache (Gao et al. 2021); open_clip `train.py:236-306` does the same without replaying random state, so its two passes
differ under dropout. Here the second pass of a part starts from the random state of its first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    on_part: Callable[[bool], None] = lambda last: None,
    check: Callable[[Tensor, Sequence[str]], None] = lambda value, keys: None,
) -> Tensor:
    """Gradients of the whole batch's loss, with the activations of only `part` pairs alive at a time.

    Args:
        forward: the model, under whatever autocast it trains with.
        batch: B pairs.
        part: pairs a forward; B needs not be a multiple.
        loss: embeddings of all B pairs -> (what to report, the scalar to call backward on).
        on_part: called before each part's second pass, told whether it is the last (ranks exchange gradients only then).
        check: called with the reported value and the pairs' keys before any backward; may raise.

    Returns:
        The first of what `loss` returned, detached.
    """
    starts = range(0, len(batch), part)
    pieces: list[Embeddings] = []
    states = []
    with torch.no_grad():
        for start in starts:
            states.append(_random_state())
            pieces.append(forward(batch.slice(start, min(start + part, len(batch)))))
    after = _random_state()
    leaves = [torch.cat([p.image for p in pieces]), torch.cat([p.text for p in pieces]), pieces[0].log_scale.detach().clone()]
    leaves += [pieces[0].bias.detach().clone()] if pieces[0].bias is not None else []
    for leaf in leaves:
        leaf.requires_grad_()
    reported, objective = loss(Embeddings(*leaves, *([None] if len(leaves) == 3 else [])), batch)
    check(reported, batch.keys)
    image, text, *scalars = torch.autograd.grad(objective, leaves, allow_unused=True)
    for start, state in zip(starts, states, strict=True):
        last, stop = start + part >= len(batch), min(start + part, len(batch))
        on_part(last)
        _restore(state)
        piece = forward(batch.slice(start, stop))
        outputs, gradients = [piece.image, piece.text], [image[start:stop], text[start:stop]]
        if last:  # scale and bias belong to the batch, not to a part
            for scalar, gradient in zip((piece.log_scale, piece.bias), scalars, strict=False):
                if scalar is not None and gradient is not None:  # the softmax loss has no use for SigLIP's bias
                    outputs.append(scalar)
                    gradients.append(gradient)
        torch.autograd.backward(outputs, gradients)
    _restore(after)
    return reported.detach()


def _random_state() -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def _restore(state: list[Tensor]) -> None:
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])
