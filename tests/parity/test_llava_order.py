"""Media whose order in a conversation is not the order in which a template writes them, against transformers."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_llava import clip, made, picture, said, theirs, user  # noqa: F401
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.evaluate.inspect import page, positions
from intermodal.inputs.media import Clip, MediaError
from intermodal.inputs.template import ChatTemplate

RELEASED = """{% for m in messages %}{{'<|im_start|>' + m['role'] + ' '}}\
{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\\n' }}{% endfor %}\
{% for part in m['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>\\n' }}{% endfor %}\
{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + part['text'] }}{% endfor %}{{'</s>'}}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""The released LLaVA-OneVision's: of every message the pictures, then the clips, then the texts."""


@pytest.mark.parametrize(
    "talk",
    [
        [user(clip(4, 8), picture(90, 60, 7), "Both?"), said("Yes.")],
        [
            user(clip(3, 1), picture(33, 57, 2), clip(3, 3), "Which?", picture(50, 41, 4)),
            said("None."),
            user(clip(3, 5), picture(31, 28, 6), "Now?"),
            said("All."),
        ],
    ],
)
def test_pictures_written_before_clips_stand_for_pictures(made, talk):  # noqa: F811
    folder, model = made("llava_onevision")
    ours = intermodal.load(folder)
    ours.processor.template = ChatTemplate(RELEASED, ours.processor.template.special)
    conversation = ours.processor.conversation(talk)
    ours.processor.audit(conversation)
    kinds = ["video" if isinstance(item, Clip) else "image" for item in conversation.items]
    assert kinds == [plan.kind for plan in conversation.plans]
    batch = ours.processor(talk)
    rendered = [{"content": [{"type": kind, kind: item} for kind, item in zip(kinds, conversation.items, strict=True)]}]
    expected = theirs("llava_onevision", model, batch, rendered)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), expected, atol=1e-4, rtol=0)


def test_a_box_belongs_to_the_picture_that_the_messages_show(made):  # noqa: F811
    """`item` counts the media of the messages, whatever order the template writes them in."""
    processor = intermodal.load(made("llava_onevision")[0]).processor
    processor.template = ChatTemplate(RELEASED, processor.template.special)
    shown, box = user(clip(4, 8), picture(100, 60, 7), "Where?"), {"type": "box", "box": [10, 6, 50, 30]}
    for item, written in ((0, "[0.20, 0.20, 1.00, 1.00]"), (1, "[0.10, 0.10, 0.50, 0.50]")):
        talk = [shown, {"role": "assistant", "content": [{**box, "item": item}]}]
        assert written in processor.conversation(talk).text


# Clips are 50 x 30; in the order of the messages the items are clip, picture, clip, picture, then clip, picture.
MIXED = [
    user(clip(3, 1), picture(33, 57, 2), clip(2, 3), "Which?", picture(58, 41, 4)),
    said("None."),
    user(clip(3, 5), picture(31, 28, 6), "Now?"),
]
SIZES = ["50 x 30", "33 x 57", "50 x 30", "58 x 41", "50 x 30", "31 x 28"]


def as_file(part, folder):
    """A part with its picture, or its clip's frames, by name."""
    item = part.get("image") or part.get("video")
    if item is None:
        return part
    names = []
    for frame in item.frames if isinstance(item, Clip) else [np.asarray(item)]:
        names.append(f"{len(list(folder.glob('*.png')))}.png")
        Image.fromarray(frame).save(folder / names[-1])
    return {"type": part["type"], part["type"]: names if isinstance(item, Clip) else names[0]}


def test_what_is_looked_at_is_counted_as_the_messages_count(made, tmp_path):  # noqa: F811
    """The template writes the items in the order 1, 3, 0, 2 and 5, 4; `item` of a box, the page and the terminal all name them so."""
    folder = shutil.copytree(made("llava_onevision")[0], tmp_path / "model")
    (folder / "chat_template.jinja").write_text(RELEASED)
    processor = intermodal.load(folder).processor
    for item, size in enumerate(SIZES):
        width, height = map(int, size.split(" x "))
        box = {"type": "box", "box": [0, 0, width / 2, height / 4], "item": item}
        talk = [*MIXED, {"role": "assistant", "content": [box]}]
        conversation = processor.conversation(talk)
        assert "assistant \n[0.00, 0.00, 0.50, 0.25]" in conversation.text  # a box of a picture of this size, and of no other
        assert conversation.numbers == [1, 3, 0, 2, 5, 4]
        rows = [row for row in positions(processor, conversation) if row.item == item and row.box is not None]
        assert rows
        assert {row.modality for row in rows} == {"video" if item in (0, 2, 4) else "image"}
        assert [max(row.box[axis] for row in rows) for axis in (2, 3)] == pytest.approx([width, height])
    drawn = page(processor, [("line 1", conversation, "good", True)])
    captions = [f"{'video' if n in (0, 2, 4) else 'image'}, item {n} of the messages: {size}" for n, size in enumerate(SIZES)]
    assert re.findall(r"<figcaption>(.*?), \d+ tokens", drawn) == captions
    told = [int(item) for item in re.findall(r"label off  item (\d)  box", drawn)]
    assert list(dict.fromkeys(told)) == [1, 3, 0, 2, 5, 4]

    talk = [{**message, "content": [as_file(part, tmp_path) for part in message["content"]]} for message in (MIXED[0], MIXED[2])]
    talk = [talk[0], said("None."), talk[1], said("All.")]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}))
    done = CliRunner().invoke(app, ["inspect", str(folder), str(tmp_path / "talks.jsonl")])
    assert done.exit_code == 0, done.output
    assert re.findall(r"\[item (\d): [\dx +]+\]", " ".join(done.output.split())) == list("130254")


@pytest.mark.parametrize(
    ("item", "told"),
    [
        ("1", "item of a box part is a number, counted from 0 .*not '1'"),
        (True, "not True"),
        (0.5, "not 0.5"),
        (float("nan"), "not nan"),
        (float("inf"), "not inf"),
        ([0], r"not \[0\]"),
        (2, "belongs to item 2, and the conversation shows 2"),
        (-1, "belongs to item -1"),
    ],
)
def test_a_box_of_no_item_is_refused(made, item, told):  # noqa: F811
    processor = intermodal.load(made("llava_onevision")[0]).processor
    asked = [user(clip(4, 8), picture(100, 60, 7), "Where?")]
    box = {"type": "box", "box": [10, 6, 50, 30], "item": item}
    with pytest.raises(MediaError, match=told):
        processor.conversation([*asked, {"role": "assistant", "content": [box]}])


def test_a_box_belongs_to_the_medium_before_it(made):  # noqa: F811
    """Also where tables write null for the item, and 1 as 1.0; a picture that brings words of its own is one."""
    processor = intermodal.load(made("llava_onevision")[0]).processor
    shown = user(clip(4, 8), picture(100, 60, 7), "Where?")
    shown["content"][1]["text"] = "a note"
    for item in ({}, {"item": None}, {"item": 1}, {"item": 1.0}):
        box = {"type": "box", "box": [10, 6, 50, 30], **item}
        text = processor.conversation([shown, {"role": "assistant", "content": [box]}]).text
        assert "[0.10, 0.10, 0.50, 0.50]" in text, item
