"""What the assistant thinks in a message that shows a picture or a clip, too: learned like any thought, and what is shown is not."""

import pytest
from chat_files import byte_tokenizer
from test_llava import RELEASED, SPECIAL
from test_llava import made as made_llava  # noqa: F401
from test_llava import picture as small
from test_llava import user as asked
from test_qwen_vl import QWEN_SPECIAL, clip, made, picture, said, user  # noqa: F401
from transformers import PreTrainedTokenizerFast

import intermodal
from intermodal.inputs.chat import NoSupervision
from intermodal.inputs.template import ChatTemplate, TemplateError

# In the manner of the thinking Qwen3-VL's: parts become one text, thoughts are of the last reply, and a reply begins inside its thought.
SHOWN = "<|vision_start|><|{}_pad|><|vision_end|>"
THINKS = (
    """{%- macro written(content) -%}{%- if content is string %}{{- content }}{%- else %}{%- for part in content %}
{%- if part.type == 'image' %}{{- '"""
    + SHOWN.format("image")
    + """' }}{%- elif part.type == 'video' %}{{- '"""
    + SHOWN.format("video")
    + """' }}
{%- else %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}{%- endmacro %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = written(message.content) %}{%- set thought = '' %}
    {%- if message.role == 'assistant' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}
        {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
    {%- else %}{{- content }}{%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- if begun %}{{- '<think>\\n' }}{%- endif %}{%- endif %}"""
)
WHY = "why\nso"
BLOCK = f"<think>\n{WHY}\n</think>\n\n"
STILL = user(picture(60, 90, 1))["content"][0]
MOVING = user(clip(4, 60, 60, 2.0, 3))["content"][0]
QUESTION = user(picture(90, 60, 2), "Which?")


def words(text):
    return {"type": "text", "text": text}


def learned(processor, conversation):
    """What is learned of a conversation whose mask is fine."""
    processor.audit(conversation)
    ids = [token for token, on in zip(conversation.ids, conversation.supervised, strict=True) if on]
    return processor.decode(ids, special=True)


CONTENTS = {
    "words, picture": ([words("This:"), STILL], "This:"),
    "picture, words": ([STILL, words("is it.")], "is it."),
    "clip between words": ([words("See "), MOVING, words(" and "), STILL, words("?")], "See  and ?"),
    "picture alone": ([STILL], ""),
}


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("case", CONTENTS)
def test_a_thought_beside_what_is_shown_is_learned(made, case, beside, begun):  # noqa: F811
    """Under its own name, or at the beginning of the first text; as much of it as the model must say after the header of its reply."""
    content, spoken = CONTENTS[case]
    if beside:
        reply = {"role": "assistant", "content": content, "reasoning_content": WHY}
    elif content[0] is STILL:
        reply = {"role": "assistant", "content": [words(BLOCK), *content]}
    else:
        reply = {"role": "assistant", "content": [words(BLOCK + content[0]["text"]), *content[1:]]}
    processor = intermodal.load(made("qwen3_vl")[0]).processor
    processor.template = ChatTemplate(THINKS, processor.template.special)
    conversation = processor.conversation([QUESTION, reply], begun=begun)
    thought = BLOCK.removeprefix("<think>\n") if begun else BLOCK
    assert learned(processor, conversation) == f"{thought}{spoken}<|im_end|>"
    visual = [on for on, sees in zip(conversation.supervised, conversation.expanded.visual, strict=True) if sees]
    assert len(visual) > 8
    assert not any(visual)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_ids_are_those_of_transformers(made, family):  # noqa: F811
    """Its template's text, each placeholder as often as its picture has tokens; the same with the mask as without."""
    processor = intermodal.load(made(family)[0]).processor
    processor.template = ChatTemplate(THINKS, processor.template.special)
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(QWEN_SPECIAL), eos_token="<|im_end|>", chat_template=THINKS)
    for content in ([words("This:"), STILL, words(" and "), STILL], [STILL]):
        talk = [QUESTION, {"role": "assistant", "content": content, "reasoning_content": WHY}]
        conversation = processor.conversation(talk)
        pieces, text = theirs.apply_chat_template(talk, tokenize=False).split("<|image_pad|>"), ""
        for piece, plan in zip(pieces[:-1], conversation.plans, strict=True):
            text += piece + "<|image_pad|>" * len(plan)
        assert conversation.ids == theirs(text + pieces[-1]).input_ids
        assert WHY in text
        rest = processor.conversation([*talk, user("So?")], reply=True)  # nothing is learned, nor refused, of what is said before
        assert not any(rest.supervised)


