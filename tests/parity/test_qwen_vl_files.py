"""Qwen-VL directories as transformers takes them: names as in its memory, stray settings, pictures that are not normalised; sizes that
a message asks for."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_qwen_vl import CASES, FAMILIES, clip, clips_of, made, picture, processor_settings, said, theirs, user  # noqa: F401
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from typer.testing import CliRunner

import intermodal
from intermodal.cli.app import app
from intermodal.data.talks import open_talks
from intermodal.errors import CheckpointError
from intermodal.inputs.media import MediaError
from intermodal.inputs.messages import placed

TALK = CASES["image and video"]


def copied(made, family, tmp_path):  # noqa: F811
    folder, model = made(family)
    return shutil.copytree(folder, tmp_path / "copy"), model


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_text(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    edit(folder / "config.json", text_config={**raw["text_config"], **changes})


def check_logits(ours, family, model, talk=TALK):
    batch = ours.processor(talk)
    expected, _ = theirs(family, model, batch, clips_of(talk))
    with torch.no_grad():
        torch.testing.assert_close(ours(batch), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_by_transformers_names_in_memory(made, family, pickled, tmp_path):  # noqa: F811
    """What `model.state_dict()` calls them, which `save_pretrained` renames for Qwen2-VL and Qwen2.5-VL."""
    folder, model = copied(made, family, tmp_path)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = load_file(folder / "model.safetensors")
    if pickled:
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    ours = intermodal.load(folder)
    check_logits(ours, family, model)
    intermodal.save(ours, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == before.keys()


@pytest.mark.parametrize("rules", ["transformer", "author", 1])
def test_misspelt_rules_are_refused(made, rules, tmp_path):  # noqa: F811
    """Any other word than "authors" would be transformers' rules in one place and the authors' in another."""
    folder, _ = copied(made, "qwen2_vl", tmp_path)
    edit(folder / "config.json", intermodal={"rules": rules})
    with pytest.raises(CheckpointError, match=rf"intermodal.rules is {rules!r}; write .*\"authors\".* or \"transformers\""):
        intermodal.load(folder)


STRAY = [
    ("qwen2_vl", {"attention_bias": True}),
    ("qwen2_5_vl", {"attention_bias": True}),
    ("qwen2_vl", {"mlp_bias": True}),
    ("qwen3_vl", {"mlp_bias": True}),
    ("qwen2_vl", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3, "layer_types": None}),
    ("qwen2_5_vl", {"use_sliding_window": True, "sliding_window": 64, "layer_types": None}),
    ("qwen3_vl", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}),
]


@pytest.mark.parametrize(("family", "changes"), STRAY)
def test_settings_that_a_family_does_not_have_change_nothing(made, family, changes, tmp_path):  # noqa: F811
    folder, model = copied(made, family, tmp_path)
    edit_text(folder, **changes)
    same = type(model).from_pretrained(folder).eval()
    check_logits(intermodal.load(folder), family, same)
    check_logits(intermodal.load(folder), family, model)


def test_a_head_size_that_is_not_of_the_family_is_passed_over(made, tmp_path):  # noqa: F811
    """Qwen2-VL's heads are width over heads, whatever its text_config says."""
    folder, model = copied(made, "qwen2_vl", tmp_path)
    edit_text(folder, head_dim=20)
    check_logits(intermodal.load(folder), "qwen2_vl", model)


@pytest.mark.parametrize("off", [{"do_normalize": False}, {"do_rescale": False}, {"do_normalize": False, "do_rescale": False}])
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_that_the_files_do_not_normalise(made, family, off, tmp_path):  # noqa: F811
    folder, _ = copied(made, family, tmp_path)
    edit(folder / "preprocessor_config.json", **off)
    planner, image = intermodal.load(folder).processor.planner, picture(97, 61, 1)
    expected = Qwen2VLImageProcessorPil(**{**processor_settings(family), **off})(image, return_tensors="pt")["pixel_values"]
    got = planner.pixels([image], [planner.plan(image, 1)])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-6)
    assert got.max() > 1.1 or not off.get("do_rescale", True) or off.get("do_normalize") is False


@pytest.mark.parametrize(("setting", "value"), [("image_std", [0.5, 0, 0.5]), ("resample", "bicubic"), ("rescale_factor", 0)])
def test_settings_of_the_image_processor_are_named(made, setting, value, tmp_path):  # noqa: F811
    folder, _ = copied(made, "qwen2_vl", tmp_path)
    edit(folder / "preprocessor_config.json", **{setting: value})
    with pytest.raises(CheckpointError, match=rf"preprocessor_config.json\): {setting} is .*wanted is"):
        intermodal.load(folder)


