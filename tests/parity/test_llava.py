"""LLaVA 1.5, LLaVA-NeXT and LLaVA-OneVision against transformers on tiny random models."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from chat_files import byte_tokenizer, write_chat_files
from files_as_met import check_bf16, check_left_over, check_shards
from packed import check_packed_equals_separate
from PIL import Image
from tokenizers.processors import TemplateProcessing
from too_long import check_too_long
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from vision_cached import check_cached_equals_uncached, check_keys, check_turns_look_once

import intermodal
from intermodal.errors import CheckpointError, SampleError
from intermodal.inputs.media import Clip, MediaError
from intermodal.inputs.template import ChatTemplate
from intermodal.inputs.tiles import Tiled, unpadded

FAMILIES = ("llava", "llava_next", "llava_onevision")
NAMES = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}
SPECIAL = ("</s>", "<image>", "<video>")
TEMPLATE = """{% for m in messages %}{{ 'USER: ' if m.role == 'user' else 'ASSISTANT: ' }}\
{% if m.content is string %}{{ m.content }}\
{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% else %}<{{ part.type }}>
{% endif %}{% endfor %}{% endif %}{{ ' ' if m.role == 'user' else '</s>' }}{% endfor %}\
{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
SIDE, PATCH = 28, 7
PINPOINTS = [[SIDE * rows, SIDE * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def settings(family):
    if family == "llava_onevision":
        return dict(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
    more = dict(image_grid_pinpoints=PINPOINTS) if family == "llava_next" else {}
    return dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **more)


def config(family, tied):
    text = dict(model_type="llama", hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
                num_key_value_heads=1, vocab_size=260, bos_token_id=None, eos_token_id=256, max_position_embeddings=4096)  # fmt: skip
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                  image_size=SIDE, patch_size=PATCH, projection_dim=16)  # fmt: skip
    more = {}
    if family == "llava_onevision":
        text["model_type"] = "qwen2"
        vision.update(model_type="siglip_vision_model", vision_use_head=False)
        more = dict(video_token_index=258, vision_aspect_ratio="anyres_max_2")
    if family != "llava":
        more["image_grid_pinpoints"] = PINPOINTS
    return getattr(transformers, f"{NAMES[family]}Config")(
        text_config=text, vision_config=vision, image_token_index=257, tie_word_embeddings=tied, **more
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = {}

    def make(family, tied=False):
        if (family, tied) not in cache:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model = getattr(transformers, f"{NAMES[family]}ForConditionalGeneration")(config(family, tied)).eval()
            for parameter in model.parameters():
                parameter.data += torch.randn_like(parameter) * (0.12 if parameter.ndim > 1 else 0.05)
            model.save_pretrained(folder)
            write_chat_files(folder, byte_tokenizer(SPECIAL), TEMPLATE, eos="</s>", **settings(family))
            cache[family, tied] = folder, model
        return cache[family, tied]

    return make


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(frames, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, 30, 50, 3), dtype=np.uint8)
    return Clip(pixels, tuple(index / 2 for index in range(frames)), 2.0)


def user(*parts):
    kinds = {str: "text", Clip: "video"}
    named = [(kinds.get(type(part), "image"), part) for part in parts]
    return {"role": "user", "content": [{"type": kind, kind: part} for kind, part in named]}


def said(text):
    return {"role": "assistant", "content": text}


CASES = {
    "no image": [user("How are you?"), said("Fine, thank you.")],
    "one image": [user(picture(97, 61, 1), "What is it?"), said("Noise.")],
    "one large image": [user(picture(260, 250, 1), "What is it?"), said("Noise.")],
    "three images of odd sizes": [
        user(picture(33, 150, 2), "and", picture(200, 40, 3), picture(57, 56, 4), "Compare."),
        said("No."),
    ],
    "two turns": [user(picture(64, 64, 9), "Who?"), said("Ann."), user(picture(30, 90, 10), "And here?"), said("Bob.")],
    "video": [user(clip(5, 5), "What happens?"), said("Flicker.")],
    "image and video": [user(picture(90, 60, 7), clip(4, 8), "Both?"), said("Yes.")],
}


def cases(family):
    return {name: messages for name, messages in CASES.items() if family == "llava_onevision" or "video" not in name}


PAIRS = [(family, case) for family in FAMILIES for case in cases(family)]


def media(messages):
    return [p[p["type"]] for m in messages if isinstance(m["content"], list) for p in m["content"] if p["type"] != "text"]


def inputs(family, batch, messages):
    """transformers' arguments for our packed conversation of one."""
    arguments = dict(input_ids=batch.ids[None], attention_mask=torch.ones_like(batch.ids[None]))
    if batch.visual is not None:
        items = media(messages)
        views = batch.visual.pixels.split([entry.views for entry in batch.visual.layout])
        images = [(item, view) for item, view in zip(items, views, strict=True) if not isinstance(item, Clip)]
        clips = [view for item, view in zip(items, views, strict=True) if isinstance(item, Clip)]
        if images and family == "llava":
            arguments["pixel_values"] = torch.cat([view for _, view in images])
        elif images:
            most = max(len(view) for _, view in images)
            pad = [torch.nn.functional.pad(view, (0, 0, 0, 0, 0, 0, 0, most - len(view))) for _, view in images]
            arguments["pixel_values"] = torch.stack(pad)
            arguments["image_sizes"] = torch.tensor([(image.height, image.width) for image, _ in images])
            if family == "llava_onevision":
                arguments["batch_num_images"] = torch.tensor([len(images)])
        if clips:
            arguments["pixel_values_videos"] = torch.stack(clips)
    return arguments


def theirs(family, model, batch, messages):
    with torch.no_grad():
        return model(**inputs(family, batch, messages)).logits[0]


@pytest.mark.parametrize(("family", "case"), PAIRS)
def test_logits(made, family, case):
    folder, model = made(family)
    ours = intermodal.load(folder)
    batch = ours.processor(CASES[case])
    expected = theirs(family, model, batch, CASES[case])
    with torch.no_grad():
        got = ours(batch)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5 if case == "no image" else 1e-4, rtol=0)
    ours.processor.audit(ours.processor.conversation(CASES[case]))


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_pixels_and_counts_equal_the_pil_processors(made, family):
    ours = intermodal.load(made(family)[0])
    kind = LlavaNextImageProcessorPil if family == "llava_next" else LlavaOnevisionImageProcessorPil
    processor = kind(**settings(family))
    rng = np.random.default_rng(0)
    for index, (width, height) in enumerate([(1, 1), (28, 28), (300, 20), *[tuple(rng.integers(3, 300, 2)) for _ in range(30)]]):
        image = picture(int(width), int(height), index)
        plan = ours.processor.planner.plan(image, 1)
        mine = ours.processor.planner.pixels([image], [plan])
        out = processor(images=image, return_tensors="pt")
        torch.testing.assert_close(mine, out["pixel_values"][0], atol=1e-6, rtol=0)
    if family == "llava_onevision":
        images = [picture(40, 90, 1), picture(90, 31, 2)]
        plans = [ours.processor.planner.plan(image, 2) for image in images]
        out = processor(images=[images], return_tensors="pt")
        torch.testing.assert_close(ours.processor.planner.pixels(images, plans), out["pixel_values"][:, 0], atol=1e-6, rtol=0)


def test_llava_pads_to_the_mean_colour(made, tmp_path):
    """The authors' `expand2square`, int(mean * 255); transformers crops unless the files say `do_pad`."""
    folder, _ = made("llava")
    ours = intermodal.load(folder)
    image = picture(50, 31, 3)
    planner = ours.processor.planner
    square = np.array(planner.views(image, planner.plan(image, 1))[0])
    assert square.shape == (50, 50, 3)
    assert (square[:9] == (122, 116, 104)).all()
    assert (square[9:40] == np.array(image)).all()
    assert (square[40:] == (122, 116, 104)).all()
    for pad in (False, True):
        target = tmp_path / str(pad)
        intermodal.save(ours, target)
        raw = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**raw, "intermodal": {"rules": "transformers"}}))
        file = target / "preprocessor_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "do_pad": pad}))
        other = intermodal.load(target).processor.planner
        expected = LlavaImageProcessorPil(**settings("llava"), do_pad=pad)(images=image, return_tensors="pt")["pixel_values"]
        got = other.pixels([image], [other.plan(image, 1)])
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_planned_equals_produced(made, family):
    """Every size from 1 to 300 in odd steps: the count of tokens known before pixels is what the tower's features become."""
    ours = intermodal.load(made(family)[0])
    planner = ours.processor.planner
    newline = ours.image_newline.detach()
    from intermodal.inputs.tiles import assemble

    for width in range(1, 301, 13):
        for height in range(1, 301, 7):
            image = Image.new("RGB", (width, height))
            for planner.authors in (False, True):
                plan = planner.plan(image, 1)
                features = torch.zeros(plan.detail.views, 16, 48)
                assert len(assemble(features, [plan.detail], 4, newline)) == plan.features
            if width % 3 == 0 and height % 4 == 0:  # the views themselves are made
                assert len(planner.pixels([image], [plan])) == plan.detail.views
            assert isinstance(plan.detail, Tiled)


