"""What a demo has settled on and how long it has trained, kept in its folder, so that one that was stopped goes on as it was."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from ..errors import IntermodalError
from ..nn.machine import multiplies_bf16
from ..parallel.setup import start
from ..train.fit import with_stage_steps, with_steps
from ..train.recipe import Recipe, StagedRecipe, VQRecipe

PLAN = "plan.json"
R = TypeVar("R", Recipe, VQRecipe, StagedRecipe)


class Plan:
    """`plan.json` of a demo's folder: the steps of each of its runs, and the seconds spent on them."""

    def __init__(self, folder: Path):
        self.file = folder / PLAN
        kept = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.steps: dict[str, list[int]] = kept.get("steps", {})
        self.seconds: dict[str, float] = kept.get("seconds", {})

    @classmethod
    def begin(cls, folder: Path, resume: bool) -> Plan:
        """That of a demo's folder; without `resume` the demo that was there is gone.

        Raises:
            IntermodalError: the folder holds something else, which is not deleted.
        """
        if not resume and folder.exists():
            if any(folder.iterdir()) and not (folder / PLAN).exists():
                raise IntermodalError(
                    f"{folder} holds other things than a demo (it has no {PLAN}): give another --out, or empty it"
                )
            shutil.rmtree(folder)
        return cls(folder)

    def settled(self, name: str, recipe: R, settle: Callable[[R], R]) -> R:
        """The recipe with the steps that were settled on before; the first time with those of `settle`, which are kept."""
        if name not in self.steps:
            with self.clock(name):
                recipe = settle(recipe)
            runs = recipe.stages if isinstance(recipe, StagedRecipe) else (recipe,)
            self.steps[name] = [run.train.steps for run in runs]
            self._write()
        if isinstance(recipe, StagedRecipe):
            return with_stage_steps(recipe, self.steps[name])
        return with_steps(recipe, self.steps[name][0])

    @contextmanager
    def clock(self, name: str):
        """Add the time within to what `name` has taken, also where it is stopped."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"steps": self.steps, "seconds": self.seconds}, indent=2) + "\n")


def told_of_bf16(console: Console, shown: str, as_many: str) -> bool:
    """Whether this machine multiplies in bf16; where it does not, that a demo comes less far here is said beforehand.

    Args:
        shown: the page whose figures were made with bf16.
        as_many: the options that take as many steps without it.
    """
    able = multiplies_bf16(start().device)
    if not able:
        console.print(
            f"this processor has no bf16 products: it trains in fp32 and comes a quarter to half as far in the same time as what {shown} "
            f"shows; {as_many} take as many steps on a slow one",
            style="yellow",
            markup=False,
        )
    return able
