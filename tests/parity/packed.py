"""Packing is exact: what every family is asked."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from intermodal.batch import TokenBatch


def losses_of(model, batch):
    """(samples,) the summed cross entropy of each sample's supervised tokens."""
    out = []
    starts = batch.segments.offsets.tolist()
    scores = model(batch)
    for start, length in zip(starts, batch.segments.lengths, strict=False):
        rows = torch.arange(start, start + length - 1)
        keep = rows[batch.supervised[rows + 1]]
        out.append(F.cross_entropy(scores[keep], batch.ids[keep + 1], reduction="sum"))
    return torch.stack(out)


def check_packed_equals_separate(model, conversations):
    """Every sample's loss and every gradient in float64, of all conversations in one pack and of each alone."""
    model.requires_grad_(True)
    alone = []
    for messages in conversations:
        batch = model.processor(messages)
        if batch.visual is not None:
            batch.visual = replace(batch.visual, pixels=batch.visual.pixels.double())
        alone.append(batch)
    names, parameters = zip(*model.named_parameters(), strict=True)
    separate = torch.cat([losses_of(model, batch) for batch in alone])
    assert len(separate) == len(alone)
    gradients = torch.autograd.grad(separate.sum(), parameters, allow_unused=True)
    packed = losses_of(model, TokenBatch.pack(alone))
    torch.testing.assert_close(packed, separate, rtol=1e-10, atol=0)
    together = torch.autograd.grad(packed.sum(), parameters, allow_unused=True)
    for name, mine, theirs in zip(names, together, gradients, strict=True):
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
