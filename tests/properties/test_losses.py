"""The tiled losses against the plain formulas in float64: value and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from intermodal.errors import InputError
from intermodal.losses import sigmoid_loss, softmax_loss


def plain_sigmoid(image, text, log_scale, bias, positive, dropped):
    z = log_scale.exp() * image @ text.T + bias
    sign = torch.where(positive, 1.0, -1.0).double()
    return (-F.logsigmoid(sign * z) * ~dropped).sum()


def plain_softmax(image, text, log_scale, positive, dropped):
    z = (log_scale.exp() * image @ text.T).masked_fill(dropped, -torch.inf)
    target = positive.double()
    rows = (target / target.sum(1, keepdim=True) * z.masked_fill(~positive, 0)).sum(1)
    columns = (target / target.sum(0, keepdim=True) * z.masked_fill(~positive, 0)).sum(0)
    return ((z.logsumexp(1) - rows).sum() + (z.logsumexp(0) - columns).sum()) / 2


def pairs(count, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image, text = (F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    return image.requires_grad_(), text.requires_grad_()


def masks(count, duplicates):
    groups = torch.arange(count) // 3 * (torch.arange(count) % 5 > 1) + 100 * torch.arange(count) * (torch.arange(count) % 5 <= 1)
    same, own = groups[:, None] == groups[None], torch.eye(count, dtype=torch.bool)
    assert bool((same & ~own).any()), "the test needs duplicates"
    positive = same if duplicates == "positive" else own
    dropped = same & ~own if duplicates == "ignore" else torch.zeros_like(own)
    return groups, positive, dropped


@pytest.mark.parametrize("duplicates", ["negative", "positive", "ignore"])
@pytest.mark.parametrize(("count", "tile"), [(1, 4), (17, 4), (32, 8), (13, 64)])
@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
def test_tiled_equals_plain(kind, count, tile, duplicates):
    groups, positive, dropped = masks(max(count, 17), duplicates)
    groups, positive, dropped = groups[:count], positive[:count, :count], dropped[:count, :count]
    results = []
    for which in ("plain", "tiled"):
        image, text = pairs(count)
        log_scale = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        bias = torch.tensor(-2.5, dtype=torch.float64, requires_grad=True)
        leaves = [image, text, log_scale] + ([bias] if kind == "sigmoid" else [])
        options = {"groups": groups, "duplicates": duplicates, "tile": tile}
        if which == "plain" and kind == "sigmoid":
            loss = plain_sigmoid(*leaves, positive, dropped)
        elif which == "plain":
            loss = plain_softmax(*leaves, positive, dropped)
        else:
            loss, pairs_counted = (sigmoid_loss if kind == "sigmoid" else softmax_loss)(*leaves, **options)
            assert pairs_counted == count
        (3 * loss / count).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-11, atol=1e-12)


def test_siglip_starts_at_the_published_loss():
    """PITFALLS D6: (t, b) = (log 10, -10) at batch 32,768 starts near 11.5, by a sum over rows divided by B. Here at 2,048."""
    count = 2048
    image, text = pairs(count, width=256)
    loss, counted = sigmoid_loss(image, text, torch.tensor(10.0).log(), torch.tensor(-10.0))
    expected = 10 + (count - 1) * 4.5398e-5 * 1.2  # softplus(10) for the pair; e^-10 and a little for each other text
    assert loss.item() / counted == pytest.approx(expected, rel=0.02)


def test_no_gradient_wanted_gives_the_same_value():
    image, text = pairs(9)
    with_grad, _ = sigmoid_loss(image, text, torch.tensor(1.0).double(), torch.tensor(-1.0).double(), tile=4)
    without, _ = sigmoid_loss(image.detach(), text.detach(), torch.tensor(1.0).double(), torch.tensor(-1.0).double(), tile=4)
    assert with_grad.item() == without.item()
    assert not without.requires_grad


def test_large_logits_stay_finite():
    image, _ = pairs(8)
    log_scale = torch.tensor(100.0, dtype=torch.float64).log().requires_grad_()
    for loss, _ in (softmax_loss(image, image, log_scale), sigmoid_loss(image, image, log_scale, torch.tensor(-10.0).double())):
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(log_scale.grad)


def test_duplicates_need_groups():
    image, text = pairs(4)
    with pytest.raises(ValueError, match="needs `groups`"):
        softmax_loss(image, text, torch.tensor(1.0), duplicates="positive")


@pytest.mark.parametrize("loss", [softmax_loss, sigmoid_loss])
def test_a_second_backward_is_refused(loss):
    image, text = pairs(5)
    scalars = [torch.tensor(1.0, dtype=torch.float64)] * (1 if loss is softmax_loss else 2)
    total, _ = loss(image, text, *scalars)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="call the loss again"):
        total.backward()


@pytest.mark.parametrize("loss", ["sigmoid", "softmax"])
def test_what_are_no_pairs_is_refused(loss):
    """Five pictures and four texts: the sigmoid loss was a number, softmax a NaN."""

    def lose(image, text, **options):
        scalars = (torch.zeros(()), torch.zeros(())) if loss == "sigmoid" else (torch.zeros(()),)
        return {"sigmoid": sigmoid_loss, "softmax": softmax_loss}[loss](image, text, *scalars, **options)

    with pytest.raises(InputError, match=r"takes pairs.*not \(5, 8\) and \(4, 8\)"):
        lose(torch.ones(5, 8), torch.ones(4, 8))
    with pytest.raises(InputError, match=r"not \(5, 8\) and \(5, 7\)"):
        lose(torch.ones(5, 8), torch.ones(5, 7))
    with pytest.raises(InputError, match=r"not \(8,\) and \(8,\)"):
        lose(torch.ones(8), torch.ones(8))
    with pytest.raises(InputError, match=r"one integer a pair, \(5,\), not \(4,\)"):
        lose(torch.ones(5, 8), torch.ones(5, 8), groups=torch.arange(4), duplicates="ignore")
