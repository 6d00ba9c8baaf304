"""Where the verbs that talk write what they draw."""

import json
from types import SimpleNamespace
from typing import cast

from PIL import Image
from typer.testing import CliRunner

from intermodal.cli.app import app
from intermodal.cli.chat import _reply_once, _say, _write
from intermodal.generate.draw import Canvas
from intermodal.generate.engine import Partial, Reply


def test_a_page_is_not_mixed_with_an_earlier_one(tmp_path):
    out, picture = tmp_path / "o", Image.new("RGB", (4, 4))
    _write(Reply("", [], "stop", {}, [("image", picture)] * 3), out)
    (out / "image-9.png").write_bytes(b"not ours")
    page, *files = _write(Reply("a", [], "stop", {}, [("image", picture), ("text", "a")]), out)
    assert [file.name for file in files] == ["image-1.png"]
    assert sorted(file.name for file in out.iterdir()) == ["image-1.png", "image-9.png", "reply.md"]
    assert page.read_text() == "![picture 1](image-1.png)\n\na\n"


def test_a_place_that_cannot_be_written_is_told_before_a_model_is_loaded(tmp_path):
    (tmp_path / "file").write_text("mine")
    run, none = CliRunner().invoke, str(tmp_path / "none")
    for out in ("file", "file/inside"):
        for verb in (["generate", none, "draw"], ["chat", none]):
            assert "is a file" in str(run(app, [*verb, "--out", str(tmp_path / out)]).exception)
    jsonl = ["--jsonl", str(tmp_path / "in.jsonl"), "--out", str(tmp_path)]
    assert "it is the file of replies" in str(run(app, ["generate", none, *jsonl]).exception)
    assert (tmp_path / "file").read_text() == "mine"


def test_one_picture_is_one(monkeypatch, capsys):
    for count, said in ((1, "1 picture was drawn"), (2, "2 pictures were drawn")):
        reply = Reply("", [], "stop", {}, [("image", Image.new("RGB", (4, 4)))] * count)
        _reply_once(SimpleNamespace(stream=lambda messages, reply=reply: [reply]), [], None, {}, False)
        told = f"{said}; --out FOLDER keeps what is drawn\n"
        assert told in capsys.readouterr().out
        _reply_once(SimpleNamespace(generate=lambda messages, reply=reply: reply), [], None, {}, True)
        shown = capsys.readouterr()
        assert (json.loads(shown.out)["pictures"], shown.err) == (count, told)


def test_json_counts_pictures_and_tells_only_of_those_that_are_lost(tmp_path, capsys):
    for images, out in (([], None), ([("image", Image.new("RGB", (4, 4)))], tmp_path)):
        reply = Reply("a", [], "stop", {}, [("text", "a"), *images])
        _reply_once(SimpleNamespace(generate=lambda messages, reply=reply: reply), [], out, {}, True)
        shown = capsys.readouterr()
        row = json.loads(shown.out)
        assert (row.get("pictures"), len(row.get("files", [])), shown.err) == ((1, 2, "") if images else (None, 0, ""))


def test_a_text_after_a_picture_begins_on_the_next_line(capsys):
    """The picture has ended its line at the terminal: the newline that parts the texts would be a second one."""
    reply = Reply("s\nwhat", [], "stop", {}, [("text", "s"), ("image", None), ("text", "what")])
    canvas = cast(Canvas, None)  # the terminal shows no pictures
    events = ["s", Partial((), canvas, 0.5), Partial((), canvas, 1), "\nwh", "at", reply]
    assert _say(SimpleNamespace(stream=lambda messages: iter(events)), [], {}) is reply
    assert capsys.readouterr().out == "s.\n[a picture]\nwhat\n"
