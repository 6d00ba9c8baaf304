"""VQGAN against transformers: Chameleon's encoder and quantiser, Janus's decoder (the same architecture, its levels in the other order)."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from transformers.models.chameleon.configuration_chameleon import ChameleonVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.configuration_janus import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.models.vqvae import VQVAE, VQConfig, initialise
from intermodal.train.recipe import VQRecipe
from intermodal.train.vqvae import _begun
from intermodal.weights import vqgan

SHAPE = dict(embed_dim=12, num_embeddings=40, latent_channels=16, resolution=32, base_channels=32, channel_multiplier=[1, 2, 2],
             num_res_blocks=2, attn_resolutions=[8])  # fmt: skip


def shaken(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def ours(state, **more):
    return vqgan._filled(VQConfig(**{**vqgan.from_hf(SHAPE).__dict__, **more}), state, "test")


@pytest.mark.parametrize("attention", [None, [8], [8, 16]])
def test_encoder_and_codes_equal_transformers(attention, tmp_path):
    theirs = shaken(ChameleonVQVAE(ChameleonVQVAEConfig(**{**SHAPE, "attn_resolutions": attention})))
    theirs.save_pretrained(tmp_path)
    mine = intermodal.load(tmp_path)
    pixels = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    out = theirs.encode(pixels)
    with torch.no_grad():
        torch.testing.assert_close(mine.encoder(pixels), out.last_hidden_state, atol=1e-5, rtol=1e-5)
        quantised, ids, loss = mine.quantize(mine.latents(pixels))
    assert len(ids.unique()) > 5
    assert torch.equal(ids.flatten(), out.image_tokens)
    assert torch.equal(mine.encode(pixels), ids)
    torch.testing.assert_close(quantised, out.quantized_last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, out.embedding_loss, atol=1e-6, rtol=1e-5)  # PITFALLS 8.12: beta on the codebook's term
    with pytest.raises(IntermodalError, match="without a decoder"):
        mine.decode(ids)
    with pytest.raises(ValueError, match="multiples of 4"):
        mine.encode(pixels[..., :30])


def test_decoder_equals_janus():
    config = JanusVQVAEConfig(**{key: value for key, value in SHAPE.items() if key not in ("resolution", "attn_resolutions")})
    theirs = shaken(JanusVQVAEDecoder(config))
    mine = shaken(VQVAE(VQConfig(**{**vqgan.from_hf(SHAPE).__dict__, "decoder": True})), seed=3)
    levels = len(SHAPE["channel_multiplier"])
    state = {re.sub(r"up\.(\d)", lambda m: f"up.{levels - 1 - int(m[1])}", key): v for key, v in theirs.state_dict().items()}
    mine.decoder.load_state_dict(state)
    z = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(mine.decoder(z), theirs(z), atol=1e-5, rtol=1e-5)


def published_names(levels, blocks, encoder_attention, decoder_attention, shortcuts):
    """Parameter names of the authors' VQModel, from the structure of its published code (taming-transformers `diffusionmodules/model.py`,
    Chameleon's `vqgan.py`): `up.0` is the finest level, and every level but the last is halved after it and but the first doubled."""
    layers = []

    def block(name, shortcut=False):
        layers.extend(f"{name}.{part}" for part in ("norm1", "conv1", "norm2", "conv2", *(["nin_shortcut"] if shortcut else [])))

    def attention(name):
        layers.extend(f"{name}.{part}" for part in ("norm", "q", "k", "v", "proj_out"))

    for side, count, at, attended in (
        ("encoder", blocks, "down", encoder_attention),
        ("decoder", blocks + 1, "up", decoder_attention),
    ):
        layers.extend(f"{side}.{part}" for part in ("conv_in", "norm_out", "conv_out"))
        block(f"{side}.mid.block_1")
        attention(f"{side}.mid.attn_1")
        block(f"{side}.mid.block_2")
        for level in range(levels):
            for number in range(count):
                block(f"{side}.{at}.{level}.block.{number}", (side, level, number) in shortcuts)
                if level in attended:
                    attention(f"{side}.{at}.{level}.attn.{number}")
            if side == "encoder" and level < levels - 1:
                layers.append(f"{side}.{at}.{level}.downsample.conv")
            if side == "decoder" and level > 0:
                layers.append(f"{side}.{at}.{level}.upsample.conv")
    layers += ["quant_conv", "post_quant_conv"]
    return {"quantize.embedding.weight"} | {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}


