"""Damaged directories: always a CheckpointError, and its message names the file or the key to look at."""

import json
import re

import hf_checkpoints as hf
import pytest
import torch
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.errors import CheckpointError, IntermodalError

CASE = {"clip": "clip-quick-7", "siglip": "siglip-gelu-7", "siglip2": "siglip2-gelu-7"}

# Keys as the checkpoint has them: a message says them as they are in the file.
KEYS = {
    "clip": (
        "logit_scale",
        "visual_projection.weight",
        "text_projection.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding.weight",
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.pre_layrnorm.weight",
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.2.mlp.fc1.bias",
    ),
    "siglip": (
        "logit_bias",
        "vision_model.head.probe",
        "vision_model.head.attention.in_proj_weight",
        "vision_model.head.attention.in_proj_bias",
        "vision_model.head.mlp.fc2.weight",
        "text_model.head.bias",
        "vision_model.encoder.layers.1.self_attn.k_proj.weight",
    ),
    "siglip2": (
        "logit_scale",
        "vision_model.embeddings.patch_embedding.bias",
        "vision_model.embeddings.position_embedding.weight",
        "text_model.final_layer_norm.weight",
        "text_model.encoder.layers.0.layer_norm1.weight",
    ),
}
EVERY = [(family, key) for family, keys in KEYS.items() for key in keys]


@pytest.fixture
def broken(checkpoint, tmp_path):
    """broken(family, edit) -> a copy of a directory whose tensors went through edit(tensors)."""

    def make(family: str, edit=None):
        folder = hf.copy(checkpoint(CASE[family])[0], tmp_path / "model")
        if edit:
            state = load_file(folder / "model.safetensors")
            edit(state)
            save_file(
                {key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", metadata={"format": "pt"}
            )
        return folder

    return make


def message(folder, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        intermodal.load(folder, **options)
    return str(caught.value)


def named(key: str, said: str) -> bool:
    """Whether a message, which is one line, has the key as a whole word."""
    assert "\n" not in said
    return re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", said) is not None


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_the_undamaged_copy_loads(family, broken):
    assert intermodal.load(broken(family, lambda state: None)).source["folder"].endswith("model")


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("keep", [0, 5, 8, 300, 0.5, -1])
def test_a_truncated_file_is_named(keep, family, broken):
    """Cut to nothing, inside the header's length, after it, inside the header, in the middle, and by one byte."""
    path = broken(family) / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] if keep == 0.5 else data[:keep])
    assert "model.safetensors" in message(path.parent)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_truncated_shard_is_named(family, checkpoint, tmp_path):
    checkpoint(CASE[family])[1].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    assert shard.name in message(tmp_path)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_missing_shard_is_named(family, checkpoint, tmp_path):
    checkpoint(CASE[family])[1].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    shard.unlink()
    assert shard.name in message(tmp_path)


def test_a_key_that_the_index_promises_and_no_shard_holds_is_named(checkpoint, tmp_path):
    checkpoint(CASE["clip"])[1].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[0]
    state = load_file(shard)
    gone = sorted(state)[0]
    save_file({key: value for key, value in state.items() if key != gone}, shard, metadata={"format": "pt"})
    assert gone in message(tmp_path)


def test_a_broken_index_is_named(checkpoint, tmp_path):
    checkpoint(CASE["clip"])[1].save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text()[:40])
    assert index.name in message(tmp_path)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_missing_weights_name_the_directory_and_the_file(family, broken):
    folder = broken(family)
    (folder / "model.safetensors").unlink()
    said = message(folder)
    assert str(folder) in said
    assert "model.safetensors" in said


@pytest.mark.parametrize(("family", "key"), EVERY)
def test_a_missing_key_is_named(family, key, broken):
    said = message(broken(family, lambda state: state.pop(key)))
    assert named(key, said)
    assert "missing" in said


@pytest.mark.parametrize(("family", "key"), EVERY)
def test_a_wrong_shape_is_named(family, key, broken):
    def lengthen(state):
        value = state[key].reshape(1) if state[key].ndim == 0 else state[key]
        state[key] = torch.cat([value, value[:1]])

    said = message(broken(family, lengthen))
    assert named(key, said)
    assert "misshapen" in said


SAME_COUNT = {
    "patch embedding with its axes in another order": ("clip", "vision_model.embeddings.patch_embedding.weight", (2, 3, 1, 0)),
    "patch embedding of a flattened SigLIP": ("siglip", "vision_model.embeddings.patch_embedding.weight", (1, 0, 2, 3)),
    "linear patch embedding transposed": ("siglip2", "vision_model.embeddings.patch_embedding.weight", (1, 0)),
    "projection transposed": ("clip", "visual_projection.weight", (1, 0)),
    "position table transposed": ("siglip", "vision_model.embeddings.position_embedding.weight", (1, 0)),
    "probe as a column": ("siglip", "vision_model.head.probe", (2, 0, 1)),
}


