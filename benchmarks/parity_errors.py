"""Largest absolute difference from the reference, system by system, over the cases of the parity tests (float32).

    python benchmarks/parity_errors.py

Runs `tests/parity` and notes what each comparison of numbers finds, instead of only whether it is within its bound: tiny random models
with weights large enough that logits reach 3 to 5.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
import transformers

TESTS = Path(__file__).parents[1] / "tests" / "parity"
SYSTEMS = {
    "CLIP": r"test_embeddings.*(equal_transformers|to_logits).*\[(clip)",
    "SigLIP": r"test_embeddings.*(equal_transformers|to_logits).*\[siglip(-(?!fixed)|\])",
    "SigLIP 2, one resolution": r"test_embeddings.*to_logits.*\[siglip2-fixed",
    "SigLIP 2, NaFlex": r"test_embeddings.*(equal_transformers|to_logits).*\[(siglip2(?!-fixed)|naflex)",
    "Llama, Vicuna, SmolLM2, Mistral, Qwen2, Qwen3": r"test_decoder.*test_logits",
    "LLaVA 1.5": r"test_llava.*test_logits.*\[.*llava(-|\])(?!next|onevision)",
    "LLaVA-NeXT": r"test_llava.*test_logits.*llava_next",
    "LLaVA-OneVision": r"test_llava.*test_logits.*llava_onevision",
    "Qwen-VL (the first)": r"test_qwen_vl_first.*test_logits",
    "Qwen2-VL": r"test_qwen_vl.py.*test_logits_and_positions.*qwen2_vl",
    "Qwen2.5-VL": r"test_qwen_vl.py.*test_logits_and_positions.*qwen2_5_vl",
    "Qwen3-VL": r"test_qwen_vl.py.*test_logits_and_positions.*qwen3_vl",
    "Idefics2": r"test_idefics2.*test_ids_pixels_and_logits",
    "VQGAN": r"test_vqgan.*(encoder_and_codes|decoder)_equal",
    "Chameleon": r"test_chameleon.*test_logits",
    "pixels: CLIP": r"test_pixels.*test_clip_pixels",
    "pixels: SigLIP": r"test_pixels.*test_siglip_pixels",
    "pixels: SigLIP 2, NaFlex": r"test_pixels.*test_naflex_patches",
    "pixels: LLaVA, LLaVA-NeXT, LLaVA-OneVision": r"test_llava.*test_pixels_and_counts",
    "pixels: Qwen2-VL, Qwen2.5-VL, Qwen3-VL": r"test_qwen_vl.py.*test_pixels_equal",
}


class Notes:
    """A pytest plugin: the differences that the running test has looked at."""

    def __init__(self):
        self.of: dict[str, list[float]] = defaultdict(list)
        self.running = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self.running = item.nodeid

    def note(self, mine: object, theirs: object) -> None:
        if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor) and mine.is_floating_point() and mine.numel():
            self.of[self.running].append((mine.double() - theirs.double()).abs().max().item())


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    sys.path.insert(0, str(TESTS))
    import hf_checkpoints

    notes = Notes()
    plain_close, plain_distance = torch.testing.assert_close, hf_checkpoints.distance

    def assert_close(actual, expected, *arguments, **settings):
        notes.note(actual, expected)
        plain_close(actual, expected, *arguments, **settings)

    def distance(a, b):
        notes.note(a, b)
        return plain_distance(a, b)

    torch.testing.assert_close, hf_checkpoints.distance = assert_close, distance
    names = ("embeddings", "pixels", "decoder", "llava", "qwen_vl_first", "qwen_vl", "idefics2", "vqgan", "chameleon")
    files = [str(TESTS / f"test_{name}.py") for name in names]
    logits = "equal_transformers or to_logits or test_logits or and_logits or equal_janus"
    pixels = "clip_pixels or siglip_pixels or naflex_patches or pixels_and_counts or pixels_equal"
    if code := pytest.main([*files, "-k", f"{logits} or {pixels}", "-q", "-p", "no:cacheprovider"], plugins=[notes]):
        sys.exit(code)
    print()
    for system, pattern in SYSTEMS.items():
        found = [value for name, values in notes.of.items() if re.search(pattern, name) for value in values]
        print(f"{system:48s} {max(found):.1e} over {len(found)} comparisons" if found else f"{system:48s} nothing compared")


if __name__ == "__main__":
    main()
