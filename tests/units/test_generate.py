"""Generation: batches equal single calls, streams equal replies, files resume; the verbs that talk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_chat import LLAMA3, tokenizer
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.config import SettingError
from intermodal.errors import IntermodalError
from intermodal.generate import engine
from intermodal.generate.batch import reply_to_file
from intermodal.generate.engine import Reply, TooLong
from intermodal.models.clip import CLIP, DualConfig, initialise
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import LanguageModel
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.models.vqvae import VQVAE, VQConfig

CONFIG = DecoderConfig(width=32, depth=2, heads=4, kv_heads=2, head_width=16, mlp_width=48, vocab_size=261, context=200)


def ask(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random decoder with files, as a person would have it."""
    made = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    model = LanguageModel(CONFIG)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3) if parameter.ndim > 1 else parameter.data.fill_(1)
    intermodal.save(model, made)
    tokenizer().save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|end|>", "chat_template": LLAMA3}))
    return made


@pytest.fixture
def model(folder):
    return intermodal.load(folder)


QUESTIONS = [ask("a"), ask("what is it, and why?"), ask("x" * 60), ask("no"), ask("b b b")]


@pytest.mark.parametrize("settings", [{}, dict(temperature=1.0, top_k=20, top_p=0.9, seed=3), dict(repetition_penalty=1.5)])
def test_many_at_once_equal_one_by_one(model, settings):
    alone = [model.generate(question, max_new_tokens=20, **settings) for question in QUESTIONS]
    for slots in (2, 5):
        assert model.generate_batch(QUESTIONS, slots=slots, max_new_tokens=20, **settings) == alone
    assert model.generate_batch([]) == []
    assert len({tuple(reply.ids) for reply in alone}) > 1


