"""Chameleon against transformers: logits on words as they are there, on picture codes as its head would score them unmasked."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from chat_files import byte_tokenizer
from packed import check_packed_equals_separate
from PIL import Image
from safetensors.torch import load_file
from too_long import check_too_long
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.errors import CheckpointError, IntermodalError
from intermodal.inputs.codes import ImageTokens
from intermodal.inputs.media import Clip, MediaError
from intermodal.models.vqvae import VQVAE, initialise
from intermodal.train import stages
from intermodal.train.recipe import load_recipe
from intermodal.train.stages import train_stages
from intermodal.weights import vqgan
from intermodal.weights.chameleon import attach_decoder

RECIPES = Path(__file__).parents[2] / "recipes"
CODES, SIDE = 40, 32
LETTERS = "ABCDEFGHIJ"
IMAGES = tuple(f"IMGIMG{''.join(LETTERS[int(d)] for d in str(code))}Z" for code in np.random.default_rng(0).permutation(CODES))
SPECIAL = ("<s>", "</s>", "<image>", "<racm3:break>", "<eoss>", "<reserved08706>")
NAMES = {name: 256 + index for index, name in enumerate((*SPECIAL, *IMAGES))}
VQ = dict(
    embed_dim=12,
    num_embeddings=CODES,
    latent_channels=16,
    resolution=SIDE,
    base_channels=32,
    channel_multiplier=[1, 2, 2],
    num_res_blocks=1,
)


def build(swin=False, tied=False, kv_heads=4):
    config = transformers.ChameleonConfig(
        vocab_size=256 + len(SPECIAL) + CODES, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, max_position_embeddings=512, swin_norm=swin, tie_word_embeddings=tied, vq_config=dict(VQ),
        vocabulary_map=NAMES, bos_token_id=NAMES["<s>"], eos_token_id=NAMES["</s>"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (0.12 if parameter.ndim > 1 else 0.1)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = {}

    def make(**settings):
        key = tuple(sorted(settings.items()))
        if key not in cache:
            folder, model = tmp_path_factory.mktemp("chameleon"), build(**settings)
            model.save_pretrained(folder)
            byte_tokenizer((*SPECIAL, *IMAGES)).save(str(folder / "tokenizer.json"))
            (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
            size = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
            (folder / "preprocessor_config.json").write_text(
                json.dumps({"image_processor_type": "ChameleonImageProcessor", **size})
            )
            cache[key] = folder, model
        return cache[key]

    return make


def picture(width, height, seed):
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def user(*parts):
    kinds = ["text" if isinstance(part, str) else "image" for part in parts]
    return {"role": "user", "content": [{"type": kind, kind: part} for kind, part in zip(kinds, parts, strict=True)]}


def said(*parts):
    return {**user(*parts), "role": "assistant"}


def with_decoder(model):
    """The model, able to draw: a decoder beside it."""
    source = vqgan._filled(vqgan.from_hf({**VQ}), model.vqmodel.state_dict(), "x").config
    full = initialise(VQVAE(replace(source, decoder=True)))
    full.quantize.load_state_dict(model.vqmodel.quantize.state_dict())
    return attach_decoder(model, full)


def started(name, folder, data=None, optim=None):
    """The tiny recipe of one stage, going on from a folder in fp32 on one thread, with other settings of its data and optimizer."""
    recipe = load_recipe(RECIPES / f"{name}.py", tiny=True)
    (stage,) = recipe.stages
    loop = replace(stage.train, threads=1, precision="fp32")
    stage = replace(stage, train=loop, data=replace(stage.data, **data or {}), optim=replace(stage.optim, **optim or {}))
    return replace(recipe, model=replace(recipe.model, start=str(folder)), stages=(stage,))


CASES = {
    "no image": [user("How are you?"), said("Fine.")],
    "image first": [user(picture(40, 60, 1), "What is it?"), said("Noise.")],
    "image last": [user("Draw noise."), said(picture(70, 33, 2))],
    "in any order": [user("a", picture(32, 32, 3), "b", picture(90, 40, 4)), said("c", picture(33, 35, 5), "d")],
    "learned: picture, text": [user("Draw, then say."), said(picture(50, 34, 6), "That was noise.")],
    "learned: text, picture, text, picture": [user("Say and draw."), said("a", picture(32, 64, 7), "b", picture(77, 41, 8))],
    "learned: picture": [said(picture(36, 36, 9))],
    "learned: picture, text, without a user": [said(picture(35, 60, 10), "Noise.")],
    "learned: text, picture, without a user": [said("Noise:", picture(60, 35, 11))],
}
LEARNED = [case for case in CASES if case.startswith("learned")]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("settings", [{}, {"swin": True}, {"tied": True, "kv_heads": 2}])
def test_logits(made, settings, case):
    folder, theirs = made(**settings)
    ours = intermodal.load(folder)
    batch = ours.processor(CASES[case])
    with torch.no_grad():
        mine, hidden = ours(batch), theirs.model(input_ids=batch.ids[None]).last_hidden_state[0]
        torch.testing.assert_close(mine, theirs.lm_head(hidden), atol=1e-4, rtol=0)  # the head before the mask
        masked = theirs(input_ids=batch.ids[None]).logits[0]
    words = [token for token in range(mine.shape[1]) if token not in ours.config.image_tokens.ids]
    torch.testing.assert_close(mine[:, words], masked[:, words], atol=1e-4, rtol=0)
    assert masked[:, list(ours.config.image_tokens.ids)].max() < -1e37  # PITFALLS D5
    assert mine[:, list(ours.config.image_tokens.ids)].abs().max() < 1e3


@pytest.mark.parametrize("rules", ["authors", "transformers"])
def test_pixels_and_codes(made, rules, tmp_path):
    folder, theirs = made()
    ours = intermodal.load(folder)
    config = {**ours.source["config"], "intermodal": {"rules": rules}}
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = intermodal.load(tmp_path)
    planner, reference = ours.processor.planner, ChameleonImageProcessorPil.from_pretrained(folder)
    for index, (width, height) in enumerate([(32, 32), (40, 60), (90, 33), (31, 200), (301, 299)]):
        image = picture(width, height, index)
        plans = [planner.plan(image, 1)]
        mine = planner.pixels([image], plans)
        expected = reference(images=image, return_tensors="pt")["pixel_values"]
        if rules == "transformers":
            torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0)
        else:  # image_tokenizer.py:45-92
            scale = SIDE / min(image.size)
            resized = image.resize((round(scale * width), round(scale * height)), Image.Resampling.LANCZOS)
            left, top = (resized.width - SIDE) // 2, (resized.height - SIDE) // 2
            values = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255.0 * 2 - 1
            np.testing.assert_allclose(mine[0].permute(1, 2, 0), values, atol=1e-6)
        with torch.no_grad():
            codes = theirs.model.get_image_tokens(mine)  # their encoder, on the pixels of the rule
        assert torch.equal(planner.codes([image], plans), codes.flatten().long())


def test_what_a_picture_becomes(made):
    ours = intermodal.load(made()[0])
    batch = ours.processor(CASES["image last"])
    ids = batch.ids.tolist()
    start = ids.index(NAMES["<racm3:break>"])
    assert ids[start + 65] == NAMES["<eoss>"]
    assert set(ids[start + 1 : start + 65]) <= set(ours.config.image_tokens.ids)
    assert NAMES["<image>"] not in ids
    assert batch.visual is None
    assert batch.supervised[start : start + 66].all()  # the assistant drew it: it is learned
    assert not ours.processor(CASES["image first"]).supervised[:60].any()
    clip = Clip(np.zeros((2, 9, 9, 3), np.uint8), (0.0, 1.0), 1.0)
    with pytest.raises(MediaError, match="no videos"):
        ours.processor([{"role": "user", "content": [{"type": "video", "video": clip}]}])
    for messages in CASES.values():
        ours.processor.audit(ours.processor.conversation(messages))


@pytest.mark.parametrize("case", LEARNED)
def test_all_that_the_assistant_says_and_draws_is_learned(made, case):
    """From its first token on, a picture's begin too, to its end of turn: words, frames and codes in any order, and nothing before."""
    ours = intermodal.load(made()[0])
    batch = ours.processor(CASES[case])
    tokens, ids, learned = ours.config.image_tokens, batch.ids.tolist(), batch.supervised.tolist()
    turn, parts = NAMES["<reserved08706>"], CASES[case][-1]["content"]
    first = ids.index(turn) + 1 if len(CASES[case]) == 2 else 1  # after the user's end of turn, or the beginning of all text
    assert learned == [False] * first + [True] * (len(ids) - first)
    at = first
    for part in parts:
        if part["type"] == "text":
            wanted = ours.processor.encode(part["text"])
        else:
            codes = ours.processor.planner.codes([part["image"]], [ours.processor.planner.plan(part["image"], 1)]).tolist()
            assert len(codes) == 64
            wanted = [tokens.begin, *codes, tokens.end]
        assert ids[at : at + len(wanted)] == wanted
        at += len(wanted)
    assert ids[at:] == [turn]
    if parts[0]["type"] == "image":  # the first picture of the document is no exception
        assert all(learned[first : first + 66])
        assert set(ids[first + 1 : first + 65]) <= set(tokens.ids)


