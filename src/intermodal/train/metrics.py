"""What a run tells: `metrics.jsonl`, TensorBoard where it is installed, and a live line on the terminal."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Metrics:
    """One line a logged step to `metrics.jsonl` (and TensorBoard). On resume, lines past the checkpoint are cut off."""

    def __init__(self, run: Path, *, resumed_at: int = 0):
        self.path = run / "metrics.jsonl"
        self._cut(resumed_at)
        self._open_board(resumed_at)

    def _cut(self, step: int) -> list[str]:
        """Leave only the lines up to a step; returns the others."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        lines = [line for line in lines if line.endswith("\n")]  # one without is of a process that died while it wrote
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        self.path.write_text("".join(kept))
        return lines[len(kept) :]

    def _open_board(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1 if step else None)
        except ImportError:  # an optional extra: `pip install 'intermodal[track]'`
            self.board = None

    def back_to(self, step: int) -> None:
        """A run went back: the lines past the step go to `metrics-lost.jsonl`, as they would be cut by a resume."""
        with self.path.with_name("metrics-lost.jsonl").open("a") as file:
            file.writelines(self._cut(step))
        if self.board is not None:
            self.board.close()
            self._open_board(step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class Display:
    """A live bar on a terminal; plain lines every few seconds elsewhere."""

    def __init__(self, console: Console, name: str, done: int, steps: int, batch: int, *, quiet: bool = False):
        self.console, self.steps, self.batch, self.quiet = console, steps, batch, quiet
        self.live = console.is_terminal and not quiet
        self.spoke = 0.0
        if self.live:
            columns = (
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, console=console)
            self.task = self.progress.add_task(name, total=steps, completed=done, note="starting")
            self.progress.start()

    def step(self, step: int, note: str, samples_per_second: float) -> None:
        if self.live:
            self.progress.update(self.task, completed=step, note=note)
        elif not self.quiet and (time.monotonic() - self.spoke > 5 or step == self.steps):
            self.spoke = time.monotonic()
            left = (self.steps - step) * self.batch / max(samples_per_second, 1e-9)
            self.console.print(f"step {step}/{self.steps}  {note}  {left:.0f} s left", markup=False)

    def close(self) -> None:
        if self.live:
            self.progress.stop()