def test_the_empty_thought_that_a_template_writes_is_learned_beside_a_picture(made):  # noqa: F811
    """As without one; a message that only shows is no example of how to speak, and stays one."""
    processor = intermodal.load(made("qwen3_vl")[0]).processor
    processor.template = ChatTemplate(THINKS, processor.template.special)
    for content in ([STILL, words("is it.")], [words("is it."), STILL], "is it."):
        conversation = processor.conversation([QUESTION, {"role": "assistant", "content": content}])
        assert learned(processor, conversation) == "<think>\n\n</think>\n\nis it.<|im_end|>"
    talk = [QUESTION, said("This."), user("And?"), {"role": "assistant", "content": [STILL]}]
    assert learned(processor, processor.conversation(talk)) == "This.<|im_end|>"
    with pytest.raises(NoSupervision, match="no words"):
        processor.audit(processor.conversation(talk[2:]))


# Pictures first, and a line break before every text, as the released LLaVA-OneVision's: the thought before the pictures, or after them.
HEADER, TURN = "{{ '<|im_start|>assistant\\n' }}{% endif %}", "<|im_start|>{{ m['role'] + ' ' }}"
THOUGHT = "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
PICTURES = RELEASED[
    RELEASED.index("{% for part") : RELEASED.index("{% for part in m['content'] | selectattr('type', 'equalto', 'text')")
]
SPACED = RELEASED.replace(HEADER, "{{ '<|im_start|>assistant ' }}{% endif %}")
LINE = "{{ '\\n' }}"
PLACES = {
    "before": SPACED.replace(PICTURES, THOUGHT + PICTURES),
    "after": SPACED.replace(PICTURES, PICTURES + THOUGHT),
    "after, on a line": SPACED.replace(PICTURES, PICTURES + LINE + THOUGHT),
    "within": SPACED.replace(PICTURES, "{% if m.reasoning_content %}{{ '<think>' }}" + "{% endif %}" + PICTURES
                             + "{% if m.reasoning_content %}{{ m.reasoning_content + '</think>' }}{% endif %}"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_thought_is_told_from_pictures_that_are_written_beside_it(made_llava, place):  # noqa: F811
    processor = intermodal.load(made_llava("llava_onevision")[0]).processor
    processor.template = ChatTemplate(PLACES[place], processor.template.special)
    shown = asked(small(30, 40, 1), small(40, 30, 2))["content"]
    for content in ([words("see "), shown[0], words(" or"), shown[1]], [*shown, words("see "), words(" or")]):
        reply = {"role": "assistant", "content": content, "reasoning_content": "why"}
        conversation = processor.conversation([asked("which?"), reply])
        told = learned(processor, conversation)
        assert told.replace("\n", "") == "<think>why</think>see  or</s>"
        places = [index for index, token in enumerate(conversation.ids) if token == 256 + SPECIAL.index("<image>")]
        assert not any(conversation.supervised[index] for index in places)
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(SPECIAL), chat_template=PLACES[place])
    text = theirs.apply_chat_template([asked("which?"), reply], tokenize=False)
    assert processor.template.render([asked("which?"), reply]) == text
    alone = {"role": "assistant", "content": shown, "reasoning_content": "why"}
    with pytest.raises(
        TemplateError, match=r"part of message 2 is what the assistant thought cannot be told.* give the message some words"
    ):
        processor.conversation([asked("which?"), alone])


def test_thoughts_that_cannot_be_written_are_refused(made, made_llava):  # noqa: F811
    ours, other = intermodal.load(made("qwen3_vl")[0]).processor, intermodal.load(made_llava("llava")[0]).processor
    reply = {"role": "assistant", "content": [words("This:"), STILL], "reasoning_content": "why"}
    for processor in (ours, other):  # their own templates know of no thoughts
        with pytest.raises(
            TemplateError, match=r"does not write what the assistant thought \('why', in message 2\).*apart from what it"
        ):
            processor.conversation([QUESTION, reply])
    ours.template = ChatTemplate(THINKS, ours.template.special)
    with pytest.raises(TemplateError, match=r"'why', in message 2.*in the last reply alone"):
        ours.conversation([QUESTION, reply, user("So?"), said("Yes.")])
    look = words("<think>\nlook "), STILL, words(" there\n</think>\n\nIt is.")
    told = r"changes what the assistant said.*give a thought beside a picture in reasoning_content"
    for content in (
        look,
        [STILL, words("<think>\nwhy\n</think>\n\nr")],
    ):  # what is shown before `</think>` is the thought's, or gone
        with pytest.raises(TemplateError, match=told):
            ours.conversation([QUESTION, {"role": "assistant", "content": content}])
