"""The random part of a picture that `data.crop_scale` asks for."""

import random

from PIL import Image

from intermodal.data.loader import random_crop


def crops(size, scale, count=400):
    """(width, height) of `count` crops of a picture of (width, height)."""
    picture, rng = Image.new("RGB", size), random.Random(3)
    return [random_crop(picture, scale, rng).size for _ in range(count)]


def test_the_aspect_changes_by_up_to_four_to_three_both_ways():
    ratios = [width / height for width, height in crops((400, 400), (0.3, 0.5))]
    assert 0.74 < min(ratios) < 0.8, "tall ones too"
    assert 1.25 < max(ratios) < 1.35, "and wide ones"
    assert 150 < sum(ratio > 1 for ratio in ratios) < 250, "one as often as the other"


def test_the_aspect_is_of_the_crop_and_not_of_the_picture():
    ratios = [width / height for width, height in crops((900, 300), (0.05, 0.1))]
    assert min(ratios) > 0.73
    assert max(ratios) < 1.36


def test_the_area_is_the_share_that_was_asked_for():
    shares = [width * height / 400**2 for width, height in crops((400, 400), (0.3, 0.5))]
    assert 0.29 < min(shares) < 0.32
    assert 0.48 < max(shares) < 0.51


def test_the_whole_picture_where_no_crop_fits():
    assert set(crops((400, 4), (1.0, 1.0), 5)) == {(400, 4)}