def test_the_authors_names(tmp_path):
    """Widths 32, 64, 64 at 32, 16 and 8 pixels, attention at 8: a shortcut stands where the width changes."""
    config = VQConfig(**{**vqgan.from_hf(SHAPE).__dict__, "decoder": True})
    vqgan.write_authors(initialise(VQVAE(config)), tmp_path)
    state = torch.load(tmp_path / "vqgan.ckpt", weights_only=True)["state_dict"]
    changes = {("encoder", 1, 0), ("decoder", 0, 0)}
    assert set(state) == published_names(3, SHAPE["num_res_blocks"], {2}, {2}, changes)
    assert state["encoder.down.1.block.0.nin_shortcut.weight"].shape == (64, 32, 1, 1)
    assert state["decoder.up.0.block.0.nin_shortcut.weight"].shape == (32, 64, 1, 1)
    assert state["decoder.conv_in.weight"].shape == (64, 16, 3, 3)


def test_layouts_round_trip(tmp_path):
    config = VQConfig(**{**vqgan.from_hf(SHAPE).__dict__, "decoder": True})
    model = shaken(initialise(VQVAE(config)))
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    vqgan.write_authors(model, tmp_path / "authors")
    intermodal.save(model, tmp_path / "ours")
    for again in (vqgan.read_authors(tmp_path / "authors"), intermodal.load(tmp_path / "ours")):
        assert again.config == config
        codes = model.encode(pixels)
        assert torch.equal(again.encode(pixels), codes)
        with torch.no_grad():
            assert torch.equal(again.decode(codes), model.decode(codes))
    # a training checkpoint carries its loss's weights too
    state = torch.load(tmp_path / "authors" / "vqgan.ckpt", weights_only=True)
    state["state_dict"]["loss.discriminator.main.0.weight"] = torch.zeros(3)
    torch.save(state, tmp_path / "authors" / "vqgan.ckpt")
    vqgan.read_authors(tmp_path / "authors")
    del state["state_dict"]["decoder.conv_in.weight"]
    torch.save(state, tmp_path / "authors" / "vqgan.ckpt")
    with pytest.raises(CheckpointError, match=r"missing.*decoder\.conv_in\.weight"):
        vqgan.read_authors(tmp_path / "authors")
    (tmp_path / "authors" / "vqgan.yaml").write_text("model: {params: {}}")
    with pytest.raises(CheckpointError, match=r"vqgan\.yaml is not a VQGAN config"):
        vqgan.read_authors(tmp_path / "authors")
    with pytest.raises(CheckpointError, match=r"holds no vqgan\.yaml"):
        vqgan.read_authors(tmp_path)
    with pytest.raises(CheckpointError, match="stem=1"):
        vqgan.write_authors(VQVAE(VQConfig(width=32, multipliers=(1,), stem=2)), tmp_path / "no")


@pytest.fixture
def authors(tmp_path):
    """A folder in the authors' layout."""
    config = VQConfig(**{**vqgan.from_hf(SHAPE).__dict__, "decoder": True})
    return vqgan.write_authors(shaken(initialise(VQVAE(config))), tmp_path / "authors")


