"""A decoding step in C++ says what the modules say, whoever shares it, for every shape of decoder, and leaves alone what it cannot do."""

import copy
import platform

import pytest
import torch
from test_generate import CONFIG, QUESTIONS, folder, model  # noqa: F401
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from intermodal.generate import engine
from intermodal.generate.engine import TooLong
from intermodal.kernels import decode as kernel
from intermodal.kernels.build import compiler, library
from intermodal.kernels.decode import DecodeStep, can_step
from intermodal.models.decoder import DecoderConfig, DecoderLayer
from intermodal.models.generative import LanguageModel
from intermodal.nn.attention import Segments
from intermodal.nn.layers import Linear, RMSNorm

COMPILED = pytest.mark.skipif(compiler() is None, reason="this machine has no C++ compiler (c++, or what CXX names)")
SHAPES = {
    "plain": {},
    "qwen2": {"qkv_bias": True, "tied": True},
    "qwen3, wide heads": {"qk_norm": True, "kv_heads": 1, "head_width": 48},
    "chameleon": {"qk_layernorm": True, "swin_norm": True},
    "chameleon 7B": {"qk_layernorm": True},
    "all biases": {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "kv_heads": 4, "width": 96, "vocab_size": 263},
}
PROCESSORS = {"this processor": ()}
if platform.machine() == "x86_64":  # AVX2, and no vectors of x86 at all
    PROCESSORS |= {"AVX2": ("-march=x86-64-v3",), "SSE2": ("-march=x86-64", "-Wno-psabi")}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def random_model(dtype=torch.float32, **shape):
    torch.manual_seed(1)
    made = LanguageModel(DecoderConfig(**{**CONFIG.__dict__, "width": 48, **shape}))
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.25)
    return made.to(dtype).eval()


def filled(made, lengths):
    """A cache that holds conversations of these lengths, in slots in another order than they are fed."""
    cache, slots = made.model.cache(len(lengths) + 1), list(range(len(lengths), 0, -1))
    ids = torch.arange(sum(lengths)) % 251
    with torch.inference_mode():
        cache.begin(slots, Segments(lengths))
        made.model(made.model.embed_tokens(ids), Segments(lengths), Segments(lengths).positions, cache=cache)
    cache.commit()
    return cache, slots


def stepped(made, cache, slots, ids, step=None):
    """One token more of each conversation: their scores."""
    positions = torch.tensor([cache.lengths[slot] for slot in slots])
    segments = Segments([1] * len(slots))
    with torch.inference_mode():
        cache.begin(slots, segments)
        x_ND = made.model.embed_tokens(torch.tensor(ids))
        scores = step(x_ND, positions, cache) if step else made.unembed(made.model(x_ND, segments, positions, cache=cache)).float()
    cache.commit()
    return scores


@COMPILED
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_the_modules(shape, dtype, processor):
    made = random_model(dtype, **SHAPES[shape])
    step = DecodeStep(made, library("decode", *PROCESSORS[processor]))
    for lengths in ([1], [70, 3, 15, 16, 17, 31, 4, 9, 600, 40, 255], [256, 512]):
        plain, slots = filled(made, lengths)
        ours = copy.deepcopy(plain)
        for token in range(2):
            ids = [(7 * slot + token) % 251 for slot in slots]
            theirs = stepped(made, plain, slots, ids)
            scores = stepped(made, ours, slots, ids, step)
            assert scores.dtype == torch.float32
            torch.testing.assert_close(scores, theirs, rtol=0, atol=TOLERANCE[dtype] * theirs.abs().max().item())
        assert ours.lengths == plain.lengths
        torch.testing.assert_close(ours.store, plain.store, rtol=0, atol=TOLERANCE[dtype] * plain.store.abs().max().item())


@COMPILED
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_who_shares_a_step(dtype, threads):
    made, before = random_model(dtype, kv_heads=2), torch.get_num_threads()
    step = DecodeStep.of(made)
    lengths = [5, 300, 40, 17, 2, 33, 8, 90, 12, 64, 1]
    cache, slots = filled(made, lengths)
    alone = copy.deepcopy(cache)
    ids = [slot + 3 for slot in slots]
    together = stepped(made, cache, slots, ids, step)
    torch.set_num_threads(threads)
    try:
        for row, (slot, token) in enumerate(zip(slots, ids, strict=True)):
            assert torch.equal(stepped(made, alone, [slot], [token], step)[0], together[row])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.store, cache.store)


