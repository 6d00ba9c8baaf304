"""Stitched checkpoints in the forms that they are met in: bf16, in shards, with buffers that old releases saved along."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.errors import CheckpointError

BUFFER = torch.arange(8.0)


def copied(folder, out):
    """A copy of a checkpoint's directory without its weights."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    return out


def check_bf16(folder, model, messages, logits, out):
    """Read as float32 its scores are transformers' by the same file; read as bf16 and saved, every tensor is the file's.

    Args:
        logits: (transformers' model, our batch) -> its scores of the conversation.
    """
    copied(folder, out)
    model.to(torch.bfloat16).save_pretrained(out)
    model.float()
    state = load_file(out / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    theirs = type(model).from_pretrained(out, dtype=torch.float32).eval()
    ours = intermodal.load(out)
    batch = ours.processor(messages)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), logits(theirs, batch), atol=1e-4, rtol=0)
    intermodal.save(intermodal.load(out, dtype="bfloat16"), out / "again")
    assert {value.dtype for value in load_file(out / "again" / "model.safetensors").values()} == {torch.bfloat16}
    before, after = (type(model).from_pretrained(one, dtype=torch.bfloat16).state_dict() for one in (out, out / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def check_shards(folder, model, messages, logits, out):
    """Shards that transformers writes are read as one file is; shards that we write transformers reads without a word."""
    copied(folder, out)
    model.save_pretrained(out, max_shard_size="60KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    ours, whole = intermodal.load(out), intermodal.load(folder)
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in ours.state_dict().items())
    batch = ours.processor(messages)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), logits(model, batch), atol=1e-4, rtol=0)
    intermodal.save(ours, out / "again", shard_bytes=60_000)
    assert len(list((out / "again").glob("model-*.safetensors"))) > 2
    again, told = type(model).from_pretrained(out / "again", output_loading_info=True)
    assert not any(told.values()), told
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def check_left_over(folder, messages, keys, out, logits=None, model=None):
    """Buffers that are computed today are passed over where a file has them, as transformers passes them over; other keys are refused."""
    copied(folder, out)
    state = load_file(folder / "model.safetensors")
    save_file({**state, **{key: BUFFER.clone() for key in keys}}, out / "model.safetensors", metadata={"format": "pt"})
    ours = intermodal.load(out)
    batch = ours.processor(messages)
    with torch.no_grad():
        assert torch.equal(ours(batch), intermodal.load(folder)(batch))
        if model is not None:
            theirs = type(model).from_pretrained(out).eval()
            torch.testing.assert_close(ours(batch), logits(theirs, batch), atol=1e-4, rtol=0)
    intermodal.save(ours, out / "again")
    assert not load_file(out / "again" / "model.safetensors").keys() & set(keys)
    other = keys[0].replace("inv_freq", "inv_frequency").replace("position_ids", "places")
    save_file({**state, other: BUFFER}, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=other.rsplit(".", 1)[-1]):
        intermodal.load(out)