def test_what_is_cut_from_a_letterbox_follows_the_authors_or_transformers():
    """PITFALLS D7: `int(x)` against `int(round(x, 7))`, which a float error in x tells apart in a few sizes of a hundred thousand."""
    assert unpadded((1188, 220), (81, 54), rounding=False) == ((0, 81), (20, 34))
    assert unpadded((1188, 220), (81, 54), rounding=True) == ((0, 81), (19, 35))
    assert unpadded((1260, 700), (81, 54), rounding=False) == ((0, 81), (5, 49))
    assert unpadded((1260, 700), (81, 54), rounding=True) == ((0, 81), (4, 50))
    place = torch.stack(torch.meshgrid(torch.arange(81), torch.arange(54), indexing="ij"))
    differ = 0
    for size in ((h, w) for h in range(100, 1600, 16) for w in range(100, 1600, 12)):
        kept = unpad_image(place, size)
        rows, columns = ((int(axis.min()), int(axis.max()) + 1) for axis in kept)
        assert unpadded(size, (81, 54), rounding=True) == (rows, columns), size
        differ += unpadded(size, (81, 54), rounding=False) != (rows, columns)
    assert 0 < differ < 30


@pytest.mark.parametrize(
    ("family", "width", "height"), [("llava_next", 188, 47), ("llava_next", 94, 376), ("llava_onevision", 188, 47)]
)
def test_a_checkpoint_with_transformers_rule_cuts_as_transformers_does(made, family, width, height, tmp_path):
    """PITFALLS D7: of 4 to 1, one feature of the short side's four is a float error away. The rule in config.json decides how many
    tokens a picture has; transformers takes its own count and no other."""
    folder, model = made(family)
    messages = [user(picture(width, height, 1), "What is it?"), said("Noise.")]
    long, short = max(width, height), min(width, height)
    assert int(short * (12 / long)) == 2
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    raw = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "intermodal": {"rules": "transformers"}}))
    ours = intermodal.load(tmp_path)
    conversation = ours.processor.conversation(messages)
    ours.processor.audit(conversation)
    (plan,) = conversation.plans
    batch = ours.processor(messages)
    arguments = inputs(family, batch, messages)
    with torch.no_grad():
        kept = model.model.get_image_features(arguments["pixel_values"], arguments["image_sizes"]).pooler_output
        assert plan.features == sum(len(part) for part in kept) == int((batch.ids == ours.config.image_id).sum())
        expected = theirs(family, model, batch, messages)
        torch.testing.assert_close(ours(batch), expected, atol=1e-4, rtol=0)
    authors = intermodal.load(folder).processor
    fewer = authors(messages)
    assert authors.conversation(messages).plans[0].features < plan.features
    with pytest.raises(ValueError, match="do not match"):
        theirs(family, model, fewer, messages)


