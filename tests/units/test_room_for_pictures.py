"""Pictures that a reply has no room for are told of, old turns make room for them, and files of replies keep theirs apart."""

import json
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_draw import CODES, TALKS, ask, folder, model  # noqa: F401
from typer.testing import CliRunner

from intermodal.cli.app import app
from intermodal.cli.chat import _write
from intermodal.generate.batch import reply_to_file
from intermodal.generate.draw import Canvas
from intermodal.generate.engine import Reply
from intermodal.generate.sample import Sampling

assert CODES  # the fixtures' model draws


def resized(made, context):
    made.model.config = replace(made.model.config, context=context)


@pytest.fixture
def drawing(model):  # noqa: F811
    before = model.model.config
    yield model
    model.model.config = before


def length(made):
    return made.processor.planner.grid**2 + 2


def test_a_picture_without_room_is_told_of(drawing):
    asked = TALKS[0]
    prompt = len(drawing.processor(asked, reply=True).ids)
    resized(drawing, prompt + length(drawing))
    whole = drawing.generate(asked, max_new_tokens=4)
    assert (len(whole.images), whole.note) == (1, "")
    resized(drawing, prompt + length(drawing) - 1)
    short = drawing.generate(asked, max_new_tokens=4)
    assert short.images == []
    assert re.search(rf"left out: it takes {length(drawing)} tokens, and the context had {length(drawing) - 1} left", short.note)
    assert drawing.generate(asked, max_new_tokens=4, max_images=0).note == "", "who wants none misses none"
    canvas = Canvas.of(drawing, Sampling(max_images=1), ())
    begins = torch.zeros(len(drawing.head_weight)).index_fill(0, torch.tensor([canvas.tokens.begin]), 1.0)
    assert "left out" in canvas.missed(begins, room=3, pictures=0)
    assert canvas.missed(begins, room=3, pictures=1) == "", "nor who has all that were wanted"


def test_old_turns_make_room_for_a_picture(drawing):
    talk = [*TALKS[0], {"role": "assistant", "content": "x" * 30}, *TALKS[0]]
    prompt = len(drawing.processor(talk, reply=True).ids)
    resized(drawing, prompt + length(drawing) - 1)
    settings = {"max_new_tokens": 4, "too_long": "drop_oldest"}
    reply = drawing.generate(talk, **settings)
    assert reply.usage["dropped_messages"] == 2
    assert len(reply.images) == 1
    assert "dropped_messages" not in drawing.generate(talk, max_images=0, **settings).usage
    assert "dropped_messages" not in drawing.generate(talk, stop="<racm3:break>", **settings).usage, "none will come"
    resized(drawing, prompt + length(drawing) + 4)
    assert "dropped_messages" not in drawing.generate(talk, **settings).usage


def test_files_of_replies_have_their_own_pictures_and_draw_those_that_are_gone_again(drawing, tmp_path):
    source, settings = tmp_path / "in.jsonl", {"max_new_tokens": 9, "progress": False}
    source.write_text(json.dumps({"messages": TALKS[0]}) + "\n")
    named = {}
    for name in ("r.jsonl", "r.txt", "r"):
        reply_to_file(drawing, source, tmp_path / name, **settings)
        segments = json.loads((tmp_path / name).read_text())["segments"]
        named[name] = [value for kind, value in segments if kind == "image"]
        assert named[name]
    assert len({one for names in named.values() for one in names}) == sum(map(len, named.values()))
    lost = tmp_path / named["r.jsonl"][0]
    before, row = lost.read_bytes(), (tmp_path / "r.jsonl").read_text()
    lost.unlink()
    counts = reply_to_file(drawing, source, tmp_path / "r.jsonl", **settings)
    assert (counts.written, counts.reused) == (1, 0)
    assert (lost.read_bytes(), (tmp_path / "r.jsonl").read_text()) == (before, row)
    assert reply_to_file(drawing, source, tmp_path / "r.jsonl", **settings).reused == 1


def test_only_its_own_pictures_are_replaced(tmp_path):
    kept = tmp_path / "image-7.png"
    kept.write_bytes(b"a person's own")
    picture = Image.new("RGB", (4, 4))
    words = "see ![picture 1](image-7.png)\n\n![picture 7](image-7.png)"
    segments = [("text", words), ("image", picture), ("image", picture)]
    _write(Reply("", [], "stop", {}, segments), tmp_path)
    _write(Reply("", [], "stop", {}, segments[:2]), tmp_path)
    assert kept.read_bytes() == b"a person's own"
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["image-1.png", "image-7.png"]


@pytest.mark.parametrize("option", ["--image", "--video", "--system"])
def test_what_belongs_to_one_prompt_is_refused_beside_a_file_of_them(tmp_path, option):
    (tmp_path / "in.jsonl").write_text("{}\n")
    arguments = ["generate", "no-model", "--jsonl", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), option, "x"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert f"{option} cannot be given with --jsonl" in str(done.exception or done.output)


def test_a_note_is_printed(drawing, monkeypatch):
    import intermodal.cli.chat as cli

    resized(drawing, len(drawing.processor(ask("draw"), reply=True).ids) + length(drawing) - 1)
    monkeypatch.setattr(cli, "load_talker", lambda *_: drawing)
    done = CliRunner().invoke(app, ["generate", "a-model", "draw", "--max-new-tokens", "4"])
    assert "note: a picture was left out" in done.stderr
