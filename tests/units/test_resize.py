"""Pictures are resized as Pillow resizes them, to the bit, and by Pillow where the kernel cannot."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_decode_step import PROCESSORS

from intermodal.inputs.image import ImageProcessor
from intermodal.kernels import resize
from intermodal.kernels.build import compiler, library
from intermodal.kernels.resize import FILTERS, order, resized

COMPILED = pytest.mark.skipif(compiler() is None, reason="this machine has no C++ compiler (c++, or what CXX names)")
SIDE = st.integers(1, 90) | st.integers(1, 700)


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def pillows(levels, size, resample):
    return np.asarray(Image.fromarray(levels).resize(size, resample))


@settings(max_examples=400, deadline=None)
@given(st.tuples(SIDE, SIDE), st.tuples(SIDE, SIDE), st.sampled_from(Image.Resampling), st.booleans())
def test_any_size_equals_pillow(size, wanted, resample, extreme):
    levels = noise(*size)
    if extreme:  # sums beyond 0 and 255
        levels = np.where(levels > 127, np.uint8(255), np.uint8(0))
    expected = pillows(levels, wanted, resample)
    assert np.array_equal(resized(Image.fromarray(levels), wanted, resample), expected)
    assert np.array_equal(resized(levels, wanted, resample), expected)


@COMPILED
@pytest.mark.parametrize("processor", PROCESSORS)
def test_every_processor_gives_the_same(processor, monkeypatch):
    kernels = library("resize", *PROCESSORS[processor])
    rule, did = order(), resize._by_kernel
    assert rule is not None
    used = []
    monkeypatch.setattr(resize, "_by_kernel", lambda _, *rest: used.append(out := did(kernels, *rest)) or out)
    for number, (width, height, *wanted) in enumerate(np.random.default_rng(3).integers(17, 200, (60, 4)).tolist()):
        levels = noise(width, height, number)
        for resample in FILTERS:
            for picture in (levels, Image.fromarray(levels)):
                assert np.array_equal(resized(picture, tuple(wanted), resample), pillows(levels, wanted, resample))
    assert sum(out is not None for out in used) > 300


@COMPILED
def test_the_order_of_passes_is_that_of_the_pillow_installed(monkeypatch):
    """Rows first where the height shrinks by more pixels than twice the width does: another order rounds otherwise."""
    assert order() is resize.ORDERS[0], "a new Pillow: find its order, or look whether it agrees with the versions before 12.2"
    tall, across = noise(40, 200), noise(200, 60)
    for rule, same in ((lambda *sizes: True, True), (lambda *sizes: False, False)):
        monkeypatch.setattr(resize, "order", lambda rule=rule: rule)
        assert np.array_equal(resized(tall, (30, 50), 3), pillows(tall, (30, 50), 3)) == same
        assert np.array_equal(resized(across, (90, 50), 3), pillows(across, (90, 50), 3)) != same


@COMPILED
def test_a_pillow_that_resizes_otherwise_does_it_itself(monkeypatch):
    resize._order.cache_clear()
    monkeypatch.setattr(resize, "ORDERS", (lambda *sizes: True,))
    with pytest.warns(UserWarning, match="resizes otherwise than the versions known here"):
        assert order() is None
    levels = noise(40, 200)
    assert np.array_equal(resized(levels, (30, 50), 3), pillows(levels, (30, 50), 3))
    resize._order.cache_clear()


def test_a_picture_in_several_pieces_is_left_to_pillow():
    """Pillow keeps large pictures in blocks, which no array can show without a copy."""
    picture = Image.effect_noise((5000, 4000), 60).convert("RGB")
    assert resize._levels(picture) is None
    assert np.array_equal(resized(picture, (64, 48), 3), np.asarray(picture.resize((64, 48), Image.Resampling.BICUBIC)))


def test_views_of_arrays_and_sizes_that_stay():
    levels = noise(120, 90)
    tile, turned = levels[10:70, 20:100], levels[::-1, ::-1]
    for view in (tile, turned):
        assert np.array_equal(resized(view, (33, 44), 3), pillows(view, (33, 44), 3))
    assert resized(levels, (120, 90), 3) is levels
    assert np.array_equal(resized(Image.fromarray(levels), (120, 90), 3), levels)
    assert np.array_equal(ImageProcessor(0, resample=9).resized(Image.fromarray(levels)), levels), "nothing is resized"
    for wanted in ((120, 40), (50, 90)):
        assert np.array_equal(resized(levels, wanted, 2), pillows(levels, wanted, 2))
    with pytest.raises(ValueError, match="must be > 0"):
        resized(levels, (0, 5), 3)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "LA", "I;16", "1"])
def test_what_is_not_rgb_is_left_to_pillow(mode):
    picture = Image.fromarray(noise(40, 30)).convert("L" if mode == "I;16" else "RGB").convert(mode)
    assert np.array_equal(resized(picture, (20, 20), 2), np.asarray(picture.resize((20, 20), Image.Resampling.BILINEAR)))


def test_arrays_of_other_numbers_are_refused_as_pillow_does():
    for levels in (noise(40, 30).astype(np.float32), noise(40, 30).astype(np.uint16), noise(40, 30)[..., :1]):
        with pytest.raises(TypeError, match="Cannot handle this data type"):
            resized(levels, (20, 20), 3)
    assert resized(noise(40, 30)[..., :2], (20, 20), 3).shape == (20, 20, 2)


def test_extreme_scales_are_left_to_pillow(monkeypatch):
    monkeypatch.setattr(resize, "weights", lambda *_: pytest.fail("this would take seconds"))
    for size, wanted in (((1, 60000), (1, 1)), ((60000, 4), (400, 2)), ((400, 3000), (3, 300))):
        levels = noise(*size)
        assert np.array_equal(resized(levels, wanted, 3), pillows(levels, wanted, 3))


def test_an_older_pillow_shows_its_pictures_by_a_copy(monkeypatch):
    monkeypatch.delattr(Image.Image, "__arrow_c_array__")
    levels = noise(40, 30)
    assert np.array_equal(resized(Image.fromarray(levels), (20, 20), 2), pillows(levels, (20, 20), 2))


@COMPILED
def test_memory_that_is_not_there_is_an_error_and_no_crash():
    """In a process of its own: what it may take is a limit of the process."""
    code = """
import resource
from PIL import Image
from intermodal.kernels.resize import order, resized
assert order() is not None
picture = Image.new("RGB", (16, 16))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
try:
    resized(picture, (6000, 6000), 2)
except MemoryError:
    print("no memory, as Pillow says too")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "no memory, as Pillow says too\n"), done.stderr


def test_an_array_is_processed_as_the_picture_it_holds():
    levels = noise(75, 50)
    processor = ImageProcessor(24, crop=(24, 24))
    assert np.array_equal(processor.resized(levels), processor.resized(Image.fromarray(levels)))
    grey = levels[..., 0]
    assert np.array_equal(processor.resized(grey), processor.resized(Image.fromarray(grey)))
