"""Damaged directories: always a CheckpointError, and its message names the file or the key to look at."""

import json
import re

import hf_checkpoints as hf
import pytest
import torch
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.weights.open_clip_config import TRUNKS

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


def places(path) -> tuple[int, dict[str, tuple[int, int]]]:
    """Where a safetensors file's values begin, and where each tensor lies after that; in its order."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    offsets = {key: tuple(place["data_offsets"]) for key, place in header.items() if key != "__metadata__"}
    return 8 + length, dict(sorted(offsets.items(), key=lambda item: item[1]))


def cut(path, size: int):
    path.write_bytes(path.read_bytes()[:size])
    return path


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("which", [0, 7, -1])
@pytest.mark.parametrize("whole_bytes", [0, 3])
def test_a_truncated_file_names_the_first_lost_tensor_and_how_many_there_are(whole_bytes, which, family, broken):
    """Cut right before a tensor, and inside of it."""
    path = broken(family) / "model.safetensors"
    start, offsets = places(path)
    key = list(offsets)[which]
    cut(path, start + offsets[key][0] + whole_bytes)
    said, others = message(path.parent), len(offsets) - 1 - list(offsets).index(key)
    assert named("model.safetensors", said.replace("/", " "))
    assert named(key, said)
    assert f" and {others} more" in said if others else "more" not in said


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_file_cut_inside_its_header_says_that_everything_is_lost(family, broken):
    path = broken(family) / "model.safetensors"
    cut(path, places(path)[0] - 1)
    assert "all of them are lost" in message(path.parent)


def test_a_file_that_is_something_else_is_not_called_cut(broken):
    path = broken("clip") / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 600000\n")
    assert "cut short" not in message(path.parent)


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("inside_header", [False, True])
def test_a_truncated_shard_is_named_with_what_it_held(inside_header, family, checkpoint, tmp_path):
    """What its index says that it holds is named where its own header is lost too."""
    checkpoint(CASE[family])[1].save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    start, offsets = places(shard)
    cut(shard, 20 if inside_header else start + offsets[list(offsets)[-1]][1] - 7)
    said = message(tmp_path)
    assert shard.name in said
    held = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    lost = [key for key, name in held.items() if name == shard.name] if inside_header else [list(offsets)[-1]]
    assert any(named(key, said) for key in lost)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_missing_shards_are_named_with_what_they_held(family, checkpoint, tmp_path):
    checkpoint(CASE[family])[1].save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    gone = (shards[0], shards[-1])
    for shard in gone:
        shard.unlink()
    said = message(tmp_path)
    held = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    lost = [key for key, name in held.items() if name in (gone[0].name, gone[1].name)]
    assert all(shard.name in said for shard in gone)
    assert any(named(key, said) for key in lost)
    assert f"and {len(lost) - 1} more" in said


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none_is_named(text, checkpoint, tmp_path):
    checkpoint(CASE["clip"])[1].save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in message(tmp_path)


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


# -- open_clip's layout, and the files that its training writes ---------------------------------------------------------------------

SIGLIP_TRUNK = ("vit_tiny", ((36, 2, 3, 50), {(14, 60)}))
"""A name for the tower of `siglip-tanh-14`: timm has none so small."""
OPEN_CLIP = {"clip": "clip-gelu-14", "siglip": "siglip-tanh-14"}


@pytest.fixture
def in_open_clips_layout(checkpoint, monkeypatch, tmp_path):
    """make(family, edit, trained) -> a directory of open_clip's, or the `.pt` of its training, whose tensors went through edit(tensors)."""
    monkeypatch.setitem(TRUNKS, *SIGLIP_TRUNK)

    def make(family: str, edit=None, trained: bool = False):
        folder = intermodal.save(intermodal.load(checkpoint(OPEN_CLIP[family])[0]), tmp_path / "open_clip", layout="open_clip")
        file = folder / "open_clip_model.safetensors"
        state = load_file(file)
        if edit:
            edit(state)
        if not trained:
            save_file({key: value.contiguous() for key, value in state.items()}, file)
            return folder
        parts = {f"module.{key}": value.clone() for key, value in state.items()}
        torch.save({"epoch": 1, "state_dict": parts}, folder / "epoch_1.pt")
        return folder / "epoch_1.pt"

    return make


