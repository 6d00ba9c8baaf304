"""What would stop a later stage at its start stops the run before the first one trains."""

import json
from dataclasses import replace

import pytest
import torch
from test_stages import recipe, tower  # noqa: F401

from intermodal.errors import IntermodalError
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import LanguageModel
from intermodal.train import ahead, lora
from intermodal.train.recipe import LoraConfig
from intermodal.train.stages import build_model, train_stages
from intermodal.train.stages import open_talks as opened

LORA = LoraConfig(targets=("model.layers.*.q_proj", "vision.*.q_proj"), rank=2)


def later(recipe, **changes):  # noqa: F811
    """The recipe with another last stage."""
    data = changes.pop("data", {})
    last = recipe.stages[-1]
    return replace(recipe, stages=(*recipe.stages[:-1], replace(last, **changes, data=replace(last.data, **data))))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"learn": (("nope.*", 1.0),)}, "no parameter fits 'nope.*'"),
        ({"learn": (("*", -1.0),)}, "the rate of '\\*' in a stage's learn is -1"),
        ({"lora": LoraConfig(targets=("vision.*qkv",))}, r"no linear layer fits 'vision.\*qkv'; there are .*vision\..*\.q_proj"),
        ({"cache_tower": True, "learn": (("*", 1.0),)}, "cache_tower keeps what a frozen tower says, and vision"),
        (
            {"cache_tower": True, "lora": LORA, "learn": (("vision.*lora_*", 1.0),)},
            "a frozen tower says, and vision.*lora_A.*learns",
        ),
        ({"data": {"train": ("SILENT",), "weights": None}}, "of SILENT cannot be trained on; .*no token is supervised"),
    ],
)
def test_a_stage_that_could_not_begin_is_found_before_another_trains(recipe, changes, why, tmp_path, monkeypatch):  # noqa: F811
    silent = tmp_path / "silent.jsonl"
    silent.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    if "data" in changes:
        changes = {"data": {**changes["data"], "train": (str(silent),)}}
    monkeypatch.setattr("intermodal.train.loop.Trainer.run", lambda self: pytest.fail("the first stage trained"))
    with pytest.raises(
        IntermodalError, match=f"stage {recipe.stages[-1].name}, which is still to come: .*{why.replace('SILENT', str(silent))}"
    ):
        train_stages(later(recipe, **changes), tmp_path / "run", quiet=True)


def test_the_stages_as_they_are_pass_and_each_is_looked_at_once(recipe, tmp_path, monkeypatch):  # noqa: F811
    looked, look = [], ahead.look_ahead
    monkeypatch.setattr("intermodal.train.stages.look_ahead", lambda model, stage: looked.append(stage.name) or look(model, stage))
    train_stages(recipe, tmp_path / "run", quiet=True)
    assert looked == [stage.name for stage in recipe.stages[1:]]
    train_stages(recipe, tmp_path / "run", quiet=True, resume=True)
    assert len(looked) == len(recipe.stages) - 1, "what is done is not looked at"


def test_a_look_leaves_the_model_as_it_was(recipe):  # noqa: F811
    sources = [opened(spec) for stage in recipe.stages for spec in stage.data.train]
    model = build_model(recipe.model, sources)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    said = vars(model.processor).copy()
    ahead.look_ahead(model, replace(recipe.stages[-1], lora=LORA, learn=(("*lora_*", 1.0),)))
    assert vars(model.processor) == said
    assert [name for name, _ in model.named_parameters()] == list(before)
    assert all(
        torch.equal(value, before[name][0]) and value.requires_grad == before[name][1] for name, value in model.named_parameters()
    )


def test_names_with_adapters_are_those_that_peft_gives():
    model = LanguageModel(DecoderConfig(32, 2, 2, 1, 16, 48, 64, qkv_bias=True))
    names = [name for name, _ in model.named_parameters()]
    config = LoraConfig(targets=("*.q_proj", "*down_proj"), rank=2)
    expected = lora.names_with(names, lora.layers_of(model, config))
    lora.add(model, config)
    assert sorted(expected) == sorted(name for name, _ in model.named_parameters())
    assert lora.names_with(["image_newline", "a.weight"], []) == ["image_newline", "a.weight"]
