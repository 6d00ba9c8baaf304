"""Replies of words and pictures: the state machine, guidance, batches of mixed modes, streaming."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.generate.draw import Canvas, guided, pictures_of
from intermodal.generate.engine import Partial, Reply
from intermodal.generate.sample import Sampling
from intermodal.inputs.codes import ImageTokens
from intermodal.inputs.marks import marks_of
from intermodal.inputs.media import MediaError
from intermodal.inputs.text import spelled
from intermodal.kernels import decode as kernel
from intermodal.kernels.build import compiler
from intermodal.kernels.decode import DecodeStep
from intermodal.models.chameleon import Chameleon, ChameleonConfig
from intermodal.models.decoder import DecoderConfig
from intermodal.models.vqvae import VQConfig, initialise
from intermodal.weights.chameleon import TURN

sys.path.insert(0, str(Path(__file__).parents[1] / "parity"))
from chat_files import byte_tokenizer

CODES, SIDE = 20, 16
SPECIAL = ("<s>", "</s>", "<image>", "<racm3:break>", "<eoss>", TURN)
BOS, END, PLACEHOLDER, BEGIN, STOP, _ = range(256, 262)
FIRST = 262


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Chameleon with files. Its head likes to begin a picture where a user's turn ends."""
    made = tmp_path_factory.mktemp("chameleon")
    torch.manual_seed(0)
    text = DecoderConfig(48, 2, 3, 3, 16, 64, FIRST + CODES, context=300, qk_layernorm=True)
    vq = VQConfig(
        resolution=SIDE, width=16, multipliers=(1, 1), res_blocks=1, groups=4, stem=2, latent_channels=8, code_width=8, codes=CODES
    )
    tokens = ImageTokens(tuple(range(FIRST, FIRST + CODES)), BEGIN, STOP)
    model = Chameleon(ChameleonConfig(text, vq, tokens, PLACEHOLDER, SIDE))
    initialise(model.vqmodel)
    model.vqmodel.quantize.embedding.weight.data.normal_(0, 1)
    for name, parameter in model.named_parameters():
        if not name.startswith("vqmodel."):
            parameter.data.normal_(0, 0.4) if parameter.ndim > 1 else parameter.data.normal_(1, 0.1)
    intermodal.save(model, made)
    byte_tokenizer(SPECIAL).save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    model = intermodal.load(made)
    rows = []
    for talk in TALKS[:2]:
        with torch.no_grad():
            rows.append(model.hidden(model.processor(talk, reply=True))[-1])
    model.lm_head.weight.data[BEGIN] = 3 * torch.stack(rows).mean(0) / torch.stack(rows).norm(dim=1).mean()
    intermodal.save(model, made)
    return made


@pytest.fixture
def model(folder):
    made = intermodal.load(folder)
    made.processor.end_ids = ()
    return made


def ask(text, *pictures):
    return [{"role": "user", "content": [*({"type": "image", "image": p} for p in pictures), {"type": "text", "text": text}]}]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8))
TALKS = [ask("draw"), ask("a cat", NOISE), ask("b"), ask("something else entirely, please")]


def test_a_picture_is_exactly_its_codes_between_its_marks(model):
    reply = model.generate(TALKS[0], max_new_tokens=12, max_images=2, seed=1)
    assert reply.images, "the head was made to begin one"
    at, kinds = 0, [kind for kind, _ in reply.segments]
    for _ in reply.images:
        start = reply.ids.index(BEGIN, at)
        inside = reply.ids[start + 1 : start + 17]
        assert all(FIRST <= token < FIRST + CODES for token in inside)
        assert reply.ids[start + 17] == STOP
        at = start + 18
    texts = [value for kind, value in reply.segments if kind == "text"]
    assert "".join(texts) == model.processor.decode([token for token in reply.ids if token < 256])
    assert kinds.count("image") == len(reply.images) <= 2
    assert reply.text == "\n".join(texts)
    assert PLACEHOLDER not in reply.ids
    assert reply.images[0].size == (SIDE, SIDE)
    start = reply.ids.index(BEGIN)
    drawn = model.processor.planner.picture(torch.tensor(reply.ids[start + 1 : start + 17]))
    assert drawn.tobytes() == reply.images[0].tobytes()


SETTINGS = [
    dict(),
    dict(temperature=1.0, top_p=0.9, guidance=3.0, seed=4),
    dict(guidance=3.0, image_guidance=1.2, image_temperature=0.7, image_top_p=0.9),
]