def test_codes_and_tokens_round_trip():
    tokens = ImageTokens.from_vocabulary(NAMES, CODES)
    every = torch.arange(CODES).view(4, 10)
    assert torch.equal(tokens.codes(tokens.tokens(every)), every)
    mapping = transformers.models.chameleon.modeling_chameleon.ChameleonImageVocabularyMapping(NAMES)
    assert torch.equal(tokens.tokens(every), mapping.convert_img2bpe(every).long())
    with pytest.raises(ValueError, match="not image tokens"):
        tokens.codes(torch.tensor([3]))
    for broken, message in (
        ({**NAMES, "IMGIMGAZ": 5, "IMGIMGAY": 6}, "no code of its own"),
        ({k: v for k, v in NAMES.items() if k != IMAGES[0]}, "the codebook 40"),
        ({k: v for k, v in NAMES.items() if k != "<eoss>"}, "<eoss>"),
    ):
        with pytest.raises(CheckpointError, match=message):
            ImageTokens.from_vocabulary(broken, CODES)


@pytest.mark.parametrize("swin", [False, True])
def test_packed_equals_separate(made, swin):
    check_packed_equals_separate(intermodal.load(made(swin=swin)[0], dtype="float64"), CASES.values())


@pytest.mark.parametrize("swin", [False, True])
def test_unlocking_pictures_of_a_released_layout_moves_no_word(made, tmp_path, swin):
    """Anole's method on a directory that transformers wrote: its own class reads the result, and says about words what it said."""
    folder, theirs = made(swin=swin)
    train_stages(started("unlock_images", folder), tmp_path, quiet=True)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "1-unlock" / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    after = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "model").eval()
    ours = intermodal.load(folder)
    tokens = ours.config.image_tokens
    words = [row for row in range(256 + len(SPECIAL)) if row not in (tokens.begin, tokens.end)]
    ids = ours.processor(CASES["no image"]).ids[None]
    with torch.no_grad():
        assert torch.equal(after(input_ids=ids).logits[..., words], theirs(input_ids=ids).logits[..., words])
    state, was = after.state_dict(), theirs.state_dict()
    for key in ("lm_head.weight", "model.language_model.embed_tokens.weight", "model.embed_tokens.weight"):
        if key in state:
            assert torch.equal(state[key][words], was[key][words])
            assert not torch.equal(state[key][list(tokens.ids)], was[key][list(tokens.ids)])
    assert sum(not torch.equal(state[key], was[key]) for key in state) == 2