def test_a_seed_is_a_reply(model):
    draws = [model.generate(ask("a"), max_new_tokens=8, temperature=2.0, seed=seed).ids for seed in (1, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert draws[2] != draws[0] or draws[3] != draws[0]


def test_a_stream_is_the_reply(model):
    for settings in ({}, dict(temperature=1.5, seed=2), dict(temperature=1.5, seed=5, stop=("e",))):
        *pieces, last = model.stream(ask("tell"), max_new_tokens=40, **settings)
        assert isinstance(last, Reply)
        assert "".join(pieces) == last.text
        assert last == model.generate(ask("tell"), max_new_tokens=40, **settings)


def bytes_with_fallback():
    """A tokenizer as Llama 2 has it: bytes as tokens, a run of which is decoded whole or not at all."""
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {"<unk>": 0, "▁a": 1, "b": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    made = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("said", ["日".encode() + "本".encode()[:1], "a日".encode(), b"\xff", "日本".encode(), b"\xe6ab"], ids=repr)
def test_what_was_streamed_stays_said(model, said, monkeypatch):
    ids = [1, *(3 + byte for byte in said), 2]
    answers = iter(ids)
    tokens = bytes_with_fallback()
    monkeypatch.setattr(engine, "choose", lambda *arguments: next(answers))
    monkeypatch.setattr(model.processor, "decode", lambda ids, special=False: tokens.decode(list(ids)))
    model.processor.end_ids = ()
    *pieces, last = model.stream(ask("tell"), max_new_tokens=len(ids))
    assert "".join(pieces) == last.text
    if said.decode(errors="ignore").encode() == said:
        assert last.text == tokens.decode(ids) == "a" + said.decode() + "b"
    assert last.text.startswith("a")
    assert last.text.endswith("b")


def test_stop_texts_and_ends(model):
    free = model.generate(ask("tell"), max_new_tokens=40)
    assert (free.finish, free.usage["completion_tokens"]) == ("length", 40) or free.finish == "stop"
    word = free.text[3:5]
    stopped = model.generate(ask("tell"), max_new_tokens=40, stop=word)
    assert stopped.text == free.text[: free.text.index(word)]
    assert stopped.finish == "stop"
    end = next(token for token in free.ids if model.processor.decode(free.ids[: free.ids.index(token)]))  # some words before it
    model.processor.end_ids = (end,)
    ended = model.generate(ask("tell"), max_new_tokens=40)
    assert ended.finish == "stop"
    assert ended.ids == free.ids[: free.ids.index(end) + 1]
    assert ended.segments == [("text", ended.text)]


def test_too_long_says_what_is_long(model):
    with pytest.raises(TooLong, match=r"text: \d+.*context 200"):
        model.generate(ask("x" * 300))
    with pytest.raises(IntermodalError, match="did you mean 'temperature'"):
        model.generate(ask("x"), temprature=1)


def test_dropping_the_oldest_turns(model):
    talk = [{"role": "system", "content": "be brief"}, *ask("x" * 90), {"role": "assistant", "content": "y" * 60}, *ask("and now?")]
    with pytest.raises(TooLong):
        model.generate(talk, max_new_tokens=4)
    reply = model.generate(talk, max_new_tokens=4, too_long="drop_oldest")
    alone = model.generate([talk[0], talk[-1]], max_new_tokens=4)
    assert (reply.ids, reply.usage["dropped_messages"]) == (alone.ids, 2)
    assert "dropped_messages" not in alone.usage
    with pytest.raises(TooLong, match=r"pictures smaller$"):  # the last question alone is too long: it is never dropped
        model.generate(ask("x" * 300), too_long="drop_oldest")
    with pytest.raises(IntermodalError, match="too_long"):
        model.generate(ask("x"), too_long="cut")


def test_a_reply_ends_where_the_context_does(model):
    model.processor.end_ids = ()
    reply = model.generate(ask("x" * 150), max_new_tokens=500)
    assert reply.finish == "length"
    assert reply.usage["prompt_tokens"] + len(reply.ids) == CONFIG.context


def test_a_file_of_conversations_resumes(model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"id": f"q{i}", "messages": question}) for i, question in enumerate(QUESTIONS)]
    bad = [
        "not json",
        json.dumps({"messages": []}),
        json.dumps({"messages": [{"role": "user"}]}),
        json.dumps({"messages": ask("x" * 300)}),
    ]
    source.write_text("\n".join([*rows[:2], "", *bad, *rows[2:]]) + "\n")
    counts = reply_to_file(model, source, out, max_new_tokens=6, progress=False)
    assert (counts.written, counts.reused, counts.rejected) == (5, 0, 4)
    whole = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["line"] for row in whole} == {1, 2, 4, 5, 6, 7, 8, 9, 10}
    replies = {row["id"]: row["reply"] for row in whole if "id" in row}
    assert replies["q2"] == model.generate(QUESTIONS[2], max_new_tokens=6).text
    replied, failed = ([row for row in whole if key in row] for key in ("reply", "error"))
    first = [failed[0], *replied[:3]]
    out.write_text("\n".join(json.dumps(row) for row in first) + "\n" + json.dumps(replied[3])[:9])  # killed while writing
    counts = reply_to_file(model, source, out, max_new_tokens=6, progress=False)
    assert (counts.written, counts.rejected, counts.reused) == (2, 4, 3)  # errors are tried again
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted(again, key=lambda row: row["line"]) == sorted(whole, key=lambda row: row["line"])
    (tmp_path / "notes.txt").write_text("shopping\n")
    with pytest.raises(IntermodalError, match="not a file of replies"):
        reply_to_file(model, source, tmp_path / "notes.txt", progress=False)
    with pytest.raises(IntermodalError, match="does not exist"):
        reply_to_file(model, tmp_path / "none.jsonl", out, progress=False)


def test_a_file_of_replies_survives_a_kill_at_every_byte(model, tmp_path):
    """Whatever was written last, also in the first row or within a character; other line ends of Unicode are no line ends."""
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [json.dumps({"id": "日本\u2028\x85 x", "messages": ask(text)}, ensure_ascii=False) for text in ("a\u2028b", "c")]
    source.write_text("\n".join(rows) + "\n", encoding="utf-8")
    settings = dict(max_new_tokens=3, progress=False)
    assert reply_to_file(model, source, out, **settings).written == 2
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(0, len(whole), 3):
        out.write_bytes(whole[:cut])
        counts = reply_to_file(model, source, out, **settings)
        assert (counts.written, counts.reused) == ((2, 0) if cut < first else (1, 1)), cut
        assert out.read_bytes() == whole, cut


