"""Chameleons of every shape that a recipe can name: saved, loaded and the same; files that transformers' processor reads."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
import yaml
from chat_files import byte_tokenizer
from PIL import Image
from test_chameleon import CASES, IMAGES, SPECIAL, build, started
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE, ChameleonVQVAEConfig

import intermodal
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.models.decoder import DecoderConfig
from intermodal.models.vqvae import VQVAE, VQConfig, initialise
from intermodal.train.stages import train_stages
from intermodal.weights import chameleon, vqgan
from intermodal.weights.chameleon import attach_decoder
from intermodal.weights.fresh_chameleon import fresh_chameleon

TEXT = DecoderConfig(
    width=32, depth=1, heads=2, kv_heads=2, head_width=16, mlp_width=32, vocab_size=0, context=256, qk_layernorm=True
)
VQ = VQConfig(resolution=16, width=32, multipliers=(1, 1), res_blocks=1, latent_channels=8, code_width=8, codes=20)
TALK = [{"role": "user", "content": "hello a"}, {"role": "assistant", "content": "b c"}]


def fresh(text=None, vq=None):
    tokenizer = initialise(VQVAE(replace(VQ, **vq or {})))
    return fresh_chameleon(replace(TEXT, **text or {}), tokenizer, ["a b c hello"] * 4, 300)


@pytest.mark.parametrize(
    ("text", "in_transformers"),
    [
        ({}, True),
        ({"heads": 4, "head_width": 8, "kv_heads": 1, "swin_norm": True, "tied": True}, True),
        ({"qkv_bias": True, "out_bias": True, "mlp_bias": True}, True),
        ({"width": 64}, False),
        ({"heads": 4, "kv_heads": 2}, False),
        ({"width": 48, "heads": 5, "kv_heads": 1, "head_width": 8}, False),
        ({"qk_norm": True, "qk_layernorm": False}, False),
        ({"qk_layernorm": False}, False),
        ({"qkv_bias": True}, False),
        ({"out_bias": True}, False),
    ],
)
def test_every_shape_of_the_decoder_is_kept(text, in_transformers, tmp_path):
    model = fresh(text)
    torch.manual_seed(0)
    for parameter in model.model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    for number in range(2):  # what was loaded is saved as it was, too
        intermodal.save(model, tmp_path / str(number))
        again = intermodal.load(tmp_path / str(number))
        assert again.config == model.config
        assert torch.equal(again.logits(TALK), model.logits(TALK))
        model = again
    own = json.loads((tmp_path / "1" / "config.json").read_text()).get("intermodal", {})
    assert set(own) <= {"vq_decoder", "head_width", "qk_norm", "qk_layernorm", "qkv_bias"}
    assert (set(own) == {"vq_decoder"}) == in_transformers
    if in_transformers:
        theirs = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "1")
        words = [token for token in range(len(model.head_weight)) if token not in model.config.image_tokens.ids]
        with torch.no_grad():
            said = theirs(input_ids=model.processor(TALK).ids[None]).logits[0]
        torch.testing.assert_close(model.logits(TALK)[:, words], said[:, words], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("text", "vq", "named"),
    [
        ({"qk_norm": True}, {}, "qk_norm and qk_layernorm are both true"),
        ({}, {"resolution": 15}, "15 x 15 pixels do not divide into codes of 2 x 2"),
        ({"kv_heads": 3}, {}, "2 heads do not divide over 3"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_it_is_trained(text, vq, named):
    with pytest.raises(IntermodalError, match=named):
        fresh(text, vq)


@pytest.mark.parametrize(
    ("vq", "plain"),
    [
        ({}, True),
        ({"attention": (8,)}, True),
        ({"mid_attention": False}, True),
        ({"mid_attention": False, "attention": (8,)}, False),  # one switch of transformers' turns both off
        ({"beta": 0.7, "beta_on": "commitment"}, True),
        ({"tanh_out": True}, True),
        ({"stem": 2, "beta": 0.5}, False),
    ],
)
def test_every_shape_of_the_vq_vae_is_kept(vq, plain, tmp_path):
    model = fresh(vq=vq)
    intermodal.save(model, tmp_path)
    again, codes = intermodal.load(tmp_path), torch.arange(16).view(1, 4, 4)
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again.vqmodel.decode(codes), model.vqmodel.decode(codes))
    raw = json.loads((tmp_path / "config.json").read_text())
    assert ("vq" not in raw["intermodal"]) == plain
    if not plain:
        with pytest.raises(CheckpointError, match="mid_attention where there is any attention"):
            vqgan.to_vq_config(model.config.vq)
        return
    theirs = ChameleonVQVAE(ChameleonVQVAEConfig(**raw["vq_config"])).eval()
    assert theirs.quantize.beta == model.config.vq.beta
    keys = {key for key in model.vqmodel.state_dict() if not key.startswith("decoder.")}
    assert theirs.state_dict().keys() == keys


def test_a_decoder_that_is_attached_brings_its_settings():
    model, full = fresh(), fresh(vq={"tanh_out": True, "beta": 0.5}).vqmodel
    attach_decoder(model, full)
    assert model.config.vq == full.config
    codes = torch.arange(16).view(1, 4, 4)
    with torch.no_grad():
        assert torch.equal(model.vqmodel.decode(codes), full.decode(codes))


@pytest.mark.parametrize("vq", [{}, {"tanh_out": True}, {"beta": 0.7, "beta_on": "commitment"}])
def test_the_authors_layout_keeps_all_of_a_vq_vae(vq, tmp_path):
    model, codes = initialise(VQVAE(replace(VQ, **vq))), torch.arange(16).view(1, 4, 4)
    again = vqgan.read_authors(vqgan.write_authors(model, tmp_path))
    assert again.config == model.config
    params = yaml.safe_load((tmp_path / "vqgan.yaml").read_text())["model"]["params"]
    assert set(params) == {"embed_dim", "n_embed", "ddconfig"}  # the authors' class takes no others
    with torch.no_grad():
        plain = VQVAE(VQ)
        plain.load_state_dict(model.state_dict())
        drawn = plain.decode(codes)  # theirs: `if self.tanh_out: h = torch.tanh(h)` after the last convolution
        assert torch.equal(again.decode(codes), torch.tanh(drawn) if vq.get("tanh_out") else drawn)


def test_what_the_yaml_says_and_is_not_built_is_refused(tmp_path):
    file = vqgan.write_authors(initialise(VQVAE(VQ)), tmp_path) / "vqgan.yaml"
    text = file.read_text()
    for inner, name, value, named in (
        (True, "attn_type", "linear", r"vqgan\.yaml: model\.params\.ddconfig\.attn_type is 'linear'"),
        (True, "attn_type", "none", r"surplus .*attn_1"),  # the weights have it
        (True, "tanh_out", "yes", r"ddconfig\.tanh_out wants bool"),
        (False, "remap", "used.npy", r"model\.params\.remap is 'used\.npy'"),
    ):
        made = yaml.safe_load(text)
        params = made["model"]["params"]
        (params["ddconfig"] if inner else params)[name] = value
        file.write_text(yaml.safe_dump(made))
        for read in (vqgan.read_authors, intermodal.load):
            with pytest.raises(CheckpointError, match=named):
                read(tmp_path)
    file.write_text(text)
    for held in ({"state_dict": {3: torch.zeros(1)}}, {0: torch.zeros(1)}):
        torch.save(held, tmp_path / "vqgan.ckpt")
        with pytest.raises(CheckpointError, match=r"vqgan\.ckpt holds no state dict"):
            intermodal.load(tmp_path)


def test_transformers_reads_a_fresh_models_processor(tmp_path):
    model = fresh()
    intermodal.save(model, tmp_path)
    theirs = transformers.AutoProcessor.from_pretrained(tmp_path, use_fast=False)
    picture = Image.effect_noise((40, 30), 80).convert("RGB")
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "hello a"}]}]
    text = theirs.tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hello a"}]}],
        tokenize=False,
        add_generation_prompt=True,
    )
    given = theirs(text=text, images=picture, return_tensors="pt", return_for_text_completion=True)
    mine, theirs_ids = model.processor(asked, reply=True).ids, given.input_ids[0]
    pictures = theirs_ids == model.config.image_id
    assert int(pictures.sum()) == model.config.grid**2
    assert torch.equal(theirs_ids[~pictures], mine[~pictures])
    torch.testing.assert_close(model.processor.planner.pixels([picture], [None]), given.pixel_values, atol=1e-6, rtol=0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, (config.eos_token_id,)) == (model.processor.bos_id, model.processor.end_ids)
    assert intermodal.load(tmp_path).processor.end_ids == model.processor.end_ids


def test_codes_are_found_in_float32_whatever_the_weights_are(tmp_path):
    """The processor gives the VQ-VAE unrounded pixels: what it finds in bf16 is what the same weights find in float32."""
    model = fresh(vq={"resolution": 64, "codes": 512})
    planner = model.processor.planner
    pictures = [Image.effect_noise((64, 64), 90).convert("RGB") for _ in range(2)]
    model.to(torch.bfloat16)
    found = planner.codes(pictures, [None, None])
    model.float()  # the same values, kept in float32
    assert torch.equal(found, planner.codes(pictures, [None, None]))
    rounded = model.vqmodel.encode(planner.pixels(pictures, [None, None]).bfloat16())
    assert not torch.equal(found, model.config.image_tokens.tokens(rounded).flatten())  # rounding is enough to find others


def test_key_and_value_heads_that_are_left_out_are_32(tmp_path):
    """As transformers' class has it, whatever the number of heads."""
    model = build()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    read = chameleon.from_hf
    assert read(config).text.kv_heads == 4
    del config["num_key_value_heads"]
    assert read({**config, "num_attention_heads": 64}).text.kv_heads == 32
    assert transformers.ChameleonConfig(**{**config, "num_attention_heads": 64}).num_key_value_heads == 32


def test_a_tied_model_is_unlocked_and_moves_no_word(tmp_path):
    start = tmp_path / "start"
    start.mkdir()
    build(tied=True).save_pretrained(start)
    byte_tokenizer((*SPECIAL, *IMAGES)).save(str(start / "tokenizer.json"))
    (start / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    train_stages(started("unlock_images", start), tmp_path / "run", quiet=True)
    before, after = intermodal.load(start), intermodal.load(tmp_path / "run" / "model")
    tokens, now = before.config.image_tokens, after.state_dict()
    rows = (now["model.embed_tokens.weight"] != before.head_weight).any(1)
    moved = set(rows.nonzero().flatten().tolist())
    assert moved == {*tokens.ids, tokens.begin, tokens.end}
    assert [key for key, was in before.state_dict().items() if not torch.equal(now[key], was)] == ["model.embed_tokens.weight"]
    words = [token for token in range(256) if token not in moved]
    assert torch.equal(after.logits(CASES["no image"])[:, words], before.logits(CASES["no image"])[:, words])
