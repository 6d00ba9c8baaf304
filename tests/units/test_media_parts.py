"""What a part of a message may give as its picture or clip, what its rate and numbers may be, and the order that a template writes."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_boxes import qwen, where

from intermodal.errors import SampleError
from intermodal.inputs.image import open_image
from intermodal.inputs.media import MediaError, bounds_of, load_part, local_path
from intermodal.inputs.placeholders import rendered_order
from intermodal.inputs.video import Sampling, decode, sampling_of

PICTURE = where(23, 40)
LEVELS = np.asarray(PICTURE).copy()
GREY = LEVELS[..., 0].copy()


def png(image=PICTURE):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a b%20.png"
    path.write_bytes(png())
    return path


def same(got, wanted=LEVELS):
    return got.mode == "RGB" and np.array_equal(np.asarray(got), wanted)


@pytest.mark.parametrize("key", ["image", "url", "path"])
def test_a_picture_by_path_or_address(file, key):
    escaped = str(file).replace("%", "%25").replace(" ", "%20")
    for written in (str(file), f"file://{escaped}", f"FILE://{escaped}", f"file://localhost{escaped}", f"file://{file}"):
        assert same(load_part({"type": "image", key: written})), written


def test_a_picture_in_base64():
    text = base64.b64encode(png()).decode()
    lines = "\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    for part in (
        {"type": "image", "base64": text},
        {"type": "image", "base64": f"data:image/png;base64,{text}"},
        {"type": "image", "image": f"data:image/png;base64,{lines}"},
        {"type": "image", "image": f"DATA:image/png;charset=utf-8;base64,{text}"},
        {"type": "image", "image": None, "url": f"data:image/png;base64,{text}"},
    ):
        assert same(load_part(part)), part
    with pytest.raises(MediaError, match="not base64"):
        load_part({"type": "image", "base64": "%%"})


def test_a_picture_in_an_open_file(file):
    for _ in range(2):  # from its beginning, wherever it was read to
        with file.open("rb") as opened:
            opened.read(7)
            assert same(load_part({"type": "image", "image": opened}))
    buffer = io.BytesIO(png())
    assert same(open_image(buffer))
    assert same(open_image(buffer))
    broken = io.BytesIO(png()[:60])
    broken.name = "of the tar"
    with pytest.raises(SampleError, match="cannot read the picture of the tar"):
        open_image(broken)
    with pytest.raises(SampleError, match="it is empty"):
        open_image(io.BytesIO())
    with pytest.raises(SampleError, match="no picture format"):
        open_image(io.BytesIO(b"text"))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (LEVELS, LEVELS),
        (LEVELS.transpose(2, 0, 1), LEVELS),
        (torch.from_numpy(LEVELS), LEVELS),
        (torch.from_numpy(LEVELS).permute(2, 0, 1), LEVELS),
        (GREY, np.stack([GREY] * 3, -1)),
        (GREY[..., None], np.stack([GREY] * 3, -1)),
        (torch.from_numpy(GREY)[None], np.stack([GREY] * 3, -1)),
        (GREY > 128, np.stack([(GREY > 128) * np.uint8(255)] * 3, -1)),
        (LEVELS[:3], LEVELS[:3]),  # three rows of an array, three channels of a tensor
        (torch.from_numpy(LEVELS.transpose(2, 0, 1)[:, :, :3].copy()), LEVELS[:, :3]),
    ],
)
def test_a_picture_as_an_array_or_a_tensor(given, wanted):
    assert same(open_image(given), wanted)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.uint16, np.int64, np.int8])
def test_arrays_of_other_numbers_are_refused(kind):
    """Pillow takes float32 and uint16 and clips them: a picture in parts of one became black, one of 16 bits white."""
    for given in (GREY.astype(kind), LEVELS.astype(kind), torch.from_numpy(LEVELS.astype(np.float32)).bfloat16()):
        with pytest.raises(TypeError, match=r"holds uint8, 0 to 255, and not .*(float|int)"):
            open_image(given)
    with pytest.raises(MediaError, match="image part cannot be read: an array of a picture holds uint8"):
        load_part({"type": "image", "image": GREY.astype(kind)})


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 3), (9, 9, 5), (5, 9, 9)])
def test_arrays_of_other_axes_are_refused(shape):
    with pytest.raises(TypeError, match=r"has axes \(H, W\), \(H, W, C\) or \(C, H, W\), and not"):
        open_image(np.zeros(shape, np.uint8))


def test_black_and_white_has_two_axes():
    assert load_part({"type": "image", "image": GREY > 100}).mode == "RGB"
    with pytest.raises(MediaError, match="not bool"):
        load_part({"type": "image", "image": LEVELS > 100})


def test_a_damaged_stream_that_cannot_seek_is_a_reject():
    class Pipe(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, buffer):
            return 0

    with pytest.raises(SampleError, match="cannot read the picture"):
        open_image(Pipe())


def test_a_budget_may_be_a_number_of_numpys():
    assert bounds_of(load_part({"type": "image", "image": PICTURE, "max_pixels": np.int64(400)})).max_pixels == 400
    with pytest.raises(MediaError, match="at least 1"):
        load_part({"type": "image", "image": PICTURE, "max_pixels": True})


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_without_pixels_is_a_reject(size):
    for given in (Image.new("RGB", size), np.zeros((size[1], size[0], 3), np.uint8)):
        with pytest.raises(SampleError, match=f"it has {size[0]} x {size[1]} pixels"):
            open_image(given)


@pytest.mark.parametrize("address", ["http://a/b.png", "HTTPS://a/b.png", "ftp://a/b.png", "s3://a/b.png"])
def test_addresses_on_the_network_are_refused(address):
    for part, kind in (
        ({"type": "image", "image": address}, "pictures"),
        ({"type": "image", "url": address}, "pictures"),
        ({"type": "image_url", "image_url": {"url": address}}, "pictures"),
        ({"type": "video", "video": address}, "videos"),
        ({"type": "video", "url": address}, "videos"),
    ):
        with pytest.raises(MediaError, match=f"{kind} are not fetched from the network: download {address}"):
            load_part(part)
    with pytest.raises(MediaError, match="not fetched"):
        decode(address, Sampling())


def test_what_is_no_address(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("a:b/c d%20.png", "pictures").name == "c d%20.png"
    assert local_path("C://a.png", "pictures").name == "a.png"
    assert local_path("~/a.png", "pictures") == tmp_path / "a.png"


FRAMES = np.stack([LEVELS, LEVELS[::-1], LEVELS[:, ::-1]])


@pytest.mark.parametrize(
    "given",
    [
        FRAMES,
        FRAMES.transpose(0, 3, 1, 2),
        torch.from_numpy(FRAMES.copy()),
        torch.from_numpy(FRAMES.copy()).permute(0, 3, 1, 2),
        [Image.fromarray(frame) for frame in FRAMES],
        list(FRAMES),
    ],
)
def test_frames_as_arrays_tensors_or_pictures(given):
    clip = load_part({"type": "video", "video": given, "fps": 4})
    assert clip.frames.dtype == np.uint8
    assert np.array_equal(clip.frames, FRAMES)
    assert clip.times == (0, 0.25, 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (FRAMES.astype(np.float32), "holds uint8, 0 to 255, and not float32"),
        (torch.from_numpy(FRAMES.copy()).float() / 255, "holds uint8, 0 to 255, and not torch.float32"),
        (LEVELS, "holds no frames"),
        (FRAMES[:0], "holds no frames"),
        (np.zeros(()), "holds no frames"),
        (7, "holds no frames"),
    ],
)
def test_what_are_no_frames_is_refused(given, message):
    with pytest.raises(MediaError, match=message):
        load_part({"type": "video", "video": given})


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), -float("inf"), 0, -1.0])
def test_a_rate_that_is_none_is_refused(fps, tmp_path):
    """NaN is neither above 0 nor not: it came through, and ended a whole run at the first clip."""
    with pytest.raises(MediaError, match="the fps of a video's frames is a positive number, and not"):
        load_part({"type": "video", "video": [PICTURE] * 2, "fps": fps})
    with pytest.raises(MediaError, match=f"positive fps .*fps={fps}"):
        Sampling(fps=fps).indices(30, 10.0)
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    with pytest.raises(MediaError, match="positive fps"):
        load_part({"type": "video", "video": str(tmp_path / "a.mp4"), "fps": fps})


@pytest.mark.parametrize("frames", [float("nan"), float("inf"), "many"])
def test_a_number_of_frames_that_is_none_is_refused(frames):
    with pytest.raises(MediaError, match="fps and nframes are numbers"):
        sampling_of(None, None, frames)


NAMES = {"image": "<image>", "video": "<video>"}


def test_items_follow_the_order_that_the_template_writes():
    """The released OneVision's template writes a message's pictures before its clips; each kind keeps its own order."""
    kinds = ["video", "image", "video", "image"]
    assert rendered_order("u <image> <image>\n<video> and <video>", kinds, NAMES) == [1, 3, 0, 2]
    assert rendered_order("<video> <image> <video> <image>", kinds, NAMES) == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "<image> <video>", "<image> <image> <image> <video>", "<image> " * 2 + "<video> " * 3])
def test_items_stay_where_the_template_wrote_others(text):
    assert rendered_order(text, ["video", "image", "image", "video"], NAMES) == [0, 1, 2, 3]


def test_names_of_placeholders_may_hold_any_mark():
    names = qwen("qwen2_vl").names
    assert rendered_order(f"{names['image']} {names['video']}", ["video", "image"], names) == [1, 0]
    assert rendered_order("no media", [], {}) == []
