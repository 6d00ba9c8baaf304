"""Tools: what a template makes of them, of calls and of what they gave, and which of it is learned."""

import copy
import json

import pytest
import torch
from test_chat import LLAMA3, TALK, VICUNA, tokenizer
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.data.packing import TalkFetcher
from intermodal.data.talks import open_talks, record_talk
from intermodal.errors import IntermodalError, SampleError
from intermodal.generate.engine import fitting
from intermodal.generate.sample import Sampling
from intermodal.inputs.chat import ChatProcessor, NoSupervision
from intermodal.inputs.messages import placed, with_tools
from intermodal.inputs.template import ChatTemplate, TemplateError
from intermodal.models.decoder import DecoderConfig
from intermodal.models.generative import LanguageModel

# In the manner of Qwen2.5: words and calls share a turn, what a tool gave is a user's.
HERMES = """{%- if tools %}
    {{- '<|start|>system\\n' + (messages[0].content + '\\n' if messages[0].role == 'system' else '') + '# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not tools) or (message.role == 'assistant' and not message.tool_calls) %}
        {{- '<|start|>' + message.role + '\\n' + message.content + '<|end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {%- if call.function is defined %}{%- set call = call.function %}{%- endif %}
            {{- '\\n<call>\\n{"name": "' + call.name + '", "arguments": ' }}{{- call.arguments | tojson }}{{- '}\\n</call>' }}
        {%- endfor %}
        {{- '<|end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|start|>user' }}{%- endif %}
        {{- '\\n<given>\\n' + message.content + '\\n</given>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"""
# In the manner of Qwen3: content may be nothing, the last turn thinks, arguments may be a text.
THINKER = """{%- if tools %}{{- '<|start|>system\\n' }}{%- for tool in tools %}{{- tool | tojson }}{%- endfor %}{{- '<|end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'assistant' %}
        {{- '<|start|>assistant\\n' }}
        {%- if loop.index0 > ns.last and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}{{- content }}{%- endif %}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {{- '<call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
            {{- '}\\n</call>' }}
        {%- endfor %}
        {{- '<|end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>user\\n<given>\\n' + content + '\\n</given><|end|>\\n' }}
    {%- else %}
        {{- '<|start|>' + message.role + '\\n' + content + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{%- endif %}"""
# In the manner of Llama 3.1: either words or one call, what a tool gave as JSON.
EITHER = """{%- for message in messages %}
    {%- if message.tool_calls %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start|>assistant<|mid|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}{{- call.arguments | tojson }}{{- '}<|end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start|>ipython<|mid|>\\n\\n' }}{{- message.content | tojson }}{{- '<|end|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|mid|>\\n\\n' }}
        {%- if tools and loop.first %}{{- tools | tojson(indent=4) }}{%- endif %}
        {{- message.content | trim }}{{- '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant<|mid|>\\n\\n' }}{%- endif %}"""
TEMPLATES = {"hermes": HERMES, "thinker": THINKER, "either": EITHER}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather, naïvely",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def call(city, name="weather"):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": {"city": city}}}


def talk(*, several=True):
    first = {"role": "assistant", "content": None, "tool_calls": [call("Köln"), call("Rio")] if several else [call("Köln")]}
    second = {"role": "assistant", "content": "One more." if several else "", "tool_calls": [call('"X"')]}
    given = [{"role": "tool", "tool_call_id": "1", "content": text} for text in ('{"rain": true}', "dry")]
    return [
        {"role": "user", "content": "Is it raining?"}, first, *given[: 1 + several], second, given[1],
        {"role": "assistant", "content": "In Köln."}, {"role": "user", "content": "Rio?"}, {"role": "assistant", "content": "Dry."},
    ]  # fmt: skip


def words_of_calls(name, *cities):
    first = {"hermes": '<call>\n{"name": "weather", "arguments": ', "either": '{"name": "weather", "parameters": '}
    begin, end = first.get(name, first["hermes"]), "}" if name == "either" else "}\n</call>"
    return "\n".join(begin + json.dumps({"city": city}, ensure_ascii=False) + end for city in cities)


def reader(template):
    tok = tokenizer()
    tok.add_tokens([AddedToken(text, normalized=False) for text in ("<call>", "</call>")])
    return ChatProcessor(
        tok, ChatTemplate(template, {"eos_token": "<|end|>"}), end_ids=[tok.token_to_id("<|end|>"), tok.token_to_id("</s>")]
    )


