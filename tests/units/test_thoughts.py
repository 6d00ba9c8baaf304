"""What the assistant thinks before it speaks: learned where the template writes it, refused where it does not."""

import json
import shutil
from pathlib import Path

import pytest
from test_chat import CHATML, processor
from test_generate import folder  # noqa: F401
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.errors import SampleError
from intermodal.inputs.messages import check_messages
from intermodal.inputs.replies import Replies
from intermodal.inputs.template import ChatTemplate, TemplateError

# In the manner of Qwen3: thoughts are of the last reply alone, and where it has none a template writes that it has none.
THINKS = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- if message.role != 'assistant' %}{{- '<|start|>' + message.role + '\\n' + message.content + '<|end|>\\n' }}
    {%- else %}
        {%- set content = message.content %}{%- set thought = '' %}
        {%- if message.reasoning_content is string %}{%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {{- '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start|>assistant\\n' }}{%- if enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# In the manner of Qwen3's later thinking models: a reply begins inside the thought.
BEGUN = THINKS.replace("{{- '<|start|>assistant\\n' }}{%- if enable", "{{- '<|start|>assistant\\n<think>\\n' }}{%- if enable")
# In the manner of gpt-oss: a header names a channel, which a reply must name itself.
CHANNELS = """{% for m in messages %}<|start|>{{ m.role }}{{ 'final' if m.role == 'assistant' }}<|mid|>{{ m.content }}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant{% endif %}"""
ASKED = {"role": "user", "content": "q"}
EMPTY = "<think>\n\n</think>\n\n"


def said(words, **beside):
    return {"role": "assistant", "content": words, **beside}


def learned(ours, messages, **variables):
    """What is learned of a conversation whose mask is fine, and the text before it."""
    conversation = ours.conversation(messages, **variables)
    ours.audit(conversation)
    first = conversation.supervised.index(True)
    ids = [i for i, s in zip(conversation.ids, conversation.supervised, strict=True) if s]
    return ours.decode(ids, special=True), ours.decode(conversation.ids[:first], special=True)


@pytest.mark.parametrize("reply", [said("r", reasoning_content="why\nso"), said("<think>\nwhy\nso\n</think>\n\nr")])
def test_a_thought_is_learned_from_where_a_reply_begins(reply):
    for template, prompted in ((THINKS, ""), (BEGUN, "<think>\n")):
        ours = processor(template)
        words, before = learned(ours, [ASKED, reply])
        assert prompted + words == "<think>\nwhy\nso\n</think>\n\nr<|end|>"
        assert before == ours.template.render([ASKED], reply=True)
    assert learned(processor(CHATML), [ASKED, said("<think>\nwhy\n</think>\n\nr")])[0] == "<think>\nwhy\n</think>\n\nr<|end|>"


def test_a_plain_reply_is_learned_after_what_it_is_generated_after():
    """With the empty thought that the template writes before the last reply, unless a reply is given that, too."""
    ours, talk = processor(THINKS), [ASKED, said("a"), ASKED, said("r")]
    assert learned(ours, talk) == (f"a<|end|>{EMPTY}r<|end|>", ours.template.render(talk[:1], reply=True))
    words, before = learned(ours, talk[2:], enable_thinking=False)
    assert (words, before) == ("r<|end|>", ours.template.render(talk[:1], reply=True, enable_thinking=False))
    ours.variables = {"enable_thinking": False}
    assert learned(ours, talk[2:]) == (words, before)
    assert ours.decode(ours.conversation(talk[:1], reply=True).ids, special=True) == before
    assert learned(ours, talk[2:], enable_thinking=True)[0] == f"{EMPTY}r<|end|>"  # what a call says goes first
    with pytest.raises(Exception, match="all that the assistant says is empty"):
        learned(ours, [ASKED, said("")], enable_thinking=True)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_that_the_template_does_not_write_is_refused(name):
    with pytest.raises(TemplateError, match=r"does not write what the assistant thought \('why', in message 2\)"):
        processor(CHATML).conversation([ASKED, said("r", **{name: "why"})])
    processor(CHATML).conversation([ASKED, said("r", **{name: ""})])
    processor(CHATML).conversation([ASKED, said("r", **{name: "why"}), ASKED], reply=True)  # nothing is learned of it
    with pytest.raises(SampleError, match=f"{name} is a text"):
        check_messages([ASKED, said("r", **{name: ["why"]})])


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_written_under_whichever_name_it_comes(name):
    """As transformers writes it, also by templates in the manner of gpt-oss, which read `thinking`."""
    for template in (THINKS, THINKS.replace("message.reasoning_content", "message.thinking")):
        ours, talk = processor(template), [ASKED, said("r", **{name: "why"})]
        assert learned(ours, talk)[0] == "<think>\nwhy\n</think>\n\nr<|end|>"
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=ours.tokenizer, bos_token="<s>", eos_token="<|end|>", chat_template=template
        )
        assert ours.conversation(talk).ids == theirs.apply_chat_template(talk, return_dict=True)["input_ids"]


@pytest.mark.parametrize("template", [THINKS, BEGUN, CHANNELS])
@pytest.mark.parametrize("thinking", [True, False])
def test_long_conversations_are_not_rendered_once_for_every_turn(template, thinking, monkeypatch):
    """Nor is anything else learned for that than where every turn is looked for by itself."""
    talk, variables = [ASKED, said("a"), ASKED, said("b")] * 10, {"enable_thinking": thinking}
    ours, renders, render = processor(template), [], ChatTemplate.render
    monkeypatch.setattr(ChatTemplate, "render", lambda *given, **named: renders.append(1) or render(*given, **named))
    quick = ours.conversation(talk, **variables)
    assert len(renders) <= 8
    monkeypatch.setattr(Replies, "known_begin", Replies.begin)
    assert (quick.supervised, quick.turns) == ((slow := ours.conversation(talk, **variables)).supervised, slow.turns)
    assert len(renders) > 20
    ours.audit(quick)


@pytest.mark.parametrize("reply", [said("r", reasoning_content="why"), said("<think>\nwhy\n</think>\n\nr")])
def test_thoughts_of_all_but_the_last_reply_are_refused_where_the_template_drops_them(reply):
    with pytest.raises(TemplateError, match=r"'why', in message 2.*in the last reply alone"):
        processor(THINKS).conversation([ASKED, reply, ASKED, said("r")])


def test_a_template_without_a_header_for_replies_teaches_the_words_alone():
    silent = CHATML[: CHATML.index("{%- if add_generation_prompt")]
    assert learned(processor(silent), [ASKED, said("r")])[0] == "r<|end|>"


def test_the_verbs_tell_the_template(folder, tmp_path):  # noqa: F811
    """`--variable`, with values as JSON has them: the reply begins after the empty think block."""
    thinker = Path(shutil.copytree(folder, tmp_path / "thinker"))
    (thinker / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>", "chat_template": THINKS}))
    model = intermodal.load(thinker)
    model.processor.variables = {"enable_thinking": False}
    wanted = model.generate([ASKED], max_new_tokens=6)
    options = ["--max-new-tokens", "6", "--variable", "enable_thinking=false", "--variable", "name=x"]
    done = CliRunner().invoke(app, ["generate", str(thinker), "q", *options, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["usage"] == wanted.usage
    assert wanted.usage["prompt_tokens"] > intermodal.load(thinker).generate([ASKED], max_new_tokens=6).usage["prompt_tokens"]
    done = CliRunner().invoke(app, ["chat", str(thinker), *options], input="q\n\n")
    assert wanted.text.strip() in done.output
    options[-3] = "enable_thinking=False"  # Python's spelling, which as a text would be true
    done = CliRunner().invoke(app, ["generate", str(thinker), "q", *options, "--json"])
    assert json.loads(done.stdout)["usage"] == wanted.usage
    done = CliRunner().invoke(app, ["generate", "nowhere", "q", "--variable", "messages=1"])
    assert "messages is what intermodal itself tells the template" in str(done.exception)
    for wrong in ("enable_thinking", "=false"):
        done = CliRunner().invoke(app, ["generate", "nowhere", "q", "--variable", wrong])
        assert f"--variable {wrong}: give NAME=VALUE" in str(done.exception)