def test_replies_are_never_taken_for_those_of_another_question_or_setting(model, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"messages": ask("a")}) + "\n")
    with pytest.raises(IntermodalError, match="did you mean 'temperature'"):
        reply_to_file(model, source, out, temprature=1, progress=False)
    assert not out.exists()
    reply_to_file(model, source, out, max_new_tokens=3, progress=False)
    with pytest.raises(IntermodalError, match=r"line 1: made from another"):
        reply_to_file(model, source, out, max_new_tokens=4, progress=False)
    source.write_text(json.dumps({"messages": ask("b")}) + "\n")
    with pytest.raises(IntermodalError, match=r"line 1: made from another"):
        reply_to_file(model, source, out, max_new_tokens=3, progress=False)
    other = tmp_path / "list.jsonl"
    other.write_text('{"line": 1}\nmilk\n')
    with pytest.raises(IntermodalError, match="not a file of replies"):
        reply_to_file(model, source, other, progress=False)
    assert other.read_text() == '{"line": 1}\nmilk\n'


MISSHAPEN = [
    "hello",
    [],
    [{"content": "no role"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": ["hi"]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": [{"type": "sound", "sound": "a.wav"}]}],
]


@pytest.mark.parametrize("messages", MISSHAPEN, ids=lambda messages: json.dumps(messages)[:50])
def test_misshapen_messages_are_refused_and_do_not_stop_a_file(model, messages, tmp_path):
    with pytest.raises(IntermodalError, match=r"messages must be|a message|a part|text part"):
        model.generate(messages)
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps({"messages": ask("a")}) + "\n")
    counts = reply_to_file(model, source, tmp_path / "out.jsonl", max_new_tokens=3, progress=False)
    assert (counts.written, counts.rejected) == (1, 1)


def test_paths_are_from_the_files_folder_in_every_form(tmp_path):
    from intermodal.inputs.messages import placed

    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "video", "video": ["a.png", "/b.png"]},
        {"image": "~/a.png"},
        {"type": "text", "text": "a.png"},
    ]
    found = placed([{"role": "user", "content": parts}], tmp_path)[0]["content"]
    here = str(tmp_path / "a.png")
    assert found[0]["image"] == found[1]["image_url"]["url"] == here
    assert found[2] == parts[2]
    assert found[3]["video"] == [here, "/b.png"]
    assert found[4]["image"] == str(Path.home() / "a.png")
    assert found[5] == parts[5]


def test_a_stop_text_may_be_a_special_token(model):
    """Special tokens are left out of texts, so they are compared as tokens."""
    free = model.generate(ask("tell"), max_new_tokens=20)
    token = model.processor.tokenizer.id_to_token(free.ids[5])
    model.processor.tokenizer.add_special_tokens([token])
    stopped = model.generate(ask("tell"), max_new_tokens=20, stop=token)
    assert (stopped.finish, stopped.ids[-1]) == ("stop", free.ids[5])
    assert len(stopped.ids) == free.ids.index(free.ids[5]) + 1


def test_a_stop_text_is_not_a_byte_that_is_written_like_it(model, monkeypatch):
    """In a byte-level vocabulary the token "é" is the byte 0xE9, which begins 龍."""
    tokens = model.processor.tokenizer
    said = tokens.encode("a龍é!", add_special_tokens=False).ids
    assert tokens.token_to_id("é") in said[:3]
    monkeypatch.setattr(engine, "choose", lambda *_, given=iter(said): next(given))
    stopped = model.generate(ask("tell"), max_new_tokens=20, stop="é")
    assert (stopped.text, stopped.finish) == ("a龍", "stop")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (dict(slots=0), "slots"),
        (dict(temperature=float("nan")), "temperature"),
        (dict(temperature=1e-40), "temperature"),
        (dict(image_guidance=-1.0), "image_guidance"),
        (dict(slots="4"), "slots"),
        (dict(guidance="3"), "guidance='3' is out of range: a number from 0 up"),
        (dict(max_images=None), "max_images=None is out of range: a whole number"),
        (dict(max_new_tokens=2.5), "max_new_tokens=2.5 is out of range: a whole number"),
        (dict(top_k=True), "top_k"),
        (dict(stop=5), "stop=5"),
        (dict(stop=[5]), "stop"),
        (dict(seed=2**70), r"seed=\d+ is out of range: a whole number from -2\^63"),
        (dict(temperature=10**400), "temperature"),
    ],
)
def test_settings_out_of_range(model, settings, name):
    with pytest.raises(IntermodalError, match=name):
        model.generate_batch([ask("a")], **settings)


