"""Peak memory of a training step in LLaVA's two stages: the projector alone learns, then the projector and the decoder. Beside it the same
step in transformers, everything that does not learn frozen there too. Each runs in a process of its own, its conversations made before;
what it holds without the step, the weights, is not counted.

    python benchmarks/stage_memory.py
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

STAGES = {"1, projector": ("projector.",), "2, projector and decoder": ("projector.", "model.", "lm_head.")}
PEER_PARTS = {"projector.": "multi_modal_projector", "model.": "language_model", "lm_head.": "lm_head"}


def step(who: str, stage: str, folder: str, precision: str) -> tuple[float, float]:
    """Megabytes that one optimizer step adds at its peak to what is held before it, and the peak of the whole process."""
    import torch
    from transformers import LlavaForConditionalGeneration

    import intermodal
    from intermodal.batch import TokenBatch
    from intermodal.data.packing import bins
    from intermodal.losses_tokens import next_token_loss
    from intermodal.nn.machine import autocast_for

    torch.set_num_threads(2)
    autocast = autocast_for(precision, torch.device("cpu"))
    singles = torch.load(Path(folder) / "conversations.pt", weights_only=False)
    learn = STAGES[stage]
    if who == "intermodal":
        model = intermodal.load(folder)
    else:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        learn = tuple(PEER_PARTS[part] for part in learn)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in learn) if who == "transformers" else name.startswith(learn))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    model.train()
    with torch.no_grad():
        sum(parameter.sum() for parameter in model.parameters())  # weights that are mapped from the file are in memory from here
    before = _resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    if who == "intermodal":
        count = sum(int(single.supervised.sum()) for single in singles)
        for chosen in bins([len(single.ids) for single in singles], 2048):
            pack = TokenBatch.pack([singles[i] for i in chosen])
            with autocast():
                loss, _ = next_token_loss(model.hidden(pack), model.head_weight, pack)
            (loss / count).backward()
    else:
        longest = max(len(single.ids) for single in singles)
        rows = [(s.ids, torch.ones_like(s.ids), torch.where(s.supervised, s.ids, -100)) for s in singles]
        padded = [
            torch.stack([torch.nn.functional.pad(row[part], (0, longest - len(row[part])), value=fill) for row in rows])
            for part, fill in enumerate((0, 0, -100))
        ]
        pixels = torch.cat([single.visual.pixels for single in singles if single.visual is not None])
        with autocast():
            loss = model(input_ids=padded[0], attention_mask=padded[1], labels=padded[2], pixel_values=pixels).loss
        loss.backward()
    optimizer.step()
    return _peak() - before, _peak()


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def _peak() -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(*step(*given.one, given.precision))
        return
    import random

    import torch
    from vlm_train_step import build

    import intermodal

    table = Table(
        title=f"LLaVA-shaped, {given.precision}, {given.conversations} conversations: megabytes a step adds at its peak (in all)"
    )
    for column in ("stage", "intermodal", "transformers", "ratio"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    with tempfile.TemporaryDirectory() as folder:
        model, sources = build("llava")
        intermodal.save(model, folder)
        rng = random.Random(0)
        talks = [rng.choice(sources)[index].messages for index in range(given.conversations)]
        torch.save([model.processor(messages) for messages in talks], Path(folder) / "conversations.pt")  # pyright: ignore[reportOptionalCall]
        for stage in STAGES:
            added = {}
            for who in ("intermodal", "transformers"):
                command = [sys.executable, __file__, "--precision", given.precision, "--one", who, stage, folder]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}
                )
                added[who] = [float(value) for value in done.stdout.splitlines()[-1].split()]
            mine, theirs = added["intermodal"], added["transformers"]
            table.add_row(
                stage, *(f"{extra:,.0f} ({whole:,.0f})" for extra, whole in (mine, theirs)), f"{theirs[0] / mine[0]:.2f}x"
            )
    Console().print(table)


if __name__ == "__main__":
    main()
