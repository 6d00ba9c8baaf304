"""Which of the tower's features a LLaVA reads, by its config.json, against transformers; settings of which it has none."""

import json
import shutil

import pytest
import torch
import transformers
from chat_files import byte_tokenizer, write_chat_files
from test_llava import FAMILIES, NAMES, SIDE, SPECIAL, TEMPLATE, clip, config, made, picture, said, settings, theirs, user  # noqa: F401

import intermodal
from intermodal.errors import CheckpointError
from intermodal.inputs.media import MediaError

TALK = [user(picture(97, 61, 1), "What is it?"), said("Noise."), user(picture(33, 150, 2), "And?"), said("More.")]
SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False)


def built(folder, family="llava", tower=None, **settings_of_config):
    """A tiny model that transformers saved -> transformers' model, ours."""
    made_of = json.loads(config(family, tied=False).to_json_string())
    vision = {**made_of.pop("vision_config"), **(tower or {})}
    text = made_of.pop("text_config")
    kind = f"{NAMES[family]}Config"
    whole = getattr(transformers, kind)(**{**made_of, **settings_of_config}, vision_config=vision, text_config=text)
    torch.manual_seed(3)
    model = getattr(transformers, f"{NAMES[family]}ForConditionalGeneration")(whole).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.12 if parameter.ndim > 1 else 0.05)
    model.save_pretrained(folder)
    pictures = {**settings(family), **({"size": {"height": SIDE, "width": SIDE}} if tower else {})}
    write_chat_files(folder, byte_tokenizer(SPECIAL), TEMPLATE, eos="</s>", **pictures)
    return model, intermodal.load(folder)


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("tower", [None, SIGLIP], ids=["clip", "siglip"])
def test_each_tower_with_each_strategy(tower, strategy, tmp_path):
    """CLIP's class token is a feature more where it is kept; of a tower that has none the first patch is dropped all the same."""
    model, ours = built(tmp_path, tower=tower, vision_feature_select_strategy=strategy)
    conversation = ours.processor.conversation(TALK)
    count = 16 + (tower is None) - (strategy == "default")
    assert [plan.features for plan in conversation.plans] == [count, count]
    batch = ours.processor(TALK)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs("llava", model, batch, TALK), atol=1e-4, rtol=0)
    frame = ours.processor.planner.frame((97, 61), conversation.plans[0])
    assert len(frame.tokens) == count
    assert frame.tokens[-1] is None or frame.tokens[-1][2] > 90
    if count == 17:
        assert frame.tokens[0] is None
    intermodal.save(ours, tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(intermodal.load(tmp_path / "again")(batch), ours(batch))


@pytest.mark.parametrize(
    ("family", "strategy"), [("llava_next", "full"), ("llava_onevision", "default"), ("llava", "cls_patch"), ("llava", None)]
)
def test_a_strategy_that_leaves_no_square_to_tile_is_refused(made, family, strategy, tmp_path):  # noqa: F811
    folder, _ = made(family)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, vision_feature_select_strategy=strategy)
    with pytest.raises(CheckpointError, match=rf"config.json: vision_feature_select_strategy .*{strategy}"):
        intermodal.load(tmp_path)


@pytest.mark.parametrize("layer", [-4, 3, -1, [-2]])
def test_the_layers_that_a_tower_has(layer, tmp_path):
    model, ours = built(tmp_path, vision_feature_layer=layer)
    batch = ours.processor(TALK)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), theirs("llava", model, batch, TALK), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", [-5, 4, -24, True, "-2", None, 1.0])
def test_a_layer_that_the_tower_does_not_have_is_refused(made, layer, tmp_path):  # noqa: F811
    folder, _ = made("llava")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, vision_feature_layer=layer)
    with pytest.raises(CheckpointError, match=r"vision_feature_layer is .*; a tower of 3 blocks .* has -4 to 3"):
        intermodal.load(tmp_path)


@pytest.mark.parametrize("rules", ["transformer", "Authors", None, True, ["authors"]])
def test_misspelt_rules_are_refused(made, rules, tmp_path):  # noqa: F811
    folder, _ = made("llava")
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    edit(tmp_path, intermodal={"rules": rules})
    with pytest.raises(CheckpointError, match=r'config.json: intermodal.rules is .*"authors"'):
        intermodal.load(tmp_path)


def edit(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_cannot_ask_for_a_size(made, family):  # noqa: F811
    """The tower's square is what it is; what only Qwen-VL models grant is not passed over in silence, a budget with a warning."""
    processor = intermodal.load(made(family)[0]).processor
    parts = [{"type": "image", "image": picture(40, 30, 1)}]
    if family == "llava_onevision":
        parts.append({"type": "video", "video": clip(3, 1)})
    for part in parts:
        asked = [{"role": "user", "content": [part | {"resized_height": 28, "resized_width": 28}]}]
        with pytest.raises(MediaError, match=rf"{family} shows media at sizes of its own: leave resized_height"):
            processor(asked, reply=True)
        with pytest.warns(UserWarning, match=rf"{family} shows media at sizes of its own: min_pixels and max_pixels"):
            bounded = processor([{"role": "user", "content": [part | {"max_pixels": 400}]}], reply=True)
        assert torch.equal(bounded.ids, processor([{"role": "user", "content": [part]}], reply=True).ids)
        with pytest.warns(UserWarning, match="and total_pixels of clips, are passed over"):
            bounded = processor([{"role": "user", "content": [part | {"total_pixels": 400}]}], reply=True)
        assert torch.equal(bounded.ids, processor([{"role": "user", "content": [part]}], reply=True).ids)
