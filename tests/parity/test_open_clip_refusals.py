"""Configs of open_clip's other models: each is named, also where the tensors would fit one of ours."""

import json

import hf_checkpoints as hf
import pytest
from test_open_clip_layout import (
    saved_as_open_clip,
    tiny_trunks,  # noqa: F401
    write_published,
)

import intermodal
from intermodal.errors import CheckpointError

CLIP, SIGLIP = "clip-gelu-14", "siglip-tanh-14"


@pytest.fixture
def folder_of(checkpoint, tmp_path):
    """folder_of(case, change) -> a directory in open_clip's layout; `change` gets its `model_cfg`."""

    def make(case, change):
        folder = tmp_path / "published"
        if hf.family_of(case) == "clip":
            write_published(folder, case, checkpoint(case)[1], "text.", custom_text=True)
        else:
            saved_as_open_clip(case, checkpoint, folder)
        file = folder / "open_clip_config.json"
        raw = json.loads(file.read_text())
        change(raw["model_cfg"])
        file.write_text(json.dumps(raw))
        return folder

    return make


@pytest.mark.parametrize(
    ("case", "section", "settings", "message"),
    [
        (CLIP, "vision_cfg", {"layers": [3, 4, 6, 3]}, r"vision_cfg.layers is \[3, 4, 6, 3\]: a ResNet, which is not built here"),
        (CLIP, "vision_cfg", {"layers": "1"}, "vision_cfg.layers is '1': a whole number is wanted"),
        (CLIP, "text_cfg", {"width": 0}, "text_cfg.width is 0: a whole number is wanted"),
        (CLIP, "vision_cfg", {"head_width": 64}, "vision_cfg.head_width 64 does not fit a tower 42 wide"),
        (CLIP, "vision_cfg", {"head_width": 0}, "vision_cfg.head_width 0 does not fit"),
        (CLIP, "text_cfg", {"hf_model_name": "roberta-base"}, "text_cfg.hf_model_name='roberta-base'.* not built here"),
        (CLIP, "vision_cfg", {"timm_model_name": "convnext_base"}, "vision_cfg.timm_model_name='convnext_base' is not built here"),
        (SIGLIP, "text_cfg", {"hf_model_name": "xlm-roberta-base"}, "text_cfg.hf_model_name='xlm-roberta-base'"),
        (SIGLIP, "vision_cfg", {"timm_model_name": "vit_tanh_patch14_siglip_gap_60"}, "timm_model_name='vit_tanh.*heads unknown"),
        (
            SIGLIP,
            "vision_cfg",
            {"timm_model_name": "vit_base_patch16_224"},
            "timm_model_name='vit_base_patch16_224'.*heads unknown",
        ),
        (SIGLIP, "vision_cfg", {"timm_pool": "avg"}, "vision_cfg.timm_pool='avg' is not built here"),
        (SIGLIP, "vision_cfg", {"timm_proj": "linear"}, "vision_cfg.timm_proj='linear' is not built here"),
    ],
)
def test_settings_of_other_models_are_named(folder_of, case, section, settings, message):
    with pytest.raises(CheckpointError, match=message):
        intermodal.load(folder_of(case, lambda model_cfg: model_cfg[section].update(settings)))


@pytest.mark.parametrize("case", [CLIP, SIGLIP])
def test_a_text_decoder_is_named(folder_of, case):
    with pytest.raises(CheckpointError, match="multimodal_cfg is of a CoCa, whose text decoder is not built here"):
        intermodal.load(folder_of(case, lambda model_cfg: model_cfg.update(multimodal_cfg={"width": 22, "layers": 2})))


@pytest.mark.parametrize("case", [CLIP, SIGLIP])
@pytest.mark.parametrize("empty", [None, "ViT-B-32", []])
@pytest.mark.parametrize("section", ["vision_cfg", "text_cfg"])
def test_a_config_without_towers_says_so(folder_of, case, section, empty):
    with pytest.raises(CheckpointError, match=rf"open_clip_config.json: model_cfg.{section} is .*model_configs/NAME.json"):
        intermodal.load(folder_of(case, lambda model_cfg: model_cfg.update({section: empty})))


def test_a_file_without_model_cfg_says_so(folder_of):
    folder = folder_of(CLIP, lambda model_cfg: None)
    (folder / "open_clip_config.json").write_text(json.dumps({"preprocess_cfg": {}}))
    with pytest.raises(CheckpointError, match=r"model_cfg\.vision_cfg is None"):
        intermodal.load(folder)


@pytest.mark.parametrize("name", ["vit_tanh_patch14_siglip_60", "vit_tanh_patch14_siglip_60.webli"])
def test_a_trunk_by_timms_name_and_tag_is_read(folder_of, name):
    assert intermodal.load(folder_of(SIGLIP, lambda model_cfg: model_cfg["vision_cfg"].update(timm_model_name=name)))
