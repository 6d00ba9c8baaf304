"""Boxes through every resize, pad and tile. The oracle is a picture whose colour says where one is."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from intermodal.inputs.boxes import Affine
from intermodal.inputs.image import BILINEAR, ImageProcessor
from intermodal.inputs.media import Clip
from intermodal.inputs.patches import QwenPlanner
from intermodal.inputs.queries import LatentPlanner, QueryPlanner
from intermodal.inputs.tiles import LlavaPlanner, assemble

SIDE, GRID = 28, 4
PINPOINTS = tuple((SIDE * rows, SIDE * columns) for rows in (1, 2, 3) for columns in (1, 2, 3))
SIZES = [(90, 60), (60, 90), (84, 84), (200, 31), (33, 150), (300, 290)]


def where(width, height):
    """Red says how far right a pixel is, green how far down; blue is full, and padding is not."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, np.ones_like(x)], axis=-1) * 255).round().astype(np.uint8))


def llava(family, **more):
    return LlavaPlanner(
        family,
        {"image": 3, "video": 4},
        SIDE,
        GRID,
        ImageProcessor((SIDE, SIDE), resample=BILINEAR, mean=(0, 0, 0), std=(1, 1, 1)),
        pinpoints=PINPOINTS,
        **more,
    )


def qwen(family, **more):
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    return QwenPlanner(
        family,
        {"image": 3, "video": 4},
        "<s>",
        "<e>",
        names,
        patch=7,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        min_pixels=4 * 14 * 14,
        **more,
    )


def means(planner, pixels, plan):
    """What a tower that averages each patch would hand to the decoder: (tokens, 3)."""
    if isinstance(planner, QwenPlanner):
        return pixels.view(len(pixels), 3, -1).mean(-1).view(-1, planner.merge**2, 3).mean(1)
    patches = pixels.unflatten(2, (GRID, -1)).unflatten(4, (GRID, -1)).mean((3, 5))  # N, 3, GRID, GRID
    newline = None if planner.family == "llava" else torch.full((3,), -1.0)
    return assemble(patches.flatten(2).transpose(1, 2), [plan.detail], GRID, newline)


PLANNERS = {
    "llava": llava("llava"),
    "llava, transformers' rule": llava("llava", authors=False),
    "llava_next": llava("llava_next"),
    "llava_onevision": llava("llava_onevision", max_tiles=2),
    "qwen2_vl": qwen("qwen2_vl"),
    "qwen2_5_vl": qwen("qwen2_5_vl"),
    "qwen3_vl": qwen("qwen3_vl"),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PLANNERS)
def test_tokens_stand_where_their_box_says(name, size):
    planner, picture = PLANNERS[name], where(*size)
    plan = planner.plan(picture, 1)
    frame, seen = planner.frame(size, plan), means(planner, planner.pixels([picture], [plan]), plan)
    assert len(frame.tokens) == plan.features == len(seen)
    shown = 0
    for box, (red, green, blue) in zip(frame.tokens, seen.tolist(), strict=True):
        if box is None:
            assert blue < 0.5, "a newline or padding"
            continue
        if blue < 0.2:  # nearly all padding
            continue
        shown += 1  # padding is black, so that red / blue is where the shown part of a token is
        assert abs(red / blue * size[0] - (box[0] + box[2]) / 2) < 0.02 * max(size), (box, red)
        assert abs(green / blue * size[1] - (box[1] + box[3]) / 2) < 0.02 * max(size), (box, green)
    assert shown > 3


@pytest.mark.parametrize("name", PLANNERS)
def test_views_hold_what_their_affine_says(name):
    size, box = (200, 120), (60, 30, 110, 80)
    picture = Image.new("RGB", size)
    picture.paste((255, 255, 255), box)
    planner = PLANNERS[name]
    plan = planner.plan(picture, 1)
    frame, pixels = planner.frame(size, plan), planner.pixels([picture], [plan])
    if isinstance(planner, QwenPlanner):
        _, rows, columns = plan.detail
        blocks = pixels.view(rows // 2, columns // 2, 2, 2, 3, 2, 7, 7)[..., 0, :, :]
        pixels = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, rows * 7, columns * 7)
    assert len(frame.views) == len(pixels)
    found = 0
    for ((width, height), view), values in zip(frame.views, pixels, strict=True):
        assert values.shape[1:] == (height, width)
        left, top, right, bottom = view(box)
        white = (values.mean(0) > 0.5).nonzero()
        if min(right, width) - max(left, 0) < 2 or min(bottom, height) - max(top, 0) < 2:
            continue
        found += 1
        assert abs(int(white[:, 1].min()) - max(left, 0)) <= 1
        assert abs(int(white[:, 0].min()) - max(top, 0)) <= 1
        assert abs(int(white[:, 1].max()) + 1 - min(right, width)) <= 1
        assert abs(int(white[:, 0].max()) + 1 - min(bottom, height)) <= 1
    assert found


SQUARE = ImageProcessor((SIDE, SIDE), resample=BILINEAR, mean=(0, 0, 0), std=(1, 1, 1))
LEARNED = {"qwen_vl": QueryPlanner({"image": 3}, SIDE, 16, SQUARE), "idefics2": LatentPlanner({"image": 3}, "<i>", SIDE, 5, SQUARE)}
"""Their tokens are learned queries: where one looks is not a matter of a formula, but boxes and the square are."""


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*PLANNERS, *LEARNED])
def test_round_trips(name, size):
    planner = {**PLANNERS, **LEARNED}[name]
    frame = planner.frame(size, planner.plan(where(*size), 1))
    box = (0.1 * size[0], 0.2 * size[1], 0.75 * size[0], 0.9 * size[1])
    spaces = ["original", "resized", "thousandths", "unit", *(f"view {n}" for n in range(len(frame.views)))]
    for source in spaces:
        for target in spaces:
            there = frame.convert(frame.convert(box, target=source), source, target)
            np.testing.assert_allclose(frame.convert(there, target, "original"), box, rtol=1e-9, atol=1e-9)
    text = f"It is here: {frame.write(box, 'a cat')}, and {frame.write((0, 0, *size))}."
    (label, first), (_, second) = frame.read(text)
    assert label == ("" if frame.style == "plain" else "a cat")
    rounding = 0.01 * max(size) if frame.style == "plain" else max(size) / 20
    np.testing.assert_allclose(first, box, atol=rounding)
    np.testing.assert_allclose(second, (0, 0, *size), atol=rounding)


