"""Pictures and texts on their way to a batch, against values worked out by hand."""

import json
import pickle
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from intermodal.batch import Images, PairBatch, Texts
from intermodal.errors import CheckpointError, SampleError
from intermodal.inputs.image import (
    SIGLIP_DEFAULTS,
    ImageProcessor,
    NaflexProcessor,
    centre_crop,
    naflex_grid,
    open_image,
    read_processor,
)
from intermodal.inputs.processor import PairProcessor
from intermodal.inputs.text import TextTokenizer, canonicalise, fresh, from_folder, train_tokenizer
from intermodal.inputs.video import Sampling, decode

NEAREST = 0
RED, WHITE = (255, 0, 0), (255, 255, 255)


def plain(size, colour, mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def numbered(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 whose every value is its own place: red counts pixels, green adds 100, blue adds 200."""
    return (np.arange(height * width).reshape(height, width, 1) + np.array([0, 100, 200])).astype(np.uint8)


# -- open_image -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["picture", "path", "string", "bytes", "bytearray", "memoryview", "array"])
def test_open_image_takes_every_kind_of_source(kind, tmp_path):
    array = numbered(4, 5)
    path = tmp_path / "x.png"
    Image.fromarray(array).save(path)
    data = path.read_bytes()
    sources = {"picture": Image.open(path), "path": path, "string": str(path), "bytes": data, "array": array}
    sources.update(bytearray=bytearray(data), memoryview=memoryview(data))
    opened = open_image(sources[kind])
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), array)


def test_open_image_spreads_a_grey_array_over_three_channels():
    grey = np.array([[0, 7], [200, 255]], np.uint8)
    assert np.array_equal(np.asarray(open_image(grey)), np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize(
    ("picture", "colour"),
    [
        (plain((2, 2), (255, 0, 0, 0), "RGBA"), WHITE),
        (plain((2, 2), (255, 0, 0, 255), "RGBA"), RED),
        (plain((2, 2), (0, 0, 0, 51), "RGBA"), (204, 204, 204)),
        (plain((2, 2), (10, 0), "LA"), WHITE),
        (plain((2, 2), 37, "L"), (37, 37, 37)),
        (plain((2, 2), 1, "1"), WHITE),
        (plain((2, 2), (0, 255, 255, 0), "CMYK"), RED),
    ],
)
def test_open_image_lays_transparency_on_white(picture, colour):
    assert open_image(picture).getcolors() == [(4, colour)]


def test_open_image_honours_the_transparent_colour_of_a_palette(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([0, 0, 255, 255, 0, 0])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "x.png", transparency=0)
    opened = open_image(tmp_path / "x.png")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [WHITE, RED]


def test_open_image_turns_a_picture_upright_and_leaves_the_given_one_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the stored left column is the top row
    Image.fromarray(numbered(2, 3)).save(tmp_path / "x.png", exif=exif)
    given = Image.open(tmp_path / "x.png")
    assert np.array_equal(np.asarray(open_image(given)), np.rot90(numbered(2, 3), -1))
    assert given.size == (3, 2)


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_open_image_names_what_is_no_picture(data):
    with pytest.raises(SampleError, match="picture"):
        open_image(data)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_open_image_refuses_a_file_cut_short(keep, kind, tmp_path):
    path = tmp_path / f"x.{kind}"
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    with pytest.raises(SampleError):
        open_image(path.read_bytes()[: int(path.stat().st_size * keep)])


def test_open_image_names_a_missing_path(tmp_path):
    with pytest.raises(SampleError, match=r"gone\.png"):
        open_image(tmp_path / "gone.png")


@pytest.mark.parametrize("thing", [None, 3, object(), [1, 2]])
def test_open_image_says_what_it_takes(thing):
    with pytest.raises(TypeError, match=type(thing).__name__):
        open_image(thing)


# -- fixed-size pictures --------------------------------------------------------------------------------------------------------


def test_levels_are_rescaled_then_normalised_per_channel():
    recipe = ImageProcessor(size=(1, 1), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    pixels = recipe([plain((1, 1), (0, 51, 255))]).pixels
    assert pixels.shape == (1, 3, 1, 1)
    assert torch.allclose(pixels.flatten(), torch.tensor([0.0, -0.6, 0.0]), atol=1e-7, rtol=0)


def test_pixels_without_rescaling_or_normalising_are_the_levels():
    recipe = ImageProcessor(size=(3, 4), rescale_factor=None, mean=None, std=None)
    array = numbered(3, 4)
    assert torch.equal(recipe([array]).pixels[0], torch.from_numpy(array).permute(2, 0, 1).float())


def test_a_shortest_edge_scales_the_long_side_down_to_a_whole_number():
    recipe = ImageProcessor(size=4, crop=None)
    assert recipe.resized(plain((9, 14), RED)).shape == (6, 4, 3)  # 4 * 14 / 9 = 6.2
    assert recipe.resized(plain((14, 9), RED)).shape == (4, 6, 3)
    assert recipe.resized(plain((5, 5), RED)).shape == (4, 4, 3)
    assert recipe.resized(plain((100, 1), RED)).shape == (4, 400, 3)


def test_pictures_that_would_differ_in_size_are_refused():
    with pytest.raises(CheckpointError, match="crop"):
        ImageProcessor(size=4, crop=None)([plain((9, 14), RED)])


def test_no_pictures_make_an_empty_batch():
    batch = ImageProcessor(size=(3, 4))([])
    assert batch.pixels.shape == (0, 3, 3, 4)
    assert len(batch) == 0
    patches = NaflexProcessor(patch_size=4, max_patches=9)([])
    assert patches.pixels.shape == (0, 48)
    assert len(patches) == 0


@pytest.mark.parametrize(
    ("shape", "size", "rows", "columns"),
    [
        ((6, 5), (4, 3), (1, 5), (1, 4)),
        ((7, 4), (4, 3), (1, 5), (0, 3)),  # a half pixel goes to the top left
        ((4, 3), (4, 3), (0, 4), (0, 3)),
    ],
)
def test_centre_crop_of_a_larger_picture(shape, size, rows, columns):
    array = numbered(*shape)
    assert np.array_equal(centre_crop(array, size), array[slice(*rows), slice(*columns)])


@pytest.mark.parametrize(
    ("shape", "size", "top", "left"),
    [((2, 3), (4, 5), 1, 1), ((2, 3), (5, 5), 2, 1), ((2, 2), (3, 3), 1, 1), ((1, 1), (4, 4), 2, 2)],
)
def test_centre_crop_of_a_smaller_picture_lies_on_black(shape, size, top, left):
    array = numbered(*shape) + np.uint8(1)
    want = np.zeros((*size, 3), np.uint8)
    want[top : top + shape[0], left : left + shape[1]] = array
    assert np.array_equal(centre_crop(array, size), want)


@settings(max_examples=200, deadline=None)
@given(height=st.integers(1, 12), width=st.integers(1, 12), tall=st.integers(1, 12), wide=st.integers(1, 12))
def test_centre_crop_always_has_the_size_asked_for(height, width, tall, wide):
    array = np.full((height, width, 3), 9, np.uint8)
    out = centre_crop(array, (tall, wide))
    assert out.shape == (tall, wide, 3)
    assert (out == 9).all(axis=-1).sum() == min(height, tall) * min(width, wide)


def test_a_square_recipe_for_another_size_keeps_the_rest():
    clip = ImageProcessor(size=8, crop=(8, 8), resample=NEAREST, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)).for_size(5)
    assert (clip.size, clip.crop, clip.resample, clip.mean, clip.std) == (5, (5, 5), NEAREST, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    siglip = ImageProcessor(size=(8, 8)).for_size(5)
    assert (siglip.size, siglip.crop) == ((5, 5), None)


def test_saved_recipes_read_back_as_they_were():
    recipe = ImageProcessor(size=(8, 9), resample=2, rescale_factor=0.01, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert ImageProcessor.from_hf(recipe.to_hf("siglip"), SIGLIP_DEFAULTS) == recipe
    naflex = NaflexProcessor(
        patch_size=8, max_patches=31, resample=3, rescale_factor=0.01, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0)
    )
    assert NaflexProcessor.from_hf(naflex.to_hf("siglip2"), {}) == naflex


def test_the_nested_settings_file_is_preferred_and_none_is_an_empty_recipe(tmp_path):
    assert read_processor(tmp_path) == {}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 1}))
    assert read_processor(tmp_path) == {"size": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert read_processor(tmp_path) == {"size": 1}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 2}}))
    assert read_processor(tmp_path) == {"size": 2}


# -- native resolution ----------------------------------------------------------------------------------------------------------


def test_patches_run_row_by_row_and_hold_their_pixels_row_by_row():
    recipe = NaflexProcessor(patch_size=2, max_patches=6, resample=NEAREST, rescale_factor=None, mean=None, std=None)
    array = numbered(4, 6)
    batch = recipe([array])
    assert batch.grids == ((2, 3),)
    assert batch.pixels.shape == (6, 12)
    for row in range(2):
        for column in range(3):
            patch = array[2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert batch.pixels[3 * row + column].tolist() == patch.reshape(-1).tolist()


@pytest.mark.parametrize(
    ("width", "height", "patch", "most", "grid"),
    [
        (224, 224, 16, 256, (16, 16)),
        (1, 1, 16, 256, (7, 7)),  # no more than a hundredfold: 100 pixels are 7 patches
        (3000, 20, 16, 256, (1, 150)),  # 2 rows would leave room for 128 columns of the 300 that come with them
        (20, 3000, 16, 256, (150, 1)),
        (640, 480, 16, 1, (1, 1)),
        (512, 256, 16, 128, (8, 16)),
    ],
)
def test_grids_of_known_sizes(width, height, patch, most, grid):
    assert naflex_grid(height, width, patch, most) == grid
    assert NaflexProcessor(patch_size=patch, max_patches=most).grid(width, height) == grid


@settings(max_examples=300, deadline=None)
@given(
    height=st.integers(1, 4000), width=st.integers(1, 4000), patch=st.sampled_from([1, 7, 14, 16, 32]), most=st.integers(1, 1200)
)
def test_grids_stay_within_the_budget_and_turn_with_the_picture(height, width, patch, most):
    rows, columns = naflex_grid(height, width, patch, most)
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= most
    assert naflex_grid(width, height, patch, most) == (columns, rows)
    assert (rows >= columns) if height >= width else (columns >= rows)


# -- texts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("A Photo, of a CAT!", "a photo of a cat"),
        ("  many \t\n spaces ", "many spaces"),
        ("snake_case__name", "snake case name"),
        ("don't (stop)", "dont stop"),
        ("a - b", "a b"),
        ("!?", ""),
        ("", ""),
        ("“curly” — dash", "“curly” — dash"),
    ],
)
def test_canonicalise(text, clean):
    assert canonicalise(text) == clean
    assert canonicalise(clean) == clean


def test_canonicalise_can_keep_capitals_and_delete_underscores():
    assert canonicalise("A_B c", lower=False) == "A B c"
    assert canonicalise("A_B c", underscore_to_space=False) == "ab c"


class Letters:
    """A tokenizer for the rules alone: one id a letter, a=10, b=11, ..."""

    def __call__(self, texts):
        return [[ord(letter) - 87 for letter in text] for text in texts]


def letters(**rules) -> TextTokenizer:
    defaults = {"context": 4, "pad_to": None, "pad_id": 0, "eos_id": 1, "eos_last": False}
    return TextTokenizer(Letters(), **{**defaults, **rules})


@pytest.mark.parametrize(
    ("rules", "ids"),
    [
        ({}, [[10, 11], [10, 11, 12, 13], [10, 11, 12, 13], []]),
        ({"eos_last": True}, [[10, 11], [10, 11, 12, 13], [10, 11, 12, 1], []]),
        ({"pad_to": 4}, [[10, 11, 0, 0], [10, 11, 12, 13], [10, 11, 12, 13], [0, 0, 0, 0]]),
        ({"pad_to": 4, "pad_left": True, "pad_id": 5}, [[5, 5, 10, 11], [10, 11, 12, 13], [10, 11, 12, 13], [5, 5, 5, 5]]),
        ({"pad_to": 4, "eos_last": True}, [[10, 11, 0, 0], [10, 11, 12, 13], [10, 11, 12, 1], [0, 0, 0, 0]]),
    ],
)
def test_cutting_and_padding(rules, ids):
    assert letters(**rules).ids(["ab", "abcd", "abcde", ""]) == ids


def test_texts_are_cleaned_before_they_are_encoded():
    assert letters(clean=str.lower).ids(["AB"]) == [[10, 11]]


def test_a_tokenizer_call_packs_what_ids_says():
    packed = letters()(["ab", "c", "abcdefg"])
    assert packed.ids.tolist() == [10, 11, 12, 10, 11, 12, 13]
    assert packed.ids.dtype == torch.int64
    assert packed.segments.lengths == (2, 1, 4)


def test_a_directory_without_files_has_no_tokenizer(tmp_path):
    assert from_folder(tmp_path, "clip", context=5, eos_id=1, pad_id=0) is None
    processor = PairProcessor(ImageProcessor(size=(3, 3)), None, "clip")
    with pytest.raises(ValueError, match="tokenizer"):
        _ = processor.texts


@pytest.fixture(scope="module")
def trained():
    sentences = ["a red ball on a table", "two blue cubes, one green ball", "The RED cube!"] * 5
    return train_tokenizer(sentences, 120)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_a_fresh_tokenizer_reads_back_from_its_own_files(family, trained, tmp_path):
    made = fresh(trained, family, context=7)
    PairProcessor(NaflexProcessor() if family == "siglip2" else ImageProcessor(size=(3, 3)), made, family).save(tmp_path)
    read = from_folder(tmp_path, family, context=7, eos_id=1, pad_id=1)
    texts = ["a red ball", "", "TWO blue cubes, one green ball on a table and a cube", "zebra"]
    ids = made.ids(texts)
    assert read.ids(texts) == ids
    assert ids[1][:1] == [1]
    assert [len(row) for row in ids][2] == 7
    assert ids[2][-1] == 1
    assert all(len(row) == 7 for row in ids) or family == "clip"


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_a_fresh_tokenizer_gives_transformers_the_same_ids(family, trained, tmp_path):
    from transformers import PreTrainedTokenizerFast

    made = fresh(trained, family, context=7)
    for name, data in made.files.items():
        (tmp_path / name).write_bytes(data)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    padding = False if family == "clip" else "max_length"
    texts = ["a red ball", "", "TWO blue cubes, one green ball on a table", "zebra"]
    assert made.ids(texts) == [theirs(text, truncation=True, padding=padding, max_length=7).input_ids for text in texts]


def test_a_fresh_processor_can_be_pickled_for_data_workers(trained):
    processor = PairProcessor(ImageProcessor(size=(3, 3)), fresh(trained, "siglip", context=7), "siglip")
    again = pickle.loads(pickle.dumps(processor))
    assert again.texts.ids(["a red ball"]) == processor.texts.ids(["a red ball"])
    assert torch.equal(again.images([plain((4, 4), RED)]).pixels, processor.images([plain((4, 4), RED)]).pixels)


# -- batches --------------------------------------------------------------------------------------------------------------------


def test_texts_pack_end_to_end_and_slice_by_text():
    texts = Texts.pack([[1, 2, 3], [4], [5, 6]])
    assert texts.ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert len(texts) == 3
    part = texts.slice(1, 3)
    assert part.ids.tolist() == [4, 5, 6]
    assert part.segments.lengths == (1, 2)
    assert len(Texts.pack([])) == 0


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Texts.pack([[1], []])


def test_images_slice_by_picture_and_not_by_patch():
    fixed = Images(torch.arange(4.0).reshape(4, 1, 1, 1)).slice(1, 3)
    assert fixed.pixels.flatten().tolist() == [1, 2]
    packed = Images(torch.arange(11.0)[:, None], ((1, 2), (2, 3), (3, 1)))
    assert len(packed) == 3
    part = packed.slice(1, 3)
    assert part.pixels.flatten().tolist() == list(range(2, 11))
    assert part.grids == ((2, 3), (3, 1))


def test_pairs_slice_both_sides_keys_and_groups():
    pairs = PairBatch(Images(torch.arange(3.0)), Texts.pack([[1], [2, 3], [4]]), ["a", "b", "c"], torch.tensor([7, 8, 7]))
    part = pairs.slice(1, 3)
    assert (len(part), part.keys, part.groups.tolist(), part.texts.ids.tolist()) == (2, ["b", "c"], [8, 7], [2, 3, 4])
    assert part.images.pixels.tolist() == [1, 2]


def test_ideographs_are_words_and_what_cannot_be_spelled_is_told():
    """A sentence without spaces is not one word; a letter never counted is `<unk>`, and the share of such texts is known."""
    tokenizer = fresh(train_tokenizer(["一只狗在树下", "two dogs"], 200), "siglip", context=8)
    pieces = tokenizer.encode.tokenizer.encode("一只猫在树 dogs").tokens
    assert pieces == ["一", "只", "<unk>", "在", "树", "dogs", "</s>"]
    assert tokenizer.unknown(["一只狗", "一只猫", "two dogs", "two cats"]) == 0.5


@pytest.mark.parametrize(("matrix", "turned"), [((0, 1, -1, 0), -90), ((0, -1, 1, 0), 90), ((-1, 0, 0, -1), 180)])
def test_a_phones_clip_is_shown_as_players_turn_it(matrix, turned, tmp_path):
    """The angle is in the track's header (ISO 14496-12, `tkhd`): nine numbers, written here into a file of two grey halves."""
    import av

    file = tmp_path / "phone.mp4"
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:, :32] = 255
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    data = bytearray(file.read_bytes())
    place = data.find(b"tkhd") + 4 + 4 + 20 + 16  # its name, version and flags, times and number, reserved and layer
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    file.write_bytes(data)
    clip = decode(file, Sampling())
    wanted = np.rot90(pixels, turned // 90)
    assert clip.frames[0].shape == wanted.shape
    assert np.abs(clip.frames[0].astype(int) - wanted).mean() < 12
