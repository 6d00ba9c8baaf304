"""Zero-shot classification: a class is the mean direction of its prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import IntermodalError
from ..files import read_lines
from .templates import TEMPLATES, checked

TILE = 4096
"""Pictures and classes that are compared at once."""


@dataclass(frozen=True)
class ClassNames:
    """What the classes are called in prompts, and which class a picture's caption or folder name means."""

    names: list[str]
    label_number: Mapping[str, int]
    where: str
    lines: Sequence[str] = ()
    """The label in each line of a file, empty lines among them: what the number in a `.cls` means, the first being 0."""

    @classmethod
    def plain(cls, labels: Iterable[str], where: str = "the source") -> ClassNames:
        """Every caption is a class and its own name."""
        names = list(dict.fromkeys(labels))
        return cls(names, {name: number for number, name in enumerate(names)}, where)

    @classmethod
    def read(cls, file: Path) -> ClassNames:
        """A line is a class's name, or `label<TAB>name`: what the source calls the class (n01440764), and what prompts do (tench).

        Labels of one name are one class: their prompts are the same. A label also means the folder that readers spell with spaces.

        Raises:
            IntermodalError: half a line, a label with two names, no line at all, or another encoding than UTF-8.
        """
        number: dict[str, int] = {}
        labels: dict[str, int] = {}
        spelt: dict[str, int] = {}
        lines: list[str] = []
        for at, line in enumerate(read_lines(file), 1):
            label, mapped, name = line.partition("\t")
            label, name = label.strip(), name.strip()
            lines.append(label)
            if not label and not name:
                continue
            if mapped and not (label and name):
                raise IntermodalError(f"{file}:{at}: {line!r} has a tab and only one side; write label<TAB>name, or a name alone")
            own = number.setdefault(name if mapped else label, len(number))
            if labels.setdefault(label, own) != own:
                raise IntermodalError(f"{file}:{at}: {label!r} has another name in an earlier line; keep one of them")
            if mapped:
                spelt.setdefault(label.replace("_", " ").replace("-", " "), own)
        if not number:
            raise IntermodalError(f"{file} names no class: it wants one a line")
        return cls(list(number), spelt | labels, str(file), lines)

    def numbers(self, labels: Sequence[str]) -> list[int]:
        """The class of each label. Raises IntermodalError: some have no line."""
        absent = sorted(set(labels) - self.label_number.keys())
        if absent:
            raise IntermodalError(
                f"{self.where}: {len(absent)} of the source's captions are not among the classes, the first: {absent[0]!r}; "
                f"add a line for each, as it is or as label<TAB>name"
            )
        return [self.label_number[label] for label in labels]


@torch.no_grad()
def class_embeddings(
    embed_texts: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:
    """(C, E) unit vectors: the mean over templates of normalised embeddings, normalised again (open_clip
    `zero_shot_classifier.py:62-63`).

    Raises:
        IntermodalError: a template has no {} for the name.
    """
    checked(templates)
    out = []
    for low in range(0, len(names), TILE):
        prompts = [template.replace("{}", name) for name in names[low : low + TILE] for template in templates]
        vectors = F.normalize(embed_texts(prompts), dim=-1).unflatten(0, (-1, len(templates)))
        out.append(F.normalize(vectors.mean(1), dim=-1))
    return torch.cat(out)


@torch.no_grad()
def nearest_classes(image_NE: Tensor, class_CE: Tensor, k: int, tile: int = TILE) -> Tensor:
    """(N, min(k, C)) numbers of the nearest classes, best first, in tiles: a picture's scores are never held for all classes."""
    k = min(k, len(class_CE))
    out = torch.empty(len(image_NE), k, dtype=torch.long)
    for start in range(0, len(image_NE), tile):
        images = image_NE[start : start + tile]
        best = images.new_empty(len(images), 0)
        which = torch.empty(len(images), 0, dtype=torch.long, device=images.device)
        for low in range(0, len(class_CE), tile):
            scores = images @ class_CE[low : low + tile].T
            here, numbers = scores.topk(min(k, scores.shape[1]), dim=1)
            best, which = torch.cat([best, here], 1), torch.cat([which, numbers + low], 1)
            best, kept = best.topk(min(k, best.shape[1]), dim=1)
            which = which.gather(1, kept)
        out[start : start + len(images)] = which.cpu()
    return out


def accuracy(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int], at: Sequence[int] = (1, 5)) -> dict[str, float]:
    """`top-k` accuracy of the nearest classes, and the mean over classes of their top-1 (CLIP_benchmark's mean per class recall)."""
    truth = torch.tensor(labels)
    hit = nearest_classes(image_NE, class_CE, max(at)) == truth[:, None]
    pictures = torch.bincount(truth, minlength=len(class_CE))
    right = torch.bincount(truth[hit[:, 0]], minlength=len(class_CE))
    mean = (right[pictures > 0] / pictures[pictures > 0]).mean().item()
    return {f"top-{k}": hit[:, :k].any(1).float().mean().item() for k in at} | {"mean per class": mean}


def per_class(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int], names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each class that occurs: how many pictures, their top-1 accuracy, and what the others are taken for most; worst first."""
    guesses = nearest_classes(image_NE, class_CE, 1)[:, 0].tolist()
    found: dict[int, list[int]] = {}
    for true, guess in zip(labels, guesses, strict=True):
        found.setdefault(true, []).append(guess)
    rows: dict[str, dict[str, Any]] = {}
    for true, given in found.items():
        wrong = Counter(guess for guess in given if guess != true).most_common(1)
        row = {"samples": len(given), "top-1": given.count(true) / len(given)}
        rows[names[true]] = row | {"taken for": names[wrong[0][0]] if wrong else None}
    return dict(sorted(rows.items(), key=lambda item: item[1]["top-1"]))


def confusions(image_NE: Tensor, class_CE: Tensor, labels: Sequence[int]) -> dict[tuple[int, int], int]:
    """(true class, predicted class) -> how often, mistakes only, most frequent first."""
    guesses = nearest_classes(image_NE, class_CE, 1)[:, 0].tolist()
    return dict(Counter(pair for pair in zip(labels, guesses, strict=True) if pair[0] != pair[1]).most_common())