def test_each_family_writes_as_its_authors_do():
    size, box = (200, 100), (50, 20, 100, 60)
    frames = {name: planner.frame(size, planner.plan(where(*size), 1)) for name, planner in PLANNERS.items()}
    expected = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(250,200),(500,600)<|box_end|>"
    assert frames["qwen2_vl"].write(box, "dog") == expected
    assert json.loads(frames["qwen3_vl"].write(box, "dog")) == {"bbox_2d": [250, 200, 500, 600], "label": "dog"}
    tall, wide = PLANNERS["qwen2_5_vl"].plan(where(*size), 1).detail[1] * 7, frames["qwen2_5_vl"].views[0][0][0]
    pixels = [round(50 / 200 * wide), round(20 / 100 * tall), round(100 / 200 * wide), round(60 / 100 * tall)]
    assert json.loads(frames["qwen2_5_vl"].write(box)) == {"bbox_2d": pixels}
    assert frames["llava"].write(box) == "[0.25, 0.35, 0.50, 0.55]"  # 50 rows of padding above
    assert frames["llava_next"].write(box) == "[0.25, 0.20, 0.50, 0.60]"
    first = LEARNED["qwen_vl"].frame(size, LEARNED["qwen_vl"].plan(where(*size), 1))
    assert first.write(box, "dog") == "<ref>dog</ref><box>(250,200),(500,600)</box>"
    assert frames["qwen2_vl"].read("(1,2),(3,4) and <|box_start|>(1,2),(3<|box_end|>") == []
    assert frames["qwen3_vl"].read('{"a": 1} {"bbox_2d": [1, 2]} {"bbox_2d": 3}') == []
    with pytest.raises(ValueError, match="no area in a picture of 200 x 100"):
        frames["llava"].write((300, 0, 400, 50))
    with pytest.raises(ValueError, match=r"no space 'view 9'.*view 0"):
        frames["llava_next"].convert(box, target="view 9")


def test_clips_have_a_frame_too():
    clip = Clip(np.zeros((4, 60, 90, 3), np.uint8), (0.0, 0.5, 1.0, 1.5), 2.0)
    for planner in (PLANNERS["llava_onevision"], PLANNERS["qwen2_vl"], PLANNERS["qwen3_vl"]):
        plan = planner.plan(clip, 1)
        frame = planner.frame(clip.size, plan)
        assert len(frame.tokens) == plan.features
        assert frame.tokens[0][:2] == (0, 0)


def test_affine():
    a, b = Affine((2.0, 3.0), (1.0, -4.0)), Affine.resize((10, 20), (5, 40))
    assert a.then(b)((1, 2, 3, 4)) == b(a((1, 2, 3, 4)))
    assert a.inverse()(a((1, 2, 3, 4))) == (1, 2, 3, 4)


LABELS = ["a {x} <b>, (1,2)", 'say "hi"', "a } b { c", "{}", "two\nlines", "[1, 2]", "ümlaut 日本", '{"bbox_2d": [1, 2, 3, 4]}']


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen_vl"])
def test_labels_with_marks_of_other_kinds_are_read_back(name, label):
    planner = {**PLANNERS, **LEARNED}[name]
    frame = planner.frame((200, 100), planner.plan(where(200, 100), 1))
    reply = f"Sure {{1}}: {frame.write((50, 20, 100, 60), label)} and {frame.write((0, 0, 200, 100), 'b')}."
    assert [said for said, _ in frame.read(reply)] == [label, "b"]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen_vl"])
def test_labels_with_the_marks_of_labels_are_refused(name):
    planner = {**PLANNERS, **LEARNED}[name]
    frame = planner.frame((200, 100), planner.plan(where(200, 100), 1))
    for tag in frame.tags[:2]:
        with pytest.raises(ValueError, match=r"the label 'a.*b' holds .* could not be read back"):
            frame.write((50, 20, 100, 60), f"a {tag} b")
    open_tag, shut, *_ = frame.tags
    box = frame.write((50, 20, 100, 60), "dog")
    assert [label for label, _ in frame.read(f"{open_tag}a cat{shut} and {open_tag}a {box}")] == ["dog"]


def test_boxes_in_json_are_found_wherever_they_are():
    frame = PLANNERS["qwen3_vl"].frame((1000, 1000), PLANNERS["qwen3_vl"].plan(where(200, 200), 1))
    one, two = ({"bbox_2d": [1, 2, 3, number], "label": str(number)} for number in (4, 5))
    for reply in (
        f"```json\n{json.dumps([one, two], indent=2)}\n```",
        json.dumps({"objects": [one, two], "note": "}{"}),
        f"{json.dumps(one)} {{ {json.dumps(two)}",
        f"{json.dumps({**one, 'inside': {'a': {}}})}{json.dumps(two)}",
    ):
        assert frame.read(reply) == [("4", (1, 2, 3, 4)), ("5", (1, 2, 3, 5))]
    assert frame.read('{"a":' * 20_000) == []
    assert frame.read("{" * 5000 + json.dumps(one)) == [("4", (1, 2, 3, 4))]
