"""Pixels against transformers' PIL image processors: sizes, colour modes, rotation, recipes and the files that hold them."""

import io
import json

import hf_checkpoints as hf
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor, Siglip2Processor, SiglipProcessor
from transformers.image_utils import load_image
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

import intermodal
from intermodal.data.loader import Fetcher
from intermodal.data.source import Sample
from intermodal.inputs.image import ImageProcessor
from intermodal.inputs.processor import PairProcessor

EXACT = 1e-6
CASE = {"clip": "clip-legacy-eos", "siglip": "siglip-gelu-7", "siglip2": "siglip2-gelu-7"}
PIL_CLASS = {"clip": hf.CLIPImageProcessorPil, "siglip": hf.SiglipImageProcessorPil, "siglip2": hf.Siglip2ImageProcessorPil}
MODES = ["L", "1", "P", "P-transparent", "P-alpha", "LA", "RGBA", "RGB-transparent", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"]

CLIP_RECIPES = {
    "square": {"size": {"shortest_edge": 23}, "crop_size": {"height": 23, "width": 23}},
    "resize-above-crop": {"size": {"shortest_edge": 30}, "crop_size": {"height": 18, "width": 25}},
    "crop-above-short-side": {"size": {"shortest_edge": 20}, "crop_size": {"height": 33, "width": 17}},
    "crop-above-both-sides": {"size": {"shortest_edge": 9}, "crop_size": {"height": 46, "width": 51}},
    "crop-by-one-more": {"size": {"shortest_edge": 16}, "crop_size": {"height": 17, "width": 17}},
    "bilinear": {"size": {"shortest_edge": 21}, "crop_size": {"height": 20, "width": 20}, "resample": 2},
    "lanczos": {"size": {"shortest_edge": 21}, "crop_size": {"height": 20, "width": 20}, "resample": 1},
    "nearest": {"size": {"shortest_edge": 21}, "crop_size": {"height": 20, "width": 20}, "resample": 0},
    "own-statistics": {
        "size": {"shortest_edge": 17},
        "crop_size": {"height": 17, "width": 17},
        "image_mean": [0.1, 0.5, 0.9],
        "image_std": [0.3, 1.7, 0.05],
    },
    "no-crop": {"size": {"height": 19, "width": 26}, "do_center_crop": False},
    "no-resize": {"do_resize": False, "crop_size": {"height": 24, "width": 31}},
    "no-rescale": {"size": {"shortest_edge": 17}, "crop_size": {"height": 17, "width": 17}, "do_rescale": False},
    "no-normalise": {"size": {"shortest_edge": 17}, "crop_size": {"height": 17, "width": 17}, "do_normalize": False},
    "raw-levels": {
        "size": {"shortest_edge": 17},
        "crop_size": {"height": 17, "width": 17},
        "do_rescale": False,
        "do_normalize": False,
    },
    "other-factor": {"size": {"shortest_edge": 17}, "crop_size": {"height": 17, "width": 17}, "rescale_factor": 1 / 127.5},
}
SIGLIP_RECIPES = {
    "square": {"size": {"height": 23, "width": 23}},
    "oblong": {"size": {"height": 14, "width": 37}},
    "bilinear": {"size": {"height": 20, "width": 20}, "resample": 2},
    "own-statistics": {"size": {"height": 18, "width": 18}, "image_mean": [0.2, 0.4, 0.6], "image_std": [0.9, 0.5, 0.25]},
    "no-normalise": {"size": {"height": 18, "width": 18}, "do_normalize": False},
}
# the pixels of any setting are looked at here, also of those that are not the small tower's
pytestmark = pytest.mark.filterwarnings("ignore:.*no picture can be embedded", "ignore:.*would not have one size")

NAFLEX_RECIPES = {
    "16-of-256": {"patch_size": 16, "max_num_patches": 256},
    "16-of-64": {"patch_size": 16, "max_num_patches": 64},
    "14-of-49": {"patch_size": 14, "max_num_patches": 49},
    "7-of-1": {"patch_size": 7, "max_num_patches": 1},
    "7-of-3": {"patch_size": 7, "max_num_patches": 3},
    "8-of-100": {"patch_size": 8, "max_num_patches": 100},
    "9-bicubic": {"patch_size": 9, "max_num_patches": 30, "resample": 3},
    "own-statistics": {"patch_size": 8, "max_num_patches": 30, "image_mean": [0.2, 0.4, 0.6], "image_std": [0.9, 0.5, 0.25]},
    "raw-levels": {"patch_size": 8, "max_num_patches": 30, "do_rescale": False, "do_normalize": False},
}


def hundred_sizes() -> list[tuple[int, int]]:
    """Single pixels, slivers, and sizes drawn on a logarithmic scale (no shape longer than 150 to 1, none above 120,000 pixels)."""
    rng = np.random.default_rng(11)
    sizes = [(1, 1), (3000, 20), (20, 3000), (1, 2), (2, 1), (1, 150), (150, 1), (3, 3), (2999, 21), (23, 23), (24, 23), (23, 24)]
    while len(sizes) < 100:
        width, height = (int(np.exp(value)) for value in rng.uniform(0, np.log(3000), 2))
        if max(width, height) <= 150 * min(width, height) and width * height <= 120_000:
            sizes.append((width, height))
    return sizes


@pytest.fixture(scope="module")
def pictures_of_all_sizes():
    return [hf.picture(*size, seed=3) for size in hundred_sizes()]


@pytest.fixture
def processors(checkpoint, tmp_path):
    """processors(family, **recipe) -> (ours, transformers'), ours read from the file that transformers' wrote."""

    def make(family: str, **recipe):
        theirs = PIL_CLASS[family](**recipe)
        folder = hf.copy(checkpoint(CASE[family])[0], tmp_path / "model")
        theirs.save_pretrained(folder)
        assert (folder / "preprocessor_config.json").exists()
        return intermodal.load(folder).processor.images, theirs

    return make


def expected_pixels(theirs, image) -> np.ndarray:
    return np.asarray(theirs(image, return_tensors="np")["pixel_values"][0], np.float32)


def assert_same_pixels(ours, theirs, given, reference=None) -> None:
    """`given` goes into ours, `reference` (the same where left out) into transformers'. NaFlex is compared without the padding."""
    for item, shown in zip(given, given if reference is None else reference, strict=True):
        batch = ours([item])
        assert batch.pixels.dtype == torch.float32
        if batch.grids is None:
            want = expected_pixels(theirs, shown)
            got = batch.pixels[0].numpy()
        else:
            out = theirs(shown, return_tensors="np")
            assert batch.grids == (tuple(out["spatial_shapes"][0].tolist()),)
            want = np.asarray(out["pixel_values"][0][out["pixel_attention_mask"][0] == 1], np.float32)
            got = batch.pixels.numpy()
        label = getattr(shown, "size", None), getattr(shown, "mode", None)
        assert got.shape == want.shape, label
        torch.testing.assert_close(
            torch.from_numpy(np.array(got)),
            torch.from_numpy(np.array(want)),
            atol=EXACT,
            rtol=0,
            msg=lambda m, at=label: f"{at}: {m}",
        )


@pytest.mark.parametrize("recipe", CLIP_RECIPES)
def test_clip_pixels_of_a_hundred_sizes(recipe, processors, pictures_of_all_sizes):
    assert_same_pixels(*processors("clip", **CLIP_RECIPES[recipe]), pictures_of_all_sizes)


@pytest.mark.parametrize("recipe", SIGLIP_RECIPES)
def test_siglip_pixels_of_a_hundred_sizes(recipe, processors, pictures_of_all_sizes):
    assert_same_pixels(*processors("siglip", **SIGLIP_RECIPES[recipe]), pictures_of_all_sizes)


@pytest.mark.parametrize("recipe", NAFLEX_RECIPES)
def test_naflex_patches_of_a_hundred_sizes(recipe, processors, pictures_of_all_sizes):
    assert_same_pixels(*processors("siglip2", **NAFLEX_RECIPES[recipe]), pictures_of_all_sizes)


def test_naflex_packs_pictures_in_order_with_their_grids(processors):
    ours, theirs = processors("siglip2", patch_size=7, max_num_patches=20)
    given = hf.pictures(9, seed=6)
    batch = ours(given)
    out = theirs(given, return_tensors="np")
    assert batch.grids == tuple(map(tuple, out["spatial_shapes"].tolist()))
    assert len(set(batch.grids)) > 3
    want = np.concatenate(
        [values[mask == 1] for values, mask in zip(out["pixel_values"], out["pixel_attention_mask"], strict=True)]
    )
    assert np.abs(batch.pixels.numpy() - want).max() <= EXACT


@pytest.mark.parametrize(("patch", "most"), [(16, 256), (16, 1024), (14, 729), (7, 1), (7, 5), (32, 40), (1, 9)])
def test_naflex_grids_of_five_hundred_sizes(patch, most, processors):
    ours, _ = processors("siglip2", patch_size=patch, max_num_patches=most)
    rng = np.random.default_rng(2)
    sizes = [
        (1, 1),
        (3000, 20),
        (20, 3000),
        (1, 3000),
        (3000, 1),
        *np.exp(rng.uniform(0, np.log(5000), (500, 2))).astype(int).tolist(),
    ]
    for width, height in sizes:
        tall, wide = get_image_size_for_max_num_patches(height, width, patch, most)
        assert ours.grid(width, height) == (tall // patch, wide // patch), (width, height)


# transformers converts to RGB by default for CLIP and SigLIP, and for SigLIP 2 only when told to
TO_RGB = {
    "clip": CLIP_RECIPES["square"],
    "siglip": SIGLIP_RECIPES["oblong"],
    "siglip2": {**NAFLEX_RECIPES["14-of-49"], "do_convert_rgb": True},
}


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("mode", MODES)
def test_colour_modes(mode, family, processors):
    given = [hf.picture(*size, mode=mode, seed=1) for size in [(1, 1), (40, 31), (22, 90), (5, 2), (64, 64)]]
    if mode.startswith("P-") or mode in ("RGBA", "LA"):
        assert np.ptp(np.asarray(given[1].convert("RGBA"))[..., 3]) > 0  # there is transparency to get wrong
    assert_same_pixels(*processors(family, **TO_RGB[family]), given)


@pytest.mark.parametrize("family", ["clip", "siglip2"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "P-transparent", "P-alpha", "LA", "RGBA", "I;16"])
def test_png_files_of_every_mode(mode, family, processors, tmp_path):
    """What Pillow makes of a file, not of a picture in memory: palettes, 16 bits and transparency come back in their own ways."""
    path = tmp_path / "picture.png"
    picture = hf.picture(37, 52, mode=mode, seed=2)
    transparency = picture.info.get("transparency")
    picture.save(path, **({} if transparency is None else {"transparency": transparency}))
    ours, theirs = processors(family, **TO_RGB[family])
    assert_same_pixels(ours, theirs, [path, str(path), path.read_bytes()], [Image.open(path) for _ in range(3)])


@pytest.mark.parametrize("family", hf.FAMILIES)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_rotation(kind, orientation, family, processors, tmp_path):
    path = tmp_path / f"picture.{kind}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    hf.picture(61, 34, seed=7).save(path, exif=exif)
    ours, theirs = processors(family, **TO_RGB[family])
    upright = load_image(str(path))
    assert upright.size == ((61, 34) if orientation < 5 else (34, 61))
    assert_same_pixels(ours, theirs, [path, Image.open(path), io.BytesIO(path.read_bytes()).getvalue()], [upright] * 3)


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_nested_processor_config_of_transformers_5(family, whole, tmp_path):
    folder, _, images, tokenizer = whole(family)
    new = hf.copy(folder, tmp_path / "new")
    (new / "preprocessor_config.json").unlink()
    {"clip": CLIPProcessor, "siglip": SiglipProcessor, "siglip2": Siglip2Processor}[family](images, tokenizer).save_pretrained(new)
    assert not (new / "preprocessor_config.json").exists()
    assert "image_processor" in json.loads((new / "processor_config.json").read_text())
    assert_same_pixels(intermodal.load(new).processor.images, images, hf.pictures(4, seed=8))


def test_nested_settings_win_over_the_flat_file_as_in_transformers(checkpoint, tmp_path):
    folder = hf.copy(checkpoint(CASE["clip"])[0], tmp_path / "model")
    flat = PIL_CLASS["clip"](**CLIP_RECIPES["square"])
    nested = PIL_CLASS["clip"](**CLIP_RECIPES["own-statistics"])
    flat.save_pretrained(folder)
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": nested.to_dict(), "processor_class": "CLIPProcessor"})
    )
    theirs = PIL_CLASS["clip"].from_pretrained(folder)
    assert theirs.crop_size["height"] == 17
    assert_same_pixels(intermodal.load(folder).processor.images, theirs, hf.pictures(4))


def test_processor_config_without_image_settings_leaves_them_to_the_flat_file(checkpoint, tmp_path):
    folder = hf.copy(checkpoint(CASE["siglip"])[0], tmp_path / "model")
    theirs = PIL_CLASS["siglip"](**SIGLIP_RECIPES["oblong"])
    theirs.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "SiglipProcessor"}))
    assert_same_pixels(intermodal.load(folder).processor.images, theirs, hf.pictures(4))