def keys_of(make, family: str) -> list[str]:
    return list(load_file(make(family) / "open_clip_model.safetensors"))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("family", OPEN_CLIP)
def test_every_tensor_of_open_clips_that_is_missing_misshapen_or_not_finite_is_named(family, trained, in_open_clips_layout):
    def lengthen(state, key):
        value = state[key].reshape(1) if state[key].ndim == 0 else state[key]
        state[key] = torch.cat([value, value[:1]])

    def spoil(state, key):
        state[key] = state[key].clone()
        state[key].view(-1)[-1] = float("nan")

    def add_axes(state, key):
        state[key] = torch.stack([state[key][None]] * 2)

    for key in keys_of(in_open_clips_layout, family):
        for damage in (dict.pop, lengthen, add_axes, spoil):
            said = message(in_open_clips_layout(family, lambda state, key=key, damage=damage: damage(state, key), trained))
            assert named(key, said), (damage, said)


@pytest.mark.parametrize("family", OPEN_CLIP)
def test_truncated_files_of_open_clips_name_the_first_lost_tensor(family, in_open_clips_layout):
    file = in_open_clips_layout(family) / "open_clip_model.safetensors"
    start, offsets = places(file)
    key = list(offsets)[4]
    cut(file, start + offsets[key][0])
    said = message(file.parent)
    assert named(key, said)
    assert f"and {len(offsets) - 5} more" in said
    cut(file, start - 3)
    assert "open_clip_model.safetensors" in message(file.parent)


@pytest.mark.parametrize("family", OPEN_CLIP)
def test_a_truncated_training_file_names_the_first_lost_tensor(family, in_open_clips_layout):
    """Wherever it is cut: from a byte before its end, where only the zip's directory is gone, to its first kilobyte."""
    path = in_open_clips_layout(family, trained=True)
    keys, data = keys_of(in_open_clips_layout, family), path.read_bytes()
    path = in_open_clips_layout(family, trained=True)
    order = list(torch.load(path, weights_only=True)["state_dict"])
    for which in (0, len(order) // 2, len(order) - 1):
        entry = data.index(f"/data/{which}".encode())  # the first such name: the directory, which has them again, is at the end
        path.write_bytes(data[: entry + 30])
        said = message(path)
        assert named(order[which], said), said
        others = len(order) - which - 1
        assert f" and {others} more" in said if others else "more" not in said
    for size, words in ((len(data) - 1, "directory"), (900, "all of them are lost"), (20, "all of them are lost"), (0, "empty")):
        path.write_bytes(data[:size])
        said = message(path)
        assert words in said
        assert "epoch_1.pt" in said
    assert len(keys) == len(order)


@pytest.mark.parametrize("held", [[1, 2], {"state_dict": 3}, {"state_dict": {"a": "b"}}, {"epoch": 1}, torch.zeros(3)])
def test_a_training_file_that_holds_something_else_is_named(held, in_open_clips_layout):
    path = in_open_clips_layout("clip", trained=True)
    torch.save(held, path)
    assert "epoch_1.pt" in message(path)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_truncated_pickle_of_transformers_names_the_first_lost_tensor(family, broken):
    folder = broken(family)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    cut(folder / "pytorch_model.bin", (folder / "pytorch_model.bin").read_bytes().index(b"/data/5") + 10)
    said = message(folder)
    assert named(list(state)[5], said)
    assert f"and {len(state) - 6} more" in said


@pytest.mark.parametrize(
    ("section", "value"),
    [("vision_config", {"hidden_size": "wide"}), ("text_config", {"num_hidden_layers": [3]}), ("text_config", {"hidden_size": -4})],
)
def test_a_setting_of_another_kind_is_a_checkpoint_error_that_names_the_file(section, value, broken):
    folder = broken("clip")
    config = json.loads((folder / "config.json").read_text())
    config[section].update(value)
    (folder / "config.json").write_text(json.dumps(config))
    assert str(folder) in message(folder)