@COMPILED
def test_it_reads_the_weights_as_they_are_and_outlives_those_that_were_exchanged():
    made = random_model()
    step = DecodeStep.of(made)
    cache, slots = filled(made, [4, 9])
    first = stepped(made, copy.deepcopy(cache), slots, [1, 2], step)
    with torch.no_grad():
        made.model.layers[0].mlp.down_proj.weight.zero_()
    changed = stepped(made, copy.deepcopy(cache), slots, [1, 2], step)
    assert not torch.allclose(changed, first, atol=0.1)
    torch.testing.assert_close(changed, stepped(made, copy.deepcopy(cache), slots, [1, 2]), rtol=0, atol=1e-4)
    assert step.is_current()
    other = random_model()
    for name in ("gate_proj", "up_proj"):  # as load_state_dict(assign=True) does
        setattr(made.model.layers[0].mlp, name, getattr(other.model.layers[1].mlp, name))
    assert step.is_current()
    assert torch.equal(stepped(made, copy.deepcopy(cache), slots, [1, 2], step), changed)
    for move in (
        lambda: made.share_memory(),
        lambda: made.to(torch.bfloat16),
        lambda: setattr(made.lm_head.weight, "data", made.lm_head.weight.data.clone()),
    ):
        step = DecodeStep.of(made)
        assert step.is_current()
        move()
        assert not step.is_current()
    with pytest.raises(
        TypeError, match=r"a step of torch.bfloat16 on the CPU, and embeddings of torch.bfloat16, a cache of torch.float32"
    ):
        stepped(made, cache, slots, [1, 2], DecodeStep.of(made))


@COMPILED
def test_defaults_of_type_and_device_change_nothing(model):  # noqa: F811
    alone = model.generate(QUESTIONS[0], max_new_tokens=12)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert model.generate(QUESTIONS[0], max_new_tokens=12) == alone
    finally:
        torch.set_default_dtype(torch.float32)
    made = random_model()
    cache, slots = filled(made, [4, 9])
    plain = stepped(made, copy.deepcopy(cache), slots, [1, 2])
    x_ND, step = made.model.embed_tokens(torch.tensor([1, 2])).detach(), DecodeStep.of(made)
    cache.begin(slots, Segments([1, 1]))
    positions = torch.tensor([cache.lengths[slot] for slot in slots])
    with torch.device("meta"):
        scores = step(x_ND, positions, cache)
    torch.testing.assert_close(scores, plain, rtol=0, atol=1e-4)


@COMPILED
def test_scores_and_gates_beyond_all_measure():
    made = random_model(width=48)
    for weight in (3e38, -3e38):
        made.model.layers[0].mlp.gate_proj.weight.data.fill_(weight)
        cache, slots = filled(made, [3])
        theirs = stepped(made, copy.deepcopy(cache), slots, [5])
        scores = stepped(made, copy.deepcopy(cache), slots, [5], DecodeStep.of(made))
        assert torch.equal(scores.isfinite(), theirs.isfinite())
        finite = theirs.isfinite()
        torch.testing.assert_close(scores[finite], theirs[finite])


@COMPILED
def test_a_stream_goes_on_where_the_model_was_moved(model, steps):  # noqa: F811
    alone = model.generate(QUESTIONS[0], max_new_tokens=20)
    stream = model.stream(QUESTIONS[0], max_new_tokens=20)
    heard = next(stream)
    model.share_memory()
    *_, last = stream
    assert last == alone
    assert all(steps)
    stream = model.stream(QUESTIONS[0], max_new_tokens=20)
    assert next(stream) == heard
    model.to(torch.bfloat16)
    with pytest.raises(TypeError, match=r"a cache of torch.float32"):
        list(stream)


@COMPILED
def test_no_memory_for_a_step_is_an_error(monkeypatch):
    made = random_model()
    step = DecodeStep.of(made)
    cache, slots = filled(made, [4])
    monkeypatch.setattr(step, "function", lambda _: 1)
    with pytest.raises(MemoryError, match="a decoding step of 1 conversations"):
        stepped(made, cache, slots, [1], step)


@pytest.fixture
def steps(monkeypatch):
    """Of each step after a prompt, whether the kernel did it."""
    was, feed = [], engine._feed
    monkeypatch.setattr(engine, "_feed", lambda *arguments: was.append(arguments[-1] is not None) or feed(*arguments))
    return was


@COMPILED
def test_replies_are_the_same(model, steps, monkeypatch):  # noqa: F811
    replies = model.generate_batch(QUESTIONS, slots=3, max_new_tokens=12)
    assert steps
    assert all(steps)
    steps.clear()
    monkeypatch.setattr(kernel, "library", lambda name: None)
    assert model.generate_batch(QUESTIONS, slots=3, max_new_tokens=12) == replies
    assert not any(steps)
    wide = copy.deepcopy(model).double()
    assert wide.generate_batch(QUESTIONS, slots=3, max_new_tokens=12) == replies