OLD_FILES = {
    "feature-extractor-with-bare-numbers": (
        "clip",
        {"size": 23, "crop_size": 21, "do_center_crop": True, "do_resize": True, "do_normalize": True, "resample": 3,
         "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073],
         "image_std": [0.26862954, 0.26130258, 0.27577711]},
    ),
    "only-what-differs": ("clip", {"size": {"shortest_edge": 23}, "crop_size": {"height": 23, "width": 23}}),
    "empty-clip": ("clip", {"image_processor_type": "CLIPImageProcessor"}),
    "fast-class": ("siglip", {"image_processor_type": "SiglipImageProcessorFast", "size": {"height": 23, "width": 23},
                              "do_center_crop": None, "crop_size": None, "device": None, "resample": 2}),
    "empty-siglip": ("siglip", {"image_processor_type": "SiglipImageProcessor"}),
    "fast-naflex": ("siglip2", {"image_processor_type": "Siglip2ImageProcessorFast", "do_resize": True, "size": None, "resample": 2,
                                "max_num_patches": 40, "patch_size": 7, "return_tensors": None, "data_format": "channels_first"}),
    "naflex-without-a-budget": ("siglip2", {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 7}),
}  # fmt: skip


@pytest.mark.parametrize("name", OLD_FILES)
def test_settings_files_of_transformers_4(name, checkpoint, tmp_path):
    family, settings = OLD_FILES[name]
    folder = hf.copy(checkpoint(CASE[family])[0], tmp_path / "model")
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    theirs = PIL_CLASS[family].from_pretrained(folder)
    assert_same_pixels(intermodal.load(folder).processor.images, theirs, hf.pictures(5, seed=5))


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_no_settings_file_means_the_class_recipe_at_the_towers_size(family, checkpoint):
    folder, model = checkpoint(CASE[family])
    vision = model.config.vision_config
    if family == "siglip2":
        theirs = PIL_CLASS[family](patch_size=vision.patch_size)
    else:
        square = {"height": vision.image_size, "width": vision.image_size}
        size = {"shortest_edge": vision.image_size} if family == "clip" else square
        theirs = PIL_CLASS[family](size=size, crop_size=square) if family == "clip" else PIL_CLASS[family](size=size)
    assert_same_pixels(intermodal.load(folder).processor.images, theirs, hf.pictures(5, seed=5))