# qwen-vl-utils, `vision_process.py`, `fetch_image` and `fetch_video`, as it asks `smart_resize`: what is given beside the picture, then
# (height, width), for tokens of 28 x 28 pixels.
ASKED = [
    ((97, 61), {}, (56, 84)),
    ((97, 61), {"min_pixels": 100 * 784}, (224, 364)),
    ((400, 300), {"max_pixels": 4 * 784}, (28, 56)),
    ((400, 300), {"min_pixels": 2 * 784, "max_pixels": 9 * 784}, (56, 84)),
    ((400, 300), {"max_pixels": 784}, (28, 28)),
    ((97, 61), {"resized_height": 140, "resized_width": 141}, (140, 140)),
    ((97, 61), {"resized_height": 10, "resized_width": 10}, (56, 56)),
    ((97, 61), {"resized_height": 300, "resized_width": 20, "max_pixels": 784}, (308, 28)),
]


@pytest.mark.parametrize(("size", "asked", "wanted"), ASKED)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_picture_is_shown_as_large_as_its_part_asks(made, family, size, asked, wanted):  # noqa: F811
    processor, image = intermodal.load(made(family)[0]).processor, picture(*size, 1)
    part = {"type": "image", "image": image, **asked, "fps": None, "note": "kept"}
    talk = [{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]
    batch = processor(talk, reply=True)
    assert batch.visual.grids == ((1, wanted[0] // 14, wanted[1] // 14),)
    pixels = Qwen2VLImageProcessorPil(**{**processor_settings(family), "do_resize": False})(
        image.resize(wanted[::-1], 3), return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(batch.visual.pixels, pixels, atol=1e-6, rtol=0)
    assert not image.info  # the caller's picture is as it was


@pytest.mark.parametrize("rules", ["authors", "transformers"])
def test_a_clip_is_shown_as_large_as_its_part_asks(made, rules, tmp_path):  # noqa: F811
    """The same budget a frame by either rule: qwen-vl-utils makes the frames before transformers sees them."""
    folder, _ = copied(made, "qwen3_vl", tmp_path)
    edit(folder / "config.json", intermodal={"rules": rules})
    processor = intermodal.load(folder).processor
    unit, frames = 32**2, [picture(400, 300, seed) for seed in range(4)]
    for asked, wanted in (
        ({"max_pixels": 8 * unit, "min_pixels": 2 * unit}, (64, 96)),
        ({"min_pixels": 200 * unit}, (416, 544)),
        ({"resized_height": 70, "resized_width": 90}, (64, 96)),
    ):
        parts = [{"type": "video", "video": frames, **asked}, {"type": "text", "text": "?"}]
        grids = processor([{"role": "user", "content": parts}], reply=True).visual.grids
        assert grids == ((2, wanted[0] // 16, wanted[1] // 16),), asked


# `fetch_video` of qwen-vl-utils 0.0.14, worked out by hand: a clip of this many frames of 800 x 600, budgets in tokens of one frame pair,
# then (rows, columns) of tokens. A frame pair has the clip's budget over the number of pairs, at most 768 tokens, at least 1.05 * min.
BUDGETS = [
    (8, {}, (21, 29), (19, 25)),  # 768 tokens for patches of 14, the clip's own size for those of 16
    (8, {"total_pixels": 1200}, (15, 20), (15, 20)),
    (7, {"total_pixels": 1200}, (15, 20), (15, 20)),  # an odd last frame counts twice
    (8, {"total_pixels": 20}, (10, 13), (10, 13)),  # 1.05 times the least, which is 128 tokens
    (8, {"total_pixels": 40, "min_pixels": 4}, (2, 3), (2, 3)),
    (7, {"total_pixels": 120, "min_pixels": 4}, (4, 6), (4, 6)),
    (8, {"total_pixels": 1200, "max_pixels": 200}, (12, 16), (12, 16)),
    (8, {"total_pixels": 1200, "max_pixels": 500}, (15, 20), (15, 20)),
    (8, {"total_pixels": 1_000_000}, (21, 29), (19, 25)),
]


@pytest.mark.parametrize(("frames", "asked", "wanted", "third"), BUDGETS)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_clip_has_the_budget_that_its_part_gives_it(made, family, frames, asked, wanted, third):  # noqa: F811
    processor, unit = intermodal.load(made(family)[0]).processor, (32 if family == "qwen3_vl" else 28) ** 2
    part = {"type": "video", "video": [picture(800, 600, 1)] * frames, **{key: value * unit for key, value in asked.items()}}
    plan = processor.conversation([{"role": "user", "content": [part]}], reply=True).plans[0]
    rows, columns = third if family == "qwen3_vl" else wanted
    assert plan.detail == (-(-frames // 2), 2 * rows, 2 * columns)
    assert plan.features == -(-frames // 2) * rows * columns


@pytest.mark.parametrize("rules", ["authors", "transformers"])
def test_a_budget_of_a_clip_is_read_wherever_its_part_is(made, rules, tmp_path):  # noqa: F811
    """Files to train on with the clip in the part or beside the messages, and lines to reply to; of a picture it says nothing."""
    folder, _ = copied(made, "qwen3_vl", tmp_path)
    edit(folder / "config.json", intermodal={"rules": rules})
    model = intermodal.load(folder)
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        picture(400, 300, number).save(tmp_path / name)
    asked = {"type": "video", "total_pixels": 24 * 32**2, "min_pixels": 4 * 32**2}
    question, answer = {"type": "text", "text": "What?"}, {"role": "assistant", "content": "Noise."}
    within = {"messages": [{"role": "user", "content": [{**asked, "video": names}, question]}, answer]}
    beside = {"messages": [{"role": "user", "content": [asked, question]}, answer], "videos": [names]}
    (tmp_path / "talks.jsonl").write_text(json.dumps(within) + "\n" + json.dumps(beside))
    talks = open_talks(str(tmp_path / "talks.jsonl"))
    for number in range(2):
        conversation = model.processor.conversation(talks[number].messages)
        assert conversation.plans[0].detail == (2, 2 * 3, 2 * 4)
    (tmp_path / "ask.jsonl").write_text(json.dumps({"messages": within["messages"][:1]}))
    line = ["generate", str(folder), "--jsonl", str(tmp_path / "ask.jsonl"), "--out", str(tmp_path / "o.jsonl")]
    done = CliRunner().invoke(app, [*line, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    prompt = model.processor.conversation(placed(within["messages"][:1], tmp_path), reply=True)
    assert json.loads((tmp_path / "o.jsonl").read_text())["usage"]["prompt_tokens"] == len(prompt.ids)
    still = {"type": "image", "image": picture(400, 300, 0)}
    plain, bounded = (
        model.processor.conversation([{"role": "user", "content": [{**still, **more}]}], reply=True)
        for more in ({}, {"total_pixels": 24 * 32**2})
    )
    assert plain.ids == bounded.ids


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min_pixels": "many"}, "min_pixels of a part is a number of pixels, at least 1, and not 'many'"),
        ({"max_pixels": 0}, "max_pixels of a part .* not 0"),
        ({"max_pixels": float("nan")}, "max_pixels of a part .* not nan"),
        ({"resized_height": True, "resized_width": 30}, "resized_height of a part .* not True"),
        ({"resized_height": 30}, "go together"),
        ({"total_pixels": -5}, "total_pixels of a part is a number of pixels, at least 1, and not -5"),
        ({"total_pixels": "128k"}, "total_pixels of a part .* not '128k'"),
        ({"total_pixels": float("inf")}, "total_pixels of a part .* not inf"),
        ({"total_pixels": True}, "total_pixels of a part .* not True"),
        ({"min_pixels": 900, "max_pixels": 400}, "min_pixels 900 of a part is more than its max_pixels 400"),
        ({"resized_height": 1, "resized_width": 4000}, "more than 200 times"),
    ],
)
def test_sizes_that_are_none_are_refused(made, asked, message):  # noqa: F811
    processor = intermodal.load(made("qwen2_vl")[0]).processor
    with pytest.raises(MediaError, match=message):
        processor([{"role": "user", "content": [{"type": "image", "image": picture(40, 30, 1), **asked}]}], reply=True)


def test_two_sizes_of_one_picture_are_two_pictures_to_a_cache(made):  # noqa: F811
    from intermodal.inputs.vision_cache import MemoryCache

    ours, image, cache = intermodal.load(made("qwen2_vl")[0]), picture(97, 61, 1), MemoryCache()
    seen = []
    for asked in ({}, {"resized_height": 140, "resized_width": 140}):
        talk = [{"role": "user", "content": [{"type": "image", "image": image, **asked}]}]
        seen.append(ours.processor.batch(ours.processor.conversation(talk, reply=True), cache=cache).visual.keys)
    assert len(set(np.concatenate(seen).tolist())) == 2
