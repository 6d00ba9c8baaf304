"""transformers' keys of media parts through a whole conversation, by the folder that its file is in."""

import base64
import io

import pytest
from test_llava import made, picture  # noqa: F401

import intermodal
from intermodal.errors import SampleError
from intermodal.inputs.media import MediaError
from intermodal.inputs.messages import check_messages, placed


def test_pictures_under_transformers_keys(made, tmp_path):  # noqa: F811
    processor = intermodal.load(made("llava")[0]).processor
    image, buffer = picture(40, 30, 1), io.BytesIO()
    image.save(buffer, "PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    text = {"type": "text", "text": "What?"}
    wanted = processor([{"role": "user", "content": [{"type": "image", "image": image}, text]}], reply=True)
    for key, value in (("url", "a.png"), ("path", "a.png"), ("base64", base64.b64encode(buffer.getvalue()).decode())):
        talk = placed([{"role": "user", "content": [{"type": "image", key: value}, text]}], tmp_path)
        got = processor(talk, reply=True)
        assert got.ids.equal(wanted.ids)
        assert got.visual.pixels.equal(wanted.visual.pixels)


def test_addresses_are_not_taken_for_paths(made, tmp_path):  # noqa: F811
    processor = intermodal.load(made("llava")[0]).processor
    for address in ("HTTP://a/b.png", "ftp://a/b.png"):
        talk = placed([{"role": "user", "content": [{"type": "image", "image": address}]}], tmp_path)
        with pytest.raises(MediaError, match=f"not fetched from the network: download {address}"):
            processor(talk, reply=True)


def test_a_clip_by_url_is_a_clip_and_a_part_without_a_medium_is_none():
    check_messages([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}, {"type": "image", "path": "a.png"}]}])
    with pytest.raises(SampleError, match="needs 'video'"):
        check_messages([{"role": "user", "content": [{"type": "video", "base64": "aaaa"}]}])
