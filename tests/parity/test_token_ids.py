"""Token ids against transformers' tokenizers, in every file layout, and what truncation and padding make of them."""

import json
import pickle
import shutil

import hf_checkpoints as hf
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.models.clip.tokenization_clip import CLIPTokenizer
from transformers.models.siglip.tokenization_siglip import SiglipTokenizer

import intermodal
from intermodal.errors import CheckpointError

CONTEXT = hf.CONTEXT
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model")

CLIP_TEXTS = [*hf.SENTENCES, "<|endoftext|>", "a <|endoftext|> b", "<|startoftext|>cat<|endoftext|>", "<| endoftext |>"]
LONG = ["a cat " * count for count in range(4, 13)]


def bare(family: str, whole, target, **text):
    """A directory of the family with no tokenizer files, its text config changed by `text`."""
    folder = hf.copy(whole(family)[0], target)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(text)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def added(content: str) -> dict:
    """How transformers 4 writes a special token into tokenizer_config.json."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def assert_same_ids(folder, theirs, texts, **call) -> list[list[int]]:
    ours = intermodal.load(folder).processor.texts
    mine = ours.ids(texts)
    for text, got in zip(texts, mine, strict=True):
        assert got == theirs(text, truncation=True, max_length=CONTEXT, **call).input_ids, repr(text)
    packed = ours(texts)
    assert packed.ids.tolist() == [i for ids in mine for i in ids]
    assert packed.segments.lengths == tuple(len(ids) for ids in mine)
    return mine


# -- CLIP -----------------------------------------------------------------------------------------------------------------------


def clip_tokenizer_json(folder):
    """The layout of transformers 5: tokenizer.json and tokenizer_config.json."""
    hf.clip_tokenizer().save_pretrained(folder)
    assert (folder / "tokenizer.json").exists()
    assert not (folder / "vocab.json").exists()


def clip_only_tokenizer_json(folder):
    clip_tokenizer_json(folder)
    (folder / "tokenizer_config.json").unlink()


def clip_transformers_4(folder):
    """vocab.json, merges.txt and the settings as transformers 4 wrote them, without tokenizer.json."""
    hf.write_clip_vocabulary(folder)
    settings = {"bos_token": added("<|startoftext|>"), "eos_token": added("<|endoftext|>"), "unk_token": added("<|endoftext|>")}
    settings.update(pad_token="<|endoftext|>", do_lower_case=True, errors="replace", model_max_length=77)
    settings.update(
        add_prefix_space=False, tokenizer_class="CLIPTokenizer", name_or_path="openai/clip", special_tokens_map_file="x"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>", "bos_token": "<|startoftext|>"}))


def clip_only_vocabulary(folder):
    hf.write_clip_vocabulary(folder)


def clip_both_layouts(folder):
    """tokenizer.json next to vocab.json and merges.txt, as on the hub."""
    clip_tokenizer_json(folder)
    hf.write_clip_vocabulary(folder)


CLIP_LAYOUTS = {
    "tokenizer-json": clip_tokenizer_json,
    "only-tokenizer-json": clip_only_tokenizer_json,
    "transformers-4": clip_transformers_4,
    "only-vocabulary": clip_only_vocabulary,
    "both": clip_both_layouts,
}


@pytest.fixture(params=CLIP_LAYOUTS)
def clip_folder(request, whole, tmp_path):
    folder = bare("clip", whole, tmp_path / "model")
    CLIP_LAYOUTS[request.param](folder)
    return folder


def test_clip_ids_equal_transformers(clip_folder):
    ids = assert_same_ids(clip_folder, CLIPTokenizer.from_pretrained(clip_folder), CLIP_TEXTS)
    assert len({tuple(row) for row in ids}) > len(CLIP_TEXTS) - 4  # only the empty texts may look alike


def test_clip_truncation_ends_in_the_end_token(clip_folder):
    theirs = CLIPTokenizer.from_pretrained(clip_folder)
    ids = assert_same_ids(clip_folder, theirs, LONG)
    assert {len(row) for row in ids} >= {10, 12, 14, CONTEXT}
    assert all(row[-1] == hf.clip_vocabulary()[0]["<|endoftext|>"] for row in ids)


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_clip_truncation_of_a_model_with_the_legacy_end_token(layout, whole, tmp_path):
    """`eos_token_id: 2` in an old config is a wrong number, not the id that ends a text."""
    folder = bare("clip", whole, tmp_path / "model", eos_token_id=2, bos_token_id=0, pad_token_id=1)
    CLIP_LAYOUTS[layout](folder)
    ids = assert_same_ids(folder, CLIPTokenizer.from_pretrained(folder), LONG)
    assert all(row[-1] == hf.clip_vocabulary()[0]["<|endoftext|>"] for row in ids)


def test_clip_end_of_word_pieces_are_used_in_the_vocabulary_layout(whole, tmp_path):
    """Against ids written out by hand, so that ours and transformers' cannot be wrong together."""
    folder = bare("clip", whole, tmp_path / "model")
    hf.write_clip_vocabulary(folder)
    vocab = hf.clip_vocabulary()[0]
    wanted = ["<|startoftext|>", "a</w>", "cat</w>", "c", "a", "t", "s</w>", "!</w>", "<|endoftext|>"]
    assert intermodal.load(folder).processor.texts.ids(["A  Cat\ncatS!"])[0][:3] == [vocab[piece] for piece in wanted[:3]]
    spelled = intermodal.load(folder).processor.texts.ids(["cats!"])[0]
    assert [vocab[piece] for piece in ("s</w>", "!</w>", "<|endoftext|>")] == spelled[-3:]


