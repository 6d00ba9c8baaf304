"""A VQ-VAE's recipe: settings that cannot be, going on with a trained model, pictures that are held out."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_vqvae import RECIPE, SHAPE
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.config import SettingError, override
from intermodal.data.loader import Mixture
from intermodal.data.readers import open_source
from intermodal.data.sprites import HELD_OUT_STYLE
from intermodal.inputs.image import BICUBIC, HALF, ImageProcessor
from intermodal.models.vqvae import VQVAE
from intermodal.train.recipe import AdversarialConfig, CodebookConfig, load_recipe
from intermodal.train.vqvae import HELD_OUT_BATCHES, psnr, train_vqvae, unseen


@pytest.fixture
def recipe():
    made = load_recipe(RECIPE, tiny=True)
    return replace(made, train=replace(made.train, steps=6, threads=1, precision="fp32"))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("codebook.revive=0", r"codebook\.revive wants .*greater than or equal to 1"),
        ("codebook.ema=1.5", r"codebook\.ema wants .*less than 1"),
        ("codebook.ema=-0.1", r"codebook\.ema wants .*greater than or equal to 0"),
        ("codebook.entropy=-1", r"codebook\.entropy wants"),
        ("codebook.alarm=-1", r"codebook\.alarm wants"),
        ("adversarial.width=3", r"adversarial\.width=3 is not a multiple of 4"),
        ("adversarial.width=0", r"adversarial\.width wants"),
        ("adversarial.layers=0", r"adversarial\.layers wants"),
        ("adversarial.layers=5", r"adversarial\.layers=5: 16 pixels can be halved 4 times"),
        ("adversarial.weight=-1", r"adversarial\.weight wants"),
        ("adversarial.start=-1", r"adversarial\.start wants"),
        ("model.stem=3", r"model\.resolution=16 is not a multiple of 6"),
        ("model.stem=0", r"model\.stem wants"),
        ("model.resolution=18", r"model\.resolution=18 is not a multiple of 4"),
        ("model.width=6", r"model\.width=6 .* groups=4"),
        ("model.groups=0", r"model\.groups wants"),
        ("model.codes=0", r"model\.codes wants"),
        ("model.multipliers=[]", r"model\.multipliers wants"),
        ("model.multipliers=[1,0]", r"model\.multipliers wants"),
        ("model.channels=1", r"model\.channels=1: pictures have 3"),
        ("model.decoder=false", r"model\.decoder=false"),
        ("model.attention=[5]", r"model\.attention=\[5\]: the levels have sides of 8, 4 pixels"),
        ("model.beta=-1", r"model\.beta wants"),
        ("model.beta_on=both", r"model\.beta_on wants one of"),
        ("train.quantisation=-1", r"train\.quantisation wants"),
        ("train.perceptual_weight=-1", r"train\.perceptual_weight wants"),
        (f"train.seed={2**70}", r"train\.seed wants"),
        (f"data.seed={2**70}", r"data\.seed wants"),
        ("train.seed=-1", r"train\.seed wants"),
    ],
)
def test_a_setting_that_cannot_be_is_named_before_anything_is_written(settings, told, tmp_path):
    out = tmp_path / "run"
    failed = CliRunner().invoke(app, ["train", str(RECIPE), "--tiny", settings, "--out", str(out)])
    assert isinstance(failed.exception, SettingError), failed.output
    assert re.search(told, str(failed.exception)), failed.exception
    assert not out.exists()


def test_settings_from_python_are_checked_too(recipe, tmp_path):
    for made in (
        replace(recipe, codebook=CodebookConfig(ema=2.0)),
        replace(recipe, adversarial=AdversarialConfig(width=3)),
        replace(recipe, model=replace(recipe.model, resolution=18)),
    ):
        with pytest.raises(SettingError):
            train_vqvae(made, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_gone_on_with_keeps_its_shape_and_beta(recipe, tmp_path):
    """More codes than the recipe's, fewer, another beta and rule: what was loaded counts, also for the alarm and the use of codes."""
    for codes in (40, 20):
        shape = replace(recipe.model, codes=codes, beta=0.6)
        folder = tmp_path / f"{codes}-begun"
        train_vqvae(replace(recipe, model=shape), folder, quiet=True)
        gone_on = override(recipe, [f"start={folder / 'model'}", "train.log_every=1"])
        assert gone_on.model.codes == 32
        model = train_vqvae(gone_on, tmp_path / str(codes), quiet=True)
        assert (model.config.codes, model.config.beta) == (codes, 0.6)
        again = intermodal.load(tmp_path / str(codes) / "model")
        assert (again.config.codes, again.config.beta, len(again.quantize.embedding.weight)) == (codes, 0.6, codes)
        rows = [json.loads(line) for line in (tmp_path / str(codes) / "metrics.jsonl").read_text().splitlines()]
        assert all((row["codebook_use"] * codes) == pytest.approx(round(row["codebook_use"] * codes)) for row in rows)
    with pytest.raises(SettingError, match=r"model\.resolution=18 is not a multiple of 4"):
        train_vqvae(override(gone_on, ["model.resolution=18"]), tmp_path / "side", quiet=True)
    intermodal.save(VQVAE(replace(SHAPE, decoder=False)), tmp_path / "blind")
    with pytest.raises(SettingError, match="has no decoder"):
        train_vqvae(override(recipe, [f"start={tmp_path / 'blind'}"]), tmp_path / "no", quiet=True)