@pytest.mark.skipif(compiler() is None, reason="this machine has no C++ compiler (c++, or what CXX names)")
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_kernel_draws_what_the_modules_draw(model, settings, monkeypatch):
    """With the guides of pictures under way in slots of their own."""
    steps, call = [], DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, *rest: steps.append(len(rest[0])) or call(self, *rest))
    by_kernel = model.generate_batch(TALKS, slots=3, max_new_tokens=12, **settings)
    assert sum(len(reply.images) for reply in by_kernel) > 1
    assert max(steps) > 3 or "guidance" not in settings
    steps.clear()
    monkeypatch.setattr(kernel, "library", lambda name: None)
    assert [reply.ids for reply in model.generate_batch(TALKS, slots=3, max_new_tokens=12, **settings)] == [
        r.ids for r in by_kernel
    ]
    assert not steps


@pytest.mark.parametrize("settings", SETTINGS)
def test_conversations_in_different_modes_share_a_batch(model, settings):
    alone = [model.generate(talk, max_new_tokens=7, **settings) for talk in TALKS]
    together = model.generate_batch(TALKS, max_new_tokens=7, slots=3, **settings)
    assert [reply.ids for reply in together] == [reply.ids for reply in alone]
    modes = {bool(reply.images) for reply in alone}
    assert modes == {True, False} or len({reply.ids.index(BEGIN) for reply in alone if BEGIN in reply.ids}) > 1


@pytest.mark.parametrize("settings", [dict(), dict(guidance=2.5), dict(guidance=3.0, image_guidance=1.2)])
def test_the_cache_is_kept_across_switches(model, settings):
    """Every token again, by reading the whole sequence of every stream from the start."""
    messages = TALKS[1]
    reply = model.generate(messages, max_new_tokens=6, image_temperature=0.0, **settings)
    assert reply.images
    prompt = model.processor(messages, reply=True).ids.tolist()
    tokens, codes = model.config.image_tokens, list(model.config.image_tokens.ids)

    def last(ids):
        batch = model.processor(ask("x"), reply=True)
        batch = replace(batch, ids=torch.tensor(ids), positions=torch.arange(len(ids)))
        batch.segments = type(batch.segments)([len(ids)])
        with torch.no_grad():
            return model(batch)[-1]

    begun = None
    for index, token in enumerate(reply.ids):
        said = reply.ids[:index]
        if token == STOP:
            begun = None
            continue
        if begun is None:
            row = last([*prompt, *said])
            row[[*codes, PLACEHOLDER, STOP]] = -torch.inf
            assert int(row.argmax()) == token
            begun = index if token == BEGIN else None
            continue
        drawn = reply.ids[begun + 1 : index]
        seen = pictures_of([*prompt, *reply.ids[:begun]], tokens)
        assert len(seen) >= 18
        guides = [last([BOS, BEGIN, *drawn])] if "guidance" in settings else []
        if "image_guidance" in settings:
            guides.insert(0, last([BOS, *seen, BEGIN, *drawn]))
        row = guided(last([*prompt, *said]), guides, settings.get("guidance", 1.0), settings.get("image_guidance"))
        assert codes[int(row[codes].argmax())] == token


def test_guidance_algebra():
    full, pictures, nothing = torch.randn(3, 7).unbind()
    assert torch.equal(guided(full, [], 3.0, None), full)
    torch.testing.assert_close(guided(full, [nothing], 1.0, None), full)
    torch.testing.assert_close(guided(full, [nothing], 3.0, None), 3 * full - 2 * nothing)
    torch.testing.assert_close(guided(full, [pictures, nothing], 1.0, 1.0), full)
    wanted = nothing + 1.2 * (pictures - nothing) + 3.0 * (full - pictures)  # chameleon.py:333-354
    torch.testing.assert_close(guided(full, [pictures, nothing], 3.0, 1.2), wanted)


def test_no_picture_begins_without_room_or_a_decoder(model):
    prompt = len(model.processor(TALKS[0], reply=True).ids)
    model.model.config = replace(model.model.config, context=prompt + 17)  # a picture is 18 tokens
    assert not model.generate(TALKS[0], max_new_tokens=30).images
    model.model.config = replace(model.model.config, context=prompt + 18)
    reply = model.generate(TALKS[0], max_new_tokens=30)
    assert len(reply.images) == 1
    assert reply.finish == "length"
    model.model.config = replace(model.model.config, context=300)
    assert not model.generate(TALKS[0], max_new_tokens=9, max_images=0).images
    model.vqmodel.decoder = None
    assert BEGIN not in model.generate(TALKS[0], max_new_tokens=9).ids