@pytest.mark.parametrize("swin", [False, True])
def test_unlocking_moves_pictures_rows_alone(made, tmp_path, monkeypatch, swin):
    """Exactly these rows move: in the output table every code's, the begin's and the end's (each is scored against whatever comes); in
    the embedding the begin's, the end's and those of codes that were read. Nothing else moves by a bit, so without pictures the model
    replies to words what it did, even where the highest score is now a picture's."""
    start = tmp_path / "start"
    intermodal.save(with_decoder(intermodal.load(made(swin=swin)[0])), start)
    vocabulary = json.loads((start / "tokenizer.json").read_text())
    for token in vocabulary["added_tokens"]:  # codes with ordinary names: that they are no words must not hang on a special token
        token["special"] &= not token["content"].startswith("IMGIMG")
    (start / "tokenizer.json").write_text(json.dumps(vocabulary))
    read, losses = set(), stages.next_token_losses

    def watched(hidden, head, batch, **settings):
        read.update(batch.ids.tolist())
        return losses(hidden, head, batch, **settings)

    monkeypatch.setattr(stages, "next_token_losses", watched)
    train_stages(started("unlock_images", start, {"batch": 1}, {"lr": 0.3}), tmp_path / "run", quiet=True)
    before, after = intermodal.load(start), intermodal.load(tmp_path / "run" / "model")
    tokens = before.config.image_tokens
    frames, codes = {tokens.begin, tokens.end}, set(tokens.ids)
    assert 10 < len(codes & read) < CODES  # some are not read: their rows of the embedding must stay
    expected = {"lm_head.weight": frames | codes, "model.embed_tokens.weight": frames | (codes & read)}
    now = after.state_dict()
    for key, was in before.state_dict().items():
        if key in expected:
            assert set((now[key] != was).any(1).nonzero().flatten().tolist()) == expected[key], key
        else:
            assert torch.equal(now[key], was), key
    asked = [user("How are you?")]
    with torch.no_grad():
        highest = [int(model(model.processor(asked, reply=True))[-1].argmax()) for model in (before, after)]
    assert highest[0] < 256
    assert highest[1] in frames | codes
    for model in (before, after):
        model.processor.end_ids = ()  # a random model might say nothing at all
    replies = [model.generate(asked, max_new_tokens=12, max_images=0) for model in (before, after)]
    assert len(replies[0].ids) == 12
    assert set(replies[0].ids) <= set(range(256))
    assert (replies[1].ids, replies[1].text) == (replies[0].ids, replies[0].text)
    assert after.generate(asked, max_new_tokens=2, max_images=1).images  # as it would else: it draws now
    assert not before.generate(asked, max_new_tokens=2, max_images=1).images


