"""Training a VQ-VAE: the codebook's own movements, resume, ranks, the alarm."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import intermodal
from intermodal.config import override
from intermodal.models.vqvae import VQVAE, VQConfig, initialise
from intermodal.parallel.setup import start
from intermodal.train.contrastive import train
from intermodal.train.loop import Stopped
from intermodal.train.recipe import AdversarialConfig, CodebookConfig, load_recipe
from intermodal.train.vq_terms import PatchCritic, Perceptual, balance, entropy_term
from intermodal.train.vqvae import CodebookState, VQTrainer, psnr, train_vqvae

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from ranks import on_ranks

RECIPE = Path(__file__).parents[2] / "recipes" / "vqvae.py"
SHAPE = VQConfig(resolution=8, width=8, groups=4, multipliers=(1,), res_blocks=1, latent_channels=4, code_width=3, codes=5)


@pytest.fixture
def recipe():
    made = load_recipe(RECIPE, tiny=True)
    return replace(made, train=replace(made.train, steps=6, threads=1, save_every=3, precision="fp32"))


def test_averages_are_the_plain_ones():
    vq, state = initialise(VQVAE(SHAPE)), CodebookState(5, 3, CodebookConfig(ema=0.9, revive=None))
    state.counts.fill_(1.0)
    state.sums.copy_(vq.quantize.embedding.weight.detach())
    z, ids = torch.randn(7, 3), torch.tensor([0, 0, 1, 1, 1, 4, 0])
    counts, sums = state.counts.clone(), state.sums.clone()
    state.update(vq, z, ids, start())
    for code in range(5):
        inside = z[ids == code]
        count = 0.9 * counts[code] + 0.1 * len(inside)
        total = 0.9 * sums[code] + 0.1 * inside.sum(0)
        torch.testing.assert_close(vq.quantize.embedding.weight.data[code], total / count)
    assert state.idle.tolist() == [0, 0, 1, 1, 0]


def test_idle_codes_take_a_latent_of_the_step():
    vq, state = initialise(VQVAE(SHAPE)), CodebookState(5, 3, CodebookConfig(ema=None, revive=2))
    z, ids = torch.randn(9, 3), torch.zeros(9, dtype=torch.long)
    before = vq.quantize.embedding.weight.detach().clone()
    _, revived = state.update(vq, z, ids, start())
    assert revived == 4  # at the start every code but the used one counts as idle
    table = vq.quantize.embedding.weight.detach()
    assert torch.equal(table[0], before[0])
    assert all(any(torch.equal(row, latent) for latent in z) for row in table[1:])
    assert state.update(vq, z, ids, start())[1] == 0
    assert state.update(vq, z, ids, start())[1] == 4


@pytest.mark.parametrize("unit", [False, True])
def test_the_codes_of_a_trained_model_stay_where_they_are(unit):
    """Going on: no code is given away, one that is used moves by a hundredth of the way to its latents, the others not at all."""
    vq = initialise(VQVAE(replace(SHAPE, unit_codes=unit)))
    with torch.no_grad():
        vq.quantize.embedding.weight.normal_(generator=torch.Generator().manual_seed(0))
    state, before = CodebookState(5, 3, CodebookConfig(ema=0.99, revive=2), loaded=True), vq.quantize.table().detach().clone()
    z, ids = torch.randn(40, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([0] * 38 + [1] * 2)
    _, revived = state.update(vq, z, ids, start())
    assert revived == 0
    table = vq.quantize.embedding.weight.detach()
    for code in (0, 1):
        moved = 0.99 * before[code] + 0.01 * z[ids == code].mean(0)
        torch.testing.assert_close(table[code], F.normalize(moved, dim=0) if unit else moved)
    torch.testing.assert_close(table[2:], before[2:])
    assert state.update(vq, z, ids, start())[1] == 3  # from here on they idle like any other


@pytest.mark.parametrize("unit", [False, True])
def test_codes_are_found_in_float32_whatever_the_weights_are(unit):
    """A model in bf16, and one under bf16 autocast, gives the codes that float32 gives for the same weights."""
    shape = replace(SHAPE, codes=256, code_width=8, resolution=32, unit_codes=unit)
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    vq = initialise(VQVAE(shape)).bfloat16()
    latents = VQVAE.latents(vq.float(), pixels).permute(0, 2, 3, 1).reshape(-1, 8).detach()
    vq.quantize.embedding.weight.data.copy_(latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(1))[:256]])
    vq.bfloat16().float()  # the weights that bf16 can hold
    wanted, nearest = vq.encode(pixels), vq.quantize.nearest(latents)
    assert len(wanted.unique()) > 100
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(vq.quantize.nearest(latents), nearest)
        assert torch.equal(vq.encode(pixels), wanted)
    assert torch.equal(vq.bfloat16().encode(pixels.bfloat16().float()), vq.float().encode(pixels.bfloat16().float()))


def test_unit_codes_stay_on_the_sphere_with_averages_and_revival():
    vq = initialise(VQVAE(replace(SHAPE, unit_codes=True)))
    state = CodebookState(5, 3, CodebookConfig(ema=0.9, revive=2))
    for step in range(6):
        z = F.normalize(torch.randn(9, 3, generator=torch.Generator().manual_seed(step)), dim=-1)
        ids = vq.quantize.nearest(z)
        sums, counts = state.sums.clone(), state.counts.clone()
        state.update(vq, z, ids, start())
        table = vq.quantize.embedding.weight.detach()
        torch.testing.assert_close(table.norm(dim=1), torch.ones(5))
        for code in ids.unique().tolist():
            total = 0.9 * sums[code] + 0.1 * z[ids == code].sum(0)
            torch.testing.assert_close(table[code], F.normalize(total, dim=0))
        assert (0.9 * counts + 0.1 * torch.bincount(ids, minlength=5) - state.counts)[ids.unique()].abs().max() < 1e-6


@pytest.mark.parametrize("unit_codes", [False, True])
@pytest.mark.parametrize("beta_on", ["codebook", "commitment"])
def test_the_gradient_passes_straight_through_and_beta_weighs_one_term(beta_on, unit_codes):
    """Van den Oord et al. 2017, equation 3, and the authors' `legacy` rule (PITFALLS 8.12), written out."""
    torch.manual_seed(0)
    quantize = initialise(VQVAE(replace(SHAPE, beta_on=beta_on, beta=0.3, unit_codes=unit_codes))).quantize
    z = torch.randn(2, 3, 4, 4, requires_grad=True)
    flat = z.detach().permute(0, 2, 3, 1).reshape(-1, 3)
    table = quantize.embedding.weight.detach()
    if unit_codes:
        flat, table = F.normalize(flat, dim=-1), F.normalize(table, dim=-1)
    nearest = torch.cdist(flat.double(), table.double()).argmin(1)
    out, ids, loss = quantize(z)
    assert torch.equal(ids.flatten(), nearest)
    torch.testing.assert_close(out.detach().permute(0, 2, 3, 1).reshape(-1, 3), table[nearest])
    torch.testing.assert_close(loss, 1.3 * (flat - table[nearest]).square().mean())
    if unit_codes:
        return
    weight = torch.randn(out.shape)
    (through,) = torch.autograd.grad((out * weight).sum(), z, retain_graph=True)
    assert torch.equal(through, weight), "the codes' gradient is the latents'"
    moved, table_moved = torch.autograd.grad(loss, (z, quantize.embedding.weight))
    pull = 2 * (flat - table[nearest]) / flat.numel()
    on_latents, on_codes = (1.0, 0.3) if beta_on == "codebook" else (0.3, 1.0)
    torch.testing.assert_close(moved.permute(0, 2, 3, 1).reshape(-1, 3), on_latents * pull)
    torch.testing.assert_close(table_moved, torch.zeros_like(table).index_add_(0, nearest, -on_codes * pull))


