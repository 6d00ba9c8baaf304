"""Odd paths, data URIs, templates and settings: each is refused in words of an `IntermodalError`, and nothing is fetched."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import av
import numpy as np
import pytest
from test_boxes import qwen, where
from test_chat import TALK, VICUNA, tokenizer

from intermodal.errors import CheckpointError, SampleError
from intermodal.inputs.chat import ChatProcessor
from intermodal.inputs.image import open_image
from intermodal.inputs.media import MediaError, load_part
from intermodal.inputs.messages import check_messages, placed
from intermodal.inputs.template import ChatTemplate, TemplateError
from intermodal.inputs.video import Sampling, decode


def written(path, frames=30):
    """A video of ten frames a second, each of its own grey."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * index, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return written(tmp_path_factory.mktemp("videos") / "grey.mp4")


def shown(video, **more):
    return load_part({"type": "video", "video": str(video), **more})


@pytest.fixture
def server(video):
    """(port, what was asked for) of a server that has the video under every name."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(video.read_bytes())

        def log_message(self, *_):
            pass

    served = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield served.server_port, asked
    served.shutdown()
    served.server_close()


@pytest.mark.parametrize(
    "form",
    ["http:/127.0.0.1:{}/v.mp4", "http:127.0.0.1:{}/v.mp4", "cache:http://127.0.0.1:{}/v.mp4", "async:http://127.0.0.1:{}/v.mp4"],
)
def test_no_form_of_an_address_is_fetched(server, form, tmp_path):
    port, asked = server
    address = form.format(port)
    with pytest.raises(MediaError, match=r"is not a readable video: \[Errno 2\] No such file"):
        shown(address)
    [message] = placed([{"role": "user", "content": [{"type": "video", "video": address}]}], tmp_path)
    with pytest.raises(MediaError):
        load_part(message["content"][0])
    assert not asked


def test_no_protocol_of_ffmpeg_reads_a_local_file(video):
    for address in (f"concat:{video}|{video}", f"subfile,,start,0,end,0,,:{video}", f"cache:{video}", "pipe:0"):
        with pytest.raises(MediaError, match="is not a readable video"):
            shown(address)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.ffconcat", "ffconcat version 1.0\nfile http:127.0.0.1:{}/v.mp4\n"),
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:{}/v.ts\n#EXT-X-ENDLIST\n"),
    ],
)
def test_a_playlist_fetches_nothing(server, name, text, tmp_path):
    port, asked = server
    (tmp_path / name).write_text(text.format(port))
    with pytest.raises(MediaError, match="is not a readable video"):
        shown(tmp_path / name)
    assert not asked


def test_a_video_file_is_closed(video, monkeypatch):
    import builtins

    files = []
    monkeypatch.setattr(builtins, "open", lambda *given, real=open, **more: files.append(real(*given, **more)) or files[-1])
    assert decode(video, Sampling(frames=4)).times == pytest.approx([0, 1.0, 1.9, 2.9])
    with pytest.raises(MediaError):
        decode(video, Sampling(fps=-1.0))
    assert len(files) == 2
    assert all(file.closed for file in files)


@pytest.mark.parametrize("path", ["\ud83d.mp4", "a\0b.mp4", "~no-such-user/a.mp4", "file:///\ud83d.mp4", "."])
def test_what_is_no_path_is_an_error_in_words(path):
    for kind in ("video", "image"):
        with pytest.raises((MediaError, SampleError)) as caught:
            load_part({"type": kind, kind: path})
        assert ("half a character" in str(caught.value)) == ("\ud83d" in path)


def test_a_name_of_bytes_that_are_no_utf8(video, tmp_path):
    """Python writes them as halves of characters: a file of such a name is read all the same."""
    path = tmp_path / "a\udcff.mp4"
    path.write_bytes(video.read_bytes())
    assert len(shown(path).frames) == 6


def test_a_home_of_nobody_is_placed(tmp_path):
    [message] = placed([{"role": "user", "content": [{"type": "image", "image": "~no-such-user/a.png"}]}], tmp_path)
    assert message["content"][0]["image"] == str(tmp_path / "~no-such-user/a.png")


@pytest.mark.parametrize("key", ["role", "name"])
def test_half_a_character_beside_the_content(key):
    with pytest.raises(SampleError, match="half a character at 1"):
        check_messages([{"role": "user", "content": "a", key: "u\ud83d"}])


def test_data_uris(video):
    text = base64.b64encode(video.read_bytes()).decode()
    for head in ("data:video/mp4;base64,", "DATA:;base64,"):
        clip = shown(head + text, fps=4)
        assert np.array_equal(clip.frames, shown(video, fps=4).frames)
        assert (clip.times, clip.fps) == (shown(video, fps=4).times, shown(video, fps=4).fps)
    for kind, form in (("image", "image/png"), ("video", "video/mp4")):
        for body in ("é", "%%", "a"):
            with pytest.raises(MediaError, match=f"not base64: it should begin with data:{form};base64,"):
                load_part({"type": kind, kind: f"data:{form};base64,{body}"})
    with pytest.raises(MediaError, match=r"^the data URI is not a readable video"):
        shown("data:video/mp4;base64,aGVsbG8=")


@pytest.mark.parametrize("head", ["", "file:///"])
def test_long_texts_are_cut(head):
    text = head + base64.b64encode(bytes(range(256)) * 40).decode()
    for kind, form in (("image", "image/png"), ("video", "video/mp4")):
        with pytest.raises(MediaError, match=f"no such file: .*base64 begins with data:{form};base64,") as caught:
            load_part({"type": kind, kind: text})
        assert len(str(caught.value)) < 200


def test_a_long_path_is_read(tmp_path):
    folder = tmp_path / ("a" * 200) / ("b" * 200)
    folder.mkdir(parents=True)
    where(4, 4).save(folder / "a.png")
    assert load_part({"type": "image", "image": str(folder / "a.png")}).size == (4, 4)


def test_a_video_of_one_frame(tmp_path):
    file = written(tmp_path / "one.mp4", 1)
    with pytest.raises(
        MediaError, match=r'one\.mp4 has 1 frame; at least 2 are needed .*\{"type": "video", "video": \[picture\]\}'
    ):
        shown(file)
    clip = load_part({"type": "video", "video": [where(40, 30)]})  # what the error says to do
    assert len(qwen("qwen2_vl").plan(clip, 1))


def test_an_empty_picture(tmp_path):
    file = tmp_path / "empty.png"
    file.touch()
    for given in (file, str(file)):
        with pytest.raises(SampleError, match=r"empty\.png: it is empty"):
            open_image(given)
    file.write_bytes(b"text")
    with pytest.raises(SampleError, match="no picture format"):
        open_image(file)


# By qwen-vl-utils' `calculate_video_frame_range` and `smart_nframes`: frames ceil(start * rate) to floor(end * rate), evenly spaced.
SECTIONS = [
    ({"video_start": 1.0}, [10, 16, 23, 29]),
    ({"video_end": 1}, [0, 3, 7, 10]),
    ({"video_start": 0.55, "video_end": 1.55, "nframes": 2}, [6, 15]),
    ({"video_start": 0.3, "video_end": 0.7, "nframes": 4}, [3, 4, 6, 7]),
    ({"video_start": -1, "video_end": 99, "nframes": 2}, [0, 29]),
    ({"video_start": None, "video_end": None, "min_frames": None, "max_frames": None, "nframes": 2}, [0, 29]),
    ({"min_frames": 7}, [0, 4, 8, 12, 17, 21, 25, 29]),
    ({"max_frames": 3}, [0, 29]),
    ({"fps": 9.0, "max_frames": 4.0}, [0, 10, 19, 29]),
]


@pytest.mark.parametrize(("asked", "wanted"), SECTIONS)
def test_a_section_and_bounds_of_the_count(video, asked, wanted):
    clip = shown(video, **asked)
    assert clip.times == pytest.approx([index / 10 for index in wanted])
    assert np.allclose(clip.frames.mean((1, 2, 3)), [8 * index for index in wanted], atol=6)
    first, last = asked.get("video_start") or 0, asked.get("video_end") or 99
    inside = sum(first <= index / 10 <= last for index in range(30))
    assert clip.fps == pytest.approx(len(wanted) / inside * 10)


def test_a_number_of_frames_goes_before_bounds(video):
    assert len(shown(video, nframes=8, max_frames=4).frames) == 8
    assert len(shown(video, nframes=2, min_frames=6).frames) == 2


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"video_start": 2, "video_end": 1}, r"from 2 s to 1 s has 0 frames; at least 2"),
        ({"video_start": 2.9}, r"grey\.mp4 from 2\.9 s to its end has 1 frame; at least 2"),
        ({"video_start": "early"}, "are seconds, and not 'early'"),
        ({"video_end": float("nan")}, "are seconds, and not nan"),
        ({"video_end": True}, "are seconds, and not True"),
        ({"min_frames": 0}, "at least 1, and not 0"),
        ({"max_frames": "all"}, "at least 1, and not 'all'"),
        ({"max_frames": float("inf")}, "at least 1, and not inf"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames 8 of a video is more than its max_frames 4"),
    ],
)
def test_what_is_no_section_or_bound(video, asked, message):
    with pytest.raises(MediaError, match=message):
        shown(video, **asked)


def test_the_rate_of_given_frames():
    frames = [where(8, 6)] * 3
    part = {"type": "video", "video": frames}
    assert load_part({**part, "sample_fps": 4}).times == (0, 0.25, 0.5)
    assert load_part({**part, "sample_fps": 4, "fps": 1}).fps == 4
    assert load_part({**part, "sample_fps": None, "fps": 1}).fps == 1
    assert load_part({**part, "fps": None}).fps == 2
    with pytest.raises(MediaError, match="positive number, and not 0"):
        load_part({**part, "sample_fps": 0})
    with pytest.warns(UserWarning, match="shown whole: video_start, max_frames beside it are passed over"):
        load_part({**part, "video_start": 1, "max_frames": 4})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 'x' | int('y') + 1 // 0 }}", "ZeroDivisionError"),
        ("{{ 1 // (messages | length - 4) }}", "ZeroDivisionError"),
        ("{{ '%d' % 'x' }}{{ messages[0].content.index('zzz') }}", "TypeError|ValueError"),
        ("{{ messages[0].content.index('zzz') }}", "ValueError: substring not found"),
        ("{{ range(10 ** 9) }}", "OverflowError"),
        ("{{ 2.0 ** (messages | length * 1000) }}", "OverflowError"),
        ("{{ [].pop() }}{{ messages[0].pop('zzz') }}", "refused"),
        ("{{ '{0}'.format() }}", "IndexError"),
        ("{{ '{a}'.format() }}", "KeyError: 'a'"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    ],
)
def test_whatever_a_template_raises_is_its_refusal(source, message):
    with pytest.raises(TemplateError, match=rf"refused these messages: .*({message})" if message != "refused" else message):
        ChatTemplate(source).render(TALK)


def test_a_template_that_no_parser_takes():
    for source in ("{{ " + "(" * 3000 + " }}", 5):
        with pytest.raises(TemplateError, match="does not compile"):
            ChatTemplate(source).check()


def files(**more):
    return {"tokenizer.json": tokenizer().to_str().encode(), "chat_template.jinja": VICUNA.encode()} | more


def test_a_template_that_is_not_utf8():
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        ChatProcessor.from_files(files(**{"chat_template.jinja": "é".encode("latin-1")}), {})


@pytest.mark.parametrize("ids", ["258", [258, "259"], 2.0, True, {"a": 1}, [[2]], -1, 2**32])
def test_end_tokens_that_are_no_ids(ids):
    with pytest.raises(CheckpointError, match=r"^generation_config\.json: eos_token_id is the id of a token"):
        ChatProcessor.from_files(files(**{"generation_config.json": json.dumps({"eos_token_id": ids}).encode()}), {})
    for config, name in (({"eos_token_id": ids}, ""), ({"text_config": {"eos_token_id": ids}}, r"text_config\.")):
        with pytest.raises(CheckpointError, match=rf"^config\.json: {name}eos_token_id is the id of a token"):
            ChatProcessor.from_files(files(), config)


def test_end_tokens():
    generation = {"generation_config.json": json.dumps({"eos_token_id": [258, 260]}).encode()}
    assert ChatProcessor.from_files(files(**generation), {"eos_token_id": 257, "text_config": None}).end_ids == (258, 260, 257)
    assert ChatProcessor.from_files(files(), {"eos_token_id": None}).end_ids == ()