def test_the_begin_of_a_picture_may_end_a_reply(model):
    """The authors' own default for replies of words: neither words nor codes come after it, whether the model draws or not."""
    free = model.generate(TALKS[0], max_new_tokens=30)
    assert free.images
    for decoder in (model.vqmodel.decoder, None):
        model.vqmodel.decoder = decoder
        for settings in (dict(), dict(guidance=2.0), dict(max_images=0)):
            reply = model.generate(TALKS[0], max_new_tokens=30, stop="<racm3:break>", **settings)
            assert (reply.finish, reply.images) == ("stop", [])
            assert reply.ids == free.ids[: free.ids.index(BEGIN) + 1]


def test_the_end_of_a_picture_may_end_a_reply(model):
    free = model.generate(TALKS[0], max_new_tokens=30)
    reply = model.generate(TALKS[0], max_new_tokens=30, stop=["<eoss>"])
    assert (reply.finish, len(reply.images)) == ("stop", 1)
    assert reply.ids == free.ids[: free.ids.index(STOP) + 1]


def test_a_model_that_would_draw_and_has_no_decoder_says_so(model, folder, tmp_path):
    assert model.generate(TALKS[0], max_new_tokens=9).note == ""
    model.vqmodel.decoder = None
    reply = model.generate(TALKS[0], max_new_tokens=9)
    assert "no decoder for picture codes" in reply.note
    assert "--vq-decoder" in reply.note
    silent = tmp_path / "reads"
    model.config = replace(model.config, vq=replace(model.config.vq, decoder=False))
    intermodal.save(model, silent)
    config = json.loads((silent / "config.json").read_text())
    config["intermodal"]["vq_decoder"] = False
    (silent / "config.json").write_text(json.dumps(config))
    run = CliRunner().invoke
    for source, told in ((silent, True), (folder, False)):
        for arguments, said in ((["generate", str(source), "draw", "--json"], None), (["chat", str(source)], "draw\n\n")):
            done = run(app, [*arguments, "--max-new-tokens", "9"], input=said)
            assert done.exit_code == 0, done.output
            assert ("--vq-decoder" in done.stderr) == told
        row = json.loads(run(app, ["generate", str(source), "draw", "--json", "--max-new-tokens", "9"]).stdout)
        assert ("note" in row) == told
    rows = tmp_path / "in.jsonl"
    rows.write_text(json.dumps({"messages": ask("draw")}) + "\n")
    run(app, ["generate", str(silent), "--jsonl", str(rows), "--out", str(tmp_path / "out.jsonl"), "--max-new-tokens", "9"])
    assert "--vq-decoder" in json.loads((tmp_path / "out.jsonl").read_text())["note"]


@pytest.mark.parametrize("mark", ["<racm3:break>", "<eoss>", "<image>", "</s>", "<s>", TURN])
def test_words_that_spell_a_mark_are_refused(model, mark):
    """As a placeholder of media is in a stitched model: the tokenizer would read the mark, and a picture or a turn would seem to begin."""
    assert mark in SPECIAL
    halves = [{"type": "text", "text": text} for text in ("a " + mark[:2], mark[2:] + " b")]
    for content in (f"say {mark} now", halves):
        with pytest.raises(MediaError):
            model.generate([{"role": "user", "content": content}], max_new_tokens=2)
    with pytest.raises(MediaError):
        model.generate([*ask("a"), {"role": "assistant", "content": mark}, *ask("b")], max_new_tokens=2)
    assert model.generate(ask(f"{mark[:2]} {mark[2:]}"), max_new_tokens=2).ids
    assert model.processor.sayable(f"a{mark[:2]}{mark}{mark[2:]}b") == "ab"
    with pytest.raises(MediaError):  # as a conversation to learn from
        model.processor.conversation([*ask("a"), {"role": "assistant", "content": mark}])


def test_codes_are_marks_whatever_their_tokens_are_called():
    pieces = {"a": 0, "<unk>": 1, "IMGIMGAZ": 2}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>"])
    assert spelled(tokenizer, "a unheard IMGIMGAZ", {1, 2}) == ["IMGIMGAZ"]
    assert spelled(tokenizer, "a <unk>", {1, 2}) == ["<unk>"]


