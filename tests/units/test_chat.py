"""Chat templates, loss masks, sampling and videos."""

import copy
import unicodedata
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from test_boxes import llava
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from intermodal.errors import IntermodalError
from intermodal.generate.sample import Sampling, choose, filtered, penalised
from intermodal.inputs.chat import ChatProcessor, NoSupervision
from intermodal.inputs.media import Clip, MediaError, load_part
from intermodal.inputs.template import ChatTemplate, TemplateError
from intermodal.inputs.video import Sampling as Frames
from intermodal.inputs.video import decode, sampling_of

VICUNA = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] | trim }} {% else %}\
ASSISTANT: {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
LLAMA3 = """{% for m in messages %}<|start|>{{ m.role }}<|mid|>

{{ m.content | trim }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|mid|>

{% endif %}"""
CHATML = """{%- for message in messages %}
    {%- if message.role == "assistant" %}
        {{- '<|start|>assistant\\n' }}{% generation %}{{ message.content + '<|end|>' }}{% endgeneration %}{{ '\\n' }}
    {%- else %}
        {{- '<|start|>' + message.role + '\\n' + message.content + '<|end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{- '<|start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}\
{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"""
SHOWN = "{% for m in messages %}{% for part in m.content %}<|start|>{% endfor %}{% endfor %}"
TEMPLATES = {"vicuna": VICUNA, "llama3": LLAMA3, "chatml": CHATML, "llama2": LLAMA2}
TALK = [
    {"role": "user", "content": "Assistant: say assistant\n twice"},
    {"role": "assistant", "content": "assistant\nassistant, naïve 日本"},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Done."},
]


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    out = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    special = ("<s>", "</s>", "<|start|>", "<|mid|>", "<|end|>")
    out.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return out


def processor(template):
    named = {"bos_token": "<s>", "eos_token": "</s>" if template in (VICUNA, LLAMA2) else "<|end|>"}
    tok = tokenizer()
    return ChatProcessor(tok, ChatTemplate(template, named), end_ids=[tok.token_to_id(named["eos_token"])])


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_equal_transformers(name):
    ours = processor(TEMPLATES[name])
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), bos_token="<s>", eos_token=ours.template.special["eos_token"])
    theirs.chat_template = TEMPLATES[name]
    for messages, reply in ((TALK, False), (TALK[:1], True), (TALK[:3], True)):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        assert ours.template.render(messages, reply=reply) == text
        got = ours.conversation(messages, reply=reply)
        assert got.ids == theirs.apply_chat_template(messages, add_generation_prompt=reply, return_dict=True)["input_ids"]
        assert reply == (not any(got.supervised))
    extra = dict(tools=[{"name": "ä"}])
    assert ours.template.render(TALK, **extra) == theirs.apply_chat_template(TALK, tokenize=False, **extra)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_is_the_assistants_words_and_the_end(name):
    ours = processor(TEMPLATES[name])
    conversation = ours.conversation(TALK)
    ours.audit(conversation)
    end = ours.template.special["eos_token"]
    end = f" {end}" if name == "llama2" else end  # which never comes without the space that the template writes before it
    learned = [i for i, s in zip(conversation.ids, conversation.supervised, strict=True) if s]
    assert ours.decode(learned, special=True) == f"assistant\nassistant, naïve 日本{end}Done.{end}"


def test_white_space_that_a_template_trims():
    talk = copy.deepcopy(TALK)
    talk[1]["content"] = "  yes\n"
    ours = processor(LLAMA3)
    conversation = ours.conversation(talk)
    ours.audit(conversation)
    assert [conversation.text[a:b] for a, b in conversation.spans] == ["yes", "Done."]


def test_a_template_that_hides_the_words_is_refused():
    for source in ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "{{ messages[0].content }}"):
        with pytest.raises(TemplateError, match="as they are"):
            processor(source).conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(TemplateError, match="does not compile"):
        processor("{% for %}").conversation(TALK)
    with pytest.raises(TemplateError, match="only users"):
        processor("{{ raise_exception('only users') }}").conversation(TALK)
    with pytest.raises(TemplateError, match="text-only"):
        processor(LLAMA3).conversation([{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (4, 4))}]}])


def test_audit():
    ours = processor(LLAMA3)
    with pytest.raises(NoSupervision, match="no words"):
        ours.audit(ours.conversation(TALK[:1]))
    ours.end_ids = (ours.tokenizer.token_to_id("</s>"),)
    with pytest.raises(NoSupervision, match="no end-of-turn"):
        ours.audit(ours.conversation(TALK))
    ours = processor(LLAMA3)
    conversation = ours.conversation(TALK)
    first = conversation.supervised.index(True)
    conversation.supervised[first + 1] = False  # a gap: two runs for one message
    with pytest.raises(NoSupervision):
        ours.audit(conversation)
    conversation = ours.conversation(TALK)
    conversation.supervised[first] = False
    with pytest.raises(NoSupervision, match="spell"):
        ours.audit(conversation)


