"""What open_clip writes is read here, and what is written here open_clip reads: its own models, tokenizer and losses."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from open_clip_package import open_clip_or_skip
from torch.nn import functional as F
from typer.testing import CliRunner

import intermodal
from intermodal.batch import Images, Texts
from intermodal.cli.app import app
from intermodal.errors import CheckpointError
from intermodal.losses import sigmoid_loss, softmax_loss
from intermodal.models.clip import initialise
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.train.contrastive import build_model
from intermodal.train.recipe import ModelConfig

open_clip = open_clip_or_skip()

TOLERANCE = 1e-5
SIZES = {"layers": 3, "width": 48, "head_width": 16, "patch_size": 7, "image_size": 35, "mlp_ratio": 2.5}
TEXT = {"context_length": 9, "vocab_size": 61, "width": 24, "heads": 3, "layers": 2, "mlp_ratio": 3.0}
CLIP = {"embed_dim": 20, "vision_cfg": SIZES, "text_cfg": TEXT}
SIGLIP_TEXT = {
    **TEXT,
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
    "act_kwargs": {"approximate": "tanh"},
}
SIGLIP = {
    "embed_dim": 768,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"image_size": 256, "timm_model_name": "vit_base_patch32_siglip_256", "timm_pool": "map", "timm_proj": "none"},
    "text_cfg": SIGLIP_TEXT,
}
CASES = {
    "clip": CLIP,
    "clip, quick gelu": {**CLIP, "quick_gelu": True},
    "clip, text tower of its own": {**CLIP, "custom_text": True},
}


def built(config: dict, seed: int = 0):
    """A model of open_clip's with random weights of a size that nothing vanishes in."""
    settings = dict(config)
    kind = open_clip.CustomTextCLIP if settings.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(seed)
    model = kind(**settings).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.08).add_(1.0 if value.ndim == 1 and value.numel() > 60 else 0.0)
        model.logit_scale.fill_(1.3)
    return model


def inputs(config: dict) -> tuple[torch.Tensor, torch.Tensor]:
    side, text = config["vision_cfg"]["image_size"], config["text_cfg"]
    random = torch.Generator().manual_seed(5)
    pixels = torch.empty(3, 3, side, side).normal_(generator=random)
    ids = torch.randint(1, text["vocab_size"] - 2, (3, text["context_length"]), generator=random)
    ids[:, -1] = text["vocab_size"] - 1  # CLIP pools at the highest id
    return pixels, ids


def their_embeddings(model, config: dict):
    pixels, ids = inputs(config)
    with torch.no_grad():
        return model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)


def our_embeddings(model, config: dict):
    pixels, ids = inputs(config)
    with torch.no_grad():
        found = model.encode_images(Images(pixels)), model.encode_texts(Texts.pack(ids.tolist()))
    return tuple(F.normalize(value, dim=-1) for value in found)


def assert_equal_embeddings(ours, theirs) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm(dim=-1).max() <= TOLERANCE


