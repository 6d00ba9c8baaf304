"""Packed == separate, no cross-talk, windows and masks against dense attention."""

import inspect
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from intermodal.nn import attention as packed
from intermodal.nn.attention import Segments, _varlen_cuda, attention
from intermodal.nn.layers import AttentionPool, Encoder, TransformerConfig

LENGTHS = [(1,), (1, 1, 1), (5, 1, 5, 3), (7,), (300,), (2, 9, 2, 1, 9, 4)]


def qkv(total, heads=4, kv_heads=4, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, heads, width), (total, kv_heads, width), (total, kv_heads, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def dense(q, k, v, causal=False, window=None):
    """One sequence, all scores at once, by the definition."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhk,lhk->hql", q, k) / q.shape[-1] ** 0.5
    place = torch.arange(len(q))
    distance = place[None] - place[:, None]
    keep = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        keep &= distance <= 0
    if window:
        left, right = window
        keep &= (distance >= -left) if left >= 0 else keep
        keep &= (distance <= right) if right >= 0 else keep
    return torch.einsum("hql,lhk->qhk", scores.masked_fill(~keep, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (False, (2, 1)), (False, (-1, 2)), (True, (3, -1)), (False, (200, 140))]
)
def test_packed_equals_separate(lengths, kv_heads, causal, window):
    packed, alone = qkv(sum(lengths), kv_heads=kv_heads), qkv(sum(lengths), kv_heads=kv_heads)
    out = attention(*packed, Segments(lengths), causal=causal, window=window)
    wanted, at = [], 0
    for length in lengths:
        wanted.append(dense(*(x[at : at + length] for x in alone), causal=causal, window=window))
        at += length
    wanted = torch.cat(wanted)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out * weight).sum().backward()
    (wanted * weight).sum().backward()
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=8), st.booleans(), st.data())
def test_no_cross_talk(lengths, causal, data):
    """Change one sequence: no other sequence's output moves by one bit, through a whole encoder."""
    torch.manual_seed(0)
    encoder = Encoder(TransformerConfig(16, 2, 2, 32), causal=causal)
    x = torch.randn(sum(lengths), 16)
    which = data.draw(st.integers(0, len(lengths) - 1))
    start = sum(lengths[:which])
    changed = x.clone()
    changed[start : start + lengths[which]] += 1.0
    with torch.no_grad():
        before, after = encoder(x, Segments(lengths)), encoder(changed, Segments(lengths))
    others = torch.ones(len(x), dtype=torch.bool)
    others[start : start + lengths[which]] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "autocast"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (False, (2, 1)), (True, (3, -1)), (False, (-1, 2)), (False, (150, 40))]
)
def test_neither_values_nor_gradients_cross_from_one_sequence_to_another(causal, window, kv_heads, dtype, monkeypatch):
    """Move one sequence, or make it NaN: outputs and gradients of all others stay the same to the bit."""
    lengths, autocast = (5, 1, 300, 5, 3, 5), dtype == "autocast"
    if autocast:
        lengths, dtype = (5, 1, 160, 5, 3, 5), torch.float32
        monkeypatch.setattr(packed, "multiplies_bf16", lambda device: True)
    weight = torch.randn(sum(lengths), 4, 8, generator=torch.Generator().manual_seed(1)).to(dtype)

    def results(rows=slice(0), by=0.0):
        """The outputs, and the gradients of queries, keys and values."""
        inputs = [x.detach().to(dtype) for x in qkv(sum(lengths), kv_heads=kv_heads)]
        for x in inputs:
            x[rows] += by
            x.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention(*inputs, Segments(lengths), causal=causal, window=window)
        return [out.detach(), *torch.autograd.grad(out, inputs, weight)]

    before, start = results(), 0
    for length in lengths:
        rows = slice(start, start + length)
        others = torch.ones(sum(lengths), dtype=torch.bool)
        others[rows] = False
        for by in (1.0, torch.nan):
            after = results(rows, by)
            assert all(torch.equal(a[others], b[others]) for a, b in zip(before, after, strict=True))
            assert not torch.equal(before[0][rows], after[0][rows])
        start += length