@pytest.mark.parametrize("name", TEMPLATES)
def test_replies_that_are_empty_teach_nothing(name):
    """Beside words an empty reply is one like any other: it ends at once."""
    ours = processor(TEMPLATES[name])
    for said in ("", "  \n"):
        with pytest.raises(NoSupervision, match="all that the assistant says is empty"):
            ours.audit(ours.conversation([TALK[0], {"role": "assistant", "content": said}]))
    ours.audit(ours.conversation([TALK[0], {"role": "assistant", "content": ""}, *TALK]))


@pytest.mark.parametrize(
    "said", ["5 \u212b", unicodedata.normalize("NFD", "caf\xe9"), unicodedata.normalize("NFD", "\ud55c\uad6d")]
)
def test_words_that_the_tokenizer_writes_otherwise_are_learned_as_it_writes_them(said):
    """Qwen's tokenizers compose accents and syllables first (NFC)."""
    ours = processor(CHATML)
    ours.tokenizer.normalizer = normalizers.NFC()
    conversation = ours.conversation([TALK[0], {"role": "assistant", "content": f"{said}, {said}"}])
    ours.audit(conversation)
    learned = [i for i, s in zip(conversation.ids, conversation.supervised, strict=True) if s]
    composed = unicodedata.normalize("NFC", said)
    assert composed != said
    assert ours.decode(learned, special=True) == f"{composed}, {composed}<|end|>"
    conversation.supervised[conversation.supervised.index(True)] = False
    with pytest.raises(NoSupervision, match="spell"):
        ours.audit(conversation)


def test_a_template_that_leaves_out_the_system_prompt_is_refused():
    deaf = "{% for m in messages if m.role != 'system' %}<|start|>{{ m.role }}<|mid|>{{ m.content }}<|end|>{% endfor %}"
    told = [{"role": "system", "content": "Be brief."}, *TALK]
    for reply in (True, False):
        with pytest.raises(TemplateError, match="leaves out the system prompt"):
            processor(deaf).conversation(told, reply=reply)
    processor(deaf).conversation([{"role": "system", "content": ""}, *TALK])
    processor(LLAMA3).conversation(told)


