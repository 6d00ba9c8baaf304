"""`generate --jsonl`: odd lines are rows of errors, and replies are kept for what they were made from."""

import json

import pytest
from PIL import Image
from test_generate import ask, folder, model  # noqa: F401
from test_talk_records import ODD

from intermodal.errors import IntermodalError
from intermodal.generate.batch import read_sample, reply_to_file
from intermodal.inputs.video import sampling_of


def test_a_line_that_cannot_be_read_is_a_row_of_its_own(model, tmp_path):  # noqa: F811
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(b"\n".join([b"\xef\xbb\xbf" + json.dumps({"messages": ask("a")}).encode(), *ODD.values()]))
    counts = reply_to_file(model, source, out, max_new_tokens=3, progress=False)
    assert (counts.written, counts.rejected) == (1, 3)
    rows = {row["line"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert "reply" in rows[1]
    for number, why in enumerate(ODD, 2):
        assert why in rows[number]["error"]


def test_pictures_beside_the_messages_of_a_line_are_shown(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    line = {"messages": ask("<image>what"), "images": ["a.png"], "system": "Be brief."}
    system, asked = read_sample(json.dumps(line).encode(), tmp_path)["messages"]
    assert system["content"] == "Be brief."
    assert asked["content"][0] == {"type": "image", "image": str(tmp_path / "a.png")}
    with pytest.raises(IntermodalError, match="pictures more"):
        read_sample(json.dumps({**line, "messages": ask("what")}).encode(), tmp_path)


def test_replies_are_not_taken_for_those_with_other_frames_or_template_variables(model, tmp_path):  # noqa: F811
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"messages": ask("a")}) + "\n")
    settings = {"max_new_tokens": 3, "progress": False}
    reply_to_file(model, source, out, **settings)
    model.processor.video = sampling_of(None, None, None)  # what the command line sets where it is told nothing
    assert reply_to_file(model, source, out, **settings).reused == 1
    model.processor.video = sampling_of(None, 1.0, None)
    with pytest.raises(IntermodalError, match="line 1: made from another"):
        reply_to_file(model, source, out, **settings)
    model.processor.video, model.processor.variables = None, {"enable_thinking": False}
    with pytest.raises(IntermodalError, match="line 1: made from another"):
        reply_to_file(model, source, out, **settings)