def test_a_seed_that_no_generator_takes_is_told_before_anything_is_loaded(tmp_path):
    for verb in (["generate", str(tmp_path / "none"), "hi"], ["chat", str(tmp_path / "none")]):
        told = CliRunner().invoke(app, [*verb, "--seed", str(2**70)]).exception
        assert isinstance(told, SettingError)
        assert "seed=" in str(told)


def test_numbers_of_numpy_are_numbers(model):
    plain = model.generate(ask("a"), max_new_tokens=3, temperature=0.5, seed=3)
    assert model.generate(ask("a"), max_new_tokens=np.int64(3), temperature=np.float32(0.5), seed=np.int64(3)) == plain


def test_one_conversation_that_is_too_long_is_named(model):
    with pytest.raises(TooLong, match="conversation 1: "):
        model.generate_batch([ask("a"), ask("x" * 300)], max_new_tokens=3)


def test_generation_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(ask("tell"), max_new_tokens=4).usage["completion_tokens"] >= 1


def test_the_verbs(folder, tmp_path):
    run = CliRunner().invoke
    said = run(app, ["generate", str(folder), "hi", "--max-new-tokens", "5", "--json"])
    assert json.loads(said.stdout)["usage"]["completion_tokens"] <= 5
    source = tmp_path / "in.jsonl"
    source.write_text(
        json.dumps({"messages": [*ask("hi"), {"role": "assistant", "content": "yes"}]}) + "\n" + json.dumps({"messages": ask("hi")})
    )
    done = run(
        app,
        ["generate", str(folder), "--jsonl", str(source), "--out", str(tmp_path / "o.jsonl"), "--max-new-tokens", "3", "--json"],
    )
    assert json.loads(done.stdout)["written"] == 2
    shown = run(app, ["inspect", str(folder), str(source), "--html", str(tmp_path / "look.html")]).stdout
    assert (tmp_path / "look.html").read_text().count("<span") > 10
    assert "exactly the assistant's words" in " ".join(shown.split())
    assert "no token is supervised" in " ".join(shown.split())
    page = (tmp_path / "look.html").read_text()
    assert [page.count(f"<p class={kind}>") for kind in ("good", "bad")] == [1, 1]
    assert page.count("tokens: ") == 2, "what fails is drawn too: that is what one looks for"
    (tmp_path / "llava.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    )
    for sample, shares in ((str(tmp_path / "llava.json"), 1), ("blind:scenes:core", 2)):  # whatever a stage trains on
        shown = run(app, ["inspect", str(folder), sample, "--count", "2"]).stdout
        assert " ".join(shown.split()).count("exactly the assistant's words") == shares
    talk = run(app, ["chat", str(folder), "--max-new-tokens", "4"], input="hi\nand?\n/new\n\n")
    assert talk.exit_code == 0
    for arguments, message in (
        (["generate", str(folder)], "either a prompt or"),
        (["generate", str(folder), "--jsonl", str(source)], "needs --out"),
    ):
        assert message in str(run(app, arguments).exception)


def test_a_model_of_the_other_kind_is_told_apart(folder, tmp_path):
    vision = VisionConfig(width=16, depth=1, heads=2, mlp_width=16, image_size=16, patch_size=8)
    text = TextConfig(width=16, depth=1, heads=2, mlp_width=16, vocab_size=20, context=6, eos_id=19)
    intermodal.save(initialise(CLIP(DualConfig(vision, text, 8))), tmp_path)
    run = CliRunner().invoke
    assert "has no decoder" in str(run(app, ["generate", str(tmp_path), "hi"]).exception)
    assert "no embeddings" in str(run(app, ["eval", str(folder), "sprites:core"]).exception)
    intermodal.save(
        VQVAE(VQConfig(resolution=8, width=8, groups=4, multipliers=(1,), res_blocks=1, stem=1)), eyes := tmp_path / "vq"
    )
    for verb in (["generate", str(eyes), "hi"], ["chat", str(eyes)], ["inspect", str(eyes), "captions:scenes:core"]):
        told = str(run(app, verb).exception)
        assert f"`intermodal train recipes/native.py model.vq={eyes}`" in told
        assert "has no decoder" not in told
        assert "intermodal embed" not in told