def test_seeds_draw_differently_and_a_stop_text_ends_what_follows_a_picture(model):
    warm = dict(max_new_tokens=40, max_images=1, temperature=1.0)
    one, again, other = (model.generate(TALKS[0], seed=seed, **warm) for seed in (1, 1, 2))
    assert one.images
    assert one.images[0].tobytes() == again.images[0].tobytes()
    assert other.images[0].tobytes() != one.images[0].tobytes()
    (_, after) = next(pair for pair in zip(one.segments, one.segments[1:], strict=False) if pair[0][0] == "image")
    text = after[1]
    assert len(text) > 6
    stopped = model.generate(TALKS[0], seed=1, stop=(text[3:6],), **warm)
    assert stopped.finish == "stop"
    assert [kind for kind, _ in stopped.segments[-2:]] == ["image", "text"]
    assert stopped.segments[-1] == ("text", text[: text.index(text[3:6])])
    pieces = list(model.stream(TALKS[0], seed=1, stop=(text[3:6],), **warm))
    assert "".join(piece for piece in pieces[:-1] if isinstance(piece, str)) == stopped.text


def test_pictures_are_drawn_by_settings_of_their_own(model):
    """Greedy words beside drawn codes and the other way round; what shapes words (penalty, top-k, min-p) leaves the codes alone."""
    settings = dict(max_new_tokens=3, max_images=1)
    pictures = {}
    for name, more in {
        "greedy": {"image_temperature": 0.0},
        "greedy, other words": {"image_temperature": 0.0, "repetition_penalty": 3.0, "temperature": 0.7},
        "one": {"image_temperature": 1.0, "seed": 1},
        "two": {"image_temperature": 1.0, "seed": 2},
        "nearly none": {"image_temperature": 1.0, "image_top_p": 1e-6, "seed": 2},
        "one of a few words": {"image_temperature": 1.0, "seed": 1, "top_k": 1, "min_p": 0.9},
    }.items():
        reply = model.generate(TALKS[0], **settings, **more)
        assert reply.images, name
        pictures[name] = reply.images[0].tobytes()
    assert pictures["greedy"] == pictures["greedy, other words"] == pictures["nearly none"]
    assert len({pictures[name] for name in ("greedy", "one", "two")}) == 3
    assert pictures["one"] == pictures["one of a few words"]


def test_only_words_and_ends_come_in_a_text(folder):
    """PITFALLS 8.8: no begin of sequence, no reserved token; "</" is a word, whatever the reference says."""
    model = intermodal.load(folder)
    ends = model.processor.end_ids
    assert END in ends
    canvas = Canvas.of(model, Sampling(), ends)
    allowed = torch.isfinite(canvas.text_scores(torch.zeros(len(model.head_weight)), True)).nonzero().flatten().tolist()
    assert allowed == [*range(256), *sorted({END, BEGIN, *ends})]
    assert BOS not in allowed
    pieces = {"a": 0, "</": 1, "<=": 2, "<": 3, "<reserved08707>": 4, "<pad>": 5}
    tokenizer = Tokenizer(models.WordLevel(pieces, unk_token="a"))
    tokenizer.add_special_tokens(["<pad>"])
    assert marks_of(tokenizer) == {4, 5}


def test_a_stream_grows_pictures(model):
    events = list(model.stream(TALKS[0], max_new_tokens=8, max_images=1))
    reply = events[-1]
    assert isinstance(reply, Reply)
    partial = [event for event in events if isinstance(event, Partial)]
    assert [event.done for event in partial] == [0.25, 0.5, 0.75, 1.0] * len(reply.images)
    assert partial[0].picture.crop((0, 8, SIDE, SIDE)).getcolors() == [(SIDE * 8, (128, 128, 128))]
    assert partial[3].picture.tobytes() == reply.images[0].tobytes()
    assert "".join(event for event in events if isinstance(event, str)) == reply.text


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (("s", None, "what"), "s\nwhat"),
        ((None, "what"), "what"),
        (("s", None, None, "what"), "s\nwhat"),
        (("s", None, "what", None, "é"), "s\nwhat\né"),
        (("s", None, "<", None, "what"), "s\n<\nwhat"),  # what may become the stop text is held until the picture begins
        (("s", None, "<>"), "s"),
        (("s", None, "\n<>"), "s\n\n"),
    ],
)
def test_texts_are_parted_where_a_picture_stands(model, monkeypatch, said, text):
    words = [[BEGIN] if part is None else model.processor.tokenizer.encode(part, add_special_tokens=False).ids for part in said]
    chosen = [token for part in words for token in part]
    script = iter(chosen)
    monkeypatch.setattr("intermodal.generate.engine.choose", lambda *scores: next(script))
    *pieces, reply = model.stream(TALKS[0], max_new_tokens=len(chosen) - said.count(None), stop="<>")
    assert reply.text == text == "\n".join(value for kind, value in reply.segments if kind == "text")
    assert "" not in pieces
    assert "".join(piece for piece in pieces if isinstance(piece, str)) == text
    assert len(reply.images) == said.count(None)
    assert [token for token in reply.ids if token < FIRST and token != STOP] == chosen


