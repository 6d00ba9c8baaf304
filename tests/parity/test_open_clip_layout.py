"""open_clip's own directories: names and shapes as open_clip 3.3 and timm 1.0 have them, and the same answers as before.

open_clip is not needed here: its names are written out below, and the values come from the transformers weights they stand for.
"""

import json
import re

import hf_checkpoints as hf
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import intermodal
from intermodal.batch import Images, Texts
from intermodal.errors import CheckpointError
from intermodal.weights.open_clip_config import TRUNKS

WRITTEN = ["clip-quick-7", "clip-gelu-14", "siglip-tanh-14", "siglip-gelu-7"]
REFUSED = ["clip-tanh-16", "clip-mixed", "siglip2-tanh-16"]

# Fields of open_clip 3.3's `CLIPVisionCfg` and `CLIPTextCfg` that can describe these models; it rejects a config with any other.
VISION_FIELDS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "act_kwargs", "norm_kwargs", "pool_type"}
VISION_FIELDS |= {
    "timm_model_name",
    "timm_model_pretrained",
    "timm_pool",
    "timm_proj",
    "timm_proj_bias",
    "timm_drop",
    "timm_drop_path",
}
TEXT_FIELDS = {
    "context_length",
    "vocab_size",
    "hf_tokenizer_name",
    "tokenizer_mode",
    "tokenizer_kwargs",
    "width",
    "heads",
    "layers",
}
TEXT_FIELDS |= {
    "mlp_ratio",
    "pad_id",
    "eos_id",
    "no_causal_mask",
    "pool_type",
    "proj_bias",
    "proj_type",
    "act_kwargs",
    "norm_kwargs",
}


