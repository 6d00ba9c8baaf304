"""Media whose order in a conversation is not the order in which a template writes them, against transformers."""

import pytest
import torch
from test_llava import clip, made, picture, said, theirs, user  # noqa: F401

import intermodal
from intermodal.inputs.media import Clip
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
