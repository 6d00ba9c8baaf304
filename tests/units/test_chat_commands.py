"""What is typed in `intermodal chat`, and what its user is told: commands, paths, turns left out, connectors that fit."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from intermodal.cli import chat
from intermodal.cli.app import app
from intermodal.cli.typed import by_kind, with_option
from intermodal.errors import IntermodalError
from intermodal.generate.engine import Reply, TooLong, fitting
from intermodal.generate.sample import Sampling
from intermodal.inputs.image import ImageProcessor
from intermodal.inputs.processor import PairProcessor
from intermodal.models.clip import CLIP, DualConfig, SigLIP, initialise
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import LanguageModel
from intermodal.models.qwen2_vl import QwenVL, QwenVLConfig
from intermodal.models.text import TextConfig
from intermodal.models.vit import VisionConfig
from intermodal.models.vit_native import NativeVisionConfig
from intermodal.weights.load import load_encoder
from intermodal.weights.stitch import fresh_decoder, stitch
from intermodal.weights.stitch_native import _decoder, stitch_native
from intermodal.weights.stitch_resampler import stitch_resampler

SHAPE = DecoderConfig(48, 2, 3, 3, 16, 64, 0, context=512)


class Model:
    """Answers "yes", and keeps what it was asked; `dropped` are the messages left out of each question in turn."""

    def __init__(self, *dropped):
        self.dropped, self.asked = list(dropped), []
        self.processor = SimpleNamespace(sayable=lambda text: text)

    def stream(self, messages, **settings):
        self.asked.append(messages[-1]["content"])
        dropped = self.dropped.pop(0) if self.dropped else 0
        usage = {"dropped_messages": dropped} if dropped else {}
        return iter([Reply("yes", [], "stop", usage, [("text", "yes")])])


def talk(model, *lines):
    """What a terminal shows of a conversation in which `lines` are typed."""
    talking = chat._Talk(model, Console(width=300, force_terminal=False), None, [], [])
    for line in lines:
        talking.hear(line, {})
    return talking


def test_turns_that_are_left_out_are_told_once_more_are(capsys):
    model = Model(0, 2, 2, 4)
    talk(model, "a")
    assert "left out" not in capsys.readouterr().out
    talking = talk(model, "b")
    said = capsys.readouterr().out
    assert (
        "(the 2 oldest messages were left out of this question: the model's context has no room for the whole conversation and a reply)"
        in said
    )
    talking.hear("c", {})
    assert "left out" not in capsys.readouterr().out
    talking.hear("d", {})
    assert "the 4 oldest messages were left out" in capsys.readouterr().out
    talking.hear("/new", {})
    model.dropped = [1]
    talking.hear("e", {})
    assert "the 1 oldest" not in (said := capsys.readouterr().out)
    assert "the oldest message was left out" in said


@pytest.mark.parametrize(
    "typed", ["   {}", '"{}"', "'{}'", "{}", "escaped", "\t{}"], ids=["spaces", "double", "single", "plain", "escaped", "tab"]
)
def test_a_path_is_found_however_a_terminal_pastes_it(tmp_path, typed):
    Image.new("RGB", (4, 4)).save(path := tmp_path / "my photo.png")
    text = str(path).replace(" ", "\\ ") if typed == "escaped" else typed.format(path)
    assert talk(Model(), f"/image {text}" if "\t" not in typed else f"/image{text}").images == [str(path)]


def test_a_name_with_quotes_or_an_apostrophe_is_itself(tmp_path, capsys):
    for name in ("it's.png", '"a".png', "a\\b.png"):
        (tmp_path / name).write_bytes(b"")
        assert talk(Model(), f"/video {tmp_path / name}").videos == [str(tmp_path / name)]
    assert not talk(Model(), "/image it's gone.png", "/image   ", '/image ""', "/video ~nobody-here/a.mp4").images
    said = capsys.readouterr().out
    assert "it's gone.png: no such file" in said
    assert said.count("/image needs a path") == 2
    assert "~nobody-here/a.mp4: no such file" in said


def test_a_command_that_does_not_exist_is_no_question(capsys):
    model = Model()
    talk(model, "/bogus")
    assert model.asked == []
    assert "/bogus is no command: there are /image PATH, /video PATH, /new, and an empty line ends" in capsys.readouterr().out
    for question in ("/bogus is what?", "/etc/passwd", "/2", "what is /new?"):
        talk(model, question)
        assert model.asked.pop() == question


def test_videos_are_known_by_their_suffix():
    suffixes = ["mp4", "m4v", "mpg", "mpeg", "ts", "wmv", "3gp", "ogv", "webm", "mkv", "avi", "mov", "flv", "gif", "MOV"]
    media = [f"a.{suffix}" for suffix in suffixes]
    assert by_kind([*media, "a.png"]) == (["a.png"], media)


def test_a_conversation_that_is_too_long_names_the_option(monkeypatch, capsys):
    processor: Any = SimpleNamespace(conversation=lambda messages, reply: SimpleNamespace(ids=[0] * 9, plans=[]))

    def stream(messages, **settings):
        return fitting(processor, messages, 4, Sampling())

    model = Model()
    asked = talk(model, "a", "b")
    asked.model = SimpleNamespace(stream=stream)
    capsys.readouterr()
    asked.hear("c", {})
    said = capsys.readouterr().out
    assert "--too-long drop_oldest to leave out the oldest turns" in said
    assert "too_long=" not in said
    monkeypatch.setattr(chat, "load_talker", lambda *_: SimpleNamespace(stream=stream, generate=stream))
    monkeypatch.setattr(chat, "_tell_of_drawing", lambda _: None)
    for more in ([], ["--json"]):
        error = CliRunner().invoke(app, ["generate", "a-model", "hi", *more]).exception
        assert isinstance(error, TooLong)
        assert "9 tokens" in str(error)
        assert "drop" not in str(error), "one question has no oldest turn"
    assert with_option(IntermodalError("other"), []) == "other"


def qwen():
    tower = NativeVisionConfig(32, 2, 2, 64, 48, patch_size=8, merge=2, patch_bias=True, table_side=4)
    return QwenVL(QwenVLConfig("qwen3_vl", tower, replace(SHAPE, vocab_size=40)))


def dual(kind, naflex=False):
    vision = VisionConfig(48, 2, 4, 80, image_size=40, patch_size=8, norm_eps=1e-6)
    text = TextConfig(16, 1, 2, 32, vocab_size=40, context=8, eos_id=1)
    return initialise(kind(DualConfig(vision, text, 48, naflex=naflex)))


def test_a_directory_without_embeddings_names_the_connector_that_takes_it(monkeypatch):
    clip = dual(CLIP)
    clip.processor = PairProcessor(ImageProcessor((40, 40)), None, "clip")
    llava = stitch(clip, fresh_decoder(SHAPE, ["what is it ?"], 300))
    models = {"llava": llava, "qwen": qwen(), "words": LanguageModel(replace(SHAPE, vocab_size=40))}
    monkeypatch.setattr("intermodal.weights.load.load", lambda source, **_: models[source])
    with pytest.raises(
        IntermodalError, match=r"is a Llava: .* CLIP or SigLIP directory .no connector of .* takes the tower of this one"
    ):
        load_encoder("llava")
    with pytest.raises(IntermodalError, match=r"a QwenVL: .* \(the tower of this one is taken only by .*--connector=merger"):
        load_encoder("qwen")
    with pytest.raises(IntermodalError, match=r"give a CLIP or SigLIP directory$"):
        load_encoder("words")


def test_a_decoder_that_a_merger_does_not_take_is_told_what_would_fit():
    plain = DecoderConfig(48, 2, 3, 3, 16, 64, 40)
    with pytest.raises(
        IntermodalError, match=r"take the tower of a Qwen2-VL or Qwen2.5-VL model, or give a fixed-size CLIP or SigLIP"
    ):
        _decoder(plain, "qwen3_vl")
    with pytest.raises(IntermodalError, match=r"model as --vision with --connector=mlp, which takes every decoder"):
        _decoder(plain, "qwen3_vl")
    with pytest.raises(IntermodalError, match="no bias") as caught:  # which no Qwen-VL has
        _decoder(DecoderConfig(48, 2, 3, 3, 16, 64, 40, out_bias=True), "qwen2_vl")
    assert "take the tower" not in str(caught.value)


def test_a_tower_that_a_connector_does_not_take_is_told_which_does():
    language = fresh_decoder(SHAPE, ["what is it ?"], 300)
    naflex, clip = dual(SigLIP, naflex=True), dual(CLIP)
    for join in (stitch, stitch_resampler):
        with pytest.raises(IntermodalError, match=r"--connector=merger (takes )?those of SigLIP without a fixed size"):
            join(naflex, language)
    with pytest.raises(IntermodalError, match=r"Qwen2-VL, Qwen2.5-VL and Qwen3-VL models; --connector=mlp takes CLIP's"):
        stitch_native(clip, language)
