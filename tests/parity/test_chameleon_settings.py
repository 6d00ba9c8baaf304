"""What a Chameleon's directory says is followed or refused, never passed over: our section, the image processor's file, the vocabulary."""

import copy
import io
import json
import warnings

import numpy as np
import pytest
import torch
import transformers
from chat_files import byte_tokenizer
from PIL import Image
from test_chameleon import IMAGES, NAMES, SIDE, SPECIAL, build, picture, user, with_decoder
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.errors import CheckpointError
from intermodal.inputs.image import ImageProcessor, open_image
from intermodal.inputs.media import load_part
from intermodal.weights.chameleon import from_hf

SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("chameleon")
    build().save_pretrained(out)
    byte_tokenizer((*SPECIAL, *IMAGES)).save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return out


@pytest.fixture
def copied(folder, tmp_path):
    """A directory like it, with something else in config.json and in preprocessor_config.json."""

    def make(change=None, pictures=None):
        for file in folder.iterdir():
            (tmp_path / file.name).unlink(missing_ok=True)
            (tmp_path / file.name).symlink_to(file)
        config = json.loads((folder / "config.json").read_text())
        (change or (lambda config: None))(config)
        (tmp_path / "config.json").unlink()
        (tmp_path / "config.json").write_text(json.dumps(config))
        if pictures is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("own", "named"),
    [
        ({"rules": "transformer"}, "intermodal.rules is 'transformer'.*did you mean 'transformers'"),
        ({"rules": 1}, "intermodal.rules is 1"),
        ({"rule": "transformers"}, "intermodal has no setting 'rule', did you mean 'rules'"),
        ({"side": 50}, "50 x 50 pixels do not divide into codes of 4 x 4"),
        ({"side": "32"}, "intermodal.side is '32'; a whole number is wanted"),
        ({"side": 0}, "intermodal.side is 0; a number above 0"),
        ({"qk_norm": 1}, "intermodal.qk_norm is 1; true or false is wanted"),
        ({"beta_on": "both"}, "intermodal.beta_on is 'both'"),
        ({"vq": {"wdith": 3}}, "vq section does not fit.*wdith"),
        ({"vq": {"width": "32"}}, "vq section does not fit: vq.width wants int"),
        ([1], r"intermodal is \[1\]; it should be an object"),
    ],
)
def test_our_own_section(copied, own, named):
    with pytest.raises(CheckpointError, match=named):
        intermodal.load(copied(lambda config: config.update(intermodal=own)))
    with pytest.raises(CheckpointError, match=r"config\.json|its config cannot be built"):
        intermodal.load(copied(lambda config: config.update(intermodal=own)))


def test_a_setting_of_ours_that_is_not_known_is_kept(copied, tmp_path):
    with pytest.warns(UserWarning, match="intermodal.note is no setting that this version knows"):
        model = intermodal.load(copied(lambda config: config.update(intermodal={"note": "x", "rules": "transformers"})))
    intermodal.save(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["intermodal"] == {"note": "x", "rules": "transformers"}


def test_a_section_of_null_says_nothing(copied):
    assert intermodal.load(copied(lambda config: config.update(intermodal=None))).config.rules == "authors"


def put(name, value):
    return lambda config: config["vocabulary_map"].update({name: value})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put(IMAGES[1], 100_000), r"are beyond it \(100000\)"),
        (put(IMAGES[1], -1), r"are beyond it \(-1\)"),
        (put("<racm3:break>", 100_000), r"are beyond it \(100000\)"),
        (put(IMAGES[1], "x"), f"'{IMAGES[1]}' is 'x'; a token's number is wanted"),
        (put("<image>", None), "'<image>' is None; a token's number"),
        (put(IMAGES[1], NAMES[IMAGES[0]]), f"{NAMES[IMAGES[0]]} is {IMAGES[0]} and {IMAGES[1]}"),
        (put("<eoss>", NAMES[IMAGES[0]]), f"{NAMES[IMAGES[0]]} is <eoss> and {IMAGES[0]}"),
        (lambda config: config.update(vocabulary_map=[1]), "vocabulary_map is a list"),
        (lambda config: config.update(vq_config=[1]), r"vq_config is \[1\]"),
        (lambda config: config["vq_config"].update(resolution=30), "30 x 30 pixels do not divide into codes of 4 x 4"),
        (lambda config: config["vq_config"].update(base_channels="32"), "vq_config.base_channels wants int, got '32'"),
        (lambda config: config["vq_config"].update(channel_multiplier=2), "vq_config.channel_multiplier wants a list of int"),
    ],
)
def test_a_vocabulary_or_a_vq_vae_that_is_none_is_named(copied, change, named):
    with pytest.raises(CheckpointError, match=named):
        intermodal.load(copied(change))


