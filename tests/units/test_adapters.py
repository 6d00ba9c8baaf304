"""Adapters saved with what learned beside them, read back here and by peft, and switched off."""

# ruff: noqa: F811  # fixtures are imported by their names
import json
import warnings

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from small_llava import ASKED, QUESTION, recipe, small, stage  # noqa: F401

import intermodal
from intermodal.errors import CheckpointError
from intermodal.models.decoder import DecoderConfig
from intermodal.train import lora
from intermodal.train.recipe import LoraConfig
from intermodal.train.stages import train_stages
from intermodal.weights.stitch import fresh_decoder


def with_noise(model):
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize(
    ("learn", "targets"),
    [
        (("*lora_*", "projector.*", "vision.*"), ("model.layers.*_proj",)),  # recipes/llava_smollm2.py's
        (("*",), ("model.layers.*_proj", "lm_head", "projector.*")),  # weights below adapters, too
    ],
)
def test_what_learned_beside_adapters_comes_back_with_them(small, tmp_path, learn, targets):
    settings = LoraConfig(targets, rank=4, alpha=6.0)
    adapting = stage(small, learn=tuple((pattern, 1.0) for pattern in learn), lora=settings)
    expected = train_stages(recipe(small, adapting), tmp_path, quiet=True).logits(QUESTION)
    folder, base = tmp_path / "1-a" / "adapter", intermodal.load(small / "start")
    assert (expected - base.logits(QUESTION)).abs().max() > 0.1
    assert lora.load(base, folder) == settings
    torch.testing.assert_close(base.logits(QUESTION), expected, rtol=0, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # how peft tells of keys that it does not know or misses
        theirs = peft.PeftModel.from_pretrained(intermodal.load(small / "start"), str(folder))
    torch.testing.assert_close(theirs.base_model.model.logits(QUESTION), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.merge_and_unload().logits(QUESTION), expected, rtol=0, atol=1e-5)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(small / "start")


def test_a_decoders_adapters_go_onto_transformers_own(tmp_path):
    decoder = fresh_decoder(DecoderConfig(32, 2, 2, 2, 16, 48, 0), [ASKED], 64)
    intermodal.save(decoder, tmp_path / "base")
    batch = decoder.processor([{"role": "user", "content": ASKED}, {"role": "assistant", "content": ASKED}])
    plain = decoder(batch).detach()
    settings = LoraConfig(("model.layers.*_proj", "lm_head"), rank=2)
    lora.add(decoder, settings)
    lora.save(with_noise(decoder), settings, tmp_path / "adapter")
    lora.merge(decoder)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(hf, str(tmp_path / "adapter"))
    with torch.no_grad():
        got, expected = theirs(batch.ids[None]).logits[0], decoder(batch)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    assert (expected - plain).abs().max() > 0.1


def test_adapters_of_an_older_version_are_read_with_a_warning_and_others_refused(small, tmp_path):
    from safetensors.torch import load_file, save_file

    settings = LoraConfig(("model.layers.*_proj",), rank=2)
    model = intermodal.load(small / "start")
    lora.add(model, settings)
    lora.save(with_noise(model), settings, tmp_path)
    older = {"peft_type": "LORA", "library": "intermodal", **json.loads((tmp_path / "lora.json").read_text())}
    (tmp_path / "lora.json").unlink()
    again = intermodal.load(small / "start")
    with pytest.raises(CheckpointError, match="not written here"):
        lora.load(again, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(older))
    save_file(lora.state(model), tmp_path / "adapter_model.safetensors")
    assert not any(key.startswith("base_model") for key in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.warns(UserWarning, match="only adapters were kept"):
        lora.load(again, tmp_path)
    assert torch.equal(again.logits(QUESTION), model.logits(QUESTION))


def test_a_chat_looks_again_when_the_towers_adapters_are_switched_or_scaled(small):
    model = intermodal.load(small / "start")
    lora.add(model, LoraConfig(("vision.encoder.*_proj",), rank=4))
    with_noise(model)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]

    def seen():
        """What was looked at, and what the decoder gets of it, from the chat's cache or not."""
        model.generate(QUESTION, max_new_tokens=1)
        batch = model.processor.batch(model.processor.conversation(QUESTION), cache=model.vision_cache)
        assert len(batch.visual.pixels) == 0
        with torch.no_grad():
            return model.states(batch.visual)[0], model.see(model.processor(QUESTION).visual)[0]

    found = []
    for change in (
        lambda layer: None,
        lambda layer: layer.enable_adapters(False),
        lambda layer: layer.enable_adapters(True),
        lambda layer: layer.scale_layer(0.5),
        lambda layer: layer.merge(),
    ):
        for layer in layers:
            change(layer)
        kept, fresh = seen()
        assert torch.equal(kept, fresh)
        found.append(kept)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[3])


def test_an_output_layers_adapter_counts_once_or_not_at_all(small):
    """Scores are made of the layer's weight, not by its own forward."""
    model = intermodal.load(small / "start")
    plain = model.logits(QUESTION)
    lora.add(model, LoraConfig(("lm_head",), rank=4))
    adapted = with_noise(model).logits(QUESTION)
    assert (adapted - plain).abs().max() > 0.1
    model.lm_head.enable_adapters(False)
    assert torch.equal(model.logits(QUESTION), plain)
    model.lm_head.enable_adapters(True)
    model.lm_head.merge()
    torch.testing.assert_close(model.logits(QUESTION), adapted, rtol=0, atol=1e-5)
