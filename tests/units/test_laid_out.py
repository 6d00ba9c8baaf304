"""Weights laid out for decoding say what the plain ones say, belong to one generation, and are there only where they can be."""

import copy

import pytest
import torch
from test_generate import CONFIG, QUESTIONS, folder, model  # noqa: F401
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from intermodal.generate import engine
from intermodal.generate.engine import TooLong
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import Generative, LanguageModel
from intermodal.nn import laid_out
from intermodal.nn.attention import Segments
from intermodal.nn.layers import Linear, RMSNorm

if not torch.backends.mkldnn.is_available():
    pytest.skip("this torch has no oneDNN, for whose format weights are laid out", allow_module_level=True)

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


def scores(made, rows, layout=None):
    ids, segments, cache = torch.arange(rows) % 261, Segments([rows]), made.model.cache(1)
    cache.begin([0], segments)
    cache.layout = layout
    with torch.inference_mode():
        hidden = made.model(made.model.embed_tokens(ids), segments, segments.positions, cache=cache)
        return (layout.head(hidden) if layout else made.unembed(hidden)).float()


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
    """As much as is wanted, whatever the machine has left."""
    monkeypatch.setattr(laid_out, "_spare_memory", lambda: 1 << 40)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=HALF)])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_the_same(shape, dtype):
    made = random_model(dtype, **SHAPES[shape])
    layout = made.lay_out()
    assert len(layout.layers) == CONFIG.depth
    for rows in (1, 7, 90):
        plain = scores(made, rows)
        laid = scores(made, rows, layout)
        torch.testing.assert_close(laid, plain, rtol=0, atol=TOLERANCE[dtype] * plain.abs().max().item())
    with torch.no_grad():
        made.model.layers[0].mlp.down_proj.weight.zero_()
    assert not torch.allclose(scores(made, 7), plain[:7], atol=0.1)
    assert torch.equal(scores(made, 90, layout), laid), "what was laid out is as it was then"


def test_replies_are_the_same(model, monkeypatch):  # noqa: F811
    was, feed = [], engine._feed
    monkeypatch.setattr(
        engine, "_feed", lambda made, cache, *more: was.append(cache.layout is not None) or feed(made, cache, *more)
    )
    replies = []
    for after in (10_000, 1, 3):
        was.clear()
        monkeypatch.setattr(engine, "LAY_OUT_AFTER", after)
        replies.append(model.generate_batch(QUESTIONS, slots=3, max_new_tokens=12))
        assert was == [number >= after for number in range(1, len(was) + 1)]
    assert replies[0] == replies[1] == replies[2]


def test_a_generation_that_is_not_over_leaves_the_model_alone(model, monkeypatch):  # noqa: F811
    """A stream half heard, or an error whose traceback is kept: the model trains, is copied, and talks to others as ever."""
    made = []
    lay_out = Generative.lay_out
    monkeypatch.setattr(Generative, "lay_out", lambda self: made.append(self) or lay_out(self))
    monkeypatch.setattr(engine, "LAY_OUT_AFTER", 1)
    alone = [model.generate(question, max_new_tokens=20) for question in QUESTIONS[:2]]
    one, two = (model.stream(question, max_new_tokens=20) for question in QUESTIONS[:2])
    made.clear()
    heard = [next(one), next(two), next(one), next(two)]
    assert len(made) == 2
    with pytest.raises(TooLong) as kept:
        model.generate_batch([QUESTIONS[0], [{"role": "user", "content": "x" * 300}]], slots=1, max_new_tokens=20)
    batch = model.processor([*QUESTIONS[0], {"role": "assistant", "content": "yes"}])
    copy.deepcopy(model)(batch).sum().backward()
    model(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(batch)).all()
        heard.append(next(one))
    model.zero_grad()
    for stream, reply in ((one, alone[0]), (two, alone[1])):
        *_, last = stream
        assert last == reply
    assert heard
    assert kept.value


def test_what_cannot_be_laid_out_is_left_as_it_is(monkeypatch):
    class Adapted(Linear):
        """As peft's layers: a forward of its own."""

    made = random_model()
    made.model.layers[1].mlp.up_proj.__class__ = Adapted
    assert made.lay_out() is None
    assert random_model(torch.float64).lay_out() is None
    made = random_model()
    hook = made.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    assert made.lay_out() is None, "the hook would not be called"
    hook.remove()
    assert made.lay_out() is not None
    made.model.layers[0].mlp.up_proj.double()
    assert made.lay_out() is None
    made = random_model()
    size = sum(p.nbytes for name, p in made.named_parameters() if "proj" in name or "lm_head" in name)
    for spare, wanted in ((2 * size - 1, False), (2 * size, True)):
        monkeypatch.setattr(laid_out, "_spare_memory", lambda spare=spare: spare)
        assert (made.lay_out() is not None) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_in_half_precision_is_llamas(dtype):
    torch.manual_seed(0)
    x = torch.randn(300, 64).to(dtype) * 3
    ours, theirs = RMSNorm(64, eps=1e-5).to(dtype), LlamaRMSNorm(64, eps=1e-5).to(dtype)
    ours.weight.data.normal_(1, 0.3)
    theirs.weight.data.copy_(ours.weight.data)
    assert torch.equal(ours(x), theirs(x))


def test_a_frozen_model_keeps_its_layout_until_its_weights_may_change(model, monkeypatch):  # noqa: F811
    made, was = [], []
    lay_out, feed = Generative.lay_out, engine._feed
    monkeypatch.setattr(Generative, "lay_out", lambda self: made.append(self) or lay_out(self))
    monkeypatch.setattr(engine, "_feed", lambda one, cache, *more: was.append(cache.layout is not None) or feed(one, cache, *more))
    settings = {"slots": len(QUESTIONS), "max_new_tokens": 3}  # fewer steps than a model that is not frozen waits for
    plain = model.generate_batch(QUESTIONS, **settings)
    assert not made
    assert not any(was)
    frozen = copy.deepcopy(model).freeze()
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.training
    was.clear()
    assert frozen.generate_batch(QUESTIONS, **settings) == plain == frozen.generate_batch(QUESTIONS, **settings)
    assert len(made) == 1
    assert all(was)
    copied = copy.deepcopy(frozen)
    assert copied.frozen
    assert copied.generate(QUESTIONS[0], max_new_tokens=3) == plain[0]
    assert len(made) == 2, "a copy's weights are others: it lays out its own"
    for change in (
        lambda one: one.train(),
        lambda one: one.load_state_dict(one.state_dict()),
        lambda one: one.to(torch.float64),
    ):
        one = copy.deepcopy(frozen)
        change(one)
        assert not one.frozen
        assert one.kept_layout() is None


def test_frozen_weights_that_cannot_be_laid_out_generate_plainly(model):  # noqa: F811
    wide = copy.deepcopy(model).double().freeze()
    assert wide.kept_layout() is None
    assert wide.frozen
    assert wide.generate(QUESTIONS[0], max_new_tokens=12).ids == model.generate(QUESTIONS[0], max_new_tokens=12).ids
