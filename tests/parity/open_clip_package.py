"""open_clip itself, where there is no torchvision.

open_clip and timm take names from torchvision when they are imported; their models, losses and tokenizers never call what stands behind
them. Empty classes under those names are enough, for as long as the import takes.
"""

import enum
import sys
from types import ModuleType

import pytest
import transformers  # before the names stand in: it looks whether torchvision is there


class _Names(ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **settings: None})
        setattr(self, name, made)
        return made


MODULES = ["torchvision", *(f"torchvision.{name}" for name in ("transforms", "ops", "models", "datasets", "utils"))]
MODULES += ["torchvision.transforms.functional", "torchvision.ops.misc", "torchvision.models.feature_extraction"]
INTERPOLATIONS = "NEAREST NEAREST_EXACT BILINEAR BICUBIC BOX HAMMING LANCZOS"


def open_clip_or_skip():
    """The module `open_clip`; skips where it is not installed."""
    assert not transformers.utils.is_torchvision_available()
    for name in MODULES:
        sys.modules[name] = _Names(name)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, sys.modules[name])
    modes = enum.Enum("InterpolationMode", {name: name.lower() for name in INTERPOLATIONS.split()})
    for name in ("torchvision.transforms", "torchvision.transforms.functional"):
        sys.modules[name].InterpolationMode = modes
    try:
        return pytest.importorskip("open_clip", reason="open_clip is not installed (make setup does it, without its dependencies)")
    finally:
        for name in MODULES:
            del sys.modules[name]