RECIPES = [
    *(("clip", name) for name in CLIP_RECIPES),
    *(("siglip", name) for name in SIGLIP_RECIPES),
    *(("siglip2", name) for name in NAFLEX_RECIPES),
]


@pytest.mark.parametrize(("family", "recipe"), RECIPES)
def test_saved_settings_give_the_same_pixels_in_transformers_and_in_ours(family, recipe, checkpoint, tmp_path):
    settings = {"clip": CLIP_RECIPES, "siglip": SIGLIP_RECIPES, "siglip2": NAFLEX_RECIPES}[family][recipe]
    before = PIL_CLASS[family](**settings)
    folder = hf.copy(checkpoint(CASE[family])[0], tmp_path / "model")
    before.save_pretrained(folder)
    saved = intermodal.save(intermodal.load(folder), tmp_path / "saved")
    pictures = hf.pictures(4, seed=9)
    again = PIL_CLASS[family].from_pretrained(saved)
    for picture in pictures:
        for key, value in before(picture, return_tensors="np").items():
            got = again(picture, return_tensors="np")[key]
            assert got.shape == value.shape, key
            assert np.abs(got.astype(np.float64) - value).max() <= EXACT, key
    assert_same_pixels(intermodal.load(saved).processor.images, before, pictures)


def test_saving_over_a_directory_replaces_its_image_settings(whole, tmp_path):
    """A nested file of the old model, left in place, would win over what was just written."""
    folder, _, images, tokenizer = whole("clip")
    target = hf.copy(folder, tmp_path / "target")
    CLIPProcessor(images, tokenizer).save_pretrained(target)
    other = hf.copy(folder, tmp_path / "other")
    PIL_CLASS["clip"](**CLIP_RECIPES["own-statistics"]).save_pretrained(other)
    intermodal.save(intermodal.load(other), target)
    want = PIL_CLASS["clip"](**CLIP_RECIPES["own-statistics"])
    assert_same_pixels(intermodal.load(target).processor.images, want, hf.pictures(3))
    got = PIL_CLASS["clip"].from_pretrained(target)
    assert got.crop_size["height"] == 17


