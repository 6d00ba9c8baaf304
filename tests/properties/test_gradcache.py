"""Gradient caching equals the whole batch at once, dropout included."""

from dataclasses import replace

import pytest
import torch

from intermodal.batch import Images, PairBatch, Texts
from intermodal.losses import sigmoid_loss, softmax_loss
from intermodal.models.clip import CLIP, DualConfig, SigLIP, initialise
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.gradcache import backward_in_parts

VISION = VisionConfig(width=16, depth=2, heads=2, mlp_width=24, image_size=16, patch_size=8)
TEXT = TextConfig(width=16, depth=2, heads=2, mlp_width=24, vocab_size=50, context=6, eos_id=49)


def model_of(kind, dropout):
    config = DualConfig(replace(VISION, dropout=dropout), replace(TEXT, dropout=dropout), 16)
    return initialise((SigLIP if kind == "sigmoid" else CLIP)(config), seed=1).double().train()


def batch_of(count, kind):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, 16, 16, generator=generator, dtype=torch.float64)
    lengths = [6] * count if kind == "sigmoid" else [3 + i % 4 for i in range(count)]
    texts = [[*torch.randint(0, 48, (n - 1,), generator=generator).tolist(), 49] for n in lengths]
    return PairBatch(Images(pixels), Texts.pack(texts))


def loss_of(kind):
    def loss(e, batch):
        if kind == "sigmoid":
            total, count = sigmoid_loss(e.image, e.text, e.log_scale, e.bias, tile=4)
        else:
            total, count = softmax_loss(e.image, e.text, e.log_scale, tile=4)
        return total.detach(), total / count

    return loss


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("part", [1, 3, 4, 10])
def test_parts_equal_whole(kind, part):
    batch, gradients = batch_of(10, kind), []
    for cached in (False, True):
        model = model_of(kind, dropout=0.0)
        if cached:
            value = backward_in_parts(model, batch, part, loss_of(kind))
        else:
            value, objective = loss_of(kind)(model(batch), batch)
            objective.backward()
        gradients.append([value, *(p.grad for p in model.parameters())])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-12)


def test_the_softmax_loss_leaves_siglips_bias_alone():
    model, batch = model_of("sigmoid", dropout=0.0), batch_of(10, "sigmoid")
    backward_in_parts(model, batch, 3, loss_of("softmax"))
    assert model.logit_bias.grad is None
    assert model.logit_scale.grad is not None


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_dropout_is_replayed(kind):
    """The two passes of a part draw the same dropout: the result equals a forward of all parts that keeps every activation."""
    batch, part = batch_of(8, kind), 3
    cached, kept = model_of(kind, dropout=0.3), model_of(kind, dropout=0.3)
    torch.manual_seed(5)
    backward_in_parts(cached, batch, part, loss_of(kind))
    after_cached = torch.rand(3)
    torch.manual_seed(5)
    pieces = [kept(batch.slice(s, min(s + part, 8))) for s in range(0, 8, part)]
    whole = type(pieces[0])(
        torch.cat([p.image for p in pieces]), torch.cat([p.text for p in pieces]), kept.logit_scale, kept.logit_bias
    )
    loss_of(kind)(whole, batch)[1].backward()
    assert torch.equal(after_cached, torch.rand(3)), "the random stream goes on as if each part had run once"
    for (name, a), b in zip(cached.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    torch.manual_seed(5)
    other = model_of(kind, dropout=0.0)
    backward_in_parts(other, batch, part, loss_of(kind))
    assert not torch.allclose(other.vision.patch_embedding.weight.grad, cached.vision.patch_embedding.weight.grad), "dropout was on"