def test_going_on_keeps_the_codes(recipe, tmp_path):
    """A step at rate 0 of a model with more codes than a batch uses: pictures keep their codes, which a Chameleon was trained on."""
    train_vqvae(override(recipe, ["model.codes=200", "train.steps=30", "codebook.revive=5"]), tmp_path / "begun", quiet=True)
    before = intermodal.load(tmp_path / "begun" / "model")
    still = [f"start={tmp_path / 'begun' / 'model'}", "optim.lr=0", "optim.warmup=0", "train.steps=1"]
    after = train_vqvae(override(recipe, still), tmp_path / "on", quiet=True)
    assert json.loads((tmp_path / "on/metrics.jsonl").read_text().splitlines()[-1])["revived"] == 0
    pixels = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert (before.encode(pixels) == after.encode(pixels)).float().mean() > 0.9
    assert before.encode(pixels).unique().numel() > 20


def test_what_was_held_out_is_measured_at_the_end(recipe, tmp_path):
    """The test sides of drawn sources, none of which is trained on: measured again by hand."""
    from rich.console import Console

    console = Console(record=True, width=400)
    model = train_vqvae(recipe, tmp_path, console=console)
    kept = json.loads((tmp_path / "held_out.json").read_text())
    assert set(kept["sources"]) == set(unseen(recipe.data.train))
    pixels, counts, errors = 0, 0, 0.0
    for spec, row in kept["sources"].items():
        source = open_source(spec, side=16)
        assert "split=test" in spec or HELD_OUT_STYLE in spec
        assert row["pictures"] == HELD_OUT_BATCHES // 2 * recipe.data.batch
        order = Mixture([source], None, recipe.data.seed)
        shown = [source[order.next()[1]].image for _ in range(row["pictures"])]
        inputs = ImageProcessor(16, (16, 16), resample=BICUBIC, mean=HALF, std=HALF)(shown).pixels
        with torch.no_grad():
            error = (model.decode(model.encode(inputs)).clamp(-1, 1) - inputs).square()
        used = torch.bincount(model.encode(inputs).flatten(), minlength=32)
        assert row["psnr"] == pytest.approx(psnr(error.mean().item()), abs=1e-3)
        assert row["codebook_use"] == pytest.approx((used > 0).float().mean().item())
        pixels, counts, errors = pixels + error.numel(), counts + used, errors + error.sum().item()
    assert kept["psnr"] == pytest.approx(psnr(errors / pixels), abs=1e-3)
    assert kept["codebook_use"] == pytest.approx((counts > 0).float().mean().item())
    said = console.export_text()
    assert f"{kept['pictures']} held-out pictures: PSNR {kept['psnr']:.1f} dB, codes used {kept['codebook_use']:.0%}" in said


def test_what_to_hold_out_can_be_said(recipe, tmp_path):
    from rich.console import Console

    assert unseen(["scenes:core", "scenes:core?split=test", "photos/", "signs"]) == ("scenes:core?split=test", "signs?fonts=test")
    photos = tmp_path / "photos" / "plain"
    photos.mkdir(parents=True)
    for number in range(20):
        Image.new("RGB", (20, 20), (12 * number, 90, 0)).save(photos / f"{number}.png")
    own = replace(recipe, held_out=(str(photos.parent),))
    train_vqvae(own, tmp_path / "own", quiet=True)
    kept = json.loads((tmp_path / "own" / "held_out.json").read_text())
    assert (list(kept["sources"]), kept["pictures"]) == ([str(photos.parent)], 16)  # whole batches of eight, none twice
    console = Console(record=True, width=400)
    train_vqvae(replace(recipe, held_out=()), tmp_path / "none", console=console)
    assert not (tmp_path / "none" / "held_out.json").exists()
    assert "nothing is held out" in console.export_text()
    for photo in photos.iterdir():
        photo.write_bytes(b"broken")
    console = Console(record=True, width=400)
    train_vqvae(own, tmp_path / "broken", console=console, quiet=True)
    assert "the held-out pictures cannot be measured" in console.export_text()
    assert (tmp_path / "broken" / "model" / "model.safetensors").exists(), "the run itself is well"


def test_pictures_need_no_captions(recipe, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(3):
        Image.effect_noise((20 + index, 18), 60).save(pictures / f"{index}.png")
    told = [f'data.train=["{pictures}"]', "data.weights=null", f'held_out=["{pictures}"]']
    train_vqvae(override(recipe, told), tmp_path / "run", quiet=True)
    assert json.loads((tmp_path / "run/held_out.json").read_text())["pictures"] == 3  # fewer than a batch
    assert not (tmp_path / "run/rejects.jsonl").exists()