# In the manner of Qwen2's: it writes a system prompt by itself where none is given.
PROMPTS = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|start|>system<|mid|>You help.<|end|>{% endif %}\
<|start|>{{ m.role }}<|mid|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|mid|>{% endif %}"""
# It has the prompt, but no other: what is asked of it is lost.
FIXED = (
    PROMPTS.replace("loop.first and m.role != 'system'", "loop.first")
    .replace("%}\\\n", "%}")
    .replace(
        "<|start|>{{ m.role }}<|mid|>{{ m.content }}<|end|>",
        "{% if m.role != 'system' %}<|start|>{{ m.role }}<|mid|>{{ m.content }}<|end|>{% endif %}",
    )
)


def test_a_system_prompt_that_the_template_writes_anyway_is_heard():
    assert FIXED.count("m.role != 'system'") == 1
    for words in ("You help.", "Be brief.", " \n"):
        told = [{"role": "system", "content": words}, *TALK]
        for messages, reply in ((told, False), (told[:2], True)):
            assert processor(PROMPTS).conversation(messages, reply=reply).text == processor(PROMPTS).template.render(
                messages, reply=reply
            )
            if words.strip():
                with pytest.raises(TemplateError, match="leaves out the system prompt"):
                    processor(FIXED).conversation(messages, reply=reply)
            else:
                processor(FIXED).conversation(messages, reply=reply)


def test_sampling_equals_transformers_warpers():
    from transformers.generation import logits_process as theirs

    scores = torch.randn(97, generator=torch.Generator().manual_seed(0)) * 3
    ids = torch.tensor([[3, 5, 5, 9]])
    for settings, warpers in (
        (dict(temperature=0.7), [theirs.TemperatureLogitsWarper(0.7)]),
        (dict(temperature=1.3, top_k=7), [theirs.TemperatureLogitsWarper(1.3), theirs.TopKLogitsWarper(7)]),
        (dict(temperature=1.0, top_p=0.8), [theirs.TopPLogitsWarper(0.8)]),
        (dict(temperature=1.0, min_p=0.1), [theirs.MinPLogitsWarper(0.1)]),
        (
            dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
            [
                theirs.TemperatureLogitsWarper(0.9),
                theirs.TopKLogitsWarper(20),
                theirs.TopPLogitsWarper(0.9),
                theirs.MinPLogitsWarper(0.02),
            ],
        ),
    ):
        expected = scores[None]
        for warper in warpers:
            expected = warper(ids, expected)
        assert torch.equal(filtered(scores, Sampling(**settings)).isinf(), expected[0].isinf()), settings
        torch.testing.assert_close(filtered(scores, Sampling(**settings)), expected[0])
    expected = theirs.RepetitionPenaltyLogitsProcessor(1.4)(ids, scores[None])[0]
    torch.testing.assert_close(penalised(scores, ids[0], 1.4), expected)
    draws = [choose(torch.zeros(97), [], Sampling(temperature=1.0), torch.Generator().manual_seed(s)) for s in (1, 1, 2, 3, 4, 5)]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 1


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(top_p=0), dict(max_new_tokens=0), dict(stop=("",)), dict(min_p=2)])
def test_sampling_out_of_range(bad):
    with pytest.raises(IntermodalError, match=next(iter(bad))):
        Sampling(**bad).check()


def test_media_parts(tmp_path):
    image = Image.new("RGB", (6, 4), (255, 0, 0))
    file = tmp_path / "a.png"
    image.save(file)
    import base64

    uri = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    for part in (
        {"type": "image", "image": image},
        {"type": "image", "image": str(file)},
        {"type": "image", "image": f"file://{file}"},
        {"type": "image_url", "image_url": {"url": uri}},
    ):
        assert load_part(part).size == (6, 4)
    assert load_part({"type": "text", "text": "x"}) is None
    clip = load_part({"type": "video", "video": [image] * 3, "fps": 4})
    assert clip.times == (0.0, 0.25, 0.5)
    for part, message in (
        ({"type": "sound", "sound": 1}, "sound"),
        ({"type": "image_url", "image_url": {"url": "https://a/b.png"}}, "not fetched"),
        ({"type": "image", "image": "data:image/png;base64,%%"}, "base64"),
        ({"type": "image"}, "no picture"),
        ({"type": "video", "video": []}, "no frames"),
        ({"type": "video", "video": [image], "fps": 0}, "positive"),
        ({"type": "video", "video": [image, Image.new("RGB", (5, 5))]}, "one size"),
        ({"type": "video", "video": str(file) + ".mp4"}, "readable video"),
    ):
        with pytest.raises(MediaError, match=message):
            load_part(part)


def test_video_frames_and_times(tmp_path):
    """Thirty frames at ten a second, each of its own grey, written and read back."""
    import av

    file = tmp_path / "grey.mp4"
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * index, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    clip = decode(file, Frames(fps=2.0))
    assert clip.frames.shape == (6, 48, 64, 3)
    assert clip.times == pytest.approx([0.0, 0.6, 1.2, 1.7, 2.3, 2.9])
    assert np.allclose(clip.frames.mean((1, 2, 3)), [8 * round(10 * t) for t in clip.times], atol=6)
    assert clip.fps == pytest.approx(2.0)
    assert isinstance(load_part({"type": "video", "video": str(file)}), Clip)
    for asked, given in ((1, 2), (2, 2), (5, 6), (8, 8), (99, 30)):
        assert len(decode(file, Frames(frames=asked)).frames) == given  # whole pairs, and no more than there are
        assert len(decode(file, Frames(frames=asked, pair=1)).frames) == min(asked, 30)
    for part, given in (({"fps": 4}, 12), ({"fps": 0.1}, 4), ({"nframes": 7}, 8), ({"fps": 9, "nframes": 4}, 4), ({}, 10)):
        assert len(load_part({"type": "video", "video": str(file), **part}, Frames(frames=10)).frames) == given
    for part in ({"fps": "fast"}, {"fps": 0}, {"nframes": -3}):
        with pytest.raises(MediaError, match="fps"):
            load_part({"type": "video", "video": str(file), **part})
    assert Frames(fps=1.0).indices(300, 30.0)[-1] == 299
    assert len(Frames(fps=1.0).indices(300, 30.0)) == 10
    assert len(Frames(fps=8.0).indices(5, 30.0)) == 4
    with pytest.raises(MediaError, match="at least 2"):
        Frames().indices(1, 30.0)
    # 20 s are 40 frames by the usual rule; OneVision reads 32 of them, from the first to the last, or so many as are asked for
    long = tmp_path / "long.mp4"
    with av.open(str(long), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(100):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2 * index, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    planner = llava("llava_onevision")
    reader = ChatProcessor(tokenizer(), ChatTemplate(SHOWN, {}), end_ids=[], planner=replace(planner, placeholders={"video": 258}))
    shown = [{"role": "user", "content": [{"type": "video", "video": str(long)}]}]
    (clip,) = reader.conversation(shown, reply=True).items
    assert len(clip.frames) == 32
    assert (clip.times[0], clip.times[-1]) == pytest.approx((0.0, 19.8))
    reader.video = sampling_of(reader.video, None, 5)
    assert len(reader.conversation(shown, reply=True).items[0].frames) == 5
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(MediaError, match="readable video"):
        decode(file, Frames())