@pytest.mark.parametrize("setting", ["codebook.entropy=5.0", "codebook.ema=null", "train.perceptual_weight=50.0"])
def test_each_switch_changes_what_is_learned(setting, recipe, tmp_path):
    if "perceptual" in setting:
        train(load_recipe(RECIPE.with_name("siglip.py"), tiny=True), tmp_path / "eye", quiet=True)
        recipe = override(recipe, [f"train.perceptual={tmp_path / 'eye' / 'model'}", "train.perceptual_weight=0.0"])
    one, other = (
        train_vqvae(made, tmp_path / name, quiet=True) for name, made in (("one", recipe), ("other", override(recipe, [setting])))
    )
    first, second = one.state_dict(), other.state_dict()
    assert not torch.equal(first["encoder.conv_in.weight"], second["encoder.conv_in.weight"])


def test_perplexity_is_that_of_the_shares_and_averages_alone_move_the_codes(recipe, tmp_path, monkeypatch):
    counted, learned = [], []
    update = CodebookState.update

    def watched(state, vq, z, ids, world):
        counted.append(torch.bincount(ids, minlength=vq.config.codes))
        learned.append(vq.quantize.embedding.weight.grad)
        norms = z.norm(dim=-1)
        assert torch.allclose(norms, torch.ones_like(norms)) == vq.config.unit_codes
        return update(state, vq, z, ids, world)

    monkeypatch.setattr(CodebookState, "update", watched)
    made = override(recipe, ["train.log_every=1", "train.steps=3", "codebook.ema=0.9", "model.unit_codes=true"])
    train_vqvae(made, tmp_path, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for counts, row in zip(counted, rows, strict=True):
        shares = counts[counts > 0].double() / counts.sum()
        assert row["perplexity"] == pytest.approx(torch.exp(-(shares * shares.log()).sum()).item(), rel=1e-4)
    assert all(gradient is None for gradient in learned)


def test_training_learns_and_says_so(recipe, tmp_path):
    model = train_vqvae(replace(recipe, train=replace(recipe.train, steps=40)), tmp_path, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["psnr"] > rows[0]["psnr"] + 1
    assert 0 < rows[-1]["perplexity"] <= 32
    assert rows[0]["revived"] > 0
    again = intermodal.load(tmp_path / "model")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(again.encode(pixels), model.encode(pixels))
    assert psnr(4.0) == 0


@pytest.mark.parametrize(
    ("codebook", "adversarial"),
    [
        (CodebookConfig(), AdversarialConfig()),
        (CodebookConfig(ema=None, revive=None, entropy=0.1), AdversarialConfig()),
        (CodebookConfig(), AdversarialConfig(weight=0.5, start=2, width=8)),
    ],
    ids=["averages", "gradient", "critic"],
)
def test_resume_is_bit_for_bit(recipe, tmp_path, codebook, adversarial, monkeypatch):
    recipe = replace(recipe, codebook=codebook, adversarial=adversarial)
    whole = train_vqvae(recipe, tmp_path / "whole", quiet=True)
    original = VQTrainer._train_step

    def stopping(self, fetched, logging):
        values = original(self, fetched, logging)
        if self.step == 3:
            self.asked_to_stop = "test"
        return values

    monkeypatch.setattr(VQTrainer, "_train_step", stopping)
    with pytest.raises(Stopped):
        train_vqvae(recipe, tmp_path / "cut", quiet=True)
    monkeypatch.setattr(VQTrainer, "_train_step", original)
    resumed = train_vqvae(recipe, tmp_path / "cut", resume=True, quiet=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_the_alarm_sounds_once(recipe, tmp_path):
    from rich.console import Console

    calm = replace(recipe, codebook=CodebookConfig(alarm=0.0))
    loud = replace(recipe, codebook=CodebookConfig(ema=None, revive=None, alarm=1.1))
    for made, times in ((calm, 0), (loud, 1)):
        console = Console(record=True, width=200)
        train_vqvae(made, tmp_path / str(times), console=console, quiet=True)
        assert console.export_text().count("the codebook collapses") == times


def test_entropy_term_is_lowest_for_sure_and_even_codes():
    vq = initialise(VQVAE(SHAPE))
    vq.quantize.embedding.weight.data.copy_(torch.eye(5)[:, :3] * 4 + torch.arange(5)[:, None])
    table = vq.quantize.embedding.weight.detach()

    def term(rows):
        return float(entropy_term(rows.T.reshape(1, 3, 1, -1), vq).detach())

    even, one, between = table.clone(), table[[0] * 5], (table + table.roll(1, 0)) / 2
    assert term(even) < term(one) - 1
    assert term(even) < term(between)
    assert term(even) == pytest.approx(-torch.log(torch.tensor(5.0)).item(), abs=1e-3)


def test_painter_and_critic_do_not_move_each_other():
    torch.manual_seed(0)
    critic = PatchCritic(AdversarialConfig(width=8))
    drawn, real = (torch.randn(2, 3, 16, 16, requires_grad=True) for _ in range(2))
    assert critic(drawn).shape == (2, 1, 4, 4)
    critic.fooled(drawn).backward()
    assert drawn.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters())
    drawn.grad = None
    loss = critic.told_apart(drawn, real)
    loss.backward()
    assert drawn.grad is None
    assert real.grad is None
    assert all(p.grad.abs().sum() > 0 for name, p in critic.named_parameters() if name.endswith("weight"))
    scores = critic(real).detach(), critic(drawn).detach()
    plain = ((1 - scores[0]).clamp(min=0).mean() + (1 + scores[1]).clamp(min=0).mean()) / 2
    torch.testing.assert_close(loss.detach(), plain)


def test_the_painters_term_pulls_as_hard_as_the_likeness():
    last = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(4)
    likeness, fooled = (last @ x).square().sum(), 1e-3 * (last @ x).sum()
    weight = balance(likeness, fooled, last)
    pulls = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (likeness, weight * fooled)]
    assert pulls[1] == pytest.approx(pulls[0].item(), rel=0.1)
    assert not weight.requires_grad


def test_the_critic_changes_what_is_learned_from_its_start_on(recipe, tmp_path):
    plain = train_vqvae(recipe, tmp_path / "plain", quiet=True)
    late = replace(recipe, adversarial=AdversarialConfig(weight=1.0, start=99))
    now = replace(recipe, adversarial=AdversarialConfig(weight=1.0, start=3))
    untouched, touched = (train_vqvae(made, tmp_path / name, quiet=True) for made, name in ((late, "late"), (now, "now")))
    key = "decoder.conv_out.weight"
    assert torch.equal(untouched.state_dict()[key], plain.state_dict()[key])
    assert not torch.equal(touched.state_dict()[key], plain.state_dict()[key])
    rows = [json.loads(line) for line in (tmp_path / "now" / "metrics.jsonl").read_text().splitlines()]
    assert ["told_apart" in row for row in rows] == [False] * 3 + [True] * 3


def test_likeness_to_a_trained_eye(recipe, tmp_path):
    from intermodal.errors import IntermodalError

    train(load_recipe(RECIPE.with_name("siglip.py"), tiny=True), tmp_path / "eye", quiet=True)
    eye = Perceptual(str(tmp_path / "eye" / "model"), torch.device("cpu"))
    real = torch.rand(2, 3, 16, 16) * 2 - 1
    drawn = real.clone().requires_grad_()
    assert eye(drawn, real).item() == pytest.approx(0, abs=1e-9)
    little, much = (eye(real + scale * torch.randn(real.shape), real).item() for scale in (0.05, 0.8))
    assert 0 < little < much
    eye(drawn * 0.5, real).backward()
    assert drawn.grad.abs().sum() > 0
    assert all(p.grad is None for p in eye.tower.parameters())
    # the tower's own pixels: what its processor makes of the same picture
    picture = Image.fromarray(((real[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()).resize((32, 32), 0)
    given = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    wanted = intermodal.load(tmp_path / "eye" / "model").processor.images([picture]).pixels
    torch.testing.assert_close(given * eye.scale + eye.shift, wanted, atol=1e-5, rtol=0)
    seen = replace(recipe, train=replace(recipe.train, perceptual=str(tmp_path / "eye" / "model")))
    train_vqvae(seen, tmp_path / "seen", quiet=True)
    assert "perceptual" in json.loads((tmp_path / "seen" / "metrics.jsonl").read_text().splitlines()[0])
    with pytest.raises(IntermodalError, match="a CLIP or a fixed-size SigLIP"):
        Perceptual(str(tmp_path / "seen" / "model"), torch.device("cpu"))


def test_two_ranks_equal_one(recipe, tmp_path):
    recipe = replace(recipe, codebook=CodebookConfig(revive=None), train=replace(recipe.train, precision="fp64"))
    one = train_vqvae(recipe, tmp_path / "one", quiet=True)
    on_ranks(2, _on_rank, recipe, str(tmp_path / "two"))
    two = intermodal.load(tmp_path / "two" / "model")
    for key, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[key], value, atol=1e-6, rtol=0, msg=key)


def _on_rank(rank, size, recipe, out):
    train_vqvae(recipe, out, quiet=True)
