"""Prompt templates of zero-shot classification: our default, CLIP's eighty for ImageNet, and files of others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import IntermodalError
from ..files import read_lines

TEMPLATES = ("{}", "a {}", "a picture of a {}", "a photo of a {}.")


def checked(templates: Sequence[str]) -> Sequence[str]:
    """The same templates. Raises IntermodalError: one has no {} for the name."""
    for template in templates:
        if "{}" not in template:
            raise IntermodalError(f"the template {template!r} has no {{}} where the name goes, as in 'a photo of a {{}}.'")
    return templates


def read_templates(which: str | Path) -> Sequence[str]:
    """`openai`, or a file with a template a line; clip_benchmark's `{c}` means `{}`, and empty lines are left out.

    Raises:
        IntermodalError: no such file, nothing in it, or a line without a place for the name.
    """
    if str(which) == "openai":
        return OPENAI
    file = Path(which).expanduser()
    if not file.is_file():
        raise IntermodalError(f"{file} is no file of templates; give one with a template a line, or openai")
    lines = [line.strip().replace("{c}", "{}") for line in read_lines(file)]
    found = [line for line in lines if line]
    if not found:
        raise IntermodalError(f"{file} holds no template: it wants one a line, as 'a photo of a {{}}.'")
    return checked(found)


# the zero-shot ImageNet prompts of OpenAI's notebook `Prompt_Engineering_for_ImageNet.ipynb`, in its order
OPENAI = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)
"""CLIP's for ImageNet (CLIP paper, section 3.1.4)."""