def in_bytes(images, pictures):
    """What a data worker hands over."""
    return images.levels([images.resized(picture) for picture in pictures])


@pytest.mark.parametrize(("family", "recipe"), RECIPES)
def test_bytes_normalised_later_are_the_same_pixels_to_the_last_bit(family, recipe, processors):
    settings = {"clip": CLIP_RECIPES, "siglip": SIGLIP_RECIPES, "siglip2": NAFLEX_RECIPES}[family][recipe]
    images, _ = processors(family, **settings)
    pictures = [hf.picture(*size, seed=4) for size in [(61, 34), (40, 31), (22, 90), (5, 2), (64, 64)]]
    levels, wanted = in_bytes(images, pictures), images(pictures)
    assert levels.pixels.dtype == torch.uint8
    assert levels.pixels.nbytes * 4 == wanted.pixels.nbytes
    found = images.normalised(levels)
    assert found.grids == wanted.grids
    assert found.pixels.dtype == torch.float32
    assert torch.equal(found.pixels, wanted.pixels)
    part = images.normalised(levels.slice(1, 4))  # a micro-batch
    assert torch.equal(part.pixels, wanted.slice(1, 4).pixels)
    assert images.normalised(in_bytes(images, [])).pixels.shape == images([]).pixels.shape


@pytest.mark.parametrize("letterbox", [ImageProcessor((24, 24), letterbox=True, fill=90), ImageProcessor((24, 24), letterbox=True)])
def test_letterboxed_bytes_normalised_later_are_the_same_pixels(letterbox):
    pictures = hf.pictures(4, seed=2)
    assert torch.equal(letterbox.normalised(in_bytes(letterbox, pictures)).pixels, letterbox(pictures).pixels)


@pytest.mark.parametrize(
    ("family", "recipe"), [("clip", "resize-above-crop"), ("clip", "no-resize"), ("siglip", "oblong"), ("siglip2", "8-of-100")]
)
def test_training_sees_the_pixels_that_the_processor_makes(family, recipe, processors, whole):
    """A picture was resized twice where it is resized larger than it is cropped: training saw it closer than anything after it."""
    settings = {"clip": CLIP_RECIPES, "siglip": SIGLIP_RECIPES, "siglip2": NAFLEX_RECIPES}[family][recipe]
    images, _ = processors(family, **settings)
    pictures = [hf.picture(*size, seed=4) for size in [(61, 34), (40, 31), (22, 90)]]
    source = [Sample(str(number), picture, ["words"]) for number, picture in enumerate(pictures)]
    processor = PairProcessor(images, intermodal.load(whole(family)[0]).processor.texts, family)
    batch = Fetcher([source], processor, 0)[0, [(0, number) for number in range(3)]].batch
    assert batch.images.pixels.dtype == torch.uint8
    assert torch.equal(images.normalised(batch.images).pixels, images(pictures).pixels)
