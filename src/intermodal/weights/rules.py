"""Invertible rules between a checkpoint's keys and ours. One table serves loading and saving, so they cannot drift apart.

A pattern holds `{n}` for a layer number and `{rest}` for any tail: `Rename("a.{n}.b.{rest}", "c.{n}.b.{rest}")`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import CheckpointError, nearest

READ_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of weights. Eight bits and fewer go with scales that no key table here knows: by themselves they are other numbers."""


@dataclass(frozen=True)
class Rule:
    """One or several keys of the checkpoint (`theirs`) for one or several of ours."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]

    def load(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    def save(self, tensors: list[Tensor]) -> list[Tensor]:
        return tensors

    @cached_property
    def theirs_match(self) -> re.Pattern[str]:
        return _pattern(self.theirs[0])

    @cached_property
    def ours_match(self) -> re.Pattern[str]:
        return _pattern(self.ours[0])


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(re.escape(text).replace(r"\{n\}", r"(?P<n>\d+)").replace(r"\{rest\}", r"(?P<rest>.+)"))


class Rename(Rule):
    def __init__(self, theirs: str, ours: str):
        super().__init__((theirs,), (ours,))


class Alias(Rename):
    """Another spelling of a key that files may carry: accepted when read, never written."""


class Split(Rule):
    """Their one tensor is ours in equal parts along the first axis (a fused q/k/v projection)."""

    def __init__(self, theirs: str, *ours: str):
        super().__init__((theirs,), ours)

    def load(self, tensors: list[Tensor]) -> list[Tensor]:
        if tensors[0].shape[0] % len(self.ours):
            raise CheckpointError(f"file {tuple(tensors[0].shape)}, which does not divide into {len(self.ours)}")
        return list(tensors[0].chunk(len(self.ours)))

    def save(self, tensors: list[Tensor]) -> list[Tensor]:
        return [torch.cat(tensors)]


class Reshape(Rule):
    """The same values in another shape; -1 in a shape is inferred."""

    def __init__(self, theirs: str, ours: str, *, their_shape: tuple[int, ...], our_shape: tuple[int, ...]):
        super().__init__((theirs,), (ours,))
        object.__setattr__(self, "their_shape", their_shape)
        object.__setattr__(self, "our_shape", our_shape)

    def load(self, tensors: list[Tensor]) -> list[Tensor]:
        shape, wanted = tuple(tensors[0].shape), self.their_shape  # pyright: ignore[reportAttributeAccessIssue]
        fits = len(shape) == len(wanted) and all(w in (-1, s) for s, w in zip(shape, wanted, strict=True))
        if not fits and tensors[0].numel() > 1:  # a scalar may be stored as () or (1,)
            raise CheckpointError(f"file {shape}, model {wanted}")
        return [self._view(tensors[0], self.our_shape)]  # pyright: ignore[reportAttributeAccessIssue]

    def save(self, tensors: list[Tensor]) -> list[Tensor]:
        return [self._view(tensors[0], self.their_shape)]  # pyright: ignore[reportAttributeAccessIssue]

    def _view(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        try:
            return tensor.reshape(shape)
        except RuntimeError as error:
            raise CheckpointError(f"file {tuple(tensor.shape)}, which does not reshape to {shape}") from error


class Transpose(Rule):
    """A matrix stored the other way round (open_clip keeps projections as (in, out) parameters)."""

    def __init__(self, theirs: str, ours: str):
        super().__init__((theirs,), (ours,))

    def load(self, tensors: list[Tensor]) -> list[Tensor]:
        if tensors[0].ndim != 2:
            raise CheckpointError(f"file {tuple(tensors[0].shape)}, which should be a matrix")
        return [tensors[0].T.contiguous()]  # as a fresh model has it: another layout in memory is another order of sums

    def save(self, tensors: list[Tensor]) -> list[Tensor]:
        return [tensors[0].T]


class Ignore(Rule):
    """A buffer that old files carry and the model computes: accepted when read, never written."""

    def __init__(self, theirs: str):
        super().__init__((theirs,), ())


def convert(state: Mapping[str, Tensor], rules: Sequence[Rule], *, saving: bool = False) -> dict[str, Tensor]:
    """Rename every key of `state` by `rules`, theirs to ours, or ours to theirs when `saving`.

    Raises:
        CheckpointError: keys that no rule knows, or a rule that finds only some of its keys; the message lists them.
    """
    out: dict[str, Tensor] = {}
    unknown, used = [], set()
    for key in state:
        if key in used:
            continue
        rule, found = _rule_for(key, rules, saving)
        if rule is None or found is None:
            unknown.append(key)
            continue
        if not rule.ours:
            continue
        sources, targets = (rule.ours, rule.theirs) if saving else (rule.theirs, rule.ours)
        names = [_fill(pattern, found) for pattern in sources]
        absent = [name for name in names if name not in state]
        if absent:
            raise CheckpointError(f"{key} needs its partners {absent}, which are missing")
        used.update(names)
        tensors = [state[name] for name in names]
        try:
            made = rule.save(tensors) if saving else rule.load(tensors)
        except CheckpointError as error:
            raise CheckpointError(f"misshapen {' + '.join(names)}: {error}") from error
        for pattern, tensor in zip(targets, made, strict=True):
            out[_fill(pattern, found)] = tensor
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys that this model family does not have: {_some(unknown)}")
    return out


def _rule_for(key: str, rules: Sequence[Rule], saving: bool) -> tuple[Rule | None, dict[str, str] | None]:
    for rule in rules:
        if saving and (not rule.ours or isinstance(rule, Alias)):
            continue
        patterns = rule.ours if saving else rule.theirs
        match = (rule.ours_match if saving else rule.theirs_match).fullmatch(key)
        if match:
            return rule, match.groupdict()
        for pattern in patterns[1:]:  # a partner may come first in the file
            match = _pattern(pattern).fullmatch(key)
            if match:
                return rule, match.groupdict()
    return None, None


def _fill(pattern: str, found: dict[str, str]) -> str:
    for name, value in found.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    return pattern


def _some(keys: Sequence[str], count: int = 8) -> str:
    return ", ".join(keys[:count]) + (f" and {len(keys) - count} more" if len(keys) > count else "")


def theirs_of(key: str, rules: Sequence[Rule], present: Container[str] = ()) -> str:
    """How a checkpoint spells one of our keys; of several spellings the one among `present`, else the one that is written."""
    spellings = []
    for rule in rules:
        for pattern in rule.ours:
            match = _pattern(pattern).fullmatch(key)
            if match:
                spellings.append(" + ".join(_fill(theirs, match.groupdict()) for theirs in rule.theirs))
    return next((name for name in spellings if name in present), spellings[0] if spellings else key)


def is_finite(values: Tensor) -> bool:
    """Whether none of many numbers is NaN or infinite. By the least and the most, which NaN makes NaN: on the CPU 20 times as fast as by
    asking each."""
    return not values.numel() or all(bool(torch.isfinite(bound)) for bound in torch.aminmax(values))


def check_against(
    state: Mapping[str, Tensor], model: torch.nn.Module, where: str, rules: Sequence[Rule], present: Container[str] = ()
) -> None:
    """Compare converted tensors with a model's own.

    Args:
        state: tensors by our keys.
        rules: what converted them: a message names a tensor as the file does, and says our name too where it is another.
        present: the file's own keys.

    Raises:
        CheckpointError: names the missing, surplus and misshapen keys and the tensors with NaN or infinity or of fewer bits than 16, all
            in one line.
    """
    wanted = model.state_dict()

    def named(key: str) -> str:
        theirs = theirs_of(key, rules, present)
        return key if theirs == key else f"{theirs} (here {key})"

    found = []
    for key in wanted.keys() - state.keys():
        found.append(f"missing {named(key)} {tuple(wanted[key].shape)}{nearest(key, state.keys() - wanted.keys())}")
    for key in state.keys() - wanted.keys():
        found.append(f"surplus {named(key)} {tuple(state[key].shape)}")
    for key in wanted.keys() & state.keys():
        if wanted[key].shape != state[key].shape:
            found.append(f"misshapen {named(key)}: file {tuple(state[key].shape)}, model {tuple(wanted[key].shape)}")
        elif wanted[key].is_floating_point() and state[key].dtype not in READ_TYPES:
            found.append(f"of type {str(state[key].dtype).removeprefix('torch.')} {named(key)}: quantised weights are not read")
        elif state[key].dtype in READ_TYPES and not is_finite(state[key]):
            found.append(f"not finite {named(key)}: NaN or infinity among its values")
    if found:
        shown = "; ".join(sorted(found)[:12]) + ("" if len(found) <= 12 else f"; and {len(found) - 12} more")
        raise CheckpointError(f"{where} does not fit its config: {shown}")