@COMPILED
def test_a_generation_that_is_not_over_leaves_the_model_alone(model, steps):  # noqa: F811
    """A stream half heard, or an error whose traceback is kept: the model trains, is copied, and talks to others as ever."""
    alone = [model.generate(question, max_new_tokens=20) for question in QUESTIONS[:2]]
    one, two = (model.stream(question, max_new_tokens=20) for question in QUESTIONS[:2])
    heard = [next(one), next(two), next(one), next(two)]
    with pytest.raises(TooLong) as kept:
        model.generate_batch([QUESTIONS[0], [{"role": "user", "content": "x" * 300}]], slots=1, max_new_tokens=20)
    batch = model.processor([*QUESTIONS[0], {"role": "assistant", "content": "yes"}])
    copy.deepcopy(model)(batch).sum().backward()
    model(batch).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(steps)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(batch)).all()
        heard.append(next(one))
    assert not steps[-1], "under autocast the modules do it"
    model.zero_grad()
    for stream, reply in ((one, alone[0]), (two, alone[1])):
        *_, last = stream
        assert last == reply
    assert heard
    assert kept.value


def test_what_the_kernel_cannot_do_is_left_to_the_modules():
    class Adapted(Linear):
        """As peft's layers: a forward of its own."""

    assert can_step(random_model())
    assert can_step(random_model(torch.bfloat16))
    for shape in ({"width": 44}, {"head_width": 8}, {"mlp_width": 40}, {"activation": "gelu"}):
        assert not can_step(random_model(**shape)), shape
    assert not can_step(random_model(torch.float64))
    assert not can_step(random_model(torch.float16))
    assert not can_step(random_model().to("meta"))
    made = random_model()
    made.model.layers[1].mlp.up_proj.__class__ = Adapted
    assert not can_step(made)
    made = random_model()
    for place in (made.model.layers[0].self_attn.q_proj, made.model.layers[1], made.model.norm, made.lm_head):
        for register in (place.register_forward_hook, place.register_forward_pre_hook):
            hook = register(lambda *_: None)
            assert not can_step(made), "the hook would not be called"
            hook.remove()
    assert can_step(made)
    for layer in made.model.layers:
        assert isinstance(layer, DecoderLayer)
        layer.dropout = 0.1
    assert can_step(made)
    made.model.layers.train()
    assert not can_step(made)
    made = random_model()
    made.model.layers[0].mlp.up_proj.double()
    assert not can_step(made)
    made = random_model()
    made.lm_head.weight.data = made.lm_head.weight.data.T.contiguous().T
    assert not can_step(made)


def exchange_forward(made):
    made.model.layers[0].mlp.forward = lambda x: -x


def prune(made):
    mlp = made.model.layers[1].mlp
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = mlp.gate_proj.weight.data[:32], mlp.up_proj.weight.data[:32]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :32].contiguous()


CHANGES = {
    "another forward": exchange_forward,
    "fewer hidden units": prune,
    "fewer layers": lambda made: made.model.layers.pop(1),
    "layers in another order": lambda made: setattr(made.model, "layers", torch.nn.ModuleList(list(made.model.layers)[::-1])),
    "another eps": lambda made: setattr(made.model.layers[0].input_layernorm, "eps", 1e-3),
    "another eps at the end": lambda made: setattr(made.model.norm, "eps", 1e-3),
    "another eps of keys": lambda made: setattr(made.model.layers[0].self_attn.k_norm, "eps", 1e-3),
    "another activation": lambda made: setattr(made.model.layers[1].mlp, "activation", torch.relu),
    "a norm of each head's own": lambda made: setattr(made.model.layers[0].self_attn, "normed", False),
    "a sparse weight": lambda made: setattr(
        made.lm_head, "weight", torch.nn.Parameter(made.lm_head.weight.detach().to_sparse_csr())
    ),
    "a longer head": lambda made: setattr(made.lm_head, "weight", torch.nn.Parameter(torch.zeros(261, 64))),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_is_no_longer_as_its_config_says_is_left_to_the_modules(change):
    made = random_model(qk_norm=True)
    assert can_step(made)
    CHANGES[change](made)
    assert not can_step(made)


def test_hooks_on_all_modules_are_called():
    made = random_model()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not can_step(made)
    finally:
        hook.remove()
    assert can_step(made)


def test_layers_in_another_order_decode_by_their_modules():
    """The first layer to be called begins a step, whichever it is."""
    made = random_model()
    made.model.layers = torch.nn.ModuleList(list(made.model.layers)[::-1])
    cache, slots = filled(made, [4, 9])
    assert stepped(made, cache, slots, [1, 2]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_in_half_precision_is_llamas(dtype):
    torch.manual_seed(0)
    x = torch.randn(300, 64).to(dtype) * 3
    ours, theirs = RMSNorm(64, eps=1e-5).to(dtype), LlamaRMSNorm(64, eps=1e-5).to(dtype)
    ours.weight.data.normal_(1, 0.3)
    theirs.weight.data.copy_(ours.weight.data)
    assert torch.equal(ours(x), theirs(x))
