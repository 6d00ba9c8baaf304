"""Whole directories whose settings or types are not what a model can be run with: told when they are loaded, by the name in the file."""

import json

import hf_checkpoints as hf
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.errors import CheckpointError, InputError, IntermodalError
from intermodal.inputs.image_settings import crop_of, levels_of, size_of

CASE = {"clip": "clip-quick-7", "siglip": "siglip-gelu-7", "siglip2": "siglip2-gelu-7"}
PICTURES = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


@pytest.fixture
def folder_of(checkpoint, tmp_path):
    """folder_of(family) -> a copy of a whole directory, the image processor's settings in it."""

    def make(family, **pictures):
        folder = hf.copy(checkpoint(CASE[family])[0], tmp_path / family)
        intermodal.save(intermodal.load(folder), folder)
        edit(folder / "preprocessor_config.json", pictures)
        return folder

    return make


def edit(file, changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize("key", ["visual_projection.weight", "logit_scale"])
def test_weights_of_eight_bits_are_named(folder_of, dtype, key):
    folder = folder_of("clip")
    state = load_file(folder / "model.safetensors")
    save_file({**state, key: state[key].to(dtype)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"of type {str(dtype).removeprefix('torch.')} {key}: quantised"):
        intermodal.load(folder)


def test_weights_that_a_type_cannot_hold_are_named(folder_of):
    """As float16 1e6 is infinity, and what `convert` writes would be refused by the next command."""
    folder = folder_of("clip")
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0, 0] = 1e6
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"visual_projection\.weight: values beyond 65,504"):
        intermodal.load(folder, dtype="float16")
    assert intermodal.load(folder, dtype="bfloat16")
    for kind in (torch.int8, torch.complex64, 16):
        with pytest.raises(IntermodalError, match=f"weights have no type {kind!r}; known are float32"):
            intermodal.load(folder, dtype=kind)


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("clip", "size", {"longest_edge": 30}),
        ("clip", "size", {"height": 30}),
        ("clip", "size", {"shortest_edge": "30"}),
        ("clip", "size", {"shortest_edge": 0}),
        ("clip", "crop_size", {"height": 30}),
        ("clip", "crop_size", [30, 30, 30]),
        ("clip", "crop_size", 29.5),
        ("siglip", "resample", "bicubic"),
        ("siglip", "resample", 9),
        ("siglip", "rescale_factor", 0),
        ("siglip", "image_std", [0, 0, 0]),
        ("siglip", "image_std", [0.5, 0.5]),
        ("siglip", "image_mean", 0.5),
        ("siglip", "image_mean", [0.5, 0.5, float("nan")]),
        ("siglip2", "image_std", [0.5, 0.5, 0]),
        ("siglip2", "patch_size", 0),
        ("siglip2", "max_num_patches", "many"),
    ],
)
def test_settings_of_the_image_processor_are_named(folder_of, family, setting, value):
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json\): {setting}[a-z_.]* is .*wanted is"):
        intermodal.load(folder_of(family, **{setting: value}))


def test_what_the_settings_may_say():
    assert (size_of({"shortest_edge": 30}), size_of(30), size_of({"height": 3, "width": 4}), size_of([3, 4])) == (
        30,
        30,
        (3, 4),
        (3, 4),
    )
    assert (crop_of(30), crop_of({"height": 3, "width": 4})) == ((30, 30), (3, 4))
    assert levels_of(PICTURES) == {"resample": 3, "rescale_factor": 1 / 255, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    raw = levels_of({**PICTURES, "do_normalize": False, "do_rescale": False, "image_std": [0, 0, 0]})
    assert (raw["rescale_factor"], raw["mean"], raw["std"]) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_size": {"height": 20, "width": 20}}, "pictures of 20 x 20 pixels, and the vision tower takes 30 x 30"),
        ({"do_center_crop": False}, "without a crop: pictures would not have one size"),
    ],
)
def test_pictures_of_another_size_are_told_at_once_and_refused(folder_of, settings, words):
    """No error before a picture comes: the texts of such a directory can be embedded."""
    with pytest.warns(UserWarning, match=words):
        model = intermodal.load(folder_of("clip", **settings))
    with pytest.raises((InputError, CheckpointError), match=r"image_size=|would not have one size"):
        model.embed_images([Image.new("RGB", (40, 30))])


def test_an_end_token_of_null_is_refused(folder_of):
    """The default of the class would be another token than the texts end with, and pool at another place."""
    folder = folder_of("clip")
    config = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", {"text_config": {**config["text_config"], "eos_token_id": None}})
    with pytest.raises(CheckpointError, match=r"config.json: text_config.eos_token_id is null"):
        intermodal.load(folder)


@pytest.mark.parametrize("layout", ["hf", "open_clip"])
def test_a_model_in_the_other_layout_is_not_saved_over(checkpoint, tmp_path, layout):
    """`load` would go on taking the old one, and so would open_clip."""
    model = intermodal.load(checkpoint(CASE["clip"])[0])
    other = "open_clip" if layout == "hf" else "hf"
    intermodal.save(model, tmp_path / "cc", layout=other)
    before = {file.name: file.read_bytes() for file in (tmp_path / "cc").iterdir()}
    with pytest.raises(CheckpointError, match=r"config.json belongs to a model in another layout .*empty folder"):
        intermodal.save(model, tmp_path / "cc", layout=layout)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cc").iterdir()} == before
    intermodal.save(model, tmp_path / "cc", layout=other)


def test_a_clip_with_a_bias_that_chooses_its_layout_is_refused_too(checkpoint, tmp_path):
    model = intermodal.load(checkpoint(CASE["clip"])[0])
    intermodal.save(model, tmp_path / "cc")
    model.add_bias(10.0, -10.0)
    with pytest.raises(CheckpointError, match=r"cc/config.json belongs to a model in another layout than 'open_clip'"):
        intermodal.save(model, tmp_path / "cc")
