"""GGUF files whose rope is scaled, in the ways in which llama.cpp's converter writes them, against transformers."""

import numpy as np
import pytest
import torch
import transformers
from test_decoder import LLAMA3, SHAPE, YARN, run, write_gguf

import intermodal
from intermodal.errors import CheckpointError
from intermodal.nn.attention import Segments

LINEAR = dict(rope_type="linear", rope_theta=1e4, factor=4.0)


def model_with(rope):
    torch.manual_seed(4)
    config = transformers.LlamaConfig(**SHAPE, max_position_embeddings=512, rope_parameters=rope or dict(rope_theta=1e4))
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.15
    return model


def divisors_of(model, head=8):
    """What the frequencies are divided by, as the converter works it out: those of plain rope over the model's own."""
    plain = 1 / model.config.rope_parameters["rope_theta"] ** (np.arange(0, head, 2) / head)
    return (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)


def check(file, model, tmp_path):
    ours = intermodal.load(file)
    ids = torch.arange(150)
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        torch.testing.assert_close(run(ours, ids, Segments([150])), expected, atol=1e-5, rtol=1e-5)
        intermodal.save(ours, tmp_path / "hf")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        torch.testing.assert_close(again(ids[None]).logits[0], expected, atol=1e-5, rtol=1e-5)
    return ours.config.rope


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        (LINEAR, {"scaling.type": "linear", "scaling.factor": 4.0}),
        (LINEAR, {"scaling.factor": 4.0}),
        (LINEAR, {"scale_linear": 4.0}),
        (YARN, {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64, "scaling.finetuned": True}),
        (
            YARN,
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 64, "scaling.yarn_beta_fast": 32.0},
        ),
        (None, {"scaling.type": "none", "scaling.factor": 4.0}),
        (None, {"scaling.type": "linear"}),
    ],
)
def test_a_scaling_that_the_fields_say(rope, said, tmp_path):
    """A factor without a type is linear, and `rope.scale_linear` is its name in old files (llama.cpp `llama-model.cpp`)."""
    model = model_with(rope)
    write_gguf(tmp_path / "tiny.gguf", model, rope=said)
    check(tmp_path / "tiny.gguf", model, tmp_path)


@pytest.mark.parametrize("original", [64, 23])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_divisors_of_llama3_files(factor, original, tmp_path):
    """Llama 3.1's and 3.2's files have no setting but a tensor, `rope_freqs.weight`."""
    model = model_with({**LLAMA3, "rope_theta": 1e4, "factor": factor, "original_max_position_embeddings": original})
    divisors = divisors_of(model)
    assert divisors.max() == pytest.approx(factor)
    assert ((divisors > 1.01) & (divisors < 0.99 * factor)).any()
    write_gguf(tmp_path / "tiny.gguf", model, tensors={"rope_freqs.weight": divisors})
    rope = check(tmp_path / "tiny.gguf", model, tmp_path)
    assert (rope.kind, rope.factor, rope.original_context) == ("llama3", pytest.approx(factor), original)


def test_the_divisors_of_released_files(tmp_path):
    """Llama 3.1 8B's own numbers: 64 frequencies, theta 500000, 8192 positions at first."""
    from intermodal.nn.rope import RopeConfig
    from intermodal.weights.gguf import _divided

    released = RopeConfig(5e5, "llama3", 8.0, 8192)
    plain = RopeConfig(5e5)
    divisors = plain.frequencies(128)[0] / released.frequencies(128)[0]
    assert _divided(plain, divisors, 128, tmp_path) == released
    assert _divided(plain, torch.ones(64), 128, tmp_path) == plain


@pytest.mark.parametrize(
    ("said", "divisors", "message"),
    [
        ({"scaling.type": "longrope"}, None, r"of type 'longrope' is not read .*linear and plain yarn are"),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.yarn_beta_fast": 16.0},
            None,
            r"with llama\.rope\.scaling\.yarn_beta_fast=16",
        ),
        ({"scaling.factor": 4.0}, [1, 1, 8, 8], "scaled twice, by linear 4.0 and by rope_freqs.weight"),
        ({}, [1, 2, 3, 4], "rope_freqs.weight is no llama3 scaling"),
        ({}, [0.5, 1, 1, 1], "rope_freqs.weight is no llama3 scaling"),
        ({}, [1, 0, 8, 8], "should be 4 numbers above 0"),
        ({}, [1, 8], "should be 4 numbers above 0"),
    ],
)
def test_other_scalings_are_refused(said, divisors, message, tmp_path):
    tensors = {} if divisors is None else {"rope_freqs.weight": np.array(divisors, np.float32)}
    write_gguf(tmp_path / "tiny.gguf", model_with(None), rope=said, tensors=tensors)
    with pytest.raises(CheckpointError, match=message):
        intermodal.load(tmp_path / "tiny.gguf")