def test_pooling_ignores_other_sequences():
    torch.manual_seed(0)
    pool = AttentionPool(TransformerConfig(16, 1, 2, 32)).double()
    torch.nn.init.normal_(pool.probe)
    x = torch.randn(9, 16, dtype=torch.float64)
    together = pool(x, Segments([4, 2, 3]))
    separate = torch.cat([pool(x[:4], Segments([4])), pool(x[4:6], Segments([2])), pool(x[6:], Segments([3]))])
    torch.testing.assert_close(together, separate, rtol=1e-12, atol=1e-13)


def test_checkpointed_activations_change_nothing():
    torch.manual_seed(0)
    encoder = Encoder(TransformerConfig(16, 2, 2, 32), causal=True).double()
    x, grads = torch.randn(7, 16, dtype=torch.float64), []
    for flag in (False, True):
        encoder.checkpoint_activations = flag
        encoder.zero_grad()
        encoder(x, Segments([3, 4])).square().sum().backward()
        grads.append([p.grad.clone() for p in encoder.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_wrong_lengths_are_refused():
    q, k, v = qkv(5)
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, k, v, Segments([2, 2]))
    with pytest.raises(ValueError, match="at least 1"):
        Segments([3, 0])
    with pytest.raises(ValueError, match="same lengths"):
        attention(q[:2], k, v, Segments([2]), Segments([5]), causal=True)


@pytest.mark.parametrize("length", [40, 1100], ids=["short, in float32", "long, in bf16"])
def test_bf16_on_the_cpu_is_near_the_exact_values_and_stays_bf16(length):
    """Short sequences are computed in float32, which is faster there; what goes in and comes out, gradients too, is bf16."""
    exact = qkv(length + 7, kv_heads=2)
    segments = Segments((length, 7))
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention(*rounded, segments, causal=True)
        assert out.dtype == torch.bfloat16
        wanted = attention(*(x.detach().double() for x in rounded), segments, causal=True)
        torch.testing.assert_close(out.double(), wanted, atol=0.02, rtol=0.02)
        gradients = torch.autograd.grad(out.sum(), rounded)
        assert all(gradient.dtype == torch.bfloat16 for gradient in gradients)


@pytest.mark.parametrize("lengths", [(40, 7), (16, 16, 16), (1, 256, 20, 3, 130, 20), (1,)])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_by_bf16_products_are_near_the_exact_ones(lengths, kv_heads, causal, monkeypatch):
    """Under autocast, up to `PRODUCT_LENGTH`; gradients too. One token more and PyTorch's kernel is called."""
    made, products = [], packed._products
    monkeypatch.setattr(packed, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(packed, "_products", lambda *arguments: made.append(1) or products(*arguments))
    exact = [x.detach().bfloat16().double().requires_grad_() for x in qkv(sum(lengths), kv_heads=kv_heads)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    wanted = attention(*exact, Segments(lengths), causal=causal, scale=0.3)
    assert not made
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*rounded, Segments(lengths), causal=causal, scale=0.3)
        assert made
    made.clear()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(out.double(), wanted, atol=0.03, rtol=0.03)
    gradients = zip(torch.autograd.grad(out, rounded, weight.bfloat16()), torch.autograd.grad(wanted, exact, weight), strict=True)
    for got, right in gradients:
        assert (got.double() - right).norm() < 0.02 * right.norm() + 1e-9
    with torch.autocast("cpu", torch.bfloat16):
        attention(*(x.bfloat16() for x in qkv(257)), Segments((257,)), causal=causal)
    assert not made


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=30))
def test_padded_places_are_all_different_and_waste_less_than_half(lengths):
    segments = Segments(lengths)
    places, groups = segments.padded
    assert sum(count for count, _ in groups) == len(lengths)
    assert sum(count * length for count, length in groups) < 2 * segments.total
    starts = set(accumulate((length for count, length in groups for _ in range(count)), initial=0))
    assert len(set(places.tolist())) == segments.total
    for own in places.split(segments.lengths):
        assert int(own[0]) in starts
        assert torch.equal(own, own[0] + torch.arange(len(own)))


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (False, (2, 1)), (True, (3, -1))])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_cuda_kernel_is_called_for_the_same_result(monkeypatch, causal, window, kv_heads):
    """No GPU here: a stand-in with the kernel's documented signature, which computes what its arguments mean."""
    from torch.nn.attention import varlen

    real = inspect.signature(varlen.varlen_attn)

    def stand_in(*arguments, **settings):
        bound = real.bind(*arguments, **settings)
        bound.apply_defaults()
        q, k, v, starts, kv_starts, longest, kv_longest = list(bound.arguments.values())[:7]
        assert starts.dtype == kv_starts.dtype == torch.int32
        assert (longest, kv_longest) == (9, 9)
        assert bound.arguments["enable_gqa"] == (q.shape[1] != k.shape[1])
        spans = [slice(*pair) for pair in zip(starts.tolist(), starts.tolist()[1:], strict=False)]
        return torch.cat([dense(q[s], k[s], v[s], window=bound.arguments["window_size"]) for s in spans])

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    segments, packed = Segments((2, 9, 2, 1)), qkv(14, kv_heads=kv_heads)
    asked = (window[0], 0) if causal and window else window  # as `attention` hands it on
    got = _varlen_cuda(*packed, segments, segments, causal, asked, None)
    torch.testing.assert_close(got, attention(*packed, segments, causal=causal, window=window))


