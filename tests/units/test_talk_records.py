"""Records of conversations: nothing that a data set has beside its messages is lost, and a bad line is one reject."""

import json

import numpy as np
import pytest

from intermodal.data.loader import DataError
from intermodal.data.packing import TalkFetcher
from intermodal.data.source import SourceError
from intermodal.data.talk_records import messages_of
from intermodal.data.talks import FileTalks, open_talks, record_talk
from intermodal.errors import SampleError
from intermodal.inputs.messages import tools_of

ANSWER = {"role": "assistant", "content": "cat"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
SPOKEN = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "arr"}]


def part(kind, value):
    return {"type": kind, kind: value}


def text(words):
    return {"type": "text", "text": words}


def asked(content, **beside):
    return {"messages": [{"role": "user", "content": content}, ANSWER], **beside}


SHOWN = {
    "ms-swift": (asked("<image>what", images=["/a.png"]), [part("image", "/a.png"), text("what")]),
    "one": (asked("what\n<image>", image="/a.png"), [text("what"), part("image", "/a.png")]),
    "clip": (asked("<video><image>", videos=["/v.mp4"], images=["/a.png"]), [part("video", "/v.mp4"), part("image", "/a.png")]),
    "trl": (
        asked([{"type": "image"}, text("and"), {"type": "image"}], images=["/a.png", "/b.png"]),
        [part("image", "/a.png"), text("and"), part("image", "/b.png")],
    ),
    "nulls": (
        asked(
            [{"type": "image", "text": None, "image": None}, {**text("q"), "image": None}],
            images=[{"bytes": None, "path": "/a.png"}],
        ),
        [part("image", "/a.png"), text("q")],
    ),
    "own": (asked([part("image", "/a.png"), text("q")], images=None), [part("image", "/a.png"), text("q")]),
    "words": (asked("write <image> in html"), "write <image> in html"),
    "words beside no pictures": (asked("an <image> tag", images=[], video=None), "an <image> tag"),
    "words beside others": (asked("<image>a <video> tag", image="/a.png"), [part("image", "/a.png"), text("a <video> tag")]),
    "told twice": (asked([part("image", "/a.png"), text("q")], image="/a.png"), [part("image", "/a.png"), text("q")]),
    "clip told twice": (asked([part("video", "/v.mp4")], videos=["/v.mp4"]), [part("video", "/v.mp4")]),
    "url told twice": (
        asked([{"type": "image_url", "image_url": {"url": "https://a/b.png"}}], images=["/b.png"]),
        [{"type": "image_url", "image_url": {"url": "https://a/b.png"}}],
    ),
    "a clip's own picture": (asked([part("video", "/v.mp4"), text("q")], image="/a.png"), [part("video", "/v.mp4"), text("q")]),
    "two names": (asked("<image>q", image="/a.png", images=["/a.png"]), [part("image", "/a.png"), text("q")]),
    "empty payload": (asked([{"type": "image", "image": ""}], images=["/a.png"]), [part("image", "/a.png")]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_pictures_beside_messages_are_shown_where_the_messages_say_from_files_and_streams(name, tmp_path):
    record, content = SHOWN[name]
    (tmp_path / "t.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "t.json").write_text(json.dumps([record]))
    wanted = [{"role": "user", "content": content}, ANSWER]
    assert FileTalks(tmp_path / "t.jsonl")[0].messages == wanted
    assert FileTalks(tmp_path / "t.json")[0].messages == wanted
    assert record_talk("k", record).messages == wanted


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (asked("what", images=["a.png"]), "1 pictures more than its messages show: show each by a part of type image"),
        (asked([text("what")], image="a.png"), "1 pictures more than its messages show"),
        (asked("<image>what", images=["a.png", "b.png"]), "1 pictures more than its messages show"),
        (asked([part("image", "a.png"), {"type": "image"}], images=["a.png", "b.png"]), "1 pictures more than its messages show"),
        (
            asked([part("image", "a.png"), {"type": "image"}], images=["b.png"], video="a.mp4"),
            "1 videos more than its messages show",
        ),
        (asked([{"type": ["image"]}], images=["a.png"]), r"a part's type is a text, such as 'image', got \['image'\]"),
        (asked("What?\n<image>", image=""), "more <image> than the record names"),
        ({"conversations": [{"from": ["human"], "value": "a"}]}, r"turn 1 is from \['human'\]; known are human"),
        ({"conversations": [{"from": "human", "value": "<image>\nWhat?"}], "image": None}, "more <image> than the record names"),
        ({"conversations": SPOKEN, "image": "a.png"}, "names more images than its text has <image>"),
        (asked("what", videos=["a.mp4"]), "1 videos more than its messages show"),
        (asked("<image><image>", images=["a.png"]), "more <image> than the record names"),
        (asked("<image>", images=[]), "more <image> than the record names"),
        (asked([{"type": "image"}], images=None), "show more images than the record names"),
        (asked("<image>", images=["a.png"], image="b.png"), "both 'image' and 'images'"),
        (asked("<audio>what", audios=["a.wav"]), "sounds"),
        (asked("what", system=3), "`system` is a text"),
        ({"messages": [{"role": "system", "content": "a"}, ANSWER], "system": "b"}, "two system prompts"),
        ({"conversations": SPOKEN, "tools": "[{"}, "no JSON"),
        ({"conversations": [{"from": "human", "value": None}, SPOKEN[1]]}, "turn 1, from human, needs a text in `value`, got None"),
        ({"conversations": [SPOKEN[0], {"from": "gpt"}]}, "turn 2, from gpt, needs a text"),
        ({"conversations": [SPOKEN[0], {"from": "gpt", "value": True}]}, "turn 2, from gpt, needs a text in `value`, got True"),
        (
            {"conversations": [SPOKEN[0], {"from": "gpt", "value": float("nan")}]},
            "turn 2, from gpt, needs a text in `value`, got nan",
        ),
    ],
)
def test_records_that_say_something_else_than_they_show_are_rejects(record, why):
    for read in (messages_of, lambda given: record_talk("k", given)):
        with pytest.raises(SampleError, match=why):
            read(record)


@pytest.mark.parametrize("nothing", [None, "", [], [None], {"bytes": None, "path": None}, [{"bytes": b"", "path": ""}]])
@pytest.mark.parametrize("column", ["image", "images", "video", "audio"])
def test_what_tables_have_in_a_row_of_text_alone_is_no_picture(nothing, column):
    for record in ({"conversations": SPOKEN}, asked("hi")):
        assert record_talk("k", {**record, column: nothing}).messages == messages_of(record)


@pytest.mark.parametrize(("value", "said"), [(3, "3"), (0, "0"), (2.5, "2.5")])
def test_a_number_is_what_a_turn_says(value, said):
    record = {
        "image": "a.png",
        "conversations": [{"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": value}],
    }
    assert messages_of(record)[1] == {"role": "assistant", "content": said}


def test_two_columns_of_arrays_are_told_apart():
    pictures = [[np.full((2, 2, 3), grey, np.uint8)] for grey in (0, 1)]
    with pytest.raises(SampleError, match="both 'image' and 'images'"):
        messages_of(asked("<image>", image=pictures[0], images=pictures[1]))


@pytest.mark.parametrize("record", [{"conversations": SPOKEN}, asked("hi")])
def test_a_system_prompt_and_tools_beside_a_conversation_are_part_of_it(record):
    first, *rest = messages_of({**record, "system": "Be a pirate.", "tools": json.dumps([TOOL])})
    assert (first["role"], first["content"]) == ("system", "Be a pirate.")
    assert tools_of([first]) == [TOOL]
    assert [message["role"] for message in rest] == ["user", "assistant"]
    assert messages_of({**record, "system": "", "tools": ""}) == messages_of(record)
    said = {"messages": [{"role": "system", "content": "Be a pirate."}, ANSWER], "system": "Be a pirate.\n"}
    assert messages_of(said) == said["messages"]  # told twice, written once


def test_lines_end_at_line_feeds_alone_and_keep_their_numbers(tmp_path):
    """JSON may hold other ends of lines as they are; blank lines count, and a byte order mark is no text."""
    file = tmp_path / "t.jsonl"
    odd = "a\u2028b\x85c\u2029d"
    file.write_text(
        "\n\r\n".join(json.dumps(asked(words), ensure_ascii=False) for words in (odd, "q")) + "\n \n{broken\n", "utf-8-sig"
    )
    source = FileTalks(file)
    assert [source[index].messages[0]["content"] for index in range(2)] == [odd, "q"]
    with pytest.raises(SampleError, match="line 5 is not JSON"):
        source[2]
    assert len(source) == 3
    whole = tmp_path / "t.json"
    whole.write_text(json.dumps([asked(odd)], ensure_ascii=False), "utf-8-sig")
    assert FileTalks(whole)[0].messages[0]["content"] == odd


ODD = {
    "not UTF-8: byte 0xe9": json.dumps(asked("caf?")).encode().replace(b"?", b"\xe9"),
    "too deep": b"[" * 100_000,
    "not JSON: Exceeds the limit": b'{"id": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("why", ODD)
def test_a_line_that_cannot_be_read_is_one_reject(why, tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_bytes(ODD[why] + b"\n" + json.dumps(asked("q")).encode())
    source = FileTalks(file)
    with pytest.raises(SampleError, match=f"line 1 is.*{why}"):
        source[0]
    assert source[1].messages[0]["content"] == "q"
    assert len(source) == len(source.records) == 2
    (tmp_path / "t.json").write_bytes(ODD[why])
    with pytest.raises(SourceError, match=f"t.json is.*{why}"):
        FileTalks(tmp_path / "t.json")


@pytest.mark.parametrize(("name", "content"), [("t.jsonl", ""), ("t.jsonl", "\n \n"), ("t.json", "[]")])
def test_a_file_without_a_conversation_is_refused_at_once(name, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match="holds no conversations: it is empty"):
        open_talks(str(tmp_path / name))


def test_an_empty_source_of_another_kind_stops_a_run_with_its_name():
    class Nothing:
        name = "nothing"

        def __len__(self):
            return 0

    with pytest.raises(DataError, match="nothing holds no conversations"):
        TalkFetcher([Nothing()], None, 0, 8, 8).audit()
