"""What may be another setting when a run goes on, and what may not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config import flat, to_dict
from ..errors import IntermodalError


def changes(before: dict[str, Any], recipe: Any) -> dict[str, str]:
    """Settings that are others than before, by dotted path, each as "path then -> now".

    Args:
        before: `to_dict` of the recipe that the checkpoint was written with.
    """
    then, now = flat(before), flat(to_dict(recipe))
    return {name: f"{name} {then.get(name)} -> {value}" for name, value in now.items() if then.get(name) != value}


def refuse_changes(before: dict[str, Any], recipe: Any, fixed: Callable[[str], bool], folder: Path) -> None:
    """Refuse settings that the weights and the optimizer's state of a checkpoint depend on, or that would not be read any more.

    Args:
        before: as in `changes`.
        fixed: whether a setting, by its dotted path, is one of them. Whether averages are kept (`optim.ema`) always is; their decay is not.

    Raises:
        IntermodalError: names those that are others now.
    """
    then = flat(before)
    averaged = then.get("optim.ema") is not None, recipe.optim.ema is not None
    refused = [
        change
        for name, change in changes(before, recipe).items()
        if name in then  # else it is newer than the run
        and (fixed(name) or (name == "optim.ema" and averaged[0] != averaged[1]))
    ]
    if refused:
        raise IntermodalError(
            f"{folder} cannot go on with {'; '.join(refused)}: resume it as it began, or begin another run (another --out)"
        )