def watched(monkeypatch, function):
    """What the kernel is called with, by the names of torch's own signature; `function` answers in its place."""
    from torch.nn.attention import varlen

    real, seen = varlen.varlen_attn, {}

    def watch(*arguments, **settings):
        bound = inspect.signature(real).bind(*arguments, **settings)
        bound.apply_defaults()
        seen.update(bound.arguments)
        return function(real, *arguments, **settings)

    monkeypatch.setattr(varlen, "varlen_attn", watch)
    return seen


@pytest.mark.parametrize(
    ("causal", "window", "wanted"),
    [(False, None, (-1, -1)), (True, None, (-1, 0)), (False, (2, 1), (2, 1)), (True, (3, -1), (3, 0)), (True, (-1, 5), (-1, 0))],
)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_half_precision_on_cuda_goes_to_torchs_own_kernel(monkeypatch, causal, window, wanted, kv_heads):
    """No GPU here: torch's real function, on tensors that have no numbers but say that they are on one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(Segments, "total", property(lambda self: sum(self.lengths)))  # such a tensor cannot be read
    seen = watched(monkeypatch, lambda real, *arguments, **settings: real(*arguments, **settings))
    with FakeTensorMode():
        q, k, v = (torch.empty(14, heads, 8, dtype=torch.bfloat16, device="cuda") for heads in (4, kv_heads, kv_heads))
        out = attention(q, k, v, Segments((2, 9, 2, 1)), causal=causal, window=window)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.bfloat16, "cuda")
    assert all(seen[name] is given for name, given in (("query", q), ("key", k), ("value", v)))
    assert all((seen[name].dtype, seen[name].device.type) == (torch.int32, "cuda") for name in ("cu_seq_q", "cu_seq_k"))
    assert seen["window_size"] == wanted  # a list would not be torch's (-1, 0), by which it knows causal attention
    assert seen["enable_gqa"] == (kv_heads == 2)
    assert (seen["seqused_k"], seen["block_table"]) == (None, None)  # the kernel has no gradient with them


def test_the_cuda_kernel_is_told_lengths_of_queries_and_keys_apart(monkeypatch):
    """Pooling by a probe: few queries, many keys. Gradients come back in the shapes of what went in, by torch's own backward."""
    queries, keys = Segments((1, 3, 2)), Segments((2, 9, 4))
    q, k, v = (torch.randn(total, heads, 8) for total, heads in ((6, 4), (15, 2), (15, 2)))
    seen = watched(monkeypatch, lambda real, q, *arguments, **settings: torch.zeros_like(q))
    _varlen_cuda(q, k, v, queries, keys, False, None, 0.3)
    assert (seen["cu_seq_q"].tolist(), seen["cu_seq_k"].tolist()) == ([0, 1, 4, 6], [0, 2, 11, 15])
    assert (seen["max_q"], seen["max_k"], seen["scale"]) == (3, 9, 0.3)
    assert {type(seen["max_q"]), type(seen["max_k"])} == {int}
    monkeypatch.undo()
    inputs = [x.to("meta").bfloat16().requires_grad_() for x in (q, k, v)]
    gradients = torch.autograd.grad(_varlen_cuda(*inputs, queries, keys, False, None, None).sum(), inputs)
    assert [gradient.shape for gradient in gradients] == [q.shape, k.shape, v.shape]