def trained(folder: Path, model, config: dict | None) -> Path:
    """What open_clip's training leaves in `logs/NAME/checkpoints`, and the config that a person has to put beside it."""
    folder.mkdir(parents=True)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save(
        {"epoch": 3, "name": "2026_11_26-model_x", "state_dict": state, "optimizer": optimizer.state_dict()}, folder / "epoch_3.pt"
    )
    if config is not None:
        (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder / "epoch_3.pt"


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_that_open_clip_has_trained_loads_beside_its_config(wrapped, name, tmp_path):
    """The config as published (`model_cfg` and how pictures are made) and as it lies in open_clip's `model_configs`."""
    config = CASES[name]
    model = built(config)
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    path = trained(tmp_path / "checkpoints", model, {"model_cfg": config, "preprocess_cfg": preprocess} if wrapped else config)
    ours = intermodal.load(path)
    assert_equal_embeddings(our_embeddings(ours, config), their_embeddings(model, config))
    assert ours.logit_scale.item() == pytest.approx(1.3)
    assert ours.processor.images.std == (tuple(preprocess["std"]) if wrapped else open_clip.OPENAI_DATASET_STD)


SIGMOID = {
    "init_logit_scale": math.log(10),
    "init_logit_bias": -10,
}  # what `open_clip_train --siglip` gives a model, whatever its config


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("said", [False, True])
def test_a_clip_of_the_sigmoid_loss_goes_both_ways(said, name, tmp_path):
    """Scale, bias and logits; from a config that says the bias, and from open_clip's own, which does not."""
    config = {**CASES[name], **SIGMOID}
    theirs = built(config)
    with torch.no_grad():
        theirs.logit_bias.fill_(-7.25)
    ours = intermodal.load(trained(tmp_path / "checkpoints", theirs, config if said else CASES[name]))
    if said:
        assert (ours.config.init_scale, ours.config.init_bias) == (pytest.approx(10), -10)
    again = open_clip.create_model(f"local-dir:{intermodal.save(ours, tmp_path / 'saved')}").eval()
    pixels, ids = inputs(config)
    with torch.no_grad():
        want = theirs.get_logits(pixels, ids)[0]
        assert (again.get_logits(pixels, ids)[0] - want).abs().max() <= TOLERANCE
        image, text = our_embeddings(ours, config)
        got = image @ text.T * ours.logit_scale.exp() + ours.logit_bias
    for model in (ours, again):
        assert (model.logit_scale.item(), model.logit_bias.item()) == (pytest.approx(1.3), -7.25)
    assert (got - want).abs().max() <= TOLERANCE
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_a_fresh_clip_of_the_sigmoid_loss_starts_as_open_clips(tmp_path):
    """What is written before the first step: open_clip's model of the config begins with the scale and bias that ours does."""
    text = TextConfig(width=24, depth=2, heads=3, mlp_width=48, context=12)
    config = ModelConfig(family="clip", vision=VisionConfig(**FRESH_VISION["clip"]), text=text, embed_width=20, init_bias=-4.5)
    ours = initialise(build_model(config, lambda: SENTENCES[:2], "sigmoid"))
    folder = intermodal.save(ours, tmp_path / "open_clip")
    loaded = open_clip.create_model(f"local-dir:{folder}")
    fresh = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for model in (ours, loaded, fresh):
        assert model.logit_scale.exp().item() == pytest.approx(10)
        assert model.logit_bias.item() == -4.5


def test_a_trained_file_without_its_config_says_what_to_put_where(tmp_path):
    path = trained(tmp_path / "checkpoints", built(CLIP), None)
    with pytest.raises(CheckpointError, match="model_configs") as caught:
        intermodal.load(path)
    assert str(tmp_path / "checkpoints" / "open_clip_config.json") in str(caught.value)


def test_a_trained_file_that_is_damaged_or_of_another_config_is_named(tmp_path):
    path = trained(tmp_path / "checkpoints", built(CLIP), {**CLIP, "text_cfg": {**TEXT, "heads": 5}})
    with pytest.raises(CheckpointError, match="epoch_3"):
        intermodal.load(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="epoch_3"):
        intermodal.load(path)


def test_convert_makes_a_trained_file_a_directory_for_either_library(tmp_path):
    """The command line: epoch_N.pt -> transformers' layout -> open_clip's, which open_clip then loads by itself."""
    model = built(CLIP)
    path = trained(tmp_path / "checkpoints", model, CLIP)
    for source, target, layout in ((path, "hf", "hf"), (tmp_path / "hf", "open_clip", "open_clip")):
        done = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / target), "--layout", layout, "--json"])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["layout"] == layout
    again = open_clip.create_model(f"local-dir:{tmp_path / 'open_clip'}").eval()
    assert_equal_embeddings(their_embeddings(again, CLIP), their_embeddings(model, CLIP))


def test_convert_resamples_positions_and_open_clip_takes_the_new_size(tmp_path):
    path = trained(tmp_path / "checkpoints", built(CLIP), CLIP)
    arguments = ["convert", str(path), str(tmp_path / "larger"), "--layout", "open_clip", "--image-size", "49"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    larger = {**CLIP, "vision_cfg": {**SIZES, "image_size": 49}}
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'larger'}").eval()
    assert theirs.visual.image_size == (49, 49)
    assert_equal_embeddings(our_embeddings(intermodal.load(tmp_path / "larger"), larger), their_embeddings(theirs, larger))


@pytest.mark.parametrize("name", CASES)
def test_open_clip_loads_what_is_saved_here(name, tmp_path):
    config = CASES[name]
    model = intermodal.load(trained(tmp_path / "checkpoints", built(config), config))
    theirs = open_clip.create_model(f"local-dir:{intermodal.save(model, tmp_path / 'saved', layout='open_clip')}").eval()
    assert_equal_embeddings(their_embeddings(theirs, config), our_embeddings(model, config))


def test_siglip_towers_go_both_ways(tmp_path):
    """A timm trunk of a published size (twelve layers of 768); the text tower is small."""
    theirs = built(SIGLIP)
    for block in theirs.visual.trunk.blocks:
        block.mlp.act = torch.nn.GELU(approximate="tanh")  # as the authors trained; docs/contrastive.md
    theirs.visual.trunk.attn_pool.mlp.act = torch.nn.GELU(approximate="tanh")
    config = {"model_cfg": SIGLIP, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}}
    ours = intermodal.load(trained(tmp_path / "checkpoints", theirs, config))
    assert_equal_embeddings(our_embeddings(ours, SIGLIP), their_embeddings(theirs, SIGLIP))
    through = intermodal.load(intermodal.save(ours, tmp_path / "hf"))  # forgets which open_clip config it came from
    folder = intermodal.save(through, tmp_path / "saved", layout="open_clip")
    again = open_clip.create_model(f"local-dir:{folder}").eval()
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


