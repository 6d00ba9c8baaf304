"""Pictures thinner than a cell, boxes that are none, and boxes and instructions of conversations that lose their oldest turns."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_llava import made
from test_boxes import GRID, PLANNERS, llava, qwen, where
from test_chat import LLAMA3, processor

import intermodal
from intermodal.generate.engine import TooLong
from intermodal.generate.fitting import fitting
from intermodal.generate.sample import Sampling
from intermodal.inputs.box_parts import with_boxes_written
from intermodal.inputs.media import Bounds, Clip, MediaError
from intermodal.inputs.patches import smart_resize
from intermodal.inputs.tiles import assemble

THIN = {
    "llava_next": llava("llava_next"),
    "llava_next, transformers' rule": llava("llava_next", authors=False),
    "llava_onevision": llava("llava_onevision", max_tiles=2),
}
DROPPING = Sampling(too_long="drop_oldest", max_new_tokens=4)


def grid_of(plan):
    """(1, rows, columns and the newline) of the tiles' features."""
    grid = plan.runs[0][1].grid
    assert grid is not None
    return grid


@pytest.mark.parametrize("size", [(200, 1), (2, 399), (5000, 20), (1, 1), (1, 200)])
@pytest.mark.parametrize("name", THIN)
def test_a_picture_thinner_than_a_cell_has_a_frame(name, size):
    planner, picture = THIN[name], where(*size)
    plan = planner.plan(picture, 1)
    frame = planner.frame(size, plan)
    views = torch.zeros(plan.detail.views, GRID * GRID, 3)
    assert len(frame.tokens) == plan.features == len(assemble(views, [plan.detail], GRID, torch.zeros(3)))
    _, tall, wide = grid_of(plan)
    if not (tall and wide - 1):
        assert frame.tokens[GRID * GRID :] == (None,) * tall
    assert frame.read(frame.write((0, 0, *size)))


def test_thin_pictures_leave_no_rows_or_no_columns():
    """The cases above are what they are called."""
    grids = [grid_of(THIN["llava_next"].plan(where(*size), 1)) for size in ((200, 1), (2, 399))]
    assert grids[0][1] == 0
    assert grids[1][2] == 1  # the newline


MANY = "1" * 400


@pytest.mark.parametrize(
    "value",
    [
        f"[{MANY},2,3,4]",
        '"1234"',
        "[NaN,2,3,4]",
        "[1,2,Infinity,4]",
        "[1,2,-Infinity,4]",
        "[true,false,true,true]",
        '{"1":1,"2":2,"3":3,"4":4}',
        "null",
    ],
)
def test_what_is_no_box_in_json_is_passed_over(value):
    frame = PLANNERS["qwen3_vl"].frame((1000, 1000), PLANNERS["qwen3_vl"].plan(where(200, 200), 1))
    reply = f'{{"bbox_2d": {value}}} {json.dumps({"bbox_2d": [1, 2, 3, 4], "label": "a"})}'
    assert frame.read(reply) == [("a", (1, 2, 3, 4))]


def test_numbers_without_end_are_no_boxes_of_other_families():
    for name, reply in (("llava", f"[{MANY}, 0.1, 0.2, 0.3]"), ("qwen2_vl", f"<|box_start|>({MANY},2),(3,4)<|box_end|>")):
        assert PLANNERS[name].frame((90, 60), PLANNERS[name].plan(where(90, 60), 1)).read(reply) == []


