"""What turns a person's pictures and sentences into a dual encoder's inputs, and goes into the saved directory with it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..files import read_json
from .image import ImageProcessor, NaflexProcessor
from .text import PACKED_MERGES, TOKENIZER_FILES, TextTokenizer


@dataclass
class PairProcessor:
    images: ImageProcessor | NaflexProcessor
    tokenizer: TextTokenizer | None
    family: str
    """"clip", "siglip" or "siglip2"."""

    @property
    def texts(self) -> TextTokenizer:
        """Raises InputError: the checkpoint has no tokenizer."""
        if self.tokenizer is None:
            raise InputError(
                "this checkpoint came without tokenizer files, so only its image side can be used: put tokenizer.json (or vocab.json "
                f"and merges.txt, spiece.model, {PACKED_MERGES}) beside it and load it again"
            )
        return self.tokenizer

    def save(self, folder: Path, *, layout: str = "hf") -> None:
        """Write `preprocessor_config.json` and the tokenizer's files, byte for byte as they were read.

        Raises:
            CheckpointError: Hugging Face's layout cannot say how the pictures are made. (In open_clip's its own config says it.)
        """
        if layout == "open_clip" and isinstance(self.images, ImageProcessor) and self.images.letterbox:
            (folder / "preprocessor_config.json").unlink(missing_ok=True)
        else:
            self._save_pictures(folder)
        kept = self.tokenizer.files if self.tokenizer else {}
        for name in set(TOKENIZER_FILES) - kept.keys():
            (folder / name).unlink(missing_ok=True)  # another model's tokenizer in a folder that is saved over
        for name, data in kept.items():
            (folder / name).write_bytes(data)

    def _save_pictures(self, folder: Path) -> None:
        settings = self.images.to_hf(self.family)
        processor_class = {"clip": "CLIPProcessor", "siglip": "SiglipProcessor", "siglip2": "Siglip2Processor"}[self.family]
        (folder / "preprocessor_config.json").write_text(
            json.dumps({**settings, "processor_class": processor_class}, indent=2) + "\n"
        )
        _forget_nested(folder / "processor_config.json")


def _forget_nested(file: Path) -> None:
    """Take an older save's image settings out of `processor_config.json`: readers prefer them to `preprocessor_config.json`."""
    if file.exists():
        config = read_json(file)
        config.pop("image_processor", None)
        file.write_text(json.dumps(config, indent=2) + "\n")
