"""Weights laid out for decoding say what the plain ones say, are there only while a reply is made, and only where they can be."""

import pytest
import torch
from test_generate import CONFIG, QUESTIONS, folder, model  # noqa: F401
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from intermodal.generate import engine
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import LanguageModel
from intermodal.nn import packed
from intermodal.nn.attention import Segments
from intermodal.nn.layers import Linear, RMSNorm

SHAPES = {
    "plain": {},
    "qwen2": {"qkv_bias": True, "tied": True},
    "qwen3": {"qk_norm": True, "kv_heads": 1},
    "chameleon": {"qk_layernorm": True, "swin_norm": True},
    "all biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "kv_heads": 4},
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2}
HALF = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN multiplies no bf16 on this processor")


def random_model(dtype=torch.float32, **shape):
    torch.manual_seed(1)
    made = LanguageModel(DecoderConfig(**{**CONFIG.__dict__, "width": 44, **shape}))
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.25)
    return made.to(dtype).eval()


def scores(made, rows):
    ids = torch.arange(rows) % 261
    segments = Segments([rows])
    with torch.inference_mode():
        return made.unembed(made.model(made.model.embed_tokens(ids), segments, segments.positions)).float()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=HALF)])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_the_same(shape, dtype):
    made = random_model(dtype, **SHAPES[shape])
    names = made.state_dict().keys()
    for rows in (1, 7, 90):
        plain = scores(made, rows)
        made.pack(True)
        assert made.packed_head is not None
        assert all(layer.self_attn.packed and layer.mlp.packed for layer in made.model.layers)
        torch.testing.assert_close(scores(made, rows), plain, rtol=0, atol=TOLERANCE[dtype] * plain.abs().max().item())
        assert made.state_dict().keys() == names
        made.pack(False)
        assert made.packed_head is None
        assert not any(layer.self_attn.packed or layer.mlp.packed for layer in made.model.layers)
        assert torch.equal(scores(made, rows), plain)


def test_replies_are_the_same_and_nothing_is_left_behind(model, monkeypatch):  # noqa: F811
    was, feed = [], engine._feed
    monkeypatch.setattr(engine, "_feed", lambda made, *more: was.append(made.packed_head is not None) or feed(made, *more))
    replies = []
    for after in (10_000, 1, 3):
        was.clear()
        monkeypatch.setattr(engine, "PACK_AFTER", after)
        replies.append(model.generate_batch(QUESTIONS, slots=3, max_new_tokens=12))
        assert was == [number >= after for number in range(1, len(was) + 1)]
        assert model.packed_head is None
    assert replies[0] == replies[1] == replies[2]
    monkeypatch.setattr(engine, "PACK_AFTER", 1)
    stream = model.stream(QUESTIONS[0], max_new_tokens=9)
    while model.packed_head is None:
        next(stream)
    stream.close()  # a listener who goes away
    assert model.packed_head is None


def test_what_cannot_be_laid_out_is_left_as_it_is(monkeypatch):
    class Adapted(Linear):
        """As peft's layers: a forward of its own."""

    made = random_model()
    made.model.layers[1].mlp.up_proj.__class__ = Adapted
    made.pack(True)
    assert made.packed_head is None
    assert not made.model.layers[0].mlp.packed
    made = random_model(torch.float64)
    made.pack(True)
    assert made.packed_head is None
    made = random_model()
    with torch.autocast("cpu", torch.bfloat16):
        made.pack(True)
    assert made.packed_head is None
    size = sum(p.nbytes for name, p in made.named_parameters() if "proj" in name or "lm_head" in name)
    for spare, wanted in ((2 * size - 1, False), (2 * size, True)):
        monkeypatch.setattr(packed, "_spare_memory", lambda spare=spare: spare)
        made.pack(True)
        assert (made.packed_head is not None) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_in_half_precision_is_llamas(dtype):
    torch.manual_seed(0)
    x = torch.randn(300, 64).to(dtype) * 3
    ours, theirs = RMSNorm(64, eps=1e-5).to(dtype), LlamaRMSNorm(64, eps=1e-5).to(dtype)
    ours.weight.data.normal_(1, 0.3)
    theirs.weight.data.copy_(ours.weight.data)
    assert torch.equal(ours(x), theirs(x))