def test_a_reply_can_be_answered(model):
    """What was drawn is read again as the tokens it was drawn by, as near as the encoder says."""
    reply = model.generate(TALKS[0], max_new_tokens=5, max_images=1)
    parts = [{"type": kind, kind: value} for kind, value in reply.segments]
    talk = [*TALKS[0], {"role": "assistant", "content": parts}, *ask("and?")]
    assert model.processor(talk, reply=True).ids.tolist().count(BEGIN) == 1
    model.generate(talk, max_new_tokens=3)


def test_the_verb_writes_a_page(folder, tmp_path):
    arguments = [
        "generate",
        str(folder),
        "draw",
        "--max-new-tokens",
        "6",
        "--max-images",
        "1",
        "--guidance",
        "2",
        "--out",
        str(tmp_path / "o"),
    ]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"][0].endswith("reply.md")
    page = (tmp_path / "o" / "reply.md").read_text()
    assert "![picture 1](image-1.png)" in page
    assert Image.open(tmp_path / "o" / "image-1.png").size == (SIDE, SIDE)
    assert "wrote" in CliRunner().invoke(app, arguments).output


def test_a_chat_draws_by_the_settings_of_generate(folder, monkeypatch):
    given = []
    stream = Chameleon.stream
    monkeypatch.setattr(
        Chameleon, "stream", lambda self, messages, **settings: given.append(settings) or stream(self, messages, **settings)
    )
    settings = {
        "guidance": 2.0, "image_guidance": 1.5, "max_images": 1, "image_temperature": 0.5, "image_top_p": 0.75, "stop": ("<racm3:break>",),
    }  # fmt: skip
    options = [part for name, value in settings.items() if name != "stop" for part in (f"--{name.replace('_', '-')}", str(value))]
    done = CliRunner().invoke(
        app, ["chat", str(folder), *options, "--stop", "<racm3:break>", "--max-new-tokens", "3"], input="draw\n\n"
    )
    assert done.exit_code == 0, done.output
    assert settings.items() <= given[0].items()


def test_a_chat_keeps_what_is_drawn(folder, tmp_path):
    """A model with random weights draws now and then; with some seed it does within a few tokens."""
    for seed in range(6):
        out = tmp_path / str(seed)
        arguments = ["chat", str(folder), "--temperature", "2", "--seed", str(seed), "--max-new-tokens", "60", "--out", str(out)]
        done = CliRunner().invoke(app, arguments, input="draw\n\n")
        assert done.exit_code == 0, done.output
        if out.exists():
            assert "wrote" in done.output
            assert Image.open(out / "reply-1" / "image-1.png").size == (SIDE, SIDE)
            assert "wrote" in CliRunner().invoke(app, arguments, input="draw\n\n").output
            assert (out / "reply-2" / "image-1.png").exists(), "another chat keeps its own"
            return
    pytest.fail("no seed of six drew a picture")


def test_guidance_is_computed_in_float32(model):
    """Differences of near scores: in bf16 these two codes come out equal, and the first of them would be drawn."""
    full, nothing = torch.zeros(2, FIRST + CODES, dtype=torch.bfloat16)
    full[FIRST : FIRST + 2] = 100.5
    nothing[FIRST], nothing[FIRST + 1] = 64.5, 64.0
    sampling = Sampling(guidance=1.1, image_temperature=0.0)
    canvas = Canvas.of(model, sampling, ())
    assert canvas is not None
    assert canvas.choose([full, nothing], torch.Generator()) == FIRST + 1
    half = guided(full, [nothing], 1.1, None)
    assert half[FIRST] == half[FIRST + 1]  # what the test is about


def test_tokens_of_codes_that_are_not_the_codebooks(model):
    tokens = model.config.image_tokens
    assert tokens.tokens(torch.tensor([[0, CODES - 1]])).tolist() == [[FIRST, FIRST + CODES - 1]]
    for wrong in (-1, CODES):
        with pytest.raises(ValueError, match=f"the codebook has 0 to {CODES - 1}"):
            tokens.tokens(torch.tensor([0, wrong]))
