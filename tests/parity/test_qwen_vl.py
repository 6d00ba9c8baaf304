"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL against transformers on tiny random models: ids, pixels, positions, logits, generation, files."""

import ast
import copy
import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import transformers
from chat_files import QWEN_SPECIAL, QWEN_TEMPLATE, byte_tokenizer, write_chat_files
from files_as_met import check_bf16, check_left_over, check_shards
from packed import check_packed_equals_separate
from PIL import Image
from safetensors.torch import load_file
from too_long import check_too_long
from typer.testing import CliRunner
from vision_cached import check_cached_equals_uncached, check_keys, check_turns_look_once

import intermodal
from intermodal.cli.app import app
from intermodal.inputs.chat import NoSupervision
from intermodal.inputs.media import Clip, MediaError, load_part
from intermodal.inputs.messages import placed
from intermodal.losses_tokens import next_token_loss
from intermodal.models.generative import Generative
from intermodal.train.optim import choose_learning
from intermodal.train.recipe import LoopConfig, OptimConfig, Stage, StagedRecipe, StitchConfig, TalksConfig
from intermodal.train.stages import train_stages

sys.path.insert(0, str(Path(__file__).parents[1] / "properties"))
from ranks import on_ranks

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CLASSES = {
    "qwen2_vl": (transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration),
    "qwen3_vl": (transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration),
}