FOUR = r"a box is four finite numbers \[left, top, right, bottom\], and not "
ORDER = "with left <= right and top <= bottom, and not "


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"box": [1, 2, 3]}, FOUR + r"\[1, 2, 3\]"),
        ({"box": [1, 2, 3, 4, 5]}, FOUR + r"\[1, 2, 3, 4, 5\]"),
        ({"box": ["a", 2, 3, 4]}, FOUR + r"\['a', 2"),
        ({"box": [float("nan"), 2, 3, 4]}, FOUR + r"\[nan"),
        ({"box": [1, 2, float("inf"), 4]}, FOUR + r"\[1, 2, inf"),
        ({"box": [10**400, 2, 3, 4]}, FOUR + r"\[10{78} \.\.\.\)"),
        ({"box": [10**5000, 2, 3, 4]}, FOUR + "a value with thousands of digits"),
        ({"box": [True, False, True, True]}, FOUR + r"\[True"),
        ({"box": "1234"}, FOUR + "'1234'"),
        ({"box": None}, FOUR + "None"),
        ({}, FOUR + "None"),
        ({"box": [30, 2, 3, 4]}, ORDER + r"\[30, 2, 3, 4\]"),
        ({"box": [1, 20, 3, 4]}, ORDER + r"\[1, 20, 3, 4\]"),
        ({"box": [1, 2, 1, 4]}, "no area in a picture of 90 x 60"),
        ({"box": [1, 2, 3, 4], "label": 5}, "label of a box is a text, and not 5"),
        ({"box": [1, 2, 3, 4], "item": 7}, "belongs to item 7, and the conversation shows 1 pictures and clips, counted from 0"),
        ({"box": [1, 2, 3, 4], "item": -1}, "belongs to item -1, and the conversation shows 1"),
        ({"box": [1, 2, 3, 4], "item": 10**5000}, "belongs to item a value with thousands of digits"),
    ],
)
def test_box_parts_that_are_none_are_told_of(more, message):
    planner, picture = PLANNERS["qwen2_vl"], where(90, 60)
    parts = [{"type": "image", "image": picture}, {"type": "box", **more}]
    with pytest.raises(MediaError, match=message):
        with_boxes_written([{"role": "user", "content": parts}], planner, [picture], [planner.plan(picture, 1)])


def test_a_box_part_before_all_pictures_is_told_of():
    planner, picture = PLANNERS["qwen2_vl"], where(90, 60)
    parts = [{"type": "box", "box": [1, 2, 3, 4]}, {"type": "image", "image": picture}]
    with pytest.raises(MediaError, match="stands before all pictures and clips"):
        with_boxes_written([{"role": "user", "content": parts}], planner, [picture], [planner.plan(picture, 1)])
    with pytest.raises(MediaError, match="takes no pictures"):
        with_boxes_written([{"role": "user", "content": parts}], None, [], [])


def test_boxes_may_be_arrays_and_labels_null():
    planner, picture = PLANNERS["qwen2_vl"], where(90, 60)
    for box in (np.array([9, 6, 45, 30]), torch.tensor([9.0, 6, 45, 30]), (9, 6, 45, 30)):
        parts = [{"type": "image"}, {"type": "box", "box": box, "label": None}]
        told = with_boxes_written([{"role": "user", "content": parts}], planner, [picture], [planner.plan(picture, 1)])
        assert told[0]["content"][1]["text"] == "<|box_start|>(100,100),(500,500)<|box_end|>"


def test_a_picture_that_arithmetic_cannot_place_is_told_of(monkeypatch):
    planner, picture = llava("llava"), where(9, 6)
    monkeypatch.setattr(planner, "frame", lambda size, plan: size[0] / 0)
    told = [{"role": "user", "content": [{"type": "image"}, {"type": "box", "box": [0, 0, 1, 1]}]}]
    with pytest.raises(MediaError, match=r"cannot be written .*division by zero"):
        with_boxes_written(told, planner, [picture], [planner.plan(picture, 1)])


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return intermodal.load(made(tmp_path_factory.mktemp("llava")) / "start").processor


