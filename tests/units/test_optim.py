"""Muon: against torch's own, and what it takes for a matrix."""

import itertools

import pytest
import torch
from torch import nn

from intermodal.errors import IntermodalError
from intermodal.train import optim
from intermodal.train.recipe import OptimConfig


@pytest.mark.parametrize("shape", [(2, 24, 96), (2, 96, 24), (3, 32, 32), (1, 40, 64)])
def test_small_products_give_what_the_iteration_gives(shape):
    """Wide matrices go through the products of their rows; the plain iteration in float64 is the truth."""
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = given.double().mT if shape[1] > shape[2] else given.double()
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    wanted = x.mT if shape[1] > shape[2] else x
    torch.testing.assert_close(optim.orthogonal(given, half=False), wanted.float(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("half", [False, True])
def test_updates_are_orthogonal_in_every_shape(half):
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 24), (2, 40, 16), (1, 16, 40)):
        update = optim.orthogonal(torch.randn(shape, generator=generator), half)
        values = torch.linalg.svdvals(update)
        assert update.shape == shape
        assert values.max() < 1.3
        assert values.quantile(0.1) > 0.6  # a square random matrix has a few that five steps do not bring up


@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_steps_are_those_of_torchs_muon(shape):
    """`torch.optim.Muon` scaled to match AdamW, which rounds to bf16 inside: so does ours for this comparison."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2))) for _ in range(2))
    group = {"params": [ours], "weight_decay": 0.1, "orthogonal": True, "factor": 1.0}
    mine = optim.Muon([group], half=True, lr=0.02, fused=True)
    oracle = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = theirs.detach().clone()
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        mine.step()
        oracle.step()
    moved, wanted = (ours - start).detach().flatten(), (theirs - start).detach().flatten()
    assert torch.nn.functional.cosine_similarity(moved, wanted, dim=0) > 0.999
    assert (moved.norm() / wanted.norm() - 1).abs() < 0.01


def test_a_convolution_is_a_matrix_of_windows():
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(3, 8, 2, bias=False), nn.Linear(12, 8, bias=False)
    linear.weight.data.copy_(conv.weight.flatten(1))
    for layer in (conv, linear):
        layer.weight.grad = torch.ones(8, 12).cumsum(1).view(layer.weight.shape)
        optim.Muon(
            [{"params": [layer.weight], "weight_decay": 0.1, "orthogonal": True, "factor": 1.0}], half=False, lr=0.1, fused=True
        ).step()
    assert torch.equal(conv.weight.flatten(1), linear.weight)


def test_muon_takes_the_matrices_of_linear_layers_and_adamw_the_rest():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.patch_embedding = nn.Linear(12, 8)
            self.body = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8))
            self.lm_head = nn.Linear(8, 5, bias=False)
            self.position_embedding = nn.Parameter(torch.zeros(4, 8))
            self.logit_scale = nn.Parameter(torch.zeros(()))

    model, config = Small(), OptimConfig(name="muon", matrix_lr_factor=3.0, scalar_lr_factor=10.0, weight_decay=0.1)
    assert optim.matrix_names(model) == ["body.0.weight", "body.2.weight"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_rate = {}
    for group in optim.optimizer_for(model, config, "fp32").param_groups:
        for parameter in group["params"]:
            by_rate[names[id(parameter)]] = (group["factor"], group["weight_decay"], group["orthogonal"])
    assert by_rate.keys() == set(names.values())
    assert by_rate["body.0.weight"] == (3.0, 0.1, True)
    assert by_rate["lm_head.weight"] == by_rate["embed.weight"] == by_rate["position_embedding"] == (1.0, 0.1, False)
    assert by_rate["body.1.weight"] == by_rate["body.0.bias"] == (1.0, 0.0, False)
    assert by_rate["logit_scale"] == (10.0, 0.0, False)
    staged = optim.optimizer_of(model, config, optim.choose_learning(model, (("body.*", 0.5),)), "fp32")
    assert {group["factor"] for group in staged.param_groups} == {1.5, 0.5}
    assert not model.lm_head.weight.requires_grad
    with pytest.raises(IntermodalError, match=r"heads\.\*"):
        optim.choose_learning(model, (("heads.*", 1.0),))


@pytest.mark.parametrize(("precision", "half"), [("auto", True), ("bf16", True), ("fp32", False), ("fp64", False)])
def test_muon_rounds_as_the_run_does(monkeypatch, precision, half):
    monkeypatch.setattr(optim, "multiplies_bf16", lambda device: True)
    made = optim.optimizer_for(nn.Linear(3, 4).double(), OptimConfig(name="muon"), precision)
    assert made.half == half


def test_the_rate_rises_in_a_line_and_falls_as_a_cosine():
    config = OptimConfig(lr=2.0, warmup=4, final_lr_share=0.1)
    rates = [optim.learning_rate(config, step, 24) for step in range(24)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[14] == pytest.approx(0.2 + 1.8 / 2)
    assert all(later < sooner for sooner, later in itertools.pairwise(rates[4:]))
    assert optim.learning_rate(config, 24, 24) == pytest.approx(0.2)
