"""Largest absolute difference of our logits from transformers', in float32, over all cases of the parity tests.

    python benchmarks/parity_errors.py

Tiny random models with weights large enough that logits reach 3 to 5; see `tests/parity/test_qwen_vl.py`, `test_llava.py` and
`test_decoder.py` for the cases (text, one and three pictures of odd sizes, clips, two turns).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
import transformers

import intermodal
from intermodal.nn.attention import Segments

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))


def loud(model: torch.nn.Module, amount: float = 0.12) -> torch.nn.Module:
    """The same model with weights far from their small start."""
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * (amount if parameter.ndim > 1 else 0.05)
    return model.eval()


def stitched(module, family: str, folder: Path) -> tuple[float, float]:
    import chat_files as files

    torch.manual_seed(0)
    if module.__name__ == "test_qwen_vl":
        model = loud(module.CLASSES[family][1](module.config(family)))
        parts = (files.byte_tokenizer(module.QWEN_SPECIAL), module.QWEN_TEMPLATE, "<|im_end|>", module.processor_settings(family))
        cases = module.CASES
    else:
        kind = getattr(transformers, f"{module.NAMES[family]}ForConditionalGeneration")
        model = loud(kind(module.config(family, False)))
        parts = (files.byte_tokenizer(module.SPECIAL), module.TEMPLATE, "</s>", module.settings(family))
        cases = module.cases(family)
    model.save_pretrained(folder)
    files.write_chat_files(folder, parts[0], parts[1], eos=parts[2], **parts[3])
    ours, worst, largest = intermodal.load(folder), 0.0, 0.0
    for messages in cases.values():
        batch = ours.processor(messages)
        if module.__name__ == "test_qwen_vl":
            expected = module.theirs(family, model, batch, module.clips_of(messages), batch.positions)[0]
        else:
            expected = module.theirs(family, model, batch, messages)
        with torch.no_grad():
            worst = max(worst, (ours(batch) - expected).abs().max().item())
        largest = max(largest, expected.abs().max().item())
    return worst, largest


def text_only(module, case: str, folder: Path) -> tuple[float, float]:
    name, more = module.CASES[case]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**module.SHAPE, **more})
    model = loud(getattr(transformers, f"{name}ForCausalLM")(config), 0.15)
    model.save_pretrained(folder)
    ids = torch.randint(0, 270, (150,))
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
        return (
            module.run(intermodal.load(folder), ids, Segments([150])) - expected
        ).abs().max().item(), expected.abs().max().item()


def main() -> None:
    import test_decoder
    import test_llava
    import test_qwen_vl

    jobs = [(f"decoder: {case}", text_only, test_decoder, case) for case in test_decoder.CASES]
    jobs += [(family, stitched, module, family) for module in (test_llava, test_qwen_vl) for family in module.FAMILIES]
    for title, function, module, case in jobs:
        with tempfile.TemporaryDirectory() as folder:
            worst, largest = function(module, case, Path(folder))
        print(f"{title:45s} largest error {worst:.1e}, largest logit {largest:.1f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    main()
