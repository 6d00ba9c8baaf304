"""Records of interleaved documents that are none: one reject each, with a reason."""

import pytest

from intermodal.data.talk_records import messages_of
from intermodal.errors import SampleError


def mmc4(info):
    return {"text_list": ["a", "b"], "image_info": info}


def shown(number):
    return mmc4([{"image_name": "0.png", "matched_text_index": number}])


@pytest.mark.parametrize("number", [None, "1", float("nan"), [1], {}, True])
def test_a_place_that_is_no_number_is_a_reject(number):
    with pytest.raises(SampleError, match=r"`matched_text_index` of '0\.png' is the number of a text, got "):
        messages_of(shown(number))


@pytest.mark.parametrize("info", [3, "0.png", {"image_name": "0.png"}, ["0.png"]])
def test_pictures_that_are_no_list_are_a_reject(info):
    with pytest.raises(SampleError, match="each of its `image_info` has an `image_name`"):
        messages_of(mmc4(info))


@pytest.mark.parametrize("record", [{"text_list": [], "image_info": []}, {"text_list": []}, {"images": [], "texts": []}])
def test_an_empty_document_is_said_to_be_empty(record):
    with pytest.raises(SampleError, match="the document is empty"):
        messages_of(record)


@pytest.mark.parametrize("number", [1, 1.0, 1.5 - 0.5])
def test_a_place_may_be_written_as_a_fraction(number):
    parts = messages_of(shown(number))[0]["content"]
    assert [part.get("text") or part["image"] for part in parts] == ["a", "0.png", "b"]


def test_pictures_without_a_place_stand_first():
    parts = messages_of(mmc4([{"image_name": "0.png"}]))[0]["content"]
    assert parts[0] == {"type": "image", "image": "0.png"}
    assert messages_of(mmc4(None))[0]["content"] == [{"type": "text", "text": "a b"}]
