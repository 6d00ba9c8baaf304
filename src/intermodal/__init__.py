"""intermodal: every way a transformer can see.

`load` and `save` move models in and out of the field's checkpoint directories; the model classes are here by name. Everything is
imported on first use, so that `import intermodal` and the command line's `--help` stay fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .models.clip import CLIP, SigLIP
    from .models.generative import LanguageModel
    from .models.llava import Llava
    from .models.qwen2_vl import QwenVL
    from .weights.load import load, save

__version__ = "0.1.0"
__all__ = ["CLIP", "LanguageModel", "Llava", "QwenVL", "SigLIP", "load", "save"]

_WHERE = {
    "CLIP": ".models.clip",
    "LanguageModel": ".models.generative",
    "Llava": ".models.llava",
    "QwenVL": ".models.qwen2_vl",
    "SigLIP": ".models.clip",
    "load": ".weights.load",
    "save": ".weights.load",
}


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module 'intermodal' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_WHERE[name], __name__), name)
