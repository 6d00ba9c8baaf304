"""Embeddings and logits of tiny random models against transformers, from tensors and from pictures and texts."""

import json

import hf_checkpoints as hf
import pytest
import torch
import transformers
from test_token_ids import siglip2_transformers_4

import intermodal
from intermodal.batch import Images, Texts

FIXED = hf.of("clip", "siglip")
NAFLEX = hf.of("siglip2")


def naflex_inputs(case: str, grids: list[tuple[int, int]], seed: int = 3):
    """Random patches of the given grids: (packed patches, the same padded with junk as transformers wants them)."""
    patch = hf.CASES[case][1]["vision_config"]["patch_size"]
    generator = torch.Generator().manual_seed(seed)
    pieces = [torch.empty(rows * columns, 3 * patch * patch).normal_(generator=generator) for rows, columns in grids]
    longest = max(len(piece) for piece in pieces) + 3
    values = torch.full((len(grids), longest, 3 * patch * patch), 9.0)
    mask = torch.zeros(len(grids), longest, dtype=torch.int32)
    for row, seen, piece in zip(values, mask, pieces, strict=True):
        row[: len(piece)] = piece
        seen[: len(piece)] = 1
    return torch.cat(pieces), {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


GRIDS = [(3, 3), (1, 1), (2, 7), (7, 2), (5, 5), (4, 4), (2, 7), (1, 12), (12, 1), (7, 7)]


def both_sides(case: str, checkpoint, seed: int = 3):
    """(our unnormalised image vectors, our unnormalised text vectors, our model, transformers' output and its own vectors)."""
    folder, theirs = checkpoint(case)
    ours = intermodal.load(folder)
    texts = hf.random_texts(case, 10)
    if hf.family_of(case) == "siglip2":
        packed, inputs = naflex_inputs(case, GRIDS, seed)
        images = Images(packed, tuple(GRIDS))
    else:
        inputs = {"pixel_values": hf.random_pixels(case, 10)}
        images = Images(inputs["pixel_values"])
    expected = hf.reference(theirs, texts, **inputs)
    with torch.no_grad():
        return ours.encode_images(images), ours.encode_texts(Texts.pack(texts)), ours, expected


@pytest.mark.parametrize("case", hf.CASES)
def test_image_embeddings_equal_transformers(case, checkpoint):
    image, _, _, expected = both_sides(case, checkpoint)
    hf.assert_spread(expected.image_embeds)
    assert hf.distance(torch.nn.functional.normalize(image, dim=-1), expected.image_embeds) <= hf.TOLERANCE


@pytest.mark.parametrize("case", hf.CASES)
def test_text_embeddings_equal_transformers(case, checkpoint):
    _, text, _, expected = both_sides(case, checkpoint)
    hf.assert_spread(expected.text_embeds)
    assert hf.distance(torch.nn.functional.normalize(text, dim=-1), expected.text_embeds) <= hf.TOLERANCE


@pytest.mark.parametrize("case", hf.CASES)
def test_logits_equal_transformers(case, checkpoint):
    image, text, ours, expected = both_sides(case, checkpoint)
    cosine = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    bias = 0 if ours.logit_bias is None else ours.logit_bias
    logits = cosine * ours.logit_scale.exp() + bias
    assert expected.logits_per_image.std() > 0.1
    assert hf.distance(logits.detach(), expected.logits_per_image) <= hf.TOLERANCE


@pytest.mark.parametrize("case", hf.CASES)
def test_vectors_before_normalisation_equal_transformers(case, checkpoint):
    """`encode_*` is compared as it is, so that a factor on the vectors cannot hide behind the normalisation."""
    image, text, _, expected = both_sides(case, checkpoint)
    pooled_image, pooled_text = expected.vision_model_output.pooler_output, expected.text_model_output.pooler_output
    for mine, reference in ((image, pooled_image), (text, pooled_text)):
        assert mine.shape == reference.shape
        assert ((mine - reference).norm(dim=-1) / reference.norm(dim=-1)).max() <= hf.TOLERANCE


@pytest.mark.parametrize("case", hf.of("clip"))
def test_clip_texts_need_no_padding_and_any_padding_gives_the_same(case, checkpoint):
    """Causal attention cannot see what follows the pooled token: ours runs without padding, transformers with several kinds."""
    folder, theirs = checkpoint(case)
    config = theirs.config.text_config
    texts = hf.random_texts(case, 12, seed=9)
    with torch.no_grad():
        mine = intermodal.load(folder).encode_texts(Texts.pack(texts))
        for pad in (0, 1, config.vocab_size - 1):
            ids = hf.padded(texts, config.max_position_embeddings, pad)
            expected = theirs.get_text_features(input_ids=ids).pooler_output
            assert ((mine - expected).norm(dim=-1) / expected.norm(dim=-1)).max() <= hf.TOLERANCE


def test_legacy_and_modern_end_tokens_pool_at_different_places(checkpoint, tmp_path):
    """eos_token_id 2 means the largest id, any other the first place of that id: the same weights, two answers."""
    folder, _ = checkpoint("clip-legacy-eos")
    modern = hf.copy(folder, tmp_path / "modern")
    config = json.loads((modern / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 30
    (modern / "config.json").write_text(json.dumps(config))
    texts = [[58, 5, 30, 8, 59], [58, 30, 30, 59, 4], [58, 59, 30, 59, 30]]
    answers = []
    for source in (folder, modern):
        theirs = hf.CLIPModel.from_pretrained(source).eval()
        with torch.no_grad():
            expected = theirs.get_text_features(input_ids=torch.tensor(texts)).pooler_output
            mine = intermodal.load(source).encode_texts(Texts.pack(texts))
        assert ((mine - expected).norm(dim=-1) / expected.norm(dim=-1)).max() <= hf.TOLERANCE
        answers.append(mine)
    assert (answers[0] - answers[1]).norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("case", NAFLEX)
def test_naflex_images_do_not_depend_on_their_neighbours(case, checkpoint):
    """Each grid alone in transformers, all packed in ours."""
    folder, theirs = checkpoint(case)
    packed, _ = naflex_inputs(case, GRIDS)
    with torch.no_grad():
        mine = intermodal.load(folder).encode_images(Images(packed, tuple(GRIDS)))
        start = 0
        for row, (rows, columns) in zip(mine, GRIDS, strict=True):
            piece = packed[start : start + rows * columns][None]
            start += rows * columns
            mask = torch.ones(1, rows * columns, dtype=torch.int32)
            shape = torch.tensor([[rows, columns]])
            expected = theirs.get_image_features(piece, pixel_attention_mask=mask, spatial_shapes=shape).pooler_output[0]
            assert (row - expected).norm() / expected.norm() <= hf.TOLERANCE


@pytest.mark.parametrize("family", [*hf.FAMILIES, "siglip2-fixed"])
def test_pictures_and_texts_to_logits_equal_transformers(family, whole):
    folder, theirs, images, tokenizer = whole(family)
    pictures = hf.pictures(7)
    texts = ["a photo of a cat", "two dogs", "birds and numbers, 1234!", "a cat " * 30, "CAFÉ"]
    expected = hf.end_to_end(family, theirs, images, tokenizer, pictures, texts)
    ours = intermodal.load(folder)
    hf.assert_spread(expected.image_embeds)
    hf.assert_spread(expected.text_embeds)
    assert hf.distance(ours.embed_images(pictures), expected.image_embeds) <= hf.TOLERANCE
    assert hf.distance(ours.embed_texts(texts), expected.text_embeds) <= hf.TOLERANCE
    assert hf.distance(ours.logits(pictures, texts), expected.logits_per_image) <= hf.TOLERANCE


def test_siglip_2_of_one_resolution_as_published(whole, tmp_path):
    """PITFALLS 2.6: its files name Gemma's tokenizer, which lowers nothing by itself; the authors trained on lower case."""
    folder = hf.copy(whole("siglip2-fixed")[0], tmp_path / "model")
    siglip2_transformers_4(folder)
    ours = intermodal.load(folder)
    assert type(ours).__name__ == "SigLIP"
    assert not ours.config.naflex
    texts = ["A Photo of a CAT", "two dogs"]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    call = dict(padding="max_length", truncation=True, max_length=hf.CONTEXT)
    assert ours.processor.texts.ids(texts) == [theirs(text.lower(), **call).input_ids for text in texts]
    assert ours.processor.texts.ids(texts)[0] != theirs(texts[0], **call).input_ids


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_embeddings_are_unit_float32_and_do_not_depend_on_the_batch_size(family, whole):
    ours = intermodal.load(whole(family)[0])
    pictures, texts = hf.pictures(5, seed=4), hf.SENTENCES[:5]
    for together, apart in (
        (ours.embed_images(pictures), ours.embed_images(pictures, batch_size=2)),
        (ours.embed_texts(texts), ours.embed_texts(texts, batch_size=2)),
    ):
        assert together.dtype == torch.float32
        assert hf.distance(together.norm(dim=-1), torch.ones(5)) <= 1e-6
        assert hf.distance(together, apart) <= 1e-6


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_nothing_in_gives_empty_results_and_a_single_item_is_refused(family, whole):
    ours = intermodal.load(whole(family)[0])
    width = ours.config.embed_width
    assert ours.embed_images([]).shape == (0, width)
    assert ours.embed_texts([]).shape == (0, width)
    assert ours.logits(hf.pictures(2), []).shape == (2, 0)
    with pytest.raises(TypeError, match="list"):
        ours.embed_texts("a cat")
    with pytest.raises(TypeError, match="list"):
        ours.embed_images(hf.pictures(1)[0])


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_config_that_leaves_out_defaults_loads_like_transformers(family, tmp_path):
    """Directories written by transformers 4 hold only what differs from the class defaults."""
    vision = {"hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 1}
    vision.update({"num_patches": 9} if family == "siglip2" else {"image_size": 40})
    text = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    text.update({"eos_token_id": 49} if family == "clip" else {"projection_size": 48})
    given = {"model_type": family, "vision_config": vision, "text_config": text}
    theirs = hf.randomise(hf.MODELS[family](hf.CONFIGS[family](**json.loads(json.dumps(given)))), 8)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(given))
    ours = intermodal.load(tmp_path)
    context, patch = theirs.config.text_config.max_position_embeddings, theirs.config.vision_config.patch_size
    ids = torch.arange(3 * context).reshape(3, context) % 49
    ids[:, -1] = 49
    if family == "siglip2":
        pixels = torch.empty(2, 6, 3 * patch * patch).normal_(generator=torch.Generator().manual_seed(0))
        inputs = {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(2, 6),
            "spatial_shapes": torch.tensor([[2, 3], [3, 2]]),
        }
        images = Images(pixels.flatten(0, 1), ((2, 3), (3, 2)))
    else:
        inputs = {"pixel_values": torch.empty(2, 3, 40, 40).normal_(generator=torch.Generator().manual_seed(0))}
        images = Images(inputs["pixel_values"])
    with torch.no_grad():
        expected = theirs(input_ids=ids, **inputs)
        image = torch.nn.functional.normalize(ours.encode_images(images), dim=-1)
        text_vectors = torch.nn.functional.normalize(ours.encode_texts(Texts.pack(ids.tolist())), dim=-1)
    assert hf.distance(image, expected.image_embeds) <= hf.TOLERANCE
    assert hf.distance(text_vectors, expected.text_embeds) <= hf.TOLERANCE


def test_old_clip_config_dictionaries_override_the_sections(checkpoint, tmp_path):
    """CLIP configs from 2021 carry `vision_config_dict` and `text_config_dict`, which transformers lets win."""
    folder, theirs = checkpoint("clip-quick-7")
    old = hf.copy(folder, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["vision_config_dict"], config["text_config_dict"] = config["vision_config"], config["text_config"]
    config["vision_config"] = {**config["vision_config"], "hidden_act": "gelu", "num_attention_heads": 5}
    (old / "config.json").write_text(json.dumps(config))
    pixels = hf.random_pixels("clip-quick-7", 3)
    with torch.no_grad():
        expected = theirs.get_image_features(pixels).pooler_output
        mine = intermodal.load(old).encode_images(Images(pixels))
    assert ((mine - expected).norm(dim=-1) / expected.norm(dim=-1)).max() <= hf.TOLERANCE