def learned(processor, conversation):
    return processor.decode([i for i, on in zip(conversation.ids, conversation.supervised, strict=True) if on], special=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_calls_and_results_equal_transformers(name):
    ours, messages = reader(TEMPLATES[name]), talk(several=name != "either")
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours.tokenizer, eos_token="<|end|>")
    theirs.chat_template = TEMPLATES[name]
    for end, reply in ((len(messages), False), (1, True), (3, True), (len(messages) - 1, True), (2, False)):
        part = messages[:end]
        for tools in ([WEATHER], None, []):
            wanted = theirs.apply_chat_template(part, tools=tools, add_generation_prompt=reply, return_dict=True)["input_ids"]
            assert ours.conversation(part, tools=tools, reply=reply).ids == wanted
            assert ours.conversation(with_tools(part, tools), reply=reply).ids == wanted
            if not reply:
                ours.audit(ours.conversation(part, tools=tools))


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_learned_and_what_tools_gave_is_not(name):
    ours, several = reader(TEMPLATES[name]), name != "either"
    conversation = ours.conversation(talk(several=several), tools=[WEATHER])
    ours.audit(conversation)
    both = words_of_calls(name, "Köln", "Rio") if several else words_of_calls(name, "Köln")
    again = ("One more.\n" if several else "") + words_of_calls(name, '"X"')
    empty = "<think>\n\n</think>\n\n" if name == "thinker" else ""  # what it writes before the last reply, a reply must begin with
    assert learned(ours, conversation) == "<|end|>".join([both, again, "In Köln.", f"{empty}Dry.", ""])
    # a call that ends the conversation, and one that begins it; a call without `content`
    ending = talk(several=several)[:2]
    del ending[1]["content"]
    for messages in (ending, ending[1:]):
        if messages[0]["role"] == "assistant" and name == "either":
            continue
        one = ours.conversation(messages)
        ours.audit(one)
        assert learned(ours, one) == (empty if len(messages) > 1 else "") + both + "<|end|>"
    # a lost token of a call is refused
    places = [index for index, on in enumerate(conversation.supervised) if on]
    for place in (places[0], places[12], places[len(both.encode()) // 2]):
        lost = copy.copy(conversation)
        lost.supervised = [on and index != place for index, on in enumerate(conversation.supervised)]
        with pytest.raises(NoSupervision):
            ours.audit(lost)


def test_content_that_is_none_is_not_looped_over():
    """Qwen3-VL's released template loops over any content that is there and no string; transformers leaves out what is None."""
    loops = """{% for m in messages %}<|start|>{{ m.role }}<|mid|>\
{% if m.content is string %}{{ m.content }}{% elif m.content is defined %}\
{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}\
{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|end|>{% endfor %}\
{% if add_generation_prompt %}<|start|>assistant<|mid|>{% endif %}"""
    ours, messages = reader(loops), talk()
    theirs = PreTrainedTokenizerFast(tokenizer_object=ours.tokenizer, eos_token="<|end|>")
    theirs.chat_template = loops
    for end, reply in ((3, True), (len(messages), False)):
        wanted = theirs.apply_chat_template(messages[:end], add_generation_prompt=reply, return_dict=True)["input_ids"]
        assert ours.conversation(messages[:end], reply=reply).ids == wanted
    ours.audit(ours.conversation(messages))


@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_calls_are_written_by_a_template_that_asks_for_a_content_of_none(content):
    """In the manner of DeepSeek-R1's: a content that is left out is none to it that is None."""
    asks = """{% for m in messages %}<|start|>{{ m.role }}<|mid|>\
{% if m.content is none %}{% for c in m.tool_calls %}{{ c.function.name + c.function.arguments }}{% endfor %}\
{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|mid|>{% endif %}"""
    function = {"name": "weather", "arguments": '{"city": "Rio"}'}
    called = {"role": "assistant", **content, "tool_calls": [{"type": "function", "function": function}]}
    messages = [TALK[0], called, {"role": "tool", "content": "dry"}, {"role": "assistant", "content": "It is dry."}]
    ours = reader(asks)
    conversation = ours.conversation(messages)
    ours.audit(conversation)
    assert learned(ours, conversation) == 'weather{"city": "Rio"}<|end|>It is dry.<|end|>'
    assert 'weather{"city": "Rio"}' in ours.conversation(messages[:3], reply=True).text
    with pytest.raises(TemplateError, match="leaves out the assistant's call"):
        ours.conversation([messages[0], {**called, "content": "I look."}, *messages[2:]])


def test_what_a_template_leaves_out_is_refused():
    ours, messages = reader(LLAMA3), talk()
    with pytest.raises(TemplateError, match="leaves out the tools of the conversation"):
        ours.conversation(TALK, tools=[WEATHER])
    with pytest.raises(TemplateError, match="leaves out the tools of the conversation"):
        ours.conversation(with_tools(TALK[:1], [WEATHER]), reply=True)
    ours.conversation(TALK, tools=[])
    silent = "{% for m in messages %}<|start|>{{ m.role }}<|mid|>{{ m.content or '' }}<|end|>{% endfor %}"
    for reply in (True, False):
        with pytest.raises(TemplateError, match="leaves out the assistant's call"):
            reader(silent).conversation(messages, reply=reply)
    deaf = HERMES.replace("message.role == 'tool'", "message.role == 'toll'")
    with pytest.raises(TemplateError, match="leaves out what the tool said"):
        reader(deaf).conversation(messages, tools=[WEATHER])
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    names = "{% for m in messages %}<|start|>{{ m.content or '' }}" + calls + "<|end|>{% endfor %}"
    with pytest.raises(TemplateError, match="leaves out the argument 'Köln'"):
        reader(names).conversation(messages)
    endless = THINKER.replace("{{- '<|end|>\\n' }}\n    {%- elif message.role == 'tool'", "{%- elif message.role == 'tool'")
    assert endless != THINKER
    with pytest.raises(TemplateError, match="does not end the assistant's turn"):
        reader(endless).conversation(messages[:3])
    ours = reader(endless)
    last = ours.conversation(messages[:2])
    with pytest.raises(NoSupervision, match="no end-of-turn"):
        ours.audit(last)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"role": "assistant", "content": None}, "content"),
        ({"role": "assistant"}, "content"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "content"),
        ({"role": "assistant", "content": None, "tool_calls": "weather"}, "tool_calls"),
        ({"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {}}}]}, "call of a tool"),
        ({"role": "assistant", "content": None, "tool_calls": [call("\ud800")]}, "half a character"),
        ({"role": "user", "content": "?", "tool_calls": [call("a")]}, "assistant"),
    ],
)
def test_messages_that_are_none(message, why, tmp_path):
    with pytest.raises(SampleError, match=why):
        placed([message], tmp_path)