def test_clip_vocabulary_without_its_special_tokens_is_an_error(whole, tmp_path):
    folder = bare("clip", whole, tmp_path / "model")
    hf.write_clip_vocabulary(folder)
    vocab = {piece: i for piece, i in hf.clip_vocabulary()[0].items() if piece != "<|startoftext|>"}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(CheckpointError, match=r"vocab\.json.*startoftext"):
        intermodal.load(folder)


# -- SigLIP ---------------------------------------------------------------------------------------------------------------------


def siglip_transformers_5(folder):
    hf.siglip_tokenizer(folder, model_max_length=CONTEXT).save_pretrained(folder)


def siglip_transformers_4(folder):
    (folder / "spiece.model").write_bytes(hf.spiece_model())
    token = {"lstrip": True, "normalized": False, "rstrip": True, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {"1": {"content": "</s>", **token}, "2": {"content": "<unk>", **token}},
        "additional_special_tokens": [],
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "eos_token": "</s>",
        "model_input_names": ["input_ids"],
        "model_max_length": 64,
        "pad_token": "</s>",
        "processor_class": "SiglipProcessor",
        "sp_model_kwargs": {},
        "tokenizer_class": "SiglipTokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def siglip_only_spiece(folder):
    (folder / "spiece.model").write_bytes(hf.spiece_model())


SIGLIP_LAYOUTS = {
    "transformers-5": siglip_transformers_5,
    "transformers-4": siglip_transformers_4,
    "only-spiece": siglip_only_spiece,
}
SIGLIP_TEXTS = [
    *(text for text in hf.SENTENCES if "_" not in text),
    *LONG,
    "what? a CAT!",
    "it's a dog's-life, isn't it",
    "1,234.5",
    "\u2019curly\u2019 \u201cquotes\u201d \u2014 dash",
]


@pytest.mark.parametrize("layout", SIGLIP_LAYOUTS)
def test_siglip_ids_equal_transformers(layout, whole, tmp_path):
    folder = bare("siglip", whole, tmp_path / "model")
    SIGLIP_LAYOUTS[layout](folder)
    theirs = SiglipTokenizer.from_pretrained(folder)
    ids = assert_same_ids(folder, theirs, SIGLIP_TEXTS, padding="max_length")
    assert {len(row) for row in ids} == {CONTEXT}
    assert any(2 in row for row in ids)  # unknown pieces are among the texts
    assert all(row[-1] == 1 for row in ids)


def test_siglip_keeps_capitals_when_the_files_say_so(whole, tmp_path):
    folder = bare("siglip", whole, tmp_path / "model")
    hf.siglip_tokenizer(folder, do_lower_case=False).save_pretrained(folder)
    theirs = SiglipTokenizer.from_pretrained(folder)
    texts = ["A Photo of a CAT", "a photo of a cat"]
    ids = assert_same_ids(folder, theirs, texts, padding="max_length")
    assert ids[0] != ids[1]


def test_siglip_underscore_is_a_space_as_the_authors_have_it(whole, tmp_path):
    """transformers deletes `_`; big_vision makes it a space before it deletes the other punctuation."""
    folder = bare("siglip", whole, tmp_path / "model")
    siglip_transformers_5(folder)
    theirs = SiglipTokenizer.from_pretrained(folder)
    texts = ["under_score and __double__ snake_case_name", "_", "a_b-c_d", "_cat_"]
    mine = intermodal.load(folder).processor.texts.ids(texts)
    call = {"padding": "max_length", "truncation": True, "max_length": CONTEXT}
    assert mine == [theirs(text.replace("_", " "), **call).input_ids for text in texts]
    deleted = [theirs(text, **call).input_ids for text in texts]
    assert mine != deleted
    hf.edit_json(folder / "tokenizer_config.json", underscore_to_space=False)  # a checkpoint's own setting, kept when it is saved
    model = intermodal.load(folder)
    assert model.processor.texts.ids(texts) == deleted
    again = intermodal.load(intermodal.save(model, tmp_path / "saved"))
    assert again.processor.texts.ids(texts) == deleted


# -- SigLIP 2 -------------------------------------------------------------------------------------------------------------------


def siglip2_class_default(folder):
    hf.siglip2_tokenizer().save_pretrained(folder)


def siglip2_right(folder):
    hf.siglip2_tokenizer(padding_side="right").save_pretrained(folder)


def siglip2_with_end(folder):
    """An end token after every text, as the published checkpoints add it."""
    hf.siglip2_tokenizer(padding_side="right", add_eos_token=True, add_bos_token=False).save_pretrained(folder)


def siglip2_with_end_left(folder):
    hf.siglip2_tokenizer(add_eos_token=True, add_bos_token=False).save_pretrained(folder)


def siglip2_transformers_4(folder):
    """Gemma's tokenizer as transformers 4 saved it: nothing in the files lower-cases, the post-processor adds the end token."""
    theirs = hf.siglip2_tokenizer()
    fast = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast.post_processor = processors.TemplateProcessing(
        single="$A:0 <eos>:0", pair="$A:0 <eos>:0 $B:1 <eos>:1", special_tokens=[("<eos>", 1)]
    )
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "add_bos_token": False,
        "add_eos_token": True,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "padding_side": "right",
        "processor_class": "Siglip2Processor",
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SIGLIP2_LAYOUTS = {
    "class-default": siglip2_class_default,
    "right": siglip2_right,
    "with-end": siglip2_with_end,
    "with-end-left": siglip2_with_end_left,
    "transformers-4": siglip2_transformers_4,
}


def siglip2_case(layout, whole, tmp_path):
    folder = bare("siglip2", whole, tmp_path / "model")
    SIGLIP2_LAYOUTS[layout](folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == "Siglip2Tokenizer"
    return folder, theirs


SIGLIP2_SHORT = [text[: CONTEXT // 4] for text in hf.SENTENCES if text.isascii()]


@pytest.mark.parametrize("layout", SIGLIP2_LAYOUTS)
def test_siglip2_ids_of_short_texts_equal_transformers(layout, whole, tmp_path):
    folder, theirs = siglip2_case(layout, whole, tmp_path)
    ids = assert_same_ids(folder, theirs, SIGLIP2_SHORT, padding="max_length")
    assert {len(row) for row in ids} == {CONTEXT}
    assert all(0 in row for row in ids)  # every one is padded


@pytest.mark.parametrize("layout", SIGLIP2_LAYOUTS)
def test_siglip2_ids_of_long_texts_equal_transformers(layout, whole, tmp_path):
    folder, theirs = siglip2_case(layout, whole, tmp_path)
    ids = assert_same_ids(folder, theirs, [*LONG, *hf.SENTENCES[-2:]], padding="max_length")
    assert any(0 not in row for row in ids)


@pytest.mark.parametrize("layout", SIGLIP2_LAYOUTS)
@pytest.mark.parametrize("text", [text for text in hf.SENTENCES if not text.isascii()] + ["ΟΔΟΣ", "ΣΑΣ"])
def test_siglip2_ids_of_other_scripts_equal_transformers(text, layout, whole, tmp_path):
    """Letters that are lower-cased in their own ways, and bytes for what the vocabulary lacks."""
    folder, theirs = siglip2_case(layout, whole, tmp_path)
    ids = assert_same_ids(folder, theirs, [text[:3], text[-3:]], padding="max_length")
    assert all(0 in row for row in ids)  # nothing is cut here


# -- files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_directory_without_tokenizer_files_loads_and_only_its_texts_fail(family, whole, tmp_path):
    folder = bare(family, whole, tmp_path / "model")
    model = intermodal.load(folder)
    assert model.embed_images(hf.pictures(2)).shape == (2, model.config.embed_width)
    with pytest.raises(ValueError, match="without tokenizer files"):
        model.embed_texts(["a cat"])


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_a_broken_tokenizer_file_is_named(family, whole, tmp_path):
    folder = bare(family, whole, tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        intermodal.load(folder)


LAYOUTS = [
    *(("clip", name) for name in CLIP_LAYOUTS),
    *(("siglip", name) for name in SIGLIP_LAYOUTS),
    *(("siglip2", name) for name in SIGLIP2_LAYOUTS),
]


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_saving_copies_the_tokenizer_files_byte_for_byte(family, layout, whole, tmp_path):
    folder = bare(family, whole, tmp_path / "model")
    {"clip": CLIP_LAYOUTS, "siglip": SIGLIP_LAYOUTS, "siglip2": SIGLIP2_LAYOUTS}[family][layout](folder)
    saved = intermodal.save(intermodal.load(folder), tmp_path / "saved")
    before = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).exists()}
    after = {name: (saved / name).read_bytes() for name in TOKENIZER_FILES if (saved / name).exists()}
    assert after == before
    texts = [*hf.SENTENCES, *LONG]
    assert intermodal.load(saved).processor.texts.ids(texts) == intermodal.load(folder).processor.texts.ids(texts)


@pytest.mark.parametrize(("family", "layout"), LAYOUTS)
def test_a_loaded_processor_can_be_pickled_for_data_workers(family, layout, whole, tmp_path):
    folder = bare(family, whole, tmp_path / "model")
    {"clip": CLIP_LAYOUTS, "siglip": SIGLIP_LAYOUTS, "siglip2": SIGLIP2_LAYOUTS}[family][layout](folder)
    processor = intermodal.load(folder).processor
    again = pickle.loads(pickle.dumps(processor))
    assert again.texts.ids(hf.SENTENCES) == processor.texts.ids(hf.SENTENCES)


def test_saving_over_a_directory_replaces_its_tokenizer(whole, tmp_path):
    """A tokenizer.json of the old model, left in place, would be read before the vocabulary that was just written."""
    target = bare("clip", whole, tmp_path / "target")
    clip_tokenizer_json(target)
    vocab = json.loads((target / "tokenizer.json").read_text())
    vocab["normalizer"] = None  # the old tokenizer keeps capitals
    (target / "tokenizer.json").write_text(json.dumps(vocab))
    source = bare("clip", whole, tmp_path / "source")
    clip_only_vocabulary(source)
    model = intermodal.load(source)
    intermodal.save(model, target)
    texts = ["A CAT", "a cat"]
    assert intermodal.load(target).processor.texts.ids(texts) == model.processor.texts.ids(texts)
    shutil.rmtree(source)