def shown(width, height, *more):
    return {"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (width, height))}, *more]}


def test_boxes_mean_the_same_picture_after_older_ones_are_dropped(seeing):
    """The box of item 1 would be the last picture's, were it counted over what is left; item 0's picture is gone, its box is not."""
    answer = {"role": "assistant", "content": "it is a dog"}
    boxes = [{"type": "box", "box": [10, 20, 50, 60], "item": number} for number in (0, 1, 2)]
    talk = [shown(100, 100), answer, shown(400, 100), answer, shown(100, 400, *boxes)]
    text = seeing.conversation(talk, reply=True).text
    said = text[text.rindex("<image>\n") + 8 : text.rindex("<|im_end|>")]
    assert len({box for box in said.split("[") if box}) == 3, "each picture's box is written otherwise"
    last = shown(100, 400, {"type": "text", "text": said})
    for lost in (2, 4):
        wanted = seeing.conversation([*talk[lost:-1], last], reply=True)
        kept, dropped = fitting(seeing, tuple(talk), len(wanted.ids) + 4, DROPPING)
        assert (kept.ids, dropped) == (wanted.ids, lost)
        assert len(kept.items) == 3 - lost // 2


def test_all_instructions_before_the_first_turn_are_kept():
    instructing = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(("system", "developer", "system"))]
    answer = {"role": "assistant", "content": "y" * 30}
    talk = [*instructing, {"role": "user", "content": "x" * 90}, answer, {"role": "user", "content": "and now?"}]
    reader = processor(LLAMA3)
    wanted = reader.conversation([*instructing, talk[-1]], reply=True)
    kept, dropped = fitting(reader, talk, len(wanted.ids) + 4, DROPPING)
    assert (kept.text, dropped) == (wanted.text, 2)
    with pytest.raises(TooLong):
        fitting(reader, talk, len(wanted.ids), DROPPING)


def test_smart_resize_rounds_to_none_only_as_transformers_does():
    assert smart_resize(8, 300, 28, 1, 10**6) == (28, 28)
    assert smart_resize(8, 300, 28, 1, 10**6, utils=True) == (28, 308)
    assert smart_resize(100, 8, 28, 3136, 10**6) == (224, 28)
    assert smart_resize(100, 8, 28, 3136, 10**6, utils=True) == (112, 28)


# What of a part goes by qwen-vl-utils and what by transformers' processors; (width, height), bounds, then (height, width) by the authors'
# rules and by transformers', for tokens of 28 x 28 pixels.
CLIPS = [((300, 8), {"min_pixels": 1}, (28, 308), (28, 308)), ((8, 100), {"min_pixels": 3136}, (112, 28), (112, 28))]
PICTURES = [
    ((300, 8), {"min_pixels": 1}, (28, 308)),
    ((8, 100), {"min_pixels": 3136}, (112, 28)),
    ((97, 61), {"resized_height": 8, "resized_width": 300}, (28, 308)),
    ((8, 100), {"max_pixels": 10**6}, (112, 28)),
    ((8, 100), {"total_pixels": 10**6}, (224, 28)),
    ((8, 100), None, (224, 28)),
]


def native(authors):
    planner = qwen("qwen2_5_vl", authors=authors)
    planner.patch, planner.min_pixels, planner.video_pixels = 14, 3136, (3136, 10**6)
    return planner


@pytest.mark.parametrize("authors", [True, False])
@pytest.mark.parametrize(("size", "asked", "wanted"), PICTURES)
def test_thin_pictures_follow_who_sizes_them(size, asked, wanted, authors):
    picture = where(*size)
    if asked:
        picture.info["bounds of the part"] = Bounds(**asked)
    _, rows, columns = native(authors).plan(picture, 1).detail
    assert (rows * 14, columns * 14) == wanted


@pytest.mark.parametrize("authors", [True, False])
@pytest.mark.parametrize("case", CLIPS)
def test_thin_clips_follow_who_sizes_them(case, authors):
    (width, height), asked, *wanted = case
    clip = Clip(np.zeros((2, height, width, 3), np.uint8), (0.0, 0.5), 2.0, Bounds(**asked))
    assert native(authors).clip_size(clip) == wanted[not authors]


def test_thin_clips_that_ask_for_nothing_follow_the_rules():
    clip = Clip(np.zeros((2, 100, 8, 3), np.uint8), (0.0, 0.5), 2.0)
    assert native(authors=False).clip_size(clip) == (224, 28)
    rows, columns = native(authors=True).clip_size(clip)
    assert rows * columns >= 128 * 28 * 28