WORDS = ["a Dog", "two  dogs &amp; a_cat left of the tree!", "naïve CAFÉ 東京 🙂", "x" * 300, "it's 42", "", "a red apple, " * 12]


def test_clips_tokenizer_is_read_from_the_file_that_open_clip_ships(tmp_path):
    """The whole vocabulary, from the compressed merges beside a trained file; and saved so that transformers reads it."""
    config = {**CLIP, "text_cfg": {**TEXT, "vocab_size": 49408, "context_length": 77}}
    path = trained(tmp_path / "checkpoints", built(config), config)
    with pytest.raises(ValueError, match="bpe_simple_vocab"):
        intermodal.load(path).embed_texts(["a dog"])
    packed = Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    (path.parent / packed.name).write_bytes(packed.read_bytes())
    ours = intermodal.load(path)
    want = open_clip.SimpleTokenizer(str(packed))(WORDS)
    for ids, row in zip(ours.processor.texts.ids(WORDS), want.tolist(), strict=True):
        assert ids == row[: len(ids)]
        assert not any(row[len(ids) :])
    saved = intermodal.save(ours, tmp_path / "hf")
    again = intermodal.load(saved)
    assert again.processor.texts.ids(WORDS[:1]) == ours.processor.texts.ids(WORDS[:1])
    theirs = transformers.CLIPTokenizer.from_pretrained(saved)
    assert theirs(WORDS[:1]).input_ids == ours.processor.texts.ids(WORDS[:1])
    (path.parent / packed.name).write_bytes(packed.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="bpe_simple_vocab"):
        intermodal.load(path)


SENTENCES = ["a dog left of two cats", "Three  red apples", "a_cat", "one dog above a cat, and so on and on and on"]
FRESH_VISION = {
    "clip": {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64, "image_size": 32, "patch_size": 8},
    # open_clip has no small one
    "siglip": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072, "image_size": 256, "patch_size": 32, "norm_eps": 1e-6},
}


@pytest.mark.parametrize("family", FRESH_VISION)
def test_a_model_begun_here_means_the_same_in_open_clip(family, tmp_path):
    """With its own small tokenizer, whose end token is not the largest id: open_clip tokenizes and pools by the config written here."""
    text = TextConfig(width=24, depth=2, heads=3, mlp_width=48, context=12)
    config = ModelConfig(family=family, vision=VisionConfig(**FRESH_VISION[family]), text=text, embed_width=20)
    ours = initialise(build_model(config, lambda: SENTENCES[:2])).eval()
    folder = intermodal.save(ours, tmp_path / "open_clip", layout="open_clip")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(SENTENCES)
    with torch.no_grad():
        want = theirs.encode_text(ids, normalize=True)
    for model in (ours, intermodal.load(folder)):
        assert (model.embed_texts(SENTENCES) - want).norm(dim=-1).max() <= TOLERANCE
    assert (want[0] - want[1]).norm() > 0.01  # random, and yet not one vector for all


def test_a_siglip_of_no_timm_size_is_refused_and_told(tmp_path):
    text = TextConfig(width=24, depth=1, heads=3, mlp_width=48, context=12)
    vision = VisionConfig(**{**FRESH_VISION["siglip"], "depth": 1, "image_size": 64})
    ours = build_model(ModelConfig(family="siglip", vision=vision, text=text), lambda: SENTENCES)
    with pytest.raises(CheckpointError, match=r"depth 1.*layout='hf'"):
        intermodal.save(ours, tmp_path / "open_clip", layout="open_clip")


def test_losses_equal_open_clips():
    random = torch.Generator().manual_seed(2)
    image, text = (F.normalize(torch.empty(37, 16).normal_(generator=random), dim=-1) for _ in "ab")
    scale, bias = torch.tensor(2.1), torch.tensor(-3.0)
    cases = ((softmax_loss, (scale,), open_clip.loss.ClipLoss()), (sigmoid_loss, (scale, bias), open_clip.loss.SigLipLoss()))
    for ours, settings, theirs in cases:
        total, count = ours(image, text, *settings, tile=8)
        want = theirs(image, text, scale.exp(), *settings[1:])
        assert float(total / count) == pytest.approx(float(want), rel=1e-5)