def config(family, tied=False):
    tokens = {name: 256 + QWEN_SPECIAL.index(text) for name, text in (
        ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
        ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"))}  # fmt: skip
    text = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=1,
                vocab_size=270, bos_token_id=None, eos_token_id=258, max_position_embeddings=4096)  # fmt: skip
    rope = dict(rope_type="default", rope_theta=1e4)
    if family == "qwen2_vl":
        text["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
        vision = dict(depth=2, embed_dim=32, hidden_size=48, num_heads=2, mlp_ratio=2)
    elif family == "qwen2_5_vl":
        text["rope_parameters"] = {**rope, "mrope_section": [2, 3, 3]}
        vision = dict(depth=3, hidden_size=32, out_hidden_size=48, num_heads=2, intermediate_size=40, fullatt_block_indexes=[1],
                      tokens_per_second=2)  # fmt: skip
    else:
        text.update(head_dim=16, rope_parameters={**rope, "mrope_section": [4, 2, 2]})
        vision = dict(depth=4, hidden_size=32, out_hidden_size=48, num_heads=2, intermediate_size=40,
                      deepstack_visual_indexes=[0, 2], num_position_embeddings=36)  # fmt: skip
    return CLASSES[family][0](text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)


def processor_settings(family):
    third = family == "qwen3_vl"
    patch = 16 if third else 14
    return dict(patch_size=patch, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 4 * (2 * patch) ** 2,
                "longest_edge": 30 * (2 * patch) ** 2}, **({"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if third else {}))  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = {}

    def make(family, tied=False):
        if (family, tied) not in cache:
            folder = tmp_path_factory.mktemp(family)
            torch.manual_seed(0)
            model = CLASSES[family][1](config(family, tied)).eval()
            for parameter in model.parameters():
                parameter.data += torch.randn_like(parameter) * (0.12 if parameter.ndim > 1 else 0.05)
            model.save_pretrained(folder)
            write_chat_files(folder, byte_tokenizer(QWEN_SPECIAL), QWEN_TEMPLATE, eos="<|im_end|>", **processor_settings(family))
            cache[family, tied] = folder, model
        return cache[family, tied]

    return make


def picture(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def clip(frames, width, height, fps, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    return Clip(pixels, tuple(index / fps for index in range(frames)), fps)


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else
            {"type": "video", "video": p} if isinstance(p, Clip) else {"type": "image", "image": p} for p in parts]}  # fmt: skip


def said(text):
    return {"role": "assistant", "content": text}


CASES = {
    "no image": [user("How are you?"), said("Fine, thank you.")],
    "one image": [user(picture(97, 61, 1), "What is it?"), said("Noise.")],
    "three images of odd sizes": [
        user(picture(33, 150, 2), "and", picture(200, 40, 3), picture(57, 56, 4), "Compare."),
        said("No."),
    ],
    "video": [user(clip(7, 70, 50, 2.0, 5), "What happens?"), said("Flicker.")],
    "long video": [user(clip(28, 40, 40, 1.0, 6), "And?"), said("More.")],
    "image and video": [user(picture(90, 60, 7), clip(4, 64, 96, 3.0, 8), "Both?"), said("Yes.")],
    "two turns": [user(picture(64, 64, 9), "Who?"), said("Ann."), user(picture(30, 90, 10), "And here?"), said("Bob.")],
}


def inputs(family, model, batch, clips):
    """transformers' arguments for our packed conversation of one."""
    visual = batch.visual
    kinds = (batch.ids == model.config.image_token_id).long() + 2 * (batch.ids == model.config.video_token_id).long()
    arguments = dict(
        input_ids=batch.ids[None], attention_mask=torch.ones_like(batch.ids[None]), mm_token_type_ids=kinds[None].int()
    )
    if visual is not None:
        order = [256 + QWEN_SPECIAL.index("<|video_pad|>") if grid[0] > 1 else 0 for grid in visual.grids]
        sizes = [t * h * w for t, h, w in visual.grids]
        pieces = visual.pixels.split(sizes)
        for name, keep in (("image", [not o for o in order]), ("video", [bool(o) for o in order])):
            if any(keep):
                pixels = torch.cat([p for p, k in zip(pieces, keep, strict=True) if k])
                arguments["pixel_values" if name == "image" else "pixel_values_videos"] = pixels
                grids = torch.tensor([g for g, k in zip(visual.grids, keep, strict=True) if k])
                arguments[f"{name}_grid_thw"] = grids
    if family == "qwen2_5_vl" and clips:
        arguments["second_per_grid_ts"] = torch.tensor([2 / c.fps for c in clips])
    return arguments


def theirs(family, model, batch, clips, position_ids=None):
    """transformers' logits and positions for our packed conversation of one."""
    arguments = inputs(family, model, batch, clips)
    rope = {k: v for k, v in arguments.items() if k in ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw",
            "second_per_grid_ts", "attention_mask")}  # fmt: skip
    positions = model.model.get_rope_index(**rope)[0][:, 0]
    with torch.no_grad():
        out = model(**arguments, position_ids=(positions if position_ids is None else position_ids)[:, None]).logits[0]
    return out, positions


def clips_of(messages):
    return [part["video"] for m in messages if isinstance(m["content"], list) for part in m["content"] if "video" in part]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_positions(made, family, case):
    folder, model = made(family)
    ours = intermodal.load(folder)
    batch = ours.processor(CASES[case])
    # authors' positions given to transformers: the networks must agree whatever the rule
    expected, hf_positions = theirs(family, model, batch, clips_of(CASES[case]), batch.positions)
    with torch.no_grad():
        got = ours(batch)
    assert expected.abs().mean() > 0.1
    atol = 1e-5 if case == "no image" else 1e-4
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)
    torch.testing.assert_close(ours.logits(CASES[case]), expected, atol=atol, rtol=0)
    # transformers' rule, read from the checkpoint's own config
    ours.processor.planner.authors = False
    other = ours.processor(CASES[case])
    if len(other.ids) == len(batch.ids):  # Qwen3-VL's wrapper differs otherwise
        expected, hf_positions = theirs(family, model, other, clips_of(CASES[case]))
    else:
        hf_positions = theirs(family, model, other, clips_of(CASES[case]))[1]
    assert torch.equal(other.positions, hf_positions)


@pytest.mark.parametrize("case", ["video", "image and video"])
def test_transformers_form_of_a_qwen3_video(made, case):
    """PITFALLS D2: transformers replaces the inner pad alone, so that the wrapper stays around the frames: ids, positions, logits."""
    folder, model = made("qwen3_vl")
    ours = intermodal.load(folder)
    ours.processor.planner.authors = False
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    conversation = ours.processor.conversation(CASES[case])
    ours.processor.audit(conversation)
    text = tokenizer.apply_chat_template(ours_plain(CASES[case]), tokenize=False)
    for plan in conversation.plans:
        pad = f"<|{plan.kind}_pad|>"
        frames = "<|vision_start|>" + pad * (plan.features // len(plan.runs)) + "<|vision_end|>"
        if plan.kind == "image":
            text = text.replace(f"<|vision_start|>{pad}<|vision_end|>", frames, 1)
        else:
            times = ours.processor.planner.timestamps(clips_of(CASES[case])[0])
            written = "".join(f"<{time:.1f} seconds>{frames}" for time in times)
            text = text.replace(f"<|vision_start|>{pad}<|vision_end|>", f"<|vision_start|>{written}<|vision_end|>", 1)
    assert conversation.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = ours.processor(CASES[case])
    expected, positions = theirs("qwen3_vl", model, batch, clips_of(CASES[case]))
    assert torch.equal(batch.positions, positions)
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_text_after_a_long_clip_follows_the_authors(made, family):
    """PITFALLS D1: transformers gives it positions inside the clip."""
    ours = intermodal.load(made(family)[0])
    batch = ours.processor(CASES["long video"])
    last = int(batch.visual_rows[-1])
    assert (batch.positions[:, last + 1] == batch.positions[:, : last + 1].max() + 1).all()
    ours.processor.planner.authors = False
    other = ours.processor(CASES["long video"])
    last = int(other.visual_rows[-1])
    assert (other.positions[:, last + 1] <= other.positions[:, : last + 1].max()).all()


def test_the_rule_is_part_of_the_checkpoint(made, tmp_path):
    folder, _ = made("qwen2_vl")
    ours = intermodal.load(folder)
    intermodal.save(ours, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, "intermodal": {"rules": "transformers"}}))
    again = intermodal.load(tmp_path)
    assert again.config.rules == "transformers"
    assert not again.processor.planner.authors
    intermodal.save(again, tmp_path / "more")
    assert json.loads((tmp_path / "more" / "config.json").read_text())["intermodal"] == {"rules": "transformers"}


@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_equal_the_pil_processor(made, family):
    ours = intermodal.load(made(family)[0])
    theirs = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(**processor_settings(family))
    rng = np.random.default_rng(0)
    sizes = [(1, 1), (13, 14), (42, 70), (200, 1), (3000, 20), *[tuple(rng.integers(5, 400, 2)) for _ in range(25)]]
    for index, (width, height) in enumerate(sizes):
        image = picture(int(width), int(height), index)
        plan = ours.processor.planner.plan(image, 1)
        mine = ours.processor.planner.visual([plan], ours.processor.planner.pixels([image], [plan]))
        out = theirs(images=image, return_tensors="pt")
        assert [list(g) for g in mine.grids] == out["image_grid_thw"].tolist()
        assert plan.features * 4 == len(mine.pixels)
        torch.testing.assert_close(mine.pixels, out["pixel_values"], atol=1e-6, rtol=0)


def rule_of(family):
    """transformers' rule for a clip's size, out of its source file: the module itself needs torchvision to import."""
    family = "qwen3_vl" if family == "qwen3_vl" else "qwen2_vl"
    file = Path(transformers.__file__).parent / "models" / family / f"video_processing_{family}.py"
    (found,) = (n for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "smart_resize")
    names = {"math": math}
    exec(ast.unparse(found), names)
    return names["smart_resize"]


CLIPS = [
    (64, 720, 1280),
    (8, 720, 1280),
    (700, 720, 1280),
    (4, 100, 60),
    (64, 50, 40),
    (768, 2160, 3840),
    (2, 1080, 1920),
    (3, 33, 64),
]
AUTHORS = {  # of `qwen_vl_utils.vision_process` 0.0.14, for patches of 14 and of 16
    28: [(560, 1008), (560, 1008), (364, 672), (420, 252), (364, 308), (336, 644), (560, 1008)],
    32: [(640, 1152), (640, 1152), (416, 768), (480, 288), (416, 352), (384, 736), (640, 1152)],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["flat", "nested", "pictures' file"])
def test_the_size_of_a_clip_follows_the_authors_or_the_file(made, tmp_path, family, layout):
    """PITFALLS D3: the authors have a budget a frame and a clip, transformers what the video processor's file says."""
    shutil.copytree(made(family)[0], tmp_path, dirs_exist_ok=True)
    unit = 32 if family == "qwen3_vl" else 28
    size = {"shortest_edge": 130 * unit**2, "longest_edge": 900 * unit**2}
    if layout == "flat":
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": size}))
    elif layout == "nested":
        pictures = json.loads((tmp_path / "preprocessor_config.json").read_text())
        both = {"image_processor": pictures, "video_processor": {"size": size}}
        (tmp_path / "processor_config.json").write_text(json.dumps(both))
        (tmp_path / "video_preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 1, "longest_edge": 2}}))
    else:
        size = processor_settings(family)["size"]
    planner = intermodal.load(tmp_path).processor.planner
    clips = [SimpleNamespace(frames=range(frames), size=(width, height)) for frames, height, width in CLIPS]
    assert [planner.clip_size(clip) for clip in clips[: len(AUTHORS[unit])]] == AUTHORS[unit]
    theirs = replace(planner, authors=False)
    bounds = dict(factor=unit, min_pixels=size["shortest_edge"], max_pixels=size["longest_edge"])
    for clip, (frames, height, width) in zip(clips, CLIPS, strict=True):
        more = dict(num_frames=frames, temporal_factor=2) if family == "qwen3_vl" else {}
        expected = rule_of(family)(height=height, width=width, **more, **bounds)
        assert theirs.clip_size(clip) == expected, (frames, height, width)
    assert planner.min_pixels == processor_settings(family)["size"]["shortest_edge"]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_and_mask(made, family):
    """One tokenisation of the fully written text by transformers' tokenizer gives the same ids."""
    folder, _ = made(family)
    ours = intermodal.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for messages in CASES.values():
        conversation = ours.processor.conversation(messages)
        ours.processor.audit(conversation)
        text = tokenizer.apply_chat_template(ours_plain(messages), tokenize=False)
        plans = iter(conversation.plans)

        def written(match, plans=plans, messages=messages):
            plan, pad = next(plans), match.group(1)
            if plan.text is None:
                return f"<|vision_start|>{pad * plan.features}<|vision_end|>"
            # the authors' format: timestamps take the place of the whole wrapper
            pads = pad * (plan.features // len(plan.runs))
            times = [f"{t:.1f}" for t in ours.processor.planner.timestamps(clips_of(messages)[0])]
            return "".join(f"<{time} seconds><|vision_start|>{pads}<|vision_end|>" for time in times)

        text = re.sub(r"<\|vision_start\|>(<\|(?:image|video)_pad\|>)<\|vision_end\|>", written, text)
        assert conversation.ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        learned = "".join(tokenizer.decode([i]) for i, s in zip(conversation.ids, conversation.supervised, strict=True) if s)
        assert learned == "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")


def ours_plain(messages):
    return [{**m, "content": m["content"] if isinstance(m["content"], str) else
             [{"type": p["type"], **({"text": p["text"]} if "text" in p else {})} for p in m["content"]]} for m in messages]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate(made, family):
    """Text, pictures and clips, M-RoPE included."""
    check_packed_equals_separate(intermodal.load(made(family)[0], dtype="float64"), CASES.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation(made, family):
    folder, model = made(family)
    ours = intermodal.load(folder)
    ours.processor.end_ids = ()  # as long as asked
    messages = CASES["three images of odd sizes"][:1]
    prompt = ours.processor(messages, reply=True)
    assert prompt.ids[-10:].tolist() == ours.processor.encode("assistant\n")[-10:]
    model.generation_config.eos_token_id = None
    for case, talk in CASES.items():
        asked = talk[:-1]
        ours.processor.planner.authors = "video" not in case  # D1: transformers places what follows a clip by its own rule
        batch = ours.processor(asked, reply=True)
        arguments = inputs(family, model, batch, clips_of(asked))
        wanted = model.generate(**arguments, max_new_tokens=64, do_sample=False, pad_token_id=0)
        assert ours.generate(asked, max_new_tokens=64).ids == wanted[0, len(batch.ids) :].tolist(), case
    ours.processor.planner.authors = True
    conversations = [messages, CASES["video"][:1], CASES["no image"][:1], CASES["two turns"][:3]]
    one_by_one = [ours.generate(m, max_new_tokens=12).ids for m in conversations]
    assert [r.ids for r in ours.generate_batch(conversations, max_new_tokens=12, slots=3)] == one_by_one


def test_a_frozen_tower_keeps_nothing_for_the_backward(made):
    """No tensor is saved while the tower looks at a picture and a clip, and no gradient comes to it, unless it learns itself."""
    model = intermodal.load(made("qwen2_5_vl")[0]).train()
    batch = model.processor(CASES["image and video"])
    tower = model.tower_parameters().keys()
    for learn in ((("*", 1.0),), (("visual.merger.*", 1.0), ("model.*", 1.0)), (("visual.merger.*", 1.0),)):
        factors, saved = choose_learning(model, learn), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, saved=saved: saved.append(tensor) or tensor, lambda t: t):
            states = model.see(batch.visual)
        learns = not tower.isdisjoint(factors)
        assert learns == (learn == (("*", 1.0),))
        assert bool(saved) == learns
        assert all((state.grad_fn is not None) == state.requires_grad == learns for state in states)
        model.zero_grad(set_to_none=True)
        next_token_loss(model.hidden(batch), model.head_weight, batch)[0].backward()
        assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == factors.keys()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(made, family, tied, tmp_path):
    folder, model = made(family, tied)
    intermodal.save(intermodal.load(folder), tmp_path)
    again = CLASSES[family][1].from_pretrained(tmp_path).eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_planned_equals_produced_over_thousands_of_sizes(made, family):
    """The count of tokens known before pixels is what the merged patches become; the tower itself says so for some of them."""
    ours = intermodal.load(made(family)[0])
    planner = replace(ours.processor.planner, min_pixels=planner_side(ours) ** 2, max_pixels=16 * planner_side(ours) ** 2)
    sizes = [
        (width, height)
        for width in range(1, 400, 7)
        for height in range(1, 400, 11)
        if max(width, height) < 200 * min(width, height)
    ]
    assert len(sizes) > 2000
    for number, size in enumerate(sizes):
        picture = Image.new("RGB", size)
        plan = planner.plan(picture, 1)
        visual = planner.visual([plan], planner.pixels([picture], [plan]))
        tokens = sum(len(piece) for run in plan.runs for piece in run)
        assert tokens * planner.merge**2 == len(visual.pixels), size
        assert np.prod(visual.grids[0]) == len(visual.pixels)
        if number % 200 == 0:
            with torch.no_grad():
                assert len(ours.connect(ours.see(visual), visual)[0]) == tokens
    for authors in (True, False):
        clips = replace(planner, authors=authors, video_pixels=(planner.min_pixels, 40 * planner.max_pixels))
        for frames in (1, 2, 3, 5):
            for size in ((31, 90), (200, 64), (97, 97)):
                clip = Clip(np.zeros((frames, size[1], size[0], 3), np.uint8), tuple(range(frames)), 1.0)
                plan = clips.plan(clip, 1)
                tokens = sum(len(piece) for run in plan.runs for piece in run)
                assert tokens * planner.merge**2 == len(clips.pixels([clip], [plan])), (frames, size)


def planner_side(model):
    """Pixels of a token's side."""
    return model.processor.planner.factor


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_the_tower_changes_nothing(made, family, tmp_path):
    ours = intermodal.load(made(family)[0])
    talks = [CASES[case] for case in ("one image", "three images of odd sizes", "two turns", "video", "image and video")]
    check_cached_equals_uncached(ours, talks, tmp_path)
    check_keys(ours.processor, picture(40, 50, 1), picture(40, 50, 2))
    check_turns_look_once(ours, CASES["one image"][:1], user("And then?"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_position_can_be_looked_at(made, family):
    from intermodal.evaluate.inspect import page, positions

    processor = intermodal.load(made(family)[0]).processor
    conversation = processor.conversation(CASES["image and video"])
    rows, batch = positions(processor, conversation), processor.batch(conversation)
    assert [row.place for row in rows] == [tuple(column) for column in batch.positions.T.tolist()]
    assert [row.index for row in rows if row.item is not None] == batch.visual_rows.tolist()
    assert [row.learned for row in rows] == batch.supervised.tolist()
    still = [row for row in rows if row.item == 0]
    assert (still[0].box[:2], still[-1].box[2:]) == ((0, 0), (90, 60))
    frames = [row.frame for row in rows if row.modality == "video"]
    assert sorted(set(frames)) == list(range(2))  # four frames, in pairs
    assert frames == sorted(frames)
    drawn = page(processor, [("line 1", conversation, "good <b>", True), ("line 2", None, "bad", False)])
    assert drawn.count("<span") == len(rows)
    assert "good &lt;b&gt;" in drawn
    assert drawn.count("data:image/png;base64,") == 3


def test_box_parts_are_written_as_the_family_does(made):
    processor = intermodal.load(made("qwen2_vl")[0]).processor
    box = {"type": "box", "box": [10, 12, 50, 60], "label": "a dog"}
    told = [
        {"role": "user", "content": [{"type": "image", "image": picture(100, 120, 1)}, {"type": "text", "text": "Where is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "There: "}, box]},
    ]
    conversation = processor.conversation(told)
    processor.audit(conversation)
    start, stop = conversation.spans[0]
    written = "<|object_ref_start|>a dog<|object_ref_end|><|box_start|>(100,100),(500,500)<|box_end|>"
    assert conversation.text[start:stop] == f"There: {written}"
    for wrong, message in (
        ({**box, "item": 1}, "belongs to item 1"),
        ({**box, "box": [1, 2]}, "cannot be written"),
        ({**box, "box": [500, 0, 600, 9]}, "no area"),
    ):
        with pytest.raises(MediaError, match=message):
            processor.conversation([told[0], {"role": "assistant", "content": [wrong]}])


@pytest.mark.parametrize("family", FAMILIES)
def test_files_in_bf16_and_in_shards(made, family, tmp_path):
    folder, model = made(family)
    talk = CASES["image and video"]

    def logits(model, batch):
        return theirs(family, model, batch, clips_of(talk), batch.positions)[0]

    for check in (check_bf16, check_shards):
        check(folder, copy.deepcopy(model), talk, logits, tmp_path / check.__name__)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_with_buffers_of_old_releases(made, family, tmp_path):
    folder, model = made(family)
    talk = CASES["one image"]
    text, tower = ("model.language_model", "model.visual") if family == "qwen3_vl" else ("model", "visual")
    keys = [f"{text}.layers.0.self_attn.rotary_emb.inv_freq", f"{text}.rotary_emb.inv_freq", f"{tower}.rotary_pos_emb.inv_freq"]

    def logits(model, batch):
        return theirs(family, model, batch, [], batch.positions)[0]

    check_left_over(folder, talk, keys, tmp_path / "out", logits, model)


def shown_by_the_assistant():
    """Pictures and a clip among and around the assistant's words, and a message that is a picture alone."""
    text = [{"type": "text", "text": words} for words in ("Look: ", " a cat, and ", "none")]
    still, other = ({"type": "image", "image": picture(60, 90, seed)} for seed in (1, 2))
    return [
        user("Which?"), {"role": "assistant", "content": [text[0], still, text[1], other]},
        user("And?"), {"role": "assistant", "content": [{"type": "video", "video": clip(4, 60, 60, 2.0, 3)}, still, text[2]]},
        user("Again?"), {"role": "assistant", "content": [other]}, user("So?"), said("Bye."),
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_that_the_assistant_shows_are_read_and_its_words_are_learned(made, family, tmp_path):
    """It cannot draw: of what stands for a picture nothing is supervised, its frame and timestamps included."""
    folder, _ = made(family)
    model = intermodal.load(folder, dtype="float64")
    processor, talk = model.processor, shown_by_the_assistant()
    conversation = processor.conversation(talk)
    processor.audit(conversation)
    learned = [token for token, on in zip(conversation.ids, conversation.supervised, strict=True) if on]
    assert processor.decode(learned, special=True) == "Look:  a cat, and <|im_end|>none<|im_end|>Bye.<|im_end|>"
    check_packed_equals_separate(model, [talk, CASES["two turns"], talk[:2], CASES["no image"]])
    # what is lost, doubled or moved is refused still
    places = [index for index, on in enumerate(conversation.supervised) if on]
    frame = conversation.ids.index(256 + QWEN_SPECIAL.index("<|vision_start|>"))
    for change in ({places[0]: False}, {places[8]: False}, {places[-2]: False}, {places[-1]: False}, {frame: True}, {1: True},
                   {frame + 1: True}, dict.fromkeys(places[:7], False), {places[20]: False, places[-3]: False}):  # fmt: skip
        mask = [change.get(index, on) for index, on in enumerate(conversation.supervised)]
        with pytest.raises(NoSupervision):
            processor.audit(replace(conversation, supervised=mask))
    with pytest.raises(NoSupervision, match="spell"):
        processor.audit(replace(conversation, turns=[conversation.turns[0], *conversation.turns]))
    with pytest.raises(NoSupervision, match="beyond them"):
        processor.audit(replace(conversation, turns=conversation.turns[:-1]))
    alone = processor.conversation(talk[4:6])
    with pytest.raises(NoSupervision, match="no words"):
        processor.audit(alone)
    # as `intermodal inspect` shows it
    picture(60, 90, 1).save(tmp_path / "a.png")
    for part in talk[1]["content"]:
        part.update({"image": "a.png"} if part["type"] == "image" else {})
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": [*talk[:2], *talk[6:]]}))
    page = tmp_path / "look.html"
    done = CliRunner().invoke(app, ["inspect", str(folder), str(tmp_path / "t.jsonl"), "--html", str(page)])
    assert done.exit_code == 0, done.output
    assert "exactly the assistant's words" in " ".join(done.output.split())
    assert f", {len('Look:  a cat, and ') + len('Bye.') + 2} learned, " in done.output
    assert page.read_text().count("label on") == len("Look:  a cat, and ") + len("Bye.") + 2


def _on_rank(rank, size, recipe, out):
    train_stages(recipe, out, quiet=True)


@pytest.mark.parametrize(("family", "parallel"), [("qwen2_vl", "ddp"), ("qwen2_5_vl", "fsdp"), ("qwen3_vl", "ddp")])
def test_clips_train_and_two_ranks_equal_one(made, tmp_path, family, parallel):
    """Words, a picture, a clip and both in one step over two ranks; the first loss is the mean that transformers' logits give."""
    folder, model = made(family)
    frames = [f"{number}.png" for number in range(5)]
    for number, name in enumerate(frames):
        picture(70, 50, number).save(tmp_path / name)
    still, moving = {"type": "image", "image": "0.png"}, {"type": "video", "video": frames, "fps": 2.0}
    talks = [
        [user("How are you?"), said("Fine.")],
        [{"role": "user", "content": [still, {"type": "text", "text": "What?"}]}, said("Noise.")],
        [{"role": "user", "content": [moving, {"type": "text", "text": "And then?"}]}, said("More of it.")],
        [{"role": "user", "content": [still, moving, {"type": "text", "text": "Both?"}]}, said("Yes.")],
    ]
    (tmp_path / "mix.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in talks))
    data = TalksConfig(train=(str(tmp_path / "mix.jsonl"),), batch=4, tokens=700, workers=0)
    train = LoopConfig(steps=3, log_every=1, precision="fp32", threads=1, parallel=parallel)
    optim = OptimConfig(lr=1e-3, eps=1e-3, warmup=0)
    recipe = StagedRecipe(
        "clips", StitchConfig(start=str(folder)), (Stage("tune", (("*", 1.0),), data=data, optim=optim, train=train),)
    )
    train_stages(recipe, tmp_path / "one", quiet=True)
    on_ranks(2, _on_rank, recipe, tmp_path / "two")
    logs = [
        [json.loads(line) for line in (tmp_path / run / "1-tune" / "metrics.jsonl").read_text().splitlines()]
        for run in ("one", "two")
    ]
    assert len(logs[0]) == len(logs[1]) == 3
    for alone, together in zip(*logs, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
        assert together["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-4)
        assert together["supervised_tokens"] == alone["supervised_tokens"]
    before, after, ranks = (
        load_file(one / "model.safetensors") for one in (folder, tmp_path / "one/model", tmp_path / "two/model")
    )
    assert {key for key in before if "patch_embed" in key and not torch.equal(before[key], after[key])}, "the tower learned"
    for key in after:
        torch.testing.assert_close(ranks[key], after[key], rtol=1e-3, atol=1e-5)
    total, count = 0.0, 0
    ours = intermodal.load(folder)
    for messages in (placed(messages, tmp_path) for messages in talks):
        batch, clips = ours.processor(messages), [load_part(part) for part in messages[0]["content"] if part["type"] == "video"]
        scores = theirs(family, model, batch, clips, batch.positions)[0]
        rows = torch.nonzero(batch.supervised).squeeze(1)
        total += torch.nn.functional.cross_entropy(scores[rows - 1], batch.ids[rows], reduction="sum").item()
        count += len(rows)
    assert logs[0][0]["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_too_long_counts_what_is_shown(made, family, monkeypatch):
    check_too_long(intermodal.load(made(family)[0]), CASES["image and video"], user("And then?"), monkeypatch)


def test_chat_shows_pictures_and_clips_by_path(made, tmp_path, monkeypatch):
    """A picture with the first question, a clip with the second; what does not exist or is no picture is told of and the talk goes on."""
    folder, _ = made("qwen2_5_vl")
    picture(64, 48, 1).save(tmp_path / "a.png")
    write_clip(tmp_path / "b.mp4")
    heard, stream = [], Generative.stream
    monkeypatch.setattr(
        Generative, "stream", lambda self, said, **more: heard.append((list(said), more)) or stream(self, said, **more)
    )
    (tmp_path / "no.png").write_text("words")
    typed = (
        f"What?\n/image {tmp_path / 'none.png'}\n/image {tmp_path / 'no.png'}\nAnd now?\n/video {tmp_path / 'b.mp4'}\nAnd this?\n\n"
    )
    done = CliRunner().invoke(app, ["chat", str(folder), str(tmp_path / "a.png"), "--max-new-tokens", "5"], input=typed)
    assert done.exit_code == 0
    assert f"{tmp_path / 'none.png'}: no such file" in done.stdout
    assert f"cannot read the picture {tmp_path / 'no.png'}" in done.stdout
    assert "(show again what belongs to the next question)" in done.stdout
    shown = [
        [part[part["type"]] for message in messages for part in message["content"] if isinstance(part, dict)]
        for messages, _ in heard
    ]
    first = [str(tmp_path / "a.png"), "What?"]
    assert shown == [first, [*first, str(tmp_path / "no.png"), "And now?"], [*first, str(tmp_path / "b.mp4"), "And this?"]]
    model = intermodal.load(folder)
    for messages, settings in (heard[0], heard[2]):
        reply = model.generate(messages, **settings)
        assert reply.text.strip() in done.stdout
        plans = model.processor.conversation(messages, reply=True).plans
        assert [plan.kind for plan in plans] == ["image", "video"][: len(plans)]
        assert all(plan.features for plan in plans)
    assert len(plans) == 2


def write_clip(file):
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for grey in range(0, 240, 40):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), grey, np.uint8), format="rgb24")))
        out.mux(stream.encode())