def test_tools_that_are_none():
    for wrong in ("weather", ["weather"], {"name": "weather"}):
        with pytest.raises(SampleError, match="JSON schemas"):
            with_tools(TALK, wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny decoder with the Hermes template."""
    processor = reader(HERMES)
    vocabulary = processor.tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = LanguageModel(DecoderConfig(16, 1, 2, 1, 8, 24, vocabulary, context=700))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    processor.files = {
        "tokenizer.json": processor.tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps({"eos_token": "<|end|>"}).encode(),
        "chat_template.jinja": HERMES.encode(),
    }
    model.processor = processor
    return intermodal.save(model, tmp_path_factory.mktemp("tools"))


def test_replies_hear_of_the_tools(folder, tmp_path):
    """`generate`, `stream`, `generate_batch` and files of conversations give the model the same prompt, which is transformers'."""
    model = intermodal.load(folder)
    asked = talk()[:4]
    told, untold = (model.generate(asked, tools=tools, max_new_tokens=8) for tools in ([WEATHER], None))
    assert told.usage["prompt_tokens"] == len(model.processor.conversation(asked, tools=[WEATHER], reply=True).ids)
    assert told.usage["prompt_tokens"] > untold.usage["prompt_tokens"]
    assert [*model.stream(asked, tools=[WEATHER], max_new_tokens=8)][-1].ids == told.ids
    assert model.generate_batch([asked, asked], tools=[WEATHER], max_new_tokens=8)[1].ids == told.ids
    lines = [{"id": "a", "messages": asked, "tools": [WEATHER]}, {"id": "b", "messages": asked}]
    lines += [{"id": "c", "messages": asked, "tools": "weather"}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "said.jsonl"
    done = CliRunner().invoke(
        app, ["generate", str(folder), "--jsonl", str(tmp_path / "asked.jsonl"), "--out", str(out), "--max-new-tokens", "8"]
    )
    assert done.exit_code == 0, done.output
    rows = {row["line"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert rows[1]["usage"] == told.usage
    assert rows[1]["reply"] == told.text
    assert rows[2]["usage"] == untold.usage
    assert "JSON schemas" in rows[3]["error"]
    model.processor.template = ChatTemplate(VICUNA)
    with pytest.raises(IntermodalError, match="leaves out the tools"):
        model.generate(TALK[:1], tools=[WEATHER])


def test_the_verbs_give_tools_and_a_system_message(folder, tmp_path):
    """`generate` and `chat` ask with both, `/new` begins with them again; files that hold no schemas are refused before a model is read."""
    model, told = intermodal.load(folder), tmp_path / "tools.json"
    told.write_text(json.dumps([WEATHER]))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    wanted = model.generate(asked, tools=[WEATHER], max_new_tokens=8)
    options = ["--tools", str(told), "--system", "Be brief.", "--max-new-tokens", "8"]
    done = CliRunner().invoke(app, ["generate", str(folder), "Rain?", *options, "--json"])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert (row["reply"], row["usage"]) == (wanted.text, wanted.usage)
    for typed in ("Rain?\n\n", "Snow?\n/new\nRain?\n\n"):
        done = CliRunner().invoke(app, ["chat", str(folder), *options], input=typed)
        assert done.exit_code == 0, done.output
        assert wanted.text.strip() in done.output
    for text, message in (("[{", "line 1"), ("[]", "empty"), ('{"a": 1}', "got"), ("[1]", "got")):
        told.write_text(text)
        for verb in (["generate", "nowhere", "Rain?"], ["chat", "nowhere"]):
            done = CliRunner().invoke(app, [*verb, "--tools", str(told)])
            assert done.exit_code == 1
            assert str(told) in str(done.exception)
            assert message in str(done.exception)
    done = CliRunner().invoke(app, ["generate", "nowhere", "--jsonl", str(told), "--out", str(tmp_path / "o"), "--system", "x"])
    assert "each line has its own" in str(done.exception)


def test_a_conversation_that_lost_its_oldest_turns_keeps_its_tools(folder):
    processor = intermodal.load(folder).processor
    turns = [{"role": "user", "content": "x" * 90}, {"role": "assistant", "content": "y" * 90}] * 3
    asked = [{"role": "system", "content": "Be brief."}, *turns, {"role": "user", "content": "Rain?"}]
    kept, dropped = fitting(processor, with_tools(asked, [WEATHER]), 500, Sampling(too_long="drop_oldest", max_new_tokens=20))
    assert dropped
    assert "naïvely" in kept.text


def test_a_line_with_tools_is_trained_on_with_them(folder, tmp_path):
    """A line whose template knows no tools is a reject."""
    model = intermodal.load(folder)
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": talk(), "tools": [WEATHER]}) + "\n")
    source = open_talks(str(tmp_path / "t.jsonl"))
    read = TalkFetcher([source], model.processor, 0, 700, 700).read(0, 0)
    assert read.ids.tolist() == model.processor.conversation(talk(), tools=[WEATHER]).ids
    for tools in ([WEATHER], json.dumps([WEATHER])):  # data sets of columns keep them as a text
        streamed = record_talk("k", {"messages": talk(), "tools": tools}).messages
        assert model.processor.conversation(streamed).ids == read.ids.tolist()
    with pytest.raises(SampleError, match="no JSON"):
        record_talk("k", {"messages": talk(), "tools": "[{"})
    model.processor.template = ChatTemplate(LLAMA3, model.processor.template.special)
    (tmp_path / "u.jsonl").write_text(json.dumps({"messages": TALK, "tools": [WEATHER]}) + "\n")
    with pytest.raises(TemplateError, match="leaves out the tools"):
        TalkFetcher([open_talks(str(tmp_path / "u.jsonl"))], model.processor, 0, 700, 700).read(0, 0)


def test_calls_are_packed_like_words(folder):
    """As a data worker reads it: with the tools, calls learned; packed equals separate."""
    model = intermodal.load(folder, dtype="float64")
    messages = with_tools(talk(), [WEATHER])
    alone = [model.processor(messages), model.processor(TALK)]
    packed = type(alone[0]).pack(alone)
    with torch.no_grad():
        torch.testing.assert_close(model(packed), torch.cat([model(one) for one in alone]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model.logits(talk(), tools=[WEATHER]).double(), model(alone[0]), rtol=1e-5, atol=1e-5)
    assert int(packed.supervised.sum()) == sum(int(one.supervised.sum()) for one in alone)