@pytest.mark.parametrize("swin", [False, True])
def test_a_directory_of_transformers_trains_natively(made, tmp_path, swin):
    """From what transformers wrote, on pictures drawn and pictures shown: all but the VQ-VAE learns, and transformers reads the result."""
    folder, theirs = made(swin=swin)
    specs = ("draws:scenes:core?forms=1", "captions:scenes:core?forms=1")
    # no decay: what moves was moved by a gradient
    recipe = started("native", folder, {"train": specs, "weights": (1.0, 1.0), "batch": 4}, {"weight_decay": 0.0})
    ours = train_stages(recipe, tmp_path, quiet=True).eval()
    rows = [json.loads(line) for line in (tmp_path / "1-fuse" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(np.isfinite([row[name] for row in rows for name in ("loss", "loss_text", "loss_image", "gradient_norm")]))
    assert ours.config.text.swin_norm == swin
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, was in before.items():
        assert torch.equal(after[key], was) == key.startswith("model.vqmodel."), key
    tokens = ours.config.image_tokens
    for token in (*tokens.ids, tokens.begin, tokens.end):
        assert not torch.equal(after["lm_head.weight"][token], before["lm_head.weight"][token]), token
    again, found = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = [token for token in range(len(ours.head_weight)) if token not in tokens.ids]
    for case in ("no image", "in any order"):
        batch = ours.processor(CASES[case])
        with torch.no_grad():
            mine, learned = ours(batch), again.eval()(input_ids=batch.ids[None]).logits[0]
            first = theirs(input_ids=batch.ids[None]).logits[0]
        torch.testing.assert_close(mine[:, words], learned[:, words], atol=1e-4, rtol=0)
        assert (learned - first)[:, words].abs().max() > 0.01


def test_all_codes_of_the_released_vocabulary_round_trip():
    """8,192 codes named as the released tokenizer names them, at 4 to 8195 in another order than their numbers."""
    order = np.random.default_rng(1).permutation(8192)
    names = {f"IMGIMG{''.join(LETTERS[int(d)] for d in str(code))}Z": 4 + place for place, code in enumerate(order)}
    names |= {"<s>": 0, "</s>": 2, "<image>": 8711, "<racm3:break>": 8197, "<eoss>": 8196}
    tokens = ImageTokens.from_vocabulary(names, 8192)
    every = torch.arange(8192)
    mapped = tokens.tokens(every)
    assert torch.equal(tokens.codes(mapped), every)
    assert sorted(mapped.tolist()) == list(range(4, 8196))
    mapping = transformers.models.chameleon.modeling_chameleon.ChameleonImageVocabularyMapping(names)
    assert torch.equal(mapped, mapping.convert_img2bpe(every[None])[0].long())


@pytest.mark.parametrize("swin", [False, True])
def test_a_released_layout_draws_once_it_has_a_decoder(made, tmp_path, swin):
    """A directory of transformers, a decoder beside it, saved, loaded, and asked: text and a picture of the grid's codes, guided twice."""
    intermodal.save(with_decoder(intermodal.load(made(swin=swin)[0])), tmp_path)
    model = intermodal.load(tmp_path)
    model.processor.end_ids = ()
    asked = [user("Draw noise.")]
    with torch.no_grad():  # the head is made to begin a picture where the user's turn ends
        last = model.hidden(model.processor(asked, reply=True))[-1]
        model.lm_head.weight[NAMES["<racm3:break>"]] = 50 * last / last.norm() ** 2
    reply = model.generate(asked, max_new_tokens=80, max_images=1, guidance=2.0, image_guidance=1.2, seed=3)
    assert [picture.size for picture in reply.images] == [(SIDE, SIDE)]
    start = reply.ids.index(NAMES["<racm3:break>"])
    codes = model.config.image_tokens.codes(torch.tensor(reply.ids[start + 1 : start + 65]))
    assert reply.ids[start + 65] == NAMES["<eoss>"]
    assert codes.max() < CODES


@pytest.mark.parametrize("settings", [{}, {"tied": True}, {"swin": True}, {"swin": True, "tied": True}])
def test_round_trip(made, settings, tmp_path):
    """save(load(x)) is x, key for key, and transformers says with it what it said; with a decoder beside the keys as well."""
    folder, theirs = made(**settings)
    ours = intermodal.load(folder)
    assert (ours.config.text.swin_norm, ours.config.text.tied) == (settings.get("swin", False), settings.get("tied", False))
    intermodal.save(ours, tmp_path / "a")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "a" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert torch.equal(value, after[key]), key
    again = transformers.ChameleonForConditionalGeneration.from_pretrained(tmp_path / "a")
    ids = ours.processor(CASES["no image"]).ids[None]
    assert torch.equal(again(input_ids=ids).logits, theirs(input_ids=ids).logits)
    # with a decoder, which that class does not have
    source = initialise(VQVAE(vqgan._filled(vqgan.from_hf({**VQ}), ours.vqmodel.state_dict(), "x").config))
    with pytest.raises(CheckpointError, match="no decoder either"):
        attach_decoder(ours, source)
    full = initialise(VQVAE(type(source.config)(**{**source.config.__dict__, "decoder": True})))
    with pytest.raises(CheckpointError, match="another codebook"):
        attach_decoder(ours, full)
    full.quantize.load_state_dict(ours.vqmodel.quantize.state_dict())
    drawn_before = ours.processor(CASES["image last"]).ids
    with pytest.raises(IntermodalError, match="without a decoder"):
        ours.processor.planner.picture(drawn_before[drawn_before.tolist().index(NAMES["<racm3:break>"]) + 1 :][:64])
    attach_decoder(ours, full)
    intermodal.save(ours, tmp_path / "b")
    back = intermodal.load(tmp_path / "b")
    codes = torch.arange(16).view(1, 4, 4)
    with torch.no_grad():
        assert torch.equal(back.vqmodel.decode(codes), full.decode(codes))
    start = drawn_before.tolist().index(NAMES["<racm3:break>"]) + 1
    assert back.processor.planner.picture(drawn_before[start : start + 64]).size == (SIDE, SIDE)
    # and taken off again: what the file says of a decoder goes with it
    vq = replace(back.config.vq, decoder=False)
    back.vqmodel.config, back.config, back.vqmodel.decoder = vq, replace(back.config, vq=vq), None
    intermodal.save(back, tmp_path / "c")
    assert not intermodal.load(tmp_path / "c").config.vq.decoder


def test_too_long_counts_what_is_shown(made, monkeypatch):
    check_too_long(intermodal.load(made()[0]), CASES["image first"], user("And then?"), monkeypatch)


def test_the_verb_adds_a_decoder_to_a_released_layout(made, tmp_path):
    """From a directory that transformers wrote and the authors' VQGAN files, or a VQ-VAE's directory, to a picture."""
    folder, _ = made()
    ours = intermodal.load(folder)
    asked = [user("draw")]
    with torch.no_grad():  # a head that likes to begin a picture where the turn ends
        last = ours.hidden(ours.processor(asked, reply=True))[-1]
        ours.lm_head.weight[NAMES["<racm3:break>"]] = 9 * last / last.norm()
    reads = intermodal.save(ours, tmp_path / "reads")
    full = initialise(VQVAE(replace(ours.config.vq, decoder=True)))
    full.quantize.load_state_dict(ours.vqmodel.quantize.state_dict())
    vqgan.write_authors(full, tmp_path / "tokenizer")
    intermodal.save(full, tmp_path / "vq")
    run, codes = CliRunner().invoke, torch.arange(16).view(1, 4, 4)
    assert "--vq-decoder" in run(app, ["generate", str(reads), "draw", "--max-new-tokens", "2"]).stderr
    before = transformers.ChameleonForConditionalGeneration.from_pretrained(reads)
    for number, where in enumerate(("tokenizer", "tokenizer/vqgan.ckpt", "vq")):
        draws = tmp_path / f"draws-{number}"
        done = run(app, ["convert", str(reads), str(draws), "--vq-decoder", str(tmp_path / where)])
        assert done.exit_code == 0, done.exception
        with torch.no_grad():
            assert torch.equal(intermodal.load(draws).vqmodel.decode(codes), full.decode(codes))
        after = transformers.ChameleonForConditionalGeneration.from_pretrained(draws)
        ids = ours.processor(CASES["no image"]).ids[None]
        assert torch.equal(after(input_ids=ids).logits, before(input_ids=ids).logits)
    out = tmp_path / "out"
    told = run(app, ["generate", str(draws), "draw", "--max-new-tokens", "2", "--max-images", "1", "--out", str(out)])
    assert told.exit_code == 0, told.exception
    assert told.stderr == ""
    assert Image.open(out / "image-1.png").size == (SIDE, SIDE)


def test_the_verb_refuses_a_decoder_of_another_vq_vae(made, tmp_path):
    folder, _ = made()
    right = replace(intermodal.load(folder).config.vq, decoder=True)

    def refused(source, decoder):
        failed = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "out"), "--vq-decoder", str(decoder)])
        assert isinstance(failed.exception, IntermodalError)
        assert not (tmp_path / "out").exists()
        return str(failed.exception)

    for changes, told in (
        ({"codes": CODES + 1}, f"codes {CODES} against {CODES + 1}"),
        ({"code_width": 16}, "code_width 12 against 16"),
        ({"resolution": 64}, f"resolution {SIDE} against 64"),
        ({"latent_channels": 8}, "latent_channels 16 against 8"),
        ({"multipliers": (1, 2)}, "multipliers (1, 2, 2) against (1, 2)"),
        ({"decoder": False}, "no decoder either"),
    ):
        name = tmp_path / "-".join(changes)
        intermodal.save(initialise(VQVAE(replace(right, **changes))), name)
        assert told in refused(folder, name)
    intermodal.save(initialise(VQVAE(right)), tmp_path / "other")
    with torch.no_grad():
        other = intermodal.load(tmp_path / "other")
        other.quantize.embedding.weight += 1
    intermodal.save(other, tmp_path / "other")
    assert "another codebook" in refused(folder, tmp_path / "other")
    assert "goes with a Chameleon" in refused(tmp_path / "other", tmp_path / "other")
    assert "a VQ-VAE is wanted" in refused(folder, folder)
    assert refused(folder, tmp_path / "none")
