"""Settings in a decoder's config.json that transformers reads in some families only, against transformers by the same file."""

import json

import pytest
import torch
import transformers
from test_decoder import SHAPE, run

import intermodal
from intermodal.errors import CheckpointError
from intermodal.nn.attention import Segments

WINDOW = dict(sliding_window=16, use_sliding_window=True, layer_types=None)


def written(folder, name, changes):
    """A tiny model as transformers saves it, its config.json changed -> transformers' model by that file."""
    torch.manual_seed(5)
    more = dict(sliding_window=None) if name == "Mistral" else {}
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, "max_position_embeddings": 128, **more})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.15
    model.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", dict(attention_bias=True)),
        ("Qwen2", dict(attention_bias=True)),
        ("Mistral", dict(mlp_bias=True)),
        ("Qwen2", dict(mlp_bias=True)),
        ("Qwen3", dict(mlp_bias=True)),
        ("Llama", WINDOW),
        ("Qwen2", {**WINDOW, "max_window_layers": 3}),
        ("Qwen3", {**WINDOW, "max_window_layers": 28}),
        ("Qwen2", WINDOW),  # 28 layers by default
        ("Qwen2", {**WINDOW, "layer_types": ["full_attention"] * 3, "max_window_layers": 0}),
        ("Qwen2", {**WINDOW, "sliding_window": None, "max_window_layers": 0}),
        ("Qwen3", dict(sliding_window=16, max_window_layers=0, layer_types=None)),
        ("Mistral", dict(sliding_window=200)),
    ],
)
def test_what_a_family_does_not_read_changes_nothing(name, changes, tmp_path):
    theirs = written(tmp_path, name, changes)
    ids = torch.arange(100)
    with torch.no_grad():
        torch.testing.assert_close(
            run(intermodal.load(tmp_path), ids, Segments([100])), theirs(ids[None]).logits[0], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", dict(sliding_window=16)),
        ("Qwen2", {**WINDOW, "max_window_layers": 2}),
        ("Qwen3", {**WINDOW, "max_window_layers": 0}),
        ("Qwen2", {**WINDOW, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
    ],
)
def test_a_window_in_some_layers_is_refused(name, changes, tmp_path):
    written(tmp_path, name, changes)
    with pytest.raises(CheckpointError, match=r"sliding-window attention \(sliding_window=16 of 128 positions\) is not built"):
        intermodal.load(tmp_path)