@pytest.mark.parametrize("name", SAME_COUNT)
def test_a_wrong_shape_of_the_right_count_is_named(name, broken):
    """A tensor whose values are all there in another order fits after a reshape, and would be silently wrong."""
    family, key, order = SAME_COUNT[name]
    folder = broken(family, lambda state: state.update({key: state[key].permute(order)}))
    assert named(key, message(folder))


@pytest.mark.parametrize(("family", "key"), EVERY)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(value, family, key, broken):
    def spoil(state):
        state[key] = state[key].clone()
        state[key].view(-1)[-1] = value

    said = message(broken(family, spoil))
    assert named(key, said)
    assert "finite" in said.lower()


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize(
    "key",
    ["vision_model.embeddings.extra", "text_model.encoder.layers.7.mlp.fc1.bias", "totally.else", "vision_model.class_embedding"],
)
def test_a_surplus_key_is_named(key, family, broken):
    said = message(broken(family, lambda state: state.update({key: torch.ones(3)})))
    assert named(key, said)


def test_keys_of_another_family_are_named(broken, checkpoint):
    """A SigLIP file under a CLIP config."""
    folder = broken("clip")
    (folder / "model.safetensors").write_bytes((checkpoint(CASE["siglip"])[0] / "model.safetensors").read_bytes())
    said = message(folder)
    assert "logit_bias" in said or "embedding" in said


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("kind", ["clipp", "bert", "", None, 7])
def test_an_unknown_model_type_is_named_with_its_file(kind, family, broken):
    folder = broken(family)
    hf.edit_json(folder / "config.json", model_type=kind)
    said = message(folder)
    assert "config.json" in said
    assert repr(kind) in said
    assert "siglip2" in said  # what it could have been


def test_a_config_without_model_type_is_named(broken):
    folder = broken("clip")
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    said = message(folder)
    assert "config.json" in said
    assert "model_type" in said


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_missing_config_is_named(family, broken):
    folder = broken(family)
    (folder / "config.json").unlink()
    assert str(folder / "config.json") in message(folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "null", '{"model_type": "clip",}', "\x00\x01"])
def test_a_config_that_is_not_a_json_object_is_named(text, broken):
    folder = broken("clip")
    (folder / "config.json").write_text(text)
    assert "config.json" in message(folder)


SETTINGS = {
    "an activation that does not exist": ("clip", "vision_config", "hidden_act", "swishh"),
    "heads that do not divide the width": ("siglip", "text_config", "num_attention_heads", 5),
    "an oblong image": ("siglip", "vision_config", "image_size", [20, 27]),
    "a tower without its pooling head": ("siglip2", "vision_config", "vision_use_head", False),
    "more layers than the file holds": ("clip", "text_config", "num_hidden_layers", 4),
    "fewer layers than the file holds": ("siglip", "vision_config", "num_hidden_layers", 1),
    "another vocabulary": ("siglip2", "text_config", "vocab_size", 61),
    "another patch size": ("clip", "vision_config", "patch_size", 6),
    "another image size": ("clip", "vision_config", "image_size", 44),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_config_that_does_not_fit_is_a_checkpoint_error(name, broken):
    family, section, key, value = SETTINGS[name]
    folder = broken(family)
    config = json.loads((folder / "config.json").read_text())
    config[section][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert len(message(folder)) > 20


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "tokenizer_config.json"])
def test_a_settings_file_that_is_not_json_is_named(name, whole, tmp_path):
    folder = hf.copy(whole("clip")[0], tmp_path / "model")
    (folder / name).write_text('{"size": ')
    assert name in message(folder)


def test_a_path_that_is_no_directory_is_named(broken, tmp_path):
    folder = broken("clip")
    assert "model.safetensors" in message(folder / "model.safetensors")
    assert "nowhere" in message(tmp_path / "nowhere")
    assert "nowhere" in message("./nowhere")


def test_checkpoint_errors_are_the_libraries_own(broken):
    folder = broken("clip")
    (folder / "config.json").unlink()
    with pytest.raises(IntermodalError):
        intermodal.load(folder)


def test_an_unknown_layout_to_save_in_is_named(broken, tmp_path):
    model = intermodal.load(broken("clip"))
    with pytest.raises(CheckpointError, match="openclip"):
        intermodal.save(model, tmp_path / "out", layout="openclip")
