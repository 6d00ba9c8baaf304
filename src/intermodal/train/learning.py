"""What of a model learns in a stage: rows of its tables that are kept, and parameters that no gradient reaches."""

from __future__ import annotations

from collections.abc import Collection

import torch

from ..errors import IntermodalError
from ..models.chameleon import Chameleon
from ..models.generative import Generative
from .optim import whole


def keep_word_rows(model: Generative, optimizer: torch.optim.Optimizer) -> None:
    """Let only the rows of picture codes and their marks learn in the tables over the vocabulary; nothing of the tables decays.

    Raises:
        IntermodalError: the model's vocabulary holds no pictures, or something else than those tables learns.
    """
    if not isinstance(model, Chameleon):
        raise IntermodalError(f"image_rows_only is for models whose vocabulary holds pictures, and a {model.family}'s does not")
    tables = {"model.embed_tokens.weight", "lm_head.weight"}
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if others := sorted(learning.keys() - tables):
        raise IntermodalError(
            f"image_rows_only keeps words as they are, but {others[0]} learns too; learn only {', '.join(sorted(tables))}"
        )
    tokens = model.config.image_tokens
    rows = torch.zeros(len(model.head_weight), 1, dtype=torch.bool)
    rows[[*tokens.ids, tokens.begin, tokens.end]] = True
    for parameter in learning.values():
        parameter.register_hook(lambda gradient: gradient * rows.to(gradient.device))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0


class Unreached:
    """Parameters that should learn and have had no gradient yet, in this run of the stage or before it was resumed.

    A gradient of zeros is one: it says that the loss was computed with the parameter. Without one the parameter was not part of what was
    computed, as LLaVA's tower is after the layer that is read, and a projector where there are words alone.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        # a checkpoint gives every parameter moments; those of one without a gradient are zeros
        moments = {name: optimizer.state.get(parameter, {}).get("exp_avg") for name, parameter in self.learning.items()}
        self.names = {name for name, moment in moments.items() if moment is None or not bool(whole(moment).any())}

    def look(self) -> None:
        """Take out what has a gradient now, between a backward pass and the optimizer's step."""
        self.names = {name for name in self.names if self.learning[name].grad is None}

    def report(self, stage: str, when: str) -> str | None:
        """What should learn and cannot, in a line; None where everything learns.

        Args:
            when: in which part of the stage nothing reached them.

        Raises:
            IntermodalError: there is nothing else: the stage would leave the model as it is.
        """
        if not self.names:
            return None
        found = patterns(self.names, self.learning)
        listed = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
        if self.names == self.learning.keys():
            raise IntermodalError(f"stage {stage} teaches nothing: no gradient reached what should learn {when}: {listed}")
        return f"stage {stage}: no gradient reached {len(self.names)} parameters that should learn {when}: {listed}"


def patterns(names: Collection[str], among: Collection[str]) -> list[str]:
    """The fewest patterns of whole modules, as `Stage.learn` has them, that fit these names and no others of `among`."""
    others, out = set(among) - set(names), {}
    for name in names:
        parts = name.split(".")
        heads = (".".join(parts[:length]) + "." for length in range(1, len(parts)))
        head = next((head for head in heads if not any(other.startswith(head) for other in others)), None)
        out[name if head is None else f"{head}*"] = None
    return sorted(out)