def test_anyres_max_scales_down(made):
    ours = intermodal.load(made("llava_onevision")[0])
    planner = ours.processor.planner
    plan = planner.plan(Image.new("RGB", (260, 250)), 1)
    assert plan.detail.grid == (3, 3)
    tall, wide = plan.detail.rows[1] - plan.detail.rows[0], plan.detail.columns[1] - plan.detail.columns[0]
    times = math.sqrt(tall * wide / (2 * 16))
    assert plan.detail.scaled == (int(tall // times), int(wide // times))
    assert planner.plan(Image.new("RGB", (28, 28)), 1).detail.scaled is None


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(made, family):
    check_packed_equals_separate(intermodal.load(made(family)[0], dtype="float64"), cases(family).values())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(made, family):
    """Of every case, 64 tokens are those of transformers' own `generate`; many at a time they are those of each alone."""
    folder, model = made(family)
    ours = intermodal.load(folder)
    ours.processor.end_ids = ()
    model.generation_config.eos_token_id = None
    asked = [talk[:-1] for talk in cases(family).values()]
    for case, talk in zip(cases(family), asked, strict=True):
        prompt = ours.processor(talk, reply=True)
        wanted = model.generate(**inputs(family, prompt, talk), max_new_tokens=64, do_sample=False, pad_token_id=0)
        assert ours.generate(talk, max_new_tokens=64).ids == wanted[0, len(prompt.ids) :].tolist(), case
    alone = [ours.generate(talk, max_new_tokens=12).ids for talk in asked]
    assert [reply.ids for reply in ours.generate_batch(asked, max_new_tokens=12, slots=3)] == alone


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(made, family, tied, tmp_path):
    folder, model = made(family, tied)
    intermodal.save(intermodal.load(folder), tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert intermodal.load(tmp_path).config == intermodal.load(folder).config  # the hub's layout, which we write, reads back


def test_refusals(made, tmp_path):
    folder, _ = made("llava")
    ours = intermodal.load(folder)
    with pytest.raises(MediaError, match="placeholder token itself"):
        ours.processor([user("What does <image> mean?"), said("A tag.")])
    with pytest.raises(MediaError, match="takes no videos"):
        ours.processor([user(clip(4, 1), "?"), said("!")])
    raw = json.loads((folder / "config.json").read_text())
    for change, message in (
        (dict(vision_feature_layer=[-2, -5]), "several layers"),
        (dict(vision_config={"model_type": "dino"}), "dino"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
        with pytest.raises(CheckpointError, match=message):
            intermodal.load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_the_tower_changes_nothing(made, family, tmp_path):
    ours = intermodal.load(made(family)[0])
    talks = [messages for name, messages in cases(family).items() if name != "no image"]
    check_cached_equals_uncached(ours, talks, tmp_path)
    check_keys(ours.processor, picture(40, 50, 1), picture(40, 50, 2))
    check_turns_look_once(ours, CASES["one image"][:1], user("And then?"))


def test_a_reply_that_spells_a_placeholder_can_be_said_again(made):
    """Its characters would be taken for a picture in the next turn: `chat` keeps what the model said without them."""
    ours = intermodal.load(made("llava")[0])
    name = ours.processor.tokenizer.id_to_token(ours.processor.planner.placeholders["image"])
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": f"a {name} b"}, {"role": "user", "content": "and?"}]
    with pytest.raises(MediaError, match="placeholder"):
        ours.processor.conversation(said, reply=True)
    said[1]["content"] = ours.processor.sayable(said[1]["content"])
    assert said[1]["content"] == "a  b"
    assert ours.processor.conversation(said, reply=True).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_too_long_counts_what_is_shown(made, family, monkeypatch):
    check_too_long(intermodal.load(made(family)[0]), CASES["three images of odd sizes"], user("And then?"), monkeypatch)


PARTS_ONLY = """{% for m in messages %}{{ m.role | upper }}: {% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>
{% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %}\
{{ '</s>' if m.role == 'assistant' else ' ' }}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


def test_a_template_that_only_looks_for_parts_hears_strings_too(made):
    """The released LLaVA 1.5's and OneVision's pick parts by type, and would say nothing of a string."""
    processor = intermodal.load(made("llava")[0]).processor
    processor.template = ChatTemplate(PARTS_ONLY)
    assert processor.template.drops_strings
    assert not ChatTemplate(TEMPLATE).drops_strings
    words = [("user", "what is two plus two ?"), ("assistant", "four"), ("user", "and three ?"), ("assistant", "five")]
    strings = [{"role": role, "content": text} for role, text in words]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in words]
    heard = processor.conversation(strings)
    assert heard.ids == processor.conversation(parts).ids
    assert heard.text == "USER: what is two plus two ? ASSISTANT: four</s>USER: and three ? ASSISTANT: five</s>"
    processor.audit(heard)
    picture = {"type": "image", "image": Image.new("RGB", (9, 9))}
    shown = [{"role": "user", "content": [picture, {"type": "text", "text": "what ?"}]}, *strings[1:3]]
    assert "four</s>USER: and three ? ASSISTANT:" in processor.conversation(shown, reply=True).text


FIRST_PART = """{% for m in messages %}{% if m.role == 'system' %}<<{{ m.content[0].text }}>> {% elif m.role == 'user' %}[INST] \
{% for part in m.content | selectattr('type', 'equalto', 'image') %}<image>
{% endfor %}{% for part in m.content | selectattr('type', 'equalto', 'text') %}{{ part.text }}{% endfor %} [/INST]\
{% else %} {{ m.content[0].text }}</s>{% endif %}{% endfor %}"""


def test_a_template_that_fails_at_strings_hears_them_too(made):
    """In the manner of the released LLaVA-NeXT's with Mistral; `chat` keeps what the model said as a string."""
    processor = intermodal.load(made("llava")[0]).processor
    processor.template = ChatTemplate(FIRST_PART)
    picture = {"type": "image", "image": Image.new("RGB", (9, 9))}
    shown = {"role": "user", "content": (picture, {"type": "text", "text": "what ?"})}  # a tuple is as good as a list
    talk = [{"role": "system", "content": "Be brief."}, shown, {"role": "assistant", "content": "four"}]
    heard = processor.conversation(talk)
    assert (heard.text, len(heard.plans)) == ("<<Be brief.>> [INST] <image>\nwhat ? [/INST] four</s>", 1)
    processor.audit(heard)
    assert processor.conversation([*talk, {"role": "user", "content": "and ?"}], reply=True).text.endswith(
        "</s>[INST] and ? [/INST]"
    )


@pytest.mark.parametrize("written", [False, True])
def test_the_token_that_begins_a_text_is_there_once(made, written):
    """LLaVA 1.5's template leaves it to the tokenizer, others write it; ids are those of transformers' tokenizer, called as its
    processors call it (`processing_utils.py`: special tokens unless the text begins with one)."""
    tokenizer = byte_tokenizer(("</s>", "<image>", "<video>", "<s>"))
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    processor = intermodal.load(made("llava")[0]).processor
    processor.tokenizer = tokenizer
    processor.template = ChatTemplate(("{{ bos_token }}" if written else "") + TEMPLATE, {"bos_token": "<s>"})
    talk = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "I"}]
    said = processor.conversation(talk)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")
    assert said.ids == theirs(said.text, add_special_tokens=not said.text.startswith("<s>")).input_ids
    assert said.ids.count(begin) == 1
    assert said.ids[0] == begin
    processor.audit(said)


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_a_tied_head_that_only_the_text_config_tells_of(made, family, tmp_path):
    """As released OneVision directories: `tie_word_embeddings` is false at the top, true in `text_config`, and there is no head."""
    folder, _ = made(family, True)
    shutil.copytree(folder, tmp_path / "tied")
    config = json.loads((tmp_path / "tied" / "config.json").read_text())
    config["tie_word_embeddings"] = False
    config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "tied" / "config.json").write_text(json.dumps(config))
    loaded = intermodal.load(tmp_path / "tied")
    assert loaded.lm_head is None
    talk = [{"role": "user", "content": "hello"}]
    assert torch.equal(loaded.logits(talk), intermodal.load(folder).logits(talk))


RELEASED = """{% for m in messages %}<|im_start|>{{ m['role'] + ' ' }}\
{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}\
{{ '<image>' }}{% endfor %}{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + part['text'] }}{% endfor %}\
{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
"""In the manner of the released OneVision's: pictures first, and a line break before every text."""


@pytest.mark.parametrize("template", [TEMPLATE, RELEASED, PARTS_ONLY])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_that_the_assistant_shows_are_read_and_its_words_are_learned(made, family, template):
    model = intermodal.load(made(family)[0], dtype="float64")
    processor = model.processor
    processor.template = ChatTemplate(template, processor.template.special)
    shows = [user(picture(30, 40, seed))["content"][0] for seed in (1, 2)]
    words = [{"type": "text", "text": text} for text in ("see ", " or", "none")]
    talk = [user("which ?"), {"role": "assistant", "content": [words[0], shows[0], words[1], shows[1]]}]
    talk += [
        user("and ?"),
        {"role": "assistant", "content": [shows[0], words[2]]},
        user("so ?"),
        {"role": "assistant", "content": shows},
    ]
    conversation = processor.conversation(talk)
    processor.audit(conversation)
    learned = [token for token, on in zip(conversation.ids, conversation.supervised, strict=True) if on]
    assert processor.decode(learned, special=True) == "see  or</s>none</s>"
    check_packed_equals_separate(model, [talk, CASES["two turns"], talk[:2]])


@pytest.mark.parametrize("family", FAMILIES)
def test_files_in_bf16_and_in_shards(made, family, tmp_path):
    folder, model = made(family)
    talk = CASES["three images of odd sizes"]
    for check in (check_bf16, check_shards):
        check(
            folder, copy.deepcopy(model), talk, lambda model, batch: theirs(family, model, batch, talk), tmp_path / check.__name__
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_files_with_buffers_of_old_releases(made, family, tmp_path):
    folder, model = made(family)
    talk = CASES["one image"]
    keys = ["vision_tower.vision_model.embeddings.position_ids", "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"]
    keys += ["language_model.model.rotary_emb.inv_freq"]
    check_left_over(folder, talk, keys, tmp_path / "out", lambda model, batch: theirs(family, model, batch, talk), model)


@pytest.mark.parametrize("fps", ["x", 0, True])
def test_frames_at_no_rate_are_refused(made, fps):
    frames = [Image.new("RGB", (9, 9))] * 2
    read = intermodal.load(made("llava_onevision")[0]).processor
    with pytest.raises(MediaError, match="fps"):
        read([{"role": "user", "content": [{"type": "video", "video": frames, "fps": fps}]}])
    nothing, null = ([{"role": "user", "content": [{"type": "video", "video": frames, **more}]}] for more in ({}, {"fps": None}))
    assert torch.equal(read(null).ids, read(nothing).ids), "tables write null where nothing is said"


def test_half_a_character_is_a_reject(made):
    for content in ("\ud800 q", [{"type": "text", "text": "q \ud83d"}]):
        with pytest.raises(SampleError, match="half a character"):
            intermodal.load(made("llava")[0]).processor([{"role": "user", "content": content}])