@pytest.fixture(autouse=True)
def tiny_trunks(monkeypatch):
    """timm has no SigLIP tower that is small: two names stand for those of the cases, so that they can be written."""
    for case in ("siglip-tanh-14", "siglip-gelu-7"):
        tower = hf.CASES[case][1]["vision_config"]
        shape = tuple(tower[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
        monkeypatch.setitem(TRUNKS, f"vit_{case[7:11]}", (shape, {(tower["patch_size"], tower["image_size"])}))


def blocks(state, ours: str, theirs: str, layers: int) -> dict[str, torch.Tensor]:
    """open_clip's residual blocks from transformers' layers."""
    out = {}
    for n in range(layers):
        layer, block = f"{ours}.encoder.layers.{n}", f"{theirs}transformer.resblocks.{n}"
        for kind in ("weight", "bias"):
            out[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            out[f"{block}.attn.out_proj.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
            out[f"{block}.ln_1.{kind}"] = state[f"{layer}.layer_norm1.{kind}"]
            out[f"{block}.ln_2.{kind}"] = state[f"{layer}.layer_norm2.{kind}"]
            out[f"{block}.mlp.c_fc.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
            out[f"{block}.mlp.c_proj.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return out


def text_side(model, state, prefix: str) -> dict[str, torch.Tensor]:
    out = blocks(state, "text_model", prefix, model.config.text_config.num_hidden_layers)
    out[f"{prefix}token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    out[f"{prefix}positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    for kind in ("weight", "bias"):
        out[f"{prefix}ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    return out


def clip_in_open_clip(model, prefix: str = "") -> dict[str, torch.Tensor]:
    """transformers' CLIP under open_clip's names; `prefix` is `text.` where the text tower is an own module."""
    state = model.state_dict()
    out = {
        **text_side(model, state, prefix),
        **blocks(state, "vision_model", "visual.", model.config.vision_config.num_hidden_layers),
    }
    out[f"{prefix}text_projection"] = state["text_projection.weight"].T
    out["logit_scale"] = state["logit_scale"]
    out["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    out["visual.positional_embedding"] = state["vision_model.embeddings.position_embedding.weight"]
    out["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    out["visual.proj"] = state["visual_projection.weight"].T
    for kind in ("weight", "bias"):
        out[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        out[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
    return out


def siglip_in_open_clip(model) -> dict[str, torch.Tensor]:
    """transformers' SigLIP as open_clip's custom text tower and timm's ViT with attention pooling."""
    state = model.state_dict()
    width = model.config.vision_config.hidden_size
    out = text_side(model, state, "text.")
    embeddings, head, trunk = "vision_model.embeddings", "vision_model.head", "visual.trunk"
    out["logit_scale"], out["logit_bias"] = state["logit_scale"].reshape(()), state["logit_bias"].reshape(())
    out[f"{trunk}.pos_embed"] = state[f"{embeddings}.position_embedding.weight"][None]
    out[f"{trunk}.attn_pool.latent"] = state[f"{head}.probe"]
    for kind in ("weight", "bias"):
        out[f"text.text_projection.{kind}"] = state[f"text_model.head.{kind}"]
        out[f"{trunk}.patch_embed.proj.{kind}"] = state[f"{embeddings}.patch_embedding.{kind}"]
        out[f"{trunk}.norm.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        out[f"{trunk}.attn_pool.q.{kind}"] = state[f"{head}.attention.in_proj_{kind}"][:width]
        out[f"{trunk}.attn_pool.kv.{kind}"] = state[f"{head}.attention.in_proj_{kind}"][width:]
        out[f"{trunk}.attn_pool.proj.{kind}"] = state[f"{head}.attention.out_proj.{kind}"]
        out[f"{trunk}.attn_pool.norm.{kind}"] = state[f"{head}.layernorm.{kind}"]
        out[f"{trunk}.attn_pool.mlp.fc1.{kind}"] = state[f"{head}.mlp.fc1.{kind}"]
        out[f"{trunk}.attn_pool.mlp.fc2.{kind}"] = state[f"{head}.mlp.fc2.{kind}"]
        for n in range(model.config.vision_config.num_hidden_layers):
            layer, block = f"vision_model.encoder.layers.{n}", f"{trunk}.blocks.{n}"
            out[f"{block}.norm1.{kind}"] = state[f"{layer}.layer_norm1.{kind}"]
            out[f"{block}.norm2.{kind}"] = state[f"{layer}.layer_norm2.{kind}"]
            out[f"{block}.attn.qkv.{kind}"] = torch.cat([state[f"{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"])
            out[f"{block}.attn.proj.{kind}"] = state[f"{layer}.self_attn.out_proj.{kind}"]
            out[f"{block}.mlp.fc1.{kind}"] = state[f"{layer}.mlp.fc1.{kind}"]
            out[f"{block}.mlp.fc2.{kind}"] = state[f"{layer}.mlp.fc2.{kind}"]
    return out


def in_open_clip(case: str, model) -> dict[str, torch.Tensor]:
    return clip_in_open_clip(model) if hf.family_of(case) == "clip" else siglip_in_open_clip(model)


def published_config(case: str, **top) -> dict:
    """A config as open_clip publishes them, for the sizes of a case."""
    sections = hf.CASES[case][1]
    vision, text = sections["vision_config"], sections["text_config"]
    text_cfg = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
    }
    vision_cfg = {
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "layers": vision["num_hidden_layers"],
        "width": vision["hidden_size"],
        "head_width": vision["hidden_size"] // vision["num_attention_heads"],
        "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
    }
    model = {"embed_dim": sections["projection_dim"], "vision_cfg": vision_cfg, "text_cfg": text_cfg, **top}
    if vision["hidden_act"] == "quick_gelu":
        model["quick_gelu"] = True
    return {"model_cfg": model, "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}}


def write_published(folder, case: str, model, prefix: str = "", **top):
    folder.mkdir()
    state = {key: value.contiguous() for key, value in clip_in_open_clip(model, prefix).items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_config.json").write_text(json.dumps(published_config(case, **top)))
    return folder


def saved_as_open_clip(case: str, checkpoint, target):
    folder, model = checkpoint(case)
    return intermodal.save(intermodal.load(folder), target, layout="open_clip"), model


def logits(folder, case: str) -> torch.Tensor:
    """Our logits from fixed random tensors."""
    ours = intermodal.load(folder)
    with torch.no_grad():
        image = torch.nn.functional.normalize(ours.encode_images(Images(hf.random_pixels(case, 5))), dim=-1)
        text = torch.nn.functional.normalize(ours.encode_texts(Texts.pack(hf.random_texts(case, 5))), dim=-1)
        return image @ text.T * ours.logit_scale.exp() + (0 if ours.logit_bias is None else ours.logit_bias)


def their_logits(case: str, model) -> torch.Tensor:
    return hf.reference(model, hf.random_texts(case, 5), pixel_values=hf.random_pixels(case, 5)).logits_per_image


def assert_same_tensors(a, b) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.shape == b[key].shape, key
        assert torch.equal(value, b[key]), key


@pytest.mark.parametrize("case", WRITTEN)
def test_written_tensors_have_open_clips_names_shapes_and_values(case, checkpoint, tmp_path):
    saved, model = saved_as_open_clip(case, checkpoint, tmp_path)
    assert sorted(path.name for path in saved.iterdir() if path.suffix == ".safetensors") == ["open_clip_model.safetensors"]
    assert not (saved / "config.json").exists()
    assert_same_tensors(load_file(saved / "open_clip_model.safetensors"), in_open_clip(case, model))


@pytest.mark.parametrize("case", WRITTEN)
def test_written_config_says_the_sizes_in_fields_that_open_clip_has(case, checkpoint, tmp_path):
    saved, model = saved_as_open_clip(case, checkpoint, tmp_path)
    written = json.loads((saved / "open_clip_config.json").read_text())["model_cfg"]
    vision_cfg, text_cfg = written["vision_cfg"], written["text_cfg"]
    vision, text = model.config.vision_config, model.config.text_config
    width = model.config.projection_dim if hf.family_of(case) == "clip" else vision.hidden_size
    assert written["embed_dim"] == width
    assert set(text_cfg) <= TEXT_FIELDS
    assert set(vision_cfg) <= VISION_FIELDS
    assert (text_cfg["width"], text_cfg["heads"], text_cfg["layers"]) == (
        text.hidden_size,
        text.num_attention_heads,
        text.num_hidden_layers,
    )
    assert (text_cfg["context_length"], text_cfg["vocab_size"]) == (text.max_position_embeddings, text.vocab_size)
    if hf.family_of(case) == "clip":
        assert (vision_cfg["image_size"], vision_cfg["patch_size"]) == (vision.image_size, vision.patch_size)
        assert (vision_cfg["width"], vision_cfg["layers"]) == (vision.hidden_size, vision.num_hidden_layers)
        assert vision_cfg["width"] // vision_cfg["head_width"] == vision.num_attention_heads
        assert bool(written.get("quick_gelu")) == (vision.hidden_act == "quick_gelu")
    else:
        assert written["custom_text"]
        assert text_cfg["no_causal_mask"]
        assert text_cfg["proj_bias"]
        assert text_cfg["pool_type"] == "last"


@pytest.mark.parametrize("case", WRITTEN)
def test_written_mlp_ratios_give_back_the_mlp_widths(case, checkpoint, tmp_path):
    """open_clip builds `int(width * mlp_ratio)` hidden values: 30 / 22 as a float makes 29 of 30."""
    saved, model = saved_as_open_clip(case, checkpoint, tmp_path)
    written = json.loads((saved / "open_clip_config.json").read_text())["model_cfg"]
    text = model.config.text_config
    assert int(text.hidden_size * written["text_cfg"]["mlp_ratio"]) == text.intermediate_size
    if hf.family_of(case) == "clip":
        vision = model.config.vision_config
        assert int(vision.hidden_size * written["vision_cfg"]["mlp_ratio"]) == vision.intermediate_size


@pytest.mark.parametrize("case", hf.of("clip", "siglip"))
def test_logits_after_the_round_trip_equal_transformers_or_the_save_is_refused(case, checkpoint, tmp_path):
    """A setting that the layout cannot say (a norm's epsilon, an activation) must not change silently."""
    try:
        saved, model = saved_as_open_clip(case, checkpoint, tmp_path)
    except CheckpointError:
        assert case not in WRITTEN
        return
    assert hf.distance(logits(saved, case), their_logits(case, model)) <= hf.TOLERANCE


@pytest.mark.parametrize("case", WRITTEN)
def test_a_second_save_is_equal_to_the_last_bit(case, checkpoint, tmp_path):
    saved, _ = saved_as_open_clip(case, checkpoint, tmp_path / "first")
    again = intermodal.save(intermodal.load(saved), tmp_path / "second", layout="open_clip")
    for name in ("open_clip_model.safetensors", "open_clip_config.json", "preprocessor_config.json"):
        assert (again / name).read_bytes() == (saved / name).read_bytes(), name


@pytest.mark.parametrize("case", WRITTEN)
def test_from_transformers_to_open_clip_and_back_loses_nothing(case, checkpoint, tmp_path):
    saved, model = saved_as_open_clip(case, checkpoint, tmp_path / "open_clip")
    back = intermodal.save(intermodal.load(saved), tmp_path / "back")
    assert_same_tensors(load_file(back / "model.safetensors"), load_file(checkpoint(case)[0] / "model.safetensors"))
    again = hf.MODELS[hf.family_of(case)].from_pretrained(back).eval()
    assert hf.distance(their_logits(case, again), their_logits(case, model)) <= hf.TOLERANCE


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_the_layout_cannot_hold_are_refused(case, checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="open_clip"):
        saved_as_open_clip(case, checkpoint, tmp_path)


@pytest.mark.parametrize("prefix", ["", "text."])
@pytest.mark.parametrize("case", ["clip-quick-7", "clip-gelu-14"])
def test_published_clip_directories_load_and_round_trip(case, prefix, checkpoint, tmp_path):
    """Without our own writer: tensors and config put together here, with the text tower inside and as an own module."""
    _, model = checkpoint(case)
    folder = write_published(tmp_path / "published", case, model, prefix, **({"custom_text": True} if prefix else {}))
    assert hf.distance(logits(folder, case), their_logits(case, model)) <= hf.TOLERANCE
    saved = intermodal.save(intermodal.load(folder), tmp_path / "saved", layout="open_clip")
    assert_same_tensors(load_file(saved / "open_clip_model.safetensors"), load_file(folder / "open_clip_model.safetensors"))
    assert json.loads((saved / "open_clip_config.json").read_text()) == json.loads((folder / "open_clip_config.json").read_text())


def test_the_causal_mask_buffer_of_old_files_is_accepted_and_not_written(checkpoint, tmp_path):
    _, model = checkpoint("clip-gelu-14")
    folder = write_published(tmp_path / "published", "clip-gelu-14", model)
    state = load_file(folder / "open_clip_model.safetensors")
    save_file({**state, "attn_mask": torch.zeros(11, 11)}, folder / "open_clip_model.safetensors")
    saved = intermodal.save(intermodal.load(folder), tmp_path / "saved", layout="open_clip")
    assert_same_tensors(load_file(saved / "open_clip_model.safetensors"), state)


@pytest.mark.parametrize("name", ["open_clip_pytorch_model.bin", "open_clip_model.safetensors"])
def test_every_file_name_of_open_clip_is_found(name, checkpoint, tmp_path):
    _, model = checkpoint("clip-quick-7")
    folder = write_published(tmp_path / "published", "clip-quick-7", model)
    state = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    if name.endswith(".bin"):
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, folder / name)
    else:
        save_file(state, folder / name)
    assert hf.distance(logits(folder, "clip-quick-7"), their_logits("clip-quick-7", model)) <= hf.TOLERANCE


def siglip_published(folder, model, sections, **vision_cfg):
    """A SigLIP directory as published: the trunk's depth, width and heads are only in the name of its timm model."""
    folder.mkdir()
    state = {key: value.contiguous() for key, value in siglip_in_open_clip(model).items()}
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    text = sections["text_config"]
    text_cfg = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
        "no_causal_mask": True,
        "proj_bias": True,
        "pool_type": "last",
        "norm_kwargs": {"eps": 1e-6},
        "act_kwargs": {"approximate": "tanh"},
    }
    vision_cfg = {"timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none", **vision_cfg}
    model_cfg = {"embed_dim": sections["vision_config"]["hidden_size"], "init_logit_bias": -10, "custom_text": True}
    model_cfg.update(vision_cfg=vision_cfg, text_cfg=text_cfg)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    return folder


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [
        ("vit_base_patch32_siglip_256", 768, 12),
        ("vit_so400m_patch16_siglip_256", 1152, 16),
        ("vit_giantopt_patch16_siglip_256", 1536, 16),
    ],
)
def test_published_siglip_trunks_get_the_heads_of_their_timm_model(name, width, heads, tmp_path):
    """timm 1.0 `vision_transformer.py`: so400m has heads of 72, giantopt of 96, and the published configs do not say so."""
    tower = {
        "hidden_size": width,
        "intermediate_size": 32,
        "num_attention_heads": heads,
        "num_hidden_layers": 1,
        "image_size": 64,
        "patch_size": 32,
    }
    text = {
        "hidden_size": 24,
        "intermediate_size": 30,
        "num_attention_heads": 3,
        "num_hidden_layers": 1,
        "vocab_size": 40,
        "max_position_embeddings": 5,
    }
    sections = {"vision_config": tower, "text_config": {**text, "projection_size": width}}
    model = hf.randomise(hf.SiglipModel(hf.SiglipConfig(**json.loads(json.dumps(sections)))), 3)
    folder = siglip_published(tmp_path / "published", model, sections, timm_model_name=name, image_size=64)
    pixels = torch.empty(2, 3, 64, 64).normal_(generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model.get_image_features(pixels).pooler_output
        got = intermodal.load(folder).encode_images(Images(pixels))
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() <= hf.TOLERANCE


@pytest.mark.parametrize("mode", ["squash", "shortest"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_published_preprocessing_settings_make_the_pixels(interpolation, mode, checkpoint, tmp_path):
    """Directories of open_clip hold no preprocessor_config.json; `preprocess_cfg` says what to do."""
    folder = write_published(tmp_path / "published", "clip-quick-7", checkpoint("clip-quick-7")[1])
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"].update(resize_mode=mode, interpolation=interpolation)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    square = {"height": 30, "width": 30}
    shared = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": {"bicubic": 3, "bilinear": 2}[interpolation]}
    if mode == "squash":
        theirs = hf.SiglipImageProcessorPil(size=square, **shared)
    else:
        theirs = hf.CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=square, **shared)
    pictures = [hf.picture(*size, seed=1) for size in [(44, 30), (30, 72), (90, 50), (17, 17), (30, 30)]]
    want = theirs(pictures, return_tensors="pt").pixel_values
    model = intermodal.load(folder)
    assert hf.distance(model.processor.images(pictures).pixels, want) <= 1e-6
    saved = intermodal.save(model, tmp_path / "saved", layout="open_clip")
    assert hf.distance(intermodal.load(saved).processor.images(pictures).pixels, want) <= 1e-6


@pytest.mark.parametrize("fill", [0, 128])
def test_longest_fits_the_whole_picture_and_pads_it(fill, checkpoint, tmp_path):
    """open_clip `transform.py`: ResizeKeepRatio(longest=1), then CenterCropOrPad on `fill_color`; the size of PIL's `contain`."""
    folder = write_published(tmp_path / "published", "clip-quick-7", checkpoint("clip-quick-7")[1])
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"].update(resize_mode="longest", interpolation="bicubic", fill_color=fill)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    mean, std = (np.array(config["preprocess_cfg"][key], np.float32) for key in ("mean", "std"))
    model = intermodal.load(folder)
    pictures = [hf.picture(*size, seed=2) for size in [(44, 30), (30, 71), (90, 50), (17, 17), (200, 7), (7, 5)]]
    for picture, pixels in zip(pictures, model.processor.images(pictures).pixels, strict=True):
        inner = ImageOps.contain(picture.convert("RGB"), (30, 30), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (30, 30), (fill,) * 3)
        canvas.paste(inner, ((30 - inner.width) // 2, (30 - inner.height) // 2))
        want = (np.asarray(canvas, np.float32) / 255 - mean) / std
        assert np.abs(pixels.numpy() - want.transpose(2, 0, 1)).max() <= 1e-6
    saved = intermodal.load(intermodal.save(model, tmp_path / "saved", layout="open_clip"))
    assert torch.equal(saved.processor.images(pictures).pixels, model.processor.images(pictures).pixels)
    # 90 x 50 becomes 30 x 17, six rows down
    assert model.processor.images.affine((90, 50))((0, 0, 90, 50)) == pytest.approx((0, 6, 30, 23))
    with pytest.raises(CheckpointError, match="letterboxed"):
        intermodal.save(model, tmp_path / "hf")
    config["preprocess_cfg"]["resize_mode"] = "widest"
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="widest"):
        intermodal.load(folder)


@pytest.mark.parametrize(
    ("clean", "said", "meant"),
    [
        ("canonicalize", "A  Big_Dog, isn't it?", "a big dog isnt it"),
        ("lower", " A  Big\tDog &amp; cat", "a big dog & cat"),
        ("whitespace", " a  big\n dog &amp;amp; cat", "a big dog & cat"),
    ],
)
def test_text_is_cleaned_as_tokenizer_kwargs_say(clean, said, meant, tmp_path):
    hf.save_whole("clip", tmp_path / "transformers")
    folder = intermodal.save(intermodal.load(tmp_path / "transformers"), tmp_path / "open_clip", layout="open_clip")
    config = json.loads((folder / "open_clip_config.json").read_text())
    plain = intermodal.load(folder).processor.texts
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": clean}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = intermodal.load(folder)
    assert model.processor.texts.ids([said]) == plain.ids([meant])
    assert model.processor.texts.ids([said])[0] != model.processor.texts.ids([meant + " x"])[0]
    saved = intermodal.load(intermodal.save(model, tmp_path / "saved", layout="open_clip"))
    assert saved.processor.texts.ids([said]) == plain.ids([meant])
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "soap"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="soap"):
        intermodal.load(folder)


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("vision_cfg", {"pool_type": "avg"}),
        ("vision_cfg", {"norm_kwargs": {"eps": 0.01}}),
        ("vision_cfg", {"act_kwargs": {"approximate": "tanh"}}),
        ("text_cfg", {"no_causal_mask": True}),
        ("text_cfg", {"pool_type": "last"}),
        ("text_cfg", {"norm_kwargs": {"eps": 0.01}}),
        ("text_cfg", {"act_kwargs": {"approximate": "tanh"}}),
    ],
)
def test_settings_that_change_a_published_clip_are_not_ignored(section, settings, checkpoint, tmp_path):
    """Each of these changes open_clip's answer: the load must refuse it, or the answer must change with it."""
    case = "clip-gelu-14"
    folder = write_published(tmp_path / "published", case, checkpoint(case)[1], "text.", custom_text=True)
    before = logits(folder, case)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"][section].update(settings)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    answered, said = None, ""
    try:
        answered = logits(folder, case)
    except CheckpointError as error:
        said = str(error)
    if answered is None:
        assert section in said or next(iter(settings)) in said
    else:
        assert hf.distance(before, answered) > 1e-5


def test_a_directory_of_another_architecture_is_refused(checkpoint, tmp_path):
    folder = write_published(tmp_path / "published", "clip-quick-7", checkpoint("clip-quick-7")[1])
    save_file({"visual.stem.0.weight": torch.ones(2), "logit_scale": torch.ones(())}, folder / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="ViT"):
        intermodal.load(folder)


def test_a_missing_key_of_the_layout_is_named(checkpoint, tmp_path):
    folder = write_published(tmp_path / "published", "clip-quick-7", checkpoint("clip-quick-7")[1])
    state = load_file(folder / "open_clip_model.safetensors")
    for key in ("visual.ln_post.bias", "positional_embedding", "visual.proj"):
        save_file({name: value for name, value in state.items() if name != key}, folder / "open_clip_model.safetensors")
        with pytest.raises(CheckpointError, match=rf" {re.escape(key)}\b"):
            intermodal.load(folder)


def test_positions_are_resampled_in_this_layout_too(checkpoint, tmp_path):
    _, model = checkpoint("clip-quick-7")
    folder = write_published(tmp_path / "published", "clip-quick-7", model)
    saved = intermodal.save(intermodal.load(folder, image_size=50), tmp_path / "saved", layout="open_clip")
    before = load_file(folder / "open_clip_model.safetensors")["visual.positional_embedding"]
    grid = before[1:].T.reshape(1, -1, 4, 4)
    grown = torch.nn.functional.interpolate(grid, (7, 7), mode="bicubic", align_corners=False, antialias=True)
    after = load_file(saved / "open_clip_model.safetensors")["visual.positional_embedding"]
    assert hf.distance(after, torch.cat([before[:1], grown[0].flatten(1).T])) <= 1e-6
    assert json.loads((saved / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]["image_size"] == 50
    pixels = torch.zeros(1, 3, 50, 50)
    again = intermodal.load(saved)
    with torch.no_grad():
        assert torch.equal(
            again.encode_images(Images(pixels)), intermodal.load(folder, image_size=50).encode_images(Images(pixels))
        )