def test_the_authors_folder_is_a_model_everywhere(authors, tmp_path):
    wanted = vqgan.read_authors(authors)
    done = CliRunner().invoke(app, ["convert", str(authors), str(tmp_path / "ours")])
    assert done.exit_code == 0, done.exception
    assert not (tmp_path / "ours" / "vqgan.yaml").exists()
    for model in (intermodal.load(authors), intermodal.load(tmp_path / "ours")):
        assert isinstance(model, VQVAE)
        assert not model.training
        assert model.config == wanted.config
        torch.testing.assert_close(model.state_dict(), wanted.state_dict(), atol=0, rtol=0)
    assert intermodal.load(authors, dtype="bfloat16").quant_conv.weight.dtype == torch.bfloat16
    assert _begun(VQRecipe("t", start=str(authors))).config == wanted.config
    with pytest.raises(CheckpointError, match="image_size is for CLIP"):
        intermodal.load(authors, image_size=32)
    (authors / "vqgan.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        intermodal.load(authors)


def test_a_trainers_checkpoint_is_refused_with_the_line_that_mends_it(authors, monkeypatch):
    file = authors / "vqgan.ckpt"
    weights = torch.load(file, weights_only=True)
    torch.save({**weights, "callbacks": {CliRunner: {"best": 0.5}}}, file)
    for read in (vqgan.read_authors, intermodal.load):
        with pytest.raises(CheckpointError) as refused:
            read(authors)
        told = str(refused.value)
        assert told.startswith(f"{file} holds Python objects besides tensors, typer.testing.CliRunner the first")
        assert told.isprintable()
    monkeypatch.chdir(authors)
    exec(told.split("`")[1], {"torch": torch})
    torch.testing.assert_close(intermodal.load(authors).state_dict(), dict(weights["state_dict"]), check_dtype=False)
    file.write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match=r"vqgan\.ckpt is not a readable torch checkpoint: it is damaged[^\n\x1b]+$"):
        intermodal.load(authors)


def test_the_authors_yaml(authors):
    file = authors / "vqgan.yaml"
    text = file.read_text()

    def changed(place, value):
        made = yaml.safe_load(text)
        params = made["model"]["params"]
        (params["ddconfig"] if place in params["ddconfig"] else params)[place] = value
        file.write_text(yaml.safe_dump(made))

    config = replace(vqgan.read_authors(authors).config, attention=())
    for place, value, told in (
        ("n_embed", "x", r"vqgan\.yaml: model\.params\.n_embed wants int, got 'x'"),
        ("ch_mult", 2, r"vqgan\.yaml: model\.params\.ddconfig\.ch_mult wants a list of int, got 2"),
        ("z_channels", None, r"vqgan\.yaml: model\.params\.ddconfig\.z_channels wants int, got None"),
        ("ddconfig", [1], r"vqgan\.yaml is not a VQGAN config"),
    ):
        changed(place, value)
        for read in (vqgan.read_authors, intermodal.load):
            with pytest.raises(CheckpointError, match=told):
                read(authors)
    vqgan.write_authors(initialise(VQVAE(config)), authors)
    changed("attn_resolutions", None)
    assert intermodal.load(authors).config == config


def test_folding_the_first_level_and_unit_codes():
    config = VQConfig(
        resolution=16,
        width=32,
        multipliers=(1, 1),
        res_blocks=1,
        stem=2,
        latent_channels=8,
        code_width=8,
        codes=20,
        unit_codes=True,
    )
    model = shaken(initialise(VQVAE(config)))
    assert config.shrink == 4
    pixels = (torch.rand(2, 3, 16, 24) * 2 - 1).requires_grad_()
    picture, codes, loss = model(pixels)
    assert picture.shape == pixels.shape
    assert codes.shape == (2, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(codes), picture, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.quantize.table().norm(dim=-1), torch.ones(20))
    (picture.sum() + loss).backward()  # straight through: the encoder hears of the picture, the codebook of the loss
    assert model.encoder.conv_in.weight.grad.abs().sum() > 0
    assert model.quantize.embedding.weight.grad.abs().sum() > 0
    with pytest.raises(IntermodalError, match="groups"):
        VQVAE(VQConfig(width=20))
    with pytest.raises(IntermodalError, match=r"multipliers=\[\]"):
        VQVAE(VQConfig(multipliers=()))