@pytest.mark.parametrize(
    "pictures",
    [
        SQUARE,
        {**SQUARE, "resample": 1, "rescale_factor": 0.0078, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},  # the released file
        {**SQUARE, "rescale_factor": 1 / 127.5},
        {**SQUARE, "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ],
)
def test_files_that_mean_the_authors_pixels_change_nothing(copied, pictures):
    plain = intermodal.load(copied()).processor.planner.processor
    assert intermodal.load(copied(pictures=pictures)).processor.planner.processor == plain


OTHER = {
    "resample": ({**SQUARE, "resample": 3}, "resample"),
    "crop of a larger square": ({**SQUARE, "size": {"shortest_edge": 40}}, "size"),
    "squeezed": ({"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}, "size, crop"),
    "levels": ({**SQUARE, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}, "rescale_factor, image_mean or image_std"),
    "not normalised": ({**SQUARE, "do_normalize": False}, "rescale_factor, image_mean or image_std"),
}


@pytest.mark.parametrize("name", OTHER)
def test_an_image_processor_of_another_kind_is_told_of_or_followed(copied, name):
    pictures, said = OTHER[name]
    plain = intermodal.load(copied()).processor.planner.processor
    with pytest.warns(UserWarning, match=f'not what the authors\' rules say.*: {said}.*"rules": "transformers"'):
        assert intermodal.load(copied(pictures=pictures)).processor.planner.processor == plain
    where = copied(lambda config: config.update(intermodal={"rules": "transformers"}), pictures)
    planner, theirs = intermodal.load(where).processor.planner, ChameleonImageProcessorPil.from_pretrained(where)
    for index, size in enumerate([(40, 60), (90, 33)]):
        image = picture(*size, index)
        expected = theirs(images=image, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(planner.pixels([image], [None]), expected, atol=1e-5, rtol=0)


def test_pictures_of_another_size_than_the_models(copied):
    pictures = {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}}
    with pytest.raises(CheckpointError, match=r'24 x 24 pixels, and config\.json says 32 x 32.*"intermodal": \{"side": 24\}'):
        intermodal.load(copied(lambda config: config.update(intermodal={"rules": "transformers"}), pictures))
    with pytest.warns(UserWarning, match="these are followed.*: size, crop"):
        assert intermodal.load(copied(pictures=pictures)).config.side == SIDE
    for rules in ("authors", "transformers"):
        model = intermodal.load(
            copied(lambda config, rules=rules: config.update(intermodal={"rules": rules, "side": 24}), pictures)
        )
        assert len(model.processor([user(picture(30, 40, 1))]).ids) == 36 + 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # our own side beside a file that says another: it was said on purpose
        assert intermodal.load(copied(lambda config: config.update(intermodal={"side": 16}), SQUARE)).config.side == 16


def transparent(kind):
    values = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    if kind == "hard":
        values[..., 3] = (values[..., 3] > 128) * np.uint8(255)
    if kind == "none":
        values[..., 3] = 255
    made = Image.fromarray(values)
    if kind == "palette":
        file = io.BytesIO()
        made.quantize(16).save(file, "PNG")
        return Image.open(file)
    return made.convert("LA") if kind == "grey" else made


@pytest.mark.parametrize("kind", ["soft", "hard", "none", "grey", "palette"])
def test_transparency_is_laid_on_white_as_the_authors_do(copied, kind):
    image = transparent(kind)
    planner = intermodal.load(copied()).processor.planner
    rgba = np.array(image.convert("RGBA"))
    alpha = rgba[..., 3:] / 255.0  # image_tokenizer.py:44-65
    white = ((1 - alpha) * 255 + alpha * rgba[..., :3]).astype("uint8")
    wanted = white / 255.0 * 2 - 1
    np.testing.assert_allclose(planner.pixels([image], [None])[0].permute(1, 2, 0), wanted, atol=1e-6)
    shown = load_part({"type": "image", "image": image}, blend=planner.blend)  # as in messages: opened before the planner sees it
    np.testing.assert_allclose(planner.pixels([shown], [None])[0].permute(1, 2, 0), wanted, atol=1e-6)
    theirs = ChameleonImageProcessorPil(**SQUARE)(images=image, return_tensors="pt")["pixel_values"]
    where = copied(lambda config: config.update(intermodal={"rules": "transformers"}), SQUARE)
    torch.testing.assert_close(intermodal.load(where).processor.planner.pixels([image], [None]), theirs, atol=1e-6, rtol=0)
    # all others: Pillow's compositing, as ever
    composed = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image.convert("RGBA")).convert("RGB")
    assert np.array_equal(open_image(image), composed)
    assert np.array_equal(ImageProcessor((SIDE, SIDE)).resized(image), composed)
    assert np.array_equal(white, composed) == (kind in ("hard", "none"))


def test_a_decoder_that_transformers_lost_is_told_of_and_restored(folder, tmp_path):
    """Its class keeps our section of config.json and drops the keys that it does not know."""
    model = with_decoder(intermodal.load(folder))
    intermodal.save(model, tmp_path / "draws")
    intermodal.save(model.vqmodel, tmp_path / "vq")
    transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "draws").save_pretrained(tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "again" / name).write_bytes((folder / name).read_bytes())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["intermodal"] == {"vq_decoder": True}
    with pytest.warns(UserWarning, match="hold no VQ decoder: it was lost.*intermodal convert DIR NEW --vq-decoder VQ") as told:
        lost = intermodal.load(tmp_path / "again")
    assert len(told) == 1
    assert told[0].filename == __file__
    assert not lost.config.vq.decoder
    talk = [user("How are you?")]
    assert torch.equal(lost.logits(talk), model.logits(talk))
    command = ["convert", str(tmp_path / "again"), str(tmp_path / "restored"), "--vq-decoder", str(tmp_path / "vq")]
    with pytest.warns(UserWarning, match="it was lost"):
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.exception
    codes = torch.arange(16).view(1, 4, 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.equal(intermodal.load(tmp_path / "restored").vqmodel.decode(codes), model.vqmodel.decode(codes))


def test_reading_a_config_leaves_it_as_it_is(folder):
    config = json.loads((folder / "config.json").read_text())
    before = copy.deepcopy(config)
    from_hf(config)
    assert config == before
