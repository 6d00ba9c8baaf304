"""Decoders from scratch: every combination of switches is one that transformers loads with equal logits, or is refused before training."""

from dataclasses import replace

import pytest
import torch
import transformers

import intermodal
from intermodal.errors import CheckpointError
from intermodal.models.decoder import DecoderConfig
from intermodal.weights.decoder import text_to_hf
from intermodal.weights.stitch import fresh_decoder

SHAPE = DecoderConfig(width=32, depth=1, heads=2, kv_heads=1, head_width=16, mlp_width=32, vocab_size=0, context=128)
TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]


def made(**switches):
    model = fresh_decoder(replace(SHAPE, **switches), ["hello there"] * 3, 300)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1  # biases are no zeros, norms no ones
    return model


@pytest.mark.parametrize(
    ("family", "switches"),
    [
        ("llama", {}),
        ("llama", {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
        ("llama", {"width": 48, "tied": True}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen3", {"qk_norm": True}),
        ("qwen3", {"qk_norm": True, "qkv_bias": True, "out_bias": True}),
    ],
)
def test_a_fresh_decoder_is_what_it_was_when_it_is_read_again(family, switches, tmp_path):
    model = made(**switches)
    intermodal.save(model, tmp_path)
    again, theirs = intermodal.load(tmp_path), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.family, theirs.config.model_type) == (family, family)
    assert again.config == model.config
    assert torch.equal(again.logits(TALK), model.logits(TALK))
    with torch.no_grad():
        said = theirs(input_ids=model.processor(TALK).ids[None]).logits[0]
    torch.testing.assert_close(model.logits(TALK), said, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("switches", "named"),
    [
        ({"swin_norm": True}, r"llama cannot hold swin_norm=true \(here false\); qwen2"),
        ({"qk_layernorm": True}, r"llama cannot hold qk_layernorm=true"),
        ({"qk_norm": True, "qkv_bias": True}, r"qwen2 cannot hold qk_norm=true.*qwen3 cannot hold qkv_bias=true \(here false\)"),
        ({"out_bias": True}, r"llama cannot hold qkv_bias=false \(here true\)"),
        ({"qkv_bias": True, "mlp_bias": True}, r"qwen2 cannot hold mlp_bias=true"),
    ],
)
def test_what_no_family_holds_is_refused_before_it_is_trained(switches, named):
    with pytest.raises(CheckpointError, match=named):
        made(**switches)


def test_what_a_family_cannot_hold_is_not_saved_as_it(tmp_path):
    model = made()
    model.config = replace(model.config, swin_norm=True)
    with pytest.raises(CheckpointError, match=r"saved as llama cannot hold swin_norm=true"):
        intermodal.save(model, tmp_path)
    for family, named in (("mistral", "qkv_bias=true"), ("qwen2", "out_bias=true"), ("qwen3", "qk_norm=false")):
        with pytest.raises(CheckpointError, match=named):
            text_to_hf(replace(SHAPE, qkv_bias=True, out_bias=True), family)
